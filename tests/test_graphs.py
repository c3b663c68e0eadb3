# SPDX-License-Identifier: Apache-2.0
"""``opt.capture``: what the host does around a captured step, and, where there is a CUDA device, the graphs themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from msam_kernels import MicroBatchSAM, flat, methods
from msam_kernels.capture import CapturedStep
from plain import same_bits

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
    "Sparse SAM": methods.SparseSAM(update_every=3),
}
# Of seven calls, two of which warm up: LookSAM has two kinds of steps, and steps that choose a mask are not captured.
CAPTURES_AND_REPLAYS = {"LookSAM": (2, 3), "Sparse SAM": (1, 2)}


class Recorder:
    """A graph's life without a GPU: capturing changes nothing, a replay does on the same inputs what was captured."""

    device = torch.device("cpu")

    def __init__(self, model):
        self.model, self.captures, self.replays = model, 0, 0

    def warm_up(self, step):
        return step()

    def capture(self, step):
        self.captures += 1
        tensors = list(self.model.state_dict().values())
        for part in self.opt.engine.store.flats:
            memories = [t for memory in part.memories.values() for t in (memory.buffer, memory.square)]
            kept = (part.saved, part.mask, part.status, *memories, *part.state.values())
            tensors += [t for t in kept if t is not None]
        before = [t.clone() for t in tensors]
        outputs = [step().clone(), *self.sums()]
        for t, b in zip(tensors, before, strict=True):
            t.copy_(b)

        def replay():
            self.replays += 1
            for old, new in zip(outputs, [step(), *self.sums()], strict=True):
                old.copy_(new)
            self.opt.steps -= 1  # a graph's replay runs no Python

        return replay, outputs[0]

    def sums(self):
        return self.opt.engine.norms_sq


def net(device="cpu"):
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double().to(device)


def data(n=6, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x.to(device), torch.randint(3, (n,), generator=generator).to(device)


def setup(base="SGD", method="SAM", count=2, device="cpu", frozen=False):
    model = net(device)
    model[0].requires_grad_(not frozen)
    opt = MicroBatchSAM(
        BASES[base](model.parameters()), 0.1, method=METHODS[method], num_micro_batches=count, model=model
    )
    return model, opt, lambda x, y: F.cross_entropy(model(x), y)


def captured(opt, model, loss_fn, *example, warm_up=2):
    """The captured step, and its recorder."""
    recorder = Recorder(model)
    recorder.opt = opt
    return CapturedStep(opt, loss_fn, example, recorder, warm_up), recorder


def assert_trains_like_train_step(make_step, base, method, count, device):
    model, opt, loss_fn = setup(base, method, count, device)
    other, plain, other_loss_fn = setup(base, method, count, device)
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
        for scheduler in schedulers:
            scheduler.step()
        if i == 4:
            for o in (opt, plain):
                o.param_groups[0]["rho"] = 0.2
    return step


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


# ---- around the graph ------------------------------------------------------------------------------------------------


def test_a_batch_of_another_kind_is_refused_and_changes_nothing():
    model, opt, loss_fn = setup()
    step, _ = captured(opt, model, loss_fn, *data())
    for _ in range(4):
        step(*data())
    before = [t.clone() for t in model.state_dict().values()]
    x, y = data()
    bad = {
        "float64 of shape .5, 4.*drop_last=True": (x[:5], y[:5]),
        "captured for torch.float64 .* got torch.float32": (x.float(), y),
        "structure": (x, y, y),
        "captured for torch.int64 .* got None": (x, None),
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
        opt.load_state_dict({k: v for k, v in copy.deepcopy(opt.state_dict()).items() if k != "msam"})
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
        ((torch.ones(1, 4),), {}, ValueError, "num_micro_batches=2 is more than the 1 samples"),
        ((*data(), "a name"), {"count": 1}, TypeError, "dense tensors.*got a str: use train_step"),
        ((torch.eye(4).to_sparse(),), {"count": 1}, TypeError, r"dense tensors.*torch\.sparse_coo: use train_step"),
    ],
    ids=["no batch", "no warm-up", "warm-up True", "too small a batch", "a string", "a sparse tensor"],
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
