# SPDX-License-Identifier: Apache-2.0
"""``SAM``, the drop-in: what a training loop written for the most copied implementation does, it does here."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

import msam_kernels
from msam_kernels import SAM, MicroBatchSAM, methods
from msam_kernels.compat import FriendlySAM
from plain import (
    METHODS,
    Zoo,
    assert_close,
    batch,
    closure_of,
    gradients,
    images,
    loss_of,
    mlp,
    same_bits,
    through_a_file,
    weights,
)

FLOAT64 = torch.float64


class LoopSAM(torch.optim.Optimizer):
    """The interface's own meaning, in plain loops: e is added, saved weights come back, the base optimizer steps."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, friendly=None, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.friendly = friendly  # sigma and lmbda of F-SAM

    def _each(self):
        return [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        for _, p in self._each() if self.friendly else ():
            sigma, lmbda = self.friendly
            g, mean = p.grad, self.state[p].get("momentum")
            p.grad = g if mean is None else g - sigma * mean
            self.state[p]["momentum"] = g.clone() if mean is None else lmbda * mean + (1 - lmbda) * g
        parts = [((p.abs() if g["adaptive"] else 1.0) * p.grad).norm() for g, p in self._each()]
        norm = torch.stack(parts).norm()
        for g in self.param_groups:
            for p in g["params"]:
                self.state[p]["old_p"] = p.clone()
        for g, p in self._each():
            p += (p.square() if g["adaptive"] else 1.0) * p.grad * (g["rho"] / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p, kept in self.state.items():
            p.copy_(kept["old_p"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


BASES = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01}),
    "AdamW amsgrad": (AdamW, {"lr": 0.01, "amsgrad": True}),
    "RMSprop": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "Adagrad": (Adagrad, {"lr": 0.1}),
}


def pair(base, adaptive=False, rho=0.1, model=None):
    expected = model or mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    kind, settings = BASES[base]

    def groups(m):
        return m.groups() if isinstance(m, Zoo) else m.parameters()

    theirs = LoopSAM(groups(expected), kind, rho=rho, adaptive=adaptive, **settings)
    ours = SAM(groups(actual), kind, rho=rho, adaptive=adaptive, **settings)
    return actual, ours, expected, theirs


def two_steps(opt, model, data, zero_grad=(True, True)):
    for step, zero in zip((opt.first_step, opt.second_step), zero_grad, strict=True):
        loss_of(model, *data).backward()
        step(zero_grad=zero)


def one_step(opt, model, data):
    loss_of(model, *data).backward()
    opt.step(closure_of(model, data))
    opt.zero_grad()


@pytest.mark.parametrize("way", [two_steps, one_step], ids=["first_step and second_step", "step with a closure"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("base", BASES)
def test_it_follows_the_plain_loops(base, adaptive, way):
    actual, ours, expected, theirs = pair(base, adaptive)
    for step in range(5):
        data = batch(dtype=FLOAT64, seed=step)
        way(ours, actual, data)
        way(theirs, expected, data)
        assert_close(actual, expected)


@pytest.mark.parametrize(
    "uses",
    [
        lambda call: True,
        lambda call: call % 2 == 0,
        lambda call: call % 2 == 1,
        lambda call: call >= 4,
        lambda call: call % 3 == 0,
    ],
    ids=["always", "first pass only", "second pass only", "from the third step on", "now and then"],
)
@pytest.mark.parametrize("way", [two_steps, one_step], ids=["first_step and second_step", "step with a closure"])
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW amsgrad", "RMSprop"])
def test_parameters_of_every_kind_follow_the_plain_loops(base, way, uses):
    actual, ours, expected, theirs = pair(base, model=Zoo(uses=uses))
    for step in range(4):
        data = images(4, seed=step)
        way(ours, actual, data)
        way(theirs, expected, data)
        assert_close(actual, expected)


@pytest.mark.parametrize("zero_grad", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_the_zero_grad_flags_decide_what_stays(zero_grad):
    actual, ours, expected, theirs = pair("SGD momentum")
    for step in range(3):
        data = batch(dtype=FLOAT64, seed=step)
        two_steps(ours, actual, data, zero_grad)
        two_steps(theirs, expected, data, zero_grad)
        assert_close(actual, expected)
        for a, b in zip(gradients(actual), gradients(expected), strict=True):
            assert (a is None) == (b is None) == zero_grad[1]
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_step_returns_what_the_closure_returned_and_leaves_its_gradient():
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    loss_of(model, *batch()).backward()
    values = []

    def closure():
        loss = closure_of(model, batch())()
        values.append((loss, gradients(model)))
        return loss

    assert opt.step(closure) is values[0][0]
    assert len(values) == 1, "the first gradient is in p.grad already"
    assert same_bits(gradients(model), values[0][1])


def test_groups_have_settings_of_their_own():
    expected, actual = mlp(FLOAT64), mlp(FLOAT64)

    def groups(m):
        return [{"params": m[0].parameters(), "rho": 0.5, "lr": 0.2}, {"params": m[2].parameters(), "momentum": 0.0}]

    theirs = LoopSAM(groups(expected), SGD, rho=0.1, lr=0.1, momentum=0.9)
    ours = SAM(groups(actual), SGD, rho=0.1, lr=0.1, momentum=0.9)
    for step in range(3):
        two_steps(ours, actual, batch(dtype=FLOAT64, seed=step))
        two_steps(theirs, expected, batch(dtype=FLOAT64, seed=step))
    assert_close(actual, expected)
    assert [g["rho"] for g in ours.param_groups] == [0.5, 0.1]


def test_a_group_with_its_own_adaptive_is_honoured_or_refused():
    """In the copied implementation ``adaptive`` is a group setting; leaving it out without a word would be another method."""
    expected, actual = mlp(FLOAT64), mlp(FLOAT64)

    def groups(m):
        return [{"params": m[0].parameters(), "adaptive": True}, {"params": m[2].parameters()}]

    theirs = LoopSAM(groups(expected), SGD, rho=0.5, lr=0.1)
    try:
        ours = SAM(groups(actual), SGD, rho=0.5, lr=0.1)
    except ValueError as refusal:
        assert "adaptive" in str(refusal)
        return
    two_steps(ours, actual, batch(dtype=FLOAT64))
    two_steps(theirs, expected, batch(dtype=FLOAT64))
    assert_close(actual, expected)


def test_between_the_steps_the_weights_are_perturbed_and_clipping_acts_on_the_second_gradient():
    actual, ours, expected, theirs = pair("SGD momentum", rho=0.5)
    for opt, model in ((ours, actual), (theirs, expected)):
        before = weights(model)
        loss_of(model, *batch(dtype=FLOAT64)).backward()
        opt.first_step(zero_grad=True)
        moved = torch.cat([(p - b).detach().flatten() for p, b in zip(model.parameters(), before, strict=True)])
        torch.testing.assert_close(moved.norm().item(), 0.5)
        loss_of(model, *batch(dtype=FLOAT64)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        opt.second_step(zero_grad=True)
    assert_close(actual, expected)
    torch.testing.assert_close(ours.stats.perturbation_norm[0].item(), 0.5)


def test_gradient_accumulation_works_before_each_step():
    actual, ours, expected, theirs = pair("SGD momentum")
    for opt, model in ((ours, actual), (theirs, expected)):
        for step in (opt.first_step, opt.second_step):
            for seed in range(3):
                (loss_of(model, *batch(dtype=FLOAT64, seed=seed)) / 3).backward()
            step(zero_grad=True)
    assert_close(actual, expected)


def test_it_resumes_from_its_state_dict_bit_for_bit():
    straight = mlp()
    opt = SAM(straight.parameters(), AdamW, lr=0.01)
    for step in range(6):
        two_steps(opt, straight, batch(seed=step))
    model = mlp()
    first = SAM(model.parameters(), AdamW, lr=0.01)
    for step in range(3):
        two_steps(first, model, batch(seed=step))
    saved = through_a_file(first.state_dict())
    resumed = copy.deepcopy(model)
    second = SAM(resumed.parameters(), AdamW, lr=0.5)
    second.load_state_dict(saved)
    for step in range(3, 6):
        two_steps(second, resumed, batch(seed=step))
    assert same_bits(resumed.parameters(), straight.parameters())


def test_a_scheduler_reaches_the_base_optimizer():
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for step in range(3):
        one_step(opt, model, batch(seed=step))
        scheduler.step()
    assert opt.base_optimizer.param_groups[0]["lr"] == 0.1 / 8


@pytest.mark.parametrize("way", ["train_step", "step with a list"])
def test_everything_else_is_micro_batch_sam(way):
    model, other = mlp(), mlp()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9)
    theirs = MicroBatchSAM(SGD(other.parameters(), lr=0.1, momentum=0.9), rho=0.1)
    for step in range(3):
        data = batch(seed=step)
        theirs.train_step(lambda *part: loss_of(other, *part), *data)
        if way == "train_step":
            opt.train_step(lambda *part: loss_of(model, *part), *data)
        else:
            opt.step([closure_of(model, data)])
    assert same_bits(model.parameters(), other.parameters())


def test_it_is_an_optimizer_and_says_what_it_is():
    opt = SAM(mlp().parameters(), SGD, lr=0.1)
    assert isinstance(opt, torch.optim.Optimizer)
    assert repr(opt).startswith("SAM (") or repr(opt).startswith("SAM(")
    assert opt.param_groups is opt.base_optimizer.param_groups


# ---- methods and bases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW amsgrad", "RMSprop"])
def test_the_friendly_one_follows_the_plain_loops(base, adaptive):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    kind, settings = BASES[base]
    theirs = LoopSAM(expected.parameters(), kind, 0.2, adaptive, friendly=(0.8, 0.6), **settings)
    ours = FriendlySAM(actual.parameters(), kind, 0.2, 0.8, 0.6, adaptive, **settings)
    for step in range(5):
        data = batch(dtype=FLOAT64, seed=step)
        way = (two_steps, one_step)[step % 2]
        way(ours, actual, data)
        way(theirs, expected, data)
        assert_close(actual, expected)


def test_every_method_takes_the_two_steps():
    model, other = mlp(FLOAT64), mlp(FLOAT64)
    method = methods.VaSSO(theta=0.5)
    opt = SAM(model.parameters(), SGD, 0.2, adaptive=True, method=method, lr=0.1)
    whole = method + methods.AdaptiveSAM(eta=0.0)
    assert opt.method == whole
    micro = MicroBatchSAM(SGD(other.parameters(), lr=0.1), 0.2, method=whole)
    for step in range(3):
        data = batch(dtype=FLOAT64, seed=step)
        two_steps(opt, model, data)
        micro.train_step(lambda *part: loss_of(other, *part), *data)
    assert same_bits(model.parameters(), other.parameters())


def test_a_function_may_make_the_base_optimizer():
    model, other = mlp(), mlp()
    opt = SAM(model.parameters(), lambda params, **settings: AdamW(params, amsgrad=True, **settings), lr=0.01)
    same = SAM(other.parameters(), AdamW, lr=0.01, amsgrad=True)
    for o, m in ((opt, model), (same, other)):
        two_steps(o, m, batch())
    assert same_bits(model.parameters(), other.parameters())


# ---- checkpoints of the copied implementations ------------------------------------------------------------------------------

LOST = r"no state of {}, which begins anew"


def begins_anew(kind) -> bool:
    p = nn.Parameter(torch.ones(1))
    base, p.grad = kind([p], lr=0.1), torch.ones(1)
    base.state.clear()
    try:
        base.step()
    except KeyError:
        return False
    return True


@pytest.mark.parametrize("friendly", [None, (0.8, 0.6)], ids=["SAM", "F-SAM"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("base", BASES)
def test_their_checkpoints_load(base, adaptive, friendly):
    """With all that they have: F-SAM's mean, and which of SAM and ASAM it is; the base optimizer begins anew, as there."""
    kind, settings = BASES[base]
    if not begins_anew(kind):
        pytest.skip(f"the {base} of this torch begins its state at construction alone")
    expected = mlp(FLOAT64)
    first = LoopSAM(expected.parameters(), kind, 0.2, adaptive, friendly=friendly, **settings)
    for step in range(3):
        two_steps(first, expected, batch(dtype=FLOAT64, seed=step))
    saved = through_a_file(first.state_dict())
    actual = copy.deepcopy(expected)
    theirs = LoopSAM(expected.parameters(), kind, 0.5, friendly=friendly, **{**settings, "lr": 0.5})
    theirs.load_state_dict(copy.deepcopy(saved))
    make = FriendlySAM if friendly else SAM
    own = dict(zip(("sigma", "lmbda"), friendly or (), strict=False))
    ours = make(actual.parameters(), kind, 0.5, adaptive=not adaptive, **own, **{**settings, "lr": 0.5})
    if base == "SGD":
        ours.load_state_dict(saved)
    else:
        with pytest.warns(UserWarning, match=LOST.format(kind.__name__)):
            ours.load_state_dict(saved)
    assert not any(name in entry for entry in ours.state.values() for name in ("old_p", "e_w", "momentum"))
    assert (ours.method.full.eta is not None) == adaptive == ours.param_groups[0]["adaptive"]
    for step in range(3, 6):
        two_steps(ours, actual, batch(dtype=FLOAT64, seed=step))
        two_steps(theirs, expected, batch(dtype=FLOAT64, seed=step))
        assert_close(actual, expected)


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_our_checkpoints_load_into_theirs(adaptive):
    """But for the state of the base optimizer, which theirs loads nowhere."""
    actual, ours, _, _ = pair("SGD", adaptive)
    for step in range(2):
        two_steps(ours, actual, batch(dtype=FLOAT64, seed=step))
    expected = copy.deepcopy(actual)
    theirs = LoopSAM(expected.parameters(), SGD, 0.5, not adaptive, lr=0.5)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    for step in range(2, 4):
        two_steps(ours, actual, batch(dtype=FLOAT64, seed=step))
        two_steps(theirs, expected, batch(dtype=FLOAT64, seed=step))
        assert_close(actual, expected)


def test_a_mean_gradient_that_no_one_wants_is_dropped_with_a_word():
    model = mlp()
    theirs = LoopSAM(model.parameters(), SGD, friendly=(1.0, 0.9), lr=0.1)
    two_steps(theirs, model, batch())
    opt = SAM(model.parameters(), SGD, lr=0.1)
    with pytest.warns(
        UserWarning, match=r"mean gradient .* is F-SAM's, and SAM\(.* it is dropped; methods.FriendlySAM"
    ):
        opt.load_state_dict(theirs.state_dict())
    assert not any("msam_ema" in entry for entry in opt.state_dict()["state"].values())
    assert "msam" not in opt.state_dict()
    two_steps(opt, model, batch())


def test_a_checkpoint_of_some_adaptive_groups_is_refused_whole():
    model = mlp()
    opt = SAM([{"params": m.parameters()} for m in (model[0], model[2])], SGD, lr=0.1)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][1].update(adaptive=True, lr=0.5)
    with pytest.raises(ValueError, match="adaptive is one for all groups"):
        opt.load_state_dict(saved)
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.1]
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    opt.base_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [g["adaptive"] for g in opt.param_groups] == [False] * 4


@pytest.mark.parametrize("method", [methods.FriendlySAM(), methods.SAM(start=3), methods.BilateralSAM()], ids=repr)
def test_our_own_checkpoints_say_whether_they_are_adaptive(method):
    """A file decides, as it does on the learning rate; nothing of the method is lost on the way there and back."""
    opts = [SAM(mlp().parameters(), SGD, adaptive=adaptive, method=method, lr=0.1) for adaptive in (True, False)]
    saved = [copy.deepcopy(opt.state_dict()) for opt in opts]
    methods_before = [opt.method for opt in opts]
    for opt, other in zip(opts, reversed(saved), strict=True):
        opt.load_state_dict(other)
    assert [opt.method for opt in opts] == methods_before[::-1]


# ---- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [two_steps, one_step])
def test_an_error_in_the_second_pass_leaves_the_weights_as_they_were(method):
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    before = weights(model)
    loss_of(model, *batch()).backward()

    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        opt.step(fails)
    assert same_bits(model.parameters(), before)
    method(opt, model, batch())


def test_steps_out_of_order_say_what_to_do_and_change_nothing():
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"second_step.*first_step"):
        opt.second_step()
    loss_of(model, *batch()).backward()
    opt.first_step()
    perturbed = weights(model)
    for wrong in (
        opt.first_step,
        lambda: opt.step(lambda: None),
        lambda: next(opt.passes()),
        lambda: copy.deepcopy(opt),
    ):
        with pytest.raises(RuntimeError, match="perturbed"):
            wrong()
        assert same_bits(model.parameters(), perturbed)
    opt.restore()
    assert same_bits(model.parameters(), before)
    with pytest.raises(RuntimeError, match="first_step"):
        opt.second_step()
    two_steps(opt, model, batch())


@pytest.mark.parametrize("enabled", [True, False])
def test_first_step_without_a_gradient_is_a_forgotten_backward(enabled):
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    opt.enabled = enabled
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"first_step\(\) without a gradient: call backward\(\)"):
        opt.first_step(zero_grad=True)
    assert same_bits(model.parameters(), before)
    two_steps(opt, model, batch())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: SAM(p, SGD(p, lr=0.1)), TypeError, "MicroBatchSAM"),
        (lambda p: SAM(p, "SGD"), TypeError, r"torch\.optim\.SGD"),
        (lambda p: SAM(p, lambda params: None), TypeError, r"function that returns an optimizer.*returned None"),
        (lambda p: SAM(p, torch.optim.LBFGS), TypeError, r"LBFGS\.step asks for closure"),
        (lambda p: SAM(p, torch.optim.Adadelta), ValueError, r"Adadelta has a rho of its own, 0\.9"),
        (lambda p: SAM(p, SGD, lr=0.1, method="SAM"), TypeError, r"method must be one of"),
        (lambda p: FriendlySAM(p, SGD, lmbda=2.0, lr=0.1), ValueError, r"lmbda.*2\.0"),
        (lambda p: SAM(p, SGD, rho=-0.1, lr=0.1), ValueError, r"rho.*-0\.1"),
        (lambda p: SAM(p, SGD, rho=float("nan"), lr=0.1), ValueError, "rho.*nan"),
        (lambda p: SAM([], SGD, lr=0.1), ValueError, "empty parameter list"),
        (lambda p: SAM(p[0], SGD, lr=0.1), TypeError, "iterable of Tensors"),
        (lambda p: SAM(p, SGD, lr=-1.0), ValueError, "-1.0"),
        (lambda p: SAM(p, msam_kernels.MicroBatchSAM), TypeError, "MicroBatchSAM"),
    ],
    ids=[
        "an instance",
        "a name",
        "a function of nothing",
        "LBFGS",
        "Adadelta",
        "method",
        "lmbda",
        "rho < 0",
        "rho nan",
        "no parameters",
        "a tensor",
        "lr < 0",
        "a wrapper",
    ],
)
def test_wrong_arguments_say_what_is_wrong(make, error, match):
    with pytest.raises(error, match=match):
        make(list(mlp().parameters()))


def test_step_without_a_closure_says_what_to_do():
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    loss_of(model, *batch()).backward()
    with pytest.raises(RuntimeError, match="closure"):
        opt.step()


def test_hooks_run_once_and_a_scheduler_sees_the_steps():
    model = mlp()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append(1))
    opt.step([closure_of(model, batch())])
    assert calls == [1]
    closure_of(model, batch())()
    opt.first_step(zero_grad=True)
    closure_of(model, batch())()
    opt.second_step(zero_grad=True)
    scheduler.step()


def test_layers_of_the_model_record_once_between_the_steps():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1, model=model)
    for zero_grad_step in (opt.first_step, opt.second_step):
        model(torch.randn(5, 3)).square().sum().backward()
        zero_grad_step(zero_grad=True)
    assert model[1].num_batches_tracked.item() == 1


# ---- closures that do everything ---------------------------------------------------------------------------------------------

CLEARS = {
    "opt.zero_grad()": lambda opt, model: opt.zero_grad(),
    "opt.zero_grad(set_to_none=False)": lambda opt, model: opt.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda opt, model: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda opt, model: model.zero_grad(set_to_none=False),
    "nothing": lambda opt, model: None,
}


def whole_closure(opt, model, data, clear, values=None):
    def closure():
        clear(opt, model)
        loss = loss_of(model, *data)
        loss.backward()
        if values is not None:
            values.append((loss, opt.pass_index))
        return loss

    return closure


@pytest.mark.parametrize("clear_first", CLEARS)
@pytest.mark.parametrize("clear_inside", CLEARS)
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW amsgrad", "RMSprop"])
def test_a_closure_that_does_everything_is_sam_from_the_first_step_on(base, clear_inside, clear_first):
    """As skorch, Lightning and fastai call it."""
    actual, ours, expected, theirs = pair(base)
    for step in range(4):
        data = batch(dtype=FLOAT64, seed=step)
        values = []
        CLEARS[clear_first](ours, actual)
        loss = ours.step(whole_closure(ours, actual, data, CLEARS[clear_inside], values))
        theirs.zero_grad()
        two_steps(theirs, expected, data)
        assert_close(actual, expected)
        assert [at for _, at in values] == [0, 1]
        assert loss is values[0][0], "the loss at w"
        assert gradients(actual) == [None] * 4


@pytest.mark.parametrize("clear", CLEARS)
def test_gradients_of_this_step_are_those_at_w(clear):
    """Also where they are added to what the last step left, as without ``zero_grad``."""
    actual, ours, expected, theirs = pair("SGD momentum")
    for step in range(4):
        data = batch(dtype=FLOAT64, seed=step)
        values = []
        for opt, model in ((ours, actual), (theirs, expected)):
            CLEARS[clear](opt, model)
            for seed in range(2):  # accumulated
                (loss_of(model, *batch(dtype=FLOAT64, seed=10 * step + seed)) / 2).backward()
        ours.step(whole_closure(ours, actual, data, lambda *_: None, values))
        theirs.step(closure_of(expected, data))
        assert_close(actual, expected)
        assert [at for _, at in values] == [1]


@pytest.mark.parametrize("before", ["step(closure)", "first_step and second_step", "a closure that raises"])
def test_gradients_that_the_last_step_left_are_not_those_of_this_one(before):
    actual, ours, expected, theirs = pair("SGD momentum")
    data = [batch(dtype=FLOAT64, seed=seed) for seed in range(3)]
    for opt, model in ((ours, actual), (theirs, expected)):
        if before == "first_step and second_step":
            two_steps(opt, model, data[0], (True, False))
        elif before == "step(closure)":
            loss_of(model, *data[0]).backward()
            opt.step(closure_of(model, data[0]))
    if before == "a closure that raises":
        loss_of(actual, *data[0]).backward()

        def fails():
            loss_of(actual, *data[0]).backward()
            raise KeyError

        with pytest.raises(KeyError):
            ours.step(fails)
    assert all(g is not None for g in gradients(actual))
    for batch_of_step in data[1:]:
        ours.step(whole_closure(ours, actual, batch_of_step, CLEARS["nothing"]))
        theirs.zero_grad()
        two_steps(theirs, expected, batch_of_step)
        assert_close(actual, expected)


def test_gradients_that_are_gone_keep_no_memory():
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    loss_of(model, *batch()).backward()
    opt.step(closure_of(model, batch()))
    left = [weakref.ref(p.grad) for p in model.parameters()]
    opt.zero_grad()
    assert [grad() for grad in left] == [None] * 4
    copy.deepcopy(opt)


def test_a_closure_that_does_everything_runs_once_where_nothing_is_perturbed():
    model, plain = mlp(), mlp()
    opt, base = SAM(model.parameters(), SGD, lr=0.1), SGD(plain.parameters(), lr=0.1)
    opt.enabled = False
    values = []
    opt.step(whole_closure(opt, model, batch(), CLEARS["opt.zero_grad()"], values))
    closure_of(plain, batch())()
    base.step()
    assert [at for _, at in values] == [0]
    assert same_bits(model.parameters(), plain.parameters())


def test_between_the_two_steps_the_pass_at_the_perturbed_weights_is_under_way():
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    loss_of(model, *batch()).backward()
    assert opt.pass_index is None
    opt.first_step(zero_grad=True)
    assert opt.pass_index == 1
    loss_of(model, *batch()).backward()
    opt.second_step()
    assert opt.pass_index is None


def test_a_first_step_in_inference_mode_can_be_given_up():
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    before = weights(model)
    loss_of(model, *batch()).backward()
    with torch.inference_mode():
        opt.first_step(zero_grad=True)
    assert not same_bits(model.parameters(), before)
    opt.restore()
    assert same_bits(model.parameters(), before)


@pytest.mark.parametrize("method", ["SAM", "F-SAM", "VaSSO", "LE-SAM", "Sparse SAM"])
def test_what_a_method_began_in_inference_mode_can_be_loaded_outside(method):
    runs = []
    for inferred in (True, False):
        model = mlp()
        opt = SAM(model.parameters(), AdamW, lr=0.01, rho=0.1, method=METHODS[method])
        for step in range(4):
            for take in (opt.first_step, opt.second_step):
                loss_of(model, *batch(seed=step)).backward()
                with torch.inference_mode(inferred and step == 0):
                    take(zero_grad=True)
            if step < 2:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        runs.append(weights(model))
    assert same_bits(*runs)


@pytest.mark.parametrize("cleared", [True, False], ids=["zero_grad=True", "zero_grad=False"])
def test_restore_between_the_two_steps_leaves_the_gradients_that_are_there(cleared, backend):
    """They are the user's: nothing was put aside."""
    model = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    before = weights(model)
    loss_of(model, *batch()).backward()
    opt.first_step(zero_grad=cleared)
    assert not same_bits(model.parameters(), before)
    loss_of(model, *batch()).backward()
    grads = gradients(model)
    opt.restore()
    assert same_bits(model.parameters(), before)
    assert same_bits(gradients(model), grads)


def test_gradients_made_in_inference_mode_are_those_of_the_step():
    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], SGD, rho=0.5, lr=0.1)

    def closure():
        with torch.inference_mode():
            p.grad = torch.ones(3)

    for _ in range(2):
        closure()
        opt.step(closure)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))
