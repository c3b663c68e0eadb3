# SPDX-License-Identifier: Apache-2.0
"""Whole steps without a model: who takes part in a case, whether they compute the same, and what they cost.

1. Equality first. Each contestant takes the same steps on L_i(w) = <M_i, w> + c_i/2 ||w - w_0||², whose gradient depends on
   where it is taken, with rho so large that M_i and c_i * e_i weigh the same. What it moved must be what the loop over
   parameters moved in float64: ||w - w64|| / ||w64 - w_0|| below ``TOLERANCE``. A peer that is further off, that fails or
   that does not end in its time is left out, with a note; a case in which ours is further off is not timed.
2. Time. In every round each contestant takes a block of steps, in shuffled order; a contestant's time is the median
   over the rounds, its spread the interquartile range. Instead of a forward and backward pass there are new gradients
   in ``p.grad``, which nobody else holds; making them does not count. All start and end a step with ``p.grad`` None, and
   clearing it is part of the step. Every contestant has its own weights and state.
3. What a step holds at a time beyond what it held before, without the gradients; on a GPU also launches, the time of the
   kernels, and the host's.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import measure
import peers
from gradients import Backward, Checked, Gradients, Steps
from measure import Call, Clock, Failed, Results, Say, Timing, interleave
from shapes import SHAPES

OURS, PASSES = "ours", "ours (passes loop)"
PERIOD = 5  # steps, of which LookSAM perturbs in one
LR = {"sgd": 0.1, "adamw": 1e-2}


class Method(NamedTuple):
    """A method of the family, by its class in ``methods``; what it moves beyond SAM, in P per micro-batch.

    ``ascent``: in norm and perturb, for a second perturbation, and for inner products; ``held``: gradients that the descent
    reads besides the last one; ``mixed``: whether the descent changes even a single gradient; ``kept``: what is kept beside
    the descent, written and then added to.
    """

    kind: str
    ascent: float = 0
    held: int = 0
    mixed: bool = False
    kept: bool = False


FAMILY = {
    "SAM": Method("SAM"),
    "ASAM": Method("AdaptiveSAM", ascent=1),
    "F-SAM": Method("FriendlySAM", ascent=3),
    "Stable SAM": Method("StableSAM", ascent=1, mixed=True),
    "Sparse SAM": Method("SparseSAM", ascent=1 / 32),
    "LookSAM": Method("LookSAM", ascent=2, kept=True),
    "Bilateral SAM": Method("BilateralSAM", ascent=5, held=2, mixed=True),
    "GSAM": Method("GapSAM", ascent=2, held=1, mixed=True),
    "LE-SAM": Method("LossEquatedSAM"),
    "VaSSO": Method("VaSSO", ascent=3),
    "WSAM": Method("WSAM", kept=True),
    "Momentum-SAM": Method("MomentumSAM"),
    "SAM-ON": Method("SAM"),
}

# Relative L2 error of the way walked, ours and the peers'. In fp32 a rounding of w costs 6e-8 * |w| / |way| per step,
# about 1e-7 here. What plain torch adds is its norm, summed in fp32: 1e-5 at 12M parameters, 5e-5 at 100M, and
# pytorch_optimizer does so for fp64 as well. A wrong rule costs 1e-2 and more. In 16 bits, where plain torch rounds
# after every operator, only gross errors show.
TOLERANCE = {
    torch.float64: (1e-12, 1e-6),
    torch.float32: (1e-5, 5e-4),
    torch.float16: (1e-1, 5e-1),
    torch.bfloat16: (1e-1, 5e-1),
}


def count_of(micro_batches: int) -> str:
    return "1 micro-batch" if micro_batches == 1 else f"{micro_batches} micro-batches"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


@dataclass(frozen=True)
class Case:
    shape: str
    method: str
    base: str
    dtype: torch.dtype
    micro_batches: int
    backend: str = "auto"

    def __str__(self) -> str:
        return f"{self.shape}, {self.method}, {self.base}, {count_of(self.micro_batches)}"

    @property
    def row(self) -> dict[str, object]:
        """As it stands in a table of results."""
        return {"method": self.method, "base": self.base, "micro_batches": self.micro_batches}

    @property
    def period(self) -> int:
        """Steps after which everything begins again."""
        return PERIOD if self.method == "LookSAM" else 1

    @property
    def bodies(self) -> int:
        """Forward and backward passes of a period, per micro-batch."""
        return {"LookSAM": PERIOD + 1, "Bilateral SAM": 3, "Momentum-SAM": 1}.get(self.method, 2)

    def settings(self, rho: float) -> dict[str, float]:
        """Of the method, ours and the peers'."""
        return {
            "F-SAM": {"sigma": 1.0, "lmbda": 0.9},
            "ASAM": {"eta": 0.01},
            "LookSAM": {"k": PERIOD, "alpha": 0.7},
            "Bilateral SAM": {"rho_min": rho / 2},
            "GSAM": {"alpha": 0.4},
            "LE-SAM": {"sigma": rho / 2},
            "VaSSO": {"theta": 0.4},
            "WSAM": {"gamma": 0.8},
        }.get(self.method, {})

    def special(self, params: list[nn.Parameter]) -> dict[str, object]:
        """Settings that depend on the parameters, in the words of the peers."""
        if self.method == "Sparse SAM":
            return {"mask": half(params)}
        return {"only": chosen(params)} if self.method == "SAM-ON" else {}

    @property
    def perturbed(self) -> float:
        """The share of the elements that is perturbed."""
        if self.method != "SAM-ON":
            return 1.0
        sizes = [(len(shape) < 2, math.prod(shape)) for shape in SHAPES[self.shape]()]
        return sum(n for is_chosen, n in sizes if is_chosen) / sum(n for _, n in sizes)

    def passes(self, *, passes_loop: bool = False) -> float:
        """P of a fused step: how often it must read or write all parameters, gradients or state."""
        m, method = self.micro_batches, FAMILY[self.method]
        update = 5 if self.base == "sgd" else 7
        # The first descent is left where it is, unless it is mixed; the others are added to it.
        share = self.perturbed
        descents = [2 * share + method.mixed * (2 + method.held)] + [3 + 2 * share + method.held] * (m - 1)
        ascents = m * (4 * share + method.ascent) + share
        if self.method == "Momentum-SAM":  # one ascent, and one way back
            ascents, descents = 5, [2 * (m == 1), *[3] * (m - 1)]
            descents[-1] += 2 * (m > 1)
        if method.kept and self.method != "LookSAM":
            ascents += 1 if m == 1 and not passes_loop else 4 * m - 1 + 3  # in the update; or kept, and off the weights
        if passes_loop:
            total = ascents + sum(descents) + update
        else:
            total = ascents + sum(descents[:-1]) + method.held + (m > 1) + update
        if self.method != "LookSAM":
            return total
        # Its v in the step that perturbs; in the others the mean, its norm, and v in the update or added to the mean.
        between = 3 * (m - 1) + 1 + (3 if passes_loop else 1) + update
        return (total + 4 * m - 1 + (PERIOD - 1) * between) / PERIOD


# -- contestants -------------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """``step(backward)`` takes one whole step; ``backward`` stands for the forward and backward of a micro-batch."""

    name: str
    params: list[nn.Parameter]
    step: Callable[[Callable[[], Tensor]], object]
    deviation: float = math.nan
    extra: float | None = None
    first_step_s: float = math.nan


def torch_base(params: list[nn.Parameter], base: str, **options) -> torch.optim.Optimizer:
    if base == "sgd":
        return torch.optim.SGD(params, lr=LR["sgd"], momentum=0.9, weight_decay=5e-4, **options)
    # The usual 1e-8 is zero in fp16, and plain torch would divide by it.
    eps = 1e-3 if params[0].element_size() == 2 else 1e-8
    return torch.optim.AdamW(params, lr=LR["adamw"], weight_decay=0.01, eps=eps, **options)


def half(params: list[nn.Parameter]) -> list[Tensor]:
    """A mask of every other element."""
    return [(torch.arange(p.numel(), device=p.device) % 2 == 0).view(p.shape) for p in params]


def chosen(params: list[nn.Parameter]) -> list[bool]:
    """For SAM-ON: of these networks the normalisation layers' parameters, and biases, which have one dimension too."""
    return [p.dim() < 2 for p in params]


def make_peer(name: str, case: Case, gradients: Gradients, dtype: torch.dtype | None = None) -> Contestant:
    kind, params = peers.PEERS[name], gradients.parameters(dtype)
    settings = {**case.settings(gradients.rho), **case.special(params)}
    base = torch_base(params, case.base, **kind.base_options)
    peer = kind(base, rho=gradients.rho, method=case.method, **settings)
    count = case.micro_batches
    return Contestant(name, params, lambda backward: peer.step([backward] * count))


def make_ours(name: str, case: Case, gradients: Gradients) -> Contestant:
    from msam_kernels import MicroBatchSAM, methods

    params, count = gradients.parameters(), case.micro_batches
    sparse = case.method == "Sparse SAM"
    settings = {"update_every": None} if sparse else case.settings(gradients.rho)
    if case.method == "SAM-ON":
        settings["only"] = [p for p, is_chosen in zip(params, chosen(params), strict=True) if is_chosen]
    method = getattr(methods, FAMILY[case.method].kind)(**settings)
    options = {"num_micro_batches": count, "method": method, "backend": case.backend}
    opt = MicroBatchSAM(torch_base(params, case.base), rho=gradients.rho, **options)
    if sparse:
        opt.mask = half(params)
    samples = torch.zeros(count)

    def passes_loop(backward):
        for _ in opt.passes(samples):
            backward()
        opt.step()
        opt.zero_grad()

    if name == PASSES:
        return Contestant(name, params, passes_loop)
    return Contestant(name, params, opt.step if count == 1 else lambda backward: opt.step([backward] * count))


def take_part(name: str, case: Case) -> bool:
    """Whether a contestant knows the method, and several micro-batches."""
    kind = peers.PEERS.get(name)
    return kind is None or (case.method in kind.methods and (kind.micro_batches or case.micro_batches == 1))


def turns(case: Case, names: Sequence[str], gradients: Gradients) -> Iterator[list[str]]:
    """Those that take part, in groups that fit the memory of a GPU side by side."""
    names = [name for name in names if take_part(name, case)]
    together = len(names)
    if gradients.device.type == "cuda":
        # Weights, saved weights, momentum, and what the hungriest allocates in a step; an EMA; a second state.
        copies = 8 + (case.method != "SAM") + (case.base == "adamw")
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(gradients.device)[0] - case.bodies * case.micro_batches * gradients.nbytes
        together = max(1, free // (copies * gradients.nbytes))
    for begin in range(0, len(names), together):
        yield names[begin : begin + together]


# -- equality ----------------------------------------------------------------------------------------------------------


def check_steps(case: Case, gradients: Gradients) -> int:
    """Three steps show a wrong momentum or EMA; where that takes minutes, one step of several micro-batches must do."""
    if gradients.numel * case.micro_batches > 2e8 and gradients.device.type == "cpu":
        return case.period
    return max(3, case.period + 1)


def reference_weights(case: Case, gradients: Gradients) -> list[Tensor]:
    reference = make_peer("loop", case, gradients, torch.float64)
    backward = Checked(gradients, reference.params)
    for _ in range(check_steps(case, gradients)):
        reference.step(backward)
    return [p.detach() for p in reference.params]


@torch.no_grad()
def deviation(contestant: Contestant, expected: list[Tensor], gradients: Gradients) -> float:
    """||w - w64|| / ||w64 - w_0||; infinite where the weights are not finite."""
    wrong = moved = 0.0
    for p, w64, w in zip(contestant.params, expected, gradients.weights, strict=True):
        wrong += (w64 - p).square_().sum().item()
        moved += (w64 - w).square_().sum().item()
    ratio = math.sqrt(wrong / moved)
    return ratio if math.isfinite(ratio) else math.inf


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def enter(
    name: str, case: Case, gradients: Gradients, expected: list[Tensor], peer_seconds: float, note: Callable
) -> Contestant | None:
    """The contestant, once its weights went where ``expected`` are; None for a peer that cannot, with a note.

    Raises:
        Failed: the weights of ours went elsewhere.
    """
    kind = peers.PEERS.get(name)
    try:
        # A peer that a machine cannot run is no reason not to measure the others; we have no such excuse.
        with measure.time_limit(peer_seconds if kind else math.inf):
            contestant = (make_peer if kind else make_ours)(name, case, gradients)
            backward = Checked(gradients, contestant.params)
            start = time.perf_counter()
            for step in range(check_steps(case, gradients)):
                contestant.step(backward)
                if step == 0:
                    contestant.first_step_s = time.perf_counter() - start
    except Exception as error:
        if kind is None:
            raise
        note(f"{case}: {name} is left out, {first_line(error)}")
        return None
    contestant.deviation = deviation(contestant, expected, gradients)
    limit = TOLERANCE[case.dtype][0 if kind is None else 1]
    if contestant.deviation <= limit or (kind and case.method in kind.other_rules):
        return contestant
    far = f"{contestant.deviation:.1e} from plain torch in float64, at most {limit:.0e} is allowed"
    if kind is None:
        raise Failed(f"{case}: {name} computes something else, and nobody is timed: {far}.")
    note(f"{case}: {name} computes something else, and is left out: {far}.")
    return None


# -- a case ------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-memory", action="store_true", help="leave out the extra memory of a step")


def copy_call(gradients: Gradients) -> Call:
    source = torch.ones(gradients.numel, dtype=gradients.dtype, device=gradients.device)
    target = torch.zeros_like(source)
    return Call(lambda: target.copy_(source))


def add_timing(results: Results, gradients: Gradients, timing: Timing, passes: float, **row) -> dict:
    """A row with the bandwidth of so many passes over all parameters."""
    speed = passes * gradients.nbytes / timing.median / 1e9
    return results.add(**row, **timing.as_row(), passes=passes, gb_per_s=speed)


def extra_of(steps: Steps, gradients: Gradients) -> float | None:
    """In units of the parameters."""
    before = steps.backward.ahead
    steps.backward.ahead = True
    extra = measure.extra_memory(steps) / gradients.nbytes
    steps.backward.ahead = before
    return extra if extra >= 0 else None


def run_case(
    results: Results, case: Case, where: dict, gradients: Gradients, names: Sequence[str], args, say: Say
) -> None:
    """Add a row for every contestant that may be timed, and one for ``copy_`` on a CPU."""
    say("float64 reference")
    expected = reference_weights(case, gradients)
    here, clock, on_gpu = {**where, **case.row}, Clock(args.device), args.device.type == "cuda"
    groups = 0
    for group in turns(case, names, gradients):
        groups += 1
        contestants: list[Contestant] = []
        for name in group:
            say(f"checking {name}")
            contestant = enter(name, case, gradients, expected, args.peer_seconds, results.note)
            if contestant is not None:
                contestants.append(contestant)
        calls: dict[str, Call] = {}
        for c in contestants:
            backward = Backward(gradients, c.params)
            calls[c.name] = steps = Steps(c.step, backward, case.bodies * case.micro_batches, case.period)
            if not args.no_memory and case.micro_batches <= 4:
                say(f"memory of {c.name}")
                c.extra = extra_of(steps, gradients)
        if not calls:
            continue
        copy = {} if on_gpu else {"copy_": copy_call(gradients)}
        timings = interleave({**calls, **copy}, measure.effort(args), clock, say=say)
        if copy:
            add_timing(results, gradients, timings["copy_"], 2, kind="copy", contestant="copy_", **here)
        for c in contestants:
            timing = Timing([s / case.period for s in timings[c.name].seconds])
            more = gpu_costs(calls[c.name], case, timing, clock, say) if on_gpu else {}
            add_timing(
                results,
                gradients,
                timing,
                case.passes(passes_loop=c.name == PASSES),
                kind="step",
                contestant=c.name,
                **here,
                deviation=c.deviation,
                extra_over_parameters=c.extra,
                first_step_s=c.first_step_s,
                **more,
            )
        del contestants, calls
        gc.collect()
    if groups > 1:
        results.note(
            f"{case.shape}, {dtype_name(case.dtype)}: contestants were measured in {groups} turns, for memory."
        )


def gpu_costs(steps: Steps, case: Case, timing: Timing, clock: Clock, say: Say) -> dict[str, float | None]:
    """Per step the kernels' time, which ``timing`` is raised to; per micro-batch launches and the host's time."""
    say("launches and host time")
    host, work = clock.host(steps), measure.device_work(steps, clock.device)
    if work:
        # Assigning gradients while the device works costs nothing, and was subtracted.
        timing.seconds[:] = [max(s, work.seconds / case.period) for s in timing.seconds]
    calls = case.micro_batches * case.period
    return {
        "device_ms": work.seconds * 1e3 / case.period if work else None,
        "launches": work.launches / calls if work else None,
        "host_us": host * 1e6 / calls,
    }


def where(shape: str, gradients: Gradients) -> dict[str, object]:
    """What all rows of a shape have."""
    tensors = len(gradients.weights)
    return {"shape": shape, "dtype": dtype_name(gradients.dtype), "numel": gradients.numel, "tensors": tensors}


def versions(backend: str | None, device: torch.device) -> dict[str, str]:
    """Of ours, with the backend that ``backend`` chooses, and of the package among the peers; None leaves ours out."""
    package = {"pytorch_optimizer": measure.installed("pytorch_optimizer")}
    if backend is None:
        return {"msam_kernels": "left out", "backend": "", **package}
    import msam_kernels
    from kernels import chosen_backend

    return {"msam_kernels": msam_kernels.__version__, "backend": chosen_backend(backend, device), **package}
