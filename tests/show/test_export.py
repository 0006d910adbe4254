"""save_figure writes what the ending says, and says what is missing where it can't."""

import base64
import json
import re
import sys
from types import ModuleType

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
from show.test_plots import RESID, make

import clip_lens
from clip_lens.show.figures.export import DRAWN, save_figure
from clip_lens.show.figures.heatmap import heatmap


@pytest.fixture
def figure():
    return heatmap(make(RESID), side="foil")


@pytest.fixture
def kaleido(monkeypatch):
    """A kaleido that is installed, as far as can be seen; what it draws is up to the test."""
    found = ModuleType("kaleido")
    found.__spec__ = plotly.io.__spec__
    monkeypatch.setitem(sys.modules, "kaleido", found)


def test_json_is_read_back(figure, tmp_path):
    path = save_figure(figure, tmp_path / "deeper" / "figure.json")
    assert path == tmp_path / "deeper" / "figure.json"
    again = plotly.io.read_json(path)
    written = again.data[0].to_plotly_json()["z"]
    numbers = np.frombuffer(base64.b64decode(written["bdata"]), written["dtype"]).reshape(3, 5)
    np.testing.assert_array_equal(numbers, figure.data[0].z)
    assert again.layout.height == figure.layout.height


def test_html_is_one_offline_page(figure, tmp_path):
    page = save_figure(figure, tmp_path / "figure.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?http", page)
    assert json.dumps("negation in the foil, n = 6 pairs") in page


def test_csv_is_the_table_that_was_drawn(figure, tmp_path):
    path = save_figure(figure, tmp_path / "figure.csv")
    pd.testing.assert_frame_equal(pd.read_csv(path), figure.frame, check_dtype=False, rtol=1e-15)
    with pytest.raises(ValueError, match=r"own\.csv is for a figure of clip_lens, which carries its table"):
        save_figure(go.Figure(), tmp_path / "own.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["figure.csv"]


def test_an_interrupted_call_leaves_the_file_as_it_was(figure, tmp_path, monkeypatch):
    path = save_figure(figure, tmp_path / "figure.json")
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for name in ("figure.json", "other.html"):
        with pytest.raises(OSError, match="disk full"):
            save_figure(figure, tmp_path / name)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["figure.json"]


@pytest.mark.parametrize("ending", DRAWN)
def test_without_kaleido_the_message_says_what_to_install(figure, tmp_path, monkeypatch, ending):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"kaleido is not installed: pip install 'clip_lens\[export\]'"
    ) as error:
        save_figure(figure, tmp_path / f"figure{ending}")
    assert "Chrome or Chromium" in str(error.value) and "figure.html" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_kaleidos_own_errors_become_one_line(figure, tmp_path, monkeypatch, kaleido):
    def fail(self, **how):
        raise OSError("Kaleido requires Google Chrome to be installed.\nmore\nlines")

    monkeypatch.setattr(go.Figure, "to_image", fail)
    with pytest.raises(
        RuntimeError, match=r"requires Google Chrome to be installed\. It needs Chrome or Chromium"
    ) as error:
        save_figure(figure, tmp_path / "figure.png")
    assert "\n" not in str(error.value) and error.value.__suppress_context__
    assert not list(tmp_path.iterdir())


def test_sizes_are_handed_on(figure, tmp_path, monkeypatch, kaleido):
    monkeypatch.setattr(go.Figure, "to_image", lambda self, **how: json.dumps(how).encode())
    save_figure(figure, tmp_path / "figure.SVG", width=400)
    expected = {"format": "svg", "width": 400, "height": figure.layout.height, "scale": 2.0}
    assert json.loads((tmp_path / "figure.SVG").read_text()) == expected
    save_figure(figure, tmp_path / "figure.png", height=99, scale=1)
    assert json.loads((tmp_path / "figure.png").read_text())["height"] == 99


def test_other_endings_are_refused(figure, tmp_path):
    for name in ("figure.gif", "figure"):
        with pytest.raises(
            ValueError, match=r"does not say what to write; the endings are \.html, \.json, \.csv, \.png"
        ):
            save_figure(figure, tmp_path / name)
    assert clip_lens.save_figure is save_figure
