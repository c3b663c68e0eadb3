# SPDX-License-Identifier: Apache-2.0
"""``CapturedStep``: a whole step of ``MicroBatchSAM`` as one CUDA graph, with what the host must do around its replays."""

from __future__ import annotations

import linecache
import os
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from ._checks import check_integer
from ._torch import end_capture, forget_casts, has_listeners, mark_stepped, tree_flatten, tree_unflatten
from .batches import MicroBatches, Shapes, mean, shapes_of
from .between import Between
from .methods import Plan
from .optimizer import MicroBatchSAM
from .rules import fused_rule

OtherShapes = Literal["eager", "capture", "error"]
Inputs = list[Tensor | None]


class Recorder(Protocol):
    """What runs steps where they can be captured, and captures them."""

    device: torch.device

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor: ...

    def capture(self, step: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]: ...

    def pool_bytes(self) -> int: ...


class CudaRecorder:
    """Runs steps where they can be captured, and captures them.

    Its graphs share a pool of memory: none needs what another one left there, but for tensors that are held until then.

    Raises:
        TypeError: one of ``generators`` is no CUDA generator of ``device``.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()):
        for generator in generators:
            if not isinstance(generator, torch.Generator) or generator.device != device:
                got = str(generator.device) if isinstance(generator, torch.Generator) else type(generator).__name__
                raise TypeError(f"generators must be torch.Generator on {device}, where the parameters are, got {got}")
        self.device, self.generators = device, list(generators)
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Run ``step`` on a side stream, as a capture does, so that lazy initialisation is over by then."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            loss = step()
        current.wait_stream(self.stream)
        loss.record_stream(current)
        return loss

    def capture(self, step: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        """(replay, the tensors that each replay writes). Nothing runs yet.

        What ``step`` raises comes out as it is, and streams, allocator and generators are what they were.
        """
        graph = self._new_graph()
        outputs: list[Tensor] | None = None
        error: BaseException | None = None  # the first one: ending the capture raises another, because of it
        try:
            # The stream twice: where a capture fails, torch's context leaves its own current.
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream), self._capturing(graph, self.pool):
                try:
                    outputs = step()
                except BaseException as e:
                    error = e
                    raise
        except BaseException as e:
            error = error or e
        if error is not None or outputs is None:
            self._mend(graph)
            raise error or RuntimeError("a capture that was left without an error")
        return graph.replay, outputs

    def pool_bytes(self) -> int:
        """What the allocator holds for the graphs."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self.pool))

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        return graph

    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: Any = None) -> torch.cuda.graph:
        # Other threads, e.g. one that pins memory for a loader, may go on with what a capture must not do.
        return torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")

    def _mend(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a capture that failed."""
        try:
            graph.pool()
        except RuntimeError:  # it could not even be ended, or begun
            with suppress(RuntimeError):
                end_capture(self.device, self.pool)
        # In older versions of torch generators take themselves to be captured until a capture ends well.
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream), self._capturing(self._new_graph()):
            torch.zeros(1, device=self.device)


@dataclass
class _Graph:
    """The graph of one kind of step, and what it was made for."""

    plan: Plan
    eager_steps: int = 0
    addresses: object = None
    replay: Callable[[], None] | None = None
    # What every replay writes:
    loss: Tensor | None = None
    achieved: list[list[Tensor]] = field(default_factory=list)  # by flat, see there
    norms_sq: list[Tensor] = field(default_factory=list)
    found_infs: dict[torch.device, Tensor] = field(default_factory=dict)
    units: Any = None


class CapturedStep:
    """``opt.train_step(loss_fn, *batch)``, replayed as one CUDA graph. Made by ``MicroBatchSAM.capture``.

    The first ``warm_up`` calls run eagerly: real steps, which also let libraries initialise. The next one captures, and from
    then on a call copies its batch into the graph's inputs and replays it. Learning rates, rho and other hyper-parameters
    are read from the device and brought up to date before each replay, so schedulers work; step numbers are counted there,
    and a ``GradScaler``'s scale is read there.
    After a change that the graph cannot follow (parameters added, state loaded into new memory, a method that starts or is
    switched off) it warms up and captures again. LookSAM's two kinds of steps have a graph each, and so have other shapes
    where they are captured; steps that choose a mask run eagerly.

    Random numbers are those of the same steps run eagerly, from the same seed: a replay moves the generators on as they did.

    The graph is what ``loss_fn`` did on the device when it was captured: Python in it does not run again.
    """

    def __init__(
        self,
        opt: MicroBatchSAM,
        loss_fn: Callable[..., Tensor],
        batch: tuple[Any, ...],
        recorder: Recorder,
        warm_up: int = 3,
        between: Between | None = None,
        other_shapes: OtherShapes = "eager",
    ):
        if not batch:
            raise ValueError("capture needs an example batch: opt.capture(loss_fn, x, y)")
        check_integer("warm_up", warm_up, 1)
        if other_shapes not in get_args(OtherShapes):
            raise ValueError(f"other_shapes must be one of {get_args(OtherShapes)}, got {other_shapes!r}")
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
        self._between, self._other_shapes = between, other_shapes
        self._dtypes = [t if t is None else t.dtype for t in leaves]
        # The graphs' inputs, by shapes: their addresses stay.
        self._inputs: dict[Shapes, Inputs] = {shapes_of(leaves): self._new_inputs(leaves)}
        self._graphs: dict[tuple[Shapes, Plan], _Graph] = {}  # by what the step does, and on what

    def __call__(self, *batch: Any) -> Tensor:
        """One step on ``batch``, of the example's structure and dtypes; the detached mean loss at w.

        Raises:
            ValueError: a batch of another structure or dtype, or of other shapes where these are an error.
            RuntimeError: what cannot be captured, by name; or ``scaler.update()`` is due. In all cases weights, gradients
                and state are what they were.
        """
        opt, engine = self._opt, self._opt.engine
        leaves = self._checked(batch)
        shapes = shapes_of(leaves)
        engine.check_idle("a captured step")
        if shapes not in self._inputs:
            if self._other_shapes == "eager":
                return self._run([t if t is None else t.to(self._recorder.device, non_blocking=True) for t in leaves])
            opt.micro_batches(self._loss_fn, batch)
            self._inputs[shapes] = self._new_inputs(leaves)
        inputs = self._inputs[shapes]
        for static, leaf in zip(inputs, leaves, strict=True):
            if static is not None and leaf is not None:
                static.copy_(leaf.detach(), non_blocking=True)
        engine.skipped()  # gradients of before take no part
        engine.prepare()
        plan = engine.plan()
        if engine.chooses_mask(plan):  # looks at values, as no graph can
            return self._run(inputs)
        kind = shapes, plan
        if kind not in self._graphs:  # plans that do not come back keep no memory
            coming = plan, opt.method.full, opt.method.between
            self._graphs = {known: graph for known, graph in self._graphs.items() if known[1] in coming}
        graph = self._graphs.get(kind)
        if graph is None or not self._is_current(graph):
            graph = self._graphs[kind] = _Graph(plan)
        if graph.eager_steps < self._warm_up:
            loss = self._run(inputs)
            graph.eager_steps += 1
            graph.addresses = self._current_addresses()
            return loss
        if self._between is None or self._between.scaled is None:
            engine.units.bring_back()
        with self._between or nullcontext():
            if graph.replay is None:
                self._capture(graph, inputs)
            step = _listened_replay if has_listeners(opt) else _replay
            loss = step(opt, graph)
            if self._between is not None:
                self._between.found_infs = graph.found_infs
        return loss

    @property
    def pool_bytes(self) -> int:
        """The device memory that the graphs hold: gradients, activations and what else their steps make.

        Their inputs, parameters and the optimizer's state are not of it.
        """
        return self._recorder.pool_bytes()

    def _new_inputs(self, leaves: Sequence[Tensor | None]) -> Inputs:
        return [t if t is None else torch.empty_like(t, device=self._recorder.device) for t in leaves]

    def _run(self, inputs: Inputs) -> Tensor:
        return self._recorder.warm_up(lambda: self._opt.step(self._micro_batches(inputs)))

    def _recorded(self, inputs: Inputs) -> list[Tensor]:
        """The step as it is captured; what every replay is to write: the loss, terms of norms, and what a scaler found."""
        engine, whole = self._opt.engine, self._micro_batches(inputs)
        loss: Tensor = mean(self._opt.run(whole), whole.shares)
        found = [] if self._between is None else list(self._between.found_infs.values())
        return [loss, *engine.norms_sq, *found]

    def _micro_batches(self, inputs: Inputs) -> MicroBatches:
        return self._opt.micro_batches(self._loss_fn, tree_unflatten(inputs, self._structure), self._between)

    def _checked(self, batch: tuple[Any, ...]) -> list[Tensor | None]:
        leaves, structure = tree_flatten(batch)
        if structure != self._structure:
            raise ValueError(f"the step was captured for a batch of structure {self._structure}, got {structure}")
        for i, (dtype, leaf) in enumerate(zip(self._dtypes, leaves, strict=True)):
            got = leaf.dtype if isinstance(leaf, Tensor) else leaf if leaf is None else type(leaf).__name__
            if got != dtype:
                raise ValueError(
                    f"the step was captured for {dtype} as tensor {i} of a batch, got {got}: convert it first, or capture "
                    "another step for such batches"
                )
        shapes = shapes_of(leaves)
        if self._other_shapes == "error" and shapes not in self._inputs:
            known, given = ([s if s is None else tuple(s) for s in each] for each in (next(iter(self._inputs)), shapes))
            raise ValueError(
                f"the step was captured for tensors of shapes {known}, got {given}: drop the loader's last, smaller batch "
                '(drop_last=True), or give other_shapes="eager" or "capture" to opt.capture'
            )
        return leaves

    def _capture(self, graph: _Graph, inputs: Inputs) -> None:
        """Record the step. Nothing runs: what the engine keeps on the host is what it was."""
        engine = self._opt.engine
        steps, v_step, norms_sq, grads = engine.steps, engine.v_step, engine.norms_sq, engine.store.current_grads()
        flats = engine.store.flats
        achieved = [list(flat.achieved) for flat in flats]
        engine.store.set_grads(None)  # which the step would set aside, and copy within the graph
        forget_casts()  # autocast's were made outside, once and for all
        try:
            graph.replay, outputs = self._recorder.capture(lambda: self._recorded(inputs))
        except BaseException as error:
            engine.store.set_grads(grads)
            engine.v_step, engine.norms_sq = v_step, norms_sq
            for flat, rows in zip(flats, achieved, strict=True):
                flat.achieved = rows
            if isinstance(error, RuntimeError) and _is_of_a_capture(error):
                raise RuntimeError(refusal(error)) from error
            raise
        finally:
            engine.steps = steps
        graph.loss, graph.units = outputs[0], engine.units.now
        graph.norms_sq = outputs[1 : 1 + len(engine.norms_sq)]
        graph.achieved = [list(flat.achieved) for flat in flats]
        if self._between is not None:
            found = outputs[1 + len(engine.norms_sq) :]
            graph.found_infs = dict(zip(self._between.found_infs, found, strict=True))
            self._between.forget()

    def _is_current(self, graph: _Graph) -> bool:
        """Whether what the graph was warmed up or captured with is still there, at the same addresses."""
        opt, store = self._opt, self._opt.engine.store
        # Also brings tensors that were loaded into the state to where the graph reads them.
        kept = fused_rule(opt.base_optimizer) is None or store.rebind(opt.base_optimizer.state)
        return kept and self._current_addresses() == graph.addresses

    def _current_addresses(self) -> object:
        engine = self._opt.engine
        tensors = engine.tables.tensors() + engine.units.tensors()
        for flat in engine.store.flats:
            tensors += [t for t in (flat.saved, flat.mask, flat.noise) if t is not None]
            tensors += [memory.buffer for memory in flat.memories.values()]
            tensors += flat.state.values()
            tensors += flat.copies
        fused = fused_rule(self._opt.base_optimizer) is not None
        addresses = [t.data_ptr() for t in tensors] + engine.buffers.addresses()
        # And what the graph did by: which parameters are trained, whose buffers are held, how batches are split.
        trained = [p.requires_grad for p in engine.store.parameters()]
        if self._opt.method.full.momentum:
            addresses += [
                t.data_ptr() for tensors in engine.store.momentum(self._opt.base_optimizer.state).lists for t in tensors
            ]
        return (
            engine.store.layout,
            [flat.waiting for flat in engine.store.flats],
            engine.tables.names,
            fused,
            addresses,
            trained,
            engine.buffers,
            engine.ranks,
            self._opt.split,
            self._opt.parallel,
        )


def _replay(opt: MicroBatchSAM, graph: _Graph) -> Tensor:
    assert graph.replay is not None
    assert graph.loss is not None
    engine = opt.engine
    graph.replay()
    engine.store.set_grads(None)
    for flat, rows in zip(engine.store.flats, graph.achieved, strict=True):
        increment_version(flat.params)
        flat.achieved[: len(rows)] = rows
    forget_casts()  # of the weights as they were
    engine.norms_sq, engine.latest, engine.units.now = graph.norms_sq, graph.plan, graph.units
    engine.steps += 1
    mark_stepped(opt)
    mark_stepped(opt.base_optimizer)
    return graph.loss.clone()  # the next replay overwrites the graph's own


_listened_replay = Optimizer.profile_hook_step(_replay)

# ---- what cannot be captured -------------------------------------------------------------------------------------------

#: Of torch's errors about captures.
_OF_A_CAPTURE = re.compile(
    r"stream is capturing|error during capture|CUDA graph capture|uncaptured work|StreamCapture|capturing stage|"
    r"capturing blocking stream|graph capture encountered|not in capture mode"
)
_REMEDIES = {
    r"CUDAGeneratorImpl": (
        "this torch does not bring the state of a generator into a graph: give preserve_rng_state=False to "
        "torch.utils.checkpoint, where what is recomputed draws nothing at random, or take a newer torch"
    ),
    r"not in capture mode": "name the generators that loss_fn draws from: opt.capture(..., generators=[generator])",
    r"capturing stage": 'compile with a mode that makes no graphs of its own, e.g. torch.compile(model), not "reduce-overhead"',
    r"uncaptured work": "wait for the other stream within loss_fn (torch.cuda.Stream.wait_stream), and let it wait likewise",
    r"": (
        "a graph does again what the device did, and can neither wait for it nor decide by values: leave .item(), printing of "
        "values, `if` on tensors and shapes that depend on values out of loss_fn"
    ),
}
#: Whose frames say nothing to the user.
_OWN, _TORCH = (str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))


def _is_of_a_capture(error: BaseException) -> bool:
    return _OF_A_CAPTURE.search(str(error)) is not None


def refusal(error: BaseException) -> str:
    """What stands in the way of a capture, where it stands, and the remedy: of an error that ended one."""
    reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    remedy = next(words for pattern, words in _REMEDIES.items() if re.search(pattern, str(error)))
    return (
        f"a captured step cannot hold {operation_of(error.__traceback__)} ({reason}). {remedy[0].upper()}{remedy[1:]}; or use "
        "train_step. Nothing was changed"
    )


def operation_of(trace: TracebackType | None) -> str:
    """The operation that an error came out of, as it stands in the source; and where the user's code called it."""
    frames = [f for f in traceback.extract_tb(trace) if not f.filename.startswith(_OWN)]
    if not frames:
        return "this step"
    last = frames[-1]
    users = [f for f in frames if not f.filename.startswith(_TORCH)]
    if users:
        return _named(last) if users[-1] is last else f"{_named(last)}, called by {_named(users[-1])}"
    return _named(last) + (" of a backward pass" if any(f.name == "backward" for f in frames) else "")


def _named(frame: traceback.FrameSummary) -> str:
    code = linecache.getline(frame.filename, frame.lineno or 0)
    begin, end = getattr(frame, "colno", None), getattr(frame, "end_colno", None)  # from Python 3.11 on
    if begin is not None and end is not None and getattr(frame, "end_lineno", None) == frame.lineno:
        code = code.encode()[begin:end].decode(errors="replace")
    return f"`{code.strip() or frame.name}` ({Path(frame.filename).name}:{frame.lineno}, in {frame.name})"
