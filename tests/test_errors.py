# SPDX-License-Identifier: Apache-2.0
"""Bad input is an error that names the value and the remedy, and leaves weights, gradients and state as they were."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam

import msam_kernels
from msam_kernels import MicroBatchSAM, methods
from plain import (
    batch,
    closure_of,
    gradients,
    loss_of,
    mlp,
    remembered,
    same_bits,
    step_with_passes,
    step_with_train_step,
    weights,
)

NAN, INF = math.nan, math.inf


def sgd(params, **settings):
    return SGD(params, **{"lr": 0.1, "momentum": 0.9, **settings})


def snapshot(model, base):
    return (
        weights(model),
        gradients(model),
        copy.deepcopy(base.state_dict()),
        [p.data_ptr() for p in model.parameters()],
    )


def unchanged(model, base, before):
    """Weights, their addresses, gradients, and everything in the base optimizer."""
    old_weights, old_gradients, state, addresses = before
    assert same_bits(model.parameters(), old_weights)
    assert same_bits(gradients(model), old_gradients)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    now = base.state_dict()
    assert repr(now["param_groups"]) == repr(state["param_groups"])
    assert now["state"].keys() == state["state"].keys()
    for i, entry in state["state"].items():
        assert same_bits(now["state"][i].values(), entry.values())
    return True


# ---- construction -----------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "rho -1": ({"rho": -1.0}, ValueError, r"rho.*>= 0.*-1\.0"),
    "rho nan": ({"rho": NAN}, ValueError, r"rho.*nan"),
    "rho inf": ({"rho": INF}, ValueError, r"rho.*inf"),
    "rho -inf": ({"rho": -INF}, ValueError, r"rho.*-inf"),
    "rho a string": ({"rho": "0.05"}, ValueError, r"rho.*'0\.05'"),
    "rho None": ({"rho": None}, ValueError, r"rho.*None"),
    "rho True": ({"rho": True}, ValueError, r"rho.*True"),
    "rho complex": ({"rho": 1j}, ValueError, r"rho.*1j"),
    "rho of several": ({"rho": torch.ones(2)}, ValueError, r"rho.*tensor"),
    "rounding up": ({"rounding": "up"}, ValueError, r"rounding must be one of \('nearest', 'stochastic'\), got 'up'"),
    "rounding None": ({"rounding": None}, ValueError, r"rounding must be one of .*None"),
    "seed -1": ({"rounding": "stochastic", "seed": -1}, ValueError, r"seed must be an integer >= 0, got -1"),
    "seed 0.5": ({"rounding": "stochastic", "seed": 0.5}, ValueError, r"seed must be an integer >= 0, got 0\.5"),
    "seed of 65 bits": ({"rounding": "stochastic", "seed": 2**64}, ValueError, r"seed must be < 2\*\*64"),
    "seed of nothing": ({"seed": 3}, ValueError, r"seed=3 is for rounding='stochastic', got rounding='nearest'"),
    "rho a nan tensor": ({"rho": torch.tensor(NAN)}, ValueError, r"rho.*nan"),
    "both": ({"num_micro_batches": 2, "micro_batch_size": 3}, ValueError, r"num_micro_batches=2.*micro_batch_size=3"),
    "count 0": ({"num_micro_batches": 0}, ValueError, r"num_micro_batches.*>= 1.*0"),
    "count -1": ({"num_micro_batches": -1}, ValueError, r"num_micro_batches.*>= 1.*-1"),
    "count 2.0": ({"num_micro_batches": 2.0}, ValueError, r"num_micro_batches.*integer.*2\.0"),
    "count True": ({"num_micro_batches": True}, ValueError, r"num_micro_batches.*integer.*True"),
    "count '4'": ({"num_micro_batches": "4"}, ValueError, r"num_micro_batches.*integer.*'4'"),
    "size 0": ({"micro_batch_size": 0}, ValueError, r"micro_batch_size.*>= 1.*0"),
    "size 1.5": ({"micro_batch_size": 1.5}, ValueError, r"micro_batch_size.*integer.*1\.5"),
    "method a string": ({"method": "fsam"}, TypeError, r"method.*msam_kernels\.methods.*'fsam'"),
    "method a class": ({"method": methods.FriendlySAM}, TypeError, r"method.*FriendlySAM\(\)"),
    "model an optimizer": ({"model": 3}, TypeError, r"model.*Module.*int"),
    "backend unknown": ({"backend": "cudnn"}, ValueError, r"backend.*cpu.*reference.*'cudnn'"),
    "backend None": ({"backend": None}, ValueError, r"backend.*None"),
    "backend not there": ({"backend": "cuda"}, (ValueError, RuntimeError), r"'cuda'"),
    "an unknown argument": ({"nesterov": True}, TypeError, r"nesterov"),
}


@pytest.mark.parametrize(("options", "error", "match"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_wrong_argument_is_named_and_nothing_is_touched(options, error, match):
    model = mlp()
    base = sgd(model.parameters())
    closure_of(model, batch())()
    before = snapshot(model, base)
    with pytest.raises(error, match=match):
        MicroBatchSAM(base, **options)
    assert unchanged(model, base, before)
    opt = MicroBatchSAM(base, rho=0.25)
    assert opt.param_groups[0]["rho"] == 0.25, "a failed attempt leaves no rho behind"


def wrapper_of(p):
    """As Accelerate's: of the class, without anything of it."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step(closure)

    return Wrapper(sgd(p))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: SGD, TypeError, r"instance.*SGD"),
        (lambda p: "SGD", TypeError, r"instance.*'SGD'"),
        (lambda p: p, TypeError, r"instance, got \[.{0,200}\]: build it first"),
        (
            wrapper_of,
            TypeError,
            r"Wrapper, whose __init__ did not call.*: give the optimizer inside.*MicroBatchSAM\(base\)",
        ),
        (lambda p: None, TypeError, r"instance.*None"),
        (lambda p: MicroBatchSAM(sgd(p)), TypeError, r"MicroBatchSAM"),
        (lambda p: msam_kernels.SAM(p, SGD, lr=0.1), TypeError, r"MicroBatchSAM"),
    ],
    ids=["a class", "a name", "parameters", "a wrapper", "None", "MicroBatchSAM", "SAM"],
)
def test_a_wrong_base_optimizer_is_named(make, error, match):
    model = mlp()
    base = make(list(model.parameters()))
    with pytest.raises(error, match=match):
        MicroBatchSAM(base)


def group_without_parameters(p):
    base = sgd(p)
    base.param_groups[0]["params"] = []
    return base


PARAMETERS = {
    "none": (group_without_parameters, ValueError, r"no parameters.*model\.parameters\(\)"),
    "complex": (
        lambda p: sgd([*p, nn.Parameter(torch.ones(2, dtype=torch.cfloat))]),
        TypeError,
        r"complex64.*view_as_real",
    ),
    "8 bits": (
        lambda p: sgd([*p, nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))]),
        TypeError,
        r"parameter 4 of group 0.*float32.*float8_e4m3fn",
    ),
    "sparse": (
        lambda p: sgd([*p, nn.Parameter(torch.eye(3).to_sparse())]),
        TypeError,
        r"dense.*sparse",
    ),
    "rho of a group": (lambda p: sgd([{"params": p, "rho": -2.0}]), ValueError, r"rho.*-2\.0"),
}


@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@pytest.mark.parametrize(("make", "error", "match"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_that_cannot_be_served_are_named(make, error, match, flatten):
    model = mlp()
    base = make(list(model.parameters()))
    before = snapshot(model, base)
    with pytest.raises(error, match=match):
        MicroBatchSAM(base, flatten=flatten)
    assert unchanged(model, base, before)


@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@pytest.mark.parametrize(
    "share",
    [
        lambda a: nn.Parameter(a.data),
        lambda a: nn.Parameter(a.data.view(-1)),
        lambda a: nn.Parameter(a.data[1:3]),
        lambda a: nn.Parameter(a.data.t()),
        lambda a: nn.Parameter(a.data.view(torch.int32).view(torch.float32)[-1:]),
    ],
    ids=["all of it", "another shape", "some rows", "transposed", "the end"],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_that_share_memory_are_refused(share, flatten, groups):
    model = mlp()
    model.other = share(model[0].weight)
    params = list(model.parameters())
    base = sgd(params) if groups == 1 else sgd([{"params": params[:-1]}, {"params": params[-1:]}])
    before = snapshot(model, base)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*share memory.*one Parameter"):
        MicroBatchSAM(base, flatten=flatten)
    assert unchanged(model, base, before)


def test_a_frozen_view_of_a_parameter_that_moves_is_refused():
    """It would be left behind with the old values. Where nothing moves it follows, as in torch."""
    model = mlp()
    view = nn.Parameter(model[0].weight.data[1:], requires_grad=False)
    base = sgd([*model.parameters(), view])
    before = snapshot(model, base)
    match = r"parameter 0 of group 0 and parameter 4 of group 0 share memory.*requires_grad=False.*use flatten=False"
    with pytest.raises(ValueError, match=match):
        MicroBatchSAM(base)
    assert unchanged(model, base, before)
    opt = MicroBatchSAM(base, flatten=False)
    step_with_train_step(opt, model, batch())
    assert same_bits([view], [model[0].weight[1:]])
    view.requires_grad_(True)
    with pytest.raises(ValueError, match=r"share memory.*one Parameter for both$"):
        step_with_train_step(opt, model, batch())


def test_a_parameter_that_is_listed_twice_is_not_called_two_objects():
    """torch only warns. ``[*a.parameters(), *b.parameters()]`` of tied modules comes to this."""
    model = mlp()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        base = sgd([*model.parameters(), model[0].weight])
    try:
        opt = MicroBatchSAM(base)
    except ValueError as error:
        assert "different objects" not in str(error)
        assert re.search("twice|duplicate|more than once", str(error))
    else:
        step_with_train_step(opt, model, batch())


@pytest.mark.parametrize(
    "make",
    [
        lambda: methods.AdaptiveSAM(eta=-1.0),
        lambda: methods.AdaptiveSAM(eta=NAN),
        lambda: methods.AdaptiveSAM(eta="0"),
        lambda: methods.FriendlySAM(sigma=NAN),
        lambda: methods.FriendlySAM(sigma=-1),
        lambda: methods.FriendlySAM(sigma=INF),
        lambda: methods.FriendlySAM(lmbda=1.5),
        lambda: methods.FriendlySAM(lmbda=-0.1),
        lambda: methods.FriendlySAM(lmbda=NAN),
        lambda: methods.FriendlySAM(lmbda=None),
    ],
)
def test_a_method_refuses_numbers_outside_its_range(make):
    with pytest.raises(ValueError, match=r"(eta|sigma|lmbda) must be a finite number .* got "):
        make()


# ---- batches ----------------------------------------------------------------------------------------------------------------

X, Y = batch(7)


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is new in torch
        return make()


BATCHES = {
    "different lengths": ((X, Y[:5]), {}, ValueError, r"micro-batches.*dim 0.*5.*7.*passes\(\).*step\(\[closure"),
    "different lengths in a dict": (({"x": X, "y": Y[:3]},), {}, ValueError, r"dim 0.*3.*7"),
    "a string": ((X, "label"), {}, TypeError, r"micro-batches.*tensors.*dicts.*str.*passes\(\).*step\(\[closure"),
    "a string in a dict": (({"x": X, "id": "a"},), {}, TypeError, r"tensors.*str"),
    "a number": ((X, 3), {}, TypeError, r"tensors.*int"),
    "an array": ((np.ones(7),), {}, TypeError, r"tensors.*ndarray"),
    "a scalar tensor": ((X, torch.tensor(1.0)), {}, TypeError, r"tensors.*0-d"),
    "sparse": ((X.to_sparse(), Y), {}, TypeError, r"micro-batches.*torch\.sparse_coo.*passes\(\).*step\(\[closure"),
    "sparse rows": ((quietly(X.to_sparse_csr), Y), {}, TypeError, r"micro-batches.*torch\.sparse_csr.*passes\(\)"),
    "nested": (
        (quietly(lambda: torch.nested.nested_tensor([X[0], X[1, :2]])), Y[:2]),
        {},
        TypeError,
        r"micro-batches.*nested.*passes\(\)",
    ),
    "jagged": (
        (quietly(lambda: torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged)), Y[:2]),
        {},
        TypeError,
        r"micro-batches.*jagged.*passes\(\)",
    ),
    # Packed, its tensors are as long as each other.
    "a packed sequence": (
        (nn.utils.rnn.pack_sequence([X]),),
        {},
        TypeError,
        r"micro-batches.*PackedSequence.*passes\(\)",
    ),
    "text in a mapping": ((UserDict(x=X, y="text"),), {}, TypeError, r"micro-batches.*got a str"),
    "images of several sizes": (([X, X[:3]],), {}, ValueError, r"micro-batches.*\[3, 7\].*passes\(\)"),
    "one part, by size": ((X, "label"), {"num_micro_batches": None, "micro_batch_size": 9}, TypeError, r"got a str"),
    "no samples": ((X[:0], Y[:0]), {}, ValueError, r"no samples"),
    "no samples, by size": (
        (X[:0], Y[:0]),
        {"num_micro_batches": None, "micro_batch_size": 2},
        ValueError,
        r"no samples",
    ),
    "nothing": (((),), {}, ValueError, r"(?i)tensor"),
    "None": ((None,), {}, ValueError, r"(?i)tensor"),
    "too few samples": (
        (X[:3], Y[:3]),
        {"num_micro_batches": 4},
        ValueError,
        r"num_micro_batches=4.*3 samples.*(drop_last|micro_batch_size|larger|fewer)",
    ),
}


@pytest.mark.parametrize("way", ["passes", "train_step"])
@pytest.mark.parametrize(("data", "options", "error", "match"), BATCHES.values(), ids=BATCHES)
def test_a_batch_that_cannot_be_split_is_named_before_anything_runs(data, options, error, match, way):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, **{"num_micro_batches": 2, **options})
    step_with_train_step(opt, model, (X, Y))
    closure_of(model, (X, Y))()
    before = snapshot(model, base)
    with pytest.raises(error, match=match):
        if way == "passes":
            opt.passes(*data)
        else:
            opt.train_step(lambda *part: pytest.fail("nothing may run"), *data)
    assert unchanged(model, base, before)
    step_with_passes(opt, model, (X, Y))


def test_train_step_without_a_batch_says_how_to_call_it():
    model = mlp()
    with pytest.raises(ValueError, match=r"train_step\(loss_fn, x, y\)"):
        MicroBatchSAM(sgd(model.parameters())).train_step(lambda: model(X).sum())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_closures_is_named(count):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, num_micro_batches=2)
    before = snapshot(model, base)
    with pytest.raises(ValueError, match=rf"num_micro_batches=2.*got {count}"):
        opt.step([closure_of(model, (X, Y))] * count)
    assert unchanged(model, base, before)
    with pytest.raises(ValueError, match=r"num_micro_batches=2.*got 1"):
        opt.step(closure_of(model, (X, Y)))


@pytest.mark.parametrize("closure", [3, "loss", torch.ones(2), [3, 4], (f for f in ())], ids=lambda c: type(c).__name__)
def test_a_closure_that_cannot_be_called_changes_nothing(closure):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, num_micro_batches=2 if isinstance(closure, list) else None)
    before = snapshot(model, base)
    with pytest.raises((TypeError, ValueError)):
        opt.step(closure)
    assert unchanged(model, base, before)
    opt.restore()
    step_with_passes(opt, model, (X, Y))


# ---- settings and gradients that go bad later -------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [-0.1, NAN, INF, "0.1", None, torch.tensor(NAN)], ids=str)
@pytest.mark.parametrize("way", ["passes", "train_step"])
def test_a_bad_rho_set_in_a_group_is_named_at_the_next_step(rho, way, backend):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, backend=backend)
    step_with_train_step(opt, model, (X, Y))
    opt.param_groups[0]["rho"] = rho
    before = snapshot(model, base)
    step = step_with_passes if way == "passes" else step_with_train_step
    with pytest.raises(ValueError, match=r"rho must be"):
        step(opt, model, (X, Y))
    assert unchanged(model, base, before)
    opt.param_groups[0]["rho"] = 0.1
    step(opt, model, (X, Y))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_a_gradient_of_another_dtype_is_refused_with_its_remedy(backend):
    model = mlp(torch.bfloat16)
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, backend=backend)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    before = weights(model)
    with pytest.raises(TypeError, match=r"torch\.bfloat16 parameter.*gradient of torch\.float32.*leave grad_dtype"):
        for x, y in opt.passes(X.bfloat16(), Y.bfloat16()):
            loss_of(model, x, y).float().backward()
    assert same_bits(model.parameters(), before)


def test_parameters_that_are_added_during_a_step_are_refused_and_the_step_given_up(backend):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, backend=backend)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"parameters were added inside a passes"):
        for turn, (x, y) in enumerate(opt.passes(X, Y)):
            loss_of(model, x, y).backward()
            if turn == 0:
                base.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert same_bits(model.parameters(), before)
    opt.restore()
    step_with_train_step(opt, model, (X, Y))
    assert not same_bits(model.parameters(), before)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: nn.Linear(2, 3, device="meta"), "is on the meta device.*materialise"),
        (lambda: nn.LazyLinear(3), "has neither shape nor values.*forward"),
    ],
    ids=["on the meta device", "lazy"],
)
def test_parameters_without_values_are_refused_with_the_remedy(model, match):
    with pytest.raises(ValueError, match=f"parameter 0 of group 0 {match}"):
        MicroBatchSAM(sgd(model().parameters()))


def test_an_attempt_that_fails_leaves_the_earlier_wrappers_rho():
    base = sgd([nn.Parameter(torch.ones(3))])
    MicroBatchSAM(base, rho=0.03)
    MicroBatchSAM(base, rho=0.07)
    base.param_groups[0]["rho"] = 0.2
    base.param_groups[0]["params"].append(nn.Parameter(torch.ones(4, 6)[:, 1]))
    with pytest.raises(ValueError, match="leave gaps in memory"):
        MicroBatchSAM(base, rho=0.5, flatten=False)
    assert base.param_groups[0]["rho"] == 0.2


@pytest.mark.parametrize("call", ["train_step", "update_mask"])
def test_a_forgotten_loss_function_is_named(call):
    opt = MicroBatchSAM(sgd(mlp().parameters()), method=methods.SparseSAM())
    with pytest.raises(TypeError, match="loss_fn must be a function of a micro-batch"):
        getattr(opt, call)(X, Y)


@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@pytest.mark.parametrize("way", ["passes", "train_step", "backward and step"])
def test_a_sparse_gradient_is_refused_with_its_remedy(way, flatten, backend):
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.embedding((x[:, 0].abs() * 3).long() % 10))

    model = Embeds()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, flatten=flatten, backend=backend)
    opt.enabled = way != "backward and step"
    before = snapshot(model, base)
    with pytest.raises(TypeError, match=r"gradient.*sparse.*sparse=False"):
        if way == "passes":
            step_with_passes(opt, model, (X, Y))
        elif way == "train_step":
            step_with_train_step(opt, model, (X, Y))
        else:
            closure_of(model, (X, Y))()
            opt.step()
    opt.zero_grad()
    assert unchanged(model, base, before)


@pytest.mark.parametrize("memory_order", [False, True], ids=["", "in another memory order"])
@pytest.mark.parametrize("way", ["passes", "backward and step"])
def test_a_gradient_whose_storage_was_freed_is_refused(way, memory_order, backend):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, backend=backend)
    opt.enabled = way != "backward and step"
    before = weights(model)

    def free():
        p = model[0].weight
        if memory_order:
            p.grad = p.grad.t().contiguous().t()
        p.grad.untyped_storage().resize_(0)

    with pytest.raises(RuntimeError, match="freed or shrunk"):
        if way == "passes":
            for part in opt.passes(X, Y):
                loss_of(model, *part).backward()
                free()
        else:
            loss_of(model, X, Y).backward()
            free()
            opt.step()
    assert same_bits(model.parameters(), before)


@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@pytest.mark.parametrize("when", ["before", "after the first step"])
def test_a_parameter_whose_storage_was_freed_is_refused(when, flatten):
    model = mlp()
    base = sgd(model.parameters())
    if when != "before":
        opt = MicroBatchSAM(base, flatten=flatten)
        step_with_passes(opt, model, (X, Y))
    storage = torch.ones(15).untyped_storage()
    model[0].weight.data = torch.empty(0).set_(storage, 0, (5, 3))
    storage.resize_(0)
    with pytest.raises(
        ValueError, match=r"storage of parameter 0 of group 0 was freed or shrunk: bring its values back"
    ):
        if when == "before":
            MicroBatchSAM(base, flatten=flatten)
        else:
            next(opt.passes(X, Y))


def test_a_base_optimizer_that_needs_a_closure_of_its_own_changes_nothing():
    model = mlp()
    before, addresses = weights(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(TypeError, match=r"LBFGS\.step asks for closure, .* use e\.g\. SGD or AdamW"):
        MicroBatchSAM(LBFGS(model.parameters()))
    assert same_bits(model.parameters(), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses


# ---- at the wrong time ------------------------------------------------------------------------------------------------------

WRONG_TIME = {
    "step()": lambda opt, model: opt.step(),
    "step(closure)": lambda opt, model: opt.step(closure_of(model, (X, Y))),
    "train_step": lambda opt, model: opt.train_step(lambda *part: loss_of(model, *part), X, Y),
    "passes": lambda opt, model: next(opt.passes(X, Y)),
    "an earlier iterator": lambda opt, model: next(opt.earlier),
    "load_state_dict": lambda opt, model: opt.load_state_dict(opt.state_dict()),
    "add_param_group": lambda opt, model: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    "deepcopy": lambda opt, model: copy.deepcopy(opt),
}


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("name", WRONG_TIME)
def test_what_must_not_happen_inside_the_loop_is_refused_with_the_way_out(name, call, backend):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, num_micro_batches=2, backend=backend)
    opt.earlier = opt.passes(X, Y)
    before = snapshot(model, base)
    iterator = opt.passes(X, Y)
    for _ in range(call + 1):
        loss_of(model, *next(iterator)).backward()
    inside = weights(model)
    message = r"perturbed.*opt\.restore\(\)" if call % 2 else r"inside a passes\(\) loop.*opt\.restore\(\)"
    opt.num_micro_batches = 1
    with pytest.raises(RuntimeError, match=message):
        WRONG_TIME[name](opt, model)
    assert same_bits(model.parameters(), inside)
    iterator.close()
    assert unchanged(model, base, before)
    step_with_passes(opt, model, (X, Y))


def test_a_step_inside_a_closure_is_refused(backend):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, backend=backend)
    before = snapshot(model, base)

    def closure():
        closure_of(model, (X, Y))()
        opt.step()

    with pytest.raises(RuntimeError, match=r"step\(\) inside"):
        opt.step(closure)
    assert unchanged(model, base, before)


# ---- parameters that change after construction ------------------------------------------------------------------------------


def to_double(model):
    model.double()


def to_int(model):
    model[0].weight.requires_grad_(False)
    model[0].weight.data = model[0].weight.data.int()


def resized(model):
    model[0].weight.data = torch.ones(7, 7)


def resized_to_the_front(model):
    model[0].weight.data = model[0].weight.data[:2]


def reshaped(model):
    model[0].weight.data = model[0].weight.data.view(3, 5)


def reshaped_elsewhere(model):
    model[0].weight.data = torch.ones(15)


def with_gaps(model):
    model[0].weight.data = torch.ones(5, 6)[:, ::2]


@pytest.mark.parametrize("way", ["passes", "train_step", "step"])
@pytest.mark.parametrize(
    ("change", "flatten", "error", "match"),
    [
        (to_int, True, TypeError, r"parameter 0 of group 0 must be one of .*, got torch\.int32"),
        (to_int, False, TypeError, r"parameter 0 of group 0 must be one of .*, got torch\.int32"),
        (resized, True, RuntimeError, r"49 elements.*15.*first"),
        (resized, False, RuntimeError, r"49 elements.*15.*first"),
        (resized_to_the_front, True, RuntimeError, r"6 elements.*15.*first"),
        (resized_to_the_front, False, RuntimeError, r"6 elements.*15.*first"),
        (reshaped, True, RuntimeError, r"shape.*first"),
        (reshaped, False, RuntimeError, r"shape.*first"),
        (reshaped_elsewhere, True, RuntimeError, r"shape.*first"),
        (reshaped_elsewhere, False, RuntimeError, r"shape.*first"),
        (with_gaps, False, ValueError, r"strides.*contiguous"),
    ],
    ids=lambda v: v.__name__ if callable(v) and not isinstance(v, type) else "flattened" if v is True else "",
)
def test_a_parameter_that_was_converted_or_resized_is_refused(change, flatten, error, match, way):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, flatten=flatten)
    step_with_train_step(opt, model, (X, Y))
    change(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = weights(model)
    state = copy.deepcopy(base.state_dict()["state"])
    with pytest.raises(error, match=match):
        if way == "step":
            opt.step()
        elif way == "passes":
            next(opt.passes(X, Y))
        else:
            opt.train_step(lambda *part: sum(p.double().sum() for p in model.parameters()), X, Y)
    assert same_bits(model.parameters(), before)
    for i, entry in base.state_dict()["state"].items():
        assert same_bits(entry.values(), state[i].values())


def test_a_model_converted_back_is_taken_back():
    model = mlp()
    opt = MicroBatchSAM(sgd(model.parameters()))
    twin = copy.deepcopy((model, opt))
    model.double().float()
    step_with_passes(opt, model, (X, Y))
    step_with_passes(twin[1], twin[0], (X, Y))
    assert same_bits(model.parameters(), twin[0].parameters())


# ---- groups -----------------------------------------------------------------------------------------------------------------

GROUPS = {
    "rho": ({"params": [nn.Parameter(torch.ones(2))], "rho": -1.0}, ValueError, r"rho.*-1\.0"),
    "8 bits": ({"params": [nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))]}, TypeError, "float8_e4m3fn"),
    "complex": ({"params": [nn.Parameter(torch.ones(2, dtype=torch.cdouble))]}, TypeError, "view_as_real"),
    "not a dict": ([nn.Parameter(torch.ones(2))], TypeError, "dict"),
    "without params": ({"lr": 0.1}, (KeyError, ValueError, TypeError), "params"),
    "a set": ({"params": {nn.Parameter(torch.ones(2))}}, TypeError, "ordered"),
}


@pytest.mark.parametrize(("group", "error", "match"), GROUPS.values(), ids=GROUPS)
def test_a_group_that_cannot_be_added_is_not(group, error, match):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base)
    step_with_passes(opt, model, (X, Y))
    before = snapshot(model, base)
    with pytest.raises(error, match=match):
        opt.add_param_group(group)
    assert unchanged(model, base, before)
    step_with_passes(opt, model, (X, Y))


def test_a_group_of_known_or_shared_parameters_is_not_added():
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base)
    before = snapshot(model, base)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [model[0].weight]})
    with pytest.raises(ValueError, match="share memory"):
        opt.add_param_group({"params": [nn.Parameter(model[0].weight.data)]})
    assert unchanged(model, base, before)
    step_with_passes(opt, model, (X, Y))


@pytest.mark.parametrize("where", ["removed", "replaced", "moved to another group"])
def test_parameters_that_leave_a_group_by_hand_are_followed_or_refused(where):
    """torch reads its groups afresh in every step; nothing may go on with the old ones in silence."""
    torch.manual_seed(0)
    first, second, third = (nn.Parameter(torch.randn(3)) for _ in range(3))
    base = SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2, "rho": 0.5}], lr=0.1)
    opt = MicroBatchSAM(base, rho=0.1)
    opt.enabled = False
    for p in (first, second, third):
        p.grad = torch.ones_like(p)
    opt.step()
    if where == "removed":
        del opt.param_groups[0]
        expected = {second: 0.2}
    elif where == "replaced":
        opt.param_groups[0]["params"] = [third]
        expected = {third: 0.1, second: 0.2}
    else:
        opt.param_groups[0]["params"], opt.param_groups[1]["params"] = [second], [first]
        expected = {first: 0.2, second: 0.1}
    before = {p: p.detach().clone() for p in (first, second, third)}
    try:
        opt.step()
    except (RuntimeError, ValueError) as error:
        assert "group" in str(error)
        assert all(same_bits([p], [before[p]]) for p in before)
        return
    for p, old in before.items():
        torch.testing.assert_close(p.detach(), old - expected.get(p, 0.0) * torch.ones(3))


PARAMS = {
    "an iterator": (iter, r"params of group 0 must be a list of tensors, got list_iterator"),
    "a set": (set, r"must be a list of tensors, got set"),
    "a tensor": (lambda params: params[0], r"must be a list of tensors, got Parameter"),
    "numbers": (lambda params: [1, 2], r"parameter 0 of group 0 must be a tensor, got int"),
}


@pytest.mark.parametrize("when", ["before", "after the first step"])
@pytest.mark.parametrize(("make", "match"), PARAMS.values(), ids=PARAMS)
def test_params_of_a_group_that_are_no_list_of_tensors_are_refused(make, match, when):
    model = mlp()
    base = sgd(model.parameters())
    params = base.param_groups[0]["params"]
    if when == "before":
        base.param_groups[0]["params"] = make(params)
        with pytest.raises(TypeError, match=match):
            MicroBatchSAM(base)
        return
    opt = MicroBatchSAM(base)
    step_with_passes(opt, model, (X, Y))
    before = weights(model)
    base.param_groups[0]["params"] = make(params)
    with pytest.raises(TypeError, match=match):
        step_with_passes(opt, model, (X, Y))
    assert same_bits(model.parameters(), before)
    base.param_groups[0]["params"] = params
    step_with_passes(opt, model, (X, Y))


def test_params_of_a_group_may_be_a_tuple():
    models = mlp(), mlp()
    for model, kind in zip(models, (list, tuple), strict=True):
        base = sgd(model.parameters())
        base.param_groups[0]["params"] = kind(base.param_groups[0]["params"])
        opt = MicroBatchSAM(base)
        for step in (step_with_passes, step_with_train_step):
            step(opt, model, (X, Y))
            opt.zero_grad()
            opt.load_state_dict(copy.deepcopy(opt).state_dict())
        base.param_groups[0]["params"] = kind(base.param_groups[0]["params"])
        step_with_passes(opt, model, (X, Y))
    assert same_bits(*(model.parameters() for model in models))


# ---- state dicts ------------------------------------------------------------------------------------------------------------


def saved_by(shape, base=sgd, groups=1, method=None, dtype=torch.float32):
    params = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in shape]
    step = max(len(params) // groups, 1)
    opt = MicroBatchSAM(base([{"params": params[i : i + step]} for i in range(0, len(params), step)]), method=method)
    opt.step(lambda: sum((p * p).sum() for p in params).backward())
    return opt.state_dict()


SHAPES = [p.shape for p in mlp().parameters()]
STATE_DICTS = {
    "other shapes": (lambda: saved_by([(5, 4), (5,), (2, 5), (2,)]), r"shape \(5, 4\).*parameter 0.*\(5, 3\)"),
    "transposed": (lambda: saved_by([(3, 5), (5,), (2, 5), (2,)]), r"shape \(3, 5\).*parameter 0.*\(5, 3\)"),
    "other shapes, Adam's": (lambda: saved_by([(5, 4), (5,), (2, 5), (2,)], Adam), r"shape \(5, 4\)"),
    "fewer parameters": (lambda: saved_by(SHAPES[:3]), r"(?i)group|parameter"),
    "more parameters": (lambda: saved_by([*SHAPES, (3,)]), r"(?i)group|parameter"),
    "two groups": (lambda: saved_by(SHAPES, groups=2), r"different number of parameter groups"),
    "an average of other shapes": (
        lambda: {**saved_by(SHAPES), "msam": {"ema": {0: torch.ones(7)}}},
        r"ema.*\(7,\).*parameter 0.*\(5, 3\)",
    ),
    "an average of other parameters": (
        lambda: {**saved_by(SHAPES), "msam": {"ema": {9: torch.ones(7)}}},
        r"ema.*parameter 9",
    ),
    "an average that is no dict": (lambda: {**saved_by(SHAPES), "msam": {"ema": [1, 2]}}, r"ema"),
    "an average that is no tensor": (lambda: {**saved_by(SHAPES), "msam": {"ema": {0: "a"}}}, r"ema"),
    "msam is no dict": (lambda: {**saved_by(SHAPES), "msam": None}, r"msam"),
    "state of no parameter": (lambda: {**saved_by(SHAPES), "state": {9: {}}}, r"parameter 9"),
    "a list": (lambda: [1, 2], r"state_dict\(\).*list"),
    "None": (lambda: None, r"state_dict\(\).*NoneType"),
    "empty": (lambda: {}, r"state_dict\(\).*'state'"),
    "a model's": (lambda: dict(mlp().state_dict()), r"state_dict\(\).*'state'.*0\.weight"),
    "without groups": (lambda: {"state": {}}, r"'param_groups'"),
    "groups without params": (lambda: {"state": {}, "param_groups": [{}]}, r"params"),
    "a bad rho": (
        lambda: (lambda d: {**d, "param_groups": [{**d["param_groups"][0], "rho": -1.0}]})(saved_by(SHAPES)),
        r"rho.*-1\.0",
    ),
}


@pytest.mark.parametrize(("make", "match"), STATE_DICTS.values(), ids=STATE_DICTS)
def test_a_state_dict_that_does_not_fit_is_refused_whole(make, match):
    model = mlp()
    base = sgd(model.parameters())
    opt = MicroBatchSAM(base, method=methods.FriendlySAM())
    step_with_passes(opt, model, (X, Y))
    before, ema = snapshot(model, base), copy.deepcopy(remembered(opt, "ema"))
    state = make()
    with pytest.raises((ValueError, TypeError), match=match):
        opt.load_state_dict(state)
    assert unchanged(model, base, before)
    assert same_bits(remembered(opt, "ema").values(), ema.values())
    step_with_passes(opt, model, (X, Y))


def test_the_state_of_another_kind_of_optimizer_is_not_mixed_up():
    """torch accepts Adam's state in SGD and ignores what it does not know. So it is here."""
    expected = mlp(torch.float64)
    actual = copy.deepcopy(expected)
    theirs, base = sgd(expected.parameters()), sgd(actual.parameters())
    opt = MicroBatchSAM(base, rho=0.0)
    saved = saved_by(SHAPES, Adam, dtype=torch.float64)
    settings = {k: v for k, v in base.state_dict()["param_groups"][0].items() if k not in saved["param_groups"][0]}
    saved["param_groups"][0].update(settings)
    theirs.load_state_dict(saved)
    opt.load_state_dict(saved)
    data = batch(dtype=torch.float64)
    opt.param_groups[0]["rho"] = 0.0
    step_with_passes(opt, actual, data)
    closure_of(expected, data)()
    theirs.step()
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- methods ---------------------------------------------------------------------------------------------------------

dynamic = {"mask": "dynamic", "total_steps": 9}
# method, arguments, what the message says
BAD_METHODS = {
    "sparsity below 0": (
        methods.SparseSAM,
        {"sparsity": -0.1},
        "sparsity must be a finite number between 0 and 1, got -0.1",
    ),
    "sparsity above 1": (
        methods.SparseSAM,
        {"sparsity": 1.1},
        "sparsity must be a finite number between 0 and 1, got 1.1",
    ),
    "sparsity nan": (methods.SparseSAM, {"sparsity": NAN}, "sparsity must be a finite number between 0 and 1, got nan"),
    "sparsity text": (
        methods.SparseSAM,
        {"sparsity": "half"},
        "sparsity must be a finite number between 0 and 1, got 'half'",
    ),
    "mask": (methods.SparseSAM, {"mask": "magic"}, "mask must be 'fisher' or 'dynamic', got 'magic'"),
    "update_every 0": (methods.SparseSAM, {"update_every": 0}, "update_every must be an integer >= 1, got 0"),
    "update_every 1.5": (
        methods.SparseSAM,
        {"update_every": 1.5},
        "update_every must be an integer >= 1, got 1.5",
    ),
    "update_every True": (
        methods.SparseSAM,
        {"update_every": True},
        "update_every must be an integer >= 1, got True",
    ),
    "no total_steps": (methods.SparseSAM, {"mask": "dynamic"}, "give total_steps, those of the training"),
    "total_steps 0": (methods.SparseSAM, {"total_steps": 0}, "total_steps must be an integer >= 1, got 0"),
    "total_steps 1.5": (
        methods.SparseSAM,
        {**dynamic, "total_steps": 1.5},
        "total_steps must be an integer >= 1, got",
    ),
    "drop_rate": (
        methods.SparseSAM,
        {**dynamic, "drop_rate": 2},
        "drop_rate must be a finite number between 0 and 1, got 2",
    ),
    "drop_rate nan": (
        methods.SparseSAM,
        {**dynamic, "drop_rate": NAN},
        "drop_rate must be a finite number between 0 and 1",
    ),
    "seed": (methods.SparseSAM, {"seed": 1.5}, "seed must be an integer >= 0, got 1.5"),
    "seed below 0": (methods.SparseSAM, {"seed": -1}, "seed must be an integer >= 0, got -1"),
    "seed True": (methods.SparseSAM, {"seed": True}, "seed must be an integer >= 0, got True"),
    "eta True": (methods.AdaptiveSAM, {"eta": True}, "eta must be a finite number >= 0, got True"),
    "sigma True": (methods.FriendlySAM, {"sigma": True}, "sigma must be a finite number >= 0, got True"),
    "k 0": (methods.LookSAM, {"k": 0}, "k must be an integer >= 1, got 0"),
    "k 2.5": (methods.LookSAM, {"k": 2.5}, "k must be an integer >= 1, got 2.5"),
    "k True": (methods.LookSAM, {"k": True}, "k must be an integer >= 1, got True"),
    "k None": (methods.LookSAM, {"k": None}, "k must be an integer >= 1, got None"),
    **{
        f"alpha {alpha} of {method.__name__}": (
            method,
            {"alpha": alpha},
            f"alpha must be a finite number >= 0, got {alpha!r}",
        )
        for method in (methods.LookSAM, methods.GapSAM)
        for alpha in (-1, -0.1, NAN, INF, "much")
    },
    **{
        f"rho_min {rho_min}": (
            methods.BilateralSAM,
            {"rho_min": rho_min},
            f"rho_min must be a finite number >= 0, got {rho_min!r}",
        )
        for rho_min in (-1, NAN, INF, "x", None)
    },
    "theta 0": (methods.VaSSO, {"theta": 0}, "theta must be a finite number > 0 and <= 1, got 0"),
    "theta above 1": (methods.VaSSO, {"theta": 1.5}, "theta must be a finite number > 0 and <= 1, got 1.5"),
    "gamma below 0": (methods.WSAM, {"gamma": -0.5}, "gamma must be a finite number between 0 and 1, got -0.5"),
    "gamma 1": (
        methods.WSAM,
        {"gamma": 1.0},
        "gamma must be less than 1, where gamma / (1 - gamma) has no value, got 1.0",
    ),
    "gamma nan": (methods.WSAM, {"gamma": NAN}, "gamma must be a finite number between 0 and 1, got nan"),
    "decoupled 1": (methods.WSAM, {"decoupled": 1}, "decoupled must be True or False, got 1"),
    "only nothing": (methods.SAM, {"only": []}, "only names no parameter: give tensors that the optimizer has"),
    **{
        f"sigma {sigma} of LossEquatedSAM": (
            methods.LossEquatedSAM,
            {"sigma": sigma},
            f"sigma must be a finite number >= 0, got {sigma!r}",
        )
        for sigma in (-1, NAN, INF, "x", None)
    },
    **{
        f"start of {method.__name__}": (method, {"start": -1}, "start must be an integer >= 0, got -1")
        for method in (methods.StableSAM, methods.SparseSAM, methods.LookSAM, methods.BilateralSAM, methods.GapSAM)
    },
}


@pytest.mark.parametrize("case", BAD_METHODS)
def test_a_method_with_a_bad_argument_is_refused(case):
    method, arguments, message = BAD_METHODS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        method(**arguments)


P = nn.Parameter(torch.ones(3))
# what only is, what the message says
NO_PARAMETERS = {
    "one": (P, "only must be several parameters, got Parameter: give tensors that the optimizer has"),
    "a module": (nn.Linear(2, 2), "only must be several parameters, got Linear: give tensors"),
    "named": ([("weight", P)], "only must hold parameters, got tuple among them"),
    "names": (["weight"], "only must hold parameters, got str among them"),
    "a number": (1, "only must be several parameters, got int"),
}


@pytest.mark.parametrize("case", NO_PARAMETERS)
def test_a_choice_of_parameters_that_is_none_is_refused(case):
    only, message = NO_PARAMETERS[case]
    with pytest.raises(TypeError, match=re.escape(message)):
        methods.FriendlySAM(only=only)


def test_a_choice_of_none_of_the_optimizers_parameters_is_refused(backend):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"only=<2 parameters> are none of the optimizer's 2: give tensors that it has"
    ):
        MicroBatchSAM(torch.optim.SGD(model.parameters()), method=methods.SAM(only=other.parameters()), backend=backend)
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize(("model", "error"), [(nn.Linear(2, 2), ValueError), ([nn.LayerNorm(2)], TypeError)], ids=str)
def test_a_model_without_normalisation_layers_is_refused(model, error):
    with pytest.raises(error, match=r"has no normalisation layer with weights|needs a torch.nn.Module, got list"):
        methods.norm_layers(model)


# base optimizer, method, what the message says
UNSERVED = {
    "SGD without momentum": (torch.optim.SGD, methods.MomentumSAM(), "SGD keeps none: use one that does, e.g. SGD(mom"),
    "Adagrad": (torch.optim.Adagrad, methods.MomentumSAM(), "Adagrad keeps none: use one that does, e.g. SGD(mom"),
    "Adafactor": (
        torch.optim.Adafactor,
        methods.MomentumSAM(),
        "Adafactor keeps none: use one that does, e.g. SGD(mom",
    ),
    "RMSprop without momentum": (torch.optim.RMSprop, methods.MomentumSAM(), "RMSprop keeps none: use one that"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_a_base_optimizer_that_lacks_what_the_method_needs_is_refused(case, backend):
    kind, method, message = UNSERVED[case]
    p = nn.Parameter(torch.ones(3))
    pointer = p.data_ptr()
    with pytest.raises(ValueError, match=re.escape(message)):
        MicroBatchSAM(kind([p], lr=0.1), method=method, backend=backend)
    assert p.data_ptr() == pointer
    opt = MicroBatchSAM(kind([p], lr=0.1), backend=backend)
    opt.method = method
    before = p.detach().clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        opt.step(lambda: p.square().sum().backward())
    assert torch.equal(p, before)
    assert p.grad is None


def test_a_base_optimizer_that_turns_out_to_keep_no_momentum_is_refused(backend):
    p = nn.Parameter(torch.ones(3, 2))

    class Own(torch.optim.Optimizer):
        """Has betas, and keeps its mean under a name of its own."""

        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

        def step(self, closure=None):
            self.state[p]["mean"] = p.grad.clone()

    opt = MicroBatchSAM(Own([p]), method=methods.MomentumSAM(), backend=backend)

    def closure():
        p.square().sum().backward()

    opt.step(closure)  # nothing is known of it yet
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"Own keeps none; it keeps 'mean': use one that does"):
        opt.step(closure)
    assert torch.equal(p, before)


def test_decoupled_wsam_is_refused_without_a_learning_rate(backend):
    class WithoutRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    with pytest.raises(ValueError, match=r"WSAM.* takes a step of its own by the groups' lr, .* use decoupled=False"):
        MicroBatchSAM(WithoutRate([nn.Parameter(torch.ones(3))]), method=methods.WSAM(), backend=backend)
