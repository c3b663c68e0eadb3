# SPDX-License-Identifier: Apache-2.0
"""What the parameter groups say: the rule of the base optimizer with its settings, and rho, as tables on the devices."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ._checks import check_number
from ._torch import moved, step_hooks
from .backends import reference
from .gradients import holds
from .methods import SAM, Plan

Group = dict[str, Any]
Radius = float | Callable[[int], float]
MOMENTA = ("momentum_buffer", "exp_avg")  # names of a mean of gradients in the state of torch's optimizers
OURS = "msam_"  # how every name begins that we put into a base optimizer's groups or state
STEPS, MASK_STEP, SEED = OURS + "steps", OURS + "mask_step", OURS + "seed"  # in every group: see ``Engine``


@dataclass(frozen=True)
class Rule:
    """A base optimizer whose step is a fused kernel.

    Attributes:
        number: as the operator ``update`` takes it.
        keys: of a group, under which stands what settings and names are made of.
        settings: a group's row of the kernels' table, columns as in ``backends.reference``.
        names: the state that the group's parameters need.
        shaped: what may be there that is shaped like its parameter.
        counts: whether a "step" has to be counted that torch does not keep.
    """

    number: int
    keys: tuple[str, ...]
    settings: Callable[[Group], tuple[Any, ...]]
    names: Callable[[Group], tuple[str, ...]]
    shaped: tuple[str, ...]
    counts: bool


def _sgd_names(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _adam_settings(group: Group, decoupled: bool | None = None) -> tuple[Any, ...]:
    if decoupled is None:
        decoupled = group.get("decoupled_weight_decay", False)
    return (
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        group["amsgrad"],
        group["maximize"],
        decoupled,
    )


def _adamw_settings(group: Group) -> tuple[Any, ...]:
    return _adam_settings(group, True)  # before torch 2.7 the group does not say so


def _adam_names(group: Group) -> tuple[str, ...]:
    names = ("step", "exp_avg", "exp_avg_sq")
    return (*names, "max_exp_avg_sq") if group["amsgrad"] else names


_ADAM_KEYS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
_ADAM_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# Exact types only, since a subclass may have a step of its own.
RULES: dict[type[Optimizer], Rule] = {
    SGD: Rule(
        reference.SGD,
        reference.SGD_COLUMNS,
        itemgetter(*reference.SGD_COLUMNS),
        _sgd_names,
        ("momentum_buffer",),
        counts=True,
    ),
    Adam: Rule(reference.ADAM, _ADAM_KEYS, _adam_settings, _adam_names, _ADAM_SHAPED, counts=False),
    AdamW: Rule(reference.ADAM, _ADAM_KEYS, _adamw_settings, _adam_names, _ADAM_SHAPED, counts=False),
}


class StepHook:
    """A hook of ours on a base optimizer: tells of a step that somebody else makes with it.

    Attributes:
        tell: called before such a step.
        ours: whether the step under way is ours.
    """

    def __init__(self, tell: Callable[[], None]):
        self.tell, self.ours = tell, False

    def __call__(self, base: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.ours:
            self.tell()


def _is_listened_to(base: Optimizer) -> bool:
    before, after = step_hooks(base)
    for hook in before.values():  # a generator would take longer
        if type(hook) is not StepHook:
            return True
    return bool(after)


def fused_rule(base: Optimizer) -> Rule | None:
    """How to update in one kernel; None where only the base optimizer's own step will do."""
    rule = RULES.get(type(base))
    if rule is None:
        return None
    step = base.__dict__.get("step")  # patched on the instance: by a scheduler, which only counts, or by the user
    if (step is not None and getattr(step, "__wrapped__", None) is not type(base).step) or _is_listened_to(base):
        return None
    for group in base.param_groups:
        if group.get("differentiable") or group.get("capturable"):
            return None
    return rule


def check_base(base: Optimizer) -> None:
    """Refuse a base optimizer whose step cannot be the end of one of ours.

    Raises:
        TypeError: it is a framework's wrapper, or its step asks for something, as LBFGS's for a closure.
        ValueError: it has a rho of its own.
    """
    name = type(base).__name__
    try:
        step_hooks(base)
    except AttributeError:
        raise TypeError(
            f"base_optimizer is {name}, whose __init__ did not call Optimizer's, as those of frameworks' wrappers: give the "
            "optimizer inside, and have the framework wrap the MicroBatchSAM, e.g. accelerator.prepare(MicroBatchSAM(base))"
        ) from None
    _, *arguments = inspect.signature(type(base).step).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY)
    asked = [a.name for a in arguments if a.kind in named and a.default is a.empty]
    if asked:
        raise TypeError(
            f"{name}.step asks for {', '.join(asked)}, and evaluates the loss by itself: the base optimizer's step has to "
            "do with the gradients in p.grad, use e.g. SGD or AdamW"
        )
    if "rho" in base.defaults:
        raise ValueError(
            f"{name} has a rho of its own, {base.defaults['rho']!r}, in the place where SAM's goes: use a base optimizer "
            "without one, e.g. SGD or AdamW"
        )


def theirs_in(entry: Any) -> list[str]:
    """The names of what the base optimizer keeps in an entry of its state; some keep other things there than entries."""
    return [str(name) for name in entry if not str(name).startswith(OURS)] if isinstance(entry, dict) else []


def saves_itself(base: Optimizer) -> bool:
    """Whether its state dicts are of its own making, which nobody else can read: it saves and loads them."""
    kind = type(base)
    return kind.state_dict is not Optimizer.state_dict or kind.load_state_dict is not Optimizer.load_state_dict


def no_momentum(method: SAM, base: Optimizer, but: str = "") -> str:
    return (
        f"{method} perturbs along the base optimizer's momentum, and {type(base).__name__} keeps none{but}: use one that does, "
        "e.g. SGD(momentum=0.9) or AdamW"
    )


def check_method(method: SAM, base: Optimizer) -> None:
    """Refuse a method for whose steps the base optimizer lacks something.

    Raises:
        ValueError: Momentum-SAM around an optimizer without momentum, or decoupled WSAM around one without a learning rate.
    """
    plan = method.full
    if plan.momentum and not any(map(_has_momentum, base.param_groups)):
        raise ValueError(no_momentum(method, base))
    if plan.after and not all("lr" in group for group in base.param_groups):
        raise ValueError(
            f"{method} takes a step of its own by the groups' lr, which {type(base).__name__} does not have: use "
            "decoupled=False"
        )


def check_masters(masters: Any, method: SAM, base: Optimizer, parallel: Any) -> None:
    """Refuse masters where weights of 16 bits would not come from them.

    Raises:
        TypeError: ``masters`` is no bool.
        ValueError: the base optimizer has no fused update, the method takes a step of its own or perturbs along momentum, or
            passes are parallel; with the remedy.
    """
    if not isinstance(masters, bool):
        raise TypeError(f"masters must be a bool, got {masters!r}")
    if not masters:
        return
    plan = method.full
    if type(base) not in RULES:
        raise ValueError(
            f"masters=True is for fused updates, and {type(base).__name__} takes its own step, which is of the weights of 16 "
            f"bits: use {', '.join(kind.__name__ for kind in RULES)}, or leave masters out"
        )
    if plan.after:
        raise ValueError(
            f"{method} takes a step of its own off the weights of 16 bits, not off their masters: use decoupled=False, or "
            "leave masters out"
        )
    if plan.momentum:
        raise ValueError(
            f"{method} perturbs along momentum of the weights' dtype, which masters keep in float32: use another method, or "
            "leave masters out"
        )
    if parallel:
        raise ValueError(
            f"parallel={parallel!r} perturbs copies of the weights of 16 bits, not of their masters: leave one of them out"
        )


def _has_momentum(group: Group) -> bool:
    """Whether a group's settings speak of momentum, by the names that these have in torch."""
    return bool(group.get("momentum")) or not group.keys().isdisjoint(("betas", "beta1"))


def check_rho(rho: Any, name: str = "rho") -> None:
    """Refuse what is no radius.

    Raises:
        ValueError: ``rho`` is not a finite number >= 0.
    """
    if not isinstance(rho, Tensor):
        check_number(name, rho, 0)
    elif rho.numel() != 1 or not 0 <= rho < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {rho!r}")


def rho_at(rho: Any, steps: int) -> Any:
    """A radius, or what a function of the step gives."""
    return rho(steps) if callable(rho) else rho


class Radii:
    """The rho of every group. A function that stands there is its schedule from then on; a new number ends that.

    ``group["rho"]`` of a group with a schedule holds the value of the step under way.
    """

    def __init__(self, base: Optimizer, default: Radius):
        self.base, self.default = base, default
        self.schedules: dict[int, tuple[Callable[[int], float], Any]] = {}  # by group: with the latest value

    def of(self, g: int, group: Group, steps: int) -> Any:
        """The group's rho in the step after ``steps``."""
        rho = group.get("rho", self.default)
        schedule, latest = self.schedules.get(g, (None, None))
        if callable(rho):
            schedule = rho
        elif schedule is None or (rho is not latest and rho != latest):
            self.schedules.pop(g, None)
            return rho
        rho = schedule(steps)
        check_rho(rho)
        group["rho"], self.schedules[g] = rho, (schedule, rho)
        return rho

    def take_schedules(self, steps: int) -> None:
        """Functions that were put into groups become schedules: what is saved or loaded are numbers."""
        for g, group in enumerate(self.base.param_groups):
            if callable(group.get("rho")):
                self.of(g, group, steps)

    def kept_in(self, state_dict: dict[str, Any], steps: int) -> dict[str, Any]:
        """``state_dict`` with the rho of today in groups that bring none, as a plain optimizer's, or have a schedule."""
        self.take_schedules(steps)
        groups = []
        for g, (mine, theirs) in enumerate(zip(self.base.param_groups, state_dict["param_groups"], strict=False)):
            rho = {"rho": mine.get("rho", self.default)}
            groups.append({**theirs, **rho} if g in self.schedules else {**rho, **theirs})
        return {**state_dict, "param_groups": groups + state_dict["param_groups"][len(groups) :]}


class Noted:
    """What stood in the parameter groups at the last look, and whether these very values stand there still.

    The extension looks in one call, where Python would take as long as a kernel.
    """

    def __init__(self, base: Optimizer):
        self._base = base
        self._groups: list[Group] | None = None
        self._dicts: list[dict[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []

    def note(self, keys: Sequence[str], *others: tuple[dict[Any, Any], Any]) -> None:
        """Under ``keys`` of every group, and under other dicts' own; nothing where a group's value may change by itself."""
        groups = self._base.param_groups
        places = [*((group, key) for group in groups for key in keys), *others]
        self._dicts, self._keys = [d for d, _ in places], [key for _, key in places]
        self._values = [d.get(key) for d, key in places]
        constant = all(map(_is_constant, self._values[: len(groups) * len(keys)]))
        self._groups = list(groups) if constant else None

    def forget(self) -> None:
        self._groups = None

    def stands(self) -> bool:
        return self._groups is not None and holds(
            self._base.param_groups, self._groups, self._dicts, self._keys, self._values, None
        )


class Tables:
    """The kernels' tables of radii and settings, one row per group, float64, on every device.

    Each stays at one address as long as its shape does: captured graphs read it there. A step reads the radii where it begins,
    and the settings right before the update, as the base optimizer itself would.

    Attributes:
        names: per group, the state that the rule keeps.
    """

    def __init__(self, radii: Radii):
        self._radii = radii
        self._rows: dict[str, list[Any]] = {}  # by table, as it stands on the devices
        self._noted = {name: Noted(radii.base) for name in ("radii", "rates", "rule")}
        self._plan: Plan | None = None  # that the radii were made for
        self._rule: Rule | None = None  # as it was noted
        self._on: dict[tuple[str, torch.device], Tensor] = {}
        self.names: tuple[tuple[str, ...], ...] = ()
        self.scale: Tensor | None = None  # of the step's gradients, where a budget is to be in their units

    def refresh_radii(
        self, plan: Plan, steps: int, devices: Iterable[torch.device], changed: Callable[[], None]
    ) -> None:
        """Bring the radii up to date with the groups. ``changed`` is called before anything is written, and may raise.

        Where a group is maximised, the worst point lies downhill: its radii are negative.

        Raises:
            ValueError: what stands in a group, or what a function of the step gives, is no radius.
        """
        if plan is self._plan and not self._radii.schedules and self._noted["radii"].stands():
            return
        groups = self._radii.base.param_groups
        # Momentum is that of what is minimised, whatever the group says, and e points against it.
        turned = [plan.momentum or maximizes for maximizes in self._maximized()]
        radii = [_number(self._radii.of(g, group, steps)) for g, group in enumerate(groups)]
        for rho in radii:
            check_rho(rho)
        budget = rho_at(plan.budget, steps)
        if callable(plan.budget):
            check_rho(budget, "sigma")
        opposite: list[Any] = []
        if plan.opposite is not None:
            rho_min = rho_at(plan.opposite, steps)
            check_rho(rho_min, "rho_min")
            opposite = [-float(rho_min) if rho else 0.0 for rho in radii]
        for name, values, most in (("radii", radii, float(budget) * plan.times), ("opposite", opposite, math.inf)):
            rows = [(-r if turn and r else r, most) for r, turn in zip(values, turned, strict=False)]
            self._write(name, rows, devices, changed)
        self._plan = plan
        self._noted["radii"].note(("rho", "maximize"), (vars(self._radii.base), "maximize"))
        if callable(plan.opposite) or callable(plan.budget):
            self._noted["radii"].forget()

    def _maximized(self) -> list[bool]:
        """By group; some optimizers have the flag for all, as an attribute."""
        base = self._radii.base
        everywhere = getattr(base, "maximize", False)
        return [group.get("maximize", everywhere) for group in base.param_groups]

    def refresh_settings(self, rule: Rule, devices: Iterable[torch.device], changed: Callable[[], None]) -> None:
        """The same of the rule's settings."""
        groups = self._radii.base.param_groups
        rows = [tuple(map(_number, rule.settings(group))) for group in groups]
        self._write("settings", rows, devices, changed)
        self.names = tuple(rule.names(group) for group in groups)

    def refresh_rule(self, devices: Iterable[torch.device], changed: Callable[[], None]) -> Rule | None:
        """How to update in one kernel, its settings up to date; None where only the base optimizer's own step will do."""
        base, noted = self._radii.base, self._noted["rule"]
        before, after = step_hooks(base)
        if len(before) == 1 and not after and noted.stands():
            return self._rule
        self._rule = rule = fused_rule(base)
        if rule is None:
            noted.forget()
        else:
            self.refresh_settings(rule, devices, changed)
            keys = (*rule.keys, "differentiable", "capturable")
            noted.note(keys, (vars(base), "step"), *((before, key) for key in before))
        return rule

    def refresh_rates(self, devices: Iterable[torch.device], changed: Callable[[], None]) -> None:
        """The same of −lr, or lr where a group is maximised; the last row is 1."""
        base, noted = self._radii.base, self._noted["rates"]
        if noted.stands():
            return
        rates = [_number(group["lr"]) for group in base.param_groups]
        rows = [lr if maximizes else -lr for lr, maximizes in zip(rates, self._maximized(), strict=True)]
        self._write("rates", [*rows, 1.0], devices, changed)
        noted.note(("lr", "maximize"), (vars(base), "maximize"))

    @torch.inference_mode(False)  # what is made in that mode could not be written to outside of it
    def _write(self, name: str, rows: list[Any], devices: Iterable[torch.device], changed: Callable[[], None]) -> None:
        if not rows or rows == self._rows.get(name):
            return
        changed()
        table = torch.tensor(rows, dtype=torch.float64, device="cpu")
        for device in devices:
            self._put(name, device, table)
        self._rows[name] = rows

    def forget(self) -> None:
        """There are new groups or devices."""
        self._rows.clear()
        for noted in self._noted.values():
            noted.forget()

    def on(self, name: str, device: torch.device) -> Tensor:
        table = self._on[name, device]
        if name != "radii" or self.scale is None:
            return table
        return torch.cat([table[:, :1], table[:, 1:] * moved(self.scale, device)], 1)

    def tensors(self) -> list[Tensor]:
        return list(self._on.values())

    def _put(self, name: str, device: torch.device, table: Tensor) -> None:
        old = self._on.get((name, device))
        if old is not None and old.shape == table.shape:
            old.copy_(table, non_blocking=True)
        else:
            self._on[name, device] = table.to(device, non_blocking=True)


def _is_constant(x: Any) -> bool:
    """Whether an object has this value for good, as numbers have and tensors and functions have not."""
    return x is None or type(x) in (float, int, bool) or (type(x) is tuple and all(map(_is_constant, x)))


def _number(x: Any) -> Any:
    return float(x) if isinstance(x, Tensor) else x
