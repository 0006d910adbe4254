"""docs/published.md and tutorial 5: the printed maps are the published one, and the embedded model's, rounded."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

import clip_lens

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
BEFORE = ["sot", "there", "be"]


def maps() -> list[tuple[str, pd.DataFrame]]:
    """The page's tables, in its order: the side, and slot x layer."""
    found = []
    for side, head, body in re.findall(r"^\| (caption|foil) \| (.*) \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", PAGE, re.M):
        rows = [line.strip("| ").split(" | ") for line in body.splitlines()]
        values = [[float(value) for value in row[1:]] for row in rows]
        found.append((side, pd.DataFrame(values, [row[0] for row in rows], [int(name) for name in head.split(" | ")])))
    return found


def test_the_papers_map_is_the_published_one_rounded(shared: Path) -> None:
    arrays = json.loads((shared / "data" / "clip-localisation" / "arrays.json").read_text(encoding="utf-8"))
    printed = {side: table for side, table in maps() if table.shape[1] == 13}
    for side in ("caption", "foil"):
        known = pd.DataFrame(arrays["causal_tracing"][f"{side}, correct"], arrays["positions"])
        assert np.abs(known.loc[BEFORE]).max(axis=None) < 1e-6  # what the page leaves out
        pd.testing.assert_frame_equal(printed[side], known.drop(BEFORE).round(1) + 0.0, check_exact=True)


def test_tutorial_5_prints_the_same_map() -> None:
    notebook = nbformat.read(ROOT / "tutorials" / "5_negation_study.ipynb", as_version=4)
    (cell,) = [cell.source for cell in notebook.cells if cell.source.startswith("# Quantmeyer")]
    names = {"pd": pd}
    exec(cell.split("\n\n")[0], names)
    for side, table in maps():
        if table.shape[1] == 13:
            pd.testing.assert_frame_equal(names["paper"][side], table, check_names=False)


def test_the_embedded_models_map_is_what_it_gives() -> None:
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.S).group(1), names)
    shares = names["effects"].table(of="ratios", resamples=200).set_index(["side", "slot", "layer"])
    for side, table in maps():
        if table.shape[1] == 7:
            np.testing.assert_allclose(table, names["ours"][side].loc[table.index] + 0.0, atol=1e-12)
            assert int(shares.loc[(side, "eot", 0), "n"]) == int(
                re.search(rf"embedded model,.*? (\d+) pairs:\n\n\| {side} ", PAGE).group(1)
            )
    caption = {("subject", 1): 0.68, ("subject", 2): 0.60, ("negator", 1): -0.06}
    foil = {("negator", 1): 0.14, ("subject", 1): 0.02, ("eot", 1): 0.26, ("eot", 3): 0.49}
    said = {("caption", *place): value for place, value in caption.items()}
    said |= {("foil", *place): value for place, value in foil.items()}
    for place, value in said.items():
        assert shares.loc[place, "fraction"] == pytest.approx(value, abs=0.005)
        assert f"{value:.2f}".replace("0.", ".") in PAGE
    stops = shares.xs("stop", level="slot")["fraction"].groupby("side").max()
    assert stops.round(2).to_dict() == {"caption": 0.01, "foil": 0.03}
    inner = shares.loc["foil"].query("layer in (1, 2)")["fraction"]
    assert inner.max() < 0.31


def test_the_page_says_with_whose_names(shared: Path) -> None:
    pairs = pd.read_json(shared / "data" / "clip-localisation" / "pairs.json", orient="index")
    counts = pairs[pairs["segment"] == "correct"]["negation"].value_counts()
    assert f"12 blocks, {counts['caption']} pairs (Quantmeyer" in PAGE and f"{counts['foil']} pairs (Quantmeyer" in PAGE
    assert clip_lens.load().n_layers == 6
