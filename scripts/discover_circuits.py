"""Circuits of many models x pair sets x methods, found on one split of the pairs and judged on the other.

    python scripts/discover_circuits.py scripts/discover_circuits.toml

The config is TOML; scripts/discover_circuits.toml shows its keys. Each run has a folder OUT/MODEL/PAIRS/METHOD with the
scores (.parquet), the circuit (circuit-METHOD-EDGES.json), its numbers (summary-METHOD-EDGES.csv) and a report.html;
what the methods of one model and pair set share lies beside their folders. OUT/summary.csv and OUT/report.html compare
all runs: f over size of the methods in one picture, and how much the circuits of towers of one shape have in common.
Started again, finished results are read and the rest goes on. A run that fails is listed, the others go on; the exit
code is 1 then.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from clip_lens.data.batch import Batch
    from clip_lens.data.images import ImageStore
    from clip_lens.methods.circuits.discover import Discovery
    from clip_lens.model.encoder import HookedTextEncoder


@dataclass(frozen=True)
class Model:
    """A model, as `clip_lens.load` takes it."""

    name: str
    pretrained: str | None = None
    device: str = "cpu"

    @property
    def folder(self) -> str:
        return _plain(self.name if self.pretrained is None else f"{self.name}-{self.pretrained}")


@dataclass(frozen=True)
class PairSet:
    """A file of pairs with their images: a store, a folder of pictures, or one of these for each model by its name."""

    name: str
    file: str = "tiny"
    images: str | Mapping[str, str] = "tiny"
    rephrased: bool = False
    side: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Config:
    """What is to be run; `base` is the folder that its paths are relative to."""

    model: tuple[Model, ...]
    pairs: tuple[PairSet, ...]
    out: str = "circuits"
    methods: tuple[str, ...] = ("eap-ig", "random")
    edges: int = 200
    steps: int = 5
    threshold: float = 0.02
    exact: bool = False
    split: float = 0.5
    by: str = "text"
    run: str = "caption"
    rows: int = 256
    seed: int = 0
    base: Path = field(default=Path())


@dataclass
class Results:
    """What came of the runs: discoveries by model and pair set, and why the others failed."""

    found: dict[str, list[Discovery]] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)
    cautions: dict[str, None] = field(default_factory=dict)

    def add(self, name: str, method: str, done: Discovery | Exception) -> None:
        """A run that is done, or why it is not."""
        if isinstance(done, Exception):
            self.failed.append((f"{name}, {method}", " ".join(str(done).split()) or type(done).__name__))
        else:
            self.found.setdefault(name, []).append(done)


def main(arguments: list[str] | None = None) -> int:
    """0 when every run is done, 1 when one failed or the config can't be read, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="what to run, as TOML")
    parser.add_argument("--out", type=Path, help="another folder than the config's")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(arguments)
    try:
        config = read_config(given.config)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out = given.out or config.base / config.out
    try:
        results = run_all(config, out, progress=not given.quiet)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    if results.found:
        print(f"The report is {compare(results, out)}; summary.csv beside it has a row per run and side.")
    for name, reason in results.failed:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    total = len(config.model) * len(config.pairs) * len(config.methods)
    print(f"{total - len(results.failed)} of {total} runs done, {len(results.failed)} failed")
    return 1 if results.failed else 0


def read_config(path: Path) -> Config:
    """The config of a file.

    Raises:
        OSError: there is no such file.
        ValueError: no TOML, an unknown or missing key, a value of another type, an unknown method, names that repeat.
    """
    from clip_lens.methods.circuits.discover import FINDERS

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    tables = {name: content.get(name) for name, kind in (("model", Model), ("pairs", PairSet))}
    for name, lines in tables.items():
        if not isinstance(lines, list) or not lines:
            raise ValueError(f"{path} needs at least one [[{name}]]")
    content["model"] = tuple(_checked(Model, line, f"{path}, [[model]]") for line in content["model"])
    content["pairs"] = tuple(_checked(PairSet, line, f"{path}, [[pairs]]") for line in content["pairs"])
    content["methods"] = _listed(content.get("methods", Config.methods), path)
    config = _checked(Config, {**content, "base": path.parent}, str(path))
    if unknown := [name for name in config.methods if name not in FINDERS]:
        raise ValueError(f"{path}: no method {unknown[0]!r}; there are {', '.join(FINDERS)}")
    for name, entries in (("model", [m.folder for m in config.model]), ("pairs", [p.name for p in config.pairs])):
        if len(set(entries)) < len(entries):
            raise ValueError(f"{path}: two [[{name}]] are called {_repeated(entries)!r}; name them apart")
    return config


TYPES = {
    "out": str, "methods": tuple, "edges": int, "steps": int, "threshold": (int, float), "exact": bool, "split": float,
    "by": str, "run": str, "rows": int, "seed": int, "name": str, "pretrained": str, "device": str, "file": str,
    "images": (str, dict), "rephrased": bool, "side": str, "limit": int,
}  # fmt: skip


def _checked(kind: type, entries: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a table of the config, after what can be wrong with its keys."""
    known = {part.name: part for part in fields(kind)}
    if unknown := [name for name in entries if name not in known]:
        there = ", ".join(name for name in known if name != "base")
        raise ValueError(f"{where}: no key {unknown[0]!r}; there are {there}")
    missing = [name for name, part in known.items() if name not in entries and _needed(part)]
    if missing:
        raise ValueError(f"{where}: the key {missing[0]!r} is missing")
    for name, value in entries.items():
        wanted = TYPES.get(name)
        if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
            words = wanted.__name__ if isinstance(wanted, type) else " or ".join(part.__name__ for part in wanted)
            raise ValueError(f"{where}: {name} = {value!r} must be {words}")
    return kind(**entries)


def _listed(methods: Any, path: Path) -> tuple[str, ...]:
    if isinstance(methods, str) or not isinstance(methods, list | tuple) or not methods:
        raise ValueError(f"{path}: methods must be a list, such as {list(Config.methods)}. Got {methods!r}")
    return tuple(methods)


def _needed(part: Any) -> bool:
    return part.default is MISSING and part.default_factory is MISSING


def _repeated(entries: list[str]) -> str:
    return next(name for name in entries if entries.count(name) > 1)


def run_all(config: Config, out: Path, *, progress: bool = True) -> Results:
    """Every method on every model and pair set; what fails is noted, the rest goes on."""
    results = Results()
    for model in config.model:
        encoder = _attempt(_load, config, model)
        for pairs in config.pairs:
            name, folder = f"{model.folder}, {pairs.name}", out / model.folder / _plain(pairs.name)
            splits = _attempt(_prepared, config, model, pairs, encoder, folder)
            results.cautions |= dict.fromkeys([] if isinstance(splits, Exception) else _cautions(encoder, splits))
            for method in config.methods:
                print(f"{name}, {method} ...", flush=True)
                results.add(name, method, _attempt(discovered, config, encoder, splits, method, folder, progress))
    return results


def _attempt(compute: Callable[..., Any], *given: Any) -> Any:
    """What it gives, or why it fails: because of itself, or because of what it was to be given."""
    failed = [part for part in given if isinstance(part, Exception)]
    if failed:
        return failed[0]
    try:
        return compute(*given)
    except (OSError, ValueError, RuntimeError) as error:  # what a wrong file, model or number and a full device raise
        return error


def _load(config: Config, model: Model) -> HookedTextEncoder:
    from clip_lens.model.load import load

    local = model.pretrained and (config.base / model.pretrained)
    pretrained = str(local) if local and local.is_file() else model.pretrained
    return load(model.name, pretrained=pretrained, device=model.device)


def _prepared(
    config: Config, model: Model, pairs: PairSet, encoder: HookedTextEncoder, folder: Path
) -> tuple[Batch, Batch]:
    """The two splits of a pair set, aligned for a model."""
    from clip_lens.data.batch import align
    from clip_lens.data.read import read_pairs

    chosen = read_pairs(_path(config, pairs.file))
    chosen = chosen.rephrased() if pairs.rephrased else chosen
    if pairs.side is not None:
        chosen = chosen[[row for row, side in enumerate(chosen.side) if side == pairs.side]]
    chosen = chosen[: pairs.limit]
    if not len(chosen):
        raise ValueError(f"no pairs of {pairs.name} are left (side = {pairs.side!r}, limit = {pairs.limit})")
    batch = align(chosen, _images(config, model, pairs, folder), encoder, run=config.run)
    return batch.split(config.split, config.seed, config.by)


def _images(config: Config, model: Model, pairs: PairSet, folder: Path) -> ImageStore:
    from clip_lens.data.embed import embed_images
    from clip_lens.data.images import ImageStore

    images = pairs.images
    if not isinstance(images, str):
        if model.name not in images:
            raise ValueError(f"images of {pairs.name} has no store for {model.name}; it has {', '.join(images)}")
        images = images[model.name]
    path = _path(config, images)
    if not Path(path).is_dir():
        return ImageStore.open(path)
    folder.mkdir(parents=True, exist_ok=True)
    return embed_images(
        path, model=model.name, pretrained=model.pretrained, out=folder / "images.safetensors", device=model.device
    )


def discovered(
    config: Config,
    encoder: HookedTextEncoder,
    splits: tuple[Batch, Batch],
    method: str,
    folder: Path,
    progress: bool,
) -> Discovery:
    """One run, with its report in its folder."""
    from clip_lens.core.keep import Keep
    from clip_lens.methods.circuits.discover import discover
    from clip_lens.show.questions.circuits import circuit_report

    done = discover(
        encoder, *splits, method=method, edges=config.edges, steps=config.steps, threshold=config.threshold,
        exact=config.exact, keep=Keep(folder / method, print), shared=Keep(folder), rows=config.rows,
        seed=config.seed, progress=progress,
    )  # fmt: skip
    circuit_report(done, folder / method / "report.html", warnings=_cautions(encoder, splits))
    return done


def _cautions(encoder: HookedTextEncoder, splits: tuple[Batch, Batch]) -> list[str]:
    """What a reader must know of the model and the images before any number."""
    from clip_lens.show.questions.cautions import cautions

    return cautions(encoder, splits[1])


def compare(results: Results, out: Path) -> Path:
    """The report and the table over all runs that were done."""
    from clip_lens.core.spreadsheet import write_csv
    from clip_lens.show.questions.circuits import comparison, methods, summaries
    from clip_lens.show.report.report import report

    write_csv(summaries(results.found), out / "summary.csv")
    every = [found for discoveries in results.found.values() for found in discoveries]
    return report(
        comparison(results.found),
        out / "report.html",
        title="Circuits by model, pairs and method",
        warnings=[*results.cautions, *(f"{name} failed: {reason}" for name, reason in results.failed)],
        methods=methods(every),
    )


def _path(config: Config, name: str) -> str:
    """ "tiny", or a path relative to the config."""
    return name if name == "tiny" else str(config.base / name)


def _plain(name: str) -> str:
    """A name that a folder can have."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


if __name__ == "__main__":
    sys.exit(main())
