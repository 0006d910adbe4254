"""What a result's numbers mean, in words: what its record says of method, source and metric, filled into sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from clip_lens.core.effects import Effects
from clip_lens.methods.registry import EFFECTS
from clip_lens.show.figures.words import slot_name
from clip_lens.words import capital

KIND_NAMES = {
    "embed": "the embedding",
    "resid": "the residual stream",
    "mid": "the residual stream between attention and MLP",
    "attn": "the attention's output",
    "mlp": "the MLP's output",
    "head": "a head's output",
    "q": "the queries",
    "k": "the keys",
    "v": "the values",
    "pattern": "the attention pattern",
    "neuron": "a neuron's activation",
    "result": "what a head writes",
    "norm": "what the final LayerNorm gives",
    "projection": "the embedding",
}
D = (
    "The logit difference d",
    "S(text, image) is the model's logit: its scale times the cosine between the text's embedding and the image's. For "
    "a pair, d = S(caption, image) \N{MINUS SIGN} S(foil, image). Two thresholds on d divide the pairs into incorrect, "
    "ambiguous and correct ones.",
)
SHARE = (
    "Recovered fractions",
    "Where the source is the other text of the pair, or the same text in another tower, the recovered fraction is the "
    "sum of the effects divided by the sum of the differences between the two: 0 is nothing, 1 is everything, and "
    "values below 0 or above 1 occur. It is a ratio of means, taken for each side separately where pairs have sides, "
    "because the sides have opposite signs.",
)
INTERVAL = (
    "Intervals",
    "All intervals are 95 % percentile bootstrap intervals: 1000 resamples of whole pairs, drawn with a fixed seed. "
    "Below five pairs there is none.",
)


def methods_of(results: Iterable[Effects]) -> list[tuple[str, str]]:
    """What must be known of these results' numbers: headings and texts.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> [heading for heading, _ in methods_of([toy_effects()])]
        ['The logit difference d', 'Effects', 'Recovered fractions', 'Intervals']
    """
    records = [effects.record for effects in results]
    if not records:
        return []
    patching = [record for record in records if record.method.patches]
    own = [record.method.definition for record in records]
    shares = any(record.shares for record in patching)
    said = [D, *([EFFECTS] if patching else []), *([SHARE] if shares else []), *own, INTERVAL]
    return [(heading, text) for heading, text in dict.fromkeys(said) if heading]


def whole(effects: Effects) -> str:
    """What the fractions are shares of: d, where the totals are the pairs' own logit differences.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> whole(toy_effects())
        'd'
    """
    totals = (effects.total * effects.orientation).double().numpy()
    is_d = effects.record.shares and np.allclose(totals, effects.pairs["d"], rtol=1e-2, atol=1e-3)
    return "d" if is_d else "the total effect"


def gap(effects: Effects) -> str:
    """What a cell without a value is.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> gap(toy_effects())
        'no pair has a counterpart there'
    """
    if set(effects.index["kind"]) == {"edge"}:
        return "no such path"
    patches = effects.record.method.patches
    return "no pair has a counterpart there" if patches else "no such place, or no pair has a value there"


class _Fields(dict[str, Any]):
    """What a method's caption may name; what is not known stands as its name."""

    def __missing__(self, name: str) -> str:
        return name.replace("_", " ")


def what_is_shown(effects: Effects, mark: str = "cell") -> str:
    """What was done at each place, in the sentence of the result's method; `mark` stands for it in the figure.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> what_is_shown(toy_effects())[:53]
        'Each cell replaces the residual stream at one place ('
    """
    record = effects.record
    texts = "in the other text minus in the run" if record.shares else "in the run"
    source = "source" if record.source is None else record.source.name
    source = source if record.shares or record.source is None else f"source {source}"
    known = {"mark": mark, "place": _place(effects), "source": source, "texts": texts, "slot": _slot(record.settings)}
    return record.method.caption.format_map(_Fields({**record.settings, **known}))


def _place(effects: Effects) -> str:
    kinds = dict.fromkeys(effects.index["kind"].dropna())
    if set(kinds) == {"edge"}:
        return "what a sender gives a receiver directly"
    names = " and ".join(KIND_NAMES.get(kind, kind) for kind in kinds) or "several activations"
    tokens = "single tokens, averaged over pairs and tokens" if "token" in effects.pairs else "a slot's tokens together"
    return f"{names} at one place{f' ({tokens})' if effects.index['slot'].notna().any() else ''}"


def _slot(settings: Mapping[str, Any]) -> str:
    slot = settings.get("slot")
    return "a slot" if slot is None else slot_name(slot) if isinstance(slot, int) else f'"{slot_name(slot)}"'


def reading(effects: Effects, mark: str = "cell") -> str:
    """What a mark's number is, and its colour.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> reading(toy_effects()).split(":")[0], reading(toy_effects(), "bar")[:23]
        ('The number is the share of d that this alone moves, a ratio of means over pairs', 'The length is the share')
    """
    record, method = effects.record, effects.record.method
    size, nothing = ("number", "0, without colour,") if mark == "cell" else ("length", "0")
    if not record.shares:
        return f"The {size} is the {method.noun} in {record.unit}; {nothing} is no effect. {capital(_signs(effects))}"
    alone = f"that this alone {method.verb}" if method.patches else f"that {method.verb} there"
    return (
        f"The {size} is the share of {whole(effects)} {alone}, a ratio of means over pairs: {nothing} is none of it, "
        f"1 is all of it. {capital(_signs(effects))}"
    )


def _signs(effects: Effects) -> str:
    """What blue and red mean: an effect times sigma counts with d, whichever text is run."""
    record = effects.record
    if record.shares and record.method.patches:
        return "blue moves the score towards that of the other text, red away from it."
    if record.shares:
        return "blue has the sign of the whole, red the opposite one."
    if record.method.patches and record.metric.oriented:
        return "blue lowers the caption's lead over the foil by that much, red raises it."
    return "blue is positive, red is negative."
