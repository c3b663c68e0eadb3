# SPDX-License-Identifier: Apache-2.0
"""What a sharpness-aware step costs beyond its backward passes: this package against plain PyTorch, side by side.

    python benchmarks/bench_step.py                  # small CNN, ResNet-18, 100M transformer; about ten minutes
    python benchmarks/bench_step.py --quick          # about a minute
    python benchmarks/bench_step.py --csv step.csv --plot step.png
    python benchmarks/bench_step.py --device cuda    # ResNet-18 and -50, ViT-B, transformers of 350M and 1.3G

How whole steps are measured, and who may be timed, stands in ``contest.py``; every kernel alone in ``kernels.py``.

* GB/s is the traffic that the fused step needs, divided by the time, for everybody: P passes over N values of the
  storage size. SAM with one micro-batch and SGD has P = 10 (norm 1, perturb 4, restore + update 5); for the rest see
  ``Case.passes``. It is compared with ``torch.Tensor.copy_`` of N values (one read and one write), the best of the
  medians taken along the way.
* "extra" is the most memory that a step holds at a time beyond gradients and what it held before, in units of the
  parameters; "error" is how far from plain torch in float64 the contestant moved the weights.

On a GPU, ``copy_`` is measured first, at 2 GiB, and once. Kernels alone are timed by events, with L2 flushed before each.
A step is timed by the wall clock until the device has finished; assignments that the host makes while the device works
cost nothing, so no step is taken for shorter than its kernels on the device. "host" is the time until the calls of one
micro-batch return, with nothing queued; "launches" are the host's, per micro-batch, a graph being one. What does not fit
the memory side by side is measured in turns, fewer contestants at a time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch loads: the memory check would warn

import torch

sys.path.insert(0, str(Path(__file__).parent))
import contest
import measure
import peers
from contest import FAMILY, LR, OURS, PASSES, TOLERANCE, Case, count_of, dtype_name
from gradients import Gradients
from measure import Clock, EventClock, Job, Say, interleave, number, print_table, size
from shapes import CPU_SHAPES, GPU_SHAPES, SHAPES

# What the first goal is stated against; compile has a goal of its own, the rest is shown for completeness.
GOAL_PEERS = ("loop", "foreach", "pytorch_optimizer")
# How many times faster: ours than the best of GOAL_PEERS, ours than compile, the passes loop than the best of GOAL_PEERS.
# On the CPU with SGD, fp32 and one micro-batch; on a GPU of the worst case over everything.
GOALS = {
    "cnn": (5.0, 4.0, 4.0),
    "resnet18": (1.9, 1.15, 1.6),
    "transformer100m": (2.2, 1.4, 1.8),
}
GPU_GOALS = {
    "resnet18": (5.0, 1.0, None),
    "resnet50": (5.0, 1.0, None),
    "transformer350m": (1.8, 1.0, None),
    "transformer1_3b": (1.8, 1.0, None),
}
# Each kernel alone, in shares of the bandwidth of copy_: on the CPU at 100M parameters, by what its name contains.
KERNEL_GOALS = {"perturb": 1.4, "sgd": 1.4, "adamw": 1.4, "": 1.0}
GPU_KERNEL_GOAL = 0.9  # from 100M parameters on
GPU_ASCEND_GOAL = 1.0  # for norm + perturb up to 15M parameters in fp32: part of it is read from L2
GPU_HOST_GOAL = 100.0  # µs per micro-batch, ResNet-50
GPU_LAUNCH_GOAL = 3  # per micro-batch

# -- report ------------------------------------------------------------------------------------------------------------


def kernel_goal(row: dict, gpu: bool) -> float:
    """The share of ``copy_``'s bandwidth that a kernel should reach; 0 where none was set."""
    name = row["contestant"]
    if gpu:
        small = name == "ascend" and row["numel"] <= 15e6 and row["dtype"] == "float32"
        return GPU_ASCEND_GOAL if small else GPU_KERNEL_GOAL if row["numel"] >= 1e8 else 0.0
    if row["shape"] != "transformer100m":
        return 0.0
    return next(goal for part, goal in KERNEL_GOALS.items() if part in name)


CASE_KEYS = ("shape", "dtype", "method", "base", "micro_batches")


def case_of(row: dict) -> dict[str, object]:
    return {key: row[key] for key in CASE_KEYS}


def what_of(row: dict) -> str:
    return f"{row['shape']}, {row['method']}, {row['base']}, m = {row['micro_batches']}"


def share(x: float | None) -> str:
    return f"{x:.0%}" if x is not None else "–"


class Results(measure.Results):
    @property
    def on_gpu(self) -> bool:
        return self.facts["device"] != "cpu"

    def finish_shape(self, shape: str, dtype: str) -> float:
        """Bandwidths and ratios, once the copy bandwidth of this shape is known; returns that."""
        rows = self.select(shape=shape, dtype=dtype)
        copies = [row for row in rows if row["kind"] == "copy"] or self.select(kind="copy", shape="copy")
        copy = max((row["gb_per_s"] for row in copies), default=math.nan)
        for row in rows:
            row["copy_gb_per_s"] = copy
            row["share_of_copy"] = row["gb_per_s"] / copy if row.get("gb_per_s") else None
        for row in self.select(shape=shape, dtype=dtype, kind="step"):
            others = {r["contestant"]: r["ms"] for r in self.select(kind="step", **case_of(row))}
            best = min((others[name] for name in GOAL_PEERS if name in others), default=None)
            row["best_peer_over_this"] = best / row["ms"] if best else None
            compiled = min((ms for name, ms in others.items() if name.startswith("compile")), default=None)
            row["compile_over_this"] = compiled / row["ms"] if compiled else None
        return copy


def timing_cells(row: dict) -> tuple[str, str, str, str]:
    return number(row["ms"]), f"± {number(row['iqr_ms'], 2)}", number(row["gb_per_s"]), share(row["share_of_copy"])


def print_shape(results: Results, shape: str, dtype: str) -> None:
    copy = results.finish_shape(shape, dtype)
    tensors = SHAPES[shape]()
    what = f"{shape}: {len(tensors)} tensors, {size(sum(map(math.prod, tensors)))} parameters, {dtype}"
    print(f"\n== {what}; copy_ moves {number(copy)} GB/s ==")
    if kernels := results.select(shape=shape, dtype=dtype, kind="kernel"):
        print("\n  every kernel alone")
        rows = []
        for row in kernels:
            goal = kernel_goal(row, results.on_gpu)
            rows.append((row["contestant"], f"{row['passes']:.3g}", *timing_cells(row), f"{goal:.0%}" if goal else ""))
        print_table(("kernel", "P", "ms", "iqr", "GB/s", "of copy_", "goal"), rows)
    steps = results.select(shape=shape, dtype=dtype, kind="step")
    for case, rows in itertools.groupby(steps, key=case_of):
        print(f"\n  {case['method']}, {case['base']}, {count_of(case['micro_batches'])}: ms per step")
        print_case(results, sorted(rows, key=lambda row: row["ms"]))
    sys.stdout.flush()


def print_case(results: Results, rows: list[dict]) -> None:
    ours = next((row["ms"] for row in rows if row["contestant"] == OURS), None)
    lines = []
    for row in rows:
        ratio = f"{row['ms'] / ours:.2f}x" if ours else ""
        line = [row["contestant"], *timing_cells(row), ratio, number(row["extra_over_parameters"], 2)]
        line.append(f"{row['deviation']:.0e}")
        if results.on_gpu:
            line += [number(row["device_ms"]), number(row["host_us"]), number(row["launches"])]
        lines.append(line)
    header = ("", "ms", "iqr", "GB/s", "of copy_", "ms / ours", "extra / P", "error")
    print_table(header + (("device ms", "host µs", "launches") if results.on_gpu else ()), lines)


def goals(results: Results) -> list[tuple[str, str, str, str]]:
    """(what, measured in the worst case, goal, verdict) of everything that was set and measured."""
    lines, gpu = [], results.on_gpu

    def judge(what: str, rows: list[dict], key: str, goal: float, text: Callable[[float], str], *, least: bool) -> None:
        rows = [row for row in rows if row.get(key) is not None]
        if not rows:
            return
        worst = (min if least else max)(rows, key=lambda row: row[key])
        reached = worst[key] >= goal if least else worst[key] <= goal
        where = worst["contestant"] if worst["kind"] == "kernel" else f"{worst['method']}, m = {worst['micro_batches']}"
        measured = f"{text(worst[key])} ({worst['dtype']}, {where})"
        lines.append((what, measured, f"{'≥' if least else '≤'} {text(goal)}", "reached" if reached else "not reached"))

    def times(what: str, rows: list[dict], key: str, goal: float | None) -> None:
        if goal is not None:
            judge(what, rows, key, goal, "{:.2f}x".format, least=True)

    chosen = {} if gpu else {"dtype": "float32", "base": "sgd", "micro_batches": 1}
    steps = [row for row in results.select(kind="step", **chosen) if row["method"] in ("SAM", "F-SAM")]
    for shape in dict.fromkeys(row["shape"] for row in results.rows if row["kind"] in ("kernel", "step")):
        best, compiled, loop = (GPU_GOALS if gpu else GOALS).get(shape, (None, 1.0 if gpu else None, None))
        of = {name: [r for r in steps if r["shape"] == shape and r["contestant"] == name] for name in (OURS, PASSES)}
        peers = ", ".join(GOAL_PEERS)
        times(f"{shape}: times faster than the best of {peers}", of[OURS], "best_peer_over_this", best)
        times(f"{shape}: times faster than the best compiled", of[OURS], "compile_over_this", compiled)
        times(f"{shape}, passes loop: than the best of {peers}", of[PASSES], "best_peer_over_this", loop)
        kernels: dict[float, list[dict]] = {}
        for row in results.select(kind="kernel", shape=shape):
            kernels.setdefault(kernel_goal(row, gpu), []).append(row)
        for goal in sorted(goal for goal in kernels if goal):
            what = "norm + perturb" if gpu and goal == GPU_ASCEND_GOAL else "slowest kernel"
            judge(f"{shape}: share of copy_, {what}", kernels[goal], "share_of_copy", goal, "{:.0%}".format, least=True)
    ours = results.select(kind="step", contestant=OURS)
    at_resnet50 = [row for row in ours if row["shape"] == "resnet50"]
    judge("resnet50: host time per micro-batch", at_resnet50, "host_us", GPU_HOST_GOAL, "{:.0f} µs".format, least=False)
    judge("launches per micro-batch", ours, "launches", GPU_LAUNCH_GOAL, "{:.3g}".format, least=False)
    return lines


def losses(results: Results) -> list[str]:
    """Every place where somebody else is faster, where we allocate, and where a kernel misses its goal."""
    lines = []
    for row in results.select(kind="step", contestant=OURS):
        for other in results.select(kind="step", **case_of(row)):
            if other["contestant"] not in (OURS, PASSES) and other["ms"] < row["ms"]:
                lines.append(f"{what_of(row)}: {other['contestant']} takes {other['ms'] / row['ms']:.0%} of our time")
    for row in results.select(kind="step"):
        if row["contestant"] in (OURS, PASSES) and (row["extra_over_parameters"] or 0) > 0.1:
            allocated = row["extra_over_parameters"]
            lines.append(f"{what_of(row)}: {row['contestant']} allocates {allocated:.2f} P in a step")
    for row in results.select(kind="kernel"):
        goal, reached = kernel_goal(row, results.on_gpu), row["share_of_copy"]
        if goal and reached < goal:
            lines.append(f"{row['shape']}, kernel {row['contestant']}: {reached:.0%} of copy_, goal {goal:.0%}")
    return lines


def print_goals(results: Results) -> None:
    """The project's goals, each with what was measured, and where we lose."""
    if lines := goals(results):
        print("\n== goals: whole steps and kernels, each with its worst case ==\n")
        print_table(("", "measured", "goal", ""), lines)
    if results.select(contestant=OURS):
        print("\nWhere we lose:" + ("".join(f"\n  {line}" for line in losses(results)) or " nowhere in this run."))


def plot(results: Results, path: Path) -> None:
    """Bars per shape and method: how many times our time everybody takes, grouped by micro-batches, with ms on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = results.select(kind="step")
    panels = list(dict.fromkeys((r["method"], r["base"], r["dtype"]) for r in steps))
    shapes = list(dict.fromkeys(r["shape"] for r in steps))
    names = [n for n in (OURS, PASSES, *peers.PEERS) if any(r["contestant"] == n for r in steps)]
    figure, axes = plt.subplots(
        len(panels), len(shapes), figsize=(5.6 * len(shapes), 3.6 * len(panels) + 0.9), squeeze=False, sharex="col"
    )
    for (method, base, dtype), line in zip(panels, axes, strict=True):
        for shape, axis in zip(shapes, line, strict=True):
            here = [
                r for r in steps if (r["method"], r["base"], r["dtype"], r["shape"]) == (method, base, dtype, shape)
            ]
            draw_case(axis, here, names)
            if here:
                what = f"{shape}, {size(here[0]['numel'])} parameters · {method} · {base} · {dtype}"
                axis.set_title(what, fontsize=10)
        line[0].set_ylabel("times our time" if OURS in names else "ms")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color(n)) for n in names]
    figure.legend(handles, names, loc="lower center", ncol=len(names), frameon=False, fontsize=9)
    facts = results.facts
    figure.suptitle(
        "What a sharpness-aware step costs beyond its backward passes (on the bars: ms per step; lower is better)\n"
        f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def color(name: str) -> str:
    known = dict(zip(peers.PEERS, ("#b0563a", "#d98b5f", "#e8c39e", "#5b7db1", "#9c7fb5"), strict=False))
    return {OURS: "#1b7f3b", PASSES: "#7cc494", **known}.get(name, "grey")


def draw_case(axis, rows: list[dict], names: list[str]) -> None:
    """A group of bars for every number of micro-batches, a bar in it for each of ``names``."""
    counts = sorted({r["micro_batches"] for r in rows})
    unit = {r["micro_batches"]: r["ms"] for r in rows if r["contestant"] == OURS}
    width = 0.86 / len(names)
    for row in rows:
        ratio = row["ms"] / unit.get(row["micro_batches"], 1)
        height = min(ratio, 12) if unit else ratio  # One that is far off must not flatten the others.
        at = counts.index(row["micro_batches"]) + (names.index(row["contestant"]) - (len(names) - 1) / 2) * width
        label = f" {number(row['ms'])}" + (" ↑" if height < ratio else "")
        axis.bar(at, height, width * 0.94, color=color(row["contestant"]))
        axis.text(at, height, label, rotation=90, ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(counts)), [count_of(m) for m in counts])
    axis.margins(y=0.22)
    axis.spines[["top", "right"]].set_visible(False)
    if unit:
        axis.axhline(1, color=color(OURS), linewidth=0.8, linestyle="--")


# -- run ---------------------------------------------------------------------------------------------------------------


def run_kernels(results: Results, where: dict, gradients: Gradients, args: argparse.Namespace, say: Say) -> None:
    from kernels import kernel_calls

    on_gpu = args.device.type == "cuda"
    kernels = kernel_calls(gradients, args.backend)
    if not on_gpu:
        kernels["copy_"] = 2, contest.copy_call(gradients)
    clock = EventClock(args.device) if on_gpu else Clock(args.device)
    with torch.no_grad():
        timings = interleave({n: call for n, (_, call) in kernels.items()}, measure.effort(args), clock, say=say)
    for name, timing in timings.items():
        kind = "copy" if name == "copy_" else "kernel"
        contest.add_timing(results, gradients, timing, kernels[name][0], kind=kind, contestant=name, **where)


def jobs(results: Results, args: argparse.Namespace) -> Generator[Job, None, None]:
    """Shape by shape, whose results are printed when its last job is done."""
    names = [*([] if args.peers_only else [OURS, PASSES]), *args.peers]
    for shape, dtype in itertools.product(args.shapes, (getattr(torch, name) for name in args.dtype)):
        gradients = Gradients(SHAPES[shape](), dtype, args.device)
        where = contest.where(shape, gradients)
        try:
            if not (args.no_kernels or args.peers_only):
                yield f"{shape}, {dtype_name(dtype)}, kernels", partial(run_kernels, results, where, gradients, args)
            for base in [] if args.no_steps else args.base:
                # Compiled functions serve all methods and micro-batches of one shape; those of others only cost guards.
                torch.compiler.reset()
                for method, m in itertools.product(args.methods, args.micro_batches):
                    case = Case(shape, method, base, dtype, m, args.backend)
                    yield str(case), partial(contest.run_case, results, case, where, gradients, names, args)
        finally:
            del gradients
            print_shape(results, shape, dtype_name(dtype))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__, seconds=6.0, rounds=30)
    contest.add_arguments(parser)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: what suits the device")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--methods", nargs="+", choices=FAMILY, default=["SAM", "F-SAM"])
    parser.add_argument("--base", nargs="+", choices=list(LR), default=["sgd"])
    parser.add_argument(
        "--dtype", nargs="+", choices=[dtype_name(d) for d in TOLERANCE], help="default: float32; on a GPU bfloat16 too"
    )
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, help="default: all that suit the device")
    parser.add_argument("--peers-only", action="store_true", help="leave out msam_kernels")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the kernels on their own")
    parser.add_argument("--no-steps", action="store_true", help="leave out the whole steps")
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="two shapes, 1 and 4 micro-batches, SAM, less time per case"
    )
    args = parser.parse_args(argv)
    if args.quick:
        given = set(sys.argv[1:] if argv is None else argv)
        quick = {"shapes": ["cnn", "resnet18"], "micro_batches": [1, 4], "methods": ["SAM"], "seconds": 2.0}
        for name, value in quick.items():
            if "--" + name.replace("_", "-") not in given:
                setattr(args, name, value)
    args.shapes = args.shapes or list(CPU_SHAPES if args.device.type == "cpu" else GPU_SHAPES)
    args.dtype = args.dtype or (["float32"] if args.device.type == "cpu" else ["float32", "bfloat16"])
    args.peers = peers.peers_for(args.device) if args.peers is None else args.peers
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    versions = contest.versions(None if args.peers_only else args.backend, args.device)
    results = measure.begin(args, "Optimizer time of a sharpness-aware step", Results, **versions)
    if versions["backend"] == "reference":
        print("That is plain torch, the specification: see `python -m msam_kernels info` for how to get the fast one.")
    if args.device.type == "cuda":
        copy = measure.copy_bandwidth(args.device) / 1e9
        print(f"copy_ of 2 GiB moves {number(copy)} GB/s, read and written")
        results.add(kind="copy", shape="copy", dtype="float32", contestant="copy_", passes=2, gb_per_s=copy)
    kernels, steps = not (args.no_kernels or args.peers_only), not args.no_steps
    of_shape = kernels + steps * len(args.base) * len(args.methods) * len(args.micro_batches)
    total = len(args.shapes) * len(args.dtype) * of_shape
    failed = measure.run(jobs(results, args), total, results, args)
    print_goals(results)
    status = measure.conclude(results, args, failed)
    if args.plot:
        plot(results, args.plot)
        print(f"picture: {args.plot}")
    return status


if __name__ == "__main__":
    sys.exit(main())
