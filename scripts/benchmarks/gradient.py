"""What EAP-IG over every edge costs, against the obvious way.

    python scripts/benchmarks/gradient.py --threads 2

A randomised text tower of ViT-B-32's size, float32, 64 pairs as long as VALSE's; both in one process with the same
threads, equal in every value that both compute:

- ours: `gradient_effects(encoder, batch, encoder.edges(), steps=5)`, timed whole, with the process's peak memory;
- the obvious way: pair by pair and step by step a run with an input of its own for each head's q, k and v (the hooks
  `hook_q_input`, `hook_k_input`, `hook_v_input`), the gradient at every input, and senders times receivers as one
  product per receiver. It runs on some pairs of all lengths and is scaled by their number.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import product

from common import Time, peak, randomised, timed, tokenizer

LARGEST = 1e-4  # allowed difference, of the largest |attribution|
NOUNS = ("people", "dogs", "zebras", "fire hydrants", "skateboarders", "red umbrellas", "parking meters", "cats")
PLACES = ("", " in it", " in the picture", " on the street", " at the beach", " near a big old tree", " in the room")
PLACES += (" outside",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="ViT-B-32", help="a causal model of open_clip's; its text tower is randomised"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64, help="pairs in one pass")
    parser.add_argument("--some", type=int, default=4, help="pairs on which the obvious way runs")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # read when torch is imported
    import torch

    torch.set_num_threads(arguments.threads)
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    import torch

    from clip_lens import ImageStore, Pairs, align, gradient_effects, load

    encoder = load(randomised(arguments.model), tokenizer=tokenizer(arguments.model))
    texts = [
        (f"There are no {noun}{place}.", f"There are some {noun}{place}.") for noun, place in product(NOUNS, PLACES)
    ]
    keys = [str(row) for row in range(len(texts))]
    pairs = Pairs(keys, *zip(*texts, strict=True), [f"{key}.png" for key in keys], name="generated")
    images = torch.randn(len(pairs), encoder.d_embed, generator=torch.Generator().manual_seed(1))
    batch = align(pairs, ImageStore.from_tensors(pairs.image, images), encoder, run="affirmative")
    edges, steps, lengths = encoder.edges(), arguments.steps, batch.length.tolist()
    gradient_effects(encoder, batch[:2], edges[:20])  # warmed up
    before = peak()
    effects, ours = timed(lambda: gradient_effects(encoder, batch, edges, steps=steps, rows=arguments.rows))
    print(f"{arguments.model}, float32, threads: {torch.get_num_threads()}, pairs in one pass: {arguments.rows}")
    print(f"{len(batch)} pairs of {min(lengths)} to {max(lengths)} tokens, {len(edges)} edges, {steps} steps")
    print(f"ours: {ours}; peak memory {peak():.0f} MB, {before:.0f} MB before")
    chosen = batch.length.argsort(stable=True)[:: max(1, len(batch) // arguments.some)].tolist()
    found, spent = [], Time(0, 0)
    for pair in chosen:
        values, time = timed(lambda pair=pair: by_split_inputs(encoder, batch[[pair]], edges, steps))
        found, spent = [*found, values], Time(spent.wall + time.wall, spent.cpu + time.cpu)
    error = float((torch.stack(found, 1) - effects.values[:, chosen]).abs().max() / effects.values.abs().max())
    if not error <= LARGEST:
        sys.exit(f"values differ by {error:.2g} of the largest attribution")
    wall, cpu = (len(batch) / len(chosen) * theirs for theirs in spent)
    print(
        f"split inputs: {Time(wall, cpu)} for all pairs, from {len(chosen)} of them; values differ by {error:.1g} of "
        "the largest"
    )
    print(f"  ours is {wall / ours.wall:.1f}x faster ({cpu / ours.cpu:.1f}x by CPU)")


def by_split_inputs(encoder, batch, edges, steps: int):
    """EAP-IG of one pair whose texts are equally long, by hand."""
    import torch

    tower, layers = encoder.tower, range(encoder.n_layers)
    run, other = encoder.cut(batch.tokens), encoder.cut(batch.other)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{n}.{h}" for n in layers for h in ("attn.hook_z", "hook_mlp_out"))]
    own, theirs = (encoder.cache(tokens, names=names) for tokens in (run, other))
    change = {name: (theirs[name] - own[name])[0] for name in names}
    sent = {("embed", 0, None): change[names[0]]}
    for n in layers:
        for head, weight in enumerate(tower.blocks[n].attn.W_O):
            sent["head", n, head] = change[f"blocks.{n}.attn.hook_z"][:, head] @ weight
        sent["mlp", n, None] = change[f"blocks.{n}.hook_mlp_out"]
    inputs = [f"blocks.{n}.hook_{part}" for n in layers for part in ("q_input", "k_input", "v_input", "mlp_in")]
    inputs.append(f"blocks.{layers[-1]}.hook_resid_post")
    total = torch.zeros(len(edges))
    for k in range(1, steps + 1):
        x = own[names[0]] + (1 - k / steps) * change[names[0]]
        kept = {}

        def keep(value, hook, kept=kept):
            kept[hook.name] = value

        y = tower.run_with_hooks(x.requires_grad_(), fwd_hooks=[(name, keep) for name in inputs], start_at_layer=0)
        moved = (encoder.read(y, encoder.pool(run)) * batch.direction).sum()
        gradient = dict(zip(inputs, torch.autograd.grad(moved, [kept[name] for name in inputs]), strict=True))
        scores, senders = {}, torch.stack([value.flatten() for value in sent.values()])
        for name in inputs:
            value = gradient[name][0]
            for head in range(encoder.n_heads) if value.ndim == 3 else (None,):
                line = senders @ (value if head is None else value[:, head]).flatten()
                scores[name, head] = dict(zip(sent, line.tolist(), strict=True))
        ends = {"mlp": "hook_mlp_in", "q": "hook_q_input", "k": "hook_k_input", "v": "hook_v_input"}
        for number, edge in enumerate(edges):
            u, v = edge.sender, edge.receiver
            read = inputs[-1] if v.kind == "out" else f"blocks.{v.layer}.{ends[v.kind]}"
            total[number] += scores[read, v.unit][u.kind, u.layer, u.unit] / steps
    return total


if __name__ == "__main__":
    main()
