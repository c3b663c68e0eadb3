# SPDX-License-Identifier: Apache-2.0
"""A batch in micro-batches, and the share of its samples that each holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._torch import scaled, tree_flatten, tree_unflatten


class Split(NamedTuple):
    """Into how many micro-batches a batch is split, or into micro-batches of how many samples."""

    parts: int | None
    size: int | None

    @property
    def leaves_whole(self) -> bool:
        """Whether there is nothing to split, whatever the batch is."""
        return self.parts == 1 and self.size is None

    def sizes(self, samples: int) -> list[int]:
        if samples == 0:
            raise ValueError("the batch has no samples")
        if self.size is not None:
            return [min(self.size, samples - start) for start in range(0, samples, self.size)]
        count = self.parts or 1
        if count > samples:
            raise ValueError(
                f"num_micro_batches={count} is more than the {samples} samples of the batch: use larger batches "
                "(drop_last=True in the loader), fewer micro-batches, or micro_batch_size"
            )
        return [samples // count + (i < samples % count) for i in range(count)]


#: For what nobody can split but the user.
WAYS_OUT = (
    "cut the micro-batches yourself: run a passes() loop without arguments for each, with its share of the loss, or "
    "step([closure, ...]) with a closure for each"
)


def split(batch: tuple[Any, ...], how: Split) -> tuple[list[Any], list[float]]:
    """The micro-batches, and the share of the batch's samples that each holds.

    One tree of tensors is split into such trees, several into tuples of them; without any there is one micro-batch, None.
    Where there is nothing to split, the batch may be anything.

    Raises:
        ValueError: tensors of different length, none, fewer samples than micro-batches.
        TypeError: something that is neither a dense tensor nor None.
    """
    if not batch:
        return [None], [1.0]
    whole = batch[0] if len(batch) == 1 else batch
    if how.leaves_whole:
        return [whole], [1.0]
    plain = all(isinstance(t, Tensor) for t in batch)  # the usual case, without the cost of walking a tree
    leaves, rebuild = (batch, None) if plain else _flattened(whole)
    lengths = set()
    for leaf in leaves:
        if leaf is not None and (what := _why_not(leaf)):
            raise TypeError(
                "a batch that is split into micro-batches holds dense tensors that share dim 0, in dicts, tuples and lists; "
                f"got {what}: {WAYS_OUT}"
            )
        if leaf is not None:
            lengths.add(leaf.shape[0])
    if len(lengths) != 1:
        raise ValueError(
            "the tensors of a batch that is split into micro-batches must share dim 0, "
            f"got lengths {sorted(lengths)}: {WAYS_OUT}"
        )
    (samples,) = lengths
    sizes = how.sizes(samples)
    if len(sizes) == 1:
        return [whole], [1.0]
    columns = [[None] * len(sizes) if leaf is None else leaf.split(sizes) for leaf in leaves]
    rows = zip(*columns, strict=True)
    if rebuild is None:
        parts: list[Any] = [row[0] if len(batch) == 1 else row for row in rows]
    else:
        parts = [rebuild(row) for row in rows]
    return parts, [size / samples for size in sizes]


def _flattened(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves, and what makes such a tree of others. Torch's trees, and mappings that are no dicts, such as a UserDict."""
    leaves, spec = tree_flatten(tree, is_leaf=lambda t: isinstance(t, PackedSequence))
    if not any(isinstance(leaf, Mapping) for leaf in leaves):
        return leaves, lambda row: tree_unflatten(list(row), spec)
    opened = [_opened(leaf) if isinstance(leaf, Mapping) else ([leaf], None) for leaf in leaves]

    def rebuild(row: Sequence[Any]) -> Any:
        values = iter(row)
        new = [next(values) if of is None else of([next(values) for _ in inner]) for inner, of in opened]
        return tree_unflatten(new, spec)

    return [leaf for inner, _ in opened for leaf in inner], rebuild


def _opened(mapping: Mapping[Any, Any]) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    leaves, rebuild = _flattened(dict(mapping))

    def closed(row: Sequence[Any]) -> Any:
        items = rebuild(row)
        if not isinstance(mapping, MutableMapping):
            return items
        new = copy.copy(mapping)
        new.update(items)
        return new

    return leaves, closed


def _why_not(leaf: Any) -> str:
    """What it is that cannot be cut along dim 0; empty where it can."""
    if not isinstance(leaf, Tensor):
        return f"a {type(leaf).__name__}"
    if leaf.is_nested or leaf.layout is not torch.strided:
        return f"a nested tensor of layout {leaf.layout}" if leaf.is_nested else f"a tensor of layout {leaf.layout}"
    return "" if leaf.dim() else "a 0-d tensor"


def rebuilt(part: Any, of: Callable[[Any], Any] | None = None) -> Any:
    """``part`` in new containers, so that whoever takes something out of them takes it out of nothing else.

    What is in them is the same, or what ``of`` makes of it. Containers are dicts, lists, sets and what behaves like them,
    and dataclasses; a tuple is rebuilt where something in it is new. What cannot be copied stays as it is.
    """
    known: dict[int, tuple[Any, Any]] = {}  # by id, with the old one, which is to live as long: some hold themselves

    def new(old: Any) -> Any:
        if isinstance(old, tuple):
            items = [new(item) for item in old]
            if all(a is b for a, b in zip(items, old, strict=True)):
                return old
            return tuple.__new__(type(old), items)  # named ones too
        if isinstance(old, Tensor) or not _is_container(old):
            return old if of is None else of(old)
        if id(old) in known:
            return known[id(old)][1]
        try:
            container = copy.copy(old)
        except Exception:  # whatever somebody else's class raises
            return old
        known[id(old)] = old, container
        own = getattr(container, "__dict__", {})  # where those that are no dict or list themselves keep one
        own.update({name: new(value) for name, value in own.items()})
        if isinstance(container, dict):
            for key, value in list(dict.items(container)):
                dict.__setitem__(container, key, new(value))
        elif isinstance(container, list):
            list.__setitem__(container, slice(None), [new(value) for value in list.__iter__(container)])
        return container

    return new(part)


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, MutableMapping, MutableSequence, MutableSet)) or (
        is_dataclass(value) and not isinstance(value, type)
    )


def samples_of(parts: Sequence[Any]) -> list[int] | None:
    """How many samples each micro-batch has: what its tensors share in dim 0. 0 where they share nothing; None of no batch."""
    if parts[0] is None:
        return None
    counts = []
    for part in parts:
        leaves = [leaf for leaf in tree_flatten(part)[0] if leaf is not None]
        lengths = {0 if _why_not(leaf) else leaf.shape[0] for leaf in leaves}
        counts.append(lengths.pop() if len(lengths) == 1 else 0)
    return counts


def renewal(part: Any) -> Callable[[Any], Any] | None:
    """What makes of such a micro-batch the one that a pass gets; None where it has no containers that a pass could change."""
    if part is None or isinstance(part, Tensor):  # the usual cases first, without the cost of a copy
        return None
    plain = type(part) is tuple and all(isinstance(t, Tensor) for t in part)
    return None if plain or rebuilt(part) is part else rebuilt


def leaves_of(part: Any) -> list[Any]:
    """What is in the containers of ``part``."""
    found = []

    def find(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    rebuilt(part, find)
    return found


Shapes = tuple[torch.Size | None, ...]


def shapes_of(leaves: Sequence[Any]) -> Shapes:
    """Of the tensors of a batch; None for what is none."""
    return tuple(t.shape if isinstance(t, Tensor) else None for t in leaves)


class MicroBatches(list[Callable[[], Any]]):
    """One closure per micro-batch, with the share of the batch that each has.

    Attributes:
        parts: the micro-batches.
        function: the user's loss.
        several: whether it takes a micro-batch, which is a tuple then, as so many arguments.
        scale: what makes of a loss the one that is differentiated, or None.
        between: what comes before the update of a whole step, or None.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        shares: Sequence[float],
        function: Callable[..., Tensor],
        several: bool = False,
        scale: Callable[[Tensor], Tensor] | None = None,
        between: Any = None,
    ):
        self.parts, self.shares = parts, list(shares)
        self.function, self.several, self.scale, self.between = function, several, scale, between
        self._renewed = renewal(parts[0])
        super().__init__(partial(self._run, part) for part in parts)

    @property
    def shapes(self) -> list[Shapes]:
        """Of every micro-batch's tensors."""
        return [shapes_of(tree_flatten(part)[0]) for part in self.parts]

    def loss_fn(self, part: Any) -> Tensor:
        """The loss of a micro-batch, in containers of its own."""
        if self._renewed is not None:
            part = self._renewed(part)
        return self.function(*part) if self.several else self.function(part)

    def _run(self, part: Any) -> Tensor:
        """Forward and backward; the detached loss."""
        loss = self.loss_fn(part)
        check_loss(loss)
        try:
            (loss if self.scale is None else self.scale(loss)).backward()
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                raise RuntimeError(
                    "loss_fn must not call backward() itself, nor use a graph of another pass: it returns the loss, and the "
                    "optimizer calls backward()"
                ) from error
            raise
        return loss.detach()


def check_loss(loss: Any) -> None:
    """Refuse what ``backward()`` cannot be called on.

    Raises:
        TypeError: no tensor.
        ValueError: several values, or none that depends on parameters.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss_fn must return the mean loss of its micro-batch, a tensor, got a {type(loss).__name__}: return the loss "
            "alone, and keep what else it computes in a list outside, where opt.pass_index is 0"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn must return one value, the mean loss, got a tensor of shape {tuple(loss.shape)}: return its mean()"
        )
    if not loss.requires_grad:
        raise ValueError(
            "loss_fn returned a loss that depends on no parameter: it is to call the model, e.g. lambda x, y: "
            "F.cross_entropy(model(x), y), and to detach nothing; no_grad() and inference_mode() hide parameters too"
        )


def micro_batches(
    loss_fn: Callable[..., Tensor],
    batch: tuple[Any, ...],
    how: Split,
    scale: Callable[[Tensor], Tensor] | None = None,
    between: Any = None,
) -> MicroBatches:
    """Those of ``batch``, of which each is given to ``loss_fn``: one entry, or an argument for each. See ``MicroBatches``.

    Raises:
        TypeError, ValueError: ``loss_fn`` cannot be called, or the batch cannot be split.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of a micro-batch that returns its mean loss, got {loss_fn!r}")
    parts, shares = split(batch, how)
    return MicroBatches(parts, shares, loss_fn, len(batch) > 1, scale, between)


@torch.no_grad()
def mean(values: Sequence[Any], shares: Sequence[float]) -> Any:
    """The mean of the micro-batches' losses, weighted by their shares; of tensors in a few kernels, however many they are."""
    tensors = [v.detach() for v in values if isinstance(v, Tensor)]
    kinds = {(t.device, t.dtype, t.shape) for t in tensors}
    if len(tensors) < len(values) or len(kinds) != 1 or not tensors[0].is_floating_point():
        return sum(v * s for v, s in zip(values, shares, strict=True))
    if len(tensors) == 1:  # with a share of 1
        return tensors[0]
    return torch.stack(scaled(tensors, list(shares))).sum(0)
