# SPDX-License-Identifier: Apache-2.0
"""Samples per second of whole training steps, forward and backward included: this package against plain PyTorch.

    python benchmarks/bench_train.py --device cuda --csv train.csv
    python benchmarks/bench_train.py                  # tiny models on the CPU, without CUDA graphs: minutes

A small CNN, a network like ResNet-18 for small images and a small transformer, trained with SAM and mSAM on random data
that is on the device already, in fp32 without TF32. Ours: ``train_step``, the same around a compiled model, and
``capture``, which replays the step as one CUDA graph. Against it: the steps of ``peers.py``, with the model as it is and
compiled.

All begin with the same weights and take the same ``CHECKED`` steps first; unless the weights after the first and all
losses agree, the case is not timed. (Later weights do not: a ReLU that rounding turns on or off moves a small network by
percents.) Then they take turns in shuffled order; a time is the median over the rounds. Ours gets ``model=``, so that
BatchNorm records in the first pass only; the peers record in both.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import measure
import peers
from measure import Clock, Effort, Others, Results, TimeLimit, interleave, no_collector, number, print_table, size

OURS, CAPTURED, COMPILED = "ours", "ours, captured", ", compiled model"
PEERS = ("loop", "foreach", "compile")
EAGER_PEERS = ("loop", "foreach")
GOAL, GOAL_MODELS = 2.0, ("cnn", "transformer")  # captured / best of EAGER_PEERS, in samples per second
RHO = 0.5  # so large that steps without it would go elsewhere: by 0.1 to 1.3 of the way
CHECKED = 6  # steps; with the last of them a captured step has been replayed
TOLERANCE = 0.01, 0.05  # of a loss, of the way that the weights went in the first step

# -- models ------------------------------------------------------------------------------------------------------------


def convolution(width: int, out: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class SmallCNN(nn.Sequential):
    """Seven convolutions with BatchNorm and two linear layers, 59k parameters; images of 1x28x28."""

    def __init__(self):
        layers, width = [], 1
        for i, out in enumerate((12, 12, 24, 24, 32, 32, 48)):
            layers += [convolution(width, out, 2 if i in (1, 3, 5) else 1), nn.ReLU()]
            width = out
        head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 96), nn.ReLU(), nn.Linear(96, 10)]
        super().__init__(*layers, *head)


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.first, self.second = convolution(width, out, stride), convolution(out, out)
        self.around = convolution(width, out, stride, kernel=1) if stride > 1 or width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.around(x))


class ResNet(nn.Sequential):
    """ResNet-18 for images of 3x32x32: 11.2M parameters at width 64."""

    def __init__(self, width: int = 64):
        layers, channels = [convolution(3, width), nn.ReLU()], width
        for i in range(4):
            out = width << i
            layers += [Block(channels, out, 1 if i == 0 else 2), Block(out, out, 1)]
            channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Layer(nn.Module):
    """Causal attention and an MLP."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A small GPT: 3.8M parameters at d = 256, four layers and 1,000 words."""

    def __init__(self, d: int = 256, layers: int = 4, heads: int = 4, words: int = 1000, length: int = 64):
        super().__init__()
        self.words, self.places = nn.Embedding(words, d), nn.Parameter(torch.randn(length, d) * 0.02)
        self.layers = nn.Sequential(*(Layer(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.words(x) + self.places))).flatten(0, 1)


@dataclass(frozen=True)
class Task:
    """``make`` a model; ``data(samples, device)`` is one random batch."""

    make: Callable[[], nn.Module]
    data: Callable[[int, torch.device], tuple[Tensor, Tensor]]
    samples: int


def images(*shape: int) -> Callable[[int, torch.device], tuple[Tensor, Tensor]]:
    return lambda n, device: (torch.randn(n, *shape, device=device), torch.randint(10, (n,), device=device))


def text(words: int, length: int) -> Callable[[int, torch.device], tuple[Tensor, Tensor]]:
    return lambda n, device: tuple(torch.randint(words, (n, length), device=device) for _ in range(2))


GPU_TASKS = {
    "cnn": Task(SmallCNN, images(1, 28, 28), 128),
    "transformer": Task(Transformer, text(1000, 64), 32),
    "resnet18": Task(ResNet, images(3, 32, 32), 128),
}
CPU_TASKS = {
    "cnn": Task(SmallCNN, images(1, 28, 28), 16),
    "transformer": Task(lambda: Transformer(32, 2, 2, 100, 16), text(100, 16), 8),
    "resnet18": Task(lambda: ResNet(4), images(3, 32, 32), 8),
}


def loss_of(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y.flatten())


# -- contestants -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    model: str
    base: str
    micro_batches: int
    backend: str = "auto"


def torch_base(model: nn.Module, base: str, **options) -> torch.optim.Optimizer:
    if base == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, **options)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, **options)


def make_step(name: str, case: Case, model: nn.Module, batch: Sequence[Tensor]) -> Callable[..., Tensor]:
    """``step(x, y)`` takes one whole step with ``model`` and returns the mean loss at w."""
    kind = name.removesuffix(COMPILED)
    loss_fn = loss_of(model if kind == name else torch.compile(model, dynamic=False))
    count = case.micro_batches
    if kind in peers.PEERS:
        cls = peers.PEERS[kind]
        peer = cls(torch_base(model, case.base, **cls.base_options), rho=RHO)

        def closure(x, y):
            loss = loss_fn(x, y)
            loss.backward()
            return loss

        def step(x, y):
            parts = zip(x.chunk(count), y.chunk(count), strict=True)
            return peer.step([lambda part=part: closure(*part) for part in parts])

        return step
    from msam_kernels import MicroBatchSAM

    options = {"num_micro_batches": count, "model": model, "backend": case.backend}
    opt = MicroBatchSAM(torch_base(model, case.base), rho=RHO, **options)
    if kind == CAPTURED:
        return opt.capture(loss_fn, *batch, warm_up=2)
    return lambda x, y: opt.train_step(loss_fn, x, y)


class Unequal(Exception):
    pass


def enter(
    case: Case, names: Sequence[str], task: Task, batches: list, results: Results, say: Callable
) -> dict[str, Callable[..., Tensor]]:
    """The steps by contestant, after ``CHECKED`` of them gave the same losses and weights.

    Raises:
        Unequal: they did not.
    """
    torch.manual_seed(1)
    template = task.make().to(batches[0][0].device)
    steps, losses, weights = {}, {}, {}
    for name in names:
        say(f"checking {name}")
        model = copy.deepcopy(template)
        try:
            step = make_step(name, case, model, batches[0])
            start = time.perf_counter()
            losses[name] = [step(*batches[0]).item()]
            weights[name] = nn.utils.parameters_to_vector(model.parameters()).detach()
            losses[name] += [step(*batches[i % len(batches)]).item() for i in range(1, CHECKED)]
        except Exception as error:
            # A peer or a compiler that a machine cannot run is no reason not to measure the others.
            if name in (OURS, CAPTURED):
                raise
            losses.pop(name, None)
            results.note(f"{name}: not run, {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        steps[name] = step
        results.add(kind="check", **vars(case), contestant=name, seconds=time.perf_counter() - start)
    first = "loop" if "loop" in steps else OURS
    way = (weights[first] - nn.utils.parameters_to_vector(template.parameters()).detach()).norm()
    lines, fine = [], True
    for name, own in losses.items():
        loss = max(abs(a / b - 1) if math.isfinite(a) else math.inf for a, b in zip(own, losses[first], strict=True))
        apart = ((weights[name] - weights[first]).norm() / way).item()
        lines.append(f"  {name:<30} losses {loss:.1e}, weights {apart:.1e} from {first}")
        fine = fine and loss <= TOLERANCE[0] and apart <= TOLERANCE[1]
        results.select(kind="check", **vars(case), contestant=name)[0].update(loss_error=loss, way_error=apart)
    if not fine:
        raise Unequal(f"Not all take the same steps ({case}); at most {TOLERANCE}:\n" + "\n".join(lines))
    return steps


# -- report ------------------------------------------------------------------------------------------------------------


def print_case(results: Results, case: Case, parameters: int, samples: int) -> None:
    rows = results.select(kind="train", **vars(case))
    best = max((r["samples_per_s"] for r in rows if r["contestant"] in EAGER_PEERS), default=None)
    lines = []
    for row in sorted(rows, key=lambda row: row["ms"]):
        row["over_eager_peers"] = row["samples_per_s"] / best if best else None
        spread = f"± {number(row['iqr_ms'], 2)}"
        ratio = f"{row['over_eager_peers']:.2f}x" if best else ""
        lines.append((row["contestant"], f"{row['samples_per_s']:,.0f}", number(row["ms"]), spread, ratio))
    micro_batches = "1 micro-batch" if case.micro_batches == 1 else f"{case.micro_batches} micro-batches"
    print(f"\n== {case.model}, {size(parameters)} parameters, {samples} samples in {micro_batches}, {case.base} ==\n")
    print_table(("", "samples/s", "ms / step", "iqr", "over eager peers"), lines)
    sys.stdout.flush()


def print_goals(results: Results) -> None:
    rows = [row for row in results.select(kind="train", contestant=CAPTURED) if row["over_eager_peers"] is not None]
    lines = []
    for row in rows:
        ratio, goal = row["over_eager_peers"], GOAL if row["model"] in GOAL_MODELS else None
        verdict = "" if goal is None else "reached" if ratio >= goal else "not reached"
        what = f"{row['model']}, {row['base']}, m = {row['micro_batches']}"
        lines.append((what, f"{ratio:.2f}x", f"{goal:g}x" if goal else "", verdict))
    if lines:
        print(f"\n== goals: captured, samples per second over the best of {', '.join(EAGER_PEERS)} ==\n")
        print_table(("", "measured", "goal", ""), lines)


# -- run ---------------------------------------------------------------------------------------------------------------


def run_case(results: Results, case: Case, task: Task, args: argparse.Namespace, say: Callable) -> None:
    torch.manual_seed(0)
    batches = [task.data(task.samples, args.device) for _ in range(4)]
    steps = enter(case, args.contestants, task, batches, results, say)

    def call(step):
        turn = itertools.cycle(batches)
        return lambda: step(*next(turn))

    with no_collector():
        timings = interleave({n: call(s) for n, s in steps.items()}, args.effort, Clock(args.device), say=say)
    for name, timing in timings.items():
        rate = task.samples / timing.median
        spread = {"iqr_ms": timing.iqr * 1e3, "rounds": len(timing.seconds)}
        results.add(kind="train", **vars(case), contestant=name, samples_per_s=rate, ms=timing.median * 1e3, **spread)
    print_case(results, case, sum(p.numel() for p in task.make().parameters()), task.samples)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=GPU_TASKS, default=list(GPU_TASKS))
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--base", nargs="+", choices=("sgd", "adamw"), default=["sgd", "adamw"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--no-compile", action="store_true", help="leave out whatever is compiled")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--backend", default="auto", help="of msam_kernels: auto, cuda, triton, cpu or reference")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="time per case; at least five rounds are taken")
    parser.add_argument("--rounds", type=int, default=30, help="at most so many")
    parser.add_argument("--limit", type=float, help="begin no case after so many seconds")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    args.effort = Effort(args.seconds, (min(5, args.rounds), args.rounds))
    captured = [CAPTURED] if args.device.type == "cuda" else []
    names = [OURS, *captured, *args.peers]
    if args.no_compile:
        args.contestants = [n for n in names if n != "compile"]
    else:
        args.contestants = [*names, *(n + COMPILED for n in names)]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    # Every contestant has a model of its own: as many forms of one function, none of which may fall back.
    torch._dynamo.config.recompile_limit = 64
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    facts = {**measure.where(args.device), "backend": args.backend, "commit": measure.commit(), "date": measure.now()}
    results, others, limit = Results(facts), Others(), TimeLimit(args.limit)
    print(f"Training steps of SAM and mSAM, {facts['date'][:10]}, commit {facts['commit']}")
    print(", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("commit", "date")))
    tasks = GPU_TASKS if args.device.type == "cuda" else CPU_TASKS
    cases = [
        Case(model, base, m, args.backend) for model in args.models for base in args.base for m in args.micro_batches
    ]
    bar = measure.Progress(len(cases), "cases")
    before, unequal = None, []
    for case in cases:
        what = f"{case.model}, {case.base}, {case.micro_batches} micro-batches"
        if limit.over:
            results.note(f"{what}: left out, the time limit was reached.")
            continue
        if case.model != before:
            torch.compiler.reset()
        before = case.model
        bar.clear()
        try:
            run_case(results, case, tasks[case.model], args, lambda text, w=what: bar.say(f"{w}: {text}"))
        except Unequal as error:
            print(f"\n{error}", flush=True)
            unequal.append(what)
        gc.collect()
        bar.update()
        if args.csv:  # whatever may come
            results.write(args.csv)
    bar.clear()
    print_goals(results)
    measure.conclude(results, others, args.csv)
    if unequal:
        print("\nnot timed, since contestants do not take the same steps: " + "; ".join(unequal))
    return int(bool(unequal))


if __name__ == "__main__":
    sys.exit(main())
