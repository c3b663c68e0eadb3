# SPDX-License-Identifier: Apache-2.0
"""Gradients where autograd left them: collected, set aside, and made safe to write to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _torch
from .backends import extension

Optionals = list[Tensor | None]  # p.grad by parameter; an empty list where all are None
Gradient = TypeVar("Gradient", Tensor, Tensor | None)


@dataclass(slots=True)
class Vectors:
    """One vector over all parameters: by flat and parameter a tensor in the memory order of its parameter.

    An empty tensor stands for a parameter that is absent; ``absent`` counts those.
    """

    lists: list[list[Tensor]]
    absent: int = 0

    def present(self, other: Vectors) -> Vectors:
        """Without the parameters that are absent from ``other``."""
        if not other.absent:
            return self
        lists = [
            [o if o.numel() == 0 else s for s, o in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.lists, other.lists, strict=True)
        ]
        return Vectors(lists, other.absent)

    def filled(self, other: Vectors) -> Vectors:
        """The memory of ``other`` where a parameter is absent here."""
        if not self.absent or other is self:
            return self
        lists = [
            [o if s.numel() == 0 else s for s, o in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.lists, other.lists, strict=True)
        ]
        # Parameters without elements are empty in both; whether one is absent then does not matter.
        return Vectors(lists, min(self.absent, other.absent, sum(t.numel() == 0 for ts in lists for t in ts)))


def _collect_grads(params: list[Tensor], placeholder: Tensor, clear: bool) -> tuple[list[Tensor], bool, int]:
    """What the extension does faster: ``regular`` is False, so every gradient is looked at by ``collect``."""
    grads = [placeholder if p.grad is None else p.grad for p in params]
    return grads, False, sum(p.grad is None for p in params)


def _current_grads(params: list[Tensor]) -> Optionals:
    grads = [p.grad for p in params]
    return grads if any(g is not None for g in grads) else []


def _set_grads(params: list[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, g in zip(params, grads or repeat(None), strict=False):
        p.grad = g


def _owns_memory(grads: Sequence[Tensor | None], whole: bool) -> bool:
    there = [g for g in grads if g is not None and g.numel()]
    if whole and any(_torch.is_shared(g) for g in there):
        return False
    return len({g.data_ptr() for g in there}) == len(there)


def _place(p: Tensor) -> object:
    return p.data_ptr(), p.size(), p.stride()


def _memory_layout(groups: list[dict[str, Any]], served: set[Tensor]) -> object:
    return [[(id(p), _place(p) if p in served else None) for p in group["params"]] for group in groups]


def _has_layout(groups: list[dict[str, Any]], layout: Any) -> bool:
    def is_same(p: Tensor, identity: int, place: object) -> bool:
        return id(p) == identity and (not is_trained(p) if place is None else _place(p) == place)

    return len(groups) == len(layout) and all(
        len(group["params"]) == len(known) and all(is_same(p, *k) for p, k in zip(group["params"], known, strict=True))
        for group, known in zip(groups, layout, strict=True)
    )


def _holds(dicts: list[dict[str, Any]], names: list[str], values: list[Any]) -> bool:
    return all(d.get(name) is value for d, name, value in zip(dicts, names, values, strict=True))


# Each is a loop over the parameters, which the extension does in C++.
_collect: Callable[[list[Tensor], Tensor, bool], tuple[list[Tensor], bool, int]] = getattr(
    extension, "collect_grads", _collect_grads
)
#: (params) -> every p.grad or None; an empty list where all are None.
current_grads: Callable[[list[Tensor]], Optionals] = getattr(extension, "current_grads", _current_grads)
#: (params, grads): p.grad by parameter, None for all where grads is empty.
set_grads: Callable[[list[Tensor], Sequence[Tensor | None]], None] = getattr(extension, "set_grads", _set_grads)
#: (gradients, whole) -> whether each has memory of its own, see ``own_memory``.
owns_memory: Callable[[Sequence[Tensor | None], bool], bool] = getattr(extension, "owns_memory", _owns_memory)
#: (parameter groups, those of their parameters that are served) -> a value that says which they are and where they lie.
memory_layout: Callable[[list[dict[str, Any]], set[Tensor]], object] = getattr(
    extension, "memory_layout", _memory_layout
)
#: (parameter groups, such a value) -> whether it is that still, and none of those that were not served is trained now.
has_layout: Callable[[list[dict[str, Any]], object], bool] = getattr(extension, "has_layout", _has_layout)
#: (dicts, keys, values) -> whether each dict has the very value under its key.
holds: Callable[[list[dict[str, Any]], list[str], list[Any]], bool] = getattr(extension, "holds", _holds)


def is_trained(p: Tensor) -> bool:
    """Whether a parameter takes part: one that is frozen does where somebody gave it a gradient, as in torch."""
    return p.requires_grad or p.grad is not None


def collect(params: list[Tensor], placeholder: Tensor, *, clear: bool) -> tuple[list[Tensor], int]:
    """Every ``p.grad``, dense and in the memory order of its parameter, and how many are absent: those are ``placeholder``.

    With ``clear``, every ``p.grad`` is then None. A parameter with a gradient counts as modified in place, which every caller
    goes on to do: a graph that still needs the old values raises instead of using wrong ones.

    Raises:
        TypeError: a sparse gradient, or one of another dtype than its parameter.
    """
    grads, regular, absent = _collect(params, placeholder, clear)
    if not regular:
        grads = [placeholder if p.grad is None else regular_gradient(p, p.grad) for p in params]
        increment_version([p for p in params if p.grad is not None])
        if clear:
            set_grads(params, [])
    return grads, absent


def regular_gradient(p: Tensor, g: Tensor) -> Tensor:
    """``g`` as the kernels take it: itself without its graph, or a copy in the memory order and on the device of ``p``."""
    if g.layout != torch.strided:
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} has a gradient of layout {g.layout}: sharpness-aware steps need "
            "dense gradients, e.g. nn.Embedding(..., sparse=False)"
        )
    if g.dtype != p.dtype:
        raise TypeError(
            f"a {p.dtype} parameter of shape {tuple(p.shape)} has a gradient of {g.dtype}, which the kernels would round: "
            "leave grad_dtype at the parameter's own"
        )
    g = g.detach()
    same_order = all(a == b for a, b, n in zip(g.stride(), p.stride(), p.size(), strict=True) if n != 1)
    if g.device == p.device and same_order:
        return g
    return torch.empty_like(p).copy_(g)


def own_memory(grads: list[Gradient], *, whole: bool = True) -> list[Gradient]:
    """``grads``, so that each can be written to by itself.

    Of those that are the same memory, as ``autograd.grad`` returns them for the operands of a sum, all but the first are
    copied; with ``whole`` also those whose memory another tensor holds, e.g. a bucket that DDP is going to overwrite. Nones
    are ignored.
    """
    if owns_memory(grads, whole):
        return grads
    seen: set[int] = set()
    out = []
    for g in grads:
        if g is not None and g.numel():
            place = g.data_ptr()
            g = g.clone() if place in seen or not owns_memory([g], whole) else g
            seen.add(place)
        out.append(g)
    return out


def own_memory_of_lists(lists: list[list[Gradient]], *, whole: bool) -> list[list[Gradient]]:
    """``own_memory`` of several lists together."""
    if len(lists) == 1:
        return [own_memory(lists[0], whole=whole)]
    own = own_memory(list(chain.from_iterable(lists)), whole=whole)
    ends = accumulate(map(len, lists))
    return [own[end - len(tensors) : end] for tensors, end in zip(lists, ends, strict=True)]
