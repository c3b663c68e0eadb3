# SPDX-License-Identifier: Apache-2.0
"""The loops over parameters of gradients.py: in the extension and in Python they say the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from msam_kernels import backends, gradients
from plain import DEVICE

FUNCTIONS = (
    "collect_grads",
    "have_grads",
    "current_grads",
    "set_grads",
    "without_own_memory",
    "joined",
    "memory_layout",
    "has_layout",
    "holds",
)


@pytest.fixture(params=["extension", "Python"])
def of(request):
    """The functions by name, of one of the two."""
    if request.param == "extension":
        request.getfixturevalue("extension")
        return {name: getattr(backends.extension, name) for name in FUNCTIONS}
    return {name: getattr(gradients, f"_{name}") for name in FUNCTIONS}


def collected(of, params: list[nn.Parameter], placeholder: torch.Tensor, clear: bool):
    """Of parameters that are served in one list, and in one group."""
    groups = [{"params": params}]
    layout = of["memory_layout"](groups, [params])
    assert of["have_grads"](groups, layout) == any(p.grad is not None for p in params)
    (grads,), regular, absent = of["collect_grads"](groups, layout, [placeholder], clear)
    return grads, regular, absent


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]


def with_gradients(*kinds: str) -> list[nn.Parameter]:
    params = parameters(*[(3, 4)] * len(kinds))
    make = {
        "none": lambda p: None,
        "dense": torch.randn_like,
        "transposed": lambda p: torch.randn(4, 3, device=DEVICE).t(),
        "of a graph": lambda p: torch.randn_like(p).requires_grad_() * 2,
    }
    for p, kind in zip(params, kinds, strict=True):
        p.grad = make[kind](p)
    return params


GRADIENTS = {
    "nobody has one": ["none", "none"],
    "all": ["dense"] * 20,
    "some": ["none", "dense", "dense", "none", "dense"],
    "another memory order": ["dense", "transposed"],
    "with a graph": ["of a graph", "dense"],
    "no parameters": [],
}


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("kinds", GRADIENTS)
def test_gradients_are_collected_and_what_is_odd_is_left_to_the_caller(kinds, clear, of):
    params = with_gradients(*GRADIENTS[kinds])
    before, versions = [p.grad for p in params], [p._version for p in params]
    placeholder = torch.empty(0, device=DEVICE)
    grads, regular, absent = collected(of, params, placeholder, clear)
    assert [g is (placeholder if b is None else b) for g, b in zip(grads, before, strict=True)] == [True] * len(params)
    assert absent == before.count(None)
    odd = kinds in ("another memory order", "with a graph")
    assert not (regular and odd)
    if regular:  # only then is anything changed
        assert [p._version - v for p, v in zip(params, versions, strict=True)] == [b is not None for b in before]
        assert [p.grad for p in params] == ([None] * len(params) if clear else before)
    else:
        assert [p.grad for p in params] == before
        assert [p._version for p in params] == versions


@pytest.mark.parametrize("kinds", GRADIENTS)
def test_gradients_are_taken_out_and_put_back(kinds, of):
    params = with_gradients(*GRADIENTS[kinds])
    before = [p.grad for p in params]
    taken = of["current_grads"](params)
    assert list(taken) == (before if any(g is not None for g in before) else [])
    of["set_grads"](params, [])
    assert [p.grad for p in params] == [None] * len(params)
    of["set_grads"](params, taken)
    assert [p.grad for p in params] == before
    of["set_grads"](params, taken)  # where they are already
    assert [p.grad for p in params] == before


def test_collected_gradients_are_put_back(of):
    params = with_gradients("dense", "dense")
    before = [p.grad for p in params]
    grads, _, _ = collected(of, params, torch.empty(0, device=DEVICE), True)
    of["set_grads"](params, grads)
    assert [p.grad for p in params] == before


def test_a_gradient_has_memory_of_its_own_or_is_named(of):
    whole = torch.randn(40, device=DEVICE)
    own, held = torch.randn(3, device=DEVICE), torch.randn(4, device=DEVICE)
    holder = held.view(2, 2)
    grads = [own, None, whole[:10], whole[5:15], whole[20:30], held, torch.empty(0, device=DEVICE)]
    assert list(of["without_own_memory"](grads, False)) == [3]
    assert sorted(of["without_own_memory"](grads, True)) == [2, 3, 4, 5]
    assert holder.numel() == 4
    assert list(of["without_own_memory"]([], True)) == []
    many = [torch.randn(2, device=DEVICE) for _ in range(300)]
    assert list(of["without_own_memory"]([*many, many[7]], False)) == [300]
    for whole in (False, True):
        assert list(of["without_own_memory"](many, whole)) == []
        (found,) = of["without_own_memory"]([*many, from_dlpack(many[7])], whole)  # in another storage
        assert found == 300 or (whole and found == 7)  # of which some versions of torch hold the first one, too


def test_lists_are_joined_in_order(of):
    a, b = parameters((2,), (3,)), parameters((4,), (5,), (6,))
    inner = of["joined"]([b])
    assert [t.shape for t in of["joined"]([a, [], inner])] == [(2,), (3,), (4,), (5,), (6,)]
    assert list(of["joined"]([])) == []


def test_tensors_are_a_sequence_of_the_same_objects(of):
    a = parameters((2,), (3,), (4,))
    tensors = of["joined"]([a])
    assert len(tensors) == 3
    assert [t is p for t, p in zip(tensors, a, strict=True)] == [True] * 3
    assert tensors[0] is a[0]
    assert tensors[-1] is a[2]
    assert [t is p for t, p in zip(tensors[1:], a[1:], strict=True)] == [True] * 2
    with pytest.raises(IndexError):
        tensors[3]


MOVES = {
    "nothing": lambda a, b, groups: None,
    "its memory": lambda a, b, groups: setattr(a, "data", a.data.clone()),
    "its shape": lambda a, b, groups: setattr(a, "data", a.data.view(4, 3)),
    "its memory order": lambda a, b, groups: setattr(a, "data", a.data.as_strided((3, 4), (1, 3))),
    "another one in its place": lambda a, b, groups: groups[0]["params"].__setitem__(0, parameters((3, 4))[0]),
    "one more": lambda a, b, groups: groups[0]["params"].append(parameters((2,))[0]),
    "one less": lambda a, b, groups: groups[1]["params"].pop(),
    "a group more": lambda a, b, groups: groups.append({"params": []}),
    "the frozen one's memory": lambda a, b, groups: setattr(b, "data", b.data.clone()),
    "the frozen one is unfrozen": lambda a, b, groups: b.requires_grad_(),
    "the frozen one has a gradient": lambda a, b, groups: setattr(b, "grad", torch.ones_like(b)),
    "no tensor": lambda a, b, groups: groups[0]["params"].__setitem__(0, "w"),
    "no list": lambda a, b, groups: groups[0].__setitem__("params", "w"),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_layout_is_that_of_these_parameters_where_they_are(move, of):
    served = parameters((3, 4), *[(2, 2)] * 30)
    frozen = parameters((5,))[0].requires_grad_(False)
    groups = [{"params": [*served[:4], frozen]}, {"params": served[4:]}]
    layout = of["memory_layout"](groups, [served])
    assert of["has_layout"](groups, layout)
    MOVES[move](served[0], frozen, groups)
    same = move in ("nothing", "the frozen one's memory")
    assert of["has_layout"](groups, layout) == same
    assert of["have_grads"](groups, layout) is (False if same else None)
    served[5].grad = torch.ones_like(served[5])
    versions = [p._version for p in served]
    assert of["have_grads"](groups, layout) is (True if same else None)
    if not same:
        assert of["collect_grads"](groups, layout, [torch.empty(0)], True) is None
        assert served[5].grad is not None
        assert [p._version for p in served] == versions


def test_a_layout_knows_the_type_of_its_memory(of):
    p = nn.Parameter(torch.randn(3, dtype=torch.bfloat16, device=DEVICE))
    groups = [{"params": [p]}]
    layout = of["memory_layout"](groups, [[p]])
    assert of["has_layout"](groups, layout)
    p.data = p.data.view(torch.float16)  # the same bytes
    assert not of["has_layout"](groups, layout)


def test_gradients_come_by_list_in_the_order_of_the_lists(of):
    params = with_gradients("dense", "none", "dense", "dense", "none", "dense")
    groups = [{"params": [params[3], params[0], params[1]]}, {"params": [params[5], params[4], params[2]]}]
    lists, nothing = [params[:2], [], params[2:]], [torch.empty(0, device=DEVICE) for _ in range(3)]
    layout = of["memory_layout"](groups, lists)
    found, _, absent = of["collect_grads"](groups, layout, nothing, False)
    wanted = [[none if p.grad is None else p.grad for p in ps] for ps, none in zip(lists, nothing, strict=True)]
    assert [[g is w for g, w in zip(got, ws, strict=True)] for got, ws in zip(found, wanted, strict=True)] == [
        [True] * len(ps) for ps in lists
    ]
    assert absent == 2


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("kinds", [("transposed", "none", "of a graph", "dense"), ("dense", "none", "dense", "dense")])
def test_what_is_collected_has_the_values_of_the_gradients(kinds, clear, of):
    loops = gradients.Loops(**{name: of[name] for name in gradients.Loops._fields})
    params = with_gradients(*kinds)
    grads, versions = [p.grad for p in params], [p._version for p in params]
    groups, lists = [{"params": params}], [params[:2], params[2:]]
    nothing = [torch.empty(0, device=DEVICE) for _ in lists]
    found, regular, absent = loops.collect_grads(groups, loops.memory_layout(groups, lists), nothing, clear)
    if not regular:
        found = gradients.made_regular(found, lists, nothing, loops, clear=clear)
    assert absent == 1
    for p, version, wanted, got in zip(params, versions, grads, [*found[0], *found[1]], strict=True):
        assert p._version - version == (wanted is not None)
        assert p.grad is (None if clear else wanted)
        if wanted is None:
            assert got is nothing[0]
        else:
            assert torch.equal(got, wanted)
            assert (got.stride(), got.requires_grad) == (p.stride(), False)


def test_a_state_holds_what_it_held(of):
    entries = [{"a": torch.ones(1), "b": 2.0} for _ in range(3)]
    state = dict(enumerate(entries))
    dicts, keys = [*entries, *entries], ["a"] * 3 + ["b"] * 3
    values = [d[k] for d, k in zip(dicts, keys, strict=True)]

    def holds() -> bool:
        return of["holds"](state, entries, dicts, keys, values, None)

    assert holds()
    state[1] = dict(entries[1])  # equal, but another one
    assert not holds()
    state[1] = entries[1]
    assert holds()
    entries[2]["a"] = entries[2]["a"].clone()
    assert not holds()
    entries[2]["a"] = values[2]
    del entries[0]["b"]
    assert not holds()
    entries[0]["b"] = values[3]
    assert holds()
    state[3] = {}
    assert not holds()


def test_a_state_holds_tensors_where_they_lay(of):
    entries = [{"a": torch.ones(n, 2)} for n in range(1, 4)]
    values = [entry["a"] for entry in entries]
    layout = of["memory_layout"]([{"params": values}], [values])

    def holds() -> bool:
        return of["holds"](entries, entries, entries, ["a"] * 3, values, layout)

    assert holds()
    old = values[1].detach()
    for other in (old.clone(), old.t(), old[:1]):  # elsewhere, in another order, of another shape
        values[1].data = other
        assert not holds()
        values[1].data = old
        assert holds()
    entries[2]["a"] = values[2].clone()
    assert not holds()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradients.joined([["w"]]), "expected a list of tensors, got str in it"),
        (lambda: gradients.joined([(torch.ones(1),)]), "expected a list of tensors, got tuple"),
        (lambda: gradients.joined([[torch.ones(1), None]]), "expected a list of tensors, got NoneType in it"),
        (lambda: gradients.set_grads(parameters((2,)), [3]), "expected a list of tensors, got int in it"),
        (lambda: backends.extension.gram([1.0], torch.zeros(1, 5).long(), count=1), "got float in it"),
    ],
    ids=["joined", "a tuple", "None", "set_grads", "an operator"],
)
def test_what_is_no_list_of_tensors_is_refused_by_its_type(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.usefixtures("extension")
def test_collected_gradients_are_a_sequence_that_keeps_them_alive():
    params = [nn.Parameter(torch.zeros(n)) for n in (3, 0, 2)]
    for p in params:
        p.grad = torch.full_like(p, 7.0)
    groups = [{"params": params}]
    layout = backends.extension.memory_layout(groups, [params])
    (grads,), _, absent = backends.extension.collect_grads(groups, layout, [torch.empty(0)], True)
    assert (len(grads), absent, [p.grad for p in params]) == (3, 0, [None] * 3)
    again = backends.extension.joined([grads, list(grads)[:1]])
    first = grads[0]
    del grads
    assert [len(g) for g in again] == [3, 0, 2, 3]
    assert all(again[i] is first for i in (0, -1, 3))
    assert [len(g) for g in again[1:3]] == [0, 2]
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            again[wrong]
    with pytest.raises(TypeError, match="slices"):
        again["0"]
    with pytest.raises(TypeError, match="cannot create"):
        backends.extension.Tensors()
