"""Points with pictures: the numbers of the frame, the pictures of the folder, one offline page."""

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import clip_lens
from clip_lens.show.figures.scatter import MOST, scatter_pairs
from clip_lens.show.figures.style import themed

PAIRS = pd.DataFrame(
    {
        "image": ["red.png", "blue.png", "gone.png", "<b>odd.png", "red.png"],
        "caption": ["red", "blue", "gone", "<a href='x'>odd</a>", "again"],
        "side": ["caption", "foil", "caption", "foil", "caption"],
        "size": [0.1, 0.2, np.nan, 0.4, 0.5],
        "d": [1.0, -2.0, 3.0, 4.0, 5.0],
    }
)


@pytest.fixture
def folder(tmp_path):
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        Image.new("RGB", (400, 300), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "gone.png").write_text("no picture")
    return tmp_path


def test_points_are_the_rows_by_side(folder):
    figure = scatter_pairs(PAIRS, "size", "d", pictures=folder)
    caption, foil = figure.data
    assert (caption.x.tolist(), caption.y.tolist()) == ([0.1, 0.5], [1.0, 5.0])  # a row without a size is left out
    assert (foil.x.tolist(), foil.y.tolist()) == ([0.2, 0.4], [-2.0, 4.0])
    assert [row[0] for row in foil.customdata] == ["blue.png", "<b>odd.png"]
    assert list(foil.customdata[1][1:]) == ["&lt;b&gt;odd.png", "&lt;a href='x'&gt;odd&lt;/a&gt;"]
    assert len(scatter_pairs(PAIRS, "size", "d", by=None).data) == 1
    plain = scatter_pairs(PAIRS[["size", "d"]], "size", "d")
    assert plain.data[0].y.tolist() == [1.0, -2.0, 4.0, 5.0] and plain.layout.meta == {"pictures": {}}


@pytest.mark.parametrize("mapped", [False, True])
def test_each_picture_is_in_the_figure_once_and_small(folder, mapped):
    given = {name: folder / name for name in ("red.png", "blue.png")} if mapped else folder
    pictures = scatter_pairs(PAIRS, "size", "d", pictures=given).layout.meta["pictures"]
    assert list(pictures) == ["red.png", "blue.png"]
    for name, colour in (("red.png", (254, 0, 0)), ("blue.png", (0, 0, 254))):
        opened = Image.open(io.BytesIO(base64.b64decode(pictures[name].partition(",")[2])))
        assert opened.size == (192, 144)
        np.testing.assert_allclose(opened.getpixel((50, 50)), colour, atol=4)


def test_an_id_never_leads_out_of_the_folder(folder):
    inside = folder / "inside"
    inside.mkdir()
    frame = PAIRS.assign(image="../red.png")
    assert scatter_pairs(frame, "size", "d", pictures=inside).layout.meta["pictures"] == {}


def test_the_number_of_pictures_is_bounded(folder):
    names = {f"{number}": folder / "red.png" for number in range(MOST + 2)}
    frame = pd.DataFrame({"image": list(names), "x": 1.0, "y": 2.0})
    figure = scatter_pairs(frame, "x", "y", pictures=names)
    assert len(figure.layout.meta["pictures"]) == MOST and len(figure.data[0].x) == MOST + 2


def test_every_way_to_html_has_the_script_and_needs_no_network(folder, tmp_path):
    figure = scatter_pairs(PAIRS, "size", "d", pictures=folder)
    clip_lens.save_figure(figure, tmp_path / "page.html")
    pages = [
        (tmp_path / "page.html").read_text(encoding="utf-8"),
        figure._repr_mimebundle_()["text/html"],
        themed(figure, "dark").to_html(),
        figure.to_html(post_script="own();"),
    ]
    for page in pages:
        assert "plotly_hover" in page and "{plot_id}" not in page
        assert page.count("jpeg;base64,") == 2
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?http", page)
    assert "own();" in pages[-1]
    assert figure._ipython_display_ is None
    assert json.loads(figure.to_json())["layout"]["meta"]["pictures"]["red.png"].startswith("data:image/jpeg")


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="no column 'area' in the table; there are image"):
        scatter_pairs(PAIRS, "area", "d")
    with pytest.raises(ValueError, match="'caption' holds no numbers"):
        scatter_pairs(PAIRS, "caption", "d")
    with pytest.raises(ValueError, match="nothing to draw"):
        scatter_pairs(PAIRS.iloc[2:3], "size", "d")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        scatter_pairs(PAIRS, "size", "d", pictures=tmp_path / "none")
