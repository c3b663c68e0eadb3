# SPDX-License-Identifier: Apache-2.0
"""``MicroBatchSAM``: the optimizer around the kernels. It decides what runs when; it does no arithmetic on elements."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import masks, ops
from . import methods as _methods
from ._checks import check_integer, check_number
from ._numbers import Number, total, totals
from .flat import Flat, Gradients, check_parameters
from .graphs import CapturedStep, CudaRecorder

_STATE_KEY = "msam"
_KEPT = ("ema", "v", "mask")  # what methods keep there, by parameter
_BASE, _PERTURB, _REUSE = "base", "perturb", "reuse"  # kinds of steps


@dataclass(frozen=True)
class Stats:
    """What the kernels recorded in the latest step, one entry per micro-batch, on the device until somebody looks.

    Attributes:
        grad_norm: ‖d‖ of the ascent direction (for ASAM ‖T·d‖), float64.
        perturbation_norm: ‖e‖ as it arrived in the stored weights, float64. In 16 bits it can fall far short of rho.
        nonfinite: True where the ascent gradient was not finite, so that nothing was perturbed.
    """

    grad_norm: Tensor
    perturbation_norm: Tensor
    nonfinite: Tensor


class _MicroBatches(list):
    """One closure per micro-batch, with the share of the batch that each has."""

    def __init__(self, closures: Sequence[Callable[[], Any]], shares: Sequence[float]):
        super().__init__(closures)
        self.shares = shares


def _check_rho(rho: Any, name: str = "rho") -> None:
    if not isinstance(rho, Tensor):
        check_number(name, rho, 0)
    elif rho.numel() != 1 or not 0 <= rho < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {rho!r}")


@cache
def _leave_to_eager() -> None:
    """Dynamo traces nothing of this package: to it the kernels are opaque, and it would lose what they need to know."""
    import torch._dynamo  # torch's Optimizer has imported it already

    torch._dynamo.trace_rules.add(__package__)


def _step_hooks(optimizer: Optimizer) -> tuple[dict, ...]:
    return (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )


def _running_statistics(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(layer, attribute, value): what to set so that a BatchNorm-like layer in training records nothing."""
    stack = [model]
    while stack:
        layer = stack.pop()
        if layer is None:
            continue
        stack.extend(layer._modules.values())
        if layer.__dict__.get("track_running_stats") and layer.training:
            if isinstance(layer, _InstanceNorm):  # does not ask the flag
                yield from ((layer, "running_mean", None), (layer, "running_var", None))
            else:
                yield layer, "track_running_stats", False


def _gathered(parts: list[Tensor], device: torch.device) -> Tensor:
    """The terms of sums, from all devices."""
    if len(parts) == 1 and parts[0].device == device:
        return parts[0]
    # A copy to the CPU that does not block returns before the values are there.
    return torch.cat([t.to(device, non_blocking=device.type != "cpu") for t in parts], -1)


def _own_memory(lists: list[list[Tensor | None]], *, whole: bool) -> list[list[Tensor | None]]:
    """``ops.own_memory`` of all flats' gradients together."""
    own = ops.own_memory(list(chain.from_iterable(lists)), whole=whole)
    ends = accumulate(map(len, lists))
    return [own[end - len(tensors) : end] for tensors, end in zip(lists, ends, strict=True)]


def _hyper_sgd(group: dict) -> tuple:
    return (
        group["lr"],
        group["momentum"],
        group["dampening"],
        group["weight_decay"],
        group["nesterov"],
        group["maximize"],
    )


def _keys_sgd(group: dict) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _hyper_adam(group: dict) -> tuple:
    return (
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        group["amsgrad"],
        group["maximize"],
        group.get("decoupled_weight_decay", False),
    )


def _hyper_adamw(group: dict) -> tuple:
    return (*_hyper_adam(group)[:-1], True)  # before torch 2.7 the group does not say so


def _keys_adam(group: dict) -> tuple[str, ...]:
    keys = ("step", "exp_avg", "exp_avg_sq")
    return (*keys, "max_exp_avg_sq") if group["amsgrad"] else keys


# Base optimizers with a fused update: the operator, its columns after rho, the state it keeps. Exact types only, since a
# subclass may have a step of its own.
_FUSED = {
    SGD: ("sgd", _hyper_sgd, _keys_sgd),
    Adam: ("adam", _hyper_adam, _keys_adam),
    AdamW: ("adam", _hyper_adamw, _keys_adam),
}


class MicroBatchSAM(Optimizer):
    r"""Sharpness-aware minimization over micro-batches (mSAM), with the family's other methods, around any optimizer.

    For micro-batches i = 1 … m with n_i of the batch's n samples, g_i the gradient at the weights w:

    .. math::
        e_i = \rho\, d_i / (\lVert d_i \rVert_2 + 10^{-12}), \qquad
        \hat g = \sum_i \tfrac{n_i}{n} \nabla L_i(w + e_i), \qquad
        w \leftarrow \text{base optimizer}(w, \hat g)

    where d_i = g_i for SAM; see ``methods`` for the others. The norm is one L2 norm over all parameters of all groups.
    Weight decay belongs to the base optimizer and is not part of e.

    ::

        opt = MicroBatchSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, num_micro_batches=4)
        for x, y in loader:
            for xb, yb in opt.passes(x, y):  # an ordinary forward and backward, run as often as the method needs
                F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()

    ``step(closure)`` and ``train_step`` do the same in one call and move less memory. While ``opt.enabled`` is False, and
    before the method's ``start``, the base optimizer works alone: one pass per micro-batch, nothing is perturbed.

    Mutates: at construction, re-points every parameter's ``.data`` into a flat buffer (see ``flatten``). ``param_groups``
    and ``state`` are the base optimizer's own: a scheduler on either object reaches both, and state dicts of either load
    into the other. Each group gets a ``rho``.

    Args:
        base_optimizer: any ``torch.optim.Optimizer``. ``SGD``, ``Adam`` and ``AdamW`` take fused updates on their own
            state; others, and flags without a fused kernel, take their own step.
        rho: radius of the perturbation, in units of the weights; >= 0. A group that has its own "rho" keeps it. Either may
            be a function of the number of steps taken so far, e.g. one that follows the learning rate; ``group["rho"]`` then
            holds the value of the step under way, until a number other than that, or another function, is put there.
        num_micro_batches: parts into which ``passes(*batch)`` and ``train_step`` split a batch. Default 1: SAM.
        micro_batch_size: instead of ``num_micro_batches``, the samples per part; the last may be smaller.
        method: how the perturbation is made, see ``msam_kernels.methods``. Default ``methods.SAM()``.
        model: if given, its BatchNorm-like layers update their running statistics in the first pass only.
        flatten: keep the weights in flat buffers. False leaves every parameter's memory where it is; same bits, slower.
        backend: "auto" (the fastest there is), "cuda" (CUDA C++), "triton" (CUDA, ROCm and XPU devices), "cpu" (C++) or
            "reference" (plain torch, on any device).

    Raises:
        ValueError, TypeError, RuntimeError: arguments or parameters that cannot be served; the message names them and
            the remedy, and nothing was changed.

    Sources: SAM 2010.01412, mSAM 2302.09693 and 2212.04343; those of the other methods are in ``methods``.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float | Callable[[int], float] = 0.05,
        *,
        num_micro_batches: int | None = None,
        micro_batch_size: int | None = None,
        method: _methods.SAM | None = None,
        model: nn.Module | None = None,
        flatten: bool = True,
        backend: str = "auto",
    ):
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"base_optimizer must be a torch.optim.Optimizer instance, got {base_optimizer!r}: build it first, e.g. "
                "MicroBatchSAM(torch.optim.SGD(model.parameters(), lr=0.1))"
            )
        if isinstance(base_optimizer, MicroBatchSAM):
            raise TypeError("base_optimizer is a MicroBatchSAM already: wrap the plain optimizer once")
        if "rho" in base_optimizer.defaults:
            raise ValueError(
                f"{type(base_optimizer).__name__} has a rho of its own, {base_optimizer.defaults['rho']!r}, in the place "
                "where SAM's goes: use a base optimizer without one, e.g. SGD or AdamW"
            )
        method = _methods.SAM() if method is None else method
        if not isinstance(method, _methods.SAM):
            raise TypeError(f"method must be one of msam_kernels.methods, e.g. methods.FriendlySAM(), got {method!r}")
        if num_micro_batches is not None and micro_batch_size is not None:
            raise ValueError(f"give {num_micro_batches=} or {micro_batch_size=}, not both")
        for name, count in (("num_micro_batches", num_micro_batches), ("micro_batch_size", micro_batch_size)):
            if count is not None:
                check_integer(name, count, 1)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, layer in model.named_modules() if model is not None else ():
            if isinstance(layer, torch.jit.ScriptModule) and getattr(layer, "running_mean", None) is not None:
                raise ValueError(
                    f"model has {name or 'a layer'} in TorchScript, which cannot be told to record no statistics: give the "
                    "model as it was before torch.jit, or leave model out, and both passes are recorded"
                )
        _check_rho(_rho_at(rho, 0))
        for group in base_optimizer.param_groups:
            _check_rho(_rho_at(group.get("rho", rho), 0))
        self.base_optimizer = base_optimizer
        # The hook tables and profiling of an Optimizer, without its own groups and state: those are the base's.
        defaults = {**base_optimizer.defaults, "rho": rho}
        super().__setstate__({"defaults": defaults, "_warned_capturable_if_run_uncaptured": True})
        self.num_micro_batches = num_micro_batches or (None if micro_batch_size else 1)
        self.micro_batch_size = micro_batch_size
        self.method = method
        self.model = model
        self.enabled = True
        self.steps = 0
        self._mask_step = 0  # at which the mask was first used
        self._rho_schedules: dict[int, tuple[Callable[[int], float], Any]] = {}  # by group: with the latest value
        self.flatten = flatten
        self.backend = backend
        self._begin_life()
        # What an earlier wrapper put there is not the user's.
        groups = [base_optimizer.param_groups[g] for g in getattr(base_optimizer, "_msam_groups", ())]
        earlier = [(group, group.pop("rho")) for group in groups if "rho" in group]
        try:
            self._adopt_parameters()
        except BaseException:
            for group, rho in earlier:
                group["rho"] = rho
            raise

    def _begin_life(self) -> None:
        """What is not saved: buffers are made again, nothing is in flight."""
        _leave_to_eager()
        self._flats: list[Flat] = []
        self._layout: Any = None  # of all parameters, as the flats know it
        self._rows: tuple | None = None  # as the device knows them
        self._state_keys: tuple[tuple[str, ...], ...] = ()
        self._hyper: dict[torch.device, Tensor] = {}
        self._opposite: dict[torch.device, Tensor] = {}  # of every group -rho_min, as a table like hyper
        self._kind = _BASE
        self._perturbed = False
        self._scores: list[Sequence[Tensor]] | None = None  # of the step under way, from which a mask is chosen
        self._mask_is_new = False  # the first one, which the step under way chose for itself
        # Of the micro-batch under way: g·g, and g⁺·g⁺ where g has been added to g⁺.
        self._grad_norm_sq: Number | None = None
        self._at_e_norm_sq: Number | None = None
        self._v_norm_sq: Tensor | None = None  # at the same address for good: captured graphs read it
        self._v_step: int | None = -1  # whose v it is; None while a loop adds to it
        self._before: list[list[Tensor | None]] | None = None  # of the step under way: by flat, p.grad, or []
        self._norms_sq: list[Tensor] = []
        self._achieved_sq: list[list[Tensor]] = []
        self._frozen: list[tuple[nn.Module, str, Any]] = []  # (layer, attribute, its value) of frozen statistics
        this = weakref.ref(self)

        def keep_rho(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
            return None if this() is None else this()._with_rho(state_dict)

        self.base_optimizer.register_load_state_dict_pre_hook(keep_rho)

    # -- an Optimizer in every convention -------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self):
        return self.base_optimizer.state

    @state.setter
    def state(self, state) -> None:
        self.base_optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group may have a "rho". The new parameters are flattened, the old ones stay where they are.

        Raises:
            TypeError, ValueError, RuntimeError: a group that cannot be served, or a step is under way; nothing was changed.
        """
        self._check_idle("add_param_group()")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict with 'params', got {type(param_group).__name__}")
        rho = param_group.get("rho", self.defaults["rho"])
        _check_rho(_rho_at(rho, self.steps))
        self.base_optimizer.add_param_group({**param_group, "rho": rho})
        try:
            self._adopt_parameters()
        except Exception:
            del self.base_optimizer.param_groups[-1]
            raise

    def __getstate__(self) -> dict[str, Any]:
        self._check_idle("copying or pickling the optimizer")
        self._take_schedules()
        split = ("num_micro_batches", "micro_batch_size")
        own = (
            "defaults",
            "base_optimizer",
            *split,
            "method",
            "model",
            "enabled",
            "_rho_schedules",
            "flatten",
            "backend",
        )
        return {
            **{name: getattr(self, name) for name in own},
            _STATE_KEY: self._own_state(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" not in state:  # Optimizer.load_state_dict hands over what it loaded
            self.base_optimizer.__setstate__(state)
            return
        own = state.pop(_STATE_KEY)
        super().__setstate__({"steps": 0, **state})
        self._begin_life()
        self._adopt_parameters()
        self._load_own_state(own)

    def __repr__(self) -> str:
        split = f"micro_batch_size={self.micro_batch_size}"
        if self.micro_batch_size is None:
            split = f"num_micro_batches={self.num_micro_batches}"
        base = "\n  ".join(repr(self.base_optimizer).splitlines())
        return f"{type(self).__name__}(\n  method={self.method}, {split}, backend={self.backend!r}\n  {base}\n)"

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, which plain torch optimizers load, and under "msam" what the method keeps."""
        self._take_schedules()
        return {**super().state_dict(), _STATE_KEY: self._own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class, or of the plain base optimizer, returned.

        A group without "rho" keeps the one it has, and so does one whose rho is a function of the step. What the method
        keeps (an EMA, LookSAM's direction, a mask) starts anew where ``state_dict`` has none.

        Raises:
            ValueError: ``state_dict`` is of other parameters; nothing was changed.
        """
        self._check_idle("load_state_dict()")
        self._check_state_dict(state_dict)
        loaded = {}

        def last_hook(_, state_dict: dict[str, Any]) -> dict[str, Any]:
            self._check_state_dict(state_dict)  # the user's hooks may have changed it
            loaded.update(state_dict)
            return self._with_rho(state_dict)

        hook = self.register_load_state_dict_pre_hook(last_hook)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._load_own_state(loaded.get(_STATE_KEY, {}))

    def _check_state_dict(self, state_dict: Any) -> None:
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                "state_dict must be what opt.state_dict() returns, with 'state' and 'param_groups', got "
                f"{sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__}"
            )
        own = state_dict.get(_STATE_KEY, {})
        kept = [own.get(name, {}) if isinstance(own, dict) else None for name in _KEPT]
        if not all(isinstance(t, dict) and all(isinstance(v, Tensor) for v in t.values()) for t in kept):
            raise ValueError(
                f"state_dict[{_STATE_KEY!r}] must be a dict whose {', '.join(map(repr, _KEPT))} hold tensors by parameter, "
                f"got {own!r}"
            )
        for name in ("steps", "mask_step"):
            if type(own.get(name, 0)) is not int or own.get(name, 0) < 0:
                raise ValueError(f"state_dict[{_STATE_KEY!r}][{name!r}] must be an integer >= 0, got {own[name]!r}")
        for i, group in enumerate(state_dict["param_groups"]):
            if "params" not in group:
                raise ValueError(f"state_dict has no 'params' in group {i}: it was not made by an optimizer")
            _check_rho(group.get("rho", 0.0))
        params = self._parameters()
        # torch names parameters by whatever stands in the groups, in order; what the method keeps goes by that order.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        ours = [
            (name, range(len(params)), {i: {name: t} for i, t in tensors.items()})
            for name, tensors in zip(_KEPT, kept, strict=True)
        ]
        for where, names, entries in (("state", keys, state_dict["state"]), *ours):
            index = {key: i for i, key in enumerate(names)}
            for key, entry in entries.items():
                if not isinstance(entry, dict):
                    continue
                if not 0 <= index.get(key, -1) < len(params):
                    raise ValueError(
                        f"state_dict has {where} of parameter {key}, the optimizer has {len(params)} parameters"
                    )
                shape = params[index[key]].shape
                for name, value in entry.items():
                    # Base optimizers keep numbers as 0-d tensors too.
                    shaped = isinstance(value, Tensor) and (where != "state" or (name != "step" and value.dim() > 0))
                    if shaped and value.shape != shape:
                        raise ValueError(
                            f"state_dict has {name} of shape {tuple(value.shape)} for parameter {key}, whose shape is "
                            f"{tuple(shape)}: it was saved for another model"
                        )

    def _with_rho(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Groups that bring no rho, as in a plain optimizer's state dict, and those with a schedule keep what is there."""
        self._take_schedules()
        groups = []
        for g, (mine, theirs) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            rho = {"rho": mine.get("rho", self.defaults["rho"])}
            groups.append({**theirs, **rho} if g in self._rho_schedules else {**rho, **theirs})
        return {**state_dict, "param_groups": groups + state_dict["param_groups"][len(groups) :]}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _own_state(self) -> dict[str, Any]:
        index = {id(p): i for i, p in enumerate(self._parameters())}
        kept: dict[str, dict[int, Tensor]] = {name: {} for name in _KEPT}
        for flat in self._flats:
            where = [(i, index[id(p)]) for i, p in enumerate(flat.params)]
            if flat.ema is not None:
                begun = flat.begun()
                kept["ema"].update({at: flat.kept_of(flat.ema, i) for i, at in where if begun[i]})
            if flat.v is not None:
                kept["v"].update({at: flat.v_parts[i] for i, at in where})
            if flat.mask is not None:
                kept["mask"].update({at: flat.mask_of(i) for i, at in where})
        own = {"steps": self.steps, **({"mask_step": self._mask_step} if kept["mask"] else {})}
        return {**own, **{name: tensors for name, tensors in kept.items() if tensors}}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self.steps, self._mask_step, self._v_step = own.get("steps", 0), own.get("mask_step", 0), -1
        index = {id(p): i for i, p in enumerate(self._parameters())}
        for flat in self._flats:
            ema, v, mask = (
                {
                    i: own[name][index[id(p)]].clone()  # it may be a view of what begins anew
                    for i, p in enumerate(flat.params)
                    if index[id(p)] in own.get(name, {})
                }
                for name in _KEPT
            )
            if ema:
                flat.start_ema()
                for i, t in ema.items():
                    flat.kept_of(flat.ema, i).copy_(t)
            else:
                flat.ema = None
            if v:
                flat.start_v()
                for i, t in v.items():
                    flat.v_parts[i].copy_(t)
            else:
                flat.v, flat.v_parts = None, []
            flat.mask = None
            if len(mask) == len(flat.params):
                for i, bits in mask.items():
                    flat.set_mask(i, bits)
        self._measure_v()

    def _adopt_parameters(self) -> None:
        """Flatten the parameters of groups that are new since the last look; take back those that were re-pointed.

        Raises:
            RuntimeError: parameters left their group, were moved or converted, or came during a step.
        """
        params = self._parameters()
        if not params:
            raise ValueError("the base optimizer has no parameters: pass model.parameters() to it")
        named = [
            (f"parameter {i} of group {g}", p)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
        ]
        twice = len(params) - len(set(map(id, params)))
        if twice:
            raise ValueError(f"{twice} of the {len(params)} parameters are listed more than once: list each once")
        check_parameters(named)
        group_of = {id(p): g for g, group in enumerate(self.param_groups) for p in group["params"]}
        for flat in self._flats:
            if [group_of.pop(id(p), None) for p in flat.params] != flat.groups:
                raise RuntimeError(
                    "parameters were removed from a group or moved to another by hand: make a new optimizer for the new "
                    "groups, or use add_param_group for additional ones"
                )
        for name, p in named:
            if p.is_meta and id(p) in group_of:
                raise ValueError(f"{name} is on the meta device and has no values: materialise the model first")
        buckets: dict[tuple, list[tuple[Tensor, int]]] = {}
        for p in params:
            if id(p) in group_of:
                buckets.setdefault((p.device, p.dtype), []).append((p, group_of[id(p)]))
        if buckets:
            self._check_idle("parameters were added")
        backends = {device: ops.get_backend(self.backend, device) for device, _ in buckets}
        for flat in self._flats:
            flat.take_back()
        flats = [
            Flat([p for p, _ in members], [g for _, g in members], flatten=self.flatten, backend=backends[device])
            for (device, _), members in buckets.items()
        ]
        self._flats += flats
        base = self.base_optimizer
        put_there = set(getattr(base, "_msam_groups", ()))
        for g, group in enumerate(self.param_groups):
            if "rho" not in group:
                group["rho"] = self.defaults["rho"]
                put_there.add(g)
        base._msam_groups = put_there
        self._take_schedules()
        self._layout = self._current_layout()
        self._rows = None

    def _follow_parameters(self) -> None:
        if self._current_layout() != self._layout:
            self._adopt_parameters()

    def _current_layout(self) -> Any:
        return ops.memory_layout([group["params"] for group in self.param_groups])

    def _check_idle(self, what: str) -> None:
        if self._perturbed:
            raise RuntimeError(
                f"{what} while the weights are perturbed: finish the passes() loop first, or call opt.restore() to give it up"
            )
        if self._before is not None:
            raise RuntimeError(
                f"{what} inside a passes() loop or a closure: let that finish first, or call opt.restore() to give it up"
            )

    # -- user's calls ---------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Norms and flags of the latest step, per micro-batch. Reading them is the only time anything is computed.

        Raises:
            RuntimeError: no pass of a step that perturbs has ended yet.
        """
        if not self._norms_sq:
            raise RuntimeError("stats are there after the first pass of a step that perturbs")
        norms_sq = torch.stack([terms.sum() for terms in self._norms_sq])
        achieved_sq = torch.stack([_gathered(parts, norms_sq.device).sum() for parts in self._achieved_sq])
        return Stats(norms_sq.sqrt(), achieved_sq.sqrt(), ~norms_sq.isfinite())

    def passes(self, *batch: Any) -> Iterator[Any]:
        """The loop of one step: yields each micro-batch as often as the method needs, for a forward and a backward.

        ``batch``: tensors, or dicts, tuples and lists of them, that share dim 0. Several arguments are yielded as a tuple,
        one as it came, both sliced along dim 0 (views). Without arguments the loop is one micro-batch of somebody else's
        accumulation, and yields None.

        After the loop the weights are bit for bit what they were, and the mean descent gradient, weighted by micro-batch
        size, has been added to ``p.grad``, as ``backward()`` would. A ``break``, an exception or a dropped iterator
        restores the weights and the gradients that were there before. Until the loop ends, gradients that passes leave are
        the optimizer's alone: it keeps some, and may add to them.

        Raises:
            ValueError: tensors of different length, or more micro-batches than samples.
            TypeError: something in ``batch`` that is neither a tensor nor None.
            RuntimeError: another loop is under way.
        """
        self._check_idle("passes()")
        parts, shares = self._split(batch)
        return self._passes(parts, shares)

    def step(self, closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None) -> Any:
        """Update the weights.

        Without ``closure``: the base optimizer's step on ``p.grad``, as it stands after a ``passes`` loop.

        With a closure, which runs forward and backward and returns the loss, or a sequence of them, one per micro-batch
        of equal weight: the whole step. Each is called as often as the method needs. Restoring, accumulating and updating
        are one kernel. ``p.grad`` from before takes no part and is None afterwards; if a closure raises, weights and
        gradients are what they were. Until the step ends, gradients that closures leave are the optimizer's alone: it keeps
        some, and may add to them. Nothing looks at the gradient before the update: where it can overflow (fp16 with a
        ``GradScaler``), use ``passes``.

        Returns:
            None, the closure's value at w, or for a sequence the detached mean of the values.

        Raises:
            RuntimeError: the weights are perturbed, by a ``passes`` loop that is not finished.
            ValueError: a number of closures other than ``num_micro_batches``. With ``micro_batch_size`` the caller splits
                the batch, into any number.
        """
        return self._profiled_step(closure) if self._has_listeners() else self._step(closure)

    def _has_listeners(self) -> bool:
        return torch.autograd._profiler_enabled() or any(_step_hooks(self))

    step.hooked = True  # torch's wrapper costs more than a kernel, so it runs only where somebody listens

    @property
    def mask(self) -> list[Tensor] | None:
        """Sparse SAM's mask: for every parameter, in the order of the groups, bools in its shape. None before there is one.

        Assign such a list to take another one, which may have any number of elements set; ``update_every`` counts from
        there. Parameters that are added to the optimizer later have none: the next step then chooses for all.

        Raises, when assigned:
            ValueError: tensors of other shapes or dtypes than the parameters' and bool.
            RuntimeError: the method has no mask, or a step is under way.
        """
        flat_of = {id(p): (flat, i) for flat in self._flats for i, p in enumerate(flat.params)}
        places = [flat_of[id(p)] for p in self._parameters()]
        if any(flat.mask is None for flat, _ in places):
            return None
        return [flat.mask_of(i) for flat, i in places]

    @mask.setter
    def mask(self, masks_: Sequence[Tensor]) -> None:
        self._check_sparse("a mask")
        self._check_idle("a new mask")
        self._follow_parameters()
        params, new = self._parameters(), list(masks_)
        wanted, got = (
            [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in ts] for ts in (params, new)
        )
        if wanted != got or any(t.dtype != torch.bool for t in new):
            dtypes = sorted({str(t.dtype) for t in new if isinstance(t, Tensor)})
            raise ValueError(
                f"mask must be a list of torch.bool tensors, one for each parameter, of shapes {wanted}, got "
                f"{', '.join(dtypes)} of shapes {got}"
            )
        by_parameter = dict(zip(map(id, params), new, strict=True))
        for flat in self._flats:
            for i, p in enumerate(flat.params):
                flat.set_mask(i, by_parameter[id(p)])
        self._mask_step = self.steps

    def update_mask(self, loss_fn: Callable[..., Tensor], *samples: Any) -> None:
        """Choose Sparse SAM's mask by the sum of squares of the gradients of single samples, the Fisher information.

        A mask that is "dynamic" drops and regrows by it. One forward and backward per sample, without perturbation. Weights,
        gradients, and with ``model=`` its running statistics, stay what they are. Layers that need more than one sample
        (BatchNorm in training) are the caller's to switch: ``model.eval()``.

        Args:
            loss_fn: as in ``train_step``; it is given batches of one sample.
            samples: as a batch in ``train_step``.

        Raises:
            RuntimeError: the method has no mask, or a step is under way.
            ValueError: there are no samples, or a gradient is not finite: the old mask is kept.
        """
        sparse = self._check_sparse("update_mask()")
        self._check_idle("update_mask()")
        if not samples:
            raise ValueError("update_mask needs samples: update_mask(loss_fn, x, y)")
        closures = self._micro_batches(loss_fn, samples, lambda count: [1] * count)
        if not closures:
            raise ValueError("the batch has no samples")
        with _StepUnderWay(self):
            for closure in closures:
                self._freeze_statistics()
                _call(closure)
                self._thaw_statistics()
                self._add_scores(self._collected(clear=True))
            if not all(_is_finite(tensors) for tensors in self._scores):
                raise ValueError("a gradient of the samples is not finite, and says nothing of the weights: use others")
            self._choose_mask(sparse, self.steps)
            self.restore()

    def _check_sparse(self, what: str) -> _methods.SparseSAM:
        if self.method.sparse is None:
            raise RuntimeError(f"{what} is for methods with a mask, e.g. methods.SparseSAM(), got {self.method}")
        return self.method.sparse

    def _step(self, closure) -> Any:
        self._check_idle("step()")
        if closure is None:
            self._prepare()
            fused = self._fused()
            if fused is None:
                self.base_optimizer.step()
            else:
                for flat, (grads, absent) in self._collected(clear=False):
                    self._update(flat, fused, grads, absent)
            torch.clear_autocast_cache()
            self._count_step()
            return None
        if callable(closure):
            closures, shares = [closure], [1.0]
        else:
            closures = list(closure)
            shares = (
                closure.shares if isinstance(closure, _MicroBatches) else [1 / max(len(closures), 1)] * len(closures)
            )
        wanted = self.num_micro_batches
        if not closures or (wanted and len(closures) != wanted):
            raise ValueError(
                f"num_micro_batches={wanted} takes as many closures, one per micro-batch, got {len(closures)}"
                if wanted
                else "step takes one closure per micro-batch, got an empty sequence"
            )
        values = self._run_closures(closures, shares)
        self._count_step()
        if callable(closure):
            return values[0]
        return None if any(v is None for v in values) else _mean(values, shares)

    _profiled_step = Optimizer.profile_hook_step(_step)

    def train_step(self, loss_fn: Callable[..., Tensor], *batch: Any) -> Tensor:
        """One whole step: ``loss_fn(*micro_batch)`` returns the mean loss of its micro-batch.

        Args:
            loss_fn: forward only; ``backward()`` is called on what it returns.
            batch: as in ``passes``; ``loss_fn`` gets one argument for each.

        Returns:
            The detached mean loss at w over the whole batch.

        Raises:
            ValueError, TypeError, RuntimeError: as ``passes``; weights and gradients are what they were.
        """
        self._check_idle("train_step()")
        if not batch:
            raise ValueError("train_step needs a batch: train_step(loss_fn, x, y)")
        return self.step(self._micro_batches(loss_fn, batch))

    def _micro_batches(
        self, loss_fn: Callable[..., Tensor], batch: tuple, sizes: Callable[[int], list[int]] | None = None
    ) -> _MicroBatches:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of a micro-batch that returns its mean loss, got {loss_fn!r}")
        parts, shares = self._split(batch, sizes)

        def closure(part):
            loss = loss_fn(*part) if len(batch) > 1 else loss_fn(part)
            loss.backward()
            return loss.detach()

        return _MicroBatches([lambda part=part: closure(part) for part in parts], shares)

    def capture(self, loss_fn: Callable[..., Tensor], *example_batch: Any, warm_up: int = 3) -> CapturedStep:
        """``train_step(loss_fn, *batch)`` as one CUDA graph: both passes of every micro-batch, all kernels, the update.

        ::

            step = opt.capture(lambda x, y: F.cross_entropy(model(x), y), x, y)
            for x, y in loader:
                loss = step(x, y)
                scheduler.step()

        Nothing runs yet: the first ``warm_up`` calls of what is returned are eager steps, the next one is captured, and
        the others replay it. See ``graphs.CapturedStep``.

        Args:
            loss_fn: as in ``train_step``; it must do the same on the device each time, without looking at values.
            example_batch: as in ``train_step``; later batches have its structure, shapes and dtypes.
            warm_up: eager steps before the capture, >= 1.

        Raises:
            RuntimeError: the parameters are not all on one CUDA device.
            TypeError: ``loss_fn`` cannot be called, or a hyper-parameter is a tensor on the GPU.
            ValueError: no example batch, one that cannot be split, or ``warm_up`` < 1.
        """
        devices = sorted({str(p.device) for p in self._parameters()})
        if len(devices) > 1 or not devices[0].startswith("cuda"):
            raise RuntimeError(
                f"capture needs all parameters on one CUDA device, got {', '.join(devices)}: use train_step, which does the "
                "same without a graph"
            )
        for g, group in enumerate(self.param_groups):
            on_gpu = [name for name, value in group.items() if isinstance(value, Tensor) and value.is_cuda]
            if on_gpu:
                raise TypeError(
                    f"{', '.join(on_gpu)} of group {g} is a tensor on the GPU, which the host would have to wait for in every "
                    "step: use a number; the graph follows it all the same"
                )
        return CapturedStep(self, loss_fn, example_batch, CudaRecorder(torch.device(devices[0])), warm_up)

    def update_hyper(self) -> None:
        """Bring the device's copy of learning rates, rho and other hyper-parameters up to date, without a host sync.

        Every eager step and every call of ``capture``'s result does so by itself. Call it before you replay a CUDA graph of
        your own, after a scheduler's step. Where the method's ``start`` or a function for rho looks at the number of steps,
        count such replays in ``opt.steps`` yourself. Which kind of step LookSAM takes, and that a step chooses no mask, is
        fixed in the graph.
        """
        self._prepare()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; inside a ``passes`` loop it also drops the gradients that were there before the loop."""
        if set_to_none and not torch.autograd._profiler_enabled():  # torch's costs more than clearing
            for group in self.param_groups:
                ops.set_grads(group["params"], [])
        else:
            super().zero_grad(set_to_none)
        for grads in self._before or ():
            grads.clear()
        if self._before is None:
            self._v_step = -1  # LookSAM's direction is that of the gradients that are gone

    @torch.no_grad()
    def restore(self) -> None:
        """Give up the step under way: weights and gradients are at once, bit for bit, what they were before it."""
        self._thaw_statistics()
        moved, error = self._current_layout() != self._layout, None
        for flat in self._flats:
            if moved:  # parameters that are new wait for the next step
                try:
                    flat.take_back()
                except RuntimeError as e:  # the others can be restored
                    error = e
                    continue
            # An untouched achieved_sq tells of a kernel that was interrupted before it ran; what is captured never ran.
            if flat.perturbed is not None and flat.achieved_sq._version > 0 and not flat.is_capturing():
                self._restore_weights(flat)
            flat.perturbed = None
        self._perturbed = error is not None
        if self._before is not None:
            for flat, grads in zip(self._flats, self._before, strict=True):
                flat.set_grads(grads)
        torch.clear_autocast_cache()
        self._drop_new_mask()
        if self._v_step is None:  # what there is of it is used until the next one, which does not add to it
            self._v_step = -1
            if not any(flat.is_capturing() for flat in self._flats):
                self._measure_v()
        self._end_step()
        if error is not None:
            raise error

    def _end_step(self) -> None:
        self._before = self._scores = self._grad_norm_sq = self._at_e_norm_sq = None
        self._mask_is_new = False
        for flat in self._flats:
            flat.acc, flat.acc_absent, flat.kept = None, (), []

    def _count_step(self) -> None:
        if not any(flat.is_capturing() for flat in self._flats):  # what is captured has not run
            self.steps += 1

    def _perturbs(self) -> bool:
        return self._kind_of_step() == _PERTURB

    def _kind_of_step(self) -> str:
        """What the next step is: the base optimizer's alone, one that perturbs, or one between that reuses."""
        since = self.steps - self.method.start
        if not self.enabled or since < 0:
            return _BASE
        look = self.method.look
        if look is None or since % look.k == 0:
            return _PERTURB
        if look.alpha == 0:
            return _BASE
        return _PERTURB if any(flat.v is None for flat in self._flats) else _REUSE

    # -- one step -------------------------------------------------------------------------------------------------------

    def _split(self, batch: tuple, sizes_of: Callable[[int], list[int]] | None = None) -> tuple[list[Any], list[float]]:
        """The micro-batches, and the share of the batch's samples that each holds."""
        if not batch:
            return [None], [1.0]
        whole = batch[0] if len(batch) == 1 else batch
        plain = all(isinstance(t, Tensor) for t in batch)  # the usual case, without the cost of walking a tree
        leaves, spec = (batch, None) if plain else tree_flatten(whole)
        lengths = set()
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dim() > 0:
                lengths.add(leaf.shape[0])
            elif leaf is not None:
                what = "a 0-d tensor" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
                raise TypeError(f"a batch holds tensors that share dim 0, in dicts, tuples and lists; got {what}")
        if len(lengths) != 1:
            raise ValueError(f"the tensors of a batch must share dim 0, got lengths {sorted(lengths)}")
        (samples,) = lengths
        sizes = (sizes_of or self._sizes)(samples)
        if len(sizes) == 1:
            return [whole], [1.0]
        columns = [[None] * len(sizes) if leaf is None else leaf.split(sizes) for leaf in leaves]
        rows = zip(*columns, strict=True)
        if plain:
            parts = [row[0] if len(batch) == 1 else row for row in rows]
        else:
            parts = [tree_unflatten(list(row), spec) for row in rows]
        return parts, [size / samples for size in sizes]

    def _sizes(self, samples: int) -> list[int]:
        if samples == 0:
            raise ValueError("the batch has no samples")
        if self.micro_batch_size is not None:
            size = self.micro_batch_size
            return [min(size, samples - start) for start in range(0, samples, size)]
        count = self.num_micro_batches
        if count > samples:
            raise ValueError(
                f"num_micro_batches={count} is more than the {samples} samples of the batch: use larger batches "
                "(drop_last=True in the loader), fewer micro-batches, or micro_batch_size"
            )
        return [samples // count + (i < samples % count) for i in range(count)]

    def _passes(self, parts: list[Any], shares: list[float]) -> Iterator[Any]:
        self._check_idle("passes()")
        with _StepUnderWay(self) as before:

            def finish(shares: list[float], i: int) -> None:
                add_to = len(parts) == 1 and self._kind != _REUSE
                if add_to:  # the last kernel of the loop can add to the gradients that were there
                    for flat, grads in zip(self._flats, before, strict=True):
                        flat.start_from(grads)
                self._descend(shares, i)
                if self._kind == _REUSE:
                    self._add_v()
                for flat, grads in zip(self._flats, before, strict=True):
                    means = flat.means()
                    flat.set_grads(list(map(_added, grads, means)) if grads and not add_to else means)

            for _, part in self._turns(parts, shares, before, finish, adds=any(before)):
                yield part

    def _run_closures(self, closures: list[Callable[[], Any]], shares: list[float]) -> list[Any]:
        values = []
        with _StepUnderWay(self) as before:
            for turn, closure in self._turns(closures, shares, before, self._descend_and_update):
                value = _call(closure)
                if turn == 0:
                    values.append(value)
        return values

    def _turns(
        self,
        parts: list[Any],
        shares: list[float],
        before: list,
        finish: Callable[[list[float], int], None],
        *,
        adds: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """(turn, part): every micro-batch as often as the method needs, with the kernels' work in between.

        ``finish`` ends the last one; ``adds``: to gradients of the same step that were there before.
        """
        self._begin_turns()
        method = self.method
        adds = adds and self._v_step == self.steps
        perturbations = ()
        if self._kind == _PERTURB:
            perturbations = (self._ascend,) if method.rho_min is None else (self._ascend, self._cross)
        for i, part in enumerate(parts):
            yield 0, part
            for turn, perturb in enumerate(perturbations, 1):
                self._check_current(before)
                perturb(first=i == 0)
                self._freeze_statistics()
                yield turn, part
                self._check_current(before)
                self._thaw_statistics()
            if not perturbations:
                self._check_current(before)
            elif method.keeps_v:
                self._collect_v(shares[i], fresh=i == 0 and not adds)
            if i + 1 < len(parts):
                self._descend(shares, i)
            else:  # what may fail comes before what cannot be undone
                if perturbations and method.keeps_v:
                    self._measure_v()
                    self._v_step = self.steps
                if self._scores_wanted:
                    self._end_masks()
                finish(shares, i)
            if method.kept or method.keeps_v:
                for flat in self._flats:
                    flat.kept = []

    def _begin_turns(self) -> None:
        self._kind = self._kind_of_step()
        self._norms_sq, self._achieved_sq = [], []
        self._scores_wanted = self._chooses_mask(self._kind)
        if self._scores_wanted:
            for flat in self._flats:
                flat.check_not_capturing("the mask")

    def _check_current(self, before: list) -> None:
        if self._before is not before:
            raise RuntimeError("this passes() loop was given up by opt.restore(): start a new one")

    def _freeze_statistics(self) -> None:
        """From now on ``model`` normalises its batches as before, and records nothing."""
        if self.model is not None:
            for layer, name, value in _running_statistics(self.model):
                self._frozen.append((layer, name, getattr(layer, name)))
                setattr(layer, name, value)

    def _thaw_statistics(self) -> None:
        while self._frozen:
            setattr(*self._frozen[-1])
            self._frozen.pop()

    def _prepare(self) -> None:
        """Notice what the user changed since the last step: groups, addresses, hyper-parameters."""
        self._follow_parameters()
        base = type(self.base_optimizer)
        columns = _FUSED[base][1] if base in _FUSED else lambda group: ()
        rows = []
        for g, group in enumerate(self.param_groups):
            row = (self._update_rho(g, group), *columns(group))
            rows.append(tuple([float(v) if isinstance(v, Tensor) else v for v in row]))
        opposite = []
        if self.method.rho_min is not None:
            rho_min = _rho_at(self.method.rho_min, self.steps)
            _check_rho(rho_min, "rho_min")
            opposite = [(-float(rho_min) if row[0] else 0.0,) for row in rows]
        if (rows, opposite) != self._rows:
            for row in rows:
                _check_rho(row[0])
            for flat in self._flats:
                flat.check_not_capturing("hyper-parameters")
            for kept, table in ((self._hyper, rows), (self._opposite, opposite)):
                hyper = torch.tensor(table, dtype=torch.float64, device="cpu")
                for device in {flat.device for flat in self._flats} if table else ():
                    old = kept.get(device)
                    if old is not None and old.shape == hyper.shape:
                        old.copy_(hyper, non_blocking=True)  # a captured graph reads it at this address
                    else:
                        kept[device] = hyper.to(device, non_blocking=True)
            self._state_keys = tuple(_FUSED[base][2](group) for group in self.param_groups) if base in _FUSED else ()
            self._rows = rows, opposite

    def _update_rho(self, g: int, group: dict[str, Any]) -> Any:
        """The group's rho in this step. A function that stands there is its schedule from now on, a new number ends that."""
        rho = group.get("rho", self.defaults["rho"])
        schedule, latest = self._rho_schedules.get(g, (None, None))
        if callable(rho):
            schedule = rho
        elif schedule is None or (rho is not latest and rho != latest):
            self._rho_schedules.pop(g, None)
            return rho
        rho = schedule(self.steps)
        _check_rho(rho)
        group["rho"], self._rho_schedules[g] = rho, (schedule, rho)
        return rho

    def _take_schedules(self) -> None:
        for g, group in enumerate(self.param_groups):
            if callable(group.get("rho")):
                self._update_rho(g, group)

    def _check_model(self) -> None:
        """No gradient at all: has the model other parameters by now?"""
        own = set(map(id, self._parameters()))
        if own.isdisjoint(map(id, self.model.parameters())):
            raise RuntimeError(
                "none of the optimizer's parameters is in the model any more (load_state_dict(assign=True) replaces them): "
                "make the optimizer after that"
            )

    def _collected(self, *, clear: bool) -> list[tuple[Flat, Gradients]]:
        """Every flat with its gradients; all are looked at before any kernel runs."""
        collected = [(flat, flat.collect_grads(clear=clear)) for flat in self._flats]
        if len(collected) == 1:
            return collected
        # Within a flat they are told apart where they are written to.
        lists = _own_memory([grads for _, (grads, _) in collected], whole=False)
        return [(flat, (grads, absent)) for (flat, (_, absent)), grads in zip(collected, lists, strict=True)]

    def _ascend(self, *, first: bool, clear: bool = True) -> None:
        """p.grad is the gradient at w: perturb the weights, and clear p.grad for the next pass."""
        method = self.method
        collected = self._collected(clear=clear)
        if self.model is not None and all(len(absent) == len(flat.params) for flat, (_, absent) in collected):
            self._check_model()
        if method.kept or method.keeps_v:
            self._keep(collected)
        if self._scores_wanted:
            self._add_scores(collected)
            if any(flat.mask is None for flat in self._flats):
                self._choose_mask(method.sparse, self.steps)
                self._mask_is_new = True
        calls = []
        for flat, (grads, absent) in collected:
            saved = flat.saved if flat.save(absent, again=first) else None
            chunks = flat.chunks(absent)
            flat.achieved_sq = torch.empty(len(chunks), dtype=torch.float64, device=flat.device)
            if torch.is_inference_mode_enabled():  # restore() asks for its version
                with torch.inference_mode(False):
                    flat.achieved_sq = torch.empty_like(flat.achieved_sq)
            flat.perturbed, flat.perturbed_absent = chunks, absent
            outputs = {"saved": saved, "hyper": self._hyper[flat.device], "achieved_sq": flat.achieved_sq}
            outputs.update(self._masked_and_averaged(flat, last=method.rho_min is None))
            calls.append((flat, (flat.weights, grads, chunks), self._direction(flat), outputs))
        self._achieved_sq.append([flat.achieved_sq for flat in self._flats])
        self._perturbed = True
        if len(calls) == 1:
            ((flat, arguments, direction, outputs),) = calls
            flat.norm_sq = flat.backend.ascend(*arguments, **direction, **outputs)
        else:  # the norm is over all of them
            sums = [flat.backend.inner_products(*args, **direction) for flat, args, direction, _ in calls]
            for flat, arguments, direction, outputs in calls:
                flat.norm_sq = _gathered(sums, flat.device)
                weights, grads, chunks = arguments
                flat.backend.perturb(weights, [], grads, chunks, norm_sq=flat.norm_sq, **direction, **outputs)
        self._norms_sq.append(self._flats[0].norm_sq)
        torch.clear_autocast_cache()
        if method.rescales and not method.kept:
            if calls[0][2]:  # the direction is another vector
                self._grad_norm_sq = self._sum_of_squares(collected)
            else:
                self._grad_norm_sq = total(self._norms_sq[-1])

    def _direction(self, flat: Flat) -> dict[str, Any]:
        """What the direction d is made of."""
        direction = self.method.direction
        if self.method.ema_decay is not None:
            if flat.ema is None:
                flat.start_ema()
            direction["ema"] = flat.ema
        return direction

    def _masked_and_averaged(self, flat: Flat, *, last: bool) -> dict[str, Any]:
        """A perturbation's options beside the direction: its mask, and for a micro-batch's last one the EMA's decay."""
        options = {} if self.method.sparse is None else {"mask": flat.mask}  # another method's may have been loaded
        if last and self.method.ema_decay is not None:
            options["lmbda"] = self.method.ema_decay
        return options

    def _keep(self, collected: list[tuple[Flat, Gradients]]) -> None:
        """For the descent, until there."""
        for flat, (grads, absent) in collected:
            flat.kept.insert(0, (ops.own_memory(grads), absent))

    def _cross(self, *, first: bool) -> None:
        """p.grad is the gradient at w + e: perturb the weights to the other side, and clear p.grad for the next pass."""
        self._follow_parameters()
        at_w = [flat.kept[0] for flat in self._flats]
        self._keep(self._collected(clear=True))
        at_e = [flat.kept[0] for flat in self._flats]
        # The descent takes g⁺ + g, which 16 bits would round, and of g⁺ alone only the norm.
        adds = (
            self.method.adds_kept
            and not self.method.rescales
            and all(flat.dtype.itemsize >= 4 for flat in self._flats)
            and [absent for _, absent in at_e] == [absent for _, absent in at_w]
        )
        acc, acc_sq = [[] for _ in self._flats], []
        if adds:  # written to, so it must not be what else there is of gradients
            others = [*self._before, *(grads for grads, _ in at_w)]
            acc = _own_memory([*others, *(grads for grads, _ in at_e)], whole=False)[len(others) :]
        for flat, (grads, absent), sums in zip(self._flats, at_w, acc, strict=True):
            options = {}
            if adds:
                options["acc_sq"] = torch.empty_like(flat.achieved_sq)
                acc_sq.append(options["acc_sq"])
                flat.kept = [(sums, absent)]
            flat.backend.perturb(
                flat.weights,
                sums,
                grads,
                flat.perturbed,
                norm_sq=flat.norm_sq,
                hyper=self._opposite[flat.device],
                achieved_sq=torch.empty_like(flat.achieved_sq),
                origin=flat.saved,
                **options,
                **self._direction(flat),
                **self._masked_and_averaged(flat, last=True),
            )
        self._at_e_norm_sq = total(_gathered(acc_sq, self._flats[0].device)) if adds else None
        torch.clear_autocast_cache()

    def _descend(self, shares: list[float], i: int) -> None:
        """p.grad is micro-batch i's last gradient: weights back, the descent into the mean, p.grad cleared."""
        self._follow_parameters()
        for flat, grads, absent, coefs in self._descents(clear=True):
            self._restore_and_accumulate(flat, grads, absent, coefs, shares, i)
        self._perturbed = False
        torch.clear_autocast_cache()

    def _descents(self, *, clear: bool) -> list[tuple[Flat, list[Tensor], tuple[int, ...], dict[str, Tensor]]]:
        """Of every flat: the descent gradients as the kernels take them, those that are absent, and {} or their coefs."""
        method, collected = self.method, self._collected(clear=clear)
        if not self._perturbed or not (method.kept or method.rescales):
            return [(flat, grads, absent, {}) for flat, (grads, absent) in collected]
        vectors = [(flat, *flat.with_kept(grads, absent)) for flat, (grads, absent) in collected]
        if self._at_e_norm_sq is None:
            dots = self._dots(vectors, 1 + method.kept if method.rescales else 2)
        else:
            dots = [*self._dots(vectors, 1), 0.0, self._at_e_norm_sq]
        coefs = method.descent_coefs(dots, dots[-1] if method.kept else self._grad_norm_sq)
        if self._at_e_norm_sq is not None:
            coefs = coefs[:2]
        return [
            (flat, [t for tensors in lists[: len(coefs)] for t in tensors], absent, {"coefs": coefs.to(flat.device)})
            for flat, lists, absent in vectors
        ]

    def _dots(self, vectors: list[tuple[Flat, list[list[Tensor]], tuple[int, ...]]], count: int) -> list[Number]:
        """The sums of the operator ``dots`` over all flats, of the first ``count`` vectors."""
        parts = []
        for flat, lists, absent in vectors:
            chunks = flat.chunks(absent)
            if count == 1:
                parts.append(flat.backend.inner_products([], lists[0], chunks)[None])
            else:
                parts.append(flat.backend.dots(lists[0], lists[1], lists[2] if count == 3 else [], chunks))
        return totals(_gathered(parts, self._flats[0].device))

    def _sum_of_squares(self, collected: list[tuple[Flat, Gradients]]) -> Number:
        return self._dots([(flat, [grads], absent) for flat, (grads, absent) in collected], 1)[0]

    # -- LookSAM --------------------------------------------------------------------------------------------------------

    def _collect_v(self, share: float, *, fresh: bool) -> None:
        """p.grad is a micro-batch's gradient at w + e, the one at w is kept: v gets what the first has beside the second."""
        self._follow_parameters()
        vectors = [(flat, *flat.with_kept(grads, absent)) for flat, (grads, absent) in self._collected(clear=False)]
        coefs = self.method.look.v_coefs(self._dots(vectors, 2))
        self._v_step = None
        for flat, lists, absent in vectors:
            if flat.v is None or (fresh and absent):  # what has no gradient must not keep an old direction
                flat.start_v()
            flat.backend.restore(
                [],
                flat.v_parts,
                [*lists[0], *lists[1]],
                flat.chunks(absent),
                coefs=coefs.to(flat.device),
                c_acc=0.0 if fresh else 1.0,
                c=share,
            )

    def _measure_v(self) -> None:
        if any(flat.v is None for flat in self._flats):
            return
        v_norm_sq = self._sum_of_squares([(flat, (flat.v_parts, ())) for flat in self._flats])
        if self._v_norm_sq is None:
            self._v_norm_sq = torch.empty((), dtype=torch.float64, device=self._flats[0].device)
        self._v_norm_sq.fill_(v_norm_sq)

    def _reused(self) -> list[tuple[Flat, list[Tensor], dict[str, Tensor]]]:
        """Of every flat: the mean gradient and v, as the kernels take them, and their coefs."""
        means = [(flat, (flat.acc, flat.acc_absent)) for flat in self._flats]
        coefs = self.method.look.reuse_coefs(self._sum_of_squares(means), self._v_norm_sq)
        return [(flat, [*flat.acc, *flat.v_parts], {"coefs": coefs.to(flat.device)}) for flat in self._flats]

    def _add_v(self) -> None:
        """The mean gradient becomes what a step between uses."""
        for flat, vectors, coefs in self._reused():
            flat.backend.restore([], flat.acc, vectors, flat.chunks(flat.acc_absent), c_acc=0.0, **coefs)

    # -- Sparse SAM -----------------------------------------------------------------------------------------------------

    def _chooses_mask(self, kind: str) -> bool:
        """Whether the next step, of that kind, chooses a mask: the first one for itself, later ones for the step after."""
        sparse = self.method.sparse
        if sparse is None or kind != _PERTURB:
            return False
        missing = any(flat.mask is None for flat in self._flats)
        if missing and sparse.update_every is None:
            raise RuntimeError(
                f"{sparse} has no mask yet: call opt.update_mask(loss_fn, *samples), assign opt.mask, or give update_every"
            )
        return missing or self._mask_is_due()

    def _mask_is_due(self) -> bool:
        sparse = self.method.sparse
        return (
            sparse is not None
            and sparse.update_every is not None
            and self.steps + 1 - self._mask_step >= sparse.update_every
        )

    def _add_scores(self, collected: list[tuple[Flat, Gradients]]) -> None:
        gradients = [grads for _, (grads, _) in collected]
        gradients = [ops.own_memory(grads) for grads in gradients]
        scores = self._scores or [None] * len(gradients)
        self._scores = [masks.add_up(*pair) for pair in zip(scores, gradients, strict=True)]

    def _choose_mask(self, sparse: _methods.SparseSAM, step: int) -> None:
        masks.choose(self._flats, self._scores, sparse, step)
        self._mask_step = step

    def _end_masks(self) -> None:
        """After the step's last micro-batch: the next step's mask, unless the gradients were not finite."""
        if not all(bool(terms.sum().isfinite()) for terms in self._norms_sq):
            self._drop_new_mask()  # it was made of them
        elif self._mask_is_due():
            self._choose_mask(self.method.sparse, self.steps + 1)

    def _drop_new_mask(self) -> None:
        if self._mask_is_new:
            for flat in self._flats:
                flat.mask = None

    # -- descent --------------------------------------------------------------------------------------------------------

    def _descend_and_update(self, shares: list[float], i: int, *, clear: bool = True) -> None:
        """The last micro-batch's ``_descend`` and the base optimizer's step, in one kernel where that is possible."""
        self._follow_parameters()
        fused = self._fused()
        reuses = self._kind == _REUSE
        for flat, grads, absent, coefs in self._descents(clear=clear):
            if fused is not None and not reuses and flat.is_uniform(absent):
                c_acc, c = _coefficients(shares, i)
                options = {"c_acc": c_acc, "c": c, **coefs}
                if flat.perturbed is not None:
                    options.update(saved=flat.saved, norm_sq=flat.norm_sq)
                self._update(flat, fused, grads, absent, flat.acc, **options)
                flat.perturbed = None
            else:
                self._restore_and_accumulate(flat, grads, absent, coefs, shares, i)
                if fused is not None and not reuses:
                    self._update(flat, fused, flat.acc, flat.acc_absent)
        self._perturbed = False
        if reuses and fused is not None:
            for flat, vectors, coefs in self._reused():
                self._update(flat, fused, vectors, flat.acc_absent, **coefs)
        elif reuses:
            self._add_v()
        if fused is None:
            for flat in self._flats:
                flat.set_grads(flat.means())
            self.base_optimizer.step()
            if clear:
                for flat in self._flats:
                    flat.set_grads([])
        torch.clear_autocast_cache()

    @staticmethod
    def _restore_weights(flat: Flat) -> None:
        flat.backend.restore(flat.weights, [], [], flat.perturbed, saved=flat.saved)
        increment_version(flat.params)

    def _restore_and_accumulate(
        self,
        flat: Flat,
        grads: list[Tensor],
        absent: tuple,
        coefs: dict[str, Tensor],
        shares: list[float],
        i: int,
    ) -> None:
        c_acc, c = _coefficients(shares, i)
        options = {"c_acc": c_acc, "c": c, **coefs}
        if flat.perturbed is not None:
            options["norm_sq"] = flat.norm_sq
        uniform = flat.perturbed is not None and flat.is_uniform(absent)
        at_e = grads[: len(flat.params)]
        if flat.acc is None or (coefs and not uniform):
            # Written to: the mean begins here, and a combination takes its place.
            at_e = ops.own_memory(at_e, whole=i + 1 < len(shares))
            grads = [*at_e, *grads[len(at_e) :]]
        if uniform:
            acc, new = (at_e, grads if coefs else []) if flat.acc is None else (flat.acc, grads)
            if coefs and flat.acc is None:
                options.update(c_acc=0.0, c=1.0)  # the combination in place of the gradient at w + e
            flat.backend.restore(flat.weights, acc, new, flat.perturbed, saved=flat.saved, **options)
        else:  # nothing was perturbed, or a parameter got a gradient in one pass only
            if flat.perturbed is not None:
                self._restore_weights(flat)
            if coefs:
                flat.backend.restore([], at_e, grads, flat.chunks(absent), c_acc=0.0, **coefs)
                del options["coefs"]
            (acc, new), absent = ((at_e, []), absent) if flat.acc is None else flat.matched(at_e, absent)
            if new or flat.perturbed is not None:
                flat.backend.restore([], acc, new, flat.chunks(absent), **options)
        flat.acc, flat.acc_absent = acc, absent
        flat.perturbed = None

    def _fused(self) -> tuple | None:
        """How to update in one kernel; None where only the base optimizer's own step will do."""
        base = self.base_optimizer
        step = base.__dict__.get("step")  # patched on the instance: by a scheduler, which only counts, or by the user
        if (
            (step is not None and getattr(step, "__wrapped__", None) is not type(base).step)
            or base._optimizer_step_pre_hooks
            or base._optimizer_step_post_hooks
            or any(group.get("differentiable") or group.get("capturable") for group in self.param_groups)
        ):
            return None
        return _FUSED.get(type(base))

    def _update(
        self,
        flat: Flat,
        fused: tuple,
        grads: list[Tensor],
        absent: tuple,
        acc: list[Tensor] | None = None,
        **options: Any,
    ) -> None:
        """The fused kernel on the base optimizer's own state."""
        self.base_optimizer._opt_called = True  # what schedulers look at
        if len(absent) == len(flat.params):
            return
        operator = fused[0]
        fresh = flat.bind(self.state, self._state_keys, absent)
        if operator == "sgd":
            options["fresh"] = fresh
        getattr(flat.backend, operator)(
            flat.weights, acc or [], grads, flat.chunks(absent), hyper=self._hyper[flat.device], **flat.state, **options
        )


class _StepUnderWay:
    """Puts the gradients that are there aside; brings them and the weights back if the step does not finish.

    Not ``contextlib.contextmanager``, which takes a microsecond more.
    """

    __slots__ = ("before", "opt")

    def __init__(self, opt: MicroBatchSAM):
        self.opt = opt

    def __enter__(self) -> list[list[Tensor | None]]:
        opt = self.opt
        opt._prepare()
        self.before = _own_memory([ops.current_grads(flat.params) for flat in opt._flats], whole=True)
        opt._before = self.before
        try:
            for flat, grads in zip(opt._flats, self.before, strict=True):
                if grads:
                    flat.set_grads([])
            return self.before
        except BaseException:
            opt.restore()
            raise

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.opt._before is not self.before:  # it was given up, and what is there now is not ours
            return
        if kind is not None:
            self.opt.restore()
        else:
            self.opt._end_step()


def _rho_at(rho: Any, steps: int) -> Any:
    return rho(steps) if callable(rho) else rho


def _call(closure: Callable[[], Any]) -> Any:
    return closure() if torch.is_grad_enabled() else torch.enable_grad()(closure)()


def _is_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


@torch.no_grad()
def _mean(values: list[Any], shares: list[float]) -> Any:
    return sum(v * s for v, s in zip(values, shares, strict=True))


def _coefficients(shares: list[float], i: int) -> tuple[float, float]:
    """(c_acc, c) that add micro-batch i's gradient to the mean; the first one is kept as it is until there is a second."""
    if len(shares) == 1:
        return 1.0, 1.0
    return (shares[0] if i == 1 else 1.0), shares[i]


def _added(before: Tensor | None, mean: Tensor | None) -> Tensor | None:
    if before is None or mean is None:
        return mean if before is None else before
    return before.add_(mean)
