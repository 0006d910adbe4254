"""Do the tests notice a change? A random sample of mutants of each module, each against the module's own tests.

    pip install "mutmut>=3.8"
    python scripts/mutate.py --each 6 --seed 0                     # all of core/ and methods/
    python scripts/mutate.py --each 20 core/rows methods/gradient  # some modules

Works on a copy of the repository's files, with pyproject.toml's [tool.mutmut]. Prints a line per module and the diff of
every mutant that its tests let live; docs/mutation.md says how to judge one.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {
    "core/address": ("core/test_sites.py", "core/test_edges.py"),
    "core/grid": ("core/test_effects.py", "methods/test_direct.py"),
    "core/precision": ("methods/test_direct.py",),
    "core/record": ("core/test_effects.py", "core/test_keep.py"),
    "core/rows": ("core/test_rows.py", "core/test_edges.py", "methods/test_patching.py"),
    "core/setting": ("methods/test_patching.py", "core/test_metric.py"),
    "core/slots": ("methods/test_causal_tracing.py", "core/test_effects.py"),
    "core/store": ("core/test_effects.py",),
    "core/sweep": ("methods/test_patching.py", "core/test_keep.py"),
    "core/table": ("core/test_effects.py", "core/test_localisation.py"),
    "core/via": ("core/test_source.py",),
    "methods/circuits/removal": ("methods/test_faithfulness.py", "methods/test_acdc.py"),
    "methods/registry": ("core/test_keep.py", "methods/test_patching.py"),
    "methods/scores": ("methods/test_confounds.py", "methods/test_scores.py"),
}
"""The tests of modules that have no test file of their own name, or more than that."""
OUTCOMES = {0: "lived", 5: "not reached", 33: "not reached", None: "not run"}
"""By exit status; all others are killed, by a test or because it ran out of time."""


def modules() -> list[str]:
    """Every module of core/ and methods/, as BESIDE names them."""
    found = (path for room in ("core", "methods") for path in (ROOT / "clip_lens" / room).rglob("*.py"))
    return sorted(
        str(path.relative_to(ROOT / "clip_lens").with_suffix("")) for path in found if path.stem != "__init__"
    )


def tests_of(module: str) -> list[str]:
    """The files with a module's tests."""
    room, name = module.split("/")[0], module.split("/")[-1]
    paths = [f"tests/{path}" for path in BESIDE.get(module, (f"{room}/test_{name}.py",))]
    return [path for path in paths if (ROOT / path).exists()]


def copied(module: str, folder: Path) -> None:
    """The repository's files in a folder, set to mutate one module."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    config = folder / "pyproject.toml"
    chosen = {"only_mutate": [f"clip_lens/{module}.py"], "pytest_add_cli_args_test_selection": tests_of(module)}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in chosen.items())
    config.write_text(config.read_text().replace("[tool.mutmut]\n", f"[tool.mutmut]\n{lines}"))


def mutmut(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def outcomes(module: str, folder: Path) -> dict[str, int | None]:
    """How the tests ended for each mutant; None = not run yet."""
    path = folder / "mutants" / "clip_lens" / f"{module}.py.meta"
    return json.loads(path.read_text())["exit_code_by_key"] if path.exists() else {}


def judge(module: str, each: int, seed: int) -> None:
    """Runs a sample of a module's mutants, and prints what became of them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copied(module, folder)
        said = mutmut(
            folder, "run", "--max-children", "1", "no such mutant"
        )  # makes all, and asks which test runs what
        names = sorted(outcomes(module, folder))
        if not names:
            print(f"{module}: no mutants\n{said[-2000:]}", flush=True)
            return
        chosen = random.Random(f"{seed} {module}").sample(names, min(each, len(names)))
        said = mutmut(folder, "run", "--max-children", "1", *chosen)
        ended = {name: OUTCOMES.get(code, "killed") for name, code in outcomes(module, folder).items()}
        count = Counter(ended[name] for name in chosen)
        print(f"{module}: {len(names)} mutants, {len(chosen)} run: {dict(count)}", flush=True)
        for name in chosen:
            if ended[name] != "killed":
                print(f"--- {ended[name]}: {name}\n{mutmut(folder, 'show', name)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=modules(), help="such as core/rows; left out: all")
    parser.add_argument("--each", type=int, default=6, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for one in given.modules:
        judge(one, given.each, given.seed)
