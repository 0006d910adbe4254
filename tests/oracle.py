"""open_clip's text tower written out by hand, one text at a time, with every component's input and output in reach.

It shares nothing with the package but the names of places: what paths, edges and sources must equal.
"""

import math
from functools import cache

import open_clip
import torch
from torch import nn
from towers import random_clip, random_store

from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.data.slots import template_slots
from clip_lens.model.load import load
from clip_lens.model.site import Edge, Site, members

NAN = float("nan")
EOT = 49407


def same(site, value):
    return value


def forward(clip, tokens, gives=same, reads=same):
    """The unit embedding of one text, [pos] tokens.

    `gives(site, value)` sees and may replace what embed, q, k, v [pos d_head], a head and an MLP [pos d_model] give,
    heads without the output bias; `reads(site, x)` the residual stream that q, k, v, an MLP or the output reads.
    """
    text = getattr(clip, "text", clip)
    n = len(tokens)
    x = gives(Site("embed"), text.token_embedding.weight[tokens] + text.positional_embedding[:n])
    for layer, block in enumerate(text.transformer.resblocks):
        heads, attn = block.attn.num_heads, block.ls_1(block.attn.out_proj.bias.expand_as(x))
        weights, biases = (p.unflatten(0, (3, heads, -1)) for p in (block.attn.in_proj_weight, block.attn.in_proj_bias))
        out = block.attn.out_proj.weight.unflatten(1, (heads, -1))
        for head in range(heads):
            q, k, v = (
                gives(Site(kind, layer, head), block.ln_1(reads(Site(kind, layer, head), x)) @ w[head].T + b[head])
                for kind, w, b in zip("qkv", weights, biases, strict=True)
            )
            scores = q @ k.T / math.sqrt(q.shape[-1])
            if text.attn_mask is not None:
                scores = scores + text.attn_mask[:n, :n]
            attn = attn + gives(Site("head", layer, head), block.ls_1(scores.softmax(-1) @ v @ out[:, head].T))
        x = x + attn
        hidden = block.mlp.gelu(block.mlp.c_fc(block.ln_2(reads(Site("mlp", layer), x))))
        x = x + gives(Site("mlp", layer), block.ls_2(block.mlp.c_proj(hidden)))
    y = text.ln_final(reads(Site("out"), x))[pooled(text, tokens)]
    y = text.text_projection(y) if isinstance(text.text_projection, nn.Linear) else y @ text.text_projection
    return y / y.norm()


def pooled(text, tokens):
    last = getattr(text, "pool_type", "argmax") == "last"
    return len(tokens) - 1 if last else tokens.tolist().index(EOT)


def given(clip, tokens, gives=same):
    """What every component of a run gives, and the stream that the output reads, by site."""
    found = {}

    def keep(site, value):
        found[site] = value
        return gives(site, value)

    def keep_last(site, x):
        if site.kind == "out":
            found[site] = x
        return x

    forward(clip, tokens, keep, keep_last)
    return found


class Text:
    """One pair of a batch: its run and its counterpart, and where its slots and counterparts are."""

    def __init__(self, clip, batch, pair):
        self.clip, self.direction = clip, batch.direction[pair]
        self.tokens, self.origin = batch.tokens[pair], batch.origin[pair].tolist()
        self.slots = [batch.slots[slot] if slot >= 0 else None for slot in batch.slot[pair].tolist()]
        self.length = int(batch.length[pair])
        self.run, self.other = given(clip, self.tokens), given(clip, batch.other[pair])
        self.baseline = self.metric()

    def metric(self, gives=same, reads=same):
        return float(forward(self.clip, self.tokens, gives, reads) @ self.direction)

    def where(self, slot):
        return [p for p in range(self.length) if slot in (None, p, self.slots[p])]

    def counterpart(self):
        """What the other text's components give, at the run's positions; NaN where there is no counterpart."""
        return {site: self.moved(value) for site, value in self.other.items()}

    def moved(self, value):
        lines = [value[j] if j >= 0 else torch.full_like(value[0], NAN) for j in self.origin]
        return torch.stack(lines)

    def blend(self, value, source, slot=None):
        """`value` with the source's lines at a slot's positions, where it has some."""
        value = value.clone()
        for p in self.where(slot):
            if not source[p].isnan().all():
                value[p] = source[p]
        return value

    def has(self, source, member):
        if isinstance(member, Edge):
            last = pooled(getattr(self.clip, "text", self.clip), self.tokens)
            site, where = member.sender, [last] if member.receiver.kind == "out" else self.where(member.receiver.slot)
        else:
            site, where = member, self.where(member.slot)
        return any(not source[bare(site)][p].isnan().all() for p in where)

    def effect(self, place, source=None):
        """Sites overwritten, and what receivers read shifted by source minus what the sender gives in this very run."""
        source, live = self.counterpart() if source is None else source, {}
        if not any(self.has(source, member) for member in members(place)):
            return NAN
        sites = [member for member in members(place) if isinstance(member, Site)]
        edges = [member for member in members(place) if isinstance(member, Edge)]

        def gives(site, value):
            for patched in sites:
                if bare(patched) == site:
                    value = self.blend(value, source[site], patched.slot)
            live[site] = value
            return value

        def reads(site, x):
            shift = torch.zeros_like(x)
            for sender in {edge.sender for edge in edges if bare(edge.receiver) == site}:
                slots = [e.receiver.slot for e in edges if (e.sender, bare(e.receiver)) == (sender, site)]
                where = sorted({p for slot in slots for p in self.where(slot)})
                shift[where] += (source[sender] - live[sender]).nan_to_num(0)[where]
            return x + shift

        return self.metric(gives, reads) - self.baseline

    def path(self, senders, receivers, *, mlps=False, source=None):
        """Path patching in two runs. In the first the senders give what the source has, every other head (and, unless
        `mlps`, every MLP) what it gives in the unpatched run; in the second the receivers have what they had there."""
        source = self.counterpart() if source is None else source

        def frozen(site, value):
            if site in senders:
                return self.blend(value, source[site])
            return self.run[site] if site.kind == "head" or (site.kind == "mlp" and not mlps) else value

        arrived = given(self.clip, self.tokens, frozen)
        slots = {bare(receiver): receiver.slot for receiver in receivers}

        def gives(site, value):
            return self.blend(value, arrived[site], slots[site]) if site in slots else value

        def reads(site, x):
            return gives(site, x) if site.kind == "out" else x

        return self.metric(gives, reads) - self.baseline


def bare(site):
    return Site(site.kind, site.layer, site.unit)


TOWERS = {
    "causal": {},
    "bidirectional": {"causal": False, "ls_init_value": 0.5},
    "bidirectional, pooled last": {"causal": False, "pool_type": "last", "proj_bias": True},
}
TEXTS = {
    True: (
        ("There are no dogs in it.", "There are some dogs in it."),
        ("There is a zebra.", "There is no zebra."),
        ("A red cube left of a blue ball.", "A blue ball left of a red cube."),
    ),
    False: (
        ("There are dogs.", "There are no dogs."),
        ("There is a red zebra.", "There is no zebra!"),
        ("a photo of skateboarders", "photo without skateboarders"),
        ("no", "There are no people in it."),
    ),
}
"""Pairs of equal length, and of unequal."""


@cache
def tower(name, dtype=torch.float64, layers=3):
    """The original in float64 and the package's encoder of it."""
    options = {"layers": layers, "width": 32, "heads": 4, "d_embed": 16, "seed": 5} | TOWERS[name]
    clip = random_clip(**options).double().requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer(context_length=77 if name == "causal" else 16)
    return clip, load(clip, tokenizer=tokenizer, dtype=dtype)


@cache
def batch_of(name, equal=None, run="caption", dtype=torch.float64):
    """Pairs of equal length, of unequal, or (None) all of them."""
    encoder = tower(name, dtype)[1]
    texts = TEXTS[True] + TEXTS[False] if equal is None else TEXTS[equal]
    pairs = Pairs(range(len(texts)), *zip(*texts, strict=True), [f"{row}.png" for row in range(len(texts))])
    return align(pairs, random_store(pairs, encoder.d_embed), encoder, run=run, slots=[template_slots, no_slots])


def no_slots(text, other, info):
    """Tokens that no slot has are to be met too."""
    return ()


@cache
def texts_of(name, equal=None, run="caption"):
    batch = batch_of(name, equal, run)
    return [Text(tower(name)[0], batch, pair) for pair in range(len(batch))]


def agree(effects, expected, tolerance=1e-10):
    """Values equal, relative to the largest |effect| (a whole run's too), and NaN at the same places."""
    found, expected = effects.values.double(), torch.tensor(expected, dtype=torch.float64)
    differ = (found.isnan() != expected.isnan()).nonzero().tolist()
    assert not differ, [(str(effects.places[place]), pair) for place, pair in differ]
    error = (found - expected).nan_to_num().abs()
    place, pair = divmod(int(error.argmax()), error.shape[1])
    largest = max(expected.nan_to_num().abs().max(), effects.total.nan_to_num().abs().max())
    assert error.max() <= tolerance * largest, (str(effects.places[place]), pair, float(error.max() / largest))
