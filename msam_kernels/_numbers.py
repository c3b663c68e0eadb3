# SPDX-License-Identifier: Apache-2.0
"""Sums that the kernels found, as numbers to calculate with."""

from __future__ import annotations

import math

from torch import Tensor

# A float64: a float on the CPU, where operations on tensors take longer than the kernels of a small model, and on a GPU a
# 0-d tensor, which nothing waits for.
Number = float | Tensor


def numbers(sums: Tensor) -> list[Number]:
    return sums.tolist() if sums.device.type == "cpu" else list(sums.unbind())


def total(terms: Tensor) -> Number:
    """The sum, whatever the number of threads."""
    if terms.device.type != "cpu":
        return terms.sum()
    try:
        return math.fsum(terms.tolist())
    except OverflowError:
        return math.inf


def sqrt(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def at_least_0(x: Number) -> Number:
    return x.clamp(min=0) if isinstance(x, Tensor) else max(x, 0.0)
