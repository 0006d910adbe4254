"""Rows: what runs, in which groups, and that what does not run would have changed nothing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from towers import random_encoder, random_store

from clip_lens.core.address import address
from clip_lens.core.metric import Readout, logit
from clip_lens.core.rows import WORTH_A_FORWARD, _groups, chunk_effects, needed, prepare, run_rows, schedule
from clip_lens.core.source import counterpart
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.model.site import LAYOUTS, NO_LAYER, Edge, Site

LAYERS = 3
TEXTS = [
    ("There are no dogs in the park.", "There are some dogs in the park."),
    ("A cat on a mat.", "A cat on no mat."),
    ("dogs", "no dogs at all"),
    ("There is a red dog.", "There is no dog."),
]
PLACES = tuple(
    Site(kind, layer, slot=slot)
    for kind in LAYOUTS
    for layer in ((0,) if kind in NO_LAYER else range(LAYERS + (kind == "resid")))
    for slot in (None, "negator", "eot", 0, 2, 4)
)
ENCODERS = {}


def encoder_of(causal):
    if causal not in ENCODERS:
        ENCODERS[causal] = random_encoder(
            layers=LAYERS, width=16, heads=2, d_embed=8, causal=causal, dtype=torch.float64
        )
    return ENCODERS[causal]


def chunk_of(causal, places=PLACES, texts=TEXTS, index=None):
    encoder = encoder_of(causal)
    pairs = Pairs(range(len(texts)), *zip(*texts, strict=True), [f"{row}.png" for row in range(len(texts))])
    batch = align(pairs, random_store(pairs, 8), encoder, run="caption")
    addresses = address(places, encoder, batch)
    index = torch.arange(len(batch)) if index is None else index
    return prepare(encoder, batch, addresses, counterpart(encoder, batch), index)


def readout_of(chunk):
    return Readout(chunk.batch.direction, chunk.embedding, chunk.encoder(chunk.batch.other))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 999), rows=st.integers(1, 40), density=st.floats(0, 1), causal=st.booleans())
def test_schedule_runs_every_row_once_in_groups_of_one_layer(seed, rows, density, causal):
    chunk = chunk_of(causal)
    generator = torch.Generator().manual_seed(seed)
    _, first = needed(chunk)
    runs = torch.rand(first.shape, generator=generator) < density
    seen = []
    for place, pair in schedule(chunk, first, runs, rows):
        assert 0 < len(place) <= rows
        assert len(chunk.addresses.start[place].unique()) == 1
        seen += list(zip(place.tolist(), pair.tolist(), strict=True))
    assert sorted(seen) == [tuple(row) for row in runs.nonzero().tolist()]


@torch.no_grad()
def test_rows_that_need_not_run_change_nothing():
    """Where the texts agree, behind the pooled position, and where nothing is read any more: forced, they give 0."""
    for causal in (True, False):
        chunk = chunk_of(causal)
        exists, first = needed(chunk)
        width = chunk.positions.shape[-1]
        idle = exists & (first == width)
        assert idle.any() and (exists & ~idle).any()
        place, pair = idle.nonzero(as_tuple=True)
        for layer in chunk.addresses.start[place].unique():
            some = chunk.addresses.start[place] == layer
            forced = run_rows(chunk, place[some], pair[some], torch.zeros_like(pair[some]))
            assert (forced - chunk.embedding[pair[some]]).abs().max() < 1e-14


@torch.no_grad()
def test_rows_may_start_earlier_than_they_must():
    """A wider window of positions, down to the whole text, gives the same embeddings."""
    chunk = chunk_of(True)
    exists, first = needed(chunk)
    for place, pair in schedule(chunk, first, exists & (first < chunk.positions.shape[-1]), 50):
        found = run_rows(chunk, place, pair, first[place, pair])
        whole = run_rows(chunk, place, pair, torch.zeros_like(pair))
        assert (found - whole).abs().max() < 1e-14


def test_what_is_skipped_in_a_causal_tower():
    """Texts that agree in their first three tokens: nothing before runs, the last block only at the pooled position."""
    slots = tuple(range(10))
    places = tuple(Site(kind, LAYERS - 1, slot=slot) for kind in ("resid", "k", "q", "mlp") for slot in slots)
    chunk = chunk_of(True, (*places, *(Site("resid", LAYERS, slot=slot) for slot in slots)), TEXTS[:1])
    exists, first = needed(chunk)
    assert exists.all()
    runs = (first < chunk.positions.shape[-1]).reshape(-1, len(slots))
    assert [row.nonzero().flatten().tolist() for row in runs] == [[3, 4, 5, 6, 7, 8, 9]] * 2 + [[9]] * 3


def test_which_edges_are_skipped_in_a_causal_tower():
    """Keys and values of the last block are read at every position, all else behind it only at the pooled one."""
    slots, last = tuple(range(10)), LAYERS - 1
    receivers = [(kind, last - 1) for kind in ("q", "mlp")] + [(kind, last) for kind in ("k", "v", "q", "mlp")]
    single = {"mlp": None}
    places = [
        Edge(Site("embed"), Site(kind, layer, single.get(kind, 1), slot)) for kind, layer in receivers for slot in slots
    ]
    chunk = chunk_of(True, (*places, Edge(Site("mlp", 0), Site("out"))), TEXTS[:1])
    exists, first = needed(chunk)
    assert exists.all()
    runs = (first < chunk.positions.shape[-1]).flatten().tolist()
    assert runs.pop()
    found = [[slot for slot in slots if runs[10 * row + slot]] for row in range(len(receivers))]
    assert found == [[3, 4, 5, 6, 7, 8, 9]] * 4 + [[9]] * 2


@torch.no_grad()
def test_progress_counts_every_place_and_pair():
    for causal in (True, False):
        chunk, done = chunk_of(causal), []
        chunk_effects(chunk, logit, readout_of(chunk), 16, done.append)
        assert sum(done) == len(PLACES) * len(TEXTS) and max(done[1:]) <= 16


def test_only_what_the_places_name_is_cached():
    chunk = chunk_of(True, (Site("mlp", 2), Site("resid", 3)))
    assert set(chunk.source) == {"blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"}
    layer_2 = {"blocks.2.hook_resid_pre", "blocks.2.attn.hook_k", "blocks.2.attn.hook_v"}
    assert set(chunk.run) == layer_2 | {"blocks.2.hook_resid_post"}


def test_chunks_are_cut_to_their_own_longest_text():
    chunk = chunk_of(True, index=torch.tensor([2]))
    assert chunk.positions.shape[-1] == 3
    assert all(value.shape[1] == 3 for name, value in chunk.source.items() if not name.endswith("pattern"))
    assert all(value.shape[2:] == (3, 3) for name, value in chunk.source.items() if name.endswith("pattern"))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), max_size=400).map(sorted), st.integers(1, 300))
def test_groups_hold_every_row_once_and_mix_lengths_only_while_tiny(lengths, rows):
    groups = list(_groups(lengths, rows))
    assert [row for group in groups for row in range(len(lengths))[group]] == list(range(len(lengths)))
    for group in groups:
        held = lengths[group]
        assert 0 < len(held) <= rows
        for number in range(1, len(held)):
            assert held[number] == held[number - 1] or number * held[number - 1] < WORTH_A_FORWARD


def test_a_group_ends_where_a_longer_row_comes_after_64_positions_of_its_own():
    ends = lambda lengths, rows: [group.stop for group in _groups(lengths, rows)]
    assert ends([2] * 40 + [3] * 10 + [4], 100) == [40, 51]
    assert ends([2] * 31 + [3] * 22 + [4], 100) == [53, 54]
    assert ends([2] * 32 + [3] * 22 + [4], 100) == [32, 54, 55]
    assert ends([64, 65, 65, 65, 66], 2) == [1, 3, 4, 5]
