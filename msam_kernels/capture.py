# SPDX-License-Identifier: Apache-2.0
"""``CapturedStep``: a whole step of ``MicroBatchSAM`` as one CUDA graph, with what the host must do around its replays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from ._checks import check_integer
from ._torch import has_listeners, mark_stepped, tree_flatten, tree_unflatten
from .batches import MicroBatches, mean
from .methods import Plan
from .optimizer import MicroBatchSAM
from .rules import fused_rule


class Recorder(Protocol):
    """What runs steps where they can be captured, and captures them."""

    device: torch.device

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor: ...

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]: ...


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


@dataclass
class _Graph:
    """The graph of one kind of step, and what it was made for."""

    eager_steps: int = 0
    addresses: object = None
    replay: Callable[[], None] | None = None
    loss: Tensor | None = None  # which every replay writes
    norms_sq: list[Tensor] = field(default_factory=list)  # likewise


class CapturedStep:
    """``opt.train_step(loss_fn, *batch)``, replayed as one CUDA graph. Made by ``MicroBatchSAM.capture``.

    The first ``warm_up`` calls run eagerly: real steps, which also let libraries initialise. The next one captures, and from
    then on a call copies its batch into the graph's inputs and replays it. Learning rates, rho and other hyper-parameters
    are read from the device and brought up to date before each replay, so schedulers work; step numbers are counted there.
    After a change that the graph cannot follow (parameters added, state loaded into new memory, a method that starts or is
    switched off) it warms up and captures again. LookSAM's two kinds of steps have a graph each; steps that choose a mask
    run eagerly.

    The graph is what ``loss_fn`` did on the device when it was captured: Python in it does not run again.
    """

    def __init__(
        self,
        opt: MicroBatchSAM,
        loss_fn: Callable[..., Tensor],
        batch: tuple[Any, ...],
        recorder: Recorder,
        warm_up: int = 3,
    ):
        if not batch:
            raise ValueError("capture needs an example batch: opt.capture(loss_fn, x, y)")
        check_integer("warm_up", warm_up, 1)
        opt.micro_batches(loss_fn, batch)  # refuses what cannot be split
        leaves, self._structure = tree_flatten(batch)
        for leaf in leaves:
            if leaf is not None and not (
                isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested
            ):
                what = f"tensor of layout {leaf.layout}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"a captured step copies each batch to where the graph reads it: dense tensors, in dicts, tuples and "
                    f"lists; got a {what}: use train_step for such batches"
                )
        self._opt, self._loss_fn, self._recorder, self._warm_up = opt, loss_fn, recorder, warm_up
        # The graph's inputs: their addresses stay.
        self._inputs = [t if t is None else torch.empty_like(t, device=recorder.device) for t in leaves]
        self._graphs: dict[Plan, _Graph] = {}  # by what the step does

    def __call__(self, *batch: Any) -> Tensor:
        """One step on ``batch``, of the example's structure, shapes and dtypes; the detached mean loss at w.

        Raises:
            ValueError: a batch of another structure, shape or dtype; nothing was changed.
        """
        opt, engine = self._opt, self._opt.engine
        leaves = self._checked(batch)
        engine.check_idle("a captured step")
        for static, leaf in zip(self._inputs, leaves, strict=True):
            if static is not None and leaf is not None:
                static.copy_(leaf, non_blocking=True)
        engine.prepare()
        plan = engine.plan()
        if engine.chooses_mask(plan):  # looks at values, as no graph can
            return self._run()
        if plan not in self._graphs and plan not in (opt.method.full, opt.method.between):
            self._graphs.clear()  # plans that do not come back keep no memory
        graph = self._graphs.get(plan)
        if graph is None or not self._is_current(graph):
            graph = self._graphs[plan] = _Graph()
        if graph.eager_steps < self._warm_up:
            loss = self._run()
            graph.eager_steps += 1
            graph.addresses = self._current_addresses()
            return loss
        if graph.replay is None:
            self._capture(graph)
        step = _listened_replay if has_listeners(opt) else _replay
        return step(opt, graph)

    def _run(self) -> Tensor:
        return self._recorder.warm_up(lambda: self._opt.step(self._micro_batches()))

    def _recorded(self) -> Tensor:
        closures = self._micro_batches()
        loss: Tensor = mean(self._opt.engine.run(closures, closures.shares), closures.shares)
        return loss

    def _micro_batches(self) -> MicroBatches:
        return self._opt.micro_batches(self._loss_fn, tree_unflatten(self._inputs, self._structure))

    def _checked(self, batch: tuple[Any, ...]) -> list[Tensor | None]:
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

    def _capture(self, graph: _Graph) -> None:
        engine = self._opt.engine
        steps = engine.steps
        graph.replay, graph.loss = self._recorder.capture(self._recorded)
        engine.steps = steps  # nothing ran yet
        graph.norms_sq = engine.norms_sq

    def _is_current(self, graph: _Graph) -> bool:
        """Whether what the graph was warmed up or captured with is still there, at the same addresses."""
        opt, store = self._opt, self._opt.engine.store
        # Also brings tensors that were loaded into the state to where the graph reads them.
        kept = fused_rule(opt.base_optimizer) is None or store.rebind(opt.state)
        return kept and self._current_addresses() == graph.addresses

    def _current_addresses(self) -> object:
        engine = self._opt.engine
        tensors = engine.tables.tensors()
        for flat in engine.store.flats:
            tensors += [t for t in (flat.saved, flat.mask) if t is not None]
            tensors += [memory.buffer for memory in flat.memories.values()]
            tensors += flat.state.values()
        fused = fused_rule(self._opt.base_optimizer) is not None
        addresses = [t.data_ptr() for t in tensors] + engine.buffers.addresses()
        return engine.store.layout, engine.tables.names, fused, addresses


def _replay(opt: MicroBatchSAM, graph: _Graph) -> Tensor:
    assert graph.replay is not None
    assert graph.loss is not None
    graph.replay()
    engine = opt.engine
    for flat in engine.store.flats:
        increment_version(flat.params)
    engine.norms_sq = graph.norms_sq
    engine.steps += 1
    mark_stepped(opt)
    mark_stepped(opt.base_optimizer)
    return graph.loss.clone()  # the next replay overwrites the graph's own


_listened_replay = Optimizer.profile_hook_step(_replay)
