# SPDX-License-Identifier: Apache-2.0
"""What methods remember, in and out of state dicts: entries of the base optimizer's ``state``, beside that optimizer's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._torch import children_of, parameters_of, versions_of
from .flat import Flat, has_begun
from .precision import SEEDS
from .rules import MASK_STEP, OURS, RULES, SEED, STEPS, check_rho, saves_itself, theirs_in
from .sharded import check_alike, is_dtensor, shard, shown, values
from .step import Engine
from .store import Store

#: Where older files have all of it, and newer ones what has no entry to stand in.
KEY = "msam"
_MEMORIES = ("ema", "v")
_TENSORS = (*_MEMORIES, "mask", "master")  # by parameter, counted over all groups
#: What the most copied implementations keep by parameter: weights, perturbations, F-SAM's mean gradient.
_THEIRS = ("old_p", "e_w", "momentum")
_NUMBERS = ("steps", "mask_step", "seed")


def show(engine: Engine) -> dict[str, dict[int, Tensor]]:
    """Bring ``state[p]["msam_ema"]``, ``["msam_v"]``, ``["msam_mask"]`` and ``["msam_master"]`` up to date.

    Memories, NaN where nothing has begun, and masters are views, shaped like the parameter; masks are bools. Names are there
    from the first step of the base optimizer on, whether or not anything has begun, so that who loads in place finds them all.

    An entry that the base optimizer has yet to begin stays empty: torch's begin those that are.

    Returns:
        By name and parameter, what has begun and has no entry.
    """
    store, plan = engine.store, engine.method.full
    left: dict[str, dict[int, Tensor]] = {}
    if store.is_capturing():
        return left
    engine.units.bring_back()
    wanted = [name for name, keeps in (("ema", plan.lmbda is not None), ("v", plan.remembers_v)) if keeps]
    entry_of, rule = _entries(engine), RULES.get(type(engine.base))
    groups = [g for g, group in enumerate(engine.base.param_groups) for _ in group["params"]]
    for at, flat, i in _places(store):
        names = [name for name in wanted if name != "ema" or plan.only is None or flat.params[i] in plan.only]
        names += [name for name in _MEMORIES if name in flat.memories and name not in names]
        names += ["master"] if flat.has_masters else []
        if not flat.has_masters:  # before it was converted it may have had one
            engine.base.state.get(flat.params[i], {}).pop(OURS + "master", None)
        masked = plan.sparse is not None or flat.mask is not None
        entry = entry_of(groups[at], flat.params[i]) if names or masked else None
        if flat.has_masters and entry is not None and rule is not None:
            for name in entry.keys() & set(rule.shaped):  # by a step of its own, which torch's checkpoints ask for
                if isinstance(entry[name], Tensor) and entry[name].dtype != flat.dtype_kept:
                    entry[name] = entry[name].to(flat.dtype_kept)
        for name in names:
            if entry is not None and name == "master":
                flat.save_buffer()
            elif entry is not None:
                flat.memory(name, math.nan)
            part = flat.remembered_of(i, name)
            if entry is not None and part is not None:
                if not _is_shown(entry.get(OURS + name), part, flat.params[i]):
                    entry[OURS + name] = shown(part, flat.params[i])
            elif part is not None and has_begun(part):
                left.setdefault(name, {})[at] = shown(part, flat.params[i])
        if masked and entry is not None:
            entry[OURS + "mask"] = _bits(flat)[i]
        elif flat.mask is not None:
            left.setdefault("mask", {})[at] = _bits(flat)[i]
    if plan.sparse is not None and any(flat.mask is None for flat in store.flats):
        engine.mask_step = -1
    return left


def _is_shown(t: Any, part: Tensor, p: Tensor) -> bool:
    """Whether ``t`` is the part as everybody else sees it."""
    if not isinstance(t, Tensor) or is_dtensor(t) != is_dtensor(p):
        return False
    t = shard(t)
    same = (t.dtype, t.device, t.shape, t.stride()) == (part.dtype, part.device, part.shape, part.stride())
    return same and t.data_ptr() == part.data_ptr()


def _entries(engine: Engine) -> Callable[[int, Tensor], dict[str, Any] | None]:
    """What finds the entry of a parameter of a group; None where the base optimizer has yet to begin it."""
    base, state, rule = engine.base, engine.base.state, RULES.get(type(engine.base))
    # It has had its chance to begin any.
    keeps_none = engine.steps > 0 and not any(map(theirs_in, state.values()))

    def entry_of(g: int, p: Tensor) -> dict[str, Any] | None:
        entry: dict[str, Any] | None = state.get(p)
        if entry:
            return entry
        free = keeps_none if rule is None else not rule.names(base.param_groups[g])
        return state[p] if free else None

    return entry_of


def _bits(flat: Flat) -> list[Tensor]:
    """The flat's mask by parameter, as bools; nothing is set where there is none."""
    version = -1 if flat.mask is None else versions_of([flat.mask])[0]
    if flat.shown is None or flat.shown[0] is not flat.mask or flat.shown[1] != version:
        if flat.mask is None:
            bits = [torch.zeros_like(p, dtype=torch.bool, requires_grad=False) for p in flat.params]
        else:
            bits = list(map(flat.mask_of, range(len(flat.params))))
        flat.shown = flat.mask, version, bits
    return flat.shown[2]


def remembered(engine: Engine) -> dict[str, Any]:
    """All of it as older files have it, ``{"steps": …, "ema": {parameter: tensor}, …}``: beside a base that saves itself."""
    engine.units.bring_back()
    own: dict[str, Any] = {"steps": engine.steps}
    if engine.seed is not None:
        own["seed"] = engine.seed
    for at, flat, i in _places(engine.store):
        for name in _MEMORIES:
            part = flat.remembered_of(i, name)
            if part is not None and has_begun(part):
                own.setdefault(name, {})[at] = shown(part, flat.params[i])
        if flat.mask is not None:
            own.setdefault("mask", {})[at] = _bits(flat)[i]
    return {**own, "mask_step": engine.mask_step} if "mask" in own else own


def load_own(engine: Engine, own: dict[str, Any]) -> None:
    """Means and masks of this rank, after a file of another rank was loaded: all else stays what that said."""
    kept = {name: value for name, value in remembered(engine).items() if name not in ("ema", "mask")}
    masters = {
        at: shown(part, flat.params[i])
        for at, flat, i in _places(engine.store)
        if flat.has_masters and (part := flat.remembered_of(i, "master")) is not None
    }
    load(engine, {**kept, **{name: own[name] for name in ("ema", "mask") if name in own}, "master": masters})


def _places(store: Store) -> list[tuple[int, Flat, int]]:
    """Of every parameter that is in a flat: its number, the flat, its place there."""
    return [(at, *place) for at, place in enumerate(store.places()) if place is not None]


def saved(state_dict: dict[str, Any], left: dict[str, dict[int, Tensor]]) -> dict[str, Any]:
    """``state_dict``, and in it what ``show`` found no entry for. What waits is written out, for who loads in place."""
    entries = state_dict.get("state")
    if isinstance(entries, dict):
        state_dict = {**state_dict, "state": {key: _written_out(entry) for key, entry in entries.items()}}
    return {**state_dict, KEY: left} if left else state_dict


def _written_out(entry: Any) -> Any:
    """An entry of the state, or a copy without tensors of ours that are one number in the shape of many."""
    if not isinstance(entry, dict):
        return entry
    ours = {name: shard(t) for name, t in entry.items() if isinstance(t, Tensor) and str(name).startswith(OURS)}
    short = [name for name, t in ours.items() if t.numel() > 1 and not any(t.stride())]
    return {**entry, **{name: entry[name].contiguous() for name in short}} if short else entry


def apart(state_dict: dict[str, Any], store: Store | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state dict without what is ours of its entries, and that: ``{"steps": …, "ema": {parameter: tensor}, …}``.

    Numbers are those of older files, or what stands in the groups. With a ``store`` of masters, "wide" has the entries by
    parameter, which torch is about to round to 16 bits.
    """
    own = state_dict.get(KEY, {})
    if not isinstance(own, dict):
        return state_dict, {KEY: own}  # to be refused
    if not {"state", "param_groups"} <= state_dict.keys():  # of a base optimizer that saves itself
        return state_dict, dict(own)
    groups = state_dict["param_groups"]
    first = groups[0] if groups else {}
    own = {
        **{name: first[key] for name, key in zip(_NUMBERS, (STEPS, MASK_STEP, SEED), strict=True) if key in first},
        **own,
    }
    index = {key: i for i, key in enumerate(key for group in groups for key in group.get("params", ()))}
    entries: dict[Any, Any] = {}
    found: dict[str, dict[Any, Any]] = {name: {} for name in _TENSORS}
    for key, entry in state_dict["state"].items():
        if isinstance(entry, dict) and any(isinstance(name, str) and name.startswith(OURS) for name in entry):
            for name in _TENSORS:
                if OURS + name in entry:
                    found[name][index.get(key, key)] = entry[OURS + name]
            entry = {n: t for n, t in entry.items() if not (isinstance(n, str) and n.startswith(OURS))}
            if not entry:
                continue
        entries[key] = entry
    for name, tensors in found.items():
        if tensors and isinstance(own.get(name, {}), dict):
            own[name] = {**tensors, **own.get(name, {})}
    if store is not None and store.masters:
        own["wide"] = {index[key]: entry for key, entry in entries.items() if key in index}
    return {**{k: v for k, v in state_dict.items() if k != KEY}, "state": entries}, own


def out_of_state(base: Optimizer, left: dict[str, Any]) -> dict[str, Any]:
    """The same, out of the state of an optimizer that was copied or unpickled."""
    own = apart({**_state_of(base), KEY: left})[1]
    for p in [p for group in base.param_groups for p in group["params"]]:
        entry = base.state.get(p, {})
        for name in [name for name in entry if name.startswith(OURS)]:
            del entry[name]
        if p in base.state and not entry:
            del base.state[p]
    return own


def check_state(engine: Engine) -> bool:
    """Whether entries of the base optimizer's state, which was loaded before it was wrapped, hold anything of ours.

    Raises:
        ValueError, TypeError: as ``check``.
    """
    state_dict = _state_of(engine.base)
    found = not apart(state_dict)[1].keys().isdisjoint(_TENSORS)
    if found:
        check(state_dict, engine.store)
    return found


def _state_of(base: Optimizer) -> dict[str, Any]:
    """Its state and our numbers as a state dict has them, all parameters in one group."""
    params = [p for group in base.param_groups for p in group["params"]]
    entries = {i: base.state[p] for i, p in enumerate(params) if base.state.get(p)}
    numbers = {key: base.param_groups[0][key] for key in (STEPS, MASK_STEP, SEED) if key in base.param_groups[0]}
    groups = [{**numbers, "params": range(len(params))}]
    return {"state": entries, "param_groups": groups}


def _begun(own: dict[str, Any]) -> dict[str, Any]:
    """``own`` without what has not begun."""
    begun = dict(own)
    for name in _MEMORIES:
        begun[name] = {at: t for at, t in own.get(name, {}).items() if has_begun(t)}
    if own.get("mask_step", 0) < 0:
        begun["mask"] = {}
    return begun


def take_in(engine: Engine, own: dict[str, Any]) -> None:
    """Parameters of which something was saved are trained, even where they are frozen by now."""
    engine.take_in()
    own = _begun(own)
    kept = {at for name in _TENSORS for at in own.get(name, {})}
    pairs = zip(engine.store.parameters(), engine.store.places(), strict=True)
    frozen = [p for at, (p, place) in enumerate(pairs) if place is None and at in kept]
    if frozen:
        engine.adopt(frozen)
    if any(_holds(own, name, at) for name in _TENSORS for at, flat, i in _places(engine.store) if i in flat.waiting):
        engine.follow()
        held = [(flat, i) for at, flat, i in _places(engine.store) if any(_holds(own, name, at) for name in _TENSORS)]
        engine.store.end_wait(held)


def _holds(own: dict[str, Any], name: str, at: int) -> bool:
    """Whether it has anything to keep for a parameter, of what has begun. A mask is of all elements, trained or not."""
    t = own.get(name, {}).get(at)
    return t is not None and name != "mask" and (name == "ema" or bool(shard(t).any()))


def load(engine: Engine, own: dict[str, Any]) -> None:
    """What ``apart`` returned; what it does not hold begins anew."""
    take_in(engine, own)
    own = _begun(own)
    engine.steps, engine.v_step = own.get("steps", 0), -1
    if "mask_step" in own or engine.method.full.sparse is not None:
        engine.mask_step = own.get("mask_step", -1)
    if engine.store.seed is not None:
        engine.seed = own.get("seed", engine.store.seed)
    places = _places(engine.store)
    engine.units.bring_back()
    engine.undo = None
    # Copies first: what is loaded may be a view of what begins anew.
    tensors = {name: {at: t.clone() for at, t in own.get(name, {}).items()} for name in _TENSORS}
    if not all(at in tensors["v"] or not flat.shards[i].numel() for at, flat, i in places):
        tensors["v"] = {}  # of some parameters only, it is of no use
    rule = RULES.get(type(engine.base))
    for at, flat, i in places:
        if flat.has_masters:
            master = tensors["master"].get(at)
            flat.set_master(i, None if master is None else values(master, flat.params[i]))
            entry, wide = engine.base.state.get(flat.params[i], {}), own.get("wide", {}).get(at, {})
            for name in entry.keys() & wide.keys() & set(() if rule is None else rule.shaped):
                if wide[name] is None:  # as older versions of torch save momentum where there is none
                    continue
                entry[name] = wide[name].to(flat.device, flat.dtype_kept)
    for flat in engine.store.flats:
        if rule is not None and rule.counts:
            flat.count_loaded(engine.base.state)
        mine = {i: at for at, other, i in places if other is flat}
        for name in _MEMORIES:
            there = {i: tensors[name][at] for i, at in mine.items() if at in tensors[name]}
            if not (tensors["v"] if name == "v" else there):  # "v" is of all flats, also of empty shards alone
                flat.memories.pop(name, None)
                continue
            memory = flat.memory(name, math.nan)
            memory.buffer.fill_(memory.begin)
            if name == "v":
                memory.start()
            for i, t in there.items():
                if i not in flat.waiting:
                    memory.parts[i].copy_(values(t, flat.params[i]))
            if name == "v":
                memory.measure()
        masks = {i: tensors["mask"][at] for i, at in mine.items() if at in tensors["mask"]}
        flat.mask = None
        if len(masks) == len(flat.params):
            for i, bits in masks.items():
                flat.set_mask(i, bits != 0)


def translated(engine: Engine, state_dict: Any) -> Any:
    """A state dict of the most copied implementations of SAM and F-SAM as one of ours; any other as it is.

    Those save no state of the base optimizer, and weights that nobody needs; the mean gradient of F-SAM is worth keeping. What
    is lost is said in a warning.
    """
    saved = state_dict.get("state") if isinstance(state_dict, dict) else None
    entries = {k: e for k, e in saved.items() if isinstance(e, dict)} if isinstance(saved, dict) else {}
    if not any("old_p" in entry for entry in entries.values()):
        return state_dict
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    means = {keys.index(key): entry["momentum"] for key, entry in entries.items() if "momentum" in entry}
    ours = {key: {name: t for name, t in entry.items() if name not in _THEIRS} for key, entry in entries.items()}
    state = {key: entry for key, entry in ours.items() if entry}
    rule = RULES.get(type(engine.base))
    if not state and (rule is None or any(map(rule.names, state_dict["param_groups"]))):
        name = type(engine.base).__name__
        warnings.warn(f"this checkpoint of another SAM has no state of {name}, which begins anew", stacklevel=3)
    if means and engine.method.full.lmbda is None:
        means = {}
        warnings.warn(
            f"the mean gradient in this checkpoint is F-SAM's, and {engine.method} keeps none: it is dropped; "
            "methods.FriendlySAM takes it over",
            stacklevel=3,
        )
    return {**state_dict, "state": state, KEY: {"ema": means}}


def check(state_dict: Any, store: Store) -> None:
    """Refuse what is no state dict of these parameters. The state of a base optimizer without a fused rule is its own affair.

    Raises:
        ValueError: with what is wrong.
        TypeError: a tensor is sharded and its parameter is not, or the other way round.
    """
    own_format = saves_itself(store.base)
    if not isinstance(state_dict, dict) or not ({"state", "param_groups"} <= state_dict.keys() or own_format):
        raise ValueError(
            "state_dict must be what opt.state_dict() returns, with 'state' and 'param_groups', got "
            f"{sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__}"
        )
    state_dict, own = apart(state_dict)
    kept = [own.get(name, {}) if KEY not in own else None for name in _TENSORS]
    if not all(isinstance(t, dict) and all(isinstance(v, Tensor) for v in t.values()) for t in kept):
        raise ValueError(
            f"state_dict[{KEY!r}] must be a dict whose {', '.join(map(repr, _TENSORS))} hold tensors by parameter, "
            f"got {own.get(KEY, own)!r}"
        )
    for name in _NUMBERS:
        least = -1 if name == "mask_step" else 0
        if type(own.get(name, 0)) is not int or own.get(name, 0) < least:
            raise ValueError(f"{name!r} in state_dict must be an integer >= {least}, got {own[name]!r}")
    if own.get("seed", 0) >= SEEDS:
        raise ValueError(f"'seed' in state_dict must be < 2**64, got {own['seed']}")
    groups = () if own_format else state_dict["param_groups"]
    for i, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"state_dict has no 'params' in group {i}: it was not made by an optimizer")
        check_rho(group.get("rho", 0.0))
    # torch names parameters by whatever stands in the groups, in order; what methods keep goes by that order.
    keys = [key for group in groups for key in group["params"]]
    params = store.parameters()
    ours: list[tuple[str, Sequence[Any], dict[Any, Any]]] = [
        (name, range(len(params)), {i: {name: t} for i, t in tensors.items()})
        for name, tensors in zip(_TENSORS, kept, strict=True)
        if tensors is not None
    ]
    if type(store.base) in RULES:
        ours.append(("state", keys, state_dict["state"]))
    shaped = {*_TENSORS, *(name for each in RULES.values() for name in each.shaped)}
    for where, names, entries in ours:
        index = {key: i for i, key in enumerate(names)}
        for key, entry in entries.items():
            if isinstance(entry, dict):
                _check_entry(where, key, entry, params, index.get(key, -1), shaped)


def _check_entry(where: str, key: Any, entry: dict[str, Any], params: list[Tensor], i: int, shaped: set[str]) -> None:
    if not 0 <= i < len(params):
        raise ValueError(f"state_dict has {where} of parameter {key}, the optimizer has {len(params)} parameters")
    shape = params[i].shape
    for name, value in entry.items():
        if name not in shaped or not isinstance(value, Tensor):
            continue
        check_alike(value, params[i])
        if value.shape != shape:
            raise ValueError(
                f"state_dict has {name} of shape {tuple(value.shape)} for parameter {key}, whose shape is "
                f"{tuple(shape)}: it was saved for another model"
            )


# -- models --------------------------------------------------------------------------------------------------------------


class _Refusal:
    """A hook of ``module.state_dict()``, which would save perturbed weights. In a copy of the module it does nothing."""

    def __init__(self, engine: Engine):
        self._engine = ref(engine)

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        engine = self._engine()
        if engine is not None:
            engine.check_restored(f"{type(module).__name__}.state_dict()")

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (slice,)  # any function of three arguments: a model's pickle is to need nothing of ours


def watch(engine: Engine, model: nn.Module | None) -> list[RemovableHandle]:
    """Refuse the model's state dicts while the weights are perturbed, and those of what it is a mere wrapper of."""
    handles, refusal = [], _Refusal(engine)
    while model is not None:
        handles.append(model.register_state_dict_pre_hook(refusal))
        children = [child for child in children_of(model) if child is not None]
        model = children[0] if len(children) == 1 and not parameters_of(model) else None
    return handles
