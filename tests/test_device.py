"""Every verb on a device that is not there: no operation mixes its tensors with the CPU's, and all numbers are the same."""

import open_clip
import pandas as pd
import pytest
import torch
from device import ELSEWHERE, Mixed, There, elsewhere
from towers import random_clip, random_store

import clip_lens
from clip_lens import Site
from clip_lens.core import rows
from clip_lens.data.pairs import Pairs
from clip_lens.model.load import load
from clip_lens.model.site import LAYOUTS

TEXTS = (
    ("There are no dogs in it.", "There are some dogs in it."),
    ("There is a zebra.", "There is no zebra."),
    ("There are red cubes.", "There are no cubes."),
    ("There is no skateboarder here.", "There is a man."),
    ("There are no balls.", "There are balls."),
    ("There is a cross.", "There is no cross."),
)
D_EMBED = 8


def pairs_and_store():
    pairs = Pairs(range(len(TEXTS)), *zip(*TEXTS, strict=True), [f"{row}.png" for row in range(len(TEXTS))])
    return pairs, random_store(pairs, D_EMBED)


def loaded(causal):
    clip = random_clip(causal=causal, layers=2, width=16, heads=2, d_embed=D_EMBED, seed=3)
    tokenizer = open_clip.SimpleTokenizer(context_length=77 if causal else 16)
    return load(clip, tokenizer=tokenizer, dtype=torch.float64)


def places(encoder):
    """Every kind of site, whole, at a named slot and at a raw position, an edge of every kind of receiver, and a tuple."""
    sites = [
        site for kind in LAYOUTS for slot in (None, "negator", 2) for site in encoder.sites(kind, slots=[slot])[:3]
    ]
    edges = encoder.edges()
    return [*sites, *edges[::5], *edges[-4:], (Site("mlp", 0), *edges[:3]), tuple(edges)]


def bank(encoder):
    return encoder(["There are no cats.", "a dog"])


def vector(encoder, seed=0):
    return torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(encoder.device)


def eap(encoder, batch):
    return clip_lens.gradient_effects(encoder, batch, encoder.edges())


def circuit(encoder, batch):
    return clip_lens.top_edges(eap(encoder, batch), 20)


SOURCES = {
    "counterpart": lambda encoder: clip_lens.counterpart,
    "zeros": lambda encoder: clip_lens.zeros,
    "mean": lambda encoder: clip_lens.mean,
    "noise": lambda encoder: clip_lens.noise(1.0, seed=0),
    "resample": lambda encoder: clip_lens.resample(seed=0),
    "steered": lambda encoder: clip_lens.steered({Site("resid", 1, slot="eot"): vector(encoder)}),
    "via": lambda encoder: clip_lens.via(Site("head", 0, 0), freeze=("head",)),
}
METRICS = {
    "logit": lambda encoder: clip_lens.logit,
    "cosine": lambda encoder: clip_lens.cosine,
    "kl": lambda encoder: clip_lens.kl(bank(encoder)),
}
VERBS = {
    "patch_effects": lambda e, b: clip_lens.patch_effects(e, b, places(e), rows=7),
    "path_effects": lambda e, b: clip_lens.path_effects(e, b, [Site("head", 0)], [Site("q", 1), Site("out")]),
    "path_effects, through MLPs": lambda e, b: clip_lens.path_effects(
        e, b, e.sites("head", layers=[0]), [Site("v", 1), Site("out")], through="mlp"
    ),
    "gradient_effects": lambda e, b: clip_lens.gradient_effects(e, b, places(e)),
    "gradient_effects, 3 steps": lambda e, b: clip_lens.gradient_effects(e, b, e.edges(), steps=3),
    "direct_effects": lambda e, b: clip_lens.direct_effects(e, b),
    "direct_effects of neurons": lambda e, b: clip_lens.direct_effects(
        e, b, clip_lens.components(e, b, "neuron"), contrast=False
    ),
    "direct_effects of slots": lambda e, b: clip_lens.direct_effects(
        e, b, [Site("v", 1, unit, slot) for unit in (0, 1) for slot in ("negator", "eot")]
    ),
    "logit_lens": lambda e, b: clip_lens.logit_lens(e, b),
    "logit_lens, recomputed": lambda e, b: clip_lens.logit_lens(e, b, norms="recomputed", contrast=False),
    "attention_effects": lambda e, b: clip_lens.attention_effects(e, b),
    "labels": lambda e, b: clip_lens.labels(
        e, [Site("head", 1, 0), Site("mlp", 0)], texts=["a dog", "no"], batch=b, n=1
    ),
    "labels by weights": lambda e, b: clip_lens.labels(e, e.sites("neuron", layers=[1])[:3], texts=["dog", "no", "a"]),
    "scores": lambda e, b: clip_lens.scores(e, b),
    "confounds": lambda e, b: clip_lens.confounds(e, b).pairs,
    "probe": lambda e, b: clip_lens.probe(e, b, test_share=0.5),
    "probe_effects": lambda e, b: clip_lens.probe_effects(e, b, how="remove"),
    "steer": lambda e, b: clip_lens.steer(
        e, b, {Site("resid", 1): vector(e)}, how="remove", origin={Site("resid", 1): vector(e, 1)}
    ),
    "faithfulness": lambda e, b: clip_lens.faithfulness(e, b, [circuit(e, b), circuit(e, b).pruned()]),
    "acdc": lambda e, b: clip_lens.acdc(e, b, 0.5).to_frame() if False else clip_lens.acdc(e, b, 0.5).keep,
    "completeness": lambda e, b: clip_lens.completeness(e, b, circuit(e, b), samples=3, greedy=2),
    "minimality": lambda e, b: clip_lens.minimality(e, b, circuit(e, b), samples=2),
    "stability": lambda e, b: clip_lens.stability(eap(e, b), 10, resamples=5),
    "discover": lambda e, b: clip_lens.discover(e, b, b, edges=10, steps=1).circuit.keep,
    **{
        f"patch_effects from {name}": lambda e, b, source=source: clip_lens.patch_effects(
            e, b, [Site("resid", 1, slot="eot"), Site("mlp", 1), Site("head", 1, 1), *e.edges()[-3:]], source=source(e)
        )
        for name, source in SOURCES.items()
    },
    **{
        f"{verb.__name__} of {name}": lambda e, b, metric=metric, verb=verb: verb(
            e, b, e.edges()[::3], metric=metric(e)
        )
        for name, metric in METRICS.items()
        for verb in (clip_lens.patch_effects, clip_lens.gradient_effects)
    },
}


def run(verb, causal, device):
    encoder = loaded(causal).to(device)
    batch = clip_lens.align(*pairs_and_store(), encoder)
    assert batch.tokens.device == encoder.device == torch.device(device)
    return VERBS[verb](encoder, batch)


def numbers(found):
    """What a verb gives, as a table or tensor on the CPU."""
    found = getattr(found, "values", found) if not isinstance(found, pd.DataFrame) else found
    return found.cpu() if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_gives_the_same_elsewhere(verb, causal):
    here = numbers(run(verb, causal, "cpu"))
    with elsewhere() as fetched:
        there = numbers(run(verb, causal, ELSEWHERE))
    assert fetched
    if isinstance(here, pd.DataFrame):
        pd.testing.assert_frame_equal(here, there)
    else:
        assert len(here)
        assert torch.equal(here.isnan(), there.isnan())
        assert torch.equal(here.nan_to_num(), there.nan_to_num())
