"""ImageStore and embed_images: open_clip's own embeddings, whichever way they came about; then every bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from functools import cache

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import clip_lens
from clip_lens.data import embed as embedding
from clip_lens.data import image_file
from clip_lens.data import images as storing
from clip_lens.data.embed import embed_images
from clip_lens.data.images import ImageStore, UnknownImage
from clip_lens.originals.open_clip import digest, open_original

CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}
UNIT = torch.nn.functional.normalize


def saved_model(folder, seed, **preprocess):
    """A small open_clip model on disk, with random weights, and the name that opens it."""
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    weights = open_clip.CLIP(**CONFIG["model_cfg"]).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "open_clip_model.safetensors")
    config = CONFIG | {"preprocess_cfg": CONFIG["preprocess_cfg"] | preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module", autouse=True)
def models_open_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_lens.originals.open_clip.open_original", cache(open_original))
        yield


def picture(path, seed, mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in several modes, formats and depths."""
    root = tmp_path / "pictures"
    modes = {"a.png": "RGB", "b.jpg": "RGB", "c.PNG": "L", "sub/d.png": "RGBA", "sub/deep/e.gif": "P", "f.jpeg": "CMYK"}
    for seed, (name, mode) in enumerate(modes.items()):
        picture(root / name, seed, mode)
    for seed in range(6, 12):
        picture(root / f"sub/{seed:02}.png", seed)
    return root


def embed(paths, out, model, **options):
    return embed_images(paths, out=out, model=model, progress=False, **options)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def same(one, two):
    return one.ids == two.ids and torch.equal(one[one.ids], two[two.ids]) and one.failed == two.failed


@pytest.fixture
def interrupted(monkeypatch):
    """A function that lets `batches` batches pass and then presses Ctrl-C."""
    whole = embedding._ImageTower.__call__

    def interrupt_after(batches):
        left = iter(range(batches))

        def call(tower, images):
            if images and next(left, None) is None:
                raise KeyboardInterrupt
            return whole(tower, images)

        monkeypatch.setattr(embedding._ImageTower, "__call__", call)

    return interrupt_after


def test_embeddings_are_open_clips_own(folder, model, tmp_path):
    store = embed(folder, tmp_path / "s", model, batch_size=5)
    original = open_original(model)
    with torch.inference_mode():
        own = [original.module.encode_image(original.preprocess(Image.open(folder / name))[None]) for name in store.ids]
    expected = UNIT(torch.cat(own), dim=1)
    assert len(store) == 12 and store.d_embed == 16
    assert (store[store.ids] - expected).abs().max() < 1e-5
    assert store[store.ids].norm(dim=1).sub(1).abs().max() < 1e-6


def test_ids_are_paths_below_the_folder(folder, model, tmp_path):
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    picture(folder / ".hidden/a.png", 0)
    (folder / "notes.txt").write_text("no picture")
    assert embed(folder, tmp_path / "s", model).ids == tuple(names)


def test_ways_of_naming_images_mean_the_same(folder, model, tmp_path):
    whole = embed(folder, tmp_path / "whole", model)
    ways = {
        "text": str(folder),
        "folder in a list": [folder],
        "files": [folder / name for name in whole.ids],
        "generator": (folder / name for name in whole.ids),
        "file twice": [folder / name for name in (*whole.ids, whole.ids[0])],
    }
    for name, paths in ways.items():
        assert same(embed(paths, tmp_path / name, model), whole), name


def test_listed_files_are_named_below_their_common_folder(folder, model, tmp_path):
    assert embed(folder / "sub/d.png", tmp_path / "1", model).ids == ("d.png",)
    assert embed([folder / "sub/d.png", folder / "sub/06.png"], tmp_path / "2", model).ids == ("d.png", "06.png")
    assert embed([folder / "sub/d.png", folder / "a.png"], tmp_path / "3", model).ids == ("sub/d.png", "a.png")


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_agree(folder, model, tmp_path, batch_size):
    one = embed(folder, tmp_path / "one", model, batch_size=12)
    other = embed(folder, tmp_path / "other", model, batch_size=batch_size)
    assert one.ids == other.ids and (one[one.ids] - other[other.ids]).abs().max() < 1e-5


def test_provenance_names_model_weights_preprocessing_and_versions(folder, model, tmp_path):
    embed(folder, tmp_path / "s", model)
    store = ImageStore.open(tmp_path / "s")
    assert (store.model, store.pretrained, store.failed) == (model, None, ())
    assert store.digest == digest(open_original(model).module.visual.state_dict())
    assert "Resize(size=32" in store.provenance["preprocessing"] and " at 0x" not in store.provenance["preprocessing"]
    assert set(json.loads(store.provenance["versions"])) == {"clip_lens", "open_clip", "torch", "pillow"}
    with pytest.raises(TypeError):
        store.provenance["model"] = "x"


def test_unreadable_images_are_listed_and_warned_of_once(folder, model, tmp_path):
    truncate(folder / "b.jpg")
    truncate(folder / "sub/07.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    with pytest.warns(
        UserWarning, match=r"4 of 14 images have no embedding, see the store's `failed`: b.jpg"
    ) as caught:
        store = embed(folder, tmp_path / "s", model, batch_size=3)
    assert len(caught) == 1 and len(store) == 10
    reasons = dict(store.failed)
    assert set(reasons) == {"b.jpg", "sub/07.png", "empty.png", "text.jpg"}
    assert "truncated" in reasons["b.jpg"] and "cannot identify" in reasons["text.jpg"]
    assert not any("0x" in reason or str(tmp_path) in reason for reason in reasons.values())
    assert same(ImageStore.open(tmp_path / "s"), store)


def test_a_batch_without_a_readable_image(folder, model, tmp_path):
    truncate(folder / "a.png")
    with pytest.warns(UserWarning, match="1 of 12"):
        assert len(embed(folder, tmp_path / "s", model, batch_size=1)) == 11


def test_no_tokenizer_is_opened(folder, tmp_path, monkeypatch):
    """Some have to be downloaded, and pictures need none."""
    for name in ("_tokenizer", "tiny_tokenizer"):
        monkeypatch.setattr(f"clip_lens.originals.open_clip.{name}", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr("clip_lens.originals.open_clip.open_original", open_original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(embed_images(folder, out=tmp_path / "s", progress=False))


def test_outputs_without_a_direction_are_listed(folder, model, tmp_path, monkeypatch):
    original = open_original(model)
    encode = original.module.encode_image
    spoil = torch.tensor([[float("nan")], [0.0], *[[1.0]] * 10])
    monkeypatch.setattr(original.module, "encode_image", lambda pixels: encode(pixels) * spoil)
    monkeypatch.setattr("clip_lens.originals.open_clip.open_original", lambda *args, **options: original)
    with pytest.warns(UserWarning, match="2 of 12"):
        store = embed(folder, tmp_path / "s", model)
    assert store.failed == tuple((name, "the model's output is not finite or zero") for name in ("a.png", "b.jpg"))


@pytest.mark.parametrize("batches", [0, 1, 2, 4])
def test_an_interrupted_run_resumes_to_the_same_bits(folder, model, tmp_path, interrupted, monkeypatch, batches):
    monkeypatch.setattr(embedding, "BATCHES_PER_CHUNK", 2)
    truncate(folder / "b.jpg")
    with pytest.warns(UserWarning, match="1 of 12"):
        whole = embed(folder, tmp_path / "whole", model, batch_size=2)
    interrupted(batches)
    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        embed(folder, out, model, batch_size=2)
    assert not out.exists() and (tmp_path / "s.partial").exists() == (batches > 0)
    interrupted(7 - batches)  # what is left, and one batch more for the image that is tried again
    with pytest.warns(UserWarning, match="1 of 12"):
        assert same(embed(folder, out, model, batch_size=2), whole)
    assert not (tmp_path / "s.partial").exists()


def test_a_run_resumed_twice(folder, model, tmp_path, interrupted):
    whole = embed(folder, tmp_path / "whole", model, batch_size=3)
    for _ in range(3):
        interrupted(1)
        with pytest.raises(KeyboardInterrupt):
            embed(folder, tmp_path / "s", model, batch_size=3)
    interrupted(1)
    assert same(embed(folder, tmp_path / "s", model, batch_size=3), whole)


def test_a_finished_store_is_not_computed_again(folder, model, tmp_path, interrupted):
    whole = embed(folder, tmp_path / "s", model)
    interrupted(0)
    assert same(embed(folder, tmp_path / "s", model), whole)


def test_a_finished_store_takes_new_images_and_keeps_the_others(folder, model, tmp_path):
    first = embed(folder / "sub", tmp_path / "s", model)
    rows = first[first.ids]
    picture(folder / "sub/new.png", 99)
    picture(folder / "sub/06.png", 98)
    (folder / "sub/07.png").unlink()
    second = embed(folder / "sub", tmp_path / "s", model)
    assert second.ids == (*first.ids, "new.png")
    unchanged = [name != "06.png" for name in first.ids]
    assert torch.equal(second[first.ids][unchanged], rows[unchanged])
    fresh = embed(folder / "sub", tmp_path / "fresh", model)
    assert (second[fresh.ids] - fresh[fresh.ids]).abs().max() < 1e-5


def test_what_failed_is_tried_again(folder, model, tmp_path):
    truncate(folder / "a.png")
    with pytest.warns(UserWarning, match="1 of 12"):
        assert "a.png" not in embed(folder, tmp_path / "s", model)
    picture(folder / "a.png", 0)
    repaired = embed(folder, tmp_path / "s", model)
    assert "a.png" in repaired and repaired.failed == ()


@pytest.fixture
def meanwhile(monkeypatch):
    """A function that has something else done, once, before a batch is computed."""
    whole = embedding._ImageTower.__call__

    def before_batch(number, do):
        left = iter([*[None] * number, do])

        def call(tower, images):
            if other := next(left, None):
                other()
            return whole(tower, images)

        monkeypatch.setattr(embedding._ImageTower, "__call__", call)

    return before_batch


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("part", ["sub/06.png", "all"])
def test_two_runs_into_one_store_end_well_and_lose_nothing(
    folder, model, tmp_path, meanwhile, monkeypatch, batch, part
):
    """While one run is on its way, another begins and finishes."""
    monkeypatch.setattr(embedding, "BATCHES_PER_CHUNK", 1)
    whole = embed(folder, tmp_path / "whole", model, batch_size=3)
    picture(tmp_path / "pictures2/more.png", 50)
    chosen = [folder, tmp_path / "pictures2"] if part == "all" else [folder / part, tmp_path / "pictures2/more.png"]
    meanwhile(batch, lambda: embed(chosen, tmp_path / "s", model, batch_size=3))
    store = embed(folder, tmp_path / "s", model, batch_size=3)
    more = {"more.png"} if part == "all" else {"pictures/sub/06.png", "pictures2/more.png"}
    assert set(store.ids) == {*whole.ids, *more} and len(store) == len(set(store.ids))
    assert (store[whole.ids] - whole[whole.ids]).abs().max() < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "pictures2", "s", "whole"]


def test_a_store_that_another_model_made_meanwhile_is_not_replaced(folder, model, other_model, tmp_path, meanwhile):
    meanwhile(0, lambda: embed(folder / "sub", tmp_path / "s", other_model))
    with pytest.raises(ValueError, match=r"s was made by .*; this run is"):
        embed(folder, tmp_path / "s", model)
    assert ImageStore.open(tmp_path / "s").model == other_model


def test_a_part_that_another_run_removes_is_not_missed(folder, model, tmp_path, interrupted, monkeypatch):
    interrupted(1)
    with pytest.raises(KeyboardInterrupt):
        embed(folder, tmp_path / "s", model, batch_size=3)
    interrupted(9)
    whole, opened = embed(folder, tmp_path / "whole", model, batch_size=3), ImageStore.open

    def open_too_late(path):
        shutil.rmtree(tmp_path / "s.partial", ignore_errors=True)
        return opened(path)

    monkeypatch.setattr(ImageStore, "open", open_too_late)
    assert same(embed(folder, tmp_path / "s", model, batch_size=3), whole)


def test_a_store_of_another_model_is_refused_with_both_names(folder, model, other_model, tmp_path):
    first = embed(folder, tmp_path / "s", model)
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(ValueError, match=r"was made by local-dir:.*; this run is local-dir:.*overwrite=True") as caught:
        embed(folder, tmp_path / "s", other_model)
    assert model in str(caught.value) and other_model in str(caught.value)
    assert (tmp_path / "s").read_bytes() == before
    second = embed(folder, tmp_path / "s", other_model, overwrite=True)
    assert second.model == other_model and not torch.allclose(first[first.ids], second[second.ids])


def test_a_store_of_images_prepared_otherwise_is_not_extended(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("clip_lens.originals.open_clip.open_original", open_original)  # one folder, opened twice
    embed(folder, tmp_path / "s", saved_model(tmp_path / "m", seed=0))
    prepared = (
        r"made by local-dir.* of images prepared with (\{.*\}); this run is of images prepared with (\{.*\}): give"
    )
    with pytest.raises(ValueError, match=prepared) as caught:
        embed(folder, tmp_path / "s", saved_model(tmp_path / "m", seed=0, mean=[0.4] * 3))
    settings = re.search(prepared, str(caught.value)).groups()
    assert settings == ('{"mean": [0.5, 0.5, 0.5]}', '{"mean": [0.4, 0.4, 0.4]}')


def test_an_unfinished_run_of_another_model_is_not_mixed_in(folder, model, other_model, tmp_path, interrupted):
    interrupted(1)
    with pytest.raises(KeyboardInterrupt):
        embed(folder, tmp_path / "s", model, batch_size=4)
    interrupted(9)
    with pytest.raises(ValueError, match=r"s.partial was made by .*; this run is"):
        embed(folder, tmp_path / "s", other_model)
    clean = embed(folder, tmp_path / "clean", other_model)
    assert same(embed(folder, tmp_path / "s", other_model, overwrite=True), clean)


def test_the_same_weights_with_another_preprocessing_are_refused(folder, model, tmp_path):
    stretched = saved_model(tmp_path / "stretched", seed=0, resize_mode="squash")
    embed(folder, tmp_path / "s", model)
    with pytest.raises(ValueError, match="this run is"):
        embed(folder, tmp_path / "s", stretched)


def test_images_that_were_prepared_otherwise_are_refused(folder, model, tmp_path):
    """The weights are the same, and so the digests are: only the settings tell."""
    stretched = saved_model(tmp_path / "stretched", seed=0, resize_mode="squash", mean=[0.4] * 3)
    encoder, other = clip_lens.load(model), clip_lens.load(stretched)
    store = embed(folder, tmp_path / "s", stretched)
    assert encoder.image_digest == store.digest == other.image_digest
    assert json.loads(store.preprocess_cfg) == json.loads(other.image_preprocessing) == {
        "fill_color": 0, "interpolation": "bicubic", "mean": [0.4] * 3, "mode": "RGB", "resize_mode": "squash",
        "size": [32, 32], "std": [0.3] * 3,
    }  # fmt: skip
    store.require_of(other)
    theirs, ours = (
        re.escape(json.dumps({"mean": [mean] * 3, "resize_mode": mode}))
        for mean, mode in ((0.4, "squash"), (0.5, "shortest"))
    )
    told = f"prepared with {theirs}, the encoder's are prepared with {ours}: embed .*--like.*any_store=True"
    pairs = clip_lens.read_pairs().to_frame()[:4].assign(image="a.png")
    pairs = clip_lens.Pairs.from_frame(pairs)
    for use in (
        lambda **options: store.require_of(encoder, **options),
        lambda **options: clip_lens.align(pairs, store, encoder, **options),
        lambda **options: clip_lens.labels(encoder, [clip_lens.Site("neuron", 0, 1)], images=store, **options),
    ):
        with pytest.raises(ValueError, match=told):
            use()
        use(any_store=True)
    batch = clip_lens.align(pairs, store, encoder, any_store=True)
    with pytest.raises(ValueError, match=told):
        clip_lens.study(encoder, batch, tmp_path / "studied", images=store)


def test_what_is_not_known_of_a_preprocessing_is_not_compared(folder, model, tmp_path):
    stretched = saved_model(tmp_path / "stretched", seed=0, resize_mode="squash")
    mine = embed_images(
        folder, model=stretched, preprocess=open_original(model).preprocess.__call__, out=tmp_path / "m", progress=False
    )
    assert mine.preprocess_cfg is None
    mine.require_of(clip_lens.load(stretched))
    ImageStore.open("tiny").require_of(clip_lens.load())
    stored = embed(folder, tmp_path / "s", stretched)
    stored.require(digest=stored.digest, preprocessing=None)


def test_embeddings_from_elsewhere_are_not_extended(folder, model, tmp_path):
    ImageStore.from_tensors(["a.png"], torch.ones(1, 16)).save(tmp_path / "s")
    with pytest.raises(ValueError, match="made by an unknown model, image tower unknown; this run is"):
        embed(folder, tmp_path / "s", model)


def test_the_bar_is_off_where_nobody_watches(folder, model, tmp_path, capfd):
    embed_images(folder, model=model, out=tmp_path / "s")
    assert capfd.readouterr().err == ""


def test_bad_paths_say_what_was_looked_for(folder, model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image below .*empty; looked for files ending in .*\.jpg, \.png"):
        embed(tmp_path / "empty", tmp_path / "s", model)
    with pytest.raises(ValueError, match="no image in an empty list"):
        embed([], tmp_path / "s", model)
    with pytest.raises(FileNotFoundError, match=r"no image or folder .*none.png; check"):
        embed([folder / "a.png", folder / "none.png"], tmp_path / "s", model)
    picture(tmp_path / "two/a.png", 5)
    with pytest.raises(
        ValueError, match=r"pictures/a.png and .*two/a.png would both get the id 'a.png'; give the folder"
    ):
        embed([folder, tmp_path / "two"], tmp_path / "s", model)


def test_when_nothing_can_be_read_it_is_an_error(model, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(
        ValueError, match=r"none of 1 images could be embedded: a.png \(cannot identify.*check the files"
    ):
        embed(tmp_path / "a.png", tmp_path / "s", model)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_bad_options_say_what_fits(folder, model, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        embed(folder, tmp_path / "s", model, batch_size=0)
    with pytest.raises(ValueError, match=r"device='gpu' can't be used here \(.*give 'cpu'"):
        embed(folder, tmp_path / "s", model, device="gpu")
    (tmp_path / "s").write_text("foreign")
    with pytest.raises(ValueError, match="s can't be read: truncated, or not a safetensors file"):
        embed(folder, tmp_path / "s", model)


@pytest.fixture
def rows():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


IDS = ["x/a.png", "x/b.png", "c.jpg", "d.jpg", "Käse.png", "f g.png"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(asked=st.lists(st.sampled_from(IDS), max_size=10))
def test_memory_and_file_give_the_same_rows_in_the_order_asked(tmp_path, rows, asked):
    memory = ImageStore.from_tensors(IDS, rows)
    memory.save(tmp_path / "s.safetensors")
    file = ImageStore.open(tmp_path / "s.safetensors")
    expected = UNIT(rows, dim=1)[[IDS.index(name) for name in asked]]
    assert torch.equal(file[asked], memory[asked]) and file[asked].shape == (len(asked), 4)
    assert torch.allclose(memory[asked], expected, atol=1e-7)


def test_a_saved_store_says_the_same(tmp_path, rows):
    memory = ImageStore.from_tensors(IDS, rows, model="ViT-B-32", pretrained="openai", digest="0f", preprocessing="p")
    memory.save(tmp_path / "new" / "s.safetensors")
    file = ImageStore.open(tmp_path / "new" / "s.safetensors")
    assert same(file, memory) and dict(file.provenance) == dict(memory.provenance)
    assert (file.model, file.pretrained, file.digest, file.d_embed) == ("ViT-B-32", "openai", "0f", 4)
    assert "computed elsewhere" in file.provenance["origin"]
    assert len(file) == 6 and "c.jpg" in file and "C.jpg" not in file and list(file) == IDS


def test_rows_are_copies(rows, tmp_path):
    store = ImageStore.from_tensors(IDS, rows)
    store.save(tmp_path / "s")
    for each in (store, ImageStore.open(tmp_path / "s")):
        each[IDS].zero_()
        assert each[IDS].norm() > 2


def test_precision_is_kept_in_memory_and_float32_on_disk(rows, tmp_path):
    double = ImageStore.from_tensors(IDS, rows.double())
    assert double[IDS].dtype == torch.float64 and double[IDS].norm(dim=1).sub(1).abs().max() < 1e-15
    double.save(tmp_path / "s")
    assert torch.equal(ImageStore.open(tmp_path / "s")[IDS], double[IDS].float())
    half = ImageStore.from_tensors(IDS, rows.half())
    assert half[IDS].dtype == torch.float32 and half[IDS].norm(dim=1).sub(1).abs().max() < 1e-6
    assert torch.equal(ImageStore.from_tensors(IDS, UNIT(rows, dim=1), normalize=False)[IDS], UNIT(rows, dim=1))


def test_saving_is_whole_or_not_at_all(rows, tmp_path, monkeypatch):
    file = tmp_path / "s"
    ImageStore.from_tensors(IDS, rows).save(file)
    before = file.read_bytes()

    def half_a_file(tensors, path, metadata):
        path.write_bytes(before[:50])
        raise OSError("disk full")

    monkeypatch.setattr(image_file, "save_file", half_a_file)
    with pytest.raises(OSError, match="disk full"):
        ImageStore.from_tensors(IDS, -rows).save(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_store_may_be_read_by_whom_the_umask_says(rows, tmp_path):
    before = os.umask(0o022)
    try:
        ImageStore.from_tensors(IDS, rows).save(tmp_path / "s")
    finally:
        os.umask(before)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o644


def test_a_store_can_be_saved_over_itself(rows, tmp_path):
    ImageStore.from_tensors(IDS, rows).save(tmp_path / "s")
    store = ImageStore.open(tmp_path / "s")
    store.save(tmp_path / "s")
    assert same(ImageStore.open(tmp_path / "s"), store)


# Damage: nothing that a file holds changes unseen


def old_file(path, rows, **metadata):
    """A file of the first format, as it was written."""
    texts = {"format": "clip_lens.images/1", "ids": json.dumps(IDS), "failed": "[]", "contents": "[]"}
    save_file({"embeddings": rows}, path, metadata=texts | metadata)


def place_of(tensor, path):
    """Where a tensor's bytes begin in a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length + json.loads(content[8 : 8 + length])[tensor]["data_offsets"][0]


def flip(path, at, bit):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_the_first_format_is_still_read(rows, tmp_path):
    unit = UNIT(rows, dim=1)
    contents = [f"{number:016x}" for number in range(6)]
    failed = [["broken.png", "truncated"]]
    old_file(
        tmp_path / "s", unit, model="A", digest="0f", failed=json.dumps(failed), contents=json.dumps(contents), x="y"
    )
    store = ImageStore.open(tmp_path / "s")
    store.verify()
    assert store.ids == tuple(IDS) and torch.equal(store[IDS], unit) and store.failed == (("broken.png", "truncated"),)
    assert dict(store.provenance) == {"model": "A", "digest": "0f"} and list(store.contents.values()) == contents
    store.save(tmp_path / "new")
    again = ImageStore.open(tmp_path / "new")
    assert same(again, store) and again.contents == store.contents and again.provenance == store.provenance


@pytest.mark.parametrize("format", [1, 2])
def test_a_file_in_which_ids_repeat_is_not_opened(rows, tmp_path, format):
    ids = [*IDS[:5], IDS[0]]
    if format == 1:
        old_file(tmp_path / "s", UNIT(rows, dim=1), ids=json.dumps(ids))
    else:
        image_file.write(tmp_path / "s", image_file.Stored(ids, UNIT(rows, dim=1), {}, (), (), None))
    with pytest.raises(ValueError, match=r"s is damaged: 1 ids repeat: x/a.png; .*; embed the images again"):
        ImageStore.open(tmp_path / "s")


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0])
def test_rows_that_are_no_unit_vectors_are_refused_when_they_are_read(rows, tmp_path, format, value):
    unit = UNIT(rows, dim=1)
    unit[2, 1] = value
    if format == 1:
        old_file(tmp_path / "s", unit)
    else:
        image_file.write(tmp_path / "s", image_file.Stored(IDS, unit, {}, (), (), None))
    store = ImageStore.open(tmp_path / "s")
    sound = [*IDS[:2], *IDS[3:]]
    assert torch.equal(store[sound], unit[[0, 1, 3, 4, 5]])
    message = r"1 of \d embeddings have other values in .*s than were written: c.jpg; embed these images again"
    for read in (lambda: store[["c.jpg"]], lambda: store[IDS], store.verify, lambda: store.save(tmp_path / "t")):
        with pytest.raises(ValueError, match=message):
            read()
    assert not (tmp_path / "t").exists()


def test_a_changed_bit_of_an_embedding_is_found_in_that_image_only(rows, tmp_path):
    ImageStore.from_tensors(IDS, rows).save(tmp_path / "s")
    start = place_of("embeddings", tmp_path / "s")
    for bit in range(32):  # of the second number of the third row
        flip(tmp_path / "s", start + 4 * (2 * 4 + 1) + bit // 8, bit % 8)
        store = ImageStore.open(tmp_path / "s")
        assert store[[IDS[5], IDS[1], IDS[0], IDS[5]]].shape == (4, 4)
        with pytest.raises(ValueError, match=r"1 of 1 embeddings have other values .*: c.jpg"):
            store[["c.jpg"]]
        flip(tmp_path / "s", start + 4 * (2 * 4 + 1) + bit // 8, bit % 8)
    ImageStore.open(tmp_path / "s").verify()


def test_embeddings_that_change_their_places_are_found(rows, tmp_path):
    ImageStore.from_tensors(IDS, rows).save(tmp_path / "s")
    start, content = place_of("embeddings", tmp_path / "s"), bytearray((tmp_path / "s").read_bytes())
    one, two = content[start : start + 16], content[start + 16 : start + 32]
    content[start : start + 32] = two + one
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(ValueError, match=r"2 of 6 embeddings have other values .*: x/a.png, x/b.png"):
        ImageStore.open(tmp_path / "s").verify()


def test_no_changed_bit_of_a_file_goes_unseen(folder, model, tmp_path):
    """Whatever bit changes, the file is refused, or what is read from it is the same to the last bit."""
    truncate(folder / "b.jpg")
    with pytest.warns(UserWarning, match="1 of 12"):
        whole = embed(folder, tmp_path / "s", model)
    content = (tmp_path / "s").read_bytes()
    places = np.random.default_rng(0).integers(0, 8 * len(content), 300).tolist()
    refused = 0
    for place in places:
        flip(tmp_path / "s", place // 8, place % 8)
        try:
            store = ImageStore.open(tmp_path / "s")
            rows = store[store.ids]
        except ValueError as error:
            refused += 1
            assert str(tmp_path / "s") in str(error)
        else:
            assert same(store, whole) and torch.equal(rows, whole[whole.ids])
            assert store.provenance == whole.provenance and store.contents == whole.contents
        (tmp_path / "s").write_bytes(content)
    assert refused >= 295


@pytest.mark.parametrize("name", ["checks", "ids", "contents", "failed"])
def test_a_changed_bit_of_what_lies_beside_the_embeddings_is_found_at_opening(folder, model, tmp_path, name):
    truncate(folder / "b.jpg")
    with pytest.warns(UserWarning, match="1 of 12"):
        embed(folder, tmp_path / "s", model)
    flip(tmp_path / "s", place_of(name, tmp_path / "s") + 3, 0)
    with pytest.raises(ValueError, match="s is damaged: its ids or its provenance are not what was written"):
        ImageStore.open(tmp_path / "s")


ODD = ["", " ", "\n", "a\nb", "\U0001f40d.png", "\udcff.png", "Ka\u0308se.png", "'\"\\", "a" * 3000]


def test_any_text_may_be_an_id(tmp_path):
    rows = torch.randn(len(ODD), 4)
    ImageStore.from_tensors(ODD, rows).save(tmp_path / "s")
    store = ImageStore.open(tmp_path / "s")
    assert store.ids == tuple(ODD) and torch.allclose(store[ODD[::-1]], UNIT(rows, dim=1).flip(0), atol=1e-6)
    with pytest.raises(ValueError, match="ids can't contain the character NUL"):
        ImageStore.from_tensors(["a\0b"], rows[:1])


@pytest.mark.parametrize("ids", [[], [""], ["a"]])
def test_a_store_of_none_or_one(tmp_path, ids):
    ImageStore.from_tensors(ids, torch.ones(len(ids), 4)).save(tmp_path / "s")
    store = ImageStore.open(tmp_path / "s")
    store.verify()
    assert store.ids == tuple(ids) and store[ids].shape == (len(ids), 4) and store.d_embed == 4


# Large stores, on a small scale: what a million rows do in parts of 1,024, a few do in parts of three


@pytest.fixture
def parts_of_three(monkeypatch):
    for module in (storing, image_file):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)


@pytest.mark.parametrize("n", [0, 1, 3, 7, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_in_parts_or_at_once_gives_the_same_bits(parts_of_three, tmp_path, n, dtype):
    rows = torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(dtype)
    ids = [f"{number}.png" for number in range(n)]
    exact = rows.double() / rows.double().norm(dim=1, keepdim=True)
    store = ImageStore.from_tensors(ids, rows)
    assert torch.equal(store[ids], exact if dtype == torch.float64 else exact.float())
    store.save(tmp_path / "s")
    ImageStore.open(tmp_path / "s").verify()
    assert torch.equal(ImageStore.open(tmp_path / "s")[ids], exact.float())


def test_bad_rows_of_every_part_are_named(parts_of_three):
    rows, ids = torch.ones(9, 4), [f"{number}.png" for number in range(9)]
    rows[[0, 5, 8]] = float("nan")
    with pytest.raises(ValueError, match=r"3 of 9 embeddings have NaN or infinite values: 0.png, 5.png, 8.png"):
        ImageStore.from_tensors(ids, rows)
    rows = torch.eye(9)
    rows[7] *= 2
    with pytest.raises(ValueError, match=r"1 of 9 embeddings have a norm other than 1: 7.png"):
        ImageStore.from_tensors(ids, rows, normalize=False)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_store_is_not_changed_with_the_tensor_that_it_was_made_of(rows, normalize, dtype):
    given = UNIT(rows, dim=1).to(dtype)
    store = ImageStore.from_tensors(IDS, given, normalize=normalize)
    before = store[IDS]
    given.zero_()
    assert torch.equal(store[IDS], before) and before.norm() > 2


def test_rows_of_any_length_get_the_length_one():
    rows = torch.tensor([[3e-30, 4e-30], [3e30, 4e30], [3.0, 4.0]])
    found = ImageStore.from_tensors(["a", "b", "c"], rows)[["a", "b", "c"]]
    assert torch.allclose(found, torch.tensor([0.6, 0.8]), atol=1e-7, rtol=0)


MILLION = """
import resource, sys, time, torch
from clip_lens.data.images import ImageStore, UnknownImage

def peak(what):
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before
    print(what, f"{time.perf_counter() - start:.2f} s, {grown:.2f} GiB at most", file=sys.stderr)
    return grown

ids = [f"{number % 997:03}/{number:083}.png" for number in range(1_000_000)]
assert {len(name) for name in ids} == {91}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
start = time.perf_counter()
if sys.argv[2] == "make":
    rows = torch.empty(1_000_000, 512, dtype=torch.float16)
    for part in rows.split(10_000):
        part.normal_()
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    store = ImageStore.from_tensors(ids, rows)
    assert peak("from_tensors") < 3  # the rows in float32 are 1.9 GiB
    start = time.perf_counter()
    store.save(sys.argv[1])
    assert peak("save") < 4
else:
    store = ImageStore.open(sys.argv[1])
    assert peak("open") < 1.5
    start = time.perf_counter()
    assert store.ids == tuple(ids) and store[ids[::-1000]].shape == (1000, 512)
    peak("a thousand rows")
    start = time.perf_counter()
    try:
        store[["000999999.png", "nothing.png"]]
    except UnknownImage as error:
        assert "nothing.png" in str(error)
    peak("missing")
    start = time.perf_counter()
    store.verify()
    peak("verify")
"""


@pytest.mark.slow
def test_a_million_embeddings(tmp_path):
    """What they cost is printed; the limits are on the memory, above what the process held before."""
    for what in ("make", "open"):
        subprocess.run([sys.executable, "-c", MILLION, str(tmp_path / "s"), what], check=True)


def test_a_missing_id_is_found_among_many_in_any_folder_and_spelling():
    ids = [f"some/folder/{number:06}.jpg" for number in range(5000)] + ["x/Cat.PNG"]
    store = ImageStore.from_tensors(ids, torch.ones(5001, 2))
    with pytest.raises(UnknownImage, match=r"'004999.png' may be some/folder/004999.jpg"):
        store[["004999.png"]]
    with pytest.raises(UnknownImage, match=r"'Cat.png' may be x/Cat.PNG"):
        store[["Cat.png"]]
    with pytest.raises(UnknownImage, match=r"'SOME/FOLDER/000001.JPG' may be some/folder/000001.jpg"):
        store[["SOME/FOLDER/000001.JPG"]]


def bad_tensors(rows):
    broken = rows.clone()
    broken[1, 2], broken[3, 0] = float("nan"), float("inf")
    zero = rows.clone()
    zero[2] = 0
    return [
        (IDS[:5], rows, {}, r"shape \[image, d_embed\] with a row per id, got \(6, 4\) and 5 ids"),
        (IDS, rows[0], {}, r"got \(4,\) and 6 ids"),
        ([*IDS[:5], IDS[0]], rows, {}, "1 ids repeat: x/a.png; every image needs an id of its own"),
        ([*IDS[:5], 7], rows, {}, r"ids must be texts, got 7; use str\(id\)"),
        ("abcdef", rows, {}, r"must be a sequence of texts, got the text 'abcdef'; write \['abcdef'\]"),
        (IDS, broken, {}, "2 of 6 embeddings have NaN or infinite values: x/b.png, d.jpg; leave"),
        (IDS, zero, {}, "1 of 6 embeddings have only zeros: c.jpg; .* leave"),
        (
            IDS,
            rows * 9,
            {"normalize": False},
            "6 of 6 embeddings have a norm other than 1: .*and 1 more; give unit rows",
        ),
    ]


@pytest.mark.parametrize("case", range(8))
def test_bad_tensors_are_refused_by_name(rows, case):
    ids, embeddings, options, message = bad_tensors(rows)[case]
    with pytest.raises(ValueError, match=message):
        ImageStore.from_tensors(ids, embeddings, **options)


def test_missing_ids_are_named_with_what_was_meant(rows):
    store = ImageStore.from_tensors(IDS, rows)
    with pytest.raises(KeyError) as caught:
        store[["a.png", "c.jpg", "dd.jpg", *"12345"]]
    assert isinstance(caught.value, UnknownImage)
    message = str(caught.value)
    assert message.startswith(
        "7 image ids are not in ImageStore(6 images, d_embed 4, an unknown model): a.png, dd.jpg, 1"
    )
    assert "and 2 more; its ids look like x/a.png, x/b.png, c.jpg and 3 more" in message
    assert "'a.png' may be x/a.png" in message and "'dd.jpg' may be d.jpg" in message
    with pytest.raises(TypeError, match=r"write store\[\['c.jpg'\]\]"):
        store["c.jpg"]


def test_an_id_that_failed_is_said_to_have_failed(folder, model, tmp_path):
    truncate(folder / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = embed(folder, tmp_path / "s", model)
    with pytest.raises(UnknownImage, match="some of them failed when they were embedded"):
        store[["a.png"]]


ACCEPTED = [
    ({"model": "A", "pretrained": "x", "digest": "1"}, {"model": "A", "pretrained": "x", "digest": "1", "d_embed": 4}),
    ({"model": "A", "pretrained": "x", "digest": "1"}, {"model": "B", "pretrained": "/a/file", "digest": "1"}),
    ({"model": "A", "pretrained": "x"}, {"model": "A", "pretrained": "x", "digest": "1"}),
    ({"model": "A"}, {"model": "A", "pretrained": "x"}),
    ({}, {"model": "A", "pretrained": "x", "digest": "1", "d_embed": 4}),
    ({"model": "A", "pretrained": "x"}, {"d_embed": 4}),
]
REFUSED = [
    ({"model": "A", "pretrained": "x"}, {"model": "B", "pretrained": "x"}, r"made by A \(x\), the encoder is B \(x\):"),
    ({"model": "A", "pretrained": "x"}, {"model": "A", "pretrained": "y"}, r"made by A \(x\), the encoder is A \(y\):"),
    (
        {"model": "A", "pretrained": "x", "digest": "1"},
        {"model": "A", "pretrained": "x", "digest": "2"},
        r"made by A \(x\), the encoder is A \(x\) \(image towers 1 and 2\):",
    ),
    (
        {"model": "A"},
        {"model": "B", "d_embed": 8},
        "embeddings of A have 4 dimensions, the encoder B has 8: they don't",
    ),
    ({}, {"model": "B", "d_embed": 8}, "an unknown model have 4 dimensions, the encoder B has 8"),
]


@pytest.mark.parametrize(("made", "needed"), ACCEPTED)
def test_a_store_that_fits_is_accepted(rows, made, needed):
    """And refused for one thing more, its width."""
    store = ImageStore.from_tensors(IDS, rows, **made)
    store.require(**needed)
    with pytest.raises(ValueError, match="have 4 dimensions"):
        store.require(**needed | {"d_embed": 5})


@pytest.mark.parametrize(("made", "needed", "message"), REFUSED)
def test_a_store_of_another_space_is_refused_with_both_names(rows, made, needed, message):
    with pytest.raises(ValueError, match=message) as caught:
        ImageStore.from_tensors(IDS, rows, **made).require(**needed)
    assert f"clip-lens embed IMAGES --model {needed['model']}" in str(caught.value)
    assert ("any_store=True" in str(caught.value)) == ("d_embed" not in needed)


def test_files_that_are_no_stores(rows, tmp_path):
    with pytest.raises(FileNotFoundError, match="s does not exist; make a store with embed_images"):
        ImageStore.open(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        ImageStore.open(tmp_path)
    file = tmp_path / "s"
    ImageStore.from_tensors(IDS, rows).save(file)
    whole = file.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"a foreign file of some length"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"s can't be read: truncated, or not a safetensors file .*; embed the"):
            ImageStore.open(file)


GOOD = {"format": "clip_lens.images/1", "ids": json.dumps(IDS)}
FOREIGN = [
    (None, "no store of images .format 'not given'.* use ImageStore.from_tensors"),
    (GOOD | {"format": "clip_lens.images/3"}, "has the format clip_lens.images/3, this version reads .*upgrade"),
    (GOOD | {"format": "clip_lens.images/2"}, "is damaged: .*checks"),
    (GOOD | {"contents": '["1"]'}, "is damaged: 6 ids and 1 contents"),
    (GOOD | {"ids": "[1, 2, 3, 4, 5, 6]"}, "is damaged: ids must be texts, got 1, 2"),
    (GOOD | {"failed": "[1]"}, "is damaged: "),
    (
        GOOD | {"ids": "[]"},
        r"is damaged: 0 ids and embeddings of shape \(6, 4\), torch.float32; embed the images again",
    ),
    (GOOD | {"ids": "["}, "is damaged: .*; embed the images again"),
]


@pytest.mark.parametrize(("metadata", "message"), FOREIGN)
def test_safetensors_files_that_are_no_stores(rows, tmp_path, metadata, message):
    save_file({"embeddings": rows}, tmp_path / "s", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        ImageStore.open(tmp_path / "s")


def test_a_store_without_embeddings_is_damaged(rows, tmp_path):
    save_file({"weights": rows}, tmp_path / "s", metadata=GOOD)
    with pytest.raises(ValueError, match="s is damaged"):
        ImageStore.open(tmp_path / "s")


def test_it_shows_itself(rows):
    store = ImageStore.from_tensors(["<i>.png", *IDS[1:]], rows, model="A", pretrained="x")
    assert repr(store) == "ImageStore(6 images, d_embed 4, A (x))"
    assert "&lt;i&gt;.png" in store._repr_html_() and "<i>" not in store._repr_html_()


def test_parts_of_images_are_embedded_as_pictures_of_their_own(tmp_path):
    """The box is cut out before the preprocessing; one outside of the picture fails, and says so."""
    rng = np.random.default_rng(3)
    whole = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    (tmp_path / "in" / "sub").mkdir(parents=True)
    whole.save(tmp_path / "in" / "sub" / "a.png")
    whole.crop((10, 5, 40, 35)).save(tmp_path / "in" / "part.png")
    asked = ["sub/a.png#xywh=10,5,30,30", "part.png", "sub/a.png#xywh=60,0,5,5", "sub/a.png#xywh=10,5,30,30"]
    with pytest.warns(UserWarning, match="60,0,5,5 is outside of 60 x 40 pixels"):
        store = embed_images(tmp_path / "in", ids=asked, out=tmp_path / "s.safetensors", progress=False)
    assert store.ids == ("sub/a.png#xywh=10,5,30,30", "part.png")
    part, own = store[store.ids]
    assert torch.equal(part, own)
    again = embed_images(tmp_path / "in", ids=asked[:1], out=tmp_path / "s.safetensors", progress=False)
    assert torch.equal(again[store.ids], store[store.ids])  # nothing is computed anew
    whole.rotate(180).save(tmp_path / "in" / "sub" / "a.png")
    turned = embed_images(tmp_path / "in", ids=asked[:1], out=tmp_path / "s.safetensors", progress=False)
    assert not torch.equal(turned[asked[:1]], store[asked[:1]])  # the part goes with the file


def test_ids_without_an_image_are_named_with_what_they_may_mean(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    message = r"2 of 3 ids have no image: 'A.jpg', 'b.png'; .*'A.jpg' may be 'a.png'"
    with pytest.raises(ValueError, match=message):
        embed_images(tmp_path, ids=["a.png", "A.jpg", "b.png"], out=tmp_path / "s.safetensors", progress=False)
