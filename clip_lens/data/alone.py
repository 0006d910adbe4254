"""`one_text`: a batch of one text alone, for what needs no second one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from clip_lens.data.batch import Batch, Encoder
from clip_lens.data.pairs import Pairs

ENDS = ("sot", "eot")


def one_text(text: str, encoder: Encoder, direction: Float[Tensor, "d_embed"], *, image: str = "") -> Batch:
    """A batch of one text, the caption, that is its own counterpart: for zeros, noise, and verbs with `contrast=False`.

    `direction` is what it is judged by: `encoder.scale * v_image` for CLIP's logit, the text's own embedding for the
    cosine with it. `image` names it.

    Raises:
        ValueError: the text is too long for the context.

    Example:
        >>> encoder = clip_lens.load()
        >>> text = "There are no circles."
        >>> one = one_text(text, encoder, encoder(text)[0])
        >>> effects = clip_lens.direct_effects(encoder, one, contrast=False)
        >>> bool((effects.values.sum() - 1).abs() < 1e-5)  # the parts of the cosine of a text with itself
        True
    """
    tokens = encoder.cut(encoder.tokenize([text]))
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    slot = torch.full_like(tokens, -1)
    slot[0, 0], slot[0, encoder.pool(tokens)[0]] = range(len(ENDS))
    length = encoder.length(tokens) if encoder.causal else torch.full_like(tokens[:, 0], tokens.shape[1])
    length = torch.maximum(length, encoder.pool(tokens) + 1)
    pairs = Pairs(["one text"], [text], [text], [image], name="one text")
    return Batch(
        tokens=tokens,
        other=tokens,
        origin=positions,
        slot=slot,
        other_slot=slot,
        slots=ENDS,
        length=length,
        other_length=length,
        direction=direction[None].to(encoder.device, encoder.precision),
        sigma=torch.full_like(length, -1),
        pairs=pairs,
        dropped=pairs.dropped,
        run="caption",
    )
