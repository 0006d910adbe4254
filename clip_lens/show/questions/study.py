"""`study`: the negation study as one report. Where negation is, which heads carry it, what confounds the score, and
whether what can be read is used (Quantmeyer, Mosteiro, Gatt 2024, and beyond).

Each question has a file of its own; here is their order, and the page's head.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from clip_lens.core.effects import SEGMENTS
from clip_lens.core.keep import Keep
from clip_lens.core.spread import Engine, Spread
from clip_lens.data.batch import Batch
from clip_lens.data.images import ImageStore
from clip_lens.methods.registry import STUDY
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.show.figures.thumbnails import Pictures
from clip_lens.show.questions.accuracy import ACCURACY
from clip_lens.show.questions.case import Case, Question
from clip_lens.show.questions.cautions import cautions
from clip_lens.show.questions.confounds import CONFOUNDS
from clip_lens.show.questions.heads import LOOK, MOVE
from clip_lens.show.questions.probe import USE
from clip_lens.show.questions.where import WHERE
from clip_lens.show.questions.writes import WRITES
from clip_lens.show.report.report import page_in, report
from clip_lens.show.report.section import Section

QUESTIONS: tuple[Question, ...] = (ACCURACY, WHERE, LOOK, WRITES, MOVE, CONFOUNDS, USE)
"""The study's questions in their order; one more is one more section of the page."""
LISTED = 40
"""Dropped pairs that the page names."""
METHODS = (
    (
        "Sides",
        "Negation in the caption and negation in the foil are never averaged before the effects are signed: sigma "
        "times an effect is the part of d that it moves. Shares are ratios of means over pairs, per side.",
    ),
    (
        "Intervals",
        "95 %, in brackets: percentile bootstrap over pairs with 1,000 resamples for means and shares, Wilson for "
        "accuracies, Fisher for correlations, HC3 for the regression; none below five pairs. Nothing is corrected for "
        "the number of comparisons.",
    ),
)


def study(
    encoder: HookedTextEncoder,
    batch: Batch,
    out: str | os.PathLike[str],
    *,
    segment: str = "correct",
    images: ImageStore | None = None,
    any_store: bool = False,
    pictures: Pictures = None,
    rows: int = 256,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    jobs: int = 1,
    executor: Engine | Spread | None = None,
    say: Callable[[str], object] | None = None,
) -> Path:
    """The path of a report of the negation study on one model and its pairs; its numbers lie beside it as Parquet.

    It answers where negation is processed (causal tracing of `segment`, as in the paper too, localisation for every
    segment), which heads attend to the negator, which parts write the logit difference and which heads move it, what in
    the data goes along with the score, and whether the direction of negation is readable and used (method, sections 2
    and 4 to 7). `images` is the bank that labels heads; `any_store=True` takes one of another model. Where no pair is
    in the segment all are traced, and the report says so. Finished results in `out` that fit are reused, so that an
    interrupted study goes on; others are an error, or replaced with `overwrite`. The page is report.html, or
    study-SEGMENT.html where that is another page already. `say` hears a line per step. The sweeps are
    shared out to `jobs` processes or an `executor` (`patch_effects`).

    Raises:
        ValueError: the batch does not run the text without negation (`align(run="affirmative")`), there is no such
            segment, the images were embedded by another model, other results lie in `out`, or what the analyses raise.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:40], store, encoder)
        >>> page = study(encoder, batch, getfixture("tmp_path"), images=store)
        >>> page.name, len(list(page.parent.glob("*.parquet"))) > 10
        ('report.html', True)
    """
    if batch.run != "affirmative":
        raise ValueError(f"the study adds the negation: align(..., run='affirmative'). Got run={batch.run!r}")
    if images is not None:
        images.require_of(encoder, any_store=any_store)
    hear = say or (lambda line: None)
    keep = Keep(Path(out), hear, overwrite)
    case, fallback = _traced(Case(encoder, batch, keep, segment, images, rows, seed, progress, jobs, executor))
    sections: dict[str, Section] = {}
    for question in QUESTIONS:
        hear(f"{question.name} ...")
        sections[question.name] = question.answer(case)
    data = "" if batch.pairs.name == encoder.name else f": {batch.pairs.name}"
    name = f"study-{case.segment}"
    return report(
        sections,
        page_in(out, name),
        name=name,
        title=f"How {encoder.full_name} processes negation{data}",
        summary=" ".join(sections[ACCURACY.name].findings),
        pictures=pictures,
        warnings=[*cautions(encoder, batch), *fallback],
        methods=[
            *(part for question in QUESTIONS for part in question.methods), *METHODS, ("This run", _this_run(case))
        ],
    )  # fmt: skip


def _traced(case: Case) -> tuple[Case, list[str]]:
    """The case with the segment asked for, or with all pairs where it has none, and then a line that says so."""
    segment = case.segment
    if segment not in (*SEGMENTS, "all"):
        raise ValueError(f"segment={segment!r}; give one of {', '.join((*SEGMENTS, 'all'))}")
    counts = case.data.frame["segment"].value_counts().to_dict()
    if segment == "all" or segment in counts:
        return case, []
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    return replace(case, segment="all"), [f"No pair is {segment} ({found}): all pairs are traced instead."]


def _this_run(case: Case) -> str:
    batch, said = case.batch, case.reading.record(STUDY).as_text()
    listed = "; ".join(f"{row.key}: {row.reason}" for row in batch.dropped.head(LISTED).itertuples()) or "none"
    more = f" and {len(batch.dropped) - LISTED} more" if len(batch.dropped) > LISTED else ""
    return (
        f"{'; '.join(f'{name}: {text}' for name, text in said.items())}. {len(batch)} pairs were run and "
        f"{len(batch.dropped)} dropped ({listed}{more}). Traced segment: {case.segment}. Seeds: bootstrap 0, probe "
        f"{case.seed}."
    )
