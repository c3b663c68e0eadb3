# SPDX-License-Identifier: Apache-2.0
"""Norm and perturb in one launch, as steps have it, against two launches, by size.

    python benchmarks/bench_ascend.py --csv ascend.csv

Both ways take turns in one process; medians of device times. "flushed": what is read comes from memory. "warm": the gradient
was written just before, as a backward pass leaves it. On a CPU, which launches nothing, it runs all the same, as a rehearsal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import measure
from contest import dtype_name
from gradients import Gradients
from kernels import Kernels
from measure import Clock, EventClock, Job, Results, Say, interleave, number, print_table, size

WAYS: dict[str, dict[str, None]] = {"one launch": {}, "two launches": {"arrived": None}}
SIZES = (100_000, 300_000, 1_000_000, 2_000_000, 4_000_000, 6_000_000, 8_000_000, 12_000_000, 16_000_000, 25_000_000)
SIZES += (35_000_000, 50_000_000)
TENSORS = 60


class Warm(EventClock):
    """The gradients are written after the flush."""

    def __init__(self, device: torch.device, grads: list[torch.Tensor]):
        super().__init__(device)
        self.grads, self.copies = grads, [g.clone() for g in grads]

    def before(self) -> None:
        super().before()
        torch._foreach_copy_(self.grads, self.copies)


def run_size(results: Results, dtype: torch.dtype, numel: int, args: argparse.Namespace, say: Say) -> None:
    gradients = Gradients([(numel // TENSORS,)] * TENSORS, dtype, args.device)
    kernels = Kernels(gradients, args.backend)
    clocks: dict[str, Clock] = {"host": Clock(args.device)}
    if args.device.type == "cuda":
        clocks = {"flushed": EventClock(args.device), "warm": Warm(args.device, kernels.grads)}
    calls = {way: kernels.ascend(**options) for way, options in WAYS.items()}
    with torch.no_grad():
        for name, clock in clocks.items():
            for way, timing in interleave(calls, measure.effort(args), clock, say=say).items():
                row = {"clock": name, "dtype": dtype_name(dtype), "numel": numel, "way": way}
                results.add(kind="ascend", **row, **timing.as_row())


def print_results(results: Results, copy: float | None) -> None:
    rows = results.select(kind="ascend")
    for dtype, clock in dict.fromkeys((row["dtype"], row["clock"]) for row in rows):
        lines, bytes_each = [], getattr(torch, dtype).itemsize
        here = results.select(kind="ascend", dtype=dtype, clock=clock)
        for numel in dict.fromkeys(row["numel"] for row in here):
            times = {row["way"]: row["ms"] * 1e3 for row in here if row["numel"] == numel}
            one, two = (times[way] for way in WAYS)
            best = 5 * numel * bytes_each / (min(one, two) / 1e6)
            share = f"{best / copy:.0%}" if copy else "–"
            lines.append((size(numel), number(one), number(two), f"{two / one:.2f}x", share))
        print(f"\n== norm + perturb, {dtype}, {clock}: µs ==\n")
        print_table(("parameters", "one launch", "two launches", "two / one", "best, of copy_"), lines)


def jobs(results: Results, args: argparse.Namespace) -> Generator[Job, None, None]:
    for name in args.dtype:
        for numel in args.sizes:
            yield f"{size(numel)}, {name}", partial(run_size, results, getattr(torch, name), numel, args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__, seconds=0.3, rounds=50, unit="size")
    parser.set_defaults(device=torch.device("cuda"), backend="auto")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench_ascend.py needs a CUDA device: it compares ways to launch a kernel there")
    results = measure.begin(args, "Norm and perturb in one launch and in two", backend=args.backend)
    copy = None
    if args.device.type == "cuda":
        copy = measure.copy_bandwidth(args.device)
        results.add(kind="copy", gb_per_s=copy / 1e9)
        print(f"copy_ moves {number(copy / 1e9)} GB/s")
    failed = measure.run(jobs(results, args), len(args.dtype) * len(args.sizes), results, args)
    print_results(results, copy)
    return measure.conclude(results, args, failed)


if __name__ == "__main__":
    sys.exit(main())
