"""The numbers on circuits that the README and tutorial 3 quote, measured on the embedded model, as one JSON file.

    python scripts/circuit_numbers.py tutorials/results/circuits.json
    python scripts/circuit_numbers.py --learned tutorials/results/learned_circuits.json

Circuits of MIB's sizes are found on some pairs and judged on others, by three scores of the edges (exact, EAP, EAP-IG)
and two rankings (signed, absolute), per side of the negation; captions are run. Both ways of holding pairs out are
measured: by text, where no text of one part stands in the other, and by image. What chance does is told by many
circuits of each size drawn at random. f, CPR and CMD are those of method section 8, of pruned circuits; intervals are
95 % bootstrap intervals over pairs. It takes about a quarter of an hour on one core.

`--learned` measures circuits that are learned, from three seeds, and those that other rules select, on the pairs held
out by text: of edges and by slot, with the number of weights that each has. It takes about as long.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

import clip_lens
from clip_lens.core.effects import Effects
from clip_lens.core.keep import joined
from clip_lens.core.record import as_json
from clip_lens.data.batch import Batch
from clip_lens.files import written_whole
from clip_lens.methods.circuits.discover import agreement, repeated
from clip_lens.methods.circuits.faithfulness import Faithfulness, faithfulness
from clip_lens.methods.circuits.selection import SHARES, cancellation, random_sizes, sized_circuits
from clip_lens.model.encoder import HookedTextEncoder

STEPS = 5
DIGITS = 4
HELD_OUT = ("text", "image")
SIZES = tuple(share for share in SHARES if 0.02 <= share < 1)
"""Shares that are learned, over which areas are told: below them next to nothing is left of d, whatever is kept."""
SLOT_SIZES = (0.2, 0.1, 0.05, 0.02)


def main(arguments: list[str] | None = None) -> int:
    """0 when the file is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--pairs", type=int, default=150, help="pairs to find on, and as many to judge on")
    parser.add_argument("--random", type=int, default=99, help="circuits of each size that are drawn at random")
    parser.add_argument("--learned", action="store_true", help="learned circuits, circuits by slot, other selections")
    parser.add_argument("--seeds", type=int, default=3, help="of the gates that are learned")
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(given.out) as temporary:
        numbers = learned(given.pairs, given.seeds) if given.learned else measured(given.pairs, given.random)
        temporary.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def measured(pairs: int, random: int) -> dict[str, Any]:
    """All numbers: what either way of holding pairs out gives, and what chance does."""
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    batch = clip_lens.align(clip_lens.read_pairs(), store, encoder, run="caption")
    splits = {by: tuple(half[:pairs] for half in batch.split(0.5, 0, by)) for by in HELD_OUT}
    return {
        "written by": "scripts/circuit_numbers.py",
        "steps of EAP-IG": STEPS,
        **{f"held out by {by}": of_split(encoder, *splits[by]) for by in HELD_OUT},
        "chance": chance(encoder, splits["text"][1], random),
    }


def of_split(encoder: HookedTextEncoder, found: Batch, judged: Batch) -> dict[str, Any]:
    """What circuits found on one part do on the other, and how far their scores are from exact ones there."""
    scores = scored(encoder, found)
    circuits = [
        circuit.named(name)
        for name, effects in scores.items()
        for signed in (True, False)
        for circuit in sized_circuits(effects, signed=signed)
    ]
    judge = faithfulness(encoder, judged, circuits, progress=False)
    exact = clip_lens.patch_effects(encoder, judged, encoder.edges(), progress=False)
    return {
        "found on": len(found),
        "judged on": len(judged),
        "judged pairs with a text that was found on": repeated(found, judged),
        "record": as_json(judge.effects.record),
        "f": lines(judge.table().drop(columns=["pruned", "lost", "of", "dropped"])),
        "areas": lines(judge.areas()),
        "agreement with exact scores of the judged pairs": [
            {"circuit": name, **line} for name, effects in scores.items() for line in lines(agreement(exact, effects))
        ],
    }


def scored(encoder: HookedTextEncoder, batch: Batch) -> dict[str, Effects]:
    """The scores of every edge, by each method."""
    edges = encoder.edges()
    return {
        "exact": clip_lens.patch_effects(encoder, batch, edges, progress=False),
        "EAP": clip_lens.gradient_effects(encoder, batch, edges, progress=False),
        "EAP-IG": clip_lens.gradient_effects(encoder, batch, edges, steps=STEPS, progress=False),
    }


def chance(encoder: HookedTextEncoder, judged: Batch, random: int) -> dict[str, Any]:
    """f and the areas of circuits drawn at random, over their seeds: mean, the middle 95 %, smallest and largest."""
    f, areas = [], []
    for seed in range(1, random + 1):
        judge = faithfulness(encoder, judged, random_sizes(encoder, seed), progress=False)
        f.append(judge.table(resamples=1)[["share", "side", "f"]])
        areas.append(Faithfulness(both_rankings(judge.effects)).areas(resamples=1)[["side", "CPR", "CMD"]])
    return {
        "circuits of each size": random,
        "shares": list(SHARES),
        "f": over_seeds(f, ["share", "side"], "f"),
        "CPR": over_seeds(areas, ["side"], "CPR"),
        "CMD": over_seeds(areas, ["side"], "CMD"),
    }


def both_rankings(effects: Effects) -> Effects:
    """Random circuits have no scores to rank by: each counts for either ranking."""
    signed = tuple(replace(place, ranking="signed") for place in Faithfulness(effects).places)
    return joined([replace(effects, places=signed), effects])


def learned(pairs: int, seeds: int) -> dict[str, Any]:
    """What circuits that are learned or selected by other rules do, of edges and by slot, held out by text."""
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    batch = clip_lens.align(clip_lens.read_pairs(), store, encoder, run="caption")
    found, judged = (half[:pairs] for half in batch.split(0.5, 0, "text"))
    return {
        "written by": "scripts/circuit_numbers.py --learned",
        "steps of EAP-IG": STEPS,
        "seeds": seeds,
        "slots": list(batch.occurring),
        **of_rules(encoder, found, judged, seeds),
    }


def of_rules(encoder: HookedTextEncoder, found: Batch, judged: Batch, seeds: int) -> dict[str, Any]:
    """What circuits found on one part by each rule do on the other."""
    slots = found.occurring
    plain, at = ({"": encoder.edges(), " by slot": encoder.edges(slots=slots)}[name] for name in ("", " by slot"))
    scores = {
        name: clip_lens.gradient_effects(encoder, found, edges, steps=STEPS, rows=64, progress=False)
        for name, edges in (("EAP-IG", plain), ("EAP-IG by slot", at))
    }
    chosen = {name: sized_circuits(effects, SIZES) for name, effects in scores.items()}
    chosen |= {
        f"EAP-IG, {name}": sized_circuits(scores["EAP-IG"], SIZES, **how)
        for name, how in (
            ("certain signs", {"certain": 0.95}),
            ("from both ends", {"select": "both ends"}),
            ("nodes", {"select": "nodes"}),
        )
    }
    courses: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for name, by, sizes in (("learned", (), SIZES), ("learned by slot", slots, SLOT_SIZES)):
            circuits = clip_lens.learn_circuit(encoder, found, share=sizes, slots=by, seed=seed, progress=False)
            chosen[f"{name}, seed {seed}"] = [circuit.pruned() for circuit in circuits]
            courses[f"{name}, seed {seed}"] = lines(circuits[-1].training)
            print(f"{name}, seed {seed}", flush=True)
    circuits = [circuit.named(name) for name, some in chosen.items() for circuit in some]
    judge = faithfulness(encoder, judged, circuits, progress=False)
    weights = [len(circuit.at_slots(slots)) for circuit in circuits]
    table = judge.table().drop(columns=["pruned", "lost", "dropped", "ranking"])
    return {
        "found on": len(found),
        "judged on": len(judged),
        "judged pairs with a text that was found on": repeated(found, judged),
        "record": as_json(judge.effects.record),
        "weights of every edge at every slot": len(at),
        "f": lines(table.assign(weights=(weights * len(table))[: len(table)])),
        "areas": lines(judge.areas()),
        "cancellation over slots": hidden(cancellation(scores["EAP-IG by slot"])),
        "courses": courses,
    }


def hidden(table: DataFrame) -> dict[str, float]:
    """How much of all that edges do at slots their sums hide."""
    kept = table["sum"].abs().sum() / table["absolute"].sum()
    half = table.loc[table["cancellation"] > 0.5]
    return {
        "of all": plain(1 - kept),
        "edges of which more than half": len(half),
        "edges": len(table),
    }


def over_seeds(tables: list[DataFrame], by: list[str], value: str) -> list[dict[str, Any]]:
    """How a number is spread over seeds, a line per group."""
    grouped = pd.concat(tables).groupby(by, sort=False)[value]
    told = {
        "mean": grouped.mean(),
        "lower": grouped.quantile(0.025),
        "upper": grouped.quantile(0.975),
        "smallest": grouped.min(),
        "largest": grouped.max(),
    }
    return lines(DataFrame(told).reset_index())


def lines(table: DataFrame) -> list[dict[str, Any]]:
    """A table as JSON has it: a mapping per row, numbers to four digits."""
    return [{name: plain(value) for name, value in row.items()} for row in table.to_dict("records")]


def plain(value: Any) -> Any:
    """A table's entry as JSON has it, None for a number that isn't there."""
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else round(float(value), DIGITS)
    return value.item() if isinstance(value, np.generic) else value


if __name__ == "__main__":
    sys.exit(main())
