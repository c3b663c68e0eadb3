# SPDX-License-Identifier: Apache-2.0
"""Two checkouts of this project against each other: whole steps of the optimizer, without a model.

    python benchmarks/compare.py ../before                      # against this checkout; all cases, many minutes
    python benchmarks/compare.py ../before ../after --shapes cnn --methods SAM GSAM --csv compare.csv

Both must be built. Each checkout has a process of its own, which imports the package from there; the two are asked in
turns for a round of steps, in changing order, while the other one waits. Every so many rounds (``--turns``) both
processes are replaced, since where a process happens to have its memory can change its times by percents.

SGD with momentum in fp32, gradients as autograd leaves them (``gradients.py``); making them does not count. A time is the
mean over a period of five steps, in which LookSAM perturbs once; a round takes the median of its periods, the table the
median of the rounds. The ratio is the median of the ratios of neighbouring rounds, with its interquartile range: a ratio
of 0.9 says that the second checkout takes 10 % less time. Only the public interface is used: ``MicroBatchSAM`` and
``methods``. Where the two do not move the weights equally far in the first period, a note says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
import contest
import measure
from contest import FAMILY, OURS, PASSES, PERIOD
from gradients import Backward, Gradients, Steps
from measure import Clock, Failed, Job, Results, Say, Timing, number, print_table, size
from shapes import CPU_SHAPES, SHAPES

WAYS = {"closure": OURS, "passes": PASSES}
HERE = Path(__file__).resolve().parent.parent


class Case(NamedTuple):
    shape: str
    method: str
    way: str
    micro_batches: int


# -- the process of one checkout ---------------------------------------------------------------------------------------


class Child:
    """Takes steps of a case, and tells what they cost."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.clock = args, Clock(args.device)
        self.shape = ""

    def begin(self, *case: Any) -> dict[str, float]:
        """Another case: how far the first period moves the weights, and the seconds that the second one takes in all."""
        shape, method, way, m = case
        self.steps = None
        if shape != self.shape:
            self.gradients = Gradients(SHAPES[shape](), torch.float32, self.args.device)
            self.shape = shape
        case = contest.Case(shape, method, "sgd", torch.float32, m, self.args.backend)
        ours = contest.make_ours(WAYS[way], case, self.gradients)
        backward = Backward(self.gradients, ours.params)
        self.steps = Steps(ours.step, backward, case.bodies * m * PERIOD // case.period, PERIOD)
        self.clock(self.steps)
        weights = zip(ours.params, self.gradients.weights, strict=True)
        walked = math.sqrt(sum((p.detach() - w).double().square().sum().item() for p, w in weights))
        start = time.perf_counter()
        self.clock(self.steps)
        return {"wall": time.perf_counter() - start, "walked": walked}

    def round(self, periods: int) -> float:
        """Seconds of a step: the median of some periods."""
        with measure.no_collector():
            return Timing([self.clock(self.steps) / PERIOD for _ in range(periods)]).median


def serve(args: argparse.Namespace) -> None:
    """Answers every line on stdin, a request as JSON, by a line on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(args.threads)
    measure.keep_freed_memory()
    import msam_kernels

    if args.child.resolve() not in Path(msam_kernels.__file__).resolve().parents:
        raise SystemExit(f"{args.child} has no package msam_kernels that could be imported")
    child = Child(args)
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        try:
            answer = {"answer": getattr(child, request)(*arguments)}
        except Exception as error:
            answer = {"error": contest.first_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


class Checkout:
    """The other end of a process."""

    def __init__(self, path: Path, args: argparse.Namespace):
        self.path = path
        command = [sys.executable, __file__, "--child", str(path), "--threads", str(args.threads)]
        command += ["--device", str(args.device), "--backend", args.backend]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(path)}, **pipes)

    def ask(self, request: str, *arguments: object) -> Any:
        """The answer.

        Raises:
            Failed: the checkout raised an exception.
            SystemExit: its process died; its own words are on stderr.
        """
        try:
            self.process.stdin.write(json.dumps([request, *arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"the process of {self.path} died; it was asked to {request} {arguments}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.path}: {answer['error']}")
        return answer["answer"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# -- in turns ----------------------------------------------------------------------------------------------------------


class Pair:
    """Both checkouts' times of a case, one entry per round."""

    def __init__(self) -> None:
        self.before, self.after, self.walked = Timing(), Timing(), (0.0, 0.0)

    @property
    def ratio(self) -> Timing:
        return Timing([b / a for a, b in zip(self.before.seconds, self.after.seconds, strict=False)])


def take_rounds(pair: Pair, checkouts: Sequence[Checkout], case: Case, args: argparse.Namespace, say: Say) -> None:
    """Some rounds of ``case``, each as long as ``args.seconds`` for all of them allow, but one period at least."""
    say("begins")
    begun = [checkout.ask("begin", *case) for checkout in checkouts]
    pair.walked = tuple(b["walked"] for b in begun)
    wall = min(b["wall"] for b in begun)
    periods = max(1, min(200, int(args.seconds / (2 * args.rounds * wall))))
    for i in range(args.rounds):
        say(f"round {i + 1}/{args.rounds}, {periods} periods")
        order = (0, 1) if i % 2 == 0 else (1, 0)
        for k in order:
            if periods > 1:
                # The other one's round left the caches to it.
                checkouts[k].ask("round", 1)
            (pair.before, pair.after)[k].seconds.append(checkouts[k].ask("round", periods))


def add_result(results: Results, case: Case, pair: Pair) -> None:
    numel = sum(math.prod(s) for s in SHAPES[case.shape]())
    row = {**case._asdict(), "numel": numel}
    for name, timing in (("before", pair.before), ("after", pair.after)):
        row |= {f"{name}_ms": timing.median * 1e3, f"{name}_iqr_ms": timing.iqr * 1e3}
    results.add(**row, ratio=pair.ratio.median, ratio_iqr=pair.ratio.iqr, rounds=len(pair.ratio.seconds))
    before, after = pair.walked
    if not abs(after / before - 1) < 1e-4:
        results.note(f"{case}: the weights moved by {before:.6g} before and by {after:.6g} after: not the same step")


def print_results(results: Results) -> None:
    rows = []
    for row in results.rows:
        what = f"{row['shape']} ({size(row['numel'])}), {row['method']}, {row['way']}, m = {row['micro_batches']}"
        before, after = (f"{number(row[k + '_ms'])} ± {number(row[k + '_iqr_ms'], 2)}" for k in ("before", "after"))
        rows.append((what, before, after, f"{row['ratio']:.3f}", f"± {row['ratio_iqr']:.3f}"))
    if not rows:
        return
    print()
    print_table(("one step, ms", "before", "after", "ratio", "iqr"), rows)


def jobs(results: Results, args: argparse.Namespace, paths: list[Path]) -> Generator[Job, None, None]:
    cases = [Case(*c) for c in itertools.product(args.shapes, args.methods, args.ways, args.micro_batches)]
    pairs = {case: Pair() for case in cases}
    for turn in range(args.turns):
        checkouts = [Checkout(path, args) for path in paths]
        try:
            for case in cases:
                what = f"turn {turn + 1} of {args.turns}, {', '.join(map(str, case))}"
                yield what, partial(take_rounds, pairs[case], checkouts, case, args)
                if turn == args.turns - 1 and pairs[case].ratio.seconds:
                    add_result(results, case, pairs[case])
        finally:
            for checkout in checkouts:
                checkout.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__, seconds=6.0, rounds=10, unit="case and turn")
    parser.add_argument("before", type=Path, nargs="?", help="a checkout, built")
    parser.add_argument("after", type=Path, nargs="?", default=HERE, help="another one")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(CPU_SHAPES))
    parser.add_argument("--methods", nargs="+", choices=FAMILY, default=["SAM", "F-SAM", "GSAM", "LookSAM"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1])
    parser.add_argument("--turns", type=int, default=2, help="pairs of processes")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not (args.before or args.child):
        parser.error("which checkout is to be compared with this one?")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.child:
        serve(args)
        return 0
    paths = [path.resolve() for path in (args.before, args.after)]
    commits = {name: measure.commit(path) for name, path in zip(("before", "after"), paths, strict=True)}
    results = measure.begin(args, f"{paths[0]} and after it {paths[1]}", backend=args.backend, **commits)
    total = len(args.shapes) * len(args.methods) * len(args.ways) * len(args.micro_batches) * args.turns
    failed = measure.run(jobs(results, args, paths), total, results, args)
    print_results(results)
    return measure.conclude(results, args, failed)


if __name__ == "__main__":
    sys.exit(main())
