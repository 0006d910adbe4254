"""The numbers that prose quotes: the file is the script's, and its numbers are means over pairs and seeds."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from towers import random_encoder, random_store

import clip_lens
from clip_lens.data.pairs import Pairs
from clip_lens.methods.circuits.faithfulness import faithfulness
from clip_lens.methods.circuits.selection import SHARES, random_sizes, top_edges

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("circuit_numbers", ROOT / "scripts" / "circuit_numbers.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture(scope="module")
def split():
    """A small random tower and ten pairs, five nouns in both orders, split by text."""
    encoder = random_encoder(layers=2, heads=2, width=32, dtype=torch.float64)
    texts = [
        (f"There are no {noun}.", f"There are some {noun}.") for noun in ("dogs", "cats", "cars", "trees", "birds")
    ]
    captions, foils = zip(*(pair[::turn] for pair in texts for turn in (1, -1)), strict=True)
    pairs = Pairs([str(n) for n in range(10)], captions, foils, [f"{n}.png" for n in range(10)])
    batch = clip_lens.align(pairs, random_store(pairs, encoder.d_embed), encoder, run="caption")
    return encoder, *batch.split(0.6, by="text")


def test_f_is_told_by_score_ranking_and_side(split):
    encoder, found, judged = split
    told = script.of_split(encoder, found, judged)
    json.dumps(told, allow_nan=False)
    assert told["judged pairs with a text that was found on"] == 0 and told["record"]["held_out"] == "by text"
    scores = script.scored(encoder, found)
    for name, share, signed, side in (("EAP", 0.5, True, "caption"), ("exact", 0.2, False, "foil")):
        circuit = top_edges(scores[name], int(share * 46), signed=signed).pruned()
        effects = faithfulness(encoder, judged, circuit).effects
        columns = torch.tensor((effects.pairs["side"] == side).to_list())
        values, total = effects.values[0][columns], effects.total[columns]
        ranking = "signed" if signed else "absolute"
        wanted = {"circuit": name, "ranking": ranking, "share": share, "side": side}
        line = next(line for line in told["f"] if wanted.items() <= line.items())
        assert line["f"] == pytest.approx(1 - float(values.sum() / total.sum()), abs=1e-4)
        assert (line["edges"], line["n"]) == (len(circuit), int(columns.sum()))


def test_chance_is_over_seeds(split):
    encoder, _, judged = split
    told = script.chance(encoder, judged, 3)
    tables = [faithfulness(encoder, judged, random_sizes(encoder, seed)).table() for seed in (1, 2, 3)]
    f = [float(t[(t["share"] == 0.5) & (t["side"] == "pooled")]["f"].iloc[0]) for t in tables]
    line = next(line for line in told["f"] if (line["share"], line["side"]) == (0.5, "pooled"))
    assert [line[n] for n in ("mean", "smallest", "largest")] == pytest.approx([np.mean(f), min(f), max(f)], abs=1e-4)
    assert {line["side"] for line in told["CPR"]} == {"caption", "foil", "pooled"} and told["CMD"][0]["mean"] > 0


def test_the_file_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "measured", lambda pairs, random: {"pairs": pairs, "random": random})
    assert script.main([str(tmp_path / "new" / "out.json"), "--pairs", "7"]) == 0
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == {"pairs": 7, "random": 99}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]
    assert script.plain(math.nan) is None and script.plain(np.float64(0.123456)) == 0.1235


def test_the_committed_file_is_of_the_embedded_model_as_it_is():
    told = json.loads((ROOT / "tutorials" / "results" / "circuits.json").read_text(encoding="utf-8"))
    encoder = clip_lens.load()
    for by, repeated in (("text", 0), ("image", 35)):
        part = told[f"held out by {by}"]
        assert (part["found on"], part["judged on"]) == (150, 150)
        assert part["judged pairs with a text that was found on"] == repeated
        assert part["record"]["weights"] == encoder.digest and part["record"]["held_out"] == f"by {by}"
        assert len(part["f"]) == 3 * 2 * 3 * len(SHARES)
    assert told["chance"]["circuits of each size"] == 99


def test_learned_circuits_are_told_with_their_weights(split, monkeypatch):
    encoder, found, judged = split
    monkeypatch.setattr(script, "SIZES", (0.5,))
    monkeypatch.setattr(script, "SLOT_SIZES", (0.2,))
    told = script.of_rules(encoder, found, judged, 1)
    json.dumps(told, allow_nan=False)
    slots = found.occurring
    assert told["weights of every edge at every slot"] == 39 * len(slots) + 7
    circuits = {
        "learned, seed 0": clip_lens.learn_circuit(encoder, found, share=0.5)[0].pruned(),
        "learned by slot, seed 0": clip_lens.learn_circuit(encoder, found, share=0.2, slots=slots)[0].pruned(),
    }
    for name, circuit in circuits.items():
        (line,) = [one for one in told["f"] if one["circuit"] == name and one["side"] == "foil"]
        table = faithfulness(encoder, judged, circuit).table()
        assert line["f"] == pytest.approx(table.loc[table["side"] == "foil", "f"].item(), abs=1e-4)
        into_out = sum(edge.receiver.kind == "out" for edge in circuit.edges())
        each = 1 if circuit.slots else len(slots)
        assert line["weights"] == each * (len(circuit) - into_out) + into_out
        assert len(told["courses"][name]) == len(circuit.training)
    assert 0 <= told["cancellation over slots"]["of all"] <= 1


def test_the_committed_learned_circuits_are_of_the_embedded_model_as_it_is():
    told = json.loads((ROOT / "tutorials" / "results" / "learned_circuits.json").read_text(encoding="utf-8"))
    assert told["record"]["weights"] == clip_lens.load().digest and told["record"]["held_out"] == "by text"
    assert (told["found on"], told["judged on"], told["seeds"]) == (150, 150, 3)
    pooled = [line for line in told["f"] if line["side"] == "pooled"]
    assert len(pooled) == (5 + 3) * len(script.SIZES) + 3 * len(script.SLOT_SIZES)
    f = {(line["circuit"], line["share"]): line["f"] for line in pooled}
    assert min(f[f"learned, seed {seed}", 0.2] for seed in range(3)) > f["EAP-IG", 0.2] + 0.2
