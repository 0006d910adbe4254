"""labels against a loop over the bank, with what heads and neurons write taken from open_clip's own modules."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from oracle import TOWERS, batch_of, given, pooled, tower
from torch import nn

import clip_lens
from clip_lens.data.images import ImageStore
from clip_lens.methods import labels as module
from clip_lens.methods.direct import direct_effects
from clip_lens.methods.labels import COLUMNS, labels
from clip_lens.model.site import Site

HEADS = [Site("head", 0, 1), Site("head", 2, 3), Site("head", 2, 0)]
NEURONS = [Site("neuron", 0, 5), Site("neuron", 2, 127)]
TEXTS = ["There is a zebra.", "no dogs", "a red cube", "some people in it", "a photo", "There are no zebras here."]


def bank(d_embed, n=9):
    rows = torch.randn(n, d_embed, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    return ImageStore.from_tensors([f"{row}.png" for row in range(n)], rows)


def joint(text, written):
    """What is written in the residual stream, in the joint space: the final LayerNorm's weight and the projection."""
    projection = text.text_projection
    weight = projection.weight.T if isinstance(projection, nn.Linear) else projection
    return (text.ln_final.weight * (written - written.mean())) @ weight


def head_writes(name, batch, site):
    """What a head adds to the unit embedding of the runs and of the other texts, norms frozen: two [pair, d_embed]."""
    text = getattr(tower(name)[0], "text", tower(name)[0])
    found = []
    for tokens in (batch.tokens, batch.other):
        lines = []
        for line in tokens:
            gives, e = given(tower(name)[0], line), pooled(text, line)
            final = gives[Site("out")][e]
            y = text.ln_final(final)
            y = text.text_projection(y) if isinstance(text.text_projection, nn.Linear) else y @ text.text_projection
            std = (final.var(correction=0) + text.ln_final.eps).sqrt()
            lines.append(joint(text, gives[site][e]) / (std * y.norm()))
        found.append(torch.stack(lines))
    return found


def neuron_writes(name, site):
    text = getattr(tower(name)[0], "text", tower(name)[0])
    block = text.transformer.resblocks[site.layer]
    return joint(text, block.ls_2(block.mlp.c_proj.weight[:, site.unit]))


def direction_by_hand(name, batch, site, of):
    if site.kind == "neuron":
        return neuron_writes(name, site), 1.0
    run, other = head_writes(name, batch, site)
    both = torch.cat([run, other])
    if of == "mean":
        shown, vector = both, both.mean(0)
    elif of == "contrast":
        shown, vector = other - run, (other - run).mean(0)
    else:
        shown = both - both.mean(0)
        vector = torch.linalg.eigh(shown.T @ shown).eigenvectors[:, -1]
        vector = vector if ((other - run) @ vector).mean() > 0 else -vector
    return vector, float(((shown @ vector) ** 2).sum() / (vector @ vector) / (shown**2).sum())


def ranked_by_hand(vector, ids, rows, n, centred):
    """(end, rank, id, score), one item of the bank at a time."""
    mean = sum(rows) / len(rows) if centred else 0 * rows[0]
    scored = []
    for name, row in zip(ids, rows, strict=True):
        row = row - mean
        scored.append((float(vector @ row / (vector.norm() * row.norm())), name))
    ends = {"to": sorted(scored, reverse=True), "from": sorted(scored)}
    return [(end, rank, *pair[::-1]) for end, best in ends.items() for rank, pair in enumerate(best[:n], 1)]


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "not centred"])
@pytest.mark.parametrize("of", ["variance", "contrast", "mean"])
@pytest.mark.parametrize("name", TOWERS)
def test_labels_are_a_loop_over_the_bank(name, of, centred):
    encoder, batch = tower(name)[1], batch_of(name)
    store, places = bank(encoder.d_embed), [*HEADS, *NEURONS]
    found = labels(encoder, places, images=store, texts=TEXTS, batch=batch, of=of, n=3, centred=centred)
    assert tuple(found.columns) == COLUMNS and len(found) == len(places) * 2 * 2 * 3
    banks = {"image": (store.ids, store[store.ids]), "text": (TEXTS, encoder(TEXTS))}
    for place in places:
        vector, share = direction_by_hand(name, batch, place, of)
        mine = found[found["place"] == str(place)]
        assert mine["share"].tolist() == pytest.approx([share] * 12, rel=1e-9)
        assert set(mine["of"]) == {of if place.kind == "head" else "weight"}
        for kind, (ids, rows) in banks.items():
            expected = ranked_by_hand(vector, ids, rows, 3, centred)
            lines = mine[mine["kind"] == kind]
            assert list(lines[["end", "rank", "id"]].itertuples(index=False, name=None)) == [e[:3] for e in expected]
            assert lines["score"].tolist() == pytest.approx([score for *_, score in expected], abs=1e-10)


def test_the_contrast_is_the_mean_direct_effect():
    """<direction, w> has the sign and, unnormalised, the value of the head's mean direct effect along w."""
    name = "causal"
    encoder, batch = tower(name)[1], batch_of(name)
    w = torch.randn(encoder.d_embed, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    effect = direct_effects(encoder, batch.along(w), HEADS).values.mean(1)
    store = ImageStore.from_tensors(["w"], w[None])
    found = labels(encoder, HEADS, images=store, batch=batch, of="contrast", n=1, centred=False)
    for place, value in zip(HEADS, effect, strict=True):
        run, other = head_writes(name, batch, place)
        norm = (other - run).mean(0).norm() * w.norm()
        score = found[(found["place"] == str(place)) & (found["end"] == "to")]["score"].item()
        assert score * norm == pytest.approx(float(value), rel=1e-9)


def test_the_principal_component_does_not_depend_on_which_text_is_run_but_for_its_sign():
    encoder, batch = tower("causal")[1], batch_of("causal")
    store = bank(encoder.d_embed)
    there, back = (labels(encoder, HEADS, images=store, batch=b, n=2) for b in (batch, batch.flip()))
    turned = back.replace({"end": {"to": "from", "from": "to"}}).sort_values(
        ["place", "end", "rank"], ascending=[True, False, True]
    )
    there = there.sort_values(["place", "end", "rank"], ascending=[True, False, True])
    assert there["id"].tolist() == turned["id"].tolist()
    assert there["score"].tolist() == pytest.approx((-turned["score"]).tolist(), abs=1e-9)


def test_chunks_change_nothing(monkeypatch):
    encoder, batch = tower("bidirectional")[1], batch_of("bidirectional")
    arguments = {"images": bank(encoder.d_embed), "texts": TEXTS, "batch": batch, "n": 2}
    at_once = labels(encoder, [*HEADS, *NEURONS], **arguments)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 2)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 20)
    pd.testing.assert_frame_equal(labels(encoder, [*HEADS, *NEURONS], **arguments), at_once, atol=1e-10)


def test_a_bank_smaller_than_asked_gives_what_it_has():
    encoder = tower("causal")[1]
    found = labels(encoder, NEURONS[:1], texts=[*TEXTS[:2], TEXTS[0]], n=5)
    assert found["rank"].tolist() == [1, 2, 1, 2] and found["id"].tolist()[:2] == found["id"].tolist()[:1:-1]


def test_the_embedded_model():
    encoder, store = clip_lens.load(), ImageStore.open("tiny")
    batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder)
    places = encoder.sites("head") + encoder.sites("neuron", layers=[5])[:50]
    found = labels(encoder, places, images=store, texts=batch.pairs.caption, batch=batch)
    assert len(found) == 74 * 20 and set(found["id"]) <= {*store.ids, *batch.pairs.caption}
    assert found["score"].abs().max() <= 1 and found["share"].between(0, 1 + 1e-6).all()
    steps = found.groupby(["place", "kind", "end"])["score"].diff().dropna()
    ends = found.loc[steps.index, "end"]
    assert (steps[ends == "to"] <= 0).all() and (steps[ends == "from"] >= 0).all()
    merged = found.merge(direct_effects(encoder, batch, places).fraction(pooled=True), on="place", suffixes=("", "_of"))
    assert len(merged) == len(found)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"places": []}, "no places"),
        ({"places": [Site("mlp", 1)]}, "no label"),
        ({"places": [Site("head", 1)]}, "no label"),
        ({"places": [Site("head", 1, 2, slot="eot")]}, "without slot"),
        ({"places": [(Site("head", 1, 2),)]}, "no label"),
        ({"places": [Site("head", 1, 4)]}, "head units 0..3 at layers 0..2"),
        ({"places": [Site("neuron", 3, 0)]}, "neuron units 0..127 at layers 0..2"),
        ({"batch": None}, "give batch="),
        ({"of": "median"}, "variance, contrast, mean"),
        ({"n": 0}, "at least one"),
        ({"images": None}, "no bank"),
        ({"texts": "a dog"}, "sequence of texts"),
        ({"texts": ["a dog"]}, "centred=False"),
        ({"images": bank(7)}, "don't share a space"),
        ({"images": ImageStore.from_tensors(["a", "b"], torch.eye(2, 16), model="ViT-L-14")}, "nothing in common"),
    ],
)
def test_errors_say_what_would_fit(given_, message):
    encoder, batch = tower("causal")[1], batch_of("causal")
    arguments = {"places": HEADS, "images": bank(encoder.d_embed), "batch": batch} | given_
    with pytest.raises(ValueError, match=message):
        labels(encoder, arguments.pop("places"), **arguments)


def test_a_head_that_writes_the_same_for_every_text_is_named():
    encoder, batch = tower("causal")[1], batch_of("causal")
    same = replace(batch, other=batch.tokens)
    with pytest.raises(ValueError, match=r"head 0.1 writes the same.*of='mean'"):
        labels(encoder, HEADS, images=bank(encoder.d_embed), batch=same, of="contrast")
