"""ImageStore: unit image embeddings on disk, computed once, with what says where they come from."""

from __future__ import annotations

import difflib
import html
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from types import MappingProxyType
from typing import Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from clip_lens.data.image_file import ROWS_AT_ONCE, Failures, PathLike, Stored, checks_of, read, write
from clip_lens.tiny.assets import ASSETS
from clip_lens.words import some

TINY = ASSETS / "images.safetensors"
UNIT_WITHIN = 1e-3
"""How far an embedding's norm may be from 1."""


class UnknownImage(KeyError):
    """Image ids that a store doesn't have."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows the repr of its message


class Maker(Protocol):
    """What a store needs to know of an encoder; `HookedTextEncoder` fulfils it."""

    name: str
    pretrained: str | None
    image_digest: str | None

    @property
    def d_embed(self) -> int: ...
    @property
    def image_preprocessing(self) -> str | None: ...


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
        rows: Float[Tensor, "image d_embed"],
        provenance: Mapping[str, str],
        failed: Failures = (),
        contents: Sequence[str] = (),
        *,
        file: Path | None = None,
        checks: UInt8[Tensor, "image 4"] | None = None,
    ):
        """`open`, `from_tensors` and `embed_images` make stores; this takes unit rows.

        `contents` are digests of the image files' bytes, empty where they are not known. `file` is where the rows lie,
        and `checks` what they must give.
        """
        self.ids = tuple(ids)
        self.failed = tuple((name, reason) for name, reason in failed)
        self.provenance: Mapping[str, str] = MappingProxyType(dict(provenance))
        self._position = _positions(self.ids)
        self._rows, self._contents, self._file, self._checks = rows, contents, file, checks

    @classmethod
    def open(cls, path: PathLike = "tiny") -> ImageStore:
        """The store in a file; "tiny" is the embedded one. Embeddings are read, and checked, when they are asked for.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or damaged, or no store of images, or of a later version of the format.

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
        stored = read(file)
        try:
            return cls(**vars(stored), file=file)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error}; embed the images again") from error

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
        given = torch.as_tensor(embeddings).detach()
        ids = _checked_ids(ids, tuple(given.shape))
        rows = torch.empty(given.shape, dtype=torch.promote_types(given.dtype, torch.float32))
        norms = torch.empty(len(ids), dtype=torch.float64)
        for start in range(0, len(ids), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            exact = given[part].to(norms)
            norms[part] = torch.linalg.vector_norm(exact, dim=1)
            rows[part] = exact / norms[part, None] if normalize else exact
        _refuse(ids, ~norms.isfinite(), "NaN or infinite values", "leave these images out")
        _refuse(ids, norms == 0, "only zeros", "a zero vector has no direction, leave these images out")
        if not normalize:
            _refuse(
                ids, (norms - 1).abs() > UNIT_WITHIN, "a norm other than 1", "give unit rows, or leave normalize=True"
            )
        known = {"model": model, "pretrained": pretrained, "digest": digest, "preprocessing": preprocessing or None}
        provenance = {name: value for name, value in known.items() if value is not None}
        provenance |= {"versions": versions("clip_lens", "torch"), "origin": "given as tensors, computed elsewhere"}
        return cls(ids, rows, provenance)

    @property
    def d_embed(self) -> int:
        """The width of the joint space."""
        return self._rows.shape[1]

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

    @property
    def preprocess_cfg(self) -> str | None:
        """How the images were prepared: settings as sorted JSON, None = not known."""
        return self.provenance.get("preprocess_cfg")

    @cached_property
    def contents(self) -> Mapping[str, str]:
        """The digests of the image files' bytes by id, empty where none is known."""
        return dict(zip(self.ids, self._contents, strict=True)) if self._contents else {}

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
            ValueError: embeddings in the file are damaged: not what was written, not finite, or no unit vectors.

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
        return self._sound(torch.tensor([self._position[name] for name in wanted], dtype=torch.long))

    def verify(self) -> None:
        """Nothing, if every embedding is what was written; a file's embeddings are otherwise checked as they are read.

        A file of the first format says nothing about what was written: its embeddings must be finite unit vectors.

        Raises:
            ValueError: embeddings are damaged; the message names the images.

        Example:
            >>> ImageStore.open("tiny").verify()
        """
        if self._file is not None:
            for part in torch.arange(len(self)).split(ROWS_AT_ONCE):
                self._sound(part)

    def _sound(self, positions: Int[Tensor, "image"]) -> Float[Tensor, "image d_embed"]:
        """The embeddings at these positions."""
        rows = self._rows[positions]
        if self._file is None:
            return rows  # they were checked when the store was made
        ids = [self.ids[position] for position in positions.tolist()]
        norms = torch.linalg.vector_norm(rows.double(), dim=1)
        wrong = ~((norms - 1).abs() <= UNIT_WITHIN)
        if self._checks is not None:
            wrong |= (checks_of(rows, ids) != self._checks[positions]).any(1)
        _refuse(ids, wrong, f"other values in {self._file} than were written", "embed these images again")
        return rows

    def require(
        self,
        *,
        model: str | None = None,
        pretrained: str | None = None,
        digest: str | None = None,
        d_embed: int | None = None,
        preprocessing: str | None = None,
    ) -> None:
        """Nothing, if these embeddings and a text encoder share one joint space, as far as both sides say.

        `d_embed` must always fit. Where both digests of the image tower are known they decide, else the names do; what
        isn't known on one side is not compared. `preprocessing` is `encoder.image_preprocessing`: the same image tower
        says other things of images that were prepared otherwise.

        Raises:
            ValueError: the store was made by another model, or by the same one of images that were prepared otherwise;
                the message has both.

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
        if self.preprocess_cfg and preprocessing and self.preprocess_cfg != preprocessing:
            mine, other = differing(self.preprocess_cfg, preprocessing)
            raise ValueError(
                f"the images of {here} were prepared with {mine}, the encoder's are prepared with {other}: "
                f"{_remedy(model, pretrained)}, with the same --like as the encoder's where it is a file's; or "
                "any_store=True if you know better"
            )

    def require_of(self, encoder: Maker, *, any_store: bool = False) -> None:
        """Nothing, if these embeddings fit an encoder: `require` with what it says. `any_store`: only the width must.

        Raises:
            ValueError: they don't.

        Example:
            >>> ImageStore.open("tiny").require_of(clip_lens.load())
        """
        if any_store:
            return self.require(d_embed=encoder.d_embed)
        return self.require(
            model=encoder.name,
            pretrained=encoder.pretrained,
            digest=encoder.image_digest,
            d_embed=encoder.d_embed,
            preprocessing=encoder.image_preprocessing if self.preprocess_cfg else None,
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
        self.verify()  # what was damaged must not be given new checks
        write(path, Stored(self.ids, self._rows, self.provenance, self.failed, self._contents, self._checks))

    def __repr__(self) -> str:
        lost = f", {len(self.failed)} failed" if self.failed else ""
        images = f"{len(self)} image{'s' if len(self) != 1 else ''}"
        return f"ImageStore({images}, d_embed {self.d_embed}, {label(self.model, self.pretrained)}{lost})"

    def _repr_html_(self) -> str:
        shown = {"ids": some(self.ids, 3), **self.provenance, "failed": some([name for name, _ in self.failed], 3)}
        rows = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in shown.items() if text)
        return f"<p>{html.escape(repr(self))}</p><table>{rows}</table>"


def unit(rows: Tensor) -> Tensor:
    """Rows of norm 1, divided in float64; a zero row becomes NaN.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    exact = rows.double()
    return (exact / torch.linalg.vector_norm(exact, dim=1, keepdim=True)).to(rows.dtype)


def _checked_ids(ids: Sequence[str], shape: tuple[int, ...]) -> list[str]:
    if isinstance(ids, str):
        raise ValueError(f"ids must be a sequence of texts, got the text {ids!r}; write [{ids!r}]")
    names = list(ids)
    if len(shape) != 2 or shape[0] != len(names):
        raise ValueError(
            f"embeddings must have the shape [image, d_embed] with a row per id, got {shape} and {len(names)} ids"
        )
    return names


def _positions(ids: Sequence[str]) -> dict[str, int]:
    """The row of each id."""
    foreign = [name for name in ids if not isinstance(name, str)]
    if foreign:
        raise ValueError(f"ids must be texts, got {some(foreign, quote=True)}; use str(id)")
    position = {name: row for row, name in enumerate(ids)}
    if len(position) < len(ids):
        repeated = [name for name, count in Counter(ids).items() if count > 1]
        raise ValueError(f"{len(repeated)} ids repeat: {some(repeated)}; every image needs an id of its own")
    if any("\0" in name for name in ids):
        raise ValueError("ids can't contain the character NUL, which stands between them in a file; leave it out")
    return position


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
    few = {known.lower(): known for known in islice(ids, 2000)}  # difflib is slow, and this is a hint
    found = {}
    for name in names:
        stem = PurePath(name).stem
        same = [known for known in ids if stem in known and PurePosixPath(known).stem == stem]
        found[name] = same or [few[close] for close in difflib.get_close_matches(name.lower(), few)]
    return found


def label(model: str | None, pretrained: str | None) -> str:
    """A model as messages name it.

    Example:
        >>> label("ViT-B-32", "openai"), label(None, None)
        ('ViT-B-32 (openai)', 'an unknown model')
    """
    return "an unknown model" if model is None else f"{model} ({pretrained})" if pretrained else model


def differing(mine: str, other: str) -> list[str]:
    """Of two preprocessings, as JSON, the settings in which they differ.

    Example:
        >>> differing('{"size": 224, "mean": 0}', '{"size": 336, "mean": 0}')
        ['{"size": 224}', '{"size": 336}']
    """
    both = [json.loads(told) for told in (mine, other)]
    names = sorted({name for told in both for name in told if both[0].get(name) != both[1].get(name)})
    return [json.dumps({name: told.get(name) for name in names}) for told in both]


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
