"""What the commands are told: every option that several of them take, in the words of --help.

Nothing heavy is imported here, so that --help answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

Run = Literal["affirmative", "negated", "caption", "foil"]
By = Literal["text", "slot", "position"]
Through = Literal["direct", "mlp"]
Replacement = Literal["zeros", "mean", "resample", "noise"]
SourceName = Literal["counterpart", "zeros", "mean", "resample", "noise"]
SplitBy = Literal["text", "image"]
MetricName = Literal["logit", "cosine"]


def _known_kind(kind: str) -> str:
    """Refused before anything is loaded: what names no kind of site."""
    from clip_lens.model.site import LAYOUTS, unknown_kind

    if kind not in LAYOUTS:
        raise ValueError(unknown_kind(kind, LAYOUTS))
    return kind


def _known_finder(method: str) -> str:
    """Refused before anything is loaded: what names no way to find a circuit."""
    from clip_lens.methods.circuits.finders import FINDERS
    from clip_lens.words import unknown

    if method not in FINDERS:
        raise ValueError(unknown("--method", method, FINDERS))
    return method


Model = Annotated[
    str,
    typer.Option(
        help="'tiny' (embedded), a model of open_clip's, or a folder that transformers saved.", rich_help_panel="Model"
    ),
]
Pretrained = Annotated[
    Optional[str],  # noqa: UP045 - typer reads this at run time, on Python 3.10 too
    typer.Option(
        help="A tag of open_clip's, a checkpoint file, or 'random' (untrained; random:SEED for others).",
        rich_help_panel="Model",
    ),
]
Like = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="The tag of open_clip's that a checkpoint file is used like: its activation, its image preprocessing.",
        rich_help_panel="Model",
    ),
]
QuickGelu = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--quick-gelu/--no-quick-gelu",
        help="The activation that a checkpoint file was trained with, where --like and the file don't say it.",
        rich_help_panel="Model",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute, as torch names it.", rich_help_panel="Model")]
PairsFile = Annotated[
    str, typer.Option(help="Caption-foil pairs: .csv, .json, .jsonl, a published data set's own file, or 'tiny'.")
]
Format = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The data set whose layout the pairs' file has, where its columns don't tell."),
]
Images = Annotated[
    str,
    typer.Option(
        help="Their images: a store (.safetensors), a folder of pictures, 'tiny', or 'none' for texts alone.",
        show_default=False,
    ),
]
Repair = Annotated[
    bool,
    typer.Option(
        "--repair-images", help="Take the store's image of the same file name in another folder, case or ending."
    ),
]
MetricOption = Annotated[
    MetricName,
    typer.Option("--metric", help="CLIP's logit of the image, or the cosine with the other text (needs no image)."),
]
Out = Annotated[
    Path,
    typer.Option(
        help="The folder to write to. Several commands may share it: files are named after what they hold, and the "
        "report is report.html, or has a name of its own where that is another command's. A result that is there and "
        "fits is reused; one that does not fit is an error that says why."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Compute anew, and replace what is there under the same name.")
]
RunOption = Annotated[
    Optional[Run],  # noqa: UP045
    typer.Option(
        help="Which text is run and patched. Not given: affirmative, or the foil where no pair has a side.",
        show_default=False,
    ),
]
Segment = Annotated[str, typer.Option(help="correct, ambiguous, incorrect, or all pairs.")]
Rephrased = Annotated[
    bool, typer.Option("--rephrased", help="VALSE existence: make both texts equally long, as the paper does.")
]
AnyStore = Annotated[bool, typer.Option("--any-store", help="Accept image embeddings of another model.")]
Rows = Annotated[int, typer.Option(help="Sequences in one forward pass; bounds the memory.", min=1)]
Jobs = Annotated[int, typer.Option("--jobs", help="Processes that share the sweeps, one thread each.", min=1)]
ShardOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--shard",
        help="Compute a part alone, such as 0/3 of 0/3, 1/3, 2/3, on any machine; clip-lens gather puts them together.",
    ),
]
Kinds = Annotated[
    str,
    typer.Option(
        "--sites",
        help="Kind of site: resid, mid, attn, mlp, head, q, k, v, pattern, neuron, result, norm, projection.",
        callback=_known_kind,
    ),
]
ByOption = Annotated[By, typer.Option(help="Whole texts, named slots (all tokens together), or single positions.")]
ImagesOfB = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--images-b", help="The images in the second model's own embedding; without it those of --images."),
]
Std = Annotated[float, typer.Option(help="noise: in standard deviations of the activation.", min=0.0)]
Finder = Annotated[
    str,
    typer.Option(
        help="How edges are found: exact, eap, eap-ig, eap-ig-certain, eap-ig-both-ends, eap-ig-nodes, eap-ig-loss, "
        "acdc, learned, random.",
        callback=_known_finder,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
