"""Files inside a page: compressed, as text that HTML can hold, unpacked by the page's own script."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from pandas import DataFrame

from clip_lens.core.spreadsheet import to_csv
from clip_lens.show.report.section import Data

TYPES = {".csv": "text/csv", ".json": "application/json", ".js": "text/javascript", ".txt": "text/plain"}


class File(NamedTuple):
    """A file of a page: the name that it is saved under, its size in bytes, and its packed content."""

    name: str
    size: int
    packed: str

    @property
    def said(self) -> str:
        """The size as a reader takes it in.

        Example:
            >>> pack("a.csv", b"x" * 2300).said
            '2 kB'
        """
        return f"{self.size / 1e6:.1f} MB" if self.size >= 1e6 else f"{max(1, round(self.size / 1e3))} kB"


def pack(name: str, content: Data) -> File:
    """A table as CSV, or a file's or the given bytes as they are, compressed.

    Raises:
        OSError: the file can't be read.

    Example:
        >>> file = pack("votes.csv", DataFrame({"yes": [1], "no": [2]}))
        >>> unpack(file.packed)
        b'yes,no\\n1,2\\n'
    """
    if isinstance(content, DataFrame):
        name = name if name.endswith(".csv") else f"{name}.csv"
        content = to_csv(content, float_format="%.9g").encode()
    elif not isinstance(content, bytes):
        content = Path(content).read_bytes()
    return File(Path(name).name, len(content), base64.b64encode(gzip.compress(content, 9, mtime=0)).decode())


def unpack(packed: str) -> bytes:
    """The content of a packed file.

    Example:
        >>> unpack(pack("a", b"text").packed)
        b'text'
    """
    return gzip.decompress(base64.b64decode(packed))


def as_json(files: dict[str, File]) -> Markup:
    """Files by their ids, as JSON that may stand inside of a script element.

    Example:
        >>> "</script>" in as_json({"a": pack("</script>", b"")})
        False
    """
    entries = {
        key: {
            "name": file.name,
            "type": TYPES.get(Path(file.name).suffix, "application/octet-stream"),
            "gz": file.packed,
        }
        for key, file in files.items()
    }
    return Markup(json.dumps(entries).replace("<", "\\u003c"))
