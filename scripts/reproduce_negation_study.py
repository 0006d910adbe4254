"""The study of "How and where does CLIP process negation?" (Quantmeyer, Mosteiro, Gatt 2024) on VALSE existence, whole.

1. VALSE's pairs (MIT licence), 420 kB:            python scripts/fetch_valse.py --out existence.json
2. The images are Visual7W's. Get visual7w_images.zip from https://ai.stanford.edu/~yukez/visual7w/ and unpack it; of
   its 47,300 pictures the 490 that the pairs name are read.
3. The study, with OpenAI's ViT-B/32 as in the paper; open_clip downloads the weights:

       python scripts/reproduce_negation_study.py --pairs existence.json --pictures visual7w/images --out negation

4. Beside what the authors have published of that model:

       pip install h5py; python scripts/fetch_clip_localisation.py --out clip-localisation
       python scripts/reproduce_negation_study.py ... --out negation --against clip-localisation

   After the study this computes d, cosines, causal tracing, selectivity and attention by position once more as the
   paper does, and writes into `--out`: `against.html`, `against.md` and `against.csv` with a verdict for each table,
   `against-cells.csv` with every number of ours beside theirs.

`--model` and `--pretrained` take any other model of open_clip's. Stopped and started again, it goes on from what is
finished. It refuses a file of pairs that does not give the 490 rephrased ones (250 with the negation in the caption,
240 in the foil), and lists pictures that are missing.

This has been run to its end on random weights and made-up image embeddings only, where it says that nothing agrees;
what it gives on OpenAI's weights is for you to see. What needs no weights does agree: the pairs, their sides and
tokens, and every figure that follows from the published d.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from negation_published import Published
    from pandas import DataFrame

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
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="the folder of the published results")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="how far a cell may be from theirs and agree")
    given = parser.parse_args(arguments)
    try:
        check(given.pairs)
        published = known(given.against)
        store = given.images or embedded(given)
        return study(given, store) or (against(given, store, published) if published else 0)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def check(pairs: Path) -> None:
    """Refuses pairs that are not the paper's."""
    from clip_lens.data.read import read_pairs

    side = read_pairs(pairs).rephrased().side
    found = {name: side.count(name) for name in COUNTS}
    if found != COUNTS:
        raise ValueError(f"{pairs} gives {found} rephrased pairs, VALSE existence {COUNTS}; scripts/fetch_valse.py")


def known(folder: Path | None) -> Published | None:
    """The published results, read before anything is computed."""
    if folder is None:
        return None
    from negation_published import Published

    return Published.read(folder)


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


def against(given: argparse.Namespace, store: Path, published: Published) -> int:
    """Writes and says what agrees with the published results; 0, whatever it is."""
    import negation_published as published_results

    import clip_lens

    encoder = clip_lens.load(given.model, pretrained=given.pretrained, device=given.device)
    pairs, images = clip_lens.read_pairs(given.pairs).rephrased(), clip_lens.ImageStore.open(store)
    cells = published_results.compare(encoder, images, pairs, published)
    found = published_results.verdicts(cells, given.tolerance)
    said = published_results.summary(found, given.tolerance)
    write(given.out, f"{encoder.full_name} and the published results", cells, found, said)
    print("\n".join(["", published_results.markdown(found), *said]))
    print(f"Every number is in {given.out / 'against-cells.csv'}, the report is {given.out / 'against.html'}.")
    return 0


def write(out: Path, title: str, cells: DataFrame, found: DataFrame, said: list[str]) -> None:
    """The comparison as a page, as Markdown and as two tables."""
    from negation_published import markdown, section

    from clip_lens.core.spreadsheet import to_csv
    from clip_lens.files import written_whole
    from clip_lens.show.report.report import report

    texts = {
        "against.csv": to_csv(found),
        "against-cells.csv": to_csv(cells),
        "against.md": f"# {title}\n\n{' '.join(said)}\n\n{markdown(found)}",
    }
    for name, text in texts.items():
        with written_whole(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    report({"Published results": section(cells, found, said)}, out / "against.html", title=title)


if __name__ == "__main__":
    sys.exit(main())
