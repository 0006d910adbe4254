"""Groups of entries that must stay together when a set is split in two. No tensors, no model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

SplitBy = Literal["image", "text"]


def connected(things: Iterable[Iterable[Hashable]]) -> Int[ndarray, "entry"]:
    """The group of each entry, from its things: entries that have a thing in common are of one group, as are those that
    a chain of such entries connects. Groups are numbered in the order of their first entries.

    Example:
        >>> connected([("a", "b"), ("c", "d"), ("e",), ("b", "c"), ()]).tolist()
        [0, 0, 1, 0, 2]
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    things = list(things)
    number: dict[Hashable, int] = {}
    links = [(entry, number.setdefault(thing, len(number))) for entry, having in enumerate(things) for thing in having]
    entry, thing = np.array(links, dtype=int).reshape(-1, 2).T
    n = len(things)
    graph = coo_matrix((np.ones(len(links)), (entry, n + thing)), shape=(n + len(number),) * 2)
    component = connected_components(graph, directed=False)[1][:n]
    _, first, group = np.unique(component, return_index=True, return_inverse=True)
    return first.argsort().argsort()[group]


def first_part(
    images: Sequence[str],
    texts: Iterable[Iterable[Hashable]],
    fraction: float,
    seed: int,
    by: SplitBy,
    questions: Sequence[str] | None = None,
) -> Bool[ndarray, "pair"]:
    """Which pairs are in the first of two parts, which has about `fraction` of them; groups of pairs stay together.

    A group is the pairs of one image, or by text those that a chain of common texts and images connects; either way the
    pairs of one question are of one group. An empty image is none. The part comes as close to the fraction as groups of
    these sizes can, and so does its share of the larger groups; which ones of a size it has is drawn at random by
    `seed`. Neither part is empty.

    Raises:
        ValueError: `fraction` isn't between 0 and 1, an unknown `by`, by image where there are none, or fewer than two
            groups.

    Example:
        >>> images, texts = "abcd", [("a cat", "no cat"), ("a dog", "no dog"), ("a cat", "a dog"), ("a rat", "no rat")]
        >>> first_part(images, texts, 0.5, seed=0, by="text").tolist()
        [False, False, False, True]
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    if by not in get_args(SplitBy):
        raise ValueError(f"by={by!r}; a split is by one of {', '.join(get_args(SplitBy))}")
    if by == "image" and not all(images):
        raise ValueError("these pairs have no images to split by; split by='text'")
    if by == "image" and questions is None:
        group = np.unique(np.array(images, dtype=object), return_inverse=True)[1]
    else:
        group = connected(_things(images, texts if by == "text" else [()] * len(images), questions))
    sizes = np.bincount(group)
    if len(sizes) < 2:
        what = "images" if by == "image" else "groups that share neither text nor image"
        raise ValueError(f"a split by {by} needs pairs of at least 2 {what}, got {len(group)} pairs of {len(sizes)}")
    wanted = _how_many(sizes, fraction)
    order = np.random.default_rng(seed).permutation(len(sizes))
    taken = [order[sizes[order] == size][:many] for size, many in wanted.items()]
    return np.isin(group, np.concatenate(taken))


def _things(
    images: Sequence[str], texts: Iterable[Iterable[Hashable]], questions: Sequence[str] | None
) -> Iterator[list[tuple[str, Hashable]]]:
    """What each pair may have in common with others."""
    asked = [[("question", question)] for question in questions] if questions is not None else [[]] * len(images)
    for image, both, question in zip(images, texts, asked, strict=True):
        yield [*([("image", image)] if image else []), *(("text", text) for text in both), *question]


def _how_many(sizes: Int[ndarray, "group"], fraction: float) -> dict[int, int]:
    """How many groups of each size to take: together as close to the fraction as can be, and so the large ones."""
    reached, sums = [1], 1  # a number whose bit t says whether some of the groups have t entries together
    counted = list(zip(*(found.tolist() for found in np.unique(sizes, return_counts=True)), strict=True))
    for size, count in counted:
        for multiple in _adding_to(count):
            sums |= sums << (size * multiple)
        reached.append(sums)
    left = min((t for t in range(1, sizes.sum()) if sums >> t & 1), key=lambda t: abs(t - fraction * sizes.sum()))
    wanted = {}
    for (size, count), before in reversed(list(zip(counted, reached, strict=False))):
        possible = [many for many in range(min(count, left // size) + 1) if before >> (left - many * size) & 1]
        wanted[size] = min(possible, key=lambda many: abs(many - fraction * count))
        left -= size * wanted[size]
    return wanted


def _adding_to(count: int) -> list[int]:
    """Numbers that add up to `count`, and some of them to every number below: 5 -> 1, 2, 2."""
    found: list[int] = []
    while count > sum(found):
        found.append(min(1 << len(found), count - sum(found)))
    return found
