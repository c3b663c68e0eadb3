# SPDX-License-Identifier: Apache-2.0
"""What a GPU's memory gives to plain kernels that read and write as many streams as this package's kernels do.

    python benchmarks/bench_sweep.py --csv sweep.csv
    python benchmarks/bench_sweep.py --build build/sweep.so     # without a GPU: only compile, for where there is no time to

Every pattern of access, by the elements of a block, its threads, and the loads under way of each stream; device times, with
what lies in the L2 cache flushed out before each. ``gpu_tables.py`` puts the best of each pattern beside the package's
kernels. On a CPU the same runs with torch's operators, as a rehearsal.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import sys
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import cubin
import measure
from measure import Call, Clock, EventClock, Failed, Job, Results, Say, number, print_table, size

SOURCE = Path(__file__).with_suffix("").with_name("sweep.cu")
#: (name in the tables, streams read, written, of those the ones that are written to where they were read).
PATTERNS = {
    "R1 W1 apart": (1, 1, 0),
    "R2 W1 in place": (2, 1, 1),
    "R2 W2 in place": (2, 2, 1),
    "R2 W2 apart": (2, 2, 0),
    "R3 W2 in place": (3, 2, 2),
    "R4 W3 in place": (4, 3, 3),
}
SIZES = (11_665_408, 354_746_368)  # ResNet-18's shapes, and a transformer's
ELEMENTS, THREADS, AHEAD = (4096, 8192, 16384), (256, 512, 1024), (1, 2, 4)
BEST = 3  # that are kept of each pattern and size


def build(library: Path, architecture: str) -> Path:
    """Compile the kernels.

    Raises:
        RuntimeError: there is no nvcc, or what it said.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    options = [f"-arch={architecture}", "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
    cubin.output(cubin.tool("nvcc"), *options, str(SOURCE), "-o", str(library))
    return library


class Streams:
    """Memory for a pattern."""

    def __init__(self, pattern: str, numel: int, device: torch.device):
        reads, writes, in_place = PATTERNS[pattern]
        self.inputs = [torch.empty(numel, device=device).uniform_() for _ in range(reads)]
        self.outputs = self.inputs[:in_place] + [torch.empty(numel, device=device) for _ in range(writes - in_place)]

    @property
    def nbytes(self) -> int:
        """Read and written."""
        return sum(t.nbytes for t in self.inputs) + sum(t.nbytes for t in self.outputs)


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def on_a_gpu(library: Path) -> Callable[..., None]:
    function = ctypes.CDLL(str(library)).sweep
    function.argtypes = [ctypes.c_int] * 2 + [ctypes.c_void_p] * 2 + [ctypes.c_longlong] + [ctypes.c_int] * 3

    def launch(streams: Streams, elements: int, threads: int, ahead: int) -> None:
        inputs, outputs = pointers(streams.inputs), pointers(streams.outputs)
        counts = len(streams.inputs), len(streams.outputs)
        error = function(*counts, inputs, outputs, streams.inputs[0].numel(), elements, threads, ahead)
        if error:
            raise Failed(f"CUDA error {error} of {elements} elements, {threads} threads, {ahead} loads ahead")

    return launch


def on_a_cpu(streams: Streams, *_: int) -> None:
    """What the kernels compute."""
    total = sum(streams.inputs[1:], streams.inputs[0])
    for out in streams.outputs:
        out.copy_(total)
        total[::4] *= 0.5


def check(launch: Callable[..., None], device: torch.device) -> None:
    """The kernels do what they are timed for, at an awkward size.

    Raises:
        Failed: they do not.
    """
    for pattern, elements, threads, ahead in itertools.product(PATTERNS, ELEMENTS, THREADS, AHEAD):
        torch.manual_seed(0)
        ours, expected = Streams(pattern, 40_004, device), Streams(pattern, 40_004, device)
        for a, b in zip(ours.inputs, expected.inputs, strict=True):
            b.copy_(a)
        launch(ours, elements, threads, ahead)
        on_a_cpu(expected, elements, threads, ahead)
        if not all(map(torch.allclose, ours.outputs, expected.outputs)):
            raise Failed(
                f"{pattern} with {elements} elements, {threads} threads, {ahead} loads ahead computes something else"
            )


def run_pattern(
    results: Results, launch: Callable[..., None], pattern: str, numel: int, args: argparse.Namespace, say: Say
) -> None:
    streams = Streams(pattern, numel, args.device)
    clock: Clock = EventClock(args.device) if args.device.type == "cuda" else Clock(args.device)
    found = []
    for elements, threads, ahead in itertools.product(ELEMENTS, THREADS, AHEAD):
        if threads * 4 * ahead > elements:  # some would have nothing to do
            continue
        call = Call(partial(launch, streams, elements, threads, ahead))
        seconds = measure.Timing([clock(call) for _ in range(args.rounds)]).median
        found.append((streams.nbytes / seconds / 1e9, elements, threads, ahead))
        say(f"{elements} elements, {threads} threads, {ahead} ahead")
    for k, (rate, elements, threads, ahead) in enumerate(sorted(found, reverse=True)[:BEST], 1):
        geometry = {"elements_per_block": elements, "threads": threads, "loads_in_flight": ahead}
        results.add(
            kind="plain", pattern=pattern, numel=numel, rank=f"best {k}", gb_per_s=rate, **geometry, policy="plain"
        )


def jobs(results: Results, launch: Callable[..., None], args: argparse.Namespace) -> Generator[Job, None, None]:
    for numel, pattern in itertools.product(args.sizes, PATTERNS):
        yield f"{pattern}, {size(numel)}", partial(run_pattern, results, launch, pattern, numel, args)


def print_results(results: Results, copy: float | None) -> None:
    lines = []
    for row in results.select(kind="plain"):
        share = f"{row['gb_per_s'] * 1e9 / copy:.0%}" if copy else "–"
        how = f"{row['elements_per_block']} elements, {row['threads']} threads, {row['loads_in_flight']} loads ahead"
        lines.append((row["pattern"], size(row["numel"]), row["rank"], number(row["gb_per_s"]), share, how))
    print()
    print_table(("streams", "elements", "", "GB/s", "of copy_", "a block"), lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__, seconds=0.0, rounds=7)
    parser.set_defaults(device=torch.device("cuda"))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="elements of a stream, multiples of 4")
    parser.add_argument("--library", type=Path, help="what --build has made; compiled in a minute without it")
    parser.add_argument("--build", type=Path, help="only compile, to that file")
    parser.add_argument("--architecture", default="native", help="as nvcc takes it, e.g. sm_90 (default: native)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.build:
        print(build(args.build, args.architecture))
        return 0
    results = measure.begin(args, "What the memory gives to plain kernels", backend="plain")
    launch: Callable[..., None] = on_a_cpu
    copy = None
    if args.device.type == "cuda":
        launch = on_a_gpu(args.library or build(cubin.ROOT / "build" / "sweep.so", args.architecture))
        copy = measure.copy_bandwidth(args.device)
        results.add(kind="copy", gb_per_s=copy / 1e9)
    check(launch, args.device)
    failed = measure.run(jobs(results, launch, args), len(args.sizes) * len(PATTERNS), results, args)
    print_results(results, copy)
    return measure.conclude(results, args, failed)


if __name__ == "__main__":
    sys.exit(main())
