"""Questions that have nothing to do with negation, from a csv to the report: colours, word order, number."""

import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import pytest
import torch

import clip_lens
from clip_lens.cli.app import main
from clip_lens.data.slots import changed_slots, word_slots
from clip_lens.show.report.packed import unpack
from clip_lens.tiny.scenes import COLOURS, PLURALS, SHAPES, holds, sample_scene, save_pictures

NUMBERS = range(910_000, 910_160)
SLOT = re.compile(r"@(\w+)")


def two_things(scene):
    """The first two things of a scene if their colours can be swapped, and no such thing is in it."""
    if len(scene.things) != 2:
        return None
    a, b = scene.things
    return (a, b) if a.colour != b.colour and a.shape != b.shape else None


def binding():
    """Which colour belongs to which thing? Columns name the slots."""
    for scene in map(sample_scene, NUMBERS):
        if things := two_things(scene):
            a, b = things
            yield {
                "caption": f"There is a {a.colour} {a.shape} and a {b.colour} {b.shape}.",
                "foil": f"There is a {b.colour} {a.shape} and a {a.colour} {b.shape}.",
                "image": scene.image,
                "slot:colour_1:caption": a.colour,
                "slot:colour_1:foil": b.colour,
                "slot:shape_1": a.shape,
                "slot:colour_2:caption": b.colour,
                "slot:colour_2:foil": a.colour,
                "slot:shape_2": b.shape,
            }


def order():
    """Which shape does a colour that moves belong to? Columns name the slots."""
    for scene in map(sample_scene, NUMBERS):
        if things := two_things(scene):
            a, b = things
            yield {
                "caption": f"There is a {a.colour} {a.shape} and a {b.shape}.",
                "foil": f"There is a {a.shape} and a {a.colour} {b.shape}.",
                "image": scene.image,
                "slot:colour": a.colour,
                "slot:first_shape": a.shape,
                "slot:second_shape": b.shape,
            }


def counting():
    """One or several? Nobody names slots."""
    for scene in map(sample_scene, NUMBERS):
        for shape in SHAPES:
            number = sum(thing.shape == shape for thing in scene.things)
            texts = [f"There is a {shape}.", f"There are some {PLURALS[shape]}."]
            if number:
                caption, foil = texts if number == 1 else texts[::-1]
                yield {"caption": caption, "foil": foil, "image": scene.image}


def moved_colour(text, other, info):
    """The slots of `order` by a function: they need no columns."""
    words = text.removesuffix(".").split(" ")
    shapes = iter(("first_shape", "second_shape"))
    names = [next(shapes) if word in SHAPES else "colour" if word in COLOURS else None for word in words]
    ends = [len(" ".join(words[: at + 1])) for at in range(len(words))]
    return list(zip(ends, names, strict=True))


@dataclass
class Question:
    """Its rows, the same slots named another way, what its report calls them, and whether its foils are false."""

    rows: Callable
    slots: object
    words: tuple[str, ...]
    false: bool = True


QUESTIONS = {
    "colour binding": Question(
        binding,
        word_slots({"colour": COLOURS, "shape": SHAPES}, numbered=True),
        ("colour 1", "shape 1", "colour 2", "shape 2", "end of text"),
    ),
    "word order": Question(order, moved_colour, ("first shape", "second shape", "end of text")),
    "one or several": Question(counting, changed_slots, ("what changes", "end of text"), false=False),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    save_pictures(NUMBERS, folder / "pictures")
    return clip_lens.embed_images(
        folder / "pictures", model="tiny", out=folder / "pictures.safetensors", progress=False
    )


@pytest.fixture(scope="module", params=QUESTIONS)
def asked(request, images, tmp_path_factory):
    """A question's name, itself, its rows, and the folder that `clip-lens trace` wrote."""
    question, folder = QUESTIONS[request.param], tmp_path_factory.mktemp("asked")
    rows = pd.DataFrame(question.rows())[:40]
    rows.to_csv(folder / f"{request.param}.csv", index=False)
    images.save(folder / "pictures.safetensors")
    given = ["--pairs", str(folder / f"{request.param}.csv"), "--images", str(folder / "pictures.safetensors")]
    assert main(["trace", *given, "--segment", "all", "--quiet", "--out", str(folder / "out")]) == 0
    return request.param, question, rows, folder / "out"


def visible(page: str) -> str:
    """The words of a page between its tags, and those by which its pictures are described."""
    text = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", page)
    described = re.findall(r'\b(?:alt|title|aria-label|data-label)="([^"]*)"', text)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text) + " ".join(described)))


def packed(page: str) -> str:
    """The figures and the tables that a page's script unpacks."""
    files = json.loads(re.search(r'id="packed">(.*?)</script>', page, re.S)[1])
    return " ".join(unpack(file["gz"]).decode() for name, file in files.items() if name != "plotly")


def test_the_report_speaks_of_the_question_and_of_no_negation(asked):
    name, question, _, out = asked
    page = (out / "report.html").read_text(encoding="utf-8")
    words, drawn = visible(page), packed(page)
    assert f"tells captions from foils: {name}.csv" in words and "counterpart" in words
    assert [word for word in question.words if word not in drawn] == []
    assert question.words[0] in words
    of_negation = r"(?i)(?<!\w)(?:negati(?:on|ng)|negat(?:ed|or)|affirmative|subject|there|is / are)(?!\w)"
    assert re.findall(of_negation, drawn) == []
    assert re.findall(r"(?i).{30}(?:negat|affirmative|\bsubject\b).{30}", words) == []


def test_its_numbers_are_those_of_the_same_slots_named_another_way(asked, images):
    _, question, rows, out = asked
    encoder = clip_lens.load()
    pairs = clip_lens.read_pairs(rows[["caption", "foil", "image"]])
    batch = clip_lens.align(pairs, images, encoder, run="foil", slots=question.slots)
    kept = clip_lens.Effects.load(out / "resid-slots.parquet")
    own = clip_lens.patch_effects(encoder, batch, kept.places, progress=False)
    assert {SLOT.search(str(place))[1] for place in kept.places} == set(batch.occurring)
    assert torch.equal(kept.values.isnan(), own.values.isnan())
    torch.testing.assert_close(kept.values, own.values, rtol=1e-5, atol=1e-5, equal_nan=True)
    at_end = kept.places.index(clip_lens.Site("resid", 6, slot="eot"))
    torch.testing.assert_close(kept.values[at_end], kept.total, rtol=1e-4, atol=1e-4)


def test_captions_are_true_and_foils_false_by_the_scenes(asked):
    _, question, rows, _ = asked
    scenes = {scene.image: scene for scene in map(sample_scene, NUMBERS)}
    truths = {(holds(scenes[row.image], row.caption), holds(scenes[row.image], row.foil)) for row in rows.itertuples()}
    assert truths == ({(True, False)} if question.false else {(True, True)})  # "some" is one or more


def test_binding_and_order_are_known_to_the_embedded_model_and_number_is_not(images):
    encoder, found = clip_lens.load(), {}
    for name, question in QUESTIONS.items():
        batch = clip_lens.align(clip_lens.read_pairs(pd.DataFrame(question.rows())), images, encoder, run="foil")
        found[name] = clip_lens.scores(encoder, batch).iloc[0]
    assert min(found["colour binding"].lower, found["word order"].lower) > 0.8
    assert found["one or several"].mean_d < 0.2 < found["word order"].mean_d


def test_what_may_be_0_on_average_has_no_shares_and_the_report_says_so(asked):
    name, _, _, out = asked
    kept = clip_lens.Effects.load(out / "resid-slots.parquet")
    spread = 2 * kept.total.std() / len(kept.total) ** 0.5
    said = "d may be 0" in visible((out / "report.html").read_text(encoding="utf-8"))
    assert said == bool(kept.total.mean().abs() < spread) == (name == "one or several")
