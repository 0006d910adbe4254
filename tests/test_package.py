"""The package as a whole: its names, and that importing it costs nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import clip_lens

ROOT = Path(__file__).parents[1]


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
    assert len(clip_lens.__all__) <= 85


def what_is_read() -> str:
    """README, docs and tutorials, as their readers see them."""
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "tutorials").glob("*.ipynb")]
    return "\n".join(pages + ["".join(cell["source"]) for notebook in notebooks for cell in notebook["cells"]])


def test_sections_that_docstrings_cite_are_there() -> None:
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\d+)\.", method, re.M))
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "clip_lens").rglob("*.py"))
    cited = set(re.findall(r"method,? sections? (\d+)", code))
    assert len(cited) > 5 and cited <= sections


def uses(name: str) -> re.Pattern[str]:
    """A public name as code: of the package, imported from it, called, or between backticks; no word of a sentence."""
    code = rf"clip_lens\.{name}\b|from clip_lens import [^\n]*\b{name}\b|`(?:[^`\n]*[^`\n\w.])?{name}\b[^`\n]*`"
    return re.compile(code)


def test_every_public_name_is_used_where_people_read() -> None:
    text = what_is_read()
    assert [name for name in clip_lens.__all__ if not uses(name).search(text)] == []


def test_a_word_of_a_sentence_is_no_use_of_a_name() -> None:
    assert not uses("mean").search("the mean of what circuits mean, effects.mean() and `effects.mean()`")
    used = ("clip_lens.mean", "from clip_lens import Site, mean", "`zeros`, `mean`", "`patch(x, mean)`")
    assert all(uses("mean").search(text) for text in used)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, clip_lens; sys.exit(' '.join({'torch', 'pandas', 'open_clip'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
