"""Where: causal tracing by slot and layer, and how localised it is in every segment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, get_args

import pandas as pd
from pandas import DataFrame

from clip_lens.core.effects import SEGMENTS, Effects, Of
from clip_lens.show.figures.curves import curve
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.figures.words import SIDE_NAMES, slot_name
from clip_lens.show.questions.case import Case, Question
from clip_lens.show.questions.sentences import SIDE_WORDS, by_side, estimate, opening
from clip_lens.show.report.effects_section import moving, section_of, slots_by_layer
from clip_lens.show.report.section import Picture, Section, Table
from clip_lens.words import counted, decimals, listed

FEW = 10
"""Pairs of a side and segment below which its line would be noise."""
SHARED = 1.0
"""Logits of mean d below which shares of it say nothing."""
PAPER = "correct"
"""The segment that the paper traces: there |d| is at least 1, and every pair has a ratio."""

TRACING = (
    "The text without negation is run; at one layer and one slot its residual stream is replaced by that of the text "
    "with the negation, and the rest of the model is computed from there. The number is the share of d that this "
    "moves. Whole slots are patched with all their tokens together; single tokens are patched one by one and averaged. "
    "Both are ratios of means over pairs; the paper's own number, a mean of ratios, is shown for comparison."
)
BY_TOKEN = (
    "The same, but tokens are patched one by one: the share is averaged over the pairs and over the tokens of a slot."
)
AS_IN_THE_PAPER = (
    "The paper's causal tracing effect: for each correct pair, the share of its own d that patching one token moves, "
    "averaged over the pairs and over the slot's tokens. Every pair has the same weight here; in the other maps a pair "
    "weighs by its d. Layer 0 is the embedding; layer l is the stream after l blocks."
)
LOCALISATION = (
    "The standard deviation (ddof 0) of the slots' shares of d, from the negator to the end of text, with single "
    "tokens averaged by slot: high where one slot has everything, low where it is spread out. The numbers of pairs are "
    "in brackets; bands are 95 % bootstrap intervals. Segments with fewer than ten pairs on a side, or with a mean d "
    "below 1 logit, of which shares mean little, are only in the table."
)
METHODS = (
    (
        "Causal tracing",
        "The text without negation is the run, the residual stream of the text with it the source, one layer and "
        "slot at a time; layer 0 is the embedding, layer l the stream after l blocks (Quantmeyer et al. 2024; Meng et "
        "al. 2022). Tokens are matched by a minimum edit-distance alignment; a token without counterpart has no "
        "value.",
    ),
    (
        "Two kinds of mean",
        'What is called a share of d is a ratio of means, sum of effects over sum of d, per side. What is called "as '
        'in the paper" is a mean of ratios, effect over d of each pair, on the correct segment, where |d| is at '
        "least 1. The two agree where the share does not go along with d. Localisation is taken of the first, and on "
        "the correct segment of the second too.",
    ),
)


def where(case: Case) -> Section:
    """Causal tracing of whole slots and of single tokens, the paper's own map, and the localisation by segment."""
    whole = case.patched("resid-slots", case.encoder.sites("resid", slots=case.batch.occurring))
    every = case.encoder.sites("resid", slots=range(int(case.batch.length.max())))
    single = case.patched("resid-positions", every)
    chosen = case.chosen(whole)
    by_slot = section_of("slots", chosen)
    by_token = section_of("tokens", case.chosen(single).by_slot(case.batch))
    paper = _of_segment(single, PAPER)
    mapped = None if paper is None else paper.by_slot(case.batch)
    spread = case.table("localisation", lambda: _localisation(case, single))
    data = {} if mapped is None else {"as-in-the-paper.csv": mapped.table(of="ratios")}
    return Section(
        f"Where: causal tracing of {'all' if case.segment == 'all' else f'the {case.segment}'} pairs",
        findings=[*by_slot.findings, *localised(spread[spread["segment"] == case.segment])],
        text=TRACING,
        pictures=[
            *_renamed(by_slot, "Whole slots", main=True),
            *_renamed(by_token, "Single tokens", caption=BY_TOKEN, pair="tokens"),
            *_as_in_the_paper(mapped), *_localisation_picture(spread),
        ],
        tables=[*by_slot.tables, Table(_by_layer(spread), "Localisation by segment and layer", LOCALISATION)],
        meta=by_slot.meta,
        notes=[] if mapped is not None else ["No pair is correct: there is no map as in the paper."],
        data={**by_slot.data, **by_token.data, **data},
        headline=headline(chosen.table()),
    )  # fmt: skip


WHERE = Question("Where", where, METHODS)


def headline(table: DataFrame) -> str:
    """Where the largest share of d moves, from layer to layer, on each side.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> headline(toy_effects().where(side="foil").table())
        'Where? The largest share of d moves at the negator in layer 0, then at the end of text in layer 1 (negation
        in the foil).'
    """
    parts = []
    for side, part in by_side(table):
        steps = [f"the {slot_name(slot)} {_layers(rows)}" for slot, rows in slots_by_layer(part)]
        parts.append(f"at {', then at '.join(steps)} ({SIDE_WORDS[side]})")
    return f"Where? The largest share of d moves {'; '.join(parts)}."


def _layers(rows: list[Any]) -> str:
    first, last = rows[0].layer, rows[-1].layer
    return f"in layer {first}" if first == last else f"in layers {first} to {last}"


SAME = 0.02
"""Shares that differ by no more look the same on a map."""


def apart(one: Effects, other: Effects) -> float:
    """The largest difference between the shares of two results; infinite where they have other places, or values.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> apart(toy_effects(), toy_effects()), apart(toy_effects(), toy_effects().where(slot="eot"))
        (0.0, inf)
    """
    first, second = (effects.fraction().set_index(["place", "side"])["fraction"] for effects in (one, other))
    if set(first.index) != set(second.index):
        return float("inf")
    second = second.loc[first.index]
    return float((first - second).abs().max()) if first.isna().equals(second.isna()) else float("inf")


WHAT_MAPS_SHOW = (
    "The maps show where in the text, and how deep in the model, d is decided: at each place, what one text computes "
    "is replaced with what the other computes there."
)


def right(every: DataFrame, traced: DataFrame, apart: float = float("inf")) -> str:
    """How often the model is right on all pairs, and how many are traced; `apart` is how far the shares of slots and
    of tokens lie apart, said where that is too little to be seen.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> pairs = toy_effects().pairs
        >>> right(pairs, pairs[:2])
        'The model prefers the caption in 100 % of all 3 pairs; the 2 correct ones are traced.'
    """
    every, traced = every.drop_duplicates("key"), traced.drop_duplicates("key")
    kinds = listed(list(map(str, dict.fromkeys(traced["segment"]))))
    chosen = "all of them" if len(traced) == len(every) else f"the {len(traced)} {kinds} ones"
    share = f"{decimals(100 * (every['d'] > 0).mean(), 0)} % of all {counted(len(every), 'pair')}"
    same = f" Token by token instead of slot by slot, no share differs by more than {decimals(apart)}."
    return f"The model prefers the caption in {share}; {chosen} are traced.{same if apart <= SAME else ''}"


def localised(spread: DataFrame) -> list[str]:
    """Where each side's effect is spread most evenly between the embedding and the end.

    Example:
        >>> spread = DataFrame({"side": "foil", "layer": [0, 1, 2], "localisation": [0.4, 0.1, 0.4], "pairs": 9})
        >>> localised(spread.assign(lower=[0.3, 0.0, 0.3], upper=0.5))[0][:61]
        'Negation in the foil (9 pairs): the effect is spread most eve'
    """
    said = []
    for side, part in by_side(spread):
        inner = part[(part["layer"] > 0) & (part["layer"] < part["layer"].max())].dropna(subset="localisation")
        if len(inner):
            least = inner.loc[inner["localisation"].idxmin()]
            said.append(
                f"{opening(side, part['pairs'].iloc[0])}the effect is spread most evenly over the slots after block "
                f"{least['layer'] - 1} (localisation {estimate(least, 'localisation', sign=False)}; at the embedding "
                f"{estimate(part.iloc[0], 'localisation', sign=False)})."
            )
    return said


def _of_segment(effects: Effects, segment: str) -> Effects | None:
    """The pairs of a segment, all of them by "all"; None where there is none."""
    if segment == "all":
        return effects
    return effects.where(segment=segment) if segment in set(effects.pairs["segment"]) else None


def _renamed(section: Section, what: str, **changes: Any) -> Iterator[Picture]:
    for picture in section.pictures:
        yield replace(picture, title=f"{what}: {picture.title[:1].lower()}{picture.title[1:]}", **changes)


def _as_in_the_paper(mapped: Effects | None) -> Iterator[Picture]:
    if mapped is not None:
        shown = moving(mapped, "slot")
        for side in dict.fromkeys(mapped.pairs["side"]):
            figure = heatmap(shown, title="", limit=1.0, side=side, of="ratios")
            title = f"As in the paper: {SIDE_NAMES[side]}"
            yield Picture(figure, title, AS_IN_THE_PAPER, data="as-in-the-paper.csv", pair="paper")


def _localisation(case: Case, single: Effects) -> DataFrame:
    """The localisation of every segment that has pairs, of all pairs together, and of the paper's mean."""
    tables = []
    for segment in (*SEGMENTS, "all"):
        part = _of_segment(single, segment)
        if part is None:
            continue
        for of in get_args(Of) if segment == PAPER else ("means",):
            table, pairs = part.by_slot(case.batch).localisation(of=of), part.pairs.groupby("side")["d"]
            sizes = {"pairs": table["side"].map(pairs.size()).astype(int), "mean d": table["side"].map(pairs.mean())}
            name = segment if of == "means" else f"{segment}, as in the paper"
            tables.append(table.assign(segment=name, **sizes))
    columns = ["segment", "side", "pairs", "mean d", "layer", "localisation", "lower", "upper", "slots"]
    return pd.concat(tables, ignore_index=True)[columns]


def _localisation_picture(spread: DataFrame) -> Iterable[Picture]:
    names = spread["segment"] + ", " + spread["side"].map(SIDE_NAMES) + " (" + spread["pairs"].astype(str) + ")"
    lines = spread.assign(what=names, layer=spread["layer"].astype(int))
    tellable = (lines["pairs"] >= FEW) & (lines["mean d"].abs() >= SHARED)
    lines = lines[tellable & lines["segment"].isin(SEGMENTS)].dropna(subset="localisation")
    if len(lines):
        figure = curve(lines, "layer", "localisation", lower="lower", upper="upper", by="what")
        figure.update_xaxes(title_text="layer (0: embedding, l: after l blocks)")
        yield Picture(figure, "How localised the effect is, by segment", LOCALISATION, numbers=spread, wide=True)


def _by_layer(spread: DataFrame) -> DataFrame:
    rows = spread[["segment", "side", "pairs", "mean d"]].drop_duplicates()
    table = spread.pivot(index=list(rows), columns="layer", values="localisation")
    return table.rename(columns=str).reindex(pd.MultiIndex.from_frame(rows)).reset_index()
