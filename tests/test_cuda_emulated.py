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
from pathlib import Path

import pytest
import torch

from msam_kernels import MicroBatchSAM, ops
from msam_kernels.flat import CHUNK
from plain import batch, loss_of, mlp, same_bits, weights
from test_golden import BATCHES, GOLDEN, METHODS, TOLERANCE, WAYS, Problem
from test_kernels import (
    CASES,
    SUMS,
    VARIANTS,
    Call,
    assert_same_bits,
    dot_scales,
    each_dtype,
    exact_sum_of_squares,
    make,
    spread,
    table,
)

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
SOURCES = (
    *sorted((ROOT / "csrc").glob("*.h")),
    *sorted((ROOT / "csrc" / "cuda").iterdir()),
    TESTS / "emulator" / "cuda_emulator.h",
)
STUBS = (
    *("cuda_runtime.h", "cooperative_groups.h", "cuda_bf16.h", "cuda_fp16.h"),
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
# Around a thread's 16 bytes (2, 4 or 8 elements), a round of 256 threads (512 to 8192), and a chunk.
SIZES = (0, 1, 3, 4, 5, 8, 255, 257, 1023, 4097, CHUNK + 5, 2 * CHUNK)
each_case = pytest.mark.parametrize(("operator", "variant"), CASES, ids=lambda v: v)
pytestmark = [pytest.mark.host, pytest.mark.usefixtures("extension")]


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
        for schema in ops._SCHEMAS:
            self._declared.define(schema)
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        self._library.launches.restype = ctypes.c_int64

    def __getattr__(self, operator):
        return getattr(torch.ops.msam_emulated, operator)

    def launches(self) -> int:
        return self._library.launches()

    def run(self, call: Call):
        args, kwargs = call.args()
        return getattr(self, call.operator)(*args, **kwargs)


@pytest.fixture(scope="session")
def emulated(extension) -> Emulated:
    if sys.platform != "linux":
        pytest.skip("the emulator's fibers are tried on Linux")
    return Emulated(build(ROOT / "build" / "emulator"))


def assert_same_memory(one: Call, other: Call, *, apart_from: tuple[str, ...] = ()) -> None:
    others = other.tensors()
    for name, tensor in one.tensors().items():
        if name not in apart_from:
            assert_same_bits(tensor, others[name], name)


def sum_of_squares(backend, call: Call) -> torch.Tensor:
    a = call.arguments
    options = {name: a[name] for name in ("ema", "sigma", "eta") if name in a}
    return backend.inner_products(a["weights"], a["grads"], a["chunks"], **options)


def added_up(terms: torch.Tensor) -> torch.Tensor:
    """The sum in the kernels' order: 256 threads in turn, each warp by halves, one warp after the other."""
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


def assert_same_dots(one: torch.Tensor, other: torch.Tensor) -> None:
    actual, wanted = one.sum(1), other.sum(1)
    scales = dot_scales(wanted)
    torch.testing.assert_close(actual / scales, wanted / scales, rtol=0, atol=1e-14)


def assert_matches_cpu(emulated: Emulated, call: Call) -> None:
    """Every bit of the CPU's results, but of the sums, which are added in another order."""
    expected = copy.deepcopy(call)
    result = emulated.run(call)
    if call.operator == "ascend":
        # Both perturb by the norm that the emulated kernels found.
        expected.arguments.update(norm_sq=added_up(result), acc=[])
        wanted = sum_of_squares(backends.get_backend("cpu", torch.device("cpu")), expected)
        expected.operator = "perturb"
        expected.run("cpu")
    else:
        wanted = expected.run("cpu")
    if call.operator == "dots":
        assert_same_dots(result, wanted)
    elif result is not None:
        torch.testing.assert_close(added_up(result), wanted, rtol=1e-14, atol=0, equal_nan=True)
    assert_same_memory(call, expected, apart_from=SUMS)
    for name in set(SUMS) & call.arguments.keys():
        torch.testing.assert_close(call.arguments[name], expected.arguments[name], rtol=1e-14, atol=0)


# ---- the CPU's bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flat", "shift"), [(True, 0), (False, 1)], ids=["flat weights", "listed weights, misaligned"])
@each_dtype
@each_case
def test_the_kernels_give_the_bits_of_the_cpu(operator, variant, dtype, flat, shift, emulated):
    assert_matches_cpu(emulated, make(operator, variant, dtype, SIZES, flat=flat, shift=shift, absent=(3, 8)))


@each_dtype
@each_case
def test_listed_aligned_weights_give_the_bits_of_the_cpu(operator, variant, dtype, emulated):
    assert_matches_cpu(emulated, make(operator, variant, dtype, (257, 0, 8, CHUNK + 5), flat=False))


@pytest.mark.parametrize("chunk", [1, 7, 100])
@each_case
def test_rows_of_any_length_give_the_bits_of_the_cpu(operator, variant, chunk, emulated):
    assert_matches_cpu(emulated, make(operator, variant, torch.float32, (1, 20, 0, 33), chunk=chunk, seed=5))


# ---- several launches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pointers", [3, 4, 6])
@each_case
def test_pointers_beyond_one_launch_take_several(operator, variant, pointers, emulated, monkeypatch):
    sizes = (5, 0, 300, 33, CHUNK + 5, 1, 257)
    calls = [make(operator, variant, torch.float32, sizes, flat=False, absent=(3,)) for _ in range(2)]
    results = [emulated.run(calls[0])]
    before = emulated.launches()
    lists = sum(len(v) // len(sizes) for v in calls[1].arguments.values() if isinstance(v, list))
    monkeypatch.setenv("MSAM_EMULATOR_POINTERS", str(max(pointers, lists)))
    results.append(emulated.run(calls[1]))
    assert emulated.launches() - before > 1
    assert_same_memory(*calls)
    # A term adds its launches up one by one.
    if operator == "dots":
        assert_same_dots(*results)
    elif results[0] is not None:
        torch.testing.assert_close(*results, rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [400, 2100, 4200])
def test_thousands_of_parameters_fit_a_few_launches(count, emulated):
    sizes = tuple(1 + i % 3 for i in range(count))
    lists = {("inner_products", "plain"): 1, ("adam", "plain"): 1, ("adam", "everything"): 2}  # with acc
    for (operator, variant), addresses in lists.items():
        call = make(operator, variant, torch.float32, sizes, chunk=CHUNK)
        before = emulated.launches()
        assert_matches_cpu(emulated, call)
        assert emulated.launches() - before == math.ceil(count * addresses / 4050), (operator, variant)


def test_launches_of_each_operator(emulated):
    for operator, variant in CASES:
        call = make(operator, variant, torch.float32, (5, 300))
        before = emulated.launches()
        emulated.run(call)
        assert emulated.launches() - before == 1, operator


def test_an_empty_table_launches_nothing(emulated):
    for operator, variants in VARIANTS.items():
        call = make(operator, next(iter(variants)), torch.float32, (5, 300), absent=(0, 1))
        untouched, before = copy.deepcopy(call), emulated.launches()
        result = emulated.run(call)
        assert emulated.launches() == before
        assert_same_memory(call, untouched)
        assert result is None or not result.any()


# ---- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decades", [0, 4], ids=["alike", "over eight decades"])
@pytest.mark.parametrize("n", [1, 5, 257, CHUNK + 1, 40000])
@each_dtype
def test_the_norm_is_within_a_few_ulp_of_the_exact_one(dtype, n, decades, emulated):
    g = spread(n, dtype, 2 if dtype == torch.float16 and decades else decades)
    chunks, _, _ = table((n,), [0], (), CHUNK, dtype.itemsize)
    norm_sq = math.fsum(emulated.inner_products([], [g], chunks).tolist())
    exact = exact_sum_of_squares(g)
    assert abs(norm_sq - exact) <= (4 if dtype == torch.float64 else 16) * math.ulp(exact)
    norms = torch.tensor([math.sqrt(norm_sq), math.sqrt(exact)], dtype=torch.float64)
    assert abs(norms[0] - norms[1]) <= (2 if dtype == torch.float64 else 8) * math.ulp(norms[1])


@each_dtype
def test_the_dots_of_a_vector_with_itself_have_the_bits_of_its_squared_norm(dtype, emulated):
    call = make("dots", "plain", dtype, SIZES)
    x, chunks = call.arguments["x"], call.arguments["chunks"]
    for z in ([], x):
        for row in emulated.dots(x, x, z, chunks):
            assert_same_bits(row, emulated.inner_products([], x, chunks))


@each_dtype
@pytest.mark.parametrize("variant", VARIANTS["ascend"])
def test_one_launch_gives_the_bits_of_two(variant, dtype, emulated):
    one = make("ascend", variant, dtype, (5, 300, 0, 3 * CHUNK + 7, 257))
    two = copy.deepcopy(one)
    result = emulated.run(one)
    sums = sum_of_squares(emulated, two)
    two.operator = "perturb"
    two.arguments.update(norm_sq=sums, acc=[])
    emulated.run(two)
    assert_same_bits(result, sums, "norm_sq")
    assert_same_memory(one, two)


def test_one_launch_gives_the_same_bits_on_gpus_of_every_size(emulated, monkeypatch):
    calls, results = [], []
    for device in range(4):
        monkeypatch.setenv("MSAM_EMULATOR_DEVICE", str(device))
        calls.append(make("ascend", "friendly, saving, some fresh", torch.float32, (700,) * 3, chunk=50))
        results.append(emulated.run(calls[-1]))
        assert_same_bits(results[0], results[-1])
        assert_same_memory(calls[0], calls[-1])


@pytest.mark.parametrize("terms", [1, 2, 300, 1024])
def test_consumers_add_all_terms_of_the_norm(terms, emulated):
    for operator, variant in (("perturb", "plain, saving"), ("sgd", "from saved")):
        one, many = (make(operator, variant, torch.float32, (5, 300)) for _ in range(2))
        one.arguments["norm_sq"] = torch.tensor([terms * 0.25], dtype=torch.float64)
        many.arguments["norm_sq"] = torch.full((terms,), 0.25, dtype=torch.float64)
        emulated.run(one)
        emulated.run(many)
        assert_same_memory(one, many)


@pytest.mark.parametrize("where", [0, 255, 256, 999])
def test_one_term_that_is_not_finite_is_enough(where, emulated):
    for operator, variant in (("perturb", "not finite"), ("sgd", "not finite"), ("restore", "mean, not finite")):
        call = make(operator, variant, torch.float32, (5, 300))
        expected = copy.deepcopy(call)
        call.arguments["norm_sq"] = torch.ones(1000, dtype=torch.float64)
        call.arguments["norm_sq"][where] = math.nan
        emulated.run(call)
        expected.run("cpu")
        assert_same_memory(call, expected)


# ---- order and repetition ------------------------------------------------------------------------------------------------


@each_case
def test_no_order_of_threads_and_blocks_changes_a_bit(operator, variant, emulated, monkeypatch):
    calls, results = [], []
    for order in (0, 0, 1, 2):
        monkeypatch.setenv("MSAM_EMULATOR_ORDER", str(order))
        calls.append(make(operator, variant, torch.bfloat16, (5, 0, 300, 2 * CHUNK + 7)))
        results.append(emulated.run(calls[-1]))
    for call, result in zip(calls[1:], results[1:], strict=True):
        assert_same_memory(calls[0], call)
        if result is not None:
            assert_same_bits(results[0], result, "the result")


@pytest.mark.parametrize("pointers", [6, 1 << 30], ids=["several launches", "one launch"])
@pytest.mark.parametrize("order", [0, 1])
def test_adam_counts_each_step_once_and_leaves_the_ticket_as_it_was(order, pointers, emulated, monkeypatch):
    monkeypatch.setenv("MSAM_EMULATOR_POINTERS", str(pointers))
    monkeypatch.setenv("MSAM_EMULATOR_ORDER", str(order))
    call = make("adam", "everything", torch.float32, (5, 300, CHUNK + 5, 0, 7), flat=False, absent=(1,))
    expected = copy.deepcopy(call)
    before = call.arguments["step"].clone()
    for _ in range(3):
        emulated.run(call)
        expected.run("cpu")
    assert (call.arguments["step"] - before).tolist() == [3, 0, 3, 0, 3, 0]
    assert_same_memory(call, expected)


# ---- checks ------------------------------------------------------------------------------------------------------------


def test_what_the_kernels_cannot_use_is_refused(emulated):
    def refused(operator, variant, match, flat=True, **changes):
        call = make(operator, variant, torch.float32, (5, 300), flat=flat)
        call.arguments.update({n: change(call.arguments.get(n)) for n, change in changes.items()})
        untouched = copy.deepcopy(call)
        with pytest.raises(RuntimeError, match=match):
            emulated.run(call)
        assert_same_memory(call, untouched)

    refused("perturb", "plain", "grads must be .*like the weights", grads=lambda g: [t.double() for t in g])
    refused("perturb", "plain", "dense in memory", grads=lambda g: [t.repeat(2)[::2] for t in g])
    refused("perturb", "plain", "hyper must be", hyper=lambda h: h.float())
    refused("perturb", "plain", "norm_sq must be", norm_sq=lambda n: n.float())
    refused("perturb", "plain", "achieved_sq must be", achieved_sq=lambda t: t[:1])
    refused("perturb", "plain", "one per parameter", flat=False, weights=lambda w: [*w, w[0]])
    refused("restore", "weights alone", "saved, which is missing", saved=lambda _: None)
    refused("sgd", "plain", "one per parameter", acc=lambda _: [torch.zeros(5)])
    refused("adam", "plain", "step must have 3", step=lambda s: s[:2])
    refused("adam", "scaled", "coefs must be .* float64 .* Float", coefs=lambda t: t.float())
    refused("sgd", "combined from saved", "each of 2 coefs, got 3", grads=lambda g: g[:3])
    refused("sgd", "combined from saved", "grads must be Float", grads=lambda g: [*g[:2], *(t.double() for t in g[2:])])
    refused("adam", "combined, mean", "step must have 3", step=lambda s: torch.cat([s, s[:2]]))
    refused("dots", "plain", "y is empty", y=lambda _: [])
    refused("dots", "plain", "one per parameter", y=lambda y: y[:1])
    refused("dots", "three", "z must be .*like the weights", z=lambda z: [t.double() for t in z])
    refused("perturb", "masked", "mask must be a contiguous 1-d uint8 tensor", mask=lambda t: t.float())
    refused("perturb", "plain, saving", "give saved or origin", origin=lambda _: torch.zeros(2**12))
    refused("perturb", "from origin", "origin must be", origin=lambda t: t.double())
    refused("perturb", "from origin, adding", "go together", acc_sq=lambda _: None)
    refused("perturb", "from origin, adding", "acc_sq must be", acc_sq=lambda t: t[:1])
    refused("perturb", "from origin, adding", "acc must be .*like the weights", acc=lambda v: [t.double() for t in v])
    refused("adam", "plain", "exp_avg must be", exp_avg=lambda t: t.double())


@pytest.mark.parametrize("which", [0, 1, 2])
@each_dtype
def test_the_accumulator_may_be_one_of_the_lists(which, dtype, emulated):
    call = make("restore", "mean, three combined", dtype, (5, 300, CHUNK + 5))
    a = call.arguments
    a["grads"][3 * which : 3 * which + 3] = a["acc"]
    assert_matches_cpu(emulated, call)


def test_state_that_a_group_needs_and_the_call_lacks_shows(emulated):
    for operator, variant, missing in (("sgd", "momentum", "momentum_buffer"), ("adam", "amsgrad", "max_exp_avg_sq")):
        call = make(operator, variant, torch.float32, (5, 300, 7))
        del call.arguments[missing]
        emulated.run(call)
        chunks = call.arguments["chunks"].tolist()
        for _, _, offset, numel, group in chunks:
            weights = call.arguments["weights"][0][offset : offset + numel]
            assert weights.isnan().all() if group != 1 else weights.isfinite().all()


# ---- whole steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "not flat"])
@pytest.mark.parametrize(("name", "micro_batches"), GOLDEN)
def test_the_optimizer_follows_the_golden_trajectory(name, micro_batches, flatten, way, emulated, monkeypatch):
    monkeypatch.setattr(backends, "get_backend", lambda *_: emulated)
    rho, method = METHODS[name]
    options = {"rho": rho, "method": method, "num_micro_batches": micro_batches, "flatten": flatten}
    problem = Problem("two scalars of two groups", **options)
    for x, golden in zip(BATCHES, GOLDEN[name, micro_batches], strict=True):
        WAYS[way](problem, torch.tensor(x, dtype=torch.float64), micro_batches)
        torch.testing.assert_close(problem.weights, torch.tensor(golden, dtype=torch.float64), **TOLERANCE)


def test_an_interrupted_loop_restores_the_weights(emulated, monkeypatch):
    monkeypatch.setattr(backends, "get_backend", lambda *_: emulated)
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
