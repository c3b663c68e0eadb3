# SPDX-License-Identifier: Apache-2.0
"""Random sequences of what users do to an optimizer, against plain loops that are told the same.

MSAM_SEQUENCES=10000 pytest tests/test_sequences.py    # instead of the 500 of every run
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from msam_kernels import MicroBatchSAM
from plain import BACKENDS, METHODS, WITHOUT_MOMENTUM, PlainSAM, random_numbers, same_bits, through_a_file

SEQUENCES = int(os.environ.get("MSAM_SEQUENCES", "500"))
SHAPES = ((3,), (2, 2), (), (5,), (1, 3))
LATE = len(SHAPES) - 1  # the last parameter may come later, in a group of its own
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD without momentum": lambda params: SGD(params, lr=0.05),
    "Adam amsgrad": lambda params: Adam(params, lr=0.01, amsgrad=True),
    "AdamW": lambda params: AdamW(params, lr=0.01),
    "RMSprop": lambda params: RMSprop(params, lr=0.01, momentum=0.5),
}
# What a mask holds depends on every gradient so far, to the last bit: test_masks.py has that.
NAMES = [name for name in METHODS if "Sparse" not in name]


class Twins:
    """An optimizer and the plain loops, each with parameters of its own, which must stay equal."""

    def __init__(self, base: str, method: str, micro_batches: int, dtype: torch.dtype, flatten: bool, backend: str):
        self.base, self.method, self.dtype = BASES[base], METHODS[method], dtype
        self.options = {"num_micro_batches": micro_batches, "flatten": flatten, "backend": backend}
        generator = random_numbers(0)
        start = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
        self.ours, self.theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
        self.groups, self.seed = 1, 0
        self.opt = self.wrapped(self.ours)
        self.plain = PlainSAM(self.base(self.theirs[:LATE]), 0.1, self.method)

    def wrapped(self, params: list[nn.Parameter]) -> MicroBatchSAM:
        groups = [{"params": params[:LATE]}, {"params": params[LATE:]}][: self.groups]
        return MicroBatchSAM(self.base(groups), 0.1, method=self.method, **self.options)

    def numbers(self, *shape: int) -> Tensor:
        self.seed += 1
        return torch.randn(shape, generator=random_numbers(self.seed), dtype=torch.float64).to(self.dtype)

    def batch(self) -> Tensor:
        return self.numbers(self.opt.num_micro_batches, 4)

    def body(self, params: list[nn.Parameter], x: Tensor, used: int) -> None:
        """Forward and backward; the parameters whose bits are not set in ``used`` take no part."""
        x, total = x.mean(0), x.sum() * 0
        for i, p in enumerate(params):
            if used >> i & 1:
                total = total + ((p - x[i % 4]).square() * (1 + i)).mean() + (p * x.sum()).tanh().sum() * total.tanh()
        if total.requires_grad:
            total.backward()

    def closures(self, params: list[nn.Parameter], x: Tensor, used: int, bad: bool = False) -> list[Callable[[], None]]:
        """``bad``: in the first pass of the first micro-batch a gradient is not finite."""
        passes = []

        def closure(part: Tensor) -> None:
            self.body(params, part, used)
            passes.append(part)
            if bad and len(passes) == 1:
                for p in params:
                    if p.grad is not None:
                        p.grad.fill_(math.nan)

        return [lambda part=part: closure(part) for part in x.split(1)]

    # -- what users do: first ours, then the plain loops -----------------------------------------------------------------

    def passes(self, used: int, before: bool) -> None:
        x = self.batch()
        grads = [self.numbers(*shape) if before and i % 2 else None for i, shape in enumerate(SHAPES[:LATE])]
        for p, g in zip(self.ours, grads, strict=False):
            p.grad = None if g is None else g.clone()
        for part in self.opt.passes(x):
            self.body(self.ours, part, used)
        self.opt.step()
        self.opt.zero_grad()
        there = {p: g for p, g in zip(self.theirs, grads, strict=False) if g is not None}
        self.plain.step(self.closures(self.theirs, x, used), before=there)

    def whole_step(self, used: int) -> None:
        x = self.batch()
        closures = self.closures(self.ours, x, used)
        self.opt.step(closures if len(closures) > 1 else closures[0])
        self.plain.step(self.closures(self.theirs, x, used))

    def overflow(self, used: int) -> None:
        """Where a gradient at w is not finite, that of the descent is not either, and whoever sees it leaves the step out."""
        x = self.batch()
        here = x.split(1)
        closures = self.closures(self.ours, x, used, bad=True)
        for part in self.opt.passes(x):
            (i,) = (i for i, other in enumerate(here) if torch.equal(other, part))
            closures[i]()
        params = [p for p in self.opt.engine.store.parameters() if p.grad is not None]
        assert all(bool(p.grad.isnan().all()) for p in params)
        self.opt.zero_grad()
        self.plain.give_up(self.closures(self.theirs, x, used, bad=True), None)

    def give_up(self, used: int, after: int, how: str) -> None:
        x = self.batch()
        old = [p.detach().clone() for p in self.ours]
        loop = self.opt.passes(x)
        count = 0
        for part in loop:
            self.body(self.ours, part, used)
            count += 1
            if count == after:
                if how == "restore":
                    self.opt.restore()
                break
        else:
            self.opt.zero_grad()
        del loop
        assert same_bits(self.ours, old)
        assert all(p.grad is None for p in self.opt.engine.store.parameters())
        self.plain.give_up(self.closures(self.theirs, x, used), count if count == after else None)

    def base_step(self) -> None:
        grads = [self.numbers(*shape) if i != 1 else None for i, shape in enumerate(SHAPES)]
        for params in (self.ours, self.theirs):
            for p, g in zip(params, grads, strict=True):
                p.grad = None if g is None else g.clone()
        enabled, self.opt.enabled = self.opt.enabled, False
        self.opt.step()
        self.opt.enabled = enabled
        self.plain.base.step()
        self.plain.steps += 1

    def set_group(self, name: str, value: float) -> None:
        for optimizer in (self.opt, self.plain.base):
            optimizer.param_groups[-1][name] = value

    def freeze(self, i: int, trains: bool) -> None:
        for params in (self.ours, self.theirs):
            params[i].requires_grad_(trains)

    def repoint(self, i: int) -> None:
        self.ours[i].data = self.ours[i].data.clone()

    def enable(self, enabled: bool) -> None:
        self.opt.enabled = self.plain.enabled = enabled

    def add_group(self) -> None:
        if self.groups == 1:
            self.groups = 2
            self.opt.add_param_group({"params": [self.ours[LATE]], "lr": 0.02})
            self.plain.base.add_param_group({"params": [self.theirs[LATE]], "lr": 0.02})

    def resume(self) -> None:
        state, enabled = through_a_file(self.opt.state_dict()), self.opt.enabled
        self.ours = copy.deepcopy(self.ours)
        self.opt = self.wrapped(self.ours)
        self.opt.load_state_dict(state)
        self.opt.enabled = enabled

    def load_its_own(self) -> None:
        self.opt.load_state_dict(self.opt.state_dict())

    def copy(self) -> None:
        self.ours, self.opt = copy.deepcopy((self.ours, self.opt))

    def check(self) -> None:
        tolerance = 1e-9 if self.dtype == torch.float64 else 1e-3
        for actual, expected in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
        for params in (self.ours, self.theirs):
            for p in params:
                p.grad = None


USED = st.integers(0, 2 ** len(SHAPES) - 1) | st.just(2 ** len(SHAPES) - 1)
INDEX = st.integers(0, LATE - 1)
OPERATIONS = {
    "passes": st.tuples(USED, st.booleans()),
    "whole_step": st.tuples(USED),
    "overflow": st.tuples(USED),
    "give_up": st.tuples(USED, st.integers(1, 5), st.sampled_from(["break", "restore"])),
    "base_step": st.tuples(),
    "set_group": st.tuples(st.just("lr"), st.sampled_from([0.0, 0.01, 0.03]))
    | st.tuples(st.just("weight_decay"), st.sampled_from([0.0, 0.02]))
    | st.tuples(st.just("rho"), st.sampled_from([0.0, 0.05, 0.2])),
    "freeze": st.tuples(INDEX, st.booleans()),
    "repoint": st.tuples(INDEX),
    "enable": st.tuples(st.booleans()),
    "add_group": st.tuples(),
    "resume": st.tuples(),
    "load_its_own": st.tuples(),
    "copy": st.tuples(),
}
STEPS = ("passes", "whole_step")
USES = (*STEPS, "overflow", "give_up")


@st.composite
def sequences(draw: st.DrawFn) -> tuple[tuple[Any, ...], list[tuple[str, tuple[Any, ...]]]]:
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    # In fp32 the others divide a gradient that is nearly 0 by its own length: what rounding left of it would count.
    base = draw(st.sampled_from([name for name in BASES if dtype == torch.float64 or name.startswith("SGD")]))
    method = draw(st.sampled_from([name for name in NAMES if "without" not in base or name in WITHOUT_MOMENTUM]))
    operations = list(OPERATIONS)
    everything, looks = 2 ** len(SHAPES) - 1, METHODS[method].period > 1
    if looks:  # between two of its own steps LookSAM wants to be left as it was
        operations = [name for name in operations if name not in ("base_step", "enable", "add_group", "freeze")]
    chosen = draw(st.lists(st.sampled_from(operations) | st.sampled_from(STEPS), min_size=2, max_size=7))
    twins = base, method, draw(st.integers(1, 3)), dtype, draw(st.booleans())
    drawn = [(name, draw(OPERATIONS[name])) for name in chosen]
    if (
        looks
    ):  # of a single number that has a gradient nothing is orthogonal to another one: v would be rounding over 1e-12
        drawn = [(name, (everything, *rest[1:]) if name in USES else rest) for name, rest in drawn]
    return twins, drawn


@pytest.mark.filterwarnings("ignore:no parameter of the optimizer has a gradient after this pass")
@pytest.mark.filterwarnings("ignore:the closure left no gradient for any parameter of the optimizer")
@pytest.mark.parametrize("backend", BACKENDS[:1])
@settings(max_examples=SEQUENCES, derandomize=True)
@given(sequence=sequences())
def test_any_sequence_of_operations_follows_the_plain_loops(sequence, backend):
    options, operations = sequence
    twins = Twins(*options, backend)
    for name, arguments in operations:
        note(f"{name}{arguments}")
        getattr(twins, name)(*arguments)
        twins.check()
