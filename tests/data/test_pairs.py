"""Pairs: VALSE's published counts, formats that must mean the same, and every kind of unusable file."""

import json
import subprocess
import sys
from random import Random

import networkx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clip_lens
from clip_lens.data.pairs import NEGATORS, OWN, Pairs
from clip_lens.data.read import read_pairs

ROWS = [
    {"caption": "There are no cats.", "foil": "There are cats.", "image": "00123", "count": 0},
    {"caption": "There is a dog, a big one.", "foil": "There is no dog.", "image": "00007", "count": 1},
    {"caption": "Ein Vögelchen \u4e2d.", "foil": "A bird.", "image": "b/c d.png", "count": 2},
]


def write(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def as_csv(rows, **options):
    return pd.DataFrame(rows).to_csv(index=False, **options)


@pytest.fixture(scope="module")
def existence(shared):
    return read_pairs(shared / "data" / "valse" / "existence.json")


def test_valse_counts_are_the_published_ones(existence):
    assert len(existence) + len(existence.dropped) == 534
    assert (len(existence), existence.side.count("caption"), existence.side.count("foil")) == (505, 256, 249)
    assert len(set(existence.image)) == 505


def test_valse_rephrased_counts_are_the_papers(existence):
    rephrased = existence.rephrased()
    assert (len(rephrased), rephrased.side.count("caption"), rephrased.side.count("foil")) == (490, 250, 240)
    new = rephrased.dropped[~rephrased.dropped.key.isin(existence.dropped.key)]
    assert len(new) == 15 and new.reason.str.contains("neither").all()


def test_valse_rephrased_texts_are_equally_long_and_differ_by_one_word(existence):
    rephrased = existence.rephrased()
    for caption, foil in zip(rephrased.caption, rephrased.foil, strict=True):
        differ = [(a, b) for a, b in zip(caption.split(), foil.split(), strict=True) if a != b]
        assert len(differ) == 1 and "no" in differ[0]


def test_valse_provenance_agrees_with_counting_negators(existence):
    bare = Pairs(existence.key, existence.caption, existence.foil, existence.image)
    assert bare.side == existence.side


def test_valse_keys_images_and_fields(existence, shared):
    items = json.loads((shared / "data" / "valse" / "existence.json").read_text())
    assert all(items[key]["image_file"] == image for key, image in zip(existence.key, existence.image, strict=True))
    assert json.loads(existence.info["mturk"][0]) == items[existence.key[0]]["mturk"]
    assert (existence.dropped.reason.str.contains("annotators")).all()


def test_valse_form_without_votes_or_provenance(tmp_path):
    item = {"caption": "Two cats.", "foil": "Ten cats.", "image_file": "1.jpg", "linguistic_phenomena": "counting"}
    pairs = read_pairs(
        write(tmp_path, "counting.json", json.dumps({"a": item, "b": {**item, "mturk": {"caption": 1}}}))
    )
    assert (pairs.key, pairs.image, pairs.side) == (("a",), ("1.jpg",), ("none",))
    assert pairs.dropped.values.tolist() == [["b", "not valid: 1 annotators chose the caption, VALSE asks for 2"]]


FORMATS = {
    "plain.csv": as_csv(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ROWS).encode(),
    "crlf.csv": as_csv(ROWS, lineterminator="\r\n"),
    "shuffled.csv": as_csv(pd.DataFrame(ROWS)[["image", "foil", "count", "caption"]]),
    "UPPER.CSV": as_csv(ROWS),
    "list.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "lines.jsonl": "\n".join(map(json.dumps, ROWS)),
    "gaps.jsonl": "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
    "items.json": json.dumps({str(key): {**row, "image_file": row["image"]} for key, row in enumerate(ROWS)}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_mean_the_same(tmp_path, name):
    pairs = read_pairs(write(tmp_path, name, FORMATS[name]))
    assert pairs.key == ("0", "1", "2")
    assert pairs.image == ("00123", "00007", "b/c d.png")
    assert pairs.caption == tuple(row["caption"] for row in ROWS)
    assert pairs.foil == tuple(row["foil"] for row in ROWS)
    assert pairs.info["count"].tolist() == [0, 1, 2]
    assert pairs.side == ("caption", "foil", "none")
    assert pairs.name == name and not len(pairs.dropped)


def test_a_frame_read_back_is_the_same(tmp_path):
    pairs = read_pairs(write(tmp_path, "a.csv", as_csv([{**row, "negation": "foil"} for row in ROWS])))
    again = read_pairs(write(tmp_path, "b.csv", pairs.to_frame().to_csv(index=False)))
    assert again == pairs and again.digest == pairs.digest
    assert Pairs.from_frame(pairs.to_frame()) == pairs


def test_keys_come_from_their_column(tmp_path):
    pairs = read_pairs(write(tmp_path, "a.csv", as_csv([{**row, "key": f"0{n}"} for n, row in enumerate(ROWS)])))
    assert pairs.key == ("00", "01", "02")


def test_numbers_in_json_stay_as_they_are_written(tmp_path):
    rows = [{**ROWS[0], "image": 123, "key": 5}, {**ROWS[1], "image": None, "key": 6}]
    pairs = read_pairs(write(tmp_path, "a.json", json.dumps(rows)))
    assert (pairs.key, pairs.image) == (("5",), ("123",))
    assert pairs.dropped.values.tolist() == [["6", "image is empty or not text"]]


def test_words_that_pandas_takes_for_missing_are_text(tmp_path):
    pairs = read_pairs(write(tmp_path, "a.csv", "caption,foil,image,kind\nNone,null,NA,none\nnan,N/A,1e5,\n"))
    assert pairs.caption == ("None", "nan") and pairs.foil == ("null", "N/A") and pairs.image == ("NA", "1e5")
    assert pairs.info.kind[0] == "none" and pd.isna(pairs.info.kind[1])


def test_unusable_rows_are_listed_under_the_row_number_of_the_file(tmp_path):
    rows = [["", "f", "i"], ["c", " ", "i"], ["c", "f", ""], ["same", "same", "i"], ["good", "f", "i"]]
    pairs = read_pairs(write(tmp_path, "a.csv", as_csv(pd.DataFrame(rows, columns=["caption", "foil", "image"]))))
    assert pairs.key == ("4",)
    reasons = [f"{column} is empty or not text" for column in ("caption", "foil", "image")]
    expected = [["0", reasons[0]], ["1", reasons[1]], ["2", reasons[2]], ["3", "caption and foil are equal"]]
    assert pairs.dropped.values.tolist() == expected


@pytest.mark.parametrize("negator", [*NEGATORS, "No", "isn\u2019t", "Don't"])
def test_every_documented_negator_counts(negator):
    negated = f"There is{negator} a cat." if negator == "n't" else f"There {negator} a cat."
    assert Pairs("ab", [negated, "A cat."], ["A cat.", negated], "12").side == ("caption", "foil")


def test_negators_are_whole_words_and_more_of_them_win():
    texts = [("A note about nothingness.", "A knot."), ("no cat and no dog", "no cat"), ("no cat", "not a cat")]
    assert Pairs("abc", *zip(*texts, strict=True), "123").side == ("none", "caption", "none")


def test_negation_column_comes_first_then_provenance():
    texts = {"key": "a", "caption": ["There are no cats."], "foil": ["There are cats."], "image": "1"}
    provenance = pd.DataFrame({"provenance_of_foils": ["something_to_zero"]})
    assert Pairs(**texts, info=provenance).side == ("foil",)
    assert Pairs(**texts, info=provenance.assign(negation="none")).side == ("none",)
    assert Pairs(**texts, info=pd.DataFrame({"negation": [None]})).side == ("none",)


REPHRASED = [
    ("There are no cats.", "There are cats.", ("There are no cats.", "There are some cats.")),
    ("There are cats.", "There are no cats.", ("There are some cats.", "There are no cats.")),
    ("There is a cat.", "There is no cat.", ("There is a cat.", "There is no cat.")),
    ("There are no cats.", "There are some cats.", ("There are no cats.", "There are some cats.")),
    ("There are no cats.", "Cats sit.", "the text without negation"),
    ("No cats sit.", "Cats sit.", "neither with"),
    ("Thereare no cats.", "There are cats.", "neither with"),
    ("There are two cats.", "There are ten cats.", "no side"),
]


@pytest.mark.parametrize(("caption", "foil", "expected"), REPHRASED)
def test_rephrasing_one_pair(caption, foil, expected):
    good = ("There is no dog.", "There is a dog.")
    rephrased = Pairs("ab", [caption, good[0]], [foil, good[1]], "12").rephrased()
    if isinstance(expected, tuple):
        assert (rephrased.caption[0], rephrased.foil[0]) == expected and not len(rephrased.dropped)
        assert rephrased.rephrased().caption == rephrased.caption
    else:
        assert rephrased.key == ("b",) and rephrased.dropped.key.tolist() == ["a"]
        assert expected in rephrased.dropped.reason[0]


def test_rephrasing_nothing_says_why():
    with pytest.raises(ValueError, match=r"no pair of cats can be rephrased; 1 were dropped: a .*no side"):
        Pairs("a", ["A cat."], ["A dog."], "1", name="cats").rephrased()


@pytest.fixture
def many():
    rows = range(12)
    info = pd.DataFrame({"form": ["one", "two", "two"] * 4, "size": list(rows)})
    images = [f"{row // 3}.png" for row in rows]
    return Pairs([f"k{row}" for row in rows], [f"no {row}" for row in rows], [f"a {row}" for row in rows], images, info)


INDICES = [[1, 3], np.array([1, 3]), slice(1, 4, 2), (1, 3), [n in (1, 3) for n in range(12)], [-11, -9]]


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_indices_slices_and_masks_mean_the_same(many, index):
    picked = many[index]
    assert picked.key == ("k1", "k3") and picked.foil == ("a 1", "a 3") and picked.image == ("0.png", "1.png")
    assert picked.info["size"].tolist() == [1, 3] and picked.info.index.tolist() == [0, 1]
    assert picked == many[index] != many


def test_one_index_or_none_gives_pairs(many):
    assert many[5].key == ("k5",) and len(many[[]]) == 0 and len(many[:0].to_frame()) == 0


BAD_INDICES = [([12], "there are 12 pairs, got index 12"), ([True], "mask has 1 entries for 12"), (["k1"], "where")]


@pytest.mark.parametrize(("index", "message"), BAD_INDICES)
def test_wrong_indices_say_what_fits(many, index, message):
    with pytest.raises(IndexError, match=message):
        many[index]


def test_where_filters_by_value_and_by_collection(many):
    assert many.where(form="two", image=["0.png", "1.png"]).key == ("k1", "k2", "k4", "k5")
    assert many.where(size=range(2)).key == ("k0", "k1") == many.where(key={"k1", "k0"}, side="caption").key
    assert not len(many.where(form="two").dropped)


def test_where_filters_by_function(many):
    assert many.where(size=lambda size: size < 2).key == ("k0", "k1")
    with pytest.raises(ValueError, match="one truth value per pair"):
        many.where(size=lambda size: True)


def test_where_says_what_there_is(many):
    with pytest.raises(ValueError, match=r"no column 'from'; did you mean 'form'\?"):
        many.where(**{"from": "one"})
    with pytest.raises(ValueError, match=r"no column 'zzz'; there are key, caption, .*, size"):
        many.where(zzz=1)
    with pytest.raises(ValueError, match="no pair of pairs has form='three': form has 'one', 'two'"):
        many.where(form="three")


@given(
    images=st.lists(st.integers(0, 6), min_size=2, max_size=40).filter(lambda images: len(set(images)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_split_keeps_images_together_and_loses_nothing(images, fraction, seed):
    keys = [str(row) for row in range(len(images))]
    pairs = Pairs(keys, keys, [f"no {key}" for key in keys], [str(image) for image in images])
    first, second = pairs.split(fraction, seed)
    assert not set(first.image) & set(second.image) and len(first) and len(second)
    assert sorted([*first.key, *second.key]) == sorted(keys)
    assert first == pairs.split(fraction, seed)[0]
    assert abs(len(first) - fraction * len(pairs)) <= max(map(images.count, images))


def possible_sizes(groups):
    """Every number of pairs that some of the groups have together, but for none and all of them."""
    reached = {0}
    for size in groups:
        reached |= {size + other for other in reached}
    return reached - {0, sum(groups)}


@given(
    texts=st.lists(st.tuples(st.integers(0, 9), st.integers(10, 19)), min_size=2, max_size=30),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_split_by_text_keeps_chains_of_texts_together(texts, fraction, seed):
    keys = [str(row) for row in range(len(texts))]
    captions, foils = ([str(text) for text in column] for column in zip(*texts, strict=True))
    pairs = Pairs(keys, captions, foils, keys)
    graph = networkx.Graph([(key, text) for key, both in zip(keys, texts, strict=True) for text in both])
    sizes = [sum(isinstance(node, str) for node in part) for part in networkx.connected_components(graph)]
    if len(sizes) == 1:
        with pytest.raises(ValueError, match=f"by text needs pairs of at least 2 groups .* got {len(keys)} pairs of 1"):
            pairs.split(fraction, seed, by="text")
        return
    first, second = pairs.split(fraction, seed, by="text")
    assert not {*first.caption, *first.foil} & {*second.caption, *second.foil}
    assert sorted([*first.key, *second.key], key=int) == keys and len(first) and len(second)
    assert first == pairs.split(fraction, seed, by="text")[0]
    best = min(abs(size - fraction * len(pairs)) for size in possible_sizes(sizes))
    assert abs(len(first) - fraction * len(pairs)) <= best + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_the_parts_come_as_close_as_a_large_group_allows(seed):
    rows = range(40)
    pairs = Pairs(
        [f"k{row}" for row in rows],
        ["the same" if row < 25 else f"a {row}" for row in rows],
        [f"no {row}" for row in rows],
        [f"{row}.png" for row in rows],
    )
    for fraction, size in ((0.3, 12), (0.5, 15), (0.6, 25), (0.7, 28), (0.99, 39), (0.01, 1)):
        first, second = pairs.split(fraction, seed, by="text")
        assert (len(first), len(second)) == (size, 40 - size)
        assert ("the same" in first.caption) == (size >= 25)


def test_both_parts_have_their_share_of_large_groups():
    rows = range(60)
    captions = [f"a {row // 10}" if row < 40 else f"a {row}" for row in rows]
    pairs = Pairs([*map(str, rows)], captions, [f"no {row}" for row in rows], [*map(str, rows)])
    drawn = [pairs.split(0.5, seed, by="text") for seed in range(10)]
    assert all(sum(int(key) < 40 for key in part.key) == 20 for parts in drawn for part in parts)
    assert len({first.key for first, _ in drawn}) > 5


def test_split_by_text_joins_pairs_of_one_image():
    pairs = Pairs("abcd", ["a 1", "a 2", "a 3", "a 4"], ["no 1", "no 2", "no 3", "no 4"], "xxyz")
    for seed in range(10):
        assert any(set("ab") <= set(part.key) for part in pairs.split(0.5, seed, by="text"))


def test_a_text_may_be_named_like_an_image():
    pairs = Pairs("ab", ["x", "p"], ["q", "r"], ["p", "x"])
    assert [len(part) for part in pairs.split(0.5, by="text")] == [1, 1]


def test_split_by_image_draws_what_it_always_drew(many):
    assert many.split(0.5, 0)[0].key == ("k0", "k1", "k2", "k6", "k7", "k8")
    numbers = [27, 108, 472, 623, 660, 687, 789, 993, 1154, 1171, 1201, 1276]
    assert read_pairs("tiny").split(0.01, 3)[0].key == tuple(f"scene-{500000 + number}" for number in numbers)


def test_split_refuses_an_unknown_by(many):
    with pytest.raises(ValueError, match="by='caption'; a split is by one of image, text"):
        many.split(by="caption")


@pytest.mark.parametrize("source", ["tiny", "valse"])
def test_real_pairs_split_by_text_in_half(source, request):
    pairs = read_pairs()
    if source == "valse":
        pairs = read_pairs(request.getfixturevalue("shared") / "data" / "valse" / "existence.json").rephrased()
    first, second = pairs.split(0.5, 0, by="text")
    assert not {*first.caption, *first.foil, *first.image} & {*second.caption, *second.foil, *second.image}
    assert len(first) == len(second) == len(pairs) // 2


def test_split_depends_on_the_seed(many):
    assert len({many.split(0.5, seed)[0].key for seed in range(8)}) > 1


def test_split_refuses_what_it_cannot_do(many):
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1.5"):
        many.split(1.5)
    with pytest.raises(ValueError, match="at least 2 images, got 3 pairs of 1"):
        many[:3].split()


def test_digest_follows_the_content_not_the_name(many):
    frame = many.to_frame().drop(columns="side")
    assert Pairs.from_frame(frame, "other").digest == many.digest
    changed = frame.assign(caption=["yes 0", *frame.caption[1:]])
    assert Pairs.from_frame(changed).digest != many.digest
    assert Pairs.from_frame(frame.assign(form="x")).digest != many.digest


def test_digest_and_side_follow_an_edited_column(many):
    pairs = many[:]
    before = pairs.digest, hash(pairs), pairs.side
    assert pairs == many
    pairs.info.loc[2, "size"] = 99
    assert pairs.digest != before[0] and hash(pairs) != before[1] and pairs != many
    pairs.info["negation"] = "foil"
    assert pairs.side == ("foil",) * 12 != before[2]
    del pairs.info["negation"]
    pairs.info.loc[2, "size"] = 2
    assert (pairs.digest, hash(pairs), pairs.side) == before and pairs == many


def test_pairs_are_immutable(many):
    with pytest.raises(AttributeError):
        many.caption = ()
    with pytest.raises(TypeError):
        many.caption[0] = "x"


def test_html_shows_counts_and_escapes_texts():
    shown = Pairs("a", ["no <b>"], ["a <b>"], "1", name="<x>")._repr_html_()
    assert "1 pair, negation in 1 caption, 0 foil, 0 none" in shown and "no &lt;b&gt;" in shown and "<x>" not in shown


def test_columns_must_fit_together():
    with pytest.raises(ValueError, match="one entry per pair"):
        Pairs(["a"], ["x"], [], ["1"])
    with pytest.raises(ValueError, match=r"repeats 1 keys: 'a'"):
        Pairs(["a", "a"], "xy", "zw", "12")
    with pytest.raises(ValueError, match=r"pairs can't have further columns named side: .* rename them"):
        Pairs("a", "x", "y", "1", info=pd.DataFrame({"side": ["foil"]}))
    with pytest.raises(ValueError, match="pairs has several columns named x; remove or rename all but one"):
        Pairs("a", "x", "y", "1", info=pd.DataFrame([[1, 2]], columns=["x", "x"]))
    with pytest.raises(ValueError, match="frame has several columns named foil"):
        Pairs.from_frame(pd.DataFrame([list("abcd")], columns=["caption", "foil", "image", "foil"]))


def test_importing_pairs_imports_no_model_library():
    code = (
        "import sys, clip_lens.data.pairs; print(sorted({'torch', 'open_clip', 'transformer_lens'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


GOOD = json.dumps(ROWS[0])
BAD = {
    "empty": ("a.csv", "\n", "a.csv is empty; it must have columns caption, foil, image"),
    "extension": ("a.xlsx", "x", r"ends in '.xlsx', known are .csv, .json, .jsonl"),
    "columns": ("a.csv", "caption,text\na,b\n", r"no column foil, image; found 'caption', 'text'; name the columns"),
    "columns of json": ("a.json", '[{"caption": "a"}]', "no column foil, image; found 'caption'"),
    "header only": ("a.csv", "caption,foil,image\n", "no pair of a.csv is left; it has no rows"),
    "empty list": ("a.json", "[]", "no pair of a.json is left; it has no rows"),
    "nothing usable": (
        "a.csv",
        "caption,foil,image\na,a,1\n",
        r"no pair of a.csv is left; 1 were dropped: 0 \(caption",
    ),
    "nothing valid": (
        "a.json",
        json.dumps({"a": {**ROWS[0], "mturk": {"caption": 0}}}),
        r"left; 1 were dropped: a \(not valid",
    ),
    "broken json": ("a.json", '[{"caption": }]', "a.json is broken json: Expecting value at column 14; mend"),
    "broken json, lines": ("a.json", "[\n{]", "broken json: .* at line 2, column 2"),
    "broken jsonl": ("a.jsonl", f"{GOOD}\n\n{GOOD[:-5]}\n", "a.jsonl, line 3 is broken json"),
    "no object": ("a.jsonl", f"{GOOD}\n[1]\n", "line 2, is a list; it must be an object with caption, foil, image"),
    "other json": ("a.json", '{"caption": ["a"]}', "holds an object; it must hold a list of objects"),
    "a number": ("a.json", "3", "holds a number; it must hold a list of objects"),
    "repeated json key": ("a.json", f'{{"a": {GOOD}, "a": {GOOD}}}', "repeats 'a'; every key may stand once"),
    "repeated keys": (
        "a.csv",
        "key,caption,foil,image\nx,a,b,1\nx,c,d,2\n",
        "a.csv repeats 1 keys: 'x'; every pair needs a key of its own",
    ),
    "keys missing": ("a.csv", "key,caption,foil,image\nx,a,b,1\n,c,d,2\n", r"no key in rows '1' \(from 0\); fill"),
    "comma in a text": (
        "a.csv",
        "caption,foil,image\na,b,1\na, or b,c,2\n",
        "a.csv, line 3, has 4 fields, the header has 3; put quotes around texts with commas",
    ),
    "commas in every text": ("a.csv", "caption,foil,image\na, or b,c,2\n", "line 2, has 4 fields, the header has 3"),
    "cut off": ("a.csv", "caption,foil,image\na,b,1\n\nc,d", "a.csv, line 4, has 2 fields, the header has 3"),
    "two captions": (
        "a.csv",
        "caption,foil,image,caption\na,b,1,c\n",
        "a.csv has several columns named caption; remove or rename all but one",
    ),
    "two columns": ("a.csv", "caption,foil,image,x,y,x,y\na,b,1,c,d,e,f\n", "several columns named x, y; remove"),
    "open quote": (
        "a.csv",
        'caption,foil,image\na,b,1\n"c,d,2\ne,f,3\ng,h,4\n',
        r"a.csv, line 3, is not readable as csv \(unexpected end of data\); close every quote, and double those inside",
    ),
    "open quote in the header": ("a.csv", 'caption,"foil,image\na,b,1\n', "a.csv, line 1, is not readable as csv"),
    "quote closed in a later line": (
        "a.csv",
        'caption,foil,image\na,b,1\n"c,d,2\ne,"f",3\n',
        "a.csv, line 3, is not readable as csv .*close every quote",
    ),
    "quote in a quoted text": (
        "a.csv",
        'caption,foil,image\n"a "b" c",b,1\n',
        "line 2, is not readable .*double those",
    ),
    "NUL": ("a.csv", "caption,foil,image\na,b,1\nc,d\0,2\n", "a.csv, line 3, has a NUL: the file is damaged, .*UTF-8"),
    "NUL in json": ("a.jsonl", GOOD + "\n\0\n", "a.jsonl, line 2, has a NUL"),
    "nested too deeply": ("a.json", "[" * 100_000, "a.json is broken json: it is nested too deeply; mend"),
    "votes that are no number": (
        "a.json",
        json.dumps({"a": {**ROWS[0], "mturk": {"caption": "2"}}}),
        "a.json, item 'a': '2' votes in mturk; they must be a number",
    ),
    **{
        f"column {name}": (
            "a.csv",
            f"caption,foil,image,{name},sure\na,b,1,2,3\n",
            f"a.csv can't have further columns named {name}: results have their own by these names; rename them",
        )
        for name in ("sigma", "d", "segment", "unaligned")
    },
    "several of ours": (
        "a.jsonl",
        json.dumps({**ROWS[0], "segment": "x", "d": 1}),
        "a.jsonl can't have further columns named d, segment: ",
    ),
    "only a mark": ("a.csv", "\ufeff", "a.csv is empty"),
    "negation": ("a.csv", "caption,foil,image,negation\na,b,1,yes\n", "says 'yes'; it must say caption, foil or none"),
    "two sides": (
        "a.csv",
        "caption,foil,image,negation,side\na,b,1,foil,caption\n",
        "side and negation and they differ; keep the one",
    ),
    "encoding": (
        "a.csv",
        "caption,foil,image\nV\xf6gel,b,1\n".encode("latin-1"),
        "isn't UTF-8 text .* save it as UTF-8",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_given_and_what_to_do(tmp_path, case):
    name, content, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path, name, content))


def test_columns_of_results_are_all_reserved():
    """Whatever a table of results has of its own can't be a column of the pairs, or it would vanish there."""
    encoder = clip_lens.load()
    batch = clip_lens.align(read_pairs("tiny")[:2], clip_lens.ImageStore.open("tiny"), encoder)
    effects = clip_lens.patch_effects(encoder, batch, [clip_lens.Site("resid", 0)], progress=False)
    assert set(effects.pairs) - set(batch.pairs.info) == set(OWN)


def test_quotes_commas_and_lines_within_texts_are_read_as_they_are(tmp_path):
    rows = ['"no ""big"" cats, really",a,1.jpg,x', '"two\nlines",b,2.jpg,', "", "  ", ' a , 5" disk,3.jpg,"y"']
    pairs = read_pairs(write(tmp_path, "a.csv", "\n".join(["caption,foil,image,note", *rows])))
    assert pairs.caption == ('no "big" cats, really', "two\nlines", " a ") and pairs.foil == ("a", "b", ' 5" disk')
    assert pairs.info.note.tolist()[::2] == ["x", "y"] and pd.isna(pairs.info.note[1])


DAMAGED = {
    "a.csv": as_csv([{**row, "negation": "none", "note": 'a "b", c'} for row in ROWS] * 3),
    "a.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "a.jsonl": "\n".join(json.dumps({**row, "tags": ["x", {"y": 1}]}) for row in ROWS),
    "items.json": json.dumps({f"k{n}": {**row, "mturk": {"caption": 2, "foil": 1}} for n, row in enumerate(ROWS)}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_read_or_refused_by_name(tmp_path, name):
    """A byte is changed, left out or added, or the end is cut off, at 300 places: never a foreign error."""
    content, draw, refused = DAMAGED[name].encode(), Random(0), 0
    for number in range(300):
        at, byte = (
            draw.randrange(len(content)),
            bytes([draw.choice(b'"\\,\n{}[]:x7-\0\xff ') if number % 2 else draw.randrange(256)]),
        )
        rest = {0: content[at + 1 :], 1: content[at:], 2: b""}[number % 3]
        file = write(tmp_path, name, content[:at] + byte * (number % 5 > 0) + rest)
        try:
            assert len(read_pairs(file))
        except ValueError as error:
            refused += 1
            assert name in str(error)
    assert refused > 100


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.csv does not exist; give a .csv, .json, .jsonl file of pairs"):
        read_pairs(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        read_pairs(tmp_path)
