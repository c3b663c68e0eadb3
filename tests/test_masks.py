# SPDX-License-Identifier: Apache-2.0
"""Masks of Sparse SAM: how they are chosen, what they do to a step, when they change, and that they are kept."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msam_kernels import MicroBatchSAM, masks, methods
from msam_kernels.flat import Flat
from plain import (
    DEVICE,
    WAYS,
    Zoo,
    batch,
    gradients,
    images,
    loss_of,
    mlp,
    random_numbers,
    remembered,
    same_bits,
    through_a_file,
    weights,
    without_ours,
)

NAN, INF = math.nan, math.inf
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
each_way = pytest.mark.parametrize("way", WAYS)

# ---- bits ------------------------------------------------------------------------------------------------------------


@given(bits=st.lists(st.booleans(), max_size=99))
def test_packed_bits_come_back(bits):
    bits += [False] * (-len(bits) % 8)
    bools = torch.tensor(bits, dtype=torch.bool)
    packed = masks.pack(bools)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [sum(b << k for k, b in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8)]
    assert torch.equal(masks.unpack(packed), bools)


# ---- the choice ------------------------------------------------------------------------------------------------------


def sparse(sparsity=0.5, mask="fisher", **options):
    options = {"total_steps": 100} | options if mask == "dynamic" else options
    return methods.SparseSAM(sparsity=sparsity, mask=mask, **options)


def flats_of(params):
    """As the optimizer groups them: one for each dtype."""
    by_dtype = {}
    for p in params:
        by_dtype.setdefault(p.dtype, []).append(p)
    return [Flat(ps, [0] * len(ps), flatten=True, backend=None) for ps in by_dtype.values()]


def in_memory(t):
    return t.detach().as_strided((t.numel(),), (1,))


def bits_of(flats):
    """Of all parameters, one after the other, in the order of memory."""
    return torch.cat([in_memory(flat.mask_of(i)) for flat in flats for i in range(len(flat.params))])


def importance(flats, scores):
    """The scores in the same order, as they count: an absent one as zeros, NaN too."""
    parts = [
        torch.zeros(p.numel(), dtype=F64) if not s.numel() else in_memory(s).double().abs()
        for flat, tensors in zip(flats, scores, strict=True)
        for p, s in zip(flat.params, tensors, strict=True)
    ]
    return torch.cat(parts).nan_to_num(nan=0.0, posinf=INF)


def largest(values, count):
    """Bools: of equal values the first."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def random_scores(flats, seed=0, levels=None, special=()):
    """For every parameter one in its memory order; few ``levels`` make ties."""
    generator = random_numbers(seed)
    scores = []
    for flat in flats:
        scores.append([])
        for p in flat.params:
            s = torch.empty_like(p).detach()
            values = torch.randn(p.numel(), generator=generator, dtype=F64)
            if levels:
                values = (values * levels).round() / levels
            for value in special:
                values[torch.rand(p.numel(), generator=generator) < 0.1] = value
            in_memory(s).copy_(values)
            scores[-1].append(s)
    return scores


def padding_is_clear(flats):
    """Bits of the gaps between parameters are never set."""
    return all(
        int(masks.unpack(flat.mask).sum()) == sum(int(flat.mask_of(i).sum()) for i in range(len(flat.params)))
        for flat in flats
    )


PARAMETERS = {
    "fp64": [(F64, (3, 5)), (F64, (2, 2, 2, 2)), (F64, (7,))],
    "fp32": [(F32, (37,)), (F32, (1,)), (F32, (4, 33))],
    "bf16": [(BF16, (129,)), (BF16, (3, 3))],
    "fp64 and fp32": [(F64, (70,)), (F32, (5, 7)), (F64, (3,)), (F32, (200,))],
    "fp32 and bf16, 0-d and empty": [(F32, ()), (BF16, (0, 3)), (F32, (0,)), (BF16, (130,)), (F32, (63,)), (BF16, ())],
    "one element": [(F32, ())],
    "nothing": [(F32, (0,))],
}


def parameters(name):
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for dtype, shape in PARAMETERS[name]]
    for p in params:
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return params


SCORES = {
    "distinct": {},
    "with ties": {"levels": 2},
    "with zeros, NaN and inf": {"special": (0.0, -0.0, NAN, INF, -INF)},
    "subnormal": {"special": (1e-310, 1e-44, -1e-40)},
    "all zero": {"levels": 1e-9},
}


@pytest.mark.parametrize("sparsity", [0, 0.25, 0.5, 0.999, 1])
@pytest.mark.parametrize("values", SCORES)
@pytest.mark.parametrize("name", PARAMETERS)
def test_the_largest_scores_of_all_are_chosen(name, values, sparsity, monkeypatch):
    monkeypatch.setattr(masks, "SLICE", 128)
    flats = flats_of(parameters(name))
    scores = random_scores(flats, **SCORES[values])
    masks.choose(flats, scores, sparse(sparsity), 0)
    expected = importance(flats, scores)
    count = round((1 - sparsity) * len(expected))
    assert int(bits_of(flats).sum()) == count
    assert torch.equal(bits_of(flats), largest(expected, count))
    assert padding_is_clear(flats)


@settings(max_examples=60)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from([F64, F32, BF16]), st.integers(0, 150), st.booleans()), min_size=1, max_size=6
    ),
    sparsity=st.floats(0, 1),
    step=st.sampled_from([8, 64, 128, 1 << 20]),
    levels=st.sampled_from([1, 8, None]),
    seed=st.integers(0, 2**31),
)
def test_slices_sizes_and_absent_gradients_make_no_difference(sizes, sparsity, step, levels, seed):
    flats = flats_of([nn.Parameter(torch.ones(n, dtype=dtype)) for dtype, n, _ in sizes])
    absent = iter([gone for dtype in {d: 0 for d, *_ in sizes} for d, _, gone in sizes if d == dtype])
    scores = [
        [torch.empty(0, dtype=s.dtype) if next(absent) else s for s in tensors]
        for tensors in random_scores(flats, seed, levels, special=(NAN, INF))
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(masks, "SLICE", step)
        masks.choose(flats, scores, sparse(sparsity), 0)
    expected = importance(flats, scores)
    assert torch.equal(bits_of(flats), largest(expected, round((1 - sparsity) * len(expected))))
    assert padding_is_clear(flats)


def test_fisher_looks_at_the_latest_scores_only():
    flats = flats_of(parameters("fp64 and fp32"))
    masks.choose(flats, random_scores(flats, seed=1), sparse(0.6), 0)
    scores = random_scores(flats, seed=2)
    masks.choose(flats, scores, sparse(0.6), 1)
    expected = importance(flats, scores)
    assert torch.equal(bits_of(flats), largest(expected, round(0.4 * len(expected))))


def test_scores_add_up_as_squares_where_there_are_gradients():
    first = [torch.tensor([3.0, -1.0]), torch.empty(0), torch.tensor([2.0]), torch.empty(0)]
    second = [torch.tensor([-4.0, 0.0]), torch.tensor([5.0]), torch.empty(0), torch.empty(0)]
    total = masks.add_up(masks.add_up(None, first), second)
    assert [t.tolist() for t in total] == [[5.0, 1.0], [5.0], [2.0], []]
    # 300² is more than fp16 holds, 1e-4² less.
    half = torch.tensor([300.0, 1e-4], dtype=torch.float16)
    (total,) = masks.add_up([half.clone()], [half])
    torch.testing.assert_close(total, half * math.sqrt(2), rtol=1e-2, atol=1e-7)


# ---- drop and regrow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 30, 99, 100, 250])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("name", ["fp64", "fp64 and fp32", "fp32 and bf16, 0-d and empty"])
def test_of_a_dynamic_mask_the_smallest_gradients_make_way(name, sparsity, step, monkeypatch):
    monkeypatch.setattr(masks, "SLICE", 64)
    method = sparse(sparsity, "dynamic", drop_rate=0.6)
    flats = flats_of(parameters(name))
    masks.choose(flats, random_scores(flats), method, 0)
    before = bits_of(flats)
    whole = len(before)
    count = round((1 - sparsity) * whole)
    assert int(before.sum()) == count
    scores = random_scores(flats, seed=step)
    masks.choose(flats, scores, method, step)
    after = bits_of(flats)
    assert int(after.sum()) == count
    assert padding_is_clear(flats)
    dropped = min(round(method.share_dropped(step) * count), whole - count)
    values = importance(flats, scores)
    assert torch.equal(before & ~after, before & ~(largest(torch.where(before, values, -1.0), count - dropped)))
    assert int((before & ~after).sum()) == int((after & ~before).sum()) == dropped


def test_the_share_that_is_dropped_follows_a_cosine():
    method = sparse(mask="dynamic", drop_rate=0.4, total_steps=80)
    assert method.share_dropped(0) == 0.4
    assert method.share_dropped(20) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert method.share_dropped(40) == pytest.approx(0.2)
    assert [method.share_dropped(step) for step in (80, 81, 10**9)] == [0.0] * 3
    shares = [method.share_dropped(step) for step in range(81)]
    assert shares == sorted(shares, reverse=True)


def dynamic_bits(seed=0, steps=(0, 5)):
    flats = flats_of(parameters("fp64 and fp32"))
    for step in steps:
        masks.choose(flats, random_scores(flats), sparse(0.5, "dynamic", seed=seed), step)
    return bits_of(flats)


def test_chance_depends_on_seed_and_step_alone():
    torch.manual_seed(1)
    expected, state = dynamic_bits(), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(dynamic_bits(), expected)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is the user's"
    assert not torch.equal(dynamic_bits(seed=1), expected)
    assert not torch.equal(dynamic_bits(steps=(0, 6)), expected)
    assert not torch.equal(dynamic_bits(steps=(1, 5)), expected)


def test_a_random_mask_reaches_everywhere(monkeypatch):
    monkeypatch.setattr(masks, "SLICE", 1 << 12)
    flats = flats_of([nn.Parameter(torch.zeros(50_000)), nn.Parameter(torch.zeros(50_000, dtype=F64))])
    masks.choose(flats, [[torch.empty(0)], [torch.empty(0)]], sparse(0.75, "dynamic"), 0)
    shares = torch.stack([part.double().mean() for part in bits_of(flats).split(10_000)])
    assert int(bits_of(flats).sum()) == 25_000
    assert ((shares - 0.25).abs() < 0.03).all()  # seven standard deviations
    first, second = (bits_of([flat])[: 1 << 12] for flat in flats)
    assert not torch.equal(first, second), "flats and slices have random numbers of their own"
    assert not torch.equal(first, bits_of(flats)[1 << 12 : 1 << 13])


class Largest(TorchDispatchMode):
    """The largest storage that an operator made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in there:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_a_choice_makes_nothing_of_the_size_of_the_model(mask, monkeypatch):
    monkeypatch.setattr(masks, "SLICE", 1 << 16)
    flats = flats_of([nn.Parameter(torch.zeros(3, 500_000)), nn.Parameter(torch.zeros(500_001))])
    scores = random_scores(flats)
    for step in range(2):
        with Largest() as largest_made:
            masks.choose(flats, scores, sparse(0.9, mask), step)
        # A slice of keys, or the counts of a digit, are as many int64; the mask itself is a bit per element.
        assert 1 << 16 < largest_made.bytes <= 8 << 16
        assert int(bits_of(flats).sum()) == round(0.1 * 2_000_001)


# ---- what a mask does to a step --------------------------------------------------------------------------------------


def train(model, data, method, masks_=None, steps=4, base=None, way="train_step", **options):
    """The optimizer after some steps; ``data``: a function of the seed."""
    opt = MicroBatchSAM(
        (base or (lambda ps: SGD(ps, lr=0.1, momentum=0.9)))(model.parameters()), 0.3, method=method, **options
    )
    if masks_ is not None:
        opt.mask = masks_(opt)
    for seed in range(steps):
        WAYS[way](opt, model, data(seed))
    return opt


def filled(value):
    return lambda opt: [torch.full(p.shape, value) for group in opt.param_groups for p in group["params"]]


def of_seed(dtype):
    return lambda seed: images(6, dtype, seed)


# what makes the mask, and the rho of the SAM that is the same
FULL_AND_EMPTY = {
    "all set": (methods.SparseSAM(update_every=None), filled(True), 0.3),
    "none set": (methods.SparseSAM(update_every=None), filled(False), 0.0),
    "sparsity 0": (methods.SparseSAM(sparsity=0, update_every=2), None, 0.3),
    "sparsity 1": (methods.SparseSAM(sparsity=1.0, update_every=2), None, 0.0),
    "dynamic, sparsity 0": (methods.SparseSAM(sparsity=0, mask="dynamic", update_every=1, total_steps=9), None, 0.3),
}


@each_way
@pytest.mark.parametrize("dtype", [F64, BF16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("case", FULL_AND_EMPTY)
def test_a_full_mask_is_sam_and_an_empty_one_the_base_bit_for_bit(case, dtype, way, backend):
    method, masks_, rho = FULL_AND_EMPTY[case]
    model, other = Zoo(dtype, gaps=False), Zoo(dtype, gaps=False)
    options = {"num_micro_batches": 2, "way": way, "backend": backend}
    train(model, of_seed(dtype), method, masks_, **options)
    opt = MicroBatchSAM(SGD(other.parameters(), lr=0.1, momentum=0.9), rho, num_micro_batches=2, backend=backend)
    for seed in range(4):
        WAYS[way](opt, other, images(6, dtype, seed))
    assert same_bits(model.parameters(), other.parameters())


def test_only_what_the_mask_names_is_perturbed_and_the_norm_is_that_of_all(backend):
    model = mlp(F64)
    opt = MicroBatchSAM(
        SGD(model.parameters(), lr=0.1), 0.3, method=methods.SparseSAM(sparsity=0.6, update_every=2), backend=backend
    )
    for seed in range(5):
        before, at_w = weights(model), None
        for turn, part in enumerate(opt.passes(*batch(7, F64, seed))):
            loss_of(model, *part).backward()
            if turn == 0:
                at_w = gradients(model)
            else:
                total = 0.0
                norm = torch.cat([g.view(-1) for g in at_w]).norm()
                for p, old, g, m in zip(model.parameters(), before, at_w, opt.mask, strict=True):
                    assert same_bits([p[~m]], [old[~m]])
                    torch.testing.assert_close(p[m] - old[m], 0.3 * g[m] / norm, rtol=1e-9, atol=1e-12)
                    total += g[m].square().sum()
        torch.testing.assert_close(opt.stats.perturbation_norm[0], 0.3 * total.sqrt() / norm, rtol=1e-9, atol=0)
        torch.testing.assert_close(opt.stats.grad_norm[0], norm, rtol=1e-12, atol=0)
        assert same_bits(model.parameters(), before)
        opt.step()
        opt.zero_grad()


# ---- opt.mask --------------------------------------------------------------------------------------------------------


def random_bits(opt, seed=0):
    """None of parameters that are frozen: they have no mask."""
    generator = random_numbers(seed)
    params = [p for group in opt.param_groups for p in group["params"]]
    return [(torch.rand(p.shape, generator=generator) < 0.5) & p.requires_grad for p in params]


def of_the_trained(opt, bits):
    params = [p for group in opt.param_groups for p in group["params"]]
    return [m for p, m in zip(params, bits, strict=True) if p.requires_grad]


def equal(actual, expected):
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


def zoo_optimizer(model=None, method=None, **options):
    model = model or Zoo(gaps=options.get("flatten", True))
    method = method or methods.SparseSAM(sparsity=0.6, update_every=None)
    return model, MicroBatchSAM(SGD(model.groups(), lr=0.1, momentum=0.9), 0.3, method=method, **options)


@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "unflattened"])
def test_a_mask_comes_back_as_it_was_assigned(flatten, backend):
    model, opt = zoo_optimizer(flatten=flatten, backend=backend)
    assert opt.mask is None
    bits = random_bits(opt)
    opt.mask = bits
    assert equal(opt.mask, bits)
    assert [m.shape for m in opt.mask] == [p.shape for g in opt.param_groups for p in g["params"]]
    opt.mask = [m.clone(memory_format=torch.contiguous_format) for m in bits]
    assert equal(opt.mask, bits)
    shown = opt.mask
    shown[0].zero_()
    assert equal(opt.mask, bits), "what is shown is a copy"
    WAYS["train_step"](opt, model, images())
    assert equal(opt.mask, bits)


def test_a_parameter_in_another_memory_order_keeps_its_mask(backend):
    """Asked at once, after a step, and in a state dict."""
    model, opt = zoo_optimizer(Zoo(), backend=backend)
    _, stays = zoo_optimizer(same := Zoo(), backend=backend)
    bits = random_bits(opt)
    opt.mask = bits
    stays.mask = bits
    for order in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        model.channels_last.data = model.channels_last.data.contiguous(memory_format=order)
        assert equal(opt.mask, bits)
        assert equal(list(remembered(opt, "mask").values()), of_the_trained(opt, bits))
        WAYS["train_step"](opt, model, images())
        WAYS["train_step"](stays, same, images())
        assert equal(opt.mask, bits)
        for p, q in zip(model.parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# what is assigned, made from the right list
WRONG_MASKS = {
    "too few": lambda bits: bits[:-1],
    "another shape": lambda bits: [bits[0].view(-1), *bits[1:]],
    "numbers": lambda bits: [m.float() for m in bits],
    "no tensors": lambda bits: [m.tolist() for m in bits],
    "nothing": lambda bits: [],
}


@pytest.mark.parametrize("case", WRONG_MASKS)
def test_a_wrong_mask_is_refused_and_the_old_one_kept(case):
    _, opt = zoo_optimizer()
    opt.mask = bits = random_bits(opt)
    with pytest.raises(
        ValueError, match=r"mask must be a list of torch\.bool tensors, one for each parameter, of shapes"
    ):
        opt.mask = WRONG_MASKS[case](random_bits(opt, seed=1))
    assert equal(opt.mask, bits)


def test_a_mask_is_refused_where_the_method_has_none_or_a_loop_is_under_way():
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1))
    assert opt.mask is None
    with pytest.raises(
        RuntimeError, match=r"a mask is for methods with a mask, e\.g\. methods\.SparseSAM\(\), got SAM"
    ):
        opt.mask = random_bits(opt)
    with pytest.raises(RuntimeError, match=r"update_mask\(\) is for methods with a mask"):
        opt.update_mask(lambda x, y: loss_of(model, x, y), *batch())
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=methods.SparseSAM())
    for turn, part in enumerate(opt.passes(*batch())):
        what = "while the weights are perturbed" if turn else r"inside a passes\(\) loop"
        with pytest.raises(RuntimeError, match="a new mask " + what):
            opt.mask = random_bits(opt)
        with pytest.raises(RuntimeError, match=r"update_mask\(\) " + what):
            opt.update_mask(lambda x, y: loss_of(model, x, y), *batch())
        loss_of(model, *part).backward()


@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_a_group_that_comes_later_gets_a_mask_too(on, backend):
    model = mlp(F64)
    extra = nn.Parameter(torch.ones(2, dtype=F64))
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.3, method=sparse(0.5), backend=backend)

    def loss(x, y):
        return loss_of(model, x, y * extra)

    opt.train_step(loss, *batch(dtype=F64))
    assert len(opt.mask) == 4
    (opt if on == "wrapper" else opt.base_optimizer).add_param_group({"params": [extra]})
    assert opt.mask is None
    bits = [torch.ones(p.shape, dtype=torch.bool) for p in (*model.parameters(), extra)]
    twin = copy.deepcopy(opt)
    twin.mask = bits
    assert equal(twin.mask, bits)
    opt.train_step(loss, *batch(dtype=F64))
    assert [m.shape for m in opt.mask] == [p.shape for p in (*model.parameters(), extra)]
    assert sum(int(m.sum()) for m in opt.mask) == round(0.5 * (32 + 2))
    another = nn.Parameter(torch.ones(2, dtype=F64))
    (opt if on == "wrapper" else opt.base_optimizer).add_param_group({"params": [another]})
    opt.mask = [*bits, torch.ones(2, dtype=torch.bool)]
    assert all(m.all() for m in opt.mask)


# ---- opt.update_mask -------------------------------------------------------------------------------------------------


def by_hand(params, loss, samples, sparsity):
    """The largest sums of squared gradients of single samples."""
    total = [torch.zeros_like(p) for p in params]
    for one in zip(*(t.split(1) for t in samples), strict=True):
        grads = torch.autograd.grad(loss(*one), params, allow_unused=True)
        total = [t if g is None else t + g.square() for t, g in zip(total, grads, strict=True)]
    flat = torch.cat([in_memory(t) for t in total])
    bits = largest(flat, round((1 - sparsity) * len(flat))).split([p.numel() for p in params])
    return [m.as_strided(p.size(), p.stride()) for m, p in zip(bits, params, strict=True)]


@pytest.mark.parametrize("samples", [1, 7])
def test_update_mask_takes_the_fisher_information_of_single_samples(samples, backend):
    model = mlp(F64)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=sparse(0.6, update_every=None), backend=backend)

    def loss(x, y):
        assert len(x) == len(y) == 1
        return loss_of(model, x, y)

    opt.update_mask(loss, *batch(samples, F64))
    assert equal(opt.mask, by_hand(list(model.parameters()), loss, batch(samples, F64), 0.6))


def test_update_mask_knows_awkward_parameters(backend):
    model = Zoo()
    used = [p for p in model.parameters() if p.requires_grad]  # "unused" among them gets no gradient
    opt = MicroBatchSAM(SGD(used, lr=0.1), method=sparse(0.6, update_every=None), backend=backend)
    opt.update_mask(lambda x, y: loss_of(model, x, y), *images())
    assert equal(opt.mask, by_hand(used, lambda x, y: loss_of(model, x, y), images(), 0.6))


def test_update_mask_leaves_everything_else(backend):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 4)).double()
    opt = MicroBatchSAM(SGD(net.parameters(), lr=0.1), method=sparse(0.6), model=net, backend=backend)
    loss_of(net, *images()).backward()
    state = copy.deepcopy(net.state_dict())
    grads, random_state, base = (
        gradients(net),
        torch.get_rng_state(),
        copy.deepcopy(without_ours(opt.base_optimizer.state_dict())),
    )
    opt.update_mask(lambda x, y: loss_of(net, x, y), *images(5, seed=3))
    assert same_bits(net.state_dict().values(), state.values()), "weights and running statistics"
    assert same_bits(gradients(net), grads)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert without_ours(opt.base_optimizer.state_dict()) == base
    assert opt.steps == 0
    assert opt.engine.step is None
    loss_of(net, *images()).backward()
    assert int(net[1].num_batches_tracked) == 2, "the statistics are recorded again"


class _ShotError(Exception):
    pass


# what goes wrong with the third sample: how the loss is changed, and what is raised
FAILURES = {
    "an exception": (None, _ShotError),
    "NaN": (NAN, ValueError),
    "inf": (INF, ValueError),
}


@pytest.mark.parametrize("had_one", [True, False], ids=["with a mask before", "without"])
@pytest.mark.parametrize("case", FAILURES)
def test_update_mask_that_fails_changes_nothing(case, had_one, backend):
    factor, error = FAILURES[case]
    model = mlp(F64)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=sparse(0.6), backend=backend)
    if had_one:
        opt.mask = random_bits(opt)
    loss_of(model, *batch(dtype=F64)).backward()
    old, before, grads = opt.mask, weights(model), gradients(model)
    calls = 0

    def loss(x, y):
        nonlocal calls
        calls += 1
        if calls < 3:
            return loss_of(model, x, y)
        if factor is None:
            raise _ShotError
        return loss_of(model, x, y) * factor

    with pytest.raises(error, match=None if factor is None else "a gradient of the samples is not finite"):
        opt.update_mask(loss, *batch(5, F64))
    assert opt.mask is None if old is None else equal(opt.mask, old)
    assert same_bits(model.parameters(), before)
    assert same_bits(gradients(model), grads)
    assert opt.engine.step is None
    opt.train_step(lambda x, y: loss_of(model, x, y), *batch(5, F64))


@pytest.mark.parametrize(
    "samples", [(), (torch.zeros(0, 3), torch.zeros(0, 2))], ids=["no arguments", "none in the arguments"]
)
def test_update_mask_needs_samples(samples):
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=sparse())
    with pytest.raises(ValueError, match="samples"):
        opt.update_mask(lambda x, y: loss_of(model, x, y), *samples)
    assert opt.mask is None


@each_way
def test_without_a_mask_and_a_way_to_choose_one_a_step_is_refused(way, backend):
    model, data = mlp(F64), batch(6, F64)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=sparse(update_every=None), backend=backend)
    before = weights(model)
    remedies = r"call opt\.update_mask\(loss_fn, \*samples\), assign opt\.mask, or give update_every"
    with pytest.raises(RuntimeError, match="has no mask yet: " + remedies):
        WAYS[way](opt, model, data)
    assert same_bits(model.parameters(), before)
    assert gradients(model) == [None] * 4
    assert opt.steps == 0
    opt.enabled = False  # needs none then
    WAYS[way](opt, model, data)
    opt.enabled = True
    opt.update_mask(lambda x, y: loss_of(model, x, y), *data)
    WAYS[way](opt, model, data)
    assert opt.steps == 2


# ---- when masks change -----------------------------------------------------------------------------------------------


def masks_of_steps(opt, model, steps, seed=0):
    """The mask that each step was perturbed by."""
    seen = []

    def loss(x, y):
        if len(seen) < opt.steps + 1 and opt.engine.step.perturbed:
            seen.append(opt.mask)
        return loss_of(model, x, y)

    for step in range(steps):
        opt.train_step(loss, *batch(6, F64, seed + step))
    return seen


def changes(seen):
    return [step for step in range(1, len(seen)) if not equal(seen[step - 1], seen[step])]


def mlp_optimizer(method, backend="auto", count=2, rho=0.3):
    model = mlp(F64)
    return model, MicroBatchSAM(
        AdamW(model.parameters(), lr=0.05), rho, method=method, num_micro_batches=count, backend=backend
    )


# method, the steps at which it takes another mask
COURSES = {
    "every step": (sparse(0.5, update_every=1), list(range(1, 9))),
    "every third": (sparse(0.5, update_every=3), [3, 6]),
    "once": (sparse(0.5, update_every=100), []),
    "dynamic": (sparse(0.5, "dynamic", update_every=2), [2, 4, 6, 8]),
    "dynamic, over soon": (sparse(0.5, "dynamic", update_every=2, total_steps=5), [2, 4]),
}


@pytest.mark.parametrize("course", COURSES)
def test_masks_stay_between_their_updates(course, backend):
    method, expected = COURSES[course]
    model, opt = mlp_optimizer(method, backend)
    assert changes(masks_of_steps(opt, model, 9)) == expected
    assert sum(int(m.sum()) for m in opt.mask) == 16


def test_updates_count_from_the_first_mask_and_from_one_that_is_assigned(backend):
    model, opt = mlp_optimizer(sparse(0.5, update_every=3, start=2), backend)
    for seed in range(2):
        opt.train_step(lambda x, y: loss_of(model, x, y), *batch(6, F64, seed))
        assert opt.mask is None
    seen = []

    def loss(x, y):
        if opt.engine.step.perturbed and len(seen) < opt.steps - 1:
            seen.append(opt.mask)
        return loss_of(model, x, y)

    for seed in range(4):  # steps 2 to 5
        opt.train_step(loss, *batch(6, F64, seed))
    assert changes(seen) == [3]
    opt.mask = bits = random_bits(opt)
    for seed in range(2):
        opt.train_step(loss, *batch(6, F64, seed))
        assert equal(opt.mask, bits)
    opt.train_step(loss, *batch(6, F64, 2))
    assert not equal(opt.mask, bits), "the mask of the step after"


def test_a_step_chooses_by_the_gradients_of_all_its_micro_batches(backend):
    model, opt = mlp_optimizer(sparse(0.5, update_every=1), backend, count=3)
    data = batch(6, F64)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for part in zip(*(t.split(2) for t in data), strict=True):
        grads = torch.autograd.grad(loss_of(model, *part), list(model.parameters()))
        total = [t + g.square() for t, g in zip(total, grads, strict=True)]
    opt.train_step(lambda x, y: loss_of(model, x, y), *data)
    expected = largest(torch.cat([t.view(-1) for t in total]), 16)
    assert torch.equal(torch.cat([m.view(-1) for m in opt.mask]), expected)


@pytest.mark.parametrize("update_every", [1, 2, 50])
@pytest.mark.parametrize("kind", ["fisher", "dynamic"])
@each_way
def test_gradients_that_are_not_finite_choose_no_mask(way, kind, update_every, backend):
    model, opt = mlp_optimizer(sparse(0.5, kind, update_every=update_every), backend)
    good, (x, y) = batch(6, F64), batch(6, F64)
    bad = x, torch.where(torch.arange(6)[:, None] == 5, NAN, y)  # in the last micro-batch
    opt.base_optimizer.step = lambda: None  # else the weights are lost: as a GradScaler skips such a step
    WAYS[way](opt, model, bad)
    assert opt.mask is None, "the first mask was made of such gradients"
    for _ in range(2 * update_every if update_every < 50 else 1):
        WAYS[way](opt, model, good)
        kept = opt.mask
        WAYS[way](opt, model, bad)
        assert equal(opt.mask, kept)
    opt.mask = bits = random_bits(opt)
    WAYS[way](opt, model, bad)
    assert equal(opt.mask, bits)


def test_a_first_mask_goes_with_the_step_that_chose_it(backend):
    model, opt = mlp_optimizer(sparse(0.5), backend)
    for turn, part in enumerate(opt.passes(*batch(6, F64))):
        loss_of(model, *part).backward()
        if turn == 2:
            break
    assert opt.mask is None
    opt.mask = bits = random_bits(opt)
    for part in opt.passes(*batch(6, F64)):
        loss_of(model, *part).backward()
        break
    assert equal(opt.mask, bits)


# ---- saved and loaded ------------------------------------------------------------------------------------------------

KINDS = {
    "fisher": sparse(0.5, update_every=3),
    "dynamic": sparse(0.5, "dynamic", update_every=3, total_steps=12),
    "dynamic, Friendly and Stable": methods.FriendlySAM()
    + sparse(0.4, "dynamic", update_every=2, total_steps=12)
    + methods.StableSAM(),
    "fisher, every second LookSAM": methods.LookSAM(k=2) + sparse(0.5, update_every=3),
}


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_with_the_mask_bit_for_bit(kind, at, backend):
    model, opt = mlp_optimizer(KINDS[kind], backend)
    for seed in range(9):
        if seed == at:
            saved = through_a_file((model.state_dict(), opt.state_dict()))
            copied = copy.deepcopy((model, opt))
        opt.train_step(lambda x, y: loss_of(model, x, y), *batch(6, F64, seed))
    fresh = mlp_optimizer(KINDS[kind], backend)
    used = mlp_optimizer(KINDS[kind], backend)
    masks_of_steps(used[1], used[0], 4, seed=50)
    for other, theirs in (fresh, used):
        other.load_state_dict(saved[0])
        theirs.load_state_dict(saved[1])
    for other, theirs in (fresh, used, copied):
        for seed in range(at, 9):
            theirs.train_step(lambda x, y, other=other: loss_of(other, x, y), *batch(6, F64, seed))
        assert same_bits(other.parameters(), model.parameters())
        assert equal(theirs.mask, opt.mask)


def test_a_dynamic_mask_goes_on_alike_where_a_group_was_added(backend):
    """The one that grew keeps its parameters in two flat buffers, its copy in one."""
    model = mlp(F64)
    method = sparse(0.5, mask="dynamic", update_every=2, total_steps=20)
    opt = MicroBatchSAM(SGD(model[2].parameters(), lr=0.1), 0.1, method=method, backend=backend)
    for seed in range(9):
        if seed == 1:
            opt.add_param_group({"params": list(model[0].parameters())})
        if seed == 3:
            copied, other = copy.deepcopy((model, opt))
        for net, theirs in ((model, opt), (copied, other)) if seed >= 3 else ((model, opt),):
            theirs.train_step(lambda x, y, net=net: loss_of(net, x, y), *batch(6, F64, seed))
    assert equal(other.mask, opt.mask)


def test_a_state_dict_holds_bools_by_parameter(backend):
    model, opt = mlp_optimizer(sparse(0.5, update_every=2), backend)
    assert not remembered(opt, "mask")
    masks_of_steps(opt, model, 5)
    own = remembered(opt, "mask")
    assert equal(list(own.values()), opt.mask)
    assert all(m.dtype == torch.bool for m in own.values())
    assert opt.state_dict()["param_groups"][0]["msam_mask_step"] == 4
    opt.load_state_dict(without_ours(opt.state_dict()))
    assert opt.mask is None, "what is not there begins anew"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": {0: torch.ones(3, 3, dtype=torch.bool)}}, r"mask of shape \(3, 3\) for parameter 0, whose shape is"),
        ({"mask": {9: torch.ones(2, dtype=torch.bool)}}, "mask of parameter 9, the optimizer has 4 parameters"),
        ({"mask": [True]}, "hold tensors by parameter"),
        ({"mask": {0: torch.tensor(True)}}, r"mask of shape \(\) for parameter 0, whose shape is"),
        ({"mask_step": -2}, "'mask_step' in state_dict must be an integer >= -1, got -2"),
        ({"mask_step": 1.5}, "'mask_step' in state_dict must be an integer >= -1, got 1.5"),
    ],
    ids=["shape", "parameter", "list", "no shape", "negative step", "no step"],
)
def test_a_wrong_mask_in_a_state_dict_is_refused(change, message):
    model, opt = mlp_optimizer(sparse(0.5))
    masks_of_steps(opt, model, 2)
    old, before = opt.mask, weights(model)
    state = opt.state_dict()
    state["msam"] = {"mask": dict(enumerate(old)), "mask_step": 0, **change}
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert equal(opt.mask, old)
    assert same_bits(model.parameters(), before)


def test_a_mask_of_another_method_is_not_used(backend):
    """SAM goes on from Sparse SAM's state dict as SAM."""
    model, opt = mlp_optimizer(sparse(0.9), backend)
    masks_of_steps(opt, model, 2)
    state, now = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    trained = []
    for forget in (False, True):
        other, theirs = mlp_optimizer(methods.SAM(), backend)
        other.load_state_dict(now)
        theirs.load_state_dict(without_ours(state) if forget else state)
        for seed in range(2):
            theirs.train_step(lambda x, y, other=other: loss_of(other, x, y), *batch(6, F64, seed))
        trained.append(list(other.parameters()))
    assert same_bits(*trained)


def test_the_state_shows_the_mask_that_was_loaded_last():
    """Also where the mask of before was given up, and its memory and its name are those of the new one."""
    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.1, method=methods.SparseSAM(update_every=None))
    files = []
    for share in (0, 1):
        opt.mask = [torch.full_like(p, share, dtype=torch.bool) for p in model.parameters()]
        next(iter(WAYS.values()))(opt, model, batch(6))
        files.append(copy.deepcopy(opt.state_dict()))
    for share in (0, 1) * 50:
        opt.load_state_dict(files[share])
        shown = [entry["msam_mask"] for entry in opt.state_dict()["state"].values()]
        assert len(shown) == len(list(model.parameters()))
        assert all((bits == share).all() for bits in shown)


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["passes", "train_step"])
@pytest.mark.parametrize("at", ["the first mask", "a later one"])
def test_a_choice_that_is_interrupted_changes_nothing(at, way, monkeypatch, backend):
    model, opt = mlp_optimizer(methods.SparseSAM(update_every=2), backend)
    if at == "a later one":
        WAYS[way](opt, model, batch(6, F64))
    before, old, steps = weights(model), opt.mask, opt.steps
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(masks, "_largest", interrupted)
        WAYS[way](opt, model, batch(6, F64))
    assert same_bits(model.parameters(), before)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert opt.steps == steps
    assert opt.mask is None if old is None else equal(opt.mask, old)
    opt.zero_grad()
    WAYS[way](opt, model, batch(6, F64))
    assert opt.mask is not None
    assert (opt.stats.perturbation_norm > 0).all()


@pytest.mark.parametrize("call", range(4))
def test_masks_change_all_at_once(call, backend, monkeypatch):
    """Those of several flats, where memory is missing while one of them is brought to where its parameters lie."""
    model = nn.ModuleList([nn.Linear(9, 7), nn.Linear(3, 5), nn.Linear(9, 7).double(), nn.Linear(3, 5).double()])
    method = methods.SparseSAM(sparsity=0.5, mask="dynamic", update_every=1, total_steps=100)
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), 0.1, method=method, backend=backend)
    x = torch.ones(2, 3)

    def closure():
        loss = model[1](x).square().mean() + model[3](x.double()).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert all(flat.waiting for flat in opt.engine.store.flats)
    old, moved, left = opt.mask, Flat._moved_mask, iter(range(call))

    def failing(flat, *args):
        if next(left, None) is None:
            raise MemoryError
        return moved(flat, *args)

    monkeypatch.setattr(Flat, "_moved_mask", failing)
    with pytest.raises(MemoryError):
        opt.step(closure)
    monkeypatch.undo()
    assert equal(opt.mask, old)
    opt.step(closure)
    assert not equal(opt.mask, old)
    assert sum(int(m.sum()) for m in opt.mask) == sum(p.numel() for p in model.parameters()) // 2


def test_a_mask_that_is_assigned_or_loaded_in_inference_mode_can_change_later(backend):
    model, opt = mlp_optimizer(methods.SparseSAM(update_every=1), backend)
    with torch.inference_mode():
        opt.mask = [torch.ones(p.shape, dtype=torch.bool) for p in model.parameters()]
    opt.train_step(lambda x, y: loss_of(model, x, y), *batch(6, F64))
    assert not all(m.all() for m in opt.mask)
    saved = copy.deepcopy(opt.state_dict())
    with torch.inference_mode():
        opt.load_state_dict(saved)
    for _ in range(2):
        opt.train_step(lambda x, y: loss_of(model, x, y), *batch(6, F64))


def test_a_mask_of_some_of_the_parameters_is_not_taken(backend):
    model, opt = mlp_optimizer(methods.SparseSAM(update_every=None), backend)
    opt.mask = [torch.ones(p.shape, dtype=torch.bool) for p in model.parameters()]
    saved = opt.state_dict()
    del saved["msam"]["mask"][0]  # no step has begun an entry
    opt.load_state_dict(saved)
    assert opt.mask is None
    with pytest.raises(RuntimeError, match="has no mask yet"):
        opt.train_step(lambda x, y: loss_of(model, x, y), *batch(6, F64))


def test_scores_are_never_part_of_larger_memory(backend):
    """As in the buckets of DDP, which the next backward overwrites."""
    p, late = (nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (8, 8))
    method = methods.SparseSAM(sparsity=0.75, update_every=1)
    opt = MicroBatchSAM(SGD([p, late], lr=0.0), method=method, num_micro_batches=2, backend=backend)
    bucket = torch.empty(16, dtype=torch.float64)

    def closure(gradient):
        def run():
            bucket[:] = gradient
            p.grad = bucket[:8]
            late.grad = bucket[8:] if gradient[8] else None

        return run

    first = torch.tensor([1.0] * 8 + [0.0] * 8, dtype=F64)
    second = torch.tensor([0.0] * 8 + [5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0], dtype=F64)
    opt.step([closure(first), closure(second)])
    assert opt.mask[1].tolist() == [True] * 4 + [False] * 4
    assert not opt.mask[0].any()


def test_a_score_that_begins_is_a_copy_where_its_gradient_is_still_needed():
    g, empty = torch.tensor([3.0, -2.0], device=DEVICE), torch.empty(0, device=DEVICE)
    for scores in (None, [empty]):
        (score,) = masks.add_up(scores, [g], copies=True)
        masks.add_up([score], [torch.tensor([4.0, 0.0], device=DEVICE)])
        assert g.tolist() == [3.0, -2.0]
        assert score.tolist() == [5.0, 2.0]
        assert masks.add_up(scores, [g])[0] is g
