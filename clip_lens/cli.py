"""The command line: one subcommand per verb. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from clip_lens.core.effects import Effects
    from clip_lens.data.batch import Batch
    from clip_lens.data.images import ImageStore
    from clip_lens.data.pairs import Pairs
    from clip_lens.model.encoder import HookedTextEncoder
    from clip_lens.model.site import Site

app = typer.Typer(
    name="clip-lens",
    help="How a CLIP text encoder computes what it says: causal tracing, patching, pictures.",
    epilog="Start with: clip-lens demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


INTERRUPTED = 130


class Run(str, Enum):
    """Which text is run and patched."""

    affirmative = "affirmative"
    negated = "negated"
    caption = "caption"
    foil = "foil"


class By(str, Enum):
    """How positions are addressed."""

    slot = "slot"
    position = "position"


Model = Annotated[str, typer.Option(help="'tiny' (embedded), or a model of open_clip's.", rich_help_panel="Model")]
Pretrained = Annotated[
    Optional[str],  # noqa: UP045 - typer reads this at run time, on Python 3.10 too
    typer.Option(help="A tag of open_clip's, a checkpoint file, or 'random'.", rich_help_panel="Model"),
]
Device = Annotated[str, typer.Option(help="Where to compute, as torch names it.", rich_help_panel="Model")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """How a CLIP text encoder computes what it says: causal tracing, patching, pictures."""


@app.command(
    epilog="Example: clip-lens demo --out first-look",
)
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("clip-lens-demo"),
    quiet: Quiet = False,
) -> None:
    """Trace how the embedded CLIP processes negation, and write a report. Takes half a minute, needs nothing else."""
    from clip_lens.data.images import ImageStore
    from clip_lens.data.pairs import read_pairs
    from clip_lens.model.load import load
    from clip_lens.openclip import ASSETS

    _say("Loading the embedded CLIP ...")
    encoder, pairs, store = load(), read_pairs(), ImageStore.open("tiny")
    _trace(encoder, pairs, store, out, pictures=ASSETS / "tiny" / "pictures", progress=not quiet)


@app.command(
    epilog="Examples: clip-lens trace --pairs my.csv --images my-pictures/ --out traced   |   "
    "clip-lens trace --model ViT-B-32 --pretrained openai --pairs existence.json --rephrased "
    "--images v7w.safetensors --out traced",
)
def trace(
    pairs: Annotated[str, typer.Option(help="Caption-foil pairs: .csv, .json, .jsonl, a VALSE file, or 'tiny'.")],
    images: Annotated[str, typer.Option(help="Their images: a store (.safetensors), a folder of pictures, or 'tiny'.")],
    out: Annotated[Path, typer.Option(help="The folder to write to; results that are there already are reused.")],
    model: Model = "tiny",
    pretrained: Pretrained = None,
    run: Annotated[Run, typer.Option(help="Which text is run and patched.")] = Run.affirmative,
    kind: Annotated[str, typer.Option(help="Kind of site: resid, mid, attn, mlp, head, q, k, v, pattern.")] = "resid",
    segment: Annotated[str, typer.Option(help="correct, ambiguous, incorrect, or all pairs.")] = "correct",
    rephrased: Annotated[
        bool, typer.Option("--rephrased", help="VALSE existence: make both texts equally long, as the paper does.")
    ] = False,
    any_store: Annotated[bool, typer.Option("--any-store", help="Accept image embeddings of another model.")] = False,
    rows: Annotated[int, typer.Option(help="Sequences in one forward pass; bounds the memory.", min=1)] = 256,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Causal tracing on your own pairs: by layer and slot, for both sides of the negation, with a report."""
    from clip_lens.data.pairs import read_pairs
    from clip_lens.model.load import load

    chosen = read_pairs(pairs)
    chosen = chosen.rephrased() if rephrased else chosen
    store = _open_images(images, model, pretrained, out, device, quiet)
    _say(f"Loading {model} ...")
    encoder = load(model, pretrained=pretrained, device=device)
    pictures = Path(images) if Path(images).is_dir() else None
    _trace(encoder, chosen, store, out, run.value, kind, segment, rows, any_store, pictures, progress=not quiet)


@app.command(
    epilog="Example: clip-lens embed pictures/ --model ViT-B-32 --pretrained openai --out pictures.safetensors",
)
def embed(
    images: Annotated[list[Path], typer.Argument(help="A folder of pictures, or files.")],
    out: Annotated[Path, typer.Option(help="The store to write (.safetensors); a finished one is extended.")],
    model: Model = "tiny",
    pretrained: Pretrained = None,
    batch_size: Annotated[int, typer.Option(help="Images in one forward pass.", min=1)] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that another model made.")] = False,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Compute image embeddings once and store them. An interrupted run goes on where it stopped."""
    from clip_lens.data.images import embed_images

    paths = images[0] if len(images) == 1 else list(images)
    store = embed_images(
        paths,
        model=model,
        pretrained=pretrained,
        out=out,
        batch_size=batch_size,
        device=device,
        progress=not quiet,
        overwrite=overwrite,
    )
    _say(f"{len(store)} embeddings in {out}, {len(store.failed)} images failed")
    for name, reason in store.failed:
        _say(f"  {name}: {reason}")


@app.command(epilog="Examples: clip-lens info   |   clip-lens info traced/resid.parquet   |   clip-lens info my.csv")
def info(
    what: Annotated[
        str, typer.Argument(help="'tiny', a model of open_clip's, or a file: pairs, image store, effects.")
    ] = "tiny",
    pretrained: Pretrained = None,
) -> None:
    """Say what a model or a file is."""
    path = Path(what)
    if path.suffix == ".parquet":
        from clip_lens.core.effects import Effects

        effects = Effects.load(path)
        _say(repr(effects))
        for name, value in effects.meta.items():
            _say(f"  {name}: {value}")
    elif path.suffix == ".safetensors":
        from clip_lens.data.images import ImageStore

        store = ImageStore.open(path)
        _say(repr(store))
        for name, value in store.provenance.items():
            _say(f"  {name}: {value}")
    elif path.suffix in (".csv", ".json", ".jsonl"):
        from clip_lens.data.pairs import read_pairs

        _say(repr(read_pairs(path)))
    else:
        from clip_lens.model.load import load

        encoder = load(what, pretrained=pretrained)
        _say(repr(encoder))
        _say(f"  weights {encoder.digest}, image tower {encoder.image_digest}")


def _open_images(images: str, model: str, pretrained: str | None, out: Path, device: str, quiet: bool) -> ImageStore:
    from clip_lens.data.images import ImageStore, embed_images

    if not Path(images).is_dir():
        return ImageStore.open(images)
    _say(f"Embedding the pictures in {images} ...")
    out.mkdir(parents=True, exist_ok=True)
    return embed_images(
        images, model=model, pretrained=pretrained, out=out / "images.safetensors", device=device, progress=not quiet
    )


def _trace(
    encoder: HookedTextEncoder,
    pairs: Pairs,
    store: ImageStore,
    out: Path,
    run: str = "affirmative",
    kind: str = "resid",
    segment: str = "correct",
    rows: int = 256,
    any_store: bool = False,
    pictures: Path | None = None,
    progress: bool = True,
) -> None:
    """Causal tracing by whole slots and by single positions: two results, a table, a report."""
    from clip_lens.data.batch import align
    from clip_lens.show.report import report

    batch = align(pairs, store, encoder, run=run, any_store=any_store)  # type: ignore[arg-type]
    _say(repr(batch))
    out.mkdir(parents=True, exist_ok=True)
    present = [name for name in batch.slots if (batch.slot == batch.slots.index(name)).any()]
    whole, single = (_layers(encoder, kind, slots) for slots in (present, range(batch.tokens.shape[1])))
    by_slot = _sweep(encoder, batch, whole, out / f"{kind}-slots.parquet", rows, progress)
    by_position = _sweep(encoder, batch, single, out / f"{kind}-positions.parquet", rows, progress)
    chosen = by_slot if segment == "all" else _segment(by_slot, segment)
    keys = set(chosen.pairs["key"])
    positions = by_position.where(key=lambda column: column.isin(keys)).by_slot(batch)
    results = {f"{kind}: whole slots": chosen, f"{kind}: single positions": positions}
    chosen.table().to_csv(out / "table.csv", index=False)
    page = report(results, out / "report.html", title=_title(encoder, batch), pictures=pictures)
    _print_table(chosen)
    _say(f"\nThe report is {page}; table.csv and the .parquet files beside it hold the numbers.")


def _layers(encoder: HookedTextEncoder, kind: str, slots: Iterable[str | int]) -> list[Site]:
    """One place per layer and slot: of kinds with heads or neurons, all of them together."""
    from dataclasses import replace

    sites = encoder.sites(kind, slots=slots)  # type: ignore[arg-type]
    return list(dict.fromkeys(replace(site, unit=None) for site in sites))


def _sweep(
    encoder: HookedTextEncoder, batch: Batch, places: Sequence[Site], path: Path, rows: int, progress: bool
) -> Effects:
    """A sweep, or the finished one that is there already."""
    from clip_lens.core.effects import Effects
    from clip_lens.core.metric import logit
    from clip_lens.core.source import counterpart
    from clip_lens.methods.patching import METHOD, describe, patch_effects

    meta = describe(encoder, batch, method=METHOD, source=counterpart, metric=logit)
    if path.exists():
        done = Effects.load(path)
        if dict(done.meta) == meta and done.places == tuple(places):
            _say(f"{path} is there already and fits: reused")
            return done
    effects = patch_effects(encoder, batch, places, rows=rows, progress=progress)
    effects.save(path)
    return effects


def _segment(effects: Effects, segment: str) -> Effects:
    counts = effects.pairs["segment"].value_counts().to_dict()
    if segment not in counts:
        raise ValueError(f"no pair is {segment!r}, there are {counts}; give --segment with one of these, or all")
    return effects.where(segment=segment)


def _title(encoder: HookedTextEncoder, batch: Batch) -> str:
    return f"Where {encoder.full_name} processes negation: {batch.pairs.name}"


def _print_table(effects: Effects) -> None:
    from rich.console import Console
    from rich.table import Table

    for side in dict.fromkeys(effects.pairs["side"]):
        grid = effects.grid(side=side)
        count = int((effects.pairs["side"] == side).sum())
        table = Table(title=f"share of d that patching a whole slot moves; negation in the {side}, {count} pairs")
        table.add_column("slot \\ layer")
        for layer in grid.columns:
            table.add_column(str(layer), justify="right")
        for slot, line in grid.iterrows():
            table.add_row(str(slot), *(f"{value:.2f}" if value == value else "" for value in line))
        Console().print(table)


def _say(line: str) -> None:
    typer.echo(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; errors are one readable line on stderr (--debug: the traceback) and an exit code.

    0: done. 1: something that was given does not fit. 2: the call's words are off. 130: interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    try:
        code = app(given, standalone_mode=False, prog_name="clip-lens")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return _complain(error)
    if code == INTERRUPTED:
        typer.echo("interrupted; the same command goes on from what is finished", err=True)
    return code if isinstance(code, int) else 0


def _complain(error: Exception) -> int:
    """One line on stderr; usage errors bring their own text and exit code."""
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):
        show()
        return int(error.exit_code)
    line = " ".join(str(error).split()) or type(error).__name__
    typer.echo(f"clip-lens: {line}", err=True)
    return 1


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
