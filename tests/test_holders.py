# SPDX-License-Identifier: Apache-2.0
"""Whoever keeps the address of a parameter, or its place among others, finds it there: cuDNN, flat vectors, TorchScript."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.optim import SGD, AdamW

from msam_kernels import MicroBatchSAM
from plain import (
    METHODS,
    WAYS,
    PlainSAM,
    assert_close,
    batch,
    closure_of,
    loss_of,
    mlp,
    same_bits,
    split,
    step_with_train_step,
    weights,
)

FLOAT64 = torch.float64
BASES = {"SGD": lambda p: SGD(p, lr=0.1, momentum=0.9), "AdamW": lambda p: AdamW(p, lr=0.01)}
each_way = pytest.mark.parametrize("way", WAYS)


def train_beside_plain_loops(ours, model, theirs, expected, way, steps=3, check=lambda: True) -> None:
    """Steps of two micro-batches, after each of which the weights must agree."""
    for step in range(steps):
        data = batch(6, FLOAT64, seed=step)
        WAYS[way](ours, model, data)
        theirs.step([closure_of(expected, part) for part in split(data, [3, 3])])
        assert_close(model, expected)
        assert check()


# ---- RNNs as cuDNN wants them ---------------------------------------------------------------------------------------------

RNNS = {
    "LSTM": lambda: nn.LSTM(3, 5),
    "GRU, two layers and directions": lambda: nn.GRU(3, 5, 2, bidirectional=True),
    "RNN without biases": lambda: nn.RNN(3, 5, bias=False),
    "LSTM with a projection": lambda: nn.LSTM(3, 5, proj_size=2),
}
each_rnn = pytest.mark.parametrize("kind", RNNS)


class Recurrent(nn.Module):
    """Of sequences of two. Its weights lie where cuDNN wants them from the start, or from each forward on."""

    def __init__(self, kind: str, *, anew: bool = False):
        super().__init__()
        self.rnn, self.anew = RNNS[kind](), anew
        self.out = nn.Linear(self.rnn.proj_size or 5 * (1 + self.rnn.bidirectional), 2)
        self.double()
        flatten_as_on_a_gpu(self.rnn)

    def forward(self, x: Tensor) -> Tensor:
        if self.anew:
            flatten_as_on_a_gpu(self.rnn)
        return self.out(self.rnn(torch.stack([x, x.flip(1)]))[0][-1])


def in_order(rnn: nn.RNNBase) -> tuple[list[Tensor], int]:
    """The weights as cuDNN has them, matrices first, and how many elements it reads: both biases also where there are none."""
    cells = rnn.num_layers * (1 + rnn.bidirectional)
    biases = 0 if rnn.bias else 2 * cells * rnn.weight_hh_l0.shape[0]
    parts = sorted(rnn._flat_weights, key=Tensor.dim, reverse=True)
    return parts, sum(p.numel() for p in parts) + biases


@torch.no_grad()
def flatten_as_on_a_gpu(rnn: nn.RNNBase) -> None:
    """What ``flatten_parameters`` does there: the weights to one new storage, which is zero elsewhere."""
    parts, size = in_order(rnn)
    memory = parts[0].new_zeros(size)
    begin = 0
    for p in parts:
        place = memory[begin : begin + p.numel()].view_as(p)
        p.set_(place.copy_(p))
        begin += p.numel()


def are_found_by_cudnn(rnn: nn.RNNBase) -> bool:
    """What torch asks before each forward (``try_get_weight_buf`` in ATen/native/cudnn/RNN.cpp), or it warns and copies them.

    The storage of the first weight is large enough, and each lies in it where cuDNN expects it, counted from its start. Where
    biases are read that the module has not, there are zeros.
    """
    parts, size = in_order(rnn)
    memory = torch.empty(0, dtype=FLOAT64, device=parts[0].device).set_(rnn._flat_weights[0].untyped_storage())
    begin = 0
    for p in parts:
        if p.data_ptr() != memory.data_ptr() + begin * p.element_size() or not p.is_contiguous():
            return False
        begin += p.numel()
    return len(memory) >= size and not memory[begin:].any()


def test_the_question_is_torchs():
    rnn = nn.RNN(3, 5, bias=False, dtype=FLOAT64)
    assert not are_found_by_cudnn(rnn)
    flatten_as_on_a_gpu(rnn)
    assert are_found_by_cudnn(rnn)
    rnn.weight_hh_l0.data = rnn.weight_hh_l0.data.clone()
    assert not are_found_by_cudnn(rnn)


@each_rnn
@pytest.mark.parametrize(
    ("way", "method", "base"), [("passes", "F-SAM", "AdamW"), ("closures", "ASAM", "SGD"), ("train_step", "SAM", "SGD")]
)
def test_the_weights_of_an_rnn_stay_where_cudnn_finds_them(way, method, base, kind, backend):
    model = Recurrent(kind)
    expected = copy.deepcopy(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    theirs = PlainSAM(BASES[base](expected.parameters()), 0.1, METHODS[method])
    options = {"method": METHODS[method], "num_micro_batches": 2, "model": model, "backend": backend}
    ours = MicroBatchSAM(BASES[base](model.parameters()), 0.1, **options)
    found = []
    model.rnn.register_forward_pre_hook(lambda rnn, _: found.append(are_found_by_cudnn(rnn)))
    train_beside_plain_loops(ours, model, theirs, expected, way)
    assert len(found) == 12
    assert all(found)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@each_rnn
@each_way
def test_an_rnn_may_be_flattened_anew_in_every_pass(kind, way, backend):
    """As many models do, in their forward: its weights move while they are perturbed."""
    model = Recurrent(kind, anew=True)
    expected = copy.deepcopy(model)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1, momentum=0.9), 0.1, METHODS["F-SAM"])
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    ours = MicroBatchSAM(base, 0.1, method=METHODS["F-SAM"], num_micro_batches=2, backend=backend)
    train_beside_plain_loops(ours, model, theirs, expected, way, check=lambda: are_found_by_cudnn(model.rnn))
    assert are_found_by_cudnn(model.rnn)
    before = weights(model)
    for i, (x, y) in enumerate(x for x in ours.passes(*batch(6, FLOAT64))):
        loss_of(model, x, y).backward()
        if i == 1:
            break
    assert same_bits(model.parameters(), before)


def test_an_rnn_that_is_flattened_after_the_optimizer_was_made_stays_flattened(backend):
    """A copy of a module has weights of their own on a GPU too, until somebody calls ``flatten_parameters``."""
    model = copy.deepcopy(Recurrent("LSTM"))
    expected = copy.deepcopy(model)
    assert not are_found_by_cudnn(model.rnn)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1, momentum=0.9), 0.1)
    ours = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), 0.1, num_micro_batches=2, backend=backend)
    train_beside_plain_loops(ours, model, theirs, expected, "train_step", steps=1)
    flatten_as_on_a_gpu(model.rnn)
    train_beside_plain_loops(ours, model, theirs, expected, "train_step")
    assert are_found_by_cudnn(model.rnn)


@each_way
def test_an_rnn_of_which_parts_are_frozen_or_another_optimizers_stays_where_cudnn_finds_it(way, backend):
    model = Recurrent("LSTM")
    expected = copy.deepcopy(model)
    for rnn in (model.rnn, expected.rnn):
        rnn.bias_hh_l0.requires_grad_(False)
        rnn.weight_hh_l0.requires_grad_(False)

    def mine(net):
        return [p for p in net.parameters() if p is not net.rnn.bias_ih_l0]

    theirs = PlainSAM(SGD(mine(expected), lr=0.1, momentum=0.9), 0.1)
    ours = MicroBatchSAM(SGD(mine(model), lr=0.1, momentum=0.9), 0.1, num_micro_batches=2, backend=backend)
    for frozen in (True, False):
        for net in (model, expected):
            net.rnn.weight_hh_l0.requires_grad_(not frozen)
        train_beside_plain_loops(ours, model, theirs, expected, way, steps=2)
        assert are_found_by_cudnn(model.rnn)


# ---- flat vectors that somebody made --------------------------------------------------------------------------------------


def in_a_vector(params) -> Tensor:
    """All of them as parts of one vector, which shows what they become."""
    vector = torch.cat([p.detach().flatten() for p in params])
    vector_to_parameters(vector, params)
    return vector


def shows(vector: Tensor, params) -> bool:
    return same_bits([vector], [torch.cat([p.detach().flatten() for p in params])])


@each_way
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_vector_goes_on_showing_its_parameters(when, way, base, backend):
    model = mlp(FLOAT64)
    expected = copy.deepcopy(model)
    params = list(model.parameters())
    if when == "before":
        vector = in_a_vector(params)
    theirs = PlainSAM(base(expected.parameters()), 0.1, METHODS["ASAM"])
    ours = MicroBatchSAM(base(params), 0.1, method=METHODS["ASAM"], num_micro_batches=2, backend=backend)
    if when == "after":
        train_beside_plain_loops(ours, model, theirs, expected, way, steps=1)
        vector = in_a_vector(params)
    train_beside_plain_loops(ours, model, theirs, expected, way, check=lambda: shows(vector, params))
    vector.mul_(0.5)
    with torch.no_grad():
        for p in expected.parameters():
            p.mul_(0.5)
    train_beside_plain_loops(ours, model, theirs, expected, way)


def test_a_parameter_among_other_things_stays_there_and_one_alone_moves():
    memory = torch.arange(12.0)
    among, alone, whole = nn.Parameter(memory[3:8]), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 3).t())
    addresses = [p.data_ptr() for p in (among, alone, whole)]
    MicroBatchSAM(SGD([alone, whole], lr=0.1))
    assert [p.data_ptr() == a for p, a in zip((among, alone, whole), addresses, strict=True)] == [True, False, False]
    opt = MicroBatchSAM(SGD([among], lr=1.0))
    opt.train_step(lambda x: (among * x).sum(), torch.ones(1))
    assert among.data_ptr() == addresses[0]
    assert memory.tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 8, 9, 10, 11]


def test_what_has_gaps_is_closed_beside_what_stays(backend):
    model = mlp(FLOAT64)
    wide = torch.randn(4, 6, dtype=FLOAT64)
    model.column = nn.Parameter(wide[:, 1])
    in_a_vector(model[0].parameters())
    expected = copy.deepcopy(model)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1), 0.1)
    ours = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.1, num_micro_batches=2, backend=backend)
    assert model.column.is_contiguous()

    for step in range(4):
        if step == 2:
            model.column.data = torch.stack([model.column.data] * 2, -1)[:, 0]
        x, y = batch(4, FLOAT64, seed=step)
        x = x @ torch.ones(3, 1, dtype=FLOAT64)

        def loss(net, x, y):
            return ((x * net.column).sum(1, keepdim=True) + loss_of(net, x.expand(-1, 3), y)).square().mean()

        ours.train_step(lambda x, y: loss(model, x, y), x, y)
        theirs.step([lambda part=part: loss(expected, *part).backward() for part in split((x, y), [2, 2])])
        assert_close(model, expected)


# ---- who keeps the tensors themselves -------------------------------------------------------------------------------------


class Called(nn.Module):
    """A function of the tensors that were the parameters when it was made."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.kept = model, dict(model.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.kept, (x,))


HOLDERS = {
    "functional_call": Called,
    "TorchScript, traced": lambda model: torch.jit.trace(model, batch(3, FLOAT64)[0]),
    "TorchScript, scripted": torch.jit.script,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@each_way
@pytest.mark.parametrize("holder", HOLDERS)
def test_who_keeps_the_parameters_sees_them_move_and_change(holder, way, backend):
    model = mlp(FLOAT64)
    expected = copy.deepcopy(model)
    held = HOLDERS[holder](model)
    theirs = PlainSAM(SGD(expected.parameters(), lr=0.1, momentum=0.9), 0.1)
    ours = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), 0.1, num_micro_batches=2, backend=backend)
    train_beside_plain_loops(ours, held, theirs, expected, way)
    assert same_bits(held.parameters(), model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
def test_who_keeps_their_memory_follows_where_they_stay(flatten):
    """``torch.jit.freeze`` does: docs/faq.md says so."""
    model = mlp().eval()
    frozen = torch.jit.freeze(torch.jit.script(model))
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), flatten=flatten)
    step_with_train_step(opt, model, batch())
    x, _ = batch()
    assert torch.equal(frozen(x), model(x)) == (not flatten)


@pytest.mark.host
@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning", "ignore:.*FSDP:FutureWarning")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "its flat vector"])
def test_the_flat_vector_of_fsdp_is_refused_and_stays_what_its_modules_use(original):
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = FullyShardedDataParallel(mlp(FLOAT64), use_orig_params=original, device_id=torch.device("cpu"))
    before = [p.data_ptr() for p in sharded.parameters()]
    with pytest.raises(TypeError, match="FSDP1"):
        MicroBatchSAM(SGD(sharded.parameters(), lr=0.1, momentum=0.9), 0.1)
    assert [p.data_ptr() for p in sharded.parameters()] == before
