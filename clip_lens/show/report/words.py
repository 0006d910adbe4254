"""What a result's numbers mean, in words: each method of the package gives an `Effects`, and each reads otherwise."""

from __future__ import annotations

from collections.abc import Iterable

from clip_lens.core.effects import Effects
from clip_lens.show.figures.heatmap import VALUE_NAMES, slot_name

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
}
D = (
    "The logit difference d",
    "S(text, image) is the model's logit: its scale times the cosine of the text's and the image's embedding. For a "
    "pair d = S(caption, image) \N{MINUS SIGN} S(foil, image); the model is right where d > 0. By two thresholds on d, "
    "pairs are incorrect, ambiguous or correct.",
)
EFFECT = (
    "Effects",
    "One text of the pair is run. At a place, what it computes is replaced by what the source gives there, and "
    "everything that reads it is computed again. The effect is the change of the metric. Its sign is turned so that it "
    "counts with d whichever text is run: only then can pairs be averaged.",
)
SHARE = (
    "Recovered fractions",
    "Where the source is the other text of the pair, the recovered fraction is the sum of the effects over the sum of "
    "the differences between the two texts: 0 is nothing, 1 is all of it. It is a ratio of means, for each side of the "
    "negation by itself, because the sides have opposite signs; it can be below 0 or above 1.",
)
INTERVAL = (
    "Intervals",
    "All intervals are 95 % percentile bootstrap intervals: 1000 resamples of whole pairs, drawn with a fixed seed.",
)

WRITTEN = (
    "Direct contributions",
    "The logit is linear in what the parts of the tower write into the residual stream at the position that is pooled, "
    "once the standard deviation of the final LayerNorm and the norm of the embedding are frozen at the text's own. "
    "What each part writes is its direct contribution; together they are the logit exactly. What a part does by way of "
    "later parts counts for those.",
)
ATTENDED = (
    "Attention to a slot",
    "A head's attention weights to the tokens of the slot are added up, and the largest of the later positions counts. "
    "Selectivity is this in the text with the negation minus the same in the text without, at matched positions.",
)
ESTIMATED = (
    "Estimates",
    "Attribution patching does not patch: it multiplies the difference that a patch would make at its place by the "
    "gradient of the metric there. It is right where the metric is nearly linear, and most wrong where patches "
    "are large.",
)


def methods_of(results: Iterable[Effects]) -> list[tuple[str, str]]:
    """What a reader must know of these results' numbers: headings and texts.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> [heading for heading, _ in methods_of([toy_effects()])]
        ['The logit difference d', 'Effects', 'Recovered fractions', 'Intervals']
    """
    given = list(results)
    if not given:
        return []
    there = {
        EFFECT: any(is_patched(effects) for effects in given),
        SHARE: any(is_patched(effects) and is_share(effects) for effects in given),
        ESTIMATED: any(is_estimated(effects) for effects in given),
        WRITTEN: any(_method(effects) in ("direct", "logit") for effects in given),
        ATTENDED: any(_method(effects) == "attention" for effects in given),
    }
    return [D, *(method for method, shown in there.items() if shown), INTERVAL]


def _method(effects: Effects) -> str:
    """The first word of the method."""
    return (effects.meta.get("method", "").split() or [""])[0]


def is_patched(effects: Effects) -> bool:
    """Whether places were patched, or a gradient estimates what patching them would do; other methods only read.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> is_patched(toy_effects())
        True
    """
    return _method(effects) not in ("direct", "logit", "attention")


def is_estimated(effects: Effects) -> bool:
    """Whether a gradient estimates what patching would do.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> is_estimated(toy_effects())
        False
    """
    return "gradient" in effects.meta


def is_share(effects: Effects) -> bool:
    """Whether fractions mean something: with the counterpart everywhere, the run becomes the other text's.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> is_share(toy_effects())
        True
    """
    return effects.meta.get("source", "counterpart") == "counterpart"


def unit(effects: Effects) -> str:
    """The unit of a result's effects.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> unit(toy_effects())
        'logits'
    """
    metric = effects.meta.get("metric", "logit")
    return "logits" if metric.startswith("logit") else metric if metric == "attention weight" else "metric units"


def whole(effects: Effects) -> str:
    """What the fractions are shares of.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> whole(toy_effects())
        'd'
    """
    return "d" if is_share(effects) and unit(effects) == "logits" else "the total effect"


def noun(effects: Effects) -> str:
    """What a mean of the values is.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> noun(toy_effects())
        'mean signed effect'
    """
    names = {"direct": "mean contribution", "logit": "mean reading", "attention": "mean difference"}
    if effects.meta.get("method") == "attention":
        return "mean weight"
    return names.get(_method(effects), "mean estimated effect" if is_estimated(effects) else "mean signed effect")


def value_name(effects: Effects, value: str) -> str:
    """What a figure of a value shows.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> value_name(toy_effects(), "fraction")
        'recovered fraction'
    """
    if value == "effect":
        return f"{noun(effects)} ({unit(effects)})"
    return VALUE_NAMES[value] if is_patched(effects) else f"share of {whole(effects)}"


def verb(effects: Effects) -> str:
    """What a share of the whole does at a place.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> verb(toy_effects())
        'moves'
    """
    names = {"direct": "is written", "logit": "is read"}
    return names.get(_method(effects), "would move" if is_estimated(effects) else "moves")


def gap(effects: Effects) -> str:
    """What a cell without a value is.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> gap(toy_effects())
        'no pair has a counterpart there'
    """
    if set(effects.index["kind"]) == {"edge"}:
        return "no such path"
    return "no pair has a counterpart there" if is_patched(effects) else "no such place, or no pair has a value there"


def what_is_shown(effects: Effects) -> str:
    """What was done at each place, in a sentence.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> what_is_shown(toy_effects())[:53]
        'Each cell replaces the residual stream at one place ('
    """
    read = {"direct": _written, "logit": _read, "attention": _attended}.get(_method(effects))
    if read is not None:
        return read(effects)
    done = _patched(effects)
    if not is_estimated(effects):
        return f"Each cell {done}."
    return f"Each cell estimates from a gradient ({effects.meta.get('method', '')}) what comes of a patch that {done}."


def _patched(effects: Effects) -> str:
    source, kinds = effects.meta.get("source", "counterpart"), set(effects.index["kind"])
    if kinds == {"edge"}:
        through = " and through MLPs" if "MLP" in effects.meta.get("method", "") else ""
        return f"patches what a sender gives a receiver directly{through}, from the {source}"
    if kinds == {"circuit"}:
        return f"replaces every edge outside of a circuit by what the {source} gives there"
    names = [KIND_NAMES.get(kind, kind) for kind in dict.fromkeys(effects.index["kind"].dropna())]
    tokens = "single tokens, averaged over pairs and tokens" if "token" in effects.pairs else "a slot's tokens together"
    slots = f" ({tokens})" if effects.index["slot"].notna().any() else ""
    return (
        f"replaces {' and '.join(names) or 'several activations'} at one place{slots} by what the {source} gives there"
    )


def _texts(effects: Effects) -> str:
    return "in the other text minus in the run" if is_share(effects) else "in the run"


def _written(effects: Effects) -> str:
    return (
        "Nothing is patched: each cell is what one part of the tower writes into the logit at the position that is "
        f"pooled, with the norms frozen, {_texts(effects)}."
    )


def _read(effects: Effects) -> str:
    norms = effects.meta.get("norms", "")
    return (
        "Nothing is patched: each cell is the logit as it would be read from the residual stream at that layer, at the "
        f"position that is pooled, {_texts(effects)}{f' ({norms})' if norms else ''}."
    )


def _attended(effects: Effects) -> str:
    texts = "in the text with the negation"
    if effects.meta.get("method") != "attention":
        texts += " minus in the text without"
    slot = effects.meta.get("slot")
    paid = f"the attention that a head pays to {_quoted(slot)}, at the later position where that is largest"
    return f"Nothing is patched: each cell is {paid}, {texts}."


def _quoted(slot: str | None) -> str:
    return "a slot" if slot is None else f"position {slot}" if slot.isdigit() else f'"{slot_name(slot)}"'


def reading(effects: Effects) -> str:
    """What a cell's number is, and its colour.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> reading(toy_effects()).split(":")[0]
        'Its number is the share of d that this alone moves, a ratio of means over pairs'
    """
    if not is_share(effects):
        return f"Its number is the {noun(effects)} in {unit(effects)}: {_signs(effects)} 0, without colour, is nothing."
    alone = f"that this alone {verb(effects)}" if is_patched(effects) else f"that {verb(effects)} there"
    return (
        f"Its number is the share of {whole(effects)} {alone}, a ratio of means over pairs: "
        f"0, without colour, is nothing and 1 all of it; {_signs(effects)}"
    )


def _signs(effects: Effects) -> str:
    """What blue and red mean: an effect times sigma counts with d, whichever text is run."""
    if is_share(effects):
        return "blue counts the way the whole does, red the other way."
    if is_patched(effects) and unit(effects) == "logits":
        return "blue lowers the caption's lead over the foil by that much, red raises it."
    return "blue is positive, red negative."
