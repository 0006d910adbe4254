"""Circuits from a config: runs and their folders, what is wrong with a config, and runs that fail beside others."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest

import clip_lens
from clip_lens.core.keep import Keep
from clip_lens.methods.circuits import discover as module
from clip_lens.methods.circuits import finders
from clip_lens.methods.circuits.circuit import Circuit

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "discover_circuits.py"
SPEC = importlib.util.spec_from_file_location("discover_circuits", SCRIPT)
script = importlib.util.module_from_spec(SPEC)
sys.modules["discover_circuits"] = script  # dataclasses look their module up
SPEC.loader.exec_module(script)

GOOD = """
out = "found"
methods = ["eap", "random"]
edges = 60
[[model]]
name = "tiny"
[[pairs]]
name = "few"
limit = 8
"""


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(module, "BASELINES", 1)
    monkeypatch.setattr(module, "RESAMPLES", 5)


def config(folder, text):
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_run_has_a_folder_and_all_runs_a_report(tmp_path, capsys, monkeypatch):
    path = config(tmp_path, GOOD)
    assert script.main([str(path), "--quiet"]) == 0
    assert "2 of 2 runs done, 0 failed" in capsys.readouterr().out
    folder = tmp_path / "found" / "tiny" / "few"
    for method in ("eap", "random"):
        names = {f"circuit-{method}-60.json", "report.html", f"summary-{method}-60.csv"}
        assert names <= {file.name for file in (folder / method).iterdir()}
    table = pd.read_csv(tmp_path / "found" / "summary.csv")
    assert set(table["run"]) == {"tiny, few"} and set(table["method"]) == {"EAP", "random(0)"}
    page = (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    assert "How faithful: tiny, few" in page and "model organism" in page
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
    done = clip_lens.discover(encoder, *batch.split(), method="eap", edges=60, keep=Keep(folder / "eap"))
    assert Circuit.load(folder / "eap" / "circuit-eap-60.json").keep.equal(done.circuit.keep)
    own = table[table["method"] == "EAP"].reset_index(drop=True)
    assert own["f"].to_numpy() == pytest.approx(done.summary["f"].to_numpy())

    def computed(*_, **__):
        raise AssertionError("computed again")

    for where, name in ((finders, "gradient_effects"), (module, "faithfulness")):
        monkeypatch.setattr(where, name, computed)
    assert script.main([str(path), "--quiet"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "found" / "summary.csv"), table)


def test_a_run_that_fails_is_listed_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "discovered", lambda config, encoder, splits, method, *_: (method, len(splits)))
    monkeypatch.setattr(script, "compare", lambda results, out: out / "report.html")
    text = GOOD + '[[pairs]]\nname = "gone"\nfile = "gone.csv"\n[[model]]\nname = "no-such-model"\n'
    text += '[[pairs]]\nname = "none"\nside = "none"\n[[pairs]]\nname = "other"\nimages = { b32 = "b32.safetensors" }\n'
    assert script.main([str(config(tmp_path, text))]) == 1
    said = capsys.readouterr()
    assert "2 of 16 runs done, 14 failed" in said.out
    for words in (
        "tiny, gone, eap: ", "gone.csv does not exist", "no-such-model, few, random: ", "no pairs of none are left",
        "no store for tiny; it has b32",
    ):  # fmt: skip
        assert words in said.err


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("edges = 60", "egdes = 60", "no key 'egdes'; there are model, pairs, out, methods, edges"),
        ("limit = 8", "limits = 8", "[[pairs]]: no key 'limits'; there are name, file, images"),
        ('"random"]', '"ap"]', "no method 'ap'; there are exact, eap, eap-ig"),
        ("edges = 60", 'edges = "60"', "edges = '60' must be int"),
        ("edges = 60", "edges = true", "edges = True must be int"),
        ('methods = ["eap", "random"]', 'methods = "eap"', "methods must be a list"),
        ('name = "few"', "", "the key 'name' is missing"),
        ("[[model]]", "[[pairs]]", "at least one [[model]]"),
        ("out = ", "out ", "is no TOML"),
        ("[[pairs]]", '[[pairs]]\nname = "few"\n[[pairs]]', "two [[pairs]] are called 'few'"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(tmp_path, capsys, old, new, expected):
    assert script.main([str(config(tmp_path, GOOD.replace(old, new, 1)))]) == 1
    err = capsys.readouterr().err
    assert expected in err and err.startswith("error: ") and "Traceback" not in err


def test_a_config_that_is_not_there_is_named(tmp_path, capsys):
    assert script.main([str(tmp_path / "none.toml")]) == 1
    assert "none.toml" in capsys.readouterr().err


def test_the_example_config_reads():
    example = script.read_config(SCRIPT.with_suffix(".toml"))
    assert [pairs.name for pairs in example.pairs] == ["caption", "foil"] and example.base == SCRIPT.parent
