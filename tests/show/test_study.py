"""The negation study: every question's numbers are the analyses' own, every sentence holds on each side, and a random
tower is called one."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from towers import random_encoder, random_store

import clip_lens
from clip_lens.cli.app import main
from clip_lens.show.questions import accuracy, confounds, heads, probe, where
from clip_lens.show.questions.cautions import cautions
from clip_lens.show.questions.study import QUESTIONS, study

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
    assert [line.removesuffix(" ...") for line in said if line.endswith(" ...")] == [each.name for each in QUESTIONS]
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
    assert f"The caption beats the foil in {100 * right:.1f} % [" in words_of(page)


def test_every_figure_has_a_caption_and_its_numbers(studied):
    _, page, _ = studied
    figures = re.findall(r"<figure\b.*?</figure>", page, flags=re.S)
    assert len(figures) >= 16
    for figure in figures:
        caption = re.search(r"<figcaption>(.*?)</figcaption>", figure, flags=re.S)
        assert len(words_of(caption[1])) > 40 or re.search(r"Read it as figure \d+", words_of(caption[1]))
        assert re.search(r"Show figure \d+ as a table", figure)


def test_a_finished_study_is_not_computed_again(studied, tiny, monkeypatch):
    folder, page, _ = studied
    encoder, store, batch = tiny

    def refuse(*arguments, **options):
        raise AssertionError("computed again")

    for name in (
        "case.patch_effects", "heads.attention_effects", "writes.direct_effects", "writes.logit_lens",
        "writes.labels", "probe.probe",
    ):  # fmt: skip
        monkeypatch.setattr(f"clip_lens.show.questions.{name}", refuse)
    said = []
    again = study(encoder, batch, folder, images=store, say=said.append)
    assert words_of(again.read_text(encoding="utf-8")) == words_of(page)
    assert sum("reused" in line for line in said) == len(list(folder.glob("*.parquet")))


def test_results_of_another_study_are_not_replaced_unasked(studied, tiny, tmp_path):
    folder, _, _ = studied
    encoder, store, batch = tiny
    before = {path.name: path.read_bytes() for path in folder.glob("*")}
    with pytest.raises(ValueError, match=r"scores.parquet is there, and is another result: .*overwrite"):
        study(encoder, batch[:20], folder, images=store, progress=False)
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
    study(encoder, batch[:20], tmp_path, segment="all", progress=False)
    study(encoder, batch[:16], tmp_path, segment="all", overwrite=True, progress=False)
    assert len(clip_lens.Effects.load(tmp_path / "heads.parquet").pairs) == 16


def test_images_of_another_model_are_refused(tiny, tmp_path):
    encoder, _, batch = tiny
    vectors = torch.randn(4, encoder.d_embed, generator=torch.Generator().manual_seed(0))
    other = clip_lens.ImageStore.from_tensors(list("abcd"), vectors, model="ViT-B-32", pretrained="openai")
    with pytest.raises(ValueError, match=r"made by ViT-B-32 \(openai\), the encoder is tiny"):
        study(encoder, batch, tmp_path, images=other)
    assert not list(tmp_path.iterdir())
    narrow = clip_lens.ImageStore.from_tensors(["a"], torch.ones(1, 4))
    with pytest.raises(ValueError, match="4 dimensions"):
        study(encoder, batch, tmp_path, images=narrow, any_store=True)
    assert study(encoder, batch[:20], tmp_path, segment="all", images=other, any_store=True, progress=False).exists()


def test_the_papers_map_is_the_mean_of_each_pairs_own_share(studied, tiny):
    folder, page, _ = studied
    _, _, batch = tiny
    single = clip_lens.Effects.load(folder / "resid-positions.parquet")
    shares = {}
    for row, place in enumerate(single.places):
        for pair, d in enumerate(single.pairs["d"]):
            slot = batch.slot[pair, place.slot].item()
            if d >= 1 and slot >= 0 and place.slot < batch.length[pair]:
                share = float(single.values[row, pair] / single.total[pair])
                key = batch.slots[slot], place.layer, batch.pairs.side[pair], batch.pairs.key[pair]
                shares.setdefault(key[:3], {}).setdefault(key[3], []).append(share)
    correct = single.where(segment="correct").by_slot(batch)
    table = correct.table(of="ratios").set_index(["slot", "layer", "side"])["fraction"]
    for place, by_pair in shares.items():
        every = [share for several in by_pair.values() for share in several]
        assert table[place] == pytest.approx(np.mean(every), rel=1e-5, abs=1e-6)
    assert "As in the paper" in words_of(page) and "mean of ratios, effect over d of each pair" in words_of(page)
    spread = pd.read_parquet(folder / "localisation.parquet")
    paper = spread[(spread["segment"] == "correct, as in the paper") & (spread["side"] == "foil")]
    slots = ("negator", "subject", "subject_rest", "suffix", "stop", "eot")
    at_one = [table[slot, 1, "foil"] for slot in slots if (slot, 1, "foil") in table]
    assert paper["localisation"].iloc[1] == pytest.approx(np.std(at_one), rel=1e-5)


def test_selectivity_is_told_per_side(studied, tiny):
    folder, _, _ = studied
    _, _, batch = tiny
    whole = clip_lens.Effects.load(folder / "selectivity.parquet")
    blocks = heads.of_blocks(whole).table()
    foil = [side == "foil" for side in batch.pairs.side]
    rows = [row for row, place in enumerate(whole.places) if place.layer == 2]
    found = blocks[(blocks["layer"] == 2) & (blocks["side"] == "foil")]["fraction"].item()
    assert found == pytest.approx(whole.values[rows][:, foil].mean().item(), rel=1e-5)


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
    assert cautions(encoder, odd)[-1].startswith("1 of 3 pairs have words that tiny never saw in training")
    assert len(cautions(encoder, batch)) == 1


def test_images_that_another_model_made_are_a_caution(tiny):
    encoder, _, batch = tiny
    ids = sorted(set(batch.pairs.image))
    vectors = torch.randn(len(ids), encoder.d_embed, generator=torch.Generator().manual_seed(0))
    other = clip_lens.ImageStore.from_tensors(ids, vectors, model="ViT-B-32", pretrained="openai")
    taken = clip_lens.align(batch.pairs, other, encoder, any_store=True)
    unknown = clip_lens.align(batch.pairs, clip_lens.ImageStore.from_tensors(ids, vectors), encoder)
    assert (batch.joint, taken.joint, unknown.joint) == ("same", "other", "unknown")
    assert cautions(encoder, taken)[1].startswith("The image embeddings were made by another model (ImageStore(")
    assert cautions(encoder, unknown)[1].startswith("Nobody said which model made the image embeddings")
    assert taken[:20].joint == taken.flip().joint == "other"


def test_hooks_of_the_users_are_a_caution(tiny):
    encoder, _, batch = tiny
    with encoder.tower.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: value)]):
        assert any("blocks.0.hook_mlp_out" in said for said in cautions(encoder, batch))
    assert not any("hooks of yours" in said for said in cautions(encoder, batch))


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


def plain(sentences):
    """Sentences with hyphens for minus signs."""
    return [sentence.replace("\N{MINUS SIGN}", "-") for sentence in sentences]


def probed(**columns):
    """A table of `probe` by hand; on neither side does removing the direction move anything."""
    table = pd.DataFrame({"layer": [0, 1, 2], "accuracy": [0.5, 0.9, 1.0], "accuracy_lower": [0.4, 0.8, 0.9]})
    table = table.assign(control=[0.5, 0.6, 0.6], noun=float("nan"))
    return table.assign(**removed("caption", 0.0, -0.1, 0.1), **removed("foil", 0.0, -0.1, 0.1)).assign(**columns)


def removed(side, share, lower, upper, random=0.05):
    names = {"": share, "_lower": lower, "_upper": upper, "_random": random}
    return {f"removed_{side}{end}": values for end, values in names.items()}


def test_readable():
    assert probe.read(probed(accuracy_upper=1.0)).startswith(
        "A linear probe reads at the end of text whether the text is negated from layer 1 on (at most 100 % [90, "
        "100], at layer 2; chance is 50 %)."
    )


def test_readable_at_some_layers_only():
    read = probe.read(probed(accuracy=[0.5, 1.0, 0.6], accuracy_lower=[0.4, 0.9, 0.45], accuracy_upper=1.0))
    assert "whether the text is negated at layer 1 (at most" in read and "on (" not in read


def test_a_noun_read_no_better_than_by_chance():
    nouns = {"noun": [0.5, 0.6, 0.7], "noun_lower": [0.3, 0.4, 0.49], "noun_upper": [0.7, 0.8, 0.86]}
    read = probe.read(probed(accuracy_upper=1.0, **nouns))
    assert read.endswith("is negated it reads in 70 % [49, 86] at the last layer, which is no more than chance.")
    better = probe.read(probed(accuracy_upper=1.0, **nouns | {"noun_lower": [0.3, 0.4, 0.51]}))
    assert better.endswith("in 70 % [51, 86] at the last layer.")


def test_used_on_no_side():
    assert plain(probe.used(probed())) == [
        "At no layer does removing the direction of the class means take more of d away than random directions do on "
        "every side (at layer 2 0.00 [-0.10, +0.10] of d with negation in the caption and 0.00 [-0.10, +0.10] of d "
        "with negation in the foil): what a probe reads there is not, by itself, what the score is made of.",
        "Negation in the caption: removing it moves no more of d at any layer than random directions do (0.00 [-0.10, "
        "+0.10] of d at layer 2, random ones up to 0.05).",
        "Negation in the foil: removing it moves no more of d at any layer than random directions do (0.00 [-0.10, "
        "+0.10] of d at layer 2, random ones up to 0.05).",
    ]


def test_used_on_every_side():
    caption = removed("caption", [0.0, 0.4, 0.6], [-0.1, 0.2, 0.5], [0.1, 0.6, 0.7])
    foil = removed("foil", [0.0, 0.0, 0.3], [-0.1, -0.1, 0.1], [0.1, 0.1, 0.5])
    both, on_caption, on_foil = plain(probe.used(probed(**caption, **foil)))
    assert "take" in both and "on every side, at layer 2 (at layer 2 +0.60 [+0.50, +0.70] of d" in both
    assert both.endswith("there it is used.") and "opposite" not in both
    assert "removing it takes d away at layers 1 and 2 (+0.60 [+0.50, +0.70] of d at layer 2," in on_caption
    assert "removing it takes d away at layer 2 (+0.30 [+0.10, +0.50] of d at layer 2," in on_foil


def test_moved_in_opposite_directions_is_no_absence_of_an_effect():
    caption = removed("caption", [0.0, 0.9, 1.28], [-0.1, 0.7, 1.1], [0.1, 1.1, 1.5])
    foil = removed("foil", [0.0, -0.02, -1.34], [-0.1, -0.1, -1.6], [0.1, 0.04, -1.1])
    both, on_caption, on_foil = plain(probe.used(probed(**caption, **foil)))
    assert both == (
        "Removing the direction of the class means moves the sides in opposite directions at layer 2 (at layer 2 +1.28 "
        "[+1.10, +1.50] of d with negation in the caption and -1.34 [-1.60, -1.10] of d with negation in the foil): "
        "there it raises or lowers the score of every image alike, which is no negation."
    )
    assert "takes d away at layers 1 and 2" in on_caption and "makes d larger" not in on_caption
    assert "makes d larger at layer 2 (-1.34 [-1.60, -1.10] of d at layer 2, random ones up to 0.05)" in on_foil


def test_one_side_that_moves_alone_is_said():
    caption = removed("caption", [0.0, 0.0, 0.8], [-0.1, -0.1, 0.6], [0.1, 0.1, 0.9])
    both, on_caption, on_foil = plain(probe.used(probed(**caption)))
    assert both.startswith("At no layer does removing") and "+0.80 [+0.60, +0.90] of d with negation in the cap" in both
    assert "takes d away at layer 2" in on_caption and "no more of d at any layer" in on_foil


def test_a_study_of_one_side():
    table = probed().drop(columns=[f"removed_caption{end}" for end in ("", "_lower", "_upper", "_random")])
    first, on_foil = plain(probe.used(table))
    assert "than random directions do with negation in the foil (at layer 2 0.00" in first
    assert on_foil.startswith("Negation in the foil: ")


def test_unreadable():
    assert probe.read(probed(accuracy_lower=0.5, accuracy_upper=1.0)).startswith("At no layer does a linear probe tell")


def test_readable_but_no_better_than_random_labels():
    read = probe.read(probed(control=[0.5, 0.92, 0.9], accuracy_upper=1.0))
    assert read.startswith("A linear probe tells negated texts from the others at the end of text in at most 100 % [")
    assert "at no layer clearly more often than labels drawn at random for each subject (90 % there)" in read


def test_accuracy_without_a_side():
    table = pd.DataFrame({"side": ["overall", "foil", "none"], "accuracy": [0.5, 0.25, 1.0], "n": [40, 30, 10]})
    assert accuracy.scored(table.assign(lower=[0.4, 0.1, 0.7], upper=[0.6, 0.4, 1.0])) == (
        "The caption beats the foil in 50.0 % [40.0, 60.0] of all 40 pairs: 25.0 % [10.0, 40.0] of 30 with "
        "negation in the foil, 100.0 % [70.0, 100.0] of 10 without a side."
    )


def test_selective_heads_are_counted_on_each_side():
    table = pd.DataFrame(
        {
            "side": ["caption", "caption", "foil", "foil"], "layer": [0, 1, 0, 1], "unit": 0, "n": 9,
            "fraction": [0.9, 0.65, 0.1, -0.2], "lower": [0.8, 0.55, 0.0, -0.3], "upper": [1.0, 0.7, 0.2, -0.1],
        }
    )  # fmt: skip
    assert plain(heads.selective(table)) == [
        "Negation in the caption (9 pairs): 2 of 2 heads have a selectivity of 0.6 or more (blocks 0, 1; the intervals "
        "of 1 lie above that); the largest is that of head 0.0, 0.90 [0.80, 1.00].",
        "Negation in the foil (9 pairs): 0 of 2 heads have a selectivity of 0.6 or more; the largest is that of head "
        "0.0, 0.10 [0.00, 0.20].",
    ]


def test_correlations_on_each_side():
    table = pd.DataFrame(
        {
            "side": ["caption", "caption", "foil"], "layer": [0, 1, 0], "unit": 2, "r": [0.1, -0.6, np.nan],
            "lower": [-0.1, -0.8, np.nan], "upper": [0.3, -0.3, np.nan],
        }
    )  # fmt: skip
    assert plain(heads.along_with_d(table)) == [
        "Negation in the caption: the strongest correlation of a head's selectivity with d is that of head 1.2, r = "
        "-0.60 [-0.80, -0.30]. The intervals of 1 of 2 correlations exclude 0; about 0 would by chance.",
        "Negation in the foil: no head's selectivity can be correlated with d.",
    ]


def test_localisation_in_words():
    spread = pd.DataFrame({"side": "none", "layer": [0, 1, 2], "localisation": [0.4, 0.1, 0.4], "pairs": 9})
    assert plain(where.localised(spread.assign(lower=[0.3, 0.05, 0.3], upper=[0.5, 0.2, 0.5]))) == [
        "Pairs without a side (9 pairs): the effect is spread most evenly over the slots after block 0 (localisation "
        "0.10 [0.05, 0.20]; at the embedding 0.40 [0.30, 0.50])."
    ]


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
    assert plain(confounds.confounded(correlations)) == [
        "Negation in the caption: d goes along with subject_size (r = -0.50 [-0.60, -0.40]), "
        "tokens (r = +0.20 [+0.10, +0.30]).",
        "Negation in the foil: no feature's correlation with d excludes 0.",
    ]


def test_the_regression_in_words():
    table = pd.DataFrame({"pairs": "all", "term": ["intercept", "tokens"], "coefficient": [1.0, 2.0]})
    start = "With all features and the side in one regression over all pairs, "
    assert confounds.regressed(table.assign(lower=[0.5, -1.0], upper=[1.5, 5.0])) == (
        f"{start}no slope's 95 % interval excludes 0."
    )
    slopes = table.assign(lower=[0.5, 1.0], upper=[1.5, 3.0], standardised=[np.nan, 0.25])
    assert confounds.regressed(slopes) == (
        f"{start}the 95 % intervals of these slopes exclude 0: tokens (+2.00 [+1.00, +3.00] logits per unit, +0.25 in "
        "standard deviations)."
    )


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
