"""`study`: the negation study as one report. Where negation is, which heads carry it, what confounds the score, and
whether what can be read is used (Quantmeyer, Mosteiro, Gatt 2024, and beyond).

A section is a function from a `Study` to a `Section`; `SECTIONS` lists them. The numbers lie in the study's folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame, Series

from clip_lens.core.effects import SEGMENTS, Effects
from clip_lens.core.keep import Keep
from clip_lens.core.metric import logit
from clip_lens.core.source import counterpart
from clip_lens.core.table import SIDES
from clip_lens.data.batch import Batch
from clip_lens.data.images import ImageStore
from clip_lens.methods.attention import attention_effects
from clip_lens.methods.confounds import ALL, WITHOUT, Confounds, confounds
from clip_lens.methods.direct import components, direct_effects, logit_lens
from clip_lens.methods.labels import labels
from clip_lens.methods.patching import METHOD, describe, patch_effects
from clip_lens.methods.probes.probe import TooFewTexts, probe
from clip_lens.methods.scores import tally
from clip_lens.methods.statistics import correlations
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Place, Site
from clip_lens.show.figures.bars import bars
from clip_lens.show.figures.curves import curve, lens_lines
from clip_lens.show.figures.heatmap import SIDE_NAMES, heatmap
from clip_lens.show.figures.style import template
from clip_lens.show.figures.thumbnails import Pictures
from clip_lens.show.questions import findings
from clip_lens.show.questions import study_texts as texts
from clip_lens.show.report.effects_section import section_of
from clip_lens.show.report.report import report
from clip_lens.show.report.section import Picture, Section, Table

IDENTITY = ("model", "weights", "data", "data digest", "images", "batch", "dtype", "pairs", "scale", "versions")
"""What two results must have in common to be of the same study."""
LABELLED = 6
"""Heads that get labels: those of the largest direct effects."""
FEW = 10
"""Pairs of a side and segment below which its line would be noise."""
SHARED = 1.0
"""Logits of mean d below which shares of it say nothing."""


@dataclass(frozen=True)
class Study:
    """What the study works with: a model, its pairs, a folder of finished results, and which segment is traced."""

    encoder: HookedTextEncoder
    batch: Batch
    keep: Keep
    segment: str = "correct"
    images: ImageStore | None = None
    rows: int = 256
    seed: int = 0
    progress: bool = True

    def meta(self, method: str, **more: str) -> dict[str, str]:
        """What a finished result must say of itself to be taken as this study's."""
        said = describe(self.encoder, self.batch, method=method, source=counterpart, metric=logit)
        return {name: said[name] for name in IDENTITY} | {"method": method, **more}

    def patched(self, name: str, places: Sequence[Place]) -> Effects:
        """Activation patching of these places from the text with the negation."""
        run = lambda chosen: patch_effects(self.encoder, self.batch, chosen, rows=self.rows, progress=self.progress)
        return self.keep.effects(name, self.meta(METHOD), places, run)

    def once(
        self, name: str, method: str, places: Sequence[Place], compute: Callable[[], Effects], **more: str
    ) -> Effects:
        """A result that is computed in one go."""
        return self.keep.effects(name, self.meta(method, **more), places, lambda _: compute(), whole=True)

    @cached_property
    def data(self) -> Confounds:
        """What is known of every pair, its score with it: computed once for all sections."""
        return confounds(self.encoder, self.batch)

    def chosen(self, effects: Effects) -> Effects:
        """The pairs of the segment that is traced."""
        return effects if self.segment == "all" else effects.where(segment=self.segment)


def study(
    encoder: HookedTextEncoder,
    batch: Batch,
    out: str | os.PathLike[str],
    *,
    segment: str = "correct",
    images: ImageStore | None = None,
    pictures: Pictures = None,
    rows: int = 256,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
) -> Path:
    """The path of a report of the negation study on one model and its pairs; its numbers lie beside it as Parquet.

    It answers where negation is processed (causal tracing of `segment`, localisation for every segment), which heads
    attend to the negator, which parts write the logit difference and which heads move it, what in the data goes along
    with the score, and whether the direction of negation is readable and used (method, sections 2 and 4 to 7).
    `images` is the bank that labels heads. Where no pair is in the segment all are traced, and the report says so.
    Finished results in `out` that fit are reused, so that an interrupted study goes on. `say` hears a line per step.

    Raises:
        ValueError: the batch does not run the text without negation (`align(run="affirmative")`), there is no such
            segment, or what the analyses raise.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:40], store, encoder)
        >>> page = study(encoder, batch, getfixture("tmp_path"), images=store)
        >>> page.name, len(list(page.parent.glob("*.parquet"))) > 10
        ('report.html', True)
    """
    if batch.run != "affirmative":
        raise ValueError(f"the study adds the negation: align(..., run='affirmative'). Got run={batch.run!r}")
    hear = say or (lambda line: None)
    job, fallback = _traced(Study(encoder, batch, Keep(Path(out), hear), segment, images, rows, seed, progress))
    sections: dict[str, Section] = {}
    for name, make in SECTIONS.items():
        hear(f"{name} ...")
        sections[name] = make(job)
    return report(
        sections,
        Path(out) / "report.html",
        title=_title(encoder, batch),
        summary=_summary(sections),
        pictures=pictures,
        warnings=[*findings.cautions(encoder, batch), *fallback],
        methods=[*texts.METHODS, ("This run", _this_run(job))],
    )


def _title(encoder: HookedTextEncoder, batch: Batch) -> str:
    data = "" if batch.pairs.name == encoder.name else f": {batch.pairs.name}"
    return f"How {encoder.full_name} processes negation{data}"


def _traced(job: Study) -> tuple[Study, list[str]]:
    """The study of the segment asked for, or of all pairs where it has none, and then a line that says so."""
    segment = job.segment
    if segment not in (*SEGMENTS, "all"):
        raise ValueError(f"segment={segment!r}; give one of {', '.join((*SEGMENTS, 'all'))}")
    counts = job.data.frame["segment"].value_counts().to_dict()
    if segment == "all" or segment in counts:
        return job, []
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    return replace(job, segment="all"), [f"No pair is {segment} ({found}): all pairs are traced instead."]


def scores_section(job: Study) -> Section:
    """How often the caption beats the foil."""
    pairs = job.data.frame
    table = job.keep.save("scores", tally(pairs).drop(columns="tied"))
    shown = table.rename(columns={"mean_d": "mean d", "n": "pairs"})
    formats = dict.fromkeys(("accuracy", "lower", "upper"), ".1%") | {"mean d": ".2f"}
    told = "The share of pairs with d > 0, with Wilson's 95 % interval; a tie counts as wrong."
    return Section(
        "Does the model tell the texts apart?",
        findings=findings.accuracy(table),
        pictures=[Picture(_histogram(pairs), "The logit difference of every pair", texts.DIFFERENCES, wide=True)],
        tables=[Table(shown, "Pairwise accuracy, as VALSE reports it", told, formats)],
        pairs=pairs,
        data={"pairs.csv": pairs},
    )


def where_section(job: Study) -> Section:
    """Causal tracing by slot and layer, and how localised it is in every segment."""
    slots = [name for number, name in enumerate(job.batch.slots) if (job.batch.slot == number).any()]
    whole = job.patched("resid-slots", job.encoder.sites("resid", slots=slots))
    every = job.encoder.sites("resid", slots=range(int(job.batch.length.max())))
    single = job.patched("resid-positions", every)
    results = {"slots": job.chosen(whole), "tokens": job.chosen(single).by_slot(job.batch)}
    by_slot, by_token = (section_of(name, effects) for name, effects in results.items())
    spread = job.keep.save("localisation", _localisation(job, single))
    return Section(
        f"Where: causal tracing of {'all' if job.segment == 'all' else f'the {job.segment}'} pairs",
        findings=[*by_slot.findings, *findings.localised(spread[spread["segment"] == job.segment])],
        text=texts.TRACING,
        pictures=[
            *_renamed(by_slot, "Whole slots"), *_renamed(by_token, "Single tokens"), *_localisation_picture(spread)
        ],
        tables=[
            *by_slot.tables,
            Table(_by_layer(spread), "Localisation by segment and layer", texts.LOCALISATION),
        ],
        meta=by_slot.meta,
        data={**by_slot.data, **by_token.data},
    )  # fmt: skip


def selectivity_section(job: Study) -> Section:
    """Which heads attend to the negator, and whether that goes along with the score."""
    encoder, batch, method = job.encoder, job.batch, "attention selectivity"
    queries = [name for name in batch.slots[batch.slots.index("negator") + 1 :] if _occurs(name, batch)]
    whole = job.once("selectivity", method, encoder.sites("pattern"), lambda: attention_effects(encoder, batch))
    at = job.once(
        "selectivity-by-slot", method, encoder.sites("pattern", slots=queries),
        lambda: attention_effects(encoder, batch, queries=queries),
    )  # fmt: skip
    table, along = whole.table(pooled=True), job.keep.save("selectivity-correlations", correlations(whole))
    blocks = table.astype({"layer": int}).groupby("layer")["fraction"].mean().rename("mean selectivity")
    best = int(blocks.idxmax())
    heads = heatmap(whole, "unit", "layer", title="", limit=1.0, pooled=True)
    by_slot = heatmap(at.where(layer=best), "slot", "unit", title="", limit=1.0, pooled=True)
    lines = curve(blocks.reset_index(), "layer", "mean selectivity")
    lines.update_xaxes(title_text="block, counted from 0")
    data = {"selectivity.csv": table, "selectivity-by-slot.csv": at.table(pooled=True), "correlations.csv": along}
    pictures = [
        Picture(heads, "Selectivity of every head, both sides", texts.SELECTIVITY, data="selectivity.csv"),
        Picture(lines, "Mean selectivity of each block", texts.BLOCKS),
        Picture(
            by_slot,
            f"The heads of block {best}, by the slot that looks",
            texts.BY_QUERY,
            data="selectivity-by-slot.csv",
        ),
        *_correlated(along),
    ]
    shown = {"place": "head", "fraction": "selectivity", "lower": "lower", "upper": "upper", "n": "pairs"}
    top = table.nlargest(10, "fraction")[list(shown)].rename(columns=shown)
    top["head"] = top["head"].str.removeprefix("pattern ")
    return Section(
        "Which heads look at the negator?",
        findings=[*findings.selective(table, best, float(blocks.max())), *findings.along(along)],
        pictures=pictures,
        tables=[Table(top, "The most selective heads", "Mean over all pairs, with 95 % bootstrap intervals.")],
        meta=whole.meta,
        data=data,
    )


def direct_section(job: Study) -> Section:
    """What each part writes of the logit difference by itself."""
    encoder, batch = job.encoder, job.batch
    compute = lambda: direct_effects(encoder, batch)
    chosen = job.chosen(job.once("direct", "direct logit attribution", components(encoder, batch), compute))
    heads = chosen.where(kind="head")
    lenses = {name: job.chosen(_lens(job, name)) for name in texts.LENS}
    by_head = heatmap(heads, "unit", "layer", "effect", title="")
    return Section(
        "Which parts write the difference?",
        findings=findings.written(chosen),
        text=texts.DIRECT_TEXT,
        pictures=[
            Picture(bars(chosen, 14), "The parts that write most of d", texts.DIRECT, data="direct.csv", wide=True),
            Picture(by_head, "Every head's direct part of d", texts.DIRECT_HEADS, data="direct.csv", wide=True),
            *(
                Picture(lens_lines(lens), f"The logit lens, norms {name}", texts.LENS[name], data=f"lens-{name}.csv")
                for name, lens in lenses.items()
            ),
        ],
        tables=list(_labels(job, heads)),
        meta=chosen.meta,
        data={"direct.csv": chosen.table(), **{f"lens-{name}.csv": lens.table() for name, lens in lenses.items()}},
    )


def heads_section(job: Study) -> Section:
    """Which heads move the score when their output comes from the other text, through everything behind them."""
    section = section_of("heads", job.chosen(job.patched("heads", job.encoder.sites("head"))))
    title, pictures = "Which heads move it?", list(_renamed(section, "Heads patched"))
    return replace(section, title=title, text=texts.HEADS_TEXT, pictures=pictures, pairs=None)


def confounds_section(job: Study) -> Section:
    """What in the data goes along with the score."""
    found = job.data
    tables = {
        "correlations": found.correlations(), "regression": found.regression(), "sizes": found.by_size(),
        "accuracy": found.accuracy().drop(columns="tied"),
    }  # fmt: skip
    job.keep.save("confounds", found.frame)
    for name, table in tables.items():
        job.keep.save(f"confounds-{name}", table)
    along, model = tables["correlations"], tables["regression"]
    of = {"pairs": "of", "n": "pairs"}
    return Section(
        "What in the data goes along with the score?",
        findings=findings.confounded(along, model),
        pictures=[*_confound_pictures(along, found), *_size_picture(tables["sizes"])],
        tables=[
            Table(model.rename(columns=of), "Regression of d on all features", texts.REGRESSION, rows=40),
            Table(along.rename(columns=of), "Correlations with d", texts.CORRELATION, rows=16),
            Table(tables["accuracy"].rename(columns=of), "Accuracy with and without the most frequent caption", rows=8),
        ],
        notes=[f"{name}: {why}." for name, why in found.missing.items()],
    )


def probe_section(job: Study) -> Section:
    """Whether the direction of negation is readable, and whether it is used."""
    title = "Is the direction of negation there, and is it used?"
    meta = job.meta("probe", seed=str(job.seed))
    try:
        table = job.keep.frame("probe", meta, lambda: probe(job.encoder, job.batch, seed=job.seed))
    except TooFewTexts as error:  # all else in the report holds without a probe
        return Section(title, findings=[f"Not computed: {error}."])
    read = _lines(table, READABLE)
    pictures = [Picture(read, "Can the negation be read at the end of text?", texts.READ, numbers=table)]
    for side in ("caption", "foil"):
        if table.get(f"added_{side}", Series(np.nan)).notna().any():
            asked = f"Is the direction used? {SIDE_NAMES[side].capitalize()}"
            pictures.append(Picture(_lines(table, _used_on(side)), asked, texts.USED, numbers=table))
    return Section(
        title,
        findings=findings.read_and_used(table),
        pictures=pictures,
        tables=[Table(table, "Probe and causal test by layer", "The rows of `clip_lens.probe`.")],
        notes=sorted({f"Layer {row.layer}: {row.note}." for row in table.itertuples() if row.note}),
    )


SECTIONS: dict[str, Callable[[Study], Section]] = {
    "Accuracy": scores_section,
    "Where": where_section,
    "Heads that look": selectivity_section,
    "Parts that write": direct_section,
    "Heads that move": heads_section,
    "Confounds": confounds_section,
    "Read and used": probe_section,
}
"""The study's sections in their order; one more function here is one more section."""


def _histogram(pairs: DataFrame) -> go.Figure:
    edges = np.histogram_bin_edges(pairs["d"], bins=min(30, max(5, len(pairs) // 6)))
    middles, figure = (edges[1:] + edges[:-1]) / 2, go.Figure()
    for side in (side for side in SIDES if side in set(pairs["side"])):
        counts, _ = np.histogram(pairs.loc[pairs["side"] == side, "d"], edges)
        figure.add_bar(x=middles, y=counts, name=SIDE_NAMES[side])
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(template=template(), barmode="group", bargap=0.15, height=340, legend=legend, showlegend=True)
    figure.update_xaxes(title_text="d, logits")
    figure.update_yaxes(title_text="pairs")
    return figure


def _renamed(section: Section, what: str) -> Iterable[Picture]:
    for picture in section.pictures:
        yield replace(picture, title=f"{what}: {picture.title[:1].lower()}{picture.title[1:]}")


def _localisation(job: Study, single: Effects) -> DataFrame:
    """The localisation of every segment that has pairs, and of all pairs together."""
    tables = []
    for segment in (*(name for name in SEGMENTS if name in set(single.pairs["segment"])), "all"):
        part = single if segment == "all" else single.where(segment=segment)
        counts, mean = part.pairs["side"].value_counts(), part.pairs.groupby("side")["d"].mean()
        table = part.by_slot(job.batch).localisation()
        sizes = {"pairs": table["side"].map(counts).astype(int), "mean d": table["side"].map(mean)}
        tables.append(table.assign(segment=segment, **sizes))
    columns = ["segment", "side", "pairs", "mean d", "layer", "localisation", "slots"]
    return pd.concat(tables, ignore_index=True)[columns]


def _localisation_picture(spread: DataFrame) -> Iterable[Picture]:
    names = spread["segment"] + ", " + spread["side"].map(SIDE_NAMES) + " (" + spread["pairs"].astype(str) + ")"
    lines = spread.assign(what=names, layer=spread["layer"].astype(int))
    tellable = (lines["pairs"] >= FEW) & (lines["mean d"].abs() >= SHARED)
    lines = lines[tellable & (lines["segment"] != "all")].dropna(subset="localisation")
    if len(lines):
        figure = curve(lines, "layer", "localisation", by="what")
        figure.update_xaxes(title_text="layer (0: embedding, l: after l blocks)")
        yield Picture(figure, "How localised the effect is, by segment", texts.LOCALISATION, numbers=spread, wide=True)


def _by_layer(spread: DataFrame) -> DataFrame:
    order = {name: number for number, name in enumerate((*SEGMENTS, "all"))}
    table = spread.pivot(
        index=["segment", "side", "pairs", "mean d"], columns="layer", values="localisation"
    ).reset_index()
    table.columns = table.columns.map(str)
    return table.sort_values("segment", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def _occurs(slot: str, batch: Batch) -> bool:
    return bool((batch.slot == batch.slots.index(slot)).any())


def _correlated(along: DataFrame) -> Iterable[Picture]:
    for side in (side for side in SIDES if side in set(along["side"])):
        grid = along[along["side"] == side].pivot(index="unit", columns="layer", values="r")
        figure = heatmap(grid.rename_axis(index="head", columns="block"), value="r", title="", limit=1.0)
        title = f"Selectivity and the score: {SIDE_NAMES[side]}"
        yield Picture(figure, title, texts.CORRELATED, data="correlations.csv")


def _lens(job: Study, norms: str) -> Effects:
    compute = lambda: logit_lens(job.encoder, job.batch, norms=norms)  # type: ignore[arg-type]
    return job.once(f"lens-{norms}", "logit lens", job.encoder.sites("resid"), compute)


def _labels(job: Study, heads: Effects) -> Iterable[Table]:
    """The images and texts that the heads of the largest direct effects point to and from."""
    if job.images is None:
        return
    sizes = heads.fraction().assign(size=lambda table: table["effect"].abs()).groupby("place")["size"].max()
    names = set(sizes.nlargest(LABELLED).index)
    places = [place for place in heads.places if isinstance(place, Site) and str(place) in names]
    bank = list(dict.fromkeys([*job.batch.pairs.caption, *job.batch.pairs.foil]))
    found = labels(job.encoder, places, images=job.images, texts=bank, batch=job.batch, n=3, any_store=True)
    job.keep.save("labels", found)
    shown = found.drop(columns=["layer", "unit", "of"])
    yield Table(shown, "What the strongest heads point to and from", texts.LABELS, rows=12 * LABELLED)


def _confound_pictures(along: DataFrame, found: Confounds) -> Iterable[Picture]:
    for pairs in (ALL, WITHOUT):
        part = along[(along["pairs"] == pairs) & (along["side"] != "pooled")].dropna(subset="r")
        if len(part):
            figure = bars(part, value="r", name="feature")
            figure.update_xaxes(range=[-1, 1])
            words = pairs if pairs == ALL or not found.most_frequent else f'without "{found.most_frequent}"'
            title = f"Correlation with d, {'all pairs' if pairs == ALL else words}"
            yield Picture(figure, title, texts.CORRELATION, numbers=part)


def _size_picture(sizes: DataFrame) -> Iterable[Picture]:
    shown = sizes[(sizes["pairs"] == ALL) & (sizes["side"] != "overall") & (sizes["n"] > 0)]
    if len(shown):
        figure = curve(shown, "threshold", "accuracy", lower="lower", upper="upper", by="side")
        figure.update_xaxes(title_text="smallest subject, share of the image")
        yield Picture(figure, "Accuracy by the size of the subject", texts.BY_SIZE, numbers=sizes)


READABLE = {
    "accuracy": "negated or not, held-out pairs",
    "shuffled": "the same, words shuffled",
    "noun": "which of two nouns is negated",
    "control": "random labels per subject",
}


def _used_on(side: str) -> dict[str, str]:
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


def _summary(sections: Mapping[str, Section]) -> str:
    """The questions of the study, each with its first answer."""
    asked = {"Where": 0, "Heads that look": 0, "Confounds": -1, "Read and used": -1}
    questions = ("Where?", "Which heads?", "What confounds the score?", "Is what can be read used?")
    answers = [sections[name].findings[which] for name, which in asked.items()]
    return " ".join(f"{question} {answer}" for question, answer in zip(questions, answers, strict=True))


def _this_run(job: Study) -> str:
    said, batch = job.meta("study"), job.batch
    listed = "; ".join(f"{row.key}: {row.reason}" for row in batch.dropped.head(40).itertuples()) or "none"
    more = f" and {len(batch.dropped) - 40} more" if len(batch.dropped) > 40 else ""
    return (
        f"{'; '.join(f'{name}: {said[name]}' for name in IDENTITY)}. {len(batch)} pairs were run and "
        f"{len(batch.dropped)} dropped ({listed}{more}). Runs that fit no template of slots: {batch.untemplated}. "
        f"Positions without a counterpart: {int(batch.unaligned.sum())}. Traced segment: {job.segment}. Seeds: "
        f"bootstrap 0, probe {job.seed}."
    )
