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
from clip_lens.methods.circuits.circuit import overlaps
from clip_lens.methods.circuits.discover import discover
from clip_lens.show.questions.circuit_report import (
    RANDOM,
    circuit_report,
    circuit_sections,
    comparison,
    faithful,
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
    pairs = Pairs([str(n) for n in range(12)], captions, foils, [f"{n // 2}.png" for n in range(12)])
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
    assert set(lines["method"]) == {*(done.name for done in found.values()), RANDOM}
    table = found["eap"].curve
    table = table[(table["circuit"] == "EAP") & (table["side"] == "foil") & (table["ranking"] == "absolute")]
    assert (
        lines[lines["method"] == "EAP"][["share", "f"]].to_numpy().tolist() == table[["share", "f"]].to_numpy().tolist()
    )
    curves = found["eap-ig"].curve
    some = curves[(curves["side"] == "foil") & (curves["ranking"] == "absolute") & (curves["share"] == 0.5)]
    by_chance = some[some["circuit"].str.startswith("random")]["f"]
    row = lines[(lines["method"] == RANDOM) & (lines["share"] == 0.5)].iloc[0]
    assert len(by_chance) == 2
    assert row[["f", "lower", "upper"]].tolist() == pytest.approx([by_chance.mean(), by_chance.min(), by_chance.max()])
    drawn = picture(section, "largest scores kept: negation in the foil").figure
    traces = {trace.name: trace for trace in drawn.data if trace.mode != "lines" or trace.showlegend is not False}
    assert np.array(traces["EAP"].y, dtype=float).tolist() == table.sort_values("share")["f"].tolist()
    assert drawn.layout.xaxis.type == "log"


def test_findings_say_the_numbers_of_the_summary(found):
    for done in found.values():
        said, summary = faithful(done), done.summary
        assert len(said) == len(summary) == 3
        for sentence, row in zip(said[::-1], summary.itertuples(), strict=True):
            assert f"on {row.pairs} held-out pairs the circuit keeps f = {row.f:.2f} " in sentence
            assert ("CMD" in sentence) == (done.method != "acdc")
            if done.method != "acdc":
                assert f"CPR {row.CPR:.2f} (random {row.random_CPR:.2f})" in sentence
    circuit = circuit_sections(found["eap"])["Circuit"]
    best = found["eap"].circuit.table().iloc[0]
    assert f"{best.edge} ({best.score:+.2f})" in circuit.findings[1]
    assert (
        f"EAP, on 6 pairs: of 15 edges chosen, out of 46, {len(found['eap'].circuit)} lie on a path"
        in circuit.findings[0]
    )


def test_the_estimate_is_compared_where_exact_scores_are_there(found):
    section = circuit_sections(found["eap-ig"])["Estimate"]
    table = found["eap-ig"].agreement.set_index("side")["r"]
    headings = " ".join(note.text for note in section.pictures[0].figure.layout.annotations)
    assert f"r = {table['caption']:.3f}" in headings and f"r = {table['foil']:.3f}" in headings
    assert any(f"r = {table['pooled']:.2f}" in sentence for sentence in section.findings)
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
        assert caption and len(words_of(caption[1])) > 40
    assert len(page) < 8_000_000


def test_an_empty_circuit_has_no_pictures_and_says_so(found):
    none = found["acdc"].circuit
    done = replace(found["acdc"], circuit=none - none)
    done = replace(done, circuit=replace(done.circuit, meta=none.meta))
    section = circuit_sections(done)["Circuit"]
    assert section.pictures == () and ", 0 lie on a path" in section.findings[0]


def test_many_runs_are_compared_within_what_they_share(found):
    groups = {"a, caption": [found["eap"], found["eap-ig"]], "b, foil": [found["random"], found["acdc"]]}
    sections = comparison(groups)
    assert list(sections) == ["All runs", "a, caption", "b, foil", "Overlap, 2 layers x 2 heads"]
    table = summaries(groups)
    assert len(table) == 12 and table.columns[0] == "run"
    best = min(groups["a, caption"], key=lambda done: done.summary["CMD"].iloc[-1])
    assert f"The smallest CMD has {best.name}: {best.summary['CMD'].iloc[-1]:.3f}" in sections["a, caption"].findings[0]
    circuits = {f"{name}: {done.name}": done.circuit for name, several in groups.items() for done in several}
    del circuits["b, foil: random(0)"]
    shown = sections["Overlap, 2 layers x 2 heads"].tables[0].frame
    assert shown.to_dict() == overlaps(circuits).to_dict()
    grid = np.array(sections["Overlap, 2 layers x 2 heads"].pictures[0].figure.data[0].z, dtype=float)
    pair = shown[(shown["first"] == "a, caption: EAP") & (shown["second"] == "b, foil: ACDC")]["jaccard"].item()
    assert np.allclose(grid, grid.T) and (np.diag(grid) == 1).all() and pair in grid[0].tolist()
    with pytest.raises(ValueError, match="no discoveries"):
        comparison({})


def test_methods_name_what_was_used(found):
    assert "ACDC" in dict(methods([found["acdc"]])) and "ACDC" not in dict(methods([found["eap"]]))
    assert "threshold: 0.01" in dict(methods([found["acdc"]]))["This run"]
