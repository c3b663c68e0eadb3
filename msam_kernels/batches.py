# SPDX-License-Identifier: Apache-2.0
"""A batch in micro-batches, and the share of its samples that each holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._torch import tree_flatten, tree_unflatten


@dataclass(frozen=True, slots=True)
class Split:
    """Into how many micro-batches a batch is split, or into micro-batches of how many samples."""

    count: int | None
    size: int | None

    def sizes(self, samples: int) -> list[int]:
        if samples == 0:
            raise ValueError("the batch has no samples")
        if self.size is not None:
            return [min(self.size, samples - start) for start in range(0, samples, self.size)]
        count = self.count or 1
        if count > samples:
            raise ValueError(
                f"num_micro_batches={count} is more than the {samples} samples of the batch: use larger batches "
                "(drop_last=True in the loader), fewer micro-batches, or micro_batch_size"
            )
        return [samples // count + (i < samples % count) for i in range(count)]


def single_samples(samples: int) -> list[int]:
    """Micro-batches of one sample each."""
    return [1] * samples


def split(batch: tuple[Any, ...], sizes_of: Callable[[int], list[int]]) -> tuple[list[Any], list[float]]:
    """The micro-batches, and the share of the batch's samples that each holds.

    One tree of tensors is split into such trees, several into tuples of them; without any there is one micro-batch, None.

    Raises:
        ValueError: tensors of different length, or what ``sizes_of`` raises.
        TypeError: something that is neither a tensor nor None.
    """
    if not batch:
        return [None], [1.0]
    whole = batch[0] if len(batch) == 1 else batch
    plain = all(isinstance(t, Tensor) for t in batch)  # the usual case, without the cost of walking a tree
    leaves, spec = (batch, None) if plain else tree_flatten(whole)
    lengths = set()
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            lengths.add(leaf.shape[0])
        elif leaf is not None:
            what = "a 0-d tensor" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
            raise TypeError(f"a batch holds tensors that share dim 0, in dicts, tuples and lists; got {what}")
    if len(lengths) != 1:
        raise ValueError(f"the tensors of a batch must share dim 0, got lengths {sorted(lengths)}")
    (samples,) = lengths
    sizes = sizes_of(samples)
    if len(sizes) == 1:
        return [whole], [1.0]
    columns = [[None] * len(sizes) if leaf is None else leaf.split(sizes) for leaf in leaves]
    rows = zip(*columns, strict=True)
    if spec is None:
        parts: list[Any] = [row[0] if len(batch) == 1 else row for row in rows]
    else:
        parts = [tree_unflatten(list(row), spec) for row in rows]
    return parts, [size / samples for size in sizes]


class MicroBatches(list[Callable[[], Any]]):
    """One closure per micro-batch, with the share of the batch that each has."""

    def __init__(self, closures: Sequence[Callable[[], Any]], shares: Sequence[float]):
        super().__init__(closures)
        self.shares = list(shares)


def closures_of(
    loss_fn: Callable[..., Tensor], batch: tuple[Any, ...], sizes_of: Callable[[int], list[int]]
) -> MicroBatches:
    """Closures that run ``loss_fn`` forward and backward on each micro-batch, and return the detached loss.

    Raises:
        TypeError, ValueError: ``loss_fn`` cannot be called, or the batch cannot be split.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of a micro-batch that returns its mean loss, got {loss_fn!r}")
    parts, shares = split(batch, sizes_of)

    def closure(part: Any) -> Tensor:
        loss = loss_fn(*part) if len(batch) > 1 else loss_fn(part)
        loss.backward()
        return loss.detach()

    return MicroBatches([partial(closure, part) for part in parts], shares)


@torch.no_grad()
def mean(values: Sequence[Any], shares: Sequence[float]) -> Any:
    """The mean of the micro-batches' losses, weighted by their shares."""
    return sum(v * s for v, s in zip(values, shares, strict=True))
