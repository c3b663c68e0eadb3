# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: bit for bit those of the CPU, and compiled ahead of time for GPUs that are not here.

On a GPU (MSAM_TEST_DEVICE) the numerics run there; elsewhere Triton interprets the kernels on CPU tensors (see conftest.py).
Run as a script, this file is the child process that compiles: nothing can be compiled where kernels are interpreted.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from msam_kernels import MicroBatchSAM, backends, methods
from msam_kernels.flat import CHUNK
from plain import DEVICE
from test_golden import BATCHES, GOLDEN, METHODS, TOLERANCE, WAYS, Problem
from test_kernels import CASES, DTYPES, SUMS, Call, assert_same_bits, make

ON_GPU = DEVICE.type != "cpu"
# Triton 3.6 converts as NumPy no longer likes.
_NUMPY = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
pytestmark = [pytest.mark.host, _NUMPY]  # data are made on the CPU, for both
SIZES = (0, 1, 3, 4, 5, 255, 257, 4097, 4096)
LARGE = (CHUNK + 5, 7, 2 * CHUNK)
each_case = pytest.mark.parametrize(("operator", "variant"), CASES, ids=lambda v: v)
# Kernels that no case asks for.
MORE_CASES = {
    "sgd, combined without momentum": ("sgd", {"coefs": (1.3, -0.4)}),
    "adam, combined with amsgrad": ("adam", {"amsgrad": 1.0, "acc": True, "coefs": (0.7, 0.2, -0.4)}),
}


def bf16_as_torch_rounds(x, from_type, to_type, rounding):
    """In place of the interpreter's own conversion between bf16 and fp32, which cuts off."""
    if to_type.name == "bf16":
        return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).float().numpy()


@pytest.fixture(autouse=True)
def _triton(extension):
    if find_spec("triton") is None:
        missing = "triton is not installed: pip install triton"
        pytest.fail(missing, pytrace=False) if os.environ.get("CI") else pytest.skip(missing)
    if ON_GPU:
        yield
        return
    with (
        np.errstate(all="ignore"),  # the interpreter computes with NumPy, which warns of NaN and infinity
        mock.patch("triton.runtime.interpreter._convert_float", bf16_as_torch_rounds),
    ):
        yield


# ---- against the CPU kernels -----------------------------------------------------------------------------------------


def moved(call: Call) -> Call:
    """The same call on DEVICE, aligned alike: memory that is shared stays shared."""
    if not ON_GPU:
        return copy.deepcopy(call)
    storages: dict[int, Tensor] = {}

    def on_device(value):
        if isinstance(value, list):
            return [on_device(t) for t in value]
        if not isinstance(value, Tensor):
            return value
        memory = value.untyped_storage()
        if memory.data_ptr() not in storages:
            whole = value.new_empty(0).set_(memory, 0, (memory.nbytes() // value.itemsize,))
            storages[memory.data_ptr()] = whole.to(DEVICE)
        return storages[memory.data_ptr()].as_strided(value.size(), value.stride(), value.storage_offset())

    arguments = {name: on_device(value) for name, value in call.arguments.items()}
    return Call(call.operator, arguments, {name: on_device(t) for name, t in call.arenas.items()})


def run(call: Call) -> Tensor | None:
    args, kwargs = call.args()
    return getattr(backends.get_backend("triton", DEVICE), call.operator)(*args, **kwargs)


def assert_matches_the_cpu(call: Call) -> None:
    ours = moved(call)
    sums = run(ours), call.run("cpu")
    expected = call.tensors()
    for name, t in ours.tensors().items():
        if name in SUMS:
            torch.testing.assert_close(t.cpu(), expected[name], rtol=1e-14, atol=0, equal_nan=True)
        else:
            assert_same_bits(t.cpu(), expected[name], name)
    if sums[1] is not None:
        actual, target = sums[0].sum(-1).cpu(), sums[1].sum(-1)
        cancelled = 1e-14 * float(target.max()) if call.operator == "dots" else 0  # in x·y, next to x·x and y·y
        torch.testing.assert_close(actual, target, rtol=1e-14, atol=cancelled, equal_nan=True)


LAYOUTS = {"flat weights": (True, 0), "listed weights, misaligned": (False, 1)}
# The interpreter takes its time, and does the same to aligned memory: not every dtype in every layout.
COMBINATIONS = [
    pytest.param(dtype, *LAYOUTS[layout], id=f"{name}, {layout}")
    for name, dtype in DTYPES.items()
    for layout in LAYOUTS
    if ON_GPU or name == "fp32" or (layout == "flat weights") == (name != "bf16")
]


@pytest.mark.parametrize(("dtype", "flat", "shift"), COMBINATIONS)
@each_case
def test_triton_kernels_give_the_bits_of_the_cpu_kernels(operator, variant, dtype, flat, shift):
    assert_matches_the_cpu(make(operator, variant, dtype, SIZES, flat=flat, shift=shift, absent=(2, 5)))


@each_case
def test_several_chunks_of_a_parameter(operator, variant):
    assert_matches_the_cpu(make(operator, variant, sizes=LARGE))


@each_case
def test_chunks_of_any_length(operator, variant):
    assert_matches_the_cpu(make(operator, variant, sizes=(100, 33, 1), chunk=48, groups=2))


@each_case
def test_more_chunks_than_programs(operator, variant):
    with mock.patch.object(backends.get_backend("triton", DEVICE), "PROGRAMS", 3):
        assert_matches_the_cpu(make(operator, variant, sizes=(400, 0, 333), chunk=64))


@pytest.mark.parametrize("case", MORE_CASES)
def test_combinations_that_have_kernels_of_their_own(case):
    assert_matches_the_cpu(make(*MORE_CASES[case], sizes=(4096, 5, 300)))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_acc_may_be_one_of_the_lists_that_are_combined(which):
    call = make("restore", "mean, three combined", sizes=(4096, 5, 300))
    call.arguments["acc"] = call.arguments["grads"][3 * which : 3 * which + 3]
    assert_matches_the_cpu(call)


def test_one_misaligned_list_of_several():
    call = make("sgd", "combined, mean", sizes=(4096, 512, 48))
    for i, g in enumerate(call.arguments["grads"]):
        if i // 3 == 2:
            memory = torch.empty(len(g) + 1)
            memory[1:] = g
            call.arguments["grads"][i] = memory[1:]
    assert_matches_the_cpu(call)


def test_only_misaligned_gradients():
    call = make("ascend", "friendly, saving, some fresh", sizes=(4096, 512, 48))
    for i, g in enumerate(call.arguments["grads"]):
        memory = torch.empty(len(g) + 1)
        memory[1:] = g
        call.arguments["grads"][i] = memory[1:]
    assert_matches_the_cpu(call)


def test_nothing_to_do():
    for operator, variant in CASES:
        assert_matches_the_cpu(make(operator, variant, sizes=(0, 0)))


def test_the_norm_of_many_terms_from_several_devices_is_summed_by_every_kernel():
    call = make("perturb", "plain, saving", sizes=(300, 40))
    norm_sq = call.arguments["norm_sq"]
    call.arguments["norm_sq"] = torch.full((3000,), float(norm_sq) / 4096, dtype=torch.float64)
    ours = moved(call)
    run(ours)
    call.run("cpu")
    for name, t in ours.arenas.items():
        torch.testing.assert_close(t.cpu(), call.arenas[name], rtol=2**-23, atol=0, equal_nan=True)


def test_repeated_runs_are_identical():
    calls = [moved(make("ascend", "friendly and adaptive", sizes=LARGE)) for _ in range(2)]
    norms = [run(call) for call in calls]
    assert torch.equal(*norms)
    for name, t in calls[0].tensors().items():
        assert_same_bits(t.cpu(), calls[1].tensors()[name].cpu(), name)


def test_the_ticket_counts_each_step_once_and_is_zero_between_calls():
    call = moved(make("adam", "plain", sizes=(5, 0, 3 * CHUNK + 1, 40), absent=(3,)))
    before = call.arguments["step"].tolist()
    for _ in range(3):
        run(call)
    assert call.arguments["step"].tolist() == [t + n for t, n in zip(before, (3, 0, 3, 0, 0), strict=True)]


def test_achieved_sq_counts_as_changed_once_the_weights_may_be():
    call = moved(make("perturb", "plain", sizes=(5,)))
    version = call.arguments["achieved_sq"]._version
    run(call)
    assert call.arguments["achieved_sq"]._version > version


def test_tables_of_pointers_are_kept_while_the_addresses_stay_and_are_few():
    kernels = backends.get_backend("triton", DEVICE)
    kernels._tables.clear()
    call = moved(make("inner_products", "plain", sizes=(5, 40)))
    run(call), run(call)
    assert len(kernels._tables) == 1
    grads = call.arguments["grads"]
    memory = [torch.randn(40, device=DEVICE) for _ in range(kernels.TABLES + 5)]
    for m in memory:
        grads[1] = m
        expected = grads[0].double().square().sum() + m.double().square().sum()
        torch.testing.assert_close(run(call).sum(), expected, rtol=1e-14, atol=0)
    assert len(kernels._tables) == kernels.TABLES


def test_pointers_written_by_a_kernel_are_those_that_were_copied():
    kernels = backends.get_backend("triton", DEVICE)
    call = kernels._Call(torch.zeros(0, 5, dtype=torch.int64, device=DEVICE), torch.float32)
    addresses = tuple(2**40 + 3 * i for i in range(37))
    assert call._captured(addresses)[:37].tolist() == call._copied(addresses).tolist() == list(addresses)


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("ascend", {"grads": lambda a: [g.double() for g in a["grads"]]}, "grads must be torch.float32"),
        ("ascend", {"grads": lambda a: [a["grads"][0][::2]] * 2}, "grads must be dense"),
        ("ascend", {"weights": lambda a: []}, "needs weights"),
        ("ascend", {"achieved_sq": lambda a: a["achieved_sq"][:1]}, "one element per chunk"),
        ("ascend", {"chunks": lambda a: a["chunks"].int()}, "chunks must be a contiguous int64"),
        ("ascend", {"hyper": lambda a: a["hyper"].float()}, "hyper must be a contiguous 2-d torch.float64"),
        ("restore", {"saved": lambda a: None}, "saved, which is missing"),
        ("restore", {"acc": lambda a: []}, "acc, which is missing"),
        ("sgd", {"hyper": lambda a: a["hyper"][:, :4].contiguous()}, "at least 7 columns"),
        ("adam", {"step": lambda a: a["step"][:-1].clone()}, "step must have"),
        ("adam", {"exp_avg": lambda a: a["exp_avg"].bfloat16()}, "exp_avg must be torch.float32"),
        ("adam", {"coefs": lambda a: a["hyper"][0, :2].float()}, "coefs must be .* torch.float64 .* torch.float32"),
        ("adam", {"coefs": lambda a: a["hyper"][0, :4].clone()}, "coefs must be .* 1 to 3 values, got .*4"),
        ("adam", {"coefs": lambda a: a["hyper"][0, :2].clone()}, "step must have .* one more, 2, got 3"),
        ("sgd", {"coefs": lambda a: a["hyper"][0, :3].clone()}, "grads must .* each of 3 coefs, got 2 tensors"),
        ("restore", {"coefs": lambda a: a["saved"][:1].double(), "grads": lambda a: []}, "each of 1 coefs, got 0"),
        ("dots", {"x": lambda a: []}, "x is empty"),
        ("dots", {"y": lambda a: []}, "y is empty"),
        ("dots", {"y": lambda a: [t.double() for t in a["y"]]}, "y must be torch.float32"),
        ("ascend", {"mask": lambda a: a["saved"]}, "mask must be .* torch.uint8"),
        ("perturb", {"origin": lambda a: a["saved"]}, "give saved or origin"),
        ("perturb", {"acc": lambda a: a["grads"]}, "acc and acc_sq go together"),
        ("perturb", {"acc_sq": lambda a: a["achieved_sq"]}, "acc and acc_sq go together"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_wrong_arguments_are_refused_before_anything_is_touched(operator, change, message):
    variants = {"ascend": "plain, saving", "perturb": "plain, saving", "restore": "weights and mean", "dots": "plain"}
    variant = variants.get(operator, "everything")
    call = moved(make(operator, variant, sizes=(5, 40)))
    kernels = backends.get_backend("triton", DEVICE)
    kernels._tables.clear()
    before = copy.deepcopy(call.arenas)
    call.arguments.update({name: changed(call.arguments) for name, changed in change.items()})
    with pytest.raises(RuntimeError, match=message):
        run(call)
    for name, t in call.arenas.items():
        assert_same_bits(t, before[name], name)


# ---- the choice of the backend ---------------------------------------------------------------------------------------


def test_triton_is_a_backend_by_name():
    assert "triton" in ops.BACKENDS
    assert backends.available_backends()["triton"] is None
    with mock.patch.object(ops.importlib.util, "find_spec", return_value=None):
        with pytest.raises(RuntimeError, match="pip install triton"):
            backends.get_backend("triton", DEVICE)
        assert backends.get_backend("auto", torch.device("cuda")) is not backends.get_backend("auto", torch.device("cpu"))


def test_interpreted_kernels_serve_the_cpu_and_compiled_ones_the_gpu():
    kernels = backends.get_backend("triton", DEVICE)
    assert kernels.INTERPRETED != ON_GPU
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET.*use backend='auto'"):
        backends.get_backend("triton", torch.device("cpu" if ON_GPU else "cuda"))


# ---- through the optimizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "flatten"), list(zip(WAYS, (True, False, True), strict=True)))
@pytest.mark.parametrize(("name", "micro_batches"), GOLDEN)
def test_the_optimizer_follows_the_golden_trajectory(name, micro_batches, way, flatten):
    rho, method = METHODS[name]
    options = {"rho": rho, "method": method, "num_micro_batches": micro_batches, "flatten": flatten}
    with DEVICE:
        problem = Problem("two scalars of two groups", backend="triton", **options)
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

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def launched() -> dict[tuple, tuple]:
    """Every (kernel, constants) that the operators launch, in any dtype and with any options."""
    from msam_kernels import triton_kernels as kernels

    found = {}

    def record(kernel, programs, *args, **constants):
        found[kernel.__name__, str(sorted(constants.items(), key=str))] = kernel, constants

    with mock.patch.object(kernels, "_launch", record):
        kernels._Call(torch.zeros(0, 5, dtype=torch.int64), torch.float32)._captured((0,))
        for operator, variant in (*CASES, *MORE_CASES.values()):
            for dtype in DTYPES.values():
                for flat in (True, False):
                    args, kwargs = make(operator, variant, dtype, (5, 40), flat=flat).args()
                    getattr(kernels, operator)(*args, **kwargs)
    return found


def compile_all(target: str) -> None:
    """Print, for each kernel that is launched, what it became: one line of JSON."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from msam_kernels.triton_kernels import registers

    backend, arch, warp = TARGETS[target]
    for kernel, constants in launched().values():
        signature = {p.name: "constexpr" if p.is_constexpr else "i64" for p in kernel.params}
        options = {"num_warps": 256 // warp, "enable_fp_fusion": False}
        if backend == "cuda":
            options |= registers(kernel)
        result = triton.compile(
            ASTSource(kernel, signature, constants), target=GPUTarget(backend, arch, warp), options=options
        )
        report = {"kernel": kernel.__name__, "constants": {k: str(v) for k, v in constants.items()}}
        if backend == "cuda":
            ptx = result.asm["ptx"]
            report["accesses"] = sorted(set(re.findall(r"\b(?:ld|st)\.global\S*", ptx)))
            # An sm_80 adds two bf16 by fma with a one, or a pair of them.
            ones = set(re.findall(r"mov\.b(?:16|32)\s+(%\w+), (?:0x3F80|1065369472);", ptx))
            found = re.findall(r"(\S*(?:fma|mad\.\w*\.?f|ftz|approx|\.full\.)\S*)\s+([^;]*);", ptx)
            report["inexact"] = sorted(
                {name for name, args in found if "fma.rn.bf16" not in name or args.split(", ")[2] not in ones}
            )
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "cubin")
                cubin.write_bytes(result.asm["cubin"])
                command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
                usage = subprocess.run(command, capture_output=True, text=True, check=True)
            report["usage"] = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout))
        else:
            report["accesses"] = sorted(set(re.findall(r"\b(?:global|buffer)_(?:load|store)\S*", result.asm["amdgcn"])))
        print(json.dumps(report), flush=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_ahead_of_time(target):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_INTERPRET": "0"}
    child = subprocess.run([sys.executable, __file__, target], capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr
    reports = [json.loads(line) for line in child.stdout.splitlines()]
    # Four dtypes of four, eight, two, two, four and four choices; and the one that writes pointers.
    assert len(reports) == 4 * (4 + 8 + 2 + 2 + 4 + 4) + 1
    for report in reports:
        wide = {a for a in report["accesses"] if re.search(r"v4\.b32$|v2\.b64$|dwordx4$", a)}
        if report["kernel"] == "write_pointers_kernel":
            continue
        assert any("ld" in a or "load" in a for a in wide), report
        assert report["kernel"] in ("inner_products_kernel", "dots_kernel") or any("st" in a for a in wide), report
        if target.startswith("sm_"):
            assert report["inexact"] == [], report
            assert (report["usage"]["STACK"], report["usage"]["LOCAL"]) == ("0", "0"), report


if __name__ == "__main__":
    compile_all(sys.argv[1])
