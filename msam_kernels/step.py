# SPDX-License-Identifier: Apache-2.0
"""``Engine``: what runs the steps of an optimizer, and keeps what lives on between them. ``Step``: one of them, under way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from . import masks
from ._torch import Scaled, is_shared, mark_stepped, moved, versions_of
from .batches import MicroBatches, Split
from .buffers import Buffers
from .gradients import Optionals, Vectors, apart, is_writable, own_memory, own_memory_of_lists, regular_gradient
from .methods import BASE, SAM, Coefficient, Plan, SparseSAM
from .mistakes import Mistakes, remedy
from .parallel import SEQUENTIAL, ParallelPasses, Refused
from .precision import Watch, is_short
from .ranks import USE, Ascent, Ranks
from .rules import (
    MASK_STEP,
    MOMENTA,
    RULES,
    SEED,
    STEPS,
    Radii,
    Radius,
    Rule,
    StepHook,
    Tables,
    check_masters,
    check_method,
    no_momentum,
    theirs_in,
)
from .sharded import Gathered, is_dtensor
from .store import PLAIN, Descent, Store
from .units import Undo, Units

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .flat import Held, Memory


@dataclass(frozen=True)
class Stats:
    """What the kernels recorded in the latest step, one entry per micro-batch, on the device until somebody looks.

    Momentum-SAM, whose micro-batches share one perturbation, has one entry. Of sharded parameters all ranks read them together:
    ‖e‖ is then added up over the ranks.

    Attributes:
        grad_norm: ‖d‖ of the ascent direction (for ASAM ‖T·d‖), float64; without the loss scale of a ``scaler`` that was given.
        perturbation_norm: ‖e‖ as it arrived in the stored weights, float64. In 16 bits it can fall far short of rho.
        along: how much of the e that was asked for arrived, ⟨arrived, e⟩ / ‖e‖², float64; for SAM ⟨arrived, d⟩ / (rho·‖d‖). 1
            where nothing was asked for. It is measured for weights of 16 bits; all that is asked for in fp32 and fp64 counts
            as arrived, which is so up to their rounding.
        nonfinite: True where the ascent gradient was not finite, so that nothing was perturbed.
    """

    grad_norm: Tensor
    perturbation_norm: Tensor
    along: Tensor
    nonfinite: Tensor


class Between(Protocol):
    """What comes between the last pass of a whole step and its update, see ``between``.

    Attributes:
        scaled: the scaler of the losses, or None.
        max_grad_norm: how long the mean gradient may be; None: as long as it is.
        is_unseen: whether nobody is to see the mean gradient in ``p.grad``.
    """

    scaled: Scaled | None
    max_grad_norm: float | None

    @property
    def is_unseen(self) -> bool: ...

    def __call__(self) -> Tensor | None: ...

    def note(self, found_inf: Tensor, mean: Vectors) -> Tensor | None: ...


#: For a loop that was left early, which its iterator does not learn while somebody holds it.
LEFT = "; a loop that may be left early is given up at the end of `with opt.passes(...) as parts:`"
#: By base optimizer: the groups whose rho a wrapper put there.
RHO_OF_OURS: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()
#: By base optimizer: the hook that tells its wrapper of steps that are not the wrapper's own, and the engines of all of them.
HOOKS: WeakKeyDictionary[Optimizer, tuple[StepHook, list[ref[Engine]]]] = WeakKeyDictionary()


def _in_groups(key: str) -> Any:
    """A number that stands in every parameter group, where whoever saves or copies an optimizer finds it."""

    def put(engine: Engine, value: int) -> None:
        for group in engine.base.param_groups:
            group[key] = value

    return property(lambda engine: engine.base.param_groups[0].get(key, 0), put)


class Engine:
    """Runs the steps of one optimizer.

    Attributes:
        steps: taken so far; in the groups as "msam_steps".
        enabled: whether the method takes part; without it the base optimizer works alone.
        step: the one under way, or None.
        norms_sq: of the latest step, by micro-batch: the terms of the direction's squared norm.
        latest: the plan of that step.
        split: how a batch becomes micro-batches. Frameworks wrap the optimizer: what changes is here, where all see it.
        left: the gradients that the drop-in's last step left in ``p.grad``, and their versions.
        has_mean: whether ``p.grad`` holds what ``passes`` loops ended in, and no step has taken it yet.
        owner: the optimizer itself, which wrappers imitate.
        mistakes: says what would not train the method.
        v_step: the step that "v", which LookSAM remembers, or WSAM's "gap" was made in; -1 where the next one starts it anew.
        mask_step: the step at which the mask was first used; in the groups as "msam_mask_step", where a method has one.
        ranks: whose gradients are averaged.
        unreduced: whether ``p.grad`` holds what earlier loops of the step left there without DDP's all-reduce.
        v_synced: whether DDP had reduced what "v" is made of; None where that does not matter.
    """

    steps: int = _in_groups(STEPS)
    mask_step: int = _in_groups(MASK_STEP)

    def __init__(
        self,
        base: Optimizer,
        method: SAM,
        model: nn.Module | None,
        default_rho: Radius,
        *,
        flatten: bool,
        backend: str,
        ascent: Ascent = "global",
        seed: int | None = None,
        masters: bool = False,
        process_group: ProcessGroup | None = None,
        strict: bool = False,
    ):
        self.base, self.method = base, method
        self.split = Split(1, None)
        self.left: Sequence[tuple[ref[Tensor], int]] = ()
        self.has_mean = False
        self.mistakes = Mistakes(strict)
        self.owner: ref[Optimizer]
        self.buffers = Buffers(model)
        self.ranks = Ranks(ascent, model)
        self.unreduced = False
        self.v_synced: bool | None = None
        self.store = Store(
            base, flatten=flatten, backend=backend, seed=seed, process_group=process_group, masters=masters
        )
        self.radii = Radii(base, default_rho)
        self.tables = Tables(self.radii)
        self.units = Units(self.store)
        self.enabled = True
        self.v_step = -1
        self.step: Step | None = None
        self.undo: Undo | None = None  # of a loop whose update is still to come, and may be skipped
        self.broken = False  # weights are perturbed that could not be brought back
        self.norms_sq: list[Tensor] = []
        self.latest = BASE
        self.watch = Watch()
        self.watches = False  # whether there is anything to watch
        self._shares_seed = False  # with the other ranks, which begin to step by the first one's

    # -- between steps ----------------------------------------------------------------------------------------------------

    @property
    def seed(self) -> int | None:
        """Of random rounding, in the groups as "msam_seed"; None where there is none."""
        return self.store.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.store.seed = seed
        for group in self.base.param_groups:
            group[SEED] = seed

    def check_idle(self, what: str) -> None:
        if self.broken or self.step is not None:
            self.check_restored(what)
            raise RuntimeError(
                f"{what} inside a passes() loop or a closure: let that finish first, or call opt.restore() to give it up{LEFT}"
            )

    def check_restored(self, what: str) -> None:
        if self.broken or (self.step is not None and self.step.perturbed):
            raise RuntimeError(
                f"{what} while the weights are perturbed: finish the passes() loop first, or call opt.restore() to give it up"
                f"{LEFT}"
            )

    def adopt(self, also: Sequence[Tensor] = ()) -> None:
        """Take in parameters that are new or were re-pointed, and groups without a rho. ``also``: see ``Store.adopt``."""
        self.check_mask(self.method.full.sparse, self.store.in_parts or any(map(is_dtensor, self.store.parameters())))
        self.ranks.check()
        before = self.store.flats
        if self.undo is not None and self.step is None and self.store.left_home():
            # What it would bring back is about to move. Gradients that are still there are taken to become a step.
            if any(p.grad is not None for p in self.store.parameters()):
                self.undo = None
            self.skipped()
        self.store.adopt(self.check_idle, self.method.full.only, also)
        if any(flat not in self.store.flats for flat in before):
            self.norms_sq = []  # of flats that are gone
        # With random rounding all arrives, on average; with masters once updates have taken them off the numbers that they
        # begin as. Of the stages of a pipeline some may have weights of 16 bits, and send a message, and others not.
        is_short_ = any(is_short(flat.dtype) for flat in self.store.flats)
        all_arrives = self.store.seed is not None or self.store.masters
        self.watches = is_short_ and not all_arrives and self.store.process_group is None
        put_there = RHO_OF_OURS.setdefault(self.base, set())
        for g, group in enumerate(self.base.param_groups):
            if "rho" not in group:
                group["rho"] = self.radii.default
                put_there.add(g)
        self.steps = self.steps  # also in groups that are new
        if self.store.seed is not None:
            self.seed = self.store.seed
        if self.method.full.sparse is not None:
            self.mask_step = self.mask_step
        self.radii.take_schedules(self.steps)
        self.tables.forget()

    def take_over(self) -> None:
        """``adopt`` for the first time: a rho that an earlier wrapper put into a group is not the user's."""
        groups = self.base.param_groups
        earlier = [groups[g] for g in RHO_OF_OURS.get(self.base, ()) if "rho" in groups[g]]
        radii = [group.pop("rho") for group in earlier]
        counted = self.base in RHO_OF_OURS
        try:
            self.adopt()
            now = [group["rho"] for group in earlier]
            if radii != now and self.base in HOOKS and latest(HOOKS[self.base][1]) is not None:
                self.mistakes.say(
                    "second wrapper",
                    f"another MicroBatchSAM wraps this {type(self.base).__name__}, and its rho goes from {radii} to {now}: "
                    "wrap an optimizer once, or delete the first wrapper",
                )
        except BaseException:
            for group, rho in zip(earlier, radii, strict=True):
                group["rho"] = rho
            raise
        if counted:  # by that wrapper
            self.steps = 0
        self.listen()

    def listen(self) -> None:
        """Be told of steps that somebody else makes with the base optimizer."""
        if self.base not in HOOKS:
            engines: list[ref[Engine]] = []

            def tell() -> None:
                engine = latest(engines)
                if engine is not None:
                    engine.count_step_of_base()

            HOOKS[self.base] = hook, _ = StepHook(tell), engines
            with suppress(AttributeError):  # some wrappers of optimizers have no hooks
                self.base.register_step_pre_hook(hook)
        HOOKS[self.base][1].append(ref(self))

    def take_in(self, *, moved: bool = False) -> None:
        """Notice groups that came by the base optimizer's ``add_param_group`` since the last look, and what was unfrozen.

        For what only asks for state: parameters that were moved or converted meanwhile matter to it with ``moved`` alone.
        """
        if (
            self.store.has_new()
            or (moved and self.store.left_home())
            or not all("rho" in group for group in self.base.param_groups)
        ):
            self.adopt()

    def follow(self) -> bool:
        """Notice parameters that somebody re-pointed, added or unfroze since the last look; whether any has a gradient."""
        have_grads = self.store.have_grads()
        if have_grads is None:
            self.adopt()
            if self.step is not None:
                self.step.follow()
            have_grads = self.store.have_grads()
        return bool(have_grads)

    def collect(self, *, clear: bool) -> Vectors:
        """``follow``, and every ``p.grad``: one look at the parameters. With ``clear``, every one is None then."""
        if not self.store.is_settled:
            self.follow()
            self.store.settle()
        grads = self.store.collect(clear=clear)
        if grads is None:
            self.follow()
            grads = self.store.collect(clear=clear)
            assert grads is not None, "what was adopted is where it is"
        return grads

    def prepare(self) -> bool:
        """Notice what the user changed since the last step: groups, addresses, hyper-parameters. Returns as ``follow``."""
        have_grads, steps = self.follow(), self.steps
        self.tables.refresh_radii(self.method.full, steps, self.store.devices, self._check_may_change)
        self.store.refresh_noise(steps)
        self.watch.look()
        if self.rule() is None and type(self.base) in RULES:  # a captured step may be one by it
            self.tables.refresh_settings(RULES[type(self.base)], self.store.devices, self._check_may_change)
        return have_grads

    def rule(self) -> Rule | None:
        """How the base optimizer's step is a kernel, if it is, with what that reads up to date.

        Right before the update, as a closure may set a learning rate for the base optimizer itself.
        """
        rule = self.tables.refresh_rule(self.store.devices, self._check_may_change)
        if rule is None and self.store.has_masters:
            raise RuntimeError(
                f"masters=True needs the fused update of {type(self.base).__name__}, which its flags or somebody's hooks on it "
                "replace by its own step, of the weights of 16 bits: leave differentiable, capturable and the hooks out, or "
                "masters"
            )
        if self.method.full.after:
            self.tables.refresh_rates(self.store.devices, self._check_may_change)
        return rule

    def _check_may_change(self) -> None:
        self.store.check_not_capturing("hyper-parameters")

    def plan(self) -> Plan:
        """What the next step does."""
        if not self.enabled:
            return BASE
        return self.method.plan(self.steps, self.store.has_v)

    def stats(self) -> Stats:
        """What the latest step recorded.

        Raises:
            RuntimeError: no pass of a step that perturbs has ended yet.
        """
        if not self.norms_sq:
            raise RuntimeError("stats are there after the first pass of a step that perturbs")
        norms_sq = torch.stack([terms.sum() for terms in self.norms_sq])
        achieved_sq, product, asked_sq = self.store.achieved(self.latest.only, len(norms_sq)).unbind(1)
        along = torch.where(asked_sq == 0, 1.0, product / asked_sq)
        length = norms_sq.sqrt() / self.latest.times
        if self.units.scale is not None and not self.latest.momentum:
            length = length / self.units.scale
        return Stats(length, achieved_sq.sqrt(), along, ~norms_sq.isfinite())

    # -- Sparse SAM -------------------------------------------------------------------------------------------------------

    def chooses_mask(self, plan: Plan) -> bool:
        """Whether the next step, of that plan, chooses a mask: the first one for itself, later ones for the step after.

        Raises:
            RuntimeError: there is no mask, and the method does not choose one by itself.
        """
        if plan.sparse is None or not plan.perturbs:
            return False
        missing = any(flat.mask is None for flat in self.store.flats)
        if missing and plan.sparse.update_every is None:
            raise RuntimeError(
                f"{plan.sparse} has no mask yet: call opt.update_mask(loss_fn, *samples), assign opt.mask, or give update_every"
            )
        return missing or self.mask_is_due(plan.sparse)

    def mask_is_due(self, sparse: SparseSAM) -> bool:
        return sparse.update_every is not None and self.steps + 1 - self.mask_step >= sparse.update_every

    def check_mask(self, sparse: SparseSAM | None, in_parts: bool) -> None:
        """Refuse a mask where a rank holds only a part of the parameters.

        Raises:
            ValueError: the method has one.
        """
        if sparse is not None and in_parts:
            raise ValueError(
                f"{sparse} chooses its mask by comparing elements of all parameters, and a rank holds only its shards or "
                "its stage of these: use a method without a mask"
            )

    def choose_mask(self, scores: masks.Scores, sparse: SparseSAM, step: int) -> None:
        masks.choose(self.store.flats, scores, sparse, step)
        self.mask_step = step

    def update_mask(self, closures: Sequence[Callable[[], Any]], sparse: SparseSAM) -> None:
        """Choose a mask by the gradients that the closures leave; weights, gradients and buffers stay what they are.

        Raises:
            ValueError: a gradient is not finite; the old mask is kept.
        """
        self.step = Step(self, BASE, [1.0], [], None, clear=True, had_gradients=self.prepare())
        with self.step as step:
            for closure in closures:
                self.buffers.freeze()
                call(closure)
                self.buffers.thaw()
                step.add_scores(self.collect(clear=True))
            scores = step.scores
            if not all(bool(t.isfinite().all()) for tensors in scores for t in tensors):
                raise ValueError("a gradient of the samples is not finite, and says nothing of the weights: use others")
            self.choose_mask(scores, sparse, self.steps)
            self.restore()

    def keep_mask(self) -> None:
        """The mask that the step under way chose stays, even if the step is given up."""
        if self.step is not None:
            self.step.chose_mask = False

    # -- steps ------------------------------------------------------------------------------------------------------------

    def passes(
        self,
        parts: list[Any],
        shares: list[float],
        renewed: Callable[[Any], Any] | None,
        scaled: Scaled | None = None,
    ) -> Generator[Any, None, None]:
        """The loop of one step without the update: each micro-batch as often as the plan says, renewed for each pass."""
        self.check_idle("passes()")
        with self.begin(shares, scaled, parts=parts, accumulates=True) as step:
            step.adds_to_v = step.had_gradients and self.v_step == self.steps
            step.lacks = NO_BACKWARD
            for _, part in step.turns(parts):
                yield part if renewed is None else renewed(part)
            step.conclude()
            step.end_in_grads()
            self.store.drawn += len(parts)
        self.has_mean = True

    def run(
        self,
        closures: Sequence[Callable[[], Any]],
        shares: list[float],
        between: Between | None = None,
        passes: ParallelPasses | None = None,
    ) -> list[Any]:
        """One whole step; what the closures returned at w.

        Args:
            between: see ``Step.update``.
            passes: what runs the closures' losses at once, instead of them.
        """
        values = []
        self.skipped()  # gradients of before take no part
        parts = closures.parts if isinstance(closures, MicroBatches) else None
        with self.begin(shares, None if between is None else between.scaled, parts=parts) as step:
            if passes is not None:
                values = step.together(passes)
            else:
                for turn, closure in step.turns(closures):
                    value = call(closure)
                    if turn == 0:
                        values.append(value)
            if step.had_gradients and not self.left and not isinstance(closures, MicroBatches):
                self.mistakes.say("dropped", DROPPED, remedy_of_caller=True)
            step.update(between)
        self.count_step()
        return values

    def update(self, most: float | None = None) -> None:
        """The base optimizer's step on the gradients that are there, as if no longer than ``most``."""
        if self._is_asked_for_state():
            return self._begin_state()
        if not self.has_mean:
            self.check_plain()
        self.update_uncounted(most=most)
        self.count_step()

    def update_after(self, closure: Callable[[], Any], most: float | None = None) -> Any:
        """``update`` on what a loop has left, after a closure that adds nothing to it, such as frameworks give; its value.

        Raises:
            RuntimeError: the closure runs backward.
        """
        trained = (p for p in reversed(self.store.parameters()) if p.grad is not None and p.requires_grad)
        hooks = [p.register_hook(_refuse) for p in itertools.islice(trained, 1)]  # the last one gets its gradient first
        try:
            value = call(closure)
        finally:
            for hook in hooks:
                hook.remove()
        self.update(most)
        return value

    def check_plain(self) -> None:
        """Gradients that came out of no loop: a word where the method would have made others of them.

        Raises:
            RuntimeError: ``strict``.
        """
        if self.plan() is not BASE and self.follow() and any(group.get("rho") for group in self.base.param_groups):
            sentence = PLAIN_STEP.format(base=type(self.base).__name__)
            self.mistakes.say("plain", sentence, remedy_of_caller=True)

    def count_step_of_base(self) -> None:
        """Before a step that somebody makes with the base optimizer, instead of ours.

        Raises:
            RuntimeError: the weights are perturbed, or the step would be another one than ours.
        """
        self.check_idle(f"{type(self.base).__name__}.step()")
        if self._is_asked_for_state():
            return
        if self.store.has_masters:
            raise RuntimeError(
                f"{type(self.base).__name__}.step() is of the weights of 16 bits, not of their masters: call step() of the "
                "MicroBatchSAM"
            )
        if not self.has_mean:
            self.check_plain()
        elif self.plan().after:
            raise RuntimeError(
                f"{self.method} has a part of its own after the base optimizer's step: call step() of the MicroBatchSAM, not "
                f"of the {type(self.base).__name__} in it"
            )
        self.count_step()

    def _is_asked_for_state(self) -> bool:
        """Whether this is how torch.distributed.checkpoint has an optimizer make its state: a step that is none.

        There is no state yet, every gradient is 0, and so is every learning rate.
        """
        groups = self.base.param_groups
        if self.base.state or any("lr" not in group or group["lr"] != 0 for group in groups):
            return False
        grads = [p.grad for p in self.store.parameters() if p.grad is not None]
        if not grads or any(g.is_sparse for g in grads):
            return False
        if self.store.is_sharded:  # alike on all ranks
            return not bool(self.store.gram([self.collect(clear=False)]).any())
        return not any(bool(g.any()) for g in grads)

    def _begin_state(self) -> None:
        rule = self.rule()
        if rule is None:
            return self.update_uncounted()
        self.store.begin_state(rule, self.tables, self.base.state, self.collect(clear=False))

    def update_uncounted(self, found_inf: Tensor | None = None, most: float | None = None) -> None:
        """``update``, but that the step is not counted. Where ``found_inf`` is not 0, nothing changes."""
        layout, rule = self.store.layout, self.rule()
        if rule is None:
            self.follow()
            if most is not None:
                if self.store.has_ranks:
                    self.limit(None, most)
                else:
                    clip_grad_norm_(self.store.parameters(), most)
            self._step_of_base()
        else:
            grads = self.collect(clear=False)
            if self.store.layout is not layout:  # there are parameters by now that are new
                rule = self.rule()
                assert rule is not None, "only what is in the groups has changed"
            if most is None:
                descent = Descent()
                descent.add(grads, PLAIN)
            else:
                descent, _ = self.store.limited(grads, None, None, most)
            mark_stepped(self.base)
            self.store.update(rule, self.tables, self.base.state, descent, found_inf)
        if self.method.full.after and self.v_step == self.steps:
            self.shift(self.collect(clear=False), found_inf=found_inf)
        self.store.forget_copies()

    def _step_of_base(self) -> None:
        hook, _ = HOOKS[self.base]
        hook.ours = True
        try:
            self.base.step()
        finally:
            hook.ours = False

    def limit(self, scale: Tensor | None, most: float | None) -> tuple[Tensor, Vectors]:
        """``p.grad`` without its scale, and no longer than ``most``, of the parameters of all ranks.

        Returns:
            Whether it was not finite, as on all ranks, and what ``p.grad`` is then.
        """
        grads = self.collect(clear=False)
        grads.lists = own_memory_of_lists(grads.lists, whole=False)
        limited, not_finite = self.store.limited(grads, None, scale, most)
        self.store.descend(grads, limited, weights=False)
        self.store.set_grads(self.store.optionals(grads))
        return not_finite, grads

    def shift(self, stepped: Vectors, gap: Vectors | None = None, found_inf: Tensor | None = None) -> None:
        """After the base optimizer's step: ``gap``, or what the step's micro-batches kept of it, off the weights.

        ``stepped``: gradients that it took; where these are absent the weights stay.
        """
        if gap is None:
            gap = self.store.vector_of(self.store.memory("gap", 0.0))
            self.v_step = -1
        scale = self.units.scale
        if scale is not None and found_inf is not None:
            scale = torch.where(moved(found_inf, scale.device) != 0, math.inf, scale)
        self.store.shift(gap.present(stepped), self.method.full.after, self.tables, scale)

    def begin(
        self,
        shares: list[float],
        scaled: Scaled | None = None,
        *,
        parts: Sequence[Any] | None = None,
        clear: bool = True,
        accumulates: bool = False,
    ) -> Step:
        """A step of so many micro-batches.

        Args:
            scaled: what its losses are.
            clear: ``p.grad`` is the step's alone.
            accumulates: see ``Step``.
        """
        had_gradients = self.follow()
        if not had_gradients:
            self.skipped()
        steps = self.steps
        self.tables.refresh_radii(self.method.full, steps, self.store.devices, self._check_may_change)
        if self.store.seed is not None:
            if self.store.is_sharded and not self._shares_seed:
                self.seed, self._shares_seed = self.store.shared_seed(self.store.seed), True
            self.store.refresh_noise(steps)
        if self.store.masters:
            self.rule()  # which refuses
            check_masters(True, self.method, self.base, False)
        plan = self.plan()
        if plan is not BASE:
            if plan.momentum or plan.after:
                check_method(self.method, self.base)
            if plan.sparse is not None:
                self.check_mask(plan.sparse, self.store.in_parts)
            if plan.only is not None:
                self.store.check_only(plan.only)
        scores: list[list[Tensor]] | None = [] if plan.sparse is not None and self.chooses_mask(plan) else None
        if scores is not None:
            self.store.check_not_capturing("the mask")
        self.norms_sq, self.latest = [], plan
        self.step = Step(
            self,
            plan,
            shares,
            scores,
            parts,
            clear=clear,
            had_gradients=had_gradients,
            scaled=scaled,
            accumulates=accumulates,
        )
        return self.step

    def momentum(self) -> Vectors:
        """The base optimizer's.

        Raises:
            ValueError: it has taken steps, and keeps none.
        """
        state = self.base.state
        if not any(name in MOMENTA for entry in state.values() for name in theirs_in(entry)):
            kept = sorted({name for entry in state.values() for name in theirs_in(entry)})
            if kept:
                raise ValueError(no_momentum(self.method, self.base, f"; it keeps {', '.join(map(repr, kept))}"))
        return self.store.momentum(state)

    def drop_before(self) -> None:
        """The user has cleared the gradients: those that were set aside too, and "v" is that of gradients that are gone."""
        if self.step is not None:
            self.step.drop_before()
        else:
            self.skipped()
            self.v_step = -1
            self.unreduced = self.has_mean = False

    def skipped(self, *, values: bool = True) -> None:
        """The gradients of loops since the latest update are gone, and what those loops changed with them.

        ``values``: memories may have changed, which they do not in what a CUDA graph captures.
        """
        self.store.drawn = 0
        if self.undo is not None:
            if values:
                self.undo.bring_back()
            self.v_step = self.undo.v_step
            if self.undo.mask_step is not None:
                self.mask_step = self.undo.mask_step
            self.undo = None

    def count_step(self) -> None:
        self.undo = None
        self.unreduced = self.has_mean = False
        self.store.drawn = 0
        if not self.store.is_capturing():  # what is captured has not run
            self.steps += 1
            if self.watches and self.norms_sq and not self.watch.is_over:
                several = self.store.has_ranks
                self.watch.note(lambda: self.store.achieved(self.latest.only, len(self.norms_sq)).sum(0), waits=several)

    @torch.no_grad()
    def restore(self) -> None:
        """Give up the step under way: weights and gradients are at once, bit for bit, what they were before it."""
        step = self.step
        self.ranks.release()
        error: Exception | None = None
        ran = not self.store.is_capturing()  # what is captured never ran: nothing has other values than before
        try:
            self.buffers.thaw(values=ran)
        except Exception as e:  # whatever a buffer's own class raises: the weights come back all the same
            error = e
        if self.broken or (step is not None and step.saves):
            self.broken = True
            try:
                self.store.restore()
                self.broken = False
            except RuntimeError as e:
                error = e
        if step is not None:
            step.give_back_grads(values=ran)
            step.give_back_memories()
            if step.began_undo:
                self.skipped(values=ran)
            self.store.drop_grads_of_others()
            if step.chose_mask:
                for flat in self.store.flats:
                    flat.mask = None
        self.store.forget_copies()
        self.step = None
        if error is not None:
            raise error


NO_BACKWARD = (
    "no parameter of the optimizer has a gradient after this pass: the body of a passes() loop calls backward() in every pass, "
    "not after the loop, and leaves the gradients there; list(opt.passes(...)) ends the loop before any body has run; and the "
    "optimizer is built of the model that is trained, after that was replaced or got adapters: "
)
NO_BACKWARD_IN_DROP_IN = (
    "no parameter of the optimizer has a gradient in second_step(): call backward() again after first_step()"
)
NO_BACKWARD_IN_CLOSURE = (
    "the closure left no gradient for any parameter of the optimizer: it calls backward() on its loss, or comes after a "
    "passes() loop: "
)
PLAIN_STEP = (
    "step() on gradients that did not come out of passes() is a plain step of {base}, without the perturbation (strict=True "
    "makes this an error, opt.enabled = False is for plain steps): write "
)
DROPPED = (
    "gradients of earlier backward passes are in p.grad, and step(closure) drops them (strict=True makes this an error): clear "
    "them by zero_grad(), or to accumulate over batches write "
)


def latest(engines: Sequence[ref[Engine]]) -> Engine | None:
    """Of those that are still there."""
    return next((engine for this in reversed(engines) if (engine := this()) is not None), None)


def _refuse(_: Tensor) -> None:
    raise RuntimeError(
        "this closure runs backward, and a passes() loop has left its gradient in p.grad already: use one of the two, step() "
        "after the loop, or step(closure) alone"
    )


def call(closure: Callable[[], Any]) -> Any:
    return closure() if torch.is_grad_enabled() else torch.enable_grad()(closure)()


class Step:
    """One step under way. It owns all that dies with it; giving it up is dropping it.

    As a context it sets the gradients aside that are there, and gives them and the weights back if the step does not finish.

    Attributes:
        perturbed: whether weights may be perturbed: the kernels know which.
        saves: whether weights were saved that the kernels hold to be those of this step.
        had_gradients: whether any were there before it, and not dropped since.
        lacks: what to say where a pass leaves no gradient at all.
        turn: which pass of its micro-batch is under way: 0 at w, or at w + e where the momentum gives that; 1 at w + e, 2 at
            w − e.
        aside: by flat, the gradients that were there before the step, and their values in memory that nobody else writes to;
            None as long as they are in ``p.grad``.
        adds_to_v: whether an earlier loop of the same optimizer step has begun "v".
        began_undo: whether what may have to be undone is this step's alone.
        accumulates: whether it adds to the gradients that were there before.
    """

    # Here, and not in __init__, since that takes as long as a kernel of a small model.
    turn = 0
    perturbed = saves = chose_mask = adds_to_v = began_undo = False
    aside: list[tuple[Optionals, Optionals]] | None = None
    _has_looked = False  # whether ``_look_at_scale`` has, in this step
    _i = 0  # the micro-batch under way
    _norm_sq: Tensor | None = None  # of its ascent
    _mean: Vectors | None = None  # of the descents so far
    _together: Descent | None = None  # of the latest micro-batches, where those ran at once
    _kept = False  # whether any micro-batch has
    _ahead: Vectors | None = None  # ĝ, where the update makes the gap of it
    _gap: Vectors | None = None  # what goes off the weights after the update, where no memory holds it
    _hands_mean = False

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        shares: list[float],
        scores: list[list[Tensor]] | None,
        parts: Sequence[Any] | None,
        *,
        clear: bool,
        had_gradients: bool,
        scaled: Scaled | None = None,
        accumulates: bool = False,
    ):
        self._scaled = scaled
        self._has_units = scaled is not None or engine.units.are_known
        self.engine, self.store, self.plan, self.shares = engine, engine.store, plan, shares
        self.ranks, self._parts, self.accumulates = engine.ranks, parts, accumulates
        self._several = self.ranks.own or self.ranks.is_several
        self.clear, self.had_gradients = clear, had_gradients
        self.lacks = NO_BACKWARD_IN_CLOSURE if clear else NO_BACKWARD_IN_DROP_IN
        self._scores = scores
        self._held: list[Vectors] = []  # its gradients of earlier passes, the latest first
        self._memories: list[tuple[Memory, Held]] = []  # those that change, and what they held before
        self._synced: list[bool] = []  # by pass, where it is known: whether DDP has reduced it
        self._lacking: list[tuple[int, ...]] = []  # by flat: parameters without a gradient in the latest ascent
        self._handed: list[tuple[Tensor, Tensor, int]] = []  # parameters, what they were handed over, and its version

    def __enter__(self) -> Step:
        try:
            if self._several:
                self.ranks.hold_back()
                self.ranks.count(self.store, self._parts)
                self._check_accumulation()
            if not self.had_gradients:
                self.aside = [([], [])] * len(self.store.flats)
                return self
            before = self.store.current_grads()
            self.aside = list(zip(before, own_memory_of_lists(before, whole=True), strict=True))
            self.store.set_grads(None)
            return self
        except BaseException:
            self.engine.restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.engine.step is not self:  # it was given up, and what is there now is not ours
            return
        if kind is not None:
            self.engine.restore()
        else:
            if self._several:
                self.ranks.release()
            self.engine.step = None

    def drop_before(self) -> None:
        """The user has cleared the gradients: those of before the step too."""
        if not self._has_looked:
            self.engine.skipped()
        self.adds_to_v = self.had_gradients = False  # v is of gradients that are gone
        if self.aside is not None:
            self.aside = [([], []) for _ in self.store.flats]
        if self._handed:
            self._hand_over()

    def give_back_grads(self, *, values: bool) -> None:
        """What was set aside is in ``p.grad`` again: the same values, in the same tensors where these can be written to.

        ``values``: they may have changed.
        """
        if self.aside is None:  # nothing was set aside
            return
        self.store.set_grads([list(map(_written, before, own)) if values else before for before, own in self.aside])

    def _look_at_scale(self) -> None:
        """Before gradients are read: by now a loss was scaled. And whoever looked at the means has them in other units."""
        engine, plan = self.engine, self.plan
        has_looked, self._has_looked = self._has_looked, True
        if not has_looked:
            engine.units.read(self._scaled)
            engine.tables.scale = engine.units.scale if plan.budget != math.inf else None
        if plan.lmbda is not None:
            engine.units.bring_means()
        if has_looked:
            return
        if self._scaled is not None and engine.undo is None:
            chooses = self._scores is not None
            engine.undo = Undo(
                self.store, engine.units, plan, chooses=chooses, v_step=engine.v_step, mask_step=engine.mask_step
            )
            self.began_undo = True

    def _remember(self, memories: Sequence[Memory]) -> None:
        """What they hold is there again if the step is given up."""
        if not self.store.is_capturing():
            self._memories += [(memory, memory.now()) for memory in memories]

    def give_back_memories(self) -> None:
        """What a step that is given up has moved on."""
        for memory, held in self._memories:
            memory.put_back(held)
        self._memories = []
        if self._kept:
            self.engine.v_step = self.engine.steps if self.adds_to_v else -1

    def turns(self, parts: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(turn, part): every micro-batch as often as the plan says, with the kernels' work in between.

        The descent of the last one is left to ``end_in_grads`` or ``update``.
        """
        plan, buffers = self.plan, self.engine.buffers
        if plan.momentum:
            self._lean()
        for i, part in enumerate(parts):
            self._i, self.turn = i, 0
            if self._several and not plan.climbs:
                self._hand_over()
            yield 0, part
            self.check_current()
            if self._several:
                self._after_pass()
            if plan.climbs:
                self.ascend()
                buffers.freeze()
                if self._several:
                    self._hand_over()
                yield 1, part
                self.check_current()
                if self._several:
                    self._after_pass()
                buffers.thaw()
            if plan.opposite is not None and plan.perturbs:
                self._cross()
                buffers.freeze()
                yield 2, part
                self.check_current()
                if self._several:
                    self._after_pass()
                buffers.thaw()
            if i + 1 < len(parts):
                self._accumulate()

    def together(self, passes: ParallelPasses) -> list[Tensor]:
        """The passes of all micro-batches, as many at once as ``passes`` runs, and the kernels' work; the losses at w.

        Weights are read only: those of the passes at w + e are copies, unless all passes share one e. The last descent is left
        to ``update``.
        """
        plan, store, engine, values = self.plan, self.store, self.engine, []
        if plan.momentum:
            self._lean()
        engine.buffers.freeze()
        try:
            for which in passes.turns:
                self._i, self.turn, norm_sq = which[-1], 0, None
                losses, *vectors = self._run(passes, which, None)
                if not store.is_settled:
                    store.settle(vectors[0])
                self._look_at_scale()
                if which.start == 0 and plan.lmbda is not None and plan.climbs:  # it moves on while they may still fail
                    self._remember(store.means(plan))
                if vectors[0].absent:
                    self._check_any(vectors[0])
                values += losses
                if plan.climbs:
                    for j in range(len(which) if self._scores is not None else 0):
                        self._look_at(vectors[0].micro_batch(j), needed=True)
                    copies = store.stacks(len(which), plan.only)
                    norm_sq = store.ascend(vectors[0], plan, engine.tables, which, copies)
                    engine.norms_sq += norm_sq.unbind()
                    if plan.opposite is None:
                        del vectors[plan.holds :]  # which would be memory beside the next pass
                    self.turn = 1
                    vectors.insert(0, self._run(passes, which, copies)[1])
                    if plan.opposite is not None:
                        self._look_at_scale()
                        copies = store.stacks(len(which), plan.only)
                        store.cross(vectors[1], plan, engine.tables, norm_sq, which, copies)
                        del vectors[plan.holds :]
                        self.turn = 2
                        vectors.insert(0, self._run(passes, which, copies)[1])
                self._together = self._descent_of(which, vectors, norm_sq)
                del vectors
                if which.stop < len(self.shares):
                    self._accumulate()
        finally:
            passes.put_back()
        engine.buffers.thaw()
        passes.commit()
        return values

    def _run(
        self, passes: ParallelPasses, which: range, weights: Sequence[Tensor | None] | None
    ) -> tuple[list[Tensor], Vectors]:
        """A pass of micro-batches at once.

        Raises:
            Refused: the loss moved parameters, whose gradients then are none that the kernels could take.
        """
        found = passes.run(which, weights)
        self.check_current()
        if not self.store.is_current():
            raise Refused(
                f"the loss gave parameters other memory, or unfroze some, between passes of one step: do it between steps, or "
                f"{SEQUENTIAL}"
            )
        losses, vector = found
        return losses, self.store.meet(vector)

    def _descent_of(self, which: range, vectors: Sequence[Vectors], norm_sq: Tensor | None) -> Descent:
        """``_descent`` of several micro-batches, whose vectors are stacks."""
        store, plan, shares = self.store, self.plan, [self.shares[i] for i in which]
        vectors = vectors[: 1 + plan.holds]
        products = store.gram(vectors[: plan.products], len(which)) if plan.products else None
        if plan.keeps:
            coefs = [number for coefficient in plan.keeps for number in coefficient.row()]
            sums = [] if products is None else [products]
            kept = Descent(stacks=vectors[: len(plan.keeps)], shares=store.weigh(shares, coefs, sums, -1, None))
            self._keep(kept, begins=which.start == 0)
        norm_sq = self._seen(norm_sq, vectors[0], len(which))
        sums, rescale = self._sums(products, norm_sq)
        of_each = Descent()
        of_each.combine(plan, vectors, 1.0)
        descent = Descent(stacks=of_each.terms, shares=store.weigh(shares, of_each.coefs, sums, rescale, norm_sq))
        if self._mean is not None:
            descent.add(self._mean, PLAIN)
        return descent

    def check_current(self) -> None:
        if self.engine.step is not self:
            raise RuntimeError("this passes() loop was given up by opt.restore(): start a new one")

    # -- other ranks ------------------------------------------------------------------------------------------------------

    def _check_accumulation(self) -> None:
        """Refuse to add to gradients of which nobody can tell whether they are of all ranks, where that makes a difference."""
        ranks = self.ranks
        if self.accumulates and self.had_gradients and self.plan.combines and ranks.is_several and not ranks.is_known:
            raise RuntimeError(
                f"{self.engine.method} adds to gradients that are there already, and with several ranks it has to know whether "
                "these were reduced: give model=, the DistributedDataParallel module (or the model, if there is none)"
            )

    def _after_pass(self) -> None:
        """Refuse gradients of which DDP has reduced some and not others, where these are combined: ranks would part."""
        engine, plan, synced = self.engine, self.plan, self.ranks.synchronised
        is_last = self._i + 1 == len(self.shares) and self.turn == (1 if plan.opposite is None else 2) * plan.climbs
        if self._handed and is_last:
            self._check_handed()
        if synced is None:
            return
        wrong = ""
        if plan.combines and not all(before == synced for before in self._synced):
            wrong = "combines the gradients of its passes, of which DistributedDataParallel reduced only some"
        elif plan.combines and synced and engine.unreduced and self.accumulates and self.had_gradients:
            wrong = "adds to gradients of earlier loops, which DistributedDataParallel has not reduced and will not"
        elif plan.after and not synced:
            wrong = "takes a step by gradients of its own, which nobody reduces in no_sync"
        elif plan.reuses is not None and engine.v_synced is not None and engine.v_synced != synced:
            wrong = "reuses a direction that was made with no_sync and without"
        if wrong:
            raise RuntimeError(f"{engine.method} {wrong}: ranks would part. Synchronise all passes or none, or {USE}")
        self._synced.append(synced)
        if is_last and self.accumulates:
            engine.unreduced = (engine.unreduced and self.had_gradients) or not all(self._synced)

    def _hand_over(self) -> None:
        """Right before the last pass: what DDP has not reduced into ``p.grad``, to which the pass adds, and which it reduces.

        That are the gradients of before the step, the mean so far, and NaN where an ascent was not finite on this rank.
        """
        self._handed, self._hands_mean = [], False
        plan, last = self.plan, self._i + 1 == len(self.shares)
        if not last or self.ranks.own or plan.combines:
            return
        before = self._before() if self.accumulates and self.had_gradients else None
        mean = self._mean if not all(self._synced) else None
        marks = bool(self._lacking)
        if before is None and mean is None and not marks:
            return
        share, descent = self.shares[-1], Descent(norm_sq=self._norm_sq)
        if before is not None:
            descent.add(before, Coefficient().row(1 / share))
        if mean is not None:
            descent.add(mean, Coefficient().row((self.shares[0] if self._i == 1 else 1.0) / share))
        if marks:
            zeros = [
                [flat.absent if i in lacking else torch.zeros_like(p) for i, p in enumerate(flat.params)]
                for flat, lacking in zip(self.store.flats, self._lacking, strict=True)
            ]
            descent.add(Vectors(zeros, sum(map(len, self._lacking))), PLAIN)
        present = descent.present
        lists = [
            [t if t is flat.absent else torch.empty_like(t) for t in tensors]
            for flat, tensors in zip(self.store.flats, present.lists, strict=True)
        ]
        out = Vectors(lists, present.absent)
        self.store.descend(out, descent, weights=False)
        grads = self.store.optionals(out)
        self.store.set_grads(grads)
        pairs = [
            pair for flat, ts in zip(self.store.flats, grads, strict=True) for pair in zip(flat.params, ts, strict=True)
        ]
        self._handed = [(p, t, versions_of([t])[0]) for p, t in pairs if t is not None]
        self._hands_mean = mean is not None

    def _check_handed(self) -> None:
        """Refuse gradients to which the pass has not added. Those in DDP's buckets, which it may fill before, are none."""
        cleared = [p for p, t, version in self._handed if p.grad is not t and versions_of([t]) == [version]]
        if any(p.grad is None or not is_shared(p.grad) for p in cleared):
            raise RuntimeError(
                "gradients were cleared in the last pass of the loop, where DistributedDataParallel was to reduce those of "
                "before: clear them by opt.zero_grad(), after opt.step()"
            )
        if self._hands_mean:
            self._mean = None

    def _shared_mean(self, before: Vectors | None = None) -> None:
        """The mean, with ``before`` added, and what the micro-batches keep: those of all ranks."""
        assert self._mean is not None
        store, ranks = self.store, self.ranks
        self._mean = ranks.mean(store, self._mean, before)
        if self.plan.keeps:
            memories = store.memory(self.plan.kept, 0.0)
            descent = Descent()
            descent.add(ranks.mean(store, store.vector_of(memories), plain=self.adds_to_v), PLAIN)
            kept = store.vector_of(memories)  # by now of whatever another rank keeps, too
            store.descend(kept, descent, weights=False, memories=None if self.plan.after else memories)

    def follow(self) -> None:
        """Bring the gradients of earlier passes into the memory order that their parameters have by now."""
        store = self.store
        self._held = [store.in_order(vector) for vector in self._held]
        if self._mean is not None:
            self._mean = store.in_order(self._mean)

    # -- ascent -----------------------------------------------------------------------------------------------------------

    def _lean(self) -> None:
        """Perturb the weights against the momentum, for the whole step."""
        v = self.engine.momentum()
        self.perturbed = self.saves = True
        self.engine.norms_sq.append(self.store.ascend(v, self.plan, self.engine.tables, 0))
        self.store.forget_copies()

    def ascend(self) -> None:
        """p.grad is the gradient at w: perturb the weights, and clear p.grad for the next pass."""
        engine, store, plan = self.engine, self.store, self.plan
        grads = self._collect(clear=self.clear)
        if self._has_units:  # after what may lay memories out anew, as it notes what they hold
            self._look_at_scale()
        self._has_looked = True
        if grads.absent:
            self._check_any(grads)
        if self._several and self.ranks.synchronised is False:
            self._lacking = [flat.absent_from(ts) for flat, ts in zip(store.flats, grads.lists, strict=True)]
        if plan.holds:
            self._hold(grads)
        if self._scores is not None:
            self._look_at(grads, needed=plan.takes_held)
        self.perturbed = self.saves = True
        self.turn = 1
        self._norm_sq = store.ascend(grads, plan, engine.tables, self._i)
        engine.norms_sq.append(self._norm_sq)
        self.store.forget_copies()

    def _collect(self, *, clear: bool) -> Vectors:
        """The gradients of a pass; where ranks share the perturbation their mean, as far as it is combined with others."""
        grads, plan = self.engine.collect(clear=clear), self.plan
        if self.ranks.inner is not None and plan.climbs and (self.turn == 0 or plan.combines):
            return self.ranks.mean_within(self.store, grads, self._i)
        return grads

    def _look_at(self, grads: Vectors, *, needed: bool) -> None:
        """What a mask is chosen by, from gradients at w. ``needed``: what becomes of them otherwise is not to be changed."""
        engine, sparse = self.engine, self.plan.sparse
        self.add_scores(grads, needed=needed)
        if any(flat.mask is None for flat in self.store.flats):
            assert sparse is not None
            engine.choose_mask(self.scores, sparse, engine.steps)
            self.chose_mask = True

    def _cross(self) -> None:
        """p.grad is the gradient at w + e: perturb the weights to the other side, and clear p.grad for the next pass."""
        self._look_at_scale()
        grads = self._collect(clear=True)
        at_w = self._held[0]
        self._hold(grads)
        assert self._norm_sq is not None
        self.turn = 2
        self.store.cross(at_w, self.plan, self.engine.tables, self._norm_sq, self._i)
        self.store.forget_copies()

    def _hold(self, grads: Vectors) -> None:
        """Keep the gradients of a pass for the micro-batch's descent."""
        self._held.insert(0, Vectors([own_memory(tensors) for tensors in grads.lists], grads.absent))

    def _check_any(self, grads: Vectors) -> None:
        """No gradient at all: was backward forgotten, has the model other parameters by now, or are gradients elsewhere?"""
        store = self.store
        if grads.absent < sum(len(flat.params) for flat in store.flats):
            return
        model, params = self.engine.buffers.model, store.parameters()
        own, theirs = set(map(id, params)), set(map(id, model.parameters() if model is not None else ()))
        if (theirs and own.isdisjoint(theirs)) or (not store.is_sharded and Gathered.others(params)):
            raise RuntimeError(
                "none of the optimizer's parameters is in the model any more (load_state_dict(assign=True) and fully_shard "
                "replace them): make the optimizer after that"
            )
        if store.is_sharded:
            raise RuntimeError(
                "no sharded parameter got a gradient in the first pass, so that there is nothing to perturb along: call "
                "backward() in it, and model.set_requires_gradient_sync(True) before"
            )
        if self.clear and self.had_gradients and not self.accumulates:  # which would be dropped, for nothing
            raise RuntimeError(f"{self.lacks}{remedy()}")
        self.engine.mistakes.say("no backward", self.lacks, remedy_of_caller=self.clear)

    def add_scores(self, grads: Vectors, *, needed: bool = False) -> None:
        """What a mask is chosen by: the gradients so far. ``needed``: these are left as they are."""
        scores: Sequence[list[Tensor] | None] = self._scores or [None] * len(grads.lists)
        lists = grads.lists if needed else [own_memory(tensors) for tensors in grads.lists]
        self._scores = [masks.add_up(s, g, copies=needed) for s, g in zip(scores, lists, strict=True)]

    @property
    def scores(self) -> masks.Scores:
        scores = self._scores or []
        return self.ranks.scores(self.store, scores) if self.ranks.own else scores

    def conclude(self, found_inf: Tensor | None = None) -> None:
        """After the last pass, and what is the user's: what may fail comes before what cannot be undone."""
        engine, sparse = self.engine, self.plan.sparse
        if self._scores is None or sparse is None:
            return
        skipped = found_inf is not None and bool(found_inf != 0)
        finite = not skipped and all(bool(terms.sum().isfinite()) for terms in engine.norms_sq)
        if not self.ranks.agreed(self.store, finite):
            if self.chose_mask:  # it was made of gradients that were not finite
                for flat in self.store.flats:
                    flat.mask = None
        elif engine.mask_is_due(sparse):
            engine.choose_mask(self.scores, sparse, engine.steps + 1)

    # -- descent ----------------------------------------------------------------------------------------------------------

    def _accumulate(self) -> None:
        """The micro-batch's descent into the mean, and the weights back for the next one."""
        descent = self._descent(clear=self.clear)
        self._descend(self._into(descent, self._mean, whole=True), descent, last=False)

    def end_in_grads(self) -> None:
        """The last descent: weights back, the mean added to the gradients of before the step, as ``backward()`` would."""
        descent = self._descent(clear=False)  # most gradients are going to be where they are
        before = self._before() if self.had_gradients and not self._handed else None
        single, shared = len(self.shares) == 1, self.ranks.own and self.ranks.reduces
        if before is not None and single and self.plan.reuses is None and not shared:
            descent.add(before, PLAIN)
            self._descend(self._into(descent, before, whole=False), descent, last=True)
            before = None
        else:
            self._descend(self._into(descent, self._mean, whole=False), descent, last=True)
        if shared and self.plan.reuses is not None and before is not None:  # which has been made of v's already
            before = self.ranks.mean(self.store, before, plain=True)
            self._shared_mean()
        elif shared:
            self._shared_mean(before)
            before = None
        if self.plan.reuses is not None:
            assert self._mean is not None
            self._descend(self._mean, self._reused(self._mean), last=True, weights=False)
        if before is not None:
            assert self._mean is not None
            both = Descent()
            both.add(self._mean, PLAIN)
            both.add(before, PLAIN)
            self._descend(before.filled(self._mean), both, last=True, weights=False)
        self._put_into_grads()

    def update(self, between: Between | None = None) -> None:
        """The last descent and the base optimizer's step, in one kernel where that is possible.

        ``between``: called after the descent and before the step, with the weights at w and the mean descent gradient in
        ``p.grad``, as after a ``passes`` loop. What it returns is ``found_inf`` of the update. If nobody is to see
        ``p.grad``, it only tells what the update is limited by.
        """
        engine, plan, ranks = self.engine, self.plan, self.ranks
        if self._several and ranks.synchronised is False:
            raise RuntimeError(
                "this step updates at once, and DistributedDataParallel was told not to reduce its gradients (no_sync): ranks "
                f"would part. Leave no_sync out, or {USE}; or use a passes() loop, and reduce p.grad yourself"
            )
        rule = engine.rule()
        if self._has_units:
            self._look_at_scale()
        if rule is not None and between is not None and between.is_unseen and not ranks.own:
            return self._update_limited(rule, between)
        at_once = rule is not None and between is None and not ranks.own
        if between is None and self._scores is not None:
            self.conclude()
        descent = self._descent(clear=self.clear, updates=at_once)
        of_one = self._mean is None and descent.shares is None
        if not at_once or (plan.reuses is not None and not of_one):
            self._descend(self._into(descent, self._mean, whole=False), descent, last=True)
            if ranks.own:
                self._shared_mean()
            assert self._mean is not None
            descent = Descent()
            descent.add(self._mean, PLAIN)
        if plan.reuses is not None:
            descent = self._reused(descent.terms[0])
        if rule is not None and at_once:
            mark_stepped(engine.base)
            self.store.update(rule, engine.tables, engine.base.state, descent, ahead=self._ahead, factor=plan.after)
            self.perturbed = self.saves = False
            if plan.after and self._ahead is None:
                engine.shift(descent.present, self._gap)
        else:
            if plan.reuses is not None:
                assert self._mean is not None
                self._descend(self._mean, descent, last=True, weights=False)
            assert self._mean is not None
            self.store.set_grads(self.store.optionals(self._mean))
            found_inf = None
            if between is not None:
                found_inf = between()
                self.conclude(found_inf)
            engine.update_uncounted(found_inf)
            self._undo_where(found_inf)
            if self.clear:
                self.store.set_grads(None)
        self.store.forget_copies()

    def _update_limited(self, rule: Rule, between: Between) -> None:
        """The mean gradient without its scale, and no longer than it may be, which takes one look at it before the update."""
        engine, plan, store = self.engine, self.plan, self.store
        descent = self._descent(clear=self.clear)
        norm_sq = descent.norm_sq
        if descent.coefs == PLAIN and not descent.sums and descent.shares is None and plan.reuses is None:
            mean = descent.terms[0]
        else:
            self._descend(self._into(descent, self._mean, whole=False), descent, last=True)
            assert self._mean is not None
            mean, norm_sq = self._mean, None
            if plan.reuses is not None:
                self._descend(mean, self._reused(mean), last=True, weights=False)
        limited, not_finite = store.limited(mean, norm_sq, engine.units.scale, between.max_grad_norm)
        found_inf = between.note(not_finite, mean)
        self.conclude(found_inf)
        mark_stepped(engine.base)
        store.update(rule, engine.tables, engine.base.state, limited, found_inf)
        self.perturbed = self.saves = False
        if plan.after:
            engine.shift(limited.present, self._gap, found_inf)
        self._undo_where(found_inf)
        if self.clear:
            store.set_grads(None)
        store.forget_copies()

    def _undo_where(self, found_inf: Tensor | None) -> None:
        if self.engine.undo is not None and found_inf is not None:
            self.engine.undo.bring_back_where(found_inf)
        self.engine.undo = None

    def _descent(self, *, clear: bool, updates: bool = False) -> Descent:
        """p.grad is the micro-batch's last gradient: what the plan makes of it and of what is held, and of the mean so far.

        Afterwards nothing is held, and with ``clear`` p.grad is None. ``updates``: it goes into an update right away.
        """
        store, plan, i = self.store, self.plan, self._i
        if self._together is not None:
            together, self._together = self._together, None
            return together
        vectors = [self._collect(clear=clear), *self._held]
        if vectors[0].absent and not store.is_sharded:
            self._check_any(vectors[0])
        products = store.gram(vectors[: plan.products]) if plan.products else None
        share = self.shares[i] if i else 1.0
        norm_sq = self._seen(self._norm_sq, vectors[0])
        descent = Descent(norm_sq=norm_sq)
        if products is not None:
            descent.sums, descent.rescale = self._sums(products, norm_sq)
        descent.combine(plan, vectors, share)
        if plan.keeps:
            kept = Descent(sums=[] if products is None else [products])
            for vector, coefficient in zip(vectors, plan.keeps, strict=True):
                kept.add(vector, coefficient.row(self.shares[i] if len(self.shares) > 1 else 1.0))
            if not (plan.after and updates and len(self.shares) == 1):
                self._keep(kept, begins=i == 0)
            elif self._scaled is None and descent.is_plain(vectors[1]) and not any(vector.absent for vector in vectors):
                self._ahead = vectors[0]  # nothing has to be kept: the update makes the gap by itself
            else:
                self._keep_in_latest(vectors[0], vectors[1], kept)
        if self._mean is not None:
            # The first descent was kept as it is until there was a second.
            descent.add(self._mean, Coefficient().row(self.shares[0] if i == 1 else 1.0))
        self._held = []
        self._norm_sq = None
        return descent

    def _seen(self, norm_sq: Tensor | None, latest: Vectors, stack: int | None = None) -> Tensor | None:
        """The terms that make a descent NaN where they are not finite.

        Decoupled WSAM's last gradient is no term of what a scaler looks at: its norm is one of these then.
        """
        if self._scaled is None or not self.plan.after or norm_sq is None:
            return norm_sq
        return torch.cat([norm_sq, self.store.gram([latest], stack).sum(-1)], -1)

    def _sums(self, products: Tensor | None, norm_sq: Tensor | None) -> tuple[list[Tensor], int]:
        """What the coefficients of the plan's descent depend on, and which of the sums is the length that it is given."""
        plan = self.plan
        if not plan.uses_products or products is None:
            return [], -1
        if not plan.rescale or plan.holds:
            return [products], plan.length
        assert norm_sq is not None
        return [products, norm_sq], plan.length

    def _into(self, descent: Descent, sum_so_far: Vectors | None, *, whole: bool) -> Vectors:
        """Where the descent goes: into the memory of what it is added to, where that is absent into its own gradients'."""
        terms = descent.terms
        if descent.shares is not None:  # memory of ours
            n = len(descent.shares)
            terms = [*(stack.micro_batch(0) for stack in terms[:n]), *terms[n:]]
        elif sum_so_far is None or sum_so_far.absent:
            terms[0].lists = own_memory_of_lists(terms[0].lists, whole=whole)
        out = terms[0] if sum_so_far is None else sum_so_far
        for vector in terms:
            out = out.filled(vector)
        if whole and descent.shares is not None:  # parts of stacks would keep those until the end of the step
            own = {id(t) for tensors in (() if sum_so_far is None else sum_so_far.lists) for t in tensors}
            lists = [[t if id(t) in own or not t.numel() else torch.empty_like(t) for t in ts] for ts in out.lists]
            out = Vectors(lists, out.absent)
        return out

    def _descend(self, out: Vectors, descent: Descent, *, last: bool, weights: bool = True) -> None:
        weights = weights and self.perturbed and (last or self.plan.climbs)
        alone = len(descent.terms) == 1 and descent.terms[0] is out and not descent.sums and descent.norm_sq is None
        if weights or not alone:
            self.store.descend(out, descent, weights=weights, last=last)
        self._mean = out
        if weights:
            self.perturbed = False
            self.saves = not last
        self.store.forget_copies()

    def _keep_in_latest(self, latest: Vectors, held: Vectors, descent: Descent) -> None:
        """What is kept of the only micro-batch until the end of the step, in the memory of its last gradient."""
        own = own_memory_of_lists([*latest.lists, *held.lists], whole=True)  # what is held is still needed
        latest.lists, held.lists = own[: len(self.store.flats)], own[len(self.store.flats) :]
        if latest.absent:
            latest = latest.filled(Vectors([list(map(torch.empty_like, tensors)) for tensors in held.lists]))
        self.store.descend(latest, descent, weights=False)
        self._gap = latest

    def _keep(self, descent: Descent, *, begins: bool) -> None:
        """The micro-batch's part of "v" or "gap", or that of several, which the first of a step ``begins`` anew."""
        engine, store, plan = self.engine, self.store, self.plan
        memories = store.memory(plan.kept, math.nan if plan.remembers_v else 0.0)
        for memory_of in memories:
            memory_of.start()
        memory = store.vector_of(memories)
        if self.adds_to_v and not self._kept:
            self._remember(memories)
        self._kept = True
        if self.adds_to_v or not begins:
            descent.add(memory, PLAIN)
        engine.v_step = -1  # until it is whole, nothing may be added to it
        store.descend(memory, descent, weights=False, memories=None if plan.after else memories)
        if self._i + 1 == len(self.shares):
            engine.v_step = engine.steps
            engine.v_synced = self._synced[-1] if self._synced else None

    def _reused(self, mean: Vectors) -> Descent:
        """The step's mean gradient, and "v" with its coefficient."""
        assert self.plan.reuses is not None
        memories = self.store.memory("v", math.nan)
        v = self.store.vector_of(memories)
        descent = Descent(sums=[self.store.gram([mean]), self.store.squared(memories)])
        descent.add(mean, PLAIN)
        descent.add(v.present(mean), self.plan.reuses.row())
        return descent

    # -- gradients of before the step ------------------------------------------------------------------------------------

    def _before(self) -> Vectors:
        """The gradients of before the step, as the kernels take them."""
        lists, absent = [], 0
        for flat, (_, grads) in zip(self.store.flats, self.aside or (), strict=True):
            pairs = zip(flat.shards, grads or [None] * len(flat.params), strict=True)
            lists.append([flat.absent if g is None else regular_gradient(p, g) for p, g in pairs])
            absent += sum(g is flat.absent for g in lists[-1])
        return self.store.meet(Vectors(lists, absent))

    def _put_into_grads(self) -> None:
        """The mean into ``p.grad``; where a gradient was there before, into its own tensor, if that can be written to."""
        assert self._mean is not None
        lists = self.store.optionals(self._mean)
        self.store.set_grads(self._in_tensors_of_before(lists) if self.had_gradients else lists)

    @torch.no_grad()
    def _in_tensors_of_before(self, lists: Sequence[Sequence[Tensor | None]]) -> list[Optionals]:
        """The values in those tensors, as far as possible. Of several with elements in common one takes part."""
        aside = self.aside or []
        places = iter(apart([old for before, _ in aside for old in before]))
        return [
            [_written(next(places), values) for values in grads[: len(before)]] + list(grads[len(before) :])
            for grads, (before, _) in zip(lists, aside, strict=True)
        ]


def _written(old: Tensor | None, values: Tensor | None) -> Tensor | None:
    """A gradient of before with these values: in its own tensor where that can be written to, else another one."""
    if old is None or values is None or old is values:
        return values
    if old.data_ptr() != values.data_ptr() or old.stride() != values.stride():
        if not is_writable(old):
            return values
        old.copy_(values)
    return old
