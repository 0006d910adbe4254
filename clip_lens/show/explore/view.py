"""What the explorer looks at, and what there is to be seen of it: plain values. Nothing is computed or drawn here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from jaxtyping import Float
from pandas import DataFrame, Index
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.data.batch import Run
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import LAYOUTS, Kind, Site

SourceName = Literal["counterpart", "zeros", "mean", "noise"]
Rows = Literal["token", "slot", "head"]
KINDS: tuple[Kind, ...] = ("resid", "mid", "attn", "mlp", "head", "q", "k", "v", "pattern")
"""Kinds of site that fit a small grid."""
ALONE: tuple[SourceName, ...] = ("zeros", "noise")
"""Sources that one text has without another and without a batch."""


@dataclass(frozen=True)
class View:
    """What is looked at: two texts and an image, what is patched with what, and the chosen cell.

    Without a foil the caption is looked at alone, and then without an image too (""). `pair` is a row of the batch;
    other texts than its own are typed ones. `run` says which text is patched. `rows` lays the grid out: "token" and
    "slot" against layers or, where the kind has heads, against the heads of block `layer`; "head" against blocks.
    `layer`, `head` and `query` (a position of the run, None = the pooled one) are the cell, the head and the token
    that were clicked. `together` are places that are patched jointly.

    Raises:
        ValueError: a kind, run, source or layout that does not exist, or rows of heads for a kind that has none.

    Example:
        >>> View(caption="There is no star.", foil="There is a star.", image="1.png").kind
        'resid'
    """

    caption: str
    foil: str = ""
    image: str = ""
    pair: int = 0
    run: Run = "foil"
    kind: Kind = "resid"
    source: SourceName = "counterpart"
    rows: Rows = "token"
    layer: int = 0
    head: int = 0
    query: int | None = None
    together: tuple[Site, ...] = ()

    def __post_init__(self) -> None:
        known = {"run": get_args(Run), "kind": KINDS, "source": get_args(SourceName), "rows": get_args(Rows)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.by_head and not has_heads(self.kind):
            raise ValueError(f"rows='head' is for kinds with heads; {self.kind} has rows 'token' and 'slot'")
        sites = tuple(Site(**each) if isinstance(each, Mapping) else each for each in self.together)
        object.__setattr__(self, "together", sites)

    @property
    def alone(self) -> bool:
        """Whether there is one text only."""
        return not self.foil

    @property
    def by_head(self) -> bool:
        """Whether the grid's rows are heads."""
        return self.rows == "head"

    @property
    def one_block(self) -> bool:
        """Whether the grid's columns are the heads of one block."""
        return has_heads(self.kind) and not self.by_head

    @property
    def stem(self) -> View:
        """The view without what was clicked: clicks need no new patches."""
        return replace(self, layer=self.layer if self.one_block else 0, head=0, query=None, together=())

    @property
    def texts(self) -> View:
        """The view without what is patched: only the texts, the image and which text is run."""
        return replace(self.patching(()), source="counterpart")

    def patching(self, places: tuple[Site, ...]) -> View:
        """The view with these places patched together, and without all that has no part in that."""
        return replace(self, kind="resid", rows="token", layer=0, head=0, query=None, together=places)


def has_heads(kind: Kind) -> bool:
    """Whether a kind has a part for each head.

    Example:
        >>> has_heads("pattern"), has_heads("mlp")
        (True, False)
    """
    return LAYOUTS[kind].unit_axis is not None


class Layout(NamedTuple):
    """Where a view's places lie in its grid; `sites` go column by column, as `encoder.sites` lists them."""

    rows: list[Any]
    columns: list[int]
    sites: list[Site]

    @classmethod
    def of(cls, view: View, rows: Sequence[Any], encoder: HookedTextEncoder) -> Layout:
        """The layout of a view whose grid has these heads, positions or slots as rows."""
        layers = [view.layer] if view.one_block else None
        sites = encoder.sites(view.kind, layers=layers, slots=[None] if view.by_head else rows)
        return cls(list(rows), list(range(len(sites) // len(rows))), sites)

    def at(self, row: int, column: int) -> Site:
        """The place of a cell."""
        return self.sites[column * len(self.rows) + row]

    def grid(self, values: Float[Tensor, "place"]) -> DataFrame:
        """Values of the places, in their order, as a table."""
        table = values.reshape(len(self.columns), len(self.rows)).T.cpu().numpy()
        return DataFrame(table, index=Index(self.rows, dtype=object), columns=self.columns)


class Text(NamedTuple):
    """One text: its tokens in words, what it is, and the patterns of the chosen block's heads.

    `origin` is the position of the run that each token belongs to, -1 = none, `query` the chosen token.
    """

    name: str
    tokens: list[str]
    patterns: Float[Tensor, "head query key"]
    query: int | None
    origin: list[int]
    logit: float


class Patched(NamedTuple):
    """The run with the chosen places patched: which, the part of the score that goes, alone and the sum of each apart,
    and the text as it is then."""

    places: tuple[Site, ...]
    moved: float
    apart: float
    text: Text


class Panels(NamedTuple):
    """Everything that the explorer shows of a view, in units of the metric (see `unit`).

    `score` is d, or of one text alone its logit; `grid`, `direct` and `sources` are parts of it: what goes when a place
    is patched, what each head and MLP adds directly (a column per block), and what the chosen block's heads add by the
    token that they read from (a column per head). `lens` has the logits and the score as they would be read before each
    layer. `labels` and `tokens` are the rows of `grid` and `sources` in words, `first` the first token of the run in
    each row of `grid`, where rows are no heads; `texts` are the caption and the foil. `patched` is None where nothing
    is there to be patched with.
    """

    view: View
    effects: Effects
    layout: Layout
    grid: DataFrame
    labels: list[str]
    first: list[int]
    chosen: tuple[int, int] | None
    direct: DataFrame
    sources: DataFrame
    tokens: list[str]
    lens: DataFrame
    texts: tuple[Text, ...]
    score: float
    unit: str
    patched: Patched | None
    notes: tuple[str, ...]

    @property
    def block(self) -> int:
        """The block whose heads are shown."""
        return min(self.view.layer, len(self.direct.columns) - 1)

    @property
    def run(self) -> Text:
        """The text that is patched."""
        return self.texts[0 if int(self.effects.pairs["sigma"].iloc[0]) < 0 else 1]

    @property
    def total(self) -> float:
        """The part of the score that goes when everything is patched."""
        return float(self.effects.total[0]) * int(self.effects.pairs["sigma"].iloc[0])
