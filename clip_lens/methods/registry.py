"""Every method, once: the words that reports, file names, the command line and kept results have for it.

A method of your own is one entry more: `MINE = register(Method("mine", "my method", ...))`, and a `Record` of it on the
`Effects` that it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from clip_lens.core.record import Method

_METHODS: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
"""Every registered method by its key."""


def register(method: Method) -> Method:
    """The method itself, known by its key from now on; the same one may be registered again.

    Raises:
        ValueError: another method has that key.

    Example:
        >>> register(METHODS["patching"]).title
        'activation patching'
    """
    known = _METHODS.setdefault(method.key, method)
    if known != method:
        raise ValueError(f"a method {method.key!r} is registered already, {known.title!r}; choose another key")
    return method


ESTIMATED = (
    "Estimates",
    "Attribution patching does not patch: it multiplies the difference that a patch would make at its place by the "
    "gradient of the metric there. It is right where the metric is nearly linear, and most wrong where patches "
    "are large.",
)
EFFECTS = (
    "Effects",
    "One text of the pair is run. At a place, what it computes is replaced with what the source gives there, and "
    "everything that reads it is computed again. The effect is the change of the metric. Where the metric's sign turns "
    "with the side, it is turned so that it counts with d whichever text is run: only then can pairs be averaged.",
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
CIRCUITS = (
    "Circuits",
    "In a circuit's run every edge outside it carries the source's value. What it loses is the change of the metric "
    "that this makes; its faithfulness is 1 minus what it loses over what is lost where every edge carries the "
    "source's value.",
)

PATCHING = register(Method("patching", "activation patching", definition=EFFECTS))
DIRECTLY = "Each {mark} patches what a sender gives a receiver directly, from the {source}."
PATHS = register(Method("paths-direct", "path patching, direct", caption=DIRECTLY, definition=EFFECTS))
PATHS_THROUGH_MLPS = register(
    Method(
        "paths-mlp", "path patching through MLPs, attention frozen",
        caption="Each {mark} patches what a sender gives a receiver directly and through MLPs, from the {source}.",
        definition=EFFECTS,
    )
)  # fmt: skip
STEERING = {
    how: register(
        Method(
            f"steering-{how}", f"steering: {how} a direction",
            caption=f"Each {{mark}} {does} {{place}}.",
            definition=EFFECTS,
        )
    )
    for how, does in {"add": "adds a direction to", "remove": "removes a direction from"}.items()
}  # fmt: skip


def _estimate(key: str, title: str) -> Method:
    caption = f"Each {{mark}} estimates from a gradient ({title}) what comes of patching {{place}} from the {{source}}."
    return register(Method(key, title, "estimates", "mean estimated effect", "would move", caption, ESTIMATED))


ATTRIBUTION = _estimate("attribution", "attribution patching")
EAP = _estimate("eap", "EAP")
EAP_IG = _estimate("eap-ig", "EAP-IG")
EAP_IG_CERTAIN = _estimate("eap-ig-certain", "EAP-IG, certain signs")
EAP_IG_ENDS = _estimate("eap-ig-both-ends", "EAP-IG, from both ends")
EAP_IG_NODES = _estimate("eap-ig-nodes", "EAP-IG, nodes")
EAP_IG_LOSS = _estimate("eap-ig-loss", "EAP-IG of the loss")
BOTH = _estimate("eap-and-attribution", "attribution patching and EAP")
RELP = _estimate("relp", "RelP")
EXACT_SOFTMAX = _estimate("qk", "attribution patching with exact softmax")
ATP_STAR = _estimate("atp-star", "AtP*")

DIRECT = register(
    Method(
        "direct", "direct logit attribution", "reads", "mean contribution", "is written",
        "Nothing is patched: each {mark} is what one part of the tower writes into the logit at the position that is "
        "pooled, with the norms frozen, {texts}.", WRITTEN, share="share of the total",
    )
)  # fmt: skip
LENS = register(
    Method(
        "lens", "logit lens", "reads", "mean reading", "is read",
        "Nothing is patched: each {mark} is the logit as it would be read from the residual stream at that layer, at "
        "the position that is pooled, {texts} ({norms}).", WRITTEN, share="share of the total",
    )
)  # fmt: skip
SELECTIVITY = register(
    Method(
        "selectivity", "attention selectivity", "reads", "mean difference", "is paid",
        "Nothing is patched: each {mark} is the attention that a head pays to {slot}, at the later position where that "
        "is largest, in the text with the negation minus in the text without.", ATTENDED, "attention weight",
        "mean extra attention weight",
    )
)  # fmt: skip
ATTENTION = register(
    Method(
        "attention", "attention", "reads", "mean weight", "is paid",
        "Nothing is patched: each {mark} is the attention that a head pays to {slot}, at the later position where that "
        "is largest, in the text with the negation.", ATTENDED, "attention weight", "mean attention weight",
    )
)  # fmt: skip
MATCHED = register(
    Method(
        "attention-attribution", "attention attribution", "reads", "mean contribution", "is written",
        "Nothing is patched: each {mark} is what the query reads of one part of the stream times what the key reads of "
        "another, with the LayerNorm frozen.",
        (
            "Attention attribution",
            "With its LayerNorm frozen a head's attention score, before the softmax, is a sum over pairs of parts: "
            "what the query reads of one, times what the key reads of another, over the root of the head's width. Rows "
            "are "
            "the query's side, columns the key's; all cells together are the score.",
        ),
        share="share of the score",
    )
)  # fmt: skip
FAITHFULNESS = register(
    Method(
        "faithfulness", "faithfulness of circuits", "judges", share="share that is lost",
        caption="Each {mark} replaces every edge outside a circuit with what the {source} gives there.",
        definition=CIRCUITS,
    )
)  # fmt: skip
ACDC = register(Method("acdc", "ACDC", "judges", definition=CIRCUITS))
LEARNED = register(Method("learned", "learned gates", "judges", definition=CIRCUITS))
RANDOM = register(Method("random", "random circuits", "judges", definition=CIRCUITS))
EXACT = register(Method("exact", "exact edge scores", caption=DIRECTLY, definition=EFFECTS))
PROBE = register(Method("probe", "linear probes", "reads", "accuracy", "is read", unit="share"))
STUDY = register(Method("study", "negation study", "reads"))
"""The tables that the study makes of its results."""
