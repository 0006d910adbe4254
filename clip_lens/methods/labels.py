"""`labels`: the images and texts of a bank that a head's or a neuron's output points to and from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.precision import precise
from clip_lens.data.batch import Batch
from clip_lens.data.images import ImageStore
from clip_lens.methods.reading import PAIRS_AT_ONCE, block_of, observe, read_out, stream_name
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Site, hook_name

Of = Literal["variance", "contrast", "mean"]
COLUMNS = ("place", "layer", "unit", "of", "share", "end", "kind", "rank", "id", "score")
SCORES_AT_ONCE = 2**24


class Bank(NamedTuple):
    """Things with an embedding in the joint space: what they are, their names, their unit embeddings."""

    kind: Literal["image", "text"]
    ids: Sequence[str]
    rows: Float[Tensor, "item d_embed"]


class Direction(NamedTuple):
    """Where a place's output points in the joint space (a unit vector), and how much of what it writes lies there."""

    vector: Float[Tensor, "d_embed"]
    share: float


def labels(
    encoder: HookedTextEncoder,
    places: Iterable[Site],
    *,
    images: ImageStore | None = None,
    texts: Sequence[str] = (),
    batch: Batch | None = None,
    of: Of = "variance",
    n: int = 5,
    centred: bool = True,
    any_store: bool = False,
) -> DataFrame:
    """The n images and the n texts of a bank that each head or neuron points to, and the n that it points from.

    What a place writes at the pooled position reaches the joint space through the final LayerNorm's gamma, centred, and
    the projection. A neuron writes along one line: its row of W_out, "to" where it is active. A head
    writes something else for each text; over both texts of every pair of `batch`, each divided by its own std and norm
    as in `direct_effects`, its direction is

    - `of="variance"`: the first principal component, what the head tells apart. Of its two ends "to" is the one to
      which the other texts lie from the runs. The default: what a head writes for every text alike moves no difference
      between texts, but would decide the labels of the mean.
    - `of="contrast"`: the mean over pairs of other - run, whose product with w is the head's mean direct effect.
    - `of="mean"`: the mean over all texts.

    `share` is the part of the mean square of what the head writes (of the differences for "contrast", around the mean
    for "variance") that lies along the direction: labels of a small share say little. A neuron's is 1.

    `score` is the cosine of direction and embedding, `centred` after the bank's own mean (of images, of texts) is
    taken from its embeddings: CLIP's embeddings lie in two narrow cones, and what they share ranks nothing.
    Columns: place, layer, unit, of, share, end ("to" or "from"), kind ("image" or "text"), rank from 1, id, score.

    Raises:
        ValueError: no places or no bank, a place that is no single head or neuron of this encoder, a head without
            `batch`, an unknown `of`, n below 1, a store of another model or width (`any_store=True` allows another
            model), a bank too small to be centred, or a head that writes the same for every text.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> found = labels(encoder, encoder.sites("head", layers=[5]), images=store, batch=batch, n=2)
        >>> [" ".join(map(str, line)) for line in found[["place", "end", "kind", "rank"]].head(3).to_numpy()]
        ['head 5.0 to image 1', 'head 5.0 to image 2', 'head 5.0 from image 1']
    """
    places = tuple(places)
    _check(places, encoder, batch, of, n)
    banks = [_centred(bank) if centred else bank for bank in _banks(encoder, images, texts, any_store)]
    directions = _directions(encoder, places, batch, of)
    vectors = torch.stack([direction.vector for direction in directions])
    lines: list[tuple[object, ...]] = []
    found = [_ends(bank, vectors, n) for bank in banks]
    for number, (place, direction) in enumerate(zip(places, directions, strict=True)):
        said = (str(place), place.layer, place.unit, "weight" if place.kind == "neuron" else of, direction.share)
        lines += [(*said, *line) for ends in found for line in ends[number]]
    return DataFrame(lines, columns=list(COLUMNS))


def _check(places: Sequence[Site], encoder: HookedTextEncoder, batch: Batch | None, of: Of, n: int) -> None:
    if not places:
        raise ValueError("no places to label; encoder.sites('head') lists some")
    for place in places:
        single = isinstance(place, Site) and place.kind in ("head", "neuron") and place.unit is not None
        if not single or place.slot is not None:
            raise ValueError(f"{place} has no label: give a head or a neuron without slot, such as Site('head', 2, 3)")
        if place.layer >= encoder.n_layers or place.unit not in encoder.units(place.kind):
            units = len(list(encoder.units(place.kind)))
            raise ValueError(
                f"{place}: {encoder.name} has {place.kind} units 0..{units - 1} at layers 0..{encoder.n_layers - 1}"
            )
    if of not in get_args(Of):
        raise ValueError(f"of={of!r}; give one of {', '.join(get_args(Of))}")
    if n < 1:
        raise ValueError(f"n={n}: at least one label at each end")
    if batch is None and any(place.kind == "head" for place in places):
        raise ValueError("what a head writes depends on the texts: give batch=")


# The bank


def _banks(encoder: HookedTextEncoder, images: ImageStore | None, texts: Sequence[str], any_store: bool) -> list[Bank]:
    banks = []
    if images is not None:
        images.require_of(encoder, any_store=any_store)
        banks.append(Bank("image", images.ids, precise(images[images.ids].to(encoder.device))))
    if isinstance(texts, str):
        raise ValueError(f"texts must be a sequence of texts, got the text {texts!r}; write [{texts!r}]")
    if texts := list(dict.fromkeys(texts)):
        with torch.inference_mode():
            rows = [encoder(texts[start : start + PAIRS_AT_ONCE]) for start in range(0, len(texts), PAIRS_AT_ONCE)]
        banks.append(Bank("text", texts, precise(torch.cat(rows))))
    if not any(len(bank.ids) for bank in banks):
        raise ValueError("no bank to take labels from; give images=ImageStore.open(...) or texts=[...]")
    return banks


def _centred(bank: Bank) -> Bank:
    if len(bank.ids) < 2:
        raise ValueError(
            f"a bank of {len(bank.ids)} {bank.kind} has nothing around its mean; give more, or centred=False"
        )
    return bank._replace(rows=bank.rows - bank.rows.mean(0))


def _ends(bank: Bank, vectors: Float[Tensor, "place d_embed"], n: int) -> list[list[tuple[object, ...]]]:
    """For each direction the lines (end, kind, rank, id, score) of the n highest cosines and of the n lowest."""
    rows, n = torch.nn.functional.normalize(bank.rows, dim=1), min(n, len(bank.ids))
    lines: list[list[tuple[object, ...]]] = []
    for part in vectors.split(max(1, SCORES_AT_ONCE // len(rows))):
        scores = part @ rows.T
        to, from_ = scores.topk(n), scores.topk(n, largest=False)
        for place in range(len(part)):
            ends = {"to": (to[0][place], to[1][place]), "from": (from_[0][place], from_[1][place])}
            lines.append([line for end, best in ends.items() for line in _ranked(bank, end, *best)])
    return lines


def _ranked(bank: Bank, end: str, scores: Tensor, items: Tensor) -> list[tuple[object, ...]]:
    found = zip(items.tolist(), scores.tolist(), strict=True)
    return [(end, bank.kind, rank, bank.ids[item], score) for rank, (item, score) in enumerate(found, 1)]


# Directions


def _directions(encoder: HookedTextEncoder, places: Sequence[Site], batch: Batch | None, of: Of) -> list[Direction]:
    heads = sorted({place.layer for place in places if place.kind == "head"})
    written = _written(encoder, batch, heads) if batch is not None and heads else {}
    found = []
    for place in places:
        joint = _to_joint(encoder, _outputs(encoder, place))
        if place.kind == "neuron":
            found.append(Direction(torch.nn.functional.normalize(joint, dim=0), 1.0))
        else:
            run, other = written[place.layer][:, :, place.unit]
            found.append(_direction(place, run, other, joint, of))
    return found


def _outputs(encoder: HookedTextEncoder, place: Site) -> Float[Tensor, "d_head d_model"] | Float[Tensor, "d_model"]:
    """The row of W_out along which a neuron writes, or the rows of W_O of a head."""
    block = block_of(encoder, place.layer)
    return block.mlp.W_out[place.unit] if place.kind == "neuron" else block.attn.W_O[place.unit]


def _to_joint(encoder: HookedTextEncoder, written: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_embed"]:
    """`W_U^T (gamma * (a - mean(a)))`: what is written, in the joint space, but for the norms."""
    tower = encoder.tower
    centred = precise(written) - precise(written).mean(-1, keepdim=True)
    return (precise(tower.ln_final.w) * centred) @ precise(tower.W_U)


def _written(
    encoder: HookedTextEncoder, batch: Batch, layers: Sequence[int]
) -> dict[int, Float[Tensor, "text pair head d_head"]]:
    """By layer what each head has at the pooled position, over std * norm: of the runs, and of the other texts."""
    names = {layer: hook_name(Site("head", layer), encoder.n_layers) for layer in layers}
    last = stream_name(encoder)
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with torch.inference_mode():
        for tokens in (*batch.tokens.split(PAIRS_AT_ONCE), *batch.other.split(PAIRS_AT_ONCE)):
            seen = observe(encoder, encoder.cut(tokens), [last, *names.values()])
            std, y = read_out(encoder, seen[last])
            scale = std * y.norm(dim=-1)
            for layer, name in names.items():
                parts[layer].append(seen[name] / scale[:, None, None])
    return {layer: torch.cat(parts[layer]).unflatten(0, (2, -1)) for layer in layers}


def _direction(
    place: Site,
    run: Float[Tensor, "pair d_head"],
    other: Float[Tensor, "pair d_head"],
    joint: Float[Tensor, "d_head d_embed"],
    of: Of,
) -> Direction:
    """A head's direction in the joint space, from its z of both texts of every pair."""
    both = torch.cat([run, other])
    shown = {"mean": both, "contrast": other - run, "variance": both - both.mean(0)}[of]
    size = (shown @ joint).square().sum(1).mean()
    if size <= (10 * torch.finfo(size.dtype).eps) ** 2 * (both @ joint).square().sum(1).mean():
        raise ValueError(f"{place} writes the same for every text of the batch; of='mean' has a direction for it")
    vector = _principal(shown, joint, other - run) if of == "variance" else shown.mean(0) @ joint
    vector = torch.nn.functional.normalize(vector, dim=0)
    return Direction(vector, float((shown @ (joint @ vector)).square().mean() / size))


def _principal(
    spread: Float[Tensor, "text d_head"], joint: Float[Tensor, "d_head d_embed"], change: Float[Tensor, "pair d_head"]
) -> Float[Tensor, "d_embed"]:
    """The first principal component of `spread @ joint`, turned to where the other texts lie from the runs."""
    # spread = Q R with orthonormal Q, so that R @ joint, which is small, has the same right singular vectors.
    first = torch.linalg.svd(torch.linalg.qr(spread).R @ joint, full_matrices=False).Vh[0]
    return first if (change @ (joint @ first)).mean() >= 0 else -first
