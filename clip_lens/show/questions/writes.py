"""Which parts write the difference? Direct attribution, the logit lens, and what the strongest heads point to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from clip_lens.core.effects import Effects
from clip_lens.methods.direct import components, direct_effects, direct_record
from clip_lens.methods.labels import labels
from clip_lens.methods.lens import Norms, lens_record, logit_lens
from clip_lens.methods.registry import DIRECT
from clip_lens.model.site import Site
from clip_lens.show.figures.bars import bars
from clip_lens.show.figures.curves import curve
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.questions.case import Case, Question
from clip_lens.show.questions.sentences import by_side, estimate, opening
from clip_lens.show.report.section import Picture, Section, Table

LABELLED = 6
"""Heads that get labels: those of the largest direct effects."""
NAMED = 3
"""Parts that a sentence names."""

TEXT = (
    "What a part writes at the end of text, read through the final LayerNorm and the projection with their scales "
    "frozen, is its direct contribution; all contributions sum to d exactly. It leaves out what a part does through "
    "later parts."
)
PARTS = (
    "The part of d, in logits, that each component writes by itself into the end of text, with 95 % bootstrap "
    "intervals over pairs. Blue parts speak for the caption, red ones for the foil; with those not shown they sum to "
    "d."
)
HEADS = "The same for every head: rows are heads, columns blocks."
LENS: dict[Norms, str] = {
    "frozen": "d as it would be if nothing were written from this layer on, with the final LayerNorm's scale and the "
    "embedding's norm held at their final values: each step is what a layer writes.",
    "recomputed": "d if the stream before this layer were read as if it were the last, both scales computed from it.",
}
LABELS = (
    "For the heads of the largest direct effects: the images and texts of these pairs that the first principal "
    "component of what the head writes points to and from, in the joint space. The column share is the part of its "
    "variance on that line: labels of a small share say little."
)


def writes(case: Case) -> Section:
    """What each part writes of the logit difference by itself."""
    encoder, batch = case.encoder, case.batch
    compute = lambda: direct_effects(encoder, batch, progress=case.progress)
    chosen = case.chosen(case.read("direct", direct_record(case.reading), components(encoder, batch), compute))
    heads = chosen.where(kind="head")
    lenses = {norms: case.chosen(_lens(case, norms)) for norms in get_args(Norms)}
    by_head = heatmap(heads, "unit", "layer", "effect", title="")
    return Section(
        "Which parts write the difference?",
        findings=written(chosen),
        text=TEXT,
        pictures=[
            Picture(bars(chosen, 14), "The parts that write most of d", PARTS, data="direct.csv", wide=True),
            Picture(by_head, "Every head's direct part of d", HEADS, data="direct.csv", wide=True),
            *(
                Picture(
                    curve(lens), f"The logit lens, norms {norms}", LENS[norms], data=f"lens-{norms}.csv", pair="lens"
                )
                for norms, lens in lenses.items()
            ),
        ],
        tables=list(_labels(case, heads)),
        meta=chosen.meta,
        data={"direct.csv": chosen.table(), **{f"lens-{norms}.csv": lens.table() for norms, lens in lenses.items()}},
    )


WRITES = Question("Parts that write", writes, (DIRECT.definition,))


def written(effects: Effects) -> list[str]:
    """The parts that write most of d, per side, from a result of `direct_effects`."""
    said, whole = [], _sum(effects).table()
    for side, table in by_side(effects.table()):
        largest = table.loc[table["effect"].abs().nlargest(NAMED).index]
        parts = ", ".join(f"{row['place']} ({_logits(row)})" for _, row in largest.iterrows())
        d = next(row for _, row in whole[whole["side"] == side].iterrows())
        said.append(
            f"{opening(side, table['n'].max())}of a mean d of {_logits(d)} logits the largest parts are {parts}."
        )
    return said


def _sum(effects: Effects) -> Effects:
    """All parts together: d."""
    return replace(effects, values=effects.total[None], places=(Site("out"),))


def _logits(row: object) -> str:
    return estimate(row, "effect", "effect_lower", "effect_upper")


def _lens(case: Case, norms: Norms) -> Effects:
    compute = lambda: logit_lens(case.encoder, case.batch, norms=norms, progress=case.progress)
    return case.read(f"lens-{norms}", lens_record(case.reading, norms), case.encoder.sites("resid"), compute)


def _labels(case: Case, heads: Effects) -> Iterator[Table]:
    """The images and texts that the heads of the largest direct effects point to and from."""
    if case.images is None:
        return
    sizes = heads.fraction().assign(size=lambda table: table["effect"].abs()).groupby("place")["size"].max()
    names = set(sizes.nlargest(LABELLED).index)
    places = [place for place in heads.places if isinstance(place, Site) and str(place) in names]
    bank = list(dict.fromkeys([*case.batch.pairs.caption, *case.batch.pairs.foil]))
    # Whether the images are this model's was asked before anything was computed.
    compute = lambda: labels(
        case.encoder, places, images=case.images, texts=bank, batch=case.batch, n=3, any_store=True
    )
    found = case.table("labels", compute, places=", ".join(map(str, places)), images=repr(case.images))
    shown = found.drop(columns=["layer", "unit", "of"]).rename(columns={"place": "head", "id": "image or text"})
    title = "What the strongest heads point to and from"
    yield Table(shown, title, LABELS, rows=12 * LABELLED, pictured=["image or text"])
