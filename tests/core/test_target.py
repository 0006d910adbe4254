"""Metrics that read an activation, against open_clip's blocks written out by hand, one text and one place at a time."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from handmade import handmade
from oracle import Text, agree, batch_of, forward, same, tower

from clip_lens.core.metric import activation, attention_score
from clip_lens.core.source import source, zeros
from clip_lens.methods.circuits.circuit import Circuit
from clip_lens.methods.circuits.faithfulness import faithfulness
from clip_lens.methods.circuits.selection import top_edges
from clip_lens.methods.gradient import gradient_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.model import tower as towers
from clip_lens.model.site import Edge, Site

WIDTH, D_HEAD = 32, 8
DIRECTION = torch.randn(128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Seen(Text):
    """A text whose metric is `of(what every component gives and reads, the text)`."""

    def __init__(self, clip, batch, pair, of):
        self.of = of
        super().__init__(clip, batch, pair)

    def metric(self, gives=same, reads=same):
        found = {}

        def keep(site, value):
            found[site] = gives(site, value)
            return found[site]

        def keep_read(site, x):
            found["read", site] = reads(site, x)
            return found["read", site]

        forward(self.clip, self.tokens, keep, keep_read)
        return float(self.of(found, self))

    def at(self, slot):
        return self.where(slot)[-1] if slot is not None else pooled_of(self)

    @property
    def blocks(self):
        return getattr(self.clip, "text", self.clip).transformer.resblocks


def pooled_of(text):
    kind = getattr(getattr(text.clip, "text", text.clip), "pool_type", "argmax")
    return len(text.tokens) - 1 if kind == "last" else text.tokens.tolist().index(49407)


def score_by_hand(layer, head, query, key):
    def of(found, text):
        q, k = found[Site("q", layer, head)], found[Site("k", layer, head)]
        return q[text.at(query)] @ k[text.at(key)] / math.sqrt(D_HEAD)

    return of


def weight_by_hand(layer, head, query, key):
    def of(found, text):
        p, scores = text.at(query), found[Site("q", layer, head)] @ found[Site("k", layer, head)].T / math.sqrt(D_HEAD)
        ends = p + 1 if text.name == "causal" else len(scores)
        return scores[p, :ends].softmax(0)[text.at(key)]

    return of


def neuron_by_hand(layer, neuron, slot):
    def of(found, text):
        block = text.blocks[layer]
        x = block.ln_2(found["read", Site("mlp", layer)])
        return block.mlp.gelu(block.mlp.c_fc(x))[text.at(slot), neuron]

    return of


def stream_by_hand(site, slot):
    """What an MLP gives, or what the q of head 0 (the output) reads, along the direction."""
    return lambda found, text: found[site][text.at(slot)] @ DIRECTION[:WIDTH]


def head_by_hand(layer, head, slot):
    """Of z, so that the direction is taken to what the head writes: z is what W_O gives back exactly."""

    def of(found, text):
        out = text.blocks[layer].attn.out_proj.weight.unflatten(1, (4, -1))[:, head]
        written = found[Site("head", layer, head)][text.at(slot)] / text.blocks[layer].ls_1(torch.ones(WIDTH).double())
        return torch.linalg.lstsq(out, written.unsqueeze(1)).solution[:, 0] @ DIRECTION[:D_HEAD]

    return of


STREAM, HEAD = DIRECTION[:WIDTH], DIRECTION[:D_HEAD]
TARGETS = {
    "a score": (attention_score(1, 2, "eot", 1), score_by_hand(1, 2, "eot", 1)),
    "a score from within": (attention_score(2, 0, 2, 1), score_by_hand(2, 0, 2, 1)),
    "a weight": (activation(Site("pattern", 1, 1, 2), key=1), weight_by_hand(1, 1, 2, 1)),
    "a neuron": (activation(Site("neuron", 1, 7, 1)), neuron_by_hand(1, 7, 1)),
    "an MLP along": (activation(Site("mlp", 1, slot="eot"), STREAM), stream_by_hand(Site("mlp", 1), "eot")),
    "the stream along": (activation(Site("resid", 1), STREAM), stream_by_hand(("read", Site("q", 1, 0)), None)),
    "the last stream": (activation(Site("resid", 3, slot=1), STREAM), stream_by_hand(("read", Site("out")), 1)),
    "a head": (activation(Site("head", 0, 3, 2), HEAD), head_by_hand(0, 3, 2)),
}
SITES = [
    *(Site("embed", slot=slot) for slot in (2, None)),
    *(Site(kind, layer, unit) for kind in ("q", "k", "v", "head") for layer in (0, 1, 2) for unit in (0, 2)),
    *(Site("head", layer, 3, 2) for layer in (0, 1)),
    *(Site("mlp", layer, slot=slot) for layer in (0, 1, 2) for slot in ("eot", 2, None)),
    (Site("head", 0, 0), Site("mlp", 1), Site("v", 2, 1)),
]
OUT = Site("out")


def edges_of(encoder, target):
    """Every third edge, and those into q and k of the target's own layer; at slots too.

    Not those into q 1.0, where the oracle reads resid 1, and not those into the output: the oracle shifts it at every
    position, here it is read at the pooled one (or where the metric reads it).
    """
    layer, head = min(target.site.layer, 2), target.site.unit or 0
    near = encoder.edges(receivers=[Site(kind, layer, head % 4) for kind in "qk"])
    edges = [
        *encoder.edges()[::3],
        *near,
        Edge(Site("mlp", 0), Site("mlp", 1, slot=2)),
        Edge(Site("embed"), Site("k", 1, 2, 1)),
    ]
    return [edge for edge in dict.fromkeys(edges) if edge.receiver not in (Site("q", 1, 0), OUT)]


@cache
def texts(name, what):
    batch = batch_of(name)
    if name == "causal":  # nothing reads what lies behind the end of text
        width = int(torch.maximum(batch.length, batch.other_length).max())
        parts = ("tokens", "other", "origin", "slot", "other_slot")
        batch = replace(batch, **{part: getattr(batch, part)[:, :width] for part in parts})
    found = []
    for pair in range(len(batch)):
        text = Seen.__new__(Seen)
        text.name = name
        Seen.__init__(text, tower(name)[0], batch, pair, TARGETS[what][1])
        found.append(text)
    return found


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *(("causal", what) for what in TARGETS),
        *(("bidirectional", what) for what in ("a score", "a neuron", "a weight")),
        ("bidirectional, pooled last", "the stream along"),
    ],
)
def test_what_moves_an_activation_is_what_the_blocks_by_hand_say(name, what):
    """Sites, edges and tuples, pairs of equal and unequal length."""
    metric, encoder = TARGETS[what][0], tower(name)[1]
    places = [*SITES, *edges_of(encoder, metric.target)]
    effects = patch_effects(encoder, batch_of(name), places, metric=metric)
    expected = [[text.effect(place) for text in texts(name, what)] for place in places]
    agree(effects, expected)
    assert effects.baseline.tolist() == pytest.approx([text.baseline for text in texts(name, what)], abs=1e-10)
    assert not effects.record.metric.oriented


@pytest.mark.parametrize("what", TARGETS)
def test_the_total_is_the_other_text_where_texts_are_equally_long(what):
    encoder, batch = tower("causal")[1], batch_of("causal", True)
    metric = TARGETS[what][0]
    effects = patch_effects(encoder, batch, [Site("mlp", 0)], metric=metric)
    back = patch_effects(encoder, batch.flip(), [Site("mlp", 0)], metric=metric)
    assert torch.allclose(effects.baseline + effects.total, back.baseline, atol=1e-12)
    assert metric.target.site.kind in ("neuron", "head", "resid") or effects.total.abs().max() > 1e-3


@pytest.mark.parametrize("what", TARGETS)
def test_of_a_source_that_is_no_run_the_total_patches_every_sender_before(what):
    metric = TARGETS[what][0]
    effects = patch_effects(tower("causal")[1], batch_of("causal"), [Site("embed")], metric=metric, source=zeros)
    layer = min(metric.target.site.layer, 3)
    before = [Site("embed")] + [
        Site(k, at, u) for at in range(layer) for k, u in [("head", h) for h in range(4)] + [("mlp", None)]
    ]
    if metric.target.site.kind in ("neuron", "mlp"):
        before += [Site("head", layer, head) for head in range(4)]
    for pair, text in enumerate(texts("causal", what)):
        nothing = {site: torch.zeros_like(value) for site, value in text.run.items()}
        assert float(effects.total[pair]) == pytest.approx(text.effect(tuple(before), nothing), abs=1e-10)


def part_of_the_way(weight):
    def make(encoder, batch):
        def fetch(pairs, names):
            names = set(names)
            own = encoder.cache(batch.tokens[pairs], names=names)
            there = counterpart_of(encoder, batch, pairs, names)
            return {name: own[name] + weight * (there[name][:, : own[name].shape[1]] - own[name]) for name in names}

        return fetch

    return source(make, holds=weight)


def counterpart_of(encoder, batch, pairs, names):
    width = encoder.cut(batch.tokens[pairs]).shape[1]
    cache = encoder.cache(batch.other[pairs], names=names)
    return {
        name: torch.nn.functional.pad(value, (0,) * 2 * (value.ndim - 2) + (0, width))[:, :width]
        for name, value in cache.items()
    }


@pytest.mark.parametrize("what", ["a score", "a weight", "an MLP along", "the stream along"])
def test_gradients_of_an_activation_are_central_finite_differences_of_patches(what):
    encoder, batch, metric, h = tower("causal")[1], batch_of("causal", True), TARGETS[what][0], 1e-4
    places = [
        *encoder.edges()[::5],
        Site("mlp", 0),
        Site("head", 1, 2, "eot"),
        Site("resid", 1, slot=2),
        Site("k", 1, 2),
    ]
    ahead, behind = (
        patch_effects(encoder, batch, places, metric=metric, source=part_of_the_way(w)).values for w in (h, -h)
    )
    found = gradient_effects(encoder, batch, places, metric=metric)
    expected = (ahead - behind) / (2 * h)
    assert (found.values - expected).abs().max() <= 1e-6 * expected.abs().max() > 0
    assert torch.allclose(found.total, patch_effects(encoder, batch, places, metric=metric).total, atol=1e-12)


def test_what_stands_behind_does_not_run(monkeypatch):
    encoder, batch = tower("causal")[1], batch_of("causal", True)
    metric, ran = attention_score(1, 0, "eot", 1), []
    plain = towers.Block.forward

    def counted(self, x, *args, **kwargs):
        ran.append(list(encoder.tower.blocks).index(self))
        return plain(self, x, *args, **kwargs)

    def blocks_run(places):
        ran.clear()
        monkeypatch.setattr(towers.Block, "forward", counted)
        effects = patch_effects(encoder, batch, places, metric=metric)
        monkeypatch.setattr(towers.Block, "forward", plain)
        return effects, [ran.count(layer) for layer in range(3)]

    behind, nothing = blocks_run(
        [Site("mlp", 1), Site("resid", 2), Edge(Site("embed"), Site("out")), Site("pattern", 1, 0)]
    )
    assert (behind.values == 0).all()
    _, more = blocks_run([Site("embed"), Site("mlp", 0)])
    assert more[0] > nothing[0] and more[1] > nothing[1]
    assert more[2] == nothing[2]  # once for the run, once for the source: the unpatched ones


def test_under_hooks_of_the_users_rows_run_whole_and_read_the_same():
    encoder, batch = tower("causal")[1], batch_of("causal")
    for what in ("a score", "a neuron", "the last stream"):
        metric = TARGETS[what][0]
        plain = patch_effects(encoder, batch, SITES, metric=metric)
        with encoder.tower.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: value.clone())]):
            hooked = patch_effects(encoder, batch, SITES, metric=metric)
        assert torch.allclose(plain.values, hooked.values, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("causal", [True, False])
def test_on_the_hand_made_tower_the_query_edges_move_the_score_and_nothing_else(causal):
    """Head 1.3 asks for what head 0.1 has told it of the word; head 1.3 -> out is behind the score."""
    made = handmade("query", causal)
    score = attention_score(1, 3, "eot", "there")
    effects = patch_effects(made.encoder, made.batch, made.encoder.edges(), metric=score)
    moving = {edge for edge, line in zip(effects.places, effects.values, strict=True) if line.abs().max() > 1e-9}
    assert moving == {edge for edge in made.edges if edge.receiver != Site("out")}


def test_the_output_is_what_the_last_stream_is_read_as():
    """An edge into the output moves the last stream where the metric reads it, by what the sender changes."""
    encoder, batch = tower("causal")[1], batch_of("causal", True)
    metric = activation(Site("resid", 3, slot=2), STREAM)
    found = patch_effects(encoder, batch, encoder.edges(receivers=[OUT]), metric=metric).values
    for pair, text in enumerate(texts("causal", "the last stream")[: len(batch)]):
        change = {site: value - text.run[site] for site, value in text.counterpart().items()}
        expected = [change[edge.sender][2] @ STREAM for edge in encoder.edges(receivers=[OUT])]
        assert torch.allclose(found[:, pair], torch.stack(expected), atol=1e-12)
    below = patch_effects(encoder, batch, encoder.edges(receivers=[OUT]), metric=attention_score(2, 0, 2, 1))
    assert (below.values == 0).all()


def test_a_circuit_of_a_score_is_judged_by_it():
    """On the hand-made tower the two edges that lead to the score give all of it."""
    made = handmade("query")
    score = attention_score(1, 3, "eot", "there")
    leading = sorted((edge for edge in made.edges if edge.receiver != OUT), key=str)
    circuits = [Circuit.of(leading[:n], n_layers=3, n_heads=4) for n in (0, 1, 2)]
    judged = faithfulness(made.encoder, made.batch, circuits, metric=score)
    lost = (judged.effects.values / judged.effects.total).T
    assert torch.allclose(lost, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).expand_as(lost), atol=1e-10)


def test_a_metric_of_an_activation_says_what_it_is():
    metric = attention_score(1, 2, "eot", "negator")
    assert (metric.name, metric.unit) == ("score 1.2 @eot -> @negator", "attention score")
    assert metric.identity == attention_score(1, 2, "eot", "negator").identity is not None
    assert metric.identity != attention_score(1, 2, "eot", "subject").identity
    assert metric.identity != activation(Site("pattern", 1, 2, "eot"), key="negator").identity
    along = [activation(Site("resid", 1), torch.tensor([1.0, x])).identity for x in (0.0, 1.0)]
    assert None not in along and len(set(along)) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: activation(Site("out")), "no activation"),
        (lambda: activation(Site("head", 1), HEAD), "name one head"),
        (lambda: activation(Site("pattern", 1, 0)), "give key="),
        (lambda: activation(Site("mlp", 1), STREAM, key=1), "give key="),
        (lambda: activation(Site("neuron", 1, 0), STREAM), "one number"),
        (lambda: activation(Site("resid", 1)), "several numbers"),
    ],
)
def test_what_is_no_number_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (attention_score(3, 0, None, 1), "layers 0..2"),
        (attention_score(0, 4, None, 1), "units 0..3"),
        (attention_score(0, 0, None, "negator"), "don't have, the first that of pair"),
        (attention_score(0, 0, 1, 2), "causal tower never looks"),
        (activation(Site("resid", 1), HEAD), "has 32 numbers"),
    ],
)
def test_what_a_batch_has_not_is_refused(metric, says):
    with pytest.raises(ValueError, match=says):
        patch_effects(tower("causal")[1], batch_of("causal"), [Site("mlp", 0)], metric=metric)


def test_no_circuit_computes_a_stream_within_the_tower():
    made = handmade("query")
    metric = activation(Site("resid", 1), STREAM)
    effects = patch_effects(made.encoder, made.batch, made.encoder.edges(), metric=metric)
    with pytest.raises(ValueError, match="no edge runs to a residual stream"):
        faithfulness(made.encoder, made.batch, top_edges(effects, 2), metric=metric)
