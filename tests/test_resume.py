# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: six steps are three, a file, fresh objects and three more, bit for bit; torch reads and writes the files."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

import msam_kernels
from msam_kernels import MicroBatchSAM, methods
from plain import (
    METHODS,
    WAYS,
    WITHOUT_MOMENTUM,
    PlainSAM,
    Zoo,
    assert_close,
    batch,
    closure_of,
    images,
    loss_of,
    mlp,
    random_numbers,
    remembered,
    same_bits,
    saved_size,
    split,
    step_with_passes,
    step_with_train_step,
    through_a_file,
    weights,
    without_ours,
)

BASES = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "SGD momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "Adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "Adam amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=torch.tensor(0.01, dtype=torch.float64)),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9),
    "Adagrad": lambda p: Adagrad(p, lr=0.1),
}
FUSED = [name for name in BASES if name.startswith("Adam") or name == "SGD momentum"]


class Net(nn.Module):
    """Of two dtypes, with a BatchNorm, a channels-last weight and one that is used from the fourth step on."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = random_numbers(seed)
        self.zoo = Zoo(torch.float32, uses=lambda call: call >= 12)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)

    def forward(self, x):
        return (self.norm(self.zoo(x)).double() @ self.last).float()


def fresh(base, method, seed=0, **options):
    model = Net(seed)
    known = {id(p) for g in model.zoo.groups() for p in g["params"]}
    groups = [*model.zoo.groups(), {"params": [p for p in model.parameters() if id(p) not in known], "rho": 0.2}]
    opt = MicroBatchSAM(BASES[base](groups), 0.3, method=METHODS[method], num_micro_batches=2, model=model, **options)
    return model, opt


def data_of(step):
    return images(5, torch.float32, seed=step)


def states_same(a, b):
    """Of two state dicts of optimizers."""
    assert a["state"].keys() == b["state"].keys()
    for i, entry in a["state"].items():
        other = b["state"][i]
        assert entry.keys() == other.keys()
        assert same_bits([torch.as_tensor(entry[k]) for k in entry], [torch.as_tensor(other[k]) for k in entry])
    for name in ("ema", "v", "mask"):
        left = [d.get("msam", {}).get(name, {}) for d in (a, b)]
        assert left[0].keys() == left[1].keys()
        assert same_bits(left[0].values(), left[1].values())
    return True


@pytest.mark.parametrize("way", ["passes", pytest.param("train_step", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("method", "base"),
    [(m, base) for m in METHODS for base in BASES if m in WITHOUT_MOMENTUM or base not in ("SGD", "Adagrad")],
)
def test_six_steps_are_three_and_three_from_a_file(method, base, way, backend):
    straight, opt = fresh(base, method, backend=backend)
    for step in range(6):
        WAYS[way](opt, straight, data_of(step))

    model, first = fresh(base, method, backend=backend)
    for step in range(3):
        WAYS[way](first, model, data_of(step))
    file = through_a_file({"model": model.state_dict(), "optimizer": first.state_dict()})

    resumed, second = fresh(base, method, seed=7, backend=backend)
    resumed.load_state_dict(file["model"])
    second.load_state_dict(file["optimizer"])
    resumed.zoo.calls = model.zoo.calls
    states_same(second.state_dict(), first.state_dict())
    for step in range(3, 6):
        WAYS[way](second, resumed, data_of(step))
    assert same_bits(resumed.state_dict().values(), straight.state_dict().values())
    states_same(second.state_dict(), opt.state_dict())


@pytest.mark.parametrize("save_of", ["wrapper", "base"])
@pytest.mark.parametrize("load_into", ["wrapper", "base"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["SAM", pytest.param("ASAM", marks=pytest.mark.exhaustive)])
def test_the_base_optimizers_state_dict_serves_as_well(method, base, load_into, save_of):
    straight, opt = fresh(base, method)
    for step in range(6):
        step_with_train_step(opt, straight, data_of(step))
    model, first = fresh(base, method)
    for step in range(3):
        step_with_train_step(first, model, data_of(step))
    saved = through_a_file((first if save_of == "wrapper" else first.base_optimizer).state_dict())
    resumed, second = fresh(base, method, seed=7)
    resumed.load_state_dict(model.state_dict())
    resumed.zoo.calls = model.zoo.calls
    (second if load_into == "wrapper" else second.base_optimizer).load_state_dict(saved)
    for step in range(3, 6):
        step_with_train_step(second, resumed, data_of(step))
    assert same_bits(resumed.parameters(), straight.parameters())


@pytest.mark.parametrize("load_into", ["wrapper", "base"])
@pytest.mark.parametrize("base", BASES)
def test_the_state_of_a_plain_optimizer_is_taken_over(base, load_into, backend):
    """Train with the plain optimizer, go on with SAM."""
    expected = mlp(torch.float64)
    plain = BASES[base](expected.parameters())
    for step in range(3):
        closure_of(expected, batch(6, torch.float64, seed=step))()
        plain.step()
        plain.zero_grad()
    saved = through_a_file(plain.state_dict())
    assert "rho" not in saved["param_groups"][0]

    model = copy.deepcopy(expected)
    opt = MicroBatchSAM(
        BASES[base]([{"params": model.parameters(), "rho": 0.3}]), 0.1, num_micro_batches=2, backend=backend
    )
    (opt if load_into == "wrapper" else opt.base_optimizer).load_state_dict(saved)
    assert opt.param_groups[0].get("rho") == 0.3, "the plain optimizer's state dict has none to put in its place"
    reference = PlainSAM(plain, 0.3)
    for step in range(3):
        data = batch(6, torch.float64, seed=step)
        step_with_train_step(opt, model, data)
        reference.step([closure_of(expected, part) for part in split(data, [3, 3])])
        assert_close(model, expected)


@pytest.mark.parametrize("save_of", ["wrapper", "base"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["SAM", "F-SAM"])
def test_a_plain_optimizer_goes_on_from_our_state(method, base, save_of, backend):
    model = mlp()
    opt = MicroBatchSAM(BASES[base](model.parameters()), 0.1, method=METHODS[method], backend=backend)
    for step in range(3):
        step_with_passes(opt, model, batch(seed=step))
    opt.enabled = False
    saved = through_a_file((opt if save_of == "wrapper" else opt.base_optimizer).state_dict())
    results = []
    for optimizer_of in (lambda p: BASES[base](p), lambda p: opt.base_optimizer):
        other = copy.deepcopy(model) if not results else model
        optimizer = optimizer_of(other.parameters())
        if not results:
            optimizer.load_state_dict(saved)
        for step in range(3):
            closure_of(other, batch(seed=10 + step))()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(other))
    assert same_bits(*results)


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_state_that_is_loaded_between_steps_is_used_however_often_it_is_loaded(times, base, backend):
    model = mlp()
    opt = MicroBatchSAM(BASES[base](model.parameters()), 0.1, backend=backend)
    step_with_train_step(opt, model, batch(seed=0))
    start, state = weights(model), copy.deepcopy(opt.state_dict())
    step_with_train_step(opt, model, batch(seed=1))
    expected = weights(model)
    for _ in range(3):
        step_with_train_step(opt, model, batch(seed=2))
    with torch.no_grad():
        for p, w in zip(model.parameters(), start, strict=True):
            p.copy_(w)
    for _ in range(times):
        opt.load_state_dict(state)
    step_with_train_step(opt, model, batch(seed=1))
    assert same_bits(model.parameters(), expected)


def replace_the_tensor(state, p):
    key = "momentum_buffer" if "momentum_buffer" in state[p] else "exp_avg"
    state[p][key] = torch.full_like(p, 2.0)


def replace_the_entry(state, p):
    state[p] = {k: torch.full_like(v, 2.0) for k, v in state[p].items()}


def delete_and_replace_the_entry(state, p):
    entry = {k: torch.full_like(v, 2.0) for k, v in state[p].items()}
    del state[p]
    state[p] = entry


def write_in_place(state, p):
    for value in state[p].values():
        value.fill_(2.0)


def replace_its_memory(state, p):
    for value in state[p].values():
        value.data = torch.full_like(value, 2.0)


def set_it_to_other_memory(state, p):
    for value in state[p].values():
        value.set_(torch.full_like(value, 2.0))


def share_its_memory(state, p):
    for value in state[p].values():
        value.share_memory_()
        value.fill_(2.0)


def replace_its_memory_in_another_order(state, p):
    for value in state[p].values():
        value.data = torch.full_like(value.t(), 2.0).t() if value.dim() == 2 else torch.full_like(value, 2.0)


def delete_the_entry(state, p):
    del state[p]


def delete_a_key(state, p):
    if "momentum_buffer" in state[p]:
        del state[p]["momentum_buffer"]
    else:
        state[p].clear()


def clear(state, p):
    state.clear()


def clear_and_fill_again(state, p):
    entries = {q: {k: torch.full_like(v, 2.0) for k, v in entry.items()} for q, entry in state.items()}
    state.clear()
    state.update(entries)


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize(
    "change",
    [
        replace_the_tensor,
        replace_the_entry,
        delete_and_replace_the_entry,
        write_in_place,
        replace_its_memory,
        set_it_to_other_memory,
        share_its_memory,
        replace_its_memory_in_another_order,
        delete_the_entry,
        delete_a_key,
        clear,
        clear_and_fill_again,
    ],
    ids=lambda f: f.__name__.replace("_", " "),
)
@pytest.mark.parametrize("way", ["passes", "train_step"])
def test_state_changed_by_hand_is_noticed(way, change, base, backend):
    expected = mlp()
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(BASES[base](expected.parameters()), 0.1)
    ours = MicroBatchSAM(BASES[base](actual.parameters()), 0.1, backend=backend)
    for step in range(6):
        data = batch(seed=step)
        WAYS[way](ours, actual, data)
        theirs.step([closure_of(expected, data)])
        if step == 2:
            change(ours.base_optimizer.state, actual[2].weight)
            change(theirs.base.state, expected[2].weight)
        if step == 3:
            change(ours.state, actual[0].bias)
            change(theirs.base.state, expected[0].bias)
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_shown_after_the_state_moved_is_what_is_worked_with(backend):
    """As after the widespread loop that brings every tensor of a state to another device."""
    model, method = mlp(), methods.FriendlySAM()
    opt = MicroBatchSAM(Adam(model.parameters()), method=method, backend=backend)
    for step in range(4):
        if step == 2:
            for entry in opt.state.values():
                for value in entry.values():
                    value.data = value.data.clone()
            for value in remembered(opt, "ema").values():
                value.data = value.data.clone()
        step_with_train_step(opt, model, batch(seed=step))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    assert all(entry["step"] == 4 for entry in opt.state.values())
    other = mlp()
    other.load_state_dict(saved[0])
    resumed = MicroBatchSAM(Adam(other.parameters()), method=method, backend=backend)
    resumed.load_state_dict(saved[1])
    for m, o in ((model, opt), (other, resumed)):
        step_with_train_step(o, m, batch(seed=9))
    assert same_bits(model.parameters(), other.parameters())


def exchange_entries(opt, a, b):
    opt.state[a], opt.state[b] = opt.state[b], opt.state[a]


def exchange_tensors(opt, a, b):
    for name in opt.state[a]:
        opt.state[a][name], opt.state[b][name] = opt.state[b][name], opt.state[a][name]


def exchange_memory(opt, a, b):
    for name in opt.state[a]:
        opt.state[a][name].data, opt.state[b][name].data = opt.state[b][name].data, opt.state[a][name].data


def give_both_the_same_values(opt, a, b):
    for name, value in opt.state[a].items():
        opt.state[b][name] = value.detach() if name == "step" else value.view_as(value)
        opt.state[a][name] = value.clone()


def move_on_and_leave(opt, a, b):
    opt.state[b] = opt.state.pop(a)


def load_in_another_order(opt, a, b):
    saved = opt.state_dict()
    saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
    opt.load_state_dict(saved)


EXCHANGES = [
    exchange_entries,
    exchange_tensors,
    exchange_memory,
    give_both_the_same_values,
    move_on_and_leave,
    load_in_another_order,
]


@pytest.mark.parametrize("absent", [None, 0, 1], ids=["", "the first takes no part then", "nor the second"])
@pytest.mark.parametrize("later", [False, True], ids=["of one group", "of a group that came later"])
@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda f: f.__name__.replace("_", " "))
@pytest.mark.parametrize("base", FUSED)
def test_state_that_is_exchanged_between_parameters_keeps_its_values(base, exchange, later, absent, backend):
    """torch does not copy what it loads, and our own tensors are views of one buffer."""
    results = []
    for wrap in (lambda b: b, lambda b: MicroBatchSAM(b, rho=0.0, backend=backend)):
        a, b = (nn.Parameter(torch.full((2, 2), value, dtype=torch.float64)) for value in (1.0, 2.0))
        opt = wrap(BASES[base]([a] if later else [a, b]))
        if later:
            opt.add_param_group({"params": [b]})

        def step(without=None, a=a, b=b, opt=opt):
            factors = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
            losses = [(a * factors).square().sum(), (b * 10 * factors.flip(0)).square().sum()]
            opt.zero_grad()
            sum(loss for i, loss in enumerate(losses) if i != without).backward()
            opt.step()

        step()
        step()
        exchange(opt, a, b)
        step(absent)
        step()
        state = [opt.state[p][name] for p in (a, b) for name in sorted(opt.state[p])]
        results.append([p.detach().clone() for p in (a, b)] + [t.clone() for t in state])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, check_dtype=False)


def by_deepcopy(model, opt):
    return copy.deepcopy((model, opt))


def by_pickle(model, opt):
    return pickle.loads(pickle.dumps((model, opt)))


def by_torch_save(model, opt):
    file = io.BytesIO()
    torch.save((model, opt), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save], ids=lambda f: f.__name__.replace("_", " "))
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["SAM", "F-SAM", "ASAM"])
def test_a_copy_of_model_and_optimizer_goes_on_bit_for_bit_and_apart(method, base, copied, backend):
    model = mlp()
    opt = MicroBatchSAM(
        BASES[base](model.parameters()), 0.1, method=METHODS[method], num_micro_batches=2, model=model, backend=backend
    )
    for step in range(3):
        step_with_train_step(opt, model, batch(6, seed=step))
    twin, twin_opt = copied(model, opt)
    assert type(twin_opt) is MicroBatchSAM
    assert twin_opt.model is twin
    assert twin_opt.base_optimizer is not opt.base_optimizer
    assert all(a is b for a, b in zip(twin.parameters(), twin_opt.param_groups[0]["params"], strict=True))
    before, state = weights(model), copy.deepcopy(opt.state_dict())
    for step in range(3, 6):
        step_with_train_step(twin_opt, twin, batch(6, seed=step))
    assert same_bits(model.parameters(), before)
    states_same(opt.state_dict(), state)
    for step in range(3, 6):
        step_with_passes(opt, model, batch(6, seed=step))
    assert same_bits(twin.parameters(), model.parameters())
    states_same(twin_opt.state_dict(), opt.state_dict())
    assert repr(twin_opt) == repr(opt)


# Those that keep something from step to step, and one that does not.
REMEMBER = ["SAM", "F-SAM", "LookSAM k=2", "Sparse SAM", "F-SAM + Sparse + Stable"]


def resumed(model, opt, *, late=False):
    """A new model and optimizer with what was saved. ``late``: the second group is added to the new base optimizer."""
    other = copy.deepcopy(model)
    names = {p: name for name, p in model.named_parameters()}
    groups = [{"params": [other.get_parameter(names[p]) for p in group["params"]]} for group in opt.param_groups]
    again = MicroBatchSAM(BASES["SGD momentum"](groups[:1] if late else groups), 0.1, method=opt.method)
    for group in groups[1:] if late else ():
        again.base_optimizer.add_param_group(group)
    again.load_state_dict(through_a_file(opt.state_dict()))
    return other, again


def resumed_where_the_group_was_added_too(model, opt):
    return resumed(model, opt, late=True)


@pytest.mark.parametrize(
    "copied",
    [by_deepcopy, by_pickle, resumed, resumed_where_the_group_was_added_too],
    ids=lambda f: f.__name__.replace("_", " "),
)
@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("after", [0, 1, 2], ids=lambda n: f"saved {n} steps later")
@pytest.mark.parametrize("method", [*REMEMBER, "LookSAM k=4", "Sparse SAM, dynamic"])
def test_a_copy_made_after_a_group_was_added_goes_on_alike(method, after, on, copied, backend):
    """With as many passes: of LookSAM's direction there is none for the new parameters."""
    method = {
        **METHODS,
        "LookSAM k=4": methods.LookSAM(k=4, alpha=0.3),
        "Sparse SAM, dynamic": methods.SparseSAM(mask="dynamic", update_every=2, total_steps=9),
    }[method]
    model = mlp(torch.float64)
    opt = MicroBatchSAM(BASES["SGD momentum"](model[0].parameters()), 0.1, method=method, backend=backend)
    calls = []

    def step(net, optimizer, seed):
        """Returns how often the body ran."""
        calls.clear()

        def loss(x, y):
            calls.append(seed)
            return loss_of(net, x, y)

        net.zero_grad()  # parameters outside of the optimizer collect gradients
        optimizer.train_step(loss, *batch(6, torch.float64, seed=seed))
        net.zero_grad()
        return len(calls)

    step(model, opt, 0)
    (opt if on == "wrapper" else opt.base_optimizer).add_param_group({"params": list(model[2].parameters())})
    for seed in range(1, 1 + after):
        step(model, opt, seed)
    whole = after > 0 or not opt.method.full.keeps
    assert whole or sorted(remembered(opt, "v")) == [0, 1]
    other, again = copied(model, opt)
    for seed in range(1 + after, 6):
        assert step(model, opt, seed) == step(other, again, seed)
        assert_close(other, model, 1e-9)
    assert again.mask is None if opt.mask is None else all(map(torch.equal, again.mask, opt.mask))


def test_a_direction_of_some_of_the_parameters_is_not_taken(backend):
    """As earlier versions wrote it after a group was added."""
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.1, method=methods.LookSAM(k=3), backend=backend)
    step_with_train_step(opt, model, batch())
    saved = opt.state_dict()
    assert sorted(remembered(saved, "v")) == [0, 1, 2, 3]
    del saved["state"][3]["msam_v"]
    opt.load_state_dict(saved)
    assert not remembered(opt, "v")


@pytest.mark.parametrize("entry", [True, False], ids=["saved", "not saved"])
def test_a_direction_of_nothing_but_empty_parameters_is_loaded(entry, backend):
    """Earlier versions left those out of what has no entry to stand in."""
    model = nn.ParameterList([torch.ones(3), torch.zeros(0, dtype=torch.float64)])
    method = methods.LookSAM(k=4)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.1, method=method, num_micro_batches=2, backend=backend)
    calls = []

    def loss(x):
        calls.append(x)
        return (model[0] * x).square().sum() + model[1].sum()

    for passes in (4, 2, 2):
        calls.clear()
        opt.train_step(loss, torch.ones(2, 3))
        saved = opt.state_dict()
        if not entry:
            del saved["state"][1]
        opt.load_state_dict(saved)
        assert len(calls) == passes


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["F-SAM", "LookSAM k=4", "Sparse SAM"])
def test_what_was_loaded_before_the_optimizer_was_wrapped_goes_on(method, base, backend):
    method = {**METHODS, "LookSAM k=4": methods.LookSAM(k=4)}[method]
    model = mlp(torch.float64)
    opt = MicroBatchSAM(BASES[base](model.parameters()), 0.1, method=method, backend=backend)
    for step in range(2):
        step_with_train_step(opt, model, batch(dtype=torch.float64, seed=step))
    other = copy.deepcopy(model)
    plain = BASES[base](other.parameters())
    plain.load_state_dict(through_a_file(opt.state_dict()))
    again = MicroBatchSAM(plain, 0.1, method=method, backend=backend)
    states_same(again.state_dict(), opt.state_dict())
    assert again.steps == 2
    for step in range(2, 5):
        for m, o in ((model, opt), (other, again)):
            step_with_train_step(o, m, batch(dtype=torch.float64, seed=step))
    assert same_bits(model.parameters(), other.parameters())
    # What an earlier wrapper of the same optimizer remembered is not taken over.
    anew = MicroBatchSAM(plain, 0.1, method=method, backend=backend)
    assert anew.steps == 0
    assert anew.mask is None
    assert not remembered(anew, "ema")
    assert not remembered(anew, "v")


def test_what_was_loaded_of_another_model_is_refused_before_anything_moves():
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=methods.FriendlySAM())
    step_with_train_step(opt, model, batch())
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["msam_ema"] = torch.ones(3)
    other = mlp()
    plain = SGD(other.parameters(), lr=0.1)
    plain.load_state_dict(saved)
    pointers = [p.data_ptr() for p in other.parameters()]
    with pytest.raises(ValueError, match=r"ema of shape \(3,\) for parameter 0.*another model"):
        MicroBatchSAM(plain, method=methods.FriendlySAM())
    assert [p.data_ptr() for p in other.parameters()] == pointers
    assert "msam_ema" in plain.state[next(other.parameters())]


@pytest.mark.parametrize("argument", ["process_group", "ascent"])
@pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning")
def test_copies_have_the_same_process_group_and_pickles_none(argument, process_group):
    model = mlp()
    module = nn.parallel.DistributedDataParallel(model) if argument == "ascent" else model
    group = torch.distributed.group.WORLD
    method = methods.FriendlySAM()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), model=module, method=method, **{argument: group})
    step_with_train_step(opt, module, batch())
    twin, twin_opt = copy.deepcopy((module, opt))
    assert getattr(twin_opt, argument) is group
    for m, o in ((module, opt), (twin, twin_opt)):
        step_with_train_step(o, m, batch(seed=1))
    assert same_bits(module.parameters(), twin.parameters())
    with pytest.raises(TypeError, match=rf"{argument}=.*cannot be pickled.*save opt.state_dict\(\)"):
        pickle.dumps(opt)


def test_the_drop_in_copies_and_resumes_as_well():
    model = mlp()
    opt = msam_kernels.SAM(model.parameters(), SGD, rho=0.1, adaptive=True, lr=0.1, momentum=0.9)
    step_with_passes_of_drop_in(opt, model, batch(seed=0))
    twin, twin_opt = copy.deepcopy((model, opt))
    assert type(twin_opt) is msam_kernels.SAM
    for m, o in ((model, opt), (twin, twin_opt)):
        step_with_passes_of_drop_in(o, m, batch(seed=1))
    assert same_bits(model.parameters(), twin.parameters())


def step_with_passes_of_drop_in(opt, model, data):
    for step in (opt.first_step, opt.second_step):
        loss_of(model, *data).backward()
        step(zero_grad=True)


# ---- the average of F-SAM ----------------------------------------------------------------------------------------------


def test_the_average_is_saved_only_where_it_began(backend):
    model = Zoo(torch.float32, uses=lambda call: call >= 4)
    opt = MicroBatchSAM(SGD(model.groups(), lr=0.1), method=methods.FriendlySAM(), backend=backend)
    index = {id(p): i for i, p in enumerate(p for g in opt.param_groups for p in g["params"])}
    without = {index[id(p)] for p in (model.frozen, model.unused, model.empty)}
    assert not remembered(opt, "ema")
    step_with_passes(opt, model, images(4, torch.float32))
    assert set(remembered(opt, "ema")) == set(index.values()) - without - {index[id(model.sometimes)]}
    step_with_passes(opt, model, images(4, torch.float32))
    step_with_passes(opt, model, images(4, torch.float32))
    ema = remembered(opt, "ema")
    assert set(ema) == set(index.values()) - without
    for p in model.parameters():
        if index[id(p)] in ema:
            assert ema[index[id(p)]].shape == p.shape
            assert ema[index[id(p)]].dtype == p.dtype


@pytest.mark.parametrize("method", ["SAM", "ASAM"])
def test_methods_without_an_average_save_none(method):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=METHODS[method])
    step_with_passes(opt, model, batch())
    assert not remembered(opt, "ema")


@pytest.mark.parametrize("method", ["SAM", "F-SAM", "VaSSO", "WSAM", "Momentum-SAM"])
def test_training_of_a_chosen_part_resumes(method, backend):
    def fresh(seed):
        model = mlp(seed=seed)
        base = SGD(model.parameters(), lr=0.1, momentum=0.9)
        only = dataclasses.replace(METHODS[method], only=[model[0].bias, model[2].weight])
        return model, MicroBatchSAM(base, 0.3, method=only, num_micro_batches=2, backend=backend)

    straight, opt = fresh(0)
    for step in range(5):
        step_with_train_step(opt, straight, batch(5, seed=step))
        if step == 1:
            file = through_a_file({"model": straight.state_dict(), "optimizer": opt.state_dict()})
    if METHODS[method].full.lmbda is not None:
        assert sorted(remembered(file["optimizer"], "ema")) == [1, 2]
    model, opt = fresh(3)
    model.load_state_dict(file["model"])
    opt.load_state_dict(file["optimizer"])
    for step in range(2, 5):
        step_with_train_step(opt, model, batch(5, seed=step))
    assert same_bits(model.parameters(), straight.parameters())


def test_an_average_of_nothing_but_empty_parameters_is_saved_as_none(backend):
    model = nn.ParameterList([torch.ones(3), torch.zeros(0, dtype=torch.float16)])
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=methods.FriendlySAM(), backend=backend)
    opt.train_step(lambda x: (model[0] * x).square().sum() + model[1].sum(), torch.ones(2, 3))
    assert list(remembered(opt, "ema")) == [0]
    copy.deepcopy((model, opt))


def test_a_state_dict_without_an_average_starts_a_new_one(backend):
    model, data = mlp(), batch()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.0), method=methods.FriendlySAM(), backend=backend)
    plain = copy.deepcopy(opt.base_optimizer.state_dict())
    step_with_passes(opt, model, data)
    first = copy.deepcopy(remembered(opt, "ema"))
    step_with_passes(opt, model, batch(seed=9))
    opt.load_state_dict(plain)
    assert not remembered(opt, "ema")
    step_with_passes(opt, model, data)
    assert same_bits(remembered(opt, "ema").values(), first.values())


def test_an_optimizer_loads_its_own_state_dict_and_is_unchanged(backend):
    model, opt = fresh("AdamW", "F-SAM", backend=backend)
    for step in range(3):
        step_with_train_step(opt, model, data_of(step))
    twin, twin_opt = copy.deepcopy((model, opt))
    for _ in range(3):
        opt.load_state_dict(opt.state_dict())
    for step in range(3, 6):
        step_with_train_step(opt, model, data_of(step))
        step_with_train_step(twin_opt, twin, data_of(step))
    assert same_bits(model.parameters(), twin.parameters())


def test_a_state_dict_is_a_view_as_in_torch_and_a_loaded_one_is_a_copy():
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), method=methods.FriendlySAM())
    step_with_passes(opt, model, batch())
    state = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(state)
    opt.load_state_dict(state)
    step_with_passes(opt, model, batch(seed=5))
    states_same(state, kept)


def test_saved_state_of_one_dtype_loads_into_another():
    model = mlp(torch.float64)
    opt = MicroBatchSAM(Adam(model.parameters()), method=methods.FriendlySAM())
    step_with_passes(opt, model, batch(dtype=torch.float64))
    saved = through_a_file(opt.state_dict())
    half = mlp(torch.float32)
    other = MicroBatchSAM(Adam(half.parameters()), method=methods.FriendlySAM())
    other.load_state_dict(saved)
    for i, p in enumerate(half.parameters()):
        torch.testing.assert_close(other.state[p]["exp_avg"], saved["state"][i]["exp_avg"].float())
        torch.testing.assert_close(remembered(other, "ema")[i], saved["state"][i]["msam_ema"].float())
    step_with_passes(other, half, batch())


def test_files_of_the_optimizer_are_no_larger_than_torchs():
    model = nn.Sequential(*[nn.Linear(50, 50) for _ in range(10)])
    plain_model = copy.deepcopy(model)
    opt = MicroBatchSAM(Adam(model.parameters()), method=methods.FriendlySAM())
    plain = Adam(plain_model.parameters())
    x = torch.randn(4, 50)
    opt.train_step(lambda x: model(x).square().mean(), x)
    plain_model(x).square().mean().backward()
    plain.step()
    ema = saved_size({i: torch.zeros_like(p) for i, p in enumerate(plain_model.parameters())})
    assert saved_size(without_ours(opt.state_dict())) < saved_size(plain.state_dict()) + 1000
    assert saved_size(opt.base_optimizer.state_dict()) < saved_size(plain.state_dict()) + ema + 3000  # names, 20 times
    assert saved_size(opt.state_dict()) < saved_size(plain.state_dict()) + ema + 3000
    assert saved_size(opt.state_dict()["state"][0]["exp_avg"]) < 50 * 50 * 4 + 2000
