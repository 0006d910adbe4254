"""Which circuit makes d? Discoveries -> sections and pages: the circuit, its faithfulness, whether scores hold, how
stable it is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from clip_lens.core.effects import Effects
from clip_lens.methods import registry
from clip_lens.methods.circuits.circuit import Circuit
from clip_lens.methods.circuits.discover import BASELINES, Discovery
from clip_lens.methods.circuits.faithfulness import MEASURES
from clip_lens.show.figures.bars import bars
from clip_lens.show.figures.curves import curve, scatter
from clip_lens.show.figures.figure import Figure
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.figures.network import network
from clip_lens.show.figures.style import LIGHT, SMALL
from clip_lens.show.figures.thumbnails import Pictures
from clip_lens.show.questions.sentences import SIDE_WORDS, by_side, estimate, opening
from clip_lens.show.report.report import report
from clip_lens.show.report.section import Picture, Section, Table
from clip_lens.show.report.words import D
from clip_lens.words import capital, counted, decimals, minus

DRAWN = 300
"""Edges of a picture; of more the strongest are drawn."""
BARS = 15
BY_CHANCE = "random circuits"
GOOD = 0.9
"""Pearson's r from which an estimate stands for exact scores."""
NAMED = 5
"""Edges that a sentence names."""
SHADED = {"absolute": 1.0, "signed": 0.0}
"""From where the area is measured, by ranking: CMD is that between f and 1, CPR that between f and 0."""
RANKED = {"absolute": "the largest scores kept", "signed": "the most supporting edges kept"}
"""Which edges a circuit of some size keeps, by ranking."""

TEXT = (
    "A text tower is a network: the embedding, every attention head and every MLP write into a stream that all later "
    "parts read. An edge is the direct way from one sender to one receiver; a head receives three times, for its "
    "queries (q), keys (k) and values (v). A circuit is a choice of edges. It is run by cutting the others: along a "
    "cut edge, the receiver gets what the source sends instead of what this text sends. If the circuit is what makes "
    "the model prefer the caption, d stays as it is; with every edge cut, nothing of it is left."
)
IS = (
    "The picture shows which connections between the model's parts make d: with all others cut, and what they carry "
    "replaced, as much of d is left as stands below it."
)
NETWORK = (
    "The edges of the circuit that lie on a path from the embedding to the output, with the blocks from left to right; "
    "circles are heads, squares MLPs. The wider an edge, the larger its mean score: blue supports the model's own d, "
    "red works against it, grey has no score. Dashes tell what an edge goes into. The 40 strongest are shown at first; "
    "the slider shows fewer or all, and a click in the legend hides one kind."
)
STRONGEST = (
    "The largest mean scores of the circuit's edges, in logits of d, on the pairs on which the circuit was found, "
    "with 95 % bootstrap intervals over pairs. q, k and v are the queries, keys and values of a head; what is to the "
    "right of 0 supports d."
)
SEARCHED = (
    "The largest changes of the mean metric when an edge of the circuit is removed too, given what the search had "
    "removed before it. q, k and v are the queries, keys and values of a head; what is to the right of 0 supports d."
)
CURVES = {
    "absolute": "How much of d is left (f, upwards) when only a share of the edges is kept (to the right): those of "
    "the largest scores by size, pruned. 1 is what the whole model does, 0 what is left with no edge; bands are 95 % "
    f"bootstrap intervals over pairs. The random line is the mean of {BASELINES} random choices of that many edges, "
    "its band goes from the smallest to the largest of them. The hatched area between the line and 1 is CMD: the "
    "smaller, the better. On the logarithmic axis small circuits can be told apart, but areas mean nothing.",
    "signed": "The same, with the edges that support d the most: those that work against d come last, so f can rise "
    "above 1. The hatched area below the line is CPR: the larger, the better.",
}
JUDGED = (
    f"f of the circuit with a 95 % bootstrap interval, and the mean f of {BASELINES} random circuits with as many "
    "edges, on the held-out pairs: as selected, and pruned of the edges that lie on no path. The two forms do the same "
    "only where the source is a run on texts of equal length. Few edges of random circuits lie on a path. verdict.csv "
    "lists every circuit."
)
AREAS = (
    "CPR is the area below f over the kept share of edges, from .001 to 1 on a linear axis: larger is better. CMD is "
    "the area between f and 1: smaller is better, and 0 is a circuit that does just what the model does at every size. "
    "Intervals are 95 % bootstrap intervals over pairs; for random circuits the mean is given."
)
AGREES = (
    "Each point is an edge: to the right, what patching it alone moves on the held-out pairs; upwards, the method's "
    "score on the pairs of the other part, both means in logits of d. On the thin line the two are equal. Pearson's r "
    "is 1 when the points lie on any rising straight line."
)
STABLE = (
    "The pairs are drawn anew, with replacement, and the circuit is chosen again. The Jaccard overlap is the share of "
    "edges in both circuits among those in either, as a mean over resamples with a 95 % interval; certain edges are "
    "those that every resample chose. Nothing is run again for this."
)
COMPARED = (
    "The share of edges in both of two circuits among those in either, for circuits of models of one shape; by chance "
    "is how many edges two random circuits of these sizes have in common on average."
)
OVERLAP = "Each cell is the Jaccard overlap of two circuits, edges in both over edges in either: 1 is the same circuit."
SUMMARY = (
    "One row for each run and side: f of the circuit as selected and pruned, CPR and CMD on held-out pairs, beside the "
    "mean of random circuits. r is Pearson's correlation of the scores with exact ones on the held-out pairs, where "
    "these were computed; the Jaccard overlap is the stability of the circuit; repeated are judged pairs with a text "
    "that the circuit was found on."
)

EXACT = (
    "Exact scores",
    "Every edge is patched by itself: its receiver reads what the sender of the other text gives, everything behind "
    "computes on. The score of an edge is the mean over pairs of the part of d that this moves.",
)
EAP = (
    "EAP, EAP-IG",
    "Attribution patching estimates what patching an edge would move by the difference that its sender would make "
    "times the gradient of the metric at its receiver (Nanda 2023; Syed et al. 2310.10348). EAP-IG takes the mean "
    "gradient over inputs on the line from the other text's embedding to the run's (Hanna et al. 2024). Both are "
    "estimates: r says how good.",
)
ACDC = (
    "ACDC",
    "From the output backwards each edge is taken away for good if that changes the mean metric by less than a "
    "threshold (Conmy et al. 2023). The result is one circuit, without an order of edges by which smaller and larger "
    "ones could be chosen: it has one point on the curves, no CPR and no CMD.",
)
FOUND_BY = {registry.EXACT: EXACT, registry.EAP: EAP, registry.EAP_IG: EAP, registry.ACDC: ACDC}
SELECTION = (
    "Scores and selection",
    "An edge's score is the mean over pairs of its effect, signed so that positive supports the model's own d. The "
    "circuit is the edges with the largest scores by size. Pruned of the edges on no path from the embedding to the "
    "output it is another circuit: what is cut off from the embedding still computes from what the source gives. Both "
    "are judged; circuits of several sizes are pruned, as in MIB.",
)
HELD_OUT = {
    "by image": "Pairs of one image are in the same part; texts may stand in both.",
    "by text": "Pairs that share a text or an image, directly or over other pairs, are in the same part.",
    "": "How the pairs were parted is not recorded.",
}
FAITHFULNESS = (
    "Faithfulness",
    "f = (m(circuit) - m(empty)) / (m(full) - m(empty)), a ratio of means over pairs, m the metric, every edge "
    "outside of the circuit carrying the source's value (Mueller et al. 2025, MIB, 2504.13151). Per side, "
    "where pairs have sides, and pooled over all.",
)
INTEGRALS = (
    "CPR and CMD",
    "The integral of f, and of |1 - f|, over the kept share k in .001, .002, .005, .01, .02, .05, .1, .2, .5, 1; "
    "int(k N) of N edges, by signed score for CPR and by size for CMD, trapezoids on a linear axis. Half of the "
    "edges weigh as much as the step from .5 to 1: the areas say most about large circuits, the curves about "
    "small ones.",
)
INTERVALS = (
    "Intervals",
    "95 % percentile bootstrap intervals over whole pairs, 1,000 resamples (stability: 200), seeded; none below five "
    "pairs. Nothing is corrected for the number of comparisons.",
)


def circuit_report(
    discovery: Discovery,
    out: str | os.PathLike[str],
    *,
    others: Sequence[Discovery] = (),
    title: str | None = None,
    pictures: Pictures = None,
    warnings: Sequence[str] = (),
    name: str = "",
) -> Path:
    """The path of one HTML file on a discovery: `circuit_sections` with a summary and the methods in words.

    `others` are discoveries on the same pairs whose curves are drawn beside; `pictures`, `warnings` and `name` are
    those of `report`.

    Example:
        >>> from clip_lens.methods.circuits.discover import discover
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> found = discover(encoder, *batch.split(by="text"), method="eap", edges=100)
        >>> circuit_report(found, getfixture("tmp_path") / "report.html").name
        'report.html'
    """
    sections = circuit_sections(discovery, others)
    record = discovery.judged.effects.record
    data = "" if record.data == record.model else f": {record.data}"
    return report(
        sections,
        Path(out),
        title=title or f"The circuit behind the logit difference of {record.model}{data}",
        summary=IS,
        points=points(discovery),
        pictures=pictures,
        warnings=warnings,
        methods=methods([discovery, *others]),
        name=name,
    )


def circuit_sections(discovery: Discovery, others: Sequence[Discovery] = ()) -> dict[str, Section]:
    """The parts of a report on one discovery: its circuit, its faithfulness, whether scores hold, how stable it is.

    Example:
        >>> from clip_lens.methods.circuits.discover import discover
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> list(circuit_sections(discover(encoder, *batch.split(by="text"), method="eap", edges=100)))
        ['Circuit', 'Faithfulness', 'Stability']
    """
    made = {
        "Circuit": _circuit(discovery),
        "Faithfulness": _faithfulness([discovery, *others]),
        "Estimate": _estimate(discovery),
        "Stability": _stability(discovery),
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
        >>> parts = batch.split(by="text")
        >>> found = [discover(encoder, *parts, method=method, edges=100) for method in ("eap", "eap-ig")]
        >>> list(comparison({"tiny, scenes": found}))
        ['All runs', 'tiny, scenes', 'Overlap, 6 layers x 4 heads']
    """
    if not groups or not all(groups.values()):
        raise ValueError("no discoveries to compare")
    sections = {"All runs": _overview(summaries(groups))}
    for name, discoveries in groups.items():
        section = _faithfulness(discoveries)
        findings = [*_best(discoveries), held_out(discoveries[0])]
        sections[name] = replace(section, title=f"How faithful: {name}", findings=findings, tables=section.tables[1:])
    named = [(name, each) for name, every in groups.items() for each in every if each.method != registry.RANDOM]
    shape = lambda item: (item[1].circuit.n_layers, item[1].circuit.n_heads)
    for (layers, heads), members in groupby(sorted(named, key=shape), key=shape):
        circuits = {each.name if len(groups) == 1 else f"{name}: {each.name}": each.circuit for name, each in members}
        if len(circuits) > 1:
            title = f"Overlap, {layers} layers x {heads} heads"
            sections[title] = _overlap(title, Circuit.overlaps(circuits))
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
    return table.reindex(columns=["run", *tables[0].columns.drop("run")])


def methods(discoveries: Iterable[Discovery]) -> list[tuple[str, str]]:
    """What must be known of the numbers: headings and texts, with what was run.

    Example:
        >>> [heading for heading, _ in methods([])][:2]
        ['The logit difference d', 'Scores and selection']
    """
    given = list(discoveries)
    own = dict.fromkeys(FOUND_BY[found.method] for found in given if found.method in FOUND_BY)
    parted = " ".join(HELD_OUT[how] for how in dict.fromkeys(found.held_out for found in given))
    splits = ("Two splits", f"Circuits are found on one part of the pairs and judged on the other. {parted}".rstrip())
    first = [("This run", _this_run(given[0]))] if len(given) == 1 else []
    return [D, *own, SELECTION, splits, FAITHFULNESS, INTEGRALS, INTERVALS, *first]


# What is found, in sentences


def points(discovery: Discovery) -> list[str]:
    """How large the circuit is, how much of d it keeps on new pairs, and how sure its edges are: for a page's head."""
    pruned, n_edges = discovery.circuit.pruned(), int(discovery.circuit.graph.edges.sum())
    rows = {side: part.iloc[0] for side, part in by_side(discovery.summary)}
    whole = rows.get("pooled", next(iter(rows.values())))
    shares = {side: minus(decimals(100 * row["f_pruned"], 0)) for side, row in rows.items() if row is not whole}
    sides = f" ({'; '.join(f'{share} % with {SIDE_WORDS[side]}' for side, share in shares.items())})" if shares else ""
    return [
        f"{discovery.name} found a circuit of {len(pruned)} of the model's {n_edges} edges, on "
        f"{counted(discovery.found_on, 'pair')}.",
        f"By itself it keeps {minus(decimals(100 * whole['f_pruned'], 0))} % of d{sides} on "
        f"{counted(whole['pairs'], 'other pair')}; random circuits as large keep "
        f"{minus(decimals(100 * whole['random_f_pruned'], 0))} %.",
        *_sure(discovery),
    ]


def _sure(discovery: Discovery) -> Iterator[str]:
    """How much of the circuit other pairs would give too."""
    table = discovery.stability
    same = table if table.empty else table[table["edges"] == len(discovery.circuit)]
    for row in same.astype(object).itertuples():
        yield (
            f"Found on a fresh draw of such pairs, the circuit overlaps with this one by {decimals(row.jaccard)} (the "
            f"edges in both over those in either); {row.certain} of {row.edges} edges are chosen every time."
        )


def kept(discovery: Discovery) -> list[str]:
    """How much of d the circuit keeps on held-out pairs, as selected and pruned, per side."""
    said = []
    for side, rows in by_side(discovery.summary):
        row = rows.iloc[0]
        forms = [
            f"{form} ({counted(row[f'edges{end}'], 'edge')}) f = "
            f"{estimate(row, f'f{end}', f'lower{end}', f'upper{end}', sign=False)}, random circuits "
            f"{minus(decimals(row[f'random_f{end}']))}"
            for form, end in {"as selected": "", "pruned": "_pruned"}.items()
        ]
        said.append(f"{_held(side, row['pairs'])}the share of d that the circuit keeps is {'; '.join(forms)}.")
    return said


def strongest(scores: Effects | None) -> list[str]:
    """The edges of the largest scores, per side, on the pairs that they were found on."""
    said = []
    for side, part in by_side(DataFrame({"side": []}) if scores is None else scores.top(NAMED)):
        edges = [
            f"{row['place']} ({estimate(row, 'effect', 'effect_lower', 'effect_upper')})" for _, row in part.iterrows()
        ]
        said.append(f"{opening(side, part['n'].max())}the edges of the largest scores are {', '.join(edges)}.")
    return said


def ranked(discovery: Discovery) -> list[str]:
    """The areas under the curves of either ranking, per side; nothing of a method without scores."""
    said = []
    for side, rows in by_side(discovery.areas[discovery.areas["circuit"] == discovery.name]):
        by_chance = _by_chance([discovery], side)
        areas = [
            f"by {ranking} score {measure} = {_area(rows.iloc[0], by_chance, measure)}"
            for ranking, measure in MEASURES.items()
            if rows[measure].notna().all()
        ]
        if areas:
            said.append(f"{_held(side, rows['n'].iloc[0])}over circuits of all sizes, {', '.join(areas)}.")
    return said


def _area(row: Series, by_chance: Series, measure: str) -> str:
    own = estimate(row, measure, f"{measure}_lower", f"{measure}_upper", sign=False)
    return f"{own} (random circuits {minus(decimals(by_chance[measure]))})"


def held_out(discovery: Discovery) -> str:
    """How the judged pairs were kept apart from those that the circuit was found on, and how many share a text."""
    n, repeated = len(discovery.judged.effects.pairs), discovery.repeated
    how = f"Pairs were held out {discovery.held_out}" if discovery.held_out else "How pairs were held out is not said"
    if not repeated:
        return f"{how}: none of {n} judged pairs has a text that the circuit was found on."
    return (
        f"{how}: {repeated} of {n} judged pairs have a text that the circuit was found on, and tell less of new ones."
    )


def _held(side: str, pairs: int) -> str:
    return f"{capital(SIDE_WORDS[side])} ({counted(int(pairs), 'held-out pair')}): "


def _agrees(side: str, r: float) -> str:
    if r != r:
        return f"{opening(side)}the correlation with exact scores is not defined, one of them is constant."
    more = "they can stand for exact ones" if r >= GOOD else "they are no substitute for exact ones here"
    return (
        f"{opening(side)}the scores correlate with exact ones of the held-out pairs with r = {minus(decimals(r))}; "
        f"{more}."
    )


def _stays(row: Series) -> str:
    return (
        f"When the {row['pairs']} pairs are drawn anew, a circuit of {counted(row['edges'], 'edge')} keeps a Jaccard "
        f"overlap of {estimate(row, 'jaccard', sign=False)} with the one of all pairs; "
        f"{counted(row['certain'], 'edge')} of it are chosen every time."
    )


def _best(discoveries: Sequence[Discovery]) -> list[str]:
    """On each side the method with the smallest CMD, and the one with the largest CPR."""
    own = pd.concat([found.areas[found.areas["circuit"] == found.name] for found in discoveries])
    said = []
    for side, part in by_side(own):
        by_chance = _by_chance(discoveries, side)
        for measure, better in (("CMD", "smallest"), ("CPR", "largest")):
            known = part.dropna(subset=measure).sort_values(measure, ascending=better == "smallest")
            if len(known):
                best, area = known["circuit"].iloc[0], _area(known.iloc[0], by_chance, measure)
                said.append(f"{opening(side)}{best} has the {better} {measure}: {area}.")
    return said


# Sections


def _circuit(discovery: Discovery) -> Section:
    circuit, pruned = discovery.circuit, discovery.circuit.pruned()
    on_path = set(map(str, pruned.edges()))
    table = circuit.table().assign(on_path=lambda edges: edges["edge"].isin(on_path))
    first = (
        f"{discovery.name}, found on {counted(discovery.found_on, 'pair')}: {circuit.selection}. {len(pruned)} of its "
        f"{counted(len(circuit), 'edge')} lie on a path from the embedding to the output; they join "
        f"{len(pruned.nodes())} of {len(circuit.graph.senders) + 1} nodes."
    )
    said = (
        "The strongest come first; the score is the mean over the pairs on which the circuit was found. Edges that are "
        "not on a path are the ones that pruning removes."
    )
    effects, own = discovery.judged.effects, _scored(discovery)
    return Section(
        "The circuit",
        findings=[first, *strongest(own)],
        text=TEXT,
        pictures=[*_network(pruned), *_strongest(own, circuit)],
        tables=[Table(table, "The circuit's edges", said)],
        meta=effects.meta,
        pairs=effects.pairs,
        data={"circuit.csv": table},
    )


def _scored(discovery: Discovery) -> Effects | None:
    """The scores of the circuit's edges; None without any."""
    scores, edges = discovery.scores, set(discovery.circuit.edges())
    if scores is None or not edges:
        return None
    rows = [row for row, place in enumerate(scores.places) if place in edges]
    return replace(scores, values=scores.values[rows], places=tuple(scores.places[row] for row in rows))


def _network(pruned: Circuit) -> Iterator[Picture]:
    if len(pruned):
        figure = network(pruned, n=DRAWN if len(pruned) > DRAWN and pruned.scores is not None else None)
        yield Picture(figure, "The circuit as a network", NETWORK, data="circuit.csv", wide=True, main=True)


def _strongest(scores: Effects | None, circuit: Circuit) -> Iterator[Picture]:
    title = "The strongest edges of the circuit"
    if scores is not None:
        yield Picture(bars(scores, BARS), title, STRONGEST, wide=True)
    elif len(table := circuit.table().dropna(subset="score")):
        yield Picture(bars(table, BARS, "score", name="edge"), title, SEARCHED)


def _faithfulness(discoveries: Sequence[Discovery]) -> Section:
    first = discoveries[0]
    sides = [side for side, _ in by_side(first.verdict)]
    curves = {(ranking, side): _lines(discoveries, side, ranking) for ranking in RANKED for side in sides}
    return Section(
        "How much of the model does it do?",
        findings=[*kept(first), *ranked(first), held_out(first)],
        pictures=[_curve(lines, *at) for at, lines in curves.items()],
        tables=[
            Table(_forms(first), "The circuit and random ones of its size", JUDGED),
            Table(_areas(discoveries), "CPR and CMD", AREAS, rows=40),
        ],
        data={"faithfulness.csv": pd.concat(curves.values(), ignore_index=True), "verdict.csv": first.verdict},
    )


def _curve(lines: DataFrame, ranking: str, side: str) -> Picture:
    figure = curve(lines, "share", "f", lower="lower", upper="upper", by="method")
    figure.update_xaxes(title_text="kept share of all edges, before pruning", range=[0, 1], autorange=False)
    figure.update_yaxes(title_text="f, share of d that is kept")
    shade(figure, lines[lines["method"] == lines["method"].iloc[0]], MEASURES[ranking], SHADED[ranking])
    title = f"{capital(RANKED[ranking])}: {SIDE_WORDS[side]}"
    return Picture(figure, title, CURVES[ranking], data="faithfulness.csv", numbers=lines, pair=ranking)


def shade(figure: Figure, line: DataFrame, measure: str, level: float) -> None:
    """Hatches the area between a line of f and a level, on the linear axis on which it is computed; buttons show the
    logarithmic axis, without it."""
    rows = line.sort_values("share")
    share, f = rows["share"].to_numpy(dtype=float), rows["f"].to_numpy(dtype=float)
    figure.add_scatter(
        x=[*share, *share[::-1]], y=[*f, *([level] * len(f))], mode="lines", line_width=0, fill="toself", name=measure,
        fillcolor="rgba(0,0,0,0)", hoverinfo="skip",
        fillpattern={"shape": "/", "size": 7, "solidity": 0.15, "fgcolor": LIGHT.soft},
    )  # fmt: skip
    figure.add_hline(y=level, line={"color": LIGHT.soft, "width": 1})
    n, low = len(figure.data), float(np.log10(share.min()))
    axes = {
        "linear axis": [{"visible": [True] * n}, {"xaxis.type": "linear", "xaxis.range": [0, 1]}],
        "logarithmic axis": [
            {"visible": [True] * (n - 1) + [False]}, {"xaxis.type": "log", "xaxis.range": [low - 0.1, 0.05]}
        ],
    }  # fmt: skip
    figure.update_layout(
        margin_t=52,
        updatemenus=[
            {
                "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
                "showactive": False, "font": {"size": SMALL}, "bgcolor": LIGHT.fill, "bordercolor": LIGHT.gap,
                "pad": {"t": 0, "b": 4},
                "buttons": [{"label": name, "method": "update", "args": args} for name, args in axes.items()],
            }
        ],
    )  # fmt: skip


def _lines(discoveries: Sequence[Discovery], side: str, ranking: str) -> DataFrame:
    """f by share of each method, and of the random circuits their mean with the smallest and the largest."""
    columns, names = ["share", "edges", "f", "lower", "upper"], {discovery.name for discovery in discoveries}
    chosen = [found.curve[(found.curve["side"] == side) & (found.curve["ranking"] == ranking)] for found in discoveries]
    own = [
        rows.loc[(rows["circuit"] == found.name) & (rows["share"] > 0), columns].assign(method=found.name)
        for found, rows in zip(discoveries, chosen, strict=True)
    ]
    shares = chosen[0][~chosen[0]["circuit"].isin(names)].groupby("share", as_index=False)
    random = shares.agg(edges=("edges", "mean"), f=("f", "mean"), lower=("f", "min"), upper=("f", "max"))
    lines = pd.concat([*own, random.assign(method=BY_CHANCE)], ignore_index=True)
    return lines.assign(side=side, ranking=ranking)


def _forms(discovery: Discovery) -> DataFrame:
    """f of the circuit and of random ones, as selected and pruned: a row per form and side."""
    columns = {"edges": "edges", "f": "f", "lower": "lower", "upper": "upper", "random_f": "f of random ones"}
    rows = []
    for side, part in by_side(discovery.summary):
        for form, end in {"selected": "", "pruned": "_pruned"}.items():
            numbers = {words: part[name + end].iloc[0] for name, words in columns.items()}
            rows.append(
                {"circuit": discovery.name, "form": form, "side": side, **numbers, "pairs": part["pairs"].iloc[0]}
            )
    return DataFrame(rows)


def _areas(discoveries: Sequence[Discovery]) -> DataFrame:
    """CPR and CMD of the methods, with intervals, and the mean of the random circuits."""
    numbers = [column for name in MEASURES.values() for column in (name, f"{name}_lower", f"{name}_upper")]
    rows = [found.areas[found.areas["circuit"] == found.name] for found in discoveries]
    random = [_by_chance(discoveries, side).to_frame().T for side, _ in by_side(discoveries[0].areas)]
    parts = [part.dropna(axis=1, how="all") for part in [*rows, *random] if len(part)]
    table = pd.concat(parts, ignore_index=True).reindex(columns=["circuit", "side", *numbers, "n"])
    return table.rename(columns={"circuit": "method", "n": "pairs"})


def _by_chance(discoveries: Sequence[Discovery], side: str) -> Series:
    """The mean areas of the random circuits of some discoveries on the same pairs."""
    areas, names = discoveries[0].areas, {found.name for found in discoveries}
    rows = areas[(areas["side"] == side) & ~areas["circuit"].isin(names)]
    return Series({"circuit": BY_CHANCE, "side": side, **rows[[*MEASURES.values()]].mean(), "n": rows["n"].max()})


def _estimate(discovery: Discovery) -> Section | None:
    if discovery.scores is None or discovery.exact is None:
        return None
    table, figure = discovery.agreement, scatter(discovery.exact, discovery.scores)
    return Section(
        "Do the scores hold?",
        findings=[_agrees(row.side, row.r) for row in table.itertuples()],
        pictures=[Picture(figure, "Scores against exact ones of held-out pairs", AGREES)],
        tables=[Table(table.rename(columns={"r": "Pearson's r"}), "Pearson's r over edges")],
        data={"agreement.csv": _points(discovery.exact, discovery.scores)},
    )


def _points(exact: Effects, estimated: Effects) -> DataFrame:
    columns = ["place", "side", "effect"]
    one, two = (effects.fraction()[columns] for effects in (exact, estimated))
    return one.merge(two, on=["place", "side"], suffixes=("_exact", "_estimate"))


def _stability(discovery: Discovery) -> Section | None:
    table = discovery.stability
    if table.empty:
        return None
    said = [_stays(row) for _, row in table.astype(object).iterrows()]
    title = "Would other pairs give the same circuit?"
    return Section(title, findings=said, tables=[Table(table, "Stability over pairs", STABLE)])


def _overview(summary: DataFrame) -> Section:
    runs = summary[["run", "method"]].drop_duplicates()
    said = f"{counted(len(runs), 'run')}: {', '.join(f'{row.run} by {row.method}' for row in runs.itertuples())}."
    return Section(
        "All runs",
        findings=[said],
        text=TEXT,
        tables=[Table(summary, "What each run found", SUMMARY, rows=60)],
        data={"summary.csv": summary},
    )


def _overlap(title: str, table: DataFrame) -> Section:
    top = table.loc[table["jaccard"].idxmax()]
    said = (
        f"The most alike are {top['first']} and {top['second']}: {counted(top['shared'], 'shared edge')}, Jaccard "
        f"{decimals(top['jaccard'])}."
    )
    return Section(
        title,
        findings=[said],
        pictures=[Picture(_overlaps(table), "Overlap of the circuits", OVERLAP, numbers=table, wide=True)],
        tables=[Table(table, "Edges in common", COMPARED, rows=40)],
        data={re.sub(r"\W+", "-", title).strip("-").lower() + ".csv": table},
    )


def _overlaps(table: DataFrame) -> Figure:
    names = list(dict.fromkeys([*table["first"], *table["second"]]))
    both = {(row.first, row.second): row.jaccard for row in table.itertuples()}
    grid = DataFrame(
        [[1.0 if a == b else both.get((a, b), both.get((b, a))) for b in names] for a in names],
        index=pd.Index(names, name="circuit"), columns=pd.Index(names, name="with"), dtype=float,
    )  # fmt: skip
    return heatmap(grid, value="jaccard", title="", limit=1.0).update_xaxes(title_text="")


def _this_run(discovery: Discovery) -> str:
    said = discovery.judged.effects.meta
    found = {f"circuit: {name}": text for name, text in discovery.circuit.as_text().items()}
    lines = "; ".join(f"{name}: {text}" for name, text in {**said, **found}.items())
    return f"{lines}. {held_out(discovery)} Seed {discovery.seed}."
