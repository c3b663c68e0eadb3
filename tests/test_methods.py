# SPDX-License-Identifier: Apache-2.0
"""What the methods do where their formulas have no usual value: zero, parallel and orthogonal gradients, alpha = 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from msam_kernels import MicroBatchSAM, methods
from plain import batch, loss_of, mlp, same_bits

COMBINING = {"Stable SAM": methods.StableSAM(), "GSAM": methods.GapSAM(alpha=0.4)}


def descents(method, pairs, dtype, backend, **options):
    """What a step moved, per lr, after given gradients: ``pairs``: of each micro-batch (at w, at w + e)."""
    p = nn.Parameter(torch.zeros(len(pairs[0][0]), dtype=dtype))
    opt = MicroBatchSAM(SGD([p], lr=1.0), 0.1, method=method, num_micro_batches=len(pairs), backend=backend, **options)
    upcoming = iter([torch.tensor(g, dtype=dtype) for pair in pairs for g in pair])

    def closure():
        p.grad = next(upcoming)

    opt.step([closure] * len(pairs))
    return -p.detach()


# method, gradient at w, gradient at w + e, what is used
EDGES = {
    "Stable, zero at w": ("Stable SAM", (0.0, 0.0), (3.0, 4.0), (0.0, 0.0)),
    "Stable, zero at w + e": ("Stable SAM", (3.0, 4.0), (0.0, 0.0), (0.0, 0.0)),
    "Stable, both zero": ("Stable SAM", (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
    "Stable, identical": ("Stable SAM", (3.0, 4.0), (3.0, 4.0), (3.0, 4.0)),
    "Stable, opposite": ("Stable SAM", (3.0, 4.0), (-6.0, -8.0), (-3.0, -4.0)),
    "Stable, orthogonal": ("Stable SAM", (3.0, 4.0), (-8.0, 6.0), (-4.0, 3.0)),
    "GSAM, zero at w": ("GSAM", (0.0, 0.0), (3.0, 4.0), (3.0, 4.0)),
    "GSAM, zero at w + e": ("GSAM", (3.0, 4.0), (0.0, 0.0), (-1.2, -1.6)),
    "GSAM, both zero": ("GSAM", (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
    "GSAM, identical": ("GSAM", (3.0, 4.0), (3.0, 4.0), (3.0, 4.0)),
    "GSAM, opposite": ("GSAM", (3.0, 4.0), (-6.0, -8.0), (-6.0, -8.0)),
    "GSAM, orthogonal": ("GSAM", (3.0, 4.0), (-8.0, 6.0), (-9.2, 4.4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("edge", EDGES)
def test_a_descent_where_gradients_are_special(edge, dtype, backend):
    method, at_w, at_e, used = EDGES[edge]
    expected = torch.tensor(used, dtype=dtype)
    actual = descents(COMBINING[method], [(at_w, at_e)], dtype, backend)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    # Every micro-batch has a combination of its own.
    both = descents(COMBINING[method], [(at_w, at_e), ((1.0, 0.0), (1.0, 0.0))], dtype, backend)
    torch.testing.assert_close(both, (expected + torch.tensor([1.0, 0.0], dtype=dtype)) / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", COMBINING)
def test_a_gradient_that_is_not_finite_shows_in_the_descent(method, value, backend):
    for pair in (((value, 1.0), (1.0, 1.0)), ((1.0, 1.0), (value, 1.0))):
        assert not descents(COMBINING[method], [pair], torch.float32, backend).isfinite().all()


@pytest.mark.parametrize("count", [1, 3], ids=["one micro-batch", "three micro-batches"])
def test_gap_sam_with_alpha_zero_is_sam_bit_for_bit(count, backend):
    trained = []
    for method in (methods.SAM(), methods.GapSAM(alpha=0.0)):
        model = mlp()
        opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), num_micro_batches=count, method=method, backend=backend)
        for seed in range(3):
            opt.train_step(lambda x, y, model=model: loss_of(model, x, y), *batch(seed=seed))
        trained.append(list(model.parameters()))
    assert same_bits(*trained)


@pytest.mark.parametrize("method", COMBINING)
def test_the_gradients_at_w_are_kept_no_longer_than_the_step(method, backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=COMBINING[method], backend=backend)
    opt.train_step(lambda x, y: loss_of(model, x, y), *batch())
    assert all(flat.kept == [] for flat in opt._flats)
    for part in opt.passes(*batch()):
        loss_of(model, *part).backward()
        break
    assert all(flat.kept == [] for flat in opt._flats)


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf, "much"])
def test_a_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number >= 0, got"):
        methods.GapSAM(alpha=alpha)
