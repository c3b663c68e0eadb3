# SPDX-License-Identifier: Apache-2.0
"""``SAM``, the drop-in for the most copied implementation: change one import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import methods
from ._torch import mark_stepped, versions_of
from .optimizer import MicroBatchSAM


class SAM(MicroBatchSAM):
    r"""SAM with the interface ``SAM(params, torch.optim.SGD, rho=0.05, adaptive=False, lr=0.1, ...)``.

    ::

        loss_fn(model(x), y).backward()
        opt.first_step(zero_grad=True)  # w + e,  e = rho·g / (‖g‖ + 1e-12)
        loss_fn(model(x), y).backward()
        opt.second_step(zero_grad=True)  # w back, base optimizer's step

    ``step(closure)`` is both steps. Where the gradient at w is in ``p.grad`` already, the closure makes the second one;
    where it is not, as under frameworks whose closure does everything, the closure runs at w first. Everything else is
    ``MicroBatchSAM``: fused kernels, exact restore, checkpoints, schedulers on either object.

    Args:
        params: parameters or parameter groups, as for any optimizer; a group may have a "rho" of its own.
        base_optimizer: an optimizer class, e.g. ``torch.optim.SGD``.
        rho: radius of the perturbation, >= 0.
        adaptive: ASAM with eta = 0.
        model: if given, its buffers, e.g. BatchNorm's statistics, are in ``second_step`` what they were in ``first_step``.
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
        else:
            self._note_what_is_left()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None) -> Any:
        """Both steps; ``closure`` runs forward and backward. A sequence of closures is ``MicroBatchSAM.step``'s.

        Where ``p.grad`` has gradients of this step, they are those at w: the closure runs once, at w + e, and leaves its
        gradient there. They are of this step if anything was added to them, or they were made, since the last one. Where
        there are none, or only what the last step left, or only zeros that ``zero_grad(set_to_none=False)`` put there, the
        step is ``MicroBatchSAM.step``'s: the closure runs at w and at w + e, and ``p.grad`` is None afterwards.

        Returns:
            What the closure returned when it first ran.

        Raises:
            RuntimeError: without a closure.
        """
        if closure is None:
            raise RuntimeError(
                "SAM.step needs a closure that runs forward and backward; or call first_step, second_step"
            )
        if not callable(closure):
            return self.step_without_hooks(closure)  # they have run: torch wraps this method
        self.engine.check_idle("step()")
        if not self._has_gradients_of_this_step():
            return self.step_without_hooks(closure)
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException:
            self.restore()
            self._note_what_is_left()
            raise
        self.second_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if not set_to_none:
            self._note_what_is_left()

    def _note_what_is_left(self) -> None:
        grads = [p.grad for p in self.engine.store.parameters() if p.grad is not None]
        #: What the last step left there, or ``zero_grad`` filled with zeros.
        self.engine.left = list(
            zip(map(ref, grads), versions_of(grads), strict=True)
        )  # a reference would keep the memory

    def _has_gradients_of_this_step(self) -> bool:
        left = {id(g): version for old, version in self.engine.left if (g := old()) is not None}
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if [left.get(id(g)) for g in grads] == versions_of(grads):
            return False
        # The same tensors with other values: added to, or filled with zeros by somebody else's zero_grad.
        return any(id(g) not in left for g in grads) or any(bool(g.any()) for g in grads)
