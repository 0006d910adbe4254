"""What must be known before any number of a report: what follows from the model, its images and its pairs."""

from __future__ import annotations

from collections.abc import Iterator

from clip_lens.data.batch import Batch
from clip_lens.model.encoder import HookedTextEncoder, unseen_words
from clip_lens.show.report.cautions import FEW_PAIRS, few_pairs, hooks_on


def cautions(encoder: HookedTextEncoder, batch: Batch) -> list[str]:
    """What must be known before any number: a random tower, image embeddings of nobody knows which model, a model
    organism, words it never saw, few pairs, hooks of the user's, and what the encoder says of itself.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder)
        >>> [caution[:28] for caution in cautions(encoder, batch)]
        ['The embedded model is a mode', 'Only 4 pairs: intervals over']
    """
    return [*_of_the_model(encoder), *_of_the_images(batch), *_of_the_pairs(encoder, batch)]


def _of_the_model(encoder: HookedTextEncoder) -> Iterator[str]:
    if (encoder.pretrained or "").partition(":")[0] == "random":  # what `load` was asked for, with or without a seed
        yield (
            f"The weights of {encoder.name} are RANDOM: this tower was never trained. The numbers below show that the "
            "analysis runs; none of them says anything about CLIP."
        )
    if encoder.vocabulary is not None:  # only the embedded model says which words it was trained on
        yield (
            "The embedded model is a model organism, trained on rendered scenes. What is found here is a fact about "
            "this model and no evidence about OpenAI's CLIP or any other one."
        )
    if encoder.hooked:
        yield hooks_on(encoder.hooked)
    yield from encoder.notes


def _of_the_images(batch: Batch) -> Iterator[str]:
    if batch.joint == "unknown":
        yield (
            f"Nobody said which model made the image embeddings ({batch.images}): they may be made up, or belong to "
            "another joint space."
        )
    if batch.joint == "other":
        yield (
            f"The image embeddings were made by another model ({batch.images}) and taken all the same: unless both "
            "share one joint space, no number below means anything."
        )


def _of_the_pairs(encoder: HookedTextEncoder, batch: Batch) -> Iterator[str]:
    if len(batch) < FEW_PAIRS:
        yield few_pairs(len(batch))
    if unseen := int((unseen_words(encoder, batch.tokens) | unseen_words(encoder, batch.other)).sum()):
        yield (
            f"{unseen} of {len(batch)} pairs have words that {encoder.name} never saw in training: what it says of "
            "them means nothing."
        )
