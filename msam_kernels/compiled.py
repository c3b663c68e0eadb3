# SPDX-License-Identifier: Apache-2.0
"""Parallel passes through ``torch.compile``: ``MicroBatchSAM(parallel=..., compile=True)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from . import _torch
from ._torch import TreeSpec, tree_unflatten, without_fallback_warnings

Function = Callable[..., Any]


class Compiled:
    """The losses of micro-batches as one compiled function of stacked weights, buffers and samples.

    It lives as long as its optimizer: what was compiled serves every step of the same shapes. All that Dynamo traces is torch's
    and the user's; what vmap lacks is put into its graph.

    Args:
        model: whose parameters and buffers the losses are computed with.
        supplied: what runs instead of functions of torch.

    Attributes:
        works: False once the compiler could not do it.
    """

    def __init__(self, model: nn.Module, supplied: Mapping[Any, Function]):
        self.model, self.works = model, True
        self._supplied = supplied
        self._whole = nn.Module()
        self._whole.model = model
        self._functions: list[tuple[TreeSpec, list[int | None], Function]] = []

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
            losses: Tensor = self._function(spec, dims)(tuple(tensors), tree_unflatten(list(columns), spec))
        return losses

    def give_up(self, error: Exception) -> None:
        """The compiler could not do what runs without it."""
        self.works = False
        lines = [line.strip() for line in str(error).splitlines()]
        # Of what a backend raised, Dynamo's first line names the backend.
        reason = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        if "already tracked for mutation" in reason:  # Dynamo's words for a model that it meets in two forms
            reason = "the loss calls a model out of torch.compile: let it call the model itself"
        warnings.warn(f"compile=True: the parallel passes run as they are written, as {reason}", stacklevel=2)

    def _function(self, spec: TreeSpec, dims: list[int | None]) -> Function:
        for known, its_dims, function in self._functions:
            if known == spec and its_dims == dims:
                return function
        in_dims = (0, None), tree_unflatten(list(dims), spec)
        stacked = vmap(partial(functional_call, self._whole), in_dims, randomness="different")
        # Weights that are all the same, and those that are not, are two graphs, and so is every shape of a batch.
        compiled: Function = torch.compile(stacked, fullgraph=True, dynamic=False, backend=self._compile)
        self._functions.append((spec, dims, compiled))
        return compiled

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Dynamo's graph, which still calls torch's functions by name, and vmap itself."""
        for node in graph.graph.nodes:
            if node.op == "call_function":
                node.target = self._supplied.get(node.target, node.target)
        graph.recompile()
        return _torch.inductor(graph, inputs)
