"""explore shows the package's numbers, its code reproduces them, and the shell works with and without a frontend."""

import json
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from towers import random_encoder, random_store

import clip_lens
from clip_lens import Pairs, Site
from clip_lens.show.explore import shell
from clip_lens.show.explore.view import KINDS, Desk, View

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
    close(panels.d, logits[0] - logits[1])


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
    assert (panels.chosen, panels.view.query) == (4, 4)
    one = batch[[0]]
    _, cache = encoder.tower.run_with_cache(one.other)

    def patch(value, hook):
        value = value.clone()
        value[:, 4] = cache[hook.name][:, int(one.origin[0, 4])]
        return value

    patched = encoder(one.tokens, hooks=[("blocks.2.hook_resid_pre", patch)])
    close(panels.patched, (patched[0] * one.direction[0]).sum())


def test_patterns_and_direct_contributions(desk, encoder, batch):
    panels = desk.look(desk.change(desk.start(), kind="head", layer=1, head=2, query=4))
    for text, written in zip(panels.texts, (batch.pairs.caption[0], batch.pairs.foil[0]), strict=True):
        name = "blocks.1.attn.hook_pattern"
        close(text.pattern, encoder.cache([written], names=name)[name][0, 2])
        assert text.query == 4 and len(text.tokens) == len(text.pattern)
    effects = clip_lens.direct_effects(encoder, batch[[0]], [Site("head", 1, 2), Site("mlp", 5)])
    close([panels.direct.loc["head 2", 1], panels.direct.loc["MLP", 5]], effects.signed()[:, 0])
    everything = clip_lens.direct_effects(encoder, batch[[0]]).values.sum() * batch.sigma[0]
    close(everything, panels.d)  # what is shown are parts of d


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
    runs, other = explorer.panels.texts if int(space["one"].sigma) < 0 else explorer.panels.texts[::-1]
    for looks, text in zip(space["looks"], (runs, other), strict=True):
        close(looks[: len(text.tokens), : len(text.tokens)], text.pattern)
    layer = min(explorer.view.layer, encoder.n_layers - 1)
    close(space["adds"], explorer.panels.direct.iloc[explorer.view.head, layer])


# What goes wrong is said


WRONG = {
    "the foil is empty": {"foil": "  "},
    "the caption is empty": {"caption": ""},
    "the same tokens": {"caption": "There is a star.", "foil": "There is a star."},
    "are the same tokens": {"caption": "There is a star.", "foil": "there is a STAR."},
    "more than|longer than": {"foil": "star " * 100},
    "no image 'x.png'": {"image": "x.png"},
    "neither text is|no side": {"caption": "There is a star.", "foil": "There is a red star."},
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
    fine = {"pair": 0, "kind": "resid", "source": "counterpart", "head": 0, "query": None}
    assert not explorer.show(**fine).message and explorer.panels is not None  # the next change works


def test_no_numbers_while_there_is_an_error(explorer):
    explorer.show(foil="")
    with pytest.raises(ValueError, match="nothing to show: the foil is empty"):
        _ = explorer.effects
    assert "<table" not in explorer.html()


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
    assert desk.change(view, kind="head").layer == 5
    assert desk.change(view, kind="mlp").query == 3
    assert desk.change(view, run="foil").query is None
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
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.grid = given.get("data-grid", self.grid)
        if tag == "button" and "data-set" in given:
            self.buttons.append((self.grid, json.loads(given["data-set"]), "aria-pressed" in given))

    def handle_data(self, data):
        self.words += data


@pytest.mark.parametrize("changes", [{}, {"rows": "slot"}, {"kind": "head"}], ids=["token", "slot", "head"])
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
    from clip_lens.show.explore.widget import HERE

    for name in ("explore.js", "explore.css", "explore.html.j2"):
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
    widget._handle_custom_msg({"change": {"foil": ""}}, [])
    assert "the foil is empty" in widget.state["html"] and widget.state["view"]["foil"] == ""
    monkeypatch.setattr(explorer.desk, "look", lambda view: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        widget._receive(widget, {"change": {"pair": 0}}, [])
    assert "ZeroDivisionError" in widget.state["html"]


def test_choices_are_what_show_takes(explorer):
    choices = explorer.choices()
    assert choices["pairs"] == len(choices["pair"]) == 24
    for name in ("kind", "source", "run", "rows"):
        for value in choices[name]:
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
