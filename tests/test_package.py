"""The package as a whole: its names, and that importing it costs nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import clip_lens


def test_every_public_name_resolves_and_is_documented() -> None:
    undocumented = [name for name in clip_lens.__all__ if name != "Place" and not getattr(clip_lens, name).__doc__]
    assert undocumented == []
    assert set(clip_lens.__all__) <= set(dir(clip_lens))


def test_an_unknown_name_says_what_it_may_mean() -> None:
    with pytest.raises(AttributeError, match="did you mean 'patch_effects'"):
        clip_lens.patch_effect  # noqa: B018
    with pytest.raises(AttributeError, match=r"there are .*patch_effects"):
        clip_lens.zzz  # noqa: B018


def test_the_stub_has_every_name_and_nothing_else() -> None:
    stub = Path(clip_lens.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^from \S+ import (\w+) as \1$", stub, re.M)) == clip_lens.__all__
    assert len(clip_lens.__all__) <= 61


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, clip_lens; sys.exit(' '.join({'torch', 'pandas', 'open_clip'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
