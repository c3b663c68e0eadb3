# SPDX-License-Identifier: Apache-2.0
"""Optimizer time of every method of the family: this package against a plain loop, and pytorch_optimizer where it has it.

    python benchmarks/bench_family.py                          # ResNet-18 shapes; about a minute
    python benchmarks/bench_family.py --shape cnn --csv family.csv

As in ``bench_step.py``: no model runs, prepared gradients are assigned to ``p.grad``, what that costs is subtracted, all
contestants take turns in one process, times are medians over rounds. One micro-batch, SGD with momentum. What is timed is a
period of five steps, in which LookSAM perturbs once; the table says milliseconds per step.

Before anything is timed, ours and the loop must agree: after two periods on a quadratic problem in float64, the weights lie
closer than 1e-12 of the way walked. ``pytorch_optimizer`` is held to 1e-6, apart from its LookSAM, which projects and scales
tensor by tensor, not globally, and so computes something else.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import measure
from bench_step import Gradients, add_timing, bytes_per_pass, copy_call, torch_base
from measure import Clock, Effort, Others, Results, interleave, no_collector, number, print_table, size
from msam_kernels import MicroBatchSAM, __version__, methods
from shapes import SHAPES

PERIOD = 5  # steps
GOAL = 2.0  # times faster than either
OURS, LOOP, PACKAGE = "ours", "loop", "pytorch_optimizer"
EPS = 1e-12

FAMILY = {
    "SAM": methods.SAM(),
    "ASAM": methods.AdaptiveSAM(),
    "F-SAM": methods.FriendlySAM(),
    "Stable SAM": methods.StableSAM(),
    "Sparse SAM": methods.SparseSAM(update_every=None),
    "LookSAM": methods.LookSAM(k=PERIOD),
    "Bilateral SAM": methods.BilateralSAM(),
    "GSAM": methods.GapSAM(),
}
# Passes over all parameters, gradients or state that a step's kernels make: norm 1, perturb 4, restore + SGD 5 for SAM.
# Sparse adds its mask, LookSAM is (16 + 4 · 7) / 5.
PASSES = {
    **{"SAM": 10, "ASAM": 11, "F-SAM": 13, "Stable SAM": 11, "Sparse SAM": 10 + 1 / 32},
    **{"LookSAM": 8.8, "Bilateral SAM": 17, "GSAM": 13},
}


def bodies(name: str) -> int:
    """Passes of forward and backward in a period."""
    return {"LookSAM": PERIOD + 1, "Bilateral SAM": 3 * PERIOD}.get(name, 2 * PERIOD)


# -- contestants: (parameters) -> one step, which calls ``feed`` for every forward and backward --------------------------

Step = Callable[[Callable[[], None]], object]


def make_ours(name: str, params: list[nn.Parameter], rho: float) -> Step:
    opt = MicroBatchSAM(torch_base(params, "sgd"), rho=rho, method=method_at(name, rho))
    if opt.method.sparse:
        opt.mask = half(params)
    return opt.step


def method_at(name: str, rho: float) -> methods.SAM:
    return methods.BilateralSAM(rho_min=rho / 2) if name == "Bilateral SAM" else FAMILY[name]


def half(params: list[nn.Parameter]) -> list[Tensor]:
    """A mask of every other element."""
    return [(torch.arange(p.numel()) % 2 == 0).view(p.shape) for p in params]


class Loop:
    """One parameter at a time, as a competent user would write the rules."""

    def __init__(self, name: str, params: list[nn.Parameter], rho: float):
        self.name, self.params, self.rho, self.method = name, params, rho, method_at(name, rho)
        self.base = torch_base(params, "sgd", foreach=False)
        self.saved = [torch.empty_like(p) for p in params]
        self.ema: list[Tensor] | None = None
        self.v: list[Tensor] = []
        self.mask = [m.to(p) for m, p in zip(half(params), params, strict=True)] if self.method.sparse else None
        self.steps = 0

    def take(self, feed: Callable[[], None]) -> list[Tensor]:
        with torch.enable_grad():
            feed()
        grads = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return grads

    @torch.no_grad()
    def step(self, feed: Callable[[], None]) -> None:
        g = self.take(feed)
        self.steps += 1
        if self.method.look and (self.steps - 1) % self.method.look.k:
            factor = self.method.alpha * norm(g) / (norm(self.v) + EPS)
            for t, v in zip(g, self.v, strict=True):
                t.add_(v * factor)
            self.update(g)
            return
        e = self.perturbation(g)
        for p, w, d in zip(self.params, self.saved, e, strict=True):
            w.copy_(p)
            p.add_(d)
        at_e = self.take(feed)
        behind = None
        if self.name == "Bilateral SAM":
            for p, w, d in zip(self.params, self.saved, e, strict=True):
                torch.sub(w, d, alpha=self.method.rho_min / self.rho, out=p.data)
            behind = self.take(feed)
        for p, w in zip(self.params, self.saved, strict=True):
            p.copy_(w)
        self.update(self.descent(g, at_e, behind))

    def perturbation(self, g: list[Tensor]) -> list[Tensor]:
        if self.name == "ASAM":
            stretches = [p.abs() + self.method.eta for p in self.params]
            stretched = [t * d for t, d in zip(stretches, g, strict=True)]
            scale = self.rho / (norm(stretched) + EPS)
            return [t * d * scale for t, d in zip(stretches, stretched, strict=True)]
        d = g
        if self.name == "F-SAM":
            if self.ema is None:
                self.ema = [t.clone() for t in g]
            else:
                d = [torch.sub(t, m, alpha=self.method.sigma) for t, m in zip(g, self.ema, strict=True)]
                for t, m in zip(g, self.ema, strict=True):
                    m.mul_(self.method.lmbda).add_(t, alpha=1 - self.method.lmbda)
        scale = self.rho / (norm(d) + EPS)
        if self.mask is not None:
            return [t * scale * m for t, m in zip(d, self.mask, strict=True)]
        return [t * scale for t in d]

    def descent(self, g: list[Tensor], at_e: list[Tensor], behind: list[Tensor] | None) -> list[Tensor]:
        if self.name == "Stable SAM":
            factor = norm(g) / (norm(at_e) + EPS)
            return [t.mul_(factor) for t in at_e]
        if self.name == "GSAM":
            along = dot(g, at_e) / dot(at_e, at_e)
            return [b.sub_((a - along * b), alpha=self.method.alpha) for a, b in zip(g, at_e, strict=True)]
        if self.name == "LookSAM":
            along = dot(g, at_e) / (dot(g, g) + EPS)
            self.v = [b - along * a for a, b in zip(g, at_e, strict=True)]
        if behind is not None:
            factor = norm(at_e) / (norm(behind) + EPS)
            return [b.add_(a).sub_(c * factor) for a, b, c in zip(g, at_e, behind, strict=True)]
        return at_e

    def update(self, grads: list[Tensor]) -> None:
        for p, t in zip(self.params, grads, strict=True):
            p.grad = t
        self.base.step()
        self.base.zero_grad()


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


def dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def make_package(name: str, params: list[nn.Parameter], rho: float) -> Step | None:
    """pytorch_optimizer's class as its documentation shows; None where it has none with this rule, or is not there."""
    try:
        import pytorch_optimizer
    except ImportError:
        return None
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    if name == "SAM":
        opt = pytorch_optimizer.SAM(params, torch.optim.SGD, rho=rho, **options)
    elif name == "LookSAM":
        opt = pytorch_optimizer.LookSAM(params, torch.optim.SGD, rho=rho, k=PERIOD, alpha=0.7, **options)
    elif name == "GSAM":
        constant = type("Constant", (), {"step": lambda self: rho})()
        opt = pytorch_optimizer.GSAM(params, torch_base(params, "sgd"), nn.Module(), constant, alpha=0.4)
    else:
        return None

    @torch.no_grad()
    def step(feed):
        if name == "GSAM":  # its closure clears the gradients first
            opt.step(lambda: (opt.base_optimizer.zero_grad(), feed()))
            opt.base_optimizer.zero_grad()
            return
        feed()
        perturbs = name == "SAM" or opt.get_step() % PERIOD == 0
        opt.first_step(zero_grad=perturbs)
        if perturbs:  # its step(closure) would run the second pass in every step
            feed()
        opt.second_step(zero_grad=True)

    return step


MAKERS = {
    OURS: make_ours,
    LOOP: lambda name, params, rho: Loop(name, params, rho).step,
    PACKAGE: make_package,
}

# -- equality, time ------------------------------------------------------------------------------------------------------


def checked_feed(gradients: Gradients, params: list[nn.Parameter]) -> Callable[[], None]:
    """Gradient of <M_i, w> + c_i/2 ||w - w_0||², another i in each call."""
    calls = itertools.count()

    @torch.no_grad()
    def assign() -> None:
        i = next(calls)
        for p, w, g in zip(params, gradients.weights, gradients.masters[i % len(gradients.masters)], strict=True):
            p.grad = (p - w).mul_(1 + (i % 3) / 4).add_(g)

    return assign


def feed(gradients: Gradients, params: list[nn.Parameter]) -> Callable[[], None]:
    upcoming: Iterator[list[Tensor]] = itertools.cycle(gradients.sets)

    def assign() -> None:
        for p, g in zip(params, next(upcoming), strict=True):
            p.grad = g

    return assign


def check(name: str, shapes: list[tuple[int, ...]], device: torch.device) -> dict[str, float]:
    """Distance from the loop's weights after two periods, in float64, relative to the way walked.

    Raises:
        SystemExit: somebody computes something else.
    """
    gradients = Gradients(shapes, torch.float64, device)
    walked: dict[str, list[nn.Parameter]] = {}
    for who, make in MAKERS.items():
        params = gradients.parameters()
        step = make(name, params, gradients.rho)
        if step is None:
            continue
        feed_ = checked_feed(gradients, params)
        for _ in range(2 * PERIOD):
            step(feed_)
        walked[who] = params

    def distance(one, other) -> float:
        return math.sqrt(sum((a - b).square().sum().item() for a, b in zip(one, other, strict=True)))

    way = distance(walked[LOOP], gradients.weights)
    far = {who: distance(params, walked[LOOP]) / way for who, params in walked.items() if who != LOOP}
    limits = {OURS: 1e-12, PACKAGE: math.inf if name == "LookSAM" else 1e-6}
    wrong = [f"{who}: {far[who]:.1e} of {limits[who]:.0e}" for who in far if not far[who] <= limits[who]]
    if wrong:
        raise SystemExit(f"{name}: not the same step as the plain loop, and not timed: {', '.join(wrong)}")
    return far


def run_method(results: Results, name: str, gradients: Gradients, where: dict, args: argparse.Namespace, say) -> None:
    say(f"{name}: checking")
    far = check(name, SHAPES["cnn"](), args.device)

    def period(step, feed_):
        for _ in range(PERIOD):
            step(feed_)

    calls, extra = {}, {}
    for who, make in MAKERS.items():
        params = gradients.parameters()
        if (step := make(name, params, gradients.rho)) is not None:
            calls[who] = partial(period, step, feed(gradients, params))
            calls[who]()  # state and buffers
            extra[who] = measure.extra_memory(calls[who], args.device) / bytes_per_pass(gradients)
    bare = feed(gradients, gradients.parameters())
    everybody = {**calls, "assign": lambda: [bare() for _ in range(bodies(name))], "copy_": copy_call(gradients)}
    with no_collector():
        timings = interleave(
            everybody,
            args.effort,
            Clock(args.device),
            between=gradients.refill,
            say=lambda text: say(f"{name}: {text}"),
        )
    here = {**where, "method": name}
    add_timing(results, gradients, timings["copy_"], passes=2, kind="copy", contestant="copy_", **here)
    for who in calls:
        timings[who].seconds[:] = [(s - timings["assign"].median) / PERIOD for s in timings[who].seconds]
        passes = PASSES[name]
        add_timing(
            results, gradients, timings[who], passes=passes, kind="step", contestant=who, **here,
            deviation=far.get(who), extra_over_parameters=extra[who],
        )  # fmt: skip


def print_results(results: Results) -> None:
    copy = max(row["gb_per_s"] for row in results.select(kind="copy"))
    print(f"copy_ moves {number(copy)} GB/s\n")
    rows = []
    for name in FAMILY:
        if not results.select(kind="step", method=name):
            continue
        times = {row["contestant"]: row for row in results.select(kind="step", method=name)}
        ours = times[OURS]
        line = [name, number(ours["ms"]), f"± {number(ours['iqr_ms'], 2)}", f"{ours['passes']:.3g}"]
        line += [f"{ours['gb_per_s'] / copy:.0%}", f"{ours['extra_over_parameters']:.2f}"]
        for who in (LOOP, PACKAGE):
            if who in times:
                ratio = times[who]["ms"] / ours["ms"]
                line += [number(times[who]["ms"]), f"{ratio:.2f}x{'' if ratio >= GOAL else ' <'}"]
            else:
                line += ["–", ""]
        rows.append(line)
    header = ("", "ours, ms", "iqr", "P", "of copy_", "extra / P", "loop, ms", "", "pytorch_optimizer, ms", "")
    print_table(header, rows)
    print(f"\nGoal: {GOAL:g} times faster than either; '<' marks what is not.")


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="resnet18")
    parser.add_argument(
        "--methods", nargs="+", choices=FAMILY, default=list(FAMILY), metavar="NAME", help=", ".join(FAMILY)
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=8.0, help="time per method; at least five rounds are taken")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    args.effort = Effort(args.seconds, (min(5, args.rounds), args.rounds))
    return args


def main(argv=None) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    gradients = Gradients(SHAPES[args.shape](), torch.float32, args.device)
    facts = {**measure.where(args.device), "msam_kernels": __version__, PACKAGE: measure.installed(PACKAGE)}
    results, others = Results({**facts, "commit": measure.commit(), "date": measure.now()}), Others()
    where = {"shape": args.shape, "dtype": "float32", "numel": gradients.numel, "tensors": len(gradients.weights)}
    print(f"Optimizer time of the family, {results.facts['date'][:10]}, commit {results.facts['commit']}")
    print(f"{facts['machine']}; {facts['device']}, {facts['threads']} threads, torch {facts['torch']}")
    print(
        f"{args.shape}: {where['tensors']} tensors, {size(gradients.numel)} parameters; SGD momentum, one micro-batch"
    )
    bar = measure.Progress(len(args.methods), "methods")
    for name in args.methods:
        run_method(results, name, gradients, where, args, bar.say)
        bar.update()
        if args.csv:  # whatever may come
            results.write(args.csv)
    bar.clear()
    print_results(results)
    measure.conclude(results, others, args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
