# SPDX-License-Identifier: Apache-2.0
"""``SAM``, the drop-in for the most copied implementation: change one import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import methods
from ._torch import mark_stepped
from .optimizer import MicroBatchSAM


class SAM(MicroBatchSAM):
    r"""SAM with the interface ``SAM(params, torch.optim.SGD, rho=0.05, adaptive=False, lr=0.1, ...)``.

    ::

        loss_fn(model(x), y).backward()
        opt.first_step(zero_grad=True)  # w + e,  e = rho·g / (‖g‖ + 1e-12)
        loss_fn(model(x), y).backward()
        opt.second_step(zero_grad=True)  # w back, base optimizer's step

    ``step(closure)`` is both steps: the gradient at w is in ``p.grad`` already, the closure makes the second one.
    Everything else is ``MicroBatchSAM``: fused kernels, exact restore, checkpoints, schedulers on either object.

    Args:
        params: parameters or parameter groups, as for any optimizer; a group may have a "rho" of its own.
        base_optimizer: an optimizer class, e.g. ``torch.optim.SGD``.
        rho: radius of the perturbation, >= 0.
        adaptive: ASAM with eta = 0.
        model: if given, its BatchNorm-like layers record nothing between ``first_step`` and ``second_step``.
        kwargs: for the base optimizer.

    Source: the interface is that of github.com/davda54/sam.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        model: nn.Module | None = None,
        **kwargs: Any,
    ):
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            raise TypeError(
                f"base_optimizer must be an optimizer class such as torch.optim.SGD, got {base_optimizer!r}; for an "
                "instance use msam_kernels.MicroBatchSAM"
            )
        params = (
            params if isinstance(params, Tensor) else list(params)
        )  # torch refuses a single tensor in its own words
        for group in params:
            if isinstance(group, dict) and group.get("adaptive", adaptive) != adaptive:
                raise ValueError(
                    f"adaptive is one for all groups: got {adaptive=} and a group with {group['adaptive']!r}"
                )
        method = methods.AdaptiveSAM(eta=0.0) if adaptive else methods.SAM()
        super().__init__(base_optimizer(params, **kwargs), rho, method=method, model=model)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """w + e from the gradients in ``p.grad``."""
        engine = self.engine
        engine.check_idle("first_step()")
        step = engine.begin([1.0], clear=False)
        try:
            if step.plan.perturbs:
                step.ascend()
                engine.buffers.freeze()
            else:
                engine.step = None
        except BaseException:
            self.restore()
            raise
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """w back, and the base optimizer's step on the gradients in ``p.grad``.

        Raises:
            RuntimeError: without a ``first_step`` before it.
        """
        engine = self.engine
        step = engine.step
        if step is None:
            if engine.plan().perturbs:
                raise RuntimeError("second_step() without first_step(): call first_step() after the first backward()")
            step = engine.begin([1.0], clear=False)
        try:
            engine.buffers.thaw()
            step.update()
        except BaseException:
            self.restore()
            raise
        engine.step = None
        engine.count_step()
        mark_stepped(self)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None) -> Any:
        """Both steps; ``closure`` runs forward and backward at w + e. A sequence of closures is ``MicroBatchSAM.step``'s.

        Returns:
            What the closure returned, the loss at w + e.

        Raises:
            RuntimeError: without a closure.
        """
        if closure is None:
            raise RuntimeError(
                "SAM.step needs a closure that runs forward and backward; or call first_step, second_step"
            )
        if not callable(closure):
            return self.step_without_hooks(closure)  # they have run: torch wraps this method
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException:
            self.restore()
            raise
        self.second_step()
        return loss
