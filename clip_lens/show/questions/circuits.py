"""Discoveries of circuits -> sections and pages: the circuit, its faithfulness, whether scores hold, how stable."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.methods.circuits.circuit import overlaps
from clip_lens.methods.circuits.discover import Discovery
from clip_lens.methods.circuits.faithfulness import MEASURES
from clip_lens.show.figures.bars import bars
from clip_lens.show.figures.curves import curve, scatter
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.figures.network import network
from clip_lens.show.figures.thumbnails import Pictures
from clip_lens.show.figures.words import SIDE_NAMES
from clip_lens.show.questions import circuit_texts as texts
from clip_lens.show.report.report import report
from clip_lens.show.report.section import Picture, Section, Table
from clip_lens.show.report.words import D

SIDES = {**SIDE_NAMES, "none": "no side", "pooled": "both sides together"}
DRAWN = 300
"""Edges of a picture; of more the strongest are drawn."""
BARS = 15
RANDOM = "random circuits"
GOOD = 0.9
"""Pearson's r from which an estimate stands for exact scores."""
SHOWN = {
    "method": "circuit", "side": "negation in", "edges": "edges", "f": "f", "lower": "lower", "upper": "upper",
    "random_f": "f of random ones", "pairs": "pairs",
}  # fmt: skip


def circuit_report(
    discovery: Discovery,
    out: str | os.PathLike[str],
    *,
    others: Sequence[Discovery] = (),
    title: str | None = None,
    pictures: Pictures = None,
    warnings: Sequence[str] = (),
) -> Path:
    """The path of one HTML file on a discovery: `circuit_sections` with a summary and the methods in words.

    `others` are discoveries on the same pairs whose curves are drawn beside; `pictures` and `warnings` are those of
    `report`.

    Example:
        >>> from clip_lens.methods.circuits.discover import discover
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> found = discover(encoder, *batch.split(), method="eap", edges=100)
        >>> circuit_report(found, getfixture("tmp_path") / "report.html").name
        'report.html'
    """
    sections = circuit_sections(discovery, others)
    meta = discovery.judged.meta
    return report(
        sections,
        Path(out),
        title=title or f"The circuit behind the logit difference of {meta['model']}: {meta['data']}",
        summary=" ".join([sections["Circuit"].findings[0], *faithful(discovery)[:1]]),
        pictures=pictures,
        warnings=warnings,
        methods=methods([discovery, *others]),
    )


def circuit_sections(discovery: Discovery, others: Sequence[Discovery] = ()) -> dict[str, Section]:
    """The parts of a report on one discovery: its circuit, its faithfulness, whether scores hold, how stable it is.

    Example:
        >>> from clip_lens.methods.circuits.discover import discover
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> list(circuit_sections(discover(encoder, *batch.split(), method="eap", edges=100)))
        ['Circuit', 'Faithfulness', 'Stability']
    """
    made = {
        "Circuit": _circuit_section(discovery),
        "Faithfulness": _faithful_section([discovery, *others]),
        "Estimate": _estimate_section(discovery),
        "Stability": _stable_section(discovery),
    }
    return {name: section for name, section in made.items() if section is not None}


def comparison(groups: Mapping[str, Sequence[Discovery]]) -> dict[str, Section]:
    """The parts of a report on many discoveries, by the model and pairs that they share: what each found, f over size
    of the methods in one picture, and how much circuits of towers of one shape have in common, random ones left out.

    Raises:
        ValueError: no discoveries.

    Example:
        >>> from clip_lens.methods.circuits.discover import discover
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> found = [discover(encoder, *batch.split(), method=method, edges=100) for method in ("eap", "eap-ig")]
        >>> list(comparison({"tiny, scenes": found}))
        ['All runs', 'tiny, scenes', 'Overlap, 6 layers x 4 heads']
    """
    if not groups or not all(groups.values()):
        raise ValueError("no discoveries to compare")
    summary = summaries(groups)
    sections = {"All runs": _overview(summary)}
    for name, discoveries in groups.items():
        best = summary[(summary["run"] == name) & (summary["side"] == _whole(discoveries[0]))]
        section = _faithful_section(discoveries)
        sections[name] = replace(
            section, title=f"How faithful: {name}", findings=_best(best), tables=section.tables[1:]
        )
    named = [(name, found) for name, every in groups.items() for found in every if found.method != "random"]
    shape = lambda item: (item[1].circuit.n_layers, item[1].circuit.n_heads)
    for (layers, heads), members in groupby(sorted(named, key=shape), key=shape):
        circuits = {_label(name, found, groups): found.circuit for name, found in members}
        if len(circuits) > 1:
            title = f"Overlap, {layers} layers x {heads} heads"
            sections[title] = _overlap_section(title, overlaps(circuits))
    return sections


def summaries(groups: Mapping[str, Sequence[Discovery]]) -> DataFrame:
    """The rows of `Discovery.summary` of all runs, with the column run before them: the name of their group.

    Example:
        >>> summaries({})
        Empty DataFrame
        Columns: []
        Index: []
    """
    tables = [found.summary.assign(run=name) for name, discoveries in groups.items() for found in discoveries]
    if not tables:
        return DataFrame()
    table = pd.concat([table.dropna(axis=1, how="all") for table in tables], ignore_index=True)
    wanted = ["run", *tables[0].columns.drop("run")]
    return table.reindex(columns=wanted)


def methods(discoveries: Iterable[Discovery]) -> list[tuple[str, str]]:
    """What a reader must know of the numbers: headings and texts, with what was run.

    Example:
        >>> [heading for heading, _ in methods([])][:2]
        ['The logit difference d', 'Scores and selection']
    """
    given = list(discoveries)
    own = dict.fromkeys(texts.OF_METHOD[found.method] for found in given if found.method in texts.OF_METHOD)
    first = [("This run", _this_run(given[0]))] if len(given) == 1 else []
    return [D, *own, *texts.METHODS, *first]


def faithful(discovery: Discovery) -> list[str]:
    """How much of d the circuit keeps on held-out pairs, and its areas, per side, in sentences."""
    said = []
    for row in discovery.summary.itertuples():
        areas = [
            f"{name} {_two(getattr(row, name))} (random {_two(getattr(row, f'random_{name}'))})"
            for name in MEASURES.values()
            if getattr(row, name) == getattr(row, name)
        ]
        said.append(
            f"{_capital(SIDES[row.side])}: on {row.pairs} held-out pairs the circuit keeps f = {_two(row.f)} "
            f"[{_two(row.lower)}, {_two(row.upper)}] of d, random circuits of its size {_two(row.random_f)}"
            f"{'; ' + ', '.join(areas) if areas else ''}."
        )
    return said[::-1]  # both sides together first


def _circuit_section(discovery: Discovery) -> Section:
    circuit, asked = discovery.circuit, int(discovery.circuit.meta["asked"])
    nodes = f"{len(circuit.nodes())} of {len(circuit.graph.senders) + 1} nodes"
    verb = "left by the search" if discovery.method == "acdc" else "drawn" if discovery.method == "random" else "chosen"
    first = (
        f"{discovery.name}, on {discovery.found_on} pairs: of {asked} edges {verb}, out of "
        f"{int(circuit.graph.edges.sum())}, {len(circuit)} lie on a path from the embedding to the output; they join "
        f"{nodes}."
    )
    table = circuit.table()
    top = [f"{row.edge} ({row.score:+.2f})" for row in table.dropna(subset="score").head(5).itertuples()]
    return Section(
        "The circuit",
        findings=[first, *([f"Its strongest edges, in logits of d: {', '.join(top)}."] if top else [])],
        text=texts.CIRCUIT_TEXT,
        pictures=[*_network(discovery), *_strongest(discovery)],
        tables=[
            Table(
                table, "The circuit's edges", "Strongest first; the score is the mean over the pairs it was found on."
            )
        ],
        meta=discovery.judged.meta,
        pairs=discovery.judged.pairs,
        data={"circuit.csv": table},
    )


def _network(discovery: Discovery) -> Iterator[Picture]:
    circuit = discovery.circuit
    if len(circuit):
        figure = network(circuit, n=DRAWN if len(circuit) > DRAWN and circuit.scores is not None else None)
        yield Picture(figure, "The circuit as a network", texts.NETWORK, data="circuit.csv", wide=True)


def _strongest(discovery: Discovery) -> Iterator[Picture]:
    scores, circuit = discovery.scores, discovery.circuit
    if scores is not None and len(circuit):
        kept = set(circuit.edges())
        rows = [row for row, place in enumerate(scores.places) if place in kept]
        own = replace(scores, values=scores.values[rows], places=tuple(scores.places[row] for row in rows))
        yield Picture(bars(own, BARS), "The strongest edges of the circuit", texts.STRONGEST, wide=True)
    elif len(table := circuit.table().dropna(subset="score")):
        yield Picture(bars(table, BARS, "score", name="edge"), "The strongest edges of the circuit", texts.SEARCHED)


def _faithful_section(discoveries: Sequence[Discovery]) -> Section:
    first = discoveries[0]
    tables = [
        Table(
            first.summary[list(SHOWN)].rename(columns=SHOWN),
            "The circuit and random ones of its size", texts.JUDGED,
        ),
        Table(_areas(discoveries), "CPR and CMD", texts.AREAS, rows=40),
    ]  # fmt: skip
    curves = pd.concat([_lines(discoveries, side, ranking) for side in _sides(first) for ranking in CURVES])
    return Section(
        "How much of the model does it do?",
        findings=faithful(first),
        pictures=list(_curves(discoveries)),
        tables=tables,
        data={"faithfulness.csv": curves, "verdict.csv": first.verdict},
    )


CURVES = {"absolute": "the largest scores kept", "signed": "the most supporting edges kept"}


def _curves(discoveries: Sequence[Discovery]) -> Iterator[Picture]:
    for ranking, what in CURVES.items():
        for side in _sides(discoveries[0]):
            lines = _lines(discoveries, side, ranking)
            figure = curve(lines, "share", "f", lower="lower", upper="upper", by="method", log=True)
            figure.update_xaxes(title_text="kept share of all edges, before pruning")
            figure.update_yaxes(title_text="f, share of d that is kept")
            title = f"f over size, {what}: {SIDES[side]}"
            yield Picture(figure, title, texts.CURVES[ranking], data="faithfulness.csv", numbers=lines)


def _lines(discoveries: Sequence[Discovery], side: str, ranking: str) -> DataFrame:
    """f by share of each method, and of the random circuits their mean with the smallest and the largest."""
    found, columns = [], ["share", "edges", "f", "lower", "upper"]
    for discovery in discoveries:
        rows = discovery.curve[discovery.curve["circuit"] == discovery.name]
        rows = rows[(rows["side"] == side) & (rows["ranking"] == ranking) & (rows["share"] > 0)]
        found.append(rows[columns].assign(method=discovery.name))
    curves, names = discoveries[0].curve, {discovery.name for discovery in discoveries}
    by_chance = curves[(curves["side"] == side) & (curves["ranking"] == ranking) & ~curves["circuit"].isin(names)]
    shares = by_chance.groupby("share")
    told = {
        "edges": shares["edges"].mean(),
        "f": shares["f"].mean(),
        "lower": shares["f"].min(),
        "upper": shares["f"].max(),
    }
    random = DataFrame(told).reset_index().assign(method=RANDOM)
    return pd.concat([*found, random], ignore_index=True).assign(side=side, ranking=ranking)


def _areas(discoveries: Sequence[Discovery]) -> DataFrame:
    """CPR and CMD of the methods, with intervals, and the mean of the random circuits."""
    own = [table[table["circuit"] == found.name] for found in discoveries for table in [found.areas]]
    names = {found.name for found in discoveries}
    others = discoveries[0].areas[~discoveries[0].areas["circuit"].isin(names)]
    numbers = [column for name in MEASURES.values() for column in (name, f"{name}_lower", f"{name}_upper")]
    by_chance = others.groupby("side", sort=False).agg({**dict.fromkeys(MEASURES.values(), "mean"), "n": "first"})
    random = by_chance.reset_index().assign(circuit=RANDOM).reindex(columns=["circuit", "side", *numbers, "n"])
    parts = [part[["circuit", "side", *numbers, "n"]].dropna(axis=1, how="all") for part in [*own, random] if len(part)]
    table = pd.concat(parts, ignore_index=True).reindex(columns=["circuit", "side", *numbers, "n"])
    return table.rename(columns={"circuit": "method", "side": "negation in", "n": "pairs"})


def _estimate_section(discovery: Discovery) -> Section | None:
    if discovery.scores is None or discovery.exact is None:
        return None
    table = discovery.agreement
    return Section(
        "Do the scores hold?",
        findings=[_agrees(row.side, row.r) for row in table.itertuples()],
        pictures=[
            Picture(
                scatter(discovery.exact, discovery.scores), "Scores against exact ones of held-out pairs", texts.AGREES
            )
        ],
        tables=[Table(table.rename(columns={"r": "Pearson's r"}), "Pearson's r over edges")],
        data={"agreement.csv": _points(discovery.exact, discovery.scores)},
    )


def _agrees(side: str, r: float) -> str:
    if r != r:
        return f"{_capital(SIDES[side])}: the correlation with exact scores is not defined, one of them is constant."
    good = r >= GOOD
    more = "they can stand for exact ones" if good else "they are no substitute for exact ones here"
    return (
        f"{_capital(SIDES[side])}: the scores correlate with exact ones of the held-out pairs with r = {r:.2f}; {more}."
    )


def _points(exact: Effects, estimate: Effects) -> DataFrame:
    columns = ["place", "side", "effect"]
    one, two = (effects.fraction()[columns] for effects in (exact, estimate))
    return one.merge(two, on=["place", "side"], suffixes=("_exact", "_estimate"))


def _stable_section(discovery: Discovery) -> Section | None:
    table = discovery.stability
    if table.empty:
        return None
    said = [
        f"When the {row.pairs} pairs are drawn anew, a circuit of {row.edges} edges keeps a Jaccard overlap of "
        f"{row.jaccard:.2f} [{row.lower:.2f}, {row.upper:.2f}] with the one of all pairs; {row.certain} edges are "
        "chosen every time."
        for row in table.itertuples()
    ]
    return Section(
        "Would other pairs give the same circuit?",
        findings=said,
        tables=[Table(table, "Stability over pairs", texts.STABLE)],
    )


def _overview(summary: DataFrame) -> Section:
    runs = summary[["run", "method"]].drop_duplicates()
    said = f"{len(runs)} runs: {', '.join(f'{row.run} by {row.method}' for row in runs.itertuples())}."
    return Section(
        "All runs",
        findings=[said],
        text=texts.CIRCUIT_TEXT,
        tables=[Table(summary, "What each run found", texts.SUMMARY, rows=60)],
        data={"summary.csv": summary},
    )


def _best(summary: DataFrame) -> list[str]:
    """The method with the smallest CMD, and the one with the largest CPR."""
    said = []
    for name, better, best in (("CMD", "smallest", "idxmin"), ("CPR", "largest", "idxmax")):
        known = summary.dropna(subset=name)
        if len(known):
            row = known.loc[getattr(known[name], best)()]
            random = f"random circuits {row[f'random_{name}']:.3f}"
            said.append(f"The {better} {name} has {row['method']}: {row[name]:.3f} ({random}).")
    return said


def _overlap_section(title: str, table: DataFrame) -> Section:
    names = list(dict.fromkeys([*table["first"], *table["second"]]))
    both = {(row.first, row.second): row.jaccard for row in table.itertuples()}
    grid = DataFrame(
        [[1.0 if a == b else both.get((a, b), both.get((b, a))) for b in names] for a in names],
        index=pd.Index(names, name="circuit"), columns=pd.Index(names, name="with"), dtype=float,
    )  # fmt: skip
    top = table.loc[table["jaccard"].idxmax()]
    said = (
        f"The most alike are {top['first']} and {top['second']}: {top['shared']} shared edges, Jaccard "
        f"{top['jaccard']:.2f}."
    )
    return Section(
        title,
        findings=[said],
        pictures=[Picture(_overlap_figure(grid), "Overlap of the circuits", texts.OVERLAP, numbers=table, wide=True)],
        tables=[Table(table, "Edges in common", texts.COMPARED, rows=40)],
        data={re.sub(r"\W+", "-", title).strip("-").lower() + ".csv": table},
    )


def _overlap_figure(grid: DataFrame) -> go.Figure:
    return heatmap(grid, value="jaccard", title="", limit=1.0).update_xaxes(title_text="")


def _label(name: str, found: Discovery, groups: Mapping[str, object]) -> str:
    return found.name if len(groups) == 1 else f"{name}: {found.name}"


def _sides(discovery: Discovery) -> list[str]:
    return list(dict.fromkeys(discovery.verdict["side"]))


def _whole(discovery: Discovery) -> str:
    """ "pooled", or the one side that there is."""
    return _sides(discovery)[-1]


def _this_run(discovery: Discovery) -> str:
    said = {**discovery.judged.meta, **{f"circuit: {name}": value for name, value in discovery.circuit.meta.items()}}
    return "; ".join(f"{name}: {value}" for name, value in said.items()) + f". Seed {discovery.seed}."


def _two(number: float) -> str:
    """Two decimals, without a minus sign before nothing."""
    return f"{number:.2f}".replace("-0.00", "0.00")


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
