# SPDX-License-Identifier: Apache-2.0
"""The buffers of a model, e.g. BatchNorm's statistics: remembered, and brought back after what must not change them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ._torch import Table, buffers_of, children_of, copy_all, is_lazy, versions_of
from .backends.checks import lost_memory
from .gradients import as_groups, has_layout, is_writable, layout_of, place


def check_model(model: Any) -> None:
    """Refuse what has no buffers.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


@dataclass(slots=True)
class _Snapshot:
    """What the buffers were.

    Attributes:
        places: (the table of a module, a name there, the tensor that was registered).
        tensors: those that hold values to bring back.
        data: their memory, which counts nothing that is written to it as a change of the tensor.
        layout: how they lay in it.
        versions: how often each had been changed.
        rare: (tensor, copy, version) of those without memory that could be written to in this way.
    """

    places: list[tuple[Table, str, Tensor | None]]
    tensors: list[Tensor]
    data: list[Tensor]
    layout: object
    versions: list[int]
    rare: list[tuple[Tensor, Tensor, int]]


class Buffers:
    """Those of ``model``, which may be None: then there is nothing to remember.

    What is written by whoever knows of no switch is brought back too: layers that call ``F.batch_norm`` themselves,
    codebooks, power iterations, observers. The copies stay where they are as long as the buffers keep their shapes, so
    that a CUDA graph finds them.
    """

    def __init__(self, model: nn.Module | None):
        self.model = model
        self._now: _Snapshot | None = None
        # Of the last time, since most buffers stay what and where they are:
        self._tensors: list[Tensor] = []
        self._data: list[Tensor] = []
        self._layout: object = b""
        self._shapes: list[Any] = []  # of the tensors that there are copies for
        self._copies: list[tuple[list[int], list[Tensor]]] = []  # by dtype and device: of which tensors, and the copies

    def freeze(self) -> None:
        """Remember what they are: whatever happens to them from now on is undone by ``rewind``."""
        if self.model is None:
            return
        places: list[tuple[Table, str, Tensor | None]] = []
        stack: list[nn.Module | None] = [self.model]
        while stack:
            module = stack.pop()
            if module is not None:
                stack.extend(children_of(module))
                table = buffers_of(module)
                if table:
                    places += [(table, name, t) for name, t in table.items()]
        # What is trained is a weight, whatever else it is registered as.
        distinct = {id(t): t for _, _, t in places if t is not None and not t.requires_grad}
        rare = []
        if list(distinct) != list(map(id, self._tensors)) or not has_layout(as_groups(self._tensors), self._layout):
            tensors = [t for t in distinct.values() if _is_plain(t)]
            if len(tensors) < len(distinct):
                rare = [(t, t.detach().clone(), versions_of([t])[0]) for t in distinct.values() if _is_rare(t)]
            layout = layout_of(tensors)
            if layout != self._layout:
                self._data = [t.data for t in tensors]
                self._fit()
            self._tensors, self._layout = tensors, layout
        for which, copies in self._copies:
            copy_all(copies, [self._data[i] for i in which])
        self._now = _Snapshot(places, self._tensors, self._data, self._layout, versions_of(self._tensors), rare)

    def rewind(self, *, values: bool = True) -> None:
        """The same tensors are registered as at ``freeze``, with the same values. What was not changed counts as such.

        ``values``: they may have changed, which they do not in what a CUDA graph captures.
        """
        now = self._now
        if now is None:
            return
        for table, name, t in now.places:
            if name not in table or table[name] is not t:  # a layer may assign instead of writing in place
                table[name] = t
        gone: set[int] = set()  # those whose memory somebody has freed meanwhile
        if not has_layout(as_groups(now.tensors), now.layout):
            gone = {i for i, data in enumerate(now.data) if lost_memory(data)}
            for i, (t, data) in enumerate(zip(now.tensors, now.data, strict=True)):
                if i not in gone and place(t) != place(data):
                    t.data = data
        if not values:
            return
        versions = versions_of(now.tensors)
        if versions != now.versions:
            # A graph that needs what is overwritten now raises, instead of using other values.
            increment_version([t for t, v, old in zip(now.tensors, versions, now.versions, strict=True) if v != old])
        for which, copies in self._copies:
            pairs = [(now.data[i], copy) for i, copy in zip(which, copies, strict=True) if i not in gone]
            if pairs:
                copy_all([to for to, _ in pairs], [copy for _, copy in pairs])
        for t, copy, version in now.rare:
            if versions_of([t]) != [version]:
                _write(t, copy)

    def thaw(self, *, values: bool = True) -> None:
        """``rewind``, and from now on changes last."""
        if self._now is None:
            return
        try:
            self.rewind(values=values)
        except Exception:  # it would fail again
            self._now = None
            raise
        self._now = None

    def addresses(self) -> list[int]:
        """Where the copies are."""
        return [copy.data_ptr() for _, copies in self._copies for copy in copies]

    def _fit(self) -> None:
        """Memory for copies of what is remembered."""
        shapes = [(t.device, t.dtype, t.shape) for t in self._data]
        if shapes == self._shapes:
            return
        groups: dict[Any, list[int]] = {}
        for i, (device, dtype, _) in enumerate(shapes):
            groups.setdefault((device, dtype), []).append(i)
        copies = [(which, [_memory_like(self._data[i]) for i in which]) for which in groups.values()]
        self._shapes, self._copies = shapes, copies


# Decorators, not blocks: an interruption at the end of a block would leave its mode on.
@torch.inference_mode(False)
def _memory_like(t: Tensor) -> Tensor:
    """Memory that may be written to in any mode."""
    return torch.empty_like(t)


@torch.no_grad()
def _write(t: Tensor, values: Tensor) -> None:
    t.copy_(values)


#: Several numbers in a byte, which torch cannot copy.
_PACKED = {getattr(torch, f"{kind}{bits}", None) for kind in ("int", "uint") for bits in range(1, 8)}


def _is_plain(t: Tensor) -> bool:
    """Whether it has memory of its own to write to, of which torch does not keep count."""
    return (
        (type(t) is Tensor or type(t) is nn.Parameter)
        and t.layout is torch.strided
        and t.dtype not in _PACKED
        and not (t.is_meta or t.is_quantized or t.is_nested or t.is_inference() or is_lazy(t) or lost_memory(t))
        and is_writable(t)
    )


def _is_rare(t: Tensor) -> bool:
    """Whether it has values that can be changed, and is not plain."""
    if nn.parameter.is_lazy(t) or t.is_meta or t.is_inference() or t.dtype in _PACKED:
        return False
    with_strides = t.layout is torch.strided and not t.is_nested
    return not _is_plain(t) and not (with_strides and (lost_memory(t) or not is_writable(t)))
