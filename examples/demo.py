# SPDX-License-Identifier: Apache-2.0
"""SGD, SAM, mSAM, F-SAM and mSAM + F-SAM on real data: how well they do, how flat they end, what a step costs.

    python -m msam_kernels demo            # a table, and a picture in demo.png
    python -m msam_kernels demo --quick    # seconds, to see that everything runs; its numbers mean nothing

Two tasks, with data that come in Python packages: MNIST-1D with an MLP, and scikit-learn's handwritten digits with a
small CNN with BatchNorm. Every contestant gets the same number of epochs and, seed by seed, the same initial weights
and batches.

How the settings were found: learning rate and weight decay are those that served SGD best; with them, rho is for each
contestant the best of 0.1, 0.2, 0.3, 0.4, 0.6 on MNIST-1D and of 0.01, 0.02, 0.05, 0.1 on the digits. All by the
accuracy on held-out parts of the training data, with other seeds: the test data had no say.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from msam_kernels import MicroBatchSAM, backends, flatness, methods

# Import name: name on PyPI.
PACKAGES = {"sklearn": "scikit-learn", "mnist1d": "mnist1d", "matplotlib": "matplotlib", "tqdm": "tqdm"}
# The Hessian is of the loss on that many of the training samples.
SHARPNESS_SAMPLES = 1000
WARM_UP_STEPS = 3
PEERS = Path(__file__).resolve().parent.parent / "benchmarks" / "peers.py"


# -- the tasks ---------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def mnist1d() -> tuple:
    """4000 + 1000 signals of 40 points: digits drawn as curves, moved, scaled and noisy. Generated here."""
    from mnist1d.data import get_dataset_args, make_dataset

    data = make_dataset(get_dataset_args())
    return data["x"], data["y"], data["x_test"], data["y_test"]


def digits() -> tuple:
    """1797 scans of 8 x 8 pixels, half of them for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x.reshape(-1, 1, 8, 8), y, test_size=0.5, stratify=y, random_state=0)
    return x, y, x_test, y_test


@cache
def load(source: Callable[[], tuple]) -> Data:
    """Tensors, standardised by the training part's mean and deviation."""
    x, y, x_test, y_test = source()
    mean, std = x.mean(), x.std()
    x, x_test = (torch.tensor((part - mean) / std, dtype=torch.float32) for part in (x, x_test))
    return Data(x, torch.tensor(y), x_test, torch.tensor(y_test))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    def block(channels_in: int, channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    return nn.Sequential(*block(1, 16), *block(16, 32), pool, *block(32, 64), pool, nn.Flatten(), nn.Linear(256, 10))


@dataclass(frozen=True)
class Task:
    title: str
    source: Callable[[], tuple]
    build: Callable[[], nn.Module]
    network: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float

    @property
    def steps(self) -> int:
        """Whole batches only: what is left over sits out one epoch."""
        return self.epochs * (len(load(self.source).x) // self.batch_size)


TASKS = (
    Task("MNIST-1D", mnist1d, mlp, "MLP", epochs=60, batch_size=128, lr=0.4, weight_decay=1e-3),
    Task("Handwritten digits", digits, cnn, "CNN with BatchNorm", epochs=20, batch_size=64, lr=0.1, weight_decay=1e-2),
)


# -- the contestants ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """``rho`` has one entry per task. ``method`` None is the base optimizer alone."""

    name: str
    method: methods.SAM | None = None
    num_micro_batches: int = 1
    rho: tuple[float, ...] = (0.0,) * len(TASKS)

    @property
    def label(self) -> str:
        return self.name if self.num_micro_batches == 1 else f"{self.name} ({self.num_micro_batches})"

    @property
    def passes(self) -> int:
        """Calls of forward and backward in one step."""
        return 1 if self.method is None else 2 * self.num_micro_batches

    def rho_for(self, task: Task) -> float:
        return self.rho[[t.title for t in TASKS].index(task.title)]

    def wrap(self, base: torch.optim.Optimizer, task: Task, model: nn.Module) -> torch.optim.Optimizer:
        if self.method is None:
            return base
        return MicroBatchSAM(
            base,
            rho=self.rho_for(task),
            num_micro_batches=self.num_micro_batches,
            method=self.method,
            model=model,
        )


CONTESTANTS = (
    Contestant("SGD"),
    Contestant("SAM", methods.SAM(), rho=(0.3, 0.01)),
    Contestant("mSAM", methods.SAM(), 2, rho=(0.4, 0.01)),
    Contestant("mSAM", methods.SAM(), 4, rho=(0.4, 0.01)),
    Contestant("mSAM", methods.SAM(), 16, rho=(0.2, 0.01)),
    Contestant("F-SAM", methods.FriendlySAM(), rho=(0.4, 0.02)),
    Contestant("mSAM + F-SAM", methods.FriendlySAM(), 4, rho=(0.2, 0.01)),
)


# -- training ----------------------------------------------------------------------------------------------------------


def make_base(model: nn.Module, task: Task) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9, weight_decay=task.weight_decay)


def batches(data: Data, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in a new order, without the batch that would be smaller."""
    order = torch.randperm(len(data.x))
    for rows in order[: len(order) // size * size].split(size):
        yield data.x[rows], data.y[rows]


def train(task: Task, contestant: Contestant, seed: int, done: Callable[[int], None]) -> nn.Module:
    """The loop that a user would write. ``done`` hears of the passes of every epoch."""
    data = load(task.source)
    # The same seed gives every contestant the same initial weights and the same batches.
    torch.manual_seed(seed)
    model = task.build()
    opt = contestant.wrap(make_base(model, task), task, model)
    schedule = CosineAnnealingLR(opt, T_max=task.steps)

    for _ in range(task.epochs):
        passes = 0
        for x, y in batches(data, task.batch_size):
            for xb, yb in [(x, y)] if contestant.method is None else opt.passes(x, y):
                F.cross_entropy(model(xb), yb).backward()
                passes += 1
            opt.step()
            opt.zero_grad()
            schedule.step()
        done(passes)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent."""
    model.eval()
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def sharpness(model: nn.Module, x: Tensor, y: Tensor, tolerance: float) -> float:
    """Largest eigenvalue of the Hessian of the mean loss on (x, y), in eval mode and without weight decay."""
    model.eval()
    values = flatness.hessian_eigenvalues(model, lambda x, y: F.cross_entropy(model(x), y), (x, y), tolerance=tolerance)
    return values.item()


# -- many runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How much of everything: the demo's, and with --quick just enough to see that it runs."""

    seeds: int = 3
    max_epochs: int = 1000
    tolerance: float = 1e-3  # of the Hessian's eigenvector; its eigenvalue is far more precise
    timed_steps: int = 60

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(replace(task, epochs=min(task.epochs, self.max_epochs)) for task in TASKS)


FULL, QUICK = Effort(), Effort(seeds=1, max_epochs=2, tolerance=0.1, timed_steps=5)


class Outcome(NamedTuple):
    accuracy: float
    sharpness: float


class Job(NamedTuple):
    """Plain numbers, which travel to another process whatever this file is called there."""

    task: int
    contestant: int
    seed: int
    quick: bool

    @property
    def work(self) -> int:
        """Passes."""
        effort = QUICK if self.quick else FULL
        return effort.tasks[self.task].steps * CONTESTANTS[self.contestant].passes


# Networks this small gain little from a second thread: a process of one thread per core is about twice as fast.
_counter: Any = None


def start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)


def count(work: int) -> None:
    with _counter.get_lock():
        _counter.value += work


def run_job(task_index: int, contestant_index: int, seed: int, quick: bool) -> Outcome:
    effort = QUICK if quick else FULL
    task = effort.tasks[task_index]
    model = train(task, CONTESTANTS[contestant_index], seed, count)
    data = load(task.source)
    return Outcome(
        accuracy(model, data.x_test, data.y_test),
        sharpness(model, data.x[:SHARPNESS_SAMPLES], data.y[:SHARPNESS_SAMPLES], effort.tolerance),
    )


def by_name(script: str) -> Any:
    """The module that new processes import: this process may know the file under another name."""
    if str(Path(script).parent) not in sys.path:
        sys.path.insert(0, str(Path(script).parent))
    return importlib.import_module(Path(script).stem)


def run_jobs(jobs: list, workers: int, script: str = __file__, unit: str = " passes") -> dict:
    """What ``run_job`` of the file ``script`` returns, by job. Jobs are tuples of its arguments, with their ``work``."""
    from tqdm import tqdm

    run, start = by_name(script).run_job, by_name(__file__).start_worker
    context = multiprocessing.get_context("spawn")
    counter = context.Value("Q", 0)
    pool = ProcessPoolExecutor(workers, context, start, (counter,))
    bar = tqdm(total=sum(job.work for job in jobs), desc="training", unit=unit, unit_scale=True, smoothing=0.05)
    try:
        # Longest first, so that no process is left with a long one at the end.
        order = sorted(jobs, key=lambda job: job.work, reverse=True)
        futures = {job: pool.submit(run, *job) for job in order}
        waiting = set(futures.values())
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
            bar.update(counter.value - bar.n)
            for future in done:
                future.result()
        return {job: future.result() for job, future in futures.items()}
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


# -- what a step costs -------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Milliseconds of a whole step, and of it what the optimizer takes: everything outside forward and backward."""

    step: float
    optimizer: float


class Timed:
    """A contestant whose steps are timed, with the forward and backward passes inside them timed apart.

    Both in the same step: as a difference of separate runs, so small a part would drown in the noise.
    """

    def __init__(self, task: Task, contestant: Contestant, peer: type | None = None):
        torch.manual_seed(0)
        self.contestant = contestant
        self.model = task.build()
        self.base = make_base(self.model, task)
        if contestant.method is None:
            self.step = self.step_base
        elif peer is None:
            self.opt = contestant.wrap(self.base, task, self.model)
            self.step = self.step_passes
        else:
            options = {name: value for name, value in vars(contestant.method).items() if name in ("sigma", "lmbda")}
            friendly = isinstance(contestant.method, methods.FriendlySAM)
            self.opt = peer(self.base, rho=contestant.rho_for(task), friendly=friendly, **options)
            self.step = self.step_closures
        self.forward_backward_seconds = 0.0
        self.costs: list[Cost] = []

    def forward_backward(self, x: Tensor, y: Tensor) -> Tensor:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        loss = loss.detach()
        self.forward_backward_seconds += time.perf_counter() - start
        return loss

    def step_base(self, x: Tensor, y: Tensor) -> None:
        self.forward_backward(x, y)
        self.base.step()
        self.base.zero_grad()

    def step_passes(self, x: Tensor, y: Tensor) -> None:
        for xb, yb in self.opt.passes(x, y):
            self.forward_backward(xb, yb)
        self.opt.step()
        self.opt.zero_grad()

    def step_closures(self, x: Tensor, y: Tensor) -> None:
        count = self.contestant.num_micro_batches
        parts = zip(x.chunk(count), y.chunk(count), strict=True)
        self.opt.step([partial(self.forward_backward, *part) for part in parts])

    def run(self, x: Tensor, y: Tensor) -> None:
        self.forward_backward_seconds = 0.0
        start = time.perf_counter()
        self.step(x, y)
        seconds = time.perf_counter() - start
        self.costs.append(Cost(1e3 * seconds, 1e3 * (seconds - self.forward_backward_seconds)))

    def median(self) -> Cost:
        return Cost(*map(statistics.median, zip(*self.costs, strict=True)))


def load_peer() -> type | None:
    """The methods as a loop over the parameters in plain PyTorch, which the benchmarks have."""
    if not PEERS.exists():
        return None
    if str(PEERS.parent) not in sys.path:
        sys.path.insert(0, str(PEERS.parent))
    return importlib.import_module(PEERS.stem).PEERS["loop"]


def time_steps(task: Task, contestant: Contestant, steps: int) -> dict[str, Cost]:
    """Steps on the task's own batches, "fused" and "plain" in turn. The base optimizer alone has only "plain"."""
    peer = load_peer()
    timed = {}
    if contestant.method is None or peer is not None:
        timed["plain"] = Timed(task, contestant, peer)
    if contestant.method is not None:
        timed["fused"] = Timed(task, contestant)
    data = load(task.source)
    endless = itertools.chain.from_iterable(batches(data, task.batch_size) for _ in itertools.count())
    for i, (x, y) in enumerate(itertools.islice(endless, WARM_UP_STEPS + steps)):
        if i == WARM_UP_STEPS:
            # Only what does the same is worth comparing. Later, rounding alone would drive the two apart.
            check_equal(timed)
            for contender in timed.values():
                contender.costs.clear()
        for contender in timed.values():
            contender.run(x, y)
    return {name: contender.median() for name, contender in timed.items()}


def check_equal(timed: dict[str, Timed]) -> None:
    weights = [nn.utils.parameters_to_vector(contender.model.parameters()) for contender in timed.values()]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-3, atol=1e-4)


def time_all(effort: Effort) -> dict[tuple[int, int], dict[str, Cost]]:
    """By task and contestant. One thread, as in training, and nothing else runs by now."""
    from tqdm import tqdm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs = list(itertools.product(enumerate(effort.tasks), enumerate(CONTESTANTS)))
        return {
            (t, c): time_steps(task, contestant, effort.timed_steps)
            for (t, task), (c, contestant) in tqdm(pairs, desc="timing", unit=" contestants")
        }
    finally:
        torch.set_num_threads(threads)


# -- what came out -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One contestant on one task; accuracy and sharpness with one entry per seed."""

    contestant: Contestant
    accuracy: list[float]
    sharpness: list[float]
    cost: dict[str, Cost]


def mean_std(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def describe(task: Task) -> str:
    parameters = sum(p.numel() for p in task.build().parameters())
    return f"{task.title}: {task.network}, {parameters:,} parameters"


def kernels_missing() -> str | None:
    """None where the compiled kernels run, else why they do not. Then what is timed is the reference, which is slow."""
    return backends.available_backends()["cpu"]


def our_name() -> str:
    return "reference" if kernels_missing() else "fused"


def aligned(cells: list[tuple[str, ...]]) -> tuple[list[str], list[int]]:
    """Lines of a table whose first column is text and whose others are numbers, and the widths of the columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [name.ljust(widths[0]), *(value.rjust(width) for value, width in zip(values, widths[1:], strict=True))]
        )
        for name, *values in cells
    ]
    return lines, widths


def head(task: Task, seeds: int) -> str:
    title = describe(task)
    return f"{title}; {task.epochs} epochs, batches of {task.batch_size}, {seeds} seed{'s' * (seeds > 1)}"


def table(task: Task, rows: list[Row], seeds: int) -> str:
    cells = [("", "rho", "test accuracy, %", "sharpness", "step, ms", f"{our_name()}, ms", "plain, ms")]
    for row in rows:
        own = row.cost.get("fused") or row.cost["plain"]
        rho = f"{row.contestant.rho_for(task):g}" if row.contestant.method else "–"
        shares = [f"{row.cost[kind].optimizer:.3f}" if kind in row.cost else "–" for kind in ("fused", "plain")]
        results = mean_std(row.accuracy, 2), mean_std(row.sharpness, 2)
        cells.append((row.contestant.label, rho, *results, f"{own.step:.2f}", *shares))
    lines, widths = aligned(cells)
    group = "of that, optimizer"
    return "\n".join(
        [
            head(task, seeds),
            group.center(widths[-1] + widths[-2] + 2).rjust(len(lines[0])).rstrip(),
            lines[0],
            "─" * len(lines[0]),
            *lines[1:],
        ]
    )


NOTES = f"""\
In parentheses: the number of micro-batches. Mean ± standard deviation over the seeds.
Sharpness: top eigenvalue of the Hessian of the training loss at the end, in eval mode, on {SHARPNESS_SAMPLES:,} samples
at most. Step: median milliseconds of a training step on one thread. Optimizer: the part of it that is neither forward
nor backward; plain is the same method as a PyTorch loop over the parameters (benchmarks/peers.py)."""


FUSED, PLAIN, MARK, GRID = "#1f6feb", "#8b949e", "#24292f", "#d8dee4"


def draw(tasks: tuple[Task, ...], rows: list[list[Row]], path: Path) -> None:
    """One line of panels per task: accuracy, sharpness, the optimizer's time; contestants from top to bottom."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    fig = Figure(figsize=(13.5, 8.6), layout="constrained", facecolor="white")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    *parts, foot = fig.subfigures(len(tasks) + 1, 1, height_ratios=[1] * len(tasks) + [0.09])
    for part, task, lines in zip(parts, tasks, rows, strict=True):
        part.suptitle(describe(task), fontsize=13, fontweight="bold", x=0.01, ha="left")
        panels = part.subplots(1, 3, sharey=True)
        heights = range(len(lines))
        for panel in panels:
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(axis="y", length=0)
            panel.tick_params(axis="both", labelsize=10)
            panel.grid(axis="x", color=GRID, linewidth=0.7)
            panel.set_axisbelow(True)
            for height in heights:
                panel.axhline(height, color=GRID, linewidth=0.7, zorder=0)
        panels[0].set_yticks(heights, [line.contestant.label for line in lines])
        panels[0].set_ylim(len(lines) - 0.4, -0.6)

        for panel, values in zip(panels, ([r.accuracy for r in lines], [r.sharpness for r in lines]), strict=False):
            for height, seeds in zip(heights, values, strict=True):
                spread = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
                style = {"fmt": "o", "color": FUSED, "markersize": 7, "capsize": 4, "zorder": 3}
                panel.errorbar(statistics.fmean(seeds), height, xerr=spread, **style)
                panel.plot(seeds, [height] * len(seeds), "o", color=MARK, markersize=2.5, zorder=4)
            panel.axvline(statistics.fmean(values[0]), color=MARK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        # Room for the ratio at the right.
        panels[2].margins(x=0.16)
        panels[0].set_xlabel("test accuracy, %")
        panels[0].xaxis.set_major_locator(MaxNLocator(6))
        panels[1].set_xlabel("sharpness: top Hessian eigenvalue")
        panels[2].set_xlabel("optimizer's part of a step, ms")

        cost = panels[2]
        for height, line in zip(heights, lines, strict=True):
            kinds = {kind: line.cost[kind].optimizer for kind in ("plain", "fused") if kind in line.cost}
            cost.plot(list(kinds.values()), [height] * len(kinds), color=GRID, linewidth=4, solid_capstyle="round")
            for kind, milliseconds in kinds.items():
                cost.plot(milliseconds, height, "o", color=FUSED if kind == "fused" else PLAIN, markersize=8, zorder=3)
            if len(kinds) == 2:
                ratio = f"{kinds['plain'] / kinds['fused']:.1f}×"
                cost.annotate(ratio, (max(kinds.values()), height), (9, 0), textcoords="offset points", va="center")
        for panel, ticks in zip(panels[1:], ((1, 2, 3, 5, 7), (1, 2, 5)), strict=True):
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=ticks))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())

    def dot(color: str, size: float, **options) -> Line2D:
        return Line2D([], [], marker="o", color=color, markersize=size, **{"linestyle": "none", **options})

    key = {
        "mean ± standard deviation": dot(FUSED, 7, linestyle="-"),
        "one seed": dot(MARK, 3),
        "SGD": Line2D([], [], color=MARK, linewidth=0.9, linestyle=(0, (4, 3))),
        f"optimizer, {our_name()}": dot(FUSED, 8),
        "optimizer, plain PyTorch": dot(PLAIN, 8),
        "(4): four micro-batches": Line2D([], [], linestyle="none"),
    }
    foot.legend(key.values(), key.keys(), loc="center", ncols=len(key), frameon=False, fontsize=10)
    fig.savefig(path, dpi=130)


# -- the command -------------------------------------------------------------------------------------------------------


def check_packages(target: str = "demo", packages: dict[str, str] = PACKAGES) -> None:
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(
            f"The demo needs {', '.join(missing)}: run `python -m pip install {' '.join(missing)}`, or `make {target}`, "
            "which does all of its own set-up."
        )


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m msam_kernels demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=min(available_cores(), 8), help="processes to train in")
    parser.add_argument("--quick", action="store_true", help="two epochs, one seed: only to see that it runs")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    check_packages()
    if kernels_missing():
        print(f"Without the fused kernels: {kernels_missing()}. What is timed is the plain torch reference.")

    begin = time.perf_counter()
    effort = QUICK if args.quick else FULL
    tasks = effort.tasks
    seeds = range(effort.seeds)
    jobs = [Job(t, c, s, args.quick) for t in range(len(tasks)) for c in range(len(CONTESTANTS)) for s in seeds]
    outcomes = run_jobs(jobs, args.workers)
    costs = time_all(effort)

    rows: list[list[Row]] = []
    for t in range(len(tasks)):
        rows.append([])
        for c, contestant in enumerate(CONTESTANTS):
            own = [outcomes[Job(t, c, s, args.quick)] for s in seeds]
            rows[t].append(Row(contestant, [o.accuracy for o in own], [o.sharpness for o in own], costs[t, c]))
    for task, lines in zip(tasks, rows, strict=True):
        print("\n" + table(task, lines, effort.seeds))
    print("\n" + NOTES)
    draw(tasks, rows, args.output)
    print(f"\nPicture: {args.output}   ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
