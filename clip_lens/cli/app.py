"""The command line: one subcommand per verb. Heavy imports happen inside the commands: --help answers at once."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from clip_lens.cli import options
from clip_lens.cli.job import Job, name_of, on_pairs, open_job, say
from clip_lens.cli.tables import print_sides

if TYPE_CHECKING:
    from clip_lens.core.source import Function, Source
    from clip_lens.data.batch import Batch
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


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        say(f"clip-lens {version('clip_lens')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is loaded, computed and written.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """How a CLIP text encoder computes what it says: causal tracing, patching, pictures."""
    if verbose:
        import logging

        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("clip_lens").setLevel(logging.INFO)


@app.command(
    epilog="Example: clip-lens demo --out first-look",
)
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("clip-lens-demo"),
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Trace how the embedded CLIP processes negation, and write a report. Takes half a minute, needs nothing else."""
    _trace(open_job(out, overwrite=overwrite, quiet=quiet), "resid")


@app.command(
    epilog="Examples: clip-lens trace --pairs my.csv --images my-pictures/ --out traced   |   "
    "clip-lens trace --model ViT-B-32 --pretrained openai --pairs existence.json --rephrased "
    "--images v7w.safetensors --out traced",
)
@on_pairs(pairs=inspect.Parameter.empty)
def trace(job: Job, kind: options.Kinds = "resid", metric: options.MetricOption = "logit") -> None:
    """Causal tracing on your own pairs: by layer and slot, for each side, with a report."""
    _trace(job.measured(metric), kind)


@app.command(
    epilog="Examples: clip-lens patch --sites head --by slot --out heads   |   "
    "clip-lens patch --sites pattern --pairs my.csv --images my-pictures/ --out patterns",
)
@on_pairs()
def patch(
    job: Job,
    kind: options.Kinds = "head",
    by: options.ByOption = "text",
    metric: options.MetricOption = "logit",
) -> None:
    """Activation patching of every head, neuron or stream, each on its own, from the other text."""
    from clip_lens.core.source import counterpart

    _sites(
        job.measured(metric), name_of("patch", kind, by), kind, by, counterpart, f"{kind} patched from the other text"
    )


@app.command(
    epilog="Examples: clip-lens ablate --sites head --with mean --out ablated   |   "
    "clip-lens ablate --sites mlp --with noise --std 0.5 --run caption --out noisy",
)
@on_pairs(run="caption", segment="all")
def ablate(
    job: Job,
    kind: options.Kinds = "head",
    by: options.ByOption = "text",
    replacement: Annotated[options.Replacement, typer.Option("--with", help="What replaces the activation.")] = "mean",
    std: options.Std = 1.0,
    seed: Annotated[int, typer.Option(help="resample, noise: the seed.")] = 0,
    metric: options.MetricOption = "logit",
) -> None:
    """Ablation: what the metric loses when an activation is replaced by zero, its mean, another text's, or noise."""
    source, told = _source(replacement, std, seed)
    _sites(job.measured(metric), name_of("ablate", kind, by, told), kind, by, source, f"{kind} ablated: {told}")


@app.command(
    epilog="Examples: clip-lens paths --from 0.1,0.2 --to q,k,v --out paths   |   "
    "clip-lens paths --from head --to out --through mlp --out to-output",
)
@on_pairs()
def paths(
    job: Job,
    senders: Annotated[
        str, typer.Option("--from", help="embed, head, mlp, a head (2.3), a layer (head2, mlp2); commas.")
    ],
    receivers: Annotated[
        str, typer.Option("--to", help="q, k, v, mlp, out, one of them (q3.1), a layer (v3); commas.")
    ],
    through: Annotated[options.Through, typer.Option(help="The direct path, or every path through MLPs.")] = "direct",
) -> None:
    """Path patching: what each sender moves through each receiver."""
    from clip_lens.core.source import counterpart
    from clip_lens.methods.paths import METHODS, existing_paths, path_effects

    ends = [_ends(words, job.encoder) for words in (senders, receivers)]
    places = [place for _, _, place in existing_paths(*ends)]
    name = name_of("paths", through, senders, "to", receivers)
    compute = lambda _: path_effects(job.encoder, job.batch, *ends, through=through, **job.how(name))
    wanted = job.setting(counterpart).record(METHODS[through])
    effects = job.kept(name, wanted, places, compute, whole=True)
    if not job.is_part():
        job.write(name, {f"paths, {through}": job.chosen(effects)})


@app.command(
    epilog="Examples: clip-lens study --out studied   |   clip-lens study --model ViT-B-32 --pretrained openai "
    "--pairs existence.json --rephrased --images v7w.safetensors --out studied",
)
@on_pairs()
def study(
    job: Job, seed: Annotated[int, typer.Option(help="The seed of the probe's split and random directions.")] = 0
) -> None:
    """The negation study, whole: where negation is, which heads carry it, what confounds the score; one report."""
    from clip_lens.show.questions.study import study as write

    job.refuse_shard("study")
    page = write(
        job.encoder, job.batch, job.out, segment=job.segment, images=job.images, any_store=job.any_store,
        pictures=job.pictures, rows=job.rows, seed=seed, overwrite=job.overwrite, progress=job.progress,
        jobs=job.jobs, say=say,
    )  # fmt: skip
    say(f"The report is {page}; the .parquet files beside it hold the numbers.")


@app.command(
    epilog="Examples: clip-lens circuit --exact --out circuit   |   "
    "clip-lens circuit --method acdc --threshold 0.2 --pairs my.csv --images my-pictures/ --out searched",
)
@on_pairs(run="caption", segment="all")
def circuit(
    job: Job,
    method: options.Finder = "eap-ig",
    edges: Annotated[int, typer.Option(help="Edges of the circuit, before pruning (all but acdc).", min=1)] = 200,
    steps: Annotated[int, typer.Option(help="eap-ig: steps of the integral.", min=1)] = 5,
    threshold: Annotated[
        float, typer.Option(help="acdc: the change of d, in logits, below which an edge goes.")
    ] = 0.02,
    source: Annotated[
        options.SourceName, typer.Option(help="What the edges outside of the circuit carry.")
    ] = "counterpart",
    std: options.Std = 1.0,
    split: Annotated[float, typer.Option(help="The share of the pairs on which the circuit is found.")] = 0.5,
    split_by: Annotated[
        options.SplitBy,
        typer.Option(help="What the two parts do not share: texts and images, or images alone."),
    ] = "text",
    exact: Annotated[
        bool, typer.Option("--exact", help="Patch every edge on the held-out pairs too, to compare.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The seed of split, random circuits and resampling.")] = 0,
) -> None:
    """Find the circuit behind d on one part of the pairs, judge it on the other: f, CPR, CMD, stability; a report."""
    from clip_lens.methods.circuits.discover import discover
    from clip_lens.methods.circuits.finders import FINDERS, Options
    from clip_lens.show.questions.cautions import cautions
    from clip_lens.show.questions.circuits import circuit_report
    from clip_lens.show.report.report import page_in

    job.refuse_shard("circuit")
    batch = job.of_segment()
    found, judged = batch.split(split, seed, by=split_by)
    discovery = discover(
        job.encoder, found, judged, method=method, edges=edges, steps=steps, threshold=threshold, exact=exact,
        source=_source(source, std, seed)[0], keep=job.keep, rows=job.rows, seed=seed, progress=job.progress,
        jobs=job.jobs,
    )  # fmt: skip
    file = FINDERS[method].file(Options(edges, steps, threshold, seed))
    compared = f"{file}-exact" if exact else file
    name = name_of("circuit", compared)
    page = circuit_report(
        discovery, page_in(job.out, name), pictures=job.pictures, warnings=cautions(job.encoder, batch), name=name
    )
    print_sides(discovery.summary.drop(columns="method").set_index("side"), repr(discovery))
    say(
        f"\nThe report is {page}; circuit-{file}.json, summary-{compared}.csv and the .parquet files beside it hold "
        "the numbers."
    )


@app.command(
    epilog="Examples: clip-lens compare before/heads.parquet after/heads.parquet --out compared   |   "
    "clip-lens compare one/circuit-eap-200.json two/circuit-eap-200.json --out compared   |   "
    "clip-lens compare tiny tiny@without --sites head --out compared",
)
def compare(
    a: Annotated[
        str, typer.Argument(help="A kept result (.parquet), a circuit (.json), or a model: NAME or NAME@PRETRAINED.")
    ],
    b: Annotated[str, typer.Argument(help="What it is compared with, of the same sort: B minus A.")],
    out: options.Out,
    pairs: options.PairsFile = "tiny",
    images: options.Images = "tiny",
    images_b: options.ImagesOfB = None,
    run: options.RunOption = None,
    kind: options.Kinds = "head",
    by: options.ByOption = "text",
    any_store: options.AnyStore = False,
    overwrite: options.Overwrite = False,
    rows: options.Rows = 256,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
) -> None:
    """Two results, two circuits, or two models on the same pairs: what differs, with paired intervals; a report.

    Of two models every place is patched from the other text in each, and, where they are of one shape, swapped for the
    other model's.
    """
    from clip_lens.cli.compared import circuits, models, results

    ends = {Path(given).suffix for given in (a, b)}
    if ends == {".parquet"}:
        return results(Path(a), Path(b), out)
    if ends == {".json"}:
        return circuits(Path(a), Path(b), out)
    if ends & {".parquet", ".json"}:
        raise ValueError(f"{a} and {b} are of different sorts; give two results, two circuits or two models")
    jobs = [
        open_job(
            out, pairs, store, *named(given), run, "all", any_store=any_store, overwrite=overwrite, rows=rows,
            device=device, quiet=quiet,
        )
        for given, store in ((a, images), (b, images_b or images))
    ]  # fmt: skip
    return models(jobs[0], jobs[1], (a, b), kind, lambda job: job.encoder.sites(kind, slots=_slots(job.batch, by)))  # type: ignore[arg-type]


def named(model: str) -> tuple[str, str | None]:
    """A model and its weights, as the command line names both in one word.

    Example:
        >>> named("ViT-B-32@openai"), named("tiny")
        (('ViT-B-32', 'openai'), ('tiny', None))
    """
    name, _, pretrained = model.partition("@")
    return name, pretrained or None


@app.command(
    epilog="Example: clip-lens embed pictures/ --model ViT-B-32 --pretrained openai --out pictures.safetensors",
)
def embed(
    images: Annotated[list[Path], typer.Argument(help="A folder of pictures, or files.")],
    out: Annotated[Path, typer.Option(help="The store to write (.safetensors); a finished one is extended.")],
    model: options.Model = "tiny",
    pretrained: options.Pretrained = None,
    batch_size: Annotated[int, typer.Option(help="Images in one forward pass.", min=1)] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that another model made.")] = False,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
    like: options.Like = None,
    quick_gelu: options.QuickGelu = None,
    pairs: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Embed the images of this file of pairs alone, cropped where it has boxes."),
    ] = None,
    format: options.Format = None,
) -> None:
    """Compute image embeddings once and store them. An interrupted run goes on where it stopped."""
    from clip_lens.data.embed import embed_images
    from clip_lens.data.read import read_pairs

    ids = None if pairs is None else read_pairs(pairs, format=format).images
    paths = images[0] if len(images) == 1 else list(images)
    store = embed_images(
        paths, model=model, pretrained=pretrained, ids=ids, out=out, batch_size=batch_size, device=device,
        progress=not quiet, overwrite=overwrite, like=like, quick_gelu=quick_gelu,
    )  # fmt: skip
    say(f"{len(store)} embeddings in {out}, {len(store.failed)} images failed")
    for name, reason in store.failed:
        say(f"  {name}: {reason}")


@app.command(
    epilog="Example: clip-lens trace --pairs my.csv --images my.safetensors --out traced --shard 0/3 (and 1/3, 2/3, "
    "each where it likes), clip-lens gather traced, and the first command again without --shard",
)
def gather(
    folder: Annotated[Path, typer.Argument(help="The --out of the commands that computed the shards.")],
    overwrite: options.Overwrite = False,
) -> None:
    """Put shards together: every result of a folder that was computed in parts (--shard)."""
    from clip_lens.cli.gathered import gathered

    for line in gathered(folder, overwrite):
        say(line)


@app.command(
    epilog="Examples: clip-lens info   |   clip-lens info traced/resid-slots.parquet   |   clip-lens info my.csv"
)
def info(
    what: Annotated[
        str,
        typer.Argument(
            help="'tiny', a model of open_clip's, a folder of one, or a file: pairs, an image store, a result, a "
            "table, a circuit, arrays."
        ),
    ] = "tiny",
    pretrained: options.Pretrained = None,
    like: options.Like = None,
    quick_gelu: options.QuickGelu = None,
) -> None:
    """Say what a model or a file is, and whether a file is what was written."""
    from clip_lens.cli.what import lines_on

    for line in lines_on(what, pretrained=pretrained, like=like, quick_gelu=quick_gelu):
        say(line)


def _trace(job: Job, kind: str) -> None:
    """Causal tracing by whole slots and by single positions: two results, a table, a report."""
    from clip_lens.core.source import counterpart
    from clip_lens.show.questions.where import SAME, WHAT_MAPS_SHOW, apart, right

    slots, positions = (_layers(job.encoder, kind, _slots(job.batch, by)) for by in ("slot", "position"))
    by_slot = job.patched(f"{kind}-slots", slots, counterpart)
    by_position = job.patched(f"{kind}-positions", positions, counterpart)
    if job.is_part():
        return
    whole, single = job.chosen(by_slot), job.chosen(by_position).by_slot(job.batch)
    further = apart(whole, single)
    results = {"By slot": whole, **({"By single token": single} if further > SAME else {})}
    points = [right(by_slot.pairs, whole.pairs, further)]
    job.write(name_of("trace", kind), results, summary=WHAT_MAPS_SHOW, points=points)


def _sites(job: Job, name: str, kind: str, by: str, source: Source | Function, title: str) -> None:
    """A sweep over the single places of a kind, a table, a report."""
    places = job.encoder.sites(kind, slots=_slots(job.batch, by))  # type: ignore[arg-type]
    effects = job.patched(name, places, source)
    if not job.is_part():
        job.write(name, {title: job.chosen(effects)})


def _source(name: str, std: float, seed: int) -> tuple[Source | Function, str]:
    """A source by its name on the command line, and what its files are called."""
    from clip_lens.core import source

    sources: dict[str, tuple[Source | Function, tuple[object, ...]]] = {
        "counterpart": (source.counterpart, ()),
        "zeros": (source.zeros, ()),
        "mean": (source.mean, ()),
        "resample": (source.resample(seed), (seed,)),
        "noise": (source.noise(std, seed), (f"{std:g}", seed)),
    }
    chosen, told = sources[name]
    return chosen, name_of(name, *told)


def _slots(batch: Batch, by: str) -> Sequence[str | int | None]:
    if by == "text":
        return (None,)
    return range(batch.tokens.shape[1]) if by == "position" else batch.occurring


def _layers(encoder: HookedTextEncoder, kind: str, slots: Iterable[str | int | None]) -> list[Site]:
    """One place per layer and slot: of kinds with heads or neurons, all of them together."""
    from dataclasses import replace

    sites = encoder.sites(kind, slots=slots)  # type: ignore[arg-type]
    return list(dict.fromkeys(replace(site, unit=None) for site in sites))


def _ends(words: str, encoder: HookedTextEncoder) -> list[Site]:
    """Senders or receivers as the command line names them."""
    ends = [site for word in filter(None, (part.strip() for part in words.split(","))) for site in _end(word, encoder)]
    if not ends:
        raise ValueError("no sender or receiver given")
    return ends


def _end(word: str, encoder: HookedTextEncoder) -> list[Site]:
    import re

    from clip_lens.model.site import Site

    match = re.fullmatch(r"(embed|out|head|mlp|q|k|v)?(?:(\d+)(?:\.(\d+))?)?", word)
    if match is None:
        raise ValueError(f"no sender or receiver {word!r}; give embed, head, mlp, q, k, v, out, 2.3, mlp2, q3.1, v3")
    kind, layer, unit = match[1] or "head", match[2], match[3]
    if kind in ("embed", "out"):
        return [Site(kind)]  # type: ignore[arg-type]
    layers = None if layer is None else [int(layer)]
    sites = encoder.sites(kind, layers=layers)  # type: ignore[arg-type]
    chosen = [site for site in sites if unit is None or site.unit == int(unit)]
    if not chosen:
        raise ValueError(f"{word!r} names no place of {encoder.name}, which has {encoder.n_heads} heads in a layer")
    return chosen


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


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line on stderr, without the place in the code that raised it, each once."""
    _warn_once(str(message))


@cache
def _warn_once(line: str) -> None:
    typer.echo(f"clip-lens: {line}", err=True)


def entry() -> None:
    """The console script."""
    warnings.showwarning = _warn
    sys.exit(main())


if __name__ == "__main__":
    entry()
