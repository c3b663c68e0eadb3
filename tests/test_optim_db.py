# SPDX-License-Identifier: Apache-2.0
"""Every base optimizer there is: with rho = 0 a step is its own step, and its state is its own affair.

The tables are torch's own tests' (``optim_db``) and ``pytorch_optimizer``'s. Where an optimizer is stepped as it is, weights
and state are those of the plain one bit for bit; the fused updates of SGD with momentum, Adam and AdamW round otherwise than
torch's, whose own three implementations differ among each other too.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from msam_kernels import MicroBatchSAM
from plain import same_bits

REFUSED = {
    "Adadelta": "has a rho of its own",
    "AdaDelta": "has a rho of its own",
    "LBFGS": "LBFGS.step asks for closure",
}
FUSED = ("SGD", "Adam", "AdamW")
TORCHS = {
    "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD", "SparseAdam",
} - {name for name in ("Muon",) if not hasattr(torch.optim, name)}  # which old ones lack  # fmt: skip
Make = Callable[[list[nn.Parameter]], Optimizer]


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Matrices alone: some optimizers know nothing else."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)).to(dtype)


def train(opt: Optimizer, net: nn.Module, steps: range) -> None:
    for seed in steps:
        torch.manual_seed(seed)  # also for optimizers that draw random numbers
        x = torch.randn(4, 5).to(next(net.parameters()).dtype)
        for _ in opt.passes() if isinstance(opt, MicroBatchSAM) else range(1):
            net(x).square().mean().backward()
        torch.manual_seed(seed)
        opt.step()
        opt.zero_grad()


def run(make: Make, ours: tuple[bool, bool], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """Four steps, from one optimizer to another of the same kind in between; ``ours``: which of the two is wrapped."""
    net, saved = model(dtype), None
    for half, wrapped in enumerate(ours):
        torch.manual_seed(0)
        base = make(list(net.parameters()))
        opt = MicroBatchSAM(base, rho=0.0) if wrapped else base
        if saved is not None:
            opt.load_state_dict(saved)
        train(opt, net, range(2 * half, 2 * half + 2))
        saved = copy.deepcopy(opt.state_dict())
    return net, saved


def differences(make: Make, exact: bool) -> list[str]:
    """Of ours, and of both exchanges with the plain one, from the plain one."""
    net, saved = run(make, (False, False))
    found = []
    for ours in ((True, True), (True, False), (False, True)):
        other, got = run(make, ours)
        pairs = list(zip(other.parameters(), net.parameters(), strict=True))
        same = all(_same(a, b, exact) for a, b in pairs) and _same(got["state"], saved["state"], exact)
        # Without names, which plain optimizers of some packages save and others do not, groups are equal but for ours.
        groups = [
            {k: v for k, v in group.items() if k != "rho" and not k.startswith("msam_")}
            for group in got["param_groups"]
        ]
        if not same or not _same(groups, saved["param_groups"], exact):
            found.append(" then ".join("ours" if wrapped else "plain" for wrapped in ours))
    return found


def _same(a: Any, b: Any, exact: bool) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return same_bits([a], [b]) if exact else torch.allclose(a, b, rtol=1e-12, atol=1e-15)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], exact) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y, exact) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture(scope="module")
def db() -> dict[str, Any]:
    pytest.importorskip("expecttest")  # which torch's tests import
    from torch.testing._internal.common_optimizers import optim_db

    return {info.optim_cls.__name__: info for info in optim_db}


def test_the_table_has_every_optimizer_of_torch(db):
    assert db.keys() == TORCHS


@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["as it is", "foreach, fused"]
)
@pytest.mark.parametrize("name", sorted(TORCHS))
def test_with_rho_0_every_option_of_torchs_optimizers_is_the_plain_one(name, every, db):
    info, wrong = db[name], {}
    flags = [{kind: True} for kind in info.supported_impls if kind != "differentiable"] if every else [{}]
    for options in info.optim_inputs_func(device="cpu"):
        for flag in flags:
            kwargs = {**options.kwargs, **flag}
            if "foreach" in flag and isinstance(kwargs.get("lr"), Tensor):
                continue  # torch takes no tensor there

            def make(params, kwargs=kwargs):
                return info.optim_cls(params, **copy.deepcopy(kwargs))

            net = model()
            if name in REFUSED:
                with pytest.raises((TypeError, ValueError), match=REFUSED[name]):
                    MicroBatchSAM(make(list(net.parameters())))
            elif name == "SparseAdam":  # torch's sentence, and the weights stay
                with pytest.raises(RuntimeError, match="does not support dense gradients"):
                    train(MicroBatchSAM(make(list(net.parameters()))), net, range(1))
                assert same_bits(net.parameters(), model().parameters())
            else:
                found = differences(make, exact=name not in FUSED)
                if found:
                    wrong[str(kwargs)] = found
    assert wrong == {}


def outcome(make: Make, wrapped: bool) -> Any:
    """The weights after four steps with a reload in between, or in which words it failed."""
    try:
        return list(run(make, (wrapped, wrapped), torch.float32)[0].parameters())
    except Exception as error:
        return type(error), str(error)


def build_lookahead(params: list[nn.Parameter]) -> Optimizer:
    return importlib.import_module("pytorch_optimizer").Lookahead(AdamW(params), k=2)


def test_with_rho_0_the_optimizers_of_a_package_do_what_they_do_alone():
    """Whatever that is: a few of them fail by themselves, some when they load their own state."""
    package = pytest.importorskip("pytorch_optimizer")
    wrong, train_on = {}, 0
    kinds: dict[str, Make] = {name: package.load_optimizer(name) for name in package.get_supported_optimizers()}
    kinds["lookahead"] = build_lookahead
    for name, make in kinds.items():
        if make in (SGD, Adam, AdamW):
            continue
        try:
            make(list(model(torch.float32).parameters()))
        except Exception:  # it asks for more than parameters
            continue
        if make.__name__ in REFUSED:
            with pytest.raises((TypeError, ValueError), match=REFUSED[make.__name__]):
                MicroBatchSAM(make(list(model().parameters())))
            continue
        alone, ours = outcome(make, False), outcome(make, True)
        trains = isinstance(alone, list)
        train_on += trains
        if isinstance(ours, list) != trains or not (same_bits(ours, alone) if trains else ours == alone):
            wrong[name] = alone if isinstance(alone, tuple) else "trains alone", ours
    assert wrong == {}
    assert train_on > 80
