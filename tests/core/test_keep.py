"""Results are computed once; an interrupted sweep goes on; another result is never served nor replaced unsaid."""

import threading
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from towers import random_encoder, random_store

from clip_lens.core import keep as module
from clip_lens.core.effects import Effects, toy_effects
from clip_lens.core.keep import Keep, joined
from clip_lens.core.metric import cosine, kl, logit, metric
from clip_lens.core.record import Method, MetricRecord, Record
from clip_lens.core.setting import Setting
from clip_lens.core.source import counterpart, mean, noise, resample, source, steered, zeros
from clip_lens.core.via import via
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.registry import PATCHING
from clip_lens.model.site import Site

RECORD = Record(Method("toy", "a toy"), model="toy", pairs=3, metric=MetricRecord(identity="that of the toy"))
OTHERS = {
    "weights": "other", "tower": "other", "data_digest": "other", "batch": "other", "run": "foil", "scale": 7.0,
    "dtype": "float64", "selected": ("a few",), "settings": {"seed": 1}, "versions": {"torch": "1"},
    "method": Method("another", "a toy"), "metric": MetricRecord(identity="another"),
}  # fmt: skip
"""What decides a number, changed, one at a time."""


@pytest.fixture
def toy():
    return replace(toy_effects(), record=RECORD)


class Sweep:
    """Computes some places of a result, and can be interrupted before the n-th call."""

    def __init__(self, effects, stop_at=None):
        self.effects, self.stop_at, self.calls = effects, stop_at, []

    def __call__(self, places):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(tuple(places))
        chosen = [self.effects.places.index(place) for place in places]
        return replace(self.effects, values=self.effects.values[chosen], places=tuple(places))


def said(field):
    return field.replace("_", " ")


def never(places):
    raise AssertionError("computed again")


def test_a_finished_result_is_read_and_said(tmp_path, toy):
    said, sweep = [], Sweep(toy)
    keep = Keep(tmp_path / "new", said.append)
    first, second = (keep.effects("toy", RECORD, toy.places, sweep) for _ in range(2))
    assert first.values.equal(second.values) and len(sweep.calls) == 1
    assert len(said) == 1 and "toy.parquet is there already" in said[0]


@pytest.mark.parametrize("name", OTHERS)
def test_another_result_is_neither_served_nor_replaced_unsaid(tmp_path, toy, name):
    wanted = replace(RECORD, **{name: OTHERS[name]})
    keep, other = Keep(tmp_path), replace(toy, values=2 * toy.values, record=wanted)
    keep.effects("toy", RECORD, toy.places, Sweep(toy))
    whole = (tmp_path / "toy.parquet").read_bytes()
    with pytest.raises(ValueError, match=rf"toy\.parquet is there, and is another result: {said(name)}.*--overwrite"):
        keep.effects("toy", wanted, toy.places, Sweep(other))
    assert (tmp_path / "toy.parquet").read_bytes() == whole
    again = replace(keep, overwrite=True).effects("toy", wanted, toy.places, Sweep(other))
    assert again.values.equal(other.values)
    assert Effects.load(tmp_path / "toy.parquet").values.equal(other.values)


def test_titles_and_counts_make_no_other_result(tmp_path, toy):
    Keep(tmp_path).effects("toy", RECORD, toy.places, Sweep(toy))
    renamed = replace(
        RECORD, method=Method("toy", "renamed"), model="moved", images="elsewhere", slot_rules={"mine": 4}
    )
    assert Keep(tmp_path).effects("toy", renamed, toy.places, never).values.equal(toy.values)


def test_other_places_are_refused(tmp_path, toy):
    keep = Keep(tmp_path)
    keep.effects("toy", RECORD, toy.places, Sweep(toy))
    with pytest.raises(ValueError, match=r"toy\.parquet is there, of 4 other places than the 2 now.*--overwrite"):
        keep.effects("toy", RECORD, toy.places[:2], never)


@pytest.mark.parametrize("vague", [{"metric": MetricRecord(identity=None)}, {"hooks": ("blocks.0.hook_z",)}])
def test_what_cannot_be_told_is_never_reused(tmp_path, toy, vague):
    record = replace(RECORD, **vague)
    keep, sweep = Keep(tmp_path), Sweep(replace(toy, record=record))
    keep.effects("toy", record, toy.places, sweep)
    with pytest.raises(ValueError, match="can't be told"):
        keep.effects("toy", record, toy.places, never)
    replace(keep, overwrite=True).effects("toy", record, toy.places, sweep)
    assert len(sweep.calls) == 2


def test_an_interrupted_sweep_goes_on_with_the_next_part(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)  # one place of three pairs
    keep, halted, again = Keep(tmp_path), Sweep(toy, stop_at=2), Sweep(toy)
    with pytest.raises(KeyboardInterrupt):
        keep.effects("toy", RECORD, toy.places, halted)
    assert not (tmp_path / "toy.parquet").exists()
    whole = keep.effects("toy", RECORD, toy.places, again)
    assert [halted.calls, again.calls] == [[(p,) for p in toy.places[:2]], [(p,) for p in toy.places[2:]]]
    assert whole.values.equal(toy.values) and whole.places == toy.places
    assert [path.name for path in tmp_path.iterdir()] == ["toy.parquet"]


def test_places_that_belong_together_are_one_part(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)
    sweep = Sweep(toy)
    Keep(tmp_path).effects("toy", RECORD, toy.places, sweep, whole=True)
    assert sweep.calls == [toy.places]


def test_parts_of_another_sweep_are_not_taken(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)
    keep = Keep(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        keep.effects("toy", RECORD, toy.places, Sweep(toy, stop_at=2))
    other = replace(toy, values=2 * toy.values, record=replace(RECORD, weights="other"))
    assert keep.effects("toy", other.record, toy.places, Sweep(other)).values.equal(other.values)


def test_a_damaged_part_is_made_anew(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)
    keep = Keep(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        keep.effects("toy", RECORD, toy.places, Sweep(toy, stop_at=2))
    part = sorted((tmp_path / "toy.parts").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-30])
    again = Sweep(toy)
    assert keep.effects("toy", RECORD, toy.places, again).values.equal(toy.values)
    assert again.calls == [(p,) for p in toy.places[1:]]


@pytest.mark.parametrize("seed", range(3))
def test_two_runs_into_one_folder_both_finish(tmp_path, toy, monkeypatch, seed):
    """The one that is done first removes the parts, at any moment of the other's."""
    monkeypatch.setattr(module, "PART", 3)
    places = tuple(Site("mlp", layer) for layer in range(40))
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    many, found, start = replace(toy, values=values, places=places), [], threading.Barrier(3)

    def run():
        start.wait()
        found.append(Keep(tmp_path, overwrite=True).effects("toy", RECORD, places, Sweep(many)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(effects.values.equal(values) for effects in found)
    assert Effects.load(tmp_path / "toy.parquet").values.equal(values)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.parquet"]


@pytest.mark.parametrize("moment", range(4))
def test_parts_that_vanish_meanwhile_are_missed_by_none(tmp_path, toy, monkeypatch, moment):
    """Another run is done, and removes the parts, before this one's n-th part is saved."""
    monkeypatch.setattr(module, "PART", 3)
    sweep = Sweep(toy)

    def compute(places):
        if len(sweep.calls) == moment:
            module.shutil.rmtree(tmp_path / "toy.parts", ignore_errors=True)
        return sweep(places)

    assert Keep(tmp_path).effects("toy", RECORD, toy.places, compute).values.equal(toy.values)


# Tables


def table():
    return pd.DataFrame({"r": [0.5, float("nan")], "note": ["", "constant"], "mine": [[1, 2], None]})


def test_a_table_is_made_once(tmp_path):
    keep, made = Keep(tmp_path), []
    frames = [keep.frame("table", RECORD, lambda: made.append(1) or table()) for _ in range(2)]
    assert len(made) == 1
    pd.testing.assert_frame_equal(frames[0], table())
    assert frames[1]["r"].tolist()[:1] == [0.5] and list(frames[1]["mine"][0]) == [1, 2]
    pd.testing.assert_frame_equal(frames[1][["r", "note"]], table()[["r", "note"]], check_dtype=False)


@pytest.mark.parametrize("name", OTHERS)
def test_another_table_is_refused(tmp_path, name):
    keep = Keep(tmp_path)
    keep.frame("table", RECORD, table)
    wanted = replace(RECORD, **{name: OTHERS[name]})
    with pytest.raises(ValueError, match=rf"table\.parquet is there, and is another result: {said(name)}.*--overwrite"):
        keep.frame("table", wanted, lambda: pytest.fail("computed again"))
    assert len(replace(keep, overwrite=True).frame("table", wanted, lambda: table()[:1])) == 1


def test_a_table_that_keep_did_not_write_is_refused(tmp_path):
    table().to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"table\.parquet is a Parquet file, but not one that Keep.*--overwrite"):
        Keep(tmp_path).frame("table", RECORD, table)


def test_damaged_files_are_named(tmp_path, toy):
    for name in ("toy.parquet", "table.parquet"):
        (tmp_path / name).write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"toy\.parquet is no whole Parquet file"):
        Keep(tmp_path).effects("toy", RECORD, toy.places, Sweep(toy))
    with pytest.raises(ValueError, match=r"table\.parquet is no whole Parquet file"):
        Keep(tmp_path).frame("table", RECORD, lambda: pd.DataFrame({"a": [1]}))


def test_only_results_on_the_same_pairs_are_joined(toy):
    with pytest.raises(ValueError, match="no results"):
        joined([])
    with pytest.raises(ValueError, match="different pairs"):
        joined([toy, toy.where(side="foil")])
    assert torch.equal(joined([toy, toy]).values, torch.cat([toy.values, toy.values]))


# What is asked for, and what is kept, on a tower

MLP = Site("mlp", 1)


def small(causal=True, **options):
    return random_encoder(causal=causal, layers=2, width=16, heads=2, d_embed=8, **options)


def aligned(encoder, n=4, run="caption"):
    texts = (
        [f"There are no {thing}s." for thing in "abcdef"[:n]],
        [f"There are some {thing}s." for thing in "abcdef"[:n]],
    )
    pairs = Pairs(range(n), *texts, [f"{row}.png" for row in range(n)])
    return align(pairs, random_store(pairs, 8), encoder, run=run)


def bank(seed):
    return torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def kept(folder, encoder, batch, **how):
    """`patch_effects`, kept in a folder: the result and whether it was computed."""
    computed = []
    wanted = Setting.of(encoder, batch, **how).record(PATCHING)
    compute = lambda places: computed.append(1) or patch_effects(encoder, batch, places, progress=False, **how)
    return Keep(folder).effects("mine", wanted, [MLP], compute), bool(computed)


def turned(w):
    return lambda u, readout: u @ w


def scaled(by):
    return lambda encoder, batch: (
        lambda pairs, names: {
            name: by * value for name, value in encoder.cache(batch.tokens[pairs], names=names).items()
        }
    )


ENCODER = small()
BATCH = aligned(ENCODER)
BOTH = {
    "banks of one size": ({"metric": kl(bank(0))}, {"metric": kl(bank(1))}),
    "orientation": ({"metric": metric(kl, oriented=True)}, {"metric": metric(kl, oriented=False)}),
    "metrics": ({"metric": logit}, {"metric": cosine}),
    "held by a metric": [{"metric": metric(turned(bank(n)[0]), oriented=True, holds=bank(n)[0])} for n in (0, 1)],
    "means over others": ({"source": mean(over=BATCH)}, {"source": mean(over=BATCH[:3])}),
    "mean of all": ({"source": mean}, {"source": mean(over=BATCH)}),
    "steered": [{"source": steered({MLP: by * torch.ones(16)})} for by in (1, 2)],
    "seeds": ({"source": resample(0)}, {"source": resample(1)}),
    "noise": ({"source": noise(1.0)}, {"source": noise(0.5)}),
    "via": ({"source": via(Site("head", 0, 1))}, {"source": via(Site("head", 0, 0))}),
    "held by a source": [{"source": source(scaled(by), name="scaled", holds=by)} for by in (1.0, 2.0)],
    "sources": ({"source": zeros}, {"source": counterpart}),
}


@pytest.mark.parametrize("name", BOTH)
def test_none_is_served_another_ones_result(tmp_path, name):
    first, second = BOTH[name]
    if name == "orientation":
        first, second = ({"metric": metric(cosine.function, oriented=turns)} for turns in (True, False))
    found, computed = kept(tmp_path, ENCODER, BATCH, **first)
    again, recomputed = kept(tmp_path, ENCODER, BATCH, **first)
    assert computed and not recomputed and again.values.equal(found.values)
    with pytest.raises(ValueError, match=r"is another result: [^.]+"):
        kept(tmp_path, ENCODER, BATCH, **second)


@pytest.mark.parametrize(
    "how",
    [
        {"source": lambda encoder, batch: zeros(encoder, batch)},
        {"source": scaled(0.5)},
        {"source": partial(zeros)},
        {"source": via(Site("head", 0, 1), source=scaled(0.5))},
        {"metric": metric(lambda u, readout: u[:, 0], oriented=False)},
        {"metric": metric(turned(bank(0)[0]), oriented=False)},
    ],
    ids=["lambda", "closure", "partial", "via a closure", "metric, lambda", "metric, closure"],
)
def test_an_anonymous_one_is_never_reused(tmp_path, how):
    assert kept(tmp_path, ENCODER, BATCH, **how)[1]
    with pytest.raises(ValueError, match="can't be told"):
        kept(tmp_path, ENCODER, BATCH, **how)


def test_an_encoder_edited_in_place_is_another(tmp_path):
    encoder = small()
    batch = aligned(encoder)
    before, _ = kept(tmp_path, encoder, batch)
    weight = encoder.tower.blocks[1].mlp.out_weight
    given = weight.clone()
    with torch.no_grad():
        weight[0] = 0
    with pytest.raises(ValueError, match="weights: "):
        kept(tmp_path, encoder, batch)
    after, _ = kept(tmp_path / "edited", encoder, batch)
    assert after.record.weights != before.record.weights and not after.values.equal(before.values)
    with torch.no_grad():
        weight.copy_(given)
    assert not kept(tmp_path, encoder, batch)[1]


def test_the_same_weights_under_another_activation_are_another(tmp_path):
    encoder = small()
    kept(tmp_path, encoder, aligned(encoder))
    for block in encoder.tower.blocks:
        block.mlp.act = torch.nn.GELU()
    with pytest.raises(ValueError, match=r"tower: .*QuickGELU.*GELU\(approximate='none'\)"):
        kept(tmp_path, encoder, aligned(encoder))


@pytest.mark.parametrize("change", ["scale", "images", "info", "info in place", "run", "pairs"])
def test_another_batch_is_another(tmp_path, change):
    encoder = small()
    batch = aligned(encoder)
    batch = replace(batch, pairs=replace(batch.pairs, info=pd.DataFrame({"subject_size": [0.2] * 4})))
    kept(tmp_path, encoder, batch)
    if change == "scale":
        encoder.scale *= 2
    elif change == "images":
        batch = batch.along(-batch.direction)
    elif change == "info":
        batch = replace(batch, pairs=replace(batch.pairs, info=pd.DataFrame({"subject_size": [0.1] * 4})))
    elif change == "info in place":
        batch.pairs.info["subject_size"] = 0.3
    else:
        batch = aligned(encoder, run="foil") if change == "run" else batch[:3]
    with pytest.raises(ValueError, match="is another result"):
        kept(tmp_path, encoder, batch)


def test_results_under_hooks_are_never_reused(tmp_path):
    encoder = small()
    batch = aligned(encoder)
    with encoder.tower.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)]):
        assert kept(tmp_path, encoder, batch)[0].record.hooks == ("blocks.0.hook_mlp_out",)
        with pytest.raises(ValueError, match="hooks were on"):
            kept(tmp_path, encoder, batch)
    with pytest.raises(ValueError, match="hooks were on"):
        kept(tmp_path, encoder, batch)
