# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the kernels against the CPU's, bit for bit; no synchronisation; few launches. Skipped where there is none.

Run as a script, it calls every kernel once at awkward sizes, a small program for compute-sanitizer:
``python tests/test_gpu.py cuda fp32 bf16``.
"""

from __future__ import annotations

import copy
import os
import sys

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from msam_kernels import MicroBatchSAM, backends, methods
from test_kernels import (
    BITS,
    CASES,
    CHUNK,
    DTYPES,
    SUMS,
    VARIANTS,
    Call,
    assert_same_bits,
    dot_scales,
    each_case,
    each_dtype,
    make,
)

if not torch.cuda.is_available() and __name__ != "__main__":
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.host  # what is compared with is made on the CPU
GPU_BACKENDS = ("cuda", "triton")
SIZES = (0, 1, 3, 4, 5, 8, 255, 257, 1023, 4097, CHUNK + 5, 2 * CHUNK, 40000)
LAYOUTS = {
    "flat weights": {"absent": (3, 12)},
    "listed weights, misaligned": {"flat": False, "shift": 1, "absent": (3, 12)},
}
FAR = ("inner_products", "dots", "restore", "sgd")  # operators tried beyond 2^31 elements
# Variants that use most arguments.
LARGEST = [
    ("inner_products", "friendly and adaptive"),
    ("perturb", "friendly, saving, some fresh"),
    ("perturb", "from origin, masked and adaptive"),
    ("perturb", "from origin, adding"),
    ("ascend", "friendly, saving, some fresh"),
    ("ascend", "masked, friendly and adaptive, saving"),
    ("dots", "three"),
    ("restore", "weights and mean"),
    ("restore", "mean, three combined"),
    ("sgd", "everything"),
    ("sgd", "combined, mean"),
    ("adam", "everything"),
    ("adam", "combined, mean"),
]
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(scope="session", params=GPU_BACKENDS)
def gpu(request) -> str:
    missing = backends.available_backends()[request.param]
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        missing = "set MSAM_TEST_DEVICE=cuda: without it Triton's kernels are interpreted"
    if missing is not None:
        pytest.fail(missing, pytrace=False)
    return request.param


def on_gpu(call: Call) -> Call:
    """The same call with all memory on the GPU, as misaligned as it was."""
    arenas = {name: t.cuda() for name, t in call.arenas.items()}
    homes = {t.untyped_storage().data_ptr(): name for name, t in call.arenas.items()}

    def moved(value):
        if isinstance(value, list):
            return [moved(t) for t in value]
        if not isinstance(value, torch.Tensor):
            return value
        home = homes.get(value.untyped_storage().data_ptr()) if value.numel() else None
        return (
            value.cuda()
            if home is None
            else arenas[home].as_strided(value.size(), value.stride(), value.storage_offset())
        )

    return Call(call.operator, {name: moved(value) for name, value in call.arguments.items()}, arenas)


def run(call: Call, backend: str):
    args, kwargs = call.args()
    return getattr(backends.get_backend(backend, torch.device("cuda")), call.operator)(*args, **kwargs)


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """The largest distance, in numbers of the type."""

    def ordered(t):
        bits = t.view(BITS[t.dtype]).long()
        return torch.where(bits < 0, torch.iinfo(BITS[t.dtype]).min - bits, bits)

    both_nan = actual.isnan() & expected.isnan()
    distance = (ordered(actual) - ordered(expected)).abs().masked_fill(both_nan, 0)
    return int(distance.max()) if distance.numel() else 0


def assert_same(name: str, actual: torch.Tensor, expected: torch.Tensor, backend: str) -> None:
    if backend == "cuda" or actual.dtype not in BITS:
        assert_same_bits(actual.cpu(), expected, name)
    else:
        assert ulps(actual.cpu(), expected) <= 1, name


def assert_like_the_cpu(call: Call, backend: str) -> None:
    device = on_gpu(call)
    result = run(device, backend)
    if call.operator == "ascend":  # goes on by its own norm, which another order of summation rounds differently
        a = call.arguments
        options = {name: a[name] for name in ("ema", "sigma", "eta") if name in a}
        cpu = backends.get_backend("cpu", torch.device("cpu"))
        expected = cpu.inner_products(a["weights"], a["grads"], a["chunks"], **options)
        call = Call("perturb", {**a, "norm_sq": result.cpu(), "acc": []}, call.arenas)
        call.run()
    else:
        expected = call.run()
    others = call.tensors()
    for name, tensor in device.tensors().items():
        if name not in SUMS:
            assert_same(name, tensor, others[name], backend)
    if call.operator == "dots":
        wanted = expected.sum(1)
        scales = dot_scales(wanted)
        torch.testing.assert_close(result.sum(1).cpu() / scales, wanted / scales, rtol=0, atol=1e-12)
    elif expected is not None:
        torch.testing.assert_close(result.sum().cpu(), expected.sum(), rtol=1e-12, atol=0, equal_nan=True)
    for name in set(SUMS) & call.arguments.keys():
        sums = device.arguments[name].cpu(), call.arguments[name]
        rtol = 1e-12 if backend == "cuda" else 1e-6  # an ulp in w is much in a small e
        torch.testing.assert_close(*sums, rtol=rtol, atol=1e-15, equal_nan=True)


@each_layout
@each_dtype
@each_case
def test_a_kernel_gives_the_bits_of_the_cpu(operator, variant, dtype, layout, gpu):
    assert_like_the_cpu(make(operator, variant, dtype, SIZES, **layout), gpu)


@pytest.mark.parametrize("flat", [True, False], ids=["flat weights", "listed weights"])
@pytest.mark.parametrize(("operator", "variant"), LARGEST)
def test_more_parameters_than_one_launch_carries(operator, variant, flat, gpu):
    sizes = tuple(1 + i % 40 for i in range(4500))
    assert_like_the_cpu(make(operator, variant, torch.float32, sizes, flat=flat, absent=tuple(range(0, 4500, 17))), gpu)


@each_case
def test_large_buffers_give_the_bits_of_the_cpu(operator, variant, gpu):
    assert_like_the_cpu(make(operator, variant, torch.float32, (20_000_003, 257)), gpu)


@each_case
def test_repeated_runs_give_the_same_bits(operator, variant, gpu):
    results = []
    for _ in range(5):
        call = on_gpu(make(operator, variant, torch.float32, (*SIZES, 3_000_001)))
        result = run(call, gpu)
        results.append([t.cpu() for t in (*call.tensors().values(), *([] if result is None else [result]))])
    for other in results[1:]:
        for t, expected in zip(other, results[0], strict=True):
            assert_same_bits(t, expected)


@pytest.mark.parametrize(("operator", "variant"), [c for c in CASES if c[0] in FAR])
def test_a_place_beyond_2_31_elements_gives_the_bits_of_a_near_one(operator, variant, gpu):
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    n, far = 700, 2**31 + 12345
    near = on_gpu(make(operator, variant, torch.bfloat16, (n,), groups=1))
    memory = torch.zeros(far + 4096 * 16, dtype=torch.bfloat16, device="cuda")
    windows = iter(range(16))

    def moved(value):
        if isinstance(value, list):
            return [moved(t) for t in value]
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bfloat16:
            return copy.deepcopy(value)
        window = memory[next(windows) * 4096 :][: far + n]
        window[far:] = value[:n]
        return window

    other = Call(operator, {name: moved(value) for name, value in near.arguments.items()})
    other.arguments["chunks"] += torch.tensor([0, far, far, 0, 0], device="cuda")
    results = run(near, gpu), run(other, gpu)
    for name, value in near.arguments.items():
        for a, b in zip(*([v] if not isinstance(v, list) else v for v in (value, other.arguments[name])), strict=True):
            if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16:
                assert_same_bits(b[far:].cpu(), a[:n].cpu(), name)
    if results[0] is not None:
        assert torch.equal(*results)


def test_bad_tensors_are_refused_by_name(gpu):
    call = on_gpu(make("sgd", "momentum", torch.float32, (5, 40)))
    for name, value, message in (
        ("grads", [t.double() for t in call.arguments["grads"]], "grads must be (Float|torch.float32)"),
        ("momentum_buffer", call.arguments["momentum_buffer"].cpu(), "momentum_buffer must be on cuda"),
        ("hyper", call.arguments["hyper"].float(), "hyper must be"),
        ("coefs", torch.ones(1, dtype=torch.float64), "coefs must be.* on cuda"),
    ):
        bad = Call(call.operator, {**call.arguments, name: value})
        with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
            run(bad, gpu)


# ---- whole steps -----------------------------------------------------------------------------------------------------

BASES = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: AdamW(params, lr=0.01),
}
METHODS = {"SAM": methods.SAM(), "F-SAM": methods.FriendlySAM(), "ASAM": methods.AdaptiveSAM()}
each_way = [
    pytest.mark.parametrize("base", BASES),
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize("count", [1, 3], ids=["one micro-batch", "three micro-batches"]),
]


def a_model(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(16, 3)).cuda()


def a_step(opt, model, x, y, how: str) -> None:
    def loss(xb, yb):
        return nn.functional.cross_entropy(model(xb), yb)

    if how == "passes":
        for xb, yb in opt.passes(x, y):
            loss(xb, yb).backward()
        opt.step()
        opt.zero_grad()
    else:
        opt.train_step(loss, x, y)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@each_way[0]
@each_way[1]
@each_way[2]
@pytest.mark.parametrize("how", ["passes", "train_step"])
def test_a_step_never_waits_for_the_gpu(base, method, count, how, gpu):
    model = a_model()
    options = {"method": METHODS[method], "num_micro_batches": count, "model": model, "backend": gpu}
    opt = MicroBatchSAM(BASES[base](model.parameters()), **options)
    x, y = torch.randn(12, 16, device="cuda"), torch.randint(3, (12,), device="cuda")
    for _ in range(2):
        a_step(opt, model, x, y, how)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for i in range(3):
            opt.param_groups[0]["lr"] *= 0.9  # as a scheduler does
            a_step(opt, model, x + i, y, how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(opt.stats.grad_norm).all()


@pytest.mark.parametrize("layers", [3, 400], ids=["14 parameters", "1602 parameters"])
@each_way[0]
@each_way[1]
@each_way[2]
def test_a_micro_batch_takes_at_most_three_launches(base, method, count, layers, gpu):
    model = a_model(layers)
    params = list(model.parameters())
    opt = MicroBatchSAM(BASES[base](params), method=METHODS[method], num_micro_batches=count, backend=gpu)
    grads = [torch.randn_like(p) for p in params]
    spare = [[g.clone() for g in grads] for _ in range(2 * count)]

    def closure(spare=spare):
        for p, g in zip(params, spare.pop(), strict=True):
            p.grad = g

    for _ in range(2):
        again = [[g.clone() for g in grads] for _ in range(2 * count)]
        opt.step([lambda again=again: closure(again)] * count)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step([closure] * count)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset", "Optimizer."))]
    assert 0 < len(kernels) <= 3 * count, kernels
    if gpu == "cuda":
        assert len(on_device) == len(kernels), on_device


def test_backends_train_alike(gpu):
    """A few steps of a small network in fp64 against the specification on the same GPU."""
    weights = []
    for backend in (gpu, "reference"):
        model = a_model().double()
        options = {"method": methods.FriendlySAM(), "num_micro_batches": 3, "model": model, "backend": backend}
        opt = MicroBatchSAM(AdamW(model.parameters(), lr=0.01), **options)
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            x = torch.randn(12, 16, dtype=torch.float64, generator=generator).cuda()
            y = torch.randint(3, (12,), generator=generator).cuda()
            a_step(opt, model, x, y, "train_step")
        weights.append([p.detach().clone() for p in model.parameters()])
    for p, expected in zip(*weights, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-12)


def test_another_stream_is_followed(gpu):
    expected = on_gpu(make("sgd", "momentum", torch.float32, SIZES))
    run(expected, gpu)
    torch.cuda.synchronize()
    call = on_gpu(make("sgd", "momentum", torch.float32, SIZES))
    buffer = call.arenas["momentum_buffer"]
    late = buffer.clone()
    buffer.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        buffer.copy_(late)  # what runs on another stream is too early to see it
        run(call, gpu)
    stream.synchronize()
    for name, t in call.tensors().items():
        assert_same_bits(t.cpu(), expected.tensors()[name].cpu(), name)


def call_everything(backend: str, dtypes: list[str]) -> None:
    place = (lambda call: call) if backend == "cpu" else on_gpu
    operators = backends.get_backend(backend, torch.device("cpu" if backend == "cpu" else "cuda"))
    for operator, variants in VARIANTS.items():
        for variant in variants:
            for dtype in dtypes:
                for layout in ({}, {"flat": False, "shift": 1}):
                    call = place(make(operator, variant, DTYPES[dtype], (0, 5, 257, CHUNK + 5), **layout))
                    args, kwargs = call.args()
                    getattr(operators, operator)(*args, **kwargs)
        if backend != "cpu":
            torch.cuda.synchronize()
        print(f"{operator}: {len(variants)} variants ran", flush=True)


if __name__ == "__main__":
    call_everything(sys.argv[1] if len(sys.argv) > 1 else "cuda", sys.argv[2:] or list(DTYPES))
