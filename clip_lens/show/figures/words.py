"""How figures name what they show: slots, sides, the columns of a result's table, and its numbers on hovering."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

import numpy as np
import pandas as pd
from pandas import DataFrame

from clip_lens.core.effects import SHOWN, Effects
from clip_lens.core.record import Record
from clip_lens.model.site import Edge, Place, Site, label
from clip_lens.words import counted, interval

SLOT_NAMES = {
    "sot": "start of text",
    "be": "is / are",
    "subject_rest": "subject, rest",
    "stop": "full stop",
    "eot": "end of text",
    "before": "before the change",
    "changed": "what changes",
    "between": "between the changes",
    "after": "after the change",
}
SIDE_NAMES = {
    "caption": "negation in the caption",
    "foil": "negation in the foil",
    "none": "pairs without a side",
    "pooled": "all sides pooled",
}
COLUMN_NAMES = {"n": "pairs", "jaccard": "Jaccard overlap", "r2": "R\N{SUPERSCRIPT TWO}"}
"""Columns of tables whose names are no words."""
SITE_NAMES = {
    "embed": "the embedding", "token": "the token embedding", "position": "the position embedding", "out": "the output",
    "constant": "the constant", "resid": "the stream at layer {where}", "mid": "the stream inside block {where}",
    "attn": "the attention of block {where}", "attn_bias": "the attention bias of block {where}", "mlp": "MLP {where}",
    "mlp_bias": "the bias of MLP {where}", "q": "queries of head {where}", "k": "keys of head {where}",
    "v": "values of head {where}", "pattern": "the pattern of head {where}",
}  # fmt: skip
"""What a place of each kind is called; others by their kind."""
SHARES = ("fraction", "lower", "upper")
BOUNDS = {"fraction": ("lower", "upper"), "effect": ("effect_lower", "effect_upper")}
"""The columns of a table that bound another one."""


def slot_name(slot: str | int | None) -> str:
    """A token slot as an axis or a sentence names it.

    Example:
        >>> slot_name("eot"), slot_name(3), slot_name(None)
        ('end of text', 'position 3', 'all tokens')
    """
    if slot is None or slot is pd.NA:
        return "all tokens"
    return SLOT_NAMES.get(slot, slot.replace("_", " ")) if isinstance(slot, str) else f"position {slot}"


def side_name(side: str, sides: Iterable[str]) -> str:
    """A side of some, as a figure or a sentence names it: nothing where pairs have no sides at all.

    Example:
        >>> side_name("none", ["foil", "none"]), side_name("none", ["none"])
        ('pairs without a side', '')
    """
    return "" if set(sides) <= {"none"} else SIDE_NAMES.get(side, side)


def place_name(place: Place) -> str:
    """A place as a sentence names it.

    Example:
        >>> from clip_lens.model.site import Edge, Site
        >>> place_name(Site("resid", 2, slot="eot")), place_name(Edge(Site("embed"), Site("v", 0, 1)))
        ('the stream at layer 2, end of text', 'embedding \N{RIGHTWARDS ARROW} values of head 0.1')
    """
    if isinstance(place, Edge):
        return f"{_end_name(place.sender)} \N{RIGHTWARDS ARROW} {_end_name(place.receiver)}"
    if isinstance(place, Site):
        return _site_name(place)
    return " + ".join(map(place_name, place)) if isinstance(place, tuple) else label(place)


def _site_name(site: Site) -> str:
    where = str(site.layer) if site.unit is None else f"{site.layer}.{site.unit}"
    name = SITE_NAMES.get(site.kind, "{kind} {where}").format(kind=site.kind, where=where)
    return name if site.slot is None else f"{name}, {slot_name(site.slot)}"


def _end_name(site: Site) -> str:
    """The end of an edge, in one word less."""
    return _site_name(site).removeprefix("the ")


def column_name(column: object) -> str:
    """A column of a table as a page or an axis names it: in words.

    Example:
        >>> column_name("effect_lower"), column_name("on_path"), column_name("mean_d"), column_name(3)
        ('effect, lower', 'on path', 'mean d', '3')
    """
    text = str(column)
    for bound in ("lower", "upper"):
        text = text.removesuffix(f"_{bound}") + (f", {bound}" if text.endswith(f"_{bound}") else "")
    return COLUMN_NAMES.get(text, text.replace("_", " "))


def record_of(drawn: Effects | DataFrame | None) -> Record:
    """What a result says of itself; a table says nothing.

    Example:
        >>> record_of(None).method.share
        'recovered fraction'
    """
    return drawn.record if isinstance(drawn, Effects) else Record()


def value_name(value: str, drawn: Effects | DataFrame | None = None) -> str:
    """A column of the table as an axis names it, in the words of the result's method; of a table, the column's name.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> value_name("effect", toy_effects()), value_name("fraction", toy_effects()), value_name("recall")
        ('mean signed effect (logits)', 'recovered fraction', 'recall')
    """
    record = record_of(drawn)
    share, noun = record.method.share, record.method.noun
    names = {
        "fraction": share, "lower": f"{share}, lower bound", "upper": f"{share}, upper bound",
        "effect": f"{noun} ({record.unit})" if isinstance(drawn, Effects) else noun,
        "effect_lower": f"{noun}, lower bound", "effect_upper": f"{noun}, upper bound",
        "n": "pairs", "dropped": "pairs dropped",
    }  # fmt: skip
    return names.get(value, escape(value))


def shown(drawn: Effects | DataFrame | None, value: str = "effect") -> tuple[str, ...]:
    """The columns of a table that a figure tells: without shares where these say nothing and none is drawn.

    Example:
        >>> from dataclasses import replace
        >>> from clip_lens.core.effects import toy_effects
        >>> toy = toy_effects()
        >>> shown(toy)[0], shown(replace(toy, record=replace(toy.record, source=None)))[0]
        ('fraction', 'effect')
    """
    told = record_of(drawn).shares or value in SHARES
    return SHOWN if told else tuple(name for name in SHOWN if name not in SHARES)


def hovers(table: DataFrame, drawn: Effects | DataFrame | None, value: str = "effect") -> list[str]:
    """What hovering tells of each row of a result's table: its numbers with their intervals, where there are some.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> hovers(toy_effects().table(), toy_effects())[0][:60]
        '<br>recovered fraction <b>1.000</b><br>mean signed effect <b'
    """
    record, columns = record_of(drawn), shown(drawn, value)
    names = {"fraction": record.method.share, "effect": record.method.noun}
    parts = [list(_told(table, name, words)) for name, words in names.items() if name in columns]
    counts = [
        f"<br>{counted(int(n), 'pair')}, {int(dropped)} dropped"
        for n, dropped in zip(table["n"], table["dropped"], strict=True)
    ]
    return ["".join(lines) for lines in zip(*parts, counts, strict=True)]


def _told(table: DataFrame, name: str, words: str) -> Iterator[str]:
    numbers = table[[name, *BOUNDS[name]]].to_numpy(dtype=float)
    return (f"<br>{words} {bold(*line)}" for line in numbers)


def bold(number: float, lower: float = np.nan, upper: float = np.nan) -> str:
    """A number as hovering tells it, with its interval where there is one.

    Example:
        >>> bold(0.5), bold(0.5, 0.25, 1)
        ('<b>0.500</b>', '<b>0.500</b> [0.250, 1.000]')
    """
    return f"<b>{number:.3f}</b> {interval(lower, upper, 3)}".rstrip()
