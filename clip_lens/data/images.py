"""ImageStore: unit image embeddings on disk, computed once, with what says where they come from.

A store is one safetensors file: the tensor `embeddings` [image, d_embed] in float32, and as metadata the ids (json),
the model, its pretrained tag, the digest of the image tower's weights, the preprocessing, library versions (json),
what failed (json), and a digest of each image file's bytes (json).
"""

from __future__ import annotations

import difflib
import html
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lens.tiny.assets import ASSETS

FORMAT = "clip_lens.images/1"

TINY = ASSETS / "images.safetensors"

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
    images that have no embedding, with the reason; `provenance` says by what the others were made; `contents` has
    the digests of the image files' bytes by id, where they are known.

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
        self.contents = dict(zip(self.ids, contents, strict=True)) if contents else {}

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

        `model`, `pretrained`, and `digest` (`clip_lens.originals.original.digest` of the image tower's `state_dict()`)
        say what made them, as far as that is known. With `normalize=False` the rows must be unit vectors already.

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
        provenance |= {"versions": versions("clip_lens", "torch"), "origin": "given as tensors, computed elsewhere"}
        return cls(ids, unit(rows) if normalize else rows, provenance)

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
        here, there = label(self.model, self.pretrained), label(model, pretrained)
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
            "contents": json.dumps([self.contents.get(name, "") for name in self.ids]),
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
        return f"ImageStore({images}, d_embed {self.d_embed}, {label(self.model, self.pretrained)}{lost})"

    def _repr_html_(self) -> str:
        shown = {"ids": some(self.ids, 3), **self.provenance, "failed": some([name for name, _ in self.failed], 3)}
        rows = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in shown.items() if text)
        return f"<p>{html.escape(repr(self))}</p><table>{rows}</table>"


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


def unit(rows: Tensor) -> Tensor:
    """Rows of norm 1, divided in float64.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
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
        raise ValueError(f"ids must be texts, got {some([repr(name) for name in foreign])}; use str(id)")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} ids repeat: {some(repeated)}; every image needs an id of its own")
    return names


def where(mask: Tensor, names: Sequence[str]) -> list[str]:
    """The names at which a mask is true.

    Example:
        >>> where(torch.tensor([True, False]), ["a.png", "b.png"])
        ['a.png']
    """
    return [name for name, chosen in zip(names, mask.tolist(), strict=True) if chosen]


def _refuse(ids: Sequence[str], bad: Tensor, what: str, remedy: str) -> None:
    names = where(bad, ids)
    if names:
        raise ValueError(f"{len(names)} of {len(ids)} embeddings have {what}: {some(names)}; {remedy}")


def _missing(store: ImageStore, missing: Sequence[str]) -> str:
    close = [f"{name!r} may be {some(near, 2)}" for name, near in _near(store.ids, missing[:5]).items() if near]
    return (
        f"{len(missing)} image ids are not in {store!r}: {some(missing)}; its ids look like {some(store.ids, 3)}"
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


def label(model: str | None, pretrained: str | None) -> str:
    """A model as messages name it.

    Example:
        >>> label("ViT-B-32", "openai"), label(None, None)
        ('ViT-B-32 (openai)', 'an unknown model')
    """
    return "an unknown model" if model is None else f"{model} ({pretrained})" if pretrained else model


def _remedy(model: str | None, pretrained: str | None) -> str:
    tag = f" --pretrained {pretrained}" if pretrained else ""
    command = f"clip-lens embed IMAGES --model {model or 'MODEL'}{tag} --out FILE"
    return f"embed the images with the encoder's model ({command})"


def versions(*packages: str) -> str:
    """The installed versions of packages, as JSON.

    Example:
        >>> versions("no-such-package")
        '{"no-such-package": "not installed"}'
    """
    found = {}
    for package in packages:
        try:
            found[package.removesuffix("_torch")] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return json.dumps(found)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are.

    Example:
        >>> some(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
