"""Is the direction of negation there, and is it used? A linear probe per layer, and its causal test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame, Series

from clip_lens.methods.probes.probe import probe
from clip_lens.methods.probes.split import TooFewTexts
from clip_lens.methods.probes.used import RANDOM_DIRECTIONS
from clip_lens.methods.registry import PROBE
from clip_lens.show.figures.curves import curve
from clip_lens.show.figures.words import SIDE_NAMES
from clip_lens.show.questions.case import Case, Question
from clip_lens.show.questions.sentences import SIDE_WORDS, estimate, opening, percentage
from clip_lens.show.report.section import Picture, Section, Table
from clip_lens.words import decimals, listed

TITLE = "Is the direction of negation there, and is it used?"
STEERED = ("caption", "foil")
"""The sides on which the direction is tested: the texts of the others are not told apart by it."""
CHANCE = 0.5
READABLE = {
    "accuracy": "negated or not, held-out pairs",
    "shuffled": "the same, words shuffled",
    "noun": "which of two nouns is negated",
    "control": "random labels per subject",
}
READ = (
    "Accuracy of a logistic regression on the stream at the end of text, on held-out pairs: is this text negated? If "
    "it does as well on shuffled words, it reads that the negator is there, not what is negated. Random labels show "
    "what memory alone gives."
)
USED = (
    "The share of d that moves when the difference of the class means is added to the text without negation, or "
    "removed from the text with it, at the end of text of one layer; beside it the largest size of a share that one of "
    f"{RANDOM_DIRECTIONS} random directions moves. Above 0, d moves towards what the other text gives; below 0 the "
    "other way. Where the two sides lie on opposite sides of 0, the direction raises or lowers the score of every "
    "image alike."
)
METHODS = (
    (
        "Probe",
        "Logistic regression (C = 1) on standardised coordinates; pairs that share a text are held out together; the "
        "direction that is added or removed is the difference of the class means on the training half.",
    ),
)


def read_and_used(case: Case) -> Section:
    """Whether the direction of negation is readable, and whether it is used."""
    record = case.reading.record(PROBE, seed=case.seed)
    try:
        table = case.keep.frame("probe", record, lambda: probe(case.encoder, case.batch, seed=case.seed))
    except TooFewTexts as error:  # all else in the report holds without a probe
        return Section(TITLE, findings=[f"Not computed: {error}."])
    return Section(
        TITLE,
        findings=[*used(table), read(table)],
        headline=headline(table),
        pictures=list(_pictures(table)),
        tables=[Table(table, "Probe and causal test by layer", "The rows of `clip_lens.probe`.")],
        notes=sorted({f"Layer {row.layer}: {row.note}." for row in table.itertuples() if row.note}),
    )


USE = Question("Read and used", read_and_used, METHODS)


def headline(table: DataFrame) -> str:
    """Whether the direction of negation is used where it can be read, for the head of a page; "" where none is told."""
    sides = [side for side in STEERED if table.get(f"removed_{side}", Series(np.nan)).notna().any()]
    if not sides:
        return ""
    moves = DataFrame({side: _moves(table, side) for side in sides})
    together = (moves == 1).all(axis=1)
    if together.any():
        return f"Is what can be read used? Yes, at {_at(table, together)}: without the direction of negation d shrinks."
    if ((moves == 1).any(axis=1) & (moves == -1).any(axis=1)).any():
        return (
            "Is what can be read used? Not as negation: removing its direction lowers d on one side and raises it on "
            "the other."
        )
    return "Is what can be read used? Removing its direction moves no more of d than random directions do."


def read(table: DataFrame) -> str:
    """From which layer on negation can be read at the end of text, from the rows of `probe`."""
    best = table.loc[table["accuracy"].idxmax()]
    if not (table["accuracy_lower"] > CHANCE).any():
        return (
            "At no layer does a linear probe tell negated texts from the others at the end of text (at most "
            f"{_accuracy(best)}, at layer {best['layer']:.0f}; chance is 50 %)."
        )
    above = table["accuracy_lower"] > np.fmax(table["control"], CHANCE)
    if not above.any():
        return (
            f"A linear probe tells negated texts from the others at the end of text in at most {_accuracy(best)} (at "
            f"layer {best['layer']:.0f}; chance is 50 %), but at no layer clearly more often than labels drawn at "
            f"random for each subject ({100 * best['control']:.0f} % there): with these pairs its success says little."
        )
    said = (
        f"A linear probe reads at the end of text whether the text is negated {_from(table, above)} (at "
        f"most {_accuracy(best)}, at layer {best['layer']:.0f}; chance is 50 %)"
    )
    nouns = table.dropna(subset="noun")
    if nouns.empty:
        return f"{said}."
    last = nouns.iloc[-1]
    no_more = "" if last["noun_lower"] > CHANCE else ", which is no more than chance"
    return f"{said}; which of two nouns is negated it reads in {_accuracy(last, 'noun')} at the last layer{no_more}."


def used(table: DataFrame) -> list[str]:
    """Whether removing the direction of the class means takes d away: over both sides, then for each, from `probe`."""
    sides = [side for side in STEERED if table.get(f"removed_{side}", Series(np.nan)).notna().any()]
    if not sides:
        return []
    moves = DataFrame({side: _moves(table, side) for side in sides})
    return [*_over_sides(table, moves), *(_on_side(table, side, moves[side]) for side in sides)]


def _moves(table: DataFrame, side: str) -> Series:
    """+1 where the interval of the share lies above what random directions reach, so that d goes; -1 where it lies
    below minus that, so that d grows; else 0."""
    lower, upper, random = (table[f"removed_{side}_{end}"] for end in ("lower", "upper", "random"))
    return (lower > random).astype(int) - (upper < -random).astype(int)


def _over_sides(table: DataFrame, moves: DataFrame) -> Iterator[str]:
    every = "on every side" if moves.shape[1] > 1 else f"with {SIDE_WORDS[moves.columns[0]]}"
    together = (moves == 1).all(axis=1)
    opposed = (moves == 1).any(axis=1) & (moves == -1).any(axis=1)
    if together.any():
        yield (
            f"Removing the direction of the class means takes more of d away than random directions do, {every}, at "
            f"{_at(table, together)} ({_shares(table, moves, together)}): there it is used."
        )
    if opposed.any():
        yield (
            "Removing the direction of the class means moves the sides in opposite directions at "
            f"{_at(table, opposed)} ({_shares(table, moves, opposed)}): there it raises or lowers the score of every "
            "image alike, which is no negation."
        )
    if not together.any() and not opposed.any():
        yield (
            "At no layer does removing the direction of the class means take more of d away than random directions do "
            f"{every} ({_shares(table, moves, table['layer'] == table['layer'].max())}): what a probe reads there is "
            "not, by itself, what the score is made of."
        )


def _on_side(table: DataFrame, side: str, moves: Series) -> str:
    """What removing the direction does on one side, beside random directions at the same layer."""
    parts = []
    for sign, does in {1: "takes d away", -1: "makes d larger"}.items():
        if (moves == sign).any():
            row = _strongest(table, [side], moves == sign)
            parts.append(f"{does} at {_at(table, moves == sign)} ({_told(row, side)})")
    if not parts:
        parts = [f"moves no more of d at any layer than random directions do ({_told(table.iloc[-1], side)})"]
    return f"{opening(side)}removing it {' and '.join(parts)}."


def _told(row: Series, side: str) -> str:
    random = decimals(row[f"removed_{side}_random"])
    return f"{_share(row, side)} of d at layer {row['layer']:.0f}, random ones up to {random}"


def _shares(table: DataFrame, moves: DataFrame, there: Series) -> str:
    """The shares of d that go on each side, at the layer, of some, where most moves."""
    row = _strongest(table, list(moves), there)
    shares = [f"{_share(row, side)} of d with {SIDE_WORDS[side]}" for side in moves]
    return f"at layer {row['layer']:.0f} {listed(shares)}"


def _strongest(table: DataFrame, sides: Sequence[str], there: Series) -> Series:
    """The row, of some, at which removing moves the largest shares over the sides."""
    sizes = table[[f"removed_{side}" for side in sides]].abs().sum(axis=1)
    return table.loc[sizes[there].idxmax()]


def _share(row: Series, side: str) -> str:
    name = f"removed_{side}"
    return estimate(row, name, f"{name}_lower", f"{name}_upper")


def _accuracy(row: Series, name: str = "accuracy") -> str:
    return percentage(row, name, f"{name}_lower", f"{name}_upper")


def _at(table: DataFrame, there: Series) -> str:
    layers = [f"{layer:.0f}" for layer in table.loc[there, "layer"]]
    return f"layer{'s' if len(layers) > 1 else ''} {listed(layers)}"


def _from(table: DataFrame, there: Series) -> str:
    """ "from layer 2 on" where it holds at all later ones too, else which layers."""
    first = there.idxmax()
    on = there.loc[first:].all() and first < there.index[-1]
    return f"from layer {table.loc[first, 'layer']:.0f} on" if on else f"at {_at(table, there)}"


def _pictures(table: DataFrame) -> Iterator[Picture]:
    yield Picture(
        _lines(table, READABLE), "Can the negation be read at the end of text?", READ, numbers=table, wide=True
    )
    for side in STEERED:
        if table.get(f"added_{side}", Series(np.nan)).notna().any():
            asked = f"Is the direction used? {SIDE_NAMES[side].capitalize()}"
            yield Picture(_lines(table, _tested(side)), asked, USED, numbers=table, pair="used")


def _tested(side: str) -> dict[str, str]:
    return {
        f"added_{side}": "added", f"added_{side}_random": "random ones added",
        f"removed_{side}": "removed", f"removed_{side}_random": "random ones removed",
    }  # fmt: skip


def _lines(table: DataFrame, columns: Mapping[str, str]) -> go.Figure:
    """Some columns of a table by layer as lines, with their bounds where they have some."""
    parts = []
    for column, name in columns.items():
        if column in table and table[column].notna().any():
            ends = {end: table.get(f"{column}_{end}", Series(np.nan, table.index)) for end in ("lower", "upper")}
            parts.append(DataFrame({"layer": table["layer"], "share": table[column], **ends, "what": name}))
    return curve(pd.concat(parts, ignore_index=True), "layer", "share", lower="lower", upper="upper", by="what")
