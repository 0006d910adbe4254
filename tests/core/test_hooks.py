"""Hooks that a user has on the tower while a verb runs: they act as in a plain run, or the verb refuses by name."""

from functools import partial

import pytest
import torch
from oracle import agree, batch_of, tower

from clip_lens.core.source import mean, zeros
from clip_lens.methods.gradient import gradient_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.paths import path_effects
from clip_lens.model.site import Edge, Site

HOOKS = {
    "embed": "blocks.0.hook_resid_pre", "mid": "blocks.{}.hook_resid_mid", "attn": "blocks.{}.hook_attn_out",
    "mlp": "blocks.{}.hook_mlp_out", "head": "blocks.{}.attn.hook_z", "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k", "v": "blocks.{}.attn.hook_v", "neuron": "blocks.{}.mlp.hook_post",
    "pattern": "blocks.{}.attn.hook_pattern",
}  # fmt: skip
PLACES = [
    *(Site("resid", layer, slot=slot) for layer in range(4) for slot in (None, "eot", "negator", 2, 3)),
    Site("embed", slot="negator"), Site("mid", 1, slot="subject"), Site("attn", 0), Site("mlp", 1),
    Site("mlp", 2, slot="eot"), Site("head", 0, 1), Site("head", 1, 2, "negator"), Site("q", 2, 3), Site("k", 1, 0),
    Site("v", 2, 1, 3), Site("neuron", 1, 7), Site("pattern", 0, 2), Site("pattern", 1, 1, "eot"),
    (Site("head", 0, 3), Site("mlp", 1, slot="negator")),
]  # fmt: skip


def zero_at(position):
    def hook(value, hook):
        value[:, position] = 0
        return value

    return hook


YOURS = {
    "a position": [("blocks.1.hook_mlp_out", zero_at(3))],
    "the last position": [("blocks.0.hook_attn_out", zero_at(-1))],
    "a head at a position": [("blocks.1.attn.hook_z", lambda value, hook: value.index_fill(1, torch.tensor([1]), 0.5))],
    "a query": [("blocks.0.attn.hook_pattern", lambda value, hook: value.index_fill(2, torch.tensor([4]), 0.1))],
    "everywhere": [("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)],
    "where the patch is": [("blocks.2.hook_resid_pre", zero_at(2)), ("blocks.2.attn.hook_v", zero_at(3))],
    "behind the tower's blocks": [("ln_final.hook_normalized", zero_at(2))],
}


def hook_of(site, n_layers):
    if site.kind == "resid":
        return "blocks.2.hook_resid_post" if site.layer == n_layers else f"blocks.{site.layer}.hook_resid_pre"
    return HOOKS[site.kind].format(site.layer)


def overwrite(value, hook, *, site, where, source, origin):
    """One pair's activation with the source's lines at some positions, one after the other."""
    value = value.clone()
    for p in where:
        j = origin[p]
        if j < 0:
            continue
        if site.kind == "pattern":
            heads = range(value.shape[1]) if site.unit is None else [site.unit]
            for head in heads:
                keys = [float(source[0, head, j, k]) if k >= 0 else 0.0 for k in origin[: value.shape[3]]]
                value[0, head, p] = torch.tensor(keys, dtype=value.dtype)
        elif site.kind == "neuron" or site.kind in ("head", "q", "k", "v"):
            value[0, p, site.unit] = source[0, j, site.unit]
        else:
            value[0, p] = source[0, j]
    return value


def by_hand(name, place, pair):
    """The effect of one place in one pair from two plain runs, under whatever hooks are on."""
    encoder, batch = tower(name)[1], batch_of(name)
    run, other, origin = batch.tokens[pair : pair + 1], batch.other[pair : pair + 1], batch.origin[pair].tolist()
    sites = place if isinstance(place, tuple) else (place,)
    names = {hook_of(site, 3) for site in sites}
    _, source = encoder.tower.run_with_cache(other, names_filter=list(names), return_cache_object=False)
    hooks, patched = [], False
    for site in sites:
        slots = [batch.slots[s] if s >= 0 else None for s in batch.slot[pair].tolist()]
        where = [p for p in range(int(batch.length[pair])) if site.slot in (None, p, slots[p])]
        patched |= any(origin[p] >= 0 for p in where)
        name_ = hook_of(site, 3)
        hooks.append((name_, partial(overwrite, site=site, where=where, source=source[name_], origin=origin)))
    at = int(encoder.pool(run))
    read = lambda y: torch.nn.functional.normalize(y[0, at], dim=-1) @ batch.direction[pair]
    if not patched:
        return float("nan")
    return float(read(encoder.tower.run_with_hooks(run, fwd_hooks=hooks)) - read(encoder.tower(run)))


@pytest.mark.parametrize("yours", YOURS)
@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_rows_equal_plain_runs_under_the_same_hooks(name, yours):
    encoder, batch = tower(name)[1], batch_of(name)
    free = patch_effects(encoder, batch, PLACES, progress=False)
    with encoder.tower.hooks(fwd_hooks=YOURS[yours]), torch.inference_mode():
        expected = [[by_hand(name, place, pair) for pair in range(len(batch))] for place in PLACES]
        together = {rows: patch_effects(encoder, batch, PLACES, rows=rows, progress=False) for rows in (1, 256)}
        alone = [patch_effects(encoder, batch, [place], progress=False).values[0] for place in PLACES[::5]]
    for effects in together.values():
        agree(effects, expected)
        assert set(effects.record.hooks) == {hook for hook, _ in YOURS[yours]}
    assert torch.allclose(torch.stack(alone), together[256].values[::5], rtol=0, atol=1e-10, equal_nan=True)
    assert not torch.allclose(free.values, together[256].values, rtol=0, atol=1e-6, equal_nan=True)
    assert free.record.hooks == ()


def test_the_total_is_that_of_the_runs_under_the_hooks():
    encoder, batch = tower("causal")[1], batch_of("causal")
    with encoder.tower.hooks(fwd_hooks=YOURS["a position"]), torch.inference_mode():
        effects = patch_effects(encoder, batch, PLACES[:1], progress=False)
        scores = [(encoder(tokens) * batch.direction).sum(-1) for tokens in (batch.tokens, batch.other)]
    assert torch.allclose(effects.baseline, scores[0], atol=1e-10)
    assert torch.allclose(effects.total, scores[1] - scores[0], atol=1e-10)
    assert effects.pairs["d"].tolist() == pytest.approx((batch.sigma * effects.total).tolist(), abs=1e-10)


@pytest.mark.parametrize("permanent", ["TransformerLens", "PyTorch"])
def test_hooks_that_stay_are_seen_too(permanent):
    encoder, batch, place = tower("causal")[1], batch_of("causal"), [Site("resid", 1, slot=3)]
    with encoder.tower.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", zero_at(3))]):
        expected = patch_effects(encoder, batch, place, progress=False)
    mlp = encoder.tower.blocks[1].mlp
    if permanent == "PyTorch":
        handle = mlp.register_forward_hook(lambda module, given, value: zero_at(3)(value, None))
    else:
        encoder.tower.add_hook("blocks.1.hook_mlp_out", zero_at(3))
    try:
        found = patch_effects(encoder, batch, place, progress=False)
    finally:
        handle.remove() if permanent == "PyTorch" else encoder.tower.reset_hooks()
    assert torch.allclose(found.values, expected.values, rtol=0, atol=1e-12, equal_nan=True)
    assert found.record.hooks == (("blocks.1.mlp",) if permanent == "PyTorch" else ("blocks.1.hook_mlp_out",))
    assert patch_effects(encoder, batch, place, progress=False).record.hooks == ()


EDGE = Edge(Site("head", 0, 1), Site("q", 1, 2))
REFUSED = {
    "an edge": lambda encoder, batch: patch_effects(encoder, batch, [EDGE]),
    "an edge among others": lambda encoder, batch: patch_effects(
        encoder, batch, [Site("mlp", 1), (Site("mlp", 0), EDGE)]
    ),
    "zeros": lambda encoder, batch: patch_effects(encoder, batch, [Site("mlp", 1)], source=zeros),
    "mean": lambda encoder, batch: patch_effects(encoder, batch, [Site("mlp", 1)], source=mean),
    "paths": lambda encoder, batch: path_effects(encoder, batch, [Site("head", 0, 1)], [Site("out")]),
    "paths through MLPs": lambda encoder, batch: path_effects(
        encoder, batch, [Site("head", 0, 1)], [Site("out")], through="mlp"
    ),
    "attribution": lambda encoder, batch: gradient_effects(encoder, batch, [Site("mlp", 1)]),
    "EAP": lambda encoder, batch: gradient_effects(encoder, batch, [EDGE]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_hooks_would_make_wrong_is_refused_by_their_names(what):
    encoder, batch = tower("causal")[1], batch_of("causal")
    hooks = YOURS["where the patch is"]
    with encoder.tower.hooks(fwd_hooks=hooks), pytest.raises(ValueError, match="hooks of yours on") as refused:
        REFUSED[what](encoder, batch)
    assert all(hook in str(refused.value) for hook, _ in hooks)
    assert encoder.hooked == ()
