"""Activation and preprocessing of checkpoints' files: over open_clip's whole registry, and in what is loaded."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from towers import VISION, randomise

import clip_lens
from clip_lens.cli import options
from clip_lens.cli.app import app, main
from clip_lens.cli.job import open_job
from clip_lens.data.images import ImageStore
from clip_lens.data.read import read_pairs
from clip_lens.originals.open_clip import open_original
from clip_lens.originals.settings import settings
from clip_lens.tiny.assets import ASSETS

PAIRS = open_clip.list_pretrained()
OPENAI_MEAN = open_clip.constants.OPENAI_DATASET_MEAN
PREPARED = ("mean", "std", "interpolation", "resize_mode")


def of_tag(name: str, tag: str) -> tuple[bool, tuple[Any, ...]]:
    """What open_clip does with a tag, without the code under test."""
    known = open_clip.get_pretrained_cfg(name, tag)
    default = open_clip.transform.PreprocessCfg()
    return bool(known.get("quick_gelu")), tuple(known.get(key) or getattr(default, key) for key in PREPARED)


def decided(name: str, **options: Any) -> tuple[bool, tuple[Any, ...], str, str]:
    found = settings(name, "nowhere.pt", **options)
    values = dict(found.preprocessing.value)
    prepared = tuple(values[key] for key in PREPARED)
    return found.quick_gelu.value, prepared, found.quick_gelu.doubt, found.preprocessing.doubt


def test_every_public_checkpoint_loads_right_as_a_file_or_warns() -> None:
    """The names alone: open_clip's own default differs from many tags, which a file must not get in silence."""
    default = tuple(getattr(open_clip.transform.PreprocessCfg(), key) for key in PREPARED)
    differ = silent = 0
    for name, tag in PAIRS:
        activation, prepared = of_tag(name, tag)
        config = open_clip.get_model_config(name)
        differ += (bool(config.get("quick_gelu")), default) != (activation, prepared)
        found_activation, found_prepared, doubt, image_doubt = decided(name)
        assert found_activation == activation or ("tag" and doubt), (name, tag)
        assert found_prepared == prepared or image_doubt, (name, tag)
        silent += not doubt and not image_doubt
        if doubt:
            assert "QuickGELU: " in doubt and "GELU is taken" in doubt, (name, tag)
    assert differ >= 80 and silent >= 80 and len(PAIRS) >= 190


def test_like_gives_every_tag_its_own() -> None:
    for name, tag in PAIRS:
        assert decided(name, like=tag) == (*of_tag(name, tag), "", ""), (name, tag)


def test_a_name_that_says_its_activation_is_believed() -> None:
    assert decided("ViT-B-32-quickgelu")[::2] == (True, "")
    assert decided("ViT-B-32")[0] is False and "openai" in decided("ViT-B-32")[2]


def test_what_is_said_wins() -> None:
    for said in (True, False):
        assert decided("ViT-B-32", quick_gelu=said)[::2] == (said, "")
        assert decided("ViT-B-32", quick_gelu=said, like="openai")[0] is said
        assert decided("ViT-B-32", in_archive=said, like="openai")[0] is said
    with pytest.raises(ValueError, match="was trained with QuickGELU, as its own code says"):
        settings("ViT-B-32", "ViT-B-32.pt", quick_gelu=False, in_archive=True)
    with pytest.raises(ValueError, match="like='opnai' is no tag of ViT-B-32; its tags are openai, "):
        settings("ViT-B-32", "x.pt", like="opnai")


# --- in what is loaded ----------------------------------------------------------------------------------------------

SHRUNK = {"width": 32, "heads": 2, "layers": 1, "context_length": 77, "vocab_size": 49408}


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Makes a built-in model small and returns a file of weights that fits it."""

    def make(name: str, folder: Path = tmp_path) -> str:
        config = open_clip.get_model_config(name)
        config |= {"embed_dim": 16, "vision_cfg": dict(VISION), "text_cfg": dict(SHRUNK)}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
        file = folder / "mine.pt"
        torch.save(randomise(open_clip.CLIP(16, dict(VISION), dict(SHRUNK))).state_dict(), file)
        return str(file)

    return make


def activation_of(module: Any) -> type[nn.Module]:
    return type(module.transformer.resblocks[0].mlp.gelu)


def test_a_guess_is_warned_of_and_noted(shrunk: Any) -> None:
    file = shrunk("ViT-B-32")
    with pytest.warns(
        UserWarning, match=r"mine.pt does not say which activation.*QuickGELU: openai, .*quick_gelu=True"
    ):
        encoder = clip_lens.load("ViT-B-32", pretrained=file)
    assert encoder.tower.cfg.act_fn == "gelu"
    assert any("activation GELU: a guess" in note for note in encoder.notes)


@pytest.mark.parametrize(
    ("options", "act", "note"),
    [
        ({"like": "openai"}, "quick_gelu", "as the tag 'openai' has it"),
        ({"like": "laion2b_s34b_b79k"}, "gelu", "as the tag 'laion2b_s34b_b79k' has it"),
        ({"quick_gelu": True}, "quick_gelu", "as quick_gelu= says"),
        ({"quick_gelu": False}, "gelu", "as quick_gelu= says"),
    ],
)
def test_what_is_said_is_done(options: dict[str, Any], act: str, note: str, shrunk: Any, recwarn: Any) -> None:
    encoder = clip_lens.load("ViT-B-32", pretrained=shrunk("ViT-B-32"), **options)
    assert encoder.tower.cfg.act_fn == act
    assert any(note in line for line in encoder.notes)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_a_public_file_is_known_by_its_checksum(shrunk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shrunk("ViT-B-32")
    checksum = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    for address in (
        f"https://openaipublic.azureedge.net/clip/models/{checksum}/ViT-B-32.pt",
        f"https://github.com/mlfoundations/open_clip/releases/download/v0/b_32-{checksum[:8]}.pt",
    ):
        known = open_clip.get_pretrained_cfg("ViT-B-32", "laion400m_e32") | {"url": address}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED["ViT-B-32"], "laion400m_e32", known)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder = clip_lens.load("ViT-B-32", pretrained=file)
        assert encoder.tower.cfg.act_fn == "quick_gelu"
        assert "activation QuickGELU: the file is that of the tag 'laion400m_e32'" in encoder.notes


def test_every_checksum_that_open_clip_checks_is_read() -> None:
    """open_clip's own rule for its addresses, of which OpenAI's and its releases' have checksums."""
    from clip_lens.originals.settings import CHECKSUM

    seen = set()
    for name, tag in PAIRS:
        url = open_clip.get_pretrained_cfg(name, tag).get("url", "")
        expected = ""
        if "openaipublic" in url:
            expected = url.split("/")[-2]
        elif "mlfoundations" in url:
            expected = Path(url).stem.split("-")[-1]
        found = CHECKSUM.search(url)
        assert (found[1] if found else "") == (expected if len(expected) in (8, 64) else ""), url
        seen.add(expected)
    assert len(seen) > 15


def test_the_configuration_beside_a_file_is_read(shrunk: Any, tmp_path: Path, recwarn: Any) -> None:
    file = shrunk("ViT-B-32")
    shapes = {"embed_dim": 16, "vision_cfg": dict(VISION), "text_cfg": dict(SHRUNK)}
    beside = tmp_path / "open_clip_config.json"
    beside.write_text(
        json.dumps({"model_cfg": {**shapes, "quick_gelu": True}, "preprocess_cfg": {"resize_mode": "squash"}})
    )
    original = open_original("ViT-B-32", pretrained=file, with_tokenizer=False)
    assert activation_of(original.module) is open_clip.transformer.QuickGELU
    assert original.module.visual.preprocess_cfg["resize_mode"] == "squash"  # type: ignore[union-attr]
    assert not original.doubts and not original.image_doubts
    assert "activation QuickGELU: the open_clip_config.json beside the file" in original.notes
    for foreign in ({**shapes, "embed_dim": 17}, {**shapes, "text_cfg": {**SHRUNK, "layers": 2}}, {}):
        beside.write_text(json.dumps({"model_cfg": {**foreign, "quick_gelu": True}}))
        assert open_original("ViT-B-32", pretrained=file, with_tokenizer=False).doubts
    beside.write_text("{")
    assert open_original("ViT-B-32", pretrained=file, with_tokenizer=False).doubts


@pytest.mark.parametrize("name", ["ViT-L-14-CLIPA", "ViT-B-16-SigLIP"])
def test_a_name_whose_tags_agree_gives_a_file_their_preprocessing(name: str, shrunk: Any, recwarn: Any) -> None:
    original = open_original(name, pretrained=shrunk(name), with_tokenizer=False)
    _, prepared = of_tag(name, open_clip.list_pretrained_tags_by_model(name)[0])
    found = original.module.visual.preprocess_cfg  # type: ignore[union-attr]
    assert tuple(found[key] for key in PREPARED) == prepared
    assert prepared != tuple(getattr(open_clip.transform.PreprocessCfg(), key) for key in PREPARED)
    assert not original.doubts and not original.image_doubts


def test_preprocessing_that_tags_disagree_on_is_a_doubt_about_images(shrunk: Any) -> None:
    original = open_original("ViT-L-14", pretrained=shrunk("ViT-L-14"), with_tokenizer=False)
    assert len(original.image_doubts) == 1 and "like=TAG" in original.image_doubts[0]
    assert "mean (0.5, 0.5, 0.5), bicubic, shortest: laion2b_s32b_b82k" in original.image_doubts[0]


def test_a_guessed_preprocessing_is_not_known(shrunk: Any) -> None:
    file = shrunk("ViT-L-14")
    with pytest.warns(UserWarning, match="does not say which activation"):
        guessed = clip_lens.load("ViT-L-14", pretrained=file)
    said = clip_lens.load("ViT-L-14", pretrained=file, like="laion2b_s32b_b82k")
    assert guessed.image_preprocessing is None
    assert json.loads(str(said.image_preprocessing))["mean"] == [0.5, 0.5, 0.5]


def test_like_and_quick_gelu_are_for_files() -> None:
    for pretrained in ("openai", "nowhere.pt", "random", None):
        with pytest.raises(ValueError, match=r"like= and quick_gelu= say how the weights in a file were trained"):
            open_original("ViT-B-32" if pretrained else "tiny", pretrained=pretrained, quick_gelu=True)
    with pytest.raises(ValueError, match="has its weights with it"):
        clip_lens.load(nn.Linear(2, 2), like="openai")


# --- on the command line --------------------------------------------------------------------------------------------


def test_every_command_that_loads_a_model_takes_what_decides() -> None:
    commands = {
        command.callback.__name__: signature(command.callback).parameters for command in app.registered_commands
    }  # type: ignore[union-attr, arg-type]
    loading = {name: options for name, options in commands.items() if "pretrained" in options}
    assert {"trace", "study", "embed", "info"} < set(loading)
    assert all({"like", "quick_gelu"} <= set(options) for options in loading.values())
    assert "random:SEED" in get_args(options.Pretrained)[1].help


@pytest.mark.parametrize(
    ("said", "activation", "mean"),
    [
        (("--like", "openai"), "QuickGELU", OPENAI_MEAN),
        (("--like", "laion2b_s32b_b82k"), "GELU", (0.5, 0.5, 0.5)),
        (("--like", "laion2b_s32b_b82k", "--quick-gelu"), "QuickGELU", (0.5, 0.5, 0.5)),
        (("--like", "openai", "--no-quick-gelu"), "GELU", OPENAI_MEAN),
    ],
)
def test_info_and_embed_do_what_is_said(
    said: tuple[str, ...], activation: str, mean: Any, shrunk: Any, tmp_path: Path, capsys: Any, recwarn: Any
) -> None:
    file, picture, out = shrunk("ViT-L-14"), tmp_path / "red.png", tmp_path / "red.safetensors"
    assert main(["info", "ViT-L-14", "--pretrained", file, *said]) == 0
    told = capsys.readouterr().out
    assert f"heads, {activation}(" in told and f"activation {activation}: as " in told
    Image.new("RGB", (40, 50), "red").save(picture)
    words = ["--model", "ViT-L-14", "--pretrained", file, *said, "--out", str(out), "--quiet"]
    assert main(["embed", str(picture), *words]) == 0
    assert f"mean={mean}" in ImageStore.open(out).provenance["preprocessing"]
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_a_job_embeds_and_loads_what_is_said(shrunk: Any, tmp_path: Path, recwarn: Any) -> None:
    pictures, file = ASSETS / "pictures", shrunk("ViT-L-14")
    pairs, names = read_pairs(), {path.name for path in pictures.iterdir()}
    chosen = pairs[[row for row, image in enumerate(pairs.image) if image in names]]
    chosen.to_frame().to_csv(tmp_path / "pairs.csv", index=False)
    given: dict[str, Any] = {"pairs": str(tmp_path / "pairs.csv"), "images": str(pictures), "model": "ViT-L-14"}
    said = {"like": "laion2b_s32b_b82k", "quick_gelu": True}
    job = open_job(tmp_path / "out", **given, pretrained=file, **said, quiet=True)  # type: ignore[arg-type]
    assert job.encoder.tower.cfg.act_fn == "quick_gelu"
    assert "mean=(0.5, 0.5, 0.5)" in job.images.provenance["preprocessing"]
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
