"""What the exact score of an edge costs, against one full run with a hook per edge.

    python scripts/benchmarks/edges.py --threads 1

A randomised text tower of ViT-B-32's size, float32, 8 pairs; both in one process with the same threads, equal in every
value that both compute:

- ours: `patch_effects` over every 15th edge of `encoder.edges()`, or (`--full`) over all 15,355, timed whole;
- the obvious way: per edge one `run_with_hooks` of the same tower over the 8 pairs, cut to their longest text, from
  the first layer on, with one hook on the receiver's input that adds the sender's precomputed difference.

The second runs on some edges, evenly spread over those of the first. `--profile` says where our own time goes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial

from common import Time, peak, randomised, timed, tokenizer

LARGEST = 1e-4  # allowed difference, of the largest |effect|: of single edges, most of which move next to nothing
NOUNS = ("people", "dogs", "zebras", "fire hydrants")
PLACES = ("", " in the picture")


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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=256, help="sequences in one forward")
    parser.add_argument("--every", type=int, default=15, help="every n-th edge")
    parser.add_argument("--some", type=int, default=40, help="edges on which the obvious way runs")
    parser.add_argument("--full", action="store_true", help="score all edges")
    parser.add_argument("--profile", action="store_true", help="profile our own run instead")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    import torch

    from clip_lens import ImageStore, Pairs, align, load, patch_effects

    encoder = load(randomised(arguments.model), tokenizer=tokenizer(arguments.model))
    texts = [(f"There are no {noun}{place}.", f"There are some {noun}{place}.") for noun in NOUNS for place in PLACES]
    keys = [str(row) for row in range(len(texts))]
    pairs = Pairs(keys, *zip(*texts, strict=True), [f"{key}.png" for key in keys], name="generated")
    images = torch.randn(len(pairs), encoder.d_embed, generator=torch.Generator().manual_seed(1))
    batch = align(pairs, ImageStore.from_tensors(pairs.image, images), encoder, run="affirmative")
    every = encoder.edges()
    edges = every if arguments.full else every[:: arguments.every]
    if arguments.profile:
        profile(lambda: patch_effects(encoder, batch, edges, rows=arguments.rows))
        return
    patch_effects(encoder, batch, edges[:20], rows=arguments.rows)  # warmed up
    chosen = list(range(0, len(edges), max(1, len(edges) // arguments.some)))
    halves = [chosen[::2], chosen[1::2]]  # before and after, since a machine's speed changes with its other work
    found, spent = by_one_hook(encoder, batch, [edges[number] for number in halves[0]])
    before = peak()
    with Counter(encoder) as count:
        effects, ours = timed(lambda: patch_effects(encoder, batch, edges, rows=arguments.rows))
    lengths = batch.length.tolist()
    print(f"{arguments.model}, float32, threads: {torch.get_num_threads()}, rows: {arguments.rows}")
    print(f"{len(batch)} pairs of {min(lengths)} to {max(lengths)} tokens, {len(edges)} of {len(every)} edges")
    print(f"ours: {1000 * ours.wall / len(edges):.2f} ms per edge ({1000 * ours.cpu / len(edges):.2f} CPU), {ours}")
    print(f"  peak memory {peak():.0f} MB, {before:.0f} MB before")
    more, time = by_one_hook(encoder, batch, [edges[number] for number in halves[1]])
    found, spent = torch.cat([found, more]), Time(spent.wall + time.wall, spent.cpu + time.cpu)
    chosen = [*halves[0], *halves[1]]
    error = float((found - effects.values[chosen]).abs().max() / effects.values.abs().max())
    if not error <= LARGEST:
        sys.exit(f"values differ by {error:.2g} of the largest effect")
    print(
        f"one hook: {1000 * spent.wall / len(chosen):.1f} ms per edge ({1000 * spent.cpu / len(chosen):.1f} CPU) "
        f"over {len(chosen)} edges; values differ by {error:.1g} of the largest effect"
    )
    wall, cpu = (theirs / len(chosen) / (own / len(edges)) for theirs, own in zip(spent, ours, strict=True))
    print(f"  ours is {wall:.1f}x faster ({cpu:.1f}x by CPU), target 4x")
    arithmetic(encoder, count, ours, spent, len(edges), len(chosen), sum(lengths), len(batch) * max(lengths))


def arithmetic(encoder, count, ours, spent, edges: int, chosen: int, tokens: int, padded: int) -> None:
    """What the rows as scheduled would take at the rate of this machine's matrix products."""
    cfg = encoder.tower.cfg
    layer = 2 * (4 * cfg.d_model**2 + 2 * cfg.d_model * cfg.d_mlp)
    speed = rate(cfg.d_model, cfg.d_mlp)
    limit = count.flops / speed
    naive = padded * cfg.n_layers * layer / speed
    print(f"matrix products: {speed / 1e9:.0f} GFLOP/s (CPU time)")
    print(
        f"  ours: {count.flops / edges / layer:.0f} tokens x layers per edge (a run of all pairs: "
        f"{tokens * cfg.n_layers}) in {count.forwards} forwards of {count.sequences} rows: "
        f"limit {1000 * limit / edges:.2f} ms per edge, {ours.cpu / limit:.2f}x of it spent"
    )
    print(f"  one hook: limit {1000 * naive:.1f} ms per edge, {spent.cpu / chosen / naive:.2f}x of it spent")
    print(
        f"  schedule alone gives {naive / (limit / edges):.1f}x; the rest of our time is attention and its softmax, "
        "LayerNorms, activations, the shifts and their copies"
    )


def rate(d_model: int, d_mlp: int, rows: int = 1024) -> float:
    """Floating point operations per second of CPU time in a product of an MLP's shape."""
    import torch

    x, w = torch.randn(rows, d_model), torch.randn(d_mlp, d_model)
    torch.nn.functional.linear(x, w)
    spent = min(timed(lambda: [torch.nn.functional.linear(x, w) for _ in range(10)])[1].cpu for _ in range(5))
    return 10 * 2 * rows * d_model * d_mlp / spent


def profile(function: Callable[[], object]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    with recorded(activities=[ProfilerActivity.CPU]) as record:
        function()
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


class Counter:
    """Counts the tower's forwards, their rows, and the operations of their linear layers as scheduled."""

    def __init__(self, encoder) -> None:
        self.forwards = self.sequences = self.flops = 0
        self._tower = encoder.tower

    def __enter__(self) -> Counter:
        self._handles = [self._tower.ln_final.register_forward_pre_hook(self._count_rows)]
        for block in self._tower.blocks:
            self._handles += [
                block.ln1.register_forward_pre_hook(self._counts(3)),
                block.attn.register_forward_hook(self._counts(1, of_output=True)),
                block.mlp.register_forward_pre_hook(self._counts(2 * block.mlp.b_in.shape[0] / block.attn.d_model)),
            ]
        return self

    def __exit__(self, *of: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count_rows(self, module, args) -> None:
        self.forwards += 1
        self.sequences += len(args[0])

    def _counts(self, squares: float, of_output: bool = False):
        """A hook that counts products with `squares` x d_model x d_model weights, by the tokens that enter or leave."""

        def count(module, args, *output) -> None:
            tokens = output[0] if of_output else args[0]
            self.flops += 2 * squares * tokens.numel() * tokens.shape[-1]

        return count


def by_one_hook(encoder, batch, edges):
    """Per edge one whole run with a hook that adds the sender's difference to the receiver's input."""
    import torch

    from clip_lens.core.source import counterpart

    tower, layers = encoder.tower, range(encoder.n_layers)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{n}.{h}" for n in layers for h in ("attn.hook_z", "hook_mlp_out"))]
    run = encoder.cache(batch.tokens, names=names)
    other = counterpart(encoder, batch)(torch.arange(len(batch)), names)
    pooled, line = encoder.pool(batch.tokens), torch.arange(len(batch))
    baseline = (encoder(batch.tokens) * batch.direction).sum(1)
    values, spent = [], Time(0, 0)
    for edge in edges:
        sent = {"embed": "blocks.0.hook_resid_pre", "head": "attn.hook_z", "mlp": "hook_mlp_out"}[edge.sender.kind]
        name = sent if edge.sender.kind == "embed" else f"blocks.{edge.sender.layer}.{sent}"
        change = (other[name] - run[name]).nan_to_num()
        if edge.sender.kind == "head":
            change = change[:, :, edge.sender.unit] @ tower.blocks[edge.sender.layer].attn.W_O[edge.sender.unit]
        receiver = edge.receiver
        read = {"mlp": "hook_mlp_in", "out": "hook_resid_post"}.get(receiver.kind, f"hook_{receiver.kind}_input")
        layer = encoder.n_layers - 1 if receiver.kind == "out" else receiver.layer

        def shift(value, hook, change=change, unit=receiver.unit):
            if unit is None:
                return value + change
            value = value.clone()
            value[:, :, unit] += change
            return value

        run_patched = partial(tower.run_with_hooks, batch.tokens, fwd_hooks=[(f"blocks.{layer}.{read}", shift)])
        y, time = timed(run_patched)
        u = torch.nn.functional.normalize(y[line, pooled], dim=-1)
        values.append((u * batch.direction).sum(1) - baseline)
        spent = Time(spent.wall + time.wall, spent.cpu + time.cpu)
    return torch.stack(values), spent


if __name__ == "__main__":
    main()
