"""Scores and confounds: features against open_clip and by hand, tables against scipy, numpy and counting."""

import numpy as np
import open_clip
import pandas as pd
import pytest
import scipy.stats
import torch
from formulas import by_formula
from pandas import DataFrame
from towers import random_clip, random_store

import clip_lens
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.data.read import read_pairs
from clip_lens.methods.confounds import FEATURES, WITHOUT, Confounds, confounds, subject_phrases
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.scores import pair_scores, scores, tally
from clip_lens.methods.statistics import proportion
from clip_lens.model.load import load

CAPTIONS = ("There are no people.", "There is a dog.", "There are no people.", "There are some red cars.")
CAPTIONS += ("There is no cat.", "There is no dog.", "There are some people here.", "There is a cat.")
FOILS = ("There are some people.", "There is no dog.", "There are people.", "There are no red cars.")
FOILS += ("There is a cat.", "There is a dog.", "There are no people here.", "There is no cat.")
# By hand: start, words, full stop, end of text; what follows the negator; 1 where the caption has the "no".
TOKENS = [7, 7, 7, 8, 7, 7, 8, 7]
SUBJECTS = ["people", "dog", "people", "red cars", "cat", "dog", "people here", "cat"]
SIDES = ["caption", "foil", "caption", "foil", "caption", "caption", "foil", "foil"]
FREQUENT = [True, False, True, False, False, False, False, False]
SIZES = [0.0, 0.5, 0.1, 0.3, 0.0, 0.05, 0.6, 0.2]
DEFINED = [None, 0.5, None, 0.3, None, None, 0.6, 0.2]  # where the caption negates the subject it has no size


@pytest.fixture(scope="module")
def clip():
    return random_clip(layers=2, width=32, heads=4, d_embed=16, seed=2).double().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder(clip):
    return load(clip, tokenizer=open_clip.SimpleTokenizer(), dtype=torch.float64)


def eight(**info):
    return Pairs(list("abcdefgh"), CAPTIONS, FOILS, [f"{row}.png" for row in range(8)], DataFrame(info))


@pytest.fixture(scope="module")
def store():
    return random_store(eight(), 16, seed=1)


@pytest.fixture(scope="module")
def found(encoder, store):
    return confounds(encoder, align(eight(subject_size=SIZES), store, encoder))


@pytest.fixture(scope="module")
def plain(clip, store):
    """(S(caption), S(foil), cosine) of every pair by open_clip alone."""
    u, v = (clip.encode_text(open_clip.tokenize(list(texts)), normalize=True) for texts in (CAPTIONS, FOILS))
    image = store[[f"{row}.png" for row in range(8)]].double()
    scale = clip.logit_scale.exp()
    return scale * (u * image).sum(1), scale * (v * image).sum(1), (u * v).sum(1)


@pytest.mark.parametrize("run", ["affirmative", "negated", "caption", "foil"])
def test_scores_of_pairs_are_open_clips_whichever_text_is_run(encoder, store, plain, run):
    batch = align(eight(), store, encoder, run=run)
    scored = pair_scores(encoder, batch)
    for mine, theirs in zip(scored, (plain[0], plain[1], plain[0] - plain[1], plain[2]), strict=True):
        assert (mine - theirs).abs().max() < 1e-10
    patched = patch_effects(encoder, batch, encoder.sites("mlp", layers=[0]))
    assert patched.pairs.d.to_numpy() == pytest.approx(scored.d.numpy(), abs=1e-10)


def test_d_is_that_of_patching_on_the_embedded_model():
    encoder = clip_lens.load()
    batch = align(read_pairs("tiny")[:300], clip_lens.ImageStore.open("tiny"), encoder)
    d = patch_effects(encoder, batch, encoder.sites("resid", layers=[6], slots=("eot",))).pairs.d
    assert confounds(encoder, batch).frame.d.to_numpy() == pytest.approx(d.to_numpy(), abs=1e-4)
    table = scores(encoder, batch).set_index("side")
    assert table.accuracy["overall"] == (d > 0).mean() and table.mean_d["overall"] == pytest.approx(d.mean(), abs=1e-4)


def test_features_are_those_counted_by_hand(found, plain):
    frame = found.frame
    assert list(frame.columns) == [
        *("key", "caption", "foil", "image", "side", "d", "correct", "segment", "cosine", "tokens", "subject"),
        *("subject_size", "most_frequent"),
    ]
    d = plain[0] - plain[1]
    assert frame.d.to_numpy() == pytest.approx(d.numpy(), abs=1e-10)
    assert frame.cosine.to_numpy() == pytest.approx(plain[2].numpy(), abs=1e-10)
    assert frame.correct.tolist() == (d > 0).tolist() and 0 < frame.correct.sum() < 8
    assert frame.tokens.tolist() == TOKENS and frame.subject.tolist() == SUBJECTS
    assert frame.side.tolist() == SIDES and frame.most_frequent.tolist() == FREQUENT
    assert frame.subject_size.tolist() == pytest.approx(
        [float("nan") if s is None else s for s in DEFINED], nan_ok=True
    )
    assert found.missing == {
        "subject_size": "not defined for negation in the caption (4 of 8 pairs); the sizes given for 2 of them are not "
        "used"
    }
    assert found.most_frequent == "There are no people."


def test_correlations_are_scipys_per_side_with_and_without_the_most_frequent_caption(found):
    table = found.correlations(0.9).set_index(["pairs", "feature", "side"])
    assert len(table) == 2 * len(FEATURES) * 3
    frame = found.frame.astype({"most_frequent": float})
    compared = 0
    for (pairs, feature, side), row in table.iterrows():
        part = frame[frame.most_frequent == 0] if pairs == WITHOUT else frame
        part = (part if side == "pooled" else part[part.side == side]).dropna(subset=feature)
        assert row.n == len(part)
        if len(part) < 3 or part[feature].nunique() < 2:
            assert pd.isna(row.r) and row.note
            continue
        expected = scipy.stats.pearsonr(part[feature], part.d)
        bounds = expected.confidence_interval(0.9)
        assert row[["r", "p", "lower", "upper"]].tolist() == pytest.approx([*expected, *bounds], abs=1e-12)
        compared += 1
    assert compared == 15
    assert table.note[(WITHOUT, "most_frequent", "pooled")] == "most_frequent is constant"
    assert table.note[(WITHOUT, "cosine", "caption")] == "2 pairs, a correlation needs 3"


def test_regression_is_numpys_with_hc3_by_formula(found):
    table = found.regression(least=3)
    whole = table[table.pairs == "all"].set_index("term")
    frame = found.frame
    terms = ["intercept", "cosine", "tokens", "subject_size", "most_frequent", "side = foil"]
    columns = [frame[name].fillna(1.6 / 4) for name in terms[1:5]]  # the mean of the sizes that are defined
    X = torch.tensor([[1.0] * 8, *(column.astype(float).tolist() for column in columns), (frame.side == "foil") * 1.0])
    expected, r2 = by_formula(frame.d.to_numpy(), X.double().T.numpy())
    assert list(whole.index[:6]) == terms and set(whole.n) == {8} and whole.r2.iloc[0] == pytest.approx(r2, abs=1e-9)
    fitted = whole.loc[terms, ["coefficient", "error", "lower", "upper", "p"]].to_numpy()
    assert fitted == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert whole.note["subject"] == "no entry occurs 3 times"
    spread = dict(zip(terms, X.double().std(1, correction=0).tolist(), strict=True))
    for term in terms[1:]:
        expected = whole.coefficient[term] * spread[term] / frame.d.std(ddof=0)
        assert whole.standardised[term] == pytest.approx(expected, rel=1e-10)
    assert pd.isna(whole.standardised["intercept"])
    without = table[table.pairs == WITHOUT].set_index("term")
    assert set(without.n) == {6} and without.note["most_frequent"] == "constant (0)"


def hand():
    """Eight pairs with d given, so that every count can be checked by eye."""
    d = [2.0, -1.0, 0.0, 3.0, 1.0, -2.0, 0.5, 4.0]
    frame = DataFrame(
        {"key": list("abcdefgh"), "side": SIDES, "d": d, "subject_size": SIZES, "most_frequent": FREQUENT}
    )
    return Confounds(frame.assign(correct=frame.d > 0, cosine=1.0, tokens=TOKENS, subject=SUBJECTS))


def test_accuracy_by_hand():
    """Right: a, d, e, g, h. Caption side: a c e f, foil side: b d g h; without a, c two of the caption side."""
    table = hand().accuracy(0.9)
    rows = table.set_index(["pairs", "side"])[["right", "n", "ties", "mean_d"]]
    assert rows.loc["all"].to_numpy().tolist() == [[5, 8, 1, 0.9375], [2, 4, 1, 0.25], [3, 4, 0, 1.625]]
    assert rows.loc[WITHOUT].to_numpy().tolist() == [[4, 6, 0, 5.5 / 6], [1, 2, 0, -0.5], [3, 4, 0, 1.625]]
    assert table.tied.tolist() == [("c",), ("c",), (), (), (), ()]
    for row in table.itertuples():
        share = proportion(row.right, row.n, interval=0.9)
        assert (row.accuracy, row.lower, row.upper) == share[:3]


def test_accuracy_by_subject_size_by_hand():
    """More than .05: b wrong, c tied, d g h right; than .3: b wrong, g right (d has .3 itself); than .7: none."""
    table = hand().by_size([0.05, 0.3, 0.7])
    rows = table.set_index(["pairs", "threshold", "side"])
    share = lambda *cell: (rows.accuracy[cell], rows.n[cell])
    assert share("all", 0.05, "overall") == (0.6, 5) and share("all", 0.3, "overall") == (0.5, 2)
    assert share("all", 0.05, "caption") == (0.0, 1) and share("all", 0.05, "foil") == (0.75, 4)
    assert share(WITHOUT, 0.05, "overall") == (0.75, 4) and rows.n[(WITHOUT, 0.05, "caption")] == 0
    assert rows.n[("all", 0.7, "overall")] == 0 and pd.isna(rows.accuracy[("all", 0.7, "overall")])
    assert rows.loc[("all", 0.05, "overall"), ["lower", "upper"]].tolist() == list(proportion(3, 5)[1:3])
    assert sorted(set(hand().by_size().threshold))[0] == 0.0 and len(set(hand().by_size().threshold)) <= 10


def test_missing_and_constant_features_are_said_and_no_crash(encoder, store):
    """No sizes, all captions different: both are said, and every table still comes."""
    pairs = eight()[[0, 1, 3, 4, 7]]
    bare = confounds(encoder, align(pairs, store, encoder))
    assert bare.missing == {
        "subject_size": "missing in 5 of 5 pairs; the pairs have no column subject_size",
        "most_frequent": "every caption occurs once",
    }
    assert "missing: subject_size, most_frequent" in repr(bare) and "every caption" in bare._repr_html_()
    table = bare.regression().set_index(["pairs", "term"])
    assert table.note[("all", "subject_size")] == "missing"
    assert "most_frequent" not in bare.features and set(bare.accuracy().pairs) == {"all"}
    assert len(bare.by_size()) == 0 and len(bare.by_size([0.1])) == 0
    cells = bare.correlations().set_index(["pairs", "feature", "side"])
    assert cells.note[("all", "subject_size", "pooled")].startswith("0 pairs, a correlation needs 3; 5 of 5")


def test_some_sizes_missing(encoder, store):
    sizes = [None, "big", *SIZES[2:]]
    some = confounds(encoder, align(eight(subject_size=sizes), store, encoder))
    unused = "not defined for negation in the caption (4 of 8 pairs); the sizes given for 2 of them are not used"
    assert some.missing == {"subject_size": f"{unused}; of the others missing in 1 of 4 pairs"}
    assert some.frame.subject_size.isna().sum() == 5
    assert some.regression().set_index("term").note["subject_size"].iloc[0] == "missing in 1, which are left out"
    assert some.by_size([0.0]).n.max() == 3


def made(n, captions, sides, sizes, seed=0):
    """Confounds of made-up scores, and the scores."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(n, generator=generator, dtype=torch.float64)
    cosine = torch.rand(n, generator=generator, dtype=torch.float64)
    pairs = Pairs(
        range(n), captions, ["A cow."] * n, ["1.png"] * n, DataFrame({"negation": sides, "subject_size": sizes})
    )
    return Confounds.of(pairs, d, cosine, [7 + row % 3 for row in range(n)]), d.numpy(), cosine.numpy()


def test_the_sizes_slope_is_that_of_the_pairs_that_have_one():
    """Beside nothing but the side, the slope of the size is that of a line through the foil side's points alone."""
    n, sides = 40, ["caption", "foil"] * 20
    sizes = [None if side == "caption" else ((7 * row) % 40) / 40 for row, side in enumerate(sides)]
    found, d, _ = made(n, [f"There is no {row}." for row in range(n)], sides, sizes)
    table = Confounds(found.frame, ("subject_size",)).regression().set_index("term")
    foil = [row for row in range(n) if sides[row] == "foil"]
    slope, level = np.polyfit([sizes[row] for row in foil], d[foil], 1)
    assert table.n.iloc[0] == n and table.coefficient["subject_size"] == pytest.approx(slope, rel=1e-9)
    mean = np.mean([sizes[row] for row in foil])
    assert table.coefficient["intercept"] == pytest.approx(d[::2].mean() - slope * mean, rel=1e-9)
    assert table.coefficient[["intercept", "side = foil"]].sum() == pytest.approx(level, rel=1e-9)


@pytest.mark.parametrize(("repeats", "used"), [(1, False), (4, False), (5, True)])
def test_the_most_frequent_caption_counts_from_a_twentieth_of_the_pairs_on(repeats, used):
    captions = ["There is a cat."] * repeats + [f"There is a {row}." for row in range(100 - repeats)]
    found, *_ = made(100, captions, ["foil"] * 100, [0.1] * 100)
    tables = [found.correlations(), found.accuracy(), found.by_size(), found.regression()]
    assert ("most_frequent" in found.features) == used == bool(found.most_frequent)
    assert all((WITHOUT in set(table.pairs)) == used for table in tables)
    assert ("most_frequent" in set(found.regression().term)) == used
    why = {
        1: "every caption occurs once",
        4: "'There is a cat.' is the most frequent caption, 4 of 100 pairs: below 5%",
    }
    assert found.missing.get("most_frequent") == why.get(repeats)


def test_scores_that_are_known_give_the_same_tables(found):
    frame = found.frame
    again = Confounds.of(eight(subject_size=SIZES), frame.d, frame.cosine, frame.tokens)
    pd.testing.assert_frame_equal(again.frame, frame)
    assert (again.features, again.missing, again.most_frequent) == (found.features, found.missing, found.most_frequent)
    with pytest.raises(ValueError, match="d, tokens must have one number for each of 8 pairs"):
        Confounds.of(eight(), frame.d[:7], frame.cosine, 7)


def test_further_columns_are_features_of_numbers_or_of_texts(encoder, store):
    info = {"votes": ["3", "2", None, "3", "2", "3", "2", "3"], "kind": list("xxxyyyyx"), "subject": ["it"] * 8}
    more = confounds(encoder, align(eight(**info), store, encoder), columns=["votes", "kind", "subject", "side"])
    assert more.features == (*FEATURES, "votes", "kind") and set(more.frame.subject) == {"it"}
    assert "votes" in set(more.correlations().feature) and "kind" not in set(more.correlations().feature)
    assert more.missing["votes"] == "missing in 1 of 8 pairs"
    table = more.regression(least=2)
    assert {"votes", "kind = x", "side = foil"} <= set(table.term)
    assert table[table.term == "subject"].note.tolist() == ["constant (it)"] * 2
    with pytest.raises(ValueError, match="no column colour; they have key, caption"):
        confounds(encoder, align(eight(), store, encoder), columns=["colour"])


def test_of_several_most_frequent_captions_the_first_counts(encoder, store):
    captions = ["There is no cat.", "There is no dog.", "There is no dog.", "There is no cat."]
    pairs = Pairs(list("abcd"), captions, ["There is a cow."] * 4, [f"{row}.png" for row in range(4)])
    assert confounds(encoder, align(pairs, store, encoder)).most_frequent == "There is no cat."


def test_subject_phrases_come_from_the_column_or_either_text():
    texts = ["There are no people in the picture.", "There are dogs.", "A red cube."]
    foils = ["There are people in the picture.", "There are no dogs.", "A blue cube."]
    pairs = Pairs(list("abc"), texts, foils, list("xyz"))
    assert subject_phrases(pairs) == ["people in the picture", "dogs", None]
    named = Pairs(list("abc"), texts, foils, list("xyz"), DataFrame({"subject": ["people", None, " cube "]}))
    assert subject_phrases(named) == ["people", "dogs", "cube"]


def test_scores_count_list_and_bound(encoder, store):
    pairs = eight()
    batch = align(pairs, store, encoder)
    table = scores(encoder, batch, interval=0.9)
    d = pair_scores(encoder, batch).d
    assert list(table.side) == ["overall", "caption", "foil"] and list(table.n) == [8, 4, 4]
    for row in table.itertuples():
        chosen = torch.tensor([row.side in ("overall", side) for side in SIDES])
        right = int((d[chosen] > 0).sum())
        assert (row.accuracy, row.lower, row.upper, row.n) == tuple(proportion(right, int(chosen.sum()), interval=0.9))
        assert row.mean_d == pytest.approx(float(d[chosen].mean()), abs=1e-12)
    tied = scores(encoder, batch.along(torch.zeros(16)))
    assert list(tied.ties) == [8, 4, 4] and set(tied.accuracy) == {0.0} and tied.tied[0] == tuple("abcdefgh")


def test_pairs_without_a_side_are_scored_overall_and_as_none(encoder, store):
    counting = ["There are exactly two dogs.", "There are exactly three cats."]
    pairs = Pairs(
        list("ab"), counting, ["There are exactly four dogs.", "There are exactly six cats."], ["0.png", "1.png"]
    )
    table = scores(encoder, align(pairs, store, encoder, run="caption"))
    assert list(table.side) == ["overall", "none"] and table.accuracy[0] == table.accuracy[1]


def test_no_pairs_give_a_row_of_nothing():
    table = tally(hand().frame[:0])
    assert list(table.side) == ["overall"] and table.n[0] == 0 and pd.isna(table.accuracy[0])


def test_a_batch_of_another_width_is_refused(encoder, store):
    batch = align(eight(), store, encoder)
    for verb in (scores, confounds):
        with pytest.raises(ValueError, match="16 components, tiny 128"):
            verb(clip_lens.load(), batch)


def test_any_file_of_valses_is_scored(shared, encoder):
    """The existence file as it comes, 505 pairs of mostly unequal length: the sides add up."""
    pairs = read_pairs(shared / "data" / "valse" / "existence.json")
    batch = align(pairs, random_store(pairs, 16), encoder)
    table = scores(encoder, batch).set_index("side")
    assert table.n.to_dict() == {"overall": 505, "caption": 256, "foil": 249}
    assert table.right["overall"] == table.right["caption"] + table.right["foil"]
    found = confounds(encoder, batch)
    most = found.frame[found.frame.most_frequent]
    assert found.most_frequent == "There are no people." and set(most.caption) == {"There are no people."}
    assert most.subject.unique().tolist() == ["people"] and len(most) == 44
    assert found.frame.subject.isna().sum() == 15 and "15 of 505" in found.missing["subject"]  # "You see no people."
    table = found.regression()
    kept = table[(table.pairs == "all") & table.coefficient.notna()]
    assert kept.error.notna().all() and {"intercept", "cosine", "tokens", "side = foil"} <= set(kept.term)
