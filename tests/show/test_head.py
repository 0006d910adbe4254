"""What a page shows first and how it is set: the main picture, three points, nothing twice, nothing empty."""

import gzip
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image
from show.test_page import Tree
from show.test_report import NO_BREAK, files_of, make, own_part

import clip_lens.show
from clip_lens.core.effects import toy_effects
from clip_lens.model.site import Edge, Site
from clip_lens.show.figures.alike import alike
from clip_lens.show.figures.curves import curve
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.report.effects_section import section_of
from clip_lens.show.report.head import D_IS
from clip_lens.show.report.report import report
from clip_lens.show.report.section import Picture, Section, Table
from clip_lens.words import unbroken

FIGURE = go.Figure(go.Bar(x=["a"], y=[1.0]))


def drawn(path):
    """The figures of a page as they are drawn, by id."""
    return json.loads(files_of(path)["figures"][1])


def test_the_head_has_d_the_main_picture_and_three_points(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "8.png")
    sections = {
        "first": Section("First", [f"Finding {n}." for n in range(5)], pictures=[Picture(FIGURE, "Other", "A bar.")]),
        "second": Section(
            "Second", ["And this."],
            pictures=[
                Picture(FIGURE, "Left", "A bar.", pair="x", main=True), Picture(FIGURE, "Right", "Bars.", pair="x"),
                Picture(FIGURE, "Rest", "Others."),
            ],
            pairs=make().pairs,
        ),
    }  # fmt: skip
    tree = Tree(own_part(report(sections, tmp_path / "r.html", summary="A summary.", pictures=tmp_path)))
    (lead,) = (element["text"] for element in tree.all("p") if element.get("class") == "lead")
    assert lead == f"{D_IS} A summary."
    order = [element["text"] for element in tree.all("h1", "h3", "li", "h2") if "nav" not in element["in"]]
    start = order[: order.index("First")]
    assert start[1:4] == ["In short", "Left", "Right"]
    assert [line.removesuffix(" More") for line in start[4:]] == ["Finding 0.", "Finding 1.", "And this."]
    for line in (*(f"Finding {n}." for n in range(5)), "And this."):
        assert sum(element["text"].removesuffix(" More") == line for element in tree.all("li")) == 1
    titles = [element["text"] for element in tree.all("h3") if "figure" in element["in"]]
    assert titles == ["Left", "Right", "Other", "Rest"]
    (shown,) = (p["text"] for p in tree.all("p") if p.get("class") == "note" and "There is a dog 8." in p["text"])
    assert "There is no dog." in shown and f"4.0{NO_BREAK}logits" in shown  # d of the pair that has a picture


def test_headlines_are_the_points_and_findings_stay_in_their_sections(tmp_path):
    sections = {"a": Section("A", ["One."], headline="In a word."), "b": Section("B", ["Two."])}
    tree = Tree(own_part(report(sections, tmp_path / "r.html", points=["First of all."])))
    lines = [element["text"].removesuffix(" More") for element in tree.all("li") if "nav" not in element["in"]]
    assert lines[:2] == ["First of all.", "In a word."] and lines[2:] == ["One.", "Two."]


def test_a_finding_of_two_results_and_a_caption_are_said_once(tmp_path):
    path = report({"one": make(), "two": replace(make())}, tmp_path / "r.html")
    tree = Tree(own_part(path))
    lines = [element["text"].removesuffix(" More") for element in tree.all("li") if "nav" not in element["in"]]
    found = [line for line in lines if "the largest share" in line]
    assert len(found) == len(set(found)) == 2
    captions = [element["text"] for element in tree.all("figcaption")]
    assert [caption.startswith(f"Figure {n}. Read it as") for n, caption in enumerate(captions, 1)] == [
        False, True, True, True
    ]  # fmt: skip


STILL = [Site("resid", layer, slot=slot) for layer in range(2) for slot in ("sot", "be", "negator", "stop", "eot")]


def test_rows_that_are_zero_by_construction_are_left_out_and_named():
    section = section_of("resid", make(STILL, [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.0, 0.75]))
    for picture in section.pictures:
        assert set(picture.figure.frame["place"]) == {
            f"resid {n} @{slot}" for n in (0, 1) for slot in ("negator", "eot")
        }
        assert "Not shown: start of text, is / are and full stop, exactly 0 in every pair." in picture.caption
    first = section_of("resid", make(STILL, [0.0, 0.0, 1.0, 0.1, 0.0, 0.0, 0.0, 0.25, 0.0, 0.75])).pictures[0].caption
    assert "start of text and is / are, exactly 0 in every pair: up to there the two texts are the same" in first
    assert len(section.data["resid.csv"]) == 20  # the whole table has them
    one = make(STILL, [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.0, 0.75])
    one.values[0, 3] = 1e-7  # a single pair in which it moves anything
    assert "resid 0 @sot" in set(section_of("resid", one).pictures[0].figure.frame["place"])


def test_maps_that_are_zero_by_construction_are_left_out_and_named():
    places = [Site("head", layer, unit, slot) for slot in ("sot", "eot") for layer in (0, 1) for unit in (0, 1)]
    section = section_of("heads", make(places, [0.0] * 4 + [0.1, 0.2, 0.3, 0.4]))
    assert [picture.title for picture in section.pictures] == [
        "End of text, negation in the caption (5 pairs)", "End of text, negation in the foil (5 pairs)"
    ]  # fmt: skip
    assert "Not shown: start of text, where every effect is exactly 0" in section.pictures[0].caption
    nothing = section_of("heads", make(places, [0.0] * 8))
    assert len(nothing.pictures) == 4  # that all is 0 is a result


def test_a_pair_shares_a_row_its_colours_and_its_range(tmp_path):
    grids = [heatmap(pd.DataFrame([[size]]), value="effect") for size in (1.0, -3.0)]
    lines = [curve(pd.DataFrame({"layer": [0, 1], "f": [0.0, top]}), "layer", "f") for top in (1.0, 10.0)]
    pictures = [
        *(Picture(figure, f"Map {n}", f"Cell {n}.", pair="maps") for n, figure in enumerate(grids)),
        *(Picture(figure, f"Line {n}", f"Line {n}.", pair="lines") for n, figure in enumerate(lines)),
        Picture(FIGURE, "Alone", "A bar."),
    ]
    path = report({"it": Section("It", pictures=pictures)}, tmp_path / "r.html")
    rows = re.split('<div class="figures">', own_part(path))[1:]
    assert [re.findall('<h3 id="figure-.-title">(.*?)</h3>', row) for row in rows] == [
        ["Map 0", "Map 1"], ["Line 0", "Line 1"], ["Alone"]
    ]  # fmt: skip
    figures = drawn(path)
    assert [figures[f"figure-{n}"]["layout"]["coloraxis"]["cmax"] for n in (1, 2)] == [3.0, 3.0]
    assert figures["figure-3"]["layout"]["yaxis"]["range"] == figures["figure-4"]["layout"]["yaxis"]["range"]
    assert grids[0].layout.coloraxis.cmax == 1.0  # what was given stays as it was


def test_bars_reach_as_far_with_their_intervals():
    figures = [go.Figure(go.Bar(x=[size], y=["a"], orientation="h", error_x={"array": [0.5]})) for size in (1.0, -2.0)]
    low, high = alike(figures)[0].layout.xaxis.range
    assert low < -2.5 and high > 1.5 and alike(figures)[1].layout.xaxis.range == (low, high)
    assert alike(figures)[0].layout.yaxis.range is None


def test_diagrams_of_two_sides_have_one_scale_of_widths():
    edges = [Edge(Site("embed"), Site("out")), Edge(Site("head", 0, 1), Site("out"))]
    effects = make(edges, [1.0, 0.5])
    effects.values[:, ::2] /= 4  # the caption's side
    section = section_of("paths", effects)
    widths = [
        max(trace.line.width for trace in picture.figure.data if trace.name in set(picture.figure.frame["place"]))
        for picture in section.pictures[:2]
    ]
    means = [abs(effects.where(side=side).fraction()["effect"]).max() for side in ("caption", "foil")]
    thin, wide = 1.0, 9.0
    assert widths == pytest.approx([thin + (wide - thin) * mean / max(means) for mean in means])


def test_columns_are_words_and_images_are_pictures(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    frame = pd.DataFrame({"item": ["a.png", "some text"], "removed_foil_lower": [0.5, 0.25], "mean_d": 1.0})
    figure = Picture(FIGURE, "Bars", "A bar.", numbers=frame)
    section = Section("It", pictures=[figure], tables=[Table(frame, "Items", pictured=["item"])])
    path = report({"it": section}, tmp_path / "r.html", pictures=tmp_path)
    tree = Tree(own_part(path))
    assert [head["text"] for head in tree.all("th") if head["scope"] == "col"] == [
        "item", "removed foil, lower", "mean d"
    ]  # fmt: skip
    (details,) = (element for element in tree.all("details") if "data-names" in element)
    assert json.loads(details["data-names"]) == ["item", "removed foil, lower", "mean d"]
    (image,) = tree.all("img")
    assert image["alt"] == "a.png" and image["src"].startswith("data:image/jpeg;base64,") and "th" in image["in"]
    assert "a.png" not in [head["text"] for head in tree.all("th")] and "some text" in own_part(path)
    csv = files_of(path)["table-1-numbers"][1].decode()
    assert csv.startswith("item,removed_foil_lower,mean_d\na.png,0.5")  # a file has the names that code has


@pytest.mark.parametrize(
    ("text", "set_as"),
    [
        ("in 50 % of 3 pairs", "in 50~% of 3~pairs"),
        ("+1.2 [+0.8, +1.6] of d", "+1.2~[+0.8,~+1.6] of d"),
        ("layer 3, head 2.1", "layer~3, head~2.1"),
        ("with r = 0.50 and p < .001", "with r~=~0.50 and p~<~.001"),
        ("6.8 logits above", "6.8~logits above"),
        ("5 pairings, [a, b]", "5 pairings, [a, b]"),
        ("Figure 2. 12 kB", "Figure~2. 12~kB"),
    ],
)
def test_numbers_and_units_are_not_parted(text, set_as):
    assert unbroken(text) == set_as.replace("~", NO_BREAK)
    assert unbroken(unbroken(text)) == unbroken(text)


def test_a_page_parts_no_number_from_its_unit(tmp_path):
    text = " ".join(
        element["text"] for element in Tree(own_part(report({"a": make()}, tmp_path / "r.html"))).all("p", "li")
    )
    assert re.search(rf"\d{NO_BREAK}%", text) and not re.search(r"\d (%|pairs?\b|logits?\b)", text)


def test_paper_is_drawn_at_once(tmp_path):
    page = own_part(report({"toy": toy_effects()}, tmp_path / "r.html"))
    assert "IntersectionObserver" not in page and "DecompressionStream" not in page  # neither answers before paper does
    printed = re.search(r"const print = on => \{(.*?)\n\};", page, re.S)[1]
    assert printed.index("prepare()") < printed.index("boxes.forEach(show)")
    assert 'addEventListener("beforeprint", () => print(true))' in page
    paper = page[page.index("@media print") :]
    assert re.search(r"\.figures[^{]*\{ grid-template-columns: repeat\(2", paper)


CONTENTS = {
    "fixed": b"a", "dynamic": bytes(range(256)) * 40 + b"the quick brown fox " * 3000,
    "stored": np.random.default_rng(0).bytes(150_000), "empty": b"", "words": "caf\u00e9 \u2192 " .encode() * 900,
}  # fmt: skip


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("level", [1, 6, 9])
def test_the_page_unpacks_what_was_packed(tmp_path, level):
    script = (Path(clip_lens.show.__file__).with_name("report") / "report.js").read_text(encoding="utf-8")
    part = script[script.index("const tables") : script.index("const unpack")]
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(gzip.compress(content, level, mtime=0))
    code = f"""{part}
    const fs = require("fs");
    for (const name of {list(CONTENTS)}) {{
      const bytes = new Uint8Array(fs.readFileSync("{tmp_path}/" + name));
      fs.writeFileSync("{tmp_path}/" + name + ".out", inflate(bytes));
    }}"""
    subprocess.run(["node", "-e", code], check=True, timeout=60)
    for name, content in CONTENTS.items():
        assert (tmp_path / f"{name}.out").read_bytes() == content, name


def test_wide_tables_say_that_they_go_on(tmp_path):
    page = own_part(report({"toy": toy_effects()}, tmp_path / "r.html"))
    assert "Scroll sideways for more columns" in page and ".scroll.more" in page
    assert "position: sticky; left: 0" in page  # what a row is about stays in view


def test_no_effect_on_any_pair_is_no_division_by_nothing():
    assert len(section_of("still", make(STILL, [0.0] * 10)).pictures) == 2
