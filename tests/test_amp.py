# SPDX-License-Identifier: Apache-2.0
"""A ``GradScaler`` whose scale changes and whose steps overflow, and ``max_grad_norm``: against runs that know of neither."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, RMSprop

import msam_kernels
from msam_kernels import MicroBatchSAM, methods
from plain import DEVICE, METHODS, batch, loss_of, mlp, remembered, same_bits, weights

F64 = torch.float64
BASES = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.01),
    "RMSprop": lambda p: RMSprop(p, lr=0.01),  # has no kernel
}
#: By step, the passes whose loss overflows, of all micro-batches' in turn: ascents are even, where there is one other pass.
OVERFLOWS = {2: {0}, 4: {1}, 5: {0, 1}, 8: {2}, 9: {3}, 12: {5}, 14: set(range(12))}
#: By step, what somebody multiplies the scale by before it; an overflow halves it, two good steps double it. Powers of two:
#: by others torch divides in fp32.
CHANGES = {3: 4.0, 7: 1 / 16, 13: 8.0}


class Run:
    """A model in training with a scaler, in one of the ways there are; ``clip`` for a norm that every step exceeds."""

    def __init__(self, method, base="SGD", count=1, way="passes", backend="auto", clip=None, seed=0, **options):
        self.model = mlp(F64, seed=seed)
        self.way, self.clip = way, clip
        base = BASES[base](self.model.parameters())
        method = METHODS.get(method, method)
        if way == "parallel":
            options = {"model": self.model, "parallel": True}
        self.opt = MicroBatchSAM(base, 0.1, method=method, num_micro_batches=count, backend=backend, **options)
        self.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=2)
        self.scaler.scale(torch.ones((), device=DEVICE))  # which makes its scale
        self.calls = 0

    def loss_fn(self, bad):
        def loss(x, y):
            self.calls += 1
            factor = math.inf if self.calls - 1 in bad else 1.0
            return loss_of(self.model, x, y) * factor

        return loss

    def step(self, i, bad=frozenset()):
        """Whether it was taken."""
        self.calls, opt, scaler = 0, self.opt, self.scaler
        x, y = batch(6, F64, seed=i)
        loss = self.loss_fn(bad)
        limit = {} if self.clip is None else {"max_grad_norm": self.clip}
        scale = scaler.get_scale()
        steps, scaled = opt.steps, lambda *part: scaler.scale(loss(*part)).backward()
        if self.way == "passes":
            for part in opt.passes(x, y, scaler=scaler):
                scaled(*part)
            if self.clip is not None:
                scaler.unscale_(opt)
            scaler.step(opt, **limit)
            opt.zero_grad()
        elif self.way == "closures":
            parts = list(zip(x.chunk(opt.num_micro_batches), y.chunk(opt.num_micro_batches), strict=True))
            opt.step([lambda part=part: scaled(*part) for part in parts], scaler=scaler, **limit)
        else:
            opt.train_step(loss, x, y, scaler=scaler, **limit)
        taken = bad.isdisjoint(range(self.calls))
        scaler.update()
        assert taken or scaler.get_scale() == scale / 2
        if not taken and self.way != "passes":
            opt.steps = steps  # the host does not wait to know
        return taken

    def everything(self):
        kept = [t for name in ("ema", "mask") for t in remembered(self.opt, name).values()]
        state = [v for p in self.model.parameters() for k, v in self.opt.state[p].items() if not k.startswith("msam")]
        return [t.detach().clone() for t in (*self.model.parameters(), *map(torch.as_tensor, state), *kept)]


def plain_step(model, opt, i, clip=None):
    x, y = batch(6, F64, seed=i)
    for part in opt.passes(x, y):
        loss_of(model, *part).backward()
    if clip is not None:
        clip_grad_norm_(model.parameters(), clip)
    opt.step()
    opt.zero_grad()


WAYS = ("passes", "train_step", "closures", "parallel")


def rows(short):
    found = []
    for row in itertools.product(METHODS, BASES, (1, 3), WAYS):
        method, base, count, way = row
        if (base == "RMSprop" and (way != "passes" or METHODS[method].full.momentum)) or (
            way == "parallel" and count == 1
        ):
            continue
        found.append(pytest.param(*row, marks=() if short(*row) else pytest.mark.exhaustive))
    return found


def is_short(method, base, count, way):
    kept = method in ("F-SAM", "LookSAM k=2", "Sparse SAM", "WSAM", "VaSSO", "LE-SAM")
    return (base, count, way) == ("SGD", 3, "passes") or (kept and (base, count, way) == ("AdamW", 3, "train_step"))


@pytest.mark.parametrize(("method", "base", "count", "way"), rows(is_short))
def test_steps_that_overflow_have_not_been(method, base, count, way, backend):
    """The scripted run: whatever the scale is, and whichever passes overflow, it is that of the good steps alone."""
    run = Run(method, base, count, way, backend)
    model = mlp(F64)
    opt = MicroBatchSAM(
        BASES[base](model.parameters()), 0.1, method=METHODS[method], num_micro_batches=count, backend=backend
    )
    good = 0
    for i in range(17):
        if i in CHANGES:
            run.scaler.update(run.scaler.get_scale() * CHANGES[i])
        before = run.everything()
        if run.step(i, OVERFLOWS.get(i, frozenset())):
            plain_step(model, opt, i)
            good += 1
        else:
            assert same_bits(run.everything()[: len(before)], before), f"step {i}"
        assert run.opt.steps == opt.steps == good
        for p, q in zip(weights(run.model), weights(model), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9 if "Look" in method else 1e-10)
    assert 10 <= good < 17
    for name in ("ema", "mask"):
        for a, b in zip(remembered(run.opt, name).values(), remembered(opt, name).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize(("way", "count"), [("train_step", 1), ("train_step", 3), ("closures", 3), ("parallel", 3)])
def test_a_first_direction_that_overflows_counts_nothing(way, count, base, backend):
    """Of LookSAM, where only the device knows: until the next SAM step those of the base optimizer are taken, all of them."""
    run, model = Run(methods.LookSAM(k=3), base, count, way, backend), mlp(F64)
    opt = MicroBatchSAM(BASES[base](model.parameters()), 0.1, num_micro_batches=count, backend=backend)
    opt.enabled = False
    assert not run.step(0, {0})
    run.opt.steps = 1
    for i in (1, 2):
        assert run.step(i)
        plain_step(model, opt, i)
        for p, q in zip(weights(run.model), weights(model), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    assert run.scaler.get_scale() == 2.0**10, "halved once, and doubled after two good steps"
    run.step(3)
    assert all(bool(v.any()) for v in remembered(run.opt, "v").values())


@pytest.mark.parametrize("way", ["passes", "train_step"])
@pytest.mark.parametrize("method", ["SAM", "ASAM", "F-SAM", "VaSSO", "LE-SAM", "Momentum-SAM"])
def test_norms_are_those_of_unscaled_gradients(method, way, backend):
    run, (model, opt) = Run(method, count=3, way=way, backend=backend), (mlp(F64), None)
    opt = MicroBatchSAM(BASES["SGD"](model.parameters()), 0.1, method=METHODS[method], num_micro_batches=3)
    for i in range(4):
        run.scaler.update(
            2.0 ** (5 * i) if way == "passes" else 3.0 ** (3 * i)
        )  # by others than two torch divides in fp32
        assert run.step(i)
        plain_step(model, opt, i)
        for name in ("grad_norm", "perturbation_norm"):
            torch.testing.assert_close(getattr(run.opt.stats, name), getattr(opt.stats, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["F-SAM", "VaSSO", "F-SAM + Sparse + Stable"])
def test_what_is_remembered_is_saved_without_the_scale_and_bits_do_not_depend_on_who_looks(method, backend):
    """Also where training goes on without a scaler, or with another scale."""
    straight, looked = (Run(method, count=2, backend=backend) for _ in range(2))
    for i in range(4):
        straight.step(i), looked.step(i)
        saved = copy.deepcopy(looked.opt.state_dict())
    model = mlp(F64)
    opt = MicroBatchSAM(BASES["SGD"](model.parameters()), 0.1, method=METHODS[method], num_micro_batches=2)
    for i in range(4):
        plain_step(model, opt, i)
    for a, b in zip(remembered(saved, "ema").values(), remembered(opt, "ema").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert same_bits(weights(straight.model), weights(looked.model))

    resumed = Run(method, count=2, backend=backend, seed=5)
    resumed.model.load_state_dict(looked.model.state_dict())
    resumed.opt.load_state_dict(saved)
    resumed.scaler.load_state_dict(looked.scaler.state_dict())
    for i in range(4, 7):
        straight.step(i), resumed.step(i)
    assert same_bits(weights(straight.model), weights(resumed.model))
    plain_step(straight.model, straight.opt, 7)
    for i in range(4, 8):
        plain_step(model, opt, i)
    for p, q in zip(weights(straight.model), weights(model), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def look_in_passes(run, look, i, bad):
    """A step of ``run``, in which somebody looks at what is remembered."""
    opt, scaler = run.opt, run.scaler
    for seen, part in enumerate(opt.passes(*batch(6, F64, seed=i), scaler=scaler)):
        loss = loss_of(run.model, *part) * (math.inf if bad and seen == 3 else 1.0)
        if look == "in every pass" or (look == "at w" and opt.pass_index == 0):
            _ = opt.state
        scaler.scale(loss).backward()
        if look == "after backward":
            _ = opt.state
    if look == "after the loop":
        opt.state_dict()
    scaler.step(opt)
    scaler.update()
    if look == "after the step":
        opt.base_optimizer.state_dict()
    opt.zero_grad()


@pytest.mark.parametrize("look", ["in every pass", "at w", "after backward", "after the loop", "after the step"])
@pytest.mark.parametrize("method", ["F-SAM", METHODS["F-SAM"] + METHODS["Bilateral SAM"]], ids=["F-SAM", "two-sided"])
def test_a_look_at_any_time_changes_nothing(method, look, backend):
    """What is remembered is then in units of the loss, and has to be in those of the scale again; steps are skipped too."""
    watched, alone = (Run(method, count=2, backend=backend) for _ in range(2))
    for i in range(5):
        look_in_passes(watched, look, i, bad=i == 2)
        look_in_passes(alone, None, i, bad=i == 2)
        assert same_bits(weights(watched.model), weights(alone.model)), f"step {i}"
        assert same_bits(watched.everything(), alone.everything()), f"step {i}"


@pytest.mark.parametrize("where", ["loss_fn", "before_update"])
@pytest.mark.parametrize("way", ["train_step", "parallel"])
def test_a_look_inside_a_whole_step_changes_nothing(way, where, backend):
    runs = [Run("F-SAM", count=2, way=way, backend=backend) for _ in range(2)]
    for i in range(5):
        for run in runs:
            calls = []

            def look(at, run=run):
                if run is runs[0] and at == where:
                    _ = run.opt.state

            def loss(x, y, run=run, i=i, calls=calls, look=look):
                look("loss_fn")
                calls.append(1)
                return loss_of(run.model, x, y) * (math.inf if i == 2 and len(calls) == 2 else 1.0)

            run.opt.train_step(
                loss, *batch(6, F64, seed=i), scaler=run.scaler, before_update=lambda look=look: look("before_update")
            )
            run.scaler.update()
        assert same_bits(*(run.everything() for run in runs)), f"step {i}"


@pytest.mark.parametrize("taken", [True, False], ids=["a step that is taken", "a step that is skipped"])
def test_a_model_that_is_converted_after_a_loop_keeps_what_the_step_leaves(taken, backend):
    """Converted before the gradients are cleared, so that what is kept moves before anybody knows that they are."""
    run, other = (Run("F-SAM", backend=backend) for _ in range(2))
    for i in range(3):
        look_in_passes(run, None, i, bad=False)
        look_in_passes(other, None, i, bad=False)
    for part in run.opt.passes(*batch(6, F64, seed=3), scaler=run.scaler):
        run.scaler.scale(loss_of(run.model, *part)).backward()
    if taken:
        run.model.float()
        run.scaler.step(run.opt)
        run.scaler.update()
        run.opt.zero_grad()
        look_in_passes(other, None, 3, bad=False)
        other.model.float()
    else:
        run.model.float()
        run.model.zero_grad()
        other.model.float()
    for r in (run, other):
        for part in r.opt.passes(*(t.float() for t in batch(6, F64, seed=4)), scaler=r.scaler):
            r.scaler.scale(loss_of(r.model, *part)).backward()
    for a, b in zip(*(remembered(r.opt, "ema").values() for r in (run, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert run.opt.engine.undo is not None


@pytest.mark.parametrize("drop", ["before the loop", "in the loop"])
def test_a_run_that_is_resumed_after_a_skipped_step_rounds_alike(drop):
    def run(resumed):
        model = mlp(torch.bfloat16)
        opt = new(model)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
        for i in range(4):
            if resumed and i == 2:
                saved, weights_ = opt.state_dict(), model.state_dict()
                model = mlp(torch.bfloat16, seed=1)
                model.load_state_dict(weights_)
                opt = new(model)
                opt.load_state_dict(saved)
            for part in opt.passes(*batch(6, torch.bfloat16, seed=i), scaler=scaler):
                if drop == "in the loop":
                    opt.zero_grad()
                scaler.scale(loss_of(model, *part) * (math.inf if i == 1 else 1.0)).backward()
            scaler.step(opt)
            scaler.update()
            if drop == "before the loop":
                opt.zero_grad()
        return weights(model)

    def new(model):
        return MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.05, rounding="stochastic", seed=1)

    assert same_bits(run(False), run(True))


def test_a_scaler_may_step_the_base_optimizer(backend):
    """A loop's step that the base takes is one, and what the loop moved stays."""
    means, runs = [], []
    for through_base in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3, dtype=F64)
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        opt = MicroBatchSAM(base, 0.05, method=METHODS["F-SAM"], backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for x in opt.passes(torch.randn(4, 5, dtype=F64, generator=generator), scaler=scaler):
                scaler.scale(model(x).square().mean()).backward()
            scaler.step(base if through_base else opt)
            scaler.update()
            opt.zero_grad()
        assert opt.steps == 3
        means.append(remembered(opt, "ema")[0])
        runs.append(model.weight.detach())
    torch.testing.assert_close(*means, rtol=1e-12, atol=1e-14)  # torch's own step rounds otherwise
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("drop", ["the optimizer's zero_grad", "the model's zero_grad", "zeros"])
def test_a_skipped_loop_is_told_from_one_that_is_accumulated(drop, backend):
    """Two loops a step: the second adds to the first. Where the step was skipped, both are forgotten."""
    run, model = Run("F-SAM", backend=backend), mlp(F64)
    opt = MicroBatchSAM(BASES["SGD"](model.parameters()), 0.1, method=METHODS["F-SAM"], backend=backend)
    for i in range(6):
        x, y = batch(6, F64, seed=i)
        for half, bad in ((0, False), (1, i in (1, 3))):
            for part in run.opt.passes(x[half::2], y[half::2], scaler=run.scaler):
                run.scaler.scale(loss_of(run.model, *part) * (math.inf if bad and run.opt.pass_index else 1)).backward()
            for part in () if i in (1, 3) else opt.passes(x[half::2], y[half::2]):
                loss_of(model, *part).backward()
        run.scaler.step(run.opt)
        run.scaler.update()
        if i not in (1, 3):
            opt.step()
        for m, o in ((run.model, run.opt), (model, opt)):
            if drop == "the model's zero_grad":
                m.zero_grad()
            else:
                o.zero_grad(set_to_none=drop != "zeros")
        for p, q in zip(weights(run.model), weights(model), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_a_loop_without_any_scaled_loss_says_so_and_changes_nothing(backend):
    run = Run("F-SAM", backend=backend)
    before = weights(run.model)
    with pytest.raises(RuntimeError, match=r"no loss was scaled: scaler\.scale\(loss\)\.backward\(\)"):
        for part in run.opt.passes(*batch(6, F64), scaler=torch.amp.GradScaler(DEVICE.type)):
            loss_of(run.model, *part).backward()
    assert same_bits(weights(run.model), before)
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler, got int"):
        run.opt.passes(*batch(6, F64), scaler=1)
    off = torch.amp.GradScaler(DEVICE.type, enabled=False)
    for part in run.opt.passes(*batch(6, F64), scaler=off):
        loss_of(run.model, *part).backward()
    with pytest.raises(ValueError, match=r"scaler=\.\.\.\) is for closures; .* call scaler\.step\(opt\)"):
        run.opt.step(scaler=run.scaler)
    assert run.opt.stats.grad_norm > 0


# ---- max_grad_norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "scaled"),
    [
        pytest.param(0.05, True, id="clips"),
        pytest.param(0.05, False, id="clips what is not scaled", marks=pytest.mark.exhaustive),
        pytest.param(1e3, True, id="is long", marks=pytest.mark.exhaustive),
        pytest.param(1e3, False, id="is long, and nothing is scaled", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize(
    ("method", "base", "count", "way"),
    rows(lambda method, base, count, way: way == "train_step" and base == "SGD" and (count == 3 or method == "SAM")),
)
def test_max_grad_norm_is_clipping_before_the_update(method, base, count, way, limit, scaled, backend):
    if way == "passes" and scaled and base == "RMSprop":
        pytest.skip("scaler.step")
    run = Run(method, base, count, way, backend, clip=limit)
    run.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, enabled=scaled)
    model = mlp(F64)
    opt = MicroBatchSAM(BASES[base](model.parameters()), 0.1, method=METHODS[method], num_micro_batches=count)
    for i in range(4):
        assert run.step(i)
        plain_step(model, opt, i, clip=limit)
        for p, q in zip(weights(run.model), weights(model), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
        assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("limit", [0.05, 1e3], ids=["clips", "is long"])
@pytest.mark.parametrize("base", BASES)
def test_max_grad_norm_of_a_step_after_a_loop(base, limit, backend):
    models = [mlp(F64), mlp(F64)]
    opts = [MicroBatchSAM(BASES[base](m.parameters()), 0.1, num_micro_batches=2, backend=backend) for m in models]
    for i in range(4):
        for model, opt in zip(models, opts, strict=True):
            for part in opt.passes(*batch(6, F64, seed=i)):
                loss_of(model, *part).backward()
        opts[0].step(max_grad_norm=limit)
        clip_grad_norm_(models[1].parameters(), limit)
        opts[1].step()
        for opt in opts:
            opt.zero_grad()
        for p, q in zip(weights(models[0]), weights(models[1]), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_max_grad_norm_comes_before_what_the_user_does(backend):
    model = mlp(F64)
    opt = MicroBatchSAM(BASES["SGD"](model.parameters()), 0.1, num_micro_batches=2, backend=backend)
    seen = []
    opt.train_step(
        lambda x, y: loss_of(model, x, y),
        *batch(6, F64),
        max_grad_norm=0.05,
        before_update=lambda: seen.append(clip_grad_norm_(model.parameters(), 1.0)),
    )
    torch.testing.assert_close(seen[0], torch.tensor(0.05, dtype=F64), rtol=1e-4, atol=0, check_device=False)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, "1"])
def test_a_wrong_max_grad_norm_is_refused(limit):
    model = mlp(F64)
    opt = MicroBatchSAM(BASES["SGD"](model.parameters()), 0.1)
    before = weights(model)
    with pytest.raises(ValueError, match=r"max_grad_norm must be a finite number > 0"):
        opt.train_step(lambda x, y: loss_of(model, x, y), *batch(6, F64), max_grad_norm=limit)
    assert same_bits(weights(model), before)


def test_a_gradient_that_is_not_finite_is_not_clipped_into_one_that_is(backend):
    model = mlp(F64)
    opt = MicroBatchSAM(BASES["SGD"](model.parameters()), 0.1, backend=backend)
    opt.train_step(lambda x, y: loss_of(model, x, y) * math.inf, *batch(6, F64), max_grad_norm=1.0)
    assert all(p.isnan().all() for p in model.parameters())


def test_the_drop_in_takes_both_where_its_closure_runs_twice():
    results = []
    for scaled in (False, True):
        model = mlp(F64)
        opt = msam_kernels.SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
        scaler = torch.amp.GradScaler(DEVICE.type, enabled=scaled)

        def closure(model=model, scaler=scaler):
            scaler.scale(loss_of(model, *batch(6, F64))).backward()

        opt.step(closure, scaler=scaler, max_grad_norm=0.05)
        scaler.update()
        results.append(weights(model))
        loss_of(model, *batch(6, F64)).backward()
        with pytest.raises(ValueError, match=r"p\.grad has gradients of this step"):
            opt.step(closure, max_grad_norm=0.05)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
