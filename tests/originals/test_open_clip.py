"""The doorway to open_clip: names, tags, files; every failure is one readable line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from towers import VISION, randomise

import clip_lens
from clip_lens.originals.open_clip import builtin_config, digest, open_original
from clip_lens.tiny.assets import ASSETS

SMALL = {
    "embed_dim": 32,
    "vision_cfg": VISION,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
NAME = "clip-lens-small"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nn.Module]:
    """A randomised model whose config open_clip knows by name."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{NAME}.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder)
    yield randomise(open_clip.CLIP(**SMALL))  # type: ignore[arg-type]
    (folder / f"{NAME}.json").unlink()
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._MODEL_CONFIGS.pop(NAME)


def written(module: nn.Module, path: Path) -> str:
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_file_gives_its_weights(suffix: str, small: Any, tmp_path: Path) -> None:
    file = written(small, tmp_path / f"weights{suffix}")
    original = open_original(NAME, pretrained=file)
    assert digest(original.module.state_dict()) == digest(small.state_dict())
    assert not original.module.training
    encoder = clip_lens.load(NAME, pretrained=file)
    tokens = encoder.tokenize(["There are no circles.", "a cat"])
    with torch.no_grad():
        assert (encoder(tokens) - small.encode_text(tokens, normalize=True)).abs().max() <= 1e-6
    assert encoder.pretrained == file
    assert encoder.image_digest == digest(small.visual.state_dict())


def test_a_half_precision_checkpoint_gives_float32(small: Any, tmp_path: Path) -> None:
    state = {name: value.half() for name, value in small.state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    encoder = clip_lens.load(NAME, pretrained=str(tmp_path / "half.pt"))
    assert encoder.dtype == torch.float32
    assert torch.equal(encoder.tower.W_pos, small.positional_embedding.half().float())


def test_a_local_folder_brings_its_weights(small: Any, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    name = f"local-dir:{tmp_path}"
    with pytest.raises(ValueError, match="Required pretrained weights"):  # not an untrained model, silently
        open_original(name)
    written(small, tmp_path / "open_clip_model.safetensors")
    assert digest(open_original(name).module.state_dict()) == digest(small.state_dict())
    with pytest.raises(ValueError, match="has its weights with it, got pretrained='openai'"):
        open_original(name, pretrained="openai")
    with pytest.raises(ValueError, match="not found"):
        open_original(f"local-dir:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0.5, 0.01, 0.0])
def test_truncated_files(suffix: str, kept: float, small: Any, tmp_path: Path) -> None:
    file = Path(written(small, tmp_path / f"weights{suffix}"))
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(
        ValueError, match=rf"can't load {NAME} with pretrained='.*weights{suffix}': .*truncated"
    ) as caught:
        clip_lens.load(NAME, pretrained=str(file))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("text", "said"),
    [({"width": 64}, "width changed"), ({"layers": 3}, "Unexpected key.*resblocks.2"), ({"layers": 1}, "Missing")],
)
def test_a_checkpoint_of_another_architecture(
    suffix: str, text: dict[str, int], said: str, small: Any, tmp_path: Path
) -> None:
    another = open_clip.CLIP(**{**SMALL, "text_cfg": {**SMALL["text_cfg"], **text}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=rf"can't load {NAME} .*{said}.*foreign file") as caught:
        clip_lens.load(NAME, pretrained=written(another, tmp_path / f"weights{suffix}"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_file_that_is_no_checkpoint(small: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.pt").write_text("these are notes")
    with pytest.raises(ValueError, match=r"notes.pt.*foreign file"):
        clip_lens.load(NAME, pretrained=str(tmp_path / "notes.pt"))


def test_unknown_names_name_their_neighbours() -> None:
    for name in ("ViT-B/32", "vit-b-32", "ViTB32"):
        with pytest.raises(ValueError, match=rf"no model '{name}': did you mean .*ViT-B-32.*list_models"):
            clip_lens.load(name)
    with pytest.raises(ValueError, match=r"no model 'zzzzzz': open_clip.list_models\(\) lists all"):
        clip_lens.load("zzzzzz")


def test_weights_must_be_named(small: Any) -> None:
    with pytest.raises(ValueError, match=r"ViT-B-32 needs weights.*openai.*laion2b_s34b_b79k.*path.*'random'"):
        clip_lens.load("ViT-B-32")
    with pytest.raises(ValueError, match="no tag of open_clip's fits"):
        clip_lens.load(NAME)


def test_neither_a_tag_nor_a_file(small: Any) -> None:
    with pytest.raises(ValueError, match=r"pretrained='opnai': neither a file nor one of its tags: openai, "):
        clip_lens.load("ViT-B-32", pretrained="opnai")
    with pytest.raises(ValueError, match="neither a file nor one of its tags: it has none"):
        clip_lens.load(NAME, pretrained="nowhere.pt")


def test_the_embedded_model_takes_no_weights() -> None:
    with pytest.raises(ValueError, match="no weights 'openai' for tiny; leave pretrained= out"):
        clip_lens.load("tiny", pretrained="openai")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise OSError("no route to host\nand a second line")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", fail)
    monkeypatch.setattr(open_clip.factory, "_get_hf_config", fail)
    said = r"can't load ViT-B-32 with pretrained='openai': .*no route to host and a second line \(without a network: "
    with pytest.raises(ValueError, match=said + r".*pretrained=PATH, like='openai', which keeps"):
        clip_lens.load("ViT-B-32", pretrained="openai")
    with pytest.raises(ValueError, match=r"can't load hf-hub:a/b .*no route to host and a second line$"):
        clip_lens.load("hf-hub:a/b")


def test_no_network_for_the_tokenizer(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError

    monkeypatch.setattr(open_clip, "get_tokenizer", fail)
    with pytest.raises(ValueError, match=rf"can't load the tokenizer of {NAME}: OSError .*tokenizer="):
        clip_lens.load(NAME, pretrained="random")


@pytest.mark.parametrize(("tag", "act"), [("openai", "quick_gelu"), ("laion2b_s34b_b79k", "gelu")])
def test_a_tag_gets_the_activation_it_was_trained_with(tag: str, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip builds "ViT-B-32" with GELU even for weights that were trained with QuickGELU, and warns."""
    config = open_clip.get_model_config("ViT-B-32")
    config["text_cfg"]["layers"], config["vision_cfg"] = 1, VISION
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", config)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **options: "weights")
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *args, **options: None)
    assert clip_lens.load("ViT-B-32", pretrained=tag).tower.cfg.act_fn == act


def test_opening_is_quiet(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: Any) -> None:
    open_original(NAME_OF_SMALLEST, pretrained="random")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not [warning for warning in recwarn if "open_clip" in str(warning.filename)]


NAME_OF_SMALLEST = "ViT-S-32-alt"


def test_what_is_opened_can_be_run() -> None:
    original = open_original("tiny")
    from PIL import Image

    pixels = original.preprocess(Image.new("RGB", (50, 40), "red"))[None]  # type: ignore[misc]
    with torch.no_grad():
        assert original.module.encode_image(pixels).shape == (1, 128)  # type: ignore[operator]
    assert original.tokenizer(["a"]).shape == (1, 77)
    assert original.vocabulary and max(original.vocabulary) == 49407


def test_builtin_configs() -> None:
    assert builtin_config("ViT-B-32")["embed_dim"] == 512
    assert builtin_config("hf-hub:a/b") == builtin_config("tiny") == {}


def test_digests_tell_weights_apart() -> None:
    weights = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    same = digest(weights)
    assert len(same) == 16
    assert digest(dict(reversed(weights.items()))) == same
    assert digest({name: value.double() for name, value in weights.items()}) == same
    assert digest({"a": torch.ones(3, 2), "b": torch.zeros(4)}) != same
    assert digest({"a": torch.ones(2, 3), "c": torch.zeros(4)}) != same
    assert digest({"a": torch.ones(2, 3), "b": torch.full((4,), 1e-7)}) != same
    assert digest({"a": torch.ones(3, 2).T, "b": torch.zeros(4)}) == same
    assert digest({"empty": torch.zeros(0)}) != digest({})


def test_tiny_takes_the_weights_of_another_training(tmp_path):
    """The same architecture with other weights, under a name that tells them apart; any other file is refused."""
    shipped = load_file(ASSETS / "model.safetensors")
    changed = {name: 2 * value if name == "text_projection" else value for name, value in shipped.items()}
    save_file(changed, tmp_path / "other.safetensors")
    mine = open_original("tiny", pretrained=str(tmp_path / "other.safetensors"))
    torch.testing.assert_close(mine.module.text_projection, 2 * open_original("tiny").module.text_projection)
    assert (mine.name, mine.pretrained) == ("tiny", str(tmp_path / "other.safetensors"))
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign\.safetensors' can't be read as a tiny model's"):
        open_original("tiny", pretrained=str(tmp_path / "foreign.safetensors"))
