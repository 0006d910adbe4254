"""What every command on pairs works with: opened from its options, and what commands do with it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clip_lens.cli import options
from clip_lens.cli.tables import print_effects

if TYPE_CHECKING:
    from clip_lens.core.effects import Effects
    from clip_lens.core.keep import Keep
    from clip_lens.core.metric import Metric
    from clip_lens.core.record import Record
    from clip_lens.core.setting import Setting
    from clip_lens.core.shard import Shard
    from clip_lens.core.source import Function, Source
    from clip_lens.data.batch import Batch
    from clip_lens.data.images import ImageStore
    from clip_lens.data.pairs import Pairs
    from clip_lens.model.encoder import HookedTextEncoder
    from clip_lens.model.site import Place

TINY, NONE = "tiny", "none"
SEGMENT = "correct"
"""The pairs that are shown unless others are asked for."""
LONGEST = 120
"""Characters of a file's name before its ending; a longer one ends in a digest of what was left out."""


def say(line: str) -> None:
    """A line for the person at the terminal."""
    typer.echo(line)


@dataclass(frozen=True)
class Job:
    """A model, its pairs and their images, a folder, and which pairs are shown."""

    encoder: HookedTextEncoder
    batch: Batch
    images: ImageStore | None
    out: Path
    pictures: Path | None
    segment: str
    rows: int
    progress: bool
    any_store: bool = False
    overwrite: bool = False
    metric: str = "logit"
    jobs: int = 1
    shard: Shard | None = None

    def measured(self, metric: str) -> Job:
        """The job in another metric, by its name."""
        return replace(self, metric=metric)

    @property
    def _metric(self) -> Metric:
        from clip_lens.core.metric import cosine, logit

        return {"logit": logit, "cosine": cosine}[self.metric]

    def named(self, *parts: object) -> str:
        """A file's name of some words, and the metric's where it is another one than the logit."""
        return name_of(*parts, *([] if self.metric == "logit" else [self.metric]))

    @property
    def keep(self) -> Keep:
        from clip_lens.core.keep import Keep

        return Keep(self.out, say, self.overwrite)

    def setting(self, source: Source | Function) -> Setting:
        from clip_lens.core.setting import Setting

        return Setting.of(
            self.encoder, self.batch, source=source, metric=self._metric, rows=self.rows, progress=self.progress
        )

    def patched(self, name: str, places: Sequence[Place], source: Source | Function) -> Effects:
        """What patching each place from a source moves, kept under a name."""
        from clip_lens.methods.patching import patch_effects
        from clip_lens.methods.registry import PATCHING

        name = self.named(name)
        how: dict[str, Any] = {"source": source, "metric": self._metric, **self.how(name)}
        compute = lambda some: patch_effects(self.encoder, self.batch, some, **how)
        return self.kept(name, self.setting(source).record(PATCHING), places, compute)

    def how(self, name: str) -> dict[str, Any]:
        """The options of every sweep of the result `name`."""
        shared = self.keep.sharing(name, self.jobs) if self.shard is None else {"executor": self.shard}
        return {"rows": self.rows, "progress": self.progress, **shared}

    def kept(
        self,
        name: str,
        wanted: Record,
        places: Sequence[Place],
        compute: Callable[[Any], Effects],
        *,
        whole: bool = False,
    ) -> Effects:
        """A result under a name, or the shard of it that this command computes."""
        if self.shard is not None:
            name, wanted = shard_file(name, self.shard), wanted.saying(shard=str(self.shard))
        return self.keep.effects(name, wanted, places, compute, whole=whole)

    def is_part(self) -> bool:
        """Whether this command computes a shard, which has no report; then it says how to go on."""
        if self.shard is not None:
            say(
                f"Shard {self.shard} is done. When all are: clip-lens gather {self.out}, then this command without "
                "--shard for the report."
            )
        return self.shard is not None

    def refuse_shard(self, command: str) -> None:
        """Refuses a shard for a command whose steps need whole results."""
        if self.shard is not None:
            raise ValueError(
                f"{command} has no shards, its steps need one another's whole results; give --jobs, or shards "
                "to trace, patch, ablate and paths"
            )

    def chosen(self, effects: Effects) -> Effects:
        """The pairs of the segment that was asked for; the record says how many there were of each.

        Raises:
            ValueError: no pair is of that segment.
        """
        self._check(effects.pairs["segment"])
        return effects if self.segment == "all" else effects.where(segment=self.segment)

    def of_segment(self) -> Batch:
        """The pairs of the segment that was asked for, as a batch.

        Raises:
            ValueError: no pair is of that segment.
        """
        from clip_lens.core.effects import segments
        from clip_lens.methods.scores import pair_scores

        if self.segment == "all":
            return self.batch
        found = segments(pair_scores(self.encoder, self.batch).d)
        self._check(found)
        return self.batch[[row for row, name in enumerate(found) if name == self.segment]]

    def _check(self, found: Sequence[str]) -> None:
        counts = {name: list(found).count(name) for name in dict.fromkeys(found)}
        if self.segment != "all" and self.segment not in counts:
            there = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(
                f"no pair is {self.segment!r}, there are {there}; give --segment with one of these, or all"
            )

    @property
    def about(self) -> str:
        """What a report is about: the model, its task where the pairs have a side, the pairs where they are others."""
        given = "" if self.batch.pairs.name == self.encoder.name else f": {self.batch.pairs.name}"
        what = "processes negation" if set(self.batch.pairs.side) - {"none"} else "tells captions from foils"
        return f"{self.encoder.full_name} {what}{given}"

    def write(
        self, name: str, results: Mapping[str, Effects], *, summary: str | None = None, points: Sequence[str] = ()
    ) -> None:
        """The table of the first result on the screen and as csv, and the report of all, with what is said first."""
        from clip_lens.core.spreadsheet import write_csv
        from clip_lens.show.questions.cautions import cautions
        from clip_lens.show.report.report import page_in, report

        first, name = next(iter(results.values())), self.named(name, self.segment)
        table = self.out / f"{name}.csv"
        write_csv(first.table(), table)
        page = report(
            results,
            page_in(self.out, name),
            title=f"Where {self.about}",
            summary=summary,
            points=points,
            pictures=self.pictures,
            warnings=cautions(self.encoder, self.batch),
            name=name,
        )
        print_effects(first)
        say(f"\nThe report is {page}; {table.name} and the .parquet files beside it hold the numbers.")


def shard_file(name: str, shard: Shard) -> str:
    """The name of the file of a shard of a result.

    Example:
        >>> from clip_lens.core.shard import Shard
        >>> shard_file("resid-slots", Shard(0, 3))
        'resid-slots.shard-0-of-3'
    """
    return f"{name}.shard-{shard.number}-of-{shard.of}"


def name_of(*parts: object) -> str:
    """A file's name of some words, told apart from every other by a digest where it would be too long.

    Example:
        >>> name_of("paths", "direct", "0.1,0.2", "to", "q, k")
        'paths-direct-0.1+0.2-to-q+k'
        >>> len(name_of(*range(99))), name_of(*range(99)) == name_of(*range(98), 98.0)
        (120, False)
    """
    from hashlib import sha256

    whole = "-".join(re.sub(r"[^\w.+-]+", "+", str(part)) for part in parts)
    said = "-".join(map(str, parts))
    if len(whole) <= LONGEST:
        return whole
    end = sha256(said.encode()).hexdigest()[:16]
    return f"{whole[: LONGEST - len(end) - 1]}-{end}"


def open_job(
    out: options.Out,
    pairs: options.PairsFile = "tiny",
    images: options.Images = TINY,
    model: options.Model = "tiny",
    pretrained: options.Pretrained = None,
    run: options.RunOption = None,
    segment: options.Segment = SEGMENT,
    rephrased: options.Rephrased = False,
    any_store: options.AnyStore = False,
    overwrite: options.Overwrite = False,
    rows: options.Rows = 256,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
    like: options.Like = None,
    quick_gelu: options.QuickGelu = None,
    jobs: options.Jobs = 1,
    shard: options.ShardOption = None,
    format: options.Format = None,
    repair_images: options.Repair = False,
) -> Job:
    """What the options of a command on pairs name, opened: its parameters are those options."""
    from clip_lens.core.shard import Shard
    from clip_lens.data.batch import align
    from clip_lens.data.read import read_pairs
    from clip_lens.model.load import load
    from clip_lens.tiny.assets import ASSETS

    part = None if shard is None else Shard.parse(shard)
    chosen = read_pairs(pairs, format=format)
    chosen = chosen.rephrased() if rephrased else chosen
    weights: dict[str, Any] = {"pretrained": pretrained, "like": like, "quick_gelu": quick_gelu, "device": device}
    store = _open_images(images, chosen, model, weights, out, quiet)
    if repair_images and store is not None:
        chosen = chosen.repaired(store.ids)
    say(f"Loading {model} ...")
    encoder = load(model, **weights)
    batch = align(chosen, store, encoder, run=run, any_store=any_store)
    say(repr(batch))
    for reason, count in batch.dropped.reason.value_counts().items():
        say(f"  {count} dropped: {reason}")
    segment = _segment(segment, batch)
    out.mkdir(parents=True, exist_ok=True)
    shipped = ASSETS / "pictures" if images == TINY and store is not None else None
    pictures = Path(images) if Path(images).is_dir() else shipped
    return Job(
        encoder, batch, store, out, pictures, segment, rows, not quiet, any_store, overwrite, jobs=jobs, shard=part
    )


def _segment(asked: str, batch: Batch) -> str:
    """The segment to show: all pairs where there is no d that would make segments."""
    if batch.has_direction or asked == "all":
        return asked
    if asked != SEGMENT:
        raise ValueError(f"--segment {asked} goes by d, and texts alone have none; give --segment all")
    say("Without images there is no d and no segments: all pairs are shown.")
    return "all"


def _open_images(
    images: str, pairs: Pairs, model: str, weights: dict[str, Any], out: Path, quiet: bool
) -> ImageStore | None:
    from clip_lens.data.crops import cropped
    from clip_lens.data.embed import embed_images
    from clip_lens.data.images import ImageStore

    if images == NONE or (images == TINY and not pairs.has_images):
        return None
    if not Path(images).is_dir():
        return ImageStore.open(images)
    say(f"Embedding the pictures in {images} ...")
    out.mkdir(parents=True, exist_ok=True)
    ids = pairs.images if any(cropped(name)[1] for name in pairs.image) else None
    return embed_images(images, model=model, ids=ids, out=out / "images.safetensors", progress=not quiet, **weights)


def on_pairs(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function of a `Job` and of its own options a command that takes the options of `open_job` too."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        shared = inspect.signature(open_job, eval_str=True).parameters.values()
        shared_now = [part.replace(default=defaults.get(part.name, part.default)) for part in shared]

        def run(**given: object) -> None:
            job = open_job(**{part.name: given.pop(part.name) for part in shared})  # type: ignore[arg-type]
            command(job, **given)

        told = [part.replace(kind=part.KEYWORD_ONLY) for part in (*own, *shared_now)]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(told)  # type: ignore[attr-defined]
        run.__annotations__ = {part.name: part.annotation for part in told}
        return run

    return decorate
