# SPDX-License-Identifier: Apache-2.0
"""``train_step(before_update=, scaler=)``: what comes before the update, as between a ``passes`` loop and ``step()``."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adam, AdamW, RMSprop

from msam_kernels import MicroBatchSAM, methods
from plain import DEVICE, METHODS, batch, loss_of, mlp, same_bits, weights

BASES = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: AdamW(params, lr=0.01),
    "RMSprop": lambda params: RMSprop(params, lr=0.01, momentum=0.5),  # has no kernel
}


class Trained:
    """A model in training, in fp64 unless told otherwise."""

    def __init__(self, backend, method="SAM", base="SGD", count=1, dtype=torch.float64):
        self.model = mlp(dtype)
        base = BASES[base](self.model.parameters())
        self.opt = MicroBatchSAM(base, 0.1, method=METHODS[method], num_micro_batches=count, backend=backend)
        self.dtype = dtype

    def loss_fn(self, x, y):
        return loss_of(self.model, x, y)

    def batch(self, i, factor=1.0):
        x, y = batch(seed=i)
        return x.to(self.dtype), y.to(self.dtype) * factor

    def clip(self):
        return clip_grad_norm_(self.model.parameters(), 0.05)

    def state(self):
        return [t for entry in self.opt.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]


def part_of(rows, tried):
    """All of the rows; those that ``tried`` leaves out are CI's."""
    return [pytest.param(*row, marks=() if tried(*row) else pytest.mark.exhaustive) for row in rows]


@pytest.mark.parametrize(
    ("method", "base", "count"),
    part_of(
        itertools.product(METHODS, BASES, (1, 3)),
        lambda method, base, count: (base, count) == ("SGD", 3) or (method == "SAM" and count == 1),
    ),
)
def test_clipping_before_the_update_is_clipping_after_a_loop(method, base, count, backend):
    ours, loop = (Trained(backend, method, base, count) for _ in range(2))
    norms = [], []
    for i in range(5):
        ours.opt.train_step(ours.loss_fn, *ours.batch(i), before_update=lambda: norms[0].append(ours.clip()))
        for xb, yb in loop.opt.passes(*loop.batch(i)):
            loop.loss_fn(xb, yb).backward()
        norms[1].append(loop.clip())
        loop.opt.step()
        loop.opt.zero_grad()
        for p, q in zip(weights(ours.model), weights(loop.model), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
        assert all(p.grad is None for p in ours.model.parameters())
    torch.testing.assert_close(*map(torch.stack, norms), rtol=1e-12, atol=0)
    assert all(norm > 0.05 for norm in norms[0])
    assert ours.opt.steps == 5


def test_before_update_sees_the_weights_at_w_and_may_change_the_gradients(backend):
    trained = Trained(backend, count=2)
    params = list(trained.model.parameters())
    params[0].grad = torch.full_like(params[0], 3.0)  # of before: takes no part
    before, calls = weights(trained.model), []

    def before_update():
        calls.append(1)
        assert same_bits(params, before)
        assert all(p.grad is not None for p in params)
        assert params[0].grad.abs().max() < 1
        clip_grad_value_(params, 0.0)
        params[0].grad = torch.ones_like(params[0])
        params[1].grad = None
        trained.opt.param_groups[0].update(lr=0.5, weight_decay=0.0)

    trained.opt.train_step(trained.loss_fn, *trained.batch(0), before_update=before_update)
    assert calls == [1]
    assert torch.equal(params[0], before[0] - 0.5)
    assert same_bits(params[1:], before[1:])
    assert params[1] not in trained.opt.state


@pytest.mark.parametrize("base", BASES)
def test_an_error_before_the_update_changes_nothing(base, backend):
    trained = Trained(backend, "SAM", base, count=2)
    trained.opt.train_step(trained.loss_fn, *trained.batch(0))
    for p in trained.model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in trained.model.parameters()]
    before = [t.detach().clone() for t in (*trained.model.parameters(), *trained.state())]

    def before_update():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trained.opt.train_step(trained.loss_fn, *trained.batch(1), before_update=before_update)
    assert same_bits([*trained.model.parameters(), *trained.state()], before)
    assert all(p.grad is g and (g == 1).all() for p, g in zip(trained.model.parameters(), grads, strict=True))
    trained.opt.train_step(trained.loss_fn, *trained.batch(1))


def test_an_error_before_the_update_leaves_the_mask_as_it_was(backend):
    trained, other = (Trained(backend, "Sparse SAM", "SGD", count=2) for _ in range(2))
    for t in (trained, other):
        t.opt.method = methods.SparseSAM(update_every=2)
    for i in range(3):
        for t in (trained, other):
            t.opt.train_step(t.loss_fn, *t.batch(i))
    before, mask_step = [m.clone() for m in trained.opt.mask], trained.opt.engine.mask_step
    with pytest.raises(KeyError):
        trained.opt.train_step(trained.loss_fn, *trained.batch(3), before_update=lambda: {}["mine"])
    assert same_bits(trained.opt.mask, before)
    assert trained.opt.engine.mask_step == mask_step
    for i in range(3, 6):
        for t in (trained, other):
            t.opt.train_step(t.loss_fn, *t.batch(i))
    assert same_bits(trained.model.parameters(), other.model.parameters())


# ---- scalers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the closure left no gradient for any parameter of the optimizer")
def test_a_scaler_without_any_gradient_to_look_at_says_so_and_the_next_step_works(backend):
    trained, scaler = Trained(backend, "SAM", "SGD", count=1), new_scaler()
    alone = torch.ones((), device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        trained.opt.train_step(lambda *_: alone * 2, *trained.batch(0), scaler=scaler)
    trained.opt.train_step(trained.loss_fn, *trained.batch(0), scaler=scaler)
    scaler.update()


def new_scaler():
    return torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=2)


@pytest.mark.parametrize(
    ("method", "base", "clips"),
    part_of(
        itertools.product(METHODS, ("SGD", "AdamW"), (False, True)),
        lambda method, base, clips: (base, clips) == ("SGD", False) or (method == "SAM" and clips),
    ),
)
def test_a_scaled_step_is_that_of_a_loop_with_the_scaler(method, base, clips, backend):
    """Also where every third batch overflows."""
    ours, loop = (Trained(backend, method, base, count=2, dtype=torch.float32) for _ in range(2))
    scalers, scales = (new_scaler(), new_scaler()), set()
    for i in range(7):
        too_large = i in (1, 4)
        before = [t.detach().clone() for t in (*ours.model.parameters(), *ours.state())]
        x, y = ours.batch(i, 1e38 if too_large else 1.0)
        options = {"before_update": ours.clip} if clips else {}
        loss = ours.opt.train_step(ours.loss_fn, x, y, scaler=scalers[0], **options)
        scalers[0].update()
        losses = []
        for xb, yb in loop.opt.passes(x, y, scaler=scalers[1]):
            part = loop.loss_fn(xb, yb)
            losses += [] if loop.opt.pass_index else [part.detach() * len(xb) / len(x)]
            scalers[1].scale(part).backward()
        if clips:
            scalers[1].unscale_(loop.opt)
            loop.clip()
        scalers[1].step(loop.opt)
        scalers[1].update()
        loop.opt.zero_grad()
        loop.opt.steps = ours.opt.steps  # it knows what was skipped
        torch.testing.assert_close(loss, sum(losses))
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scales.add(scalers[0].get_scale())
        assert same_bits(weights(ours.model), weights(loop.model)), f"step {i}"
        skipped = same_bits([*ours.model.parameters(), *ours.state()][: len(before)], before)
        assert skipped == too_large, f"step {i}"
    assert scales == {2.0**9, 2.0**10}


def test_another_step_needs_an_update_of_the_scaler(backend):
    trained, scaler = Trained(backend, dtype=torch.float32), new_scaler()
    trained.opt.train_step(trained.loss_fn, *trained.batch(0), scaler=scaler)
    before = weights(trained.model)
    with pytest.raises(RuntimeError, match=r"before scaler\.update\(\): call it once after every step"):
        trained.opt.train_step(trained.loss_fn, *trained.batch(0), scaler=scaler)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last update"):
        scaler.step(trained.opt)
    assert same_bits(weights(trained.model), before)
    scaler.update()
    with pytest.raises(KeyError):  # what fails needs no update
        trained.opt.train_step(trained.loss_fn, *trained.batch(0), scaler=scaler, before_update={}.popitem)
    trained.opt.train_step(trained.loss_fn, *trained.batch(0), scaler=scaler)


def test_two_optimizers_share_a_scaler(backend):
    ours, other = (Trained(backend, dtype=torch.float32) for _ in range(2))
    scaler, before = new_scaler(), weights(ours.model)
    ours.opt.train_step(ours.loss_fn, *ours.batch(0, 1e38), scaler=scaler)
    other.opt.train_step(other.loss_fn, *other.batch(0), scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert same_bits(weights(ours.model), before)
    assert not same_bits(weights(other.model), before)


def test_what_a_scaler_cannot_serve_is_refused_before_anything_changes(backend):
    scaler = new_scaler()
    for trained in (Trained(backend, base="RMSprop"), Trained(backend)):
        if isinstance(trained.opt.base_optimizer, SGD):
            trained.opt.base_optimizer.register_step_pre_hook(lambda *_: None)
        before = weights(trained.model)
        with pytest.raises(RuntimeError, match=r"skips an update on the device, which (RMSprop|SGD)'s own step cannot"):
            trained.opt.train_step(trained.loss_fn, *trained.batch(0), scaler=scaler)
        assert same_bits(weights(trained.model), before)
        assert not trained.opt.state
    with pytest.raises(TypeError, match=r"scaler must be a torch.amp.GradScaler, got int"):
        trained.opt.train_step(trained.loss_fn, *trained.batch(0), scaler=1)
    with pytest.raises(TypeError, match=r"before_update must be a function .*got 2"):
        trained.opt.train_step(trained.loss_fn, *trained.batch(0), before_update=2)


def test_parameters_of_several_dtypes_are_skipped_together(backend):
    """A gradient that is not finite in one of the flats."""
    model = torch.nn.ModuleList([mlp(torch.float64), mlp(torch.float32)]).to(DEVICE)
    opt = MicroBatchSAM(Adam(model.parameters(), lr=0.01), 0.1, backend=backend)
    scaler, before = new_scaler(), weights(model)

    def loss_fn(x, y):
        return loss_of(model[0], x.double(), y.double()) + loss_of(model[1], x, y).double()

    x, y = batch(seed=0)
    opt.train_step(loss_fn, x, y * 1e38, scaler=scaler)
    scaler.update()
    assert same_bits(weights(model), before)
    opt.train_step(loss_fn, x, y, scaler=scaler)
    assert not any(same_bits([p], [q]) for p, q in zip(weights(model), before, strict=True))
