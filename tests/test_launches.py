# SPDX-License-Identifier: Apache-2.0
"""How many kernels a step launches, for every method: each operator is one launch, which the tests of the backends count."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, RMSprop

from msam_kernels import MicroBatchSAM, backends, methods
from plain import METHODS

# Of one micro-batch in a step that perturbs, the last descent and the update in one.
EXPECTED = {
    "SAM": ["ascend", "update"],
    "ASAM": ["ascend", "update"],
    "ASAM eta=0": ["ascend", "update"],
    "F-SAM": ["ascend", "update"],
    "F-SAM sigma=0.5 lmbda=0.6": ["ascend", "update"],
    "Stable SAM": ["ascend", "gram", "update"],
    "LE-SAM": ["ascend", "update"],
    "GSAM": ["ascend", "gram", "update"],
    "LookSAM k=2": ["ascend", "gram", "descend", "update"],  # the descend makes v
    "Bilateral SAM": ["ascend", "perturb", "gram", "update"],
    "Sparse SAM": ["ascend", "update"],
    "VaSSO": ["ascend", "update"],
    "WSAM": ["ascend", "update"],
    "Momentum-SAM": ["ascend", "update"],
    "F-SAM + Sparse + Stable": ["ascend", "gram", "update"],
}
MOST = 4


def noted(opt: MicroBatchSAM) -> list[str]:
    """The calls of operators from now on."""
    calls: list[str] = []

    def noting(name, operator):
        def call(*args, **kwargs):
            calls.append(name)
            return operator(*args, **kwargs)

        return call

    for flat in opt.engine.store.flats:
        flat.backend = SimpleNamespace(
            **{name: noting(name, getattr(flat.backend, name)) for name in backends.OPERATORS}
        )
    return calls


class Counted:
    """An optimizer whose calls of operators are noted."""

    def __init__(self, method: methods.SAM, count: int = 1, base=SGD, dtypes=(torch.float64,)):
        self.params = [nn.Parameter(torch.linspace(-1, 1, 40, dtype=dtype)) for dtype in dtypes for _ in range(2)]
        base = base(self.params, lr=0.1, momentum=0.9)
        self.opt = MicroBatchSAM(base, 0.1, method=method, num_micro_batches=count, backend="reference")
        self.calls = noted(self.opt)

    def loss(self, x):
        return sum((p.double() * x.mean()).cos().square().sum() for p in self.params)

    def step(self) -> list[str]:
        self.calls.clear()
        self.opt.train_step(self.loss, torch.linspace(0.5, 1.5, 6, dtype=torch.float64))
        return list(self.calls)

    def loop(self) -> list[str]:
        self.calls.clear()
        for x in self.opt.passes(torch.linspace(0.5, 1.5, 6, dtype=torch.float64)):
            self.loss(x).backward()
        return list(self.calls)


def test_the_table_has_every_method():
    assert EXPECTED.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_micro_batch_launches_four_kernels_at_most(name):
    counted = Counted(METHODS[name])
    for step in range(3):
        calls = counted.step()
        if step % METHODS[name].period == 0:
            assert calls == EXPECTED[name]
        assert len(calls) <= MOST


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("count", [2, 3])
def test_further_micro_batches_launch_no_more(name, count):
    counted = Counted(METHODS[name], count)
    for _ in range(3):
        calls = counted.step()
        assert len(calls) <= MOST * count
        assert Counter(calls)["update"] == 1
    assert len(counted.loop()) <= MOST * count


def test_between_its_steps_look_sam_launches_a_norm_and_the_update():
    counted = Counted(methods.LookSAM(k=2))
    counted.step()
    assert counted.step() == ["gram", "update"]
    counted = Counted(methods.LookSAM(k=2), 3)
    counted.step()
    assert counted.step() == ["descend", "descend", "gram", "update"]


@pytest.mark.parametrize("name", METHODS)
def test_another_base_optimizer_takes_its_own_step_after_one_descent(name):
    counted = Counted(METHODS[name], base=RMSprop)
    calls = counted.step()
    assert "update" not in calls
    assert len(calls) <= MOST


def test_two_dtypes_launch_each_kernel_once_per_dtype():
    calls = Counter(Counted(methods.GapSAM(), dtypes=(torch.float64, torch.float32)).step())
    assert calls == {"norm": 2, "perturb": 2, "gram": 2, "update": 2}


def test_nothing_is_launched_where_nothing_is_perturbed_and_a_gradient_is_the_mean():
    counted = Counted(methods.SAM(start=1))
    assert counted.loop() == []


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 40, dtype=torch.float64))

    def forward(self, x):
        return (self.w * x.mean()).cos().square().sum()


# Of all micro-batches that run at once: inner products and norms give each its coefficients once.
TOGETHER = {
    "Stable SAM": ["ascend", "gram", "weigh", "update"],
    "GSAM": ["ascend", "gram", "weigh", "update"],
    "LookSAM k=2": ["ascend", "gram", "weigh", "descend", "weigh", "update"],  # the descend makes v
    "Bilateral SAM": ["ascend", "perturb", "gram", "weigh", "update"],
    "F-SAM + Sparse + Stable": ["ascend", "gram", "weigh", "update"],
    "WSAM": ["ascend", "weigh", "descend", "weigh", "update", "descend"],  # of the gap, and by it
}


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_that_run_at_once_launch_as_much_as_one(name):
    for count in (2, 7):
        model = Weights()
        base = SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"method": METHODS[name], "num_micro_batches": count, "backend": "reference"}
        opt = MicroBatchSAM(base, 0.1, model=model, parallel=True, **options)
        calls = noted(opt)
        opt.train_step(model, torch.linspace(0.5, 1.5, 14, dtype=torch.float64))
        assert calls == TOGETHER.get(name, ["ascend", "weigh", "update"])


@pytest.mark.parametrize("most", [2, 3])
def test_so_many_at_once_add_the_mean_so_far(most):
    model = Weights()
    opt = MicroBatchSAM(
        SGD(model.parameters(), lr=0.1), 0.1, num_micro_batches=6, backend="reference", model=model, parallel=most
    )
    calls = noted(opt)
    opt.train_step(model, torch.linspace(0.5, 1.5, 6, dtype=torch.float64))
    turns = 6 // most
    assert calls == ["ascend", "weigh", "descend"] * (turns - 1) + ["ascend", "weigh", "update"]
