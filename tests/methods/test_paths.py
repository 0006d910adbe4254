"""path_effects against two runs of open_clip's blocks by hand: direct, and through MLPs with attention frozen."""

import pytest
import torch
from oracle import NAN, agree, batch_of, texts_of, tower

from clip_lens.core.metric import cosine
from clip_lens.core.source import zeros
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.paths import path_effects
from clip_lens.model.site import Edge, Site, members, precedes

SENDERS = [Site("embed"), Site("head", 0, 1), Site("mlp", 0), Site("head", 1, 3), Site("mlp", 1)]
RECEIVERS = [
    *(Site(kind, 2, 2) for kind in "qkv"),
    Site("q", 1, 0),
    Site("v", 2, 0, "eot"),
    Site("k", 1, 1, "negator"),
    Site("mlp", 1),
    Site("mlp", 2, slot="subject"),
    Site("out"),
]


def by_hand(texts, places, *, mlps=False):
    """An edge whose receiver has no token with a counterpart is NaN."""

    return [
        [
            text.path({e.sender for e in members(place)}, {e.receiver for e in members(place)}, mlps=mlps)
            if any(text.has(text.counterpart(), e) for e in members(place))
            else NAN
            for text in texts
        ]
        for place in places
    ]


@pytest.mark.parametrize("through", ["direct", "mlp"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_paths_are_two_runs_by_hand(name, equal, through):
    effects = path_effects(tower(name)[1], batch_of(name, equal), SENDERS, RECEIVERS, through=through, rows=30)
    paths = [(s, r) for r in RECEIVERS for s in SENDERS if precedes(s, r)]
    assert effects.places == tuple(Edge(s, r) for s, r in paths)
    expected = by_hand(texts_of(name, equal), effects.places, mlps=through == "mlp")
    agree(effects, expected)


def test_the_two_differ_where_an_mlp_lies_between_and_only_there():
    _, encoder = tower("causal")
    batch = batch_of("causal")
    ends = [Site("head", 0, 1)], [Site("mlp", 0), Site("q", 1, 0), Site("out")]
    direct, through = (path_effects(encoder, batch, *ends, through=how).values for how in ("direct", "mlp"))
    assert torch.allclose(direct[0], through[0], rtol=0, atol=1e-11)
    assert ((direct - through)[1:].abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("through", ["direct", "mlp"])
@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_joint_sets_are_patched_together(name, through):
    senders = [(Site("head", 0, 1), Site("head", 0, 2)), Site("embed")]
    receivers = [(Site("q", 1, 0), Site("v", 1, 0)), (Site("k", 2, 1), Site("k", 2, 2))]
    effects = path_effects(tower(name)[1], batch_of(name), senders, receivers, through=through)
    assert [len(place) for place in effects.places] == [4, 2, 4, 2]
    agree(effects, by_hand(texts_of(name), effects.places, mlps=through == "mlp"))


def test_a_joint_set_of_the_output_and_a_head():
    """The output reads what arrives directly, and what the head with a patched query gives now."""
    _, encoder = tower("causal")
    arguments = encoder, batch_of("causal"), SENDERS[1:3], [(Site("q", 2, 0), Site("out"))]
    effects = path_effects(*arguments)
    agree(effects, [[text.effect(place) for text in texts_of("causal")] for place in effects.places])
    with pytest.raises(ValueError, match="can't be joined"):
        path_effects(*arguments, through="mlp")


def test_direct_is_the_edges_and_says_so():
    _, encoder = tower("causal")
    batch = batch_of("causal")
    effects = path_effects(encoder, batch, SENDERS, RECEIVERS, source=zeros, metric=cosine)
    edges = patch_effects(encoder, batch, effects.places, source=zeros, metric=cosine)
    assert torch.equal(effects.values.isnan(), edges.values.isnan())
    assert torch.equal(effects.values.nan_to_num(), edges.values.nan_to_num())
    assert effects.meta["method"] == "path patching, direct" and effects.record.source.name == "zeros"
    through = path_effects(encoder, batch, SENDERS, RECEIVERS, through="mlp", source=zeros, metric=cosine)
    assert through.meta["method"] == "path patching through MLPs, attention frozen"
    assert (through.record.source.name, through.record.metric.name) == ("zeros", "cosine")
    assert torch.allclose(through.total, effects.total, rtol=0, atol=1e-12)


def test_through_mlps_from_zeros_by_hand():
    effects = path_effects(
        tower("causal")[1], batch_of("causal", True), SENDERS, RECEIVERS[:3], through="mlp", source=zeros
    )
    expected = []
    for place in effects.places:
        line = []
        for text in texts_of("causal", True):
            nothing = {site: 0 * value for site, value in text.run.items()}
            line.append(text.path({place.sender}, {place.receiver}, mlps=True, source=nothing))
        expected.append(line)
    agree(effects, expected)


def test_what_is_no_path_is_left_out_or_an_error():
    _, encoder = tower("causal")
    batch = batch_of("causal")
    effects = path_effects(encoder, batch, [Site("head", 0, 1), Site("mlp", 2)], [Site("q", 1, 0), Site("out")])
    assert [str(place) for place in effects.places] == ["head 0.1 -> q 1.0", "head 0.1 -> out", "mlp 2 -> out"]
    with pytest.raises(ValueError, match="no path"):
        path_effects(encoder, batch, [Site("mlp", 2)], [Site("q", 1, 0)])
    with pytest.raises(ValueError, match="direct, mlp"):
        path_effects(encoder, batch, SENDERS, RECEIVERS, through="all")
    with pytest.raises(ValueError, match="send"):
        path_effects(encoder, batch, [Site("resid", 1)], [Site("out")])


# What runs


def whole_runs(encoder, monkeypatch):
    """Counts texts that run from their tokens on; rows that start at a block are none."""
    ran, forward = [], type(encoder.tower).forward

    def counting(tower, input, *args, start_at_layer=None, **kwargs):
        if start_at_layer is None:
            ran.append(len(tower._tokens(input)))
        return forward(tower, input, *args, start_at_layer=start_at_layer, **kwargs)

    monkeypatch.setattr(type(encoder.tower), "forward", counting)
    return ran


@pytest.mark.parametrize("rows", [256, 3])
def test_through_mlps_each_sender_of_a_pair_runs_once(rows, monkeypatch):
    encoder, batch = tower("causal")[1], batch_of("causal")
    ran = whole_runs(encoder, monkeypatch)
    senders = [sender for sender in SENDERS if isinstance(sender, Site)]
    path_effects(encoder, batch, senders, [Site("v", 2, 1), Site("mlp", 2), Site("out")], through="mlp", rows=rows)
    # Each pair once as it is and once as the other text, then once for each sender, whatever the receivers.
    assert sum(ran) == (2 + len(senders)) * len(batch)


def test_the_other_text_runs_once_for_source_and_readout(monkeypatch):
    encoder, batch = tower("causal")[1], batch_of("causal")
    ran = whole_runs(encoder, monkeypatch)
    found = patch_effects(encoder, batch, [Site("mlp", 1), Site("resid", 2, slot="eot")])
    assert sum(ran) == 2 * len(batch)
    run, other = encoder(batch.tokens), encoder(batch.other)
    expected = ((other - run) * batch.direction).sum(1)
    assert torch.allclose(found.total, expected, rtol=0, atol=1e-11)
    assert found.pairs.d.to_numpy() == pytest.approx((batch.sigma * expected).numpy(), abs=1e-11)


def test_of_a_source_that_is_not_the_other_text_the_readout_is_still_its(monkeypatch):
    encoder, batch = tower("causal")[1], batch_of("causal")
    found = patch_effects(encoder, batch, [Site("mlp", 1)], source=zeros, metric=cosine)
    run, other = encoder(batch.tokens), encoder(batch.other)
    assert torch.allclose(found.baseline, (run * other).sum(1), rtol=0, atol=1e-12)
