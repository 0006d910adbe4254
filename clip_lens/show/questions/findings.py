"""The negation study's tables in sentences: what a reader learns before looking at any figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from clip_lens.core.effects import Effects
from clip_lens.core.table import SIDES
from clip_lens.data.batch import Batch
from clip_lens.methods.confounds import ALL
from clip_lens.model.encoder import HookedTextEncoder, unseen_words
from clip_lens.show.figures.heatmap import SIDE_NAMES

FEW = 20
"""Pairs below which a bootstrap over them is not to be trusted."""
SELECTIVE = 0.6
"""A head counts as selective when its mean selectivity is at least this."""


def accuracy(table: DataFrame) -> list[str]:
    """How often the caption beats the foil, from the rows of `scores`.

    Example:
        >>> accuracy(DataFrame({"side": ["overall"], "accuracy": [0.5], "lower": [0.1], "upper": [0.9], "n": [4]}))
        ['The caption beats the foil in 50.0 % of all 4 pairs (95 % interval 10.0 to 90.0 %).']
    """
    rows = {row.side: row for row in table.itertuples()}
    whole = rows.pop("overall")
    first = (
        f"The caption beats the foil in {_percent(whole.accuracy)} of all {whole.n} pairs (95 % interval "
        f"{100 * whole.lower:.1f} to {_percent(whole.upper)})"
    )
    names = {**SIDE_NAMES, "none": "no side"}
    parts = [f"{_percent(row.accuracy)} of {row.n} with {names[side]}" for side, row in rows.items()]
    return [f"{first}: {', '.join(parts)}." if len(parts) > 1 else f"{first}."]


def localised(spread: DataFrame) -> list[str]:
    """Where a side's effect is spread most evenly, from the rows of `Effects.localisation`.

    Example:
        >>> spread = DataFrame({"side": "foil", "layer": [0, 1, 2], "localisation": [0.4, 0.1, 0.4]})
        >>> localised(spread)[0][:58]
        'Negation in the foil: the effect is spread most evenly ove'
    """
    said = []
    for side, part in spread.groupby("side", sort=False):
        inner = part[(part["layer"] > 0) & (part["layer"] < part["layer"].max())].dropna(subset="localisation")
        if len(inner):
            least = inner.loc[inner["localisation"].idxmin()]
            said.append(
                f"{SIDE_NAMES[str(side)].capitalize()}: the effect is spread most evenly over the slots behind block "
                f"{least['layer'] - 1} (localisation {least['localisation']:.2f}; at the embedding "
                f"{part['localisation'].iloc[0]:.2f})."
            )
    return said


def selective(table: DataFrame, best: int, mean: float) -> list[str]:
    """How many heads are selective, and which most, from the pooled table of `attention_effects`."""
    chosen = table[table["fraction"] >= SELECTIVE]
    blocks = ", ".join(map(str, sorted({int(layer) for layer in chosen["layer"]})))
    top = table.loc[table["fraction"].idxmax()]
    return [
        f"{len(chosen)} of {len(table)} heads have a selectivity of {SELECTIVE} or more"
        f"{f' (blocks {blocks})' if blocks else ''}; the largest is head {_head(top['place'])} with "
        f"{top['fraction']:.2f} [{top['lower']:.2f}, {top['upper']:.2f}].",
        f"Block {best} is the most selective in the mean over its heads ({mean:.2f}).",
    ]


def along(table: DataFrame) -> list[str]:
    """Which head's selectivity goes along with d, from the rows of `correlations`."""
    known = table.dropna(subset="r")
    if known.empty:
        return ["No head's selectivity can be correlated with d."]
    top = known.loc[known["r"].abs().idxmax()]
    return [
        f"The strongest correlation of a head's selectivity with d is that of head {_head(top['place'])}, {_r(top)} "
        f"({SIDE_NAMES[top['side']]}). The intervals of {int(_clear(known).sum())} of {len(known)} correlations "
        f"exclude 0; about {0.05 * len(known):.0f} would by chance."
    ]


def written(effects: Effects) -> list[str]:
    """The parts that write most of d, per side, from a result of `direct_effects`."""
    said = []
    for side in (side for side in SIDES if side in set(effects.pairs["side"])):
        part = effects.where(side=side)
        table = part.fraction()
        largest = table.loc[table["effect"].abs().nlargest(3).index]
        parts = ", ".join(f"{row.place} ({row.effect:+.2f})" for row in largest.itertuples())
        mean = float((part.total.double().numpy() * part.pairs["sigma"].to_numpy()).mean())
        said.append(f"{SIDE_NAMES[side].capitalize()}: of a mean d of {mean:.2f} logits the largest parts are {parts}.")
    return said


def confounded(correlations: DataFrame, regression: DataFrame) -> list[str]:
    """Which features go along with d, per side and all at once, from the tables of `Confounds`."""
    said = []
    known = correlations[correlations["pairs"] == ALL].dropna(subset="r")
    for side in (side for side in SIDES if side in set(correlations["side"])):
        part = known[(known["side"] == side) & _clear(known)].sort_values("r", key=lambda r: -r.abs())
        names = ", ".join(f"{row['feature']} ({_r(row)})" for _, row in part.iterrows())
        words = f"d goes along with {names}" if names else "no feature's correlation with d excludes 0"
        said.append(f"{SIDE_NAMES[side].capitalize()}: {words}.")
    terms = regression[(regression["pairs"] == ALL) & (regression["term"] != "intercept")]
    names = ", ".join(f"{row.term} ({row.coefficient:+.2f})" for row in terms[_clear(terms)].itertuples())
    fit = f"the 95 % intervals of these exclude 0: {names}" if names else "no term's 95 % interval excludes 0"
    return [*said, f"With all features in one regression, {fit}."]


def read_and_used(table: DataFrame) -> list[str]:
    """From which layer on negation can be read, and whether what is read is used, from the rows of `probe`."""
    return [_read(table), _used(table)]


def cautions(encoder: HookedTextEncoder, batch: Batch) -> list[str]:
    """What a reader must know before any number: a random tower, made-up image embeddings, a model organism,
    words it never saw.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder)
        >>> [caution[:28] for caution in cautions(encoder, batch)]
        ['The embedded model is a mode', 'Only 4 pairs: intervals over']
    """
    said = []
    if encoder.pretrained == "random":
        said.append(
            f"The weights of {encoder.name} are RANDOM: this tower was never trained. The numbers below show that the "
            "analysis runs; none of them says anything about CLIP."
        )
    if batch.images.endswith("an unknown model)"):
        said.append(
            f"Nobody said which model made the image embeddings ({batch.images}): they may be made up, or belong to "
            "another joint space."
        )
    if encoder.name == "tiny":
        said.append(
            "The embedded model is a model organism, trained on rendered scenes. What is found here is a fact about "
            "this model and no evidence about OpenAI's CLIP or any other one."
        )
    if len(batch) < FEW:
        said.append(f"Only {len(batch)} pairs: intervals over so few pairs are too narrow to be trusted.")
    if unseen := int((unseen_words(encoder, batch.tokens) | unseen_words(encoder, batch.other)).sum()):
        said.append(
            f"{unseen} of {len(batch)} pairs have words that {encoder.name} never saw in training: what it says of "
            "them means nothing."
        )
    return said


def _read(table: DataFrame) -> str:
    chance = np.fmax(table["control"], 0.5)
    above = table[table["accuracy_lower"] > chance]
    best = table.loc[table["accuracy"].idxmax()]
    if above.empty and not (table["accuracy_lower"] > 0.5).any():
        return "At no layer does a linear probe tell negated texts from the others at the end of text."
    if above.empty:
        return (
            f"A linear probe tells negated texts from the others at the end of text in at most "
            f"{100 * best['accuracy']:.0f} % (at layer {best['layer']:.0f}; chance is 50 %), but at no layer clearly "
            f"more often than labels drawn at random for each subject ({100 * best['control']:.0f} % there): with "
            "these pairs its success says little."
        )
    first = above.iloc[0]
    said = (
        f"A linear probe reads at the end of text whether the text is negated from layer {first['layer']:.0f} on "
        f"({100 * first['accuracy']:.0f} %; at most {100 * best['accuracy']:.0f} %, at layer {best['layer']:.0f}; "
        "chance is 50 %)"
    )
    nouns = table.dropna(subset="noun")
    if nouns.empty:
        return f"{said}."
    last = nouns.iloc[-1]
    return f"{said}; which of two nouns is negated it reads in {100 * last['noun']:.0f} % at the last layer."


def _used(table: DataFrame) -> str:
    sides = [name for name in ("caption", "foil") if table.get(f"removed_{name}", Series(np.nan)).notna().any()]
    used = [f"{row['layer']:.0f}" for _, row in table.iterrows() if all(_clears(row, name) for name in sides)]
    if used and sides:
        return (
            "Removing the direction of the class means takes more of d away than random directions do, on every "
            f"side, at layers {', '.join(used)}: there it is used."
        )
    last = table.iloc[-1]
    shares = ", ".join(f"{last[f'removed_{name}']:+.2f} of d with {SIDE_NAMES[name]}" for name in sides)
    return (
        "At no layer does removing the direction of the class means take away more of d than random directions do "
        f"on every side (at the last layer {shares}): what a probe reads there is not, by itself, what the score is "
        "made of."
    )


def _clears(row: Series, side: str) -> bool:
    """Whether a share's interval lies above what random directions reach."""
    return bool(row[f"removed_{side}_lower"] > row[f"removed_{side}_random"])


def _clear(table: DataFrame) -> pd.Series:
    return (table["lower"] > 0) | (table["upper"] < 0)


def _r(row: Series) -> str:
    return f"r = {row['r']:+.2f} [{row['lower']:+.2f}, {row['upper']:+.2f}]"


def _head(place: str) -> str:
    return place.removeprefix("pattern ")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
