# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters: until they are trained they stay where they are, whatever they are made of, and cost nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, RMSprop

import msam_kernels
from msam_kernels import MicroBatchSAM, methods
from plain import (
    METHODS,
    WAYS,
    PlainSAM,
    assert_close,
    batch,
    closure_of,
    loss_of,
    mlp,
    remembered,
    rows,
    same_bits,
    split,
    step_with_train_step,
    through_a_file,
    weights,
)

FLOAT64 = torch.float64
BASES = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=0.01),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
}
each_base = pytest.mark.parametrize("base", BASES)
each_method = pytest.mark.parametrize("method", METHODS)


def frozen(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def views_of_one_memory() -> list[nn.Parameter]:
    whole = torch.ones(4, 3)
    return [frozen(whole), frozen(whole[:2]), frozen(whole.t())]


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as libraries for quantisation make them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Wrapper(args[0].inner)
        raise NotImplementedError(f"{function} asks what nobody should want to know")


# What no kernel could serve.
KINDS = {
    "uint8": lambda: [frozen(torch.randint(0, 3, (6, 3), dtype=torch.uint8))],
    "bool": lambda: [frozen(torch.ones(3, dtype=torch.bool))],
    "float8": lambda: [frozen(torch.ones(3).to(torch.float8_e4m3fn))],
    "complex64": lambda: [frozen(torch.ones(3, dtype=torch.complex64))],
    "sparse": lambda: [frozen(torch.eye(3).to_sparse())],
    "without values": lambda: [frozen(torch.empty(3, 2, device="meta"))],
    "a subclass": lambda: [frozen(Wrapper(torch.ones(3)))],
    "views of one memory": views_of_one_memory,
    "with gaps": lambda: [frozen(torch.ones(4, 6)[:, ::2])],
}


@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_may_be_of_any_kind(kind, way, flatten, backend):
    models = mlp(), mlp()
    others = KINDS[kind]()
    before = [(p.data_ptr() if p.layout == torch.strided and type(p.data) is torch.Tensor else 0) for p in others]
    # One group of both kinds, one of none that is trained.
    groups = [{"params": [*models[0].parameters(), others[0]]}, {"params": others[1:] or [frozen(torch.ones(2))]}]
    opts = [
        MicroBatchSAM(BASES["AdamW"](params), 0.1, num_micro_batches=2, flatten=flatten, backend=backend)
        for params in (groups, models[1].parameters())
    ]
    for step in range(3):
        for opt, model in zip(opts, models, strict=True):
            WAYS[way](opt, model, batch(6, seed=step))
        opts[0].load_state_dict(opts[0].state_dict())
    assert same_bits(models[0].parameters(), models[1].parameters())
    now = [(p.data_ptr() if p.layout == torch.strided and type(p.data) is torch.Tensor else 0) for p in others]
    assert now == before
    assert all(p not in opts[0].state and p.grad is None for p in others)
    opts[0].add_param_group({"params": KINDS[kind]()})
    opts[0].base_optimizer.add_param_group({"params": KINDS[kind]()})
    for opt, model in zip(opts, models, strict=True):
        WAYS[way](opt, model, batch(6, seed=3))
    assert same_bits(models[0].parameters(), models[1].parameters())


def kept_bytes(opt) -> int:
    """Of all that is kept for the parameters."""
    tensors = []
    for flat in opt.engine.store.flats:
        memories = [memory.buffer for memory in flat.memories.values()]
        tensors += [flat.table, flat.saved, flat.mask, *flat.weights, *memories, *flat.state.values()]
    return sum(t.nbytes for t in tensors if t is not None)


@each_base
@each_method
def test_frozen_weights_cost_nothing(method, base, backend):
    big, head = nn.Linear(300, 300).requires_grad_(False), nn.Linear(300, 2)
    addresses, versions = ([get(p) for p in big.parameters()] for get in (torch.Tensor.data_ptr, lambda p: p._version))
    opt = MicroBatchSAM(
        BASES[base]([*big.parameters(), *head.parameters()]),
        method=METHODS[method],
        num_micro_batches=2,
        backend=backend,
    )
    for _ in range(3):
        opt.train_step(lambda x: head(big(x)).square().mean(), torch.randn(4, 300))
    assert kept_bytes(opt) < 10 * 4 * 602 + 2000
    assert [p.data_ptr() for p in big.parameters()] == addresses
    assert [p._version for p in big.parameters()] == versions
    assert all(p not in opt.state for p in big.parameters())
    assert all({0, 1}.isdisjoint(remembered(opt, name)) for name in ("ema", "v", "mask"))


class Adapted(nn.Linear):
    """LoRA of rank 4, as PEFT makes it: the layer's own weight is frozen, and kept in four bits if ``quantised``."""

    def __init__(self, quantised):
        super().__init__(48, 48, bias=False)
        self.down, self.up = nn.Parameter(torch.randn(4, 48)), nn.Parameter(torch.randn(48, 4))
        self.weight.requires_grad_(False)
        if quantised:
            self.weight = frozen(torch.randint(0, 255, (48 * 24, 1), dtype=torch.uint8))

    def forward(self, x):
        codes = torch.cat([self.weight >> 4, self.weight & 15], 1) if self.weight.dtype == torch.uint8 else None
        weight = self.weight if codes is None else codes.view(48, 48).float() / 16 - 0.5
        return x @ weight.t() / 7 + x @ self.down.t() @ self.up.t() / 50


@pytest.mark.parametrize("quantised", [False, True], ids=["as it was", "in four bits"])
def test_lora_costs_what_its_adapters_do(quantised, backend):
    """2,304 of 31,488 elements are trained: so many are in each buffer, whatever is handed to the optimizer."""
    embedding = nn.Embedding(320, 48).requires_grad_(False)
    model = nn.Sequential(embedding, *(Adapted(quantised) for _ in range(6)))
    assert quantised or sum(p.numel() for p in model.parameters()) == 31488
    opt = MicroBatchSAM(AdamW(model.parameters(), lr=0.01), method=methods.FriendlySAM(), backend=backend)
    before = weights(model)
    opt.train_step(lambda i: model(i).square().mean(), torch.arange(12).view(3, 4))
    (flat,) = opt.engine.store.flats
    buffers = [flat.saved, flat.memories["ema"].buffer, flat.state["exp_avg"], flat.state["exp_avg_sq"]]
    if flat.flatten:
        buffers += flat.weights
    assert [b.numel() for b in buffers] == [2304] * len(buffers)
    assert len(opt.state) == 12
    changed = [not same_bits([p], [old]) for p, old in zip(model.parameters(), before, strict=True)]
    assert changed == [p.requires_grad for p in model.parameters()]


# What a method remembers of the others goes on; of LookSAM's direction and of a mask see below.
GO_ON = [name for name, m in METHODS.items() if m.period == 1 and not m.full.sparse]


@rows(("method", "base", "way", "flatten"), GO_ON, BASES, WAYS, [True, False], every=2)
def test_what_is_unfrozen_takes_part_from_the_next_step_on(method, base, way, flatten, backend):
    expected = mlp(FLOAT64)
    expected[0].requires_grad_(False)
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(BASES[base](expected.parameters()), 0.1, METHODS[method])
    ours = MicroBatchSAM(
        BASES[base](actual.parameters()),
        0.1,
        method=METHODS[method],
        num_micro_batches=2,
        flatten=flatten,
        backend=backend,
    )
    served = []
    for step in range(8):
        for model in (actual, expected):
            model[0].requires_grad_(step in (2, 3, 6))
            model[2].bias.requires_grad_(step != 4)
        addresses = [p.data_ptr() for p in actual.parameters()]
        data = batch(6, FLOAT64, seed=step)
        WAYS[way](ours, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
        assert_close(actual, expected)
        assert step == 2 or [p.data_ptr() for p in actual.parameters()] == addresses, "frozen again, they stay"
        served.append(sum(len(flat.params) for flat in ours.engine.store.flats))
    assert served == [2, 2, *[4] * 6]
    for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
        for key, value in theirs.base.state[q].items():
            torch.testing.assert_close(ours.state[p][key], value, rtol=1e-10, atol=1e-12)


def test_of_what_is_unfrozen_looksam_has_no_direction_yet(backend):
    model = mlp()
    model[0].requires_grad_(False)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.1, method=methods.LookSAM(k=4), backend=backend)
    passes = []
    for step in range(7):
        model[0].requires_grad_(step >= 2)
        calls = []
        opt.train_step(lambda *part, calls=calls: calls.append(1) or loss_of(model, *part), *batch(seed=step))
        passes.append(len(calls))
    assert passes == [2, 1, 2, 1, 2, 1, 1]


def test_a_mask_is_of_what_is_trained(backend):
    model = mlp()
    model[0].requires_grad_(False)
    method = methods.SparseSAM(sparsity=0.5, update_every=100)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.1, method=method, backend=backend)
    step_with_train_step(opt, model, batch())
    shown = opt.mask
    assert [m.shape for m in shown] == [p.shape for p in model.parameters()]
    assert [int(m.sum()) for m in shown[:2]] == [0, 0]
    assert sum(int(m.sum()) for m in shown) == 6  # of the 12 that are trained
    assert sorted(remembered(opt, "mask")) == [2, 3]
    opt.mask = [torch.ones_like(m) for m in shown]
    assert [bool(m.all()) for m in opt.mask] == [False, False, True, True]
    opt.update_mask(lambda x, y: loss_of(model, x, y), *batch(3))
    assert sum(int(m.sum()) for m in opt.mask) == 6
    model[0].requires_grad_(True)
    assert opt.mask is None
    step_with_train_step(opt, model, batch())
    assert sum(int(m.sum()) for m in opt.mask) == 16


@each_base
@pytest.mark.parametrize("method", ["SAM", "F-SAM", "LookSAM k=2", "Sparse SAM"])
@pytest.mark.parametrize("at", [1, 3, 5], ids=["before it is unfrozen", "after", "when it is frozen again"])
def test_training_resumes_where_parameters_were_unfrozen(at, method, base, backend):
    """A script makes model and optimizer as at its start, loads, and unfreezes what the step asks for."""

    def fresh():
        model = mlp()
        model[0].requires_grad_(False)
        return model, MicroBatchSAM(BASES[base](model.parameters()), 0.1, method=METHODS[method], backend=backend)

    def train(model, opt, steps):
        for step in steps:
            model[0].requires_grad_(step in (2, 3, 4, 6))
            step_with_train_step(opt, model, batch(seed=step))

    straight, opt = fresh()
    train(straight, opt, range(8))
    model, first = fresh()
    train(model, first, range(at))
    saved = through_a_file((model.state_dict(), first.state_dict()))
    other, second = fresh()
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    train(other, second, range(at, 8))
    assert_close(other, straight, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_unfrozen_within_a_step_is_refused_and_the_step_given_up(way, backend):
    model = mlp()
    model[0].requires_grad_(False)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.1, backend=backend)
    before = weights(model)

    class Unfreezes(nn.Module):
        def forward(self, x):
            model[0].requires_grad_(True)
            return model(x)

    with pytest.raises(RuntimeError, match=r"parameters were unfrozen, .*, inside a passes\(\) loop or a closure"):
        WAYS[way](opt, Unfreezes(), batch())
    assert same_bits(model.parameters(), before)
    opt.zero_grad()
    step_with_train_step(opt, model, batch())
    assert not any(same_bits([p], [old]) for p, old in zip(model.parameters(), before, strict=True))


def test_a_frozen_parameter_with_a_gradient_takes_part_as_in_torch(backend):
    for of in (lambda b: MicroBatchSAM(b, rho=0.0, backend=backend), lambda b: b):
        trained, other = nn.Parameter(torch.ones(3)), frozen(torch.ones(3))
        opt = of(SGD([trained, other], lr=0.1))
        for p in (trained, other):
            p.grad = torch.ones(3)
        opt.step()
        torch.testing.assert_close(other, torch.full((3,), 0.9))
        torch.testing.assert_close(trained.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("drop_in", [False, True])
@each_method
def test_where_everything_is_frozen_a_step_does_nothing(method, drop_in, backend):
    model = mlp().requires_grad_(False)
    before = weights(model)
    if drop_in:
        opt = msam_kernels.SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
        opt.first_step()
        opt.second_step()
    else:
        opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), method=METHODS[method], backend=backend)
        for _ in opt.passes(*batch()):
            pass
        opt.step()
        opt.step(lambda: None)
        copy.deepcopy((model, opt))
        opt.load_state_dict(opt.state_dict())
        assert opt.mask is None
    assert same_bits(model.parameters(), before)
    with pytest.raises(RuntimeError, match="one CUDA device, got frozen ones only"):
        opt.capture(lambda x, y: loss_of(model, x, y), *batch())
    model.requires_grad_(True)
    if drop_in:
        opt.step(closure_of(model, batch()))
        loss_of(model, *batch()).backward()
        opt.step(closure_of(model, batch()))
    else:
        step_with_train_step(opt, model, batch())
    assert not same_bits(model.parameters(), before)


@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@each_base
def test_frozen_weights_may_move_and_change_their_dtype(base, flatten, backend):
    """As where they are fetched for each forward."""
    models = mlp(), mlp()
    opts = []
    for model in models:
        model[0].requires_grad_(False)
        opts.append(MicroBatchSAM(BASES[base](model.parameters()), 0.1, flatten=flatten, backend=backend))
    for step in range(4):
        for p in models[0][0].parameters():
            p.data = p.data.clone() if step % 2 else p.data.double().float()
        for opt, model in zip(opts, models, strict=True):
            step_with_train_step(opt, model, batch(seed=step))
    assert same_bits(models[0].parameters(), models[1].parameters())
    models[0][0].half()
    opts[0].train_step(lambda x, y: loss_of(models[0][2], models[0][0](x.half()).float(), y), *batch())


def test_what_is_unfrozen_within_a_loop_is_refused_and_leaves_no_gradient():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)
    opt = MicroBatchSAM(SGD([first, second], lr=0.1), 0.5)
    with pytest.raises(RuntimeError, match="parameters were unfrozen, which must come before the step"):
        for _ in opt.passes():
            second.requires_grad_(True)
            (first.sum() * second.sum()).backward()
    assert first.tolist() == [1, 1, 1]
    assert first.grad is None
    assert second.grad is None
