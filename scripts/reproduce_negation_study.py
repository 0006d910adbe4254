"""The study of "How and where does CLIP process negation?" (Quantmeyer, Mosteiro, Gatt 2024) on VALSE existence, whole.

1. VALSE's pairs (MIT licence), 420 kB:            python scripts/fetch_valse.py --out existence.json
2. The images are Visual7W's. Get visual7w_images.zip from https://ai.stanford.edu/~yukez/visual7w/ and unpack it; of
   its 47,300 pictures the 490 that the pairs name are read.
3. The study, with OpenAI's ViT-B/32 as in the paper; open_clip downloads the weights:

       python scripts/reproduce_negation_study.py --pairs existence.json --pictures visual7w/images --out negation

`--model` and `--pretrained` take any other model of open_clip's. Stopped and started again, it goes on from what is
finished. It refuses a file of pairs that does not give the 490 rephrased ones (250 with the negation in the caption,
240 in the foil), and lists pictures that are missing.

This has been run to its end on random weights and made-up image embeddings only; what it gives on OpenAI's weights is
for you to see.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

COUNTS = {"caption": 250, "foil": 240}


def main(arguments: list[str] | None = None) -> int:
    """0 when the report is written; 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=Path("existence.json"), help="VALSE's existence.json")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--pictures", type=Path, help="the folder with Visual7W's images")
    images.add_argument("--images", type=Path, help="a store of their embeddings (.safetensors), if you have one")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="openai")
    parser.add_argument("--out", type=Path, default=Path("negation"))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    try:
        check(given.pairs)
        store = given.images or embedded(given)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return study(given, store)


def check(pairs: Path) -> None:
    """Refuses pairs that are not the paper's."""
    from clip_lens.data.read import read_pairs

    side = read_pairs(pairs).rephrased().side
    found = {name: side.count(name) for name in COUNTS}
    if found != COUNTS:
        raise ValueError(f"{pairs} gives {found} rephrased pairs, VALSE existence {COUNTS}; scripts/fetch_valse.py")


def embedded(given: argparse.Namespace) -> Path:
    """The store of the pictures that the pairs name, computed if it is not there."""
    from clip_lens.data.embed import embed_images
    from clip_lens.data.read import read_pairs

    ids = sorted(set(read_pairs(given.pairs).rephrased().image))
    missing = [name for name in ids if not (given.pictures / name).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids)} pictures are not in {given.pictures}: {', '.join(missing[:5])} ..."
        )
    given.out.mkdir(parents=True, exist_ok=True)
    store = given.out / "images.safetensors"
    files = [given.pictures / name for name in ids]
    embed_images(files, model=given.model, pretrained=given.pretrained, out=store, device=given.device)
    return store


def study(given: argparse.Namespace, store: Path) -> int:
    """`clip-lens study`, as anyone would call it."""
    from clip_lens.cli.app import main as clip_lens

    options = {
        "--pairs": given.pairs, "--images": store, "--model": given.model, "--pretrained": given.pretrained,
        "--out": given.out, "--device": given.device,
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    return clip_lens(["study", "--rephrased", *words])


if __name__ == "__main__":
    sys.exit(main())
