# SPDX-License-Identifier: Apache-2.0
"""What weights of 16 bits leave of a perturbation, at initialisation: how long it arrives, where it points, what it does.

    python benchmarks/bench_precision.py                       # ResNet-18 and a small GPT; some two minutes
    python benchmarks/bench_precision.py --csv precision.csv
    python benchmarks/bench_precision.py --roundings "of masters"

Weights have 16 bits, or 32 for comparison; forward and backward compute in fp32, so that nothing but the rounding of w + e
differs. Of each perturbation, e as it arrived against e as it was asked for: the ratio of the lengths, the cosine, ``along``
(the product of the two), how many entries move, and how far the loss rises. The radius is SAM's usual one; ASAM's ten times
as large, as its authors have it, and the same. Data are random, and the same for all. Masters are what the weights were drawn
as, before they were rounded to bf16; of fp16, which has three bits more, an eighth as far from the weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import measure
from bench_train import ResNet, Task, Transformer, images, text
from measure import Results, number, print_table, size
from msam_kernels import MicroBatchSAM, methods

TASKS = {"resnet18": Task(ResNet, images(3, 32, 32), 8), "gpt": Task(Transformer, text(1000, 64), 8)}
METHODS = {("SAM", 0.05): methods.SAM(), ("ASAM", 0.5): methods.AdaptiveSAM(), ("ASAM", 0.05): methods.AdaptiveSAM()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [
    ("fp32", "nearest"),
    *((dtype, rounding) for dtype in ("bf16", "fp16") for rounding in ("nearest", "stochastic", "of masters")),
]
ROUNDINGS = list(dict.fromkeys(rounding for _, rounding in CASES))
LEFT = {"bf16": 1.0, "fp16": 2.0**-3}  # of a master, how much of what bf16 leaves out
SEEDS = 3  # of random rounding, whose means are told


def perturbed_once(task: Task, method: tuple[str, float], dtype: str, rounding: str, seed: int) -> dict[str, float]:
    """One ascent."""
    torch.manual_seed(0)
    model = task.make()
    x, y = task.data(task.samples, torch.device("cpu"))
    kept = []
    for p in model.parameters():  # the same point for all: that of the fewest bits
        drawn, rounded = p.detach(), p.detach().to(torch.bfloat16)
        p.data = rounded.to(DTYPES[dtype])
        kept.append(rounded.float() + (drawn - rounded.float()) * LEFT.get(dtype, 0.0))
    options: dict[str, Any] = {"masters": rounding == "of masters"}
    if rounding == "stochastic":
        options |= {"rounding": rounding, "seed": seed}
    opt = MicroBatchSAM(torch.optim.SGD(model.parameters(), lr=0.1), method[1], method=METHODS[method], **options)
    if rounding == "of masters":
        state = {i: {"msam_master": master} for i, master in enumerate(kept)}
        opt.load_state_dict({**opt.state_dict(), "state": state})
    losses, points = [], []
    for _ in opt.passes():
        points.append([p.detach().float().clone() for p in model.parameters()])
        losses.append(loss(model, x, y))
        losses[-1].backward()
    arrived_sq, product, asked_sq = opt.engine.store.achieved(None, 1)[0].tolist()
    moved = [int((a != b).sum()) for a, b in zip(*points, strict=True)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "length": (arrived_sq / asked_sq) ** 0.5,
        "cosine": product / (arrived_sq * asked_sq) ** 0.5 if arrived_sq else 0.0,
        "along": float(opt.stats.along),
        "moved": sum(moved) / sum(p.numel() for p in model.parameters()),
        "loss": losses[0].item(),
        "rise": (losses[1] - losses[0]).item(),
    }


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    wide = {name: p.float() for name, p in model.named_parameters()}
    return F.cross_entropy(functional_call(model, wide, (x,)), y.flatten())


def measure_all(results: Results, names: Sequence[str], roundings: Sequence[str]) -> None:
    cases = [case for case in CASES if case[1] in roundings]
    for name in names:
        for method in METHODS:
            for dtype, rounding in cases:
                seeds = range(SEEDS if rounding == "stochastic" else 1)
                each = [perturbed_once(TASKS[name], method, dtype, rounding, seed) for seed in seeds]
                mean = {key: sum(one[key] for one in each) / len(each) for key in each[0]}
                case = {
                    "model": name,
                    "method": method[0],
                    "rho": method[1],
                    "weights": dtype,
                    "rounding": rounding,
                }
                results.add(**case, seeds=len(each), **mean)


def print_results(results: Results) -> None:
    for name in dict.fromkeys(row["model"] for row in results.rows):
        rows = [row for row in results.rows if row["model"] == name]
        print(f"\n{name}, {size(rows[0]['parameters'])} parameters, loss {rows[0]['loss']:.3f}")
        table = [
            (
                f"{row['method']}, rho {row['rho']:g}, {row['weights']}"
                + f", {row['rounding']}" * (row["weights"] != "fp32"),
                *(number(row[key]) for key in ("length", "cosine", "along")),
                f"{row['moved']:.1%}",
                f"{row['rise']:.4f}",
            )
            for row in rows
        ]
        print_table(("", "length", "cosine", "along", "moved", "loss rises by"), table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=ROUNDINGS)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    facts = {**measure.where(torch.device("cpu")), "commit": measure.commit(), "date": measure.now()}
    results = Results(facts)
    measure_all(results, args.models, args.roundings)
    print_results(results)
    if args.csv:
        results.write(args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
