"""Batch: alignment against brute force, slots word by word, what is dropped and what is refused."""

import re
from dataclasses import replace
from itertools import combinations
from random import Random

import open_clip
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from towers import random_clip, random_encoder, random_store

from clip_lens.data.batch import align, match_tokens
from clip_lens.data.images import ImageStore
from clip_lens.data.pairs import Pairs
from clip_lens.data.read import read_pairs
from clip_lens.data.slots import template_slots
from clip_lens.model.load import load

TENSORS = ("tokens", "other", "origin", "slot", "other_slot", "length", "other_length", "direction", "sigma")
SMALL = {"layers": 1, "width": 16, "heads": 2, "d_embed": 8}


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
    """Pairs from (caption, foil) tuples."""
    captions, foils = zip(*texts, strict=True)
    keys = [f"pair {row}" for row in range(len(texts))]
    return Pairs(keys, captions, foils, [f"{row}.png" for row in range(len(texts))], pd.DataFrame(info))


def aligned(encoder, *texts, run="foil", **info):
    pairs = make(*texts, **info)
    return align(pairs, random_store(pairs, encoder.d_embed), encoder, run=run)


# Match_tokens


def alignments(n, m, i=0, j=0):
    """Every alignment of n with m tokens, as the tuple of its matched pairs."""
    if i == n or j == m:
        yield ()
        return
    for rest in alignments(n, m, i + 1, j + 1):
        yield ((i, j), *rest)
    yield from (found for found in alignments(n, m, i + 1, j))
    yield from (found for found in alignments(n, m, i, j + 1))


def quality(run, other, pairs):
    """(edits, - equal tokens): the less, the better."""
    equal = sum(run[i] == other[j] for i, j in pairs)
    return len(run) + len(other) - len(pairs) - equal, -equal


def optimal(run, other):
    found = set(alignments(len(run), len(other)))
    best = min(quality(run, other, pairs) for pairs in found)
    return {pairs for pairs in found if quality(run, other, pairs) == best}


def as_pairs(origin):
    return tuple((i, j) for i, j in enumerate(origin) if j >= 0)


def is_further_left(one, two):
    """Whether `one` matches pair by pair nowhere further right than `two`, in neither text."""
    return one != two and all(i <= k and j <= m for (i, j), (k, m) in zip(one, two, strict=True))


sequences = st.lists(st.integers(0, 3), max_size=5)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(sequences, sequences)
def test_alignment_is_optimal_and_none_that_is_as_good_lies_further_left(run, other):
    found = as_pairs(match_tokens(run, other))
    best = optimal(run, other)
    assert found in best
    assert not any(is_further_left(pairs, found) for pairs in best if len(pairs) == len(found))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.integers(0, 4), max_size=12))
def test_swapping_the_texts_inverts_the_alignment(run, other):
    forth, back = as_pairs(match_tokens(run, other)), as_pairs(match_tokens(other, run))
    assert sorted((j, i) for i, j in back) == sorted(forth)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(sequences, sequences, sequences)
def test_a_common_beginning_is_matched_with_itself(beginning, run, other):
    found = match_tokens(beginning + run, beginning + other)
    assert found[: len(beginning)] == list(range(len(beginning)))


@pytest.mark.parametrize(
    ("run", "other", "expected"),
    [
        ([1, 5, 6, 9], [1, 5, 6, 9], [0, 1, 2, 3]),
        ([1, 5, 6, 9], [1, 7, 6, 9], [0, 1, 2, 3]),  # a substitute counts as counterpart
        ([1, 5, 9], [1, 5, 6, 9], [0, 1, 3]),  # the other has one more
        ([1, 5, 6, 9], [1, 6, 9], [0, -1, 1, 2]),  # the run has one more
        ([1, 5, 9], [1, 5, 5, 9], [0, 1, 3]),  # the left one of two equal ones
        ([1, 5, 5, 9], [1, 5, 9], [0, 1, -1, 2]),
        ([1, 5, 6, 9], [1, 7, 9], [0, 1, -1, 2]),  # substitute the left one, leave out the right one
        ([1, 2, 3, 4, 9], [1, 4, 9], [0, -1, -1, 1, 2]),
        ([1, 2, 3, 9], [1, 3, 2, 9], [0, -1, 1, 3]),  # two edits either way; a match beats two substitutes
        ([1, 3, 2, 9], [1, 2, 3, 9], [0, 2, -1, 3]),
        ([], [1, 2], []),
        ([1, 2], [], [-1, -1]),
    ],
)
def test_hand_made_alignments(run, other, expected):
    assert match_tokens(run, other) == expected


# Align: what matches what

INSERTED = ("There are no dogs in the old park.", "There are dogs in the old park.")
SWAPPED = ("A dog chases a cat.", "A cat chases a dog.")
REPHRASED = ("There are no dogs.", "There are some dogs.")
LONGER = ("No dog.", "There is a big red dog on the road.")


def test_inserted_token_has_no_counterpart_and_nothing_shifts(causal):
    batch = aligned(causal, INSERTED, run="caption")
    assert batch.origin.tolist() == [[0, 1, 2, -1, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.unaligned.tolist() == [1]
    assert batch.flip().origin.tolist() == [[0, 1, 2, 4, 5, 6, 7, 8, 9, 10]]
    assert batch.flip().unaligned.tolist() == [0]


@pytest.mark.parametrize("tower", ["causal", "bidirectional", "pooled_last"])
def test_alignment_equals_brute_force_on_texts(tower, request):
    """The texts up to their ends by enumeration, padding from the right, the pooled position with the pooled one."""
    encoder = request.getfixturevalue(tower)
    texts = (("Dogs.", "No dogs."), ("A cat.", "Cats."), ("No cat.", "Cat no."), ("Dogs.", "Cats!"))
    batch = aligned(encoder, *texts)
    for row in range(len(texts)):
        ids, other = batch.tokens[row].tolist(), batch.other[row].tolist()
        end, other_end = ids.index(49407) + 1, other.index(49407) + 1
        assert as_pairs(batch.origin[row, :end].tolist()) in optimal(ids[:end], other[:other_end])
        pads = [] if encoder.causal else [i if i >= other_end else -1 for i in range(end, 16)]
        assert batch.origin[row, end : end + len(pads)].tolist() == pads
        pooled = encoder.pool(batch.tokens)[row], encoder.pool(batch.other)[row]
        assert batch.origin[row, pooled[0]] == pooled[1]


def test_padding_is_aligned_from_the_right(bidirectional):
    batch = aligned(bidirectional, INSERTED, run="caption")
    assert batch.tokens.shape == batch.other.shape == (1, 16)
    assert batch.length.tolist() == batch.other_length.tolist() == [16]
    assert batch.origin.tolist() == [[0, 1, 2, -1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15]]
    assert batch.flip().origin.tolist() == [[0, 1, 2, 4, 5, 6, 7, 8, 9, 10, -1, 11, 12, 13, 14, 15]]
    assert batch.flip().unaligned.tolist() == [1]


def test_causal_tower_pooled_behind_the_text_keeps_the_padding_that_it_reads():
    clip = open_clip.CustomTextCLIP(
        8,
        {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32},
        {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "pool_type": "last"},
    )
    encoder = load(clip.eval(), tokenizer=open_clip.SimpleTokenizer(context_length=16))
    batch = aligned(encoder, INSERTED, run="caption")
    assert batch.length.tolist() == batch.other_length.tolist() == [16]
    assert batch.origin.tolist() == [[0, 1, 2, -1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15]]


def test_causal_batches_are_cut_to_the_longest_text_of_each_side(causal):
    batch = aligned(causal, REPHRASED, LONGER, run="foil")
    assert batch.tokens.shape == (2, 12) and batch.other.shape == (2, 7)
    assert batch.length.tolist() == [7, 12] and batch.other_length.tolist() == [7, 5]
    assert batch.inside.sum(1).tolist() == [7, 12]
    assert not (batch.origin[0, 7:] >= 0).any()


@pytest.mark.parametrize("tower", ["causal", "bidirectional", "pooled_last"])
@pytest.mark.parametrize("run", ["caption", "foil"])
def test_flipping_is_aligning_the_other_way_round(tower, run, request):
    encoder = request.getfixturevalue(tower)
    texts = (INSERTED, SWAPPED, REPHRASED, LONGER, ("red no dog", "no red dog"), ("no red dog", "red no dog"))
    batch = aligned(encoder, *texts, run=run)
    flipped = aligned(encoder, *texts, run="foil" if run == "caption" else "caption")
    for name in TENSORS:
        assert torch.equal(getattr(batch.flip(), name), getattr(flipped, name)), name
        assert torch.equal(getattr(batch.flip().flip(), name), getattr(batch, name)), name
    assert (batch.flip().run, batch.flip().flip().run) == (flipped.run, batch.run)


def test_run_follows_the_side_of_the_negation(causal):
    texts = (REPHRASED, ("There is a dog.", "There is no dog."), ("A red dog.", "A blue dog."))
    sigma = {run: aligned(causal, *texts, run=run).sigma.tolist() for run in ("caption", "foil")}
    assert sigma == {"caption": [-1, -1, -1], "foil": [1, 1, 1]}
    affirmative, negated = (aligned(causal, *texts, run=run) for run in ("affirmative", "negated"))
    assert affirmative.sigma.tolist() == [1, -1] and negated.sigma.tolist() == [-1, 1]
    text = open_clip.SimpleTokenizer()(["There are some dogs.", "There is a dog."])[:, :7]
    assert torch.equal(affirmative.tokens, text)
    assert torch.equal(affirmative.flip().tokens, negated.tokens) and affirmative.flip().run == "negated"
    assert list(affirmative.dropped.key) == ["pair 2"] and "no side" in affirmative.dropped.reason[0]


def test_shared_counts_leading_tokens_and_an_index_takes_pairs(causal):
    batch = aligned(causal, REPHRASED, INSERTED, LONGER)
    assert batch.shared.tolist() == [3, 3, 1]
    for index in (slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([False, True, True])):
        part = batch[index]
        assert part.pairs.key == ("pair 1", "pair 2") and len(part) == 2
        assert all(torch.equal(getattr(part, name), getattr(batch, name)[1:]) for name in TENSORS)


def test_one_number_takes_a_batch_of_one_pair(causal):
    batch = aligned(causal, REPHRASED, INSERTED, LONGER)
    assert len(batch[-1]) == 1 and batch[-1].pairs.key == batch[2:].pairs.key
    assert all(torch.equal(getattr(batch[-1], name), getattr(batch, name)[2:]) for name in TENSORS)


def test_direction_is_scale_times_image_and_along_replaces_it(causal):
    pairs = make(REPHRASED, INSERTED)
    store = random_store(pairs, 8)
    batch = align(pairs, store, causal)
    assert torch.allclose(batch.direction, (causal.scale * store[["0.png", "1.png"]]).float(), atol=1e-6)
    one, each = torch.arange(8.0), torch.arange(16.0).reshape(2, 8)
    assert torch.equal(batch.along(one).direction, torch.stack([one, one]))
    assert torch.equal(batch.along(each).direction, each)
    with pytest.raises(ValueError, match=r"\(2, 8\) or one row of it, got \(7,\)"):
        batch.along(torch.ones(7))
    with pytest.raises(ValueError, match="not finite"):
        batch.along(torch.tensor([float("nan")] + [1.0] * 7))


# What a batch knows of its chunks, slots and counterparts


@pytest.fixture(scope="module")
def mixed(causal):
    """Texts of several lengths, one of them without a template, one with an inserted and one with a swapped word."""
    texts = (LONGER, INSERTED, SWAPPED, ("Dogs run.", "No dogs run."), REPHRASED, ("a b c d e", "e d c b a f"))
    return aligned(causal, *texts, run="caption")


@pytest.mark.parametrize("n", [1, 2, 4, 6, 100])
def test_chunks_have_every_pair_once_the_shortest_first(mixed, n):
    chunks = [index.tolist() for index in mixed.chunks(n)]
    every = [row for chunk in chunks for row in chunk]
    assert every == sorted(range(6), key=lambda row: (int(mixed.length[row]), row))
    assert [len(chunk) for chunk in chunks] == [n] * (6 // n) + [6 % n] * (6 % n > 0)


def test_chunks_of_nothing_and_of_no_size(mixed):
    assert list(mixed[[]].chunks(3)) == []
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1 pair, got n={n}"):
            mixed.chunks(n)


def test_where_is_every_position_of_a_slot_within_the_text(mixed):
    rows = range(len(mixed))
    names = [[name if at < mixed.length[row] else "" for at, name in enumerate(slots_of(mixed, row))] for row in rows]
    for slot in mixed.slots:
        assert mixed.where(slot).tolist() == [[name == slot for name in line] for line in names], slot
    width = mixed.tokens.shape[1]
    for position in range(width):
        expected = [[at == position < mixed.length[row] for at in range(width)] for row in rows]
        assert mixed.where(position).tolist() == expected
    assert mixed.where(None).sum(1).tolist() == mixed.length.tolist()
    assert not mixed.where(width).any()


def test_where_stays_inside_whatever_the_slots_say(mixed):
    beyond = replace(mixed, slot=torch.zeros_like(mixed.slot), length=torch.full_like(mixed.length, 2))
    assert beyond.where("sot").sum(1).tolist() == [2] * 6 and beyond.where("sot")[:, :2].all()
    assert not beyond.where(2).any() and beyond.where(1).sum() == 6


def test_where_says_which_slots_there_are(mixed):
    with pytest.raises(ValueError, match=r"no slot 'verb'; .* sot, prefix, there, be, .*eot"):
        mixed.where("verb")


def test_occurring_slots_are_those_that_some_run_has(mixed):
    assert mixed.occurring == tuple(slot for slot in mixed.slots if mixed.where(slot).any())
    template = ("there", "be", "negator", "subject", "subject_rest", "stop")
    assert mixed.occurring == ("sot", *template, "before", "changed", "between", "after", "eot")
    assert mixed[3].occurring == ("sot", "after", "eot") and mixed[[]].occurring == ()


@pytest.mark.parametrize("tower", ["causal", "bidirectional", "pooled_last"])
def test_inverse_and_origin_name_each_other(tower, request):
    batch = aligned(request.getfixturevalue(tower), LONGER, INSERTED, SWAPPED, REPHRASED, run="caption")
    forth = {(row, p, int(q)) for row, line in enumerate(batch.origin) for p, q in enumerate(line) if q >= 0}
    back = {(row, int(p), q) for row, line in enumerate(batch.inverse) for q, p in enumerate(line) if p >= 0}
    assert forth == back and batch.inverse.shape == batch.other.shape
    assert batch.inverse is batch.inverse and torch.equal(batch.flip().inverse, batch.origin)


def test_an_index_has_its_own_inverse(mixed):
    assert torch.equal(mixed.inverse[2:4], mixed[2:4].inverse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_moved_values_stand_at_their_counterparts(mixed, dtype):
    value = torch.randn(3, 2, *mixed.other.shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    moved = mixed.moved(value)
    assert moved.dtype == dtype and moved.shape == (3, 2, *mixed.tokens.shape)
    for row, line in enumerate(mixed.origin.tolist()):
        for at, origin in enumerate(line):
            expected = value[..., row, origin] if origin >= 0 else torch.zeros(3, 2, dtype=dtype)
            assert torch.equal(moved[..., row, at], expected)
    back = mixed.moved(mixed.tokens, inverse=True)
    assert torch.equal(back, mixed.flip().moved(mixed.tokens))
    assert torch.equal(mixed.moved(back), mixed.tokens.where(mixed.origin >= 0, 0))


def test_what_has_no_counterpart_is_zero_even_where_nothing_is_finite(mixed):
    moved = mixed.moved(torch.full(mixed.other.shape, torch.nan))
    assert torch.equal(moved.isnan(), mixed.origin >= 0) and (moved[mixed.origin < 0] == 0).all()


def test_values_of_the_wrong_text_are_not_moved(mixed):
    assert mixed.tokens.shape != mixed.other.shape
    with pytest.raises(ValueError, match=r"values of the other have the shape \[\.\.\., 6, \d+\], got \(2, 6, \d+\)"):
        mixed.moved(torch.ones(2, *mixed.tokens.shape))
    with pytest.raises(ValueError, match="values of the run have"):
        mixed.moved(mixed.other, inverse=True)


def test_digest_is_that_of_what_the_batch_holds(mixed):
    for name in TENSORS:
        changed = getattr(mixed, name).clone()
        changed[0, ...] += 1
        assert replace(mixed, **{name: changed}).digest != mixed.digest, name
    assert replace(mixed, slots=mixed.slots[::-1]).digest != mixed.digest
    copied = replace(mixed, **{name: getattr(mixed, name).clone() for name in TENSORS}, dropped=mixed.dropped[:0])
    assert copied.digest == mixed.digest == mixed.flip().flip().digest
    assert len(mixed.digest) == 16 and mixed[:3].digest != mixed.digest


def test_digest_is_computed_at_use_and_exact_in_double_precision(mixed):
    batch = replace(mixed, direction=mixed.direction.double())
    assert batch.digest == mixed.digest
    before = batch.digest
    batch.direction[0, 0] *= 1 + 1e-12
    assert batch.digest != before


def linked(pairs):
    """For each pair its group by text, by joining whatever shares a text or an image until nothing changes."""
    groups = list(range(len(pairs)))
    things = [{*texts, ("image", image)} for *texts, image in zip(pairs.caption, pairs.foil, pairs.image, strict=True)]
    for _ in pairs.key:
        for one, two in combinations(range(len(pairs)), 2):
            if things[one] & things[two]:
                groups[one] = groups[two] = min(groups[one], groups[two])
    return groups


def test_a_split_by_text_shares_neither_texts_nor_images(causal):
    words = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("dog", "cat", "cow", "hen")]
    draw = Random(0)
    rows = [(f"a {words[(row + draw.choice((0, 1))) % 12]}", f"no {words[row % 12]}") for row in range(24)]
    pairs = Pairs([*map(str, range(24))], *zip(*rows, strict=True), [f"{row % 20}.png" for row in range(24)])
    batch = align(pairs, random_store(pairs, 8), causal, run="caption")
    groups = linked(pairs)
    assert 2 < len(set(groups)) < 20
    for seed in range(20):
        first, second = batch.split(0.4, seed, by="text")
        assert len(first) + len(second) == 24 and len(first) and len(second)
        assert not {*first.pairs.caption, *first.pairs.foil} & {*second.pairs.caption, *second.pairs.foil}
        assert not {*first.pairs.image} & {*second.pairs.image}
        assert first.pairs.key == pairs.split(0.4, seed, by="text")[0].key
        assert first.held_out == second.held_out == first.flip().held_out == first[:1].held_out == "by text"
    assert [part.held_out for part in batch.split(0.4)] == ["by image"] * 2 and batch.held_out == ""
    by_image = batch.split(0.5, 0)
    assert {*by_image[0].pairs.foil} & {*by_image[1].pairs.foil}


def test_texts_that_are_the_same_to_the_tokenizer_stay_together(causal):
    batch = aligned(causal, ("Red dogs.", "No dogs."), ("RED  dogs.", "No cats."), REPHRASED, run="caption")
    for seed in range(8):
        parts = batch.split(0.5, seed, by="text")
        assert {part.pairs.key for part in parts} == {("pair 0", "pair 1"), ("pair 2",)}


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_the_direction_has_the_precision_that_the_encoder_scores_in(dtype, precision):
    """In half precision a logit of 100 is rounded to .06 or .5: no direction is, whatever the tower runs in."""
    encoder, pairs = random_encoder(dtype=dtype, **SMALL), make(REPHRASED, INSERTED)
    store = random_store(pairs, 8)
    batch = align(pairs, store, encoder)
    exact = encoder.scale * store[["0.png", "1.png"]].double()
    assert batch.direction.dtype == precision == batch.along(torch.arange(8)).direction.dtype
    assert (batch.direction.double() - exact).abs().max() <= encoder.scale * torch.finfo(precision).eps


# Slots

VALSE_LIKE = [
    "There:there are:be no:negator people:subject in:subject_rest the:subject_rest picture:subject_rest .:stop",
    "There:there is:be a:negator zebra:subject .:stop",
    "There:there is:be no:negator red:subject fire:subject_rest hydrant:subject_rest .:stop",
    "There:there are:be some:negator skateboarders:subject doing:subject_rest kickflips:subject_rest .:stop",
    "There:there are:be no:negator skateboarders:subject",
    "there:there is:be any:negator dog:subject ?:stop",
    "There:there is:be an:negator elephant:subject standing:subject_rest .:stop",
    "In:prefix the:prefix picture:prefix there:there are:be no:negator dogs:subject .:stop",
]
WITH_SUBJECT = [
    ("We:prefix can:prefix see:prefix no:negator stars:subject in:suffix the:suffix picture:suffix .:stop", "stars"),
    ("There:there is:be no:negator purple:subject shape:subject_rest in:suffix it:suffix .:stop", "purple shape"),
    ("In:prefix it:prefix there:there is:be a:negator blue:subject unicyclist:subject_rest .:stop", "blue unicyclist"),
    ("A:negator star:subject", "star"),
]


def labelled(encoder, marked):
    """A text and the slot of each of its tokens, tokenized word by word."""
    words = [word.rsplit(":", 1) for word in marked.split()]
    text = re.sub(r" (?=[.?!])", "", " ".join(word for word, _ in words))
    slots = ["sot"]
    for word, slot in words:
        ids = encoder.tokenize([word])[0].tolist()
        slots += first_token([slot] * (ids.index(49407) - 1))
    return text, slots


def first_token(slots):
    """The subject is its first token only, the others of its first word belong to the rest (method, section 2)."""
    return ["subject", *["subject_rest"] * (len(slots) - 1)] if slots[0] == "subject" else slots


def slots_of(batch, row=0):
    names = [*batch.slots, None]
    return [names[index] for index in batch.slot[row].tolist()]


@pytest.mark.parametrize("tower", ["causal", "bidirectional", "pooled_last"])
@pytest.mark.parametrize(("marked", "subject"), [*((text, None) for text in VALSE_LIKE), *WITH_SUBJECT])
def test_slots_of_marked_sentences(tower, marked, subject, request):
    encoder = request.getfixturevalue(tower)
    text, expected = labelled(encoder, marked)
    other = text.replace(" no ", " some ") if " no " in text else f"No {text}"
    info = {} if subject is None else {"subject": [subject]}
    batch = aligned(encoder, (other, text), **info)
    found = slots_of(batch)
    pooled = int(encoder.pool(batch.tokens)[0])
    expected += [None] * (len(found) - len(expected))
    expected[pooled] = "eot"
    assert found == expected
    assert batch.slot_rules == {"template_slots": 1}


def test_of_a_subject_of_several_tokens_the_first_is_the_subject(causal):
    text, _ = labelled(causal, VALSE_LIKE[3])
    found = slots_of(aligned(causal, (text.replace("some", "no"), text)))
    assert found[3:6] == ["negator", "subject", "subject_rest"] and found.count("subject") == 1


def test_pairs_without_a_template_have_the_slots_of_what_changes_and_are_counted(causal):
    batch = aligned(causal, ("Dogs run.", "No dogs run."), REPHRASED, ("A cat.", "No cat."), run="foil")
    assert slots_of(batch, 0) == ["sot", "changed", "after", "after", "after", "eot", None]
    assert slots_of(batch, 1) == ["sot", "there", "be", "negator", "subject", "stop", "eot"]
    assert slots_of(batch, 2) == ["sot", "changed", "after", "after", "eot", None, None]
    assert batch.slot_rules == {"changed_slots": 2, "template_slots": 1}
    assert batch[1:].named_by == ("template_slots", "changed_slots") and batch[[1]].slot_rules == {"template_slots": 1}


def test_a_text_that_lacks_words_of_the_other_has_the_names_that_they_have_there(causal):
    """ "There are dogs." is no template, but the words of "There are no dogs.", which is one."""
    batch = aligned(causal, INSERTED, run="caption")
    behind = ["subject", *["subject_rest"] * 4, "stop", "eot"]
    assert slots_of(batch) == ["sot", "there", "be", "negator", *behind]
    assert slots_of(batch.flip()) == ["sot", "there", "be", *behind]
    assert batch.slot_rules == {"template_slots": 1}


class Words:
    """A tokenizer like SigLIP's: no start token, and the end of text is the padding."""

    def __init__(self):
        self.ids = {}

    def __call__(self, texts, context_length=16):
        words = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
        rows = [torch.tensor([self.ids.setdefault(word, 2 + len(self.ids)) for word in row]).long() for row in words]
        rows.append(torch.ones(context_length, dtype=torch.long))
        return pad_sequence(rows, batch_first=True, padding_value=1)[:-1, :context_length]


def test_slots_without_start_and_end_tokens():
    encoder = load(random_clip(causal=False, pool_type="last", **SMALL), tokenizer=Words())
    batch = aligned(encoder, ("There are some big dogs.", "There are no big dogs."))
    assert slots_of(batch) == ["there", "be", "negator", "subject", "subject_rest", "stop", *[None] * 9, "eot"]
    assert batch.origin.tolist() == [list(range(16))]


def test_own_slot_functions_name_spans_and_wrong_names_are_refused(causal):
    pairs = make(REPHRASED)
    store = random_store(pairs, 8)
    batch = align(pairs, store, causal, run="foil", slots=lambda text, other, info: [(5, None), (9, "verb")])
    assert slots_of(batch) == ["sot", None, "verb", None, None, None, "eot"]
    assert batch.slots == ("sot", "verb", "eot")
    for name in ("eot", "a slot", "3", "", 3):
        with pytest.raises(ValueError, match=f"no slot can be named {name!r}"):
            align(pairs, store, causal, slots=lambda text, other, info, name=name: [(5, name)])


def test_template_spans_are_cut_at_white_space():
    assert template_slots("There are no people.") == [
        (5, "there"),
        (9, "be"),
        (12, "negator"),
        (19, "subject"),
        (20, "stop"),
    ]
    assert template_slots("There are people.") is None
    assert template_slots("There are no .") is None
    assert template_slots("no dogs here", "cats") is None
    assert template_slots("There is a (red) dog.", "(red) dog")[-3:] == [
        (16, "subject"),
        (20, "subject_rest"),
        (21, "stop"),
    ]


def test_valse_slots_agree_with_splitting_words(shared, causal):
    """Every rephrased sentence of VALSE existence, its words split here and tokenized one by one."""
    pairs = read_pairs(shared / "data" / "valse" / "existence.json").rephrased()
    batch = align(pairs, random_store(pairs, 8), causal)
    assert len(batch) == 490 and batch.slot_rules == {"template_slots": 490}
    both = zip(pairs.caption, pairs.foil, batch.sigma, strict=True)
    texts = [foil if sigma > 0 else caption for caption, foil, sigma in both]
    names = ("there", "be", "negator", "subject")
    for row, text in enumerate(texts):
        stop = text[-1] in ".!?"
        words = text[: -1 if stop else None].split()
        marked = [
            *zip(words, names, strict=False),
            *((word, "subject_rest") for word in words[4:]),
            *[(text[-1], "stop")] * stop,
        ]
        counts = ((causal.tokenize([word for word, _ in marked]) == 49407).int().argmax(1) - 1).tolist()
        named = zip(marked, counts, strict=True)
        expected = ["sot", *(slot for (_, name), count in named for slot in first_token([name] * count)), "eot"]
        assert slots_of(batch, row)[: len(expected)] == expected, text
        assert batch.origin[row, : batch.length[row]].tolist() == list(range(batch.length[row]))


def test_valse_original_texts_are_aligned_around_the_missing_word(shared, causal):
    """423 of the 505 pairs differ by one token in length: everything else still finds its counterpart."""
    pairs = read_pairs(shared / "data" / "valse" / "existence.json")
    batch = align(pairs, random_store(pairs, 8), causal, run="negated")
    differ = batch.length - batch.other_length
    assert len(batch) == 505 and int((differ == 1).sum()) == 423
    assert torch.equal(batch.unaligned[differ == 1], torch.ones(423, dtype=torch.long))
    same = batch.other.gather(1, batch.origin.clamp(min=0, max=batch.other.shape[1] - 1)) == batch.tokens
    assert ((batch.origin < 0) | same)[differ == 1].logical_or(~batch.inside[differ == 1]).all()


# What is dropped, what is refused


def test_unusable_pairs_are_listed_with_key_and_reason(causal):
    texts = (REPHRASED, ("A dog.", "A cat."), ("NO dogs", "no  dogs"), ("No dogs. " * 40, "A dog."), LONGER, INSERTED)
    pairs = make(*texts, negation=["caption", "", "caption", "caption", "caption", "caption"])
    store = random_store(pairs[[0, 1, 2, 3, 5]], 8)
    batch = align(pairs, store, causal)
    assert batch.pairs.key == ("pair 0", "pair 5")
    assert batch.dropped.set_index("key").reason.to_dict() == {
        "pair 1": "no side: neither text is the negated one",
        "pair 2": "caption and foil are the same tokens",
        "pair 3": "a text is longer than the context",
        "pair 4": "image not in the store",
    }
    assert "4 dropped" in repr(batch) and "1 dropped: image not in the store" in batch._repr_html_()


def test_pairs_dropped_before_stay_listed(causal):
    pairs = make(REPHRASED, ("A dog.", "No dog."), ("A cat.", "A rat.")).rephrased()
    batch = align(pairs, random_store(pairs, 8), causal)
    assert list(batch.dropped.key) == ["pair 1", "pair 2"]


def test_nothing_left_says_why_and_what_to_do(causal):
    pairs = make(("A dog.", "A cat."), ("A red dog.", "A blue dog."))
    for run in ("affirmative", "negated"):
        with pytest.raises(ValueError, match=rf"none of the 2 pairs of pairs has a side.*'{run}'.*run='foil'"):
            align(pairs, random_store(pairs, 8), causal, run=run)
    mixed = make(("A dog.", "A cat."), ("No dogs. " * 40, "A dog."))
    with pytest.raises(ValueError, match=r"none of the 2 pairs .*1 x no side: .*run='foil'"):
        align(mixed, random_store(mixed, 8), causal)
    with pytest.raises(ValueError, match=r"none of the 2 pairs .*2 x image not in the store\)$"):
        align(pairs, ImageStore.from_tensors(["x"], torch.ones(1, 8)), causal, run="foil")
    with pytest.raises(ValueError, match="no pairs to align"):
        align(pairs[[]], random_store(pairs, 8), causal)


def test_the_run_that_is_not_given_goes_by_what_the_pairs_have(causal):
    plain, sided = make(("A dog.", "A cat.")), make(("A dog.", "A cat."), REPHRASED)
    assert align(plain, random_store(plain, 8), causal).run == "foil"
    assert align(sided, random_store(sided, 8), causal).run == "affirmative"


def test_a_batch_says_of_sides_and_slots_what_it_has(causal):
    plain = aligned(causal, ("A dog.", "A cat."))
    assert repr(plain) == "Batch(1 pairs of pairs, run='foil', slots by changed_slots, 0 dropped, 5 positions)"
    assert "negat" not in repr(plain) + plain._repr_html_() + repr(plain.pairs) + plain.pairs._repr_html_()
    both = aligned(causal, ("A dog.", "A cat."), REPHRASED)
    assert "negation in 1 caption, 1 none, slots of 1 by changed_slots, 1 by template_slots" in repr(both)


def test_unknown_run_lists_the_known_ones(causal):
    pairs = make(REPHRASED)
    with pytest.raises(ValueError, match="run='clean'; give one of affirmative, negated, caption, foil"):
        align(pairs, random_store(pairs, 8), causal, run="clean")


def test_a_store_of_another_model_is_refused_with_both_names(causal):
    pairs = make(REPHRASED)
    store = ImageStore.from_tensors(pairs.image, torch.ones(1, 8), model="ViT-B-32", pretrained="openai")
    with pytest.raises(ValueError, match=r"ViT-B-32.*CLIP in memory"):
        align(pairs, store, causal)
    assert len(align(pairs, store, causal, any_store=True)) == 1


@pytest.mark.parametrize("any_store", [False, True])
def test_embeddings_of_another_width_are_refused_at_the_door(causal, any_store):
    pairs = make(REPHRASED)
    with pytest.raises(ValueError, match=r"9.*8"):
        align(pairs, random_store(pairs, 9), causal, any_store=any_store)
