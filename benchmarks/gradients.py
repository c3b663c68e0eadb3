# SPDX-License-Identifier: Apache-2.0
"""Gradients as autograd leaves them, without the model: new tensors in ``p.grad``, which nobody else holds."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Gradients:
    """The weights that a problem begins with, and ``sets`` of random gradients to copy from."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, sets: int = 4):
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [(torch.randn(s, generator=generator, device=device) * scale).to(dtype) for s in shapes]

        self.numel = sum(math.prod(s) for s in shapes)
        self.device = device
        self.weights = draw(0.05)
        self.masters = [draw(0.1) for _ in range(sets)]
        # As large in every element as the gradients, so that a wrong perturbation shows in the weights.
        self.rho = 0.1 * math.sqrt(self.numel)

    def parameters(self, dtype: torch.dtype | None = None) -> list[nn.Parameter]:
        return [nn.Parameter(w.to(dtype or w.dtype, copy=True)) for w in self.weights]


class Backward:
    """Stands for the forward and backward pass of ``params``: each call assigns a copy of the next gradients.

    ``seconds`` adds up the host's time in the calls, to be subtracted from what is measured around them. On a GPU the
    copies of a step are made by ``prepare(passes)`` before its time begins, since the device would make them meanwhile.
    """

    def __init__(self, gradients: Gradients, params: list[nn.Parameter]):
        self.masters, self.params = gradients.masters, params
        self.ahead = gradients.device.type == "cuda"
        self.loss = torch.ones((), device=gradients.device)
        self.calls, self.seconds = 0, 0.0
        self.stock: list[list[Tensor]] = []

    def prepare(self, passes: int) -> None:
        self.stock = [self._copies(i) for i in reversed(range(self.calls, self.calls + passes))] if self.ahead else []
        self.seconds = 0.0

    def _copies(self, call: int) -> list[Tensor]:
        return [g.clone() for g in self.masters[call % len(self.masters)]]

    def __call__(self) -> Tensor:
        start = time.perf_counter()
        grads = self.stock.pop() if self.stock else self._copies(self.calls)
        self.calls += 1
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.seconds += time.perf_counter() - start
        return self.loss
