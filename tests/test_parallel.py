# SPDX-License-Identifier: Apache-2.0
"""Parallel passes give what the sequential ones give, refuse what they cannot run, and never touch the weights on the way."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.optim import SGD, AdamW, RMSprop

from msam_kernels import MicroBatchSAM, _torch, methods
from msam_kernels import compiled as compiled_module
from msam_kernels import parallel as parallel_module
from msam_kernels.compiled import Compiled
from msam_kernels.parallel import Auto, ParallelPasses, Refused
from plain import BACKENDS, COMPILES, DEVICE, METHODS, NO_COMPILER, same_bits, weights

DOUBLE = torch.float64
TOLERANCE = 1e-10


class Attention(nn.Module):
    """Self-attention; ``mask``: "causal", "none", or the dimensions of a boolean one."""

    def __init__(self, mask="causal", d=8, heads=2):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.heads, self.mask = heads, mask

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if isinstance(self.mask, int):
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            mask = mask.expand(*(batch, self.heads)[4 - self.mask :][: self.mask - 2], length, length)
            out = F.scaled_dot_product_attention(q, k, v, mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.mask == "causal")
        return x + self.out(out.transpose(1, 2).flatten(2))


class Text(nn.Module):
    """Words, attention, and the words' own weights at the end."""

    def __init__(self, *masks):
        super().__init__()
        self.words, self.layers = nn.Embedding(11, 8), nn.Sequential(*map(Attention, masks or ("causal", "none")))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.layers(self.words(x))).flatten(0, 1)


class Patches(nn.Module):
    """A small vision transformer out of torch's own layers."""

    def __init__(self):
        super().__init__()
        self.cut, self.places = nn.Conv2d(1, 8, 4, 4), nn.Parameter(torch.randn(1, 4, 8) * 0.1)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer(self.cut(x).flatten(2).transpose(1, 2) + self.places).mean(1))


def images(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g, dtype=DOUBLE).to(DEVICE), torch.randint(5, (n,), generator=g).to(DEVICE)


def text(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(11, (n, 6), generator=g).to(DEVICE), torch.randint(11, (n, 6), generator=g).to(DEVICE)


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)),
        *(nn.BatchNorm2d(6, momentum=0.3), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)),
    )


class Scaled(nn.Module):
    """A parametrization: rows of length one."""

    def forward(self, w):
        return w / w.norm(dim=1, keepdim=True)


def unit_rows(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5)), images),
    "cnn with BatchNorm": (convolutions, images),
    "transformer": (Text, text),
    "transformer with masks": (lambda: Text(2, 3, 4), text),
    "ViT": (Patches, images),
    "a parametrization": (lambda: nn.Sequential(nn.Flatten(), unit_rows(nn.Linear(64, 5))), images),
}
FULL = ("cnn with BatchNorm", "transformer with masks")
# With a large eps: a gradient that is zero but for rounding is not blown up to the length of others.
BASES = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda params: AdamW(params, lr=1e-2, eps=1e-3),
    "RMSprop, unfused": lambda params: RMSprop(params, lr=1e-2, eps=1e-3),
}


def loss_of(model):
    return lambda x, y: F.cross_entropy(model(x), y.flatten())


def twins(make, base="SGD", method="SAM", parallel=True, count=3, compile=False, **options):
    """(model, opt) that trains sequentially, and in parallel."""
    torch.manual_seed(0)
    model = make().to(DEVICE, DOUBLE)
    found = []
    for way in (False, parallel):
        model = copy.deepcopy(model)
        groups = list(model.parameters())
        opt = BASES[base]([{"params": groups[:1]}, {"params": groups[1:], "rho": 0.1}] if len(groups) > 1 else groups)
        options = {
            "method": METHODS[method] if isinstance(method, str) else method,
            "num_micro_batches": count,
            **options,
        }
        ways = {"parallel": way, "compile": bool(way) and compile}
        found.append((model, MicroBatchSAM(opt, 0.05, model=model, **ways, **options)))
    return found


def apart(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item() for a, b in pairs if b.numel())


def assert_train_alike(ours, expected, batches, stats=True):
    (model, opt), (other, plain) = ours, expected
    for i, batch in enumerate(batches):
        losses = opt.train_step(loss_of(model), *batch), plain.train_step(loss_of(other), *batch)
        assert apart(losses[:1], losses[1:]) < TOLERANCE, f"step {i}"
        assert apart(model.state_dict().values(), other.state_dict().values()) < TOLERANCE, f"step {i}"
        assert all(p.grad is None for p in model.parameters())
        if stats and plain.engine.norms_sq:
            assert torch.equal(opt.stats.nonfinite, plain.stats.nonfinite)
            for name in ("grad_norm", "perturbation_norm"):
                assert apart([getattr(opt.stats, name)], [getattr(plain.stats, name)]) < TOLERANCE


# Models differ in their passes, methods in what is made of gradients: every one of each, and all pairs in CI.
PAIRS = [
    pytest.param(
        name, method, id=f"{name}, {method}", marks=() if name in FULL or method == "GSAM" else pytest.mark.exhaustive
    )
    for name in MODELS
    for method in METHODS
]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_twenty_steps_are_those_of_the_sequential_passes(name, method):
    make, data = MODELS[name]
    # A GELU or a norm makes differences of rounding grow; these do not go that far within as many steps.
    expected, ours = twins(make, method=method)
    assert_train_alike(ours, expected, [data(12, i % 4) for i in range(20)])


@pytest.mark.parametrize("most", [True, 1, 2, 5], ids="parallel={}".format)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["SAM", "GSAM", "LookSAM k=2", "Bilateral SAM"])
def test_so_many_at_once_and_uneven_ones_are_those_of_the_sequential_passes(method, base, most):
    expected, ours = twins(convolutions, base, method, most)
    assert_train_alike(ours, expected, [images(10, i) for i in range(5)])


@pytest.mark.parametrize("most", [True, 2], ids="parallel={}".format)
@pytest.mark.parametrize("method", ["SAM", "F-SAM", "ASAM", "Bilateral SAM"])
def test_a_chosen_part_is_copied_alone(method, most):
    expected, ours = twins(convolutions, parallel=most)
    for model, opt in (expected, ours):
        opt.method = dataclasses.replace(METHODS[method], only=methods.norm_layers(model))
    # What was flattened for all of them, and what was for the chosen ones.
    assert_train_alike(ours, expected, [images(10, i) for i in range(3)])
    model, _ = ours
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.05, method=opt.method, num_micro_batches=3, model=model)
    opt.parallel = most
    other = copy.deepcopy(model)
    plain = MicroBatchSAM(
        SGD(other.parameters(), lr=0.1),
        0.05,
        method=dataclasses.replace(METHODS[method], only=methods.norm_layers(other)),
        num_micro_batches=3,
        model=other,
    )
    assert_train_alike((model, opt), (other, plain), [images(10, i) for i in range(3)])
    assert [flat.copies != [] for flat in opt.engine.store.flats] == [False, True]


@pytest.mark.parametrize("most", [True, 5], ids="parallel={}".format)
@pytest.mark.parametrize("method", ["SAM", "GSAM"])
def test_a_dozen_micro_batches_are_added_up_by_their_sizes(method, most):
    expected, ours = twins(MODELS["mlp"][0], method=method, parallel=most, count=12)
    assert_train_alike(ours, expected, [images(29, i) for i in range(3)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_writes_beside_the_weights(backend):
    expected, ours = twins(convolutions, method="F-SAM + Sparse + Stable", backend=backend)
    assert_train_alike(ours, expected, [images(12, i) for i in range(6)])


COMPOSED = {
    "a mean and another side": methods.FriendlySAM(sigma=0.5, lmbda=0.6) + methods.BilateralSAM(rho_min=0.03),
    "a mean and stretched directions": methods.FriendlySAM(sigma=0.5, lmbda=0.6) + methods.AdaptiveSAM(eta=0.01),
    "three vectors as long as one": methods.BilateralSAM(rho_min=0.03) + methods.StableSAM(),
}


@pytest.mark.parametrize("most", [True, 2], ids="parallel={}".format)
@pytest.mark.parametrize("method", COMPOSED.values(), ids=COMPOSED)
def test_methods_compose_as_in_sequential_passes(method, most):
    expected, ours = twins(convolutions, method=method, parallel=most)
    assert_train_alike(ours, expected, [images(10, i) for i in range(5)])


class Mixed(nn.Module):
    """Parameters of two dtypes: two flats, whose sums come together."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 6), nn.Linear(6, 5)

    def forward(self, x):
        hidden = self.first(x.flatten(1).to(self.first.weight.dtype)).tanh()
        return self.second(hidden.to(self.second.weight.dtype)).double()


@pytest.mark.parametrize("method", ["F-SAM sigma=0.5 lmbda=0.6", "GSAM", "Bilateral SAM", "LookSAM k=2"])
def test_parameters_of_two_dtypes_train_as_in_sequential_passes(method):
    (other, _), (model, _) = twins(Mixed)
    found = []
    for m, parallel in ((other, False), (model, True)):
        m.second.float()
        opt = MicroBatchSAM(
            SGD(m.parameters(), 0.1), 0.05, method=METHODS[method], num_micro_batches=3, model=m, parallel=parallel
        )
        for i in range(5):
            opt.train_step(loss_of(m), *images(10, i))
        found.append([p.double() for p in weights(m)])
    assert apart(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=0.5 lmbda=0.6", "GSAM"])
def test_one_micro_batch_that_overflows_is_the_only_one_that_is_not_perturbed(method):
    (_, plain), (_, opt) = found = twins(MODELS["mlp"][0], method=method)
    for model, one in found:
        for i in range(2):
            x, y = images(9, i)
            x[4] *= math.inf if i == 1 else 1.0  # of the second micro-batch
            one.train_step(loss_of(model), x, y)
    assert opt.stats.nonfinite.tolist() == plain.stats.nonfinite.tolist() == [False, True, False]
    assert apart([opt.stats.perturbation_norm], [plain.stats.perturbation_norm]) < TOLERANCE
    means = [[memory.buffer for memory in one.engine.store.flats[0].memories.values()] for one in (opt, plain)]
    assert len(means[0]) == ("F-SAM" in method)
    for actual, expected in zip(*means, strict=True):
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def test_batches_may_be_trees_and_models_partly_frozen():
    def make():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5))
        return model

    (other, plain), (model, opt) = twins(make)
    for m in (other, model):
        m[1].weight.requires_grad_(False)
    for i in range(4):
        x, y = images(9, i)
        losses = []
        for m, o in ((other, plain), (model, opt)):
            tree = {"x": x, "y": (y, None)}
            losses.append(o.train_step(lambda part, m=m: F.cross_entropy(m(part["x"]), part["y"][0]), tree))
        assert apart(losses[:1], losses[1:]) < TOLERANCE
        assert apart(weights(model), weights(other)) < TOLERANCE


def test_a_parameter_without_a_gradient_is_absent_as_in_sequential_passes():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 5), nn.Linear(64, 5)

        def forward(self, x):
            return self.used(x.flatten(1))

    expected, ours = twins(Half)  # with weight decay, which would move it
    before = ours[0].unused.weight.clone()
    assert_train_alike(ours, expected, [images(9, i) for i in range(3)])
    assert torch.equal(ours[0].unused.weight, before)


@pytest.mark.parametrize("enabled", [True, False], ids=["scaling", "disabled"])
def test_scaler_and_before_update_see_what_they_see_sequentially(enabled):
    expected, ours = twins(convolutions)
    seen = []
    for i in range(5):
        for model, opt in (expected, ours):
            scaler = torch.amp.GradScaler(DEVICE.type, init_scale=64.0, enabled=enabled)
            clip = lambda model=model: seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))  # noqa: E731
            opt.train_step(loss_of(model), *images(9, i), before_update=clip, scaler=scaler)
    assert apart(seen[1::2], seen[::2]) < TOLERANCE
    assert apart(ours[0].state_dict().values(), expected[0].state_dict().values()) < TOLERANCE


def test_autocast_runs_in_the_forward():
    expected, ours = twins(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5)))
    found, dtypes = [], []
    for model, opt in (expected, ours):
        model.float()
        opt = MicroBatchSAM(SGD(model.parameters(), 0.1), num_micro_batches=3, model=model, parallel=opt.parallel)
        x, y = images(9)

        def loss_fn(x, y, model=model):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                out = model(x)
                dtypes.append(out.dtype)
            return F.cross_entropy(out.float(), y)

        found.append([opt.train_step(loss_fn, x.float(), y), *weights(model)])
        assert torch.is_autocast_cache_enabled()
    assert set(dtypes) == {torch.bfloat16}
    assert apart(found[1], found[0]) < 0.02  # bf16, batched otherwise


def test_dropout_draws_for_every_micro_batch_and_pass():
    _, (model, opt) = twins(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5)))
    x, y = images(1)
    torch.manual_seed(3)
    opt.train_step(loss_of(model), x.expand(3, 1, 8, 8), y.expand(3))
    norms = opt.stats.grad_norm
    assert len(set(norms.tolist())) == 3, "three micro-batches of the same sample, each with a mask of its own"


# -- statistics and other buffers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_are_those_of_one_micro_batch_after_the_other(momentum):
    make = lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, momentum=momentum), nn.Linear(64, 5))  # noqa: E731
    (other, plain), (model, opt) = twins(make, parallel=2)
    for i in range(3):
        plain.train_step(loss_of(other), *images(10, i))
        opt.train_step(loss_of(model), *images(10, i))
    for (name, b), (_, expected) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(b, expected, rtol=1e-13, atol=1e-14, msg=name)
    assert model[1].num_batches_tracked.item() == 9


def test_statistics_stay_where_a_model_evaluates():
    (other, plain), (model, opt) = twins(convolutions)
    for m in (other, model):
        m[1].eval()
    before = copy.deepcopy(model[1].state_dict())
    assert_train_alike((model, opt), (other, plain), [images(9)])
    assert same_bits([model[1].running_mean, model[1].running_var], [before["running_mean"], before["running_var"]])


class Summed(nn.Module):
    """Autograd returns one gradient for both operands of a sum, and one number's worth of memory for a number."""

    def __init__(self):
        super().__init__()
        shapes = (64, 5), (64, 5), (5,), (5,), (1,)
        self.a, self.b, self.c, self.d, self.e = (nn.Parameter(torch.randn(*shape) * 0.1) for shape in shapes)

    def forward(self, x):
        return x.flatten(1) @ (self.a + self.b) + torch.stack([self.c, self.d]).sum(0) + self.e


class Twice(nn.Module):
    """A BatchNorm that runs twice, and one that does not run."""

    def __init__(self):
        super().__init__()
        self.norm, self.idle, self.head = nn.BatchNorm1d(64), nn.BatchNorm1d(64), nn.Linear(64, 5)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(self.norm(x) + self.norm(2 * x + 1))


class Padded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8, **{"padding_idx": 3, **options}), nn.Linear(8, 11)

    def forward(self, x):
        return self.head(self.words(x)).flatten(0, 1)


class Learned(nn.Module):
    """Attention whose operands have different dimensions: queries, keys or values that are parameters."""

    def __init__(self, of):
        super().__init__()
        self.of, self.rows = of, nn.Parameter(torch.randn(6, 8) * 0.3)
        self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, x):
        x = self.words(x)
        operands = {
            "queries": (self.rows, x, x),
            "keys": (x, self.rows, x),
            "keys and values": (x, self.rows, self.rows),
            "queries of one sample": (self.rows.unsqueeze(0), x, x),
            "heads": (self.rows.view(1, 6, 2, 4).transpose(1, 2), *[x.unflatten(-1, (2, 4)).transpose(1, 2)] * 2),
        }
        out = F.scaled_dot_product_attention(*operands[self.of])
        return self.head(out if out.dim() == 3 else out.transpose(1, 2).flatten(2)).flatten(0, 1)


class Constant(torch.autograd.Function):
    """Its gradient is a tensor of its own, which nobody may write to."""

    generate_vmap_rule = True
    gradient = torch.full((5,), 0.3, dtype=DOUBLE)

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return Constant.gradient.to(g.device)


class Owned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 5) * 0.1), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return x.flatten(1) @ self.weight + Constant.apply(self.bias)


TRAPS = {
    "operands of a sum": (Summed, images),
    "a BatchNorm twice, another never": (Twice, images),
    "padding": (Padded, text),
    "padding, counted from the end": (lambda: Padded(padding_idx=-8), text),
    "gradients by frequency": (lambda: Padded(scale_grad_by_freq=True), text),
    **{f"learned {of}": (lambda of=of: Learned(of), text) for of in ("queries", "keys", "keys and values")},
    **{f"learned {of}": (lambda of=of: Learned(of), text) for of in ("queries of one sample", "heads")},
    "a gradient of somebody else's": (Owned, images),
    "channels last": (lambda: convolutions().to(memory_format=torch.channels_last), images),
}


@pytest.mark.parametrize("method", ["SAM", "GSAM", "Sparse SAM"])
@pytest.mark.parametrize("name", TRAPS)
def test_what_vmap_and_autograd_do_otherwise_ends_as_in_sequential_passes(name, method):
    make, data = TRAPS[name]
    expected, ours = twins(make, method=method)
    assert_train_alike(ours, expected, [data(18, i) for i in range(4)])  # six samples: as many as learned queries
    assert Constant.gradient.eq(0.3).all()


def test_an_update_in_place_of_gradients_works_before_the_update():
    expected, ours = twins(convolutions)

    def decay(model):
        for p in model.parameters():
            p.grad += 0.1 * p

    for i in range(3):
        for model, opt in (expected, ours):
            with torch.enable_grad():
                opt.train_step(loss_of(model), *images(9, i), before_update=lambda model=model: decay(model))
    assert apart(weights(ours[0]), weights(expected[0])) < TOLERANCE


def test_pass_index_says_which_pass_it_is():
    _, (model, opt) = twins(convolutions, method="Bilateral SAM", parallel=2)
    seen = []

    def loss_fn(x, y):
        seen.append(opt.pass_index)
        return loss_of(model)(x, y)

    opt.train_step(loss_fn, *images(9))
    assert seen == [0, 1, 2] * 2


def test_cached_parametrizations_are_made_of_each_pass_weights():
    expected, ours = twins(MODELS["a parametrization"][0])
    for model, opt in (expected, ours):
        with nn.utils.parametrize.cached():
            opt.train_step(loss_of(model), *images(9))
    assert apart(weights(ours[0]), weights(expected[0])) < TOLERANCE


def test_what_is_unfrozen_trains_from_the_next_step_on():
    def make():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 5))
        model[1].requires_grad_(False)
        return model

    expected, ours = twins(make)
    assert_train_alike(ours, expected, [images(9)])
    for model, _ in (expected, ours):
        model[1].requires_grad_(True)
    assert_train_alike(ours, expected, [images(9, i) for i in range(3)])


def test_autocast_is_for_convolutions_too_and_not_for_doubles():
    _, (model, opt) = twins(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 5)))
    dtypes = []

    def loss_fn(x, y):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            inner = model[0](x)
            dtypes.append((inner.dtype, model[2](inner.flatten(1)).dtype))
            return F.cross_entropy(model(x).to(DOUBLE), y)

    x, y = images(9)
    opt.train_step(loss_fn, x, y)
    assert set(dtypes) == {(DOUBLE, DOUBLE)}
    dtypes.clear()
    model.float()
    opt = MicroBatchSAM(SGD(model.parameters(), 0.1), num_micro_batches=3, model=model, parallel=True)
    opt.train_step(loss_fn, x.float(), y)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}


def test_functions_that_somebody_else_has_put_into_torch_stay(monkeypatch):
    calls = []
    mine = lambda *args, **kwargs: (calls.append(1), parallel_module.SDPA(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", mine)
    expected, ours = twins(Patches)
    assert_train_alike(ours, expected, [images(9)])
    assert F.scaled_dot_product_attention is mine
    assert len(calls) == 6 + 2, "in three micro-batches, two passes each, and in two parallel passes"


# -- what cannot be ----------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.cells, self.head = kind(8, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.cells(x.squeeze(1))[0][:, -1])


class Looks(nn.Linear):
    def forward(self, x):
        out = super().forward(x.flatten(1))
        return out * 2 if out.sum().item() > 0 else out


class Counts(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x.flatten(1))


class Assigns(Counts):
    def forward(self, x):
        self.calls = self.calls + 1
        return nn.Linear.forward(self, x.flatten(1))


class Averages(Counts):
    def forward(self, x):
        self.calls.lerp_(x.mean().detach(), 0.1)
        return nn.Linear.forward(self, x.flatten(1))


class Captures(nn.Linear):
    """Uses its weight by another way than its name."""

    def __init__(self, *args):
        super().__init__(*args)
        self.also = [self.weight]

    def forward(self, x):
        return super().forward(x.flatten(1)) + self.also[0].square().sum()


def linear():
    return nn.Linear(64, 5)


def hooked(kind):
    def make():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        getattr(model[1].weight, kind)(lambda *_: None)
        return model

    return make


def backward_hooked(model):
    model.register_full_backward_hook(lambda *_: None)
    return model


def checkpointed(model):
    from torch.utils.checkpoint import checkpoint

    return lambda x, y: F.cross_entropy(checkpoint(model, x.flatten(1), use_reentrant=False), y)


REFUSED = {
    "a recurrent layer": (lambda: nn.Sequential(Recurrent()), loss_of, r"0\.cells, a GRU, cannot run"),
    "a look at a value": (lambda: nn.Sequential(Looks(64, 5)), loss_of, r"0, a Looks, cannot run .*\.item\(\)"),
    "a counter": (lambda: nn.Sequential(Counts(64, 5)), loss_of, "0, a Counts, changes its buffer calls"),
    "a buffer that is assigned": (lambda: Assigns(64, 5), loss_of, "the model, a Assigns, changes its buffer calls"),
    "a mean of its own": (lambda: nn.Sequential(Averages(64, 5)), loss_of, "0, a Averages, cannot run"),
    "a hook of a gradient": (hooked("register_hook"), loss_of, "parameter 1.weight has hooks"),
    "a hook after it": (hooked("register_post_accumulate_grad_hook"), loss_of, "parameter 1.weight has hooks"),
    "a weight by another way": (lambda: Captures(64, 5), loss_of, "parameter weight is used other than by its name"),
    "DataParallel": (
        lambda: nn.DataParallel(nn.Sequential(nn.Flatten(), linear())),
        loss_of,
        "the model, a DataParallel, must see every pass",
    ),
    "a cumulative mean": (
        *(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, momentum=None), nn.Linear(64, 5)), loss_of),
        "1, a BatchNorm1d, with momentum=None",
    ),
    "a loss per sample": (
        *(linear, lambda m: lambda x, y: F.cross_entropy(m(x.flatten(1)), y, reduction="none")),
        r"one number that depends on the parameters, got shape \(3,\)",
    ),
    "a loss without a graph": (
        linear,
        lambda m: lambda x, y: F.cross_entropy(m(x.flatten(1)).detach(), y),
        "one number that",
    ),
    "a loss that is no tensor": (linear, lambda m: lambda x, y: 1.0, "the loss cannot run .*float"),
    "checkpoints": (linear, checkpointed, "the (backward of the )?loss cannot run"),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("make", "loss", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_at_once_is_refused_by_name_before_anything_changes(make, loss, match):
    torch.manual_seed(0)
    model = make().to(DEVICE, DOUBLE)
    opt = MicroBatchSAM(SGD(model.parameters(), 0.1, momentum=0.9), num_micro_batches=3, model=model, parallel=True)
    before, tables = copy.deepcopy(model.state_dict()), [dict(m._parameters) for m in model.modules()]
    with pytest.raises(Refused, match=match) as refusal:
        opt.train_step(loss(model), *images(9))
    assert "parallel=False" in str(refusal.value)
    assert same_bits(model.state_dict().values(), before.values())
    assert all(a[k] is b[k] for a, b in zip(tables, (m._parameters for m in model.modules()), strict=True) for k in a)
    assert opt.engine.step is None
    assert not opt.state
    opt.parallel = False
    if "loss" not in match and "one number" not in match:
        opt.train_step(loss(model), *images(9))


def test_parameters_of_another_optimizer_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 5)).to(DEVICE, DOUBLE)
    opt = MicroBatchSAM(SGD(model[2].parameters(), 0.1), num_micro_batches=3, model=model, parallel=True)
    with pytest.raises(Refused, match=r"parameter 1.weight requires a gradient, .*p.requires_grad_"):
        opt.train_step(loss_of(model), *images(9))
    model[1].requires_grad_(False)
    opt.train_step(loss_of(model), *images(9))


def test_parameters_that_were_replaced_are_noticed():
    _, (model, opt) = twins(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"requires a gradient|none of the optimizer's parameters is in the model"):
        opt.train_step(loss_of(model), *images(9))


@pytest.mark.parametrize("parallel", [False, True], ids="parallel={}".format)
def test_a_step_that_the_loss_gives_up_is_given_up(parallel):
    model, opt = twins(MODELS["mlp"][0])[parallel]
    before = [p.clone() for p in model.parameters()]

    def loss_fn(x, y):
        opt.restore()
        return loss_of(model)(x, y)

    with pytest.raises(RuntimeError, match="given up by opt"):
        opt.train_step(loss_fn, *images(9))
    assert same_bits(weights(model), before)
    assert opt.steps == 0


@pytest.mark.parametrize(
    "error", [ZeroDivisionError, LookupError, KeyboardInterrupt, ValueError], ids=lambda e: e.__name__
)
@pytest.mark.parametrize("parallel", [True, "auto"], ids="parallel={}".format)
def test_what_the_loss_raises_comes_out_as_it_is(error, parallel):
    _, (model, opt) = twins(convolutions, parallel=parallel)

    def fails(x, y):
        raise error("a batch that is bad")

    for _ in range(2):  # one of them in parallel
        with pytest.raises(error, match="a batch that is bad"):
            opt.train_step(fails, *images(9))
        opt.train_step(loss_of(model), *images(9))
    assert opt.steps == 2


def test_parameters_that_stay_where_they_are_are_refused():
    model = linear().to(DEVICE, DOUBLE)
    opt = MicroBatchSAM(SGD(model.parameters(), 0.1), num_micro_batches=3, model=model, parallel=True, flatten=False)
    with pytest.raises(Refused, match="flatten=True"):
        opt.train_step(loss_of(nn.Sequential(nn.Flatten(), model)), *images(9))


ARGUMENTS = {
    "a word": ({"parallel": "always"}, ValueError, "'auto', got 'always'"),
    "zero": ({"parallel": 0}, ValueError, "parallel must be an integer >= 1, got 0"),
    "a float": ({"parallel": 2.0}, ValueError, "parallel must be an integer >= 1, got 2.0"),
    "a word for compile": ({"parallel": True, "compile": "yes"}, TypeError, "compile must be a bool, got 'yes'"),
    "nothing to compile": ({"compile": True}, ValueError, "compile=True is for parallel passes: give parallel=True"),
    "no model": ({"parallel": True, "model": None}, ValueError, "parallel=True needs the model"),
}


@pytest.mark.parametrize(("options", "error", "match"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_say_no_way_are_refused(options, error, match):
    model = linear()
    with pytest.raises(error, match=match):
        MicroBatchSAM(SGD(model.parameters(), 0.1), **{"model": model, **options})


def test_memory_that_is_short_names_a_smaller_number(monkeypatch):
    _, (model, opt) = twins(convolutions, count=4)

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parallel_module, "vmap", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="4 micro-batches ran at once: parallel=2 takes less"):
        opt.train_step(loss_of(model), *images(12))


@pytest.mark.parametrize(
    ("parallel", "fails_at"), [(True, 1), (2, 0), (2, 1)], ids=["w + e of all", "w of the last", "w + e of the last"]
)
def test_a_mean_of_gradients_moves_on_only_if_all_passes_end(parallel, fails_at):
    expected, ours = twins(convolutions, method="F-SAM", parallel=parallel)
    assert_train_alike(ours, expected, [images(10)])
    model, opt = ours
    before = [flat.memory("ema", 0.0).buffer.clone() for flat in opt.engine.store.flats]
    state, chunks = copy.deepcopy(model.state_dict()), [0]

    def fails(x, y):
        chunks[0] += opt.pass_index == 0
        if opt.pass_index == fails_at and (chunks[0] == 2 or parallel is True):
            raise ZeroDivisionError
        return loss_of(model)(x, y)

    with pytest.raises(ZeroDivisionError):
        opt.train_step(fails, *images(10, 1))
    assert same_bits([flat.memory("ema", 0.0).buffer for flat in opt.engine.store.flats], before)
    assert same_bits(model.state_dict().values(), state.values())
    assert_train_alike(ours, expected, [images(10, i) for i in range(2)])


def interrupt_at(n, where):
    """A trace that raises at the n-th line of those files; it says how many there were."""
    seen = [0]

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in where:
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == n:
                raise KeyboardInterrupt
        return trace

    return trace, seen


@pytest.mark.skipif(sys.gettrace() is not None, reason="somebody traces")
@pytest.mark.parametrize(
    ("method", "lines_tried"),
    [
        ("F-SAM", 60),
        *(pytest.param(method, None, marks=pytest.mark.exhaustive) for method in ("F-SAM", "GSAM")),
    ],
)
def test_an_interruption_at_any_line_leaves_weights_and_modules_as_they_were(method, lines_tried, monkeypatch):
    files = {parallel_module.__file__, sys.modules["msam_kernels.step"].__file__}
    method, commit = METHODS[method], ParallelPasses.commit

    def run(n):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)).to(DEVICE, DOUBLE)
        options = {"num_micro_batches": 3, "model": model, "parallel": 2, "method": method}
        opt = MicroBatchSAM(SGD(model.parameters(), 0.1), **options)
        before = [p.clone() for p in model.parameters()]
        memories = [flat.memory("ema", float("nan")).buffer for flat in opt.engine.store.flats]
        update, reached, ended = opt.engine.store.update, [], []
        opt.engine.store.update = lambda *args, **more: (reached.append(True), update(*args, **more))
        monkeypatch.setattr(ParallelPasses, "commit", lambda self: (ended.append(True), commit(self)))
        trace, seen = interrupt_at(n, files)
        sys.settrace(trace)
        try:
            opt.train_step(loss_of(model), *images(6))
        except KeyboardInterrupt:
            sys.settrace(None)
            opt.restore()
            assert reached or same_bits(weights(model), before), f"line {n}"
            assert ended or all(ema.isnan().all() for ema in memories), f"line {n}"
            assert ended or model[2].num_batches_tracked == 0, f"line {n}"
            assert all(type(p) is nn.Parameter for m in model.modules() for p in m._parameters.values())
            assert (F.scaled_dot_product_attention, F.linear) == (parallel_module.SDPA, parallel_module.LINEAR)
            assert torch.is_autocast_cache_enabled()
            opt.train_step(loss_of(model), *images(6))
            assert all(p.isfinite().all() for p in model.parameters())
        finally:
            sys.settrace(None)
        return seen[0]

    lines = run(0)
    assert lines > 300
    for n in range(1, lines, lines // lines_tried if lines_tried else 1):
        run(n)


# -- which way ---------------------------------------------------------------------------------------------------------------


def test_auto_tries_both_ways_and_takes_the_faster(monkeypatch):
    for slow in (False, True):
        expected, (model, opt) = twins(convolutions, parallel="auto")
        ran, now = [], [0.0]
        run = opt.engine.run

        def noted(*args, run=run, ran=ran, now=now, slow=slow, **kwargs):
            ran.append(len(args) > 3)
            now[0] += 2.0 if ran[-1] == slow else 1.0
            return run(*args, **kwargs)

        monkeypatch.setattr(opt.engine, "run", noted)
        monkeypatch.setattr(parallel_module.time, "perf_counter", lambda now=now: now[0])
        assert_train_alike((model, opt), expected, [images(9, i) for i in range(2 * Auto.TRIALS + 3)])
        assert ran == [False, True] * Auto.TRIALS + [not slow] * 3
        monkeypatch.undo()


def test_auto_compares_steps_of_one_kind_alone():
    _, (model, opt) = twins(convolutions, method="LookSAM k=2", parallel="auto")
    ran, run = [], opt.engine.run

    def noted(*args):
        ran.append((len(args) > 3, opt.engine.plan().perturbs))
        return run(*args)

    opt.engine.run = noted
    for i in range(4 * Auto.TRIALS - 1):
        opt.train_step(loss_of(model), *images(9, i))
        opt.train_step(loss_of(model), *images(9, i)) if i % 2 == 3 else None
    full = [way for way, perturbs in ran if perturbs]
    assert full[: 2 * Auto.TRIALS] == [False, True] * Auto.TRIALS
    assert not any(way for way, perturbs in ran[: 2 * Auto.TRIALS] if not perturbs)


def test_auto_waits_for_nothing_in_a_capture(monkeypatch):
    auto = Auto()
    monkeypatch.setattr(parallel_module, "_wait_for", None)
    with auto.timed(auto.way("a kind", True), "a kind", [DEVICE], True):
        pass


def test_auto_trains_sequentially_where_memory_is_short(monkeypatch):
    _, (model, opt) = twins(convolutions, parallel="auto")
    opt.train_step(loss_of(model), *images(9))

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parallel_module, "vmap", full)
    with pytest.warns(UserWarning, match="trains sequentially: CUDA out of memory"):
        opt.train_step(loss_of(model), *images(9))
    assert opt.steps == 2


def test_auto_says_once_what_makes_it_sequential():
    model = nn.Sequential(Recurrent()).to(DEVICE, DOUBLE)
    opt = MicroBatchSAM(SGD(model.parameters(), 0.1), num_micro_batches=3, model=model, parallel="auto")
    with pytest.warns(UserWarning, match="trains sequentially: 0.cells, a GRU, cannot run"):
        opt.train_step(loss_of(model), *images(9)), opt.train_step(loss_of(model), *images(9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.train_step(loss_of(model), *images(9))


def test_loops_and_closures_stay_sequential(monkeypatch):
    _, (model, opt) = twins(convolutions)
    monkeypatch.setattr(ParallelPasses, "run", None)
    x, y = images(9)
    for part in opt.passes(x, y):
        loss_of(model)(*part).backward()
    opt.step()
    opt.zero_grad()

    def closure():
        loss = loss_of(model)(x, y)
        loss.backward()
        return loss

    opt.step([closure] * 3)


def test_a_copy_of_the_optimizer_goes_on_in_parallel():
    expected, (model, opt) = twins(convolutions)
    assert "parallel=True" in repr(opt)
    both = copy.deepcopy((model, opt))
    assert both[1].parallel is True
    assert_train_alike(both, expected, [images(9, i) for i in range(3)])


def test_no_copy_of_the_weights_is_made_where_nothing_is_perturbed():
    _, (model, opt) = twins(convolutions, method=methods.SAM(start=2))
    opt.train_step(loss_of(model), *images(9))
    (flat,) = opt.engine.store.flats
    assert flat.copies == []
    assert flat.saved is None


@pytest.mark.parametrize(
    ("method", "held"), [("SAM", 0), ("ASAM", 0), ("GSAM", 1), ("LookSAM k=2", 1), ("Bilateral SAM", 2)]
)
@pytest.mark.parametrize("most", [True, 2], ids="parallel={}".format)
def test_beside_a_pass_is_no_gradient_of_another_that_its_method_does_not_hold(method, held, most, monkeypatch):
    _, (model, opt) = twins(convolutions, method=method, count=6, parallel=most)
    run, passes, beside = ParallelPasses.run, [], []

    def watched(self, which, copies):
        beside.append(sum(not all(stack.expired() for stack in stacks) for stacks in passes))
        losses, vectors = run(self, which, copies)
        passes.append([StorageWeakRef(t.untyped_storage()) for tensors in vectors.lists for t in tensors if t.numel()])
        return losses, vectors

    monkeypatch.setattr(ParallelPasses, "run", watched)
    opt.train_step(loss_of(model), *images(12))
    per_turn = 3 if method == "Bilateral SAM" else 2
    assert len(beside) == per_turn * (1 if most is True else 3)
    assert beside == [min(i % per_turn, held) for i in range(len(beside))]


@pytest.mark.parametrize("method", ["SAM", "GSAM", "Momentum-SAM"])
def test_parameters_that_move_between_the_passes_are_refused_and_trained_by_the_next_step(method):
    expected, (model, opt) = twins(MODELS["mlp"][0], method=method)
    assert_train_alike((model, opt), expected, [images(9)])
    p, before = model[1].weight, [p.clone() for p in model.parameters()]
    elsewhere = p.detach().clone()

    def moves(x, y):
        p.data = elsewhere
        return loss_of(model)(x, y)

    with pytest.raises(Refused, match="gave parameters other memory, or unfroze some, between passes of one step"):
        opt.train_step(moves, *images(9))
    assert same_bits(weights(model), before)
    assert opt.steps == 1
    assert_train_alike((model, opt), expected, [images(9, i) for i in range(3)])


@pytest.mark.parametrize("fails_at", [0, 1], ids="pass {}".format)
def test_a_perturbation_that_all_passes_share_is_taken_off_where_one_fails(fails_at):
    """That of Momentum-SAM, which is in the weights themselves."""
    expected, (model, opt) = twins(MODELS["mlp"][0], method="Momentum-SAM", count=4, parallel=2)
    assert_train_alike((model, opt), expected, [images(8)])
    before, runs = [p.clone() for p in model.parameters()], []

    def fails(x, y):
        runs.append(not same_bits(list(opt.engine.store.parameters()), before))
        if len(runs) == 1 + fails_at:
            raise ZeroDivisionError
        return loss_of(model)(x, y)

    with pytest.raises(ZeroDivisionError):
        opt.train_step(fails, *images(8))
    assert runs == [True] * (1 + fails_at), "perturbed"
    assert same_bits(weights(model), before)
    assert_train_alike((model, opt), expected, [images(8, i) for i in range(2)])


# -- compiled ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that Dynamo made; what would compile them runs them as they are, traced for autograd all the same."""
    if not COMPILES:
        pytest.skip(NO_COMPILER)
    torch.compiler.reset()
    found = []

    def run_as_traced(graph, inputs):
        found.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(_torch, "inductor", run_as_traced)
    yield found
    torch.compiler.reset()


COMPILED = [
    pytest.param(name, method, marks=() if (name, method) in FAST else pytest.mark.exhaustive, id=f"{name}, {method}")
    for FAST in [{("cnn with BatchNorm", "SAM"), ("transformer", "GSAM")}]
    for name in MODELS
    for method in ("SAM", "GSAM", "F-SAM")
]


@pytest.mark.host
@pytest.mark.parametrize(("name", "method"), COMPILED)
def test_compiled_passes_are_those_of_the_sequential_ones(name, method, graphs):
    make, data = MODELS[name]
    expected, ours = twins(make, method=method, compile=True)
    assert_train_alike(ours, expected, [data(12, i) for i in range(4)])
    assert len(graphs) == 2, "weights that are the same for all micro-batches, and those that are not"


@pytest.mark.host
@pytest.mark.exhaustive
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, as it imports its compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.skipif(not COMPILES, reason=NO_COMPILER)
@pytest.mark.parametrize("name", MODELS)
def test_what_the_compiler_makes_of_them_is_that_too(name):
    torch.compiler.reset()
    make, data = MODELS[name]
    before = counters["inductor"].total(), counters["stats"]["unique_graphs"]
    expected, ours = twins(make, compile=True)
    assert_train_alike(ours, expected, [data(12, i) for i in range(3)])
    assert counters["stats"]["unique_graphs"] - before[1] == 2
    assert counters["inductor"].total() > before[0]


@pytest.mark.exhaustive
@pytest.mark.host
def test_every_shape_is_compiled_once_and_fresh_functions_are_no_others(graphs):
    expected, ours = twins(MODELS["mlp"][0], compile=True, parallel=2)
    assert_train_alike(ours, expected, [images(n, n) for n in (9, 10, 9, 10, 9)])
    assert len(graphs) == 6, "two of three samples, one of three and one of four, each in both passes"


@pytest.mark.host
@pytest.mark.exhaustive
@torch._dynamo.config.patch(recompile_limit=1)
def test_more_shapes_and_optimizers_than_dynamo_compiles_of_one_code_stay_compiled(graphs):
    expected, ours = twins(MODELS["mlp"][0], compile=True)
    assert_train_alike(ours, expected, [images(3 * n, n) for n in range(1, 4)])
    assert len(graphs) == 6
    for _ in range(2):
        expected, ours = twins(MODELS["mlp"][0], compile=True)
        assert_train_alike(ours, expected, [images(9)])
        assert ours[1]._compiled.works
    assert len(graphs) == 10


@pytest.mark.exhaustive
@pytest.mark.host
def test_a_limit_is_told_once_with_its_remedy_and_stops_no_other_pass(graphs, monkeypatch):
    monkeypatch.setattr(compiled_module, "MOST", 4)
    expected, ours = twins(MODELS["mlp"][0], compile=True)
    assert_train_alike(ours, expected, [images(3), images(6)])
    with pytest.warns(
        UserWarning, match="as 4 kinds of passes have been compiled: pad batches to fewer shapes"
    ) as told:
        assert_train_alike(ours, expected, [images(9), images(12)])
    assert len(told) == 1
    assert_train_alike(ours, expected, [images(9), images(3)])
    assert len(graphs) == 4
    torch.compiler.reset()
    assert_train_alike(ours, expected, [images(3)])
    assert len(graphs) == 6, "what was compiled before still is"


@pytest.mark.host
@pytest.mark.exhaustive
@torch._dynamo.config.patch(recompile_limit=2)
def test_losses_that_are_new_again_and_again_meet_dynamos_limit_by_their_shape_alone(graphs):
    _, (model, opt) = twins(MODELS["mlp"][0], compile=True)
    losses = [lambda x, y, i=i: (1 + i) * F.cross_entropy(model(x), y) for i in range(4)]
    for loss in losses[:2]:
        opt.train_step(loss, *images(9))
    with pytest.warns(UserWarning, match=r"torch\._dynamo\.config\.recompile_limit allows") as told:
        opt.train_step(losses[2], *images(9))
    assert len(told) == 1
    opt.train_step(losses[3], *images(9))
    before = len(graphs)
    opt.train_step(loss_of(model), *images(6))
    assert len(graphs) == before + 2


@pytest.mark.host
def test_what_the_compiler_cannot_do_runs_as_it_is_written_and_says_so_once(graphs):
    class Prints(nn.Linear):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x.flatten(1))

    expected, ours = twins(lambda: nn.Sequential(Prints(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)), compile=True)
    with pytest.warns(
        UserWarning, match="compile=True: the parallel passes run as they are written, as .*[Gg]raph.break"
    ):
        assert_train_alike(ours, expected, [images(9)])
    assert_train_alike(ours, expected, [images(9, i) for i in range(2)])
    assert not graphs


@pytest.mark.host
def test_what_a_compiled_loss_raises_comes_out_and_the_next_step_is_compiled(graphs):
    expected, ours = twins(MODELS["mlp"][0], compile=True)

    def fails(x, y):
        raise ZeroDivisionError("a batch that is bad")

    with pytest.raises(ZeroDivisionError, match="a batch that is bad"):
        ours[1].train_step(fails, *images(9))
    assert_train_alike(ours, expected, [images(9)])
    assert len(graphs) == 2


@pytest.mark.host
def test_compiled_dropout_draws_for_every_micro_batch_and_pass(graphs):
    _, (model, opt) = twins(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5)), compile=True)
    x, y = images(1)
    opt.train_step(loss_of(model), x.expand(3, 1, 8, 8), y.expand(3))
    assert len(set(opt.stats.grad_norm.tolist())) == 3
    assert graphs


@pytest.mark.exhaustive
@pytest.mark.host
def test_a_compiled_model_evaluates_and_trains_again(graphs):
    expected, ours = twins(convolutions, compile=True)
    for train in (True, False, True):
        for model, _ in (expected, ours):
            model.train(train)
        assert_train_alike(ours, expected, [images(9)])
    assert len(graphs) == 4


@pytest.mark.host
def test_what_vmap_lacks_is_supplied_in_a_compiled_graph_too(graphs):
    expected, ours = twins(lambda: Padded(padding_idx=3), compile=True)
    assert_train_alike(ours, expected, [text(12, i) for i in range(2)])
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert {parallel_module._linear, parallel_module._embedding} <= set(targets)
    assert not set(targets) & set(parallel_module.SUPPLIED)


@pytest.mark.host
def test_a_compiled_function_that_fails_halfway_has_moved_nothing(monkeypatch):
    expected, ours = twins(convolutions, compile=True)

    def fails_halfway(self, function, stacked, single, columns, spec):
        for t in (*[t for t in stacked.values() if not t.requires_grad], *single.values()):
            t.add_(1)
        raise RuntimeError("no more")

    monkeypatch.setattr(Compiled, "losses", fails_halfway)
    with pytest.warns(UserWarning, match="the parallel passes run as they are written, as no more"):
        assert_train_alike(ours, expected, [images(9)])


@pytest.mark.host
def test_statistics_that_nothing_counts_are_not_compiled(graphs):
    make = lambda: nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten(), nn.Linear(64, 5))  # noqa: E731
    expected, ours = twins(make, compile=True)
    with pytest.warns(UserWarning, match="as nothing counts how often an InstanceNorm moves"):
        assert_train_alike(ours, expected, [images(9)])
    assert not graphs


@pytest.mark.host
def test_a_copy_of_the_optimizer_compiles_too(graphs):
    expected, (model, opt) = twins(MODELS["mlp"][0], compile=True)
    assert "parallel=True, compile=True" in repr(opt)
    model, opt = copy.deepcopy((model, opt))
    assert opt.compile is True
    assert_train_alike((model, opt), expected, [images(9)])
    assert len(graphs) == 2


@pytest.mark.host
def test_a_loss_that_calls_a_compiled_model_is_told_to_call_the_model(graphs):
    expected, (model, opt) = twins(MODELS["mlp"][0], compile=True)
    compiled, batch = torch.compile(model, backend="eager"), images(9)
    with pytest.warns(UserWarning, match=r"the loss calls a model out of torch\.compile: let it call the model itself"):
        opt.train_step(loss_of(compiled), *batch)
    expected[1].train_step(loss_of(expected[0]), *batch)
    assert apart(weights(model), weights(expected[0])) < TOLERANCE
