# SPDX-License-Identifier: Apache-2.0
"""``Ranks``: whose gradients a step averages, where several processes train one model with DistributedDataParallel.

What is summed over ranks goes in one message for every device and dtype, in which each parameter also says whether it has a
gradient at all: who lacks one learns there whether another rank has it, and what is absent everywhere stays absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batches import samples_of
from .flat import Flat
from .gradients import Vectors
from .methods import Coefficient
from .sharded import is_dtensor, is_group
from .store import RATIO, Descent, Store

DDP = nn.parallel.DistributedDataParallel
IS_AVAILABLE = dist.is_available()
#: ``MicroBatchSAM``'s argument: "global", "local" or a process group.
Ascent: TypeAlias = 'Literal["global", "local"] | dist.ProcessGroup'
USE = 'use ascent="local", which reduces once and by itself'
#: Numbers in the message of a group, or a multiple: as many where ranks have other numbers of micro-batches.
COUNTS = 64


class Ranks:
    """Whose gradients make the perturbation, and how those of all ranks come together.

    Attributes:
        ascent: see ``MicroBatchSAM``.
        own: whether the passes do not synchronise, and the optimizer itself averages at their end.
        inner: the group within which the perturbation is shared; None where each rank has its own.
        is_known: whether the model is there, in which a DistributedDataParallel would be found.
        reduces: of the step under way, whether that happens at its end: not inside of somebody's ``no_sync``.
    """

    def __init__(self, ascent: Ascent, model: nn.Module | None):
        self.ascent, self.own, self.reduces = ascent, ascent != "global", True
        self.inner: Any = ascent if self.own and ascent != "local" else None
        self.is_known = model is not None
        self._ddps = [] if model is None else [module for module in model.modules() if isinstance(module, DDP)]
        self._before: list[tuple[Any, bool, bool]] = []  # what the modules were told before the step
        self._counts: list[tuple[Tensor, Tensor, dist.Work]] = []  # samples: own, all, and the message under way
        self._samples: dict[tuple[float, ...], Tensor] = {}  # on the device, for good: graphs read them
        self._compared = 0  # the number of micro-batches that all of the group have, as far as is known

    def check(self) -> None:
        """Refuse an ascent that cannot be.

        Raises:
            TypeError, ValueError: the value, and what it may be.
            RuntimeError: ``torch.distributed`` is not initialised.
        """
        ascent = self.ascent
        if not self.own:
            return
        if isinstance(ascent, str):
            if ascent != "local":
                raise ValueError(f"ascent must be 'global', 'local' or a process group, got {ascent!r}")
        elif not is_group(ascent):
            raise TypeError(
                f"ascent must be 'global', 'local' or the torch.distributed process group that this rank is in, got {ascent!r}"
            )
        self._check_initialised()
        if not self._ddps:
            raise ValueError(
                f"ascent={ascent!r} needs model=, the DistributedDataParallel module, whose all-reduces it holds back"
            )
        if any(is_dtensor(p) for ddp in self._ddps for p in ddp.parameters()):
            raise ValueError(f"ascent={ascent!r} is for whole parameters, and the model has DTensors: leave it out")

    def _check_initialised(self) -> None:
        if not (IS_AVAILABLE and dist.is_initialized()):
            raise RuntimeError(
                f"ascent={self.ascent!r} averages over ranks, and torch.distributed is not initialised: call "
                "init_process_group first, as under torchrun, or leave ascent out"
            )

    # -- what DistributedDataParallel does by itself ------------------------------------------------------------------------

    @property
    def is_several(self) -> bool:
        """Whether there may be other ranks that train the same model."""
        return IS_AVAILABLE and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def is_replicated(self) -> bool:
        """Whether other ranks hold the same parameters, and may remember something else of their own passes."""
        return bool(self._ddps) and self.is_several

    @property
    def synchronised(self) -> bool | None:
        """Whether the latest pass was reduced by DistributedDataParallel; None where that is not known or does not matter."""
        if self.own or not self.is_replicated:
            return None
        return all(module.require_forward_param_sync for module in self._ddps)

    def hold_back(self) -> None:
        """From now on no pass synchronises, if each rank is to perturb by its own gradients."""
        if not self.own:
            return
        self._check_initialised()
        self._before = [(m, m.require_backward_grad_sync, m.require_forward_param_sync) for m in self._ddps]
        self.reduces = all(reduces for _, reduces, _ in self._before)
        for module in self._ddps:
            module.require_backward_grad_sync = module.require_forward_param_sync = False

    def release(self) -> None:
        """What ``hold_back`` changed is as it was."""
        before, self._before = self._before, []
        for module, backward, forward in before:
            module.require_backward_grad_sync, module.require_forward_param_sync = backward, forward

    # -- who counts how much -------------------------------------------------------------------------------------------------

    @property
    def all(self) -> Any:
        """The group of all ranks."""
        return self._ddps[0].process_group

    def count(self, store: Store, parts: Sequence[Any] | None) -> None:
        """Begin to add up the samples of all ranks; nobody waits for it here. ``parts``: the micro-batches of a batch.

        Raises:
            RuntimeError: other ranks of the group have another number of micro-batches, where this rank's has changed.
        """
        self._counts = []
        if not self.own:
            return
        counts = None if parts is None or not self.reduces else samples_of(parts)
        if counts is None:
            return
        groups = [(self.all, [float(sum(counts))])]
        if self.inner is not None:
            n = len(counts)
            numbers = [*map(float, counts), *[0.0] * (-(n + 3) % COUNTS), float(n), float(n * n)]
            groups.append((self.inner, numbers))
        for group, numbers in groups:
            numbers.append(float(all(counts)))  # of a batch whose samples cannot be counted there are 0
            mine = self._samples.get(tuple(numbers))
            if mine is None:
                store.check_not_capturing("the number of samples")
                mine = torch.tensor(numbers, dtype=torch.float64, device=store.device)
                self._samples[tuple(numbers)] = mine
            summed = mine.clone()
            self._counts.append((mine, summed, dist.all_reduce(summed, group=group, async_op=True)))
        if self.inner is not None and len(counts) != self._compared and not store.is_capturing():
            self._compare(len(counts))

    def _compare(self, n: int) -> None:
        """With the numbers of micro-batches of the group, whose ranks would wait for each other without end. The host waits."""
        _, summed, work = self._counts[1]
        work.wait()
        size = dist.get_world_size(self.inner)
        total, squares = summed[-3:-1].tolist()
        if (total, squares) != (size * n, size * n * n):
            raise RuntimeError(
                f"this rank has {n} micro-batches, and the {size} ranks of its group have {total / size:.4g} on average: give "
                "all as many, by num_micro_batches and a DataLoader with drop_last=True"
            )
        self._compared = n

    def _share(self, group: Any, i: int | None) -> tuple[list[Tensor], list[float]]:
        """What this rank's gradient counts in the mean of a group: sums, and a coefficient of them.

        ``i``: of which micro-batch; None: of the whole step.
        """
        size = dist.get_world_size(group)
        if not self._counts:
            return [], Coefficient().row(1 / size)
        mine, summed, work = self._counts[0 if i is None else 1]
        work.wait()
        place = slice(0, 1) if i is None else slice(i, i + 1)
        known = summed[-1:] == size
        sums = [torch.where(known, mine[place], 1.0), torch.where(known, summed[place], float(size))]
        return sums, RATIO

    # -- messages ------------------------------------------------------------------------------------------------------------

    def mean(self, store: Store, vector: Vectors, before: Vectors | None = None, *, plain: bool = False) -> Vectors:
        """The mean of a vector over all ranks, weighted by their samples. ``before``: what is added to it.

        ``plain``, and with ``before``, ranks count equally: what came together in several loops is of other samples too.
        """
        sums, row = self._share(self.all, None)
        if plain or before is not None:
            sums, row = [], Coefficient().row(1 / dist.get_world_size(self.all))
        descent = Descent(sums)
        descent.add(vector, row)
        if before is not None:
            descent.add(before, row)
        return summed(store, descent, self.all)

    def mean_within(self, store: Store, vector: Vectors, i: int) -> Vectors:
        """The mean of micro-batch i's gradient over the ranks that share the perturbation."""
        sums, row = self._share(self.inner, i)
        descent = Descent(sums)
        descent.add(vector, row)
        return summed(store, descent, self.inner)

    def scores(self, store: Store, scores: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The roots of the summed squares of what the ranks have, in memory of their own; zeros where nobody has any."""
        out = []
        for flat, tensors in zip(store.flats, scores, strict=True):
            squares = torch.zeros(flat.size, dtype=torch.float64, device=flat.device)
            places = [
                squares.as_strided(p.size(), p.stride(), at)
                for p, at in zip(flat.params, flat.offsets_of_all, strict=True)
            ]
            for place, t in zip(places, tensors, strict=True):
                if t.numel():
                    place.copy_(t).square_()
            dist.all_reduce(squares, group=self.all)
            roots = squares.sqrt_().to(flat.dtype)
            out.append([
                roots.as_strided(p.size(), p.stride(), at) for p, at in zip(flat.params, flat.offsets_of_all, strict=True)
            ])  # fmt: skip
        return out

    def agreed(self, store: Store, fine: bool) -> bool:
        """Whether it is so on all ranks. The host waits."""
        if not self.own:
            return fine
        t = torch.tensor(float(not fine), device=store.device)
        dist.all_reduce(t, group=self.all)
        return not bool(t)


@torch.no_grad()
def summed(store: Store, descent: Descent, group: Any) -> Vectors:
    """Σ cₖ xₖ, summed over the ranks of a group, in memory of its own: ``[flat | flag by parameter | next flat | …]``."""
    present = descent.present
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Flat]]] = {}
    for f, flat in enumerate(store.flats):
        kinds.setdefault((flat.device, flat.dtype), []).append((f, flat))
    lists: list[list[Tensor]] = [[] for _ in store.flats]
    flags: list[Tensor] = [torch.empty(0)] * len(store.flats)
    for (device, dtype), members in kinds.items():
        message = _message(sum(_length(flat) for _, flat in members), device, dtype)
        begin = 0
        for f, flat in members:
            lists[f] = flat.slices(message[begin : begin + flat.size])
            flags[f] = message[begin + flat.size : begin + _length(flat)]
            begin += _length(flat)
            flat.backend.descend([], lists[f], descent.lists(f), flat.table, **descent.on(flat))
            for i in flat.waiting:  # no row of the table is theirs, and on another rank they may have a gradient
                lists[f][i].zero_()
            flags[f].fill_(1.0)
            for i in flat.absent_from(present.lists[f]):
                flags[f][i] = 0.0
        dist.all_reduce(message, group=group)
    if not present.absent:
        return Vectors(lists)
    if store.is_capturing():
        raise RuntimeError(
            "a parameter without a gradient in a step that is being captured: whether another rank has one cannot be looked "
            "at there; use train_step, or freeze the parameter on all ranks"
        )
    absent = 0
    for f, flat in enumerate(store.flats):
        missing = flat.absent_from(present.lists[f])
        if missing:
            there = flags[f].tolist()
            for i in missing:
                if not there[i]:
                    lists[f][i], absent = flat.absent, absent + 1
    return store.meet(Vectors(lists, absent))


def _length(flat: Flat) -> int:
    """Of a flat's part of a message, which begins aligned as the flat does."""
    return flat.size + flat.rounded(len(flat.params), flat.dtype)


@torch.inference_mode(False)
def _message(numel: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype, device=device)


class GroupInCopies:
    """A process group in the state of an optimizer that is copied: the copy has the same one. Pickles cannot have it.

    Attributes:
        name: of the optimizer's argument.
    """

    def __init__(self, name: str, group: dist.ProcessGroup):
        self.name, self.group = name, group

    @staticmethod
    def of(name: str, value: Any) -> Any:
        """``value`` itself where it is no group."""
        return GroupInCopies(name, value) if is_group(value) else value

    @staticmethod
    def out_of(value: Any) -> Any:
        return value.group if isinstance(value, GroupInCopies) else value

    def __deepcopy__(self, memo: object) -> GroupInCopies:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            f"an optimizer with {self.name}={self.group!r} cannot be pickled, as a process group is this process's alone: save "
            "opt.state_dict(), and load it into an optimizer that is made with the group of the process that loads"
        )
