# SPDX-License-Identifier: Apache-2.0
"""What demo.py and methods.py share: two small tasks, their training, many runs side by side, what a step costs, tables."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from msam_kernels import MicroBatchSAM, backends, flatness, methods

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from measure import Progress, table_lines

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

    def make_base(self, model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)

    def __str__(self) -> str:
        parameters = sum(p.numel() for p in self.build().parameters())
        return f"{self.title}: {self.network}, {parameters:,} parameters"


TASKS = (
    Task("MNIST-1D", mnist1d, mlp, "MLP", epochs=60, batch_size=128, lr=0.4, weight_decay=1e-3),
    Task("Handwritten digits", digits, cnn, "CNN with BatchNorm", epochs=20, batch_size=64, lr=0.1, weight_decay=1e-2),
)


@dataclass(frozen=True)
class Contestant:
    """``rho`` has one entry per task. ``method``: or what gives it for a model; None is the base optimizer alone."""

    name: str
    method: methods.SAM | Callable[[nn.Module], methods.SAM] | None = None
    num_micro_batches: int = 1
    rho: tuple[float, ...] = (0.0,) * len(TASKS)

    @property
    def label(self) -> str:
        return self.name if self.num_micro_batches == 1 else f"{self.name} ({self.num_micro_batches})"

    @property
    def passes(self) -> int:
        """Calls of forward and backward in one step of most methods."""
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
            method=self.method if isinstance(self.method, methods.SAM) else self.method(model),
            model=model,
        )


# -- training ----------------------------------------------------------------------------------------------------------


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
    opt = contestant.wrap(task.make_base(model), task, model)
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


class Effort(NamedTuple):
    """How much of everything."""

    seeds: int = 3
    max_epochs: int = 1000
    tolerance: float = 1e-3  # of the Hessian's eigenvector; its eigenvalue is far more precise
    samples: int = 1000  # of the training data, for the loss that the Hessian is of
    timed_steps: int = 60


QUICK = Effort(seeds=1, max_epochs=2, tolerance=0.1, samples=100, timed_steps=2)  # just enough to see that it runs


class Outcome(NamedTuple):
    accuracy: float
    sharpness: float
    passes: float  # per step and micro-batch


class Job(NamedTuple):
    """One training, in words and numbers that travel to another process: ``script`` names a module with ``contestants``."""

    script: str
    task: Task
    contestant: int
    seed: int
    effort: Effort
    work: int  # passes


# Networks this small gain little from a second thread: a process of one thread per core is about twice as fast.
_counter: Any = None


def start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)


def run_job(job: Job) -> Outcome:
    task = job.task
    contestant = importlib.import_module(job.script).contestants(task)[job.contestant]
    counted = []

    def done(passes: int) -> None:
        counted.append(passes)
        with _counter.get_lock():
            _counter.value += 1

    model = train(task, contestant, job.seed, done)
    data, count = load(task.source), job.effort.samples
    return Outcome(
        accuracy(model, data.x_test, data.y_test),
        sharpness(model, data.x[:count], data.y[:count], job.effort.tolerance),
        sum(counted) / (task.steps * contestant.num_micro_batches),
    )


def run_jobs(jobs: list[Job], workers: int) -> list[Outcome]:
    """What ``run_job`` returns, in processes side by side; the longest are begun first, so that none is left at the end."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("Q", 0)
    pool = ProcessPoolExecutor(workers, context, start_worker, (counter,))
    progress = Progress(sum(job.task.epochs for job in jobs), "epochs")
    # Ctrl-C reaches all processes of a terminal. Those that are begun now ignore it, and are ended by this one.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        futures = {job: pool.submit(run_job, job) for job in sorted(jobs, key=lambda job: -job.work)}
        signal.signal(signal.SIGINT, before)
        waiting = set(futures.values())
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
            progress.done = counter.value
            progress.say("training")
            for future in done:
                future.result()
        return [futures[job].result() for job in jobs]
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        pool.shutdown(cancel_futures=True)
        progress.clear()


# -- what a step costs -------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Milliseconds of a whole step, and of it what the optimizer takes: everything outside forward and backward."""

    step: float
    optimizer: float

    @classmethod
    def of(cls, statistic: Callable[[Sequence[float]], float], costs: Sequence[Cost]) -> Cost:
        return cls(*map(statistic, zip(*costs, strict=True)))


class Timed:
    """A contestant whose steps are timed, with the forward and backward passes inside them timed apart.

    Both in the same step: as a difference of separate runs, so small a part would drown in the noise. ``peer``: the class
    of a plain loop that takes the place of the package.
    """

    def __init__(self, task: Task, contestant: Contestant, peer: type | None = None):
        torch.manual_seed(0)
        self.contestant = contestant
        self.model = task.build()
        self.base = task.make_base(self.model)
        if contestant.method is None:
            self.step = self.step_base
        elif peer is None:
            self.opt = contestant.wrap(self.base, task, self.model)
            self.step = self.step_passes
        else:
            friendly = isinstance(contestant.method, methods.FriendlySAM)
            options = {name: getattr(contestant.method, name) for name in (("sigma", "lmbda") if friendly else ())}
            method = "F-SAM" if friendly else "SAM"
            self.opt = peer(self.base, rho=contestant.rho_for(task), method=method, **options)
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


def endless(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other."""
    data = load(task.source)
    return itertools.chain.from_iterable(batches(data, task.batch_size) for _ in itertools.count())


@contextmanager
def one_thread() -> Iterator[None]:
    """As in training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -- what came out -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One contestant on one task, an outcome per seed, and what a step costs, by kind."""

    contestant: Contestant
    outcomes: list[Outcome]
    cost: dict[str, Cost]

    @property
    def accuracy(self) -> list[float]:
        return [o.accuracy for o in self.outcomes]

    @property
    def sharpness(self) -> list[float]:
        return [o.sharpness for o in self.outcomes]

    def cells(self, task: Task) -> tuple[str, str, str, str]:
        rho = f"{self.contestant.rho_for(task):g}" if self.contestant.method else "–"
        return self.contestant.label, rho, mean_std(self.accuracy, 2), mean_std(self.sharpness, 2)


def mean_std(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def our_name() -> str:
    return "reference" if kernels_missing() else "fused"


def table(task: Task, rows: list[Row], header: Sequence[str], cells: Sequence[Sequence[str]], group: str = "") -> str:
    """``header`` and ``cells`` follow the columns that all tables have; ``group`` stands above the last two."""
    header = ("", "rho", "test accuracy, %", "sharpness", *header)
    (head, *body), widths = table_lines(
        header, [(*row.cells(task), *more) for row, more in zip(rows, cells, strict=True)]
    )
    seeds = len(rows[0].outcomes)
    title = f"{task}; {task.epochs} epochs, batches of {task.batch_size}, {seeds} seed{'s' * (seeds > 1)}"
    above = [group.center(widths[-1] + widths[-2] + 2).rjust(len(head)).rstrip()] if group else []
    return "\n".join([title, *above, head, "─" * len(head), *body])


FUSED, PLAIN, MARK, GRID = "#1f6feb", "#8b949e", "#24292f", "#d8dee4"


def message(tasks: Sequence[Task], rows: list[list[Row]]) -> str:
    """What a picture says, in a sentence: the best of the contestants beside the first one, where that is most."""

    def mean(row: Row) -> float:
        return statistics.fmean(row.accuracy)

    best = [max(lines[1:], key=mean) for lines in rows]
    gains = [mean(row) - mean(lines[0]) for row, lines in zip(best, rows, strict=True)]
    t = max(range(len(tasks)), key=gains.__getitem__)
    first, row = rows[t][0], best[t]
    where, name = tasks[t].title, first.contestant.label
    if gains[t] <= 0:
        return f"Nothing here is more accurate than {name}"
    flatter = statistics.fmean(first.sharpness) / statistics.fmean(row.sharpness)
    return (
        f"{row.contestant.label} is {gains[t]:.1f} points more accurate than {name} on {where}, in a minimum "
        f"{flatter:.1f} times as flat, with steps {own_cost(row).step / own_cost(first).step:.1f} times as long"
    )


def own_cost(row: Row) -> Cost:
    return row.cost.get("fused") or row.cost["plain"]


def picture(tasks: Sequence[Task], rows: list[list[Row]]) -> Any:
    """One line of panels per task: accuracy, sharpness, a step's time and the optimizer's; contestants from top to bottom."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    heights = [0.8 + 0.42 * len(lines) for lines in rows]
    fig = Figure(figsize=(16, 1.4 + sum(heights)), layout="constrained", facecolor="white")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    fig.suptitle(message(tasks, rows), fontsize=15, fontweight="bold")
    *parts, foot = fig.subfigures(len(tasks) + 1, 1, height_ratios=[*heights, 0.35])
    for part, task, lines in zip(parts, tasks, rows, strict=True):
        part.suptitle(str(task), fontsize=12, x=0.01, ha="left")
        panels = part.subplots(1, 4, sharey=True)
        for panel in panels:
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(axis="y", length=0)
            panel.grid(color=GRID, linewidth=0.7)
            panel.set_axisbelow(True)
        panels[0].set_yticks(range(len(lines)), [line.contestant.label for line in lines])
        panels[0].set_ylim(len(lines) - 0.4, -0.6)
        draw_results(panels[0], [line.accuracy for line in lines], "test accuracy, %   better →")
        panels[0].xaxis.set_major_locator(MaxNLocator(6))
        draw_results(panels[1], [line.sharpness for line in lines], "← better   sharpness: top Hessian eigenvalue")
        logarithmic(panels[1], (1, 2, 3, 5, 7))
        for panel, what, part_of in zip(
            panels[2:], ("a whole step", "of that, the optimizer"), Cost._fields, strict=True
        ):
            draw_costs(panel, [{kind: getattr(c, part_of) for kind, c in line.cost.items()} for line in lines])
            panel.set_xlabel(f"← better   {what}, ms")
            logarithmic(panel, (1, 2, 5))
    legend(foot)
    return fig


def draw(tasks: Sequence[Task], rows: list[list[Row]], path: Path) -> None:
    picture(tasks, rows).savefig(path, dpi=130)


def draw_results(panel: Any, values: list[list[float]], what: str) -> None:
    """A line per contestant: its seeds, their mean and deviation; the first one's mean also across all."""
    style = {"fmt": "o", "color": FUSED, "markersize": 7, "capsize": 4, "zorder": 3}
    for height, seeds in enumerate(values):
        spread = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
        panel.errorbar(statistics.fmean(seeds), height, xerr=spread, **style)
        panel.plot(seeds, [height] * len(seeds), "o", color=MARK, markersize=2.5, zorder=4)
    panel.axvline(statistics.fmean(values[0]), color=MARK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    panel.set_xlabel(what)


def draw_costs(panel: Any, costs: list[dict[str, float]]) -> None:
    panel.margins(x=0.16)  # Room for the ratio at the right.
    for height, cost in enumerate(costs):
        kinds = {kind: cost[kind] for kind in ("plain", "fused") if kind in cost}
        panel.plot(list(kinds.values()), [height] * len(kinds), color=GRID, linewidth=4, solid_capstyle="round")
        for kind, milliseconds in kinds.items():
            panel.plot(milliseconds, height, "o", color=FUSED if kind == "fused" else PLAIN, markersize=8, zorder=3)
        if len(kinds) == 2:
            ratio = f"{kinds['plain'] / kinds['fused']:.1f}×"
            panel.annotate(ratio, (max(kinds.values()), height), (9, 0), textcoords="offset points", va="center")


def logarithmic(panel: Any, ticks: Sequence[float]) -> None:
    """Along x, with these multiples of the powers of ten as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=ticks))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def legend(foot: Any) -> None:
    from matplotlib.lines import Line2D

    def dot(color: str, size: float, **options) -> Line2D:
        return Line2D([], [], marker="o", color=color, markersize=size, **{"linestyle": "none", **options})

    key = {
        "mean ± standard deviation": dot(FUSED, 7, linestyle="-"),
        "one seed": dot(MARK, 3),
        "SGD": Line2D([], [], color=MARK, linewidth=0.9, linestyle=(0, (4, 3))),
        our_name(): dot(FUSED, 8),
        "plain PyTorch": dot(PLAIN, 8),
        "(4): four micro-batches": Line2D([], [], linestyle="none"),
    }
    foot.legend(key.values(), key.keys(), loc="center", ncols=len(key), frameon=False, fontsize=10)


# -- the command -------------------------------------------------------------------------------------------------------


def kernels_missing() -> str | None:
    """None where the compiled kernels run, else why they do not. Then what is timed is the reference, which is slow."""
    return backends.available_backends()["cpu"]


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parser(doc: str, output: str, prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=doc.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(output), help="picture to write (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=min(available_cores(), 8), help="processes to train in")
    parser.add_argument("--quick", action="store_true", help="two epochs, one seed: only to see that it runs")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, target: str, packages: dict[str, str]) -> None:
    """Stop with one sentence where an option makes no sense or a package is missing; ``target`` is make's."""
    for name in ("workers", "epochs", "seeds"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(
            f"The demo needs {', '.join(missing)}: run `python -m pip install {' '.join(missing)}`, or `make {target}`, "
            "which does all of its own set-up."
        )
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if args.output.suffix[1:].lower() not in formats:
        parser.error(f"--output: {args.output} must end in one of {', '.join(f'.{name}' for name in sorted(formats))}")
    if not os.access(args.output if args.output.exists() else args.output.parent, os.W_OK):
        parser.error(f"--output: {args.output} cannot be written")
    if kernels_missing():
        print(f"Without the fused kernels: {kernels_missing()}. What is timed is the plain torch reference.")


def stops_in_one_line(main: Callable[[list[str] | None], None]) -> Callable[[list[str] | None], None]:
    """At Ctrl-C."""

    @wraps(main)
    def stopping(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except KeyboardInterrupt:
            print("\nstopped: nothing was written", file=sys.stderr)
            raise SystemExit(130) from None

    return stopping


def compare(
    script: str,
    tasks: Sequence[Task],
    contestants: Callable[[Task], Sequence[Contestant]],
    time_steps: Callable[[Task, int], dict[str, Cost]],
    effort: Effort,
    workers: int,
) -> list[list[Row]]:
    """Train every contestant with every seed on every task, then time its steps, when nothing else runs any more.

    ``script``: the name of the module that ``contestants`` is in; ``time_steps(task, i)`` is of the task's i-th contestant.
    """
    seeds = range(effort.seeds)
    jobs = [
        Job(script, task, c, seed, effort, task.steps * contestant.passes)
        for task in tasks
        for c, contestant in enumerate(contestants(task))
        for seed in seeds
    ]
    outcomes = iter(run_jobs(jobs, workers))
    pairs = [(t, c) for t in tasks for c in range(len(contestants(t)))]
    progress, costs = Progress(len(pairs), "contestants"), []
    with one_thread():
        for task, c in pairs:
            progress.say("timing")
            costs.append(time_steps(task, c))
            progress.update()
    progress.clear()
    of_contestant = iter(costs)
    return [[Row(c, [next(outcomes) for _ in seeds], next(of_contestant)) for c in contestants(t)] for t in tasks]
