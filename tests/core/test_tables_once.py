"""A table is computed once; what is known of a whole is what its parts would find by themselves."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from show.test_plots import HEADS, RESID, make

from clip_lens.core import effects as module


@pytest.fixture
def computed(monkeypatch):
    """How often a table was computed."""
    calls, tabulate = [], module.tabulate
    monkeypatch.setattr(module, "tabulate", lambda *given: calls.append(given) or tabulate(*given))
    return calls


PARTS = {
    "places": {"layer": [0, 2]},
    "one side": {"side": "foil"},
    "places of one side": {"unit": 1, "side": "caption"},
    "both sides, by name": {"side": ["caption", "foil"]},
    "some pairs": {"d": lambda d: d > 1.5},
    "some pairs of a side": {"side": "foil", "key": ["1", "3", "5", "7", "9"]},
    "no places": {"layer": lambda layer: layer == 9},
    "no pairs": {"d": lambda d: d > 99},
}


@pytest.mark.parametrize("how", [{}, {"of": "ratios", "floor": 1.2}, {"pooled": True}, {"seed": 3, "interval": 0.5}])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_known_whole_says_what_it_would_alone(part, how):
    effects = make(HEADS, missing=0.2, n_pairs=14)
    alone = effects.where(**PARTS[part])
    expected = alone.table(resamples=50, **how)
    effects.table(resamples=50, **how)
    known = effects.where(**PARTS[part])
    pd.testing.assert_frame_equal(known.table(resamples=50, **how), expected, rtol=1e-12)
    points = {name: how[name] for name in how if name in ("of", "floor", "pooled")}
    pd.testing.assert_frame_equal(known.fraction(**points), replace(alone).fraction(**points), rtol=1e-12)
    again = known.where(kind="head")  # a part of a part
    pd.testing.assert_frame_equal(again.table(resamples=50, **how), expected, rtol=1e-12)


@pytest.mark.parametrize("part", ["places", "one side", "places of one side", "both sides, by name"])
def test_sides_that_stay_whole_are_not_computed_again(computed, part):
    effects = make(HEADS)
    effects.table(resamples=20)
    effects.where(**PARTS[part]).table(resamples=20)
    effects.where(**PARTS[part]).fraction()
    assert len(computed) == 1
    effects.where(side="foil", key=["1", "3"]).table(resamples=20)
    assert len(computed) == 2  # other pairs are another table


def test_the_largest_are_the_same_whether_the_table_is_known_or_not(computed):
    effects = make(RESID, missing=0.2)
    for how in ({}, {"by": "fraction"}, {"pooled": True, "seed": 2}):
        unknown = replace(effects).top(3, resamples=40, **how)
        effects.table(resamples=40, **{name: how[name] for name in how if name != "by"})
        before = len(computed)
        pd.testing.assert_frame_equal(effects.top(3, resamples=40, **how), unknown, rtol=1e-12)
        assert len(computed) == before


def test_what_is_given_out_may_be_changed():
    effects = make(HEADS)
    for ask in (effects.table, effects.fraction, lambda: effects.where(layer=0).table(), lambda: effects.top(2)):
        first = ask()
        kept = first.copy()
        first["effect"] = np.nan
        pd.testing.assert_frame_equal(ask(), kept)
