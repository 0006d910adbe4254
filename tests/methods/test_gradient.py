"""gradient_effects against finite differences, against autograd on open_clip's blocks written out by hand, and against
TransformerLens' own edge attribution. Nothing here uses the package's gradients but what is tested."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from handmade import NAMES, handmade
from oracle import TOWERS, Text, agree, bare, batch_of, forward, tower
from towers import random_encoder, random_store

from clip_lens.core import rows as running
from clip_lens.core.metric import cosine, kl, logit, metric
from clip_lens.core.source import counterpart, mean, noise, resample, zeros
from clip_lens.core.via import via
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.methods.circuits.selection import top_edges
from clip_lens.methods.gradient import gradient_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import LAYOUTS, NO_LAYER, Edge, Site, at_slot, hook_name

EMBED, OUT = Site("embed"), Site("out")
SLOTS = ("negator", "eot", 2)
BOTH = pytest.mark.parametrize("name", ["causal", "bidirectional"])


# By hand


def cosine_by_hand(text):
    other = forward(text.clip, text.other_tokens)
    return lambda u: u @ other


def kl_by_hand(bank):
    def metric_of(text):
        own, others = forward(text.clip, text.tokens) @ text.direction, bank @ text.direction
        p = torch.cat([own[None], others]).softmax(0)
        return lambda u: (p * (p.log() - torch.cat([(u @ text.direction)[None], others]).log_softmax(0))).sum()

    return metric_of


def logit_by_hand(text):
    return lambda u: u @ text.direction


@cache
def texts(name, run="caption"):
    batch = batch_of(name, None, run)
    if name == "causal":  # nothing reads what lies behind the end of text
        width = int(torch.maximum(batch.length, batch.other_length).max())
        parts = ("tokens", "other", "origin", "slot", "other_slot")
        batch = replace(batch, **{part: getattr(batch, part)[:, :width] for part in parts})
    found = [Text(tower(name)[0], batch, pair) for pair in range(len(batch))]
    for text, other in zip(found, batch.other, strict=True):
        text.other_tokens = other
    return found


def changes(text):
    """What every component of the counterpart gives, minus the run's; 0 where there is none."""
    return {site: (value - text.run[site]).nan_to_num(0) for site, value in text.counterpart().items()}


def by_receiver(text, edges, changes):
    """For each receiver its edges' numbers and what they would carry, edge pos d_model."""
    found = {}
    for number, edge in enumerate(edges):
        mask = torch.zeros(len(text.tokens), 1, dtype=torch.float64)
        mask[text.where(edge.receiver.slot)] = 1
        found.setdefault(bare(edge.receiver), []).append((number, mask * changes[edge.sender]))
    return {site: ([n for n, _ in some], torch.stack([carried for _, carried in some])) for site, some in found.items()}


def shifted(text, weights, carried, embedding=None):
    """The embedding of the run in which every edge is patched by its weight, and that may start elsewhere."""

    def gives(site, value):
        return value if embedding is None or site != EMBED else embedding

    def reads(site, x):
        if site not in carried:
            return x
        numbers, shifts = carried[site]
        return x + torch.einsum("e,epd->pd", weights[numbers], shifts)

    return forward(text.clip, text.tokens, gives, reads)


def by_hand(text, edges, steps=1, metric_of=logit_by_hand):
    """The definition: the mean over the line of embeddings of the derivative by each edge's weight, at weight 0."""
    change, metric = changes(text), metric_of(text)
    carried, total = by_receiver(text, edges, change), 0
    for k in range(1, steps + 1):
        weights = torch.zeros(len(edges), dtype=torch.float64, requires_grad=True)
        embedding = text.run[EMBED] + (1 - k / steps) * change[EMBED]
        total = total + torch.autograd.grad(metric(shifted(text, weights, carried, embedding)), weights)[0]
    has = torch.tensor([text.has(text.counterpart(), edge) for edge in edges])
    return torch.where(has, total / steps, torch.nan).tolist()


def columns(lines):
    return [list(line) for line in zip(*lines, strict=True)]


# Edges


@BOTH
def test_eap_is_the_central_finite_difference_of_every_edges_weight(name):
    encoder, h = tower(name)[1], 1e-4
    pair, edges = (
        (5, encoder.edges()) if name == "causal" else (1, encoder.edges()[::2])
    )  # unequal length, equal length
    text, slopes = texts(name)[pair], []
    carried = by_receiver(text, edges, changes(text))
    for nudge in h * torch.eye(len(edges), dtype=torch.float64):
        ahead, behind = (shifted(text, weights, carried) @ text.direction for weights in (nudge, -nudge))
        slopes.append(float(ahead - behind) / (2 * h))
    found = gradient_effects(encoder, batch_of(name)[[pair]], edges).values[:, 0]
    expected = torch.tensor(slopes, dtype=torch.float64)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max() > 0


@pytest.mark.parametrize(("name", "steps"), [("causal", 1), *zip(TOWERS, (5, 3, 2), strict=True)])
def test_eap_ig_is_its_definition(name, steps):
    """Pairs of equal and unequal length, the whole receiver and slots of it."""
    encoder = tower(name)[1]
    every = encoder.edges()
    edges = every + [at_slot(edge, slot) for slot in SLOTS for edge in every[::9] if edge.receiver != OUT]
    run = "foil" if steps == 2 else "caption"
    expected = columns([by_hand(text, edges, steps) for text in texts(name, run)])
    agree(gradient_effects(encoder, batch_of(name, None, run), edges, steps=steps), expected)


@BOTH
def test_in_float32(name):
    encoder = tower(name, torch.float32)[1]
    edges = encoder.edges()[::2]
    expected = columns([by_hand(text, edges, 2) for text in texts(name)])
    agree(gradient_effects(encoder, batch_of(name, dtype=torch.float32), edges, steps=2), expected, 2e-5)


@pytest.mark.parametrize("metric", ["cosine", "kl"])
@BOTH
def test_other_metrics_go_through_autograd(name, metric):
    encoder = tower(name)[1]
    bank = torch.nn.functional.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(3)).double(), dim=1)
    ours, theirs = {"cosine": (cosine, cosine_by_hand), "kl": (kl(bank), kl_by_hand(bank))}[metric]
    edges = encoder.edges()[::3]
    expected = columns([by_hand(text, edges, 2, theirs) for text in texts(name)])
    effects = gradient_effects(encoder, batch_of(name), edges, steps=2, metric=ours)
    assert effects.values.nan_to_num().abs().max() > 1e-3
    agree(effects, expected)


def test_kl_has_no_gradient_at_the_run():
    encoder, bank = tower("causal")[1], torch.eye(16, dtype=torch.float64)[:4]
    values = gradient_effects(encoder, batch_of("causal"), encoder.edges(), metric=kl(bank)).values
    assert values.nan_to_num().abs().max() < 1e-12


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_integrated_gradients_along_all_edges_sum_to_the_total(name):
    """All weights go from 0 to 1 together, senders live: at 1 every reader reads what it reads in the other run."""
    encoder, batch = tower(name)[1], batch_of(name, equal=True)
    edges = encoder.edges()
    effects = gradient_effects(encoder, batch, edges)
    points, quadrature = np.polynomial.legendre.leggauss(20)
    for pair, text in enumerate(texts(name)[: len(batch)]):
        total = 0.0
        for point, share in zip((points + 1) / 2, quadrature / 2, strict=True):
            weights = torch.full((len(edges),), point, dtype=torch.float64, requires_grad=True)
            moved = with_live_senders(text, edges, weights) @ text.direction
            total += share * float(torch.autograd.grad(moved, weights)[0].sum())
        assert abs(total - float(effects.total[pair])) <= 1e-6 * float(effects.total.abs().max())


def with_live_senders(text, edges, weights):
    source, live = text.counterpart(), {}

    def gives(site, value):
        live[site] = value
        return value

    def reads(site, x):
        mine = [number for number, edge in enumerate(edges) if edge.receiver == site]
        shifts = [(source[edges[number].sender] - live[edges[number].sender]).nan_to_num(0) for number in mine]
        return x + torch.einsum("e,epd->pd", weights[mine], torch.stack(shifts))

    return forward(text.clip, text.tokens, gives, reads)


def test_eap_is_transformer_lens_edge_attribution():
    from transformer_lens.tools.analysis import attribution_patching as peer

    encoder = random_encoder(layers=2, width=32, heads=4, d_embed=16, dtype=torch.float64)
    pairs = Pairs(range(2), ["There are no dogs.", "A red cube."], ["There are some dogs.", "A blue ball."], ["a", "b"])
    batch = align(pairs, random_store(pairs, 16), encoder, run="caption")
    found = gradient_effects(encoder, batch, encoder.edges()).values
    kinds = {"embed": "embed", "attn_head_out": "head", "mlp_out": "mlp", "mlp_in": "mlp", "logits": "out"}
    kinds |= {f"{kind}_input": kind for kind in "qkv"}

    def site(node):
        return Site(kinds[node.kind], 0 if node.kind in ("embed", "logits") else node.layer, node.head)

    for pair in range(2):
        run, other = encoder.cut(batch.tokens[[pair]]), encoder.cut(batch.other[[pair]])
        metric = lambda y, pair=pair, run=run: encoder.read(y, encoder.pool(run))[0] @ batch.direction[pair]
        config = peer.EdgeAttributionConfig(granularity="edge")
        scores = peer.attribution_patch(encoder.tower, other, run, metric, config).edge_scores
        expected = dict.fromkeys(encoder.edges(), 0.0)
        for (writer, reader), score in scores.items():
            expected[Edge(site(writer), site(reader))] += score
        theirs = torch.tensor(list(expected.values()), dtype=torch.float64)
        assert (found[:, pair] - theirs).abs().max() <= 1e-10 * theirs.abs().max()


# Sites


def nudged(encoder, batch, site, weight, source=counterpart):
    """metric of the run that reads, at a site, so much of the source, through one plain hook."""
    name, layout = hook_name(site, encoder.n_layers), LAYOUTS[site.kind]
    given_there = source(encoder, batch)(torch.arange(len(batch)), [name])[name]

    def blend(value, hook):
        there = given_there[tuple(slice(size) for size in value.shape)]
        change = (there - value).nan_to_num(0)
        mask = torch.zeros(len(batch), value.shape[layout.pos_axis])
        for pair in range(len(batch)):
            slots = [batch.slots[slot] if slot >= 0 else None for slot in batch.slot[pair].tolist()]
            where = [p for p in range(int(batch.length[pair])) if site.slot in (None, p, slots[p])]
            mask[pair, where] = 1
        shape = [1] * value.ndim
        shape[0], shape[layout.pos_axis] = mask.shape
        change = change * mask.reshape(shape)
        if site.unit is not None:
            unit = torch.arange(value.shape[layout.unit_axis]) == site.unit
            shape = [1] * value.ndim
            shape[layout.unit_axis] = len(unit)
            change = change * unit.reshape(shape)
        return value + weight * change

    return logit_of(encoder(batch.tokens, hooks=[(name, blend)]), batch)


def logit_of(u, batch):
    return (u * batch.direction).sum(1)


def sites(encoder):
    whole = [Site(kind, layer) for kind in LAYOUTS for layer in ((0,) if kind in NO_LAYER else range(encoder.n_layers))]
    kinds = [kind for kind, layout in LAYOUTS.items() if layout.unit_axis is not None]
    units = [Site(kind, 1, 2, slot) for kind in kinds for slot in (None, 2)]
    return [*whole, *units, Site("resid", 3), *(at_slot(site, slot) for slot in SLOTS for site in whole[::2])]


@pytest.mark.parametrize("source", [counterpart, zeros, noise(0.3)], ids=["counterpart", "zeros", "noise"])
@pytest.mark.parametrize("name", TOWERS)
def test_sites_are_finite_differences(name, source):
    encoder, batch = tower(name)[1], batch_of(name)
    places, h = sites(encoder), 1e-5
    effects = gradient_effects(encoder, batch, places, source=source)
    slopes = [(nudged(encoder, batch, p, h, source) - nudged(encoder, batch, p, -h, source)) / (2 * h) for p in places]
    expected = torch.stack(slopes)
    assert expected.abs().max() > 1e-2
    difference = (effects.values - expected).nan_to_num(0).abs().amax(1) / expected.abs().max()
    assert difference.max() <= 1e-6, (str(places[int(difference.argmax())]), float(difference.max()))
    assert (expected[effects.values.isnan()] == 0).all()


@BOTH
def test_sites_along_the_line_of_embeddings(name):
    """The gradient at a q is that of the run started from each embedding; the difference stays that of the two runs."""
    _, encoder = tower(name)
    places = [Site("q", 1, 2), Site("mlp", 1), Site("head", 0, 1, "eot")]
    expected = []
    for text in texts(name):
        change, line = changes(text), []
        for place in places:
            total = 0.0
            for k in (1, 2, 3):
                weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
                start = text.run[EMBED] + (1 - k / 3) * change[EMBED]
                mask = torch.zeros(len(start), 1, dtype=torch.float64)
                mask[text.where(place.slot)] = 1

                def gives(site, value, place=place, weight=weight, start=start, mask=mask, change=change):
                    value = start if site == EMBED else value
                    return value + weight * mask * change[site] if site == bare(place) else value

                moved = forward(text.clip, text.tokens, gives) @ text.direction
                total += float(torch.autograd.grad(moved, weight)[0]) / 3
            line.append(total if text.has(text.counterpart(), place) else float("nan"))
        expected.append(line)
    agree(gradient_effects(encoder, batch_of(name), places, steps=3), columns(expected))


# Sums


@BOTH
def test_a_tuple_is_the_sum_of_its_members_and_what_they_share_counts_once(name):
    encoder, batch = tower(name)[1], batch_of(name)
    edge, head = Edge(EMBED, Site("mlp", 1)), Site("head", 1)
    heads = [Site("head", 1, unit) for unit in range(4)]
    single = [edge, Edge(Site("head", 0, 1), Site("q", 2, 1)), head, Site("resid", 2, slot="eot"), *heads]
    alone = gradient_effects(encoder, batch, single, steps=2).values
    sums = {
        tuple(single[:4]): alone[:4].nansum(0),
        (edge, at_slot(edge, "eot"), at_slot(edge, 2)): alone[0],
        tuple(heads): alone[2],
        (head, heads[0]): alone[2],
        (heads[3], at_slot(head, "eot"), head): alone[2],
        Edge(Site("head", 0), Site("v", 2)): None,
    }
    found = gradient_effects(encoder, batch, list(sums), steps=2).values
    every = encoder.edges(senders=[Site("head", 0)], receivers=[Site("v", 2)])
    *expected, _ = sums.values()
    expected = torch.stack([*expected, gradient_effects(encoder, batch, every, steps=2).values.sum(0)])
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    partly = (heads[0], at_slot(head, "eot"))
    parts = [heads[0], *(at_slot(one, "eot") for one in heads[1:])]
    found, *parts = gradient_effects(encoder, batch, [partly, *parts]).values
    assert torch.allclose(found, torch.stack(parts).sum(0), rtol=0, atol=1e-12)


@BOTH
def test_a_sender_is_all_its_outgoing_edges(name):
    encoder, batch = tower(name)[1], batch_of(name, equal=True)
    for site in (EMBED, Site("head", 1, 2), Site("mlp", 0)):
        found, *parts = gradient_effects(encoder, batch, [site, *encoder.edges(senders=[site])], steps=2).values
        assert torch.allclose(found, torch.stack(parts).sum(0), rtol=0, atol=1e-10)


# What does not matter


@pytest.mark.parametrize("steps", [1, 3])
@BOTH
def test_chunks_change_nothing(name, steps, monkeypatch):
    encoder, batch = tower(name)[1], batch_of(name)
    places = [*encoder.edges()[::3], *sites(encoder)]
    whole = gradient_effects(encoder, batch, places, steps=steps)
    for rows in (1, 3):
        parts = gradient_effects(encoder, batch, places, steps=steps, rows=rows)
        for field in ("values", "total", "baseline"):
            found, expected = getattr(parts, field), getattr(whole, field)
            assert torch.allclose(found, expected, rtol=0, atol=1e-11, equal_nan=True)
    monkeypatch.setattr(running, "SENT_AT_ONCE", 1)
    one_by_one = gradient_effects(encoder, batch, places, steps=steps).values
    assert torch.allclose(one_by_one, whole.values, rtol=0, atol=1e-11, equal_nan=True)


def test_modes_of_the_caller_change_nothing():
    encoder, batch = tower("causal")[1], batch_of("causal")
    places = encoder.edges()[::20]
    expected = gradient_effects(encoder, batch, places, steps=2).values
    with torch.inference_mode():
        inside = gradient_effects(encoder, batch.along(batch.direction), places, steps=2).values
    with torch.no_grad():
        assert torch.equal(gradient_effects(encoder, batch, places, steps=2).values, expected)
    assert torch.equal(inside, expected) and not inside.is_inference()
    assert not any(parameter.requires_grad for parameter in encoder.tower.parameters())


@pytest.mark.parametrize(
    "source",
    [counterpart, zeros, mean, noise(0.2), resample(1), via(Site("head", 0, 1, "negator"))],
    ids=["counterpart", "zeros", "mean", "noise", "resample", "via"],
)
@BOTH
def test_total_baseline_pairs_and_nan_are_those_of_patch_effects(name, source):
    encoder, batch = tower(name)[1], batch_of(name)
    places = [*encoder.edges()[::5], *(site for site in sites(encoder) if site.kind != "pattern" or source is not mean)]
    places += [at_slot(edge, slot) for slot in SLOTS for edge in encoder.edges()[::40] if edge.receiver != OUT]
    places += [(Site("mlp", 1, slot="negator"), Site("mlp", 2, slot=3)), (Site("q", 1, 2, "subject"), Edge(EMBED, OUT))]
    exact = patch_effects(encoder, batch, places, source=source)
    for steps in (1, 2):
        found = gradient_effects(encoder, batch, places, source=source, steps=steps)
        assert torch.equal(found.values.isnan(), exact.values.isnan())
        assert torch.allclose(found.total, exact.total, rtol=0, atol=1e-12, equal_nan=True)
        assert torch.allclose(found.baseline, exact.baseline, rtol=0, atol=1e-12)
        assert found.pairs.drop(columns="d").equals(exact.pairs.drop(columns="d")) and found.places == exact.places
        changed = {name for name in found.meta if found.meta[name] != exact.meta.get(name)}
        assert changed == {"method", "steps", "rule", "gradient", "difference"}


@BOTH
def test_small_differences_have_effects_that_are_their_attributions(name):
    encoder, batch = tower(name)[1], batch_of(name)
    small = noise(1e-5)
    places = [*encoder.edges()[::4], *(site for site in sites(encoder) if site.kind != "pattern")]
    exact, linear = (
        method(encoder, batch, places, source=small).values for method in (patch_effects, gradient_effects)
    )
    assert torch.equal(exact.isnan(), linear.isnan())
    assert (exact - linear).nan_to_num().abs().max() <= 1e-3 * exact.nan_to_num().abs().max()


@BOTH
def test_the_line_ends_at_the_embedding_that_the_source_gives(name):
    """Of a source whose embedding is the run's own the line is a point: EAP-IG is EAP. Of zeros it is not."""
    encoder, batch = tower(name)[1], batch_of(name)
    edges = encoder.edges(senders=[Site("mlp", 0), Site("head", 1)])
    own = via(Site("mlp", 0))
    for source, same in ((own, True), (zeros, False)):
        one, four = (gradient_effects(encoder, batch, edges, source=source, steps=steps).values for steps in (1, 4))
        assert torch.allclose(one, four, rtol=0, atol=1e-12, equal_nan=True) == same


# Results and errors


def test_the_result_says_what_it_is():
    encoder, batch = tower("causal")[1], batch_of("causal")
    edge, site = Edge(EMBED, OUT), Site("mlp", 1)
    for places, steps, method in (
        ([edge], 1, "EAP"),
        ([edge], 5, "EAP-IG"),
        ([site], 1, "attribution patching"),
        ([site], 2, "attribution patching"),
        ([(site, edge)], 1, "attribution patching and EAP"),
    ):
        record = gradient_effects(encoder, batch, places, steps=steps).record
        meta = record.as_text()
        assert record.settings["steps"] == steps and record.method.estimates
        assert meta["method"] == method and meta["difference"] == "source minus run, both unpatched"
        line = f"mean over the input embeddings other + k/{steps} (run - other), k = 1..{steps}"
        assert meta["gradient"] == ("at the run" if steps == 1 else line)


def test_errors():
    encoder, batch = tower("causal")[1], batch_of("causal")
    place = [Site("mlp", 1)]
    for options, message in {
        (("steps", 0),): "steps=0",
        (("steps", 2.5),): "steps=2.5",
        (("rows", 0),): "rows=0",
        (("metric", metric(lambda u, readout: logit(u.detach(), readout), oriented=True)),): "no gradient",
        (("metric", metric(lambda u, readout: u.sum(), oriented=True)),): "one number per row",
    }.items():
        with pytest.raises(ValueError, match=message):
            gradient_effects(encoder, batch, place, **dict(options))
    for places, message in (
        ([], "no places"),
        ([Site("mlp", 3)], "layers 0..2"),
        ([OUT], "is no site"),
        ([()], "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient_effects(encoder, batch, places)
    with torch.inference_mode():
        loaded = random_encoder(layers=1, width=16, heads=2, d_embed=16, dtype=torch.float64)
    with pytest.raises(ValueError, match="loaded in torch"):
        gradient_effects(loaded, batch, place)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_on_towers_written_by_hand_the_strongest_edges_are_theirs(name, steps):
    """Those that do nothing when they are patched may still have a slope (a feature on its way through a LayerNorm),
    but none as large as the circuit's; along the line the signs are right as well."""
    tower = handmade(name)
    effects = gradient_effects(tower.encoder, tower.batch, tower.encoder.edges(), steps=steps)
    circuit = top_edges(effects, len(tower.edges))
    assert set(circuit.edges()) == tower.edges
    if steps > 1:
        scores = dict(zip(effects.places, effects.signed().mean(1).tolist(), strict=True))
        assert {edge for edge in tower.edges if scores[edge] < 0} == tower.negative
