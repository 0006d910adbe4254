"""Bars are shown where someone looks, and nowhere else; the package says nothing on import or in a clean run."""

import io
import subprocess
import sys
import time

import pytest
from oracle import batch_of, tower

import clip_lens
from clip_lens import progress
from clip_lens.model.site import Site
from clip_lens.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, screen, *, soon=0.0, ci=None, **options):
    """What a loop of half a second writes to standard error."""
    with monkeypatch.context() as patch:
        patch.delenv("CI", raising=False) if ci is None else patch.setenv("CI", ci)
        patch.setattr(progress, "SOON", soon)
        patch.setattr(sys, "stderr", screen)
        with progress_bar(4, "row", "patching", **options) as bar:
            for _ in range(4):
                bar.update(1)
                time.sleep(0.12)
        return screen.getvalue()


def test_a_terminal_shows_one_line_that_vanishes(monkeypatch):
    said = shown(monkeypatch, Terminal())
    assert "patching" in said and "row/s" in said
    assert said.count("\n") == 0 and said.endswith("\r")


@pytest.mark.parametrize("options", [{"show": False}, {"ci": "true"}, {"soon": 60.0}])
def test_not_when_off_not_in_ci_not_for_short_work(monkeypatch, options):
    assert shown(monkeypatch, Terminal(), **options).strip() == ""


def test_not_into_a_file(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_clean_run_says_nothing():
    code = (
        "import clip_lens; encoder = clip_lens.load(); store = clip_lens.ImageStore.open('tiny');"
        "batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder);"
        "clip_lens.patch_effects(encoder, batch, encoder.sites('head')); clip_lens.direct_effects(encoder, batch);"
        "clip_lens.gradient_effects(encoder, batch, encoder.sites('mlp')); clip_lens.attention_effects(encoder, batch)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def bars(monkeypatch):
    """What every bar that is made counts, and how far it came."""
    made = []

    class Counted(progress.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            self.counted = 0
            made.append((options, self))

        def update(self, n=1):
            self.counted += n

    monkeypatch.setattr(progress, "_kind", lambda: Counted)
    return made


EDGES = {"senders": [Site("head", 0)], "receivers": [Site("out")]}
VERBS = {
    "patching": (lambda e, b: clip_lens.patch_effects(e, b, e.sites("mlp")), "row", 4 * 7),
    "paths through MLPs": (
        lambda e, b: clip_lens.path_effects(e, b, e.sites("head", layers=[0]), [Site("out")], through="mlp"),
        "row",
        4 * 7,
    ),
    "gradients": (lambda e, b: clip_lens.gradient_effects(e, b, e.edges(**EDGES)), "row", 7),
    "attribution": (lambda e, b: clip_lens.direct_effects(e, b), "pair", 7),
    "the lens": (lambda e, b: clip_lens.logit_lens(e, b), "pair", 7),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_bar_counts_up_to_its_total(verb, bars):
    run, unit, least = VERBS[verb]
    run(tower("causal")[1], batch_of("causal"))
    ((options, bar),) = bars
    assert options["unit"] == unit and options["desc"]
    assert bar.counted == options["total"] >= least
