"""direct_effects and logit_lens: the parts sum to the whole, and each is what open_clip's own modules write."""

import math

import pytest
import torch
from oracle import TOWERS, agree, batch_of, given, pooled, tower
from torch import nn

import clip_lens
from clip_lens.core.address import address
from clip_lens.core.effects import Effects
from clip_lens.methods import direct, lens, reading
from clip_lens.methods.direct import UNALIGNED, UNNAMED, components, direct_effects
from clip_lens.methods.lens import logit_lens
from clip_lens.model.site import Edge, Site, members

NAN = float("nan")
BY = ("head", "neuron", "source", "layer", "sublayer")


class Hand:
    """One text: what every component writes at the pooled position, read by open_clip's LayerNorm and projection."""

    def __init__(self, clip, tokens, direction):
        self.text = getattr(clip, "text", clip)
        self.tokens, self.w = tokens, direction
        self.gives, self.e = given(clip, tokens), pooled(self.text, tokens)
        self.blocks = self.text.transformer.resblocks
        final = self.gives[Site("out")][self.e]
        self.std = (final.var(correction=0) + self.text.ln_final.eps).sqrt()
        y = self.projected(self.text.ln_final(final))
        self.norm, self.metric = y.norm(), float(y @ direction / y.norm())

    def projected(self, x, bias=True):
        projection = self.text.text_projection
        if not isinstance(projection, nn.Linear):
            return x @ projection
        return projection(x) if bias else x @ projection.weight.T

    def c(self, a):
        """Method, section 7, as it stands there."""
        read = self.text.ln_final.weight * (a - a.mean()) / self.std
        return float(self.projected(read, bias=False) @ self.w / self.norm)

    def constant(self):
        return float(self.projected(self.text.ln_final.bias) @ self.w / self.norm)

    def bias(self, layer, part):
        block = self.blocks[layer]
        return block.ls_1(block.attn.out_proj.bias) if part == "attn" else block.ls_2(block.mlp.c_proj.bias)

    def attn(self, layer):
        heads = self.blocks[layer].attn.num_heads
        return sum(self.gives[Site("head", layer, head)] for head in range(heads)) + self.bias(layer, "attn")

    def stream(self, layer):
        """What enters a block, at every position."""
        return self.gives[Site("embed")] + sum(self.attn(i) + self.gives[Site("mlp", i)] for i in range(layer))

    def neuron(self, layer, unit):
        block = self.blocks[layer]
        hidden = block.mlp.gelu(block.mlp.c_fc(block.ln_2(self.stream(layer) + self.attn(layer))))
        return block.ls_2(hidden[self.e, unit] * block.mlp.c_proj.weight[:, unit])

    def source(self, layer, head, position):
        """`A[e, p] v_p W_O` of one head."""
        block = self.blocks[layer]
        q, k, v = (self.gives[Site(kind, layer, head)] for kind in "qkv")
        scores = q[self.e] @ k.T / math.sqrt(q.shape[-1])
        if self.text.attn_mask is not None:
            scores = scores + self.text.attn_mask[self.e, : len(k)]
        out = block.attn.out_proj.weight.unflatten(1, (block.attn.num_heads, -1))[:, head]
        return block.ls_1(scores.softmax(-1)[position] * (out @ v[position]))

    def of(self, site, positions):
        """C of a site; NaN for a source slot without position."""
        kind, layer, unit = site.kind, site.layer, site.unit
        units = range(self.blocks[0].attn.num_heads) if unit is None else [unit]
        if kind == "constant":
            return self.constant()
        if kind == "v":
            return sum(self.c(self.source(layer, u, p)) for u in units for p in positions) if positions else NAN
        if kind == "head":
            return sum(self.c(self.gives[Site("head", layer, u)][self.e]) for u in units)
        written = {
            "token": lambda: self.text.token_embedding.weight[self.tokens[self.e]],
            "position": lambda: self.text.positional_embedding[self.e],
            "embed": lambda: self.gives[Site("embed")][self.e],
            "attn_bias": lambda: self.bias(layer, "attn"),
            "mlp_bias": lambda: self.bias(layer, "mlp"),
            "mlp": lambda: self.gives[Site("mlp", layer)][self.e],
            "attn": lambda: self.attn(layer)[self.e],
            "mid": lambda: (self.stream(layer) + self.attn(layer))[self.e],
            "resid": lambda: self.stream(layer)[self.e],
            "neuron": lambda: self.neuron(layer, unit),
        }
        return self.c(written[kind]())


def positions(batch, pair, slot, other):
    """The positions of a source slot in the run or in the other text, read off the batch by hand."""
    slots = (batch.other_slot if other else batch.slot)[pair].tolist()
    length = int((batch.other_length if other else batch.length)[pair])
    origin = batch.origin[pair].tolist()
    if slot is None:
        return list(range(length))
    if slot == UNALIGNED:
        return [p for p in range(length) if p not in origin] if other else []
    if slot == UNNAMED:
        return [p for p in range(length) if slots[p] == -1]
    if isinstance(slot, str):
        return [p for p in range(length) if slots[p] == batch.slots.index(slot)]
    if other:
        return [origin[slot]] if origin[slot] >= 0 else []
    return [slot] if slot < length else []


def by_hand(name, batch, places, contrast=True):
    clip, lines = tower(name)[0], []
    texts = [
        [Hand(clip, tokens[pair], batch.direction[pair]) for tokens in (batch.tokens, batch.other)]
        for pair in range(len(batch))
    ]
    for place in places:
        sites = [member.sender if isinstance(member, Edge) else member for member in members(place)]
        line = []
        for pair, hands in enumerate(texts):
            run, other = (
                torch.tensor(
                    [hand.of(site, positions(batch, pair, site.slot, number)) for site in sites], dtype=torch.float64
                )
                for number, hand in enumerate(hands)
            )
            parts = torch.cat([other, -run]) if contrast else run
            line.append(NAN if parts.isnan().all() else float(parts.nansum()))
        lines.append(line)
    return lines


KINDS = [
    Site("token"),
    Site("position"),
    Site("embed"),
    Site("constant"),
    *(Site("head", layer, head) for layer in range(3) for head in range(4)),
    *(Site(kind, layer) for kind in ("attn_bias", "mlp_bias", "mlp", "attn", "mid") for layer in range(3)),
    *(Site("resid", layer) for layer in range(4)),
    *(Site("neuron", layer, unit) for layer in (0, 2) for unit in (0, 77, 127)),
    Site("head", 1),
    (Site("head", 0, 1), Site("mlp", 2), Site("neuron", 1, 5), Site("constant")),
    Edge(Site("head", 0, 2), Site("out")),
    Edge(Site("embed"), Site("out")),
    (Edge(Site("mlp", 1), Site("out")), Site("token")),
]
SOURCES = [
    *(Site("v", 1, 2, slot) for slot in ("sot", "there", "negator", "subject_rest", "eot", "suffix", UNNAMED)),
    *(Site("v", 2, 0, slot) for slot in (0, 3, 4, 6, 9, UNALIGNED)),
    Site("v", 0, 1),
    Site("v", 2, slot="negator"),
    (Site("v", 2, 1, "negator"), Site("v", 0, 1, "suffix"), Site("mlp", 0)),
    (Site("v", 2, 1, "suffix"), Site("v", 0, 1, "suffix")),
]


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", TOWERS)
def test_every_component_is_what_open_clips_modules_write(name, equal):
    batch = batch_of(name, equal)
    effects = direct_effects(tower(name)[1], batch, KINDS)
    agree(effects, by_hand(name, batch, KINDS))


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", TOWERS)
def test_source_slots_are_the_terms_of_the_attention(name, equal):
    """0 from a text that lacks the slot, NaN where both do; tokens of no slot and of no counterpart are places too."""
    batch = batch_of(name, equal)
    places = SOURCES if batch.tokens.shape[1] > 9 else [p for p in SOURCES if getattr(p, "slot", None) != 9]
    effects = direct_effects(tower(name)[1], batch, places)
    agree(effects, by_hand(name, batch, places))
    assert effects.values[places.index(Site("v", 1, 2, "suffix"))].isnan().all()
    assert effects.values[-1].isnan().all() and not effects.values[-2].isnan().any()
    if not equal:
        assert not effects.values[places.index(Site("v", 2, 0, UNALIGNED))].isnan().all()


@pytest.mark.parametrize("name", TOWERS)
def test_without_contrast_the_run_alone(name):
    batch, places = batch_of(name), [*KINDS, *SOURCES]
    effects = direct_effects(tower(name)[1], batch, places, contrast=False)
    agree(effects, by_hand(name, batch, places, contrast=False))
    assert not effects.record.metric.oriented and torch.equal(
        effects.signed().nan_to_num(), effects.values.nan_to_num()
    )
    assert torch.equal(effects.total, effects.baseline)
    assert torch.equal(effects.signed().nan_to_num(), effects.values.nan_to_num())


def whole(effects, tolerance):
    """The places sum to the total, relative to the metric of each pair."""
    size = torch.maximum(effects.baseline.abs(), (effects.baseline + effects.total).abs())
    error = (effects.values.double().nan_to_num().sum(0) - effects.total).abs()
    assert (error <= tolerance * size).all(), float((error / size).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", TOWERS)
def test_the_parts_sum_to_the_whole(name, by, dtype):
    encoder, batch = tower(name, dtype)[1], batch_of(name, dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    places = components(encoder, batch, by)
    for contrast in (True, False):
        effects = direct_effects(encoder, batch, places, contrast=contrast)
        assert effects.values.dtype == dtype
        whole(effects, tolerance)
    metrics = [(encoder(tokens) * batch.direction).sum(-1) for tokens in (batch.tokens, batch.other)]
    effects = direct_effects(encoder, batch, places)
    size = metrics[0].abs().max()
    assert (effects.baseline - metrics[0]).abs().max() <= tolerance * size
    assert (effects.baseline + effects.total - metrics[1]).abs().max() <= tolerance * size
    d = torch.tensor(effects.pairs["d"].to_numpy(), dtype=dtype)
    assert (effects.signed().nan_to_num().sum(0) - d).abs().max() <= tolerance * d.abs().max()


@pytest.mark.parametrize("slots", [("negator",), ("eot", UNNAMED), (0, 3), (5,)], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_some_source_slots_and_the_rest_are_the_whole_of_each_head(name, slots):
    encoder, batch = tower(name)[1], batch_of(name)
    places = components(encoder, batch, "source", slots=slots)
    effects = direct_effects(encoder, batch, places)
    whole(effects, 1e-10)
    heads = direct_effects(encoder, batch, encoder.sites("head"))
    sources = [number for number, place in enumerate(places) if members(place)[0].kind == "v"]
    assert len(sources) == len(heads.places) * (len(slots) + 1)
    summed = effects.values[sources].nan_to_num().unflatten(0, (len(heads.places), -1)).sum(1)
    assert torch.allclose(summed, heads.values, rtol=0, atol=1e-11 * float(heads.values.abs().max()))


@pytest.mark.parametrize("name", TOWERS)
def test_the_raw_positions_and_what_is_unaligned_are_the_whole_of_a_head(name):
    encoder, batch = tower(name)[1], batch_of(name)
    slots = [*range(batch.tokens.shape[1]), UNALIGNED]
    effects = direct_effects(encoder, batch, [Site("v", 2, 3, slot) for slot in slots] + [Site("head", 2, 3)])
    assert torch.allclose(effects.values[:-1].nan_to_num().sum(0), effects.values[-1], rtol=0, atol=1e-12)
    places = components(encoder, batch, "source", slots=range(batch.tokens.shape[1]))
    assert Site("v", 2, 3, UNALIGNED) in places and Site("v", 2, 3, 2) in places
    whole(direct_effects(encoder, batch, places), 1e-10)


def test_the_default_is_everything_by_head():
    _, encoder = tower("causal")
    effects = direct_effects(encoder, batch_of("causal"))
    assert list(effects.places) == components(encoder, batch_of("causal"), "head")
    assert len(effects.places) == 2 + 3 * (4 + 1 + 1) + 1


@pytest.mark.parametrize("name", TOWERS)
def test_heads_are_transformerlens_stacked_results(name):
    """`stack_head_results` on the tower's own cache, the final LayerNorm's centre, scale and weight put on by hand."""
    encoder, batch = tower(name)[1], batch_of(name)
    effects = direct_effects(encoder, batch, encoder.sites("head"), contrast=False)
    rows, at = torch.arange(len(batch)), encoder.pool(batch.tokens)
    output, cache = encoder.tower.run_with_cache(batch.tokens)
    stack = cache.stack_head_results(layer=-1)[:, rows, at]
    centred = stack - stack.mean(-1, keepdim=True)
    scaled = encoder.tower.ln_final.w * centred / cache["ln_final.hook_scale"][rows, at]
    values = (scaled @ encoder.tower.W_U * batch.direction).sum(-1) / output[rows, at].norm(dim=-1)
    assert values.shape == effects.values.shape
    assert torch.allclose(effects.values, values, rtol=0, atol=1e-10 * float(values.abs().max()))


def lens_by_hand(name, batch, norms):
    clip = tower(name)[0]
    lines = []
    for tokens in (batch.tokens, batch.other):
        line = []
        for pair in range(len(batch)):
            hand = Hand(clip, tokens[pair], batch.direction[pair])
            column = []
            for layer in range(4):
                x = hand.stream(layer)[hand.e]
                y = hand.projected(hand.text.ln_final(x))
                free = float(y @ hand.w / y.norm())
                column.append(hand.c(x) + hand.constant() if norms == "frozen" else free)
            line.append(column)
        lines.append(torch.tensor(line, dtype=torch.float64).T)
    return lines


@pytest.mark.parametrize("norms", ["frozen", "recomputed"])
@pytest.mark.parametrize("name", TOWERS)
def test_the_lens_is_open_clips_last_layers_on_each_stream(name, norms):
    encoder, batch = tower(name)[1], batch_of(name)
    run, other = lens_by_hand(name, batch, norms)
    agree(logit_lens(encoder, batch, norms=norms), (other - run).tolist())
    alone = logit_lens(encoder, batch, norms=norms, contrast=False)
    agree(alone, run.tolist())
    assert torch.allclose(alone.values[-1], alone.total, rtol=0, atol=1e-10 * float(alone.total.abs().max()))
    assert alone.places == tuple(Site("resid", layer) for layer in range(4))
    assert alone.meta["norms"] == lens.NORMS[norms] and not alone.record.metric.oriented


def test_the_frozen_lens_climbs_by_what_each_layer_writes():
    encoder, batch = tower("causal")[1], batch_of("causal")
    lens, layers = logit_lens(encoder, batch), direct_effects(encoder, batch, components(encoder, batch, "layer"))
    assert torch.allclose(lens.values.diff(dim=0), layers.values[1:-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TOWERS)
def test_any_direction_of_the_joint_space(name):
    """Two images, a mean of many, a text: linear in the direction, the same sum."""
    encoder, batch = tower(name)[1], batch_of(name)
    v = torch.nn.functional.normalize(
        torch.randn(3, encoder.d_embed, generator=torch.Generator().manual_seed(2)), dim=1
    )
    v = v.double()
    one, two, both = (
        direct_effects(encoder, batch.along(encoder.scale * w), contrast=False) for w in (v[0], v[1], v[0] - v[1])
    )
    assert torch.allclose(both.values, one.values - two.values, rtol=0, atol=1e-12)
    for w in (v[0] - v[1], v.mean(0), encoder(["no zebra"])[0]):
        whole(direct_effects(encoder, batch.along(w)), 1e-10)
        effects = direct_effects(encoder, batch.along(w), contrast=False)
        assert torch.allclose(effects.total, encoder(batch.tokens) @ w, rtol=0, atol=1e-12)


def test_flipping_the_batch_keeps_the_parts_of_d():
    encoder, batch = tower("causal")[1], batch_of("causal")
    there, back = direct_effects(encoder, batch), direct_effects(encoder, batch.flip())
    assert torch.allclose(there.signed(), back.signed(), rtol=0, atol=1e-12)
    assert torch.allclose(there.values, -back.values, rtol=0, atol=1e-12)


def test_as_many_pairs_are_read_together_as_fit(monkeypatch):
    encoder, batch = tower("causal")[1], batch_of("causal")
    width = max(batch.tokens.shape[1], batch.other.shape[1])
    each = 5 + (width + 3) * 128  # 5 places; positions and blocks, times neurons
    for lines, pairs in ((each - 1, 1), (each, 1), (3 * each - 1, 2), (3 * each, 3), (10**9, reading.PAIRS_AT_ONCE)):
        monkeypatch.setattr(reading, "LINES_AT_ONCE", lines)
        found = reading._at_once(encoder, batch, 5)
        assert (found, type(found)) == (pairs, int)


def test_pairs_at_a_time_change_nothing(monkeypatch):
    encoder, batch = tower("bidirectional")[1], batch_of("bidirectional")
    places = [*KINDS, *SOURCES]
    at_once = direct_effects(encoder, batch, places)
    monkeypatch.setattr(reading, "LINES_AT_ONCE", 1)
    one = direct_effects(encoder, batch, places)
    assert torch.allclose(at_once.values, one.values, rtol=0, atol=1e-12, equal_nan=True)
    assert torch.allclose(at_once.total, one.total, rtol=0, atol=1e-12)


def test_an_edge_into_the_output_is_its_sender():
    encoder, batch = tower("causal")[1], batch_of("causal")
    edges = encoder.edges(receivers=[Site("out")])
    found = direct_effects(encoder, batch, edges)
    assert torch.equal(found.values, direct_effects(encoder, batch, [edge.sender for edge in edges]).values)
    assert found.index["sender"].tolist()[:2] == ["embed", "head 0.0"]


def test_the_result_says_what_it_is(tmp_path):
    encoder, batch = tower("causal")[1], batch_of("causal")
    effects = direct_effects(encoder, batch, components(encoder, batch, "source"))
    assert effects.meta["method"] == "direct logit attribution" and effects.meta["source"] == "counterpart"
    assert "frozen" in effects.meta["norms"] and effects.meta["values"].startswith("C(other) - C(run)")
    assert (
        effects.record.metric.name == "logit"
        and effects.record.metric.oriented
        and effects.meta["run"] == "the caption is the run"
    )
    unnamed = sum(len(positions(batch, pair, UNNAMED, other)) for pair in range(len(batch)) for other in (False, True))
    assert effects.meta["source tokens in no named slot"] == str(unnamed) != "0"
    assert {UNNAMED, "negator"} <= set(effects.index["slot"]) and "suffix" not in set(effects.index["slot"])
    alone = direct_effects(encoder, batch, contrast=False)
    assert alone.meta["source"] == "none" and alone.meta["values"].startswith("C(run)")
    effects.save(tmp_path / "direct.parquet")
    again = Effects.load(tmp_path / "direct.parquet")
    assert again.places == effects.places and torch.equal(again.values.nan_to_num(), effects.values.nan_to_num())


def test_the_embedded_model_from_pairs_to_pictures():
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    batch = clip_lens.align(clip_lens.read_pairs()[:24], store, encoder)
    for by in BY:
        whole(direct_effects(encoder, batch, components(encoder, batch, by)), 1e-5)
    effects = direct_effects(encoder, batch)
    table = effects.table(resamples=20)
    share = table.groupby("side")["fraction"].sum()
    assert share.round(3).tolist() == [1.0] * len(share)
    heads = effects.where(kind="head")
    assert heads.grid("unit", "layer", "effect", side="foil").shape == (encoder.n_heads, encoder.n_layers)
    assert len(clip_lens.heatmap(heads, rows="unit", columns="layer", value="effect").data) == 2
    with pytest.raises(ValueError, match="kind"):
        effects.grid("unit", "layer", "effect", side="foil")
    steps = direct_effects(encoder, batch, components(encoder, batch, "sublayer"))
    assert steps.grid("kind", "layer", "effect", side="foil").index.tolist() == ["embed", "attn", "mlp", "constant"]
    lens = logit_lens(encoder, batch)
    last = lens.fraction(pooled=True)["fraction"].tolist()[-1]
    assert last == pytest.approx(1, abs=1e-5)
    assert "head" in effects.top(3)["place"].iloc[0] or "mlp" in effects.top(3)["place"].iloc[0]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Site("q", 0, 1), "writes nothing"),
        (Site("k", 0, 1), "writes nothing"),
        (Site("pattern", 0, 1), r"Site\('v', layer, head, slot=...\)"),
        (Site("out"), "writes nothing"),
        (Edge(Site("head", 0, 1), Site("mlp", 2)), "only edges into out"),
        (Site("head", 0, 1, slot="negator"), "leave slot=None"),
        (Site("mlp", 3), "layers 0..2"),
        (Site("resid", 4), "layers 0..3"),
        (Site("head", 0, 4), "units 0..3"),
        (Site("neuron", 0, 128), "units 0..127"),
        (Site("v", 0, 1, slot="verb"), "no slot 'verb'.*unaligned"),
        (Site("v", 0, 1, slot=99), "positions 0.."),
        ((), "empty tuple"),
    ],
)
def test_places_without_attribution_are_errors(place, message):
    with pytest.raises(ValueError, match=message):
        direct_effects(tower("causal")[1], batch_of("causal"), [Site("token"), place])


def test_other_errors_say_what_would_fit():
    encoder, batch = tower("causal")[1], batch_of("causal")
    with pytest.raises(ValueError, match="no places"):
        direct_effects(encoder, batch, [])
    with pytest.raises(ValueError, match="16 components"):
        direct_effects(clip_lens.load(), batch, [Site("token")])
    with pytest.raises(ValueError, match="16 components"):
        logit_lens(clip_lens.load(), batch)
    with pytest.raises(ValueError, match="frozen, recomputed"):
        logit_lens(encoder, batch, norms="free")
    with pytest.raises(ValueError, match="head, neuron, source, layer"):
        components(encoder, batch, "unit")
    with pytest.raises(ValueError, match="by='head' has none"):
        components(encoder, batch, "head", slots=["eot"])
    with pytest.raises(ValueError, match="not both"):
        components(encoder, batch, "source", slots=["eot", 3])
    with pytest.raises(ValueError, match="no slot 'verb'"):
        components(encoder, batch, "source", slots=["verb"])


def test_parts_are_no_places_of_a_patch():
    with pytest.raises(ValueError, match="can't be patched"):
        address([Site("attn_bias", 1)], tower("causal")[1], batch_of("causal"))


def test_only_the_pooled_position_of_what_is_named_is_kept(monkeypatch):
    """No activation per position, but for what patterns and values are reduced to, and none that no place names."""
    kept, observe = {}, reading.observe

    def watched(*arguments):
        kept.update(observe(*arguments))
        return kept

    monkeypatch.setattr(direct, "observe", watched)
    encoder, batch = tower("causal")[1], batch_of("causal").flip()[:1]
    direct_effects(encoder, batch, [Site("head", 1, 0), Site("mlp_bias", 0)], contrast=False)
    assert set(kept) == {"blocks.1.attn.hook_z", "blocks.2.hook_resid_post"}
    for by in BY:
        kept.clear()
        direct_effects(encoder, batch, components(encoder, batch, by))
        sizes = {name.split("_", 1)[1]: value[0].numel() for name, value in kept.items()}
        width = int(batch.other_length[0])  # read last
        assert sizes.items() <= {"z": 32, "post": 128, "pattern": 4 * width, "v": 4 * width}.items() | {
            (name, 32) for name in ("mlp_out", "attn_out", "resid_pre", "resid_post")
        }
