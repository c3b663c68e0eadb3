# SPDX-License-Identifier: Apache-2.0
"""Every method of the family on the demo's MNIST-1D: how well it does, how flat it ends, what it costs.

    make family                             # a table, and a picture in family.png
    make family ARGS=--quick                # seconds, to see that everything runs; its numbers mean nothing

Every method gets the same number of epochs, not of passes, and, seed by seed, the same initial weights and batches.

How the settings were found: learning rate, weight decay and the rho of SAM, mSAM and F-SAM are those of demo.py. For the
others rho was chosen by a small pilot: the best of 0.1, 0.2, 0.3, 0.4 and 0.6 (ASAM: of 0.2, 0.3, 0.5, 1, 2, 3 and 4;
Momentum-SAM: of 0.1, 0.3, 0.6, 1, 2, 3 and 4, where it fails; WSAM: of 0.02, 0.05, 0.1, 0.2 and 0.3) by the
mean accuracy of two other seeds on 1,000 of the training samples, held out of the training. With its default alpha of 0.7
LookSAM did not get beyond 44 % there: its alpha and rho are the best pair of 0.1 and 0.3 with 0.1 and 0.4. LE-SAM's sigma and
rho are the best pair of 0.05, 0.1, 0.2 and 0.35 with 0.4 and 2, by the mean of the first two of this run's seeds. rho_min of
Bilateral SAM falls to 0 as a cosine, and late-phase SAM begins where START says; all else is the default, and the test data
had no say.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from msam_kernels import methods

sys.path.insert(0, str(Path(__file__).resolve().parent))
import training
from training import QUICK, TASKS, Contestant, Cost, Effort, Row, Task, Timed

# Import name: name on PyPI.
PACKAGES = {"mnist1d": "mnist1d", "matplotlib": "matplotlib"}
TASK = TASKS[0]
START = 0.85  # of the training, before late-phase SAM sets in
ROUNDS = 3
WARM_UP_STEPS = 3
FULL = Effort(timed_steps=100)


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
        Contestant("LE-SAM", methods.LossEquatedSAM(sigma=0.1), rho=(2.0,)),
        Contestant("VaSSO", methods.VaSSO(), rho=(0.3,)),
        Contestant("WSAM", methods.WSAM(), rho=(0.2,)),
        Contestant("Momentum-SAM", methods.MomentumSAM(), rho=(3.0,)),
        Contestant("SAM, hidden layer only", hidden_layer, rho=(0.3,)),
        Contestant("late-phase SAM", methods.SAM(start=round(START * steps)), rho=(0.6,)),
        Contestant("F-SAM + Sparse + Stable", composition, rho=(0.6,)),
    )


def hidden_layer(model: nn.Sequential) -> methods.SAM:
    """A chosen part of the parameters; this network has no normalisation layers."""
    return methods.SAM(only=model[2].parameters())


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
        (cost,) = row.cost.values()
        cells.append((f"{row.outcomes[0].passes:.2f}", f"{cost.step:.2f}", f"{cost.optimizer:.3f}"))
    return training.table(task, rows, ("passes", "step, ms", "optimizer, ms"), cells)


NOTES = """\
In parentheses: the number of micro-batches. Mean ± standard deviation over the seeds.
Sharpness: top eigenvalue of the Hessian of the training loss at the end, in eval mode, on {samples:,} samples.
Passes: forward and backward passes per micro-batch and step, counted. Step: mean milliseconds of a training step on one
thread, all kinds of steps in their proportion; optimizer: the part of it that is neither forward nor backward."""


# -- the command -------------------------------------------------------------------------------------------------------


@training.stops_in_one_line
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
        kind = "fused" if timed[c].method else "plain"
        return {kind: time_steps(timed[c], effort.timed_steps)}

    (rows,) = training.compare(Path(__file__).stem, [task], contestants, costs, effort, args.workers)
    print("\n" + table(task, rows))
    print("\n" + NOTES.format(samples=effort.samples))
    training.draw([task], [rows], args.output)
    print(f"\nPicture: {args.output}   ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
