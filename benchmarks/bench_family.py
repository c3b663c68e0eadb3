# SPDX-License-Identifier: Apache-2.0
"""Optimizer time of every method of the family: this package against a plain loop, and pytorch_optimizer where it has it.

    python benchmarks/bench_family.py                          # ResNet-18 shapes; about a minute
    python benchmarks/bench_family.py --shape cnn --csv family.csv

One micro-batch, SGD with momentum; how that is measured, and who may be timed, stands in ``contest.py``. For LookSAM, which
perturbs once in five steps, the table says the mean of five. What ``pytorch_optimizer`` calls LookSAM projects and scales
tensor by tensor, not globally, and so computes something else; it is timed all the same.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch loads: the memory check would warn

import torch

sys.path.insert(0, str(Path(__file__).parent))
import contest
import measure
from contest import FAMILY, OURS, Case
from gradients import Gradients
from measure import Results, number, print_table, size
from shapes import SHAPES

GOAL = 2.0  # times faster than either
PEERS = ("loop", "pytorch_optimizer")


def print_results(results: Results) -> None:
    copy = max((row["gb_per_s"] for row in results.select(kind="copy")), default=None)
    print(f"copy_ moves {number(copy)} GB/s\n")
    rows = []
    for name in FAMILY:
        times = {row["contestant"]: row for row in results.select(kind="step", method=name)}
        if OURS not in times:
            continue
        ours = times[OURS]
        share = f"{ours['gb_per_s'] / copy:.0%}" if copy else "–"
        line = [name, number(ours["ms"]), f"± {number(ours['iqr_ms'], 2)}", f"{ours['passes']:.3g}", share]
        line.append(number(ours["extra_over_parameters"], 2))
        for who in PEERS:
            ratio = times[who]["ms"] / ours["ms"] if who in times else None
            line += [number(times[who]["ms"]), f"{ratio:.2f}x{'' if ratio >= GOAL else ' <'}"] if ratio else ["–", ""]
        rows.append(line)
    header = ("", "ours, ms", "iqr", "P", "of copy_", "extra / P", "loop, ms", "", "pytorch_optimizer, ms", "")
    print_table(header, rows)
    print(f"\nGoal: {GOAL:g} times faster than either; '<' marks what is not.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__, seconds=8.0, rounds=15, unit="method")
    contest.add_arguments(parser)
    parser.add_argument("--shape", choices=SHAPES, default="resnet18")
    parser.add_argument(
        "--methods", nargs="+", choices=FAMILY, default=list(FAMILY), metavar="NAME", help=", ".join(FAMILY)
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    results = measure.begin(args, "Optimizer time of the family", **contest.versions(args.backend, args.device))
    gradients = Gradients(SHAPES[args.shape](), torch.float32, args.device)
    where = contest.where(args.shape, gradients)
    print(
        f"{args.shape}: {where['tensors']} tensors, {size(gradients.numel)} parameters; SGD momentum, one micro-batch"
    )
    cases = [Case(args.shape, name, "sgd", torch.float32, 1, args.backend) for name in args.methods]
    jobs = (
        (case.method, partial(contest.run_case, results, case, where, gradients, (OURS, *PEERS), args))
        for case in cases
    )
    failed = measure.run(jobs, len(cases), results, args)
    print_results(results)
    return measure.conclude(results, args, failed)


if __name__ == "__main__":
    sys.exit(main())
