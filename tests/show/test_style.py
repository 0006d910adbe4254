"""One palette: every figure changes with the theme, nothing else does, and what is written can be read."""

import json
from itertools import pairwise

import numpy as np
import plotly.io
import pytest
from show.test_edge_pictures import EDGES
from show.test_plots import RESID, make

from clip_lens.show.figures.bars import bars
from clip_lens.show.figures.curves import curve
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.figures.network import network
from clip_lens.show.figures.style import DARK, LIGHT, THEMES, TRANSPARENT, _roles, faded, swaps, themed


def luminance(colour):
    part = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def contrast(one, two):
    """The ratio of WCAG 2."""
    bright, dim = sorted((luminance(one), luminance(two)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def figures():
    missing = make(RESID)
    missing.values[4] = np.nan
    yield heatmap(missing, resamples=20)
    yield bars(missing, n=3, resamples=20)
    yield curve(missing.where(slot="eot"), resamples=20)
    yield network(make(EDGES), n=20, side="foil")


@pytest.mark.parametrize("number", range(4))
def test_no_colour_of_the_light_theme_is_left_in_the_dark_one_and_back(number):
    figure = list(figures())[number]
    dark = themed(figure, "dark")
    text = dark.to_json()
    strangers = set(_roles(LIGHT)) - set(_roles(DARK))
    used = {colour for colour in strangers if f'"{colour}"' in figure.to_json()}
    assert len(used) > 5
    assert not [colour for colour in strangers if f'"{colour}"' in text]
    assert json.loads(themed(dark, "light").to_json()) == json.loads(themed(figure, "light").to_json())
    assert json.loads(themed(figure, "light").to_json())["data"] == json.loads(figure.to_json())["data"]


def test_data_that_looks_like_a_colour_stays():
    figure = heatmap(make(RESID), side="foil", title="#222222")
    figure.data[0].name = "#ffffff"
    figure.add_scatter(x=[0], y=[0], marker_color="#abcdef")
    dark = themed(figure, "dark")
    assert (dark.layout.title.text, dark.data[0].name, dark.data[-1].marker.color) == ("#222222", "#ffffff", "#abcdef")
    np.testing.assert_array_equal(dark.data[0].z, figure.data[0].z)


def test_every_colour_has_one_role():
    for name, theme in THEMES.items():
        target = swaps(name)
        for source in THEMES.values():
            for colour, swap in zip(_roles(source), _roles(theme), strict=True):
                assert target[colour] == swap
        assert target[faded(LIGHT.series[0])] == faded(theme.series[0])


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_words_and_lines_stand_out_from_the_paper(theme):
    assert contrast(theme.ink, theme.paper) > 7 and contrast(theme.ink, theme.fill) > 7
    assert contrast(theme.soft, theme.paper) > 4.5
    assert min(contrast(colour, theme.paper) for colour in (theme.positive, theme.negative)) > 4.5
    assert min(contrast(colour, theme.paper) for colour in theme.series) > 2


def test_transparent_words_are_read_on_white_and_on_black():
    for colour in (TRANSPARENT.ink, TRANSPARENT.soft):
        assert min(contrast(colour, page) for page in ("#ffffff", "#000000")) > 4.3
    for colour in (TRANSPARENT.positive, TRANSPARENT.negative):
        assert min(contrast(colour, page) for page in ("#ffffff", "#000000")) > 3.5


@pytest.mark.parametrize("theme", THEMES.values())
def test_scales_go_steadily_from_neutral_to_both_ends(theme):
    middle = len(theme.diverging) // 2
    distance = [contrast(colour, theme.diverging[middle]) for colour in theme.diverging]
    assert all(one > two for one, two in pairwise(distance[: middle + 1]))
    assert all(one < two for one, two in pairwise(distance[middle:]))
    red, green, blue = (int(theme.diverging[middle][start : start + 2], 16) for start in (1, 3, 5))
    assert red == green == blue
    start = [contrast(colour, theme.sequential[0]) for colour in theme.sequential]
    assert all(one < two for one, two in pairwise(start))


def test_series_stay_apart_for_the_colour_blind():
    """Lightness or hue differ after the projections of Vienot, Brettel and Mollon (1999) for protans and deutans."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for theme in (LIGHT, DARK):
        colours = [theme.positive, theme.negative], list(theme.series)
        for group in colours:
            linear = np.array([[(int(c[s : s + 2], 16) / 255) ** 2.2 for s in (1, 3, 5)] for c in group])
            for blind in (protan, deutan):
                seen = (linear @ (np.linalg.inv(to_lms) @ blind @ to_lms).T).clip(0, 1) ** (1 / 2.2) * 255
                apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(group), 1)]
                assert apart.min() > 35, (theme.paper, apart.min())


def test_nothing_is_set_for_other_figures():
    before = plotly.io.templates.default
    list(figures())
    assert plotly.io.templates.default == before
    with pytest.raises(ValueError, match="no theme 'black'; the themes are light, dark, transparent"):
        themed(heatmap(make(RESID)), "black")
