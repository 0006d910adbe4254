"""Adds a column `subject_size` to pairs: the share of the image that the subject's noun phrase covers, by CLIPSeg.

    python scripts/subject_size.py existence.json visual7w/images --out existence_sizes.csv

CLIPSeg (Lueddecke and Ecker 2022) says for each pixel how well a phrase fits; the share of pixels whose probability is
above `--threshold` is the size, 0 to 1. It is what this model sees, not a measurement: a phrase for something that is
not in the image may get some pixels too. The phrase is the pairs' column `subject`, or what follows the negator in
"There is/are NEGATOR subject.". Images are `FOLDER/<image of the pair>`.

A run that was interrupted goes on: what is computed lies in `<out>.partial.jsonl` until all is. A pair without a size
(no subject, no such image) has an empty field; all of them are listed, with the reason, and counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from clip_lens.data.pairs import Pairs
from clip_lens.data.read import read_pairs
from clip_lens.files import written_whole
from clip_lens.methods.confounds import subject_phrases
from clip_lens.originals.open_clip import digest

MODEL = "CIDAS/clipseg-rd64-refined"
Query = tuple[str, str]
"""An image's id and a phrase: what the model is asked once, however many pairs want to know."""


class Refused(Exception):
    """What went wrong, and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """0 if `out` was written, else 1 with the reason on standard error."""
    options = parse(arguments)
    try:
        said, failed = run(options)
    except (Refused, ValueError, FileNotFoundError) as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    for key, reason in failed.items():
        print(f"no size for {key}: {reason}", file=sys.stderr)
    print(said)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="a csv, json or jsonl file of pairs, or a file of VALSE's")
    parser.add_argument("folder", type=Path, help="the folder with their images")
    parser.add_argument("--out", type=Path, required=True, help="the csv to write")
    parser.add_argument("--model", default=MODEL, help="a CLIPSeg on the Hugging Face hub, or a local directory")
    parser.add_argument("--threshold", type=float, default=0.5, help="the probability above which a pixel counts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu", help="'cuda' on a GPU")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is there: the file, the column, the rest"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Writes the csv; what to say of it, and for each pair's key without a size the reason.

    Raises:
        Refused: something is in the way, or no pair has a size.
    """
    pairs = read_pairs(options.pairs)
    _check(options, pairs)
    segment = Segmenter.load(options.model, options.threshold, options.device)
    partial = Partial(options.out.with_name(f"{options.out.name}.partial.jsonl"), segment.settings)
    sizes = partial.resume(options.overwrite)
    phrases = subject_phrases(pairs)
    asked = [(image, phrase) for image, phrase in zip(pairs.image, phrases, strict=True) if phrase]
    todo = [query for query in dict.fromkeys(asked) if query not in sizes]
    failed = _compute(todo, options, segment, sizes, partial)
    reasons = dict(_reasons(pairs, phrases, sizes, failed))
    if len(reasons) == len(pairs):
        raise Refused(f"none of {len(pairs)} pairs has a size, the first: {next(iter(reasons.values()))}")
    frame = pairs.to_frame()
    frame["subject_size"] = [
        sizes.get((image, phrase or "")) for image, phrase in zip(pairs.image, phrases, strict=True)
    ]
    with written_whole(options.out) as temporary:
        frame.to_csv(temporary, index=False)
    partial.path.unlink(missing_ok=True)
    return _summary(options.out, pairs, reasons), reasons


def _check(options: argparse.Namespace, pairs: Pairs) -> None:
    if not options.folder.is_dir():
        raise Refused(f"there is no folder {options.folder}; give the one that has the images")
    if options.out.exists() and not options.overwrite:
        raise Refused(f"{options.out} is there already; give another --out, or --overwrite")
    if "subject_size" in pairs.info and not options.overwrite:
        raise Refused(f"{options.pairs} has a column subject_size already; --overwrite computes it anew in --out")
    if not 0 < options.threshold < 1 or options.batch_size < 1:
        raise Refused("the threshold is a probability between 0 and 1, and a batch has at least 1 image")
    options.out.parent.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Segmenter:
    """A CLIPSeg model with its processor: (pictures, phrases) -> shares of the pictures."""

    model: Any
    processor: Any
    threshold: float
    name: str

    @classmethod
    def load(cls, name: str, threshold: float, device: str) -> Segmenter:
        """The model, in float32 and on the device.

        Raises:
            Refused: it can't be loaded, or it looks at a part of the picture only.
        """
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model = CLIPSegForImageSegmentation.from_pretrained(name).float().to(device).eval()
            processor = CLIPSegProcessor.from_pretrained(name)
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise Refused(f"can't load {name!r}: {reason}; give --model the name or directory of a CLIPSeg") from error
        if getattr(processor.image_processor, "do_center_crop", False):
            raise Refused(f"{name!r} cuts pictures to their centre: the share would be one of the cut")
        return cls(model, processor, threshold, name)

    @property
    def settings(self) -> dict[str, object]:
        """What sizes depend on."""
        return {"model": self.name, "digest": digest(self.model.state_dict()), "threshold": self.threshold}

    def fits(self, phrase: str) -> bool:
        """Whether the model reads all of a phrase."""
        length = len(self.processor.tokenizer(phrase)["input_ids"])
        return length <= int(self.model.config.text_config.max_position_embeddings)

    def __call__(self, pictures: Sequence[Any], phrases: Sequence[str]) -> list[float]:
        """The share of each picture's pixels, at the model's own resolution, that are the phrase with p > threshold."""
        inputs = self.processor(text=list(phrases), images=list(pictures), padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits: Float[Tensor, "pair row column"] = self.model(**inputs.to(self.model.device)).logits
        share = (logits.sigmoid() > self.threshold).float().mean((-2, -1))
        return share.masked_fill(~logits.isfinite().all(-1).all(-1), torch.nan).tolist()


@dataclass(frozen=True)
class Partial:
    """The file of an unfinished run: a line of settings, then a line per size."""

    path: Path
    settings: Mapping[str, object]

    def resume(self, overwrite: bool) -> dict[Query, float]:
        """What an earlier run with the same settings left here.

        Raises:
            Refused: it had other settings.
        """
        lines = list(self._lines()) if self.path.exists() else []
        if overwrite or not lines:
            self.path.write_text(json.dumps(self.settings) + "\n", encoding="utf-8")
            return {}
        if lines[0] != self.settings:
            raise Refused(
                f"{self.path} is the rest of a run with {lines[0]}, this one has {self.settings}; "
                "give another --out, or --overwrite"
            )
        done = {(line["image"], line["subject"]): line["size"] for line in lines[1:]}
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return done

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The lines that are whole: the last one may be cut."""
        for line in self.path.read_text(encoding="utf-8").split("\n")[:-1]:
            try:
                yield json.loads(line)
            except ValueError:
                return

    def add(self, sizes: Mapping[Query, float]) -> None:
        lines = [{"image": image, "subject": subject, "size": size} for (image, subject), size in sizes.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _compute(
    todo: Sequence[Query], options: argparse.Namespace, segment: Segmenter, sizes: dict[Query, float], partial: Partial
) -> dict[Query, str]:
    """Adds the sizes to `sizes`, some queries at a time; the reasons of those that have none."""
    failed: dict[Query, str] = {}
    # disable=None: no bar where standard error isn't a terminal
    with tqdm(total=len(todo), unit="image", desc="segmenting", disable=None) as bar:
        for start in range(0, len(todo), options.batch_size):
            batch = todo[start : start + options.batch_size]
            pictures = {query: _open(options.folder / query[0], query[1], segment) for query in batch}
            failed |= {query: result for query, result in pictures.items() if isinstance(result, str)}
            usable = [query for query in batch if query not in failed]
            if usable:
                shares = segment([pictures[query] for query in usable], [phrase for _, phrase in usable])
                found = {query: share for query, share in zip(usable, shares, strict=True) if share == share}
                failed |= dict.fromkeys(set(usable) - set(found), "the model's output is not finite")
                partial.add(found)
                sizes |= found
            bar.update(len(batch))
    return failed


def _open(path: Path, phrase: str, segment: Segmenter) -> Any:
    """The picture, or the reason why it can't be asked about."""
    from PIL import Image

    if not segment.fits(phrase):
        return f"the subject {phrase!r} has more tokens than the model reads"
    if not path.is_file():
        return f"no image {path}"
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a decoder meets any kind of broken file, and none of them ends the run
        return f"can't read {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _reasons(
    pairs: Pairs, phrases: Sequence[str | None], sizes: Mapping[Query, float], failed: Mapping[Query, str]
) -> Iterator[tuple[str, str]]:
    for key, image, phrase in zip(pairs.key, pairs.image, phrases, strict=True):
        if phrase is None:
            yield key, "no subject: neither a column nor a template names it"
        elif (image, phrase) not in sizes:
            yield key, failed[image, phrase]


def _summary(out: Path, pairs: Pairs, reasons: Mapping[str, str]) -> str:
    lost = f"; {len(pairs.dropped)} more were dropped when the pairs were read" if len(pairs.dropped) else ""
    return f"wrote {out}: {len(pairs) - len(reasons)} of {len(pairs)} pairs have a size{lost}"


if __name__ == "__main__":
    sys.exit(main())
