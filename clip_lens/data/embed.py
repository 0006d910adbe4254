"""embed_images: pictures -> an ImageStore, by the image tower of any model that loads; interrupted, it goes on."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from clip_lens.data.crops import cropped, cut_out
from clip_lens.data.images import Failures, ImageStore, PathLike, differing, label, unit, versions, where
from clip_lens.data.repairs import offered
from clip_lens.files import in_folder
from clip_lens.originals.original import Original, Preparation, digest
from clip_lens.progress import progress_bar
from clip_lens.words import some

EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
BATCHES_PER_CHUNK = 8


def embed_images(
    paths: PathLike | Iterable[PathLike],
    *,
    model: PathLike | nn.Module = "tiny",
    pretrained: str | None = None,
    like: str | None = None,
    quick_gelu: bool | None = None,
    preprocess: Callable[[Any], Tensor] | None = None,
    ids: Iterable[str] | None = None,
    out: PathLike,
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = True,
    overwrite: bool = False,
) -> ImageStore:
    """The store `out` with the embeddings of a folder of images and its subfolders, of one image, or of a list of them.

    `model` and `pretrained` are open_clip's, or "tiny", or `model` is a folder that transformers saved, or a module in
    memory, which is copied. `like` and `quick_gelu` say how a checkpoint's file was trained, as in `load`; a guess is
    warned of. Pictures go through the model's own preprocessing, or through `preprocess`, which a module in memory may
    need, as `preprocess(PIL.Image.open(file))` does it: to RGB, EXIF orientation not applied. An id is the path below
    the folder; for listed files, below the folder that they have in common. `ids` takes some of them alone, such as
    `pairs.image`, and parts of images: of "2317.jpg#xywh=10,20,100,80" the box is cut out before the preprocessing
    (left, upper, width, height, in pixels). Images that can't be read are listed in `failed` and in one warning.

    A run that is interrupted resumes: what is done lies in `<out>.partial` until all is. A finished `out` of the same
    model is extended, also one that another run finishes meanwhile; its images are not computed again unless their
    files changed. An `out` of another model is refused; `overwrite=True` replaces it.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no image is found, two images get the same id, none can be read, `out` or what lies in
            `<out>.partial` was made by another model or is no store, the model can't be loaded, `device` can't be
            used, or there is no image for one of the `ids`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (48, 48), "red").save(folder + "/red.png")
        ...     embed_images(folder, out=folder + "/images.safetensors", progress=False)
        ImageStore(1 image, d_embed 128, tiny)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    images, out = _chosen(_find(paths), ids), Path(out)
    finished = _finished(out, overwrite)
    _refuse_device(device)
    original = _opened(model, preprocess, pretrained=pretrained, like=like, quick_gelu=quick_gelu)
    for doubt in (*original.doubts, *original.image_doubts):
        warnings.warn(doubt, stacklevel=2)
    tower = _image_tower(original, device)
    if finished:
        _same_maker(finished, tower, out)
    partial = _Partial(out.with_name(f"{out.name}.partial"))
    chunks = partial.resume(tower, overwrite)
    kept = _unchanged(finished, images, others=True) if finished else {}
    todo = [name for name in images if name not in kept]
    if finished and not todo:
        return finished
    chunked = {name: chunk for chunk in chunks for name in _unchanged(chunk, images)}
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    failed = _compute(batches, chunked, images, tower, partial, progress)
    if latest := _finished(out, overwrite):  # another run may have been done meanwhile
        _same_maker(latest, tower, out)
        kept = {name: latest for name in latest.ids if name not in images} | kept
    store = _merged(latest, kept, chunked, images, failed, tower)
    del kept, chunked, chunks, finished, latest  # an open file can't be replaced everywhere
    store.save(out)
    partial.remove()
    _warn(failed, len(images))
    return ImageStore.open(out)


def _finished(out: Path, overwrite: bool) -> ImageStore | None:
    return None if overwrite or not out.exists() else ImageStore.open(out)


@dataclass(frozen=True)
class _ImageTower:
    """What turns image files into unit embeddings, and what is said about it in a store."""

    encode: Callable[[Tensor], Tensor]
    preprocess: Callable[[Any], Tensor]
    device: str
    provenance: Mapping[str, str]

    def __call__(self, images: Mapping[str, Path]) -> ImageStore:
        """A store of one batch; its `failed` has what can't be read or comes out without a direction."""
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            loaded = dict(zip(images, pool.map(self._load, images, images.values()), strict=True))
        failed = [(name, result) for name, (_, result) in loaded.items() if isinstance(result, str)]
        pixels = {name: result for name, (_, result) in loaded.items() if isinstance(result, Tensor)}
        if not pixels:
            return ImageStore([], torch.empty(0, 0), self.provenance, failed)
        with torch.inference_mode():
            rows = self.encode(torch.stack(list(pixels.values())).to(self.device)).float().cpu()
        sound = rows.isfinite().all(1) & (rows != 0).any(1)
        failed += [(name, "the model's output is not finite or zero") for name in where(~sound, list(pixels))]
        ids = where(sound, list(pixels))
        return ImageStore(ids, unit(rows[sound]), self.provenance, failed, [loaded[name][0] for name in ids])

    def _load(self, name: str, path: Path) -> tuple[str, Tensor | str]:
        """The digest of the file's bytes, and pixels of what the id names or the reason why there are none."""
        from PIL import Image

        try:
            content = path.read_bytes()
            with Image.open(BytesIO(content)) as image:
                return _fingerprint(content), self.preprocess(cut_out(image, cropped(name)[1]))
        except Exception as error:  # a decoder meets any kind of broken file, and none of them ends the run
            return "", _why(error)


def _opened(model: PathLike | nn.Module, preprocess: Callable[[Any], Tensor] | None, **of_name: Any) -> Original:
    from clip_lens.originals.open_clip import open_module, open_original

    if isinstance(model, nn.Module):
        if any(value is not None for value in of_name.values()):
            raise ValueError(f"a module in memory has its weights with it; {', '.join(of_name)} go with a model's name")
        original = open_module(model, preprocess=preprocess)
        half = any(part.dtype in (torch.float16, torch.bfloat16) for part in model.parameters())
        copied = copy.deepcopy(original.module)
        return replace(original, module=copied.float() if half else copied)
    original = open_original(os.fspath(model), with_tokenizer=False, **of_name)
    return original if preprocess is None else replace(original, preprocess=preprocess)


def _refuse_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device={device!r} can't be used here ({reason}); give 'cpu', or 'cuda' on a GPU") from error


def _image_tower(original: Original, device: str) -> _ImageTower:
    name, module = original.name, cast(Any, original.module.eval())
    if getattr(module, "visual", None) is None:
        raise ValueError(
            f"{name} has no image tower that takes single pictures of one size; give a model that has, by open_clip's "
            "name or as a folder"
        )
    if original.preprocess is None:
        raise ValueError(f"{name} has no preprocessing for images; give preprocess=, a function of a picture")
    module.to(device)
    dtype = next(module.visual.parameters()).dtype
    provenance = {
        "model": name,
        "digest": digest(module.visual.state_dict()),
        # The address of a function in a repr would differ from run to run.
        "preprocessing": re.sub(r" at 0x[0-9a-f]+", "", str(original.preprocess)),
        "versions": versions("clip_lens", original.library, "torch", "pillow"),
        "origin": "computed by clip_lens.embed_images",
    }
    if isinstance(original.preprocess, Preparation):
        provenance["preprocess_cfg"] = original.preprocess.settings
    if original.pretrained is not None:
        provenance["pretrained"] = str(original.pretrained)
    return _ImageTower(lambda pixels: module.encode_image(pixels.to(dtype)), original.preprocess, device, provenance)


@dataclass(frozen=True)
class _Partial:
    """The folder of an unfinished run: stores of some batches each, every one with its provenance."""

    folder: Path

    def resume(self, tower: _ImageTower, overwrite: bool) -> list[ImageStore]:
        """What earlier runs of the same model left here; another model's is refused, or removed by `overwrite`."""
        chunks = []
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                chunk = ImageStore.open(file)
            except FileNotFoundError:  # another run is done with it
                continue
            if overwrite and not _made_by(chunk, tower):
                file.unlink(missing_ok=True)
                continue
            _same_maker(chunk, tower, self.folder)
            chunks.append(chunk)
        return chunks

    def save(self, stores: Sequence[ImageStore]) -> ImageStore | None:
        """One store of several, written, or None if none of them has an embedding."""
        filled = [store for store in stores if len(store)]
        if not filled:
            return None
        chunk = _joined({name: store for store in filled for name in store.ids}, filled[0].provenance)
        file = self.folder / f"{_fingerprint(json.dumps(chunk.ids).encode())}.safetensors"
        in_folder(self.folder, lambda: chunk.save(file))
        return chunk

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _compute(
    batches: Sequence[Sequence[str]],
    done: dict[str, ImageStore],
    images: Mapping[str, Path],
    tower: _ImageTower,
    partial: _Partial,
    progress: bool,
) -> list[tuple[str, str]]:
    """Embeds what isn't done, adds it to `done`, and returns what failed; what is computed is saved on any way out.

    Batches are the same whether a run was interrupted or not, so that both give the same bits.
    """

    failed: list[tuple[str, str]] = []
    unsaved: list[ImageStore] = []
    bar = progress_bar(sum(map(len, batches)), "image", "embedding", show=progress)

    def save() -> None:
        chunk = partial.save(unsaved)
        unsaved.clear()
        done.update(dict.fromkeys(chunk.ids, chunk) if chunk else {})

    try:
        for batch in batches:
            computed = tower({name: images[name] for name in batch if name not in done})
            unsaved.append(computed)
            failed += computed.failed
            bar.update(len(batch))
            if len(unsaved) >= BATCHES_PER_CHUNK:
                save()
    finally:
        bar.close()
        save()
    return failed


def _merged(
    finished: ImageStore | None,
    kept: Mapping[str, ImageStore],
    chunked: Mapping[str, ImageStore],
    images: Mapping[str, Path],
    failed: Failures,
    tower: _ImageTower,
) -> ImageStore:
    """The finished store's images first, in its order, then the new ones as they were asked for."""
    have = {**kept, **chunked}
    if not have:
        raise ValueError(f"none of {len(images)} images could be embedded: {_reasons(failed)}; check the files")
    order = dict.fromkeys([*(finished.ids if finished else ()), *images])
    earlier = [entry for entry in (finished.failed if finished else ()) if entry[0] not in images]
    return _joined({name: have[name] for name in order if name in have}, tower.provenance, [*earlier, *failed])


def _joined(have: Mapping[str, ImageStore], provenance: Mapping[str, str], failed: Failures = ()) -> ImageStore:
    """One store in memory of images in several, in the order of `have`."""
    position = {name: row for row, name in enumerate(have)}
    stores = list({id(store): store for store in have.values()}.values())
    rows = torch.empty(len(have), stores[0].d_embed)
    for store in stores:
        own = [name for name in store.ids if have.get(name) is store]
        rows[[position[name] for name in own]] = store[own].float()
    return ImageStore(list(have), rows, provenance, failed, [have[name].contents.get(name, "") for name in have])


def _unchanged(store: ImageStore, images: Mapping[str, Path], others: bool = False) -> dict[str, ImageStore]:
    """The ids of a store whose files still have the bytes they had; `others`: also ids that aren't asked for."""
    return {
        name: store
        for name in store.ids
        if (name in images and _file_fingerprint(images[name]) == store.contents.get(name))
        or (others and name not in images)
    }


def _find(paths: PathLike | Iterable[PathLike]) -> dict[str, Path]:
    """Image files by id: below each given folder, or below the folder that listed files have in common."""
    given = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    absent = [str(path) for path in given if not path.exists()]
    if absent:
        raise FileNotFoundError(f"there is no image or folder {some(absent)}; check the paths")
    listed = [path.absolute().parent for path in given if not path.is_dir()]
    common = Path(os.path.commonpath(listed)) if listed else Path()
    images: dict[str, Path] = {}
    for path in given:
        root, found = (path, _below(path)) if path.is_dir() else (common, [path.absolute()])
        for file in found:
            name = file.relative_to(root).as_posix()
            if images.setdefault(name, file) != file and not images[name].samefile(file):
                raise ValueError(
                    f"{images[name]} and {file} would both get the id {name!r}; "
                    "give the folder that they have in common, or make a store for each"
                )
    if not images:
        place = f"below {some([str(path) for path in given])}" if given else "in an empty list"
        raise ValueError(f"no image {place}; looked for files ending in {', '.join(EXTENSIONS)}")
    return images


def _chosen(images: Mapping[str, Path], ids: Iterable[str] | None) -> dict[str, Path]:
    """The images that ids name, whole or in part; all of them where none are asked for."""
    if ids is None:
        return dict(images)
    wanted = {name: name if name in images else cropped(name)[0] for name in ids}
    absent = [name for name, file in wanted.items() if file not in images]
    if absent:
        near = [f"{name!r} may be {known!r}" for name, known in offered(absent[:3], images).items()]
        raise ValueError(
            f"{len(absent)} of {len(wanted)} ids have no image: {some(absent, 3, quote=True)}; ids are paths below the "
            f"folder, such as {some(images, 2, quote=True)}{'; ' if near else ''}{', '.join(near)}"
        )
    return {name: images[file] for name, file in wanted.items()}


def _below(folder: Path) -> list[Path]:
    """Image files in a folder and its subfolders, sorted; hidden ones are no images (".thumbs", "._1.jpg")."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
    visible = (file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    return sorted(visible, key=lambda file: file.relative_to(folder).as_posix())


def _made_by(store: ImageStore, tower: _ImageTower) -> bool:
    return all(store.provenance.get(name) == tower.provenance[name] for name in ("digest", "preprocessing"))


def _same_maker(store: ImageStore, tower: _ImageTower, place: Path) -> None:
    if _made_by(store, tower):
        return
    theirs, ours = (
        f"{label(made.get('model'), made.get('pretrained'))}, image tower {made.get('digest', 'unknown')}"
        for made in (store.provenance, tower.provenance)
    )
    if theirs == ours:
        mine, other = _prepared(store.provenance, tower.provenance)
        theirs, ours = f"{theirs} of images prepared with {mine}", f"of images prepared with {other}"
    raise ValueError(
        f"{place} was made by {theirs}; this run is {ours}: give another `out`, or overwrite it "
        "(--overwrite, overwrite=True)"
    )


def _prepared(mine: Mapping[str, str], other: Mapping[str, str]) -> Sequence[str]:
    """How the images of two stores were prepared: the settings in which they differ, where both have them."""
    settings = [made.get("preprocess_cfg") for made in (mine, other)]
    if settings[0] and settings[1] and settings[0] != settings[1]:
        return differing(settings[0], settings[1])
    return [made.get("preprocessing", "an unknown preprocessing") for made in (mine, other)]


def _why(error: Exception) -> str:
    """The first line of an error, without the path or the address of what it was about."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return re.sub(r" *<_io\.BytesIO object at 0x[0-9a-fA-F]+>", "", text.splitlines()[0])


def _fingerprint(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _file_fingerprint(path: Path) -> str:
    try:
        return _fingerprint(path.read_bytes())
    except OSError:
        return ""


def _warn(failed: Failures, asked: int) -> None:
    if failed:
        warnings.warn(
            f"{len(failed)} of {asked} images have no embedding, see the store's `failed`: {_reasons(failed)}",
            stacklevel=3,
        )


def _reasons(failed: Failures) -> str:
    return some([f"{name} ({reason})" for name, reason in failed])
