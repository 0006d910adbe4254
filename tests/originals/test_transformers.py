"""Models of transformers': what is handed out is what transformers itself computes, or there is one readable error."""

from __future__ import annotations

import gzip
import json
import socket
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from towers import VISION, random_clip, randomise
from typer.testing import CliRunner

from clip_lens import HookedTextEncoder, ImageStore, Site, align, embed_images, load, patch_effects, read_pairs
from clip_lens.cli.app import app
from clip_lens.originals.open_clip import open_original

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Of the largest component of an embedding."""
TEXTS = ["There are no circles.", "a cat's  Zeppelin, 12 pm", "", "There is a red square and no blue star."]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SEEN = {**SIZES, "image_size": 32, "patch_size": 16}


@cache
def clip_tokenizer() -> Any:
    """CLIP's own vocabulary, from the file that open_clip has."""
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges])


@pytest.fixture(scope="module")
def siglip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SigLIP's kind of tokenizer, its pieces learnt from a few sentences; it ends and pads a text with the same id."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join([*TEXTS, "abcdefghijklmnopqrstuvwxyz 0123456789"] * 20).lower())
    options = {"vocab_size": 90, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), hard_vocab_limit=False, **options
    )
    return transformers.SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"])


def clip(text: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Any:
    config = transformers.CLIPConfig(
        text_config=SIZES | (text or {}), vision_config=SEEN, **({"projection_dim": 24} | options)
    )
    return randomise(transformers.CLIPModel(config), seed)


def clip_text(text: dict[str, Any] | None = None) -> Any:
    config = transformers.CLIPTextConfig(**SIZES | {"projection_dim": 24} | (text or {}))
    return randomise(transformers.CLIPTextModelWithProjection(config))


def siglip(text: dict[str, Any] | None = None, **options: Any) -> Any:
    sizes = SIZES | {"vocab_size": 100, "max_position_embeddings": 64, "projection_size": 32} | (text or {})
    config = transformers.SiglipConfig(text_config=sizes, vision_config=SEEN, **options)
    return randomise(transformers.SiglipModel(config))


def siglip_text(text: dict[str, Any] | None = None) -> Any:
    sizes = SIZES | {"vocab_size": 100, "max_position_embeddings": 64} | (text or {})
    return randomise(transformers.SiglipTextModel(transformers.SiglipTextConfig(**sizes)))


def saved(folder: Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@torch.no_grad()
def embeddings(model: Any, tokenizer: Any, texts: list[str], **options: Any) -> Tensor:
    """What transformers gives, called as its documentation calls it."""
    context = model.config.get_text_config().max_position_embeddings
    inputs = tokenizer(texts, truncation=True, max_length=context, return_tensors="pt", **options)
    if hasattr(model, "get_text_features"):
        return model.get_text_features(**inputs).pooler_output
    output = model(**inputs)
    return output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output


def assert_parity(source: Any, model: Any, own: Any, **options: Any) -> HookedTextEncoder:
    """`load(source)` against the model's own forward pass, in both precisions; the encoder in the last of them."""
    encoder = load(source, **options)
    for dtype, tolerance in TOLERANCE.items():
        encoder.to(dtype)
        raw = embeddings(model.to(dtype), own, TEXTS, padding="max_length")
        tokens = encoder.tokenize(TEXTS)
        found = encoder.tower(tokens)[torch.arange(len(TEXTS)), encoder.pool(tokens)]
        assert (found - raw).abs().max() <= tolerance * raw.abs().max(), dtype
        unit = F.normalize(raw, dim=-1)
        assert (encoder(TEXTS) - unit).abs().max() <= tolerance * unit.abs().max(), dtype
    model.float()
    return encoder


# --- parity ---------------------------------------------------------------------------------------------------------


def test_full_size(tmp_path: Path) -> None:
    """The text tower of ViT-B/32 as transformers configures it; the image tower is a toy."""
    model = randomise(transformers.CLIPModel(transformers.CLIPConfig(vision_config=SEEN)))
    folder = saved(tmp_path, model, clip_tokenizer())
    encoder = assert_parity(folder, model, clip_tokenizer())
    assert (encoder.n_layers, encoder.n_heads, encoder.tower.cfg.d_model, encoder.d_embed) == (12, 8, 512, 512)
    assert (encoder.n_ctx, encoder.tower.cfg.act_fn, encoder.pool.type) == (77, "quick_gelu", "eos")
    assert abs(encoder.scale - float(model.logit_scale.detach().exp())) <= 1e-5


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CLIP": (clip, {}),
    "the eos id of early files": (clip, {"eos_token_id": 2}),
    "GELU": (clip, {"hidden_act": "gelu"}),
    "tanh GELU": (clip, {"hidden_act": "gelu_pytorch_tanh"}),
    "large eps": (clip, {"layer_norm_eps": 0.3}),
    "two heads": (clip, {"num_attention_heads": 2}),
    "CLIP's text tower": (clip_text, {}),
    "CLIP's text tower, another projection": (clip_text, {"projection_dim": 40, "eos_token_id": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_clip(variant: str, tmp_path: Path) -> None:
    make, text = VARIANTS[variant]
    model = make(text)
    options = {"scale": 100.0} if make is clip_text else {}
    assert_parity(saved(tmp_path, model, clip_tokenizer()), model, clip_tokenizer(), **options)


@pytest.mark.parametrize("make", [siglip, siglip_text])
@pytest.mark.parametrize("text", [{}, {"projection_size": 40}, {"hidden_act": "gelu"}, {"layer_norm_eps": 0.3}])
def test_variants_of_siglip(make: Any, text: dict[str, Any], siglip_tokenizer: Any, tmp_path: Path) -> None:
    model = make(text)
    options = {"scale": 100.0} if make is siglip_text else {}
    folder = saved(tmp_path, model, siglip_tokenizer)
    encoder = assert_parity(folder, model, siglip_tokenizer, **options)
    assert (encoder.causal, encoder.pool.type) == (False, "last")
    assert encoder.tower.b_U.abs().min() > 0


def siglip2() -> Any:
    sizes = SIZES | {"vocab_size": 100, "max_position_embeddings": 64, "projection_size": 32}
    patches = SIZES | {"num_patches": 4, "patch_size": 16}
    return randomise(transformers.Siglip2Model(transformers.Siglip2Config(text_config=sizes, vision_config=patches)))


def siglip2_text() -> Any:
    sizes = SIZES | {"vocab_size": 100, "max_position_embeddings": 64, "projection_size": 40}
    return randomise(transformers.Siglip2TextModel(transformers.Siglip2TextConfig(**sizes)))


def metaclip2(eos_token_id: int = 49407) -> Any:
    text = SIZES | {"eos_token_id": eos_token_id}
    return randomise(
        transformers.MetaClip2Model(
            transformers.MetaClip2Config(text_config=text, vision_config=SEEN, projection_dim=24)
        )
    )


def metaclip2_text() -> Any:
    config = transformers.MetaClip2TextConfig(**SIZES, projection_dim=24)
    return randomise(transformers.MetaClip2TextModelWithProjection(config))


def clipseg(eos_token_id: int = 49407) -> Any:
    text = SIZES | {"eos_token_id": eos_token_id}
    return randomise(
        transformers.CLIPSegModel(transformers.CLIPSegConfig(text_config=text, vision_config=SEEN, projection_dim=24))
    )


def xclip() -> Any:
    seen = SEEN | {"mit_hidden_size": 24, "mit_intermediate_size": 32, "mit_num_attention_heads": 2}
    return randomise(
        transformers.XCLIPModel(transformers.XCLIPConfig(text_config=SIZES, vision_config=seen, projection_dim=24))
    )


def siglip2_tokenizer() -> Any:
    """SigLIP 2's own kind: one token per letter, in lower case, an end added as its published files add it."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789.,'"]
    vocabulary = {word: number for number, word in enumerate(words)}
    options = {"padding_side": "right", "model_input_names": ["input_ids"]}
    made = transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[], **options)
    made.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return made


RELATIVES: dict[str, tuple[Any, str, bool]] = {
    "SigLIP 2": (siglip2, "last", False),
    "SigLIP 2's text tower": (siglip2_text, "last", False),
    "MetaCLIP 2": (metaclip2, "eos", True),
    "MetaCLIP 2's text tower": (metaclip2_text, "eos", False),
    "CLIPSeg": (clipseg, "eos", True),
    "CLIPSeg with the eos id of early files": (partial(clipseg, 2), "argmax", True),
    "X-CLIP": (xclip, "argmax", False),
}


@pytest.mark.parametrize("relative", RELATIVES)
@pytest.mark.parametrize("in_memory", [False, True], ids=["folder", "in memory"])
def test_relatives_of_clip_and_siglip(relative: str, in_memory: bool, tmp_path: Path) -> None:
    make, pool, sees = RELATIVES[relative]
    model = make()
    tokenizer = siglip2_tokenizer() if pool == "last" else clip_tokenizer()
    options = {} if hasattr(model, "logit_scale") else {"scale": 100.0}
    if in_memory:
        options["tokenizer"] = tokenizer
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if relative != "X-CLIP" else "ignore", category=UserWarning, message=".*")
        encoder = assert_parity(model if in_memory else saved(tmp_path, model, tokenizer), model, tokenizer, **options)
    assert bool(encoder.notes) == (relative == "X-CLIP") and encoder.pool.type == pool
    assert (encoder.image_digest is not None) == sees


@pytest.mark.parametrize("make", [clipseg, metaclip2])
def test_images_of_relatives(make: Any, tmp_path: Path) -> None:
    model = make()
    folder = saved(tmp_path / "model", model, processor(), clip_tokenizer())
    Image.new("RGB", (40, 50), "red").save(tmp_path / "red.png")
    store = embed_images(tmp_path / "red.png", model=folder, out=tmp_path / "it", progress=False)
    pixels = processor()(Image.open(tmp_path / "red.png"), return_tensors="pt")
    with torch.no_grad():
        options = {"interpolate_pos_encoding": False} if make is clipseg else {}
        expected = F.normalize(model.get_image_features(**pixels, **options).pooler_output, dim=-1)
    assert (store[["red.png"]] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("make", [xclip, siglip2])
@pytest.mark.filterwarnings("ignore:.*texts are read alone")
def test_relatives_that_see_other_things_than_pictures(make: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 50), "red").save(tmp_path / "red.png")
    with pytest.raises(ValueError, match="has no image tower that takes single pictures of one size"):
        embed_images(tmp_path / "red.png", model=make(), preprocess=lambda it: it, out=tmp_path / "it", progress=False)


def test_metaclip_2_has_no_rule_for_early_files() -> None:
    """Its released configs say 2, and mean the token 2: read by transformers itself."""
    model = metaclip2(2).double()
    tokens = torch.randint(3, 200, (3, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, 20], tokens[:, 40] = 2, 49407
    encoder = load(model)
    with torch.no_grad():
        expected = F.normalize(model.get_text_features(tokens).pooler_output, dim=-1)
    assert encoder.pool(tokens).tolist() == [20, 20, 20]
    assert (encoder(tokens) - expected).abs().max() <= 1e-12


def keeping_capitals() -> Any:
    """A tokenizer that tells capitals, and pads on the left."""
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *"abcdefgh", *"ABCDEFGH"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


@pytest.mark.parametrize("make", [siglip, siglip2])
def test_siglip_reads_lower_case_and_says_so(make: Any) -> None:
    module, tokenizer = make(), keeping_capitals()
    encoder = load(module, tokenizer=tokenizer, dtype=torch.float64)
    assert torch.equal(encoder.tokenize(["A b"]), encoder.tokenize(["a B"]))
    assert encoder.tokenize(["A b"])[0, :4].tolist() == [3, 4, 1, 0]
    own = tokenizer(["a b"], padding="max_length", max_length=64, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        expected = module.double().get_text_features(own["input_ids"]).pooler_output
    assert (encoder("A b") - F.normalize(expected, dim=-1)).abs().max() <= 1e-12
    assert any("put into lower case" in note for note in encoder.notes)
    assert any("padded on the right" in note and "pads on the left" in note for note in encoder.notes)
    assert any("padding is read" in note for note in encoder.notes) and len(encoder.notes) == 3


def test_clip_reads_what_its_tokenizer_says(siglip_tokenizer: Any) -> None:
    encoder = load(clip({"eos_token_id": 1}), tokenizer=keeping_capitals())
    assert not torch.equal(encoder.tokenize(["A b"]), encoder.tokenize(["a B"]))
    assert encoder.notes == () and load(siglip(), tokenizer=siglip_tokenizer).notes == ()


# --- names in Hugging Face's cache ----------------------------------------------------------------------------------


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in the place of the user's, and no network."""

    def unreachable(*args: Any, **options: Any) -> Any:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def in_cache(cache: Path, name: str) -> Path:
    """The folder of a repository's only version, laid out as `hf download` does it."""
    repository, version = cache / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(version)
    (repository / "snapshots" / version).mkdir(parents=True)
    return repository / "snapshots" / version


def test_another_image_processor_of_the_same_weights_is_refused(tmp_path: Path) -> None:
    model, plain, dark = clip(), processor(), processor()
    dark.image_mean = [0.1, 0.2, 0.3]
    same = saved(tmp_path / "same", model, clip_tokenizer(), plain)
    darker = saved(tmp_path / "darker", model, clip_tokenizer(), dark)
    Image.new("RGB", (40, 50), "red").save(tmp_path / "red.png")
    store = embed_images(tmp_path / "red.png", model=darker, out=tmp_path / "it", progress=False)
    assert json.loads(str(store.preprocess_cfg))["image_mean"] == [0.1, 0.2, 0.3]
    store.require_of(load(darker))
    with pytest.raises(ValueError, match=r'prepared with {"image_mean": \[0.1, 0.2, 0.3\]}, the encoder'):
        store.require_of(load(same))


def test_a_repository_in_the_cache_goes_by_its_name(cache_folder: Path, tmp_path: Path) -> None:
    model, name = clip(), "openai/clip-vit-base-patch32"
    saved(in_cache(cache_folder, name), model, clip_tokenizer(), processor())
    encoder = load(name)
    raw = embeddings(model, clip_tokenizer(), TEXTS, padding="max_length")
    assert (encoder(TEXTS) - F.normalize(raw, dim=-1)).abs().max() <= 1e-6
    assert encoder.name == encoder.full_name == name
    Image.new("RGB", (40, 50), "red").save(tmp_path / "red.png")
    store = embed_images(tmp_path / "red.png", model=name, out=tmp_path / "it", progress=False)
    store.require(model=name, digest=encoder.image_digest, d_embed=24)
    with pytest.raises(ValueError, match="has its weights with it, got pretrained='openai'"):
        load(name, pretrained="openai")


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_a_repository_of_open_clips_in_the_cache(prefix: str, cache_folder: Path) -> None:
    module, name = random_clip(layers=2), "timm/some_clip"
    folder = in_cache(cache_folder, name)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
    config = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": text, "quick_gelu": True}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(module.state_dict(), folder / "open_clip_model.safetensors")
    encoder = load(prefix + name)
    tokens = encoder.tokenize(TEXTS)
    with torch.no_grad():
        assert (encoder(tokens) - module.encode_text(tokens, normalize=True)).abs().max() <= 1e-6
    assert encoder.tower.cfg.act_fn == "quick_gelu"


def test_a_repository_that_is_not_in_the_cache(cache_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a/b is not in Hugging Face's cache \(`hf download a/b` puts it there\)"):
        load("a/b")


def test_a_tokenizer_that_is_missing_is_missed_before_a_tower_is_built(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: Any, **options: Any) -> Any:
        raise AssertionError("a tower was built")

    monkeypatch.setattr(open_clip, "create_model", build)
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", build)
    with pytest.raises(ValueError, match="can't load the tokenizer of ViT-B-16-SigLIP"):
        load("ViT-B-16-SigLIP", pretrained="random")
    saved(in_cache(cache_folder, "a/clip"), clip())
    with pytest.raises(ValueError, match="no tokenizer in"):
        load("a/clip")


@pytest.mark.parametrize(
    ("text", "activation"),
    [({}, "quick_gelu"), ({"hidden_act": "gelu"}, "gelu"), ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh")],
)
def test_the_config_says_what_the_module_is(text: dict[str, Any], activation: str) -> None:
    cfg = load(clip(text | {"layer_norm_eps": 1e-3, "max_position_embeddings": 50})).tower.cfg
    assert (cfg.act_fn, cfg.eps, cfg.n_ctx, cfg.d_mlp, cfg.d_head, cfg.d_vocab_out) == (activation, 1e-3, 50, 48, 8, 24)


def test_padding_and_masks_of_transformers_change_nothing(tmp_path: Path) -> None:
    """The same embeddings from texts padded to the longest of them, and from each alone."""
    model = clip()
    encoder = load(saved(tmp_path, model, clip_tokenizer()), dtype=torch.float64)
    longest = F.normalize(embeddings(model.double(), clip_tokenizer(), TEXTS, padding=True), dim=-1)
    alone = F.normalize(torch.cat([embeddings(model, clip_tokenizer(), [text]) for text in TEXTS]), dim=-1)
    assert (encoder(TEXTS) - longest).abs().max() <= 1e-12
    assert (encoder(TEXTS) - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("eos_id", [2, 49407, 300])
def test_pooling_where_ids_are_higher_than_the_end(eos_id: int) -> None:
    """Ids above the end of text, twice the end, an end of another id: the position that transformers reads."""
    model = clip({"vocab_size": 49500, "eos_token_id": eos_id}).double()
    tokens = torch.randint(3, 200, (3, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, 20], tokens[:, 30], tokens[:, 40], tokens[0, 10] = 49407, 300, 49450, eos_id
    tokens[:, 50] = tokens[:, 60] = eos_id
    encoder = load(model, dtype=torch.float64)
    with torch.no_grad():
        expected = F.normalize(model.get_text_features(tokens).pooler_output, dim=-1)
    assert encoder.pool(tokens).tolist() == {2: [40, 40, 40], 49407: [10, 20, 20], 300: [10, 30, 30]}[eos_id]
    assert (encoder(tokens) - expected).abs().max() <= 1e-12


def test_the_same_weights_in_both_libraries_are_the_same_encoder() -> None:
    """open_clip packs queries, keys and values; spread over transformers' layers by hand, they give one digest."""
    one = random_clip(layers=2, width=32, heads=4, d_embed=24)
    two = clip({"intermediate_size": 128})
    state = {f"text_model.{name}": value for name, value in spread(one).items()}
    state |= {"text_projection.weight": one.text_projection.T, "logit_scale": one.logit_scale + 1}
    assert not two.load_state_dict(state, strict=False).unexpected_keys
    here, there = load(one, tokenizer=open_clip.SimpleTokenizer()), load(two, tokenizer=clip_tokenizer())
    assert here.digest == there.digest
    assert (here(TEXTS) - there(TEXTS)).abs().max() <= 1e-6
    assert there.scale == pytest.approx(here.scale * np.e)


def spread(module: Any) -> dict[str, Tensor]:
    state = {"embeddings.token_embedding.weight": module.token_embedding.weight}
    state["embeddings.position_embedding.weight"] = module.positional_embedding
    for part in ("weight", "bias"):
        state[f"final_layer_norm.{part}"] = getattr(module.ln_final, part)
        for layer, block in enumerate(module.transformer.resblocks):
            packed = getattr(block.attn, f"in_proj_{part}").chunk(3)
            into = dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), packed, strict=True))
            linears = {
                "self_attn.out_proj": block.attn.out_proj,
                "mlp.fc1": block.mlp.c_fc,
                "mlp.fc2": block.mlp.c_proj,
            }
            linears |= {"layer_norm1": block.ln_1, "layer_norm2": block.ln_2}
            into |= {name: getattr(linear, part) for name, linear in linears.items()}
            state |= {f"encoder.layers.{layer}.{name}.{part}": value for name, value in into.items()}
    return state


# --- what it is good for --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, siglip_tokenizer: Any) -> dict[str, Path]:
    """A CLIP and a SigLIP, whole, and a CLIP with other weights."""
    pictures = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    made = {
        "clip": (clip(), clip_tokenizer(), processor()),
        "other": (clip(seed=1), clip_tokenizer(), processor()),
        "siglip": (siglip({"projection_size": 32}), siglip_tokenizer, pictures),
    }
    return {name: saved(tmp_path_factory.mktemp(name), *parts) for name, parts in made.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, mode, shape in (("1.png", "RGB", (40, 50)), ("2.jpg", "RGB", (32, 70)), ("3.png", "L", (64, 48))):
        Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode).save(folder / name)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Any:
    rows = [
        {"key": "a", "caption": "There are no circles.", "foil": "There are some circles.", "image": "1.png"},
        {"key": "b", "caption": "There is a red square.", "foil": "There is no red square.", "image": "3.png"},
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return read_pairs(tmp_path / "pairs.json")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_images_are_embedded_as_transformers_embeds_them(
    name: str, folders: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    store = embed_images(pictures, model=folders[name], out=tmp_path / "images.safetensors", progress=False)
    model = transformers.AutoModel.from_pretrained(folders[name])
    images = [Image.open(pictures / file).convert("RGB") for file in store.ids]
    inputs = transformers.AutoImageProcessor.from_pretrained(folders[name])(images=images, return_tensors="pt")
    with torch.no_grad():
        expected = F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)
    assert store.ids == ("1.png", "2.jpg", "3.png") and not store.failed
    assert (store[store.ids] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert '"transformers"' in store.provenance["versions"] and "open_clip" not in store.provenance["versions"]
    assert str(folders[name].parent) not in store.provenance["preprocessing"]
    again = embed_images(pictures, model=str(folders[name]), out=tmp_path / "images.safetensors", progress=False)
    assert again.digest == store.digest == load(folders[name]).image_digest


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_from_folder_to_effects(
    name: str, folders: dict[str, Path], pictures: Path, pairs: Any, tmp_path: Path
) -> None:
    """Its own texts, its own pictures: logits of transformers' own forward, and patches that give what they must."""
    encoder = load(folders[name], dtype=torch.float64)
    store = embed_images(pictures, model=folders[name], out=tmp_path / "images.safetensors", progress=False)
    batch = align(pairs, store, encoder, run="caption")
    model = transformers.AutoModel.from_pretrained(folders[name])
    tokens = encoder.tokenize([*pairs.caption, *pairs.foil])
    pixels = transformers.AutoImageProcessor.from_pretrained(folders[name])(
        images=[Image.open(pictures / image).convert("RGB") for image in pairs.image], return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(input_ids=tokens, **pixels).logits_per_image
    total = torch.stack([logits[0, 2] - logits[0, 0], logits[1, 3] - logits[1, 1]])
    places = [Site("resid", layer) for layer in range(encoder.n_layers + 1)]
    effects = patch_effects(encoder, batch, places)
    assert torch.allclose(effects.total.float(), total, rtol=0, atol=1e-4 * float(logits.abs().max()))
    assert (effects.values[-1] - effects.total).abs().max() <= 1e-10 * effects.total.abs().max()
    assert effects.total.abs().min() > 0


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_whole_stream_of_another_text_gives_its_embedding(name: str, folders: dict[str, Path]) -> None:
    encoder = load(folders[name], dtype=torch.float64)
    run, other = (encoder.tokenize([text]) for text in ("There are no circles.", "There are red circles."))
    run, other = encoder.cut(run), encoder.cut(other)
    if name == "clip":
        assert run.shape == other.shape
    expected, cache = encoder(other), encoder.cache(other)
    hooks = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(2)), "blocks.0.hook_resid_mid"]
    for hook in [*hooks, "blocks.1.hook_resid_post"]:
        swap = (hook, lambda value, hook: cache[hook.name])
        assert (encoder(run, hooks=[swap]) - expected).abs().max() <= 1e-12
    assert (encoder(run) - expected).abs().max() > 1e-3


def test_every_hook_is_there(folders: dict[str, Path]) -> None:
    ours, tiny = load(folders["clip"]), load()
    names = {name for name in tiny.tower.hook_dict if not any(f"blocks.{layer}." in name for layer in range(2, 6))}
    assert set(ours.tower.hook_dict) == names
    cache = ours.cache(TEXTS)
    assert cache["blocks.1.attn.hook_pattern"].shape[:2] == (4, 4)
    assert ours.tower.to_str_tokens("There are no circles.")[1:6] == ["there", "are", "no", "circles", "."]
    assert ours.tower.to_single_token("circles") == 19411
    assert "circle" in "".join(load(folders["siglip"]).tower.to_str_tokens("There are no circles."))


def test_stores_and_encoders_know_each_other(
    folders: dict[str, Path], pictures: Path, pairs: Any, tmp_path: Path
) -> None:
    store = embed_images(pictures, model=folders["clip"], out=tmp_path / "images.safetensors", progress=False)
    assert len(align(pairs, store, load(folders["clip"]))) == 2
    model = transformers.CLIPModel.from_pretrained(folders["clip"])
    assert len(align(pairs, store, load(model, tokenizer=clip_tokenizer()))) == 2
    with pytest.raises(ValueError, match=r"were made by .*image towers"):
        align(pairs, store, load(folders["other"]))
    with pytest.raises(ValueError, match=r"was made by .*this run is"):
        embed_images(pictures, model=folders["other"], out=tmp_path / "images.safetensors", progress=False)


def test_the_command_line_takes_a_folder(folders: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    run = lambda *words: CliRunner().invoke(app, [str(word) for word in words])
    said = run("info", folders["clip"])
    assert said.exit_code == 0 and load(folders["clip"]).digest in said.output
    out = tmp_path / "images.safetensors"
    said = run("embed", pictures, "--model", folders["clip"], "--out", out, "--quiet")
    assert said.exit_code == 0 and "3 embeddings" in said.output
    assert ImageStore.open(out).digest == load(folders["clip"]).image_digest


# --- modules in memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [clip, siglip])
def test_a_module_in_memory_is_left_as_it_is(make: Any, siglip_tokenizer: Any) -> None:
    module, tokenizer = make(), clip_tokenizer() if make is clip else siglip_tokenizer
    assert_parity(module, module, tokenizer, tokenizer=tokenizer)
    module.train()
    module.vision_model.eval()
    modes = [part.training for part in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    encoder = load(module, tokenizer=tokenizer)
    assert encoder.name == f"{type(module).__name__} in memory"
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not set(module.modules()) & set(encoder.tower.modules())
    plain = encoder(TEXTS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(encoder(TEXTS), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    module = clip().to(dtype)
    folder = saved(tmp_path, module, clip_tokenizer())
    encoder = load(module, tokenizer=clip_tokenizer())
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert load(folder).digest == encoder.digest and load(folder).image_digest == encoder.image_digest
    expected = F.normalize(embeddings(module.float(), clip_tokenizer(), TEXTS, padding=True), dim=-1)
    assert (encoder(TEXTS) - expected).abs().max() <= 1e-6


def test_tokenizers_of_either_library() -> None:
    module = clip()
    theirs, ours = load(module, tokenizer=clip_tokenizer()), load(module, tokenizer=open_clip.SimpleTokenizer())
    assert (theirs(TEXTS) - ours(TEXTS)).abs().max() <= 1e-6
    bare = load(module)
    assert (bare(ours.tokenize(TEXTS)) - ours(TEXTS)).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="without a tokenizer"):
        bare(TEXTS)
    native = random_clip(layers=1)
    with_theirs, with_ours = (load(native, tokenizer=one) for one in (clip_tokenizer(), open_clip.SimpleTokenizer()))
    assert (with_theirs(TEXTS) - with_ours(TEXTS)).abs().max() <= 1e-6


def test_texts_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    encoder = load(folders["clip"])
    assert encoder.fits(["a " * 75, "a " * 76, "a " * 200]) == [True, False, False]
    with pytest.raises(ValueError, match="1 of 2 texts have more than 77 tokens"):
        encoder(["a", "a " * 76])
    encoder = load(folders["siglip"])  # 64 positions, one for the end
    length = lambda text: len(encoder.tower.tokenizer.tokenizer(text)["input_ids"])  # type: ignore[union-attr]
    texts = ["a " * count for count in range(1, 80)]
    lengths = [length(text) for text in texts]
    assert {64, 65} <= set(lengths)
    assert encoder.fits(texts) == [length <= 64 for length in lengths]


# --- nothing is downloaded or said ----------------------------------------------------------------------------------


def test_no_network_and_no_noise(
    folders: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asked the network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("asked the network"))
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for name in ("clip", "siglip"):
        load(folders[name])(TEXTS)
        embed_images(pictures, model=folders[name], out=tmp_path / f"{name}.safetensors", progress=False)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records and not recwarn.list
    assert transformers.utils.logging.is_progress_bar_enabled() == bars


# --- errors ---------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[ValueError]) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_text_tower_alone_has_no_scale(tmp_path: Path) -> None:
    folder = saved(tmp_path, clip_text(), clip_tokenizer())
    with pytest.raises(ValueError, match=r"has no logit scale with it; give scale=.*scale=1 for cosines"):
        load(folder)
    assert load(folder, scale=50).scale == 50.0
    assert load(folder, scale=50).image_digest is None
    with pytest.raises(ValueError, match=r"CLIPModel in memory has its own scale, 20.09, got scale=50; leave it out"):
        load(clip(), scale=50)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="has no image tower"):
        embed_images(tmp_path, model=folder, out=tmp_path / "images.safetensors", progress=False)


@pytest.mark.parametrize("kept", [0.5, 0.0])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_weights_are_named(kept: float, file: str, tmp_path: Path) -> None:
    model = clip()
    folder = saved(tmp_path, model, clip_tokenizer())
    if file.endswith("bin"):
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / file)
        assert_parity(folder, model, clip_tokenizer())
    (folder / file).write_bytes((folder / file).read_bytes()[: int(kept * (folder / file).stat().st_size)])
    with pytest.raises(ValueError, match=rf"can't load .*: .*{file}.*truncated") as caught:
        load(folder)
    assert one_line(caught) and caught.value.__cause__ is not None


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, clip(), clip_tokenizer())
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"no weights in .*none of model.safetensors, "):
        load(folder)
    (folder / "elsewhere").rename(folder / "model.safetensors")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer in .*tokenizer.json.*tokenizer=\.\.\."):
        load(folder)
    assert load(folder, tokenizer=open_clip.SimpleTokenizer())(TEXTS).shape == (4, 24)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no preprocessing for images"):
        embed_images(tmp_path / "a.png", model=folder, out=tmp_path / "images.safetensors", progress=False)


def test_a_missing_part_of_the_weights_is_named(tmp_path: Path) -> None:
    model = clip()
    model.save_pretrained(tmp_path, max_shard_size="3MB")
    saved(tmp_path, clip_tokenizer())
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert_parity(tmp_path, model, clip_tokenizer())
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[:1000])
    with pytest.raises(ValueError, match=f"{parts[1].name} can't be read.*truncated"):
        load(tmp_path)
    parts[1].unlink()
    with pytest.raises(ValueError, match=f"can't load .*{parts[1].name}") as caught:
        load(tmp_path)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, r"don't fit its config.json, 16 are missing: text_model.encoder.layers.2"),
        ({"num_hidden_layers": 1}, r"don't fit its config.json, 16 have no place in the model: text_model.*layers.1"),
        ({"intermediate_size": 64}, r"can't load "),
        ({"eos_token_id": [2, 3]}, r"pooling at eos_token_id=\[2, 3\] is not supported"),
        ({"eos_token_id": 49400}, r"its texts don't have the end, 49400, to pool at"),
    ],
)
def test_a_config_that_does_not_fit(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, clip(), clip_tokenizer())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said) as caught:
        load(folder)
    assert one_line(caught)


def test_models_that_are_not_supported_name_those_that_are(tmp_path: Path) -> None:
    supported = "CLIPModel, CLIPTextModelWithProjection, .*SiglipModel, .*XCLIPModel are"
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=99, **small))
    segmenting = transformers.CLIPSegForImageSegmentation(
        transformers.CLIPSegConfig(text_config=SIZES, vision_config=SEEN, extract_layers=[1])
    )
    seen = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SEEN))
    for model in (bert, segmenting, seen):
        folder = saved(tmp_path / type(model).__name__, model)
        for source in (folder, model):
            with pytest.raises(ValueError, match=f"is a {type(model).__name__}, which is not supported.*{supported}"):
                load(source)


def test_a_tower_without_a_projection_says_what_it_can_do(tmp_path: Path) -> None:
    model = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES)))
    said = "no projection to the joint space: its texts can be compared with texts, not with images"
    for source, tokenizer in ((saved(tmp_path, model, clip_tokenizer()), None), (model, clip_tokenizer())):
        with pytest.warns(UserWarning, match=said):
            encoder = assert_parity(source, model, clip_tokenizer(), scale=1.0, tokenizer=tokenizer)
        assert encoder.d_embed == 32 and any(said in note for note in encoder.notes)


def test_folders_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json of a model that transformers saved$"):
        load(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"give its name as local-dir:PATH"):
        load(tmp_path)
    for content in ("{", "[]", "{}", '"clip"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config.json' can't be read|config.json can't be read"):
            load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a model of the type 'bert', which is not supported"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"has its weights with it, got pretrained='openai'; leave it None"):
        load(tmp_path, pretrained="openai")
    with pytest.raises(ValueError, match=r"no model '.*nowhere': .*a folder that transformers saved goes by its path"):
        load(tmp_path / "nowhere")


def test_a_name_of_open_clips_goes_before_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "ViT-S-32-alt"):
        (tmp_path / name).mkdir()
    assert open_original("tiny").library == "open_clip_torch"
    assert load("ViT-S-32-alt", pretrained="random", tokenizer=open_clip.SimpleTokenizer()).d_embed == 256


class Doubled(nn.Module):
    """An MLP that does something else than its parts say."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp
        for name, part in mlp.named_children():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return 1.2 * self.mlp(x)


@pytest.mark.parametrize("tokenized", [True, False])
def test_a_tower_with_a_part_that_is_not_reproduced_is_refused(tokenized: bool) -> None:
    module = clip()
    module.text_model.encoder.layers[1].mlp = Doubled(module.text_model.encoder.layers[1].mlp)
    with pytest.raises(ValueError, match=r"CLIPModel in memory: .*disagrees .* by 0\.\d+ of the largest"):
        load(module, tokenizer=clip_tokenizer() if tokenized else None)
