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
    parameters_of,
    tree_flatten,
    tree_unflatten,
    versions_of,
)
from .batches import shapes_of
from .gradients import Vectors, own_memory, regular_stack
from .store import Store

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention
LINEAR: Callable[..., Tensor] = F.linear
EMBEDDING: Callable[..., Tensor] = F.embedding
SEQUENTIAL = "train it sequentially, with parallel=False"


#: ``MicroBatchSAM``'s argument: never, all micro-batches at once, so many at once, or whichever way is faster.
Parallel = bool | int | Literal["auto"]


def check_parallel(parallel: Any, model: nn.Module | None) -> None:
    """Refuse what says no way.

    Raises:
        TypeError, ValueError: the value, and what it may be.
    """
    if isinstance(parallel, str):
        if parallel != "auto":
            raise ValueError(f"parallel must be a bool, a number of micro-batches or 'auto', got {parallel!r}")
    elif not isinstance(parallel, bool):
        check_integer("parallel", parallel, 1)
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
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)


class _Supplied(TorchFunctionMode):
    """Functions that run another way under vmap. What stands in for them is called without this mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            _supply(get_ident())
            try:
                return function(*args, **kwargs)
            finally:
                _supply(None)
        return SUPPLIED.get(function, function)(*args, **kwargs)


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


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
SUPPLIED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **{SDPA: _attention, LINEAR: _linear, EMBEDDING: _embedding},
    **{function: _convolution(function) for function in CONVOLUTIONS},
}


# -- statistics of BatchNorm --------------------------------------------------------------------------------------------------


class _Statistics:
    """The running statistics of one BatchNorm, which every micro-batch moves on, one after the other."""

    NAMES = ("running_mean", "running_var")

    def __init__(self, name: str, module: BatchNorm):
        if module.momentum is None:
            raise Refused(
                f"{name} with momentum=None, keeps a mean that depends on the number of batches "
                f"so far: give it a momentum, or {SEQUENTIAL}"
            )
        if type(module).forward is not nn.BatchNorm1d.forward:
            raise Refused(f"{name} has a forward of its own: {SEQUENTIAL}")
        self.module, self.momentum = module, float(module.momentum)
        # By pass: how often it ran for each micro-batch, and its stacks.
        self.moved: list[tuple[int, list[Tensor]]] = []

    def stacks(self, n: int) -> list[Tensor]:
        """What a pass moves on: (mean, variance, the number of times that it does)."""
        running = [buffers_of(self.module)[name].detach().expand(n, -1).clone() for name in self.NAMES]  # type: ignore[union-attr]
        return [*running, torch.zeros((), dtype=torch.int64)]  # on the host, where nobody waits for it

    def move(self, stacks: list[Tensor]) -> None:
        *running, times = stacks
        self.moved.append((int(times), running))

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
        counter = table.get("num_batches_tracked")
        if counter is not None:
            counter.add_(sum(times * len(stacks[0]) for times, stacks in self.moved))


# -- the passes ----------------------------------------------------------------------------------------------------------------


class ParallelPasses:
    """The passes of one step.

    Args:
        model: whose parameters the losses are computed with.
        store: their memory.
        loss_fn: (micro-batch) -> its loss.
        parts: the micro-batches.
        scale: what makes of losses those that are differentiated; None for themselves.
        most: run at once, at most.

    Raises:
        Refused: something in the model, or of its parameters, needs the passes one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        loss_fn: Callable[[Any], Tensor],
        parts: Sequence[Any],
        scale: Callable[[Tensor], Tensor] | None,
        most: int,
    ):
        self._model, self._store, self._loss_fn, self._scale = model, store, loss_fn, scale
        self._leaves, (self._spec, *others) = zip(*(tree_flatten(part) for part in parts), strict=True)
        if any(spec != self._spec for spec in others):
            raise Refused(f"the micro-batches have different structures: {SEQUENTIAL}")
        self.turns = list(self._turns(most))
        self._places = self._find_places()
        self._statistics = self._find_statistics()
        self._kept: list[tuple[dict[str, Any], str, Any]] = []  # what stood in the modules' tables
        self._caches: bool | None = None  # autocast's setting, where it was changed

    def _turns(self, most: int) -> Iterator[range]:
        """Micro-batches that run at once: as many in a row as are of one size."""
        shapes = list(map(shapes_of, self._leaves))
        begin = 0
        for i in range(1, len(shapes) + 1):
            if i == len(shapes) or i - begin == most or shapes[i] != shapes[begin]:
                yield range(begin, i)
                begin = i

    def _find_places(self) -> list[list[tuple[dict[str, Any], str]]]:
        """By parameter that is trained: the tables of modules, and its names there."""
        index = {id(p): k for k, p in enumerate(p for flat in self._store.flats for p in flat.params)}
        places: list[list[tuple[dict[str, Any], str]]] = [[] for _ in index]
        for module in self._model.modules():
            if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
                raise Refused(f"{self._named(module)} must see every pass: {SEQUENTIAL}")
            if has_backward_hooks(module):
                raise Refused(f"{self._named(module)} has backward hooks, which would not run: {SEQUENTIAL}")
            table: dict[str, Any] = parameters_of(module)
            for key, p in table.items():
                if id(p) in index:
                    if has_hooks(p):
                        raise Refused(f"{self._name_of(p)} has hooks, which would not run: {SEQUENTIAL}")
                    places[index[id(p)]].append((table, key))
                elif p is not None and p.requires_grad:
                    raise Refused(
                        f"{self._name_of(p)} requires a gradient, which it would not get, as it is not among those of this "
                        f"optimizer: p.requires_grad_(False), or {SEQUENTIAL}"
                    )
        for flat in self._store.flats:
            if not flat.flatten:
                raise Refused(
                    f"parameters that stay where they are cannot have copies beside them: flatten=True, or {SEQUENTIAL}"
                )
        return places

    def _find_statistics(self) -> list[_Statistics]:
        return [
            _Statistics(self._named(module), module)
            for module in self._model.modules()
            if isinstance(module, BatchNorm) and module.training and module.running_mean is not None
        ]

    def run(self, which: range, weights: Sequence[Tensor | None] | None) -> tuple[list[Tensor], list[Vectors]]:
        """(losses, gradients) of these micro-batches.

        Args:
            weights: by flat, ``[len(which), size]``; None for w, in the pass that moves statistics on.
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
        dims = [0 if isinstance(c, Tensor) else None for c in columns]
        tables = [(module, buffers_of(module)) for module in self._model.modules()]
        buffers = [(module, key, t) for module, table in tables for key, t in table.items() if t is not None]
        versions = versions_of(t for *_, t in buffers)
        forget_casts()
        try:
            self._caches = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(False)  # it would keep casts of stacks
            with torch.enable_grad(), _Supplied():
                in_dims = (0, [[0, 0, None]] * len(running), dims)
                losses = vmap(self._losses, in_dims, randomness="different")(stacks, running, columns)
        except Exception as error:
            refusal = self._refused(self._culprit(error), error, n)
            if refusal is error:
                raise
            raise refusal from error
        finally:
            self.put_back()
        after = versions_of(t for *_, t in buffers)
        for (module, key, t), old, new in zip(buffers, versions, after, strict=True):
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
            total = (losses if self._scale is None else self._scale(losses)).sum()
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
        return list(losses.detach().unbind()), self._vectors(n, dict(zip(trained, own, strict=True)))

    def _losses(self, stacks: list[Tensor], running: list[list[Tensor]], columns: list[Any]) -> Tensor:
        """The loss of one micro-batch, as vmap has it, with its weights and statistics in the modules."""
        for places, s in zip(self._places, stacks, strict=True):
            for table, key in places:
                self._put(table, key, s)
        for norm, values in zip(self._statistics, running, strict=True):
            for name, t in zip((*norm.NAMES, "num_batches_tracked"), values, strict=True):
                self._put(buffers_of(norm.module), name, t)
        return self._loss_fn(tree_unflatten(columns, self._spec))

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
        forget_casts()
        if self._caches is not None:
            torch.set_autocast_cache_enabled(self._caches)
            self._caches = None

    def _vectors(self, n: int, found: dict[int, Tensor | None]) -> list[Vectors]:
        """By micro-batch, what the kernels take."""
        rows: list[list[list[Tensor]]] = [[] for _ in range(n)]
        absent, k = 0, 0
        for flat in self._store.flats:
            columns: list[Sequence[Tensor]] = []
            for p in flat.params:
                stack = found.get(k)
                k += 1
                absent += stack is None
                columns.append([flat.absent] * n if stack is None else regular_stack(p, stack).unbind())
            for row, grads in zip(rows, zip(*columns, strict=True), strict=True):
                row.append(list(grads))
        return [Vectors(lists, absent) for lists in rows]

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
