# SPDX-License-Identifier: Apache-2.0
"""The operators: the compiled kernels against the specification in ``reference.py``, bit for bit.

Element-wise results must be equal in every bit, NaN aside, because both round at the same places and neither contracts
into FMA. The sums, ``norm_sq``, ``achieved_sq`` and ``acc_sq``, are only close to those of the specification, which adds in
another order; they are held to exact sums instead. Run as a script, this file is the child process of its own tests.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msam_kernels import ops, reference
from msam_kernels.flat import ALIGNMENT, CHUNK

pytestmark = pytest.mark.host

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
HALF_ULP = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ISAS = ("baseline", "avx2", "avx512")
# Around the vector widths, the kernels' block of 256, their lanes of 32, and a chunk.
SIZES = (0, 1, 3, 4, 5, 31, 32, 33, 255, 256, 257, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 40000)
STREAMED = (9 << 20) + 12  # bytes; from 8 MiB on the kernels store past the cache
SUMS = ("achieved_sq", "acc_sq")  # that perturb writes, by chunk
GUARD = 64  # elements of NaN on both sides of everything
NAN, INF = math.nan, math.inf

# operator -> variant -> options of `make`
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "inner_products": {
        "plain": {},
        "friendly": {"sigma": 0.7},
        "friendly, some fresh": {"sigma": 0.7, "fresh": True},
        "adaptive": {"eta": 0.01},
        "friendly and adaptive": {"sigma": 1.0, "eta": 0.0},
    },
    "perturb": {
        "plain": {},
        "plain, saving": {"saved": True},
        "friendly": {"sigma": 1.0, "lmbda": 0.6},
        "friendly, saving, some fresh": {"sigma": 0.7, "lmbda": 0.9, "fresh": True, "saved": True},
        "adaptive, saving": {"eta": 0.01, "saved": True},
        "friendly and adaptive": {"sigma": 0.3, "lmbda": 0.95, "eta": 0.0},
        "friendly, ema only read": {"sigma": 0.7, "fresh": True, "saved": True},
        "masked": {"mask": True},
        "masked, friendly": {"mask": True, "sigma": 0.7, "lmbda": 0.9},
        "masked, friendly and adaptive, saving": {
            **{"mask": True, "saved": True, "sigma": 0.3, "lmbda": 0.95, "eta": 0.01}
        },
        "masked, infinite beside the mask": {"mask": True, "infinite": True, "saved": True},
        "from origin": {"origin": True},
        "from origin, masked and adaptive": {"origin": True, "mask": True, "eta": 0.01},
        "from origin, friendly": {"origin": True, "sigma": 0.7, "lmbda": 0.9, "fresh": True},
        "from origin, adding": {"origin": True, "acc": True},
        "adding, masked, friendly and adaptive": {
            **{"acc": True, "saved": True, "mask": True, "sigma": 0.3, "lmbda": 0.95, "eta": 0.01}
        },
        "not finite": {"sigma": 1.0, "lmbda": 0.9, "fresh": True, "saved": True, "norm_sq": NAN},
        "from origin, not finite": {"origin": True, "mask": True, "norm_sq": INF},
        "adding, not finite": {"origin": True, "acc": True, "norm_sq": NAN},
        "not finite, infinite weights": {"infinite": True, "norm_sq": INF},
    },
    "dots": {"plain": {}, "three": {"z": True}},
    "restore": {
        "weights alone": {"weights": True},
        "first micro-batch": {"weights": True, "acc": True, "norm_sq": 2.0},
        "weights and mean": {"weights": True, "acc": True, "grads": True, "c_acc": 0.25, "c": 0.3},
        "mean alone": {"acc": True, "grads": True, "c_acc": 2 / 3, "c": 1 / 3, "norm_sq": 2.0},
        "first micro-batch, not finite": {"weights": True, "acc": True, "norm_sq": INF},
        "mean, not finite": {"acc": True, "grads": True, "c": 0.3, "norm_sq": NAN},
        "weights and mean, scaled": {"weights": True, "acc": True, "grads": True, "coefs": (0.7,), "norm_sq": 2.0},
        "mean, two combined": {"acc": True, "grads": True, "coefs": (1.3, -0.4), "c_acc": 0.0},
        "mean, three combined": {"acc": True, "grads": True, "coefs": (0.7, 0.2, -0.4), "c_acc": 0.25, "c": 0.3},
        "mean anew": {"weights": True, "acc": True, "grads": True, "c_acc": 0.0, "c": 0.3, "unread": ("acc",)},
        "combined, zero coefs": {
            **{"acc": True, "grads": True, "coefs": (0.0, 0.2, 0.0), "c_acc": 0.25, "c": 0.3},
            **{"unread": ("grads", "grads 2")},
        },
    },
    "sgd": {
        "plain": {},
        "from saved": {"saved": True, "norm_sq": 2.0},
        "weight decay": {"weight_decay": 0.01, "saved": True},
        "momentum": {"momentum": 0.9},
        "momentum, some fresh": {"momentum": 0.9, "dampening": 0.3, "fresh": True},
        "momentum from saved and mean": {"momentum": 0.9, "saved": True, "acc": True, "c_acc": 0.25, "c": 0.3},
        "nesterov, maximize": {"momentum": 0.9, "nesterov": 1.0, "maximize": 1.0, "weight_decay": 0.01},
        "everything": {
            **{"momentum": 0.9, "dampening": 0.1, "nesterov": 1.0, "maximize": 1.0, "weight_decay": 0.01},
            **{"saved": True, "acc": True, "c_acc": 2 / 3, "c": 1 / 3, "norm_sq": 2.0, "fresh": True},
        },
        "scaled gradient": {"momentum": 0.9, "c": 0.3},
        "combined from saved": {"momentum": 0.9, "saved": True, "coefs": (1.3, -0.4), "norm_sq": 2.0},
        "combined, mean": {"momentum": 0.9, "acc": True, "coefs": (0.7, 0.2, -0.4), "c_acc": 0.25, "c": 0.3},
        "combined, zero coefs": {
            **{"momentum": 0.9, "acc": True, "coefs": (0.7, 0.0, -0.4), "c_acc": 0.0, "c": 0.3},
            **{"unread": ("acc", "grads 1")},
        },
        "not finite": {"momentum": 0.9, "saved": True, "norm_sq": NAN},
    },
    "adam": {
        "plain": {},
        "from saved": {"saved": True, "norm_sq": 2.0},
        "weight decay": {"weight_decay": 0.01, "saved": True},
        "decoupled": {"weight_decay": 0.01, "decoupled": 1.0, "saved": True},
        "amsgrad": {"amsgrad": 1.0},
        "small beta1": {"beta1": 0.3},
        "scaled": {"saved": True, "coefs": (0.7,)},
        "combined, mean": {"acc": True, "coefs": (1.3, -0.4), "c_acc": 0.25, "c": 0.3, "norm_sq": 2.0},
        "everything": {
            **{"weight_decay": 0.01, "decoupled": 1.0, "amsgrad": 1.0, "maximize": 1.0, "saved": True},
            **{"acc": True, "c_acc": 2 / 3, "c": 1 / 3, "norm_sq": 2.0},
        },
        "not finite": {"saved": True, "acc": True, "amsgrad": 1.0, "norm_sq": INF},
    },
}
VARIANTS["ascend"] = {
    variant: {"overflow": True, **options} if options.pop("norm_sq", None) is not None else options
    for variant, options in copy.deepcopy(VARIANTS["perturb"]).items()
    if not {"origin", "acc"} & options.keys()
}
CASES = [(operator, variant) for operator, variants in VARIANTS.items() for variant in variants]
FINITE_CASES = [case for case in CASES if "not finite" not in case[1]]
STREAMED_CASES = [
    ("perturb", "plain, saving"),
    ("perturb", "friendly, saving, some fresh"),
    ("perturb", "masked, friendly and adaptive, saving"),
    ("perturb", "from origin, masked and adaptive"),
    ("perturb", "from origin, adding"),
    ("restore", "weights and mean"),
    ("restore", "mean anew"),
    ("sgd", "from saved"),
    ("sgd", "momentum from saved and mean"),
    ("adam", "from saved"),
    ("adam", "everything"),
]
each_case = pytest.mark.parametrize(("operator", "variant"), CASES, ids=lambda v: v)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
POSITIONAL = {
    "inner_products": ("weights", "grads", "chunks"),
    "ascend": ("weights", "grads", "chunks"),
    "dots": ("x", "y", "z", "chunks"),
    **dict.fromkeys(("perturb", "restore", "sgd", "adam"), ("weights", "acc", "grads", "chunks")),
}


# ---- realistic arguments ---------------------------------------------------------------------------------------------


@dataclass
class Call:
    """Arguments of one operator, and all memory behind them: what a kernel must not touch is NaN."""

    operator: str
    arguments: dict[str, Any]
    arenas: dict[str, Tensor] = field(default_factory=dict)

    def args(self) -> tuple[list, dict]:
        names = POSITIONAL[self.operator]
        return [self.arguments[n] for n in names], {n: v for n, v in self.arguments.items() if n not in names}

    def run(self, backend: str = "cpu") -> Tensor | None:
        args, kwargs = self.args()
        return getattr(ops.get_backend(backend, torch.device("cpu")), self.operator)(*args, **kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """All memory, by name; of what is not an arena, the tensors that the kernels may change."""
        small = {n: self.arguments[n] for n in ("fresh", "step", *SUMS) if self.arguments.get(n) is not None}
        return {**self.arenas, **small}

    def in_double(self) -> Call:
        """The same call on fp64 storage; ``step`` is fp32 in every call."""

        def widened(name, v):
            if isinstance(v, list):
                return [widened(name, t) for t in v]
            return v.double() if isinstance(v, Tensor) and v.dtype in BITS and name != "step" else copy.deepcopy(v)

        return Call(self.operator, {name: widened(name, v) for name, v in self.arguments.items()})


def each_tensor(one: Any, other: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two arguments of the same name."""
    pairs = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
    return (pair for pair in pairs if isinstance(pair[0], Tensor))


@cache
def noise() -> Tensor:
    return torch.randn(65537, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def table(sizes, groups, absent, chunk: int, itemsize: int) -> tuple[Tensor, list[int], int]:
    """(chunks, the offset of each segment, the size of a flat buffer), independent of ``flat.py``."""
    rows, offsets, size = [], [], 0
    for i, n in enumerate(sizes):
        offsets.append(size)
        if i not in absent:
            rows += [(i, b, size + b, min(chunk, n - b), groups[i]) for b in range(0, n, chunk)]
        size += -(-n * itemsize // ALIGNMENT) * ALIGNMENT // itemsize
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5), offsets, size


def make(
    operator: str,
    variant: str | dict,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, ...] = SIZES,
    *,
    flat: bool = True,
    shift: int = 0,
    absent: tuple[int, ...] = (),
    groups: int = 3,
    chunk: int = CHUNK,
    seed: int = 0,
) -> Call:
    """A call with non-zero data, the same for every layout. ``shift``: elements by which all memory is misaligned.

    What a variant names under "unread" is NaN: a coefficient of 0 leaves it out.
    """
    o = VARIANTS[operator][variant] if isinstance(variant, str) else variant
    start = itertools.count(seed, 1237)
    group_of = [i % groups for i in range(len(sizes))]
    chunks, offsets, size = table(sizes, group_of, absent, chunk, dtype.itemsize)
    call = Call(operator, {"chunks": chunks})

    def arena(name: str, n: int) -> Tensor:
        memory = torch.full((GUARD + shift + n + GUARD,), NAN, dtype=dtype)
        call.arenas[name] = memory
        return memory[GUARD + shift : GUARD + shift + n]

    def values(scale: float, positive: bool) -> list[Tensor]:
        out = []
        for n in sizes:
            v = noise().roll(-next(start)).repeat(n // len(noise()) + 1)[:n] * scale
            v = v.abs() + 1e-3 if positive else v
            if not positive:
                v[::7], v[5::11] = 0.0, -0.0
            out.append(v.to(dtype))
        return out

    def listed(name: str, scale: float = 1.0) -> list[Tensor]:
        out = [arena(f"{name}[{i}]", n) for i, n in enumerate(sizes)]
        for t, v in zip(out, values(scale, False), strict=True):
            t.copy_(v if name not in o.get("unread", ()) else v * NAN)
        return [t.new_empty(0) if i in absent and name != "weights" else t for i, t in enumerate(out)]

    def flattened(name: str, scale: float = 1.0, *, positive: bool = False, poisoned: bool = False) -> Tensor:
        out = arena(name, size)
        for i, v in enumerate(values(scale, positive)):
            if not poisoned and i not in absent:
                out[offsets[i] : offsets[i] + len(v)] = v
        return out

    if operator == "dots":
        call.arguments.update(x=listed("x", 0.1), y=listed("y", 0.2), z=listed("z", 0.3) if "z" in o else [])
        return call
    update = operator in ("sgd", "adam")
    saved = bool(o.get("saved")) or (operator == "restore" and "weights" in o)
    # What is only written begins as NaN: weights that are made from the saved ones, and what perturb saves.
    ascent = operator in ("perturb", "ascend")
    poisoned = "origin" in o if ascent else saved
    a = call.arguments
    w = [flattened("weights", poisoned=poisoned)] if flat else listed("weights")
    if poisoned and not flat:
        for t in w:
            t.fill_(NAN)
    a["weights"] = w if operator != "restore" or "weights" in o else []
    a["grads"] = listed("grads", 0.1) if operator != "restore" or "grads" in o else []
    if operator != "inner_products" and operator != "ascend":
        a["acc"] = listed("acc", 0.1) if "acc" in o else []
    if update or operator == "restore":
        a["c_acc"], a["c"] = o.get("c_acc", 1.0), o.get("c", 1.0)
    if "coefs" in o:
        a["coefs"] = torch.tensor(o["coefs"], dtype=torch.float64)
        a["grads"] += [t for k in range(1, len(o["coefs"])) for t in listed(f"grads {k}", 0.1)]
    if "overflow" in o:
        for g in a["grads"]:
            g[:1] = INF
    if saved:
        a["saved"] = flattened("saved", poisoned=ascent)
    if "origin" in o:
        a["origin"] = flattened("origin")
    if "mask" in o:
        bits = torch.Generator().manual_seed(seed)
        a["mask"] = torch.randint(0, 256, (-(-size // 8),), dtype=torch.uint8, generator=bits)
    if "infinite" in o:  # the first of every parameter, which is not perturbed
        for i, n in enumerate(sizes):
            if n and i not in absent:
                (w[0][offsets[i] :] if flat else w[i])[0] = INF
                if "mask" in o:
                    a["mask"][offsets[i] // 8] &= 0xFE
    if "norm_sq" in o or operator == "perturb":
        a["norm_sq"] = torch.tensor([o.get("norm_sq", 0.37)], dtype=torch.float64)
    if "sigma" in o:
        a["ema"], a["sigma"] = flattened("ema", 0.1), o["sigma"]
    if "lmbda" in o:
        a["lmbda"] = o["lmbda"]
    if "eta" in o:
        a["eta"] = o["eta"]
    if "fresh" in o and update:
        a["fresh"] = (torch.arange(len(sizes)) % 2).to(torch.uint8)
    elif "fresh" in o:
        for offset, n in list(zip(offsets, sizes, strict=True))[1::2]:
            a["ema"][offset : offset + n] = NAN
    if ascent:
        for name in SUMS if "acc" in o else SUMS[:1]:
            a[name] = torch.full((len(chunks),), NAN, dtype=torch.float64)
        a["hyper"] = torch.tensor([[0.05 * (g + 1)] for g in range(groups)], dtype=torch.float64)
    if update:
        columns = reference.SGD_COLUMNS if operator == "sgd" else reference.ADAM_COLUMNS
        asked = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, **o}
        # The second group has another lr and no flag; momentum, amsgrad and kin are a group's own business.
        plain = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
        rows = [[float((plain if g == 1 else asked).get(c, 0.0)) for c in columns] for g in range(groups)]
        a["hyper"] = torch.tensor(rows, dtype=torch.float64)
    if operator == "sgd" and "momentum" in o:
        a["momentum_buffer"] = flattened("momentum_buffer", 0.1)
    if operator == "adam":
        a["exp_avg"], a["exp_avg_sq"] = flattened("exp_avg", 0.1), flattened("exp_avg_sq", 0.02, positive=True)
        if "amsgrad" in o:
            a["max_exp_avg_sq"] = flattened("max_exp_avg_sq", 0.02, positive=True)
        a["step"] = torch.tensor([*(i % 5 for i in range(len(sizes))), 0.0])
    return call


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = BITS.get(actual.dtype, actual.dtype)
    same = actual.view(bits) == expected.view(bits)
    same |= actual.isnan() & expected.isnan()  # any NaN is like another
    if not same.all():
        i = int((~same).nonzero()[0])
        values = f"{actual[i].item()!r}, not {expected[i].item()!r}"
        raise AssertionError(f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {i}: {values}")


def dot_scales(sums: Tensor) -> Tensor:
    """Of each of the sums of ``dots`` what the lengths of its vectors multiply to: the products of x·y may cancel."""
    lengths = sums[[0, 2, 5][: 2 if len(sums) == 3 else 3]].sqrt()
    return torch.stack([a * b for i, b in enumerate(lengths) for a in lengths[: i + 1]])


def _root(t: Tensor) -> Tensor:
    return torch.from_numpy(np.sqrt(t.numpy()))


def assert_matches_reference(call: Call) -> None:
    expected, wanted_sums = copy.deepcopy(call), []
    result = call.run("cpu")
    specified = reference.inner_products

    def inner_products(*args, **kwargs):
        wanted_sums.append(specified(*args, **kwargs))
        return result  # ``ascend`` goes on by it

    # torch's own root of a long vector, out of MKL, is off by an ulp for one value in five; the kernels' is exact.
    with mock.patch.object(Tensor, "sqrt", _root), mock.patch.object(reference, "inner_products", inner_products):
        wanted = expected.run("reference")
    others = expected.tensors()
    for name, tensor in call.tensors().items():
        if name not in SUMS:
            assert_same_bits(tensor, others[name], name)
    sums = [
        *((call.arguments.get(name), expected.arguments.get(name)) for name in SUMS),
        (result, wanted_sums[0] if wanted_sums else wanted),
    ]
    for actual, target in sums:
        if target is not None:
            torch.testing.assert_close(actual, target, rtol=1e-12, atol=0, equal_nan=True)


@pytest.fixture(autouse=True)
def _extension_unless_a_backend_is_named(request):
    if "backend" not in request.fixturenames:
        request.getfixturevalue("extension")


@pytest.fixture(autouse=True)
def _one_thread():
    """On two cores that others use as well, waiting for a second thread takes longer than the work. Threads: see below."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- declaration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False], ids=["flat weights", "listed weights"])
@each_case
def test_opcheck_accepts_the_operator(operator, variant, flat):
    args, kwargs = make(operator, variant, sizes=(5, 0, 33), flat=flat).args()
    torch.library.opcheck(getattr(torch.ops.msam_kernels, operator).default, args, kwargs)


@pytest.mark.parametrize("operator", VARIANTS)
def test_the_specification_is_called_like_the_operator(operator):
    schema = getattr(torch.ops.msam_kernels, operator).default._schema
    signature = inspect.signature(getattr(reference, operator))
    for argument, parameter in zip(schema.arguments, signature.parameters.values(), strict=True):
        assert argument.name == parameter.name
        assert argument.kwarg_only == (parameter.kind is parameter.KEYWORD_ONLY)
        assert argument.has_default_value() == (parameter.default is not parameter.empty)
        if argument.has_default_value():
            assert argument.default_value == parameter.default


@each_case
def test_torch_ops_and_the_backend_give_the_same_bits(operator, variant):
    direct, dispatched = (make(operator, variant, sizes=(5, 0, 300)) for _ in range(2))
    args, kwargs = dispatched.args()
    results = direct.run(), getattr(torch.ops.msam_kernels, operator)(*args, **kwargs)
    for name, t in direct.tensors().items():
        assert_same_bits(t, dispatched.tensors()[name], name)
    assert (results[0] is None and results[1] is None) or torch.equal(*results)


# ---- against the specification ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flat", "shift"), [(True, 0), (False, 1)], ids=["flat weights", "listed weights, misaligned"])
@each_dtype
@each_case
def test_compiled_kernels_give_the_bits_of_the_specification(operator, variant, dtype, flat, shift):
    assert_matches_reference(make(operator, variant, dtype, flat=flat, shift=shift, absent=(3, 12)))


@each_dtype
@pytest.mark.parametrize(("operator", "variant"), STREAMED_CASES, ids=lambda v: v)
def test_large_buffers_that_are_stored_past_the_cache_give_the_same_bits(operator, variant, dtype):
    assert_matches_reference(make(operator, variant, dtype, (STREAMED // dtype.itemsize, 257), groups=2))


@each_dtype
def test_misaligned_large_buffers_give_the_same_bits(dtype):
    for operator, variant in (("perturb", "plain, saving"), ("restore", "weights alone"), ("sgd", "from saved")):
        assert_matches_reference(make(operator, variant, dtype, (STREAMED // dtype.itemsize, 257), shift=1, flat=False))


@settings(max_examples=150)
@given(
    case=st.sampled_from(CASES),
    dtype=st.sampled_from(list(DTYPES.values())),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=6),
    chunk=st.sampled_from([1, 7, 32, 100, 256, 300, CHUNK]),
    flat=st.booleans(),
    shift=st.integers(0, 3),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_layout_gives_the_bits_of_the_specification(case, dtype, sizes, chunk, flat, shift, groups, seed, data):
    absent = tuple(data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=len(sizes) - 1), label="absent"))
    layout = {"flat": flat, "shift": shift, "absent": absent, "groups": groups, "chunk": chunk}
    call = make(*case, dtype, tuple(sizes), seed=seed, **layout)
    if len(call.arguments["chunks"]):
        assert_matches_reference(call)


numbers = st.floats(0, 2, allow_subnormal=False)
flags = st.sampled_from([0.0, 1.0])


@settings(max_examples=150)
@given(
    operator=st.sampled_from(["sgd", "adam"]),
    dtype=st.sampled_from(list(DTYPES.values())),
    numbers=st.fixed_dictionaries(
        {
            **{"lr": numbers, "momentum": st.floats(0.01, 1), "dampening": st.floats(0, 1), "weight_decay": numbers},
            **{"beta1": st.floats(0, 0.999), "beta2": st.floats(0, 0.9999), "eps": st.floats(1e-10, 1)},
            **{"nesterov": flags, "maximize": flags, "decoupled": flags, "amsgrad": flags, "saved": st.booleans()},
            **{"c": st.floats(-2, 2), "c_acc": st.floats(-2, 2)},
        }
    ),
    with_acc=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_hyper_parameters_give_the_bits_of_the_specification(operator, dtype, numbers, with_acc, seed):
    options = {**numbers, **({"acc": True} if with_acc else {})}
    assert_matches_reference(make(operator, options, dtype, (0, 1, 37, 300), groups=2, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("operator", "variant"), FINITE_CASES, ids=lambda v: v)
def test_results_are_those_of_double_precision_rounded_once(operator, variant, dtype):
    call = make(operator, variant, dtype, (5, 33, 700))
    truth = call.in_double()
    result, exact = call.run("cpu"), truth.run("reference")
    for name, value in call.arguments.items():
        for actual, expected in each_tensor(value, truth.arguments[name]):
            if actual.dtype == dtype and name != "step":
                # One rounding to the storage type, after a few in fp32 of terms no larger than about 4.
                close = {"rtol": 1.001 * HALF_ULP[dtype], "atol": 2**-20, "equal_nan": True}
                torch.testing.assert_close(actual.double(), expected, **close, msg=lambda m, n=name: f"{n}: {m}")
    if result is not None:
        torch.testing.assert_close(result, exact, rtol=1e-6, atol=0)


@each_dtype
@pytest.mark.parametrize(("operator", "variant"), CASES, ids=lambda v: v)
def test_flat_and_listed_weights_give_the_same_bits(operator, variant, dtype):
    flat, listed = (make(operator, variant, dtype, (5, 0, 300, CHUNK + 1), flat=f) for f in (True, False))
    results = [flat.run(), listed.run()]
    if flat.arguments.get("weights"):
        _, offsets, _ = table((5, 0, 300, CHUNK + 1), [0] * 4, (), CHUNK, dtype.itemsize)
        for i, (t, offset) in enumerate(zip(listed.arguments["weights"], offsets, strict=True)):
            assert_same_bits(flat.arguments["weights"][0][offset : offset + len(t)], t, f"weights[{i}]")
    for name, t in listed.tensors().items():
        if not name.startswith("weights"):
            assert_same_bits(flat.tensors()[name], t, name)
    if results[0] is not None:
        assert_same_bits(*results, "the result")


# ---- the specification itself ----------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "SGD, weight decay, maximize": (torch.optim.SGD, {"weight_decay": 0.1, "maximize": True}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD, dampening, weight decay": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD, nesterov, maximize": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam, weight decay, amsgrad": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    "Adam, small beta1, maximize": (torch.optim.Adam, {"betas": (0.3, 0.99), "maximize": True}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW, amsgrad, maximize": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_follows_torch_optim(name, backend):
    kind, options = OPTIMIZERS[name]
    sizes, lr = (3, 40), 0.1
    chunks, offsets, size = table(sizes, [0, 0], (), CHUNK, 8)
    params = [torch.nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in sizes]
    weights, state = torch.zeros(size, dtype=torch.float64), {}
    segments = [slice(o, o + n) for o, n in zip(offsets, sizes, strict=True)]
    for p, s in zip(params, segments, strict=True):
        weights[s] = p.detach()
    optimizer = kind(params, lr=lr, foreach=False, **options)
    g = optimizer.param_groups[0]
    if kind is torch.optim.SGD:
        operator, columns = "sgd", reference.SGD_COLUMNS
        row = {**g, "rho": 0.0}
        if g["momentum"]:
            state["momentum_buffer"] = torch.full_like(weights, NAN)  # a fresh one begins as the gradient
    else:
        operator, columns = "adam", reference.ADAM_COLUMNS
        beta1, beta2 = g["betas"]
        row = {**g, "rho": 0.0, "beta1": beta1, "beta2": beta2, "decoupled": kind is torch.optim.AdamW}
        for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if g["amsgrad"] else [])):
            state[key] = torch.zeros_like(weights)
        state["step"] = torch.zeros(2)
    hyper = torch.tensor([[float(row[c]) for c in columns]], dtype=torch.float64)
    for step in range(4):
        grads = [torch.randn(n, dtype=torch.float64) for n in sizes]
        for p, d in zip(params, grads, strict=True):
            p.grad = d.clone()
        optimizer.step()
        fresh = {"fresh": torch.ones(2, dtype=torch.uint8)} if operator == "sgd" and step == 0 else {}
        namespace = ops.get_backend(backend, torch.device("cpu"))
        getattr(namespace, operator)([weights], [], grads, chunks, hyper=hyper, **state, **fresh)
        for p, s in zip(params, segments, strict=True):
            torch.testing.assert_close(weights[s], p.detach(), rtol=1e-13, atol=1e-14)


# ---- sums ------------------------------------------------------------------------------------------------------------


def exact_sum_of_squares(t: Tensor) -> float:
    return float(sum(Fraction(v) ** 2 for v in t.tolist()))


def spread(n: int, dtype: torch.dtype, decades: float) -> Tensor:
    """Values over many orders of magnitude."""
    exponents = (2 * torch.rand(n, dtype=torch.float64) - 1) * decades
    return (torch.randn(n, dtype=torch.float64) * 10**exponents).to(dtype)


@pytest.mark.parametrize("decades", [0, 4], ids=["alike", "over eight decades"])
@pytest.mark.parametrize("n", [1, 5, 33, 257, CHUNK + 1, 40000])
@each_dtype
def test_the_norm_is_within_a_few_ulp_of_the_exact_one(dtype, n, decades):
    g = spread(n, dtype, 2 if dtype == torch.float16 and decades else decades)
    chunks, _, _ = table((n,), [0], (), CHUNK, dtype.itemsize)
    norm_sq = ops.get_backend("cpu", torch.device("cpu")).inner_products([], [g], chunks).item()
    exact = exact_sum_of_squares(g)
    # 32 lanes a chunk add 512 terms each. Squares of fp32 are exact in fp64 but end in the bits 001, as squares of odd
    # numbers do, so that their sums lean downwards.
    assert abs(norm_sq - exact) <= (4 if dtype == torch.float64 else 16) * math.ulp(exact)
    if dtype != torch.float64:
        rounded = torch.tensor([math.sqrt(norm_sq), math.sqrt(exact)]).view(torch.int32)  # as fp32: bits count ulp
        assert abs(int(rounded[0]) - int(rounded[1])) <= 2


@each_dtype
def test_the_norm_of_a_residual_and_of_a_stretched_direction_is_within_two_ulp(dtype):
    for variant in ("friendly", "adaptive", "friendly and adaptive"):
        call = make("inner_products", variant, dtype, (40001,))
        truth = call.in_double()
        a = truth.arguments
        d = a["grads"][0]
        if "sigma" in a:
            d = d - a["sigma"] * a["ema"][:40001]
        if "eta" in a:
            d = (a["weights"][0][:40001].abs() + a["eta"]) * d
        norm, exact = math.sqrt(call.run().item()), math.sqrt(exact_sum_of_squares(d))
        # 16-bit data too: what is summed are fp32 directions that were never rounded to 16 bits.
        ulp = math.ulp(exact) if dtype == torch.float64 else 2.0 ** (math.frexp(exact)[1] - 24)
        assert abs(norm - exact) <= 2 * ulp, variant


@each_dtype
def test_the_achieved_norm_is_that_of_what_was_stored(dtype):
    call = make("perturb", "plain, saving", dtype, (40001,))
    before = call.arguments["weights"][0].clone()
    call.run()
    e = (call.arguments["weights"][0].double() - before.double())[:40001]
    exact = exact_sum_of_squares(e)
    assert abs(call.arguments["achieved_sq"].sum().item() - exact) <= 8 * math.ulp(exact)


def test_a_sum_with_an_infinite_term_is_infinite_and_one_with_nan_is_nan(backend):
    inner_products = ops.get_backend(backend, torch.device("cpu")).inner_products
    chunks, _, _ = table((3, 40000), [0, 0], (), CHUNK, 4)
    grads = [torch.ones(3), torch.ones(40000)]
    for value, found in ((INF, math.isinf), (-INF, math.isinf), (NAN, math.isnan)):
        for where in (0, 17000, 39999):
            grads[1].fill_(1.0)[where] = value
            assert found(inner_products([], grads, chunks).item())


def test_an_empty_row_in_the_table_adds_nothing(backend):
    # The table of an optimizer has none, but the checks allow it; with uninitialized memory filled it would show.
    n = 3 * CHUNK * 8  # large enough to be shared among threads
    chunks, _, _ = table((n, 0), [0, 0], (), CHUNK, 4)
    empty = [1, 0, n, 0, 0]
    torch.use_deterministic_algorithms(True)  # fills what at::empty returns with NaN
    try:
        for rows in ([*chunks.tolist(), empty], [empty, *chunks.tolist()]):
            grads, with_empty = [torch.ones(n), torch.empty(0)], torch.tensor(rows)
            inner_products = ops.get_backend(backend, torch.device("cpu")).inner_products
            assert inner_products([], grads, with_empty).item() == n
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("variant", ["plain, saving", "friendly", "adaptive, saving"])
@each_dtype
def test_a_zero_gradient_perturbs_nothing(variant, dtype, backend):
    call = make("perturb", variant, dtype, (5, 300))
    for g in call.arguments["grads"]:
        g.zero_()
    if "ema" in call.arguments:
        call.arguments["ema"].zero_()
    before = call.arguments["weights"][0].clone()
    call.arguments["norm_sq"].zero_()
    call.run(backend)
    torch.testing.assert_close(call.arguments["weights"][0], before, rtol=0, atol=0, equal_nan=True)
    assert call.arguments["achieved_sq"].sum().item() == 0


# ---- determinism -----------------------------------------------------------------------------------------------------


def digest(call: Call, threads: int) -> str:
    torch.set_num_threads(threads)
    result = call.run()
    torch.set_num_threads(1)
    tensors = {**call.tensors(), **({} if result is None else {"result": result})}
    sha = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        t = t if t.dtype not in BITS else t.nan_to_num(nan=1e4)  # any NaN is like another
        sha.update(name.encode() + t.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def fingerprint(cases: Iterable[tuple[str, str]], threads: int, sizes: Callable[[int], tuple]) -> dict[str, str]:
    """A digest of all that operators write. ``sizes``: of the tensors, by the bytes of an element."""
    return {
        f"{operator}, {variant}, {name}, {len(sizes(1))} tensors": digest(
            make(operator, variant, dtype, sizes(dtype.itemsize), groups=2), threads
        )
        for (operator, variant), (name, dtype) in itertools.product(cases, DTYPES.items())
    }


def test_any_number_of_threads_and_any_run_give_the_same_bits():
    # Several times what makes a kernel parallel; the second, of one kernel, is stored past the cache as well.
    sizes = {(33, 200000, 0, CHUNK + 1): CASES, (STREAMED // 4, 257): [("sgd", "momentum from saved and mean")]}
    prints = [[fingerprint(cases, threads, lambda _, n=n: n) for n, cases in sizes.items()] for threads in (1, 2, 2, 3)]
    for other in prints[1:]:
        assert other == prints[0]


def child(*arguments: str, isa: str | None = None) -> subprocess.CompletedProcess:
    env = dict(os.environ)
    env.pop("MSAM_KERNELS_ISA", None)
    if isa:
        env["MSAM_KERNELS_ISA"] = isa
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", __file__, *arguments]
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def by_isa(extension) -> dict[str, dict]:
    """What every instruction set of this processor computes, each in a process of its own."""
    out = {}
    for isa in ISAS:
        done = child("instruction-set", isa=isa)
        if f"MSAM_KERNELS_ISA={isa} is not there on this processor" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        out[isa] = json.loads(done.stdout.splitlines()[-1])
        assert out[isa]["isa"] == isa
    return out


@pytest.mark.parametrize("isa", ISAS[1:])
def test_every_instruction_set_gives_the_same_bits(isa, by_isa):
    if isa not in by_isa:
        pytest.skip(f"this processor has no {isa}")
    expected = by_isa["baseline"]["fingerprint"]
    assert {k: v for k, v in by_isa[isa]["fingerprint"].items() if v != expected[k]} == {}


# ---- 16-bit storage --------------------------------------------------------------------------------------------------


def conversion_errors() -> list[str]:
    """Every 16-bit pattern through the kernels against torch's conversions; what differs, in words."""
    kernels = ops.get_backend("cpu", torch.device("cpu"))
    found = []
    whole, _, _ = table((65536,), [0], (), CHUNK, 2)
    short, _, _ = table((65536,), [0], (), 7, 2)  # less than a vector: the scalar rest of a loop
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        every = patterns.view(dtype)
        following = (patterns + 1).view(dtype)  # the neighbour away from zero
        shuffled = every[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]

        def compare(what, acc, g, c_acc, c, dtype=dtype, name=name):
            wide = acc.float() * torch.tensor(c_acc) + g.float() * torch.tensor(c)
            expected = wide.to(dtype)
            # What is subnormal in fp16 is not in fp32, so that flushing there changes nothing.
            for chunks, flush in itertools.product((whole, short), (False, True) if name == "fp16" else (False,)):
                out = acc.clone()
                torch.set_flush_denormal(flush)
                kernels.restore([], [out], [g], chunks, c_acc=c_acc, c=c)
                torch.set_flush_denormal(False)
                same = (out.view(torch.int16) == expected.view(torch.int16)) | (out.isnan() & expected.isnan())
                if not same.all():
                    i = int((~same).nonzero()[0])
                    found.append(
                        f"{name}, {what}, chunks of {chunks[0, 3]}, {flush=}: {int((~same).sum())} differ, e.g. "
                        f"{wide[i].item()!r} became {out[i].item()!r}, not {expected[i].item()!r}"
                    )

        compare("every value as it is", every, torch.full_like(every, -0.0), 1.0, 1.0)
        compare("halfway to the neighbour", every, following, 0.5, 0.5)
        compare("just above halfway", every, following, 0.5, 0.5 + 2**-13)
        compare("just below halfway", every, following, 0.5, 0.5 - 2**-14)
        compare("twice", every, every, 1.0, 1.0)
        compare("tiny", every, shuffled, 2.0**-14, 2.0**-20)
        for c_acc, c in ((1.0, 1.0), (1.0, 2.0**-9), (0.1, 0.7), (1 / 3, -2 / 3), (3.0, 2.0**-24), (255.0, 2.0**-12)):
            compare(f"{c_acc:g} times a value and {c:g} times another", every, shuffled, c_acc, c)
        # The processor's conversion keeps a NaN's sign and payload, and so does the other one, which baseline and rests have.
        for chunks in (whole, short) if name == "fp16" else ():
            kept = every.clone()
            kernels.restore([], [kept], [torch.full_like(every, -0.0)], chunks, c_acc=1.0, c=1.0)
            if not torch.equal(kept.view(torch.int16), patterns | (every.isnan() * 0x200)):
                found.append(f"{name}, chunks of {chunks[0, 3]}: a NaN has other bits")
        # Rounding apart: nine equal squares are exact in fp64 and pass through vector code and the scalar rest.
        rows, _, _ = table((9,), [0], (), CHUNK, 2)
        for value in every[::13].tolist():
            norm_sq = kernels.inner_products([], [torch.full((9,), value, dtype=dtype)], rows).item()
            if norm_sq != 9 * value**2 and not (math.isnan(norm_sq) and math.isnan(value)):
                found.append(f"{name}: {value!r} is read as {math.sqrt(norm_sq / 9)!r}")
    return found


@pytest.mark.parametrize("isa", ISAS)
def test_conversions_of_every_16_bit_value_are_those_of_torch(isa, by_isa):
    if isa not in by_isa:
        pytest.skip(f"this processor has no {isa}")
    assert by_isa[isa]["conversions"] == []


# ---- what must stay as it is -----------------------------------------------------------------------------------------


@each_dtype
@each_case
def test_padding_stays_zero_and_neighbours_stay_untouched(operator, variant, dtype, backend):
    call = make(operator, variant, dtype, (5, 300, 0, 33, 1), absent=(3,))
    chunks, _, size = table((5, 300, 0, 33, 1), [0] * 5, (3,), CHUNK, dtype.itemsize)
    padding = torch.ones(size, dtype=torch.bool)
    for _, _, offset, numel, _ in chunks.tolist():
        padding[offset : offset + numel] = False
    assert padding.any()
    flats = {n: t for n, t in call.arenas.items() if len(t) == size + 2 * GUARD and "[" not in n}
    for t in flats.values():
        t[GUARD:-GUARD][padding] = 0.0
    before = {n: t.clone() for n, t in call.arenas.items()}
    call.run(backend)
    for name, t in flats.items():
        assert not t[GUARD:-GUARD][padding].any(), name
    for name, t in call.arenas.items():
        for zone in (slice(None, GUARD), slice(-GUARD, None)):
            assert_same_bits(t[zone], before[name][zone], name)


@each_dtype
@pytest.mark.parametrize("norm_sq", [NAN, INF], ids=["NaN", "infinite"])
def test_a_norm_that_is_not_finite_perturbs_nothing_and_poisons_the_gradient(norm_sq, dtype, backend):
    sizes = (5, 300)
    call = make("perturb", {**VARIANTS["perturb"]["not finite"], "norm_sq": norm_sq}, dtype, sizes)
    a, before = call.arguments, copy.deepcopy(call.arguments)
    call.run(backend)
    assert_same_bits(a["weights"][0], before["weights"][0], "weights")
    assert_same_bits(a["ema"], before["ema"], "ema")
    assert a["ema"].isnan().any()
    assert a["achieved_sq"].sum().item() == 0
    for _, _, offset, numel, _ in a["chunks"].tolist():
        assert_same_bits(a["saved"][offset : offset + numel], before["weights"][0][offset : offset + numel], "saved")

    for grads in ({}, {"grads": True}):
        restore = make("restore", {"weights": True, "acc": True, **grads, "c": 0.3, "norm_sq": norm_sq}, dtype, sizes)
        restore.run(backend)
        a = restore.arguments
        assert all(t.isnan().all() for t in a["acc"])
        assert_same_bits(a["weights"][0], a["saved"], "weights")

    # A plain optimizer that gets a NaN gradient makes NaN weights; the fused update is no different.
    for operator, options in (("sgd", {"momentum": 0.9}), ("adam", {})):
        for acc in ({}, {"acc": True}):
            update = make(operator, {**options, **acc, "saved": True, "norm_sq": norm_sq}, dtype, sizes)
            update.run(backend)
            assert update.arguments["weights"][0].isnan().all()


# ---- errors ----------------------------------------------------------------------------------------------------------


def _with(**changes) -> Callable[[dict], dict]:
    return lambda a: {**a, **{n: v(a[n]) if callable(v) else v for n, v in changes.items()}}


def _row(**columns) -> Callable[[dict], dict]:
    """The table's last row with other entries."""

    def change(a):
        chunks = a["chunks"].clone()
        for name, value in columns.items():
            chunks[-1, ("segment", "begin", "offset", "numel", "group").index(name)] = value
        return {**a, "chunks": chunks}

    return change


def _half(t: Tensor) -> Tensor:
    return t[: len(t) // 2]


def _by_columns(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def _gappy(tensors: list[Tensor]) -> list[Tensor]:
    return [t.repeat(2)[::2] for t in tensors]


def _as(dtype: torch.dtype) -> Callable:
    return lambda v: [t.to(dtype) for t in v] if isinstance(v, list) else v.to(dtype)


HUGE = 2**63 - 1
INT, FP32, FP64, BF16 = torch.int32, torch.float32, torch.float64, torch.bfloat16
# name: (operator, variant, change, what the message says)
ERRORS: dict[str, tuple[str, str, Callable[[dict], dict], str]] = {
    "chunks of int32": ("sgd", "plain", _with(chunks=_as(INT)), "chunks must be a contiguous int64 .* Int"),
    "chunks of four columns": ("sgd", "plain", _with(chunks=lambda t: t[:, :4].contiguous()), "chunks .*5"),
    "chunks by columns": ("sgd", "plain", _with(chunks=_by_columns), "chunks must be a contiguous"),
    "a row past the gradient": ("inner_products", "plain", _row(numel=34), r"chunk 2 .* grads\[2\]"),
    "a row past the flat weights": ("sgd", "plain", _row(offset=1000), r"chunk 2 .* weights\[0\]"),
    "a row past the listed weights": ("sgd", "listed", _row(begin=1), r"chunk 2 .* weights\[2\]"),
    "a row past saved": ("perturb", "plain, saving", _with(saved=_half), r"chunk \d .* saved\[0\]"),
    "a row past ema": ("perturb", "friendly", _with(ema=_half), r"chunk \d .* ema\[0\]"),
    "a row past momentum_buffer": (
        "sgd",
        "momentum",
        _with(momentum_buffer=_half),
        r"chunk \d .* momentum_buffer\[0\]",
    ),
    "a row past exp_avg": ("adam", "plain", _with(exp_avg=_half), r"chunk \d .* exp_avg\[0\]"),
    "a row past exp_avg_sq": ("adam", "plain", _with(exp_avg_sq=_half), r"chunk \d .* exp_avg_sq\[0\]"),
    "a row past max_exp_avg_sq": ("adam", "amsgrad", _with(max_exp_avg_sq=_half), r"chunk \d .* max_exp_avg_sq\[0\]"),
    "a negative begin": ("inner_products", "plain", _row(begin=-1), "chunk 2 .* grads"),
    "a negative offset": ("sgd", "plain", _row(offset=-1), "chunk 2 .* weights"),
    "a negative count": ("restore", "mean alone", _row(numel=-1), "chunk 2 .* acc"),
    "a negative segment": ("sgd", "plain", _row(segment=-1), "chunk 2 "),
    "a segment that is not there": ("inner_products", "plain", _row(segment=3), r"chunk 2 .* grads\[3\]"),
    "a count whose end wraps round": ("inner_products", "plain", _row(begin=1, numel=HUGE), "chunk 2 .* grads"),
    "an offset whose end wraps round": ("sgd", "plain", _row(offset=HUGE), "chunk 2 .* weights"),
    "a group that is not there": ("perturb", "plain", _row(group=3), "chunk 2 names group 3, hyper has 3 rows"),
    "a negative group": ("adam", "plain", _row(group=-1), "chunk 2 names group -1"),
    "integer weights": ("sgd", "plain", _with(weights=_as(INT), grads=_as(INT)), "dtype must be .* Int"),
    "gradients of another dtype": ("perturb", "plain", _with(grads=_as(BF16)), "grads must be Float .* BF"),
    "a mean of another dtype": ("restore", "mean alone", _with(grads=_as(FP64)), "grads must be Float .* Double"),
    "saved of another dtype": ("restore", "weights alone", _with(saved=_as(FP64)), "saved must be Float"),
    "ema of another dtype": ("inner_products", "friendly", _with(ema=_as(FP64)), "ema must be Float"),
    "gradients with gaps": ("inner_products", "plain", _with(grads=_gappy), "grads must be dense .* strides"),
    "saved with gaps": ("perturb", "plain, saving", _with(saved=lambda t: t.repeat(2)[::2]), "saved must be dense"),
    "norm_sq of fp32": ("perturb", "plain", _with(norm_sq=_as(FP32)), "norm_sq must be .* float64 .* Float"),
    "norm_sq without terms": ("restore", "first micro-batch", _with(norm_sq=lambda t: t[:0]), "norm_sq must be .*0"),
    "achieved_sq of fp32": ("ascend", "plain", _with(achieved_sq=_as(FP32)), "achieved_sq must be .* float64 .* Float"),
    "achieved_sq too short": (
        "perturb",
        "plain",
        _with(achieved_sq=_half),
        "achieved_sq must be .*one value per chunk",
    ),
    "hyper of fp32": ("sgd", "plain", _with(hyper=_as(FP32)), "hyper must be a contiguous float64 .* Float"),
    "hyper with too few columns": ("adam", "plain", _with(hyper=lambda t: t[:, :7].contiguous()), "hyper .*>= 9.*7"),
    "hyper by columns": ("sgd", "plain", _with(hyper=_by_columns), "hyper must be a contiguous"),
    "fresh as bool": ("sgd", "momentum, some fresh", _with(fresh=_as(torch.bool)), "fresh must be .* Bool"),
    "fresh too short": ("sgd", "momentum, some fresh", _with(fresh=_half), "chunk 1 names segment 1, fresh has 1"),
    "step of int64": ("adam", "plain", _with(step=_as(torch.int64)), "step must be .* Long"),
    "step too short": ("adam", "plain", _with(step=_half), "chunk 2 names segment 2, step has 2"),
    "acc too short": ("restore", "mean alone", _with(acc=lambda v: v[:2]), r"chunk 2 .* acc\[2\]"),
    "momentum without a buffer": ("sgd", "momentum", _with(momentum_buffer=None), "momentum needs a momentum_buffer"),
    "amsgrad without a maximum": ("adam", "amsgrad", _with(max_exp_avg_sq=None), "amsgrad needs max_exp_avg_sq"),
    "eta without weights": ("inner_products", "adaptive", _with(weights=[]), "eta needs the weights"),
    "no gradients to add up": ("inner_products", "plain", _with(grads=[]), "grads are empty"),
    "coefs of fp32": ("adam", "scaled", _with(coefs=_as(FP32)), "coefs must be .* float64 .* Float"),
    "too many coefs": ("adam", "scaled", _with(coefs=lambda t: t.repeat(4)), "coefs must be .* 1 to 3 values.*4"),
    "too few lists": (
        "sgd",
        "combined from saved",
        _with(grads=lambda v: v[:5]),
        "grads must .* each of 2 coefs, got 5",
    ),
    "a second list of another dtype": (
        "sgd",
        "combined from saved",
        _with(grads=lambda v: [*v[:3], *(t.double() for t in v[3:])]),
        "grads must be Float .* Double",
    ),
    "a row past the second list": (
        "sgd",
        "combined from saved",
        _with(grads=lambda v: [*v[:5], v[5][:5]]),
        r"chunk 2 .* grads\[2\]",
    ),
    "dots without y": ("dots", "plain", _with(y=[]), "y is empty"),
    "restore without saved": ("restore", "weights alone", _with(saved=None), "saved, which is missing"),
    "restore without acc": ("restore", "mean alone", _with(acc=[]), "acc.*"),
    "acc without acc_sq": ("perturb", "from origin, adding", _with(acc_sq=None), "acc and acc_sq go together"),
    "acc_sq without acc": ("perturb", "from origin, adding", _with(acc=[]), "acc and acc_sq go together"),
    "acc_sq too short": ("perturb", "from origin, adding", _with(acc_sq=_half), "acc_sq must be .*one value per chunk"),
    "acc of another dtype": ("perturb", "from origin, adding", _with(acc=_as(FP64)), "acc must be Float .* Double"),
    "a row past what is added to": (
        "perturb",
        "from origin, adding",
        _with(acc=lambda v: [*v[:2], v[2][:5]]),
        r"chunk 2 .* acc\[2\]",
    ),
    "perturb without weights": ("perturb", "plain", _with(weights=[]), "weights"),
    "perturb without gradients": ("perturb", "plain", _with(grads=[]), "grads"),
    "sgd without weights": ("sgd", "plain", _with(weights=[]), "sgd needs weights and grads"),
    "sgd without gradients": ("sgd", "plain", _with(grads=[]), "sgd needs weights and grads"),
    "adam without weights": ("adam", "plain", _with(weights=[]), "adam needs weights and grads"),
    "adam without gradients": ("adam", "plain", _with(grads=[]), "adam needs weights and grads"),
}


def provoke(name: str) -> dict[str, Any]:
    operator, variant, change, _ = ERRORS[name]
    flat = variant != "listed"
    call = make(operator, variant if flat else "plain", sizes=(5, 40, 33), flat=flat)
    tensors, before = call.tensors(), copy.deepcopy(call.tensors())
    call.arguments = change(call.arguments)
    try:
        call.run()
        error = None
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    changed = [n for n, t in before.items() if not torch.equal(t.view(torch.uint8), tensors[n].view(torch.uint8))]
    return {"name": name, "error": error, "changed": changed}


@pytest.fixture(scope="module")
def errors(extension) -> dict[str, dict]:
    """What each bad call leads to, out of a child process: what these checks prevent is a crash."""
    reports: dict[str, dict] = {}
    while missing := [n for n in ERRORS if n not in reports]:
        done = child("errors", *missing)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        reports.update((line["name"], line) for line in lines)
        if len(lines) < len(missing):  # it died in the next one; go on after that
            name = missing[len(lines)]
            reports[name] = {"error": f"exit status {done.returncode}: {done.stderr[-300:]}", "changed": []}
    return reports


@pytest.mark.parametrize("name", ERRORS)
def test_a_bad_call_is_refused_by_name_and_changes_nothing(name, errors):
    report = errors[name]
    assert report["error"] is not None, "nothing was raised"
    assert re.match("RuntimeError: .*" + ERRORS[name][3], report["error"])
    assert "\n" not in report["error"], "one sentence, without the C++ stack"
    assert report["changed"] == []


def test_a_list_with_something_else_in_it_is_refused_and_its_tensors_live_on(extension):
    x, table = torch.arange(4.0), torch.tensor([[0, 0, 0, 4, 0]])
    count = x._use_count()
    with pytest.raises(TypeError, match="expected a list of tensors, got NoneType in it"):
        ops._C.dots([x, None], [x], [], table)
    assert x._use_count() == count
    assert x.tolist() == [0, 1, 2, 3]


# ---- beyond 2^31 elements --------------------------------------------------------------------------------------------

FAR = 2**31 + 12345


def _huge(n: int) -> Tensor:
    try:
        return torch.empty(n, dtype=torch.bfloat16)
    except RuntimeError as e:
        pytest.skip(f"no address space for {n} elements: {e}")


@pytest.mark.parametrize(("operator", "variant"), FINITE_CASES, ids=lambda v: v)
def test_a_place_beyond_2_31_elements_gives_the_bits_of_a_near_one(operator, variant):
    # One real tensor of more than 2^31 elements, of which the system only backs the pages that are touched. Every argument
    # is a window of it, shifted so that the parts that the table names lie side by side.
    n, room = 700, 4096
    near = make(operator, variant, torch.bfloat16, (n,), groups=1)
    far, windows = copy.deepcopy(near), itertools.count()
    memory = _huge(FAR + room * 16)

    def moved(t: Tensor) -> Tensor:
        start = next(windows) * room
        window = memory[start : start + FAR + n]
        window[FAR:] = t[:n]
        return window

    for name, value in far.arguments.items():
        if isinstance(value, list):
            far.arguments[name] = [moved(t) for t in value]
        elif isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            far.arguments[name] = moved(value)
        elif name == "mask":
            bits = np.pad(np.unpackbits(value.numpy(), bitorder="little"), (FAR % 8, 0))
            far.arguments[name] = torch.empty(FAR // 8 + room, dtype=torch.uint8)
            packed = torch.from_numpy(np.packbits(bits, bitorder="little"))
            far.arguments[name][FAR // 8 :][: len(packed)] = packed
    far.arguments["chunks"] = far.arguments["chunks"] + torch.tensor([0, FAR, FAR, 0, 0])
    if "step" in far.arguments:
        far.arguments["step"] += 1  # counted by the row that begins a segment, which is not among these
    results = [near.run(), far.run()]
    for name, value in near.arguments.items():
        for a, b in each_tensor(value, far.arguments[name]):
            if a.dtype == torch.bfloat16:
                assert_same_bits(b[FAR:], a[:n], name)
    if results[0] is not None:
        assert_same_bits(*results, "the result")


def sum_perturb_and_restore_beyond_32_bits() -> None:
    n = 2**31 + 3 * CHUNK + 5
    begin = torch.arange(0, n, CHUNK)
    chunks = torch.stack([begin * 0, begin, begin, (n - begin).clamp(max=CHUNK), begin * 0], 1)
    weights, grad = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.bfloat16)
    grad[::1000] = 1.0
    grad[torch.tensor([1, 2**31 - 1, 2**31 + 1, n - 1])] = torch.tensor([1.5, -2.0, 3.0, -4.0], dtype=torch.bfloat16)
    kernels = ops.get_backend("cpu", torch.device("cpu"))
    norm_sq = kernels.inner_products([], [grad], chunks)
    expected = -(-n // 1000) + 1.5**2 + 2**2 + 3**2 + 4**2
    assert norm_sq.item() == expected
    # With rho = ||g|| and zero weights, w + e is g.
    achieved_sq = torch.empty(len(chunks), dtype=torch.float64)
    kernels.perturb(
        [weights], [], [grad], chunks, norm_sq=norm_sq, hyper=norm_sq.sqrt()[:, None], achieved_sq=achieved_sq
    )
    assert torch.equal(weights, grad)
    assert achieved_sq.sum().item() == expected
    # In a single row, whose count does not fit 32 bits.
    weights.fill_(0.5)
    kernels.restore([weights], [], [], torch.tensor([[0, 0, 0, n, 0]]), saved=grad)
    assert torch.equal(weights, grad)


@pytest.mark.slow
def test_more_than_2_31_elements_are_all_summed_perturbed_and_restored():
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    if available < 10 << 30:
        pytest.skip("needs 10 GB of free memory")
    done = child("beyond-32-bits")
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "instruction-set":
        isa = ops._C.build_info()["instruction_set"]
        prints = fingerprint(CASES, 1, lambda _: SIZES)
        prints.update(fingerprint(STREAMED_CASES[1::2], 1, lambda itemsize: (STREAMED // itemsize, 257)))
        print(json.dumps({"isa": isa, "conversions": conversion_errors(), "fingerprint": prints}))
    elif sys.argv[1] == "errors":
        for error_name in sys.argv[2:]:
            print(json.dumps(provoke(error_name)), flush=True)
    elif sys.argv[1] == "beyond-32-bits":
        torch.set_num_threads(2)
        sum_perturb_and_restore_beyond_32_bits()
