# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: their own source, compiled for the CPU on an emulator of blocks and threads.

``emulator/cuda_emulator.h`` makes every CUDA thread a fiber. What runs here is csrc/cuda as it is: the kernels, the
launchers with their windows of pointers, and torch's side of them, on tensors in ordinary memory. It proves indices,
formulas, roundings and the order of sums, not speed and not what only a GPU's memory does.
"""

from __future__ import annotations

import copy
import ctypes
import fcntl
import hashlib
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import cases
from cases import (
    ABSENT,
    BITS,
    CASES,
    EXPONENT,
    LARGEST,
    MIXED,
    VARIANTS,
    Call,
    assert_close_sums,
    assert_matches,
    assert_same_bits,
    assert_same_memory,
    assert_sums_are_rounded_once,
    each_case,
    each_dtype,
    exact_sum_of_squares,
    halves,
    in_turn,
    some_cases,
    spread,
    table,
    with_layouts,
)
from msam_kernels import MicroBatchSAM, backends, flat, methods, store
from msam_kernels.flat import CHUNK, row_length
from plain import METHODS as FAMILY
from plain import batch, loss_of, mlp, same_bits, train_parameters_without_elements, weights
from test_golden import BATCHES, GOLDEN, TOLERANCE, WAYS, Problem

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
SOURCES = (
    *sorted((ROOT / "csrc").glob("*.h")),
    *sorted((ROOT / "csrc" / "cuda").iterdir()),
    TESTS / "emulator" / "cuda_emulator.h",
)
STUBS = (
    *("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"),
    *("c10/cuda/CUDAException.h", "c10/cuda/CUDAGuard.h", "c10/cuda/CUDAStream.h"),
)
UNITS = {
    "operators": '#include "csrc/cuda/operators.cpp"\nextern "C" int64_t launches() { return emulated_launches(); }\n',
    "kernels": '#include "csrc/cuda/kernels.cu"\n',
}
FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"),
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),  # a GPU stops at a misaligned access, too
    *("-Dmsam_kernels=msam_emulated", "-DMSAM_DISPATCH_KEY=CPU"),
    '-DMSAM_LAUNCH_POINTERS=emulator::setting("MSAM_EMULATOR_POINTERS",1<<30)',
)
GPU = torch.device("cuda")
ROW = row_length(GPU, torch.float32)  # half as long in fp64, twice as long in 16 bits
# Around a thread's 16 bytes (2, 4 or 8 elements), a round of 256 threads (512 to 8192), and a row of each storage type.
SIZES = (0, 1, 3, 4, 5, 8, 255, 257, 1023, ROW + 1, 3 * ROW + 5, 2 * ROW, 33)
each_large_case = pytest.mark.parametrize(("operator", "variant"), LARGEST, ids=lambda v: v)
# On a busy machine the first one that asks for the emulator waits for its compiler.
pytestmark = [pytest.mark.host, pytest.mark.usefixtures("extension"), pytest.mark.timeout(1200)]


def build(folder: Path) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    text = b"".join(p.read_bytes() for p in SOURCES) + repr((UNITS, FLAGS, torch.__version__)).encode()
    library = folder / f"cuda_emulated-{hashlib.sha256(text).hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cuda_emulated.lock", "w") as lock:  # of several test processes, one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        for old in folder.glob("cuda_emulated-*.so"):
            old.unlink()
        stubs = folder / "cuda_emulated"
        for name in STUBS:
            (stubs / name).parent.mkdir(parents=True, exist_ok=True)
            (stubs / name).write_text('#include "cuda_emulator.h"\n')
        include = Path(torch.__file__).parent / "include"
        folders = [stubs, TESTS / "emulator", ROOT, include, include / "torch" / "csrc" / "api" / "include"]
        options = [
            *FLAGS,
            *(f"-I{f}" for f in folders),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        jobs = []
        for name, code in UNITS.items():
            (stubs / f"{name}.cpp").write_text(code)
            command = [compiler, *options, "-c", str(stubs / f"{name}.cpp"), "-o", str(stubs / f"{name}.o")]
            jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        for job in jobs:
            output, _ = job.communicate()
            assert job.returncode == 0, output
        libraries = Path(torch.__file__).parent / "lib"
        objects = [str(stubs / f"{name}.o") for name in UNITS]
        link = [
            compiler,
            "-shared",
            "-pthread",
            *objects,
            f"-L{libraries}",
            "-lc10",
            "-ltorch_cpu",
            "-o",
            f"{library}.new",
        ]
        done = subprocess.run(link, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        Path(f"{library}.new").rename(library)
    return library


class Emulated:
    """The namespace of operators, as a backend has it."""

    def __init__(self, library: Path):
        self._declared = torch.library.Library("msam_emulated", "DEF")
        backends.declare(self._declared)
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        self._library.launches.restype = ctypes.c_int64

    def __getattr__(self, operator):
        return getattr(torch.ops.msam_emulated, operator)

    def launches(self) -> int:
        return self._library.launches()


@pytest.fixture(scope="session")
def emulated(extension) -> Emulated:
    if sys.platform != "linux":
        pytest.skip("the emulator's fibers are tried on Linux")
    return Emulated(build(ROOT / "build" / "emulator"))


def added_up(terms: torch.Tensor) -> torch.Tensor:
    """The sum of each row in the kernels' order: 256 threads in turn, each warp by halves, one warp after the other."""
    if terms.dim() == 2:
        return torch.stack([added_up(row) for row in terms])
    threads = torch.zeros(256, dtype=torch.float64)
    for part in terms.split(256):
        threads[: len(part)] += part
    warps = threads.view(8, 32)
    while warps.shape[1] > 1:
        half = warps.shape[1] // 2
        warps = warps[:, :half] + warps[:, half:]
    total = warps[0]
    for warp in warps[1:]:
        total = total + warp
    return total


def make(operator, variant, dtype=torch.float32, sizes=SIZES, **options) -> Call:
    """A call with rows as a GPU has them."""
    return cases.make(operator, variant, dtype, sizes, **{"chunk": row_length(GPU, dtype), **options})


def assert_matches_cpu(emulated: Emulated, call: Call) -> None:
    """Every bit of the CPU's results, but of the sums, which are added in another order."""
    assert_matches(call, emulated, "cpu", rtol=1e-14)


def assert_same(one: Call, other: Call, *results: torch.Tensor | None) -> None:
    assert_same_memory(one, other)
    if results[0] is not None:
        assert_same_bits(*results, "the result")


# ---- the CPU's bits ----------------------------------------------------------------------------------------------------


@with_layouts(lambda k, j: j in (0, in_turn(k)))
def test_the_kernels_give_the_bits_of_the_cpu(operator, variant, dtype, flat, shift, emulated):
    assert_matches_cpu(emulated, make(operator, variant, dtype, SIZES, flat=flat, shift=shift, absent=ABSENT))


@each_dtype
@each_large_case
def test_listed_aligned_weights_give_the_bits_of_the_cpu(operator, variant, dtype, emulated):
    assert_matches_cpu(emulated, make(operator, variant, dtype, (257, 0, 8, ROW + 5), flat=False))


@pytest.mark.parametrize("chunk", [7, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 100))])
@each_case
def test_rows_of_any_length_give_the_bits_of_the_cpu(operator, variant, chunk, emulated):
    absent = {name: numbers[:1] for name, numbers in ABSENT.items()}
    sizes = (1, 20, 0, 33, 8)
    assert_matches_cpu(emulated, make(operator, variant, torch.float32, sizes, chunk=chunk, seed=5, absent=absent))


@pytest.mark.parametrize("alias", range(4))
@each_dtype
def test_out_may_be_any_term(alias, dtype, emulated):
    for variant in ("out, four terms", "out, many sums", "out, zero coefficients"):
        options = {**VARIANTS["descend"][variant], "alias": alias, "unread": (), "out_sq": True}
        assert_matches_cpu(emulated, make("descend", options, dtype, (5, 300, 0, 33, ROW + 1), absent=ABSENT))


@each_dtype
def test_a_tensor_that_stays_as_it_is_is_not_written(dtype, emulated):
    """Arithmetic would make quiet NaNs of signalling ones."""
    for terms, alias in (((1.0,), 0), ((1.0, 0.0), 0), ((0.0, 1.0, 0.0), 1)):
        call = make("descend", {"terms": terms, "alias": alias, "status": MIXED}, dtype, (300, 0, 33, 1))
        for t in call.arguments["out"]:
            t.view(BITS[dtype]).fill_(EXPONENT[dtype] | 1)
        out = copy.deepcopy(call.arguments["out"])
        call.run(emulated)
        for t, expected in zip(call.arguments["out"], out, strict=True):
            assert_same_bits(t, expected)


EXTREMES = (0.0, -0.0, 1e-45, 1e-38, 1e-31, 1e-30, 1e-18, 1e-9, 1.0, 1e6, 2e6, 1e20, 3e38, math.inf, math.nan)


@pytest.mark.parametrize("options", [{}, {"eps": 0.0}, {"eps": 1e6}, {"beta2": 1.0}, {"beta2": 1 - 1e-12}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_roots_and_quotients_of_any_size_have_the_bits_of_the_cpu(dtype, options, emulated):
    """Within a thread's vector, beside others and alone: ordinary numbers take another way than the rest."""
    numbers = torch.tensor(EXTREMES, dtype=torch.float64)
    first = torch.cat([numbers, -numbers]).repeat_interleave(len(numbers) * 9)
    second = numbers.repeat(2 * len(numbers)).repeat_interleave(9)
    first[1::3], second[1::3] = 0.25 + torch.arange(len(first[1::3])) / len(first), 0.5
    first[100:500] *= 1 + torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    call = make("update", {**VARIANTS["update"]["adam"], **options}, dtype, (len(first),))
    exp_avg, exp_avg_sq = call.arguments["states"]
    exp_avg[: len(first)], exp_avg_sq[: len(first)] = first.to(dtype), second.to(dtype)
    assert_matches_cpu(emulated, call)


# ---- launches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(5, 300, ROW + 5), (9 * ROW,)], ids=str)
@each_case
def test_every_operator_is_one_launch(operator, variant, sizes, emulated):
    call, before = make(operator, variant, torch.float32, sizes), emulated.launches()
    call.run(emulated)
    # F-SAM's mean moves on from micro-batch to micro-batch.
    moves = operator == "ascend" and "lmbda" in call.arguments
    assert emulated.launches() - before == (call.arguments.get("stack", 1) if moves else 1)


@pytest.mark.parametrize("pointers", [11, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (10, 13))])
@some_cases(2)
def test_pointers_beyond_one_launch_take_several(operator, variant, pointers, emulated, monkeypatch):
    sizes = (5, 0, 300, 33, ROW + 5, 1, 257, 8, 1, 40, 7, 5, 3, 9)
    calls = [make(operator, variant, torch.float32, sizes, flat=False, absent=ABSENT) for _ in range(2)]
    results = [calls[0].run(emulated)]
    before = emulated.launches()
    monkeypatch.setenv("MSAM_EMULATOR_POINTERS", str(pointers))
    results.append(calls[1].run(emulated))
    assert emulated.launches() - before > 1
    if results[0] is None:
        assert_same_memory(*calls)
    else:  # a term adds its launches up one by one
        assert_close_sums(*results, rtol=1e-14, gram=operator == "gram")


@pytest.mark.parametrize(
    ("count", "operator", "variant", "launches"),
    [
        *((900, "norm", "plain", 1), (900, "update", "sgd, four terms", 1)),
        (1100, "update", "sgd, four terms", 2),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((4200, "norm", "plain", 2), (2100, "update", "adam, mean", 2))
        ),
    ],
)
def test_thousands_of_parameters_fit_a_few_launches(count, operator, variant, launches, emulated):
    """One launch carries some 4,000 pointers."""
    call = make(operator, variant, torch.float32, tuple(1 + i % 3 for i in range(count)))
    assert_matches_cpu(emulated, copy.deepcopy(call))
    before = emulated.launches()
    call.run(emulated)
    assert emulated.launches() - before == launches


@pytest.mark.parametrize("sizes", [(0,), (0, 0)], ids=["one parameter", "two parameters"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat weights", "listed weights"])
def test_an_empty_table_launches_nothing(flat, sizes, emulated):
    for operator, variant in CASES:
        call = make(operator, variant, torch.float32, sizes, flat=flat)
        untouched, before = copy.deepcopy(call), emulated.launches()
        result = call.run(emulated)
        assert emulated.launches() == before
        assert_same_memory(call, untouched)
        assert result is None or not result.any()


# ---- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decades", [0, 4], ids=["alike", "over eight decades"])
@pytest.mark.parametrize("n", [1, 5, 257, ROW + 1, 40000])
@each_dtype
def test_the_norm_is_within_a_few_ulp_of_the_exact_one(dtype, n, decades, emulated):
    g = spread(n, dtype, 2 if dtype == torch.float16 and decades else decades)
    rows = table((n,), dtype.itemsize, chunk=row_length(GPU, dtype))[0]
    norm_sq = math.fsum(emulated.norm([], [g], rows).tolist())
    exact = exact_sum_of_squares(g)
    assert abs(norm_sq - exact) <= (4 if dtype == torch.float64 else 16) * math.ulp(exact)
    norms = torch.tensor([math.sqrt(norm_sq), math.sqrt(exact)], dtype=torch.float64)
    assert abs(norms[0] - norms[1]) <= (2 if dtype == torch.float64 else 8) * math.ulp(norms[1])


@pytest.mark.parametrize("decades", [0, 4], ids=["alike", "over eight decades"])
@pytest.mark.parametrize("n", [1, 257, CHUNK + 1, 40000])
def test_sums_of_doubles_are_rounded_once(n, decades, emulated):
    assert_sums_are_rounded_once(emulated, n, decades)


@each_dtype
def test_the_gram_matrix_has_the_bits_of_the_norm_where_its_vectors_are_one(dtype, emulated):
    call = make("gram", "one", dtype, SIZES)
    x, rows = call.arguments["terms"], call.arguments["table"]
    for count in (1, 2, 3):
        for row in emulated.gram(x * count, rows, count=count):
            assert_same_bits(row, emulated.norm([], x, rows))


@each_dtype
@pytest.mark.parametrize("variant", VARIANTS["ascend"])
def test_one_launch_gives_the_bits_of_two(variant, dtype, emulated):
    sizes = (5, 300, 0, 3 * ROW + 7, 257)
    one, two, three = (make("ascend", variant, dtype, sizes, absent=(1,)) for _ in range(3))
    result = one.run(emulated)
    # A mean that moves on makes the direction of one micro-batch depend on the perturbation before.
    times = one.arguments.get("stack", 1) if "lmbda" in one.arguments else 1
    if times == 1:
        norm_sq = halves(two, None)[0].run(emulated)
        halves(two, norm_sq)[1].run(emulated)
        assert_same(one, two, result, norm_sq)
    before = emulated.launches()
    assert_same(one, three, result, Call("ascend", {**three.arguments, "arrived": None}).run(emulated))
    assert emulated.launches() - before == 2 * times


def test_two_launches_may_be_asked_for(emulated, monkeypatch):
    monkeypatch.setattr(store, "get_backend", lambda *_: emulated)
    launches = []
    for asked in ("0", "1"):
        monkeypatch.setenv("MSAM_KERNELS_TWO_LAUNCHES", asked)
        model = mlp()
        opt = MicroBatchSAM(torch.optim.SGD(model.parameters(), 0.1))
        before = emulated.launches()
        opt.train_step(partial(loss_of, model), *batch(0))
        launches.append(emulated.launches() - before)
    assert launches == [2, 3]


# Of 1,050 rows two make one term.
@pytest.mark.parametrize(
    ("chunk", "absent", "orders"),
    [(50, (), 4), (50, (1,), 4), (50, (0, 1, 2), 4), (700, (), 4), (2, (), 2)],
    ids=str,
)
def test_one_launch_gives_the_same_bits_in_every_order_of_its_blocks(chunk, absent, orders, emulated, monkeypatch):
    calls, results = [], []
    for order in range(orders):
        monkeypatch.setenv("MSAM_EMULATOR_ORDER", str(order))
        calls.append(make("ascend", "any status, friendly", torch.float32, (700,) * 3, chunk=chunk, absent=absent))
        results.append(calls[-1].run(emulated))
        assert_same(calls[0], calls[-1], results[0], results[-1])
        assert calls[-1].arguments["arrived"].item() == 0, "or the next call would not wait"


@pytest.mark.parametrize("terms", [1, 2, 300, 1024])
def test_consumers_add_all_terms_of_the_norm(terms, emulated):
    one, many = (make("perturb", "plain", torch.float32, (5, 300)) for _ in range(2))
    one.arguments["norm_sq"] = torch.tensor([terms * 0.25], dtype=torch.float64)
    many.arguments["norm_sq"] = torch.full((terms,), 0.25, dtype=torch.float64)
    one.run(emulated)
    many.run(emulated)
    assert_same_memory(one, many)


@pytest.mark.parametrize("terms", [1, 2, 300, 1024])
@pytest.mark.parametrize("operator", ["descend", "update"])
def test_each_row_of_the_sums_is_added_up_in_the_order_of_the_norm(operator, terms, emulated):
    """Numbers whose sum depends on the order: the coefficients are those of the rows, added up by hand."""
    variant = {"descend": "out, many sums", "update": "adam, many sums"}[operator]
    one, many = (make(operator, variant, torch.float32, (5, 300)) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    rows = [3 + torch.randn(n, terms, generator=generator, dtype=torch.float64) for n in (6, 1, 1)]
    norm_sq = torch.rand(terms, generator=generator, dtype=torch.float64)
    many.arguments.update(sums=rows, norm_sq=norm_sq)
    one.arguments.update(sums=[added_up(part) for part in rows], norm_sq=added_up(norm_sq))
    one.run(emulated)
    many.run(emulated)
    assert_same_memory(one, many)


@pytest.mark.parametrize("where", [0, 255, 256, 999])
def test_one_term_that_is_not_finite_is_enough(where, emulated):
    for operator, variant in (("perturb", "not finite"), ("update", "sgd, not finite"), ("descend", "out, not finite")):
        call = make(operator, variant, torch.float32, (5, 300))
        expected = copy.deepcopy(call)
        call.arguments["norm_sq"] = torch.ones(1000, dtype=torch.float64)
        call.arguments["norm_sq"][where] = math.nan
        call.run(emulated)
        expected.run("cpu")
        assert_same_memory(call, expected)


# ---- order and repetition ------------------------------------------------------------------------------------------------


@some_cases(2)
def test_no_order_of_threads_and_blocks_changes_a_bit(operator, variant, emulated, monkeypatch):
    calls, results = [], []
    for order in (0, 0, 1, 2):
        monkeypatch.setenv("MSAM_EMULATOR_ORDER", str(order))
        calls.append(make(operator, variant, torch.bfloat16, (5, 0, 300, 2 * ROW + 7, 33), absent=ABSENT))
        results.append(calls[-1].run(emulated))
    for call, result in zip(calls[1:], results[1:], strict=True):
        assert_same(calls[0], call, results[0], result)


@pytest.mark.parametrize("variant", ["sgd, everything", "adam, everything"])
@pytest.mark.parametrize("pointers", [6, 1 << 30], ids=["several launches", "one launch"])
@pytest.mark.parametrize("order", [0, 1])
def test_an_update_counts_each_step_once_and_leaves_the_ticket_as_it_was(
    variant, order, pointers, emulated, monkeypatch
):
    monkeypatch.setenv("MSAM_EMULATOR_POINTERS", str(pointers))
    monkeypatch.setenv("MSAM_EMULATOR_ORDER", str(order))
    absent = {"terms 0": (1, 2), "terms 1": (0, 1)}
    call = make("update", variant, torch.float32, (5, 300, ROW + 5, 0, 7), flat=False, absent=absent)
    expected = copy.deepcopy(call)
    before = call.arguments["step"].clone()
    for _ in range(3):
        call.run(emulated)
        expected.run("cpu")
    assert (call.arguments["step"] - before).tolist() == [3, 0, 3, 0, 3, 0]
    assert_same_memory(call, expected)


# ---- checks ------------------------------------------------------------------------------------------------------------


def freed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def test_what_the_kernels_cannot_use_is_refused(emulated, monkeypatch):
    """The checks are those of the CPU, but that nothing is checked against the rows of a table on a GPU."""

    def refused(operator, variant, match, flat=True, **changes):
        call = make(operator, variant, torch.float32, (5, 300), flat=flat)
        call.arguments.update({n: change(call.arguments.get(n)) for n, change in changes.items()})
        untouched, before = copy.deepcopy(call), emulated.launches()
        with pytest.raises(RuntimeError, match=match):
            call.run(emulated)
        assert_same_memory(call, untouched)
        assert emulated.launches() == before

    refused("perturb", "plain", r"grads\[0\] must be Float .* Double", grads=lambda g: [t.double() for t in g])
    refused("perturb", "plain", "dense in memory", grads=lambda g: [t.repeat(2)[::2] for t in g])
    refused("perturb", "plain", "status must have one element per row", status=lambda t: t[:1])
    refused("perturb", "plain", "one per parameter", flat=False, weights=lambda w: [*w, w[0]])
    refused("descend", "weights", "saved and status go together", saved=lambda _: None)
    refused("gram", "three", "terms must be .* 3; got 5", terms=lambda t: t[:5])
    refused("update", "adam", "step must have .* 3, got 2", step=lambda s: s[:2])
    refused("update", "sgd, momentum", "states need step", step=lambda _: None)
    refused("update", "adam", r"states\[0\] must be Float", states=lambda v: [t.double() for t in v])
    refused("perturb", "plain", "saved stands for other values", saved=lambda t: torch._neg_view(-t))
    refused("gram", "three", r"terms\[1\] stands for other", terms=lambda v: [v[0], torch._neg_view(v[1]), *v[2:]])
    refused("update", "adam", r"states\[1\] .* freed or shrunk", states=lambda v: [v[0], freed(v[1])])
    refused("ascend", "plain", "table .* freed or shrunk", table=freed)
    refused("ascend", "plain", "arrived must have one element", arrived=lambda t: torch.zeros(2, dtype=torch.int32))


def test_state_that_a_group_needs_and_the_call_lacks_shows(emulated):
    for variant, states in (("sgd, momentum", 0), ("adam, amsgrad", 2)):
        call = make("update", variant, torch.float32, (5, 300, 7))
        call.arguments["states"] = call.arguments["states"][:states]
        call.run(emulated)
        for _, _, offset, numel, group in call.arguments["table"].tolist():
            found = call.arguments["weights"][0][offset : offset + numel]
            assert found.isnan().all() if group != 1 else found.isfinite().all()


# ---- whole steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flatten", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["flat", "not flat"])
@pytest.mark.parametrize(("name", "micro_batches"), GOLDEN)
def test_the_optimizer_follows_the_golden_trajectory(name, micro_batches, flatten, way, emulated, monkeypatch):
    monkeypatch.setattr(store, "get_backend", lambda *_: emulated)
    problem = Problem("two scalars of two groups", name, num_micro_batches=micro_batches, flatten=flatten)
    for x, golden in zip(BATCHES, GOLDEN[name, micro_batches], strict=True):
        WAYS[way](problem, torch.tensor(x, dtype=torch.float64), micro_batches)
        torch.testing.assert_close(problem.weights, torch.tensor(golden, dtype=torch.float64), **TOLERANCE)


@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "not flat"])
@pytest.mark.parametrize("name", FAMILY)
def test_parameters_without_elements_are_no_obstacle(name, flatten, emulated, monkeypatch):
    monkeypatch.setattr(store, "get_backend", lambda *_: emulated)
    train_parameters_without_elements(method=FAMILY[name], flatten=flatten)


def test_many_terms_are_added_up_once_with_the_same_bits(emulated, monkeypatch):
    """Those of the squared norm that LookSAM remembers."""
    monkeypatch.setattr(store, "get_backend", lambda *_: emulated)
    found = []
    for few in (flat.FEW_TERMS, 1):
        monkeypatch.setattr(flat, "FEW_TERMS", few)
        model, data = mlp(), batch()
        opt = MicroBatchSAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, method=methods.LookSAM(k=2))
        for _ in range(4):
            opt.train_step(partial(loss_of, model), *data)
        (memory,) = opt.engine.store.memory("v", 0.0)
        assert len(memory.square) == (1 if few == 1 else len(memory.terms))
        found.append(weights(model))
    assert same_bits(*found)


def test_an_interrupted_loop_restores_the_weights(emulated, monkeypatch):
    monkeypatch.setattr(store, "get_backend", lambda *_: emulated)
    model, data = mlp(), batch()
    opt = MicroBatchSAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, num_micro_batches=2)
    before = weights(model)
    for stop in range(4):
        for i, part in enumerate(opt.passes(*data)):
            loss_of(model, *part).backward()
            if i == stop:
                assert same_bits(model.parameters(), before) == (i % 2 == 0)
                break
        assert same_bits(model.parameters(), before)
