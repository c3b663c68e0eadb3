# SPDX-License-Identifier: Apache-2.0
"""Calls of every operator, in every variant, for the tests of every backend; and how their results are compared.

``make`` builds a call from ``VARIANTS``. Each tensor of it is a part of an arena of its own, which beside the tensor is filled
with signalling NaNs: what is read there by mistake shows in the results, and what is written there shows because arithmetic
makes a quiet NaN of a signalling one. What an operator only writes, or may not read, begins as an ordinary NaN.

``assert_matches`` runs a call on one backend and on another (the specification, unless told) and compares all arenas.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from msam_kernels import backends
from msam_kernels.backends import reference
from msam_kernels.backends.reference import ADAM, PERTURBED, SAVED, SGD, UNTOUCHED
from msam_kernels.flat import ALIGNMENT, CHUNK

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
HALF_ULP = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EXPONENT = {  # the bits of infinity; a signalling NaN has others below the highest of the mantissa
    **{torch.float32: 0x7F80 << 16, torch.float64: 0x7FF0 << 48, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
}
QUIET = {torch.float32: 1 << 22, torch.float64: 1 << 51, torch.bfloat16: 1 << 6, torch.float16: 1 << 9}
# Around the vector widths, the kernels' block of 256, their lanes of 32, and a chunk.
SIZES = (0, 1, 3, 4, 5, 31, 32, 33, 255, 256, 257, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 40000)
# What each list lacks. Of the terms' parameters, 3 is in none of them but in out, 4 is in no list, 6 not in out.
ABSENT = {
    "grads": (3, 12),
    "out": (4, 6),
    "terms 0": (3, 4, 9),
    "terms 1": (3, 4, 12),
    "terms 2": (3, 4, 8, 9),
    "terms 3": (3, 4, 9, 12),
    "ahead": (3, 5),
    "stack 0": (3, 4, 9),
    "stack 1": (3, 4, 12),
    "stack 2": (3, 4, 8),
}
GUARD = 64  # elements on both sides of everything
SUMS = ("achieved_sq", "out_sq")  # sums by row, which backends add in orders of their own
NAN, INF = math.nan, math.inf
MIXED = (PERTURBED, UNTOUCHED, SAVED)  # a status for each row in turn

# ---- the variants ------------------------------------------------------------------------------------------------------

_DIRECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "friendly": {"sigma": 1.0, "lmbda": 0.6},
    "friendly, some fresh": {"sigma": 0.7, "lmbda": 0.9, "fresh": True},
    "friendly, ema only read": {"sigma": 0.7, "fresh": True},
    "variance-suppressed, some fresh": {"sigma": -1.5, "lmbda": 0.6, "fresh": True},
    "variance-suppressed, masked and adaptive": {
        "sigma": -0.25,
        "lmbda": 0.2,
        "fresh": True,
        "mask": True,
        "eta": 0.01,
    },
    "adaptive": {"eta": 0.01},
    "friendly and adaptive": {"sigma": 0.3, "lmbda": 0.95, "eta": 0.0},
    "budget": {"budget": 0.05},
    "budget, friendly and adaptive": {"budget": 0.05, "sigma": 0.3, "lmbda": 0.95, "eta": 0.01},
    "masked": {"mask": True},
    "masked, friendly": {"mask": True, "sigma": 0.7, "lmbda": 0.9, "fresh": True},
    "masked, friendly and adaptive": {"mask": True, "sigma": 0.3, "lmbda": 0.95, "eta": 0.01},
    "masked, infinite beside the mask": {"mask": True, "infinite": True},
    "saved": {"status": (SAVED,)},
    "perturbed": {"status": (PERTURBED,)},
    "perturbed, masked and adaptive": {"status": (PERTURBED,), "mask": True, "eta": 0.01},
    "any status": {"status": MIXED},
    "any status, friendly": {"status": MIXED, "sigma": 0.7, "lmbda": 0.9, "fresh": True},
    "any status, masked, friendly and adaptive": {
        **{"status": MIXED, "mask": True, "sigma": 0.3, "lmbda": 0.95, "eta": 0.01}
    },
    "stochastic": {"noise": True},
    "stochastic, any status, friendly": {"noise": True, "status": MIXED, "sigma": 0.7, "lmbda": 0.9, "fresh": True},
    "stochastic, masked, friendly and adaptive": {
        **{"noise": True, "mask": True, "sigma": 0.3, "lmbda": 0.95, "eta": 0.01}
    },
    "stochastic, not finite": {"noise": True, "infinite": True, "norm_sq": (INF, 0.25)},
    "masters": {"masters": True, "status": MIXED},
    "masters, masked, friendly and adaptive": {
        **{"masters": True, "mask": True, "sigma": 0.3, "lmbda": 0.95, "eta": 0.01}
    },
    "masters, any status, friendly and adaptive": {
        **{"masters": True, "status": (UNTOUCHED, SAVED), "sigma": 0.7, "lmbda": 0.9, "fresh": True, "eta": 0.01}
    },
    "masters, stochastic, masked": {"masters": True, "noise": True, "status": MIXED, "mask": True},
    "masters, stochastic, not finite": {"masters": True, "noise": True, "status": MIXED, "norm_sq": (INF,)},
    "masters, not finite, masked, friendly": {
        **{"masters": True, "mask": True, "sigma": 1.0, "lmbda": 0.9, "fresh": True, "status": MIXED, "norm_sq": (NAN,)}
    },
    "not finite": {"sigma": 1.0, "lmbda": 0.9, "fresh": True, "norm_sq": (0.25, NAN)},
    "not finite, any status, masked": {"status": MIXED, "mask": True, "norm_sq": (INF,)},
    "not finite, infinite weights": {"infinite": True, "norm_sq": (INF, 0.25)},
}
# Coefficients from sums: 0 is x·x, 1 is x·y, 2 is y·y of the first two terms; 3 a squared norm of something else.
_PROJECTED = ({"a": 1.3, "b": -0.4, "p": 1, "q": 2}, {"a": -0.3, "b": 0.25, "p": 1, "q": 0, "eps": 0.5})
_BALANCED = ({"a": 1.0}, {"b": -1.0, "p": 0, "q": 2, "root": 1, "eps": 0.25}, {"scale": 0.3, "a": 0.7})
_COMBINATIONS: dict[str, dict[str, Any]] = {
    "two terms": {"terms": (1.3, -0.4)},
    "three terms": {"terms": (0.7, 0.2, -0.4), "norm_sq": (2.0, 1.0)},
    "four terms": {"terms": (0.7, {"scale": 0.3, "a": -2.0}, 1.0, -0.4)},
    "zero coefficients": {"terms": (0.0, 0.2, 0.0, 0.7), "unread": (0, 2)},
    "nothing but zero coefficients": {"terms": (0.0, {"scale": 0.0, "a": 2.0}), "unread": (0, 1)},
    "ratios": {"terms": _PROJECTED, "sums": ((3, 5),)},
    "ratios of roots": {"terms": _BALANCED, "sums": ((3, 1), (1, 7))},
    "rescaled": {"terms": ({"scale": 0.3, "a": 1.0},), "sums": ((1, 4), (1, 2)), "rescale": 1, "norm_sq": (0.5,)},
    "combined and rescaled": {"terms": (*_PROJECTED, {"scale": 0.7, "a": 1.0}), "sums": ((3, 2), (1, 1)), "rescale": 3},
    "many sums": {
        "terms": ({"a": 1.0, "b": 0.3, "p": 7, "q": 6}, 0.2, {"scale": -2.0, "b": 0.1, "p": 4, "q": 7, "root": 1}, 1.0),
        "sums": ((6, 3), (1, 300), (1, 1)),
        "rescale": 0,
        "norm_sq": (0.5, 0.25),
    },
    "denominators that do not count": {
        "terms": ({"a": 0.5, "b": 2.0, "p": 0, "q": 1}, {"a": 0.3, "b": 2.0, "p": 0, "q": 2, "root": 1}),
        "sums": ((1, 2), (1, 1), (1, 2)),
        "values": {1: 0.0, 2: NAN},
    },
    "not finite": {"terms": (1.0, 0.3), "norm_sq": (1.0, INF)},
    "a Gram matrix that is not finite": {"terms": _PROJECTED, "sums": ((3, 5),), "values": {0: NAN}},
    # It makes the first term's coefficient NaN, so also the length, and by that the second's.
    "another sum that is not finite": {
        **{"terms": ({"a": 1.0, "b": 0.5, "p": 3, "q": 0}, 0.3), "sums": ((3, 2), (1, 2)), "rescale": 0},
        **{"values": {1: NAN}},
    },
}
# Of micro-batches beside w, each with a norm and a perturbation.
_STACKS: dict[str, dict[str, Any]] = {
    "a stack": {"stack": 3, "norm_sq": (0.25, 0.0625)},
    "a stack of one": {"stack": 1},
    "a stack, friendly, some fresh": {"stack": 3, "sigma": 0.7, "lmbda": 0.9, "fresh": True},
    "a stack, ema only read": {"stack": 2, "sigma": 0.7, "fresh": True},
    "a stack, masked, friendly and adaptive": {"stack": 3, "mask": True, "sigma": 0.3, "lmbda": 0.95, "eta": 0.01},
    "a stack, stochastic": {"stack": 3, "noise": True},
    "a stack, stochastic, friendly, some fresh": {"stack": 2, "noise": True, "sigma": 0.7, "lmbda": 0.9, "fresh": True},
    "a stack, one not finite": {"stack": 3, "norm_sq": (0.25, NAN, 0.0), "sigma": 1.0, "lmbda": 0.9, "fresh": True},
}
# Stacks, and other terms behind them.
_OF_STACKS: dict[str, dict[str, Any]] = {
    "a stack": {"stacked": 1, "stack": 3},
    "a stack and the mean": {"stacked": 1, "stack": 3, "terms": (1.0,)},
    "a long stack and the mean": {"stacked": 1, "stack": 9, "terms": (1.0,)},
    "two stacks and four terms": {"stacked": 2, "stack": 3, "terms": (0.7, 0.2, -0.4, 1.0), "norm_sq": (2.0, 1.0)},
    "three stacks, some without weight": {"stacked": 3, "stack": 2, "light": True, "unread": ("stack 1",)},
    "stacks without weight": {"stacked": 1, "stack": 2, "light": True, "terms": (0.0,), "unread": ("stack 0", 0)},
    "a stack that is not finite": {"stacked": 1, "stack": 5, "poisoned": True, "terms": (0.3,)},
}
_SGD = {"rule": SGD}
_ADAM = {"rule": ADAM}
_EVERYTHING = {
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": 1.0,
    "maximize": 1.0,
    "weight_decay": 0.01,
    "amsgrad": 1.0,
    "decoupled": 1.0,
    "status": MIXED,
}

# operator -> variant -> options of `make`
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "norm": {
        "plain": {},
        "friendly": {"sigma": 0.7},
        "friendly, some fresh": {"sigma": 0.7, "fresh": True},
        "adaptive": {"eta": 0.01},
        "friendly and adaptive": {"sigma": 1.0, "eta": 0.0},
        "a stack": {"stack": 3},
        "a stack, friendly and adaptive": {"stack": 2, "sigma": 0.7, "fresh": True, "eta": 0.01},
    },
    "perturb": {**_DIRECTIONS, **_STACKS},
    # The norm is of the weights as they are: of perturbed ones nobody asks for an adaptive one.
    "ascend": {
        variant: {"overflow": "norm_sq" in options, **{k: v for k, v in options.items() if k != "norm_sq"}}
        for variant, options in _DIRECTIONS.items()
        if not ("eta" in options and PERTURBED in options.get("status", ()))
    }
    | {variant: {k: v for k, v in options.items() if k != "norm_sq"} for variant, options in _STACKS.items()}
    | {
        "a stack, one overflows": {"stack": 3, "overflow": (1,)},
        "a stack, friendly, one overflows": {"stack": 3, "overflow": (0,), "sigma": 0.7, "lmbda": 0.9, "fresh": True},
    },
    "gram": {
        **{"one": {"count": 1}, "two": {"count": 2}, "three": {"count": 3}},
        **{"a stack of two": {"count": 2, "stack": 3}, "a stack of three": {"count": 3, "stack": 2}},
    },
    "descend": {
        "weights": {"status": MIXED},
        "weights, not the last": {"status": MIXED, "last": False},
        "masters": {"masters": True, "status": MIXED},
        "masters and mean": {"masters": True, "status": MIXED, "terms": (0.25, 0.3), "alias": 0, "last": False},
        "first micro-batch": {"status": MIXED, "terms": (1.0,), "alias": 0, "last": False, "norm_sq": (2.0, 0.5)},
        "first micro-batch, not finite": {"status": (PERTURBED,), "terms": (1.0,), "alias": 0, "norm_sq": (NAN, 1.0)},
        "first micro-batch, scaled": {
            "status": MIXED,
            "terms": ({"scale": 0.3, "a": 1.0},),
            "alias": 0,
            "out_sq": True,
        },
        "weights and mean": {"status": (PERTURBED,), "terms": (0.25, 0.3), "alias": 0},
        "mean": {"terms": (2 / 3, 1 / 3), "alias": 0, "norm_sq": (2.0,), "out_sq": True},
        "mean, anew": {"status": MIXED, "terms": (0.0, 0.3), "alias": 0, "unread": (0,)},
        "mean in the first tensor there": {"status": MIXED, "terms": (1.0, 0.3), "alias": "first"},
        "as it was": {"terms": (1.0, 0.0), "alias": 0, "unread": (1,), "out_sq": True},
        **{f"out, {name}": {"out_sq": True, **options} for name, options in _OF_STACKS.items()},
        "a stack in its first row": {"status": MIXED, "stacked": 1, "stack": 6, "terms": (0.3,), "alias": "row"},
        "a stack, in place": {"stacked": 2, "stack": 3, "terms": (0.3,), "alias": 0},
        "out": {"terms": (0.7,), "out_sq": True},
        "copied": {"status": MIXED, "terms": (1.0,), "out_sq": True},
        **{f"out, {name}": options for name, options in _COMBINATIONS.items()},
        "weights and mean, combined and rescaled": {
            **{"status": MIXED, "alias": 2, "last": False, "out_sq": True},
            **_COMBINATIONS["combined and rescaled"],
        },
    },
    "update": {
        "sgd": {**_SGD},
        "sgd, not counted": {**_SGD, "step": None, "weight_decay": 0.01, "status": (PERTURBED,)},
        "sgd, scaled": {**_SGD, "terms": (0.3,), "status": MIXED, "norm_sq": (2.0, 0.5)},
        "sgd, momentum": {**_SGD, "momentum": 0.9},
        "sgd, momentum, first step": {**_SGD, "momentum": 0.9, "step": 0, "dampening": 0.3, "status": (PERTURBED,)},
        "sgd, momentum, dampening": {**_SGD, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
        "sgd, mean": {**_SGD, "momentum": 0.9, "status": (PERTURBED,), "terms": (0.25, 0.3)},
        "sgd, nesterov, maximize": {**_SGD, "momentum": 0.9, "nesterov": 1.0, "maximize": 1.0},
        "sgd, everything": {**_SGD, **_EVERYTHING, "terms": (2 / 3, 1 / 3), "norm_sq": (2.0,), "found_inf": 0.0},
        "sgd, shifted": {**_SGD, "momentum": 0.9, "ahead": -0.7},
        "sgd, shifted, everything": {**_SGD, **_EVERYTHING, "norm_sq": (2.0,), "found_inf": 0.0, "ahead": 3.0},
        "sgd, shifted, scaled, from perturbed": {**_SGD, "terms": (0.3,), "status": (PERTURBED,), "ahead": 0.4},
        "sgd, shifted, not finite": {**_SGD, "momentum": 0.9, "norm_sq": (NAN,), "ahead": 0.4},
        "sgd, shifted, skipped": {**_SGD, **_EVERYTHING, "unread": (0, "ahead"), "found_inf": 2.0, "ahead": 0.4},
        "adam, shifted": {**_ADAM, "status": MIXED, "ahead": -0.2},
        "adam, shifted, everything": {**_ADAM, **_EVERYTHING, "ahead": 0.3},
        "adam": {**_ADAM},
        "adam, first step": {**_ADAM, "step": 0, "status": MIXED},
        "adam, mean": {**_ADAM, "status": (PERTURBED,), "terms": (0.25, 0.3)},
        "adam, weight decay": {**_ADAM, "weight_decay": 0.01, "status": (PERTURBED,), "norm_sq": (2.0, 0.5)},
        "adam, decoupled": {**_ADAM, "weight_decay": 0.01, "decoupled": 1.0, "status": MIXED},
        "adam, amsgrad": {**_ADAM, "amsgrad": 1.0},
        # Of an fp32 gradient, (1 − beta2)·g·g is finite in this order alone.
        "adam, a square that is not finite": {**_ADAM, "amsgrad": 1.0, "terms": (2e20,)},
        "adam, small beta1, maximize": {**_ADAM, "beta1": 0.3, "maximize": 1.0, "terms": (0.7,)},
        "adam, everything": {**_ADAM, **_EVERYTHING, "terms": (2 / 3, 1 / 3), "norm_sq": (2.0,), "found_inf": -0.0},
        **{
            f"{name}, masters": {**rule, **options, "masters": True, "status": MIXED}
            for name, rule, options in (
                ("sgd", _SGD, {}),
                ("sgd, everything", _SGD, {**_EVERYTHING, "terms": (2 / 3, 1 / 3), "norm_sq": (2.0,)}),
                ("sgd, perturbed", _SGD, {"momentum": 0.9}),
                ("sgd, skipped", _SGD, {**_EVERYTHING, "unread": (0,), "found_inf": 2.0}),
                ("adam", _ADAM, {"weight_decay": 0.01}),
                ("adam, everything", _ADAM, {**_EVERYTHING, "terms": (2 / 3, 1 / 3), "found_inf": 0.0}),
                ("adam, not finite", _ADAM, {"norm_sq": (NAN,)}),
            )
        },
        "sgd, skipped": {**_SGD, **_EVERYTHING, "terms": (2 / 3, 1 / 3), "unread": (1,), "found_inf": 2.0},
        "adam, skipped": {**_ADAM, **_EVERYTHING, "unread": (0,), "found_inf": NAN},
        **{f"sgd, {name}": {**_SGD, "momentum": 0.9, **options} for name, options in _OF_STACKS.items()},
        **{f"adam, {name}": {**_ADAM, **options} for name, options in _OF_STACKS.items()},
        **{f"sgd, {name}": {**_SGD, "momentum": 0.9, **options} for name, options in _COMBINATIONS.items()},
        **{f"adam, {name}": {**_ADAM, "status": MIXED, **options} for name, options in _COMBINATIONS.items()},
    },
}
CASES = [(operator, variant) for operator, variants in VARIANTS.items() for variant in variants]
# Of a stack the ema is rounded after every micro-batch, and an update before what goes off the weights after it.
ROUNDED_ONCE = [
    (operator, variant)
    for operator, variant in CASES
    if "not finite" not in variant
    and not {"stack", "lmbda"} <= VARIANTS[operator][variant].keys()
    and not {"ahead", "noise", "masters"} & VARIANTS[operator][variant].keys()
    and VARIANTS[operator][variant].get("alias") != "row"
]
# Variants that use most arguments.
LARGEST = [
    ("norm", "friendly and adaptive"),
    ("perturb", "friendly, some fresh"),
    ("perturb", "any status, masked, friendly and adaptive"),
    ("ascend", "any status, friendly"),
    ("ascend", "masked, friendly and adaptive"),
    ("gram", "three"),
    ("descend", "weights and mean, combined and rescaled"),
    ("descend", "out, many sums"),
    ("update", "sgd, everything"),
    ("update", "sgd, many sums"),
    ("update", "adam, everything"),
    ("update", "adam, combined and rescaled"),
    ("perturb", "masters, masked, friendly and adaptive"),
    ("update", "adam, everything, masters"),
    ("norm", "a stack, friendly and adaptive"),
    ("perturb", "a stack, masked, friendly and adaptive"),
    ("ascend", "a stack, friendly, some fresh"),
    ("gram", "a stack of two"),
    ("descend", "out, two stacks and four terms"),
    ("update", "sgd, two stacks and four terms"),
    ("update", "adam, a stack and the mean"),
]
each_case = pytest.mark.parametrize(("operator", "variant"), CASES, ids=lambda v: v)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
#: (dtype, flat weights, elements that memory is shifted by)
LAYOUTS = [
    pytest.param(dtype, flat, shift, id=f"{name}, {layout}")
    for layout, flat, shift in (("flat weights", True, 0), ("listed weights, misaligned", False, 1))
    for name, dtype in DTYPES.items()
]


def in_turn(k: int) -> int:
    """For case k a layout beside the first; of 16 bits, where the case is about these alone."""
    operator, variant = CASES[k]
    short = not {"masters", "noise"}.isdisjoint(VARIANTS[operator][variant])
    layouts = [j for j, layout in enumerate(LAYOUTS) if j and (not short or layout.values[0].itemsize == 2)]
    return layouts[k % len(layouts)]


def with_layouts(
    some: Callable[[int, int], bool], tried: Callable[[int, int], bool] = lambda k, j: True
) -> pytest.MarkDecorator:
    """Case k in layout j, where ``tried`` says so: those of ``some`` always, the rest where everything is."""
    params = [
        pytest.param(*case, *layout.values, id="-".join((*case, str(layout.id))), marks=marks)
        for k, case in enumerate(CASES)
        for j, layout in enumerate(LAYOUTS)
        if tried(k, j)
        for marks in [[] if some(k, j) else [pytest.mark.exhaustive]]
    ]
    return pytest.mark.parametrize(("operator", "variant", "dtype", "flat", "shift"), params)


def some_cases(every: int) -> pytest.MarkDecorator:
    """``each_case``, of which the rest runs where everything does."""
    params = [pytest.param(*case, marks=[pytest.mark.exhaustive] if k % every else []) for k, case in enumerate(CASES)]
    return pytest.mark.parametrize(("operator", "variant"), params, ids=lambda v: v)


POSITIONAL = {
    **dict.fromkeys(("norm", "perturb", "ascend"), ("weights", "grads", "table")),
    "gram": ("terms", "table"),
    "descend": ("weights", "out", "terms", "table"),
    "update": ("weights", "states", "terms", "table"),
}


# ---- a call ------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """The arguments of one operator by name, and the memory behind each tensor among them."""

    operator: str
    arguments: dict[str, Any]
    arenas: dict[str, Tensor] = field(default_factory=dict)

    def args(self) -> tuple[list, dict]:
        names = POSITIONAL[self.operator]
        return [self.arguments[n] for n in names], {n: v for n, v in self.arguments.items() if n not in names}

    def run(self, backend: Any = "cpu") -> Tensor | None:
        """``backend``: a name, of a backend for the CPU, or a namespace of operators."""
        if isinstance(backend, str):
            backend = backends.get_backend(backend, torch.device("cpu"))
        args, kwargs = self.args()
        return getattr(backend, self.operator)(*args, **kwargs)

    def is_of_doubles(self) -> bool:
        named = (self.arguments.get(name) for name in ("grads", "terms"))
        return any(t.dtype == torch.float64 for tensors in named if tensors for t in tensors)

    def tensors(self) -> dict[str, Tensor]:
        """All memory, by name."""
        return self.arenas

    def to(self, device: torch.device | str) -> Call:
        """The same call there, in memory of its own: what was shared stays shared, what was misaligned is so again."""
        storages: dict[int, Tensor] = {}

        def moved(value):
            if isinstance(value, list):
                return [moved(v) for v in value]
            if not isinstance(value, Tensor):
                return value
            place = value.untyped_storage().data_ptr()
            if place not in storages:
                whole = torch.empty(0, dtype=value.dtype, device=value.device)
                storages[place] = whole.set_(value.untyped_storage()).to(device, copy=True)
            return storages[place].as_strided(value.size(), value.stride(), value.storage_offset())

        arguments, arenas = ({n: moved(v) for n, v in d.items()} for d in (self.arguments, self.arenas))
        return Call(self.operator, arguments, arenas)

    def in_double(self) -> Call:
        """The same call on fp64 storage; ``step`` and ``found_inf`` are fp32 in every call."""

        def widened(name, value):
            if name == "achieved_sq" and value.dim() > 1 + ("stack" in self.arguments):
                value = value[..., 0, :]
            if isinstance(value, list):
                return [widened(name, v) for v in value]
            if isinstance(value, Tensor) and value.is_floating_point() and name not in ("step", "found_inf"):
                return same.setdefault((value.data_ptr(), value.shape) if value.numel() else id(value), value.double())
            return copy.deepcopy(value)

        same: dict[Any, Tensor] = {}  # out may be one of the terms
        return Call(self.operator, {name: widened(name, value) for name, value in self.arguments.items()})


def each_tensor(one: Any, other: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two arguments of the same name."""
    pairs = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
    return (pair for pair in pairs if isinstance(pair[0], Tensor))


# ---- building one ------------------------------------------------------------------------------------------------------


PERIOD = 65537


@cache
def _noise() -> Tensor:
    noise = torch.randn(PERIOD, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise[::7], noise[5::11] = 0.0, -0.0
    return noise.repeat(2)


def fill(out: Tensor, start: int, scale: float, *, positive: bool = False) -> None:
    """With random numbers, the same for the same ``start``, zeros of both signs among them; over and over if it is long."""
    start %= PERIOD
    v = _noise()[start : start + min(len(out), PERIOD)] * scale
    v = (v.abs() + 1e-3 if positive else v).to(out.dtype)
    out.copy_(v if len(v) == len(out) else v.repeat(len(out) // PERIOD + 1)[: len(out)])


def table(
    sizes: Sequence[int], itemsize: int = 4, *, groups: int = 1, chunk: int = CHUNK
) -> tuple[Tensor, list[int], int]:
    """(the table, the offset of each segment, the size of a flat buffer), independent of ``flat.py``."""
    rows, offsets, size = [], [], 0
    for i, n in enumerate(sizes):
        offsets.append(size)
        rows += [(i, b, size + b, min(chunk, n - b), i % groups) for b in range(0, n, chunk)]
        size += -(-n * itemsize // ALIGNMENT) * ALIGNMENT // itemsize
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5), offsets, size


def coefs(terms: Sequence[float | Mapping[str, float]]) -> list[float]:
    """The argument of that name: a number is a coefficient that does not depend on sums."""
    rows = [{"scale": 1.0, **(t if isinstance(t, Mapping) else {"a": t})} for t in terms]
    return [float(row.get(column, 0.0)) for row in rows for column in reference.COEFFICIENT]


class _Maker:
    """Builds one call; see ``make``."""

    def __init__(self, operator, options, dtype, sizes, *, flat, shift, absent, groups, chunk, seed):
        self.o, self.dtype, self.sizes, self.flat, self.shift, self.groups = options, dtype, sizes, flat, shift, groups
        self.absent = absent if isinstance(absent, Mapping) else dict.fromkeys(ABSENT, tuple(absent))
        self.seed, self.start = seed, itertools.count(seed, 1237)
        self.call = Call(operator, {})
        self.table, self.offsets, self.size = table(sizes, dtype.itemsize, groups=groups, chunk=chunk)
        self.rows = [
            SimpleNamespace(segment=r[0], begin=r[1], at=slice(r[2], r[2] + r[3])) for r in self.table.tolist()
        ]
        self.put("table", self.table)

    def arena(self, name: str, shape: Sequence[int], dtype: torch.dtype, shift: int = 0) -> Tensor:
        """A tensor of NaNs, or of zeros, in memory of its own with guards around it."""
        n, number = math.prod(shape), 1 + len(self.call.arenas) % 60
        memory = torch.empty(GUARD + shift + n + GUARD, dtype=dtype)
        if dtype in BITS:
            memory.view(BITS[dtype]).fill_(EXPONENT[dtype] | number)
        else:
            memory.fill_(0xA5 if dtype == torch.uint8 else torch.iinfo(dtype).min // 2 - number)
        self.call.arenas[name] = memory
        return memory[GUARD + shift : GUARD + shift + n].view(shape)

    def put(self, name: str, value: Tensor) -> None:
        """An argument that is no tensor of parameters."""
        tensor = self.arena(name, value.shape, value.dtype)
        tensor.copy_(value)
        self.call.arguments[name] = tensor

    def tensors(
        self, name: str, scale: float = 1.0, *, poisoned: bool = False, stack: int | None = None
    ) -> list[Tensor]:
        """A list by segment, empty where the list lacks it; or a list of stacks."""
        out = []
        for i, n in enumerate(self.sizes):
            start = next(self.start)
            if i in self.absent.get(name, ()):
                out.append(torch.empty(0, dtype=self.dtype))
                continue
            shape = (n,) if stack is None else (stack, n)
            out.append(self.arena(f"{name}[{i}]", shape, self.dtype, self.shift))
            if poisoned:
                out[-1].fill_(NAN)
            else:
                fill(out[-1].view(-1), start, scale)
        return out

    def buffer(self, name: str, scale: float = 1.0, *, positive: bool = False, kept: bool = False) -> Tensor:
        """A flat buffer, with guards for padding. ``kept``: of fp32, where there are masters."""
        dtype = torch.float32 if kept and self.has_masters else self.dtype
        out = self.arena(name, (self.size,), dtype, self.shift)
        for offset, n in zip(self.offsets, self.sizes, strict=True):
            fill(out[offset : offset + n], next(self.start), scale, positive=positive)
        return out

    def weights(self) -> None:
        a = self.call.arguments
        a["weights"] = [self.buffer("weights")] if self.flat else self.tensors("weights")

    @property
    def has_masters(self) -> bool:
        return "masters" in self.o and self.dtype.itemsize == 2

    def status(self, status: Sequence[int]) -> None:
        """``saved`` is NaN where it is to be written, the weights are where they come from saved ones.

        Of masters three in four round to their weight; weights of perturbed rows are NaN.
        """
        a = self.call.arguments
        a["saved"] = self.buffer("saved", kept=True)
        self.put("status", torch.tensor([status[k % len(status)] for k in range(len(self.rows))], dtype=torch.uint8))
        for row, value in zip(self.rows, a["status"].tolist(), strict=True):
            begin = row.at.start if self.flat else row.begin
            weights = a["weights"][0 if self.flat else row.segment][begin : begin + row.at.stop - row.at.start]
            saved = a["saved"][row.at]
            if self.has_masters:
                if value == PERTURBED:
                    weights.fill_(NAN)
                else:
                    weights.copy_(torch.where(torch.arange(len(weights)) % 4 == 2, weights, saved))
            elif value == SAVED:
                saved.copy_(weights)
            else:
                (saved if value == UNTOUCHED else weights).fill_(NAN)
            if "infinite" in self.o and row.begin == 0:  # the first of every parameter, which is not perturbed
                for t in (weights, saved):
                    t[0] = t[0] if t[0].isnan() else INF

    def direction(self) -> None:
        o, a = self.o, self.call.arguments
        self.weights()
        a["grads"] = self.tensors("grads", 0.1, stack=o.get("stack"))
        for g in a["grads"] if o.get("overflow") else []:
            if "stack" not in o:
                g[:1] = INF
            elif g.numel():
                g[list(o["overflow"]), 0] = INF
        if "stack" in o:
            a["stack"] = o["stack"]
        if "sigma" in o:
            a["ema"], a["sigma"] = self.buffer("ema", 0.1), o["sigma"]
            if "fresh" in o:
                for offset, n in list(zip(self.offsets, self.sizes, strict=True))[1::2]:
                    a["ema"][offset : offset + n] = NAN
        a.update({name: o[name] for name in ("lmbda", "eta") if name in o})

    def perturbation(self) -> None:
        o, a = self.o, self.call.arguments
        stack = o.get("stack")
        sums = (reference.ACHIEVED,) if self.dtype.itemsize == 2 else ()
        if self.call.operator == "perturb":
            norm_sq = torch.tensor(o.get("norm_sq", (0.25, 0.0625, 0.0625)), dtype=torch.float64)
            if stack is not None:  # the given sum is that of the second
                rows = [torch.full_like(norm_sq, 0.125 * (i + 1)) for i in range(stack)]
                rows[min(1, stack - 1)] = norm_sq
                norm_sq = torch.stack(rows)
            self.put("norm_sq", norm_sq)
        radii = [(0.05 * (g + 1), o.get("budget", math.inf)) for g in range(self.groups)]
        self.put("radii", torch.tensor(radii, dtype=torch.float64))
        if stack is None:
            self.status(o.get("status", (UNTOUCHED,)))
            self.put("achieved_sq", torch.full((*sums, len(self.rows)), NAN, dtype=torch.float64))
        else:
            a["saved"] = self.buffer("saved")
            a["weights"] = [self.arena("copies", (stack, self.size), self.dtype, self.shift)]
            for row in self.rows:
                a["weights"][0][:, row.at] = NAN
            self.put("achieved_sq", torch.full((stack, *sums, len(self.rows)), NAN, dtype=torch.float64))
        if "noise" in o and sums:
            # Every third parameter begins at an odd element, so that no eight of its elements share a call.
            own = [(5 * i + 1, 2**33 + 8 * i + (i % 3 == 1)) for i in range(len(self.sizes))]
            self.put("noise", torch.tensor([(-(self.seed + 3) << 34 | 77, 2**32 - 2), *own]))
            a["draw"] = 2**32 - 2
        if "mask" in o:
            generator = torch.Generator().manual_seed(self.seed)
            self.put("mask", torch.randint(0, 256, (-(-self.size // 8),), dtype=torch.uint8, generator=generator))
            if "infinite" in o:
                for row in self.rows:
                    if row.begin == 0:
                        a["mask"][row.at.start // 8] &= 0xFE

    def combination(self, terms: Sequence[float | Mapping[str, float]]) -> list[list[Tensor]]:
        o, a = self.o, self.call.arguments
        unread, stack = o.get("unread", ()), o.get("stack")
        stacks = [
            self.tensors(f"stack {k}", 0.1, poisoned=f"stack {k}" in unread, stack=stack)
            for k in range(o.get("stacked", 0))
        ]
        if stacks:
            shares = (torch.arange(len(stacks) * stack, dtype=torch.float64).view(-1, stack) + 2) / 7
            shares[1::2] *= -1
            if "light" in o:
                shares[: max(1, len(stacks) - 1)] = 0
            if "poisoned" in o:
                shares[:, -1] = NAN
            self.put("shares", shares)
        lists = stacks + [self.tensors(f"terms {k}", 0.1, poisoned=k in unread) for k in range(len(terms))]
        a["terms"], a["coefs"], a["sums"] = list(itertools.chain(*lists)), coefs(terms), []
        for k, (rows, n) in enumerate(o.get("sums", ())):
            self.put(f"sums {k}", self.sums(k, rows, n, o.get("values", {}).get(k)))
            a["sums"].append(a.pop(f"sums {k}"))
        if "rescale" in o:
            a["rescale"] = o["rescale"]
        if "norm_sq" in o:
            self.put("norm_sq", torch.tensor(o["norm_sq"], dtype=torch.float64))
        return lists

    def sums(self, k: int, rows: int, n: int, value: float | None) -> Tensor:
        """Inner products of vectors of ``n`` small whole numbers: their sums are exact in every order."""
        vectors = torch.randint(-9, 10, (3, n), generator=torch.Generator().manual_seed(self.seed + k)).double() / 16
        vectors[0] += 1
        products = torch.stack([vectors[u] * vectors[v] for v in range(3) for u in range(v + 1)])[:rows]
        if value is not None:
            products[-1] = value
        return products[0] if rows == 1 else products

    def norm(self) -> None:
        self.direction()

    def perturb(self) -> None:
        self.direction()
        self.perturbation()

    def ascend(self) -> None:
        self.perturb()
        self.put("arrived", torch.zeros(1, dtype=torch.int32))

    def gram(self) -> None:
        count, stack = self.o["count"], self.o.get("stack")
        lists = [self.tensors(f"terms {k}", 0.1 * (k + 1), stack=stack) for k in range(count)]
        self.call.arguments.update(terms=list(itertools.chain(*lists)), count=count)
        if stack is not None:
            self.call.arguments["stack"] = stack

    def descend(self) -> None:
        o, a = self.o, self.call.arguments
        if "status" in o:
            self.weights()
            self.status(o["status"])
        else:
            a["weights"] = []
        lists, alias = self.combination(o.get("terms", ())), o.get("alias")
        a["out"] = self.tensors("out", poisoned=True) if lists else []
        for i, out in enumerate(a["out"]):
            aliases = (
                lists if alias in ("first", "row") else [] if alias is None else [lists[o.get("stacked", 0) + alias]]
            )
            found = next((t[i] for t in aliases if t[i].numel()), out)
            a["out"][i] = found[0] if found.dim() > 1 else found
        if "last" in o:
            a["last"] = o["last"]
        if "out_sq" in o:
            self.put("out_sq", torch.full((len(self.rows),), NAN, dtype=torch.float64))

    def update(self) -> None:
        o, a = self.o, self.call.arguments
        self.weights()
        if "status" in o:
            self.status(o["status"])
        self.combination(o.get("terms", () if "stacked" in o else (1.0,)))
        a["rule"] = o["rule"]
        columns = reference.SGD_COLUMNS if o["rule"] == SGD else reference.ADAM_COLUMNS
        asked = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, **o}
        # The second group has another lr and no flag; momentum, amsgrad and kin are a group's own business.
        plain = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
        rows = [[float((plain if g == 1 else asked).get(c, 0.0)) for c in columns] for g in range(self.groups)]
        self.put("settings", torch.tensor(rows, dtype=torch.float64))
        steps = [i % 5 if o.get("step", True) is True else o["step"] for i in range(len(self.sizes))]
        if o.get("step", True) is not None:
            self.put("step", torch.tensor([*map(float, steps), 0.0]))
        if "found_inf" in o:
            self.put("found_inf", torch.tensor(o["found_inf"]))
        if "ahead" in o:
            a["terms"] += self.tensors("ahead", 0.1, poisoned="ahead" in o.get("unread", ()))
            self.put("rates", torch.tensor([-0.1 * (g + 1) for g in range(self.groups)], dtype=torch.float64))
            a["factor"] = o["ahead"]
        if o["rule"] == SGD:
            a["states"] = [self.buffer("momentum_buffer", 0.1, kept=True)] if "momentum" in o else []
        else:
            squares = ["exp_avg_sq", "max_exp_avg_sq"] if "amsgrad" in o else ["exp_avg_sq"]
            a["states"] = [self.buffer("exp_avg", 0.1, kept=True)]
            a["states"] += [self.buffer(name, 0.02, positive=True, kept=True) for name in squares]
        for i, (offset, n) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            if o["rule"] == SGD and a["states"] and steps[i] == 0 and i % self.groups != 1:
                a["states"][0][offset : offset + n] = NAN  # begins with the gradient


def make(
    operator: str,
    variant: str | Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    sizes: Sequence[int] = SIZES,
    *,
    flat: bool = True,
    shift: int = 0,
    absent: Sequence[int] | Mapping[str, Sequence[int]] = (),
    groups: int = 3,
    chunk: int = CHUNK,
    seed: int = 0,
) -> Call:
    """A call with data that are the same for every layout.

    Args:
        operator: one of ``VARIANTS``.
        variant: its name there, or options of its own:
            ``budget``, ``sigma``, ``lmbda``, ``eta``, ``norm_sq``, ``rescale``, ``last``, ``rule``, ``count``, columns of
            ``settings`` (for all groups but the second) are passed on; ``mask``, ``out_sq`` and, of 16 bits, ``noise`` ask for
            the argument;
            ``masters``: of 16 bits, ``saved`` and states are of fp32;
            ``fresh``: every other parameter's ema is NaN; ``infinite``: so are weights that are not perturbed;
            ``overflow``: so are gradients; ``status``: of the rows in turn, none without it where it is optional;
            ``terms``: their coefficients (see ``coefs``), ``unread``: those that hold NaN; ``sums``: rows and terms of each,
            ``values``: what the last row of some holds; ``alias``: the term that ``out`` is, or "first", the first of them
            that is there, of a stack its first row; ``stack``: micro-batches of each tensor, ``stacked``: how many of the
            terms are such, with weights of their own, ``light``: 0 for most, ``poisoned``: NaN for the last; ``step``: of
            all parameters, None for no such argument; ``found_inf``: its value; ``ahead``: the factor of what is behind the
            term.
        sizes: elements of each parameter.
        flat: weights in one buffer, or listed.
        shift: elements by which all memory of parameters is misaligned.
        absent: parameters that every list lacks, or those that a list lacks by its name, as in ``ABSENT``.
        groups: parameter groups, which the parameters belong to in turn.
        chunk: elements of a row of the table.
        seed: of all numbers.
    """
    options = VARIANTS[operator][variant] if isinstance(variant, str) else dict(variant)
    layout = {"flat": flat, "shift": shift, "absent": absent, "groups": groups, "chunk": chunk, "seed": seed}
    maker = _Maker(operator, options, dtype, sizes, **layout)
    getattr(maker, operator)()
    return maker.call


# ---- comparing ---------------------------------------------------------------------------------------------------------


def _signalling(t: Tensor) -> Tensor:
    return t.isnan() & (t.view(BITS[t.dtype]) & QUIET[t.dtype] == 0)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Any quiet NaN is like another; a signalling one is a guard, which nothing may replace."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = BITS.get(actual.dtype, actual.dtype)
    if torch.equal(actual.view(bits), expected.view(bits)):
        return
    same = actual.view(bits) == expected.view(bits)
    if actual.dtype in BITS:
        same |= actual.isnan() & expected.isnan() & ~_signalling(expected)
    if not same.all():
        place = (~same).nonzero()[0].tolist()
        found = f"{actual[tuple(place)].item()!r}, not {expected[tuple(place)].item()!r}"
        raise AssertionError(f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {place}: {found}")


def assert_same_memory(one: Call, other: Call, *, apart_from: Sequence[str] = ()) -> None:
    for name, tensor in one.tensors().items():
        if name not in apart_from:
            assert_same_bits(tensor.cpu(), other.tensors()[name].cpu(), name)


def gram_scales(sums: Tensor) -> Tensor:
    """Of each sum of ``gram`` what the lengths of its vectors multiply to: the products of x·y may cancel."""
    lengths = [sums[v * (v + 3) // 2].sqrt() for v in range(math.isqrt(2 * len(sums)))]
    return torch.stack([b * a for i, b in enumerate(lengths) for a in lengths[: i + 1]])


def assert_close_sums(actual: Tensor, expected: Tensor, rtol: float = 1e-12, *, gram: bool = True) -> None:
    """What ``norm``, ``ascend`` or, with more than one dimension, ``gram`` returned: terms, to be summed up."""
    if expected.dim() > 2 or (expected.dim() == 2 and not gram):  # of a stack
        for one, other in zip(actual, expected, strict=True):
            assert_close_sums(one, other, rtol)
        return
    actual, expected = actual.cpu().sum(-1), expected.sum(-1)
    if expected.dim():
        scales = gram_scales(expected)
        torch.testing.assert_close(actual / scales, expected / scales, rtol=0, atol=rtol, equal_nan=True)
    else:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=0, equal_nan=True)


def _root(t: Tensor) -> Tensor:
    with np.errstate(invalid="ignore"):  # of what is negative
        return torch.from_numpy(np.asarray(np.sqrt(t.numpy())))


def halves(call: Call, norm_sq: Tensor | None) -> tuple[Call, Call]:
    """What ``ascend`` does: ``norm``, and ``perturb`` by what that returned."""
    a, names = call.arguments, ("weights", "grads", "table", "ema", "sigma", "eta", "stack")
    norm = {name: value for name, value in a.items() if name in names}
    if "stack" in a:
        norm["weights"] = [a["saved"]]
    perturb = {name: value for name, value in a.items() if name != "arrived"} | {"norm_sq": norm_sq}
    return Call("norm", norm), Call("perturb", perturb)


def expect(call: Call, norm_sq: Tensor | None = None, oracle: Any = "reference") -> Tensor | None:
    """Runs the call on the ``oracle`` and returns its result; ``ascend`` perturbs by ``norm_sq``, the norm under test."""
    # torch's own root of a long vector, out of MKL, is off by an ulp for one value in five; the kernels' is exact.
    with mock.patch.object(Tensor, "sqrt", _root):
        if call.operator != "ascend":
            return call.run(oracle)
        norm, perturb = halves(call, norm_sq)
        if call.arguments.get("stack", 1) > 1 and call.arguments.get("lmbda") is not None:
            return call.run(oracle)  # the second direction is made of the first mean
        wanted = norm.run(oracle)
        perturb.run(oracle)
        return wanted


def added_up(terms: Tensor, backend: Any, device: torch.device | str) -> Tensor:
    """The sum of each row of terms as the backend's kernels for fp64 add them up: as a coefficient of 1."""
    if terms.dim() > 1:
        return torch.stack([added_up(row, backend, device) for row in terms])
    one, out = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    one, out, terms, rows = (t.to(device) for t in (one, out, terms, table((1,), 8)[0]))
    backend.descend([], [out], [one], rows, coefs=coefs([{"b": 1.0, "p": 0, "q": 1}]), sums=[terms, one])
    return out.cpu()


def assert_matches(
    call: Call,
    backend: Any = "cpu",
    oracle: Any = "reference",
    *,
    device: torch.device | str = "cpu",
    same: Callable[[Tensor, Tensor, str], None] = assert_same_bits,
    rtol: float = 1e-12,
) -> None:
    """A copy of the call on ``device`` and ``backend`` leaves what the call itself does with the ``oracle``.

    Args:
        call: on the CPU; holds what is expected afterwards.
        backend: a name or a namespace of operators, as is ``oracle``.
        device: of the backend.
        same: compares two arenas.
        rtol: of sums, which are added in different orders.
    """
    if isinstance(backend, str):
        backend = backends.get_backend(backend, torch.device(device))
    ours = call.to(device)
    result = ours.run(backend)
    sums = None if result is None else added_up(result.cpu(), backend, device)
    wanted = expect(call, sums, oracle)
    for name, tensor in ours.tensors().items():
        actual, expected = tensor.cpu(), call.tensors()[name]
        if name not in SUMS:
            same(actual, expected, name)
            continue
        inside = slice(GUARD, -GUARD)
        torch.testing.assert_close(actual[inside], expected[inside], rtol=rtol, atol=0, equal_nan=True, msg=name)
        for guard in (slice(GUARD), slice(-GUARD, None)):
            assert_same_bits(actual[guard], expected[guard], name)
    assert (result is None) == (wanted is None)
    if result is not None:
        assert_close_sums(result, wanted, rtol, gram=call.operator == "gram")
        if call.is_of_doubles():  # where no order of summation shows
            assert_same_bits(sums, added_up(wanted, backend, device), "the sums")


# ---- exact sums --------------------------------------------------------------------------------------------------------


def exact_sum_of_squares(t: Tensor) -> float:
    return float(sum(Fraction(v) ** 2 for v in t.tolist()))


def assert_sums_are_rounded_once(backend: Any, n: int, decades: float, device: torch.device | str = "cpu") -> None:
    """Of fp64 storage: products are rounded, and their sum once, whatever the order."""
    vectors, rows = [spread(n, torch.float64, decades) for _ in range(3)], table((n,), 8)[0].to(device)
    exact = [math.fsum((vectors[u] * vectors[v]).tolist()) for v in range(3) for u in range(v + 1)]
    there = [x.to(device) for x in vectors]
    assert added_up(backend.gram(there, rows, count=3).cpu(), backend, device).flatten().tolist() == exact
    assert added_up(backend.norm([], there[:1], rows).cpu(), backend, device).tolist() == exact[:1]
    out_sq = torch.zeros(len(rows), dtype=torch.float64, device=device)
    backend.descend([], there[:1], there[:1], rows, coefs=coefs((1.0,)), sums=[], out_sq=out_sq)
    assert out_sq.tolist() == [math.fsum(part.square().tolist()) for part in vectors[0].split(CHUNK)]


def spread(n: int, dtype: torch.dtype, decades: float) -> Tensor:
    """Values over many orders of magnitude."""
    exponents = (2 * torch.rand(n, dtype=torch.float64) - 1) * decades
    return (torch.randn(n, dtype=torch.float64) * 10**exponents).to(dtype)
