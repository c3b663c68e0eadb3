# SPDX-License-Identifier: Apache-2.0
"""``opt.capture``: what the host does around a captured step, and, where there is a CUDA device, the graphs themselves."""

from __future__ import annotations

import copy
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from msam_kernels import MicroBatchSAM, _torch, buffers, capture, flat, methods
from msam_kernels.capture import CapturedStep, CudaRecorder
from msam_kernels.ranks import Ranks
from plain import COMPILES, NO_COMPILER, remembered, same_bits, without_ours

pytestmark = pytest.mark.host  # each test says where its model is
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BASES = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "AdamW": lambda params: AdamW(params, lr=0.01),
    "Adam, amsgrad": lambda params: Adam(params, lr=0.01, amsgrad=True),
}
METHODS = {
    "SAM": methods.SAM(),
    "F-SAM": methods.FriendlySAM(lmbda=0.6),
    "ASAM": methods.AdaptiveSAM(),
    "Stable SAM": methods.StableSAM(),
    "GSAM": methods.GapSAM(),
    "Bilateral SAM": methods.BilateralSAM(rho_min=lambda step: 0.05 / (1 + step)),
    "LookSAM": methods.LookSAM(k=2),
    "LE-SAM": methods.LossEquatedSAM(sigma=lambda step: 0.02 / (1 + step)),
    "Sparse SAM": methods.SparseSAM(update_every=3),
    "VaSSO": methods.VaSSO(),
    "WSAM": methods.WSAM(),
    "Momentum-SAM": methods.MomentumSAM(),
    "SAM-ON": lambda model: methods.SAM(only=methods.norm_layers(model)),
}
# Of seven calls, two of which warm up: LookSAM has two kinds of steps, and steps that choose a mask are not captured.
CAPTURES_AND_REPLAYS = {"LookSAM": (2, 3), "Sparse SAM": (1, 2)}


def method_for(name, model):
    method = METHODS[name]
    return method if isinstance(method, methods.SAM) else method(model)


class Recorder:
    """A graph's life without a GPU: capturing changes nothing, a replay does on the same inputs what was captured."""

    device = torch.device("cpu")

    def __init__(self, model, opt, between=None):
        self.model, self.opt, self.between = model, opt, between
        self.captures = self.replays = 0

    def warm_up(self, step):
        return step()

    def pool_bytes(self):
        return 1024 * self.captures

    def capture(self, step):
        self.captures += 1
        tensors = list(self.model.state_dict().values())
        for part in self.opt.engine.store.flats:
            memories = [t for memory in part.memories.values() for t in (memory.buffer, memory.square)]
            kept = (part.saved, part.mask, part.status, *memories, *part.state.values())
            tensors += [t for t in kept if t is not None]
        tensors += self.opt.engine.units.tensors()
        before = [t.clone() for t in tensors]
        try:
            with torch.random.fork_rng(devices=[]):
                outputs = [t.clone() for t in step()]
        finally:  # nothing ran
            for t, b in zip(tensors, before, strict=True):
                t.copy_(b)

        def replay():
            self.replays += 1
            steps, grads = self.opt.steps, [p.grad for p in self.model.parameters()]
            achieved = [list(part.achieved) for part in self.opt.engine.store.flats]
            with without_python():
                for old, new in zip(outputs, step(), strict=True):
                    old.copy_(new)
            self.opt.steps = steps
            for part, rows in zip(self.opt.engine.store.flats, achieved, strict=True):
                part.achieved = rows
            for p, g in zip(self.model.parameters(), grads, strict=True):
                p.grad = g
            if self.between is not None:
                self.between.found_infs = {}

        return replay, outputs


@contextmanager
def without_python():
    """A replay makes the casts that were captured, and leaves autocast's cache as it is."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with mock.patch.object(torch, "clear_autocast_cache"):
            yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def net(device="cpu"):
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double().to(device)


def data(n=6, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x.to(device), torch.randint(3, (n,), generator=generator).to(device)


def setup(base="SGD", method="SAM", count=2, device="cpu", frozen=False, **parallel):
    model = net(device)
    model[0].requires_grad_(not frozen)
    options = {"method": method_for(method, model), "num_micro_batches": count, "model": model, **parallel}
    opt = MicroBatchSAM(BASES[base](model.parameters()), 0.1, **options)
    return model, opt, lambda x, y: F.cross_entropy(model(x), y)


def captured(
    opt, model, loss_fn, *example, warm_up=2, before_update=None, scaler=None, max_grad_norm=None, other_shapes="eager"
):
    """The captured step, and its recorder."""
    between = opt.between(before_update, scaler, max_grad_norm)
    recorder = Recorder(model, opt, between)
    return CapturedStep(opt, loss_fn, example, recorder, warm_up, between, other_shapes), recorder


def assert_trains_like_train_step(make_step, base, method, count, device, **parallel):
    model, opt, loss_fn = setup(base, method, count, device, **parallel)
    other, plain, other_loss_fn = setup(base, method, count, device, **parallel)
    schedulers = [lr_scheduler.ExponentialLR(o, 0.8) for o in (opt, plain)]
    step = make_step(opt, model, loss_fn, *data(device=device))
    for i in range(7):
        batch = data(seed=i, device=device)
        losses = step(*batch), plain.train_step(other_loss_fn, *batch)
        assert same_bits(model.state_dict().values(), other.state_dict().values()), f"step {i}"
        assert torch.equal(*losses)
        if plain.engine.norms_sq:  # not between the SAM steps of LookSAM
            assert torch.equal(opt.stats.grad_norm, plain.stats.grad_norm)
            assert torch.equal(opt.stats.perturbation_norm, plain.stats.perturbation_norm)
        assert all(p.grad is None for p in model.parameters())
        assert opt.steps == plain.steps == i + 1
        if i in (1, 4):  # of no step, and dropped by the next one, captured or not
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        for scheduler in schedulers:
            scheduler.step()
        if i == 4:
            for o in (opt, plain):
                o.param_groups[0]["rho"] = 0.2
    return step


@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_holds_parallel_passes(method):
    step = assert_trains_like_train_step(lambda *a: captured(*a)[0], "SGD", method, 3, "cpu", parallel=2)
    assert (step._recorder.captures, step._recorder.replays) == CAPTURES_AND_REPLAYS.get(method, (1, 5))


@gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_graph_holds_parallel_passes(method):
    assert_trains_like_train_step(MicroBatchSAM.capture, "SGD", method, 3, "cuda", parallel=True)


@pytest.mark.host
@pytest.mark.skipif(not COMPILES, reason=NO_COMPILER)
def test_a_captured_step_holds_compiled_passes(monkeypatch):
    torch.compiler.reset()
    made = []
    monkeypatch.setattr(_torch, "inductor", lambda *a: (made.append(1), aot_eager(*a))[1])
    ways = {"parallel": True, "compile": True}
    step = assert_trains_like_train_step(lambda *a: captured(*a)[0], "SGD", "SAM", 3, "cpu", **ways)
    assert (step._recorder.captures, step._recorder.replays) == (1, 5)
    assert len(made) == 4, "two passes of either model, compiled as they warm up, and nothing in the capture"
    torch.compiler.reset()


@gpu
def test_a_graph_holds_compiled_passes():
    torch.compiler.reset()
    assert_trains_like_train_step(MicroBatchSAM.capture, "SGD", "SAM", 3, "cuda", parallel=True, compile=True)
    torch.compiler.reset()


@pytest.mark.parametrize("count", [1, 3], ids=["one micro-batch", "three micro-batches"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_a_captured_step_trains_like_train_step(base, method, count):
    step = assert_trains_like_train_step(lambda *a: captured(*a)[0], base, method, count, "cpu")
    assert (step._recorder.captures, step._recorder.replays) == CAPTURES_AND_REPLAYS.get(method, (1, 5))


@gpu
@pytest.mark.parametrize("count", [1, 3], ids=["one micro-batch", "three micro-batches"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_a_cuda_graph_trains_like_train_step(base, method, count):
    step = assert_trains_like_train_step(
        lambda opt, model, loss_fn, *batch: opt.capture(loss_fn, *batch, warm_up=2), base, method, count, "cuda"
    )
    assert all(graph.replay is not None for graph in step._graphs.values())


@gpu
def test_a_capture_of_the_users_own_trains_like_train_step():
    model, opt, loss_fn = setup("AdamW", "F-SAM", device="cuda")
    other, plain, other_loss_fn = setup("AdamW", "F-SAM", device="cuda")
    inputs = data(device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            opt.train_step(loss_fn, *inputs)
            plain.train_step(other_loss_fn, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.train_step(loss_fn, *inputs)
    for i in range(4):
        for o in (opt, plain):
            o.param_groups[0]["lr"] *= 0.8
        opt.update_hyper()
        batch = data(seed=i, device="cuda")
        for static, new in zip(inputs, batch, strict=True):
            static.copy_(new)
        graph.replay()
        plain.train_step(other_loss_fn, *batch)
        assert same_bits(model.state_dict().values(), other.state_dict().values()), f"step {i}"


@gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_what_a_graph_could_not_follow_is_refused_while_capturing():
    model, opt, loss_fn = setup(device="cuda")
    inputs = data(device="cuda")
    opt.train_step(loss_fn, *inputs)
    torch.cuda.synchronize()
    before = [p.detach().clone() for p in model.parameters()]
    opt.param_groups[0]["lr"] = 0.01
    with pytest.raises(RuntimeError, match="hyper-parameters changed since the last step"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            opt.train_step(loss_fn, *inputs)
    opt.restore()
    assert same_bits(model.parameters(), before)
    opt.train_step(loss_fn, *inputs)


# ---- what real training has ------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Small, with what training may have in it."""

    def __init__(self, dropout=0.0, recomputed=False):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.Dropout(dropout), nn.Tanh())
        self.last, self.recomputed = nn.Linear(8, 3), recomputed

    def forward(self, x):
        x = self.norm(self.first(x))
        x = checkpoint(self.hidden, x, use_reentrant=False) if self.recomputed else self.hidden(x)
        return self.last(x)


class Training:
    """A model in training, and how its steps are called."""

    def __init__(self, device, dtype=torch.float32, compiled=None, base="SGD", count=2, method="SAM", **network):
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.model = Network(**network).to(device, dtype)
        self.forward = self.model if compiled is None else torch.compile(self.model, **compiled)
        options = {"num_micro_batches": count, "model": self.model, "method": METHODS[method]}
        self.opt = MicroBatchSAM(BASES[base](self.model.parameters()), 0.1, **options)
        self.options, self.around, self.noted = {}, nullcontext, []

    def loss_fn(self, x, y):
        return F.cross_entropy(self.forward(x).float(), y)

    def after(self, i):
        """What the loop does after step i."""

    def batch(self, i):
        x, y = data(seed=i, device=self.device)
        return x.to(self.dtype), y

    def run(self, step):
        """The weights, buffers and state after each step, its loss, and what was noted."""
        torch.manual_seed(1)
        history = []
        for i in range(7):
            with self.around():
                loss = step(*self.batch(i))
                self.after(i)
            state = [t for entry in self.opt.state.values() for t in entry.values() if t is not None]
            history.append([t.detach().clone() for t in (*self.model.state_dict().values(), *state, *self.noted, loss)])
        return history


def autocast(training):
    return torch.autocast(torch.device(training.device).type, torch.bfloat16)


def with_autocast_within(device):
    training = Training(device)
    plain = training.loss_fn

    def loss_fn(x, y):
        with autocast(training):
            return plain(x, y)

    training.loss_fn = loss_fn
    return training


def with_autocast_around(device):
    training = Training(device)
    training.around = partial(autocast, training)
    return training


def with_autocast_and_evaluation(device):
    """In the same region, so that the evaluation's casts may still be there, and those of the weights before."""
    training = with_autocast_around(device)

    def step_and_evaluate(step):
        def call(*batch):
            training.noted = [training.model(batch[0])]
            loss = step(*batch)
            training.noted.append(training.model(batch[0]))
            return loss

        return call

    run = training.run
    training.run = lambda step: run(step_and_evaluate(step))
    return training


def with_a_schedule(device):
    training = Training(device, torch.float64)
    schedule = lr_scheduler.OneCycleLR(training.opt, 0.3, total_steps=9)  # of momentum, too
    training.after = lambda i: schedule.step()
    return training


def with_clipping(device, dtype=torch.float64, **options):
    training = Training(device, dtype, **options)
    norm = torch.zeros((), dtype=dtype, device=device)
    training.noted = [norm]
    training.options["before_update"] = lambda: norm.copy_(clip_grad_norm_(training.model.parameters(), 0.05))
    return training


def with_scaler(device, clips=False, **options):
    """Steps 1, before the capture, and 4, after it, overflow."""
    training = with_clipping(device, **options) if clips else Training(device, **options)
    scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=2.0**10, growth_interval=2)
    training.options["scaler"] = scaler
    batch = training.batch

    def sometimes_too_large(i):
        x, y = batch(i)
        return x * (torch.inf if i in (1, 4) else 1.0), y

    def after(i):
        scaler.update()
        training.noted = [*training.noted[:clips], torch.tensor(scaler.get_scale())]

    training.batch, training.after = sometimes_too_large, after
    return training


def with_scaler_and_limit(device):
    training = with_scaler(device)
    training.options["max_grad_norm"] = 0.05
    return training


def with_half_precision(device):
    """Scaled, as it has to be, and clipped."""
    training = with_scaler(device, clips=True, dtype=torch.float32)
    training.around = lambda: torch.autocast(torch.device(device).type, torch.float16)
    return training


REAL = {
    "autocast within loss_fn": with_autocast_within,
    "autocast around the steps": with_autocast_around,
    "autocast around steps and evaluation": with_autocast_and_evaluation,
    "dropout": lambda device: Training(device, torch.float64, dropout=0.5),
    "activation checkpointing": lambda device: Training(device, torch.float64, recomputed=True),
    "checkpointing of dropout": lambda device: Training(device, torch.float64, dropout=0.5, recomputed=True),
    "a schedule of lr and momentum": with_a_schedule,
    "clipping": with_clipping,
    "clipping, LookSAM, AdamW": lambda device: with_clipping(device, base="AdamW", method="LookSAM"),
    "a scaler": with_scaler,
    "a scaler, AdamW, one micro-batch": lambda device: with_scaler(device, base="AdamW", count=1),
    "a scaler and clipping": lambda device: with_scaler(device, clips=True),
    "a scaler and max_grad_norm": with_scaler_and_limit,
    "a scaler, F-SAM": lambda device: with_scaler(device, method="F-SAM"),
    "a scaler, decoupled WSAM": lambda device: with_scaler(device, method="WSAM"),
    "fp16 autocast, a scaler and clipping": with_half_precision,
}


def assert_real_training_is_like_train_step(make, capture, device):
    trainings = make(device), make(device)
    step = capture(trainings[0])
    histories = (
        trainings[0].run(step),
        trainings[1].run(lambda *b: trainings[1].opt.train_step(trainings[1].loss_fn, *b, **trainings[1].options)),
    )
    for i, (ours, plain) in enumerate(zip(*histories, strict=True)):
        assert same_bits(ours, plain), f"step {i}"
    assert not same_bits(histories[0][0], histories[0][-1])
    return step


@pytest.mark.parametrize("name", REAL)
def test_real_training_is_like_train_step(name):
    def capture(training):
        example = training.batch(0)
        return captured(training.opt, training.model, training.loss_fn, *example, **training.options)[0]

    step = assert_real_training_is_like_train_step(REAL[name], capture, "cpu")
    assert step._recorder.replays == (3 if "LookSAM" in name else 5)


def test_a_compiled_model_is_like_train_step():
    def make(device):
        return Training(device, torch.float64, compiled={"backend": "eager"})

    def capture(training):
        return captured(training.opt, training.model, training.loss_fn, *training.batch(0))[0]

    assert_real_training_is_like_train_step(make, capture, "cpu")


ON_GPU = {
    **REAL,
    "torch.compile": lambda device: Training(device, torch.float64, compiled={}),
    "torch.compile, autocast": lambda device: Training(device, compiled={}),
}


@gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_real_training_in_a_cuda_graph_is_like_train_step(name):
    def capture(training):
        return training.opt.capture(training.loss_fn, *training.batch(0), warm_up=2, **training.options)

    try:
        step = assert_real_training_is_like_train_step(ON_GPU[name], capture, "cuda")
    except RuntimeError as error:
        if name.startswith(("activation", "checkpointing")) and "preserve_rng_state=False" in str(error):
            pytest.skip("this torch brings no generator's state into a graph, and says so")
        raise
    assert all(graph.replay is not None for graph in step._graphs.values())
    assert step.pool_bytes > 0


def test_casts_that_autocast_kept_are_not_captured():
    """They were made of the weights of then; the graph has to make its own, in each pass."""

    class CountsCasts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    counts = []
    for evaluates in (False, True):
        training = with_autocast_around("cpu")
        step, recorder = captured(training.opt, training.model, training.loss_fn, *training.batch(0))
        capture = recorder.capture

        def counted(step, capture=capture):
            with CountsCasts() as casts:
                recorded = capture(step)
            counts.append(casts.count)
            return recorded

        recorder.capture = counted
        for i in range(3):
            with autocast(training):
                if evaluates:
                    training.model(training.batch(0)[0])
                step(*training.batch(i))
    assert len(counts) == 2
    assert counts[0] == counts[1] > 0


# ---- a scaler --------------------------------------------------------------------------------------------------------


def test_a_step_that_overflows_changes_nothing_but_the_scale():
    training = with_scaler("cpu", base="AdamW")
    scaler = training.options["scaler"]
    step, recorder = captured(training.opt, training.model, training.loss_fn, *training.batch(0), **training.options)

    def weights_and_state():
        return [*training.model.parameters(), *(t for entry in training.opt.state.values() for t in entry.values())]

    for i in range(6):
        before, scale = [t.detach().clone() for t in weights_and_state()], scaler.get_scale()
        step(*training.batch(i))
        scaler.update()
        assert same_bits(weights_and_state()[: len(before)], before) == (i in (1, 4)), f"step {i}"
        assert (scaler.get_scale() < scale) == (i in (1, 4))
    assert recorder.replays == 4
    assert training.opt.steps == 6, "the host does not know of what was skipped"


def test_a_captured_step_forgets_a_loop_whose_gradients_it_drops():
    model, opt, loss_fn = setup("SGD", "F-SAM")
    other, plain, other_loss_fn = setup("SGD", "F-SAM")
    step, _ = captured(opt, model, loss_fn, *data(), warm_up=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(4):
        step(*data(seed=i))
        plain.train_step(other_loss_fn, *data(seed=i))
        for o, net in ((opt, model), (plain, other)):
            for x, y in o.passes(*data(seed=i + 9), scaler=scaler):
                scaler.scale(F.cross_entropy(net(x), y)).backward()
        assert same_bits(model.state_dict().values(), other.state_dict().values()), f"step {i}"
    for o in (opt, plain):
        o.zero_grad()
        assert o.engine.store.drawn == 0
    for a, b in zip(*(remembered(o, "ema").values() for o in (opt, plain)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("calls", [1, 3], ids=["warming up", "replayed"])
def test_a_scaler_that_was_not_updated_is_noticed_before_anything_changes(calls):
    training = with_scaler("cpu")
    scaler = training.options["scaler"]
    step, _ = captured(training.opt, training.model, training.loss_fn, *training.batch(0), **training.options)
    for i in range(calls):
        if i:
            scaler.update()
        step(*training.batch(0))
    before = [t.clone() for t in training.model.state_dict().values()]
    with pytest.raises(RuntimeError, match=r"before scaler\.update\(\)"):
        step(*training.batch(0))
    assert same_bits(training.model.state_dict().values(), before)
    scaler.update()
    step(*training.batch(0))
    assert not same_bits(training.model.state_dict().values(), before)


# ---- other shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("other_shapes", "captures", "replays"), [("eager", 1, 7), ("capture", 2, 8)])
def test_batches_of_other_shapes_are_like_train_step(other_shapes, captures, replays):
    model, opt, loss_fn = setup("SGD", "F-SAM")
    other, plain, other_loss_fn = setup("SGD", "F-SAM")
    step, recorder = captured(opt, model, loss_fn, *data(), other_shapes=other_shapes)
    for i in range(12):
        batch = data(4 if i % 4 == 2 else 6, seed=i)  # the last of an epoch
        assert torch.equal(step(*batch), plain.train_step(other_loss_fn, *batch))
        assert same_bits(model.state_dict().values(), other.state_dict().values()), f"step {i}"
    assert (recorder.captures, recorder.replays) == (captures, replays)
    assert step.pool_bytes == 1024 * captures
    with pytest.raises(ValueError, match="num_micro_batches=2 is more than the 1 samples"):
        step(*data(1))
    assert len(step._inputs) == captures


def test_what_a_graph_reads_outlives_steps_of_many_other_sizes():
    """Micro-batches' shares of the batch, which parallel steps weigh gradients by."""
    (model, opt, loss_fn), (other, plain, other_loss_fn) = (setup(count=2, parallel=True) for _ in range(2))
    step, recorder = captured(opt, model, loss_fn, *data(5))
    part, read = opt.engine.store.flats[0], []
    backend = part.backend
    part.backend = mock.Mock(wraps=backend)
    part.backend.weigh = lambda shares, **options: (
        read.append(weakref.ref(shares)),
        backend.weigh(shares, **options),
    )[1]
    both = lambda n, i: (step(*data(n, i)), plain.train_step(other_loss_fn, *data(n, i)))  # noqa: E731
    for i in range(4):
        both(5, i)
    first = read[:2]
    for n in range(7, 147, 2):
        both(n, n)
    assert all(shares() is not None for shares in first), "the graph would read freed memory"
    assert torch.equal(*both(5, 9))
    assert (recorder.captures, recorder.replays) == (1, 3)
    assert same_bits(model.state_dict().values(), other.state_dict().values())


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_a_captured_step_is_of_masters_as_train_step_is(base):
    def made():
        model = net().bfloat16()
        opt = MicroBatchSAM(BASES[base](model.parameters()), 0.1, num_micro_batches=2, model=model, masters=True)
        return model, opt, lambda x, y: F.cross_entropy(model(x.bfloat16()), y)

    (model, opt, loss_fn), (other, plain, other_loss_fn) = made(), made()
    step, recorder = captured(opt, model, loss_fn, *data())
    for i in range(6):
        assert torch.equal(step(*data(seed=i)), plain.train_step(other_loss_fn, *data(seed=i)))
        assert same_bits(model.state_dict().values(), other.state_dict().values()), f"step {i}"
        assert same_bits(*([flat.saved for flat in o.engine.store.flats] for o in (opt, plain))), f"step {i}"
    assert (recorder.captures, recorder.replays) == (1, 4)
    assert all(flat.saved.dtype == torch.float32 for flat in opt.engine.store.flats)


def test_stats_are_those_of_the_graph_that_was_replayed_last():
    """One graph's micro-batches run as one and two, the other's, and those of eager steps, all at once or as two and one."""
    (model, opt, loss_fn), (_, plain, other_loss_fn) = (setup(count=3, parallel=True) for _ in range(2))
    opt.engine.store.flats[0].stack(3)  # where it grows, all is captured again
    step, recorder = captured(opt, model, loss_fn, *data(7), other_shapes="capture")
    for i in range(3):
        step(*data(7, i)), plain.train_step(other_loss_fn, *data(7, i))
    written = [weakref.ref(t._base) for t in opt.engine.store.flats[0].achieved]
    for i, n in enumerate((9, 9, 9, 8, 7, 9, 7, 8, 9, 7)):
        step(*data(n, i)), plain.train_step(other_loss_fn, *data(n, i))
        for name in ("grad_norm", "perturbation_norm"):
            assert torch.equal(getattr(opt.stats, name), getattr(plain.stats, name)), f"{name} of step {i}"
    assert (recorder.captures, recorder.replays) == (2, 7), "none had to be captured again"
    assert all(memory() is not None for memory in written), "the graph would write to freed memory"


def test_each_shape_has_a_graph_of_each_plan():
    """The base optimizer's own steps come back, e.g. where the method is switched off; those of another method do not."""
    model, opt, loss_fn = setup("SGD", "SAM")
    opt.method = methods.SAM(start=10)
    step, recorder = captured(opt, model, loss_fn, *data(), other_shapes="capture")
    for i in range(20):
        step(*data(4 if i % 2 else 6, seed=i))
        assert len(step._graphs) == min(i % 10 + 1, 2) + 2 * (i >= 10)
        assert recorder.captures == (i >= 4) + (i >= 5) + (i >= 14) + (i >= 15)
    assert recorder.replays == 12
    opt.method = methods.StableSAM()
    step(*data())
    assert len(step._graphs) == 3


def test_other_shapes_may_be_an_error():
    model, opt, loss_fn = setup()
    step, _ = captured(opt, model, loss_fn, *data(), other_shapes="error")
    message = r"shapes \[\(6, 4\), \(6,\)\], got \[\(5, 4\), \(5,\)\].*drop_last=True.*other_shapes"
    with pytest.raises(ValueError, match=message):
        step(*data(5))
    step(*data())


@gpu
@pytest.mark.parametrize("other_shapes", ["eager", "capture"])
def test_other_shapes_beside_a_cuda_graph_are_like_train_step(other_shapes):
    model, opt, loss_fn = setup("SGD", "LookSAM", device="cuda")
    other, plain, other_loss_fn = setup("SGD", "LookSAM", device="cuda")
    step = opt.capture(loss_fn, *data(device="cuda"), warm_up=1, other_shapes=other_shapes)
    for i in range(16):
        batch = data(4 if i % 4 > 1 else 6, seed=i, device="cuda")
        assert torch.equal(step(*batch), plain.train_step(other_loss_fn, *batch))
        assert same_bits(model.state_dict().values(), other.state_dict().values()), f"step {i}"
    assert sum(graph.replay is not None for graph in step._graphs.values()) == (2 if other_shapes == "eager" else 4)


# ---- what cannot be captured -----------------------------------------------------------------------------------------

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing\nCompile with `TORCH_USE_CUDA_DSA`"
raising = partial(partial, torch._assert_async, torch.zeros(()))  # (message) -> what raises it out of C++


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (2.0 if grad.sum().item() else 1.0)


def looks_at_the_loss(loss):
    return loss * 2 if loss.item() > 0 else loss


def counts_batches(loss):
    nn.BatchNorm1d(1, momentum=None, dtype=torch.float64)(torch.ones(2, 1, dtype=torch.float64))
    return loss


def draws(loss):
    return loss * torch.empty(()).exponential_()


# What it does, torch's words, what the refusal says.
CANNOT = {
    "an item in loss_fn": (
        lambda x: x * x.item(),
        NOT_PERMITTED,
        r"`x\.item\(\)` \(test_graphs.py:\d+, in <lambda>\) \(CUDA",
    ),
    "an item in a function of it": (
        looks_at_the_loss,
        NOT_PERMITTED,
        r"`loss\.item\(\)` \(test_graphs\.py:\d+, in looks_at",
    ),
    "an item before the update": (
        lambda g: g.item(),
        NOT_PERMITTED,
        r"`g\.item\(\)` \(test_graphs\.py:\d+, in <lambda>\)",
    ),
    "a number within torch": (
        *(counts_batches, NOT_PERMITTED),
        r"`float\(self\.num_batches_tracked\)` \(batchnorm\.py:\d+, in forward\), called by `nn\.BatchNorm1d\(1.* in counts_",
    ),
    "an item in the backward": (
        Backward.apply,
        NOT_PERMITTED,
        r"`grad\.sum\(\)\.item\(\)` \(test_graphs\.py:\d+, in backward",
    ),
    "a generator": (
        *(draws, "Attempt to increase offset for a CUDA generator not in capture mode."),
        r"`torch\.empty\(\(\)\)\.exponential_\(\)` .* Name the generators .*generators=\[generator\]",
    ),
    "the state of a generator": (
        *(lambda x: x * torch.initial_seed(), "Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture."),
        r"`torch\.initial_seed\(\)` .*preserve_rng_state=False",
    ),
    "graphs of torch.compile": (
        *(lambda x: x.neg(), "Cannot prepare for replay during capturing stage."),
        r"`x\.neg\(\)` .*Compile with a mode that makes no graphs",
    ),
}
RAISE = {"item": Tensor, "__float__": Tensor, "neg": Tensor, "exponential_": Tensor, "initial_seed": torch}


@pytest.mark.parametrize(
    ("method", "what"),
    [("SAM", what) for what in CANNOT] + [("F-SAM", "an item in loss_fn"), ("LookSAM", "an item before the update")],
)
def test_what_cannot_be_captured_is_named_and_changes_nothing(method, what, monkeypatch):
    does, message, named = CANNOT[what]
    model, opt, loss_fn = setup("AdamW", method)
    other, plain, other_loss_fn = setup("AdamW", method)
    bad = []

    def sometimes_bad(x, y):
        return does(loss_fn(x, y)) if bad and not late else loss_fn(x, y)

    def before_update():
        if bad and late:
            does(next(model.parameters()).grad.sum())

    late = what == "an item before the update"
    step, recorder = captured(opt, model, sometimes_bad, *data(), before_update=before_update if late else None)
    capture = recorder.capture

    def on_a_gpu(step):
        with monkeypatch.context() as patched:
            for name, owner in RAISE.items():
                patched.setattr(owner, name, raising(message))
            return capture(step)

    calls = 4 if method == "LookSAM" else 2
    for i in range(calls + 3):
        if i == calls:
            bad.append(recorder)
            recorder.capture = on_a_gpu
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.5)
            grads, engine = [p.grad for p in model.parameters()], opt.engine
            kept = engine.norms_sq, engine.v_step, engine.steps
            for _ in range(2):
                with pytest.raises(RuntimeError, match=f"a captured step cannot hold {named}") as refused:
                    step(*data(seed=i))
                assert str(refused.value).endswith("or use train_step. Nothing was changed")
                assert same_bits(model.state_dict().values(), other.state_dict().values())
                assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
                assert (engine.norms_sq, engine.v_step, engine.steps) == kept
                assert opt.pass_index is None
            bad.clear()
            recorder.capture = capture
        assert torch.equal(step(*data(seed=i)), plain.train_step(other_loss_fn, *data(seed=i)))
        assert same_bits(model.state_dict().values(), other.state_dict().values()), f"step {i}"
    assert recorder.replays == 3


def test_what_fails_while_it_is_captured_writes_nothing(monkeypatch):
    """Nothing ran, and whatever one launches in a capture that has failed raises another error."""
    model, opt, loss_fn = setup("SGD", "SAM", 1)
    for p in model.parameters():
        p.grad = torch.ones(1, dtype=torch.float64).expand_as(p)  # set aside as a copy
    grads, calls = [p.grad for p in model.parameters()], []

    def launched(*_):
        raise RuntimeError("operation failed due to a previous error during capture")

    def fails(x, y):
        loss = loss_fn(x, y)
        calls.append(loss)
        if len(calls) == 2:
            monkeypatch.setattr(flat.Flat, "is_capturing", lambda _: True)
            for owner, name in ((buffers, "copy_all"), (Tensor, "copy_")):
                monkeypatch.setattr(owner, name, launched)
            raise KeyError("mine")
        return loss

    with pytest.raises(KeyError, match="mine"):
        opt.train_step(fails, *data())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def test_an_error_of_the_users_own_comes_out_as_it_is():
    model, opt, plain = setup()

    def loss_fn(x, y):
        if recorder.captures:
            raise KeyError("mine")
        return plain(x, y)

    step, recorder = captured(opt, model, loss_fn, *data())
    step(*data()), step(*data())
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(KeyError, match="mine"):
        step(*data())
    assert same_bits(model.state_dict().values(), before)
    opt.train_step(plain, *data())


def test_generators_of_another_device_are_refused():
    for generator, got in ((torch.Generator(), "cpu"), (0, "int")):
        with pytest.raises(TypeError, match=f"generators must be torch.Generator on cuda:0, .* got {got}"):
            CudaRecorder(torch.device("cuda:0"), [generator])


class Cuda:
    """What ``CudaRecorder`` asks of torch.cuda: a capture that a step ``breaks`` cannot be ended."""

    def __init__(self, monkeypatch):
        self.captures, self.streams, self.ended, self.broken = [], ["the user's"], [], False
        for name in ("Stream", "device", "stream", "CUDAGraph", "graph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(capture, "end_capture", lambda device, pool: self.ended.append(pool))
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)

    Stream = device = staticmethod(lambda device: nullcontext(device))
    graph_pool_handle = staticmethod(lambda: (0, 7))

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def CUDAGraph(self):
        graph = SimpleNamespace(generators=[], ended=False, replay=lambda: "replayed")
        graph.register_generator_state = graph.generators.append

        def pool():
            if not graph.ended:
                raise RuntimeError("without a preceding successful capture")

        graph.pool = pool
        return graph

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert self.streams[-1] is stream
        self.captures.append((graph, pool))
        try:
            yield
        finally:
            if self.broken:
                self.broken = False
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            graph.ended = True

    def breaks(self):
        self.broken = True


def test_a_capture_is_ended_mended_and_its_first_error_told(monkeypatch):
    cuda, generator = Cuda(monkeypatch), SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(torch, "Generator", SimpleNamespace)
    recorder, outputs = CudaRecorder(torch.device("cuda:0"), [generator]), [object()]
    assert recorder.capture(lambda: outputs)[1] is outputs
    assert len(cuda.captures) == 1

    def fails(error, breaks):
        def step():
            if breaks:
                cuda.breaks()
            raise error

        return step

    for error in (RuntimeError(NOT_PERMITTED), KeyError("mine"), KeyboardInterrupt()):
        for breaks in (True, False):
            cuda.captures.clear(), cuda.ended.clear()
            with pytest.raises(type(error)) as raised:
                recorder.capture(fails(error, breaks))
            assert raised.value is error
            assert cuda.ended == ([(0, 7)] if breaks else [])
            # Another capture, which ends well, puts the generators right; it leaves the graphs' pool alone.
            (_, pool), (mending, none) = cuda.captures
            assert (pool, none, mending.ended) == ((0, 7), None, True)
            assert mending.generators == [generator]
            assert cuda.streams == ["the user's"]

    def unjoined():
        cuda.breaks()
        return outputs

    with pytest.raises(RuntimeError, match="previous error during capture"):  # only its end says so
        recorder.capture(unjoined)
    assert cuda.ended == [(0, 7)]


@gpu
@pytest.mark.parametrize("what", ["item", "backward", "generator"])
def test_a_cuda_graph_that_cannot_be_leaves_all_as_it_was(what):
    """Streams, allocator and generators, too: dropout draws what it would have drawn."""
    generator = torch.Generator("cuda")
    does = {"item": looks_at_the_loss, "backward": Backward.apply}
    does["generator"] = lambda loss: loss * torch.rand((), device="cuda", generator=generator, dtype=torch.float64)
    trainings = [Training("cuda", torch.float64, dropout=0.5) for _ in range(2)]
    ours, plain = trainings
    bad, losses = [], ([], [])

    def loss_fn(x, y):
        return does[what](ours.loss_fn(x, y)) if bad else ours.loss_fn(x, y)

    step = ours.opt.capture(loss_fn, *ours.batch(0), warm_up=2)
    torch.manual_seed(1)
    for i in range(6):
        if i == 2:
            stream, before = torch.cuda.current_stream(), [t.clone() for t in ours.model.state_dict().values()]
            bad.append(True)
            if what != "generator":
                with pytest.raises(RuntimeError, match=r"a captured step cannot hold `.*item\(\)`"):
                    step(*ours.batch(i))
            else:  # newer versions of torch take it in by themselves
                try:
                    step(*ours.batch(i))
                except RuntimeError as error:
                    assert "generators=[generator]" in str(error)
                else:
                    return
            bad.clear()
            assert torch.cuda.current_stream() == stream
            assert same_bits(ours.model.state_dict().values(), before)
            torch.cuda.synchronize()
        losses[0].append(step(*ours.batch(i)))
    torch.manual_seed(1)
    for i in range(6):
        losses[1].append(plain.opt.train_step(plain.loss_fn, *plain.batch(i)))
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert same_bits(ours.model.state_dict().values(), plain.model.state_dict().values())


@gpu
def test_a_generator_that_is_named_is_followed_by_a_cuda_graph():
    results = []
    for captures in (True, False):
        training, generator = Training("cuda", torch.float64), torch.Generator("cuda").manual_seed(3)

        def loss_fn(x, y, training=training, generator=generator):
            noise = torch.randn(x.shape, device="cuda", dtype=x.dtype, generator=generator)
            return training.loss_fn(x + noise, y)

        step = partial(training.opt.train_step, loss_fn)
        if captures:
            step = training.opt.capture(loss_fn, *training.batch(0), warm_up=2, generators=[generator])
        results.append(training.run(step))
    for ours, plain in zip(*results, strict=True):
        assert same_bits(ours, plain)


@gpu
def test_batches_come_from_pinned_memory():
    model, opt, loss_fn = setup(device="cuda")
    other, plain, other_loss_fn = setup(device="cuda")
    step = opt.capture(loss_fn, *(t.pin_memory() for t in data()), warm_up=1)
    for i in range(5):
        n = 4 if i == 3 else 6
        step(*(t.pin_memory() for t in data(n, seed=i)))
        plain.train_step(other_loss_fn, *data(n, seed=i, device="cuda"))
    assert same_bits(model.state_dict().values(), other.state_dict().values())


# ---- around the graph ------------------------------------------------------------------------------------------------


def test_a_batch_of_another_kind_is_refused_and_changes_nothing():
    model, opt, loss_fn = setup()
    step, _ = captured(opt, model, loss_fn, *data())
    for _ in range(4):
        step(*data())
    before = [t.clone() for t in model.state_dict().values()]
    x, y = data()
    bad = {
        "captured for torch.float64 as tensor 0 .* got torch.float32": (x.float(), y),
        "structure": (x, y, y),
        "captured for torch.int64 as tensor 1 .* got None": (x, None),
        "captured for torch.int64 as tensor 1 .* got str": (x, "y"),
    }
    for message, batch in bad.items():
        with pytest.raises(ValueError, match=message):
            step(*batch)
    assert same_bits(model.state_dict().values(), before)


def test_the_step_is_captured_again_after_what_a_graph_cannot_follow():
    model, opt, loss_fn = setup("SGD", "F-SAM")
    step, recorder = captured(opt, model, loss_fn, *data())
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    step(*data()), step(*data()), step(*data()), step(*data())
    assert (recorder.captures, recorder.replays) == (1, 2)
    opt.add_param_group({"params": [extra]})
    step(*data()), step(*data()), step(*data())
    assert (recorder.captures, recorder.replays) == (2, 3)


def test_what_is_unfrozen_is_warmed_up_and_captured_too():
    model, opt, loss_fn = setup("AdamW", "F-SAM", frozen=True)
    other, plain, other_loss_fn = setup("AdamW", "F-SAM", frozen=True)
    step, recorder = captured(opt, model, loss_fn, *data())
    for i in range(9):
        for m in (model, other):
            m[0].requires_grad_(i >= 4)
        step(*data(seed=i))
        plain.train_step(other_loss_fn, *data(seed=i))
    assert (recorder.captures, recorder.replays) == (2, 2 + 3)
    assert same_bits(model.state_dict().values(), other.state_dict().values())


CHANGES = {
    "a layer is frozen": lambda model, opt: model[0].requires_grad_(False),
    "other micro-batches": lambda model, opt: setattr(opt, "num_micro_batches", 3),
    "a model whose buffers are held": lambda model, opt: setattr(opt, "model", model),
    "whose gradients are averaged": lambda model, opt: setattr(opt.engine, "ranks", Ranks("global", None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_user_changes_is_no_longer_replayed_as_it_was(change):
    pairs = [setup("SGD", "SAM"), setup("SGD", "SAM")]
    for _, opt, _ in pairs:
        opt.model = None
    (model, opt, loss_fn), (other, plain, other_loss_fn) = pairs
    step, recorder = captured(opt, model, loss_fn, *data())
    for i in range(8):
        if i == 4:
            CHANGES[change](model, opt)
            CHANGES[change](other, plain)
        step(*data(seed=i))
        plain.train_step(other_loss_fn, *data(seed=i))
        assert same_bits(model.state_dict().values(), other.state_dict().values()), f"step {i}"
        if i == 4:  # a graph would do what it did before the change, which this recorder's replay does not
            assert recorder.replays == 2
    assert (recorder.captures, recorder.replays) == (2, 2 + 2)


def test_a_batch_with_a_graph_of_its_own_leaves_none_in_the_graph_s_inputs():
    model, opt, loss_fn = setup("SGD", "SAM")
    step, _ = captured(opt, model, loss_fn, *data())
    for i in range(4):
        x, y = data(seed=i)
        step(x.requires_grad_() * 2, y)
    (inputs,) = step._inputs.values()
    assert [t.requires_grad for t in inputs] == [False, False]


def test_state_that_moved_or_was_exchanged_reaches_the_graph():
    model, opt, loss_fn = setup("AdamW")
    other, plain, other_loss_fn = setup("AdamW")
    step, recorder = captured(opt, model, loss_fn, *data())
    for i in range(7):
        if i == 4:
            for m, o in ((model, opt), (other, plain)):
                for value in o.state[m[0].weight].values():
                    value.data = value.data * 2
                bias, weight = m[0].bias, m[1].weight  # of the same shape
                o.state[bias], o.state[weight] = o.state[weight], o.state[bias]
        step(*data(seed=i))
        plain.train_step(other_loss_fn, *data(seed=i))
    assert (recorder.captures, recorder.replays) == (1, 5)
    assert same_bits(model.state_dict().values(), other.state_dict().values())


def test_a_method_that_starts_is_captured_again():
    model, opt, loss_fn = setup()
    opt.method = methods.SAM(start=4)
    other, plain, other_loss_fn = setup()
    plain.method = methods.SAM(start=4)
    step, recorder = captured(opt, model, loss_fn, *data())
    for i in range(9):
        step(*data(seed=i))
        plain.train_step(other_loss_fn, *data(seed=i))
    assert (recorder.captures, recorder.replays) == (2, 2 + 3)
    assert same_bits(model.state_dict().values(), other.state_dict().values())


@pytest.mark.parametrize("change", ["the method starts", "it is switched on", "an average is dropped"])
def test_what_begins_after_the_warm_up_is_warmed_up_before_it_is_captured(change, monkeypatch):
    model, opt, loss_fn = setup("SGD", "F-SAM")
    step, recorder = captured(opt, model, loss_fn, *data())
    opt.method = methods.FriendlySAM(start=2 if change == "the method starts" else 0)
    opt.enabled = change != "it is switched on"
    begun = []
    real = flat.Memory
    monkeypatch.setattr(flat, "Memory", lambda *args: (begun.append(recorder.captures), real(*args))[1])
    step(*data()), step(*data())  # the warm-up
    opt.enabled = True
    if change == "an average is dropped":
        opt.load_state_dict(without_ours(copy.deepcopy(opt.state_dict())))
    step(*data()), step(*data())
    assert recorder.captures == 0
    step(*data())
    assert recorder.captures == 1
    assert set(begun) == {0}


def test_loaded_state_reaches_the_graph():
    model, opt, loss_fn = setup("AdamW", "F-SAM")
    step, recorder = captured(opt, model, loss_fn, *data())
    for i in range(5):
        step(*data(seed=i))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    for i in range(3):
        step(*data(seed=10 + i))
    expected = [p.clone() for p in model.parameters()]
    model.load_state_dict(saved[0])
    opt.load_state_dict(copy.deepcopy(saved[1]))
    for i in range(3):
        step(*data(seed=10 + i))
    assert same_bits(model.parameters(), expected)
    assert recorder.captures == 1


def test_hooks_hear_of_every_step():
    model, opt, loss_fn = setup()
    step, recorder = captured(opt, model, loss_fn, *data())
    heard = []
    opt.register_step_pre_hook(lambda *_: heard.append("before"))
    opt.register_step_post_hook(lambda *_: heard.append("after"))
    for _ in range(5):
        step(*data())
    assert recorder.replays == 3
    assert heard == ["before", "after"] * 5


def test_a_batch_may_be_any_structure():
    model, opt, _ = setup()

    def loss_fn(batch):
        return F.cross_entropy(model(batch["x"]), batch["y"][0])

    x, y = data()
    step, recorder = captured(opt, model, loss_fn, {"x": x, "y": [y, None]})
    losses = [step({"x": x, "y": [y, None]}) for _ in range(6)]
    assert recorder.replays == 4
    assert all(torch.isfinite(loss) for loss in losses)
    assert len({loss.data_ptr() for loss in losses[2:]}) == 4, "each loss is its own"


@pytest.mark.parametrize("count", [1, 2])
def test_each_pass_gets_the_batch_whole(count):
    model, opt, _ = setup(count=count)

    def loss_fn(inputs):
        labels = inputs.pop("labels")
        return F.cross_entropy(model(inputs.pop("x")), labels)

    step, recorder = captured(opt, model, loss_fn, dict(zip(("x", "labels"), data(), strict=True)))
    for seed in range(4):
        step(dict(zip(("x", "labels"), data(seed=seed), strict=True)))
    assert recorder.replays == 2


def test_a_buffer_of_another_shape_lets_it_capture_again():
    """The graph writes to the copies of the buffers."""
    model, opt, loss_fn = setup()
    step, recorder = captured(opt, model, loss_fn, *data())
    for _ in range(4):
        step(*data())
    assert recorder.captures == 1
    model.register_buffer("another", torch.ones(2))
    opt.train_step(loss_fn, *data())
    for _ in range(4):
        step(*data())
    assert recorder.captures == 2


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, ValueError, "needs an example batch"),
        (data(), {"warm_up": 0}, ValueError, "warm_up must be an integer >= 1, got 0"),
        (data(), {"warm_up": True}, ValueError, "warm_up must be an integer >= 1, got True"),
        (data(), {"other_shapes": "skip"}, ValueError, r"other_shapes must be one of \('eager', .*got 'skip'"),
        (data(), {"before_update": 1.0}, TypeError, "before_update must be a function without arguments.*got 1.0"),
        (data(), {"scaler": 2.0**16}, TypeError, "scaler must be a torch.amp.GradScaler, got float"),
        ((torch.ones(1, 4),), {}, ValueError, "num_micro_batches=2 is more than the 1 samples"),
        ((*data(), "a name"), {"count": 1}, TypeError, "dense tensors.*got a str: use train_step"),
        ((torch.eye(4).to_sparse(),), {"count": 1}, TypeError, r"dense tensors.*torch\.sparse_coo: use train_step"),
    ],
    ids=[
        *("no batch", "no warm-up", "warm-up True", "other_shapes", "before_update", "a scaler", "too small a batch"),
        *("a string", "a sparse tensor"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    model, opt, loss_fn = setup(count=options.pop("count", 2))
    with pytest.raises(error, match=message):
        captured(opt, model, loss_fn, *arguments, **options)
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        captured(opt, model, "no function", *data())


def test_capture_without_a_gpu_says_what_to_use():
    _, opt, loss_fn = setup()
    with pytest.raises(RuntimeError, match="one CUDA device, got cpu: use train_step"):
        opt.capture(loss_fn, *data())
