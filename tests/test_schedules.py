# SPDX-License-Identifier: Apache-2.0
"""When a method is at work and how far it goes: ``start``, ``every``, ``opt.enabled``, and rho as a function of the step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.optim import SGD, AdamW, lr_scheduler

import msam_kernels
from msam_kernels import MicroBatchSAM, methods
from msam_kernels.methods import BASE
from plain import batch, closure_of, gradients, loss_of, mlp, same_bits, split, weights

BASES = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, dampening=0.1),
    "AdamW": lambda params: AdamW(params, lr=0.01),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}
METHODS = {
    "SAM": methods.SAM,
    "ASAM": methods.AdaptiveSAM,
    "F-SAM": methods.FriendlySAM,
    "Stable SAM": methods.StableSAM,
    "GSAM": methods.GapSAM,
    "Sparse SAM": methods.SparseSAM,
    "VaSSO": methods.VaSSO,
    "WSAM": methods.WSAM,
}
COUNT = 3


class Counted:
    """A model and its optimizer; how often the body of a step ran."""

    def __init__(self, base="SGD", **options):
        self.model, self.calls = mlp(), 0
        self.opt = MicroBatchSAM(BASES[base](self.model.parameters()), num_micro_batches=COUNT, **options)

    def loss(self, x, y):
        self.calls += 1
        return loss_of(self.model, x, y)

    def with_passes(self, data):
        for part in self.opt.passes(*data):
            self.loss(*part).backward()
        self.opt.step()
        self.opt.zero_grad()

    def with_closures(self, data):
        parts = split(data, [3, 2, 2])

        def closure(part):
            loss = self.loss(*part)
            loss.backward()
            return loss

        self.opt.step([lambda part=part: closure(part) for part in parts])

    def with_train_step(self, data):
        self.opt.train_step(self.loss, *data)

    def step(self, way, data):
        before = self.calls
        getattr(self, "with_" + way)(data)
        return self.calls - before


each_way = pytest.mark.parametrize("way", ["passes", "closures", "train_step"])
each_method = pytest.mark.parametrize("method", METHODS)
each_base = pytest.mark.parametrize("base", BASES)


@each_way
@each_method
def test_a_late_method_takes_one_pass_per_micro_batch_until_it_starts(method, way, backend):
    run = Counted(method=METHODS[method](start=2), backend=backend)
    assert [run.step(way, batch()) for _ in range(4)] == [COUNT, COUNT, 2 * COUNT, 2 * COUNT]
    assert run.opt.steps == 4


@each_way
@each_base
def test_before_its_start_a_method_is_the_base_optimizer_bit_for_bit(base, way, backend):
    run = Counted(base, method=methods.SAM(start=10**6), backend=backend)
    zero = Counted(base, rho=0.0, backend=backend)  # perturbs by nothing: the same kernels, both passes alike
    for seed in range(3):
        run.step(way, batch(seed=seed))
        zero.step(way, batch(seed=seed))
    assert same_bits(run.model.parameters(), zero.model.parameters())
    with pytest.raises(RuntimeError, match="stats are there after the first pass of a step that perturbs"):
        _ = run.opt.stats


@each_way
@each_base
@each_method
def test_the_base_state_carries_over_the_start(method, base, way, backend):
    late = Counted(base, method=METHODS[method](start=2), backend=backend)
    by_hand = Counted(base, method=METHODS[method](), backend=backend)
    by_hand.opt.enabled = False
    for seed in range(5):
        if seed == 2:
            by_hand.opt.enabled = True
        assert late.step(way, batch(seed=seed)) == by_hand.step(way, batch(seed=seed))
    assert same_bits(late.model.parameters(), by_hand.model.parameters())


@each_way
@each_method
def test_training_resumes_across_the_start(method, way, backend):
    options = {"method": METHODS[method](start=3), "backend": backend}
    straight = Counted("AdamW", **options)
    for seed in range(6):
        straight.step(way, batch(seed=seed))
    first = Counted("AdamW", **options)
    for seed in range(2):
        first.step(way, batch(seed=seed))
    saved = copy.deepcopy((first.model.state_dict(), first.opt.state_dict()))
    second = Counted("AdamW", **options)
    second.model.load_state_dict(saved[0])
    second.opt.load_state_dict(saved[1])
    assert second.opt.steps == 2
    assert [second.step(way, batch(seed=seed)) for seed in range(2, 6)] == [COUNT, 2 * COUNT, 2 * COUNT, 2 * COUNT]
    assert same_bits(second.model.parameters(), straight.model.parameters())


def test_gradients_of_several_loops_add_up_without_perturbation_too(backend):
    run = Counted(method=methods.SAM(start=5), backend=backend)
    data = batch(6)
    loss_of(run.model, *data).backward()
    expected = gradients(run.model)
    run.opt.zero_grad()
    for _ in range(2):
        for part in run.opt.passes(*data):
            run.loss(*part).backward()
    for g, e in zip(gradients(run.model), expected, strict=True):
        torch.testing.assert_close(g, 2 * e)
    assert run.opt.steps == 0, "a step is an update, not a loop"


def test_the_drop_in_can_be_switched_off():
    model, plain = mlp(), mlp()
    opt = msam_kernels.SAM(model.parameters(), SGD, rho=0.5, lr=0.1, momentum=0.9)
    base = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    opt.enabled = False
    for seed in range(3):
        loss_of(model, *batch(seed=seed)).backward()
        opt.first_step(zero_grad=True)
        loss_of(model, *batch(seed=seed)).backward()
        opt.second_step(zero_grad=True)
        base.zero_grad()
        loss_of(plain, *batch(seed=seed)).backward()
        base.step()
        opt.step(closure_of(model, batch(seed=9)))
        base.zero_grad()
        loss_of(plain, *batch(seed=9)).backward()
        base.step()
    assert opt.steps == 6
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected)


# ---- rho -------------------------------------------------------------------------------------------------------------


@each_way
def test_rho_may_be_a_function_of_the_step(way, backend):
    run = Counted(rho=lambda step: 0.1 * (step + 1), backend=backend)
    by_hand = Counted(rho=0.1, backend=backend)
    for step in range(4):
        by_hand.opt.param_groups[0]["rho"] = 0.1 * (step + 1)
        run.step(way, batch(seed=step))
        by_hand.step(way, batch(seed=step))
        assert run.opt.param_groups[0]["rho"] == 0.1 * (step + 1)
    assert same_bits(run.model.parameters(), by_hand.model.parameters())


@pytest.mark.parametrize(
    "look", [lambda opt: opt.state_dict(), copy.deepcopy, lambda opt: None], ids=["saved", "copied", "-"]
)
def test_a_schedule_counts_that_begins_with_the_very_number_of_before(look):
    counted, rho = Counted(), 0.05
    for group in counted.opt.param_groups:
        group["rho"] = rho
    counted.with_passes(batch(7))
    for group in counted.opt.param_groups:
        group["rho"] = lambda steps: rho if steps < 2 else 1.0
    look(counted.opt)
    found = []
    for seed in range(3):
        counted.with_passes(batch(7, seed=seed))
        found.append(counted.opt.param_groups[0]["rho"])
    assert found == [0.05, 1.0, 1.0]


def test_rho_may_follow_the_learning_rate(backend):
    model = mlp()
    base = SGD(model.parameters(), lr=0.1)
    opt = MicroBatchSAM(base, rho=lambda step: 0.5 * base.param_groups[0]["lr"], backend=backend)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    for step in range(4):
        opt.train_step(lambda x, y: loss_of(model, x, y), *batch())
        torch.testing.assert_close(opt.stats.perturbation_norm.item(), 0.05 * 0.5**step, rtol=1e-4, atol=0)
        scheduler.step()


def test_a_group_may_have_a_function_of_its_own(backend):
    model = mlp()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    base = SGD([{"params": first, "rho": lambda step: 0.1 + step}, {"params": second}], lr=0.1)
    opt = MicroBatchSAM(base, rho=0.05, backend=backend)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "rho": lambda step: 7.0})
    for step in range(3):
        opt.train_step(lambda x, y: loss_of(model, x, y), *batch())
        assert [g["rho"] for g in opt.param_groups] == [0.1 + step, 0.05, 7.0]


def test_a_function_survives_copies_and_resumes_at_its_step(backend):
    def rho(step):
        return 0.1 / (1 + step)

    run = Counted(rho=rho, backend=backend)
    for _ in range(2):
        run.step("train_step", batch())
    saved = copy.deepcopy(run.opt.state_dict())
    assert all(not callable(v) for group in saved["param_groups"] for v in group.values())
    other = Counted(rho=rho, backend=backend)
    other.opt.load_state_dict(saved)
    other.step("train_step", batch())
    assert other.opt.param_groups[0]["rho"] == 0.1 / 3
    twin = copy.deepcopy(run)
    twin.step("train_step", batch())
    assert twin.opt.param_groups[0]["rho"] == 0.1 / 3


def test_what_is_put_into_a_group_later_takes_the_place_of_its_function(backend):
    run = Counted(rho=lambda step: 0.1 * (step + 1), backend=backend)

    def taken(run=run) -> float:
        run.step("train_step", batch())
        achieved, rho = run.opt.stats.perturbation_norm, run.opt.param_groups[0]["rho"]
        torch.testing.assert_close(achieved, torch.full_like(achieved, rho), rtol=1e-4, atol=0)
        return rho

    assert taken() == 0.1
    run.opt.param_groups[0]["rho"] = 0.03
    assert [taken(), taken()] == [0.03, 0.03]
    run.opt.param_groups[0]["rho"] = lambda step: 0.01 * step
    assert [taken(), taken()] == [0.01 * 3, 0.01 * 4]
    run.opt.load_state_dict(Counted(rho=7.0, backend=backend).opt.state_dict())  # brings the number of steps, not rho
    assert [taken(), taken()] == [0.0, 0.01]
    assert taken(copy.deepcopy(run)) == taken() == 0.02
    run.opt.param_groups[0]["rho"] = lambda step: 0.2 + step
    assert run.opt.state_dict()["param_groups"][0]["rho"] == 3.2
    run.opt.param_groups[0]["rho"] = lambda step: 0.3 + step
    run.opt.load_state_dict(Counted(rho=7.0, backend=backend).opt.state_dict())
    assert taken() == 0.3


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "large"])
def test_a_function_that_goes_wrong_is_refused_before_anything_changes(value, backend):
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, got"):
        Counted(rho=lambda step: value, backend=backend)
    run = Counted(rho=lambda step: value if step else 0.1, backend=backend)
    run.step("train_step", batch())
    before = weights(run.model)
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, got"):
        run.step("train_step", batch())
    assert same_bits(run.model.parameters(), before)
    assert run.opt.steps == 1
    assert run.opt.param_groups[0]["rho"] == 0.1


@pytest.mark.parametrize("start", [-1, 1.5, True, None])
@each_method
def test_a_start_that_is_no_number_of_steps_is_refused(method, start):
    with pytest.raises(ValueError, match="start must be an integer >= 0, got"):
        METHODS[method](start=start)


# ---- every -----------------------------------------------------------------------------------------------------------


@each_way
@each_method
def test_every_kth_step_is_the_methods_and_the_others_the_base_optimizers(method, way, backend):
    interval = Counted(method=METHODS[method](every=3, start=1), backend=backend)
    by_hand = Counted(method=METHODS[method](), backend=backend)
    for step in range(7):
        by_hand.opt.enabled = step in (1, 4)
        taken = interval.step(way, batch(seed=step))
        assert taken == by_hand.step(way, batch(seed=step)) == COUNT * (2 if step in (1, 4) else 1)
    assert same_bits(interval.model.parameters(), by_hand.model.parameters())


@each_way
def test_looksam_counts_its_own_steps_where_it_has_an_interval(way, backend):
    run = Counted(method=methods.LookSAM(k=2, every=3), backend=backend)
    plans = [run.opt.method.plan(step, lambda: True) for step in range(7)]
    assert plans == [run.opt.method.full, BASE, BASE, run.opt.method.between, BASE, BASE, run.opt.method.full]
    expected = [2 * COUNT, *[COUNT] * 5, 2 * COUNT]
    assert [run.step(way, batch(seed=seed)) for seed in range(7)] == expected


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_training_resumes_in_the_midst_of_an_interval(steps, backend):
    options = {"method": methods.FriendlySAM(every=3), "backend": backend}
    whole, first = Counted(**options), Counted(**options)
    for seed in range(6):
        whole.step("train_step", batch(seed=seed))
    for seed in range(steps):
        first.step("train_step", batch(seed=seed))
    second = Counted(**options)
    second.model.load_state_dict(first.model.state_dict())
    second.opt.load_state_dict(first.opt.state_dict())
    for seed in range(steps, 6):
        second.step("train_step", batch(seed=seed))
    assert same_bits(whole.model.parameters(), second.model.parameters())


def test_intervals_compose():
    method = methods.FriendlySAM() + methods.SAM(every=4, start=2) + methods.StableSAM()
    assert (method.every, method.start) == (4, 2)
    assert [part.every for part in method.parts] == [1, 1]
    assert repr(method).endswith("StableSAM(start=0, every=1, only=None) from step 2 every 4 steps")
    with pytest.raises(ValueError, match="different intervals: give one every, to either"):
        methods.FriendlySAM(every=2) + methods.StableSAM(every=3)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
@each_method
def test_an_interval_that_is_no_number_of_steps_is_refused(method, every):
    with pytest.raises(ValueError, match="every must be an integer >= 1, got"):
        METHODS[method](every=every)


# ---- passes ----------------------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_looksam_takes_one_pass_more_every_kth_step(k, way, backend):
    run = Counted(method=methods.LookSAM(k=k), backend=backend)
    taken = [run.step(way, batch(seed=seed)) for seed in range(2 * k)]
    assert taken == 2 * [2 * COUNT, *[COUNT] * (k - 1)]
    assert sum(taken) == 2 * k * COUNT * (1 + 1 / k)


@each_way
def test_looksam_counts_from_its_start(way, backend):
    run = Counted(method=methods.LookSAM(k=3, start=2), backend=backend)
    expected = [COUNT, COUNT, 2 * COUNT, COUNT, COUNT, 2 * COUNT, COUNT]
    assert [run.step(way, batch(seed=seed)) for seed in range(7)] == expected


@each_way
@pytest.mark.parametrize("other", [None, methods.StableSAM(), methods.FriendlySAM()], ids=["alone", "Stable", "F-SAM"])
def test_bilateral_sam_takes_three_passes(other, way, backend):
    method = methods.BilateralSAM(start=1)
    run = Counted(method=method if other is None else method + other, backend=backend)
    assert [run.step(way, batch(seed=seed)) for seed in range(3)] == [COUNT, 3 * COUNT, 3 * COUNT]


# k and alpha, when the method is enabled, and the passes that follow
SWITCHED = {
    "off between": ((2, 0.5), [1, 0, 1, 1], [2, 1, 2, 1]),
    "off in the step that perturbs, v is the last one": ((2, 0.5), [1, 1, 0, 1], [2, 1, 1, 1]),
    "off at first: there is no v to use": ((3, 0.5), [0, 1, 1, 1, 1], [1, 2, 1, 2, 1]),
    "off at first, and none is needed": ((3, 0.0), [0, 1, 1, 1, 1], [1, 1, 1, 2, 1]),
}


@each_way
@pytest.mark.parametrize("case", SWITCHED)
def test_looksam_can_be_switched_off_and_on(case, way, backend):
    (k, alpha), enabled, expected = SWITCHED[case]
    run = Counted(method=methods.LookSAM(k=k, alpha=alpha), backend=backend)
    for step, (on, count) in enumerate(zip(enabled, expected, strict=True)):
        run.opt.enabled = bool(on)
        model, base = copy.deepcopy((run.model, run.opt.base_optimizer))
        assert run.step(way, batch(seed=step)) == count * COUNT
        if on:
            continue
        sizes = [3, 2, 2]
        shares = [1 / 3] * 3 if way == "closures" else [n / 7 for n in sizes]
        for part, share in zip(split(batch(seed=step), sizes), shares, strict=True):
            (share * loss_of(model, *part)).backward()
        base.step()
        for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q)


# ---- rho_min ---------------------------------------------------------------------------------------------------------


def test_rho_min_may_be_a_function_of_the_step(backend):
    model = mlp(torch.float64)
    method = methods.BilateralSAM(rho_min=lambda step: 0.1 / (1 + step)) + methods.FriendlySAM(sigma=0.0)
    base = SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.0}], lr=0.1)
    opt = MicroBatchSAM(base, rho=lambda step: 0.2 + step, method=method, backend=backend)
    for step in range(4):
        before = torch.cat([p.view(-1) for p in weights(model)])
        moved = []
        for part in opt.passes(*batch(dtype=torch.float64)):
            loss_of(model, *part).backward()
            moved.append(torch.cat([p.view(-1) for p in weights(model)]) - before)
        assert not moved[0].any()
        torch.testing.assert_close(moved[2] / (0.1 / (1 + step)), -moved[1] / (0.2 + step), rtol=1e-9, atol=1e-12)
        assert moved[1][:20].all()
        assert not moved[1][20:].any(), "a group whose rho is 0"
        assert not moved[2][20:].any()
        opt.step()
        opt.zero_grad()


@each_way
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "large", None])
def test_a_rho_min_that_goes_wrong_is_refused_before_anything_changes(value, way, backend):
    method = methods.BilateralSAM(rho_min=lambda step: value if step == 2 else 0.1)
    run = Counted(method=method, backend=backend)
    for _ in range(2):
        run.step(way, batch())
    before, state = weights(run.model), copy.deepcopy(run.opt.state_dict())
    with pytest.raises(ValueError, match="rho_min must be a finite number >= 0, got"):
        run.step(way, batch())
    assert same_bits(run.model.parameters(), before)
    assert run.opt.steps == 2
    now = run.opt.state_dict()
    assert now["param_groups"] == state["param_groups"]
    for i, entry in state["state"].items():
        assert same_bits([now["state"][i]["momentum_buffer"]], [entry["momentum_buffer"]])
    run.opt.enabled = False
    run.opt.steps = 3
    run.step(way, batch())


# ---- sigma of LE-SAM -------------------------------------------------------------------------------------------------


def test_the_budget_may_be_a_function_of_the_step(backend):
    """The length of e is sigma / ‖g‖ where that is less than the group's rho."""
    model = mlp(torch.float64)
    method = methods.LossEquatedSAM(sigma=lambda step: 0.1 * step)
    base = SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.01}], lr=0.1)
    opt = MicroBatchSAM(base, rho=100.0, method=method, backend=backend)
    for step in range(4):
        before = torch.cat([p.view(-1) for p in weights(model)])
        for part in opt.passes(*batch(dtype=torch.float64)):
            e = torch.cat([p.view(-1) for p in weights(model)]) - before
            loss_of(model, *part).backward()
            if not opt.pass_index:
                g = torch.cat([p.grad.view(-1) for p in model.parameters()])
        for entries, rho in ((slice(0, 20), 100.0), (slice(20, None), 0.01)):
            expected = min(0.1 * step / g.norm().item(), rho) * g[entries] / g.norm()
            torch.testing.assert_close(e[entries], expected, rtol=1e-9, atol=1e-14)
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "large", None])
def test_a_budget_that_goes_wrong_is_refused_before_anything_changes(value, backend):
    method = methods.LossEquatedSAM(sigma=lambda step: value if step == 2 else 0.1)
    run = Counted(method=method, backend=backend)
    for _ in range(2):
        run.step("passes", batch())
    before = weights(run.model)
    with pytest.raises(ValueError, match="sigma must be a finite number >= 0, got"):
        run.step("passes", batch())
    assert same_bits(run.model.parameters(), before)
    assert run.opt.steps == 2


@pytest.mark.parametrize("bad", [math.inf, 1.0], ids=["overflow", "skipped"])
def test_looksam_forgets_a_direction_whose_gradients_were_zeroed(bad, backend):
    run, plain = (Counted(method=methods.LookSAM(k=2), backend=backend) for _ in range(2))
    for part in run.opt.passes(*batch()):
        (run.loss(*part) * bad).backward()
    run.opt.zero_grad(set_to_none=False)  # a step that GradScaler skips; its gradients stay, as zeros
    for seed in range(2):
        run.with_passes(batch(seed=seed))
        plain.with_passes(batch(seed=seed))
    assert same_bits(run.model.parameters(), plain.model.parameters())
