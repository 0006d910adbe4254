"""Records: what a result says of what was run, in every one of its fields, and in words."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracle import batch_of, tower

from clip_lens.core.precision import precise
from clip_lens.core.record import Method, MetricRecord, Record, SourceRecord
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.registry import PATCHING
from clip_lens.model.site import Site

WHOLE = Record(
    Method("toy", "a toy"), model="tiny", weights="abc", tower="causal, quick_gelu", layers=3, heads=2, scale=100.0,
    dtype="float32", data="mine", data_digest="def", images="5 images", batch="ghi", held_out="by text", run="caption",
    source=SourceRecord("zeros", "z"), metric=MetricRecord("cosine", False, "cosine", "c"), pairs=1200,
    dropped={"no image": 2, "no side": 1}, slots=("sot", "eot"), slot_rules={"mine": 3}, unaligned=4,
    unsourced=5, hooks=("hook_embed", "ln_final"),
    notes=("a note", "another"), selected=("side = foil: 9 of 12", "top 3: 3 of 9"), settings={"steps_taken": 5},
    versions={"torch": "2", "clip_lens": "1"},
)  # fmt: skip
SAID = {
    "method": "a toy",
    "run": "the caption is run and patched",
    "source": "zeros",
    "metric": "cosine, in cosine",
    "steps taken": "5",
    "scale": "100",
    "dtype": "float32",
    "model": "tiny",
    "weights": "abc",
    "tower": "causal, quick_gelu",
    "layers": "3",
    "heads": "2",
    "data": "mine",
    "data digest": "def",
    "images": "5 images",
    "batch": "ghi",
    "held out": "by text",
    "pairs": "1200",
    "pairs dropped": "2 no image; 1 no side",
    "slots": "3 pairs by mine",
    "positions without counterpart": "4",
    "pairs without a source": "5",
    "hooks of yours that were on": "hook_embed, ln_final",
    "notes": "a note; another",
    "selected": "side = foil: 9 of 12; top 3: 3 of 9",
    "versions": "torch 2, clip_lens 1",
}


def test_a_record_in_words_leaves_nothing_out():
    assert WHOLE.as_text() == SAID


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("foil", "the foil is the run"),
        ("affirmative", "the text without negation is the run"),
        ("other of mine", "other of mine is the run"),
        ("", None),
    ],
)
def test_the_run_is_said_in_words_or_by_its_own_name(run, words):
    assert Record(Method("toy", "a toy"), model="tiny", run=run).as_text().get("run") == words


def test_a_result_says_what_was_run_on_what():
    encoder, batch = tower("causal")[1], batch_of("causal")
    record = patch_effects(encoder, batch, [Site("mlp", 1)]).record
    origins = [line[:length] for line, length in zip(batch.origin.tolist(), batch.length.tolist(), strict=True)]
    found = {name: getattr(record, name) for name in ("layers", "heads", "scale", "dtype", "run", "pairs", "unaligned")}
    assert found == {
        "layers": 3,
        "heads": 4,
        "scale": pytest.approx(float(torch.tensor(3.0).exp()), rel=1e-6),
        "dtype": "float64",
        "run": "caption",
        "pairs": 7,
        "unaligned": sum(line.count(-1) for line in origins),
    }
    assert record.unaligned > 0 and record.slots == batch.slots
    assert record.slot_rules == {"template_slots": 5, "no_slots": 2}  # two have no "there is" with a determiner
    assert record.held_out == "" and record.method is PATCHING
    part = replace(batch, held_out="by text")
    assert patch_effects(encoder, part, [Site("mlp", 1)]).record.held_out == "by text"
    assert (record.weights, record.data_digest, record.batch) == (encoder.digest, batch.pairs.digest, batch.digest)


def test_sums_are_float64_where_the_device_has_it():
    there = SimpleNamespace(device=torch.device("mps"))
    assert precise(there) is there
    assert precise(torch.ones(2, dtype=torch.float16)).dtype == torch.float64
