"""The numbers that tutorial 3 reads: what the script measures, and that the committed file is of the embedded model."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pandas as pd
import pytest

import clip_lens
from clip_lens import Site

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("path_numbers", ROOT / "scripts" / "path_numbers.py")
script = importlib.util.module_from_spec(SPEC)
sys.modules["path_numbers"] = script
SPEC.loader.exec_module(script)


@pytest.fixture(scope="module")
def batch() -> clip_lens.Batch:
    pairs, images = clip_lens.read_pairs()[:24], clip_lens.ImageStore.open("tiny")
    return clip_lens.align(pairs, images, clip_lens.load(), run="affirmative")


def test_all_heads_at_the_end_of_text_move_everything(batch: clip_lens.Batch) -> None:
    shares = script.shares_of(clip_lens.load(), batch).set_index(["name", "side"])["share"]
    assert shares["heads of layers 0, 1, 2, 3, 4, 5 @eot"].to_list() == pytest.approx([1, 1], abs=1e-4)
    assert len(shares) == 2 * (len(script.ways()) + len(script.receivers()))


def test_chance_counts_the_random_sets_that_do_as_much(batch: clip_lens.Batch) -> None:
    encoder = clip_lens.load()
    heads = encoder.sites("head")
    found = script.against_chance(encoder, batch, "two", (heads, (heads[0], heads[1])), 9).set_index("side")
    rng = random.Random(0)
    for side in ("caption", "foil"):
        shares = []
        rng.seed(0)
        for chosen in [(heads[0], heads[1]), *(tuple(rng.sample(heads, 2)) for _ in range(9))]:
            one = clip_lens.patch_effects(encoder, batch, [chosen], progress=False).where(segment="correct", side=side)
            shares.append(float(one.values.sum() / one.total.sum()))
        as_much = sum(share >= shares[0] for share in shares[1:])
        line = found.loc[side]
        assert line["share"] == pytest.approx(shares[0], abs=1e-5)
        assert (line["as much"], line["p"]) == (as_much, (1 + as_much) / 10)
        assert line["largest"] == pytest.approx(max(shares[1:]), abs=1e-5)


def test_a_named_set_is_part_of_the_pool_that_it_is_drawn_from() -> None:
    for pool, members in script.pools(clip_lens.load()).values():
        assert 0 < len(set(members)) == len(members) < len(set(pool)) == len(pool)
        assert set(members) < set(pool)


def test_the_committed_file_is_of_the_embedded_model_and_names_no_place_of_a_machine() -> None:
    text = (ROOT / "tutorials" / "results" / "paths.json").read_text(encoding="utf-8")
    found = json.loads(text)
    weights = {name: found[name]["record"]["weights"] for name in ("embedded", "second seed")}
    assert weights["embedded"] == clip_lens.load().digest != weights["second seed"]
    for model in weights:
        chance = pd.DataFrame(found[model]["chance"])
        assert (chance["draws"] == 99).all() and len(chance) == 24
        assert ((1 + chance["as much"]) / 100 - chance["p"]).abs().max() < 1e-9
        assert found[model]["record"]["model"] == "tiny"
    assert "/" not in "".join(str(found[model]["record"].get("images", "")) for model in weights)


def test_the_committed_shares_are_those_of_today() -> None:
    file = json.loads((ROOT / "tutorials" / "results" / "paths.json").read_text(encoding="utf-8"))
    pairs, images = clip_lens.read_pairs()[: script.PAIRS], clip_lens.ImageStore.open("tiny")
    encoder = clip_lens.load()
    whole = clip_lens.align(pairs, images, encoder, run="affirmative")
    effects = clip_lens.patch_effects(encoder, whole, [Site("head", 0)], progress=False).where(segment="correct")
    told = pd.DataFrame(file["embedded"]["shares"]).set_index(["direction", "name", "side"])["share"]
    for side, share in effects.fraction().set_index("side")["fraction"].items():
        assert told["adding", "heads of layer 0", side] == pytest.approx(share, abs=2e-4)
