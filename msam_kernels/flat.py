# SPDX-License-Identifier: Apache-2.0
"""Flat buffers and the segment table.

A ``Flat`` holds the parameters of one device and dtype. Weights, saved weights, EMA and optimizer state are flat buffers
with the same layout: every parameter starts on 128 bytes, padding is zero. Gradients stay where autograd put them and are
named by segment. ``chunks`` tells the kernels what to work on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef

from . import masks, ops

CHUNK = 16384  # elements of one row of the table; the unit of work and of the deterministic reductions
ALIGNMENT = 128  # bytes
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _alias(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """``buffer[offset:]`` in the shape and memory order of ``like``, with a storage object of its own size.

    Sharing the buffer's storage would make ``torch.save`` of one parameter write the whole buffer, and would make
    safetensors and ``share_memory_`` see tied parameters. DLPack wraps the same memory in a new storage.
    """
    memory = torch.from_dlpack(buffer[offset : offset + like.numel()])
    if _is_dense(like):
        return memory.as_strided(like.size(), like.stride())
    return memory.view(like.size())


def _is_dense(t: Tensor) -> bool:
    """Every element once, no gaps: the memory can be read as one run."""
    if t.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(t.stride(), t.size(), strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _span(p: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(p.size(), p.stride(), strict=True))
    return p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size()


def check_parameters(named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse what no kernel can serve, by name.

    Raises:
        TypeError: a dtype, layout or tensor subclass that the kernels do not know.
        ValueError: two parameters that share memory without being the same object.
    """
    for name, p in named:
        if p.layout != torch.strided or type(p.data) is not Tensor:
            raise TypeError(
                f"{name} must be an ordinary dense tensor, got {type(p.data).__name__} of layout {p.layout}"
            )
        if p.dtype not in DTYPES:
            remedy = "; use torch.view_as_real" if p.is_complex() else ""
            raise TypeError(f"{name} must be one of {[str(d)[6:] for d in DTYPES]}, got {p.dtype}{remedy}")
    spans = sorted((*_span(p), str(p.device), name) for name, p in named if p.numel() and not p.is_meta)
    end, owner, device = -1, "", ""
    for first, last, on, name in sorted(spans, key=lambda s: (s[2], s[0])):
        if on == device and first < end:
            raise ValueError(
                f"{owner} and {name} share memory but are different objects: tie them by using one Parameter for both"
            )
        end, owner, device = last, name, on


Gradients = tuple[list[Tensor], tuple[int, ...]]  # by parameter, and the indices of those that have none


def _matched(*several: Gradients) -> tuple[list[list[Tensor]], tuple[int, ...]]:
    """(the lists, the indices of the parameters without any gradient), with zeros where only others have one."""
    absents = [absent for _, absent in several]
    if all(absent == absents[0] for absent in absents):
        return [grads for grads, _ in several], absents[0]
    nowhere = set(absents[0]).intersection(*absents)
    lists = []
    for grads, absent in several:
        there = list(grads)
        for i in set(absent) - nowhere:
            there[i] = torch.zeros_like(next(other[i] for other, gone in several if i not in gone))
        lists.append(there)
    return lists, tuple(sorted(nowhere))


class Flat:
    """The parameters of one device and dtype, in the order of their groups, with everything kept for them.

    Args:
        params: distinct parameters of one device and dtype.
        groups: for each, the index of its parameter group.
        flatten: re-point every ``p.data``, once, into one flat buffer of weights. Without it, and for parameters in
            shared memory, which must stay where other processes see them, weights are reached by segment.
        backend: the namespace of operators, see ``ops``.
    """

    def __init__(self, params: list[Tensor], groups: list[int], *, flatten: bool, backend: Any):
        self.params, self.groups, self.backend = params, groups, backend
        self.device, self.dtype = params[0].device, params[0].dtype
        step = ALIGNMENT // params[0].element_size()
        self.offsets, size = [], 0
        for p in params:
            self.offsets.append(size)
            size += _round_up(p.numel(), step)
        self.size = size
        self.flatten = flatten and not any(p.is_shared() for p in params if p.device.type == "cpu")
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._captured_tables: dict[tuple[int, ...], Tensor] = {}  # CUDA graphs hold their addresses
        self._absent_grad = torch.empty(0, dtype=self.dtype, device=self.device)
        if self.flatten:
            self._weights = [self.new_buffer()]
            self._move_in(range(len(params)))
        else:
            for p in params:
                self._check_unflattened(p)
        self._remember()
        # Kept from step to step, made when first needed.
        self.saved: Tensor | None = None
        self.ema: Tensor | None = None
        self.v: Tensor | None = None  # LookSAM's
        self.v_parts: list[Tensor] = []
        self.mask: Tensor | None = None  # Sparse SAM's, uint8: bit k of byte j is that of element 8·j + k
        self.state: dict[str, Tensor] = {}  # the base optimizer's, by its names
        self._bound: tuple | None = None
        # Of the step under way.
        self._saved_absent: tuple[int, ...] = ()
        self.perturbed: Tensor | None = None  # the table of what is perturbed now
        self.perturbed_absent: tuple[int, ...] = ()
        self.norm_sq: Tensor | None = None
        self.achieved_sq: Tensor | None = None
        self.kept: list[Gradients] = []  # of the micro-batch's earlier passes, the latest first
        self.acc: list[Tensor] | None = None  # running mean of the descent gradients
        self.acc_absent: tuple[int, ...] = ()

    def _check_unflattened(self, p: Tensor) -> None:
        if not _is_dense(p):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} has strides {p.stride()}, which leave gaps in memory: make it "
                "contiguous, or use flatten=True"
            )

    @torch.no_grad()
    def _move_in(self, which: Iterable[int]) -> None:
        """Parameters into the flat buffer of weights: their values, and their ``.data``."""
        for i in which:
            if self.params[i].numel():
                alias = self.alias(self._weights[0], i)
                alias.copy_(self.params[i])
                self.params[i].data = alias

    def _remember(self) -> None:
        if self.flatten:
            self._places = [StorageWeakRef(p.untyped_storage()) for p in self.params]
        self._pointers = list(map(Tensor.data_ptr, self.params))
        self._strides = [p.stride() for p in self.params]
        self._shapes = [p.shape for p in self.params]
        if not self.flatten:
            self._weights = [p.detach() for p in self.params]

    # -- layout -------------------------------------------------------------------------------------------------------

    def new_buffer(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def alias(self, buffer: Tensor, i: int) -> Tensor:
        return _alias(buffer, self.offsets[i], self.params[i])

    def kept_of(self, buffer: Tensor, i: int) -> Tensor:
        """A parameter's part of what is kept, in the memory order that it had at the last look."""
        like = torch.empty_strided(self._shapes[i], self._strides[i], dtype=self.dtype, device="meta")
        return _alias(buffer, self.offsets[i], like)

    def aliases(self, buffer: Tensor) -> list[Tensor]:
        """Per-parameter tensors over a flat buffer, in the shapes and memory orders of the parameters."""
        return [self.alias(buffer, i) for i in range(len(self.params))]

    def is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def check_not_capturing(self, what: str) -> None:
        """What is new has to be copied from the host, which no CUDA graph can do.

        Raises:
            RuntimeError: while the current stream is being captured.
        """
        if self.is_capturing():
            raise RuntimeError(
                f"{what} changed since the last step, and this one is being captured: run a step like it eagerly before the "
                "capture, as torch's CUDA graphs ask for anyway"
            )

    def chunks(self, absent: tuple[int, ...] = ()) -> Tensor:
        """The segment table without the parameters ``absent``: int64 ``[K, 5]``, see csrc/segments.h."""
        table = self._tables.get(absent)
        if table is None:
            self.check_not_capturing("which parameters get a gradient")
            gone = set(absent)
            rows = [
                (i, begin, self.offsets[i] + begin, min(CHUNK, p.numel() - begin), self.groups[i])
                for i, p in enumerate(self.params)
                if i not in gone
                for begin in range(0, p.numel(), CHUNK)
            ]
            table = (
                torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 5).to(self.device, non_blocking=True)
            )
            if len(self._tables) >= 32:  # gradients that come and go at random must not fill the memory
                self._tables = dict(self._captured_tables)
            self._tables[absent] = table
        if self.is_capturing():
            self._captured_tables[absent] = table
        return table

    # -- per call -----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> list[Tensor]:
        """What the operators take as weights: [the flat buffer], or every parameter's memory."""
        return self._weights

    def take_back(self) -> None:
        """Take back parameters that somebody re-pointed; refuse those that moved away.

        Where somebody else holds the memory of one that left, e.g. the model that it was exchanged with, all parameters move
        to a new flat buffer, and the old one is left to its holders.

        Raises:
            RuntimeError: a parameter is now on another device or of another dtype or size.
        """
        for i, p in enumerate(self.params):
            if p.device != self.device or p.dtype != self.dtype or p.shape != self._shapes[i]:
                raise RuntimeError(
                    f"a parameter is now {p.dtype} on {p.device} with {p.numel()} elements in the shape {tuple(p.shape)}; it "
                    f"was {self.dtype} on {self.device} with {self._shapes[i].numel()} in {tuple(self._shapes[i])} when the "
                    "optimizer was made: move, convert or reshape the model first, then make the optimizer"
                )
        if any(p.is_shared() for p in self.params if p.device.type == "cpu"):
            self.flatten = False  # other processes look where they are now
        moved = [
            i
            for i, p in enumerate(self.params)
            if p.numel() and (p.data_ptr() != self._pointers[i] or p.stride() != self._strides[i])
        ]
        if not self.flatten:
            for i in moved:
                self._check_unflattened(self.params[i])
        elif all(self._places[i].expired() for i in moved):
            self._move_in(moved)
        else:
            self._weights = [self.new_buffer()]
            self._move_in(range(len(self.params)))
        for i in moved:
            if self.params[i].stride() != self._strides[i]:
                self._reorder(i)
        self._remember()
        if moved and self.v is not None:
            self.v_parts = self.aliases(self.v)

    def _reorder(self, i: int) -> None:
        """Bring what is kept for a parameter into its new memory order, e.g. after ``.to(memory_format=...)``."""
        p, offset = self.params[i], self.offsets[i]
        bits = None if self.mask is None else self.mask_of(i)
        for name, buffer in (("saved", self.saved), ("ema", self.ema), ("v", self.v), *self.state.items()):
            if buffer is None or name == "step":
                continue
            values = buffer.as_strided(p.size(), self._strides[i], offset).clone()
            buffer.as_strided(p.size(), p.stride(), offset).copy_(values)
            for view in self._bound[-1] if self._bound else ():
                if view.data_ptr() == buffer[offset:].data_ptr() and view.shape == p.shape:
                    view.as_strided_(p.size(), p.stride())
        self._strides[i] = p.stride()
        if bits is not None:
            self.set_mask(i, bits)

    def collect_grads(self, *, clear: bool) -> Gradients:
        """Every ``p.grad``, dense and in the memory order of its parameter, and the indices that have none.

        With ``clear``, every ``p.grad`` is then None. The parameters count as modified in place, which every caller goes
        on to do: a graph that still needs the old values raises instead of using wrong ones.

        Raises:
            TypeError: a sparse gradient, or one of another dtype than its parameter.
        """
        if ops.collect_grads is not None:
            grads, regular, absent = ops.collect_grads(self.params, self._absent_grad, clear)
        else:
            grads, regular = [p.grad for p in self.params], False
            absent = [i for i, g in enumerate(grads) if g is None]
        if not regular:
            grads = [self._absent_grad if p.grad is None else self._regular(p, p.grad) for p in self.params]
            increment_version(self.params)
            if clear:
                self.set_grads([])
        return grads, tuple(absent)

    @staticmethod
    def _regular(p: Tensor, g: Tensor) -> Tensor:
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

    def set_grads(self, grads: list[Tensor | None]) -> None:
        """``p.grad`` by parameter; None for all where ``grads`` is empty."""
        ops.set_grads(self.params, grads)

    # -- the step under way -------------------------------------------------------------------------------------------

    def save(self, absent: tuple[int, ...], *, again: bool) -> bool:
        """Whether ``perturb`` must save the weights: at the first micro-batch, and when parameters turn up later."""
        if self.saved is None:
            self.saved = torch.empty(self.size, dtype=self.dtype, device=self.device)
        # Between micro-batches the weights are what they were, so saving all of them once more is harmless.
        if again or not set(self._saved_absent) <= set(absent):
            self._saved_absent = absent
            return True
        return False

    def start_ema(self) -> None:
        """None of it has begun."""
        self.check_not_capturing("the method's average")
        self.ema = (self.new_buffer() if self.ema is None else self.ema).fill_(math.nan)

    def start_v(self) -> None:
        """All of it is zero."""
        if self.v is None:
            self.check_not_capturing("the method's direction")
            self.v = self.new_buffer()
            self.v_parts = [self.kept_of(self.v, i) for i in range(len(self.params))]
        else:
            self.v.zero_()

    def _bits(self, i: int) -> Tensor:
        """A parameter's part of the mask, as bools in the order of its memory."""
        n, first = self.params[i].numel(), self.offsets[i] // 8
        return masks.unpack(self.mask[first : first + -(-n // 8)])[:n]

    def mask_of(self, i: int) -> Tensor:
        """A parameter's part of the mask, as bools in its shape and memory order."""
        return self._bits(i).as_strided(self._shapes[i], self._strides[i])

    def set_mask(self, i: int, bits: Tensor) -> None:
        """``bits``: bools in the shape of the parameter."""
        if self.mask is None:
            self.mask = torch.zeros(self.size // 8, dtype=torch.uint8, device=self.device)
        n = self.params[i].numel()
        padded = torch.zeros(_round_up(n, 8), dtype=torch.bool, device=self.device)
        padded[:n].as_strided(self._shapes[i], self._strides[i]).copy_(bits)
        self.mask[self.offsets[i] // 8 :][: len(padded) // 8] = masks.pack(padded)

    def begun(self) -> list[bool]:
        """By parameter: whether its EMA has begun."""
        filled = [i for i, p in enumerate(self.params) if p.numel()]
        first = torch.tensor([self.offsets[i] for i in filled], dtype=torch.int64, device=self.device)
        begun = dict(zip(filled, (~self.ema[first].isnan()).tolist(), strict=True))
        return [begun.get(i, False) for i in range(len(self.params))]

    def start_from(self, grads: Sequence[Tensor | None]) -> None:
        """The mean of the descent gradients begins with gradients that were there before the step."""
        if grads:
            pairs = zip(self.params, grads, strict=True)
            self.acc = [self._absent_grad if g is None else self._regular(p, g) for p, g in pairs]
            self.acc_absent = tuple(i for i, g in enumerate(grads) if g is None)

    def is_uniform(self, absent: tuple[int, ...]) -> bool:
        """Whether what was perturbed, what has a gradient now, and what had one in earlier micro-batches are the same."""
        same_as_perturbed = self.perturbed is None or absent == self.perturbed_absent
        return same_as_perturbed and (self.acc is None or absent == self.acc_absent)

    def matched(self, grads: list[Tensor], absent: tuple[int, ...]) -> tuple[list[list[Tensor]], tuple[int, ...]]:
        """([acc, grads], absent) with zeros where only the other has a gradient."""
        return _matched((self.acc, self.acc_absent), (grads, absent))

    def with_kept(self, grads: list[Tensor], absent: tuple[int, ...]) -> tuple[list[list[Tensor]], tuple[int, ...]]:
        """([grads, those kept of earlier passes …], absent) with zeros where only others have a gradient."""
        return _matched((grads, absent), *self.kept)

    def means(self) -> list[Tensor | None]:
        """The mean descent gradients, None where a parameter got none."""
        if not self.acc_absent:
            return self.acc
        absent = set(self.acc_absent)
        return [None if i in absent else g for i, g in enumerate(self.acc)]

    # -- optimizer state ----------------------------------------------------------------------------------------------

    def bind(self, state: dict, keys: Sequence[tuple[str, ...]], absent: tuple[int, ...]) -> Tensor | None:
        """Make the base optimizer's per-parameter tensors views of flat buffers, and keep them so.

        Tensors that were loaded or made elsewhere are copied in; missing ones begin as zeros.

        Args:
            state: the base optimizer's ``state``, by parameter; entries are replaced.
            keys: per group, the state that its parameters need, e.g. ``("step", "exp_avg", "exp_avg_sq")``.
            absent: parameters that take no part in this step, and get no state.

        Returns:
            uint8 ``[P]``, set where state was missing; None where nothing was.
        """
        if self._bound is not None:
            key, entries, dicts, names, views = self._bound
            # load_state_dict replaces the entries, and anybody may replace them, or the tensors in them, by hand.
            if (
                key == (keys, absent, len(state))
                and all(map(is_, state.values(), entries))
                and all(map(is_, map(dict.get, dicts, names), views))
            ):
                return None
        self.check_not_capturing("the optimizer's state")
        fresh = torch.zeros(len(self.params), dtype=torch.uint8, device="cpu")
        dicts, names, views = [], [], []
        gone = set(absent)
        for i, p in enumerate(self.params):
            if i in gone:
                continue
            entry = state[p] if keys[self.groups[i]] else None
            for name in keys[self.groups[i]]:
                buffer = self._state_buffer(name)
                old = entry.get(name)
                known = (
                    old is not None and old.data_ptr() == buffer.data_ptr() + self._state_offset(name, i) and p.numel()
                )
                # A view in an older memory order shows what is in place already, wrongly: it is only made anew.
                current = known and (name == "step" or old.stride() == p.stride())
                view = old if current else self._state_view(name, buffer, i)
                if old is None:
                    view.zero_()
                    fresh[i] = 1
                elif not known:
                    view.copy_(old)
                entry[name] = view
                dicts.append(entry), names.append(name), views.append(view)
        self._bound = ((keys, absent, len(state)), list(state.values()), dicts, names, views)
        return fresh.to(self.device, non_blocking=True) if fresh.any() else None

    def rebind(self, state: dict, keys: Sequence[tuple[str, ...]]) -> bool:
        """``bind`` for the parameters of the last one; whether all had state."""
        return self._bound is None or self.bind(state, keys, self._bound[0][1]) is None

    def _state_buffer(self, name: str) -> Tensor:
        if name not in self.state:
            self.state[name] = (
                torch.zeros(len(self.params) + 1, dtype=torch.float32, device=self.device)
                if name == "step"
                else self.new_buffer()
            )
        return self.state[name]

    def _state_offset(self, name: str, i: int) -> int:
        return 4 * i if name == "step" else self.offsets[i] * self.params[i].element_size()

    def _state_view(self, name: str, buffer: Tensor, i: int) -> Tensor:
        if name == "step":
            return torch.from_dlpack(buffer[i : i + 1]).view(())
        return self.alias(buffer, i)
