"""Texts in, unit embeddings out: tokens, cutting, hooks, caches, sites."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from towers import random_clip, random_encoder, random_store

import clip_lens
from clip_lens.model.encoder import HookedTextEncoder, unseen_words
from clip_lens.model.load import load

TEXTS = ["There are no circles.", "A cat.", "There is a red square and not any blue star in the picture."]
CUT = {torch.float32: 1e-6, torch.float64: 5e-14}


@pytest.fixture(scope="module")
def encoder() -> HookedTextEncoder:
    return random_encoder(layers=2)


@pytest.fixture(scope="module")
def bidirectional() -> HookedTextEncoder:
    return random_encoder(layers=2, causal=False, pool_type="last", proj_bias=True)


@pytest.fixture(scope="module")
def tiny() -> HookedTextEncoder:
    return clip_lens.load()


@pytest.mark.parametrize("dtype", CUT)
@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 49407}], ids=["argmax", "eos"])
def test_unit_embeddings_are_open_clips_and_cutting_changes_nothing(dtype: torch.dtype, text: dict[str, Any]) -> None:
    module = random_clip(layers=3, **text)
    encoder = load(module, tokenizer=open_clip.SimpleTokenizer(), dtype=dtype)
    tokens = encoder.tokenize(TEXTS)
    with torch.no_grad():
        expected = module.to(dtype).encode_text(tokens, normalize=True)
    assert encoder.cut(tokens).shape == (3, 16)
    padded = encoder.read(encoder.tower(tokens), encoder.pool(tokens))
    for found in (encoder(TEXTS), encoder(tokens), encoder(encoder.cut(tokens)), padded):
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= CUT[dtype]
    assert (encoder(TEXTS).norm(dim=-1) - 1).abs().max() <= 1e-6


def test_a_bidirectional_tower_is_not_cut(bidirectional: HookedTextEncoder) -> None:
    at_argmax = random_encoder(layers=2, causal=False)
    for encoder in (bidirectional, at_argmax):
        tokens = encoder.tokenize(TEXTS[:2])
        assert tokens.shape == (2, 16)
        assert encoder.cut(tokens) is tokens
        short = tokens[:, :8]  # cutting would change what it says
        cut = encoder.read(encoder.tower(short), encoder.pool(short))
        assert (cut - encoder(tokens)).abs().max() > 1e-3


def test_a_causal_tower_pooled_at_the_last_position_is_not_cut() -> None:
    module = random_clip(layers=2, pool_type="last")
    encoder = load(module, tokenizer=open_clip.SimpleTokenizer())
    tokens = encoder.tokenize(TEXTS)
    assert encoder.causal
    assert encoder.cut(tokens) is tokens
    with torch.no_grad():
        assert (encoder(TEXTS) - module.encode_text(tokens, normalize=True)).abs().max() <= 1e-6


def test_bidirectional_embeddings_are_open_clips() -> None:
    module = random_clip(layers=2, causal=False, pool_type="last", proj_bias=True)
    encoder = load(module, tokenizer=open_clip.SimpleTokenizer(context_length=16), dtype=torch.float64)
    with torch.no_grad():
        expected = module.double().encode_text(encoder.tokenize(TEXTS[:2]), normalize=True)
    assert (encoder(TEXTS[:2]) - expected).abs().max() <= 1e-13


def test_length_counts_to_the_end_of_text(encoder: HookedTextEncoder, bidirectional: HookedTextEncoder) -> None:
    assert encoder.length(encoder.tokenize(TEXTS)).tolist() == [7, 5, 16]
    # SimpleTokenizer pads with 0; a text without any content has no positions
    assert bidirectional.length(bidirectional.tokenize(TEXTS[:2])).tolist() == [7, 5]
    assert bidirectional.length(torch.zeros(2, 16, dtype=torch.long)).tolist() == [0, 0]
    assert bidirectional.length(torch.full((1, 16), 5)).tolist() == [16]


def test_texts_too_long_for_the_context(encoder: HookedTextEncoder, bidirectional: HookedTextEncoder) -> None:
    just, over = " ".join(["cat"] * 75), " ".join(["cat"] * 76)
    assert encoder.fits([just, over, "a"]) == [True, False, True]
    assert encoder.fits([]) == []
    assert encoder.tokenize([just]).shape == (1, 77)
    with pytest.raises(ValueError, match=r"1 of 2 texts have more than 77 tokens.*'cat cat"):
        encoder.tokenize(["a", over])
    with pytest.raises(ValueError, match="more than 16 tokens"):
        bidirectional([" ".join(["cat"] * 20)])
    assert bidirectional.fits([" ".join(["cat"] * 14), " ".join(["cat"] * 15)]) == [True, False]


def test_one_text_one_row_of_tokens_no_texts(encoder: HookedTextEncoder) -> None:
    expected = encoder([TEXTS[0]])
    assert torch.equal(encoder(TEXTS[0]), expected)
    assert torch.equal(encoder(encoder.tokenize(TEXTS[0])[0]), expected)
    assert encoder([]).shape == (0, encoder.d_embed)


def test_rows_do_not_see_each_other(encoder: HookedTextEncoder) -> None:
    together = encoder(TEXTS)
    for row, text in enumerate(TEXTS):
        assert (encoder(text)[0] - together[row]).abs().max() <= 1e-6


def test_hooks_act_and_are_gone(encoder: HookedTextEncoder) -> None:
    plain = encoder(TEXTS)
    zero = ("blocks.0.hook_attn_out", lambda value, hook: 0 * value)
    changed = encoder(TEXTS, hooks=[zero])
    assert (changed - plain).abs().max() > 1e-3
    cache = encoder.cache(TEXTS, hooks=[zero])
    final = cache["blocks.1.hook_resid_post"]
    y = encoder.tower.unembed(encoder.tower.ln_final(final))
    assert (encoder.read(y, encoder.pool(encoder.tokens(TEXTS))) - changed).abs().max() <= 1e-6
    assert (cache["blocks.0.hook_attn_out"] == 0).all()
    assert torch.equal(encoder(TEXTS), plain)
    assert not any(point.has_hooks() for point in encoder.tower.hook_dict.values())


def test_cache_holds_what_is_named(encoder: HookedTextEncoder) -> None:
    names = ["blocks.1.attn.hook_pattern", "blocks.0.attn.hook_result"]
    cache = encoder.cache(TEXTS, names=names)
    assert set(cache) == set(names)
    assert cache[names[0]].shape == (3, 4, 16, 16)
    assert set(encoder.cache(TEXTS, names=iter(names))) == set(names)
    assert set(encoder.cache(TEXTS, names=names[0])) == {names[0]}
    assert "blocks.1.hook_resid_mid" in encoder.cache(TEXTS)
    assert len(encoder.cache(TEXTS, names=[])) == 0


def test_unknown_hooks(encoder: HookedTextEncoder) -> None:
    for call in (
        lambda: encoder.cache(TEXTS, names=["blocks.9.hook_resid_pre", "hook_embed"]),
        lambda: encoder(TEXTS, hooks=[("blocks.9.hook_resid_pre", lambda value, hook: value)]),
        lambda: encoder.cache(TEXTS, hooks=[("blocks.9.hook_resid_pre", lambda value, hook: value)]),
    ):
        with pytest.raises(ValueError, match=r"no hook \['blocks.9.hook_resid_pre'\].*; .*hook_dict"):
            call()


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("embed", 1),
        ("resid", 3),
        ("mid", 2),
        ("attn", 2),
        ("mlp", 2),
        ("head", 8),
        ("q", 8),
        ("k", 8),
        ("v", 8),
        ("pattern", 8),
        ("neuron", 512),
        ("result", 8),
        ("norm", 1),
        ("projection", 1),
    ],
)
def test_sites(kind: Any, count: int, encoder: HookedTextEncoder) -> None:
    sites = encoder.sites(kind)
    assert len(set(sites)) == len(sites) == count
    assert len(encoder.sites(kind, slots=("a", 3))) == 2 * count
    assert {site.layer for site in encoder.sites(kind, layers=[0])} == {0}


def test_sites_that_do_not_exist(encoder: HookedTextEncoder) -> None:
    with pytest.raises(ValueError, match=r"mlp sites at layers 0..1, got \[2\]"):
        encoder.sites("mlp", layers=[0, 2])
    with pytest.raises(ValueError, match=r"got \[-1\]"):
        encoder.sites("resid", layers=[-1])
    with pytest.raises(ValueError, match="there are embed, resid"):
        encoder.sites("heads")  # type: ignore[arg-type]


def test_one_slot_is_not_read_as_its_letters(encoder: HookedTextEncoder) -> None:
    with pytest.raises(TypeError, match=r"got the text 'eot'; write slots=\['eot'\]"):
        encoder.sites("resid", slots="eot")


def test_without_a_tokenizer() -> None:
    encoder = load(random_clip(layers=1))
    tokens = torch.randint(1, 99, (2, 77), generator=torch.Generator().manual_seed(0))
    assert encoder(tokens).shape == (2, 32)
    with pytest.raises(ValueError, match=r"without a tokenizer; give tokens, or load\(module, tokenizer="):
        encoder("a text")


def test_it_says_what_it_is(encoder: HookedTextEncoder) -> None:
    said = repr(encoder)
    for part in ("2 layers", "4 heads", "d_model 64", "d_embed 32", "causal", "argmax", "20.09"):
        assert part in said
    assert "<code>HookedTextEncoder" in encoder._repr_html_()
    assert encoder.to(torch.float32) is encoder


def test_the_embedded_model_names_words_that_it_never_saw(tiny: HookedTextEncoder) -> None:
    with pytest.warns(UserWarning, match="never saw 'zeppelins' in training.*this word"):
        tokens = tiny.tokenize(["There are no circles.", "There are no zeppelins"])
    assert unseen_words(tiny, tokens).tolist() == [False, True]
    with pytest.warns(UserWarning, match="'purring', 'zeppelins' .*these words"):
        tiny(["zeppelins purring"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(["There are no circles.", "There is a red square.", ""])
        assert not unseen_words(tiny, tiny.tokenize([""])).any()


def test_other_models_know_every_word(encoder: HookedTextEncoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not unseen_words(encoder, encoder.tokenize(["zeppelins"])).any()


def test_strings_and_single_tokens(encoder: HookedTextEncoder) -> None:
    tower = encoder.tower
    tokens: Tensor = encoder.cut(encoder.tokenize("There are no circles."))
    assert tower.to_str_tokens(tokens) == ["<start_of_text>", "there", "are", "no", "circles", ".", "<end_of_text>"]
    assert len(tower.to_str_tokens("There")) == 77
    assert tower.to_single_token("circles") == int(tokens[0, 4])
    with pytest.raises(ValueError, match="'red circles' is not one token but 2"):
        tower.to_single_token("red circles")


def test_reading_takes_one_position_per_row(encoder: HookedTextEncoder) -> None:
    y = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 4, 2])
    expected = torch.stack([F.normalize(y[row, position], dim=0) for row, position in enumerate(at.tolist())])
    assert torch.equal(encoder.read(y, at), expected)


def test_the_digest_is_that_of_the_weights_as_they_are_now() -> None:
    encoder, module = random_encoder(layers=2), random_clip(layers=2)
    first = encoder.digest
    assert load(module).digest == first  # whoever asks, and with which tokenizer
    head = encoder.tower.blocks[1].attn.W_O[2]
    kept, seen = head.clone(), {first}
    with torch.no_grad():
        head.zero_()
    seen.add(encoder.digest)
    head.data.copy_(kept)
    assert encoder.digest == first
    a, b = torch.ones(256, 1), torch.full((1, 64), 1e-3)
    encoder.tower.blocks[0].mlp.in_weight.data += a @ b  # a low-rank adapter, merged
    seen.add(encoder.digest)
    assert len(seen) == 3


def test_unchanged_holds_the_digest_and_lets_go_of_it() -> None:
    encoder = random_encoder(layers=1)
    first = encoder.digest
    with pytest.raises(ZeroDivisionError), encoder.unchanged():
        with encoder.unchanged():
            assert encoder.digest == first
        encoder.tower.W_U.add_(1)  # what nobody should do inside: the digest is held
        assert encoder.digest == first
        raise ZeroDivisionError
    assert encoder.digest != first


def test_the_digest_sees_an_edit_that_only_float64_holds() -> None:
    encoder = random_encoder(layers=2, dtype=torch.float64)
    before = encoder.digest
    assert before == random_encoder(layers=2).digest
    with torch.no_grad():
        encoder.tower.ln_final.w[3] += 1e-12
    assert encoder.digest != before


@pytest.mark.parametrize(
    ("dtype", "precision", "allowed"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-6),
        (torch.float16, torch.float32, 5e-3),
        (torch.bfloat16, torch.float32, 5e-2),
    ],
)
def test_embeddings_are_precise_whatever_the_tower_runs_in(
    dtype: torch.dtype, precision: torch.dtype, allowed: float
) -> None:
    encoder, exact = random_encoder(layers=2, dtype=dtype), random_encoder(layers=2, dtype=torch.float64)
    u = encoder(TEXTS)
    assert (encoder.dtype, encoder.precision, u.dtype) == (dtype, precision, precision)
    assert encoder.cache(TEXTS, names="blocks.0.hook_mlp_out")["blocks.0.hook_mlp_out"].dtype == dtype
    assert (u.double() - exact(TEXTS)).abs().max() <= allowed
    assert (u.double().norm(dim=-1) - 1).abs().max() <= 4 * torch.finfo(precision).eps


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_module_in_memory_keeps_its_precision_unless_told(given: torch.dtype) -> None:
    module = random_clip(layers=2).to(given)
    assert load(module).dtype == (torch.float64 if given == torch.float64 else torch.float32)
    assert load(module, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_text_tower_in_float64_beside_half_precision_images_keeps_its_precision() -> None:
    module = random_clip(layers=2).double()
    module.visual.half()
    encoder = load(module, tokenizer=open_clip.SimpleTokenizer())
    assert encoder.dtype == torch.float64
    tokens = encoder.tokenize(TEXTS)
    with torch.no_grad():
        assert (encoder(TEXTS) - module.encode_text(tokens, normalize=True)).abs().max() <= 1e-13


def test_nothing_is_cut_under_a_users_hooks() -> None:
    """A hook that addresses a position from the end acts on the same one, alone and among longer texts."""
    encoder = random_encoder(layers=2)
    tokens = encoder.tokenize(TEXTS)

    def edit(value: Tensor, hook: object) -> Tensor:
        value[:, -71, 3] += 5.0  # the seventh of 77: the end of the first text
        return value

    with encoder.tower.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", edit)]):
        assert encoder.hooked == ("blocks.0.hook_resid_pre",)
        assert encoder.cut(tokens).shape == (3, 77)
        alone, together = encoder(tokens[:1]), encoder(tokens)
        assert encoder.cache(tokens[:1])["blocks.0.hook_resid_pre"].shape[1] == 77
    assert encoder.cut(tokens).shape == (3, 16) and encoder.hooked == ()
    assert (alone - together[:1]).abs().max() <= 1e-6
    assert (alone - encoder(tokens[:1])).abs().max() > 1e-3


def test_hooks_of_the_call_itself_do_not_keep_it_from_cutting(encoder: HookedTextEncoder) -> None:
    name, seen = "blocks.0.hook_resid_pre", []
    look = (name, lambda value, hook: seen.append((value.shape[1], encoder.hooked)))
    encoder(TEXTS[0], hooks=[look])
    assert encoder.cache(TEXTS[0], hooks=[look], names=name)[name].shape[1] == 7
    assert seen == [(7, (name,)), (7, (name,))]


def test_threads_get_what_one_thread_gets() -> None:
    """Three threads, eighteen calls of three verbs on one encoder."""
    encoder = random_encoder(layers=2)
    pairs = clip_lens.read_pairs()[:6]
    batch = clip_lens.align(pairs, random_store(pairs, encoder.d_embed), encoder)
    places = encoder.sites("resid", slots=("negator", "eot")) + encoder.sites("head")

    def patched(n: int) -> Tensor:
        return clip_lens.patch_effects(encoder, batch, places[n:], progress=False).values

    def cached(n: int) -> Tensor:
        return encoder.cache(TEXTS[n % 3 :], names="blocks.1.attn.hook_z")["blocks.1.attn.hook_z"]

    def attended(n: int) -> Tensor:
        return clip_lens.attention_effects(encoder, batch[n:]).values

    calls = [partial(verb, n) for n in range(6) for verb in (patched, cached, attended)][:18]
    serial = [call() for call in calls]
    with ThreadPoolExecutor(3) as pool:
        threaded = list(pool.map(lambda call: call(), calls))
    for one, other in zip(serial, threaded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert encoder.hooked == ()


def test_an_encoder_is_pickled_and_copied() -> None:
    encoder = random_encoder(layers=2)
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert again.digest == encoder.digest and torch.equal(again(TEXTS), encoder(TEXTS))


def test_a_tokenizer_is_called_by_one_thread_at_a_time() -> None:
    """transformers' keep the length to pad to while they run: two lengths at once would mix."""
    inside, most = [], []

    def tokenizer(texts: list[str], context_length: int = 77) -> Tensor:
        inside.append(context_length)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return open_clip.SimpleTokenizer()(texts, context_length)

    encoder = load(random_clip(layers=1), tokenizer=tokenizer)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(encoder.tokenize, [[text] for text in TEXTS]))
    assert max(most) == 1 and len(most) > 6
