# SPDX-License-Identifier: Apache-2.0
"""Several ranks under DistributedDataParallel, over gloo on one machine: each is a process, and one run of them serves a table.

What they should do is the plain loops' work in this process, over the micro-batches of all ranks.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from msam_kernels import MicroBatchSAM, checkpoint, methods
from plain import (
    METHODS,
    WAYS,
    PlainRanks,
    PlainSAM,
    batch,
    closure_of,
    loss_of,
    mlp,
    of_both_and_own,
    off,
    on_ranks,
    same_bits,
    split,
    weights,
)

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
IN_GROUPS = [
    *(
        Case(method, count, way=way, ascent="group")
        for method in METHODS
        for count in (1, 3)
        for way in ("passes", "train_step")
    ),
    *(Case(method, 2, sizes=(12, 5), ascent="group") for method in METHODS),
]
#: Of each method every way, though not all of them with each other.
SHORT = [
    *(Case(method, *ways[i % 2]) for i, method in enumerate(METHODS) for ways in (
        [(1, "SGD"), (4, "AdamW")], [(4, "SGD", "train_step"), (1, "AdamW", "train_step")],
        [(4, "AdamW", "closures"), (4, "SGD")],
    )),
    *OTHERS[2 * len(METHODS) : 3 * len(METHODS)],
    *(Case(method, 2, sizes=(12, 5), way=("passes", "train_step")[i % 2]) for i, method in enumerate(METHODS)),
    *(Case(method, 2, sizes=(12, 5), ascent="group", way=("train_step", "passes")[i % 2]) for i, method in enumerate(METHODS)),
]  # fmt: skip
PADDED = (
    sum(-(-p.numel() // 16) * 16 for p in mlp().parameters()) + 16
)  # elements in a message: fp64, and a flag by parameter


def train(rank: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
    messages, out = Messages(), []
    pairs = [dist.new_group([k, k + 1]) for k in range(0, dist.get_world_size(), 2)]
    for case in cases:
        model = mlp(FLOAT64)
        ddp = messages.watch(DDP(model))
        opt = MicroBatchSAM(
            BASES[case.base](ddp.parameters()),
            num_micro_batches=case.count,
            method=METHODS[case.method],
            model=ddp,
            ascent=pairs[rank // 2] if case.ascent == "group" else case.ascent,
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


def parts_of(case: Case, step: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of all who perturb alike, of the first of them first."""
    each = []
    for data in case.data(step, world):
        n = len(data[0])
        each.append(split(data, [n // case.count + (i < n % case.count) for i in range(case.count)]))
    if case.ascent == "group":  # the i-th of both are one
        pairs = zip(each[::2], each[1::2], strict=True)
        each = [[tuple(map(torch.cat, zip(*both, strict=True))) for both in zip(*pair, strict=True)] for pair in pairs]
    return [part for parts in each for part in parts]


def trained_plainly(case: Case, world: int) -> list[list[Tensor]]:
    model = mlp(FLOAT64)
    several = world // 2 if case.ascent == "group" else world
    theirs = PlainRanks(BASES[case.base](model.parameters()), method=METHODS[case.method], world=several)
    out = []
    for step in range(STEPS):
        parts = parts_of(case, step, world)
        whole = sum(len(x) for x, _ in parts)
        shares = [1 / len(parts) if case.way == "closures" else len(x) / whole for x, _ in parts]
        theirs.step([closure_of(model, part) for part in parts], shares)
        out.append(weights(model))
    return out


def messages_of(case: Case, step: int, world: int) -> list[tuple[int, int]]:
    """(bytes, ranks) of the step's all-reduces."""
    plan, whole = METHODS[case.method].full, PADDED * 8
    looks = case.method != "LookSAM k=2" or step % 2 == 0
    sent = [(whole, world)] * (1 + (bool(plan.keeps) and looks))
    if case.ascent == "group" and plan.climbs and looks:
        sent += [(whole, 2)] * (case.count * (1 if not plan.combines else 2 if plan.opposite is None else 3))
    if case.way != "closures":  # the numbers of samples, and whether they are known
        sent += [(16, world)] + [(8 * 64, 2)] * (case.ascent == "group")
    if plan.sparse:
        every = plan.sparse.update_every
        chosen = (step == 0) + ((step + 1) % every == 0)
        sent += [((PADDED - 16) * 8, world)] * chosen + [(4, world)] * bool(
            chosen
        )  # scores, and whether all are finite
    return sorted(sent)


def check_table(cases: Sequence[Case], ranks: list[list[dict[str, Any]]]) -> None:
    """Same bits on all ranks, equal to one process, and no message but those that there must be."""
    wrong: dict[Any, str] = {}
    for case, *results in zip(cases, *ranks, strict=True):
        expected, first = trained_plainly(case, len(ranks)), results[0]
        for step in range(STEPS):
            actual = first["weights"][step]
            if not all(same_bits(actual, other["weights"][step]) for other in results):
                wrong[str(case), step] = "ranks part"
            error = off(actual, expected[step])
            if not error <= 1e-10:
                wrong[str(case), step] = f"off by {error}"
            sent, of_ddp = first["messages"][step]
            if sorted(sent) != messages_of(case, step, len(ranks)) or of_ddp:
                wrong[str(case), step] = f"sent {sent} and {of_ddp} of DDP"
    assert wrong == {}


def test_own_ascents_equal_one_process_over_the_micro_batches_of_all_ranks(tmp_path):
    check_table(SHORT, on_ranks(2, tmp_path, train, SHORT))


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [2, 4])
def test_own_ascents_equal_one_process_in_every_case(ranks, tmp_path):
    cases = [c._replace(sizes=c.sizes and (12, 5, 3, 8)[:ranks]) for c in EVERY + OTHERS + IN_GROUPS]
    check_table(cases, on_ranks(ranks, tmp_path, train, cases))


# ---- what DistributedDataParallel reduces, and what not --------------------------------------------------------------


def accumulated(ddp: DDP, opt: MicroBatchSAM, rank: int, step: int, loops: int, count: int) -> None:
    """Loops of which the last one alone synchronises, as ``accelerator.accumulate`` and HF's Trainer have it."""
    for k in range(loops):
        x, y = split(batch(8, FLOAT64, seed=100 * step + k), (4, 4))[rank]
        with ddp.no_sync() if k + 1 < loops else contextlib.nullcontext():
            for part in opt.passes(x, y) if count > 1 else opt.passes():
                (loss_of(ddp, *(part or (x, y))) / loops).backward()
    opt.step()
    opt.zero_grad()


def accumulate(rank: int) -> dict[str, Any]:
    """By case: the weights after a few steps, or what was refused. What is averaged here goes once, by the last loop."""
    out: dict[str, Any] = {}
    messages = Messages()
    for name in METHODS:
        for ascent, known, count, views in (
            ("global", False, 1, False),
            ("global", True, 1, True),
            ("global", True, 2, False),
            ("local", True, 1, False),
            ("local", True, 2, True),
        ):
            model = mlp(FLOAT64)
            ddp = DDP(model, gradient_as_bucket_view=views)
            opt = MicroBatchSAM(
                BASES["SGD"](model.parameters()),
                num_micro_batches=count,
                method=METHODS[name],
                model=ddp if known else None,
                ascent=ascent,
            )
            key = f"{name}, {ascent}, {'known' if known else 'unknown'}, m={count}"
            before = weights(model)
            try:
                for step in range(3):
                    accumulated(ddp, opt, rank, step, 3, count)
                    sent = [nbytes for nbytes, _ in messages.take()[0] if nbytes == PADDED * 8]
                    # LookSAM between its SAM steps: its own gradient sets a length, and goes apart from those of before.
                    assert len(sent) == (1 + bool(METHODS[name].full.keeps)) * (ascent == "local"), (
                        f"{key}: {len(sent)} messages"
                    )
                out[key] = weights(model)
            except RuntimeError as error:
                assert same_bits(model.parameters(), before) or step, key
                assert not opt.engine.step, key
                out[key] = str(error)
            dist.barrier()
    return out


#: For which a loop is a micro-batch of its own, of the rank alone: see docs/distributed.md.
LOOKS_AT_LOOPS = {"LookSAM k=2", "Sparse SAM", "F-SAM + Sparse + Stable"}


def accumulated_plainly(key: str) -> list[Tensor]:
    name, ascent, _, count = key.split(", ")
    model, m, loops = mlp(FLOAT64), int(count[2:]), 3
    theirs = PlainRanks(BASES["SGD"](model.parameters()), method=METHODS[name], world=2)
    for step in range(3):
        whole = [batch(8, FLOAT64, seed=100 * step + k) for k in range(loops)]
        each = [[part for data in whole for part in split(split(data, (4, 4))[r], [4 // m] * m)] for r in range(2)]
        backward = [[scaled_closure(model, part, 1 / loops) for part in parts] for parts in each]
        if ascent == "global":
            for i in range(-m, 0):
                both = tuple(map(torch.cat, zip(each[0][i], each[1][i], strict=True)))
                for closures in backward:
                    closures[i] = of_both_and_own(scaled_closure(model, both, 1 / loops), closures[i])
        theirs.step(backward[0] + backward[1], [1 / (2 * m)] * (2 * loops * m))
    return weights(model)


def scaled_closure(model: nn.Module, part: Sequence[Tensor], scale: float) -> Callable[[], None]:
    return lambda: (loss_of(model, *part) * scale).backward()


def test_gradients_that_others_accumulate_are_reduced_once_or_refused(tmp_path):
    first, second = on_ranks(2, tmp_path, accumulate)
    refused = set()
    for key, result in first.items():
        name = key.split(", ")[0]
        if isinstance(result, str):
            refused.add(key)
            assert second[key] == result
            assert 'ascent="local"' in result or "model=" in result
        else:
            assert same_bits(result, second[key]), key
        if not isinstance(result, str) and name not in LOOKS_AT_LOOPS:
            assert off(result, accumulated_plainly(key)) <= 1e-10, key
    combining = {name for name, method in METHODS.items() if method.full.combines}
    assert refused == {key for key in first if key.split(", ")[0] in combining and "global" in key}


# ---- one at a time ---------------------------------------------------------------------------------------------------

BAD = {"ascent": 0, "descent": 1}  # the pass whose loss overflows, on one rank


def of_all(tensors: Sequence[Tensor]) -> bool:
    """Whether they are the same bits on all ranks."""
    mine = torch.cat([t.detach().reshape(-1).double() for t in tensors])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return same_bits(theirs, [mine] * len(theirs))


def wrapped(method: methods.SAM, ascent: Any = "local", base: Callable = BASES["SGD"], **options: Any):
    model = mlp(FLOAT64)
    ddp = DDP(model)
    return model, ddp, MicroBatchSAM(base(model.parameters()), method=method, model=ddp, ascent=ascent, **options)


def overflows_on_one_rank(rank: int) -> Iterator[str]:
    """With a scaler: the step is skipped everywhere, and the scale is the same."""
    for name, method in METHODS.items():
        if method.full.after:  # it takes a step by gradients that a scaler does not see
            continue
        for bad, turn in BAD.items():
            for way in ("passes", "train_step"):
                model, ddp, opt = wrapped(method, num_micro_batches=2)
                scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
                if way == "train_step" and (method.full.lmbda or name == "LE-SAM"):
                    continue  # with a scaler these are refused
                fails = 3 if method.full.sparse else 2  # at the end of which a mask would be chosen
                for step in range(5):
                    data = split(batch(8, FLOAT64, seed=step), (4, 4))[rank]
                    before = weights(model)
                    bad_pass = turn * method.full.climbs if step == fails and rank == 1 else None

                    def loss(x, y, opt=opt, ddp=ddp, bad_pass=bad_pass):
                        return loss_of(ddp, x, y) * (float("inf") if opt.pass_index == bad_pass else 1.0)

                    if way == "train_step":
                        opt.train_step(loss, *data, scaler=scaler)
                    else:
                        for part in opt.passes(*data):
                            scaler.scale(loss(*part)).backward()
                        scaler.step(opt)
                        opt.zero_grad()
                    scaler.update()
                    where = f"{name}, {way}, overflow in the {bad}, step {step}"
                    if not of_all([*model.parameters(), torch.tensor(scaler.get_scale()), *(opt.mask or [])]):
                        yield f"{where}: ranks part"
                    looks = "LookSAM" not in name or turn == 0
                    if step == fails and looks and same_bits(model.parameters(), before) != (scaler.get_scale() < 4.0):
                        yield f"{where}: not skipped alike"
                    if step == fails and looks and scaler.get_scale() == 4.0:
                        yield f"{where}: not noticed"


def without_a_gradient(rank: int) -> Iterator[str]:
    """Parameters that one rank uses, and that nobody does."""
    for name, method in METHODS.items():
        for count in (1, 2):
            modules = nn.ModuleDict({"all": nn.Linear(3, 2), "one": nn.Linear(3, 2), "none": nn.Linear(3, 2)}).double()
            with torch.no_grad():
                for k, p in enumerate(modules.parameters()):
                    p.copy_(torch.arange(p.numel(), dtype=FLOAT64).view_as(p) * 0.1 - 0.03 * k)

            class Net(nn.Module):
                def forward(self, x: Tensor) -> Tensor:
                    return self.parts["all"](x) + (self.parts["one"](x) if rank == 1 else 0)

            net = Net()
            net.parts = modules
            ddp = DDP(net, find_unused_parameters=True)
            base = SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
            opt = MicroBatchSAM(base, method=method, model=ddp, ascent="local", num_micro_batches=count)
            start = {key: weights(m) for key, m in modules.items()}
            for step in range(4):
                data = split(batch(8, FLOAT64, seed=step), (4, 4))[rank]
                WAYS[("passes", "train_step")[step % 2]](opt, ddp, data)
                if not of_all(list(modules.parameters())):
                    yield f"{name}: ranks part in step {step}"
            moved = {key: not same_bits(m.parameters(), start[key]) for key, m in modules.items()}
            if moved != {"all": True, "one": True, "none": False}:
                yield f"{name}: moved {moved}"


def some_passes_without_a_reduction(rank: int) -> Iterator[str]:
    """The ascent in no_sync: right where gradients are not combined, also if one rank's overflows; else refused."""
    for name, method in METHODS.items():
        for count, overflow in ((1, 0), (2, None), (2, 0), (2, 1)):  # the micro-batch that does
            model, ddp, opt = wrapped(method, "global", num_micro_batches=count)
            before, refused = weights(model), ""
            try:
                for step in range(3):
                    data = split(batch(8, FLOAT64, seed=step), (4, 4))[rank]
                    for k, (x, y) in enumerate(opt.passes(*data)):
                        with ddp.no_sync() if opt.pass_index == 0 and method.full.climbs else contextlib.nullcontext():
                            first_pass = (1 + method.full.climbs) * (overflow or 0)
                            bad = overflow is not None and step == 1 and rank == 1 and k == first_pass
                            (loss_of(ddp, x, y) * (float("nan") if bad else 1.0)).backward()
                    if overflow is not None and step == 1 and all(p.grad.isfinite().all() for p in model.parameters()):
                        yield f"{name}: the overflow does not show on rank {rank}"
                    opt.step()
                    opt.zero_grad()
            except RuntimeError as error:
                refused = str(error)
            dist.barrier()
            if bool(refused) != (method.full.combines and method.full.climbs):
                yield f"{name}: {refused or 'not refused'}"
            if refused and not (same_bits(model.parameters(), before) and "ranks would part" in refused):
                yield f"{name}: refused too late: {refused}"
            if not of_all(list(model.parameters())):
                yield f"{name}: ranks part, overflow: {overflow}"


def only_the_last_descent_reduced(rank: int) -> Iterator[str]:
    """All passes but the last in no_sync: what the others left is reduced with it."""
    for name in ("SAM", "ASAM", "LE-SAM", "Stable SAM"):
        model, ddp, opt = wrapped(METHODS[name], "global", num_micro_batches=3)
        theirs = mlp(FLOAT64)
        plain = PlainSAM(BASES["SGD"](theirs.parameters()), method=METHODS[name])
        try:
            for step in range(3):
                each = split(batch(12, FLOAT64, seed=step), (6, 6))
                for k, (x, y) in enumerate(opt.passes(*each[rank])):
                    with ddp.no_sync() if k < 5 else contextlib.nullcontext():
                        loss_of(ddp, x, y).backward()
                opt.step()
                opt.zero_grad()
                plain.step([closure_of(theirs, part) for data in each for part in split(data, (2, 2, 2))])
        except RuntimeError as error:
            if name != "Stable SAM" or "ranks would part" not in str(error):
                yield f"{name}: {error}"
            continue
        finally:
            dist.barrier()
        if name == "Stable SAM" or off(weights(model), weights(theirs)) > 1e-10 or not of_all(list(model.parameters())):
            yield f"{name}: off by {off(weights(model), weights(theirs))}"


def given_up(rank: int) -> Iterator[str]:
    """A loop that is left gives weights, gradients and the module's flags back; DDP then works as before."""
    for name, method in METHODS.items():
        for ascent in ("local", "global"):
            model, ddp, opt = wrapped(method, ascent, num_micro_batches=1)
            data = split(batch(8, FLOAT64), (4, 4))[rank]
            if ascent == "local" or not method.full.combines:  # gradients that were there before
                with ddp.no_sync():
                    for x, y in opt.passes(*data):
                        loss_of(ddp, x, y).backward()
            held, before = weights(model), [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            flags = ddp.require_backward_grad_sync, ddp.require_forward_param_sync
            for x, y in opt.passes(*data):
                loss_of(ddp, x, y).backward()
                if opt.pass_index == method.full.climbs:
                    break
            if not same_bits(model.parameters(), held):
                yield f"{name}, {ascent}: weights"
            if not same_bits([p.grad for p in model.parameters()], before):
                yield f"{name}, {ascent}: gradients"
            if ascent == "local" and (ddp.require_backward_grad_sync, ddp.require_forward_param_sync) != flags:
                yield f"{name}, {ascent}: flags"
            opt.zero_grad()
            loss_of(ddp, *data).backward()
            if not of_all([p.grad for p in model.parameters()]):
                yield f"{name}, {ascent}: DistributedDataParallel does not reduce any more"


def refusals(rank: int) -> Iterator[str]:
    def refuses(words: str, kind: type[Exception], f: Callable[[], Any]) -> Iterator[str]:
        try:
            f()
        except kind as error:
            if words not in str(error):
                yield f"{words}: {error}"
        else:
            yield f"{words}: not refused"

    model, ddp, opt = wrapped(methods.SAM(), "global")
    data = split(batch(8, FLOAT64), (4, 4))[rank]
    before = weights(model)

    def in_no_sync() -> None:
        with ddp.no_sync():
            opt.train_step(lambda x, y: loss_of(ddp, x, y), *data)

    yield from refuses("updates at once", RuntimeError, in_no_sync)
    if not same_bits(model.parameters(), before):
        yield "weights"
    base = SGD(model.parameters(), lr=0.1)
    yield from refuses("needs model=", ValueError, lambda: MicroBatchSAM(base, ascent="local"))
    yield from refuses("needs model=", ValueError, lambda: MicroBatchSAM(base, ascent="local", model=model))
    yield from refuses("'global', 'local'", ValueError, lambda: MicroBatchSAM(base, ascent="own", model=ddp))
    yield from refuses("process group", TypeError, lambda: MicroBatchSAM(base, ascent=3, model=ddp))
    group = dist.group.WORLD
    yield from refuses("parallel=", ValueError, lambda: MicroBatchSAM(base, ascent=group, model=ddp, parallel=True))
    model, ddp, opt = wrapped(methods.SAM())

    def other_model() -> None:
        opt.model = model

    yield from refuses("needs model=", ValueError, other_model)

    def exchanges(name: str, value: Any) -> None:
        for _ in opt.passes(*data):
            setattr(opt, name, value)

    yield from refuses("another model inside", RuntimeError, lambda: exchanges("model", ddp))
    yield from refuses("another ascent inside", RuntimeError, lambda: exchanges("ascent", "global"))
    if not (ddp.require_backward_grad_sync and ddp.require_forward_param_sync):
        yield "DDP is held back for good"
    # Where the module comes after the optimizer.
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1))
    yield from refuses("needs model=", ValueError, lambda: setattr(opt, "ascent", "local"))
    opt.model = ddp
    yield from refuses("'global', 'local'", ValueError, lambda: setattr(opt, "ascent", "own"))
    if opt.ascent != "global":
        yield f"{opt.ascent} was refused"
    # The body of a loop that clears what is to be reduced with its last pass.
    model, ddp, opt = wrapped(methods.SAM(), "global")

    def clears() -> None:
        for sync in (False, True):
            with contextlib.nullcontext() if sync else ddp.no_sync():
                for x, y in opt.passes(*data):
                    model.zero_grad()
                    loss_of(ddp, x, y).backward()

    yield from refuses("were cleared", RuntimeError, clears)


def clipped_and_copied(rank: int) -> Iterator[str]:
    """Clipping sees the gradient of all ranks; a copy and a pickle keep the ascent."""
    for way in ("passes", "train_step"):
        model, ddp, opt = wrapped(methods.FriendlySAM(), num_micro_batches=2)
        seen: list[Tensor] = []
        for step in range(3):
            data = split(batch(8, FLOAT64, seed=step), (4, 4))[rank]

            def clip(model: nn.Module = model, seen: list[Tensor] = seen) -> None:
                seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))

            if way == "train_step":
                opt.train_step(lambda x, y: loss_of(ddp, x, y), *data, before_update=clip)  # noqa: B023
            else:
                for x, y in opt.passes(*data):
                    loss_of(ddp, x, y).backward()
                clip()
                opt.step()
                opt.zero_grad()
        if not of_all(seen) or not of_all(list(model.parameters())):
            yield f"{way}: norms {seen}"
    if copy.deepcopy(opt).ascent != "local" or "ascent='local'" not in repr(opt):
        yield "the copy"


def masks_by_samples(rank: int) -> Iterator[str]:
    model, ddp, opt = wrapped(methods.SparseSAM(update_every=None))
    data = split(batch(9, FLOAT64), (6, 3))[rank]
    opt.update_mask(lambda x, y: loss_of(ddp, x, y), *data)
    assert opt.mask is not None
    if not of_all(opt.mask):
        yield "masks part"
    plain = PlainSAM(SGD(model.parameters(), lr=0.1), method=methods.SparseSAM())
    plain.scores = {p: torch.zeros_like(p) for p in model.parameters()}
    for x, y in split(batch(9, FLOAT64), [1] * 9):
        for p, g in plain._backward(list(model.parameters()), closure_of(model, (x, y))).items():
            plain.scores[p] += g.square()
    plain._choose_mask(model.parameters(), 0)
    if not same_bits([m.byte() for m in opt.mask], [plain.mask[p].byte() for p in model.parameters()]):
        yield "not the mask of all samples"


def zero(rank: int) -> Iterator[str]:
    """ZeroRedundancyOptimizer as the base: trains as its optimizer, and its own state dict brings it back."""
    ZeroRedundancyOptimizer = importlib.import_module("torch.distributed.optim").ZeroRedundancyOptimizer
    for views in (False, True):
        for ascent in ("global", "local"):
            first = wrapped(methods.FriendlySAM(), ascent, BASES["AdamW"], num_micro_batches=2)
            sharded = partial(ZeroRedundancyOptimizer, optimizer_class=AdamW, parameters_as_bucket_view=views, lr=0.02)
            model, ddp, opt = wrapped(methods.FriendlySAM(), ascent, sharded, num_micro_batches=2)
            trio = [first, (model, ddp, opt)]
            for step in range(6):
                data = split(batch(8, FLOAT64, seed=step), (4, 4))[rank]
                for _, module, optimizer in trio:
                    WAYS[("passes", "train_step")[step % 2]](optimizer, module, data)
                if step == 2:
                    opt.base_optimizer.consolidate_state_dict(0)
                    files = [opt.state_dict() if rank == 0 else None]
                    dist.broadcast_object_list(files)
                    if len(files[0]["state"]) != 4:
                        yield f"views {views}, {ascent}: state of {len(files[0]['state'])} parameters"
                    trio.append(wrapped(methods.FriendlySAM(), ascent, sharded, num_micro_batches=2))
                    with torch.no_grad():
                        for p, q in zip(trio[2][0].parameters(), model.parameters(), strict=True):
                            p.copy_(q)
                    mine = {"msam": checkpoint.remembered(opt.engine)}  # the mean gradient is this rank's own
                    trio[2][2].load_state_dict(copy.deepcopy({**files[0], **mine}))  # torch loads without a copy
            if off(weights(model), weights(first[0])) > 1e-14 or not of_all(list(model.parameters())):
                yield f"views {views}, {ascent}: off by {off(weights(model), weights(first[0]))}"
            if not same_bits(model.parameters(), trio[2][0].parameters()):
                yield f"views {views}, {ascent}: the state dict does not bring it back"


def captured_steps(rank: int) -> Iterator[str]:
    """As CUDA graphs hold them, of which a recorder stands in for those of a GPU: messages come in every replay."""
    graphs = importlib.import_module("test_graphs")
    for name, method in METHODS.items():
        for parallel in (False, True):
            options = {"num_micro_batches": 2, "parallel": parallel}
            (model, ddp, opt), (other, plain_ddp, plain) = (wrapped(method, **options) for _ in range(2))
            data = split(batch(8, FLOAT64), (4, 4))[rank]
            step, recorder = graphs.captured(opt, model, lambda x, y, ddp=ddp: loss_of(ddp, x, y), *data)
            for k in range(8 if method.full.sparse else 5):
                data = split(batch(8, FLOAT64, seed=k), (4, 4))[rank]
                step(*data)
                plain.train_step(lambda x, y, ddp=plain_ddp: loss_of(ddp, x, y), *data)
                if not same_bits(model.parameters(), other.parameters()) or not of_all(list(model.parameters())):
                    yield f"{name}, parallel {parallel}: step {k}"
            if not recorder.replays:
                yield f"{name}: no replay"


def statistics(rank: int) -> Iterator[str]:
    """Each rank's own during steps; the first forward after them takes rank 0's, as DistributedDataParallel does."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    ddp = DDP(model)
    opt = MicroBatchSAM(SGD(ddp.parameters(), lr=0.1), model=ddp, ascent="local", num_micro_batches=2)
    for step in range(3):
        WAYS["passes"](opt, ddp, split(batch(8, FLOAT64, seed=step), (4, 4))[rank])
    mean = model[1].running_mean
    if of_all([mean]) or not of_all(list(model.parameters())):
        yield "statistics were sent, or weights were not"
    ddp.eval()
    with torch.no_grad():
        ddp(batch(4, FLOAT64)[0])
    if not of_all([mean]):
        yield "the forward after the steps does not take rank 0's"


def reduced_by_the_user(rank: int) -> Iterator[str]:
    """The whole loop in no_sync, and p.grad averaged after it."""
    for name, method in METHODS.items():
        model, ddp, opt = wrapped(method, "global", num_micro_batches=2)
        refused, before = "", weights(model)
        try:
            for step in range(4):
                with ddp.no_sync():
                    for x, y in opt.passes(*split(batch(8, FLOAT64, seed=step), (4, 4))[rank]):
                        loss_of(ddp, x, y).backward()
                for p in model.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= 2
                opt.step()
                opt.zero_grad()
        except RuntimeError as error:
            refused = str(error)
        dist.barrier()
        if bool(refused) != bool(method.full.after) or (refused and not same_bits(model.parameters(), before)):
            yield f"{name}: {refused or 'not refused'}"
        if not of_all(list(model.parameters())):
            yield f"{name}: ranks part"
    # A direction of the rank's own, in a step that DistributedDataParallel reduces.
    model, ddp, opt = wrapped(methods.LookSAM(k=2), "global")
    data = split(batch(8, FLOAT64), (4, 4))[rank]
    with ddp.no_sync():
        for x, y in opt.passes(*data):
            loss_of(ddp, x, y).backward()
    opt.step()
    opt.zero_grad()
    try:
        WAYS["passes"](opt, ddp, data)
        yield "LookSAM: a direction of one rank is reused by all"
    except RuntimeError as error:
        if "reuses" not in str(error):
            yield str(error)
    dist.barrier()


def other_numbers_of_micro_batches(rank: int) -> Iterator[str]:
    """Of a group are refused in the first step, and where they change, before anybody waits for the others."""
    model, ddp, opt = wrapped(methods.SAM(), dist.group.WORLD)
    data, before = split(batch(8, FLOAT64), (4, 4))[rank], weights(model)
    ranks, looked = opt.engine.ranks, []
    compare, ranks._compare = ranks._compare, lambda n: (looked.append(n), compare(n))
    for counts, wanted in (((1, 3), (1, 3)), ((2, 2), None), ((2, 2), None), ((4, 3), (4, 3)), ((4, 4), None)):
        opt.num_micro_batches, said = counts[rank], ""
        try:
            WAYS["passes"](opt, ddp, data)
        except RuntimeError as error:
            said = str(error)
        if wanted is None and (said or same_bits(model.parameters(), before) or not of_all(list(model.parameters()))):
            yield f"{counts}: {said or 'ranks part'}"
        if wanted is not None and (
            f"this rank has {wanted[rank]} micro-batches, and the 2 ranks of its group have {sum(wanted) / 2:g}"
            not in said
            or not same_bits(model.parameters(), before)
        ):
            yield f"{counts}: {said or 'not refused'}"
        before = weights(model)
    if looked != [(1, 3)[rank], 2, (4, 3)[rank], 4]:
        yield f"compared {looked}, not where its own has changed"


SCENARIOS = [
    overflows_on_one_rank, without_a_gradient, some_passes_without_a_reduction, only_the_last_descent_reduced, given_up,
    refusals, clipped_and_copied, masks_by_samples, zero, captured_steps, statistics,
    reduced_by_the_user, other_numbers_of_micro_batches,
]  # fmt: skip


def play(rank: int) -> dict[str, list[str]]:
    return {scenario.__name__: list(scenario(rank)) for scenario in SCENARIOS}


def test_scenarios(tmp_path):
    for complaints in on_ranks(2, tmp_path, play):
        assert complaints == {scenario.__name__: [] for scenario in SCENARIOS}


# ---- a rank that dies ------------------------------------------------------------------------------------------------


def train_until(rank: int, folder: str, begin: int, end: int, dies: int | None) -> list[list[Tensor]]:
    """All methods side by side, from a checkpoint of each rank where there is to be one; the weights at the end."""
    trained = {}
    for i, (name, method) in enumerate(METHODS.items()):
        trained[name] = model, _, opt = wrapped(method, base=BASES[list(BASES)[i % 2]], num_micro_batches=2)
        if begin:
            saved = torch.load(Path(folder, f"{name} {begin} {rank}.pt"), weights_only=True)
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["opt"])
    for step in range(begin, end):
        for i, (name, (model, ddp, opt)) in enumerate(trained.items()):
            data = split(batch(8, FLOAT64, seed=step), (4, 4))[rank]
            for k, part in enumerate(opt.passes(*data)):
                if dies == step and rank == 1 and i == len(trained) // 2 and k == 1:  # at w + e
                    os.kill(os.getpid(), signal.SIGKILL)
                loss_of(ddp, *part).backward()
            opt.step()
            opt.zero_grad()
            if dies is not None:
                saved = {"model": model.state_dict(), "opt": opt.state_dict()}
                torch.save(saved, Path(folder, f"{name} {step + 1} {rank}.pt"))
    return [weights(model) for model, _, _ in trained.values()]


def resume(rank: int, folder: str) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    return train_until(rank, folder, 3, 6, None), train_until(rank, folder, 0, 6, None)


@pytest.mark.exhaustive
def test_a_job_whose_rank_was_killed_in_a_perturbed_pass_goes_on_from_its_checkpoint(tmp_path):
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        on_ranks(2, tmp_path / "killed", train_until, str(tmp_path), 0, 6, 3)
    results = on_ranks(2, tmp_path / "resumed", resume, str(tmp_path))
    assert all(map(same_bits, results[0][1], results[1][1]))
    for resumed, uninterrupted in results:
        for case, mine, theirs in zip(METHODS, resumed, uninterrupted, strict=True):
            assert same_bits(mine, theirs), case
