"""ImageStore: unit image embeddings on disk, computed once, with what says where they come from.

A store is one safetensors file: the tensor `embeddings` [image, d_embed] in float32, and as metadata the ids (json),
the model, its pretrained tag, the digest of the image tower's weights, the preprocessing, library versions (json),
what failed (json), and a digest of each image file's bytes (json).
"""

from __future__ import annotations

import difflib
import hashlib
import html
import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "clip_lens.images/1"
TINY = Path(str(files("clip_lens"))) / "assets" / "tiny" / "images.safetensors"
EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
BATCHES_PER_CHUNK = 8

_LABELS = ("model", "pretrained", "digest", "preprocessing", "versions", "origin")
Failures = Sequence[tuple[str, str]]
PathLike = str | os.PathLike[str]


class UnknownImage(KeyError):
    """Image ids that a store doesn't have."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows the repr of its message


class ImageStore:
    """Unit image embeddings by image id, read from disk as they are asked for.

    An id is the image's path below the folder that was embedded, with its extension ("cats/1.jpg"). `failed` lists the
    images that have no embedding, with the reason; `provenance` says by what the others were made.

    Example:
        >>> store = ImageStore.from_tensors(["a.png", "b.png"], torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> store[["b.png", "a.png"]]
        tensor([[0.0000, 1.0000],
                [0.6000, 0.8000]])
    """

    def __init__(
        self,
        ids: Sequence[str],
        rows: Any,
        provenance: Mapping[str, str],
        failed: Failures = (),
        contents: Sequence[str] = (),
    ) -> None:
        """For `open`, `from_tensors` and `embed_images`: `rows` is a tensor or a slice of a file, already unit rows.

        `contents` are digests of the image files' bytes, empty where they are not known.
        """
        self.ids = tuple(ids)
        self.failed = tuple((name, reason) for name, reason in failed)
        self.provenance: Mapping[str, str] = MappingProxyType(dict(provenance))
        self._rows = rows
        self._shape = tuple(rows.shape if isinstance(rows, Tensor) else rows.get_shape())
        self._position = {name: position for position, name in enumerate(self.ids)}
        self._content = dict(zip(self.ids, contents, strict=True)) if contents else {}

    @classmethod
    def open(cls, path: PathLike = "tiny") -> ImageStore:
        """The store in a file; "tiny" is the embedded one. Embeddings are read when they are asked for.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, or no store of images, or of a later version of the format.

        Example:
            >>> ImageStore.open("tiny").model
            'tiny'
        """
        file = TINY if str(path) == "tiny" else Path(path)
        if not file.is_file():
            what = "is a folder, not a file" if file.is_dir() else "does not exist"
            raise FileNotFoundError(
                f"{file} {what}; make a store with embed_images(FOLDER, model=..., out=FILE) or clip-lens embed"
            )
        try:
            handle = safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(
                f"{file} can't be read: truncated, or not a safetensors file ({error}); embed the images again"
            ) from error
        return _from_file(file, handle)

    @classmethod
    def from_tensors(
        cls,
        ids: Sequence[str],
        embeddings: Float[Tensor, "image d_embed"],
        *,
        model: str | None = None,
        pretrained: str | None = None,
        digest: str | None = None,
        preprocessing: str = "",
        normalize: bool = True,
    ) -> ImageStore:
        """A store in memory of embeddings that were computed elsewhere; float64 stays float64 until it is saved.

        `model`, `pretrained`, and `digest` (`clip_lens.openclip.digest` of the image tower's `state_dict()`) say what
        made them, as far as that is known. With `normalize=False` the rows must be unit vectors already.

        Raises:
            ValueError: another number of ids than rows, a repeated id, a row that is not finite, zero, or not a unit
                vector where it must be; the message names the ids.

        Example:
            >>> ImageStore.from_tensors(["a.png"], torch.ones(1, 4), model="ViT-B-32", pretrained="openai")
            ImageStore(1 image, d_embed 4, ViT-B-32 (openai))
        """
        rows = torch.as_tensor(embeddings).detach().cpu()
        ids = _checked_ids(ids, tuple(rows.shape))
        _refuse(ids, ~rows.isfinite().all(1), "NaN or infinite values", "leave these images out")
        rows = rows if rows.dtype == torch.float64 else rows.float()
        norms = torch.linalg.vector_norm(rows.double(), dim=1)
        _refuse(ids, norms == 0, "only zeros", "a zero vector has no direction, leave these images out")
        if not normalize:
            _refuse(ids, (norms - 1).abs() > 1e-3, "a norm other than 1", "give unit rows, or leave normalize=True")
        known = {"model": model, "pretrained": pretrained, "digest": digest, "preprocessing": preprocessing or None}
        provenance = {name: value for name, value in known.items() if value is not None}
        provenance |= {"versions": _versions("clip_lens", "torch"), "origin": "given as tensors, computed elsewhere"}
        return cls(ids, _unit(rows) if normalize else rows, provenance)

    @property
    def d_embed(self) -> int:
        """The width of the joint space."""
        return self._shape[1]

    @property
    def model(self) -> str | None:
        """The open_clip model that made the embeddings, None = not known."""
        return self.provenance.get("model")

    @property
    def pretrained(self) -> str | None:
        """The tag or file of the model's weights, None = the model has its own, or not known."""
        return self.provenance.get("pretrained")

    @property
    def digest(self) -> str | None:
        """The digest of the image tower's weights, None = not known."""
        return self.provenance.get("digest")

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __contains__(self, name: object) -> bool:
        return name in self._position

    def __getitem__(self, ids: Sequence[str]) -> Float[Tensor, "image d_embed"]:
        """The unit embeddings of these images, a row per id, in the order asked for; an id may repeat.

        Raises:
            UnknownImage: (a KeyError) ids that the store doesn't have, with what they may have meant.
            TypeError: a single id instead of a sequence of them.

        Example:
            >>> store = ImageStore.open("tiny")
            >>> store[store.ids[:3]].shape == (3, store.d_embed)
            True
        """
        if isinstance(ids, str):
            raise TypeError(f"a store is indexed by a sequence of ids, got the text {ids!r}; write store[[{ids!r}]]")
        wanted = [str(name) for name in ids]
        missing = [name for name in dict.fromkeys(wanted) if name not in self._position]
        if missing:
            raise UnknownImage(_missing(self, missing))
        positions = torch.tensor([self._position[name] for name in wanted], dtype=torch.long)
        return self._rows[positions] if isinstance(self._rows, Tensor) else _read(self._rows, positions, self.d_embed)

    def require(
        self,
        *,
        model: str | None = None,
        pretrained: str | None = None,
        digest: str | None = None,
        d_embed: int | None = None,
    ) -> None:
        """Nothing, if these embeddings and a text encoder share one joint space, as far as both sides say.

        `d_embed` must always fit. Where both digests of the image tower are known they decide, else the names do; what
        isn't known on one side is not compared.

        Raises:
            ValueError: the store was made by another model; the message has both names.

        Example:
            >>> ImageStore.open("tiny").require(model="tiny")
        """
        here, there = _label(self.model, self.pretrained), _label(model, pretrained)
        if d_embed is not None and d_embed != self.d_embed:
            raise ValueError(
                f"the image embeddings of {here} have {self.d_embed} dimensions, the encoder {there} has {d_embed}: "
                f"they don't share a space; {_remedy(model, pretrained)}"
            )
        if self.digest and digest:
            same, why = self.digest == digest, f" (image towers {self.digest} and {digest})"
        else:
            both = [(self.model, model), (self.pretrained, pretrained)]
            same, why = all(a is None or b is None or a == b for a, b in both), ""
        if not same:
            raise ValueError(
                f"the image embeddings were made by {here}, the encoder is {there}{why}: their spaces have nothing in "
                f"common; {_remedy(model, pretrained)}, or align with any_store=True if you know better"
            )

    def save(self, path: PathLike) -> None:
        """Writes the store to one safetensors file, in float32; the file appears whole or not at all.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> with TemporaryDirectory() as folder:
            ...     ImageStore.from_tensors(["a.png"], torch.ones(1, 4)).save(folder + "/images.safetensors")
            ...     ImageStore.open(folder + "/images.safetensors").ids
            ('a.png',)
        """
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = dict(self.provenance) | {
            "format": FORMAT,
            "ids": json.dumps(self.ids),
            "failed": json.dumps(self.failed),
            "contents": json.dumps([self._content.get(name, "") for name in self.ids]),
        }
        rows = self[self.ids].float().contiguous()
        # In the same folder, since a rename is atomic only within one file system.
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            save_file({"embeddings": rows}, temporary, metadata=metadata)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def __repr__(self) -> str:
        lost = f", {len(self.failed)} failed" if self.failed else ""
        images = f"{len(self)} image{'s' if len(self) != 1 else ''}"
        return f"ImageStore({images}, d_embed {self.d_embed}, {_label(self.model, self.pretrained)}{lost})"

    def _repr_html_(self) -> str:
        shown = {"ids": _some(self.ids, 3), **self.provenance, "failed": _some([name for name, _ in self.failed], 3)}
        rows = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in shown.items() if text)
        return f"<p>{html.escape(repr(self))}</p><table>{rows}</table>"


def embed_images(
    paths: PathLike | Iterable[PathLike],
    *,
    model: str = "tiny",
    pretrained: str | None = None,
    out: PathLike,
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = True,
    overwrite: bool = False,
) -> ImageStore:
    """The store `out` with the embeddings of a folder of images and its subfolders, of one image, or of a list of them.

    `model` and `pretrained` are open_clip's, or "tiny". Pictures go through the model's own preprocessing as
    `preprocess(PIL.Image.open(file))` does it: to RGB, EXIF orientation not applied. An id is the path below the
    folder; for listed files, below the folder that they have in common. Images that can't be read are listed in
    `failed` and in one warning.

    A run that is interrupted resumes: what is done lies in `<out>.partial` until all is. A finished `out` of the same
    model is extended; its images are not computed again unless their files changed. An `out` of another model is
    refused; `overwrite=True` replaces it.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no image is found, two images get the same id, none can be read, `out` or what lies in
            `<out>.partial` was made by another model or is no store, the model can't be loaded, or `device` can't be
            used.

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
    images, out = _find(paths), Path(out)
    finished = None if overwrite or not out.exists() else ImageStore.open(out)
    tower = _image_tower(model, pretrained, device)
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
    store = _merged(finished, kept, chunked, images, failed, tower)
    del kept, chunked, chunks, finished  # an open file can't be replaced everywhere
    store.save(out)
    partial.remove()
    _warn(failed, len(images))
    return ImageStore.open(out)


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
            loaded = dict(zip(images, pool.map(self._load, images.values()), strict=True))
        failed = [(name, result) for name, (_, result) in loaded.items() if isinstance(result, str)]
        pixels = {name: result for name, (_, result) in loaded.items() if isinstance(result, Tensor)}
        if not pixels:
            return ImageStore([], torch.empty(0, 0), self.provenance, failed)
        with torch.inference_mode():
            rows = self.encode(torch.stack(list(pixels.values())).to(self.device)).float().cpu()
        sound = rows.isfinite().all(1) & (rows != 0).any(1)
        failed += [(name, "the model's output is not finite or zero") for name in _where(~sound, list(pixels))]
        ids = _where(sound, list(pixels))
        return ImageStore(ids, _unit(rows[sound]), self.provenance, failed, [loaded[name][0] for name in ids])

    def _load(self, path: Path) -> tuple[str, Tensor | str]:
        """The digest of the file's bytes, and pixels or the reason why there are none."""
        from PIL import Image

        try:
            content = path.read_bytes()
            with Image.open(BytesIO(content)) as image:
                return _fingerprint(content), self.preprocess(image)
        except Exception as error:  # a decoder meets any kind of broken file, and none of them ends the run
            return "", _why(error)


def _image_tower(model: str, pretrained: str | None, device: str) -> _ImageTower:
    from clip_lens.openclip import digest, open_original

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device={device!r} can't be used here ({reason}); give 'cpu', or 'cuda' on a GPU") from error
    original = open_original(model, pretrained=pretrained)
    module: Any = original.module.to(device).eval()
    if original.preprocess is None:
        raise ValueError(f"{model} has no preprocessing for images; give the name of an open_clip model")
    provenance = {
        "model": original.name,
        "digest": digest(module.visual.state_dict()),
        # The address of a function in a repr would differ from run to run.
        "preprocessing": re.sub(r" at 0x[0-9a-f]+", "", str(original.preprocess)),
        "versions": _versions("clip_lens", "open_clip_torch", "torch", "pillow"),
        "origin": "computed by clip_lens.embed_images",
    }
    if original.pretrained is not None:
        provenance["pretrained"] = str(original.pretrained)
    return _ImageTower(module.encode_image, original.preprocess, device, provenance)


@dataclass(frozen=True)
class _Partial:
    """The folder of an unfinished run: stores of some batches each, every one with its provenance."""

    folder: Path

    def resume(self, tower: _ImageTower, overwrite: bool) -> list[ImageStore]:
        """What earlier runs of the same model left here; another model's is refused, or removed by `overwrite`."""
        chunks = []
        for file in sorted(self.folder.glob("*.safetensors")):
            chunk = ImageStore.open(file)
            if overwrite and not _made_by(chunk, tower):
                file.unlink()
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
        chunk.save(self.folder / f"{_fingerprint(json.dumps(chunk.ids).encode())}.safetensors")
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
    from tqdm import tqdm

    failed: list[tuple[str, str]] = []
    unsaved: list[ImageStore] = []
    # disable=None: no bar where standard error isn't a terminal
    bar = tqdm(total=sum(map(len, batches)), unit="image", desc="embedding", disable=None if progress else True)

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
    return ImageStore(list(have), rows, provenance, failed, [have[name]._content.get(name, "") for name in have])


def _unchanged(store: ImageStore, images: Mapping[str, Path], others: bool = False) -> dict[str, ImageStore]:
    """The ids of a store whose files still have the bytes they had; `others`: also ids that aren't asked for."""
    return {
        name: store
        for name in store.ids
        if (name in images and _file_fingerprint(images[name]) == store._content.get(name))
        or (others and name not in images)
    }


def _find(paths: PathLike | Iterable[PathLike]) -> dict[str, Path]:
    """Image files by id: below each given folder, or below the folder that listed files have in common."""
    given = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    absent = [str(path) for path in given if not path.exists()]
    if absent:
        raise FileNotFoundError(f"there is no image or folder {_some(absent)}; check the paths")
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
        where = f"below {_some([str(path) for path in given])}" if given else "in an empty list"
        raise ValueError(f"no image {where}; looked for files ending in {', '.join(EXTENSIONS)}")
    return images


def _below(folder: Path) -> list[Path]:
    """Image files in a folder and its subfolders, sorted; hidden ones are no images (".thumbs", "._1.jpg")."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
    visible = (file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    return sorted(visible, key=lambda file: file.relative_to(folder).as_posix())


def _from_file(file: Path, handle: Any) -> ImageStore:
    metadata = handle.metadata() or {}
    form = metadata.get("format", "")
    if form != FORMAT:
        if form.startswith(FORMAT.rpartition("/")[0]):
            raise ValueError(f"{file} has the format {form}, this version reads {FORMAT}; upgrade clip_lens")
        raise ValueError(
            f"{file} is a safetensors file but no store of images (format {form or 'not given'!r}, not {FORMAT!r}); "
            "for embeddings from elsewhere use ImageStore.from_tensors(ids, embeddings).save(FILE)"
        )
    try:
        ids, failed, contents = (json.loads(metadata.get(name, "[]")) for name in ("ids", "failed", "contents"))
        rows = handle.get_slice("embeddings")
        shape, kind = tuple(rows.get_shape()), rows.get_dtype()
        if len(shape) != 2 or shape[0] != len(ids) or kind != "F32":
            raise ValueError(f"{len(ids)} ids and embeddings of shape {shape}, {kind}")
        provenance = {name: metadata[name] for name in _LABELS if name in metadata}
        return ImageStore(ids, rows, provenance, failed, contents)
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {error}; embed the images again") from error


def _read(rows: Any, positions: Tensor, d_embed: int) -> Tensor:
    """Rows of a file, which gives slices only: every run of neighbours is read once."""
    distinct, inverse = positions.unique(return_inverse=True)
    if not len(distinct):
        return torch.empty(0, d_embed)
    starts = [0, *(torch.nonzero(distinct.diff() != 1)[:, 0] + 1).tolist(), len(distinct)]
    runs = [rows[int(distinct[start]) : int(distinct[stop - 1]) + 1] for start, stop in pairwise(starts)]
    return torch.cat(runs)[inverse]


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1).to(rows.dtype)


def _checked_ids(ids: Sequence[str], shape: tuple[int, ...]) -> list[str]:
    if isinstance(ids, str):
        raise ValueError(f"ids must be a sequence of texts, got the text {ids!r}; write [{ids!r}]")
    names = list(ids)
    if len(shape) != 2 or shape[0] != len(names):
        raise ValueError(
            f"embeddings must have the shape [image, d_embed] with a row per id, got {shape} and {len(names)} ids"
        )
    foreign = [name for name in names if not isinstance(name, str)]
    if foreign:
        raise ValueError(f"ids must be texts, got {_some([repr(name) for name in foreign])}; use str(id)")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} ids repeat: {_some(repeated)}; every image needs an id of its own")
    return names


def _where(mask: Tensor, names: Sequence[str]) -> list[str]:
    return [name for name, chosen in zip(names, mask.tolist(), strict=True) if chosen]


def _refuse(ids: Sequence[str], bad: Tensor, what: str, remedy: str) -> None:
    names = _where(bad, ids)
    if names:
        raise ValueError(f"{len(names)} of {len(ids)} embeddings have {what}: {_some(names)}; {remedy}")


def _missing(store: ImageStore, missing: Sequence[str]) -> str:
    close = [f"{name!r} may be {_some(near, 2)}" for name, near in _near(store.ids, missing[:5]).items() if near]
    return (
        f"{len(missing)} image ids are not in {store!r}: {_some(missing)}; its ids look like {_some(store.ids, 3)}"
        + (f"; {', '.join(close)}" if close else "")
        + ("; some of them failed when they were embedded" if {name for name, _ in store.failed} & set(missing) else "")
    )


def _near(ids: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """For each name the ids with the same stem in any folder, else the ones that are spelt alike."""
    stems: dict[str, list[str]] = {}
    for known in ids:
        stems.setdefault(Path(known).stem.lower(), []).append(known)
    few = list(islice(ids, 2000))  # difflib is slow, and this is a hint
    return {name: stems.get(Path(name).stem.lower()) or difflib.get_close_matches(name, few) for name in names}


def _label(model: str | None, pretrained: str | None) -> str:
    return "an unknown model" if model is None else f"{model} ({pretrained})" if pretrained else model


def _remedy(model: str | None, pretrained: str | None) -> str:
    tag = f" --pretrained {pretrained}" if pretrained else ""
    command = f"clip-lens embed IMAGES --model {model or 'MODEL'}{tag} --out FILE"
    return f"embed the images with the encoder's model ({command})"


def _made_by(store: ImageStore, tower: _ImageTower) -> bool:
    return all(store.provenance.get(name) == tower.provenance[name] for name in ("digest", "preprocessing"))


def _same_maker(store: ImageStore, tower: _ImageTower, where: Path) -> None:
    if _made_by(store, tower):
        return
    theirs, ours = (
        f"{_label(made.get('model'), made.get('pretrained'))}, image tower {made.get('digest', 'unknown')}"
        for made in (store.provenance, tower.provenance)
    )
    differ = " with another preprocessing" if theirs == ours else ""
    raise ValueError(
        f"{where} was made by {theirs}{differ}; this run is {ours}: give another `out`, or overwrite=True to replace it"
    )


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


def _versions(*packages: str) -> str:
    found = {}
    for package in packages:
        try:
            found[package.removesuffix("_torch")] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return json.dumps(found)


def _warn(failed: Failures, asked: int) -> None:
    if failed:
        warnings.warn(
            f"{len(failed)} of {asked} images have no embedding, see the store's `failed`: {_reasons(failed)}",
            stacklevel=3,
        )


def _reasons(failed: Failures) -> str:
    return _some([f"{name} ({reason})" for name, reason in failed])


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
