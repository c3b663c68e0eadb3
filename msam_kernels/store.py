# SPDX-License-Identifier: Apache-2.0
"""``Store``: all parameters as one, whatever their devices and dtypes. Sums over all of them come together here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from ._torch import forget_casts, moved
from .backends import get_backend, name_of
from .flat import SUMS, Flat, Memory, State, check_parameters, is_servable
from .gradients import (
    FAST,
    OF_SHARDS,
    Optionals,
    Tensors,
    Vectors,
    is_trained,
    joined,
    made_regular,
    own_memory_of_lists,
    regular_gradient,
)
from .methods import Coefficient, Parameters, Plan
from .precision import dtype_kept, is_short
from .rules import MOMENTA, OURS, Rule, Tables, theirs_in
from .sharded import Gathered, Reduction, Spread, check_placements, shard, shown, spread

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: A vector as it is.
PLAIN = Coefficient().row()
#: Of a vector that counts the first sum, divided by the second.
RATIO = Coefficient(0.0, 1.0, p=0, q=1, eps=0.0).row()
#: The number of a flat, the flat, and its parameters that are left out.
Part = tuple[int, Flat, list[int]]
#: By flat: memory for copies of the weights, one for each of several micro-batches; None where nothing is perturbed.
Copies = Sequence[Tensor | None]


#: Of the number of a draw: the perturbation to the other side has others than the first.
OPPOSITE = 1 << 31


class Descent:
    """A linear combination Σ cₖ xₖ, as ``descend`` and ``update`` take it. See ``backends.reference.coefficients``.

    ``stacks`` are its first terms, of several micro-batches each, with their coefficients in ``shares``.
    """

    __slots__ = ("coefs", "norm_sq", "rescale", "shares", "sums", "terms")

    def __init__(
        self, sums: Sequence[Tensor] = (), rescale: int = -1, norm_sq: Tensor | None = None,
        stacks: Sequence[Vectors] = (), shares: Tensor | None = None,
    ):  # fmt: skip
        self.terms: list[Vectors] = [*stacks]
        self.coefs: list[float] = []
        self.sums, self.rescale, self.norm_sq, self.shares = sums, rescale, norm_sq, shares

    def combine(self, plan: Plan, vectors: Sequence[Vectors], share: float) -> None:
        """What the plan's descent is of the vectors of a micro-batch, times its share of the batch."""
        for k, counts, coefficient in plan.terms:
            # What is there for its length alone does not make a parameter one that has a gradient.
            self.add(vectors[k] if counts else vectors[k].present(vectors[0]), coefficient.row(share))

    def add(self, vector: Vectors, row: list[float]) -> None:
        self.terms.append(vector)
        self.coefs += row

    def is_plain(self, vector: Vectors) -> bool:
        """Whether it is that vector as it is."""
        return len(self.terms) == 1 and self.terms[0] is vector and self.coefs == PLAIN and not self.sums

    @property
    def present(self) -> Vectors:
        """Some term's tensor where any has one; absent is what is absent from all."""
        present, *others = self.terms
        for vector in others:
            present = present.filled(vector)
        return present

    def lists(self, f: int) -> Tensors:
        """Flat f's tensors of all terms, one term after the other."""
        if len(self.terms) == 1:
            return self.terms[0].lists[f]
        return joined([vector.lists[f] for vector in self.terms])

    def on(self, flat: Flat, returns: bool = False) -> dict[str, Any]:
        """Arguments of a flat's operators; with ``returns`` those that bring its weights back, too."""
        options: dict[str, Any] = {"coefs": self.coefs, "sums": []}
        if self.shares is not None:
            options["shares"] = moved(self.shares, flat.device)
        elif self.norm_sq is not None or self.sums:
            if self.sums:
                options["sums"] = [moved(t, flat.device) for t in self.sums]
            options["rescale"] = self.rescale
            options["norm_sq"] = None if self.norm_sq is None else moved(self.norm_sq, flat.device)
        if returns and flat.saved is not None:
            options["saved"], options["status"] = flat.saved, flat.status
        return options


class Store:
    """The flats of an optimizer's parameters.

    Args:
        base: whose parameter groups hold the parameters.
        flatten, backend, process_group, masters: see ``MicroBatchSAM``.
        seed: of the random rounding of w + e to 16 bits; None where it is to nearest.

    Attributes:
        drawn: how many micro-batches of the step under way have rounded so, in earlier loops.
        is_settled: whether it has been looked, of all parameters, which wait for their first gradient.
        is_sharded: whether any parameter is a DTensor.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        flatten: bool,
        backend: str,
        seed: int | None = None,
        process_group: ProcessGroup | None = None,
        masters: bool = False,
    ):
        self.base, self.flatten, self.backend, self.seed, self.masters = base, flatten, backend, seed, masters
        self.drawn = 0
        self.is_settled = False
        self._waits = False  # whether any does
        self.process_group = process_group
        self.flats: list[Flat] = []
        self._lists: list[list[Tensor]] = []  # the parameters by flat
        self._absent: list[Tensor] = []  # by flat, what stands for one without a gradient
        self.is_sharded = False
        self._ranks: Reduction | None = None  # where sums over all parameters are sums over several ranks
        self._gathered: Gathered | None = None
        self._loops = FAST
        self._parts: tuple[Parameters | None, int, list[Part]] = (None, 0, [])
        self.devices: list[torch.device] = []
        self.layout: object = None  # of all parameters, as the flats know it
        self._shares: dict[tuple[float, ...], Tensor] = {}  # on the device, for good: graphs read them
        self._left: set[int] = set()  # the parameters that were frozen at the last look and are in no flat, by identity

    @property
    def device(self) -> torch.device:
        """Where sums over all parameters come together."""
        return self.flats[0].device if self.flats else torch.device("cpu")

    @property
    def has_ranks(self) -> bool:
        """Whether sums over all parameters are sums over several ranks."""
        return self._ranks is not None

    @property
    def has_masters(self) -> bool:
        """Whether any weights have 16 bits and masters."""
        return any(flat.has_masters for flat in self.flats)

    @property
    def in_parts(self) -> bool:
        """Whether this rank holds only a part of the parameters: shards, or a stage."""
        return self.is_sharded or self.process_group is not None

    @property
    def backends(self) -> list[str]:
        """By name, those that were chosen."""
        return list(dict.fromkeys(name_of(flat.backend, flat.device) for flat in self.flats))

    def parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"]]

    def places(self) -> list[tuple[Flat, int] | None]:
        """Of every parameter, in the order of the groups: its flat, and its index there; None for one that is in no flat."""
        place = {id(p): (flat, i) for flat in self.flats for i, p in enumerate(flat.params)}
        return [place.get(id(p)) for p in self.parameters()]

    def has_new(self) -> bool:
        """Whether there are parameters to adopt: of groups that are new, or that were frozen until now."""
        return any(place is None and is_trained(p) for place, p in zip(self.places(), self.parameters(), strict=True))

    def left_home(self) -> list[Flat]:
        """The flats of which a parameter was moved to another device or converted."""
        return [flat for flat in self.flats if not all(map(flat.is_at_home, flat.params))]

    def is_capturing(self) -> bool:
        return any(map(Flat.is_capturing, self.flats))

    def check_not_capturing(self, what: str) -> None:
        for flat in self.flats:
            flat.check_not_capturing(what)

    # -- parameters -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # what is made in that mode could not be written to outside of it
    @torch.no_grad()
    def adopt(
        self, check_idle: Callable[[str], None], only: Parameters | None = None, also: Sequence[Tensor] = ()
    ) -> None:
        """Flatten the parameters that are new since the last look; take back those that were re-pointed.

        One that is frozen stays out, whatever it is made of, until it is trained; one that is frozen later stays in, unless it
        becomes what no kernel knows. Those that were moved to another device or converted get new flats, where all that is kept
        for them follows, and so does the base optimizer's state.

        Args:
            check_idle: called, with what has happened, where parameters are new; may raise.
            only: the parameters that are perturbed: new ones get flats apart from the others, which then save nothing.
            also: parameters that are taken in though they are frozen.

        Raises:
            ValueError, TypeError: parameters that cannot be served, no list of them, or none that is to be perturbed.
            RuntimeError: parameters left their group or have another shape; or they came or were converted during a step.
        """
        groups = self.base.param_groups
        for g, group in enumerate(groups):
            if not isinstance(group["params"], (list, tuple)):
                raise TypeError(
                    f"the params of group {g} must be a list of tensors, got {type(group['params']).__name__}"
                )
        params = self.parameters()
        if not params:
            raise ValueError("the base optimizer has no parameters: pass model.parameters() to it")
        named = [
            (f"parameter {i} of group {g}", p) for g, group in enumerate(groups) for i, p in enumerate(group["params"])
        ]
        for name, p in named:
            if not isinstance(p, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(p).__name__}")
        twice = len(params) - len(set(map(id, params)))
        if twice:
            raise ValueError(f"{twice} of the {len(params)} parameters are listed more than once: list each once")
        self.check_only(only)
        served = {p for flat in self.flats for p in flat.params if is_servable(shard(p))}.union(also)
        taken = [(name, p) for name, p in named if p in served or is_trained(p)]
        left = [(name, p) for name, p in named if p not in served and not is_trained(p)]
        for name, p in taken:
            check_placements(name, p)
        check_parameters(*([(name, shard(p)) for name, p in named] for named in (taken, left if self.flatten else ())))
        spreads = {id(p): spread(p) for _, p in taken}
        is_sharded = any(lies is not None for lies in spreads.values())
        ranks = None
        if is_sharded or self.process_group is not None:
            ranks = Reduction(spreads.values(), self.process_group)
        group_of = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
        for flat in self.flats:
            if [group_of.pop(id(p), None) for p in flat.params] != flat.groups:
                raise RuntimeError(
                    "parameters were removed from a group or moved to another by hand: make a new optimizer for the new "
                    "groups, or use add_param_group for additional ones"
                )
        stay = {p for _, p in taken}
        for flat in self.flats:
            flat.check_shapes(stay)
        left_home = self.left_home()
        homes = {p: (flat, i) for flat in left_home for i, p in enumerate(flat.params)}
        group_of.update({id(p): flat.groups[i] for p, (flat, i) in homes.items()})
        buckets: dict[tuple[torch.device, torch.dtype, bool, Spread | None], list[tuple[Tensor, int]]] = {}
        for name, p in taken:
            if id(p) in group_of:
                if p.is_meta:
                    raise ValueError(f"{name} is on the meta device and has no values: materialise the model first")
                kind = p.device, p.dtype, only is None or p in only, spreads[id(p)]
                buckets.setdefault(kind, []).append((p, group_of[id(p)]))
        if buckets:
            new = {id(p) for members in buckets.values() for p, _ in members}
            check_idle(
                "parameters were moved or converted, which must come before the step,"
                if homes
                else "parameters were unfrozen, which must come before the step,"
                if new <= self._left
                else "parameters were added"
            )
        self.separate(self.base.state)
        backends = {device: get_backend(self.backend, device) for device, *_ in buckets}
        staying = [flat for flat in self.flats if flat not in left_home]
        for flat in staying:
            flat.take_back()
        new_flats = [
            Flat(
                [p for p, _ in members],
                [g for _, g in members],
                flatten=self.flatten,
                backend=backends[device],
                masters=self.masters,
            )
            for (device, *_), members in buckets.items()
        ]
        if homes:
            for flat in new_flats:
                flat.take_over(homes)
            for p, (flat, i) in homes.items():
                if p in stay:
                    self._move_state(p, flat, groups[flat.groups[i]])
            self._shares = {}
        self.flats = staying + new_flats
        self._lists = [flat.params for flat in self.flats]
        self._absent = [flat.absent for flat in self.flats]
        self._parts = None, -1, []
        self.devices = list({flat.device: None for flat in self.flats})
        self.is_sharded, self._ranks, self._loops = is_sharded, ranks, OF_SHARDS if is_sharded else FAST
        self._gathered = Gathered(params, self._gathered) if is_sharded else None
        self.layout = self._loops.memory_layout(groups, self._lists)
        self._left = {id(p) for _, p in left}
        self._look_who_waits()

    def _move_state(self, p: Tensor, was: Flat, group: dict[str, Any]) -> None:
        """The base optimizer's state follows its parameter, as in torch's ``load_state_dict``.

        But what was of another dtype than the parameter keeps it.
        """
        on_device = group.get("capturable") or group.get("fused")  # where alone torch keeps a step beside its parameter

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor) and value.device == was.device:
                follows = value.dim() and value.dtype == was.dtype
                return value.to(p.device, dtype_kept(p.dtype, self.masters) if follows else value.dtype)
            if isinstance(value, dict):
                return {name: moved(v) for name, v in value.items()}
            return type(value)(map(moved, value)) if type(value) in (list, tuple) else value

        entry = self.base.state.get(p, {})
        for name, value in entry.items():
            if name != "step" or on_device:
                entry[name] = moved(value)

    def _look_who_waits(self) -> None:
        self.is_settled = all(flat.settled for flat in self.flats)
        self._waits = any(flat.waiting for flat in self.flats)

    def settle(self, vector: Vectors | None = None) -> None:
        """At the first gradients of a flat, in ``p.grad`` or the vector: parameters that lack one wait for it.

        As long as they do, nothing is kept for them.
        """
        for f, flat in enumerate(self.flats):
            if flat.settled:
                continue
            if vector is None:
                missing: Sequence[int] = [i for i, p in enumerate(flat.params) if p.grad is None]
            else:
                missing = flat.absent_from(vector.lists[f])
            state = self.base.state
            self._wait_for(
                flat, {i for i in missing if not theirs_in(state.get(flat.params[i])) and not flat.remembers(i)}
            )
            flat.settled = True
        self._look_who_waits()

    def _wait_for(self, flat: Flat, waiting: Set[int]) -> None:
        if waiting == flat.waiting:
            return
        assert self.is_current(), "who was re-pointed is to be taken back, and not to be taken for one that stays"
        self._waits = True  # before anything may fail
        flat.wait_for(waiting)
        self.layout = self._loops.memory_layout(self.base.param_groups, self._lists)
        for i, p in enumerate(flat.params):  # what was shown of them lies elsewhere now
            entry = self.base.state.get(p, {})
            for name in flat.remembered:
                part = flat.remembered_of(i, name) if OURS + name in entry else None
                if part is not None:
                    entry[OURS + name] = shown(part, p)

    def meet(self, vector: Vectors) -> Vectors:
        """``vector``; parameters that wait for their first gradient, and have one in it, wait no longer."""
        if self._waits:
            pairs = zip(self.flats, vector.lists, strict=True)
            met = [(flat, i) for flat, ts in pairs for i in flat.waiting if ts[i] is not flat.absent]
            if met:
                self.end_wait(met)
        return vector

    def end_wait(self, which: Sequence[tuple[Flat, int]]) -> None:
        """There is something to keep of these parameters, if they have waited for that."""
        for flat in self.flats:
            self._wait_for(flat, flat.waiting - {i for f, i in which if f is flat})
        self._look_who_waits()

    def check_only(self, only: Parameters | None) -> None:
        """Refuse a choice of parameters of which the optimizer has none.

        Raises:
            ValueError: with their number, and the remedy.
        """
        if only is None or self.parts(only):
            return
        params = self.parameters()
        if only.isdisjoint(params):  # those that are frozen are in no flat
            raise ValueError(
                f"only={only} are none of the optimizer's {len(params)}: give tensors that it has, e.g. "
                "only=norm_layers(model) of the same model"
            )

    def is_current(self) -> bool:
        """Whether all parameters are where they were at the last look, and those in no flat still frozen."""
        return self._loops.has_layout(self.base.param_groups, self.layout)

    # -- gradients ------------------------------------------------------------------------------------------------------

    def have_grads(self) -> bool | None:
        """Whether any ``p.grad`` is there; None where the parameters are not where they were at the last look."""
        return self._loops.have_grads(self.base.param_groups, self.layout)

    def collect(self, *, clear: bool) -> Vectors | None:
        """Every ``p.grad``; all are looked at before any kernel runs. With ``clear``, every one is None then.

        A parameter with a gradient counts as modified in place, which every caller goes on to do: a graph that still needs the
        old values raises instead of using wrong ones. None where the parameters are not where they were at the last look.

        Raises:
            TypeError, RuntimeError: see ``made_regular``.
        """
        found = self._loops.collect_grads(self.base.param_groups, self.layout, self._absent, clear)
        if found is None:
            return None
        lists: Sequence[Tensors]
        lists, regular, absent = found
        if not regular:
            lists = made_regular(found[0], self._lists, self._absent, self._loops, clear=clear)
        if len(lists) > 1:
            lists = own_memory_of_lists(lists, whole=False)
        return self.meet(Vectors(lists, absent))

    def current_grads(self) -> list[Optionals]:
        """By flat: every p.grad or None; an empty list where all are None."""
        return [self._loops.current_grads(flat.params) for flat in self.flats]

    def set_grads(self, lists: Sequence[Sequence[Tensor | None]] | None) -> None:
        """``p.grad`` by flat and parameter; None for all without ``lists``."""
        for f, flat in enumerate(self.flats):
            self._loops.set_grads(flat.params, lists[f] if lists else [])

    def drop_grads_of_others(self) -> None:
        """Of parameters that are in no flat: they had none before the step, or they would be."""
        if self._left:
            self._loops.set_grads([p for p in self.parameters() if id(p) in self._left], [])

    def optionals(self, vector: Vectors) -> Sequence[Sequence[Tensor | None]]:
        """``vector`` with None where a parameter is absent."""
        if not vector.absent:
            return vector.lists
        return [
            [None if t is flat.absent else t for t in tensors]
            for flat, tensors in zip(self.flats, vector.lists, strict=True)
        ]

    def in_order(self, vector: Vectors) -> Vectors:
        """``vector`` in the memory order of the parameters; copies only where that is another one."""
        lists = [
            [t if t is flat.absent else regular_gradient(p, t) for p, t in zip(flat.shards, tensors, strict=True)]
            for flat, tensors in zip(self.flats, vector.lists, strict=True)
        ]
        return Vectors(lists, vector.absent)

    def memory(self, name: str, begin: float) -> list[Memory]:
        return [flat.memory(name, begin) for flat in self.flats]

    def vector_of(self, memories: Sequence[Memory]) -> Vectors:
        """All flats' memories as one vector."""
        return Vectors([memory.parts for memory in memories], sum(len(memory.flat.waiting) for memory in memories))

    def means(self, plan: Plan) -> list[Memory]:
        """The means of gradients that the plan's direction is made of."""
        return [flat.memory("ema", math.nan) for _, flat, _ in self.parts(plan.only)]

    def has_v(self) -> bool:
        """Whether there is a "v" to reuse."""
        return all("v" in flat.memories and flat.memories["v"].started for flat in self.flats)

    def recall(self) -> Callable[[], None]:
        """What brings the methods' memories back to what they hold now."""
        kept = [{name: memory.now() for name, memory in flat.memories.items()} for flat in self.flats]

        def back() -> None:
            for flat, of_names in zip(self.flats, kept, strict=True):
                for name, memory in flat.memories.items():
                    if name in of_names:
                        memory.put_back(of_names[name])
                    else:
                        memory.buffer.fill_(memory.begin)
                        memory.started = not math.isnan(memory.begin)

        return back

    def squared(self, memories: list[Memory]) -> Tensor:
        """The terms of a memory's squared norm, at least one."""
        terms = self._together([(flat, m.square) for flat, m in zip(self.flats, memories, strict=True)])
        return terms if terms.numel() else terms.new_zeros(1)

    # -- the operators, over all flats --------------------------------------------------------------------------------------

    def ascend(
        self, grads: Vectors, plan: Plan, tables: Tables, which: int | range, into: Copies | None = None
    ) -> Tensor:
        """Perturb the weights to w + e, for micro-batch ``which``; the terms of the direction's squared norm.

        With ``into``, a buffer ``[m, kept]`` by flat, the weights stay: w + e of each of m micro-batches is written there.
        ``which`` are those, ``grads`` their stacks, and each has a row of terms.
        """
        renew = plan.opposite is None
        if into is not None and not renew and plan.lmbda is not None:
            # The perturbations to the other side begin with the same mean, and move it on for good.
            means = self.means(plan)
            before = [mean.buffer.clone() for mean in means]
            norm_sq = self._ascend(grads, plan, tables, which, True, into)
            for mean, old in zip(means, before, strict=True):
                mean.buffer.copy_(old)
            return norm_sq
        return self._ascend(grads, plan, tables, which, renew, into)

    def _ascend(
        self, grads: Vectors, plan: Plan, tables: Tables, which: int | range, renew: bool, into: Copies | None
    ) -> Tensor:
        parts = self.parts(plan.only)
        if len(parts) == 1 and self._ranks is None:
            (f, flat, left), *_ = parts
            weights, options = self._perturbation(f, flat, plan, tables, "radii", which, renew, into)
            options["arrived"] = flat.arrived
            chosen = _chosen(grads, f, flat, left)
            return flat.backend.ascend(weights, chosen, flat.table, **options)
        if isinstance(which, range) and into is not None and plan.lmbda is not None and len(which) > 1:
            # The direction of one is made of the mean that the one before has left.
            return torch.cat([
                self._ascend(
                    Vectors([[t[j : j + 1] if t.numel() else t for t in tensors] for tensors in grads.lists], grads.absent),
                    plan, tables, which[j : j + 1], renew, [None if c is None else c[j : j + 1] for c in into],
                )
                for j in range(len(which))
            ])  # fmt: skip
        norm_sq = self._norm(grads, plan, len(which) if isinstance(which, range) else None)
        self._perturb(grads, plan, tables, norm_sq, "radii", which, renew, into)
        return norm_sq

    def _norm(self, grads: Vectors, plan: Plan, stack: int | None) -> Tensor:
        terms = []
        for f, flat, left in self.parts(plan.only):
            chosen = _chosen(grads, f, flat, left)
            norm_sq = flat.backend.norm(flat.weights, chosen, flat.table, stack=stack, **_direction(flat, plan))
            terms.append((flat, norm_sq))
        if terms:
            return self._together(terms)
        return torch.zeros(*(() if stack is None else (stack,)), 1, dtype=torch.float64, device=self.device)

    def shared_seed(self, seed: int) -> int:
        """That of the first of the ranks: replicas are to be rounded alike. The host waits."""
        assert self._ranks is not None, "there are several"
        self.check_not_capturing("the seed of rounding")
        halves = torch.tensor([seed >> 32, seed & 0xFFFFFFFF], dtype=torch.float64, device=self.device)
        high, low = self._ranks.of_first(halves).tolist()
        return int(high) << 32 | int(low)

    def refresh_noise(self, step: int) -> None:
        """Bring what random rounding is made of up to date, where anything is rounded so."""
        if self.seed is None:
            return
        flats = [flat for flat in self.flats if is_short(flat.dtype)]
        number: dict[int, int] = {}
        if any(flat.noise is None for flat in flats):
            number = {id(p): k for k, p in enumerate(self.parameters())}
        for flat in flats:
            flat.refresh_noise(self.seed, step, number)

    def achieved(self, only: Parameters | None, micro_batches: int) -> Tensor:
        """Of each micro-batch of the latest step: ‖e‖² as it arrived, its product with the e that was asked for, and that ‖e‖².

        float64 ``[micro_batches, 3]``; of sharded parameters on all ranks. In fp32 and fp64 the three are one number.
        """
        sums = [
            (flat, torch.stack([terms.sum(-1).expand(SUMS) for terms in flat.achieved[:micro_batches]]).unsqueeze(-1))
            for _, flat, _ in self.parts(only)
            if flat.achieved
        ]
        if sums:
            return self._together(sums).sum(-1)
        return torch.zeros(micro_batches, SUMS, dtype=torch.float64, device=self.device)

    def parts(self, only: Parameters | None) -> list[Part]:
        """The flats of which anything is perturbed, each with its number and its parameters that are not."""
        known, count, parts = self._parts
        if known is not only or count != len(self.flats):
            parts = []
            for f, flat in enumerate(self.flats):
                left = [] if only is None else [i for i, p in enumerate(flat.params) if p not in only]
                if len(left) < len(flat.params):
                    parts.append((f, flat, left))
            self._parts = only, len(self.flats), parts
        return parts

    def stacks(self, n: int, only: Parameters | None) -> Copies:
        """By flat: memory for n copies of the weights; None where nothing is perturbed."""
        perturbed = {f for f, *_ in self.parts(only)}
        return [flat.stack(n) if f in perturbed else None for f, flat in enumerate(self.flats)]

    def cross(
        self,
        grads: Vectors,
        plan: Plan,
        tables: Tables,
        norm_sq: Tensor,
        which: int | range,
        into: Copies | None = None,
    ) -> None:
        """Perturb the weights to the other side, or write that to ``into``. What arrives there is not recorded."""
        self._perturb(grads, plan, tables, norm_sq, "opposite", which, True, into)

    def _perturb(
        self, grads: Vectors, plan: Plan, tables: Tables, norm_sq: Tensor, radii: str, which: int | range, renew: bool,
        into: Copies | None,
    ) -> None:  # fmt: skip
        for f, flat, left in self.parts(plan.only):
            weights, options = self._perturbation(f, flat, plan, tables, radii, which, renew, into)
            g = _chosen(grads, f, flat, left)
            flat.backend.perturb(weights, g, flat.table, norm_sq=moved(norm_sq, flat.device), **options)

    def _perturbation(
        self, f: int, flat: Flat, plan: Plan, tables: Tables, radii: str, which: int | range, renew: bool, into: Copies | None
    ) -> tuple[list[Tensor], dict[str, Any]]:  # fmt: skip
        """What flat f's perturbation writes to, and the options of the operator."""
        copies = None if into is None else into[f]
        options: dict[str, Any] = {"radii": tables.on(radii, flat.device)}
        if copies is None:
            options["saved"], options["status"] = flat.save_buffer(), flat.status
        else:
            options["saved"], options["stack"] = flat.weights[0], len(copies)
        if radii == "opposite":
            shape = flat.sums if copies is None else (len(copies), *flat.sums)
            options["achieved_sq"] = torch.empty(shape, dtype=torch.float64, device=flat.device)
        else:
            options["achieved_sq"] = flat.achieved_sq(which)
        if self.seed is not None and is_short(flat.dtype):
            options["noise"] = flat.noise
            options["draw"] = self.drawn + (which if isinstance(which, int) else which.start)
            options["draw"] |= OPPOSITE if radii == "opposite" else 0
        if not plan.is_plain:
            options.update(_direction(flat, plan))
            if renew and plan.lmbda is not None:  # the last perturbation of a micro-batch moves the mean on
                options["lmbda"] = plan.lmbda
        if plan.sparse is not None:
            options["mask"] = flat.mask
        return flat.weights if copies is None else [copies], options

    def gram(self, vectors: Sequence[Vectors], stack: int | None = None) -> Tensor:
        """The inner products of the vectors, float64 ``[rows, n]``, terms to be summed up; with ``stack`` those of each."""
        parts = []
        for f, flat in enumerate(self.flats):
            terms = joined([vector.lists[f] for vector in vectors])
            parts.append((flat, flat.backend.gram(terms, flat.table, count=len(vectors), stack=stack)))
        return self._together(parts)

    def weigh(
        self, shares: Sequence[float], coefs: list[float], sums: list[Tensor], rescale: int, norm_sq: Tensor | None
    ) -> Tensor:
        """The coefficients of several micro-batches with these shares of the batch, for stacks."""
        on_device = self._shares.get(tuple(shares))
        if on_device is None:
            self.check_not_capturing("the sizes of the micro-batches")
            on_device = torch.tensor(shares, dtype=torch.float64, device=self.device)
            self._shares[tuple(shares)] = on_device
        backend = self.flats[0].backend
        return backend.weigh(on_device, coefs=coefs, sums=sums, rescale=rescale, norm_sq=norm_sq)

    def descend(
        self,
        out: Vectors | None,
        descent: Descent,
        *,
        weights: bool = True,
        last: bool = True,
        memories: list[Memory] | None = None,
    ) -> None:
        """``out`` ← Σ cₖ xₖ, and with ``weights`` the weights back.

        ``last``: the step's last micro-batch. ``memories``: what ``out`` is, to note its squared norm there.
        """
        for f, flat in enumerate(self.flats):
            options = descent.on(flat, weights)
            returns = "saved" in options
            if returns:
                options["last"] = last
            if memories:
                options["out_sq"] = memories[f].terms
            flat.backend.descend(
                flat.weights if returns else [],
                [] if out is None else out.lists[f],
                descent.lists(f),
                flat.table,
                **options,
            )
            if memories:
                memories[f].add_up()

    def shift(self, vector: Vectors, factor: float, tables: Tables, scale: Tensor | None = None) -> None:
        """w ← w − factor·lr·vector, with the learning rate of the parameter's group; nothing of what is absent.

        ``scale``: float64 ``[1]``, that of the vector; where it is infinite nothing changes.
        """
        coefs = [*PLAIN, *Coefficient(0.0, factor, p=0, q=1, eps=0.0).row()]
        weights = Vectors([[p.detach() for p in flat.shards] for flat in self.flats]).present(vector)
        for flat, out, tensors in zip(self.flats, weights.lists, vector.lists, strict=True):
            rates, terms = tables.on("rates", flat.device), joined([out, tensors])
            per = rates[-1:] if scale is None else moved(scale, flat.device)
            for g, rows in flat.rows_of_groups:
                flat.backend.descend([], out, terms, rows, coefs=coefs, sums=[rates[g : g + 1], per])

    def multiply(self, name: str, factor: Tensor) -> None:
        """A memory times ``factor``, float64 ``[1]``; where that is 1 it is neither read nor written."""
        for flat in self.flats:
            memory = flat.memories.get(name)
            if memory is None:
                continue
            factor, table = moved(factor, flat.device), flat.table
            if factor.device.type == "cpu":
                if factor == 1:
                    continue
            else:
                table = table.clone()
                table[:, 3] *= factor != 1  # no row has elements where it is 1, which the host does not know
            sums = [factor, torch.ones_like(factor)]
            flat.backend.descend([], memory.parts, memory.parts, table, coefs=RATIO, sums=sums)

    def limited(
        self, vector: Vectors, norm_sq: Tensor | None, scale: Tensor | None, most: float | None
    ) -> tuple[Descent, Tensor]:
        """``vector`` without its scale, and where it is longer than ``most`` as long as that: (that, whether it is not finite).

        Its norm is what one reading pass costs; the factor becomes a coefficient. As ``clip_grad_norm_``: most / (norm + 1e-6).

        Args:
            norm_sq: terms of the ascent's, which has to be finite too.
            scale: float64 ``[1]``.
        """
        square = self.gram([vector]).sum(-1)
        finite = square.isfinite() if norm_sq is None else square.isfinite() & norm_sq.sum().isfinite()
        length, factor = square.sqrt(), torch.ones_like(square)
        if scale is not None:
            length, factor = length / scale, factor / scale
        if most is not None:
            factor = factor * (most / (length + 1e-6)).clamp(max=1)
        descent = Descent(sums=[torch.where(finite, factor, math.nan), torch.ones_like(factor)], norm_sq=norm_sq)
        descent.add(vector, RATIO)
        return descent, (~finite).float().sum()

    def update(
        self, rule: Rule, tables: Tables, state: Any, descent: Descent, found_inf: Tensor | None = None,
        ahead: Vectors | None = None, factor: float = 0.0,
    ) -> None:  # fmt: skip
        """The base optimizer's step on Σ cₖ xₖ, from what the weights were before they were perturbed.

        Where ``found_inf`` is not 0, the weights come back and nothing else changes. With ``ahead``, of which nothing is
        absent, and a descent of one term, ``shift`` by ``factor`` and ahead − Σ cₖ xₖ in the same kernel, with the same bits.
        """
        present = descent.present
        turns: list[tuple[int, Flat, tuple[int, ...], list[Tensor] | None]] = []
        all_bound = True
        for f, flat in enumerate(self.flats):
            absent = flat.absent_from(present.lists[f]) if present.absent else ()
            if len(absent) == len(flat.params):
                self._bring_back(flat)
                continue
            if flat.has_masters:
                flat.save_buffer()
            states = flat.bound(state, tables.names, absent)
            all_bound = all_bound and states is not None
            turns.append((f, flat, absent, states))
        if not all_bound:  # what may fail comes before what cannot be undone
            self.separate(state)
            turns = [(f, flat, a, flat.bind(state, tables.names, rule.counts, a)) for f, flat, a, _ in turns]
        for f, flat, absent, states in turns:
            options = descent.on(flat, True)
            if states:
                options["step"] = flat.state["step"]
            if found_inf is not None:
                options["found_inf"] = moved(found_inf, flat.device)
            if ahead is not None:
                options.update(rates=tables.on("rates", flat.device), factor=factor)
            flat.backend.update(
                flat.weights,
                states,
                descent.lists(f) if ahead is None else joined([descent.lists(f), ahead.lists[f]]),
                flat.table,
                rule=rule.number,
                settings=tables.on("settings", flat.device),
                **options,
            )
            if flat.empty:
                flat.count_empty(absent, options.get("found_inf"))

    def begin_state(self, rule: Rule, tables: Tables, state: State, grads: Vectors) -> None:
        """The base optimizer's state of whatever has a gradient, as its first step would find it."""
        self.separate(state)
        for flat, tensors in zip(self.flats, grads.lists, strict=True):
            flat.bind(state, tables.names, rule.counts, flat.absent_from(tensors))

    def momentum(self, state: State) -> Vectors:
        """The base optimizer's momentum, as the kernels take it; absent where there is none, or the parameter is frozen."""
        lists = [flat.momentum(state, MOMENTA) for flat in self.flats]
        absent = sum(t is flat.absent for flat, tensors in zip(self.flats, lists, strict=True) for t in tensors)
        return self.meet(Vectors(lists, absent))

    def separate(self, state: State) -> None:
        """What lies in a flat buffer of states, but not as ``bind`` left it there for its parameter, gets memory of its own.

        Somebody exchanged it between parameters, or loaded what a state dict had shown: its memory is about to be written to.
        """
        spans = [(t.device, t.data_ptr(), t.nbytes) for flat in self.flats for t in flat.state.values()]
        if not spans:
            return
        place = {id(p): (flat, i) for flat in self.flats for i, p in enumerate(flat.params)}
        for p, entry in state.items():
            flat, i = place.get(id(p), (None, 0))
            for name, t in entry.items():
                if not isinstance(t, Tensor) or t.layout != torch.strided or (flat and flat.is_own(i, name, t)):
                    continue
                place_of = shard(t).data_ptr()
                if any(t.device == device and 0 <= place_of - begin < size for device, begin, size in spans):
                    entry[name] = t.clone()

    def rebind(self, state: State) -> bool:
        """Bring what was loaded into the state to where the kernels of the last update work; False where any is missing."""
        if all(flat.is_bound_still(state) for flat in self.flats):
            return True
        self.separate(state)
        return all(flat.rebind(state) for flat in self.flats)

    @staticmethod
    def _bring_back(flat: Flat) -> None:
        if flat.saved is not None:
            flat.backend.descend(
                flat.weights, [], [], flat.table, coefs=[], sums=[], saved=flat.saved, status=flat.status
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Weights that are perturbed are at once, bit for bit, what they were; the others are not touched.

        Parameters count as modified in place: a graph of the pass that was given up is of no use.

        Raises:
            RuntimeError: a parameter was moved or converted; the others are restored.
        """
        moved, error = not self.is_current(), None
        for flat in self.flats:
            if moved:  # parameters that are new wait for the next step
                try:
                    flat.take_back()
                except RuntimeError as e:
                    error = e
                    continue
            if not flat.is_capturing():  # what is captured never ran
                self._bring_back(flat)
                increment_version(flat.params)
        if error is not None:
            raise error

    def forget_copies(self) -> None:
        """The weights have changed: nobody is to use what was cast or gathered of what they were."""
        forget_casts()
        if self._gathered is not None:
            self._gathered.drop()

    def _together(self, parts: list[tuple[Flat, Tensor]]) -> Tensor:
        """The terms of sums, each a flat's, from all devices and ranks."""
        if self._ranks is not None and parts:
            sums = [moved(self._ranks.share(t.sum(-1, keepdim=True), f.spread), self.device) for f, t in parts]
            return self._ranks.add_up(sums[0] if len(sums) == 1 else torch.cat(sums, -1).sum(-1, keepdim=True))
        if len(parts) == 1:
            return parts[0][1]
        if not parts:
            return torch.zeros(0, dtype=torch.float64)
        return torch.cat([moved(t, self.device) for _, t in parts], -1)


def _chosen(grads: Vectors, f: int, flat: Flat, left: list[int]) -> Tensors:
    """Flat f's tensors, without the parameters that are left out."""
    if not left:
        return grads.lists[f]
    tensors = list(grads.lists[f])
    for i in left:
        tensors[i] = flat.absent
    return tensors


def _direction(flat: Flat, plan: Plan) -> dict[str, Any]:
    """What the direction d is made of."""
    direction: dict[str, Any] = {}
    if plan.eta is not None:
        direction["eta"] = plan.eta
    if plan.lmbda is not None:
        direction["ema"], direction["sigma"] = flat.memory("ema", float("nan")).buffer, plan.sigma
    return direction
