"""Tokenizers as people have them: each is run through the package whole, and nothing is cut or moved in silence."""

from __future__ import annotations

import importlib
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import open_clip
import packaging.version
import pandas as pd
import pytest
import torch
from torch import Tensor
from towers import random_clip, random_store

import clip_lens
from clip_lens.data.pairs import Pairs

LONG = "There are no " + "very " * 90 + "small circles."
SHORT = "There are no circles."
FULL = " ".join(["cat"] * 75)
"""75 words, a start and an end: as long as the context."""


@cache
def simple() -> Any:
    return open_clip.SimpleTokenizer()


def of_int32(texts: list[str], context_length: int = 77) -> Tensor:
    return simple()(texts, context_length).int()


def refusing(texts: list[str], context_length: int = 77) -> Tensor:
    """As OpenAI's does: one text that is too long, and the whole batch is refused."""
    rows = simple()(texts, context_length + 100)
    for text, row in zip(texts, rows, strict=True):
        if row.argmax() >= context_length:
            raise RuntimeError(f"Input {text} is too long for context length {context_length}")
    return rows[:, :context_length].int()


def without_length(texts: Sequence[str]) -> Tensor:
    return simple()(list(texts))


def of_lists(texts: list[str], context_length: int = 77) -> list[list[int]]:
    return simple()(texts, context_length).tolist()


def openais(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`clip.tokenize`; the package imports a part of setuptools that newer ones don't have."""
    monkeypatch.setitem(sys.modules, "pkg_resources", types.SimpleNamespace(packaging=packaging))
    try:
        return importlib.import_module("clip").tokenize
    except ImportError:
        pytest.skip("OpenAI's package is not installed (clip-anytorch)")


TOKENIZERS: dict[str, Callable[..., Any]] = {
    "int32": of_int32,
    "refusing long texts": refusing,
    "without context_length": without_length,
    "lists": of_lists,
}


@pytest.fixture(params=[*TOKENIZERS, "clip.tokenize"])
def tokenizer(request: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    return openais(monkeypatch) if request.param == "clip.tokenize" else TOKENIZERS[request.param]


def encoder_with(tokenizer: Any, **options: Any) -> clip_lens.HookedTextEncoder:
    return clip_lens.load(random_clip(layers=2, **options), tokenizer=tokenizer)


def pairs_with(*texts: str) -> Pairs:
    pairs = clip_lens.read_pairs()[:4]
    frame = pd.DataFrame({"caption": pairs.caption, "foil": pairs.foil, "image": pairs.image})
    extra = pd.DataFrame({"caption": texts, "foil": SHORT, "image": pairs.image[0]})
    return Pairs.from_frame(pd.concat([frame, extra], ignore_index=True))


def test_every_verb_runs_and_says_what_it_says_with_open_clips_tokenizer(tokenizer: Any) -> None:
    encoder, usual = encoder_with(tokenizer), encoder_with(simple())
    pairs = clip_lens.read_pairs()[:4]
    store = random_store(pairs, encoder.d_embed)
    tokens = encoder.tokenize([SHORT])
    assert tokens.dtype == torch.int64 and torch.equal(tokens, usual.tokenize([SHORT]))
    assert encoder.tower.to_tokens(SHORT).dtype == torch.int64
    found, expected = (clip_lens.align(pairs, store, one) for one in (encoder, usual))
    places = encoder.sites("head") + encoder.sites("resid", slots=("negator", "eot"))
    for batch, same in ((found, expected), (found.flip(), expected.flip())):
        assert torch.equal(batch.origin, same.origin) and torch.equal(batch.slot, same.slot)
        ran = [
            [clip_lens.patch_effects(one, of, places, progress=False), clip_lens.attention_effects(one, of)]
            for one, of in ((encoder, batch), (usual, same))
        ]
        for effects, expected_effects in zip(*ran, strict=True):
            torch.testing.assert_close(effects.values, expected_effects.values, rtol=0, atol=0, equal_nan=True)


def test_the_explorer_runs(tokenizer: Any) -> None:
    encoder, pairs = encoder_with(tokenizer), clip_lens.read_pairs()[:4]
    store = random_store(pairs, encoder.d_embed)
    html, usual = (
        clip_lens.explore(one, clip_lens.align(pairs, store, one), images=store).html()
        for one in (encoder, encoder_with(simple()))
    )
    assert "patched into" in html
    assert re.findall(r"[+-]\d+\.\d+", html) == re.findall(r"[+-]\d+\.\d+", usual) != []


def test_texts_that_are_too_long_are_listed(tokenizer: Any) -> None:
    encoder = encoder_with(tokenizer)
    assert encoder.fits([SHORT, LONG, SHORT, "a cat"]) == [True, False, True, True]
    assert encoder.fits([LONG]) == [False]
    pairs = pairs_with(LONG)
    batch = clip_lens.align(pairs, random_store(pairs, encoder.d_embed), encoder, run="foil")
    assert len(batch) == 4
    assert batch.dropped["reason"].tolist() == ["a text is longer than the context"]
    with pytest.raises(ValueError, match=r"1 of 2 texts have .*77 tokens.*'There are no very"):
        encoder.tokenize([SHORT, LONG])


def test_a_text_that_fills_the_context_may_have_been_cut() -> None:
    """Only a tokenizer that can be asked for more tells a text of 77 tokens from one that was cut to 77."""
    assert encoder_with(simple()).fits([FULL, FULL + " cat"]) == [True, False]
    encoder = encoder_with(without_length)
    assert encoder.fits([FULL, FULL + " cat", FULL.removeprefix("cat ")]) == [False, False, True]
    with pytest.raises(ValueError, match="as many tokens as the context has, so that they may be cut: 77"):
        encoder.tokenize([FULL])


def test_other_errors_of_a_tokenizer_are_not_taken_for_length() -> None:
    def broken(texts: list[str], context_length: int = 77) -> Tensor:
        if any("circles" in text for text in texts):
            raise KeyError("circles")
        return simple()(texts, context_length)

    with pytest.raises(KeyError):
        encoder_with(broken).fits([SHORT])


def test_a_token_added_behind_the_end_of_text_is_said() -> None:
    """Textual inversion adds ids above the end; a tower that pools at the highest id reads there."""

    def added(texts: list[str], context_length: int = 77) -> Tensor:
        rows = simple()(texts, context_length)
        rows[rows == int(simple()(["thing"])[0, 1])] = 49408
        return rows

    encoder = encoder_with(added, vocab_size=49409)
    with pytest.warns(UserWarning, match="1 of 2 texts have a token with a higher id .* 49407, .* 'a thing here'"):
        tokens = encoder.tokenize([SHORT, "a thing here"])
    assert encoder.pool(tokens).tolist() == [6, 2]
    module = random_clip(layers=2, vocab_size=49409)
    with torch.no_grad():
        assert (encoder(tokens) - module.encode_text(tokens, normalize=True)).abs().max() <= 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.tokenize([SHORT])
        clip_lens.load(
            random_clip(layers=2, vocab_size=49409, pool_type="eos", eos_id=49407), tokenizer=added
        ).tokenize(["a thing here"])  # this tower knows its end


def test_tokens_are_written_by_id_where_a_tokenizer_has_no_words() -> None:
    assert encoder_with(simple()).tower.to_str_tokens("a cat")[:4] == ["<start_of_text>", "a", "cat", "<end_of_text>"]
    assert encoder_with(refusing).tower.to_str_tokens("a cat")[:4] == ["<49406>", "<320>", "<2368>", "<49407>"]
