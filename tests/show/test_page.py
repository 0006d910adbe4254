"""The page of a report as those use it who can't see it, can't hover, print it or take its numbers elsewhere."""

import csv
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image
from test_report import EVIL, NO_BREAK, RECORD, Page, files_of, make, own_part

import clip_lens.show
from clip_lens.core import effects as core
from clip_lens.core.effects import toy_effects
from clip_lens.methods.registry import PATHS
from clip_lens.model.site import Edge, Site
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.figures.style import DARK, LIGHT
from clip_lens.show.report.cautions import few_pairs
from clip_lens.show.report.report import report
from clip_lens.show.report.section import Picture, Section, Table

BARS = go.Figure(
    [go.Bar(name=side, x=["a", "b"], y=[1.0, -2.0], error_y={"array": [0.5, 0.25]}) for side in ("caption", "foil")]
)
DRAWN = pd.DataFrame({"side": ["caption", "foil"], "a": [1.0, 1.0], "b": [-2.0, -2.0]})
FRAME = pd.DataFrame(
    {
        "feature": ["tokens", "size"],
        "slope": [-1 / 3, np.nan],
        "p": [0.0012345, 0.5],
        "n": [490, 0],
        "kept": [True, False],
    }
)
VOID = {"meta", "link", "img", "br", "input", "hr"}


def study(**changes):
    parts = {
        "findings": ["Tokens explain nothing."],
        "text": "One paragraph.\n\nAnother.",
        "pictures": [
            Picture(BARS, "Effects of features", "A bar is a feature.", "Bars of two features.", "all.csv", DRAWN),
            Picture(go.Figure(go.Heatmap(z=[[1.0, 2.0]])), "Cells", "A cell is a head.", wide=True),
        ],
        "tables": [Table(FRAME, "Regression", "Least squares.", {"p": ".1e"})],
        "meta": {"seed": "7", "model": "toy"},
        "notes": ["Two pairs had no image."],
        "data": {"all.csv": FRAME},
    }
    return Section("What explains d?", **{**parts, **changes})


@pytest.fixture
def full(tmp_path):
    """A page that has everything."""
    file = tmp_path / "run.parquet"
    file.write_bytes(bytes(range(256)))
    Image.new("RGB", (8, 8)).save(tmp_path / "8.png")
    return report(
        {"confounds": study(), "resid": make(), "toy": toy_effects()},
        tmp_path / "r.html",
        title="The study",
        summary="In a sentence.",
        warnings=["The tower is random."],
        methods={"Regression": "Least squares.\n\nRobust errors."},
        data={"run.parquet": file, "notes.txt": b"seed 7"},
        pictures={"8.png": tmp_path / "8.png"},
    )


class Tree(HTMLParser):
    """Every element with its attributes, its parents' tags and the text below it."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "in": [parent["tag"] for parent in self.open], "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]


def test_elements_are_closed_and_ids_lead_somewhere(full):
    tree = Tree(own_part(full))
    assert not tree.open
    ids = [element["id"] for element in tree.elements if "id" in element]
    assert len(ids) == len(set(ids))
    links = [link["href"].removeprefix("#") for link in tree.all("a")]
    named = [element["aria-labelledby"] for element in tree.elements if "aria-labelledby" in element]
    assert links and set(links) | set(named) <= set(ids)
    packed = files_of(full)
    used = [element.get("data-file") or element.get("data-table") for element in tree.elements]
    assert set(filter(None, used)) <= set(packed)
    assert set(packed) - set(used) == {"figures", "plotly"}
    assert set(json.loads(packed["figures"][1])) == {e["id"] for e in tree.all("div") if e.get("class") == "plot"}


def test_headings_landmarks_and_the_contents(full):
    tree = Tree(own_part(full))
    levels = [int(element["tag"][1]) for element in tree.elements if re.fullmatch("h[1-6]", element["tag"])]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert [len(tree.all(tag)) for tag in ("main", "nav", "header", "title")] == [1, 1, 1, 1]
    assert tree.all("a")[0]["href"] == "#" + tree.all("main")[0]["id"]  # the first stop of the tab key skips the rest
    contents = [link["href"] for link in tree.all("a") if "nav" in link["in"]]
    heads = [f"#{head['id']}" for head in tree.all("h2")]
    assert contents == heads
    assert all(section["aria-labelledby"] for section in tree.all("section"))


def test_what_is_seen_is_said(full):
    tree = Tree(own_part(full))
    assert [bool(image["alt"]) for image in tree.all("img")] == [True, True]
    plots = [element for element in tree.elements if element.get("role") == "img"]
    assert len(plots) == len(tree.all("figure")) == len(tree.all("figcaption")) == 6
    assert plots[0]["aria-label"] == "Bars of two features." and all(plot["aria-label"] for plot in plots)
    assert all(head["scope"] in ("row", "col") for head in tree.all("th"))
    assert all("tr" in cell["in"] for cell in tree.all("td", "th"))
    scrolled = [element for element in tree.elements if element.get("class") == "scroll"]
    assert all(element["tabindex"] == "0" and element["role"] == "region" for element in scrolled)
    assert all(element.get("aria-label") or element.get("aria-labelledby") for element in scrolled)
    buttons = tree.all("button")
    assert all(button["type"] == "button" and button["text"].strip() for button in buttons)
    assert all(summary["in"][-1] == "details" and summary["text"].strip() for summary in tree.all("summary"))
    assert [f"Figure {n}." in tree.all("figcaption")[n - 1]["text"] for n in range(1, 7)] == [True] * 6


def luminance(colour):
    digits = colour.lstrip("#")
    parts = [
        int(part * (2 if len(digits) == 3 else 1), 16) / 255 for part in re.findall("." * (len(digits) // 3), digits)
    ]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1, 2])  # light, dark, print
def test_words_stand_out_from_their_ground(theme):
    styles = (Path(clip_lens.show.__file__).with_name("report") / "report.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", re.findall(r":root \{(.*?)\}", styles, re.S)[theme]))
    grounds = {"ink": ("paper", "card"), "soft": ("paper",), "link": ("paper", "card"), "warn": ("warn-paper",)}
    for words, behind in grounds.items():
        for ground in behind:
            low, high = sorted(luminance(colours[name]) for name in (words, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (words, ground)


def test_figures_change_their_colours_with_the_page(full):
    swapped = json.loads(re.search(r'id="dark">(.*?)</script>', own_part(full), re.S)[1])
    assert swapped[LIGHT.ink] == DARK.ink and swapped[LIGHT.positive] == DARK.positive
    assert "prefers-color-scheme: dark" in own_part(full)


def read(file):
    return pd.read_csv(io.BytesIO(file[1]))


def test_figures_and_tables_give_their_numbers(full):
    files = files_of(full)
    assert files["figure-1-numbers"][0] == "figure-1.csv" and files["table-1-numbers"][0] == "table-1.csv"
    pd.testing.assert_frame_equal(read(files["figure-1-numbers"]), DRAWN, check_dtype=False)
    pd.testing.assert_frame_equal(read(files["table-1-numbers"]), FRAME, rtol=1e-8)
    table = make().table()
    for name, side in (("figure-3", "caption"), ("figure-4", "foil")):
        shown = read(files[f"{name}-numbers"]).set_index("place")
        there = table[table["side"] == side].set_index("place")
        for column in ("fraction", "lower", "upper", "effect", "effect_lower", "effect_upper"):
            assert np.allclose(shown[column], there[column], rtol=1e-7), column
        assert (shown["n"] == there["n"]).all()


def test_data_are_taken_out_as_they_went_in(full):
    files = dict(files_of(full).values())
    assert files["run.parquet"] == bytes(range(256)) and files["notes.txt"] == b"seed 7"
    pd.testing.assert_frame_equal(read(("", files["all.csv"])), FRAME, rtol=1e-8)
    whole = read(("", files["resid.csv"]))
    assert len(whole) == 18 and {"layer", "slot", "side", "lower", "upper"} <= set(whole)


def test_data_that_are_too_large_are_left_out_and_named(tmp_path):
    noise = np.random.default_rng(0).bytes(4_000_000)
    path = report({"it": study()}, tmp_path / "r.html", data={"large.bin": noise, "small.bin": b"1"})
    names = [name for name, _ in files_of(path).values()]
    assert "large.bin" not in names and "small.bin" in names
    assert "large.bin: 4.0 MB are too much for this page." in Page(path).text
    assert path.stat().st_size < 6e6


def test_a_table_is_written_for_readers(full):
    tree = Tree(own_part(full))
    cells = [cell["text"] for cell in tree.all("th", "td") if "tbody" in cell["in"]]
    start = cells.index("tokens")
    minus = "\N{MINUS SIGN}"
    assert cells[start : start + 5] == ["tokens", f"{minus}0.333", f"1.2e{minus}03", "490", "yes"]
    assert cells[start + 5 : start + 10] == ["size", "", f"5.0e{minus}01", "0", "no"]


def test_a_long_table_is_cut_and_says_so(tmp_path):
    frame = pd.DataFrame({"place": [f"row {number}" for number in range(50)], "effect": 1.0})
    path = report({"it": study(tables=[Table(frame, "Many", rows=8)])}, tmp_path / "r.html")
    assert "The first 8 of 50 rows." in Page(path).text and "row 8" not in Page(path).text
    assert len(read(files_of(path)["table-1-numbers"])) == 50


def test_the_index_of_a_table_is_kept_where_it_has_a_name():
    frame = pd.DataFrame({"d": [1.0]}, index=pd.Index(["foil"], name="side"))
    assert list(Table(frame, "Means").frame.columns) == ["side", "d"]
    assert list(Table(frame.rename_axis(None), "Means").frame.columns) == ["d"]


def test_warnings_come_before_any_number_and_methods_are_folded(full):
    text = own_part(full)
    assert text.index("The tower is random.") < text.index("In short</h2>")
    tree = Tree(text)
    folded = [e["text"] for e in tree.all("summary") if "figure" not in e["in"] and "section" in e["in"]]
    assert folded[0] == "Regression"
    assert [e["text"] for e in tree.all("p") if "details" in e["in"]] == ["Least squares.", "Robust errors."]


def test_effects_bring_the_methods_that_explain_them(tmp_path):
    text = Page(report({"a": toy_effects()}, tmp_path / "a.html")).text
    assert "Recovered fractions" in text and "The logit difference d" in text
    assert "Recovered fractions" not in Page(report({"a": toy_effects()}, tmp_path / "b.html", methods=[])).text
    assert "Methods" not in Page(report({"a": study()}, tmp_path / "c.html")).text


def test_a_section_of_words_alone_makes_a_page(tmp_path):
    page = Tree(own_part(report({"only": Section("Only words", text="Nothing to see.")}, tmp_path / "r.html")))
    assert [head["text"] for head in page.all("h2")] == ["In short", "Only words"]


def test_what_sections_have_in_common_is_said_once(tmp_path):
    sections = {"one": study(), "two": study(meta={"model": "toy", "seed": "8"}), "three": study(meta={})}
    text = re.sub(r"\s", "", Page(report(sections, tmp_path / "r.html")).text)
    assert text.count("modeltoy") == 1
    assert "seed7" in text and "seed8" in text


def test_no_text_of_a_section_becomes_markup(tmp_path):
    frame = pd.DataFrame({EVIL: [EVIL]})
    figure = go.Figure(go.Bar(x=[EVIL], y=[1], name=EVIL))
    section = Section(
        EVIL, [EVIL], EVIL, [Picture(figure, EVIL, EVIL, EVIL)], [Table(frame, EVIL, EVIL)],
        {EVIL: EVIL, "model": EVIL}, [EVIL], data={"x.csv": frame},
    )  # fmt: skip
    path = report(
        {EVIL: section}, tmp_path / "r.html", summary=EVIL, warnings=EVIL, methods=[(EVIL, EVIL)], data={EVIL: b"1"}
    )
    page = path.read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img" not in page
    assert page.count("<script") == page.count("</script>") == 3


def test_mistakes_are_told_with_what_would_fit(tmp_path):
    with pytest.raises(ValueError, match=r"no data 'gone'.*there are all.csv, given"):
        picture = Picture(BARS, "Bars", "A bar.", data="gone")
        report({"it": study(pictures=[picture])}, tmp_path / "r.html", data={"given": b""})
    with pytest.raises(ValueError, match="a picture needs a caption"):
        Picture(BARS, "Bars", " ")
    with pytest.raises(TypeError, match="Got dict"):
        Picture({}, "Bars", "A bar.")
    with pytest.raises(ValueError, match="no column 'q' to format; there are feature, slope"):
        Table(FRAME, "Regression", formats={"q": ".1f"})
    with pytest.raises(ValueError, match="a section needs a title"):
        Section(" ")
    with pytest.raises(ValueError, match="put it into a list"):
        Section("It", findings="One sentence.")
    with pytest.raises(ValueError, match="missing: segment"):
        Section("It", pairs=toy_effects().pairs.drop(columns="segment"))
    assert not list(tmp_path.iterdir())


def test_a_figure_without_numbers_has_no_table_and_says_so(tmp_path):
    own, ours = go.Figure(go.Bar(y=[1.0])), heatmap(toy_effects(), side="foil")
    for figure, there in ((own, False), (ours, True)):
        path = report({"it": study(pictures=[Picture(figure, "It", "A cell.")])}, tmp_path / "r.html")
        assert ("figure-1-numbers" in files_of(path)) == there
        assert ("Show figure 1 as a table" in Page(path).text) == there
        assert ("This figure came without its numbers" in Page(path).text) != there
    given = report({"it": study(pictures=[Picture(own, "It", "A bar.", numbers=FRAME)])}, tmp_path / "g.html")
    pd.testing.assert_frame_equal(read(files_of(given)["figure-1-numbers"]), FRAME, rtol=1e-8)


FORMULA = '=HYPERLINK("http://example.org","click")'


def test_no_file_of_a_page_holds_a_formula(tmp_path):
    frame = pd.DataFrame({"caption": [FORMULA, "-x"], "d": [-1.5, 2.0]})
    table, picture = Table(frame, "Pairs"), Picture(BARS, "Bars", "A bar.", numbers=frame)
    effects = make([Site("resid", layer, slot=FORMULA) for layer in (0, 1)], [0.0, 1.0])
    section = study(tables=[table], pictures=[picture], data={"all.csv": frame})
    path = report({"it": section, "that": effects}, tmp_path / "r.html", data={"more": frame})
    tables = {name: content for name, content in files_of(path).values() if name.endswith(".csv")}
    assert len(tables) == 8  # of a given figure, two results, three tables, and what is behind
    for content in tables.values():
        for row in csv.reader(io.StringIO(content.decode())):
            for cell in row:
                assert not cell.startswith(("=", "+", "-", "@")) or float(cell)
    assert [row[0] for row in csv.reader(io.StringIO(tables["more.csv"].decode()))] == ["caption", f"'{FORMULA}", "'-x"]
    assert FORMULA in Page(path).text  # a page is no spreadsheet


def test_small_numbers_are_not_said_to_be_nothing(tmp_path):
    frame = pd.DataFrame({"term": ["a", "b", "c"], "slope": [-0.0001, -0.001, np.nan], "p": [1e-9, 0.0499, np.nan]})
    path = report({"it": study(tables=[Table(frame, "Terms", formats={"p": "p"})])}, tmp_path / "r.html")
    cells = [cell["text"] for cell in Tree(own_part(path)).all("th", "td") if "tbody" in cell["in"]]
    assert cells[cells.index("a") :][:9] == ["a", "0.000", "< .001", "b", "\N{MINUS SIGN}0.001", "0.050", "c", "", ""]
    pd.testing.assert_frame_equal(read(files_of(path)["table-1-numbers"]), frame)


def test_warnings_that_follow_from_the_results_are_shown_once(tmp_path):
    record = replace(RECORD, hooks=("blocks.1.hook_mlp_out", "ln_final"), notes=("run in bfloat16",))
    few, many = make(record=record), make(n_pairs=40)
    given = [few_pairs(10, "few, again"), "The tower is random."]
    path = report({"few": few, "again": replace(few), "many": many}, tmp_path / "r.html", warnings=given)
    shown = [
        e["text"].strip().replace(NO_BREAK, " ") for e in Tree(own_part(path)).elements if e.get("class") == "warning"
    ]
    nothing = [line for line in shown if "may be 0" in line]  # d is 1 [-0.8, 2.8] on either side of the ten pairs
    assert [re.search(r"negation in the (\w+)", line)[1] for line in nothing] == ["caption", "foil"]
    assert [line for line in shown if line not in nothing] == [
        *given,
        "The tower had hooks of yours on, at blocks.1.hook_mlp_out, ln_final: the numbers are those under them.",
        "run in bfloat16",
    ]
    assert not re.search('class="warning"', own_part(report({"many": many}, tmp_path / "m.html")))
    alone = own_part(report({"few": few}, tmp_path / "a.html", warnings=few_pairs(10))).replace(NO_BREAK, " ")
    assert alone.count("Only 10 pairs: intervals") == 1  # which result is meant need not be said
    three = make(n_pairs=10).where(side="foil", key=["pair-1", "pair-3", "pair-5"])
    text = Page(report({"it": three}, tmp_path / "f.html")).text
    assert "Only 3 pairs" in text and "[" not in text.split("In short")[2].split("What was run")[0]


def test_a_report_of_edges_computes_its_table_once(tmp_path, monkeypatch):
    counts = Counter()
    for name in ("tabulate", "index_rows"):
        own = getattr(core, name)
        counted = lambda *given, own=own, name=name: counts.update([name]) or own(*given)
        monkeypatch.setattr(core, name, counted)
    edges = [Edge(Site("embed"), Site(kind, layer, head)) for layer in range(3) for head in range(20) for kind in "qkv"]
    edges += [Edge(Site("head", 0, head), Site("mlp", layer)) for layer in (1, 2) for head in range(50)]
    shares = np.random.default_rng(0).normal(size=len(edges)).tolist()
    path = report({"edges": make(edges, shares, replace(RECORD, method=PATHS))}, tmp_path / "r.html")
    assert counts == {"tabulate": 1, "index_rows": 1}
    assert len(Page(path).all("figure")) == 4
