"""Identities: the same content is the same thing, another content another, and what can't be told is anonymous."""

import sys
import types
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from oracle import batch_of, tower

from clip_lens.core.identity import identity_of
from clip_lens.core.metric import cosine, kl, logit, metric
from clip_lens.core.source import as_source, counterpart, mean, noise, resample, source, steered, zeros
from clip_lens.core.via import via
from clip_lens.model.site import Site

MLP = Site("mlp", 1)


@dataclass(frozen=True)
class One:
    value: int


@dataclass(frozen=True)
class Other:
    value: int


def bank(seed, n=3):
    drawn = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


def script(text):
    """What a script of a user's defines."""
    module = types.ModuleType("a_script_of_yours")
    exec(text, module.__dict__)
    return module


DIFFERENT = [
    (torch.zeros(2), torch.ones(2), torch.zeros(2, dtype=torch.float64), torch.zeros(1, 2), np.zeros(2), np.ones(2)),
    (1, 1.0, True, "1", b"1", None, (1,), [1], {1}, {1: 1}),
    ((("a",), "b"), (("a", "b"),), (("a", "b"), ()), ("a", "b"), ({"a": "b"},)),
    (MLP, Site("mlp", 1, slot="eot"), Site("attn", 1)),
    (One(1), Other(1), One(2)),
    (logit, cosine, kl(bank(0)), kl(bank(1)), kl(bank(0).float()), kl(bank(0)[:2])),
    (
        counterpart, as_source(zeros), as_source(mean), resample(0), resample(1), noise(0.0), noise(1.0), noise(1.0, 1),
        mean(over=batch_of("causal")), mean(over=batch_of("causal")[1:]), mean(over=batch_of("causal", run="foil")),
        steered({MLP: torch.zeros(32)}), steered({MLP: torch.ones(32)}), steered({MLP: torch.ones(32)}, "remove"),
        steered({MLP: torch.ones(32)}, "remove", origin={MLP: torch.ones(32)}),
        steered({Site("mlp", 0): torch.ones(32)}), via(MLP), via(MLP, source=zeros), via(MLP, freeze=("head",)),
        via((MLP, Site("mlp", 0))),
    ),
]  # fmt: skip


@pytest.mark.parametrize("things", DIFFERENT, ids=lambda things: type(things[-1]).__name__)
def test_things_of_different_content_differ(things):
    found = [identity_of(thing) for thing in things]
    assert None not in found and len(set(found)) == len(things)


def test_the_same_content_made_twice_is_the_same_thing():
    directions = [{MLP: torch.ones(32)} for _ in range(2)]
    makers = (
        lambda n: kl(bank(0)), lambda n: mean(over=batch_of("causal")[:]), lambda n: resample(3), lambda n: noise(0.5),
        lambda n: steered(directions[n]), lambda n: via(MLP, source=via(MLP, source=resample(3))),
    )  # fmt: skip
    for make in makers:
        assert make(0).identity == make(1).identity is not None


class Callable_:
    def __call__(self, u, readout):
        return u[:, 0]


def closure(w):
    return lambda u, readout: u @ w


def calls_a_class(u, readout):
    return Callable_()(u, readout)


@pytest.mark.parametrize(
    "function",
    [lambda u, readout: u[:, 0], closure(1), partial(closure(1)), Callable_(), Callable_().__call__, calls_a_class],
    ids=["lambda", "closure", "partial", "object", "method", "calls a class"],
)
def test_what_cannot_be_told_is_anonymous(function):
    assert metric(function, oriented=False).identity is None
    assert source(function).identity is None
    assert via(MLP, source=function).identity is None
    assert via(MLP, source=via(MLP, source=function)).identity is None
    assert metric(logit, oriented=False, holds=function).identity is None


def test_what_a_closure_holds_tells_it_apart():
    first, second = (metric(closure(w), oriented=True, holds=w) for w in (bank(0)[0], bank(1)[0]))
    assert first.identity is not None and first.identity != second.identity
    assert first.identity == metric(closure(bank(0)[0]), oriented=True, holds=bank(0)[0]).identity


def test_two_functions_that_hold_the_same_are_two():
    ones = script("take = lambda encoder, batch: 1\ngive = lambda encoder, batch: 2")
    assert source(ones.take, holds=5).identity != source(ones.give, holds=5).identity
    assert metric(partial(ones.take), oriented=True, holds=5).identity == source(ones.take, holds=5).identity


def test_a_function_is_its_code_and_what_it_reads_and_calls():
    text = "factor = {factor}\ndef inner(u):\n    return {what}\ndef outer(u, readout):\n    return factor * inner(u)\n"
    found = {
        identity_of(script(text.format(factor=factor, what=what)).outer)
        for factor, what in ((1, "u"), (2, "u"), (1, "u + 1"), (1, "-u"))
    }
    assert None not in found and len(found) == 4
    same = {identity_of(script(text.format(factor=1, what="u")).outer) for _ in range(2)}
    assert len(same) == 1 and same < found


@pytest.mark.parametrize(
    ("folder", "changes"),
    [("/home/me", True), ("/usr/lib/python3/dist-packages", False), ("/env/site-packages", False)],
)
def test_a_function_of_an_installed_package_goes_by_its_name(folder, changes, monkeypatch):
    both = [script(f"def mine(u, readout):\n    return {n} * u[:, 0]") for n in (1, 2)]
    for module in both:
        module.__file__ = f"{folder}/a_script_of_yours.py"
        module.mine.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, "a_script_of_yours", both[0])
    one, two = (identity_of(module.mine) for module in both)
    assert one is not None and (one != two) == changes


def test_identity_is_that_of_now():
    """Directions, a bank of a user's, a global that a function reads: edited in place they are other things."""
    direction, held = torch.ones(32), torch.ones(16)
    read = script("import torch\nweights = torch.ones(2)\ndef outer(u, readout):\n    return u @ weights\n")
    things = [steered({MLP: direction}), metric(closure(held), oriented=True, holds=held)]
    things.append(metric(read.outer, oriented=True))
    before = [thing.identity for thing in things]
    direction[0], held[0], read.weights[0] = 2.0, 2.0, 2.0
    assert all(thing.identity not in (None, was) for thing, was in zip(things, before, strict=True))


def test_a_bank_is_a_copy():
    given = bank(0)
    metric_, before = kl(given), kl(given).identity
    given[0] = given[1]
    assert metric_.identity == before != kl(given).identity


def test_the_encoder_used_changes_nothing():
    """A source's identity is asked for before and after it ran: what its fetch remembers is no part of it."""
    encoder, batch = tower("causal")[1], batch_of("causal")
    over = mean(over=batch)
    before = over.identity
    over(encoder, batch)(torch.arange(2), ["blocks.1.hook_mlp_out"])
    assert over.identity == before


def test_a_module_is_known_by_its_name_whatever_it_holds(monkeypatch):
    """numpy has a function `identity`: read as what numpy says of itself, it differed from one process to the next."""

    def scaled(u, readout):
        return (u * readout.direction).sum(-1) * np.sqrt(4.0)

    before = identity_of(np), metric(scaled, oriented=True).identity
    monkeypatch.setattr(np, "identity", lambda n: n)
    assert None not in before and before == (identity_of(np), metric(scaled, oriented=True).identity)
