"""The hooks of core.sites: each row reads the source at its own place, and nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from towers import random_encoder, random_store

from clip_lens.core.address import address
from clip_lens.core.sites import patch_hooks, present
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.model.site import LAYOUTS, NO_LAYER, Site, hook_name, members

PAIRS, HEADS, WIDTH, POSITIONS = 3, 2, 16, 7
SHAPES = {
    **dict.fromkeys(("embed", "resid", "mid", "attn", "mlp", "norm"), (PAIRS, POSITIONS, WIDTH)),
    **dict.fromkeys(("head", "q", "k", "v"), (PAIRS, POSITIONS, HEADS, WIDTH // HEADS)),
    "pattern": (PAIRS, HEADS, POSITIONS, POSITIONS),
    "neuron": (PAIRS, POSITIONS, 4 * WIDTH),
    "result": (PAIRS, POSITIONS, HEADS, WIDTH),
    "projection": (PAIRS, POSITIONS, 8),
}
SITES = [
    Site(kind, layer, unit, slot)
    for kind in LAYOUTS
    for layer in ((0,) if kind in NO_LAYER else (0, 2) if kind == "resid" else (1,))
    for unit in ((None,) if LAYOUTS[kind].unit_axis is None else (None, 0, 1))
    for slot in (None, "subject", 4)
]


@pytest.fixture(scope="module")
def encoder():
    return random_encoder(layers=2, width=WIDTH, heads=HEADS, d_embed=8)


@pytest.fixture(scope="module")
def batch(encoder):
    texts = [("no red dogs here", "red dogs"), ("There is a dog.", "There is no dog."), ("dogs", "no dogs")]
    pairs = Pairs("abc", *zip(*texts, strict=True), ["a.png", "b.png", "c.png"])
    return align(pairs, random_store(pairs, 8), encoder, run="caption")


def test_addresses_name_hook_unit_and_slot_of_every_site(encoder, batch):
    places = (Site("resid", 2, slot="eot"), (Site("head", 1, 1), Site("mlp", 0, slot=4)), Site("head", 1, 0, 4))
    found = address(places, encoder, batch)
    resid, head, mlp = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"
    assert set(found.hooks) == {resid, head, mlp}
    row, columns = found.sites.rows(torch.arange(3))
    hook, unit, slot = columns.unbind(1)
    assert row.tolist() == [0, 1, 1, 2]
    assert [found.hooks[number] for number in hook] == [resid, head, mlp, head]
    assert unit.tolist() == [-1, 1, -1, 0]
    assert [found.slots[number] for number in slot] == ["eot", None, 4, 4]
    assert found.start.tolist() == [2, 0, 1]
    assert [found.kinds[number] for number in hook] == ["resid", "head", "mlp", "head"]
    assert found.sites.rows(torch.tensor([2, 0]))[1].tolist() == [columns[3].tolist(), columns[0].tolist()]


def test_slot_positions_are_inside_the_text(encoder, batch):
    whole, sot, beyond = map(batch.where, (None, "sot", 5))
    assert whole.sum(1).tolist() == batch.length.tolist() == [6, 7, 3]
    assert sot.nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
    assert beyond.nonzero().tolist() == [[0, 5], [1, 5]]


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_present_is_where_not_everything_is_nan(kind):
    value = torch.zeros(SHAPES[kind])
    value.movedim(LAYOUTS[kind].pos_axis, 1)[1, 3] = float("nan")
    value.movedim(LAYOUTS[kind].pos_axis, 1)[2, 5, 0] = float("nan")
    assert (~present(kind, value)).nonzero().tolist() == [[1, 3]]


def by_hand(site, current, value, batch, pair, at):
    """One row patched element by element."""
    units = range(HEADS if site.kind != "neuron" else 4 * WIDTH)
    for column, p in enumerate(at):
        named = site.slot is None or site.slot == p or batch.slots[batch.slot[pair, p]] == site.slot
        if p >= batch.length[pair] or not named or (batch.slot[pair, p] < 0 and isinstance(site.slot, str)):
            continue
        for unit in units if LAYOUTS[site.kind].unit_axis is not None else [0]:
            if site.unit is not None and unit != site.unit:
                continue
            if site.kind == "pattern":
                old, new = current[unit, column], value[unit, p]
            elif LAYOUTS[site.kind].unit_axis is not None:
                old, new = current[column, unit], value[p, unit]
            else:
                old, new = current[column], value[p]
            old.copy_(torch.where(new.isnan(), old, new))


rows = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(SITES), st.lists(st.sampled_from(SITES), min_size=2, max_size=3).map(tuple)),
        st.integers(0, PAIRS - 1),
        st.integers(0, POSITIONS - 3),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(rows=rows, seed=st.integers(0, 99))
def test_hooks_patch_each_row_at_its_own_place(encoder, batch, rows, seed):
    """Random places, pairs and windows of positions as rows of one activation, against copying element by element."""
    generator = torch.Generator().manual_seed(seed)
    places, pairs, starts = zip(*rows, strict=True)
    found = address(places, encoder, batch)
    source, current = {}, {}
    at = torch.tensor(starts)[:, None] + torch.arange(3)
    for name, kind in zip(found.hooks, found.kinds, strict=True):
        source[name] = torch.randn(SHAPES[kind], generator=generator)
        source[name].movedim(LAYOUTS[kind].pos_axis, 1)[1, 4] = float("nan")
        shape = list(SHAPES[kind])
        shape[0], shape[LAYOUTS[kind].pos_axis] = len(rows), 3
        current[name] = torch.randn(shape, generator=generator)
    result, untouched = dict(current), {name: value.clone() for name, value in current.items()}
    positions = torch.stack([batch.where(slot) for slot in found.slots])
    hooks = patch_hooks(found, source, positions, torch.arange(len(rows)), torch.tensor(pairs), lambda name: at)
    for name, patch in hooks:
        result[name] = patch(result[name], hook=None)
    expected = {name: value.clone() for name, value in untouched.items()}
    for row, place in enumerate(places):
        for site in members(place):
            name = hook_name(site, encoder.n_layers)
            by_hand(site, expected[name][row], source[name][pairs[row]], batch, pairs[row], at[row].tolist())
    for name in current:
        assert torch.equal(result[name], expected[name]), name
        assert torch.equal(current[name], untouched[name]), "a hook changed a tensor in place"


class Asked:
    """Units that can be asked for, but not listed; counts how often they are."""

    times = 0

    def __contains__(self, unit):
        self.times += 1
        return 0 <= unit < 4 * WIDTH


def test_a_unit_is_checked_once_without_a_list_of_all_units(encoder, batch, monkeypatch):
    """As many places as a large tower has neurons, 300 for each of 64."""
    asked = Asked()
    monkeypatch.setattr(type(encoder), "units", lambda self, kind: asked)
    found = address([Site("neuron", 1, unit) for unit in range(64)] * 300, encoder, batch)
    assert found.sites.columns[:, 1].tolist() == [*range(64)] * 300
    assert asked.times == 64


def test_a_part_of_a_sum_cannot_be_patched() -> None:
    encoder = random_encoder()
    pairs = Pairs(["a"], ["There are no dogs."], ["There are some dogs."], ["1.jpg"])
    batch = align(pairs, random_store(pairs, encoder.d_embed), encoder)
    with pytest.raises(ValueError, match="constant is a part of a sum"):
        address([Site("constant")], encoder, batch)
