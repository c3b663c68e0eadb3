# SPDX-License-Identifier: Apache-2.0
"""Parameters that require a gradient and have had none yet: nothing is kept for them, until they have."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop

from msam_kernels import MicroBatchSAM, methods
from msam_kernels.flat import Flat
from plain import (
    METHODS,
    WAYS,
    batch,
    closure_of,
    loss_of,
    on_ranks,
    same_bits,
    step_with_passes,
    step_with_train_step,
    through_a_file,
    weights,
)

BASES = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=0.01),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
}
COUNT = 2  # micro-batches


class Routed(nn.Module):
    """Layers of which a pass uses those that ``uses(step, call)`` names; the first one is never used."""

    def __init__(self, uses=lambda step, call: (), dtype=torch.float32):
        torch.manual_seed(0)
        super().__init__()
        self.never = nn.Linear(9, 7)
        self.body = nn.Linear(3, 5)
        self.late = nn.Linear(5, 5)
        self.unused = nn.Linear(65, 2, bias=False)
        self.other = nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, 2)
        self.to(dtype)
        self.uses, self.step, self.call = uses, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.to(self.body.weight.dtype)).tanh()
        for name in self.uses(self.step, self.call):
            h = h + getattr(self, name)(h)
        self.call += 1
        return self.head(h).float()


#: (step, call in it) -> the layers that the pass uses beside those that every pass uses.
WHEN = {
    "never": lambda step, call: (),
    "from the third step on": lambda step, call: ("late",) if step >= 2 else (),
    "first of all in the second pass": lambda step, call: ("late",) if step or call else (),
    "in one pass alone": lambda step, call: ("other",) if (step, call) == (1, 2) else (),
    "in the last pass of a step": lambda step, call: ("late",) if step > 1 or (step, call) == (1, 3) else (),
    "one after the other": lambda step, call: ("other", "late")[: step + call // 2],
}
LATE = {"never": 0, "in one pass alone": 25, "one after the other": 30 + 25}  # elements; else 30
each_time = pytest.mark.parametrize("when", WHEN)
each_method = pytest.mark.parametrize("method", METHODS)


def made(when, method="SAM", base="SGD", dtype=torch.float32, **options):
    model = Routed(WHEN[when], dtype)
    head = {id(p) for p in model.head.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in head]},
        {"params": list(model.head.parameters()), "lr": 0.02},
    ]
    options = {"model": model, "method": METHODS[method], "num_micro_batches": COUNT, **options}
    return model, MicroBatchSAM(BASES[base](groups), 0.1, **options)


def train(model, opt, steps, way="passes"):
    for step in steps:
        model.step, model.call = step, 0
        WAYS[way](opt, model, batch(6, seed=step))


def nobody_waits(monkeypatch):
    monkeypatch.setattr(Flat, "wait_for", lambda flat, waiting: None)


def elements_kept(opt) -> list[int]:
    """Of every buffer but the weights', without what it is padded with."""
    (flat,) = opt.engine.store.flats
    buffers = [flat.saved, *(m.buffer for m in flat.memories.values()), *flat.copies]
    buffers += [t for name, t in flat.state.items() if name != "step"]
    assert {b.shape[-1] for b in buffers if b is not None} == {flat.kept}
    return [sum(p.numel() for i, p in enumerate(flat.params) if i not in flat.waiting)] * len(buffers)


@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@pytest.mark.parametrize("way", WAYS)
@each_method
@each_time
def test_waiting_costs_nothing_and_changes_no_bit(when, method, way, flatten, backend, monkeypatch):
    base = "AdamW" if flatten and not METHODS[method].full.momentum else "SGD"
    found = []
    for waits in (True, False):
        if not waits:
            nobody_waits(monkeypatch)
        model, opt = made(when, method, base, flatten=flatten, backend=backend)
        train(model, opt, range(5), way)
        found.append((weights(model), opt.state_dict(), opt.stats, opt))
    (ours, state, stats, opt), (theirs, expected, expected_stats, _) = found
    assert same_bits(ours, theirs)
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert entry.keys() == state["state"][key].keys()
        for name, t in entry.items():
            assert same_bits([state["state"][key][name]], [t]), (key, name)
    for name, t in vars(expected_stats).items():  # the rows are added up in another order
        torch.testing.assert_close(vars(stats)[name], t, rtol=1e-14, atol=0, equal_nan=True)
    if METHODS[method].full.sparse is None:  # whose mask is of all elements
        single = opt.method.full.momentum or opt.method.period > 1  # passes of that step
        late = 0 if when == "in one pass alone" and single else LATE.get(when, 30)
        assert set(elements_kept(opt)) == {32 + late}


@pytest.mark.parametrize("base", BASES)
@each_method
def test_parallel_passes_wait_as_well(method, base, backend, monkeypatch):
    if METHODS[method].full.momentum and base == "AdamW":
        pytest.skip("refused: it has no momentum")
    runs = []
    for waits in (True, False):
        if not waits:
            nobody_waits(monkeypatch)
        model, opt = made("never", method, base, backend=backend, parallel=True)
        model.uses = lambda step, call: ("late",) if step >= 1 else ()
        train(model, opt, range(3), "train_step")
        runs.append(weights(model))
        if waits and METHODS[method].full.sparse is None:
            assert set(elements_kept(opt)) == {32 + 30}
    assert same_bits(*runs)


@pytest.mark.parametrize("at", [1, 2, 3])
@each_time
@pytest.mark.parametrize("method", ["SAM", "F-SAM", "LookSAM k=2", "Sparse SAM", "Momentum-SAM"])
def test_training_resumes_where_parameters_wait(method, when, at, backend):
    straight, opt = made(when, method, backend=backend)
    train(straight, opt, range(5))
    first, saves = made(when, method, backend=backend)
    train(first, saves, range(at))
    saved = through_a_file((first.state_dict(), saves.state_dict()))
    second, loads = made(when, method, backend=backend)
    second.load_state_dict(saved[0])
    loads.load_state_dict(saved[1])
    train(second, loads, range(at, 5))
    assert same_bits(weights(second), weights(straight))
    if METHODS[method].full.sparse is None:
        assert set(elements_kept(loads)) <= {32, *elements_kept(opt)}


@pytest.mark.parametrize("method", ["SAM", "F-SAM", "VaSSO", "LookSAM k=2", "Momentum-SAM"])
@pytest.mark.parametrize("dies", range(4), ids=lambda call: f"in pass {call}")
@each_time
def test_a_step_may_fail_where_one_has_ceased_to_wait(when, dies, method, backend, monkeypatch):
    runs = []
    for waits in (True, False):
        if not waits:
            nobody_waits(monkeypatch)
        model, opt = made(when, method, backend=backend)
        train(model, opt, range(1))
        before, uses = weights(model), model.uses

        def fails(step, call, uses=uses):
            if call == dies:
                raise InterruptedError
            return uses(step, call)

        model.uses = fails
        try:
            train(model, opt, [1])
        except InterruptedError:
            opt.restore()
            assert same_bits(weights(model), before)
        model.uses = uses
        train(model, opt, range(1, 5))
        runs.append(weights(model))
    assert same_bits(*runs)


@pytest.mark.parametrize("method", ["SAM", "F-SAM", "LookSAM k=2", "Momentum-SAM"])
@pytest.mark.parametrize("step", range(3))
@each_time
def test_memory_that_is_missing_changes_nothing(when, step, method, backend, monkeypatch):
    """As where the GPU has none left: of any buffer that a step makes."""
    model, opt = made(when, method, backend=backend)
    straight, expected = made(when, method, backend=backend)
    train(model, opt, range(step))
    train(straight, expected, range(step + 1))
    new_buffer = Flat.new_buffer
    for stop in range(20):
        calls = iter(range(stop))

        def failing(flat, *args, calls=calls, **options):
            if next(calls, None) is None:
                raise MemoryError
            return new_buffer(flat, *args, **options)

        before = weights(model)
        monkeypatch.setattr(Flat, "new_buffer", failing)
        try:
            train(model, opt, [step])
        except MemoryError:
            monkeypatch.setattr(Flat, "new_buffer", new_buffer)
            opt.restore()
            opt.zero_grad()
            assert same_bits(weights(model), before)
        else:
            break
    assert stop < 19
    monkeypatch.setattr(Flat, "new_buffer", new_buffer)
    train(model, opt, range(step + 1, 4))
    train(straight, expected, range(step + 1, 4))
    # F-SAM's mean has seen the gradients of passes that were given up.
    assert same_bits(weights(model), weights(straight)) or method == "F-SAM"


def test_masters_and_random_rounding_wait_as_well(backend, monkeypatch):
    for options in ({"masters": True}, {"rounding": "stochastic", "seed": 3}):
        runs = []
        for waits in (True, False):
            with monkeypatch.context() as patch:
                if not waits:
                    nobody_waits(patch)
                model, opt = made("one after the other", "F-SAM", "AdamW", torch.bfloat16, backend=backend, **options)
                train(model, opt, range(4))
                runs.append([*weights(model), *(t for e in opt.state_dict()["state"].values() for t in e.values())])
        assert same_bits(*runs)


def test_a_model_that_moves_brings_along_what_is_kept(backend):
    model, opt = made("from the third step on", "F-SAM", "AdamW", torch.float32, backend=backend)
    train(model, opt, range(2))
    model.double()
    train(model, opt, range(2, 4))
    assert set(elements_kept(opt)) == {32 + 30}
    straight, expected = made("from the third step on", "F-SAM", "AdamW", torch.float64, backend=backend)
    train(straight, expected, range(4))
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_steps_of_the_base_optimizer_wait_as_well(backend):
    model, opt = made("from the third step on", base="AdamW", backend=backend)
    opt.enabled = False
    train(model, opt, range(2))
    assert set(elements_kept(opt)) == {32}
    opt.enabled = True
    train(model, opt, range(2, 4))
    assert set(elements_kept(opt)) == {32 + 30}


def test_a_gradient_of_before_the_step_ends_the_wait(backend):
    """As of a second loss, whose backward comes before the loop."""
    model, opt = made("never", base="AdamW", backend=backend)
    train(model, opt, range(2))
    model.never.weight.grad = torch.ones(7, 9)
    before = model.never.weight.clone()
    step_with_passes(opt, model, batch(6))
    assert not (model.never.weight == before).any()
    assert set(elements_kept(opt)) == {32 + 63}


def _job(rank, ascent, waits):
    patch = pytest.MonkeyPatch()
    if not waits:
        nobody_waits(patch)
    model = Routed(lambda step, call: ("late", "other")[rank : rank + step * (step < 3)], torch.float64)
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    opt = MicroBatchSAM(
        AdamW(model.parameters(), lr=0.01),
        0.1,
        method=methods.FriendlySAM(),
        num_micro_batches=COUNT,
        model=ddp,
        ascent=ascent,
    )
    for step in range(5):
        model.step, model.call = step, 0
        x, y = (t.chunk(2)[rank] for t in batch(12, seed=step))
        step_with_passes(opt, ddp, (x, y))
    patch.undo()
    return weights(model), [sorted(flat.waiting) for flat in opt.engine.store.flats], opt.engine.store.flats[0].kept


@pytest.mark.parametrize("ascent", ["local", "global"])
def test_ranks_need_not_wait_alike(ascent, tmp_path):
    """Each uses a layer of its own, and all get its mean gradient."""
    found = {}
    for waits in (True, False):
        (tmp_path / str(waits)).mkdir()
        found[waits] = on_ranks(2, tmp_path / str(waits), _job, ascent, waits)
    (first, waiting, kept), (second, _, _) = found[True]
    assert same_bits(first, second)
    assert same_bits(first, found[False][0][0])
    assert waiting == [[0, 1, 6]]  # the layer that is never used, and the one that nobody names
    assert kept < found[False][0][2]


def test_with_closures_a_loss_scale_that_overflows_where_one_ceases_to_wait_changes_nothing(backend):
    for method in ("F-SAM", "LookSAM k=2", "SAM"):
        runs = []
        for overflows in (True, False):
            model, opt = made("from the third step on", method, "SGD", backend=backend)
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
            step = 0
            while step < 4:
                model.step, model.call = step, 0
                skips, overflows = overflows and step == 2, overflows and step < 2
                state = copy.deepcopy(scaler.state_dict())
                for x, y in opt.passes(*batch(6, seed=step), scaler=scaler):
                    scaler.scale(loss_of(model, x, y) * (float("inf") if skips and model.call == 4 else 1.0)).backward()
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
                if skips:
                    scaler.load_state_dict(state)
                else:
                    step += 1
            runs.append(weights(model))
        assert same_bits(*runs), method


def test_the_loss_is_asked_for_no_more_than_before(backend):
    model, opt = made("from the third step on", backend=backend)
    closure = closure_of(model, batch(6))
    opt.step([closure] * COUNT)
    assert model.call == 4
    step_with_train_step(opt, model, batch(6))
