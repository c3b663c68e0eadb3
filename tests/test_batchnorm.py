# SPDX-License-Identifier: Apache-2.0
"""Running statistics see each micro-batch once, as if it had been one plain forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

from msam_kernels import MicroBatchSAM
from plain import METHODS, random_numbers, same_bits, weights

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
    return {k: v.clone() for k, v in model.named_buffers()}


@pytest.mark.parametrize("way", LOOPS)
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_statistics_are_those_of_one_forward_of_each_micro_batch(norm, micro_batches, way):
    model = build(norm)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.3, num_micro_batches=micro_batches, model=model)
    for step in range(3):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for x in data_of(step).tensor_split(micro_batches):
                twin(x)
        LOOPS[way](opt, model, data_of(step))
        assert statistics(model).keys() == statistics(twin).keys()
        assert same_bits(statistics(model).values(), statistics(twin).values())


@pytest.mark.parametrize("method", METHODS)
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


def flags(model):
    return [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]


@pytest.mark.parametrize("stop", range(4))
@pytest.mark.parametrize("how", ["break", "exception", "close", "restore"])
@pytest.mark.parametrize("norm", NORMS)
def test_an_interrupted_loop_leaves_every_layer_as_it_was(norm, how, stop):
    model = build(norm)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), num_micro_batches=2, model=model)
    before = flags(model)
    iterator = opt.passes(data_of(0))
    for call in range(stop + 1):
        x = next(iterator)
        if call % 2 == 0:
            assert flags(model) == before
        model(x).square().mean().backward()
    if how == "exception":
        with pytest.raises(KeyError):
            iterator.throw(KeyError())
    elif how == "restore":
        opt.restore()
    elif how == "close":
        iterator.close()
    else:
        del iterator
    assert flags(model) == before
    loop(opt, model, data_of(1))
    assert flags(model) == before


def test_an_exception_in_a_closure_leaves_every_layer_as_it_was():
    model = build("BatchNorm1d")
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), model=model)
    before, calls = flags(model), []

    def closure():
        model(data_of(0)).square().mean().backward()
        calls.append(True)
        if len(calls) == 2:
            raise KeyError

    with pytest.raises(KeyError):
        opt.step(closure)
    assert flags(model) == before


@pytest.mark.parametrize("inner_ends", ["finished", "broken off"])
@pytest.mark.parametrize("inner_in", range(4))
def test_loops_of_two_optimizers_of_one_model_may_be_nested(inner_in, inner_ends):
    """As where two parts of a model have an optimizer each."""
    model = build("BatchNorm1d")
    model.append(nn.BatchNorm1d(2).double())
    before = flags(model)
    outer = MicroBatchSAM(
        SGD([*model[0].parameters(), *model[1].parameters()], lr=0.1), num_micro_batches=2, model=model
    )
    inner = MicroBatchSAM(SGD(model[3].parameters(), lr=0.1), model=model)
    for call, x in enumerate(outer.passes(data_of(0))):
        outside = flags(model)
        assert (outside != before) == (call % 2 == 1)
        if call == inner_in:
            for inner_call, y in enumerate(inner.passes(data_of(1))):
                model(y).square().mean().backward()
                if inner_ends == "broken off" and inner_call == 1:
                    break
            assert flags(model) == outside
        model(x).square().mean().backward()
    assert flags(model) == before


def test_layers_that_the_user_switches_in_the_body_stay_switched():
    model = build("BatchNorm1d")
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), model=model)
    for x in opt.passes(data_of(0)):
        model.eval()
        model(x).square().mean().backward()
    assert not any(m.training for m in model.modules())
    assert model[1].track_running_stats


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
