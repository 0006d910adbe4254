"""report: one file that loads nothing, says only what the numbers say, and lets no data become markup."""

import base64
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from plotly.offline import get_plotlyjs

from clip_lens.core.effects import Effects, toy_effects
from clip_lens.core.grid import one_side
from clip_lens.core.record import Method, MetricRecord, Record, SourceRecord
from clip_lens.methods.registry import (
    ATTENTION,
    ATTRIBUTION,
    DIRECT,
    LENS,
    PATCHING,
    PATHS,
    PATHS_THROUGH_MLPS,
    SELECTIVITY,
)
from clip_lens.model.site import Edge, Site, precedes
from clip_lens.show.report.effects_section import section_of
from clip_lens.show.report.examples import examples
from clip_lens.show.report.report import report

PATHS_OF_HEADS = [
    Edge(Site("head", layer, unit), receiver)
    for layer in (0, 1)
    for unit in (0, 1)
    for receiver in (Site("q", 1, 0), Site("v", 1, 1), Site("mlp", 0), Site("out"))
    if precedes(Site("head", layer, unit), receiver)
]
PATHS_OF_TWO_SLOTS = [Edge(Site("embed"), Site("v", 0, unit, slot)) for unit in (0, 1) for slot in ("negator", "eot")]
NO_BREAK = "\N{NO-BREAK SPACE}"
EVIL = "<script>alert('x')</script><img src=http://example.org/x.png>"


RECORD = Record(PATCHING, model="toy", source=SourceRecord(swaps=True))


def make(places=None, shares=None, record=RECORD, caption="There is no dog.", n_pairs=10, **info):
    """Pairs of which place p moves exactly the share `shares[p]`."""
    places = places or [Site("resid", layer, slot=slot) for layer in range(3) for slot in ("negator", "subject", "eot")]
    shares = shares or [1.0, 0.0, 0.0, 0.5, 0.25, 0.25, 0.0, 0.0, 1.0]
    sigma = torch.tensor([1.0, -1.0] * (n_pairs // 2))
    d = torch.linspace(-2, 4.75, n_pairs)
    pairs = pd.DataFrame(
        {
            "key": [f"pair-{i}" for i in range(n_pairs)],
            "caption": caption,
            "foil": [f"There is a dog {i}." for i in range(n_pairs)],
            "image": [f"{i}.png" for i in range(n_pairs)],
            "side": ["caption", "foil"] * (n_pairs // 2),
            "sigma": sigma.int().tolist(),
            "d": d.tolist(),
            "segment": ["incorrect" if x < -1 else "ambiguous" if x < 1 else "correct" for x in d],
            **info,
        }
    )
    total = sigma * d
    return Effects(torch.tensor(shares)[:, None] * total, total, total * 0, tuple(places), pairs, record)


class Page(HTMLParser):
    """The tags of a page, with the text of all but scripts and styles; its no-break spaces are spaces here."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], "", [""]
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        self.open.append("")

    def handle_data(self, data):
        if self.open[-1] not in ("script", "style"):
            self.text += data.replace(NO_BREAK, " ")

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def files_of(path):
    """What the page's script unpacks: id -> (name, content)."""
    packed = json.loads(re.search(r'id="packed">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])
    return {key: (file["name"], gzip.decompress(base64.b64decode(file["gz"]))) for key, file in packed.items()}


def own_part(path):
    """The page without its packed files, which hold plotly.js and data."""
    return re.sub(r'(id="packed">).*?(</script>)', r"\1\2", path.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        Image.new("RGBA", (500, 300), (20 * number, 0, 0, 128)).save(folder / f"{number}.png")
    return folder


def test_nothing_is_loaded_from_anywhere(tmp_path, pictures):
    record = replace(RECORD, model=EVIL, data="https://example.org/pairs.csv", dropped={"no image": 2})
    path = report({"resid": make(record=record)}, tmp_path / "r.html", pictures=pictures)
    page = own_part(path)
    assert files_of(path)["plotly"][1].decode() == get_plotlyjs()
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:|#)[^"'\s>]""", re.sub(r"&lt;.*?&gt;", "", page))
    assert "url(" not in page and "@import" not in page
    for tag, attributes in Page(path).tags:
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    policy = Page(path).all("meta")[1]["content"]
    assert policy.startswith("default-src 'none'")
    assert path.stat().st_size < 6e6


def test_data_never_becomes_markup(tmp_path):
    places = [Site("resid", 0, slot=EVIL), Site("resid", 1, slot=EVIL)]
    evil = Method(EVIL, EVIL, noun=EVIL, verb=EVIL, share=EVIL, caption=EVIL, definition=(EVIL, EVIL), unit=EVIL)
    record = Record(evil, model=EVIL, dropped={EVIL: 1}, settings={EVIL: EVIL}, notes=(EVIL,), hooks=(EVIL,))
    effects = make(places, [0.0, 1.0], record, caption=EVIL)
    effects.pairs["key"] = [f"{i}{EVIL}" for i in range(10)]
    path = report({EVIL: effects}, tmp_path / "r.html", title=EVIL, summary=EVIL)
    page = own_part(path)
    assert "<script>alert" not in page and "<img" not in page
    assert "<script>alert" not in path.read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 3
    assert EVIL in Page(path).text


def test_the_findings_are_the_numbers(tmp_path):
    text = Page(report({"resid": make()}, tmp_path / "r.html")).text
    shares = "from layer 0 (100 %) to layer 1 (50 %)"  # the same in every resample
    words = f'"negator" {shares}, then at "end of text" in layer 2 (100 %).'
    assert f"Negation in the caption (5 pairs): the largest share of d moves at {words}" in text
    assert f"Negation in the foil (5 pairs): the largest share of d moves at {words}" in text


def test_heads_are_told_by_their_largest_effect(tmp_path):
    heads = [Site("head", layer, unit) for layer in range(2) for unit in range(3)]
    effects = make(heads, [0.0, 0.0, 0.1, 0.0, -0.3, 0.0])
    text = Page(report({"heads": effects}, tmp_path / "r.html")).text
    mean = -0.3 * effects.pairs.loc[effects.pairs["side"] == "foil", "d"].mean()
    number = f"{mean:.3f}".replace("-", "\N{MINUS SIGN}")
    assert f"the largest mean signed effect in size is that of head 1.1: {number} [" in text
    assert "\N{MINUS SIGN}0.300 of d (95 % interval [\N{MINUS SIGN}0.300, \N{MINUS SIGN}0.300])" in text


@pytest.mark.parametrize("source", ["zeros", "mean"])
def test_another_source_has_effects_and_no_shares(tmp_path, source):
    effects = make(record=replace(RECORD, source=SourceRecord(source)))
    page = Page(report({"it": effects}, tmp_path / "r.html"))
    assert f"with what the source {source} gives there. The number is the mean signed effect in logits" in page.text
    assert "Blue lowers the caption's lead over the foil" in page.text
    assert "the largest mean signed effect in size is that of the stream at layer 0, negator" in page.text
    assert not re.search(r"share|fraction|of d\b", page.text)
    assert "Heat map of the mean signed effect (logits) by slot and layer" in own_part(tmp_path / "r.html")
    cosine = MetricRecord("cosine", oriented=False, unit="cosine")
    other = make(record=replace(RECORD, source=SourceRecord(source), metric=cosine))
    assert "logits:" not in Page(report({"it": other}, tmp_path / "c.html")).text


def test_paths_are_shown_as_a_diagram_and_senders_by_receivers(tmp_path):
    shares = np.random.default_rng(0).normal(size=len(PATHS_OF_HEADS)).tolist()
    page = Page(report({"paths": make(PATHS_OF_HEADS, shares, replace(RECORD, method=PATHS))}, tmp_path / "r.html"))
    plots = [tag["aria-label"] for tag in page.all("div") if tag.get("role") == "img"]
    assert [plot.split(":")[0] for plot in plots] == ["Diagram of the mean signed effect (logits)"] * 2 + [
        "Heat map of the recovered fraction by sender and receiver"
    ] * 2
    assert "what a sender gives a receiver directly, from the counterpart" in page.text
    assert "Grey: no such path." in page.text and "no pair has a counterpart" not in page.text
    through = make(PATHS_OF_HEADS, shares, replace(RECORD, method=PATHS_THROUGH_MLPS))
    assert "directly and through MLPs" in Page(report({"paths": through}, tmp_path / "m.html")).text


WEIGHT = MetricRecord("attention weight", oriented=False, unit="attention weight")
READ = [
    (RECORD, DIRECT, {}, "in the other text minus in the run"),
    (replace(RECORD, source=None), DIRECT, {}, "writes into the logit"),
    (RECORD, LENS, {"norms": "norms as they are"}, "in the other text minus in the run (norms as they are)"),
    (replace(RECORD, source=None, metric=WEIGHT), SELECTIVITY, {"slot": "eot"}, 'pays to "end of text", at the later'),
    (replace(RECORD, source=None, metric=WEIGHT), ATTENTION, {"slot": 3}, "pays to position 3, at the later"),
]


@pytest.mark.parametrize(("record", "method", "settings", "told"), READ)
def test_what_is_only_read_is_not_said_to_be_patched(tmp_path, record, method, settings, told):
    effects = make(record=replace(record, method=method, settings=settings))
    text = Page(report({"it": effects}, tmp_path / "r.html", title="It")).text
    assert "Nothing is patched" in text and told in text and method.definition[1] in text
    assert not re.search(r"replace|moves|caption's lead|mean signed effect", text)


def test_estimates_are_called_estimates(tmp_path):
    text = Page(report({"it": make(record=replace(RECORD, method=ATTRIBUTION))}, tmp_path / "r.html")).text
    assert "Each cell estimates from a gradient (attribution patching)" in text and "would move at" in text
    assert "does not patch" in text


def test_words_follow_what_a_method_says_and_not_its_title(tmp_path):
    mine = Method("mine", "direct logit lens of attention", noun="mean push", verb="pushes", share="share pushed",
                  caption="A cell pushes {place} by {force} to {nowhere} with the {source}.")  # fmt: skip
    effects = make(record=replace(RECORD, method=mine, settings={"force": 3}))
    text = Page(report({"it": effects}, tmp_path / "r.html")).text
    assert "A cell pushes the residual stream at one place (a slot's tokens together) by 3 to nowhere" in text
    assert "the largest share of d pushes at" in text and "the share of d that this alone pushes" in text
    assert "Heat map of the share pushed by slot and layer" in own_part(tmp_path / "r.html")
    assert "Nothing is patched" not in text and "gradient" not in text


def test_parts_of_a_tower_are_bars_that_say_what_was_read(tmp_path):
    places = [Site("token"), Site("head", 0, 1), Site("mlp", 0), Site("constant")]
    effects = make(places, [0.5, 0.25, -0.25, 0.5], replace(RECORD, method=DIRECT))
    section = section_of("direct", effects)
    for picture, side in zip(section.pictures, ("caption", "foil"), strict=True):
        table = one_side(effects.table(), side).set_index("place")["fraction"]
        drawn = picture.figure.data[0]
        assert dict(zip(drawn.hovertext, drawn.x, strict=True)) == table.to_dict()
        assert "each bar is what one part of the tower writes" in picture.caption and "Grey" not in picture.caption
        assert picture.alt.startswith("Bars of the share of the total: negation in the")
    assert picture.figure.layout.xaxis.title.text == "share of the total"


def test_the_whole_is_d_only_where_the_totals_are(tmp_path):
    half = make(record=replace(RECORD, metric=MetricRecord("half of it", oriented=True, unit="half logits")))
    half = replace(half, total=half.total / 2, values=half.values / 2)
    text = Page(report({"it": half}, tmp_path / "r.html")).text
    assert "the largest share of the total effect moves at" in text and "share of d " not in text


def test_what_was_run_pairs_and_drops_are_told(tmp_path):
    record = Record(
        PATCHING, "tiny", "3f9a", run="foil", source=SourceRecord(swaps=True), dropped={"no side": 3},
        settings={"odd": "kept"},
    )  # fmt: skip
    effects = make(record=record)
    path = report(
        {"one": effects, "two": replace(effects, record=replace(record, method=ATTRIBUTION))}, tmp_path / "r.html"
    )
    text = re.sub(r"\s+", " ", Page(path).text)
    assert "modeltiny" in text.replace(" ", "") and "weights3f9a" in text.replace(" ", "")
    assert "Pairs dropped before the run: 3 no side." in text
    assert text.count("mean d") == 1  # the two results have the same pairs
    bare = text.replace(" ", "")
    assert "thecaption1135" in bare and "thefoil1135" in bare  # incorrect, ambiguous, correct, all
    assert text.count("odd") == 1  # both results have it: said once
    assert "methodactivationpatching" in bare and "methodattributionpatching" in bare


def test_figures_are_one_per_side_with_captions_and_words(tmp_path):
    path = report({"resid": make()}, tmp_path / "r.html")
    page = Page(path)
    plots = [tag for tag in page.all("div") if tag.get("role") == "img"]
    assert [plot["id"] for plot in plots] == ["figure-1", "figure-2"]
    assert "The largest, 1.00, is at the stream at layer\N{NO-BREAK SPACE}0, negator." in plots[0]["aria-label"]
    assert len(page.all("figure")) == len(page.all("figcaption")) == 2
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1
    assert "a slot's tokens together" in page.text
    assert "averaged over pairs and tokens" in Page(report({"a": make(token=[0] * 10)}, tmp_path / "t.html")).text


def test_examples_have_pictures_where_there_are_some(tmp_path, pictures):
    (pictures / "0.png").write_bytes(b"no picture")
    (tmp_path / "secret.png").write_bytes((pictures / "1.png").read_bytes())
    effects = make()
    effects.pairs.loc[9, "image"] = "../secret.png"
    page = Page(report({"resid": effects}, tmp_path / "r.html", pictures=pictures))
    assert len([tag for tag in page.all("li") if tag.get("class") == "example"]) == 9
    shown = page.all("img")
    assert len(shown) == 9  # 0.png is unreadable, ../secret.png outside of the folder; one more shows what d is
    assert all(image["alt"] and image["src"].startswith("data:image/jpeg;base64,") for image in shown)
    mapped = Page(report({"resid": effects}, tmp_path / "m.html", pictures={"8.png": pictures / "8.png"}))
    assert len(mapped.all("img")) == 2
    assert not Page(report({"resid": effects}, tmp_path / "n.html")).all("img")


def test_examples_are_of_every_segment_failures_first():
    pairs = make(n_pairs=200).pairs.sample(frac=1, random_state=0)
    found = examples(pairs)
    assert list(found) == ["incorrect", "ambiguous", "correct"]
    for segment, side in ((s, side) for s in found for side in ("caption", "foil")):
        d = sorted(pairs.loc[(pairs["segment"] == segment) & (pairs["side"] == side), "d"])
        shown = [pair.d for pair in found[segment] if pair.side == side]
        assert shown == [d[0], d[len(d) // 2], d[-1]]


def test_examples_are_those_that_can_be_seen(pictures):
    found = examples(make(n_pairs=200).pairs, pictures)  # ten of the incorrect pairs have a picture
    assert [pair.picture is not None for pair in found["incorrect"]] == [True] * 6
    assert {pair.key for pair in found["incorrect"]} == {f"pair-{number}" for number in (0, 4, 8, 1, 5, 9)}
    assert len(found["correct"]) == 6 and not any(pair.picture for pair in found["correct"])


PAIRED = (Site("mlp", 0), Site("head", 1, 2))
JOINT = (Edge(Site("embed"), Site("mlp", 0)), Edge(Site("head", 0, 1), Site("out")))


@pytest.mark.parametrize(
    ("places", "figures"),
    [
        ([Site("resid", 0)], 2),
        ([Site(kind, layer, slot=s) for kind in ("attn", "mlp") for layer in (0, 1) for s in ("negator", "eot")], 4),
        ([Site("head", layer, unit, s) for layer in (0, 1) for unit in (0, 1) for s in ("negator", 4)], 4),
        ([Site("head", 0, unit, slot) for unit in (0, 1) for slot in range(20)], 12),
        ([Site("neuron", layer, unit) for layer in (0, 1) for unit in range(100)], 2),
        ([PAIRED, Site("resid", 1)], 2),
        (PATHS_OF_TWO_SLOTS, 6),
        ([JOINT, Edge(Site("embed"), Site("out"))], 2),
        ([(Site("head", 0, unit), Site("mlp", layer)) for layer in range(20) for unit in range(5)], 2),
        ([Site("resid", layer, slot=slot) for layer in range(25) for slot in ("negator", "eot")], 2),
    ],
)
def test_every_shape_of_result_gets_figures(tmp_path, places, figures):
    shares = np.random.default_rng(0).normal(size=len(places)).tolist()
    page = Page(report({"it": make(places, shares)}, tmp_path / "r.html"))
    assert len(page.all("figure")) == figures
    assert ("further figures are left out" in page.text) == (figures == 12)
    assert ("Shown are the 40 of 100 units" in page.text) == (len(places) == 200)
    assert ("Shown are the 40 of 100 places" in page.text) == (len(places) == 100)


def test_values_that_are_all_missing_are_said(tmp_path):
    effects = make()
    empty = replace(effects, values=torch.full_like(effects.values, torch.nan))
    page = Page(report({"resid": empty}, tmp_path / "r.html"))
    assert "no place has a value" in page.text


def test_the_file_is_written_whole_and_bad_input_refused(tmp_path, monkeypatch):
    path = report({"resid": toy_effects()}, tmp_path / "new" / "r.html")
    assert path == tmp_path / "new" / "r.html" and [file.name for file in path.parent.iterdir()] == ["r.html"]
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no results"):
        report({}, path)
    with pytest.raises(ValueError, match="'gone' is empty"):
        report({"gone": toy_effects().where(layer=lambda layer: layer == 7)}, path)
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report({"resid": toy_effects()}, path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
