# SPDX-License-Identifier: Apache-2.0
"""What methods remember, in and out of state dicts. The base optimizer's state is torch's business."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .flat import Flat
from .rules import RULES, check_rho, saves_itself
from .step import Engine
from .store import Store

KEY = "msam"  # where it stands in a state dict
MEMORIES = {"ema": math.nan, "v": 0.0}  # by name, what they begin as
_TENSORS = (*MEMORIES, "mask")  # by parameter, counted over all groups
#: What the most copied implementations keep by parameter: weights, perturbations, F-SAM's mean gradient.
_THEIRS = ("old_p", "e_w", "momentum")
_NUMBERS = ("steps", "mask_step")


def saved(engine: Engine) -> dict[str, Any]:
    """``{"steps": …, "ema": {parameter: tensor}, …}``: of the methods' memories what has begun."""
    kept: dict[str, dict[int, Tensor]] = {name: {} for name in _TENSORS}
    for name in MEMORIES:
        if name == "v" and not engine.store.has_v():  # of some parameters only, it is of no use
            continue
        kept[name] = _begun(engine.store, name)
    for at, flat, i in _places(engine.store):
        if flat.mask is not None:
            kept["mask"][at] = flat.mask_of(i)
    own: dict[str, Any] = {"steps": engine.steps}
    if kept["mask"]:
        own["mask_step"] = engine.mask_step
    return {**own, **{name: tensors for name, tensors in kept.items() if tensors}}


def _places(store: Store) -> list[tuple[int, Flat, int]]:
    """Of every parameter that is in a flat: its number, the flat, its place there."""
    return [(at, *place) for at, place in enumerate(store.places()) if place is not None]


def _begun(store: Store, name: str) -> dict[int, Tensor]:
    """Of every parameter of which that memory holds anything: its number, and a view, which the caller may re-point."""
    views: dict[tuple[int, int], Tensor] = {}
    for flat in store.flats:
        memory = flat.memories.get(name)
        if memory is not None:
            pairs = enumerate(zip(memory.begun(flat), flat.parts(memory.buffer), strict=True))
            views.update({(id(flat), i): part for i, (begun, part) in pairs if begun})
    return {at: views[id(flat), i] for at, flat, i in _places(store) if (id(flat), i) in views}


def take_in(engine: Engine, own: dict[str, Any]) -> None:
    """Parameters of which something was saved are trained, even where they are frozen by now."""
    engine.take_in()
    kept = {at for name in _TENSORS for at in own.get(name, {})}
    pairs = zip(engine.store.parameters(), engine.store.places(), strict=True)
    frozen = [p for at, (p, place) in enumerate(pairs) if place is None and at in kept]
    if frozen:
        engine.adopt(frozen)


def load(engine: Engine, own: dict[str, Any]) -> None:
    """What ``saved`` returned; what it does not hold begins anew."""
    take_in(engine, own)
    engine.steps, engine.mask_step, engine.v_step = own.get("steps", 0), own.get("mask_step", 0), -1
    places = _places(engine.store)
    # Copies first: what is loaded may be a view of what begins anew.
    tensors = {name: {at: t.clone() for at, t in own.get(name, {}).items()} for name in _TENSORS}
    if not all(at in tensors["v"] for at, _, _ in places):
        tensors["v"] = {}
    for flat in engine.store.flats:
        mine = {i: at for at, other, i in places if other is flat}
        for name, begin in MEMORIES.items():
            there = {i: tensors[name][at] for i, at in mine.items() if at in tensors[name]}
            if not there:
                flat.memories.pop(name, None)
                continue
            memory = flat.memory(name, begin)
            memory.buffer.fill_(begin)
            for i, values in there.items():
                memory.parts[i].copy_(values)
            if name == "v":
                flat.measure(memory)
        masks = {i: tensors["mask"][at] for i, at in mine.items() if at in tensors["mask"]}
        flat.mask = None
        if len(masks) == len(flat.params):
            for i, bits in masks.items():
                flat.set_mask(i, bits)


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
    """
    own_format = saves_itself(store.base)
    if not isinstance(state_dict, dict) or not ({"state", "param_groups"} <= state_dict.keys() or own_format):
        raise ValueError(
            "state_dict must be what opt.state_dict() returns, with 'state' and 'param_groups', got "
            f"{sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__}"
        )
    own = state_dict.get(KEY, {})
    kept = [own.get(name, {}) if isinstance(own, dict) else None for name in _TENSORS]
    if not all(isinstance(t, dict) and all(isinstance(v, Tensor) for v in t.values()) for t in kept):
        raise ValueError(
            f"state_dict[{KEY!r}] must be a dict whose {', '.join(map(repr, _TENSORS))} hold tensors by parameter, "
            f"got {own!r}"
        )
    for name in _NUMBERS:
        if type(own.get(name, 0)) is not int or own.get(name, 0) < 0:
            raise ValueError(f"state_dict[{KEY!r}][{name!r}] must be an integer >= 0, got {own[name]!r}")
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
        if name in shaped and isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(
                f"state_dict has {name} of shape {tuple(value.shape)} for parameter {key}, whose shape is "
                f"{tuple(shape)}: it was saved for another model"
            )
