# SPDX-License-Identifier: Apache-2.0
"""The family of methods: small frozen dataclasses, one per method, that say what a step consists of.

They add up, where that means something::

    methods.FriendlySAM() + methods.SparseSAM(sparsity=0.8) + methods.StableSAM()

Every method takes ``start``: the optimizer steps that the base optimizer takes alone, with one pass per micro-batch, before
the method sets in (late-phase SAM, 2410.10373: the last 5-10 % of training are enough). The base optimizer's state carries
over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ._checks import check_integer, check_number
from ._numbers import Number, at_least_0, sqrt
from .reference import EPS


def _coefs(values: list[Number], known: Number) -> Tensor:
    """float64 ``[k]``; NaN where ``known``, sums over the gradients, is not finite: the kernels leave a 0 out."""
    if isinstance(known, Tensor):
        values = [v if isinstance(v, Tensor) else known.new_full((), v) for v in values]
        return torch.stack(values) + (known - known)
    return torch.tensor([v + (known - known) for v in values], dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimization: e = rho·g / (‖g‖ + 1e-12), and the gradient at w + e is used.

    With several micro-batches this is mSAM: each has its own e, and the gradients at w + e are averaged by size.

    Source: Foret et al., 2010.01412; mSAM: Behdin et al., 2302.09693 and 2212.04343.
    """

    start: int = field(default=0, kw_only=True)

    def __post_init__(self):
        check_integer("start", self.start, 0)

    def __add__(self, other: SAM) -> SAM:
        """Both methods at once, e.g. one's direction and the other's mask.

        Raises:
            ValueError: they contradict each other; the message says in what.
        """
        if not isinstance(other, SAM):
            return NotImplemented
        parts = [
            part for method in (self, other) for part in (method.parts if isinstance(method, Composition) else [method])
        ]
        starts = sorted({method.start for method in (self, other) if method.start})
        if len(starts) > 1:
            raise ValueError(f"{self} and {other} start at different steps: give one start, to either")
        told = [replace(part, start=0) for part in parts if type(part) is not SAM] or [SAM()]
        whole = told[0] if len(told) == 1 else Composition(tuple(told))
        return replace(whole, start=starts[0] if starts else 0)

    # What the optimizer asks. A method answers what it does otherwise than SAM.

    #: Decay of the mean gradient that the direction leaves out; None for methods that keep none.
    ema_decay = None
    #: The part that perturbs only what a mask names, a ``SparseSAM``.
    sparse = None
    #: The part that reuses what it found for some steps, a ``LookSAM``.
    look = None
    #: Radius of a second perturbation, to the other side, with a pass of its own: a number or a function of the step.
    rho_min = None
    #: How many gradients from before the last pass the descent takes in: they are kept until there.
    kept = 0
    #: Whether the two that are kept may be added up: their coefficients are equal, and no coefficient needs more of the first
    #: than its norm, or anything of the second.
    adds_kept = False
    #: Whether every step that perturbs leaves a direction, v, to the steps after it.
    keeps_v = False
    #: Whether the descent gets the length of g, the gradient at w.
    rescales = False

    @property
    def direction(self) -> dict[str, float]:
        """Options of the kernels ``inner_products`` and ``perturb`` that make this method's direction."""
        return {}

    def combination(self, dots: list[Number]) -> list[Number]:
        """Coefficients of the last pass's gradient and of those kept, the latest first.

        ``dots``: the sums of the operator of that name, of these vectors; where those kept were added up, 0 for x·y.
        """
        return [1.0]

    def descent_coefs(self, dots: list[Number], grad_norm_sq: Number) -> Tensor:
        """The same, float64 ``[k]``, as long as g where the method rescales. ``grad_norm_sq``: g·g."""
        coefs = self.combination(dots)
        if self.rescales:
            # The length of the combination: each dot counts once on the diagonal and twice beside it.
            pairs = [(u, v) for v in range(len(coefs)) for u in range(v + 1)]
            terms = [coefs[u] * coefs[v] * dot * (1 + (u != v)) for (u, v), dot in zip(pairs, dots, strict=False)]
            factor = sqrt(grad_norm_sq) / (sqrt(at_least_0(sum(terms))) + EPS)
            coefs = [coef * factor for coef in coefs]
        return _coefs(coefs, sum(dots, grad_norm_sq))


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
        check_number("eta", self.eta, 0)

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
        check_number("sigma", self.sigma, 0)
        check_number("lmbda", self.lmbda, 0, 1)

    @property
    def direction(self) -> dict[str, float]:
        return {"sigma": float(self.sigma)}

    @property
    def ema_decay(self) -> float:
        return float(self.lmbda)


@dataclass(frozen=True)
class StableSAM(SAM):
    """Stable SAM: the gradient at w + e, as long as the one at w: ĝ·‖g‖ / (‖ĝ‖ + 1e-12).

    Added to a method whose descent is another vector, it does the same to that. State: one number.

    Source: Tan et al., 2401.07250.
    """

    rescales = True


@dataclass(frozen=True)
class SparseSAM(SAM):
    """Sparse SAM: e is that of SAM where a mask is set, and 0 elsewhere; the norm is that of the whole gradient.

    A mask holds the share 1 − ``sparsity`` of the elements of all parameters together. State: one bit per element. The first
    perturbing step chooses one, by its own gradient or at random; ``opt.mask`` shows it and takes another.

    Args:
        sparsity: share of the elements that is not perturbed; 0 is SAM.
        mask: "fisher": the elements with the largest sum of squared gradients. ``opt.update_mask(loss_fn, *samples)`` takes
            the gradients of single samples, as the authors do; every ``update_every`` steps the gradients of the step's
            micro-batches, which are there anyway, are taken instead (in loops of ``passes()`` without arguments those of the
            first).
            "dynamic": every ``update_every`` steps, of the elements in the mask those with the smallest gradients make way
            for others, chosen at random; their share falls from ``drop_rate`` to 0 as a cosine over ``total_steps``.
        update_every: steps from one mask to the next; None: only ``opt.update_mask`` chooses one.
        drop_rate: share of the mask that changes at first.
        total_steps: of the training; needed where ``mask`` is "dynamic".
        seed: of the random choices, >= 0: with the same parameters in the same order, on the same type of device, they depend
            on it and the step alone.

    Source: Mi et al., 2210.05177 and 2306.17504.
    """

    sparsity: float = 0.5
    mask: str = "fisher"
    update_every: int | None = 100
    drop_rate: float = 0.5
    total_steps: int | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_number("sparsity", self.sparsity, 0, 1)
        check_number("drop_rate", self.drop_rate, 0, 1)
        if self.mask not in ("fisher", "dynamic"):
            raise ValueError(f"mask must be 'fisher' or 'dynamic', got {self.mask!r}")
        if self.update_every is not None:
            check_integer("update_every", self.update_every, 1)
        if self.total_steps is not None:
            check_integer("total_steps", self.total_steps, 1)
        elif self.mask == "dynamic":
            raise ValueError(
                "mask='dynamic' changes less and less of the mask: give total_steps, those of the training"
            )
        check_integer("seed", self.seed, 0)

    @property
    def sparse(self) -> SparseSAM:
        return self

    def share_dropped(self, step: int) -> float:
        """Of a dynamic mask, at a step: drop_rate / 2 · (1 + cos(π·step / total_steps))."""
        return self.drop_rate / 2 * (1 + math.cos(math.pi * min(step / self.total_steps, 1)))


@dataclass(frozen=True)
class LookSAM(SAM):
    """LookSAM: SAM every k-th step; the others take one pass and g + alpha·‖g‖·v, with g the step's mean gradient.

    v is the direction of what SAM adds to the gradient: of ĝ − (g·ĝ / (‖g‖² + 1e-12))·g, averaged over the micro-batches of
    the last SAM step by size. It is kept as it was summed up, and normalised where it is used; one that is not finite is
    left out. Where ĝ is parallel to g, v is what rounding leaves and no direction. In a loop of ``passes()`` without
    arguments, each use takes its own gradient for g. State: one buffer of the size of the parameters.

    Args:
        k: steps from one SAM step to the next; 1 is SAM.
        alpha: weight of v; with 0 the steps between are the base optimizer's.

    Source: Liu et al., 2203.02714, with global norms.
    """

    k: int = 5
    alpha: float = 0.7

    def __post_init__(self):
        super().__post_init__()
        check_integer("k", self.k, 1)
        check_number("alpha", self.alpha, 0)

    @property
    def look(self) -> LookSAM:
        return self

    @property
    def keeps_v(self) -> bool:
        return self.k > 1 and self.alpha != 0

    @staticmethod
    def v_coefs(dots: list[Number]) -> Tensor:
        """What a micro-batch adds to v: coefs[0]·ĝ + coefs[1]·g; ``dots``: ĝ·ĝ, ĝ·g and g·g."""
        return _coefs([1.0, -(dots[1] / (dots[2] + EPS))], sum(dots))

    def reuse_coefs(self, grad_norm_sq: Number, v_norm_sq: Tensor) -> Tensor:
        """What a step between uses: coefs[0]·g + coefs[1]·v."""
        weight = self.alpha * sqrt(grad_norm_sq) / (v_norm_sq.sqrt() + EPS)
        weight = torch.where(v_norm_sq.isfinite(), weight, 0.0)
        return torch.stack([torch.ones_like(weight), weight])


@dataclass(frozen=True)
class BilateralSAM(SAM):
    """Bilateral SAM: g⁺ + g − (‖g⁺‖ / (‖g⁻‖ + 1e-12))·g⁻, with g⁺ at w + rho·u and g⁻ at w − rho_min·u, u = d / (‖d‖ + 1e-12).

    Three passes: where the loss falls behind w, the descent is led there too. The authors' code updates from the point
    w − rho_min·u, whose tensor it took for the saved one; this class implements the rule, and updates from w.

    Args:
        rho_min: radius to the other side, >= 0; a number or a function of the step. The authors let it follow the learning
            rate from 0.05 to 0, e.g. ``lambda step: 0.05 * base.param_groups[0]["lr"] / initial_lr``. A group whose rho is
            0 is perturbed to neither side.

    Source: Deng et al., 2409.13173.
    """

    rho_min: float | Callable[[int], float] = 0.05

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.rho_min):
            check_number("rho_min", self.rho_min, 0)

    kept = 2
    adds_kept = True

    def combination(self, dots: list[Number]) -> list[Number]:
        return [-(sqrt(dots[2]) / (sqrt(dots[0]) + EPS)), 1.0, 1.0]


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
        check_number("alpha", self.alpha, 0)

    @property
    def kept(self) -> int:
        return int(self.alpha != 0)

    def combination(self, dots: list[Number]) -> list[Number]:
        if self.alpha == 0:
            return super().combination(dots)
        along = dots[1] / (dots[0] + (dots[0] == 0))  # 0 where ĝ is
        return [1 + self.alpha * along, -self.alpha]


@dataclass(frozen=True)
class Composition(SAM):
    """Several methods at once: made by ``+``. Each question is answered by the part that has something to say to it."""

    parts: tuple[SAM, ...]

    def __post_init__(self):
        super().__post_init__()
        kinds = [type(part) for part in self.parts]
        for kind in set(kinds):
            if kinds.count(kind) > 1:
                raise ValueError(f"{self} has {kind.__name__} {kinds.count(kind)} times: take one of them")
        descents = [part for part in self.parts if isinstance(part, (LookSAM, BilateralSAM, GapSAM))]
        if len(descents) > 1:
            raise ValueError(
                f"{' and '.join(map(repr, descents))} each say which gradients the descent is made of: take one of them"
            )
        for name in ("ema_decay", "sparse", "look", "rho_min", "kept", "adds_kept", "keeps_v", "rescales"):
            default = getattr(SAM, name)
            said = (getattr(part, name) for part in self.parts)
            object.__setattr__(self, name, next((answer for answer in said if answer != default), default))
        if self.look and self.rescales:
            raise ValueError(
                f"{self.look} sets the length of its steps by alpha, and {StableSAM.__name__} would set it again: take one "
                "of them"
            )

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts)) + (f" from step {self.start}" if self.start else "")

    @property
    def direction(self) -> dict[str, float]:
        return {name: value for part in self.parts for name, value in part.direction.items()}

    def combination(self, dots: list[Number]) -> list[Number]:
        return next((part for part in self.parts if part.kept), SAM()).combination(dots)
