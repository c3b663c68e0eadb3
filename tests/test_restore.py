# SPDX-License-Identifier: Apache-2.0
"""However a step ends, the weights are what they were before it, bit for bit, and the optimizer can go on."""

from __future__ import annotations

import copy
import math
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, RMSprop

import msam_kernels
from msam_kernels import MicroBatchSAM, methods
from msam_kernels.flat import Flat
from plain import (
    BACKENDS,
    DEVICE,
    METHODS,
    Zoo,
    batch,
    closure_of,
    gradients,
    images,
    loss_of,
    mlp,
    random_numbers,
    remembered,
    same_bits,
    split,
    step_with_passes,
    weights,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Stop(Exception):
    pass


class Interrupt(BaseException):
    """Like KeyboardInterrupt, which pytest keeps for itself."""


def run_to_the_end(opt, model, data):
    for part in opt.passes(*data):
        loss_of(model, *part).backward()


# ---- the loop ends, in one way or another ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@pytest.mark.parametrize("method", METHODS)
def test_after_the_loop_the_weights_are_what_they_were(method, flatten, dtype, backend):
    model = Zoo(dtype, uses=lambda call: call % 3 == 0, gaps=flatten)
    base = SGD(model.groups(), lr=0.1, momentum=0.9)
    opt = MicroBatchSAM(base, method=METHODS[method], num_micro_batches=3, flatten=flatten, backend=backend)
    step_with_passes(opt, model, images(7, dtype))  # then there is momentum
    opt.steps = 0
    before = weights(model)
    for step in range(3):
        moved = False
        for part in opt.passes(*images(7, dtype, seed=step)):
            moved = moved or not same_bits(model.parameters(), before)
            loss_of(model, *part).backward()
        assert moved
        assert same_bits(model.parameters(), before)


def by_break(opt, model, data, stop):
    for call, part in enumerate(opt.passes(*data)):
        loss_of(model, *part).backward()
        if call == stop:
            break


def by_break_before_backward(opt, model, data, stop):
    for call, part in enumerate(opt.passes(*data)):
        if call == stop:
            break
        loss_of(model, *part).backward()


def by_exception(opt, model, data, stop):
    with pytest.raises(Stop):
        for call, part in enumerate(opt.passes(*data)):
            loss_of(model, *part).backward()
            if call == stop:
                raise Stop


def by_return(opt, model, data, stop):
    def body():
        for call, part in enumerate(opt.passes(*data)):
            loss_of(model, *part).backward()
            if call == stop:
                return

    body()


def by_a_block(opt, model, data, stop):
    with opt.passes(*data) as parts:
        by_a_block.kept = enumerate(parts)  # which keeps the iterator
        for call, part in by_a_block.kept:
            loss_of(model, *part).backward()
            if call == stop:
                break


def by_close(opt, model, data, stop):
    iterator = opt.passes(*data)
    for _ in range(stop + 1):
        loss_of(model, *next(iterator)).backward()
    iterator.close()


def by_throw(opt, model, data, stop):
    iterator = opt.passes(*data)
    for _ in range(stop + 1):
        loss_of(model, *next(iterator)).backward()
    with pytest.raises(Stop):
        iterator.throw(Stop())


def by_dropping_it(opt, model, data, stop):
    iterator = opt.passes(*data)
    for _ in range(stop + 1):
        loss_of(model, *next(iterator)).backward()
    del iterator


def by_an_error_in_the_model(opt, model, data, stop):
    x, y = data
    with pytest.raises(RuntimeError):
        for call, (xb, yb) in enumerate(opt.passes(x, y)):
            loss_of(model, xb[:, :1] if call == stop else xb, yb).backward()


def by_a_closure(opt, model, data, stop):
    calls = count()

    def closure(part):
        loss = loss_of(model, *part)
        loss.backward()
        if next(calls) == stop:
            raise Stop
        return loss

    with pytest.raises(Stop):
        opt.step([lambda part=part: closure(part) for part in split(data, [3, 3])])


def by_a_loss_function(opt, model, data, stop):
    calls = count()

    def loss_fn(*part):
        if next(calls) == stop:
            raise Stop
        return loss_of(model, *part)

    with pytest.raises(Stop):
        opt.train_step(loss_fn, *data)


def by_restore(opt, model, data, stop):
    iterator = opt.passes(*data)
    for _ in range(stop + 1):
        loss_of(model, *next(iterator)).backward()
    opt.restore()
    by_restore.kept = iterator  # as a traceback or a notebook keeps it


ENDS = {
    f.__name__.replace("_", " "): f for f in list(globals().values()) if getattr(f, "__name__", "").startswith("by_")
}


@pytest.mark.parametrize("stop", range(4), ids=lambda i: f"in pass {i % 2 + 1} of micro-batch {i // 2 + 1}")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("method", "dtype"), [*(("SAM", dtype) for dtype in DTYPES), ("F-SAM", torch.float32)], ids=str
)
def test_a_step_that_ends_early_leaves_weights_and_gradients_as_they_were(method, dtype, end, stop, backend):
    def fresh():
        model = mlp(dtype)
        opt = MicroBatchSAM(
            SGD(model.parameters(), lr=0.1, momentum=0.9),
            0.5,
            method=METHODS[method],
            num_micro_batches=2,
            backend=backend,
        )
        for step in range(2):
            opt.train_step(lambda *part: loss_of(model, *part), *batch(6, dtype, seed=step))
        return model, opt

    model, opt = fresh()
    for p in list(model.parameters())[1:]:
        p.grad = torch.full_like(p, 0.5)
    before, grads, state = weights(model), gradients(model), copy.deepcopy(opt.state_dict()["state"])
    ENDS[end](opt, model, batch(6, dtype), stop)
    assert same_bits(model.parameters(), before)
    if end != "by restore":
        assert same_bits(gradients(model), grads)
    for i, entry in state.items():
        assert same_bits([opt.state_dict()["state"][i]["momentum_buffer"]], [entry["momentum_buffer"]])

    # The next step is what it would have been.
    opt.zero_grad()
    run_to_the_end(opt, model, batch(6, dtype, seed=5))
    assert same_bits(model.parameters(), before)
    if method == "SAM":
        undisturbed, other = fresh()
        run_to_the_end(other, undisturbed, batch(6, dtype, seed=5))
        assert same_bits(gradients(model), gradients(undisturbed))
        opt.step()
        other.step()
        assert same_bits(model.parameters(), undisturbed.parameters())


def test_a_loop_within_a_loop_is_refused_and_the_outer_one_restored(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), num_micro_batches=2, backend=backend)
    before = weights(model)
    for stop in range(4):
        with pytest.raises(RuntimeError, match=r"passes\(\)"):
            for call, part in enumerate(opt.passes(*batch(6))):
                loss_of(model, *part).backward()
                if call == stop:
                    run_to_the_end(opt, model, batch(6))
        assert same_bits(model.parameters(), before)
    run_to_the_end(opt, model, batch(6))


class Bar:
    """What progress bars are: they keep what they loop over, and pass its items on."""

    def __init__(self, iterable):
        self.iterable = iterable

    def __iter__(self):
        yield from self.iterable


HELD = {
    "nothing": lambda parts: parts,
    "a bar": Bar,
    "a bar around a bar": lambda parts: Bar(Bar(parts)),
    "enumerate": enumerate,
    "zip": lambda parts: zip(range(9), parts, strict=False),
    "the iterator": iter,
}


@pytest.mark.parametrize("how", ["break", "exception"])
@pytest.mark.parametrize(
    ("held", "block"),
    [*((held, True) for held in HELD), *((held, False) for held in ("nothing", "a bar", "a bar around a bar"))],
    ids=lambda v: v if isinstance(v, str) else "in a block" if v else "without",
)
@pytest.mark.parametrize("stop", range(4))
def test_a_loop_that_is_left_early_restores_whatever_holds_it(stop, block, held, how):
    """Without a block: whatever holds what ``passes`` returned, rather than the iterator that was made of it."""
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), rho=0.5, num_micro_batches=2)
    before = weights(model)

    def train(parts):
        bar = HELD[held](parts)
        for call, _ in zip(range(9), bar, strict=False):
            closure_of(model, batch(6))()
            if call == stop and how == "exception":
                raise Stop
            if call == stop:
                break
        return bar

    def run():
        parts = opt.passes(*batch(6))
        if not block:
            return parts, train(parts)
        with parts as entered:
            assert entered is parts
            return parts, train(parts)

    try:
        kept = run()
    except Stop as error:
        kept = error  # and with it the frames, and their variables
    assert same_bits(model.parameters(), before)
    assert gradients(model) == [None] * 4
    run_to_the_end(opt, model, batch(6))
    del kept


def test_whoever_holds_the_iterator_is_told_at_the_next_use_and_of_the_block(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), rho=0.5, backend=backend)
    before = weights(model)
    numbered = enumerate(opt.passes(*batch()))
    for call, part in numbered:
        if call == 1:
            break
        loss_of(model, *part).backward()
    assert not same_bits(model.parameters(), before)
    for use in (opt.step, opt.passes, opt.state_dict):
        with pytest.raises(RuntimeError, match=r"perturbed.*opt\.restore\(\).*with opt\.passes"):
            use()
    opt.restore()
    assert same_bits(model.parameters(), before)
    opt.state_dict()


def test_a_loop_runs_once(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), backend=backend)
    parts = opt.passes(*batch())
    loss_of(model, *next(parts)).backward()
    for part in parts:  # goes on where it was
        loss_of(model, *part).backward()
    assert all(g is not None for g in gradients(model))
    assert next(parts, None) is None
    with pytest.raises(RuntimeError, match=r"loop is over.*opt\.passes\(\)"):
        list(parts)
    parts.close()
    with pytest.raises(RuntimeError, match="over"):
        parts.throw(Stop())


def test_an_iterator_that_was_never_started_does_nothing(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), backend=backend)
    iterator = opt.passes(*batch())
    run_to_the_end(opt, model, batch())
    before, grads = weights(model), gradients(model)
    iterator.close()
    assert same_bits(gradients(model), grads)
    assert same_bits(model.parameters(), before)
    opt.step()


@pytest.mark.parametrize("given_up_in", [0, 1, 3])
@pytest.mark.parametrize("dropped_in", range(4))
@pytest.mark.parametrize("how", ["dropped", "resumed"])
def test_an_iterator_that_was_given_up_cannot_disturb_a_later_step(how, dropped_in, given_up_in, backend):
    """A traceback or a notebook keeps an old iterator alive; ``opt.restore()`` gave it up; later it goes away, or on."""
    data = batch(6, seed=3)

    def fresh():
        model = mlp()
        return model, MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, num_micro_batches=2, backend=backend)

    expected, other = fresh()
    run_to_the_end(other, expected, data)

    model, opt = fresh()
    before = weights(model)
    old = opt.passes(*batch(6))
    for _ in range(given_up_in + 1):
        loss_of(model, *next(old)).backward()
    opt.restore()
    assert same_bits(model.parameters(), before)
    opt.zero_grad()
    for call, part in enumerate(opt.passes(*data)):
        loss_of(model, *part).backward()
        if call == dropped_in:
            if how == "dropped":
                old.close()
            else:
                with pytest.raises(RuntimeError):
                    next(old)
    assert same_bits(model.parameters(), before)
    assert same_bits(gradients(model), gradients(expected))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("end", [e for e in ENDS if e not in ("by an error in the model",)])
def test_a_weight_that_is_not_finite_does_not_keep_the_others_from_being_restored(end, value, backend):
    class WithABadWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = mlp(), nn.Parameter(torch.tensor([1.0, value]))

        def forward(self, x):
            return self.good(x) * self.bad.clamp(max=1).nan_to_num(1.0)

    model = WithABadWeight()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, num_micro_batches=2, backend=backend)
    before = weights(model)
    ENDS[end](opt, model, batch(6), 1)
    assert not opt.stats.nonfinite.any()
    assert same_bits(model.parameters(), before)


def test_restore_outside_of_a_step_does_nothing(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), backend=backend)
    opt.restore()
    opt.train_step(lambda *part: loss_of(model, *part), *batch())
    before = weights(model)
    opt.restore()
    opt.restore()
    assert same_bits(model.parameters(), before)


def test_a_base_optimizer_whose_step_fails_leaves_the_weights_restored(backend):
    model = mlp()

    class Fails(SGD):
        def step(self, closure=None):
            raise Stop

    opt = MicroBatchSAM(Fails(model.parameters(), lr=0.1), 0.5, num_micro_batches=2, backend=backend)
    before = weights(model)
    with pytest.raises(Stop):
        opt.train_step(lambda *part: loss_of(model, *part), *batch(6))
    assert same_bits(model.parameters(), before)
    run_to_the_end(opt, model, batch(6))
    with pytest.raises(Stop):
        opt.step()
    assert same_bits(model.parameters(), before)


def test_a_hook_that_raises_leaves_the_weights_restored(backend):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, num_micro_batches=2, backend=backend)
    before = weights(model)
    for stop in range(1, 5):
        calls = count(1)

        def hook(grad, stop=stop, calls=calls):
            if next(calls) == stop:
                raise Stop

        handle = model[0].weight.register_hook(hook)
        with pytest.raises(Stop):
            opt.train_step(lambda *part: loss_of(model, *part), *batch(6))
        handle.remove()
        assert same_bits(model.parameters(), before)
        assert gradients(model) == [None] * 4


# ---- an interruption anywhere -------------------------------------------------------------------------------------------

PACKAGE = str(Path(msam_kernels.__file__).parent)


class InterruptAt:
    """Raises ``Interrupt`` before the n-th line that runs in the package, as Ctrl-C may."""

    def __init__(self, n: int):
        self.left, self.where = n, ""

    def __enter__(self):
        self.outer = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.outer)

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
                raise Interrupt
        return self._line


def loop(opt, model, data):
    for part in opt.passes(*data):
        loss_of(model, *part).backward()


def loop_given_up(opt, model, data):
    iterator = opt.passes(*data)
    try:
        for _ in range(2):
            loss_of(model, *next(iterator)).backward()
    finally:
        iterator.close()


def closures(opt, model, data):
    opt.step([closure_of(model, part) for part in split(data, [1, 1])])


def scaled_and_clipped(opt, model, data):
    opt.train_step(
        lambda *part: loss_of(model, *part),
        *data,
        before_update=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5),
        scaler=torch.amp.GradScaler(DEVICE.type),
    )


def drop_in(opt, model, data):
    loss_of(model, *data).backward()
    opt.first_step(zero_grad=True)
    loss_of(model, *data).backward()
    opt.second_step(zero_grad=True)


def micro_batch_sam(base):
    def make(params, method, backend):
        return MicroBatchSAM(base(params), 0.5, method=METHODS[method], num_micro_batches=2, backend=backend)

    return make


def sgd(params):
    return SGD(params, lr=0.1, momentum=0.9)


def sgd_with_momentum(params):
    base = sgd(params)
    for p in base.param_groups[0]["params"]:
        base.state[p]["momentum_buffer"] = torch.full_like(p, 0.5)
    return base


INTERRUPTED = {
    "passes": (loop, micro_batch_sam(sgd)),
    "passes given up": (loop_given_up, micro_batch_sam(sgd)),
    "closures, SGD": (closures, micro_batch_sam(sgd)),
    "closures, momentum": (closures, micro_batch_sam(sgd_with_momentum)),
    "closures, Adam": (closures, micro_batch_sam(Adam)),
    "closures, RMSprop": (closures, micro_batch_sam(RMSprop)),
    "scaled and clipped": (scaled_and_clipped, micro_batch_sam(sgd)),
    "first_step and second_step": (
        drop_in,
        lambda params, method, backend: msam_kernels.SAM(params, SGD, rho=0.5, lr=0.1, momentum=0.9),
    ),
}


class Small(nn.Module):
    """Of two dtypes, with a BatchNorm, and a parameter without a gradient in some passes."""

    def __init__(self):
        super().__init__()
        generator = random_numbers(0)
        self.weight = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.sometimes = nn.Parameter(torch.ones(2))
        self.wide = nn.Parameter(torch.randn(2, generator=generator).double())
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x @ self.weight
        if self.calls % 3 == 0:
            x = x * self.sometimes
        return x + self.wide.float()


def each_old_or_new(now, old, new):
    return all(same_bits([n], [o]) or same_bits([n], [w]) for n, o, w in zip(now, old, new, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:gradients of earlier backward passes are in p.grad")
@pytest.mark.parametrize(
    ("first", "stride"),
    [
        pytest.param(3, 4, id="every fourth line"),
        pytest.param(1, 1, id="every line", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize(
    ("scenario", "method", "backend"),
    [
        ("passes", "F-SAM", BACKENDS[0]),
        ("passes given up", "SAM", BACKENDS[0]),
        ("closures, SGD", "SAM", BACKENDS[0]),
        ("closures, Adam", "F-SAM", BACKENDS[0]),
        ("first_step and second_step", "SAM", BACKENDS[0]),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("passes", "SAM", BACKENDS[0]),
                ("passes", "F-SAM", "reference"),
                ("closures, SGD", "F-SAM", BACKENDS[0]),
                ("closures, SGD", "LookSAM k=2", BACKENDS[0]),
                ("closures, momentum", "Momentum-SAM", BACKENDS[0]),
                ("closures, RMSprop", "SAM", BACKENDS[0]),
                ("scaled and clipped", "SAM", BACKENDS[0]),
            )
        ),
    ],
)
def test_an_interruption_before_any_line_leaves_no_weight_perturbed(scenario, method, backend, first, stride, request):
    """A loop changes no weight at all; an update is interrupted before or after a parameter's turn, never within it."""
    if backend == "cpu":
        request.getfixturevalue("extension")
    act, make = INTERRUPTED[scenario]
    data = batch(2)

    def fresh():
        model = Small()
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25)
        return model, make(model.parameters(), method, backend)

    model, opt = fresh()
    old, old_grads = weights(model), gradients(model)
    act(opt, model, data)
    new, new_grads = weights(model), gradients(model)

    def is_usable():
        """Runs a loop; False where the optimizer says that it must be told to restore first."""
        try:
            loop(opt, model, data)
        except RuntimeError as error:
            assert "opt.restore()" in str(error), str(error)
            return False
        return True

    def check():
        if act in (loop, closures, scaled_and_clipped) and not each_old_or_new(gradients(model), old_grads, new_grads):
            return "gradients are neither old nor new"
        told = False
        if not each_old_or_new(model.parameters(), old, new):
            if is_usable():
                return "weights are perturbed, and nobody says so"
            opt.restore()
            told = True
        now = weights(model)
        if not each_old_or_new(now, old, new):
            return "opt.restore() leaves weights perturbed"
        if not is_usable():
            if told:
                return "the optimizer is not usable after opt.restore()"
            opt.restore()
            if not is_usable():
                return "the optimizer is not usable after opt.restore()"
        return "" if same_bits(model.parameters(), now) else "the next loop changes weights"

    failures = []
    for n in count(first, stride):
        model, opt = fresh()
        try:
            with InterruptAt(n) as interrupt:
                act(opt, model, data)
            break
        except Interrupt:
            pass
        model.calls = 0
        if complaint := check():
            failures.append(f"line {n}, {interrupt.where}: {complaint}")
    assert n > 50
    assert not failures, f"{len(failures)} of {n} places:\n" + "\n".join(failures[:20])


@pytest.mark.slow
def test_an_interruption_before_any_line_leaves_buffers_as_a_pass_at_w_did():
    data, n = batch(6), 0
    failures = []

    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))

    old, new = fresh(), fresh()
    new(data[0])
    while True:
        n += 1
        model = fresh()
        opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.5, model=model)
        try:
            with InterruptAt(n) as interrupt:
                loop(opt, model, data)
            break
        except Interrupt:
            pass
        if not any(same_bits(model.buffers(), right.buffers()) for right in (old, new)):
            failures.append(f"{n}, before {interrupt.where}")
    assert n > 50
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("method", ["F-SAM", "LookSAM k=2"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_kept_may_be_made_again_after_there_was_no_memory(error, method, monkeypatch, backend):
    """Of two dtypes, so that the first buffer may be there and the second not."""
    before, data = weights(Small()), batch(2)
    reached = 0
    for stop in count():
        model = Small()
        opt = MicroBatchSAM(sgd(model.parameters()), 0.5, method=METHODS[method], backend=backend)
        calls, real = count(), Flat.new_buffer

        def new_buffer(flat, *dtype, stop=stop, calls=calls, real=real):
            if next(calls) == stop:
                raise error
            return real(flat, *dtype)

        with monkeypatch.context() as patch:
            patch.setattr(Flat, "new_buffer", new_buffer)
            try:
                closures_of_one(opt, model, data)
                break
            except error:
                reached += 1
        assert same_bits(model.parameters(), before)
        model.calls = 0
        twin, other = copy.deepcopy((model, opt))
        undisturbed = Small()
        plain = MicroBatchSAM(sgd(undisturbed.parameters()), 0.5, method=METHODS[method], backend=backend)
        for m, o in ((model, opt), (twin, other), (undisturbed, plain)):
            for _ in range(3):
                closures_of_one(o, m, data)
        assert same_bits(model.parameters(), twin.parameters())
        if method != "F-SAM":  # whose average has moved where it was there already
            assert same_bits(model.parameters(), undisturbed.parameters())
    assert reached >= 4, "a buffer of the method's and one of momentum for each dtype"


def closures_of_one(opt, model, data):
    opt.step([closure_of(model, data)])


def test_an_interrupted_average_of_f_sam_stays_finite_and_goes_on(backend):
    model = mlp()
    opt = MicroBatchSAM(
        SGD(model.parameters(), lr=0.1), method=methods.FriendlySAM(), num_micro_batches=2, backend=backend
    )
    for stop in range(4):
        by_break(opt, model, batch(6), stop)
    assert all(t.isfinite().all() for t in remembered(opt, "ema").values())
    run_to_the_end(opt, model, batch(6))


def test_what_can_be_restored_is_where_a_parameter_was_converted_meanwhile(backend):
    kept, lost = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = MicroBatchSAM(SGD([lost, kept], lr=0.1), rho=0.5, backend=backend)
    with pytest.raises(RuntimeError, match=r"a parameter is now torch\.float16.*was torch\.float64"):
        for turn, x in enumerate(opt.passes(torch.ones(1))):
            if turn == 1:
                lost.data = lost.data.half()
            ((kept * x).square().sum() + lost.double().square().sum()).backward()
    assert kept.tolist() == [1.0] * 3
    assert kept.grad is None
    lost.data = lost.data.double()
    opt.restore()
    assert lost.tolist() == [1.0] * 2
