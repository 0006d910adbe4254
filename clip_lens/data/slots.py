"""Slots: which words of a text are one place, and what that is called.

A *slot function* says of one text where its slots end, in characters. A *slot rule* names the tokens of both texts of
every pair; a function becomes one, `changed_slots` is one. Of several rules the first that fits a pair names it.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from itertools import groupby, pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from clip_lens.words import counted, some

SLOTS = ("sot", "prefix", "there", "be", "negator", "subject", "subject_rest", "suffix", "stop", "eot")
"""The slots of `template_slots`, in the order of the text."""
CHANGED = ("sot", "before", "changed", "between", "after", "eot")
"""The slots of `changed_slots`, in the order of the text."""
ENDS = ("sot", "eot")
"""The slots that texts have whichever rule names the others: start token and pooled position."""
REST = {"subject": "subject_rest"}
"""Of a span with such a name the first token alone has it; the others have this one."""
DETERMINERS = "no|some|an?|any"
COLUMN = "slot:"
"""How the columns of a pairs file begin that name the words of a slot."""

Spans: TypeAlias = Sequence[tuple[int, str | None]]
SlotFunction: TypeAlias = Callable[[str, str, Mapping[str, Any]], Spans | None]
"""(a text, the other text of its pair, the pair's further columns) -> where its slots end in characters, and their
names (None: no slot), left to right; None: it knows no slots of such a text."""
Names: TypeAlias = list[str | None]
"""The slot of each token of a text, None = no slot."""
Named: TypeAlias = tuple[list[Names | None], list[Names | None]]
"""The names of the runs' tokens and of the others', None where a rule doesn't fit the text."""


class Tokenizes(Protocol):
    """What naming tokens needs of an encoder."""

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "pair pos"]: ...
    def length(self, tokens: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair"]: ...


@dataclass(frozen=True)
class Written:
    """One text of each pair: whether it is the caption or the foil, its words and its tokens.

    Its words' tokens go from `first` to before `end`; what is behind `length` is padding.
    """

    which: Sequence[str]
    text: Sequence[str]
    tokens: Int[Tensor, "pair pos"]
    first: Sequence[int]
    end: Sequence[int]
    length: Sequence[int]

    @classmethod
    def by(
        cls, encoder: Tokenizes, which: Sequence[str], text: Sequence[str], tokens: Int[Tensor, "pair pos"]
    ) -> Written:
        """Texts as an encoder's tokenizer wrote them: what it puts before and behind every text stands in the tokens of
        the empty one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            empty = encoder.tokenize([""])
        first, length = _common(empty, tokens), encoder.length(tokens)
        end = length - (encoder.length(empty) - first)
        return cls(which, text, tokens, first.tolist(), end.tolist(), length.tolist())

    def __len__(self) -> int:
        return len(self.text)

    def ids(self, row: int) -> list[int]:
        """The tokens of one text, without padding."""
        found: list[int] = self.tokens[row, : self.length[row]].tolist()
        return found

    def of(self, rows: Sequence[int]) -> Written:
        """Some of the texts."""
        which, text, *numbers = (
            [column[row] for row in rows] for column in (self.which, self.text, self.first, self.end, self.length)
        )
        return Written(which, text, self.tokens[list(rows)], *numbers)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Matched:
    """What a slot rule sees: both texts of every pair, for each unpadded token of the run the position of its
    counterpart in the other (-1 = none), and which text has the negation ("caption", "foil" or "none")."""

    run: Written
    other: Written
    origin: Sequence[Sequence[int]]
    key: Sequence[str]
    side: Sequence[str]
    info: pd.DataFrame
    encoder: Tokenizes

    def __len__(self) -> int:
        return len(self.key)

    def of(self, rows: Sequence[int]) -> Matched:
        """Some of the pairs."""
        origin, key, side = ([each[row] for row in rows] for each in (self.origin, self.key, self.side))
        info = self.info.iloc[list(rows)]
        return Matched(self.run.of(rows), self.other.of(rows), origin, key, side, info, self.encoder)  # type: ignore[arg-type]

    def pairs(self, row: int) -> list[tuple[int, int]]:
        """The positions that are matched in one pair, of the run and of the other, left to right."""
        end = self.other.length[row]
        return [(at, to) for at, to in enumerate(self.origin[row]) if 0 <= to < end]


class SlotRule:
    """Names the tokens of both texts of pairs, where it fits them.

    `title` is how a batch counts the pairs that it named. `names` are all its slots in the order of the text; where it
    doesn't say, they come in the order in which they stand in the texts on average.
    """

    def __init__(self, function: Callable[[Matched], Named], title: str, names: Sequence[str] = ()) -> None:
        update_wrapper(self, function)
        self.function, self.title, self.names = function, title, tuple(names)

    def __call__(self, pairs: Matched) -> Named:
        return self.function(pairs)

    def __repr__(self) -> str:
        return f"SlotRule({self.title})"


def rule(title: str, names: Sequence[str] = ()) -> Callable[[Callable[[Matched], Named]], SlotRule]:
    """Makes a slot rule of a function."""
    return lambda function: SlotRule(function, title, names)


@dataclass(frozen=True)
class Naming:
    """The slots of some pairs: all names in order, those of each token of the runs and of the others, and which rule
    named each pair."""

    names: tuple[str, ...]
    run: list[Names]
    other: list[Names]
    by: tuple[str, ...]


def name_slots(pairs: Matched, rules: Sequence[SlotRule]) -> Naming:
    """The slots of pairs, each named by the first rule that fits it.

    A rule fits a pair if it knows the slots of both its texts, or those of one, and the other one is that text with
    tokens left out: then its words have the names that they have there. The last rule must fit every pair.
    """
    left, by = list(range(len(pairs))), [""] * len(pairs)
    run: list[Names] = [[] for _ in left]
    other: list[Names] = [[] for _ in left]
    used: list[tuple[SlotRule, list[Names]]] = []
    for each in rules:
        part = pairs.of(left)
        texts: list[Names] = []
        for row, number, names in zip(range(len(left)), left, zip(*each(part), strict=True), strict=True):
            both = _both(part, row, *names)
            if both is not None:
                run[number], other[number] = both
                by[number] = each.title
                texts += both
        left = [number for number in left if not by[number]]
        if texts:
            used.append((each, texts))
        if not left:
            break
    return Naming(_ordered(used), run, other, tuple(by))


def _both(pairs: Matched, row: int, run: Names | None, other: Names | None) -> tuple[Names, Names] | None:
    """The names of both texts of a pair, carried over to the one that a rule doesn't know where that can't be wrong."""
    matched = pairs.pairs(row)
    if run is None and other is not None:
        run = _carried(other, pairs.other.ids(row), pairs.run.ids(row), dict(matched))
    elif other is None and run is not None:
        other = _carried(run, pairs.run.ids(row), pairs.other.ids(row), {to: at for at, to in matched})
    return None if run is None or other is None else (_begun(pairs.run, row, run), _begun(pairs.other, row, other))


def _begun(written: Written, row: int, names: Names) -> Names:
    """Names with those of the tokens that the tokenizer puts before every text."""
    first = written.first[row]
    return [*[ENDS[0]] * first, *names[first:]]


def _carried(names: Names, named: list[int], shorter: list[int], origin: Mapping[int, int]) -> Names | None:
    """The names of a text's tokens for one that is that text with tokens left out; None if it is something else."""
    same = all(at in origin and named[origin[at]] == token for at, token in enumerate(shorter))
    return [names[origin[at]] for at in range(len(shorter))] if same else None


def _ordered(used: Sequence[tuple[SlotRule, list[Names]]]) -> tuple[str, ...]:
    """All slots in the order of the text: rule by rule, between those that every text has."""
    names = [name for each, texts in used for name in each.names or _as_they_stand(texts)]
    first, last = ENDS
    return (first, *(name for name in dict.fromkeys(names) if name not in ENDS), last)


def _as_they_stand(texts: Iterable[Names]) -> list[str]:
    """Names by where their tokens stand on average; names of the template in its order, where there are no others."""
    positions: dict[str, list[int]] = defaultdict(list)
    for names in texts:
        for at, name in enumerate(names):
            if name is not None:
                positions[name].append(at)
    if set(positions) <= set(SLOTS):
        return [name for name in SLOTS if name in positions]
    return sorted(positions, key=lambda name: float(np.mean(positions[name])))


def order_of(seen: Iterable[Any], known: Sequence[str] = ()) -> list[str]:
    """Slots in the order of the text: by the names that are known, those of a batch, else those built in; others come
    as they are seen, before the end of the text.

    Example:
        >>> order_of(["eot", "changed", "verb", "sot"])
        ['sot', 'changed', 'verb', 'eot']
        >>> order_of(["eot", "verb", "colour"], ("sot", "colour", "verb", "eot"))
        ['colour', 'verb', 'eot']
    """
    first, last = ENDS
    inner = [name for name in (*known, *SLOTS, *CHANGED) if name not in ENDS]
    names = list(dict.fromkeys(name for name in seen if isinstance(name, str)))
    return [name for name in dict.fromkeys((first, *inner, *(n for n in names if n != last), last)) if name in names]


# Rules


@rule("changed_slots", CHANGED)
def changed_slots(pairs: Matched) -> Named:
    """The slots `before`, `changed`, `between` and `after` of any pair of texts, from their alignment token by token.

    `changed` are the tokens that differ from their counterpart or have none, `before` and `after` are the tokens on
    either side, and where several spans change, `between` is what stands between them. Where one text has words more,
    they are `changed` in it, and the other one has no token there: its `before` ends where they are missing. Every
    token that is no padding has exactly one slot, `sot` and `eot` among them, and tokens that are matched and equal
    have the same in both texts. A value for `align(..., slots=)`, and what names the pairs that no other rule fits.

    Example:
        >>> from clip_lens.data.pairs import Pairs
        >>> texts = ["a red circle and a blue square"], ["a blue circle and a red square"]
        >>> pairs, store = Pairs(["a"], *texts, clip_lens.read_pairs().image[:1]), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(pairs, store, clip_lens.load(), run="foil", slots=changed_slots)
        >>> [batch.slots[number] for number in batch.slot[0].tolist()]
        ['sot', 'before', 'changed', 'between', 'between', 'between', 'changed', 'after', 'eot']
    """
    rows = range(len(pairs))
    named = [changed_names(pairs.run.ids(row), pairs.other.ids(row), pairs.pairs(row)) for row in rows]
    return [run for run, _ in named], [other for _, other in named]


def changed_names(run: Sequence[int], other: Sequence[int], matched: Sequence[tuple[int, int]]) -> tuple[Names, Names]:
    """The names of `changed_slots` for the tokens of two texts, from the positions that are matched.

    Example:
        >>> changed_names([1, 5, 6, 7, 9], [1, 5, 8, 9], [(0, 0), (1, 1), (2, 2), (4, 3)])
        (['before', 'before', 'changed', 'changed', 'after'], ['before', 'before', 'changed', 'after'])
    """
    spans = [(same, list(span)) for same, span in groupby(_edits(run, other, matched), lambda edit: edit[2])]
    changed = [number for number, (same, _) in enumerate(spans) if not same] or [len(spans)]
    names: tuple[Names, Names] = [None] * len(run), [None] * len(other)
    for number, (same, span) in enumerate(spans):
        name = "before" if number < changed[0] else "after" if number > changed[-1] else "between"
        for *ends, _ in span:
            for text, at in zip(names, ends, strict=True):
                if at is not None:
                    text[at] = name if same else "changed"
    return names


def _edits(
    run: Sequence[int], other: Sequence[int], matched: Sequence[tuple[int, int]]
) -> Iterator[tuple[int | None, int | None, bool]]:
    """What stands in either text, left to right: a position of the run, one of the other, and whether both are the same
    token. What only one of them has comes before what they have in common."""
    i = j = 0
    for p, q in [*matched, (len(run), len(other))]:
        yield from ((at, None, False) for at in range(i, p))
        yield from ((None, at, False) for at in range(j, q))
        if p < len(run):
            yield p, q, run[p] == other[q]
        i, j = p + 1, q + 1


def template_slots(text: str, other: str = "", info: Mapping[str, Any] | None = None) -> Spans | None:
    """Where the slots of "There is/are NEGATOR subject ... ." end in a text, left to right (method, section 2).

    The negator's place is that of no/some/a/an/any. With a `subject` in `info`, the noun phrase as it stands in the
    text, the negator is the word before it and the words behind it are the suffix; words before the negator that are
    not "there is/are" are `prefix`. Without it the subject runs to the full stop. None: no template fits.
    Of the subject's first word `align` gives the first token to `subject`, the others to `subject_rest`.

    Example:
        >>> template_slots("There are no red circles.")
        [(5, 'there'), (9, 'be'), (12, 'negator'), (16, 'subject'), (24, 'subject_rest'), (25, 'stop')]
        >>> template_slots("We can see no stars in the picture.", info={"subject": "stars"})[-3:]
        [(19, 'subject'), (34, 'suffix'), (35, 'stop')]
    """
    subject = (info or {}).get("subject")
    if isinstance(subject, str) and subject:
        before, rest = r".*?", rf"(?P<subject>{re.escape(subject)})\b(?P<suffix>.*?)"
    else:
        before, rest = r".*?\bthere\s+(?:is|are)\s+", r"(?P<subject>.*?)(?P<suffix>)"
    pattern = rf"^(?P<before>{before})\b(?P<negator>{DETERMINERS})\s+{rest}(?P<stop>[.!?]?\s*)$"
    match = re.match(pattern, text, re.IGNORECASE | re.DOTALL)
    if match is None or not match["subject"].strip():
        return None
    first = len(match["subject"].split()[0])
    there = re.search(r"\b(there)\s+(is|are)\b", match["before"], re.IGNORECASE)
    start = [(match.end("before"), "prefix")]
    if there:
        start = [(there.start(1), "prefix"), (there.end(1), "there"), (there.end(2), "be"), *start]
    ends = [
        *start,
        (match.end("negator"), "negator"),
        (match.start("subject") + first, "subject"),
        (match.end("subject"), "subject_rest"),
        (match.end("suffix"), "suffix"),
        (match.end("stop"), "stop"),
    ]
    return _filled(text, ends)


def _filled(text: str, ends: Spans) -> list[tuple[int, str | None]]:
    """The spans that hold a character that is not white space."""
    spans, start = [], 0
    for end, name in ends:
        if text[start:end].strip():
            spans.append((end, name))
            start = end
    return spans


def word_slots(words: Mapping[str, Iterable[str]], *, numbered: bool = False) -> SlotFunction:
    """A slot function that names words by lists of them: every word of a list is in the slot of its name.

    With `numbered` the first such word of a text is in `NAME_1`, the second in `NAME_2`. Words are found whole,
    whatever their case; an entry may be several words, of which the longest that fits counts. Other words have no
    slot; a text that has none of them is left to the next rule.

    Raises:
        ValueError: a name that can't be a slot's, no words, or a word that stands in two lists.

    Example:
        >>> word_slots({"colour": ["red", "blue"], "thing": ["circle"]})("A red circle.", "A blue circle.", {})
        [(2, None), (5, 'colour'), (6, None), (12, 'thing')]
    """
    name_of = {" ".join(word.lower().split()): name for name, every in words.items() for word in _list_of(every)}
    count = sum(len(set(_list_of(every))) for every in words.values())
    if not all(name_of) or count != len(name_of) or not name_of:
        raise ValueError(f"every list needs words, and each word stands in one list; got {dict(words)!r}")
    for name in words:
        checked(name)
    longest = sorted(name_of, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(_words, longest))})(?!\w)", re.IGNORECASE)

    def by_words(text: str, other: str, info: Mapping[str, Any]) -> Spans | None:
        found, counts = [], dict.fromkeys(words, 0)
        for match in pattern.finditer(text):
            name = name_of[" ".join(match[0].lower().split())]
            counts[name] += 1
            found.append((*match.span(), f"{name}_{counts[name]}" if numbered else name))
        return _spans(found) if found else None

    return by_words


def _list_of(words: Iterable[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _words(phrase: str) -> str:
    """A pattern of a phrase, whatever the white space between its words."""
    return r"\s+".join(map(re.escape, phrase.split()))


def _spans(found: Iterable[tuple[int, int, str]]) -> list[tuple[int, str | None]]:
    """Spans of named stretches of a text, left to right, with those between them that have no name."""
    return [each for start, end, name in found for each in ([(start, None), (end, name)] if start else [(end, name)])]


def checked(name: str) -> str:
    """The name, if a slot may have it.

    Raises:
        ValueError: it can't be told from a position or from another slot, or holds a character that no address has.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^\W\d][\w-]*", name) or name in ENDS:
        raise ValueError(
            f"no slot can be named {name!r}: a name is letters, digits, _ and -, a letter first, such as object_1; "
            f"{' and '.join(ENDS)} are named by themselves"
        )
    return name


def _by_function(function: SlotFunction, pairs: Matched) -> Named:
    """The names of a slot function."""
    info: list[Mapping[Any, Any]] = pairs.info.to_dict("records") if len(pairs.info.columns) else [{}] * len(pairs)
    texts = pairs.run, pairs.other
    spans = [
        [function(*each) for each in zip(one.text, two.text, info, strict=True)] for one, two in (texts, texts[::-1])
    ]
    run, other = (
        named_tokens(written, found, pairs.encoder, REST) for written, found in zip(texts, spans, strict=True)
    )
    return run, other


def named_tokens(
    written: Written, spans: Sequence[Spans | None], encoder: Tokenizes, rest: Mapping[str, str]
) -> list[Names | None]:
    """The slot of each token: a span's tokens are those that a text cut behind it shares with the whole."""
    pieces = [(row, end, name) for row, found in enumerate(spans) for end, name in found or ()]
    names = [None if found is None else [None] * written.length[row] for row, found in enumerate(spans)]
    start = list(written.first)
    for (row, _, name), end in zip(pieces, _token_ends(written, pieces, encoder), strict=True):
        named: Names = names[row]  # type: ignore[assignment]
        if name is not None and end > start[row]:
            named[start[row] : end] = [checked(name), *[rest.get(name, name)] * (end - start[row] - 1)]
        start[row] = max(start[row], end)
    return names  # type: ignore[return-value]


def _token_ends(written: Written, pieces: Sequence[tuple[int, int, str | None]], encoder: Tokenizes) -> list[int]:
    """How many tokens of a text stand before each of its spans' ends."""
    if not pieces:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cuts = encoder.tokenize([written.text[row][:end] for row, end, _ in pieces])
    common = _common(cuts, written.tokens[[row for row, _, _ in pieces]]).tolist()
    return [min(count, written.end[row]) for count, (row, _, _) in zip(common, pieces, strict=True)]


def _common(one: Int[Tensor, "#pair pos"], two: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair"]:
    """How many leading tokens texts have in common."""
    return (one == two).int().cumprod(1).sum(1)


@rule("span columns")
def column_slots(pairs: Matched) -> Named:
    """The slots that the pairs' own columns name: `slot:colour` holds the words of the slot `colour`.

    They are sought in both texts, as whole words, whatever their case; `slot:colour:caption` and `slot:colour:foil`
    hold those of one text, where they differ. An empty cell: the text has no such slot. Words in brackets are the slot
    and those around them say which of several are meant: "and a [circle]". Pairs whose cells are all empty are left to
    the next rule. Other words have no slot.

    Raises:
        ValueError: words that don't stand in the text, or stand there several times, slots that overlap, or a column
            that names no slot.
    """
    columns, wrong = _span_columns(pairs.info), list[str]()
    found = [_column_spans(written, columns, pairs, wrong) for written in (pairs.run, pairs.other)]
    if wrong:
        raise ValueError(
            f"{counted(len(wrong), 'cell')} of the columns {COLUMN}... can't be used: {some(wrong)}. Give the words as "
            f"they stand in caption and foil; where these differ, in the columns {COLUMN}NAME:caption and "
            f"{COLUMN}NAME:foil, empty where a text has no such words; of words that stand there several times, mark "
            "those meant by brackets, among the words around them: 'and a [circle]'"
        )
    fits = [any(both) for both in zip(*found, strict=True)]
    run, other = (
        named_tokens(written, [each if fit else None for each, fit in zip(spans, fits, strict=True)], pairs.encoder, {})
        for written, spans in zip((pairs.run, pairs.other), found, strict=True)
    )
    return run, other


def _span_columns(info: pd.DataFrame) -> dict[str, dict[str, str]]:
    """For each slot that columns name, its columns by the text that they are about, "" = both."""
    columns: dict[str, dict[str, str]] = {}
    for column in info.columns:
        if isinstance(column, str) and column.startswith(COLUMN):
            name, _, which = column.removeprefix(COLUMN).partition(":")
            if which not in ("", "caption", "foil"):
                raise ValueError(
                    f"the column {column!r} names no slot; give {COLUMN}NAME, {COLUMN}NAME:caption or {COLUMN}NAME:foil"
                )
            columns.setdefault(checked(name), {})[which] = column
    return columns


def _column_spans(
    written: Written, columns: Mapping[str, Mapping[str, str]], pairs: Matched, wrong: list[str]
) -> list[list[tuple[int, str | None]]]:
    """The spans that the columns name in one text of every pair; what can't be used is told to `wrong`."""
    spans = []
    for row, (which, text) in enumerate(zip(written.which, written.text, strict=True)):
        given = {name: each.get(which, each.get("")) for name, each in columns.items()}
        phrases = {name: _phrase(pairs.info[column].iloc[row]) for name, column in given.items() if column}
        found, problems = _sought({name: phrase for name, phrase in phrases.items() if phrase}, text)
        wrong += [f"{problem} in the {which} of {pairs.key[row]!r}" for problem in problems]
        spans.append(_spans(found))
    return spans


def _phrase(value: Any) -> str:
    """A cell as words: whole numbers with their digits, nothing where it is empty."""
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and value == value:
        return f"{value:g}"
    return value.strip() if isinstance(value, str) else ""


def _sought(phrases: Mapping[str, str], text: str) -> tuple[list[tuple[int, int, str]], list[str]]:
    """Where the words of some slots stand in a text, left to right, and what is wrong with them."""
    found, problems = [], []
    for name, phrase in phrases.items():
        spans = _standing(phrase, text)
        if len(spans) == 1:
            found.append((*spans[0], name))
        else:
            problems.append(f"{COLUMN}{name} {phrase!r} stands {f'{len(spans)} times' if spans else 'nowhere'}")
    found.sort()
    for (_, end, one), (start, _, two) in pairwise(found):
        if start < end:
            problems.append(f"{COLUMN}{one} and {COLUMN}{two} overlap")
    return found, problems


def _standing(phrase: str, text: str) -> list[tuple[int, int]]:
    """Where a phrase stands in a text as whole words; of one with brackets, where the words in these stand."""
    marked = re.fullmatch(r"([^][]*)\[([^][]+)\]([^][]*)", phrase)
    before, own, after = marked.groups() if marked else ("", phrase, "")
    around = [f"{_words(words)}{space}" if words.strip() else "" for words, space in ((before, r"\s*"), (after, ""))]
    pattern = rf"(?<!\w){around[0]}(?<!\w)(?P<own>{_words(own)})(?!\w)\s*{around[1]}"
    pattern += r"(?!\w)" if around[1] else ""
    return [match.span("own") for match in re.finditer(pattern, text, re.IGNORECASE)]


template = SlotRule(partial(_by_function, template_slots), "template_slots", SLOTS)


@rule(template.title, SLOTS)
def negations(pairs: Matched) -> Named:
    """The slots of `template_slots` for pairs that differ in a negation: of others no word is the negator's place."""
    named = template(pairs)
    run, other = ([n if side != "none" else None for n, side in zip(each, pairs.side, strict=True)] for each in named)
    return run, other


DEFAULT = (column_slots, negations, changed_slots)


Slots: TypeAlias = SlotFunction | SlotRule | Sequence[SlotFunction | SlotRule] | None
"""What names slots: a function, a rule, several of them to be tried in this order, None = those built in."""


def rules_of(slots: Slots) -> list[SlotRule]:
    """Slot rules from one, a function, or several of them; the last is `changed_slots`, which fits what no other does.

    Raises:
        TypeError: something that is neither a rule nor a function of a text, its other text and their pair's columns.

    Example:
        >>> rules_of(None), rules_of([template_slots])
        ([SlotRule(span columns), SlotRule(template_slots), SlotRule(changed_slots)], \
[SlotRule(template_slots), SlotRule(changed_slots)])
    """
    given = DEFAULT if slots is None else slots if isinstance(slots, Sequence) else (slots,)
    rules = [_as_rule(each) for each in given]
    return rules if changed_slots in rules else [*rules, changed_slots]


def _as_rule(given: object) -> SlotRule:
    if isinstance(given, SlotRule):
        return given
    if given is template_slots:
        return template
    if callable(given) and _takes_both(given):
        return SlotRule(partial(_by_function, given), getattr(given, "__name__", type(given).__name__))
    raise TypeError(
        "a slot function takes (text, other, info), a text, the other one of its pair and the pair's columns, and "
        f"gives the ends of the slots in characters with their names, or None. Got {given!r}"
    )


def _takes_both(function: Callable[..., Any]) -> bool:
    """Whether a function can be called as a slot function is."""
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError:
        return False
    except ValueError:  # it doesn't say what it takes
        return True
    return True
