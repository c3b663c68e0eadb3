# SPDX-License-Identifier: Apache-2.0
"""Checks of numbers that users give."""

import math
import numbers
import sys
from typing import Any


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """A finite number between ``low``, with ``above`` itself left out, and ``high``. True and False are none."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value <= min(high, sys.float_info.max) or (above and value == low):
        bound = f"{'>' if above else '>='} {low}" if math.isinf(high) else f"between {low} and {high}"
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")


def check_integer(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
