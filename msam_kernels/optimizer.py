# SPDX-License-Identifier: Apache-2.0
"""``MicroBatchSAM``: torch's conventions and the user's calls. ``step.Engine`` runs the steps."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import batches, checkpoint, methods
from ._checks import check_integer
from ._torch import LIKE_NEW, has_listeners, leave_to_eager, profiler_enabled
from .batches import MicroBatches, Split
from .between import Between, scaled_by
from .buffers import Buffers, check_model
from .compiled import Compiled
from .gradients import set_grads
from .parallel import SUPPLIED, Auto, Parallel, ParallelPasses, Refused, check_parallel
from .precision import Rounding, seed_of
from .ranks import Ascent, GroupInCopies, Ranks
from .rules import SEED, Radius, check_base, check_masters, check_method, check_rho, rho_at, saves_itself
from .step import RHO_OF_OURS, Engine, Stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .capture import CapturedStep

__all__ = ["MicroBatchSAM", "Stats", "find", "passes"]


def _of_engine(name: str, doc: str) -> Any:
    """A property: an attribute that is the engine's. ``Any``, so that it can be declared with the attribute's own type."""
    return property(
        lambda self: getattr(self.engine, name), lambda self, value: setattr(self.engine, name, value), doc=doc
    )


class Passes(Generator[Any, None, None]):
    """The loop of one step, see ``MicroBatchSAM.passes``: an iterator, and a context at the end of which the loop is over."""

    __slots__ = ("_taken", "_turns")

    def __init__(self, turns: Generator[Any, None, None]):
        self._turns: Generator[Any, None, None] | None = turns
        self._taken = ref(turns)

    def __iter__(self) -> Generator[Any, None, None]:
        """The generator itself, which whoever loops holds alone from now on: leaving the loop drops it, and that ends it."""
        turns = self._under_way()
        self._turns = None
        return turns

    def _under_way(self) -> Generator[Any, None, None]:
        turns = self._taken()
        if turns is None:
            raise RuntimeError("this passes() loop is over: call opt.passes() for another one")
        return turns

    def __next__(self) -> Any:
        turns = self._taken()
        if turns is None:
            raise StopIteration
        return next(turns)

    def send(self, value: None) -> Any:
        return self.__next__()

    def throw(self, *error: Any) -> Any:
        return self._under_way().throw(*error)

    def close(self) -> None:
        """Give the loop up, unless it has ended."""
        turns = self._taken()
        if turns is not None:
            turns.close()

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MicroBatchSAM(Optimizer):
    r"""Sharpness-aware minimization over micro-batches (mSAM), with the family's other methods, around any optimizer.

    For micro-batches i = 1 … m with n_i of the batch's n samples, g_i the gradient at the weights w:

    .. math::
        e_i = \rho\, d_i / (\lVert d_i \rVert_2 + 10^{-12}), \qquad
        \hat g = \sum_i \tfrac{n_i}{n} \nabla L_i(w + e_i), \qquad
        w \leftarrow \text{base optimizer}(w, \hat g)

    where d_i = g_i for SAM; see ``methods`` for the others. The norm is one L2 norm over all parameters of all groups.
    Weight decay belongs to the base optimizer and is not part of e. In a group with ``maximize=True`` the worst point lies
    downhill: its e has the other sign (Momentum-SAM's momentum has it already). Frozen parameters stay where they are, whatever
    they are made of, and nothing is kept for them; what is unfrozen takes part from the next step on. Between steps the model
    may be moved to another device or dtype: with the next step all that is kept follows, the base optimizer's state too.

    ::

        opt = MicroBatchSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, num_micro_batches=4)
        for x, y in loader:
            for xb, yb in opt.passes(x, y):  # an ordinary forward and backward, run as often as the method needs
                F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()

    ``step(closure)`` and ``train_step`` do the same in one call and move less memory. While ``opt.enabled`` is False, and
    before the method's ``start``, the base optimizer works alone: one pass per micro-batch, nothing is perturbed.

    Mutates: at construction, re-points the ``.data`` of every parameter that requires a gradient, or has one, into a flat
    buffer (see ``flatten``); that of one that is unfrozen later before its first step; and all once more where the first
    step finds parameters without a gradient, for which nothing is kept, or one of these gets its first. ``param_groups``
    and ``state`` are the base optimizer's own: a scheduler on either object reaches both, and state dicts of either load
    into the other. Each group gets a ``rho``.

    Args:
        base_optimizer: any ``torch.optim.Optimizer``. ``SGD``, ``Adam`` and ``AdamW`` take fused updates on their own
            state; others, and flags without a fused kernel, take their own step.
        rho: radius of the perturbation, in units of the weights; >= 0. A group that has its own "rho" keeps it. Either may
            be a function of the number of steps taken so far, e.g. one that follows the learning rate; ``group["rho"]`` then
            holds the value of the step under way, until a number other than that, or another function, is put there.
        num_micro_batches: parts into which ``passes(*batch)`` and ``train_step`` split a batch. Default 1: SAM.
        micro_batch_size: instead of ``num_micro_batches``, the samples per part; the last may be smaller.
        method: how the perturbation is made, see ``msam_kernels.methods``. Default ``methods.SAM()``.
        model: if given, its buffers, e.g. BatchNorm's statistics or a codebook, change in the first pass of each micro-batch
            only: after the others they are brought back from a copy, which is made in each step. And its ``state_dict()``
            refuses while the weights are perturbed.
        ascent: with several processes, whose gradients a perturbation is made of. "global": as DistributedDataParallel
            reduces them in every pass. "local": each rank's own (mSAM over ranks); no pass synchronises, and one all-reduce
            averages the descent at the end of the step. A process group: those of its ranks. The last two need ``model``, the
            DistributedDataParallel module. See ``docs/distributed.md``.
        parallel: run the micro-batches of a ``train_step``, or of a captured one, in two parallel passes instead of one after
            the other, see ``docs/parallel.md``. True: all at once; a number: so many at once, where memory is short;
            "auto": whichever way is faster in the first steps, or sequentially with a warning where a model cannot. Needs
            ``model``. k micro-batches at once hold k copies of weights and gradients, and their activations together. The
            same result up to rounding, but that dropout draws other numbers. ``passes`` and ``step(closures)`` stay
            sequential.
        compile: compile the parallel passes, forward and backward of all micro-batches as one function, with
            ``torch.compile``; where that cannot be, they run as they are written, and one warning says why. Every shape of a
            batch is compiled by itself.
        flatten: keep the weights in flat buffers. False leaves every parameter's memory where it is; same bits, slower. So do,
            for all parameters of a device and dtype, some that have their place among other things: in shared memory, or in
            a storage that holds more than them, as the weights of an RNN on a GPU and parts of a flat vector do. So do sharded
            parameters (DTensors), always.
        backend: "auto" (the fastest there is), "cuda" (CUDA C++), "triton" (CUDA, ROCm and XPU devices), "cpu" (C++) or
            "reference" (plain torch, on any device).
        rounding: of w + e to weights of 16 bits, see ``docs/precision.md``. "nearest", or "stochastic": to one of the two
            neighbours, the farther from zero with a probability proportional to the distance, so that e arrives on average
            where it is shorter than the distance of two numbers. Weights come back from the saved ones as ever.
        seed: of stochastic rounding, < 2**64; ``torch.initial_seed()`` without it. It is part of the state dict. The random
            numbers depend on it, the step, the micro-batch and the element's place alone: they are the same on every backend
            and in every layout. Of several ranks that hold shards the first one's seed counts.
        masters: keep weights of 16 bits in fp32 too, as masters, which the perturbation and the fused update of ``SGD``,
            ``Adam`` and ``AdamW`` start from: w + e is master + e, rounded, and between steps ``p.data`` is the master rounded
            to nearest. Small updates are not lost then, and the base optimizer's state is in fp32. What you write to ``p.data``
            yourself, ``model.load_state_dict`` too, counts: where a master does not round to the weight that stands there, the
            weight is the master from then on. Masters are ``state[p]["msam_master"]``; where none is loaded they begin as the
            weights. Weights of 32 and 64 bits have none. See ``docs/precision.md``.
        process_group: ranks that hold other parameters of the same model, as the stages of a pipeline do: norms and inner
            products are over the parameters of all of them. Sharded parameters (DTensors) need no group, see
            ``docs/sharded.md``.
        strict: what would train something else than the method, such as a ``step()`` on gradients that came out of no
            ``passes`` loop, is an error. Otherwise it is done, as a framework may want it, and a warning says so once.

    Raises:
        ValueError, TypeError, RuntimeError: arguments or parameters that cannot be served; the message names them and
            the remedy, and nothing was changed.

    Sources: SAM 2010.01412, mSAM 2302.09693 and 2212.04343; those of the other methods are in ``methods``.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: Radius = 0.05,
        *,
        num_micro_batches: int | None = None,
        micro_batch_size: int | None = None,
        method: methods.SAM | None = None,
        model: nn.Module | None = None,
        ascent: Ascent = "global",
        parallel: Parallel = False,
        compile: bool = False,
        flatten: bool = True,
        backend: str = "auto",
        rounding: Rounding = "nearest",
        seed: int | None = None,
        masters: bool = False,
        process_group: ProcessGroup | None = None,
        strict: bool = False,
    ):
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"base_optimizer must be a torch.optim.Optimizer instance, got {reprlib.repr(base_optimizer)}: build it first, "
                "e.g. MicroBatchSAM(torch.optim.SGD(model.parameters(), lr=0.1))"
            )
        if isinstance(base_optimizer, MicroBatchSAM):
            raise TypeError("base_optimizer is a MicroBatchSAM already: wrap the plain optimizer once")
        check_base(base_optimizer)
        method = methods.SAM() if method is None else method
        if not isinstance(method, methods.SAM):
            raise TypeError(f"method must be one of msam_kernels.methods, e.g. methods.FriendlySAM(), got {method!r}")
        if num_micro_batches is not None and micro_batch_size is not None:
            raise ValueError(f"give {num_micro_batches=} or {micro_batch_size=}, not both")
        for name, count in (("num_micro_batches", num_micro_batches), ("micro_batch_size", micro_batch_size)):
            if count is not None:
                check_integer(name, count, 1)
        if model is not None:
            check_model(model)
        check_parallel(parallel, model, compile, ascent)
        Ranks(ascent, model).check()
        if seed is None and rounding == "stochastic" and base_optimizer not in RHO_OF_OURS:
            seed = base_optimizer.param_groups[0].get(SEED)  # of a file that it has loaded
        seed = seed_of(rounding, seed)
        check_rho(rho_at(rho, 0))
        for group in base_optimizer.param_groups:
            check_rho(rho_at(group.get("rho", rho), 0))
        check_method(method, base_optimizer)
        check_masters(masters, method, base_optimizer, parallel)
        # The hook tables and profiling of an Optimizer, without its own groups and state: those are the base's.
        self.base_optimizer = base_optimizer
        defaults = {**base_optimizer.defaults, "rho": rho}
        super().__setstate__({"defaults": defaults, **LIKE_NEW})
        self.parallel, self.compile, self.flatten, self.backend = parallel, compile, flatten, backend
        self.rounding, self.masters, self.process_group = rounding, masters, process_group
        split = Split(num_micro_batches or (None if micro_batch_size else 1), micro_batch_size)
        self._make_engine(method, model, split, ascent, seed, strict)
        loaded = base_optimizer not in RHO_OF_OURS and checkpoint.check_state(self.engine)
        self.engine.take_over()
        if loaded:
            checkpoint.load(self.engine, checkpoint.out_of_state(base_optimizer, {}))

    def _make_engine(
        self,
        method: methods.SAM,
        model: nn.Module | None,
        split: Split,
        ascent: Ascent,
        seed: int | None,
        strict: bool,
    ) -> None:
        leave_to_eager(__package__)
        self._auto = Auto()
        self._compiled: Compiled | None = None
        #: What runs the steps, for modules of this package.
        self.engine = Engine(
            self.base_optimizer,
            method,
            model,
            self.defaults["rho"],
            flatten=self.flatten,
            backend=self.backend,
            ascent=ascent,
            seed=seed,
            masters=self.masters,
            process_group=self.process_group,
            strict=strict,
        )
        self.engine.split = split
        self.engine.owner = ref(self)
        self._watch = checkpoint.watch(self.engine, model)
        this = ref(self.engine)

        left: dict[str, Any] = {}
        loaded: list[dict[str, Any]] = []

        def show(base: Optimizer) -> None:
            engine = this()
            if engine is not None:
                engine.check_restored("state_dict()")
                left.update(checkpoint.show(engine))

        def add(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            state_dict = checkpoint.saved(state_dict, dict(left))
            left.clear()
            return state_dict

        def take_apart(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
            engine = this()
            if engine is None:
                return None
            state_dict, own = checkpoint.apart(state_dict, engine.store)
            loaded.append(own)
            return engine.radii.kept_in(state_dict, engine.steps)

        def load(base: Optimizer) -> None:
            engine = this()
            if engine is not None and loaded:
                checkpoint.load(engine, loaded[-1])
            loaded.clear()

        base = self.base_optimizer
        with suppress(AttributeError):  # some wrappers of optimizers have no hooks
            base.register_state_dict_pre_hook(show)
            base.register_state_dict_post_hook(add)
            base.register_load_state_dict_pre_hook(take_apart)
            base.register_load_state_dict_post_hook(load)

    def _itself(self) -> MicroBatchSAM:
        """Also where ``self`` is a framework's wrapper, which imitates this class."""
        itself = self.engine.owner()
        assert isinstance(itself, MicroBatchSAM)
        return itself

    method: methods.SAM = _of_engine("method", "The method: how the perturbation is made.")
    enabled: bool = _of_engine("enabled", "Without it the base optimizer works alone.")
    steps: int = _of_engine("steps", "Steps taken so far.")
    split: Split = _of_engine("split", "How a batch becomes micro-batches.")

    @property
    def num_micro_batches(self) -> int | None:
        """Parts into which a batch is split; None where their size is given."""
        return self.split.parts

    @num_micro_batches.setter
    def num_micro_batches(self, parts: int | None) -> None:
        self.split = Split(parts, self.split.size)

    @property
    def micro_batch_size(self) -> int | None:
        """Samples per part of a batch; None where their number is given."""
        return self.split.size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int | None) -> None:
        self.split = Split(self.split.parts, size)

    @property
    def strict(self) -> bool:
        """Whether what would train something else than the method is an error."""
        return self.engine.mistakes.strict

    @strict.setter
    def strict(self, strict: bool) -> None:
        self.engine.mistakes.strict = strict

    @property
    def rho(self) -> float:
        """Not here.

        Raises:
            AttributeError: read or set: rho is in the parameter groups, as the learning rate is.
        """
        raise AttributeError("rho is in the parameter groups, as lr is: group['rho'] for group in opt.param_groups")

    @rho.setter
    def rho(self, rho: Radius) -> None:
        raise AttributeError(
            f"opt.rho = {rho!r} would change nothing, rho is in the parameter groups, as lr is: "
            f"for group in opt.param_groups: group['rho'] = {rho!r}"
        )

    @property
    def model(self) -> nn.Module | None:
        """Whose buffers change in the first pass of each micro-batch only."""
        return self.engine.buffers.model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        if model is not None:
            check_model(model)
        ranks = Ranks(self.ascent, model)
        ranks.check()
        self.engine.check_idle("another model")
        self.engine.buffers.thaw()
        self.engine.buffers, self.engine.ranks = Buffers(model), ranks
        for handle in self._watch:
            handle.remove()
        self._watch = checkpoint.watch(self.engine, model)

    @property
    def ascent(self) -> Ascent:
        """Whose gradients the perturbation is made of.

        To be set where a framework makes the DistributedDataParallel module after the optimizer: first ``model``, then this.

        Raises, when set:
            TypeError, ValueError, RuntimeError: as at construction, or a step is under way; nothing was changed.
        """
        return self.engine.ranks.ascent

    @ascent.setter
    def ascent(self, ascent: Ascent) -> None:
        check_parallel(self.parallel, self.model, self.compile, ascent)
        ranks = Ranks(ascent, self.model)
        ranks.check()
        self.engine.check_idle("another ascent")
        self.engine.ranks = ranks

    # -- an Optimizer in every convention -------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's. Beside its own stands what the method keeps, up to date at every look: see ``checkpoint``."""
        checkpoint.show(self.engine)
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group may have a "rho". The new parameters are flattened, the old ones stay where they are.

        Raises:
            TypeError, ValueError, RuntimeError: a group that cannot be served, or a step is under way; nothing was changed.
        """
        self.engine.check_idle("add_param_group()")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict with 'params', got {type(param_group).__name__}")
        rho = param_group.get("rho", self.defaults["rho"])
        check_rho(rho_at(rho, self.steps))
        self.base_optimizer.add_param_group({**param_group, "rho": rho})
        try:
            self.engine.adopt()
        except Exception:
            del self.base_optimizer.param_groups[-1]
            raise

    def __getstate__(self) -> dict[str, Any]:
        engine = self.engine
        engine.check_idle("copying or pickling the optimizer")
        engine.take_in(moved=True)
        engine.radii.take_schedules(engine.steps)
        own = (
            "defaults",
            "base_optimizer",
            "num_micro_batches",
            "micro_batch_size",
            "parallel",
            "compile",
            "flatten",
            "backend",
            "rounding",
            "masters",
            "process_group",
        )
        names = (*own, "method", "model", "enabled", "ascent", "strict")
        return {
            **{name: GroupInCopies.of(name, getattr(self, name)) for name in names},
            "schedules": engine.radii.schedules,
            checkpoint.KEY: checkpoint.show(engine),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" not in state:  # Optimizer.load_state_dict hands over what it loaded
            self.base_optimizer.__setstate__(state)
            return
        state = {name: GroupInCopies.out_of(value) for name, value in state.items()}
        left, method, model = state.pop(checkpoint.KEY), state.pop("method"), state.pop("model")
        enabled, schedules = state.pop("enabled"), state.pop("schedules")
        split = Split(state.pop("num_micro_batches"), state.pop("micro_batch_size"))
        ascent, strict = state.pop("ascent", "global"), state.pop("strict", False)
        later = {"parallel": False, "compile": False, "rounding": "nearest", "masters": False, "process_group": None}
        super().__setstate__({**later, **state})
        seed = None if self.rounding == "nearest" else self.param_groups[0][SEED]
        self._make_engine(method, model, split, ascent, seed, strict)
        self.engine.enabled, self.engine.radii.schedules = enabled, schedules
        self.engine.adopt()
        self.engine.listen()
        checkpoint.load(self.engine, checkpoint.out_of_state(self.base_optimizer, left))

    def __repr__(self) -> str:
        split = f"micro_batch_size={self.micro_batch_size}"
        if self.micro_batch_size is None:
            split = f"num_micro_batches={self.num_micro_batches}"
        base = "\n  ".join(repr(self.base_optimizer).splitlines())
        split += f", ascent={self.ascent!r}" if self.ascent != "global" else ""
        split += f", parallel={self.parallel!r}" if self.parallel else ""
        split += ", compile=True" if self.compile else ""
        split += f", rounding={self.rounding!r}" if self.rounding != "nearest" else ""
        split += ", masters=True" if self.masters else ""
        chosen = self.engine.store.backends or [self.backend]
        split += f", backend={' and '.join(map(repr, chosen))}"
        return f"{type(self).__name__}(\n  method={self.method}, {split}\n  {base}\n)"

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, which plain torch optimizers load, with what the method keeps among its entries.

        That is ``state[p]["msam_ema"]``, ``["msam_v"]``, ``["msam_mask"]`` and ``["msam_master"]``, and in each group
        "msam_steps" and "msam_mask_step", where whatever saves an optimizer finds it; see ``docs/checkpoints.md``. What has no
        entry to stand in, because the base optimizer has yet to begin that, is under "msam". The base optimizer's own
        ``state_dict`` has the same.

        A base optimizer whose class makes its state dicts itself makes this one too, and loads it.

        Raises:
            RuntimeError: the weights are perturbed, and would be saved as they are.
        """
        self.engine.check_restored("state_dict()")
        self.engine.take_in()
        self.engine.radii.take_schedules(self.steps)
        if saves_itself(self.base_optimizer):
            return {**self.base_optimizer.state_dict(), checkpoint.KEY: checkpoint.remembered(self.engine)}
        left = checkpoint.show(self.engine)
        return checkpoint.saved(super().state_dict(), left)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class, or of the plain base optimizer, returned.

        A group without "rho" keeps the one it has, and so does one whose rho is a function of the step. What the method
        keeps (an EMA, LookSAM's direction, a mask) starts anew where ``state_dict`` has none. One that the most copied
        implementations of SAM and F-SAM saved loads too; a warning says what it lacks.

        Raises:
            ValueError: ``state_dict`` is of other parameters; nothing was changed.
        """
        engine = self.engine
        engine.check_idle("load_state_dict()")
        state_dict = checkpoint.translated(engine, state_dict)
        engine.take_in(moved=True)  # what is loaded takes the device and dtype of today's parameters
        checkpoint.check(state_dict, engine.store)
        if saves_itself(self.base_optimizer):
            kept = state_dict.get(checkpoint.KEY, {})
            checkpoint.take_in(engine, kept)
            self.base_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != checkpoint.KEY})
            checkpoint.load(engine, kept)
            return
        loaded: dict[str, Any] = {}

        def last_hook(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            checkpoint.check(state_dict, engine.store)  # the user's hooks may have changed it
            state_dict, own = checkpoint.apart(state_dict, engine.store)
            checkpoint.take_in(engine, own)
            loaded.update(own)
            return engine.radii.kept_in(state_dict, engine.steps)

        hook = self.register_load_state_dict_pre_hook(last_hook)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        checkpoint.load(engine, loaded)

    # -- user's calls ---------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Norms and flags of the latest step, per micro-batch. Reading them is the only time anything is computed.

        Raises:
            RuntimeError: no pass of a step that perturbs has ended yet.
        """
        return self.engine.stats()

    @property
    def pass_index(self) -> int | None:
        """Where the pass under way is: 0 at w, with Momentum-SAM at its w + e, 1 at w + e, 2 at w − e. None outside of a step.

        For what your own code does once per micro-batch, in the body of a loop, a closure, a layer or a hook::

            if not opt.pass_index:
                meter.update(loss)
        """
        step = self.engine.step
        return None if step is None else step.turn

    def passes(self, *batch: Any, scaler: torch.amp.GradScaler | None = None) -> Passes:
        """The loop of one step: yields each micro-batch as often as the method needs, for a forward and a backward.

        ``batch``: tensors, or dicts, tuples and lists of them, that share dim 0. Several arguments are yielded as a tuple,
        one as it came, both sliced along dim 0 (views). Where there is one micro-batch and so nothing to slice, anything
        goes: strings, numbers, images of several sizes, sparse tensors. Without arguments the loop is one micro-batch of
        somebody else's accumulation, and yields None. Each pass gets containers of its own, with the same tensors in them:
        what a body takes out of its dict is there in the next pass.

        After the loop the weights are bit for bit what they were, and the mean descent gradient, weighted by micro-batch
        size, has been added to ``p.grad``, as ``backward()`` would. A ``break``, an exception or a dropped iterator
        restores the weights and the gradients that were there before. Until the loop ends, gradients that passes leave are
        the optimizer's alone: it keeps some, and may add to them.

        A variable or a progress bar may hold what this returns. But where something keeps the iterator that was made of it,
        as ``enumerate`` in a variable does, Python does not tell it that the loop was left. A loop that may be left early
        then stands in a block, at the end of which it is over::

            with opt.passes(x, y) as parts:
                numbered = enumerate(parts)
                for i, (xb, yb) in numbered:
                    ...

        Where a ``GradScaler`` scales the losses, name it, and the rest of its loop stays what it is::

            for xb, yb in opt.passes(x, y, scaler=scaler):
                scaler.scale(loss_fn(xb, yb)).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

        What methods remember and measure is then independent of the scale, and what they remembered in a loop whose step the
        scaler skipped is forgotten; see ``docs/precision.md``.

        Raises:
            ValueError: tensors of different length, or more micro-batches than samples.
            TypeError: something in ``batch`` that cannot be sliced, or ``scaler`` is no ``GradScaler``.
            RuntimeError: another loop is under way; or in the loop, no loss was scaled by ``scaler``.
        """
        self.engine.check_idle("passes()")
        parts, shares = batches.split(batch, self.split)
        return Passes(self.engine.passes(parts, shares, batches.renewal(parts[0]), scaled_by(scaler, self)))

    def step(
        self,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
    ) -> Any:
        """Update the weights.

        Without ``closure``: the base optimizer's step on ``p.grad``, as it stands after a ``passes`` loop. Gradients that came
        out of no such loop are taken too, as frameworks may want it; a warning says so once, see ``strict``. After a loop there
        may be a closure that runs no backward, as frameworks pass one: it is called, and its value returned.

        With a closure, which runs forward and backward and returns the loss, or a sequence of them, one per micro-batch
        of equal weight: the whole step. Each is called as often as the method needs. Restoring, accumulating and updating
        are one kernel. ``p.grad`` from before takes no part and is None afterwards; if a closure raises, weights and
        gradients are what they were. Until the step ends, gradients that closures leave are the optimizer's alone: it keeps
        some, and may add to them.

        Args:
            closure: see above.
            scaler: with closures, the ``GradScaler`` that scales their losses, ``scaler.scale(loss).backward()``; as in
                ``train_step``. Without, ``scaler.step(opt)`` is the call.
            max_grad_norm: as in ``train_step``. Without closures ``p.grad`` stays what it is.

        Returns:
            None, the closure's value at w, or for a sequence the detached mean of the values.

        Raises:
            RuntimeError: the weights are perturbed, by a ``passes`` loop that is not finished; a closure leaves no gradient;
                or, with ``strict``, gradients came out of no loop, or would be dropped. Gradients are what they were.
            ValueError: a number of closures other than ``num_micro_batches``. With ``micro_batch_size`` the caller splits
                the batch, into any number.
        """
        step = self._profiled_step if has_listeners(self) else self.step_without_hooks
        if scaler is None and max_grad_norm is None:
            return step(closure)
        return step(closure, self.between(None, scaler, max_grad_norm))

    step.hooked = True  # type: ignore[attr-defined]  # torch's wrapper costs more than a kernel: see has_listeners

    def step_without_hooks(
        self, closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None, between: Between | None = None
    ) -> Any:
        """``step``, where nobody listens or the hooks have run."""
        self.engine.check_idle("step()")
        if closure is None or (self.engine.has_mean and callable(closure) and self.engine.follow()):
            if between is not None and between.scaled is not None:
                raise ValueError("step(scaler=...) is for closures; after a passes() loop call scaler.step(opt)")
            most = None if between is None else between.max_grad_norm
            return self.engine.update_after(closure, most) if callable(closure) else self.engine.update(most)
        closures: list[Callable[[], Any]] = [closure] if callable(closure) else list(closure)
        shares = closure.shares if isinstance(closure, MicroBatches) else [1 / max(len(closures), 1)] * len(closures)
        wanted = self.engine.split.parts
        if not closures or (wanted and len(closures) != wanted):
            raise ValueError(
                f"num_micro_batches={wanted} takes as many closures, one per micro-batch, got {len(closures)}"
                if wanted
                else "step takes one closure per micro-batch, got an empty sequence"
            )
        if isinstance(closure, MicroBatches):
            values = self.run(closure) if closure.between is None else self._run_between(closure)
        elif between is not None:
            with between:
                values = self.engine.run(closures, shares, between)
        else:
            values = self.engine.run(closures, shares)
        if callable(closure):
            return values[0]
        return None if any(v is None for v in values) else batches.mean(values, shares)

    _profiled_step = Optimizer.profile_hook_step(step_without_hooks)

    def train_step(
        self,
        loss_fn: Callable[..., Tensor],
        *batch: Any,
        before_update: Callable[[], object] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
    ) -> Tensor:
        """One whole step: ``loss_fn(*micro_batch)`` returns the mean loss of its micro-batch.

        ::

            opt.train_step(loss_fn, x, y, max_grad_norm=1.0, scaler=scaler)
            scaler.update()

        Args:
            loss_fn: forward only; ``backward()`` is called on what it returns.
            batch: as in ``passes``; ``loss_fn`` gets one argument for each.
            before_update: called right before the update, with the weights at w and the mean descent gradient in ``p.grad``,
                as between a ``passes`` loop and ``step()``: it may clip, log or change gradients. The update is then a kernel
                of its own, as there: it moves 2 times the parameters' memory more, 4 times with several micro-batches.
            scaler: scales the loss. Gradients are unscaled before ``before_update``; where one is not finite the update is
                skipped on the device, without waiting for it: weights, state, what the method remembers and step numbers are
                what they were, while ``opt.steps`` and schedulers count on. ``scaler.update()`` is the caller's, after each
                step.
            max_grad_norm: the mean gradient's L2 norm over all parameters, at most; > 0. As ``clip_grad_norm_`` before the
                update, and before ``before_update``, but that where nobody else looks it costs one reading pass: the factor
                is a coefficient of the update, as is what the scaler unscales by. A gradient that is not finite is NaN then.

        Returns:
            The detached mean loss at w over the whole batch, unscaled.

        Raises:
            ValueError, TypeError, RuntimeError: as ``passes``, or with ``scaler`` a base optimizer without a fused kernel, a
                ``scaler.update()`` that is due; weights and gradients are what they were.
        """
        self.engine.check_idle("train_step()")
        if not batch:
            raise ValueError("train_step needs a batch: train_step(loss_fn, x, y)")
        itself = self._itself()  # a framework's wrapper has another step
        between = itself.between(before_update, scaler, max_grad_norm)
        loss: Tensor = itself.step(itself.micro_batches(loss_fn, batch, between))
        return loss

    def between(
        self,
        before_update: Callable[[], object] | None,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None = None,
    ) -> Between | None:
        """What steps have before their update, if anything."""
        if before_update is None and scaler is None and max_grad_norm is None:
            return None
        between = Between(self, self.engine, before_update, scaler, max_grad_norm)
        empty = before_update is None and between.scaled is None and max_grad_norm is None
        return None if empty else between

    def micro_batches(
        self, loss_fn: Callable[..., Tensor], batch: tuple[Any, ...], between: Between | None = None
    ) -> MicroBatches:
        """The closures that ``train_step`` runs, one per micro-batch."""
        scale = None if between is None else between.scale
        return batches.micro_batches(loss_fn, batch, self.split, scale, between)

    def _run_between(self, whole: MicroBatches) -> list[Any]:
        with whole.between:
            return self.run(whole)

    def run(self, whole: MicroBatches) -> list[Any]:
        """A step of these micro-batches, one after the other or in parallel; their losses at w."""
        engine, parallel, model = self.engine, self.parallel, self.engine.buffers.model
        if not parallel or len(whole) == 1:
            return engine.run(whole, whole.shares, whole.between)
        check_parallel(parallel, model, self.compile, self.ascent)
        check_masters(self.masters, self.method, self.base_optimizer, parallel)
        assert model is not None
        if not self.compile:
            self._compiled = None
        elif self._compiled is None or self._compiled.model is not model:
            self._compiled = Compiled(model, SUPPLIED)
        most = len(whole) if isinstance(parallel, (bool, str)) else parallel
        engine.check_idle("a step")
        engine.follow()

        def at_once() -> list[Any]:
            passes = ParallelPasses(model, engine.store, whole, most, self._compiled, engine.ranks.own)
            return engine.run(whole, whole.shares, whole.between, passes)

        if parallel != "auto":
            return at_once()
        auto, capturing = self._auto, engine.store.is_capturing()
        kind = (engine.plan(), whole.shapes) if auto.decision is None else None
        way = auto.way(kind, capturing)
        with auto.timed(way, kind, engine.store.devices, capturing):
            if way:
                try:
                    return at_once()
                except (Refused, torch.cuda.OutOfMemoryError) as refusal:
                    auto.refused(refusal)
            return engine.run(whole, whole.shares, whole.between)

    def capture(
        self,
        loss_fn: Callable[..., Tensor],
        *example_batch: Any,
        warm_up: int = 3,
        before_update: Callable[[], object] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
        other_shapes: Literal["eager", "capture", "error"] = "eager",
        generators: Sequence[torch.Generator] = (),
    ) -> CapturedStep:
        """``train_step(loss_fn, *batch)`` as one CUDA graph: both passes of every micro-batch, all kernels, the update.

        ::

            loader = DataLoader(data, batch_size=128, shuffle=True, num_workers=4, pin_memory=True)
            example = next(iter(loader))
            step = opt.capture(lambda x, y: F.cross_entropy(model(x), y), *example)
            for x, y in loader:
                loss = step(x, y)
                scheduler.step()

        Nothing runs yet: the first ``warm_up`` calls of what is returned are eager steps, the next one is captured, and
        the others replay it. See ``capture.CapturedStep``.

        Batches may be anywhere: each call copies its own to where the graph reads it, so ``.to(device)`` is not needed.
        From pinned memory (``pin_memory=True``) that copy does not make the host wait, and the loader may go on at once;
        from other memory it does. A returned loss is on the device: look at it now and then, ``loss.item()`` in each step
        would let the device wait for the host. To copy while the previous step runs, see ``docs/faq.md``.

        In the graph belongs what ``loss_fn`` and ``before_update`` do on the device. Autocast, in ``loss_fn`` or around the
        calls, dropout, BatchNorm, activation checkpointing and a model out of ``torch.compile`` (of any mode but those that
        make CUDA graphs themselves) work as in ``train_step``. Python in the two functions runs no more once the step is
        captured; what it decided by, ``model.train()`` and autocast among it, stays as it was at the capture.

        Args:
            loss_fn: as in ``train_step``; it must do the same on the device each time, without looking at values.
            example_batch: as in ``train_step``; later batches have its structure and dtypes.
            warm_up: eager steps before the capture, >= 1.
            before_update, scaler, max_grad_norm: as in ``train_step``. ``before_update`` becomes part of the graph: a value
                that it is to show goes into a tensor that was there before, as in
                ``lambda: norm.copy_(clip_grad_norm_(model.parameters(), 1.0))``. Call ``scaler.update()`` after each step.
            other_shapes: what a batch of other shapes, such as the last one of an epoch, is: an "eager" step, with the
                result of ``train_step``; a "capture" of its own, with its own warm-up and memory; or an "error". One of fewer
                samples than micro-batches is refused, as there.
            generators: CUDA generators other than the default one that ``loss_fn`` draws from.

        Raises:
            RuntimeError: the parameters are not all on one CUDA device.
            TypeError: ``loss_fn`` cannot be called, a hyper-parameter is a tensor on the GPU, or one of ``generators`` is
                none of its device.
            ValueError: no example batch, one that cannot be split, ``warm_up`` < 1, or another ``other_shapes``.
        """
        self.engine.take_in()
        if self.engine.store.is_sharded:
            raise RuntimeError(
                "capture cannot hold sharded parameters (DTensors): what gathers them decides on the host, in every pass; use "
                "train_step, which does the same without a graph"
            )
        devices = sorted(map(str, self.engine.store.devices))
        if len(devices) != 1 or not devices[0].startswith("cuda"):
            got = ", ".join(devices) or "frozen ones only"
            raise RuntimeError(
                f"capture needs all parameters on one CUDA device, got {got}: use train_step, which does the same without a "
                "graph"
            )
        for g, group in enumerate(self.param_groups):
            on_gpu = [name for name, value in group.items() if isinstance(value, Tensor) and value.is_cuda]
            if on_gpu:
                raise TypeError(
                    f"{', '.join(on_gpu)} of group {g} is a tensor on the GPU, which the host would have to wait for in every "
                    "step: use a number; the graph follows it all the same"
                )
        # Capturing stands above the optimizer, whose steps it records: this is the only import of what stands above.
        from .capture import CapturedStep, CudaRecorder

        recorder = CudaRecorder(torch.device(devices[0]), generators)
        itself = self._itself()
        between = itself.between(before_update, scaler, max_grad_norm)
        return CapturedStep(itself, loss_fn, example_batch, recorder, warm_up, between, other_shapes)

    def update_hyper(self) -> None:
        """Bring the device's copy of learning rates, rho and other hyper-parameters up to date, without a host sync.

        Every eager step and every call of ``capture``'s result does so by itself. Call it before you replay a CUDA graph of
        your own, after a scheduler's step. Where the method's ``start`` or a function for rho looks at the number of steps,
        count such replays in ``opt.steps`` yourself. Which kind of step LookSAM takes, and that a step chooses no mask, is
        fixed in the graph.
        """
        self.engine.prepare()

    @property
    def mask(self) -> list[Tensor] | None:
        """Sparse SAM's mask: for every parameter, in the order of the groups, bools in its shape. None before there is one.

        Assign such a list to take another one, which may have any number of elements set; ``update_every`` counts from
        there. Parameters that are added to the optimizer or unfrozen later have none: the next step then chooses for all.
        Of one that was never trained the mask is False everywhere, whatever is assigned.

        Raises, when assigned:
            ValueError: tensors of other shapes or dtypes than the parameters' and bool.
            RuntimeError: the method has no mask, or a step is under way.
        """
        self.engine.take_in()
        store = self.engine.store
        if not store.flats or any(flat.mask is None for flat in store.flats):
            return None
        nothing = torch.zeros((), dtype=torch.bool)
        pairs = zip(store.parameters(), store.places(), strict=True)
        return [nothing.to(p.device).expand(p.shape) if at is None else at[0].mask_of(at[1]) for p, at in pairs]

    @mask.setter
    def mask(self, masks_: Sequence[Tensor]) -> None:
        self._check_sparse("a mask")
        self.engine.check_idle("a new mask")
        self.engine.follow()
        params, new = self.engine.store.parameters(), list(masks_)
        wanted, got = (
            [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in ts] for ts in (params, new)
        )
        if wanted != got or any(t.dtype != torch.bool for t in new):
            dtypes = sorted({str(t.dtype) for t in new if isinstance(t, Tensor)})
            raise ValueError(
                f"mask must be a list of torch.bool tensors, one for each parameter, of shapes {wanted}, got "
                f"{', '.join(dtypes)} of shapes {got}"
            )
        for place, bits in zip(self.engine.store.places(), new, strict=True):
            if place is not None:
                flat, i = place
                flat.set_mask(i, bits)
        self.engine.mask_step = self.steps

    def update_mask(self, loss_fn: Callable[..., Tensor], *samples: Any) -> None:
        """Choose Sparse SAM's mask by the sum of squares of the gradients of single samples, the Fisher information.

        A mask that is "dynamic" drops and regrows by it. One forward and backward per sample, without perturbation. Weights,
        gradients, and with ``model=`` its buffers, stay what they are. Layers that need more than one sample
        (BatchNorm in training) are the caller's to switch: ``model.eval()``.

        Args:
            loss_fn: as in ``train_step``; it is given batches of one sample.
            samples: as a batch in ``train_step``.

        Raises:
            RuntimeError: the method has no mask, or a step is under way.
            ValueError: there are no samples, or a gradient is not finite: the old mask is kept.
        """
        sparse = self._check_sparse("update_mask()")
        self.engine.check_idle("update_mask()")
        if not samples:
            raise ValueError("update_mask needs samples: update_mask(loss_fn, x, y)")
        closures = batches.micro_batches(loss_fn, samples, Split(None, 1))
        self.engine.update_mask(closures, sparse)

    def _check_sparse(self, what: str) -> methods.SparseSAM:
        sparse = self.method.full.sparse
        self.engine.check_mask(sparse, self.engine.store.in_parts)
        if sparse is None:
            raise RuntimeError(f"{what} is for methods with a mask, e.g. methods.SparseSAM(), got {self.method}")
        return sparse

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; inside a ``passes`` loop it also drops the gradients that were there before the loop."""
        if set_to_none and not profiler_enabled():  # torch's costs more than clearing
            for group in self.param_groups:
                set_grads(list(group["params"]), [])
        else:
            super().zero_grad(set_to_none)
        self.engine.drop_before()

    def restore(self) -> None:
        """Give up the step under way: weights and gradients are at once, bit for bit, what they were before it."""
        self.engine.restore()


def find(optimizer: Any) -> MicroBatchSAM:
    """The ``MicroBatchSAM`` inside of what a framework makes of it: Accelerate, Lightning, Fabric, a scheduler.

    Raises:
        TypeError: there is none; the message says what there is.
    """
    seen: list[Any] = []
    inner, found = optimizer, None
    while inner is not None and all(inner is not other for other in seen):
        seen.append(inner)
        found = inner if isinstance(inner, MicroBatchSAM) else found  # wrappers may imitate the class of what they wrap
        inner = next((v for name in WRAPPED_AS if (v := getattr(inner, name, None)) is not None), None)
    if found is None:
        what = " around ".join(f"a {type(each).__name__}" for each in seen) or "None"
        raise TypeError(
            f"there is no MicroBatchSAM in it, got {what}: make one, MicroBatchSAM(base_optimizer), before a framework wraps it"
        )
    itself = found.engine.owner()
    assert isinstance(itself, MicroBatchSAM)
    return itself


#: Under these names wrappers keep what they wrap.
WRAPPED_AS = [prefix + name for name in ("optimizer", "optim") for prefix in ("", "_")]


def passes(optimizer: Any, *batch: Any, scaler: torch.amp.GradScaler | None = None) -> Passes:
    """``optimizer.passes(*batch, scaler=scaler)``, also where a framework has wrapped the optimizer.

    ::

        model, optimizer, loader = accelerator.prepare(model, MicroBatchSAM(...), loader)
        for x, y in loader:
            for xb, yb in msam_kernels.passes(optimizer, x, y):
                accelerator.backward(loss_fn(model(xb), yb))
            optimizer.step()
            optimizer.zero_grad()

    Raises:
        TypeError: there is no ``MicroBatchSAM`` in it. Otherwise as ``MicroBatchSAM.passes``.
    """
    return find(optimizer).passes(*batch, scaler=scaler)
