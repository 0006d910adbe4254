"""`compare`: two results of one method on the same pairs, such as those of two models: what differs, place by place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pandas import DataFrame, Series

from clip_lens.core.effects import Effects, Of
from clip_lens.core.record import Method, Record
from clip_lens.core.table import Draws, tabulate_differences
from clip_lens.model.site import Place, members
from clip_lens.words import some

SAME = ("method", "metric", "source", "run", "data_digest", "settings")
"""What the records of two results must have in common: everything but the model, and what follows from it."""
COLUMNS = ("key", "caption", "foil", "side", "sigma", "token", "question")
"""What the pairs of two results must have in common: d is each model's own."""
DIFFERENCES = (
    "Differences",
    "Two models are measured on the same pairs and at the same places. A difference is the second's mean signed effect "
    "minus the first's. Its interval is a paired bootstrap: both are averaged over the same resamples of pairs, so "
    "that what makes a pair hard for both does not count.",
)


def compare(a: Effects, b: Effects, *, names: tuple[str, str] | None = None) -> Comparison:
    """What `b` has more than `a`, of each place and pair: a `Comparison`, b minus a.

    Both are results of the same method, metric, source and run over the same pairs and places; the model, its weights,
    precision and images may differ, and so may each pair's d. `names` are what tables and figures call the two, by
    default their models. `heatmap(compare(a, b).effects, value="effect")` and `bars(compare(a, b).table())` draw it;
    two circuits are compared as sets, by `a & b`, `a - b` and `Circuit.overlaps`.

    Raises:
        ValueError: results that can't be compared, by what differs: in their records, pairs or places.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:20], store, encoder)
        >>> before = clip_lens.patch_effects(encoder, batch, encoder.sites("mlp"))
        >>> encoder.tower.blocks[0].mlp.b_out[0].add_(5)
        tensor(...)
        >>> after = clip_lens.patch_effects(encoder, batch, encoder.sites("mlp"))
        >>> compared = compare(before, after, names=("before", "after"))
        >>> compared
        Comparison(after minus before: 6 places x 20 pairs; 10 caption, 10 foil; activation patching)
        >>> bool((compared.effects.values == after.values - before.values).all())
        True
    """
    _require_same(a.record, b.record)
    b = _in_order(a, b)
    given = names or (a.record.model or "a", b.record.model or "b")
    if len(set(given)) < 2:
        given = f"{given[0]} (a)", f"{given[1]} (b)"
    return Comparison(a, b, given)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Two results `a` and `b`, pair by pair and place by place the same; `compare` makes it.

    `effects` are the differences as a result of their own, which every table and figure takes; shares of a total are no
    differences of such shares, so these are in `table`.
    """

    a: Effects
    b: Effects
    names: tuple[str, str]

    @cached_property
    def effects(self) -> Effects:
        """`b`'s values, totals and baselines minus `a`'s, in units of the metric; `d` of its pairs is the difference of
        both models' d, `d_a` and `d_b` are their own."""
        pairs = self.a.pairs.assign(
            d=self.b.pairs["d"] - self.a.pairs["d"], d_a=self.a.pairs["d"], d_b=self.b.pairs["d"]
        )
        parts = {name: getattr(self.b, name) - getattr(self.a, name) for name in ("values", "total", "baseline")}
        return Effects(**parts, places=self.a.places, pairs=pairs, record=self._record())

    def table(
        self,
        interval: float = 0.95,
        *,
        of: Of = "means",
        pooled: bool = False,
        resamples: int = 1000,
        seed: int = 0,
    ) -> DataFrame:
        """A row per place and side: fraction and effect of b minus those of a, with paired bootstrap intervals.

        Columns: those of `Effects.index`, side, fraction, effect, lower, upper (of the difference of the fractions),
        effect_lower, effect_upper, n (pairs that entered both), dropped, fraction_a, fraction_b, effect_a, effect_b.
        The draws are those of `Effects.table` with this seed, the same for both.

        Example:
            >>> from clip_lens.core.effects import toy_effects
            >>> toy = toy_effects()
            >>> float(compare(toy, toy).table(resamples=10)["effect"].abs().max())
            0.0
        """
        if not 0 < interval < 1 or resamples < 1:
            raise ValueError(f"an interval lies between 0 and 1, of 1 resample or more. Got {interval}, {resamples}")
        draws = Draws(interval, resamples, seed)
        return tabulate_differences(self.a.sample, self.b.sample, ("a", "b"), of, pooled, draws)

    def top(self, n: int = 10, by: str = "effect", **how: Any) -> DataFrame:
        """The n rows per side of `table` with the largest absolute difference, the largest first.

        Example:
            >>> from clip_lens.core.effects import toy_effects
            >>> len(compare(toy_effects(), toy_effects()).top(1, resamples=10))
            2
        """
        table = self.table(**how)
        size = table[by].abs().sort_values(ascending=False, kind="stable")
        return table.loc[size.index].groupby("side", sort=False).head(n).sort_values(
            "side", kind="stable", ignore_index=True
        )  # fmt: skip

    def _record(self) -> Record:
        """What was run: what both have in common, and of the rest the two side by side."""
        a, b = self.a.record, self.b.record
        fields = {name: (getattr(a, name), getattr(b, name)) for name in ("weights", "dtype", "images", "batch")}
        both: dict[str, Any] = {
            name: one if one == two else f"{two} minus {one}" for name, (one, two) in fields.items()
        }
        source = None if a.source is None else replace(a.source, swaps=False)
        return replace(
            a,
            method=self._method(a.method),
            model=f"{self.names[1]} minus {self.names[0]}",
            source=source,
            notes=tuple(_notes(a, b)),
            **both,
        )

    def _method(self, method: Method) -> Method:
        one, two = (name.replace("{", "{{").replace("}", "}}") for name in self.names)
        return replace(
            method,
            key=f"{method.key}-difference",
            title=f"{method.title}: {self.names[1]} minus {self.names[0]}",
            how="reads",
            noun=f"difference of the {method.noun}s",
            verb="differs",
            caption=f"Each {{mark}} is the {method.noun} at {{place}} in {two} minus that in {one}.",
            definition=DIFFERENCES,
        )

    def __repr__(self) -> str:
        said = repr(self.a).removeprefix("Effects(").removesuffix(")").rpartition("; ")[0]
        return f"Comparison({self.names[1]} minus {self.names[0]}: {said}; {self.a.record.method.title})"

    def _repr_html_(self) -> str:
        return self.effects._repr_html_()


def _notes(a: Record, b: Record) -> Iterator[str]:
    yield from dict.fromkeys([*a.notes, *b.notes])
    if a.scale != b.scale:
        yield f"the scales differ, {a.scale:.4g} and {b.scale:.4g}: each one's logits are its own"


def _require_same(a: Record, b: Record) -> None:
    """Refuses records of what can't be compared, by what differs."""
    differ = [name for name in SAME if getattr(a, name) != getattr(b, name)]
    if differ:
        lines = [f"{name.replace('_', ' ')}: {told(a, name)} and {told(b, name)}" for name in differ]
        raise ValueError(
            f"these results can't be compared, they differ in more than the model; {'; '.join(lines)}. Compute both in "
            "the same way on the same pairs"
        )


def told(record: Record, name: str) -> str:
    """A field of a record in a few words.

    Example:
        >>> told(Record(run="foil"), "run"), told(Record(), "source")
        ("'foil'", 'none')
    """
    value = getattr(record, name)
    if name in ("method", "metric", "source"):
        said = "none" if value is None else getattr(value, "title", "") or getattr(value, "name", "")
        digest = getattr(value, "identity", None)
        return f"{said or 'unnamed'}{f' ({digest})' if digest else ''}"
    return repr(dict(value)) if name == "settings" else repr(value)


def _in_order(a: Effects, b: Effects) -> Effects:
    """`b` with its places and pairs in the order of `a`'s.

    Raises:
        ValueError: places or pairs that one of them lacks, or pairs of the same key that are others.
    """
    rows = _order("places", [_name(place) for place in a.places], [_name(place) for place in b.places])
    columns = _order("pairs", _keys(a), _keys(b))
    pairs = b.pairs.iloc[columns].reset_index(drop=True)
    for name in COLUMNS:
        one, two = (
            table.get(name, Series("", table.index)).astype(object).fillna("").astype(str) for table in (a.pairs, pairs)
        )
        strange = a.pairs["key"][(one != two).to_numpy()]
        if len(strange):
            raise ValueError(
                f"these results can't be compared: {name} differs in {len(strange)} of their pairs, such as "
                f"{strange.iloc[0]!r}"
            )
    at = torch.tensor(columns)
    return replace(
        b,
        values=b.values[torch.tensor(rows)][:, at],
        total=b.total[at],
        baseline=b.baseline[at],
        places=a.places,
        pairs=pairs,
    )


def _name(place: Place) -> str:
    return " + ".join(map(str, members(place) or (place,)))


def _keys(effects: Effects) -> list[str]:
    """What tells the columns apart: keys, after `by_slot` with the number of the token."""
    keys = effects.pairs["key"].astype(str)
    return list(keys + ", token " + effects.pairs["token"].astype(str) if "token" in effects.pairs else keys)


def _order(what: str, wanted: Sequence[Any], given: Sequence[Any]) -> list[int]:
    """At which number of `given` each of `wanted` stands."""
    at = {each: number for number, each in enumerate(given)}
    if len(at) < len(given) or len(given) != len(wanted) or at.keys() != set(wanted):
        lacking = {"first": [each for each in wanted if each not in at], "second": list(at.keys() - set(wanted))}
        said = "; ".join(f"only the {which} has {some(names, 3)}" for which, names in lacking.items() if names)
        raise ValueError(
            f"these results can't be compared: of their {what}, {len(wanted)} and {len(given)}, "
            f"{said or 'some stand there twice'}; take those that both have with where(...)"
        )
    return [at[each] for each in wanted]
