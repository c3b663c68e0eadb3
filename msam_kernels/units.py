# SPDX-License-Identifier: Apache-2.0
"""The scale that a ``GradScaler`` gives gradients, and what a step that it may still skip has changed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ._torch import Scaled, moved
from .backends.reference import PERTURBED
from .flat import Held, Memory
from .methods import Plan
from .store import Store


class Units:
    """Gradients of a scaled loss are in units of the scale, and so is a mean of them while it is worked with.

    Nothing waits for the device: the scale is read there. Its tensors stay at their addresses, where captured graphs find them.

    Attributes:
        scale: float64 ``[1]``, that of the latest step; None where its loss was not scaled.
        are_known: whether the loss of any step was scaled; until then there is nothing to read or to bring anywhere.
    """

    def __init__(self, store: Store):
        self._store = store
        self.scale: Tensor | None = None
        self.are_known = False
        self._scale: Tensor | None = None
        self._of_means: Tensor | None = None  # None: those of the loss
        self._scaled_means = False
        self._brought = False  # whether they are in those of the step under way

    def read(self, scaled: Scaled | None) -> None:
        """Whose gradients are about to be looked at.

        Raises:
            RuntimeError: the scaler has not scaled any loss yet.
        """
        self.scale, self._brought = None, False
        if scaled is None:
            return
        scale = scaled.scale
        if scale is None:
            raise RuntimeError(
                "scaler= was given, but no loss was scaled: scaler.scale(loss).backward() in every pass of the loop"
            )
        if self._scale is None or self._scale.device != self._store.device:
            self._store.check_not_capturing("the loss scale")
            self._scale = torch.ones(1, dtype=torch.float64, device=self._store.device)
            self._of_means = (
                torch.ones_like(self._scale) if self._of_means is None else moved(self._of_means, self._store.device)
            )
        self._scale.copy_(moved(scale.reshape(1), self._store.device))
        self.scale, self.are_known = self._scale, True

    @property
    def now(self) -> tuple[Tensor | None, bool]:
        """What the host knows, which a graph that is replayed leaves as it was captured."""
        return self.scale, self._scaled_means

    @now.setter
    def now(self, units: tuple[Tensor | None, bool]) -> None:
        self.scale, scaled_means = units
        self._scaled_means = self._scaled_means or scaled_means

    def tensors(self) -> list[Tensor]:
        return [t for t in (self._scale, self._of_means) if t is not None]

    def bring_means(self) -> None:
        """Means of gradients into the units of the gradients of this step; they are only touched where these are others.

        Called before each ascent, as somebody may have looked since the last one; where nobody has, it does nothing.
        """
        if not self._brought:
            self.bring_means_to(self.scale)
            self._brought = True

    def bring_back(self) -> None:
        """Means of gradients into the units of the loss, for whoever looks at them."""
        if self._scaled_means:
            self.bring_means_to(None)
            self._brought = False

    def bring_means_to(self, scale: Tensor | None) -> None:
        """Means of gradients into the units of that scale; None: of the loss."""
        if self._of_means is None or (scale is None and not self._scaled_means):
            return
        to = torch.ones_like(self._of_means) if scale is None else moved(scale, self._of_means.device)
        self._store.multiply("ema", to / self._of_means)
        self._of_means.copy_(to)
        self._scaled_means = scale is not None


class Undo:
    """What a step changes that the update does not: memories and masks, to be brought back where the update is skipped.

    Args:
        store: whose.
        units: of its means, which are those of the step's gradients by now.
        plan: of the step.
        chooses: whether the step may choose a mask.
        v_step, mask_step: the engine's.
    """

    def __init__(self, store: Store, units: Units, plan: Plan, *, chooses: bool, v_step: int, mask_step: int):
        self._units = units
        #: What the means are kept in the units of.
        self._scale = units.scale.clone() if units.scale is not None and plan.lmbda is not None else None
        self.v_step, self.mask_step = v_step, mask_step if chooses else None
        changed = [(flat, "ema") for _, flat, _ in store.parts(plan.only)] if plan.lmbda is not None else []
        changed += [(flat, "v") for flat in store.flats] if plan.remembers_v else []
        self._memories: list[tuple[Memory, Held]] = []
        for flat, name in changed:
            memory = flat.memory(name, math.nan)
            self._memories.append((memory, memory.now()))
        masks = [(flat, flat.mask_of_all) for flat in store.flats] if chooses else []
        self._masks = [(flat, None if mask is None else mask.clone()) for flat, mask in masks]

    def bring_back(self) -> None:
        """The step was skipped."""
        if self._scale is not None:  # somebody may have looked, or the scale have changed
            self._units.bring_means_to(self._scale)
        for memory, held in self._memories:
            memory.put_back(held)
        for flat, mask in self._masks:
            flat.hold_mask(None if mask is None else flat.mask_as_now(mask))

    def bring_back_where(self, found_inf: Tensor) -> None:
        """The memories, where ``found_inf``, on the device, is not 0; else they are neither read nor written."""
        if self._scale is not None:
            self._units.bring_means()
        for memory, held in self._memories:
            flat = memory.flat
            if memory.started and not held.started:  # the host takes it for begun: it counts nothing then
                held.buffer.zero_()
                held = replace(held, started=True)
            buffer, skipped = memory.as_now(held), moved(found_inf, flat.device) != 0
            status = (skipped.to(torch.uint8) * PERTURBED).expand(flat.rows).contiguous()
            flat.backend.descend([memory.buffer], [], [], flat.table, coefs=[], sums=[], saved=buffer, status=status)
            if buffer is not held.buffer:
                memory.measure()
                continue
            for t, values in zip((memory.terms, memory.square), held.sums, strict=True):
                t.copy_(torch.where(skipped, values, t))
