"""The interval of a localisation is that of a plain loop over the same resamples of pairs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clip_lens.core.effects import segments, toy_effects
from clip_lens.core.table import SIDES
from clip_lens.model.site import Site

SLOTS = ("be", "negator", "subject", "eot")


def drawn(n_pairs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    toy = toy_effects()
    pairs = toy.pairs.iloc[[0] * n_pairs].reset_index(drop=True)
    total = 1 + torch.rand(n_pairs, generator=generator)
    pairs = pairs.assign(key=[str(n) for n in range(n_pairs)], d=total.tolist(), segment=segments(total), side="foil")
    places = tuple(Site("resid", layer, slot=slot) for layer in (0, 1) for slot in SLOTS)
    values = torch.randn(len(places), n_pairs, generator=generator)
    values[2, 0] = torch.nan
    return replace(toy, values=values, total=total, baseline=torch.zeros(n_pairs), places=places, pairs=pairs)


@pytest.mark.parametrize("of", ["means", "ratios"])
def test_the_bounds_are_quantiles_over_resamples_of_pairs(of):
    effects, resamples = drawn(9), 40
    found = effects.localisation(of=of, resamples=resamples, seed=3)
    generator = np.random.default_rng([3, SIDES.index("foil")])
    weights = generator.multinomial(9, np.full(9, 1 / 9), resamples).astype(float)
    values, total = effects.values.double().numpy(), effects.total.double().numpy()
    for layer in (0, 1):
        spreads = []
        for weight in weights:
            shares = []
            for row in range(4 * layer + 1, 4 * layer + 4):  # without "be"
                known = ~np.isnan(values[row])
                w, v, t = weight[known], values[row][known], total[known]
                shares.append((w * v).sum() / (w * t).sum() if of == "means" else (w * v / t).sum() / w.sum())
            spreads.append(np.std(shares))
        row = found[found["layer"] == layer].iloc[0]
        assert [row["lower"], row["upper"]] == pytest.approx(np.quantile(spreads, [0.025, 0.975]), rel=1e-10)
        assert row["slots"] == 3 and row["lower"] < row["localisation"] < row["upper"]


def test_too_few_pairs_have_no_interval():
    found = drawn(4).localisation()
    assert found["localisation"].notna().all() and found[["lower", "upper"]].isna().all(axis=None)
