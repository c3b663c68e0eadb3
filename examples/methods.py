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

import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from msam_kernels import methods

sys.path.insert(0, str(Path(__file__).resolve().parent))
import training
from training import (
    GRID,
    MARK,
    PLAIN,
    QUICK,
    SHARPNESS_SAMPLES,
    TASKS,
    Contestant,
    Cost,
    Effort,
    Row,
    Task,
    Timed,
    logarithmic,
    spread_of,
)

# Import name: name on PyPI.
PACKAGES = {"mnist1d": "mnist1d", "matplotlib": "matplotlib"}
TASK = TASKS[0]
START = 0.85  # of the training, before late-phase SAM sets in
ROUNDS = 3
WARM_UP_STEPS = 3
FULL = Effort(timed_steps=100)
AREA = 70  # of a point in the picture, per millisecond


def contestants(task: Task) -> Sequence[Contestant]:
    return family(task.steps)


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


def time_steps(contestant: Contestant, steps: int) -> Cost:
    """Means over a training of so many steps, since not all of a method's steps cost the same; the median of some."""
    batches, rounds = training.endless(TASK), []
    for _ in range(ROUNDS):
        timed = Timed(TASK, contestant)
        for x, y in itertools.islice(batches, WARM_UP_STEPS + steps):
            timed.run(x, y)
        rounds.append(Cost.of(statistics.fmean, timed.costs[WARM_UP_STEPS:]))
    return Cost.of(statistics.median, rounds)


# -- what came out -----------------------------------------------------------------------------------------------------


def table(task: Task, rows: list[Row]) -> str:
    cells = []
    for row in rows:
        cost = row.cost["fused"]
        cells.append((f"{row.outcomes[0].passes:.2f}", f"{cost.step:.2f}", f"{cost.optimizer:.3f}"))
    return training.table(task, rows, ("passes", "step, ms", "optimizer, ms"), cells)


NOTES = f"""\
In parentheses: the number of micro-batches. Mean ± standard deviation over the seeds.
Sharpness: top eigenvalue of the Hessian of the training loss at the end, in eval mode, on {SHARPNESS_SAMPLES:,} samples.
Passes: forward and backward passes per micro-batch and step, counted. Step: mean milliseconds of a training step on one
thread, all kinds of steps in their proportion; optimizer: the part of it that is neither forward nor backward."""


def draw(task: Task, rows: list[Row], path: Path) -> None:
    """Accuracy against sharpness; the area of a point is proportional to the time of a step, its colour tells the passes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 7), layout="constrained", facecolor="white")
    canvas, panel = FigureCanvasAgg(fig), fig.subplots()
    panel.set_title(str(task), fontsize=13, fontweight="bold", loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color=GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    points = [(statistics.fmean(row.sharpness), statistics.fmean(row.accuracy)) for row in rows]
    spreads = [(spread_of(row.sharpness), spread_of(row.accuracy)) for row in rows]
    (xs, ys), (dxs, dys) = zip(*points, strict=True), zip(*spreads, strict=True)
    panel.errorbar(xs, ys, dys, dxs, fmt="none", ecolor=PLAIN, elinewidth=1, capsize=2, zorder=2)
    style = {"cmap": "viridis_r", "vmin": 1, "vmax": 3, "edgecolors": MARK, "linewidths": 0.8, "zorder": 3}
    steps = [row.cost["fused"].step for row in rows]
    passes = [statistics.fmean(o.passes for o in row.outcomes) for row in rows]
    dots = panel.scatter(xs, ys, [AREA * step for step in steps], passes, **style)
    fig.colorbar(dots, ax=panel, label="passes per micro-batch", shrink=0.6, ticks=[1, 1.5, 2, 2.5, 3])
    panel.set_xscale("log")
    logarithmic(panel.xaxis, (1, 1.5, 2, 3, 4, 5, 7))
    panel.margins(x=0.12, y=0.1)
    panel.set_xlabel("sharpness: top Hessian eigenvalue (flatter to the left)")
    panel.set_ylabel("test accuracy, %")
    panel.annotate("area: milliseconds of a step", (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=9)
    canvas.draw()
    fig.set_layout_engine("none")  # Labels are placed in this layout.
    texts = [f"{row.contestant.label}, {step:.1f} ms" for row, step in zip(rows, steps, strict=True)]
    label(panel, texts, points, spreads, [math.sqrt(AREA * step / math.pi) for step in steps])
    fig.savefig(path, dpi=fig.dpi)


Box = tuple[float, float, float, float]  # left, low, right, high


def label(panel, texts: list[str], points: list, spreads: list, radii: list[float]) -> None:
    """Each text beside its point, where it covers least of points, error bars and the texts before it."""
    scale = panel.figure.dpi / 72
    frame: Box = tuple(panel.get_window_extent().extents)
    to_pixels = panel.transData.transform
    taken: list[Box] = []
    for (x, y), (dx, dy), radius in zip(points, spreads, radii, strict=True):
        (left, low), (right, high) = to_pixels([(x - dx, y - dy), (x + dx, y + dy)]).tolist()
        (cx, cy), r = to_pixels((x, y)).tolist(), radius * scale
        taken += [(cx - r, cy - r, cx + r, cy + r), (left, cy - 1, right, cy + 1), (cx - 1, low, cx + 1, high)]
    for text, point, radius in zip(texts, points, radii, strict=True):
        at = to_pixels(point).tolist()
        note = panel.annotate(text, (0, 0), xycoords="figure pixels", fontsize=9, zorder=5)
        size = note.get_window_extent()

        def cost(box: Box, at=at, area=size.width * size.height) -> float:
            """What it covers, what lies outside, and some more for the way to it."""
            outside = area - overlap(box, frame)
            return sum(overlap(box, other) for other in taken) + outside + area * math.dist(at, nearest(at, box)) / 400

        best = min(places(at, radius * scale, size.width, size.height, scale), key=cost)
        taken.append(best)
        note.set_position(best[:2])
        arrow = {"arrowstyle": "-", "color": PLAIN, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        pixels = {"xycoords": "figure pixels", "textcoords": "figure pixels"}
        panel.annotate("", at, nearest(at, best), **pixels, arrowprops=arrow, zorder=2)


def places(at: list[float], radius: float, width: float, height: float, scale: float) -> Iterator[Box]:
    """All around a point, nearer and further."""
    for reach in (4, 12, 22, 34, 48):
        for turn in range(16):
            across, up = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            left = at[0] + (radius + reach * scale) * across - width * (1 - across) / 2
            low = at[1] + (radius + reach * scale) * up - height * (1 - up) / 2
            yield left, low, left + width, low + height


def overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def nearest(at: list[float], box: Box) -> tuple[float, float]:
    """The point of a box that is nearest."""
    return min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = training.parser(__doc__, "family.png")
    parser.add_argument("--epochs", type=int, default=TASK.epochs, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=FULL.seeds, help="default: %(default)s")
    args = parser.parse_args(argv)
    training.check(parser, args, "family", PACKAGES)
    begin = time.perf_counter()
    effort = QUICK if args.quick else FULL._replace(seeds=args.seeds)
    task = replace(TASK, epochs=QUICK.max_epochs if args.quick else args.epochs)
    timed = family(WARM_UP_STEPS + effort.timed_steps)

    def costs(task: Task, c: int) -> dict[str, Cost]:
        return {"fused": time_steps(timed[c], effort.timed_steps)}

    (rows,) = training.compare(Path(__file__).stem, [task], contestants, costs, effort, args.workers)
    print("\n" + table(task, rows))
    print("\n" + NOTES)
    draw(task, rows, args.output)
    print(f"\nPicture: {args.output}   ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
