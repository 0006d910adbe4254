"""The negation study: every section's numbers are the analyses' own, and a random tower is called one."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from towers import random_encoder, random_store

import clip_lens
from clip_lens.cli.app import main
from clip_lens.show.questions import findings
from clip_lens.show.questions.study import SECTIONS, study

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import reproduce_negation_study

PAIRS = 48


@pytest.fixture(scope="module")
def tiny():
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    return encoder, store, clip_lens.align(clip_lens.read_pairs()[:PAIRS], store, encoder)


@pytest.fixture(scope="module")
def studied(tiny, tmp_path_factory):
    encoder, store, batch = tiny
    folder, said = tmp_path_factory.mktemp("study"), []
    page = study(encoder, batch, folder, images=store, say=said.append)
    return folder, page.read_text(encoding="utf-8"), said


def words_of(page):
    """The page's text without scripts, styles and tags."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", bare).split())


def test_the_report_answers_every_question(studied):
    _, page, said = studied
    text = words_of(page)
    for question in ("Where?", "Which heads?", "What confounds the score?", "Is what can be read used?"):
        assert question in text
    assert [line.removesuffix(" ...") for line in said if line.endswith(" ...")] == list(SECTIONS)
    assert "model organism" in text and "RANDOM" not in text
    assert "Nothing is corrected for the number of comparisons" in text


def test_the_numbers_beside_it_are_the_analyses_own(studied, tiny):
    folder, page, _ = studied
    encoder, _, batch = tiny
    direct = clip_lens.Effects.load(folder / "direct.parquet")
    torch.testing.assert_close(direct.values, clip_lens.direct_effects(encoder, batch).values)
    selectivity = clip_lens.Effects.load(folder / "selectivity.parquet")
    torch.testing.assert_close(selectivity.values, clip_lens.attention_effects(encoder, batch).values)
    traced = clip_lens.Effects.load(folder / "resid-slots.parquet")
    chosen = [place for place in traced.places if place.slot in ("negator", "eot")]
    torch.testing.assert_close(
        traced.where(slot=["negator", "eot"]).values, clip_lens.patch_effects(encoder, batch, chosen).values
    )
    table = pd.read_parquet(folder / "scores.parquet")
    right = float((direct.pairs["d"] > 0).mean())
    assert table.loc[table["side"] == "overall", "accuracy"].item() == pytest.approx(right)
    assert f"{100 * right:.1f} % of all {PAIRS} pairs" in words_of(page)


def test_every_figure_has_a_caption_and_its_numbers(studied):
    _, page, _ = studied
    figures = re.findall(r"<figure\b.*?</figure>", page, flags=re.S)
    assert len(figures) >= 16
    for figure in figures:
        caption = re.search(r"<figcaption>(.*?)</figcaption>", figure, flags=re.S)
        assert caption and len(words_of(caption[1])) > 40
        assert re.search(r"Show figure \d+ as a table", figure)


def test_a_finished_study_is_not_computed_again(studied, tiny, monkeypatch):
    folder, page, _ = studied
    encoder, store, batch = tiny

    def refuse(*arguments, **options):
        raise AssertionError("computed again")

    for name in ("patch_effects", "attention_effects", "direct_effects", "logit_lens", "probe"):
        monkeypatch.setattr(f"clip_lens.show.questions.study.{name}", refuse)
    said = []
    again = study(encoder, batch, folder, images=store, say=said.append)
    assert words_of(again.read_text(encoding="utf-8")) == words_of(page)
    assert sum("reused" in line for line in said) == 9


def test_a_random_tower_is_called_random_and_traced_as_far_as_it_goes(tmp_path):
    encoder = random_encoder(layers=2)
    encoder.name, encoder.pretrained, encoder.scale = "ViT-S-32", "random", 1e-3  # no |d| reaches 1
    pairs = clip_lens.read_pairs()[:30]
    batch = clip_lens.align(pairs, random_store(pairs, encoder.d_embed), encoder, any_store=True)
    text = words_of(study(encoder, batch, tmp_path).read_text(encoding="utf-8"))
    assert "The weights of ViT-S-32 are RANDOM" in text
    assert "No pair is correct (30 ambiguous): all pairs are traced instead." in text
    assert "Nobody said which model made the image embeddings" in text


@pytest.mark.filterwarnings("ignore:tiny never saw")
def test_words_the_model_never_saw_are_a_caution(tiny):
    encoder, store, batch = tiny
    table = batch.pairs.to_frame()[:3]
    table.loc[0, ["caption", "foil"]] = ["There are no zebras.", "There are some zebras."]
    odd = clip_lens.align(clip_lens.Pairs.from_frame(table), store, encoder)
    assert findings.cautions(encoder, odd)[-1].startswith("1 of 3 pairs have words that tiny never saw in training")
    assert len(findings.cautions(encoder, batch)) == 1


def test_texts_too_much_alike_for_a_probe_leave_the_rest(tiny, tmp_path):
    encoder, _, batch = tiny
    page = study(encoder, batch[[0]], tmp_path, segment="all", progress=False).read_text(encoding="utf-8")
    assert "Not computed: 1 pairs make 1 groups that share no text" in words_of(page)
    assert (tmp_path / "heads.parquet").exists() and not (tmp_path / "probe.parquet").exists()


def test_what_the_study_cannot_take(tiny, tmp_path):
    encoder, _, batch = tiny
    with pytest.raises(ValueError, match=r"align\(\.\.\., run='affirmative'\)\. Got run='negated'"):
        study(encoder, batch.flip(), tmp_path)
    with pytest.raises(ValueError, match="segment='right'; give one of incorrect, ambiguous, correct, all"):
        study(encoder, batch, tmp_path, segment="right")


def test_the_command_writes_the_report(tmp_path, capsys):
    rows = clip_lens.read_pairs()[:17].to_frame().drop(columns="side")
    rows.loc[16, "image"] = "nowhere.png"
    rows.to_csv(tmp_path / "pairs.csv", index=False)
    code = main(["study", "--pairs", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "out"), "--quiet"])
    assert code == 0 and (tmp_path / "out" / "report.html").stat().st_size < 6e6
    said = capsys.readouterr().out
    assert "Read and used ..." in said and "  1 dropped: image not in the store\n" in said


# Sentences


def probed(**columns):
    table = pd.DataFrame({"layer": [0, 1, 2], "accuracy": [0.5, 0.9, 1.0], "accuracy_lower": [0.4, 0.8, 0.9]})
    table = table.assign(control=[0.5, 0.6, 0.6], noun=float("nan"))
    for side in ("caption", "foil"):
        table = table.assign(**{f"removed_{side}": 0.0, f"removed_{side}_lower": -0.1, f"removed_{side}_random": 0.05})
    return table.assign(**columns)


def test_readable_and_not_used():
    read, used = findings.read_and_used(probed())
    assert "from layer 1 on (90 %; at most 100 %, at layer 2; chance is 50 %)." in read
    assert used.startswith("At no layer does removing the direction")


def test_used_means_on_every_side():
    lower = {"removed_caption_lower": [0.0, 0.2, 0.3]}
    assert findings.read_and_used(probed(**lower))[1].startswith("At no layer")
    both = lower | {"removed_foil_lower": [0.0, 0.0, 0.1]}
    assert "at layers 2: there it is used" in findings.read_and_used(probed(**both))[1]


def test_unreadable():
    assert "At no layer does a linear probe" in findings.read_and_used(probed(accuracy_lower=0.5))[0]


def test_readable_but_no_better_than_random_labels():
    read = findings.read_and_used(probed(control=[0.5, 0.92, 0.9]))[0]
    assert read.startswith("A linear probe tells negated texts from the others at the end of text in at most 100 %")
    assert "at no layer clearly more often than labels drawn at random for each subject (90 % there)" in read


def test_confounds_in_words():
    correlations = pd.DataFrame(
        {
            "feature": ["tokens", "subject_size", "tokens", "subject_size"],
            "side": ["caption", "caption", "foil", "foil"],
            "pairs": "all",
            "r": [0.2, -0.5, 0.1, float("nan")],
            "lower": [0.1, -0.6, -0.1, float("nan")],
            "upper": [0.3, -0.4, 0.3, float("nan")],
        }
    )
    regression = pd.DataFrame({"pairs": "all", "term": ["intercept", "tokens"], "coefficient": [1.0, 2.0]})
    said = findings.confounded(correlations, regression.assign(lower=[0.5, -1.0], upper=[1.5, 5.0]))
    assert said == [
        "Negation in the caption: d goes along with subject_size (r = -0.50 [-0.60, -0.40]), "
        "tokens (r = +0.20 [+0.10, +0.30]).",
        "Negation in the foil: no feature's correlation with d excludes 0.",
        "With all features in one regression, no term's 95 % interval excludes 0.",
    ]


# The paper's own data


def test_the_script_takes_the_papers_pairs_and_no_others(shared, tmp_path):
    existence = shared / "data" / "valse" / "existence.json"
    reproduce_negation_study.check(existence)
    clip_lens.read_pairs()[:5].to_frame().drop(columns="side").to_csv(tmp_path / "few.csv", index=False)
    with pytest.raises(ValueError, match="VALSE existence"):
        reproduce_negation_study.check(tmp_path / "few.csv")


def test_missing_pictures_are_listed(shared, tmp_path, capsys):
    existence = shared / "data" / "valse" / "existence.json"
    code = reproduce_negation_study.main(["--pairs", str(existence), "--pictures", str(tmp_path)])
    assert code == 1 and "490 of 490 pictures are not in" in capsys.readouterr().err


@pytest.mark.slow
def test_the_study_runs_on_a_full_size_random_tower(shared, tmp_path, capsys):
    """ViT-B-32 with random weights, VALSE's 490 rephrased pairs, made-up embeddings: the script, unchanged."""
    existence = shared / "data" / "valse" / "existence.json"
    pairs = clip_lens.read_pairs(existence).rephrased()
    vectors = torch.randn(len(set(pairs.image)), 512, generator=torch.Generator().manual_seed(0))
    store = clip_lens.ImageStore.from_tensors(sorted(set(pairs.image)), vectors, model="ViT-B-32", pretrained="random")
    store.save(tmp_path / "made-up.safetensors")
    out = tmp_path / "negation"
    options = ["--pairs", str(existence), "--images", str(tmp_path / "made-up.safetensors"), "--pretrained", "random"]
    assert reproduce_negation_study.main([*options, "--out", str(out)]) == 0
    text = words_of((out / "report.html").read_text(encoding="utf-8"))
    assert "The weights of ViT-B-32 are RANDOM" in text and "490 pairs were run" in text
    direct = clip_lens.Effects.load(out / "direct.parquet")
    assert direct.values.shape == (2 + 12 * 10 + 1, 490)
    assert (direct.values.sum(0) - direct.total).abs().max() < 1e-4 * direct.baseline.abs().max()
