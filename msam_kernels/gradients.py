# SPDX-License-Identifier: Apache-2.0
"""Gradients where autograd left them: collected, set aside, and made safe to write to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _torch
from .backends import extension
from .backends.checks import lost_memory, span
from .sharded import gradient, shard, shown

Groups = list[dict[str, Any]]  # of parameters, as an optimizer has them
Optionals = Sequence[Tensor | None]  # p.grad by parameter; an empty list where all are None
Gradient = TypeVar("Gradient", Tensor, Tensor | None)
#: A list, or the extension's ``Tensors``, which makes Python objects only of those that Python looks at.
Tensors = Sequence[Tensor]
#: By list of parameters their gradients; whether all are regular, see ``made_regular``; how many are absent.
Collected = tuple[list[Tensors], bool, int]


@dataclass(slots=True)
class Vectors:
    """One vector over all parameters: by flat and parameter a tensor in the memory order of its parameter.

    An empty tensor stands for a parameter that is absent; ``absent`` counts those.
    """

    lists: Sequence[Tensors]
    absent: int = 0

    def micro_batch(self, i: int) -> Vectors:
        """That of one micro-batch, where the tensors are stacks ``[m, *shape]``."""
        lists = [[t[i] if t.dim() > 1 or t.numel() else t for t in tensors] for tensors in self.lists]
        return Vectors(lists, self.absent)

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


def _collect_grads(groups: Groups, layout: Any, placeholders: list[Tensor], clear: bool) -> Collected | None:
    """What the extension does faster: ``regular`` is False, so every gradient is looked at by ``made_regular``."""
    served = _served(groups, layout)
    if served is None:
        return None
    lists: list[Tensors] = [
        [none if g is None else g for g in map(gradient, params)]
        for params, none in zip(served, placeholders, strict=True)
    ]
    return lists, False, sum(p.grad is None for params in served for p in params)


def _have_grads(groups: Groups, layout: Any) -> bool | None:
    served = _served(groups, layout)
    return None if served is None else any(p.grad is not None for params in served for p in params)


def _current_grads(params: list[Tensor]) -> Optionals:
    grads = list(map(gradient, params))
    return grads if any(g is not None for g in grads) else []


def _set_grads(params: list[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, g in zip(params, grads or repeat(None), strict=False):
        p.grad = None if g is None else shown(g, p)


def _joined(lists: list[Tensors]) -> Tensors:
    return list(chain.from_iterable(lists))


def _without_own_memory(grads: Sequence[Tensor | None], whole: bool) -> list[int]:
    spans = _spans(grads)
    found = [i for _, _, i, g in spans if whole and _torch.is_shared(g)]
    kept = 0  # where the last one ends that has memory of its own
    for first, end, i, _ in spans:
        if i in found:
            continue
        if first < kept:
            found.append(i)
        else:
            kept = end
    return found


def _spans(grads: Sequence[Tensor | None]) -> list[tuple[int, int, int, Tensor]]:
    """(begin, end, index, gradient) of those that have elements, as they lie in memory."""
    there = [(i, g) for i, g in enumerate(grads) if g is not None and g.layout == torch.strided and g.numel()]
    return sorted((*span(g), i, g) for i, g in there)


def place(t: Tensor) -> object:
    """Where the memory of a tensor is, and how it is laid out."""
    t = shard(t)
    return t.data_ptr(), t.size(), t.stride(), t.dtype


def _memory_layout(groups: Groups, served: list[list[Tensor]]) -> object:
    places = {id(p): (k, i) for k, params in enumerate(served) for i, p in enumerate(params)}
    known = [
        [(id(p), places.get(id(p)), place(p) if id(p) in places else None) for p in group["params"]] for group in groups
    ]
    return list(map(len, served)), known


def _has_layout(groups: Groups, layout: Any) -> bool:
    return _served(groups, layout) is not None


def _served(groups: Groups, layout: Any) -> list[list[Tensor]] | None:
    """The lists of the served, where all is as known."""
    sizes, known = layout
    lists: list[list[Any]] = [[None] * n for n in sizes]
    if len(groups) != len(known):
        return None
    for group, those in zip(groups, known, strict=True):
        params = group["params"]
        if not isinstance(params, (list, tuple)) or len(params) != len(those):
            return None
        for p, (identity, at, where) in zip(params, those, strict=True):
            if id(p) != identity or (is_trained(p) if at is None else place(p) != where):
                return None
            if at is not None:
                lists[at[0]][at[1]] = p
    return lists


def _holds(
    whole: dict[Any, Any] | list[Any],
    entries: list[Any],
    dicts: list[dict[Any, Any]],
    keys: list[Any],
    values: list[Any],
    layout: object,
) -> bool:
    return (
        len(whole) == len(entries)
        and all(map(is_, whole.values() if isinstance(whole, dict) else whole, entries))
        and all(d.get(key) is value for d, key, value in zip(dicts, keys, values, strict=True))
        and (layout is None or _has_layout(as_groups(values), layout))
    )


# Each is a loop over the parameters, which the extension does in C++.
#: (parameter groups, their layout, placeholders, clear) -> the gradients of the served, by list, with a placeholder for None;
#: whether all are regular: only then anything is cleared, and parameters with a gradient count as modified in place; how many
#: are None. None where the parameters are not as their layout says.
collect_grads: Callable[[Groups, object, list[Tensor], bool], Collected | None] = getattr(
    extension, "collect_grads", _collect_grads
)
#: (parameter groups, their layout) -> whether one that is served has a gradient; None where they are not as it says.
have_grads: Callable[[Groups, object], bool | None] = getattr(extension, "have_grads", _have_grads)
#: (params) -> every p.grad or None; an empty list where all are None.
current_grads: Callable[[list[Tensor]], Optionals] = getattr(extension, "current_grads", _current_grads)
#: (params, grads): p.grad by parameter, None for all where grads is empty.
set_grads: Callable[[list[Tensor], Sequence[Tensor | None]], None] = getattr(extension, "set_grads", _set_grads)
#: (lists) -> the tensors of all of them, one list after the other.
joined: Callable[[list[Tensors]], Tensors] = getattr(extension, "joined", _joined)
#: (gradients, whole) -> the indices of those that have no memory of their own, see ``own_memory``.
without_own_memory: Callable[[Sequence[Tensor | None], bool], list[int]] = getattr(
    extension, "without_own_memory", _without_own_memory
)
#: (parameter groups, lists of those that are served) -> their layout, a value that says which they are and where they lie.
memory_layout: Callable[[Groups, list[list[Tensor]]], object] = getattr(extension, "memory_layout", _memory_layout)
#: (parameter groups, such a value) -> whether it is that still, and none of those that were not served is trained now.
has_layout: Callable[[Groups, object], bool] = getattr(extension, "has_layout", _has_layout)
#: (whole, entries, dicts, keys, values, layout) -> whether the values of a dict, or of a list, are these very entries, and each
#: dict has the very value under its key, or has not that key where the value is None. Where the layout is not None, but
#: ``layout_of`` the values, these must also lie so.
holds: Callable[[dict[Any, Any] | list[Any], list[Any], list[dict[Any, Any]], list[Any], list[Any], object], bool] = (
    getattr(extension, "holds", _holds)
)


def as_groups(tensors: list[Tensor]) -> Groups:
    """Mere tensors, as what looks at parameters takes them."""
    return [{"params": tensors}]


def layout_of(tensors: list[Tensor]) -> object:
    return memory_layout(as_groups(tensors), [tensors])


class Loops(NamedTuple):
    """Those that look at parameters and their gradients, see above."""

    collect_grads: Callable[[Groups, object, list[Tensor], bool], Collected | None]
    have_grads: Callable[[Groups, object], bool | None]
    current_grads: Callable[[list[Tensor]], Optionals]
    set_grads: Callable[[list[Tensor], Sequence[Tensor | None]], None]
    memory_layout: Callable[[Groups, list[list[Tensor]]], object]
    has_layout: Callable[[Groups, object], bool]


FAST = Loops(collect_grads, have_grads, current_grads, set_grads, memory_layout, has_layout)
#: They know DTensors: gradients are those of this rank's shards.
OF_SHARDS = Loops(_collect_grads, _have_grads, _current_grads, _set_grads, _memory_layout, _has_layout)


def is_trained(p: Tensor) -> bool:
    """Whether a parameter takes part: one that is frozen does where somebody gave it a gradient, as in torch."""
    return p.requires_grad or p.grad is not None


def made_regular(
    grads: list[Tensors], lists: list[list[Tensor]], placeholders: list[Tensor], loops: Loops, *, clear: bool
) -> list[Tensors]:
    """What ``collect_grads`` found of the parameters in ``lists``, dense and in the memory order of each; the rest of its work.

    Raises:
        TypeError: a sparse gradient, or one of another dtype than its parameter.
        RuntimeError: a gradient whose memory is gone.
    """
    regular: list[Tensors] = [
        [none if g is none else regular_gradient(shard(p), g) for p, g in zip(params, those, strict=True)]
        for params, those, none in zip(lists, grads, placeholders, strict=True)
    ]
    having = [
        p
        for params, those, none in zip(lists, regular, placeholders, strict=True)
        for p, g in zip(params, those, strict=True)
        if g is not none
    ]
    increment_version(having)
    if clear:
        for params in lists:
            loops.set_grads(params, [])
    return regular


def regular_gradient(p: Tensor, g: Tensor) -> Tensor:
    """``g`` as the kernels take it: itself without its graph, or a copy in the memory order and on the device of ``p``.

    A copy is made of what no kernel may write to, too, and of what torch negates or conjugates when it is read.
    """
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
    if lost_memory(g):
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has a gradient whose storage was freed or shrunk: set p.grad to None, or "
            "bring its values back first"
        )
    g = g.detach()
    return g if _is_regular(p, g, g.stride()) else torch.empty_like(p).copy_(g)


def regular_values(p: Tensor, t: Tensor) -> Tensor:
    """A tensor of the base optimizer's state as the kernels take it: itself, or a copy as ``p`` is."""
    t = t.detach()
    regular = t.layout == torch.strided and t.dtype == p.dtype and _is_regular(p, t, t.stride())
    return t if regular else torch.empty_like(p, requires_grad=False).copy_(t)


def _is_regular(p: Tensor, g: Tensor, stride: Sequence[int]) -> bool:
    """``stride``: of ``g``, or of each of several that it holds."""
    same_order = all(a == b for a, b, n in zip(stride, p.stride(), p.size(), strict=True) if n != 1)
    return g.device == p.device and same_order and not _torch.is_lazy(g) and not _is_frozen(g)


def regular_stack(p: Tensor, stack: Tensor) -> Tensor:
    """``regular_gradient`` of several gradients ``[n, *shape]`` that autograd has made for us, one after the other."""
    if stack.layout != torch.strided or stack.dtype != p.dtype:
        regular_gradient(p, stack)  # refuses it
    stack = stack.detach()
    apart, *stride = stack.stride()
    if (apart == p.numel() or len(stack) == 1) and _is_regular(p, stack, stride):
        return stack
    return torch.empty_strided(stack.shape, (p.numel(), *p.stride()), dtype=p.dtype, device=p.device).copy_(stack)


def _is_frozen(g: Tensor) -> bool:
    """Whether it was made in inference mode and torch refuses to write to it now."""
    return g.is_inference() and not torch.is_inference_mode_enabled()


def is_writable(g: Tensor) -> bool:
    """Whether torch can write to every element by itself: none of them is another's memory."""
    end = 1
    for stride, size in sorted(zip(g.stride(), g.size(), strict=True)):
        if size > 1:
            if stride < end:
                return False
            end += (size - 1) * stride
    return not _is_frozen(g)


def apart(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``grads``, but where some have memory in common only those that can be written to, each without any other.

    None stands for the rest.
    """
    out = list(grads)
    if not without_own_memory(out, False):
        return out
    begin = end = 0
    written = torch.zeros(0, dtype=torch.bool, device="cpu")  # each byte from begin to end
    for first, last, i, g in _spans(grads):
        if not is_writable(g):
            out[i] = None
            continue
        if first >= end:
            begin, end, written = first, first, written[:0]
        written = torch.cat([written, written.new_zeros(max(last - end, 0))])
        end = max(end, last)
        size = g.element_size()
        mine = written.as_strided((*g.size(), size), (*(size * n for n in g.stride()), 1), first - begin)
        if mine.any():
            out[i] = None
        else:
            mine.fill_(True)
    return out


def own_memory(grads: Sequence[Gradient], *, whole: bool = True) -> Sequence[Gradient]:
    """``grads``, so that each can be written to by itself.

    Of those that have memory in common, as ``autograd.grad`` returns them for the operands of a sum, also where one operand
    is put together of several, all but one are copied; with ``whole`` also those whose memory another tensor holds, e.g. a
    bucket that DDP is going to overwrite. Nones are ignored.
    """
    copied = without_own_memory(grads, whole)
    if not copied:
        return grads
    out = list(grads)
    for i in copied:
        g = out[i]
        assert g is not None
        out[i] = g.detach().clone()
    return out


def own_memory_of_lists(lists: Sequence[Sequence[Gradient]], *, whole: bool) -> list[Sequence[Gradient]]:
    """``own_memory`` of several lists together."""
    if len(lists) == 1:
        return [own_memory(lists[0], whole=whole)]
    own = own_memory(list(chain.from_iterable(lists)), whole=whole)
    ends = accumulate(map(len, lists))
    return [own[end - len(tensors) : end] for tensors, end in zip(lists, ends, strict=True)]
