"""The command line: one subcommand per verb. Heavy imports happen inside the commands: --help answers at once."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, Optional

import typer

if TYPE_CHECKING:
    from pandas import DataFrame

    from clip_lens.core.effects import Effects
    from clip_lens.core.keep import Keep
    from clip_lens.core.source import Source
    from clip_lens.data.batch import Batch
    from clip_lens.data.images import ImageStore
    from clip_lens.model.encoder import HookedTextEncoder
    from clip_lens.model.site import Place, Site

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

    text = "text"
    slot = "slot"
    position = "position"


class Find(str, Enum):
    """How a circuit's edges are found."""

    exact = "exact"
    eap = "eap"
    eap_ig = "eap-ig"
    acdc = "acdc"
    random = "random"


class Through(str, Enum):
    """What a path may pass between sender and receiver."""

    direct = "direct"
    mlp = "mlp"


class With(str, Enum):
    """What an ablated activation is replaced by."""

    zeros = "zeros"
    mean = "mean"
    resample = "resample"
    noise = "noise"


Model = Annotated[
    str,
    typer.Option(
        help="'tiny' (embedded), a model of open_clip's, or a folder that transformers saved.", rich_help_panel="Model"
    ),
]
Pretrained = Annotated[
    Optional[str],  # noqa: UP045 - typer reads this at run time, on Python 3.10 too
    typer.Option(help="A tag of open_clip's, a checkpoint file, or 'random'.", rich_help_panel="Model"),
]
Device = Annotated[str, typer.Option(help="Where to compute, as torch names it.", rich_help_panel="Model")]
PairsFile = Annotated[str, typer.Option(help="Caption-foil pairs: .csv, .json, .jsonl, a VALSE file, or 'tiny'.")]
Images = Annotated[str, typer.Option(help="Their images: a store (.safetensors), a folder of pictures, or 'tiny'.")]
Out = Annotated[Path, typer.Option(help="The folder to write to; results that are there already are reused.")]
RunOption = Annotated[Run, typer.Option(help="Which text is run and patched.")]
Segment = Annotated[str, typer.Option(help="correct, ambiguous, incorrect, or all pairs.")]
Rephrased = Annotated[
    bool, typer.Option("--rephrased", help="VALSE existence: make both texts equally long, as the paper does.")
]
AnyStore = Annotated[bool, typer.Option("--any-store", help="Accept image embeddings of another model.")]
Rows = Annotated[int, typer.Option(help="Sequences in one forward pass; bounds the memory.", min=1)]


def _known_kind(kind: str) -> str:
    """Refused before anything is loaded: what names no kind of site."""
    from clip_lens.model.site import LAYOUTS

    if kind not in LAYOUTS:
        raise ValueError(f"no kind of site {kind!r}; the kinds are {', '.join(LAYOUTS)}")
    return kind


Kinds = Annotated[
    str,
    typer.Option(
        "--sites",
        help="Kind of site: resid, mid, attn, mlp, head, q, k, v, pattern, neuron.",
        callback=_known_kind,
    ),
]
ByOption = Annotated[By, typer.Option(help="Whole texts, named slots (all tokens together), or single positions.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


class Job(NamedTuple):
    """What every command on pairs works with."""

    encoder: HookedTextEncoder
    batch: Batch
    images: ImageStore
    out: Path
    pictures: Path | None
    segment: str
    rows: int
    progress: bool


def _job(
    out: Out,
    pairs: PairsFile = "tiny",
    images: Images = "tiny",
    model: Model = "tiny",
    pretrained: Pretrained = None,
    run: RunOption = Run.affirmative,
    segment: Segment = "correct",
    rephrased: Rephrased = False,
    any_store: AnyStore = False,
    rows: Rows = 256,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> Job:
    from clip_lens.data.batch import align
    from clip_lens.data.read import read_pairs
    from clip_lens.model.load import load
    from clip_lens.tiny.assets import ASSETS

    chosen = read_pairs(pairs)
    chosen = chosen.rephrased() if rephrased else chosen
    store = _open_images(images, model, pretrained, out, device, quiet)
    _say(f"Loading {model} ...")
    encoder = load(model, pretrained=pretrained, device=device)
    batch = align(chosen, store, encoder, run=run.value, any_store=any_store)
    _say(repr(batch))
    for reason, count in batch.dropped.reason.value_counts().items():
        _say(f"  {count} dropped: {reason}")
    out.mkdir(parents=True, exist_ok=True)
    shipped = ASSETS / "pictures" if images == "tiny" else None
    pictures = Path(images) if Path(images).is_dir() else shipped
    return Job(encoder, batch, store, out, pictures, segment, rows, not quiet)


def on_pairs(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function of a `Job` and of its own options a command that takes the options of `_job` too."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        shared = inspect.signature(_job, eval_str=True).parameters.values()
        shared_now = [part.replace(default=defaults.get(part.name, part.default)) for part in shared]

        def run(**given: object) -> None:
            job = _job(**{part.name: given.pop(part.name) for part in shared})  # type: ignore[arg-type]
            command(job, **given)

        options = [part.replace(kind=part.KEYWORD_ONLY) for part in (*own, *shared_now)]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        run.__annotations__ = {part.name: part.annotation for part in options}
        return run

    return decorate


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is loaded, computed and written.")] = False,
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
    quiet: Quiet = False,
) -> None:
    """Trace how the embedded CLIP processes negation, and write a report. Takes half a minute, needs nothing else."""
    _trace(_job(out, quiet=quiet), "resid")


@app.command(
    epilog="Examples: clip-lens trace --pairs my.csv --images my-pictures/ --out traced   |   "
    "clip-lens trace --model ViT-B-32 --pretrained openai --pairs existence.json --rephrased "
    "--images v7w.safetensors --out traced",
)
@on_pairs(pairs=inspect.Parameter.empty, images=inspect.Parameter.empty)
def trace(job: Job, kind: Kinds = "resid") -> None:
    """Causal tracing on your own pairs: by layer and slot, for both sides of the negation, with a report."""
    _trace(job, kind)


@app.command(
    epilog="Examples: clip-lens patch --sites head --by slot --out heads   |   "
    "clip-lens patch --sites pattern --pairs my.csv --images my-pictures/ --out patterns",
)
@on_pairs()
def patch(job: Job, kind: Kinds = "head", by: ByOption = By.text) -> None:
    """Activation patching of every head, neuron or stream, each on its own, from the other text."""
    from clip_lens.core.source import counterpart

    _sites(job, kind, by, counterpart, f"{kind} patched from the other text")


@app.command(
    epilog="Examples: clip-lens ablate --sites head --with mean --out ablated   |   "
    "clip-lens ablate --sites mlp --with noise --std 0.5 --run caption --out noisy",
)
@on_pairs(run=Run.caption, segment="all")
def ablate(
    job: Job,
    kind: Kinds = "head",
    by: ByOption = By.text,
    replacement: Annotated[With, typer.Option("--with", help="What replaces the activation.")] = With.mean,
    std: Annotated[float, typer.Option(help="noise: in standard deviations of the activation.", min=0.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="resample, noise: the seed.")] = 0,
) -> None:
    """Ablation: what the metric loses when an activation is replaced by zero, its mean, another text's, or noise."""
    from clip_lens.core import source

    sources = {
        With.zeros: source.zeros,
        With.mean: source.mean,
        With.resample: source.resample(seed),
        With.noise: source.noise(std, seed),
    }
    _sites(job, kind, by, sources[replacement], f"{kind} ablated: {replacement.value}")


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
    through: Annotated[Through, typer.Option(help="The direct path, or every path through MLPs.")] = Through.direct,
) -> None:
    """Path patching: what each sender moves through each receiver."""
    from clip_lens.core.source import counterpart
    from clip_lens.methods.paths import METHODS, existing_paths, path_effects

    ends = [_ends(words, job.encoder) for words in (senders, receivers)]
    places = [place for _, _, place in existing_paths(*ends)]
    compute = lambda _: path_effects(
        job.encoder, job.batch, *ends, through=through.value, rows=job.rows, progress=job.progress
    )
    meta = _meta(job, METHODS[through.value], counterpart)
    effects = _keep(job).effects(f"paths-{through.value}", meta, places, compute, whole=True)
    _write(job, {f"paths, {through.value}": _segmented(effects, job.segment)})


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

    page = write(
        job.encoder,
        job.batch,
        job.out,
        segment=job.segment,
        images=job.images,
        pictures=job.pictures,
        rows=job.rows,
        seed=seed,
        progress=job.progress,
        say=_say,
    )
    _say(f"The report is {page}; the .parquet files beside it hold the numbers.")


@app.command(
    epilog="Examples: clip-lens circuit --exact --out circuit   |   "
    "clip-lens circuit --method acdc --threshold 0.2 --pairs my.csv --images my-pictures/ --out searched",
)
@on_pairs(run=Run.caption, segment="all")
def circuit(
    job: Job,
    method: Annotated[Find, typer.Option(help="How edges are found.")] = Find.eap_ig,
    edges: Annotated[int, typer.Option(help="Edges of the circuit, before pruning (all but acdc).", min=1)] = 200,
    steps: Annotated[int, typer.Option(help="eap-ig: steps of the integral.", min=1)] = 5,
    threshold: Annotated[
        float, typer.Option(help="acdc: the change of d, in logits, below which an edge goes.")
    ] = 0.02,
    split: Annotated[float, typer.Option(help="The share of the pairs on which the circuit is found.")] = 0.5,
    exact: Annotated[
        bool, typer.Option("--exact", help="Patch every edge on the held-out pairs too, to compare.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The seed of split, random circuits and resampling.")] = 0,
) -> None:
    """Find the circuit behind d on one part of the pairs, judge it on the other: f, CPR, CMD, stability; a report."""
    from clip_lens.methods.circuits.discover import discover
    from clip_lens.show.questions.circuit_report import circuit_report
    from clip_lens.show.questions.findings import cautions

    found, judged = _of_segment(job).split(split, seed)
    discovery = discover(
        job.encoder, found, judged, method=method.value, edges=edges, steps=steps, threshold=threshold, exact=exact,
        keep=_keep(job), rows=job.rows, seed=seed, progress=job.progress,
    )  # fmt: skip
    page = circuit_report(
        discovery, job.out / "report.html", pictures=job.pictures, warnings=cautions(job.encoder, job.batch)
    )
    _print_sides(discovery.summary.drop(columns="method").set_index("side"), repr(discovery))
    _say(f"\nThe report is {page}; circuit.json, summary.csv and the .parquet files beside it hold the numbers.")


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
    from clip_lens.data.embed import embed_images

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
        str,
        typer.Argument(help="'tiny', a model of open_clip's, a folder of one, or a file: pairs, image store, effects."),
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
        from clip_lens.data.read import read_pairs

        _say(repr(read_pairs(path)))
    else:
        from clip_lens.model.load import load

        encoder = load(what, pretrained=pretrained)
        _say(repr(encoder))
        _say(f"  weights {encoder.digest}, image tower {encoder.image_digest}")


def _open_images(images: str, model: str, pretrained: str | None, out: Path, device: str, quiet: bool) -> ImageStore:
    from clip_lens.data.embed import embed_images
    from clip_lens.data.images import ImageStore

    if not Path(images).is_dir():
        return ImageStore.open(images)
    _say(f"Embedding the pictures in {images} ...")
    out.mkdir(parents=True, exist_ok=True)
    return embed_images(
        images, model=model, pretrained=pretrained, out=out / "images.safetensors", device=device, progress=not quiet
    )


def _trace(job: Job, kind: str) -> None:
    """Causal tracing by whole slots and by single positions: two results, a table, a report."""
    from clip_lens.core.source import counterpart

    present, positions = _slots(job.batch, By.slot), _slots(job.batch, By.position)
    by_slot = _sweep(job, _layers(job.encoder, kind, present), f"{kind}-slots", counterpart)
    by_position = _sweep(job, _layers(job.encoder, kind, positions), f"{kind}-positions", counterpart)
    chosen = _segmented(by_slot, job.segment)
    single = _segmented(by_position, job.segment).by_slot(job.batch)
    _write(job, {f"{kind}: whole slots": chosen, f"{kind}: single positions": single})


def _sites(job: Job, kind: str, by: By, source: Source, name: str) -> None:
    """A sweep over the single places of a kind, a table, a report."""
    places = job.encoder.sites(kind, slots=_slots(job.batch, by))  # type: ignore[arg-type]
    effects = _sweep(job, places, f"{kind}-{by.value}", source)
    _write(job, {name: _segmented(effects, job.segment)})


def _slots(batch: Batch, by: By) -> Sequence[str | int | None]:
    if by is By.text:
        return (None,)
    if by is By.position:
        return range(batch.tokens.shape[1])
    return [name for name in batch.slots if (batch.slot == batch.slots.index(name)).any()]


def _layers(encoder: HookedTextEncoder, kind: str, slots: Iterable[str | int | None]) -> list[Site]:
    """One place per layer and slot: of kinds with heads or neurons, all of them together."""
    from dataclasses import replace

    sites = encoder.sites(kind, slots=slots)  # type: ignore[arg-type]
    return list(dict.fromkeys(replace(site, unit=None) for site in sites))


def _ends(words: str, encoder: HookedTextEncoder) -> list[Site]:
    """Senders or receivers as the command line names them."""
    import re

    from clip_lens.model.site import Site

    ends: list[Site] = []
    for word in filter(None, (part.strip() for part in words.split(","))):
        match = re.fullmatch(r"(embed|out|head|mlp|q|k|v)?(?:(\d+)(?:\.(\d+))?)?", word)
        if match is None:
            raise ValueError(
                f"no sender or receiver {word!r}; give embed, head, mlp, q, k, v, out, 2.3, mlp2, q3.1, v3"
            )
        kind, layer, unit = match[1] or "head", match[2], match[3]
        if kind in ("embed", "out"):
            ends.append(Site(kind))  # type: ignore[arg-type]
            continue
        layers = None if layer is None else [int(layer)]
        sites = encoder.sites(kind, layers=layers)  # type: ignore[arg-type]
        chosen = [site for site in sites if unit is None or site.unit == int(unit)]
        if not chosen:
            raise ValueError(f"{word!r} names no place of {encoder.name}, which has {encoder.n_heads} heads in a layer")
        ends += chosen
    if not ends:
        raise ValueError("no sender or receiver given")
    return ends


def _sweep(job: Job, places: Sequence[Place], name: str, source: Source) -> Effects:
    from clip_lens.methods.patching import METHOD, patch_effects

    compute = lambda chosen: patch_effects(
        job.encoder, job.batch, chosen, source=source, rows=job.rows, progress=job.progress
    )
    return _keep(job).effects(name, _meta(job, METHOD, source), places, compute)


def _keep(job: Job) -> Keep:
    from clip_lens.core.keep import Keep

    return Keep(job.out, _say)


def _meta(job: Job, method: str, source: Source) -> dict[str, str]:
    """What a finished result must say of itself to be reused."""
    from clip_lens.core.metric import logit
    from clip_lens.methods.patching import describe

    return describe(job.encoder, job.batch, method=method, source=source, metric=logit)


def _segmented(effects: Effects, segment: str) -> Effects:
    counts = effects.pairs["segment"].value_counts().to_dict()
    if segment == "all":
        return effects
    if segment not in counts:
        raise ValueError(f"no pair is {segment!r}, there are {counts}; give --segment with one of these, or all")
    return effects.where(segment=segment)


def _of_segment(job: Job) -> Batch:
    """The pairs of the segment that was asked for."""
    if job.segment == "all":
        return job.batch
    from clip_lens.core.effects import segments
    from clip_lens.methods.scores import pair_scores

    found = segments(pair_scores(job.encoder, job.batch).d)
    if job.segment not in found:
        raise ValueError(
            f"no pair is {job.segment!r}, there are {', '.join(sorted(set(found)))}; give one of these, or all"
        )
    return job.batch[[row for row, name in enumerate(found) if name == job.segment]]


def _write(job: Job, results: dict[str, Effects]) -> None:
    """The table of the first result on the screen and as csv, and the report of all."""
    from clip_lens.show.report.report import report

    first = next(iter(results.values()))
    first.table().to_csv(job.out / "table.csv", index=False)
    data = "" if job.batch.pairs.name == job.encoder.name else f": {job.batch.pairs.name}"
    title = f"Where {job.encoder.full_name} processes negation{data}"
    page = report(results, job.out / "report.html", title=title, pictures=job.pictures)
    _print_table(first)
    _say(f"\nThe report is {page}; table.csv and the .parquet files beside it hold the numbers.")


def _print_table(effects: Effects) -> None:
    """By slot and layer where each cell is one place, else the largest effects."""
    from rich.console import Console
    from rich.table import Table

    from clip_lens.core.table import SIDES

    index = effects.index
    ablated = effects.meta.get("source") != "counterpart"
    value, what = ("effect", "logits that a patch moves") if ablated else ("fraction", "share of d that a patch moves")
    laid_out = index["slot"].notna().all() and not index.duplicated(["slot", "layer"]).any()
    for side in (side for side in SIDES if side in set(effects.pairs["side"])):
        count = int((effects.pairs["side"] == side).sum())
        table = Table(title=f"{what}; negation in the {side}, {count} pairs")
        if laid_out:
            grid = effects.grid(side=side, value=value)
            table.add_column("slot \\ layer")
            for layer in grid.columns:
                table.add_column(str(layer), justify="right")
            for slot, line in grid.iterrows():
                cells = (f"{value:.2f}".replace("-0.00", "0.00") if value == value else "" for value in line)
                table.add_row(str(slot), *cells)
        else:
            for column in ("place", *([] if ablated else ["share"]), "logits", "95% interval"):
                table.add_column(column, justify="left" if column == "place" else "right")
            for line in effects.where(side=side).top(10).itertuples():
                share = [] if ablated else [f"{line.fraction:.2f}"]
                interval = f"{line.effect_lower:+.2f} .. {line.effect_upper:+.2f}"
                table.add_row(line.place, *share, f"{line.effect:+.2f}", interval)
        Console().print(table)


def _print_sides(frame: DataFrame, title: str) -> None:
    """A table on the screen with a column per side, numbers with two decimals; lines without any are left out."""
    from rich.console import Console
    from rich.table import Table

    names = {"caption": "negation in the caption", "foil": "in the foil", "none": "no side", "pooled": "together"}
    table = Table("", *(names[side] for side in frame.index), title=title)
    for name, column in frame.dropna(axis=1, how="all").items():
        cells = (f"{cell:.2f}".replace("-0.00", "0.00") if isinstance(cell, float) else str(cell) for cell in column)
        table.add_row(str(name).replace("_", " "), *cells)
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
