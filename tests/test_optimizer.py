# SPDX-License-Identifier: Apache-2.0
"""A step does what the definitions say: against torch's own optimizers at rho = 0, against plain loops elsewhere."""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict, UserDict, UserList, deque, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.dlpack import from_dlpack

import msam_kernels
from msam_kernels import MicroBatchSAM, batches, methods
from msam_kernels.flat import CHUNK
from plain import (
    DEVICE,
    METHODS,
    WAYS,
    WITHOUT_MOMENTUM,
    PlainSAM,
    Zoo,
    assert_close,
    batch,
    closure_of,
    follow_the_plain_loops,
    gradients,
    images,
    loss_of,
    mlp,
    random_numbers,
    remembered,
    rows,
    same_bits,
    split,
    weights,
)

FLOAT64 = torch.float64


class SignSGD(SGD):
    """A subclass with a step of its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad.sign()


def with_counting_hooks(base):
    """Hooks that change what the step does, so that leaving them out shows."""

    def halve(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad / 2

    base.register_step_pre_hook(halve)
    return base


# Every flag of the fused updates, flags that have no fused kernel, and optimizers that have none at all.
BASES = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "SGD momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "SGD dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "SGD nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD weight_decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "SGD maximize": lambda p: SGD(p, lr=0.1, momentum=0.9, maximize=True),
    "SGD nesterov weight_decay maximize": lambda p: SGD(
        p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1, maximize=True
    ),
    "SGD dampening weight_decay": lambda p: SGD(p, lr=0.1, momentum=0.5, dampening=0.9, weight_decay=0.01),
    "SGD tensor lr": lambda p: SGD(p, lr=torch.tensor(0.1, dtype=FLOAT64), momentum=0.9),
    "SGD foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: Adam(p, lr=0.1),
    "Adam betas": lambda p: Adam(p, lr=0.1, betas=(0.3, 0.7)),
    "Adam beta1=0.5": lambda p: Adam(p, lr=0.1, betas=(0.5, 0.99)),
    "Adam beta1=0": lambda p: Adam(p, lr=0.1, betas=(0.0, 0.99)),
    "Adam eps": lambda p: Adam(p, lr=0.1, eps=0.1),
    "Adam weight_decay": lambda p: Adam(p, lr=0.1, weight_decay=0.1),
    "Adam amsgrad": lambda p: Adam(p, lr=0.1, amsgrad=True),
    "Adam maximize": lambda p: Adam(p, lr=0.1, maximize=True),
    "Adam everything": lambda p: Adam(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=True, maximize=True),
    **(
        {"Adam decoupled": lambda p: Adam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)}
        if "decoupled_weight_decay" in inspect.signature(Adam).parameters
        else {}
    ),
    "Adam tensor lr": lambda p: Adam(p, lr=torch.tensor(0.1, dtype=FLOAT64)),
    "Adam tensor betas": lambda p: Adam(
        p, lr=0.1, betas=(torch.tensor(0.8, dtype=FLOAT64), torch.tensor(0.9, dtype=FLOAT64)), foreach=False
    ),
    "Adam foreach": lambda p: Adam(p, lr=0.1, foreach=True),
    "Adam fused": lambda p: Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.1),
    "AdamW weight_decay=0": lambda p: AdamW(p, lr=0.1, weight_decay=0),
    "AdamW everything": lambda p: AdamW(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, amsgrad=True, maximize=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.1),
    "Adamax": lambda p: Adamax(p, lr=0.1),
    "NAdam": lambda p: NAdam(p, lr=0.1),
    "a subclass of SGD": lambda p: SignSGD(p, lr=0.01),
    "SGD with a hook": lambda p: with_counting_hooks(SGD(p, lr=0.1, momentum=0.9)),
}

MANY_FLAGS = {"SGD nesterov weight_decay maximize", "Adam everything", "AdamW everything"}


# ---- the base optimizer's step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BASES)
def test_at_rho_0_the_steps_are_torchs_own(name, way, backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = BASES[name](expected.parameters())
    ours = MicroBatchSAM(BASES[name](actual.parameters()), rho=0.0, num_micro_batches=2, backend=backend)
    for step in range(5):
        data = batch(6, FLOAT64, seed=step)
        WAYS[way](ours, actual, data)
        loss_of(expected, *data).backward()
        theirs.step()
        theirs.zero_grad()
    assert_close(actual, expected)
    for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(ours.state[p][key], value, rtol=1e-12, atol=1e-12, check_dtype=True)


@pytest.mark.parametrize(("flag", "error"), [("capturable", AssertionError), ("differentiable", RuntimeError)])
@pytest.mark.parametrize("way", WAYS)
def test_a_flag_without_a_kernel_takes_the_base_optimizers_own_step(flag, error, way):
    """On leaves on the CPU torch refuses these two flags. So they are refused here, and nothing changes."""
    model, data = mlp(), batch(6)
    base = Adam(model.parameters(), **{flag: True})
    opt = MicroBatchSAM(base, rho=0.1, num_micro_batches=2)
    before = weights(model)
    with pytest.raises(error) as ours:
        WAYS[way](opt, model, data)
    assert same_bits(model.parameters(), before)
    opt.zero_grad()
    opt.enabled = False
    loss_of(model, *data).backward()
    with pytest.raises(error) as theirs:
        base.step()
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_base_optimizer_with_a_rho_of_its_own_is_refused_or_keeps_it_apart(way):
    """Adadelta's ``rho`` is a decay, and lives in the same groups."""
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(Adadelta(expected.parameters(), lr=0.1), 0.05)
    theirs.base.param_groups[0]["rho"] = 0.05
    try:
        ours = MicroBatchSAM(Adadelta(actual.parameters(), lr=0.1), rho=0.05, num_micro_batches=2)
    except ValueError as refusal:
        assert "rho" in str(refusal)
        assert "Adadelta" in str(refusal)
        return
    for step in range(3):
        data = batch(6, FLOAT64, seed=step)
        WAYS[way](ours, actual, data)
        # The plain loops read the radius, the base optimizer its decay.
        theirs.base.param_groups[0]["rho"] = 0.05
        hook = theirs.base.register_step_pre_hook(lambda base, *_: base.param_groups[0].update(rho=0.9))
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
        hook.remove()
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SGD momentum", [{"momentum": 0.0}, {"momentum": 0.9}, {"lr": 0.01, "nesterov": True}, {"weight_decay": 0.1}]),
        ("SGD", [{"momentum": 0.9}, {"dampening": 0.5}, {"maximize": True}, {"lr": torch.tensor(0.03, dtype=FLOAT64)}]),
        ("Adam", [{"betas": (0.5, 0.6)}, {"eps": 0.01}, {"maximize": True}, {"weight_decay": 0.1}]),
        (
            "AdamW",
            [{"lr": 0.03}, {"weight_decay": 0.5}, {"betas": (0.1, 0.99)}, {"lr": torch.tensor(0.01, dtype=FLOAT64)}],
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_settings_changed_between_steps_hold_from_the_next_step(name, changes, backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(BASES[name](expected.parameters()), 0.1)
    ours = MicroBatchSAM(BASES[name](actual.parameters()), rho=0.1, backend=backend)
    for change in [{}, *changes, {"rho": 0.5}, {}]:
        theirs.base.param_groups[0].update(change)
        ours.param_groups[0].update(change)
        ours.step(closure_of(actual, batch(dtype=FLOAT64)))
        theirs.step([closure_of(expected, batch(dtype=FLOAT64))])
        assert_close(actual, expected)


class Ascends(torch.optim.Optimizer):
    """As optimizers elsewhere are made: one flag for all groups."""

    def __init__(self, params, maximize):
        super().__init__(params, {"lr": 0.1})
        self.maximize = maximize

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p += group["lr"] * (p.grad if self.maximize else -p.grad)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", WITHOUT_MOMENTUM)
def test_an_optimizer_may_have_its_flag_to_maximize_for_all_groups(method, way, backend):
    trained = []
    for maximize in (True, False):
        model = mlp(FLOAT64)
        opt = MicroBatchSAM(Ascends(model.parameters(), maximize), 0.1, method=METHODS[method], backend=backend)
        if maximize:  # gradients of the negative loss
            for p in model.parameters():
                p.register_hook(torch.neg)
        for step in range(3):
            WAYS[way](opt, model, batch(6, FLOAT64, seed=step))
        trained.append(model)
    assert_close(*trained)


# What is set in the first step, in the second and so on.
SET_INSIDE = {
    "SGD": [{"lr": 0.0}, {"momentum": 0.9, "lr": 0.1}, {"weight_decay": 0.5}, {"dampening": 0.5}, {"nesterov": False}],
    "SGD nesterov": [{"momentum": 0.5}, {"nesterov": False}, {"momentum": 0.0}, {"lr": torch.tensor(0.01)}],
    "Adam": [{"lr": 0.0}, {"betas": (0.5, 0.6), "lr": 0.1}, {"eps": 0.01}, {"weight_decay": 0.1}],
    "AdamW": [{"weight_decay": 0.5}, {"lr": 0.0}],
    "RMSprop": [{"lr": 0.0}, {"momentum": 0.5, "lr": 0.1}],
}


@pytest.mark.parametrize("way", ["closure", "passes", "drop-in"])
@pytest.mark.parametrize("name", SET_INSIDE)
def test_settings_changed_within_a_step_hold_in_its_update(name, way, backend):
    """By a closure, by the body of a loop, between the drop-in's two steps: torch reads them when it updates."""
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs, base = PlainSAM(BASES[name](expected.parameters()), 0.1), BASES[name](actual.parameters())
    if way == "drop-in":
        opt = msam_kernels.SAM(actual.parameters(), type(base), rho=0.1, lr=0.1)
        opt.param_groups[0].update({k: v for k, v in base.param_groups[0].items() if k != "params"})
    else:
        opt = MicroBatchSAM(base, rho=0.1, backend=backend)
    opt_base = opt.base_optimizer
    for step, change in enumerate(SET_INSIDE[name]):
        data = batch(dtype=FLOAT64, seed=step)

        def closure(model, base, data=data, change=change):
            def run():
                base.param_groups[0].update(change)
                loss = loss_of(model, *data)
                loss.backward()
                return loss

            return run

        if way == "drop-in":
            loss_of(actual, *data).backward()
            opt.first_step(zero_grad=True)
            closure(actual, opt_base)()
            opt.second_step(zero_grad=True)
        elif way == "passes":
            for _ in opt.passes(*data):
                closure(actual, opt_base)()
            opt.step()
            opt.zero_grad()
        else:
            opt.step(closure(actual, opt_base))
        theirs.step([closure(expected, theirs.base)])
        assert_close(actual, expected)


def test_a_tensor_learning_rate_that_is_changed_in_place_is_read_every_step(backend):
    lr = torch.tensor(0.1, dtype=FLOAT64)
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs, ours = (
        SGD(expected.parameters(), lr=lr),
        MicroBatchSAM(SGD(actual.parameters(), lr=lr), rho=0, backend=backend),
    )
    for _ in range(3):
        ours.step(closure_of(actual, batch(dtype=FLOAT64)))
        closure_of(expected, batch(dtype=FLOAT64))()
        theirs.step()
        theirs.zero_grad()
        lr.mul_(0.5)
    assert_close(actual, expected)


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "with a scheduler around it"])
def test_a_step_that_the_user_patched_into_the_base_optimizer_is_used(scheduled):
    model = mlp()
    base = SGD(model.parameters(), lr=0.1)
    calls = []

    def step(self, closure=None):
        calls.append(True)

    base.step = step.__get__(base)
    if scheduled:
        torch.optim.lr_scheduler.StepLR(base, 10)
    MicroBatchSAM(base).step(closure_of(model, batch()))
    assert calls == [True]


# ---- against plain loops ---------------------------------------------------------------------------------------------


@rows(("method", "name", "micro_batches", "way"), METHODS, [*sorted(MANY_FLAGS), "RMSprop"], [1, 3], WAYS, every=3)
def test_parameters_of_every_kind_follow_the_plain_loops(method, name, micro_batches, way, backend):
    def check(ours, theirs):
        if not theirs.grad_norms:  # a step of LookSAM that perturbs nothing
            return
        stats = ours.stats
        torch.testing.assert_close(stats.grad_norm, torch.stack(theirs.grad_norms), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            stats.perturbation_norm, torch.stack(theirs.perturbation_norms), rtol=1e-12, atol=1e-12
        )
        assert stats.nonfinite.tolist() == [False] * len(theirs.grad_norms)

    actual, ours, _ = follow_the_plain_loops(
        Zoo(), BASES[name], METHODS[method], micro_batches, way, backend, check=check
    )
    assert actual.square is actual.also_square
    assert ours.state.get(actual.unused, {}) == ours.state.get(actual.frozen, {}) == {}


# Calls of the model count: two per micro-batch, two micro-batches a step.
PRESENCE = {
    "first pass only": lambda call: call % 2 == 0,
    "second pass only": lambda call: call % 2 == 1,
    "first micro-batch only": lambda call: call % 4 < 2,
    "last micro-batch only": lambda call: call % 4 >= 2,
    "first pass of one, second of the other": lambda call: call % 4 in (0, 3),
    "second pass of one, first of the other": lambda call: call % 4 in (1, 2),
    "every other step": lambda call: call % 8 < 4,
    "from the third step on": lambda call: call >= 8,
    "from the last pass of the second step on": lambda call: call >= 7,
    "not after the first pass": lambda call: call == 0,
    "never": lambda call: False,
}


@rows(
    ("method", "presence", "name", "way", "micro_batches"),
    ["SAM", "F-SAM sigma=0.5 lmbda=0.6", "WSAM"],
    PRESENCE,
    ["SGD dampening weight_decay", "Adam everything", "RMSprop"],
    ["passes", "train_step"],
    [2, 1],
    every=3,
)
def test_a_parameter_may_get_a_gradient_in_some_passes_only(method, micro_batches, presence, name, way, backend):
    expected = Zoo(uses=PRESENCE[presence])
    actual, ours, theirs = follow_the_plain_loops(expected, BASES[name], METHODS[method], micro_batches, way, backend)
    assert (actual.sometimes in ours.state) == (expected.sometimes in theirs.base.state)


@pytest.mark.parametrize("method", ["F-SAM", "GSAM", "LookSAM k=2"])
def test_parameters_of_several_rows_follow_the_plain_loops(method, backend):
    """The kernels' table has a row for every 16,384 elements of a parameter."""
    generator = random_numbers(0)
    start = [torch.randn(n, dtype=FLOAT64, generator=generator) for n in (2 * CHUNK, 3, CHUNK + 5)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    opt = MicroBatchSAM(
        SGD(ours, lr=0.1, momentum=0.9), 0.5, method=METHODS[method], num_micro_batches=2, backend=backend
    )
    plain = PlainSAM(SGD(theirs, lr=0.1, momentum=0.9), 0.5, METHODS[method])
    for step in range(4):
        for one, params in ((opt, ours), (plain, theirs)):
            one.step([lambda x=x, ps=params: sum((p * x).cos().sum() for p in ps).backward() for x in (step + 1, 0.7)])
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-11, atol=1e-11)


@st.composite
def problems(draw):
    """Parameters of any shape in groups, and for each of them the calls in which it gets a gradient."""
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6))
    steps, micro_batches = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    most = 3 * steps * micro_batches  # passes
    base = draw(st.sampled_from(["SGD", *sorted(MANY_FLAGS), "SGD dampening weight_decay"]))
    calls = st.lists(st.booleans(), min_size=most, max_size=most)
    return {
        "shapes": shapes,
        "steps": steps,
        "micro_batches": micro_batches,
        "present": [draw(st.one_of(st.none(), calls)) for _ in shapes],
        "group": [draw(st.integers(0, 1)) for _ in shapes],
        "rho": draw(st.tuples(*[st.sampled_from([0.0, 0.05, 1.0])] * 2)),
        "reverse": [draw(st.booleans()) for _ in shapes],
        "method": draw(st.sampled_from(sorted(WITHOUT_MOMENTUM if base == "SGD" else METHODS))),
        "base": base,
        "flatten": draw(st.booleans()),
        "fused": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.filterwarnings("ignore:no parameter of the optimizer has a gradient after this pass")
@pytest.mark.filterwarnings("ignore:the closure left no gradient for any parameter of the optimizer")
@settings(max_examples=60)
@given(problem=problems())
def test_any_parameters_and_any_gradients_follow_the_plain_loops(problem, backend):
    if METHODS[problem["method"]].period > 1:
        # Of a single number that has a gradient nothing is orthogonal to another one: v would be rounding over 1e-12.
        assume(all(calls is None for calls in problem["present"]) and sum(map(math.prod, problem["shapes"])) > 1)
    generator = random_numbers(problem["seed"])
    start, targets, curvatures = [], [], []
    for shape, reverse in zip(problem["shapes"], problem["reverse"], strict=True):
        # Dense, but in another memory order than the usual one.
        order = tuple(reversed(range(len(shape)))) if reverse else tuple(range(len(shape)))
        start.append(torch.randn([shape[i] for i in order], dtype=FLOAT64, generator=generator).permute(order))
        targets.append(torch.randn(shape, dtype=FLOAT64, generator=generator))
        curvatures.append(torch.rand(shape, dtype=FLOAT64, generator=generator) + 0.1)

    def optimizer():
        params = [nn.Parameter(w.clone()) for w in start]
        groups = [
            {"params": [p for p, h in zip(params, problem["group"], strict=True) if h == g], "rho": problem["rho"][g]}
            for g in (0, 1)
        ]
        calls = iter(range(10**6))

        def closure():
            call = next(calls)
            terms = [
                (curvatures[i] * (p - targets[i] - call).square()).sum()
                for i, p in enumerate(params)
                if problem["present"][i] is None or problem["present"][i][call]
            ]
            if terms:
                sum(terms).backward()

        return params, BASES[problem["base"]](groups), closure

    params, base, closure = optimizer()
    opt = MicroBatchSAM(
        base,
        method=METHODS[problem["method"]],
        num_micro_batches=problem["micro_batches"],
        flatten=problem["flatten"],
        backend=backend,
    )
    expected, plain_base, plain_closure = optimizer()
    plain = PlainSAM(plain_base, method=METHODS[problem["method"]])
    for _ in range(problem["steps"]):
        if problem["fused"]:
            opt.step([closure] * problem["micro_batches"])
        else:
            for _ in opt.passes(torch.zeros(problem["micro_batches"])):
                closure()
            opt.step()
            opt.zero_grad()
        plain.step([plain_closure] * problem["micro_batches"])
        for a, b in zip(params, expected, strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("name", ["SGD dampening weight_decay", "Adam eps"])
@pytest.mark.parametrize("method", METHODS)
def test_every_dtype_follows_the_plain_loops(method, name, dtype, tolerance, way, backend):
    expected = mlp(dtype)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(BASES[name](expected.parameters()), 0.1, METHODS[method])
    ours = MicroBatchSAM(
        BASES[name](actual.parameters()), 0.1, method=METHODS[method], num_micro_batches=2, backend=backend
    )
    for step in range(3):
        data = batch(6, dtype, seed=step)
        WAYS[way](ours, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_of_several_dtypes_share_one_norm(way, backend):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = mlp(torch.float32)[0], mlp(FLOAT64)[2]

        def forward(self, x):
            return self.last(self.first(x.float()).tanh().double())

    expected = Mixed()
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1, momentum=0.9), 0.5, methods.FriendlySAM())
    ours = MicroBatchSAM(
        SGD(actual.parameters(), lr=0.1, momentum=0.9),
        0.5,
        method=methods.FriendlySAM(),
        num_micro_batches=2,
        backend=backend,
    )
    for step in range(3):
        data = batch(6, FLOAT64, seed=step)
        WAYS[way](ours, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
        torch.testing.assert_close(ours.stats.grad_norm, torch.stack(theirs.grad_norms), rtol=1e-6, atol=0)
    assert_close(actual, expected, 1e-6)


def test_a_zero_gradient_perturbs_nothing_and_is_not_an_error(backend):
    p = nn.Parameter(torch.ones(5))
    opt = MicroBatchSAM(SGD([p], lr=0.1, weight_decay=0.5), rho=0.1, backend=backend)
    opt.step(lambda: (p * 0).sum().backward())
    torch.testing.assert_close(p.detach(), torch.full((5,), 0.95))
    assert opt.stats.grad_norm.item() == opt.stats.perturbation_norm.item() == 0
    assert not opt.stats.nonfinite.item()


def test_a_step_in_which_nothing_gets_a_gradient_changes_nothing(backend):
    model = mlp()
    opt = MicroBatchSAM(Adam(model.parameters()), rho=0.1, backend=backend)
    before = weights(model)
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient after this pass"):
        list(opt.passes(*batch()))
    assert gradients(model) == [None] * 4
    opt.step()
    opt.step(lambda: None)
    assert same_bits(model.parameters(), before)
    assert not opt.state


# ---- the three ways to make a step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=["float32", "float64"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method in METHODS
        for name in ("SGD", "SGD momentum", "Adam", "AdamW everything", "RMSprop")
        if name != "SGD" or method in WITHOUT_MOMENTUM
    ],
)
def test_passes_closures_and_train_step_give_the_same_bits(method, name, micro_batches, dtype, backend):
    results = []
    for way in WAYS.values():
        model = mlp(dtype)
        opt = MicroBatchSAM(
            BASES[name](model.parameters()),
            0.1,
            method=METHODS[method],
            num_micro_batches=micro_batches,
            backend=backend,
        )
        for step in range(4):
            way(opt, model, batch(6, dtype, seed=step))
        results.append(weights(model))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_run_gives_the_same_bits(method, way, backend):
    results = []
    for _ in range(2):
        model = Zoo(torch.float32, uses=lambda call: call % 3 != 0)
        opt = MicroBatchSAM(AdamW(model.groups()), method=METHODS[method], num_micro_batches=2, backend=backend)
        for step in range(5):
            WAYS[way](opt, model, images(4, torch.float32, seed=step))
        results.append(weights(model))
    assert same_bits(*results)


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x, y: ((x, y), lambda a: a),
        lambda x, y: (((x, y),), lambda a: a),
        lambda x, y: (([x, y],), lambda a: a),
        lambda x, y: (({"x": x, "y": y},), lambda a: (a["x"], a["y"])),
        lambda x, y: ((OrderedDict(x=x, y=y),), lambda a: (a["x"], a["y"])),
        lambda x, y: (({"in": [x], "out": {"y": (y,)}},), lambda a: (a["in"][0], a["out"]["y"][0])),
        lambda x, y: ((Pair(x, y),), lambda a: (a.first, a.second)),
        lambda x, y: ((x, {"y": y, "mask": None}), lambda a: (a[0], a[1]["y"])),
        lambda x, y: ((None, x, y), lambda a: a[1:]),
    ],
    ids=["two", "tuple", "list", "dict", "OrderedDict", "nested", "namedtuple", "None inside", "None argument"],
)
def test_a_batch_keeps_its_structure(arrange):
    x, y = batch(7)
    batches, take = arrange(x, y)
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), num_micro_batches=3)
    seen = []
    for part in opt.passes(*batches):
        if len(batches) == 1:
            assert type(part) is type(batches[0])
        xb, yb = take(part)
        assert xb.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "views, not copies"
        seen.append((xb, yb))
        loss_of(model, xb, yb).backward()
    assert [len(xb) for xb, _ in seen] == [3, 3, 2, 2, 2, 2]
    torch.testing.assert_close(torch.cat([xb for xb, _ in seen[::2]]), x)
    torch.testing.assert_close(torch.cat([yb for _, yb in seen[1::2]]), y)
    assert all(same_bits(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"num_micro_batches": 1}, [7]),
        ({"num_micro_batches": 2}, [4, 3]),
        ({"num_micro_batches": 7}, [1] * 7),
        ({"micro_batch_size": 3}, [3, 3, 1]),
        ({"micro_batch_size": 7}, [7]),
        ({"micro_batch_size": 100}, [7]),
        ({}, [7]),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["passes", "train_step"])
def test_an_uneven_split_is_weighted_by_samples(options, sizes, way, backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(BASES["SGD momentum"](expected.parameters()), 0.1)
    ours = MicroBatchSAM(BASES["SGD momentum"](actual.parameters()), 0.1, backend=backend, **options)
    for step in range(3):
        data = batch(7, FLOAT64, seed=step)
        WAYS[way](ours, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, sizes)], [n / 7 for n in sizes])
        assert_close(actual, expected)
    assert len(ours.stats.grad_norm) == len(sizes)


LOSSES = {
    "tensors": lambda x: x,
    "tensors of two dtypes": lambda x: x.float() if x > 0 else x,
    "integers": lambda x: (10 * x).long(),
    "tensors of two shapes": lambda x: x if x > 0 else x.reshape(1),
    "numbers": float,
    "vectors": lambda x: torch.stack([x, -x]),
}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_averaged_by_their_shares_in_a_few_operations(kind, count):
    torch.manual_seed(0)
    values = [LOSSES[kind](x) for x in torch.randn(count, dtype=torch.float64, device=DEVICE)]
    shares = torch.rand(count).double().softmax(0).tolist() if count > 1 else [1.0]
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **kwargs or {})

    with Count():
        mean = batches.mean(values, shares)
    expected = sum(torch.as_tensor(v).double().cpu() * s for v, s in zip(values, shares, strict=True))
    torch.testing.assert_close(torch.as_tensor(mean).double().cpu(), expected, rtol=1e-7, atol=1e-12)
    if kind in ("tensors", "vectors"):
        assert len([f for f in calls if "detach" not in str(f)]) <= (3 if count > 1 else 0)


def test_train_step_and_closures_return_the_loss_at_the_weights_before_the_step(backend):
    def fresh(**options):
        model = mlp(FLOAT64)
        return model, MicroBatchSAM(SGD(model.parameters(), lr=0.1), rho=0.5, backend=backend, **options)

    data = batch(7, FLOAT64)
    expected = loss_of(mlp(FLOAT64), *data).detach()
    model, opt = fresh(num_micro_batches=3)
    actual = opt.train_step(lambda *part: loss_of(model, *part), *data)
    assert not actual.requires_grad
    assert actual.shape == ()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)

    model, opt = fresh()
    loss = opt.step(closure_of(model, data))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    model, opt = fresh()
    assert opt.step(lambda: closure_of(model, data)().item()) == pytest.approx(expected.item(), rel=1e-12)
    model, opt = fresh()
    assert opt.step(lambda: closure_of(model, data)() and None) is None
    model, opt = fresh(num_micro_batches=7)
    actual = opt.step([closure_of(model, part) for part in split(data, [1] * 7)])
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    model, opt = fresh(num_micro_batches=7)
    assert opt.step(
        tuple(lambda p=part: closure_of(model, p)().item() for part in split(data, [1] * 7))
    ) == pytest.approx(expected.item(), rel=1e-12)
    model, opt = fresh()
    assert opt.step() is None


@pytest.mark.parametrize("base", ["SGD momentum", "Adam", "RMSprop"])
def test_gradients_from_before_take_no_part_in_a_step_with_closures(base, backend):
    results = []
    for before in (None, 5.0):
        model = mlp()
        opt = MicroBatchSAM(BASES[base](model.parameters()), 0.1, num_micro_batches=2, backend=backend)
        for p in model.parameters():
            p.grad = None if before is None else torch.full_like(p, before)
        opt.train_step(lambda *part, model=model: loss_of(model, *part), *batch(6))
        assert gradients(model) == [None] * 4
        results.append(weights(model))
    assert same_bits(*results)


@dataclass
class Sample:
    """A batch of a class of its own."""

    x: object
    y: object
    notes: list


class Lazily(MutableMapping):
    """A mapping that is no dict, and keeps one."""

    def __init__(self, **items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __setitem__(self, key, value):
        self._items[key] = value

    def __delitem__(self, key):
        del self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Batch(dict):
    """A dict with attributes."""

    device = None


class Uncopied(UserDict):
    def __copy__(self):
        raise NotImplementedError


def holding_itself(x, y):
    both = [x, y]
    both.append(both)
    return both


def taken(inputs):
    """x and y, taken out of what holds them."""
    y, x = inputs.pop("y"), inputs.pop("x")
    inputs["more"] = 1
    return x, y


def taken_of_sample(sample):
    sample.notes.pop()
    x, sample.x = sample.x, None
    return x, sample.y


# How x and y come in a batch, and how a body takes them out of it.
CONTAINERS = {
    "dict": (lambda x, y: ({"x": x, "y": y},), taken),
    "list": (lambda x, y: ([y, x],), lambda a: (a.pop(), a.pop())),
    "dict beside": (lambda x, y: (x, {"y": y}), lambda a: (a[0], a[1].pop("y"))),
    "nested": (lambda x, y: ({"in": [x], "out": ({"y": y},)},), lambda a: (a["in"].pop(), a["out"][0].pop("y"))),
    "named": (lambda x, y: (Pair([x], {"y": y}),), lambda a: (a.first.pop(), a.second.pop("y"))),
    "OrderedDict": (lambda x, y: (OrderedDict(x=x, y=y),), taken),
}
# Of these, only whole ones.
WHOLE = {
    **CONTAINERS,
    "UserDict": (lambda x, y: (UserDict(x=x, y=y),), taken),
    "nested UserDict": (lambda x, y: (UserDict(x=[x], y=y),), lambda a: (a["x"].pop(), a.pop("y"))),
    "UserList": (lambda x, y: (UserList([y, x]),), lambda a: (a.pop(), a.pop())),
    "several UserDicts": (
        lambda x, y: ({"a": UserDict(t=x), "b": UserDict(t=y)},),
        lambda a: (a["a"].pop("t"), a["b"].pop("t")),
    ),
    "several UserLists": (lambda x, y: ([UserList([x]), UserList([y])],), lambda a: (a[0].pop(), a[1].pop())),
    "deque": (lambda x, y: (deque([y, x]),), lambda a: (a.pop(), a.pop())),
    "a dict's subclass": (lambda x, y: (Batch(x=x, y=y),), taken),
    "a nested one": (lambda x, y: (Batch(x=[x], y=y),), lambda a: (a["x"].pop(), a.pop("y"))),
    "a mapping": (lambda x, y: (Lazily(x=x, y=y),), taken),
    "a dataclass": (lambda x, y: (Sample(x, y, ["seen"]),), taken_of_sample),
    "one that holds itself": (lambda x, y: (holding_itself(x, y),), lambda a: a.pop() and a[:2]),
    "strings": (lambda x, y: (["a cat", "a dog"], {"x": x, "y": y}), lambda a: a[0].pop() and taken(a[1])),
    "a number": (lambda x, y: (x, y, 0.5), lambda a: a[:2]),
    "a 0-d tensor": (lambda x, y: (x, torch.tensor(2.0), y), lambda a: a[::2]),
    "two lengths": (lambda x, y: (x, y, y[:2]), lambda a: a[:2]),
    "sparse": (lambda x, y: (x.to_sparse(), y), lambda a: (a[0].to_dense(), a[1])),
    "an array": (lambda x, y: (x.numpy(), y), lambda a: (torch.from_numpy(a[0]), a[1])),
    "a packed sequence": (lambda x, y: (nn.utils.rnn.pack_sequence([x]), y), lambda a: (a[0].data, a[1])),
    "something else": (lambda x, y: (Uncopied(x=x), y), lambda a: (a[0]["x"], a[1])),
}


@pytest.mark.parametrize("way", ["passes", "train_step", "three optimizer steps"])
@pytest.mark.parametrize(
    ("form", "micro_batches"), [*((form, 1) for form in WHOLE), *((form, 3) for form in CONTAINERS)], ids=str
)
def test_each_pass_gets_the_batch_as_it_came(form, micro_batches, way):
    arrange, take = WHOLE[form]
    x, y = batch(7)
    expected, actual = mlp(), mlp()
    opts = [
        MicroBatchSAM(SGD(m.parameters(), lr=0.1), 0.5, num_micro_batches=micro_batches) for m in (expected, actual)
    ]
    data = arrange(x, y)
    for _ in range(3 if way == "three optimizer steps" else 1):
        WAYS["passes"](opts[0], expected, (x, y))
        if way == "train_step":
            opts[1].train_step(lambda *part: loss_of(actual, *take(part if len(data) > 1 else part[0])), *data)
        else:
            for part in opts[1].passes(*data):
                loss_of(actual, *take(part)).backward()
            opts[1].step()
            opts[1].zero_grad()
    assert same_bits(actual.parameters(), expected.parameters())
    assert same_bits(take(data if len(data) > 1 else data[0]), [x, y]), "the user's own is as it was"


@pytest.mark.filterwarnings("ignore:no parameter of the optimizer has a gradient after this pass")
def test_tensors_and_tuples_of_them_come_as_they_are():
    opt = MicroBatchSAM(SGD(mlp().parameters(), lr=0.1))
    x, y = batch()
    both = x, y
    for data in ((x,), (both,), (None,)):
        for part in opt.passes(*data):
            assert part is data[0]


# ---- which pass it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("method", "indices"),
    [
        (methods.SAM(), [0, 1]),
        (methods.BilateralSAM(), [0, 1, 2]),
        (methods.SAM(start=1), [0]),
        (methods.LookSAM(k=2), [0, 1]),
    ],
    ids=["SAM", "Bilateral SAM", "before the start", "LookSAM"],
)
def test_a_layer_can_know_which_pass_it_is_in(method, indices, way, micro_batches):
    model, seen = mlp(), []
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, method=method, num_micro_batches=micro_batches)
    model.register_forward_hook(lambda *_: seen.append(opt.pass_index))
    assert opt.pass_index is None
    WAYS[way](opt, model, batch(6))
    assert seen == indices * micro_batches
    assert opt.pass_index is None
    model(batch()[0])
    assert seen[-1] is None


def test_after_a_step_that_was_given_up_no_pass_is_under_way():
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1))
    parts = opt.passes(*batch())
    assert opt.pass_index is None
    loss_of(model, *next(parts)).backward()
    assert opt.pass_index == 0
    next(parts)
    assert opt.pass_index == 1
    opt.restore()
    assert opt.pass_index is None


def test_train_step_takes_structures_as_passes_does():
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), num_micro_batches=2)
    x, y = batch()
    opt.train_step(lambda part: loss_of(model, part["x"], part["y"]), {"x": x, "y": y})
    opt.train_step(lambda x, rest: loss_of(model, x, rest[0]), x, [y])


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_after_the_loop_the_gradient_is_the_weighted_mean_at_the_perturbed_weights(backend):
    model, data = mlp(FLOAT64), batch(5, FLOAT64)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), rho=0.3, num_micro_batches=2, backend=backend)
    other = copy.deepcopy(model)
    plain = PlainSAM(SGD(other.parameters(), lr=1.0), 0.3)
    before = weights(other)
    plain.step([closure_of(other, part) for part in split(data, [3, 2])], [3 / 5, 2 / 5])
    expected = [b - p.detach() for b, p in zip(before, other.parameters(), strict=True)]
    for part in opt.passes(*data):
        loss_of(model, *part).backward()
    for actual, value in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_from_before_the_loop_are_added_to(method, micro_batches, backend):
    def run(before):
        model = mlp(FLOAT64)
        opt = MicroBatchSAM(
            SGD(model.parameters(), lr=0.1, momentum=0.9),
            0.1,
            method=METHODS[method],
            num_micro_batches=micro_batches,
            backend=backend,
        )
        for p, g in zip(model.parameters(), before, strict=True):
            p.grad = g
        for part in opt.passes(*batch(6, FLOAT64)):
            loss_of(model, *part).backward()
        return gradients(model)

    generator = random_numbers(5)
    before = [torch.randn(p.shape, dtype=FLOAT64, generator=generator) for p in mlp().parameters()]
    before[1] = None
    before[2] = before[2].t().contiguous().t()  # another memory order than the parameter's
    alone = run([None] * 4)
    together = run([None if g is None else g.clone() for g in before])
    for g, a, b in zip(together, alone, before, strict=True):
        torch.testing.assert_close(g, a if b is None else a + b, rtol=1e-12, atol=1e-12)


def test_gradients_from_before_stay_where_a_parameter_gets_none(backend):
    model = Zoo(uses=PRESENCE["first pass only"])
    opt = MicroBatchSAM(SGD(model.groups(), lr=0.1), num_micro_batches=2, backend=backend)
    for p in (model.unused, model.sometimes):
        p.grad = torch.full_like(p, 3.0)
    for part in opt.passes(*images(4)):
        loss_of(model, *part).backward()
    assert (model.unused.grad == 3).all()
    assert (model.sometimes.grad == 3).all()


@pytest.mark.parametrize("passes_with", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("method", [methods.SAM(), methods.GapSAM(), methods.BilateralSAM()], ids=str)
def test_a_gradient_of_some_passes_is_added_to_none_beside_others_that_are_added_to_some(method, passes_with, backend):
    def grads(*, first_loop):
        w, v = (nn.Parameter(torch.linspace(lo, 2, 5, dtype=FLOAT64)) for lo in (0.5, -1))
        opt = MicroBatchSAM(SGD([w, v], lr=0.1), 0.1, method=method, backend=backend)
        if first_loop:
            w.grad = torch.ones_like(w)
        for turn, _ in enumerate(opt.passes()):
            loss = w.pow(3).sum() + (v.pow(3).sum() if turn in passes_with else 0)
            loss.backward()
        return w.grad, v.grad

    w_alone, v_alone = grads(first_loop=False)
    w, v = grads(first_loop=True)
    torch.testing.assert_close(w, w_alone + 1, rtol=1e-12, atol=1e-12)
    assert (v is None) == (v_alone is None)
    torch.testing.assert_close(v, v_alone, rtol=1e-12, atol=1e-12)


def test_one_tensor_as_two_gradients_is_added_to_others_as_two():
    def grads(before):
        params = [nn.Parameter(torch.linspace(lo, 2, 5, dtype=FLOAT64)) for lo in (0.5, -1, -2)]
        opt = MicroBatchSAM(SGD(params, lr=0.1), 0.1, method=methods.BilateralSAM())
        params[0].grad = before
        for turn, _ in enumerate(opt.passes()):
            (params[0].sum() + params[1].pow(3).sum()).backward()
            params[2].grad = params[1].grad if turn != 1 else 7 * params[1].grad
        return [p.grad.clone() for p in params]

    alone, together = grads(None), grads(torch.ones(5, dtype=FLOAT64))
    torch.testing.assert_close(together, [alone[0] + 1, *alone[1:]], rtol=1e-12, atol=1e-12)


# How some gradients come from a backward pass: what makes the same tensors with memory of their own is the right value.
AS_THEY_COME = {
    # The parts of a concatenation, and the sum's other operand, whose memory is that of all of it.
    "parts of one": lambda whole: [whole[:3], whole[3:], whole],
    "all from one first element": lambda whole: [whole[:3], whole[:5], whole],
    "overlapping": lambda whole: [whole[1:4], whole[2:7], whole],
    "one within another": lambda whole: [whole[4:7], whole[3:], whole],
    "in storages of their own": lambda whole: [from_dlpack(whole[:3].detach()), from_dlpack(whole[3:].detach()), whole],
    "negated lazily": lambda whole: [torch._neg_view(-g) for g in (whole[:3], whole[3:].clone(), whole)],
    "an imaginary part": lambda whole: [torch.complex(g, -g).conj().imag for g in (whole[:3], whole[3:], whole)],
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("arrangement", AS_THEY_COME)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_count_as_what_they_are_however_they_lie_in_memory(method, arrangement, micro_batches, backend):
    def trained(as_it_comes, way):
        a, c, d = params = [
            nn.Parameter(torch.linspace(lo, 1, n, dtype=FLOAT64)) for lo, n in ((-2, 3), (-1, 5), (3, 8))
        ]
        base = SGD(params[::-1], lr=0.1, momentum=0.9)
        opt = MicroBatchSAM(base, 0.3, method=METHODS[method], num_micro_batches=micro_batches, backend=backend)

        def body(x):
            y = torch.cat([a, c]) + d
            whole = torch.autograd.grad((y * x).square().sum(1).mean() + y.tanh().sum(), y)[0]
            for p, g in zip(params, AS_THEY_COME[arrangement](whole), strict=True):
                p.grad = g if as_it_comes else g.resolve_neg().clone()

        for step in range(3):
            x = torch.randn(6, 8, dtype=FLOAT64, generator=random_numbers(step))
            if way == "closures":
                opt.step([lambda x=x: body(x) for x in x.chunk(micro_batches)])
                continue
            for _ in range(2):  # the second loop adds to the gradients of the first one
                for part in opt.passes(x):
                    body(part)
            opt.step()
            opt.zero_grad()
        return params

    for way in ("passes", "closures"):
        for p, expected in zip(trained(True, way), trained(False, way), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)


def in_inference_mode(t):
    with torch.inference_mode():
        return t.clone()


# Gradients of before, of ones: (two of them, whether they keep their tensors).
BEFORE = {
    "ordinary": (lambda: [torch.ones(4), torch.ones(4)], (True, True)),
    "views of one": (lambda: list(torch.ones(8).view(2, 4)), (True, True)),
    "columns of one": (lambda: list(torch.ones(4, 2).t()), (True, True)),
    "lazily negated": (lambda: [torch.ones(4), torch._neg_view(-torch.ones(4))], (True, True)),
    "one that requires grad": (lambda: [torch.ones(4), torch.ones(4, requires_grad=True)], (True, True)),
    "one with a graph": (lambda: [torch.ones(4), torch.ones(4, requires_grad=True) * 1], (True, True)),
    "one of several views with a graph": (
        lambda: [torch.ones(4), torch.ones(8, requires_grad=True).chunk(2)[1]],
        (True, True),
    ),
    "one expanded": (lambda: [torch.ones(4), torch.ones(1).expand(4)], (True, False)),
    "one that overlaps itself": (lambda: [torch.ones(4).as_strided((4,), (0,)), torch.ones(4)], (False, True)),
    "one made in inference mode": (lambda: [torch.ones(4), in_inference_mode(torch.ones(4))], (True, False)),
    "the same tensor": (lambda: [torch.ones(4)] * 2, (True, False)),
    "overlapping": (lambda: [torch.ones(6)[:4], torch.ones(6)[2:]], (True, True)),
    "overlapping views of one": (lambda: (lambda t: [t[:4], t[2:]])(torch.ones(6)), (True, False)),
}


@pytest.mark.parametrize("held", [False, True], ids=["", "held by somebody else too"])
@pytest.mark.parametrize("stop", [None, 0, 1], ids=["to the end", "given up at w", "given up at w + e"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", BEFORE)
def test_gradients_of_before_are_all_added_to_or_none_whatever_can_be_written_to(
    name, micro_batches, stop, held, backend
):
    make, keep = BEFORE[name]
    params = [nn.Parameter(torch.linspace(1, 2, 4)) for _ in range(2)]
    opt = MicroBatchSAM(SGD(params, lr=0.1), 0.1, num_micro_batches=micro_batches, backend=backend)

    def loop(stop=None):
        for turn, x in enumerate(opt.passes(torch.ones(2, 4))):
            (params[0] * x).square().sum().add((params[1] * x).square().sum()).backward()
            if turn == stop:
                break

    loop()
    alone = [p.grad for p in params]
    opt.zero_grad()
    before = make()
    others = [g.detach() for g in before] if held else None
    for p, g in zip(params, before, strict=True):
        p.grad = g
    loop(stop)
    for p, g, old, kept in zip(params, alone, before, keep, strict=True):
        torch.testing.assert_close(p.grad.detach(), g + 1 if stop is None else torch.ones(4))
        if stop is None:
            assert (p.grad is old) == kept
    del others


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "RMSprop"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_both_ways_to_zero_the_gradients_give_the_same_steps(name, set_to_none, micro_batches, backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(BASES[name](expected.parameters()), 0.1)
    ours = MicroBatchSAM(BASES[name](actual.parameters()), 0.1, num_micro_batches=micro_batches, backend=backend)
    for step in range(4):
        data = batch(6, FLOAT64, seed=step)
        ours.zero_grad(set_to_none=set_to_none)
        for part in ours.passes(*data):
            loss_of(actual, *part).backward()
        ours.step()
        sizes = [6 // micro_batches] * micro_batches
        theirs.step([closure_of(expected, part) for part in split(data, sizes)])
        assert_close(actual, expected)


def test_zero_grad_in_the_body_of_the_loop_clears_what_was_there_before():
    """The order that many training loops have: zero_grad, forward, backward, and no other zero_grad."""
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1), 0.1)
    ours = MicroBatchSAM(SGD(actual.parameters(), lr=0.1), 0.1, num_micro_batches=2)
    for step in range(3):
        data = batch(6, FLOAT64, seed=step)
        for part in ours.passes(*data):
            ours.zero_grad()
            loss_of(actual, *part).backward()
        ours.step()
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
        assert_close(actual, expected)


# LookSAM's other steps scale v, and Sparse SAM chooses a mask, by the gradient of each loop.
@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.period == 1 and not m.full.sparse])
@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "RMSprop"])
def test_passes_without_arguments_accumulates_as_backward_does(method, name, backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(BASES[name](expected.parameters()), 0.1, METHODS[method])
    # LE-SAM's sigma is in units of the loss that is differentiated, here a third of each micro-batch's.
    own = methods.LossEquatedSAM(METHODS[method].sigma / 3) if method == "LE-SAM" else METHODS[method]
    ours = MicroBatchSAM(BASES[name](actual.parameters()), 0.1, method=own, backend=backend)
    for step in range(3):
        parts = split(batch(6, FLOAT64, seed=step), [2, 2, 2])
        for part in parts:
            for nothing in ours.passes():
                assert nothing is None
                (loss_of(actual, *part) / 3).backward()
        ours.step()
        ours.zero_grad()
        # e does not depend on the scale of the loss; F-SAM's average does, and scales with it.
        theirs.step([closure_of(expected, part) for part in parts])
        assert_close(actual, expected, 1e-10)


def test_clipping_acts_on_the_descent_gradient(backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1, momentum=0.9), 0.1)
    theirs.base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(expected.parameters(), 0.01) and None)
    ours = MicroBatchSAM(SGD(actual.parameters(), lr=0.1, momentum=0.9), 0.1, num_micro_batches=2, backend=backend)
    for step in range(3):
        data = batch(6, FLOAT64, seed=step)
        for part in ours.passes(*data):
            loss_of(actual, *part).backward()
        assert nn.utils.clip_grad_norm_(actual.parameters(), 0.01) > 0.01
        ours.step()
        ours.zero_grad()
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
    assert_close(actual, expected)


def test_a_graph_from_before_the_perturbation_is_refused_after_it(backend):
    """Autograd notices that the kernels wrote to the weights, as it notices any operation in place."""
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), backend=backend)
    before = weights(model)

    def stale():
        loss = None
        for part in opt.passes(*batch()):
            if loss is None:
                loss = loss_of(model, *part)
                loss_of(model, *part).backward()
            else:
                loss.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale()
    assert same_bits(model.parameters(), before)


def test_gradients_with_a_graph_of_their_own_are_taken_as_values(backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1), 0.1)
    ours = MicroBatchSAM(SGD(actual.parameters(), lr=0.1), 0.1, num_micro_batches=2, backend=backend)
    data = batch(6, FLOAT64)

    def closure(part):
        grads = torch.autograd.grad(loss_of(actual, *part), list(actual.parameters()), create_graph=True)
        for p, g in zip(actual.parameters(), grads, strict=True):
            p.grad = g

    ours.step([lambda part=part: closure(part) for part in split(data, [3, 3])])
    theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
    assert_close(actual, expected)


# ---- gradients that are not finite, and GradScaler --------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1], ids=["first micro-batch", "last micro-batch"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["SAM", "ASAM", "F-SAM"])
def test_a_first_pass_that_is_not_finite_is_flagged_and_reaches_the_gradient(
    method, dtype, micro_batches, where, value, backend
):
    where = min(where, micro_batches - 1)
    model = mlp(dtype)
    opt = MicroBatchSAM(
        SGD(model.parameters(), lr=0.1), 0.5, method=METHODS[method], num_micro_batches=micro_batches, backend=backend
    )
    data = batch(6, dtype)
    for part in opt.passes(*data):  # F-SAM has an average now
        loss_of(model, *part).backward()
    opt.zero_grad()
    ema = copy.deepcopy(remembered(opt, "ema"))
    before = weights(model)
    for call, part in enumerate(opt.passes(*data)):
        loss_of(model, *part).backward()
        if call == 2 * where:
            model[0].weight.grad[0, 0] = value
        if call == 2 * where + 1:
            assert same_bits(model.parameters(), before), "nothing is perturbed"
    assert same_bits(model.parameters(), before)
    assert opt.stats.nonfinite.tolist() == [i == where for i in range(micro_batches)]
    assert opt.stats.perturbation_norm[where] == 0
    assert all(not p.grad.isfinite().any() for p in model.parameters()), "clipping, GradScaler and the user see it"
    if method == "F-SAM" and micro_batches == 1:
        assert same_bits(remembered(opt, "ema").values(), ema.values())
    assert all(t.isfinite().all() for t in remembered(opt, "ema").values())


def test_the_very_first_gradient_may_be_bad_without_starting_an_average(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=methods.FriendlySAM(), backend=backend)
    for part in opt.passes(*batch()):
        (loss_of(model, *part) * math.inf).backward()
    assert not remembered(opt, "ema")
    opt.zero_grad()
    for call, part in enumerate(opt.passes(*batch())):
        loss_of(model, *part).backward()
        if call == 0:
            first = gradients(model)
    assert same_bits(remembered(opt, "ema").values(), first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW everything", "RMSprop"])
def test_a_grad_scaler_skips_what_is_not_finite_and_changes_nothing_else(method, name, backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(BASES[name](expected.parameters()), 0.1, METHODS[method])
    ours = MicroBatchSAM(
        BASES[name](actual.parameters()), 0.1, method=METHODS[method], num_micro_batches=2, backend=backend
    )
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)

    def unscale(base, args, kwargs):
        for p in expected.parameters():
            p.grad /= scale

    theirs.base.register_step_pre_hook(unscale)

    def scaled(part):
        return lambda: (scale * loss_of(expected, *part)).backward()

    for step in range(5):
        data = batch(6, FLOAT64, seed=step)
        parts = split(data, [3, 3])
        bad = step == 2
        before, scale = weights(actual), scaler.get_scale()
        for call, part in enumerate(ours.passes(*data)):
            loss = loss_of(actual, *part) * (math.inf if bad and call == 0 else 1.0)
            scaler.scale(loss).backward()
        scaler.unscale_(ours)
        torch.nn.utils.clip_grad_norm_(actual.parameters(), 1e6)
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
        if bad:
            assert same_bits(actual.parameters(), before)
            assert scaler.get_scale() == scale / 2
            # For the average of F-SAM the good micro-batch of the bad step counts.
            theirs._gradients(dict.fromkeys(expected.parameters(), 0.1), scaled(parts[1]))
        else:
            theirs.step([scaled(part) for part in parts])
    assert_close(actual, expected, 1e-9)


def test_in_bfloat16_the_achieved_norm_says_how_little_of_rho_arrived(backend):
    """Where the weights are coarse, most of e is rounded away; the record must not claim otherwise."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(20_000).to(torch.bfloat16))
    target = torch.randn(20_000).to(torch.bfloat16)
    opt = MicroBatchSAM(SGD([p], lr=0.1), rho=0.05, backend=backend)
    points = []
    for _ in opt.passes():
        points.append(p.detach().double())
        (p - target).square().sum().backward()
    achieved = (points[1] - points[0]).norm()
    assert achieved < 0.04
    torch.testing.assert_close(opt.stats.perturbation_norm[0], achieved, rtol=1e-12, atol=0)


def test_stats_are_those_of_the_latest_step_and_ask_for_one(backend):
    model = mlp(FLOAT64)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), rho=0.3, num_micro_batches=2, backend=backend)
    with pytest.raises(RuntimeError, match="after the first pass"):
        _ = opt.stats
    data = batch(6, FLOAT64)
    norms = []
    for call, part in enumerate(opt.passes(*data)):
        loss_of(model, *part).backward()
        if call % 2 == 0:
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    torch.testing.assert_close(opt.stats.grad_norm, torch.stack(norms), rtol=1e-12, atol=0)
    torch.testing.assert_close(opt.stats.perturbation_norm, torch.full((2,), 0.3, dtype=FLOAT64), rtol=1e-12, atol=0)
    kept = opt.stats
    opt.zero_grad()
    opt.num_micro_batches = 1
    opt.train_step(lambda *part: loss_of(model, *part), *data)
    assert len(opt.stats.grad_norm) == 1
    assert len(kept.grad_norm) == 2, "earlier records do not change"


@pytest.mark.parametrize(
    "method", [methods.SAM(), methods.GapSAM(), methods.BilateralSAM(), methods.LookSAM(k=2)], ids=str
)
def test_a_new_memory_order_between_passes_takes_the_held_gradients_along(method):
    def run(when):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3, dtype=FLOAT64)
        opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.1, num_micro_batches=2, method=method)
        x = torch.randn(4, 3, 5, 5, dtype=FLOAT64)
        for turn, part in enumerate(opt.passes(x)):
            if turn == when:
                model.to(memory_format=torch.channels_last)
            model(part).square().mean().backward()
        return [p.grad for p in model.parameters()]

    for when in range(1, 4):
        torch.testing.assert_close(run(when), run(None), rtol=1e-12, atol=1e-12)
