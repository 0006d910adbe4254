"""Scenes: the captions' truth against an independent reading, the pixels against areas, the pairs' promises."""

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
from PIL import Image

from clip_lens.tiny.scenes import (
    ANY,
    COLOURS,
    FORMS,
    FRESH,
    HELD_OUT,
    KINDS,
    PLURALS,
    SHAPES,
    SIZE,
    Clause,
    Scene,
    Thing,
    clauses,
    holds,
    masks,
    parts,
    phrase,
    render,
    sample_scene,
    save_pictures,
    scene_pairs,
    subject_size,
    write,
)

RED = (1.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def pairs():
    return scene_pairs(800)


def square(x: float = 24, y: float = 24, radius: float = 6, angle: float = 0) -> Thing:
    return Thing("red", "square", x, y, radius, angle, RED)


def test_a_seed_fixes_the_scene_and_the_pixels():
    assert sample_scene(3) == sample_scene(3) != sample_scene(4)
    assert np.array_equal(render(sample_scene(3)), render(sample_scene(3)))
    assert not np.array_equal(render(sample_scene(3)), render(sample_scene(4)))


def test_a_scene_has_up_to_four_things_in_cells_of_their_own():
    scenes = [sample_scene(seed) for seed in range(400)]
    cells = [[(int(t.x // 16), int(t.y // 16)) for t in scene.things] for scene in scenes]
    assert {len(scene.things) for scene in scenes} == {0, 1, 2, 3, 4}
    assert all(len(set(taken)) == len(taken) for taken in cells)
    assert {t.colour for scene in scenes for t in scene.things} == set(COLOURS)
    assert {t.shape for scene in scenes for t in scene.things} == set(SHAPES)


def test_taking_a_thing_away_changes_its_pixels_and_no_others():
    scene = next(scene for scene in map(sample_scene, range(100)) if len(scene.things) == 3)
    fewer = replace(scene, things=scene.things[:2])
    changed = (render(scene) != render(fewer)).any(-1)
    assert changed.any()
    assert not (changed & (masks(scene)[2] == 0)).any()


@pytest.mark.parametrize(("shape", "area"), [("circle", np.pi * 0.95**2), ("square", 1.64**2), ("cross", 1.8684)])
def test_sizes_are_the_outlines_areas(shape, area):
    thing = Thing("red", shape, x=24.3, y=23.8, radius=12, angle=0.2, rgb=RED)
    assert subject_size(Scene(0, (thing,)), f"red {shape}") == pytest.approx(area * 144 / SIZE**2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_turned_or_shifted_thing_covers_the_same_area_within_the_picture(shape):
    sizes = [
        subject_size(Scene(0, (Thing("red", shape, 24 + shift, 24, 7, angle, RED),)), "shapes")
        for shift, angle in [(0, 0), (3.4, 0), (0, 0.4), (-2.2, -0.45)]
    ]
    assert sizes == pytest.approx([sizes[0]] * 4, rel=0.03)


def test_what_lies_below_is_not_counted():
    below, above = square(), replace(square(), colour="blue")
    scene = Scene(0, (below, above))
    assert subject_size(scene, "red square") == pytest.approx(0, abs=0.005)  # a grey edge stays of what lies below
    assert masks(scene).sum(0).max() <= 1 + 1e-9


def test_truth_is_read_from_the_words_and_the_things():
    scene = Scene(0, (square(8, 8), Thing("blue", "ring", 40, 40, 6, 0, (0.0, 0.0, 1.0))))
    true = [
        "There is a red square.",
        "A picture with some rings.",
        "We can see no blue square.",
        "There are some shapes.",
    ]
    false = ["There are no squares.", "There is a ring and a red ring.", "There is no blue shape and a red square."]
    assert all(holds(scene, caption) for caption in true)
    assert not any(holds(scene, caption) for caption in false)


def test_a_caption_without_a_claim_is_refused():
    with pytest.raises(ValueError, match="no claim found"):
        holds(sample_scene(0), "A picture of a dog.")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("negated", [True, False])
def test_a_written_caption_claims_what_it_was_written_for(form, negated):
    for colour, shape in [("white", "cross"), (ANY, "star"), ("blue", ANY), (ANY, ANY)]:
        subject = phrase(colour, shape, plural="{things}" in FORMS[form])
        caption = write(form, subject, negated=negated, other="red circle")
        assert Clause(colour, shape, negated) in clauses(caption)
        cut = parts(caption, subject)
        assert cut.determiner in {"no", "a", "some"} and (cut.determiner == "no") == negated
        joined = " ".join(filter(None, [cut.before, cut.determiner, cut.head, cut.rest, cut.suffix]))
        assert joined + cut.stop == caption


def test_parts_refuses_a_subject_that_is_not_there():
    with pytest.raises(ValueError, match="does not hold 'blue ring'"):
        parts("There is no red ring.", "blue ring")


def test_captions_hold_and_foils_do_not(pairs):
    for pair in pairs.itertuples():
        scene = sample_scene(pair.scene)
        assert holds(scene, pair.caption) and not holds(scene, pair.foil)


def test_the_columns_agree_with_a_reading_of_the_objects(pairs):
    for pair in pairs.itertuples():
        things = [(thing["colour"], thing["shape"]) for thing in json.loads(pair.objects)]
        there = any(pair.colour in (ANY, c) and pair.shape in (ANY, s) for c, s in things)
        assert there == (pair.negation == "foil") == (pair.subject_size > 0)
        both = pair.colour in {c for c, _ in things} and pair.shape in {s for _, s in things}
        assert both or pair.kind != "apart"
        assert ((pair.colour, pair.shape) in HELD_OUT) == (pair.kind == "held-out")


def test_the_word_before_the_subject_is_the_place_of_the_negator(pairs):
    for pair in pairs.itertuples():
        for text in (pair.caption, pair.foil):
            word = text.split(pair.subject)[0].split()[-1]
            assert word in {"no", "a", "an", "some"}
            assert (word == "no") == (text == getattr(pair, pair.negation))
            assert parts(text, pair.subject).determiner == word


def test_caption_and_foil_differ_in_one_token(pairs):
    tokenizer = open_clip.SimpleTokenizer()
    different = tokenizer(pairs.caption.tolist()) != tokenizer(pairs.foil.tolist())
    assert (different.sum(1) == 1).all()


def test_sides_alternate_and_every_form_and_kind_occurs(pairs):
    assert pairs.negation.tolist() == ["caption", "foil"] * 400
    assert set(pairs.form) == set(FORMS) and set(pairs.kind) == set(KINDS)
    assert pairs.key.is_unique and pairs.image.is_unique and pairs.scene.min() >= FRESH


def test_a_table_is_the_beginning_of_a_longer_one(pairs):
    assert scene_pairs(20).equals(pairs.head(20))


def test_the_kinds_asked_for_are_the_kinds_that_come():
    assert set(scene_pairs(20, kinds=("apart",), forms=("and-last",)).negation) == {"caption"}
    with pytest.raises(ValueError, match="kinds must be a non-empty sequence out of present, absent, apart, held-out"):
        scene_pairs(2, kinds=("gone",))
    with pytest.raises(ValueError, match="Got 'there-is'"):
        scene_pairs(2, forms="there-is")


def test_a_saved_picture_has_the_rendered_pixels(tmp_path):
    (path,) = save_pictures([FRESH], tmp_path)
    assert path.name == sample_scene(FRESH).image
    assert np.array_equal(np.asarray(Image.open(path)), render(sample_scene(FRESH)))


def test_phrases_have_their_plurals():
    assert [phrase("red", shape, plural=True) for shape in SHAPES] == [f"red {PLURALS[shape]}" for shape in SHAPES]
