"""The command line, run in this process; only what must not import anything heavy gets a process of its own."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from clip_lens import (
    Circuit,
    Site,
    align,
    faithfulness,
    faithfulness_table,
    gradient_effects,
    load,
    patch_effects,
    path_effects,
    top_edges,
    zeros,
)
from clip_lens.cli.app import main
from clip_lens.core.effects import Effects
from clip_lens.data.images import ImageStore
from clip_lens.data.read import read_pairs


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Forty of the embedded pairs as a csv."""
    path = tmp_path / "few.csv"
    read_pairs()[:40].to_frame().to_csv(path, index=False)
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("command", [(), ("demo",), ("trace",), ("circuit",), ("embed",), ("info",)])
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys; from clip_lens.cli.app import main; "
        f"main({[*command, '--help']!r}); "
        "sys.exit(' '.join({'torch', 'pandas', 'open_clip', 'transformer_lens', 'plotly'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: clip-lens" in done.stdout
    assert not command or "Example" in done.stdout


def test_trace_writes_results_that_hold_the_numbers(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert run("trace", "--pairs", few, "--images", "tiny", "--out", out, "--quiet") == 0
    printed = capsys.readouterr().out
    effects = Effects.load(out / "resid-slots.parquet")
    assert len(effects.pairs) == 40
    table = pd.read_csv(out / "table.csv")
    eot = table[(table.slot == "eot") & (table.layer == 6)]
    assert eot.fraction.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert "negation in the caption" in printed and "negation in the foil" in printed
    page = (out / "report.html").read_text()
    assert "<html" in page and "There" in page


def test_trace_reuses_what_is_finished_and_only_that(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    words = ("trace", "--pairs", few, "--images", "tiny", "--out", out, "--quiet", "--segment", "all")
    assert run(*words) == 0
    first = (out / "resid-slots.parquet").read_bytes()
    capsys.readouterr()
    assert run(*words) == 0
    assert capsys.readouterr().out.count("reused") == 2
    assert (out / "resid-slots.parquet").read_bytes() == first
    assert run(*words, "--run", "foil") == 0
    assert "reused" not in capsys.readouterr().out
    store = ImageStore.open("tiny")
    turned = ImageStore.from_tensors(list(store.ids), -store[store.ids], model="tiny", digest=store.digest)
    turned.save(tmp_path / "turned.safetensors")
    assert run(*words, "--run", "foil", "--images", tmp_path / "turned.safetensors") == 0
    assert "reused" not in capsys.readouterr().out


def test_trace_embeds_a_folder_of_pictures(tmp_path: Path) -> None:
    from clip_lens.tiny.assets import ASSETS

    pictures = ASSETS / "pictures"
    names = {path.name for path in pictures.iterdir()}
    pairs = read_pairs()
    chosen = pairs[[row for row, image in enumerate(pairs.image) if image in names]]
    chosen.to_frame().to_csv(tmp_path / "pairs.csv", index=False)
    out = tmp_path / "out"
    words = ("--pairs", tmp_path / "pairs.csv", "--images", pictures, "--out", out, "--segment", "all", "--quiet")
    assert run("trace", *words) == 0
    store, shipped = ImageStore.open(out / "images.safetensors"), ImageStore.open("tiny")
    torch.testing.assert_close(store[chosen.image], shipped[chosen.image], rtol=0, atol=2e-6)


def test_kinds_with_heads_are_traced_all_heads_together(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("trace", "--pairs", few, "--images", "tiny", "--out", out, "--sites", "head", "--quiet") == 0
    assert set(Effects.load(out / "head-slots.parquet").index.layer) == set(range(6))


def test_circuit_finds_on_one_split_and_judges_on_the_other(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_lens.methods.circuits.discover.BASELINES", 1)
    monkeypatch.setattr("clip_lens.methods.circuits.discover.RESAMPLES", 5)
    out = tmp_path / "out"
    words = ("circuit", "--pairs", few, "--out", out, "--method", "eap", "--edges", "80", "--split", ".25", "--quiet")
    assert run(*words, "--seed", "3") == 0
    assert "80 of 1108 edges" in capsys.readouterr().out
    encoder, store = load(), ImageStore.open("tiny")
    found, judged = align(read_pairs()[:40], store, encoder, run="caption").split(0.25, 3)
    scores = Effects.load(out / "scores-eap.parquet")
    assert list(scores.pairs.key) == list(found.pairs.key)
    torch.testing.assert_close(scores.values, gradient_effects(encoder, found, encoder.edges()).values)
    circuit = Circuit.load(out / "circuit.json")
    assert circuit.keep.equal(top_edges(scores, 80).pruned().keep)
    table = pd.read_csv(out / "summary.csv").set_index("side")
    judge = faithfulness_table(faithfulness(encoder, judged, circuit), resamples=1).set_index("side")
    assert table["f"].to_dict() == pytest.approx(judge["f"].to_dict(), abs=1e-5)
    assert table.loc["pooled", "pairs"] == len(judged)
    assert "The circuit behind the logit difference of tiny" in (out / "report.html").read_text(encoding="utf-8")
    assert run(*words, "--seed", "3", "--segment", "nothing") == 1
    assert "no pair is 'nothing'" in capsys.readouterr().err


def test_info_says_what_a_thing_is(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ImageStore.from_tensors(["a.png"], torch.ones(1, 4)).save(tmp_path / "store.safetensors")
    assert run("info") == run("info", few) == run("info", tmp_path / "store.safetensors") == 0
    printed = capsys.readouterr().out
    assert "6 layers x 4 heads" in printed and "40 pairs" in printed and "ImageStore" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("info", "ViT-B-23"), "did you mean"),
        (("info", "ViT-B-32"), "needs weights"),
        (("trace", "--pairs", "none.csv", "--images", "tiny", "--out", "o"), "none.csv"),
        (("trace", "--pairs", "tiny", "--images", "none.safetensors", "--out", "o"), "none.safetensors"),
        (("trace", "--pairs", "tiny", "--images", "tiny", "--out", "o", "--sites", "heads"), "no kind of site"),
        (("trace", "--pairs", "tiny", "--images", "tiny", "--out", "o", "--device", "abacus"), "abacus"),
        (("embed", "nowhere", "--out", "o.safetensors"), "nowhere"),
    ],
)
def test_an_error_is_one_line_that_names_what_was_given(
    words: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 1
    err = capsys.readouterr().err.strip()
    assert expected in err and "\n" not in err and "Traceback" not in err


def test_a_missing_segment_says_which_there_are(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("trace", "--pairs", few, "--images", "tiny", "--out", tmp_path / "o", "--quiet", "--segment", "wrong")
    assert run(*words) == 1
    assert "'correct'" in capsys.readouterr().err


def test_words_that_are_off_exit_with_2(capsys: pytest.CaptureFixture) -> None:
    assert run("trace", "--pairs", "tiny") == run("nonsense") == 2
    assert "No such command" in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="needs weights"):
        run("info", "ViT-B-32", "--debug")


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, few: Path, capsys: pytest.CaptureFixture) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_lens.data.read.read_pairs", interrupted)
    assert run("info", few) == 130
    assert "goes on" in capsys.readouterr().err


def test_patch_ablate_and_paths_write_what_the_verbs_compute(few: Path, tmp_path: Path) -> None:
    common = ("--pairs", few, "--segment", "all", "--quiet")
    assert run("patch", "--sites", "head", "--out", tmp_path / "p", *common) == 0
    assert run("ablate", "--sites", "mlp", "--with", "zeros", "--out", tmp_path / "a", *common) == 0
    assert run("paths", "--from", "embed,0.1,mlp1", "--to", "out,q2.1,mlp2", "--out", tmp_path / "r", *common) == 0
    encoder, pairs = load(), read_pairs(few)
    batch = {name: align(pairs, ImageStore.open("tiny"), encoder, run=name) for name in ("affirmative", "caption")}
    expected = {
        "p/head-text.parquet": patch_effects(encoder, batch["affirmative"], encoder.sites("head")),
        "a/mlp-text.parquet": patch_effects(encoder, batch["caption"], encoder.sites("mlp"), source=zeros),
        "r/paths-direct.parquet": path_effects(
            encoder,
            batch["affirmative"],
            [Site("embed"), Site("head", 0, 1), Site("mlp", 1)],
            [Site("out"), Site("q", 2, 1), Site("mlp", 2)],
        ),
    }
    for name, effects in expected.items():
        found = Effects.load(tmp_path / name)
        assert found.places == effects.places
        torch.testing.assert_close(found.values, effects.values, rtol=0, atol=1e-5)
        assert (tmp_path / name).with_name("report.html").stat().st_size < 6e6


def test_a_sender_that_does_not_exist_is_named(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, expected in ((("2.9", "out"), "'2.9'"), (("h1", "out"), "'h1'"), (("mlp5", "q0"), "no path")):
        common = ("--pairs", few, "--out", tmp_path / "o", "--quiet")
        assert run("paths", "--from", words[0], "--to", words[1], *common) == 1
        assert expected in capsys.readouterr().err


def test_verbose_says_what_is_computed_and_written(tmp_path: Path, few: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "clip_lens.cli.app",
        "--verbose",
        "patch",
        "--pairs",
        str(few),
        "--sites",
        "mlp",
        "--quiet",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "clip_lens.methods.patching: 6 places x 40 pairs in" in done.stderr
    assert "mlp-text.parquet: Effects(6 places x 40 pairs" in done.stderr
