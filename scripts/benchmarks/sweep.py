"""How fast a sweep of all (layer, position) residual sites is, against TransformerLens' own and against plain hooks.

    python scripts/benchmarks/sweep.py --threads 1

A randomised text tower of ViT-B-32's size, float32, 64 pairs of equal length, every position of every layer's
`resid_pre`; all three in one process with the same threads, and equal in every value:

- ours: `patch_effects`, timed whole, the better of two, warmed up by one more;
- TransformerLens: `patching.get_act_patch_resid_pre`, pair by pair, on the same tower and the same cut tokens;
- plain hooks: a forward pre-hook on open_clip's own block, one forward per pair, layer and position, padded to 77.

The two slow ones run on some of the pairs, spread over the sizes, and are scaled by their number of forwards;
plain hooks on three positions of each. `--full` runs them on everything.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import product
from pathlib import Path

from common import Time, randomised, timed, tokenizer

LARGEST = 1e-5  # allowed difference, of the largest |effect|
NOUNS = ("people", "dogs", "zebras", "fire hydrants", "skateboarders", "red umbrellas", "parking meters", "cats")
PLACES = ("", " in the picture", " on the street", " at the beach", " near a big old tree", " in the room", " outside")


def main() -> None:
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # read when torch is imported
    import torch

    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        measure(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="ViT-B-32", help="a causal model of open_clip's; its text tower is randomised"
    )
    parser.add_argument(
        "--pairs", type=Path, help="a file of pairs (csv, json, jsonl, VALSE's); default: generated ones"
    )
    parser.add_argument("--number", type=int, default=64, help="how many pairs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--some", type=int, default=4, help="pairs on which the slow ones run")
    parser.add_argument("--full", action="store_true", help="run the slow ones on all pairs and places (takes an hour)")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    import torch

    from clip_lens import ImageStore, Site, align, load, patch_effects

    clip = randomised(arguments.model)
    encoder = load(clip, tokenizer=tokenizer(arguments.model))
    pairs = equally_long(arguments, encoder)
    images = torch.randn(len(pairs), encoder.d_embed, generator=torch.Generator().manual_seed(1))
    batch = align(pairs, ImageStore.from_tensors(pairs.image, images), encoder, run="affirmative")
    sites = [Site("resid", layer, slot=p) for p in range(batch.tokens.shape[1]) for layer in range(encoder.n_layers)]

    with Counter(encoder) as count:
        effects = patch_effects(encoder, batch, sites)
    ours = min((timed(lambda: patch_effects(encoder, batch, sites))[1] for _ in range(2)), key=lambda time: time.wall)
    values, lengths = effects.values.reshape(-1, encoder.n_layers, len(batch)), batch.length.tolist()
    total = sum(lengths) * encoder.n_layers
    print(f"{arguments.model}, float32, threads: {torch.get_num_threads()}")
    print(f"{len(batch)} pairs of {min(lengths)} to {max(lengths)} tokens: {total} (pair, layer, position) effects")
    print(f"ours: {ours}, {count.sequences} sequences in {count.forwards} forwards")
    chosen = range(len(batch)) if arguments.full else spread(lengths, arguments.some)
    slow = {
        "TransformerLens, pair by pair": (lambda: by_transformer_lens(encoder, batch, chosen), 8),
        "plain hooks, padded": (lambda: by_plain_hooks(clip, batch, chosen, arguments.full), 40),
    }
    for name, (run, target) in slow.items():
        found, spent = run()
        error = largest_difference(found, values)
        if not error <= LARGEST:
            sys.exit(f"{name}: values differ by {error:.2g} of the largest effect")
        scaled = Time(spent.wall / len(found) * total, spent.cpu / len(found) * total)
        how = f", scaled from {len(found)} forwards" if len(found) < total else ""
        print(f"{name}: {scaled}{how}; values differ by {error:.1g} of the largest effect")
        print(
            f"  ours is {scaled.wall / ours.wall:.1f}x faster ({scaled.cpu / ours.cpu:.1f}x by CPU), target {target}x"
        )


def largest_difference(found: dict, values) -> float:
    """Of the values found by (pair, layer, position), relative to the largest |effect|."""
    differences = [float((values[p, layer, pair] - value).abs()) for (pair, layer, p), value in found.items()]
    return max(differences) / float(values.nan_to_num().abs().max())


def equally_long(arguments: argparse.Namespace, encoder):
    """Pairs whose two texts have the same number of tokens: TransformerLens' sweep knows no other."""
    from clip_lens import Pairs, read_pairs

    if arguments.pairs is None:
        texts = [
            (f"There are no {noun}{place}.", f"There are some {noun}{place}.") for noun, place in product(NOUNS, PLACES)
        ]
        texts += [
            (f"There is a {noun[:-1]}{place}.", f"There is no {noun[:-1]}{place}.")
            for noun, place in product(NOUNS[1:], PLACES)
        ]
        texts = texts[:: max(1, len(texts) // arguments.number)][: arguments.number]
        keys = [str(row) for row in range(len(texts))]
        return Pairs(keys, *zip(*texts, strict=True), [f"{key}.png" for key in keys], name="generated")
    pairs = read_pairs(arguments.pairs).rephrased()
    one, two = (encoder.length(encoder.tokenize(texts)) for texts in (pairs.caption, pairs.foil))
    fitting = (one == two).nonzero().flatten()
    every = max(1, len(fitting) // arguments.number)
    return pairs[fitting[::every][: arguments.number].tolist()]


class Counter:
    """Counts the tower's forwards and their rows."""

    def __init__(self, encoder) -> None:
        self.forwards = self.sequences = 0
        self._module = encoder.tower.ln_final

    def __enter__(self) -> Counter:
        self._handle = self._module.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *of: object) -> None:
        self._handle.remove()

    def _count(self, module, args) -> None:
        self.forwards += 1
        self.sequences += len(args[0])


def spread(lengths: list[int], number: int) -> list[int]:
    """Some pairs, evenly from the shortest to the longest."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[(2 * k + 1) * len(order) // (2 * number)] for k in range(number)]


def by_transformer_lens(encoder, batch, chosen):
    """TransformerLens' own sweep, one pair after the other, tokens cut to the text."""
    from transformer_lens import patching

    patching.tqdm = lambda items: items  # no bars
    tower, found, spent = encoder.tower, {}, Time(0, 0)
    for pair in chosen:
        length = int(batch.length[pair])
        tokens, other, direction = batch.tokens[[pair], :length], batch.other[[pair], :length], batch.direction[pair]

        def logit(output, direction=direction):
            return (output[0, -1] / output[0, -1].norm()) @ direction

        def sweep(tokens=tokens, other=other, logit=logit):
            _, cache = tower.run_with_cache(other, names_filter=lambda name: name.endswith("resid_pre"))
            return patching.get_act_patch_resid_pre(tower, tokens, cache, logit)

        patched, time = timed(sweep)
        effect, spent = patched - logit(tower(tokens)), spent.plus(time)
        found |= {(pair, layer, p): effect[layer, p] for layer, p in product(range(len(effect)), range(length))}
    return found, spent


def by_plain_hooks(clip, batch, chosen, full: bool):
    """Forward pre-hooks on open_clip's own blocks, tokens padded to the context."""
    import torch

    blocks, found, spent = clip.transformer.resblocks, {}, Time(0, 0)
    runs, others = (torch.zeros(len(batch), len(clip.positional_embedding), dtype=torch.long) for _ in range(2))
    runs[:, : batch.tokens.shape[1]], others[:, : batch.other.shape[1]] = batch.tokens, batch.other
    for pair in chosen:
        stream = inputs_of_blocks(clip, others[[pair]])

        def logit(pair=pair):
            return clip.encode_text(runs[[pair]], normalize=True)[0] @ batch.direction[pair]

        plain, length = logit(), int(batch.length[pair])
        for layer, p in product(range(len(blocks)), range(length) if full else (2, 3, length - 1)):

            def patch(module, args, there=stream[layer], p=p):
                value = args[0].clone()
                value[:, p] = there[:, p]
                return value, *args[1:]

            handle = blocks[layer].register_forward_pre_hook(patch)
            patched, time = timed(logit)
            handle.remove()
            found[pair, layer, p], spent = patched - plain, spent.plus(time)
    return found, spent


def inputs_of_blocks(clip, tokens) -> list:
    stream: list = []
    keep = [
        block.register_forward_pre_hook(lambda module, args: stream.append(args[0]))
        for block in clip.transformer.resblocks
    ]
    clip.encode_text(tokens)
    for handle in keep:
        handle.remove()
    return stream


if __name__ == "__main__":
    main()
