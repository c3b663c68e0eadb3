# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters (DTensors): FSDP2, HSDP, tensor parallelism, on ranks of gloo, against one process with the whole batch.

The cases of one number of ranks run one after the other in the same processes; each has a process group of its own, so that one
that fails leaves the others alone.
"""

from __future__ import annotations

import copy
import fcntl
import itertools
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from msam_kernels import MicroBatchSAM, methods
from plain import METHODS

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]

needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="the FSDP2 of this torch is for GPUs alone"
)
#: How the names of the cases begin that have no FSDP2.
WITHOUT_FSDP = (
    "2 ranks, TP",
    "stages_",
    "plain_parameters_",
    "all_ranks_",
    "equal_shards_",
    "shards_that_",
    "masters_go_",
)

SERVED = {name: method for name, method in METHODS.items() if method.full.sparse is None}
BASES = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: AdamW(params, lr=0.02, amsgrad=True),
    "RMSprop": lambda params: RMSprop(params, lr=0.01, momentum=0.5),
}
STEPS, BATCH, RHO = 3, 16, 0.3


class Net(nn.Module):
    """On two ranks one layer is sharded unevenly, and of another one rank holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a, self.b, self.n, self.c = nn.Linear(5, 8), nn.Linear(8, 3), nn.LayerNorm(3), nn.Linear(3, 1)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.n(self.b(torch.tanh(self.a(x)))))


def data(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(batch, 4, n, generator=generator, dtype=torch.float64) for n in (5, 1))
    return x, y


# ---- how parameters lie ------------------------------------------------------------------------------------------------


def mesh_of(**sizes: int) -> Any:
    return dist.device_mesh.init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def fully_sharded(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.a, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    """Sharded by columns and by rows; the norm's parameters are on all ranks, and its gradients partial sums."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    plan = {
        "a": ColwiseParallel(),
        "b": RowwiseParallel(output_layouts=Shard(1)),
        "n": SequenceParallel(),
        "c": RowwiseParallel(input_layouts=Shard(1)),
    }
    return parallelize_module(model, mesh, plan)


def fsdp(**options: Any) -> tuple[nn.Module, int, int]:
    """The model, and which part of the batch this rank takes, of how many."""
    mesh = mesh_of(dp=dist.get_world_size())
    return fully_sharded(Net(), mesh, **options), dist.get_rank(), dist.get_world_size()


def kept_after_backward() -> tuple[nn.Module, int, int]:
    model, *share = fsdp(reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    return model, *share


def offloaded() -> tuple[nn.Module, int, int]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return fsdp(offload_policy=CPUOffloadPolicy(pin_memory=False))


def hybrid() -> tuple[nn.Module, int, int]:
    mesh = mesh_of(replicas=2, shards=dist.get_world_size() // 2)
    return fully_sharded(Net(), mesh), dist.get_rank(), dist.get_world_size()


def tp() -> tuple[nn.Module, int, int]:
    return tensor_parallel(Net(), mesh_of(tp=dist.get_world_size())), 0, 1


def tp_beside_plain() -> tuple[nn.Module, int, int]:
    """The last two layers are ordinary parameters."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
    return parallelize_module(Net(), mesh_of(tp=dist.get_world_size()), plan), 0, 1


def fsdp_and_tp() -> tuple[nn.Module, int, int]:
    mesh = mesh_of(dp=dist.get_world_size() // 2, tp=2)
    model = fully_sharded(tensor_parallel(Net(), mesh["tp"]), mesh["dp"])
    return model, mesh["dp"].get_local_rank(), mesh["dp"].size()


LAYOUTS = {
    "FSDP2": fsdp,
    "FSDP2, kept after forward": partial(fsdp, reshard_after_forward=False),
    "FSDP2, kept after backward": kept_after_backward,
    "FSDP2, offloaded": offloaded,
    "TP": tp,
    "TP beside plain parameters": tp_beside_plain,
    "HSDP": hybrid,
    "FSDP2 x TP": fsdp_and_tp,
}


def mine(t: Tensor, m: int, part: int, parts: int) -> Tensor:
    """Of each of m micro-batches a rank's part."""
    return torch.cat([micro_batch.chunk(parts)[part] for micro_batch in t.chunk(m)])


# ---- one step ----------------------------------------------------------------------------------------------------------


def by_passes(opt: MicroBatchSAM, model: nn.Module, x: Tensor, y: Tensor, clip: float | None) -> None:
    for xb, yb in opt.passes(x, y):
        F.mse_loss(model(xb), yb).backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    opt.step()
    opt.zero_grad()


def by_train_step(opt: MicroBatchSAM, model: nn.Module, x: Tensor, y: Tensor, clip: float | None) -> None:
    between = partial(nn.utils.clip_grad_norm_, model.parameters(), clip) if clip else None
    opt.train_step(lambda xb, yb: F.mse_loss(model(xb), yb), x, y, before_update=between)


WAYS = {"passes": by_passes, "train_step": by_train_step}


class Messages(TorchDispatchMode):
    """What goes to other ranks meanwhile, by kind, and the elements that all-reduces of our own have."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.scalars = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f.namespace == "c10d":
            self.sent[f._schema.name] += 1
            if f._schema.name == "c10d::allreduce_":
                (tensors,) = args[:1]
                self.scalars += all(t.dtype == torch.float64 and t.numel() <= 6 for t in tensors)
        return f(*args, **(kwargs or {}))


def passes_and_norms(method: methods.SAM, m: int, step: int) -> tuple[int, int]:
    """Of one step: how often each micro-batch runs, all together, and how many sums go over all ranks."""
    plan = method.plan(step, lambda: True)
    norms = m * (plan.climbs + (plan.products > 0)) + plan.momentum + (2 if plan.reuses else 0)
    return m * (1 + plan.climbs + (plan.opposite is not None)), norms


# ---- what is compared --------------------------------------------------------------------------------------------------


def full(t: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(full(actual), full(expected), rtol=0, atol=1e-10, msg=lambda m: f"{what}: {m}")


def assert_same_bits_on_all_ranks(t: Tensor) -> None:
    everywhere = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, t.contiguous())
    assert all(torch.equal(t, other) for other in everywhere)


def assert_same_training(opt: MicroBatchSAM, one: MicroBatchSAM) -> None:
    """Weights, the base optimizer's state, and what the latest step recorded."""
    params = [[p for group in o.param_groups for p in group["params"]] for o in (opt, one)]
    for i, (p, q) in enumerate(zip(*params, strict=True)):
        assert_same(p, q, f"parameter {i}")
        assert_same_bits_on_all_ranks(full(p))
        assert opt.state[p].keys() == one.state[q].keys()
        for name, state in opt.state[p].items():
            assert_same(torch.as_tensor(state), torch.as_tensor(one.state[q][name]), f"{name} of parameter {i}")
            if name != "step":
                assert type(state) is type(p.data), name
                assert getattr(state, "placements", None) == getattr(p, "placements", None), name
    stats, wanted = opt.stats, one.stats
    for name in ("grad_norm", "perturbation_norm", "nonfinite"):
        assert_same(getattr(stats, name).double(), getattr(wanted, name).double(), name)
        assert_same_bits_on_all_ranks(getattr(stats, name).double())


def equals_one_process(
    layout: str, name: str, m: int, base: str, way: str, clip: float | None = None, only: bool = False,
    frozen: bool = False, backend: str = "auto",
) -> None:  # fmt: skip
    """Steps of a sharded model are those of one process on the whole batch; its messages are its own and one for each sum."""
    opts, x_y, make_step = [], data(), WAYS[way]
    sent: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    scalars = norms = 0
    is_fsdp = "FSDP2" in layout or layout == "HSDP"
    for sharded in (False, True):
        model, part, parts = LAYOUTS[layout]() if sharded else (Net(), 0, 1)
        if frozen:
            model.b.requires_grad_(False)
        method = SERVED[name] + methods.SAM(only=[*model.n.parameters(), model.c.bias]) if only else SERVED[name]
        opt = MicroBatchSAM(BASES[base](model.parameters()), RHO, num_micro_batches=m, method=method, backend=backend)
        opts.append(opt)
        x, y = (mine(t, m, part, parts) for t in x_y)
        plain: Counter[str] = Counter()
        if sharded:
            for _ in range(2):  # the first one initialises
                with Messages() as messages:
                    F.mse_loss(model(x), y).backward()
                opt.zero_grad()
                plain = messages.sent
        for step in range(STEPS):
            with Messages() as messages:
                make_step(opt, model, x, y, clip)
            sent, scalars = sent + messages.sent, scalars + messages.scalars
            passes, sums = passes_and_norms(method, m, step)
            norms += sums if sharded else 0
            wanted += Counter({kind: passes * n for kind, n in plain.items()})
    assert_same_training(opts[1], opts[0])
    if clip is None and is_fsdp and "TP" not in layout and "backward" not in layout:
        assert scalars == norms
        assert sent == wanted + Counter({"c10d::allreduce_": norms})


# ---- cases -------------------------------------------------------------------------------------------------------------


def pair(**options: Any) -> tuple[MicroBatchSAM, nn.Module, Tensor, Tensor]:
    """An optimizer of a model in FSDP2, and this rank's data."""
    model, part, parts = fsdp()
    options = {"num_micro_batches": 2, **options}
    opt = MicroBatchSAM(BASES["AdamW"](model.parameters()), RHO, **options)
    x, y = (mine(t, 2, part, parts) for t in data())
    return opt, model, x, y


def values_of(params: Any) -> list[Tensor]:
    return [full(p).clone() for p in params]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert [torch.equal(a, e) for a, e in zip(actual, expected, strict=True)] == [True] * len(expected)


def a_loop_that_is_left_brings_everything_back() -> None:
    opt, model, x, y = pair()
    by_passes(opt, model, x, y, None)
    F.mse_loss(model(x), y).backward()
    before, grads = values_of(model.parameters()), values_of(p.grad for p in model.parameters())
    for stop in range(4):
        with opt.passes(x, y) as parts:
            for i, (xb, yb) in enumerate(parts):
                F.mse_loss(model(xb), yb).backward()
                if i == stop:
                    break
        assert_equal(values_of(model.parameters()), before)
        assert_equal(values_of(p.grad for p in model.parameters()), grads)


def gradients_add_up_to_those_of_before() -> None:
    opt, model, x, y = pair()
    with pytest.raises(ZeroDivisionError):
        opt.step([lambda: 1 / 0] * 2)
    for _ in range(2):
        for xb, yb in opt.passes(x, y):
            F.mse_loss(model(xb), yb).backward()
    twice = values_of(p.grad for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    for xb, yb in opt.passes(x, y):
        F.mse_loss(model(xb), yb).backward()
    for a, p in zip(twice, model.parameters(), strict=True):
        assert_same(a / 2, p.grad)


def copies_that_were_gathered_of_other_weights_are_dropped() -> None:
    """A forward without a backward leaves the outermost module's parameters gathered."""
    from torch.distributed.fsdp import fully_shard

    x, y = data()
    root = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1)).double()
    fully_shard(root)
    opt = MicroBatchSAM(SGD(root.parameters(), lr=0.1), RHO)
    looked = []

    def look() -> None:
        with torch.no_grad():
            looked.append(root(x).clone())

    look()
    for xb, yb in opt.passes(x, y):
        F.mse_loss(root(xb), yb).backward()
        look()
    look()
    assert_equal(looked[3:], looked[:1])
    assert not torch.equal(looked[1], looked[2])
    opt.step()
    opt.zero_grad()
    look()
    w1, b1, w2, b2 = values_of(root.parameters())
    assert_same(looked[-1], F.linear(F.linear(x, w1, b1), w2, b2))


def an_error_inside_a_pass_leaves_the_weights() -> None:
    """As after any error there, torch wants ``reset_iter_state``."""
    opt, model, x, y = pair()
    before, turns = values_of(model.parameters()), iter(range(9))

    def fails() -> Tensor:
        loss = F.mse_loss(model(x), y)
        if next(turns) == 1:
            raise ZeroDivisionError
        loss.backward()
        return loss

    with pytest.raises(ZeroDivisionError):
        opt.step([fails, fails])
    assert_equal(values_of(model.parameters()), before)
    looked = model(x).detach()
    plain = Net()
    assert_same(looked, plain(x))


def state_goes_through_torchs_own_checkpoints() -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    opt, model, x, y = pair()
    for _ in range(2):
        by_passes(opt, model, x, y, None)
    whole = get_optimizer_state_dict(model, opt.base_optimizer, options=StateDictOptions(full_state_dict=True))
    parts = copy.deepcopy(get_optimizer_state_dict(model, opt.base_optimizer))
    weights = {name: full(p).clone() for name, p in model.state_dict().items()}
    again, other, *_ = pair()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, again.base_optimizer, parts)
    again.steps = opt.steps
    one = Net()
    one.load_state_dict(weights)
    alone = MicroBatchSAM(BASES["AdamW"](one.parameters()), RHO, num_micro_batches=2)
    box = [copy.deepcopy(whole)]  # which is rank 0's alone
    dist.broadcast_object_list(box, src=0)
    set_optimizer_state_dict(one, alone.base_optimizer, box[0])
    for o, net, mine_ in ((opt, model, (x, y)), (again, other, (x, y)), (alone, one, data())):
        by_train_step(o, net, *mine_, None)
    assert_equal(values_of(other.parameters()), values_of(model.parameters()))
    assert_same_training(opt, alone)


def own_state_dicts_go_on_where_they_were(name: str) -> None:
    opt, model, x, y = pair(method=SERVED[name])
    for _ in range(3):
        by_passes(opt, model, x, y, None)
    again, other, *_ = pair(method=SERVED[name])
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for o, net in ((opt, model), (again, other)):
        for _ in range(2):
            by_passes(o, net, x, y, None)
    assert_equal(values_of(other.parameters()), values_of(model.parameters()))
    assert_equal([again.stats.grad_norm], [opt.stats.grad_norm])


def a_direction_that_was_loaded_is_reused_by_all_ranks(empty: str) -> None:
    """Rank 1 has nothing of the head, whose parameters have buffers of their own; or nothing at all."""
    from torch.distributed.fsdp import fully_shard

    def fresh() -> tuple[MicroBatchSAM, nn.Module]:
        model = (
            nn.Linear(5, 1).double() if empty == "rank" else nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 1)).double()
        )
        fully_shard(model, mesh=mesh_of(dp=2))
        only = None if empty == "rank" else list(model[1].parameters())
        base = SGD(model.parameters(), lr=0.1, momentum=0.9)
        return MicroBatchSAM(base, RHO, method=methods.LookSAM(k=4, only=only)), model

    opt, model = fresh()
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = (torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (5, 1))
    for _ in range(2):
        by_passes(opt, model, x, y, None)
    again, other = fresh()
    other.load_state_dict(model.state_dict())
    for p in other.parameters():
        p.requires_grad_(False)  # what was trained is taken in all the same, on each rank
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    known = torch.tensor([float(again.engine.store.has_v()), float(len(again.engine.store.flats))])
    assert_same_bits_on_all_ranks(known)  # else they would wait for each other
    assert known[0]
    assert len(again.engine.store.flats) == len(opt.engine.store.flats)
    for p in other.parameters():
        p.requires_grad_(True)
    for o, net in ((opt, model), (again, other)):
        for _ in range(3):
            by_passes(o, net, x, y, None)
    assert_equal(values_of(other.parameters()), values_of(model.parameters()))


def stages_of_a_pipeline_have_one_norm() -> None:
    """Each rank trains half of the layers, and hears of the other half what it has become."""
    one, model = Net(), Net()
    stages = [[*model.a.parameters(), *model.b.parameters()], [*model.n.parameters(), *model.c.parameters()]]
    x, y = data()
    alone = MicroBatchSAM(
        SGD(one.parameters(), lr=0.1, momentum=0.9), RHO, num_micro_batches=2, method=methods.GapSAM()
    )
    opt = MicroBatchSAM(
        SGD(stages[dist.get_rank()], lr=0.1, momentum=0.9), RHO, num_micro_batches=2, method=methods.GapSAM(),
        process_group=dist.group.WORLD,
    )  # fmt: skip

    def hear() -> None:
        with torch.no_grad():
            for owner, params in enumerate(stages):
                for p in params:
                    dist.broadcast(p, src=owner)

    for _ in range(STEPS):
        by_passes(alone, one, x, y, None)
        with Messages() as messages:
            for xb, yb in opt.passes(x, y):
                with messages:
                    pass
                hear()
                F.mse_loss(model(xb), yb).backward()
            opt.step()
        assert messages.scalars >= 4  # two for each micro-batch
        model.zero_grad()
    hear()
    for p, q in zip(model.parameters(), one.parameters(), strict=True):
        assert_same(p, q)
    assert_same(opt.stats.grad_norm, alone.stats.grad_norm)
    assert_same(opt.stats.perturbation_norm, alone.stats.perturbation_norm)


def a_rank_may_hold_nothing_at_all() -> None:
    from torch.distributed.fsdp import fully_shard

    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    dist.broadcast(x, 0)
    dist.broadcast(y, 0)
    torch.manual_seed(1)
    one, model = (nn.Linear(3, 1).double() for _ in range(2))
    model.load_state_dict(one.state_dict())
    fully_shard(model)
    for name in ("F-SAM", "LookSAM k=2", "Bilateral SAM"):
        opts = []
        for net in (one, model):
            opts.append(MicroBatchSAM(BASES["SGD"](net.parameters()), RHO, method=SERVED[name]))
            for _ in range(3):
                by_train_step(opts[-1], net, x, y, None)
        assert_same_training(opts[1], opts[0])


def a_scaler_sees_all_ranks() -> None:
    """One rank's gradient overflows: all skip, and go on alike."""
    opt, model, x, y = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step = partial(opt.train_step, lambda xb, yb: F.mse_loss(model(xb), yb), scaler=scaler)
    step(x, y)
    scaler.update()
    before = values_of(model.parameters())
    step(x * torch.inf if dist.get_rank() else x, y)
    scaler.update()
    assert_equal(values_of(model.parameters()), before)
    assert scaler.get_scale() == 2.0
    assert {float(opt.state[p]["step"]) for p in model.parameters()} == {1.0}
    step(x, y)
    assert {float(opt.state[p]["step"]) for p in model.parameters()} == {2.0}
    assert all(bool(t.isfinite().all()) for t in values_of(model.parameters()))
    assert not any(map(torch.equal, values_of(model.parameters())[:2], before))


def stages_of_a_pipeline_clip_and_skip_alike() -> None:
    """What is before the update looks at all stages, also where the mean gradient goes through ``p.grad``."""
    rank, limit = dist.get_rank(), 1.0

    def stage(lr: float, base: Any = SGD) -> tuple[nn.Linear, MicroBatchSAM]:
        model = nn.Linear(4, 1, bias=False).double()
        nn.init.ones_(model.weight)
        return model, MicroBatchSAM(base(model.parameters(), lr=lr), 0.0, process_group=dist.group.WORLD)

    x = torch.full((1, 4), 10.0 * (rank + 1), dtype=torch.float64)
    wanted = torch.tensor((rank + 1) / 5**0.5, dtype=torch.float64)
    for before_update in (None, lambda: None):
        model, opt = stage(1.0)
        opt.train_step(lambda x, m=model: m(x).sum(), x, max_grad_norm=limit, before_update=before_update)
        torch.testing.assert_close((1 - model.weight).norm(), wanted, rtol=1e-6, atol=0)
        model, opt = stage(0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for bad in (False, True):
            before = values_of(model.parameters())
            factor = torch.inf if bad and rank else 1.0
            opt.train_step(lambda x, m=model, by=factor: m(x).sum() * by, x, scaler=scaler, before_update=before_update)
            scaler.update()
            assert torch.equal(before[0], model.weight) == bad
            torch.testing.assert_close(before[0] - model.weight, (0 if bad else 0.1) * x)
        assert scaler.get_scale() == 2.0
    model, opt = stage(1.0, RMSprop)  # has no kernel
    for xb in opt.passes(x):
        model(xb).sum().backward()
    opt.step(max_grad_norm=limit)
    torch.testing.assert_close(model.weight.grad.norm(), wanted, rtol=1e-6, atol=0)
    model, opt = stage(1.0)

    def twice() -> None:
        with pytest.raises(RuntimeError, match="unscale_"):
            scaler.unscale_(opt)

    opt.train_step(lambda x, m=model: m(x).sum(), x, scaler=scaler, before_update=twice)


def plain_parameters_beside_sharded_ones_are_clipped_and_unscaled() -> None:
    results = []
    for make in (tp_beside_plain, lambda: (Net(), 0, 1)):
        model, *_ = make()
        opt = MicroBatchSAM(BASES["SGD"](model.parameters()), RHO, num_micro_batches=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for _ in range(2):
            opt.train_step(
                lambda x, y, m=model: F.mse_loss(m(x), y),
                *data(),
                max_grad_norm=0.05,
                scaler=scaler,
                before_update=list,
            )
            scaler.update()
        results.append(values_of(model.parameters()))
    for p, q in zip(*results, strict=True):
        assert_same(p, q)


# ---- weights of 16 bits ------------------------------------------------------------------------------------------------


def given(p: Tensor, *of: int) -> Tensor:
    """A gradient whose sums of squares are exact, so that their order does not show; of a DTensor this rank's part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(hash(of))
    g = (torch.randint(-8, 9, p.shape, generator=generator) / 8).to(p.dtype)
    return distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def take_given(opt: MicroBatchSAM, model: nn.Module, steps: range, *, updates: bool = True) -> list[Tensor]:
    """Train by gradients that do not depend on the weights; the weights of every pass at w + e, and after each step."""
    points: list[Tensor] = []
    for step in steps:
        for turn, _ in enumerate(opt.passes(torch.zeros(4, 1))):
            points += values_of(model.parameters()) if turn % 2 else []
            for i, p in enumerate(model.parameters()):
                p.grad = given(p, step, turn, i)
        if updates:
            opt.step()
        opt.zero_grad()
        points += values_of(model.parameters())
    return points


SHORT = {
    "rounding": {"rounding": "stochastic"},
    "masters": {"masters": True},
    "both": {"rounding": "stochastic", "masters": True},
}


def short(layout: str | None, base: str = "AdamW", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """An optimizer of a model of 16 bits, and that. Of the seeds, which differ, the first rank's counts."""
    model = (LAYOUTS[layout]()[0] if layout else Net()).to(dtype)
    if options.get("rounding") == "stochastic":
        options["seed"] = 7 + (dist.get_rank() if layout else 0)
    options = {"num_micro_batches": 2, **options}
    return MicroBatchSAM(BASES[base](model.parameters()), 0.03, **options), model


def of_16_bits_equals_one_process(
    layout: str, how: str, base: str = "AdamW", dtype: torch.dtype = torch.bfloat16, name: str = "SAM", **options: Any
) -> None:
    """To the last bit: points, weights, state and masters, given the gradients."""
    opts, points = [], []
    for where in (None, layout):
        opt, model = short(where, base, dtype, method=SERVED[name], **SHORT[how], **options)
        points.append(take_given(opt, model, range(STEPS)))
        opts.append(opt)
    assert_equal(points[1], points[0])
    assert len({t.double().sum().item() for t in points[0]}) > len(points[0]) // 2
    one, opt = opts
    assert opt.engine.seed == one.engine.seed
    for p, q in zip(*([p for group in o.param_groups for p in group["params"]] for o in opts), strict=True):
        assert one.state[p].keys() == opt.state[q].keys()
        assert ("msam_master" in opt.state[q]) == (how != "rounding")
        for key, state in opt.state[q].items():
            assert_equal([full(state)], [full(one.state[p][key])])
            if key != "step":
                assert state.dtype == one.state[p][key].dtype, key
                assert (state.placements, state.device_mesh) == (q.placements, q.device_mesh)
        assert_same_bits_on_all_ranks(full(q).double())
    assert_same(opt.stats.along, one.stats.along)


def shards_that_are_no_runs_have_numbers_of_their_own(layout: str) -> None:
    """Disjoint ones, while replicas have the same; of one process only where the shards are runs."""
    from msam_kernels.sharded import first_draw, is_dtensor

    opt, model = short(layout, rounding="stochastic")
    plain = [first_draw(p) for p in Net().parameters()]
    assert plain == [0] * len(plain)
    runs = 0
    for p in model.parameters():
        local = getattr(p, "_local_tensor", p)
        number = torch.arange(p.numel()).view(p.shape)
        if is_dtensor(p):
            from torch.distributed.tensor import distribute_tensor

            number = distribute_tensor(number, p.device_mesh, p.placements).to_local()
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (number.flatten().tolist(), first_draw(p)))
        begins = {tuple(elements): first for elements, first in found if elements}
        assert [first for elements, first in found if elements] == [begins[tuple(e)] for e, _ in found if e]
        drawn = [k for elements, first in begins.items() for k in range(first, first + len(elements))]
        assert len(drawn) == len(set(drawn)) == p.numel()
        runs += all(first == elements[0] for elements, first in begins.items())
        assert local.numel() == number.numel()
    assert 0 < runs < len(plain)
    if layout == "TP":
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor
        from torch.distributed.tensor.placement_types import _StridedShard

        every_other = DTensor.from_local(torch.ones(4), mesh_of(x=2), [_StridedShard(0, split_factor=2)])
        assert first_draw(every_other) == 4 * dist.get_rank()
        uneven = distribute_tensor(torch.ones(3, 5), mesh_of(x=2), [Shard(1)])
        assert first_draw(uneven) == 9 * dist.get_rank()
    noise = opt.engine.store
    take_given(opt, model, range(1))
    assert [first for flat in noise.flats for first in flat.noise[1:, 1].tolist()] == [
        first_draw(p) for flat in noise.flats for p in flat.params
    ]


def equal_shards_are_rounded_differently() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(x=2)
    for placement, alike in ((Shard(0), False), (Shard(1), False), (Replicate(), True)):
        p = nn.Parameter(distribute_tensor(torch.ones(8, 8, dtype=torch.bfloat16), mesh, [placement]))
        opt = MicroBatchSAM(SGD([p], lr=0.1), 0.01, rounding="stochastic", seed=2**64 - 1 - dist.get_rank())
        for turn, _ in enumerate(opt.passes()):
            if turn:
                there = p.to_local().flatten().clone()
            p.grad = torch.ones_like(p)
        found = [torch.empty_like(there) for _ in range(2)]
        dist.all_gather(found, there)
        assert len(there.unique()) == 2
        assert torch.equal(*found) == alike
        assert opt.engine.seed == 2**64 - 1  # the first rank's
    pipeline = mesh_of(pp=2, dp=1)
    stage = nn.ParameterList([distribute_tensor(torch.ones(8, dtype=torch.bfloat16), pipeline["dp"], [Shard(0)])])
    base, seed = SGD(stage.parameters(), lr=0.1), 3 + dist.get_rank()
    group = pipeline["pp"].get_group()
    opt = MicroBatchSAM(base, 0.01, rounding="stochastic", seed=seed, process_group=group)
    take_given(opt, stage, range(1))
    assert opt.engine.seed == seed  # a stage's own


def masters_train_as_an_fp32_model_by_the_gradients_of_fsdp() -> None:
    """By FSDP2's own passes; a loop that is left changes neither weights nor masters."""
    opt, model = short("FSDP2", **SHORT["both"])
    wide = LAYOUTS["FSDP2"]()[0].to(torch.bfloat16).float()
    plain = MicroBatchSAM(BASES["AdamW"](wide.parameters()))
    for step in range(STEPS):
        x, y = (mine(t, 2, dist.get_rank(), 2).bfloat16() + step for t in data())
        before = values_of([*model.parameters(), *wide.parameters()])
        for left in (True, False):
            with opt.passes(x, y) as parts:
                for turn, (xb, yb) in enumerate(parts):
                    F.mse_loss(model(xb), yb).backward()
                    if left and turn == step:
                        break
            opt.state_dict()
            masters = [
                opt.state[p].get("msam_master", q) for p, q in zip(model.parameters(), wide.parameters(), strict=True)
            ]
            assert_equal(values_of([*model.parameters(), *masters]), before)
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
        plain.step()
        opt.step()
        opt.zero_grad()
    opt.state_dict()
    assert_equal(values_of(opt.state[p]["msam_master"] for p in model.parameters()), values_of(wide.parameters()))
    assert_equal(values_of(model.parameters()), [p.bfloat16() for p in values_of(wide.parameters())])


def masters_go_through_torchs_own_checkpoints(flattened: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    opt, model = short("FSDP2", **SHORT["both"])
    take_given(opt, model, range(2))
    kept = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    straight, straight_model = short("FSDP2", **SHORT["both"])
    wanted = take_given(straight, straight_model, range(4))
    for whole in (False, True):
        again, other = short("FSDP2", **SHORT["both"])
        other.load_state_dict(model.state_dict())
        if whole:
            again.load_state_dict(copy.deepcopy(opt.state_dict()))
        else:
            set_optimizer_state_dict(other, again, kept, options=options)
        assert again.steps == 2
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            for name, t in opt.state[p].items():
                assert type(again.state[q][name]) is type(t)
                assert_equal([full(again.state[q][name])], [full(t)])
        assert_equal(take_given(again, other, range(2, 4)), wanted[len(wanted) // 2 :])


def all_ranks_are_warned_where_little_arrives() -> None:
    """By one message more in the first step in which anything is asked for, and none later."""
    from torch.distributed.fsdp import fully_shard

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for options, sent in (({"rho": 1e-5}, [2, 1, 1]), ({"rho": 10.0}, [2, 1, 1]), ({"rho": 0.0}, [2, 2, 2])):
            del said[:]
            model = fully_shard(Net().to(torch.bfloat16))
            opt = MicroBatchSAM(SGD(model.parameters(), lr=1e-3), **options)
            for wanted in sent:
                with Messages() as messages:
                    take_given(opt, model, range(1))
                assert messages.scalars == wanted
            words = [str(w.message) for w in said if "of the perturbation arrives" in str(w.message)]
            assert len(words) == (options["rho"] == 1e-5)
        for how in ({}, SHORT["rounding"]):
            stage = nn.Linear(3, 1).bfloat16()
            opt = MicroBatchSAM(SGD(stage.parameters(), lr=0.1), 1e-5, process_group=dist.group.WORLD, **how)
            with Messages() as messages:
                take_given(opt, stage, range(1))
            assert messages.scalars == 1  # the other stage might have no weights of 16 bits, and has its own seed
        for how in SHORT:
            opt, model = short("FSDP2", **SHORT[how])
            opt.param_groups[0]["rho"] = 1e-5
            for step in range(2):
                with Messages() as messages:
                    take_given(opt, model, range(1))
                assert messages.scalars == 2 + (step == 0 and "rounding" in SHORT[how])  # of which one is the seed


@contextmanager
def refused(error: type[Exception], words: str, params: list[Tensor]) -> Iterator[None]:
    before = values_of(params)
    pointers = [getattr(p, "_local_tensor", p).data_ptr() for p in params]
    with pytest.raises(error, match=words):
        yield
    assert_equal(values_of(params), before)
    assert [getattr(p, "_local_tensor", p).data_ptr() for p in params] == pointers


def what_cannot_be_is_refused_in_a_sentence() -> None:
    from torch.distributed.tensor import DTensor, Partial

    opt, model, x, y = pair()
    params = list(model.parameters())
    base = partial(SGD, lr=0.1, momentum=0.9)
    loss = F.mse_loss
    mesh = params[0].device_mesh
    partial_sum = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with refused(TypeError, "parameter 0 of group 0 is a partial sum.*give it Shard or Replicate", []):
        MicroBatchSAM(base([partial_sum]))
    with refused(ValueError, "SparseSAM.*a rank holds only its shards.*a method without a mask", params):
        MicroBatchSAM(base(params), method=methods.SparseSAM())
    opt.method = methods.SparseSAM()
    with refused(ValueError, "a method without a mask", params):
        opt.train_step(lambda xb, yb: loss(model(xb), yb), x, y)
    with refused(ValueError, "a method without a mask", params):
        opt.update_mask(lambda xb, yb: loss(model(xb), yb), x, y)
    opt.method = methods.SAM()
    at_once = MicroBatchSAM(base(params), num_micro_batches=2, model=model, parallel=True)
    with refused(RuntimeError, "sharded parameters.*one pass at a time.*parallel=False", params):
        at_once.train_step(lambda xb, yb: loss(model(xb), yb), x, y)
    with refused(RuntimeError, "capture cannot hold sharded parameters.*use train_step", params):
        opt.capture(lambda xb, yb: loss(model(xb), yb), x, y)
    stage = list(nn.Linear(2, 2).parameters())
    with refused(ValueError, "holds only its shards or its stage of these", stage):
        MicroBatchSAM(base(stage), method=methods.SparseSAM(), process_group=dist.group.WORLD)
    for group in (3, dist.GroupMember.NON_GROUP_MEMBER):
        with refused(TypeError, "process_group must be.*ProcessGroup that this rank is in.*got", params):
            MicroBatchSAM(base(params), process_group=group)
    model.set_requires_gradient_sync(False)
    with refused(RuntimeError, r"no sharded parameter got a gradient.*set_requires_gradient_sync\(True\)", params):
        opt.train_step(lambda xb, yb: loss(model(xb), yb), x, y)
    plain = Net()
    early = MicroBatchSAM(base(plain.parameters()))
    fully_sharded(plain, mesh)
    with refused(RuntimeError, "fully_shard.*make the optimizer after that", []):
        early.train_step(lambda xb, yb: loss(plain(xb), yb), x, y)
    other, net, *_ = pair(method=methods.FriendlySAM())
    by_train_step(other, net, x, y, None)
    whole = Net()
    alone = MicroBatchSAM(BASES["AdamW"](whole.parameters()), RHO, method=methods.FriendlySAM())
    for _ in range(2):
        by_train_step(alone, whole, x, y, None)
    with refused(TypeError, "is DTensor and its state an ordinary tensor.*set_optimizer_state_dict", []):
        other.load_state_dict(alone.state_dict())
    with refused(TypeError, "is an ordinary tensor and its state DTensor", list(whole.parameters())):
        alone.load_state_dict(other.state_dict())
    assert (other.steps, alone.steps) == (1, 2)
    p = next(net.parameters())
    assert type(other.state[p]["exp_avg"]) is type(other.state[p]["msam_ema"]) is DTensor
    other.state[p]["exp_avg"] = torch.zeros(p.shape, dtype=p.dtype)
    with refused(
        TypeError, "is DTensor and its state an ordinary tensor.*set_optimizer_state_dict", list(net.parameters())
    ):
        by_train_step(other, net, x, y, None)


def meshes_that_do_not_hold_each_other_are_refused() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    ranks = torch.arange(4).view(2, 2)
    rows, columns = (dist.device_mesh.DeviceMesh("cpu", t, mesh_dim_names=("x", "y")) for t in (ranks, ranks.t()))
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh["y"], [Shard(0)])) for mesh in (rows, columns)]
    with pytest.raises(ValueError, match=r"are sharded over ranks .* which are not of them: give each an optimizer"):
        MicroBatchSAM(SGD(params, lr=0.1))


Case = Callable[[], None]


def table() -> dict[str, tuple[int, bool, Case]]:
    """By name: how many ranks, whether it is part of every run, and what runs on each of them."""
    cases: dict[str, tuple[int, bool, Case]] = {}

    def add(ranks: int, always: bool, *row: Any, **options: Any) -> None:
        told = [str(part) for part in row] + [f"{key}={value}" for key, value in options.items()]
        cases[f"{ranks} ranks, " + ", ".join(told)] = ranks, always, partial(equals_one_process, *row, **options)

    short = [("SGD", 1, "train_step"), ("AdamW", 4, "passes")]  # in turn
    for (k, name), row in itertools.product(enumerate(SERVED), itertools.product(("SGD", "AdamW"), (1, 4), WAYS)):
        base, m, way = row
        always = row == short[k % 2] and ("=" not in name or "LookSAM" in name)
        add(2, always, "FSDP2", name, m, base, way)
        if way == "passes":
            add(4, False, "FSDP2", name, m, base, way)
            add(2, False, "TP", name, m, base, way)
        if row in short:
            add(4, False, "HSDP", name, m, base, way)
            add(4, False, "FSDP2 x TP", name, m, base, way)
    for name in ("GSAM", "LookSAM k=2", "ASAM"):
        add(2, True, "FSDP2, kept after backward", name, 2, "SGD", "passes")
    add(2, True, "FSDP2, kept after forward", "Bilateral SAM", 2, "SGD", "train_step")
    add(2, True, "FSDP2, offloaded", "F-SAM", 2, "AdamW", "passes")
    add(2, True, "TP", "F-SAM", 2, "SGD", "train_step")
    add(2, True, "TP beside plain parameters", "Stable SAM", 2, "AdamW", "passes")
    add(2, True, "FSDP2", "GSAM", 2, "RMSprop", "passes")
    add(2, True, "FSDP2", "SAM", 2, "SGD", "passes", clip=0.05)
    add(2, True, "FSDP2", "LookSAM k=2", 2, "AdamW", "train_step", clip=0.05)
    add(2, True, "FSDP2", "GSAM", 2, "SGD", "train_step", only=True)
    add(2, True, "FSDP2", "WSAM", 2, "SGD", "passes", frozen=True)
    add(2, True, "FSDP2", "VaSSO", 2, "SGD", "passes", backend="reference")
    for f in (
        a_loop_that_is_left_brings_everything_back,
        gradients_add_up_to_those_of_before,
        copies_that_were_gathered_of_other_weights_are_dropped,
        an_error_inside_a_pass_leaves_the_weights,
        state_goes_through_torchs_own_checkpoints,
        stages_of_a_pipeline_have_one_norm,
        a_rank_may_hold_nothing_at_all,
        a_scaler_sees_all_ranks,
        stages_of_a_pipeline_clip_and_skip_alike,
        plain_parameters_beside_sharded_ones_are_clipped_and_unscaled,
        all_ranks_are_warned_where_little_arrives,
        equal_shards_are_rounded_differently,
        masters_train_as_an_fp32_model_by_the_gradients_of_fsdp,
        what_cannot_be_is_refused_in_a_sentence,
    ):
        cases[f.__name__] = 2, True, f
    for ranks, layout in ((2, "FSDP2"), (4, "FSDP2"), (4, "HSDP")):
        for how, base in itertools.product(SHORT, ("SGD", "AdamW")):
            cases[f"{ranks} ranks, {layout}, 16 bits, {how}, {base}"] = (
                ranks, (layout, how, base) == ("FSDP2", "both", "AdamW") and ranks == 2,
                partial(of_16_bits_equals_one_process, layout, how, base),
            )  # fmt: skip
    for name in ("F-SAM", "ASAM", "Bilateral SAM"):
        cases[f"2 ranks, FSDP2, 16 bits, {name}"] = (
            2, False, partial(of_16_bits_equals_one_process, "FSDP2", "both", dtype=torch.float16, name=name),
        )  # fmt: skip
    for how in SHORT:
        cases[f"2 ranks, FSDP2, offloaded, 16 bits, {how}, reference"] = (
            2, False, partial(of_16_bits_equals_one_process, "FSDP2, offloaded", how, backend="reference"),
        )  # fmt: skip
    for ranks, layout in ((2, "TP"), (2, "TP beside plain parameters"), (4, "FSDP2 x TP")):
        cases[f"{shards_that_are_no_runs_have_numbers_of_their_own.__name__}, {layout}"] = (
            ranks, layout == "TP", partial(shards_that_are_no_runs_have_numbers_of_their_own, layout),
        )  # fmt: skip
    for flattened in (False, True):
        cases[f"{masters_go_through_torchs_own_checkpoints.__name__}, {flattened=}"] = (
            2, flattened, partial(masters_go_through_torchs_own_checkpoints, flattened),
        )  # fmt: skip
    for name in ("F-SAM", "LookSAM k=2"):
        cases[f"{own_state_dicts_go_on_where_they_were.__name__}, {name}"] = (
            2, True, partial(own_state_dicts_go_on_where_they_were, name),
        )  # fmt: skip
    for empty in ("buffer", "rank"):
        cases[f"{a_direction_that_was_loaded_is_reused_by_all_ranks.__name__}, empty {empty}"] = (
            2, True, partial(a_direction_that_was_loaded_is_reused_by_all_ranks, empty),
        )  # fmt: skip
    cases["meshes_that_do_not_hold_each_other_are_refused"] = 4, False, meshes_that_do_not_hold_each_other_are_refused
    return cases


CASES = table()


# ---- ranks -------------------------------------------------------------------------------------------------------------


def run_rank(rank: int, ranks: int, folder: str, jobs: list[tuple[str, Case]]) -> None:
    """Run the cases up to the first that goes wrong, after which ranks may wait for each other; a file says what did, by name.

    In one process group: gloo may abort or hang where one rank ends a group that another still uses.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong: dict[str, str] = {}
    store = f"file://{folder}/group"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    for i, (name, job) in enumerate(jobs):
        try:
            job()
        except Exception:
            wrong[name] = traceback.format_exc()
            wrong.update({later: f"not run, after {name}" for later, _ in jobs[i + 1 :]})
            break
    torch.save(wrong, f"{folder}/rank{rank}")
    while not all(Path(folder, f"rank{other}").exists() for other in range(ranks)):
        time.sleep(0.01)
    os._exit(0)  # without torch's own end, in which gloo's threads may abort


def run(ranks: int, folder: Path, jobs: list[tuple[str, Case]]) -> dict[str, str]:
    """What went wrong, by case."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=folder) as new:  # where no earlier run has left its stores
        try:
            torch.multiprocessing.spawn(run_rank, (ranks, new, jobs), nprocs=ranks)
        except Exception:
            return dict.fromkeys((name for name, _ in jobs), traceback.format_exc())
        for rank in range(ranks):
            for name, words in torch.load(Path(new, f"rank{rank}")).items():
                found[name] = found.get(name, "") + f"rank {rank}: {words}"
    return found


TEST = "test_training_on_several_ranks"
TOGETHER = 32  # cases, of which the processes start once


@pytest.fixture(scope="module")
def failures(request, tmp_path_factory) -> Callable[[str], str]:
    """What went wrong in a case. Those that were asked for run together, once for all processes of pytest-xdist."""
    asked = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.name.startswith(TEST) and not any(mark.args[0] for mark in item.iter_markers("skipif"))
    ]
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def of(case: str) -> str:
        ranks = CASES[case][0]
        alike = [name for name in asked if CASES[name][0] == ranks]
        batch = alike.index(case) // TOGETHER
        folder = shared / f"{ranks} ranks, {batch}"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = folder / "found"
            if not found.exists():
                names = alike[batch * TOGETHER : (batch + 1) * TOGETHER]
                torch.save(run(ranks, folder, [(name, CASES[name][2]) for name in names]), found)
        words: str = torch.load(found).get(case, "")
        return words

    return of


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            name,
            marks=[
                *([] if always else [pytest.mark.exhaustive]),
                *([] if name.startswith(WITHOUT_FSDP) and "FSDP2" not in name else [needs_fsdp]),
            ],
        )
        for name, (_, always, _) in CASES.items()
    ],
)
def test_training_on_several_ranks(case, failures):
    words = failures(case)
    assert not words, words


def assert_one_rank_trains_like_none(name: str, device: torch.device) -> None:
    """FSDP2 of one rank, in the process group that is there; also for a GPU, in test_gpu.py."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh(device.type, (1,))
    x, y = (t.to(device) for t in data())
    opts = []
    for net in (Net().to(device), fully_shard(Net().to(device), mesh=mesh)):
        opts.append(MicroBatchSAM(BASES["AdamW"](net.parameters()), RHO, num_micro_batches=2, method=SERVED[name]))
        for way in (by_passes, by_train_step, by_train_step):
            way(opts[-1], net, x, y, 0.05 if way is by_passes else None)
    assert_same_training(opts[1], opts[0])


@needs_fsdp
@pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning")
@pytest.mark.parametrize("name", ["F-SAM", "GSAM", "LookSAM k=2"])
def test_one_rank_trains_like_none(name, process_group):
    assert_one_rank_trains_like_none(name, torch.device("cpu"))


# ---- checkpoints of other numbers of ranks -----------------------------------------------------------------------------

RANKS = (2, 1, 4)
WENT_ON = 2  # steps on each number of ranks


def through_folders(folder: str, begun: int, opt: MicroBatchSAM, model: nn.Module, train: Callable[[], Any]) -> None:
    """Read what the ranks before have written, and write what training leaves."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def state() -> dict[str, Any]:
        return dict(zip(("model", "base"), get_state_dict(model, opt.base_optimizer), strict=True))

    if begun:
        there = state()
        dcp.load(there, checkpoint_id=f"{folder}/{begun}")
        set_state_dict(model, opt.base_optimizer, model_state_dict=there["model"], optim_state_dict=there["base"])
    train()
    dcp.save(state(), checkpoint_id=f"{folder}/{begun + WENT_ON}")


def go_on(folder: str, begun: int) -> None:
    """Train on, and compare with one process that has done it all."""
    model, part, parts = fsdp()
    opt = MicroBatchSAM(BASES["AdamW"](model.parameters()), RHO, num_micro_batches=2, method=methods.BilateralSAM())
    x, y = (mine(t, 2, part, parts) for t in data())

    def train() -> None:
        for _ in range(WENT_ON):
            by_passes(opt, model, x, y, None)

    through_folders(folder, begun, opt, model, train)
    one = Net()
    alone = MicroBatchSAM(BASES["AdamW"](one.parameters()), RHO, num_micro_batches=2, method=methods.BilateralSAM())
    for _ in range(begun + WENT_ON):
        by_passes(alone, one, *data(), None)
    assert_same_training(opt, alone)


def go_on_with_16_bits(folder: str, begun: int) -> None:
    """The same to the last bit, of random numbers and masters, given the gradients."""
    points: list[Tensor] = []
    opt, model = short("FSDP2", **SHORT["both"])
    steps = range(begun, begun + WENT_ON)
    through_folders(folder, begun, opt, model, lambda: points.extend(take_given(opt, model, steps)))
    assert opt.steps == steps.stop, (opt.steps, steps)
    alone, one = short(None, **SHORT["both"])
    assert_equal(points, take_given(alone, one, range(steps.stop))[-len(points) :])
    assert opt.state[next(model.parameters())].keys() >= {"msam_master", "exp_avg"}
    for p, q in zip(model.parameters(), one.parameters(), strict=True):
        assert_equal(list(map(full, opt.state[p].values())), list(map(full, alone.state[q].values())))


@needs_fsdp
@pytest.mark.exhaustive
@pytest.mark.parametrize("job", [go_on, go_on_with_16_bits])
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_then_on_four(job, tmp_path):
    for i, ranks in enumerate(RANKS):
        folder = tmp_path / f"ranks{ranks}"
        folder.mkdir()
        assert run(ranks, folder, [("go on", partial(job, str(tmp_path), i * WENT_ON))]) == {}
