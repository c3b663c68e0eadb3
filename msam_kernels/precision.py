# SPDX-License-Identifier: Apache-2.0
"""How w + e is rounded to weights of 16 bits, and a warning where little of e arrives. See ``docs/precision.md``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ._checks import check_integer
from .mistakes import warn

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")
SEEDS = 2**64


def is_short(dtype: torch.dtype) -> bool:
    """Whether w + e is rounded to it."""
    return dtype.itemsize == 2


def dtype_kept(dtype: torch.dtype, masters: bool) -> torch.dtype:
    """Of the saved weights and of the base optimizer's state: with ``masters`` fp32, where weights have 16 bits."""
    return torch.float32 if masters and is_short(dtype) else dtype


def seed_of(rounding: Any, seed: Any) -> int | None:
    """Of stochastic rounding; None where it is to nearest.

    Raises:
        ValueError: a rounding that is not known, a seed of more than 64 bits, or one that nothing would be made of.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    if seed is not None:
        check_integer("seed", seed, 0)
        if seed >= SEEDS:
            raise ValueError(f"seed must be < 2**64, got {seed}")
        if rounding == "nearest":
            raise ValueError(f"seed={seed} is for rounding='stochastic', got rounding='nearest': leave it out")
    if rounding == "nearest":
        return None
    return torch.initial_seed() % SEEDS if seed is None else int(seed)


class Watch:
    """Warns, once, where less than half of the first perturbation arrives.

    On a GPU it does not wait: the numbers are copied behind a step, and looked at in a later one, when they are there. Until
    then there are no others. Only of several ranks, for which ``measure`` is a message, the next one waits for them, since all
    have to send it or none.
    """

    LEAST = 0.5

    def __init__(self) -> None:
        self.is_over = False
        self._copied: Tensor | None = None  # on the host: the product with what was asked for, and that one's square
        self._event: Any = None  # after which it is there

    def note(self, measure: Callable[[], Tensor], *, waits: bool = False) -> None:
        """Look at what is there, and ``measure`` what is to come: float64 ``[3]``, see ``Store.achieved``."""
        if waits and self._event is not None:
            self._event.synchronize()
        self.look()
        if self.is_over or self._copied is not None:
            return
        sums = measure()
        if sums.device.type == "cpu":
            self._copied = sums
        else:
            self._copied = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._copied.copy_(sums, non_blocking=True)
            self._event = torch.get_device_module(sums.device).Event()
            self._event.record()
        self.look()

    def look(self) -> None:
        """Warn, if the numbers are there and say so."""
        if self._copied is None or (self._event is not None and not self._event.query()):
            return
        _, product, asked = self._copied.tolist()
        self._copied = self._event = None
        if not asked > 0:  # nothing was to arrive: the next step may tell
            return
        self.is_over = True
        if not product >= self.LEAST * asked:
            warn(
                f"only {max(product, 0) / asked:.0%} of the perturbation arrives in weights of 16 bits, where w + e is rounded "
                "back to w unless e is half of the distance to the next number: use rounding='stochastic', or keep the weights "
                "in float32, under autocast; opt.stats.along says how much arrives"
            )
