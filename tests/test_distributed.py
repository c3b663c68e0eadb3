# SPDX-License-Identifier: Apache-2.0
"""Several ranks under DistributedDataParallel, over gloo on one machine: each is a process, and one run of them serves a table.

What they should do is the plain loops' work in this process, over the micro-batches of all ranks.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from msam_kernels import MicroBatchSAM, methods
from plain import METHODS, WAYS, PlainSAM, batch, closure_of, loss_of, mlp, same_bits, split, weights

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
]

DDP = nn.parallel.DistributedDataParallel
FLOAT64 = torch.float64
BASES = {"SGD": lambda params: SGD(params, lr=0.1, momentum=0.9), "AdamW": lambda params: AdamW(params, lr=0.02)}
STEPS = 5
SAMPLES = 4  # of a micro-batch

# ---- ranks -----------------------------------------------------------------------------------------------------------


class Messages:
    """Counts what goes over the wire: (bytes, of how many ranks) of every all-reduce, DDP's own among them."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.of_ddp = 0
        self._all_reduce = dist.all_reduce
        dist.all_reduce = self._counted

    def _counted(self, tensor: Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        self.sent.append((tensor.nbytes, dist.get_world_size(group)))
        return self._all_reduce(tensor, *args, group=group, **options)

    def watch(self, ddp: DDP) -> DDP:
        def hook(_, bucket):  # as torch reads annotations, none
            self.of_ddp += 1
            tensor = bucket.buffer().div_(dist.get_world_size())
            return self._all_reduce(tensor, async_op=True).get_future().then(lambda future: future.value()[0])

        ddp.register_comm_hook(None, hook)
        return ddp

    def take(self) -> tuple[list[tuple[int, int]], int]:
        sent, self.sent = self.sent, []
        of_ddp, self.of_ddp = self.of_ddp, 0
        return sent, of_ddp


def _rank(rank: int, world: int, folder: str, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(job(rank, *args), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def on_ranks(world: int, folder: Path, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``job(rank, *args)`` returns on each of so many processes."""
    folder.mkdir(exist_ok=True, parents=True)
    mp.spawn(_rank, (world, str(folder), job, args), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


# ---- every method: each rank its own perturbation --------------------------------------------------------------------


class Case(NamedTuple):
    method: str
    count: int  # micro-batches of each rank
    base: str = "SGD"
    way: str = "passes"
    ascent: str = "local"
    parallel: bool = False
    sizes: tuple[int, ...] = ()  # samples of each rank, where they differ

    def __str__(self) -> str:
        words = [self.method, f"m={self.count}", self.base, self.way]
        words += ["parallel"] * self.parallel + [f"samples {self.sizes}"] * bool(self.sizes)
        return ", ".join(words) + ("" if self.ascent == "local" else f", {self.ascent}")

    def data(self, step: int, world: int) -> list[tuple[Tensor, Tensor]]:
        """Of every rank."""
        sizes = self.sizes or (SAMPLES * self.count,) * world
        return split(batch(sum(sizes), FLOAT64, seed=step), sizes)


EVERY = [Case(method, count, base) for method in METHODS for count in (1, 4) for base in BASES]
OTHERS = [
    *(Case(method, 4, way=way) for method in METHODS for way in ("closures", "train_step")),
    *(Case(method, 4, "AdamW", "train_step", parallel=True) for method in METHODS),
    *(Case(method, 2, sizes=(12, 5), way=way) for method in METHODS for way in ("passes", "train_step")),
]
PADDED = sum(-(-p.numel() // 16) * 16 for p in mlp().parameters()) + 16  # elements in a message: fp64, and a flag by parameter


def train(rank: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
    messages, out = Messages(), []
    for case in cases:
        model = mlp(FLOAT64)
        ddp = messages.watch(DDP(model))
        opt = MicroBatchSAM(
            BASES[case.base](ddp.parameters()),
            num_micro_batches=case.count,
            method=METHODS[case.method],
            model=ddp,
            ascent=case.ascent,
            parallel=case.parallel,
        )
        done: dict[str, Any] = {"weights": [], "messages": []}
        messages.take()
        for step in range(STEPS):
            WAYS[case.way](opt, ddp, case.data(step, dist.get_world_size())[rank])
            done["weights"].append(weights(model))
            done["messages"].append(messages.take())
        out.append(done)
    return out


class PlainRanks(PlainSAM):
    """The plain loops over the micro-batches of all ranks: those of a rank have their own mean gradient."""

    def __init__(self, *args: Any, world: int, **options: Any):
        super().__init__(*args, **options)
        self.world, self.emas = world, [{} for _ in range(world)]

    def step(self, closures, shares=None, before=None):
        self.count, self.turn = len(closures) // self.world, 0
        if self.sparse and not self.mask and self.looks:  # the first mask: by the first micro-batch of all ranks
            params = [p for group in self.base.param_groups for p in group["params"]]
            firsts = [self._backward(params, closure) for closure in closures[:: self.count]]
            self.scores = {p: sum(g[p].square() for g in firsts) for p in params}
            self._choose_mask(params, self.steps)
        super().step(closures, shares, before)

    def _gradients(self, rho, closure, share=1.0):
        rank = self.turn // self.count
        self.ema, self.turn = self.emas[rank], self.turn + 1
        descent = super()._gradients(rho, closure, share)
        self.emas[rank] = self.ema
        return descent


def trained_plainly(case: Case, world: int) -> list[list[Tensor]]:
    model = mlp(FLOAT64)
    theirs = PlainRanks(BASES[case.base](model.parameters()), method=METHODS[case.method], world=world)
    out = []
    for step in range(STEPS):
        parts = []
        for data in case.data(step, world):
            n = len(data[0])
            parts += split(data, [n // case.count + (i < n % case.count) for i in range(case.count)])
        whole = sum(len(x) for x, _ in parts)
        shares = [len(x) / whole for x, _ in parts]
        if case.way == "closures":
            shares = [1 / len(parts)] * len(parts)
        theirs.step([closure_of(model, part) for part in parts], shares)
        out.append(weights(model))
    return out


def check_table(cases: Sequence[Case], ranks: list[list[dict[str, Any]]]) -> None:
    """Same bits on all ranks, equal to one process, one message of P a step and one of the numbers of samples."""
    wrong = {}
    for case, *results in zip(cases, *ranks, strict=True):
        expected = trained_plainly(case, len(ranks))
        first = results[0]
        plan = METHODS[case.method].full
        for step in range(STEPS):
            actual = first["weights"][step]
            if not all(same_bits(actual, other["weights"][step]) for other in results):
                wrong[str(case), step] = "ranks part"
            error = max(float((a - b).abs().max()) for a, b in zip(actual, expected[step], strict=True))
            if not error <= 1e-10:
                wrong[str(case), step] = f"off by {error}"
            whole, few = PADDED * 8, 16  # bytes
            of_memory = bool(plan.keeps) and (case.method != "LookSAM k=2" or step % 2 == 0)
            wanted = [(whole, len(ranks))] * (1 + of_memory) + [(few, len(ranks))] * (case.way != "closures")
            sent, of_ddp = first["messages"][step]
            sent = [message for message in sent if not plan.sparse or message[0] in (whole, few)]
            if sorted(sent) != sorted(wanted) or of_ddp:
                wrong[str(case), step] = f"sent {sent} and {of_ddp} of DDP"
    assert wrong == {}


def test_local_ascents_equal_one_process_over_all_micro_batches(tmp_path):
    check_table(EVERY, on_ranks(2, tmp_path, train, EVERY))


def test_other_ways_and_shares_equal_one_process_too(tmp_path):
    check_table(OTHERS, on_ranks(2, tmp_path, train, OTHERS))


@pytest.mark.exhaustive
def test_four_ranks_equal_one_process(tmp_path):
    cases = EVERY + [case._replace(sizes=case.sizes and (12, 5, 3, 8)) for case in OTHERS]
    check_table(cases, on_ranks(4, tmp_path, train, cases))
