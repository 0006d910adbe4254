"""What must be known before any number of a report: what follows from the results themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from clip_lens.core.effects import Effects
from clip_lens.words import counted

FEW_PAIRS = 20
"""Pairs below which a bootstrap over them is not to be trusted."""


def cautions_of(results: Mapping[str, Effects]) -> list[str]:
    """What must be known before any number of these results, by name: hooks that were on, notes of the encoder's, few
    pairs.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> [caution[:34] for caution in cautions_of({"resid": toy_effects()})]
        ['Only 3 pairs: intervals over so fe']
    """
    said = [line for effects in results.values() for line in _of_the_run(effects)]
    return list(dict.fromkeys([*said, *_of_few(results)]))


def few_pairs(count: int, where: str = "") -> str:
    """The caution that results on so few pairs need.

    Example:
        >>> few_pairs(4)[:12], few_pairs(4, "heads")[:21]
        ('Only 4 pairs', 'Only 4 pairs in heads')
    """
    words = f"Only {counted(count, 'pair')}{f' in {where}' if where else ''}"
    return f"{words}: intervals over so few pairs are too narrow to be trusted; below five there is none."


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


def _of_few(results: Mapping[str, Effects]) -> Iterator[str]:
    """A line for each number of pairs that is small, with the names of its results where others have another one."""
    counts = {name: effects.pairs["key"].nunique() for name, effects in results.items()}
    for count in sorted(set(counts.values())):
        names = [name for name, number in counts.items() if number == count]
        if count < FEW_PAIRS:
            yield few_pairs(count, "" if len(names) == len(counts) else ", ".join(names))
