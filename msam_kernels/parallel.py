# SPDX-License-Identifier: Apache-2.0
"""All micro-batches of a step in one forward and backward pass, each with its own weights: ``MicroBatchSAM(parallel=...)``.

The loss runs under ``torch.func.vmap`` over stacked weights, and autograd differentiates what that became: batched
multiplications and grouped convolutions, which it knows. The gradient of the sum of the losses by weights ``[m, *shape]``
is each micro-batch's own. A parameter's place in its module holds its stack while the loss runs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from threading import get_ident
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from ._checks import check_integer
from ._torch import (
    below_vmap,
    buffers_of,
    forget_casts,
    has_backward_hooks,
    has_hooks,
    leave_mode,
    modules_of,
    parameters_of,
    tree_flatten,
    tree_unflatten,
    tuple_of,
    versions_of,
)
from .batches import MicroBatches, shapes_of
from .compiled import Compiled
from .gradients import Vectors, own_memory, regular_stack
from .store import Store

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
#: By the forward of layers that keep running statistics: whether they count the times that they did.
COUNTS = {nn.BatchNorm1d.forward: True, nn.InstanceNorm1d.forward: False}
SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention
LINEAR: Callable[..., Tensor] = F.linear
EMBEDDING: Callable[..., Tensor] = F.embedding
MULTI_HEAD_ATTENTION: Callable[..., Any] = F.multi_head_attention_forward
CROSS_ENTROPY: Callable[..., Tensor] = F.cross_entropy
INSTANCE_NORM: Callable[..., Tensor] = F.instance_norm
RRELU: Callable[..., Tensor] = F.rrelu
SEQUENTIAL = "train it sequentially, with parallel=False"


#: ``MicroBatchSAM``'s argument: never, all micro-batches at once, so many at once, or whichever way is faster.
Parallel = bool | int | Literal["auto"]


def check_parallel(parallel: Any, model: nn.Module | None, compile: Any = False, ascent: Any = "") -> None:
    """Refuse what says no way.

    Raises:
        TypeError, ValueError: the value, and what it may be.
    """
    if isinstance(parallel, str):
        if parallel != "auto":
            raise ValueError(f"parallel must be a bool, a number of micro-batches or 'auto', got {parallel!r}")
    elif not isinstance(parallel, bool):
        check_integer("parallel", parallel, 1)
    if not isinstance(compile, bool):
        raise TypeError(f"compile must be a bool, got {compile!r}")
    if compile and not parallel:
        raise ValueError(
            "compile=True is for parallel passes: give parallel=True, or what else it may be, and model too"
        )
    if parallel and not isinstance(ascent, str):
        raise ValueError(
            f"parallel={parallel!r} runs the micro-batches of this rank, each with a perturbation of its own: ascent must be "
            f"'local' for that, or parallel=False, got {ascent!r}"
        )
    if parallel and model is None:
        raise ValueError(
            f"parallel={parallel!r} needs the model, in which every micro-batch gets weights of its own: give model=model too"
        )


class Refused(RuntimeError):
    """The micro-batches of a step cannot run in parallel. Nothing was changed."""


class Auto:
    """Which way is faster: both take turns in the first steps, of which the host waits for the device.

    Only steps of one kind are compared, the first that came: as many micro-batches of the same shapes, and the same plan.
    """

    TRIALS = 6  # of each way; the first does not count, as it makes what both need
    GAIN = 0.95  # of the sequential time: copies of the weights are not worth less

    def __init__(self) -> None:
        self.decision: bool | None = None
        self._kind: object = None
        self._seconds: dict[bool, list[float]] = {False: [], True: []}

    def way(self, kind: object, capturing: bool) -> bool:
        """Whether the next step is parallel. One that is captured cannot be timed: it is, if that has worked."""
        if self.decision is not None:
            return self.decision
        if capturing:
            return bool(self._seconds[True])
        self._kind = kind if self._kind is None else self._kind
        return kind == self._kind and len(self._seconds[True]) < len(self._seconds[False])

    def refused(self, refusal: Exception) -> None:
        """It cannot be parallel."""
        self.decision = False
        warnings.warn(f"parallel='auto' trains sequentially: {refusal}", stacklevel=2)

    @contextmanager
    def timed(self, way: bool, kind: object, devices: Sequence[torch.device], capturing: bool) -> Iterator[None]:
        """Around a step, to be timed if that is still to be done."""
        if self.decision is not None or capturing or kind != self._kind:
            yield
            return
        _wait_for(devices)
        start = time.perf_counter()
        yield
        _wait_for(devices)
        self._seconds[way].append(time.perf_counter() - start)
        if self.decision is None and all(len(s) >= self.TRIALS for s in self._seconds.values()):
            # The least is what a step takes; the rest is what else the machine did.
            sequential, parallel = (min(self._seconds[w][1:]) for w in (False, True))
            self.decision = parallel < self.GAIN * sequential


def _wait_for(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)


# -- what vmap lacks ---------------------------------------------------------------------------------------------------------


def _first(t: Tensor, dim: int | None, n: int) -> Tensor:
    """The dimension of the micro-batches first."""
    if dim == 0:  # a view would be one for its gradient, too, which then looks as if somebody else held it
        return t
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)


class _Supplied(TorchFunctionMode):
    """Functions that run another way under vmap. What stands in for them is called without this mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return SUPPLIED.get(function, function)(*args, **(kwargs or {}))


class _ByName:
    """What stands in ``torch.nn.functional`` while a function of torch looks it up there, where no mode sees it."""

    def __init__(self, function: Callable[..., Tensor], supplied: Callable[..., Tensor], thread: int):
        self.function, self._supplied, self._thread = function, supplied, thread

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Other threads find what they would."""
        return (self._supplied if get_ident() == self._thread else self.function)(*args, **kwargs)


def _supply(thread: int | None) -> None:
    """Put them there for that thread, or with None what was there before, which may be somebody else's."""
    for function in (SDPA, LINEAR):
        name = function.__name__
        there = getattr(F, name)
        if thread is None:
            setattr(F, name, there.function if isinstance(there, _ByName) else there)
        elif not isinstance(there, _ByName):
            supplied = SUPPLIED[function] if there is function else partial(_with_mode, there)
            setattr(F, name, _ByName(there, supplied, thread))


def _with_mode(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with _Supplied():
        return function(*args, **kwargs)


def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    _supply(get_ident())
    try:
        return MULTI_HEAD_ATTENTION(*args, **kwargs)
    finally:
        _supply(None)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would make of it; None where it leaves it as it is."""
    if not (torch.is_autocast_enabled(x.device.type) and x.is_floating_point()) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def _embedding(
    x: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """Vmap takes the padding for that of the first micro-batch alone."""
    if max_norm is not None or sparse:
        what = "max_norm writes to the weights" if max_norm is not None else "gradients are sparse"
        raise Refused(f"an embedding's {what}, and cannot run for several micro-batches at once: {SEQUENTIAL}")
    out = EMBEDDING(x, weight, None, None, norm_type, scale_grad_by_freq, False)
    if padding_idx is None:
        return out
    padding = (x == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, out.detach(), out)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def supplied(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """What vmap makes of it is nothing that autocast knows."""
        dtype = _autocast_dtype(x)
        if dtype is None:
            return function(x, weight, bias, *args, **kwargs)
        out = function(x.to(dtype), weight.to(dtype), None, *args, **kwargs)
        return out if bias is None else out + bias.view(-1, *(1,) * (weight.dim() - 2)).to(dtype)

    return supplied


class _Product(torch.autograd.Function):
    """x_i·w_iᵀ, x ``[n, rows, in]`` and w ``[n, out, in]``; the gradient by w has the memory order of w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        if w.stride(0) == 0:  # the same for all
            return LINEAR(x.flatten(0, 1), w[0]).view(*x.shape[:2], -1)
        return torch.bmm(x, w.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (g.flatten(0, 1) @ w[0]).view_as(x) if w.stride(0) == 0 else torch.bmm(g, w)
        return by_x, torch.bmm(g.mT, x) if ctx.needs_input_grad[1] else None


_product: Callable[[Tensor, Tensor], Tensor] = _Product.apply


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, whose gradients vmap would leave transposed, each to be copied, and its output wider than autocast's."""

    def of_stacks(n: int, dims: Sequence[int | None], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = _autocast_dtype(x)
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        x = _first(x, dims[0], n)
        if dims[1] is None:
            out = LINEAR(x, weight)
        else:
            rows = x.reshape(n, -1, x.shape[-1])
            out = _product(rows, _first(weight, dims[1], n)).view(*x.shape[:-1], -1)
        if bias is not None:
            bias = _first(bias, dims[2], n).to(out.dtype)
            out = out + bias.view(n, *(1,) * (out.dim() - 2), -1)
        return out

    return below_vmap(of_stacks, LINEAR, x, weight, bias)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention has no weights: the micro-batches are as many more samples of its batch. Vmap would loop over them."""
    options |= {"dropout_p": dropout_p, "is_causal": is_causal}

    def alone(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return SDPA(query, key, value, mask, **options)

    def of_stacks(
        n: int, dims: Sequence[int | None], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        stacks = [_first(t, dim, n) for t, dim in zip((query, key, value), dims, strict=False)]
        rank = max(t.dim() for t in stacks)
        # Dimensions are counted from the last, but for that of the micro-batches.
        stacks = [t.reshape(n, *(1,) * (rank - t.dim()), *t.shape[1:]) for t in stacks]
        own = 3 if options.get("enable_gqa") else 2  # of which the three may have different ones
        common = torch.broadcast_shapes(*(t.shape[1:-own] for t in stacks))
        stacks = [t.expand(n, *common, *t.shape[-own:]) for t in stacks]
        if mask is not None and rank > 3:
            mask = _first(mask, dims[3], n)
            mask = mask.reshape(n, *(1,) * (rank - mask.dim()), *mask.shape[1:])
            mask = mask.expand(n, stacks[0].shape[1], *mask.shape[2:]).flatten(0, 1)
        elif mask is not None and dims[3] is not None:
            mask = _first(mask, dims[3], n)
        if rank == 3:  # without a batch of their own
            return alone(stacks[0], stacks[1], stacks[2], mask)
        query, key, value = (t.flatten(0, 1) for t in stacks)
        out = alone(query, key, value, mask)
        return out.view(n, -1, *out.shape[1:])

    return below_vmap(of_stacks, alone, query, key, value, attn_mask)


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Of weighted classes with smoothed labels torch selects by a mask, which no vmap can."""
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if weight is None or not label_smoothing or target.is_floating_point() or (size_average, reduce) != (None, None):
        return CROSS_ENTROPY(x, target, weight, size_average, reduce=reduce, reduction=reduction, **options)
    classes = 1 if x.dim() > 1 else 0
    shape = [-1 if d == classes else 1 for d in range(x.dim())]
    logs, ignored = x.log_softmax(classes), target == ignore_index
    one = F.nll_loss(logs, target, weight, ignore_index=ignore_index, reduction="none")
    all_ = -(logs * weight.view(shape)).sum(classes).masked_fill(ignored, 0)
    losses = (1 - label_smoothing) * one + label_smoothing / x.shape[classes] * all_
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / weight[target.masked_fill(ignored, 0)].masked_fill(ignored, 0).sum()


def _gates(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _linear(x, w_ih, b_ih), _linear(h, w_hh, b_hh)


def _rnn_tanh_cell(*args: Any) -> Tensor:
    x, h = _gates(*args)
    return (x + h).tanh()


def _rnn_relu_cell(*args: Any) -> Tensor:
    x, h = _gates(*args)
    return (x + h).relu()


def _gru_cell(x: Tensor, h: Tensor, *weights: Any) -> Tensor:
    (r, z, n), (h_r, h_z, h_n) = (gates.chunk(3, -1) for gates in _gates(x, h, *weights))
    z = (z + h_z).sigmoid()
    return (1 - z) * (n + (r + h_r).sigmoid() * h_n).tanh() + z * h


def _lstm_cell(x: Tensor, state: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = sum(_gates(x, h, *weights)).chunk(4, -1)  # type: ignore[union-attr]
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _rrelu(
    x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if not training:
        return F.leaky_relu(x, (lower + upper) / 2, inplace)
    out = torch.where(x > 0, x, x * (lower + (upper - lower) * torch.rand_like(x)))
    return x.copy_(out) if inplace else out


def _instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Torch repeats running statistics by sample, where vmap loses sight of them. Each is changed once, which is counted."""
    if not use_input_stats or running_mean is None or running_var is None:
        return INSTANCE_NORM(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    with torch.no_grad():
        rows = x.flatten(2)
        for running, now in ((running_mean, rows.mean(2).mean(0)), (running_var, rows.var(2).mean(0))):
            running.add_(momentum * (now.to(running.dtype) - running))
    return INSTANCE_NORM(x, None, None, weight, bias, True, momentum, eps)


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
SUPPLIED: dict[Callable[..., Any], Callable[..., Any]] = {
    **{SDPA: _attention, LINEAR: _linear, EMBEDDING: _embedding, MULTI_HEAD_ATTENTION: _multi_head_attention},
    **{CROSS_ENTROPY: _cross_entropy, RRELU: _rrelu, INSTANCE_NORM: _instance_norm},
    **{torch.lstm_cell: _lstm_cell, torch.gru_cell: _gru_cell},
    **{torch.rnn_tanh_cell: _rnn_tanh_cell, torch.rnn_relu_cell: _rnn_relu_cell},
    **{function: _convolution(function) for function in CONVOLUTIONS},
}


# -- statistics of norms ------------------------------------------------------------------------------------------------------


class _Statistics:
    """The running statistics of one BatchNorm or InstanceNorm, which every micro-batch moves on, one after the other."""

    NAMES, COUNTER = ("running_mean", "running_var"), "num_batches_tracked"

    def __init__(self, named: Callable[[nn.Module], str], prefix: str, module: Norm):
        if module.momentum is None:
            raise Refused(
                f"{named(module)} with momentum=None, keeps a mean that depends on the number of batches "
                f"so far: give it a momentum, or {SEQUENTIAL}"
            )
        if type(module).forward not in COUNTS:
            raise Refused(f"{named(module)} has a forward of its own: {SEQUENTIAL}")
        self.counts = COUNTS[type(module).forward]
        self.prefix, self.module, self.momentum = prefix, module, float(module.momentum)
        # By pass: how often it ran for each micro-batch, and its stacks.
        self.moved: list[tuple[int, list[Tensor]]] = []

    def stacks(self, n: int) -> list[Tensor]:
        """What a pass moves on: (mean, variance, the number of times that it does)."""
        running = [buffers_of(self.module)[name].detach().expand(n, -1).clone() for name in self.NAMES]  # type: ignore[union-attr]
        return [*running, torch.zeros((), dtype=torch.int64)]  # on the host, where nobody waits for it

    def move(self, stacks: list[Tensor]) -> None:
        *running, times = stacks
        self.moved.append((int(times) if self.counts else versions_of(running)[0], running))

    @torch.no_grad()
    def commit(self) -> None:
        """r ← (1 - f)ᵏ·r + s for each micro-batch in turn, where it ran k times; (1 - f)ᵏ·r₀ + s is known of each."""
        table = buffers_of(self.module)
        for i, name in enumerate(self.NAMES):
            running = table[name]
            assert running is not None
            first, now = running.clone(), running
            for times, stacks in self.moved:
                each, keep, n = stacks[i], (1 - self.momentum) ** times, len(stacks[i])
                decay = keep ** torch.arange(n - 1, -1, -1, device=each.device, dtype=each.dtype)
                now = keep**n * now + (decay.unsqueeze(1) * (each - keep * first)).sum(0)
            running.copy_(now)
        counter = table.get(self.COUNTER)
        if counter is not None and self.counts:
            counter.add_(sum(times * len(stacks[0]) for times, stacks in self.moved))


# -- the passes ----------------------------------------------------------------------------------------------------------------


class ParallelPasses:
    """The passes of one step.

    Args:
        model: whose parameters the losses are computed with.
        store: their memory.
        whole: the micro-batches.
        most: run at once, at most.
        compiled: what computes the losses, instead of the model as it is written.
        held_back: whether a DistributedDataParallel is not to reduce: one that is must see every pass.

    Raises:
        Refused: something in the model, or of its parameters, needs the passes one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        whole: MicroBatches,
        most: int,
        compiled: Compiled | None = None,
        held_back: bool = False,
    ):
        self._held_back = held_back
        self._model, self._store, self._whole, self._compiled = model, store, whole, compiled
        self._leaves, (self._spec, *others) = zip(*(tree_flatten(part) for part in whole.parts), strict=True)
        if any(spec != self._spec for spec in others):
            raise Refused(f"the micro-batches have different structures: {SEQUENTIAL}")
        self._arguments = self._spec if whole.several else tuple_of(self._spec)
        self.turns = list(self._turns(most))
        self._kept: list[tuple[dict[str, Any], str, Any]] = []  # what stood in the modules' tables
        self._caches: bool | None = None  # autocast's setting, where it was changed
        self._supplied = _Supplied()
        # By parameter that is trained: the tables of modules, and its names there and in the model.
        self._places: list[list[tuple[dict[str, Any], str, str]]] = []
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._statistics: list[_Statistics] = []
        self._look_around()

    def _turns(self, most: int) -> Iterator[range]:
        """Micro-batches that run at once: as many in a row as are of one size."""
        shapes = list(map(shapes_of, self._leaves))
        begin = 0
        for i in range(1, len(shapes) + 1):
            if i == len(shapes) or i - begin == most or shapes[i] != shapes[begin]:
                yield range(begin, i)
                begin = i

    def _look_around(self) -> None:
        """Find what the passes put into the modules, or watch there; refuse what cannot be."""
        if self._store.is_sharded:
            raise Refused(
                f"sharded parameters (DTensors) are gathered by hooks of modules, which know one pass at a time: {SEQUENTIAL}"
            )
        for flat in self._store.flats:
            if not flat.flatten:
                raise Refused(
                    f"parameters that stay where they are cannot have copies beside them: flatten=True, or {SEQUENTIAL}"
                )
        index = {id(p): k for k, p in enumerate(p for flat in self._store.flats for p in flat.params)}
        self._places = [[] for _ in index]
        for prefix, module in modules_of(self._model):
            reduces = isinstance(module, nn.parallel.DistributedDataParallel) and not self._held_back
            if reduces or isinstance(module, nn.DataParallel):
                raise Refused(f"{self._named(module)} must see every pass: {SEQUENTIAL}")
            if has_backward_hooks(module):
                raise Refused(f"{self._named(module)} has backward hooks, which would not run: {SEQUENTIAL}")
            table: dict[str, Any] = parameters_of(module)
            for key, p in table.items():
                if id(p) in index:
                    if has_hooks(p):
                        raise Refused(f"{self._name_of(p)} has hooks, which would not run: {SEQUENTIAL}")
                    self._places[index[id(p)]].append((table, key, prefix + key))
                elif p is not None and p.requires_grad:
                    raise Refused(
                        f"{self._name_of(p)} requires a gradient, which it would not get, as it is not among those of this "
                        f"optimizer: p.requires_grad_(False), or {SEQUENTIAL}"
                    )
            buffers = buffers_of(module)
            if buffers:
                self._buffers += [(module, key, t) for key, t in buffers.items() if t is not None]
                if isinstance(module, Norm) and module.training and module.running_mean is not None:
                    self._statistics.append(_Statistics(self._named, prefix, module))

    def run(self, which: range, weights: Sequence[Tensor | None] | None) -> tuple[list[Tensor], Vectors]:
        """(losses, gradients) of these micro-batches; the gradients are stacks ``[len(which), *shape]``.

        Args:
            weights: by flat, ``[len(which), kept]``; None for w, in the pass that moves statistics on.
        """
        n, flats = len(which), self._store.flats
        params = [p for flat in flats for p in flat.params]
        stacks = [s for f, flat in enumerate(flats) for s in flat.stacked(None if weights is None else weights[f], n)]
        stacks = [s.requires_grad_(p.requires_grad) for s, p in zip(stacks, params, strict=True)]
        running = [s.stacks(n) for s in self._statistics]
        columns = [
            torch.stack(column) if isinstance(column[0], Tensor) else column[0]
            for column in zip(*(self._leaves[i] for i in which), strict=True)
        ]
        versions = versions_of(t for *_, t in self._buffers)
        forget_casts()
        try:
            self._caches = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(False)  # it would keep casts of stacks
            with torch.enable_grad():
                losses = self._stacked_losses(n, stacks, running, columns)
        except Exception as error:
            refusal = self._refused(self._culprit(error), error, n)
            if refusal is error:
                raise
            raise refusal from error
        finally:
            self.put_back()
        after = versions_of(t for *_, t in self._buffers)
        for (module, key, t), old, new in zip(self._buffers, versions, after, strict=True):
            if old != new or buffers_of(module).get(key) is not t:
                raise Refused(
                    f"{self._named(module)} changes its buffer {key}, by one micro-batch after the other: {SEQUENTIAL}"
                )
        if losses.dim() != 1 or not losses.requires_grad:
            raise Refused(
                f"the loss of a micro-batch must be one number that depends on the parameters, got shape "
                f"{tuple(losses.shape[1:])}: {SEQUENTIAL}"
            )
        with torch.enable_grad():
            total = (losses if self._whole.scale is None else self._whole.scale(losses)).sum()
        trained = [k for k, s in enumerate(stacks) if s.requires_grad]
        missed = [p for p in params if p.requires_grad]
        wanted = [*(stacks[k] for k in trained), *missed]
        try:
            found = list(torch.autograd.grad(total, wanted, allow_unused=True))
        except RuntimeError as error:  # e.g. a checkpoint, which would run its part of the forward again, without vmap
            raise self._refused("the backward of the loss", error, n) from error
        for p, g in zip(missed, found[len(trained) :], strict=True):
            if g is not None:
                raise Refused(
                    f"{self._name_of(p)} is used other than by its name in its module, as nn.LSTM does: there is one of it "
                    f"for all micro-batches; {SEQUENTIAL}"
                )
        # Those of the operands of a sum are one tensor, and some may be somebody else's.
        own = own_memory(found[: len(trained)], whole=True)
        if weights is None:
            for s, moved in zip(self._statistics, running, strict=True):
                s.move(moved)
        return list(losses.detach().unbind()), self._vectors(dict(zip(trained, own, strict=True)))

    def _stacked_losses(self, n: int, stacks: list[Tensor], running: list[list[Tensor]], columns: list[Any]) -> Tensor:
        """The loss of each of n micro-batches; ``running`` moves on."""
        compiled = self._compiled
        failed: Exception | None = None
        if compiled is not None and compiled.works and not all(norm.counts for norm in self._statistics):
            failed = Refused("nothing counts how often an InstanceNorm moves its running statistics on there")
        elif compiled is not None and compiled.works:
            # One name of each: tied ones follow.
            pairs = zip(self._places, stacks, strict=True)
            stacked = {name: s for places, s in pairs for _, _, name in places[:1]}
            single = {}
            for norm, (*values, times) in zip(self._statistics, running, strict=True):
                stacked |= {norm.prefix + name: t for name, t in zip(norm.NAMES, values, strict=True)}
                single[norm.prefix + norm.COUNTER] = times
            try:
                return compiled.losses(self._whole.function, stacked, single, columns, self._arguments)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # the compiler's, or that of the loss, which then comes again
                failed = error
                running[:] = [s.stacks(n) for s in self._statistics]
        dims = [0 if isinstance(c, Tensor) else None for c in columns]
        in_dims = (0, [[0, 0, None]] * len(running), dims)
        with self._supplied:
            losses: Tensor = vmap(self._losses, in_dims, randomness="different")(stacks, running, columns)
        if compiled is not None and failed is not None:
            compiled.give_up(failed)
        return losses

    def _losses(self, stacks: list[Tensor], running: list[list[Tensor]], columns: list[Any]) -> Tensor:
        """The loss of one micro-batch, as vmap has it, with its weights and statistics in the modules."""
        for places, s in zip(self._places, stacks, strict=True):
            for table, key, _ in places:
                self._put(table, key, s)
        for norm, values in zip(self._statistics, running, strict=True):
            for name, t in zip((*norm.NAMES, norm.COUNTER), values, strict=True):
                self._put(buffers_of(norm.module), name, t)
        return self._whole.loss_fn(tree_unflatten(columns, self._spec))

    def _put(self, table: dict[str, Any], key: str, value: Any) -> None:
        self._kept.append((table, key, table[key]))
        table[key] = value

    def put_back(self) -> None:
        """Modules hold again what they held, and torch has its own functions and settings. More than once does no harm."""
        while self._kept:
            table, key, value = self._kept[-1]
            table[key] = value
            self._kept.pop()
        _supply(None)
        leave_mode(self._supplied)
        forget_casts()
        if self._caches is not None:
            torch.set_autocast_cache_enabled(self._caches)
            self._caches = None

    def _vectors(self, found: dict[int, Tensor | None]) -> Vectors:
        """What the kernels take."""
        lists, absent, places = [], 0, count()
        for flat in self._store.flats:
            stacks = [found.get(next(places)) for _ in flat.params]
            absent += sum(s is None for s in stacks)
            pairs = zip(flat.params, stacks, strict=True)
            lists.append([flat.absent if s is None else regular_stack(p, s) for p, s in pairs])
        return Vectors(lists, absent)

    def commit(self) -> None:
        """All passes have ended: statistics move on."""
        for s in self._statistics:
            s.commit()
        forget_casts()

    def _name_of(self, p: Tensor) -> str:
        names = [name for name, q in self._model.named_parameters() if q is p]
        return (
            f"parameter {names[0]}" if names else f"a parameter of shape {tuple(p.shape)}, which is not in the model,"
        )

    def _named(self, module: nn.Module) -> str:
        names = [name for name, each in self._model.named_modules() if each is module]
        return f"{names[0] or 'the model'}, a {type(module).__name__},"

    def _culprit(self, error: BaseException) -> str:
        """The innermost module of the model that the error came out of."""
        modules = {id(module): module for module in self._model.modules()}
        found, frame = "the loss", error.__traceback__
        while frame is not None:
            module = modules.get(id(frame.tb_frame.f_locals.get("self")))
            found = found if module is None else self._named(module)
            frame = frame.tb_next
        return found

    @staticmethod
    def _refused(what: str, error: Exception, n: int) -> Exception:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return torch.cuda.OutOfMemoryError(
                f"{error}\n{n} micro-batches ran at once: parallel={max(n // 2, 1)} takes less"
            )
        # What vmap raises; the rest is the user's, as in sequential passes.
        if isinstance(error, Refused) or not (isinstance(error, RuntimeError) or str(error).startswith("vmap(")):
            return error
        return Refused(f"{what} cannot run for several micro-batches at once ({error}): {SEQUENTIAL}")
