# SPDX-License-Identifier: Apache-2.0
"""The yardstick: SAM, ASAM, F-SAM and their micro-batch forms as plain loops over parameters; and what several tests share."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from msam_kernels import MicroBatchSAM, methods

METHODS = {
    "SAM": methods.SAM(),
    "ASAM": methods.AdaptiveSAM(eta=0.01),
    "ASAM eta=0": methods.AdaptiveSAM(eta=0.0),
    "F-SAM": methods.FriendlySAM(),
    "F-SAM sigma=0.5 lmbda=0.6": methods.FriendlySAM(sigma=0.5, lmbda=0.6),
    "LE-SAM": methods.LossEquatedSAM(sigma=0.05),
    "Stable SAM": methods.StableSAM(),
    "GSAM": methods.GapSAM(),
    "LookSAM k=2": methods.LookSAM(k=2),
    "Bilateral SAM": methods.BilateralSAM(rho_min=0.03),
    "Sparse SAM": methods.SparseSAM(sparsity=0.7, update_every=2),
    "VaSSO": methods.VaSSO(theta=0.3),
    "WSAM": methods.WSAM(gamma=0.8),
    "Momentum-SAM": methods.MomentumSAM(),
    "F-SAM + Sparse + Stable": (
        methods.FriendlySAM(sigma=0.5, lmbda=0.6)
        + methods.SparseSAM(sparsity=0.6, update_every=3)
        + methods.StableSAM()
    ),
}


#: What base optimizers without momentum serve.
WITHOUT_MOMENTUM = [name for name, method in METHODS.items() if not method.full.momentum]


class PlainSAM:
    """mSAM around any base optimizer, written from the definitions: no buffers, no kernels, one loop for each thing."""

    def __init__(self, base: torch.optim.Optimizer, rho: float = 0.05, method: methods.SAM | None = None):
        self.base, self.rho = base, rho
        parts = {type(part): part for part in getattr(method, "parts", [method])}
        adaptive, friendly, gap, bilateral, equated, self.look, self.sparse, vasso, self.weighted = map(
            parts.get,
            (
                methods.AdaptiveSAM,
                methods.FriendlySAM,
                methods.GapSAM,
                methods.BilateralSAM,
                methods.LossEquatedSAM,
                methods.LookSAM,
                methods.SparseSAM,
                methods.VaSSO,
                methods.WSAM,
            ),
        )
        self.eta = adaptive.eta if adaptive else None
        self.sigma, self.lmbda = (friendly.sigma, friendly.lmbda) if friendly else (None, None)
        self.theta = vasso.theta if vasso else None
        self.momentum = methods.MomentumSAM in parts
        self.only = method.only if method else None
        self.stable = methods.StableSAM in parts
        self.alpha = gap.alpha if gap else 0.0
        self.rho_min = bilateral.rho_min if bilateral else None
        self.budget = equated.sigma if equated else math.inf
        self.ema: dict[Tensor, Tensor] = {}
        self.v: dict[Tensor, Tensor] = {}
        self.gap: dict[Tensor, Tensor] = {}
        self.mask: dict[Tensor, Tensor] = {}
        self.steps = self.mask_step = 0
        self.enabled = True
        self.grad_norms: list[Tensor] = []
        self.perturbation_norms: list[Tensor] = []

    @property
    def looks(self) -> bool:
        """Whether the next step perturbs."""
        return self.enabled and (self.look is None or self.steps % self.look.k == 0)

    def step(
        self,
        closures: Sequence[Callable[[], Any]],
        shares: Sequence[float] | None = None,
        before: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """One step; ``closures``: forward and backward of each micro-batch, ``shares``: its part of the samples.

        ``before``: gradients to which those of the step are added.
        """
        shares = shares or [1 / len(closures)] * len(closures)
        rho = {  # where a group is maximised, the worst point lies downhill
            p: group.get("rho", self.rho) * (-1 if group.get("maximize") else 1)
            for group in self.base.param_groups
            for p in group["params"]
        }
        mean: dict[Tensor, Tensor] = {}
        self.grad_norms, self.perturbation_norms = [], []
        looks = self.looks
        self.v = {} if looks else self.v
        self.gap: dict[Tensor, Tensor] = {}
        saved = self._lean(rho) if self.momentum and looks else {}
        self.scores: dict[Tensor, Tensor] = {}
        for closure, share in zip(closures, shares, strict=True):
            climbs = looks and not self.momentum
            descent = self._gradients(rho, closure, share) if climbs else self._backward(rho, closure)
            for p, g in descent.items():
                mean[p] = share * g if p not in mean else mean[p] + share * g
        if self.enabled and not looks:
            factor = self.look.alpha * _length(mean) / (_length(self.v) + 1e-12)
            mean = {p: g + (factor * self.v[p]).to(p.dtype) if p in self.v else g for p, g in mean.items()}
        with torch.no_grad():
            for p, w in saved.items():
                p.copy_(w)
        for p, g in (before or {}).items():
            mean[p] = g + mean[p] if p in mean else g
        for p in rho:
            p.grad = mean.get(p)
        self.base.step()
        self._shift()
        for p in rho:
            p.grad = None
        self.steps += 1
        if self.sparse and looks and self.steps - self.mask_step >= self.sparse.update_every:
            self._choose_mask(rho, self.steps)

    @torch.no_grad()
    def _shift(self) -> None:
        """What WSAM takes off the weights after the base optimizer's step."""
        for group in self.base.param_groups:
            for p in group["params"]:
                if p in self.gap and p.grad is not None:
                    lr = -group["lr"] if group.get("maximize") else group["lr"]
                    p -= lr * self.weighted.gamma / (1 - self.weighted.gamma) * self.gap[p]

    @torch.no_grad()
    def _lean(self, rho: dict[Tensor, float]) -> dict[Tensor, Tensor]:
        """Perturb against the momentum; what the weights were."""
        v = {}
        for p in rho:
            state = self.base.state.get(p, {})
            m = state.get("momentum_buffer", state.get("exp_avg"))
            if m is not None and p.requires_grad and (self.only is None or p in self.only):
                v[p] = m
        norm = _length({p: self._stretch(p) * d for p, d in v.items()})
        saved = {p: p.clone() for p in v}
        for p, d in v.items():
            if self.mask:
                d = d * self.mask[p]
            p -= (abs(rho[p]) * self._stretch(p).square() * d / (norm + 1e-12)).to(p.dtype)
        self.grad_norms.append(norm)
        self.perturbation_norms.append(_length({p: p - w for p, w in saved.items()}))
        return saved

    def _stretch(self, p: Tensor) -> Tensor:
        return torch.ones_like(p) if self.eta is None else p.abs() + self.eta

    def give_up(self, closures: Sequence[Callable[[], Any]], passes: int | None) -> None:
        """A loop that is left in so many passes, None: not at all. What was perturbed until then has moved the EMA on."""
        if not self.looks or self.momentum:
            return
        rho = {p: group.get("rho", self.rho) for group in self.base.param_groups for p in group["params"]}
        v = self.v
        for closure in closures if passes is None else closures[: passes // 2]:
            self._gradients(rho, closure)
        self.v = v if passes is not None else self.v

    @torch.no_grad()
    def _gradients(
        self, rho: dict[Tensor, float], closure: Callable[[], Any], share: float = 1.0
    ) -> dict[Tensor, Tensor]:
        g = self._backward(rho, closure)
        direction, stretch, ema = {}, {}, dict(self.ema)
        for p in g:
            direction[p] = g[p] - self.sigma * self.ema[p] if self.sigma is not None and p in self.ema else g[p]
            stretch[p] = self._stretch(p)
            if self.theta is not None:
                ema[p] = (1 - self.theta) * self.ema[p] + self.theta * g[p] if p in self.ema else g[p]
                direction[p] = ema[p]
            if self.sigma is not None:
                old = self.ema.get(p)
                ema[p] = g[p] if old is None else self.lmbda * old + (1 - self.lmbda) * g[p]
        if self.sparse:
            for p in g:
                self.scores[p] = self.scores.get(p, torch.zeros_like(p)) + g[p].square()
            if not self.mask:
                self._choose_mask(rho, self.steps)
        if self.only is not None:
            direction = {p: d for p, d in direction.items() if p in self.only}
        norm = _length({p: stretch[p] * d for p, d in direction.items()})
        self.grad_norms.append(norm)
        finite = bool(norm.isfinite())  # else nothing is perturbed, and the EMA stays
        self.ema = ema if finite else self.ema
        e = {p: stretch[p].square() * d / (norm + 1e-12).to(p.dtype) for p, d in direction.items()}
        e = {p: u * self.mask[p] if self.sparse else u for p, u in e.items()}
        saved = {p: p.clone() for p in rho}
        for p, u in e.items() if finite else ():
            p += math.copysign(min(abs(rho[p]), self.budget / (float(norm) + 1e-12)), rho[p]) * u
        self.perturbation_norms.append(_length({p: p - saved[p] for p in rho}))
        descent = self._backward(rho, closure)
        behind = None
        if self.rho_min is not None:
            for p in e:
                p.copy_(saved[p] - (math.copysign(self.rho_min, rho[p]) if rho[p] else 0.0) * e[p])
            behind = self._backward(rho, closure)
        for p in rho:
            p.copy_(saved[p])
        return self._combined(g, descent, behind, share)

    def _combined(self, g, at_e, behind, share: float) -> dict[Tensor, Tensor]:
        if self.alpha or self.look or self.weighted or behind is not None:
            at_e = self._joined(g, at_e, behind, share)
        if self.stable:
            factor = _length(g) / (_length(at_e) + 1e-12)
            at_e = {p: (factor * d).to(p.dtype) for p, d in at_e.items()}
        return at_e

    def _joined(self, g, at_e, behind, share: float) -> dict[Tensor, Tensor]:
        at_w, plain, everywhere = g, at_e, {**g, **at_e, **(behind or {})}
        g, at_e, behind = ({p: (d or {}).get(p, torch.zeros_like(p)) for p in everywhere} for d in (g, at_e, behind))
        if self.look:
            along = _dot(g, at_e) / (_dot(g, g) + 1e-12)
            for p in everywhere:
                self.v[p] = self.v.get(p, 0) + share * (at_e[p] - along.to(p.dtype) * g[p])
            return plain
        if self.weighted and self.weighted.decoupled:
            for p in everywhere:
                self.gap[p] = self.gap.get(p, 0) + share * (at_e[p] - g[p])
            return at_w
        if self.weighted:
            a = self.weighted.gamma / (1 - self.weighted.gamma)
            at_e = {p: a * at_e[p] + (1 - a) * g[p] for p in everywhere}
        if self.rho_min is not None:
            factor = _length(at_e) / (_length(behind) + 1e-12)
            at_e = {p: at_e[p] + g[p] - (factor * behind[p]).to(p.dtype) for p in everywhere}
        if self.alpha:
            length_sq = _dot(at_e, at_e)
            along = torch.where(length_sq == 0, 0.0, _dot(g, at_e) / length_sq)
            at_e = {p: d - self.alpha * (g[p] - (along * d).to(p.dtype)) for p, d in at_e.items()}
        return at_e

    def _choose_mask(self, params: Iterable[Tensor], step: int) -> None:
        """The largest scores of all that are trained; of equal ones the first, in the order of memory."""
        params = [p for p in params if p.requires_grad]
        scores = [self.scores.get(p, torch.zeros_like(p)).double() for p in params]
        # The memory order of a dense tensor, of any other its own.
        orders = [sorted(range(p.dim()), key=lambda d, p=p: -p.stride(d)) for p in params]
        flat = torch.cat([s.permute(order).reshape(-1) for s, order in zip(scores, orders, strict=True)])
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        count = round((1 - self.sparse.sparsity) * flat.numel())
        chosen[flat.sort(descending=True, stable=True).indices[:count]] = True
        parts = chosen.split([p.numel() for p in params])
        for p, order, bits in zip(params, orders, parts, strict=True):
            back = [order.index(d) for d in range(p.dim())]
            self.mask[p] = bits.view([p.size(d) for d in order]).permute(back)
        self.mask_step = step

    @staticmethod
    def _backward(params: Iterable[Tensor], closure: Callable[[], Any]) -> dict[Tensor, Tensor]:
        for p in params:
            p.grad = None
        with torch.enable_grad():
            closure()
        return {p: p.grad.clone() for p in params if p.grad is not None}


def _dot(a: dict[Tensor, Tensor], b: dict[Tensor, Tensor]) -> Tensor:
    products = [(a[p].double() * b[p].double()).sum() for p in a]
    return torch.stack([*products, torch.zeros((), dtype=torch.float64, device=DEVICE)]).sum()


def _length(a: dict[Tensor, Tensor]) -> Tensor:
    return _dot(a, a).sqrt()


class PlainRanks(PlainSAM):
    """The plain loops over the micro-batches of all who perturb alike: those of each have their own mean gradient."""

    def __init__(self, *args: Any, world: int, **options: Any):
        super().__init__(*args, **options)
        self.world, self.emas = world, [{} for _ in range(world)]

    def step(self, closures, shares=None, before=None):
        self.count, self.turn = -(-len(closures) // self.world), 0
        if self.sparse and not self.mask and self.looks:  # the first mask: by the first micro-batch of all
            params = [p for group in self.base.param_groups for p in group["params"]]
            firsts = [self._backward(params, closure) for closure in closures[:: self.count]]
            self.scores = {p: sum(g[p].square() for g in firsts) for p in params}
            self._choose_mask(params, self.steps)
        super().step(closures, shares, before)

    def _gradients(self, rho, closure, share=1.0):
        rank = self.turn // self.count
        self.ema, self.turn = self.emas[rank], self.turn + 1
        descent = super()._gradients(rho, closure, share)
        self.emas[rank] = self.ema
        return descent


def of_both_and_own(both: Callable[[], Any], own: Callable[[], Any]) -> Callable[[], Any]:
    """A micro-batch of a rank, in the one loop of several that DDP synchronises.

    The rank perturbs along the gradient of all, less its own mean gradient, and what it finds there is averaged with theirs.
    """
    turns = itertools.cycle((both, own))
    return lambda: next(turns)()


# ---- where the tests run ---------------------------------------------------------------------------------------------

# Of parameters and data. On a GPU (`make gpu` sets it) everything that tests make is made there.
DEVICE = torch.device(os.environ.get("MSAM_TEST_DEVICE", "cpu"))
# The backends that run there; the first is compiled.
BACKENDS = ("cpu", "reference") if DEVICE.type == "cpu" else ("cuda", "triton", "reference")


def random_numbers(seed: int) -> torch.Generator:
    """For ``torch.randn(..., generator=...)`` on the device of the tests."""
    return torch.Generator(DEVICE).manual_seed(seed)


# Of ``compile=True``: an older compiler takes no stacked weights, and what it was to compile runs as it is written.
COMPILES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
NO_COMPILER = "the compiler of this torch cannot take parallel passes"

# ---- models and data -------------------------------------------------------------------------------------------------


def rows(names: Sequence[str], *columns: Iterable[Any], every: int) -> pytest.MarkDecorator:
    """All combinations, of which every so many runs where not everything does: with each value some values of all others."""
    columns = tuple(map(list, columns))
    params = [
        pytest.param(
            *(column[i] for column, i in zip(columns, places, strict=True)),
            marks=[pytest.mark.exhaustive] if sum(places) % every else [],
        )
        for places in itertools.product(*(range(len(column)) for column in columns))
    ]
    return pytest.mark.parametrize(names, params)


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    generator = random_numbers(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.to(dtype)


def batch(samples: int = 7, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = random_numbers(seed)
    options = {"generator": generator, "device": DEVICE}
    x, y = torch.randn(samples, 3, **options), torch.randn(samples, 2, **options)
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


class Zoo(nn.Module):
    """A parameter of every awkward kind; ``sometimes`` gets a gradient only in the calls that ``uses`` picks.

    With ``gaps`` one of them is a column of a matrix, which only ``flatten=True`` serves.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float64, uses: Callable[[int], bool] = lambda call: True, gaps: bool = True
    ):
        super().__init__()
        generator = random_numbers(0)

        def new(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * 0.4).to(dtype)

        self.channels_last = nn.Parameter(new(3, 2, 3, 3).to(memory_format=torch.channels_last))
        self.matrix = nn.Parameter(new(27, 4))
        self.square = nn.Parameter(new(4, 4).t())
        self.also_square = self.square
        self.column = nn.Parameter(new(4, 6)[:, 1] if gaps else new(4))
        self.scalar = nn.Parameter(new())
        self.empty = nn.Parameter(new(0, 3))
        self.frozen = nn.Parameter(new(4), requires_grad=False)
        self.sometimes = nn.Parameter(new(4))
        self.unused = nn.Parameter(new(2, 2))
        self.uses, self.calls = uses, 0

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.channels_last).tanh().flatten(1) @ self.matrix
        x = (x.tanh() @ self.square + self.column).tanh() @ self.also_square * (1 + self.scalar) + self.frozen
        if self.uses(self.calls):
            x = x * (1 + self.sometimes)
        self.calls += 1
        return x + self.empty.sum()

    def groups(self) -> list[dict[str, Any]]:
        """Two parameter groups with settings of their own."""
        first = [self.channels_last, self.square, self.empty, self.sometimes]
        known = {id(p) for p in first}
        second = [p for p in self.parameters() if id(p) not in known]
        return [{"params": first, "rho": 0.3, "lr": 0.05}, {"params": second, "rho": 0.1}]


def images(samples: int = 7, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = random_numbers(seed)
    options = {"generator": generator, "device": DEVICE}
    x, y = torch.randn(samples, 2, 5, 5, **options), torch.randn(samples, 4, **options)
    return x.to(dtype), y.to(dtype)


# ---- the ways to make a step -----------------------------------------------------------------------------------------


def split(data: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(list(sizes)) for t in data), strict=True))


def closure_of(model: nn.Module, part: Sequence[Tensor]) -> Callable[[], Tensor]:
    def closure():
        loss = loss_of(model, *part)
        loss.backward()
        return loss

    return closure


def step_with_passes(opt: MicroBatchSAM, model: nn.Module, data: Sequence[Tensor]) -> None:
    for part in opt.passes(*data):
        loss_of(model, *part).backward()
    opt.step()
    opt.zero_grad()


def step_with_closures(opt: MicroBatchSAM, model: nn.Module, data: Sequence[Tensor]) -> None:
    """Micro-batches of equal size only."""
    count = opt.num_micro_batches
    opt.step([closure_of(model, part) for part in split(data, [len(data[0]) // count] * count)])


def step_with_train_step(opt: MicroBatchSAM, model: nn.Module, data: Sequence[Tensor]) -> None:
    opt.train_step(lambda *part: loss_of(model, *part), *data)


WAYS = {"passes": step_with_passes, "closures": step_with_closures, "train_step": step_with_train_step}


# ---- several ranks ---------------------------------------------------------------------------------------------------


def _rank(rank: int, world: int, folder: str, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(job(rank, *args), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
    os._exit(0)  # without torch's own end, in which gloo's threads may abort


def on_ranks(world: int, folder: Path, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``job(rank, *args)`` returns on each of so many processes."""
    folder.mkdir(exist_ok=True, parents=True)
    mp.spawn(_rank, (world, str(folder), job, args), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


# ---- comparing -------------------------------------------------------------------------------------------------------


def weights(model: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    """Copies, to be compared with later."""
    params = model.parameters() if isinstance(model, nn.Module) else model
    return [p.detach().clone() for p in params]


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def same_bits(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> bool:
    """Equal to the last bit: NaN equals NaN, 0 does not equal -0."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        kind = integer[a.element_size()]
        return torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))

    return all(equal(a, b) for a, b in zip(actual, expected, strict=True))


def assert_close(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, a), b in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            a.detach(), b.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def off(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))


def follow_the_plain_loops(
    expected: Zoo,
    base: Callable[[list[dict]], torch.optim.Optimizer],
    method: methods.SAM,
    micro_batches: int,
    way: str,
    backend: str,
    *,
    steps: int = 4,
    size: int = 2,
    tolerance: float = 1e-12,
    check: Callable[[MicroBatchSAM, PlainSAM], None] = lambda ours, theirs: None,
) -> tuple[Zoo, MicroBatchSAM, PlainSAM]:
    """Steps of the plain loops on ``expected``, and of the optimizer on a copy of it, whose weights must agree after each.

    ``size``: samples of a micro-batch; ``check``: of both optimizers after every step. Returns the copy and both.
    """
    actual = copy.deepcopy(expected)
    theirs = PlainSAM(base(expected.groups()), method=method)
    ours = MicroBatchSAM(base(actual.groups()), method=method, num_micro_batches=micro_batches, backend=backend)
    for step in range(steps):
        data = images(size * micro_batches, seed=step)
        WAYS[way](ours, actual, data)
        theirs.step([closure_of(expected, part) for part in split(data, [size] * micro_batches)])
        assert_close(actual, expected, tolerance)
        check(ours, theirs)
    return actual, ours, theirs


def train_parameters_without_elements(**options: Any) -> None:
    """Alone and beside others, which must go on being trained."""
    for shapes in ([(0,)], [(0,), (0, 3)], [(0,), (4,)]):
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        opt = MicroBatchSAM(base, 0.1, num_micro_batches=2, **options)

        def closure(params: Sequence[Tensor] = params) -> None:
            torch.stack([(p * p).sum() for p in params]).sum().backward()

        for _ in range(3):
            before = weights(params)
            opt.step([closure, closure])
            moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
            assert moved == [p.numel() > 0 for p in params]


def through_a_file(thing: Any) -> Any:
    """``thing`` as ``torch.save`` and a careful ``torch.load`` return it."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved_size(thing: Any) -> int:
    file = io.BytesIO()
    torch.save(thing, file)
    return len(file.getvalue())


def remembered(opt, name):
    """What a state dict holds of the method's "ema", "v" or "mask", by parameter: of what has begun."""
    saved = opt if isinstance(opt, dict) else opt.state_dict()
    kept = {i: entry[f"msam_{name}"] for i, entry in saved["state"].items() if f"msam_{name}" in entry}
    kept |= saved.get("msam", {}).get(name, {})
    if name == "mask":
        return kept if saved["param_groups"][0].get("msam_mask_step", 0) >= 0 else {}
    return {i: t for i, t in sorted(kept.items()) if t.numel() and not t.isnan().all()}


def without_ours(state_dict):
    """A state dict as a plain optimizer writes it."""

    def plain(entry):
        return {k: v for k, v in entry.items() if not k.startswith("msam_")}

    state = {i: plain(entry) for i, entry in state_dict["state"].items()}
    groups = [plain(group) for group in state_dict["param_groups"]]
    return {"state": {i: entry for i, entry in state.items() if entry}, "param_groups": groups}
