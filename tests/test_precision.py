# SPDX-License-Identifier: Apache-2.0
"""Weights of 16 bits: the random numbers, w + e rounded by them, and how much of e arrives."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from cases import DTYPES, Call, assert_same_bits, assert_same_memory, make, table
from msam_kernels import MicroBatchSAM, backends, methods
from msam_kernels.backends import reference
from msam_kernels.precision import Watch
from plain import DEVICE, batch, loss_of, mlp, random_numbers, same_bits, weights

SHORT = {name: dtype for name, dtype in DTYPES.items() if dtype.itemsize == 2}
each_short = pytest.mark.parametrize("dtype", SHORT.values(), ids=SHORT)
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ONES = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
ZEROS = (0,) * 4, (0,) * 2


# ---- random numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize(
    ("rounds", "given", "words"),
    [  # of the generator's authors, Random123's kat_vectors
        (7, ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
        (10, ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=lambda v: v if isinstance(v, int) else None,
)
def test_the_generator_gives_the_published_words(rounds, given, words):
    assert tuple(map(int, reference.philox(*given, rounds))) == words


class One:
    """One parameter that is perturbed by exactly ``e``, of the storage type, with as many elements as ``w``."""

    def __init__(
        self, w: Tensor, e: Tensor, *, seed: int = 0, step: int = 0, number: int = 0, first: int = 0, chunk: int = 100
    ):
        self.dtype, self.device = w.dtype, w.device
        self.table = table((len(w),), 2, chunk=chunk)[0].to(w.device)
        self.w, self.grads = w.clone(), [e.clone()]
        self.noise = torch.tensor([[seed, step], [number, first]], device=self.device)
        rows = len(self.table)
        self.written = {
            "saved": torch.zeros_like(w),
            "status": torch.zeros(rows, dtype=torch.uint8, device=self.device),
            "achieved_sq": torch.zeros(reference.ACHIEVED, rows, dtype=torch.float64, device=self.device),
        }

    def perturbed(self, kernels: Any, draw: int = 0, noise: bool = True) -> Tensor:
        radii = torch.tensor([[1.0, math.inf]], dtype=torch.float64, device=self.device)  # e is the gradient
        norm_sq = torch.ones(1, dtype=torch.float64, device=self.device)
        options = {"noise": self.noise, "draw": draw} if noise else {}
        kernels.perturb([self.w], self.grads, self.table, norm_sq=norm_sq, radii=radii, **options, **self.written)
        return self.w


def kernels_of(backend: str):
    return backends.get_backend(backend, DEVICE)


def test_an_elements_bits_are_halves_of_published_words(backend):
    """Rounded away from zero where they and the part that is left out carry: at 65536 - bits, and not a step below."""
    bits = [half for word in (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48) for half in (word & 0xFFFF, word >> 16)]
    one = torch.ones(8, dtype=torch.float32)
    for step, rounded in ((0, 1), (-1, 0)):
        parts = torch.tensor([65536 - b + step for b in bits])
        x = (one.view(torch.int32) + parts.int()).view(torch.float32)
        found = reference.at_random(x, torch.bfloat16, torch.tensor(bits))
        assert ((found.view(torch.int16) - 0x3F80) == rounded).all()
    # What the kernels draw: e is k/256 of the distance, where as many of the bits' 256 values carry.
    e = torch.full((8,), 2.0**-15).to(torch.bfloat16) * torch.arange(16, 256, 30)[:8].to(torch.bfloat16)
    w = One(one.to(torch.bfloat16), e).perturbed(kernels_of(backend))
    wanted = [(int(part * 2**23) + b) >> 16 for part, b in zip(e.tolist(), bits, strict=True)]
    assert (w.view(torch.int16) - 0x3F80).tolist() == wanted
    assert 0 < sum(wanted) < 8


# ---- rounding ----------------------------------------------------------------------------------------------------------

# w, e: sums of two numbers of 16 bits that lie between two others.
BETWEEN = {
    "bf16": [(1.0, 2.0**-9), (1.0, -(2.0**-12)), (-3.0, 2.0**-8 * 1.5), (2.0**-120, 2.0**-130), (100.0, 0.2)],
    "fp16": [(1.0, 2.0**-12), (1.0, -(2.0**-14)), (-3.0, 2.0**-13 * 3), (2.0**-15, 2.0**-24), (1000.0, 0.11)],
}


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of that type that x lies between."""
    near = torch.tensor(x, dtype=torch.float64).to(dtype)
    other = torch.nextafter(near, torch.tensor(math.inf if float(near) < x else -math.inf, dtype=dtype))
    low, high = sorted((float(near), float(other)))
    return (float(near), float(near)) if float(near) == x else (low, high)


@each_short
def test_the_mean_over_many_numbers_and_seeds_is_what_was_asked_for(dtype, backend):
    """Five standard deviations of the mean of so many coins, and nothing but the two neighbours."""
    n, seeds = 2000, (0, 1, -5)
    name = next(k for k, v in SHORT.items() if v == dtype)
    for w, e in BETWEEN[name]:
        e = float(torch.tensor(e, dtype=dtype))
        x = float(torch.tensor(w, dtype=torch.float32) + torch.tensor(e, dtype=torch.float32))
        low, high = neighbours(x, dtype)
        total = 0.0
        for seed in seeds:
            one = One(torch.full((n,), w, dtype=dtype), torch.full((n,), e, dtype=dtype), seed=seed, step=3)
            found = one.perturbed(kernels_of(backend)).double()
            assert set(found.tolist()) <= {low, high}
            total += float(found.sum())
        share = (x - low) / (high - low) if high > low else 0.0
        bound = 5 * math.sqrt(share * (1 - share) / (n * len(seeds))) * (high - low)
        assert abs(total / (n * len(seeds)) - x) <= bound, (w, e)


def test_every_share_of_the_distance_has_its_probability():
    """All 2^16 random numbers once: of k/256 of the distance, 256·k round away from zero. Exactly."""
    random = torch.arange(65536)
    for dtype, spacing, start in (
        (torch.bfloat16, 2.0**-7, 1.0),
        (torch.float16, 2.0**-10, 1.0),
        (torch.float16, 2.0**-24, 2.0**-20),
    ):
        for k in (0, 1, 77, 128, 255):
            for sign in (1, -1):
                x = torch.full((65536,), sign * (start + spacing * k / 256), dtype=torch.float32)
                found = reference.at_random(x, dtype, random).double()
                assert int((found != sign * start).sum()) == 256 * k
                assert set(found.tolist()) <= {sign * start, sign * (start + spacing)}


LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}  # as fp32


@each_short
@pytest.mark.parametrize("random", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_what_is_representable_stays_and_beyond_the_largest_it_rounds_to_nearest(dtype, random):
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    draws = torch.full((65536,), random)
    found = reference.at_random(every.float(), dtype, draws)
    assert_same_bits(torch.where(every.isnan(), 0.0, found.float()), torch.where(every.isnan(), 0.0, every.float()))
    assert found.isnan().equal(every.isnan())
    top = LARGEST[dtype]
    beyond = torch.arange(top, top + 0x30000, 0x7F).to(torch.int32).view(torch.float32)
    beyond = beyond[~beyond.isnan()]
    for x in (beyond, -beyond):
        assert_same_bits(reference.at_random(x, dtype, draws[: len(x)]), x.to(dtype))


EDGES = [0.0, -0.0, math.inf, -math.inf, math.nan]


@each_short
def test_kernels_keep_what_is_no_ordinary_number(dtype, backend):
    largest = torch.finfo(dtype).max
    ulp = largest - float(torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    pairs = [(w, 0.0) for w in (*EDGES, largest, -largest, torch.finfo(dtype).smallest_normal)]
    pairs += [(largest, ulp / 4), (largest, ulp / 2), (largest, ulp), (-largest, -ulp / 4), (-largest, -ulp / 2)]
    pairs += [(torch.finfo(dtype).smallest_normal, -torch.finfo(dtype).smallest_normal / 4)] * (dtype == torch.float16)
    for seed in range(20):
        w, e = (torch.tensor(values, dtype=dtype) for values in zip(*pairs, strict=True))
        found = One(w, e, seed=seed).perturbed(kernels_of(backend))
        assert_same_bits(found, (w.float() + e.float()).to(dtype))


# ---- the same numbers everywhere ---------------------------------------------------------------------------------------


def noisy(**options: Any) -> One:
    generator = random_numbers(1)
    w = torch.randn(1000, generator=generator).to(torch.bfloat16)
    return One(w, torch.randn(1000, generator=generator).to(torch.bfloat16) / 500, **options)


def test_every_part_of_the_counter_and_every_bit_of_the_seed_counts(backend):
    kernels = kernels_of(backend)
    found = {"as it is": noisy().perturbed(kernels), "the draw": noisy().perturbed(kernels, 1)}
    found["the draw of the other side"] = noisy().perturbed(kernels, 1 << 31)
    changes = {"step": 1, "number": 1, "first": 8, "seed": 1}
    found |= {name: noisy(**{name: value}).perturbed(kernels) for name, value in changes.items()}
    found["the seed's upper half"] = noisy(seed=1 << 32).perturbed(kernels)
    found["a negative seed"] = noisy(seed=-1).perturbed(kernels)
    found["nearest"] = noisy().perturbed(kernels, noise=False)
    kept = list(found.items())
    for i, (name, one) in enumerate(kept):
        for other_name, other in kept[:i]:
            assert not torch.equal(one, other), (name, other_name)
    assert torch.equal(noisy().perturbed(kernels), found["as it is"])


@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])
def test_neither_rows_nor_shards_show(chunk, backend):
    """A parameter in pieces, each with its first element, has the numbers of the whole."""
    whole = noisy().perturbed(kernels_of(backend))
    assert_same_bits(noisy(chunk=chunk).perturbed(kernels_of(backend)), whole)
    parts = [noisy() for _ in range(3)]
    for one, (begin, end) in zip(parts, ((0, 333), (333, 640), (640, 1000)), strict=True):
        shard = One(one.w[begin:end], one.grads[0][begin:end], first=begin, chunk=chunk)
        assert_same_bits(shard.perturbed(kernels_of(backend)), whole[begin:end])


@pytest.mark.usefixtures("extension")
@pytest.mark.host
def test_any_number_of_threads_gives_the_same_numbers():
    calls = [make("perturb", "stochastic, any status, friendly", torch.bfloat16, (33, 1 << 18, 5)) for _ in range(2)]
    threads = torch.get_num_threads()
    try:
        for call, n in zip(calls, (1, 2), strict=True):
            torch.set_num_threads(n)
            call.run()
    finally:
        torch.set_num_threads(threads)
    assert_same_memory(*calls)


@pytest.mark.host
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("operator", ["perturb", "ascend"])
@pytest.mark.parametrize("variant", ["stochastic, masked, friendly and adaptive", "a stack, stochastic"])
def test_opcheck_accepts_random_rounding(operator, variant):
    args, kwargs = make(operator, variant, torch.bfloat16, sizes=(5, 0, 33), flat=True).args()
    torch.library.opcheck(getattr(torch.ops.msam_kernels, operator).default, args, kwargs)


BAD = {
    "noise of fp32 weights": (
        torch.float32,
        {"noise": torch.zeros(4, 2).long()},
        "noise is for weights of 16 bits, got .*loat",
    ),
    "noise without the parameters": (
        torch.bfloat16,
        {"noise": torch.zeros(1, 2).long()},
        r"noise must have a row .* got shape \[1, 2\]",
    ),
    "noise of another width": (
        torch.bfloat16,
        {"noise": torch.zeros(4, 3).long()},
        r"noise must have a row of 2 .*\[4, 3\]",
    ),
    "a draw of more than 32 bits": (
        torch.bfloat16,
        {"draw": 1 << 32},
        "draw must be a number of 32 bits, got 4294967296",
    ),
    "one sum of 16-bit weights": (torch.bfloat16, {"achieved_sq": torch.zeros(3).double()}, "achieved_sq"),
    "two sums of 16-bit weights": (
        torch.bfloat16,
        {"achieved_sq": torch.zeros(2, 3).double()},
        r"must have 3 sums .*\[2, 3\]",
    ),
}


@pytest.mark.host
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_refused_and_changes_nothing(name):
    dtype, options, message = BAD[name]
    call = make("perturb", "plain", dtype, sizes=(5, 40, 33))
    before = copy.deepcopy(call)
    with pytest.raises(RuntimeError, match=message):
        Call("perturb", {**call.arguments, **options}).run("cpu")
    assert_same_memory(call, before)
    if name.startswith(("noise of fp32", "a draw")):
        with pytest.raises(RuntimeError, match=message):
            Call("perturb", {**call.arguments, **options}).run("reference")


# ---- the optimizer -----------------------------------------------------------------------------------------------------


def short_mlp(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return mlp(torch.float32).to(dtype)


def optimizer(model: nn.Module, backend: str = "auto", **options: Any) -> MicroBatchSAM:
    options = {"rho": 0.05, "num_micro_batches": 2, "rounding": "stochastic", "seed": 5, **options}
    return MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), backend=backend, **options)


def points_of(opt: MicroBatchSAM, model: nn.Module, data: Any) -> list[list[Tensor]]:
    """The weights in every pass of a loop."""
    points = []
    for part in opt.passes(*data):
        points.append(weights(model))
        loss_of(model, *part).backward()
    return points


def short_batch(seed: int = 1, samples: int = 8) -> tuple[Tensor, Tensor]:
    return batch(samples, torch.bfloat16, seed=seed)


def test_every_pass_of_every_step_has_numbers_of_its_own_and_weights_come_back(backend):
    model = short_mlp()
    opt = optimizer(model, backend, method=methods.BilateralSAM(rho_min=0.05))
    x, y = (torch.cat([t[:4]] * 2) for t in short_batch())  # two micro-batches alike
    for p in model.parameters():
        p.data.fill_(1.0)
    before = weights(model)
    seen = []
    for _ in range(2):
        for _ in range(2):  # two loops of one step
            points = points_of(opt, model, (x, y))
            assert same_bits(model.parameters(), before)
            assert same_bits(points[0], before)
            assert same_bits(points[3], before)
            seen += [torch.cat([t.flatten() for t in point]) for i, point in enumerate(points) if i % 3]
        opt.engine.count_step()
        opt.zero_grad()
    assert len(seen) == 16
    for i, one in enumerate(seen):
        assert not any(torch.equal(one, other) for other in seen[:i]), i


def test_the_two_sides_of_bilateral_sam_have_different_numbers(backend):
    """By the same ones no weight would move to either side: up where they are large, down where they are small."""
    p = nn.Parameter(torch.full((1000,), 1.5, dtype=torch.bfloat16))
    rho = 0.25 * 2.0**-7 * math.sqrt(1000)
    method = methods.BilateralSAM(rho_min=rho)
    opt = MicroBatchSAM(SGD([p], lr=0.1), rho=rho, method=method, rounding="stochastic", seed=5, backend=backend)
    moved = []
    for _ in opt.passes():
        moved.append(p.detach() != 1.5)
        p.grad = torch.ones_like(p)
    _, up, down = moved
    assert 0 < int((up & down).sum()) < int(up.sum())


def test_a_step_that_is_given_up_and_repeated_draws_the_same(backend):
    model = short_mlp()
    opt = optimizer(model, backend)
    found = []
    for _ in range(2):
        loop = opt.passes(*short_batch())
        for i, part in enumerate(loop):
            if i == 1:
                found.append(weights(model))
                break
            loss_of(model, *part).backward()
        opt.restore()
    assert same_bits(*found)


@each_short
def test_the_same_seed_trains_alike_in_every_layout_and_way_and_on_every_backend(dtype, backend):
    def trained(
        backend: str = "reference", flatten: bool = True, way: str = "train_step", **options: Any
    ) -> list[Tensor]:
        model = short_mlp(dtype)
        opt = optimizer(model, backend, flatten=flatten, **options)
        for seed in range(3):
            x, y = batch(8, dtype, seed=seed)
            if way == "passes":
                points_of(opt, model, (x, y))
                opt.step()
                opt.zero_grad()
            else:
                opt.train_step(lambda *part: loss_of(model, *part), x, y)
        return weights(model)

    expected = trained()
    assert same_bits(trained(backend), expected)
    assert same_bits(trained(backend, flatten=False), expected)
    # The mean is rounded to 16 bits before the update of a loop: so only the perturbed passes are compared below.
    assert not same_bits(trained(backend, seed=6), expected)
    assert not same_bits(trained(backend, rounding="nearest", seed=None), expected)
    assert same_bits(trained(backend, way="passes"), trained(way="passes", flatten=False))


def test_without_a_seed_it_is_torchs():
    torch.manual_seed(11)
    opts = [optimizer(short_mlp(), seed=None)]
    torch.manual_seed(12)
    opts.append(optimizer(short_mlp(), seed=None))
    assert [opt.state_dict()["param_groups"][0]["msam_seed"] for opt in opts] == [11, 12]
    groups = optimizer(short_mlp(), rounding="nearest", seed=None).state_dict()["param_groups"]
    assert "msam_seed" not in groups[0]


@pytest.mark.parametrize("way", ["state dict", "pickle", "deepcopy"])
def test_a_copy_goes_on_with_the_same_numbers(way, backend):
    model = short_mlp()
    opt = optimizer(model, backend, seed=2**64 - 3)
    points_of(opt, model, short_batch())
    opt.step()  # whose gradients stay
    if way == "state dict":
        other = copy.deepcopy(model)
        again = optimizer(other, backend, seed=8)
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif way == "pickle":
        other, again = pickle.loads(pickle.dumps((model, opt)))
    else:
        other, again = copy.deepcopy((model, opt))
    assert again.rounding == "stochastic"
    for one, two in zip(*(points_of(o, m, short_batch(2)) for m, o in ((model, opt), (other, again))), strict=True):
        assert same_bits(one, two)
    for m, o in ((model, opt), (other, again)):
        o.train_step(lambda *part, m=m: loss_of(m, *part), *short_batch(2))
    assert same_bits(model.parameters(), other.parameters())


def test_a_graph_reads_the_step_where_every_one_writes_it():
    """What is captured has no number of the step in it: before each replay, the one address holds the next one."""
    model = short_mlp()
    opt = optimizer(model)
    heads, places = [], set()
    for seed in range(3):
        opt.update_hyper()  # as before each replay
        noise = opt.engine.store.flats[0].noise
        heads.append(noise[0].tolist())
        places.add(noise.data_ptr())
        opt.train_step(lambda *part: loss_of(model, *part), *short_batch(seed))
    assert heads == [[5, 0], [5, 1], [5, 2]]
    assert len(places) == 1
    flat = opt.engine.store.flats[0]
    flat.is_capturing = lambda: True  # nothing may be copied from the host then
    flat.refresh_noise(5, 7, {})
    assert flat.noise[0].tolist() == [5, 2]


def test_parameters_that_come_later_have_their_own_numbers():
    model = short_mlp()
    opt = MicroBatchSAM(SGD(model[0].parameters(), lr=0.1), rounding="stochastic", seed=5)
    opt.add_param_group({"params": list(model[2].parameters())})
    opt.train_step(lambda *part: loss_of(model, *part), *short_batch())
    numbers = [flat.noise[1:, 0].tolist() for flat in opt.engine.store.flats]
    assert numbers == [[0, 1], [2, 3]]


def test_weights_of_more_bits_are_not_rounded_at_random():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3).to(torch.bfloat16))
    forward = lambda x, y: nn.functional.cross_entropy(model[1](model[0](x).to(torch.bfloat16)).float(), y)  # noqa: E731
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), rounding="stochastic", seed=5)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    opt.train_step(forward, x, y)
    assert [flat.noise is None for flat in opt.engine.store.flats] == [True, False]


# ---- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_along_is_the_part_of_e_that_arrives(rounding, backend):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(20_000).to(torch.bfloat16))
    target = torch.randn(20_000).to(torch.bfloat16)
    opt = MicroBatchSAM(SGD([p], lr=0.1), rho=0.05, backend=backend, rounding=rounding)
    points = []
    for _ in opt.passes():
        points.append(p.detach().double())
        (p - target).square().sum().backward()
        if len(points) == 1:
            d = p.grad.double()
    arrived = points[1] - points[0]
    along = float(arrived @ d / (0.05 * d.norm()))
    assert opt.stats.along.tolist() == pytest.approx([along], rel=1e-5)
    if rounding == "nearest":
        assert 0.01 < along < 0.5
    else:
        assert abs(along - 1) < 0.1
    assert float(opt.stats.perturbation_norm) == pytest.approx(float(arrived.norm()), rel=1e-12)


def test_along_is_1_where_it_is_not_measured_or_nothing_is_asked_for(backend):
    for model, rho in ((mlp(torch.float32), 0.05), (mlp(torch.float64), 1e-20), (short_mlp(), 0.0)):
        opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), rho=rho, backend=backend, num_micro_batches=2)
        opt.train_step(lambda *part, m=model: loss_of(m, *part), *batch(6, next(model.parameters()).dtype))
        assert opt.stats.along.tolist() == [1.0, 1.0]


def coarse(backend: str, method: methods.SAM, **options: Any) -> tuple[nn.Module, MicroBatchSAM]:
    """A model of which ASAM moves next to nothing in 16 bits."""
    model = short_mlp()
    return model, MicroBatchSAM(SGD(model.parameters(), lr=0.0), backend=backend, method=method, **options)


def test_little_that_arrives_is_warned_of_once(backend):
    model, opt = coarse(backend, methods.AdaptiveSAM(), rho=0.001)

    def step():
        opt.train_step(lambda *part: loss_of(model, *part), *short_batch())

    with pytest.warns(UserWarning, match=r"only \d+% of the perturbation arrives .* rounding='stochastic'"):
        step()
    assert float(opt.stats.along) < 0.5
    step()


@pytest.mark.parametrize(
    "options",
    [{"rho": 0.001, "rounding": "stochastic"}, {"rho": 1.0}, {"rho": 0.0}],
    ids=["at random", "enough arrives", "nothing is asked for"],
)
def test_there_is_no_warning_otherwise(options, backend):
    model, opt = coarse(backend, methods.AdaptiveSAM(), **options)
    opt.train_step(lambda *part: loss_of(model, *part), *short_batch())
    assert opt.engine.watch.is_over == (options == {"rho": 1.0})


@pytest.mark.parametrize("short", [True, False])
def test_what_arrives_is_measured_until_that_is_known_and_of_16_bits_alone(short, monkeypatch):
    model, opt = coarse("auto", methods.AdaptiveSAM(), rho=1.0)
    opt.train_step(lambda *part: loss_of(model, *part), *short_batch())
    if not short:
        model.float()
        opt.engine.watch = Watch()
    monkeypatch.setattr(opt.engine.store, "achieved", None)
    for _ in range(2):
        opt.train_step(lambda *part: loss_of(model, *part), *(t.to(model[0].weight.dtype) for t in short_batch()))
    assert opt.engine.watches == short


def test_the_warning_waits_for_a_step_in_which_anything_is_asked_for():
    model, opt = coarse("auto", methods.AdaptiveSAM(), rho=lambda step: 0.001 * (step > 1))
    for _ in range(2):
        opt.train_step(lambda *part: loss_of(model, *part), *short_batch())
    with pytest.warns(UserWarning, match="of the perturbation arrives"):
        opt.train_step(lambda *part: loss_of(model, *part), *short_batch())


def test_the_watch_on_a_gpu_looks_when_the_numbers_are_there(monkeypatch):
    class Event:
        done = False

        def record(self):
            pass

        def query(self):
            return self.done

        def synchronize(self):
            self.done = True

    numbers = torch.tensor([0.1, 0.2, 1.0], dtype=torch.float64)

    class OnGpu:  # as much of a tensor as is asked for
        device, shape, dtype = SimpleNamespace(type="cuda"), numbers.shape, numbers.dtype

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: real(*a, **k))
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(Tensor, "copy_", lambda self, other, non_blocking=False: self.set_(numbers.clone()))
    measured = []

    def measure():
        measured.append(OnGpu())
        return measured[-1]

    watch, other, of_ranks = Watch(), Watch(), Watch()
    of_ranks.note(measure, waits=True)
    with pytest.warns(UserWarning, match="only 20%"):
        of_ranks.note(measure, waits=True)
    assert len(measured) == 1  # as on ranks that have the numbers already
    del measured[:]
    watch.note(measure)
    watch.look()
    watch.note(measure)
    assert len(measured) == 1  # one copy at a time
    assert not watch.is_over
    other.note(measure)
    monkeypatch.setattr(Event, "done", True)
    with pytest.warns(UserWarning, match="only 20%"):
        watch.look()
    assert watch.is_over
    with pytest.warns(UserWarning, match="only 20%"):
        other.note(measure)  # where nobody else looks
    assert len(measured) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look()


# ---- beyond 2^31 elements ----------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.host
@pytest.mark.usefixtures("extension")
@pytest.mark.timeout(3000)
def test_a_parameter_of_more_than_2_31_elements_trains():
    """Weights, gradient and saved weights are 13 GB. e is 1/113 of the distance of two numbers, and arrives all the same."""
    meminfo = Path("/proc/meminfo")
    available = re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    if available is None or int(available[1]) << 10 < 16 << 30:
        pytest.skip("needs 16 GB of free memory")
    n = 2**31 + 5
    p = nn.Parameter(torch.full((n,), 0.02, dtype=torch.bfloat16))
    w = float(p.data[0])
    opt = MicroBatchSAM(SGD([p], lr=0.5), flatten=False, rounding="stochastic", seed=1)
    perturbed: list[Tensor] = []
    for _ in opt.passes():
        perturbed = [part.clone() for part in (p.data[: 1 << 24], p.data[-(1 << 24) :])]  # of the last pass, at w + e
        p.grad = None
        p.grad = torch.full((n,), 0.25, dtype=torch.bfloat16)
    e, spacing = 0.05 / math.sqrt(n), 2.0**-13
    for part in perturbed:
        share = float((part != w).double().mean())
        assert set(part.unique().tolist()) == {w, w + spacing}
        assert share == pytest.approx(e / spacing, abs=5 * math.sqrt(e / spacing / len(part)))
    assert not torch.equal(*perturbed)
    assert float(opt.stats.along) == pytest.approx(1, abs=5 * math.sqrt(spacing / e / n))
    assert all(bool((part == w).all()) for part in p.data.split(1 << 26))
    opt.step()
    stepped = torch.tensor(w - 0.5 * 0.25).to(torch.bfloat16)
    assert all(bool((part == stepped).all()) for part in p.data.split(1 << 26))


def test_a_seed_that_the_base_optimizer_has_loaded_is_taken():
    model = short_mlp()
    saved = optimizer(model, seed=7).state_dict()
    bases = [SGD(short_mlp().parameters(), lr=0.1, momentum=0.9) for _ in range(2)]
    for base in bases:
        base.load_state_dict(saved)
    seeds = [
        MicroBatchSAM(base, rounding="stochastic", seed=s).engine.seed for base, s in zip(bases, (None, 8), strict=True)
    ]
    assert seeds == [7, 8], "what is asked for by name comes first"
    torch.manual_seed(3)
    assert MicroBatchSAM(bases[0], rounding="stochastic").engine.seed == 3, (
        "that of an earlier wrapper is not this one's"
    )


def test_gradients_that_are_cleared_at_w_plus_e_give_no_random_numbers_back():
    model = short_mlp()
    opt = optimizer(model, num_micro_batches=1)
    for loop in range(2):
        for part in opt.passes(*short_batch()):
            if opt.pass_index == 1:
                opt.zero_grad()
            loss_of(model, *part).backward()
        assert opt.engine.store.drawn == loop + 1


def test_a_seed_of_a_file_has_64_bits_too():
    opt = optimizer(short_mlp(), seed=3)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["msam_seed"] = 2**70
    with pytest.raises(ValueError, match=r"'seed' in state_dict must be < 2\*\*64, got 1180591620717411303424"):
        opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"][0]["msam_seed"] == 3


def test_the_warning_is_about_the_line_that_led_there():
    watch = Watch()
    with pytest.warns(UserWarning, match="of the perturbation arrives") as caught:
        watch.note(lambda: torch.tensor([1.0, 0.1, 1.0], dtype=torch.float64))
    assert [warning.filename for warning in caught] == [__file__]
