# SPDX-License-Identifier: Apache-2.0
"""DTensors, as FSDP2 and tensor parallelism make them of parameters: the shard that this rank holds, and sums over all ranks.

Kernels work on shards where they are. What is not a ``DTensor`` is its own shard.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ._torch import fsdp_modules, moved, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_dtensor(t: Any) -> TypeGuard[DTensor]:
    """Whether it is a ``DTensor``. Before somebody has imported these there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def shard(t: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return shard_of(t) if is_dtensor(t) else t


def shards(tensors: list[Tensor]) -> list[Tensor]:
    """The same of each; the very list where none is a DTensor."""
    return list(map(shard, tensors)) if any(map(is_dtensor, tensors)) else tensors


def gradient(p: Tensor) -> Tensor | None:
    """This rank's part of ``p.grad``, with the placements of ``p``: autograd leaves partial sums of some replicas."""
    g = p.grad
    if g is None or not is_dtensor(p):
        return g
    if not is_dtensor(g):
        raise TypeError(
            f"a sharded parameter of shape {tuple(p.shape)} has an ordinary tensor for a gradient: give it a DTensor, or "
            "set p.grad to None"
        )
    return _placed(g, p)


def values(t: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a tensor of the base optimizer's state, with the placements of ``p``.

    Raises:
        TypeError: one of the two is a DTensor, the other is not.
    """
    check_alike(t, p)
    return _placed(t, p) if is_dtensor(t) and is_dtensor(p) else t


def check_alike(t: Tensor, p: Tensor) -> None:
    """Refuse a tensor of the base optimizer's state that does not lie as its parameter.

    Raises:
        TypeError: one of the two is a DTensor, the other is not.
    """
    if is_dtensor(t) != is_dtensor(p):
        kinds = [type(x).__name__ if is_dtensor(x) else "an ordinary tensor" for x in (p, t)]
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} is {kinds[0]} and its state {kinds[1]}: load it with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )


def _placed(t: DTensor, p: DTensor) -> Tensor:
    if t.placements != p.placements or t.device_mesh != p.device_mesh:
        with torch.no_grad():
            t = t.redistribute(p.device_mesh, p.placements)
    return shard_of(t)


def shown(t: Tensor, p: Tensor) -> Tensor:
    """``t``, which is of the shard of ``p``, as everybody else sees it: a DTensor where ``p`` is one, with the same memory."""
    if not is_dtensor(p):
        return t
    made: Tensor = sys.modules["torch.distributed.tensor"].DTensor.from_local(
        t.detach(), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return made


class Spread(NamedTuple):
    """How a parameter lies over ranks: in so many different shards."""

    mesh: DeviceMesh
    parts: int


def spread(p: Tensor) -> Spread | None:
    """None for a parameter that is no DTensor."""
    if not is_dtensor(p):
        return None
    pairs = zip(p.device_mesh.shape, p.placements, strict=True)
    return Spread(p.device_mesh, math.prod(n for n, placement in pairs if not placement.is_replicate()))


def first_draw(p: Tensor) -> int:
    """Which of a parameter's random numbers is the first of this rank's shard; replicas have the same.

    Where shards are runs of the whole parameter, which is contiguous, the index of the first element there. Else each shard
    has numbers of its own, behind those of the shards before it.
    """
    if not is_dtensor(p):
        return 0
    mesh, shape = p.device_mesh, list(p.shape)
    at = mesh.get_coordinate()
    assert at is not None, "this rank holds a shard"
    cuts: list[tuple[int, int, Any]] = [
        cut for cut in zip(mesh.shape, at, p.placements, strict=True) if cut[0] > 1 and not cut[2].is_replicate()
    ]
    dims = {placement.dim for *_, placement in cuts}
    # What holds for one shard is to hold for all: the shapes of shards are not asked.
    if len(dims) == 1 and not any(hasattr(cut[2], "split_factor") for cut in cuts):
        (dim,) = dims
        if math.prod(shape[:dim]) == 1:
            offset: int = p.__create_chunk_list__()[0].offsets[dim]
            return offset * math.prod(shape[dim + 1 :])
    number = 0
    for n, i, placement in cuts:
        number = number * n + i
        shape[placement.dim] = -(-shape[placement.dim] // n)
    return number * math.prod(shape)


def check_placements(name: str, p: Tensor) -> None:
    """Refuse what has no values of its own.

    Raises:
        TypeError: a parameter that is a partial sum.
    """
    if is_dtensor(p) and any(placement.is_partial() for placement in p.placements):
        raise TypeError(
            f"{name} is a partial sum, of placements {tuple(p.placements)}: give it Shard or Replicate, by "
            "p.redistribute(...)"
        )


class Reduction:
    """Those over which sums over all parameters come together.

    Every local sum counts 1 / (how many ranks hold the same elements): one sum over all ranks is then right for ``Shard``,
    ``Replicate`` and meshes of several dimensions alike. Ordinary parameters beside sharded ones are taken to be on every rank.

    Args:
        spreads: of the parameters.
        group: further ranks, which hold other parameters: the stages of a pipeline.

    Raises:
        ValueError: the parameters lie on meshes of which none holds all others.
        TypeError: ``group`` is none, or this rank is not in it.
    """

    def __init__(self, spreads: Iterable[Spread | None], group: ProcessGroup | None):
        meshes = list({s.mesh: None for s in spreads if s is not None})
        self._mesh = max(meshes, key=lambda mesh: mesh.size(), default=None)
        self._groups: list[ProcessGroup] = []
        if self._mesh is not None:
            import torch.distributed as dist

            all_ranks = set(self._mesh.mesh.flatten().tolist())
            for mesh in meshes:
                ranks = set(mesh.mesh.flatten().tolist())
                if not ranks <= all_ranks:
                    raise ValueError(
                        f"parameters are sharded over ranks {sorted(all_ranks)} and over {sorted(ranks)}, which are not of "
                        "them: give each an optimizer of its own, or shard all over one mesh"
                    )
            dimensions = self._mesh.get_all_groups()
            if len(dimensions) > 1 and self._mesh.size() == dist.get_world_size():
                assert dist.group.WORLD is not None
                dimensions = [dist.group.WORLD]
            self._groups = dimensions
        self._of_mesh = self._groups
        if group is not None:
            check_group(group)
            self._groups = [*self._groups, group]

    def share(self, sums: Tensor, spread: Spread | None) -> Tensor:
        """What this rank's sums over parameters that lie so count."""
        ranks = 1 if self._mesh is None else self._mesh.size()
        parts = 1 if spread is None else spread.parts
        return sums if parts == ranks else sums * (parts / ranks)

    def of_first(self, numbers: Tensor) -> Tensor:
        """What they are on the first of the ranks that hold the sharded parameters."""
        import torch.distributed as dist

        is_first = all(dist.get_rank(group) == 0 for group in self._of_mesh)
        return self._summed(numbers if is_first else torch.zeros_like(numbers), self._of_mesh)

    def add_up(self, sums: Tensor) -> Tensor:
        """The sums of all ranks, which are the same bits on each. ``sums`` may be written to."""
        return self._summed(sums, self._groups)

    def _summed(self, sums: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
        import torch.distributed as dist

        # Parameters may have been offloaded to the CPU, while the mesh is one of GPUs.
        there, device = sums, sums.device
        if self._mesh is not None and self._mesh.device_type != device.type:
            index = torch.get_device_module(self._mesh.device_type).current_device()
            there = moved(sums, torch.device(self._mesh.device_type, index))
        for group in groups:
            dist.all_reduce(there, group=group)
        return moved(there, device)


def is_group(group: Any) -> bool:
    """Whether it is a process group that this rank is in; of another one torch gives a rank something else."""
    import torch.distributed as dist

    return dist.is_available() and isinstance(group, dist.ProcessGroup)


def check_group(group: Any) -> None:
    """Refuse what is no group of this rank's.

    Raises:
        TypeError: with what it is.
    """
    if not is_group(group):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this rank is in, e.g. mesh['pp'].get_group(), got "
            f"{group!r}"
        )


class Gathered:
    """The modules of ``fully_shard`` that may hold gathered copies of some parameters.

    ``earlier``: those of the last look; where parameters are gathered now, their modules show others.
    """

    def __init__(self, params: Sequence[Tensor], earlier: Gathered | None = None):
        ours = set(map(id, params))
        now = [m for m in fsdp_modules() if not ours.isdisjoint(map(id, m.parameters()))]
        found = dict.fromkeys([*([] if earlier is None else earlier.living()), *now])
        self._modules: list[ReferenceType[Any]] = list(map(ref, found))

    @staticmethod
    def others(params: Sequence[Tensor]) -> bool:
        """Whether there are such modules, and all of other parameters."""
        modules = fsdp_modules()
        ours = set(map(id, params))
        return bool(modules) and all(ours.isdisjoint(map(id, m.parameters())) for m in modules)

    def drop(self) -> None:
        """The weights have changed: what was gathered of them is stale."""
        for module in self.living():
            module.reshard()

    def living(self) -> list[Any]:
        """Those that nobody has dropped."""
        return [module for module in (known() for known in self._modules) if module is not None]
