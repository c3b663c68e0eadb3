# SPDX-License-Identifier: Apache-2.0
"""The operators: the specification by hand and against torch.optim, the compiled kernels against it, bit for bit.

Element-wise results must be equal in every bit, NaN aside, because both round at the same places and neither contracts
into FMA. Sums are only close to those of the specification, which adds in another order; they are held to exact sums
instead. Run as a script, this file is the child process of its own tests.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import math
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import (
    ABSENT,
    BITS,
    CASES,
    CHUNK,
    DTYPES,
    EXPONENT,
    HALF_ULP,
    INF,
    LARGEST,
    MIXED,
    NAN,
    ROUNDED_ONCE,
    SUMS,
    VARIANTS,
    Call,
    assert_matches,
    assert_same_bits,
    assert_same_memory,
    assert_sums_are_rounded_once,
    coefs,
    each_dtype,
    each_tensor,
    exact_sum_of_squares,
    make,
    spread,
    table,
    with_layouts,
)
from msam_kernels import backends
from msam_kernels.backends import reference
from msam_kernels.backends.reference import ADAM, PERTURBED, SAVED, SGD, UNTOUCHED

pytestmark = pytest.mark.host

CPU = torch.device("cpu")
ISAS = ("baseline", "avx2", "avx512")
SHARE = 65536  # elements that a thread of its own is worth, kShare of csrc/cpu/operators.cpp
LONG = 1 << 22  # elements of a call that is always shared, kLong there
STREAMED = (9 << 20) + 12  # bytes; from 8 MiB on the kernels store past the cache
STREAMED_CASES = [
    ("perturb", "any status, friendly"),
    ("perturb", "any status, masked, friendly and adaptive"),
    ("descend", "mean, anew"),
    ("descend", "copied"),
    ("update", "sgd, mean"),
    ("update", "adam, everything"),
]


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


def kernels_of(backend: str):
    return backends.get_backend(backend, CPU)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_values(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual, f64(*expected), rtol=1e-11, atol=1e-14, equal_nan=True)


# ---- by hand -----------------------------------------------------------------------------------------------------------

PAIR = table((2,), 8)[0]  # one parameter of two elements
RADII = torch.tensor([[0.5, INF]], dtype=torch.float64)  # rho, and no budget
DIRECTIONS = {
    # options, ‖d‖², e of radius 0.5, the next ema
    "plain": ({}, 25.0, (0.3, 0.4), None),
    "friendly, half of it fresh": (
        {"ema": f64(1.0, NAN), "sigma": 0.5, "lmbda": 0.6},
        *(2.5**2 + 16, (1.25 / math.sqrt(22.25), 2.0 / math.sqrt(22.25)), (1.8, 4.0)),
    ),
    "ema only read": ({"ema": f64(0.0, 4.0), "sigma": 1.0}, 9.0, (0.5, 0.0), (0.0, 4.0)),
    # T_w = (3, 2), so T_w d = (9, 8) and T_w² d = (27, 16).
    "adaptive": ({"eta": 1.0}, 145.0, (13.5 / math.sqrt(145), 8.0 / math.sqrt(145)), None),
    "friendly and adaptive": (
        {"eta": 1.0, "ema": f64(2.0, 4.0), "sigma": 1.0, "lmbda": 0.5},
        *(9.0, (1.5, 0.0), (2.5, 4.0)),
    ),
    "masked": ({"mask": torch.tensor([0b11111110], dtype=torch.uint8)}, 25.0, (0.0, 0.4), None),
    # budget / ‖d‖ is 0.2, or more than the radius.
    "a budget that binds": ({"radii": f64(0.5, 1.0).view(1, 2)}, 25.0, (0.12, 0.16), None),
    "a budget that binds, downhill": ({"radii": f64(-0.5, 1.0).view(1, 2)}, 25.0, (-0.12, -0.16), None),
    "a budget that does not bind": ({"radii": f64(0.5, 2.6).view(1, 2)}, 25.0, (0.3, 0.4), None),
    "a budget of nothing": ({"radii": f64(0.5, 0.0).view(1, 2)}, 25.0, (0.0, 0.0), None),
    "a budget of an adaptive one": (
        {"eta": 1.0, "radii": f64(0.5, 1.45).view(1, 2)},
        *(145.0, (0.27, 0.16), None),
    ),
}


@pytest.mark.parametrize("operator", ["norm and perturb", "ascend"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_ascent_follows_its_formula(direction, operator, backend):
    options, norm_sq, e, ema = copy.deepcopy(DIRECTIONS[direction])
    kernels, w, grads = kernels_of(backend), f64(-2.0, 1.0), [f64(3.0, 4.0)]
    written = {"saved": f64(NAN, NAN), "status": torch.zeros(1, dtype=torch.uint8), "achieved_sq": f64(NAN)}
    arguments = {**written, "radii": RADII, **options}
    if operator == "ascend":
        found = kernels.ascend([w], grads, PAIR, **arguments)
    else:
        found = kernels.norm([w], grads, PAIR, **{n: options[n] for n in ("ema", "sigma", "eta") if n in options})
        kernels.perturb([w], grads, PAIR, norm_sq=found, **arguments)
    assert_values(found, norm_sq)
    assert_values(w, -2.0 + e[0], 1.0 + e[1])
    assert_values(written["saved"], -2.0, 1.0)
    assert_values(written["achieved_sq"], e[0] ** 2 + e[1] ** 2)
    assert written["status"].tolist() == [PERTURBED]
    if ema:
        assert_values(options["ema"], *ema)


@pytest.mark.parametrize("norm_sq", [NAN, INF], ids=["NaN", "infinite"])
def test_a_norm_that_is_not_finite_saves_and_moves_nothing(norm_sq, backend):
    w, saved, ema = f64(-2.0, INF), f64(NAN, NAN), f64(1.0, NAN)
    status, achieved_sq = torch.zeros(1, dtype=torch.uint8), f64(NAN)
    written = {"saved": saved, "status": status, "achieved_sq": achieved_sq, "ema": ema}
    options = {"norm_sq": f64(0.25, norm_sq), "radii": RADII, "sigma": 0.5, "lmbda": 0.6}
    kernels_of(backend).perturb([w], [f64(3.0, INF)], PAIR, **written, **options)
    assert (w.tolist(), saved.tolist(), status.tolist(), achieved_sq.tolist()) == (
        [-2.0, INF],
        [-2.0, INF],
        [PERTURBED],
        [0.0],
    )
    assert_values(ema, 1.0, NAN)


def test_a_zero_gradient_moves_nothing(backend):
    for options in ({}, {"eta": 0.0}, {"ema": f64(0.0, 0.0), "sigma": 1.0, "lmbda": 0.9}):
        w, achieved_sq = f64(-2.0, 1.0), f64(NAN)
        written = {"saved": f64(NAN, NAN), "status": torch.zeros(1, dtype=torch.uint8), "achieved_sq": achieved_sq}
        norm_sq = kernels_of(backend).ascend([w], [f64(0.0, 0.0)], PAIR, radii=RADII, **written, **options)
        assert (norm_sq.tolist(), w.tolist(), achieved_sq.tolist()) == ([0.0], [-2.0, 1.0], [0.0])


@pytest.mark.parametrize("status", [UNTOUCHED, SAVED, PERTURBED])
def test_a_perturbation_saves_what_is_untouched_and_starts_from_what_is_saved(status, backend):
    w, saved = f64(7.0, 7.0) if status == PERTURBED else f64(-2.0, 1.0), f64(-2.0, 1.0) if status else f64(NAN, NAN)
    state = torch.tensor([status], dtype=torch.uint8)
    options = {"norm_sq": f64(9.0, 16.0), "radii": RADII, "achieved_sq": f64(NAN)}
    kernels_of(backend).perturb([w], [f64(3.0, 4.0)], PAIR, saved=saved, status=state, **options)
    assert_values(w, -1.7, 1.4)
    assert_values(saved, -2.0, 1.0)
    assert_values(options["achieved_sq"], 0.25)
    assert state.tolist() == [PERTURBED]


@pytest.mark.parametrize("last", [True, False], ids=["last", "not the last"])
@pytest.mark.parametrize("status", [UNTOUCHED, SAVED, PERTURBED])
def test_descend_and_update_bring_back_what_is_perturbed_and_nothing_else(status, last, backend):
    kernels, saved = kernels_of(backend), f64(-2.0, 1.0)
    restored = saved if status == PERTURBED else f64(5.0, 7.0)
    w, state = f64(5.0, 7.0), torch.tensor([status], dtype=torch.uint8)
    kernels.descend([w], [], [], PAIR, coefs=[], sums=[], saved=saved, status=state, last=last)
    assert w.tolist() == restored.tolist()
    assert state.tolist() == [UNTOUCHED if last else min(status, SAVED)]
    for term, moved in ((f64(3.0, 4.0), (0.3, 0.4)), (f64(), (0.0, 0.0))):  # an absent one only brings back
        w, state, step = f64(5.0, 7.0), torch.tensor([status], dtype=torch.uint8), torch.zeros(2)
        options = {"rule": SGD, "settings": f64(0.1, 0, 0, 0, 0, 0)[None], "step": step, "coefs": coefs((1.0,))}
        kernels.update([w], [], [term], PAIR, sums=[], saved=saved, status=state, **options)
        assert_values(w, restored[0] - moved[0], restored[1] - moved[1])
        assert state.tolist() == [UNTOUCHED]
        assert step.tolist() == [float(len(term) > 0), 0.0]


@pytest.mark.parametrize("found", [0.0, -0.0, 1.0, 3.0, INF, NAN], ids=str)
@pytest.mark.parametrize("rule", [SGD, ADAM], ids=["SGD", "Adam"])
def test_an_update_that_found_inf_brings_back_and_changes_nothing_else(rule, found, backend):
    kernels, skipped = kernels_of(backend), found != 0
    term, g = (f64(INF, NAN), f64(NAN, NAN)) if skipped else (f64(3.0, 4.0), f64(3.0, 4.0))
    rows, _, size = table((2, 2), 8)
    w, saved = torch.full((size,), 7.0).double(), torch.full((size,), 5.0).double()
    status, step = torch.tensor([PERTURBED, SAVED], dtype=torch.uint8), torch.tensor([1.0, 2.0, 0.0])
    states = [torch.full((size,), 0.5).double() for _ in range(1 + rule)]
    row = f64(0.1, 0.9, 0.1, 0.01, 0, 0) if rule == SGD else f64(0.1, 0.9, 0.99, 1e-8, 0, 0, 0, 0)
    options = {"rule": rule, "settings": row[None], "coefs": coefs((1.0,)), "sums": [], "saved": saved}
    written = {"step": step, "status": status}
    for flag in (torch.tensor(found), torch.tensor([found])):
        kernels.update([w], states, [term, g], rows, found_inf=flag, **options, **written)
    moved = [w[:2] != 5.0, w[16:18] != 7.0, *(s[[0, 1, 16, 17]] != 0.5 for s in states)]
    assert all((~m if skipped else m).all() for m in moved)
    assert step.tolist() == ([1.0, 2.0, 0.0] if skipped else [3.0, 4.0, 0.0])
    assert status.tolist() == [UNTOUCHED, UNTOUCHED]


X, Y, Z = f64(3.0, 4.0), f64(1.0, -2.0), f64(-5.0, 0.5)


@pytest.mark.parametrize(
    ("terms", "products"), [((X,), (25,)), ((X, Y), (25, -5, 5)), ((X, Y, Z), (25, -5, 5, -13, -6, 25.25))]
)
def test_gram_returns_the_inner_products_by_rows(terms, products, backend):
    assert_values(kernels_of(backend).gram(list(terms), PAIR, count=len(terms)).sum(1), *products)


def test_products_with_an_absent_vector_count_nothing(backend):
    two = table((2, 2), 8)[0]
    sums = kernels_of(backend).gram([X, f64(), f64(), Y, Z, Z], two, count=3)
    assert_values(sums.sum(1), X @ X, 0.0, Y @ Y, X @ Z, Y @ Z, 2 * Z @ Z)


def _length(x: Tensor) -> Tensor:
    return x.square().sum().sqrt()


_GSAM = X - 0.7 * (Y - (X @ Y) / (X @ X) * X)
# name: (terms, of how many of them there is a Gram matrix, coefficients, the vector whose length they get, Σ cₖ xₖ)
FORMULAS: dict[str, tuple] = {
    "a number": ((X,), 0, ({"scale": 0.5, "a": 3.0},), None, 1.5 * X),
    "a mean": ((X, Y), 0, (0.25, 0.75), None, 0.25 * X + 0.75 * Y),
    "four": ((X, Y, Z, X), 0, (1.0, 2.0, -1.0, 0.5), None, 1.5 * X + 2 * Y - Z),
    "GSAM": ((X, Y), 2, ({"a": 1.0, "b": 0.7, "p": 1, "q": 0}, -0.7), None, _GSAM),
    "LookSAM": (
        *((X, Y), 2, ({"scale": 0.5, "a": 1.0}, {"scale": 0.5, "b": -1.0, "p": 1, "q": 2, "eps": 1.0}), None),
        0.5 * (X - (X @ Y) / (Y @ Y + 1) * Y),
    ),
    "Bilateral SAM": (
        *((X, Y, Z), 2, (1.0, {"b": -1.0, "p": 0, "q": 2, "root": 1, "eps": 0.5}, 1.0), None),
        X - _length(X) / (_length(Y) + 0.5) * Y + Z,
    ),
    "Stable SAM": ((X,), 1, ({"scale": 0.5, "a": 1.0},), Y, 0.5 * _length(Y) * X / _length(X)),
    "GSAM, stable, and a mean": (
        *((X, Y, Z), 2, ({"scale": 0.5, "a": 1.0, "b": 0.7, "p": 1, "q": 0}, {"scale": 0.5, "a": -0.7}, 0.3), Z),
        0.5 * _length(Z) * _GSAM / _length(_GSAM) + 0.3 * Z,
    ),
    "three, stable": ((X, Y, Z), 3, (1.0, 2.0, -1.0), Y, _length(Y) * (X + 2 * Y - Z) / _length(X + 2 * Y - Z)),
    "nothing to divide by": ((X, 0 * Y), 2, ({"a": 1.0, "b": 3.0, "p": 0, "q": 2}, 1.0), None, X),
    "nothing to make long": ((0 * X,), 1, (1.0,), Y, 0 * X),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_combination_follows_its_formula(name, backend):
    terms, of, coefficients, like, expected = FORMULAS[name]
    kernels, options = kernels_of(backend), {"coefs": coefs(coefficients), "sums": []}
    if of:
        options["sums"] = [kernels.gram(list(terms[:of]), PAIR, count=of)]
    if like is not None:
        options["sums"].append(kernels.norm([], [like], PAIR))
        options["rescale"] = of * (of + 1) // 2
    out, out_sq = f64(NAN, NAN), f64(NAN)
    kernels.descend([], [out], list(terms), PAIR, out_sq=out_sq, **options)
    assert_values(out, *expected.tolist())
    assert_values(out_sq, expected @ expected)
    # An update takes the same combination.
    w = f64(0.0, 0.0)
    kernels.update([w], [], list(terms), PAIR, rule=SGD, settings=f64(-1.0, 0, 0, 0, 0, 0)[None], **options)
    assert_values(w, *expected.tolist())


def test_a_term_that_is_absent_or_has_coefficient_0_is_left_out_whatever_it_holds(backend):
    nan, one = torch.full((1,), NAN), torch.ones(1)
    kernels, row = kernels_of(backend), table((1,))[0]

    def combined(terms, *coefficients, **options):
        out = torch.full((1,), NAN)
        kernels.descend([], [out], terms, row, coefs=coefs(coefficients), sums=options.pop("sums", []), **options)
        return out.item()

    assert combined([nan, one, nan], 0.0, 0.5, 0.0) == 0.5
    assert combined([nan, one, nan], {"scale": 0.0, "a": 2.0}, 0.5, 1e-60) == 0.5, "1e-60 is 0 in fp32"
    assert combined([nan, one, nan[:0]], {"b": 1.0, "p": 0, "q": 1}, 0.5, 1.0, sums=[f64(0.0), f64(4.0)]) == 0.5
    assert combined([]) == 0.0
    assert combined([one[:0], nan], 1.0, 0.0) == 0.0
    assert combined([one[:0], one[:0]], 1.0, 0.3) == 0.0
    assert math.isnan(combined([one, one], 0.0, 0.0, norm_sq=f64(INF)))
    # The first that is left is no addition to a zero.
    assert math.copysign(1, combined([nan, -0.0 * one, one[:0]], 0.0, 1.0, 1.0)) == -1


def test_a_combination_is_nan_where_the_norm_or_the_gram_matrix_is_not_finite(backend):
    kernels = kernels_of(backend)
    for value in (NAN, INF):
        for options in ({"norm_sq": f64(1.0, value)}, {"sums": [f64(1.0, value)]}):
            out, w = f64(NAN, NAN), f64(1.0, 1.0)
            options = {"coefs": coefs((1.0, 0.3)), "sums": [], **options}
            kernels.descend([], [out], [X, Y], PAIR, **options)
            kernels.update([w], [], [X, Y], PAIR, rule=SGD, settings=f64(0.1, 0, 0, 0, 0, 0)[None], **options)
            assert out.isnan().all()
            assert w.isnan().all()


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


WEIGHED = ("two terms", "four terms", "ratios", "ratios of roots", "combined and rescaled", "many sums", "not finite")


@pytest.mark.parametrize("variant", WEIGHED)
def test_coefficients_of_all_micro_batches_are_those_of_each(variant, backend):
    """Times its share: the combination of ones is the sum of the coefficients."""
    each = [make("descend", f"out, {variant}", torch.float64, (1,), seed=seed).arguments for seed in range(3)]
    a, k = each[0], kernels_of(backend)
    shares = f64(0.25, 0.5, 1.5)
    together = {"sums": [torch.stack(rows) for rows in zip(*(one["sums"] for one in each), strict=True)]}
    if "norm_sq" in a:
        together["norm_sq"] = torch.stack([a["norm_sq"], f64(*range(1, 1 + len(a["norm_sq"]))), f64(*a["norm_sq"]) + 1])
    found = k.weigh(shares, coefs=a["coefs"], rescale=a.get("rescale", -1), **together)
    for i in range(3):
        norm_sq = together["norm_sq"][i] if "norm_sq" in a else None
        wanted = torch.as_tensor(
            reference.coefficients(a["coefs"], [t[i] for t in together["sums"]], a.get("rescale", -1), norm_sq),
            dtype=torch.float64,
        )
        torch.testing.assert_close(found[:, i], wanted * shares[i], rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("large", [2e19, 1e21, -3e19, 1e-19, 1e-22], ids=str)
def test_adam_takes_gradients_whose_square_is_no_fp32_number_as_torch_does(large, amsgrad, backend):
    """(1 − beta2)·g·g, from the left: it overflows and underflows later than g·g."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([p], lr=0.1, amsgrad=amsgrad, foreach=False)
    rows, weights, step = table((3,))[0], torch.ones(32), torch.zeros(2)
    states = [torch.zeros(32) for _ in range(2 + amsgrad)]
    settings = f64(0.1, 0.9, 0.999, 1e-8, 0.0, float(amsgrad), 0.0, 0.0)[None]
    one = {"coefs": coefs((1.0,)), "sums": []}
    for g in (large, 0.5, large):
        p.grad = torch.tensor([g, -g, 1.0])
        optimizer.step()
        kernels_of(backend).update([weights], states, [p.grad], rows, rule=ADAM, settings=settings, step=step, **one)
        torch.testing.assert_close(states[1][:3], optimizer.state[p]["exp_avg_sq"], rtol=1e-6, atol=1e-44)
        assert states[1].isfinite().all() == (abs(large) < 6e20)
        torch.testing.assert_close(weights[:3], p.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_follows_torch_optim(name, backend):
    """On a mean of two gradients, of which one or both are absent now and then: such a parameter begins late."""
    kind, options = OPTIMIZERS[name]
    sizes, rows = (3, 40, 5), table((3, 40, 5), 8)
    params = [torch.nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in sizes]
    segments = [slice(offset, offset + n) for offset, n in zip(rows[1], sizes, strict=True)]
    weights = torch.zeros(rows[2], dtype=torch.float64)
    for p, s in zip(params, segments, strict=True):
        weights[s] = p.detach()
    optimizer = kind(params, lr=0.1, foreach=False, **options)
    g = optimizer.param_groups[0]
    if kind is torch.optim.SGD:
        rule, columns, names = SGD, reference.SGD_COLUMNS, ["momentum_buffer"] if g["momentum"] else []
    else:
        rule, columns = ADAM, reference.ADAM_COLUMNS
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if g["amsgrad"] else [])]
        g = {**g, **dict(zip(("beta1", "beta2"), g["betas"], strict=True)), "decoupled": kind is torch.optim.AdamW}
    states = [torch.full_like(weights, NAN if rule == SGD else 0.0) for _ in names]
    settings, step = f64(*(float(g[c]) for c in columns))[None], torch.zeros(4)
    for i in range(4):
        one, two = ([torch.randn(n, dtype=torch.float64) for n in sizes] for _ in range(2))
        two[1] = two[1] if i % 2 else two[1][:0]
        one[2], two[2] = (one[2], two[2]) if i % 2 else (one[2][:0], two[2][:0])
        for p, a, b in zip(params, one, two, strict=True):
            p.grad = 0.25 * a + 0.75 * b if len(b) else 0.25 * a if len(a) else None
        optimizer.step()
        combination = {"coefs": coefs((0.25, 0.75)), "sums": []}
        update = kernels_of(backend).update
        update([weights], states, [*one, *two], rows[0], rule=rule, settings=settings, step=step, **combination)
        assert step.tolist() == [i + 1, i + 1, (i + 1) // 2, 0]
        close = {"rtol": 1e-13, "atol": 1e-14}
        for p, s in zip(params, segments, strict=True):
            torch.testing.assert_close(weights[s], p.detach(), **close)
            for state, key in zip(states, names, strict=True):
                if key in optimizer.state[p]:
                    torch.testing.assert_close(state[s], optimizer.state[p][key], **close)


def test_momentum_is_a_business_of_each_group(backend):
    rows, _, size = table((2, 2), 8, groups=2)
    w, buffer, step = torch.zeros(size).double(), torch.full((size,), 2.0).double(), torch.tensor([3.0, 3.0, 0.0])
    settings = torch.stack([f64(0.1, 0.5, 0, 0, 0, 0), f64(0.1, 0, 0, 0, 0, 0)])
    combination = {"coefs": coefs((1.0,)), "sums": []}
    kernels_of(backend).update([w], [buffer], [X, X], rows, rule=SGD, settings=settings, step=step, **combination)
    assert_values(buffer[[0, 1, 16, 17]], 4.0, 5.0, 2.0, 2.0)
    assert_values(w[[0, 1, 16, 17]], -0.4, -0.5, -0.3, -0.4)
    assert step.tolist() == [4.0, 4.0, 0.0]


@each_dtype
def test_a_step_of_two_micro_batches_returns_to_the_weights_bit_for_bit(dtype, backend):
    """untouched -> perturbed -> saved -> perturbed, perturbed anew -> untouched; half of the parameters have no gradient."""
    kernels, (rows, _, size) = kernels_of(backend), table((300, 7, 0, 33), dtype.itemsize, chunk=100)
    w = torch.randn(size).to(dtype)
    before, saved, out = w.clone(), torch.full_like(w, NAN), [torch.zeros(n, dtype=dtype) for n in (300, 7, 0, 33)]
    sums = (reference.ACHIEVED,) if dtype.itemsize == 2 else ()
    status, achieved_sq = torch.zeros(len(rows), dtype=torch.uint8), torch.full((*sums, len(rows)), NAN).double()
    ascent = {"radii": RADII, "saved": saved, "status": status, "achieved_sq": achieved_sq}
    descent = {"coefs": coefs((1.0, 0.5)), "sums": [], "saved": saved, "status": status}
    for micro_batch, (absent, expected) in enumerate(((1, [2, 2, 2, 0, 2]), (0, [1, 1, 1, 2, 2]))):
        grads = [torch.randn(0 if i == absent else n).to(dtype) for i, n in enumerate((300, 7, 0, 33))]
        for _ in range(2):
            kernels.ascend([w], grads, rows, **ascent)
        assert status.tolist() == expected
        for terms in achieved_sq.view(-1, len(rows)):
            assert (terms != 0).tolist() == [value == PERTURBED for value in expected]
        kernels.descend([w], out, [*out, *out], rows, last=bool(micro_batch), **descent)
        assert status.tolist() == ([0] * 5 if micro_batch else [1, 1, 1, 0, 1])
        assert_same_bits(w, before)


# ---- declaration -------------------------------------------------------------------------------------------------------


OPCHECKED = [
    *((*case, torch.float32) for case in LARGEST),
    *(("update", variant, torch.float32) for variant in ("sgd, shifted", "adam, shifted")),
    *(
        (operator, variant, torch.bfloat16)
        for operator, variant in (("ascend", "masters"), ("update", "adam, masters"))
    ),
]


@pytest.mark.parametrize(("operator", "variant", "dtype"), OPCHECKED, ids=str)
def test_opcheck_accepts_the_operator(operator, variant, dtype):
    options = {**VARIANTS[operator][variant], "alias": None}  # a term that is mutated is beyond what a schema can say
    args, kwargs = make(operator, options, dtype, sizes=(5, 0, 33), flat=False).args()
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


@pytest.mark.parametrize(("operator", "variant"), LARGEST, ids=lambda v: v)
def test_torch_ops_and_the_backend_give_the_same_bits(operator, variant):
    direct, dispatched = (make(operator, variant, sizes=(5, 0, 300)) for _ in range(2))
    results = direct.run(), dispatched.run(torch.ops.msam_kernels)
    assert_same_memory(direct, dispatched)
    assert (results[0] is None and results[1] is None) or torch.equal(*results)


# ---- against the specification -----------------------------------------------------------------------------------------


@with_layouts(lambda k, j: (k + j) % 2 == 0)
def test_compiled_kernels_give_the_bits_of_the_specification(operator, variant, dtype, flat, shift):
    assert_matches(make(operator, variant, dtype, flat=flat, shift=shift, absent=ABSENT))


@each_dtype
@pytest.mark.parametrize(("operator", "variant"), STREAMED_CASES, ids=lambda v: v)
def test_large_buffers_that_are_stored_past_the_cache_give_the_same_bits(operator, variant, dtype):
    assert_matches(make(operator, variant, dtype, (STREAMED // dtype.itemsize, 257), groups=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_misaligned_large_buffers_give_the_same_bits(dtype):
    for operator, variant in (("perturb", "any status"), ("descend", "weights"), ("update", "sgd, not counted")):
        assert_matches(make(operator, variant, dtype, (STREAMED // dtype.itemsize, 257), shift=1, flat=False))


lists_by_name = {name: st.sets(st.integers(0, 5)).map(tuple) for name in ABSENT}


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
    absent=st.fixed_dictionaries(lists_by_name),
)
def test_any_layout_gives_the_bits_of_the_specification(case, dtype, sizes, **layout):
    assert_matches(make(*case, dtype, tuple(sizes), **layout))


numbers = st.floats(0, 2, allow_subnormal=False)
flags = st.sampled_from([0.0, 1.0])


@settings(max_examples=150)
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    options=st.fixed_dictionaries(
        {
            **{"lr": numbers, "momentum": st.floats(0.01, 1), "dampening": st.floats(0, 1), "weight_decay": numbers},
            **{"beta1": st.floats(0, 0.999), "beta2": st.floats(0, 0.9999), "eps": st.floats(1e-10, 1)},
            **{"nesterov": flags, "maximize": flags, "decoupled": flags, "amsgrad": flags},
            **{"rule": st.sampled_from([SGD, ADAM]), "status": st.just(MIXED)},
            "terms": st.lists(st.floats(-2, 2), min_size=1, max_size=4),
        }
    ),
    seed=st.integers(0, 2**16),
)
def test_any_settings_give_the_bits_of_the_specification(dtype, options, seed):
    assert_matches(make("update", options, dtype, (0, 1, 37, 300), groups=2, seed=seed))


@pytest.mark.parametrize("alias", range(4))
@each_dtype
def test_out_may_be_any_term(dtype, alias):
    for variant in ("out, four terms", "out, many sums", "out, zero coefficients"):
        options = {**VARIANTS["descend"][variant], "alias": alias, "unread": (), "out_sq": True}
        assert_matches(make("descend", options, dtype, (5, 300, 0, 33, CHUNK + 1, 8), absent=ABSENT))


@each_dtype
def test_a_tensor_that_stays_as_it_is_is_not_written(dtype):
    """Arithmetic would make quiet NaNs of signalling ones."""
    for terms, alias in (((1.0,), 0), ((1.0, 0.0), 0), ((0.0, 1.0, 0.0), 1)):
        call = make("descend", {"terms": terms, "alias": alias, "status": MIXED}, dtype, (300, 0, 33, 1))
        for t in call.arguments["out"]:
            t.view(BITS[dtype]).fill_(EXPONENT[dtype] | 1)
        out = copy.deepcopy(call.arguments["out"])
        call.run()
        for t, expected in zip(call.arguments["out"], out, strict=True):
            assert_same_bits(t, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("operator", "variant"), ROUNDED_ONCE, ids=lambda v: v)
def test_results_are_those_of_double_precision_rounded_once(operator, variant, dtype, backend):
    call = make(operator, variant, dtype, (5, 33, 700))
    truth = call.in_double()
    result, exact = call.run(backend), truth.run("reference")
    for name, value in call.arguments.items():
        for actual, expected in each_tensor(value, truth.arguments[name]):
            if actual.dtype == dtype and name not in ("step", "found_inf"):
                # One rounding to the storage type, after a few in fp32 of terms no larger than about 4.
                close = {"rtol": 1.001 * HALF_ULP[dtype], "atol": 2**-20, "equal_nan": True}
                torch.testing.assert_close(actual.double(), expected, **close, msg=lambda m, n=name: f"{n}: {m}")
    if result is not None:
        torch.testing.assert_close(result, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("operator", "variant"), LARGEST, ids=lambda v: v)
def test_sums_have_the_same_bits_for_flat_and_listed_weights(operator, variant):
    flat, listed = (make(operator, variant, sizes=(5, 0, 300, CHUNK + 1), flat=f) for f in (True, False))
    results = [flat.run(), listed.run()]
    for name in set(SUMS) & flat.arguments.keys():
        assert_same_bits(flat.arguments[name], listed.arguments[name], name)
    if results[0] is not None:
        assert_same_bits(*results, "the result")


# ---- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decades", [0, 4], ids=["alike", "over eight decades"])
@pytest.mark.parametrize("n", [1, 5, 33, 257, CHUNK + 1, 40000])
@each_dtype
def test_the_norm_is_within_a_few_ulp_of_the_exact_one(dtype, n, decades):
    g = spread(n, dtype, 2 if dtype == torch.float16 and decades else decades)
    rows = table((n,), dtype.itemsize)[0]
    norm_sq = kernels_of("cpu").norm([], [g], rows).item()
    exact = exact_sum_of_squares(g)
    # 32 lanes a chunk add 512 terms each. Squares of fp32 are exact in fp64 but end in the bits 001, as squares of odd
    # numbers do, so that their sums lean downwards.
    assert abs(norm_sq - exact) <= (4 if dtype == torch.float64 else 16) * math.ulp(exact)
    if dtype != torch.float64:
        rounded = torch.tensor([math.sqrt(norm_sq), math.sqrt(exact)]).view(torch.int32)  # as fp32: bits count ulp
        assert abs(int(rounded[0]) - int(rounded[1])) <= 2


@pytest.mark.parametrize("decades", [0, 4], ids=["alike", "over eight decades"])
@pytest.mark.parametrize("n", [1, 5, 33, 257, CHUNK + 1, 40000])
def test_sums_of_doubles_are_rounded_once(n, decades, backend):
    assert_sums_are_rounded_once(kernels_of(backend), n, decades)


@each_dtype
def test_the_norm_of_a_residual_and_of_a_stretched_direction_is_within_two_ulp(dtype):
    n = CHUNK + 4097
    for variant in ("friendly", "adaptive", "friendly and adaptive"):
        call = make("norm", variant, dtype, (n,))
        a = call.in_double().arguments
        d = a["grads"][0]
        if "sigma" in a:
            d = d - a["sigma"] * a["ema"][:n]
        if "eta" in a:
            d = (a["weights"][0][:n].abs() + a["eta"]) * d
        norm, exact = math.sqrt(call.run().item()), math.sqrt(exact_sum_of_squares(d))
        # 16-bit data too: what is summed are fp32 directions that were never rounded to 16 bits.
        ulp = math.ulp(exact) if dtype == torch.float64 else 2.0 ** (math.frexp(exact)[1] - 24)
        assert abs(norm - exact) <= 2 * ulp, variant


@each_dtype
def test_sums_by_row_are_of_what_was_stored(dtype):
    def wide(t: Tensor) -> Tensor:
        return t if dtype == torch.float64 else t.float()

    ascent = make("perturb", "plain", dtype, (40001,))
    before = wide(ascent.arguments["weights"][0].clone())
    ascent.run()
    descent = make("descend", "out", dtype, (40001,))
    descent.run()
    ascent.arguments["achieved_sq"] = ascent.arguments["achieved_sq"].view(-1, len(ascent.arguments["table"]))[0]
    stored = {
        "achieved_sq": (ascent, (wide(ascent.arguments["weights"][0]) - before)[:40001]),
        "out_sq": (descent, descent.arguments["out"][0].double()),
    }
    for name, (call, what) in stored.items():
        exact = exact_sum_of_squares(what)
        assert abs(call.arguments[name].sum().item() - exact) <= 8 * math.ulp(exact), name


@each_dtype
def test_the_gram_matrix_has_the_bits_of_the_norm_where_its_vectors_are_one(dtype):
    call = make("gram", "one", dtype)
    x, rows = call.arguments["terms"], call.arguments["table"]
    norm_sq = kernels_of("cpu").norm([], x, rows)
    for count in (1, 2, 3):
        for row in kernels_of("cpu").gram(x * count, rows, count=count):
            assert_same_bits(row, norm_sq)


def test_a_sum_with_an_infinite_term_is_infinite_and_one_with_nan_is_nan(backend):
    rows = table((3, 40000))[0]
    grads = [torch.ones(3), torch.ones(40000)]
    for value, found in ((INF, math.isinf), (-INF, math.isinf), (NAN, math.isnan)):
        for where in (0, 17000, 39999):
            grads[1].fill_(1.0)[where] = value
            assert found(kernels_of(backend).norm([], grads, rows).item())


def test_an_empty_row_in_the_table_adds_nothing(backend):
    # The table of an optimizer has none, but the checks allow it; with uninitialized memory filled it would show.
    n = 3 * CHUNK * 8  # large enough to be shared among threads
    rows, empty = table((n, 0))[0].tolist(), [1, 0, n, 0, 0]
    torch.use_deterministic_algorithms(True)  # fills what at::empty returns with NaN
    try:
        for with_empty in ([*rows, empty], [empty, *rows]):
            found = kernels_of(backend).norm([], [torch.ones(n), torch.empty(0)], torch.tensor(with_empty))
            assert found.item() == n
    finally:
        torch.use_deterministic_algorithms(False)


# ---- determinism -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "variant"),
    [
        ("norm", "friendly and adaptive"),
        ("perturb", "any status, masked, friendly and adaptive"),
        ("ascend", "any status, friendly"),
        ("gram", "a stack of two"),
        ("descend", "weights and mean, combined and rescaled"),
        ("update", "adam, a stack and the mean"),
    ],
    ids=lambda v: v,
)
def test_any_number_of_threads_and_any_run_give_the_same_bits(operator, variant):
    # Shared, however long others have been waited for.
    sizes = (33, LONG // VARIANTS[operator][variant].get("stack", 1), 0, CHUNK + 1)
    calls, results = [make(operator, variant, sizes=sizes)], []
    calls += [calls[0].to("cpu") for _ in range(3)]
    for call, threads in zip(calls, (1, 2, 2, 3), strict=True):
        torch.set_num_threads(threads)
        results.append(call.run())
    for call, result in zip(calls[1:], results[1:], strict=True):
        assert_same_memory(calls[0], call)
        assert (result is None and results[0] is None) or torch.equal(result, results[0])


def threads_by_size() -> list[int]:
    """Threads of the process, before anything is computed and after norms of ever more elements."""
    torch.set_num_threads(2)
    sizes, found = (60000, 2 * SHARE - 1, 2 * SHARE), [len(os.listdir("/proc/self/task"))]
    for n in sizes:
        kernels_of("cpu").norm([], [torch.empty(n)], table((n,))[0])
        found.append(len(os.listdir("/proc/self/task")))
    return found


@pytest.mark.usefixtures("extension")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="Linux tells the threads of a process")
def test_a_call_with_little_to_do_wakes_no_other_thread():
    done = child("threads")
    assert done.returncode == 0, done.stderr
    alone, *few, shared = json.loads(done.stdout.splitlines()[-1])
    assert (few, shared) == ([alone, alone], alone + 1)


def digest(call: Call) -> str:
    result = call.run()
    tensors = {**call.tensors(), **({} if result is None else {"result": result})}
    sha = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        t = t if t.dtype not in BITS else t.nan_to_num(nan=1e4)  # any NaN is like another
        sha.update(name.encode() + t.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def fingerprint(cases: Iterable[tuple[str, str]], sizes: Callable[[int], tuple]) -> dict[str, str]:
    """A digest of all that operators write. ``sizes``: of the tensors, by the bytes of an element."""
    return {
        f"{operator}, {variant}, {name}, {len(sizes(1))} tensors": digest(
            make(operator, variant, dtype, sizes(dtype.itemsize), groups=2, absent=ABSENT)
        )
        for (operator, variant), (name, dtype) in itertools.product(cases, DTYPES.items())
    }


def child(*arguments: str, isa: str | None = None) -> subprocess.CompletedProcess:
    """This file as a script, with the instruction set of the whole run or with ``isa``."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if isa:
        env["MSAM_KERNELS_ISA"] = isa
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", __file__, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def report_of(done: subprocess.CompletedProcess, isa: str) -> dict | None:
    """What a child computed with ``isa``; None where the processor lacks it, which is all that a child may end without."""
    assert done.returncode == 0, f"{isa}: status {done.returncode}\n{done.stderr}"
    report = json.loads(done.stdout.splitlines()[-1])
    if isa != "baseline" and " is not there on this processor" in (report["missing"] or ""):
        return None
    assert (report["isa"], report["missing"]) == (isa, None)
    return report


def reports_by_isa(run: Callable[..., subprocess.CompletedProcess]) -> dict[str, dict]:
    reports = {isa: report_of(run("instruction-set", isa=isa), isa) for isa in ISAS}
    return {isa: report for isa, report in reports.items() if report is not None}


@pytest.fixture(scope="module")
def by_isa(extension) -> dict[str, dict]:
    """What every instruction set of this processor computes, each in a process of its own."""
    return reports_by_isa(child)


def report_or_skip(reports: dict[str, dict], isa: str) -> dict:
    if isa not in reports:
        pytest.skip(f"this processor has no {isa}")
    return reports[isa]


@pytest.mark.parametrize("isa", ISAS[1:])
def test_every_instruction_set_gives_the_same_bits(isa, by_isa, covers_instruction_set):
    covers_instruction_set(isa)
    found, expected = report_or_skip(by_isa, isa)["fingerprint"], by_isa["baseline"]["fingerprint"]
    assert found.keys() == expected.keys()
    assert {k: v for k, v in found.items() if v != expected[k]} == {}


@pytest.fixture(scope="module")
def lacking(extension) -> subprocess.CompletedProcess:
    """The child whose instruction set is on no processor, in the extension's own words."""
    return child("instruction-set", isa="sse5")


@pytest.mark.parametrize("has", [ISAS[:2], ISAS[:1]], ids=["no AVX-512", "neither AVX-512 nor AVX2"])
def test_an_instruction_set_that_the_processor_lacks_is_skipped(has, lacking):
    def run_there(what, isa):
        report = json.dumps({"isa": isa, "missing": None})
        return subprocess.CompletedProcess([], 0, report, "") if isa in has else lacking

    reports = reports_by_isa(run_there)
    assert tuple(reports) == has
    for isa in ISAS[len(has) :]:
        with pytest.raises(pytest.skip.Exception, match=f"this processor has no {isa}"):
            report_or_skip(reports, isa)


NOT_THERE = "MSAM_KERNELS_ISA=avx512 is not there on this processor: unset it"
NO_SKIP = {
    "an illegal instruction": ("avx512", -4, None),
    "a crash in spite of the report": ("avx512", -11, {"isa": None, "missing": NOT_THERE}),
    "an exception with these words": ("avx512", 1, None),
    "no output": ("avx512", 0, None),
    "another instruction set": ("avx512", 0, {"isa": "avx2", "missing": None}),
    "no extension": ("avx512", 0, {"isa": None, "missing": "the compiled extension is missing"}),
    "no baseline": ("baseline", 0, {"isa": None, "missing": NOT_THERE}),
}


@pytest.mark.parametrize(("isa", "status", "report"), NO_SKIP.values(), ids=NO_SKIP)
def test_a_child_that_ends_otherwise_is_a_failure(isa, status, report):
    output = "" if report is None else json.dumps(report)
    with pytest.raises((AssertionError, IndexError)):
        report_of(subprocess.CompletedProcess([], status, output, f"RuntimeError: {NOT_THERE}"), isa)


# ---- 16-bit storage ----------------------------------------------------------------------------------------------------


def conversion_errors() -> list[str]:
    """Every 16-bit pattern through the kernels against torch's conversions; what differs, in words."""
    kernels, nine = kernels_of("cpu"), table((9,), 2)[0]
    whole, short = table((65536,), 2)[0], table((65536,), 2, chunk=7)[0]  # seven: the scalar rest of a loop alone
    found = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        every = patterns.view(dtype)
        following = (patterns + 1).view(dtype)  # the neighbour away from zero
        shuffled = every[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]

        def compare(what, x, y, c_x, c_y, dtype=dtype, name=name):
            wide = x.float() * torch.tensor(c_x) + y.float() * torch.tensor(c_y)
            expected = wide.to(dtype)
            # What is subnormal in fp16 is not in fp32, so that flushing there changes nothing.
            for rows, flush in itertools.product((whole, short), (False, True) if name == "fp16" else (False,)):
                out = torch.empty_like(x)
                torch.set_flush_denormal(flush)
                kernels.descend([], [out], [x, y], rows, coefs=coefs((c_x, c_y)), sums=[])
                torch.set_flush_denormal(False)
                same = (out.view(torch.int16) == expected.view(torch.int16)) | (out.isnan() & expected.isnan())
                if not same.all():
                    i = int((~same).nonzero()[0])
                    found.append(
                        f"{name}, {what}, rows of {rows[0, 3]}, {flush=}: {int((~same).sum())} differ, e.g. "
                        f"{wide[i].item()!r} became {out[i].item()!r}, not {expected[i].item()!r}"
                    )

        compare("every value as it is", every, torch.full_like(every, -0.0), 1.0, 1.0)
        compare("halfway to the neighbour", every, following, 0.5, 0.5)
        compare("just above halfway", every, following, 0.5, 0.5 + 2**-13)
        compare("just below halfway", every, following, 0.5, 0.5 - 2**-14)
        compare("twice", every, every, 1.0, 1.0)
        compare("tiny", every, shuffled, 2.0**-14, 2.0**-20)
        for c_x, c_y in ((1.0, 1.0), (1.0, 2.0**-9), (0.1, 0.7), (1 / 3, -2 / 3), (3.0, 2.0**-24), (255.0, 2.0**-12)):
            compare(f"{c_x:g} times a value and {c_y:g} times another", every, shuffled, c_x, c_y)
        # The processor's conversion keeps a NaN's sign and payload, and so does the other one, which baseline and rests have.
        for rows in (whole, short) if name == "fp16" else ():
            kept = torch.empty_like(every)
            kernels.descend([], [kept], [every, torch.full_like(every, -0.0)], rows, coefs=coefs((1.0, 1.0)), sums=[])
            if not torch.equal(kept.view(torch.int16), patterns | (every.isnan() * 0x200)):
                found.append(f"{name}, rows of {rows[0, 3]}: a NaN has other bits")
        # Rounding apart: nine equal squares are exact in fp64 and pass through vector code and the scalar rest.
        for value in every[::13].tolist():
            norm_sq = kernels.norm([], [torch.full((9,), value, dtype=dtype)], nine).item()
            if norm_sq != 9 * value**2 and not (math.isnan(norm_sq) and math.isnan(value)):
                found.append(f"{name}: {value!r} is read as {math.sqrt(norm_sq / 9)!r}")
    return found


@pytest.mark.parametrize("isa", ISAS)
def test_conversions_of_every_16_bit_value_are_those_of_torch(isa, by_isa):
    assert report_or_skip(by_isa, isa)["conversions"] == []


# ---- errors ------------------------------------------------------------------------------------------------------------


def _with(**changes) -> Callable[[dict], dict]:
    return lambda a: {**a, **{n: v(a[n]) if callable(v) else v for n, v in changes.items()}}


def _row(**columns) -> Callable[[dict], dict]:
    """The table's last row with other entries."""

    def change(a):
        rows = a["table"].clone()
        for name, value in columns.items():
            rows[-1, ("segment", "begin", "offset", "numel", "group").index(name)] = value
        return {**a, "table": rows}

    return change


def _half(t: Tensor) -> Tensor:
    return t[: len(t) // 2]


def _by_columns(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def _in_each(change: Callable[[Tensor], Tensor], *, only: int | None = None) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda tensors: [change(t) if only in (None, i) else t for i, t in enumerate(tensors)]


def _gappy(t: Tensor) -> Tensor:
    return t.repeat(2)[::2]


def _as(dtype: torch.dtype) -> Callable:
    return lambda v: [t.to(dtype) for t in v] if isinstance(v, list) else v.to(dtype)


def _meta(t: Tensor) -> Tensor:
    return t.to("meta")


def _fake(t: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


def _with_less_memory(t: Tensor, nbytes: int) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(nbytes)
    return t


HUGE = 2**63 - 1
INT, FP32, FP64, BF16 = torch.int32, torch.float32, torch.float64, torch.bfloat16
# name: (operator, variant, change, what the message says)
ERRORS: dict[str, tuple[str, str, Callable[[dict], dict], str]] = {
    # the table
    "a table of int32": ("update", "sgd", _with(table=_as(INT)), "table must be a contiguous int64 .* Int"),
    "a table of four columns": ("gram", "two", _with(table=lambda t: t[:, :4].contiguous()), "table must .* 5.*4"),
    "a table by columns": ("norm", "plain", _with(table=_by_columns), "table must be a contiguous"),
    "a table elsewhere": ("update", "sgd", _with(table=_meta), "one device, got (cpu and meta|meta and cpu)"),
    "a row past the gradient": ("norm", "plain", _row(numel=34), r"row 2 of the table .* 34 of grads\[2\], .* 33"),
    "a row past the flat weights": ("update", "sgd", _row(offset=1000), "weights .* the table reaches 1033"),
    "a row past the listed weights": (
        "descend",
        "listed",
        _row(begin=1),
        r"row 2 of the table .* 34 of weights\[2\], .* 33",
    ),
    "a row past a second term": (
        *("gram", "two", _with(terms=_in_each(_half, only=5))),
        r"row 2 of the table .* terms\[5\], .* 16",
    ),
    "a row past out": ("descend", "out", _with(out=_in_each(_half, only=2)), r"row 2 of the table .* out\[2\], .* 16"),
    "a row past saved": ("perturb", "plain", _with(saved=_half), "saved has .* elements, the table reaches"),
    "a row past ema": ("norm", "friendly", _with(ema=_half), "ema has .* elements, the table reaches"),
    "a row past the mask": ("perturb", "masked", _with(mask=_half), "mask has .* bytes, the table reaches"),
    "a row past a state": (
        *("update", "adam, amsgrad", _with(states=_in_each(_half, only=2))),
        r"states\[2\] has .* elements, the table reaches",
    ),
    "a negative begin": ("norm", "plain", _row(begin=-1), "row 2 of the table.* begin -1"),
    "a negative offset": ("update", "sgd", _row(offset=-1), "row 2 of the table.* offset -1"),
    "a negative count": ("descend", "mean", _row(numel=-1), "row 2 of the table.* numel -1"),
    "a negative segment": ("perturb", "plain", _row(segment=-1), "row 2 of the table.*segment -1"),
    "a negative group": ("update", "adam", _row(group=-1), "row 2 of the table.* group -1"),
    "a segment that is not there": ("norm", "plain", _row(segment=3), "grads has 3 tensors.* segment 3"),
    "a group that is not there": ("perturb", "plain", _row(group=3), "radii has 3 .* group 3"),
    "rates of too few groups": (
        "update",
        "sgd, shifted",
        _with(rates=lambda t: t[:2]),
        "rates must have one .* 3, got .*2",
    ),
    "settings of too few groups": ("update", "adam", _with(settings=lambda t: t[:2]), "settings has 2 .* group 2"),
    "a count whose end wraps round": ("norm", "plain", _row(begin=1, numel=HUGE), f"row 2 of the table.* {HUGE}"),
    "an offset whose end wraps round": ("update", "sgd", _row(offset=HUGE), f"row 2 of the table.* {HUGE}"),
    # tensors of parameters
    "integer weights": ("update", "sgd", _with(weights=_as(INT), terms=_as(INT)), "dtype must be .* Int"),
    "gradients of another dtype": ("perturb", "plain", _with(grads=_as(BF16)), r"grads\[0\] must be Float .* BF"),
    "one term of another dtype": (
        *("update", "sgd, mean", _with(terms=_in_each(torch.Tensor.double, only=4))),
        r"terms\[4\] must be Float .* Double",
    ),
    "out of another dtype": ("descend", "weights and mean", _with(out=_as(FP64)), r"out\[0\] must be Float .* Double"),
    "saved of another dtype": ("descend", "weights", _with(saved=_as(FP64)), "saved must be Float .* Double"),
    "ema of another dtype": ("norm", "friendly", _with(ema=_as(FP64)), "ema must be Float .* Double"),
    "a state of another dtype": ("update", "adam", _with(states=_as(FP64)), r"states\[0\] must be Float .* Double"),
    "gradients with gaps": ("norm", "plain", _with(grads=_in_each(_gappy)), r"grads\[0\] must be dense .* strides"),
    "a term with gaps": ("gram", "two", _with(terms=_in_each(_gappy, only=3)), r"terms\[3\] must be dense .* strides"),
    "saved with gaps": ("perturb", "plain", _with(saved=_gappy), "saved must be dense .* strides"),
    "gradients elsewhere": (
        "norm",
        "plain",
        _with(grads=_in_each(_meta, only=1)),
        "one device, got (cpu and meta|meta and cpu)",
    ),
    "weights elsewhere": (
        "update",
        "sgd",
        _with(weights=_in_each(_meta)),
        "one device, got (cpu and meta|meta and cpu)",
    ),
    "saved elsewhere": ("descend", "weights", _with(saved=_meta), "one device, got (cpu and meta|meta and cpu)"),
    "status elsewhere": ("perturb", "plain", _with(status=_meta), "one device, got (cpu and meta|meta and cpu)"),
    "a sum elsewhere": (
        "descend",
        "out, ratios",
        _with(sums=_in_each(_meta)),
        "one device, got (cpu and meta|meta and cpu)",
    ),
    "lists of different lengths": (
        "perturb",
        "listed",
        _with(grads=lambda v: [*v, v[0]]),
        "weights has 3 tensors, .* 4",
    ),
    # numbers
    "norm_sq of fp32": ("perturb", "plain", _with(norm_sq=_as(FP32)), "norm_sq must be .* Double .* Float"),
    "norm_sq without terms": ("descend", "mean", _with(norm_sq=lambda t: t[:0]), "norm_sq is empty"),
    "norm_sq of two rows": (
        "perturb",
        "plain",
        _with(norm_sq=lambda t: t.repeat(2, 1)),
        "norm_sq must be one row, got 2",
    ),
    "achieved_sq of fp32": ("ascend", "plain", _with(achieved_sq=_as(FP32)), "achieved_sq must be .* Double .* Float"),
    "achieved_sq too short": (
        "perturb",
        "plain",
        _with(achieved_sq=_half),
        "achieved_sq .* row of the table, 3, got 1",
    ),
    "out_sq too short": ("descend", "mean", _with(out_sq=_half), "out_sq .* row of the table, 3, got 1"),
    "arrived as float": ("ascend", "plain", _with(arrived=_as(FP32)), "arrived must be .* Int .* Float"),
    "arrived of none": ("ascend", "plain", _with(arrived=lambda t: t[:0]), "arrived must have one element"),
    "status as bool": ("update", "sgd, scaled", _with(status=_as(torch.bool)), "status must be .* Byte .* Bool"),
    "status too short": ("descend", "weights", _with(status=_half), "status .* row of the table, 3, got 1"),
    "mask of floats": ("perturb", "masked", _with(mask=_as(FP32)), "mask must be .* Byte .* Float"),
    "radii of fp32": ("perturb", "plain", _with(radii=_as(FP32)), "radii must be .* Double .* Float"),
    "radii without a budget": (
        *("ascend", "plain", _with(radii=lambda t: t[:, :1].contiguous())),
        "radii must have 2 columns, got 1",
    ),
    "radii by columns": ("perturb", "plain", _with(radii=_by_columns), "radii must be a contiguous"),
    "settings of fp32": ("update", "sgd", _with(settings=_as(FP32)), "settings must be .* Double .* Float"),
    "settings with too few columns": (
        *("update", "adam", _with(settings=lambda t: t[:, :7].contiguous())),
        "settings must have 8 columns .* 7",
    ),
    "settings by columns": ("update", "sgd", _with(settings=_by_columns), "settings must be a contiguous"),
    "step of int64": ("update", "adam", _with(step=_as(torch.int64)), "step must be .* Float .* Long"),
    "step too short": ("update", "adam", _with(step=_half), "step must have .* 4, got 2"),
    # what belongs together
    "a rule that does not exist": ("update", "sgd", _with(rule=2), r"rule must be 0 \(SGD\) or 1 \(Adam\), got 2"),
    "momentum without a buffer": ("update", "sgd, momentum", _with(states=[]), "momentum needs .*momentum_buffer"),
    "momentum without step": ("update", "sgd, momentum", _with(step=None), "states need step"),
    "adam without step": ("update", "adam", _with(step=None), "states need step"),
    "adam with one state": ("update", "adam", _with(states=lambda v: v[:1]), "Adam has states .* got 1"),
    "sgd with two states": ("update", "sgd, momentum", _with(states=lambda v: v * 2), "SGD has states .* got 2"),
    "amsgrad without a maximum": (
        "update",
        "adam, amsgrad",
        _with(states=lambda v: v[:2]),
        "amsgrad needs .*max_exp_avg_sq",
    ),
    "eta without weights": ("norm", "adaptive", _with(weights=[]), "eta needs the weights"),
    "two flags": (
        "update",
        "sgd, skipped",
        _with(found_inf=torch.zeros(2)),
        r"found_inf must have one element, got .*2",
    ),
    "a flag of another dtype": (
        *("update", "adam, skipped", _with(found_inf=f64(0.0))),
        "found_inf must be a contiguous 1-d Float tensor, got Double",
    ),
    "no gradients to add up": ("norm", "plain", _with(grads=[]), "grads missing"),
    "no terms to multiply": ("gram", "two", _with(terms=[]), "terms missing"),
    "no vector": ("gram", "one", _with(count=0), "count must be 1 to 3, got 0"),
    "too many vectors": ("gram", "two", _with(count=4), "count must be 1 to 3, got 4"),
    "vectors that are no lists": ("gram", "three", _with(terms=lambda v: v[:8]), "terms must be .* 3; got 8"),
    "perturb without weights": ("perturb", "plain", _with(weights=[]), "weights"),
    "perturb without gradients": ("ascend", "plain", _with(grads=[]), "needs weights and grads"),
    "weights without saved": ("descend", "weights", _with(saved=None, status=None), "saved, which is missing"),
    "saved without status": ("update", "sgd, scaled", _with(status=None), "saved and status go together"),
    "neither weights nor out": ("descend", "out", _with(out=[]), "weights and out"),
    "an update without weights": ("update", "sgd", _with(weights=[]), "weights"),
    # coefficients
    "coefs of six numbers": ("descend", "out", _with(coefs=lambda v: v[:6]), "coefs must be 7 numbers .* got 6"),
    "coefs of five terms": (
        "descend",
        "out, two terms",
        _with(coefs=lambda v: (v * 3)[:35]),
        "at most 4 terms, got 35",
    ),
    "more coefs than terms": ("update", "sgd", _with(coefs=lambda v: v * 2), "terms must be .* 2; got 3"),
    "more terms than coefs": ("descend", "out, two terms", _with(coefs=lambda v: v[:7]), "out has 3 tensors, .* 6"),
    "a sum that is not there": (
        *("descend", "out, ratios", _with(coefs=coefs(({"b": 1.0, "p": 0, "q": 3}, 1.0)))),
        "sums 0 and 3 for term 0, there are 3",
    ),
    "a negative sum": (
        *("update", "sgd, ratios", _with(coefs=coefs((1.0, {"b": 1.0, "p": -1, "q": 0})))),
        "sums -1 and 0 for term 1, there are 3",
    ),
    "a ratio without sums": (
        "descend",
        "out",
        _with(coefs=coefs(({"b": 1.0},))),
        "sums 0 and 0 for term 0, there are 0",
    ),
    "rescale beyond the sums": ("descend", "out, ratios", _with(rescale=3), "rescale must be .* 3 sums, got 3"),
    "four sums": ("descend", "out, rescaled", _with(sums=lambda v: v * 2), "sums must be at most 3 tensors, got 4"),
    "nine rows": (
        "descend",
        "out, three terms",
        _with(sums=[torch.ones(6, 1).double(), torch.ones(3, 1).double()]),
        "8 rows",
    ),
    "a Gram matrix of two rows": (
        "descend",
        "out, ratios",
        _with(sums=_in_each(lambda t: t[:2])),
        "Gram matrix .* got 2 rows",
    ),
    "shares of fewer micro-batches": (
        *("descend", "out, a stack", _with(shares=torch.ones(1, 2).double())),
        r"terms\[0\] must have one row for each of 2 micro-batches, got shape \[3, 5\]",
    ),
    "shares of four stacks": (
        *("update", "sgd, a stack", _with(shares=torch.ones(4, 3).double())),
        r"shares must be of 1 to 3 stacks of micro-batches, got shape \[4, 3\]",
    ),
    "a stack of fewer micro-batches": (
        *("norm", "a stack", _with(stack=2)),
        r"grads\[0\] must have one row for each of 2 micro-batches, got shape \[3, 5\]",
    ),
    "a stack of none": ("gram", "a stack of two", _with(stack=0), "stack must be 1 to 65535 micro-batches, got 0"),
    "a stack whose micro-batches are interleaved": (
        *("norm", "a stack", _with(grads=_in_each(lambda t: t.t().contiguous().t()))),
        r"grads\[0\] must have one micro-batch after the other in memory, got strides \[1, 3\]",
    ),
    "a stack of a number": (
        *("norm", "a stack", _with(grads=_in_each(lambda t: t[0, 0]))),
        r"grads\[0\] must have one row for each of 3 micro-batches, got shape \[\]",
    ),
    "stacked terms that are a number": (
        *("descend", "out, a stack", _with(terms=_in_each(lambda t: t[0, 0], only=1))),
        r"terms\[1\] must have one row for each of 3 micro-batches, got shape \[\]",
    ),
    "copies in another memory order": (
        *("perturb", "a stack", _with(weights=_in_each(_by_columns))),
        r"weights must have one micro-batch after the other in memory, got strides \[1, 3\]",
    ),
    "copies to ascend to in another memory order": (
        *("ascend", "a stack", _with(weights=_in_each(_by_columns))),
        r"weights must have one micro-batch after the other in memory, got strides \[1, 3\]",
    ),
    "copies that are a number": (
        *("ascend", "a stack", _with(weights=_in_each(lambda t: t[0, 0]))),
        r"weights must have one row for each of 3 micro-batches, got shape \[\]",
    ),
    "a status of copies": (
        *("perturb", "a stack", _with(status=torch.zeros(3, dtype=torch.uint8))),
        "status says .* and stack that they are copies: give one of them",
    ),
    "weights that are perturbed without a status": (
        "perturb",
        "plain",
        _with(status=None),
        "status says .* give one of them",
    ),
    "copies of fewer micro-batches": (
        *("ascend", "a stack", _with(weights=_in_each(lambda t: t[:2]))),
        "weights must have one row for each of 3 micro-batches",
    ),
    "norms of fewer micro-batches": (
        *("perturb", "a stack", _with(norm_sq=lambda t: t[:2])),
        "norm_sq must have one row for each of 3 micro-batches",
    ),
    "a Gram matrix of more than the terms": (
        *("descend", "out", _with(sums=[torch.ones(3, 1).double()])),
        "Gram matrix .* got 3 rows",
    ),
}


# What a tensor may become whose values are not where its address says; what of it is possible; what the message says.
USELESS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "freed": (lambda t: _with_less_memory(t, 0), "{} reaches byte [0-9]+ of a storage of 0: it was freed or shrunk"),
    "shrunk": (
        lambda t: _with_less_memory(t, t.nbytes - t.element_size()),
        "{} reaches byte ([0-9]+) of a storage of [0-9]+: it was freed or shrunk",
    ),
    "negated": (lambda t: torch._neg_view(-t), r"{} stands for other values .* resolve_neg\(\)"),
    "meta": (_meta, "{} must be on cpu like the table: .* one device, got cpu and meta"),
    "fake": (_fake, "{} must be of one kind with the table, an ordinary tensor, got FakeTensor: convert it"),
    "sparse": (torch.Tensor.to_sparse, "{} must be "),
}
OTHERS = {
    "meta": "must be on meta like the table: .* one device, got meta and cpu",
    "fake": "must be of one kind with the table, FakeTensor, got an ordinary tensor",
}
WAYS = ("cpu", "torch.ops", "reference")


def _useless() -> Iterator[tuple[str, tuple[str, str, Callable[[dict], dict], str]]]:
    """Every argument of every operator that is a tensor, and one tensor of each list."""
    seen = set()
    for operator, variant in LARGEST:
        for argument, value in make(operator, variant, sizes=(5, 40, 33)).arguments.items():
            several = isinstance(value, list) and value and isinstance(value[0], Tensor)
            if not (several or isinstance(value, Tensor)) or (operator, argument) in seen:
                continue
            seen.add((operator, argument))
            for what, (change, message) in USELESS.items():
                if what == "negated" and not (value[-1] if several else value).is_floating_point():
                    continue
                changed = _in_each(change, only=len(value) - 1) if several else change
                label = argument
                if several:  # one flat buffer is weights, as is weights[0]
                    label += rf"\[{len(value) - 1}\]" if len(value) > 1 else r"(\[0\])?"
                if argument == "table":  # what it is, all others are not
                    message = OTHERS.get(what, message)
                row = (operator, variant, _with(**{argument: changed}), message.format(label))
                yield f"{what} {argument} of {operator}", row


ERRORS.update(_useless())


def ways(name: str) -> tuple[str, ...]:
    """Which of WAYS refuses the call in words of ours."""
    what = name.split()[0]
    if what not in USELESS:
        return (
            WAYS[::2]
            if re.match("(grads|terms|weights).* must have one (row|micro-batch)", ERRORS[name][3])
            else WAYS[:1]
        )
    # Of these torch.ops makes an error of torch's before it comes to us.
    return tuple(way for way in WAYS if way != "torch.ops" or what not in ("fake", "sparse"))


def provoke(name: str) -> dict[str, Any]:
    operator, variant, change, _ = ERRORS[name]
    flat = variant != "listed"
    call = make(operator, variant if flat else next(iter(VARIANTS[operator])), sizes=(5, 40, 33), flat=flat)
    before = copy.deepcopy(call)
    bad = Call(operator, change(call.arguments))
    found: dict[str, str | None] = {}
    for way in ways(name):
        try:
            bad.run(torch.ops.msam_kernels if way == "torch.ops" else way)
            found[way] = None
        except Exception as e:
            found[way] = f"{type(e).__name__}: {e}"
    try:
        assert_same_memory(call, before)
        changed = None
    except AssertionError as e:
        changed = str(e)
    return {"name": name, "errors": found, "changed": changed}


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
            reports[name] = {"errors": {"": f"exit status {done.returncode}: {done.stderr[-300:]}"}, "changed": None}
    return reports


@pytest.mark.parametrize("name", ERRORS)
def test_a_bad_call_is_refused_by_name_and_changes_nothing(name, errors):
    report = errors[name]
    for way, error in report["errors"].items():
        assert error is not None, f"nothing was raised by {way}"
        assert re.match("RuntimeError: .*" + ERRORS[name][3], error), way
        assert "\n" not in error, "one sentence, without the C++ stack"
    assert report["changed"] is None


@pytest.mark.skipif(backends.missing_extension is not None, reason="torch.ops reads the arguments of others than _C")
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ("wg", {}, "norm() lacks table"),
        ("wgtw", {}, "norm() takes 3 arguments without a name, got 4"),
        ("wgt", {"table": None}, "norm() got table twice"),
        ("wgt", {"sigma": 0.0, "momentum": 0.0}, "norm() has no argument momentum"),
        ("wgg", {}, "norm() takes Tensor as table, got list"),
        ("wgt", {"ema": 3}, "norm() takes Tensor? as ema, got int"),
        ("wgt", {"sigma": "0"}, "norm() takes float as sigma, got str"),
        ("wgt", {"sigma": None}, "norm() takes float as sigma, got NoneType"),
        ("wgt", {"eta": [0.1]}, "norm() takes float? as eta, got list"),
        ("wgt", {"stack": 2.0}, "norm() takes int? as stack, got float"),
        ("tgt", {}, "expected a list of tensors, got Tensor"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_a_call_that_the_operator_does_not_take_says_why(arguments, options, message):
    given = {"w": [torch.ones(4)], "g": [torch.ones(4)], "t": table((4,))[0]}
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        kernels_of("cpu").norm(*(given[name] for name in arguments), **options)


@pytest.mark.skipif(backends.missing_extension is not None, reason="torch.ops reads the arguments of others than _C")
def test_numbers_of_a_call_are_what_they_are_in_python():
    w, rows = [torch.tensor([1.0, -2.0])], table((2,))[0]
    kernels = kernels_of("cpu")

    class Name(str):  # no interned string, and not even a plain one
        pass

    options = {Name("".join(("et", "a"))): 1, "sigma": True}
    found = kernels.norm(w, w, rows, **options)
    assert found.tolist() == [2.0**2 + 6.0**2], "((|w| + eta) g)^2"
    weighed = kernels.weigh(torch.tensor([1.0], dtype=FP64), coefs=[2, 1, 0, 0, 0, 0, 0], sums=[])
    assert weighed.tolist() == [[2.0]]
    with pytest.raises(TypeError, match=re.escape("weigh() takes float[] as coefs, got list")):
        kernels.weigh(torch.tensor([1.0], dtype=FP64), coefs=["2"], sums=[])
    with pytest.raises(OverflowError, match="too big"):
        kernels.gram(w, rows, count=2**70)


def test_a_list_with_something_else_in_it_is_refused_and_its_tensors_live_on(extension):
    x, rows = torch.arange(4.0), table((4,))[0]
    count = x._use_count()
    with pytest.raises(TypeError, match="expected a list of tensors, got NoneType in it"):
        kernels_of("cpu").gram([x, None], rows, count=2)
    assert x._use_count() == count
    assert x.tolist() == [0, 1, 2, 3]


# ---- beyond 2^31 elements ----------------------------------------------------------------------------------------------

FAR = 2**31 + 12345


def _huge(n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    try:
        return torch.empty(n, dtype=dtype)
    except RuntimeError as e:
        pytest.skip(f"no address space for {n} elements: {e}")


@pytest.mark.parametrize(("operator", "variant"), LARGEST, ids=lambda v: v)
def test_a_place_beyond_2_31_elements_gives_the_bits_of_a_near_one(operator, variant):
    # One real tensor of more than 2^31 elements, of which the system only backs the pages that are touched. Every argument
    # is a window of it, shifted so that the parts that the table names lie side by side.
    n, room = 700, 4096
    near = make(operator, variant, torch.bfloat16, (n,), groups=1)
    far, windows = copy.deepcopy(near), {}
    size = (FAR + n) * near.arguments.get("stack", VARIANTS[operator][variant].get("stack", 1)) + room * 16
    kinds = (torch.bfloat16, torch.float32)[: 1 + ("masters" in VARIANTS[operator][variant])]  # which are of fp32
    memory = {dtype: _huge(size, dtype) for dtype in kinds}

    def moved(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dtype not in memory or len(t.shape) == 0 or t.shape[-1] < n:
            return t
        start = windows.setdefault(t.data_ptr(), len(windows)) * room  # out may be one of the terms
        window = memory[t.dtype][start : start + len(t[..., 0].reshape(-1)) * (FAR + n)].view(*t.shape[:-1], FAR + n)
        window[..., FAR:] = t[..., :n]
        return window

    for name, value in far.arguments.items():
        if isinstance(value, list):
            far.arguments[name] = [moved(t) for t in value]
        elif name != "mask":
            far.arguments[name] = moved(value)
        else:
            bits = np.pad(np.unpackbits(value.numpy(), bitorder="little"), (FAR % 8, 0))
            far.arguments[name] = torch.empty(FAR // 8 + room, dtype=torch.uint8)
            packed = torch.from_numpy(np.packbits(bits, bitorder="little"))
            far.arguments[name][FAR // 8 :][: len(packed)] = packed
    far.arguments["table"] += torch.tensor([0, FAR, FAR, 0, 0])
    results = [near.run(), far.run()]
    for name, value in near.arguments.items():
        for a, b in each_tensor(value, far.arguments[name]):
            if b.shape[-1:] == (FAR + n,):
                assert_same_bits(b[..., FAR:], a[..., :n], name)
            elif name in ("status", *SUMS):
                assert torch.equal(a, b)
    if results[0] is not None:
        assert_same_bits(*results, "the result")


def zeros(n: int) -> Tensor:
    """In bfloat16. Where they are only read they take no memory, and in huge pages little time."""
    memory = mmap.mmap(-1, 2 * n)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


def sum_perturb_and_restore_beyond_32_bits() -> None:
    n = 2**31 + 3 * CHUNK + 5
    begin = torch.arange(0, n, CHUNK)
    rows = torch.stack([begin * 0, begin, begin, (n - begin).clamp(max=CHUNK), begin * 0], 1)
    one = torch.tensor([[0, 0, 0, n, 0]])  # a row whose count does not fit 32 bits
    weights, saved, grad = (zeros(n) for _ in range(3))
    places = torch.tensor([0, 1, 2**31 - 1, 2**31 + 1, n - 1])
    grad[places] = torch.tensor([2.5, 1.5, -2.0, 3.0, -4.0], dtype=torch.bfloat16)
    expected = grad[places].double().square().sum().item()
    kernels = kernels_of("cpu")
    assert kernels.norm([], [grad], one).sum().item() == expected
    norm_sq = kernels.norm([], [grad], rows)
    assert norm_sq.sum().item() == expected
    # With a radius of ‖g‖ and zero weights, w + e is g: where any is, and in the rows beside.
    near = (rows[:, 1, None] - places).abs().amin(1) <= 2 * CHUNK
    assert near.sum() < 20
    some = rows[near]
    achieved_sq, status = torch.empty(3, len(some), dtype=torch.float64), torch.zeros(len(some), dtype=torch.uint8)
    written = {"saved": saved, "status": status, "achieved_sq": achieved_sq}
    kernels.perturb(
        [weights],
        [grad],
        some,
        norm_sq=norm_sq,
        radii=torch.tensor([[math.sqrt(expected), INF]], dtype=FP64),
        **written,
    )
    assert torch.equal(weights[places], grad[places])
    assert achieved_sq.sum(1).tolist() == [expected] * 3
    kernels.descend([weights], [], [], some, coefs=[], sums=[], saved=saved, status=status)
    assert not weights[places].any()


@pytest.mark.usefixtures("extension")
def test_terms_too_small_to_count_alone_count_together():
    """Each of 4,096 rows adds 2^-54 to a sum of 1, where half a unit in the last place is 2^-53."""
    grads = [torch.ones(1, dtype=torch.float64), *torch.full((4096, 1), 2.0**-27, dtype=torch.float64)]
    rows, *_ = table((1,) * len(grads))
    assert kernels_of("cpu").norm([], grads, rows).tolist() == [1 + 2.0**-42]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_more_than_2_31_elements_are_all_summed_perturbed_and_restored():
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    if available < 5 << 30:
        pytest.skip("needs 5 GB of free memory")
    done = child("beyond-32-bits")
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "instruction-set":
        report: dict[str, Any] = {"isa": None, "missing": backends.available_backends()["cpu"]}
        if report["missing"] is None:
            prints = fingerprint(CASES, lambda _: (0, 1, 3, 4, 5, 31, 33, 255, 257, 4097, CHUNK + 1))
            prints.update(fingerprint(STREAMED_CASES[1::2], lambda itemsize: (STREAMED // itemsize, 257)))
            report |= {"isa": backends.extension.build_info()["instruction_set"], "conversions": conversion_errors()}
            report |= {"fingerprint": prints}
        print(json.dumps(report))
    elif sys.argv[1] == "errors":
        for error_name in sys.argv[2:]:
            print(json.dumps(provoke(error_name)), flush=True)
    elif sys.argv[1] == "threads":
        print(json.dumps(threads_by_size()))
    elif sys.argv[1] == "beyond-32-bits":
        torch.set_num_threads(2)
        sum_perturb_and_restore_beyond_32_bits()
