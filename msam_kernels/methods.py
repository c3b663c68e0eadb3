# SPDX-License-Identifier: Apache-2.0
"""The family of methods: small frozen dataclasses, one per method, that say what a step consists of: a ``Plan``.

Methods compose with ``+``, where that means something::

    methods.FriendlySAM() + methods.SparseSAM(sparsity=0.8) + methods.StableSAM()

Every method takes ``start``: the optimizer steps that the base optimizer takes alone, with one pass per micro-batch, before
the method sets in (late-phase SAM, 2410.10373: the last 5-10 % of training are enough). The base optimizer's state carries
over. And it takes ``every``: from there on, every so many steps are the method's, and the base optimizer takes the others
alone (an interval, as Composer has it). And it takes ``only``: the parameters that are perturbed, where these are not all; with
``only=norm_layers(model)`` that is SAM-ON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn

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
        return [scale, *self._numbers]

    @cached_property
    def _numbers(self) -> tuple[float, ...]:
        return self.a, self.b, self.p, self.q, float(self.root), self.eps


def dot(u: int, v: int) -> int:
    """The place of x_u·x_v, u ≤ v, in the Gram matrix of several vectors."""
    return v * (v + 1) // 2 + u


class Parameters(frozenset[Tensor]):
    """Some parameters, told by identity."""

    def __repr__(self) -> str:
        return "<1 parameter>" if len(self) == 1 else f"<{len(self)} parameters>"


@dataclass(frozen=True)
class Plan:
    """What one step does. The default is the base optimizer's own step.

    A micro-batch has a pass at w, and one more after each perturbation. Its vectors are the gradient of its last pass, ĝ, and
    the ``holds`` gradients of the passes before that, the latest first.

    Attributes:
        perturbs: whether there is a pass at w + e, with e of the length rho of the parameter's group.
        momentum: whether e is made of the base optimizer's momentum, against which it points: once for the whole step, of
            which every pass is at w + e.
        only: the parameters that are perturbed; None: all.
        opposite: the radius of one more perturbation, to the other side of w, or a function of the step that gives it; None
            without one. A group whose rho is 0 is perturbed to neither side.
        budget: what rho times the direction's norm may not exceed, or a function of the step that gives it.
        sigma, eta, lmbda: the direction, see ``backends.reference``; ``lmbda`` is the decay of the method's "ema", None without
            one. Where sigma is negative the kernels' direction is the method's times 1 − sigma.
        sparse: the method whose mask says what is perturbed.
        holds: gradients that are held for the descent.
        descent: the coefficients of the vectors.
        rescale: whether the descent gets the length of the gradient at w.
        keeps: what a micro-batch adds to a memory of the method, as coefficients of the vectors, times its share of the batch:
            to its "v", or with ``after`` to its "gap".
        reuses: the coefficient of "v" in the descent: S are ‖g‖² of the step's mean gradient, and ‖v‖².
        after: how much of the learning rate times "gap" is taken off the weights after the base optimizer's step.
    """

    perturbs: bool = False
    momentum: bool = False
    only: Parameters | None = None
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
    after: float = 0.0

    @cached_property
    def climbs(self) -> bool:
        """Whether each micro-batch has an ascent of its own, by its gradient at w."""
        return self.perturbs and not self.momentum

    @cached_property
    def is_plain(self) -> bool:
        """Whether the direction is the gradient itself, where it is perturbed."""
        return self.lmbda is None and self.eta is None

    @cached_property
    def times(self) -> float:
        """How many times the method's direction is that of the kernels, see ``sigma``."""
        return 1 - min(self.sigma, 0.0)

    @cached_property
    def knows_length(self) -> bool:
        """Whether the norm of the direction is that of the gradient at w."""
        return self.is_plain and self.only is None

    @cached_property
    def combines(self) -> bool:
        """Whether the descent is made of more than the last gradients as they are: all must then be the same ranks'."""
        return bool(self.holds or self.keeps or self.rescale or self.reuses)

    @cached_property
    def takes_held(self) -> bool:
        """Whether the first vector of the descent, in whose memory the mean comes to be, is one that is held."""
        return bool(self.holds) and not (self.descent[0].a or self.descent[0].b)

    @cached_property
    def uses_products(self) -> bool:
        """Whether the descent's coefficients depend on inner products of the vectors."""
        return self.rescale or any(c.b for c in self.descent)

    @cached_property
    def terms(self) -> tuple[tuple[int, bool, Coefficient], ...]:
        """The vectors that the descent is made of: which, whether it counts or only has the length, and its coefficient.

        Without those that do neither.
        """
        coefficients = [(k, bool(c.a or c.b), c) for k, c in enumerate(self.descent)]
        return tuple((k, counts, c) for k, counts, c in coefficients if counts or self.rescale)

    @cached_property
    def products(self) -> int:
        """How many vectors the inner products are needed of, for the descent or for "v"."""
        if self.rescale:
            return len(self.descent)
        used = [place for c in (*self.descent, *self.keeps) if c.b for place in (c.p, c.q)]
        return 1 + max(v for v in range(3) if dot(0, v) <= max(used)) if used else 0

    @cached_property
    def remembers_v(self) -> bool:
        """Whether "v" outlives the step."""
        return bool(self.keeps) and not self.after

    @cached_property
    def kept(self) -> str:
        """The name of the memory that ``keeps`` adds to."""
        return "gap" if self.after else "v"

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

    Args, of every method:
        start: steps that the base optimizer takes alone, before the method sets in.
        every: from there on, one step in so many is the method's.
        only: the parameters that are perturbed: tensors that the optimizer has, e.g. ``norm_layers(model)``. Norms of the
            ascent are over these alone. The others are trained by the same descent, and are neither read by the norm nor
            saved, perturbed or restored. None: all.

    Source: Foret et al., 2010.01412; mSAM: Behdin et al., 2302.09693 and 2212.04343; a chosen part, the normalisation layers
    (SAM-ON): Mueller et al., 2306.04226.
    """

    start: int = field(default=0, kw_only=True)
    every: int = field(default=1, kw_only=True)
    only: Iterable[Tensor] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_integer("start", self.start, 0)
        check_integer("every", self.every, 1)
        if self.only is not None:
            object.__setattr__(self, "only", _parameters(self.only))

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
        chosen = list({method.only: None for method in (self, other) if method.only is not None})
        if len(chosen) > 1:
            raise ValueError(f"{self} and {other} perturb different parameters: give one only, to either")
        told = [replace(part, start=0, every=1, only=None) for part in parts if type(part) is not SAM] or [SAM()]
        whole = told[0] if len(told) == 1 else Composition(tuple(told))
        only = chosen[0] if chosen else None
        return replace(whole, start=(starts or [0])[0], every=(intervals or [1])[0], only=only)

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
        assert self.only is None or isinstance(self.only, Parameters)
        plan = self.change(Plan(perturbs=True, only=self.only))
        if plan.rescale and not plan.knows_length and not plan.holds:
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


def _parameters(chosen: Iterable[Tensor]) -> Parameters:
    remedy = "give tensors that the optimizer has, e.g. only=norm_layers(model) or only=model.head.parameters()"
    if isinstance(chosen, Tensor) or not isinstance(chosen, Iterable):
        raise TypeError(f"only must be several parameters, got {type(chosen).__name__}: {remedy}")
    told = list(chosen)
    for p in told:
        if not isinstance(p, Tensor):
            raise TypeError(f"only must hold parameters, got {type(p).__name__} among them: {remedy}")
    if not told:
        raise ValueError(f"only names no parameter: {remedy}; without it all are perturbed")
    return Parameters(told)


def norm_layers(model: nn.Module) -> list[nn.Parameter]:
    """The weights and biases of a model's normalisation layers, each once: ``SAM(only=norm_layers(model))`` is SAM-ON.

    These are the parameters that modules hold themselves whose class has "norm" in its name, e.g. ``BatchNorm2d``,
    ``LayerNorm``, ``GroupNorm`` and other libraries' ``LlamaRMSNorm``, or a base class of which has.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no such parameter.

    Source: Mueller et al., 2306.04226.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"norm_layers needs a torch.nn.Module, got {type(model).__name__}")
    layers = [m for m in model.modules() if any("norm" in kind.__name__.lower() for kind in type(m).__mro__)]
    found = list({id(p): p for layer in layers for p in layer.parameters(recurse=False)}.values())
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no normalisation layer with weights: name the parameters yourself, e.g. "
            "SAM(only=model.head.parameters())"
        )
    return found


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
    is the norm of their direction, as ASAM's ‖T·g‖; the other side of Bilateral SAM keeps its rho_min. A
    ``GradScaler`` has to be named, also to ``passes``: a scaled gradient has another length.

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

    Under a ``GradScaler`` that ``passes(..., scaler=scaler)`` was not told of, g and the ema carry the loss scale: after a
    change of that the ema is off by its factor for about 1 / (1 - lmbda) micro-batches.

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
class VaSSO(SAM):
    """Variance-suppressed SAM (VaSSO): the ascent direction is a mean of gradients, d ← (1 − theta)·d + theta·g.

    e = rho·d / (‖d‖ + 1e-12) with d as just updated. A parameter's first gradient is its first d. With mSAM each micro-batch is
    VaSSO's batch: one d, updated by every micro-batch in turn. State: one buffer of the size of the parameters, the same as
    F-SAM's mean gradient, and in state dicts under its name, "ema". With a ``GradScaler`` as there.

    Args:
        theta: what a new gradient counts, > 0; 1 is SAM.

    Source: Li and Giannakis, 2309.15639 (NeurIPS 2023) and 2509.02433, as in the authors' code.
    """

    theta: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("theta", self.theta, 0, 1, above=True)

    def change(self, plan: Plan) -> Plan:
        # d / theta = g − sigma·(the old d): a direction of F-SAM's kind, of which the length does not matter.
        return replace(plan, sigma=-(1 - self.theta) / self.theta, lmbda=1 - self.theta)


@dataclass(frozen=True)
class MomentumSAM(SAM):
    """Momentum-SAM: e = −rho·v / (‖v‖ + 1e-12) with v the base optimizer's own momentum, known before any gradient: one pass.

    This is not mSAM, although papers write MSAM for it: several micro-batches share one e here. v is SGD's
    ``momentum_buffer`` or Adam's ``exp_avg``, as the step finds it; with none yet, as in the first step, nothing is perturbed.
    All passes of a step run at w + e, and losses that the step returns are those there, as are BatchNorm's statistics. Between
    steps the weights are w: nothing is to be moved by hand to evaluate or save them, as with the authors' class. ``stats``
    has one entry a step, with v for the ascent direction. State: none.

    Source: Becker, Altrock and Risse, 2401.12033.
    """

    def change(self, plan: Plan) -> Plan:
        return replace(plan, momentum=True)


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
class WSAM(SAM):
    """Weighted SAM (WSAM): the sharpness L(w + e) − L(w) counts a = gamma / (1 − gamma) times.

    Decoupled: the base optimizer takes g, the mean gradient at w, and after its step w ← w − lr·a·(ĝ − g), with the learning
    rate of the parameter's group and the mean ĝ. Coupled: the base optimizer takes a·ĝ + (1 − a)·g.

    Decoupled, in a ``passes`` loop p.grad is g, which the caller may clip; ĝ − g stays what it was. It is unscaled where the
    ``GradScaler`` is named, also to ``passes``; an overflow in ĝ alone then makes p.grad NaN, so that the scaler sees it.
    State, decoupled: one buffer of the size of the parameters in ``passes`` loops, before an update of its own, and with
    several micro-batches; else none.

    Args:
        gamma: weight of the sharpness, >= 0 and < 1; coupled, 0.5 is SAM.
        decoupled: whether the sharpness is kept out of the base optimizer, and of its momentum.

    Source: Yue et al., 2305.15817 (KDD 2023).
    """

    gamma: float = 0.9
    decoupled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, 0, 1)
        if self.gamma == 1:
            raise ValueError(f"gamma must be less than 1, where gamma / (1 - gamma) has no value, got {self.gamma!r}")
        if not isinstance(self.decoupled, bool):
            raise ValueError(f"decoupled must be True or False, got {self.decoupled!r}")

    def change(self, plan: Plan) -> Plan:
        a = self.gamma / (1 - self.gamma)
        if not self.decoupled and a == 1:
            return plan
        if not self.decoupled or a == 0:
            return replace(plan, holds=1, descent=(Coefficient(a), Coefficient(1 - a)))
        gap = (Coefficient(), Coefficient(-1.0))
        return replace(plan, holds=1, descent=(Coefficient(0.0), Coefficient()), keeps=gap, after=a)


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
        for told, what in (
            ((FriendlySAM, VaSSO, MomentumSAM), "what the perturbation is made of"),
            ((LookSAM, BilateralSAM, GapSAM, WSAM), "which gradients the descent is made of"),
        ):
            rivals = [part for part in self.parts if isinstance(part, told)]
            if len(rivals) > 1:
                raise ValueError(f"{' and '.join(map(repr, rivals))} each say {what}: take one of them")
        for part in self.parts:
            if MomentumSAM in kinds and isinstance(
                part, (LookSAM, BilateralSAM, GapSAM, WSAM, StableSAM, LossEquatedSAM)
            ):
                raise ValueError(
                    f"{part} needs the gradient at w, for which {MomentumSAM.__name__} has no pass: take one of them"
                )
            if MomentumSAM in kinds and isinstance(part, SparseSAM) and part.update_every is not None:
                raise ValueError(
                    f"{part} chooses masks by gradients at w, for which {MomentumSAM.__name__} has no pass: give it "
                    "update_every=None, and call opt.update_mask or assign opt.mask"
                )
            if StableSAM in kinds and isinstance(part, WSAM) and part.decoupled:
                raise ValueError(
                    f"{part} gives the base optimizer g itself, which has the length that {StableSAM.__name__} would give it: "
                    "take one of them, or decoupled=False"
                )
        if self.alternating and StableSAM in kinds:
            raise ValueError(
                f"{self.alternating} sets the length of its steps by alpha, and {StableSAM.__name__} would set it again: take "
                "one of them"
            )

    def __repr__(self) -> str:
        return (
            " + ".join(map(repr, self.parts))
            + (f" from step {self.start}" if self.start else "")
            + (f" every {self.every} steps" if self.every > 1 else "")
            + (f" only {self.only}" if self.only is not None else "")
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
