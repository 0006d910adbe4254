"""The numbers of docs/gradients.md and docs/subspaces.md, on the embedded model: `python scripts/rule_numbers.py`."""

from __future__ import annotations

import numpy as np
import torch

import clip_lens
from clip_lens import Edge, Site

SATURATED = [Edge(Site("embed"), Site(kind, 0, head)) for kind in "qkv" for head in range(4)]
RULES = {
    "plain": {},
    "plain, 5 steps": {"steps": 5},
    "relp": {"rule": "relp"},
    "qk": {"rule": "qk"},
    "qk, 5 steps": {"rule": "qk", "steps": 5},
    "atp*": {"rule": "atp*"},
}
BASES = {"means": {}, "probe": {}, "das": {"epochs": 20}, "das, rank 4": {"epochs": 20, "rank": 4}}


def aligned(run: str):
    encoder = clip_lens.load()
    return encoder, clip_lens.align(clip_lens.read_pairs(), clip_lens.ImageStore.open("tiny"), encoder, run=run)


def rules() -> None:
    """Each rule beside exact scores, per side: r of sizes, r without the saturated edges, and the sums of these."""
    encoder, batch = aligned("caption")
    part, _ = batch.split(150 / len(batch), by="text")
    edges = encoder.edges()
    results = {"exact": clip_lens.patch_effects(encoder, part, edges, progress=False)}
    results |= {
        name: clip_lens.gradient_effects(encoder, part, edges, progress=False, **how) for name, how in RULES.items()
    }
    saturated = [edges.index(edge) for edge in SATURATED]
    rest = [number for number in range(len(edges)) if number not in set(saturated)]
    for side in ("caption", "foil"):
        chosen = torch.tensor([each == side for each in part.pairs.side])
        means = {name: effects.signed()[:, chosen].nanmean(1) for name, effects in results.items()}
        exact = means["exact"]
        for name, mean in means.items():
            size = np.corrcoef(mean.abs(), exact.abs())[0, 1]
            without = np.corrcoef(mean[rest], exact[rest])[0, 1]
            sums = mean[saturated].reshape(3, 4).sum(1)
            print(f"{side} | {name} | {size:.2f} | {without:.2f} | {sums.sum():.2f} | q, k, v {sums.numpy().round(2)}")


def subspaces() -> None:
    """The share of d that a learned subspace of resid 5 moves on texts it has not seen, with its controls."""
    encoder, batch = aligned("affirmative")
    found, judged = (part[:150] for part in batch.split(0.5, by="text"))
    site, place = Site("resid", 5), Site("resid", 5, slot="eot")
    sources = {"whole": clip_lens.counterpart}
    for name, how in BASES.items():
        basis, control = (
            clip_lens.learn_basis(encoder, found, site, name.partition(",")[0], shuffled=shuffled, **how)
            for shuffled in (False, True)
        )
        sources |= {name: basis.source, f"{name}, random": basis.random(0), f"{name}, shuffled": control.source}
    for name, source in sources.items():
        table = clip_lens.patch_effects(encoder, judged, [place], source=source, progress=False).table(resamples=400)
        cells = [f"{row.side} {row.fraction:.2f} [{row.lower:.2f}, {row.upper:.2f}]" for row in table.itertuples()]
        print(name, *cells, sep=" | ")


if __name__ == "__main__":
    rules()
    subspaces()
