"""Reports on circuits: every number is the functions' own, every figure says how to read it."""

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch
from test_study import words_of
from towers import random_encoder, random_store

import clip_lens
from clip_lens.data.pairs import Pairs
from clip_lens.methods.circuits import discover as module
from clip_lens.methods.circuits.circuit import Circuit
from clip_lens.methods.circuits.discover import discover
from clip_lens.show.questions import circuits as asked
from clip_lens.show.questions.circuits import (
    BY_CHANCE,
    circuit_report,
    circuit_sections,
    comparison,
    methods,
    summaries,
)

NOUNS = ("dogs", "cats", "cars", "trees", "birds", "boats")


@pytest.fixture(scope="module")
def found():
    """Discoveries of every method on a small random tower."""
    encoder = random_encoder(layers=2, heads=2, width=32, dtype=torch.float64)
    texts = [(f"There are no {noun}.", f"There are some {noun}.") for noun in NOUNS]
    captions, foils = zip(*(pair[::turn] for pair in texts for turn in (1, -1)), strict=True)
    pairs = Pairs([str(n) for n in range(12)], captions, foils, [f"{n}.png" for n in range(12)])
    batch = clip_lens.align(pairs, random_store(pairs, encoder.d_embed), encoder, run="caption")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BASELINES", 2)
        patch.setattr(module, "RESAMPLES", 10)
        how = {"edges": 15, "threshold": 0.01}
        return {
            name: discover(encoder, *batch.split(), method=name, exact=name == "eap-ig", **how)
            for name in ("eap-ig", "eap", "acdc", "random")
        }


def picture(section, title):
    return next(picture for picture in section.pictures if title in picture.title)


def test_curves_are_the_tables_of_the_methods_and_the_mean_of_the_random_ones(found):
    others = list(found.values())[1:]
    section = circuit_sections(found["eap-ig"], others)["Faithfulness"]
    assert len(section.pictures) == 6
    lines = picture(section, "largest scores kept: negation in the foil").numbers
    assert set(lines["method"]) == {*(done.name for done in found.values()), BY_CHANCE}
    table = found["eap"].curve
    table = table[(table["circuit"] == "EAP") & (table["side"] == "foil") & (table["ranking"] == "absolute")]
    assert (
        lines[lines["method"] == "EAP"][["share", "f"]].to_numpy().tolist() == table[["share", "f"]].to_numpy().tolist()
    )
    curves = found["eap-ig"].curve
    some = curves[(curves["side"] == "foil") & (curves["ranking"] == "absolute") & (curves["share"] == 0.5)]
    by_chance = some[some["circuit"].str.startswith("random")]["f"]
    row = lines[(lines["method"] == BY_CHANCE) & (lines["share"] == 0.5)].iloc[0]
    assert len(by_chance) == 2
    assert row[["f", "lower", "upper"]].tolist() == pytest.approx([by_chance.mean(), by_chance.min(), by_chance.max()])
    drawn = picture(section, "largest scores kept: negation in the foil").figure
    traces = {trace.name: trace for trace in drawn.data if trace.mode != "lines" or trace.showlegend is not False}
    assert np.array(traces["EAP"].y, dtype=float).tolist() == table.sort_values("share")["f"].tolist()


def test_areas_are_drawn_on_the_axis_on_which_they_are_computed(found):
    done = found["eap"]
    pictures = circuit_sections(done)["Faithfulness"].pictures
    areas = done.areas[done.areas["circuit"] == done.name].set_index("side")
    for ranking, measure, level in (("largest scores kept", "CMD", 1.0), ("most supporting edges kept", "CPR", 0.0)):
        for side in ("caption", "foil", "pooled"):
            shown = next(each for each in pictures if f"{ranking}: {SIDES[side].lower()}" in each.title.lower())
            figure = shown.figure
            assert figure.layout.xaxis.type == "linear"
            (area,) = (trace for trace in figure.data if trace.name == measure)
            x, y = (np.array(ends, dtype=float) for ends in (area.x, area.y))
            half = len(x) // 2
            assert (y[half:] == level).all() and (x[:half] == x[half:][::-1]).all()
            between = np.abs(y[:half] - level) if level else y[:half]
            steps = np.diff(x[:half]) * (between[1:] + between[:-1]) / 2
            assert steps.sum() == pytest.approx(areas.loc[side, measure], rel=1e-9)
            linear, log = figure.layout.updatemenus[0].buttons
            hidden = [trace.name for trace, on in zip(figure.data, log.args[0]["visible"], strict=True) if not on]
            assert hidden == [measure] and all(linear.args[0]["visible"])
            assert log.args[1]["xaxis.type"] == "log"


def close_to(sentence, start, number):
    """Whether what follows the first `start` in a sentence is the number, at two decimals."""
    said = re.search(re.escape(start) + r"(\N{MINUS SIGN}?\d+\.\d+)", sentence)
    return said is not None and float(said[1].replace("\N{MINUS SIGN}", "-")) == pytest.approx(number, abs=0.0051)


SIDES = {"caption": "Negation in the caption", "foil": "Negation in the foil", "pooled": "Both sides together"}


def test_findings_say_both_forms_on_each_side(found):
    for done in found.values():
        said, verdict = asked.kept(done), done.verdict
        assert len(said) == 3
        for sentence, (side, words) in zip(said, SIDES.items(), strict=True):
            rows = verdict[(verdict["circuit"] == done.name) & (verdict["side"] == side)].set_index("pruned")
            start = f"{words} ({rows.loc[False, 'n']} held-out pairs): "
            assert sentence.startswith(f"{start}the share of d that the circuit keeps is as selected (")
            selected, pruned = sentence.split("; pruned ")
            assert f"selected ({len(done.circuit)} edges) " in selected
            assert pruned.startswith(f"({len(done.circuit.pruned())} edge")
            assert close_to(selected, "f = ", rows.loc[False, "f"]) and close_to(pruned, "f = ", rows.loc[True, "f"])
            by_chance = verdict[(verdict["circuit"] != done.name) & (verdict["side"] == side)]
            assert close_to(pruned, "random circuits ", by_chance.loc[by_chance["pruned"], "f"].mean())


def test_findings_say_either_ranking_on_each_side(found):
    assert asked.ranked(found["acdc"]) == []
    areas = found["eap"].areas
    for sentence, side in zip(asked.ranked(found["eap"]), SIDES, strict=True):
        at = areas[areas["side"] == side]
        own, by_chance = at[at["circuit"] == "EAP"].iloc[0], at[at["circuit"] != "EAP"]
        for ranking, measure in {"signed": "CPR", "absolute": "CMD"}.items():
            assert close_to(sentence, f"by {ranking} score {measure} = ", own[measure])
            part = sentence[sentence.index(measure) :]
            assert close_to(part, "(random circuits ", by_chance[measure].mean())


def test_how_pairs_were_held_out_is_said(found):
    done = found["eap"]
    known = {*done.scores.pairs["caption"], *done.scores.pairs["foil"]}
    judged = done.judged.effects.pairs
    assert (judged["caption"].isin(known) | judged["foil"].isin(known)).sum() == 4
    assert asked.held_out(done) == (
        "Pairs were held out by image: 4 of 6 judged pairs have a text that the circuit was found on, and tell less "
        "of new ones."
    )
    record = replace(done.judged.effects.record, held_out="by text")
    judged = replace(done.judged, effects=replace(done.judged.effects, record=record))
    apart = replace(done, repeated=0, judged=judged)
    none = "none of 6 judged pairs has a text that the circuit was found on."
    assert asked.held_out(apart) == f"Pairs were held out by text: {none}"
    assert "Pairs that share a text or an image" in dict(methods([apart]))["Two splits"]
    assert "Pairs of one image are in the same part; texts may" in dict(methods([done]))["Two splits"]
    nobody = replace(judged, effects=replace(judged.effects, record=replace(record, held_out="")))
    assert asked.held_out(replace(apart, judged=nobody)) == f"How pairs were held out is not said: {none}"


def test_the_circuit_is_described(found):
    done = found["eap"]
    section = circuit_sections(done)["Circuit"]
    own = done.scores.where(place=[str(edge) for edge in done.circuit.edges()])
    for sentence, side in zip(section.findings[1:], ("caption", "foil"), strict=True):
        table = own.table().query(f"side == '{side}'").set_index("place")
        best = table["effect"].abs().idxmax()
        start = f"{SIDES[side]} ({table.loc[best, 'n']} pairs): the edges of the largest scores are {best} (+"
        assert close_to(sentence.replace("(\N{MINUS SIGN}", "(+"), start, abs(table.loc[best, "effect"]))
    assert section.findings[0].startswith(
        "EAP, found on 6 pairs: the top 15 of 46 edges by absolute score. "
        f"{len(done.circuit.pruned())} of its 15 edges lie on a path from the embedding to the output"
    )
    table = section.data["circuit.csv"]
    assert set(table.loc[table["on_path"], "edge"]) == {str(edge) for edge in done.circuit.pruned().edges()}


def test_pairs_without_a_side_are_called_that(found):
    done = found["random"]
    effects = [
        replace(part.effects, pairs=part.effects.pairs.assign(side="none")) for part in (done.judged, done.chosen)
    ]
    judged, chosen = (replace(part, effects=own) for part, own in zip((done.judged, done.chosen), effects, strict=True))
    sections = circuit_sections(replace(done, judged=judged, chosen=chosen))
    assert sections["Faithfulness"].findings[0].startswith("Pairs without a side (6 held-out pairs): ")
    titles = [picture.title for section in sections.values() for picture in section.pictures]
    assert any("pairs without a side" in title for title in titles)
    assert not any("in the none" in text.lower() for text in [*titles, *sections["Faithfulness"].findings])


def test_the_estimate_is_compared_where_exact_scores_are_there(found):
    section = circuit_sections(found["eap-ig"])["Estimate"]
    table = found["eap-ig"].agreement.set_index("side")["r"]
    headings = " ".join(note.text for note in section.pictures[0].figure.layout.annotations)
    assert f"r = {table['caption']:.3f}" in headings and f"r = {table['foil']:.3f}" in headings
    for sentence, side in zip(section.findings, SIDES, strict=True):
        assert sentence.startswith(SIDES[side]) and close_to(sentence, "r = ", table[side])
    assert "Estimate" not in circuit_sections(found["eap"])
    assert set(circuit_sections(found["random"])) == set(circuit_sections(found["acdc"])) == {"Circuit", "Faithfulness"}


def test_bars_are_edges_of_the_circuit_with_their_means(found):
    done = found["eap"]
    figure = picture(circuit_sections(done)["Circuit"], "strongest edges").figure
    kept = {str(edge) for edge in done.circuit.edges()}
    for trace, side in zip(figure.data, ("caption", "foil"), strict=True):
        table = done.scores.where(side=side).fraction().set_index("place")["effect"]
        names = [unescape(name) for name in trace.hovertext]
        assert set(names) <= kept
        assert list(trace.x) == pytest.approx([table[name] for name in names])


def test_a_page_explains_itself(found, tmp_path):
    page = circuit_report(
        found["eap-ig"], tmp_path / "report.html", others=[found["random"]], warnings=["Weights are made up."]
    ).read_text(encoding="utf-8")
    text = words_of(page)
    for words in ("Weights are made up", "Two splits", "EAP-IG", "CPR and CMD", "The circuit as a network"):
        assert words in text
    figures = re.findall(r"<figure\b.*?</figure>", page, flags=re.S)
    assert len(figures) == 9
    for figure in figures:
        caption = re.search(r"<figcaption>(.*?)</figcaption>", figure, flags=re.S)
        assert len(words_of(caption[1])) > 40 or re.search(r"Read it as figure \d+", words_of(caption[1]))
    assert len(page) < 8_000_000


def test_an_empty_circuit_has_no_pictures_and_says_so(found):
    none = found["acdc"].circuit
    done = replace(found["acdc"], circuit=(none - none).named(none.name))
    section = circuit_sections(done)["Circuit"]
    assert section.pictures == () and "0 of its 0 edges lie on a path" in section.findings[0]


def test_many_runs_are_compared_within_what_they_share(found):
    groups = {"a, caption": [found["eap"], found["eap-ig"]], "b, foil": [found["random"], found["acdc"]]}
    sections = comparison(groups)
    assert list(sections) == ["All runs", "a, caption", "b, foil", "Overlap, 2 layers x 2 heads"]
    table = summaries(groups)
    assert len(table) == 12 and table.columns[0] == "run"
    said = sections["a, caption"].findings
    for side, words in SIDES.items():
        for measure, better, pick in (("CMD", "smallest", min), ("CPR", "largest", max)):
            areas = {done.name: done.summary.set_index("side").loc[side, measure] for done in groups["a, caption"]}
            best = pick(areas, key=areas.get)
            start = f"{words}: {best} has the {better} {measure}: "
            assert any(close_to(sentence, start, areas[best]) for sentence in said)
    circuits = {f"{name}: {done.name}": done.circuit for name, several in groups.items() for done in several}
    del circuits["b, foil: random(0)"]
    shown = sections["Overlap, 2 layers x 2 heads"].tables[0].frame
    assert shown.to_dict() == Circuit.overlaps(circuits).to_dict()
    grid = np.array(sections["Overlap, 2 layers x 2 heads"].pictures[0].figure.data[0].z, dtype=float)
    pair = shown[(shown["first"] == "a, caption: EAP") & (shown["second"] == "b, foil: ACDC")]["jaccard"].item()
    assert np.allclose(grid, grid.T) and (np.diag(grid) == 1).all() and pair in grid[0].tolist()
    with pytest.raises(ValueError, match="no discoveries"):
        comparison({})


def test_methods_name_what_was_used(found):
    assert "ACDC" in dict(methods([found["acdc"]])) and "ACDC" not in dict(methods([found["eap"]]))
    assert "threshold: 0.01" in dict(methods([found["acdc"]]))["This run"]
