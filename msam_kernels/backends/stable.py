# SPDX-License-Identifier: Apache-2.0
"""The compiled operators of the CPU by torch's stable ABI: one file, ``_stable``, for every Python and every later torch.

Called by name as ``_C`` has them, but through ``torch.ops``, which unpacks every list and every number.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import bound, check_values, labelled

#: Loading it registers the kernels.
compiled = importlib.import_module("msam_kernels._stable")
build_info: Callable[[], dict[str, str]] = compiled.build_info
CUDA = None


def check_schemas(schemas: Iterable[str]) -> None:
    """Raises RuntimeError where kernels were compiled for others. Torch does it for ``_C``; of these it knows no types."""
    found = compiled.signatures().splitlines() if hasattr(compiled, "signatures") else []
    for schema in schemas:
        types = re.sub(r"\(\w!\)|\*, | \w+(=[^,)]+)?(?=[,)])", "", schema)  # without names and what is mutated
        if types not in found:
            raise RuntimeError(f"it has no {types}")


def _named(name: str) -> Callable[..., None]:
    """Of an operator's arguments: raises what names a tensor that has no values in the memory of the table's device."""
    signature = inspect.signature(getattr(reference, name))

    def look(*args: Any, **kwargs: Any) -> None:
        table, tensors = bound(signature, args, kwargs)
        for label, t in labelled(**tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"expected a list of tensors, got {type(t).__name__} in it")
            check_values(label, t, table)

    return look


def _operator(name: str) -> Callable[..., Any]:
    """As ``torch.ops`` calls it under ``no_grad``, so that autograd does not look."""
    look = _named(name)
    found: list[Callable[..., Any]] = []  # it is declared after this module is loaded

    def call(*args: Any, **kwargs: Any) -> Any:
        if not found:
            found.append(getattr(torch.ops.msam_kernels, name).default)
        try:
            if not torch.is_grad_enabled():
                return found[0](*args, **kwargs)
            with torch.no_grad():
                return found[0](*args, **kwargs)
        except Exception:
            look(*args, **kwargs)  # what torch refuses by itself, it does not name
            raise

    return call


norm, perturb, ascend, gram = map(_operator, ("norm", "perturb", "ascend", "gram"))
weigh, descend, update = map(_operator, ("weigh", "descend", "update"))


def refuse_lazy(name: str) -> Callable[..., Any]:
    """What torch is to call for an operator that has a lazy tensor: the stable ABI does not tell kernels which one is."""
    look = _named(name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        raise RuntimeError(
            f"{name} has a tensor that stands for other values than its memory holds: pass a clone of it"
        )

    return refuse
