"""`clip-lens compare`: two results, two circuits, two models."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import clip_lens
from clip_lens import Effects
from clip_lens.cli.app import main
from clip_lens.methods.circuits.circuit import Circuit
from clip_lens.methods.circuits.selection import random_sizes
from clip_lens.methods.compare import compare
from clip_lens.show.questions.sets import sets


@pytest.fixture
def few(tmp_path: Path) -> Path:
    clip_lens.read_pairs().to_frame().head(6).to_csv(tmp_path / "few.csv", index=False)
    return tmp_path / "few.csv"


def test_two_models_then_their_kept_results(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, again = tmp_path / "models", tmp_path / "results"
    assert (
        main(["compare", "tiny", "tiny@without", "--pairs", str(few), "--sites", "mlp", "-q", "--out", str(out)]) == 0
    )
    assert "difference of the" in capsys.readouterr().out
    a, b = (Effects.load(out / f"compare-{name}-mlp.parquet") for name in ("tiny", "tiny+without"))
    assert (a.record.model, b.record.model) == ("tiny", "tiny (without)") and a.record.weights != b.record.weights
    told = pd.read_csv(out / "compare-tiny-tiny+without-mlp.csv")
    assert np.allclose(told["effect"], compare(a, b).table()["effect"], rtol=1e-6)
    swapped = Effects.load(out / "compare-tiny-tiny+without-mlp-swapped.parquet")
    assert swapped.record.source is not None and swapped.record.source.name == "tower of tiny (without)"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "tiny@without beside tiny" in page and "tiny, swapped for tiny@without" in page
    files = [str(out / f"compare-{name}-mlp.parquet") for name in ("tiny", "tiny+without")]
    assert main(["compare", *files, "--out", str(again)]) == 0
    same = pd.read_csv(again / "compare-compare-tiny-mlp-compare-tiny+without-mlp.csv")
    assert np.allclose(same["effect"], told["effect"], rtol=1e-12)


def test_two_circuits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, two = random_sizes(clip_lens.load(), 1, (0.1, 0.2))
    for name, circuit in (("one", one), ("two", two.named("larger"))):
        circuit.save(tmp_path / f"{name}.json")
    assert (
        main(["compare", str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--out", str(tmp_path / "out")]) == 0
    )
    (line,) = pd.read_csv(tmp_path / "out" / "compare-one-two.csv").to_dict("records")
    assert (
        line["shared"] == len(set(one.edges()) & set(two.edges())) and line["only_first"] == len(one) - line["shared"]
    )
    assert "only second" in capsys.readouterr().out
    assert "Edges in both" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_what_is_no_two_of_a_sort_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "tiny", str(tmp_path / "one.parquet"), "--out", str(tmp_path)]) == 1
    assert "give two results, two circuits or two models" in capsys.readouterr().err


def test_a_section_on_two_circuits_says_what_chance_would_share() -> None:
    full = Circuit.full(clip_lens.load())
    half, other = random_sizes(clip_lens.load(), 1, (0.5,))[0], random_sizes(clip_lens.load(), 2, (0.5,))[0]
    section = sets(half, other, ("half", "other"))
    shared = set(half.edges()) & set(other.edges())
    assert (
        f"share {len(shared)} edges" in section.findings[0]
        and "Drawn at random they would share" in section.findings[0]
    )
    assert [table.title for table in section.tables] == [
        "Overlap",
        "Edges in both",
        "Edges only in half",
        "Edges only in other",
    ]
    assert len(section.tables[2].frame) == len(set(half.edges()) - shared)
    assert sets(full, full, ("a", "b")).findings == ("a and b share 1108 edges, all that either has.",)
