# SPDX-License-Identifier: Apache-2.0
"""What the methods do where formulas have no usual value, e.g. for zero gradients; and what they do together."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import operator
import pickle
import re
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop
from torch.utils._pytree import tree_leaves

from msam_kernels import MicroBatchSAM, methods
from msam_kernels.methods import (
    SAM,
    WSAM,
    AdaptiveSAM,
    BilateralSAM,
    Composition,
    FriendlySAM,
    GapSAM,
    LookSAM,
    LossEquatedSAM,
    MomentumSAM,
    SparseSAM,
    StableSAM,
    VaSSO,
)
from plain import (
    METHODS,
    WAYS,
    PlainSAM,
    Zoo,
    assert_close,
    batch,
    closure_of,
    follow_the_plain_loops,
    images,
    loss_of,
    mlp,
    same_bits,
    split,
    train_parameters_without_elements,
    weights,
)

COMBINING = {"Stable SAM": StableSAM(), "GSAM": GapSAM(alpha=0.4), "Bilateral": BilateralSAM(rho_min=0.05)}
COMPOSITIONS = {
    "Adaptive + Friendly": AdaptiveSAM() + FriendlySAM(sigma=0.5, lmbda=0.6),
    "Adaptive + Sparse": AdaptiveSAM() + SparseSAM(sparsity=0.6, update_every=2),
    "Adaptive + Stable": AdaptiveSAM(eta=0.1) + StableSAM(),
    "Adaptive + LE-SAM": AdaptiveSAM() + LossEquatedSAM(sigma=0.05),
    "Friendly + Sparse + GSAM + LE-SAM": (
        FriendlySAM(sigma=0.5) + SparseSAM(sparsity=0.6, update_every=2) + GapSAM() + LossEquatedSAM(sigma=0.05)
    ),
    "Bilateral + LE-SAM": BilateralSAM(rho_min=0.1) + LossEquatedSAM(sigma=0.05),
    "Adaptive + GSAM": AdaptiveSAM() + GapSAM(),
    "Friendly + GSAM": FriendlySAM() + GapSAM(alpha=0.3),
    "Friendly + Bilateral": FriendlySAM(sigma=0.5) + BilateralSAM(rho_min=0.1),
    "Friendly + LookSAM": FriendlySAM(sigma=0.5) + LookSAM(k=2),
    "Friendly + Stable": FriendlySAM(sigma=0.5) + StableSAM(),
    "GSAM + Stable": GapSAM() + StableSAM(),
    "GSAM alpha=0 + Stable": GapSAM(alpha=0.0) + StableSAM(),
    "GSAM alpha=0 + Sparse": GapSAM(alpha=0.0) + SparseSAM(sparsity=0.6),
    "Bilateral + Stable": BilateralSAM(rho_min=0.1) + StableSAM(),
    "Sparse + LookSAM": SparseSAM(sparsity=0.3, update_every=2) + LookSAM(k=2, alpha=0.3),
    "Sparse + Bilateral": SparseSAM(sparsity=0.6) + BilateralSAM(rho_min=0.1),
    "Friendly + Sparse + GSAM + Stable": (
        FriendlySAM(sigma=0.5) + SparseSAM(sparsity=0.6, update_every=2) + GapSAM() + StableSAM()
    ),
    "Adaptive + Friendly + Sparse + Bilateral + Stable": (
        AdaptiveSAM() + FriendlySAM(sigma=0.5) + SparseSAM(sparsity=0.4) + BilateralSAM() + StableSAM()
    ),
    "WSAM coupled": WSAM(gamma=0.8, decoupled=False) + FriendlySAM(sigma=0.5),
    "VaSSO + Adaptive + WSAM": VaSSO(theta=0.3) + AdaptiveSAM() + WSAM(gamma=0.6),
    "Sparse + VaSSO + WSAM coupled + Stable": (
        SparseSAM(sparsity=0.4, update_every=2) + VaSSO(theta=0.8) + WSAM(gamma=0.9, decoupled=False) + StableSAM()
    ),
    "Sparse + WSAM": SparseSAM(sparsity=0.4, update_every=2) + WSAM(gamma=0.7),
    "VaSSO + LE-SAM": VaSSO(theta=0.3) + LossEquatedSAM(sigma=0.02),
    "VaSSO + Bilateral": VaSSO(theta=0.3) + BilateralSAM(rho_min=0.1),
    "Momentum + Adaptive": MomentumSAM() + AdaptiveSAM(),
    "Adaptive + Friendly + Sparse + LookSAM": (
        AdaptiveSAM() + FriendlySAM(sigma=0.5) + SparseSAM(sparsity=0.4, update_every=2) + LookSAM(k=3)
    ),
}


def passes_of(method):
    """Of a step that perturbs."""
    plan = method.full
    return 1 if plan.momentum else 2 if plan.opposite is None else 3


def descents(method, pairs, dtype, backend, **options):
    """What a step moved, per lr, after given gradients: ``pairs``: of each micro-batch, one for each pass."""
    p = nn.Parameter(torch.zeros(len(pairs[0][0]), dtype=dtype))
    base = SGD([p], lr=1.0, momentum=0.9)  # of which the first step does not depend
    opt = MicroBatchSAM(base, 0.1, method=method, num_micro_batches=len(pairs), backend=backend, **options)
    upcoming = iter([torch.tensor(g, dtype=dtype) for pair in pairs for g in pair])

    def closure():
        p.grad = next(upcoming)

    opt.step([closure] * len(pairs))
    return -p.detach()


# method, gradient at w, gradient at w + e (and behind w), what is used
EDGES = {
    "Stable, zero at w": ("Stable SAM", (0.0, 0.0), (3.0, 4.0), (0.0, 0.0)),
    "Stable, zero at w + e": ("Stable SAM", (3.0, 4.0), (0.0, 0.0), (0.0, 0.0)),
    "Stable, both zero": ("Stable SAM", (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
    "Stable, identical": ("Stable SAM", (3.0, 4.0), (3.0, 4.0), (3.0, 4.0)),
    "Stable, opposite": ("Stable SAM", (3.0, 4.0), (-6.0, -8.0), (-3.0, -4.0)),
    "Stable, orthogonal": ("Stable SAM", (3.0, 4.0), (-8.0, 6.0), (-4.0, 3.0)),
    "GSAM, zero at w": ("GSAM", (0.0, 0.0), (3.0, 4.0), (3.0, 4.0)),
    "GSAM, zero at w + e": ("GSAM", (3.0, 4.0), (0.0, 0.0), (-1.2, -1.6)),
    "GSAM, both zero": ("GSAM", (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
    "GSAM, identical": ("GSAM", (3.0, 4.0), (3.0, 4.0), (3.0, 4.0)),
    "GSAM, opposite": ("GSAM", (3.0, 4.0), (-6.0, -8.0), (-6.0, -8.0)),
    "GSAM, orthogonal": ("GSAM", (3.0, 4.0), (-8.0, 6.0), (-9.2, 4.4)),
    "Bilateral, zero at w": ("Bilateral", (0.0, 0.0), (3.0, 4.0), (0.0, 2.0), (3.0, -1.0)),
    "Bilateral, zero at w + e": ("Bilateral", (1.0, 2.0), (0.0, 0.0), (0.0, 2.0), (1.0, 2.0)),
    "Bilateral, zero behind": ("Bilateral", (1.0, 2.0), (3.0, 4.0), (0.0, 0.0), (4.0, 6.0)),
    "Bilateral, zero but behind": ("Bilateral", (0.0, 0.0), (0.0, 0.0), (3.0, 4.0), (0.0, 0.0)),
    "Bilateral, all zero": ("Bilateral", (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
    "Bilateral, identical": ("Bilateral", (3.0, 4.0), (3.0, 4.0), (3.0, 4.0), (3.0, 4.0)),
    "Bilateral, opposite": ("Bilateral", (3.0, 4.0), (6.0, 8.0), (-3.0, -4.0), (15.0, 20.0)),
    "Bilateral, orthogonal": ("Bilateral", (3.0, 4.0), (6.0, 8.0), (-4.0, 3.0), (17.0, 6.0)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("edge", EDGES)
def test_a_descent_where_gradients_are_special(edge, dtype, backend):
    method, *passes, used = EDGES[edge]
    expected = torch.tensor(used, dtype=dtype)
    actual = descents(COMBINING[method], [passes], dtype, backend)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    # Every micro-batch has a combination of its own.
    both = descents(COMBINING[method], [passes, [(1.0, 0.0)] * len(passes)], dtype, backend)
    torch.testing.assert_close(both, (expected + torch.tensor([1.0, 0.0], dtype=dtype)) / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [*METHODS, *COMPOSITIONS])
def test_a_gradient_that_is_not_finite_shows_in_the_descent(method, backend):
    method = {**METHODS, **COMPOSITIONS}[method]
    count = passes_of(method)
    for wrong, value in itertools.product(range(2 * count), (math.nan, -math.inf)):
        passes = [(value, 1.0) if i == wrong else (1.0, 1.0) for i in range(2 * count)]
        if wrong < count:
            assert not descents(method, [passes[:count]], torch.float32, backend).isfinite().all()
        assert not descents(method, [passes[:count], passes[count:]], torch.float32, backend).isfinite().all()


def test_gradients_from_before_survive_a_pass_that_gives_them_again(backend):
    p = nn.Parameter(torch.linspace(-1, 1, 5))
    opt = MicroBatchSAM(SGD([p], lr=0.1), method=BilateralSAM(), backend=backend)
    p.grad = before = torch.linspace(1, 2, 5)
    expected = before.clone()
    for turn, _ in enumerate(opt.passes()):
        p.grad = before if turn == 1 else torch.ones(5)
        if turn == 2:
            break
    assert p.grad is before
    assert same_bits([before], [expected])


@pytest.mark.host
@pytest.mark.parametrize("way", ["backward", "autograd.grad"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["GSAM", "Bilateral SAM", "LookSAM k=2", "WSAM"])
def test_ordinary_gradients_are_kept_without_a_copy(name, count, way, extension):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3), nn.Linear(3, 3, bias=False)
    )
    base = SGD(model.parameters(), lr=0.1)
    opt = MicroBatchSAM(base, method=METHODS[name], num_micro_batches=count, backend="cpu")

    def closure():
        loss = model(torch.ones(2, 1, 6, 6)).square().mean()
        if way == "backward":
            loss.backward()
        else:
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                p.grad = g

    with mock.patch.object(Tensor, "clone", side_effect=AssertionError("a gradient was copied")):
        for _ in range(3):
            opt.step([closure] * count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_bilateral_sam_rounds_no_sum_of_gradients_to_16_bits(dtype, backend):
    pairs = [[(1.0,), (1.0 + torch.finfo(dtype).eps,), (2.0,)]]  # the first two have a sum that 16 bits do not hold
    assert descents(BilateralSAM(), pairs, dtype, backend).item() == 1.0


@pytest.mark.parametrize("count", [1, 3], ids=["one micro-batch", "three micro-batches"])
def test_gap_sam_with_alpha_zero_is_sam_bit_for_bit(count, backend):
    trained = []
    for method in (methods.SAM(), methods.GapSAM(alpha=0.0)):
        model = mlp()
        opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), num_micro_batches=count, method=method, backend=backend)
        for seed in range(3):
            opt.train_step(lambda x, y, model=model: loss_of(model, x, y), *batch(seed=seed))
        trained.append(list(model.parameters()))
    assert same_bits(*trained)


def holders(thing):
    """The attributes with numbers in them that grow with the model, bits left out."""
    return {
        name
        for name, value in vars(thing).items()
        if any(isinstance(t, Tensor) and t.is_floating_point() and t.numel() >= 10 for t in tree_leaves(value))
    }


@pytest.mark.parametrize("method", [*METHODS, *COMPOSITIONS])
def test_nothing_is_kept_longer_than_the_step_but_what_methods_name(method, backend):
    method = {**METHODS, **COMPOSITIONS}[method]
    model = mlp()
    opt = MicroBatchSAM(AdamW(model.parameters()), method=method, num_micro_batches=2, backend=backend)

    def only_what_is_named():
        (flat,) = opt.engine.store.flats
        assert opt.engine.step is None
        assert holders(flat) == {"params", "shards", "weights", "saved"} | ({"state", "views"} if opt.steps else set())
        plan = method.full
        assert set(flat.memories) == {
            name for name, has in (("ema", plan.lmbda is not None), (plan.kept, plan.keeps)) if has
        }
        assert holders(opt) == holders(opt.engine) == set()
        assert holders(opt.engine.store) == {"_lists"}
        assert opt.engine.store._lists[0] is flat.params, "the same list, not the parameters once more"

    loops = 2 * passes_of(method)
    for stop in (loops - 1, None, 1, 2, 0):
        for i, part in enumerate(opt.passes(*batch())):
            loss_of(model, *part).backward()
            if i == stop:
                break
        if stop is None:
            opt.step()
            opt.steps = method.period  # LookSAM perturbs there again
        opt.zero_grad()
        only_what_is_named()
    opt.train_step(lambda x, y: loss_of(model, x, y), *batch())
    only_what_is_named()
    calls = iter(range(9))

    def closure():
        loss_of(model, *batch()).backward()
        if next(calls) == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step([closure, closure])
    only_what_is_named()


# ---- LookSAM ---------------------------------------------------------------------------------------------------------

# of a step that perturbs: gradient at w, gradient at w + e; of the step after: its gradient, what is used
LOOKS = {
    "zero at w": ((0.0, 0.0), (3.0, 4.0), (0.0, 10.0), (3.0, 14.0)),
    "zero at w + e": ((3.0, 4.0), (0.0, 0.0), (0.0, 10.0), (0.0, 10.0)),
    "both zero": ((0.0, 0.0), (0.0, 0.0), (0.0, 10.0), (0.0, 10.0)),
    "orthogonal": ((3.0, 4.0), (-8.0, 6.0), (0.0, 10.0), (-4.0, 13.0)),
    "oblique": ((3.0, 0.0), (5.0, -2.0), (0.0, 10.0), (0.0, 5.0)),
    "zero after": ((3.0, 4.0), (-8.0, 6.0), (0.0, 0.0), (0.0, 0.0)),
    "opposite after": ((3.0, 0.0), (5.0, -2.0), (0.0, 2.0), (0.0, 1.0)),
}


class Given:
    """A parameter whose gradients are given, and what each step moved it by, per lr."""

    def __init__(self, method, dtype, backend, count=1, size=2):
        self.p = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.opt = MicroBatchSAM(SGD([self.p], lr=1.0), 0.1, method=method, num_micro_batches=count, backend=backend)

    def step(self, *grads):
        upcoming = iter(grads)

        def closure():
            self.p.grad = torch.tensor(next(upcoming), dtype=self.p.dtype)

        before = self.p.detach().clone()
        self.opt.step([closure] * self.opt.num_micro_batches)
        assert list(upcoming) == []
        return before - self.p.detach()


each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


@each_dtype
@pytest.mark.parametrize("edge", LOOKS)
def test_a_step_between_where_gradients_are_special(edge, dtype, backend):
    at_w, at_e, after, used = LOOKS[edge]
    run = Given(LookSAM(k=3, alpha=0.5), dtype, backend)
    torch.testing.assert_close(run.step(at_w, at_e), torch.tensor(at_e, dtype=dtype))
    for _ in range(2):  # the same v
        torch.testing.assert_close(run.step(after), torch.tensor(used, dtype=dtype), rtol=1e-6, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("factor", [1.0, -2.0], ids=["identical", "opposite"])
def test_where_sam_adds_nothing_the_step_between_stays_bounded(factor, dtype, backend):
    """v is then rounding, whose direction means nothing: but its length is alpha·‖g‖ at most."""
    run = Given(LookSAM(k=2, alpha=0.5), dtype, backend)
    run.step((3.0, 4.0), (3.0 * factor, 4.0 * factor))
    assert (run.step((0.0, 10.0)) - torch.tensor([0.0, 10.0])).norm() <= 5.001


def test_v_is_the_mean_over_micro_batches(backend):
    run = Given(LookSAM(k=2, alpha=0.5), torch.float64, backend, count=2)
    run.step((1.0, 0.0), (7.0, 3.0), (0.0, 2.0), (4.0, 1.0))  # v: the mean of (0, 3) and (4, 0)
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64) + 0.5 * 5 * torch.tensor([0.8, 0.6], dtype=torch.float64)
    torch.testing.assert_close(run.step((2.0, 8.0), (4.0, 0.0)), expected)


@pytest.mark.parametrize("count", [1, 2], ids=["one micro-batch", "two micro-batches"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("wrong", [0, 1], ids=["at w", "at w + e"])
def test_after_a_v_that_is_not_finite_steps_between_are_plain(wrong, value, count, backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=LookSAM(k=3), num_micro_batches=count, backend=backend)
    for turn, part in enumerate(opt.passes(*batch(6))):
        (loss_of(model, *part) * (value if turn == wrong else 1)).backward()
    opt.zero_grad()  # the weights are not to follow it, but the step counts
    opt.step()
    for seed in range(2):
        data = batch(6, seed=seed)
        for part in opt.passes(*data):
            loss_of(model, *part).backward()
        plain = [torch.zeros_like(p) for p in model.parameters()]
        for part in split(data, [6 // count] * count):
            grads = torch.autograd.grad(loss_of(model, *part), list(model.parameters()))
            plain = [t + g / count for t, g in zip(plain, grads, strict=True)]
        assert same_bits([p.grad for p in model.parameters()], plain)
        opt.step()
        opt.zero_grad()
    WAYS["train_step"](opt, model, batch(6))
    for memory in opt.engine.store.memory("v", 0.0):
        assert memory.buffer.isfinite().all(), "the next step that perturbs finds a new one"


def test_a_loop_that_was_given_up_does_not_count_twice_in_v(backend):
    """Its own loops over one batch add up, where gradients were there before; what a break left behind does not."""
    trained = []
    for stop in (0, 2, 3):
        model = mlp(torch.float64)
        opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=LookSAM(k=2), num_micro_batches=2, backend=backend)
        data = batch(6, torch.float64)
        loss_of(model, *data).backward()
        for last in (stop, None):
            for i, part in enumerate(opt.passes(*data)):
                if i == last:
                    break
                loss_of(model, *part).backward()
        opt.step()
        opt.zero_grad()
        opt.train_step(lambda x, y, model=model: loss_of(model, x, y), *data)
        trained.append(weights(model))
    assert same_bits(trained[0], trained[1])
    assert same_bits(trained[0], trained[2])


@pytest.mark.parametrize("stop", range(4))
def test_a_step_after_a_loop_that_was_given_up_is_finite(stop, backend):
    """As where the user leaves the loop at a bad loss, and calls step() all the same."""
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=LookSAM(k=3), num_micro_batches=2, backend=backend)
    for i, part in enumerate(opt.passes(*batch(6))):
        if i == stop:
            break
        loss_of(model, *part).backward()
    opt.zero_grad()
    opt.step()
    for seed in range(3):
        data = batch(6, seed=seed)
        before = weights(model)
        model_grads = torch.autograd.grad(loss_of(model, *data), list(model.parameters()))
        opt.train_step(lambda x, y: loss_of(model, x, y), *data)
        moved = torch.cat([(p - q).view(-1) for p, q in zip(weights(model), before, strict=True)]).norm()
        length = torch.cat([g.view(-1) for g in model_grads]).norm()
        assert 0 < moved <= 0.1 * 1.71 * length, "g + alpha·‖g‖·v, with v of length 1"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", ["SGD", "RMSprop"])
def test_looksam_with_k_1_is_sam_bit_for_bit(base, way, backend):
    assert same_bits(*(trained(method, base, way, backend, 4) for method in (SAM(), LookSAM(k=1))))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", ["SGD", "RMSprop"])
def test_looksam_with_alpha_0_has_the_base_optimizer_between(base, way, backend):
    assert same_bits(
        trained(LookSAM(k=3, alpha=0.0), base, way, backend, 7),
        trained(SAM(), base, way, backend, 7, enabled=lambda step: step % 3 == 0),
    )


def trained(method, base, way, backend, steps, enabled=lambda step: True):
    """The weights after some steps on small batches."""
    model = mlp()
    bases = {
        "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
        "RMSprop": lambda params: RMSprop(params, lr=0.01),
    }
    opt = MicroBatchSAM(bases[base](model.parameters()), 0.2, method=method, num_micro_batches=2, backend=backend)
    for step in range(steps):
        opt.enabled = enabled(step)
        WAYS[way](opt, model, batch(6, seed=step))
    return list(model.parameters())


# ---- gradients in some passes only -----------------------------------------------------------------------------------

THREE_PASSES = {
    # All three passes of one step, or of LookSAM two steps: one that perturbs and one between.
    "Bilateral": BilateralSAM(rho_min=0.1),
    "Bilateral + Stable": BilateralSAM(rho_min=0.1) + StableSAM(),
    "LookSAM": LookSAM(k=2),
    "Friendly + LookSAM": FriendlySAM(sigma=0.5) + LookSAM(k=2),
}


@pytest.mark.parametrize("way", ["passes", "train_step"])
@pytest.mark.parametrize("there", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("name", THREE_PASSES)
def test_a_parameter_may_get_a_gradient_in_some_of_three_passes(name, there, way, backend):
    model, method = Zoo(uses=lambda call: call % 3 in there), THREE_PASSES[name]
    base = functools.partial(SGD, lr=0.1, momentum=0.9)
    follow_the_plain_loops(model, base, method, 1, way, backend, steps=5, size=4)


@pytest.mark.parametrize("there", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("name", THREE_PASSES)
def test_weights_come_back_wherever_gradients_are(name, there, backend):
    model = Zoo(uses=lambda call: call % 3 in there)
    opt = MicroBatchSAM(SGD(model.groups(), lr=0.1), method=THREE_PASSES[name], num_micro_batches=2, backend=backend)
    for step in range(4):
        before = weights(model)
        for part in opt.passes(*images(5, seed=step)):
            loss_of(model, *part).backward()
        assert same_bits(model.parameters(), before)
        opt.step()
        opt.zero_grad()


# ---- several methods at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "way"),
    [("SGD", "train_step"), ("SGD", "passes"), pytest.param("RMSprop", "train_step", marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("count", [1, 3], ids=["one micro-batch", "three micro-batches"])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_methods_that_add_up_follow_the_plain_loops(name, base, count, way, backend):
    bases = {
        "SGD": lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
        "RMSprop": lambda groups: RMSprop(groups, lr=0.01, momentum=0.5),
    }
    follow_the_plain_loops(Zoo(), bases[base], COMPOSITIONS[name], count, way, backend, tolerance=1e-10)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_order_of_methods_makes_no_difference(name, backend):
    parts = COMPOSITIONS[name].parts
    orders = list(itertools.permutations(parts))[:: max(1, math.factorial(len(parts)) // 6)]
    first, *others = (
        trained(functools.reduce(operator.add, order), "SGD", "train_step", backend, 4) for order in orders
    )
    assert others
    for other in others:
        assert same_bits(first, other)


@pytest.mark.parametrize(
    ("grows", "absent"),
    [(False, False), (True, False), (True, True)],
    ids=["one buffer", "two", "two, absent from second passes"],
)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_parameters_may_get_the_same_tensor_as_gradient(name, count, grows, absent, backend):
    """As ``autograd.grad`` returns it for the operands of a sum."""

    def trained(own: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4) * k) for k in (1, 2)]
        at_first = params[:1] if grows else params
        base = SGD(at_first, lr=0.1, momentum=0.9)
        opt = MicroBatchSAM(base, 0.5, num_micro_batches=count, method=METHODS[name], backend=backend)
        if grows:
            opt.add_param_group({"params": params[1:]})
        for step in range(3):
            for x in opt.passes(torch.linspace(-1, 1, 16).view(4, 4) + step / 3):
                grads = torch.autograd.grad((x @ (params[0] + params[1]).t()).sin().square().mean(), params)
                assert grads[0] is grads[1]
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.clone() if own else g
                if absent and opt.pass_index == 1:
                    params[0].grad = None
            opt.step()
            opt.zero_grad()
        return params

    assert same_bits(trained(True), trained(False))


@pytest.mark.parametrize("name", METHODS)
def test_two_passes_may_give_the_same_tensor_as_gradient(name, backend):
    def trained(own: bool) -> Tensor:
        p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        opt = MicroBatchSAM(SGD([p], lr=0.1, momentum=0.9), 0.5, method=METHODS[name], backend=backend)
        for step in range(3):
            constant = torch.linspace(-2, 1, 12).view(3, 4) + step
            given = iter([constant, constant.clone() if own else constant])

            def closure(given=given):
                p.grad = next(given, None)
                if p.grad is None:
                    p.sin().sum().backward()

            opt.step(closure)
        return p

    assert same_bits([trained(True)], [trained(False)])


@pytest.mark.parametrize("name", [*METHODS, *COMPOSITIONS])
def test_sam_adds_nothing(name):
    method = {**METHODS, **COMPOSITIONS}[name]
    assert SAM() + method == method == method + SAM()
    late = dataclasses.replace(method, start=7)
    assert late != method
    assert SAM(start=7) + method == late == method + SAM(start=7)


def test_sums_of_sums_are_flat():
    a, b, c, d = FriendlySAM(), StableSAM(), SparseSAM(), GapSAM()
    assert ((a + b) + (c + d)).parts == (a + (b + (c + d))).parts == (((a + b) + c) + d).parts == (a, b, c, d)
    assert SAM() + SAM() == SAM()
    assert type(SAM() + SAM()) is SAM


def test_one_start_is_that_of_all():
    for sum_ in (
        FriendlySAM(start=5) + StableSAM(),
        FriendlySAM() + StableSAM(start=5),
        FriendlySAM(start=5) + StableSAM(start=5),
        SAM(start=5) + (FriendlySAM() + StableSAM()),
        (FriendlySAM(start=5) + SAM()) + StableSAM(),
    ):
        assert sum_.start == 5
        assert sum_.parts == (FriendlySAM(), StableSAM())
        assert (sum_ + GapSAM()).start == 5
    with pytest.raises(ValueError, match=r"start at different steps: give one start, to either"):
        FriendlySAM(start=5) + StableSAM(start=6)
    with pytest.raises(ValueError, match=r"start at different steps"):
        (FriendlySAM() + StableSAM(start=6)) + GapSAM(start=5)


# what is added, and what the message names
REFUSED = {
    "GSAM and Bilateral": ([GapSAM(), BilateralSAM()], r"GapSAM.* and BilateralSAM.* each say which gradients"),
    "LookSAM and GSAM": ([LookSAM(), GapSAM()], r"LookSAM.* and GapSAM.* each say which gradients"),
    "LookSAM and Bilateral": ([LookSAM(), BilateralSAM()], r"LookSAM.* and BilateralSAM.* each say which"),
    "LookSAM and GSAM alpha=0": ([LookSAM(), GapSAM(alpha=0.0)], r"LookSAM.* and GapSAM.* each say which"),
    "further away": ([GapSAM(), StableSAM(), SparseSAM(), LookSAM()], r"GapSAM.* and LookSAM.* each say which"),
    "LookSAM and Stable": ([LookSAM(), StableSAM()], r"LookSAM.* sets the length .* StableSAM would set it again"),
    "Stable and LookSAM": ([StableSAM(), LookSAM()], r"LookSAM.* sets the length .* StableSAM would set it again"),
    "Stable, further away": ([StableSAM(), FriendlySAM(), LookSAM()], r"LookSAM.* StableSAM would set it again"),
    "Friendly twice": ([FriendlySAM(), FriendlySAM(sigma=0.5)], "has FriendlySAM 2 times: take one of them"),
    "Friendly and VaSSO": (
        [FriendlySAM(), VaSSO()],
        r"FriendlySAM.* and VaSSO.* each say what the perturbation is made of",
    ),
    "Momentum and VaSSO": (
        [MomentumSAM(), VaSSO()],
        r"MomentumSAM.* and VaSSO.* each say what the perturbation",
    ),
    "WSAM and GSAM": ([WSAM(), GapSAM()], r"WSAM.* and GapSAM.* each say which gradients"),
    "Momentum and Stable": (
        [MomentumSAM(), StableSAM()],
        r"StableSAM.* needs the gradient at w, for which MomentumSAM has no",
    ),
    "LookSAM and Momentum": (
        [LookSAM(), MomentumSAM()],
        r"LookSAM.* needs the gradient at w, for which MomentumSAM has no",
    ),
    "Momentum and LE-SAM": ([MomentumSAM(), LossEquatedSAM()], r"LossEquatedSAM.* needs the gradient at w"),
    "Momentum and WSAM": ([MomentumSAM(), WSAM(decoupled=False)], r"WSAM.* needs the gradient at w"),
    "WSAM and Stable": ([WSAM(), StableSAM()], r"WSAM.* gives the base optimizer g itself, .* or decoupled=False"),
    "Sparse twice": ([SparseSAM(), StableSAM(), SparseSAM()], "has SparseSAM 2 times: take one of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_methods_that_contradict_each_other_are_refused(case):
    added, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        functools.reduce(operator.add, added)
    with pytest.raises(ValueError, match="take one of them"):
        Composition(tuple(added))


def test_momentum_sam_takes_masks_of_others_only(backend):
    with pytest.raises(ValueError, match=r"chooses masks by gradients at w, .* give it update_every=None"):
        MomentumSAM() + SparseSAM()
    method = MomentumSAM() + SparseSAM(update_every=None)
    model = mlp(torch.float64)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, method=method, backend=backend)
    opt.mask = masks = [torch.arange(p.numel()).view(p.shape) % 3 == 0 for p in model.parameters()]
    opt.train_step(lambda *part: loss_of(model, *part), *batch(4, torch.float64))
    before = weights(model)
    for part in opt.passes(*batch(4, torch.float64)):
        changed = [p != w for p, w in zip(model.parameters(), before, strict=True)]
        assert all(torch.equal(c, m) for c, m in zip(changed, masks, strict=True))
        loss_of(model, *part).backward()
    assert same_bits(model.parameters(), before)


# ---- a part of the parameters ----------------------------------------------------------------------------------------


PARTIAL = {
    **{name: METHODS[name] for name in ("SAM", "ASAM", "F-SAM", "Stable SAM", "Bilateral SAM", "WSAM", "Momentum-SAM")},
    "LookSAM k=2": METHODS["LookSAM k=2"],
    "Sparse SAM": METHODS["Sparse SAM"],
    "VaSSO + Stable": VaSSO(theta=0.3) + StableSAM(),
}


@pytest.mark.parametrize("way", ["passes", "train_step"])
@pytest.mark.parametrize("count", [1, 3], ids=["one micro-batch", "three micro-batches"])
@pytest.mark.parametrize("name", PARTIAL)
def test_a_chosen_part_follows_the_plain_loops(name, count, way, backend):
    expected = Zoo()
    actual = copy.deepcopy(expected)
    made = []
    for model, kind in ((expected, PlainSAM), (actual, MicroBatchSAM)):
        method = dataclasses.replace(PARTIAL[name], only=[model.matrix, model.square, model.sometimes])
        base = SGD(model.groups(), lr=0.1, momentum=0.9, weight_decay=0.01)
        options = {} if kind is PlainSAM else {"num_micro_batches": count, "backend": backend}
        made.append(kind(base, method=method, **options))
    theirs, ours = made
    for step in range(4):
        data = images(2 * count, seed=step)
        WAYS[way](ours, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [2] * count)])
        assert_close(actual, expected, 1e-10)
        if theirs.grad_norms:
            torch.testing.assert_close(ours.stats.grad_norm, torch.stack(theirs.grad_norms), rtol=1e-10, atol=1e-12)
            achieved = torch.stack(theirs.perturbation_norms)
            torch.testing.assert_close(ours.stats.perturbation_norm, achieved, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "chosen later"])
@pytest.mark.parametrize("name", ["SAM", "F-SAM", "Momentum-SAM"])
def test_what_is_not_chosen_is_neither_read_nor_saved_nor_moved(name, later, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 300), nn.LayerNorm(300), nn.Linear(300, 2)).double()
    chosen = methods.norm_layers(model)
    assert chosen == [model[1].weight, model[1].bias]
    method = dataclasses.replace(METHODS[name], only=chosen)
    opt = MicroBatchSAM(
        SGD(model.parameters(), lr=0.1, momentum=0.9), 0.1, method=SAM() if later else method, backend=backend
    )
    opt.method = method
    WAYS["train_step"](opt, model, batch(4, torch.float64))
    before, kept = weights(model), {id(p) for p in chosen}
    for turn, part in enumerate(opt.passes(*batch(4, torch.float64, seed=1))):
        moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)]
        perturbed = turn == passes_of(method) - 1
        assert moved == [perturbed and id(p) in kept for p in model.parameters()]
        loss_of(model, *part).backward()
        if not perturbed:
            expected = torch.cat([p.grad.flatten() for p in chosen]).norm()
    if name == "SAM":
        torch.testing.assert_close(opt.stats.grad_norm, expected[None], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        opt.stats.perturbation_norm, torch.full((1,), 0.1, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert same_bits(model.parameters(), before)
    opt.step()
    sizes = [flat.saved.numel() for flat in opt.engine.store.flats if flat.saved is not None]
    assert sum(sizes) == (opt.engine.store.flats[0].size if later else 2 * 304), "300 in steps of 128 bytes"


def test_another_choice_has_statistics_of_its_own(backend):
    model = mlp(torch.float64)
    base = SGD(model.parameters(), lr=0.1)
    opt = MicroBatchSAM(base, 0.3, method=SAM(only=model[0].parameters()), backend=backend)
    for layer in (model[0], model[2]):
        opt.method = SAM(only=layer.parameters())
        WAYS["train_step"](opt, model, batch(4, torch.float64))
        torch.testing.assert_close(opt.stats.perturbation_norm.item(), 0.3, rtol=1e-9, atol=0)


def test_normalisation_layers_are_told_by_their_class():
    class TheirRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    class BatchAct(nn.BatchNorm1d):
        pass

    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), TheirRMSNorm(), BatchAct(2))
    model.append(model[1])
    model.append(nn.LayerNorm(2, elementwise_affine=False))
    found = methods.norm_layers(model)
    wanted = [*model[1].parameters(), *model[2].parameters(), model[3].scale, *model[4].parameters()]
    assert list(map(id, found)) == list(map(id, wanted))


def test_one_choice_is_that_of_all():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for sum_ in (
        FriendlySAM(only=[p]) + StableSAM(),
        FriendlySAM() + SAM(only=(x for x in [p])),
        SAM(only=[p]) + VaSSO(),
    ):
        assert sum_.only == {p}
        assert sum_.full.only == {p}
        assert "<1 parameter>" in repr(sum_)
    assert SAM(only=[p, p]) + SAM(only=[p]) == SAM(only=[p])
    with pytest.raises(ValueError, match=r"perturb different parameters: give one only, to either"):
        SAM(only=[p]) + StableSAM(only=[q])
    with pytest.raises(ValueError, match=r"perturb different parameters"):
        SAM(only=[p]) + StableSAM(only=[p, q])


def test_a_copy_perturbs_its_own_part(backend):
    model = mlp(torch.float64)
    opt = MicroBatchSAM(
        SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, method=SAM(only=model[0].parameters()), backend=backend
    )
    for twin, other in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        assert other.method.only == set(twin[0].parameters())
        before = weights(twin)
        for turn, part in enumerate(other.passes(*batch(4, torch.float64))):
            moved = [not torch.equal(p, w) for p, w in zip(twin.parameters(), before, strict=True)]
            assert moved == [turn == 1] * 2 + [False] * 2
            loss_of(twin, *part).backward()


def test_parameters_that_come_later_may_be_chosen(backend):
    model = mlp(torch.float64)
    base = SGD(model[0].parameters(), lr=0.1)
    opt = MicroBatchSAM(base, 0.3, method=SAM(only=[model[0].bias, model[2].weight]), backend=backend)
    opt.add_param_group({"params": model[2].parameters()})
    before = weights(model)
    for turn, part in enumerate(opt.passes(*batch(4, torch.float64))):
        moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)]
        assert moved == [False, turn == 1, turn == 1, False]
        loss_of(model, *part).backward()


# ---- momentum --------------------------------------------------------------------------------------------------------


def test_momentum_of_zero_or_of_none_perturbs_nothing(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, method=MomentumSAM(), backend=backend)
    before = weights(model)

    def seen():
        assert same_bits(model.parameters(), before)
        loss_of(model, *batch(4)).backward()

    for _ in range(2):
        for _ in opt.passes():
            seen()
        assert opt.stats.grad_norm.tolist() == opt.stats.perturbation_norm.tolist() == [0.0]
        opt.zero_grad()
        for p in model.parameters():
            opt.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for p in model.parameters():
        opt.state[p]["momentum_buffer"] = None
    opt.step(seen)
    assert not same_bits(model.parameters(), before)


def test_momentum_that_is_not_finite_perturbs_nothing_and_says_so(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, method=MomentumSAM(), backend=backend)
    WAYS["train_step"](opt, model, batch(4))
    opt.state[model[0].bias]["momentum_buffer"].fill_(math.nan)
    before = weights(model)
    for part in opt.passes(*batch(4)):
        assert same_bits(model.parameters(), before)
        loss_of(model, *part).backward()
    assert opt.stats.nonfinite.tolist() == [True]
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_is_frozen_stays_although_it_has_momentum(backend):
    model = mlp()
    opt = MicroBatchSAM(
        AdamW(model.parameters(), lr=0.1), 0.3, method=MomentumSAM(), num_micro_batches=2, backend=backend
    )
    WAYS["train_step"](opt, model, batch(4))
    model[0].weight.requires_grad_(False)
    before = weights(model)
    for part in opt.passes(*batch(4)):
        moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)]
        assert moved == [False, True, True, True]
        loss_of(model, *part).backward()
    assert same_bits(model.parameters(), before)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop"])
def test_the_momentum_that_was_loaded_is_followed(base, backend):
    """The first step after ``load_state_dict``, and one after a state was exchanged by hand, are those of the original."""
    bases = {
        "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "AdamW": lambda p: AdamW(p, lr=0.01, amsgrad=True),
        "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
    }
    models = [mlp(), mlp(seed=1)]
    ours, other = (
        MicroBatchSAM(bases[base](m.parameters()), 0.3, method=MomentumSAM(), backend=backend) for m in models
    )
    for seed in range(3):
        WAYS["train_step"](ours, models[0], batch(6, seed=seed))
        WAYS["train_step"](other, models[1], batch(6, seed=7 + seed))
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(ours.state_dict())
    for seed in range(2):
        for p in models[1].parameters():
            entry = other.state[p]
            other.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        for opt, model in zip((ours, other), models, strict=True):
            WAYS["train_step"](opt, model, batch(6, seed=seed))
        assert same_bits(models[0].parameters(), models[1].parameters())


def test_every_micro_batch_sees_the_same_perturbation(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, method=MomentumSAM(), backend=backend)
    WAYS["train_step"](opt, model, batch(6))
    opt.num_micro_batches = 3
    before, seen = weights(model), []
    with pytest.raises(RuntimeError, match="while the weights are perturbed"):
        for part in opt.passes(*batch(6)):
            seen.append(weights(model))
            loss_of(model, *part).backward()
            if len(seen) == 3:
                opt.state_dict()
    assert same_bits(seen[0], seen[1])
    assert same_bits(seen[0], seen[2])
    assert not same_bits(seen[0], before)
    assert same_bits(model.parameters(), before)


# ---- what is kept until the end of a step ------------------------------------------------------------------------------


class Clipping(Exception):
    pass


def fail() -> None:
    raise Clipping


KEEP = {"WSAM": WSAM(gamma=0.9), "LookSAM": LookSAM(k=2), "F-SAM + LookSAM": FriendlySAM() + LookSAM(k=2)}


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", KEEP)
def test_a_step_that_is_given_up_leaves_nothing_to_later_ones(method, count, parallel, backend):
    def trained(fails: bool) -> list[Tensor]:
        model = mlp(torch.float64)
        options = {"method": KEEP[method], "num_micro_batches": count, "model": model, "parallel": parallel}
        opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.3, backend=backend, **options)
        if fails:
            with pytest.raises(Clipping):
                opt.train_step(functools.partial(loss_of, model), *batch(4, torch.float64), before_update=fail)
            for flat in opt.engine.store.flats if "F-SAM" in method else ():
                flat.memories.pop("ema")  # which has moved on where passes came one after the other
        loss_of(model, *batch(4, torch.float64, seed=5)).backward()
        WAYS["passes"](opt, model, batch(4, torch.float64, seed=2))  # onto gradients that are there
        WAYS["train_step"](opt, model, batch(4, torch.float64, seed=3))
        return weights(model)

    assert same_bits(trained(True), trained(False))


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("method", KEEP)
def test_a_loop_that_is_given_up_leaves_what_earlier_loops_of_the_step_kept(method, turns, backend):
    def trained(gives_up: bool) -> list[Tensor]:
        model = mlp(torch.float64)
        opt = MicroBatchSAM(
            SGD(model.parameters(), lr=0.1), 0.3, method=KEEP[method], num_micro_batches=2, backend=backend
        )
        for part in opt.passes(*batch(4, torch.float64)):
            loss_of(model, *part).backward()
        if gives_up:
            means = [flat.memories["ema"].buffer.clone() for flat in opt.engine.store.flats if "ema" in flat.memories]
            with opt.passes(*batch(4, torch.float64, seed=2)) as parts:
                for _, part in zip(range(turns + 1), parts, strict=False):
                    loss_of(model, *part).backward()
            for flat, mean in zip(opt.engine.store.flats, means, strict=False):
                flat.memories["ema"].buffer.copy_(mean)  # which has moved on
        opt.step()
        WAYS["train_step"](opt, model, batch(4, torch.float64, seed=3))
        return weights(model)

    assert same_bits(trained(True), trained(False))


# ---- the gap of WSAM -------------------------------------------------------------------------------------------------


def test_the_gap_of_gradients_that_are_gone_moves_nothing(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, method=WSAM(), backend=backend)
    before = weights(model)
    for forget in (opt.zero_grad, model.zero_grad):
        for part in opt.passes(*batch(4)):
            loss_of(model, *part).backward()
        forget()
        opt.step()
        assert same_bits(model.parameters(), before)


def test_the_gap_follows_the_learning_rate_of_each_group(backend):
    model, data = mlp(torch.float64), batch(4, torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": torch.tensor(0.25)}]
    opt = MicroBatchSAM(SGD(groups, lr=0.1), 0.3, method=WSAM(gamma=0.75), backend=backend)
    for way in ("passes", "train_step"):
        before, params = weights(model), list(model.parameters())
        at_w = torch.autograd.grad(loss_of(model, *data), params)
        norm = torch.cat([g.flatten() for g in at_w]).norm()
        with torch.no_grad():
            for p, g in zip(params, at_w, strict=True):
                p += 0.3 * g / norm
        at_e = torch.autograd.grad(loss_of(model, *data), params)
        rates = [g["lr"] for g in opt.param_groups for _ in g["params"]]
        with torch.no_grad():
            for p, w in zip(params, before, strict=True):
                p.copy_(w)
        WAYS[way](opt, model, data)
        for p, w, g, h, lr in zip(params, before, at_w, at_e, rates, strict=True):
            torch.testing.assert_close(p.detach(), w - lr * g - lr * 3 * (h - g), rtol=1e-12, atol=1e-12)
        opt.param_groups[0]["lr"] = 0.05


@pytest.mark.parametrize("other", [0.5, None, "SAM", FriendlySAM], ids=str)
def test_only_methods_add_up(other):
    with pytest.raises(TypeError, match="unsupported operand"):
        FriendlySAM() + other
    with pytest.raises(TypeError):  # in the other's words
        other + (FriendlySAM() + StableSAM())


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("name", [*METHODS, *COMPOSITIONS])
def test_a_method_is_a_value(name, start):
    method = dataclasses.replace({**METHODS, **COMPOSITIONS}[name], start=start)
    assert method.start == start
    for twin in (copy.copy(method), copy.deepcopy(method), pickle.loads(pickle.dumps(method)), method + SAM()):
        assert twin == method
        assert hash(twin) == hash(method)
        assert type(twin) is type(method)
        assert repr(twin) == repr(method)
    code, late, step = repr(method).partition(" from step ")
    again = eval(code, vars(methods))
    assert dataclasses.replace(again, start=int(step)) == method if late else again == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.start = 9


def test_a_sum_reads_as_it_was_written():
    method = StableSAM() + FriendlySAM(sigma=0.5)
    assert repr(method) == f"{StableSAM()!r} + {FriendlySAM(sigma=0.5)!r}"
    assert repr(dataclasses.replace(method, start=3)) == repr(method) + " from step 3"
    assert re.search(
        r"method=StableSAM\(.*\) \+ FriendlySAM\(", repr(MicroBatchSAM(SGD(mlp().parameters()), method=method))
    )


@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@pytest.mark.parametrize("name", METHODS)
def test_parameters_without_elements_are_no_obstacle(name, flatten, backend):
    train_parameters_without_elements(method=METHODS[name], flatten=flatten, backend=backend)
