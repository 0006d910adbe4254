"""`pytest --count-asserts -n 0 tests/...`: which tests, parameters and examples of hypothesis check nothing.

A check is an `assert`, or a call whose name begins with assert, raises, warns or fail, in a file of the tests' folder.
"""

import ast
import inspect
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis.errors import StopTest, UnsatisfiedAssumption

CALLS = ("assert", "raises", "warns", "fail")
LEFT = (UnsatisfiedAssumption, StopTest, pytest.skip.Exception)
FOLDER = str(Path(__file__).parent)


def is_check(node):
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", "")).startswith(CALLS)
    return isinstance(node, ast.Assert)


@cache
def checks(path):
    """The check that each line of a file belongs to, by the check's first line; nothing for files elsewhere."""
    nodes = ast.walk(ast.parse(Path(path).read_text())) if path.startswith(FOLDER) else ()
    return {line: node.lineno for node in nodes if is_check(node) for line in range(node.lineno, node.end_lineno + 1)}


class Counted:
    def __init__(self):
        self.examples, self.idle, self.entered, self.done = {}, {}, set(), set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if not hasattr(item, "function"):
            return (yield)
        function = getattr(item.function, "hypothesis", None)
        body = inspect.unwrap(function.inner_test if function else item.function).__code__
        found, before = Counter(), sys.gettrace()

        def local(frame, event, arg):
            check = checks(frame.f_code.co_filename).get(frame.f_lineno) if event == "line" else None
            if check:
                found["checks"] += 1
                self.done.add((frame.f_code.co_filename, check))
            if event == "exception" and frame.f_code is body and issubclass(arg[0], LEFT):
                found["checks"] = found["start"] + 1
            if event == "return" and frame.f_code is body:
                found["idle"] += found["checks"] == found["start"]
            return local

        def trace(frame, event, arg):
            if frame.f_code is body:
                found["examples"] += 1
                found["start"] = found["checks"]
            if checks(frame.f_code.co_filename):
                self.entered.add(frame.f_code)
                return local
            return None

        sys.settrace(trace)
        try:
            return (yield)
        finally:
            sys.settrace(before)
            self.examples[item.nodeid], self.idle[item.nodeid] = found["examples"], found["idle"]

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("checks")
        for name, idle in self.idle.items():
            if idle:
                terminalreporter.line(f"{name}: {idle} of {self.examples[name]} examples checked nothing")
        lines = {(code.co_filename, line) for code in self.entered for *_, line in code.co_lines()}
        reachable = {(path, checks(path)[line]) for path, line in lines if line in checks(path)}
        for path, line in sorted(reachable - self.done):
            terminalreporter.line(f"{path}:{line}: no test got here")
