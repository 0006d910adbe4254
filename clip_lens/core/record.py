"""What was run on what: the record that every result carries, and the method it is of.

Everything that decides a number stands in it as a value of its own type; `as_text` words it for files and pages. Two
records of one identity say that two results are the same, so that one can stand for the other.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, TypeAlias

from clip_lens.core.metric import Metric
from clip_lens.core.source import Source
from clip_lens.words import counted

Setting: TypeAlias = str | int | float | bool | None
How = Literal["patches", "estimates", "reads", "judges"]

RUNS = {
    "affirmative": "the text without negation",
    "negated": "the text with negation",
    "caption": "the caption",
    "foil": "the foil",
}
"""The texts that `align(run=...)` runs."""
PACKAGES = ("clip_lens", "transformer_lens", "open_clip_torch", "torch")


@dataclass(frozen=True)
class Method:
    """A way to come to numbers, with the words that tables, pages, files and the command line have for it.

    `key` is its name in files and on the command line, `title` in headings. `how`: it patches places, estimates what
    patching them would do, only reads, or judges circuits. `noun` is what a mean of its values is, `share` what a
    fraction of the total is, `verb` what a share of the whole does at a place. `caption` says what one mark of its
    figure is: `{mark}` (cell, bar, line), `{place}`, `{source}`, `{texts}`, `{slot}` and the record's settings by their
    names are filled in. `definition` is a heading and the paragraph that defines its numbers. `unit` is given where it
    isn't the metric's.

    Example:
        >>> Method("patching", "activation patching").noun
        'mean signed effect'
    """

    key: str
    title: str
    how: How = "patches"
    noun: str = "mean signed effect"
    verb: str = "moves"
    caption: str = "Each {mark} replaces {place} with what the {source} gives there."
    definition: tuple[str, str] = ("", "")
    unit: str | None = None
    share: str = "recovered fraction"

    @property
    def patches(self) -> bool:
        """Whether places are patched, or a gradient estimates what patching them would do."""
        return self.how in ("patches", "estimates", "judges")

    @property
    def estimates(self) -> bool:
        """Whether a gradient estimates what patching would do."""
        return self.how == "estimates"


UNKNOWN = Method("", "")
"""The method of a result that doesn't say how it came about."""


@dataclass(frozen=True)
class MetricRecord:
    """What a result keeps of its metric."""

    name: str = "logit"
    oriented: bool = True
    unit: str = "logits"
    identity: str | None = None

    @classmethod
    def of(cls, metric: Metric) -> MetricRecord:
        return cls(metric.name, metric.oriented, metric.unit, metric.identity)


@dataclass(frozen=True)
class SourceRecord:
    """What a result keeps of its source."""

    name: str = "counterpart"
    identity: str | None = None
    swaps: bool = False

    @classmethod
    def of(cls, source: Source) -> SourceRecord:
        return cls(source.name, source.identity, source.swaps)


@dataclass(frozen=True)
class Record:
    """What was run on what, by which method.

    `weights`, `data_digest` and `batch` are digests: of the text tower's parameters as they were, of the pairs as read,
    of the tokens, alignment and directions. `tower` says what the tower does with its weights. `source` is None where
    nothing is patched. `settings` are the method's own. `hooks` names the tower's modules that had hooks of the user's
    on meanwhile. `slots` are the batch's in the order of the text, `slot_rules` how many pairs have theirs from which
    rule. `selected` says which pairs were taken afterwards, a line for each time.

    Example:
        >>> record = Record(Method("toy", "a toy"), model="tiny", pairs=3)
        >>> record.as_text()["method"], record.as_text()["pairs"]
        ('a toy', '3')
    """

    method: Method = UNKNOWN
    model: str = ""
    weights: str = ""
    tower: str = ""
    layers: int | None = None
    heads: int | None = None
    scale: float | None = None
    dtype: str = ""
    data: str = ""
    data_digest: str = ""
    images: str = ""
    batch: str = ""
    held_out: str = ""
    run: str = ""
    source: SourceRecord | None = None
    metric: MetricRecord = MetricRecord()
    pairs: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    slots: tuple[str, ...] = ()
    slot_rules: Mapping[str, int] = field(default_factory=dict)
    unaligned: int = 0
    unsourced: int = 0
    hooks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    selected: tuple[str, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def shares(self) -> bool:
        """Whether effects are shares of what lies between the two texts: with everything patched, the run becomes the
        other text."""
        return self.source is not None and self.source.swaps

    @property
    def unit(self) -> str:
        """The unit of the values: the method's own, else the metric's."""
        return self.method.unit or self.metric.unit

    @property
    def reusable(self) -> bool:
        """Whether another result of the same record is the same result: nothing in it is anonymous."""
        known = self.metric.identity is not None and (self.source is None or self.source.identity is not None)
        return known and not self.hooks

    def stands_for(self, wanted: Record) -> bool:
        """Whether a result with this record is the one that `wanted` asks for.

        Everything counts that decides a number; names, titles and what is only counted does not.
        """
        return self.reusable and wanted.reusable and self._identity == wanted._identity

    @property
    def _identity(self) -> tuple[Any, ...]:
        source = None if self.source is None else (self.source.identity, self.source.swaps)
        metric = (self.metric.identity, self.metric.oriented)
        where = (
            self.weights,
            self.tower,
            self.dtype,
            self.scale,
            self.data_digest,
            self.batch,
            self.run,
            self.selected,
        )
        return self.method.key, metric, source, where, dict(self.settings), dict(self.versions)

    def differences(self, wanted: Record) -> list[str]:
        """Why a result with this record is not the one that `wanted` asks for: a line for each thing that differs.

        Example:
            >>> Record(run="foil").differences(Record(run="caption"))[1:]
            ["run: 'foil' is there, 'caption' is asked for"]
        """
        lines = []
        if not (self.reusable and wanted.reusable):
            lines.append("its source or metric is anonymous, or hooks were on: whether it is the same can't be told")
        for name in ("method", "metric", "source", "weights", "tower", "dtype", "scale", "data_digest", "batch", "run",
                     "selected", "settings", "versions"):  # fmt: skip
            here, there = (_told(getattr(record, name)) for record in (self, wanted))
            if here != there:
                lines.append(f"{name.replace('_', ' ')}: {here!r} is there, {there!r} is asked for")
        return lines

    def saying(self, **settings: Setting) -> Record:
        """The record with further settings."""
        return replace(self, settings={**self.settings, **settings})

    def as_text(self) -> dict[str, str]:
        """What there is to say, as lines for files and pages: a heading and a text each."""
        bare = self == Record(self.method, self.model, source=self.source)
        given = {
            "method": self.method.title,
            "run": self._run(),
            "source": "" if bare else "none" if self.source is None else self.source.name,
            "metric": "" if bare else f"{self.metric.name}, in {self.unit}",
            **{name.replace("_", " "): _worded(value) for name, value in self.settings.items()},
            "scale": "" if self.scale is None else f"{self.scale:.6g}",
            "dtype": self.dtype,
            "model": self.model,
            "weights": self.weights,
            "tower": self.tower,
            "layers": _worded(self.layers),
            "heads": _worded(self.heads),
            "data": self.data,
            "data digest": self.data_digest,
            "images": self.images,
            "batch": self.batch,
            "held out": self.held_out,
            "pairs": _worded(self.pairs),
            "pairs dropped": "; ".join(f"{count} {why}" for why, count in self.dropped.items()) or "none",
            "slots": ", ".join(f"{counted(count, 'pair')} by {rule}" for rule, count in self.slot_rules.items()),
            "positions without counterpart": str(self.unaligned),
            "pairs without a source": str(self.unsourced or ""),
            "hooks of yours that were on": ", ".join(self.hooks),
            "notes": "; ".join(self.notes),
            "selected": "; ".join(self.selected),
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        }
        counts = ("pairs dropped", "positions without counterpart")
        return {name: text for name, text in given.items() if text and not (bare and name in counts)}

    def _run(self) -> str:
        text = RUNS.get(self.run, self.run)
        if not text:
            return ""
        return f"{text} is run and patched" if self.source is not None and self.method.patches else f"{text} is the run"


def _told(value: Any) -> Any:
    """A field as an error tells it."""
    if isinstance(value, Method):
        return f"{value.title} ({value.key})"
    if isinstance(value, MetricRecord | SourceRecord):
        turns = "" if getattr(value, "oriented", True) else ", not oriented"
        return value.name + turns + ("" if value.identity is None else f" ({value.identity})")
    return dict(value) if isinstance(value, Mapping) else value


def _worded(value: Setting) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


@cache
def versions() -> Mapping[str, str]:
    """The installed versions of what computes the numbers."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def as_json(record: Record) -> dict[str, Any]:
    """A record as JSON has it: a mapping of each field, those that say nothing left out."""
    plain: dict[str, Any] = {}
    for each in fields(record):
        value = getattr(record, each.name)
        if value != each.default and value not in ({}, ()):
            plain[each.name] = {f.name: getattr(value, f.name) for f in fields(value)} if _nested(value) else value
    return plain


def of_json(plain: Mapping[str, Any]) -> Record:
    """The record that `as_json` wrote."""
    given = dict(plain)
    kinds = {"method": Method, "metric": MetricRecord, "source": SourceRecord}
    for name, kind in kinds.items():
        if given.get(name) is not None:
            given[name] = kind(**given[name])
    if "method" in given:
        given["method"] = replace(given["method"], definition=tuple(given["method"].definition))
    given.pop("untemplated", None)  # what files of before the slots came with the batch counted
    for name in ("slots", "hooks", "notes", "selected"):
        given[name] = tuple(given.get(name, ()))
    return Record(**given)


def _nested(value: object) -> bool:
    return isinstance(value, Method | MetricRecord | SourceRecord)
