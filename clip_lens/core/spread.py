"""A verb's work on several processes or machines: shards, each computed by a worker, written, and put together here.

A worker is given a folder and a number. In the folder lies what the verb was called with, tensors apart from the rest,
so that the workers of one machine share them in memory; a worker opens it once and keeps it. What it computes it writes
beside that. An engine is anything with `submit(function, *arguments)` whose result has `.result()`: a
`concurrent.futures` executor, `submitit.AutoExecutor`, `Client.get_executor()` of dask, `on_ray()`.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from math import ceil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import cloudpickle
import torch

from clip_lens.core.effects import Effects
from clip_lens.core.identity import identity_of
from clip_lens.core.record import versions
from clip_lens.core.rows import PAIRS
from clip_lens.core.shard import Shard, gather_files
from clip_lens.data.batch import Batch
from clip_lens.files import written_whole
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.progress import progress_bar

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

TRIES = 3
"""How often a shard is computed that fails or is lost, before it is named in the error."""
CALL = "call.pt"


class Future(Protocol):
    """What an engine gives for what it was given."""

    def result(self) -> Any: ...


class Engine(Protocol):
    """What runs functions elsewhere."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future: ...


@dataclass(frozen=True)
class Spread:
    """An engine, the folder through which its workers and this process talk, and how many shards there are.

    `engine=2` is two processes of this machine. Every worker must see `folder`: on several machines give one that they
    share. Shards that lie there already, of the same call, are not computed again; without a folder a temporary one is
    used, and removed when all is done. `shards=None`: one for every 64 pairs.

    Raises:
        ValueError: less than one shard.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch, places = clip_lens.align(clip_lens.read_pairs()[:130], store, encoder), encoder.sites("mlp")
        >>> with ThreadPoolExecutor(2) as pool:
        ...     effects = clip_lens.patch_effects(encoder, batch, places, executor=Spread(pool))
        >>> effects.values.equal(clip_lens.patch_effects(encoder, batch, places).values)
        True
    """

    engine: Engine | int
    folder: str | Path | None = None
    shards: int | None = None

    def __post_init__(self) -> None:
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"shards={self.shards}: give 1 or more, or None")


def shared_out(verb: Callable[P, Effects]) -> Callable[P, Effects]:
    """A verb that hands its work to `jobs` processes or to an `executor`, where one is given.

    The verb itself knows of shards only: it takes a `Shard` as executor, and computes that part.
    """

    @wraps(verb)
    def call(*arguments: P.args, **options: P.kwargs) -> Effects:
        jobs, executor = options.pop("jobs", 1), options.pop("executor", None)
        if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
            raise ValueError(f"jobs={jobs!r}: give how many processes work, 1 or more")
        if executor is None and jobs == 1:
            return verb(*arguments, **options)
        if isinstance(executor, Shard):
            return verb(*arguments, executor=executor, **options)  # type: ignore[arg-type]
        if executor is not None and jobs != 1:
            raise ValueError(f"jobs={jobs} and an executor were given; give one of them")
        spread = executor if isinstance(executor, Spread) else Spread(jobs if executor is None else _engine(executor))
        if not isinstance(spread.engine, int):
            return _spread(spread, call, arguments, options)
        with processes(spread.engine) as engine:
            return _spread(replace(spread, engine=engine), call, arguments, options)

    return cast(Callable[P, Effects], call)


def sharing(folder: Path, jobs: int, executor: object = None) -> dict[str, Any]:
    """The options with which a verb shares its work out by way of a folder, so that an interrupted run goes on; none
    for one process.

    Raises:
        ValueError: less than one process, both processes and an executor, or a shard.
    """
    if jobs < 1 or (jobs > 1 and executor is not None):
        raise ValueError(f"jobs={jobs}: give how many processes work, 1 or more; or an executor instead")
    refuse_shard(executor)
    if isinstance(executor, Spread):
        return {"executor": executor}
    if executor is None and jobs == 1:
        return {}
    return {"executor": Spread(jobs if executor is None else _engine(executor), folder)}


def refuse_shard(executor: object) -> None:
    """Refuses a part of the work to what needs whole results from step to step."""
    if isinstance(executor, Shard):
        raise ValueError(
            f"shard {executor} is a part of one sweep, and this needs whole ones; give jobs or an engine, or shards to "
            "patch_effects, path_effects, gradient_effects and faithfulness"
        )


def _engine(executor: Any) -> Engine:
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"an executor has submit(function, *arguments), such as concurrent.futures' or dask's; got {executor!r}"
        )
    return cast(Engine, executor)


class Processes:
    """Processes of this machine with one thread each, begun anew when one of them dies."""

    def __init__(self, jobs: int):
        self.jobs, self.pool = jobs, self._begun(jobs)

    @staticmethod
    def _begun(jobs: int) -> Any:
        from loky import ProcessPoolExecutor

        return ProcessPoolExecutor(
            jobs, env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, initializer=_end_with_parent
        )

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future:
        return cast(Future, self.pool.submit(function, *arguments))

    def renew(self) -> None:
        """Other processes in the place of broken ones."""
        self.pool.shutdown(wait=False, kill_workers=True)
        self.pool = self._begun(self.jobs)

    def stop(self) -> None:
        self.pool.shutdown(wait=False, kill_workers=True)


def _end_with_parent() -> None:
    """Ends this worker when the process that began it is gone, however that ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def processes(jobs: int) -> Iterator[Processes]:
    """`jobs` processes of this machine, which end with the block."""
    pool = Processes(jobs)
    try:
        yield pool
    finally:
        pool.stop()


def _spread(
    spread: Spread, verb: Callable[..., Effects], arguments: tuple[Any, ...], options: dict[str, Any]
) -> Effects:
    """What a verb says, computed by an engine's workers."""
    encoder, batch = _encoder_and_batch(arguments, options)
    if encoder.hooked:
        raise ValueError(
            f"the tower has hooks of yours on, at {', '.join(encoder.hooked)}, which other processes do not have: take "
            "them off, or work in this process"
        )
    given = (arguments, {**options, "progress": False})
    count = spread.shards or max(1, ceil(len(batch) / PAIRS))
    folder = Path(mkdtemp(prefix="clip-lens-")) if spread.folder is None else _of_call(spread, verb, given)
    write_call(folder, verb, given)
    files = _Work(cast(Engine, spread.engine), folder, count).done(bool(options.get("progress", True)), len(batch))
    effects = gather_files(files)
    if spread.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return effects


def _encoder_and_batch(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[HookedTextEncoder, Batch]:
    names = ("encoder", "batch")
    found = [arguments[n] if n < len(arguments) else options.get(name) for n, name in enumerate(names)]
    if not (isinstance(found[0], HookedTextEncoder) and isinstance(found[1], Batch)):
        raise TypeError(f"an encoder and a batch come first, got {found[0]!r} and {found[1]!r}")
    return found[0], found[1]


def _of_call(spread: Spread, verb: Callable[..., Any], given: tuple[tuple[Any, ...], dict[str, Any]]) -> Path:
    """The part of a folder for this very call: two calls never take each other's shards."""
    folder, (encoder, batch) = Path(cast(Any, spread.folder)), _encoder_and_batch(*given)
    said_apart = ("encoder", "batch", "progress")
    rest = identity_of(given[0][2:], {name: value for name, value in given[1].items() if name not in said_apart})
    if rest is None:  # an anonymous source or metric: whether it is the same can't be told
        return Path(mkdtemp(prefix="anonymous-", dir=_made(folder)))
    said = (encoder.digest, encoder.architecture, float(encoder.scale), str(encoder.dtype), batch.digest)
    return _made(folder / f"{verb.__name__}-{identity_of(said, rest, dict(versions()))}")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_call(folder: Path, verb: Callable[..., Any], given: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """What a verb is called with, in a file that workers open: always this process's own, for opening it runs code."""
    with written_whole(folder / CALL) as temporary:
        torch.save((verb, *given), temporary, pickle_module=cloudpickle)


@lru_cache(maxsize=1)
def opened_call(folder: str) -> Callable[..., Effects]:
    """The verb with its arguments, tensors read where they are used."""
    path = Path(folder) / CALL
    verb, arguments, options = torch.load(path, mmap=True, weights_only=False)  # our own file, not a stranger's
    return lambda shard: verb(*arguments, executor=shard, **options)


def compute(folder: str, number: int, of: int) -> str:
    """What a worker does: one shard, into its file."""
    path = _file(Path(folder), number, of)
    opened_call(folder)(Shard(number, of)).save(path)
    return str(path)


def _file(folder: Path, number: int, of: int) -> Path:
    return folder / f"{number}-of-{of}.parquet"


@dataclass(frozen=True)
class _Work:
    """The shards of a call, to be computed by an engine."""

    engine: Engine
    folder: Path
    count: int

    def done(self, progress: bool, pairs: int) -> list[Path]:
        """The file of every shard, once all are there.

        Raises:
            RuntimeError: shards that failed too often, or an engine that takes no more; what is done stays.
            ValueError, TypeError: what the verb itself refuses.
        """
        files = [_file(self.folder, number, self.count) for number in range(self.count)]
        todo = [number for number, file in enumerate(files) if not _whole(file)]
        bar = progress_bar(pairs, "pair", "shards", show=progress)
        share = pairs / self.count
        with bar:
            bar.update(round((self.count - len(todo)) * share))
            failed = self._compute(todo, lambda: bar.update(share))
        if failed:
            raise self._failure(failed)
        return files

    def _compute(self, todo: list[int], advance: Callable[[], object]) -> dict[int, BaseException]:
        tries: Counter[int] = Counter()
        failed: dict[int, BaseException] = {}
        waiting = {number: self._submit(number) for number in todo}
        try:
            while waiting:
                number = next(iter(waiting))
                try:
                    waiting[number].result()
                except (ValueError, TypeError):
                    raise  # what the verb refuses it refuses everywhere
                except Exception as error:
                    if not _whole(_file(self.folder, number, self.count)):  # else it was lost after it was done
                        self._again(number, error, waiting, tries, failed)
                        continue
                del waiting[number]
                advance()
        finally:
            for future in waiting.values():
                getattr(future, "cancel", lambda: None)()
        return failed

    def _again(
        self,
        number: int,
        error: Exception,
        waiting: dict[int, Future],
        tries: Counter[int],
        failed: dict[int, BaseException],
    ) -> None:
        """Hands a lost shard in again, and where the workers themselves are gone all that they had."""
        log.warning("shard %d of %d was lost: %s", number, self.count, error)
        tries[number] += 1
        lost = [number]
        if isinstance(error, BrokenExecutor) and hasattr(self.engine, "renew"):
            self.engine.renew()
            lost = [each for each in waiting if not _whole(_file(self.folder, each, self.count))]
        if tries[number] >= TRIES:
            failed[number] = error
            del waiting[number]
            lost = [each for each in lost if each != number]
        try:
            waiting |= {each: self._submit(each) for each in lost}
        except Exception as broken:
            failed |= dict.fromkeys(waiting, broken)
            waiting.clear()

    def _submit(self, number: int) -> Future:
        return self.engine.submit(compute, str(self.folder), number, self.count)

    def _failure(self, failed: dict[int, BaseException]) -> RuntimeError:
        names = ", ".join(f"{number}/{self.count}" for number in sorted(failed))
        last = next(reversed(failed.values()))
        found = RuntimeError(
            f"{len(failed)} of {self.count} shards failed or were lost {TRIES} times: {names}; the last error was "
            f"{type(last).__name__}: {last}. The others lie in {self.folder}: the same call with "
            "executor=Spread(engine, folder=...) of a folder that stays goes on from what is done"
        )
        found.__cause__ = last
        return found


def _whole(file: Path) -> bool:
    """Whether a shard's file is there and can be read."""
    try:
        Effects.load(file)
    except (FileNotFoundError, ValueError):
        return False
    return True


def on_ray(**options: Any) -> Engine:
    """An engine that runs on Ray's cluster: what `ray.init` has connected to, or this machine.

    `options` go to each task, as to `ray.remote`: `num_cpus=1`, `num_gpus=.5`, `max_retries=3`. Install
    `clip_lens[ray]`. Every machine must see the folder of `Spread(on_ray(), folder=...)`.

    Raises:
        ImportError: ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("on_ray needs ray: pip install 'clip_lens[ray]'") from error
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, include_dashboard=False)
    return _OnRay(ray, options)


@dataclass(frozen=True)
class _OnRay:
    ray: Any
    options: dict[str, Any]

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future:
        remote = self.ray.remote(function)
        return _RayFuture(self.ray, (remote.options(**self.options) if self.options else remote).remote(*arguments))


@dataclass(frozen=True)
class _RayFuture:
    ray: Any
    reference: Any

    def result(self) -> Any:
        return self.ray.get(self.reference)

    def cancel(self) -> None:
        self.ray.cancel(self.reference, force=True)
