# SPDX-License-Identifier: Apache-2.0
"""Every method of the family on the demo's MNIST-1D: how well it does, how flat it ends, what it costs.

    make family                             # a table, and a picture in family.png
    make family ARGS=--quick                # seconds, to see that everything runs; its numbers mean nothing

Every method gets the same number of epochs, not of passes, and, seed by seed, the same initial weights and batches.

How the settings were found: learning rate, weight decay and the rho of SAM, mSAM and F-SAM are those of demo.py. For the
others rho was chosen by a small pilot: the best of 0.1, 0.2, 0.3, 0.4 and 0.6 (ASAM: of 0.2, 0.3, 0.5, 1, 2, 3 and 4) by the
mean accuracy of two other seeds on 1,000 of the training samples, held out of the training. With its default alpha of 0.7
LookSAM did not get beyond 44 % there: its alpha and rho are the best pair of 0.1 and 0.3 with 0.1 and 0.4. rho_min of
Bilateral SAM falls to 0 as a cosine, and late-phase SAM begins where START says; all else is the default, and the test data
had no say.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import demo
from demo import Contestant, Cost, Task
from msam_kernels import methods

PACKAGES = {name: demo.PACKAGES[name] for name in ("mnist1d", "matplotlib", "tqdm")}
TASK = demo.TASKS[0]
START = 0.85  # of the training, before late-phase SAM sets in
ROUNDS = 3
WARM_UP_STEPS, TIMED_STEPS = 3, 100


def family(steps: int) -> tuple[Contestant, ...]:
    """The methods for a training of so many steps, whose schedules some follow. What is not given is the default."""

    def rho_min(step: int) -> float:
        return 0.05 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2  # as the learning rate

    dynamic = methods.SparseSAM(mask="dynamic", total_steps=steps)
    composition = methods.FriendlySAM() + methods.SparseSAM() + methods.StableSAM()
    return (
        Contestant("SGD"),
        Contestant("SAM", methods.SAM(), rho=(0.3,)),
        Contestant("mSAM", methods.SAM(), 4, rho=(0.4,)),
        Contestant("ASAM", methods.AdaptiveSAM(), rho=(0.5,)),
        Contestant("F-SAM", methods.FriendlySAM(), rho=(0.4,)),
        Contestant("Stable SAM", methods.StableSAM(), rho=(0.6,)),
        Contestant("Sparse SAM, Fisher", methods.SparseSAM(), rho=(0.4,)),
        Contestant("Sparse SAM, dynamic", dynamic, rho=(0.6,)),
        Contestant("LookSAM", methods.LookSAM(alpha=0.1), rho=(0.4,)),
        Contestant("Bilateral SAM", methods.BilateralSAM(rho_min), rho=(0.3,)),
        Contestant("GSAM", methods.GapSAM(), rho=(0.3,)),
        Contestant("late-phase SAM", methods.SAM(start=round(START * steps)), rho=(0.6,)),
        Contestant("F-SAM + Sparse + Stable", composition, rho=(0.6,)),
    )


def of_length(epochs: int) -> Task:
    return replace(TASK, epochs=epochs)


# -- many runs ---------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    accuracy: float
    sharpness: float
    passes: float  # per micro-batch


class Job(NamedTuple):
    """Plain numbers, which travel to another process."""

    contestant: int
    seed: int
    epochs: int
    tolerance: float

    @property
    def work(self) -> int:
        """Steps."""
        return of_length(self.epochs).steps


def run_job(index: int, seed: int, epochs: int, tolerance: float) -> Outcome:
    task = of_length(epochs)
    contestant = family(task.steps)[index]
    counted = []

    def done(passes: int) -> None:
        counted.append(passes)
        demo.count(task.steps // epochs)

    model = demo.train(task, contestant, seed, done)
    data, count = demo.load(task.source), demo.SHARPNESS_SAMPLES
    return Outcome(
        demo.accuracy(model, data.x_test, data.y_test),
        demo.sharpness(model, data.x[:count], data.y[:count], tolerance),
        sum(counted) / (task.steps * contestant.num_micro_batches),
    )


def time_steps(index: int, steps: int) -> Cost:
    """Means over a training of so many steps, since not all of a method's steps cost the same; the median of some."""
    data = demo.load(TASK.source)
    endless = itertools.chain.from_iterable(demo.batches(data, TASK.batch_size) for _ in itertools.count())
    rounds = []
    for _ in range(ROUNDS):
        timed = demo.Timed(TASK, family(WARM_UP_STEPS + steps)[index])
        for x, y in itertools.islice(endless, WARM_UP_STEPS + steps):
            timed.run(x, y)
        rounds.append(Cost(*map(statistics.fmean, zip(*timed.costs[WARM_UP_STEPS:], strict=True))))
    return Cost(*map(statistics.median, zip(*rounds, strict=True)))


def time_all(steps: int) -> list[Cost]:
    """One thread, as in training, and nothing else runs by now."""
    from tqdm import tqdm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        indices = range(len(family(steps)))
        return [time_steps(index, steps) for index in tqdm(indices, desc="timing", unit=" methods")]
    finally:
        torch.set_num_threads(threads)


# -- what came out -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One method; lists have one entry per seed."""

    contestant: Contestant
    accuracy: list[float]
    sharpness: list[float]
    passes: list[float]
    cost: Cost


def table(task: Task, rows: list[Row], seeds: int) -> str:
    cells = [("", "rho", "test accuracy, %", "sharpness", "passes", "step, ms", "optimizer, ms")]
    for row in rows:
        rho = f"{row.contestant.rho_for(task):g}" if row.contestant.method else "–"
        results = demo.mean_std(row.accuracy, 2), demo.mean_std(row.sharpness, 2), demo.mean_std(row.passes[:1], 2)
        costs = f"{row.cost.step:.2f}", f"{row.cost.optimizer:.3f}"
        cells.append((row.contestant.label, rho, *results, *costs))
    lines, _ = demo.aligned(cells)
    return "\n".join([demo.head(task, seeds), lines[0], "─" * len(lines[0]), *lines[1:]])


NOTES = f"""\
In parentheses: the number of micro-batches. Mean ± standard deviation over the seeds.
Sharpness: top eigenvalue of the Hessian of the training loss at the end, in eval mode, on {demo.SHARPNESS_SAMPLES:,} samples.
Passes: forward and backward passes per micro-batch and step, counted. Step: mean milliseconds of a training step on one
thread, all kinds of steps in their proportion; optimizer: the part of it that is neither forward nor backward."""


def draw(task: Task, rows: list[Row], path: Path) -> None:
    """Accuracy against sharpness; the area of a point is proportional to the time of a step, its colour tells the passes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    fig = Figure(figsize=(11, 7), layout="constrained", facecolor="white")
    canvas, panel = FigureCanvasAgg(fig), fig.subplots()
    panel.set_title(demo.describe(task), fontsize=13, fontweight="bold", loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color=demo.GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    ys, xs = (
        [statistics.fmean(values) for values in column] for column in zip(*(row[1:3] for row in rows), strict=True)
    )
    spreads = [[statistics.stdev(v) if len(v) > 1 else 0.0 for v in row[1:3]] for row in rows]
    errors = {"fmt": "none", "ecolor": demo.PLAIN, "elinewidth": 1, "capsize": 2, "zorder": 2}
    panel.errorbar(xs, ys, xerr=[s for _, s in spreads], yerr=[s for s, _ in spreads], **errors)
    style = {"cmap": "viridis_r", "vmin": 1, "vmax": 3, "edgecolors": demo.MARK, "linewidths": 0.8, "zorder": 3}
    sizes = [70 * row.cost.step for row in rows]
    points = panel.scatter(xs, ys, sizes, [statistics.fmean(row.passes) for row in rows], **style)
    fig.colorbar(points, ax=panel, label="passes per micro-batch", shrink=0.6, ticks=[1, 1.5, 2, 2.5, 3])
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.12, y=0.1)
    panel.set_xlabel("sharpness: top Hessian eigenvalue (flatter to the left)")
    panel.set_ylabel("test accuracy, %")
    panel.annotate("area: milliseconds of a step", (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=9)

    # Each label where it covers least of what is there: points, error bars and the labels before it.
    canvas.draw()

    def pixels(points: list) -> list:
        return panel.transData.transform(points).tolist()

    scale = fig.dpi / 72
    centres, radii = pixels(list(zip(xs, ys, strict=True))), [math.sqrt(size / math.pi) * scale for size in sizes]
    taken = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, radii, strict=True)]
    for x, y, (dy, dx) in zip(xs, ys, spreads, strict=True):
        (left, middle), (right, _), (_, low), (_, high) = pixels([(x - dx, y), (x + dx, y), (x, y - dy), (x, y + dy)])
        centre = pixels([(x, y)])[0][0]
        taken += [(left, middle - 1, right, middle + 1), (centre - 1, low, centre + 1, high)]

    def overlap(a: tuple, b: tuple) -> float:
        return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

    def leader(x: float, y: float, box: tuple) -> tuple[float, float]:
        return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])

    frame = panel.get_window_extent().extents
    for row, (x, y), radius in zip(rows, centres, radii, strict=True):
        text = f"{row.contestant.label}, {row.cost.step:.1f} ms"
        label = panel.annotate(text, (0, 0), xycoords="figure pixels", fontsize=9)
        box = label.get_window_extent(canvas.get_renderer())
        label.remove()
        width, height = box.width, box.height
        places = []
        for reach in (4, 12, 22, 34, 48):
            for turn in range(16):
                angle, away = turn * math.pi / 8, radius + reach * scale
                left = x + away * math.cos(angle) - width * (1 - math.cos(angle)) / 2
                low = y + away * math.sin(angle) - height * (1 - math.sin(angle)) / 2
                places.append((left, low, left + width, low + height))

        def cost(place, x=x, y=y, area=width * height, own=(x, y)):
            """Covered area, area outside, and for leaders across others' points and length some more."""
            end = leader(x, y, place)
            way = [(x + (end[0] - x) * k / 10, y + (end[1] - y) * k / 10) for k in range(1, 11)]
            crossed = sum(
                any(math.dist(at, centre) < r for at in way)
                for centre, r in zip(centres, radii, strict=True)
                if tuple(centre) != own
            )
            covered = sum(overlap(place, other) for other in taken) + area - overlap(place, frame)
            return covered + area * (crossed + math.dist((x, y), end) / 400)

        best = min(places, key=cost)
        taken.append(best)
        arrow = {"arrowstyle": "-", "color": demo.PLAIN, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        where = {"xycoords": "figure pixels", "textcoords": "figure pixels"}
        panel.annotate("", (x, y), leader(x, y, best), **where, arrowprops=arrow, zorder=2)
        panel.annotate(text, best[:2], xycoords="figure pixels", fontsize=9, zorder=5)
    fig.set_layout_engine("none")  # labels are placed in this layout
    fig.savefig(path, dpi=fig.dpi)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    quick = demo.QUICK
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("family.png"), help="picture to write (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=min(demo.available_cores(), 8), help="processes to train in")
    parser.add_argument("--epochs", type=int, default=TASK.epochs, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=demo.FULL.seeds, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="two epochs, one seed: only to see that it runs")
    args = parser.parse_args(argv)
    for name in ("workers", "epochs", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    demo.check_packages("family", PACKAGES)
    if demo.kernels_missing():
        print(f"Without the fused kernels: {demo.kernels_missing()}. What is timed is the plain torch reference.")

    begin = time.perf_counter()
    effort = quick if args.quick else demo.FULL
    task = of_length(quick.max_epochs if args.quick else args.epochs)
    seeds = range(quick.seeds if args.quick else args.seeds)
    contestants = family(task.steps)
    jobs = [Job(c, seed, task.epochs, effort.tolerance) for c in range(len(contestants)) for seed in seeds]
    outcomes = demo.run_jobs(jobs, args.workers, __file__, " steps")
    costs = time_all(quick.timed_steps if args.quick else TIMED_STEPS)

    rows = []
    for c, (contestant, cost) in enumerate(zip(contestants, costs, strict=True)):
        own = [outcomes[job] for job in jobs if job.contestant == c]
        rows.append(Row(contestant, *map(list, zip(*own, strict=True)), cost))
    print("\n" + table(task, rows, len(seeds)))
    print("\n" + NOTES)
    draw(task, rows, args.output)
    print(f"\nPicture: {args.output}   ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
