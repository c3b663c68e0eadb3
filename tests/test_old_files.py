# SPDX-License-Identifier: Apache-2.0
"""State dicts that earlier versions wrote load, and training goes on as it did there.

``tests/data/state_dicts_9e8c072.pt`` was written at commit 9e8c072 by running this file as a script with that version
installed: for every case the model, the optimizer's state dict after four steps, and the weights after three steps more.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from msam_kernels import MicroBatchSAM, methods

FILE = Path(__file__).parent / "data" / "state_dicts_9e8c072.pt"
SGD_ARGS = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)
CASES = {  # base optimizer, method, micro-batches
    "SAM, SGD": (lambda p: SGD(p, **SGD_ARGS), methods.SAM(), 1),
    "SAM, SGD without momentum": (lambda p: SGD(p, lr=0.1), methods.SAM(), 2),
    "F-SAM, SGD nesterov": (lambda p: SGD(p, nesterov=True, **SGD_ARGS), methods.FriendlySAM(lmbda=0.6), 2),
    "ASAM, AdamW": (lambda p: AdamW(p, lr=0.01), methods.AdaptiveSAM(), 2),
    "GSAM, Adam amsgrad": (lambda p: Adam(p, lr=0.01, amsgrad=True), methods.GapSAM(), 1),
    "LookSAM, SGD": (lambda p: SGD(p, **SGD_ARGS), methods.LookSAM(k=3, alpha=0.2), 2),
    "Sparse SAM, SGD": (lambda p: SGD(p, **SGD_ARGS), methods.SparseSAM(sparsity=0.6, update_every=3), 2),
    "late, Bilateral SAM, AdamW": (lambda p: AdamW(p, lr=0.01), methods.BilateralSAM(rho_min=0.02, start=2), 1),
}


def make(case: str) -> tuple[nn.Module, MicroBatchSAM]:
    base, method, count = CASES[case]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float64).sin().view_as(p))
    return model, MicroBatchSAM(base(model.parameters()), 0.1, method=method, num_micro_batches=count)


def train(model: nn.Module, opt: MicroBatchSAM, steps: range) -> None:
    for step in steps:
        x = torch.linspace(-2, 2, 18, dtype=torch.float64).mul(step + 1).cos().view(6, 3)
        y = x[:, :2].flip(1) * 0.5
        opt.train_step(lambda x, y: (model(x) - y).square().mean(), x, y)


def write() -> None:
    cases = {}
    for case in CASES:
        model, opt = make(case)
        train(model, opt, range(4))
        files = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        cases[case] = {name: torch.load(_saved(file), weights_only=True) for name, file in files.items()}
        train(model, opt, range(4, 7))
        cases[case]["after"] = {name: t.clone() for name, t in model.state_dict().items()}
    FILE.parent.mkdir(exist_ok=True)
    torch.save(cases, FILE)


def _saved(what):
    from io import BytesIO

    file = BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_of_9e8c072_loads_and_training_goes_on(case, backend):
    old = torch.load(FILE, weights_only=True)[case]
    base, method, count = CASES[case]
    model, _ = make(case)
    model.load_state_dict(old["model"])
    opt = MicroBatchSAM(base(model.parameters()), 0.1, method=method, num_micro_batches=count, backend=backend)
    opt.load_state_dict(old["optimizer"])
    assert opt.steps == 4
    train(model, opt, range(4, 7))
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, old["after"][name], rtol=1e-12, atol=1e-14)


def test_what_stood_under_a_key_of_its_own_stands_in_the_entries_now():
    for case, old in torch.load(FILE, weights_only=True).items():
        model, opt = make(case)
        train(model, opt, range(4))
        new, own = opt.state_dict(), old["optimizer"]["msam"]
        assert "msam" not in new
        for i in range(4):
            kept = {f"msam_{name}" for name in ("ema", "v", "mask") if name in own}
            assert new["state"].get(i, {}).keys() == old["optimizer"]["state"].get(i, {}).keys() | kept
        assert new["param_groups"][0]["msam_steps"] == own["steps"] == 4
        assert new["param_groups"][0].get("msam_mask_step") == own.get("mask_step")


if __name__ == "__main__":
    sys.exit(write())
