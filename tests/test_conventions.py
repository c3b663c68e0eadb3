# SPDX-License-Identifier: Apache-2.0
"""What holds for every ``torch.optim.Optimizer`` holds here."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler
from torch.optim.optimizer import Optimizer

from msam_kernels import MicroBatchSAM, methods
from msam_kernels.backends import get_backend, name_of
from plain import (
    DEVICE,
    METHODS,
    WAYS,
    PlainSAM,
    assert_close,
    batch,
    closure_of,
    loss_of,
    mlp,
    remembered,
    same_bits,
    split,
    weights,
)

FLOAT64 = torch.float64


def wrap(net, base=None, **options):
    base = base or SGD(net.parameters(), lr=0.1, momentum=0.9)
    return MicroBatchSAM(base, **{"rho": 0.1, "num_micro_batches": 2, **options})


# ---- schedulers -------------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "two of them": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.MultiStepLR(o, [2, 4])]
    ),
}
BASES = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=0.1),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9),
    "SGD tensor lr": lambda p: SGD(p, lr=torch.tensor(0.1, dtype=FLOAT64), momentum=0.9),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # old SequentialLRs call others with it
@pytest.mark.parametrize("way", ["passes", "train_step"])
@pytest.mark.parametrize("on", ["the wrapper", "the base", "the base, before it was wrapped"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_on_either_object_reaches_both_without_a_warning(name, base, on, way):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(BASES[base](expected.parameters()), 0.1)
    theirs_scheduler = SCHEDULERS[name](theirs.base)
    plain = BASES[base](actual.parameters())
    if on == "the base, before it was wrapped":
        scheduler, opt = SCHEDULERS[name](plain), wrap(actual, plain)
    else:
        opt = wrap(actual, plain)
        scheduler = SCHEDULERS[name](opt if on == "the wrapper" else plain)
    rates = []
    for step in range(6):
        data = batch(6, FLOAT64, seed=step)
        WAYS[way](opt, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
        for s in (scheduler, theirs_scheduler):
            s.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == theirs.base.param_groups[0]["lr"]
        rates.append(float(plain.param_groups[0]["lr"]))
        assert_close(actual, expected)
    assert len(set(rates)) > 1


def test_a_scheduler_resumes_with_the_optimizer():
    def fresh():
        model = mlp()
        opt = wrap(model)
        return model, opt, lr_scheduler.OneCycleLR(opt, 0.2, total_steps=12)

    straight, opt, scheduler = fresh()
    model, first, first_scheduler = fresh()
    for step in range(10):
        WAYS["train_step"](opt, straight, batch(6, seed=step))
        scheduler.step()
    for step in range(5):
        WAYS["train_step"](first, model, batch(6, seed=step))
        first_scheduler.step()
    resumed, second, second_scheduler = fresh()
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    second_scheduler.load_state_dict(first_scheduler.state_dict())
    for step in range(5, 10):
        WAYS["train_step"](second, resumed, batch(6, seed=step))
        second_scheduler.step()
    assert same_bits(resumed.parameters(), straight.parameters())


def test_rho_may_be_scheduled_in_the_groups(backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1, momentum=0.9))
    opt = wrap(actual, backend=backend)
    for step in range(4):
        theirs.base.param_groups[0]["rho"] = opt.param_groups[0]["rho"] = 0.1 * (4 - step)
        data = batch(6, FLOAT64, seed=step)
        WAYS["passes"](opt, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
        assert_close(actual, expected)
        torch.testing.assert_close(opt.stats.perturbation_norm[0].item(), 0.1 * (4 - step))


def test_groups_may_be_exchanged(backend):
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1, momentum=0.9), 0.1)
    opt = wrap(actual, backend=backend)
    for step in range(4):
        if step == 2:
            for groups in (theirs.base.param_groups, opt.param_groups):
                groups[0] = {**groups[0], "lr": 0.03, "rho": 0.3}
        data = batch(6, FLOAT64, seed=step)
        WAYS["passes"](opt, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
        assert_close(actual, expected)


# ---- hooks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_step_hooks_run_once_a_step_on_whichever_object_they_are(on, way):
    model = mlp()
    opt = wrap(model)
    target = opt if on == "wrapper" else opt.base_optimizer
    calls = []
    for step in range(2):  # hooks that come later count too
        WAYS[way](opt, model, batch(6, seed=step))
    handles = [
        target.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o))),
        target.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o))),
    ]
    for step in range(3):
        WAYS[way](opt, model, batch(6, seed=step))
    assert calls == [("pre", target), ("post", target)] * 3
    for handle in handles:
        handle.remove()
    WAYS[way](opt, model, batch(6))
    assert len(calls) == 6


def test_a_hook_before_the_step_of_the_wrapper_may_change_the_gradients():
    expected = mlp(FLOAT64)
    actual = copy.deepcopy(expected)
    theirs, opt = PlainSAM(SGD(expected.parameters(), lr=0.1, momentum=0.9), 0.1), wrap(actual)

    def halve(params):
        def hook(*_):
            for p in params:
                p.grad = p.grad / 2

        return hook

    theirs.base.register_step_pre_hook(halve(list(expected.parameters())))
    opt.register_step_pre_hook(halve(list(actual.parameters())))
    for step in range(3):
        data = batch(6, FLOAT64, seed=step)
        WAYS["passes"](opt, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
    assert_close(actual, expected)


def test_hooks_of_the_state_dict_run():
    model = mlp()
    opt = wrap(model, method=methods.FriendlySAM())
    WAYS["passes"](opt, model, batch(6))
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "note": 1, "keys": sorted(d)})
    opt.register_load_state_dict_pre_hook(lambda o, d: calls.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    state = opt.state_dict()
    assert state["note"] == 1
    assert {"state", "param_groups"} <= state.keys()
    opt.load_state_dict(state)
    assert calls == ["pre", "load pre", "load post"]


def test_a_hook_that_runs_before_loading_may_replace_what_is_loaded():
    model = mlp()
    opt = wrap(model, method=methods.FriendlySAM())
    WAYS["passes"](opt, model, batch(6))
    good = copy.deepcopy(opt.state_dict())
    WAYS["passes"](opt, model, batch(6, seed=5))
    opt.register_load_state_dict_pre_hook(lambda o, d: good)
    opt.load_state_dict(opt.state_dict())
    for i, entry in good["state"].items():
        assert same_bits(opt.state_dict()["state"][i].values(), entry.values())
    assert same_bits(remembered(opt, "ema").values(), remembered(good, "ema").values())


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_tensors_see_every_gradient(way):
    model = mlp()
    opt = wrap(model)
    seen, accumulated = [], []
    model[0].weight.register_hook(lambda g: seen.append(g.clone()))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    WAYS[way](opt, model, batch(6))
    assert len(seen) == len(accumulated) == 4
    assert same_bits(seen, accumulated), "p.grad is None when each pass begins"


# ---- groups -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("method", ["SAM", "F-SAM"])
@pytest.mark.parametrize("way", WAYS)
def test_a_group_added_to_either_object_takes_part(way, method, on, backend):
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = mlp(FLOAT64), nn.Linear(3, 2).double(), nn.Linear(3, 2)

        def forward(self, x):
            return self.first(x) + self.second(x).tanh() + self.third(x.float()).double()

    expected = Grows()
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(Adam(expected.first.parameters(), lr=0.1), 0.1, METHODS[method])
    opt = wrap(actual, Adam(actual.first.parameters(), lr=0.1), method=METHODS[method], backend=backend)
    for step in range(6):
        if step in (2, 4):
            name, group = ("second", {"rho": 0.5, "lr": 0.01}) if step == 2 else ("third", {})
            target = opt if on == "wrapper" else opt.base_optimizer
            target.add_param_group({"params": getattr(actual, name).parameters(), **group})
            theirs.base.add_param_group({"params": getattr(expected, name).parameters(), **group})
        data = batch(6, FLOAT64, seed=step)
        # Parameters outside of the optimizer collect gradients, as they do in torch.
        actual.zero_grad()
        WAYS[way](opt, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
        assert_close(actual, expected, 1e-12 if step < 4 else 1e-6)
    assert [g["rho"] for g in opt.param_groups] == [0.1, 0.5, 0.1]


@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_a_group_added_to_either_object_is_saved_with_its_rho(on):
    model, extra = mlp(), nn.Parameter(torch.ones(3))
    opt = wrap(model, method=methods.FriendlySAM())
    (opt if on == "wrapper" else opt.base_optimizer).add_param_group({"params": [extra]})
    state = opt.state_dict()
    assert [group["rho"] for group in state["param_groups"]] == [0.1, 0.1]
    opt.load_state_dict({**state, "msam": {"ema": {4: torch.full((3,), 2.0)}}})
    assert same_bits(remembered(opt, "ema").values(), [torch.full((3,), 2.0)])


def test_groups_and_state_are_the_base_optimizers_own():
    model = mlp()
    opt = wrap(model)
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.state is opt.base_optimizer.state
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.state is opt.base_optimizer.state


def test_named_parameters_keep_their_names():
    model = mlp()
    opt = wrap(model, SGD(model.named_parameters(), lr=0.1))
    names = [name for name, _ in model.named_parameters()]
    WAYS["passes"](opt, model, batch(6))
    assert opt.param_groups[0]["param_names"] == names
    state = opt.state_dict()
    assert state["param_groups"][0]["param_names"] == names
    opt.load_state_dict(state)
    assert opt.param_groups[0]["param_names"] == names


# ---- other conventions ------------------------------------------------------------------------------------------------------


def test_it_is_an_optimizer():
    opt = wrap(mlp())
    assert isinstance(opt, Optimizer)
    assert opt.defaults["lr"] == 0.1
    assert opt.defaults["rho"] == 0.1
    missing = [name for name in vars(SGD(mlp().parameters(), lr=0.1)) if not hasattr(opt, name)]
    assert missing == []


def test_its_representation_says_what_it_is():
    text = repr(wrap(mlp(), method=methods.FriendlySAM(sigma=0.5), backend="reference"))
    for part in (
        "MicroBatchSAM",
        "FriendlySAM(start=0, every=1, only=None, sigma=0.5, lmbda=0.9)",
        "num_micro_batches=2",
        "reference",
        "SGD",
        "lr: 0.1",
        "rho: 0.1",
    ):
        assert part in text
    assert "micro_batch_size=3" in repr(wrap(mlp(), num_micro_batches=None, micro_batch_size=3))


def test_its_representation_says_which_backend_was_chosen(backend):
    model = mlp()
    chosen = get_backend("auto", next(model.parameters()).device)
    named = name_of(chosen, next(model.parameters()).device)
    assert f"backend='{named}'\n" in repr(wrap(model))
    assert f"backend='{backend}'\n" in repr(wrap(mlp(), backend=backend))
    assert "backend='auto'\n" in repr(wrap(mlp().requires_grad_(False)))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_does_what_torchs_does(set_to_none):
    model = mlp()
    opt = wrap(model)
    closure_of(model, batch())()
    opt.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else (p.grad == 0).all()


def test_the_profiler_shows_its_steps():
    model = mlp()
    opt = wrap(model)
    with torch.profiler.profile() as profile:
        WAYS["passes"](opt, model, batch(6))
        WAYS["train_step"](opt, model, batch(6))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#MicroBatchSAM.step"] == 2
    assert counts["Optimizer.zero_grad#MicroBatchSAM.zero_grad"] == 1


@pytest.mark.parametrize("way", ["closures", "train_step"])
@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_closures_run_with_gradients_whatever_is_set_outside(outside, way):
    model = mlp()
    opt = wrap(model)
    before = weights(model)
    with outside():
        mode = torch.is_grad_enabled()
        WAYS[way](opt, model, batch(6))
        assert torch.is_grad_enabled() == mode
    assert not same_bits(model.parameters(), before)


def test_the_loop_leaves_the_grad_mode_to_its_body():
    model = mlp()
    opt = wrap(model)
    with torch.no_grad():
        for part in opt.passes(*batch(6)):
            assert not torch.is_grad_enabled()
            with torch.enable_grad():
                loss_of(model, *part).backward()
        assert not torch.is_grad_enabled()
    for part in opt.passes(*batch(6)):
        assert torch.is_grad_enabled()
        loss_of(model, *part).backward()
    opt.step()


def test_it_works_under_another_default_dtype():
    expected, data = mlp(), batch(6)
    results = []
    before = torch.get_default_dtype()
    for dtype in (before, FLOAT64):
        torch.set_default_dtype(dtype)
        try:
            model = copy.deepcopy(expected)
            opt = wrap(model, Adam(model.parameters(), lr=0.1), method=methods.FriendlySAM())
            for _ in range(3):
                WAYS["train_step"](opt, model, data)
        finally:
            torch.set_default_dtype(before)
        results.append(weights(model))
    assert same_bits(*results)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_trains_as_the_plain_one(way):
    """The weights change in place between the passes; a compiled model must see it."""
    expected = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    actual = copy.deepcopy(expected)
    compiled = torch.compile(actual, backend="aot_eager")
    theirs, opt = wrap(expected, model=expected), wrap(actual, model=compiled)
    for step in range(3):
        WAYS[way](opt, compiled, batch(6, seed=step))
        WAYS[way](theirs, expected, batch(6, seed=step))
    for a, b in zip(actual.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo looks at it
@pytest.mark.parametrize("way", [*WAYS, "step on p.grad"])
def test_a_compiled_function_around_the_step_trains_as_the_plain_one(way):
    def train(opt, model, data):
        if way in WAYS:
            WAYS[way](opt, model, data)
        else:
            opt.enabled = False
            opt.zero_grad()
            loss_of(model, *data).backward()
            opt.step()

    models = mlp(), mlp()
    opts = [wrap(model, method=methods.StableSAM()) for model in models]
    for step in range(3):
        train(opts[0], models[0], batch(6, seed=step))
        torch.compile(train, backend="eager")(opts[1], models[1], batch(6, seed=step))
    assert same_bits(*(model.parameters() for model in models))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_an_optimizer_from_a_file_is_not_traced_either(tmp_path):
    """In a process that made none."""
    path = tmp_path / "training"
    model = mlp()
    opt = wrap(model)
    torch.save((model, opt), path)
    code = (
        "import sys, torch; from plain import batch, loss_of\n"
        "results = []\n"
        "for compiled in (False, True):\n"
        "    model, opt = torch.load(sys.argv[1], weights_only=False)\n"
        "    train = lambda data: opt.train_step(lambda x, y: loss_of(model, x, y), *data)\n"
        "    train = torch.compile(train, backend='eager') if compiled else train\n"
        "    for step in range(3):\n"
        "        train(batch(6, seed=step))\n"
        "    results.append([p.tolist() for p in model.parameters()])\n"
        "assert results[0] == results[1]\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("enabled", [True, False], ids=["on around it all", "off around it all"])
@pytest.mark.parametrize("way", WAYS)
def test_within_one_autocast_every_pass_sees_its_weights(way, enabled):
    """Autocast keeps its copies of the weights until its outermost context ends."""
    seen = []

    class Net(nn.Sequential):
        def forward(self, x):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                out = super().forward(x)
            seen.append(tuple(out.flatten().tolist()))
            return out.float()

    torch.manual_seed(0)
    model = Net(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    opt = wrap(model, rho=0.5)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
        for _ in range(2):
            WAYS[way](opt, model, batch(6))
    assert len(set(seen)) == len(seen) == 2 * 2 * 2


@pytest.mark.parametrize("way", WAYS)
def test_parametrizations_that_are_cached_are_computed_anew_in_every_pass(way):
    class Symmetric(nn.Module):
        def forward(self, w):
            return w + w.T

    runs = []
    for around in (parametrize.cached, contextlib.nullcontext):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        parametrize.register_parametrization(model[0], "weight", Symmetric())
        opt = wrap(model, rho=0.5)
        with around():
            for _ in range(2):
                WAYS[way](opt, model, batch(6))
        runs.append(weights(model))
    assert same_bits(*runs)


def test_a_model_trained_in_a_function_transform_sees_the_perturbed_weights():
    model = mlp(FLOAT64)
    opt = wrap(model, num_micro_batches=1, rho=0.5)
    losses = []
    for part in opt.passes(*batch(6, FLOAT64)):
        loss = torch.func.functional_call(model, dict(model.named_parameters()), (part[0],)).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[1] > losses[0]


def test_lstm_and_attention_train(backend):
    """Modules that keep lists of their own weights."""

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

        def forward(self, x):
            x, _ = self.lstm(x.unsqueeze(1).expand(-1, 4, -1))
            x, _ = self.attention(x, x, x)
            return self.scaled(x).mean(1)

    expected = Sequence().double()
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1, momentum=0.9), 0.1)
    opt = wrap(actual, backend=backend)
    for step in range(2):
        data = batch(6, FLOAT64, seed=step)
        WAYS["passes"](opt, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
    assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop"])
def test_a_state_dict_may_name_its_parameters_as_it_likes(base):
    """torch pairs what a state dict calls its parameters with the optimizer's own by position; checkpoints use names."""
    model = mlp()
    opt = wrap(model, BASES[base](model.parameters()), method=methods.FriendlySAM())
    WAYS["passes"](opt, model, batch(6))
    twin, twin_opt = copy.deepcopy((model, opt))
    state = copy.deepcopy(opt.base_optimizer.state_dict())
    names = [name for name, _ in model.named_parameters()]
    renamed = {
        "state": {names[i]: entry for i, entry in state["state"].items()},
        "param_groups": [{**state["param_groups"][0], "params": names}],
    }
    for o, s in ((opt, state), (twin_opt, copy.deepcopy(renamed))):  # torch loads without a copy
        o.load_state_dict(s)
    for o, m in ((opt, model), (twin_opt, twin)):
        WAYS["passes"](o, m, batch(6, seed=1))
    assert same_bits(model.parameters(), twin.parameters())


def test_the_state_dict_interface_of_distributed_checkpoints_keeps_everything():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = mlp()
    opt = wrap(model, Adam(model.parameters(), lr=0.1))
    for step in range(2):
        WAYS["passes"](opt, model, batch(6, seed=step))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    start = copy.deepcopy(model.state_dict())
    WAYS["passes"](opt, model, batch(6, seed=7))
    resumed = mlp(seed=4)
    resumed.load_state_dict(start)
    second = wrap(resumed, Adam(resumed.parameters(), lr=0.5))
    set_optimizer_state_dict(resumed, second, saved)
    WAYS["passes"](second, resumed, batch(6, seed=7))
    assert same_bits(resumed.parameters(), model.parameters())


# ---- DistributedDataParallel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_views", [False, True], ids=["own gradients", "gradients are bucket views"])
@pytest.mark.parametrize("count", [1, 3], ids=["one micro-batch", "three micro-batches"])
@pytest.mark.parametrize("single", [False, True], ids=["several parameters", "a bucket of one parameter"])
@pytest.mark.parametrize("name", ["SAM", "GSAM", "Bilateral SAM", "LookSAM k=2"])
def test_ddp_trains_like_the_plain_model(name, single, count, as_views, process_group, backend):
    def trained(wrap):
        torch.manual_seed(0)
        several = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        model = (nn.Linear(4, 3, bias=False) if single else several).double()
        base = SGD(model.parameters(), lr=0.1, momentum=0.9)
        opt = MicroBatchSAM(base, method=METHODS[name], num_micro_batches=count, backend=backend)
        call = wrap(model)
        x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
        for _ in range(3):
            for _ in range(2):  # gradients add up, also to those of the loop before
                for xb, yb in opt.passes(x, y):
                    nn.functional.cross_entropy(call(xb), yb).backward()
            opt.step()
            opt.zero_grad()
            opt.train_step(lambda xb, yb: nn.functional.cross_entropy(call(xb), yb), x, y)
        return list(model.parameters())

    def ddp(model):
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_views)

    for p, expected in zip(trained(ddp), trained(lambda model: model), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_step_in_inference_mode_leaves_what_later_steps_can_write_to(kind):
    model = mlp(FLOAT64)
    opt = wrap(model, kind(model.parameters(), lr=0.1))
    for step in range(3):
        for part in opt.passes(*batch(6, FLOAT64)):
            loss_of(model, *part).backward()
        with torch.inference_mode(step == 0):
            opt.step()
        opt.zero_grad()
        opt.param_groups[0]["lr"] = 0.05 / (1 + step)
