# SPDX-License-Identifier: Apache-2.0
"""Samples per second of whole training steps, forward and backward included: this package against plain PyTorch.

    python benchmarks/bench_train.py --device cuda --csv train.csv
    python benchmarks/bench_train.py                  # tiny models on the CPU, without CUDA graphs: minutes

An MLP, a small CNN, a network like ResNet-18 for small images, a small transformer and a vision transformer, trained with
SAM and mSAM on random data that is on the device already, in fp32 without TF32. Ours: ``train_step`` with the micro-batches
one after the other, in parallel and whichever way is faster, the same around a compiled model, and ``capture``, which replays
the step as one CUDA graph. Against it: the steps of ``peers.py``, with the model as it is and compiled; that of
``jax_vmap.py``, where JAX is installed; and the base optimizer's own step on the same batch, which is what sharpness is paid
on top of. ``--plot`` draws what a step costs over the number of micro-batches.

All begin with the same weights and take the same ``CHECKED`` steps first. A peer whose losses or whose weights after the
first step are not those of the loop over parameters, that fails, or that does not end in its time is left out, with a note;
where ours are not, the case is not timed. (Later weights do not agree, and later losses less: a ReLU that rounding turns on or
off moves a small network by percents.) Then they take turns in shuffled order; a time is the median over the rounds. Ours gets
``model=``, so that BatchNorm records in the first pass only; the peers record in both.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import measure
import peers
from contest import count_of, first_line
from measure import Call, Clock, Failed, Job, Results, Say, interleave, number, print_table, size

OURS, PARALLEL, AUTO, COMPILED = "ours", "ours, parallel", "ours, auto", ", compiled model"
CAPTURED, PARALLEL_CAPTURED = "ours, captured", "ours, parallel, captured"
BASE = "no SAM"  # the base optimizer's own step on the same batch
JAX = "jax"
PEERS = ("loop", "foreach", "compile", JAX)
EAGER_PEERS = ("loop", "foreach")
GOAL, GOAL_MODELS = 2.0, ("cnn", "transformer")  # captured / best of EAGER_PEERS, in samples per second
AUTO_GOAL = 1.1  # of the time of the sequential passes, at most
RHO = 0.5  # so large that steps without it would go elsewhere: by 0.1 to 1.3 of the way
CHECKED = 6  # steps; with the last of them a captured step has been replayed
TOLERANCE = (
    0.01,
    0.05,
    0.05,
)  # of a loss of the first two steps, of a later one, of the way of the weights in the first step

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
    """Attention, causal or not, and an MLP."""

    def __init__(self, d: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(-3, -2).flatten(-2))
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


class ViT(nn.Module):
    """A small vision transformer for images of 3x32x32 in 64 patches: 0.8M parameters at d = 128 and four layers."""

    def __init__(self, d: int = 128, layers: int = 4, heads: int = 4):
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, d, 4, 4), nn.Parameter(torch.randn(64, d) * 0.02)
        self.layers = nn.Sequential(*(Layer(d, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patches(x).flatten(2).mT + self.places)).mean(1))


def mlp(width: int = 512) -> nn.Sequential:
    layers = [nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


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
    "mlp": Task(mlp, images(1, 28, 28), 128),
    "vit": Task(ViT, images(3, 32, 32), 128),
}
CPU_TASKS = {
    "cnn": Task(SmallCNN, images(1, 28, 28), 32),
    "transformer": Task(lambda: Transformer(32, 2, 2, 100, 16), text(100, 16), 16),
    "resnet18": Task(lambda: ResNet(4), images(3, 32, 32), 32),
    "mlp": Task(lambda: mlp(128), images(1, 28, 28), 128),
    "vit": Task(lambda: ViT(32, 2, 2), images(3, 32, 32), 32),
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

    def __str__(self) -> str:
        return f"{self.model}, {self.base}, {count_of(self.micro_batches)}"


def torch_base(model: nn.Module, base: str, **options) -> torch.optim.Optimizer:
    if base == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, **options)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, **options)


def make_step(name: str, case: Case, model: nn.Module, batch: Sequence[Tensor]) -> Callable[..., Tensor]:
    """``step(x, y)`` takes one whole step with ``model`` and returns the mean loss at w."""
    kind = name.removesuffix(COMPILED)
    passes_compiled = kind != name and kind in (PARALLEL, PARALLEL_CAPTURED, AUTO)  # the optimizer does it
    loss_fn = loss_of(model if kind == name or passes_compiled else torch.compile(model, dynamic=False))
    count = case.micro_batches
    if kind == BASE:
        base = torch_base(model, case.base, foreach=True)

        def plain(x, y):
            base.zero_grad()
            loss = loss_fn(x, y)
            loss.backward()
            base.step()
            return loss

        return plain
    if kind == JAX:
        import jax_vmap

        return jax_vmap.Step(model, torch_base(model, case.base), count, RHO)
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
    if kind in (PARALLEL, PARALLEL_CAPTURED, AUTO):
        options |= {"parallel": "auto" if kind == AUTO else True, "compile": passes_compiled}
    opt = MicroBatchSAM(torch_base(model, case.base), rho=RHO, **options)
    if kind in (CAPTURED, PARALLEL_CAPTURED):
        return opt.capture(loss_fn, *batch, warm_up=2)
    return lambda x, y: opt.train_step(loss_fn, x, y)


@dataclass
class Contestant:
    step: Callable[..., Tensor]
    losses: list[float]
    weights: Tensor  # after the first step
    seconds: float  # of all steps so far


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def first_steps(name: str, case: Case, model: nn.Module, batches: list) -> Contestant:
    step = make_step(name, case, model, batches[0])
    start = time.perf_counter()
    losses = [step(*batches[0]).item()]
    getattr(step, "write_back", lambda: None)()
    weights = vector(model)
    losses += [step(*batches[i % len(batches)]).item() for i in range(1, CHECKED)]
    if name.startswith(AUTO):  # it tries both ways before it decides
        from msam_kernels.parallel import Auto

        for i in range(2 * Auto.TRIALS - CHECKED):
            step(*batches[i % len(batches)])
    return Contestant(step, losses, weights, time.perf_counter() - start)


def enter(
    case: Case, task: Task, batches: list, args: argparse.Namespace, results: Results, say: Say
) -> dict[str, Callable[..., Tensor]]:
    """The steps by contestant, after ``CHECKED`` of them gave the same losses and weights.

    Raises:
        Failed: ours did not.
    """
    torch.manual_seed(1)
    template = task.make().to(batches[0][0].device)
    entered: dict[str, Contestant] = {}
    # The first is what the others are compared with.
    names = [n for n in args.contestants if case.micro_batches > 1 or not n.startswith(PARALLEL)]
    for name in sorted(names, key=lambda name: name != "loop"):
        say(f"checking {name}")
        own = name in (OURS, CAPTURED, PARALLEL, PARALLEL_CAPTURED, AUTO)
        try:
            # A peer or a compiler that a machine cannot run is no reason not to measure the others.
            with measure.time_limit(math.inf if own else args.peer_seconds):
                entered[name] = first_steps(name, case, copy.deepcopy(template), batches)
        except Exception as error:
            if own:
                raise
            results.note(f"{case}: {name} is left out, {first_line(error)}")
    first, expected = next(iter(entered.items()))
    way = (expected.weights - vector(template)).norm()
    for name, contestant in list(entered.items()):
        if name.startswith(BASE):  # takes other steps
            continue
        pairs = zip(contestant.losses, expected.losses, strict=True)
        losses = [abs(a / b - 1) if math.isfinite(a) else math.inf for a, b in pairs]
        first_losses, later = max(losses[:2]), max(losses[2:])
        apart = ((contestant.weights - expected.weights).norm() / way).item()
        far = {"loss_error": first_losses, "later_loss_error": later, "way_error": apart}
        results.add(kind="check", **vars(case), contestant=name, seconds=contestant.seconds, **far)
        if all(error <= most for error, most in zip((first_losses, later, apart), TOLERANCE, strict=True)):
            continue
        how = f"losses {first_losses:.1e}, later {later:.1e}, weights {apart:.1e} from {first}, at most {TOLERANCE} are allowed"
        if name.startswith(OURS):
            raise Failed(f"{case}: {name} takes other steps, and nobody is timed: {how}.")
        results.note(f"{case}: {name} takes other steps, and is left out: {how}.")
        del entered[name]
    return {name: contestant.step for name, contestant in entered.items()}


# -- report ------------------------------------------------------------------------------------------------------------


def print_case(results: Results, case: Case, parameters: int, samples: int) -> None:
    rows = results.select(kind="train", **vars(case))
    if not rows:
        return
    best = max((r["samples_per_s"] for r in rows if r["contestant"] in EAGER_PEERS), default=None)
    alone = min((r["ms"] for r in rows if r["contestant"].startswith(BASE)), default=None)
    lines = []
    for row in sorted(rows, key=lambda row: row["ms"]):
        row["over_eager_peers"] = row["samples_per_s"] / best if best else None
        spread = f"± {number(row['iqr_ms'], 2)}"
        ratio = f"{row['over_eager_peers']:.2f}x" if best else ""
        row["base_steps"] = row["ms"] / alone if alone else None
        steps = f"{row['base_steps']:.2f}" if alone else ""
        lines.append((row["contestant"], f"{row['samples_per_s']:,.0f}", number(row["ms"]), spread, ratio, steps))
    what = f"{size(parameters)} parameters, {samples} samples in {count_of(case.micro_batches)}"
    print(f"\n== {case.model}, {what}, {case.base} ==\n")
    print_table(("", "samples/s", "ms / step", "iqr", "over eager peers", f"steps with {BASE}"), lines)
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
    lines = []
    for row in results.select(kind="train", contestant=AUTO):
        case = {name: row[name] for name in ("model", "base", "micro_batches")}
        for plain in results.select(kind="train", contestant=OURS, **case):
            row["over_sequential"] = ratio = row["ms"] / plain["ms"]
            verdict = "reached" if ratio <= AUTO_GOAL else "not reached"
            what = f"{row['model']}, {row['base']}, m = {row['micro_batches']}"
            lines.append((what, f"{ratio:.2f}", f"{AUTO_GOAL:g}", verdict))
    if lines:
        print("\n== goals: auto, time over that of the sequential passes, at most ==\n")
        print_table(("", "measured", "goal", ""), lines)


def plot(results: Results, path: Path) -> None:
    """What a step costs over the number of micro-batches, in steps of the base optimizer on the same batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in results.select(kind="train") if r.get("base_steps") and not r["contestant"].startswith(BASE)]
    models = list(dict.fromkeys(r["model"] for r in rows))
    size_of = {"figsize": (3.0 * max(len(models), 1), 3.6), "squeeze": False, "sharey": True}
    figure, axes = plt.subplots(1, max(len(models), 1), **size_of)
    ways = list(dict.fromkeys(r["contestant"] for r in rows))
    counts = sorted({r["micro_batches"] for r in rows})
    ticks = [1 << k for k in range(8) if 1 << k <= 1.5 * max((r["base_steps"] for r in rows), default=1)]
    for axis, model in zip(axes[0], models, strict=False):
        for k, way in enumerate(ways):
            here = [r for r in rows if (r["model"], r["contestant"]) == (model, way)]
            points = sorted((r["micro_batches"], r["base_steps"]) for r in here)
            if points:
                axis.plot(
                    *zip(*points, strict=True), "o-", color=f"C{k}", lw=3 if way.startswith(PARALLEL) else 1, ms=4
                )
        axis.set(title=model, xlabel="micro-batches", xscale="log", yscale="log", ylim=(1, 1.2 * ticks[-1]))
        axis.set_xticks(counts, labels=counts)
        axis.set_yticks(ticks, labels=ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"time of a step, in steps with {BASE}")
    handles = [plt.Line2D([], [], color=f"C{k}", marker="o", label=way) for k, way in enumerate(ways)]
    figure.legend(handles=handles, loc="lower center", ncols=len(ways), fontsize=9, frameon=False)
    facts = results.facts
    where = f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}"
    figure.suptitle(f"What a step of SAM and mSAM costs, the batch being the same\n{where}", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


# -- run ---------------------------------------------------------------------------------------------------------------


def run_case(results: Results, case: Case, task: Task, args: argparse.Namespace, say: Say) -> None:
    torch.manual_seed(0)
    batches = [task.data(task.samples, args.device) for _ in range(4)]
    steps = enter(case, task, batches, args, results, say)

    def call(step: Callable[..., Tensor]) -> Call:
        turn = itertools.cycle(batches)
        return Call(lambda: step(*next(turn)))

    timings = interleave({n: call(s) for n, s in steps.items()}, measure.effort(args), Clock(args.device), say=say)
    for name, timing in timings.items():
        rate = task.samples / timing.median
        results.add(kind="train", **vars(case), contestant=name, samples_per_s=rate, **timing.as_row())


def jobs(results: Results, args: argparse.Namespace) -> Generator[Job, None, None]:
    tasks = GPU_TASKS if args.device.type == "cuda" else CPU_TASKS
    for model in args.models:
        torch.compiler.reset()
        task = tasks[model]
        parameters = sum(p.numel() for p in task.make().parameters())
        for base, m in itertools.product(args.base, args.micro_batches):
            case = Case(model, base, m, args.backend)
            yield str(case), partial(run_case, results, case, task, args)
            print_case(results, case, parameters, task.samples)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__, seconds=4.0, rounds=30)
    parser.add_argument("--models", nargs="+", choices=GPU_TASKS, default=list(GPU_TASKS))
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--base", nargs="+", choices=("sgd", "adamw"), default=["sgd", "adamw"])
    parser.add_argument("--plot", type=Path, help="draw there what a step costs")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--no-compile", action="store_true", help="leave out whatever is compiled")
    args = parser.parse_args(argv)
    captured = [CAPTURED, PARALLEL_CAPTURED] if args.device.type == "cuda" else []
    names = [OURS, PARALLEL, AUTO, BASE, *captured, *args.peers]
    if args.no_compile:
        args.contestants = [n for n in names if n != "compile"]
    else:
        args.contestants = [*names, *(n + COMPILED for n in names if n != JAX)]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # Every contestant has a model of its own: as many forms of one function, none of which may fall back.
    torch._dynamo.config.recompile_limit = 64
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    results = measure.begin(args, "Training steps of SAM and mSAM", backend=args.backend)
    total = len(args.models) * len(args.base) * len(args.micro_batches)
    failed = measure.run(jobs(results, args), total, results, args)
    print_goals(results)
    if args.plot:
        plot(results, args.plot)
    return measure.conclude(results, args, failed)


if __name__ == "__main__":
    sys.exit(main())
