# SPDX-License-Identifier: Apache-2.0
"""Sharpness, sweeps of rho, eigenvalues and slices of the loss against their definitions; and nothing is left behind."""

from __future__ import annotations

import math
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from msam_kernels import backends, flatness, methods
from msam_kernels.batches import rebuilt
from msam_kernels.optimizer import Passes
from plain import (
    DEVICE,
    METHODS,
    WITHOUT_MOMENTUM,
    PlainSAM,
    Zoo,
    batch,
    images,
    loss_of,
    mlp,
    same_bits,
    split,
    weights,
)

F64 = torch.float64
SIZES = {1: [7], 2: [4, 3], 3: [3, 2, 2], 7: [1] * 7}  # of seven samples


def loss_fn_of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda x, y: loss_of(model, x, y)


def mean_loss(model: nn.Module, data, sizes=(7,)) -> Tensor:
    return sum(size / sum(sizes) * loss_of(model, *part) for size, part in zip(sizes, split(data, sizes), strict=True))


# ---- a model of everything, and what must stay -----------------------------------------------------------------------


class Assigning(nn.Module):
    """A layer whose output depends on a buffer, which every forward replaces by another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=F64))
        self.register_buffer("expanded", torch.ones(1, dtype=F64).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * (1 + 0.1 * self.calls) * self.expanded


class Everything(nn.Module):
    """Normalisation with statistics, dropout, tied, frozen, unused and gappy parameters."""

    def __init__(self, dtype: torch.dtype = F64):
        super().__init__()
        self.zoo = Zoo(dtype)
        self.rest = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Linear(4, 4), Assigning(), nn.Dropout(0.2))
        self.images = nn.InstanceNorm2d(2, track_running_stats=True)
        self.to(dtype)
        self.rest[0].eval()
        self.rest[0].running_var.fill_(1.7)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.zoo(self.images(x)))


def everything(dtype: torch.dtype = F64) -> Everything:
    torch.manual_seed(3)
    model = Everything(dtype)
    for i, p in enumerate(model.parameters()):
        if i % 3:
            p.grad = torch.full_like(p, i)
    model.zoo.frozen.grad = torch.ones_like(model.zoo.frozen)
    model.rest[0].train(True)
    model.rest[2].eval()
    return model


def snapshot(model: nn.Module) -> dict:
    device = DEVICE if DEVICE.type != "cpu" else None
    params, buffers = list(model.parameters()), list(model.buffers())
    grads = [p.grad for p in params]
    tensors = {"weights": params, "gradients": grads, "buffers": buffers}
    return {
        "values": {name: [None if t is None else t.detach().clone() for t in ts] for name, ts in tensors.items()},
        "objects": [id(t) for ts in tensors.values() for t in ts],
        "memory": [(p.data_ptr(), p.stride(), p.dtype, p.requires_grad) for p in params],
        "modes": [module.training for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "device random": device and torch.get_device_module(device).get_rng_state(device).tolist(),
        "keep": tensors,  # or an id could be given to a new object
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    now = snapshot(model)
    for name, values in before["values"].items():
        assert same_bits(now["values"][name], values), name
    for name in before.keys() - {"values", "keep"}:
        assert now[name] == before[name], name


CALLS = {
    "sharpness": lambda model, fn, data: flatness.sharpness(model, fn, data, 0.1, 3),
    "sharpness of F-SAM": lambda model, fn, data: flatness.sharpness(model, fn, data, 0.1, 3, methods.FriendlySAM()),
    "eigenvalues": lambda model, fn, data: flatness.hessian_eigenvalues(model, fn, data, tolerance=0.1),
    "eigenvalues, parts": lambda model, fn, data: flatness.hessian_eigenvalues(
        model, fn, data, num_micro_batches=2, tolerance=0.5
    ),
    "eigenvalues, float32": lambda model, fn, data: flatness.hessian_eigenvalues(
        model, fn, data, tolerance=0.1, dtype=torch.float32
    ),
    "slice": lambda model, fn, data: flatness.loss_slice(model, fn, data, [-1, 0.5], num_micro_batches=2),
    "random slice": lambda model, fn, data: flatness.loss_slice(model, fn, data, [0.1, 3], "random"),
    "sweep": lambda model, fn, data: flatness.rho_sweep(model, fn, [data], [0.1, 0.5], 3).rises,
    "sweep of F-SAM": lambda model, fn, data: (
        flatness.rho_sweep(model, fn, [data], [0.1, 0.5], 2, methods.FriendlySAM()).rises
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_behind(call):
    model = everything()
    before = snapshot(model)
    CALLS[call](model, loss_fn_of(model), images())
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_behind_when_a_forward_raises(call, error):
    seen = 0

    def failing(model, last, x, y):
        nonlocal seen
        seen += 1
        model.zoo.eval()  # a mode that the user's code changes is set back as well
        loss = loss_of(model, x, y)
        if seen == last:
            raise error("stop")
        return loss

    for last in range(1, 6):
        model, seen = everything(), 0
        before = snapshot(model)
        try:
            CALLS[call](model, partial(failing, model, last), images())
        except error:
            assert seen == last
        else:
            assert seen < last
        assert_unchanged(model, before)


@pytest.mark.parametrize("operator", ["ascend", "descend"])
def test_nothing_is_left_behind_when_a_kernel_raises(operator, monkeypatch):
    real, calls = getattr(backends.reference, operator), 0

    def broken(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(backends.reference, operator, broken)
    model = everything()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        flatness.sharpness(model, loss_fn_of(model), images(), 0.1, 3, backend="reference")
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", CALLS)
def test_every_evaluation_of_a_micro_batch_sees_the_same(call):
    """Dropout's masks and buffers: by the samples of the micro-batch, everything that dropout returned on ones."""
    model = everything().train()
    seen: dict[int, list] = {}

    def loss_fn(x, y):
        mask = nn.functional.dropout(torch.ones(50), 0.5)
        seen.setdefault(y[0, 0].item(), []).append([*mask.tolist(), float(model.rest[3].calls)])
        return loss_of(model, x, y)

    CALLS[call](model, loss_fn, images())
    assert all(states == [states[0]] * len(states) for states in seen.values())
    assert "eigenvalues" in call or any(len(states) > 1 for states in seen.values())
    first = [states[0] for states in seen.values()]
    assert len(set(map(str, first))) == len(first)  # another mask for each micro-batch


def test_hooks_of_accumulated_gradients_do_not_run():
    """They may be a whole optimizer."""
    model, data = mlp(F64), batch(dtype=F64)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: pytest.fail("a hook ran"))
    for call in CALLS.values():
        call(model, loss_fn_of(model), data)


@pytest.mark.parametrize("call", CALLS)
def test_without_grad_mode(call):
    model, data = mlp(F64), batch(dtype=F64)
    expected = CALLS[call](model, loss_fn_of(model), data)
    with torch.no_grad():
        actual = CALLS[call](model, loss_fn_of(model), data)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- sharpness -------------------------------------------------------------------------------------------------------


def plain_sharpness(model: nn.Module, data, rho: float, count: int, method: methods.SAM) -> Tensor:
    losses = []

    def closure(part):
        loss = loss_of(model, *part)
        loss.backward()
        losses.append(loss.detach().double())

    sizes = SIZES[count]
    shares = [size / 7 for size in sizes]
    closures = [lambda part=part: closure(part) for part in split(data, sizes)]
    PlainSAM(SGD(model.parameters(), lr=0.0), rho, method).step(closures, shares)
    turns = len(losses) // count
    return sum(s * (b - a) for s, a, b in zip(shares, losses[::turns], losses[1::turns], strict=True))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("method", WITHOUT_MOMENTUM)
def test_sharpness_is_the_mean_rise_at_the_plain_perturbation(method, count, backend):
    data = batch(dtype=F64)
    actual = flatness.sharpness(
        model := mlp(F64), loss_fn_of(model), data, 0.3, count, METHODS[method], backend=backend
    )
    expected = plain_sharpness(mlp(F64), data, 0.3, count, METHODS[method])
    assert (actual.dtype, actual.shape) == (F64, ())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sharpness_in_the_stored_dtype(dtype):
    data = batch(dtype=dtype)
    actual = flatness.sharpness(model := mlp(dtype), loss_fn_of(model), data, 0.5, 2)
    expected = plain_sharpness(mlp(F64), [t.double() for t in data], 0.5, 2, methods.SAM())
    torch.testing.assert_close(actual, expected, rtol={torch.float32: 1e-5}.get(dtype, 0.05), atol=0)


def test_sharpness_of_awkward_parameters_is_that_of_their_plain_copies():
    data = images()
    actual = flatness.sharpness(model := Zoo(), loss_fn_of(model), data, 0.2)
    expected = plain_sharpness(Zoo(gaps=False), data, 0.2, 1, methods.SAM())
    copied = Zoo()
    copied.column.data = copied.column.data.contiguous()
    torch.testing.assert_close(actual, plain_sharpness(copied, data, 0.2, 1, methods.SAM()), rtol=1e-12, atol=0)
    assert abs(actual - expected) > 1e-6  # another column: the comparison can tell


def test_sharpness_by_micro_batch_size():
    model, data = mlp(F64), batch(dtype=F64)
    actual = flatness.sharpness(model, loss_fn_of(model), data, 0.3, micro_batch_size=4)
    assert actual == flatness.sharpness(model, loss_fn_of(model), data, 0.3, 2)


def test_sharpness_without_a_radius_is_zero_for_all_the_dropout():
    model = everything().train()
    assert flatness.sharpness(model, loss_fn_of(model), images(), 0.0, 3) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sharpness_is_nan_where_a_gradient_is_not_finite(value):
    model = mlp(F64)
    before = weights(model)
    model[0].weight.register_hook(lambda g: g * value)
    assert flatness.sharpness(model, loss_fn_of(model), batch(dtype=F64), 0.1, 2).isnan()
    assert same_bits(model.parameters(), before)


@pytest.mark.host
def test_sharpness_inside_autocast_sees_the_perturbed_weights():
    """Autocast keeps casts of weights, by which the weights at w + e would be those at w."""
    model, data = mlp(), batch()

    def under_autocast(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, x, y)

    expected = flatness.sharpness(model, under_autocast, data, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = flatness.sharpness(model, loss_fn_of(model), data, 0.5)
    assert actual == expected
    assert actual > 0


# ---- sweeps ----------------------------------------------------------------------------------------------------------

RHOS = [0.3, 0.02, 0.1]


def sweep(model: nn.Module, loss_fn: Callable[..., Tensor], data, **options) -> flatness.RhoSweep:
    """Of one batch, called as the other functions are."""
    return flatness.rho_sweep(model, loss_fn, [data], **options)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("method", WITHOUT_MOMENTUM)
def test_a_sweep_is_the_sharpness_of_every_rho(method, count, backend):
    """In float64 all arrives. F-SAM's mean moves once for each micro-batch, however many the rhos."""
    model, data = mlp(F64), batch(dtype=F64)
    found = sweep(
        model, loss_fn_of(model), data, rhos=RHOS, num_micro_batches=count, method=METHODS[method], backend=backend
    )
    assert found.rhos.tolist() == sorted(RHOS)
    for rho, rise in zip(found.rhos.tolist(), found.rise, strict=True):
        expected = plain_sharpness(mlp(F64), data, rho, count, METHODS[method])
        torch.testing.assert_close(rise, expected.cpu(), rtol=1e-12, atol=1e-14)
    ones = torch.ones(3, count, dtype=F64, device="cpu")
    torch.testing.assert_close(found.arrived, ones, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.along, ones, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.moved, ones, rtol=0, atol=0)
    losses = torch.stack([loss_of(model, *part).detach() for part in split(data, SIZES[count])]).cpu()
    torch.testing.assert_close(found.losses, losses, rtol=1e-14, atol=0)
    assert found.loss == pytest.approx(mean_loss(model, data, SIZES[count]).item(), rel=1e-14)


@pytest.mark.parametrize("method", [methods.SAM, methods.VaSSO, methods.GapSAM])
def test_a_chosen_part_is_measured_by_every_function(method, backend):
    """What is not chosen stays, so that the others might as well be frozen."""
    data, found = batch(dtype=F64), {}
    for way in ("only", "frozen"):
        model = mlp(F64)
        options = {"backend": backend, "method": method()}
        if way == "only":
            options["method"] = method(only=model[2].parameters())
        else:
            model[0].requires_grad_(False)
        loss_fn = loss_fn_of(model)
        found[way] = [
            flatness.sharpness(model, loss_fn, data, rho=0.1, **options),
            sweep(model, loss_fn, data, rhos=RHOS, **options).rise,
            flatness.loss_slice(model, loss_fn, data, points=[0.1, 0.2], **options),
        ]
    for of_part, of_frozen in zip(*found.values(), strict=True):
        torch.testing.assert_close(of_part, of_frozen, rtol=1e-12, atol=1e-14)


def test_the_spread_of_a_sweep_is_the_deviation_over_the_samples():
    """Of micro-batches that differ in size each sample counts alike."""
    model, data = mlp(F64), batch(dtype=F64)
    found = sweep(model, loss_fn_of(model), data, rhos=RHOS, micro_batch_size=4)
    assert found.shares.tolist() == pytest.approx([4 / 7, 3 / 7])
    samples = found.rises.repeat_interleave(torch.tensor([4, 3], device="cpu"), 1)
    torch.testing.assert_close(found.spread, samples.std(1, correction=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.rise, samples.mean(1), rtol=1e-12, atol=0)
    assert (found.spread > 1e-4).all()


@pytest.mark.parametrize("method", ["SAM", "ASAM", "F-SAM", "Sparse SAM"])
def test_batches_of_a_sweep_count_alike_and_follow_each_other(method):
    model, data = mlp(F64), batch(dtype=F64)
    options = {"method": METHODS[method], "rhos": RHOS}
    several = flatness.rho_sweep(model, loss_fn_of(model), split(data, [4, 3]), micro_batch_size=2, **options)
    whole = sweep(model, loss_fn_of(model), data, micro_batch_size=2, **options)
    assert several.shares.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 3, 1 / 6])
    assert whole.shares.tolist() == pytest.approx([2 / 7, 2 / 7, 2 / 7, 1 / 7])
    torch.testing.assert_close(several.rises, whole.rises, rtol=1e-12, atol=1e-14)


def plain_arrival(model: nn.Module, parts, rho: float, method: methods.SAM) -> Tensor:
    """‖a‖/‖e‖, ⟨a, e⟩/‖e‖² and the share that moved, by micro-batch, of SAM, ASAM or F-SAM: ``[3, M]``."""
    params, dtype = list(model.parameters()), model[0].weight.dtype
    w = torch.cat([p.detach().double().flatten() for p in params])
    stretch = w.abs() + method.eta if isinstance(method, methods.AdaptiveSAM) else torch.ones_like(w)
    ema = stored_ema = None
    columns = []
    for part in parts:
        g = torch.cat([t.double().flatten() for t in torch.autograd.grad(loss_of(model, *part), params)])
        points = []
        for mean in (ema, stored_ema):
            d = g if mean is None else g - method.sigma * mean
            points.append(rho * stretch**2 * d / ((stretch * d).norm() + 1e-12))
        if isinstance(method, methods.FriendlySAM):
            ema, stored_ema = (
                g if mean is None else method.lmbda * mean + (1 - method.lmbda) * g for mean in (ema, stored_ema)
            )
            stored_ema = stored_ema.to(dtype).double()
        e, a = points[0], (w + points[1]).to(dtype).double() - w
        columns.append(
            torch.stack([a.norm() / e.norm(), a @ e / (e @ e), ((a != 0) & (e != 0)).sum() / (e != 0).sum()])
        )
    return torch.stack(columns, 1).cpu()


@pytest.mark.parametrize("method", ["SAM", "ASAM", "F-SAM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_arrives_in_the_stored_dtype(dtype, method, backend):
    """Weights of very different sizes: in 16 bits a large one does not notice what moves a small one."""
    model, data = mlp(dtype), batch(dtype=dtype)
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, 15).view(5, 3).to(model[0].weight))
    found = sweep(
        model, loss_fn_of(model), data, rhos=RHOS, num_micro_batches=3, method=METHODS[method], backend=backend
    )
    for r, rho in enumerate(sorted(RHOS)):
        expected = plain_arrival(model, split(data, SIZES[3]), rho, METHODS[method])
        actual = torch.stack([found.arrived[r], found.along[r], found.moved[r]])
        torch.testing.assert_close(actual, expected, rtol=2e-5 if dtype == torch.float32 else 1e-3, atol=0)
    if dtype != torch.float32:
        assert (found.moved < 0.99).any()
        assert ((found.along - 1).abs() > 1e-3).any()


def test_a_sweep_of_gradients_that_are_not_finite_is_nan_and_says_nothing_is_worth_trying():
    model = mlp(F64)
    before = weights(model)
    model[0].weight.register_hook(lambda g: g * math.inf)
    found = sweep(model, loss_fn_of(model), batch(dtype=F64), rhos=RHOS, num_micro_batches=2)
    assert found.rises.isnan().all()
    assert found.worth_trying() is None
    assert "nan" in str(found)
    assert same_bits(model.parameters(), before)


def sweep_of(rises, along=None) -> flatness.RhoSweep:
    """One of a loss of 2, at rho = 1, 2, 3, …, with the same along and arrived for all."""
    rises = torch.tensor(rises, dtype=F64)
    along = torch.ones_like(rises) if along is None else torch.tensor(along, dtype=F64)
    ones = torch.ones(1, dtype=F64)
    columns = [t[:, None] for t in (rises, along, along, along)]
    return flatness.RhoSweep(torch.arange(1.0, len(rises) + 1), 2 * ones, ones, *columns)


WORTH = {
    "the rises between": (sweep_of([0.01, 0.03, 1.9, 2.1]), {}, (2, 3)),
    "ends belong to it": (sweep_of([0.01, 0.02, 2.0, 2.1]), {}, (2, 3)),
    "none": (sweep_of([0.01, 3.0]), {}, None),
    "a fall is none": (sweep_of([-0.5, -0.1]), {}, None),
    "what does not arrive is left out": (sweep_of([0.1, 0.2, 0.3], [0.2, 0.5, 0.9]), {}, (2, 3)),
    "given bounds": (sweep_of([0.1, 0.2, 0.3], [0.2, 0.4, 0.9]), {"least": 0.1, "most": 0.12, "along": 0.3}, (2, 2)),
}


@pytest.mark.parametrize("case", WORTH)
def test_what_is_worth_trying(case):
    found, bounds, expected = WORTH[case]
    assert found.worth_trying(**bounds) == expected


def test_a_sweep_prints_as_a_table():
    head, names, line, *rows = str(sweep_of([0.01, 0.03, 2.1], [0.6, 0.7, 1.0])).splitlines()
    assert head == "loss 2, 1 micro-batches"
    assert names.split() == ["rho", "rise", "±", "rise", "/", "loss", "arrived", "along", "moved"]
    assert set(line) == {"─"}
    assert [row.split() for row in rows] == [
        ["1", "0.01", "0", "0.50%", "0.600", "0.600", "0.600"],
        ["2", "0.03", "0", "1.50%", "0.700", "0.700", "0.700", "worth", "trying"],
        ["3", "2.1", "0", "105.00%", "1.000", "1.000", "1.000"],
    ]
    marks = [row.endswith("worth trying") for row in str(sweep_of([0.1, 5.0, 0.1], [1.0] * 3)).splitlines()[3:]]
    assert marks == [True, False, True]


def test_a_sweep_is_drawn_on_two_axes(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots(1, 2)
    sweep_of([0.01, 0.03, 2.1], [0.6, 0.7, 1.0]).draw(*axes)
    figure.savefig(tmp_path / "sweep.png")
    ((line, *_),) = axes[0].containers
    assert line.get_xydata().tolist() == [[1, 0.005], [2, 0.015], [3, 1.05]]
    assert [line.get_label() for line in axes[1].lines] == ["arrived", "along", "moved"]
    assert axes[1].lines[1].get_ydata().tolist() == [0.6, 0.7, 1.0]
    assert [len(panel.patches) for panel in axes] == [1, 1]


# ---- the Hessian -----------------------------------------------------------------------------------------------------


def dense_hessian(model: nn.Module, loss: Tensor) -> Tensor:
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    rows = []
    for entry in torch.cat([g.reshape(-1) for g in grads]):
        if entry.requires_grad:
            row = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([h.reshape(-1) for h in row]))
        else:
            rows.append(torch.zeros(sum(p.numel() for p in params), dtype=F64))
    return torch.stack(rows)


def largest(model: nn.Module, data, sizes=(7,)) -> Tensor:
    return torch.linalg.eigvalsh(dense_hessian(model, mean_loss(model, data, sizes))).flip(0).cpu()


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.middle.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).tanh()).tanh())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.RNN(1, 2, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[..., None])[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(1, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x[:, None, :, None]).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v)[:, 0, -1]


def frozen() -> nn.Module:
    model = mlp(F64)
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


MODELS = {
    "tanh": lambda: mlp(F64),
    "BatchNorm, eval": lambda: sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval(),
    "BatchNorm, training": lambda: sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    "frozen": frozen,
    "tied and unused": Tied,
    "linear": lambda: sequential(nn.Linear(3, 2)),  # every eigenvalue twice
    "recurrent": Recurrent,
    "attention": Attention,
}


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("model", MODELS)
def test_eigenvalues_are_those_of_the_dense_hessian(model, k):
    model, data = MODELS[model](), batch(dtype=F64)
    actual = flatness.hessian_eigenvalues(model, loss_fn_of(model), data, k, tolerance=1e-8)
    assert (actual.dtype, actual.device.type) == (F64, "cpu")
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(actual, largest(model, data)[:k], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("model", ["tanh", "BatchNorm, eval", "tied and unused", "linear"])
def test_eigenvalues_by_micro_batches(model, count):
    model, data = MODELS[model](), batch(dtype=F64)
    most = 0

    def loss_fn(x, y):
        nonlocal most
        most = max(most, len(x))
        return loss_of(model, x, y)

    actual = flatness.hessian_eigenvalues(model, loss_fn, data, 2, num_micro_batches=count, tolerance=1e-8)
    torch.testing.assert_close(actual, largest(model, data)[:2], rtol=1e-10, atol=1e-12)
    assert most == max(SIZES[count])  # never the whole batch at once


@pytest.mark.parametrize("model", MODELS)
def test_eigenvalues_on_a_double_copy_are_those_of_the_double_model(model):
    exact, data = MODELS[model](), batch()
    exact.float().double()  # weights that float32 holds
    expected = flatness.hessian_eigenvalues(exact, loss_fn_of(exact), [t.double() for t in data], 3)
    stored = exact.float()
    before = snapshot(stored)
    actual = flatness.hessian_eigenvalues(stored, loss_fn_of(stored), data, 3, dtype=F64)
    assert_unchanged(stored, before)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    stored(data[0])  # and it runs in its own dtype


def test_all_eigenvalues():
    model, data = mlp(F64), batch(dtype=F64)
    expected = largest(model, data)
    actual = flatness.hessian_eigenvalues(model, loss_fn_of(model), data, len(expected))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


class Quadratic(nn.Module):
    """L(w) = ½ Σ h w² for any sample, with its parameters in two tensors."""

    def __init__(self, h: list[float]):
        super().__init__()
        self.h = torch.tensor(h, dtype=F64)
        self.a = nn.Parameter(torch.ones(2, dtype=F64))
        self.b = nn.Parameter(torch.ones(len(h) - 2, dtype=F64))

    def loss(self, x: Tensor) -> Tensor:
        return (self.h * torch.cat([self.a, self.b]) ** 2).sum() / 2 * x.mean()


SPECTRA = {
    "simple": [3.0, -7.0, 0.5, 11.0, 2.0, 0.0],
    "degenerate at the top": [5.0, 1.0, 5.0, 3.0, 5.0, 2.0, 1.0],
    "two values": [2.0, 1.0, 1.0, 2.0, 1.0, 1.0],
    "a multiple of one": [4.0] * 5,
    "zero": [0.0] * 5,
    "negative": [-1.0, -2.0, -2.0, -8.0, -1.0],
    "one direction": [0.0, 0.0, 6.0, 0.0, 0.0],
    "far apart": [1e6, 1.0, 1e-6, 1e-6, -1.0],
}


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigenvalues_and_vectors_of_a_diagonal_quadratic(spectrum, k):
    h = torch.tensor(SPECTRA[spectrum], dtype=F64)
    model = Quadratic(SPECTRA[spectrum])
    values, vectors = flatness.hessian_eigenvalues(
        model, model.loss, torch.ones(3, dtype=F64), k, tolerance=1e-10, eigenvectors=True
    )
    scale = h.abs().max().item()
    torch.testing.assert_close(values, h.sort(descending=True).values[:k].cpu(), rtol=1e-12, atol=1e-12 * scale)
    v = torch.stack([torch.cat([t.flatten() for t in vector]) for vector in vectors])
    assert [[t.shape for t in vector] for vector in vectors] == [[p.shape for p in model.parameters()]] * k
    torch.testing.assert_close(v @ v.T, torch.eye(k, dtype=F64), rtol=0, atol=1e-10)
    torch.testing.assert_close(v * h, v * values.to(v.device)[:, None], rtol=0, atol=1e-9 * max(scale, 1))


def test_a_loss_that_is_linear_has_no_curvature():
    model = sequential(nn.Linear(3, 1))
    values = flatness.hessian_eigenvalues(model, lambda x: model(x).mean(), batch(dtype=F64)[0], 3)
    assert values.tolist() == [0, 0, 0]


def test_one_graph_serves_all_products_of_a_single_micro_batch():
    model, data = mlp(F64), batch(dtype=F64)
    for count, more in ((1, False), (2, True)):
        calls = 0

        def loss_fn(x, y):
            nonlocal calls
            calls += 1
            return loss_of(model, x, y)

        flatness.hessian_eigenvalues(model, loss_fn, data, num_micro_batches=count, tolerance=1e-6)
        assert (calls > 1) == more


@pytest.mark.parametrize("k", [1, 3])
def test_what_the_products_cannot_reach_is_not_searched(k):
    """Two values: two products of each start vector span all that there is; the rest would be rounding."""
    model, products = Quadratic([2.0, 1.0] * 20), 0

    def loss_fn(x):
        nonlocal products
        products += 1
        return model.loss(x)

    ones = torch.ones(2, dtype=F64)
    values = flatness.hessian_eigenvalues(model, loss_fn, ones, k, num_micro_batches=2, tolerance=1e-300)
    torch.testing.assert_close(values, torch.full((k,), 2.0, dtype=F64, device="cpu"))
    assert products == 2 * 2 * k


def test_eigenvalues_are_the_same_bits_whatever_the_random_state():
    model, data = mlp(), batch()
    first = flatness.hessian_eigenvalues(model, loss_fn_of(model), data, 2)
    torch.manual_seed(99)
    assert same_bits([flatness.hessian_eigenvalues(model, loss_fn_of(model), data, 2)], [first])
    other = flatness.hessian_eigenvalues(model, loss_fn_of(model), data, 2, seed=1)
    torch.testing.assert_close(other, first, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eigenvalues_in_the_stored_dtype(dtype):
    model, data = mlp(dtype), batch(dtype=dtype)
    expected = flatness.hessian_eigenvalues(model, loss_fn_of(model), data, 2, dtype=F64)
    actual = flatness.hessian_eigenvalues(model, loss_fn_of(model), data, 2, tolerance=0.05)
    torch.testing.assert_close(actual, expected, rtol={torch.float32: 2e-3}.get(dtype, 0.1), atol=0)


def test_too_few_products_are_told():
    model, data = mlp(F64), batch(dtype=F64)
    with pytest.warns(UserWarning, match=r"after 3 Hessian-vector products.*max_iterations.*tolerance above 1e-06"):
        values = flatness.hessian_eigenvalues(model, loss_fn_of(model), data, tolerance=1e-6, max_iterations=3)
    assert 0 < values.item() <= largest(model, data)[0]


def test_the_tolerance_bounds_the_error():
    model, data = mlp(F64), batch(dtype=F64)
    expected = largest(model, data)
    for tolerance in (0.5, 0.1, 1e-2, 1e-3):
        values = flatness.hessian_eigenvalues(model, loss_fn_of(model), data, 2, tolerance=tolerance)
        distance = (values[:, None] - expected).abs().min(dim=1).values
        assert (distance <= tolerance * expected.abs().max()).all()


@pytest.mark.parametrize("where", ["gradient", "curvature"])
def test_eigenvalues_are_nan_where_products_are_not_finite(where):
    model, data = mlp(F64), batch(dtype=F64)
    power = 1.0 if where == "gradient" else 1.5
    scale = math.nan if where == "gradient" else 1.0

    def loss_fn(x, y):
        at_zero = (
            (model[0].bias - model[0].bias.detach()).abs().pow(power).sum()
        )  # |b|^1.5 has no second derivative at 0
        return scale * loss_of(model, x, y) + at_zero

    values, vectors = flatness.hessian_eigenvalues(model, loss_fn, data, 2, eigenvectors=True)
    assert values.isnan().all()
    assert all(t.isnan().all() for vector in vectors for t in vector)


# ---- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [name for name in WITHOUT_MOMENTUM if name != "LE-SAM"]
)  # whose e is not in proportion to rho
def test_the_slice_along_the_ascent_goes_where_the_method_looks(method, backend):
    model, data = mlp(F64), batch(dtype=F64)
    options = {"method": METHODS[method], "backend": backend}
    t, losses = flatness.loss_slice(model, loss_fn_of(model), data, [0.0, 0.1, 0.4], **options)
    assert t.tolist() == [0.0, 0.1, 0.4]
    torch.testing.assert_close(losses[0], mean_loss(model, data).detach().cpu(), rtol=1e-14, atol=0)
    for rho, loss in zip(t[1:].tolist(), losses[1:], strict=True):
        rise = flatness.sharpness(model, loss_fn_of(model), data, rho, **options).cpu()
        torch.testing.assert_close(loss - losses[0], rise, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("count", SIZES)
def test_a_slice_by_micro_batches_is_that_of_the_batch(count):
    model, data = mlp(F64), batch(dtype=F64)
    whole = flatness.loss_slice(model, loss_fn_of(model), data, torch.linspace(-1, 1, 5))
    parts = flatness.loss_slice(model, loss_fn_of(model), data, torch.linspace(-1, 1, 5), num_micro_batches=count)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_the_slice_along_given_tensors():
    model = Quadratic(SPECTRA["simple"])
    u = [torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0, 3.0, 0.5])]
    t, losses = flatness.loss_slice(model, model.loss, torch.ones(2, dtype=F64), [-2, -0.5, 0, 1.25], u)
    w = 1 + t[:, None] * torch.cat(u).double().cpu()
    torch.testing.assert_close(losses, (model.h.cpu() * w**2).sum(1) / 2, rtol=1e-14, atol=1e-14)


def test_the_random_direction_has_unit_norm_and_its_seed():
    model = Quadratic([1.0] * 6)
    with torch.no_grad():
        model.a.zero_(), model.b.zero_()
    ones = torch.ones(2, dtype=F64)
    _, losses = flatness.loss_slice(model, model.loss, ones, [1.0, 3.0], "random")
    torch.testing.assert_close(losses, torch.tensor([0.5, 4.5], dtype=F64, device="cpu"))
    model.h *= torch.arange(6)
    slices = [flatness.loss_slice(model, model.loss, ones, [1.0], "random", seed=s)[1].item() for s in (0, 0, 1)]
    assert slices[0] == slices[1] != slices[2]


def test_the_slice_along_the_top_eigenvector_has_its_curvature():
    model, data = mlp(F64), batch(dtype=F64)
    values, (v,) = flatness.hessian_eigenvalues(model, loss_fn_of(model), data, tolerance=1e-8, eigenvectors=True)
    h = 1e-3
    _, losses = flatness.loss_slice(model, loss_fn_of(model), data, [-h, 0.0, h], v)
    assert (losses[0] - 2 * losses[1] + losses[2]).item() / h**2 == pytest.approx(values.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_in_the_stored_dtype(dtype):
    model, data = mlp(dtype), batch(dtype=dtype)
    exact = mlp(dtype).double()
    before = weights(model)
    points = [-0.5, 0.0, 0.5]
    _, actual = flatness.loss_slice(model, loss_fn_of(model), data, points)
    _, expected = flatness.loss_slice(exact, loss_fn_of(exact), [t.double() for t in data], points)
    torch.testing.assert_close(actual, expected, rtol={torch.float32: 1e-5}.get(dtype, 0.05), atol=0)
    assert same_bits(model.parameters(), before)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_may_be_a_tensor_a_dict_or_a_list_of_arguments(count):
    model, (x, y) = mlp(F64), batch(dtype=F64)
    forms = {
        "tuple": ((x, y), loss_fn_of(model)),
        "list": ([x, y], loss_fn_of(model)),
        "tensor": (torch.cat([x, y], 1), lambda xy: loss_of(model, xy[:, :3], xy[:, 3:])),
        "dict": ({"x": x, "y": y}, lambda d: loss_of(model, d["x"], d["y"])),
        "nested": ((x, {"y": y, "mask": None}), lambda x, d: loss_of(model, x, d["y"])),
    }
    results = {
        form: [
            flatness.sharpness(model, fn, data, 0.1, count).cpu(),
            flatness.hessian_eigenvalues(model, fn, data, num_micro_batches=count, dtype=F64)[0],
            flatness.loss_slice(model, fn, data, [0.1], num_micro_batches=count)[1][0],
        ]
        for form, (data, fn) in forms.items()
    }
    for values in results.values():
        torch.testing.assert_close(values, results["tuple"], rtol=1e-12, atol=0)


def test_one_micro_batch_may_be_anything_and_comes_whole_each_time():
    model, (x, y) = mlp(F64), batch(dtype=F64)

    def loss_fn(inputs, name):
        assert name == "a batch"
        return loss_of(model, inputs.pop("x"), inputs.pop("rest")[0].pop())

    for function, (call, options) in FUNCTIONS.items():
        data = (UserDict(x=x, rest=[[y]]), "a batch")
        in_64 = {"dtype": F64} if function == "eigenvalues" else {}
        same = call(model, loss_fn, data, **options), call(model, loss_fn_of(model), (x, y), **options)
        same = [getattr(result, "rises", result) for result in same]
        torch.testing.assert_close(*same, rtol=1e-12, atol=0)
        call(
            model.float(),
            loss_fn,
            rebuilt(data, lambda t: t.float() if isinstance(t, Tensor) else t),
            **options,
            **in_64,
        )
        model.double()


def test_warnings_are_not_given_where_all_is_well():
    model = everything().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flatness.hessian_eigenvalues(model, loss_fn_of(model), images(), 2, num_micro_batches=2, dtype=torch.float32)


# ---- errors ----------------------------------------------------------------------------------------------------------


def no_gradient(model: nn.Module) -> Callable:
    def loss_fn(x, y):
        with torch.no_grad():
            return loss_of(model, x, y)

    return loss_fn


def test_a_late_start_is_left_out():
    model = mlp(F64)
    arguments = model, loss_fn_of(model), batch(6, F64), 0.1, 2
    late, now = (flatness.sharpness(*arguments, method=methods.FriendlySAM(start=n)) for n in (7, 0))
    assert torch.equal(late, now)


class Bad:
    """One bad argument of the function ``only``, or of all; ``match``: what the message must say."""

    def __init__(
        self, match: str, error: type[Exception] = ValueError, *, only="", prepare=None, make_loss=None, **other
    ):
        self.match, self.error, self.only, self.arguments = match, error, only, other
        self.prepare = prepare or (lambda model: None)
        self.make_loss = make_loss or loss_fn_of


BAD = {
    "rho -1": Bad(r"rho.*>= 0.*-1", only="sharpness", rho=-1.0),
    "rho nan": Bad(r"rho.*nan", only="sharpness", rho=math.nan),
    "rho inf": Bad(r"rho.*inf", only="sharpness", rho=math.inf),
    "rho a string": Bad(r"rho.*'0\.1'", only="sharpness", rho="0.1"),
    "rho a function": Bad(r"rho.*function.*give a number", TypeError, only="sharpness", rho=lambda step: 0.1),
    "k 0": Bad(r"k must be an integer >= 1, got 0", only="eigenvalues", k=0),
    "k 2.0": Bad(r"k must be an integer.*2\.0", only="eigenvalues", k=2.0),
    "k True": Bad(r"k must be an integer.*True", only="eigenvalues", k=True),
    "k too many": Bad(r"k must be at most the 32 parameters.*33", only="eigenvalues", k=33),
    "max_iterations below k": Bad(r"max_iterations.*>= 3.*2", only="eigenvalues", k=3, max_iterations=2),
    "tolerance 0": Bad(r"tolerance.*> 0.*got 0", only="eigenvalues", tolerance=0),
    "tolerance nan": Bad(r"tolerance.*nan", only="eigenvalues", tolerance=math.nan),
    "dtype": Bad(r"dtype.*float64.*bfloat16", only="eigenvalues", dtype=torch.bfloat16),
    "seed": Bad(r"seed.*-1", only="eigenvalues", seed=-1),
    "no rhos": Bad(r"rhos.*at least one.*\[\]", only="sweep", rhos=[]),
    "rhos 0": Bad(r"rhos.*> 0.*\[0\.1, 0\]", only="sweep", rhos=[0.1, 0]),
    "rhos nan": Bad(r"rhos.*finite.*nan", only="sweep", rhos=[math.nan]),
    "rhos in a matrix": Bad(r"rhos.*1-d.*tensor", only="sweep", rhos=torch.ones(2, 2)),
    "a number for rhos": Bad(r"rhos.*list.*0\.1", only="sweep", rhos=0.1),
    "no points": Bad(r"points.*at least one.*\[\]", only="slice", points=[]),
    "points in a matrix": Bad(r"points.*1-d.*tensor", only="slice", points=torch.ones(2, 2)),
    "points nan": Bad(r"points.*finite.*nan", only="slice", points=[0.0, math.nan]),
    "a direction by name": Bad(r"'ascent', 'random'.*'gradient'", only="slice", direction="gradient"),
    "a direction of other shapes": Bad(r"\(5, 3\).*got \[\(3,\)\]", only="slice", direction=[torch.ones(3)]),
    "a direction of numbers": Bad(r"\(5, 3\).*got \[1\.0\]", only="slice", direction=[1.0]),
    "method a class": Bad(r"method.*FriendlySAM", TypeError, only="sharpness", method=methods.FriendlySAM),
    "a method of momentum": Bad(r"MomentumSAM.* of which nothing is known", only="sweep", method=methods.MomentumSAM()),
    "a budget by the step": Bad(
        r"sigma.*function.*give a number",
        TypeError,
        only="sweep",
        method=methods.LossEquatedSAM(sigma=lambda step: 0.1),
    ),
    "backend": Bad(r"backend.*'cudnn'", only="sharpness", backend="cudnn"),
    "count 0": Bad(r"num_micro_batches.*>= 1.*0", num_micro_batches=0),
    "count above the samples": Bad(r"num_micro_batches=9.*7 samples", num_micro_batches=9),
    "both": Bad(r"num_micro_batches=2.*micro_batch_size=3", num_micro_batches=2, micro_batch_size=3),
    "model": Bad(r"model.*Module.*str", TypeError, model="resnet"),
    "loss_fn": Bad(r"loss_fn.*function.*3", TypeError, loss_fn=3),
    "no data": Bad(r"data is empty.*\(x, y\)", data=()),
    "no samples": Bad(r"no samples", data=(torch.ones(0, 3), torch.ones(0, 2)), num_micro_batches=2),
    "lengths": Bad(r"share dim 0.*\[6, 7\]", data=(torch.ones(7, 3), torch.ones(6, 2)), num_micro_batches=2),
    "a batch of strings": Bad(r"batch.*str", TypeError, data=("x", "y"), num_micro_batches=2),
    "a loss by sample": Bad(r"loss_fn.*\(7,\).*mean", make_loss=lambda model: lambda x, y: model(x).sum(1)),
    "a loss that is a number": Bad(r"loss_fn.*got 1\.5", make_loss=lambda model: lambda x, y: 1.5),
    "a loss without gradient": Bad(r"depends on no parameter.*no_grad", make_loss=no_gradient),
    "the loss of another model": Bad(r"depends on no parameter.*this model", make_loss=lambda _: loss_fn_of(mlp(F64))),
    "all frozen": Bad(r"Sequential has no parameter.*requires_grad_", prepare=lambda m: m.requires_grad_(False)),
    "lazy": Bad(r"3\.weight has no shape yet.*run", prepare=lambda m: m.append(nn.LazyLinear(2))),
    "complex": Bad(r"0\.weight must be one of.*complex", TypeError, prepare=lambda m: m[0].to(torch.complex128)),
}
FUNCTIONS = {
    "sharpness": (flatness.sharpness, {"rho": 0.1}),
    "eigenvalues": (flatness.hessian_eigenvalues, {}),
    "slice": (flatness.loss_slice, {"points": [0.1]}),
    "sweep": (sweep, {"rhos": [0.1, 0.2]}),
}


CASES = [(bad, f) for bad, case in BAD.items() for f in FUNCTIONS if case.only in ("", f)]


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
@pytest.mark.parametrize(("bad", "function"), CASES, ids=" - ".join)
def test_a_bad_argument_is_named_and_nothing_is_changed(bad, function):
    bad, (call, arguments), model = BAD[bad], FUNCTIONS[function], mlp(F64)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    bad.prepare(model)
    arguments = {
        "model": model,
        "loss_fn": bad.make_loss(model),
        "data": batch(dtype=F64),
        **arguments,
        **bad.arguments,
    }
    before = snapshot(model[2])  # the layer that no case replaces
    with pytest.raises(bad.error, match=f"(?s){bad.match}"):
        call(**arguments)
    assert_unchanged(model[2], before)


BATCHES = {
    "one batch": ((torch.ones(7, 3), torch.ones(7, 2)), r"several batches, e\.g\. \[\(x, y\)\].*got a tuple"),
    "a tensor": (torch.ones(7, 3), r"got a Tensor"),
    "a dict": ({"x": torch.ones(7, 3)}, r"got a dict"),
    "one batch of a loader": ([torch.ones(7, 3), torch.ones(7, 2)], r"got a list of tensors, as a loader gives"),
    "a number": (3, r"got a int"),
    "none": ([], r"batches is empty.*\[\(x, y\)\]"),
    "none of a loader": (iter(()), r"batches is empty"),
}


def test_batches_may_be_tensors_that_a_loader_gives_one_by_one():
    model, (x, y) = mlp(F64), batch(dtype=F64)
    xy = torch.cat([x, y], 1)

    def loss_fn(xy):
        return loss_of(model, xy[:, :3], xy[:, 3:])

    expected = flatness.rho_sweep(model, loss_fn, [(xy[:4],), (xy[4:],)]).rises
    assert same_bits([flatness.rho_sweep(model, loss_fn, iter([xy[:4], xy[4:]])).rises], [expected])
    assert same_bits([flatness.rho_sweep(model, loss_fn, [xy[:4]]).rises], [expected[:, :1]])


@pytest.mark.parametrize("bad", BATCHES)
def test_what_is_not_several_batches_is_named(bad):
    model = mlp()
    batches, match = BATCHES[bad]
    with pytest.raises((TypeError, ValueError), match=match):
        flatness.rho_sweep(model, loss_fn_of(model), batches)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sparse_gradients_are_refused(function):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))
    before = snapshot(model)
    call, arguments = FUNCTIONS[function]
    with pytest.raises(TypeError, match=r"\(5, 3\).*sparse.*sparse=False"):
        call(model, lambda x: model(x).square().mean(), torch.tensor([[0, 1], [4, 4]]), **arguments)
    assert_unchanged(model, before)


def test_a_method_that_perturbs_nothing_is_refused(monkeypatch):
    model = mlp(F64)

    def once(opt) -> Iterator[None]:
        yield None

    monkeypatch.setattr(flatness.MicroBatchSAM, "passes", lambda opt: Passes(once(opt)))
    with pytest.raises(ValueError, match=r"SAM\(.*perturbs nothing.*give one that does"):
        flatness.sharpness(model, loss_fn_of(model), batch(dtype=F64), 0.1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_buffer_that_the_forward_makes_stays_in_the_models_dtype(function):
    class Net(nn.Linear):
        made = False

        def forward(self, x):
            if not self.made:
                self.made = True
                self.register_buffer("scale", torch.full((3,), 2.0, dtype=x.dtype), persistent=False)
            return super().forward(x * self.scale)

    model = Net(3, 2)
    call, options = FUNCTIONS[function]
    call(model, loss_fn_of(model), batch(), **options, **({"dtype": F64} if function == "eigenvalues" else {}))
    assert model.scale.dtype == torch.float32
    model(batch()[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inference_mode_is_named(function):
    model = mlp()
    call, options = FUNCTIONS[function]
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\) is on: leave it"):
        call(model, loss_fn_of(model), batch(), **options)
