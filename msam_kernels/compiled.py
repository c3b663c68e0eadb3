# SPDX-License-Identifier: Apache-2.0
"""Parallel passes through ``torch.compile``: ``MicroBatchSAM(parallel=..., compile=True)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from . import _torch
from ._torch import TreeSpec, is_recompile_limit, tree_unflatten, without_fallback_warnings

Function = Callable[..., Any]
MOST = 64  # kinds of passes that are compiled: each takes the compiler some time, and keeps what it made
_NAMES = count()


class TooMany(RuntimeError):
    """A pass is not compiled, as too many others were."""


class Compiled:
    """The losses of micro-batches as one compiled function of stacked weights, buffers and samples.

    It lives as long as its optimizer: what was compiled serves every step of the same shapes. All that Dynamo traces is torch's
    and the user's; what vmap lacks is put into its graph.

    Args:
        model: whose parameters and buffers the losses are computed with.
        supplied: what runs instead of functions of torch.

    Attributes:
        works: False once the compiler could not do it, for whatever pass.
    """

    def __init__(self, model: nn.Module, supplied: Mapping[Any, Function]):
        self.model, self.works = model, True
        self._supplied = supplied
        self._whole = nn.Module()
        self._whole.model = model
        # By the structure of a batch, the pass and the batch's shapes; None where Dynamo has met its limit.
        self._functions: dict[object, Function | None] = {}
        self._told: set[str] = set()

    def losses(
        self,
        function: Callable[..., Tensor],
        stacked: Mapping[str, Tensor],
        single: Mapping[str, Tensor],
        columns: Sequence[Any],
        spec: TreeSpec,
    ) -> Tensor:
        """``function(*micro_batch)`` for all of them. Whatever the compiler or the function raises comes out.

        Args:
            stacked: by name in the model, the stacks of parameters and buffers.
            single: buffers that all micro-batches share.
            columns: the stacks of the tensors of a micro-batch, which is a tuple of structure ``spec``.
        """
        tensors = [{f"model.{name}": t for name, t in named.items()} for named in (stacked, single)]
        # As an attribute it is what the module calls, whatever it is.
        object.__setattr__(self._whole, "forward", function)
        dims = [0 if isinstance(c, Tensor) else None for c in columns]
        with without_fallback_warnings():  # Dynamo runs what vmap lacks, which the graph then lacks too
            # Weights that are all the same, and those that are not, are two graphs, and so is every shape of a batch.
            passes = tuple(t.stride(0) for t in stacked.values())
            kind = spec, passes, tuple((c.dtype, c.shape) if isinstance(c, Tensor) else None for c in columns)
            compiled = self._function(kind, spec, dims)
            try:
                losses: Tensor = compiled(tuple(tensors), tree_unflatten(list(columns), spec))
            except Exception as error:
                if not is_recompile_limit(error):
                    raise
                self._functions[kind] = None
                raise self._too_many_versions() from error
        return losses

    def give_up(self, error: Exception) -> None:
        """The compiler could not do what runs without it: any pass, or, where there are too many, this one."""
        if isinstance(error, TooMany):
            if str(error) not in self._told:
                self._told.add(str(error))
                warnings.warn(f"compile=True: {error}", stacklevel=2)
            return
        self.works = False
        lines = [line.strip() for line in str(error).splitlines()]
        # Of what a backend raised, Dynamo's first line names the backend.
        reason = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        if "already tracked for mutation" in reason:  # Dynamo's words for a model that it meets in two forms
            reason = "the loss calls a model out of torch.compile: let it call the model itself"
        warnings.warn(f"compile=True: the parallel passes run as they are written, as {reason}", stacklevel=2)

    @staticmethod
    def _too_many_versions() -> TooMany:
        return TooMany(
            "the passes on batches of some shapes run as they are written, as they were compiled as often as "
            "torch._dynamo.config.recompile_limit allows, for losses or modes of the model that are new again and again: give "
            "the same loss function to every step, or raise that limit first"
        )

    def _function(self, kind: object, spec: TreeSpec, dims: list[int | None]) -> Function:
        if kind in self._functions:
            known = self._functions[kind]
            if known is None:
                raise self._too_many_versions()
            return known
        if len(self._functions) >= MOST:
            raise TooMany(
                f"passes on batches of new shapes run as they are written, as {MOST} kinds of passes have been compiled: pad "
                "batches to fewer shapes, or drop the loader's last, smaller one (drop_last=True)"
            )
        in_dims = (0, None), tree_unflatten(list(dims), spec)
        stacked = vmap(partial(functional_call, self._whole), in_dims, randomness="different")
        compiled: Function = torch.compile(_apart(stacked), fullgraph=True, dynamic=False, backend=self._compile)
        self._functions[kind] = compiled
        return compiled

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Dynamo's graph, which still calls torch's functions by name, and vmap itself."""
        for node in graph.graph.nodes:
            if node.op == "call_function":
                node.target = self._supplied.get(node.target, node.target)
        graph.recompile()
        return _torch.inductor(graph, inputs)


def _apart(function: Function) -> Function:
    """``vmap``'s function with code of its own: Dynamo counts what it compiles by code, which is the same for all of them."""
    code = function.__code__.replace(co_name=f"losses_{next(_NAMES)}")
    own = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own
