# SPDX-License-Identifier: Apache-2.0
"""Running statistics, and every other buffer, see each micro-batch once, as if it had been one plain forward."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from msam_kernels import SAM, MicroBatchSAM
from plain import METHODS, WITHOUT_MOMENTUM, random_numbers, same_bits, weights


class Ghost(nn.BatchNorm1d):
    """Ghost batch norm in one call, which asks for no switch."""

    def forward(self, x):
        normalised = [
            F.batch_norm(
                part,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
            for part in x.chunk(2 if len(x) > 3 else 1)
        ]
        self.num_batches_tracked += self.training
        return torch.cat(normalised)


class Synchronised(nn.BatchNorm1d):
    """Statistics that are computed here, and assigned rather than written in place, as where processes exchange them."""

    def forward(self, x):
        mean, var = x.mean(0), x.var(0, unbiased=False)
        if self.training:
            self.running_mean = self.running_mean.lerp(mean.detach(), self.momentum)
            self.running_var = self.running_var.lerp(var.detach(), self.momentum)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


class Codebook(nn.Module):
    """Buffers that every forward changes in its own way, beside some that nobody can change, or that are not there."""

    def __init__(self):
        super().__init__()
        self.register_buffer("embed", torch.randn(6, 4))
        self.register_buffer("size", torch.ones(6))
        self.register_buffer("by_data", torch.zeros(2, 3))
        self.register_buffer("pointed", torch.zeros(4))
        self.register_buffer("view", self.embed[1])
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.register_buffer("later", None)
        self.register_buffer("empty", torch.ones(0))

    def forward(self, z):
        index = torch.cdist(z, self.embed).argmin(1)
        quantised = self.embed[index]
        with torch.no_grad():
            self.size.mul_(0.8).add_(F.one_hot(index, 6).to(z).sum(0), alpha=0.2)
            self.embed[index] += 0.1 * z
            self.by_data.data.add_(z.mean())
            self.pointed.data = self.pointed.data + z.mean(0)
            self.sparse.mul_(2)
            self.later = z.mean() if self.later is None else self.later + z.mean()
        return z + (quantised - z).detach()


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        return torch.jit.script(nn.BatchNorm1d(4))


NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "momentum=None": lambda: nn.BatchNorm1d(4, momentum=None),
    "momentum=0.5": lambda: nn.BatchNorm1d(4, momentum=0.5),
    "not affine": lambda: nn.BatchNorm1d(4, affine=False),
    "without statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "eval": lambda: nn.BatchNorm1d(4).eval(),
    "InstanceNorm1d with statistics": lambda: InstanceNorm(True),
    "InstanceNorm1d": lambda: InstanceNorm(False),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "lazy": lambda: nn.LazyBatchNorm1d(),
    "ghost": lambda: Ghost(4),
    "synchronised": lambda: Synchronised(4),
    "codebook": Codebook,
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "spectral_norm as parametrization": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "TorchScript": scripted,
}


class InstanceNorm(nn.Module):
    def __init__(self, statistics: bool):
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=statistics)

    def forward(self, x):
        return self.norm(x.view(len(x), 2, 2)).view(len(x), 4)


def build(norm) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), NORMS[norm](), nn.Tanh(), nn.Linear(4, 2))
    training = model[1].training
    model.double()(torch.randn(5, 3, dtype=torch.float64))  # lazy layers get their shape
    model[1].train(training)
    return model


def data_of(step: int) -> torch.Tensor:
    return torch.randn(10, 3, dtype=torch.float64, generator=random_numbers(step)) + step


def loop(opt, model, data):
    for x in opt.passes(data):
        model(x).square().mean().backward()
    opt.step()
    opt.zero_grad()


def train_step(opt, model, data):
    opt.train_step(lambda x: model(x).square().mean(), data)


def closures(opt, model, data):
    def closure(x):
        return lambda: model(x).square().mean().backward()

    opt.step([closure(x) for x in data.tensor_split(opt.num_micro_batches)])


LOOPS = {"passes": loop, "train_step": train_step, "closures": closures}


def statistics(model):
    return {k: v.detach().to_dense().clone() for k, v in model.named_buffers()}


def twin_of(norm, model):
    """Another model in the same state, which for some layers ``deepcopy`` refuses."""
    twin = build(norm)
    for theirs, ours in zip(twin.modules(), model.modules(), strict=True):
        for name, buffer in ours.named_buffers(recurse=False):
            setattr(theirs, name, buffer.detach().clone())
    with torch.no_grad():
        for theirs, ours in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours)
    return twin


def assert_same_statistics(model, twin):
    assert statistics(model).keys() == statistics(twin).keys()
    assert same_bits(statistics(model).values(), statistics(twin).values())


@pytest.mark.parametrize("way", LOOPS)
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_statistics_are_those_of_one_forward_of_each_micro_batch(norm, micro_batches, way):
    model = build(norm)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.3, num_micro_batches=micro_batches, model=model)
    for step in range(3):
        twin = twin_of(norm, model)
        with torch.no_grad():
            for x in data_of(step).tensor_split(micro_batches):
                twin(x)
        LOOPS[way](opt, model, data_of(step))
        assert_same_statistics(model, twin)


@pytest.mark.parametrize("method", WITHOUT_MOMENTUM)
@pytest.mark.parametrize("norm", ["BatchNorm1d", "momentum=None", "InstanceNorm1d with statistics"])
def test_the_second_pass_normalises_as_training_does(norm, method):
    """With and without ``model=`` the weights move alike: statistics are recorded or not, never used."""
    results = []
    for pass_model in (True, False):
        model = build(norm)
        opt = MicroBatchSAM(
            SGD(model.parameters(), lr=0.1),
            0.3,
            num_micro_batches=2,
            method=METHODS[method],
            model=model if pass_model else None,
        )
        for step in range(3):
            loop(opt, model, data_of(step))
        results.append(weights(model))
    assert same_bits(*results)


def test_without_a_model_both_passes_are_recorded():
    model = build("BatchNorm1d")
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), num_micro_batches=2)
    before = model[1].num_batches_tracked.item()
    loop(opt, model, data_of(0))
    assert model[1].num_batches_tracked.item() == before + 4


@pytest.mark.parametrize("stop", range(4))
@pytest.mark.parametrize("how", ["break", "exception", "close", "restore", "an error in the model"])
@pytest.mark.parametrize("norm", NORMS)
def test_an_interrupted_loop_leaves_every_buffer_as_the_passes_at_w_did(norm, how, stop):
    model = build(norm)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), num_micro_batches=2, model=model)
    twin = twin_of(norm, model)
    iterator = opt.passes(data_of(0))
    for call in range(stop + 1):
        x = next(iterator)
        model(x).square().mean().backward()
        if call % 2 == 0:
            with torch.no_grad():
                twin(x)
            assert_same_statistics(model, twin)
    if how == "exception":
        with pytest.raises(KeyError):
            iterator.throw(KeyError())
    elif how == "an error in the model":
        with pytest.raises(RuntimeError), iterator:
            model(x[:, :2])
    elif how == "restore":
        opt.restore()
    elif how == "close":
        iterator.close()
    else:
        del iterator
    assert_same_statistics(model, twin)
    before = twin_of(norm, model)
    loop(opt, model, data_of(1))
    with torch.no_grad():
        for x in data_of(1).tensor_split(2):
            before(x)
    assert_same_statistics(model, before)


def test_an_exception_in_a_closure_leaves_every_buffer_as_the_pass_at_w_did():
    model = build("BatchNorm1d")
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), model=model)
    twin, calls = twin_of("BatchNorm1d", model), []
    twin(data_of(0))

    def closure():
        model(data_of(0)).square().mean().backward()
        calls.append(True)
        if len(calls) == 2:
            raise KeyError

    with pytest.raises(KeyError):
        opt.step(closure)
    assert_same_statistics(model, twin)


@pytest.mark.parametrize("inner_ends", ["finished", "broken off"])
@pytest.mark.parametrize("inner_in", range(4))
def test_loops_of_two_optimizers_of_one_model_may_be_nested(inner_in, inner_ends):
    """As where two parts of a model have an optimizer each."""
    model = build("BatchNorm1d")
    model.append(nn.BatchNorm1d(2).double())
    twin = copy.deepcopy(model)
    outer = MicroBatchSAM(
        SGD([*model[0].parameters(), *model[1].parameters()], lr=0.1), num_micro_batches=2, model=model
    )
    inner = MicroBatchSAM(SGD(model[3].parameters(), lr=0.1), model=model)
    for call, x in enumerate(outer.passes(data_of(0))):
        if call == inner_in:
            for inner_call, y in enumerate(inner.passes(data_of(1))):
                model(y).square().mean().backward()
                if inner_ends == "broken off" and inner_call == 1:
                    break
        model(x).square().mean().backward()
        for z in ([data_of(1)] if call == inner_in else []) + [x] if call % 2 == 0 else []:
            twin(z)
    assert_same_statistics(model, twin)


@pytest.mark.parametrize("norm", ["BatchNorm1d", "momentum=None", "InstanceNorm1d with statistics", "ghost"])
@pytest.mark.parametrize("way", ["passes", "drop-in"])
def test_a_body_may_end_in_eval_mode(way, norm):
    """As where it measures the accuracy."""
    model = build(norm)
    twin = twin_of(norm, model)
    opt = (
        MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, model=model)
        if way == "passes"
        else SAM(model.parameters(), SGD, rho=0.5, lr=0.1, model=model)
    )

    def body(x):
        model.train()
        model(x).square().mean().backward()
        model.eval()
        with torch.no_grad():
            model(x)

    for step in range(3):
        twin.train()(data_of(step))
        if way == "passes":
            for x in opt.passes(data_of(step)):
                body(x)
            opt.step()
            opt.zero_grad()
        else:
            for half in (opt.first_step, opt.second_step):
                body(data_of(step))
                half(zero_grad=True)
        for theirs, ours in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.data.copy_(ours)
    assert_same_statistics(model, twin)


def test_a_graph_through_a_buffer_that_no_pass_changed_can_be_used_after_the_step():
    model = build("eval")
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), model=model)
    model.register_buffer("calls", torch.zeros(()))
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    late = []
    for part in opt.passes(data_of(0)):
        model.calls.add_(1)  # beside one that is changed
        late.append(F.batch_norm(x, model[1].running_mean, model[1].running_var).sum())
        model(part).square().mean().backward()
    opt.step()
    sum(late).backward()
    assert x.grad is not None


def test_a_graph_that_needs_what_a_pass_put_into_a_buffer_is_refused_after_it():
    """The buffer has another value then."""
    model = build("LayerNorm")
    model.register_buffer("scale", torch.ones((), dtype=torch.float64))
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), model=model)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for part in opt.passes(data_of(0)):
        model.scale.mul_(2)
        late = (x * model.scale).sum()
        model(part).square().mean().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
    assert model.scale == 2


def test_buffers_that_hold_nothing_yet_are_left_alone():
    model = build("BatchNorm1d")
    model.register_module("unused", nn.LazyBatchNorm1d())
    model.register_buffer("nowhere", torch.ones(3, device="meta"))
    with torch.inference_mode():
        model.register_buffer("inferred", torch.ones(3))
    opt = MicroBatchSAM(SGD(model[:4].parameters(), lr=0.1), model=model)
    before = model[1].num_batches_tracked.item()
    for x in opt.passes(data_of(0)):
        model[:4](x).square().mean().backward()
    assert model[1].num_batches_tracked.item() == before + 1


def test_copies_stay_where_they_are_until_the_buffers_change_their_shapes():
    """A CUDA graph writes to these addresses."""
    model = build("BatchNorm1d")
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), model=model)
    loop(opt, model, data_of(0))
    first = opt.engine.buffers.addresses()
    assert len(first) == 3
    loop(opt, model, data_of(1))
    assert opt.engine.buffers.addresses() == first
    model.register_buffer("another", torch.ones(2))
    loop(opt, model, data_of(2))
    assert len(opt.engine.buffers.addresses()) == 4


def test_a_step_in_inference_mode_leaves_memory_that_later_steps_can_use():
    model = build("BatchNorm1d")
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1, model=model)
    for inferred in (True, False):
        model(data_of(0)).square().mean().backward()
        with torch.inference_mode(inferred):
            opt.first_step(zero_grad=True)
        before = statistics(model)
        model(data_of(1)).square().mean().backward()
        opt.second_step(zero_grad=True)
        assert same_bits(statistics(model).values(), before.values())


def test_layers_that_the_user_switches_in_the_body_stay_switched():
    model = build("BatchNorm1d")
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), model=model)
    for x in opt.passes(data_of(0)):
        model.eval()
        model(x).square().mean().backward()
    assert not any(m.training for m in model.modules())


def test_layers_that_are_replaced_after_construction_are_found():
    """``convert_sync_batchnorm`` and head replacement do this."""
    model = build("BatchNorm1d")
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), model=model)
    model[1] = nn.BatchNorm1d(4).double()
    loop(opt, model, data_of(0))
    assert model[1].num_batches_tracked.item() == 1


def test_a_copied_optimizer_freezes_the_copied_model():
    model, opt = (lambda m: (m, MicroBatchSAM(SGD(m.parameters(), lr=0.1), model=m)))(build("BatchNorm1d"))
    twin, twin_opt = copy.deepcopy((model, opt))
    before = model[1].num_batches_tracked.item()
    loop(twin_opt, twin, data_of(0))
    assert model[1].num_batches_tracked.item() == before
    assert twin[1].num_batches_tracked.item() == before + 1


class WithBuffer(nn.Module):
    """Weights, and a buffer that takes no part."""

    def __init__(self, buffer):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("buffer", buffer)

    def forward(self, x):
        return (self.weight * x).square().sum()


ODD_BUFFERS = {
    "conjugated lazily": lambda: torch.fft.rfft(torch.ones(8)).conj(),
    "negated lazily": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "zeros without memory": lambda: torch._efficientzerotensor((3,)),
    "expanded": lambda: torch.ones(1).expand(3),
    "overlapping itself": lambda: torch.ones(4).as_strided((3, 2), (1, 1)),
    "several in a byte": lambda: torch.empty(4, dtype=torch.uint4),
}


@pytest.mark.parametrize("kind", ODD_BUFFERS)
def test_a_buffer_of_any_kind_leaves_no_weight_perturbed(kind):
    model = WithBuffer(ODD_BUFFERS[kind]())
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, model=model)
    for _ in range(2):
        before = weights(model)
        for x in opt.passes(torch.ones(1, 3)):
            model(x).backward()
        assert same_bits(weights(model), before)
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("when", ["before", 0, 1])
def test_a_buffer_whose_memory_was_freed_is_left_alone(when):
    model = WithBuffer(torch.ones(1000))
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, model=model)
    if when == "before":
        model.buffer.untyped_storage().resize_(0)
    before = weights(model)
    for x in opt.passes(torch.ones(1, 3)):
        model(x).backward()
        if when == opt.pass_index:
            model.buffer.untyped_storage().resize_(0)
    assert same_bits(weights(model), before)


def test_weights_come_back_though_a_buffer_does_not(monkeypatch):
    model = WithBuffer(torch.ones(3))
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, model=model)
    before = weights(model)
    loop = iter(opt.passes(torch.ones(1, 3)))
    model(next(loop)).backward()
    next(loop)
    assert not same_bits(weights(model), before)
    monkeypatch.setattr(opt.engine.buffers, "rewind", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.restore()
    assert same_bits(weights(model), before)
    monkeypatch.undo()
    opt.train_step(model, torch.ones(1, 3))


def test_what_is_trained_is_perturbed_though_it_is_a_buffer_too():
    model = WithBuffer(None)
    model._buffers["buffer"] = model.weight
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, model=model)
    losses = []
    for x in opt.passes(torch.ones(1, 3)):
        losses.append(model(x))
        losses[-1].backward()
    assert losses[1] > losses[0]


def test_another_model_lets_go_of_the_buffers_of_the_last_one():
    model = WithBuffer(torch.ones(3))
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, model=model)
    opt.train_step(model, torch.ones(1, 3))
    gone = weakref.ref(model.buffer)
    opt.model = None
    model.buffer = None
    gc.collect()
    assert gone() is None
