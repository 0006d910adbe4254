"""Downloads the published results of the negation study on OpenAI's ViT-B/32, and checks that they are the right ones.

    pip install h5py
    python scripts/fetch_clip_localisation.py --out clip-localisation

They are those of "How and where does CLIP process negation?" (Quantmeyer, Mosteiro, Gatt 2024,
https://aclanthology.org/2024.alvr-1.5), from the first author's repository github.com/VincentQu/clip-localisation at
the commit below: eight files, 390 kB, each compared with the sha256 that this script knows. The repository has no
licence: use them to compare with, and don't pass them on.

`--out` then has the files themselves, and what `reproduce_negation_study.py --against` reads: `pairs.json`, the 490
rephrased pairs under VALSE's keys with the model's logits, and `arrays.json`, the mean tables (h5py reads them). A file
that is there already and is right is left alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fetch_valse import Refused, fetch, write

COMMIT = "6ced9a8de21122583ac5597b2e29cd56018d0520"
BASE = f"https://raw.githubusercontent.com/VincentQu/clip-localisation/{COMMIT}/data/"
PAIRS = "datasets/valse/existence_rephrased.json"
TRACING = "experiments/causal_tracing/causal_tracing_text_rephrased_{}.h5"
ATTENTION = "experiments/attention/attention_text_{}.h5"
DIGESTS = {
    PAIRS: "7daab77e94939cee6c5ad75848847448c27c3cf3a5bfbe490e0728754b674410",
    TRACING.format("caption_correct"): "82f93173b066056d8541f2a95abab6aadcea94a8307866425a398786f8d52b28",
    TRACING.format("foil_correct"): "e09ad08a4ad919e2ce97ca36ca6fcc9482809fe417ab0720d39eea1a1de353e8",
    TRACING.format("foil_incorrect"): "eb7c59b4ee0556f21661c752bc13e12a0f25f0a7c8986561864ec569b834dd34",
    ATTENTION.format("caption_None"): "672f5470bd24707718f248fe50376f7013b5f0fd2e4df398118a7d30b0c1c3dd",
    ATTENTION.format("foil_None"): "a57d323d6145c2c15df1b2e84be81e71143578f61c96b06b29fa728fe24db38d",
    ATTENTION.format("caption_None_3"): "5269c4c1fed53efaf9931bf2fe5e548632c6b0618c78716e0f92f6cf4ec2d0c7",
    ATTENTION.format("foil_None_3"): "f27727401a933f7fccb512c595d7e0cee6fd43081a2129e3f1bd2d6b46c9f546",
}
SIDES = ("caption", "foil")
POSITIONS = ("sot", "there", "be", "negator", "subject", "subject_rest", "stop", "eot")
"""The rows of the study's arrays, by the names that slots have here."""


def main(arguments: list[str] | None = None) -> int:
    """0 if the folder is there and right, else 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("clip-localisation"), help="the folder to write")
    parser.add_argument("--base", default=BASE, help="the address of the repository's folder `data`, or of a copy")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there and differ")
    options = parser.parse_args(arguments)
    try:
        for name, digest in DIGESTS.items():
            out = options.out / name
            print(fetch(name, out, base=options.base, expected=digest, overwrite=options.overwrite))
        print(convert(options.out))
    except Refused as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


def convert(folder: Path) -> str:
    """Writes `pairs.json` and `arrays.json` from the files that were fetched; what was done, in a sentence.

    Raises:
        Refused: h5py is not there.
    """
    arrays: dict[str, Any] = {"positions": POSITIONS, "causal_tracing": {}}
    for side, segment in (("caption", "correct"), ("foil", "correct"), ("foil", "incorrect")):
        name = f"{side}, {segment}"
        arrays["causal_tracing"][name] = _array(folder / TRACING.format(f"{side}_{segment}"), "results")
    for name, file, key in (
        ("selectivity", "{}_None", "results"),
        ("selectivity_correlation", "{}_None", "correlations"),
        ("attention_by_position_block_3", "{}_None_3", "results"),
    ):
        arrays[name] = {side: _array(folder / ATTENTION.format(file.format(side)), key) for side in SIDES}
    write(folder / "pairs.json", (folder / PAIRS).read_bytes())
    write(folder / "arrays.json", json.dumps(arrays).encode())
    return f"wrote {folder / 'pairs.json'} and {folder / 'arrays.json'}: compare with --against {folder}"


def _array(path: Path, key: str) -> list[list[float]]:
    try:
        import h5py
    except ImportError as error:
        raise Refused("the arrays are HDF5 files; pip install h5py, and run this again") from error
    with h5py.File(path) as file:
        rows: list[list[float]] = file[key][()].tolist()
    return rows


if __name__ == "__main__":
    sys.exit(main())
