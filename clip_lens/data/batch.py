"""`align`: pairs + image embeddings + an encoder -> `Batch`: every run knows its counterpart position by position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from typing import Literal, Protocol, get_args, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from clip_lens.data.groups import SplitBy, first_part
from clip_lens.data.images import ImageStore
from clip_lens.data.pairs import SIDES, Pairs
from clip_lens.data.repairs import offered
from clip_lens.data.slots import ENDS, Matched, Names, Naming, Slots, Written, name_slots, rules_of
from clip_lens.originals.original import digest
from clip_lens.words import close, unknown

_TENSORS = ("tokens", "other", "origin", "slot", "other_slot", "length", "other_length", "direction", "sigma")

NO_SIDE = "no side: neither text is the negated one"
Run = Literal["affirmative", "negated", "caption", "foil"]
Joint = Literal["same", "other", "unknown", "none"]


@runtime_checkable
class Encoder(Protocol):
    """What `align` needs of an encoder; `HookedTextEncoder` fulfils it."""

    name: str
    pretrained: str | None
    scale: float
    image_digest: str | None

    @property
    def image_preprocessing(self) -> str | None: ...
    @property
    def causal(self) -> bool: ...
    @property
    def d_embed(self) -> int: ...
    @property
    def precision(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def pool(self) -> Callable[[Int[Tensor, "pair pos"]], Int[Tensor, "pair"]]: ...
    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "pair pos"]: ...
    def fits(self, texts: Sequence[str]) -> list[bool]: ...
    def length(self, tokens: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair"]: ...
    def cut(self, tokens: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair cut"]: ...


@dataclass(frozen=True)
class Batch:
    """Directed pairs: a run, its counterpart, and the direction of the joint space along which they are judged.

    `tokens` is what is run and patched, `other` supplies activations. `origin[n, p]` is the position in `other` that
    matches position p of the run, -1 = no counterpart. `slot[n, p]` indexes `slots`, the names in the order of the
    text, -1 = no slot; `named_by` says of each pair by which rule. `length` counts the positions that the tower reads:
    up to the text's end in a causal one, all in a bidirectional one. `direction` is `scale * v_image`:
    `<u, direction>` is CLIP's logit; of texts alone it is NaN until `along` gives one. `sigma` is +1 where the run is
    the foil, -1 where it is the caption. `dropped` lists the pairs that did not make it, with the reason. `held_out`
    says of a part that `split` made by what the two were kept apart: "by image" or "by text". `joint` says whether the
    images were embedded by the encoder's own model, another one, nobody knows by which, or that there are none.
    """

    tokens: Int[Tensor, "pair pos"]
    other: Int[Tensor, "pair pos_other"]
    origin: Int[Tensor, "pair pos"]
    slot: Int[Tensor, "pair pos"]
    other_slot: Int[Tensor, "pair pos_other"]
    slots: tuple[str, ...]
    length: Int[Tensor, "pair"]
    other_length: Int[Tensor, "pair"]
    direction: Float[Tensor, "pair d_embed"]
    sigma: Int[Tensor, "pair"]
    pairs: Pairs
    dropped: pd.DataFrame
    run: str
    images: str = ""
    held_out: str = ""
    joint: Joint = "unknown"
    named_by: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def flip(self) -> Batch:
        """The batch with run and other swapped: what was denoised is noised.

        Example:
            >>> encoder, pairs, store = clip_lens.load(), clip_lens.read_pairs()[:4], clip_lens.ImageStore.open("tiny")
            >>> batch = clip_lens.align(pairs, store, encoder, run="foil")
            >>> batch.flip().run, batch.flip().sigma.tolist()
            ('caption', [-1, -1, -1, -1])
        """
        names = {"caption": "foil", "affirmative": "negated"}
        names |= {other: run for run, other in names.items()}
        return replace(
            self,
            tokens=self.other,
            other=self.tokens,
            origin=self.inverse,
            slot=self.other_slot,
            other_slot=self.slot,
            length=self.other_length,
            other_length=self.length,
            sigma=-self.sigma,
            run=names.get(self.run, f"other of {self.run}"),
        )

    def along(self, w: Float[Tensor, "d_embed"] | Float[Tensor, "pair d_embed"]) -> Batch:
        """The batch judged along another direction of the joint space, one for all pairs or one each.

        Raises:
            ValueError: a direction of another shape, or one that is not finite.
        """
        w = torch.as_tensor(w).to(self.direction)
        if w.shape not in (self.direction.shape, self.direction.shape[1:]):
            raise ValueError(
                f"a direction has the shape {tuple(self.direction.shape)} or one row of it, got {tuple(w.shape)}"
            )
        if not w.isfinite().all():
            raise ValueError("the direction has components that are not finite")
        return replace(self, direction=w.expand_as(self.direction).clone())

    def __getitem__(self, index: Tensor | slice | Sequence[int] | int) -> Batch:
        """Some of the pairs; always a `Batch`, also for one."""
        rows = torch.arange(len(self), device=self.tokens.device)[index].reshape(-1)
        return replace(
            self,
            pairs=self.pairs[rows.tolist()],
            named_by=tuple(self.named_by[row] for row in rows.tolist()) if self.named_by else (),
            **{name: getattr(self, name)[rows] for name in _TENSORS},
        )

    def split(self, fraction: float = 0.5, seed: int = 0, by: SplitBy = "image") -> tuple[Batch, Batch]:
        """Two parts, the first with about `fraction` of the pairs, drawn at random by `seed`; the order stays.

        `by="image"` keeps the pairs of one image together. `by="text"` keeps those together that share a text, as the
        encoder reads it, or an image, directly or over other pairs: no text of one part stands in the other. The
        pairs of one question stay together either way. The parts come as close to `fraction` as such groups allow.
        `held_out` says which of the two it was.

        Raises:
            ValueError: `fraction` isn't between 0 and 1, an unknown `by`, by image where there are none, or all pairs
                are of one group.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
            >>> found, judged = batch.split(0.5, seed=1, by="text")
            >>> set(found.pairs.caption) & set(judged.pairs.caption), found.held_out
            (set(), 'by text')
        """
        texts = zip(_texts(self.tokens, self.length), _texts(self.other, self.other_length), strict=True)
        part = first_part(self.pairs.image, texts, fraction, seed, by, self.pairs.question)
        first = torch.from_numpy(part).to(self.tokens.device)
        marked = replace(self, held_out=f"by {by}")
        return marked[first], marked[~first]

    def chunks(self, n: int) -> Iterator[Int[Tensor, "pair"]]:
        """The numbers of all pairs in parts of at most `n`, the shortest runs first, so that parts can be cut short.

        Raises:
            ValueError: `n` is less than 1.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> batch = clip_lens.align(clip_lens.read_pairs()[:5], store, encoder)
            >>> [len(index) for index in batch.chunks(2)]
            [2, 2, 1]
        """
        if n < 1:
            raise ValueError(f"a chunk has at least 1 pair, got n={n}")
        return iter(self.length.argsort(stable=True).split(n) if len(self) else ())

    def where(self, slot: str | int | None) -> Bool[Tensor, "pair pos"]:
        """The positions of the run's text that a slot has: a name, a raw position, None = all.

        Raises:
            ValueError: the batch has no slot of that name.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> batch = clip_lens.align(clip_lens.read_pairs()[:2], store, encoder)
            >>> torch.equal(batch.where("sot"), batch.where(0))
            True
        """
        if slot is None:
            return self.inside
        if not isinstance(slot, str):
            return self.inside & (torch.arange(self.tokens.shape[1], device=self.tokens.device) == slot)
        if slot not in self.slots:
            raise ValueError(unknown("slot", slot, self.slots))
        return self.inside & (self.slot == self.slots.index(slot))

    @property
    def occurring(self) -> tuple[str, ...]:
        """The names of the slots that any run has."""
        found = set(self.slot[self.inside].tolist())
        return tuple(name for number, name in enumerate(self.slots) if number in found)

    @cached_property
    def inverse(self) -> Int[Tensor, "pair pos_other"]:
        """The run's position of each of the other's, -1 = none."""
        inverse = torch.full_like(self.other, -1)
        rows, positions = (self.origin >= 0).nonzero(as_tuple=True)
        inverse[rows, self.origin[rows, positions]] = positions
        return inverse

    def moved(
        self, value: Shaped[Tensor, "*many pair from"], *, inverse: bool = False
    ) -> Shaped[Tensor, "*many pair to"]:
        """The other's values at the run's positions, 0 or False where a position has no counterpart.

        `inverse=True` moves the run's values to the other's positions.

        Raises:
            ValueError: the values are not one per pair and position of the text that they come from.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> batch = clip_lens.align(clip_lens.read_pairs()[:2], store, encoder)
            >>> torch.equal(batch.moved(batch.other)[:, :3], batch.tokens[:, :3])
            True
        """
        origin, there = (self.inverse, self.tokens) if inverse else (self.origin, self.other)
        if value.shape[-2:] != there.shape:
            text = "run" if inverse else "other"
            raise ValueError(
                f"values of the {text} have the shape [..., {len(there)}, {there.shape[1]}], got {tuple(value.shape)}"
            )
        index = origin.clamp(min=0).expand(*value.shape[:-1], -1)
        return value.gather(-1, index).masked_fill(origin < 0, 0)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of a sha256 over what the batch holds: its texts, how they match, and what judges them.

        The same content gives the same digest, on any device.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> batch = clip_lens.align(clip_lens.read_pairs()[:2], store, encoder)
            >>> batch.digest == batch[[0, 1]].digest != batch.flip().digest
            True
        """
        return digest({name: getattr(self, name) for name in _TENSORS} | {f"slots {self.slots}": torch.empty(0)})

    @property
    def has_direction(self) -> bool:
        """Whether there is a direction to judge along: texts alone have none, and no d."""
        return not bool(self.direction.isnan().any())

    @property
    def unaligned(self) -> Int[Tensor, "pair"]:
        """For each pair, how many positions of the run have no counterpart."""
        return ((self.origin < 0) & self.inside).sum(1)

    @property
    def inside(self) -> Bool[Tensor, "pair pos"]:
        """Which positions belong to the text."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.length[:, None]

    @property
    def shared(self) -> Int[Tensor, "pair"]:
        """For each pair, how many leading tokens the two texts have in common: a causal tower does the same at them."""
        width = min(self.tokens.shape[1], self.other.shape[1])
        return (self.tokens[:, :width] == self.other[:, :width]).int().cumprod(1).sum(1)

    @property
    def slot_rules(self) -> Mapping[str, int]:
        """How many pairs have their slots from which rule, the most frequent first.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> dict(clip_lens.align(clip_lens.read_pairs()[:4], store, encoder).slot_rules)
            {'template_slots': 4}
        """
        return dict(Counter(self.named_by).most_common())

    def __repr__(self) -> str:
        sides = Counter(self.pairs.side)
        counts = ", ".join(f"{sides[side]} {side}" for side in SIDES if sides[side])
        told = [f"run={self.run!r}", f"negation in {counts}" if set(sides) - {"none"} else "", self._named()]
        told += [f"{len(self.dropped)} dropped", f"{self.tokens.shape[1]} positions"]
        return f"Batch({len(self)} pairs of {self.pairs.name}, {', '.join(filter(None, told))})"

    def _named(self) -> str:
        """Which rules named the slots, where one did not name all."""
        counts = [f"{count} by {rule}" for rule, count in self.slot_rules.items()]
        return f"slots of {', '.join(counts)}" if len(counts) > 1 else f"slots by {self.named_by[0]}" if counts else ""

    def _repr_html_(self) -> str:
        reasons = self.dropped.reason.value_counts().to_dict()
        listed = "".join(f"<li>{count} dropped: {escape(str(reason))}</li>" for reason, count in reasons.items())
        return f"<code>{escape(repr(self))}</code><ul>{listed}</ul>"


def _texts(tokens: Int[Tensor, "pair pos"], length: Int[Tensor, "pair"]) -> list[tuple[int, ...]]:
    return [tuple(ids[:end]) for ids, end in zip(tokens.tolist(), length.tolist(), strict=True)]


def align(
    pairs: Pairs,
    images: ImageStore | None,
    encoder: Encoder,
    *,
    run: Run | None = None,
    slots: Slots = None,
    any_store: bool = False,
    against: str | None = None,
) -> Batch:
    """The batch in which each pair's two texts are matched token by token (method, section 3).

    `run` says which text is run and patched: "caption" or "foil" (noising, denoising), or by the side of the negation
    "affirmative" (the paper's choice) or "negated"; None: "affirmative", or "foil" where no pair has a side. Positions
    are matched by a minimum edit-distance alignment of the token ids, of several the one with most equal tokens, then
    the leftmost. Pairs that can't be used are in `batch.dropped` with the reason: no side, an image that is not in the
    store, a text that is too long, texts that are the same to the tokenizer. `any_store=True` accepts image embeddings
    of another model.

    `slots` says what names the tokens: a slot function `(text, other, info) -> spans`, a rule, or several, of which the
    first that fits a pair names it; None: the pairs' columns `slot:NAME`, then `template_slots` for pairs that differ
    in a negation. Pairs that none of them fits are named by `changed_slots`, and `batch.slot_rules` counts which got
    what. A function fits a pair if it gives spans for both texts, or for one, and the other is that text with words
    left out.

    `images=None`: texts alone, without a direction, for what needs none (`metric=cosine`, attention, probes) or until
    `batch.along(w)` gives one. `against` is a column of the pairs with a second image each: texts are then judged along
    `scale * (v_image - v_against)`, how much better they fit the one than the other (method, section 1).

    Raises:
        ValueError: no pair is left (with the reasons), the store belongs to another model or has embeddings of another
            width, pairs without images and a store, no column `against`, an unknown `run`, a name that no slot can
            have, words of a slot that can't be found.
        TypeError: `slots` is no slot function.

    Example:
        >>> encoder, pairs, store = clip_lens.load(), clip_lens.read_pairs(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(pairs[:20], store, encoder)
        >>> len(batch), batch.slots[:4]
        (20, ('sot', 'prefix', 'there', 'be'))
    """
    if run is None:
        run = "affirmative" if set(pairs.side) - {"none"} else "foil"
    if run not in get_args(Run):
        raise ValueError(f"run={run!r}; give one of {', '.join(get_args(Run))}")
    if len(pairs) == 0:
        raise ValueError(f"{pairs.name} has no pairs to align")
    names = _images_of(pairs, images, against)
    if images is not None:
        images.require_of(encoder, any_store=any_store)
    reasons = _unusable(pairs, names, images, encoder, run)
    kept = [index for index, reason in enumerate(reasons) if reason is None]
    captions, foils = encoder.tokenize(pairs[kept].caption), encoder.tokenize(pairs[kept].foil)
    same = (captions == foils).all(1)
    for index in torch.tensor(kept)[same.cpu()].tolist():
        reasons[index] = "caption and foil are the same tokens"
    dropped = pd.DataFrame(
        [(pairs.key[index], reason) for index, reason in enumerate(reasons) if reason], columns=["key", "reason"]
    )
    if len(dropped) == len(pairs):
        if set(dropped.reason) == {NO_SIDE}:
            raise ValueError(
                f"none of the {len(pairs)} pairs of {pairs.name} has a side, which run={run!r} goes by; "
                "give run='foil' or run='caption'"
            )
        counts = "; ".join(f"{count} x {reason}" for reason, count in dropped.reason.value_counts().items())
        hint = "; run='foil' or run='caption' needs no side" if run in ("affirmative", "negated") else ""
        near = "".join(f"; {name!r} may be {known!r}" for name, known in [*_meant(names, images).items()][:1])
        raise ValueError(f"none of the {len(pairs)} pairs of {pairs.name} can be used ({counts}){near}{hint}")
    chosen = [index for index, reason in enumerate(reasons) if reason is None]
    usable = pairs[chosen]
    return _batch(
        usable,
        {"caption": captions[~same], "foil": foils[~same]},
        _directions([[column[index] for index in chosen] for column in names], images, encoder, len(chosen)),
        encoder,
        run,
        slots,
        pd.concat([pairs.dropped, dropped], ignore_index=True),
        "" if images is None else f"{images!r}{'' if against is None else f', each image against its {against}'}",
        "none" if images is None else _joint(images, encoder),
    )


def _images_of(pairs: Pairs, images: ImageStore | None, against: str | None) -> list[Sequence[str]]:
    """The images that each pair needs: none, its own, or its own and the one it is judged against."""
    if images is None:
        if against is not None:
            raise ValueError(f"against={against!r} needs the embeddings of two images, and images=None gives none")
        return []
    if not pairs.has_images:
        raise ValueError(
            f"{pairs.name} has no column image, and a store of images was given; name the image of each pair in a "
            "column image, or give images=None for texts alone"
        )
    if against is None:
        return [pairs.image]
    if against not in pairs.info:
        raise ValueError(f"{pairs.name} has no column {against!r}{close(against, pairs.info.columns)}")
    return [pairs.image, tuple(map(str, pairs.info[against]))]


def _meant(names: Sequence[Sequence[str]], images: ImageStore | None) -> dict[str, str]:
    return {} if images is None else offered([name for column in names for name in column], images.ids)


def _directions(
    names: Sequence[Sequence[str]], images: ImageStore | None, encoder: Encoder, n: int
) -> Float[Tensor, "pair d_embed"]:
    """`scale * v`, or the difference of two images' where there are two; NaN without images."""
    if images is None:
        return torch.full((n, encoder.d_embed), torch.nan, device=encoder.device, dtype=encoder.precision)
    own, *others = (images[column].to(torch.float64) for column in names)
    return (encoder.scale * (own - others[0] if others else own)).to(encoder.device, encoder.precision)


def _joint(images: ImageStore, encoder: Encoder) -> Joint:
    """Whether the images lie in the joint space of the encoder, as far as both sides say."""
    if images.model is None and not (images.digest and encoder.image_digest):
        return "unknown"
    try:
        images.require(model=encoder.name, pretrained=encoder.pretrained, digest=encoder.image_digest)
    except ValueError:
        return "other"
    return "same"


def _unusable(
    pairs: Pairs, names: Sequence[Sequence[str]], images: ImageStore | None, encoder: Encoder, run: Run
) -> list[str | None]:
    """For each pair the first reason not to use it, or None."""
    fits = [a and b for a, b in zip(encoder.fits(pairs.caption), encoder.fits(pairs.foil), strict=True)]
    by_side, meant = run in ("affirmative", "negated"), _meant(names, images)
    needed = zip(*names, strict=True) if names else [()] * len(pairs)
    reasons: list[str | None] = []
    for side, each, short in zip(pairs.side, needed, fits, strict=True):
        missing = [name for name in each if images is not None and name not in images]
        if by_side and side == "none":
            reasons.append(NO_SIDE)
        elif missing:
            repair = "; one named alike is, and pairs.repaired(store) takes it" if missing[0] in meant else ""
            reasons.append(f"image not in the store{repair}")
        else:
            reasons.append(None if short else "a text is longer than the context")
    return reasons


def _batch(
    pairs: Pairs,
    texts: dict[str, Int[Tensor, "pair pos"]],
    direction: Float[Tensor, "pair d_embed"],
    encoder: Encoder,
    run: Run,
    slots: Slots,
    dropped: pd.DataFrame,
    images: str,
    joint: Joint,
) -> Batch:
    foil_runs = torch.tensor([_runs_foil(run, side) for side in pairs.side], device=direction.device)
    whole, whole_other = _directed(texts, foil_runs)
    tokens, other = encoder.cut(whole), encoder.cut(whole_other)
    origin = _origins(tokens, other, encoder)
    naming = name_slots(_matched(pairs, foil_runs, (whole, whole_other), origin, encoder), rules_of(slots))
    return Batch(
        tokens=tokens,
        other=other,
        origin=origin,
        slot=_slot_index(naming, naming.run, tokens, encoder),
        other_slot=_slot_index(naming, naming.other, other, encoder),
        slots=naming.names,
        length=_read_length(tokens, encoder),
        other_length=_read_length(other, encoder),
        direction=direction,
        sigma=torch.where(foil_runs, 1, -1),
        pairs=pairs,
        dropped=dropped,
        run=run,
        images=images,
        joint=joint,
        named_by=naming.by,
    )


def _matched(
    pairs: Pairs,
    foil_runs: Bool[Tensor, "pair"],
    tokens: tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]],
    origin: Int[Tensor, "pair pos"],
    encoder: Encoder,
) -> Matched:
    """What the rules of slots see of the pairs."""
    sides = [("foil", "caption") if foil else ("caption", "foil") for foil in foil_runs.tolist()]
    run, other = (
        Written.by(encoder, which, [getattr(pairs, name)[row] for row, name in enumerate(which)], whole)
        for which, whole in zip(zip(*sides, strict=True), tokens, strict=True)
    )
    return Matched(run, other, [line[:n] for line, n in zip(origin.tolist(), run.length, strict=True)], pairs.key,
                   pairs.side, pairs.info, encoder)  # fmt: skip


def _slot_index(
    naming: Naming, names: Sequence[Names], tokens: Int[Tensor, "pair pos"], encoder: Encoder
) -> Int[Tensor, "pair pos"]:
    """Which slot each token belongs to, -1 = none; the pooled position has its own."""
    number: dict[str | None, int] = {None: -1} | {name: at for at, name in enumerate(naming.names)}
    index = torch.full_like(tokens, -1)
    for row, line in enumerate(names):
        index[row, : len(line)] = torch.tensor([number[name] for name in line], device=index.device)
    index[torch.arange(len(index), device=index.device), encoder.pool(tokens)] = number[ENDS[1]]
    return index


def _read_length(tokens: Int[Tensor, "pair pos"], encoder: Encoder) -> Int[Tensor, "pair"]:
    """How many positions the tower reads: a text's padding too, if it looks ahead or is pooled behind the text."""
    length = encoder.length(tokens)
    if encoder.causal and bool((encoder.pool(tokens) < length).all()):
        return length
    return torch.full_like(length, tokens.shape[1])


def _directed(texts: dict[str, Tensor], foil_runs: Bool[Tensor, "pair"]) -> tuple[Tensor, Tensor]:
    """Caption and foil -> run and other."""
    caption, foil = texts["caption"], texts["foil"]
    return torch.where(foil_runs[:, None], foil, caption), torch.where(foil_runs[:, None], caption, foil)


def _runs_foil(run: Run, side: str) -> bool:
    if run in ("caption", "foil"):
        return run == "foil"
    return (side == "foil") == (run == "negated")


def _origins(
    tokens: Int[Tensor, "pair pos"], other: Int[Tensor, "pair pos_other"], encoder: Encoder
) -> Int[Tensor, "pair pos"]:
    origin = torch.full_like(tokens, -1)
    lengths = zip(encoder.length(tokens).tolist(), encoder.length(other).tolist(), strict=True)
    pooled = zip(encoder.pool(tokens).tolist(), encoder.pool(other).tolist(), strict=True)
    for row, ((n, m), (p, q)) in enumerate(zip(lengths, pooled, strict=True)):
        run_ids, other_ids = tokens[row].tolist(), other[row].tolist()
        matched = match_tokens(run_ids[:n], other_ids[:m])
        origin[row, :n] = torch.tensor(matched, device=origin.device)
        if not encoder.causal or p >= n or q >= m:
            pads = min(tokens.shape[1] - n, other.shape[1] - m)
            if pads:
                origin[row, -pads:] = torch.arange(other.shape[1] - pads, other.shape[1], device=origin.device)
        origin[row, (origin[row] == q).nonzero().flatten()] = -1
        origin[row, p] = q
    return origin


def match_tokens(run: Sequence[int], other: Sequence[int]) -> list[int]:
    """For each token of the run the position of its counterpart in `other`, -1 = none.

    A minimum edit-distance alignment, of several the one with most equal tokens, then the leftmost (method, section 3).
    Where either text could be matched further left, the lower token id is left out: swapping the texts inverts the
    alignment.

    Example:
        >>> match_tokens([1, 5, 6, 9], [1, 5, 7, 6, 9])
        [0, 1, 3, 4]
        >>> match_tokens([1, 5, 7, 6, 9], [1, 5, 6, 9])
        [0, 1, -1, 2, 3]
    """
    n, m = len(run), len(other)
    # cost[i][j]: (edits, - equal tokens) of the best alignment of what is left of run[i:] and other[j:]
    cost = [[(0, 0)] * (m + 1) for _ in range(n + 1)]
    for i in range(n, -1, -1):
        for j in range(m, -1, -1):
            if i < n or j < m:
                cost[i][j] = min(_steps(run, other, cost, i, j))[:2]
    matched, i, j = [-1] * n, 0, 0
    while i < n and j < m:
        *_, in_run, in_other = min(_steps(run, other, cost, i, j))
        if in_run and in_other:
            matched[i] = j
        i, j = i + in_run, j + in_other
    return matched


def _steps(
    run: Sequence[int], other: Sequence[int], cost: list[list[tuple[int, int]]], i: int, j: int
) -> list[tuple[int, int, int, int, int]]:
    """What it costs to match, to leave out a token of the run or one of the other, and where that leads.

    (edits, - equal tokens, the token left out or -1, how far it goes in the run, in the other): the least is the best.
    """
    steps = []
    if i < len(run) and j < len(other):
        edits, equal = cost[i + 1][j + 1]
        same = run[i] == other[j]
        steps.append((edits + (not same), equal - same, -1, 1, 1))
    if i < len(run):
        steps.append((cost[i + 1][j][0] + 1, cost[i + 1][j][1], run[i], 1, 0))
    if j < len(other):
        steps.append((cost[i][j + 1][0] + 1, cost[i][j + 1][1], other[j], 0, 1))
    return steps
