"""The numbers of tutorial 3 that take longer than a page should, as one JSON file.

    python scripts/path_numbers.py tutorials/results/paths.json --second build/tiny-0/model.safetensors

Of the embedded model and of a second training of the same recipe (`scripts/train_tiny.py train --seed 0`; its weights
are not shipped): how much of d the ways from the negator to the end of the text move, adding the negation and removing
it, with 95 % bootstrap intervals over pairs; and how much random sets of as many parts move, many of them per set.
Pairs with d >= 1 of the first 400 (chance: of the first 200), each side by itself. It takes a quarter of an hour of one
core.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from pandas import DataFrame

import clip_lens
from clip_lens import Edge, Effects, Place, Site
from clip_lens.core.record import as_json
from clip_lens.data.batch import Batch
from clip_lens.files import written_whole
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import at_slot
from clip_lens.tiny.scenes import save_pictures

PAIRS = 400
DIGITS = 4
KINDS = ("q", "k", "v", "qk", "kv", "qkv")
MIDDLE = (1, 2, 3)
CUTS = ((0,), (1,), (2,), (3,), (4,), (5,), (2, 3), (1, 2, 3), (0, 1, 2, 3), (0, 4, 5), (0, 1, 2, 3, 4, 5))
Pool = tuple[Sequence[Place], tuple[Place, ...]]
"""The parts that there are to choose from, and those chosen."""


def main(arguments: list[str] | None = None) -> int:
    """0 when the file is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--second", type=Path, help="weights of a second training; without it only the embedded model")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs to measure on")
    parser.add_argument("--draws", type=int, default=99, help="random sets for each named one")
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    pairs = clip_lens.read_pairs()[: given.pairs]
    found = {"embedded": measured(clip_lens.load(), pairs, clip_lens.ImageStore.open("tiny"), given.draws)}
    if given.second:
        second = clip_lens.load("tiny", pretrained=str(given.second))
        found["second seed"] = measured(second, pairs, embedded_by(given.second, pairs), given.draws)
    with written_whole(given.out) as temporary:
        text = json.dumps({"written by": "scripts/path_numbers.py", **found}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return 0


def embedded_by(weights: Path, pairs: clip_lens.Pairs) -> clip_lens.ImageStore:
    """The pairs' pictures in the joint space of other weights."""
    with TemporaryDirectory() as folder:
        save_pictures(pairs.info.scene.astype(int), f"{folder}/pictures")
        return clip_lens.embed_images(
            f"{folder}/pictures", model="tiny", pretrained=str(weights), out=f"{folder}/images.safetensors",
            progress=False,
        )  # fmt: skip


def measured(
    encoder: HookedTextEncoder, pairs: clip_lens.Pairs, images: clip_lens.ImageStore, draws: int
) -> dict[str, Any]:
    """What one model's ways move, and what random sets of its parts move."""
    batch = clip_lens.align(pairs, images, encoder, run="affirmative")
    directions = {"adding": batch, "removing": batch.flip()}
    shares = pd.concat(shares_of(encoder, part).assign(direction=direction) for direction, part in directions.items())
    chance = pd.concat(
        against_chance(encoder, part[: len(batch) // 2], name, pool, draws).assign(direction=direction)
        for direction, part in directions.items()
        for name, pool in pools(encoder).items()
    )
    record = clip_lens.patch_effects(encoder, batch, [Site("resid", 0)], progress=False).record
    record = replace(record, model=encoder.name, images="")  # weights are told by their digest, not by where they lie
    return {"record": as_json(record), "shares": lines(shares), "chance": lines(chance)}


def ways() -> dict[str, Place]:
    """The places of the tutorial that are patched jointly, by name."""
    heads: dict[str, Place] = {f"heads of layer {layer}": Site("head", layer) for layer in range(6)}
    read: dict[str, Place] = {
        f"embed -> {', '.join(kinds)} of layer 0 @negator": tuple(
            Edge(Site("embed"), Site(kind, 0, slot="negator"))
            for kind in kinds  # type: ignore[arg-type]
        )
        for kinds in ("q", "k", "v", "kv", "qkv")
    }
    brought: dict[str, Place] = {
        f"heads of layers {', '.join(map(str, cut))} @eot": tuple(Site("head", layer, slot="eot") for layer in cut)
        for cut in CUTS
    }
    return heads | read | brought


def receivers() -> dict[str, Place]:
    """Who reads what layer 0 sends through MLPs, by name."""
    middle: dict[str, Place] = {
        f"layer 0 -> MLPs -> {', '.join(kinds)} of layers 1 to 3": tuple(
            Site(kind, layer)
            for kind in kinds
            for layer in MIDDLE  # type: ignore[arg-type]
        )
        for kinds in KINDS
    }
    return middle | {"layer 0 -> MLPs -> the output": Site("out")}


def shares_of(encoder: HookedTextEncoder, batch: Batch) -> DataFrame:
    """The share of d that each way moves, per side, with its interval."""
    sets, ends = ways(), receivers()
    patched = clip_lens.patch_effects(encoder, batch, list(sets.values()), progress=False)
    sent = clip_lens.path_effects(encoder, batch, [Site("head", 0)], list(ends.values()), through="mlp", progress=False)
    return pd.concat([told(patched, list(sets)), told(sent, list(ends))])


def told(effects: Effects, names: Sequence[str]) -> DataFrame:
    """A row per name and side, of the pairs with d >= 1."""
    table = effects.where(segment="correct").table()
    repeats = len(table) // len(names)
    columns = table[["side", "fraction", "lower", "upper", "n"]].rename(columns={"fraction": "share"})
    return columns.assign(name=list(names) * repeats)


def pools(encoder: HookedTextEncoder) -> Mapping[str, Pool]:
    """The named sets that are held against chance, each with the parts that it is drawn from."""
    heads, at_end = encoder.sites("head"), encoder.sites("head", slots=["eot"])
    readers = [Site(kind, layer, head) for kind in ("q", "k", "v") for layer in range(6) for head in range(4)]
    readers += [Site("mlp", layer) for layer in range(6)]
    embedding = [Edge(Site("embed"), at_slot(reader, "negator")) for reader in readers]
    sent = encoder.edges(senders=encoder.sites("head", layers=[0]))
    return {
        "read by the heads of layer 0": (heads, tuple(s for s in heads if s.layer == 0)),
        "read through k, v of layer 0 @negator": (
            embedding,
            tuple(e for e in embedding if e.receiver.kind in ("k", "v") and e.receiver.layer == 0),
        ),
        "sent to all MLPs and k, v of layers 1 to 3": (
            sent,
            tuple(
                e for e in sent
                if e.receiver.kind == "mlp" or (e.receiver.kind in ("k", "v") and e.receiver.layer in MIDDLE)
            ),
        ),
        "brought by heads of layers 1 to 3 @eot": (at_end, tuple(s for s in at_end if s.layer in MIDDLE)),
        "brought by heads of layers 0 to 3 @eot": (at_end, tuple(s for s in at_end if s.layer < 4)),
        "brought by heads of layers 0, 4, 5 @eot": (at_end, tuple(s for s in at_end if s.layer not in MIDDLE)),
    }  # fmt: skip


def against_chance(encoder: HookedTextEncoder, batch: Batch, name: str, pool: Pool, draws: int) -> DataFrame:
    """A row per side: what the named set moves, what random sets of its size do, and how many of them do as much."""
    parts, members = pool
    rng = random.Random(0)
    drawn = [tuple(rng.sample(list(parts), len(members))) for _ in range(draws)]
    effects = clip_lens.patch_effects(encoder, batch, [members, *drawn], progress=False).where(segment="correct")
    found = []
    for side, table in effects.fraction().groupby("side", sort=False):
        own, chance = table["fraction"].iloc[0], table["fraction"].iloc[1:]
        as_much = int((chance >= own).sum())
        found.append({
            "name": name, "parts": len(members), "of": len(parts), "side": side, "share": own, "draws": draws,
            "mean": chance.mean(), "lower": chance.quantile(0.025), "upper": chance.quantile(0.975),
            "largest": chance.max(), "as much": as_much, "p": (1 + as_much) / (1 + draws),
        })  # fmt: skip
    return DataFrame(found)


def lines(table: DataFrame) -> list[dict[str, Any]]:
    """A table as JSON has it: a mapping per row, numbers to four digits."""
    return json.loads(table.round(DIGITS).to_json(orient="records"))


if __name__ == "__main__":
    sys.exit(main())
