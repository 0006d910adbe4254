"""Texts, tokens and strings, as HookedTransformer's users ask for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


class TextTokens:
    """What a tower with a tokenizer knows of texts. A tokenizer adds start and end of text and pads by itself, so what
    HookedTransformer lets one choose is here either what the tokenizer does or an error."""

    tokenizer: Callable[..., Any] | None
    cfg: Any
    W_E: Tensor

    def to_tokens(
        self,
        input: str | Sequence[str] | Int[Tensor, "pair pos"],
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
        *,
        padding: bool = True,
    ) -> Int[Tensor, "pair pos"]:
        """The token ids of texts, padded to the context or, with `padding=False`, to the longest of the texts.
        Tokens stay as they are, so that tools that take a text take tokens too.

        Raises:
            ValueError: the tower came without a tokenizer; a start of text or a side to pad that the tokenizer does not
                give; `truncate=False` and a text that is too long; `padding=False` in a tower that reads its padding.

        Example:
            >>> tower = clip_lens.load().tower
            >>> tower.to_tokens("a circle").shape, tower.to_tokens("a circle", padding=False).shape
            (torch.Size([1, 77]), torch.Size([1, 4]))
        """
        if isinstance(input, Tensor):
            return input.to(self.W_E.device) if move_to_device else input
        self._refuse(prepend_bos, padding_side)
        texts = [input] if isinstance(input, str) else list(input)
        rows = self._rows(texts)
        if not truncate:
            self._refuse_cut(texts, rows)
        if not padding:
            rows = self._without_padding(rows)
        return rows.to(self.W_E.device) if move_to_device else rows

    def _rows(self, texts: list[str], **options: Any) -> Int[Tensor, "pair pos"]:
        if self.tokenizer is None:
            raise ValueError("this tower has no tokenizer; give tokens, or load(module, tokenizer=...)")
        return torch.as_tensor(self.tokenizer(texts, **options)).long()

    def _refuse(self, prepend_bos: bool | None, padding_side: str | None) -> None:
        if padding_side not in (None, "right"):
            raise ValueError(f"padding_side={padding_side!r}: CLIP's texts are padded on the right; leave it out")
        if prepend_bos is None:
            return
        empty, word = self._rows(["", "a"]).tolist()
        if prepend_bos != (empty[0] == word[0]):
            does = "no start of text" if prepend_bos else "the start of text itself"
            raise ValueError(f"prepend_bos={prepend_bos}: the tokenizer adds {does}; leave it out, and edit the tokens")

    def _refuse_cut(self, texts: list[str], rows: Int[Tensor, "pair pos"]) -> None:
        pad, _ = self._pad_and_end()
        cut = rows[:, -1].ne(pad)
        if "context_length" in inspect.signature(self.tokenizer).parameters:  # type: ignore[arg-type]
            wider = self._rows(texts, context_length=rows.shape[1] + 8)
            cut = (wider[:, : rows.shape[1]] != rows).any(1) | wider[:, rows.shape[1] :].ne(pad).any(1)
        if cut.any():
            first = texts[int(cut.int().argmax())]
            raise ValueError(f"truncate=False: {first[:80]!r} does not fit into {rows.shape[1]} tokens; shorten it")

    def _without_padding(self, rows: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair cut"]:
        if self.cfg.attention_dir != "causal":
            raise ValueError("padding=False: this tower's tokens read the padding too, so that it belongs to the text")
        return rows[:, : max((self._content(row) for row in rows.tolist()), default=rows.shape[1])]

    def _pad_and_end(self) -> tuple[int, int]:
        """The token that fills, and the one in front of it; they may be the same. -1: there is no tokenizer to ask."""
        if self.tokenizer is None:
            return -1, -1
        empty, word = self._rows(["", "a"]).tolist()
        pad = empty[-1]
        before = {next((token for token in reversed(row) if token != pad), pad) for row in (empty, word)}
        return pad, before.pop() if len(before) == 1 else pad

    def _content(self, row: list[int]) -> int:
        """How many of the tokens are not padding: padding begins behind the end of text and goes on to the last."""
        pad, end = self._pad_and_end()
        filled = next((k for k, token in enumerate(reversed(row)) if token != pad), len(row))
        first = len(row) - filled
        if end == pad:
            return min(first + 1, len(row))
        return first if first and row[first - 1] == end else len(row)

    def _decode(self, ids: list[int]) -> str:
        inner = getattr(self.tokenizer, "tokenizer", None)
        decode: Any = getattr(self.tokenizer, "decode", None) or getattr(inner, "decode", lambda ids: "")
        return decode(ids)

    def to_str_tokens(
        self,
        input: str | Sequence[str] | Shaped[Any, "*batch pos"],
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> list[Any]:
        """One string per token of a text, or of each of several: padding is "<pad>", and a token that the tokenizer
        can't say its id, as in "<7>".

        Raises:
            ValueError: as `to_tokens`.

        Example:
            >>> clip_lens.load().tower.to_str_tokens("a circle")[:5]
            ['<start_of_text>', 'a', 'circle', '<end_of_text>', '<pad>']
        """
        self._refuse(prepend_bos, padding_side)
        if isinstance(input, str):
            return self._strings(self.to_tokens(input)[0].tolist())
        if isinstance(input, list | tuple) and all(isinstance(text, str) for text in input):
            return [self._strings(row) for row in self.to_tokens(input).tolist()]
        tokens = torch.as_tensor(input).long()
        if tokens.ndim < 2 or len(tokens) == 1:
            return self._strings(tokens.flatten().tolist())
        return [self._strings(row) for row in tokens.tolist()]

    def _strings(self, row: list[int]) -> list[str]:
        content = self._content(row)
        said = [self._decode([token]).strip() or f"<{token}>" for token in row[:content]]
        return said + ["<pad>"] * (len(row) - content)

    def to_string(self, tokens: Sequence[int] | Shaped[Any, "*batch pos"]) -> str | list[str]:
        """The text of tokens, or of each row of them, without the padding.

        Example:
            >>> tower = clip_lens.load().tower
            >>> tower.to_string(tower.to_tokens("a circle")[0, 1:3])
            'a circle'
        """
        tokens = torch.as_tensor(tokens).long()
        if tokens.ndim == 2:
            return [str(self.to_string(row)) for row in tokens]
        row = tokens.flatten().tolist()
        return self._decode(row[: self._content(row)]).strip()

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises:
            ValueError: the text is none or several.
        """
        row, empty = self.to_tokens([string, ""]).tolist()
        ids = [token for token in row if token not in set(empty)]
        if len(ids) != 1:
            raise ValueError(f"{string!r} is not one token but {len(ids)}: {self.to_str_tokens(torch.tensor(ids))}")
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The string of one token's id."""
        return self._strings([int_token])[0]

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Int[Tensor, "*batch pos"],
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> int:
        """Where a token stands in a text, for the first or the last time.

        Raises:
            ValueError: it stands nowhere there, or several texts were given, or another mode.

        Example:
            >>> clip_lens.load().tower.get_token_position("circles", "There are no circles.")
            4
        """
        if mode not in ("first", "last"):
            raise ValueError(f"mode={mode!r}: give 'first' or 'last'")
        tokens = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else torch.atleast_2d(input)
        if len(tokens) != 1:
            raise ValueError(f"{len(tokens)} texts given; a position is asked of one")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else single_token
        found = (tokens[0] == token).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"{single_token!r} stands nowhere in {self.to_string(tokens[0])!r}")
        return found[0 if mode == "first" else -1]
