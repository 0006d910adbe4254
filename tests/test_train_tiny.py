"""The training script: a seed fixes the weights, and its shortcuts equal open_clip's own way."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clip_lens.tiny import scenes

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_tiny.py"


def _script():
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


train_tiny = _script()
SHORT = train_tiny.Recipe(pool=40, see_steps=3, see_batch=8, read_steps=4, read_pairs=8, read_images=16, ramp=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def state():
    return train_tiny.train(3, SHORT)[0]


def test_a_seed_fixes_every_bit(state):
    again = train_tiny.train(3, SHORT)[0]
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_another_seed_gives_other_weights(state):
    other = train_tiny.train(4, SHORT)[0]
    assert not torch.equal(state["text_projection"], other["text_projection"])


def test_reading_a_cut_text_is_reading_the_padded_one(state):
    model, texts = train_tiny.restored(state), scenes.scene_pairs(20).caption.tolist()
    short = train_tiny.read(model, torch.stack([train_tiny.tokens_of(text) for text in texts]))
    torch.testing.assert_close(short, model.encode_text(train_tiny.tokenizer()(texts), normalize=True))


def test_training_sees_the_pixels_that_a_saved_picture_gives(tmp_path):
    (path,) = scenes.save_pictures([5], tmp_path)
    config = open_clip.transform.PreprocessCfg(**train_tiny.PREPROCESS)
    loaded = open_clip.transform.image_transform_v2(config, is_train=False)(Image.open(path))
    pixels = torch.from_numpy(scenes.render(scenes.sample_scene(5)))[None]
    assert torch.equal(train_tiny.normalised(pixels)[0], loaded)


def test_truth_by_table_is_truth_by_things():
    pool, texts = [scenes.sample_scene(seed) for seed in range(60)], scenes.scene_pairs(60).foil.tolist()
    expected = [[scenes.holds(scene, text) for scene in pool] for text in texts]
    assert np.array_equal(train_tiny.truth(texts, train_tiny.presence(pool)), expected)


def test_every_word_of_a_caption_has_a_trained_row(state):
    pairs = scenes.scene_pairs(300)
    used = torch.unique(train_tiny.tokenizer()(pairs.caption.tolist() + pairs.foil.tolist()))
    assert set(used.tolist()) - {0} <= set(state["token_embedding.rows"].tolist())


def test_held_out_combinations_are_never_negated_in_training():
    pool = train_tiny.gather(60)
    batches = train_tiny.pair_batches(pool, SHORT, np.random.default_rng(0))
    claims = [claim for _ in range(20) for text in next(batches)[0] for claim in scenes.clauses(text)]
    held_out = [claim for claim in claims if (claim.colour, claim.shape) in scenes.HELD_OUT]
    assert held_out and not any(claim.negated for claim in held_out)


def test_patterns_and_streams_are_the_towers_own(state):
    model, pairs = train_tiny.restored(state), scenes.scene_pairs(6)
    tokens = torch.stack([train_tiny.tokens_of(text) for text in pairs.caption])
    patterns, streams = train_tiny.patterns(model, tokens), train_tiny.streams(model, tokens)
    block, length = model.transformer.resblocks[2], tokens.shape[1]
    mask, normed = model.attn_mask[:length, :length], block.ln_1(streams[2])
    _, seen = block.attn(normed, normed, normed, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(patterns[2], seen.transpose(0, 1))
    torch.testing.assert_close(train_tiny.pooled(model, streams[-1], tokens), train_tiny.read(model, tokens))


def test_tracing_moves_all_of_d_from_the_negator_at_the_start_and_the_pooled_position_in_the_end(state):
    model = train_tiny.restored(state)
    shares = train_tiny.traced(model, train_tiny.score(model, scenes.scene_pairs(40)), floor=-float("inf"))
    for side in shares.values():
        assert side["negator"][0] == pytest.approx(1, abs=1e-2) == side["eot"][-1]
        assert side["negator"][-1] == side["eot"][0] == pytest.approx(0, abs=1e-2)


def test_shipped_weights_are_small_and_half_precision():
    state = load_file(train_tiny.ASSETS / "model.safetensors")
    floats = [value for value in state.values() if value.is_floating_point()]
    assert all(value.dtype == torch.float16 for value in floats)
    assert (train_tiny.ASSETS / "model.safetensors").stat().st_size <= 4_000_000


@pytest.mark.slow
def test_the_recipe_reaches_its_targets_again():
    """Ten minutes. The bits hold on one kind of processor and version of torch, the targets should hold anywhere."""
    seed = int(json.loads((train_tiny.ASSETS / "card.json").read_text())["shipped seed"])
    state, _ = train_tiny.train(seed, train_tiny.Recipe())
    targets = train_tiny.measure(train_tiny.restored(state), 200)["targets"]
    assert all(train_tiny.reached(row) for row in targets.values()), targets


def test_tuning_changes_the_text_tower_alone_and_learns_the_new_words_row():
    before = load_file(train_tiny.ASSETS / "model.safetensors")
    recipe = train_tiny.replace(train_tiny.TUNING, pool=40, read_steps=2, read_pairs=8, read_images=16)
    after, _ = train_tiny.tune(before, 0, recipe)
    changed = train_tiny.changed(before, after)
    assert changed and not any(name.startswith("visual") for name in changed)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in changed)
    (new,) = set(after["token_embedding.rows"].tolist()) - set(before["token_embedding.rows"].tolist())
    assert train_tiny.tokenizer().decode([new]).strip() == "without"
    again, _ = train_tiny.tune(before, 0, recipe)
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_a_claim_put_anew_is_the_same_claim():
    pairs = scenes.scene_pairs(40, forms=("picture-with",))
    said = train_tiny.without_pairs(40, first=scenes.FRESH)
    assert list(said.key) == list(
        train_tiny.scenes.scene_pairs(40, forms=("picture-with",), kinds=train_tiny._ASKED).key
    )
    assert all((" no " in old) == (" without " in train_tiny.put_anew(old)) for old in (*pairs.caption, *pairs.foil))
    assert train_tiny.put_anew("There is no circle.") == "There is no circle."


def test_the_shipped_fine_tune_is_what_its_card_measured():
    card = json.loads((train_tiny.ASSETS / "tuned-without.json").read_text())
    state = load_file(train_tiny.ASSETS / "model.safetensors") | load_file(
        train_tiny.ASSETS / "tuned-without.safetensors"
    )
    assert train_tiny.measure_tuned(train_tiny.restored(state), 20)['"without"']["accuracy"]["caption"] > 0.8
    before, after = (card[when]['"without"']["accuracy"] for when in ("before", "after"))
    assert before["caption"] < 0.2 < 0.97 < after["caption"] and before["foil"] > 0.85
