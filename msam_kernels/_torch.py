# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that the package uses, each with the reason; and what is easy to get wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# What vmap has wrapped, and the way around it: see ``below_vmap``.
from torch._C import _functorch as functorch

# Torch's wrapper around ``step`` names it for the profiler, and is left out where nobody listens.
from torch._C._autograd import _profiler_enabled as profiler_enabled
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

# What a GradScaler notes of an optimizer: see ``Scaled``.
from torch.amp.grad_scaler import OptState
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrize

# Hooks of all optimizers: whoever registers one there expects it to run at every step.
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# See ``leave_mode``.
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode

# A batch is any tree of tensors; torch's public name for this is newer than the oldest torch that is served.
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = [
    "LIKE_NEW",
    "Scaled",
    "Table",
    "TreeSpec",
    "below_vmap",
    "buffers_of",
    "children_of",
    "copy_all",
    "end_capture",
    "forget_casts",
    "fsdp_modules",
    "has_backward_hooks",
    "has_hooks",
    "has_listeners",
    "inductor",
    "is_lazy",
    "is_of_fsdp",
    "is_recompile_limit",
    "is_shared",
    "leave_mode",
    "leave_to_eager",
    "mark_stepped",
    "modules_of",
    "moved",
    "parameters_of",
    "profiler_enabled",
    "scaled",
    "shard_of",
    "step_hooks",
    "tree_flatten",
    "tree_unflatten",
    "tuple_of",
    "versions_of",
    "without_fallback_warnings",
]


#: What ``Optimizer.__init__`` leaves in an optimizer beside its groups, state and hooks.
LIKE_NEW = {"_warned_capturable_if_run_uncaptured": True}


def step_hooks(optimizer: torch.optim.Optimizer) -> tuple[dict[int, Any], dict[int, Any]]:
    """The hooks around ``step`` that were registered on this very optimizer."""
    return optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks


def has_listeners(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks or a profiler listen to this optimizer's steps."""
    before, after = step_hooks(optimizer)
    return bool(profiler_enabled() or before or after or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def is_of_fsdp(p: Tensor) -> bool:
    """Whether it is a part of FullyShardedDataParallel's flat parameter, which it marks so."""
    return bool(getattr(p, "_fsdp_flattened", False))


def is_shared(grad: Tensor) -> bool:
    """Whether another tensor holds the memory too. In doubt the answer is yes: a copy is always right."""
    holders = getattr(torch._C, "_storage_Use_Count", None)
    storage = grad.untyped_storage()  # which holds it as well, as long as it is there
    return holders is None or holders(storage._cdata) > 2


def moved(t: Tensor, device: torch.device) -> Tensor:
    """On that device, without waiting for it; to the CPU with, as a copy that does not block returns before its values do."""
    return t if t.device == device else t.to(device, non_blocking=device.type != "cpu")


def is_lazy(t: Tensor) -> bool:
    """Whether torch is to negate or conjugate what the memory holds, or there is no memory, only zeros."""
    return t.is_neg() or t.is_conj() or t._is_zerotensor()


@cache
def leave_to_eager(package: str) -> None:
    """Dynamo traces nothing of the package: to it the kernels are opaque, and it would lose what they need to know."""
    import torch._dynamo  # torch's Optimizer has imported it already

    torch._dynamo.trace_rules.add(package)


def below_vmap(of_stacks: Callable[..., Tensor], alone: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """A function, given by what it does to stacks, of tensors that vmap has stacked.

    As a ``torch.autograd.Function`` it would be public, and take 0.3 ms for what else takes 0.03.

    Args:
        of_stacks: (n, dims, *tensors) -> its result, with the dimension of the stack first. ``dims``: where each of the
            tensors has that dimension; None for one that is no stack, which stands for n times itself.
        alone: the function itself, for when none is a stack.
    """
    interpreter = retrieve_current_functorch_interpreter()
    level, n = interpreter.level(), 0
    values: list[Tensor | None] = list(tensors)
    dims: list[int | None] = [None] * len(values)
    for i, t in enumerate(tensors):
        if t is not None and functorch.is_batchedtensor(t) and functorch.maybe_get_level(t) == level:
            values[i], dim = functorch.get_unwrapped(t), functorch.maybe_get_bdim(t)
            dims[i], n = dim, functorch.get_unwrapped(t).shape[dim]
    if n == 0:
        return alone(*tensors)
    with interpreter.lower():
        out = of_stacks(n, dims, *values)
    found: Tensor = functorch._add_batch_dim(out, 0, level)
    return found


@contextmanager
def without_fallback_warnings() -> Iterator[None]:
    """Vmap says nothing of functions that it lacks; torch has no public name for the switch."""
    functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """The compiler of ``torch.compile``, as a backend of one's own calls it."""
    from torch._inductor import compile

    return compile(graph, list(inputs))


def is_recompile_limit(error: BaseException) -> bool:
    """Whether Dynamo has compiled as many versions of one function as it may."""
    return type(error).__name__ == "FailOnRecompileLimitHit"


def leave_mode(mode: TorchFunctionMode) -> None:
    """An interruption between a block and its end leaves its mode on; torch has no public name for taking it off."""
    while mode in _get_current_function_mode_stack():
        _pop_mode()


def tuple_of(spec: TreeSpec) -> TreeSpec:
    """The structure of a tuple of one such tree."""
    return tree_flatten((tree_unflatten([None] * spec.num_leaves, spec),))[1]


def children_of(module: nn.Module) -> Iterable[nn.Module | None]:
    """The module's children. ``children()`` takes several times as long, because it looks for duplicates."""
    return module._modules.values()


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, with what its names begin with. ``named_modules()`` takes several times as long."""
    found: dict[nn.Module, str] = {}
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        prefix, module = stack.pop()
        if module not in found:
            found[module] = prefix
            for name, child in module._modules.items():
                if child is not None:
                    stack.append((f"{prefix}{name}.", child))
    return [(prefix, module) for module, prefix in found.items()]


def has_hooks(t: Tensor) -> bool:
    """Whether somebody is told of the tensor's gradient; torch has no public name for it."""
    return bool(t._backward_hooks or getattr(t, "_post_accumulate_grad_hooks", None))


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether somebody is told of the gradients that pass through the module, or through all of them."""
    own = module._backward_hooks or module._backward_pre_hooks
    return bool(own or every_module._global_backward_hooks or every_module._global_backward_pre_hooks)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own table, which also says under which names a tied parameter is there."""
    return module._parameters


#: A module's buffers by name. TorchScript's modules have something that is no dict, but serves as one here.
Table: TypeAlias = dict[str, Tensor | None]


def buffers_of(module: nn.Module) -> Table:
    """The module's own table: one that is put there is a buffer, whatever the module does when attributes are set."""
    return module._buffers


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Schedulers look at this to warn where ``scheduler.step()`` comes before ``optimizer.step()``."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def copy_all(to: list[Tensor], values: list[Tensor]) -> None:
    """Each of ``values``, all of one dtype and device, into its tensor of ``to``; torch has no public name for it."""
    torch._foreach_copy_(to, values)


def scaled(tensors: list[Tensor], by: list[float]) -> tuple[Tensor, ...]:
    """Each tensor times its number, in one kernel; torch has no public name for it."""
    return torch._foreach_mul(tensors, by)


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was changed in place, which autograd asks too; torch has no public name for it.

    -1 where torch does not count, for tensors that were made in inference mode.
    """
    return [-1 if t.is_inference() else t._version for t in tensors]


def forget_casts() -> None:
    """What is cached of the weights as they were: by autocast, and by ``parametrize.cached()``, whose table is private."""
    torch.clear_autocast_cache()
    if parametrize._cache:
        parametrize._cache.clear()


def shard_of(t: Any) -> Tensor:
    """What this rank holds of a DTensor: that very tensor. ``to_local`` makes a new one of every parameter."""
    local: Tensor = t._local_tensor
    if type(local) is Tensor:
        return local
    waits = getattr(local, "wait", None)  # of what a collective is still to bring
    return local if waits is None else waits()


def fsdp_modules() -> list[nn.Module]:
    """All that ``fully_shard`` has made, as far as they live: torch has no public way from a parameter to its module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    from torch.distributed._composable_state import _module_state_mapping

    return [m for m in list(_module_state_mapping) if isinstance(m, fsdp.FSDPModule)]


class Scaled:
    """What a ``GradScaler`` notes of an optimizer's step. Its public methods tell only those who wait for the device."""

    def __init__(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer):
        self.scaler, self._key = scaler, id(optimizer)

    @property
    def _note(self) -> dict[str, Any]:
        note: dict[str, Any] = self.scaler._per_optimizer_states[self._key]
        return note

    @property
    def scale(self) -> Tensor | None:
        """On the device; None before the first loss was scaled."""
        return self.scaler._scale

    @property
    def is_ready(self) -> bool:
        """Whether ``scaler.update()`` was called since the latest step."""
        return self._note["stage"] is OptState.READY

    @property
    def found_infs(self) -> dict[torch.device, Tensor]:
        """What the latest ``unscale_`` found, by device."""
        return dict(self._note["found_inf_per_device"])

    def has_stepped(self, found_infs: dict[torch.device, Tensor]) -> None:
        """``scaler.update()`` is next, which reads this."""
        self._note.update(found_inf_per_device=found_infs, stage=OptState.STEPPED)

    def forget(self) -> None:
        """The step did not take place."""
        self.scaler._per_optimizer_states.pop(self._key, None)


def end_capture(device: torch.device, pool: Any) -> None:
    """What a capture that failed leaves undone: the allocator goes on serving it, until it is told."""
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # the second in older versions
    next(filter(None, (getattr(torch._C, name, None) for name in names)))(device.index, pool)
    torch._C._cuda_releasePool(device.index, pool)
