# SPDX-License-Identifier: Apache-2.0
"""Flat buffers and the table of segments.

A ``Flat`` holds the parameters of one device and dtype. Weights, saved weights, what methods remember and optimizer state are
flat buffers with the same layout: every parameter starts on 128 bytes, padding is zero. Gradients stay where autograd put
them and are named by segment. ``table`` tells the kernels what to work on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils.dlpack import from_dlpack

from ._torch import is_of_fsdp
from .backends import Backend, reference
from .backends.checks import lost_memory, span
from .gradients import as_groups, has_layout, holds, layout_of, regular_values
from .precision import dtype_kept, is_short
from .sharded import first_draw, shard, shards, shown, spread, values

# Of one row of the table, the unit of work and of the deterministic reductions: elements on a CPU, bytes on a GPU, where a row
# is a block of threads (csrc/cuda/kernels.cuh). The rows themselves, of 40 bytes, are 0.25 % of what one pass over them moves.
CHUNK = 16384
GPU_CHUNK_BYTES = 16384
FEW_TERMS = 1024  # of a sum, at most, that every block of a GPU's kernel adds up by itself
ALIGNMENT = 128  # bytes
SUMS = reference.ACHIEVED  # of a perturbation of 16-bit weights, see there
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def row_length(device: torch.device, dtype: torch.dtype) -> int:
    """Elements of a row of the table, at most."""
    return CHUNK if device.type == "cpu" else GPU_CHUNK_BYTES // dtype.itemsize


def _alias(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """``buffer[offset:]`` in the shape and memory order of ``like``, with a storage object of its own size.

    Sharing the buffer's storage would make ``torch.save`` of one parameter write the whole buffer, and would make
    safetensors and ``share_memory_`` see tied parameters. DLPack wraps the same memory in a new storage.
    """
    memory = from_dlpack(buffer[offset : offset + like.numel()])
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


def _is_shared(p: Tensor) -> bool:
    """Whether other processes see its memory."""
    return p.device.type == "cpu" and p.is_shared()


def _stays(p: Tensor) -> bool:
    """Whether others rely on where a parameter lies: other processes, or whoever gave it a place among other things.

    cuDNN's RNNs read all their weights from one storage, at places of its choice, and compact them at every call if one has
    left; a flat vector that somebody made, as FSDP or ``vector_to_parameters`` do, is to go on showing its parameters.
    """
    return _is_shared(p) or (_is_dense(p) and 0 < p.nbytes < p.untyped_storage().nbytes())


def _is_plain(p: Tensor) -> bool:
    return p.layout == torch.strided and type(p.data) is Tensor


def is_servable(p: Tensor) -> bool:
    """Whether a parameter is of a kind that kernels know."""
    return _is_plain(p) and p.dtype in DTYPES and not p.is_meta


def check_parameters(named: Sequence[tuple[str, Tensor]], left: Sequence[tuple[str, Tensor]] = ()) -> None:
    """Refuse what no kernel can serve, by name.

    ``left``: parameters that stay where they are when those of ``named`` move to a flat buffer. They may be anything, also
    views of each other.

    Raises:
        TypeError: a dtype, layout or tensor subclass that the kernels do not know.
        ValueError: two parameters that share memory without being the same object, or one whose memory is gone or still to
            come.
    """
    for name, p in named:
        if is_of_fsdp(p):
            raise TypeError(
                f"{name} belongs to FullyShardedDataParallel (FSDP1): each rank holds a part of it, and would perturb by a "
                "norm of its own. Use DistributedDataParallel, or ZeroRedundancyOptimizer as the base optimizer for less memory"
            )
        if is_lazy(p):
            raise ValueError(
                f"{name} has neither shape nor values yet, as in nn.LazyLinear: run a forward pass, then make the optimizer"
            )
        if not _is_plain(p):
            raise TypeError(
                f"{name} must be an ordinary dense tensor, got {type(p.data).__name__} of layout {p.layout}"
            )
        if p.dtype not in DTYPES:
            remedy = "; use torch.view_as_real" if p.is_complex() else ""
            raise TypeError(f"{name} must be one of {[str(d)[6:] for d in DTYPES]}, got {p.dtype}{remedy}")
        if lost_memory(p):
            raise ValueError(
                f"the storage of {name} was freed or shrunk: bring its values back first, as FSDP does in summon_full_params"
            )
    spans = [
        (str(p.device), *span(p), name, moves)
        for members, moves in ((named, True), (left, False))
        for name, p in members
        if _is_plain(p) and p.numel() and not p.is_meta
    ]
    reached: dict[tuple[str, bool], tuple[int, str]] = {}  # by device and kind: how far, and by whom
    for device, first, last, name, moves in sorted(spans, key=lambda s: s[:2]):
        for others in (True, False) if moves else (True,):
            end, owner = reached.get((device, others), (-1, ""))
            if first < end:
                frozen = (
                    "" if moves and others else ", one of them with requires_grad=False, which would be left behind"
                )
                raise ValueError(
                    f"{owner} and {name} share memory but are different objects{frozen}: tie them by using one Parameter "
                    f"for both{', or use flatten=False' if frozen else ''}"
                )
        reached[device, moves] = max(reached.get((device, moves), (-1, "")), (last, name))


def has_begun(memory: Tensor) -> bool:
    """Whether a parameter's part of a memory holds anything. An empty shard says yes, as those of other ranks may."""
    memory = shard(memory)
    return memory.numel() == 0 or not bool(memory[(0,) * memory.dim()].isnan())


class Memory:
    """A vector that a method remembers from step to step, as a flat buffer.

    Attributes:
        buffer: flat, at one address as long as its flat's layout stays: captured graphs read it there.
        parts: the same by parameter.
        terms: float64 ``[K]``, the terms of its squared norm, where a kernel has written them.
        square: the same, or their sum if they are many.
        started: whether it has been added to, if it is one that is.
    """

    def __init__(self, flat: Flat, begin: float):
        self.flat, self.begin, self.started = flat, begin, not math.isnan(begin)
        self.hold(flat.new_buffer().fill_(begin) if begin else flat.new_buffer())

    @torch.inference_mode(False)  # what is made in that mode could not be written to outside of it
    def hold(self, buffer: Tensor) -> None:
        """``buffer`` from now on, of the flat's layout."""
        flat = self.flat
        self.buffer, self.parts = buffer, flat.parts(buffer)
        self.terms = torch.zeros(flat.rows, dtype=torch.float64, device=flat.device)
        self.square = self.terms
        if flat.rows > FEW_TERMS:
            self.square = self.terms.new_zeros(1)
            self._one = self.terms.new_ones(1)
            self._row = flat.table.new_tensor([[0, 0, 0, 1, 0]])

    @property
    def fill(self) -> float:
        """What it holds where nothing was added."""
        return 0.0 if self.started else self.begin

    def now(self) -> Held:
        flat = self.flat
        return Held(
            self.buffer.clone(), [self.terms.clone(), self.square.clone()], self.started, flat.offsets, flat.waiting
        )

    def as_now(self, held: Held) -> Tensor:
        """A buffer of before in today's layout: of parameters that have ceased to wait nothing had begun."""
        if held.offsets is self.flat.offsets:
            return held.buffer
        fill = 0.0 if held.started else self.begin
        return self.flat.moved(held.buffer, held.offsets, held.waiting, fill)

    def put_back(self, held: Held) -> None:
        buffer = self.as_now(held)
        self.buffer.copy_(buffer)
        self.started = held.started
        if buffer is not held.buffer:
            return self.measure()
        for t, before in zip((self.terms, self.square), held.sums, strict=True):
            t.copy_(before)

    def measure(self) -> None:
        """The terms of its squared norm, by the kernel and in the order that they have when it is written."""
        flat, one = self.flat, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        flat.backend.descend([], self.parts, self.parts, flat.table, coefs=one, sums=[], out_sq=self.terms)
        self.add_up()

    def add_up(self) -> None:
        """``square`` from ``terms``, in the order in which kernels add: 1.0 times the first of these sums."""
        if self.square is not self.terms:
            first = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
            sums = [self.terms, self._one]
            self.flat.backend.descend([], [self.square], [self._one], self._row, coefs=first, sums=sums)

    def start(self) -> None:
        """From now on sums are added to it: numbers, where it began as NaN."""
        if not self.started:
            self.buffer.zero_()
            self.started = True


@dataclass(frozen=True)
class Held:
    """What a memory held at some time."""

    buffer: Tensor
    sums: list[Tensor]
    started: bool
    offsets: list[int]
    waiting: Set[int]


class Flat:
    """The parameters of one device and dtype, in the order of their groups, with everything kept for them.

    Args:
        params: distinct parameters of one device and dtype, and DTensors of one mesh and number of shards.
        groups: for each, the index of its parameter group.
        flatten: re-point every ``p.data`` into one flat buffer of weights, and into another one where ``wait_for`` moves them.
            Without it, and where others rely on the place of any of them, see ``_stays``, all stay where they are and are
            reached by segment.
        backend: the namespace of operators, see ``backends``.
        masters: see ``MicroBatchSAM``.

    Attributes:
        shards: what this rank holds of the parameters, and kernels work on: of DTensors their shards, which stay where they
            are; else ``params`` itself.
        spread: how the parameters lie over ranks, see there.
        table: int64 ``[K, 5]``, see csrc/segments.h.
        weights: what the operators take as weights: [the flat buffer], or every parameter's memory.
        order: the numbers of the parameters as they lie in flat buffers.
        offsets: where each begins there.
        offsets_of_all: where they would if none waited, as in messages: ranks need not wait alike.
        waiting: those of parameters that never had a gradient, the last ones in that order: rows and buffers, but for those
            of weights and masks, end before them. See ``wait_for``.
        settled: whether it has been looked who is waiting.
        size: elements of all parameters in a flat buffer, with padding.
        kept: elements of the buffers of what is kept for them.
        sums: the shape of the sums of a perturbation, see ``achieved_sq`` in ``backends``.
        noise: where random rounding comes from, see ``backends``; None until a step rounds so.
        status: uint8 ``[K]``, what the kernels know about each row's weights, see ``backends``.
        arrived: int32 ``[1]``, where the blocks of a kernel are counted, see ``backends``; None where the environment asks for
            two launches.
        dtype_kept: of ``saved`` and ``state``.
        has_masters: whether that is another one than the weights'.
        saved: the weights of before the step, or their masters, a flat buffer; None until a step perturbs, or updates those.
        memories: what methods remember, by name.
        mask: Sparse SAM's, uint8: bit k of byte j is that of element 8·j + k.
        state: the base optimizer's, by its names.
        views: parts of ``state``, by parameter and name: what ``bind`` left in the base optimizer's.
        absent: stands in a list for a parameter that is absent from it.
        empty: the parameters without elements.
        shown: the mask by parameter, as bools, and of which mask and which version of it they are.
    """

    def __init__(
        self, params: list[Tensor], groups: list[int], *, flatten: bool, backend: Backend, masters: bool = False
    ):
        self.params, self.groups, self.backend = params, groups, backend
        self.shards, self.spread = shards(params), spread(params[0])
        flatten = flatten and self.spread is None
        self.device, self.dtype = params[0].device, params[0].dtype
        self.dtype_kept = dtype_kept(self.dtype, masters)
        self.has_masters = self.dtype_kept != self.dtype
        # Torch makes a string of a device's type, which takes longer than the question.
        self._is_cuda = params[0].is_cuda
        # Of shards some have no elements on some ranks.
        self.empty = [i for i, p in enumerate(self.shards) if not p.numel()]
        self._index_of_empty = torch.tensor(self.empty, dtype=torch.int64, device=self.device)
        self._shapes = [p.shape for p in self.shards]
        self.settled = False
        self._lay_out(list(range(len(params))), len(params))
        self.offsets_of_all = self.offsets
        self.status = torch.zeros(self.rows, dtype=torch.uint8, device=self.device)
        two = os.environ.get("MSAM_KERNELS_TWO_LAUNCHES", "0") != "0"
        self.arrived = None if two else torch.zeros(1, dtype=torch.int32, device=self.device)
        self.absent = torch.empty(0, dtype=self.dtype, device=self.device)
        self._may_move = flatten
        self.flatten = flatten and not any(map(_stays, self.shards))
        self.weights: list[Tensor] = []
        if self.flatten:
            self._move_all_in()
        else:
            self._close_gaps(range(len(params)))
            self._remember()
        self.noise: Tensor | None = None
        self._head: tuple[int, int] | None = None  # as it stands there
        self.saved: Tensor | None = None
        self.memories: dict[str, Memory] = {}
        self.mask: Tensor | None = None
        self.shown: tuple[Tensor | None, int, list[Tensor]] | None = None
        self._stack: Tensor | None = None
        self.state: dict[str, Tensor] = {}
        self.views: dict[tuple[int, str], Tensor] = {}
        self._bound: _Bound | None = None
        self.achieved: list[Tensor] = []  # of the latest step, by micro-batch: ‖e‖² by row

    @torch.no_grad()
    def _close_gaps(self, which: Iterable[int]) -> None:
        """Of parameters that stay where they are: kernels read memory without gaps.

        Raises:
            ValueError: one with gaps may not move. None has then.
        """
        gaps = [p for p in (self.shards[i] for i in which) if not _is_dense(p)]
        for p in gaps:
            if not self._may_move or _is_shared(p):
                remedy = "" if self._may_move else ", or use flatten=True"
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has strides {p.stride()}, which leave gaps in memory: make it "
                    f"contiguous{remedy}"
                )
        for p in gaps:
            p.data = p.detach().clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def _move_in(self, which: Iterable[int], buffer: Tensor) -> None:
        """Parameters into a flat buffer of weights: their values, and their ``.data``."""
        for i in which:
            if self.params[i].numel():
                alias = self.alias(buffer, i)
                alias.copy_(self.params[i])
                self.params[i].data = alias

    def _move_all_in(self) -> None:
        """All of them into a new one."""
        buffer = self.new_buffer(size=self.size)
        self._move_in(range(len(self.params)), buffer)
        self.weights = [buffer]
        self._remember()

    def _remember(self) -> None:
        """How the parameters lie in memory now."""
        if self.flatten:
            self._places = [StorageWeakRef(p.untyped_storage()) for p in self.params]
        else:
            self.weights = [p.detach() for p in self.shards]
        self._pointers = list(map(Tensor.data_ptr, self.shards))
        self._strides = [p.stride() for p in self.shards]

    # -- layout -------------------------------------------------------------------------------------------------------

    def _lay_out(self, order: list[int], trained: int) -> None:
        """Parameters lie in that order; of the first ``trained`` of them alone anything is kept."""
        self.order, self.waiting = order, frozenset(order[trained:])
        self.offsets, self.size, self.kept = [0] * len(order), 0, 0
        for i in order:
            self.offsets[i] = self.size
            self.size += self.rounded(self._shapes[i].numel(), self.dtype)
            if i not in self.waiting:
                self.kept = self.size
        length = row_length(self.device, self.dtype)
        rows = [
            (i, begin, self.offsets[i] + begin, min(length, self._shapes[i].numel() - begin), self.groups[i])
            for i in order[:trained]
            for begin in range(0, self._shapes[i].numel(), length)
        ]
        self.rows = len(rows)
        self._runs = [(g, len(list(run))) for g, run in groupby(rows, key=itemgetter(4))]
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 5)
        self.table = table.to(self.device, non_blocking=True)
        self.sums = (SUMS, self.rows) if is_short(self.dtype) else (self.rows,)
        # By the micro-batches that run at once: their places in ``achieved``, its rows, and all of them as one.
        self._achieved_of: dict[int | range, tuple[slice, list[Tensor], Tensor]] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def wait_for(self, waiting: Set[int]) -> None:
        """From now on these parameters wait for their first gradient: they lie behind the others, and nothing is kept for them.

        What is kept for the others follows. Those that have waited until now are the last of the others, which stay where they
        were in the buffers.
        """
        self.check_not_capturing("which parameters have gradients")
        before = [(each, dict(vars(each))) for each in (self, *self.memories.values())]
        was, order = self.order, sorted(self.order, key=lambda i: i in waiting)
        old, waited, status, rows = self.offsets, self.waiting, self.status, self.table[:, 0]
        try:
            self._lay_out(order, len(order) - len(waiting))
            stay = torch.tensor([i not in waiting | waited for i in range(len(order))], device=self.device)
            self.status = status.new_zeros(self.rows)
            self.status[stay[self.table[:, 0]]] = status[stay[rows]]  # their rows follow each other as they did
            if self.saved is not None:
                self.saved = self.moved(self.saved, old, waited)
            for memory in self.memories.values():
                memory.hold(self.moved(memory.buffer, old, waited, memory.fill))
                if memory.started:
                    memory.measure()
            if self.mask is not None:
                self.mask = self._moved_mask(self.mask, old, self.offsets)
            self.state = {
                name: buffer if name == "step" else self.moved(buffer, old, waited)
                for name, buffer in self.state.items()
            }
            self._stack, bound, self._bound = None, self._bound, None
            if self.flatten and order != was:
                self._move_all_in()
        except BaseException:  # where parameters have moved already, they are taken back
            for each, attributes in before:
                vars(each).update(attributes)
            raise
        if bound is not None:  # what it has left in the base optimizer's state
            places = {id(view): place for place, view in self.views.items()}
            for entry, name, view in zip(bound.dicts, bound.names, bound.views, strict=True):
                i, _ = place = places.get(id(view), (-1, ""))
                if name != "step" and entry.get(name) is view and i >= 0 and i not in waiting:
                    entry[name] = self.views[place] = shown(self.alias(self.state[name], i), self.params[i])

    def moved(self, buffer: Tensor, offsets: list[int], waiting: Set[int], fill: float = 0.0) -> Tensor:
        """What a buffer of another layout holds, in one of today's; ``fill`` where it holds nothing."""
        new = self.new_buffer(buffer.dtype)
        if fill:
            new.fill_(fill)
        for i in set(self.order) - self.waiting - waiting:
            n = self._shapes[i].numel()
            new[self.offsets[i] :][:n].copy_(buffer[offsets[i] :][:n])
        return new

    @torch.inference_mode(False)
    def new_buffer(self, dtype: torch.dtype | None = None, size: int | None = None) -> Tensor:
        """Zeros, for what is kept."""
        return torch.zeros(self.kept if size is None else size, dtype=dtype or self.dtype, device=self.device)

    def alias(self, buffer: Tensor, i: int) -> Tensor:
        """A parameter's part of a flat buffer, in its shape and memory order."""
        return _alias(buffer, self.offsets[i], self.shards[i])

    def part(self, buffer: Tensor, i: int) -> Tensor:
        """Of what is kept the same, in the memory order that the parameter had at the last look; ``absent`` if it waits."""
        if i in self.waiting:
            return self.absent
        like = torch.empty_strided(self._shapes[i], self._strides[i], dtype=self.dtype, device="meta")
        return _alias(buffer, self.offsets[i], like)

    def parts(self, buffer: Tensor) -> list[Tensor]:
        return [self.part(buffer, i) for i in range(len(self.params))]

    def slices(self, buffer: Tensor) -> list[Tensor]:
        """The same of a message to other ranks, in one storage: they are made in a tenth of the time."""
        places = zip(self._shapes, self._strides, self.offsets_of_all, strict=True)
        return [buffer.as_strided(shape, strides, buffer.storage_offset() + begin) for shape, strides, begin in places]

    @staticmethod
    def rounded(n: int, dtype: torch.dtype) -> int:
        """So many elements, up to where the next parameter would begin."""
        return _round_up(n, ALIGNMENT // dtype.itemsize)

    @property
    def rows_of_groups(self) -> list[tuple[int, Tensor]]:
        """The rows of the table by group."""
        parts = self.table.split([n for _, n in self._runs]) if self._runs else ()
        return [(g, rows) for (g, _), rows in zip(self._runs, parts, strict=True)]

    def achieved_sq(self, which: int | range) -> Tensor:
        """Where a micro-batch's ‖e‖² goes, by row, float64 of shape ``sums``; of several that run at once one for each.

        The same micro-batches have the same memory in every step, and it stays: graphs write there.
        """
        known = self._achieved_of.get(which)
        if known is None:
            n, first = (1, which) if isinstance(which, int) else (len(which), which.start)
            there = torch.zeros(n, *self.sums, dtype=torch.float64, device=self.device)
            rows = list(there.unbind())
            known = slice(first, first + n), rows, rows[0] if isinstance(which, int) else there
            self._achieved_of[which] = known
        place, rows, whole = known
        self.achieved[place] = rows
        return whole

    def is_capturing(self) -> bool:
        return self._is_cuda and torch.cuda.is_current_stream_capturing()

    def check_not_capturing(self, what: str) -> None:
        """What is new has to be made or copied from the host, which no CUDA graph can do.

        Raises:
            RuntimeError: while the current stream is being captured.
        """
        if self.is_capturing():
            raise RuntimeError(
                f"{what} changed since the last step, and this one is being captured: run a step like it eagerly before the "
                "capture, as torch's CUDA graphs ask for anyway"
            )

    def refresh_noise(self, seed: int, step: int, number: Mapping[int, int]) -> None:
        """``noise`` of that step. It stays where it is: captured graphs read it there.

        Args:
            number: of the parameters among all of the optimizer, by identity; needed where there is no ``noise`` yet.
        """
        head = (seed - 2**64 if seed >= 2**63 else seed, step)
        if self._head == head:
            return
        if self.noise is None:
            self.check_not_capturing("the random numbers of rounding")
            rows = torch.tensor(
                [head, *((number[id(p)], first_draw(p)) for p in self.params)], dtype=torch.int64, device="cpu"
            )
            self.noise = rows.to(self.device, non_blocking=True)
        elif not self.is_capturing():  # what is captured reads what is there when it runs
            self.noise[0].copy_(torch.tensor(head, dtype=torch.int64, device="cpu"), non_blocking=True)
        else:
            return
        self._head = head

    def save_buffer(self) -> Tensor:
        """``saved``, made when first needed."""
        if self.saved is None:
            self.check_not_capturing("the buffer of saved weights")
            self.saved = self.new_buffer(self.dtype_kept)
        return self.saved

    def set_master(self, i: int, master: Tensor | None) -> None:
        """A parameter's master; None: the weights are, as zeros stand for none."""
        if i in self.waiting:
            return
        if master is not None:
            self.alias(self.save_buffer(), i).copy_(master)
        elif self.saved is not None:
            self.alias(self.saved, i).zero_()

    @property
    def copies(self) -> list[Tensor]:
        """What parallel passes keep."""
        return [] if self._stack is None else [self._stack]

    def stack(self, n: int) -> Tensor:
        """``[n, kept]`` for copies of the weights; the same memory as long as that is enough."""
        if self._stack is None or len(self._stack) < n:
            self.check_not_capturing("the number of micro-batches that run at once")
            self._stack = self.weights[0].new_zeros(n, self.kept)
        return self._stack[:n]

    def stacked(self, stack: Tensor | None, n: int) -> list[Tensor]:
        """Every parameter ``[n, *shape]``: its parts of the stack, or n times itself where it has none there."""
        return [
            p.detach().expand(n, *p.shape)
            if stack is None or i in self.waiting
            else stack.as_strided((n, *p.shape), (self.kept, *self._strides[i]), self.offsets[i])
            for i, p in enumerate(self.params)
        ]

    # -- parameters that somebody moved -----------------------------------------------------------------------------------

    def is_at_home(self, p: Tensor) -> bool:
        """Whether a parameter of these still is on their device and of their dtype."""
        return p.device == self.device and p.dtype == self.dtype

    def check_shapes(self, params: Container[Tensor]) -> None:
        """Refuse those of its parameters among ``params`` that have another shape than they had.

        Raises:
            RuntimeError: with both shapes, and the remedy.
        """
        for p, part, shape in zip(self.params, shards(self.params), self._shapes, strict=True):
            if part.shape != shape and p in params:
                raise RuntimeError(
                    f"a parameter is now of shape {tuple(part.shape)}, with {part.numel()} elements; it was {tuple(shape)}, "
                    f"with {shape.numel()}, when the optimizer was made: reshape the model first, then make the optimizer"
                )

    def take_over(self, homes: dict[Tensor, tuple[Flat, int]]) -> None:
        """What the flats where parameters were until now keep for them, on this device and in this dtype.

        What began as zeros and is not there for all of them, as LookSAM's direction, begins anew; so does a mask.
        """
        old = [homes.get(p) for p in self.params]
        for name in dict.fromkeys(name for home in old if home for name in home[0].memories):
            there = {i: home for i, home in enumerate(old) if home and name in home[0].memories}
            first = next(iter(there.values()))[0].memories[name]
            if len(there) < len(old) and first.started:
                continue
            memory = self.memory(name, first.begin)
            if first.started:
                memory.start()
            for i, (flat, at) in there.items():
                if at not in flat.waiting:
                    memory.parts[i].copy_(flat.memories[name].parts[at])
            if name == "v":
                memory.measure()
        for i, home in enumerate(old):
            keeps = home and home[0].has_masters and home[1] not in home[0].waiting
            if self.has_masters and home and keeps and home[0].saved is not None:
                self.set_master(i, home[0].part(home[0].saved, home[1]))
        if all(home and home[0].mask is not None for home in old):
            for i, home in enumerate(old):
                if home:
                    self.set_mask(i, home[0].mask_of(home[1]))

    @torch.inference_mode(False)
    @torch.no_grad()
    def take_back(self) -> None:
        """Take back parameters that somebody re-pointed.

        Where somebody else holds the memory of one that left, e.g. the model that it was exchanged with, all parameters move
        to a new flat buffer, and the old one is left to its holders.

        Raises:
            RuntimeError: a parameter is now of another shape, on another device or of another dtype.
        """
        self.shards = shards(self.params)
        self.check_shapes(self.params)
        for p in self.params:
            if not self.is_at_home(p):
                raise RuntimeError(
                    f"a parameter is now {p.dtype} on {p.device}; it was {self.dtype} on {self.device} when the step began, "
                    "and has to be so again for its weights to come back: bring it back first, then call opt.restore()"
                )
        if any(map(_stays, self.shards)):
            self.flatten = False  # others look where they are now
        moved = [
            i
            for i, p in enumerate(self.shards)
            if p.numel() and (p.data_ptr() != self._pointers[i] or p.stride() != self._strides[i])
        ]
        if not self.flatten:
            self._close_gaps(moved)
        elif all(self._places[i].expired() for i in moved):
            self._move_in(moved, self.weights[0])
        else:
            self._move_all_in()
        for i in moved:
            if self.shards[i].stride() != self._strides[i]:
                self._reorder(i)
        self._remember()

    def _reorder(self, i: int) -> None:
        """Bring what is kept for a parameter into its new memory order, e.g. after ``.to(memory_format=...)``."""
        p, offset = self.shards[i], self.offsets[i]
        bits = None if self.mask is None else self.mask_of(i)
        states = {name: buffer for name, buffer in self.state.items() if name != "step"}
        for buffer in (self.saved, *(memory.buffer for memory in self.memories.values()), *states.values()):
            if buffer is not None and i not in self.waiting:
                values = buffer.as_strided(p.size(), self._strides[i], offset).clone()
                buffer.as_strided(p.size(), p.stride(), offset).copy_(values)
        self._strides[i] = p.stride()
        for memory in self.memories.values():
            memory.parts[i] = self.part(memory.buffer, i)
        for name, buffer in states.items():  # also where the parameter took no part in the latest step
            view = self.views.get((i, name))
            view = None if view is None else shard(view)
            if view is not None and view.data_ptr() == buffer[offset:].data_ptr() and view.shape == p.shape:
                view.as_strided_(p.size(), p.stride())
        if bits is not None:
            self.set_mask(i, bits)

    @property
    def remembered(self) -> dict[str, Tensor]:
        """By name, the buffers that are part of the optimizer's state: memories and masters."""
        buffers = {name: memory.buffer for name, memory in self.memories.items()}
        return buffers if self.saved is None or not self.has_masters else {**buffers, "master": self.saved}

    def remembered_of(self, i: int, name: str) -> Tensor | None:
        """A parameter's part of one of them: of what waits one number in its shape; None where there is no such buffer."""
        buffer, memory = self.remembered.get(name), self.memories.get(name)
        if buffer is None:
            return None
        if i not in self.waiting:
            return self.part(buffer, i)
        return buffer.new_full((), memory.fill if memory else 0.0).expand(self._shapes[i])

    def remembers(self, i: int) -> bool:
        """Whether there is anything of a parameter in them."""
        began_as_nan = {name for name, memory in self.memories.items() if not memory.started}
        parts = {name: self.part(buffer, i) for name, buffer in self.remembered.items()}
        return any(bool((~part.isnan() if name in began_as_nan else part).any()) for name, part in parts.items())

    # -- what methods keep --------------------------------------------------------------------------------------------

    def memory(self, name: str, begin: float) -> Memory:
        """The memory of that name, made when first needed, filled with ``begin``."""
        memory = self.memories.get(name)
        if memory is None:
            self.check_not_capturing(f"the method's {name}")
            memory = self.memories[name] = Memory(self, begin)
        return memory

    @property
    def mask_of_all(self) -> Tensor | None:
        """The mask as it would lie if no parameter waited; itself where none does."""
        return None if self.mask is None else self._moved_mask(self.mask, self.offsets, self.offsets_of_all)

    def mask_as_now(self, mask: Tensor) -> Tensor:
        """One of ``mask_of_all`` as it lies today; itself where none waits."""
        return self._moved_mask(mask, self.offsets_of_all, self.offsets)

    def hold_mask(self, mask: Tensor | None) -> None:
        """That of ``mask_as_now``, from now on. Where there was one it is written to: captured graphs read it there."""
        if mask is None or self.mask is None:
            self.mask = mask
        else:
            self.mask.copy_(mask)

    def _moved_mask(self, mask: Tensor, old: list[int], new: list[int]) -> Tensor:
        """Of parameters that began at the ``old`` offsets; itself where these are the new ones."""
        if old == new:
            return mask
        out = torch.zeros_like(mask)
        for shape, a, b in zip(self._shapes, old, new, strict=True):
            n = -(-shape.numel() // 8)
            out[b // 8 :][:n] = mask[a // 8 :][:n]
        return out

    def mask_of(self, i: int) -> Tensor:
        """A parameter's part of the mask, as bools in its shape and memory order."""
        assert self.mask is not None
        n, first = self.shards[i].numel(), self.offsets[i] // 8
        bits = unpack(self.mask[first : first + -(-n // 8)])[:n]
        return bits.as_strided(self._shapes[i], self._strides[i])

    @torch.inference_mode(False)
    def set_mask(self, i: int, bits: Tensor) -> None:
        """``bits``: bools in the shape of the parameter."""
        if self.mask is None:
            self.mask = torch.zeros(self.size // 8, dtype=torch.uint8, device=self.device)
        n = self.shards[i].numel()
        padded = torch.zeros(_round_up(n, 8), dtype=torch.bool, device=self.device)
        padded[:n].as_strided(self._shapes[i], self._strides[i]).copy_(bits)
        self.mask[self.offsets[i] // 8 :][: len(padded) // 8] = pack(padded)

    # -- optimizer state ----------------------------------------------------------------------------------------------

    def absent_from(self, grads: Sequence[Tensor]) -> tuple[int, ...]:
        """The parameters that are absent from a step's gradients."""
        return tuple(i for i, g in enumerate(grads) if g is self.absent)

    def count_empty(self, absent: tuple[int, ...], found_inf: Tensor | None) -> None:
        """Count an update of the parameters without elements, which are in no row of the table, as torch does."""
        step = self.state.get("step")
        if step is None:
            return
        index = self._index_of_empty
        if not set(absent).isdisjoint(self.empty):
            present = [i for i in self.empty if i not in absent]
            index = torch.tensor(present, dtype=torch.int64, device=self.device)
        step[index] += 1.0 if found_inf is None else (found_inf == 0).to(step.dtype)

    def bound(self, state: State, names: Sequence[tuple[str, ...]], absent: tuple[int, ...]) -> list[Tensor] | None:
        """What the latest ``bind`` returned, if it was the same and the state is where it left it."""
        bound = self._bound
        if bound is None or bound.names_by_group != names or bound.absent != absent or not bound.is_current(state):
            return None
        return bound.buffers

    @torch.inference_mode(False)
    @torch.no_grad()
    def bind(
        self, state: State, names: Sequence[tuple[str, ...]], counts: bool, absent: tuple[int, ...]
    ) -> list[Tensor]:
        """Make the base optimizer's per-parameter tensors views of flat buffers, and keep them so.

        Tensors that were loaded, moved or made elsewhere are copied in; missing ones begin as zeros, and ``state["step"]`` of
        their parameters as 0. None of them may lie in a flat buffer at another's place: see ``Store.separate``.

        Args:
            state: the base optimizer's ``state``, by parameter; entries are replaced.
            names: per group, the state that its parameters need, e.g. ``("step", "exp_avg", "exp_avg_sq")``.
            counts: whether the rule keeps a "step" that torch does not know: 0 where a parameter's state is missing, at least
                1 where it was loaded.
            absent: the parameters that take no part in this step, and get no state.

        Returns:
            The flat buffers, in the order of the names.
        """
        there = self.bound(state, names, absent)
        if there is not None:
            return there
        self.check_not_capturing("the optimizer's state")
        bound = _Bound(names, absent)
        missing: list[int] = []
        loaded: list[int] = []
        without = set(absent)
        for i, p in enumerate(self.params):
            if not names[self.groups[i]] or i in without:
                continue
            entry = state[p]
            for name in names[self.groups[i]]:
                old: Tensor | None = entry.get(name)
                if old is not None and self.is_own(i, name, old):
                    view = old
                else:
                    memory = self._state_view(i, name)
                    if old is None:
                        memory.zero_()
                        missing.append(i)
                    else:
                        memory.copy_(old if name == "step" else values(old, p))
                        loaded.append(i)
                    view = memory if name == "step" else shown(memory, p)
                    entry[name] = self.views[i, name] = view
                bound.add(entry, name, view)
        if counts and (missing or loaded):
            step = self._state_buffer("step")
            step[torch.tensor(missing, dtype=torch.int64, device=self.device)] = 0
            step[torch.tensor(loaded, dtype=torch.int64, device=self.device)] = 1
        longest = max((names[g] for g in set(self.groups)), key=len)
        bound.buffers = [self._state_buffer(name) for name in longest if name != "step"]
        if counts and longest:
            self._state_buffer("step")
        bound.complete(state)
        self._bound = bound
        return bound.buffers

    def momentum(self, state: State, names: Sequence[str]) -> list[Tensor]:
        """By parameter what the base optimizer keeps by one of these names; ``absent`` where it has none, or is frozen."""
        bound = self._bound
        if bound is None or not bound.is_current(state):
            found, unknown = [self.absent] * len(self.params), set(range(len(self.params)))
        else:  # what the kernels left there is as they take it
            found, unknown = bound.momentum or self._momentum_of(bound, names), set(bound.absent)
            bound.momentum = found
        out = [m if p.requires_grad else self.absent for m, p in zip(found, self.params, strict=True)]
        for i in unknown:
            p = self.params[i]
            entry = state.get(p, {}) if p.requires_grad else {}
            m = next((entry[name] for name in names if isinstance(entry.get(name), Tensor)), None)
            if m is not None and m.shape == p.shape:
                out[i] = regular_values(self.shards[i], values(m, p))
        return out

    def _momentum_of(self, bound: _Bound, names: Sequence[str]) -> list[Tensor]:
        out, without = [self.absent] * len(self.params), set(bound.absent)
        for i, g in enumerate(self.groups):
            for name in names:
                if name in bound.names_by_group[g] and i not in without:
                    out[i] = shard(self.views[i, name])
        return out

    def is_own(self, i: int, name: str, t: Any) -> bool:
        """Whether a tensor of the state is what ``bind`` left there for the parameter, and still the same memory."""
        view = self.views.get((i, name))
        if t is not view or view is None:
            return False
        view = shard(view)
        is_step = name == "step"
        place = i if is_step else self.offsets[i]
        if view.dim() if is_step else view.shape != self._shapes[i] or view.stride() != self._strides[i]:
            return False
        buffer = self.state[name]
        return not view.numel() or view.data_ptr() == buffer.data_ptr() + place * buffer.element_size()

    def is_bound_still(self, state: State) -> bool:
        """Whether the state is where the latest ``bind`` left it, if there was one."""
        return self._bound is None or self._bound.is_current(state)

    def rebind(self, state: State) -> bool:
        """Bring what was loaded into the state to where the kernels of the last ``bind`` work; False where any is missing."""
        if self._bound is None:
            return True
        names, absent = self._bound.names_by_group, self._bound.absent
        there, without = set(map(id, state)), set(absent)
        for i, p in enumerate(self.params):
            wanted = names[self.groups[i]]
            if i not in without and wanted and not (id(p) in there and all(name in state[p] for name in wanted)):
                return False
        self.bind(state, names, "step" in self.state and not any("step" in n for n in names), absent)
        return True

    def count_loaded(self, state: State) -> None:
        """Of a rule that counts: what was loaded, into the very tensors that ``bind`` left or others, does not begin anew."""
        if "step" in self.state:
            loaded = [i for i, p in enumerate(self.params) if any((i, name) in self.views for name in state.get(p, ()))]
            which = torch.tensor(loaded, dtype=torch.int64, device=self.device)
            self.state["step"][which] = self.state["step"][which].clamp(min=1)

    def _state_buffer(self, name: str) -> Tensor:
        if name not in self.state:
            if name == "step":
                self.state[name] = torch.zeros(len(self.params) + 1, dtype=torch.float32, device=self.device)
            else:
                self.state[name] = self.new_buffer(self.dtype_kept)
        return self.state[name]

    def _state_view(self, i: int, name: str) -> Tensor:
        buffer = self._state_buffer(name)
        if name == "step":
            return from_dlpack(buffer[i : i + 1]).view(())
        return self.alias(buffer, i)


State = dict[Tensor, dict[str, Any]]  # torch's: what an optimizer keeps, by parameter


class _Bound:
    """The tensors that a ``bind`` left in the base optimizer's state."""

    def __init__(self, names: Sequence[tuple[str, ...]], absent: tuple[int, ...]):
        self.names_by_group, self.absent = names, absent
        self.entries: list[dict[str, Any]] = []  # all of the state
        self.dicts: list[dict[str, Any]] = []  # for every view, the entry that it is in, and its name there
        self.names: list[str] = []
        self.views: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.momentum: list[Tensor] = []  # by parameter of the flat, once somebody has asked for it
        self._memory = self.views  # of DTensors their shards
        self._layout: object = None  # of those

    def add(self, entry: dict[str, Any], name: str, view: Tensor) -> None:
        self.dicts.append(entry)
        self.names.append(name)
        self.views.append(view)

    def complete(self, state: State) -> None:
        """All have been added."""
        self.entries = list(state.values())
        self._memory = shards(self.views)
        self._layout = layout_of(self._memory)

    def is_current(self, state: State) -> bool:
        """Whether they are there still, with the same memory.

        ``load_state_dict`` replaces the entries, and anybody may replace what is in them, or, as by ``.data``, its memory.
        """
        if self._memory is self.views:
            return holds(state, self.entries, self.dicts, self.names, self.views, self._layout)
        return (
            holds(state, self.entries, self.dicts, self.names, self.views, None)
            and all(map(is_, map(shard, self.views), self._memory))
            and has_layout(as_groups(self._memory), self._layout)
        )


# -- masks: one bit per element ---------------------------------------------------------------------------------------


def pack(bits: Tensor) -> Tensor:
    """Bools, a multiple of eight of them, as uint8: the k-th is bit k % 8 of byte k // 8."""
    places = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) * places).sum(1, dtype=torch.uint8)


def unpack(mask: Tensor) -> Tensor:
    """The bools of ``pack``."""
    places = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=mask.device)
    return (mask[:, None] & places != 0).view(-1)
