# SPDX-License-Identifier: Apache-2.0
"""Every operator on its own, as a step calls it. All that the benchmarks know of operators is here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradients import Gradients
from measure import Call
from msam_kernels import backends, methods
from msam_kernels.backends import reference
from msam_kernels.flat import Flat

UNTOUCHED, SAVED, PERTURBED = reference.UNTOUCHED, reference.SAVED, reference.PERTURBED
SIGMA, LMBDA, ETA = 1.0, 0.9, 0.01
STACK = 4  # micro-batches of the kernels that take several at once


def chosen_backend(name: str, device: torch.device) -> str:
    """What "auto" stands for on ``device``."""
    if name != "auto":
        return name
    chosen = backends.get_backend(name, device)
    for name in backends.BACKENDS:
        # One that is not there, or is not for this device, says so by raising.
        with contextlib.suppress(RuntimeError):
            if backends.get_backend(name, device) is chosen:
                break
    return name


class From(Call):
    """Calls of ``run(status=...)`` that find all rows of the table in the same state."""

    def __init__(self, state: int, run: Callable[..., object], flat: Flat):
        super().__init__(run)
        self.state, self.flat = state, flat
        self.ready: list[Tensor] = []

    def prepare(self, count: int) -> None:
        self.ready = list(torch.full((count, self.flat.rows), self.state, dtype=torch.uint8, device=self.flat.device))

    def __call__(self) -> None:
        self.run(status=self.ready.pop())


class Kernels:
    """The buffers of a problem, and the operators on them. ``grads`` is the gradient at w."""

    def __init__(self, gradients: Gradients, backend: str):
        params = gradients.parameters()
        self.k = backends.get_backend(backend, params[0].device)
        self.flat = flat = Flat(params, [0] * len(params), flatten=True, backend=self.k)
        self.table, self.w = flat.table, flat.weights
        self.grads, self.at_e, self.total = ([g.clone() for g in master] for master in gradients.masters)
        self.saved, self.ema, self.first, self.second = (flat.new_buffer() for _ in range(4))
        self.saved.copy_(self.w[0])
        self.step = torch.zeros(len(params) + 1, device=flat.device)
        self.radii = self.settings(gradients.rho, math.inf)
        self.norm_sq = self.k.norm(self.w, self.grads, self.table)

    def settings(self, *values: float) -> Tensor:
        return torch.tensor([values], dtype=torch.float64, device=self.flat.device)

    def ascend(self, name: str = "ascend", state: int = UNTOUCHED, **options) -> Call:
        """Or, by its name, ``perturb``. Two launches with ``arrived=None``."""
        if name == "perturb":
            options["norm_sq"] = self.norm_sq
        else:
            options = {"arrived": self.flat.arrived} | options
        achieved_sq = torch.empty(self.flat.sums, dtype=torch.float64, device=self.flat.device)
        options |= {"radii": self.radii, "saved": self.saved, "achieved_sq": achieved_sq}
        operator = getattr(self.k, name)
        return From(state, lambda status: operator(self.w, self.grads, self.table, status=status, **options), self.flat)

    def norm(self, **options) -> Call:
        return Call(lambda: self.k.norm(self.w, self.grads, self.table, **options))

    def gram(self, *vectors: list[Tensor]) -> Call:
        terms = [t for vector in vectors for t in vector]
        return Call(lambda: self.k.gram(terms, self.table, count=len(vectors)))

    def stacks(self) -> list[Tensor]:
        """The gradients of several micro-batches."""
        return [g.expand(STACK, *g.shape).clone() for g in self.grads]

    def ascend_stack(self, **options) -> Call:
        """w + e of several micro-batches, beside w."""
        copies = torch.zeros(STACK, self.flat.size, dtype=self.flat.dtype, device=self.flat.device)
        achieved_sq = torch.empty(STACK, *self.flat.sums, dtype=torch.float64, device=self.flat.device)
        options |= {"radii": self.radii, "saved": self.w[0], "achieved_sq": achieved_sq, "arrived": self.flat.arrived}
        grads = self.stacks()
        return Call(lambda: self.k.ascend([copies], grads, self.table, stack=STACK, **options))

    def combination(self, method: methods.SAM | None, *vectors: list[Tensor]) -> tuple[list[Tensor], dict]:
        """Terms and options: the vectors as ``method`` combines them, or with equal parts."""
        terms = [t for vector in vectors for t in vector]
        if method is None:
            share = 1.0 / len(vectors)
            return terms, {"coefs": methods.Coefficient().row(share) * len(vectors), "sums": []}
        plan = method.full
        coefs = [number for coefficient in plan.descent for number in coefficient.row()]
        sums = self.k.gram(terms[: plan.products * len(self.grads)], self.table, count=plan.products)
        return terms, {"coefs": coefs, "sums": [sums]}

    def descend(self, out: list[Tensor], *vectors: list[Tensor], method: methods.SAM | None = None) -> Call:
        terms, options = self.combination(method, *vectors)
        options |= {"saved": self.saved, "norm_sq": self.norm_sq, "last": False}
        return From(
            PERTURBED,
            lambda status: self.k.descend(self.w, out, terms, self.table, status=status, **options),
            self.flat,
        )

    def look(self) -> Call:
        """LookSAM's v."""
        terms, options = self.combination(None, self.at_e, self.grads)
        out, out_sq = (
            self.flat.parts(self.ema),
            torch.empty(self.flat.rows, dtype=torch.float64, device=self.flat.device),
        )
        return Call(lambda: self.k.descend([], out, terms, self.table, out_sq=out_sq, **options))

    def update_stack(self, rule: int) -> Call:
        """On the mean of several micro-batches, from weights that were never perturbed."""
        shares = torch.full((1, STACK), 1 / STACK, dtype=torch.float64, device=self.flat.device)
        states, settings = self.states(rule)
        terms, options = self.stacks(), {"rule": rule, "settings": settings, "step": self.step, "shares": shares}
        return Call(lambda: self.k.update(self.w, states, terms, self.table, coefs=[], sums=[], **options))

    def states(self, rule: int) -> tuple[list[Tensor], Tensor]:
        """And settings."""
        if rule == reference.SGD:
            return [self.first], self.settings(1e-3, 0.9, 0, 5e-4, 0, 0)
        return [self.first, self.second], self.settings(1e-4, 0.9, 0.999, 1e-8, 0.01, 0, 0, 1)

    def update(
        self, rule: int, *vectors: list[Tensor], state: int = PERTURBED, method: methods.SAM | None = None
    ) -> Call:
        states, settings = self.states(rule)
        terms, options = self.combination(method, *vectors)
        options |= {"rule": rule, "settings": settings, "step": self.step, "saved": self.saved}
        return From(
            state, lambda status: self.k.update(self.w, states, terms, self.table, status=status, **options), self.flat
        )


def kernel_calls(gradients: Gradients, backend: str) -> dict[str, tuple[float, Call]]:
    """P and the call of every kernel, by name."""
    k = Kernels(gradients, backend)
    g, at_e, total, sgd, adam = k.grads, k.at_e, k.total, reference.SGD, reference.ADAM
    friendly = {"ema": k.ema, "sigma": SIGMA}
    moving = {**friendly, "lmbda": LMBDA}
    mask = torch.full((k.flat.size // 8,), 255, dtype=torch.uint8, device=k.flat.device)
    bits = mask.nbytes / k.saved.nbytes
    gap, bilateral = methods.GapSAM(), methods.BilateralSAM()
    return {
        "norm": (1, k.norm()),
        "norm, friendly": (2, k.norm(**friendly)),
        "norm, adaptive": (2, k.norm(eta=ETA)),
        "perturb, first": (4, k.ascend("perturb")),
        "perturb, later": (3, k.ascend("perturb", SAVED)),
        "perturb to the other side": (3, k.ascend("perturb", PERTURBED)),
        "perturb, first, friendly": (6, k.ascend("perturb", **moving)),
        "perturb, later, friendly": (5, k.ascend("perturb", SAVED, **moving)),
        "perturb, first, adaptive": (4, k.ascend("perturb", eta=ETA)),
        "perturb, first, masked": (4 + bits, k.ascend("perturb", mask=mask)),
        "ascend": (5, k.ascend()),
        "ascend, friendly": (8, k.ascend(**moving)),
        "ascend, four at once": (3 * STACK + 1, k.ascend_stack()),
        "gram of two": (2, k.gram(at_e, g)),
        "gram of three": (3, k.gram(total, at_e, g)),
        "descend, first": (2, k.descend(at_e, at_e)),
        "descend, accumulating": (5, k.descend(total, at_e, total)),
        "descend, two combined": (5, k.descend(at_e, at_e, g, method=gap)),
        "descend, v of LookSAM": (3, k.look()),
        "sgd": (5, k.update(sgd, at_e, state=UNTOUCHED)),
        "restore + sgd": (5, k.update(sgd, at_e)),
        "restore + sgd, accumulating": (6, k.update(sgd, at_e, total)),
        "restore + sgd, two combined": (6, k.update(sgd, at_e, g, method=gap)),
        "restore + sgd, three combined": (7, k.update(sgd, total, at_e, g, method=bilateral)),
        "sgd, mean of four": (STACK + 4, k.update_stack(sgd)),
        "adamw": (7, k.update(adam, at_e, state=UNTOUCHED)),
        "restore + adamw": (7, k.update(adam, at_e)),
        "restore + adamw, accumulating": (8, k.update(adam, at_e, total)),
    }
