"""Slots: what changes between two texts, words named by lists and columns, which rule names which pair."""

import random
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Text, agree, tower
from towers import random_encoder, random_store

import clip_lens
from clip_lens.core.source import mean, resample
from clip_lens.data.batch import align, match_tokens
from clip_lens.data.pairs import Pairs
from clip_lens.data.slots import SLOTS, changed_names, changed_slots, order_of, rules_of, template_slots, word_slots
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Site
from clip_lens.show.figures.heatmap import heatmap

SMALL = {"layers": 2, "width": 16, "heads": 2, "d_embed": 8}
SWAP = ("a red circle and a blue square", "a blue circle and a red square")
COLOUR = ("a red circle.", "a blue circle.")
INSERTION = ("a big dog runs", "a dog runs")
AT_THE_END = ("a dog runs fast", "a dog runs")
REWRITTEN = ("dogs bark loudly", "two cats")


@pytest.fixture(scope="module")
def causal():
    return random_encoder(**SMALL)


@pytest.fixture(scope="module")
def bidirectional():
    return random_encoder(causal=False, **SMALL)


@pytest.fixture(scope="module")
def pooled_last():
    return random_encoder(causal=False, pool_type="last", **SMALL)


def make(*texts, **info):
    captions, foils = zip(*texts, strict=True)
    keys = [f"pair {row}" for row in range(len(texts))]
    return Pairs(keys, captions, foils, [f"{row}.png" for row in range(len(texts))], pd.DataFrame(info))


def aligned(encoder, *texts, run="caption", slots=None, **info):
    pairs = make(*texts, **info)
    return align(pairs, random_store(pairs, encoder.d_embed), encoder, run=run, slots=slots)


def names_of(batch, row=0):
    """The slots of the run's and of the other's unpadded tokens."""
    names = [*batch.slots, None]
    texts = ((batch.slot, batch.length), (batch.other_slot, batch.other_length))
    return tuple([names[number] for number in slot[row, : int(length[row])].tolist()] for slot, length in texts)


# Changed_slots, by hand

B, C, W, A = "before", "changed", "between", "after"


@pytest.mark.parametrize(
    ("texts", "run", "other"),
    [
        (COLOUR, [B, C, A, A], [B, C, A, A]),
        (SWAP, [B, C, W, W, W, C, A], [B, C, W, W, W, C, A]),
        (INSERTION, [B, C, A, A], [B, A, A]),
        (AT_THE_END, [B, B, B, C], [B, B, B]),
        (REWRITTEN, [C, C, C], [C, C]),
        (("dogs", "dogs dogs"), [B], [B, C]),
        (("red dogs", "dogs"), [C, A], [A]),
        (("a red dog and a cat", "a dog and a black cat"), [B, C, W, W, W, A], [B, W, W, W, C, A]),
    ],
)
def test_what_changes_in_small_texts(causal, texts, run, other):
    """Of a tower's tokens the first is the start, the last the end; every word here is one token."""
    batch = aligned(causal, texts, slots=changed_slots)
    assert names_of(batch) == (["sot", *run, "eot"], ["sot", *other, "eot"])
    assert names_of(batch.flip()) == names_of(batch)[::-1]
    assert batch.slots == ("sot", "before", "changed", "between", "after", "eot")


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=7)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(tokens, tokens)
def test_what_changes_by_looking_left_and_right(run, other):
    """An unchanged token is `before` if all on its left are unchanged and nothing is missing there, and so on."""
    matched = [(p, q) for p, q in enumerate(match_tokens(run, other)) if q >= 0]
    named = changed_names(run, other, matched)
    same = {(p, q) for p, q in matched if run[p] == other[q]}

    def untouched(a, b, c, d):
        """Whether two stretches are the same tokens, matched one to one."""
        return b - a == d - c and all((a + k, c + k) in same for k in range(b - a))

    for p, name in enumerate(named[0]):
        (q,) = [to for at, to in same if at == p] or [None]
        if q is None:
            assert name == "changed"
            continue
        left, right = untouched(0, p, 0, q), untouched(p, len(run), q, len(other))
        assert name == ("before" if left else "after" if right else "between")
        assert named[1][q] == name
    assert [name for q, name in enumerate(named[1]) if q not in {to for _, to in same}] == ["changed"] * (
        len(other) - len(same)
    )
    back = changed_names(other, run, sorted((q, p) for p, q in matched))
    assert back == named[::-1]


words = st.lists(st.sampled_from(["red", "blue", "circle", "unicyclist", "no", "a", "."]), min_size=1, max_size=6)


@pytest.mark.parametrize("tower", ["causal", "bidirectional", "pooled_last"])
def test_every_position_that_is_no_padding_has_one_slot(tower, request):
    encoder, draw = request.getfixturevalue(tower), random.Random(0)
    vocabulary = ["red", "blue", "circle", "unicyclist", "no", "there", "is", "a", "."]
    texts = {tuple(" ".join(draw.choices(vocabulary, k=draw.randint(1, 6))) for _ in "cf") for _ in range(150)}
    texts = sorted((caption, foil) for caption, foil in texts if caption.split() != foil.split())
    batch = aligned(encoder, *texts, slots=changed_slots)
    for slot, tokens in ((batch.slot, batch.tokens), (batch.other_slot, batch.other)):
        written = torch.arange(tokens.shape[1]) < encoder.length(tokens)[:, None]
        written[torch.arange(len(tokens)), encoder.pool(tokens)] = True
        assert torch.equal(slot >= 0, written)
        assert torch.equal(
            slot == batch.slots.index("eot"), torch.arange(tokens.shape[1]) == encoder.pool(tokens)[:, None]
        )
        assert (slot[:, 0] == batch.slots.index("sot")).all()
    equal = batch.moved(batch.other) == batch.tokens
    unchanged = (batch.slot >= 0) & (batch.slot != batch.slots.index("changed"))
    assert (equal & (batch.origin >= 0))[unchanged].all() and len(batch) > 100
    assert torch.equal(batch.moved(batch.other_slot)[unchanged], batch.slot[unchanged])
    turned = aligned(encoder, *texts, run="foil", slots=changed_slots)
    assert torch.equal(turned.slot, batch.other_slot) and torch.equal(turned.other_slot, batch.slot)


# Which rule names which pair


def test_the_first_rule_that_fits_both_texts_names_a_pair(causal):
    texts = (("There are no dogs.", "There are some dogs."), COLOUR, ("There are dogs.", "There are no dogs."), SWAP)
    batch = aligned(causal, *texts, **{"slot:thing": ["", "circle", None, ""]})
    assert batch.named_by == ("template_slots", "span columns", "template_slots", "changed_slots")
    assert batch.slot_rules == {"template_slots": 2, "span columns": 1, "changed_slots": 1}
    assert batch.slots == ("sot", "thing", *SLOTS[1:-1], "before", "changed", "between", "after", "eot")
    assert names_of(batch, 1) == (["sot", None, None, "thing", None, "eot"],) * 2
    assert names_of(batch, 2) == (
        ["sot", "there", "be", "subject", "stop", "eot"],
        ["sot", "there", "be", "negator", "subject", "stop", "eot"],
    )


def test_names_are_carried_to_no_text_that_has_words_of_its_own(causal):
    """Either has a determiner in one text only; in the second pair the other text has a word of its own."""
    only = ("There are dogs.", "There are no dogs.")
    batch = aligned(causal, only, ("There are cats.", "There are no dogs."))
    assert batch.named_by == ("template_slots", "changed_slots")


def test_a_function_sees_both_texts_and_the_columns(causal):
    seen = []

    def slots(text, other, info):
        seen.append((text, other, info["kind"]))
        return [(len(text), "all_of_it")]

    batch = aligned(causal, COLOUR, SWAP, slots=slots, kind=["a", "b"])
    assert set(seen) == {(*COLOUR, "a"), (*COLOUR[::-1], "a"), (*SWAP, "b"), (*SWAP[::-1], "b")}
    assert names_of(batch)[0] == ["sot", *["all_of_it"] * 4, "eot"] and batch.slot_rules == {"slots": 2}


def test_slots_come_in_the_order_of_the_texts(causal):
    def slots(text, other, info):
        first, *_, last = text.split()
        return [(len(first), "zebra"), (len(text) - len(last), "middle"), (len(text), "ant")]

    assert aligned(causal, COLOUR, SWAP, slots=slots).slots == ("sot", "zebra", "middle", "ant", "eot")


def test_what_is_no_slot_function_is_refused_with_what_one_is(causal):
    for wrong in (3, lambda text, phrase: None, "changed"):
        with pytest.raises(TypeError, match=r"a slot function takes \(text, other, info\)"):
            aligned(causal, COLOUR, slots=wrong)
    assert [rule.title for rule in rules_of([template_slots, changed_slots])] == ["template_slots", "changed_slots"]


def test_an_order_that_a_batch_gives_holds_before_any_other():
    assert order_of(["eot", "b", "a", "sot"], ("sot", "a", "b", "eot")) == ["sot", "a", "b", "eot"]
    assert order_of(["x", "eot", 3, None, "negator", "after"]) == ["negator", "after", "x", "eot"]


# Words and columns


def test_words_by_lists(causal):
    colours = word_slots({"colour": ["red", "light blue", "blue"], "thing": "circle"})
    assert colours("A light  blue circle, redder", "", {}) == [(2, None), (13, "colour"), (14, None), (20, "thing")]
    assert colours("nothing", "", {}) is None
    assert word_slots({"colour": ["red", "blue"]}, numbered=True)(SWAP[0], "", {}) == [
        (2, None), (5, "colour_1"), (19, None), (23, "colour_2"),
    ]  # fmt: skip
    batch = aligned(causal, SWAP, ("a dog", "a cat"), slots=word_slots({"colour": ["red", "blue"]}, numbered=True))
    assert names_of(batch)[0] == ["sot", None, "colour_1", None, None, None, "colour_2", None, "eot"]
    assert batch.named_by == ("by_words", "changed_slots")


@pytest.mark.parametrize("lists", [{}, {"a": []}, {"a": ["x"], "b": ["X"]}, {"a": [" "]}])
def test_lists_without_words_or_with_one_word_twice_are_refused(lists):
    with pytest.raises(ValueError, match="each word stands in one list"):
        word_slots(lists)


def test_columns_name_the_words_of_a_slot(causal):
    columns = {
        "slot:colour": ["red", "RED"],
        "slot:colour:foil": ["blue", "blue"],
        "slot:first": ["a red [circle]", "red [circle] and"],
        "slot:count": [None, None],
    }
    columns["slot:first:foil"] = ["", "blue [circle]"]
    batch = aligned(causal, COLOUR, SWAP, **columns)
    assert names_of(batch, 1) == (
        ["sot", None, "colour", "first", None, None, None, None, "eot"],
        ["sot", None, "colour", "first", None, None, None, None, "eot"],
    )
    assert batch.slots == ("sot", "colour", "first", "eot")
    assert names_of(batch.flip(), 1) == names_of(batch, 1)[::-1]


def test_a_number_is_a_phrase_too(causal):
    pairs = make(("there are 3 dogs", "there are 4 dogs"), ("a dog", "a cat"))
    info = pd.DataFrame({"slot:count:caption": [3.0, None], "slot:count:foil": [4, 0]}).replace(0, None)
    batch = align(replace(pairs, info=info), random_store(pairs, 8), causal, run="caption")
    assert names_of(batch)[0] == names_of(batch)[1] == ["sot", None, None, "count", None, "eot"]
    assert batch.named_by == ("span columns", "changed_slots")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"slot:colour": "red circle"}, r"1 cell .*slot:colour 'red circle' stands nowhere in the foil of 'pair 0'"),
        ({"slot:thing": "a"}, r"2 cells .*'a' stands 2 times in the caption of 'pair 0'"),
        ({"slot:x": "red circle", "slot:y": "circle", "slot:x:foil": ""}, r"slot:x and slot:y overlap in the caption"),
        ({"slot:thing": "squar"}, r"'squar' stands nowhere"),
        ({"slot:eot": "a"}, r"no slot can be named 'eot'"),
        ({"slot:a b": "a"}, r"no slot can be named 'a b'"),
        ({"slot:thing:image": "a"}, r"'slot:thing:image' names no slot"),
    ],
)
def test_cells_that_fit_no_words_say_what_to_do(causal, columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        aligned(causal, SWAP, **{name: [phrase] for name, phrase in columns.items()})
    assert "cell" not in str(caught.value) or re.search(r"slot:NAME:foil.*'and a \[circle\]'", str(caught.value))


# What follows the slots: patching, averages, means, partners


@pytest.mark.parametrize("name", ["causal", "bidirectional", "bidirectional, pooled last"])
@pytest.mark.parametrize("run", ["caption", "foil"])
def test_patching_a_slot_is_patching_its_positions_by_hand(name, run):
    """Every text has its own positions of `changed`, found here by comparing tokens; the oracle is a tower by hand."""
    clip, encoder = tower(name)
    texts = (SWAP, COLOUR, INSERTION, ("a dog and a cat", "a black dog and cats"))
    pairs = make(*texts)
    batch = align(pairs, random_store(pairs, encoder.d_embed), encoder, run=run, slots=changed_slots)
    places = [Site(kind, layer, unit, "changed") for kind, unit in (("mlp", None), ("head", 1)) for layer in (0, 2)]
    effects = patch_effects(encoder, batch, [*places, Site("embed", slot="changed")])
    expected = []
    for place in effects.places:
        row = []
        for pair in range(len(batch)):
            text = Text(clip, batch, pair)
            ids, other = batch.tokens[pair].tolist(), batch.other[pair].tolist()
            end = int(encoder.length(batch.tokens)[pair])
            differ = [p for p in range(end) if text.origin[p] < 0 or other[text.origin[p]] != ids[p]]
            text.slots = ["changed" if p in differ else None for p in range(len(ids))]
            row.append(text.effect(place))
        expected.append(row)
    agree(effects, expected)
    assert effects.record.slots == batch.slots and effects.record.slot_rules == {"changed_slots": 4}


def test_slots_of_positions_are_averages_over_them():
    _, encoder = tower("causal")
    pairs = make(SWAP, COLOUR, INSERTION, AT_THE_END)
    batch = align(pairs, random_store(pairs, encoder.d_embed), encoder, run="caption", slots=changed_slots)
    single = patch_effects(encoder, batch, encoder.sites("resid", slots=range(batch.tokens.shape[1])))
    table = single.by_slot(batch).fraction()
    assert list(dict.fromkeys(table["slot"])) == ["sot", "before", "changed", "between", "after", "eot"]
    for line in table.itertuples():
        values = [
            float(-single.values[row, pair])
            for row, place in enumerate(single.places)
            for pair in range(len(batch))
            if place.layer == line.layer
            and place.slot < batch.length[pair]
            and batch.slots[batch.slot[pair, place.slot]] == line.slot
        ]
        values = [value for value in values if value == value]
        if values:
            assert line.effect == pytest.approx(sum(values) / len(values), abs=1e-10)
        else:
            assert line.effect != line.effect
    spread = single.by_slot(batch).localisation()
    behind = table[table["slot"].isin(["changed", "between", "after", "eot"])].groupby("layer")["fraction"]
    assert spread["localisation"].to_numpy() == pytest.approx(behind.std(ddof=0).to_numpy(), abs=1e-12)


def test_grids_have_the_order_of_the_batch(causal):
    def slots(text, other, info):
        first, *_, last = text.split()
        return [(len(first), "zebra"), (len(text) - len(last), "subject"), (len(text), "ant")]

    batch = aligned(causal, COLOUR, SWAP, slots=slots)
    effects = patch_effects(causal, batch, causal.sites("resid", slots=("eot", "ant", "zebra", "subject", "sot")))
    assert list(effects.grid().index) == ["sot", "zebra", "subject", "ant", "eot"]
    names = list(heatmap(effects).layout.yaxis.ticktext)
    assert names == ["start of text", "zebra", "subject", "ant", "end of text"]


def test_means_of_a_slot_are_taken_at_the_slot_of_that_name(causal):
    """The two batches count their slots otherwise; a slot that the first lacks has no mean."""
    colours = word_slots({"colour": ["red", "blue"]})
    things = word_slots({"thing": ["circle", "square"], "colour": ["red", "blue"]})
    over, batch = aligned(causal, SWAP, COLOUR, slots=colours), aligned(causal, SWAP, COLOUR, slots=things)
    assert over.slots.index("colour") == batch.slots.index("colour") == 1 and over.slots != batch.slots
    flat = aligned(causal, ("circle red", "circle blue"), slots=things)
    assert flat.slots.index("colour") == 2
    name = "blocks.0.hook_mlp_out"
    known = mean(over=over)(causal, flat)(torch.tensor([0]), [name])[name][0]
    own = mean(causal, over)(torch.tensor([0]), [name])[name][0]
    assert torch.equal(known[2], own[2]) and known[1].isnan().all() and not known[[0, 2, 3]].isnan().any()


def test_partners_have_the_same_slots(causal):
    texts = [(f"a {one} circle", f"a {two} circle") for one, two in (("red", "blue"), ("green", "red"))]
    batch = aligned(causal, *texts, INSERTION, slots=changed_slots)
    values = patch_effects(causal, batch, [Site("attn", 0)], source=resample(0)).values
    assert values.isnan().tolist() == [[False, False, True]]


def test_in_a_pair_without_negation_no_word_is_the_negators_unless_that_is_asked_for():
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    texts = [("There is a red circle.", "There is a blue circle."), ("There is no ring.", "There is a ring.")]
    pairs = clip_lens.Pairs(["a", "b"], *zip(*texts, strict=True), clip_lens.read_pairs().image[:2])
    batch = clip_lens.align(pairs, store, encoder, run="foil")
    assert batch.named_by == ("changed_slots", "template_slots")
    assert batch[:1].occurring == ("sot", "before", "changed", "after", "eot")
    asked = clip_lens.align(pairs[:1], store, encoder, run="foil", slots=template_slots)
    assert asked.named_by == ("template_slots",) and "negator" in asked.occurring
