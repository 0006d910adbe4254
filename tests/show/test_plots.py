"""heatmap draws the numbers of the grid, marks what is missing, and stays readable."""

import copy
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from clip_lens.core.effects import SHOWN, Effects, toy_effects
from clip_lens.core.grid import one_side, pivot
from clip_lens.core.record import Record, SourceRecord
from clip_lens.data.slots import SLOTS
from clip_lens.methods.registry import LENS
from clip_lens.model.site import Site
from clip_lens.show.figures.heatmap import GREY, heatmap, largest
from clip_lens.show.figures.style import themed
from clip_lens.show.figures.words import slot_name


def make(places, seed=0, n_pairs=12, missing=0.0):
    generator = np.random.default_rng(seed)
    side = ["caption", "foil"] * (n_pairs // 2)
    sigma = [1, -1] * (n_pairs // 2)
    total = torch.tensor(sigma) * torch.tensor(1 + generator.random(n_pairs))
    values = torch.tensor(generator.normal(size=(len(places), n_pairs)))
    values[torch.tensor(generator.random(len(places)) < missing)] = torch.nan
    pairs = pd.DataFrame(
        {
            "key": [str(i) for i in range(n_pairs)],
            "caption": "a caption",
            "foil": "a foil",
            "image": "1.png",
            "side": side,
            "sigma": sigma,
            "d": (total * torch.tensor(sigma)).tolist(),
            "segment": "correct",
        }
    )
    return Effects(
        values, total, total * 0, tuple(places), pairs, Record(model="by hand", source=SourceRecord(swaps=True))
    )


def cells(figure):
    return [trace for trace in figure.data if trace.name != "no counterpart"]


RESID = [Site("resid", layer, slot=slot) for layer in range(5) for slot in ("eot", "negator", 3)]
HEADS = [Site("head", layer, unit) for layer in range(3) for unit in range(4)]


@pytest.mark.parametrize("value", ["fraction", "effect", "lower", "n"])
@pytest.mark.parametrize(("places", "rows"), [(RESID, "slot"), (HEADS, "unit")])
def test_every_panel_holds_its_grid(places, rows, value):
    effects = make(places, missing=0.2)
    figure = heatmap(effects, rows, value=value, resamples=30, of="ratios")
    assert len(cells(figure)) == 2
    for trace, side in zip(cells(figure), ("caption", "foil"), strict=True):
        grid = effects.grid(rows, value=value, side=side, resamples=30, of="ratios")
        np.testing.assert_array_equal(trace.z, grid.to_numpy())
    np.testing.assert_array_equal(cells(heatmap(grid))[0].z, grid.to_numpy())


NUMBER = r"-?\d+\.\d{3}"


def test_hover_tells_the_table():
    effects = make(HEADS)
    trace = cells(heatmap(effects, "unit", side="foil", resamples=30))[0]
    table = one_side(effects.table(resamples=30), "foil")
    for number, name in enumerate(SHOWN[:6]):
        expected = pivot(table, "unit", "layer", name).to_numpy()
        told = np.array([[float(re.findall(NUMBER, cell)[number]) for cell in line] for line in trace.hovertext])
        np.testing.assert_allclose(told, expected, atol=5e-4)
    assert all(cell.endswith("<br>6 pairs, 0 dropped") for line in trace.hovertext for cell in line)


def test_no_interval_is_told_where_there_is_none():
    effects = make(RESID, n_pairs=8)  # four on each side: fewer than an interval needs
    figure = heatmap(effects, side="foil")
    assert not any("[" in cell for line in figure.data[0].hovertext for cell in line)
    assert "nan" not in json.dumps(figure.data[0].hovertext.tolist()) and len(figure.frame) == len(RESID)


def test_a_figure_carries_the_rows_that_it_shows():
    effects = make(RESID, missing=0.2)
    for side in (None, "caption"):
        frame = heatmap(effects, side=side, resamples=30).frame
        table = effects.table(resamples=30)
        table = table if side is None else one_side(table, side)
        pd.testing.assert_frame_equal(frame, table[["place", "side", *SHOWN]].reset_index(drop=True))
    grid = effects.grid(side="foil")
    frame = heatmap(grid, value="fraction").frame
    assert list(frame) == ["slot", "layer", "fraction"] and len(frame) == int(grid.notna().sum().sum())
    for slot, layer, number in frame.itertuples(index=False):
        assert grid.loc[slot, layer] == number
    zeros = replace(effects, record=replace(effects.record, source=SourceRecord("zeros")))
    assert "fraction" not in heatmap(zeros, value="effect").frame and "fraction" in heatmap(zeros).frame


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda figure: pickle.loads(pickle.dumps(figure))])
def test_the_frame_goes_with_every_copy(copied):
    figure = heatmap(make(RESID), side="foil")
    again = copied(figure)
    pd.testing.assert_frame_equal(again.frame, figure.frame)
    assert json.loads(again.to_json()) == json.loads(figure.to_json()) and type(again) is type(figure)
    assert themed(figure, "dark").frame is not None and figure.update_layout(height=99).frame is not None


def test_the_frame_costs_a_page_nothing():
    figure = heatmap(make(RESID), side="foil")
    with_frame = figure.to_json()
    figure.frame = None
    assert figure.to_json() == with_frame


def test_colours_are_symmetric_around_zero_and_shared():
    figure = heatmap(make(RESID))
    axis = figure.layout.coloraxis
    assert axis.cmax == -axis.cmin == max(np.abs(trace.z).max() for trace in figure.data)
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert heatmap(make(RESID), limit=3.0).layout.coloraxis.cmax == 3.0
    nothing = replace(toy_effects(), values=torch.zeros(4, 3))
    assert heatmap(nothing).layout.coloraxis.cmax == 1.0
    assert largest(pd.DataFrame([[np.nan]])) == 0.0


def test_what_has_no_counterpart_is_grey_and_said():
    effects = make(RESID)
    effects.values[4] = torch.nan
    figure = heatmap(effects, side="foil")
    gap = next(trace for trace in figure.data if trace.name == "no counterpart")
    grid = effects.grid(side="foil")
    np.testing.assert_array_equal(~np.isnan(np.asarray(gap.z, dtype=float)), grid.isna().to_numpy())
    assert grid.isna().sum().sum() == 1
    assert {colour for _, colour in gap.colorscale} == {GREY}
    assert "no counterpart" in gap.hovertemplate and "no counterpart" in figure.layout.xaxis.title.text
    assert "no counterpart" not in heatmap(make(RESID)).to_json()


def test_what_was_only_read_has_no_counterpart_to_lack():
    effects = make(RESID)
    effects.values[4] = torch.nan
    figure = heatmap(replace(effects, record=replace(effects.record, method=LENS)), side="foil")
    assert "grey: no value" in figure.layout.xaxis.title.text and "counterpart" not in figure.to_json()
    assert figure.layout.coloraxis.colorbar.title.text == "share of the total"


def test_a_result_without_places_is_no_picture():
    with pytest.raises(ValueError, match="nothing to draw: the result has no places"):
        heatmap(make(RESID).where(layer=lambda layer: layer == 9))


def test_labels_are_words_in_the_order_of_the_text():
    figure = heatmap(make([Site("resid", 0, slot=slot) for slot in (*reversed(SLOTS), None, 2)]), side="foil")
    labels = list(figure.layout.yaxis.ticktext)
    assert labels == [slot_name(slot) for slot in SLOTS] + ["position 2", "all tokens"]
    top, bottom = figure.layout.yaxis.range[::-1]
    assert top < bottom
    assert figure.layout.xaxis.title.text.startswith("layer (0: embedding")
    assert heatmap(make(HEADS), "unit", side="foil").layout.xaxis.title.text == "block, counted from 0"
    assert heatmap(make(HEADS), "unit", side="foil").layout.yaxis.title.text == "head"


def test_pair_counts_are_in_the_heading():
    assert heatmap(make(RESID), side="foil").layout.title.text == "negation in the foil, n = 6 pairs"
    assert [note.text for note in heatmap(make(RESID)).layout.annotations[:2]] == [
        "negation in the caption<br>n = 6 pairs",
        "negation in the foil<br>n = 6 pairs",
    ]
    assert heatmap(make(RESID), side="foil", title="").layout.title.text is None
    assert heatmap(make(RESID), side="foil", title="Mine").layout.title.text == "Mine"


def test_many_cells_are_not_printed_and_their_labels_thinned():
    few = heatmap(make(RESID))
    many = heatmap(make([Site("neuron", layer, unit) for layer in range(2) for unit in range(300)]), "unit")
    assert few.data[0].texttemplate and not many.data[0].texttemplate
    room = many.layout.height - many.layout.margin.t - many.layout.margin.b
    assert room / len(many.layout.yaxis.ticktext) >= 14
    assert many.data[0].text[299][1] == "unit 299, layer 1"


@pytest.mark.parametrize(("places", "rows", "side"), [(RESID, "slot", None), (HEADS, "unit", "foil")])
def test_no_font_is_smaller_than_eleven_pixels(places, rows, side):
    def sizes(part):
        if isinstance(part, dict):
            yield from ([part["size"]] if "size" in part else [])
            for value in part.values():
                yield from sizes(value)
        elif isinstance(part, list | tuple):
            for value in part:
                yield from sizes(value)

    layout = heatmap(make(places), rows, side=side).layout.to_plotly_json()
    layout.pop("template", None)
    assert min(sizes(layout)) >= 11


def test_data_cannot_put_markup_into_a_label():
    figure = heatmap(make([Site("resid", 0, slot="<a href='http://x'>x</a>")]), side="foil")
    assert "<a" not in str(figure.layout.yaxis.ticktext)


def test_errors_are_those_of_the_grid():
    with pytest.raises(ValueError, match="differ in unit"):
        heatmap(make(HEADS), rows="slot")
    with pytest.raises(ValueError, match="no side 'none'"):
        heatmap(make(RESID), side="none")
    with pytest.raises(ValueError, match="no column 'fractoin'"):
        heatmap(make(RESID), value="fractoin")
