"""Places are values: addresses that exist, names, labels."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from towers import random_encoder

from clip_lens.model.site import KINDS, LAYOUTS, PARTS, Site, hook_name, index_rows, label, members, start_layer


def test_every_kind_names_a_hook_whose_axes_are_its_layout() -> None:
    encoder = random_encoder(layers=2, heads=4, width=64)
    tokens = encoder.tokenize(["a cat", "no dog is here"])
    n_pos = encoder.cut(tokens).shape[1]
    units = {"head": 4, "q": 4, "k": 4, "v": 4, "pattern": 4, "neuron": 256, "result": 4}
    assert set(KINDS) == {*LAYOUTS, "out", *PARTS}
    for kind in LAYOUTS:
        name = hook_name(Site(kind), encoder.n_layers)
        value = encoder.cache(tokens, names=[name])[name]
        layout = LAYOUTS[kind]
        assert value.shape[0] == 2
        assert value.shape[layout.pos_axis] == n_pos
        assert (layout.unit_axis is not None) == (kind in units)
        if layout.unit_axis is not None:
            assert value.shape[layout.unit_axis] == units[kind]


def test_the_last_residual_stream_leaves_the_last_block() -> None:
    names = [hook_name(Site("resid", layer), 2) for layer in range(3)]
    assert names == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    assert hook_name(Site("embed"), 2) == names[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "heads"}, "no kind of site 'heads'.*; there are embed, resid"),
        ({"kind": "resid", "unit": 1}, "has no units, got unit=1"),
        ({"kind": "embed", "layer": 2}, r"Site\('resid', 2\)"),
        ({"kind": "head", "layer": -1}, "layer counts from 0, got -1"),
        ({"kind": "head", "unit": -2}, "unit counts from 0"),
        ({"kind": "head", "slot": -3}, "slot counts from 0"),
    ],
)
def test_impossible_sites(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Site(**arguments)


def test_sites_are_values() -> None:
    site = Site("head", 1, 2, "negator")
    assert {site: 1}[Site("head", 1, 2, "negator")] == 1
    with pytest.raises(FrozenInstanceError):
        site.layer = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Site("embed"), "embed"),
        (Site("embed", slot="negator"), "embed @negator"),
        (Site("resid", 12, slot=3), "resid 12 @3"),
        (Site("head", 0, 0), "head 0.0"),
        ((Site("mlp", 1), Site("head", 2, 7, "eot")), "mlp 1 + head 2.7 @eot"),
    ],
)
def test_labels(place: Any, text: str) -> None:
    assert label(place) == text


def test_a_tuple_is_patched_together() -> None:
    pair = (Site("mlp", 4, slot="a"), Site("head", 2, 3, "a"))
    assert members(pair) == pair
    assert start_layer(pair, 12) == 2
    assert start_layer(Site("resid", 12), 12) == 12
    (row,) = index_rows([pair])
    nothing = dict.fromkeys(("kind", "layer", "unit", "sender", "receiver"))
    assert row == {"place": "mlp 4 @a + head 2.3 @a", "slot": "a", **nothing}
