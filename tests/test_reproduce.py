"""The published results of the negation study: what needs no weights, on the real d; and `--against` a slow loop."""

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from slow_study import study as slow_study
from towers import random_clip, random_store, randomise

import clip_lens
from clip_lens.data.batch import align
from clip_lens.data.read import read_pairs
from clip_lens.methods.confounds import ALL, WITHOUT, confounds
from clip_lens.model.load import load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import fetch_clip_localisation
import negation_published
import reproduce_negation_study
from negation_published import Published, compare, summary, verdicts

LAYERS, HEADS, BLOCK = 3, 4, 1
EVERY = 8
TIGHT = 1e-9  # in float64

# What needs no weights


@pytest.fixture(scope="session")
def rephrased(shared):
    return read_pairs(shared / "data" / "valse" / "existence.json").rephrased()


@pytest.fixture(scope="session")
def published(shared):
    return Published.read(shared / "data" / "clip-localisation")


@pytest.fixture(scope="session")
def real(published):
    """What goes along with the real model's d, by the package's own functions."""
    return published.confounds(list(published.pairs.index))


def test_rephrasing_and_sides_are_the_studys(rephrased, published):
    theirs = published.pairs.loc[list(rephrased.key)]
    assert len(rephrased) == len(published.pairs) == 490
    for ours, column in (("caption", "caption"), ("foil", "foil"), ("side", "negation"), ("image", "image_file")):
        assert list(getattr(rephrased, ours)) == theirs[column].tolist()


def test_tokens_are_the_studys(rephrased, published):
    encoder = load(random_clip(layers=1, width=32, heads=4, d_embed=16), tokenizer=open_clip.SimpleTokenizer())
    found = confounds(encoder, align(rephrased, random_store(rephrased, 16), encoder)).frame.set_index("key")
    assert found.tokens.to_dict() == published.pairs.positions.to_dict()


def test_segments_and_scores_are_the_studys(real, published):
    """Figures of the published pairs, computed twice without this package."""
    frame = real.frame.set_index("key")
    assert frame.segment.to_dict() == published.pairs.segment.to_dict()
    counts = pd.crosstab(frame.side, frame.segment)[["correct", "ambiguous", "incorrect"]]
    assert counts.loc["caption"].tolist() == [72, 150, 28] and counts.loc["foil"].tolist() == [81, 145, 14]
    table = real.accuracy().set_index(["pairs", "side"])
    for side, n, accuracy, mean, spread in (("caption", 250, 0.668, 0.435, 1.208), ("foil", 240, 0.704, 0.604, 1.132)):
        row = table.loc[(ALL, side)]
        assert row.n == n and [row.accuracy, row.mean_d] == pytest.approx([accuracy, mean], abs=5e-4)
        assert frame.d[frame.side == side].std() == pytest.approx(spread, abs=5e-4)
        assert row.lower < row.accuracy < row.upper


@pytest.mark.parametrize(
    ("feature", "side", "pairs", "r", "n"),
    [
        ("cosine", "caption", ALL, 0.032, 250),
        ("cosine", "foil", ALL, -0.219, 240),
        ("cosine", "caption", WITHOUT, -0.201, 206),
        ("cosine", "foil", WITHOUT, -0.219, 240),
        ("tokens", "caption", ALL, 0.112, 250),
        ("tokens", "foil", ALL, -0.191, 240),
        ("subject_size", "foil", ALL, 0.321, 236),
        ("subject_size", "pooled", ALL, 0.321, 236),
    ],
)
def test_correlations_are_the_studys(real, feature, side, pairs, r, n):
    row = real.correlations().set_index(["feature", "side", "pairs"]).loc[(feature, side, pairs)]
    assert row.n == n and row.r == pytest.approx(r, abs=5.1e-4)
    assert real.most_frequent == "There are no people."


def test_the_size_of_what_is_not_in_the_picture_is_not_defined(real):
    undefined = "not defined for negation in the caption (250 of 490 pairs); of the others missing in 4 of 240 pairs"
    assert real.missing["subject_size"] == undefined
    row = real.correlations().set_index(["feature", "side", "pairs"]).loc[("subject_size", "caption", ALL)]
    assert row.n == 0 and np.isnan(row.r)


def test_the_threshold_curve_is_the_studys(real, published):
    """Accuracy among the pairs with size > t, counted pair by pair."""
    table = real.by_size(negation_published.SIZES)
    found = table[(table.side == "foil") & (table.pairs == ALL)].set_index("threshold")
    items = [item for item in published.pairs.to_dict("records") if item["subject_area"] is not None]
    items = [item for item in items if item["subject_area"] == item["subject_area"]]
    assert len(found) == 61 and (found.n[0.0], found.n[0.1], found.n[0.6]) == (236, 102, 1)
    for threshold, row in found.iterrows():
        large = [item["score"] > 0 for item in items if item["subject_area"] > threshold]
        assert (row.n, row.accuracy) == (len(large), pytest.approx(sum(large) / len(large), abs=1e-12))
    assert found.accuracy[0.0] == pytest.approx(0.7034, abs=5e-5) and found.accuracy[0.1] == pytest.approx(
        0.8529, abs=5e-5
    )


def test_the_regression_of_the_real_d_has_slopes_in_standard_deviations(real):
    table = real.regression()
    whole = table[table.pairs == ALL].set_index("term")
    assert whole.n.iloc[0] == 486 and whole.note["subject_size"] == "missing in 4, which are left out"
    assert whole.coefficient["subject_size"] > 0 and whole.lower["subject_size"] > 0
    sizes = real.frame.subject_size.dropna()
    inside = real.frame.assign(size=real.frame.subject_size.where(real.frame.side == "foil", sizes.mean())).dropna(
        subset="size"
    )
    expected = whole.coefficient["subject_size"] * inside["size"].std() / inside.d.std()
    assert whole.standardised["subject_size"] == pytest.approx(expected, rel=1e-9)


# Against a slow loop on a small random tower


@pytest.fixture(scope="module")
def clip():
    clip = random_clip(layers=LAYERS, width=32, heads=HEADS, d_embed=16, seed=2).double().requires_grad_(False)
    clip.logit_scale.fill_(np.log(40.0))
    return clip


@pytest.fixture(scope="module")
def some(rephrased):
    return rephrased[::EVERY]


@pytest.fixture(scope="module")
def store(some):
    return random_store(some, 16, seed=3)


@pytest.fixture(scope="module")
def slow(clip, some, store, tmp_path_factory):
    """A folder as it is fetched, made by plain hooks."""
    images = {image: store[[image]][0].double() for image in some.image}
    return written(tmp_path_factory.mktemp("published"), *slow_study(clip, some, images, BLOCK))


def written(folder, pairs, arrays):
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "arrays.json").write_text(json.dumps(arrays))
    return folder


@pytest.fixture(scope="module")
def cells(clip, some, store, slow):
    return compare(encoder_of(clip), store, some, Published.read(slow), progress=False)


def encoder_of(clip):
    return load(clip, tokenizer=open_clip.SimpleTokenizer(), dtype=torch.float64)


def test_everything_agrees_with_a_slow_loop(cells, slow, some):
    found = verdicts(cells, TIGHT)
    assert set(found.verdict) == {"agrees"} and (found.cells == found.within).all() and not found.missing.any()
    published = Published.read(slow)
    assert summary(found, TIGHT) == [
        f"{len(some)} of {len(some)} published pairs are compared; their texts and tokens are equal.",
        f"Everything agrees: all {found.weights.sum()} tables that depend on the weights, to 1e-09 in every cell.",
    ]
    segments = published.pairs.groupby(["negation", "segment"]).size()
    assert len(segments) == 6 and segments.min() >= 2
    sized = found.set_index(["table", "side"])
    assert (found.pairs == found.their_pairs).all() and set(found.pairs[found.side == ""]) == {len(some)}
    for side, segment in (("caption", "correct"), ("foil", "correct"), ("foil", "incorrect")):
        assert sized.pairs[f"causal tracing, {segment}", side] == segments[side, segment]
    assert sized.pairs["selectivity", "foil"] == segments["foil"].sum()
    counted = sized.cells
    assert counted["causal tracing, correct", "foil"] == 5 * (LAYERS - 1)
    assert counted["selectivity", "caption"] == LAYERS * HEADS == counted["selectivity and d", "foil"]
    assert counted[f"attention by position, block {BLOCK}", "foil"] == HEADS * 4
    assert counted["d", ""] == len(some) and counted["accuracy by subject size", ""] > 20


def changed(cells, table, row, column, by):
    """The cells as they are where one published number is another one."""
    where = (cells.table == table) & (cells.row == row) & (cells.column == column)
    assert where.any()
    return cells.assign(difference=cells.difference.where(~where, by))


@pytest.mark.parametrize(("by", "verdict"), [(9e-5, "agrees"), (2e-4, "close"), (0.5, "differs"), (np.nan, "differs")])
def test_one_cell_decides(cells, by, verdict):
    found = verdicts(changed(cells, "selectivity", 1, 2, by), 1e-4)
    assert set(found[found.table == "selectivity"].verdict) == {verdict}
    others = found[found.table != "selectivity"]
    assert set(others.verdict) == {"agrees"}
    if verdict == "differs":
        assert found[found.table == "selectivity"]["where"].tolist() == ["1, 2"] * 2


def test_a_cell_that_holds_in_any_tower_is_not_counted_and_must_hold(cells):
    found = verdicts(changed(cells, "causal tracing, correct", "eot", LAYERS, 0.5), 1e-4)
    traced = found[found.table == "causal tracing, correct"]
    assert set(traced.verdict) == {"differs"} and (traced.cells == traced.within).all()


def test_another_text_and_another_segment_are_found(clip, some, store, slow, tmp_path):
    pairs, arrays = (json.loads((slow / name).read_text()) for name in ("pairs.json", "arrays.json"))
    first, second = list(pairs)[:2]
    pairs[first]["caption"] += " "
    pairs[second]["segment"] = "unknown"
    found = verdicts(
        compare(encoder_of(clip), store, some, Published.read(written(tmp_path, pairs, arrays)), progress=False)
    )
    rows = found.set_index("table")
    for table, where in (("texts, sides, images", f"{first}, caption"), ("segment", f"{second}, segment")):
        assert rows.loc[table, "verdict"] == "differs" and rows.loc[table, "where"] == where
        assert rows.loc[table, "cells"] - rows.loc[table, "within"] == 1
    assert "these differ in: texts, sides, images" in summary(found, 1e-4)[0]


def test_on_another_tower_nothing_agrees(some, store, slow):
    other = random_clip(layers=LAYERS, width=32, heads=HEADS, d_embed=16, seed=9).double().requires_grad_(False)
    published = Published.read(slow)
    found = verdicts(compare(encoder_of(other), store, some, published, progress=False))
    data = found[~found.weights]
    assert set(data.verdict) == {"agrees"} and set(found[found.weights].verdict) == {"differs"}
    assert summary(found, 1e-4)[1].startswith("Nothing agrees: each of ")


def test_without_a_correct_pair_of_ours_there_is_nothing_to_trace(clip, some, store, slow):
    encoder = encoder_of(clip)
    encoder.scale = 1e-3
    found = verdicts(compare(encoder, store, some, Published.read(slow), progress=False)).set_index(["table", "side"])
    traced = found.loc["causal tracing, correct"]
    assert (
        (traced.missing == traced.cells).all()
        and not traced.within.any()
        and set(traced.pairs) == {0}
        and set(traced.verdict) == {"differs"}
    )
    assert found.verdict["selectivity", "foil"] == "agrees"  # it does not depend on the images


def test_what_is_written_says_it(cells, slow, tmp_path):
    found = verdicts(cells, TIGHT)
    said = summary(found, TIGHT)
    reproduce_negation_study.write(tmp_path, "ours and theirs", cells, found, said)
    assert len(pd.read_csv(tmp_path / "against.csv")) == len(found)
    assert len(pd.read_csv(tmp_path / "against-cells.csv")) == len(cells)
    for name in ("against.md", "against.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Everything agrees" in text and "causal tracing, correct" in text
    lines = (tmp_path / "against.md").read_text().splitlines()
    assert sum(line.endswith("| agrees |") for line in lines) == len(found)


def test_what_cannot_be_compared_is_refused(clip, some, store, slow, tmp_path, capsys):
    published = Published.read(slow)
    with pytest.raises(ValueError, match=r"of a tower of 3 layers x 4 heads; .* has 6 x 4"):
        compare(clip_lens.load(), store, some, published)
    renamed = clip_lens.Pairs.from_frame(some.to_frame().assign(key=lambda frame: "my " + frame.key))
    with pytest.raises(ValueError, match="has a published key"):
        compare(encoder_of(clip), store, renamed, published)
    with pytest.raises(ValueError, match=r"can't read .*pairs.json.*fetch_clip_localisation"):
        Published.read(tmp_path)
    arrays = json.loads((slow / "arrays.json").read_text())
    del arrays["selectivity"]
    with pytest.raises(ValueError, match="lacks selectivity"):
        Published.read(written(tmp_path, json.loads((slow / "pairs.json").read_text()), arrays))


def test_the_published_folder_is_read_before_anything_is_computed(shared, tmp_path, capsys):
    existence = shared / "data" / "valse" / "existence.json"
    options = ["--pairs", existence, "--images", tmp_path / "none", "--out", tmp_path / "out", "--against", tmp_path]
    assert reproduce_negation_study.main([str(option) for option in options]) == 1
    assert "fetch_clip_localisation.py" in capsys.readouterr().err and not (tmp_path / "out").exists()


# The fetch


class H5:
    """What h5py.File gives of the study's files, here written as JSON."""

    def __init__(self, path):
        self.content = {name: np.array(rows) for name, rows in json.loads(Path(path).read_text()).items()}

    def __enter__(self):
        return self.content

    def __exit__(self, *error):
        pass


def test_published_files_become_what_is_compared(tmp_path, monkeypatch, capsys):
    from hashlib import sha256
    from types import SimpleNamespace

    served, digests = tmp_path / "data", {}
    for number, name in enumerate(fetch_clip_localisation.DIGESTS):
        content = {"results": [[number, 0.5]], "correlations": [[-number, 0.25]]} if name.endswith(".h5") else {"a": {}}
        (served / name).parent.mkdir(parents=True, exist_ok=True)
        (served / name).write_text(json.dumps(content))
        digests[name] = sha256((served / name).read_bytes()).hexdigest()
    monkeypatch.setattr(fetch_clip_localisation, "DIGESTS", digests)
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=H5))
    arguments = ["--out", str(tmp_path / "out"), "--base", served.as_uri()]
    assert fetch_clip_localisation.main(arguments) == 0 == fetch_clip_localisation.main(arguments)
    assert capsys.readouterr().out.count("is there already") == 8
    arrays = json.loads((tmp_path / "out" / "arrays.json").read_text())
    assert json.loads((tmp_path / "out" / "pairs.json").read_text()) == {"a": {}}
    first = {name: {side: rows[0][0] for side, rows in arrays[name].items()} for name in list(arrays)[1:]}
    assert first == {
        "causal_tracing": {"caption, correct": 1, "foil, correct": 2, "foil, incorrect": 3},
        "selectivity": {"caption": 4, "foil": 5},
        "selectivity_correlation": {"caption": -4, "foil": -5},
        "attention_by_position_block_3": {"caption": 6, "foil": 7},
    }
    (served / list(digests)[3]).write_text("{}")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert fetch_clip_localisation.main([*arguments, "--overwrite"]) == 1
    assert "the download is damaged or the file has changed" in capsys.readouterr().err
    assert fetch_clip_localisation.main(arguments) == 1 and "pip install h5py" in capsys.readouterr().err


def test_positions_have_the_names_of_slots():
    assert set(fetch_clip_localisation.POSITIONS) <= set(clip_lens.data.slots.SLOTS)
    assert len(fetch_clip_localisation.COMMIT) == 40 and fetch_clip_localisation.COMMIT in fetch_clip_localisation.BASE


# Full size


@pytest.mark.slow
def test_a_full_size_tower_agrees_with_a_slow_loop_in_float32(rephrased, tmp_path):
    """ViT-B/32's own shape, 31 pairs: every cell to a ten-thousandth."""
    some = rephrased[::16]
    clip = randomise(open_clip.create_model("ViT-B-32-quickgelu")).requires_grad_(False)
    clip.logit_scale.fill_(np.log(100.0))
    store = random_store(some, 512)
    images = {image: store[[image]][0].float() for image in some.image}
    published = Published.read(written(tmp_path, *slow_study(clip, some, images, 3)))
    encoder = load(clip, tokenizer=open_clip.get_tokenizer("ViT-B-32-quickgelu"))
    assert encoder.dtype == torch.float32
    found = verdicts(compare(encoder, store, some, published), 1e-4)
    assert summary(found, 1e-4)[1].startswith("Everything agrees: all 17 tables"), found.to_string()


@pytest.mark.slow
def test_on_random_weights_the_script_says_that_nothing_agrees(shared, rephrased, tmp_path, capsys, monkeypatch):
    """All 490 pairs against the published folder; the study itself runs whole in show/test_study.py."""
    ids = sorted(set(rephrased.image))
    vectors = torch.randn(len(ids), 512, generator=torch.Generator().manual_seed(0))
    images = clip_lens.ImageStore.from_tensors(ids, vectors, model="ViT-B-32", pretrained="random")
    images.save(tmp_path / "made-up.safetensors")
    monkeypatch.setattr(reproduce_negation_study, "study", lambda given, store: 0)
    (tmp_path / "out").mkdir()
    options = {
        "--pairs": shared / "data" / "valse" / "existence.json", "--images": tmp_path / "made-up.safetensors",
        "--pretrained": "random", "--out": tmp_path / "out", "--against": shared / "data" / "clip-localisation",
    }  # fmt: skip
    assert reproduce_negation_study.main([str(word) for option in options.items() for word in option]) == 0
    said = capsys.readouterr().out
    assert "490 of 490 published pairs are compared; their texts and tokens are equal." in said
    assert "Nothing agrees: each of 17 tables" in said
    found = pd.read_csv(tmp_path / "out" / "against.csv")
    assert found.verdict.tolist() == ["agrees"] * 2 + ["differs"] * 17
