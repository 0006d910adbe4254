"""Downloads a file of VALSE (Parcalabescu et al. 2022), by default existence.json, and checks that it is the right one.

    python scripts/fetch_valse.py --out existence.json

existence.json is compared with the sha256 that this package was tested on. For VALSE's other files there is no known
digest: the one found is printed, `--sha256` checks one that you have. A file that is there already and has the digest
is left alone. VALSE is licensed under the MIT license; its images are those of other data sets and not in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

BASE = "https://raw.githubusercontent.com/Heidelberg-NLP/VALSE/main/data/"
DIGESTS = {"existence.json": "b20fca52eba86c544083d423345a2e28e60e601ef61c56c9ac1c73a95a3a6d18"}
TIMEOUT = 60  # seconds without an answer


class Refused(Exception):
    """What went wrong, and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """0 if the file is there and right, else 1 with the reason on standard error."""
    options = parse(arguments)
    out = options.out or Path(options.file)
    try:
        print(fetch(options.file, out, base=options.base, expected=options.sha256, overwrite=options.overwrite))
    except Refused as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="existence.json", help="its name in VALSE's data folder")
    parser.add_argument("--out", type=Path, help="where to write it; default: its name, here")
    parser.add_argument("--base", default=BASE, help="the address of the folder that has it")
    parser.add_argument("--sha256", help="the digest that it must have")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there and differs")
    return parser.parse_args(arguments)


def fetch(name: str, out: Path, *, base: str = BASE, expected: str | None = None, overwrite: bool = False) -> str:
    """What was done, in a sentence. `out` appears whole and checked, or stays as it was.

    Raises:
        Refused: offline, no such file, another digest, not JSON, or `out` is there and differs.
    """
    expected = expected.lower() if expected else DIGESTS.get(Path(name).name)
    if out.is_dir():
        out = out / Path(name).name
    if out.exists() and not overwrite:
        return _already(out, expected)
    content = _download(base.rstrip("/") + "/" + name)
    found = hashlib.sha256(content).hexdigest()
    if expected and found != expected:
        raise Refused(
            f"{name} has the sha256 {found}, expected {expected}: the download is damaged or the file has changed; "
            "nothing was written. Try again, or give --sha256 of the version that you want"
        )
    if not expected:
        _must_be_json(name, content)
    write(out, content)
    known = "as expected" if expected else "not known to this script: note it, and give it as --sha256 next time"
    return f"wrote {out} ({len(content)} bytes), sha256 {found}, {known}"


def _already(out: Path, expected: str | None) -> str:
    found = hashlib.sha256(out.read_bytes()).hexdigest()
    if expected is None:
        raise Refused(f"{out} is there already, with the sha256 {found}; give it as --sha256 to accept, or --overwrite")
    if found != expected:
        raise Refused(
            f"{out} is there already and has the sha256 {found}, expected {expected}; --overwrite replaces it"
        )
    return f"{out} is there already, sha256 {found}, as expected"


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            content: bytes = answer.read()
    except urllib.error.HTTPError as error:
        raise Refused(f"{address} answers {error.code} ({error.reason}); check the file's name") from error
    except (OSError, ValueError, HTTPException) as error:  # no network, no such file, no address, half of it
        reason = getattr(error, "reason", None) or error
        raise Refused(f"can't get {address}: {reason}; check the connection, or download it by hand") from error
    return content


def _must_be_json(name: str, content: bytes) -> None:
    try:
        json.loads(content)
    except ValueError as error:
        raise Refused(f"what came for {name} isn't JSON ({error}); check its name") from error


def write(out: Path, content: bytes) -> None:
    """The file, whole or not at all; folders are made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, out)
    finally:
        Path(name).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
