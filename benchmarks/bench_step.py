# SPDX-License-Identifier: Apache-2.0
"""What a sharpness-aware step costs beyond its backward passes: this package against plain PyTorch, side by side.

    python benchmarks/bench_step.py                  # small CNN, ResNet-18, 100M transformer; about ten minutes
    python benchmarks/bench_step.py --quick          # about a minute
    python benchmarks/bench_step.py --csv step.csv --plot step.png
    python benchmarks/bench_step.py --device cuda    # ResNet-18 and -50, ViT-B, transformers of 350M and 1.3G

No model runs. Where a training loop runs forward and backward, prepared random tensors are assigned to ``p.grad``,
other ones for each pass and micro-batch. All contestants need the same assignments, which are timed alone and
subtracted; all start and end a step with ``p.grad`` None, and clearing it is part of the step. Every contestant has its
own weights and state.

1. Equality first. Each contestant takes the same steps on L_i(w) = <M_i, w> + c_i/2 ||w - w_0||^2, whose gradient
   depends on where it is taken, with rho so large that M_i and c_i * e_i weigh the same. What it moved must be what
   plain torch in float64 moved: ||w - w64|| / ||w64 - w_0|| below ``TOLERANCE``. Otherwise the case is not timed.
2. Time. In every round each contestant takes a block of steps, in shuffled order; a contestant's time is the median
   over the rounds, its spread the interquartile range. Gradients are refilled between blocks: contestants may write
   into them.
3. GB/s is the traffic that the fused step needs, divided by the time, for everybody: P passes over N values of the
   storage size. SAM with one micro-batch and SGD has P = 10 (norm 1, perturb 4, restore + update 5); for the rest see
   ``step_passes``. It is compared with ``torch.Tensor.copy_`` of N values (one read and one write), the best of the
   medians taken along the way.
4. "extra" is the most memory that a step holds at a time beyond what it held before, in units of the parameters.

On a GPU, ``copy_`` is measured first, at 2 GiB, and once. Kernels alone are timed by events, with L2 flushed before each.
A step is timed by the wall clock until the device has finished; assignments that the host makes while the device works
cost nothing, so no step is taken for shorter than its kernels on the device. "host" is the time until the calls of one
micro-batch return, with nothing queued; "launches" are the host's, per micro-batch, a graph being one. What does not fit
the memory side by side is measured in turns: fewer sets of gradients, fewer contestants at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Before torch loads: the memory check runs the profiler, which reports its own start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import measure
import peers
from measure import (
    Clock,
    Effort,
    EventClock,
    Others,
    TimeLimit,
    Timing,
    interleave,
    no_collector,
    number,
    print_table,
    size,
)
from shapes import CPU_SHAPES, GPU_SHAPES, SHAPES

OURS, PASSES = "ours", "ours (passes loop)"
# What the goals are stated against; compile has a goal of its own, the rest is shown for completeness.
GOAL_PEERS = ("loop", "foreach", "pytorch_optimizer")
# ours / best of GOAL_PEERS, ours / compile, passes loop / best of GOAL_PEERS; SGD momentum, fp32, one micro-batch.
GOALS = {"cnn": (5.0, 4.0, 4.0), "resnet18": (1.9, 1.15, 1.6), "transformer100m": (2.2, 1.4, 1.8)}
# Each kernel alone, in shares of the bandwidth of copy_, by what its name contains.
KERNEL_GOALS = {"transformer100m": {"perturb": 1.4, "sgd": 1.4, "adamw": 1.4, "": 1.0}}
# On a GPU. Of the worst case over dtypes, methods, base optimizers and micro-batches:
GPU_GOALS = {
    "resnet18": 5.0,
    "resnet50": 5.0,
    "transformer350m": 1.8,
    "transformer1_3b": 1.8,
}  # best of GOAL_PEERS / ours
GPU_COMPILE_GOAL = 1.0  # any compiled peer / ours, everywhere
GPU_KERNEL_GOAL = 0.9  # of copy_, from 100M parameters on
GPU_ASCEND_GOAL = 1.0  # of copy_, for norm + perturb up to 15M parameters in fp32: part of it is read from L2
GPU_HOST_GOAL = 100.0  # µs per micro-batch, ResNet-50
GPU_LAUNCH_GOAL = 3  # per micro-batch

# Relative L2 error of the way walked, ours and the peers'. In fp32 a rounding of w costs 6e-8 * |w| / |way| per step,
# about 1e-7 here. What plain torch adds is its norm, summed in fp32: 1e-5 at 12M parameters, 5e-5 at 100M, and
# pytorch_optimizer does so for fp64 as well. A wrong rule costs 1e-2 and more. In 16 bits, where plain torch rounds
# after every operator, only gross errors show.
TOLERANCE = {
    torch.float64: (1e-12, 1e-6),
    torch.float32: (1e-5, 5e-4),
    torch.float16: (1e-1, 5e-1),
    torch.bfloat16: (1e-1, 5e-1),
}

LR = {"sgd": 0.1, "adamw": 1e-2}
SIGMA, LMBDA = 1.0, 0.9
METHOD_NAMES = {"sam": "SAM", "fsam": "F-SAM"}

# -- cases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    shape: str
    method: str
    base: str
    dtype: torch.dtype
    micro_batches: int
    backend: str = "auto"


def step_passes(case: Case, *, passes_loop: bool = False) -> int:
    """P of a whole fused step: how often it must read or write all parameters, gradients or state."""
    m = case.micro_batches
    ascent = m * (1 + 3) + 1 + (m * (1 + 2) if case.method == "fsam" else 0)
    update = 5 if case.base == "sgd" else 7
    if passes_loop:
        return ascent + 2 + 5 * (m - 1) + update
    # Restore alone after the first micro-batch, restore + accumulate, and both fused with the update after the last.
    return ascent + (update if m == 1 else 2 + 5 * (m - 2) + update + 1)


# -- gradients ---------------------------------------------------------------------------------------------------------


class Gradients:
    """Prepared gradients, one tensor per parameter as autograd hands them out, and clean copies to refill them from.

    Set 0 is the first micro-batch's gradient at w + e only, since contestants accumulate in it; the others take turns.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, sets: int = 4):
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale):
            return [(torch.randn(s, generator=generator, device=device) * scale).to(dtype) for s in shapes]

        self.numel = sum(math.prod(s) for s in shapes)
        self.weights = draw(0.05)
        self.masters = [draw(0.1) for _ in range(sets)]
        self.sets = [[torch.empty_like(g) for g in master] for master in self.masters]
        self.loss = torch.ones((), device=device)
        # As large in every element as the gradients, so that a wrong perturbation shows in the weights.
        self.rho = 0.1 * math.sqrt(self.numel)
        self.refill()

    def refill(self) -> None:
        for grads, master in zip(self.sets, self.masters, strict=True):
            torch._foreach_copy_(grads, master)

    def parameters(self, dtype: torch.dtype | None = None) -> list[nn.Parameter]:
        return [nn.Parameter(w.to(dtype or w.dtype, copy=True)) for w in self.weights]

    def feed(self, params: list[nn.Parameter], micro_batches: int) -> Callable[[], Tensor]:
        """Stands for forward and backward: each call assigns the next gradients."""
        turn = itertools.cycle(self.sets[1:])
        steps = len(self.sets) - 1
        order = [self.sets[0] if call == 1 else next(turn) for _ in range(steps) for call in range(2 * micro_batches)]
        upcoming = itertools.cycle(order)

        def assign():
            for p, g in zip(params, next(upcoming), strict=True):
                p.grad = g
            return self.loss

        return assign

    def checked_feed(self, params: list[nn.Parameter], micro_batches: int) -> Callable[[], Tensor]:
        """Gradient of L_i(w) = <M_i, w> + c_i/2 ||w - w_0||^2 at the parameters as they are; each i is called twice."""
        calls = itertools.count()

        @torch.no_grad()
        def assign():
            call = next(calls)
            i = call // 2
            master, c = self.masters[i % len(self.masters)], 1 + (i % 3) / 4
            for k, (p, w, g) in enumerate(zip(params, self.weights, master, strict=True)):
                if p.grad is not None:
                    raise RuntimeError("a contestant ran a pass without clearing p.grad")
                if p.dtype == w.dtype:
                    # As in `feed`: a step's first gradient at w + e has a set of its own, the others take turns.
                    out = self.sets[0 if call % (2 * micro_batches) == 1 else 1 + call % (len(self.sets) - 1)][k]
                    p.grad = torch.sub(p, w, out=out).mul_(c).add_(g)
                else:
                    p.grad = (p - w).mul_(c).add_(g)
            return self.loss

        return assign


# -- contestants -------------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """``run(feed)`` takes one whole step; ``feed`` stands for the forward and backward of a micro-batch."""

    name: str
    params: list[nn.Parameter]
    run: Callable[[Callable[[], Tensor]], object]
    deviation: float = math.nan
    extra: float = math.nan
    first_step_s: float = math.nan
    host_us: float | None = None  # per micro-batch
    work: measure.Work | None = None


def torch_base(params: list[nn.Parameter], base: str, **options) -> torch.optim.Optimizer:
    if base == "sgd":
        return torch.optim.SGD(params, lr=LR["sgd"], momentum=0.9, weight_decay=5e-4, **options)
    # The usual 1e-8 is zero in fp16, and plain torch would divide by it.
    eps = 1e-3 if params[0].element_size() == 2 else 1e-8
    return torch.optim.AdamW(params, lr=LR["adamw"], weight_decay=0.01, eps=eps, **options)


def make_peer(name: str, case: Case, gradients: Gradients) -> Contestant:
    kind = peers.PEERS[name]
    params = gradients.parameters()
    base = torch_base(params, case.base, **kind.base_options)
    peer = kind(base, rho=gradients.rho, friendly=case.method == "fsam", sigma=SIGMA, lmbda=LMBDA)
    count = case.micro_batches
    return Contestant(name, params, lambda feed: peer.step([feed] * count))


def make_ours(name: str, case: Case, gradients: Gradients) -> Contestant:
    from msam_kernels import MicroBatchSAM, methods

    params = gradients.parameters()
    method = methods.FriendlySAM(sigma=SIGMA, lmbda=LMBDA) if case.method == "fsam" else methods.SAM()
    count = case.micro_batches
    options = {"num_micro_batches": count, "method": method, "backend": case.backend}
    opt = MicroBatchSAM(torch_base(params, case.base), rho=gradients.rho, **options)
    batch = torch.zeros(count)

    def passes_loop(feed):
        for _ in opt.passes(batch):
            feed()
        opt.step()
        opt.zero_grad()

    if name == PASSES:
        return Contestant(name, params, passes_loop)
    return Contestant(name, params, opt.step if count == 1 else lambda feed: opt.step([feed] * count))


def reference_weights(case: Case, gradients: Gradients, steps: int) -> list[Tensor]:
    params = gradients.parameters(torch.float64)
    peer = peers.Foreach(
        torch_base(params, case.base, foreach=False),
        rho=gradients.rho,
        friendly=case.method == "fsam",
        sigma=SIGMA,
        lmbda=LMBDA,
    )
    feed = gradients.checked_feed(params, case.micro_batches)
    for _ in range(steps):
        peer.step([feed] * case.micro_batches)
    return [p.detach() for p in params]


@torch.no_grad()
def deviation(contestant: Contestant, expected: list[Tensor], gradients: Gradients) -> float:
    """||w - w64|| / ||w64 - w_0||; infinite where the weights are not finite."""
    wrong = moved = 0.0
    for p, w64, w in zip(contestant.params, expected, gradients.weights, strict=True):
        wrong += (w64 - p).square_().sum().item()
        moved += (w64 - w).square_().sum().item()
    ratio = math.sqrt(wrong / moved)
    return ratio if math.isfinite(ratio) else math.inf


def check_steps(case: Case, gradients: Gradients) -> int:
    """Three steps show a wrong momentum or EMA; where that takes minutes, one step of several micro-batches must do."""
    return 3 if gradients.numel * case.micro_batches <= 2e8 or gradients.weights[0].is_cuda else 1


class Unequal(Exception):
    pass


def enter(
    case: Case, names: Sequence[str], gradients: Gradients, expected: list[Tensor], note: Callable, say: Callable
) -> list[Contestant]:
    """Build the contestants and let each prove that it computes the same: that its weights go where ``expected`` are.

    Raises:
        Unequal: one does not; the message says which and by how much.
    """
    steps, contestants = check_steps(case, gradients), []
    for name in names:
        say(f"checking {name}")
        kind = peers.PEERS.get(name)
        try:
            contestant = (make_ours if kind is None else make_peer)(name, case, gradients)
            feed = gradients.checked_feed(contestant.params, case.micro_batches)
            start = time.perf_counter()
            for step in range(steps):
                contestant.run(feed)
                if step == 0:
                    contestant.first_step_s = time.perf_counter() - start
        except Exception as error:
            # A peer that a machine cannot run is no reason not to measure the others; we have no such excuse.
            if kind is None:
                raise
            note(f"{name}: not run, {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        contestant.deviation = deviation(contestant, expected, gradients)
        contestants.append(contestant)
    own, other = TOLERANCE[case.dtype]
    limits = {c.name: other if c.name in peers.PEERS else own for c in contestants}
    if any(c.deviation > limits[c.name] for c in contestants):
        lines = "\n".join(
            f"  {c.name:<20} {c.deviation:.1e} of {limits[c.name]:.0e}{'  <- too far' * (c.deviation > limits[c.name])}"
            for c in contestants
        )
        raise Unequal(
            f"Not all contestants compute the same step ({case}). Relative distance to plain torch in float64 after "
            f"{steps} step(s), and the most that is allowed:\n{lines}\n"
            "They were not timed: fix the contestant, or leave it out with --peers."
        )
    return contestants


# -- kernels -----------------------------------------------------------------------------------------------------------


def kernel_cases(gradients: Gradients, backend: str) -> list[tuple[str, float, Callable[[], object]]]:
    """(name, P, call) of every kernel: the operators of ``msam_kernels.ops`` as ``MicroBatchSAM`` calls them."""
    from msam_kernels import ops
    from msam_kernels.flat import Flat

    params = gradients.parameters()
    k = ops.get_backend(backend, params[0].device)
    flat = Flat(params, [0] * len(params), flatten=True, backend=k)
    table, w = flat.chunks(), flat.weights
    acc, g = gradients.sets[0], gradients.sets[1]
    saved, ema, m, v = (flat.new_buffer() for _ in range(4))
    saved.copy_(w[0])
    other, v_parts = gradients.sets[2 % len(gradients.sets)], flat.aliases(ema)
    mask = torch.full((flat.size // 8,), 255, dtype=torch.uint8, device=flat.device)
    step = torch.zeros(len(params) + 1, device=flat.device)

    def row(*values):
        return torch.tensor([values], dtype=torch.float64, device=flat.device)

    sgd = dict(hyper=row(gradients.rho, 1e-3, 0.9, 0, 5e-4, 0, 0), momentum_buffer=m)
    adam = dict(hyper=row(gradients.rho, 1e-4, 0.9, 0.999, 1e-8, 0.01, 0, 0, 1), exp_avg=m, exp_avg_sq=v, step=step)
    norm_sq = torch.full((1,), float(gradients.numel) * 1e-2, dtype=torch.float64, device=flat.device)
    achieved_sq, acc_sq = (torch.empty(len(table), dtype=torch.float64, device=flat.device) for _ in range(2))
    outputs = dict(hyper=sgd["hyper"], achieved_sq=achieved_sq)
    ascent = dict(norm_sq=norm_sq, **outputs)
    friendly, moving = dict(ema=ema, sigma=SIGMA), dict(ema=ema, sigma=SIGMA, lmbda=LMBDA)
    two, three = (row(0.7, 0.2, -0.4)[0, :n].contiguous() for n in (2, 3))
    back, mean = dict(saved=saved, norm_sq=norm_sq), dict(saved=saved, norm_sq=norm_sq, c_acc=0.5, c=0.5)
    return [
        ("inner_products", 1, lambda: k.inner_products(w, g, table)),
        ("inner_products friendly", 2, lambda: k.inner_products(w, g, table, **friendly)),
        ("inner_products adaptive", 2, lambda: k.inner_products(w, g, table, eta=0.01)),
        ("perturb first", 4, lambda: k.perturb(w, [], g, table, saved=saved, **ascent)),
        ("perturb later", 3, lambda: k.perturb(w, [], g, table, **ascent)),
        ("perturb first friendly", 6, lambda: k.perturb(w, [], g, table, saved=saved, **ascent, **moving)),
        ("perturb later friendly", 5, lambda: k.perturb(w, [], g, table, **ascent, **moving)),
        ("perturb first adaptive", 4, lambda: k.perturb(w, [], g, table, saved=saved, **ascent, eta=0.01)),
        ("ascend", 5, lambda: k.ascend(w, g, table, saved=saved, **outputs)),
        ("ascend friendly", 8, lambda: k.ascend(w, g, table, saved=saved, **outputs, **moving)),
        ("restore", 2, lambda: k.restore(w, [], [], table, saved=saved)),
        ("restore + accumulate", 5, lambda: k.restore(w, acc, g, table, **back)),
        ("sgd", 5, lambda: k.sgd(w, [], g, table, **sgd)),
        ("restore + sgd", 5, lambda: k.sgd(w, [], g, table, **sgd, **back)),
        ("restore + accumulate + sgd", 6, lambda: k.sgd(w, acc, g, table, **sgd, **mean)),
        ("adamw", 7, lambda: k.adam(w, [], g, table, **adam)),
        ("restore + adamw", 7, lambda: k.adam(w, [], g, table, **adam, **back)),
        ("restore + accumulate + adamw", 8, lambda: k.adam(w, acc, g, table, **adam, **mean)),
        (
            "perturb first masked",
            4 + mask.nbytes / saved.nbytes,
            lambda: k.perturb(w, [], g, table, saved=saved, **ascent, mask=mask),
        ),
        ("perturb to the other side", 3, lambda: k.perturb(w, [], g, table, origin=saved, **ascent)),
        (
            "perturb to the other side, adding",
            5,
            lambda: k.perturb(w, acc, g, table, origin=saved, acc_sq=acc_sq, **ascent),
        ),
        ("dots of two", 2, lambda: k.dots(g, acc, [], table)),
        ("dots of three", 3, lambda: k.dots(g, acc, other, table)),
        ("v of LookSAM", 3, lambda: k.restore([], v_parts, [*g, *acc], table, coefs=two, c_acc=0.0)),
        ("restore + sgd, two combined", 6, lambda: k.sgd(w, [], [*g, *acc], table, **sgd, **back, coefs=two)),
        (
            "restore + sgd, three combined",
            7,
            lambda: k.sgd(w, [], [*g, *acc, *other], table, **sgd, **back, coefs=three),
        ),
    ]


def kernel_goal(row: dict, gpu: bool) -> float:
    """The share of ``copy_``'s bandwidth that a kernel should reach; 0 where none was set."""
    shape, name = row["shape"], row["contestant"]
    if gpu:
        small = name == "ascend" and row["numel"] <= 15e6 and row["dtype"] == "float32"
        return GPU_ASCEND_GOAL if small else GPU_KERNEL_GOAL if row["numel"] >= 1e8 else 0.0
    goals = KERNEL_GOALS.get(shape, {})
    return next((goal for part, goal in goals.items() if part in name), 0.0) if goals else 0.0


# -- report ------------------------------------------------------------------------------------------------------------


def our_facts(args: argparse.Namespace) -> dict[str, str]:
    if args.peers_only:
        return {"msam_kernels": "left out", "backend": ""}
    import msam_kernels
    from msam_kernels import ops

    chosen, name = ops.get_backend(args.backend, args.device), args.backend
    if name == "auto":
        for name in ops.BACKENDS:
            # One that is not there, or is not for this device, says so by raising.
            with contextlib.suppress(RuntimeError):
                if ops.get_backend(name, args.device) is chosen:
                    break
    return {"msam_kernels": msam_kernels.__version__, "backend": name}


def facts(args: argparse.Namespace) -> dict[str, object]:
    return {
        **measure.where(args.device),
        **our_facts(args),
        "pytorch_optimizer": measure.installed("pytorch_optimizer"),
        "commit": measure.commit(),
        "date": measure.now(),
    }


class Results(measure.Results):
    @property
    def on_gpu(self) -> bool:
        return self.facts["device"] != "cpu"

    def finish_shape(self, shape: str, dtype: str) -> float:
        """Bandwidths and ratios, once the copy bandwidth of this shape is known; returns that."""
        rows = self.select(shape=shape, dtype=dtype)
        copies = [row for row in rows if row["kind"] == "copy"] or self.select(kind="copy", shape="copy")
        copy = max((row["gb_per_s"] for row in copies), default=math.nan)
        for row in rows:
            row["copy_gb_per_s"] = copy
            row["share_of_copy"] = row["gb_per_s"] / copy if row.get("gb_per_s") else None
        for row in self.select(shape=shape, dtype=dtype, kind="step"):
            case = {key: row[key] for key in ("shape", "dtype", "method", "base", "micro_batches")}
            others = {r["contestant"]: r["ms"] for r in self.select(kind="step", **case)}
            best = min((others[name] for name in GOAL_PEERS if name in others), default=None)
            row["best_peer_over_this"] = best / row["ms"] if best else None
            compiled = min((ms for name, ms in others.items() if name.startswith("compile")), default=None)
            row["compile_over_this"] = compiled / row["ms"] if compiled else None
        return copy


def print_heading(facts: dict[str, object]) -> None:
    print(f"Optimizer time of a sharpness-aware step, {facts['date'][:10]}, commit {facts['commit']}")
    print(f"{facts['machine']}; {facts['device']}, {facts['threads']} threads")
    keys = ("msam_kernels", "torch", "pytorch_optimizer", "python", "cuda", "driver", "triton")
    print(", ".join(f"{key} {facts[key]}" for key in keys if key in facts))
    if facts["backend"]:
        print(f"ours runs on backend {facts['backend']!r}")
    if facts["backend"] == "reference":
        print("That is plain torch, the specification: see `python -m msam_kernels info` for how to get the fast one.")


def print_shape(results: Results, shape: str, dtype: str) -> None:
    copy = results.finish_shape(shape, dtype)
    tensors = SHAPES[shape]()
    numel = sum(math.prod(s) for s in tensors)
    what = f"{shape}: {len(tensors)} tensors, {size(numel)} parameters, {dtype}"
    print(f"\n== {what}; copy_ moves {number(copy)} GB/s ==")
    if kernels := results.select(shape=shape, dtype=dtype, kind="kernel"):
        print("\n  every kernel alone")
        rows = []
        for row in kernels:
            goal = kernel_goal(row, results.on_gpu)
            rows.append(
                (
                    row["contestant"],
                    f"{row['passes']:.3g}",
                    number(row["ms"]),
                    f"± {number(row['iqr_ms'], 2)}",
                    number(row["gb_per_s"]),
                    f"{row['share_of_copy']:.0%}",
                    f"{goal:.0%}" if goal else "",
                )
            )
        print_table(("kernel", "P", "ms", "iqr", "GB/s", "of copy_", "goal"), rows)
    for assign in results.select(shape=shape, dtype=dtype, kind="assign"):
        method, base, m = assign["method"], assign["base"], assign["micro_batches"]
        rows = results.select(shape=shape, dtype=dtype, kind="step", method=method, base=base, micro_batches=m)
        ours = next((row["ms"] for row in rows if row["contestant"] == OURS), None)
        count = "1 micro-batch" if m == 1 else f"{m} micro-batches"
        what = f"{METHOD_NAMES[method]}, {base}, {count}"
        print(
            f"\n  {what}: ms per step; {number(assign['ms'])} ms of assigning gradients are the host's"
            if results.on_gpu
            else f"\n  {what}: ms per step, without {number(assign['ms'])} ms of assigning gradients"
        )
        lines = []
        for row in sorted(rows, key=lambda row: row["ms"]):
            line = (
                row["contestant"],
                number(row["ms"]),
                f"± {number(row['iqr_ms'], 2)}",
                number(row["gb_per_s"]),
                f"{row['share_of_copy']:.0%}",
                f"{row['ms'] / ours:.2f}x" if ours else "",
                number(row["extra_over_parameters"], 2),
                f"{row['deviation']:.0e}",
            )
            if results.on_gpu:
                line += (number(row["device_ms"]), number(row["host_us"]), number(row["launches"]))
            lines.append(line)
        header = ("", "ms", "iqr", "GB/s", "of copy_", "ms / ours", "extra / P", "error")
        if results.on_gpu:
            header += ("device ms", "host µs", "launches")
        if m > 1 and "pytorch_optimizer" in results.facts["contestants"]:
            lines.append(("pytorch_optimizer", *["n/a"] * (len(header) - 1)))
        print_table(header, lines)


def gpu_goals(results: Results) -> list[tuple[str, str, str, str]]:
    """(what, measured in the worst case, goal, verdict) of everything that was set and measured."""
    lines = []

    def judge(what: str, rows: list[dict], key: str, goal: float, text: Callable[[float], str], *, least: bool) -> None:
        rows = [row for row in rows if row.get(key) is not None]
        if not rows:
            return
        worst = (min if least else max)(rows, key=lambda row: row[key])
        reached = worst[key] >= goal if least else worst[key] <= goal
        where = worst["contestant"] if worst["kind"] == "kernel" else f"{worst['method']}, m = {worst['micro_batches']}"
        measured = f"{text(worst[key])} ({worst['dtype']}, {where})"
        lines.append((what, measured, f"{'≥' if least else '≤'} {text(goal)}", "reached" if reached else "not reached"))

    ours = results.select(kind="step", contestant=OURS)
    for shape in dict.fromkeys(row["shape"] for row in results.rows if row["kind"] in ("kernel", "step")):
        here = [row for row in ours if row["shape"] == shape]
        if shape in GPU_GOALS:
            what = f"{shape}: times faster than the best of {', '.join(GOAL_PEERS)}"
            judge(what, here, "best_peer_over_this", GPU_GOALS[shape], lambda x: f"{x:.2f}x", least=True)
        what = f"{shape}: times faster than the best compiled"
        judge(what, here, "compile_over_this", GPU_COMPILE_GOAL, lambda x: f"{x:.2f}x", least=True)
        kernels = [row for row in results.select(kind="kernel", shape=shape) if kernel_goal(row, results.on_gpu)]
        for goal in sorted({kernel_goal(row, results.on_gpu) for row in kernels}):
            rows = [row for row in kernels if kernel_goal(row, results.on_gpu) == goal]
            what = f"{shape}: share of copy_, {'slowest kernel' if goal == GPU_KERNEL_GOAL else 'norm + perturb'}"
            judge(what, rows, "share_of_copy", goal, lambda x: f"{x:.0%}", least=True)
    at_resnet50 = [row for row in ours if row["shape"] == "resnet50"]
    judge("resnet50: host time per micro-batch", at_resnet50, "host_us", GPU_HOST_GOAL, "{:.0f} µs".format, least=False)
    judge("launches per micro-batch", ours, "launches", GPU_LAUNCH_GOAL, "{:.3g}".format, least=False)
    return lines


def print_goals(results: Results) -> None:
    """The project's goals, each with what was measured, and every place where somebody else is faster."""
    if results.on_gpu and (lines := gpu_goals(results)):
        print("\n== goals: whole steps and kernels, each with its worst case ==\n")
        print_table(("", "measured", "goal", ""), lines)
    rows = []
    for row in results.select(kind="step", dtype="float32", base="sgd", micro_batches=1):
        if row["shape"] not in GOALS or row["contestant"] not in (OURS, PASSES) or results.on_gpu:
            continue
        best_goal, compile_goal, passes_goal = GOALS[row["shape"]]
        goals = [("best of " + ", ".join(GOAL_PEERS), "best_peer_over_this", best_goal)]
        if row["contestant"] == PASSES:
            goals = [(goals[0][0], "best_peer_over_this", passes_goal)]
        else:
            goals.append(("compile", "compile_over_this", compile_goal))
        for against, key, goal in goals:
            ratio = row[key]
            if ratio is not None:
                verdict = "reached" if ratio >= goal else f"{1 - ratio / goal:.0%} short"
                what = f"{row['shape']}, {METHOD_NAMES[row['method']]}, {row['contestant']}"
                rows.append((what, against, f"{ratio:.2f}x", f"{goal:g}x", verdict))
    if rows:
        print("\n== goals: SGD momentum, fp32, one micro-batch; how many times faster ==\n")
        print_table(("", "than", "measured", "goal", ""), rows)
    losses = []
    for row in results.select(kind="step", contestant=OURS):
        case = {key: row[key] for key in ("shape", "dtype", "method", "base", "micro_batches")}
        for other in results.select(kind="step", **case):
            if other["contestant"] not in (OURS, PASSES) and other["ms"] < row["ms"]:
                what = f"{row['shape']}, {METHOD_NAMES[row['method']]}, {row['base']}, m = {row['micro_batches']}"
                losses.append(f"{what}: {other['contestant']} takes {other['ms'] / row['ms']:.0%} of our time")
    for row in results.select(kind="step"):
        if row["contestant"] in (OURS, PASSES) and (row["extra_over_parameters"] or 0) > 0.1:
            what = f"{row['shape']}, {METHOD_NAMES[row['method']]}, {row['base']}, m = {row['micro_batches']}"
            losses.append(f"{what}: {row['contestant']} allocates {row['extra_over_parameters']:.2f} P in a step")
    for row in results.select(kind="kernel"):
        goal = kernel_goal(row, results.on_gpu)
        if goal and row["share_of_copy"] < goal:
            losses.append(
                f"{row['shape']}, kernel {row['contestant']}: {row['share_of_copy']:.0%} of copy_, goal {goal:.0%}"
            )
    if results.select(contestant=OURS):
        print("\nWhere we lose:" + ("".join(f"\n  {line}" for line in losses) or " nowhere in this run."))


def plot(results: Results, path: Path) -> None:
    """Bars per shape and method: how many times our time everybody takes, grouped by micro-batches, with ms on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = results.select(kind="step")
    panels = list(dict.fromkeys((r["method"], r["base"], r["dtype"]) for r in steps))
    shapes = list(dict.fromkeys(r["shape"] for r in steps))
    present = {r["contestant"] for r in steps}
    names = [n for n in (OURS, PASSES, *peers.PEERS) if n in present]
    colors = dict(zip(peers.PEERS, ("#b0563a", "#d98b5f", "#e8c39e", "#5b7db1", "#9c7fb5"), strict=False))
    colors |= {OURS: "#1b7f3b", PASSES: "#7cc494"}

    def color(name):
        return colors.get(name, "grey")

    figure, axes = plt.subplots(
        len(panels), len(shapes), figsize=(5.6 * len(shapes), 3.6 * len(panels) + 0.9), squeeze=False, sharex="col"
    )
    for i, (method, base, dtype) in enumerate(panels):
        for j, shape in enumerate(shapes):
            axis = axes[i][j]
            here = results.select(kind="step", method=method, base=base, dtype=dtype, shape=shape)
            counts = sorted({r["micro_batches"] for r in here})
            unit = {r["micro_batches"]: r["ms"] for r in here if r["contestant"] == OURS}
            width = 0.86 / len(names)
            for n, name in enumerate(names):
                for x, m in enumerate(counts):
                    for row in here:
                        if row["contestant"] == name and row["micro_batches"] == m:
                            ratio = row["ms"] / unit.get(m, 1)
                            # One that is far off must not flatten the others.
                            height = min(ratio, 12) if unit else ratio
                            at = x + (n - (len(names) - 1) / 2) * width
                            label = f" {number(row['ms'])}" + (" ↑" if height < ratio else "")
                            axis.bar(at, height, width * 0.94, color=color(name))
                            axis.text(at, height, label, rotation=90, ha="center", va="bottom", fontsize=7)
            axis.set_xticks(range(len(counts)), [f"{m} micro-batch{'es' if m > 1 else ''}" for m in counts])
            what = f"{shape}, {size(here[0]['numel'])} parameters · {METHOD_NAMES[method]} · {base} · {dtype}"
            axis.set_title(what, fontsize=10)
            axis.margins(y=0.22)
            axis.spines[["top", "right"]].set_visible(False)
            if unit:
                axis.axhline(1, color=colors[OURS], linewidth=0.8, linestyle="--")
            if j == 0:
                axis.set_ylabel("times our time" if unit else "ms")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color(n)) for n in names]
    figure.legend(handles, names, loc="lower center", ncol=len(names), frameon=False, fontsize=9)
    facts = results.facts
    figure.suptitle(
        "What a sharpness-aware step costs beyond its backward passes (on the bars: ms per step; lower is better)\n"
        f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# -- run ---------------------------------------------------------------------------------------------------------------


def bytes_per_pass(gradients: Gradients) -> int:
    return gradients.numel * gradients.weights[0].element_size()


def copy_call(gradients: Gradients) -> Callable[[], object]:
    source = torch.ones(gradients.numel, dtype=gradients.weights[0].dtype, device=gradients.weights[0].device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def add_timing(
    results: Results,
    gradients: Gradients,
    timing: Timing,
    *,
    passes: float,
    minus: float = 0.0,
    least: float = 0.0,
    **row,
) -> None:
    seconds = max(timing.median - minus, least)
    results.add(
        **row,
        ms=seconds * 1e3,
        iqr_ms=timing.iqr * 1e3,
        rounds=len(timing.seconds),
        passes=passes,
        gb_per_s=passes * bytes_per_pass(gradients) / seconds / 1e9 if passes else None,
    )


def run_kernels(results: Results, where: dict, gradients: Gradients, args: argparse.Namespace, say: Callable) -> None:
    cases = kernel_cases(gradients, args.backend)
    calls = {name: call for name, _, call in cases}
    if args.device.type != "cuda":
        calls["copy_"] = copy_call(gradients)
    clock = EventClock(args.device) if args.device.type == "cuda" else Clock(args.device)
    with no_collector(), torch.no_grad():
        timings = interleave(calls, args.effort, clock, between=gradients.refill, say=say)
    for name, passes, _ in cases:
        add_timing(results, gradients, timings[name], passes=passes, kind="kernel", contestant=name, **where)
    if "copy_" in timings:
        add_timing(results, gradients, timings["copy_"], passes=2, kind="copy", contestant="copy_", **where)


def turns(case: Case, names: Sequence[str], gradients: Gradients, device: torch.device) -> Iterator[list[str]]:
    """``names`` in groups that fit the memory of a GPU side by side."""
    names = [n for n in names if n not in peers.PEERS or peers.PEERS[n].micro_batches or case.micro_batches == 1]
    together = len(names)
    if device.type == "cuda":
        # Weights, saved weights, momentum, and what the hungriest allocates in a step; an EMA; a second state.
        copies = 8 + (case.method == "fsam") + (case.base == "adamw")
        torch.cuda.empty_cache()
        together = max(1, torch.cuda.mem_get_info(device)[0] // (copies * bytes_per_pass(gradients)))
    for begin in range(0, len(names), together):
        yield names[begin : begin + together]


def run_case(
    results: Results, case: Case, where: dict, gradients: Gradients, args: argparse.Namespace, say: Callable
) -> None:
    say("float64 reference")
    expected = reference_weights(case, gradients, check_steps(case, gradients))
    here = {**where, "method": case.method, "base": case.base, "micro_batches": case.micro_batches}
    bare = gradients.feed(gradients.parameters(), case.micro_batches)

    def assign():
        for _ in range(2 * case.micro_batches):
            bare()

    groups = 0
    for names in turns(case, args.contestants, gradients, args.device):
        groups += 1
        contestants = enter(case, names, gradients, expected, results.note, say)
        if not contestants:
            continue
        calls = {c.name: partial(c.run, gradients.feed(c.params, case.micro_batches)) for c in contestants}
        if not args.no_memory and case.micro_batches <= 4:
            for c in contestants:
                say(f"memory of {c.name}")
                c.extra = measure.extra_memory(calls[c.name], args.device) / bytes_per_pass(gradients)
        everybody = {**calls, "assign": assign}
        if args.device.type != "cuda":
            everybody["copy_"] = copy_call(gradients)
        clock = Clock(args.device)
        with no_collector():
            timings = interleave(everybody, args.effort, clock, between=gradients.refill, say=say)
            if args.device.type == "cuda":
                own = measure.host_seconds(assign, clock)
                for c in contestants:
                    say(f"launches and host time of {c.name}")
                    gradients.refill()
                    c.host_us = (measure.host_seconds(calls[c.name], clock) - own) * 1e6 / case.micro_batches
                    c.work = measure.device_work(calls[c.name], args.device)
        if groups == 1:
            if "copy_" in timings:
                add_timing(results, gradients, timings["copy_"], passes=2, kind="copy", contestant="copy_", **here)
            add_timing(results, gradients, timings["assign"], passes=0, kind="assign", contestant="assign", **here)
        for c in contestants:
            more = {}
            if args.device.type == "cuda":
                more["device_ms"] = c.work.seconds * 1e3 if c.work else None
                more["launches"] = c.work.launches / case.micro_batches if c.work else None
                more["host_us"] = c.host_us
            known = args.device.type != "cuda" or c.work is not None
            add_timing(
                results,
                gradients,
                timings[c.name],
                passes=step_passes(case, passes_loop=c.name == PASSES),
                minus=timings["assign"].median if known else 0.0,
                least=c.work.seconds if c.work else 0.0,
                kind="step",
                contestant=c.name,
                **here,
                deviation=c.deviation,
                extra_over_parameters=c.extra if c.extra >= 0 else None,
                first_step_s=c.first_step_s,
                **more,
            )
        del contestants, calls, everybody, c
        gc.collect()
    if groups > 1:
        results.note(f"{case.shape}, {str(case.dtype)[6:]}: contestants were measured in {groups} turns, for memory.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: what suits the device")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--methods", nargs="+", choices=METHOD_NAMES, default=list(METHOD_NAMES))
    parser.add_argument("--base", nargs="+", choices=list(LR), default=["sgd"])
    parser.add_argument(
        "--dtype", nargs="+", choices=[str(d)[6:] for d in TOLERANCE], help="default: float32; on a GPU bfloat16 too"
    )
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, help="default: all that suit the device")
    parser.add_argument("--peers-only", action="store_true", help="leave out msam_kernels")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the kernels on their own")
    parser.add_argument("--no-steps", action="store_true", help="leave out the whole steps")
    parser.add_argument("--no-memory", action="store_true", help="leave out the extra memory of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30, help="at most so many")
    parser.add_argument("--seconds", type=float, default=6.0, help="time per case; at least five rounds are taken")
    parser.add_argument("--limit", type=float, help="begin no case after so many seconds")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--backend", default="auto", help="of msam_kernels: auto, cuda, triton, cpu or reference")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="two shapes, 1 and 4 micro-batches, SAM, less time per case"
    )
    args = parser.parse_args(argv)
    if args.quick:
        given = set(sys.argv[1:] if argv is None else argv)
        quick = {"shapes": ["cnn", "resnet18"], "micro_batches": [1, 4], "methods": ["sam"], "seconds": 2.0}
        for name, value in quick.items():
            if "--" + name.replace("_", "-") not in given:
                setattr(args, name, value)
    args.shapes = args.shapes or list(CPU_SHAPES if args.device.type == "cpu" else GPU_SHAPES)
    args.dtype = args.dtype or (["float32"] if args.device.type == "cpu" else ["float32", "bfloat16"])
    args.peers = peers.peers_for(args.device) if args.peers is None else args.peers
    args.effort = Effort(args.seconds, (min(5, args.rounds), args.rounds))
    args.contestants = [*([] if args.peers_only else [OURS, PASSES]), *args.peers]
    return args


def sets_that_fit(numel: int, dtype: torch.dtype, device: torch.device) -> int:
    """Each set of gradients is held twice. Where all would take a quarter of a GPU's memory, two do."""
    if device.type != "cuda":
        return 4
    return 4 if 9 * numel * dtype.itemsize < torch.cuda.get_device_properties(device).total_memory / 4 else 2


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    results = Results({**facts(args), "contestants": " ".join(n for n in args.contestants if n != PASSES)})
    others, limit, unequal = Others(), TimeLimit(args.limit), []
    print_heading(results.facts)
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        copy = measure.copy_bandwidth(args.device) / 1e9
        print(f"copy_ of 2 GiB moves {number(copy)} GB/s, read and written")
        results.add(kind="copy", shape="copy", dtype="float32", contestant="copy_", passes=2, gb_per_s=copy)
    cases = [
        Case(shape, method, base, getattr(torch, dtype), m, args.backend)
        for shape in args.shapes
        for dtype in args.dtype
        for base in args.base
        for method in args.methods
        for m in args.micro_batches
    ]
    bar = measure.Progress(len(cases), "cases")
    for (shape, dtype), group in itertools.groupby(cases, key=lambda case: (case.shape, case.dtype)):
        if limit.over:
            results.note(f"{shape}, {str(dtype)[6:]}: left out, the time limit was reached.")
            continue
        shapes = SHAPES[shape]()
        sets = sets_that_fit(sum(map(math.prod, shapes)), dtype, args.device)
        if sets < 4:
            results.note(f"{shape}, {str(dtype)[6:]}: {sets} sets of gradients instead of 4, for memory.")
        gradients = Gradients(shapes, dtype, args.device, sets)
        where = {"shape": shape, "dtype": str(dtype)[6:], "numel": gradients.numel, "tensors": len(gradients.weights)}
        if not (args.no_kernels or args.peers_only):
            run_kernels(results, where, gradients, args, lambda text, s=shape: bar.say(f"{s}, kernels, {text}"))
        before = None
        for case in () if args.no_steps else group:
            what = f"{shape}, {METHOD_NAMES[case.method]}, {case.base}, {case.micro_batches} micro-batches"
            if limit.over:
                results.note(f"{what}: left out, the time limit was reached.")
                continue
            # Compiled functions serve all methods and micro-batch counts of one shape; those of others only cost guards.
            if before != case.base:
                torch.compiler.reset()
            before = case.base
            try:
                run_case(results, case, where, gradients, args, lambda text, w=what: bar.say(f"{w}: {text}"))
            except Unequal as error:
                bar.clear()
                print(f"\n{error}", flush=True)
                unequal.append(what)
            gc.collect()
            bar.update()
            if args.csv:  # whatever may come
                results.write(args.csv)
        del gradients
        bar.clear()
        print_shape(results, shape, where["dtype"])
        sys.stdout.flush()
    bar.clear()
    print_goals(results)
    measure.conclude(results, others, args.csv)
    if args.plot:
        plot(results, args.plot)
        print(f"picture: {args.plot}")
    if unequal:
        print("\nnot timed, since contestants do not compute the same: " + "; ".join(unequal))
    return int(bool(unequal))


if __name__ == "__main__":
    sys.exit(main())
