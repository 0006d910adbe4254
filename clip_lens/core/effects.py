"""The one result of every method: what each place moves, for each pair.

`values[place, pair]` is a change of the metric, `index` says what the rows are, `pairs` what the columns are, `record`
how they came about. Everything else here is a view of these: fractions, intervals, grids, files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from html import escape
from itertools import compress
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.grid import axes_of, one_side, pivot
from clip_lens.core.record import Record, SourceRecord
from clip_lens.core.slots import gather, instances, positions_of, rows_of
from clip_lens.core.store import INDEX, plain, read, write
from clip_lens.core.table import (
    BOUNDS,
    FEWEST,
    POINTS,
    SIDES,
    Draws,
    Sample,
    drawn_fractions,
    sides_of,
    tabulate,
)
from clip_lens.data.slots import ENDS, order_of
from clip_lens.model.site import Edge, Place, Site, at_slot, index_rows, label, members, order
from clip_lens.words import nearest, unknown

PAIRS = ("key", "caption", "foil", "image", "side", "sigma", "d", "segment")
SEGMENTS = ("incorrect", "ambiguous", "correct")
DIFFERING = ("negator", "changed")
"""The slots at which texts begin to differ, of the rules built in."""
SPREAD = ["kind", "layer", "unit"]
"""What the places have in common over whose slots a localisation is taken."""
SHOWN = ("fraction", "lower", "upper", "effect", "effect_lower", "effect_upper", "n", "dropped")

Of = Literal["means", "ratios"]
_Asked: TypeAlias = tuple[Draws | None, str, float, bool]
"""What a table depends on: how pairs are drawn (None = no intervals), of, floor, pooled."""


@runtime_checkable
class Slotted(Protocol):
    """What `by_slot` reads of a Batch: the slot of each position, the slots' names, the pairs' keys."""

    @property
    def slot(self) -> Int[Tensor, "pair pos"]: ...
    @property
    def slots(self) -> tuple[str, ...]: ...
    @property
    def pairs(self) -> Any: ...


@dataclass(frozen=True, eq=False, repr=False)
class Effects:
    """What each place moves, for each pair, in units of the metric (logits at the model's scale unless `record` says
    otherwise).

    `values = metric(patched) - metric(run)`, NaN where the pair has no counterpart at that place;
    `total = metric(every edge patched) - metric(run)`, for a counterpart `metric(other) - metric(run)`;
    `baseline = metric(run)`. `pairs` has a row per column of `values`: key, caption, foil, image, side (which text has
    the negation: caption, foil or none), sigma (+1 where the run is the foil, -1 where it is the caption), d (logit
    difference S(caption) - S(foil)), segment, and whatever else is known of the pair. Tensors are kept on the CPU.

    Raises:
        ValueError: shapes that don't fit each other, a missing column of `pairs`, a sigma other than -1 and 1.

    Example:
        >>> effects = toy_effects()
        >>> effects
        Effects(4 places x 3 pairs; 1 caption, 2 foil; toy)
        >>> effects.grid(side="foil")
        layer      0    1
        slot
        negator  1.0  0.3
        eot      0.0  0.7
    """

    values: Float[Tensor, "place pair"]
    total: Float[Tensor, "pair"]
    baseline: Float[Tensor, "pair"]
    places: tuple[Place, ...]
    pairs: DataFrame
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        for name in ("values", "total", "baseline"):
            object.__setattr__(self, name, getattr(self, name).detach().cpu())
        object.__setattr__(self, "places", tuple(self.places))
        object.__setattr__(self, "pairs", self.pairs.reset_index(drop=True))
        _check_shapes(self)
        _check_pairs(self.pairs)

    @cached_property
    def index(self) -> DataFrame:
        """One row per place: place (its label), kind, layer, unit, slot, sender, receiver; a named slot is a str, a
        position an int; sender and receiver are an edge's.

        Example:
            >>> toy_effects().index.iloc[-2:, :5]
                             place   kind  layer  unit     slot
            2  resid 1 @negator  resid      1  <NA>  negator
            3      resid 1 @eot  resid      1  <NA>      eot
        """
        rows = index_rows(self.places)
        types = {"layer": "Int64", "unit": "Int64", "slot": object}
        return DataFrame({name: pd.Series([row[name] for row in rows], dtype=types.get(name, "str")) for name in INDEX})

    @property
    def meta(self) -> dict[str, str]:
        """What was run on what, in words: `record.as_text()`."""
        return self.record.as_text()

    def __len__(self) -> int:
        """The number of places; `len(effects.pairs)` is that of the pairs."""
        return len(self.places)

    def __getitem__(self, chosen: Place | str | int | slice | Sequence[Any] | np.ndarray | Tensor) -> Effects:
        """Some of the places, always an `Effects`: by place, by its label, by number, slice or truth values, or by a
        list of any of these.

        Pairs are chosen with `where`; `effects.values[row]` is a tensor.

        Raises:
            ValueError: a place that the result does not have, or truth values that are not one per place.
            IndexError: a number beyond the places.

        Example:
            >>> effects = toy_effects()
            >>> effects[0], effects[Site("resid", 1, slot="eot")].places == effects["resid 1 @eot"].places
            (Effects(1 places x 3 pairs; 1 caption, 2 foil; toy), True)
            >>> len(effects[1:]), len(effects[["resid 0 @eot", "resid 1 @eot"]])
            (3, 2)
        """
        rows = np.array(_rows_of(self, chosen), dtype=int)
        found = replace(
            self, values=self.values[torch.from_numpy(rows)], places=tuple(self.places[row] for row in rows)
        )
        found.__dict__["index"] = self.index.iloc[rows].reset_index(drop=True)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, for numpy: one row per place, one column per pair."""
        return np.array(self.values.numpy(), dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        """What there is not: an error that says where a table's own attributes are."""
        if not name.startswith("_") and hasattr(DataFrame, name):
            raise AttributeError(
                f"Effects has no {name!r}; the DataFrames are effects.table() (places with intervals), "
                f"effects.to_frame() (places by pairs), effects.pairs and effects.index: effects.table().{name}"
            )
        names = [each for each in (*dir(type(self)), *(each.name for each in fields(self))) if each[0] != "_"]
        raise AttributeError(f"Effects has no {name!r}{nearest(name, names)}")

    def to_frame(self) -> DataFrame:
        """A DataFrame with a row per place and pair: the place's columns of `index`, the pair's key, side, sigma, d and
        segment, value, total, baseline; a value that there isn't is NaN. `table()` has the means with intervals.

        Example:
            >>> toy_effects().to_frame()[["place", "key", "side", "value", "total"]].head(2)
                             place key     side  value  total
            0  resid 0 @negator   a  caption    2.0    2.0
            1  resid 0 @negator   b     foil   -4.0   -4.0
        """
        n_places, n_pairs = self.values.shape
        place = self.index.iloc[np.repeat(np.arange(n_places), n_pairs)].reset_index(drop=True)
        row = np.tile(np.arange(n_pairs), n_places)
        pair = self.pairs[["key", "side", "sigma", "d", "segment"]].iloc[row].reset_index(drop=True)
        numbers = {"total": self.total.numpy()[row], "baseline": self.baseline.numpy()[row]}
        return pd.concat([place, pair], axis=1).assign(value=self.values.flatten().numpy(), **numbers)

    def signed(self) -> Float[Tensor, "place pair"]:
        """`sigma * values` of an oriented metric, the part of d that each patch moves, so that sides of opposite
        direction can be averaged; the values themselves of a metric that is not oriented, such as `cosine`.

        `sigma * total = d` for a counterpart and the logit (method section 1, "Sign").

        Example:
            >>> toy_effects().signed()[0]
            tensor([2., 4., 1.])
        """
        return self.values * self.orientation

    @property
    def orientation(self) -> Float[Tensor, "pair"]:
        """The sign with which each pair counts: sigma where the metric is oriented, else 1."""
        sigma = torch.tensor(self.pairs["sigma"].to_numpy(dtype=np.float64), dtype=self.values.dtype)
        return sigma if self.record.metric.oriented else torch.ones_like(sigma)

    @property
    def sample(self) -> Sample:
        """What tables are made of."""
        return Sample(self.index, self.values, self.total, self.pairs, self.orientation)

    def fraction(self, of: Of = "means", floor: float = 0.0, pooled: bool = False) -> DataFrame:
        """The recovered fraction of every place: 0 = nothing moved, 1 = all of it. One row per place and side.

        `of="means"`: sum of signed values / sum of signed totals, over the same pairs, those with a value at that
        place. `of="ratios"`: the mean over pairs of value / total (method section 4). Within a side all pairs have one
        sigma, and signing changes nothing; `pooled=True` takes both sides together, where unsigned totals of opposite
        sign would cancel in the denominator.

        Columns: `INDEX`, side, fraction, effect (mean signed effect, metric units), n (pairs, by key, that entered),
        dropped (pairs without a value there, with |total| < floor, or with a ratio that does not exist). Where
        the denominator is 0 or no pair is left the fraction is NaN and n is 0.

        Example:
            >>> toy_effects().fraction()[["place", "side", "fraction", "effect", "n", "dropped"]].tail(2)
                             place  side  fraction  effect  n  dropped
            6  resid 1 @negator  foil       0.3    0.75  2        0
            7      resid 1 @eot  foil       0.7    1.75  2        0
        """
        return self._tabulated((None, of, floor, pooled))

    def table(
        self,
        interval: float = 0.95,
        *,
        of: Of = "means",
        floor: float = 0.0,
        pooled: bool = False,
        resamples: int = 1000,
        seed: int = 0,
    ) -> DataFrame:
        """The rows of `fraction` with a bootstrap interval: lower, upper (of it), effect_lower, effect_upper.

        Percentile bootstrap over pairs. A resample draws whole pairs, so that columns with the same `key` move
        together. A side's draws depend on `seed`, on the side and on its number of pairs alone: the same place has
        the same interval whatever other places and sides the result holds. Below five pairs there is none: NaN.

        Raises:
            ValueError: an interval outside of (0, 1), or fewer than one resample.

        Example:
            >>> toy_effects().table(resamples=50)[["place", "side", "fraction", "lower", "n"]].tail(1)
                         place  side  fraction  lower  n
            7  resid 1 @eot  foil       0.7    NaN  2
        """
        if not 0 < interval < 1:
            raise ValueError(f"interval must lie between 0 and 1, as .95 does. Got {interval}")
        if resamples < 1:
            raise ValueError(f"resamples must be at least 1. Got {resamples}")
        return self._tabulated(_asked(interval, of, floor, pooled, resamples, seed))

    @cached_property
    def _tables(self) -> dict[_Asked, DataFrame]:
        """The tables that were asked for: the bootstrap is run once for each."""
        return {}

    def _tabulated(self, asked: _Asked) -> DataFrame:
        """A table, computed once; points are read off one that has intervals."""
        draws, of, floor, pooled = asked
        if draws is None:
            for known, table in self._tables.items():
                if known[1:] == asked[1:]:
                    return table.drop(columns=[name for name in BOUNDS if name in table])
        if asked not in self._tables:
            self._tables[asked] = tabulate(self.sample, of, floor, pooled, draws)
        return self._tables[asked].copy()

    def _tables_of(self, rows: np.ndarray, columns: np.ndarray) -> dict[_Asked, DataFrame]:
        """What the tables that are known say of some places and pairs, where each side keeps all its pairs or none: a
        place's numbers on a side depend on nothing else."""
        sides = self.pairs["side"]
        kept = set(sides[columns])
        if not kept or (sides.isin(kept).to_numpy() != columns).any():
            return {}
        found = {}
        for asked, table in self._tables.items():
            if columns.all() or not asked[-1]:  # pooled pairs are those of all sides
                chosen = np.tile(rows, len(table) // len(rows)) if len(rows) else np.zeros(0, bool)
                chosen &= (table["side"].isin(kept) | (table["side"] == "pooled")).to_numpy()
                found[asked] = table[chosen].reset_index(drop=True)
        return found

    def by_slot(self, batch: Slotted) -> Effects:
        """Positions regrouped as named slots, a column per (pair, token): the k-th token of that slot in that pair.

        Averages over its columns weigh a slot of several tokens by their number, as the paper's category means do
        (method section 2); patching a named slot moves its tokens together and answers another question. NaN where a
        pair's slot has fewer tokens than its longest. `pairs` gets the column `token`. Slots without a token
        in any pair are left out; pairs are found in the batch by their key.

        Raises:
            ValueError: a place is not at a position, two places are the same, or a pair is not in the batch.

        Example:
            >>> from types import SimpleNamespace
            >>> raw = replace(toy_effects(), places=tuple(Site("resid", l, slot=p) for l in (0, 1) for p in (0, 1)))
            >>> slot = torch.tensor([[0, 0], [0, -1], [1, 0]])
            >>> batch = SimpleNamespace(slot=slot, slots=("subject", "eot"), pairs=raw.pairs)
            >>> named = raw.by_slot(batch)
            >>> named.pairs[["key", "token"]].to_numpy().tolist()
            [['a', 0], ['a', 1], ['b', 0], ['c', 0]]
            >>> named.values[:2]
            tensor([[ 2.,  0., -4.,  0.],
                    [nan, nan, nan, -1.]])
        """
        bases, row_at = positions_of(self.places)
        slot = batch.slot[rows_of(list(self.pairs["key"]), list(batch.pairs.key))].cpu()
        found = instances(slot, len(batch.slots))
        used = [number for number in range(len(batch.slots)) if (found.position[number] >= 0).any()]
        values = [gather(self.values, row_at, found, number) for number in used]
        columns = found.pair.numpy()
        return replace(
            self,
            values=torch.stack(values, 1).flatten(0, 1) if values else self.values[:0, columns],
            total=self.total[found.pair],
            baseline=self.baseline[found.pair],
            places=tuple(at_slot(base, batch.slots[number]) for base in bases for number in used),
            pairs=self.pairs.iloc[columns].assign(token=found.token.numpy()),
        )

    def grid(
        self,
        rows: str | None = None,
        columns: str | None = None,
        value: str = "fraction",
        side: str | None = None,
        **how: Any,
    ) -> DataFrame:
        """One column of the table, laid out by two columns of the index: unless told otherwise slot x layer, of single
        heads without slots unit x layer, of edges sender x receiver.

        Slots come in the order of the text, layers ascending, senders and receivers in the order of the tower.
        `side=None` is the only side there is. `how` goes to `table`.

        Raises:
            ValueError: no such column or side, several sides to choose from, or two places that fall in one cell.

        Example:
            >>> toy_effects().grid(value="effect", side="caption")
            layer      0    1
            slot
            negator  2.0  1.0
            eot      0.0  1.0
        """
        rows, columns = axes_of(self.index, rows, columns)
        return pivot(one_side(self._table_for(value, how), side), rows, columns, value, self.axes())

    def axes(self) -> dict[str, list[str]]:
        """The order of a grid's axes: slots as they stand in the text, and the `ends` of edges.

        Example:
            >>> toy_effects().axes()["slot"]
            ['negator', 'eot']
        """
        return {"slot": order_of(plain(self.index["slot"]), self.record.slots), **self.ends()}

    def ends(self) -> dict[str, list[str]]:
        """The labels of the edges' senders and receivers, each in the order of the tower: the order of a grid's axes.

        Example:
            >>> edges = tuple(Edge(Site("head", 0, unit), Site("mlp", layer)) for layer in (1, 0) for unit in (1, 0))
            >>> replace(toy_effects(), places=edges).ends()
            {'sender': ['head 0.0', 'head 0.1'], 'receiver': ['mlp 0', 'mlp 1']}
        """
        edges = [member for place in self.places for member in members(place) if isinstance(member, Edge)]
        found = {"sender": {edge.sender for edge in edges}}
        found["receiver"] = {replace(edge.receiver, slot=None) for edge in edges}
        return {name: [str(site) for site in sorted(sites, key=order)] for name, sites in found.items()}

    def _table_for(self, value: str, how: Mapping[str, Any]) -> DataFrame:
        if value not in POINTS + BOUNDS:
            raise ValueError(unknown("value", value, POINTS + BOUNDS))
        if value in BOUNDS:
            return self.table(**how)
        return self.fraction(**{name: how[name] for name in how if name not in ("interval", "resamples", "seed")})

    def localisation(
        self,
        slots: Sequence[str] | None = None,
        interval: float = 0.95,
        *,
        of: Of = "means",
        floor: float = 0.0,
        pooled: bool = False,
        resamples: int = 1000,
        seed: int = 0,
    ) -> DataFrame:
        """How unevenly d is spread over the text: per layer and side the standard deviation of the slots' fractions.

        With ddof 0. `slots=None`: from `negator` to `eot` (method section 4); in a result without negators from the
        first word that changes, or all but the start of text. Columns: kind, layer, unit, side, localisation, lower,
        upper (the bootstrap of `table`), slots (how many have a fraction). A spread is never below 0: that its interval
        lies above 0 is no evidence that the slots differ.

        Raises:
            ValueError: no place is at one of these slots.

        Example:
            >>> toy_effects().localisation()[["layer", "side", "localisation"]].round(3).tail(2)
               layer  side  localisation
            2      0  foil           0.5
            3      1  foil           0.2
        """
        slots = _behind(self.axes()["slot"]) if slots is None else slots
        found = self.where(slot=lambda column: column.isin(list(slots)))
        if not found.places:
            raise ValueError(f"no place is at one of {', '.join(slots)}; positions get names with by_slot(batch)")
        draws, points, parts = Draws(interval, resamples, seed), found.fraction(of, floor, pooled), []
        for side, table in points.groupby("side", sort=False):
            drawn = drawn_fractions(found.sample, str(side), of, floor, draws)
            for name, part in table.reset_index(drop=True).groupby(SPREAD, dropna=False, sort=False):
                bounds = _spread_bounds(drawn[part.index], interval, int(part["n"].max()))
                parts.append((*name, side, part["fraction"].std(ddof=0), *bounds, part["fraction"].count()))
        spread = DataFrame(parts, columns=[*SPREAD, "side", "localisation", "lower", "upper", "slots"])
        spread = spread.astype({"layer": "Int64", "unit": "Int64"})
        return spread.sort_values(["side", "layer"], kind="stable", ignore_index=True)

    def top(self, n: int = 10, by: str = "effect", side: str | None = None, **how: Any) -> DataFrame:
        """The n rows per side of `table` with the largest absolute mean signed effect, the largest first. What is found
        comes first, then the columns of `index` that tell the places apart.

        Example:
            >>> toy_effects().top(1)[["place", "side", "effect"]]
                             place     side  effect
            0  resid 0 @negator  caption     2.0
            1  resid 0 @negator     foil     2.5
        """
        points = self._table_for(by, how)
        whole = self._tables.get(_asked(**how))
        found = []
        for each in sides_of(self.pairs, how.get("pooled", False)):
            rows = points.index[points["side"] == each]
            largest = points.loc[rows, by].abs().sort_values(ascending=False, kind="stable").index[:n]
            if whole is not None:
                found.append(whole.loc[largest])
                continue
            largest -= rows[0]
            chosen = self if each == "pooled" else self.where(side=each)
            chosen = replace(chosen, values=chosen.values[largest], places=tuple(self.places[row] for row in largest))
            found.append(chosen.table(**how))
        table = pd.concat(found, ignore_index=True)
        table = table if side is None else one_side(table, side).reset_index(drop=True)
        first = ["place", "side", *(name for name in SHOWN if name in table)]
        return table[first + [name for name in table if name not in first]]

    def top_places(self, n: int = 10, by: str = "effect", side: str | None = None, **how: Any) -> list[Place]:
        """The n places with the largest absolute mean signed effect, the largest first, as patches take them.

        On the side named, or on whichever side each is larger. `by` is a column of `table`, `how` goes to it.

        Raises:
            ValueError: no such column or side.

        Example:
            >>> [str(place) for place in toy_effects().top_places(2)]
            ['resid 0 @negator', 'resid 1 @eot']
        """
        table = self._table_for(by, how)
        table = table if side is None else one_side(table, side)
        sizes = table[by].abs().to_numpy(dtype=float).reshape(-1, len(self.places))
        largest = np.where(np.isnan(sizes), -np.inf, sizes).max(axis=0)
        order = np.argsort(-largest, kind="stable")[:n]
        return [self.places[row] for row in order if largest[row] > -np.inf]

    def where(self, **filters: Any) -> Effects:
        """The places and pairs that match: each filter names a column of `index` or of `pairs`.

        A filter is a value, a collection of values, or a function from the column to a truth value per row. A name
        that both have means the index. `record.selected` says which filters took pairs away.

        Raises:
            ValueError: no column has that name, none of the values asked for is in it, or a function gives something
                else than a truth value per row.

        Example:
            >>> toy_effects().where(slot="negator", layer=[0], d=lambda d: d > 1)
            Effects(1 places x 2 pairs; 1 caption, 1 foil; toy)
        """
        rows, columns = np.ones(len(self.places), bool), np.ones(len(self.pairs), bool)
        for name, wanted in filters.items():
            if name in INDEX:
                rows &= _found(self.index[name], wanted)
            elif name in self.pairs:
                columns &= _found(self.pairs[name], wanted)
            else:
                raise ValueError(unknown("column", name, [*INDEX, *self.pairs.columns]))
        kept = torch.from_numpy(columns)
        found = replace(
            self,
            values=self.values[torch.from_numpy(rows)][:, kept],
            total=self.total[kept],
            baseline=self.baseline[kept],
            places=tuple(compress(self.places, rows)),
            pairs=self.pairs[columns],
            record=self.record if columns.all() else _selected(self, filters, columns),
        )
        found.__dict__["index"] = self.index[rows].reset_index(drop=True)
        found._tables.update(self._tables_of(rows, columns))
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one Parquet file: a row per place, a float column per pair, the rest as JSON in the schema's metadata.

        `pandas.read_parquet` opens it without this package (of ten thousands of pairs, which are as many columns,
        `pyarrow.parquet.ParquetFile(path).read()` takes a twentieth of the memory). `load` checks a digest of the
        content: a bit that flipped meanwhile is noticed. Raw positions in a column that also has names are written
        as text there; `load` gives them back as they were. An interrupted call leaves an existing file as it was.

        Example:
            >>> folder = getfixture("tmp_path")
            >>> toy_effects().save(folder / "toy.parquet")
            >>> list(pd.read_parquet(folder / "toy.parquet").columns)
            ['place', 'kind', 'layer', 'unit', 'slot', 'sender', 'receiver', 'a', 'b', 'c']
        """
        write(path, self.index, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Effects:
        """The result that `save` wrote, equal in every value, type and place.

        Raises:
            ValueError: the file is truncated, damaged, not Parquet, not written by `save`, or written by version 0.1.

        Example:
            >>> path = getfixture("tmp_path") / "toy.parquet"
            >>> toy_effects().save(path)
            >>> Effects.load(path)
            Effects(4 places x 3 pairs; 1 caption, 2 foil; toy)
        """
        return cls(**read(path))

    def __repr__(self) -> str:
        keys = self.pairs.groupby("side")["key"].nunique()
        sides = (
            ", ".join(f"{keys[side]} {side}" for side in SIDES if side in keys) if set(keys.index) - {"none"} else ""
        )
        kind = " ".join(filter(None, (self.record.method.title, self.record.model)))
        parts = [f"{len(self.places)} places x {self.pairs['key'].nunique()} pairs", sides, kind]
        return f"Effects({'; '.join(filter(None, parts))})"

    def _repr_html_(self) -> str:
        shown, lines = ("method", "run", "source", "metric", "model", "data", "pairs dropped"), self.meta
        said = "".join(f"<dt>{escape(n)}</dt><dd>{escape(lines[n])}</dd>" for n in shown if n in lines)
        top = self.top(5, resamples=200) if self.places and len(self.pairs) else self.fraction()
        table = top.reindex(columns=["place", "side", *SHOWN]).to_html(
            index=False, float_format="{:.3f}".format, na_rep="", border=0
        )
        return f"<p>{escape(repr(self))}</p><dl>{said}</dl>{table}"


def _behind(slots: list[str]) -> list[str]:
    """Of slots in the order of the text those where texts can differ: from the first that does, if that is told."""
    start = min((slots.index(name) for name in DIFFERING if name in slots), default=None)
    return [name for name in slots if name != ENDS[0]] if start is None else slots[start:]


def segments(d: Iterable[float] | Float[Tensor, "pair"], thresholds: tuple[float, float] = (-1.0, 1.0)) -> list[str]:
    """The segment of each pair: `incorrect` d < low, `ambiguous` low <= d < high, `correct` d >= high, d in logits.

    From method section 2; the thresholds are for scale 100 (OpenAI's models).

    Raises:
        ValueError: the thresholds are not in order, or a d is NaN.

    Example:
        >>> segments([-2.0, -1.0, 0.99, 1.0])
        ['incorrect', 'ambiguous', 'ambiguous', 'correct']
    """
    low, high = thresholds
    if not low <= high:
        raise ValueError(f"thresholds must be (low, high) with low <= high. Got {thresholds}")
    numbers = np.asarray(d.detach().cpu() if isinstance(d, Tensor) else list(d), dtype=np.float64)
    if np.isnan(numbers).any():
        raise ValueError(f"d is NaN for {int(np.isnan(numbers).sum())} of {len(numbers)} pairs; they have no segment")
    return [SEGMENTS[int(number >= low) + int(number >= high)] for number in numbers]


def _spread_bounds(drawn: Float[np.ndarray, "slot resample"], interval: float, pairs: int) -> tuple[float, float]:
    """The bounds of the standard deviation of some slots' fractions over resamples."""
    spread = DataFrame(drawn).std(ddof=0)
    if pairs < FEWEST or spread.isna().all():
        return np.nan, np.nan
    tail = (1 - interval) / 2
    return float(spread.quantile(tail)), float(spread.quantile(1 - tail))


def toy_effects() -> Effects:
    """A small result made by hand, for examples: resid at two layers and two slots, three pairs, d = 2, 4, 1 logits.

    Example:
        >>> toy_effects().total
        tensor([ 2., -4., -1.])
    """
    d = [2.0, 4.0, 1.0]
    pairs = DataFrame(
        {
            "key": ["a", "b", "c"],
            "caption": ["There is no dog.", "There is a cat.", "There are some people."],
            "foil": ["There is a dog.", "There is no cat.", "There are no people."],
            "image": ["1.png", "2.png", "3.png"],
            "side": ["caption", "foil", "foil"],
            "sigma": [1, -1, -1],
            "d": d,
            "segment": segments(d),
        }
    )
    return Effects(
        values=torch.tensor([[2.0, -4.0, -1.0], [0.0, 0.0, 0.0], [1.0, -1.0, -0.5], [1.0, -3.0, -0.5]]),
        total=torch.tensor([2.0, -4.0, -1.0]),
        baseline=torch.tensor([20.0, 21.0, 22.0]),
        places=tuple(Site("resid", layer, slot=slot) for layer in (0, 1) for slot in ("negator", "eot")),
        pairs=pairs,
        record=Record(model="toy", source=SourceRecord(swaps=True)),
    )


def _asked(
    interval: float = 0.95,
    of: str = "means",
    floor: float = 0.0,
    pooled: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> _Asked:
    """What `Effects.table` was asked for, with its defaults."""
    return Draws(interval, resamples, seed), of, floor, pooled


def _rows_of(effects: Effects, chosen: Any) -> list[int]:
    """The numbers of the places that were asked for."""
    count = len(effects.places)
    if isinstance(chosen, slice):
        return list(range(count)[chosen])
    if isinstance(chosen, Tensor | np.ndarray | pd.Series):
        chosen = chosen.tolist()
    if isinstance(chosen, list):
        if chosen and all(isinstance(each, bool) for each in chosen):
            if len(chosen) != count:
                raise ValueError(f"{len(chosen)} truth values for {count} places; give one for each")
            return [row for row, wanted in enumerate(chosen) if wanted]
        return [row for each in chosen for row in _rows_of(effects, each)]
    if isinstance(chosen, int | np.integer) and not isinstance(chosen, bool):
        return [range(count)[chosen]]
    return [_row_of(effects, chosen)]


def _row_of(effects: Effects, place: Place | str) -> int:
    """The number of one place, given as it is or by its label."""
    labels = list(effects.index["place"])
    if isinstance(place, str):
        if place in labels:
            return labels.index(place)
        columns = [*INDEX, *effects.pairs.columns]
        if place in columns:
            raise ValueError(f"effects[...] chooses places; the column {place!r} is in effects.to_frame() or .pairs")
        raise ValueError(unknown("place", place, labels))
    if place not in effects.places:
        raise ValueError(unknown("place", label(place), labels))
    return effects.places.index(place)


def _check_shapes(effects: Effects) -> None:
    values, n_pairs = effects.values, len(effects.pairs)
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(f"values must be floats [place, pair]. Got {values.dtype} of shape {tuple(values.shape)}")
    if values.shape != (len(effects.places), n_pairs):
        raise ValueError(
            f"values must be [place, pair] = [{len(effects.places)}, {n_pairs}], a row per place and a column per row "
            f"of pairs. Got {tuple(values.shape)}"
        )
    for name in ("total", "baseline"):
        shape = tuple(getattr(effects, name).shape)
        if shape != (n_pairs,):
            raise ValueError(f"{name} must have one number for each of {n_pairs} pairs. Got the shape {shape}")


def _check_pairs(pairs: DataFrame) -> None:
    missing = [name for name in PAIRS if name not in pairs]
    if missing:
        raise ValueError(f"pairs lacks {', '.join(missing)}; it must have {', '.join(PAIRS)}")
    strange = sorted(set(pairs["sigma"]) - {-1, 1})
    if strange:
        raise ValueError(f"sigma must be +1 (the run is the foil) or -1 (it is the caption). Got {strange[0]!r}")
    strange = sorted(set(map(str, pairs["side"])) - set(SIDES[:3]))
    if strange:
        raise ValueError(f"side must be 'caption', 'foil' or 'none'. Got {strange[0]!r}")


def _found(column: pd.Series, wanted: Any) -> np.ndarray:
    """Which rows match; a value that is nowhere in the column is a slip of the pen, and an error."""
    matches = _matches(column, wanted)
    if len(column) and not matches.any() and not callable(wanted):
        known = list(dict.fromkeys(map(repr, plain(column))))
        there = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
        near = nearest(wanted, plain(column)) if isinstance(wanted, str) else ""
        raise ValueError(f"no {column.name} is {wanted!r}{near}; there are {there}")
    return matches


def _matches(column: pd.Series, wanted: Any) -> np.ndarray:
    if callable(wanted):
        found = np.asarray(wanted(column))
        if found.shape != (len(column),):
            raise ValueError(f"a filter on {column.name!r} must give one truth value per row. Got {found!r}")
        return found.astype(bool)
    several = isinstance(wanted, Collection | pd.Series | np.ndarray | Tensor) and not isinstance(wanted, str | bytes)
    choices = [value.item() if isinstance(value, Tensor) else value for value in wanted] if several else [wanted]
    try:
        known = set(choices)
    except TypeError:  # a choice that can't be hashed, such as a list
        return np.array([entry in choices for entry in plain(column)], dtype=bool)
    return np.array([entry in known for entry in plain(column)], dtype=bool)


LISTED = 5
"""Distinct values of a column up to which a selection by it says how many pairs had each."""


def _selected(effects: Effects, filters: Mapping[str, Any], kept: np.ndarray) -> Record:
    """The record with a line more on which pairs were taken, and of how many, so that a report of a part says that it
    is one."""
    words, before = [], []
    pairs = effects.pairs.drop_duplicates("key")
    for name in sorted(filters.keys() - set(INDEX)):
        wanted = filters[name]
        several = isinstance(wanted, Collection) and not isinstance(wanted, str) and len(wanted) > 3
        words.append(f"{name} filtered" if callable(wanted) or several else f"{name} = {wanted}")
        counts = Counter(map(str, plain(pairs[name])))
        if not callable(wanted) and len(counts) <= LISTED:
            before.append(", ".join(f"{count} {value}" for value, count in counts.most_common()))
    line = f"{', '.join(words)}: {effects.pairs['key'][kept].nunique()} of {len(pairs)}"
    line += f" ({'; '.join(before)})" if before else ""
    return replace(effects.record, selected=(*effects.record.selected, line))
