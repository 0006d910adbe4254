"""Results are computed once; an interrupted sweep goes on; what does not fit is computed anew."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from clip_lens.core import keep as module
from clip_lens.core.effects import toy_effects
from clip_lens.core.keep import Keep, joined

META = {"model": "toy", "pairs": "3"}


@pytest.fixture
def toy():
    return replace(toy_effects(), meta=META)


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


def test_a_finished_result_is_read_and_said(tmp_path, toy):
    said, sweep = [], Sweep(toy)
    keep = Keep(tmp_path / "new", said.append)
    first, second = (keep.effects("toy", META, toy.places, sweep) for _ in range(2))
    assert first.values.equal(second.values) and len(sweep.calls) == 1
    assert len(said) == 1 and "toy.parquet is there already" in said[0]


@pytest.mark.parametrize("change", [{"model": "other"}, {"seed": "1"}])
def test_another_meta_is_computed_anew(tmp_path, toy, change):
    keep, sweep = Keep(tmp_path), Sweep(replace(toy, meta=META | change))
    keep.effects("toy", META, toy.places, Sweep(toy))
    keep.effects("toy", META | change, toy.places, sweep)
    assert len(sweep.calls) == 1


def test_other_places_are_computed_anew(tmp_path, toy):
    keep, sweep = Keep(tmp_path), Sweep(toy)
    keep.effects("toy", META, toy.places, Sweep(toy))
    assert keep.effects("toy", META, toy.places[:2], sweep).values.equal(toy.values[:2])
    assert len(sweep.calls) == 1


def test_an_interrupted_sweep_goes_on_with_the_next_part(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)  # one place of three pairs
    keep, halted, again = Keep(tmp_path), Sweep(toy, stop_at=2), Sweep(toy)
    with pytest.raises(KeyboardInterrupt):
        keep.effects("toy", META, toy.places, halted)
    assert not (tmp_path / "toy.parquet").exists()
    whole = keep.effects("toy", META, toy.places, again)
    assert [halted.calls, again.calls] == [[(p,) for p in toy.places[:2]], [(p,) for p in toy.places[2:]]]
    assert whole.values.equal(toy.values) and whole.places == toy.places
    assert [path.name for path in tmp_path.iterdir()] == ["toy.parquet"]


def test_places_that_belong_together_are_one_part(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)
    sweep = Sweep(toy)
    Keep(tmp_path).effects("toy", META, toy.places, sweep, whole=True)
    assert sweep.calls == [toy.places]


def test_parts_of_another_sweep_are_not_taken(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)
    keep = Keep(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        keep.effects("toy", META, toy.places, Sweep(toy, stop_at=2))
    other = replace(toy, values=2 * toy.values, meta=META | {"model": "other"})
    assert keep.effects("toy", other.meta, toy.places, Sweep(other)).values.equal(other.values)


def test_a_table_is_made_once_per_meta(tmp_path):
    keep, made = Keep(tmp_path), []

    def make():
        made.append(1)
        return pd.DataFrame({"r": [0.5, float("nan")], "note": ["", "constant"]})

    frames = [keep.frame("table", {"seed": seed}, make) for seed in ("0", "0", "1")]
    assert len(made) == 2
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0], check_dtype=False)


def test_damaged_files_are_named(tmp_path, toy):
    for name in ("toy.parquet", "table.parquet"):
        (tmp_path / name).write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"toy\.parquet is no whole Parquet file"):
        Keep(tmp_path).effects("toy", META, toy.places, Sweep(toy))
    with pytest.raises(ValueError, match=r"table\.parquet is no whole Parquet file"):
        Keep(tmp_path).frame("table", {}, lambda: pd.DataFrame({"a": [1]}))


def test_only_results_on_the_same_pairs_are_joined(toy):
    with pytest.raises(ValueError, match="no results"):
        joined([])
    with pytest.raises(ValueError, match="different pairs"):
        joined([toy, toy.where(side="foil")])
    assert torch.equal(joined([toy, toy]).values, torch.cat([toy.values, toy.values]))
