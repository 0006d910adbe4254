"""Texts alone, one text and two images, questions of several foils, ranks: against values worked out by hand."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from pandas import DataFrame
from statsmodels.stats.proportion import proportion_confint
from torch.nn.functional import normalize
from towers import random_encoder

import clip_lens
from clip_lens import ImageStore, Pairs, Site, align, cosine, kl, logit, patch_effects, rank, read_pairs, scores
from clip_lens.core.effects import Effects
from clip_lens.core.table import Draws, units_of
from clip_lens.methods.circuits.faithfulness import faithfulness
from clip_lens.methods.circuits.selection import stability, top_edges
from clip_lens.methods.scores import group_scores, pair_scores, tally

CAPTIONS = ("There are no cats.", "There is a dog.", "There is no red ball.", "There are some people.")
FOILS = ("There are some cats.", "There is no dog.", "There is a red ball.", "There are no people.")
TEXTS_ALONE = "these pairs are texts alone"


@pytest.fixture(scope="module")
def encoder():
    return random_encoder(dtype=torch.float64)


def texts(**info):
    return read_pairs(DataFrame({"caption": CAPTIONS, "foil": FOILS, **info}))


def with_images(encoder, pairs, seed=0):
    drawn = torch.randn(len(pairs.images), encoder.d_embed, dtype=torch.float64, generator=torch.manual_seed(seed))
    return ImageStore.from_tensors(pairs.images, drawn)


def embedded(encoder, sentences):
    return encoder(encoder.tokenize(list(sentences)))


# Texts alone


def test_what_needs_no_image_is_the_same_without_one(encoder):
    bare = align(texts(), None, encoder)
    pairs = texts(image=list("abcd"))
    whole = align(pairs, with_images(encoder, pairs), encoder)
    assert not bare.has_direction and whole.has_direction and bare.joint == "none" and bare.images == ""
    places = [*encoder.sites("resid"), *encoder.edges()[:5]]
    one, two = (patch_effects(encoder, batch, places, metric=cosine, progress=False) for batch in (bare, whole))
    assert torch.equal(one.values, two.values) and torch.equal(one.total, two.total)
    assert one.pairs.d.isna().all() and set(one.pairs.segment) == {"unknown"}
    one, two = (clip_lens.attention_effects(encoder, batch) for batch in (bare, whole))
    assert torch.equal(one.values.nan_to_num(9), two.values.nan_to_num(9)) and one.pairs.d.isna().all()
    place = Site("resid", 1, slot="eot")
    turned = {place: torch.ones(encoder.tower.cfg.d_model, dtype=torch.float64)}
    one, two = (clip_lens.steer(encoder, batch, turned, metric=cosine) for batch in (bare, whole))
    assert torch.equal(one.values, two.values)
    one, two = (
        clip_lens.gradient_effects(encoder, batch, places, metric=cosine, progress=False) for batch in (bare, whole)
    )
    assert torch.equal(one.values, two.values)


def test_what_needs_an_image_says_so_and_never_computes(encoder):
    batch = align(texts(), None, encoder)
    custom = clip_lens.metric(lambda u, readout: (u * readout.direction).sum(-1), oriented=True)
    sites = encoder.sites("resid")
    for verb in (
        lambda: patch_effects(encoder, batch, sites, progress=False),
        lambda: patch_effects(encoder, batch, sites, metric=kl(embedded(encoder, CAPTIONS)), progress=False),
        lambda: patch_effects(encoder, batch, sites, metric=rank(embedded(encoder, CAPTIONS)), progress=False),
        lambda: patch_effects(encoder, batch, sites, metric=custom, progress=False),
        lambda: clip_lens.gradient_effects(encoder, batch, sites, progress=False),
        lambda: clip_lens.path_effects(encoder, batch, [Site("embed")], [Site("out")], progress=False),
        lambda: clip_lens.steer(encoder, batch, {Site("resid", 1): torch.ones(encoder.tower.cfg.d_model)}),
        lambda: scores(encoder, batch),
        lambda: clip_lens.group_scores(encoder, align(texts(question="q"), None, encoder)[:2]),
        lambda: clip_lens.direct_effects(encoder, batch),
        lambda: clip_lens.logit_lens(encoder, batch),
        lambda: clip_lens.confounds(encoder, batch),
        lambda: clip_lens.acdc(encoder, batch, threshold=0.1),
    ):
        with pytest.raises(ValueError, match=f"{TEXTS_ALONE}|is none: a group is two pairs"):
            verb()


def test_a_direction_completes_a_batch(encoder):
    pairs = texts(image=list("abcd"))
    store = with_images(encoder, pairs)
    whole = align(pairs, store, encoder)
    bare = align(pairs, None, encoder).along(encoder.scale * store[pairs.image])
    assert bare.has_direction and bare.digest == whole.digest
    assert torch.equal(pair_scores(encoder, bare).d, pair_scores(encoder, whole).d)


def test_texts_alone_and_a_store_are_no_match_and_say_so(encoder):
    pairs = texts()
    store = with_images(encoder, texts(image=list("abcd")))
    with pytest.raises(ValueError, match=r"frame has no column image, and a store .* or give images=None"):
        align(pairs, store, encoder)
    with pytest.raises(ValueError, match="against='foil_image' needs the embeddings of two images"):
        align(pairs, None, encoder, against="foil_image")
    with pytest.raises(ValueError, match="no images to split by; split by='text'"):
        pairs.split()
    with pytest.raises(ValueError, match="no images to split by"):
        align(pairs, None, encoder).split()
    first, second = pairs.split(by="text")
    assert len(first) == len(second) == 2


def test_a_file_without_images_or_with_an_empty_column_is_of_texts_alone(tmp_path):
    (tmp_path / "a.csv").write_text("caption,foil\nno cat,a cat\na dog,\n")
    (tmp_path / "b.csv").write_text("caption,foil,image\nno cat,a cat,\na dog,,\n")
    for name in ("a.csv", "b.csv"):
        pairs = read_pairs(tmp_path / name)
        assert pairs.image == ("",) and not pairs.has_images and pairs.images == ()
        assert pairs.dropped.reason.tolist() == ["foil is empty or not text"]
        assert "without images" in repr(pairs)
        assert Pairs.from_frame(pairs.to_frame()).caption == pairs.caption
    (tmp_path / "c.csv").write_text("caption,foil,image\nno cat,a cat,\na dog,no dog,1.jpg\n")
    pairs = read_pairs(tmp_path / "c.csv")
    assert pairs.image == ("1.jpg",) and pairs.dropped.reason.tolist() == ["image is empty or not text"]


# One text, two images


def groups(encoder):
    """Three groups: all right; text right and image wrong; text wrong and image right."""
    one, two = (embedded(encoder, column) for column in (CAPTIONS[:3], FOILS[:3]))
    shared, apart = normalize(one + two), normalize(one - two)
    first = normalize(torch.stack([apart[0], 0.5 * apart[1] - 0.5 * shared[1], shared[2] + 0.8 * apart[2]]))
    second = normalize(torch.stack([-apart[0], 2 * shared[1] - 0.5 * apart[1], shared[2] + 0.4 * apart[2]]))
    names = [f"{which}{group}.png" for group in range(3) for which in "ij"]
    store = ImageStore.from_tensors(names, torch.stack([first, second], 1).flatten(0, 1))
    rows = [
        {"caption": one, "foil": two, "image": f"{i}{group}.png", "foil_image": f"{j}{group}.png",
         "question": str(group), "foils": 2}
        for group, pair in enumerate(zip(CAPTIONS[:3], FOILS[:3], strict=True))
        for (one, two), (i, j) in ((pair, "ij"), (pair[::-1], "ji"))
    ]  # fmt: skip
    return read_pairs(DataFrame(rows)), store


def by_hand(encoder, store):
    """S[text, image] of each group as a plain product, and what it makes right."""
    text, image = [], []
    for group in range(3):
        u = embedded(encoder, (CAPTIONS[group], FOILS[group]))
        s = (u @ store[[f"i{group}.png", f"j{group}.png"]].T).tolist()
        text.append(s[0][0] > s[1][0] and s[1][1] > s[0][1])
        image.append(s[0][0] > s[0][1] and s[1][1] > s[1][0])
    return text, image


def test_winogrounds_scores_are_those_worked_out_by_hand(encoder):
    pairs, store = groups(encoder)
    text, image = by_hand(encoder, store)
    assert (text, image) == ([True, True, False], [True, False, False])
    table = group_scores(encoder, align(pairs, store, encoder)).set_index("score")
    assert table.right.to_dict() == {"text": 2, "image": 1, "group": 1} and set(table.n) == {3}
    lower, upper = proportion_confint(1, 3, method="wilson")
    assert table.loc["group", ["accuracy", "lower", "upper"]].tolist() == pytest.approx([1 / 3, lower, upper])
    asked = scores(encoder, align(pairs, store, encoder)).set_index(["by", "side"])
    assert asked.loc[("question", "overall"), "right"] == 2  # the text score is the score by question


@pytest.mark.parametrize("run", ["caption", "foil"])
def test_the_scores_of_groups_do_not_depend_on_the_run_or_the_order(encoder, run):
    pairs, store = groups(encoder)
    table = group_scores(encoder, align(pairs[[5, 0, 3, 2, 4, 1]], store, encoder, run=run))
    assert table.right.tolist() == [2, 1, 1]


def test_a_group_that_lost_a_pair_is_counted_and_not_scored(encoder):
    pairs, store = groups(encoder)
    table = group_scores(encoder, align(pairs[1:], store, encoder))
    assert table.n.tolist() == [2] * 3 and table.incomplete.tolist() == [1] * 3 and table.right.tolist() == [1, 0, 0]


def test_what_is_no_group_is_refused(encoder):
    pairs, store = groups(encoder)
    with pytest.raises(ValueError, match="has no column 'question'"):
        bare = dataclasses.replace(pairs, info=pairs.info.drop(columns="question"))
        group_scores(encoder, align(bare, store, encoder))
    with pytest.raises(ValueError, match="question '0' is none: a group is two pairs about two images"):
        group_scores(encoder, align(dataclasses.replace(pairs, image=["i0.png"] * 6), store, encoder))
    with pytest.raises(ValueError, match="none of 1 questions is"):
        group_scores(encoder, align(pairs[:1], store, encoder))
    with pytest.raises(ValueError, match="along the difference of two images; align them without against="):
        group_scores(encoder, align(pairs, store, encoder, against="foil_image"))


def test_against_is_the_difference_of_two_images_within_one_run(encoder):
    pairs, store = groups(encoder)
    batch = align(pairs, store, encoder, run="caption", against="foil_image")
    effects = patch_effects(encoder, batch, [Site("resid", 0)], progress=False)
    for row in range(len(pairs)):
        u = embedded(encoder, [pairs.caption[row]])[0]
        v, w = store[[pairs.image[row], pairs.info.foil_image[row]]]
        assert effects.baseline[row].item() == pytest.approx(encoder.scale * float(u @ v - u @ w), abs=1e-10)
    assert "each image against its foil_image" in effects.record.images
    with pytest.raises(ValueError, match="no column 'foil_imag'; did you mean 'foil_image'"):
        align(pairs, store, encoder, against="foil_imag")
    lost = DataFrame(pairs.info).assign(foil_image=["none.png", *pairs.info.foil_image[1:]])
    batch = align(dataclasses.replace(pairs, info=lost), store, encoder, against="foil_image")
    assert len(batch) == 5 and batch.dropped.reason.tolist() == ["image not in the store"]


# Questions


def asked(d, question, foils=None):
    frame = DataFrame({"key": [str(n) for n in range(len(d))], "side": "none", "d": d, "question": question})
    return frame if foils is None else frame.assign(foils=foils)


def test_a_question_is_right_when_all_of_its_pairs_are():
    d = [1.0, 2.0, 3.0, 1.0, -1.0, 4.0, 0.0, 5.0]
    table = tally(asked(d, ["a", "a", "a", "b", "b", "b", "c", "c"]))
    by_pair, by_question = table[table.by == "pair"].iloc[0], table[table.by == "question"].iloc[0]
    assert (by_pair.right, by_pair.n, by_pair.ties) == (6, 8, 1)
    assert (by_question.right, by_question.n, by_question.ties, by_question.tied) == (1, 3, 1, ("c",))
    assert by_question.mean_d == pytest.approx((1 - 1 + 0) / 3)
    bounds = proportion_confint(1, 3, method="wilson", alpha=0.05)
    assert (by_question.lower, by_question.upper) == pytest.approx(bounds)


def test_a_question_that_lost_a_foil_would_be_easier_and_is_left_out():
    table = tally(asked([1.0, 2.0, 3.0], ["a", "a", "b"], [3, 3, 1]))
    row = table[table.by == "question"].iloc[0]
    assert (row.n, row.right, row.incomplete) == (1, 1, 1)


def test_without_questions_there_is_no_row_of_them():
    table = tally(asked([1.0, 2.0], ["a", "a"]).drop(columns="question"))
    assert set(table.by) == {"pair"} and set(table.incomplete) == {0}


def test_a_pair_without_a_question_is_one_of_its_own():
    table = tally(asked([1.0, 2.0, -1.0], ["a", None, None]))
    row = table[table.by == "question"].iloc[0]
    assert (row.n, row.right) == (3, 2)


def test_a_question_is_told_from_a_pairs_key(tmp_path):
    """Where the column has gaps, a csv's numbers are floats, and a number may be a key too."""
    (tmp_path / "a.csv").write_text("caption,foil,question\na,b,1\nc,d,\ne,f,1\ng,h,0\n")
    pairs = read_pairs(tmp_path / "a.csv")
    assert pairs.question == ("1.0", "pair 1", "1.0", "0.0")
    frame = pairs.info.assign(key=pairs.key, side="none", d=[1.0, 1.0, -1.0, 1.0])
    row = tally(frame).set_index("by").loc["question"]
    assert (row.n, row.right) == (3, 2)
    assert units_of(frame)[0].tolist() == [0, 1, 0, 2]
    assert units_of(DataFrame({"key": ["0", "1"], "question": ["1", None]}))[1] == 2


def test_scores_of_multiple_choice_from_the_file_on(encoder):
    captions = {f"caption_{n}": [text, FOILS[0]] for n, text in enumerate(CAPTIONS)}
    frame = DataFrame({"image_path": ["a.jpg", "b.jpg"], **captions, "correct_answer": [2, 0]})
    pairs = read_pairs(frame)
    assert len(pairs) == 3  # of the second question every option is the same text
    store = with_images(encoder, pairs)
    table = scores(encoder, align(pairs, store, encoder, run="caption")).set_index("by")
    s = (embedded(encoder, CAPTIONS) @ store[["a.jpg"]].T)[:, 0]
    assert table.loc["question", "right"] == int(s.argmax() == 2) and table.loc["question", "n"] == 1
    assert table.loc["pair", "right"].max() == int((s[2] > s[[0, 1, 3]]).sum())


def test_no_split_parts_a_question(encoder):
    pairs, store = groups(encoder)
    for by in ("image", "text"):  # a group has two images
        for parts in (pairs.split(0.4, by=by), align(pairs, store, encoder).split(0.4, by=by)):
            first, second = (getattr(part, "pairs", part) for part in parts)
            assert len(first) == 2 and not set(first.question) & set(second.question)


def spread(n, groups_of):
    """Effects of n pairs whose values are those of their question."""
    question = np.arange(n) // groups_of
    d = np.random.default_rng(0).normal(3, 1, n // groups_of)[question]
    toy = clip_lens.core.effects.toy_effects()
    frame = DataFrame({"key": [str(row) for row in range(n)], "caption": "a", "foil": "b", "image": "c",
                       "side": "foil", "sigma": 1, "d": d, "segment": "correct"})  # fmt: skip
    values = torch.from_numpy(d)[None]
    return Effects(values, torch.full((n,), 4.0, dtype=torch.float64), torch.zeros(n), toy.places[:1], frame,
                   toy.record), question  # fmt: skip


def test_pairs_of_a_question_are_resampled_together():
    """Pairs that repeat one number each are as many numbers as questions: intervals are those of one pair each."""
    effects, question = spread(60, 6)
    grouped = dataclasses.replace(effects, pairs=effects.pairs.assign(question=question.astype(str)))
    single, _ = spread(10, 1)
    single = dataclasses.replace(
        single, values=effects.values[:, ::6], pairs=single.pairs.assign(d=effects.pairs.d[::6].tolist())
    )
    one, two = (each.table(resamples=500).iloc[0] for each in (grouped, single))
    bounds = ["effect_lower", "effect_upper", "lower", "upper", "effect"]
    assert one[bounds].tolist() == pytest.approx(two[bounds].tolist(), rel=1e-12)
    assert (one.n, two.n) == (60, 10)
    plain = effects.table(resamples=500).iloc[0]
    assert plain.upper - plain.lower < 0.6 * (one.upper - one.lower)


def test_few_questions_have_no_interval_however_many_pairs():
    effects, question = spread(60, 15)
    grouped = dataclasses.replace(effects, pairs=effects.pairs.assign(question=question.astype(str)))
    row = grouped.table().iloc[0]
    assert row.n == 60 and np.isnan(row.lower) and not np.isnan(effects.table().iloc[0].lower)


def test_units_are_drawn_as_before_where_there_are_no_questions():
    frame = DataFrame({"key": ["b", "a", "b", "c"]})
    codes, n = units_of(frame)
    assert codes.tolist() == [0, 1, 0, 2] and n == 3
    drawn = Draws(0.95, 7, 3).counts("foil", codes, n)
    stream = np.random.default_rng([3, 1]).multinomial(3, np.full(3, 1 / 3), 7)
    assert torch.equal(drawn, torch.from_numpy(stream.T.astype(float))[[0, 1, 0, 2]])


def test_circuits_are_resampled_by_question_too():
    encoder, store = clip_lens.load(), ImageStore.open("tiny")
    batch = align(read_pairs()[:12], store, encoder, run="caption")
    asked = dataclasses.replace(batch, pairs=dataclasses.replace(
        batch.pairs, info=batch.pairs.info.assign(question=[str(row // 6) for row in range(12)])))  # fmt: skip
    found = clip_lens.gradient_effects(encoder, batch, encoder.edges(), progress=False)
    circuit = top_edges(found, 100)
    one, two = (faithfulness(encoder, each, [circuit], progress=False).table() for each in (batch, asked))
    assert np.allclose(one.f, two.f, equal_nan=True) and one.lower.notna().any() and two.lower.isna().all()
    again = dataclasses.replace(found, pairs=found.pairs.assign(question="one"))
    # One question is drawn whole each time: every resample finds the same circuit.
    assert stability(again, n=50, resamples=5).lower[0] == 1 > stability(found, n=50, resamples=5).lower[0]


# Ranks


def test_ranks_are_those_of_sorting(encoder):
    pairs = texts(image=list("abcd"))
    store = with_images(encoder, pairs)
    batch = align(pairs, store, encoder, run="caption")
    bank = torch.cat([embedded(encoder, [*FOILS, "dogs", "A blue ball.", "There is no zebra."])])
    u, v = embedded(encoder, pairs.caption), store[pairs.image]
    effects = patch_effects(encoder, batch, [Site("resid", 0)], metric=rank(bank), progress=False)
    by_hand = [len(bank) - sorted([*(bank @ v[n]).tolist(), float(u[n] @ v[n])], reverse=True).index(float(u[n] @ v[n]))
               for n in range(4)]  # fmt: skip
    assert effects.baseline.tolist() == by_hand
    other = embedded(encoder, pairs.foil)
    to = [sum(float(other[n] @ v[n]) > float(each) + 1e-6 for each in bank @ v[n]) for n in range(4)]
    assert (effects.baseline + effects.total).tolist() == to  # the foil is in the bank, and no tie counts for it
    images = rank(v, of="images")
    effects = patch_effects(encoder, batch, [Site("resid", 0)], metric=images, progress=False)
    s = u @ v.T
    assert effects.baseline.tolist() == [float((s[n, n] > s[n]).sum()) for n in range(4)]
    assert effects.record.metric.unit == "places" and effects.record.metric.oriented


def test_a_tie_is_one_whatever_the_rounding():
    torch.manual_seed(0)
    u = normalize(torch.randn(50, 32), dim=-1)
    readout = clip_lens.core.metric.Readout(30 * normalize(torch.randn(50, 32), dim=-1), u, u)
    assert rank(u[:1])(u, readout)[0] == 0  # the text itself does not come before itself
    order = rank(u)(u, clip_lens.core.metric.Readout(readout.direction[:1].expand(50, -1), u, u))
    assert sorted(order.tolist()) == list(range(50))


def test_two_banks_are_two_metrics():
    bank = torch.eye(4)
    assert rank(bank).identity == rank(bank.clone()).identity is not None
    assert len({rank(bank).identity, rank(bank[:3]).identity, rank(bank, of="images").identity}) == 3


def test_a_step_function_is_refused_where_a_gradient_is_needed(encoder):
    pairs = texts(image=list("abcd"))
    batch = align(pairs, with_images(encoder, pairs), encoder)
    metric = rank(embedded(encoder, FOILS))
    for steps in (1, 3):
        with pytest.raises(ValueError, match=r"rank among 4 texts has no gradient .* step function.*patch_effects"):
            clip_lens.gradient_effects(encoder, batch, encoder.sites("head"), metric=metric, steps=steps)
    assert clip_lens.acdc(encoder, batch, metric=metric, threshold=0.5, progress=False) is not None
    with pytest.raises(ValueError, match="a bank has the unit embeddings"):
        rank(2 * torch.eye(3))
    with pytest.raises(ValueError, match="of='words'; a bank is one of texts or of images"):
        rank(torch.eye(3), of="words")


# Ids


@pytest.mark.parametrize(("name", "known"), [
    ("p04.jpg", "p04.gif"), ("p04", "p04.gif"), ("pictures\\p04.gif", "p04.gif"), ("/data/x/p04.gif", "p04.gif"),
    ("C:\\data\\P04.GIF", "p04.gif"), ("p05.png", "sub/p05.png"), ("data/a/p06.png", "a/p06.png"),
    ("b/p06.jpg", "b/p06.png"), ("p07.png", "p07.png#xywh=1,2,3,4"), ("p06.png", None), ("p99.png", None),
    ("x\\p08.png#xywh=1,2,3,4", "p08.png#xywh=1,2,3,4"), ("p09.png", "p09.png"),
])  # fmt: skip
def test_the_usual_repairs_are_offered_and_none_is_guessed(encoder, name, known):
    ids = ["p04.gif", "sub/p05.png", "a/p06.png", "b/p06.png", "p07.png#xywh=1,2,3,4", "p08.png#xywh=1,2,3,4",
           "p09.gif", "p09.png"]  # fmt: skip
    if "#" in str(known) and "#" not in name:
        known = None  # a part of an image is another image
    store = ImageStore.from_tensors(ids, torch.eye(len(ids), encoder.d_embed))
    pairs = Pairs(["a", "b"], CAPTIONS[:2], FOILS[:2], [name, "p09.gif"])
    batch = align(pairs, store, encoder)
    reasons = batch.dropped.reason.tolist()
    assert len(batch) == 1 + (name in ids) and pairs.image[0] == name
    if name not in ids:
        assert reasons[0].startswith("image not in the store")
        assert ("pairs.repaired(store) takes it" in reasons[0]) == (known is not None)
        if known:
            with pytest.raises(ValueError, match="may be") as error:
                align(pairs[:1], store, encoder)
            assert repr(known) in str(error.value)
    assert pairs.repaired(store).image == (known or name, "p09.gif")


def test_repairs_reach_the_image_of_the_foil():
    pairs = read_pairs(DataFrame({"caption": ["a"], "foil": ["b"], "image": ["x/1.jpg"], "foil_image": ["x/2.jpg"]}))
    fixed = pairs.repaired(["1.png", "2.png"])
    assert fixed.image == ("1.png",) and fixed.info.foil_image.tolist() == ["2.png"]
    assert pairs.info.foil_image.tolist() == ["x/2.jpg"]


def test_the_warning_of_unknown_words_names_ten_and_a_count():
    words = [f"zq{chr(97 + n)}" for n in range(14)]
    with pytest.warns(UserWarning, match="never saw") as caught:
        clip_lens.load().tokenize([f"a {word}" for word in words])
    told = str(caught[0].message)
    assert sum(f"'{word}'" in told for word in words) == 10 and "and 4 more" in told


def test_a_probe_of_texts_alone():
    encoder, pairs = clip_lens.load(), read_pairs()[:60]
    bare, whole = (align(pairs, images, encoder) for images in (None, ImageStore.open("tiny")))
    one, two = (clip_lens.probe(encoder, batch, layers=[0, 5], metric=cosine) for batch in (bare, whole))
    pd.testing.assert_frame_equal(one, two)
    with pytest.raises(ValueError, match=TEXTS_ALONE):
        clip_lens.probe(encoder, bare, layers=[0])
    assert logit.oriented  # the default metric of a probe
