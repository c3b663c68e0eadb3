# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of those who know an optimizer by ``state`` and ``param_groups`` alone, as torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import SGD, AdamW, RMSprop

from msam_kernels import MicroBatchSAM, methods
from plain import METHODS, WITHOUT_MOMENTUM, batch, loss_of, mlp, remembered, same_bits, step_with_train_step, weights

BASES = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "SGD momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.01),
    "RMSprop": lambda p: RMSprop(p, lr=0.01),
}
F64 = torch.float64


def new(method, base, seed=0, backend="auto"):
    model = mlp(F64, seed=seed)
    # Of two groups, one maximised: each has its numbers.
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "rho": 0.2}]
    return model, MicroBatchSAM(BASES[base](groups), 0.1, method=method, num_micro_batches=2, backend=backend)


def train(model, opt, steps):
    for step in steps:
        step_with_train_step(opt, model, batch(6, F64, seed=step))


def through_dcp(model, opt, into, options, folder):
    """Save the one, load in place what the other shows, as every script with torch.distributed.checkpoint does."""
    dcp.save(dict(zip("mo", get_state_dict(model, opt, options=options), strict=True)), checkpoint_id=folder)
    state = dict(zip("mo", get_state_dict(*into, options=options), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(*into, model_state_dict=state["m"], optim_state_dict=state["o"], options=options)


def by_helpers(model, opt, into, options, folder):
    """The helpers alone, through a file."""
    file = io.BytesIO()
    torch.save(get_state_dict(model, opt, options=options), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    set_state_dict(*into, model_state_dict=states[0], optim_state_dict=states[1], options=options)


OPTIONS = {
    "as it is": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full, on the CPU": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
REMEMBER = [name for name, m in METHODS.items() if m.full.lmbda is not None or m.full.remembers_v or m.full.sparse]
KEEP = ["F-SAM", "LookSAM k=2", "Sparse SAM"]


def rows():
    found = []
    for method in METHODS:
        for base in BASES:
            if base in ("SGD", "RMSprop") and method not in WITHOUT_MOMENTUM:
                continue
            for options in OPTIONS:
                if base == "SGD" and options.startswith("full") and method not in REMEMBER:
                    continue  # where there is no state at all, torch's helpers fail
                for how in (through_dcp, by_helpers):
                    short = (method in KEEP and base != "RMSprop") or (method == "SAM" and base == "AdamW")
                    short = short and (how is through_dcp) == (options != "full, on the CPU")
                    marks = () if short else pytest.mark.exhaustive
                    name = f"{method}-{base}-{options}-{how.__name__.replace('_', ' ')}"
                    found.append(pytest.param(method, base, options, how, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("method", "base", "options", "how"), rows())
@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated")
def test_training_resumes_bit_for_bit_from_distributed_checkpoints(method, base, options, how, tmp_path, backend):
    straight, opt = new(METHODS[method], base, backend=backend)
    train(straight, opt, range(7))
    model, first = new(METHODS[method], base, backend=backend)
    train(model, first, range(3))
    for trained in (0, 2):  # loads into a fresh optimizer, and into one that remembers something else
        resumed, second = new(METHODS[method], base, seed=7, backend=backend)
        train(resumed, second, range(10, 10 + trained))
        how(model, first, (resumed, second), OPTIONS[options], tmp_path / str(trained))
        assert second.steps == 3
        assert [group["msam_steps"] for group in second.param_groups] == [3, 3]
        train(resumed, second, range(3, 7))
        assert same_bits(resumed.parameters(), straight.parameters())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["SAM", *KEEP])
def test_asking_for_state_changes_nothing(method, base, backend):
    """Neither of an optimizer that is new, nor later; and every name is there that a later file has."""
    expected, theirs = new(METHODS[method], base, backend=backend)
    actual, ours = new(METHODS[method], base, backend=backend)
    names = []
    for step in range(4):
        before = weights(actual)
        state = get_optimizer_state_dict(actual, ours)
        assert ours.steps == step
        assert same_bits(weights(actual), before)
        assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in theirs.param_groups]
        names.append({name: sorted(entry) for name, entry in state["state"].items()})
        train(expected, theirs, [step])
        train(actual, ours, [step])
        # RMSprop has begun its state by a step of its own, which is torch's way.
        torch.testing.assert_close(weights(actual), weights(expected), rtol=0, atol=0 if base != "RMSprop" else 1e-12)
    assert names[0] == names[1] == names[3]
    kept = {"F-SAM": "msam_ema", "LookSAM k=2": "msam_v", "Sparse SAM": "msam_mask"}.get(method)
    assert all((kept in entry) == (kept is not None) for entry in names[0].values())
    assert kept is None or len(names[0]) == 4


def test_a_step_of_learning_rate_zero_is_a_step_where_there_is_a_gradient(backend):
    model, opt = new(methods.SAM(), "AdamW", backend=backend)
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(model, opt, range(1))
    assert opt.steps == 1
    model, opt = new(methods.SAM(), "AdamW", backend=backend)
    opt.enabled = False
    loss_of(model, *batch(6, F64)).backward()
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    assert opt.steps == 1
    assert opt.state[model[0].weight]["step"] == 1


@pytest.mark.parametrize("base", BASES)
def test_an_entry_that_the_base_optimizer_has_yet_to_begin_stays_empty(base, backend):
    """torch begins those that are. What a mask says of that parameter is saved all the same."""
    used, later = nn.Parameter(torch.ones(3, dtype=F64)), nn.Parameter(torch.ones(5, dtype=F64))
    make = BASES[base]

    def wrapped():
        params = [nn.Parameter(p.detach().clone()) for p in (used, later)]
        method = methods.FriendlySAM() + methods.SparseSAM(update_every=1000)
        return params, MicroBatchSAM(make(params), 0.1, method=method, backend=backend)

    def step(params, opt, of):
        opt.train_step(lambda x: sum((p * x).square().sum() for p in of), torch.ones(2, 1, dtype=F64))

    params, opt = wrapped()
    step(params, opt, params[:1])
    saved = copy.deepcopy(opt.state_dict())
    assert sorted(remembered(opt, "ema")) == [0]
    assert sorted(remembered(opt, "mask")) == [0, 1]
    plain = make([nn.Parameter(p.detach().clone()) for p in params])
    plain.load_state_dict(copy.deepcopy(saved))
    for p in plain.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    plain.step()  # KeyError where an entry is there that is not the optimizer's
    again, resumed = wrapped()
    with torch.no_grad():
        again[0].copy_(params[0])
    resumed.load_state_dict(saved)
    assert all(map(torch.equal, resumed.mask, opt.mask))
    for seed in range(2):
        step(params, opt, params)
        step(again, resumed, again)
        assert same_bits(params, again), seed


class Copying:
    """As Lightning's and Fabric's wrappers: a class of both, with a copy of the optimizer's attributes."""

    def __new__(cls, optimizer):
        wrapper = object.__new__(type("Wrapper", (Copying, type(optimizer)), {}))
        wrapper.__dict__.update(optimizer.__dict__)
        return wrapper

    def __init__(self, optimizer):
        pass


@pytest.mark.parametrize("method", ["SAM", *KEEP])
def test_a_wrapper_that_copies_the_attributes_counts_and_saves_the_same_steps(method, backend):
    model, opt = new(METHODS[method], "SGD momentum", backend=backend)
    wrapper = Copying(opt)
    train(model, wrapper, range(3))
    train(model, opt, range(3, 4))
    assert wrapper.steps == opt.steps == 4
    for optimizer in (wrapper, opt, opt.base_optimizer):
        assert [group["msam_steps"] for group in optimizer.state_dict()["param_groups"]] == [4, 4]
    other, fresh = new(METHODS[method], "SGD momentum", backend=backend)
    other.load_state_dict(model.state_dict())
    Copying(fresh).load_state_dict(copy.deepcopy(wrapper.state_dict()))
    train(model, opt, range(4, 7))
    train(other, fresh, range(4, 7))
    assert same_bits(model.parameters(), other.parameters())


def test_another_wrapper_of_the_same_optimizer_counts_anew():
    model, opt = new(methods.SAM(), "SGD")
    train(model, opt, range(3))
    assert MicroBatchSAM(opt.base_optimizer, 0.1, method=methods.SAM(start=2)).steps == 0


# ---- inside of a loop ------------------------------------------------------------------------------------------------


SAVED = {
    "the optimizer's": lambda model, opt: opt.state_dict(),
    "the base optimizer's": lambda model, opt: opt.base_optimizer.state_dict(),
    "the model's": lambda model, opt: model.state_dict(),
    "that of what the model wraps": lambda model, opt: model[0].state_dict(),
}


def wrapping_model():
    model = nn.Sequential(mlp(F64))  # as DistributedDataParallel and torch.compile have the model as their only child
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), 0.1, model=model)
    return model, opt


@pytest.mark.parametrize("what", SAVED)
def test_state_dicts_are_refused_while_the_weights_are_perturbed(what):
    model, opt = wrapping_model()
    save = SAVED[what]
    for x, y in opt.passes(*batch(6, F64)):
        if opt.pass_index == 0:
            save(model, opt)
        else:
            with pytest.raises(
                RuntimeError, match=r"state_dict\(\) while the weights are perturbed: finish the passes"
            ):
                save(model, opt)
        loss_of(model, x, y).backward()
    opt.step()
    save(model, opt)


def test_a_model_that_was_copied_or_pickled_is_not_watched_and_one_that_was_left_neither():
    model, opt = wrapping_model()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for x, y in opt.passes(*batch(6, F64)):
        loss_of(model, x, y).backward()
        if opt.pass_index == 1:
            inside = copy.deepcopy(model)
            assert not same_bits(inside.parameters(), copies[0].parameters()), "it is at w + e"
            for each in (*copies, inside):
                each.state_dict()
    opt.step()
    twin, theirs = copy.deepcopy((model, opt))
    for x, y in theirs.passes(*batch(6, F64)):
        loss_of(twin, x, y).backward()
        model.state_dict()
        if theirs.pass_index == 1:
            with pytest.raises(RuntimeError, match="perturbed"):
                twin.state_dict()
    opt.model = None
    for x, y in opt.passes(*batch(6, F64)):
        loss_of(model, x, y).backward()
        model.state_dict()


def test_a_pickled_model_needs_nothing_of_this_package():
    model, opt = wrapping_model()
    assert b"msam" not in pickle.dumps(model)
    del opt
