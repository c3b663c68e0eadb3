# SPDX-License-Identifier: Apache-2.0
"""Checks of the tensors that an operator gets, for those in Python: the same as in csrc/checks.h."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._torch import is_lazy

Argument: TypeAlias = Tensor | Sequence[Tensor] | None


def extent(t: Tensor) -> int:
    """The bytes from a tensor's first element to the end of its last one."""
    if not t.numel():
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(t.size(), t.stride(), strict=True))) * t.element_size()


def span(t: Tensor) -> tuple[int, int]:
    """Where in memory a tensor begins, and where it ends."""
    first = t.data_ptr()
    return first, first + extent(t)


def reach(t: Tensor) -> int:
    """How many bytes its storage needs to have."""
    return int(t.storage_offset()) * t.element_size() + extent(t) if t.numel() else 0


def lost_memory(t: Tensor) -> bool:
    """Whether the storage has been freed or shrunk under a tensor."""
    return t.untyped_storage().nbytes() < reach(t)


def labelled(**arguments: Argument) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, with the name of its argument, or name[index] for one of a list."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif value is not None:
            yield from ((f"{name}[{i}]", t) for i, t in enumerate(value))


def bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Of a call of an operator the tensor that says where it runs, and all tensors and lists of them by argument."""
    given = signature.bind(*args, **kwargs).arguments
    tensors: dict[str, Any] = {n: v for n, v in given.items() if n != "coefs" and isinstance(v, (Tensor, list))}
    return tensors["table" if "table" in tensors else "shares"], tensors


def check_device(label: str, t: Tensor, table: Tensor) -> None:
    if t.device != table.device:
        raise RuntimeError(
            f"{label} must be on {table.device} like the table: the tensors of a call must be on one device, got "
            f"{table.device} and {t.device}"
        )


def check_values(label: str, t: Tensor, table: Tensor) -> None:
    """Refuse a tensor whose values are not in memory on the device of the table.

    Raises:
        RuntimeError: with the label, what is wrong, and the remedy.
    """
    if t.layout != torch.strided:
        raise RuntimeError(f"{label} must be strided, got {t.layout}: pass {label}.to_dense()")
    if _dispatches(t) != _dispatches(table):
        raise RuntimeError(
            f"{label} must be of one kind with the table, {_kind(table)}, got {_kind(t)}: convert it first"
        )
    check_device(label, t, table)
    if is_lazy(t):
        raise RuntimeError(
            f"{label} stands for other values than its memory holds: pass it through resolve_neg() and resolve_conj(), or a "
            "clone of it"
        )
    if lost_memory(t):
        raise RuntimeError(
            f"{label} reaches byte {reach(t)} of a storage of {t.untyped_storage().nbytes()}: it was freed or shrunk, and must "
            "have its size and its values again"
        )


def check(table: Tensor, **arguments: Argument) -> None:
    """``check_values`` of all tensors of a call."""
    for label, t in labelled(table=table, **arguments):
        check_values(label, t, table)


def check_stack(label: str, t: Tensor, stack: int, contiguous: bool = False) -> None:
    """Refuse what does not hold ``stack`` micro-batches, one after the other in memory, or does not hold it ``contiguous``.

    Raises:
        RuntimeError: with the label, and what is wrong.
    """
    if not t.dim() or len(t) != stack:
        raise RuntimeError(f"{label} must have one row for each of {stack} micro-batches, got shape {list(t.shape)}")
    if t.numel() and not (t.is_contiguous() if contiguous else stack == 1 or t.stride(0) * stack == t.numel()):
        raise RuntimeError(
            f"{label} must have one micro-batch after the other in memory, got strides {list(t.stride())}"
        )


def check_stacks(stack: int, **lists: Argument) -> None:
    """``check_stack`` of all that is there."""
    for label, t in labelled(**lists):
        if t.numel():
            check_stack(label, t, stack)


def split_ahead(
    terms: list[Tensor], rates: Tensor | None, count: int, shares: Tensor | None, groups: int
) -> tuple[list[Tensor], list[Tensor]]:
    """An update's terms, and what is behind them where it has ``rates``.

    Raises:
        RuntimeError: there is not one term, or there are stacks, or fewer rates than groups.
    """
    if rates is None:
        return terms, []
    if count != 1 or shares is not None or len(terms) % 2:
        raise RuntimeError(
            f"rates go with one term and one list more behind it, and no shares, got {count} coefficients for {len(terms)} "
            f"tensors, shares {'missing' if shares is None else 'there'}"
        )
    if rates.dim() != 1 or len(rates) < groups:
        raise RuntimeError(f"rates must have one number per group, {groups}, got shape {list(rates.shape)}")
    return terms[: len(terms) // 2], terms[len(terms) // 2 :]


def check_masters(weights: Sequence[Tensor], saved: Tensor | None, **others: Tensor | None) -> None:
    """Refuse what no kernel does with masters: stacks, and what goes off the weights after an update.

    Raises:
        RuntimeError: with its name, and both dtypes.
    """
    if saved is None or not weights or saved.dtype == weights[0].dtype:
        return
    for name, value in others.items():
        if value is not None:
            raise RuntimeError(
                f"{name} are not there for masters: saved must be {weights[0].dtype} like the weights then, got {saved.dtype}"
            )


def check_noise(noise: Tensor | None, weights: Sequence[Tensor], draw: int = 0) -> None:
    """Refuse random rounding of what is not rounded, and a draw of more than 32 bits.

    Raises:
        RuntimeError: with the dtype of the weights, or the draw.
    """
    if not 0 <= draw < 2**32:
        raise RuntimeError(f"draw must be a number of 32 bits, got {draw}")
    if noise is not None and weights[0].itemsize != 2:
        raise RuntimeError(
            f"noise is for weights of 16 bits, got {str(weights[0].dtype)[6:]}, where w + e is not rounded"
        )


def _dispatches(t: Tensor) -> bool:
    """Whether its class decides in Python what operators do, as those do that have no memory."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _kind(t: Tensor) -> str:
    return type(t).__name__ if _dispatches(t) else "an ordinary tensor"
