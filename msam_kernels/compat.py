# SPDX-License-Identifier: Apache-2.0
"""``SAM`` and ``FriendlySAM``, drop-ins for the most copied implementations: change one import."""

from __future__ import annotations

import reprlib
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

    Checkpoints of the copied implementation load: its saved weights (old_p) are dropped, the mean gradient of its F-SAM
    (momentum) becomes that of ``methods.FriendlySAM``, and ``adaptive`` of its groups decides on ASAM. It saves no state of the
    base optimizer, which begins anew with a warning. Ours load there too, but for what it does not load: the base optimizer's
    state and F-SAM's mean begin anew.

    Args:
        params: parameters or parameter groups, as for any optimizer; a group may have a "rho" of its own.
        base_optimizer: an optimizer class, e.g. ``torch.optim.SGD``, or a function that makes one of ``params`` and ``kwargs``.
        rho: radius of the perturbation, >= 0.
        adaptive: ASAM with eta = 0. ``group["adaptive"]`` tells which it is.
        model: if given, its buffers, e.g. BatchNorm's statistics, are in ``second_step`` what they were in ``first_step``.
        method: another method of the family, with ``adaptive`` that and ASAM.
        kwargs: for the base optimizer.

    Source: the interface is that of github.com/davda54/sam.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        model: nn.Module | None = None,
        *,
        method: methods.SAM | None = None,
        **kwargs: Any,
    ):
        if not callable(base_optimizer):
            raise TypeError(
                f"base_optimizer must be an optimizer class such as torch.optim.SGD, got {reprlib.repr(base_optimizer)}; for "
                "an instance use msam_kernels.MicroBatchSAM"
            )
        method = methods.SAM() if method is None else method
        params = (
            params if isinstance(params, Tensor) else list(params)
        )  # torch refuses a single tensor in its own words
        for group in params:
            if isinstance(group, dict) and group.get("adaptive", adaptive) != adaptive:
                raise ValueError(
                    f"adaptive is one for all groups: got {adaptive=} and a group with {group['adaptive']!r}"
                )
        if adaptive:
            method = method + methods.AdaptiveSAM(eta=0.0)
        base = base_optimizer(params, **kwargs)
        if not isinstance(base, Optimizer):
            raise TypeError(
                f"base_optimizer must be an optimizer class such as torch.optim.SGD or a function that returns an optimizer, "
                f"got {reprlib.repr(base_optimizer)}, which returned {reprlib.repr(base)}"
            )
        super().__init__(base, rho, method=method, model=model)
        base.defaults.setdefault("adaptive", self._is_adaptive)  # for groups that are added to either object
        for group in base.param_groups:
            group.setdefault("adaptive", self._is_adaptive)

    @property
    def _is_adaptive(self) -> bool:
        return self.method.full.eta is not None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``MicroBatchSAM.load_state_dict``; ``adaptive`` of the groups decides on ASAM.

        Raises:
            ValueError: ``state_dict`` is of other parameters, or some of its groups are adaptive; nothing was changed.
        """
        self.engine.check_idle("load_state_dict()")
        groups = state_dict.get("param_groups", ()) if isinstance(state_dict, dict) else ()
        adaptive = {group["adaptive"] for group in groups if "adaptive" in group}
        if len(adaptive) > 1:
            raise ValueError("adaptive is one for all groups: state_dict has some with True and some with False")
        method = self.method
        if adaptive and adaptive != {self._is_adaptive}:
            self.method = _not_adaptive(method) if self._is_adaptive else method + methods.AdaptiveSAM(eta=0.0)
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.method = method
            raise

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """w + e from the gradients in ``p.grad``.

        Raises:
            RuntimeError: there are none.
        """
        engine = self.engine
        if engine.step is not None and engine.step.perturbed:
            raise RuntimeError(
                "first_step() while the weights are perturbed: second_step(), or the end of a passes() loop, comes before it; "
                "opt.restore() gives that step up"
            )
        engine.check_idle("first_step()")
        step = engine.begin([1.0], clear=False)
        try:
            if not step.had_gradients and engine.store.flats:
                raise RuntimeError("first_step() without a gradient: call backward() before it")
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
    def step(
        self,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
    ) -> Any:
        """Both steps; ``closure`` runs forward and backward. A sequence of closures is ``MicroBatchSAM.step``'s.

        Where ``p.grad`` has gradients of this step, they are those at w: the closure runs once, at w + e, and leaves its
        gradient there. They are of this step if anything was added to them, or they were made, since the last one. Where
        there are none, or only what the last step left, or only zeros that ``zero_grad(set_to_none=False)`` put there, the
        step is ``MicroBatchSAM.step``'s: the closure runs at w and at w + e, and ``p.grad`` is None afterwards.

        Returns:
            What the closure returned when it first ran.

        Raises:
            RuntimeError: without a closure.
            ValueError: ``scaler`` or ``max_grad_norm`` where ``p.grad`` has gradients of this step.
        """
        if closure is None:
            raise RuntimeError(
                "SAM.step needs a closure that runs forward and backward; or call first_step, second_step"
            )
        between = self.between(None, scaler, max_grad_norm)
        if not callable(closure):
            return self.step_without_hooks(closure, between)  # they have run: torch wraps this method
        self.engine.check_idle("step()")
        if not self._has_gradients_of_this_step():
            return self.step_without_hooks(closure, between)
        if between is not None:
            raise ValueError(
                "scaler and max_grad_norm are for steps whose closure runs at w too, and p.grad has gradients of this step: "
                "call zero_grad() before, or clip between second_step's passes yourself"
            )
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
        # What the last step left there, or ``zero_grad`` filled with zeros; a reference would keep the memory.
        self.engine.left = list(zip(map(ref, grads), versions_of(grads), strict=True))

    def _has_gradients_of_this_step(self) -> bool:
        left = {id(g): version for old, version in self.engine.left if (g := old()) is not None}
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if [left.get(id(g)) for g in grads] == versions_of(grads):
            return False
        # The same tensors with other values: added to, or filled with zeros by somebody else's zero_grad.
        return any(id(g) not in left for g in grads) or any(bool(g.any()) for g in grads)


class FriendlySAM(SAM):
    """F-SAM with the interface ``FriendlySAM(params, torch.optim.SGD, rho, sigma, lmbda, adaptive, lr=0.1, ...)``.

    Args:
        params, base_optimizer, rho, adaptive, model, kwargs: as for ``SAM``.
        sigma, lmbda: see ``methods.FriendlySAM``.

    Source: the interface is that of github.com/nblt/F-SAM.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        adaptive: bool = False,
        model: nn.Module | None = None,
        **kwargs: Any,
    ):
        method = methods.FriendlySAM(sigma=sigma, lmbda=lmbda)
        super().__init__(params, base_optimizer, rho, adaptive, model, method=method, **kwargs)


def _not_adaptive(method: methods.SAM) -> methods.SAM:
    """The method without its part that is ASAM's."""
    parts = method.parts if isinstance(method, methods.Composition) else (method,)
    rest = methods.SAM(start=method.start, every=method.every, only=method.only)
    for part in parts:
        if not isinstance(part, methods.AdaptiveSAM):
            rest = rest + part
    return rest
