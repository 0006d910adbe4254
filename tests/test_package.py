"""The package as a whole: its names, and that importing it costs nothing."""

import subprocess
import sys

import pytest

import clip_lens


def test_every_public_name_resolves_and_is_documented() -> None:
    undocumented = [name for name in clip_lens.__all__ if name != "Place" and not getattr(clip_lens, name).__doc__]
    assert undocumented == []
    assert set(clip_lens.__all__) <= set(dir(clip_lens))


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(AttributeError, match="patch_effects"):
        clip_lens.patch_effect  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, clip_lens; sys.exit(' '.join({'torch', 'pandas', 'open_clip'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
