# SPDX-License-Identifier: Apache-2.0
"""What a sharpness-aware step costs beyond its backward passes: this package against plain PyTorch, side by side.

    python benchmarks/bench_step.py                  # small CNN, ResNet-18, 100M transformer; about ten minutes
    python benchmarks/bench_step.py --quick          # about a minute
    python benchmarks/bench_step.py --csv step.csv --plot step.png

No model runs. Where a training loop runs forward and backward, prepared random tensors are assigned to ``p.grad``,
other ones for each pass and micro-batch. All contestants need the same assignments, which are timed alone and
subtracted; all start and end a step with ``p.grad`` None, and clearing it is part of the step. Every contestant has its
own weights and state.

1. Equality first. Each contestant takes the same steps on L_i(w) = <M_i, w> + c_i/2 ||w - w_0||^2, whose gradient
   depends on where it is taken, with rho so large that M_i and c_i * e_i weigh the same. What it moved must be what
   plain torch in float64 moved: ||w - w64|| / ||w64 - w_0|| below ``TOLERANCE``. Otherwise nothing is timed.
2. Time. In every round each contestant takes a block of steps, in shuffled order; a contestant's time is the median
   over the rounds, its spread the interquartile range. Gradients are refilled between blocks: contestants may write
   into them.
3. GB/s is the traffic that the fused step needs, divided by the time, for everybody: P passes over N values of the
   storage size. SAM with one micro-batch and SGD has P = 10 (norm 1, perturb 4, restore + update 5); for the rest see
   ``step_passes``. It is compared with ``torch.Tensor.copy_`` of N values (one read and one write), the best of the
   medians taken along the way.
4. "extra" is the most memory that a step holds at a time beyond what it held before, in units of the parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import itertools
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Before torch loads: the memory check runs the profiler, which reports its own start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import peers

OURS, PASSES = "ours", "ours (passes loop)"
# What the goals are stated against; compile has a goal of its own, the rest is shown for completeness.
GOAL_PEERS = ("loop", "foreach", "pytorch_optimizer")
# ours / best of GOAL_PEERS, ours / compile, passes loop / best of GOAL_PEERS; SGD momentum, fp32, one micro-batch.
GOALS = {"cnn": (5.0, 4.0, 4.0), "resnet18": (1.9, 1.15, 1.6), "transformer100m": (2.2, 1.4, 1.8)}
# Each kernel alone, in shares of the bandwidth of copy_, by what its name contains.
KERNEL_GOALS = {"transformer100m": {"perturb": 1.4, "sgd": 1.4, "adamw": 1.4, "": 1.0}}

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

# -- shapes ------------------------------------------------------------------------------------------------------------


def cnn() -> list[tuple[int, ...]]:
    """Seven 3x3 convolutions with BatchNorm and two linear layers: 25 tensors, 59k parameters."""
    shapes, width = [], 1
    for out in (12, 12, 24, 24, 32, 32, 48):
        shapes += [(out, width, 3, 3), (out,), (out,)]
        width = out
    return [*shapes, (96, 4 * width), (96,), (10, 96), (10,)]


def resnet18() -> list[tuple[int, ...]]:
    """ResNet-18 for ImageNet: 62 tensors, 11.7M parameters."""
    shapes, width = [(64, 3, 7, 7), (64,), (64,)], 64
    for out in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if block == 0 and width != out:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (1000, 512), (1000,)]


def transformer100m(
    vocabulary: int = 20480, d: int = 768, layers: int = 12, context: int = 1024
) -> list[tuple[int, ...]]:
    """GPT-2 small with a vocabulary of 20480 and tied embeddings: 148 tensors, 101.6M parameters."""
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(vocabulary, d), (context, d), *(block * layers), (d,), (d,)]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "cnn": cnn,
    "resnet18": resnet18,
    "transformer100m": transformer100m,
}


@dataclass(frozen=True)
class Case:
    shape: str
    method: str
    base: str
    dtype: torch.dtype
    micro_batches: int


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
    opt = MicroBatchSAM(torch_base(params, case.base), rho=gradients.rho, num_micro_batches=count, method=method)
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
    return 3 if gradients.numel * case.micro_batches <= 2e8 else 1


class Unequal(SystemExit):
    pass


def enter(case: Case, names: Sequence[str], gradients: Gradients, notes: list[str], say: Callable) -> list[Contestant]:
    """Build the contestants and let each prove that it computes the same.

    Raises:
        Unequal: one does not; the message says which and by how much.
    """
    steps, contestants = check_steps(case, gradients), []
    say("float64 reference")
    expected = reference_weights(case, gradients, steps)
    for name in names:
        say(f"checking {name}")
        kind = peers.PEERS.get(name)
        if kind is not None and not kind.micro_batches and case.micro_batches > 1:
            continue
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
            note = f"{name}: not run, {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            if note not in notes:
                notes.append(note)
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
            "Nothing was timed: fix the contestant, or leave it out with --peers."
        )
    return contestants


# -- memory ------------------------------------------------------------------------------------------------------------


def extra_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``run`` holds at its peak beyond what was held before; -1 where torch does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    try:
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    except AttributeError:
        return -1
    return max(itertools.accumulate(changes), default=0)


# -- time --------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds per call of a block of calls. On a GPU the block ends when the device has finished it."""

    def __init__(self, device: torch.device):
        self.device = device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, call: Callable[[], object], count: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.synchronize()
        return (time.perf_counter() - start) / count


class EventClock(Clock):
    """For single kernels on a GPU: device time of each call, with what the previous one left in L2 flushed out."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object], count: int) -> float:
        events = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            call()
            end.record()
            events.append((start, end))
        self.synchronize()
        return statistics.mean(start.elapsed_time(end) for start, end in events) / 1e3


@dataclass
class Timing:
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        if len(self.seconds) < 3:
            return max(self.seconds) - min(self.seconds)
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``seconds`` for a case, within ``rounds``."""

    seconds: float
    rounds: tuple[int, int]
    block: float = 0.02


def interleave(
    calls: dict[str, Callable[[], object]],
    effort: Effort,
    clock: Clock,
    *,
    between: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Time all ``calls`` in rounds of shuffled order, in blocks of at least ``effort.block`` seconds."""
    counts, once = {}, {}
    for name, call in calls.items():
        between()
        once[name] = clock(call, 1)
        if once[name] < 10 * effort.block:
            # The first call may have had to set something up.
            once[name] = clock(call, 1)
        counts[name] = max(1, min(500, math.ceil(effort.block / once[name])))
    low, high = effort.rounds
    rounds = max(low, min(high, int(effort.seconds / sum(once[name] * counts[name] for name in calls))))
    # What takes long has been timed once already.
    timings = {name: Timing([once[name]] if once[name] >= 10 * effort.block else []) for name in calls}
    shuffle, order = random.Random(0), list(calls)
    for i in range(rounds):
        say(f"round {i + 1}/{rounds}")
        shuffle.shuffle(order)
        for name in order:
            if len(timings[name].seconds) >= rounds:
                continue
            between()
            if counts[name] > 1:
                # The blocks of others left the caches and the interpreter to them.
                calls[name]()
            timings[name].seconds.append(clock(calls[name], counts[name]))
    return timings


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """The cycle collector runs between blocks, not within one contestant's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# -- kernels -----------------------------------------------------------------------------------------------------------


def kernel_cases(gradients: Gradients) -> list[tuple[str, int, Callable[[], object]]]:
    """(name, P, call) of every kernel: the operators of ``msam_kernels.ops`` as ``MicroBatchSAM`` calls them."""
    from msam_kernels import ops
    from msam_kernels.flat import Flat

    params = gradients.parameters()
    k = ops.get_backend("auto", params[0].device)
    flat = Flat(params, [0] * len(params), flatten=True, backend=k)
    table, w = flat.chunks(), flat.weights
    acc, g = gradients.sets[0], gradients.sets[1]
    saved, ema, m, v = (flat.new_buffer() for _ in range(4))
    saved.copy_(w[0])
    step = torch.zeros(len(params) + 1, device=flat.device)

    def row(*values):
        return torch.tensor([values], dtype=torch.float64, device=flat.device)

    sgd = dict(hyper=row(gradients.rho, 1e-3, 0.9, 0, 5e-4, 0, 0), momentum_buffer=m)
    adam = dict(hyper=row(gradients.rho, 1e-4, 0.9, 0.999, 1e-8, 0.01, 0, 0, 1), exp_avg=m, exp_avg_sq=v, step=step)
    norm_sq = torch.full((1,), float(gradients.numel) * 1e-2, dtype=torch.float64, device=flat.device)
    outputs = dict(hyper=sgd["hyper"], achieved_sq=torch.empty(len(table), dtype=torch.float64, device=flat.device))
    ascent = dict(norm_sq=norm_sq, **outputs)
    friendly, moving = dict(ema=ema, sigma=SIGMA), dict(ema=ema, sigma=SIGMA, lmbda=LMBDA)
    back, mean = dict(saved=saved, norm_sq=norm_sq), dict(saved=saved, norm_sq=norm_sq, c_acc=0.5, c=0.5)
    return [
        ("inner_products", 1, lambda: k.inner_products(w, g, table)),
        ("inner_products friendly", 2, lambda: k.inner_products(w, g, table, **friendly)),
        ("inner_products adaptive", 2, lambda: k.inner_products(w, g, table, eta=0.01)),
        ("perturb first", 4, lambda: k.perturb(w, g, table, saved=saved, **ascent)),
        ("perturb later", 3, lambda: k.perturb(w, g, table, **ascent)),
        ("perturb first friendly", 6, lambda: k.perturb(w, g, table, saved=saved, **ascent, **moving)),
        ("perturb later friendly", 5, lambda: k.perturb(w, g, table, **ascent, **moving)),
        ("perturb first adaptive", 4, lambda: k.perturb(w, g, table, saved=saved, **ascent, eta=0.01)),
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
    ]


def kernel_goal(shape: str, name: str) -> float:
    goals = KERNEL_GOALS.get(shape, {})
    return next((goal for part, goal in goals.items() if part in name), 0.0) if goals else 0.0


# -- report ------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()


def commit() -> str:
    def git(*args):
        return subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class Others:
    """How much of the processors' time went to other processes since this was made; a busy machine measures nothing."""

    def __init__(self):
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            jiffies = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, irq, softirq, steal = (n / os.sysconf("SC_CLK_TCK") for n in jiffies)
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        return time.monotonic(), user + nice + system + irq + softirq + steal, mine

    def share(self) -> float:
        now = self._now()
        if self.start is None or now is None:
            return math.nan
        elapsed, busy, mine = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, busy - mine) / (elapsed * os.cpu_count())


def our_facts(args: argparse.Namespace) -> dict[str, str]:
    if args.peers_only:
        return {"msam_kernels": "left out", "backend": ""}
    import msam_kernels
    from msam_kernels import ops

    chosen = ops.get_backend("auto", args.device)
    for name in ops.BACKENDS:
        # One that is not there, or is not for this device, says so by raising.
        with contextlib.suppress(RuntimeError):
            if ops.get_backend(name, args.device) is chosen:
                break
    return {"msam_kernels": msam_kernels.__version__, "backend": name}


def facts(args: argparse.Namespace) -> dict[str, object]:
    return {
        "machine": machine(args.device),
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **our_facts(args),
        "pytorch_optimizer": installed("pytorch_optimizer"),
        "commit": commit(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def number(x: float | None, digits: int = 3) -> str:
    """Three significant digits, never scientific: 0.0312, 1.23, 45.6, 789."""
    if x is None or not math.isfinite(x):
        return "–"
    if x == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{min(decimals, 4)}f}"


def size(numel: int) -> str:
    return f"{numel / 1e6:.1f}M" if numel >= 1e6 else f"{numel / 1e3:.0f}k"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for first, *rest in (header, ["-" * n for n in widths], *rows):
        print("  " + "  ".join([first.ljust(widths[0]), *(c.rjust(n) for c, n in zip(rest, widths[1:], strict=True))]))


class Results:
    """Rows as they go to the CSV, one per measurement, and how they are read."""

    def __init__(self, facts: dict[str, object]):
        self.facts = facts
        self.rows: list[dict] = []
        self.notes: list[str] = []

    def add(self, **row) -> dict:
        self.rows.append(row)
        return row

    def select(self, **wanted) -> list[dict]:
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def finish_shape(self, shape: str, dtype: str) -> float:
        """Bandwidths and ratios, once the copy bandwidth of this shape is known; returns that."""
        rows = self.select(shape=shape, dtype=dtype)
        copy = max(row["gb_per_s"] for row in rows if row["kind"] == "copy")
        for row in rows:
            row["copy_gb_per_s"] = copy
            row["share_of_copy"] = row["gb_per_s"] / copy if row.get("gb_per_s") else None
        for row in self.select(shape=shape, dtype=dtype, kind="step"):
            case = {key: row[key] for key in ("shape", "dtype", "method", "base", "micro_batches")}
            others = {r["contestant"]: r["ms"] for r in self.select(kind="step", **case)}
            best = min((others[name] for name in GOAL_PEERS if name in others), default=None)
            row["best_peer_over_this"] = best / row["ms"] if best else None
            row["compile_over_this"] = others["compile"] / row["ms"] if "compile" in others else None
        return copy

    def write(self, path: Path) -> None:
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*keys, *self.facts])
            writer.writeheader()
            for row in self.rows:
                rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow({**rounded, **self.facts})


def print_heading(facts: dict[str, object]) -> None:
    print(f"Optimizer time of a sharpness-aware step, {facts['date'][:10]}, commit {facts['commit']}")
    print(f"{facts['machine']}; {facts['device']}, {facts['threads']} threads")
    print(", ".join(f"{key} {facts[key]}" for key in ("msam_kernels", "torch", "pytorch_optimizer", "python")))
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
            goal = kernel_goal(shape, row["contestant"])
            rows.append(
                (
                    row["contestant"],
                    str(row["passes"]),
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
        print(f"\n  {what}: ms per step, without {number(assign['ms'])} ms of assigning gradients")
        lines = []
        for row in sorted(rows, key=lambda row: row["ms"]):
            lines.append(
                (
                    row["contestant"],
                    number(row["ms"]),
                    f"± {number(row['iqr_ms'], 2)}",
                    number(row["gb_per_s"]),
                    f"{row['share_of_copy']:.0%}",
                    f"{row['ms'] / ours:.2f}x" if ours else "",
                    number(row["extra_over_parameters"], 2),
                    f"{row['deviation']:.0e}",
                )
            )
        if m > 1 and "pytorch_optimizer" in results.facts["contestants"]:
            lines.append(("pytorch_optimizer", *["n/a"] * 7))
        print_table(("", "ms", "iqr", "GB/s", "of copy_", "ms / ours", "extra / P", "error"), lines)


def print_goals(results: Results) -> None:
    """The project's goals, each with what was measured, and every place where somebody else is faster."""
    rows = []
    for row in results.select(kind="step", dtype="float32", base="sgd", micro_batches=1):
        if row["shape"] not in GOALS or row["contestant"] not in (OURS, PASSES) or results.facts["device"] != "cpu":
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
        goal = kernel_goal(row["shape"], row["contestant"])
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
    results: Results, gradients: Gradients, timing: Timing, *, passes: int, minus: float = 0.0, **row
) -> None:
    seconds = timing.median - minus
    results.add(
        **row,
        ms=seconds * 1e3,
        iqr_ms=timing.iqr * 1e3,
        rounds=len(timing.seconds),
        passes=passes,
        gb_per_s=passes * bytes_per_pass(gradients) / seconds / 1e9 if passes else None,
    )


def run_kernels(results: Results, where: dict, gradients: Gradients, args: argparse.Namespace, say: Callable) -> None:
    cases = kernel_cases(gradients)
    calls = {name: call for name, _, call in cases} | {"copy_": copy_call(gradients)}
    clock = EventClock(args.device) if args.device.type == "cuda" else Clock(args.device)
    with no_collector(), torch.no_grad():
        timings = interleave(calls, args.effort, clock, between=gradients.refill, say=say)
    for name, passes, _ in cases:
        add_timing(results, gradients, timings[name], passes=passes, kind="kernel", contestant=name, **where)
    add_timing(results, gradients, timings["copy_"], passes=2, kind="copy", contestant="copy_", **where)


def run_case(
    results: Results, case: Case, where: dict, gradients: Gradients, args: argparse.Namespace, say: Callable
) -> None:
    contestants = enter(case, args.contestants, gradients, results.notes, say)
    feeds = {c.name: gradients.feed(c.params, case.micro_batches) for c in contestants}
    calls = {c.name: (lambda c=c: c.run(feeds[c.name])) for c in contestants}
    if not args.no_memory and case.micro_batches <= 4:
        for c in contestants:
            say(f"memory of {c.name}")
            c.extra = extra_memory(calls[c.name], args.device) / bytes_per_pass(gradients)
    bare = gradients.feed(gradients.parameters(), case.micro_batches)

    def assign():
        for _ in range(2 * case.micro_batches):
            bare()

    with no_collector():
        everybody = {**calls, "assign": assign, "copy_": copy_call(gradients)}
        timings = interleave(everybody, args.effort, Clock(args.device), between=gradients.refill, say=say)
    here = {**where, "method": case.method, "base": case.base, "micro_batches": case.micro_batches}
    add_timing(results, gradients, timings["copy_"], passes=2, kind="copy", contestant="copy_", **here)
    add_timing(results, gradients, timings["assign"], passes=0, kind="assign", contestant="assign", **here)
    for c in contestants:
        add_timing(
            results,
            gradients,
            timings[c.name],
            passes=step_passes(case, passes_loop=c.name == PASSES),
            minus=timings["assign"].median,
            kind="step",
            contestant=c.name,
            **here,
            deviation=c.deviation,
            extra_over_parameters=c.extra if c.extra >= 0 else None,
            first_step_s=c.first_step_s,
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--methods", nargs="+", choices=METHOD_NAMES, default=list(METHOD_NAMES))
    parser.add_argument("--base", nargs="+", choices=list(LR), default=["sgd"])
    parser.add_argument("--dtype", nargs="+", choices=[str(d)[6:] for d in TOLERANCE], default=["float32"])
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=list(peers.PEERS))
    parser.add_argument("--peers-only", action="store_true", help="leave out msam_kernels")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the kernels on their own")
    parser.add_argument("--no-memory", action="store_true", help="leave out the extra memory of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30, help="at most so many")
    parser.add_argument("--seconds", type=float, default=6.0, help="time per case; at least five rounds are taken")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
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
    args.effort = Effort(args.seconds, (min(5, args.rounds), args.rounds))
    args.contestants = [*([] if args.peers_only else [OURS, PASSES]), *args.peers]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    results = Results({**facts(args), "contestants": " ".join(n for n in args.contestants if n != PASSES)})
    others = Others()
    print_heading(results.facts)
    cases = [
        Case(shape, method, base, getattr(torch, dtype), m)
        for shape in args.shapes
        for dtype in args.dtype
        for base in args.base
        for method in args.methods
        for m in args.micro_batches
    ]
    bar = tqdm(total=len(cases), desc="cases", disable=None, dynamic_ncols=True, leave=False)
    for (shape, dtype), group in itertools.groupby(cases, key=lambda case: (case.shape, case.dtype)):
        gradients = Gradients(SHAPES[shape](), dtype, args.device)
        where = {"shape": shape, "dtype": str(dtype)[6:], "numel": gradients.numel, "tensors": len(gradients.weights)}
        if not (args.no_kernels or args.peers_only):
            run_kernels(
                results, where, gradients, args, lambda text, s=shape: bar.set_postfix_str(f"{s}, kernels, {text}")
            )
        before = None
        for case in group:
            # Compiled functions serve all methods and micro-batch counts of one shape; those of others only cost guards.
            if before != case.base:
                torch.compiler.reset()
            before = case.base
            what = f"{shape}, {METHOD_NAMES[case.method]}, {case.base}, {case.micro_batches} micro-batches"
            run_case(results, case, where, gradients, args, lambda text, w=what: bar.set_postfix_str(f"{w}: {text}"))
            gc.collect()
            bar.update()
        del gradients
        bar.clear()
        print_shape(results, shape, where["dtype"])
        sys.stdout.flush()
    bar.close()
    print_goals(results)
    results.facts["others_cpu_share"] = round(others.share(), 3)
    if results.facts["others_cpu_share"] > 0.05:
        results.notes.append(
            f"Other processes took {results.facts['others_cpu_share']:.0%} of the processors meanwhile: threads that "
            "wait for each other then wait for those too. Do not quote these numbers; run again on an idle machine."
        )
    if results.notes:
        print("\n" + "\n".join(results.notes))
    if args.csv:
        results.write(args.csv)
        print(f"\nmeasurements: {args.csv}")
    if args.plot:
        plot(results, args.plot)
        print(f"picture: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
