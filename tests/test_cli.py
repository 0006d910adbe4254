"""The command line, run in this process; only what must not import anything heavy gets a process of its own."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import torch
from PIL import Image

from clip_lens import Circuit, Site, align, faithfulness, gradient_effects, load, patch_effects, path_effects, top_edges
from clip_lens.cli import options
from clip_lens.cli.app import main
from clip_lens.core.effects import Effects
from clip_lens.core.keep import Keep
from clip_lens.core.record import MetricRecord, Record
from clip_lens.core.source import counterpart, mean, noise, zeros
from clip_lens.data import batch as batches
from clip_lens.data import groups
from clip_lens.data.images import ImageStore
from clip_lens.data.read import read_pairs
from clip_lens.methods.circuits.finders import FINDERS
from clip_lens.model.site import LAYOUTS


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Forty of the embedded pairs as a csv."""
    path = tmp_path / "few.csv"
    read_pairs()[:40].to_frame().to_csv(path, index=False)
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model is loaded once: commands run one after the other."""
    monkeypatch.setattr("clip_lens.model.load.load", cache(load))


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("demo",),
        ("trace",),
        ("patch",),
        ("ablate",),
        ("paths",),
        ("study",),
        ("circuit",),
        ("embed",),
        ("info",),
        ("compare",),
        ("gather",),
    ],
)
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys; from clip_lens.cli.app import main; "
        f"main({[*command, '--help']!r}); main(['--version']); "
        "sys.exit(' '.join({'torch', 'pandas', 'open_clip', 'transformer_lens', 'plotly'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: clip-lens" in done.stdout and "clip-lens 0." in done.stdout
    assert not command or "Example" in done.stdout


def test_trace_writes_results_that_hold_the_numbers(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert run("trace", "--pairs", few, "--images", "tiny", "--out", out, "--quiet") == 0
    printed = capsys.readouterr().out
    effects = Effects.load(out / "resid-slots.parquet")
    assert len(effects.pairs) == 40
    table = pd.read_csv(out / "trace-resid-correct.csv")
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
    store = ImageStore.open("tiny")
    turned = ImageStore.from_tensors(list(store.ids), -store[store.ids], model="tiny", digest=store.digest)
    turned.save(tmp_path / "turned.safetensors")
    for other, why in ((("--run", "foil"), "run: 'affirmative' is there, 'foil' is asked for"),
                       (("--images", tmp_path / "turned.safetensors"), "batch: ")):  # fmt: skip
        assert run(*words, *other) == 1
        err = capsys.readouterr().err
        assert "resid-slots.parquet is there, and is another result" in err and why in err and "--overwrite" in err
        assert (out / "resid-slots.parquet").read_bytes() == first
        assert run(*words, *other, "--overwrite") == 0
        assert "reused" not in capsys.readouterr().out
        assert (out / "resid-slots.parquet").read_bytes() != first
        first = (out / "resid-slots.parquet").read_bytes()
        words = (*words, *other)


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


@pytest.fixture
def bare(few: Path, tmp_path: Path) -> Path:
    """The pairs of `few` without their images."""
    read_pairs(few).to_frame().drop(columns="image").to_csv(tmp_path / "bare.csv", index=False)
    return tmp_path / "bare.csv"


@pytest.mark.parametrize("command", [("trace",), ("patch", "--sites", "mlp"), ("ablate", "--sites", "mlp")])
def test_texts_alone_are_patched_in_the_cosine(
    command: tuple[str, ...], bare: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run(*command, "--pairs", bare, "--metric", "cosine", "--out", out, "--quiet") == 0
    printed = capsys.readouterr().out
    assert ("no d and no segments: all pairs are shown" in printed) == (
        command[0] != "ablate"
    )  # which shows all anyhow
    assert "share of d" not in printed
    file = next(out.glob("*-cosine.parquet"))
    effects = Effects.load(file)
    assert effects.record.metric.name == "cosine" and len(effects.pairs) == 40 and effects.pairs.d.isna().all()
    words = (*command, "--pairs", few, "--metric", "cosine", "--segment", "all", "--quiet")
    assert run(*words, "--images", "tiny", "--out", tmp_path / "with") == 0
    assert torch.equal(Effects.load(tmp_path / "with" / file.name).values.nan_to_num(9), effects.values.nan_to_num(9))
    page = next(out.glob("*.html")).read_text()
    assert "made up, or belong to another joint space" not in page and "d = ;" not in page


def test_texts_alone_have_no_logit_and_no_segments(
    bare: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("trace", "--out", tmp_path / "out", "--quiet")
    for more, told in (
        (("--pairs", bare), "these pairs are texts alone"),
        (("--pairs", few, "--images", "none"), "these pairs are texts alone"),
        (("--pairs", bare, "--segment", "incorrect"), "--segment incorrect goes by d"),
        (("--pairs", bare, "--images", tmp_path), "no image below"),
    ):
        assert run(*words, *more) == 1
        assert told in capsys.readouterr().err


def test_both_metrics_share_a_folder(few: Path, tmp_path: Path) -> None:
    words = ("patch", "--sites", "mlp", "--pairs", few, "--out", tmp_path / "out", "--quiet")
    assert run(*words) == run(*words, "--metric", "cosine") == 0
    names = {path.name for path in (tmp_path / "out").glob("*.parquet")}
    assert names == {"patch-mlp-text.parquet", "patch-mlp-text-cosine.parquet"}


def test_crops_of_a_published_file_are_embedded_with_its_pairs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The part of a picture that a box names, and that part saved as a picture of its own, are the same embedding."""
    from clip_lens.tiny.assets import ASSETS

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    whole = Image.open(sorted((ASSETS / "pictures").iterdir())[0]).convert("RGB")
    whole.save(pictures / "7.png")
    whole.crop((2, 4, 32, 44)).save(pictures / "part.png")
    box = {"bbox_x": 2, "bbox_y": 4, "bbox_w": 30, "bbox_h": 40}
    item = {"image_path": "7.png", "true_caption": "There is no ring.", "false_caption": "There is a ring.", **box}
    (tmp_path / "aro.json").write_text(json.dumps([item]))
    words = ("patch", "--pairs", tmp_path / "aro.json", "--images", pictures, "--segment", "all", "--quiet")
    assert run(*words, "--sites", "mlp", "--out", tmp_path / "out") == 0
    store = ImageStore.open(tmp_path / "out" / "images.safetensors")
    assert store.ids == ("7.png#xywh=2,4,30,40",)
    out = tmp_path / "chosen.safetensors"
    assert run("embed", pictures, "--pairs", tmp_path / "aro.json", "--out", out, "--quiet") == 0
    assert run("embed", pictures, "--out", tmp_path / "all.safetensors", "--quiet") == 0
    cut, every = ImageStore.open(out), ImageStore.open(tmp_path / "all.safetensors")
    assert cut.ids == store.ids and every.ids == ("7.png", "part.png")
    assert torch.equal(cut[cut.ids], every[["part.png"]]) and not torch.equal(cut[cut.ids], every[["7.png"]])


def test_images_are_repaired_where_that_is_asked_for(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    frame = read_pairs(few).to_frame()
    frame["image"] = "C:\\data\\" + frame.image.str.replace("png", "JPG")
    frame.to_csv(tmp_path / "moved.csv", index=False)
    words = ("patch", "--sites", "mlp", "--pairs", tmp_path / "moved.csv", "--out", tmp_path / "o", "--quiet")
    assert run(*words) == 1
    assert "may be 'scene-" in capsys.readouterr().err
    assert run(*words, "--repair-images") == 0
    assert "40 pairs of moved.csv" in capsys.readouterr().out


def test_a_format_is_named_where_the_columns_do_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = "filepath,captions\n1.png,\"['There is a ring.']\"\n2.png,\"['There is no ring.']\"\n"
    (tmp_path / "r.csv").write_text(rows)
    words = ("patch", "--sites", "mlp", "--pairs", tmp_path / "r.csv", "--images", "none", "--metric", "cosine",
             "--out", tmp_path / "o", "--quiet")  # fmt: skip
    assert run(*words) == 1
    assert "no column caption, foil, image; found 'filepath', 'captions'" in capsys.readouterr().err
    assert run(*words, "--format", "negbench-retrieval") == 0


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
    found, judged = align(read_pairs(few), store, encoder, run="caption").split(0.25, 3, by="text")
    scores = Effects.load(out / "scores-eap.parquet")
    assert list(scores.pairs.key) == list(found.pairs.key)
    torch.testing.assert_close(scores.values, gradient_effects(encoder, found, encoder.edges()).values)
    circuit = Circuit.load(out / "circuit-eap-80.json")
    assert circuit.keep.equal(top_edges(scores, 80).keep)
    table = pd.read_csv(out / "summary-eap-80.csv").set_index("side")
    judge = faithfulness(encoder, judged, circuit).table(resamples=1).set_index("side")
    assert table["f"].to_dict() == pytest.approx(judge["f"].to_dict(), abs=1e-5)
    assert table.loc["pooled", "pairs"] == len(judged) and set(table["held_out"]) == {"by text"}
    assert "The circuit behind the logit difference of tiny" in (out / "report.html").read_text(encoding="utf-8")
    assert run(*words, "--seed", "3", "--segment", "nothing") == 1
    assert "no pair is 'nothing'" in capsys.readouterr().err


def test_info_says_what_a_thing_is(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ImageStore.from_tensors(["a.png"], torch.ones(1, 4)).save(tmp_path / "store.safetensors")
    assert run("info") == run("info", few) == run("info", tmp_path / "store.safetensors") == 0
    printed = capsys.readouterr().out
    assert "6 layers x 4 heads" in printed and "40 pairs" in printed and "ImageStore" in printed
    assert f"weights {load().digest}" in printed and "QuickGELU" in printed and "embeddings are what was" in printed


def test_info_tells_results_tables_and_circuits_apart(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = load()
    batch = align(read_pairs(few), ImageStore.open("tiny"), encoder)
    patch_effects(encoder, batch, encoder.sites("mlp"), source=mean).save(tmp_path / "e.parquet")
    frame = pd.DataFrame({"layer": [0, 1], "r": [0.5, 0.25]})
    Keep(tmp_path).frame("t", Record(model="mine", metric=MetricRecord(identity="x")), lambda: frame)
    Circuit.full(encoder).save(tmp_path / "c.json")
    frame.to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "list.json").write_text(json.dumps(read_pairs(few).to_frame().to_dict("records")))
    (tmp_path / "lines.jsonl").write_text(read_pairs(few).to_frame().to_json(orient="records", lines=True))
    for name, words in {
        "e.parquet": ("6 places x 40 pairs", "source: mean", "metric: logit, in logits", "content is what was written"),
        "t.parquet": ("a table of 2 rows: layer, r", "model: mine", "content is what was written"),
        "c.json": ("1108 of 1108 edges",),
        "t.csv": ("a table of 2 rows: layer, r",),
        "list.json": ("40 pairs",),
        "lines.jsonl": ("40 pairs",),
    }.items():
        assert run("info", tmp_path / name) == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words), (name, printed)
    for name in ("e.parquet", "t.parquet"):
        content = bytearray((tmp_path / name).read_bytes())
        content[content.index(b'"format": 2')] ^= 1
        (tmp_path / name).write_bytes(bytes(content))
        assert run("info", tmp_path / name) == 1
        assert name in (err := capsys.readouterr().err) and "compute it again" in err
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "foreign.parquet")
    assert run("info", tmp_path / "foreign.parquet") == 0
    assert "a Parquet file of another program's, with 1 rows: a" in capsys.readouterr().out


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
    assert "38 correct, 1 ambiguous, 1 incorrect" in capsys.readouterr().err


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
        "p/patch-head-text": patch_effects(encoder, batch["affirmative"], encoder.sites("head")),
        "a/ablate-mlp-text-zeros": patch_effects(encoder, batch["caption"], encoder.sites("mlp"), source=zeros),
        "r/paths-direct-embed+0.1+mlp1-to-out+q2.1+mlp2": path_effects(
            encoder,
            batch["affirmative"],
            [Site("embed"), Site("head", 0, 1), Site("mlp", 1)],
            [Site("out"), Site("q", 2, 1), Site("mlp", 2)],
        ),
    }
    for name, effects in expected.items():
        found = Effects.load(tmp_path / f"{name}.parquet")
        assert found.places == effects.places
        torch.testing.assert_close(found.values, effects.values, rtol=0, atol=1e-5)
        table = pd.read_csv(tmp_path / f"{name}-all.csv")
        assert table["effect"].tolist() == pytest.approx(effects.table()["effect"].tolist(), abs=1e-5)
        assert (tmp_path / name).with_name("report.html").stat().st_size < 6e6


# Several commands in one folder

COMMANDS = (
    ("ablate", "--sites", "mlp", "--with", "zeros"),
    ("ablate", "--sites", "mlp", "--with", "mean"),
    ("ablate", "--sites", "mlp", "--with", "noise", "--std", "0.5", "--seed", "1"),
    ("ablate", "--sites", "mlp", "--with", "noise", "--seed", "2"),
    ("ablate", "--sites", "mlp", "--by", "slot", "--with", "zeros"),
    ("patch", "--sites", "mlp", "--run", "caption"),
    ("patch", "--sites", "mlp", "--run", "caption", "--segment", "ambiguous"),
    ("patch", "--sites", "attn"),
    ("paths", "--from", "mlp1", "--to", "out"),
    ("paths", "--from", "mlp1", "--to", "out", "--through", "mlp"),
    ("paths", "--from", "mlp1,0.1", "--to", "out"),
    ("trace", "--sites", "mlp", "--images", "tiny"),
    ("trace", "--sites", "mlp", "--images", "tiny", "--segment", "all"),
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("order", [1, -1])
def test_commands_that_share_a_folder_lose_nothing(few: Path, tmp_path: Path, order: int) -> None:
    out, pages = tmp_path / "out", []
    for command in COMMANDS[::order]:
        before = contents(out)
        assert run(*command, "--pairs", few, "--out", out, "--quiet") == 0
        after = contents(out)
        assert {name: after.get(name) for name in before} == before, command
        pages.append({name for name in after.keys() - before.keys() if name.endswith(".html")})
        assert len(pages[-1]) == 1 and any(name.endswith(".csv") for name in after.keys() - before.keys()), command
    assert pages[0] == {"report.html"}
    done = {name: content for name, content in contents(out).items() if name.endswith(".parquet")}
    for command in COMMANDS[::4]:
        assert run(*command, "--pairs", few, "--out", out, "--quiet") == 0
    again = contents(out)
    assert {name: again[name] for name in done} == done
    assert sum(name.endswith(".html") for name in again) == len(COMMANDS)


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("command", [COMMANDS[0], COMMANDS[5], COMMANDS[8], COMMANDS[11]], ids=lambda words: words[0])
def test_other_pairs_are_refused_and_nothing_is_touched(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: tuple[str, ...]
) -> None:
    out, others = tmp_path / "out", tmp_path / "others.csv"
    read_pairs()[40:80].to_frame().to_csv(others, index=False)
    assert run(*command, "--pairs", few, "--out", out, "--quiet") == 0
    before = contents(out)
    capsys.readouterr()
    assert run(*command, "--pairs", others, "--out", out, "--quiet") == 1
    assert contents(out) == before
    err = capsys.readouterr().err
    assert "is another result: data digest: " in err and "--overwrite" in err
    assert run(*command, "--pairs", others, "--out", out, "--quiet", "--overwrite") == 0
    assert contents(out).keys() == before.keys() and contents(out) != before


def test_a_page_of_your_own_is_left_alone(few: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    assert run("patch", "--sites", "mlp", "--pairs", few, "--out", tmp_path, "--quiet") == 0
    assert (tmp_path / "report.html").read_text() == "mine"
    assert "<html" in (tmp_path / "patch-mlp-text-correct.html").read_text(encoding="utf-8")


# What reports say


@pytest.mark.usefixtures("loaded")
def test_every_report_tells_what_was_selected_and_what_to_beware_of(few: Path, tmp_path: Path) -> None:
    batch = align(read_pairs(few), ImageStore.open("tiny"), load(), run="caption")
    effects = patch_effects(load(), batch, [Site("mlp", 1)], progress=False)
    counts = effects.pairs["segment"].value_counts()
    for command in (COMMANDS[1], COMMANDS[5], COMMANDS[8], COMMANDS[11]):
        out = tmp_path / command[0]
        words = (*command, "--run", "caption", "--segment", "correct")
        assert run(*words, "--pairs", few, "--out", out, "--quiet") == 0
        text = (out / "report.html").read_text(encoding="utf-8")
        assert "model organism" in text
        assert f"segment = correct: {counts['correct']} of 40 (" in text
        assert all(f"{count} {name}" in text for name, count in counts.items())
        assert "Where tiny processes negation" in text


def test_pairs_without_a_side_are_not_said_to_be_about_negation(tmp_path: Path) -> None:
    frame = read_pairs()[:8].to_frame().drop(columns=["side", "negation"], errors="ignore")
    frame.assign(negation="none").to_csv(tmp_path / "plain.csv", index=False)
    words = ("--run", "caption", "--segment", "all", "--quiet", "--pairs", tmp_path / "plain.csv")
    assert run("patch", "--sites", "mlp", "--out", tmp_path / "o", *words) == 0
    text = (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    assert "processes negation" not in text and "Where tiny tells captions from foils" in text


def test_any_store_reaches_the_study(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, given = ImageStore.open("tiny"), {}
    other = ImageStore.from_tensors(list(store.ids), store[store.ids], model="another", digest="0" * 16)
    other.save(tmp_path / "other.safetensors")
    monkeypatch.setattr("clip_lens.show.questions.study.study", lambda *_, **how: given.update(how))
    words = ("study", "--pairs", few, "--images", tmp_path / "other.safetensors", "--out", tmp_path / "o", "--quiet")
    assert run(*words) == 1
    assert run(*words, "--any-store", "--overwrite") == 0
    assert given["any_store"] and given["overwrite"] and given["images"].digest == "0" * 16


def test_a_circuit_is_found_with_the_source_and_the_split_asked_for(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple] = []

    def stop(encoder, found, judged, **how):  # type: ignore[no-untyped-def]
        asked.append((found, judged, how))
        raise ValueError("stopped here")

    monkeypatch.setattr("clip_lens.methods.circuits.discover.discover", stop)
    words = ("circuit", "--pairs", few, "--out", tmp_path / "o", "--quiet")
    for extra in (
        (),
        ("--split-by", "image"),
        ("--source", "noise", "--std", "0.5", "--seed", "3"),
        ("--source", "mean"),
    ):
        assert run(*words, *extra) == 1
    assert [found.held_out for found, *_ in asked] == ["by text", "by image", "by text", "by text"]
    sources = [how["source"] for *_, how in asked]
    assert sources[0] is counterpart and sources[2].identity == noise(0.5, 3).identity and sources[3] is mean
    assert run(*words, "--method", "guess") == 1


def test_what_help_lists_is_what_there_is(capsys: pytest.CaptureFixture) -> None:
    """Help imports nothing heavy and so says some lists of its own."""
    assert get_args(options.Run) == get_args(batches.Run)
    assert set(get_args(options.SplitBy)) == set(get_args(groups.SplitBy))
    assert set(get_args(options.SourceName)) == {"counterpart", *get_args(options.Replacement)}
    told: Callable[[object], list[str]] = lambda option: get_args(option)[1].help.split(": ")[1].strip(".").split(", ")
    assert told(options.Finder) == list(FINDERS)
    assert set(told(options.Kinds)) == set(LAYOUTS) - {"embed"}


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "clip_lens", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("clip-lens ")


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
    assert "6 places x 40 pairs in" in done.stderr
    assert "patch-mlp-text.parquet: Effects(6 places x 40 pairs" in done.stderr


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Pairs that differ in a colour, about pictures of the embedded scenes."""
    names, things = ("red", "blue", "green", "yellow"), ("circle", "square", "star")
    images = list(dict.fromkeys(read_pairs().image))[:12]
    rows = [
        (f"a {names[n % 4]} {things[n % 3]}.", f"a {names[(n + 1) % 4]} {things[n % 3]}.", image)
        for n, image in enumerate(images)
    ]
    pd.DataFrame(rows, columns=["caption", "foil", "image"]).to_csv(tmp_path / "colours.csv", index=False)
    return tmp_path / "colours.csv"


def said(page: Path, printed: str) -> str:
    """What a page and a terminal say."""
    return re.sub(r"<style.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.S) + printed


@pytest.mark.parametrize(
    "words",
    [
        ("trace",), ("patch", "--sites", "head"), ("ablate", "--sites", "mlp"),
        ("paths", "--from", "mlp", "--to", "out"), ("circuit", "--edges", "20", "--method", "eap"),
    ],
)  # fmt: skip
def test_pairs_that_differ_in_a_colour_hear_nothing_of_negation(
    words: tuple[str, ...], colours: Path, tmp_path: Path, loaded: None, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run(*words, "--pairs", colours, "--images", "tiny", "--segment", "all", "--out", out, "--quiet") == 0
    text = said(out / "report.html", "".join(capsys.readouterr()))
    assert re.findall(r"negat(?!ive\b)\w*", text, re.I) == [] and "neither" not in text
    assert "slots by changed_slots" in text
    if words == ("trace",):
        table = pd.read_csv(out / "trace-resid-all.csv")
        assert list(dict.fromkeys(table.slot)) == ["sot", "before", "changed", "after", "eot"]
        first = table[(table.layer == 0) & (table.slot == "changed")]
        assert first.fraction.tolist() == pytest.approx([1.0], abs=1e-5)  # nothing else differs
        assert "what changes" in text and "run='foil'" in text


def test_a_run_by_sides_of_pairs_that_have_none_says_what_to_give(
    colours: Path, tmp_path: Path, loaded: None, capsys: pytest.CaptureFixture
) -> None:
    words = ("--pairs", colours, "--images", "tiny", "--run", "affirmative", "--out", tmp_path / "out", "--quiet")
    assert run("patch", *words) == 1
    error = capsys.readouterr().err
    assert "none of the 12 pairs of colours.csv has a side" in error and "run='foil'" in error
    assert "negat" not in error


@pytest.mark.parametrize(
    "command", [("trace",), ("patch", "--sites", "mlp"), ("paths", "--from", "0.1", "--to", "out")]
)
def test_shards_are_gathered_into_what_the_command_without_them_writes(
    command: tuple[str, ...], tmp_path: Path, loaded: None, capsys: pytest.CaptureFixture
) -> None:
    pairs, options = tmp_path / "some.csv", ("--quiet", "--segment", "all")
    read_pairs()[:70].to_frame().to_csv(pairs, index=False)
    given = (*command, "--pairs", pairs, "--images", "tiny", *options)
    assert run(*given, "--out", tmp_path / "whole") == 0
    for shard in ("1/2", "0/2"):
        assert run(*given, "--out", tmp_path / "parts", "--shard", shard) == 0
        if shard == "1/2":
            assert run("gather", tmp_path / "parts") == 1
            assert "of 2 shards these are missing: 0/2" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "report.html").exists()
    assert run("gather", tmp_path / "parts") == 0
    assert run(*given, "--out", tmp_path / "parts") == 0
    assert "there already and fits: reused" in capsys.readouterr().out
    files = [path.name for path in (tmp_path / "whole").glob("*.parquet")]
    assert files and (tmp_path / "parts" / "report.html").exists()
    for name in files:
        one, two = (Effects.load(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert torch.equal(one.values.nan_to_num(9e9), two.values.nan_to_num(9e9)) and one.record == two.record
        pd.testing.assert_frame_equal(one.pairs, two.pairs, check_exact=True)


def test_two_processes_write_what_one_writes(tmp_path: Path, loaded: None) -> None:
    pairs = tmp_path / "some.csv"
    read_pairs()[:70].to_frame().to_csv(pairs, index=False)
    given = ("patch", "--sites", "mlp", "--pairs", pairs, "--quiet")
    assert run(*given, "--out", tmp_path / "one") == run(*given, "--out", tmp_path / "two", "--jobs", 2) == 0
    one, two = (Effects.load(next((tmp_path / folder).glob("patch*.parquet"))) for folder in ("one", "two"))
    assert torch.equal(one.values, two.values)
    assert not list((tmp_path / "two").glob("*.parts"))


def test_what_has_no_shards_says_so(few: Path, tmp_path: Path, loaded: None, capsys: pytest.CaptureFixture) -> None:
    for command in ("study", "circuit"):
        assert run(command, "--pairs", few, "--out", tmp_path, "--shard", "0/2", "--quiet") == 1
        assert f"{command} has no shards" in capsys.readouterr().err
    assert run("patch", "--pairs", few, "--out", tmp_path, "--shard", "2/2") == 1
    assert "the first is 0 and the last 1" in capsys.readouterr().err
    assert run("gather", tmp_path / "nothing") == 1 and "no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run("gather", tmp_path / "empty") == 1 and "no shards" in capsys.readouterr().err
