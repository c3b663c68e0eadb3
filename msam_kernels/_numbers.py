# SPDX-License-Identifier: Apache-2.0
"""Sums that the kernels found, as numbers to calculate with."""

from __future__ import annotations

import math

from torch import Tensor

# A float64: a float on the CPU, where operations on tensors take longer than the kernels of a small model, and on a GPU a
# 0-d tensor, which nothing waits for.
Number = float | Tensor


def totals(terms: Tensor) -> list[Number]:
    """The sums of the rows of float64 ``[k, n]``; on the CPU the exact ones, rounded, and NaN where that is not finite."""
    if terms.device.type != "cpu":
        return list(terms.sum(1).unbind())
    return [_exact_sum(row) for row in terms.tolist()]


def total(terms: Tensor) -> Number:
    """The sum of float64 ``[n]``, likewise."""
    return totals(terms[None])[0]


def _exact_sum(terms: list[float]) -> float:
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # too large, or inf - inf
        return math.nan


def sqrt(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def at_least_0(x: Number) -> Number:
    return x.clamp(min=0) if isinstance(x, Tensor) else max(x, 0.0)
