# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the kernels against the CPU's, bit for bit; no synchronisation; few launches. Skipped where there is none.

Run as a script, it calls every kernel once at awkward sizes, a small program for compute-sanitizer: ``python
tests/test_gpu.py cuda fp32 bf16``. With ``--against-cpu`` before that, it compares each with the CPU's: a smoke test.
"""

from __future__ import annotations

import copy
import os
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import cases
from cases import (
    BITS,
    CASES,
    CHUNK,
    DTYPES,
    VARIANTS,
    Call,
    assert_matches,
    assert_same_bits,
    assert_same_memory,
    each_case,
    each_dtype,
)
from msam_kernels import MicroBatchSAM, backends, methods
from msam_kernels.flat import row_length
from plain import METHODS as FAMILY

if not torch.cuda.is_available() and __name__ != "__main__":
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.host  # what is compared with is made on the CPU
GPU_BACKENDS = ("cuda", "triton")
SIZES = (0, 1, 3, 4, 5, 8, 255, 257, 1023, 4097, CHUNK + 5, 2 * CHUNK, 40000)
LAYOUTS = {
    "flat weights": {"absent": (3, 12)},
    "listed weights, misaligned": {"flat": False, "shift": 1, "absent": (3, 12)},
}
FAR = ("norm", "gram", "descend", "update")  # operators tried beyond 2^31 elements
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(scope="session", params=GPU_BACKENDS)
def gpu(request) -> str:
    missing = backends.available_backends()[request.param]
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        missing = "set MSAM_TEST_DEVICE=cuda: without it Triton's kernels are interpreted"
    if missing is not None:
        pytest.fail(missing, pytrace=False)
    return request.param


def make(operator, variant, dtype=torch.float32, sizes=SIZES, **options) -> Call:
    """A call with rows as a GPU has them."""
    return cases.make(operator, variant, dtype, sizes, **{"chunk": row_length(torch.device("cuda"), dtype), **options})


def run(call: Call, backend: str) -> torch.Tensor | None:
    return call.run(backends.get_backend(backend, torch.device("cuda")))


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """The largest distance, in numbers of the type."""

    def ordered(t):
        bits = t.view(BITS[t.dtype]).long()
        return torch.where(bits < 0, torch.iinfo(BITS[t.dtype]).min - bits, bits)

    both_nan = actual.isnan() & expected.isnan()
    distance = (ordered(actual) - ordered(expected)).abs().masked_fill(both_nan, 0)
    return int(distance.max()) if distance.numel() else 0


def nearly_same_bits(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    if actual.dtype not in BITS:
        return assert_same_bits(actual, expected, name)
    assert ulps(actual, expected) <= 1, name


def assert_like_the_cpu(call: Call, backend: str) -> None:
    if backend != "triton":
        return assert_matches(call, backend, "cpu", device=backend)
    # An ulp in w is much in a small e.
    assert_matches(call, backend, "cpu", device="cuda", same=nearly_same_bits, rtol=1e-6)


@each_layout
@each_dtype
@each_case
def test_a_kernel_gives_the_bits_of_the_cpu(operator, variant, dtype, layout, gpu):
    assert_like_the_cpu(make(operator, variant, dtype, SIZES, **layout), gpu)


@pytest.mark.parametrize("flat", [True, False], ids=["flat weights", "listed weights"])
@each_case
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
        call = make(operator, variant, torch.float32, (*SIZES, 3_000_001)).to("cuda")
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
    near = make(operator, variant, torch.bfloat16, (n,), groups=1).to("cuda")
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
    other.arguments["table"] += torch.tensor([0, far, far, 0, 0], device="cuda")
    results = run(near, gpu), run(other, gpu)
    for name, value in near.arguments.items():
        for a, b in zip(*([v] if not isinstance(v, list) else v for v in (value, other.arguments[name])), strict=True):
            if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16:
                assert_same_bits(b[far:].cpu(), a[:n].cpu(), name)
    if results[0] is not None:
        assert torch.equal(*results)


def test_bad_tensors_are_refused_by_name(gpu):
    call = make("update", "sgd", torch.float32, (5, 40)).to("cuda")
    for name, value, message in (
        ("terms", [t.double() for t in call.arguments["terms"]], "terms must be (Float|torch.float32)"),
        ("states", [t.cpu() for t in call.arguments["states"]], "one device|on cuda"),
        ("settings", call.arguments["settings"].float(), "settings must be"),
        ("coefs", call.arguments["coefs"][1:], "coefs must"),
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


# Kernels of a micro-batch that perturbs, as in test_launches.py.
LAUNCHES = {"Stable SAM": 3, "GSAM": 3, "LookSAM k=2": 4, "Bilateral SAM": 4, "F-SAM + Sparse + Stable": 3}


@pytest.mark.parametrize("layers", [3, 400], ids=["14 parameters", "1602 parameters"])
@each_way[0]
@pytest.mark.parametrize("method", FAMILY)
@each_way[2]
def test_a_micro_batch_takes_a_few_launches(base, method, count, layers, gpu):
    model = a_model(layers)
    params = list(model.parameters())
    opt = MicroBatchSAM(BASES[base](params), method=FAMILY[method], num_micro_batches=count, backend=gpu)

    def closure(spare):
        for p, g in zip(params, spare.pop(), strict=True):
            p.grad = g

    def gradients():
        return [[torch.randn_like(p) for p in params] for _ in range(3)]

    for _ in range(2):
        opt.step([partial(closure, gradients()) for _ in range(count)])
    opt.enabled, opt.steps = True, 2 * FAMILY[method].period
    if opt.mask is not None:
        opt.mask = opt.mask  # no new one is due
    closures = [partial(closure, gradients()) for _ in range(count)]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step(closures)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset", "Optimizer."))]
    assert 0 < len(kernels) <= LAUNCHES.get(method, 2) * count, kernels
    if gpu == "cuda":
        assert len(on_device) == len(kernels), on_device


def test_backends_train_alike(gpu):
    """A few steps of a small network in fp64 against the specification on the same GPU.

    The gradient of a bias before BatchNorm is 0 but for rounding, 1e-17 here, which AdamW with its usual eps of 1e-8 makes a
    step of 1e-9 times the learning rate.
    """
    weights = []
    for backend in (gpu, "reference"):
        model = a_model().double()
        options = {"method": methods.FriendlySAM(), "num_micro_batches": 3, "model": model, "backend": backend}
        opt = MicroBatchSAM(AdamW(model.parameters(), lr=0.01, eps=1e-4), **options)
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            x = torch.randn(12, 16, dtype=torch.float64, generator=generator).cuda()
            y = torch.randint(3, (12,), generator=generator).cuda()
            a_step(opt, model, x, y, "train_step")
        weights.append([p.detach().clone() for p in model.parameters()])
    for p, expected in zip(*weights, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-12)


RNNS = {
    "LSTM": lambda: nn.LSTM(64, 64),
    "GRU, two layers and directions": lambda: nn.GRU(64, 33, 2, bidirectional=True),
    "RNN without biases": lambda: nn.RNN(64, 64, bias=False),
}


@pytest.mark.parametrize("kind", RNNS)
def test_cudnn_finds_the_weights_of_an_rnn_in_one_chunk(kind, gpu):
    """Else it warns, which is an error here, and copies them at every call."""
    rnn = RNNS[kind]().cuda()
    x = torch.randn(5, 12, 64, device="cuda")

    def memory_of_a_call():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            rnn(x)
        return torch.cuda.max_memory_allocated() - before

    memory_of_a_call()  # libraries take what they keep
    expected = memory_of_a_call()
    addresses = [p.data_ptr() for p in rnn.parameters()]
    opt = MicroBatchSAM(SGD(rnn.parameters(), lr=0.1), method=methods.FriendlySAM(), num_micro_batches=2, backend=gpu)
    before = [p.detach().clone() for p in rnn.parameters()]
    for _ in range(3):
        for part in opt.passes(x.transpose(0, 1)):
            rnn(part.transpose(0, 1))[0].square().mean().backward()
        opt.step()
        opt.zero_grad()
    assert memory_of_a_call() == expected
    assert [p.data_ptr() for p in rnn.parameters()] == addresses
    assert not any(map(torch.equal, rnn.parameters(), before))


def test_another_stream_is_followed(gpu):
    expected = make("update", "sgd", torch.float32, SIZES).to("cuda")
    run(expected, gpu)
    torch.cuda.synchronize()
    call = make("update", "sgd", torch.float32, SIZES).to("cuda")
    buffer = call.arguments["states"][0]
    late = buffer.clone()
    buffer.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        buffer.copy_(late)  # what runs on another stream is too early to see it
        run(call, gpu)
    stream.synchronize()
    assert_same_memory(call, expected)


@pytest.fixture
def nccl():
    """This process alone, for what wants to be distributed."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning")
@pytest.mark.parametrize("name", ["F-SAM", "GSAM", "LookSAM k=2"])
def test_sharded_parameters_of_one_rank_train_like_those_of_none(name, nccl):
    from test_sharded import assert_one_rank_trains_like_none

    assert_one_rank_trains_like_none(name, torch.device("cuda", 0))


def call_everything(backend: str, dtypes: list[str], against_cpu: bool) -> None:
    device = torch.device("cpu" if backend == "cpu" else "cuda")
    operators, calls = backends.get_backend(backend, device), 0
    for operator, variants in VARIANTS.items():
        for variant in variants:
            for dtype in dtypes:
                for layout in ({}, {"flat": False, "shift": 1}):
                    call = make(operator, variant, DTYPES[dtype], (0, 5, 257, CHUNK + 5), **layout)
                    if against_cpu:
                        assert_like_the_cpu(call, backend)
                    else:
                        call.to(device).run(operators)
                    calls += 1
        if backend != "cpu":
            torch.cuda.synchronize()
        print(f"{operator}: {len(variants)} variants", flush=True)
    print(f"{calls} calls of {len(VARIANTS)} operators {'are as on the CPU' if against_cpu else 'ran'}")


if __name__ == "__main__":
    words = sys.argv[1:]
    against_cpu = words[:1] == ["--against-cpu"]
    words = words[against_cpu:] or ["cuda"]
    call_everything(words[0], words[1:] or list(DTYPES), against_cpu)
