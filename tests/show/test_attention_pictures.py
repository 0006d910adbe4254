"""Attention patterns: the weights of the cache, token by token, and a difference of aligned positions only."""

import numpy as np
import pytest

import clip_lens
from clip_lens.show.figures.attention import difference, patterns


@pytest.fixture(scope="module")
def encoder():
    return clip_lens.load()


@pytest.fixture(scope="module")
def batch(encoder):
    store = clip_lens.ImageStore.open("tiny")
    pairs = clip_lens.read_pairs()[:60]
    return clip_lens.align(pairs, store, encoder)


@pytest.mark.parametrize("pair", [0, 17])
def test_panels_hold_the_patterns_of_both_texts(encoder, batch, pair):
    figure = patterns(encoder, batch, layer=3, head=2, pair=pair)
    run, other = figure.data[:2]
    negated = batch.pairs.caption if batch.pairs.side[pair] == "caption" else batch.pairs.foil
    affirmative = batch.pairs.foil if batch.pairs.side[pair] == "caption" else batch.pairs.caption
    name = "blocks.3.attn.hook_pattern"
    for trace, text in ((run, affirmative[pair]), (other, negated[pair])):
        expected = encoder.cache(text, names=name)[name][0, 2].numpy()
        np.testing.assert_allclose(trace.z, expected, atol=1e-6)
        np.testing.assert_allclose(np.asarray(trace.z).sum(1), 1, atol=1e-5)
    assert (run.name, other.name) == ("run: without negation", "other: with negation")
    words = [word for word in figure.layout.xaxis2.ticktext if not word.startswith("<") and word != "&lt;start&gt;"]
    assert "no" in words
    assert list(figure.layout.yaxis.ticktext) == list(figure.layout.xaxis.ticktext)
    assert figure.layout.xaxis.ticktext[0] == "&lt;start&gt;"
    assert run.text[1][0] == f"{figure.layout.xaxis.ticktext[1]} → {figure.layout.xaxis.ticktext[0]}"


def test_the_difference_is_that_of_aligned_positions(encoder, batch, tmp_path):
    store = clip_lens.ImageStore.open("tiny")
    (tmp_path / "pairs.csv").write_text(
        f"caption,foil,image\nThere are circles.,There are no circles.,{store.ids[0]}\n"
    )
    longer = clip_lens.align(clip_lens.read_pairs(tmp_path / "pairs.csv"), store, encoder)
    missing = []
    for used in (batch, longer, longer.flip()):
        pair = 0
        figure = patterns(encoder, used, 2, 1, pair=pair)
        run, other, moved = figure.data[:3]
        origin = used.origin[pair].tolist()
        for query in range(len(run.z)):
            for key in range(len(run.z)):
                if origin[query] < 0 or origin[key] < 0:
                    assert np.isnan(moved.z[query][key])
                else:
                    expected = other.z[origin[query]][origin[key]] - run.z[query][key]
                    assert moved.z[query][key] == pytest.approx(expected, abs=1e-7)
        gaps = [trace for trace in figure.data if trace.name == "no counterpart"]
        assert len(gaps) == np.isnan(moved.z).any()
        missing.append(int(np.isnan(np.diag(moved.z)).sum()))
    assert missing == [0, 0, 1]
    limit = figure.layout.coloraxis2
    assert limit.cmax == -limit.cmin == np.nanmax(np.abs(moved.z))
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


def test_a_substituted_token_is_named_with_its_counterpart(encoder, batch):
    labels = list(patterns(encoder, batch, 0, 0).layout.xaxis3.ticktext)
    assert "some / no" in labels and sum("/" in label for label in labels) == 1


def test_unaligned_positions_have_no_difference():
    run, other = np.full((3, 3), 0.25), np.arange(4.0).reshape(2, 2)
    moved = difference(run, other, np.array([1, -1, 0]))
    np.testing.assert_array_equal(moved, [[2.75, np.nan, 1.75], [np.nan] * 3, [0.75, np.nan, -0.25]])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"layer": 6}, "layer counts from 0 to 5 here. Got 6"),
        ({"head": -1}, "head counts from 0 to 3 here. Got -1"),
        ({"pair": 60}, "pair counts from 0 to 59 here. Got 60"),
    ],
)
def test_bad_input_is_named(encoder, batch, where, message):
    with pytest.raises(ValueError, match=message):
        patterns(encoder, batch, **{"layer": 0, "head": 0, **where})
