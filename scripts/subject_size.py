"""Adds the size of the subject to pairs, as CLIPSeg sees it: columns subject_size, subject_size_above, subject_phrase.

    python scripts/subject_size.py existence.json visual7w/images --out existence_sizes.csv

CLIPSeg (Lueddecke and Ecker 2022) says for each pixel how well a phrase fits. `subject_size` is the mean of these
probabilities over the picture, the size that the negation study goes by (Quantmeyer et al. 2024), `subject_size_above`
the share of pixels whose probability is above `--threshold`; both from 0 to 1. It is what this model sees, not a
measurement. Images are `FOLDER/<image of the pair>`.

The phrase, in `subject_phrase`, is the pairs' column `subject`, or the caption's first noun chunk with its determiner:
"There are some red cars parked." has "some red cars". It is found by a list of words that end a noun phrase, not by a
parser, and is the study's own phrase in 234 of the 236 pairs for which the study has one.

Only pairs with the negation in the foil have a size: in the others the subject is not in the picture, or there is no
negation. What has no size is an empty field. A pair that should have one and has none (no subject, no such image) is
listed with the reason. A run that was interrupted goes on: what is computed lies in `<out>.partial.jsonl` until all is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from clip_lens.data.pairs import Pairs
from clip_lens.data.read import read_pairs
from clip_lens.files import written_whole
from clip_lens.originals.open_clip import digest

MODEL = "CIDAS/clipseg-rd64-refined"
Query = tuple[str, str]
"""An image's id and a phrase: what the model is asked once, however many pairs want to know."""
COLUMNS = ("subject_size", "subject_size_above", "subject_phrase")
_DETERMINER = "(an?|the|some|any|no)"
_BEGINS = re.compile(rf"^there\s+(?:is|are)\s+(?:{_DETERMINER}\s+)?|\b{_DETERMINER}\s+", re.IGNORECASE)
_WORD = re.compile(r"[\w'-]+|[^\w\s]")
_PARTICIPLE = re.compile(r"\w+(?:ing|ed)$")
_ENDS = re.compile(
    "a|an|the|some|any|no|of|in|on|at|with|without|by|to|from|for|near|under|over|behind|beside|between|above|below|"
    "around|into|onto|through|along|across|against|among|inside|outside|off|out|up|down|and|or|but|that|which|who|whose|"
    "where|when|while|as|there|here|this|these|is|are|was|were|be|being|not|visible|shown|seen|present|worn|clearly",
    re.IGNORECASE,
)
"""Determiners, prepositions, conjunctions, relative words, forms of "to be", and what stands behind nouns."""


class Size(NamedTuple):
    """The mean probability over a picture, and the share of pixels above the threshold."""

    mean: float
    above: float


class Refused(Exception):
    """What went wrong, and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """0 if `out` was written, else 1 with the reason on standard error."""
    options = parse(arguments)
    try:
        said, failed = run(options)
    except (Refused, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
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
    parser.add_argument("--threshold", type=float, default=0.25, help="the probability above which a pixel counts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu", help="'cuda' on a GPU")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is there: the file, the column, the rest"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Writes the csv; what to say of it, and for each pair's key without a size that should have one the reason.

    Raises:
        Refused: something is in the way, or no pair has a size.
    """
    pairs = read_pairs(options.pairs)
    _check(options, pairs)
    segment = Segmenter.load(options.model, options.threshold, options.device)
    partial = Partial(options.out.with_name(f"{options.out.name}.partial.jsonl"), segment.settings)
    sizes = partial.resume(options.overwrite)
    queries = [
        (image, phrase) if side == "foil" and phrase else None
        for image, phrase, side in zip(pairs.image, phrases(pairs), pairs.side, strict=True)
    ]
    todo = [query for query in dict.fromkeys(queries) if query and query not in sizes]
    failed = _compute(todo, options, segment, sizes, partial)
    reasons = dict(_reasons(pairs, queries, sizes, failed))
    if len(reasons) == pairs.side.count("foil"):
        first = next(iter(reasons.values()), "a size is defined for negation in the foil only")
        raise Refused(f"none of {len(pairs)} pairs has a size, the first: {first}")
    found = [sizes.get(query) if query else None for query in queries]
    values = [(*size, query[1]) if size and query else (None,) * 3 for size, query in zip(found, queries, strict=True)]
    frame = pairs.to_frame()
    for name, column in zip(COLUMNS, zip(*values, strict=True), strict=True):
        frame[name] = list(column)
    with written_whole(options.out) as temporary:
        frame.to_csv(temporary, index=False)
    partial.path.unlink(missing_ok=True)
    return _summary(options.out, pairs, reasons), reasons


def phrases(pairs: Pairs) -> list[str | None]:
    """What CLIPSeg is asked for in each pair: its column `subject`, or the caption's first noun chunk."""
    named = pairs.info["subject"] if "subject" in pairs.info else [None] * len(pairs)
    return [
        given.strip() if isinstance(given, str) and given.strip() else first_noun_chunk(caption)
        for given, caption in zip(named, pairs.caption, strict=True)
    ]


def first_noun_chunk(caption: str) -> str | None:
    """The first noun phrase with its determiner, without what follows the noun; None if there is none.

    It begins at the first determiner, or behind "There is/are", and ends before the first word that stands in no noun
    phrase, or that ends in -ing or -ed and is not the first behind the determiner ("a walking sign", "cars parked").
    """
    if not (begin := _BEGINS.search(caption)):
        return None
    words: list[str] = []
    for word in _WORD.findall(caption[begin.end() :]):
        if _ENDS.fullmatch(word) or not word[0].isalnum() or (words and _PARTICIPLE.match(word)):
            break
        words.append(word)
    return " ".join(filter(None, [begin[1] or begin[2], *words])) if words else None


def _check(options: argparse.Namespace, pairs: Pairs) -> None:
    if not options.folder.is_dir():
        raise Refused(f"there is no folder {options.folder}; give the one that has the images")
    if options.out.exists() and not options.overwrite:
        raise Refused(f"{options.out} is there already; give another --out, or --overwrite")
    if (there := [name for name in COLUMNS if name in pairs.info]) and not options.overwrite:
        raise Refused(f"{options.pairs} has a column {', '.join(there)} already; --overwrite computes it anew in --out")
    if not 0 < options.threshold < 1 or options.batch_size < 1:
        raise Refused("the threshold is a probability between 0 and 1, and a batch has at least 1 image")
    options.out.parent.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Segmenter:
    """A CLIPSeg model with its processor: (pictures, phrases) -> sizes."""

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

    def __call__(self, pictures: Sequence[Any], phrases: Sequence[str]) -> list[Size]:
        """How much of each picture is the phrase, over the pixels of the model's own resolution; NaN if it fails."""
        inputs = self.processor(text=list(phrases), images=list(pictures), padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits: Float[Tensor, "pair row column"] = self.model(**inputs.to(self.model.device)).logits
        fits = logits.sigmoid()
        sizes = torch.stack([fits.mean((-2, -1)), (fits > self.threshold).float().mean((-2, -1))], 1)
        broken = ~logits.isfinite().all(-1).all(-1)
        return [Size(*size) for size in sizes.masked_fill(broken[:, None], torch.nan).tolist()]


@dataclass(frozen=True)
class Partial:
    """The file of an unfinished run: a line of settings, then a line per size."""

    path: Path
    settings: Mapping[str, object]

    def resume(self, overwrite: bool) -> dict[Query, Size]:
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
        done = {(line["image"], line["subject"]): Size(line["mean"], line["above"]) for line in lines[1:]}
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return done

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The lines that are whole: the last one may be cut."""
        for line in self.path.read_text(encoding="utf-8").split("\n")[:-1]:
            try:
                yield json.loads(line)
            except ValueError:
                return

    def add(self, sizes: Mapping[Query, Size]) -> None:
        lines = [{"image": image, "subject": phrase, **size._asdict()} for (image, phrase), size in sizes.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _compute(
    todo: Sequence[Query], options: argparse.Namespace, segment: Segmenter, sizes: dict[Query, Size], partial: Partial
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
                seen = segment([pictures[query] for query in usable], [phrase for _, phrase in usable])
                found = {query: size for query, size in zip(usable, seen, strict=True) if size.mean == size.mean}
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
    pairs: Pairs, queries: Sequence[Query | None], sizes: Mapping[Query, Size], failed: Mapping[Query, str]
) -> Iterator[tuple[str, str]]:
    """The pairs with the negation in the foil that have no size, and why."""
    for key, side, query in zip(pairs.key, pairs.side, queries, strict=True):
        if side == "foil" and query is None:
            yield key, "no subject: neither a column nor the caption names it"
        elif query is not None and query not in sizes:
            yield key, failed[query]


def _summary(out: Path, pairs: Pairs, reasons: Mapping[str, str]) -> str:
    foil = pairs.side.count("foil")
    others = f"; not defined for the {len(pairs) - foil} others" if foil < len(pairs) else ""
    lost = f"; {len(pairs.dropped)} more were dropped when the pairs were read" if len(pairs.dropped) else ""
    return f"wrote {out}: {foil - len(reasons)} of {foil} pairs with the negation in the foil have a size{others}{lost}"


if __name__ == "__main__":
    sys.exit(main())
