# SPDX-License-Identifier: Apache-2.0
"""A model that is moved or converted after the optimizer was made: all that is kept follows it."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, RMSprop

from msam_kernels import SAM, MicroBatchSAM, methods
from plain import METHODS, WAYS, WITHOUT_MOMENTUM, batch, loss_of, mlp, same_bits, step_with_train_step, weights

X8 = torch.linspace(-1, 1, 32).view(4, 8)
BASES = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
    "Adafactor": lambda p: Adafactor(p, lr=0.01),
}
DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
each_base = pytest.mark.parametrize("base", BASES)


def wrap(net, base="SGD", method="SAM", **options):
    return MicroBatchSAM(BASES[base](net.parameters()), 0.1, method=METHODS[method], num_micro_batches=2, **options)


def train(opt, model, steps, way="train_step"):
    dtype = next(model.parameters()).dtype
    for step in steps:
        WAYS[way](opt, model, batch(6, dtype, seed=step))
        opt.zero_grad()


def kept_dtypes(opt):
    """Of all that is kept for the parameters, but for counters and masks."""
    tensors = [t for entry in opt.state.values() for name, t in entry.items() if name not in ("step", "msam_mask")]
    for flat in opt.engine.store.flats:
        tensors += [*flat.weights, *(memory.buffer for memory in flat.memories.values())]
        tensors += [t for t in (flat.saved, *(v for name, v in flat.state.items() if name != "step")) if t is not None]
    return {t.dtype for t in tensors}


def every(*columns):
    """All combinations; those that are not on a diagonal, by which each value of each column comes, are exhaustive."""
    most = max(map(len, columns))
    diagonal = {tuple(column[i % len(column)] for column in columns) for i in range(most)}
    return [
        pytest.param(*row, marks=() if row in diagonal else pytest.mark.exhaustive, id="-".join(map(str, row)))
        for row in itertools.product(*columns)
    ]


IN_PLACE = ["flattened", "left in place"]


@pytest.mark.parametrize(("base", "dtype", "way", "place"), every(list(BASES), list(DTYPES), list(WAYS), IN_PLACE))
def test_a_model_is_converted_before_the_first_step(base, dtype, way, place, backend):
    """As scripts do that make the optimizer first."""
    model, other, flatten = mlp(), mlp().to(DTYPES[dtype]), place == "flattened"
    opt = wrap(model, base, flatten=flatten, backend=backend)
    model.to(DTYPES[dtype])
    same = wrap(other, base, flatten=flatten, backend=backend)
    for o, m in ((opt, model), (same, other)):
        train(o, m, range(3), way)
    assert same_bits(model.parameters(), other.parameters())
    assert kept_dtypes(opt) <= {DTYPES[dtype]}


@pytest.mark.parametrize(("method", "base", "place"), every(WITHOUT_MOMENTUM, list(BASES), IN_PLACE))
def test_a_model_is_converted_between_steps(method, base, place, backend):
    """State and what methods remember are then what a new optimizer loads for the converted model."""
    model, flatten = mlp(), place == "flattened"
    opt = wrap(model, base, method, flatten=flatten, backend=backend)
    train(opt, model, range(3))
    for begin, dtype in ((3, torch.float64), (6, torch.bfloat16), (9, torch.float32)):
        saved = copy.deepcopy(opt.state_dict())
        model.to(dtype)
        other = copy.deepcopy(model)
        same = wrap(other, base, method, flatten=flatten, backend=backend)
        same.load_state_dict(saved)
        for o, m in ((opt, model), (same, other)):
            train(o, m, range(begin, begin + 3))
        assert same_bits(model.parameters(), other.parameters()), dtype
        assert kept_dtypes(opt) <= {dtype}
        if METHODS[method].period == 1:
            assert same_bits([opt.stats.grad_norm], [same.stats.grad_norm])


def test_momentum_sam_leans_on_the_momentum_that_followed(backend):
    models = mlp(), mlp()
    opts = [wrap(model, "SGD", "Momentum-SAM", backend=backend) for model in models]
    for opt, model in zip(opts, models, strict=True):
        train(opt, model, range(2))
    saved = copy.deepcopy(opts[1].state_dict())
    for model in models:
        model.double()
    fresh = wrap(models[1], "SGD", "Momentum-SAM", backend=backend)
    fresh.load_state_dict(saved)
    train(opts[0], models[0], range(2, 4))
    train(fresh, models[1], range(2, 4))
    assert same_bits(models[0].parameters(), models[1].parameters())
    assert opts[0].stats.perturbation_norm > 0


@pytest.mark.parametrize("flatten", [True, False], ids=IN_PLACE)
@pytest.mark.parametrize("only", [False, True], ids=["all perturbed", "the last layer perturbed"])
@pytest.mark.parametrize("method", ["F-SAM", "LookSAM k=2", "Sparse SAM", "WSAM"])
def test_a_part_of_the_model_is_converted(method, only, flatten, backend):
    """And comes back: what was one buffer is two, and then one again."""

    def make(model, only):
        groups = [{"params": [*model[0].parameters()], "lr": 0.03}, {"params": [*model[2].parameters()], "rho": 0.3}]
        told = METHODS[method] + methods.SAM(only=model[2].parameters()) if only else METHODS[method]
        return MicroBatchSAM(BASES["AdamW"](groups), 0.1, method=told, flatten=flatten, backend=backend)

    class Mixed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            for layer in self.inner:
                p = next(layer.parameters(), None)
                x = layer(x if p is None else x.to(p.dtype))
            return x.double()

    model = mlp(torch.float64)
    opt = make(model, only)
    for step, dtype in enumerate((torch.float64, torch.float32, torch.float32, torch.float64, torch.float64)):
        saved = copy.deepcopy(opt.state_dict())
        model[0].to(dtype)
        other = copy.deepcopy(model)
        same = make(other, only)
        same.load_state_dict(saved)
        for o, m in ((opt, model), (same, other)):
            step_with_train_step(o, Mixed(m), batch(6, torch.float64, seed=step))
        assert same_bits(model.parameters(), other.parameters()), step
        assert same_bits(opt.mask or [], same.mask or [])


def swap_to(model, device):
    """As ``model.to_empty`` and ``model.to`` do it where parameters stay the same objects."""
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(torch.empty_like(p, device=device)))


def test_a_model_goes_to_the_meta_device_and_comes_back(backend):
    """There it has no values, and no step is taken; nothing that is kept is lost."""
    model, twin = mlp(), mlp()
    opt, same = (wrap(m, "AdamW", "F-SAM", backend=backend) for m in (model, twin))
    for o, m in ((opt, model), (same, twin)):
        train(o, m, range(2))
    values = copy.deepcopy(model.state_dict())
    swap_to(model, "meta")
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0 is on the meta device and has no values: materialise"
    ):
        next(opt.passes(*batch()))
    swap_to(model, torch.get_default_device())
    model.load_state_dict(values)
    for o, m in ((opt, model), (same, twin)):
        train(o, m, range(2, 4))
    assert same_bits(model.parameters(), twin.parameters())


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("convert", ["double", "half"])
def test_a_model_that_is_converted_within_a_step_is_refused(convert, turn, backend):
    model = mlp()
    opt = wrap(model, backend=backend)
    before = weights(model)
    with pytest.raises(
        RuntimeError, match="bring it back first" if turn else r"moved or converted, which must come before"
    ):
        for x, y in opt.passes(*batch()):
            if opt.pass_index == turn:
                getattr(model, convert)()
            loss_of(model, x.to(next(model.parameters()).dtype), y).backward()
    model.float()
    opt.restore()
    if turn or convert == "double":  # else it is the conversion that has rounded them
        assert same_bits(model.parameters(), before)
    opt.zero_grad()
    train(opt, model, range(1))


def test_between_the_loop_and_the_update_a_model_may_be_converted_as_in_torch():
    """``model.to`` takes the gradients along."""
    model, other = mlp(), mlp()
    opt, same = wrap(model, "AdamW", "WSAM"), wrap(other, "AdamW", "WSAM")
    for o, m in ((opt, model), (same, other)):
        for x, y in o.passes(*batch(6)):
            loss_of(m, x, y).backward()
    model.double()
    opt.step()
    same.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=1e-5, atol=1e-6)


def test_what_is_loaded_after_the_model_was_converted_is_not_rounded(backend):
    model = mlp(torch.float64)
    first = wrap(model, "RMSprop", "F-SAM", backend=backend)
    train(first, model, range(2))
    other = mlp()
    second = wrap(other, "RMSprop", "F-SAM", backend=backend)
    other.double()
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for o, m in ((first, model), (second, other)):
        train(o, m, range(2, 4))
    assert same_bits(model.parameters(), other.parameters())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copied", "pickled"]
)
@each_base
def test_a_copy_that_is_made_after_the_model_was_converted_goes_on_alike(base, copied):
    model = mlp()
    opt = wrap(model, base, "F-SAM")
    train(opt, model, range(2))
    model.double()
    other, same = copied((model, opt))
    for o, m in ((opt, model), (same, other)):
        train(o, m, range(2, 4))
    assert same_bits(model.parameters(), other.parameters())


def test_what_the_latest_step_told_is_gone_with_the_old_buffers():
    model = mlp()
    opt = wrap(model)
    train(opt, model, range(1))
    model.double()
    assert opt.stats.grad_norm.shape == (2,), "it is there until the buffers are gone"
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="stats are there after the first pass"):
        opt.stats  # noqa: B018


def test_buffers_of_the_model_follow():
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [MicroBatchSAM(SGD(m.parameters(), lr=0.1), 0.1, model=m) for m in models]
    for opt, model in zip(opts, models, strict=True):
        opt.train_step(lambda x, m=model: m(x).square().mean(), torch.ones(4, 3).cumsum(0))
    models[0].double()
    models[1] = copy.deepcopy(models[0])
    opts[1] = MicroBatchSAM(SGD(models[1].parameters(), lr=0.1), 0.1, model=models[1])
    for opt, model in zip(opts, models, strict=True):
        opt.train_step(lambda x, m=model: m(x).square().mean(), torch.ones(4, 3).double().cumsum(0))
    assert same_bits(models[0].state_dict().values(), models[1].state_dict().values())
    assert models[0][1].num_batches_tracked == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, as it imports its compiler
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["plain", "compiled"]
)
def test_parallel_passes_follow(compiled):
    model = mlp()
    opt = wrap(model, "AdamW", "GSAM", model=model, parallel=True, compile=compiled)
    train(opt, model, range(2))
    saved = copy.deepcopy(opt.state_dict())
    model.double()
    other = copy.deepcopy(model)
    same = wrap(other, "AdamW", "GSAM", model=other, parallel=True, compile=compiled)
    same.load_state_dict(saved)
    for o, m in ((opt, model), (same, other)):
        train(o, m, range(2, 4))
    assert same_bits(model.parameters(), other.parameters())


def test_what_is_frozen_and_then_made_of_few_bits_is_let_go(backend):
    """As after a warm-up of all, or where a base model is quantised in place."""
    models = [nn.ModuleDict({"big": nn.Linear(8, 8), "head": nn.Linear(8, 2)}) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [MicroBatchSAM(AdamW(m.parameters(), lr=0.1), 0.1, backend=backend) for m in models]

    def step(opt, model):
        opt.train_step(lambda x: model["head"](x).square().mean() + sum(p.sum() for p in trained(model["big"])), X8)

    def trained(module):
        return [p for p in module.parameters() if p.requires_grad]

    for opt, model in zip(opts, models, strict=True):
        step(opt, model)
        model["big"].requires_grad_(False)
    models[0]["big"].weight.data = torch.zeros(32, 1, dtype=torch.uint8)
    state = copy.deepcopy(opts[0].state[models[0]["big"].weight])
    for opt, model in zip(opts, models, strict=True):
        step(opt, model)
        step(opt, model)
    assert same_bits(models[0]["head"].parameters(), models[1]["head"].parameters())
    assert same_bits(opts[0].state[models[0]["big"].weight].values(), state.values())
    assert sum(len(flat.params) for flat in opts[0].engine.store.flats) == 3


def test_the_drop_in_follows():
    model, other = mlp(), mlp().double()
    opt, same = SAM(model.parameters(), RMSprop, lr=0.1), SAM(other.parameters(), RMSprop, lr=0.1)
    model.double()
    for o, m in ((opt, model), (same, other)):
        for step in (o.first_step, o.second_step):
            loss_of(m, *batch(dtype=torch.float64)).backward()
            step(zero_grad=True)
    assert same_bits(model.parameters(), other.parameters())


def test_state_that_was_of_another_dtype_than_its_parameter_keeps_it():
    """As optimizers in few bits keep it; a number stays as exact as it was, and a step where torch keeps it."""
    model = mlp()
    opt = wrap(model, "RMSprop")
    train(opt, model, range(1))
    p = model[0].weight
    kept = {
        "half": torch.ones(2).half(),
        "code": torch.ones(2, dtype=torch.uint8),
        "mu": torch.tensor(0.3),
        "text": "as it is",
    }
    kept["many"] = [torch.ones(3), (torch.ones(2), {"deep": torch.ones(1)}), 7]
    opt.state[p].update(kept)
    step = opt.state[p]["step"]
    model.bfloat16()
    assert next(iter(opt.passes(*batch(6, torch.bfloat16)))) is not None
    entry = opt.state[p]
    assert [entry[name].dtype for name in ("half", "code", "mu")] == [torch.float16, torch.uint8, torch.float32]
    assert entry["text"] == "as it is"
    first, (second, third), number = entry["many"]
    assert [first.dtype, second.dtype, third["deep"].dtype, number] == [*[torch.bfloat16] * 3, 7]
    assert entry["step"] is step
    assert entry["square_avg"].dtype == torch.bfloat16
