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
from contest import dtype_name
from gradients import Gradients
from measure import Effort, EventClock, Results, interleave, number, print_table, size

WAYS = {"one launch": 1 << 62, "two launches": 0}  # 0: no gradient is as small
CLOCKS = ("flushed", "warm")
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


def child(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of ``ascend`` by dtype and clock, a list by size, as the environment says."""
    from kernels import Kernels

    seconds: dict[str, dict[str, list[float]]] = {}
    effort = Effort(args.seconds, (5, args.rounds), block=0.005)
    for name in args.dtype:
        seconds[name] = {clock: [] for clock in CLOCKS}
        for numel in args.sizes:
            gradients = Gradients([(numel // TENSORS,)] * TENSORS, getattr(torch, name), args.device)
            kernels = Kernels(gradients, args.backend)
            clocks = {"flushed": EventClock(args.device), "warm": Warm(args.device, kernels.grads)}
            with torch.no_grad():
                for clock in CLOCKS:
                    timing = interleave({"": kernels.ascend()}, effort, clocks[clock])[""]
                    seconds[name][clock].append(timing.median)
    return seconds


def crossover(sizes: Sequence[int], wins: Callable[[int], bool]) -> int:
    """The largest size up to which one launch wins throughout; 0: nowhere."""
    largest = 0
    for numel in sizes:
        if not wins(numel):
            break
        largest = numel
    return largest


def report(results: Results, dtype: torch.dtype, sizes: Sequence[int], times: dict, copy: float) -> None:
    """``times``: clock -> way -> seconds by size."""
    for clock, ways in times.items():
        rows = []
        for i, numel in enumerate(sizes):
            one, two = (ways[way][i] * 1e6 for way in WAYS)
            share = 5 * numel * dtype.itemsize / (min(one, two) / 1e6) / copy
            rows.append((size(numel), number(one), number(two), f"{two / one:.2f}x", f"{share:.0%}"))
            for way, us in zip(WAYS, (one, two), strict=True):
                results.add(kind="ascend", clock=clock, dtype=dtype_name(dtype), numel=numel, way=way, us=us)
        print(f"\n== norm + perturb, {dtype_name(dtype)}, {clock}: µs ==\n")
        print_table(("parameters", "one launch", "two launches", "two / one", "best, of copy_"), rows)
        one, two = ways.values()
        largest = crossover(sizes, dict(zip(sizes, (a <= b for a, b in zip(one, two, strict=True)), strict=True)).get)
        bytes_ = largest * dtype.itemsize / 2**20
        print(f"\n  one launch wins up to {size(largest)} parameters, {bytes_:.0f} MiB of gradients")


def ask(way: str, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """What ``child`` says in a process of its own."""
    command = [sys.executable, __file__, "--child", "--seconds", str(args.seconds), "--rounds", str(args.rounds)]
    command += ["--dtype", *args.dtype, "--sizes", *map(str, args.sizes)]
    environment = {**os.environ, "MSAM_KERNELS_COOPERATIVE_BYTES": str(WAYS[way])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way}: failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__, seconds=0.3, rounds=50, unit="size")
    parser.set_defaults(device=torch.device("cuda"), backend="cuda")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--turns", type=int, default=2, help="processes of each way")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench_ascend.py needs a CUDA device: it compares ways to launch a kernel there")
    if args.child:
        print(json.dumps(child(args)))
        return 0
    results = measure.begin(args, "Norm and perturb in one launch and in two", backend=args.backend)
    copy = measure.copy_bandwidth(args.device)
    results.add(kind="copy", gb_per_s=copy / 1e9)
    print(f"copy_ moves {number(copy / 1e9)} GB/s")
    runs = [(way, ask(way, args)) for _ in range(args.turns) for way in WAYS]

    def seconds(name: str, clock: str, way: str) -> list[float]:
        """Medians over the turns, by size."""
        return [statistics.median(turn) for turn in zip(*(r[name][clock] for w, r in runs if w == way), strict=True)]

    for name in args.dtype:
        times = {clock: {way: seconds(name, clock, way) for way in WAYS} for clock in CLOCKS}
        report(results, getattr(torch, name), args.sizes, times, copy)
    return measure.conclude(results, args)


if __name__ == "__main__":
    sys.exit(main())
