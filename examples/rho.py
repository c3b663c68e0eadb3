# SPDX-License-Identifier: Apache-2.0
"""Which rho is worth trying on the demo's two tasks by flatness.rho_sweep, and which was best on data held out.

    python -m msam_kernels rho            # tables, and pictures in rho-1.png and rho-2.png
    python -m msam_kernels rho --quick    # seconds, to see that everything runs; its numbers mean nothing

The sweeps are of fresh weights, and of weights that SGD trained for a tenth of the epochs and for all; in float32, and the
same weights in bfloat16. Then every rho trains from the start with the settings of demo.py. A quarter of the training data is
held out, and no training or sweep sees it; the test data have no part in it.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from msam_kernels import flatness, methods

sys.path.insert(0, str(Path(__file__).resolve().parent))
import training
from measure import Results, commit, now, print_table, where
from training import QUICK, TASKS, Contestant, Effort, Job, Outcome, Task

# Import name: name on PyPI.
PACKAGES = {"sklearn": "scikit-learn", "mnist1d": "mnist1d", "matplotlib": "matplotlib"}
RHOS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # of the trainings
COUNTS = (1, 4)  # micro-batches of the sweeps
METHODS = {"SAM": methods.SAM(), "ASAM": methods.AdaptiveSAM(), "F-SAM": methods.FriendlySAM()}
STAGES = {"fresh": 0.0, "a tenth": 0.1, "trained": 1.0}  # of the epochs
BATCHES = 4
FULL = Effort(seeds=2, tolerance=0.1, samples=100)  # the Hessian has no part in this


def held_out(x, y, x_test, y_test) -> tuple:
    """Three quarters of the training data, and the last quarter in place of the test data."""
    count = len(x) * 3 // 4
    return x[:count], y[:count], x[count:], y[count:]


def mnist1d() -> tuple:
    return held_out(*training.mnist1d())


def digits() -> tuple:
    return held_out(*training.digits())


SOURCES = (mnist1d, digits)


def contestants(task: Task) -> Sequence[Contestant]:
    return [Contestant("SGD"), *(Contestant("SAM", methods.SAM(), rho=(rho,) * len(TASKS)) for rho in RHOS)]


# -- the sweeps --------------------------------------------------------------------------------------------------------


def weights_of(task: Task, share: float) -> nn.Module:
    """After that share of the epochs, by the base optimizer alone."""
    epochs = round(share * task.epochs)
    return training.train(replace(task, epochs=epochs), Contestant("SGD"), 0, lambda passes: None)


def sweeps(task: Task) -> Iterator[tuple[dict[str, object], flatness.RhoSweep]]:
    """Every stage, dtype, method and number of micro-batches, and what was measured there."""
    data = training.load(task.source)
    for stage, share in STAGES.items():
        model = weights_of(task, share).train()
        drawn = list(itertools.islice(training.batches(data, task.batch_size), BATCHES))
        for dtype in (torch.float32, torch.bfloat16):
            model = model.to(dtype)
            batches = [(x.to(dtype), y) for x, y in drawn]
            for (name, method), count in itertools.product(METHODS.items(), COUNTS):
                case = {"weights": stage, "dtype": str(dtype).removeprefix("torch."), "method": name, "m": count}
                loss_fn = lambda x, y, model=model: F.cross_entropy(model(x).float(), y)  # noqa: E731
                yield case, flatness.rho_sweep(model, loss_fn, batches, num_micro_batches=count, method=method)


def record(results: Results, task: Task, case: dict[str, object], sweep: flatness.RhoSweep) -> None:
    arrival = [x @ sweep.shares for x in (sweep.arrived, sweep.along, sweep.moved)]
    columns = zip(*(t.tolist() for t in (sweep.rhos, sweep.rise, sweep.spread, *arrival)), strict=True)
    for rho, rise, spread, arrived, along, moved in columns:
        measured = {"rise": rise, "spread": spread, "arrived": arrived, "along": along, "moved": moved}
        results.add(task=task.title, **case, rho=rho, loss=sweep.loss, **measured)


def span(found: tuple[float, float] | None) -> str:
    return f"{found[0]:g} to {found[1]:g}" if found else "none"


def draw(sweep: flatness.RhoSweep, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 4), layout="constrained", facecolor="white")
    fig.suptitle(title)
    sweep.draw(*fig.subplots(1, 2))
    fig.savefig(path, dpi=130)


# -- the trainings -----------------------------------------------------------------------------------------------------


def trained(tasks: Sequence[Task], effort: Effort, workers: int) -> list[list[list[Outcome]]]:
    """By task and contestant, an outcome for each seed."""
    script, seeds = Path(__file__).stem, range(effort.seeds)
    jobs = [
        Job(script, task, c, seed, effort, task.steps * contestant.passes)
        for task in tasks
        for c, contestant in enumerate(contestants(task))
        for seed in seeds
    ]
    outcomes = iter(training.run_jobs(jobs, workers))
    return [[[next(outcomes) for _ in seeds] for _ in contestants(task)] for task in tasks]


@training.stops_in_one_line
def main(argv: list[str] | None = None) -> None:
    parser = training.parser(__doc__, "rho.png", "python -m msam_kernels rho")
    parser.add_argument("--csv", type=Path, help="write everything that was measured there")
    args = parser.parse_args(argv)
    training.check(parser, args, "demo", PACKAGES)
    begin = time.perf_counter()
    effort = QUICK if args.quick else FULL
    tasks = [
        replace(task, source=source, epochs=min(task.epochs, effort.max_epochs))
        for task, source in zip(TASKS, SOURCES, strict=True)
    ]
    results = Results({**where(torch.device("cpu")), "commit": commit(), "date": now()})
    pictures = []
    for number, task in enumerate(tasks, 1):
        rows = []
        for case, sweep in sweeps(task):
            record(results, task, case, sweep)
            rows.append((*map(str, case.values()), f"{sweep.loss:.3g}", span(sweep.worth_trying())))
            if list(case.values()) == ["a tenth", "bfloat16", "SAM", 1]:
                print(f"\n{task}: {' '.join(map(str, case.values()))}\n{sweep}")
                pictures.append(args.output.with_stem(f"{args.output.stem}-{number}"))
                draw(sweep, f"{task}; SAM after a tenth of the epochs, bfloat16", pictures[-1])
        print()
        print_table(("weights", "dtype", "method", "m", "loss", "rho worth trying"), rows)
    for task, outcomes in zip(tasks, trained(tasks, effort, args.workers), strict=True):
        rows = []
        for contestant, seeds in zip(contestants(task), outcomes, strict=True):
            values = [outcome.accuracy for outcome in seeds]
            rho = contestant.rho_for(task)
            rows.append((contestant.label, f"{rho:g}", training.mean_std(values, 2)))
            case = {
                "weights": "from fresh",
                "dtype": "float32",
                "method": contestant.name,
                "m": contestant.num_micro_batches,
            }
            results.add(task=task.title, **case, rho=rho, accuracy=statistics.fmean(values), seeds=len(values))
        print(f"\n{task}; {task.epochs} epochs, seeds: {effort.seeds}")
        print_table(("", "rho", "accuracy on data held out, %"), rows)
    if args.csv:
        results.write(args.csv)
    print(f"\nPictures: {', '.join(map(str, pictures))}   ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
