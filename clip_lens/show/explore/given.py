"""What explore was given, and which texts a view is of: an encoder, a batch of pairs or none, and images."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clip_lens.core.record import RUNS
from clip_lens.data.alone import one_text
from clip_lens.data.batch import Batch, Run, align
from clip_lens.data.images import ImageStore
from clip_lens.data.pairs import Pairs
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import LAYOUTS, Kind
from clip_lens.show.explore.view import ALONE, Rows, SourceName, View, has_heads
from clip_lens.words import some

TYPED = ("caption", "foil", "image")
BY_SIDE = ("affirmative", "negated")
"""Runs that are named by the side of the negation."""
SOURCE_WORDS = {"counterpart": "other text", "mean": "mean over a batch", "zeros": "zeros", "noise": "noise"}


class One(NamedTuple):
    """The texts of a view, aligned, and what was to be said about them."""

    batch: Batch
    notes: tuple[str, ...]


class Given:
    """What explore was given; it knows which views there are, and finds the batch of one pair, or one text, of a view.

    Raises:
        ValueError: the batch is empty, or judged along something else than its images.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> given = Given(encoder, clip_lens.align(clip_lens.read_pairs()[:4], store, encoder))
        >>> given.find(given.start()).batch.pairs.caption
        ('There are no red circles in the picture.',)
    """

    def __init__(self, encoder: HookedTextEncoder, batch: Batch | None = None, images: ImageStore | None = None):
        self.encoder, self.batch, self.has_images = encoder, batch, images is not None
        own = None if batch is None or bool(batch.direction.isnan().all()) else images_of(batch, encoder)
        self.images = own if images is None else images

    def start(self, pair: int = 0) -> View:
        """The first view: a pair of the batch, run as the batch runs it, its residual stream patched.

        Raises:
            ValueError: the batch does not have this pair, or there is none.
        """
        run = self.batch.run if self.batch is not None and self.batch.run in get_args(Run) else "foil"
        return View(*self.own(pair), pair=pair, run=run, layer=self.encoder.n_layers // 2)  # type: ignore[arg-type]

    def own(self, pair: int) -> tuple[str, str, str]:
        """Caption, foil and image of a pair of the batch.

        Raises:
            ValueError: the batch does not have this pair, or there is none.
        """
        if self.batch is None:
            raise ValueError("no batch was given, so there are no pairs to choose from; write the texts")
        if not 0 <= pair < len(self.batch):
            raise ValueError(f"the batch has the pairs 0 to {len(self.batch) - 1}, got {pair}")
        pairs = self.batch.pairs
        return pairs.caption[pair], pairs.foil[pair], pairs.image[pair]

    def change(self, view: View, **changes: Any) -> View:
        """The view with some fields changed.

        Another pair brings its texts and image; other texts or another run give up the chosen token and the places
        patched together; a kind with heads is laid out by head at first; a layer that the kind does not have becomes
        its last.

        Raises:
            ValueError: a field or a choice that does not exist.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> given = Given(encoder, clip_lens.align(clip_lens.read_pairs()[:4], store, encoder))
            >>> given.change(given.start(), pair=1, kind="head").caption
            'We can see a star.'
        """
        if unknown := changes.keys() - set(View.__dataclass_fields__):
            raise ValueError(
                f"a view has no {', '.join(sorted(unknown))}; it has {', '.join(View.__dataclass_fields__)}"
            )
        for name in TYPED[:2]:
            if name in changes:
                changes[name] = " ".join(changes[name].split())
        if "pair" in changes:
            changes = dict(zip(TYPED, self.own(changes["pair"]), strict=True)) | changes
        if changes.keys() & {"caption", "foil", "run", "pair"}:
            changes = {"query": None, "together": (), **changes}
        view = replace(view, **{"rows": _rows_of(view, changes.get("kind", view.kind)), **changes})
        return replace(view, layer=max(0, min(view.layer, self.depth(view.kind) - 1)))

    def depth(self, kind: Kind) -> int:
        """How many layers a kind has: `resid` is there once more than there are blocks."""
        return self.encoder.n_layers + (kind == "resid")

    def fitting(self, view: View) -> tuple[View, tuple[str, ...]]:
        """The view as it can be looked at, and what had to be another than was asked: one text alone is run itself and
        patched with what needs no other text, a pair without negation has no text "without" it to run.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> given = Given(encoder, clip_lens.align(clip_lens.read_pairs()[:4], store, encoder))
            >>> given.fitting(given.change(given.start(), caption="A star.", foil="A circle."))[1]
            ('neither text has a negation, so there is no text without negation to run; the foil is run',)
        """
        if view.alone:
            fits = replace(view, run="caption", source=view.source if view.source in ALONE else ALONE[0])
            said = f"one text alone has no {SOURCE_WORDS[view.source]} to be patched with; it is patched with zeros"
            return fits, (said,) if fits.source != view.source else ()
        if view.run in BY_SIDE and not self.sided(view):
            said = f"neither text has a negation, so there is no {RUNS[view.run].removeprefix('the ')} to run"
            return replace(view, run="foil"), (f"{said}; the foil is run",)
        return view, ()

    def sided(self, view: View) -> bool:
        """Whether one of the two texts is the negated one."""
        return self._pairs(view).side[0] != "none"

    def offers(self, view: View) -> dict[str, list[str]]:
        """What can be chosen at a view, by field, of those that depend on it."""
        sources = ALONE if view.alone else get_args(SourceName)
        runs = ("caption",) if view.alone else get_args(Run) if self.sided(view) else ("caption", "foil")
        return {
            "source": [name for name in sources if name != "mean" or self.batch is not None],
            "run": list(runs),
            "rows": [rows for rows in get_args(Rows) if rows != "head" or has_heads(view.kind)],
        }

    def typed(self, view: View) -> bool:
        """Whether the view's texts are others than those of its pair."""
        return self.batch is None or (view.caption, view.foil) != self.own(view.pair)[:2]

    def _pairs(self, view: View) -> Pairs:
        if self.typed(view) or self.batch is None:
            return Pairs(["typed"], [view.caption], [view.foil], [view.image], name="typed")
        return self.batch.pairs[[view.pair]]

    def find(self, view: View) -> One:
        """The batch of a view's one pair, or one text.

        Raises:
            ValueError: the texts can't be compared (too long, the same), or the image is not known.
        """
        self._refuse(view)
        texts = [text for text in (view.caption, view.foil) if text]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once for all texts, below
            batch = self._alone(view) if view.alone else self._aligned(view) if self.typed(view) else self._row(view)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.encoder.tokenize(texts)
        return One(batch, tuple(str(warning.message) for warning in caught))

    def _refuse(self, view: View) -> None:
        """Says in words that fit one pair what would be wrong with its texts and image."""
        texts = [text for text in (view.caption, view.foil) if text]
        for text, fits in zip(texts, self.encoder.fits(texts), strict=True):
            if not fits:
                raise ValueError(
                    f"longer than the {self.encoder.n_ctx} tokens of the context: {text[:60]!r}...; shorten it"
                )
        if view.foil and torch.equal(*self._raw(texts)):
            raise ValueError("caption and foil are the same tokens; change one of them")
        if not view.image and not view.alone:
            raise ValueError("two texts are compared by an image; name one, or empty the foil to see one text alone")
        own = not self.typed(view) and view.image == self.own(view.pair)[2]
        if view.image and not own and (self.images is None or view.image not in self.images):
            ids = () if self.images is None else self.images.ids
            known = f"the {len(ids)} known ones, such as {some(ids[:3], quote=True)}" if ids else "the known ones"
            raise ValueError(f"no image {view.image!r} among {known}{'' if ids else ': explore was given no images'}")

    def _raw(self, texts: list[str]) -> tuple[Tensor, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.encoder.tokenize(texts).unbind(0)

    def _alone(self, view: View) -> Batch:
        return one_text(view.caption, self.encoder, self._direction(view), image=view.image)

    def _direction(self, view: View) -> Float[Tensor, "d_embed"]:
        """What one text is judged by: its image, or without one its own embedding."""
        if not view.image:
            with torch.inference_mode():
                return self.encoder(view.caption)[0]
        self._stored.require_of(self.encoder)
        return self.encoder.scale * self._stored[[view.image]][0]

    @property
    def _stored(self) -> ImageStore:
        if self.images is None:
            raise ValueError("explore was given no images")
        return self.images

    def _aligned(self, view: View) -> Batch:
        return align(self._pairs(view), self._stored, self.encoder, run=view.run)

    def _row(self, view: View) -> Batch:
        one = self.batch[[view.pair]]  # type: ignore[index]
        if int(one.sigma) != sigma_of(view.run, one.pairs.side[0]):
            one = one.flip()
        if view.image != one.pairs.image[0]:
            one = one.along(self.encoder.scale * self._stored[[view.image]])
        return one


def images_of(batch: Batch, encoder: HookedTextEncoder) -> ImageStore:
    """The images of a batch's pairs, in memory: its directions at length one.

    Raises:
        ValueError: the batch is empty, or judged along something else than its images.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:2], store, encoder)
        >>> images_of(batch, encoder).ids
        ('scene-500000.png', 'scene-500001.png')
    """
    if len(batch) == 0:
        raise ValueError("the batch has no pairs to look at")
    first = {image: row for row, image in reversed(list(enumerate(batch.pairs.image)))}
    first = dict(sorted(first.items(), key=lambda entry: entry[1]))
    rows = batch.direction[list(first.values())].double().cpu() / encoder.scale
    if not torch.allclose(rows.norm(dim=1), torch.ones(len(rows), dtype=rows.dtype), atol=1e-3):
        raise ValueError(
            "the batch is judged along other directions than its images; give explore the batch before `along`"
        )
    return ImageStore.from_tensors(list(first), rows)


def sigma_of(run: Run, side: str) -> int:
    """+1 where the run is the foil."""
    if run in ("caption", "foil"):
        return 1 if run == "foil" else -1
    return 1 if (side == "foil") == (run == "negated") else -1


def way_of(batch: Batch, run: Run) -> Literal["as it is", "flip", "align"]:
    """How a batch gets to run these texts."""
    if batch.run == run:
        return "as it is"
    pairs = ({"caption", "foil"}, {"affirmative", "negated"})
    return "flip" if {batch.run, run} in pairs else "align"


def _rows_of(view: View, kind: Kind) -> Rows:
    """How another kind is laid out at first: as before, but by head where heads come in."""
    if kind not in LAYOUTS or has_heads(kind) == has_heads(view.kind):
        return view.rows
    return "head" if has_heads(kind) else "token"
