"""Readers of published data sets, on small files in exactly their layouts; texts are made up."""

import csv
import io
import json
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

from clip_lens import Pairs, read_pairs
from clip_lens.data import formats
from clip_lens.data.crops import crop_id, cropped
from clip_lens.data.formats import FORMATS, Format, choices, format_of, pair, register, texts_in


def rows_of(pairs: Pairs) -> list[tuple[str, ...]]:
    return list(zip(pairs.key, pairs.caption, pairs.foil, pairs.image, strict=True))


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


VALSE = {
    "dataset": "x",
    "dataset_idx": "7",
    "original_split": "val",
    "linguistic_phenomena": "plurals",
    "image_file": "x_7.jpg",
    "caption": "A small dog sits there.",
    "foils": ["Small dogs sit there."],
    "classes": "sg",
    "classes_foil": ["pl"],
    "mturk": {"foil": 0, "caption": 3, "other": 0},
    "foil": "Small dogs sit there.",
}
TASKS = {  # a caption and a foil of each task's kind
    "existence": ("There are no dogs.", "There are dogs.", "caption"),
    "plurals": ("A dog sits there.", "Some dogs sit there.", "none"),
    "counting": ("There are exactly 3 dogs.", "There are exactly 8 dogs.", "none"),
    "relations": ("A dog on a sofa.", "A dog under a sofa.", "none"),
    "actions": ("A man feeds a dog.", "A man washes a dog.", "none"),
    "actant swap": ("A man feeds a dog.", "A dog feeds a man.", "none"),
    "coreference": ("A man with a dog. Is it wet? no.", "A man with a dog. Is it wet? yes.", "none"),
    "coreference, Yes": ("A man with no dog. Is he wet? Yes", "A man with no dog. Is he wet? No", "none"),
    "foil-it": ("A dog on a bench.", "A cat on a bench.", "none"),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_of_valse(tmp_path, task):
    """A "no." that answers the question of the coreference task negates nothing."""
    caption, foil, side = TASKS[task]
    items = {
        f"{task}_1": {**VALSE, "caption": caption, "foil": foil},
        f"{task}_2": {**VALSE, "mturk": {"foil": 2, "caption": 1, "other": 0}},
    }
    (tmp_path / "task.json").write_text(json.dumps(items))
    pairs = read_pairs(tmp_path / "task.json")
    assert rows_of(pairs) == [(f"{task}_1", caption, foil, "x_7.jpg")]
    assert pairs.side == (side,) and list(pairs.dropped.key) == [f"{task}_2"]
    assert json.loads(pairs.info["mturk"][0]) == VALSE["mturk"] and "image_file" not in pairs.info


def test_no_is_a_negator_where_it_answers_nothing():
    assert Pairs(["a"], ["Dogs, no cats."], ["Dogs, cats."], ["1"]).side == ("caption",)
    assert Pairs(["a"], ["Dogs? There is no"], ["Dogs? There is one"], ["1"]).side == ("caption",)
    assert Pairs(["a"], ["Is there no dog? no."], ["Is there a dog? no."], ["1"]).side == ("caption",)


SUGAR = {"filename": "000000000001.jpg", "caption": "A red cup by a blue jug.",
         "negative_caption": "A blue cup by a red jug."}  # fmt: skip
SUGAR_PP = {"id": 0, "filename": "000000000001.jpg", "caption": "A tan cup.", "caption2": "The cup is tan.",
            "negative_caption": "A white cup."}  # fmt: skip
MCQ = {
    "image_path": "data/coco/images/val2017/000000000002.jpg",
    "caption_0": "This image has a cup but no jug",
    "caption_1": "This image has a jug",
    "caption_2": "This image has no cup",
    "caption_3": "This image has a jug but no cup",
    "correct_answer": 0,
    "correct_answer_template": "hybrid",
}
RETRIEVAL = [
    {"filepath": "val/1.jpg", "image_id": 1, "captions": "['A cup.', \"A cup, it's red.\"]"},
    {"filepath": "val/2.jpg", "image_id": 2, "captions": "['A jug.']"},
    {"filepath": "val/3.jpg", "image_id": 3, "captions": "['A hat.', 'No jug, a hat.']"},
]
CC_NEG = {
    "image_paths": ["ccneg_images/a/1.jpg", "ccneg_images/a/2.jpg"],
    "annotations": [
        {"json": {"caption": f"{one} on a table"}, "sop_data": {"negative-prompt": f"{one}, not on a table"}}
        for one in ("cup", "jug")
    ],
    "num_ops": {1: [0], 2: [1]},
}
ARO = {
    "image_id": "2317", "relation_name": "on", "object1_name": "cup", "bbox_x": 5, "bbox_y": 0, "bbox_w": 90,
    "bbox_h": 40, "true_caption": "the cup is on the box", "false_caption": "the box is on the cup",
    "image_path": "2317.jpg",
}  # fmt: skip
WHATSUP = {
    "image_path": "data/controlled_images/cup_on_box.jpeg",
    "caption_options": ["A cup on a box", "A cup under a box", "A cup left of a box", "A cup right of a box"],
}
CREPE = {"": 3, "image_id": 2317, "region_id": 9, "x": 4, "y": 6, "width": 20, "height": 10,
         "caption": "cup on box", "hard_negs": "['box on cup', 'cup on jug']", "complexity": 4}  # fmt: skip
WINOGROUND = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "a cup in a jug",
              "caption_1": "a jug in a cup", "tag": "Noun", "collapsed_tag": "Object"}  # fmt: skip
COLORSWAP = {"id": 4, "caption_1": "a red cup and a blue jug", "caption_2": "a blue cup and a red jug",
             "image_1": "images/4_1.png", "image_2": "images/4_2.png", "image_source": "midjourney"}  # fmt: skip

FILES = {  # format, file, content, the pairs that it holds
    "sugarcrepe": ("swap_att.json", json.dumps({"0": SUGAR}),
                   [("0", SUGAR["caption"], SUGAR["negative_caption"], "000000000001.jpg")]),
    "sugarcrepe++": ("swap.json", json.dumps([SUGAR_PP]),
                     [("0/0", "A tan cup.", "A white cup.", "000000000001.jpg"),
                      ("0/1", "The cup is tan.", "A white cup.", "000000000001.jpg")]),
    "negbench-mcq": ("mcq.csv", as_csv([{**MCQ, "correct_answer": 3}]),
                     [(f"0/{n}", MCQ["caption_3"], MCQ[f"caption_{n}"], MCQ["image_path"]) for n in range(3)]),
    "negbench-retrieval": ("retrieval.csv", as_csv(RETRIEVAL),
                           [("0/0", "A cup.", "A jug.", "val/1.jpg"),
                            ("0/1", "A cup, it's red.", "A jug.", "val/1.jpg"),
                            ("1/0", "A jug.", "A cup.", "val/2.jpg"), ("2/0", "A hat.", "A jug.", "val/3.jpg"),
                            ("2/1", "No jug, a hat.", "A jug.", "val/3.jpg")]),
    "aro": ("relation.json", json.dumps([ARO]),
            [("0", "the cup is on the box", "the box is on the cup", "2317.jpg#xywh=5,0,90,40")]),
    "whatsup": ("whatsup.json", json.dumps([WHATSUP]),
                [(f"0/{n}", "A cup on a box", WHATSUP["caption_options"][n + 1], WHATSUP["image_path"])
                 for n in range(3)]),
    "whatsup-coco": ("coco.json", json.dumps([[397133, "A cup on the left.", "A cup on the right."]]),
                     [("0", "A cup on the left.", "A cup on the right.", "000000397133.jpg")]),
    "whatsup-vg": ("vg.json", json.dumps([[2317, "A cup on the left.", "A cup on the right."]]),
                   [("0", "A cup on the left.", "A cup on the right.", "2317.jpg")]),
    "crepe": ("prod.csv", as_csv([CREPE]),
              [("0/0", "cup on box", "box on cup", "2317.jpg#xywh=4,6,20,10"),
               ("0/1", "cup on box", "cup on jug", "2317.jpg#xywh=4,6,20,10")]),
    "winoground": ("examples.jsonl", json.dumps(WINOGROUND) + "\n",
                   [("0/0", "a cup in a jug", "a jug in a cup", "ex_0_img_0"),
                    ("0/1", "a jug in a cup", "a cup in a jug", "ex_0_img_1")]),
    "colorswap": ("test.json", json.dumps([COLORSWAP]),
                  [("0/0", COLORSWAP["caption_1"], COLORSWAP["caption_2"], "images/4_1.png"),
                   ("0/1", COLORSWAP["caption_2"], COLORSWAP["caption_1"], "images/4_2.png")]),
}  # fmt: skip
ONLY_WHERE_ASKED = ("negbench-retrieval", "whatsup-coco", "whatsup-vg")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_layout(tmp_path, name):
    file, content, expected = FILES[name]
    (tmp_path / file).write_text(content)
    pairs = read_pairs(tmp_path / file, format=name)
    assert rows_of(pairs) == expected and pairs.name == file and not len(pairs.dropped)
    if name in ONLY_WHERE_ASKED:
        with pytest.raises(ValueError):
            read_pairs(tmp_path / file)
    else:
        assert read_pairs(tmp_path / file) == pairs  # recognised by its columns


def test_every_format_has_a_file_here():
    tested = {*FILES, "valse", "cc-neg", "crepe-atom", "crepe-comp"}
    assert tested == set(FORMATS)


def test_what_an_item_says_besides_stays_with_its_pairs(tmp_path):
    for name, column, value in (("negbench-mcq", "correct_answer_template", "hybrid"), ("aro", "relation_name", "on"),
                                ("crepe", "complexity", 4), ("winoground", "tag", "Noun"),
                                ("colorswap", "id", 4)):  # fmt: skip
        file, content, expected = FILES[name]
        (tmp_path / file).write_text(content)
        assert read_pairs(tmp_path / file).info[column].tolist() == [value] * len(expected)


def test_questions_say_how_many_pairs_they_have(tmp_path):
    for name, n in (("sugarcrepe++", 2), ("negbench-mcq", 3), ("whatsup", 3), ("crepe", 2), ("winoground", 2)):
        file, content, _ = FILES[name]
        (tmp_path / file).write_text(content)
        pairs = read_pairs(tmp_path / file)
        assert pairs.question == ("0",) * n and pairs.info["foils"].tolist() == [n] * n


@pytest.mark.parametrize("name", ["winoground", "colorswap", "negbench-retrieval"])
def test_the_image_that_a_foil_is_true_of(tmp_path, name):
    file, content, _ = FILES[name]
    (tmp_path / file).write_text(content)
    pairs = read_pairs(tmp_path / file, format=name)
    true_of = dict(zip(pairs.caption, pairs.image, strict=True))
    assert pairs.info["foil_image"].tolist() == [true_of[foil] for foil in pairs.foil]


def test_retrieval_goes_two_images_by_two_so_that_a_split_is_possible(tmp_path):
    many = [{"filepath": f"{n}.jpg", "captions": f"['thing {n}']"} for n in range(6)]
    (tmp_path / "r.csv").write_text(as_csv(many))
    pairs = read_pairs(tmp_path / "r.csv", format="negbench-retrieval")
    assert pairs.info["foil_image"].tolist() == [f"{n}.jpg" for n in (1, 0, 3, 2, 5, 4)]
    first, second = pairs.split(by="text")
    assert not set(first.caption + first.foil) & set(second.caption + second.foil)


@pytest.mark.parametrize("kind", ["atom", "comp"])
def test_systematicity_of_crepe_has_two_kinds_of_foils(tmp_path, kind):
    item = {"image_id": 1, "caption": "cup on box", "valid_hard_negs_atom": "['cup on jug']",
            "valid_hard_negs_comp": "['hat on jug', 'jug in hat']"}  # fmt: skip
    (tmp_path / "syst.csv").write_text(as_csv([item]))
    foils = {"atom": ("cup on jug",), "comp": ("hat on jug", "jug in hat")}[kind]
    assert read_pairs(tmp_path / "syst.csv", format=f"crepe-{kind}").foil == foils
    with pytest.raises(ValueError, match="fits the formats crepe-atom, crepe-comp; say which with format="):
        read_pairs(tmp_path / "syst.csv")


def test_cc_neg_is_a_dict_of_lists_in_a_pt_or_in_json(tmp_path):
    torch.save(CC_NEG, tmp_path / "ccneg.pt")
    pairs = read_pairs(tmp_path / "ccneg.pt")
    assert rows_of(pairs) == [
        ("0", "cup on a table", "cup, not on a table", "ccneg_images/a/1.jpg"),
        ("1", "jug on a table", "jug, not on a table", "ccneg_images/a/2.jpg"),
    ]
    assert pairs.side == ("foil", "foil")
    (tmp_path / "ccneg.json").write_text(json.dumps(CC_NEG))
    assert read_pairs(tmp_path / "ccneg.json") == pairs


class Ran:
    """Runs something as it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Ran, "ran", True)


def test_a_pt_with_objects_is_refused_and_not_run(tmp_path):
    torch.save({**CC_NEG, "object": Ran()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt holds Python objects.*weights_only=False.*save them as json"):
        read_pairs(tmp_path / "a.pt")
    assert not Ran.ran


def test_a_dataframe_is_read_like_a_file_with_its_columns(tmp_path):
    for name in ("negbench-mcq", "crepe", "winoground", "sugarcrepe++"):
        file, content, _ = FILES[name]
        (tmp_path / file).write_text(content)
        item = {"negbench-mcq": {**MCQ, "correct_answer": 3}, "crepe": CREPE, "winoground": WINOGROUND,
                "sugarcrepe++": SUGAR_PP}[name]  # fmt: skip
        pairs = read_pairs(pd.DataFrame([item], index=[17]))
        assert rows_of(pairs) == rows_of(read_pairs(tmp_path / file)) and pairs.name == "frame"
    frame = pd.DataFrame({"caption": ["a", "b"], "foil": ["c", "d"], "image": ["1", "2"], "n": [1, 2]}, index=[5, 5])
    assert rows_of(read_pairs(frame)) == [("0", "a", "c", "1"), ("1", "b", "d", "2")]
    assert read_pairs(frame) == Pairs.from_frame(frame)


MALFORMED = {
    "valse": (json.dumps({"a": {**VALSE, "mturk": {"caption": "3"}}}), ".json", "item 'a': '3' votes in mturk"),
    "sugarcrepe": (
        json.dumps({"0": SUGAR, "1": {"filename": "x.jpg", "caption": "a"}}),
        ".json",
        "item '1', has no negative_caption; a file of the format sugarcrepe has filename, caption, negative_caption",
    ),
    "sugarcrepe++": (json.dumps([SUGAR_PP, {**SUGAR}]), ".json", "entry 1, has no caption2"),
    "negbench-mcq": (as_csv([{**MCQ, "correct_answer": 4}]), ".csv", "row 0: correct_answer is 4; it is one of 0 to 3"),
    "negbench-mcq, a word": (as_csv([{**MCQ, "correct_answer": "b"}]), ".csv", "row 0: .*'b'.*multiple choice"),
    "negbench-retrieval": (
        as_csv([{"filepath": "1", "captions": "['a'"}] * 2),
        ".csv",
        "captions is .*no list of texts",
    ),
    "negbench-retrieval, one": (as_csv(RETRIEVAL[:1]), ".csv", "there is one image only"),
    "negbench-retrieval, code": (
        as_csv([{"filepath": "1", "captions": "__import__('os').getcwd()"}] * 2),
        ".csv",
        "captions is .*__import__.*no list of texts",
    ),
    "cc-neg": (
        json.dumps({**CC_NEG, "image_paths": ["1"]}),
        ".json",
        "lists of one length in image_paths, annotations",
    ),
    "cc-neg, no prompt": (
        json.dumps({"image_paths": ["1"], "annotations": [{"json": {"caption": "a"}}]}),
        ".json",
        "entry 0: it has no 'sop_data'; a file of the format cc-neg is CC-Neg",
    ),
    "aro": (json.dumps([{**ARO, "bbox_w": 0}]), ".json", r"entry 0: the box \(5, 0, 0, 40\) is none"),
    "whatsup": (json.dumps([{**WHATSUP, "caption_options": ["a"]}]), ".json", "a caption and a foil, got 1 and 0"),
    "whatsup, no texts": (
        json.dumps([{**WHATSUP, "caption_options": [1, 2]}]),
        ".json",
        "caption_options is .*no list",
    ),
    "whatsup-coco": (json.dumps([[1, "a"]]), ".json", "entry 0, has no 2"),
    "whatsup-vg": (json.dumps([[None, "a", "b"]]), ".json", "None is no name or number of an image"),
    "crepe": (as_csv([{**CREPE, "hard_negs": "box on cup"}]), ".csv", "row 0: hard_negs is 'box on cup', no list"),
    "crepe-atom": (as_csv([CREPE]), ".csv", "row 0, has no valid_hard_negs_atom"),
    "crepe-comp": (as_csv([CREPE]), ".csv", "row 0, has no valid_hard_negs_comp"),
    "winoground": (json.dumps([{**WINOGROUND}, {"id": 1}]), ".json", "entry 1, has no caption_0"),
    "colorswap": (json.dumps([{**COLORSWAP}, "x"]), ".json", "entry 1, is a text; it must be an object"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_of_each_layout_is_refused_by_name_and_place(tmp_path, case):
    content, ending, message = MALFORMED[case]
    file = tmp_path / f"broken{ending}"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(file, format=case.partition(",")[0])
    assert f"broken{ending}" in str(error.value)


def test_every_format_has_a_malformed_file_here():
    assert {case.partition(",")[0] for case in MALFORMED} == set(FORMATS)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut off"])
def test_a_damaged_pt_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.pt"):
        read_pairs(tmp_path / "a.pt")


def test_a_pt_of_something_else_says_what_fits(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt holds a list; it must hold a dict of the lists"):
        read_pairs(tmp_path / "a.pt")


def test_an_unknown_format_suggests_the_nearest(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"0": SUGAR}))
    with pytest.raises(ValueError, match=r"format='sugarcrep' is none; did you mean 'sugarcrepe'"):
        read_pairs(tmp_path / "a.json", format="sugarcrep")


def test_plain_columns_are_plain_whatever_else_there_is(tmp_path):
    row = {"caption": "a", "foil": "b", "image": "1", **SUGAR_PP}
    assert format_of(list(row), None, "x") is None and format_of(list(row), "sugarcrepe++", "x").name == "sugarcrepe++"
    frame = pd.DataFrame([{"caption": "a", "foil": "b", "image_file": "1.jpg"}])
    assert read_pairs(frame, format="plain").image == ("",)


def test_readers_of_others_are_registered_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_FORMATS", dict(FORMATS))
    monkeypatch.setattr(formats, "FORMATS", formats._FORMATS)

    def mine(key, item):
        yield pair(item.pop("good"), item.pop("bad"), f"{item.pop('file')}.png")

    own = register(Format("mine", "my pairs", ("file", "good", "bad"), mine))
    assert register(own) is own
    with pytest.raises(ValueError, match="'mine' is registered already; choose another name"):
        register(replace(own, about="others"))
    pairs = read_pairs(pd.DataFrame({"file": [1], "good": ["a cup"], "bad": ["a jug"], "more": ["x"]}))
    assert rows_of(pairs) == [("0", "a cup", "a jug", "1.png")] and pairs.info["more"].tolist() == ["x"]


def test_choices_are_every_caption_against_every_foil():
    made = [(one["caption"], one["foil"]) for one in choices("k", ["a", "b"], ["c", "d"])]
    assert made == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]


@pytest.mark.parametrize("value", ["[]", "['a', 1]", "{'a': 1}", "'a'", "[" * 10_000, "open('x')", 3, None, [""] * 0])
def test_no_list_of_texts(value):
    with pytest.raises(ValueError, match=r"captions is .*no list of texts"):
        texts_in(value, "captions")


def test_crops_are_ids_and_back():
    for name, box in (("a/b.jpg", (0, 5, 10, 20)), ("odd#name.png", (-3, 0, 1, 1))):
        assert cropped(crop_id(name, box)) == (name, box)
    assert cropped("a#xywh=1,2,3") == ("a#xywh=1,2,3", None)
    for box in ((0, 0, 0, 1), (0, 0, 1, -1), (0, 0.5, 1, 1), ("a", 0, 1, 1), (None, 0, 1, 1)):
        with pytest.raises(ValueError, match=re.escape(str(box))):
            crop_id("a.jpg", box)
