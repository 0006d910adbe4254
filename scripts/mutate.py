"""Do the tests notice a change? A random sample of mutants of core/ and methods/, each against the tests that reach it.

    pip install "mutmut==3.8.*"
    python scripts/mutate.py --each 6 --seed 0                     # all of core/ and methods/
    python scripts/mutate.py --each 40 core/rows methods/gradient --tests tests/core tests/methods/test_gradient.py

mutmut writes the mutants (pyproject.toml's [tool.mutmut]) into a copy of the repository's files. Here all tests run
once, which says which test reaches which function; then each mutant is tried in a fork of that very process, with
everything imported and every tower built, by the tests that reach it, those first that reach least else, until one
fails. Prints a line per mutant and the diff of each that lives; docs/mutation.md says how to judge one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNDER_TEST = "MUTANT_UNDER_TEST"
"""mutmut's variable: the name of the mutant that acts, or "stats" while functions that are reached are noted."""


def modules() -> list[str]:
    """Every module of core/ and methods/, such as core/rows."""
    found = (path for room in ("core", "methods") for path in (ROOT / "clip_lens" / room).rglob("*.py"))
    every = (str(path.relative_to(ROOT / "clip_lens").with_suffix("")) for path in found)
    return sorted(name for name in every if not name.endswith("__init__"))


def copied(chosen: Sequence[str], folder: Path) -> None:
    """The repository's files in a folder, with the mutants of some modules in folder/mutants."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    config = folder / "pyproject.toml"
    only = json.dumps([f"clip_lens/{module}.py" for module in chosen])
    config.write_text(config.read_text().replace("[tool.mutmut]\n", f"[tool.mutmut]\nonly_mutate = {only}\n"))
    mutmut(folder, "run", "--max-children", "1", "none: they are tried here")


def mutmut(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def sample(module: str, folder: Path, each: int, seed: int) -> list[str]:
    """Some of a module's mutants."""
    path = folder / "mutants" / "clip_lens" / f"{module}.py.meta"
    names = sorted(json.loads(path.read_text())["exit_code_by_key"]) if path.exists() else []
    return random.Random(f"{seed} {module}").sample(names, min(each, len(names)))


class Test(NamedTuple):
    item: pytest.Item
    took: float
    reaches: int
    """How many functions of the chosen modules it reaches."""


@dataclass
class Trials:
    """A pytest plugin: the tests once, then every mutant in a fork."""

    mutants: Sequence[str]
    quick: float
    """Tests that take longer, in seconds, are left out."""
    budget: float
    """For how many seconds of tests a mutant must live."""
    outcome: dict[str, str] = field(default_factory=dict)
    failed: bool = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def run(self, session: pytest.Session, item: pytest.Item, following: pytest.Item | None) -> bool:
        """Whether a test fails."""
        self.failed = False
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return self.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from mutmut.state import state

        os.environ[UNDER_TEST] = "stats"
        reached: dict[str, list[Test]] = {}
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            state()._stats.clear()
            start = time.monotonic()
            failed, took = self.run(session, item, following), time.monotonic() - start
            if not failed and took < self.quick:
                for function in set(state()._stats):
                    reached.setdefault(function, []).append(Test(item, took, len(state()._stats)))
        for mutant in self.mutants:
            tests = self.chosen(reached.get(mutant.rpartition("__mutmut_")[0], []))
            self.outcome[mutant] = self.tried(session, mutant, tests) if tests else "not reached"
            print(f"{self.outcome[mutant]}: {mutant} ({len(tests)} tests)", file=sys.stderr, flush=True)
        return True

    def chosen(self, tests: Sequence[Test]) -> list[Test]:
        """The tests that reach least beside the function, as many as the budget allows."""
        ranked = sorted(tests, key=lambda test: (test.reaches, test.took))
        until = accumulate(test.took for test in ranked)
        return [test for test, end in zip(ranked, until, strict=True) if end <= self.budget or test is ranked[0]]

    def tried(self, session: pytest.Session, mutant: str, tests: Sequence[Test]) -> str:
        """What becomes of a mutant in a process of its own."""
        child = os.fork()
        if child == 0:
            os.environ[UNDER_TEST] = mutant
            signal.alarm(60 + int(5 * sum(test.took for test in tests)))
            os._exit(any(self.run(session, test.item, None) for test in tests))
        status = os.waitpid(child, 0)[1]
        return "lived" if status == 0 else "killed"


def main(chosen: Sequence[str], tests: Sequence[str], each: int, seed: int, quick: float, budget: float) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copied(chosen, folder)
        by_module = {module: sample(module, folder, each, seed) for module in chosen}
        os.chdir(folder / "mutants")
        sys.path.insert(0, str(folder / "mutants"))
        trials = Trials([name for names in by_module.values() for name in names], quick, budget)
        quiet = ["-n", "0", "-p", "no:cacheprovider", "-p", "no:terminal", "-o", "addopts=", "-m", "not slow"]
        pytest.main([*quiet, *tests], plugins=[trials])
        for module, names in by_module.items():
            print(f"{module}: {dict(Counter(trials.outcome.get(name, 'not run') for name in names))}")
        for name, outcome in trials.outcome.items():
            if outcome != "killed":
                diff = re.sub(r"(?m)^ .*\n", "", mutmut(folder, "show", name))
                print(f"\n{outcome}: {name}\n{diff}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=modules(), help="such as core/rows; left out: all")
    noticing = ["tests/core", "tests/methods", "tests/test_device.py"]
    parser.add_argument("--tests", nargs="+", default=noticing, help="which tests may notice")
    parser.add_argument("--each", type=int, default=6, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", type=float, default=10.0, help="leave out tests that take longer, in seconds")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests that a mutant must live through")
    given = parser.parse_args()
    main(given.modules, given.tests, given.each, given.seed, given.quick, given.budget)
