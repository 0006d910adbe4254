"""explore shows the package's numbers, its code reproduces them, and the shell works with and without a frontend."""

import json
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from towers import random_encoder, random_store

import clip_lens
from clip_lens import Pairs, Site
from clip_lens.data.alone import one_text
from clip_lens.show.explore import shell
from clip_lens.show.explore.desk import Desk
from clip_lens.show.explore.view import KINDS, View
from clip_lens.show.explore.widget import HERE

RUNS = ("caption", "foil", "affirmative", "negated")
HEADS = ("head", "q", "k", "v", "pattern")
SOURCES = {"counterpart": clip_lens.counterpart, "zeros": clip_lens.zeros, "noise": clip_lens.noise(1.0, seed=0)}


@pytest.fixture(scope="module")
def encoder():
    return clip_lens.load()


@pytest.fixture(scope="module")
def store():
    return clip_lens.ImageStore.open("tiny")


@pytest.fixture(scope="module")
def pairs():
    return clip_lens.read_pairs()[:24]


@pytest.fixture(scope="module")
def batch(pairs, store, encoder):
    return clip_lens.align(pairs, store, encoder)


@pytest.fixture
def explorer(encoder, batch):
    return clip_lens.explore(encoder, batch)


@pytest.fixture(scope="module")
def desk(encoder, batch):
    return Desk(encoder, batch)


def close(found, wanted):
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    assert np.nanmax(np.abs(found - wanted)) <= 2e-5 * max(np.nanmax(np.abs(wanted)), 1.0)


def by_hand(encoder, one, view, source, slots):
    """The view's grid, place by place: a row per head or slot, a column per layer."""
    layers = encoder.n_layers + (view.kind == "resid")
    if view.kind in HEADS:
        places = [[Site(view.kind, layer, head) for layer in range(layers)] for head in range(encoder.n_heads)]
    else:
        places = [[Site(view.kind, layer, slot=slot) for layer in range(layers)] for slot in slots]
    effects = clip_lens.patch_effects(encoder, one, [place for row in places for place in row], source=source)
    return effects.values[:, 0].reshape(len(places), layers) * int(one.sigma)


# The numbers


@pytest.mark.parametrize(("kind", "run"), list(zip(KINDS, 3 * RUNS, strict=False)))
def test_the_grid_is_patch_effects(desk, encoder, pairs, store, kind, run):
    row = KINDS.index(kind) + 3
    panels = desk.look(desk.change(desk.start(), pair=row, kind=kind, run=run))
    one = clip_lens.align(pairs[[row]], store, encoder, run=run)
    close(panels.grid, by_hand(encoder, one, panels.view, clip_lens.counterpart, range(int(one.length))))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["resid", "head"])
def test_other_sources(desk, encoder, pairs, store, kind, source):
    panels = desk.look(desk.change(desk.start(), pair=5, kind=kind, source=source))
    one = clip_lens.align(pairs[[5]], store, encoder)
    close(panels.grid, by_hand(encoder, one, panels.view, SOURCES[source], range(int(one.length))))


@pytest.mark.parametrize("run", ["affirmative", "negated", "foil"])
def test_the_mean_is_that_of_the_whole_batch(desk, encoder, pairs, store, run):
    panels = desk.look(desk.change(desk.start(), pair=7, kind="mlp", source="mean", run=run, rows="slot"))
    whole = clip_lens.align(pairs, store, encoder, run=run)
    places = encoder.sites("mlp", slots=list(panels.grid.index))
    effects = clip_lens.patch_effects(encoder, whole, places, source=clip_lens.mean)
    close(panels.grid, effects.signed()[:, 7].reshape(encoder.n_layers, -1).T)


def test_slots_are_patched_with_all_their_tokens(desk, encoder, batch):
    panels = desk.look(desk.change(desk.start(), rows="slot"))
    held = {batch.slots[number] for number in batch.slot[0].tolist() if number >= 0}
    assert set(panels.grid.index) == held
    close(panels.grid, by_hand(encoder, batch[[0]], panels.view, clip_lens.counterpart, list(panels.grid.index)))


def test_typed_texts_and_another_image(desk, encoder, store, pairs):
    texts = ("There is no red star.", "There is a red star.")
    view = desk.change(desk.start(), caption=texts[0], foil=texts[1], image=pairs.image[9], run="foil")
    assert desk.typed(view)
    panels = desk.look(view)
    one = clip_lens.align(Pairs(["a"], [texts[0]], [texts[1]], [pairs.image[9]]), store, encoder, run="foil")
    close(panels.grid, by_hand(encoder, one, view, clip_lens.counterpart, range(int(one.length))))
    logits = encoder.scale * encoder(texts) @ store[[pairs.image[9]]][0]
    close([text.logit for text in panels.texts], logits)
    close(panels.score, logits[0] - logits[1])


def test_another_image_for_a_pair(desk, encoder, store, pairs):
    panels = desk.look(desk.change(desk.start(), pair=2, image=pairs.image[11]))
    logits = encoder.scale * encoder([pairs.caption[2], pairs.foil[2]]) @ store[[pairs.image[11]]][0]
    close([text.logit for text in panels.texts], logits)


def test_images_beyond_the_batch(encoder, batch, store):
    image = store.ids[-1]
    assert image not in batch.pairs.image
    assert "no image" in clip_lens.explore(encoder, batch).show(image=image).message
    explorer = clip_lens.explore(encoder, batch, images=store).show(image=image)
    logit = encoder.scale * encoder([explorer.view.caption])[0] @ store[[image]][0]
    close(explorer.panels.texts[0].logit, logit)
    space = {"encoder": encoder, "batch": batch, "images": store}
    exec(explorer.code, space)
    close(space["effects"].values, explorer.effects.values)


def test_the_chosen_cell_is_what_its_patch_gives(desk, encoder, batch):
    panels = desk.look(desk.change(desk.start(), layer=2, query=4))
    assert (panels.chosen, panels.view.query) == ((4, 2), 4)
    one = batch[[0]]
    _, cache = encoder.tower.run_with_cache(one.other)

    def patch(value, hook):
        value = value.clone()
        value[:, 4] = cache[hook.name][:, int(one.origin[0, 4])]
        return value

    patched = encoder(one.tokens, hooks=[("blocks.2.hook_resid_pre", patch)])
    close(panels.patched.text.logit, (patched[0] * one.direction[0]).sum())


def test_patterns_and_direct_contributions(desk, encoder, batch):
    panels = desk.look(desk.change(desk.start(), kind="head", layer=1, head=2, query=4))
    for text, written in zip(panels.texts, (batch.pairs.caption[0], batch.pairs.foil[0]), strict=True):
        name = "blocks.1.attn.hook_pattern"
        close(text.patterns, encoder.cache([written], names=name)[name][0])
        assert text.query == 4 and len(text.tokens) == len(text.patterns[0])
    effects = clip_lens.direct_effects(encoder, batch[[0]], [Site("head", 1, 2), Site("mlp", 5)])
    close([panels.direct.loc["head 2", 1], panels.direct.loc["MLP", 5]], effects.signed()[:, 0])
    everything = clip_lens.direct_effects(encoder, batch[[0]]).values.sum() * batch.sigma[0]
    close(everything, panels.score)  # what is shown are parts of d


def test_inserted_tokens_have_no_counterpart(desk):
    view = desk.change(desk.start(), caption="There is a red star.", foil="There is no star.", run="caption")
    panels = desk.look(view)
    row = panels.labels.index("red")
    assert panels.grid.iloc[row].isna().all() and not panels.grid.drop(index=row).isna().any(axis=None)
    assert desk.look(desk.change(view, query=row)).texts[1].query is None
    assert len(panels.texts[1].origin) == len(panels.texts[1].tokens)


@pytest.mark.parametrize("causal", [True, False])
def test_other_towers(causal):
    encoder = random_encoder(causal=causal, dtype=torch.float64)
    pairs = Pairs(["a", "b"], ["a dog", "there is no dog"], ["no big dog", "there is a dog"], ["1", "2"])
    batch = clip_lens.align(pairs, random_store(pairs, encoder.d_embed), encoder, run="caption")
    desk = Desk(encoder, batch)
    panels = desk.look(desk.change(desk.start(), kind="attn"))
    assert int(encoder.pool(batch.tokens)[0]) in panels.grid.index
    close(panels.grid, by_hand(encoder, batch[[0]], panels.view, clip_lens.counterpart, list(panels.grid.index)))


# Of heads: one block's, by token, and what they read


def test_one_block_by_token(desk, encoder, batch):
    view = desk.change(desk.start(), kind="head", rows="token", layer=2, head=1, query=4)
    panels = desk.look(view)
    places = [[Site("head", 2, head, slot) for head in range(encoder.n_heads)] for slot in range(len(panels.labels))]
    flat = [place for row in places for place in row]
    effects = clip_lens.patch_effects(encoder, batch[[0]], flat)
    close(panels.grid, effects.signed()[:, 0].reshape(len(places), -1))
    assert panels.chosen == (4, 1) and panels.layout.at(4, 1) == places[4][1]
    assert not np.allclose(desk.look(desk.change(view, layer=3)).grid, panels.grid)


@pytest.mark.parametrize("changes", [{}, {"caption": "There is a red star.", "foil": "There is no star."}])
def test_heads_by_the_token_they_read(desk, encoder, changes):
    panels = desk.look(desk.change(desk.start(), layer=4, run="foil", **changes))
    close(panels.sources.sum(axis=0), panels.direct.iloc[: encoder.n_heads, 4])  # nothing is lost
    one = desk._one(panels.view.texts).batch
    effects = clip_lens.direct_effects(encoder, one, [Site("v", 4, 1, 3), Site("v", 4, 2, "unaligned")])
    close(panels.sources.iloc[3, 1], effects.signed()[0, 0])
    longer = "red" in panels.texts[0].tokens and bool(changes)
    assert (panels.tokens[-1] == "only in the other") == longer
    if longer:
        close(panels.sources.iloc[-1, 2], effects.signed()[1, 0])


def test_the_logit_lens(desk, encoder, batch):
    panels = desk.look(desk.start())
    for name, one in (("foil", batch[[0]]), ("caption", batch[[0]].flip())):
        assert one.sigma == (1 if name == "foil" else -1)
        lens = clip_lens.logit_lens(encoder, one, norms="recomputed", contrast=False)
        close(panels.lens.loc[name], lens.values[:, 0])
    close(panels.lens.loc["d"].iloc[-1], panels.score)


# Places together, and attention after the patch


def patterns_with(encoder, one, cells, source):
    """The run's patterns with cells of the residual stream or of heads patched, by hooks written here."""
    _, other = encoder.tower.run_with_cache(one.other)
    seen = {}

    def patch(value, hook, cell):
        value = value.clone()
        at = (slice(None), cell.slot) if cell.unit is None else (slice(None), cell.slot, cell.unit)
        there = (at[0], int(one.origin[0, cell.slot]), *at[2:])
        value[at] = 0 if source == "zeros" else other[hook.name][there]
        return value

    def keep(value, hook):
        seen[hook.name] = value[0]

    names = {"resid": "blocks.{}.hook_resid_pre", "head": "blocks.{}.attn.hook_z"}
    hooks = [
        (names[cell.kind].format(cell.layer), lambda value, hook, cell=cell: patch(value, hook, cell)) for cell in cells
    ]
    patterns = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(encoder.n_layers)]
    return encoder(one.tokens, hooks=[*hooks, *patterns])[0], seen


CELLS = (Site("resid", 1, slot=4), Site("head", 2, 1, slot=5), Site("resid", 3, slot=6))


@pytest.mark.parametrize("source", ["counterpart", "zeros"])
@pytest.mark.parametrize("cells", [CELLS, CELLS[:1]], ids=["three", "one"])
def test_places_together(desk, encoder, batch, source, cells):
    panels = desk.look(desk.change(desk.start(), source=source, layer=4, together=cells))
    one = batch[[0]]
    u, seen = patterns_with(encoder, one, cells, source)
    logit = (u * one.direction[0]).sum()
    close(panels.patched.text.logit, logit)
    patched = panels.score - panels.patched.moved
    close(patched, panels.texts[0].logit - logit)  # d, with the foil patched
    close(panels.patched.text.patterns, seen["blocks.4.attn.hook_pattern"])
    singles = clip_lens.patch_effects(encoder, one, cells, source=getattr(clip_lens, source)).signed().sum()
    close(panels.patched.apart, singles)
    assert panels.patched.text.tokens == panels.run.tokens


def test_attention_after_the_chosen_cell(desk, encoder, batch):
    panels = desk.look(desk.change(desk.start(), layer=2, query=4))
    _, seen = patterns_with(encoder, batch[[0]], [Site("resid", 2, slot=4)], "counterpart")
    close(panels.patched.text.patterns, seen["blocks.2.attn.hook_pattern"])
    assert not np.allclose(panels.patched.text.patterns, panels.run.patterns, atol=1e-3)


def test_nothing_after_a_patch_without_counterpart(desk):
    view = desk.change(desk.start(), caption="There is a red star.", foil="There is no star.", run="caption")
    row = desk.look(view).labels.index("red")
    panels = desk.look(desk.change(view, query=row))
    assert panels.patched is None and len(panels.texts) == 2
    joined = Explored(desk, desk.change(view, together=[Site("resid", 2, slot=row)]))
    assert "Nothing of this has a counterpart" in joined.words


class Explored:
    """What the page says of a view."""

    def __init__(self, desk, view):
        self.words = HTMLText(shell.Explorer(desk, view=view).html()).words.replace("\xa0", " ")


def test_signs_are_those_of_d(desk):
    """A cell of +a takes a of d away, in the sentence, in what hovering tells and in the bars."""
    view = desk.change(desk.start(), layer=2, query=4)
    panels = desk.look(view)
    after = panels.score - float(panels.grid.iloc[panels.chosen])
    words = Explored(desk, view).words
    line = f"d: {panels.score:.2f} → {after:.2f}".replace("-", "\N{MINUS SIGN}")
    assert f"Patching resid 2 at “{panels.labels[4]}”: {line}." in words
    close(after, panels.texts[0].logit - panels.patched.text.logit)  # the foil is run


# One text alone


@pytest.mark.parametrize("image", ["", "scene-500003.png"])
def test_one_text_alone(desk, encoder, store, image):
    text = "There is no red star."
    panels = desk.look(desk.change(desk.start(), caption=text, foil="", image=image, layer=3, head=1))
    u = encoder(text)[0]
    w = encoder.scale * store[[image]][0] if image else u
    close(panels.score, (u * w).sum())
    assert (panels.unit == "logits") == bool(image) and len(panels.texts) == 1
    name = "blocks.3.attn.hook_pattern"
    close(panels.texts[0].patterns, encoder.cache(text, names=name)[name][0])

    zero = [("blocks.3.hook_resid_pre", lambda value, hook: value.index_fill(1, torch.tensor([4]), 0.0))]
    gone = panels.score - (encoder(text, hooks=zero)[0] * w).sum()
    close(panels.grid.iloc[4, 3], gone)
    close(panels.lens.iloc[0, -1], panels.score)


def test_contributions_of_one_text_are_read_off_its_activations(desk, encoder):
    """Each head's part of the cosine, by the token that it reads, from the cache and the weights."""
    text = "There is no red star."
    panels = desk.look(desk.change(desk.start(), caption=text, foil="", image="", layer=3))
    cache, tower = encoder.cache(text), encoder.tower
    end = int(encoder.pool(encoder.tokens(text))[0])
    x = cache["blocks.5.hook_resid_post"][0, end].double()
    std = (x.var(unbiased=False) + tower.ln_final.eps).sqrt()
    y = ((x - x.mean()) / std * tower.ln_final.w + tower.ln_final.b) @ tower.W_U.double()
    u = y / y.norm()
    for head in range(encoder.n_heads):
        values = cache["blocks.3.attn.hook_v"][0, :, head].double() @ tower.blocks[3].attn.W_O[head].double()
        read = cache["blocks.3.attn.hook_pattern"][0, head, end].double()[:, None] * values
        centred = read - read.mean(1, keepdim=True)
        parts = (centred / std * tower.ln_final.w) @ tower.W_U.double() @ u / y.norm()
        close(panels.sources[head], parts)
        close(panels.direct.loc[f"head {head}", 3], parts.sum())


def test_a_sentence_of_ones_own(encoder, store):
    alone = clip_lens.explore(encoder, "There is a red star.")
    assert alone.panels.unit == "of the cosine" and alone.choices()["pairs"] == 0
    assert alone.desk.offers(alone.view)["source"] == ["zeros", "noise"]
    assert "given no images" in alone.show(image="scene-500000.png").message
    pair = clip_lens.explore(encoder, ("There is a red star.", "There is a blue star."), images=store)
    one = clip_lens.align(
        Pairs(["a"], ["There is a red star."], ["There is a blue star."], [store.ids[0]]), store, encoder, run="foil"
    )
    close(pair.effects.values, clip_lens.patch_effects(encoder, one, pair.effects.places).values)
    assert "no batch was given" in pair.show(source="mean").message
    assert "no pairs to choose from" in pair.show(pair=1).message
    with pytest.raises(ValueError, match="caption and foil are the same tokens"):
        clip_lens.explore(encoder, ("A star.", "a star."), images=store)


def test_pairs_without_images_wait_for_one(encoder, store, batch, pairs):
    bare = replace(pairs, image=[""] * len(pairs))
    texts = replace(batch, direction=torch.full_like(batch.direction, torch.nan), pairs=bare)
    explorer = clip_lens.explore(encoder, texts, images=store)
    assert "compared by an image" in explorer.message and "compared by an image" in HTMLText(explorer.html()).words
    assert not explorer.show(foil="").message  # one text needs none
    explorer.show(pair=3, image=pairs.image[3])
    close(explorer.panels.score, clip_lens.explore(encoder, batch).show(pair=3).panels.score)


def test_one_text_is_not_judged_by_images_of_another_model(store):
    encoder = random_encoder(d_embed=128)
    with pytest.raises(ValueError, match="tiny"):
        clip_lens.explore(encoder, "a star", images=store).show(image=store.ids[0]).panels_or_raise()


def test_alone_in_other_towers():
    for causal in (True, False):
        encoder = random_encoder(causal=causal, dtype=torch.float64)
        panels = clip_lens.explore(encoder, "a big dog").panels
        everything = clip_lens.direct_effects(
            encoder, one_text("a big dog", encoder, encoder("a big dog")[0]), contrast=False
        )
        close(everything.values.sum(), 1.0)
        close(panels.sources.sum(axis=0), panels.direct.iloc[: encoder.n_heads, panels.block])


# What does not fit is replaced, and said


def test_a_pair_without_negation_runs_the_foil(explorer, encoder, store):
    explorer.show(run="negated", caption="There is a red star.", foil="There is a blue star.")
    assert explorer.panels.view.run == "foil" and "the foil is run" in explorer.notes[0]
    assert explorer.desk.offers(explorer.view)["run"] == ["caption", "foil"]
    pair = Pairs(["a"], ["There is a red star."], ["There is a blue star."], [explorer.view.image])
    one = clip_lens.align(pair, store, encoder, run="foil")
    close(explorer.effects.values, clip_lens.patch_effects(encoder, one, explorer.effects.places).values)
    explorer.show(pair=1)
    assert explorer.panels.view.run == "negated" and not explorer.notes  # what was asked for comes back


def test_one_text_has_no_other_to_be_patched_with(explorer):
    assert explorer.show(foil="").panels.view.source == "zeros" and "no other text" in explorer.notes[0]
    assert explorer.show(source="noise").notes == ()
    assert explorer.show(source="counterpart", pair=2).panels.view.source == "counterpart"


# What is kept


def test_an_edit_of_the_weights_is_seen():
    encoder = clip_lens.load()
    batch = clip_lens.align(clip_lens.read_pairs()[:3], clip_lens.ImageStore.open("tiny"), encoder)
    desk = Desk(encoder, batch)
    for changes in ({"kind": "head"}, {"kind": "mlp", "source": "mean"}):
        view = desk.change(desk.start(), **changes)
        before = desk.look(view)
        assert desk.look(view).effects is before.effects
        encoder.tower.blocks[1].attn.out_weight.mul_(0.5)
        after = desk.look(view)
        fresh = Desk(encoder, batch).look(view)
        for field in ("grid", "direct", "lens", "sources"):
            assert not np.allclose(getattr(after, field), getattr(before, field), atol=1e-4)
            np.testing.assert_array_equal(getattr(after, field), getattr(fresh, field))
        assert after.score == fresh.score != before.score


def test_hooks_of_the_users_are_seen(encoder, batch):
    desk = Desk(encoder, batch)
    view = desk.change(desk.start(), kind="head")
    before = desk.look(view).effects.values
    hooks = [("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)]
    with encoder.tower.hooks(fwd_hooks=hooks), pytest.raises(ValueError, match="hooks of yours"):
        desk.look(view)
    close(desk.look(view).effects.values, before)


def test_the_weights_are_digested_once_per_look(desk, monkeypatch):
    from clip_lens.model import encoder as module

    counted, own = [], module.digest
    monkeypatch.setattr(module, "digest", lambda tensors: counted.append(1) or own(tensors))
    desk.look(desk.change(desk.start(), pair=13, kind="v"))
    assert len(counted) == 1 and desk.encoder.digest and len(counted) == 2


# The code


CODES = {
    "as given": {},
    "other side": {"pair": 1, "run": "negated", "kind": "head", "layer": 4, "head": 3},
    "by slot": {"pair": 4, "rows": "slot", "kind": "mlp", "source": "zeros"},
    "noise": {"pair": 3, "kind": "v", "source": "noise"},
    "mean": {"pair": 2, "kind": "attn", "source": "mean"},
    "mean, turned": {"pair": 2, "kind": "attn", "source": "mean", "run": "negated"},
    "mean, mixed": {"pair": 2, "kind": "attn", "source": "mean", "run": "caption"},
    "other image": {"pair": 2, "image": "scene-500001.png"},
    "typed": {"caption": 'There is no "red" star.', "foil": "There is a 'red' star.", "kind": "pattern", "run": "foil"},
    "typed, mean": {"caption": "There is no star.", "foil": "There is a star.", "source": "mean", "kind": "mlp"},
    "one block": {"pair": 3, "kind": "head", "rows": "token", "layer": 2, "head": 1, "query": 4},
    "together": {"pair": 3, "together": [Site("mlp", 2, slot=3), Site("head", 1, 2)], "head": 3, "layer": 4},
    "alone": {"foil": "", "kind": "head", "head": 2, "layer": 1},
    "alone, no image": {"caption": "There is no star.", "foil": "", "image": "", "source": "noise", "rows": "slot"},
}


@pytest.mark.parametrize("changes", CODES.values(), ids=CODES)
def test_the_code_reproduces_the_view(explorer, encoder, batch, changes):
    explorer.show(**changes)
    assert not explorer.message
    space = {"encoder": encoder, "batch": batch}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tiny never saw")  # the quotes
        exec(explorer.code, space)
    close(space["effects"].values, explorer.effects.values)
    assert space["effects"].places == explorer.effects.places
    texts = list(explorer.panels.texts)
    if explorer.panels.run is not texts[0]:
        texts.reverse()
    shown = [(looks, text) for looks, text in zip(space["looks"], texts, strict=True)]
    shown += [(space["after"], explorer.panels.patched.text)] if explorer.panels.patched else []
    for looks, text in shown:
        pattern = text.patterns[explorer.panels.view.head]
        close(looks[: len(text.tokens), : len(text.tokens)], pattern)
    if explorer.view.together:
        close(space["together"].signed()[0, 0], explorer.panels.patched.moved)
    layer = min(explorer.view.layer, encoder.n_layers - 1)
    close(space["adds"], explorer.panels.direct.iloc[explorer.view.head, layer])


# What goes wrong is said


WRONG = {
    "the caption is empty": {"caption": ""},
    "the same tokens": {"caption": "There is a star.", "foil": "There is a star."},
    "are the same tokens": {"caption": "There is a star.", "foil": "there is a STAR."},
    "more than|longer than": {"foil": "star " * 100},
    "no image 'x.png'": {"image": "x.png"},
    "compared by an image": {"image": ""},
    "rows='head' is for kinds with heads": {"rows": "head"},
    "is not defined": {"kind": "pattern", "source": "mean"},
    "choose one of": {"kind": "neuron"},
    "a view has no": {"colour": "red"},
    "the pairs 0 to 23": {"pair": 24},
    "the heads of a block": {"head": 4},
    "positions 0 to": {"query": 50},
}


@pytest.mark.parametrize(("words", "changes"), WRONG.items(), ids=WRONG)
def test_errors_in_words(explorer, words, changes):
    explorer.show(**changes)
    assert re.search(words, explorer.message) and "Traceback" not in explorer.message
    assert explorer.message in HTMLText(explorer.html()).words
    fine = {"pair": 0, "kind": "resid", "source": "counterpart", "head": 0, "query": None, "rows": "token"}
    assert not explorer.show(**fine).message and explorer.panels is not None  # the next change works


def test_a_mistake_keeps_the_last_picture_but_gives_no_numbers(explorer):
    explorer.show(pair=1, kind="mlp")
    before = explorer.html()
    html = explorer.show(foil=explorer.view.caption).html()
    assert "the same tokens" in HTMLText(html).words and "below is still the last picture" in HTMLText(html).words
    assert html.strip().endswith(before.split("</ul>")[-1].strip()) and "<table" in html
    for name in ("effects", "code", "figure"):
        with pytest.raises(ValueError, match="nothing to show: caption and foil are the same"):
            getattr(explorer, name)
    assert not explorer.show(pair=2).message and "still the last" not in explorer.html()


def test_unseen_words_are_named(explorer):
    explorer.show(caption="There is no dog in the picture.", foil="There is a cat in the picture.")
    assert len(explorer.notes) == 1 and "'cat', 'dog'" in explorer.notes[0]
    assert "never saw" in HTMLText(explorer.html()).words
    assert explorer.show(pair=1).notes == ()


def test_a_direction_that_is_no_image_is_refused(encoder, batch):
    with pytest.raises(ValueError, match="before `along`"):
        clip_lens.explore(encoder, batch.along(batch.direction[0] - batch.direction[1]))


def test_changes_keep_what_still_holds(desk):
    view = desk.change(desk.start(), layer=6, query=3, head=1)
    assert desk.change(view, kind="head").layer == 5 and desk.change(view, kind="head").by_head
    assert desk.change(desk.change(view, kind="head", rows="slot"), kind="q").rows == "slot"
    assert desk.change(desk.change(view, kind="head"), kind="mlp").rows == "token"
    assert desk.change(view, kind="mlp").query == 3
    assert desk.change(view, run="foil").query is None
    joined = desk.change(view, together=[Site("mlp", 2, slot=3)])
    assert desk.change(joined, kind="head", source="zeros").together == joined.together
    assert desk.change(joined, foil="a star").together == desk.change(joined, run="foil").together == ()
    other = desk.change(view, pair=1)
    assert (other.caption, other.foil) == (desk.batch.pairs.caption[1], desk.batch.pairs.foil[1])
    assert (other.head, other.query) == (1, None)
    with pytest.raises(ValueError, match="source='x'"):
        View("a", "b", "c", source="x")  # type: ignore[arg-type]


# The page


class HTMLText(HTMLParser):
    """The words of a page, and its buttons: their grid, what they set, whether they are pressed."""

    def __init__(self, html):
        super().__init__()
        self.words, self.buttons, self.grid = "", [], ""
        self.sites, self.settings = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.grid = given.get("data-grid", self.grid)
        if tag == "button" and "data-set" in given:
            if "cl-set" in given["class"]:
                self.settings.append(json.loads(given["data-set"]))
            else:
                self.buttons.append((self.grid, json.loads(given["data-set"]), "aria-pressed" in given))
        if "data-site" in given:
            self.sites.append(json.loads(given["data-site"]))

    def handle_data(self, data):
        self.words += data


@pytest.mark.parametrize(
    "changes",
    [{}, {"rows": "slot"}, {"kind": "head"}, {"kind": "q", "rows": "token"}],
    ids=["token", "slot", "head", "block"],
)
def test_a_cell_sets_what_it_stands_for(explorer, changes):
    explorer.show(**changes)
    buttons = [button for button in HTMLText(explorer.html(live=True)).buttons if button[0] == "effects"]
    assert len(buttons) == explorer.panels.grid.size
    for _, sets, _ in buttons[::7]:
        explorer.show(**sets)
        pressed = [there for grid, there, on in HTMLText(explorer.html(live=True)).buttons if on and grid == "effects"]
        assert pressed == [sets]


def test_texts_are_escaped(explorer):
    html = explorer.show(caption='<script>alert("1")</script> no star', foil="a star").html(live=True)
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_pictures(explorer, encoder, batch, tmp_path):
    from PIL import Image

    assert "data:image/png" in explorer.html()  # rendered: the embedded model's scenes
    assert "<img" not in clip_lens.explore(encoder, batch, pictures=tmp_path).html()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for pictures in (tmp_path, {"scene-500000.png": tmp_path / "a.png"}):
        (tmp_path / "scene-500000.png").write_bytes((tmp_path / "a.png").read_bytes())
        assert "data:image/jpeg" in clip_lens.explore(encoder, batch, pictures=pictures).html()


def test_nothing_is_fetched():
    for name in ("explore.js", "explore.css", "explore.html.j2", "page.html.j2"):
        text = (HERE / name).read_text()
        assert not re.search(r"https?:|@import|\bimport\s|url\(|\bfetch\b", text)


# The shell


def test_the_widget_follows(explorer):
    widget = explorer.widget
    before = widget.state
    widget._handle_custom_msg({"change": {"pair": 1, "kind": "head"}}, [])
    assert widget.state["number"] > before["number"]
    assert widget.state["view"]["caption"] == explorer.view.caption == explorer.desk.batch.pairs.caption[1]
    assert widget.state["html"] == explorer.html(live=True) != before["html"]
    assert widget.state["code"] == explorer.code
    explorer.show(layer=3, head=2)
    assert widget.state["view"]["at"] == "3.2"
    json.dumps([widget.state, widget.choices])


def test_the_widget_says_what_went_wrong(explorer, monkeypatch):
    widget = explorer.widget
    widget._handle_custom_msg({"change": {"caption": ""}}, [])
    assert "the caption is empty" in widget.state["html"] and widget.state["view"]["caption"] == ""
    monkeypatch.setattr(explorer.desk, "look", lambda view: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        widget._receive(widget, {"change": {"pair": 0}}, [])
    assert "ZeroDivisionError" in widget.state["html"]


def test_choices_are_what_show_takes(explorer):
    choices = explorer.choices()
    assert choices["pairs"] == len(choices["pair"]) == 24
    for name in ("kind", "source", "run", "rows"):
        for value in explorer.desk.offers(explorer.view).get(name, choices[name]):
            assert value in choices[name]
            assert not explorer.show(**{"kind": "resid", "source": "counterpart", name: value}).message


def test_a_notebook_gets_a_widget_and_a_picture(explorer):
    data, _ = explorer._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id
    assert data["text/plain"] == repr(explorer)
    assert not HTMLText(data["text/html"]).buttons and "0.00" in data["text/html"]


def test_without_widgets_it_is_a_picture(explorer, monkeypatch):
    monkeypatch.setattr(shell, "find_spec", lambda name: None)
    data, _ = explorer._repr_mimebundle_()
    assert set(data) == {"text/plain", "text/html"}
    assert "pip install 'clip_lens[notebook]'" in HTMLText(data["text/html"]).words


def test_places_are_joined_from_the_page(explorer):
    """As the page does it: the cell's place as data, one more, and one less by its chip."""
    widget = explorer.widget
    html = HTMLText(widget.state["html"])
    first, second = html.sites[20], html.sites[31]
    widget._handle_custom_msg({"change": {"together": [first]}}, [])
    widget._handle_custom_msg({"change": {"together": [*widget.state["view"]["together"], second]}}, [])
    assert explorer.view.together == (Site(**first), Site(**second))
    assert json.loads(json.dumps(widget.state["view"]["together"])) == [first, second]
    setting = HTMLText(widget.state["html"]).settings
    assert {"together": [second]} in setting and {"together": []} in setting
    chosen = explorer.panels.layout.at(*explorer.panels.chosen)
    assert explorer.show(**setting[-1]).view.together == (Site(**first), Site(**second), chosen)


def test_a_picture_is_saved(explorer, tmp_path):
    explorer.show(kind="head", layer=2, head=1)
    html = explorer.save(tmp_path / "new" / "it.html").read_text()
    assert HTMLText(html).words.count("Head 1 of block 2") == 3 and "@keyframes" in html
    assert not re.search(r"https?://(?!www.w3.org)", html)
    table = pd.read_csv(explorer.save(tmp_path / "it.csv"))
    close(table.effect, explorer.effects.signed()[:, 0])
    explorer.show(caption="")
    for name in ("other.html", "other.csv"):
        with pytest.raises(ValueError, match="nothing to show: the caption is empty"):
            explorer.save(tmp_path / name)
        assert not (tmp_path / name).exists()


# Colours


def css_colours(dark):
    """The variables of a theme, as the style sheet sets them, and what JupyterLab gives."""
    blocks = re.findall(r"{([^}]*)}", (HERE / "explore.css").read_text())[: 2 if dark else 1]
    found = dict(re.findall(r"--cl-([\w-]+):\s*(#[0-9a-f]{6}|\.\d+)", " ".join(blocks)))
    words = ["#ffffff", "#e6e6e6"] if dark else ["#000000", "#222222"]
    papers = ["#111111", "#1b1b1b", "#1e1e1e"] if dark else ["#ffffff"]
    return found, words, papers


def luminance(colour):
    parts = [channel / 255 for channel in colour]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def rgb(colour):
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def contrast(one, other):
    darker, lighter = sorted(luminance(rgb(each) if isinstance(each, str) else each) for each in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("tone", ["plus", "minus", "weight"])
def test_words_on_cells_are_read_at_every_value(dark, tone):
    found, _, _ = css_colours(dark)
    for value in np.arange(0, 1.0005, 0.001):
        ground = [value * a + (1 - value) * b for a, b in zip(rgb(found[tone]), rgb(found["zero"]), strict=True)]
        words = found["off"] if value < float(found[f"turn-{tone}"]) - 1e-9 else found["on"]
        assert contrast(words, ground) >= 4.5, (value, contrast(words, ground))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_other_words_are_read(dark):
    found, words, papers = css_colours(dark)
    for paper in (*papers, found["fill"]):
        assert contrast(found["soft"], paper) >= 4.5
    for word in words:
        for ground in (*papers, found["fill"], found["zero"], found["note"], found["error"]):
            assert contrast(word, ground) >= 4.5


def test_colours_are_those_of_the_sheet():
    """The contrast tests read the sheet: cells take these variables, and turn where they say."""
    sheet = (HERE / "explore.css").read_text()
    assert "clamp(0%, calc((var(--cl-turn) - var(--v)) * 10000%), 100%), var(--cl-on))" in sheet
    for tone in ("minus", "weight"):
        assert re.search(rf"--cl-tone: var\(--cl-{tone}\)", sheet) and f"--cl-turn: var(--cl-turn-{tone})" in sheet
    assert "color-mix(in srgb, var(--cl-tone) calc(var(--v) * 100%), var(--cl-zero))" in sheet


def test_bars_stand_on_a_line_at_zero(explorer):
    explorer.show(pair=0)
    values = [text.logit for text in explorer.panels.texts] + [explorer.panels.patched.text.logit]
    zero = 100 * -min(*values, 0) / (max(*values, 0) - min(*values, 0))
    lines = re.findall(r'class="cl-zero" style="left:([\d.]+)%"', explorer.html())
    assert len(lines) == len(values) and all(abs(float(line) - zero) < 0.01 for line in lines)
    for (left, width), value in zip(
        re.findall(r"left:([\d.]+)%;width:([\d.]+)%", explorer.html()), values, strict=True
    ):
        ends = float(left) + float(width) if value < 0 else float(left)
        assert abs(ends - zero) < 0.02


def test_all_heads_of_the_block_are_drawn(explorer):
    explorer.show(pair=2, layer=1, head=3)
    html = explorer.html(live=True)
    drawn = re.findall(r"<svg viewBox=\"0 0 (\d+) \d+\" aria-hidden=\"true\">(.*?)</svg>", html)
    texts = [*explorer.panels.texts, explorer.panels.patched.text]
    patterns = [pattern for text in texts for pattern in text.patterns]
    assert len(drawn) == len(patterns) == 12
    for (side, squares), pattern in zip(drawn, patterns, strict=True):
        seen = np.zeros((int(side), int(side)))
        for x, y, opacity in re.findall(r'x="(\d+)" y="(\d+)" .*? fill-opacity="([\d.]+)"', squares):
            seen[int(y), int(x)] = float(opacity)
        assert np.abs(seen - pattern.numpy()).max() <= 0.02
