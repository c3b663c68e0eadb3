# SPDX-License-Identifier: Apache-2.0
"""The family of methods: small frozen dataclasses, one per method, that say what a step consists of: a ``Plan``.

Methods compose with ``+``, where that means something::

    methods.FriendlySAM() + methods.SparseSAM(sparsity=0.8) + methods.StableSAM()

Every method takes ``start``: the optimizer steps that the base optimizer takes alone, with one pass per micro-batch, before
the method sets in (late-phase SAM, 2410.10373: the last 5-10 % of training are enough). The base optimizer's state carries
over. And it takes ``every``: from there on, every so many steps are the method's, and the base optimizer takes the others
alone (an interval, as Composer has it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from ._checks import check_integer, check_number
from .backends.reference import EPS


@dataclass(frozen=True)
class Coefficient:
    """What a term of a descent counts: a + b·ratio, ratio = S_p / (S_q + eps), and with ``root`` √S_p / (√S_q + eps).

    S are sums over all parameters: first the inner products of the plan's vectors, ``dot(u, v)`` says which, and after them
    what else the step knows. A ratio whose denominator is 0 or not finite counts 0.
    """

    a: float = 1.0
    b: float = 0.0
    p: int = 0
    q: int = 0
    root: bool = False
    eps: float = EPS

    def row(self, scale: float = 1.0) -> list[float]:
        """As the operators take it, see ``backends``: ``scale`` times this coefficient."""
        return [scale, self.a, self.b, self.p, self.q, float(self.root), self.eps]


def dot(u: int, v: int) -> int:
    """The place of x_u·x_v, u ≤ v, in the Gram matrix of several vectors."""
    return v * (v + 1) // 2 + u


@dataclass(frozen=True)
class Plan:
    """What one step does. The default is the base optimizer's own step.

    A micro-batch has a pass at w, and one more after each perturbation. Its vectors are the gradient of its last pass, ĝ, and
    the ``holds`` gradients of the passes before that, the latest first.

    Attributes:
        perturbs: whether there is a pass at w + e, with e of the length rho of the parameter's group.
        opposite: the radius of one more perturbation, to the other side of w, or a function of the step that gives it; None
            without one. A group whose rho is 0 is perturbed to neither side.
        budget: what rho times the direction's norm may not exceed, or a function of the step that gives it.
        sigma, eta, lmbda: the direction, see ``backends.reference``; ``lmbda`` is the decay of the method's "ema", None without
            one.
        sparse: the method whose mask says what is perturbed.
        holds: gradients that are held for the descent.
        descent: the coefficients of the vectors.
        rescale: whether the descent gets the length of the gradient at w.
        keeps: what a micro-batch adds to the method's "v", as coefficients of the vectors, times its share of the batch.
        reuses: the coefficient of "v" in the descent: S are ‖g‖² of the step's mean gradient, and ‖v‖².
    """

    perturbs: bool = False
    opposite: float | Callable[[int], float] | None = None
    budget: float | Callable[[int], float] = math.inf
    sigma: float = 0.0
    eta: float | None = None
    lmbda: float | None = None
    sparse: SparseSAM | None = None
    holds: int = 0
    descent: tuple[Coefficient, ...] = (Coefficient(),)
    rescale: bool = False
    keeps: tuple[Coefficient, ...] = ()
    reuses: Coefficient | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the direction is the gradient itself, so that its norm is that of the ascent."""
        return self.lmbda is None and self.eta is None

    @cached_property
    def uses_products(self) -> bool:
        """Whether the descent's coefficients depend on inner products of the vectors."""
        return self.rescale or any(c.b for c in self.descent)

    @cached_property
    def products(self) -> int:
        """How many vectors the inner products are needed of, for the descent or for "v"."""
        if self.rescale:
            return len(self.descent)
        used = [place for c in (*self.descent, *self.keeps) if c.b for place in (c.p, c.q)]
        return 1 + max(v for v in range(3) if dot(0, v) <= max(used)) if used else 0

    @cached_property
    def length(self) -> int:
        """The sum whose root is the length that a descent is given; -1 where it keeps its own."""
        if not self.rescale:
            return -1
        return dot(self.holds, self.holds) if self.holds else 1  # or the ascent's norm, which follows ĝ·ĝ


#: The base optimizer's own step.
BASE = Plan()


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimization: e = rho·g / (‖g‖ + 1e-12), and the gradient at w + e is used.

    With several micro-batches this is mSAM: each has its own e, and the gradients at w + e are averaged by size.

    Source: Foret et al., 2010.01412; mSAM: Behdin et al., 2302.09693 and 2212.04343.
    """

    start: int = field(default=0, kw_only=True)
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_integer("start", self.start, 0)
        check_integer("every", self.every, 1)

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
        intervals = sorted({method.every for method in (self, other) if method.every > 1})
        if len(intervals) > 1:
            raise ValueError(f"{self} and {other} have different intervals: give one every, to either")
        told = [replace(part, start=0, every=1) for part in parts if type(part) is not SAM] or [SAM()]
        whole = told[0] if len(told) == 1 else Composition(tuple(told))
        return replace(whole, start=(starts or [0])[0], every=(intervals or [1])[0])

    # What a method says. ``change`` is all that most have to say.

    def change(self, plan: Plan) -> Plan:
        """``plan``, that of a step that perturbs, with what sets this method apart from SAM."""
        return plan

    @property
    def period(self) -> int:
        """Steps from one that perturbs to the next."""
        return 1

    @property
    def between(self) -> Plan:
        """The plan of the steps between those."""
        return BASE

    @cached_property
    def full(self) -> Plan:
        """The plan of a step that perturbs."""
        plan = self.change(Plan(perturbs=True))
        if plan.rescale and not plan.is_plain and not plan.holds:
            # The gradient at w is held for its length alone: with a coefficient of 0 it is not read.
            plan = replace(plan, holds=1, descent=(*plan.descent, Coefficient(0.0)))
        return plan

    def plan(self, steps: int, has_v: Callable[[], bool]) -> Plan:
        """The plan of the next step, after ``steps`` of them. ``has_v``: whether there is a "v" to reuse."""
        since, rest = divmod(steps - self.start, self.every)
        if since < 0 or rest:
            return BASE
        if since % self.period == 0:
            return self.full
        between = self.between
        return between if between.reuses is None or has_v() else self.full


@dataclass(frozen=True)
class AdaptiveSAM(SAM):
    """Adaptive SAM (ASAM): e = rho·T²·g / (‖T·g‖ + 1e-12) with T = |w| + eta, element by element.

    rho is about ten times that of SAM.

    Args:
        eta: keeps weights near zero moving; 0.01 in the authors' class, 0 in the most copied port.

    Source: Kwon et al., 2102.11600.
    """

    eta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta, 0)

    def change(self, plan: Plan) -> Plan:
        return replace(plan, eta=float(self.eta))


@dataclass(frozen=True)
class LossEquatedSAM(SAM):
    """Loss-equated SAM (LE-SAM): e = rho_t·g / (‖g‖ + 1e-12) with rho_t = min(sigma / (‖g‖ + 1e-12), rho).

    To first order e raises the loss by sigma, whatever the gradient's length. rho, of the group, is the most that ‖e‖ may be:
    where gradients vanish rho_t would grow without end. rho_t is made where the norm is, on the device. With other methods ‖g‖
    is the norm of their direction, as ASAM's ‖T·g‖; the other side of Bilateral SAM keeps its rho_min. A ``GradScaler`` is
    refused: a scaled gradient has another length.

    Args:
        sigma: the rise, >= 0, in units of the loss that is differentiated; a number or a function of the step. The authors let
            it rise linearly from 0 over the first epochs and fall to 0 as a cosine over the last fifth of them. 0.35 and a rho
            of 999, which is hardly a bound, are their command for ResNet-18 on CIFAR-100.

    Source: Wang et al., 2605.10183, as in the authors' code, without what that adds to the norm's square.
    """

    sigma: float | Callable[[int], float] = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.sigma):
            check_number("sigma", self.sigma, 0)

    def change(self, plan: Plan) -> Plan:
        return replace(plan, budget=self.sigma)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma", self.sigma, 0)
        check_number("lmbda", self.lmbda, 0, 1)

    def change(self, plan: Plan) -> Plan:
        return replace(plan, sigma=float(self.sigma), lmbda=float(self.lmbda))


@dataclass(frozen=True)
class StableSAM(SAM):
    """Stable SAM: the gradient at w + e, as long as the one at w: ĝ·‖g‖ / (‖ĝ‖ + 1e-12).

    Added to a method whose descent is another vector, it does the same to that. State: one number.

    Source: Tan et al., 2401.07250.
    """

    def change(self, plan: Plan) -> Plan:
        return replace(plan, rescale=True)


@dataclass(frozen=True)
class SparseSAM(SAM):
    """Sparse SAM: e is that of SAM where a mask is set, and 0 elsewhere; the norm is that of the whole gradient.

    A mask holds the share 1 − ``sparsity`` of the elements of all parameters that are trained. State: one bit per element. The
    first perturbing step chooses one, by its own gradient or at random; ``opt.mask`` shows it and takes another.

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

    def __post_init__(self) -> None:
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

    def change(self, plan: Plan) -> Plan:
        return replace(plan, sparse=self)

    def share_dropped(self, step: int) -> float:
        """Of a dynamic mask, at a step: drop_rate / 2 · (1 + cos(π·step / total_steps))."""
        assert self.total_steps is not None, "a dynamic mask has total_steps"
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

    k: int = 5  # with ``every``, of the method's own steps
    alpha: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("k", self.k, 1)
        check_number("alpha", self.alpha, 0)

    @property
    def period(self) -> int:
        return self.k

    @cached_property
    def between(self) -> Plan:
        if self.alpha == 0:
            return BASE
        return Plan(reuses=Coefficient(0.0, self.alpha, p=0, q=1, root=True))

    def change(self, plan: Plan) -> Plan:
        if self.k == 1 or self.alpha == 0:
            return plan
        v = (Coefficient(), Coefficient(0.0, -1.0, p=dot(0, 1), q=dot(1, 1)))
        return replace(plan, holds=1, keeps=v)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.rho_min):
            check_number("rho_min", self.rho_min, 0)

    def change(self, plan: Plan) -> Plan:
        coefficient = Coefficient(0.0, -1.0, p=dot(1, 1), q=dot(0, 0), root=True)
        return replace(plan, opposite=self.rho_min, holds=2, descent=(coefficient, Coefficient(), Coefficient()))


@dataclass(frozen=True)
class GapSAM(SAM):
    """Surrogate-gap guided SAM (GSAM): ĝ − alpha·(g − (g·ĝ / ‖ĝ‖²)·ĝ), which also descends the gap L(w + e) − L(w).

    The part of g that is orthogonal to ĝ is taken off. A zero ĝ has no direction: then it is all of g.

    Args:
        alpha: weight of the gap; 0 is SAM.

    Source: Zhuang et al., 2203.08065.
    """

    alpha: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0)

    def change(self, plan: Plan) -> Plan:
        if self.alpha == 0:
            return plan
        along = Coefficient(1.0, self.alpha, p=dot(0, 1), q=dot(0, 0), eps=0.0)
        return replace(plan, holds=1, descent=(along, Coefficient(-self.alpha)))


@dataclass(frozen=True)
class Composition(SAM):
    """Several methods at once: made by ``+``. The plan is that of SAM, changed by each of them."""

    parts: tuple[SAM, ...]

    def __post_init__(self) -> None:
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
        if self.alternating and any(isinstance(part, StableSAM) for part in self.parts):
            raise ValueError(
                f"{self.alternating} sets the length of its steps by alpha, and {StableSAM.__name__} would set it again: take "
                "one of them"
            )

    def __repr__(self) -> str:
        return (
            " + ".join(map(repr, self.parts))
            + (f" from step {self.start}" if self.start else "")
            + (f" every {self.every} steps" if self.every > 1 else "")
        )

    @cached_property
    def alternating(self) -> SAM | None:
        """The part that does not perturb in every step."""
        return next((part for part in self.parts if isinstance(part, LookSAM)), None)

    @property
    def period(self) -> int:
        return self.alternating.period if self.alternating else 1

    @property
    def between(self) -> Plan:
        return self.alternating.between if self.alternating else BASE

    def change(self, plan: Plan) -> Plan:
        for part in self.parts:
            plan = part.change(plan)
        return plan
