"""Pictures of edges: what heads read through q, k and v; the strongest paths are in `network`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame

from clip_lens.core.effects import SHOWN, Effects, one_side, pivot
from clip_lens.model.site import Edge
from clip_lens.show.figures.heatmap import SIDE_NAMES, Panel, assemble
from clip_lens.show.figures.network import READS, path_diagram, single_edges

__all__ = ["path_diagram", "qkv"]


def qkv(effects: Effects, value: str = "effect", side: str | None = None, **how: Any) -> go.Figure:
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
        raise ValueError(f"no edge ends in the q, k or v of a head, only in {_some(e.receiver.kind for e in edges)}")
    table = effects.table(**how)
    rows = pd.Series([heads[edge] for edge in edges])
    kinds = pd.Series([edge.receiver.kind for edge in edges])
    order = {**effects.ends(), "receiving head": _in_order(heads[edge] for edge in sorted(read, key=_receiver))}
    panels = []
    for name in dict.fromkeys(table["side"]) if side is None else [side]:
        part = one_side(table, name).assign(**{"receiving head": rows.to_numpy()})
        panels += _readers(part, kinds.to_numpy(), value, name, order)
    return assemble(panels, value, effects, title="")


def _readers(part: DataFrame, kinds: Any, value: str, side: str, order: dict[str, list[str]]) -> list[Panel]:
    """A side's panels; those that lack a sender or a head have a grey line there, so that all are laid out alike."""
    panels = []
    everything = part[pd.Series(kinds).isin(list(READS)).to_numpy()]
    senders = [name for name in order["sender"] if name in set(everything["sender"])]
    for kind in (kind for kind in READS if kind in kinds):
        lines = part[kinds == kind]

        def grid(found: str, lines: DataFrame = lines) -> DataFrame:
            cells = pivot(lines, "sender", "receiving head", found, order)
            return cells.reindex(
                index=pd.Index(senders, name="sender"), columns=pd.Index(order["receiving head"], name="receiving head")
            )

        name = f"{READS[kind]}; {SIDE_NAMES.get(side, side)}"
        panels.append(Panel(name, grid(value), {found: grid(found) for found in SHOWN}))
    return panels


def _receiver(edge: Edge) -> tuple[int, int]:
    return edge.receiver.layer, -1 if edge.receiver.unit is None else edge.receiver.unit


def _in_order(entries: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(entries))


def _some(entries: Iterable[str]) -> str:
    return ", ".join(sorted(set(entries)))
