"""Edges into heads: what each head reads through its queries, keys and values, as heat maps on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.grid import one_side
from clip_lens.model.site import Edge
from clip_lens.show.figures.figure import Figure
from clip_lens.show.figures.heatmap import Panel, assemble, laid_out
from clip_lens.show.figures.network import READS, single_edges
from clip_lens.show.figures.words import side_name
from clip_lens.words import some

HEAD = "receiving head"


def qkv(effects: Effects, value: str = "effect", side: str | None = None, **how: Any) -> Figure:
    """A plotly figure of edges into heads: senders by receiving heads, a panel each for q, k and v, on one scale.

    Both axes run in the order of the tower; grey cells are no path. Edges into MLPs and the output are left out. `how`
    goes to `Effects.table`.

    Raises:
        ValueError: a place is not a single edge, no edge ends in a head, several edges (at several slots) fall in one
            cell, or as `Effects.grid`.

    Example:
        >>> from dataclasses import replace
        >>> from clip_lens import Site
        >>> from clip_lens.core.effects import toy_effects
        >>> edges = tuple(Edge(Site("embed"), Site(kind, 0, head)) for kind in "qk" for head in (0, 1))
        >>> figure = qkv(replace(toy_effects(), places=edges), side="foil")
        >>> [(panel.name, panel.z.tolist()) for panel in figure.data if panel.name != "no path"]
        [('queries; negation in the foil', [[2.5, 0.0]]), ('keys; negation in the foil', [[0.75, 1.75]])]
    """
    edges = single_edges(effects)
    heads = {
        edge: f"{edge.receiver.layer}.{'all' if edge.receiver.unit is None else edge.receiver.unit}" for edge in edges
    }
    read = [edge for edge in edges if edge.receiver.kind in READS]
    if not read:
        raise ValueError(
            f"no edge ends in the q, k or v of a head, only in {some(sorted({e.receiver.kind for e in edges}))}"
        )
    table = effects.table(**how)
    rows = pd.Series([heads[edge] for edge in edges])
    kinds = pd.Series([edge.receiver.kind for edge in edges])
    order = {**effects.ends(), HEAD: _in_order(heads[edge] for edge in sorted(read, key=_receiver))}
    panels, sides = [], list(dict.fromkeys(table["side"])) if side is None else [side]
    for name in sides:
        part = one_side(table, name).assign(**{HEAD: rows.to_numpy()})
        panels += _receiving(part, kinds.to_numpy(), value, name, sides, effects, order)
    return assemble(panels, value, effects, title="")


def _receiving(
    part: DataFrame,
    kinds: Any,
    value: str,
    side: str,
    sides: Sequence[str],
    effects: Effects,
    order: dict[str, list[str]],
) -> list[Panel]:
    """A side's panels; those that lack a sender or a head have a grey line there, so that all are laid out alike."""
    everything = part[np.isin(kinds, list(READS))]
    there = set(everything["sender"])
    axes = {"sender": [name for name in order["sender"] if name in there], HEAD: order[HEAD]}
    panels = []
    for kind in (kind for kind in READS if kind in kinds):
        name = "; ".join(filter(None, (READS[kind], side_name(side, sides))))
        panels.append(laid_out(name, part[kinds == kind], "sender", HEAD, value, effects, order).on(axes))
    return panels


def _receiver(edge: Edge) -> tuple[int, int]:
    return edge.receiver.layer, -1 if edge.receiver.unit is None else edge.receiver.unit


def _in_order(entries: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(entries))
