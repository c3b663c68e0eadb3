# SPDX-License-Identifier: Apache-2.0
"""Checks of numbers that users give."""

import math
import numbers
import sys
from typing import Any


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Refuse what is no finite number from ``low``, itself left out with ``above``, to ``high``. Booleans are no numbers.

    Raises:
        ValueError: with the name, the bounds and the value.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value <= min(high, sys.float_info.max) or (above and value == low):
        bound = f"{'>' if above else '>='} {low}"
        if not math.isinf(high):
            bound = f"{bound} and <= {high}" if above else f"between {low} and {high}"
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")


def check_integer(name: str, value: Any, low: int) -> None:
    """Refuse what is no integer from ``low`` on.

    Raises:
        ValueError: with the name, the bound and the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
