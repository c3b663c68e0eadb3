# SPDX-License-Identifier: Apache-2.0
"""The family of methods: small frozen dataclasses, one per method, that say how the ascent direction is made.

Every method takes ``start``: the optimizer steps that the base optimizer takes alone, with one pass per micro-batch, before
the method sets in (late-phase SAM, 2410.10373: the last 5-10 % of training are enough). The base optimizer's state carries
over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def _check_number(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        bound = f">= {low}" if math.isinf(high) else f"between {low} and {high}"
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimization: e = rho·g / (‖g‖ + 1e-12), and the gradient at w + e is used.

    With several micro-batches this is mSAM: each has its own e, and the gradients at w + e are averaged by size.

    Source: Foret et al., 2010.01412; mSAM: Behdin et al., 2302.09693 and 2212.04343.
    """

    start: int = field(default=0, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.start, int) or isinstance(self.start, bool) or self.start < 0:
            raise ValueError(f"start must be a number of steps >= 0, got {self.start!r}")

    @property
    def direction(self) -> dict[str, float]:
        """Options of the kernels ``inner_products`` and ``perturb`` that make this method's direction."""
        return {}

    @property
    def ema_decay(self) -> float | None:
        """Decay of the mean gradient that the direction leaves out; None for methods that keep none."""
        return None

    @property
    def combines(self) -> bool:
        """Whether the descent combines ĝ, the gradient at w + e, with g, the one at w, which is then kept until there."""
        return False

    def descent_coefs(self, dots: Tensor) -> Tensor:
        """What is used for the descent: coefs[0]·ĝ, or coefs[0]·ĝ + coefs[1]·g; ``dots``: ĝ·ĝ, ĝ·g and g·g, float64."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdaptiveSAM(SAM):
    """Adaptive SAM (ASAM): e = rho·T²·g / (‖T·g‖ + 1e-12) with T = |w| + eta, element by element.

    rho is about ten times that of SAM.

    Args:
        eta: keeps weights near zero moving; 0.01 in the authors' class, 0 in the most copied port.

    Source: Kwon et al., 2102.11600.
    """

    eta: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        _check_number("eta", self.eta, 0)

    @property
    def direction(self) -> dict[str, float]:
        return {"eta": float(self.eta)}


@dataclass(frozen=True)
class FriendlySAM(SAM):
    """Friendly SAM (F-SAM): the ascent direction is what is particular to this batch, d = g − sigma·ema.

    e = rho·d / (‖d‖ + 1e-12), then ema ← lmbda·ema + (1 − lmbda)·g with the raw gradient g. A parameter's first
    gradient starts its ema and is its d. With mSAM each micro-batch is F-SAM's batch: one ema, updated by every
    micro-batch in turn. State: one buffer of the size of the parameters.

    Under a ``GradScaler`` g and the ema carry the loss scale: after a change of scale the ema is off by that factor for
    about 1 / (1 - lmbda) micro-batches.

    Repeated or full batches make d vanish, and what is left to normalise is noise: use F-SAM with real mini-batches.

    Args:
        sigma: share of the mean gradient that is taken out.
        lmbda: decay of the mean gradient.

    Source: Li et al., 2403.12350, as in the authors' code (subtract the old ema, then update it).
    """

    sigma: float = 1.0
    lmbda: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        _check_number("sigma", self.sigma, 0)
        _check_number("lmbda", self.lmbda, 0, 1)

    @property
    def direction(self) -> dict[str, float]:
        return {"sigma": float(self.sigma)}

    @property
    def ema_decay(self) -> float:
        return float(self.lmbda)


@dataclass(frozen=True)
class StableSAM(SAM):
    """Stable SAM: the gradient at w + e, as long as the one at w: ĝ·‖g‖ / (‖ĝ‖ + 1e-12).

    Source: Tan et al., 2401.07250.
    """

    @property
    def combines(self) -> bool:
        return True

    def descent_coefs(self, dots: Tensor) -> Tensor:
        lengths = dots.sqrt()
        return (lengths[2] / (lengths[0] + 1e-12)).reshape(1)


@dataclass(frozen=True)
class GapSAM(SAM):
    """Surrogate-gap guided SAM (GSAM): ĝ − alpha·(g − (g·ĝ / ‖ĝ‖²)·ĝ), which also descends the gap L(w + e) − L(w).

    The part of g that is orthogonal to ĝ is taken off. A zero ĝ has no direction: then it is all of g.

    Args:
        alpha: weight of the gap; 0 is SAM.

    Source: Zhuang et al., 2203.08065.
    """

    alpha: float = 0.4

    def __post_init__(self):
        super().__post_init__()
        _check_number("alpha", self.alpha, 0)

    @property
    def combines(self) -> bool:
        return self.alpha != 0

    def descent_coefs(self, dots: Tensor) -> Tensor:
        along = torch.where(dots[0] == 0, 0.0, dots[1] / dots[0])
        return torch.stack([1 + self.alpha * along, torch.full_like(along, -self.alpha)])
