"""What must be known before any number of a report: what follows from the results themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from clip_lens.core.effects import Effects

FEW_PAIRS = 20
"""Pairs below which a bootstrap over them is not to be trusted."""


def cautions_of(results: Iterable[Effects]) -> list[str]:
    """What must be known before any number of these results: hooks that were on, notes of the encoder's, few pairs.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> [caution[:34] for caution in cautions_of([toy_effects()])]
        ['Only 3 pairs: intervals over so fe']
    """
    given = list(results)
    said = [line for effects in given for line in _of_the_run(effects)]
    counts = sorted({effects.pairs["key"].nunique() for effects in given})
    return list(dict.fromkeys([*said, *(few_pairs(count) for count in counts if count < FEW_PAIRS)]))


def few_pairs(count: int) -> str:
    """The caution that results on so few pairs need.

    Example:
        >>> few_pairs(4)[:12]
        'Only 4 pairs'
    """
    return f"Only {count} pairs: intervals over so few pairs are too narrow to be trusted; below five there is none."


def hooks_on(names: Sequence[str]) -> str:
    """The caution that results under hooks of the user's need.

    Example:
        >>> hooks_on(["blocks.0.hook_mlp_out"])[:60]
        'The tower had hooks of yours on, at blocks.0.hook_mlp_out: t'
    """
    return f"The tower had hooks of yours on, at {', '.join(names)}: the numbers are those under them."


def _of_the_run(effects: Effects) -> Iterator[str]:
    if effects.record.hooks:
        yield hooks_on(effects.record.hooks)
    yield from effects.record.notes
