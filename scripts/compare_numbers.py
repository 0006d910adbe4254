"""The numbers of docs/compare.md: the embedded model beside its fine-tune on "without", as one JSON file.

    python scripts/compare_numbers.py tutorials/results/compare.json --second build/tiny-0/model.safetensors \\
        --page docs/compare.md

With `--page` the page's tables are written anew too.

The fine-tune is `scripts/train_tiny.py tune`'s, which ships as "without"; the second model, if given, is another
training of the embedded one (`scripts/train_tiny.py train --seed 0`). Pairs are the shipped ones about "a picture
with", said by "no" and "some" as they ship, or by "without" and "with". Each side of the negation by itself, with 95 %
bootstrap intervals over pairs. It takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuit_numbers import lines
from pandas import DataFrame
from path_numbers import embedded_by
from train_tiny import fill, markdown

import clip_lens
from clip_lens import Site
from clip_lens.core.record import as_json
from clip_lens.data.batch import Batch
from clip_lens.files import written_whole
from clip_lens.methods.statistics import proportion
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.tiny.assets import ASSETS

EDGES = 100
STEPS = 5
WORD = 3
"""The position of "with" and "without" in "A picture with ..."."""
WITHOUT = {"with no ": "without ", "with some ": "with "}


def main(arguments: list[str] | None = None) -> int:
    """0 when the file is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--second", type=Path, help="weights of a second training of the embedded model")
    parser.add_argument("--page", type=Path, help="the page whose tables are written anew")
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(given.out) as temporary:
        numbers = measured(given.second)
        temporary.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.page:
        write_page(given.page, numbers)
    return 0


def pairs_with(words: Mapping[str, str]) -> clip_lens.Pairs:
    """The shipped pairs about "a picture with", some of their words said by others."""
    table = clip_lens.read_pairs().to_frame()
    table = table[table["form"] == "picture-with"]
    for old, new in words.items():
        table = table.assign(**{text: table[text].str.replace(old, new) for text in ("caption", "foil")})
    return clip_lens.Pairs.from_frame(table, "a picture without" if words else "a picture with no")


def measured(second: Path | None) -> dict[str, Any]:
    """All numbers."""
    base, tuned, store = clip_lens.load(), clip_lens.load(pretrained="without"), clip_lens.ImageStore.open("tiny")
    without, no = (clip_lens.align(pairs_with(words), store, tuned, run="negated") for words in (WITHOUT, {}))
    found = {
        "base, no": circuit(base, no), "tuned, no": circuit(tuned, no), "tuned, without": circuit(tuned, without),
    }  # fmt: skip
    if second is not None:
        seed = clip_lens.load("tiny", pretrained=str(second))
        own = clip_lens.align(pairs_with({}), embedded_by(second, pairs_with({})), seed, run="negated")
        found["second seed, no"] = circuit(seed, own)
    return {
        "written by": "scripts/compare_numbers.py",
        "weights": {"base": base.digest, "tuned": tuned.digest},
        "accuracy on fresh scenes": accuracy(json.loads((ASSETS / "tuned-without.json").read_text(encoding="utf-8"))),
        "swapped, the text with the negation": swapped(base, tuned, without),
        "swapped, the text without": swapped(base, tuned, without.flip()),
        "heads on no": compared(base, tuned, no),
        "edges of a circuit": EDGES,
        "overlaps": lines(clip_lens.Circuit.overlaps(found)),
    }


def accuracy(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The share of right pairs with Wilson's interval, before and after, as measured by the training script."""
    rows = []
    for when in ("before", "after"):
        for words, told in card[when].items():
            for side, n in told["pairs"].items():
                share = proportion(round(told["accuracy"][side] * n), n)
                rows.append({"when": when, "words": words, "side": side, **share._asdict(), "d": told["d"][side]})
    return lines(DataFrame(rows))


def swapped(base: HookedTextEncoder, tuned: HookedTextEncoder, batch: Batch) -> dict[str, Any]:
    """What each part of the base model moves towards the tuned one's score, when it is swapped."""
    places: list[clip_lens.Place] = [Site("embed", slot=WORD), *base.sites("resid"), Site("norm"), Site("projection")]
    places += [*base.sites("attn"), *base.sites("mlp"), tuple(base.edges())]
    effects = clip_lens.patch_effects(base, batch, places, source=clip_lens.other_tower(tuned), progress=False)
    return {"record": as_json(effects.record), "table": told(effects.table(), list(map(name_of, places)))}


def name_of(place: clip_lens.Place) -> str:
    return "every edge" if isinstance(place, tuple) else str(place)


def told(table: DataFrame, names: list[str]) -> list[dict[str, Any]]:
    columns = ["side", "fraction", "lower", "upper", "effect", "effect_lower", "effect_upper", "n"]
    return lines(table[columns].assign(place=names * (len(table) // len(names))))


def compared(base: HookedTextEncoder, tuned: HookedTextEncoder, batch: Batch) -> dict[str, Any]:
    """Each head patched from the other text, in both models: the largest differences, and how many are no accident."""
    both = [clip_lens.patch_effects(encoder, batch, encoder.sites("head"), progress=False) for encoder in (base, tuned)]
    table = clip_lens.compare(*both, names=("base", "tuned")).table()
    clear = table.assign(clear=(table["effect_lower"] > 0) | (table["effect_upper"] < 0))
    top = table.loc[table["effect"].abs().sort_values(ascending=False).index].groupby("side", sort=False).head(3)
    columns = ["place", "side", "effect", "effect_lower", "effect_upper", "effect_a", "effect_b", "n"]
    return {
        "intervals without 0": clear.groupby("side")["clear"].sum().to_dict(),
        "heads": len(both[0].places),
        "largest": lines(top[columns]),
    }


def circuit(encoder: HookedTextEncoder, batch: Batch) -> clip_lens.Circuit:
    """The edges with the largest EAP-IG scores."""
    scores = clip_lens.gradient_effects(encoder, batch, encoder.edges(), steps=STEPS, progress=False)
    return clip_lens.top_edges(scores, EDGES)


# The page


SIDES = ("caption", "foil")
SHOWN = ["embed @3", *(f"resid {layer}" for layer in (1, 2, 3, 6)), "norm", "projection", "attn 0", "attn 2", "mlp 0"]


def write_page(path: Path, numbers: Mapping[str, Any]) -> None:
    """The page with its tables made anew from the numbers."""
    tables = {
        "accuracy": _accuracy(numbers["accuracy on fresh scenes"]),
        "swapped": _swapped(numbers["swapped, the text with the negation"]["table"]),
        "heads": _heads(numbers["heads on no"]),
        "circuits": _circuits(numbers["overlaps"]),
    }
    text = fill(path.read_text(encoding="utf-8"), tables)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _accuracy(rows: list[dict[str, Any]]) -> str:
    found = {(row["words"], row["side"], row["when"]): row for row in rows}
    lines = [
        [words, f"in the {side}", *(_bounded(found[words, side, when], "share") for when in ("before", "after")),
         *(f"{found[words, side, when]['d']:.1f}" for when in ("before", "after")), found[words, side, "after"]["n"]]
        for words, side in dict.fromkeys((row["words"], row["side"]) for row in rows)
    ]  # fmt: skip
    return markdown(["said by", "negation", "right before", "right after", "d before", "d after", "pairs"], lines)


def _swapped(rows: list[dict[str, Any]]) -> str:
    found = {(row["place"], row["side"]): row for row in rows}
    lines = [[f"`{place}`", *(_bounded(found[place, side], "fraction") for side in SIDES)] for place in SHOWN]
    counts = [f"negation in the {side}, {found['norm', side]['n']} pairs" for side in SIDES]
    return markdown(["swapped", *counts], lines)


def _heads(told: Mapping[str, Any]) -> str:
    lines = [
        [row["place"], f"in the {row['side']}", f"{row['effect_a']:.2f}", f"{row['effect_b']:.2f}",
         f"{row['effect']:+.2f} [{row['effect_lower']:.2f}, {row['effect_upper']:.2f}]"]
        for row in told["largest"]
    ]  # fmt: skip
    clear = " and ".join(f"{told['intervals without 0'][side]} (negation in the {side})" for side in SIDES)
    said = f"Of {told['heads']} heads the interval is on one side of 0 for {clear}; one or two would be by chance."
    return markdown(["head", "negation", "base", "tuned", "difference"], lines) + f"\n\n{said}"


def _circuits(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["first"], row["second"], row["shared"], row["only_first"], row["only_second"], f"{row['by_chance']:.1f}"]
        for row in rows
    ]
    return markdown(["one", "other", "in both", "only in one", "only in the other", "in both by chance"], lines)


def _bounded(row: Mapping[str, Any], value: str) -> str:
    return f"{row[value]:.2f} [{row['lower']:.2f}, {row['upper']:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
