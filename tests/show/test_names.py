"""The parts of a report of one's own are named in clip_lens.show, and naming them costs nothing."""

import subprocess
import sys

import pytest

import clip_lens.show


def test_every_name_resolves_and_is_documented():
    assert clip_lens.show.__all__ == ["Figure", "Picture", "Section", "Table", "section_of", "themed"]
    assert all(getattr(clip_lens.show, name).__doc__ for name in clip_lens.show.__all__)
    with pytest.raises(AttributeError, match="Pictur"):
        clip_lens.show.Pictur  # noqa: B018


def test_importing_the_floor_imports_nothing_heavy():
    code = "import sys, clip_lens.show; sys.exit(' '.join({'torch', 'pandas', 'plotly'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
