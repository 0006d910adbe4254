"""What learning gates costs at the size of ViT-B/32: seconds per step and the peak of memory, on a random tower.

    python scripts/learn_memory.py --steps 2 --pairs 32

The weights are random, which changes no cost. It prints the edges, the seconds of a step, the peak of the process's
memory before and after, and what a course of 90 steps would take, which is an extrapolation.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import open_clip
import torch

import clip_lens
from clip_lens.core.metric import logit
from clip_lens.core.setting import Setting
from clip_lens.methods.circuits.learned import Plan, begun

COURSE = 90


def main(arguments: list[str] | None = None) -> int:
    """0 when the figures are printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="steps that are measured")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of a step")
    parser.add_argument("--by-slot", action="store_true", help="a gate per edge and slot")
    given = parser.parse_args(arguments)
    encoder, batch = vit_b(given.pairs)
    slots = batch.occurring if given.by_slot else ()
    before = peak()
    setting = Setting.of(encoder, batch, metric=logit, rows=given.pairs, progress=False)
    course = begun(setting, Plan(slots, steps=given.steps, held_out=0.0))
    took = []
    for _ in range(given.steps):
        began = time.perf_counter()
        course.step()
        took.append(time.perf_counter() - began)
    each = sum(took) / len(took)
    print(
        f"{encoder.full_name}: {len(course.gates.logits)} gates, {given.pairs} pairs of {batch.tokens.shape[1]} tokens"
    )
    print(f"{each:.1f} s a step on {encoder.device} with {torch.get_num_threads()} threads")
    print(f"peak of memory: {before:.2f} GB with the tower, {peak():.2f} GB with gates learned")
    print(f"a course of {COURSE} steps would take about {COURSE * each / 60:.0f} minutes a size (extrapolated)")
    return 0


def vit_b(pairs: int) -> tuple[clip_lens.HookedTextEncoder, clip_lens.Batch]:
    """A random tower of ViT-B/32's size, and pairs along random directions."""
    clip = open_clip.create_model("ViT-B-32", pretrained=None)
    encoder = clip_lens.load(clip, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    texts = clip_lens.read_pairs()[:pairs]
    directions = torch.nn.functional.normalize(torch.randn(len(texts), encoder.d_embed), dim=-1)
    images = list(dict.fromkeys(texts.image))
    store = clip_lens.ImageStore.from_tensors(images, directions[: len(images)])
    return encoder, clip_lens.align(texts, store, encoder, run="caption")


def peak() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(main())
