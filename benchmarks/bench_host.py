# SPDX-License-Identifier: Apache-2.0
"""What the host does between autograd's last kernel and ours: a model with ResNet-50's 161 tensors, without their elements.

    python benchmarks/bench_host.py --csv host.csv
    PYTHONPATH=../before python benchmarks/bench_host.py       # another checkout, built

Forward and backward are real (53 convolutions and BatchNorms, as narrow as they can be): gradients are as autograd leaves them,
and the caches have seen something else, as in training. Our kernels get all pointers, but a table without rows: what is timed
is what the host does before a kernel runs, and what it frees. Medians of the rounds' medians, in µs per call:

begin    from the user's call to the first forward
ascend   from the end of the backward at w to the forward at w + e
descend  from the end of the backward at w + e to the next micro-batch, or the end of the ``passes`` loop
update   from the end of the last backward to the return of ``step(closure)``; or all of ``step()`` after a loop
clear    ``zero_grad()``

Of each, "to the kernel" is what a kernel waits for: until the first operator has all its pointers and would launch. On a GPU
the rest runs beside the kernel. "free", for comparison: what freeing a model's gradients takes, as any ``zero_grad()`` does. It
is part of ascend and descend, and comes after the kernel.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import measure
from measure import Others, Results, Say, Timing, no_collector, number, print_table

METHODS = {"SAM": {}, "F-SAM": {}, "GSAM": {"alpha": 0.4}}
KINDS = {"SAM": "SAM", "F-SAM": "FriendlySAM", "GSAM": "GapSAM"}
OPERATORS = ("norm", "perturb", "ascend", "gram", "weigh", "descend", "update")
WAYS = ("closure", "passes")
TO_KERNEL = ", to the kernel"
CALLS = (
    "begin",
    *(call + part for call in ("ascend", "descend", "update") for part in (TO_KERNEL, "")),
    "clear",
    "free",
)
CONVOLUTIONS = 53
WIDTH = 4


def narrow_resnet(device: torch.device) -> nn.Module:
    """53 convolutions, each with a BatchNorm, and a linear layer: 161 parameters."""
    layers: list[nn.Module] = []
    for _ in range(CONVOLUTIONS):
        layers += [nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTH, WIDTH)).to(device)


class Stopwatch:
    """Seconds between the moments at which the optimizer works, by what it does then."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._since = self._launch = 0.0

    def start(self) -> None:
        """The optimizer works from now on."""
        self._launch = 0.0
        self._since = time.perf_counter()

    def launch(self) -> None:
        """A kernel would run now."""
        self._launch = self._launch or time.perf_counter()

    def stop(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds.setdefault(what, []).append(now - self._since)
        if self._launch:
            self.seconds.setdefault(what + TO_KERNEL, []).append(self._launch - self._since)


class Launching:
    """A backend whose operators tell a stopwatch when they have been called."""

    def __init__(self, backend: Any):
        self.watch = Stopwatch()
        for name in OPERATORS:
            setattr(self, name, self.telling(getattr(backend, name)))

    def telling(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found = operator(*args, **options)
            self.watch.launch()
            return found

        return call


class Training:
    """Steps of one method in one way, with a stopwatch."""

    def __init__(self, method: str, way: str, micro_batches: int, device: torch.device):
        from msam_kernels import MicroBatchSAM, methods

        torch.manual_seed(0)
        self.model = narrow_resnet(device)
        base = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        chosen = getattr(methods, KINDS[method])(**METHODS[method])
        self.opt = MicroBatchSAM(base, 0.05, method=chosen, num_micro_batches=micro_batches)
        self.backends = without_rows(self.opt)
        self.x = torch.randn(4 * micro_batches, WIDTH, 1, 1, device=device)
        self.count, self.way = micro_batches, way

    def backward(self, x: Tensor, watch: Stopwatch) -> Tensor:
        loss = self.model(x).square().mean()
        loss.backward()
        value = loss.detach()
        del loss  # with its graph, which is not the optimizer's
        watch.start()
        return value

    def step(self, watch: Stopwatch) -> None:
        for backend in self.backends:
            backend.watch = watch
        (self.closures if self.way == "closure" else self.loop)(watch)

    def before(self, calls: int) -> str:
        """What the optimizer has done before the body that is the ``calls``-th of a step."""
        if calls == 0:
            return "begin"
        return "ascend" if calls % 2 else "descend"

    def closures(self, watch: Stopwatch) -> None:
        calls = 0

        def closure(x: Tensor) -> Tensor:
            nonlocal calls
            watch.stop(self.before(calls))
            calls += 1
            return self.backward(x, watch)

        each: list[Callable[[], Tensor]] = [lambda x=x: closure(x) for x in self.x.chunk(self.count)]
        watch.start()
        self.opt.step(each[0] if self.count == 1 else each)
        watch.stop("update")

    def loop(self, watch: Stopwatch) -> None:
        watch.start()
        for calls, x in enumerate(self.opt.passes(self.x)):
            watch.stop(self.before(calls))
            self.backward(x, watch)
        watch.stop("descend")
        for what, call in (("update", self.opt.step), ("clear", self.opt.zero_grad)):
            watch.start()
            call()
            watch.stop(what)


def without_rows(opt: Any) -> list[Launching]:
    """Kernels get all pointers from now on, and have nothing to do. Returns what tells of them."""
    backends = []
    for flat in opt.engine.store.flats:
        flat.backend = Launching(flat.backend)
        backends.append(flat.backend)
        flat.table, flat.status, flat.rows = flat.table[:0], flat.status[:0], 0
        flat.sums = (*flat.sums[:-1], 0)
    return backends


def free(training: Training, watch: Stopwatch) -> None:
    """What torch alone takes to free the gradients."""
    loss = training.model(training.x).square().mean()
    loss.backward()
    del loss
    watch.start()
    for p in training.model.parameters():
        p.grad = None
    watch.stop("free")


def measured(step: Callable[[Stopwatch], None], seconds: float) -> dict[str, Timing]:
    with no_collector():
        for _ in range(5):
            step(Stopwatch())
        watch, end = Stopwatch(), time.monotonic() + seconds
        while time.monotonic() < end:
            step(watch)
    return {what: Timing(times) for what, times in watch.seconds.items()}


def run(args: argparse.Namespace, say: Say) -> Results:
    facts = measure.where(args.device) | {"commit": measure.commit(checkout()), "date": measure.now()}
    results, others = Results(facts), Others()
    cases = [(m, w, c) for m in args.methods for w in args.ways for c in args.micro_batches]
    steps = {case: Training(*case, args.device).step for case in cases}
    plain = Training("SAM", "closure", 1, args.device)
    steps[("any", "zero_grad of torch", 1)] = lambda watch: free(plain, watch)
    medians: dict[tuple, dict[str, list[float]]] = {case: {} for case in steps}
    for i in range(args.rounds):  # in turns, so that a slow spell meets all
        for case, step in steps.items():
            say(f"round {i + 1} of {args.rounds}: {case[0]}, {case[1]}, m = {case[2]}")
            for what, timing in measured(step, args.seconds).items():
                medians[case].setdefault(what, []).append(timing.median)
    for (method, way, count), calls in medians.items():
        for what in CALLS:
            if what in calls:
                timing = Timing(calls[what])
                row = {"us": timing.median * 1e6, "iqr_us": timing.iqr * 1e6, "rounds": len(timing.seconds)}
                results.add(method=method, way=way, micro_batches=count, call=what, **row)
    results.facts["others_cpu_share"] = round(others.share(), 3)
    return results


def checkout() -> Path:
    """Of the package that is measured."""
    import msam_kernels

    return Path(msam_kernels.__file__).resolve().parent.parent


def report(results: Results) -> None:
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in results.rows:
        case = cells.setdefault((row["method"], row["way"], row["micro_batches"]), {})
        case[row["call"]] = f"{number(row['us'])} ± {number(row['iqr_us'])}"
    names = [f"{method}, {way}, m = {count}" for method, way, count in cells]
    rows = [(name, *(case.get(call, "") for call in CALLS)) for name, case in zip(names, cells.values(), strict=True)]
    print_table(("µs of the host", *CALLS), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["SAM", "F-SAM", "GSAM"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 4], metavar="N")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seconds", type=float, default=1.0, help="for a case in a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    if min(args.micro_batches) < 1 or args.rounds < 1 or not 0 < args.seconds < math.inf:
        parser.error("--micro-batches, --rounds and --seconds must be positive")
    torch.set_num_threads(1)
    results = run(args, lambda text: print(text, file=sys.stderr, flush=True))
    report(results)
    if args.csv:
        results.write(args.csv)
        print(f"\nmeasurements: {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
