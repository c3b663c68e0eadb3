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
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
import measure
from gradients import Backward, Gradients
from measure import Others, Results, Timing, number, print_table, size
from shapes import CPU_SHAPES, SHAPES

PERIOD = 5  # steps
WAYS = ("closure", "passes")
METHODS = {"SAM": "SAM", "F-SAM": "FriendlySAM", "GSAM": "GapSAM", "LookSAM": "LookSAM"}
HERE = Path(__file__).resolve().parent.parent


class Case(NamedTuple):
    shape: str
    method: str
    way: str
    micro_batches: int


# -- the process of one checkout ---------------------------------------------------------------------------------------


class Child:
    """Takes steps of a case, and tells what they cost."""

    def __init__(self, device: torch.device, backend: str):
        self.device, self.backend = device, backend
        self.shape: str | None = None

    def begin(self, shape: str, method: str, way: str, micro_batches: int) -> dict[str, Any]:
        """Another case: how far the first period moves the weights, and the seconds that the second one takes in all."""
        from msam_kernels import MicroBatchSAM, methods

        self.step = None
        gc.collect()
        if shape != self.shape:
            self.gradients = Gradients(SHAPES[shape](), torch.float32, self.device, sets=2)
            self.shape = shape
        params = self.gradients.parameters()
        base = torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4)
        rule = getattr(methods, METHODS[method])()
        opt = MicroBatchSAM(base, rho=0.05, method=rule, num_micro_batches=micro_batches, backend=self.backend)
        backward = Backward(self.gradients, params)
        samples = torch.zeros(micro_batches)

        def passes() -> None:
            for _ in opt.passes(samples):
                backward()
            opt.step()
            opt.zero_grad()

        def closure() -> None:
            opt.step(backward if micro_batches == 1 else [backward] * micro_batches)

        self.backward, self.step, self.bodies = backward, {"passes": passes, "closure": closure}[way], 2 * micro_batches
        self._period()
        weights = zip(params, self.gradients.weights, strict=True)
        way_walked = math.sqrt(sum((p.detach() - w).double().square().sum().item() for p, w in weights))
        start = time.perf_counter()
        self._period()
        return {"wall": time.perf_counter() - start, "walked": way_walked}

    def round(self, periods: int) -> float:
        """Seconds of a step: the median of some periods."""
        with measure.no_collector():
            return Timing([self._period() for _ in range(periods)]).median

    def _period(self) -> float:
        """Seconds of a step, without the making of gradients."""
        seconds = 0.0
        for _ in range(PERIOD):
            self.backward.prepare(self.bodies)
            self._synchronize()
            start = time.perf_counter()
            self.step()
            self._synchronize()
            seconds += time.perf_counter() - start - self.backward.seconds
        return seconds / PERIOD

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def serve(checkout: Path, threads: int, device: torch.device, backend: str) -> None:
    """Answers every line on stdin, a request as JSON, by a line on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(threads)
    import msam_kernels

    if checkout not in Path(msam_kernels.__file__).resolve().parents:
        raise SystemExit(f"{checkout} has no package msam_kernels that could be imported")
    child = Child(device, backend)
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        print(json.dumps(getattr(child, request)(*arguments)), file=answers, flush=True)


class Checkout:
    """The other end of a process."""

    def __init__(self, path: Path, args: argparse.Namespace):
        self.path = path
        command = [sys.executable, __file__, "--child", str(path), "--threads", str(args.threads)]
        command += ["--device", str(args.device), "--backend", args.backend]
        environment = {**os.environ, "PYTHONPATH": str(path)}
        # What a step frees is handed out again instead of being given back to the system: less noise.
        environment |= {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def ask(self, request: str, *arguments: object) -> Any:
        """The answer; raises ``SystemExit`` where the process died, whose own words are on stderr."""
        try:
            self.process.stdin.write(json.dumps([request, *arguments]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"the process of {self.path} died; it was asked to {request} {arguments}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# -- in turns ----------------------------------------------------------------------------------------------------------


class Pair:
    """Both checkouts' times of a case, one entry per round."""

    def __init__(self) -> None:
        self.before, self.after, self.walked = Timing(), Timing(), (0.0, 0.0)

    @property
    def ratio(self) -> Timing:
        return Timing([b / a for a, b in zip(self.before.seconds, self.after.seconds, strict=True)])


def take_rounds(pair: Pair, checkouts: Sequence[Checkout], case: Case, args: argparse.Namespace, say: Callable) -> None:
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
    ratio = pair.ratio
    results.add(
        **case._asdict(),
        numel=numel,
        before_ms=pair.before.median * 1e3,
        before_iqr_ms=pair.before.iqr * 1e3,
        after_ms=pair.after.median * 1e3,
        after_iqr_ms=pair.after.iqr * 1e3,
        ratio=ratio.median,
        ratio_iqr=ratio.iqr,
        rounds=len(ratio.seconds),
    )
    before, after = pair.walked
    if not abs(after / before - 1) < 1e-4:
        results.note(f"{case}: the weights moved by {before:.6g} before and by {after:.6g} after: not the same step")


def print_results(results: Results) -> None:
    rows = []
    for row in results.rows:
        what = f"{row['shape']} ({size(row['numel'])}), {row['method']}, {row['way']}, m = {row['micro_batches']}"
        before, after = (f"{number(row[k + '_ms'])} ± {number(row[k + '_iqr_ms'], 2)}" for k in ("before", "after"))
        rows.append((what, before, after, f"{row['ratio']:.3f}", f"± {row['ratio_iqr']:.3f}"))
    print_table(("one step, ms", "before", "after", "ratio", "iqr"), rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("before", type=Path, nargs="?", help="a checkout, built")
    parser.add_argument("after", type=Path, nargs="?", default=HERE, help="another one")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(CPU_SHAPES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10, help="of each checkout and case, in every turn")
    parser.add_argument("--turns", type=int, default=2, help="pairs of processes")
    parser.add_argument("--seconds", type=float, default=6.0, help="for a case in a turn; no round is cut short")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--backend", default="auto", help="of msam_kernels")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not (args.before or args.child):
        parser.error("which checkout is to be compared with this one?")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.child:
        serve(args.child.resolve(), args.threads, args.device, args.backend)
        return 0
    paths = [path.resolve() for path in (args.before, args.after)]
    commits = [measure.commit(path) for path in paths]
    facts = {**measure.where(args.device), "threads": args.threads, "backend": args.backend}
    facts |= {"before": commits[0], "after": commits[1], "date": measure.now()}
    results, others = Results(facts), Others()
    print(
        f"Steps of two checkouts, {facts['date'][:10]}: before is {paths[0]} ({commits[0]}), after {paths[1]} ({commits[1]})"
    )
    print(f"{facts['machine']}; {facts['device']}, {args.threads} threads, torch {facts['torch']}\n")
    cases = [Case(*c) for c in itertools.product(args.shapes, args.methods, args.ways, args.micro_batches)]
    pairs = {case: Pair() for case in cases}
    progress = measure.Progress(len(cases) * args.turns, "cases")
    for turn in range(args.turns):
        checkouts = [Checkout(path, args) for path in paths]
        try:
            for case in cases:
                what = f"turn {turn + 1}/{args.turns}, {', '.join(map(str, case))}"
                take_rounds(pairs[case], checkouts, case, args, lambda text, w=what: progress.say(f"{w}: {text}"))
                progress.update()
                if turn == args.turns - 1:
                    add_result(results, case, pairs[case])
                    if args.csv:  # whatever may come
                        results.write(args.csv)
        finally:
            for checkout in checkouts:
                checkout.close()
    progress.clear()
    print_results(results)
    measure.conclude(results, others, args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
