# SPDX-License-Identifier: Apache-2.0
"""What comes between the last pass of a whole step and its update: a ``GradScaler``'s part, and the user's function."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ._checks import check_number
from ._torch import Scaled, moved
from .gradients import Vectors
from .rules import fused_rule
from .step import Engine

_NO_GRADIENT = "no parameter has a gradient for the scaler to look at: does the loss depend on the parameters?"


def scaled_by(scaler: torch.amp.GradScaler | None, opt: torch.optim.Optimizer) -> Scaled | None:
    """What a scaler notes of the optimizer; None where it scales nothing.

    Raises:
        TypeError: ``scaler`` is no ``GradScaler``.
    """
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    return None if scaler is None or not scaler.is_enabled() else Scaled(scaler, opt)


class Between:
    """Called between the last pass and the update; a context around the whole step, which the scaler is told of at its end.

    Args:
        opt: whose step it is, as the scaler knows it.
        engine: that runs it.
        before_update: see ``MicroBatchSAM.train_step``, as ``scaler`` and ``max_grad_norm``.

    Raises:
        TypeError: ``before_update`` cannot be called, or ``scaler`` is no ``GradScaler``.
        ValueError: ``max_grad_norm`` is no number > 0.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        engine: Engine,
        before_update: Callable[[], object] | None,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None = None,
    ):
        if before_update is not None and not callable(before_update):
            raise TypeError(
                "before_update must be a function without arguments, e.g. "
                f"lambda: clip_grad_norm_(model.parameters(), 1.0), got {before_update!r}"
            )
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, 0, above=True)
        self._opt, self._engine, self._before_update = opt, engine, before_update
        self.max_grad_norm = max_grad_norm
        self.scaled = scaled_by(scaler, opt)
        #: What the latest step found, by device.
        self.found_infs: dict[torch.device, Tensor] = {}

    @property
    def is_unseen(self) -> bool:
        """Whether nobody is to see the mean gradient in ``p.grad``: the update then unscales and clips what it reads."""
        return self._before_update is None

    @property
    def scale(self) -> Callable[[Tensor], Tensor] | None:
        """What makes of a loss the one that is differentiated."""
        return None if self.scaled is None else self.scaled.scaler.scale

    def __enter__(self) -> None:
        """Before anything is changed.

        Raises:
            RuntimeError: ``scaler.update()`` is due, or the base optimizer's own step would have to be skipped.
        """
        if self.scaled is None:
            return
        base = self._engine.base
        if fused_rule(base) is None:
            raise RuntimeError(
                f"scaler skips an update on the device, which {type(base).__name__}'s own step cannot: use a base optimizer "
                "whose step is a fused kernel (SGD, Adam or AdamW without hooks, capturable and differentiable), or a "
                "passes() loop with scaler.step(opt)"
            )
        if not self.scaled.is_ready:
            raise RuntimeError(
                "another step of this optimizer before scaler.update(): call it once after every step, as after scaler.step()"
            )

    def __call__(self) -> Tensor | None:
        """Unscale ``p.grad``, clip it, then the user's turn; what was found, for the update."""
        found_inf = self._limit_with_ranks() if self._engine.store.has_ranks else self._limit()
        if self._before_update is not None:
            self._before_update()
        return found_inf

    def _limit(self) -> Tensor | None:
        found_inf = None
        if self.scaled is not None:
            self.scaled.scaler.unscale_(self._opt)
            self.found_infs = self.scaled.found_infs
            if not self.found_infs:
                raise RuntimeError(_NO_GRADIENT)
            device = self._engine.store.device
            for found in self.found_infs.values():
                found = moved(found, device)
                found_inf = found if found_inf is None else found_inf + found
        if self.max_grad_norm is not None:
            clip_grad_norm_(self._engine.store.parameters(), self.max_grad_norm)
        return found_inf

    def _limit_with_ranks(self) -> Tensor | None:
        """The same of the parameters of all ranks, which decide alike: torch's functions look at those of this one."""
        if self.scaled is None and self.max_grad_norm is None:
            return None
        found_inf = self.note(*self._engine.limit(self._engine.units.scale, self.max_grad_norm))
        if self.scaled is not None:
            self.scaled.has_stepped(self.found_infs)  # so that its ``unscale_`` does not do it again
        return found_inf

    def note(self, found_inf: Tensor, mean: Vectors) -> Tensor | None:
        """Where nobody sees ``p.grad``: what was found in the mean gradient, for the update where a scaler asks."""
        if self.scaled is None:
            return None
        if mean.absent == sum(len(flat.params) for flat in self._engine.store.flats):
            raise RuntimeError(_NO_GRADIENT)
        self.found_infs = {found_inf.device: found_inf}
        return found_inf

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self.scaled is not None and kind is None:
            self.scaled.has_stepped(self.found_infs)
        else:
            self.forget()

    def forget(self) -> None:
        """The step did not take place."""
        if self.scaled is not None:
            self.scaled.forget()
