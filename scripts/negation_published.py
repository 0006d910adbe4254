"""What a model says of VALSE existence, cell by cell beside the published results on OpenAI's ViT-B/32.

`Published.read` reads the folder that `fetch_clip_localisation.py` writes, `compare` computes the same numbers with
the package's own verbs, `verdicts` says of each table whether it agrees. `reproduce_negation_study.py --against` calls
them. The study's conventions (Quantmeyer, Mosteiro, Gatt 2024) that are not the package's defaults are kept here:
causal tracing is the mean over pairs of the ratio of single pairs (`of="ratios"`), on the model's own correct segment,
several further subject tokens weighing by their number (`by_slot`); in attention by position a pair without further
subject tokens counts as 0. There the positions behind the negator are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Index, Series

from clip_lens.core.effects import segments
from clip_lens.data.batch import Batch, align
from clip_lens.data.images import ImageStore
from clip_lens.data.pairs import Pairs
from clip_lens.methods.attention import attention_effects
from clip_lens.methods.confounds import Confounds, confounds
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.scores import pair_scores
from clip_lens.methods.statistics import correlation, correlations
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.figures.words import SIDE_NAMES
from clip_lens.show.report.section import Picture, Section, Table

FIELDS = {
    "caption", "foil", "negation", "image_file", "positions", "logit_caption", "logit_foil", "score", "segment",
    "similarity_caption_foil", "subject_area",
}  # fmt: skip
TABLES = ("positions", "causal_tracing", "selectivity", "selectivity_correlation")
BY_POSITION = "attention_by_position_block_"
SIDES = ("caption", "foil")
SIZES = [round(0.01 * step, 2) for step in range(61)]
"""The thresholds of the study's curve: accuracy among the pairs with size > t."""
BEFORE = ("sot", "there", "be")
"""Positions before the negator: nothing differs there, in any causal tower."""
CLOSE = 100
"""How many times the tolerance is still called close."""
APART = "Ours less theirs in each cell. White: no difference; grey: no number of ours."
VERDICTS = (
    "For each table how many of its cells are within the tolerance, the largest difference and where it is, and the "
    "correlation of ours with theirs. Cells that hold in any tower, such as all of d at the last layer's end of text, "
    "are not counted. Selectivity does not depend on images: where it agrees and d does not, the images were embedded "
    "otherwise."
)


@dataclass(frozen=True)
class Published:
    """What the folder has: `pairs` under VALSE's keys, and `arrays` of means."""

    pairs: DataFrame
    arrays: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Published:
        """The results in `pairs.json` and `arrays.json` of a folder.

        Raises:
            ValueError: a file is not there, is no JSON, or lacks something.
        """
        items, arrays = (_json(folder / name) for name in ("pairs.json", "arrays.json"))
        pairs = DataFrame.from_dict(items, orient="index")
        lacking = [*sorted(FIELDS - set(pairs)), *(name for name in TABLES if name not in arrays)]
        if lacking:
            raise ValueError(f"{folder} lacks {', '.join(lacking)}; scripts/fetch_clip_localisation.py writes it whole")
        return cls(pairs, arrays)

    @property
    def heads_and_layers(self) -> tuple[int, ...]:
        return np.shape(self.arrays["selectivity"]["caption"])

    def count(self, **wanted: str) -> int:
        """How many pairs have these values: all of them without any."""
        return int((self.pairs[list(wanted)] == Series(wanted)).all(axis=1).sum())

    def sized(self, keys: Sequence[str]) -> Pairs:
        """Published pairs with the published sizes of their subjects."""
        chosen = self.pairs.loc[list(keys)]
        caption, foil, image = (chosen[name].tolist() for name in ("caption", "foil", "image_file"))
        info = DataFrame({"negation": chosen["negation"], "subject_size": chosen["subject_area"]})
        return Pairs(chosen.index.tolist(), caption, foil, image, info=info, name="published")

    def confounds(self, keys: Sequence[str]) -> Confounds:
        """What goes along with the published d, by the package's own functions."""
        chosen = self.pairs.loc[list(keys)]
        return Confounds.of(
            self.sized(keys),
            chosen["score"].tolist(),
            chosen["similarity_caption_foil"].tolist(),
            chosen["positions"].tolist(),
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"can't read {path}: {error}; scripts/fetch_clip_localisation.py writes it") from error


def compare(
    encoder: HookedTextEncoder,
    images: ImageStore,
    pairs: Pairs,
    published: Published,
    *,
    rows: int = 256,
    progress: bool = True,
) -> DataFrame:
    """Every number beside the published one: table, side, row, column, ours, theirs, difference, and more.

    `rows` and `columns` say what row and column are, in tables that are maps. `weights`: whether the table depends on
    the weights (the others are of the data and the tokenizer). `given`: whether the cell holds in any causal tower,
    such as all of d at the last layer's end of text. The difference of texts is 0 or infinite; NaN where there is no
    number of ours.

    Raises:
        ValueError: the tower has other heads or layers than the published one, or no pair is published.
    """
    shape = (encoder.n_heads, encoder.n_layers)
    if shape != published.heads_and_layers:
        heads, layers = published.heads_and_layers
        raise ValueError(
            f"the published results are of a tower of {layers} layers x {heads} heads; {encoder.full_name} has "
            f"{shape[1]} x {shape[0]}, and no cell to compare"
        )
    known = set(published.pairs.index)
    if not known & set(pairs.key):
        raise ValueError(f"no pair of {pairs.name} has a published key; give VALSE's existence.json")
    batch = align(pairs[[key in known for key in pairs.key]], images, encoder)
    tables = [*_data(batch, published), *_scores(encoder, batch, published)]
    tables += [*_tracing(encoder, batch, published, rows, progress), *_attention(encoder, batch, published)]
    cells = pd.concat(tables, ignore_index=True)
    ours, theirs = (pd.to_numeric(cells[name], errors="coerce") for name in ("ours", "theirs"))
    texts = cells["theirs"].map(lambda value: isinstance(value, str))
    equal = np.where(cells["ours"] == cells["theirs"], 0.0, np.inf)
    return cells.assign(difference=np.where(texts, equal, (ours - theirs).abs()))


def _cells(
    table: str,
    ours: DataFrame,
    theirs: DataFrame,
    pairs: tuple[int, int],
    *,
    side: str = "",
    axes: tuple[str, str] = ("", ""),
    weights: bool = True,
    given: Callable[[Any, Any], bool] = lambda row, column: False,
) -> DataFrame:
    """The published cells of one table, each with ours; `given` says which (row, column) hold in any causal tower.

    `pairs` are how many of ours and of theirs it is of; `axes` what rows and columns are, of a table that is a map.
    """
    own = ours.reindex(index=theirs.index, columns=theirs.columns)
    places = [(row, column) for row in theirs.index for column in theirs]
    values = {"ours": own.to_numpy(object).ravel(), "theirs": theirs.to_numpy(object).ravel()}
    found = DataFrame({"row": [row for row, _ in places], "column": [column for _, column in places]}, dtype=object)
    found = found.assign(**values, given=[given(*place) for place in places])
    known = {"table": table, "weights": weights, "side": side, "rows": axes[0], "columns": axes[1]}
    known |= {"pairs": pairs[0], "their_pairs": pairs[1]}
    for number, (name, value) in enumerate(known.items()):
        found.insert(number, name, value)
    return found[found["theirs"].notna()]


def _data(batch: Batch, published: Published) -> Iterator[DataFrame]:
    """The texts, sides and images of the pairs, as they were read and rephrased: without a model."""
    theirs = published.pairs.loc[list(batch.pairs.key), ["caption", "foil", "negation", "image_file"]]
    theirs.columns = Index(["caption", "foil", "side", "image"])
    ours, count = batch.pairs.to_frame().set_index("key"), (len(batch), published.count())
    yield _cells("texts, sides, images", ours, theirs, count, weights=False)


def _scores(encoder: HookedTextEncoder, batch: Batch, published: Published) -> Iterator[DataFrame]:
    """What the model says of every pair, and what goes along with it."""
    keys = list(batch.pairs.key)
    theirs = published.confounds(keys)
    ours = confounds(encoder, replace(batch, pairs=published.sized(keys)))
    found, known = (result.frame.set_index("key") for result in (ours, theirs))
    logits = pair_scores(encoder, batch)
    found = found.assign(logit_caption=logits.caption.numpy(), logit_foil=logits.foil.numpy())
    known = known.drop(columns="segment").join(published.pairs[["logit_caption", "logit_foil", "segment"]])
    count = len(batch), published.count()
    yield _cells("tokens", found, known[["tokens"]], count, weights=False)
    for name, title in SCORES.items():
        yield _cells(title, found, known[[name]], count)
    for title, view in VIEWS.items():
        yield _cells(title, view(ours), view(theirs), count)


def _accuracy(found: Confounds) -> DataFrame:
    table = found.accuracy()
    return table.set_index(table["side"] + ", " + table["pairs"])[["accuracy", "mean_d"]]


def _correlations(found: Confounds) -> DataFrame:
    table = found.correlations()
    return table.set_index(table["feature"] + ", " + table["side"] + ", " + table["pairs"])[["r"]]


def _curve(found: Confounds) -> DataFrame:
    table = found.by_size(SIZES)
    chosen = table[(table["side"] == "foil") & (table["pairs"] == "all")]
    return chosen.set_index("threshold")[["accuracy"]]


SCORES = {
    "logit_caption": "S(caption)", "logit_foil": "S(foil)", "d": "d", "cosine": "cosine of caption and foil",
    "segment": "segment",
}  # fmt: skip
VIEWS = {"accuracy": _accuracy, "correlations with d": _correlations, "accuracy by subject size": _curve}


def _tracing(
    encoder: HookedTextEncoder, batch: Batch, published: Published, rows: int, progress: bool
) -> Iterator[DataFrame]:
    """Causal tracing of each published side and segment, over the pairs that are in it by our own d."""
    last = encoder.n_layers
    given = lambda slot, layer: slot in BEFORE or layer in (0, last)
    found = segments(pair_scores(encoder, batch).d)
    for name, array in published.arrays["causal_tracing"].items():
        side, segment = name.split(", ")
        rows_of = [row for row, it in enumerate(zip(batch.pairs.side, found, strict=True)) if it == (side, segment)]
        count = len(rows_of), published.count(negation=side, segment=segment)
        theirs = DataFrame(array, index=published.arrays["positions"], columns=range(last + 1))
        ours = traced(encoder, batch[rows_of], rows, progress) if rows_of else DataFrame()
        yield _cells(f"causal tracing, {segment}", ours, theirs, count, side=side, axes=("slot", "layer"), given=given)


def traced(encoder: HookedTextEncoder, batch: Batch, rows: int = 256, progress: bool = False) -> DataFrame:
    """The paper's map of these pairs, of one side: slot x layer, the mean of d*/d over pairs and their tokens."""
    places = encoder.sites("resid", slots=range(int(batch.length.max())))
    effects = patch_effects(encoder, batch, places, rows=rows, progress=progress)
    return effects.by_slot(batch).grid("slot", "layer", of="ratios")


def _attention(encoder: HookedTextEncoder, batch: Batch, published: Published) -> Iterator[DataFrame]:
    """Selectivity of every head, its correlation with d, and of one block's heads which positions look."""
    whole = attention_effects(encoder, batch)
    along = correlations(whole)
    for side in SIDES:
        r = along[along["side"] == side].pivot(index="unit", columns="layer", values="r")
        ours = {"selectivity": whole.grid("unit", "layer", side=side), "selectivity_correlation": r}
        for name, title in {"selectivity": "selectivity", "selectivity_correlation": "selectivity and d"}.items():
            theirs = DataFrame(published.arrays[name][side])
            count = batch.pairs.side.count(side), published.count(negation=side)
            yield _cells(title, ours[name], theirs, count, side=side, axes=("head", "block"))
    for name in published.arrays:
        if name.startswith(BY_POSITION):
            yield from _by_position(encoder, batch, published, int(name.removeprefix(BY_POSITION)))


def _by_position(encoder: HookedTextEncoder, batch: Batch, published: Published, block: int) -> Iterator[DataFrame]:
    """The positions behind the negator: before it nothing looks back at it, and of itself selectivity says nothing."""
    positions = published.arrays["positions"]
    later = [slot for slot in positions[positions.index("negator") + 1 :] if batch.where(slot).any()]
    effects = attention_effects(encoder, batch, queries=later).where(layer=block)
    effects = replace(effects, values=effects.values.nan_to_num(0.0))
    for side in SIDES:
        theirs = DataFrame(published.arrays[f"{BY_POSITION}{block}"][side], columns=positions)
        ours = effects.grid("unit", "slot", side=side)
        title = f"attention by position, block {block}"
        count = batch.pairs.side.count(side), published.count(negation=side)
        yield _cells(title, ours, theirs[later], count, side=side, axes=("head", "slot"))


def verdicts(cells: DataFrame, tolerance: float = 1e-4) -> DataFrame:
    """A row per table and side: the pairs that it is of, ours and theirs, its cells, how many are within the tolerance
    and how many missing of ours, the largest difference and where it is, r of ours with theirs, and the verdict:
    "agrees", "close" (within 100 times the tolerance) or "differs".

    Cells that hold in any tower are left out of the counts; a table that differs in one of them differs.
    """
    groups = cells.groupby(["table", "side"], sort=False)
    return DataFrame([_verdict(table, side, part, tolerance) for (table, side), part in groups])


def _verdict(table: str, side: str, part: DataFrame, tolerance: float) -> dict[str, Any]:
    telling, difference = part[~part["given"]], part["difference"].fillna(np.inf)
    apart = difference[telling.index]
    worst = telling.loc[apart.idxmax()]
    texts = isinstance(worst["theirs"], str)
    r = nan if texts else correlation(telling["ours"], telling["theirs"]).r
    levels = {"agrees": tolerance, "close": CLOSE * tolerance}
    return {
        "table": table,
        "side": side,
        "weights": bool(part["weights"].all()),
        "pairs": int(part["pairs"].iloc[0]),
        "their_pairs": int(part["their_pairs"].iloc[0]),
        "cells": len(telling),
        "within": int((apart <= tolerance).sum()),
        "missing": int(telling["ours"].isna().sum()),
        "largest": nan if texts else telling["difference"].max(),
        "where": "" if apart.max() == 0 else f"{worst['row']}, {worst['column']}",
        "r": r,
        "verdict": next((word for word, level in levels.items() if (difference <= level).all()), "differs"),
    }


def summary(found: DataFrame, tolerance: float) -> list[str]:
    """What the verdicts come to, in sentences: of the data, and of what depends on the weights."""
    data, model = found[~found["weights"]], found[found["weights"]]
    compared = f"{data['pairs'].iloc[0]} of {data['their_pairs'].iloc[0]} published pairs"
    other = ", ".join(data.loc[data["verdict"] != "agrees", "table"])
    said = [f"{compared} are compared; {f'these differ in: {other}' if other else 'their texts and tokens are equal'}."]
    counts = model["verdict"].value_counts()
    agrees, close, n = int(counts.get("agrees", 0)), int(counts.get("close", 0)), len(model)
    if agrees == n:
        said.append(f"Everything agrees: all {n} tables that depend on the weights, to {tolerance:g} in every cell.")
    elif agrees + close:
        said.append(
            f"Of {n} tables that depend on the weights {agrees} agree to {tolerance:g} in every cell, {close} more are "
            f"close (to {CLOSE * tolerance:g}), {n - agrees - close} differ."
        )
    else:
        said.append(
            f"Nothing agrees: each of {n} tables that depend on the weights differs by more than "
            f"{CLOSE * tolerance:g} somewhere. This is not the published model with the published images."
        )
    return said


def markdown(found: DataFrame) -> str:
    """The verdicts as a table in Markdown."""
    lines = [found.columns.tolist(), ["---"] * len(found.columns)]
    lines += [[_plain(value) for value in row] for row in found.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def section(cells: DataFrame, found: DataFrame, said: Sequence[str]) -> Section:
    """The comparison as a part of a report: the verdicts, and a map of what is apart for each table of two axes."""
    pictures = []
    for (table, side), part in cells[cells["rows"] != ""].groupby(["table", "side"], sort=False):
        apart = (part["ours"].astype(float) - part["theirs"].astype(float)).rename("difference")
        grid = part.assign(difference=apart).pivot(index="row", columns="column", values="difference")
        grid = grid.reindex(index=part["row"].unique(), columns=part["column"].unique())
        grid = grid.rename_axis(index=part["rows"].iloc[0], columns=part["columns"].iloc[0])
        figure = heatmap(grid, value="difference", title="")
        pictures.append(Picture(figure, f"{table}: {SIDE_NAMES[side]}", APART, data="cells.csv"))
    table = Table(found.drop(columns="weights"), "What agrees", VERDICTS, {"r": ".4f"}, rows=len(found))
    return Section("What agrees with the published results?", said, "", pictures, [table], data={"cells.csv": cells})


def _plain(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3g}"
    return str(value)
