"""Every verb on a device that is not there: no operation mixes its tensors with the CPU's, and numbers are the same."""

import inspect

import open_clip
import pandas as pd
import pytest
import torch
from device import ELSEWHERE, Mixed, elsewhere
from towers import random_clip, random_store

import clip_lens
from clip_lens import Site
from clip_lens.core import rows
from clip_lens.core.effects import Effects
from clip_lens.core.source import steered
from clip_lens.data.batch import Batch
from clip_lens.data.pairs import Pairs
from clip_lens.methods import direct, gradient, lens
from clip_lens.methods.probes.probe import probe_effects
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
    """Every kind of site, whole, at a named slot and at a raw position, edges to every kind of receiver, tuples."""
    single = [
        site for kind in LAYOUTS for slot in (None, "negator", 2) for site in encoder.sites(kind, slots=[slot])[:3]
    ]
    edges = encoder.edges()
    return [*single, *edges[::5], *edges[-4:], (Site("mlp", 0), *edges[:3]), tuple(edges)]


def bank(encoder):
    return encoder(["There are no cats.", "a dog"])


def vector(encoder, seed=0):
    return torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(encoder.device)


def eap(encoder, batch):
    return clip_lens.gradient_effects(encoder, batch, encoder.edges())


def circuit(encoder, batch):
    return clip_lens.top_edges(eap(encoder, batch), 20)


def in_groups(encoder):
    """Groups of two texts and two images: every pair, and the same with its texts swapped and another's image."""
    pairs, store = pairs_and_store()
    texts, images = [*zip(pairs.caption, pairs.foil, strict=True)], [*pairs.image[3:], *pairs.image[:3]]
    both = [*texts, *((foil, caption) for caption, foil in texts)]
    info = pd.DataFrame({"question": [*range(len(texts))] * 2})
    twice = Pairs(range(len(both)), *zip(*both, strict=True), [*pairs.image, *images], info=info)
    return clip_lens.align(twice, store, encoder, run="caption")


SOURCES = {
    "counterpart": lambda encoder, batch: clip_lens.counterpart,
    "zeros": lambda encoder, batch: clip_lens.zeros,
    "mean": lambda encoder, batch: clip_lens.mean,
    "mean over others": lambda encoder, batch: clip_lens.mean(over=batch.flip()),
    "noise": lambda encoder, batch: clip_lens.noise(1.0, seed=0),
    "resample": lambda encoder, batch: clip_lens.resample(seed=0),
    "steered": lambda encoder, batch: steered({Site("resid", 1, slot="eot"): vector(encoder)}),
    "subspace": lambda encoder, batch: clip_lens.subspace(Site("resid", 1, slot="eot"), vector(encoder)[:, None]),
    "another tower": lambda encoder, batch: clip_lens.other_tower(loaded(encoder.causal).to(encoder.device)),
    "via": lambda encoder, batch: clip_lens.via(Site("head", 0, 0), freeze=("head",)),
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
        e, [Site("head", 1, 0), Site("head", 0, 1)], texts=["a dog", "no"], batch=b, n=1
    ),
    "labels by weights": lambda e, b: clip_lens.labels(e, e.sites("neuron", layers=[1])[:3], texts=["dog", "no", "a"]),
    "scores": lambda e, b: clip_lens.scores(e, b),
    "confounds": lambda e, b: clip_lens.confounds(e, b).frame,
    "probe": lambda e, b: clip_lens.probe(e, b, test_share=0.5),
    "probe_effects": lambda e, b: probe_effects(e, b, how="remove"),
    "steer": lambda e, b: clip_lens.steer(
        e, b, {Site("resid", 1): vector(e)}, how="remove", origin={Site("resid", 1): vector(e, 1)}
    ),
    "faithfulness": lambda e, b: clip_lens.faithfulness(e, b, [circuit(e, b), circuit(e, b).pruned()]),
    "acdc": lambda e, b: clip_lens.acdc(e, b, 0.05).keep,
    "completeness": lambda e, b: clip_lens.completeness(e, b, circuit(e, b), samples=3, greedy=2),
    "minimality": lambda e, b: clip_lens.minimality(e, b, circuit(e, b), samples=2).drop(columns="removed"),
    "stability": lambda e, b: clip_lens.stability(eap(e, b), 10, resamples=5),
    "group_scores": lambda e, b: clip_lens.group_scores(e, in_groups(e)),
    "attention_attribution": lambda e, b: clip_lens.attention_attribution(e, b, 1, 1, "eot", "sot"),
    "learn_circuit": lambda e, b: clip_lens.learn_circuit(e, b, share=0.3, steps=3, progress=False)[0].scores,
    "learn_basis": lambda e, b: clip_lens.learn_basis(e, b, Site("resid", 1, slot="eot")).vectors,
    "optimal": lambda e, b: clip_lens.patch_effects(
        e, b, [Site("mlp", 1)], source=clip_lens.optimal(e, b, [Site("mlp", 1)], steps=3, progress=False)
    ),
    "an activation as the metric": lambda e, b: clip_lens.patch_effects(
        e, b, e.sites("head", layers=[0]), metric=clip_lens.attention_score(1, 1, "eot", "sot")
    ),
    **{
        f"gradient_effects by {rule}": lambda e, b, rule=rule: clip_lens.gradient_effects(
            e, b, e.edges()[::3], rule=rule
        )
        for rule in ("relp", "qk", "atp*")
    },
    "discover": lambda e, b: clip_lens.discover(e, b[:3], b[3:], edges=10, steps=1).circuit.keep,
    **{
        f"patch_effects from {name}": lambda e, b, source=source: clip_lens.patch_effects(
            e,
            b,
            [Site("resid", 1, slot="eot"), Site("mlp", 1), Site("head", 1, 1), *e.edges()[-3:]],
            source=source(e, b),
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


COMPOSED = {"probe", "acdc", "completeness", "minimality", "stability", "discover"}
"""Slow, and made of the others: on one tower only."""
RUNS = [(verb, causal) for verb in VERBS for causal in (True, False) if causal or verb not in COMPOSED]


def encoder_and_batch(device, causal=True):
    encoder = loaded(causal).to(device)
    batch = clip_lens.align(*pairs_and_store(), encoder)
    assert batch.tokens.device == batch.direction.device == encoder.device == torch.device(device)
    return encoder, batch


def numbers(found):
    """What a verb gives, as a table or a tensor on the CPU."""
    found = getattr(found, "effects", found)
    found = found.values if isinstance(found, Effects) else found
    return found.cpu() if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize(("verb", "causal"), RUNS)
def test_a_verb_gives_the_same_elsewhere(verb, causal):
    here = numbers(VERBS[verb](*encoder_and_batch("cpu", causal)))
    with elsewhere() as fetched:
        there = numbers(VERBS[verb](*encoder_and_batch(ELSEWHERE, causal)))
    assert fetched
    if isinstance(here, pd.DataFrame):
        assert len(here)
        pd.testing.assert_frame_equal(there, here, rtol=1e-10)
    else:
        assert here.any()
        torch.testing.assert_close(there, here, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_every_verb_is_run():
    """A new verb that computes something of an encoder and pairs is to be run elsewhere, too."""
    public = {name: getattr(clip_lens, name) for name in clip_lens.__all__}
    verbs = {name for name, value in public.items() if inspect.isfunction(value) and "methods" in value.__module__}
    taking = {name for name in verbs if "encoder" in inspect.signature(public[name]).parameters}
    assert len(taking) > 15
    assert taking - {name.split()[0].strip(",") for name in VERBS} == {"components"}


# That it is noticed


def on_the_cpu(function):
    """The function, its tensor left behind on the CPU."""
    return lambda *args, **kwargs: function(*args, **kwargs).cpu()


@pytest.mark.parametrize(
    ("module", "name", "verb"),
    [
        (Batch, "where", "patch_effects"),
        (rows, "present", "patch_effects"),
        (gradient, "received", "gradient_effects, 3 steps"),
        (direct, "reading_vector", "direct_effects"),
        (lens, "reading_vector", "logit_lens"),
    ],
)
def test_one_function_on_the_cpu_is_noticed(module, name, verb, monkeypatch):
    monkeypatch.setattr(module, name, on_the_cpu(getattr(module, name)))
    with elsewhere(), pytest.raises(Mixed):
        VERBS[verb](*encoder_and_batch(ELSEWHERE))


def test_a_metric_or_a_source_on_the_cpu_is_noticed():
    ones = torch.ones(D_EMBED, dtype=torch.float64)
    metric = clip_lens.metric(lambda u, readout: (u * ones).sum(-1), oriented=True)
    source = clip_lens.source(
        lambda encoder, batch: (
            lambda pairs, names: {
                name: value.cpu() for name, value in encoder.cache(batch.other[pairs], names=names).items()
            }
        )
    )
    with elsewhere():
        encoder, batch = encoder_and_batch(ELSEWHERE)
        places = encoder.sites("mlp")
        assert clip_lens.patch_effects(encoder, batch, places).values.any()
        for wrong in ({"metric": metric}, {"source": source}):
            with pytest.raises(Mixed):
                clip_lens.patch_effects(encoder, batch, places, **wrong)


REFUSED = {
    "pointwise": lambda there, here: there * here,
    "scalars elsewhere": lambda there, here: here * there.sum(),
    "joined": lambda there, here: torch.cat([there, here]),
    "scalars stacked": lambda there, here: torch.stack([there.sum(), here.sum()]),
    "multiplied": lambda there, here: there @ here.T,
    "indexed": lambda there, here: here[there.argmax(0)],
    "masked": lambda there, here: there.masked_fill(here > 0, 0.0),
    "chosen": lambda there, here: torch.where(here > 0, there, there),
    "gathered": lambda there, here: there.gather(0, here.long()),
    "set": lambda there, here: there.__setitem__(0, here[0]) or here.__setitem__(there.argmax(0), 1.0),
    "drawn": lambda there, here: torch.randn(3, device=there.device, generator=torch.Generator()),
}
ALLOWED = {
    "pointwise": lambda there, here: there * here.sum(),
    "masked": lambda there, here: there.masked_fill(there > 0, here.sum()),
    "indexed": lambda there, here: there[here[:, 0] > 0],
    "listed": lambda there, here: there[[1, 0]],
    "copied": lambda there, here: there.clone().copy_(here),
    "set": lambda there, here: set_rows(there.clone(), here),
    "made": lambda there, here: there.new_tensor([1.0, 2.0]) + torch.tensor([1.0, 2.0], device=there.device),
    "in place": lambda there, here: there.clone().unsqueeze(0).squeeze_(0).add_(1.0),
    "gradient": lambda there, here: slope(there),
}


def set_rows(x, here):
    x[0] = here[0]
    x[1, here[1] > 0] = 2.0
    return x


def slope(x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad((x[[1, 0]].softmax(-1) ** 3).sum(), x)[0]


def two_tensors():
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("inference", [True, False])
def test_what_torch_refuses_of_two_devices(what, inference):
    one, here = two_tensors()
    with elsewhere(), torch.inference_mode(inference), pytest.raises(Mixed):
        REFUSED[what](one.to(ELSEWHERE), here)


@pytest.mark.parametrize("what", ALLOWED)
@pytest.mark.parametrize("inference", [True, False])
def test_what_torch_allows(what, inference):
    if what == "gradient":
        inference = False
    one, here = two_tensors()
    expected = ALLOWED[what](one, here)
    with elsewhere(), torch.inference_mode(inference):
        found = ALLOWED[what](one.to(ELSEWHERE), here)
        assert found.device == ELSEWHERE
        assert found.shape == expected.shape
        assert torch.equal(found.cpu(), expected)


def test_what_the_cpu_waits_for_is_counted():
    one, here = two_tensors()
    with elsewhere() as fetched:
        there = one.to(ELSEWHERE)
        there + there[torch.tensor([0, 1, 2], device=ELSEWHERE)]
        assert not fetched
        assert there.tolist() == one.tolist()
        assert float(there.sum()) == float(one.sum())
        there[there > 0], there[here > 0]
        assert sum(fetched.values()) == 4
