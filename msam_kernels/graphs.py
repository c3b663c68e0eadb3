# SPDX-License-Identifier: Apache-2.0
"""``CapturedStep``: a whole step of ``MicroBatchSAM`` as one CUDA graph, with what the host must do around its replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten


class CudaRecorder:
    """Runs steps where they can be captured, and captures them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Run ``step`` on a side stream, as a capture does, so that lazy initialisation is over by then."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            loss = step()
        current.wait_stream(self.stream)
        loss.record_stream(current)
        return loss

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, the loss that each replay writes). Nothing runs yet."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, e.g. one that pins memory for a loader, may go on with what a capture must not do.
        on_stream = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), on_stream:
            loss = step()
        return graph.replay, loss


class CapturedStep:
    """``opt.train_step(loss_fn, *batch)``, replayed as one CUDA graph. Made by ``MicroBatchSAM.capture``.

    The first ``warm_up`` calls run eagerly: real steps, which also let libraries initialise. The next one captures, and from
    then on a call copies its batch into the graph's inputs and replays it. Learning rates, rho and other hyper-parameters
    are read from the device and brought up to date before each replay, so schedulers work; step numbers are counted there.
    After a change that the graph cannot follow (parameters added, state loaded into new memory, a method that starts or is
    switched off) it warms up and captures again.

    The graph is what ``loss_fn`` did on the device when it was captured: Python in it does not run again.
    """

    def __init__(self, opt: Any, loss_fn: Callable[..., Tensor], batch: tuple, recorder: Any, warm_up: int = 3):
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of a micro-batch that returns its mean loss, got {loss_fn!r}")
        if not batch:
            raise ValueError("capture needs an example batch: opt.capture(loss_fn, x, y)")
        if not isinstance(warm_up, int) or warm_up < 1:
            raise ValueError(f"warm_up must be an integer >= 1, got {warm_up!r}")
        opt._micro_batches(loss_fn, batch)  # refuses what cannot be split
        leaves, self._structure = tree_flatten(batch)
        self._opt, self._loss_fn, self._recorder, self._warm_up = opt, loss_fn, recorder, warm_up
        # The graph's inputs: their addresses stay.
        self._inputs = [t if t is None else torch.empty_like(t, device=recorder.device) for t in leaves]
        self._start_over()

    def _start_over(self) -> None:
        self._eager_steps = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, *batch: Any) -> Tensor:
        """One step on ``batch``, of the example's structure, shapes and dtypes; the detached mean loss at w.

        Raises:
            ValueError: a batch of another structure, shape or dtype; nothing was changed.
        """
        opt = self._opt
        leaves = self._checked(batch)
        opt._check_idle("a captured step")
        for static, leaf in zip(self._inputs, leaves, strict=True):
            if static is not None:
                static.copy_(leaf, non_blocking=True)
        opt._prepare()
        perturbs = opt._perturbs()
        if self._eager_steps and not self._is_current(perturbs):
            self._start_over()
        if self._eager_steps < self._warm_up:
            loss = self._recorder.warm_up(lambda: opt.step(self._micro_batches()))
            self._eager_steps += 1
            self._addresses = self._current_addresses(perturbs)
            return loss
        if self._replay is None:
            self._capture()
        step = _listened_replay if opt._has_listeners() else _replay
        return step(opt, self)

    def _micro_batches(self) -> Any:
        return self._opt._micro_batches(self._loss_fn, tree_unflatten(self._inputs, self._structure))

    def _checked(self, batch: tuple) -> list[Tensor | None]:
        leaves, structure = tree_flatten(batch)
        if structure != self._structure:
            raise ValueError(f"the step was captured for a batch of structure {self._structure}, got {structure}")
        for static, leaf in zip(self._inputs, leaves, strict=True):
            wanted, got = (
                "None"
                if t is None
                else f"{t.dtype} of shape {tuple(t.shape)}"
                if isinstance(t, Tensor)
                else type(t).__name__
                for t in (static, leaf)
            )
            if wanted != got:
                raise ValueError(
                    f"the step was captured for {wanted}, got {got}: drop the loader's last, smaller batch "
                    "(drop_last=True), use opt.train_step for it, or capture another step for this shape"
                )
        return leaves

    def _capture(self) -> None:
        opt = self._opt
        steps = opt.steps
        self._replay, self._loss = self._recorder.capture(lambda: opt._step(self._micro_batches()))
        opt.steps = steps  # nothing ran yet
        self._recorded = opt._norms_sq, opt._achieved_sq

    def _is_current(self, perturbs: bool) -> bool:
        """Whether the step is like the last one that was warmed up or captured, at the same addresses."""
        opt = self._opt
        # Also brings tensors that were loaded into the state to where the graph reads them.
        kept = opt._fused() is None or all(flat.rebind(opt.state, opt._state_keys) for flat in opt._flats)
        return kept and self._current_addresses(perturbs) == self._addresses

    def _current_addresses(self, perturbs: bool) -> Any:
        opt = self._opt
        kept = [
            [None if t is None else t.data_ptr() for t in (flat.saved, flat.ema, *flat.state.values())]
            for flat in opt._flats
        ]
        hyper = [t.data_ptr() for t in opt._hyper.values()]
        return opt._layout, opt._state_keys, opt._fused() is None, perturbs, kept, hyper


def _replay(opt: Any, captured: CapturedStep) -> Tensor:
    captured._replay()
    for flat in opt._flats:
        increment_version(flat.params)
    opt._norms_sq, opt._achieved_sq = captured._recorded
    opt.steps += 1
    opt._opt_called = opt.base_optimizer._opt_called = True  # what schedulers look at
    return captured._loss.clone()  # the next replay overwrites the graph's own


_listened_replay = Optimizer.profile_hook_step(_replay)
