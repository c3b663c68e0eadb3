# SPDX-License-Identifier: Apache-2.0
"""Gradients as autograd leaves them, without the model: new tensors in ``p.grad`` that nobody else holds, nor Python yet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from measure import Call

SETS = 3  # An odd number, so that no gradient comes at w in every step: F-SAM's mean would soon be that one.


class Gradients:
    """The weights that a problem begins with, and some random gradients to make copies of."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [(torch.randn(s, generator=generator, device=device) * scale).to(dtype) for s in shapes]

        self.device, self.dtype = device, dtype
        self.numel = sum(math.prod(s) for s in shapes)
        self.nbytes = self.numel * dtype.itemsize
        self.weights = draw(0.05)
        self.masters = [draw(0.1) for _ in range(SETS)]
        # As large in every element as the gradients, so that a wrong perturbation shows in the weights.
        self.rho = 0.1 * math.sqrt(self.numel)

    def parameters(self, dtype: torch.dtype | None = None) -> list[nn.Parameter]:
        return [nn.Parameter(w.to(dtype or w.dtype, copy=True)) for w in self.weights]


class Backward:
    """Stands for a forward and backward pass of ``params``: each call leaves a copy of the next of ``gradients``.

    ``seconds`` is the host's time in the calls since ``prepare``, which is to be subtracted from what is measured around
    them. Autograd makes the copies: a tensor that Python has seen takes other ways for the rest of its life. Where a GPU would
    make them meanwhile, ``prepare(passes)`` makes them ahead.
    """

    def __init__(self, gradients: Gradients, params: list[nn.Parameter]):
        self.gradients, self.params = gradients, params
        self.ahead = gradients.device.type == "cuda"
        self.loss = torch.ones((), device=gradients.device)
        self.calls, self.seconds = 0, 0.0
        self.stock: list[list[Tensor]] = []

    def prepare(self, passes: int) -> None:
        self.stock.clear()
        if self.ahead:
            self.stock += [[g.clone() for g in self._next(self.calls + i)] for i in reversed(range(passes))]
        self.seconds = 0.0

    def _next(self, call: int) -> list[Tensor]:
        """Gradients, to be copied."""
        return self.gradients.masters[call % SETS]

    def __call__(self) -> Tensor:
        start = time.perf_counter()
        if self.stock:
            for p, g in zip(self.params, self.stock.pop(), strict=True):
                p.grad = g
        else:
            torch.autograd.backward(self.params, self._next(self.calls))
        self.calls += 1
        self.seconds += time.perf_counter() - start
        return self.loss


class Checked(Backward):
    """Gradients of <M_i, w> + c_i/2 ||w - w_0||² at the weights as they are, another i in each call."""

    @torch.no_grad()
    def _next(self, call: int) -> list[Tensor]:
        if any(p.grad is not None for p in self.params):
            raise RuntimeError("a pass was run without clearing p.grad")
        c = 1 + (call % SETS) / 4
        parts = zip(self.params, self.gradients.weights, self.gradients.masters[call % SETS], strict=True)
        return [(p - w).mul_(c).add_(g) for p, w, g in parts]


class Steps(Call):
    """To be timed: ``period`` steps, which call ``backward`` so many times in all."""

    def __init__(self, step: Callable[[Backward], object], backward: Backward, passes: int, period: int = 1):
        self.step, self.backward, self.passes, self.period = step, backward, passes, period
        if backward.ahead:
            free = torch.cuda.mem_get_info(backward.gradients.device)[0]
            self.most = max(1, int(free / 4 / (passes * backward.gradients.nbytes)))

    @property
    def excluded(self) -> float:
        return self.backward.seconds

    def prepare(self, count: int) -> None:
        self.backward.prepare(count * self.passes)

    def __call__(self) -> None:
        for _ in range(self.period):
            self.step(self.backward)
