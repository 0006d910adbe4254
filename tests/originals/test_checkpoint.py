"""Checkpoints as training code, OpenAI and the libraries write them: read whole, or refused with what was found."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from towers import VISION, randomise

import clip_lens
from clip_lens.originals.checkpoint import read
from clip_lens.originals.open_clip import open_original

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
SMALL = {"embed_dim": 32, "vision_cfg": {**VISION, "head_width": 64}, "text_cfg": TEXT, "quick_gelu": True}
FLAT, CUSTOM = "clip-lens-flat", "clip-lens-custom"
TEXTS = ["There are no circles.", "a cat"]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One small architecture under two names: with the text tower's parts in the model itself, and below "text."."""
    folder = tmp_path_factory.mktemp("configs")
    for name, custom in ((FLAT, False), (CUSTOM, True)):
        (folder / f"{name}.json").write_text(json.dumps({**SMALL, "custom_text": custom}))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    for name in (FLAT, CUSTOM):
        open_clip.factory._MODEL_CONFIGS.pop(name)


def build(custom: bool = False, seed: int = 0) -> Any:
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return randomise(kind(**SMALL), seed)


def text_of(state: Tensors) -> Tensors:
    return {name: value for name, value in state.items() if not name.startswith(("visual.", "logit_"))}


def same(encoder: clip_lens.HookedTextEncoder, module: Any) -> None:
    """The encoder says what the original module says."""
    with torch.no_grad():
        expected = nn.functional.normalize(module.encode_text(encoder.tokenize(TEXTS)), dim=-1)
    assert (encoder(TEXTS) - expected).abs().max() <= 1e-6


def loaded(name: str, content: Any, tmp_path: Path, **options: Any) -> clip_lens.HookedTextEncoder:
    torch.save(content, tmp_path / "it.pt")
    return clip_lens.load(name, pretrained=str(tmp_path / "it.pt"), **options)


def data_parallel(module: nn.Module) -> Tensors:
    return nn.DataParallel(module).state_dict()


@contextmanager
def group_of_one() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def distributed(module: nn.Module) -> Tensors:
    with group_of_one():
        return nn.parallel.DistributedDataParallel(module).state_dict()


def compiled(module: nn.Module) -> Tensors:
    return torch.compile(module).state_dict()


def sharded(module: nn.Module) -> Tensors:
    """FSDP's own names, of the whole and of a block. It takes no scalars, so that the scale has the shape [1]."""
    module = copy.deepcopy(module)
    module.logit_scale = nn.Parameter(module.logit_scale[None])  # type: ignore[index]
    wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
    with group_of_one():
        module.transformer.resblocks[1] = wrap(module.transformer.resblocks[1])  # type: ignore
        whole = wrap(module)
        named = [*whole.named_parameters(), *whole.named_buffers()]
        return {name: value.detach().clone() for name, value in named}


def lightning(file: Path, module: nn.Module) -> None:
    """A checkpoint that Lightning's trainer writes of a model in a LightningModule."""

    class Training(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = module
            self.save_hyperparameters({"lr": 0.1, "name": "run"})

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(Training())
    trainer.save_checkpoint(file)


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "bare": lambda module: module.state_dict(),
    "an entry of open_clip's training": lambda module: {
        "epoch": 3, "name": "run", "state_dict": module.state_dict(), "optimizer": {"state": {}, "param_groups": []}
    },
    "an entry 'model'": lambda module: {"model": module.state_dict(), "epoch": 3},
    "entries in entries": lambda module: {"checkpoint": {"model": module.state_dict()}},
    "numpy numbers and arguments beside": lambda module: {
        "state_dict": module.state_dict(), "best": np.float64(0.5), "seen": np.int64(3), "losses": np.arange(3.0),
        "args": argparse.Namespace(lr=0.1),
    },
    "DataParallel": data_parallel,
    "DDP": lambda module: {"state_dict": distributed(module)},
    "torch.compile": compiled,
    "FSDP": sharded,
    "DDP of torch.compile": lambda module: data_parallel(torch.compile(module)),  # type: ignore[arg-type]
    "half precision": lambda module: {name: value.half() for name, value in module.state_dict().items()},
    "a scale of shape [1]": lambda module: module.state_dict() | {"logit_scale": torch.tensor([3.0])},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_weights_are_found(wrapper: str, tmp_path: Path, recwarn: Any) -> None:
    module = build()
    content = WRAPPED[wrapper](module)
    recwarn.clear()  # what the library says that makes the file
    encoder = loaded(FLAT, content, tmp_path)
    same(encoder, module if wrapper != "half precision" else module.half().float())
    assert encoder.scale == pytest.approx(np.exp(3.0)) and encoder.image_digest is not None
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_checkpoint_of_lightnings(tmp_path: Path) -> None:
    module = build()
    lightning(tmp_path / "it.ckpt", module)
    content = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert "pytorch-lightning_version" in content and "model.positional_embedding" in content["state_dict"]
    same(clip_lens.load(FLAT, pretrained=str(tmp_path / "it.ckpt")), module)


@pytest.mark.parametrize("name", [FLAT, CUSTOM])
@pytest.mark.parametrize("custom", [False, True], ids=["flat", "text.*"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_either_layout_fits_either_model(name: str, custom: bool, suffix: str, tmp_path: Path) -> None:
    module, file = build(custom), tmp_path / f"it{suffix}"
    save_file(module.state_dict(), file) if suffix != ".pt" else torch.save(module.state_dict(), file)
    same(clip_lens.load(name, pretrained=str(file)), module)
    found = open_original(name, pretrained=str(file)).module
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (found.encode_image(pixels) - module.encode_image(pixels)).abs().max() <= 1e-6  # type: ignore[operator]


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema", "ema"])
def test_a_moving_average_is_taken_and_said(entry: str, tmp_path: Path) -> None:
    plain, averaged = build(seed=1), build(seed=2)
    content = {"state_dict": plain.state_dict(), entry: averaged.state_dict()}
    with pytest.warns(UserWarning, match=rf"the moving average '{entry}' is taken; the file also has state_dict"):
        encoder = loaded(FLAT, content, tmp_path)
    same(encoder, averaged)
    assert any("moving average" in note for note in encoder.notes)


def test_an_averaged_model_of_pytorchs_is_read_and_its_counter_said(tmp_path: Path) -> None:
    module = build()
    averaged = torch.optim.swa_utils.AveragedModel(module)
    with pytest.warns(UserWarning, match="1 tensors beside 'module.' are left out: n_averaged"):
        encoder = loaded(FLAT, averaged.state_dict(), tmp_path)
    same(encoder, module)


@pytest.mark.parametrize("name", [FLAT, CUSTOM])
@pytest.mark.parametrize(
    ("custom", "tower"),
    [
        (False, lambda module: text_of(module.state_dict())),
        (True, lambda module: module.text.state_dict()),
        (True, lambda module: text_of(module.state_dict())),
    ],
    ids=["flat", "TextTransformer", "text.*"],
)
def test_a_text_tower_alone(custom: bool, tower: Callable[[Any], Tensors], name: str, tmp_path: Path) -> None:
    module = build(custom)
    with pytest.warns(UserWarning, match="the file holds a text tower alone"):
        encoder = loaded(name, tower(module), tmp_path, scale=50.0)
    same(encoder, module)
    assert encoder.scale == 50.0 and encoder.image_digest is None
    file = str(tmp_path / "it.pt")
    with pytest.raises(ValueError, match="no logit scale with it; give scale="), pytest.warns(UserWarning):
        clip_lens.load(name, pretrained=file)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="has no image tower"):
        clip_lens.embed_images(tmp_path_with_picture(tmp_path), model=name, pretrained=file, out=tmp_path / "out")


def tmp_path_with_picture(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (48, 40), "red").save(folder / "red.png")
    return folder


def test_another_image_size_is_stretched_and_said(tmp_path: Path) -> None:
    larger = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 64}}  # type: ignore[dict-item]
    with pytest.warns(UserWarning, match=r"visual.positional_embedding was stretched from \[5, 64\] to \[2, 64\]"):
        loaded(FLAT, open_clip.CLIP(**larger).state_dict(), tmp_path)  # type: ignore[arg-type]


# --- TorchScript, and the `clip` package ----------------------------------------------------------------------------


def openai_model() -> Any:
    """The module of OpenAI's package, loaded by its file: the package itself asks for more than it needs."""
    spec = importlib.util.find_spec("clip")
    if spec is None or spec.origin is None:
        if os.environ.get("CI"):
            pytest.fail("clip-anytorch, OpenAI's package, is missing; the extra `test` has it")
        pytest.skip("OpenAI's package is not installed (clip-anytorch)")
    file = importlib.util.spec_from_file_location("openai_clip_model", Path(spec.origin).with_name("model.py"))
    module = importlib.util.module_from_spec(file)  # type: ignore[arg-type]
    file.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def openai_clip() -> Any:
    return randomise(openai_model().CLIP(32, 32, 1, 64, 32, 77, 49408, 64, 1, 2))


def traced(module: Any, file: Path) -> str:
    """OpenAI's archives are traced, and keep three numbers among the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
            vars(module).pop(name, None)
            module.register_buffer(name, torch.tensor(number))
        tokens = open_clip.SimpleTokenizer()(TEXTS)
        inputs = {"encode_text": tokens, "encode_image": torch.zeros(2, 3, 32, 32)}
        torch.jit.save(torch.jit.trace_module(module.eval(), inputs), file)
    return str(file)


@pytest.mark.parametrize("name", ["ViT-B-32", FLAT, CUSTOM])
def test_an_archive_of_openais_says_its_activation(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Even under a name whose public checkpoints differ: no warning, and the right one."""
    if name == "ViT-B-32":
        plain = {key: value for key, value in SMALL.items() if key != "quick_gelu"}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, plain)
    module = openai_clip()
    file = traced(module, tmp_path / "ViT-B-32.pt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        encoder = clip_lens.load(name, pretrained=file)
    same(encoder, module)
    assert encoder.tower.cfg.act_fn == "quick_gelu"
    assert "activation QuickGELU: the archive's own code" in encoder.notes
    with pytest.raises(ValueError, match="was trained with QuickGELU, as its own code says; leave quick_gelu= out"):
        clip_lens.load(name, pretrained=file, quick_gelu=False)


def test_a_scripted_model_with_gelu(tmp_path: Path) -> None:
    module = randomise(open_clip.CLIP(**{**SMALL, "quick_gelu": False}))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), tmp_path / "it.pt")
    encoder = clip_lens.load(FLAT, pretrained=str(tmp_path / "it.pt"))
    same(encoder, module)
    assert encoder.tower.cfg.act_fn == "gelu" and "activation GELU: the archive's own code" in encoder.notes


def test_an_archive_that_does_not_tell_its_activation(tmp_path: Path) -> None:
    module = build()
    for block in module.transformer.resblocks:
        block.mlp.gelu = nn.ReLU()
    assert read(traced(module, tmp_path / "it.pt")).quick_gelu is None


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_the_clip_packages_own_model_in_memory(half: bool, tmp_path: Path) -> None:
    module = openai_clip()
    exact = {name: value.clone() for name, value in module.state_dict().items()}
    if half:
        openai_model().convert_weights(module)
        exact = {name: value.float() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.train().modules()]
    encoder = clip_lens.load(module, tokenizer=open_clip.SimpleTokenizer())
    plain = openai_clip()
    plain.load_state_dict(exact)
    same(encoder, plain)
    assert encoder.dtype == torch.float32 and encoder.tower.cfg.act_fn == "quick_gelu"
    prepare = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=32), is_train=False)
    folder, out = tmp_path_with_picture(tmp_path), tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="has no preprocessing for images; give preprocess="):
        clip_lens.embed_images(folder, model=module, out=out, progress=False)
    store = clip_lens.embed_images(folder, model=module, preprocess=prepare, out=out, progress=False)
    assert store.digest == encoder.image_digest
    from PIL import Image

    with torch.no_grad():
        pixels = prepare(Image.open(folder / "red.png"))[None]  # type: ignore[operator]
        expected = nn.functional.normalize(plain.encode_image(pixels), dim=-1)
    assert (store[["red.png"]] - expected).abs().max() <= 1e-6
    assert [part.training for part in module.modules()] == modes
    assert (module.visual.conv1.weight.dtype == torch.float16) is half


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_a_module_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    """With the preprocessing that open_clip left on it, and in its own precision."""
    module = open_original("tiny").module.to(dtype)
    module.visual.preprocess_cfg = {"size": 48, "mean": (0.5,) * 3, "std": (0.25,) * 3}  # type: ignore[union-attr]
    folder = tmp_path_with_picture(tmp_path)
    store = clip_lens.embed_images(folder, model=module, out=tmp_path / "out.safetensors", progress=False)
    assert store.digest == clip_lens.load(module, tokenizer=open_clip.SimpleTokenizer()).image_digest
    assert store.provenance["model"] == "CLIP in memory"
    with pytest.raises(ValueError, match="a module in memory has its weights with it"):
        clip_lens.embed_images(folder, model=module, pretrained="openai", out=tmp_path / "o", progress=False)


def test_a_script_in_memory_is_refused_with_the_way_out(tmp_path: Path) -> None:
    script = torch.jit.load(traced(build(), tmp_path / "it.pt"))
    with pytest.raises(ValueError, match=r"is TorchScript \(CLIP\): save it, torch.jit.save.*pretrained='it.pt'"):
        clip_lens.load(script)


# --- what is refused ------------------------------------------------------------------------------------------------


def parts() -> Tensors:
    return build().state_dict()


class Foreign:
    """Something that a training script pickled."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an optimizer alone": (
        lambda: {"epoch": 3, "optimizer": {"state": {}, "lr": 0.1}},
        "it holds no tensors by name, but epoch, optimizer",
    ),
    "a list": (lambda: [torch.ones(2)], "it holds a list; expected are tensors by name"),
    "nothing": (lambda: {}, "it holds no tensors by name, but nothing"),
    "adapters": (
        lambda: {f"base_model.model.text.{i}.lora_A.weight": torch.ones(2, 2) for i in range(5)},
        r"5 tensors \(base_model.model.text.0.lora_A.weight, .* and 2 more\).*adapters: merge them",
    ),
    "transformers' names": (
        lambda: {"text_model.embeddings.token_embedding.weight": torch.ones(2, 2)},
        "transformers' names: give the folder with its config.json",
    ),
    "an image tower": (
        lambda: {name: value for name, value in build().state_dict().items() if name.startswith("visual.")},
        "this is an image tower alone",
    ),
    "another kind of model": (lambda: {"state_dict": nn.Linear(2, 2).state_dict()}, "weight, bias.*is it a CLIP?"),
    "teacher and student": (
        lambda: {f"{who}.{key}": value for who in ("teacher", "student") for key, value in parts().items()},
        "it holds several text towers, at teacher, student; save the one you mean alone",
    ),
    "a whole module": (build, r"beside tensors it holds .*, which may run code.*save its weights alone"),
    "objects of a training script's": (
        lambda: {"state_dict": build().state_dict(), "callbacks": Foreign()},
        r"beside tensors it holds test_checkpoint.Foreign, which may run code.*save its weights alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_refusals_name_what_was_found(what: str, legacy: bool, tmp_path: Path) -> None:
    make, said = REFUSED[what]
    torch.save(make(), tmp_path / "it.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=rf"can't load {FLAT} with pretrained='.*it.pt': .*{said}") as caught:
        clip_lens.load(FLAT, pretrained=str(tmp_path / "it.pt"))
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_untrained_weights_are_the_same_each_time_and_by_their_seed() -> None:
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    first = clip_lens.load(FLAT, pretrained="random")
    assert torch.equal(torch.rand(2), drawn)  # the caller's draws go on
    again, zero, seven = (clip_lens.load(FLAT, pretrained=seed) for seed in ("random", "random:0", "random:7"))
    assert first.digest == again.digest == zero.digest != seven.digest
    assert first.image_digest == again.image_digest != seven.image_digest
    assert seven.full_name == f"{FLAT} (random:7)"
    with pytest.raises(ValueError, match="pretrained='random:x': a seed is a whole number, as in random:7"):
        clip_lens.load(FLAT, pretrained="random:x")


def test_untrained_images_and_texts_fit_together(tmp_path: Path) -> None:
    folder, pairs = tmp_path_with_picture(tmp_path), clip_lens.read_pairs()[:2]
    store = clip_lens.embed_images(folder, model=FLAT, pretrained="random:5", out=tmp_path / "o", progress=False)
    encoder = clip_lens.load(FLAT, pretrained="random:5")
    assert store.digest == encoder.image_digest
    store.require(model=FLAT, pretrained="random:5", digest=encoder.image_digest, d_embed=32)
    assert len(pairs) == 2
