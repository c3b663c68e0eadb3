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

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from msam_kernels import methods

sys.path.insert(0, str(Path(__file__).resolve().parent))
import training
from training import QUICK, TASKS, Contestant, Cost, Effort, Row, Task, Timed

# Import name: name on PyPI.
PACKAGES = {"sklearn": "scikit-learn", "mnist1d": "mnist1d", "matplotlib": "matplotlib"}
WARM_UP_STEPS = 3

CONTESTANTS = (
    Contestant("SGD"),
    Contestant("SAM", methods.SAM(), rho=(0.3, 0.01)),
    Contestant("mSAM", methods.SAM(), 2, rho=(0.4, 0.01)),
    Contestant("mSAM", methods.SAM(), 4, rho=(0.4, 0.01)),
    Contestant("mSAM", methods.SAM(), 16, rho=(0.2, 0.01)),
    Contestant("F-SAM", methods.FriendlySAM(), rho=(0.4, 0.02)),
    Contestant("mSAM + F-SAM", methods.FriendlySAM(), 4, rho=(0.2, 0.01)),
)


def contestants(task: Task) -> Sequence[Contestant]:
    return CONTESTANTS


def time_steps(task: Task, contestant: Contestant, steps: int) -> dict[str, Cost]:
    """Steps on the task's own batches, "fused" and "plain" in turn. The base optimizer alone has only "plain"."""
    from peers import Loop

    timed = {"plain": Timed(task, contestant, Loop)}
    if contestant.method is not None:
        timed["fused"] = Timed(task, contestant)
    for i, (x, y) in enumerate(itertools.islice(training.endless(task), WARM_UP_STEPS + steps)):
        if i == WARM_UP_STEPS:
            # Only what does the same is worth comparing. Later, rounding alone would drive the two apart.
            check_equal(timed)
        for contender in timed.values():
            contender.run(x, y)
    return {kind: Cost.of(statistics.median, contender.costs[WARM_UP_STEPS:]) for kind, contender in timed.items()}


def check_equal(timed: dict[str, Timed]) -> None:
    weights = [nn.utils.parameters_to_vector(contender.model.parameters()) for contender in timed.values()]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-3, atol=1e-4)


# -- what came out -----------------------------------------------------------------------------------------------------


def table(task: Task, rows: list[Row]) -> str:
    cells = []
    for row in rows:
        own = row.cost.get("fused") or row.cost["plain"]
        shares = [f"{row.cost[kind].optimizer:.3f}" if kind in row.cost else "–" for kind in ("fused", "plain")]
        cells.append((f"{own.step:.2f}", *shares))
    return training.table(
        task, rows, ("step, ms", f"{training.our_name()}, ms", "plain, ms"), cells, "of that, optimizer"
    )


NOTES = """\
In parentheses: the number of micro-batches. Mean ± standard deviation over the seeds.
Sharpness: top eigenvalue of the Hessian of the training loss at the end, in eval mode, on {samples:,} samples
at most. Step: median milliseconds of a training step on one thread. Optimizer: the part of it that is neither forward
nor backward; plain is the same method as a PyTorch loop over the parameters (benchmarks/peers.py)."""


# -- the command -------------------------------------------------------------------------------------------------------


@training.stops_in_one_line
def main(argv: list[str] | None = None) -> None:
    parser = training.parser(__doc__, "demo.png", "python -m msam_kernels demo")
    args = parser.parse_args(argv)
    training.check(parser, args, "demo", PACKAGES)
    begin = time.perf_counter()
    effort = QUICK if args.quick else Effort()
    tasks = [replace(task, epochs=min(task.epochs, effort.max_epochs)) for task in TASKS]

    def costs(task: Task, c: int) -> dict[str, Cost]:
        return time_steps(task, CONTESTANTS[c], effort.timed_steps)

    rows = training.compare(Path(__file__).stem, tasks, contestants, costs, effort, args.workers)
    for task, lines in zip(tasks, rows, strict=True):
        print("\n" + table(task, lines))
    print("\n" + NOTES.format(samples=effort.samples))
    training.draw(tasks, rows, args.output)
    print(f"\nPicture: {args.output}   ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
