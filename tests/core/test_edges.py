"""Edges against open_clip's blocks run by hand: two-run path patches, and any sets of edges and sites, one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOWERS, agree, batch_of, forward, texts_of, tower
from towers import random_encoder

from clip_lens.core import edges
from clip_lens.core.address import address
from clip_lens.core.source import counterpart
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Edge, Site, at_slot, members, precedes

EMBED, OUT = Site("embed"), Site("out")
LAYERS, HEADS = 3, 4
PATHS = [
    *(Edge(Site("head", 0, 1), Site(kind, layer, 2)) for kind in "qkv" for layer in (1, 2)),
    Edge(Site("head", 0, 3), Site("mlp", 0)),
    Edge(Site("head", 1, 0), Site("mlp", 2)),
    *(Edge(Site("mlp", 0), Site(kind, layer, 1)) for kind in "qkv" for layer in (1, 2)),
    Edge(Site("mlp", 0), Site("mlp", 1)),
    Edge(EMBED, Site("q", 0, 0)),
    Edge(EMBED, Site("k", 2, 3)),
    Edge(EMBED, Site("mlp", 1)),
    Edge(EMBED, OUT),
    Edge(Site("head", 0, 2), OUT),
    Edge(Site("head", 2, 2), OUT),
    Edge(Site("mlp", 1), OUT),
    Edge(Site("mlp", 2), OUT),
]
SLOTS = (None, "negator", "eot", 2)


@pytest.mark.parametrize("name", TOWERS)
def test_the_oracle_is_open_clips_forward(name):
    clip, encoder = tower(name)
    texts = [*batch_of(name).pairs.caption, *batch_of(name).pairs.foil]
    for tokens in encoder.tokenize(texts):
        assert (forward(clip, tokens) - clip.encode_text(tokens[None], normalize=True)[0]).abs().max() < 1e-13


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", TOWERS)
def test_an_edge_is_the_two_run_path_patch_with_everything_else_frozen(name, equal, slot):
    places = [edge if edge.receiver.kind == "out" else at_slot(edge, slot) for edge in PATHS]
    expected = [
        [
            text.path({edge.sender}, {edge.receiver}) if text.has(text.counterpart(), edge) else float("nan")
            for text in texts_of(name, equal)
        ]
        for edge in places
    ]
    agree(patch_effects(tower(name)[1], batch_of(name, equal), places, rows=50), expected)


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_an_edge_in_float32(name):
    expected = [[text.effect(edge) for text in texts_of(name)] for edge in PATHS]
    single = batch_of(name, dtype=torch.float32)
    agree(patch_effects(tower(name, torch.float32)[1], single, PATHS), expected, 2e-5)


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_a_layer_of_heads_is_each_of_its_heads(name):
    _, encoder = tower(name)
    layers = [
        Edge(Site("head", 0), Site("q", 1)),
        Edge(Site("head", 1), Site("mlp", 1, slot="subject")),
        Edge(EMBED, Site("v", 0, slot="eot")),
        Edge(Site("head", 2), OUT),
    ]
    single = [
        tuple(
            Edge(Site(e.sender.kind, e.sender.layer, s), Site(e.receiver.kind, e.receiver.layer, r, e.receiver.slot))
            for s in encoder.units(e.sender.kind)
            for r in encoder.units(e.receiver.kind)
        )
        for e in layers
    ]
    found, expected = (patch_effects(encoder, batch_of(name), places).values for places in (layers, single))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12, equal_nan=True)
    agree(
        patch_effects(encoder, batch_of(name), single), [[t.effect(place) for t in texts_of(name)] for place in single]
    )


HEAD_SITES = [Site(kind, layer, head) for kind in ("head", "q", "k", "v") for layer in range(LAYERS) for head in (0, 3)]
SITES = [EMBED, *(Site("mlp", layer) for layer in range(LAYERS)), *HEAD_SITES]
SENDERS = [site for site in SITES if site.kind in ("embed", "head", "mlp")]
RECEIVERS = [OUT, *(site for site in SITES if site.kind in ("q", "k", "v", "mlp"))]
EDGES = [Edge(sender, receiver) for sender in SENDERS for receiver in RECEIVERS if precedes(sender, receiver)]
MEMBERS = st.tuples(
    st.one_of(st.sampled_from(EDGES), st.sampled_from(EDGES), st.sampled_from(SITES)),
    st.sampled_from([None, None, "negator", "subject", "eot", 1, 2]),
).map(lambda drawn: drawn[0] if isinstance(drawn[0], Edge) and drawn[0].receiver == OUT else at_slot(*drawn))


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    name=st.sampled_from(sorted(TOWERS)),
    run=st.sampled_from(["caption", "foil"]),
    places=st.lists(st.lists(MEMBERS, min_size=1, max_size=9, unique=True).map(tuple), min_size=1, max_size=5),
    rows=st.integers(1, 40),
)
def test_any_edges_and_sites_together_are_the_same_by_hand_one_by_one(name, run, places, rows):
    """Sites act first: senders are live behind them, and a q that is patched itself is not shifted."""
    expected = [[text.effect(place) for text in texts_of(name, None, run)] for place in places]
    agree(patch_effects(tower(name)[1], batch_of(name, None, run), places, rows=rows), expected)


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_tiles_bound_the_memory_and_change_nothing(name, monkeypatch):
    _, encoder = tower(name)
    places = [tuple(encoder.edges()), tuple(encoder.edges(receivers=[Site("mlp", 1), Site("v", 2)]))]
    expected = patch_effects(encoder, batch_of(name), places).values
    monkeypatch.setattr(edges, "TILE", 1)
    assert torch.allclose(patch_effects(encoder, batch_of(name), places).values, expected, rtol=0, atol=1e-12)


def test_an_edge_named_twice_is_patched_once():
    _, encoder = tower("causal")
    edge = PATHS[0]
    values = patch_effects(encoder, batch_of("causal"), [edge, (edge, edge)]).values
    assert torch.allclose(values[0], values[1], rtol=0, atol=1e-12)


def test_overlapping_slots_of_one_edge_are_patched_once():
    """The whole receiver and one of its slots: no position is shifted twice."""
    _, encoder = tower("causal")
    edge = PATHS[0]
    values = patch_effects(encoder, batch_of("causal"), [edge, (edge, at_slot(edge, "eot"), at_slot(edge, 2))]).values
    assert torch.allclose(values[0], values[1], rtol=0, atol=1e-12)


# Which edges there are


def count(layers, heads):
    """By the definition: each sender with each later receiver."""
    senders = 1
    edges = 0
    for _ in range(layers):
        edges += 3 * heads * senders
        senders += heads
        edges += senders
        senders += 1
    return edges + senders


@pytest.mark.parametrize(("layers", "heads", "number"), [(12, 8, 15_355), (12, 12, 32_491), (6, 4, 1_108)])
def test_number_of_edges(layers, heads, number):
    encoder = random_encoder(layers=layers, width=2 * heads, heads=heads, d_embed=4)
    found = encoder.edges()
    assert len(found) == len(set(found)) == count(layers, heads) == number
    senders = {edge.sender for edge in found}
    assert len(senders) == 1 + layers * (heads + 1)


def test_order_is_that_of_the_tower_whatever_the_order_asked_for():
    _, encoder = tower("causal")
    every = encoder.edges()
    senders, receivers = ({getattr(edge, end): None for edge in every} for end in ("sender", "receiver"))
    assert encoder.edges(senders=reversed(list(senders)), receivers=reversed(list(receivers))) == every
    assert [str(receiver) for receiver in receivers][:4] == ["q 0.0", "k 0.0", "v 0.0", "q 0.1"]
    assert list(map(str, receivers))[-2:] == ["mlp 2", "out"]
    assert [str(edge.sender) for edge in every[-16:]][:6] == ["embed", *(f"head 0.{h}" for h in range(4)), "mlp 0"]
    ends = [list(receivers).index(edge.receiver) for edge in every]
    assert ends == sorted(ends)


def test_filters():
    _, encoder = tower("causal")
    every = encoder.edges()
    chosen = encoder.edges(senders=[Site("head", 1)], receivers=[Site("v", 2), Site("mlp", 2), OUT])
    wanted = [
        edge
        for edge in every
        if (edge.sender.kind, edge.sender.layer) == ("head", 1)
        and ((edge.receiver.kind, edge.receiver.layer) in (("v", 2), ("mlp", 2)) or edge.receiver == OUT)
    ]
    assert chosen == wanted and len(chosen) == HEADS * (HEADS + 2)
    assert encoder.edges(senders=[EMBED], receivers=[Site("q", 0, 1, "eot")]) == [Edge(EMBED, Site("q", 0, 1, "eot"))]
    assert all(precedes(edge.sender, edge.receiver) for edge in every)


def test_bad_edges_get_their_errors():
    _, encoder = tower("causal")
    with pytest.raises(ValueError, match="no edge runs"):
        encoder.edges(senders=[Site("mlp", 1)], receivers=[Site("q", 1)])
    for ends, message in {
        (Site("mlp", 1), Site("mlp", 1)): "does not come after",
        (Site("head", 1, 0), Site("q", 1, 1)): "does not come after",
        (Site("resid", 1), OUT): "send",
        (EMBED, Site("head", 1)): "receive",
        (Site("embed", slot="eot"), OUT): "its receiver's",
        (EMBED, Site("out", slot="eot")): "pooled position",
    }.items():
        with pytest.raises(ValueError, match=message):
            Edge(*ends)
    for edge, message in {
        Edge(EMBED, Site("mlp", 3)): r"mlp 3: .* layers 0\.\.2",
        Edge(Site("head", 0, 4), OUT): r"head units 0\.\.3",
        Edge(EMBED, Site("q", 0, 4)): r"q units 0\.\.3",
        Edge(EMBED, Site("mlp", 1, slot="verb")): "no slot 'verb'",
        Edge(EMBED, Site("mlp", 1, slot=99)): "positions 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            patch_effects(encoder, batch_of("causal"), [edge])
    with pytest.raises(ValueError, match="is no site"):
        patch_effects(encoder, batch_of("causal"), [OUT])


def test_addresses_expand_layers_of_heads():
    _, encoder = tower("causal")
    places = [Edge(Site("head", 0), Site("q", 1)), PATHS[0]]
    found = address(places, encoder, batch_of("causal"))
    assert found.edges.offset.diff().tolist() == [HEADS**2, 1] and len(members(places[0])) == 1
    assert counterpart(encoder, batch_of("causal")).is_run
