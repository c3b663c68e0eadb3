# SPDX-License-Identifier: Apache-2.0
"""Masters: weights of 16 bits whose perturbations and updates are of what they are rounded from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from cases import DTYPES, Call, assert_same_memory, make
from msam_kernels import MicroBatchSAM, checkpoint, methods
from msam_kernels.backends import reference
from plain import batch, loss_of, mlp, random_numbers, same_bits, through_a_file, weights

SHORT = {name: dtype for name, dtype in DTYPES.items() if dtype.itemsize == 2}
each_short = pytest.mark.parametrize("dtype", SHORT.values(), ids=SHORT)
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda ps: SGD(ps, lr=0.01),
    "SGD, everything": lambda ps: SGD(ps, lr=0.01, momentum=0.9, weight_decay=0.01, nesterov=True),
    "Adam, amsgrad": lambda ps: Adam(ps, lr=1e-4, amsgrad=True),
    "AdamW": lambda ps: AdamW(ps, lr=1e-4),
}
METHODS = {
    "SAM": methods.SAM(),
    "F-SAM": methods.FriendlySAM(),
    "ASAM": methods.AdaptiveSAM(),
    "GSAM": methods.GapSAM(),
    "LookSAM": methods.LookSAM(k=2),
    "Bilateral SAM": methods.BilateralSAM(rho_min=0.02),
    "Sparse SAM": methods.SparseSAM(),
}


def model_of(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    return mlp(torch.float32).to(dtype)


def optimizer(model: nn.Module, base: str = "SGD, everything", **options: Any) -> MicroBatchSAM:
    options = {"rho": 0.05, "num_micro_batches": 2, "masters": True, **options}
    return MicroBatchSAM(BASES[base](model.parameters()), **options)


def points_of(opt: MicroBatchSAM, model: nn.Module, seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """A loop; the weights and gradients of every pass."""
    found = []
    for part in opt.passes(*batch(7, dtype, seed=seed)):
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        loss_of(model, *part).backward()
        assert all(g is None for g in before)
        found.append((weights(model), [p.grad.clone() for p in model.parameters()]))
    return found


def train(opt: MicroBatchSAM, model: nn.Module, steps: range | list[int] = range(3)) -> nn.Module:
    for seed in steps:
        points_of(opt, model, seed, next(model.parameters()).dtype)
        opt.step()
        opt.zero_grad()
    return model


def masters(opt: MicroBatchSAM) -> list[Tensor]:
    opt.state_dict()
    return [opt.state[p]["msam_master"].clone() for group in opt.param_groups for p in group["params"]]


# ---- what they are -----------------------------------------------------------------------------------------------------


@each_short
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_masters_train_as_an_fp32_model_does_with_the_gradients_of_16_bits(method, base, dtype, backend):
    model = model_of(dtype)
    wide = copy.deepcopy(model).float()
    opt = optimizer(model, base, method=METHODS[method], backend=backend)
    plain = optimizer(wide, base, masters=False, backend=backend)
    for seed in range(4):
        before = weights(model)
        points_of(opt, model, seed, dtype)
        assert same_bits(model.parameters(), before)
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
        with pytest.warns(UserWarning, match="did not come out of passes") if not seed else nullcontext():
            plain.step()
        opt.step()
        opt.zero_grad()
        assert same_bits(masters(opt), weights(wide))
        assert same_bits(model.parameters(), [q.to(dtype) for q in weights(wide)])
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            state = {name: t for name, t in opt.state[p].items() if not name.startswith("msam_")}
            assert same_bits(state.values(), [plain.state[q][name] for name in state])
    assert not same_bits(masters(opt), [p.float() for p in model.parameters()])


@each_short
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_pass_is_at_the_master_and_e_rounded(rounding, dtype, backend):
    model = model_of(dtype)
    opt = optimizer(model, backend=backend, rounding=rounding, **({"seed": 3} if rounding == "stochastic" else {}))
    train(opt, model)
    kept = masters(opt)
    (w0, g0), (w1, _), (w2, g2), (w3, _) = points_of(opt, model, 9, dtype)
    for point, g, w in ((w1, g0, w0), (w3, g2, w2)):
        assert same_bits(w, [m.to(dtype) for m in kept])
        norm = sum(float(t.double().square().sum()) for t in g) ** 0.5
        scale = torch.tensor(0.05 / (norm + reference.EPS), dtype=torch.float64).float()
        exact = [m + t.float() * scale for m, t in zip(kept, g, strict=True)]
        if rounding == "nearest":
            assert same_bits(point, [x.to(dtype) for x in exact])
            continue
        assert not same_bits(point, [x.to(dtype) for x in exact])
        for t, x in zip(point, exact, strict=True):  # one of the two neighbours
            near = x.to(dtype)
            other = torch.nextafter(near, torch.where(near.float() < x, torch.inf, -torch.inf).to(dtype))
            assert ((t == near) | (t == other)).all()
    assert same_bits(masters(opt), kept)


def test_small_updates_are_not_lost(backend):
    moved = {}
    for kept in (True, False):
        p = nn.Parameter(torch.ones(37, dtype=torch.bfloat16))
        opt = MicroBatchSAM(SGD([p], lr=2.0**-10), rho=0.0, masters=kept, backend=backend)
        for _ in range(16):  # each a fourth of half the distance to the next number below
            for _ in opt.passes():
                p.grad = torch.ones_like(p)
            opt.step()
            opt.zero_grad()
        moved[kept] = p.detach().float()
    assert (moved[True] == 1 - 2.0**-6).all()
    assert (moved[False] == 1).all()


def test_of_a_small_e_as_much_arrives_as_was_asked_for_once_masters_lie_between_numbers(backend):
    p = nn.Parameter(torch.randn(20_000, generator=random_numbers(0)).to(torch.bfloat16))
    opt = MicroBatchSAM(SGD([p], lr=0.01), rho=0.05, masters=True, backend=backend)
    along = []
    for step in range(2):
        for _ in opt.passes():
            p.grad = torch.randn(20_000, generator=random_numbers(10 + step)).to(torch.bfloat16)
        along.append(float(opt.stats.along))
        opt.step()
        opt.zero_grad()
    assert along[0] < 0.5  # where they begin as the weights
    assert abs(along[1] - 1) < 0.1


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("way", ["train_step", "passes", "clipped", "closures", "without SAM"])
def test_every_way_and_layout_and_backend_gives_the_same_bits(way, flatten, backend):
    def trained(backend: str, flatten: bool) -> list[Tensor]:
        model = model_of()
        opt = optimizer(model, "AdamW", backend=backend, flatten=flatten, rounding="stochastic", seed=2)
        opt.enabled = way != "without SAM"
        for seed in range(3):
            data = batch(8, torch.bfloat16, seed=seed)
            if way == "closures":
                parts = [tuple(t[k : k + 4] for t in data) for k in (0, 4)]
                opt.step([lambda part=part: loss_of(model, *part).backward() for part in parts])
            elif way == "passes":
                train(opt, model, [seed])
            else:
                options = {"max_grad_norm": 0.1} if way == "clipped" else {}
                opt.train_step(lambda *part: loss_of(model, *part), *data, **options)
        return weights(model) + masters(opt)

    assert same_bits(trained(backend, flatten), trained("reference", True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_weights_of_more_bits_have_none(dtype, backend):
    found = []
    for kept in (True, False):
        model = mlp(dtype)
        opt = optimizer(model, masters=kept, backend=backend)
        found.append(weights(train(opt, model)))
        assert not any("msam_master" in entry for entry in opt.state_dict()["state"].values())
        assert opt.engine.store.flats[0].saved.dtype == dtype
    assert same_bits(*found)


# ---- weights that somebody else writes -----------------------------------------------------------------------------------


def _load(model: nn.Module, new: list[Tensor]) -> None:
    model.load_state_dict(dict(zip(model.state_dict(), new, strict=True)))


@torch.no_grad()
def _in_place(model: nn.Module, new: list[Tensor]) -> None:
    for p, t in zip(model.parameters(), new, strict=True):
        p.copy_(t)


def _through_data(model: nn.Module, new: list[Tensor]) -> None:
    for p, t in zip(model.parameters(), new, strict=True):
        p.data.copy_(t)


def _repointed(model: nn.Module, new: list[Tensor]) -> None:
    for p, t in zip(model.parameters(), new, strict=True):
        p.data = t.clone()


WRITES = {"load_state_dict": _load, "copy_": _in_place, "data.copy_": _through_data, "data =": _repointed}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("sam", [True, False], ids=["by a perturbation", "by an update"])
def test_masters_follow_weights_that_somebody_writes(write, sam, backend):
    model = model_of()
    opt = optimizer(model, "SGD", backend=backend)
    train(opt, model)
    new = [t * 1.25 + 0.5 for t in weights(model)]
    other = model_of()
    WRITES[write](model, new)
    _in_place(other, new)
    fresh = optimizer(other, "SGD", backend=backend)
    for o, m in ((opt, model), (fresh, other)):
        o.enabled = sam
        train(o, m, [7])
    assert same_bits(masters(opt), masters(fresh))
    assert same_bits(model.parameters(), other.parameters())


def test_one_weight_that_is_written_leaves_the_other_masters(backend):
    model = model_of()
    opt = optimizer(model, "SGD", backend=backend)
    train(opt, model)
    kept = masters(opt)
    with torch.no_grad():
        model[0].weight[1, 2] += 1
    kept[0][1, 2] = model[0].weight[1, 2]
    points_of(opt, model, 7)
    assert same_bits(masters(opt), kept)


@each_short
@pytest.mark.parametrize("sam", [True, False])
def test_a_zero_comes_back_with_its_own_sign(sam, dtype, backend):
    """A master that is too small for a number of 16 bits rounds to a zero, and not to the other one."""
    tiny = torch.tensor([1e-40, -1e-40, 0.0, -0.0] * 10, dtype=torch.float32)
    p = nn.Parameter(tiny.to(dtype))
    opt = MicroBatchSAM(SGD([p], lr=0.0), rho=0.05, masters=True, backend=backend)
    opt.engine.store.flats[0].set_master(0, tiny)
    p.data.neg_()  # every other zero
    before = weights([p])
    for turn, _ in enumerate(opt.passes()):
        assert same_bits([p], before) == (turn == 0)
        p.grad = torch.ones_like(p)
    assert same_bits([p], before)
    assert torch.signbit(opt.engine.store.flats[0].saved[: len(p)]).equal(torch.signbit(before[0]))


@each_short
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("turn", [1, 3])
def test_a_loop_that_is_left_restores_weights_and_masters(turn, method, dtype, backend):
    model = model_of(dtype)
    opt = optimizer(model, method=METHODS[method], backend=backend)
    train(opt, model)
    before, kept, perturbed = weights(model), masters(opt), []
    for i, part in enumerate(opt.passes(*batch(7, dtype, seed=5))):
        perturbed.append(weights(model))
        if i == turn:
            break
        loss_of(model, *part).backward()
    opt.restore()
    assert same_bits(model.parameters(), before)
    assert same_bits(masters(opt), kept)
    if method != "LookSAM":
        assert not same_bits(perturbed[1], before)


@pytest.mark.parametrize("base", ["SGD, everything", "AdamW"])
def test_a_gradient_that_is_not_finite_perturbs_nothing_and_a_step_that_is_skipped_changes_nothing(base, backend):
    model = model_of(torch.float16)
    opt = optimizer(model, base, backend=backend)
    train(opt, model)
    before, kept, state = weights(model), masters(opt), copy.deepcopy(opt.state_dict()["state"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # of which fp16 has no gradients
    opt.train_step(lambda *part: loss_of(model, *part), *batch(8, torch.float16), scaler=scaler)
    assert opt.stats.nonfinite.any()
    assert same_bits(model.parameters(), before)
    assert same_bits(masters(opt), kept)
    after = opt.state_dict()["state"]
    assert all(same_bits(state[i].values(), after[i].values()) for i in state)


# ---- files -------------------------------------------------------------------------------------------------------------


def _by_state_dict(opt: MicroBatchSAM, model: nn.Module, base: str) -> tuple[MicroBatchSAM, nn.Module]:
    other = model_of()
    again = optimizer(other, base)
    again.load_state_dict(through_a_file(opt.state_dict()))
    other.load_state_dict(through_a_file(model.state_dict()))
    return again, other


def _by_the_base(opt: MicroBatchSAM, model: nn.Module, base: str) -> tuple[MicroBatchSAM, nn.Module]:
    other = model_of()
    other.load_state_dict(model.state_dict())
    again = optimizer(other, base)
    again.base_optimizer.load_state_dict(through_a_file(opt.base_optimizer.state_dict()))
    return again, other


def _onto_one_that_trained(opt: MicroBatchSAM, model: nn.Module, base: str) -> tuple[MicroBatchSAM, nn.Module]:
    files = through_a_file((opt.state_dict(), model.state_dict()))
    other = model_of()
    again = optimizer(other, base)
    train(again, other, [11, 12])
    again.load_state_dict(files[0])
    other.load_state_dict(files[1])
    return again, other


COPIES = {
    "state dict": _by_state_dict,
    "state dict of the base optimizer": _by_the_base,
    "onto one that trained": _onto_one_that_trained,
    "pickle": lambda opt, model, base: pickle.loads(pickle.dumps((opt, model))),
    "deepcopy": lambda opt, model, base: copy.deepcopy((opt, model)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", COPIES)
def test_training_goes_on_bit_for_bit(way, base):
    model = model_of()
    opt = optimizer(model, base)
    train(opt, model)
    again, other = COPIES[way](opt, model, base)
    assert again.masters
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name, t in opt.state_dict()["state"].get(0, {}).items():
            assert not t.dim() or t.dtype == torch.float32, name
        mine, theirs = ({n: t.clone() for n, t in o.state[x].items() if n != "step"} for o, x in ((opt, p), (again, q)))
        assert same_bits(mine.values(), [theirs.get(n, t) for n, t in mine.items()])
    assert same_bits(masters(again) if again.engine.store.flats[0].saved is not None else [], masters(opt))
    for o, m in ((opt, model), (again, other)):
        train(o, m, [5, 6])
    assert same_bits(masters(again), masters(opt))
    assert same_bits(model.parameters(), other.parameters())


@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated")
@pytest.mark.parametrize("flattened", [False, True], ids=["as it is", "flattened"])
@pytest.mark.parametrize("base", ["SGD, everything", "AdamW"])
@pytest.mark.parametrize("by_base", [False, True], ids=["of ours", "of the base optimizer"])
def test_training_goes_on_bit_for_bit_from_distributed_checkpoints(by_base, base, flattened, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    straight, model, resumed = model_of(), model_of(), model_of()
    train(optimizer(straight, base), straight, range(9))
    first, second = optimizer(model, base), optimizer(resumed, base)
    train(first, model, range(3))
    old, new = (opt.base_optimizer if by_base else opt for opt in (first, second))
    dcp.save(dict(zip("mo", get_state_dict(model, old, options=options), strict=True)), checkpoint_id=tmp_path)
    state = dict(zip("mo", get_state_dict(resumed, new, options=options), strict=True))
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(resumed, new, model_state_dict=state["m"], optim_state_dict=state["o"], options=options)
    assert same_bits(masters(second), masters(first))
    train(second, resumed, range(3, 9))
    assert same_bits(resumed.parameters(), straight.parameters())


def test_a_rank_s_own_memory_leaves_masters_and_steps(backend):
    """As a framework loads it, where another rank's file has been loaded."""
    model = model_of()
    opt = optimizer(model, method=methods.FriendlySAM(), backend=backend)
    train(opt, model)
    own = copy.deepcopy(checkpoint.remembered(opt.engine))
    train(opt, model, [5, 6])
    before = masters(opt)
    checkpoint.load_own(opt.engine, own)
    assert same_bits(masters(opt), before)
    assert opt.steps == 5
    assert same_bits([opt.state[p]["msam_ema"] for p in model.parameters()], own["ema"].values())


def test_a_state_of_none_loads_too():
    """As older versions of torch save SGD's without momentum."""
    model = model_of()
    opt = optimizer(model, "SGD")
    plain = SGD(model.parameters(), lr=0.01).state_dict()
    plain["state"] = {i: {"momentum_buffer": None} for i in range(len(list(model.parameters())))}
    opt.load_state_dict(plain)
    train(opt, model)


@pytest.mark.parametrize("method", [methods.WSAM(), methods.MomentumSAM()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("way", ["passes", "train_step"])
def test_a_method_that_is_put_there_later_is_refused_as_at_construction(method, way):
    model = model_of()
    opt = optimizer(model)
    train(opt, model)
    opt.method, before = method, [*weights(model), *masters(opt)]
    with pytest.raises(ValueError, match="leave masters out"):
        if way == "passes":
            train(opt, model)
        else:
            opt.train_step(lambda *part: loss_of(model, *part), *batch(7, torch.bfloat16))
    assert same_bits([*weights(model), *masters(opt)], before)


def test_parallel_passes_that_are_asked_for_later_are_refused():
    model = model_of()
    opt = optimizer(model)
    opt.model, opt.parallel = model, True
    with pytest.raises(ValueError, match="parallel=True perturbs copies"):
        opt.train_step(lambda *part: loss_of(model, *part), *batch(7, torch.bfloat16))


def test_masters_that_find_no_memory_leave_every_weight(monkeypatch):
    params = [nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)]
    opt = MicroBatchSAM(SGD(params, lr=0.1), masters=True)
    opt.enabled = False
    for p in params:
        p.grad = torch.ones_like(p)

    def none():
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(opt.engine.store.flats[1], "save_buffer", none)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step()
    assert all(bool((p == 1).all()) for p in params)


def test_a_plain_state_dict_loads_and_masters_begin_as_the_weights():
    model = model_of()
    plain = BASES["SGD, everything"](model.parameters())
    loss_of(model, *batch(7, torch.bfloat16)).backward()
    plain.step()
    files = through_a_file((model.state_dict(), plain.state_dict()))
    found = []
    for steps in (0, 2):
        other = model_of()
        opt = optimizer(other)
        train(opt, other, list(range(steps)))
        other.load_state_dict(files[0])
        opt.load_state_dict(files[1])
        assert same_bits(
            [opt.state[p]["momentum_buffer"].bfloat16() for p in other.parameters()],
            [plain.state[p]["momentum_buffer"] for p in model.parameters()],
        )
        train(opt, other, [4])
        found.append((weights(other), masters(opt)))
    assert same_bits(found[0][0], found[1][0])
    assert same_bits(found[0][1], found[1][1])


def test_a_file_with_masters_loads_where_there_are_none():
    model = model_of()
    opt = optimizer(model)
    train(opt, model)
    other = model_of()
    again = optimizer(other, masters=False)
    again.load_state_dict(through_a_file(opt.state_dict()))
    assert not any("msam_master" in entry for entry in again.state_dict()["state"].values())
    train(again, other)
    assert all(again.state[p]["momentum_buffer"].dtype == torch.bfloat16 for p in other.parameters())


def test_masters_of_another_shape_are_refused():
    model = model_of()
    opt = optimizer(model)
    train(opt, model)
    state_dict = copy.deepcopy(opt.state_dict())
    state_dict["state"][0]["msam_master"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"state_dict has master of shape \(3,\)"):
        opt.load_state_dict(state_dict)


# ---- models that change ------------------------------------------------------------------------------------------------


def test_another_memory_order_keeps_the_masters():
    model, other = model_of(), model_of()
    opts = [optimizer(m) for m in (model, other)]
    for o, m in zip(opts, (model, other), strict=True):
        train(o, m)
    for p in model.parameters():
        p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data
    for o, m in zip(opts, (model, other), strict=True):
        train(o, m, [5, 6])
    assert same_bits([t.contiguous() for t in masters(opts[0])], masters(opts[1]))


def test_masters_stay_where_others_are_converted():
    model = model_of()
    opt = optimizer(model)
    train(opt, model)
    kept = masters(opt)
    model[0].float()
    opt.update_hyper()
    assert len(opt.engine.store.flats) == 2
    stays = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    state = opt.state_dict()["state"]
    assert ["msam_master" in entry for entry in state.values()] == [
        p.dtype == torch.bfloat16 for p in model.parameters()
    ]
    assert same_bits([opt.state[p]["msam_master"] for p in stays], kept[-len(stays) :])


def test_a_model_that_is_converted_trains_on_with_its_state():
    model = model_of()
    opt = optimizer(model)
    train(opt, model)
    state = [opt.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    model.half()
    points_of(opt, model, 5, torch.float16)
    assert opt.engine.store.flats[0].saved.dtype == torch.float32
    assert same_bits([opt.state[p]["momentum_buffer"] for p in model.parameters()], state)
    opt.zero_grad()
    model.float()
    train(opt, model, [6])
    assert not opt.engine.store.has_masters
    model.bfloat16()
    train(opt, model, [7])
    assert same_bits([m.bfloat16() for m in masters(opt)], weights(model))
    assert {opt.state[p]["momentum_buffer"].dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("steps", [0, 1])
def test_a_conversion_to_fp32_and_back_keeps_masters_that_no_step_came_between(steps):
    """A step in fp32 is from the weights, which were rounded, and masters begin anew as its weights are rounded."""
    model = model_of()
    opt = optimizer(model)
    train(opt, model)
    kept = masters(opt)
    rounded = weights(model)
    model.float()
    assert same_bits(weights(model), [w.float() for w in rounded])
    assert not any(torch.equal(p, master) for p, master in zip(model.parameters(), kept, strict=True))
    train(opt, model, list(range(steps)))
    model.bfloat16()
    rounded = weights(model)
    for group in opt.param_groups:  # a step that moves nothing
        group["lr"] = 0.0
    train(opt, model, [7])
    assert same_bits(masters(opt), [w.float() for w in rounded] if steps else kept)


# ---- what there is not ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no bool": ({"masters": 1}, TypeError, "masters must be a bool, got 1"),
    "a base optimizer with a step of its own": (
        {"base": lambda ps: RMSprop(ps)},
        ValueError,
        "masters=True is for fused updates, and RMSprop takes its own step, .*: use SGD, Adam, AdamW, or leave masters out",
    ),
    "decoupled WSAM": ({"method": methods.WSAM()}, ValueError, "takes a step of its own .*: use decoupled=False"),
    "Momentum-SAM": ({"method": methods.MomentumSAM()}, ValueError, "perturbs along momentum .*: use another method"),
    "parallel passes": ({"parallel": True}, ValueError, "parallel=True perturbs copies .*: leave one of them out"),
}


STATES = {"states": lambda states: [t.bfloat16() for t in states]}
ONE = torch.ones(1, 1, dtype=torch.float64)
BAD: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], str]] = {
    "states of 16 bits": ("update", "adam, masters", STATES, ("cpu",), r"states\[0\] must be Float .*BFloat16"),
    "masters of fp64": ("descend", "masters", {"saved": Tensor.double}, ("cpu",), "saved must be BFloat16 .*Double"),
    "a stack": ("perturb", "a stack", {"saved": Tensor.float}, ("cpu",), "saved must be BFloat16 .*Float"),
    "stacks of terms": (
        "descend",
        "masters and mean",
        {"shares": ONE},
        ("cpu", "reference"),
        "shares are not there for masters: saved must be .*loat16 like the weights then",
    ),
    "what goes off after": (
        "update",
        "sgd, masters",
        {"rates": ONE[0].repeat(3), "terms": lambda terms: [*terms, *terms]},
        ("cpu", "reference"),
        "rates are not there for masters: saved must be .*loat16 like the weights then",
    ),
}


@pytest.mark.host
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("what", BAD)
def test_a_bad_call_is_refused_and_changes_nothing(what):
    operator, variant, changes, backends, message = BAD[what]
    call = make(operator, variant, torch.bfloat16, sizes=(5, 40, 33))
    before = copy.deepcopy(call)
    changed = {name: change(call.arguments[name]) if callable(change) else change for name, change in changes.items()}
    for backend in backends:
        with pytest.raises(RuntimeError, match=message):
            Call(operator, {**call.arguments, **changed}).run(backend)
        assert_same_memory(call, before)


@pytest.mark.parametrize("what", REFUSED)
def test_what_masters_do_not_go_with_is_refused(what):
    options, kind, message = REFUSED[what]
    model = model_of()
    places = [p.data_ptr() for p in model.parameters()]
    options = {"masters": True, "model": model, **options}
    base = options.pop("base", BASES["SGD, everything"])(model.parameters())
    with pytest.raises(kind, match=message):
        MicroBatchSAM(base, **options)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_a_step_that_is_not_the_fused_one_is_refused_before_anything_changes():
    model = model_of()
    opt = optimizer(model)
    train(opt, model)
    before = weights(model)
    hook = opt.base_optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="masters=True needs the fused update of SGD"):
        points_of(opt, model, 5)
    hook.remove()
    points_of(opt, model, 5)
    with pytest.raises(
        RuntimeError, match=r"SGD.step\(\) is of the weights of 16 bits.*: call step\(\) of the MicroBatch"
    ):
        opt.base_optimizer.step()
    assert same_bits(model.parameters(), before)
    opt.step()


def test_the_optimizer_says_that_it_has_them():
    assert "masters=True" in repr(optimizer(model_of()))
    assert "masters" not in repr(optimizer(model_of(), masters=False))
