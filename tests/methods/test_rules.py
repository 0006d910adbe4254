"""The gradient rules against open_clip's blocks written out by hand, with what each rule holds constant detached."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from handmade import handmade
from oracle import Text, agree, batch_of, pooled, same, tower
from torch import nn

from clip_lens.methods.gradient import gradient_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Edge, Site, at_slot

EMBED, OUT = Site("embed"), Site("out")
NAMES = pytest.mark.parametrize("name", ["causal", "bidirectional"])


def ruled(text, relp=False, dropped=None, reads=same, eps=None, seen=None):
    """The unit embedding of a text's run; `eps` is added to each head's pattern, `seen` keeps q, k, scores, inputs."""
    clip, tokens = text.clip, text.tokens
    tower_, n = getattr(clip, "text", clip), len(text.tokens)
    x = tower_.token_embedding.weight[tokens] + tower_.positional_embedding[:n]

    def norm(layer, x):
        std = (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / (std.detach() if relp else std) * layer.weight + layer.bias

    def act(f, h):
        return h * (f(h) / h).detach() if relp else f(h)

    for number, block in enumerate(tower_.transformer.resblocks):
        drop = (lambda value: value.detach()) if number == dropped else (lambda value: value)
        attn = block.ls_1(block.attn.out_proj.bias.expand_as(x))
        weight, bias = (p.unflatten(0, (3, 4, -1)) for p in (block.attn.in_proj_weight, block.attn.in_proj_bias))
        out = block.attn.out_proj.weight.unflatten(1, (4, -1))
        for head in range(4):
            inputs = [reads(Site(kind, number, head), x) for kind in "qkv"]
            q, k, v = (norm(block.ln_1, y) @ weight[i, head].T + bias[i, head] for i, y in enumerate(inputs))
            scores = q @ k.T / math.sqrt(8)
            scores = scores if tower_.attn_mask is None else scores + tower_.attn_mask[:n, :n]
            pattern = scores.softmax(-1).detach() if relp else scores.softmax(-1)
            if seen is not None:
                seen[number, head] = (x.detach(), q.detach(), k.detach(), pattern.detach())
            pattern = pattern if eps is None else pattern + eps[number, head]
            attn = attn + block.ls_1(pattern @ v @ out[:, head].T)
        x = x + drop(attn)
        hidden = act(block.mlp.gelu, block.mlp.c_fc(norm(block.ln_2, reads(Site("mlp", number), x))))
        x = x + drop(block.ls_2(block.mlp.c_proj(hidden)))
    y = norm(tower_.ln_final, reads(OUT, x))[pooled(tower_, tokens)]
    y = tower_.text_projection(y) if isinstance(tower_.text_projection, nn.Linear) else y @ tower_.text_projection
    return y / y.norm()


@cache
def texts(name):
    batch = batch_of(name)
    if name == "causal":
        width = int(torch.maximum(batch.length, batch.other_length).max())
        parts = ("tokens", "other", "origin", "slot", "other_slot")
        batch = replace(batch, **{part: getattr(batch, part)[:, :width] for part in parts})
    return [Text(tower(name)[0], batch, pair) for pair in range(len(batch))]


def changes(text):
    return {site: (value - text.run[site]).nan_to_num(0) for site, value in text.counterpart().items()}


def mask(text, edge):
    line = torch.zeros(len(text.tokens), 1, dtype=torch.float64)
    line[text.where(edge.receiver.slot)] = 1
    return line


def linear(text, edges, relp=False, dropped=None):
    """The derivative by each edge's weight, at weight 0."""
    change, weights = changes(text), torch.zeros(len(edges), dtype=torch.float64, requires_grad=True)
    carried = {}
    for number, edge in enumerate(edges):
        carried.setdefault(replace(edge.receiver, slot=None), []).append(
            (number, mask(text, edge) * change[edge.sender])
        )

    def reads(site, x):
        for number, shift in carried.get(site, []):
            x = x + weights[number] * shift
        return x

    metric = ruled(text, relp, dropped, reads) @ text.direction
    return torch.autograd.grad(metric, weights, allow_unused=True, materialize_grads=True)[0]


def with_softmax(text, edges, dropped=None):
    """Of edges into q and k the pattern that comes of each position patched by itself, times the gradient there."""
    values, change, n = linear(text, edges, dropped=dropped), changes(text), len(text.tokens)
    eps = torch.zeros(3, 4, n, n, dtype=torch.float64, requires_grad=True)
    seen = {}
    metric = ruled(text, dropped=dropped, eps=eps, seen=seen) @ text.direction
    gradient = torch.autograd.grad(metric, eps)[0]
    tower_ = getattr(text.clip, "text", text.clip)
    for number, edge in enumerate(edges):
        kind, layer, head = edge.receiver.kind, edge.receiver.layer, edge.receiver.unit
        if kind not in ("q", "k"):
            continue
        block, (x, q, k, pattern) = tower_.transformer.resblocks[layer], seen[layer, head]
        line = "qkv".index(kind)
        weight, bias = (
            p.unflatten(0, (3, 4, -1))[line, head] for p in (block.attn.in_proj_weight, block.attn.in_proj_bias)
        )
        patched = block.ln_1(x + mask(text, edge) * change[edge.sender]) @ weight.T + bias
        total = 0.0
        for p in range(n):
            one = [q.clone(), k.clone()]
            one[line][p] = patched[p]
            scores = one[0] @ one[1].T / math.sqrt(8)
            scores = scores if tower_.attn_mask is None else scores + tower_.attn_mask[:n, :n]
            total += float(((scores.softmax(-1) - pattern) * gradient[layer, head]).sum())
        values[number] = total
    return values


def atp_star(text, edges):
    return sum(with_softmax(text, edges, dropped=layer).abs() for layer in range(3)) / 2


BY_HAND = {
    "plain": linear,
    "relp": lambda text, edges: linear(text, edges, relp=True),
    "qk": with_softmax,
    "atp*": atp_star,
}


@pytest.mark.parametrize("rule", BY_HAND)
@NAMES
def test_every_rule_is_its_definition_written_by_hand(name, rule):
    encoder = tower(name)[1]
    edges = encoder.edges()[:: 3 if name == "causal" else 7]
    edges = [*edges, *(at_slot(edge, 2) for edge in edges[::9] if edge.receiver != OUT)]
    expected = []
    for text in texts(name):
        has = torch.tensor([text.has(text.counterpart(), edge) for edge in edges])
        expected.append(torch.where(has, BY_HAND[rule](text, edges), torch.nan).tolist())
    found = gradient_effects(encoder, batch_of(name), edges, rule=rule)
    agree(found, [list(line) for line in zip(*expected, strict=True)])


def test_relp_takes_patterns_for_constants():
    encoder, batch = tower("causal")[1], batch_of("causal")
    into = encoder.edges(receivers=[Site(kind, 1, 2) for kind in "qk"])
    assert (gradient_effects(encoder, batch, into, rule="relp").values.nan_to_num() == 0).all()
    assert gradient_effects(encoder, batch, into).values.nan_to_num().abs().max() > 1e-3


@NAMES
def test_a_site_is_the_sum_of_what_its_change_is(name):
    """A patched q or k, as a site: with an exact softmax, what changing it by hand gives at the gradient's pattern."""
    encoder, batch = tower(name)[1], batch_of(name, True)
    for kind in "qk":
        whole, single = [Site(kind, 1)], [Site(kind, 1, head) for head in range(4)]
        found = gradient_effects(encoder, batch, [*whole, *single], rule="qk").values
        assert torch.allclose(found[0], found[1:].sum(0), atol=1e-12) and found.abs().max() > 1e-3
        positions = [Site(kind, 1, 2, slot) for slot in range(batch.tokens.shape[1])]
        parts = gradient_effects(encoder, batch, positions, rule="qk").values.nan_to_num()
        assert torch.allclose(parts.sum(0), found[3], atol=1e-12)


def test_of_a_saturated_softmax_the_gradient_is_blind_and_the_exact_one_is_not():
    """Every score of the head that asks times 12: the weights are 0 and 1, and patching the query swaps them."""
    made = handmade("query")
    attn = made.encoder.tower.blocks[1].attn
    weight = attn.qkv_weight.data.clone()
    attn.qkv_weight.data.view(3, 4, -1, 32)[:2, 3] *= 12.0
    try:
        edge = [Edge(Site("head", 0, 1), Site("q", 1, 3))]
        exact = patch_effects(made.encoder, made.batch, edge).signed().mean()
        values = {rule: gradient_effects(made.encoder, made.batch, edge, rule=rule) for rule in BY_HAND}
    finally:
        attn.qkv_weight.data.copy_(weight)
    share = {rule: float(found.signed().mean() / exact) for rule, found in values.items()}
    assert abs(share["plain"]) < 0.01 and share["relp"] == 0
    assert share["qk"] > 0.2  # the rest is the output's LayerNorm and norm, which stay linear


def test_the_record_says_the_rule():
    made = handmade("chain")
    records = {
        rule: gradient_effects(made.encoder, made.batch, made.encoder.edges()[:3], rule=rule).record for rule in BY_HAND
    }
    assert {rule: record.method.key for rule, record in records.items()} == {
        "plain": "eap", "relp": "relp", "qk": "qk", "atp*": "atp-star"
    }  # fmt: skip
    assert all(record.settings["rule"].startswith(rule) for rule, record in records.items())
    assert [record.metric.oriented for record in records.values()] == [True, True, True, False]
    assert not any(a.stands_for(b) for a in records.values() for b in records.values() if a is not b)
    with pytest.raises(ValueError, match="give one of plain, relp"):
        gradient_effects(made.encoder, made.batch, made.encoder.edges()[:3], rule="lrp")
