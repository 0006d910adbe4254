"""The numbers of docs/compare.md: they are of the weights as they are, and the page's tables are the file's."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import clip_lens

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("compare_numbers")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def numbers():
    return json.loads((ROOT / "tutorials" / "results" / "compare.json").read_text(encoding="utf-8"))


def test_the_committed_file_is_of_the_embedded_model_and_its_fine_tune_as_they_are(numbers):
    base, tuned = clip_lens.load(), clip_lens.load(pretrained="without")
    assert (
        numbers["weights"] == {"base": base.digest, "tuned": tuned.digest} and base.image_digest == tuned.image_digest
    )
    for text in ("with the negation", "without"):
        rows = {(row["place"], row["side"]): row for row in numbers[f"swapped, the text {text}"]["table"]}
        for side in ("caption", "foil"):
            assert rows["projection", side]["fraction"] == 1
            assert rows["every edge", side] | {"place": ""} == rows["resid 6", side] | {"place": ""}


def test_the_page_has_the_files_tables(script, numbers, tmp_path):
    page = tmp_path / "compare.md"
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    script.write_page(page, numbers)
    assert page.read_text(encoding="utf-8") == text and "| `norm` |" in text


def test_pairs_are_said_by_the_new_word(script):
    pairs = script.pairs_with(script.WITHOUT)
    assert len(pairs) == 126 and not any(" no " in text or " some " in text for text in (*pairs.caption, *pairs.foil))
    assert {len({"with", "without"} & set(text.split())) for text in (*pairs.caption, *pairs.foil)} == {1}
    assert set(pairs.side) == {"caption", "foil"}


def test_a_share_that_is_swapped_is_one_by_hand(script, numbers):
    base, tuned = clip_lens.load(dtype=torch.float64), clip_lens.load(pretrained="without", dtype=torch.float64)
    store = clip_lens.ImageStore.open("tiny")
    batch = clip_lens.align(script.pairs_with(script.WITHOUT), store, tuned, run="negated")
    cache = tuned.cache(batch.tokens, names=["blocks.0.hook_attn_out"])
    swap = ("blocks.0.hook_attn_out", lambda value, hook: cache[hook.name])
    score = lambda u: (u * batch.direction).sum(-1)
    moved, whole = (score(u) - score(base(batch.tokens)) for u in (base(batch.tokens, [swap]), tuned(batch.tokens)))
    rows = {(row["place"], row["side"]): row for row in numbers["swapped, the text with the negation"]["table"]}
    for side in ("caption", "foil"):
        chosen = torch.tensor([each == side for each in batch.pairs.side])
        share = float(moved[chosen].sum() / whole[chosen].sum())
        assert rows["attn 0", side]["fraction"] == pytest.approx(share, abs=1e-3)
