"""What every verb works with: an encoder, a batch, a source, a metric; refused early where they don't fit each other.

It owns the loop over chunks of pairs, what a record says of the four, and the table of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_lens.core.address import Addresses, address
from clip_lens.core.effects import segments
from clip_lens.core.metric import NO_DIRECTION, Metric, Readout, TextsOnly, as_metric, logit
from clip_lens.core.record import Method, MetricRecord, Record, SourceRecord, versions
from clip_lens.core.record import Setting as Value
from clip_lens.core.rows import Chunk, pairs_at_once, prepare, read_other
from clip_lens.core.shard import ROW, Shard
from clip_lens.core.source import Fetch, Source, as_source, counterpart
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge, Place, Site, members, place_of


@dataclass(frozen=True)
class Setting:
    """What a verb was given, checked; `of` makes it.

    `source` is None where nothing is patched.
    """

    encoder: HookedTextEncoder
    batch: Batch
    source: Source | None
    metric: Metric
    rows: int = 256
    progress: bool = True
    shard: Shard | None = None
    sharing: Mapping[str, Any] = field(default_factory=dict)
    """The options with which further verbs on this setting share their work out."""

    @classmethod
    def of(
        cls,
        encoder: HookedTextEncoder,
        batch: Batch,
        *,
        source: object = counterpart,
        metric: object = logit,
        rows: int = 256,
        progress: bool = True,
        jobs: int = 1,
        executor: object = None,
    ) -> Setting:
        """The setting of a verb that patches; with a `Shard` as executor, of that part of its work.

        Raises:
            ValueError: no pairs, a batch of another width than the encoder's embedding, or `rows` below 1.
            TypeError: a source that is no function, a metric that does not say its orientation.
        """
        if rows < 1:
            raise ValueError(f"rows={rows}: at least one sequence must fit into a forward")
        shard = executor if isinstance(executor, Shard) else None
        sharing = {} if shard is not None else {"jobs": jobs, "executor": executor}
        setting = cls(encoder, batch, as_source(source), as_metric(metric), rows, progress, shard, sharing)
        setting.check()
        if (target := setting.metric.target) is not None:
            address([target.site], encoder, batch)  # says what there is
            target.check(encoder, batch)
        return setting

    @classmethod
    def reading(
        cls, encoder: HookedTextEncoder, batch: Batch, *, progress: bool = True, directed: bool = True
    ) -> Setting:
        """The setting of a verb that reads and patches nothing, along the batch's direction if it is `directed`.

        Raises:
            ValueError: no pairs, a batch of another width than the encoder's embedding, or one without the direction
                that is needed.
        """
        setting = cls(encoder, batch, None, logit, progress=progress)
        setting.check()
        if directed and not batch.has_direction:
            raise ValueError(NO_DIRECTION)
        return setting

    def check(self) -> None:
        """Refuses a batch without pairs, or of another width than the encoder's embedding, or what is no batch."""
        if not isinstance(self.batch, Batch):
            raise TypeError(
                f"this takes an encoder and then a Batch, as align(pairs, images, encoder) makes one. Got "
                f"{self.batch!r}; one text's attention is patterns(encoder, text), its embedding encoder(text)"
            )
        width = self.batch.direction.shape[1]
        if width != self.encoder.d_embed:
            raise ValueError(
                f"the batch's direction has {width} components, {self.encoder.name} {self.encoder.d_embed}"
            )
        if len(self.batch) == 0:
            raise ValueError(f"the batch of {self.batch.pairs.name} has no pairs left; batch.dropped lists why")

    def without_hooks(self, why: str) -> None:
        """Refuses to run while hooks of the user's are on the tower."""
        if hooks := self.encoder.hooked:
            raise ValueError(
                f"the tower has hooks of yours on, at {', '.join(hooks)}, under which this can't be computed: {why}. "
                "Take them off (leave `with tower.hooks(...)`, or tower.reset_hooks()), or give the intervention as a "
                "source: via(place, source=...)"
            )

    @cached_property
    def fetch(self) -> Fetch:
        """The source's fetch for this batch."""
        if self.source is None:
            raise ValueError("nothing is patched here")
        return self.source(self.encoder, self.batch)

    @property
    def everything(self) -> Place:
        """The place that patches everything: of another tower what its projection gives, of a run of this one the last
        residual stream that the metric depends on, else what every sender sends to the output (with every edge patched,
        nothing else reaches it), or, where the metric reads an activation, every sender before it."""
        target, encoder = self.metric.target, self.encoder
        if hasattr(self.fetch, "tower") and target is None:
            return Site("projection")
        if getattr(self.fetch, "is_run", False):
            return Site("resid", encoder.n_layers if target is None else target.site.layer)
        if target is not None:
            return target.senders(encoder.n_layers, encoder.n_heads)
        return tuple(self.encoder.edges(receivers=[Site("out")]))

    def patchable(self, places: Iterable[Place | str]) -> tuple[Place, ...]:
        """The places as a tuple, those given as texts parsed, after what can be refused before anything runs.

        Raises:
            ValueError: no places, or a text that names none; edges, or a source that is no run, under hooks of the
                user's.
            TypeError: one place instead of a list of places.
        """
        if isinstance(places, Site | Edge | str):
            raise TypeError(f"places are a list, got one place, {places}; write [{places!r}]")
        if not (places := tuple(map(place_of, places))):
            raise ValueError("no places to patch; encoder.sites('resid') lists some")
        edges = any(isinstance(member, Edge) for place in (*places, self.everything) for member in members(place))
        if edges:
            self.without_hooks(
                "edges are sums that a hook would change, and the total of a source that is no run is one"
            )
        return places

    def chunks(
        self, addresses: Addresses, also: Iterable[str] = (), own: Iterable[str] = ()
    ) -> Iterator[tuple[Int[Tensor, "pair"], Chunk, Readout]]:
        """The batch some pairs at a time, prepared: their numbers, the chunk, what a metric compares with.

        `also` names hooks whose source is needed beside those of the places, `own` those whose unpatched values are.
        """
        at_once = pairs_at_once(addresses, self.encoder, self.batch, self.rows)
        for number, index in enumerate(self.batch.chunks(at_once)):
            if self.shard is not None and not self.shard.takes(number):
                continue
            chunk = prepare(self.encoder, self.batch, addresses, self.fetch, index, also, own, self.metric.target)
            readout = Readout.of(chunk.batch, chunk.embedding, read_other(chunk, self.fetch))
            self.check_metric(self.metric(chunk.seen, readout), index)
            yield index, chunk, readout

    @staticmethod
    def check_metric(values: Tensor, index: Tensor) -> None:
        """Refuses a metric that does not give one finite number per row."""
        if values.shape != index.shape:
            raise ValueError(
                f"a metric gives one number per row, {tuple(index.shape)}; this one gave {tuple(values.shape)}"
            )
        if not values.isfinite().all():
            raise ValueError(
                "the metric of the unpatched run is not finite: check the directions and the weights for NaN"
            )

    def record(self, method: Method, **settings: Value) -> Record:
        """What is run on what, by this method with these settings."""
        encoder, batch = self.encoder, self.batch
        return Record(
            method=method,
            model=encoder.full_name,
            weights=encoder.digest,
            tower=encoder.architecture,
            layers=encoder.n_layers,
            heads=encoder.n_heads,
            scale=float(encoder.scale),
            dtype=str(encoder.dtype).removeprefix("torch."),
            data=batch.pairs.name,
            data_digest=batch.pairs.digest,
            images=batch.images,
            batch=batch.digest,
            held_out=batch.held_out,
            run=batch.run,
            source=None if self.source is None else SourceRecord.of(self.source),
            metric=MetricRecord.of(self.metric),
            pairs=len(batch),
            dropped={str(why): int(count) for why, count in batch.dropped.reason.value_counts().items()},
            slots=batch.slots,
            slot_rules=batch.slot_rules,
            unaligned=int(batch.unaligned.sum()),
            hooks=encoder.hooked,
            notes=encoder.notes,
            settings=settings,
            versions=dict(versions()),
        )

    def pairs(self, d: Float[Tensor, "pair"]) -> pd.DataFrame:
        """The table of the pairs of a result: `pairs_frame`."""
        return pairs_frame(self.batch, d)

    def some_pairs(self, d: Float[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> pd.DataFrame:
        """The table of the pairs that were done, `rows` of the batch with their d; of a shard it says which."""
        if self.shard is None:
            return self.pairs(d)
        return pairs_frame(self.batch[rows], d).assign(**{ROW: rows.tolist()})


def logit_difference(sigma: Int[Tensor, "pair"], readout: Readout) -> Float[Tensor, "pair"]:
    """`d = S(caption) - S(foil)` of some pairs, in logits (method, section 1); NaN without an image."""
    if isinstance(readout, TextsOnly):
        return torch.full_like(readout.run[:, 0], torch.nan)
    return sigma * (logit(readout.other, readout) - logit(readout.run, readout))


def over_pairs(
    batch: Batch, size: int, compute: Callable[[Int[Tensor, "pair"]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """What `compute` says of at most `size` pairs at a time, by name, put together in the batch's order, on the CPU.

    Pairs are the last axis of everything that it gives.
    """
    return gathered(len(batch), ((index, compute(index)) for index in batch.chunks(size)))


def gathered(n: int, parts: Iterable[tuple[Int[Tensor, "pair"], Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Parts of n pairs, each with the pairs' numbers, put together by name on the CPU."""
    whole: dict[str, Tensor] = {}
    for index, part in parts:
        for name, value in part.items():
            if name not in whole:
                whole[name] = torch.zeros(*value.shape[:-1], n, dtype=value.dtype)
            whole[name][..., index.cpu()] = value.cpu()
    return whole


UNKNOWN = "unknown"
"""The segment of a pair without an image, whose d is not known."""


def pairs_frame(batch: Batch, d: Float[Tensor, "pair"]) -> pd.DataFrame:
    """One row per pair: key, caption, foil, image, side, sigma, d, segment, unaligned, and the pairs' own columns."""
    pairs = batch.pairs
    columns = {
        "key": list(pairs.key),
        "caption": list(pairs.caption),
        "foil": list(pairs.foil),
        "image": list(pairs.image),
        "side": list(pairs.side),
        "sigma": batch.sigma.tolist(),
        "d": d.tolist(),
        "segment": segments(d) if batch.has_direction else [UNKNOWN] * len(batch),
        "unaligned": batch.unaligned.tolist(),
    }
    frame = pd.DataFrame(columns)
    extra = pairs.info[[column for column in pairs.info if column not in frame]].reset_index(drop=True)
    return pd.concat([frame, extra], axis=1)
