# SPDX-License-Identifier: Apache-2.0
"""Running statistics of BatchNorm-like layers, held still while a pass runs that is not at the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._torch import InstanceNorm, children_of


def check_model(model: Any) -> None:
    """Refuse what cannot be held still.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer with statistics is in TorchScript.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.jit.ScriptModule) and getattr(layer, "running_mean", None) is not None:
            raise ValueError(
                f"model has {name or 'a layer'} in TorchScript, which cannot be told to record no statistics: give the "
                "model as it was before torch.jit, or leave model out, and both passes are recorded"
            )


class Statistics:
    """Those of ``model``, which may be None: then there is nothing to hold."""

    def __init__(self, model: nn.Module | None):
        self.model = model
        self._frozen: list[tuple[nn.Module, str, Any]] = []  # (layer, attribute, its value)

    def freeze(self) -> None:
        """From now on the layers normalise their batches as before, and record nothing."""
        if self.model is not None:
            for layer, name, value in _switches(self.model):
                self._frozen.append((layer, name, getattr(layer, name)))
                setattr(layer, name, value)

    def thaw(self) -> None:
        while self._frozen:
            setattr(*self._frozen[-1])
            self._frozen.pop()


def _switches(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(layer, attribute, value): what to set so that a BatchNorm-like layer in training records nothing."""
    stack: list[nn.Module | None] = [model]
    while stack:
        layer = stack.pop()
        if layer is None:
            continue
        stack.extend(children_of(layer))
        if layer.__dict__.get("track_running_stats") and layer.training:
            if isinstance(layer, InstanceNorm):
                yield from ((layer, "running_mean", None), (layer, "running_var", None))
            else:
                yield layer, "track_running_stats", False
