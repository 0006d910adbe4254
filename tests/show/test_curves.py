"""Lines, bands and points hold the numbers of their tables."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from show.test_plots import HEADS, RESID, make

import clip_lens
from clip_lens.core.grid import one_side
from clip_lens.show.figures.curves import curve, scatter
from clip_lens.show.figures.style import LIGHT, faded

FRAME = pd.DataFrame(
    {
        "edges": [100, 1, 10, 10, 1, np.nan],
        "f": [0.9, 0.1, 0.5, 0.3, 0.05, 1.0],
        "low": [0.8, 0.0, 0.4, 0.2, np.nan, 1.0],
        "high": [1.0, 0.2, 0.6, 0.4, np.nan, 1.0],
        "method": ["EAP", "EAP", "EAP", "<i>ACDC", "<i>ACDC", "EAP"],
    }
)


def lines(figure):
    return [trace for trace in figure.data if trace.fill is None]


def bands(figure):
    return [trace for trace in figure.data if trace.fill]


def test_each_series_is_a_line_in_the_order_of_x_with_its_band():
    figure = curve(FRAME, "edges", "f", lower="low", upper="high", by="method", log=True)
    eap, acdc = lines(figure)
    assert (eap.name, acdc.name) == ("EAP", "&lt;i&gt;ACDC")
    assert (eap.x.tolist(), eap.y.tolist()) == ([1, 10, 100], [0.1, 0.5, 0.9])
    assert (acdc.x.tolist(), acdc.y.tolist()) == ([1, 10], [0.05, 0.3])
    assert list(eap.customdata) == [
        f"<b>{f:.3f}</b> [{low:.3f}, {f + 0.1:.3f}]" for low, f in ((0, 0.1), (0.4, 0.5), (0.8, 0.9))
    ]
    assert acdc.customdata[0] == "<b>0.050</b>"  # no bounds at 1
    pd.testing.assert_frame_equal(figure.frame, FRAME.iloc[:5][["method", "edges", "f", "low", "high"]])
    there_and_back = bands(figure)[0]
    assert there_and_back.x.tolist() == [1, 10, 100, 100, 10, 1]
    assert there_and_back.y.tolist() == [0.2, 0.6, 1.0, 0.8, 0.4, 0.0]
    assert bands(figure)[1].x.tolist() == [10, 10]  # no bounds at 1
    assert figure.layout.xaxis.type == "log" and figure.layout.showlegend
    for line, band in zip(lines(figure), bands(figure), strict=True):
        assert line.legendgroup == band.legendgroup and not band.showlegend
        assert band.fillcolor == faded(line.line.color)


def test_one_line_needs_no_legend_and_many_differ():
    assert not curve(FRAME, "edges", "f").layout.showlegend and len(curve(FRAME, "edges", "f").data) == 1
    many = pd.DataFrame({"x": [0, 1] * 16, "y": 1.0, "by": np.repeat(np.arange(16), 2)})
    looks = [(trace.line.color, trace.line.dash) for trace in curve(many, "x", "y", by="by").data]
    assert len(set(looks)) == 16
    assert len({colour for colour, _ in looks[:7]}) == 7


@pytest.mark.parametrize("value", ["effect", "fraction"])
def test_a_lens_has_a_line_for_each_side(value):
    effects = make([place for place in reversed(RESID) if place.slot == "eot"])
    figure = curve(effects, y=value, resamples=30)
    low, high = ("effect_lower", "effect_upper") if value == "effect" else ("lower", "upper")
    for line, side, colour in zip(lines(figure)[:2], ("caption", "foil"), LIGHT.series[:2], strict=True):
        table = one_side(effects.table(resamples=30), side).sort_values("layer")
        assert line.x.tolist() == [0, 1, 2, 3, 4] and line.line.color == colour
        np.testing.assert_array_equal(line.y, table[value])
        told = [f"<b>{y:.3f}</b> [{a:.3f}, {b:.3f}]" for y, a, b in table[[value, low, high]].to_numpy()]
        assert list(line.customdata) == told
    assert figure.layout.xaxis.title.text.startswith("layer (0: embedding")
    with pytest.raises(ValueError, match=r"one place a layer, got head 0.0 and head 0.1"):
        curve(make(HEADS))
    with pytest.raises(ValueError, match="no column 'size'"):
        curve(effects, y="size", resamples=20)


def test_two_estimates_of_the_same_places_stand_against_each_other():
    exact, other = make(HEADS), make(HEADS, seed=1)
    shuffled = torch.randperm(len(HEADS), generator=torch.Generator().manual_seed(0)).tolist()
    estimate = replace(other, values=other.values[shuffled], places=tuple(HEADS[number] for number in shuffled))
    figure = scatter(exact, estimate)
    points = [trace for trace in figure.data if trace.mode == "markers"]
    for trace, side, note in zip(points, ("caption", "foil"), figure.layout.annotations, strict=True):
        across, up = (one_side(e.fraction(), side).set_index("place")["effect"] for e in (exact, other))
        np.testing.assert_allclose(trace.x, across[list(trace.hovertext)], rtol=1e-12)
        np.testing.assert_allclose(trace.y, up[list(trace.hovertext)], rtol=1e-12)
        assert len(trace.x) == len(HEADS)
        assert note.text.endswith(f"Pearson r = {across.corr(up):.3f}, 12 places")
    assert list(figure.frame) == ["place", "side", "exact", "estimate"] and len(figure.frame) == 2 * len(HEADS)
    np.testing.assert_allclose(figure.frame["exact"].iloc[len(HEADS) :], points[1].x)
    same = scatter(exact, exact, side="foil")
    assert "r = 1.000" in same.layout.annotations[0].text
    assert same.data[0].x == same.data[0].y  # the line of equality


def test_places_of_one_result_only_are_left_out_and_counted():
    exact, part = make(HEADS), make(HEADS[:5])
    part.values[0] = torch.nan
    figure = scatter(exact, part, side="foil")
    assert list(figure.data[1].hovertext) == [f"head {place.layer}.{place.unit}" for place in HEADS[1:5]]
    assert figure.layout.annotations[0].text.endswith("4 places, 8 only in one result")
    still = replace(exact, values=torch.zeros_like(exact.values))
    assert "not defined" in scatter(exact, still, side="foil").layout.annotations[0].text


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no column 'size' in the table; there are edges, f"):
        curve(FRAME, "size", "f")
    with pytest.raises(ValueError, match="'method' holds no numbers, but \\['EAP'\\]"):
        curve(FRAME, "edges", "method")
    with pytest.raises(ValueError, match="both lower and upper"):
        curve(FRAME, "edges", "f", lower="low")
    with pytest.raises(ValueError, match="no place for 0"):
        curve(FRAME.assign(edges=0), "edges", "f", log=True)
    with pytest.raises(ValueError, match="nothing to draw"):
        curve(FRAME.iloc[-1:], "edges", "f")
    exact = make(HEADS)
    with pytest.raises(ValueError, match="no side 'none' in both results; they share \\['caption', 'foil'\\]"):
        scatter(exact, exact, side="none")
    with pytest.raises(ValueError, match="no side in common"):
        scatter(exact.where(side="caption"), exact.where(side="foil"))
    with pytest.raises(ValueError, match=r"0 places are in both results, such as head 0.0 in the first and resid 0"):
        scatter(exact, make(RESID))
    with pytest.raises(ValueError, match="drawn as it is, resamples is for a result"):
        curve(FRAME, "edges", "f", resamples=20)
    assert (clip_lens.curve, clip_lens.scatter) == (curve, scatter)


def test_sides_keep_their_colours_whatever_stands_beside_them():
    names = ["overall", "caption", "foil", "none", "another"]
    frame = pd.DataFrame({"x": [0, 1] * 5, "y": 1.0, "side": np.repeat(names, 2)})
    colours = {trace.name: trace.line.color for trace in curve(frame, "x", "y", by="side").data}
    assert len(set(colours.values())) == 5
    assert colours["negation in the caption"] == LIGHT.series[0] and colours["negation in the foil"] == LIGHT.series[1]
