# SPDX-License-Identifier: Apache-2.0
"""What would train something else than the method gets a sentence, and costs no gradient and no weight."""

from __future__ import annotations

import types
import warnings
from collections import UserDict
from functools import partial
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, RMSprop

import msam_kernels
import plain
from msam_kernels import MicroBatchSAM, methods
from msam_kernels.mistakes import REMEDIES
from msam_kernels.optimizer import find
from msam_kernels.rules import fused_rule
from plain import assert_close, closure_of, gradients, loss_of, same_bits, weights

BASES = {"SGD": lambda p: SGD(p, lr=0.1), "RMSprop": lambda p: RMSprop(p, lr=0.01)}
mlp, batch = partial(plain.mlp, torch.float64), partial(plain.batch, dtype=torch.float64)
each_base = pytest.mark.parametrize("base", BASES)


def fresh(base="SGD", **options):
    model = mlp()
    return model, MicroBatchSAM(BASES[base](model.parameters()), 0.1, **options)


def loop(model, opt, seed=0):
    for part in opt.passes(*batch(seed=seed)):
        loss_of(model, *part).backward()


# ---- steps on gradients that came out of no loop ---------------------------------------------------------------------


@each_base
@pytest.mark.parametrize("of", ["the optimizer", "its base"])
def test_a_plain_step_is_told_once_and_made(of, base):
    model, opt = fresh(base)
    expected = mlp()
    theirs = BASES[base](expected.parameters())
    stepped = opt if of == "the optimizer" else opt.base_optimizer
    for step in range(3):
        closure_of(model, batch(seed=step))()
        closure_of(expected, batch(seed=step))()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            stepped.step()
        assert [str(w.message)[:30] for w in said] == (["step() on gradients that did n"] if step == 0 else [])
        assert all(w.filename == __file__ for w in said), "where the user has to change something"
        theirs.step()
        opt.zero_grad()
        theirs.zero_grad()
    assert_close(model, expected)
    assert opt.steps == 3


@each_base
@pytest.mark.parametrize("of", ["the optimizer", "its base"])
def test_a_plain_step_is_an_error_every_time_with_strict(of, base):
    model, opt = fresh(base, strict=True)
    before = weights(model)
    closure_of(model, batch())()
    grads = [g.clone() for g in gradients(model)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"plain step of (SGD|RMSprop), without the perturbation"):
            (opt if of == "the optimizer" else opt.base_optimizer).step()
    assert opt.steps == 0
    assert same_bits(model.parameters(), before)
    assert same_bits(gradients(model), grads)


def plain_by_option(opt):
    opt.enabled = False


def plain_by_radius(opt):
    opt.param_groups[0]["rho"] = 0.0


def plain_by_start(opt):
    opt.method = methods.SAM(start=5)


def after_a_loop(opt):
    pass


@pytest.mark.parametrize(
    "make", [plain_by_option, plain_by_radius, plain_by_start, after_a_loop], ids=lambda f: f.__name__.replace("_", " ")
)
def test_a_step_that_nothing_would_have_perturbed_or_after_a_loop_is_not_told(make):
    model, opt = fresh(strict=True)
    make(opt)
    if make is after_a_loop:
        loop(model, opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    else:
        closure_of(model, batch())()
    opt.step()
    opt.zero_grad()
    opt.step()  # without any gradient there is nothing to perturb along
    assert opt.steps == 2


@pytest.mark.parametrize("after", ["a step", "zero_grad"])
def test_a_loop_counts_until(after):
    model, opt = fresh(strict=True)
    loop(model, opt)
    if after == "a step":
        opt.step()
        model.zero_grad()  # which the optimizer does not see
    else:
        opt.zero_grad()
    closure_of(model, batch())()
    with pytest.raises(RuntimeError, match="did not come out of passes"):
        opt.step()


@pytest.mark.parametrize(("modules", "text"), REMEDIES.items(), ids=[names[0] for names in REMEDIES])
def test_the_sentence_is_in_the_words_of_the_framework_that_calls(modules, text):
    model, opt = fresh(strict=True)
    closure_of(model, batch())()
    caller = types.ModuleType(modules[0] + ".inside")
    exec("def step(opt): opt.step()", caller.__dict__)
    with pytest.raises(RuntimeError) as raised:
        caller.step(opt)
    assert str(raised.value).endswith(text)


@each_base
def test_steps_of_the_base_after_a_loop_are_counted(base):
    results = []
    for of in (lambda opt: opt, lambda opt: opt.base_optimizer):
        model, opt = fresh(base, strict=True, method=methods.SAM(start=2))
        for step in range(4):
            loop(model, opt, seed=step)
            of(opt).step()
            opt.zero_grad()
        assert opt.steps == 4
        results.append(model)
    assert_close(*results)


def test_a_step_of_the_base_is_refused_inside_of_a_loop_and_where_the_method_has_a_part_after_it():
    model, opt = fresh()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"SGD\.step\(\) while the weights are perturbed"):
        for part in opt.passes(*batch()):
            loss_of(model, *part).backward()
            if opt.pass_index:
                opt.base_optimizer.step()
    assert same_bits(model.parameters(), before)
    model, opt = fresh(method=methods.WSAM())
    loop(model, opt)
    with pytest.raises(RuntimeError, match=r"has a part of its own after the base optimizer's step: call step\(\) of"):
        opt.base_optimizer.step()


def test_the_hook_on_the_base_leaves_it_fused_and_does_not_keep_the_optimizer():
    model, opt = fresh()
    base = opt.base_optimizer
    assert fused_rule(base) is not None
    handle = base.register_step_pre_hook(lambda *_: None)
    assert fused_rule(base) is None, "a hook of the user's wants the base optimizer's own step"
    handle.remove()
    del opt
    closure_of(model, batch())()
    base.step()  # nobody is there who could say anything


# ---- closures --------------------------------------------------------------------------------------------------------


@each_base
def test_after_a_loop_a_closure_that_does_nothing_is_called_and_the_step_made(base):
    results = []
    for way in (lambda opt: opt.step(), lambda opt: opt.step(lambda: "value")):
        model, opt = fresh(base, strict=True)
        for step in range(2):
            loop(model, opt, seed=step)
            assert way(opt) in (None, "value")
            opt.zero_grad()
        results.append(weights(model))
    assert same_bits(*results)


def test_after_a_loop_a_closure_that_runs_backward_is_refused():
    model, opt = fresh()
    before = weights(model)
    loop(model, opt)
    with pytest.raises(RuntimeError, match="this closure runs backward, and a passes"):
        opt.step(closure_of(model, batch()))
    assert same_bits(model.parameters(), before)
    assert all(not p._backward_hooks for p in model.parameters())


NO_GRADIENT_OF_CLOSURE = r"the closure left no gradient .*`for xb, yb in opt.passes\(x, y\)"


@pytest.mark.parametrize("strict", [False, True])
def test_a_closure_without_backward_that_would_drop_gradients_is_an_error(strict):
    model, opt = fresh(strict=strict)
    before = weights(model)
    closure_of(model, batch())()
    grads = [g.clone() for g in gradients(model)]
    with pytest.raises(RuntimeError, match=NO_GRADIENT_OF_CLOSURE):
        opt.step(lambda: loss_of(model, *batch()))
    assert same_bits(model.parameters(), before)
    assert same_bits(gradients(model), grads)


def test_a_closure_without_backward_where_none_was_run_before_is_told_once_and_changes_nothing():
    model, opt = fresh()
    before = weights(model)
    with pytest.warns(UserWarning, match=NO_GRADIENT_OF_CLOSURE) as said:
        opt.step(lambda: loss_of(model, *batch()))
    assert said[0].filename == __file__, "where the user has to change something"
    opt.step(lambda: loss_of(model, *batch()))
    assert same_bits(model.parameters(), before)
    assert gradients(model) == [None] * 4


def test_gradients_that_a_closure_would_drop_are_an_error_with_strict():
    model, opt = fresh(strict=True)
    before = weights(model)
    closure_of(model, batch())()
    grads = [g.clone() for g in gradients(model)]
    with pytest.raises(RuntimeError, match=r"step\(closure\) drops them"):
        opt.step(closure_of(model, batch(seed=1)))
    assert same_bits(model.parameters(), before)
    assert same_bits(gradients(model), grads)

    def clears():
        opt.zero_grad()
        closure_of(model, batch(seed=1))()

    opt.step(clears)
    assert opt.steps == 1


# ---- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", [(0, 1), (1,)], ids=["in every pass", "in the second pass"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_pass_without_backward_is_an_error_with_strict_that_costs_no_gradient(micro_batches, forgotten):
    model, opt = fresh(num_micro_batches=micro_batches, strict=True)
    before = weights(model)
    closure_of(model, batch())()
    grads = [g.clone() for g in gradients(model)]
    with pytest.raises(RuntimeError, match=r"calls backward\(\) in every pass, not after the loop"):
        for part in opt.passes(*batch()):
            loss = loss_of(model, *part)
            if opt.pass_index not in forgotten:
                loss.backward()
    assert same_bits(model.parameters(), before)
    assert same_bits(gradients(model), grads)


def test_a_loop_that_ends_before_its_body_runs_is_told_once_and_changes_nothing():
    model, opt = fresh()
    before = weights(model)
    with pytest.warns(UserWarning, match=r"list\(opt\.passes\(\.\.\.\)\) ends the loop before any body has run"):
        list(opt.passes(*batch()))
    opt.step()
    list(opt.passes(*batch()))
    opt.step()
    assert same_bits(model.parameters(), before)


@pytest.mark.parametrize("strict", [False, True])
def test_the_drop_in_says_where_a_gradient_is_missing(strict):
    model = mlp()
    opt = msam_kernels.SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    opt.strict = strict
    before = weights(model)
    closure_of(model, batch())()
    opt.first_step(zero_grad=True)
    sentence = r"no parameter of the optimizer has a gradient in second_step\(\)"
    with pytest.raises(RuntimeError, match=sentence) if strict else pytest.warns(UserWarning, match=sentence):
        opt.second_step()
    assert same_bits(model.parameters(), before)


def test_the_drop_in_says_that_a_step_is_half_done():
    model = mlp()
    opt = msam_kernels.SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    closure_of(model, batch())()
    opt.first_step(zero_grad=True)
    perturbed = weights(model)
    closure_of(model, batch())()
    with pytest.raises(
        RuntimeError, match=r"first_step\(\) while the weights are perturbed: second_step\(\).* comes before"
    ):
        opt.first_step()
    assert same_bits(model.parameters(), perturbed)
    opt.second_step()
    assert opt.steps == 1


# ---- arguments and attributes ----------------------------------------------------------------------------------------


def test_rho_as_an_attribute_is_refused_with_the_place_where_it_is():
    _, opt = fresh()
    with pytest.raises(AttributeError, match=r"opt\.rho = 0\.2 would change nothing.*group\['rho'\] = 0\.2"):
        opt.rho = 0.2
    assert not hasattr(opt, "rho")
    assert opt.param_groups[0]["rho"] == 0.1


def test_a_second_wrapper_with_another_rho_is_told_while_the_first_one_is_there():
    _, opt = fresh()
    base = opt.base_optimizer
    with pytest.warns(
        UserWarning, match=r"another MicroBatchSAM wraps this SGD, and its rho goes from \[0\.1\] to \[0\.2\]"
    ):
        second = MicroBatchSAM(base, 0.2)
    MicroBatchSAM(base, 0.2)
    with pytest.raises(RuntimeError, match="another MicroBatchSAM"):
        MicroBatchSAM(base, 0.3, strict=True)
    assert base.param_groups[0]["rho"] == 0.2
    del opt, second
    MicroBatchSAM(base, 0.4)


def twice(model, x, y):
    loss = loss_of(model, x, y)
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("loss_fn", "error", "match"),
    [
        (
            lambda model, x, y: (loss_of(model, x, y), x),
            TypeError,
            "must return the mean loss .* got a tuple: return the loss",
        ),
        (lambda model, x, y: None, TypeError, "got a NoneType"),
        (lambda model, x, y: model(x), ValueError, r"must return one value, .* of shape \(.*: return its mean\(\)"),
        (lambda model, x, y: loss_of(model, x, y).detach(), ValueError, "depends on no parameter: .* detach nothing"),
        (
            lambda model, x, y: x.square().mean(),
            ValueError,
            r"depends on no parameter: it is to call the model, e\.g\.",
        ),
        (twice, RuntimeError, r"loss_fn must not call backward\(\) itself"),
    ],
    ids=["a tuple", "nothing", "several values", "detached", "no model", "calls backward"],
)
def test_a_loss_function_that_returns_no_loss_is_refused(loss_fn, error, match):
    model, opt = fresh()
    before = weights(model)
    with pytest.raises(error, match=match):
        opt.train_step(lambda x, y: loss_fn(model, x, y), *batch())
    assert same_bits(model.parameters(), before)
    assert gradients(model) == [None] * 4


# ---- mappings that are no dicts --------------------------------------------------------------------------------------


class Encoding(UserDict):
    """As tokenizers return: a mapping with attributes, and something beside its items."""

    def __init__(self, data, note="kept"):
        super().__init__(data)
        self.note = note


KINDS = {
    "a UserDict": UserDict,
    "one with attributes": Encoding,
    "read-only": MappingProxyType,
    "in a dict": lambda d: {"inside": Encoding(d)},
    "in another one": lambda d: Encoding({"inside": Encoding(d)}),
}


@pytest.mark.parametrize("way", ["passes", "train_step"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_that_is_no_dict_is_split(kind, way):
    results = []
    for make in (dict, KINDS[kind]):
        model, opt = fresh(num_micro_batches=2)
        x, y = batch(6)
        whole, seen = make({"x": x, "y": y}), []

        def loss_fn(part, model=model, seen=seen):
            seen.append(part)
            part = part.get("inside", part)
            return loss_of(model, part["x"], part["y"])

        if way == "passes":
            for part in opt.passes(whole):
                loss_fn(part).backward()
            opt.step()
        else:
            opt.train_step(loss_fn, whole)
        results.append(weights(model))
        if isinstance(whole, Encoding):
            assert {(type(part), part.note) for part in seen} == {(Encoding, "kept")}
    assert same_bits(*results)


def test_a_mapping_with_something_that_cannot_be_split_is_refused():
    _, opt = fresh(num_micro_batches=2)
    with pytest.raises(TypeError, match="got a str"):
        opt.passes(Encoding({"x": torch.ones(4), "text": "several words"}))


# ---- wrappers --------------------------------------------------------------------------------------------------------


class Wrapper:
    def __init__(self, inner, name="optimizer"):
        setattr(self, name, inner)


def test_the_optimizer_is_found_in_any_wrapper():
    model, opt = fresh()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for wrapped in (opt, Wrapper(opt), Wrapper(Wrapper(opt, "_optimizer")), Wrapper(opt, "optim"), scheduler):
        assert find(wrapped) is opt
    for part in msam_kernels.passes(Wrapper(opt), *batch()):
        loss_of(model, *part).backward()
    opt.step()
    assert opt.steps == 1


def test_where_there_is_none_the_error_names_what_there_is():
    model = mlp()
    loops = Wrapper(None)
    loops.optimizer = loops
    for wrapped, got in (
        (Wrapper(Adam(model.parameters())), "a Wrapper around a Adam"),
        (loops, "a Wrapper"),
        (model, "a Sequential"),
        (None, "None"),
    ):
        with pytest.raises(TypeError, match=f"there is no MicroBatchSAM in it, got {got}: make one"):
            msam_kernels.passes(wrapped, *batch())


@pytest.mark.parametrize("of", ["the optimizer", "its base"])
def test_torchs_own_step_that_only_makes_state_is_not_told(of):
    """``get_state_dict`` steps a fresh optimizer on gradients that are zero."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = mlp()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), strict=True)
    before = weights(model)
    _, state = get_state_dict(model, opt if of == "the optimizer" else opt.base_optimizer)
    assert state["state"]
    assert opt.steps == 0
    assert same_bits(model.parameters(), before)
