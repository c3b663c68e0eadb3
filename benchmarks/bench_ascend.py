# SPDX-License-Identifier: Apache-2.0
"""Norm and perturb in one cooperative launch against two launches, by size: where ``MSAM_KERNELS_COOPERATIVE_BYTES`` should be.

    python benchmarks/bench_ascend.py --csv ascend.csv

The threshold is read once in a process, so each way runs in processes of its own, in turns; medians of device times.
"flushed": what is read comes from memory. "warm": the gradient was written just before, as a backward pass leaves it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import measure
from measure import Effort, EventClock, Results, interleave, number, print_table, size

WAYS = {"one launch": 1 << 62, "two launches": -1}  # -1: no gradient is as small
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


def child(dtype: torch.dtype, sizes: Sequence[int], effort: Effort) -> dict[str, dict[int, float]]:
    """Seconds of ``ascend`` by clock and size, as the environment says."""
    from bench_step import Gradients, kernel_cases

    device, seconds = torch.device("cuda"), {"flushed": {}, "warm": {}}
    for numel in sizes:
        gradients = Gradients([(numel // TENSORS,)] * TENSORS, dtype, device, sets=2)
        (call,) = [call for name, _, call in kernel_cases(gradients, "cuda") if name == "ascend"]
        with torch.no_grad():
            for name, clock in (("flushed", EventClock(device)), ("warm", Warm(device, gradients.sets[1]))):
                seconds[name][numel] = interleave({"": call}, effort, clock)[""].median
    return seconds


def crossover(sizes: Sequence[int], wins: Callable[[int], bool]) -> int:
    """The largest size up to which one launch wins throughout; 0: nowhere."""
    largest = 0
    for numel in sizes:
        if not wins(numel):
            break
        largest = numel
    return largest


def report(results: Results, dtype: torch.dtype, times: dict, copy: float) -> None:
    """``times``: way -> clock -> size -> seconds."""
    for clock in ("flushed", "warm"):
        sizes = list(times["one launch"][clock])
        rows = []
        for numel in sizes:
            one, two = (times[way][clock][numel] * 1e6 for way in WAYS)
            share = 5 * numel * dtype.itemsize / (min(one, two) / 1e6) / copy
            rows.append((size(numel), number(one), number(two), f"{two / one:.2f}x", f"{share:.0%}"))
            for way, us in (("one launch", one), ("two launches", two)):
                results.add(kind="ascend", clock=clock, dtype=str(dtype)[6:], numel=numel, way=way, us=us)
        print(f"\n== norm + perturb, {str(dtype)[6:]}, {clock}: µs ==\n")
        print_table(("parameters", "one launch", "two launches", "two / one", "best, of copy_"), rows)
        largest = crossover(sizes, lambda n, c=clock: times["one launch"][c][n] <= times["two launches"][c][n])
        print(
            f"\n  one launch wins up to {size(largest)} parameters, {largest * dtype.itemsize / 2**20:.0f} MiB of gradients"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--turns", type=int, default=2, help="processes of each way")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each size")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench_ascend.py needs a CUDA device: it compares ways to launch a kernel there")
    if args.child:
        dtypes = {name: getattr(torch, name) for name in args.dtype}
        effort = Effort(args.seconds, (5, 50), block=0.005)
        print(json.dumps({name: child(dtype, args.sizes, effort) for name, dtype in dtypes.items()}))
        return 0
    device = torch.device("cuda")
    copy = measure.copy_bandwidth(device)
    results = Results({**measure.where(device), "commit": measure.commit(), "date": measure.now()})
    results.add(kind="copy", gb_per_s=copy / 1e9)
    print(f"{measure.machine(device)}, copy_ moves {number(copy / 1e9)} GB/s")
    command = [sys.executable, __file__, "--child", "--seconds", str(args.seconds), "--dtype", *args.dtype, "--sizes"]
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(args.turns):
        for way, threshold in WAYS.items():
            environment = {**os.environ, "MSAM_KERNELS_COOPERATIVE_BYTES": str(threshold)}
            done = subprocess.run([*command, *map(str, args.sizes)], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{way}: failed\n{done.stderr}")
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    for name in args.dtype:
        times = {
            way: {
                clock: {n: statistics.median(run[name][clock][str(n)] for run in own) for n in args.sizes}
                for clock in ("flushed", "warm")
            }
            for way, own in runs.items()
        }
        report(results, getattr(torch, name), times, copy)
    if args.csv:
        results.write(args.csv)
        print(f"\nmeasurements: {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
