"""The identities of patching, Sites and Edges: they hold for every tower, whatever its weights.

Measured on unit embeddings, the largest difference of any component: 2e-6 in float32, 1e-12 in float64.
"""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from towers import random_encoder, random_store

from clip_lens.core.address import address
from clip_lens.core.rows import needed, prepare, run_rows, schedule
from clip_lens.core.source import counterpart
from clip_lens.data.batch import align
from clip_lens.data.images import ImageStore
from clip_lens.data.pairs import Pairs
from clip_lens.data.read import read_pairs
from clip_lens.data.slots import template_slots
from clip_lens.methods.patching import patch_effects
from clip_lens.model.load import load
from clip_lens.model.site import LAYOUTS, NO_LAYER, Edge, Site, at_slot, hook_name, members, precedes

TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12}
TOWERS = [f"{kind} {layers}" for kind in ("causal", "bidirectional") for layers in (1, 2, 3, 4)]
TOWERS += ["pooled last 2", "tiny"]
EQUALLY_LONG = (
    ("There are no dogs in the park.", "There are some dogs in the park."),
    ("There is a zebra.", "There is no zebra."),
    ("A red cube left of a blue ball.", "A blue ball left of a red cube."),
    ("cat", "dog"),
)
OF_OTHER_LENGTH = (
    ("There are no dogs in the park.", "There are dogs in the park."),
    ("no", "There is nothing to be seen here."),
    ("Two skateboarders without helmets.", "A skateboarder."),
    ("There is a zebra.", "There is no zebra."),
)


@cache
def encoder_of(name, dtype):
    if name == "tiny":
        return load(dtype=dtype)
    kind, layers = name.rsplit(" ", 1)
    options = {"pool_type": "last"} if kind == "pooled last" else {}
    options |= {"layers": int(layers), "width": 32, "heads": 4, "d_embed": 16, "seed": int(layers)}
    return random_encoder(causal=kind == "causal", dtype=dtype, **options)


@cache
def batch_of(name, dtype, equal=True, run="caption"):
    encoder = encoder_of(name, dtype)
    if name == "tiny":
        pairs = read_pairs()[:40]
        # Its own pairs are equally long; another pair's foil is not.
        foils = pairs.foil if equal else (*pairs.foil[5:], *pairs.foil[:5])
        pairs = Pairs(pairs.key, pairs.caption, foils, pairs.image)
        batch = align(pairs, ImageStore.open("tiny"), encoder, run=run, slots=template_slots)
        return batch[(batch.length == batch.other_length) == equal][:6]
    texts = EQUALLY_LONG if equal else OF_OTHER_LENGTH
    pairs = Pairs(range(len(texts)), *zip(*texts, strict=True), [f"{row}.png" for row in range(len(texts))])
    return align(pairs, random_store(pairs, encoder.d_embed), encoder, run=run)


@torch.no_grad()
def patched(encoder, batch, places, source=counterpart, rows=64):
    """The unit embeddings of the patched runs, place pair d_embed: NaN where there is nothing to patch."""
    chunk = prepare(encoder, batch, address(places, encoder, batch), source(encoder, batch), torch.arange(len(batch)))
    exists, first = needed(chunk)
    found = chunk.embedding.repeat(len(places), 1, 1)
    for place, pair in schedule(chunk, first, exists & (first < chunk.positions.shape[-1]), rows):
        found[place, pair] = run_rows(chunk, place, pair, first[place, pair])
    found[~exists] = float("nan")
    return found


def itself(encoder, batch):
    """The source that gives what the run has anyway."""
    return lambda pairs, names: encoder.cache(batch.tokens[pairs], names=names)


def assert_same(found, expected, dtype):
    difference = (found - expected).abs().max()
    assert difference <= TOLERANCES[dtype], float(difference)


def layered(encoder, kind):
    return [Site(kind, layer) for layer in range(encoder.n_layers)]


@pytest.fixture(params=TOWERS)
def name(request):
    return request.param


@pytest.fixture(params=TOLERANCES, ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def encoder(name, dtype):
    return encoder_of(name, dtype)


@pytest.fixture
def batch(name, dtype):
    return batch_of(name, dtype)


@pytest.fixture
def unequal(name, dtype):
    return batch_of(name, dtype, equal=False)


# Nothing patched


def test_reading_from_the_run_itself_is_the_run(encoder, batch, unequal, dtype):
    places = [site for kind in LAYOUTS for site in encoder.sites(kind)[:9]]
    for some in (batch, unequal):
        assert_same(patched(encoder, some, places, itself), encoder(some.tokens), dtype)


@pytest.mark.parametrize("name", [name for name in TOWERS if name.startswith(("causal", "tiny"))])
def test_before_the_first_difference_a_causal_tower_gives_exactly_the_run(encoder, batch, unequal):
    assert encoder.causal
    for some in (batch, unequal):
        shared = int(some.shared.min())
        places = [site for kind in LAYOUTS for site in encoder.sites(kind, slots=range(shared))[: 20 * shared]]
        assert (patch_effects(encoder, some, places).values == 0).all()


# Everything patched


def test_residual_stream_behind_the_last_block_is_the_counterpart(encoder, batch, unequal, dtype):
    """Whole, and at the pooled position alone, from texts of another length too."""
    last = encoder.n_layers
    for some in (batch, unequal):
        found = patched(encoder, some, [Site("resid", last), Site("resid", last, slot="eot")])
        assert_same(found, encoder(some.other), dtype)


def test_residual_stream_anywhere_is_the_counterpart_of_equal_length(encoder, batch, dtype):
    places = [*encoder.sites("resid"), *encoder.sites("mid"), Site("embed")]
    assert_same(patched(encoder, batch, places), encoder(batch.other), dtype)


def test_everything_written_is_the_counterpart_of_equal_length(encoder, batch, dtype):
    heads, mlps, attns = (layered(encoder, kind) for kind in ("head", "mlp", "attn"))
    every_head = encoder.sites("head")
    later = [site for site in (*every_head, *mlps) if site.layer > 0]
    places = [
        (Site("embed"), *heads, *mlps),
        (*mlps, *every_head, Site("embed")),
        (Site("embed"), *attns, *layered(encoder, "neuron")),
        (Site("resid", 0), Site("attn", 0), Site("mlp", 0), *later),
        (Site("mid", 0), Site("mlp", 0), *later),
    ]
    assert_same(patched(encoder, batch, places), encoder(batch.other), dtype)


def test_flipped_batch_gives_the_run_back(encoder, batch, dtype):
    assert_same(patched(encoder, batch.flip(), encoder.sites("resid")), encoder(batch.tokens), dtype)


# The same thing said twice


def test_places_that_must_mean_the_same(encoder, batch, unequal, dtype):
    for layer in range(encoder.n_layers):
        units = tuple(encoder.sites("head", layers=[layer]))
        neurons = tuple(encoder.sites("neuron", layers=[layer]))
        same = [
            (Site("head", layer), Site("attn", layer)),
            (Site("head", layer), units),
            (Site("neuron", layer), Site("mlp", layer)),
            (Site("neuron", layer, slot="eot"), Site("mlp", layer, slot="eot")),
            ((Site("mid", layer), Site("mlp", layer)), Site("resid", layer + 1)),
            ((Site("mid", layer), Site("resid", layer + 1)), Site("resid", layer + 1)),
            ((Site("attn", layer), Site("head", layer)), Site("attn", layer)),
            (Site("pattern", layer), tuple(encoder.sites("pattern", layers=[layer]))),
        ]
        if layer == 0:
            same.append((Site("embed", slot="eot"), Site("resid", 0, slot="eot")))
        if len(neurons) <= 128:
            same.append((Site("neuron", layer), neurons))
        for some in (batch, unequal):
            left, right = (patched(encoder, some, places) for places in zip(*same, strict=True))
            assert_same(left, right, dtype)
        # What attention reads decides what it writes: all of it, where every token has a counterpart.
        reads = [tuple(Site(kind, layer) for kind in "qkv"), (Site("pattern", layer), Site("v", layer))]
        expected = patched(encoder, batch, [Site("head", layer)])
        assert_same(patched(encoder, batch, reads), expected, dtype)
        scores = patched(encoder, batch, [(Site("q", layer), Site("k", layer)), Site("pattern", layer)])
        assert_same(scores[0], scores[1], dtype)


def test_whole_site_is_all_its_positions_and_a_slot_all_its_tokens(encoder, batch, unequal, dtype):
    for some in (batch, unequal):
        every = range(some.tokens.shape[1])
        for kind in LAYOUTS:
            last = len({site.layer for site in encoder.sites(kind)}) - 1
            left = patched(encoder, some, [Site(kind, last), Site(kind, last, slot="subject_rest")])
            number = some.slots.index("subject_rest")
            named = [
                tuple(Site(kind, last, slot=p) for p in range(some.tokens.shape[1]) if some.slot[row, p] == number)
                for row in range(len(some))
            ]
            whole = patched(encoder, some, [tuple(Site(kind, last, slot=p) for p in every)])[0]
            assert_same(left[0], whole, dtype)
            for row, place in enumerate(named):
                if place and not left[1, row].isnan().any():
                    assert_same(left[1, row], patched(encoder, some, [place])[0, row], dtype)


# Edges: a site is the edges that leave it, or that enter it


def senders_of(encoder):
    return [Site("embed"), *encoder.sites("head"), *encoder.sites("mlp")]


def outgoing(encoder, sender, slot=None):
    """All edges from a sender; with a slot, those read there: the output only if it is the pooled one."""
    edges = [edge for edge in encoder.edges(senders=[sender]) if slot in (None, "eot") or edge.receiver.kind != "out"]
    return tuple(edge if edge.receiver.kind == "out" else at_slot(edge, slot) for edge in edges)


def test_every_edge_is_the_counterpart(encoder, batch, unequal, dtype):
    """Of a text of another length too: the output is read where both are pooled."""
    for some in (batch, unequal):
        found = patched(encoder, some, [tuple(encoder.edges()), tuple(encoder.edges(receivers=[Site("out")]))])
        assert_same(found, encoder(some.other), dtype)


def test_every_edge_from_the_run_itself_is_the_run(encoder, batch, unequal, dtype):
    for some in (batch, unequal):
        assert_same(patched(encoder, some, [tuple(encoder.edges())], itself), encoder(some.tokens), dtype)


def test_a_writer_is_all_its_outgoing_edges(encoder, batch, unequal, dtype):
    writers = [Site("embed"), *encoder.sites("mlp"), *encoder.sites("head")[:: max(1, encoder.n_layers // 2)]]
    for some in (batch, unequal):
        expected = patched(encoder, some, writers)
        assert_same(patched(encoder, some, [outgoing(encoder, site) for site in writers]), expected, dtype)
        at_pool = patched(encoder, some, [at_slot(site, "eot") for site in writers])
        assert_same(patched(encoder, some, [outgoing(encoder, site, "eot") for site in writers]), at_pool, dtype)


def test_a_writer_at_a_slot_is_its_outgoing_edges_there(encoder, batch, unequal, dtype):
    """The output is not read at the negator, and the last MLP by nothing else."""
    writers = [site for site in senders_of(encoder) if outgoing(encoder, site, "negator")][::2]
    for some in (batch, unequal):
        found = patched(encoder, some, [outgoing(encoder, site, "negator") for site in writers])
        expected = patched(encoder, some, [at_slot(site, "negator") for site in writers])
        assert torch.equal(found.isnan(), expected.isnan())
        assert_same(found.nan_to_num(), expected.nan_to_num(), dtype)


def test_a_reader_is_all_its_incoming_edges(encoder, batch, unequal, dtype):
    readers = [site for kind in "qkv" for site in encoder.sites(kind)[:: max(1, encoder.n_layers)]]
    for some in (batch, unequal):
        for slot in (None, "negator", "eot", 1):
            sites = [at_slot(site, slot) for site in readers]
            found = patched(encoder, some, [tuple(encoder.edges(receivers=[site])) for site in sites])
            expected = patched(encoder, some, sites)
            assert torch.equal(found.isnan(), expected.isnan())
            assert_same(found.nan_to_num(), expected.nan_to_num(), dtype)


def test_the_residual_stream_is_all_edges_across_that_cut(encoder, batch, dtype):
    for layer in range(1, encoder.n_layers + 1):
        below = [site for site in senders_of(encoder) if site.kind == "embed" or site.layer < layer]
        across = tuple(e for e in encoder.edges(senders=below) if e.receiver.kind == "out" or e.receiver.layer >= layer)
        attention = [site for site in senders_of(encoder) if site.kind == "head" and site.layer == layer]
        behind = tuple(
            e
            for e in encoder.edges(senders=below + attention)
            if e.receiver.kind == "out" or (e.receiver.layer, e.receiver.kind == "mlp") >= (layer, True)
        )
        places, expected = [across], [Site("resid", layer)]
        if attention:
            places, expected = [across, behind], [Site("resid", layer), Site("mid", layer)]
        assert_same(patched(encoder, batch, places), patched(encoder, batch, expected), dtype)


def test_rows_of_different_edges_and_sites_are_the_same_alone(encoder, batch, unequal, dtype):
    edges = encoder.edges()
    places = [*edges[:: max(1, len(edges) // 3)], tuple(edges[::7]), Site("mlp"), (*edges[-3:], Site("q"))]
    for some in (batch, unequal):
        together = patched(encoder, some, places)
        for row, place in enumerate(places):
            alone = patched(encoder, some, [place], rows=3)[0]
            assert torch.equal(together[row].isnan(), alone.isnan())
            assert_same(together[row].nan_to_num(), alone.nan_to_num(), dtype)


# The tower


def relative(found, expected, dtype):
    """Activations aren't unit vectors: relative to their largest component."""
    assert_same(found / expected.abs().max(), expected / expected.abs().max(), dtype)


def test_everything_written_and_biases_sum_to_the_final_residual_stream(encoder, batch, dtype):
    cache, tower = encoder.cache(batch.tokens), encoder.tower
    total = cache["hook_embed"] + cache["hook_pos_embed"]
    for layer in range(encoder.n_layers):
        heads = torch.einsum("bphe,hed->bpd", cache[f"blocks.{layer}.attn.hook_z"], tower.W_O[layer])
        relative(heads + tower.b_O[layer], cache[f"blocks.{layer}.hook_attn_out"], dtype)
        mlp = cache[f"blocks.{layer}.mlp.hook_post"] @ tower.W_out[layer]
        relative(mlp + tower.b_out[layer], cache[f"blocks.{layer}.hook_mlp_out"], dtype)
        total = total + heads + mlp
    total = total + tower.accumulated_bias(encoder.n_layers)
    relative(total, cache[f"blocks.{encoder.n_layers - 1}.hook_resid_post"], dtype)


def test_resuming_at_a_layer_is_running_from_the_start(encoder, batch, dtype):
    pooled = encoder.pool(batch.tokens)
    for layer in range(encoder.n_layers):
        x = encoder.tower(batch.tokens, stop_at_layer=layer)
        whole = encoder.read(encoder.tower(x, start_at_layer=layer), pooled)
        read = encoder.read(encoder.tower(x, start_at_layer=layer, read=pooled), 0)
        assert_same(torch.stack([whole, read]), encoder(batch.tokens), dtype)


def test_a_text_cut_is_the_text_padded(encoder, unequal, dtype):
    texts = unequal.pairs.caption
    padded = encoder.tower.to_tokens(list(texts))
    y = encoder.tower(padded)
    assert_same(encoder(texts), encoder.read(y, encoder.pool(padded)), dtype)
    alone = torch.cat([encoder(text) for text in texts])
    assert_same(alone, encoder(texts), dtype)


# Any places, at random


def one_by_one(encoder, batch, place, pair):
    """One text, padded, from the first layer on, each site overwritten by a hook of its own: what rows must equal."""
    tokens = torch.nn.functional.pad(batch.tokens[pair], (0, encoder.n_ctx - batch.tokens.shape[1]))[None]
    other = torch.nn.functional.pad(batch.other[pair], (0, encoder.n_ctx - batch.other.shape[1]))[None]
    origin, hooks, found = batch.origin[pair].tolist(), [], False
    pooled = int(encoder.pool(batch.tokens)[pair])
    slots = [batch.slots[s] if s >= 0 else None for s in batch.slot[pair].tolist()]
    ends = [member.sender if isinstance(member, Edge) else member for member in members(place)]
    _, cache = encoder.tower.run_with_cache(other, names_filter=[hook_name(end, encoder.n_layers) for end in ends])
    edges = {}
    for member in members(place):
        site = member.receiver if isinstance(member, Edge) else member
        fits = [site.slot in (None, p, slots[p]) for p in range(int(batch.length[pair]))]
        where = [p for p, fit in enumerate(fits) if fit and origin[p] >= 0]
        if isinstance(member, Edge):
            where = [pooled] if site.kind == "out" else where
            edges.setdefault((member.sender, at_slot(site, None)), set()).update(where)
        else:
            name = hook_name(site, encoder.n_layers)
            hooks.append((name, overwrite(site, where, origin, cache[name][0])))
        found = found or bool(where)
    hooks += edge_hooks(encoder, edges, origin, cache)
    y = encoder.tower.run_with_hooks(tokens, fwd_hooks=hooks)
    return torch.nn.functional.normalize(y[0, pooled], dim=0) if found else torch.full_like(y[0, 0], float("nan"))


def edge_hooks(encoder, edges, origin, cache):
    """For each edge a hook that keeps what its sender gives, and one that shifts its receiver's own copy of the input:
    TransformerLens' split inputs."""
    hooks, live = [], {}
    for (sender, receiver), where in edges.items():
        sent = hook_name(sender, encoder.n_layers)
        read = {"mlp": "hook_mlp_in", "out": "hook_resid_post"}.get(receiver.kind, f"hook_{receiver.kind}_input")
        layer = encoder.n_layers - 1 if receiver.kind == "out" else receiver.layer

        def keep(value, hook, sent=sent):
            live[sent] = value[0]

        def shift(value, hook, sender=sender, receiver=receiver, sent=sent, where=where):
            value = value.clone()
            for p in where:
                change = cache[sent][0, origin[p]] - live[sent][p]
                if sender.kind == "head":
                    change = change[sender.unit] @ encoder.tower.blocks[sender.layer].attn.W_O[sender.unit]
                units = () if receiver.unit is None else (receiver.unit,)
                value[(0, p, *units)] += change
            return value

        hooks += [(sent, keep), (f"blocks.{layer}.{read}", shift)]
    return hooks


def overwrite(site, where, origin, source):
    def hook(value, hook):
        value = value.clone()
        units = slice(None) if site.unit is None else site.unit
        for p in where:
            if site.kind == "pattern":
                value[0, units, p] = 0
                for key, there in enumerate(origin):
                    if there >= 0:
                        value[0, units, p, key] = source[units, origin[p], there]
            elif LAYOUTS[site.kind].unit_axis is None:
                value[0, p] = source[origin[p]]
            else:
                value[0, p, units] = source[origin[p], units]
        return value

    return hook


EDGE_STARTS = [Site("embed"), *(Site("head", layer, 1) for layer in range(6)), *(Site("mlp", n) for n in range(6))]
EDGE_ENDS = [
    Site("out"),
    *(Site(kind, layer, unit) for kind in "qkv" for layer in range(6) for unit in (1, 2)),
    *(Site("mlp", layer) for layer in range(6)),
]


@st.composite
def interventions(draw):
    name = draw(st.sampled_from([name for name in TOWERS if name[-1] in "24y"]))
    encoder = encoder_of(name, torch.float64)
    batch = batch_of(name, torch.float64, draw(st.booleans()), draw(st.sampled_from(["caption", "foil"])))

    def site(kind):
        units = st.sampled_from([None, 0, 3]) if LAYOUTS[kind].unit_axis is not None else st.none()
        layers = st.integers(0, 0 if kind in NO_LAYER else encoder.n_layers - (kind != "resid"))
        positions = st.integers(0, batch.tokens.shape[1] - 1)
        slots = st.one_of(st.none(), st.sampled_from(["negator", "subject", "stop", "eot"]), positions)
        return st.builds(Site, st.just(kind), layers, units, slots)

    def edge(site):
        receivers = [e for e in EDGE_ENDS if e.layer < encoder.n_layers and precedes(site, e)]
        positions = st.sampled_from([None, "negator", "subject", "eot", 1])
        slotted = lambda end, slot: end if end.kind == "out" else at_slot(end, slot)
        return st.builds(Edge, st.just(site), st.builds(slotted, st.sampled_from(receivers), positions))

    sites = st.sampled_from(list(LAYOUTS)).flatmap(site)
    edges = st.sampled_from([e for e in EDGE_STARTS if e.layer < encoder.n_layers]).flatmap(edge)
    patches = st.one_of(sites, edges, edges)
    places = st.lists(st.one_of(patches, st.lists(patches, min_size=2, max_size=5).map(tuple)), min_size=1, max_size=6)
    return encoder, batch[:4], draw(places), draw(st.integers(1, 7))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(drawn=interventions())
@torch.no_grad()
def test_interventions_as_rows_are_the_same_one_by_one_from_the_start_and_padded(drawn):
    encoder, batch, places, rows = drawn
    found = patched(encoder, batch, places, rows=rows)
    for row, place in enumerate(places):
        for pair in range(len(batch)):
            expected = one_by_one(encoder, batch, place, pair)
            assert torch.equal(found[row, pair].isnan(), expected.isnan())
            assert_same(found[row, pair].nan_to_num(), expected.nan_to_num(), torch.float64)
