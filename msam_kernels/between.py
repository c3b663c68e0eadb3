# SPDX-License-Identifier: Apache-2.0
"""What comes between the last pass of a whole step and its update: a ``GradScaler``'s part, and the user's function."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ._torch import Scaled
from .rules import fused_rule
from .step import Engine


class Between:
    """Called between the last pass and the update; a context around the whole step, which the scaler is told of at its end.

    Args:
        opt: whose step it is, as the scaler knows it.
        engine: that runs it.
        before_update: see ``MicroBatchSAM.train_step``, as ``scaler``.

    Raises:
        TypeError: ``before_update`` cannot be called, or ``scaler`` is no ``GradScaler``.
        ValueError: the method keeps a mean of gradients, which would be in units of the scale.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        engine: Engine,
        before_update: Callable[[], object] | None,
        scaler: torch.amp.GradScaler | None,
    ):
        if before_update is not None and not callable(before_update):
            raise TypeError(
                "before_update must be a function without arguments, e.g. "
                f"lambda: clip_grad_norm_(model.parameters(), 1.0), got {before_update!r}"
            )
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        self._opt, self._engine, self._before_update = opt, engine, before_update
        self._scaled = None if scaler is None or not scaler.is_enabled() else Scaled(scaler, opt)
        #: What the latest step found, by device.
        self.found_infs: dict[torch.device, Tensor] = {}
        self._check_method()

    def _check_method(self) -> None:
        method = self._engine.method
        if self._scaled is None:
            return
        for depends, what in (
            (method.full.lmbda is not None, "keeps a mean of gradients"),
            (method.full.budget != math.inf, "sets its radius by the length of gradients"),
        ):
            if depends:
                raise ValueError(
                    f"{method} {what}, which with a GradScaler would be in units of a scale that changes: train in bf16, "
                    "which needs no scaler, or with another method"
                )
        if method.full.after:
            raise ValueError(
                f"{method} takes a step of its own by gradients that a GradScaler has scaled: give it decoupled=False, or "
                "train in bf16, which needs no scaler"
            )

    @property
    def scale(self) -> Callable[[Tensor], Tensor] | None:
        """What makes of a loss the one that is differentiated."""
        return None if self._scaled is None else self._scaled.scaler.scale

    def __enter__(self) -> None:
        """Before anything is changed.

        Raises:
            RuntimeError: ``scaler.update()`` is due, or the base optimizer's own step would have to be skipped.
        """
        self._check_method()
        if self._scaled is None:
            return
        base = self._engine.base
        if fused_rule(base) is None:
            raise RuntimeError(
                f"scaler skips an update on the device, which {type(base).__name__}'s own step cannot: use a base optimizer "
                "whose step is a fused kernel (SGD, Adam or AdamW without hooks, capturable and differentiable), or a "
                "passes() loop with scaler.step(opt)"
            )
        if not self._scaled.is_ready:
            raise RuntimeError(
                "another step of this optimizer before scaler.update(): call it once after every step, as after scaler.step()"
            )

    def __call__(self) -> Tensor | None:
        """Unscale ``p.grad``, then the user's turn; what was found, for the update."""
        found_inf = None
        if self._scaled is not None:
            self._scaled.scaler.unscale_(self._opt)
            self.found_infs = self._scaled.found_infs
            if not self.found_infs:
                raise RuntimeError(
                    "no parameter has a gradient for the scaler to look at: does the loss depend on the parameters?"
                )
            device = self._engine.store.device
            for found in self.found_infs.values():
                found = found.to(device, non_blocking=device.type != "cpu")
                found_inf = found if found_inf is None else found_inf + found
        if self._before_update is not None:
            self._before_update()
        return found_inf

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self._scaled is not None and kind is None:
            self._scaled.has_stepped(self.found_infs)
        else:
            self.forget()

    def forget(self) -> None:
        """The step did not take place."""
        if self._scaled is not None:
            self._scaled.forget()
