# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: bit for bit what the specification says, and compiled ahead of time for GPUs that are not here.

On a GPU (MSAM_TEST_DEVICE) the numerics run there; elsewhere Triton interprets the kernels on CPU tensors (see conftest.py).
Run as a script, this file is the child process that compiles: nothing can be compiled where kernels are interpreted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import (
    BITS,
    CASES,
    CHUNK,
    DTYPES,
    EXPONENT,
    LARGEST,
    MIXED,
    VARIANTS,
    Call,
    assert_matches,
    assert_same_memory,
    assert_sums_are_rounded_once,
    coefs,
    in_turn,
    make,
    some_cases,
    table,
    with_layouts,
)
from msam_kernels import MicroBatchSAM, backends, methods
from plain import DEVICE
from test_golden import BATCHES, GOLDEN, TOLERANCE, WAYS, Problem

ON_GPU = DEVICE.type != "cpu"
# Triton 3.6 converts as NumPy no longer likes.
_NUMPY = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
pytestmark = [pytest.mark.host, _NUMPY]  # data are made on the CPU, for both
SIZES = (0, 1, 3, 4, 5, 255, 257, 4097, 4096, 16, 48, 7, 96)
# Some parameters that a list lacks; 3 is in none of the terms but in out, 4 is in no list, 6 not in out.
ABSENT = {
    "grads": (2, 5),
    "out": (4, 6),
    "terms 0": (3, 4, 9),
    "terms 1": (3, 4, 8),
    "terms 2": (3, 4),
    "terms 3": (3, 4, 9),
}
LARGE = (CHUNK + 5, 7, 2 * CHUNK)


def of_two(first: int) -> pytest.MarkDecorator:
    """The large cases, of which every other one waits until everything runs."""
    params = [
        pytest.param(*case, marks=[] if ON_GPU or k % 2 == first else [pytest.mark.exhaustive])
        for k, case in enumerate(LARGEST)
    ]
    return pytest.mark.parametrize(("operator", "variant"), params, ids=lambda v: v)


def bf16_as_torch_rounds(x, from_type, to_type, rounding):
    """In place of the interpreter's own conversion between bf16 and fp32, which cuts off."""
    if to_type.name == "bf16":
        return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).float().numpy()


_PATCHED: set[str] = set()


class _Patched:
    def restore(self):
        pass


def patch_once(function, patch=None):
    """Interpreted, every call of a function in a kernel patches triton.language anew, which took most of the time."""
    module = function.__globals__["__name__"]
    if module not in _PATCHED:
        patch(function)
        _PATCHED.add(module)
    return _Patched()


def reduced_by_halves(self, input):
    """In place of the interpreter's own reduction by a function of ours, which takes one element after the other."""
    values = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
    while len(values[0]) > 1:
        half = len(values[0]) // 2
        operands = [
            self.to_tensor(v[part], t.dtype)
            for part in (slice(half), slice(half, None))
            for v, t in zip(values, input, strict=True)
        ]
        values = [t.handle.data for t in self.combine_fn.fn(*operands)]
    return [self.to_tensor(v[0], t.dtype) for v, t in zip(values, input, strict=True)]


@pytest.fixture(autouse=True)
def _triton():
    if find_spec("triton") is None:
        missing = "triton is not installed: pip install triton"
        pytest.fail(missing, pytrace=False) if os.environ.get("CI") else pytest.skip(missing)
    if backends.available_backends()["triton"]:
        pytest.skip(backends.available_backends()["triton"])
    if ON_GPU:
        yield
        return
    from triton.runtime import interpreter

    with (
        np.errstate(all="ignore"),  # the interpreter computes with NumPy, which warns of NaN and infinity
        mock.patch("triton.runtime.interpreter._convert_float", bf16_as_torch_rounds),
        mock.patch("triton.runtime.interpreter.ReduceOps.generic_reduce", reduced_by_halves),
        mock.patch("triton.runtime.interpreter._patch_lang", partial(patch_once, patch=interpreter._patch_lang)),
    ):
        yield


@pytest.fixture
def kernels():
    return backends.get_backend("triton", DEVICE)


def run(call: Call) -> Tensor | None:
    return call.run(backends.get_backend("triton", DEVICE))


def assert_as_specified(call: Call) -> None:
    assert_matches(call, backends.get_backend("triton", DEVICE), device=DEVICE)


# ---- against the specification ---------------------------------------------------------------------------------------


# The interpreter takes its time, and does the same to aligned memory: each case in fp32 and in one other layout, and of every
# six cases two in one of these where not everything is tried.
@with_layouts(lambda k, j: ON_GPU or k % 6 == (0 if j == 0 else 1), lambda k, j: ON_GPU or j in (0, in_turn(k)))
def test_triton_kernels_give_the_bits_of_the_specification(operator, variant, dtype, flat, shift):
    assert_as_specified(make(operator, variant, dtype, SIZES, flat=flat, shift=shift, absent=ABSENT))


RANDOM = [(operator, variant) for operator, variant in CASES if "noise" in VARIANTS[operator][variant]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("operator", "variant"),
    [pytest.param(*case, marks=pytest.mark.exhaustive if k % 5 else []) for k, case in enumerate(RANDOM)],
    ids=lambda v: v,
)
def test_random_rounding_gives_the_bits_of_the_specification(operator, variant, dtype):
    """Of rows in 128-bit accesses, which share a call of the generator, and of others."""
    assert_as_specified(make(operator, variant, dtype, (4096, 80, 33, 16, 5), chunk=2064))


@some_cases(1 if ON_GPU else 5)
def test_rows_of_any_length(operator, variant):
    assert_as_specified(make(operator, variant, sizes=(100, 33, 1), chunk=48, groups=2))


@of_two(0)
def test_several_rows_of_a_parameter(operator, variant):
    assert_as_specified(make(operator, variant, sizes=LARGE))


@of_two(1)
def test_more_rows_than_programs(operator, variant, kernels):
    with mock.patch.object(kernels, "PROGRAMS", 3):
        assert_as_specified(make(operator, variant, sizes=(400, 0, 333), chunk=64))


def misaligned(tensors: list[Tensor], of: range) -> None:
    for i in of:
        memory = tensors[i].new_empty(len(tensors[i]) + 1)
        memory[1:] = tensors[i]
        tensors[i] = memory[1:]


def test_one_misaligned_list_of_several():
    call = make("update", "sgd, three terms", sizes=(4096, 512, 48))
    misaligned(call.arguments["terms"], range(6, 9))
    assert_as_specified(call)


def test_only_misaligned_gradients():
    call = make("ascend", "friendly, some fresh", sizes=(4096, 512, 48))
    misaligned(call.arguments["grads"], range(3))
    assert_as_specified(call)


@pytest.mark.parametrize("sizes", [(0,), (0, 0)], ids=["one parameter", "two parameters"])
@pytest.mark.parametrize("flat", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["flat", "listed"])
def test_nothing_to_do(flat, sizes):
    for operator, variant in CASES:
        assert_as_specified(make(operator, variant, sizes=sizes, flat=flat))


def test_a_vector_that_is_absent_counts_nothing_beside_an_infinite_one(kernels):
    rows, *_ = table((3, 2))
    terms = [torch.full((3,), np.inf), torch.ones(2), torch.empty(0), torch.ones(2)]
    sums = kernels.gram([t.to(DEVICE) for t in terms], rows.to(DEVICE), count=2).sum(-1)
    assert sums.tolist() == [np.inf, 2.0, 2.0]


@pytest.mark.parametrize("n", [1, 257, 3 * 1024, CHUNK + 16])
def test_sums_of_doubles_are_rounded_once(n, kernels):
    assert_sums_are_rounded_once(kernels, n, 4, DEVICE)


def test_the_norm_of_many_terms_from_several_devices_is_summed_by_every_kernel():
    call = make("perturb", "plain", sizes=(300, 40))
    norm_sq = float(call.arguments["norm_sq"].sum())
    call.arguments["norm_sq"] = torch.full((3000,), norm_sq / 4096, dtype=torch.float64)
    ours = call.to(DEVICE)
    run(ours)
    call.run("reference")
    for name in ("weights", "saved", "achieved_sq"):
        torch.testing.assert_close(ours.arenas[name].cpu(), call.arenas[name], rtol=2**-23, atol=0, equal_nan=True)


def test_repeated_runs_are_identical():
    calls = [make("ascend", "friendly and adaptive", sizes=LARGE).to(DEVICE) for _ in range(2)]
    assert torch.equal(*(run(call) for call in calls))
    assert_same_memory(*calls)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=[] if ON_GPU or k % 3 == 0 else pytest.mark.exhaustive)
        for k, variant in enumerate(VARIANTS["ascend"])
    ],
)
def test_one_launch_gives_the_bits_of_two(variant):
    one, two = (make("ascend", variant, sizes=(5, 0, 3 * CHUNK + 7, 40), absent=(1,)).to(DEVICE) for _ in range(2))
    norm_sq = run(one)
    assert one.arguments["arrived"].item() == 0, "or the next call would not wait"
    two.arguments["arrived"] = None
    assert torch.equal(norm_sq, run(two))
    assert_same_memory(one, two)


@pytest.mark.parametrize("variant", ["sgd, momentum", "adam", "adam, two terms"])
def test_the_ticket_counts_each_step_once_and_is_zero_between_calls(variant):
    absent = {"terms 0": (3, 4), "terms 1": (0, 3)}
    call = make("update", variant, sizes=(5, 0, 3 * CHUNK + 1, 40, 7), absent=absent).to(DEVICE)
    before = call.arguments["step"].tolist()
    for _ in range(3):
        run(call)
    counts = (3, 0, 3, 0, 3 * (variant == "adam, two terms"), 0)
    assert call.arguments["step"].tolist() == [t + n for t, n in zip(before, counts, strict=True)]


@pytest.mark.parametrize("beside", [(), (0.0,)], ids=["alone", "beside a coefficient of 0"])
def test_a_sum_that_is_out_itself_is_neither_read_nor_written(beside):
    call = make("descend", {"terms": (1.0, *beside), "alias": 0, "status": MIXED}, sizes=(4096, 5))
    for t in call.arguments["out"]:
        t.view(BITS[t.dtype]).fill_(EXPONENT[t.dtype] | 1)  # a signalling NaN, which arithmetic would make a quiet one
    ours = call.to(DEVICE)
    run(ours)
    out = {name: t for name, t in call.arenas.items() if name.startswith("terms")}
    assert len(out) == 2 + 2 * len(beside)
    for name, t in out.items():
        assert torch.equal(ours.arenas[name].cpu().view(torch.int32), t.view(torch.int32))


# ---- launches, and what is kept for them -------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", VARIANTS)
def test_an_operator_is_one_launch(operator, kernels):
    for variant in (variant for name, variant in CASES if name == operator):
        call = make(operator, variant, sizes=(5, 0, 40)).to(DEVICE)
        with mock.patch.object(kernels, "_launch") as launch:
            run(call)  # the first time on a GPU loads what a capture needs
            launch.reset_mock()
            run(call)
        # F-SAM's mean moves on from micro-batch to micro-batch.
        moves = operator == "ascend" and "lmbda" in call.arguments
        assert launch.call_count == (call.arguments.get("stack", 1) if moves else 1), variant


def test_tables_of_pointers_are_kept_while_the_addresses_stay_and_are_few(kernels):
    kernels._tables.clear()
    call = make("norm", "plain", sizes=(5, 40)).to(DEVICE)
    run(call), run(call)
    assert len(kernels._tables) == 1
    grads = call.arguments["grads"]
    memory = [torch.randn(40, device=DEVICE) for _ in range(kernels.TABLES + 5)]
    for m in memory:
        grads[1] = m
        expected = grads[0].double().square().sum() + m.double().square().sum()
        torch.testing.assert_close(run(call).sum(), expected, rtol=1e-14, atol=0)
    assert len(kernels._tables) == kernels.TABLES


def test_coefficients_that_depend_on_no_sum_need_no_table_of_their_own(kernels):
    kernels._tables.clear()
    call = make("descend", "mean", sizes=(5, 40)).to(DEVICE)
    for share in (0.5, 0.25, 0.125):
        call.arguments["coefs"] = coefs([1 - share, share])
        run(call)
    assert len(kernels._tables) == 1


def test_words_written_by_a_kernel_are_those_that_were_copied(kernels):
    call = kernels._Call(torch.zeros(0, 5, dtype=torch.int64, device=DEVICE), grads=[torch.zeros(1)])
    words = (*(2**40 + 3 * i for i in range(36)), -(2**60))
    content = kernels._bytes(words)
    assert call._captured(content)[:37].tolist() == call._copied(content).tolist() == list(words)


# ---- arguments ---------------------------------------------------------------------------------------------------------

VARIANTS_TO_CHANGE = {
    **{"norm": "plain", "perturb": "masked", "ascend": "friendly", "gram": "two"},
    **{"descend": "weights and mean, combined and rescaled", "update": "adam, everything"},
}
GRAM_OF_4 = torch.ones(10, 1, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("ascend", {"grads": lambda a: [g.double() for g in a["grads"]]}, "grads must be torch.float32"),
        ("ascend", {"grads": lambda a: [a["grads"][0][::2]] * 2}, "grads must be dense"),
        ("ascend", {"weights": lambda a: []}, "weights missing"),
        ("ascend", {"grads": lambda a: []}, "grads are missing"),
        ("ascend", {"table": lambda a: a["table"].int()}, "table must be a contiguous int64"),
        ("ascend", {"radii": lambda a: a["radii"].float()}, "radii must be a contiguous 2-d torch.float64"),
        ("ascend", {"radii": lambda a: a["radii"][:, :1].contiguous()}, "radii must have 2 columns, got 1"),
        ("ascend", {"achieved_sq": lambda a: a["achieved_sq"][:1]}, "achieved_sq must have one element per row"),
        ("ascend", {"ema": lambda a: a["ema"].bfloat16()}, "ema must be torch.float32"),
        ("ascend", {"arrived": lambda a: torch.zeros(2, dtype=torch.int32)}, "arrived must have one element"),
        ("ascend", {"arrived": lambda a: a["arrived"].float()}, "arrived must be a contiguous 1-d torch.int32"),
        ("norm", {"eta": lambda a: 0.1, "weights": lambda a: []}, "eta needs the weights"),
        ("perturb", {"mask": lambda a: a["saved"]}, "mask must be .* torch.uint8"),
        ("perturb", {"status": lambda a: a["status"].int()}, "status must be .* torch.uint8"),
        ("perturb", {"weights": lambda a: [a["saved"]] * 3}, "one tensor per parameter"),
        ("gram", {"terms": lambda a: []}, "terms missing"),
        ("gram", {"terms": lambda a: a["terms"][:3]}, "one tensor per parameter"),
        ("gram", {"terms": lambda a: [*a["terms"][:3], a["terms"][3].double()]}, "terms must be torch.float32"),
        ("gram", {"count": lambda a: 4}, "count must be 1 to 3, got 4"),
        ("descend", {"saved": lambda a: None}, "saved, which is missing"),
        ("descend", {"status": lambda a: None}, "saved and status go together"),
        ("descend", {"coefs": lambda a: a["coefs"][:-1]}, "coefs must be 7 numbers for each of at most 4 terms, got 20"),
        ("descend", {"coefs": lambda a: a["coefs"] * 2}, "coefs must be 7 numbers for each of at most 4 terms, got 42"),
        ("descend", {"coefs": lambda a: [*a["coefs"][:17], 9.0, *a["coefs"][18:]]}, None),  # of no ratio
        ("descend", {"coefs": lambda a: [*a["coefs"][:3], 9.0, *a["coefs"][4:]]}, "coefs name the sums 9 and 2, .* are 4"),
        ("descend", {"terms": lambda a: a["terms"][:-1]}, "terms must be as many lists .* 3; got 5"),
        ("descend", {"out": lambda a: a["out"][:1]}, "one tensor per parameter"),
        ("descend", {"rescale": lambda a: 4}, "rescale must be -1 or one of the 4 sums, got 4"),
        ("descend", {"sums": lambda a: [*a["sums"]] * 2}, "sums must be at most 3 tensors of 8 rows .* 4 tensors of 8"),
        ("descend", {"sums": lambda a: [a["sums"][0].float()]}, r"sums\[0\] must be .* torch.float64"),
        ("descend", {"sums": lambda a: [a["sums"][0][:, :0]]}, r"sums\[0\] is empty"),
        ("descend", {"sums": lambda a: [a["sums"][0][:2], *a["sums"]]}, r"sums\[0\] must be the Gram matrix .* got 2"),
        ("descend", {"sums": lambda a: [GRAM_OF_4[:6]], "coefs": lambda a: a["coefs"][:14], "terms": lambda a: a["terms"][:4]},
         "Gram matrix .* 2, got 6"),
        ("descend", {"norm_sq": lambda a: a["saved"]}, "norm_sq must be .* torch.float64"),
        ("descend", {"out_sq": lambda a: a["out_sq"][:1]}, "out_sq must have one element per row"),
        ("update", {"rule": lambda a: 2}, "rule must be"),
        ("update", {"settings": lambda a: a["settings"][:, :4].contiguous()}, "settings must have 8 columns"),
        ("update", {"rates": lambda a: torch.zeros(0, dtype=torch.float64)}, "rates go with one term"),
        ("update", {"states": lambda a: a["states"][:1]}, "states must be"),
        ("update", {"states": lambda a: [t.bfloat16() for t in a["states"]]}, "exp_avg must be torch.float32"),
        ("update", {"step": lambda a: a["step"][:-1].clone()}, "step must have .* one more, 3, got 2"),
        ("update", {"step": lambda a: None}, "states need step"),
        ("update", {"found_inf": lambda a: torch.zeros(2)}, r"found_inf must have one element, got shape \[2\]"),
        ("update", {"found_inf": lambda a: a["settings"][0, 0]}, "found_inf must be .* torch.float32"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_is_touched(operator, change, message, kernels):
    call = make(operator, VARIANTS_TO_CHANGE[operator], sizes=(5, 40)).to(DEVICE)
    kernels._tables.clear()
    before = call.to(DEVICE)
    call.arguments.update({name: changed(call.arguments) for name, changed in change.items()})
    if message is None:
        run(call)
        return
    with pytest.raises(RuntimeError, match=message):
        run(call)
    assert_same_memory(call, before)


def with_less_memory(t: Tensor, nbytes: int) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(nbytes)
    return t


# What a tensor may become whose values are not where its address says, and what the message says.
USELESS = {
    "freed": (lambda t: with_less_memory(t, 0), "freed or shrunk"),
    "shrunk": (lambda t: with_less_memory(t, t.nbytes - t.element_size()), "freed or shrunk"),
    "negated": (lambda t: torch._neg_view(t), r"resolve_neg\(\)"),
    "meta": (lambda t: t.to("meta"), "one device, got .* and meta"),
    "sparse": (Tensor.to_sparse, "must be strided"),
}


@pytest.mark.usefixtures("extension")
def test_addresses_are_the_same_from_the_extension_and_from_python(kernels, monkeypatch):
    lists = {"grads": [torch.randn(3, 2).t(), torch.zeros(0), torch.nn.Parameter(torch.randn(4))], "none": []}
    lists["grads"] = [t.to(DEVICE) for t in lists["grads"]]
    call = kernels._Call(torch.zeros(0, 5, dtype=torch.int64, device=DEVICE), grads=lists["grads"])
    content, checked = call._addresses(lists)
    assert checked
    monkeypatch.setattr(kernels, "_dense_addresses", None)
    assert call._addresses(lists) == (content, False)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("what", ["freed", "shrunk", "negated", "meta", "sparse", "bfloat16", "gaps"])
def test_what_is_not_as_kernels_take_it_has_no_address(what, kernels):
    kinds = {
        **{name: make for name, (make, _) in USELESS.items()},
        "bfloat16": Tensor.bfloat16,
        "gaps": lambda t: t[:, :2],
    }
    bad = kinds[what](torch.randn(4, 5, device=DEVICE))
    good = torch.randn(3, device=DEVICE)
    assert kernels._dense_addresses([[good]], torch.float32, good.device) == kernels._bytes([good.data_ptr()])
    assert kernels._dense_addresses([[good], [good, bad]], torch.float32, good.device) is None


@pytest.mark.parametrize("known", [False, True], ids=["", "after a call with the same addresses"])
@pytest.mark.parametrize("what", USELESS)
@pytest.mark.parametrize("operator", VARIANTS_TO_CHANGE)
def test_a_tensor_without_its_values_is_refused_by_name_wherever_it_is(operator, what, known, kernels):
    change, message = USELESS[what]
    call = make(operator, VARIANTS_TO_CHANGE[operator], sizes=(5, 40)).to(DEVICE)
    kernels._tables.clear()
    if known:
        run(call)
    before = call.to(DEVICE)
    for name, value in call.arguments.items():
        several = isinstance(value, list) and value and isinstance(value[0], Tensor)
        t = value[-1] if several else value
        if not isinstance(t, Tensor) or name == "table" or (what == "negated" and not t.is_floating_point()):
            continue
        bad = [*value[:-1], change(t)] if several else change(t)
        with pytest.raises(RuntimeError, match=message) as error:
            run(Call(operator, {**call.arguments, name: bad}))
        named = rf"(max_exp_avg_sq|{name}\[{len(value) - 1}\])" if several and len(value) > 1 else name
        assert re.match(named, str(error.value))
        assert_same_memory(call, before)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("way", ["extension", "Python"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.view(torch.int32), "must be torch.float32"),
        (lambda t: t.view(2, -1).as_strided((2, 10), (20, 2)), "must be dense in memory"),
        (lambda t: t.as_strided((40,), (0,)), "must be dense in memory"),
    ],
    ids=["another dtype", "gaps", "one element"],
)
@pytest.mark.parametrize("operator", ["norm", "gram", "descend", "update"])
def test_a_list_is_looked_at_where_another_was_before(operator, change, message, way, kernels, monkeypatch):
    if way == "Python":
        monkeypatch.setattr(kernels, "_dense_addresses", None)
    call = make(operator, VARIANTS_TO_CHANGE[operator], sizes=(5, 40)).to(DEVICE)
    kernels._tables.clear()
    run(call)  # whose table is kept
    before, name = call.to(DEVICE), "grads" if operator == "norm" else "terms"
    bad = [*call.arguments[name][:-1], change(call.arguments[name][-1])]
    assert bad[-1].data_ptr() == call.arguments[name][-1].data_ptr()
    with pytest.raises(RuntimeError, match=rf"{name}(\[\d\])? {message}"):
        run(Call(operator, {**call.arguments, name: bad}))
    assert_same_memory(call, before)


BAD_STACKS = {
    "grads that are a number": (
        {"grads": lambda t: t[0, 0]},
        r"grads\[0\] must have one row for each of 3 .* shape \[\]",
    ),
    "grads in another order": (
        {"grads": lambda t: t.t().contiguous().t()},
        r"grads\[0\] must have one micro-batch after the other in memory, got strides \[1, 3\]",
    ),
    "copies in another order": (
        {"weights": lambda t: t.t().contiguous().t()},
        r"weights must have one micro-batch after the other in memory, got strides \[1, 3\]",
    ),
}


@pytest.mark.parametrize("what", BAD_STACKS)
def test_a_stack_is_one_micro_batch_after_the_other(what, kernels):
    change, message = BAD_STACKS[what]
    call = make("ascend", "a stack", sizes=(5, 40)).to(DEVICE)
    before = call.to(DEVICE)
    changed = {name: [each(t) for t in call.arguments[name]] for name, each in change.items()}
    with pytest.raises(RuntimeError, match=message):
        run(Call("ascend", {**call.arguments, **changed}))
    assert_same_memory(call, before)


# ---- the choice of the backend ---------------------------------------------------------------------------------------


def test_triton_is_a_backend_by_name():
    assert "triton" in backends.BACKENDS
    assert backends.available_backends()["triton"] is None
    with mock.patch.object(backends.importlib.util, "find_spec", return_value=None):
        with pytest.raises(RuntimeError, match="pip install triton"):
            backends.get_backend("triton", DEVICE)
        backends._warn_once.cache_clear()
        told = pytest.warns(RuntimeWarning, match="plain torch and slower, is used on cuda, as triton is not installed")
        with told if backends.available_backends()["cuda"] else contextlib.nullcontext():
            assert not hasattr(backends.get_backend("auto", torch.device("cuda")), "PROGRAMS")


def test_an_old_triton_is_told_of_and_left_alone():
    old = mock.patch.object(backends.importlib.metadata, "version", return_value="3.5.1")
    with old, pytest.raises(RuntimeError, match=r"triton 3\.5\.1 is older than 3\.6"):
        backends.get_backend("triton", DEVICE)
    with mock.patch.object(backends.importlib.metadata, "version", return_value="3.10.0+git1"):
        backends.get_backend("triton", DEVICE)


def test_interpreted_kernels_serve_the_cpu_and_compiled_ones_the_gpu(kernels):
    assert kernels.INTERPRETED != ON_GPU
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET.*use backend='auto'"):
        backends.get_backend("triton", torch.device("cpu" if ON_GPU else "cuda"))


# ---- through the optimizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "flatten"),
    [
        pytest.param(way, flat, marks=[] if way == "passes" else pytest.mark.exhaustive)
        for way, flat in zip(WAYS, (True, False, True), strict=True)
    ],
)
@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [pytest.param(*case, marks=pytest.mark.exhaustive if case[1] == 1 and not ON_GPU else []) for case in GOLDEN],
)
def test_the_optimizer_follows_the_golden_trajectory(name, micro_batches, way, flatten):
    options = {"num_micro_batches": micro_batches, "flatten": flatten, "backend": "triton"}
    with DEVICE:
        problem = Problem("two scalars of two groups", name, **options)
        for batch, golden in zip(BATCHES, GOLDEN[name, micro_batches], strict=True):
            WAYS[way](problem, torch.tensor(batch, dtype=torch.float64), micro_batches)
            expected = torch.tensor(golden, dtype=torch.float64)
            torch.testing.assert_close(problem.weights, expected, **TOLERANCE)


BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "Adam": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "weight_decay": 1e-2}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("base", BASES)
def test_training_takes_the_same_steps_as_on_the_cpu(base, dtype):
    """On the CPU bit for bit, except for ‖d‖, which is summed in another order; a GPU computes other gradients."""
    kind, options = BASES[base]
    weights = []
    for backend, device in (("triton", DEVICE), ("cpu", torch.device("cpu"))):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(dtype)
        x, y = torch.randn(8, 7, dtype=dtype), torch.randn(8, 3, dtype=dtype)
        model, x, y = model.to(device), x.to(device), y.to(device)
        base_optimizer = kind(model.parameters(), **options)
        method = methods.FriendlySAM()
        opt = MicroBatchSAM(base_optimizer, rho=0.1, method=method, num_micro_batches=2, backend=backend)
        for _ in range(4):
            opt.train_step(lambda x, y, model=model: (model(x) - y).square().mean(), x, y)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).float().cpu())
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*weights, rtol=close, atol=close)


# ---- ahead of time, without a GPU ------------------------------------------------------------------------------------

TARGETS = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}
# Each width where most GPUs are, elsewhere what most users have.
COMPILED = [("sm_90", "fp32"), ("sm_90", "fp64"), ("sm_90", "bf16"), ("sm_80", "fp32"), ("gfx942", "fp32")]


def launched(dtype: torch.dtype) -> list[tuple]:
    """Every (kernel, constants) that the operators launch, with any options."""
    from msam_kernels.backends import triton_kernels as kernels  # not where it would be asked for its GPU

    found = {}

    def record(kernel, programs, *args, **constants):
        found[kernel.__name__, str(sorted(constants.items(), key=str))] = kernel, constants

    with mock.patch.object(kernels, "_launch", record):
        kernels._Call(torch.zeros(0, 5, dtype=torch.int64), grads=[torch.zeros(1)])._captured(bytes(8))
        for operator, variant in CASES:
            make(operator, variant, dtype, (5, 40)).run(kernels)
        shares, sums = torch.ones(3, dtype=torch.float64), torch.ones(3, 1, 1, dtype=torch.float64)
        for given in ([], [sums]):
            kernels.weigh(shares, coefs=coefs((1.0,)), sums=given)
    return list(found.values())


def resources(cubin: bytes) -> dict[str, str]:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout))


def inexact_instructions(ptx: str) -> list[str]:
    # An sm_80 adds two bf16 by fma with a one, or a pair of them.
    ones = set(re.findall(r"mov\.b(?:16|32)\s+(%\w+), (?:0x3F80|1065369472);", ptx))
    found = re.findall(r"(\S*(?:fma|mad\.\w*\.?f|ftz|approx|\.full\.)\S*)\s+([^;]*);", ptx)
    return sorted({name for name, args in found if "fma.rn.bf16" not in name or args.split(", ")[2] not in ones})


def compile_all(name: str, dtype: str) -> None:
    """Print, for each kernel that is launched, what it became: one line of JSON."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from msam_kernels.backends.triton_kernels import compiler_options

    target = TARGETS[name]
    for kernel, constants in launched(DTYPES[dtype]):
        signature = {p.name: "constexpr" if p.is_constexpr else "i64" for p in kernel.params}
        options = compiler_options(kernel, constants, target[0])
        asm = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget(*target), options=options).asm
        report = {"kernel": kernel.__name__, "constants": {k: str(v) for k, v in constants.items()}}
        if target[0] == "cuda":
            report["accesses"] = sorted(set(re.findall(r"\b(?:ld|st)\.global\S*", asm["ptx"])))
            report |= {"inexact": inexact_instructions(asm["ptx"]), "usage": resources(asm["cubin"])}
        else:
            report["accesses"] = sorted(set(re.findall(r"\b(?:global|buffer)_(?:load|store)\S*", asm["amdgcn"])))
        print(json.dumps(report), flush=True)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("target", "dtype"), COMPILED)
def test_every_kernel_compiles_ahead_of_time(target, dtype):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_INTERPRET": "0"}
    child = subprocess.run([sys.executable, __file__, target, dtype], capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr
    reports = [json.loads(line) for line in child.stdout.splitlines()]
    found = {report["kernel"].removesuffix("_kernel") for report in reports}
    assert found == {"norm", "ascend", "perturb", "gram", "weigh", "descend", "update", "write_words"}
    for report in reports:
        wide = {a for a in report["accesses"] if re.search(r"v4\.b32$|v2\.b64$|dwordx4$", a)}
        if report["kernel"] in ("write_words_kernel", "weigh_kernel"):
            continue
        assert any("ld" in a or "load" in a for a in wide), report
        assert report["kernel"] in ("norm_kernel", "gram_kernel") or any("st" in a for a in wide), report
        if target.startswith("sm_"):
            assert report["inexact"] == [], report
            assert (report["usage"]["STACK"], report["usage"]["LOCAL"]) == ("0", "0"), report
            plain = "True" not in report["constants"].values()
            if report["kernel"] in ("ascend_kernel", "perturb_kernel") and plain and dtype == "fp32":
                assert int(report["usage"]["REG"]) <= 64, (
                    "four programs of 256 threads share a multiprocessor's registers"
                )


if __name__ == "__main__":
    compile_all(*sys.argv[1:])
