"""bars draws the table's numbers: values, intervals, order, sides."""

import numpy as np
import pandas as pd
import pytest
from show.test_plots import HEADS, make

import clip_lens
from clip_lens.core.effects import SHOWN
from clip_lens.core.grid import one_side
from clip_lens.show.figures.bars import bars, shortened
from clip_lens.show.figures.style import LIGHT

CORRELATIONS = pd.DataFrame(
    {
        "feature": ["size", "tokens", "<b>x</b>"],
        "r": [0.1, -0.5, np.nan],
        "lower": [0.0, -0.6, -1],
        "upper": [0.3, -0.2, 1],
    }
)


@pytest.mark.parametrize("value", ["effect", "fraction"])
@pytest.mark.parametrize("of", ["means", "ratios"])
def test_bars_are_the_largest_rows_of_the_table(value, of):
    effects = make(HEADS, missing=0.2)
    figure = bars(effects, n=4, value=value, resamples=40, of=of)
    low, high = ("effect_lower", "effect_upper") if value == "effect" else ("lower", "upper")
    assert [trace.name for trace in figure.data] == ["negation in the caption", "negation in the foil"]
    for trace, side in zip(figure.data, ("caption", "foil"), strict=True):
        table = one_side(effects.table(resamples=40, of=of), side).set_index("place").dropna(subset=value)
        chosen = table.loc[table[value].abs().sort_values(ascending=False).index[:4]]
        assert list(trace.hovertext) == list(chosen.index)
        np.testing.assert_allclose(trace.x, chosen[value], rtol=1e-12)
        np.testing.assert_allclose(trace.x + trace.error_x.array, chosen[high], rtol=1e-12)
        np.testing.assert_allclose(trace.x - trace.error_x.arrayminus, chosen[low], rtol=1e-12)
        frame = figure.frame[figure.frame["side"] == side].set_index("place")
        pd.testing.assert_frame_equal(frame[list(SHOWN)], chosen[list(SHOWN)])
        for words, row in zip(trace.customdata, chosen.itertuples(), strict=True):
            assert f"<b>{row.effect:.3f}</b> [{row.effect_lower:.3f}, {row.effect_upper:.3f}]" in words
            assert words.endswith(f"{row.n} pairs, {row.dropped} dropped")
        colours = [LIGHT.positive if number >= 0 else LIGHT.negative for number in chosen[value]]
        assert list(trace.marker.color) == colours and len(set(colours)) == 2


def test_the_largest_is_on_top_and_panels_share_their_range():
    figure = bars(make(HEADS), n=5, resamples=20)
    for axis in (figure.layout.yaxis, figure.layout.yaxis2):
        assert axis.range[0] > axis.range[1]
        assert list(axis.tickvals) == [0, 1, 2, 3, 4]
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range
    ends = [bound for trace in figure.data for bound in (*(trace.x + trace.error_x.array), *trace.x)]
    low, high = figure.layout.xaxis.range
    assert low < 0 < max(ends) < high


def test_a_table_of_its_own():
    figure = bars(CORRELATIONS, value="r", title="a <title>")
    trace = figure.data[0]
    assert list(trace.hovertext) == ["tokens", "size"]  # a row without a value is left out
    assert trace.x.tolist() == [-0.5, 0.1]
    np.testing.assert_allclose(trace.error_x.array, [0.3, 0.2])
    np.testing.assert_allclose(trace.error_x.arrayminus, [0.1, 0.1])
    assert list(trace.customdata) == ["<br>r <b>-0.500</b> [-0.600, -0.200]", "<br>r <b>0.100</b> [0.000, 0.300]"]
    pd.testing.assert_frame_equal(figure.frame, CORRELATIONS.iloc[[1, 0]].reset_index(drop=True))
    assert figure.layout.title.text == "a &lt;title&gt;"
    assert bars(CORRELATIONS.fillna(1.0), value="r").data[0].hovertext[0] == "&lt;b&gt;x&lt;/b&gt;"
    plain = bars(CORRELATIONS[["r"]].set_axis([7, 7, 7]), value="r")
    assert plain.data[0].error_x.array is None and list(plain.data[0].hovertext) == ["7", "7"]
    named = CORRELATIONS.assign(why=["a", "b", "c"], side=["foil", "caption", "foil"])
    assert [list(trace.hovertext) for trace in bars(named, value="r", name="why").data] == [["a"], ["b"]]


def test_bounds_of_a_fraction_are_not_those_of_another_column():
    table = make(HEADS).table(resamples=20)
    assert bars(table, value="effect", side="foil").data[0].error_x.array is not None
    assert bars(table, value="n", side="foil").data[0].error_x.array is None
    assert bars(table.assign(other=1.0), value="other", side="foil").data[0].error_x.array is None
    frame = table.drop(columns=["effect_lower", "effect_upper", "lower", "upper"]).assign(effect_lower=0.0)
    assert bars(frame, side="foil").data[0].error_x.array is None  # one bound is none


def test_the_height_follows_the_bars_and_long_labels_are_cut_in_the_middle():
    heights = [bars(make(HEADS), n=n, side="foil", resamples=20).layout.height for n in (3, 6, 12)]
    assert heights[1] - heights[0] == 60 and heights[2] - heights[1] == 120
    assert shortened("x" * 24) == "x" * 24 and len(shortened("x" * 25)) == 24
    assert shortened("abcdefghij", 5) == "ab…ij"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"at least 1\. Got 0"):
        bars(make(HEADS), n=0)
    with pytest.raises(ValueError, match="no value 'size'; there are fraction"):
        bars(make(HEADS), value="size")
    with pytest.raises(ValueError, match="no column 'size' in the table; there are feature, r"):
        bars(CORRELATIONS, value="size")
    with pytest.raises(ValueError, match="'feature' holds no numbers"):
        bars(CORRELATIONS, value="feature")
    with pytest.raises(ValueError, match="no side 'none' in the result; it has 'caption', 'foil'"):
        bars(make(HEADS), side="none", resamples=20)
    with pytest.raises(ValueError, match="no column 'side'"):
        bars(CORRELATIONS, value="r", side="foil")
    with pytest.raises(ValueError, match="nothing to draw"):
        bars(CORRELATIONS.iloc[2:], value="r")
    assert clip_lens.bars is bars
