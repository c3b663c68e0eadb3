# SPDX-License-Identifier: Apache-2.0
"""Trajectories worked out by hand, and what tells each method from its look-alikes.

The problem: L_x(w) = ((w1 - x1)^2 + 4 (w2 - x2)^2) / 2, the loss of a batch is the mean over its x. Weights begin at (1, 1);
SGD with lr 0.1 and momentum 0.9; rho 0.1; float64. One micro-batch is both samples together, two are one sample each.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import msam_kernels
from msam_kernels import MicroBatchSAM, methods
from plain import random_numbers, remembered

LR, MOMENTUM, RHO = 0.1, 0.9, 0.1
TOLERANCE = {"rtol": 0, "atol": 1e-12}
CURVATURE = (1.0, 4.0)
BATCHES = [[(0.0, 0.0), (1.0, 0.0)], [(0.0, 1.0), (1.0, 1.0)], [(0.5, 0.0), (0.0, -1.0)]]

# name: (rho, method)
METHODS = {
    "SGD": (0.0, methods.SAM()),
    "SAM": (RHO, methods.SAM()),
    "ASAM eta=0": (RHO, methods.AdaptiveSAM(eta=0.0)),
    "ASAM eta=0.01": (RHO, methods.AdaptiveSAM(eta=0.01)),
    "F-SAM sigma=1 lmbda=0.6": (RHO, methods.FriendlySAM(sigma=1.0, lmbda=0.6)),
    "F-SAM sigma=0.5 lmbda=0.9": (RHO, methods.FriendlySAM(sigma=0.5, lmbda=0.9)),
    "late start=2": (RHO, methods.SAM(start=2)),
    "every k=2": (RHO, methods.SAM(every=2)),
    "Stable SAM": (RHO, methods.StableSAM()),
    "GSAM alpha=0.4": (RHO, methods.GapSAM(alpha=0.4)),
    "LookSAM k=2 alpha=0.5": (RHO, methods.LookSAM(k=2, alpha=0.5)),
    "Bilateral rho_min=0.05": (RHO, methods.BilateralSAM(rho_min=0.05)),
    "Sparse mask=(1, 0)": (RHO, methods.SparseSAM(update_every=None)),
    "LE-SAM sigma=0.2": (RHO, methods.LossEquatedSAM(sigma=0.2)),  # of some gradients rho is less, of others more
    "VaSSO theta=0.4": (RHO, methods.VaSSO(theta=0.4)),
    "WSAM coupled gamma=0.8": (RHO, methods.WSAM(gamma=0.8, decoupled=False)),
    "WSAM gamma=0.8": (RHO, methods.WSAM(gamma=0.8)),
    "Momentum-SAM": (RHO, methods.MomentumSAM()),
    "first weight only": (RHO, methods.SAM()),
}
MASK = (True, False)  # of Sparse SAM
ONLY_FIRST = "first weight only"

# (method, micro-batches): the weights after steps 1, 2 and 3
GOLDEN = {
    ("SGD", 1): [(0.950000000000, 0.600000000000), (0.860000000000, 0.400000000000), (0.718000000000, -0.140000000000)],
    ("SGD", 2): [(0.950000000000, 0.600000000000), (0.860000000000, 0.400000000000), (0.718000000000, -0.140000000000)],
    ("SAM", 1): [(0.948759652654, 0.560308884931), (0.855295024649, 0.379221549202), (0.708951185189, -0.174866073699)],
    ("SAM", 2): [(0.948787321875, 0.560597149997), (0.855587687007, 0.378486699660), (0.709239320132, -0.176041039813)],
    ("ASAM eta=0", 1): [
        (0.948759652654, 0.560308884931),
        (0.854004442256, 0.361037524842),
        (0.705052052799, -0.176061026725),
    ],
    ("ASAM eta=0", 2): [
        (0.948787321875, 0.560597149997),
        (0.854851053487, 0.360371554149),
        (0.706175363926, -0.176957769304),
    ],
    ("ASAM eta=0.01", 1): [
        (0.948747249181, 0.559911973781),
        (0.853966334521, 0.360819168275),
        (0.704998484036, -0.176422458294),
    ],
    ("ASAM eta=0.01", 2): [
        (0.948775195094, 0.560203121497),
        (0.854809423595, 0.360142813275),
        (0.706112494323, -0.177334318517),
    ],
    ("F-SAM sigma=1 lmbda=0.6", 1): [
        (0.948759652654, 0.560308884931),
        (0.857856349278, 0.380461744074),
        (0.714556307874, -0.173486857220),
    ],
    ("F-SAM sigma=1 lmbda=0.6", 2): [
        (0.953787321875, 0.580597149997),
        (0.867632684394, 0.410342829733),
        (0.728075204363, -0.146907519002),
    ],
    ("F-SAM sigma=0.5 lmbda=0.9", 1): [
        (0.948759652654, 0.560308884931),
        (0.857239322670, 0.380407520662),
        (0.712196941904, -0.172898724637),
    ],
    ("F-SAM sigma=0.5 lmbda=0.9", 2): [
        (0.950000000000, 0.561194299994),
        (0.860057186938, 0.381409726132),
        (0.720156708174, -0.169846102816),
    ],
    ("Stable SAM", 1): [
        (0.953338161360, 0.599596862132),
        (0.872203010665, 0.401020571467),
        (0.741442473089, -0.138851348872),
    ],
    ("Stable SAM", 2): [
        (0.953139204927, 0.599241274449),
        (0.870208194137, 0.401593231880),
        (0.738253273643, -0.137801049759),
    ],
    ("GSAM alpha=0.4", 1): [
        (0.950095566492, 0.560153201346),
        (0.860017188167, 0.379495769372),
        (0.718033897870, -0.174594238832),
    ],
    ("GSAM alpha=0.4", 2): [
        (0.950045303944, 0.560303513744),
        (0.859650742088, 0.378965410812),
        (0.717309408025, -0.175384004609),
    ],
    ("LookSAM k=2 alpha=0.5", 1): [
        (0.948759652654, 0.560308884931),
        (0.947822231938, 0.329206470251),
        (0.875137516110, -0.249611369113),
    ],
    ("LookSAM k=2 alpha=0.5", 2): [
        (0.948787321875, 0.560597149997),
        (0.945809263157, 0.318897704050),
        (0.871016132881, -0.264757164540),
    ],
    ("Bilateral rho_min=0.05", 1): [
        (0.955780430956, 0.599287791837),
        (0.883270714205, 0.402507636915),
        (0.762656825648, -0.136974517019),
    ],
    ("Bilateral rho_min=0.05", 2): [
        (0.955390436826, 0.598671532647),
        (0.878350429221, 0.403462086582),
        (0.755210376902, -0.135419384648),
    ],
    ("LE-SAM sigma=0.2", 1): [
        (0.949384615385, 0.580307692308),
        (0.856306480856, 0.409101103588),
        (0.711013297008, -0.130029976561),
    ],
    ("LE-SAM sigma=0.2", 2): [
        (0.949411764706, 0.580588235294),
        (0.856629280717, 0.408279291924),
        (0.711131532849, -0.136590375142),
    ],
    ("Sparse mask=(1, 0)", 1): [
        (0.948759652654, 0.600000000000),
        (0.855066836703, 0.400000000000),
        (0.708579125609, -0.140000000000),
    ],
    ("Sparse mask=(1, 0)", 2): [
        (0.948787321875, 0.600000000000),
        (0.855426853696, 0.400000000000),
        (0.709020452837, -0.140000000000),
    ],
    ("every k=2", 1): [
        (0.948759652654, 0.560308884931),
        (0.857767374777, 0.340463327397),
        (0.713318590342, -0.232944950445),
    ],
    ("every k=2", 2): [
        (0.948787321875, 0.560597149997),
        (0.857817179375, 0.340895724996),
        (0.713103618872, -0.232287913571),
    ],
    ("VaSSO theta=0.4", 1): [
        (0.948759652654, 0.560308884931),
        (0.855047490383, 0.301971306639),
        (0.707958389043, -0.290301468158),
    ],
    ("VaSSO theta=0.4", 2): [
        (0.948045619610, 0.560818422940),
        (0.850479420224, 0.310924387517),
        (0.699015459859, -0.275192697386),
    ],
    ("WSAM coupled gamma=0.8", 1): [
        (0.945038610616, 0.441235539726),
        (0.843258154101, 0.318772799221),
        (0.685200255901, -0.276390661817),
    ],
    ("WSAM coupled gamma=0.8", 2): [
        (0.945149287499, 0.442388599988),
        (0.843957108013, 0.317218321830),
        (0.685092582956, -0.278528755364),
    ],
    ("first weight only", 1): [
        (0.940000000000, 0.600000000000),
        (0.832000000000, 0.400000000000),
        (0.666600000000, -0.140000000000),
    ],
    ("first weight only", 2): [
        (0.945000000000, 0.600000000000),
        (0.851000000000, 0.400000000000),
        (0.696300000000, -0.140000000000),
    ],
    ("WSAM gamma=0.8", 1): [
        (0.945038610616, 0.441235539726),
        (0.847723404546, 0.461660813468),
        (0.701255763178, -0.203950955099),
    ],
    ("WSAM gamma=0.8", 2): [
        (0.945149287499, 0.442388599988),
        (0.848322749263, 0.459068581841),
        (0.701322868234, -0.205585223172),
    ],
    ("Momentum-SAM", 1): [
        (0.950000000000, 0.600000000000),
        (0.861240347346, 0.439691115069),
        (0.725076503948, -0.045469193284),
    ],
    ("Momentum-SAM", 2): [
        (0.950000000000, 0.600000000000),
        (0.861240347346, 0.439691115069),
        (0.725076503948, -0.045469193284),
    ],
    ("late start=2", 1): [
        (0.950000000000, 0.600000000000),
        (0.860000000000, 0.400000000000),
        (0.716329368931, -0.179437848183),
    ],
    ("late start=2", 2): [
        (0.950000000000, 0.600000000000),
        (0.860000000000, 0.400000000000),
        (0.716143479448, -0.179280444558),
    ],
}


# ---- the problem for the optimizer -----------------------------------------------------------------------------------

# How the two weights are stored: the norm is one over all of them in every case.
LAYOUTS = {
    "a vector": [[(2,)]],
    "a column matrix": [[(2, 1)]],
    "two scalars of one group": [[(), ()]],
    "two scalars of two groups": [[()], [()]],
}


def layouts_of(name: str) -> list[str]:
    """Those in which the method's golden row can be had."""
    return [layout for layout in LAYOUTS if name != ONLY_FIRST or "scalars" in layout]


class Problem:
    def __init__(
        self, layout: str, name: str | None = None, maximize: tuple[bool, bool] = (False, False), **options: object
    ):
        groups = [[torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in g] for g in LAYOUTS[layout]]
        self.params = [p for group in groups for p in group]
        told = [{"params": group, "maximize": m} for group, m in zip(groups, maximize, strict=False)]
        base = torch.optim.SGD(told, lr=LR, momentum=MOMENTUM)
        self.sign = torch.tensor([-1.0 if m else 1.0 for m in maximize], dtype=torch.float64)
        if name is not None:
            options["rho"], options["method"] = METHODS[name]
        if name == ONLY_FIRST:
            options["method"] = methods.SAM(only=self.params[:1])
        self.opt = MicroBatchSAM(base, **options)
        if self.opt.method.full.sparse:
            bits = iter(MASK)
            self.opt.mask = [torch.tensor([next(bits) for _ in range(p.numel())]).view(p.shape) for p in self.params]

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        w = torch.cat([p.reshape(-1) for p in self.params])
        return 0.5 * (self.sign * torch.tensor(CURVATURE, dtype=w.dtype) * (w - x) ** 2).sum(1).mean()


def _closure(problem: Problem, x: torch.Tensor):
    def closure():
        loss = problem.loss(x)
        loss.backward()
        return loss

    return closure


def step_with_passes(problem: Problem, x: torch.Tensor, micro_batches: int) -> None:
    for part in problem.opt.passes(x):
        problem.loss(part).backward()
    problem.opt.step()
    problem.opt.zero_grad()


def step_with_closures(problem: Problem, x: torch.Tensor, micro_batches: int) -> None:
    problem.opt.step([_closure(problem, part) for part in x.chunk(micro_batches)])


def step_with_train_step(problem: Problem, x: torch.Tensor, micro_batches: int) -> None:
    problem.opt.train_step(problem.loss, x)


WAYS = {"passes": step_with_passes, "step with closures": step_with_closures, "train_step": step_with_train_step}


# ---- the same in plain Python, with the mistakes that are around -----------------------------------------------------


def by_hand(name: str, batches, sizes, mistake: str | None = None) -> list[tuple[float, float]]:
    """The weights after each step, from the definitions alone. ``sizes``: samples per micro-batch."""
    rho, method = METHODS[name]
    w, velocity, ema, look = [1.0, 1.0], None, None, [0.0, 0.0]
    momentum = isinstance(method, methods.MomentumSAM)
    trajectory = []
    period = method.k if isinstance(method, methods.LookSAM) else 1

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def gradient(at, x):
        return [h * (a - sum(s[j] for s in x) / len(x)) for j, (h, a) in enumerate(zip(CURVATURE, at, strict=True))]

    def averaged(old, new):
        decay = 1 - method.theta if isinstance(method, methods.VaSSO) else method.lmbda
        return [decay * m + (1 - decay) * d for m, d in zip(old, new, strict=True)]

    for batch in batches:
        mean, gap = [0.0, 0.0], [0.0, 0.0]
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        parts = [batch[a:b] for a, b in pairwise(bounds)]
        if mistake == "the tail of an uneven batch is dropped":
            parts = [part for part in parts if len(part) == sizes[0]]
        looks = len(trajectory) % period == 0
        look = [0.0, 0.0] if looks else look
        for part in parts:
            g = gradient(w, part)
            direction, stretch = g, [1.0, 1.0]
            if momentum:
                direction = [-v for v in velocity] if velocity else [0.0, 0.0]
                if mistake == "the momentum is followed backwards":
                    direction = [-d for d in direction]
            if name == ONLY_FIRST:
                stretch = [1.0, 0.0]
            if isinstance(method, methods.AdaptiveSAM):
                stretch = [abs(a) + method.eta for a in w]
                if mistake == "the stretch is applied once":
                    direction = [t * d for t, d in zip(stretch, direction, strict=True)]
                    stretch = [1.0, 1.0]
            if isinstance(method, methods.FriendlySAM):
                following = g
                if ema is not None:
                    following = averaged(ema, g)
                    used = following if mistake == "the ema is updated before it is subtracted" else ema
                    direction = [d - method.sigma * m for d, m in zip(g, used, strict=True)]
                    if mistake == "the residual feeds the ema":
                        following = averaged(ema, direction)
                ema = following
            if isinstance(method, methods.VaSSO):
                old, ema = ema, g if ema is None else averaged(ema, g)
                direction = ema
                if mistake == "the mean of before is followed":
                    direction = old or g
            since = len(trajectory) - method.start
            radius = rho if since >= 0 and since % method.every == 0 and looks else 0.0
            radius = radius / len(parts) if mistake == "rho is divided by the micro-batches" else radius
            norm = math.hypot(*(t * d for t, d in zip(stretch, direction, strict=True)))
            if mistake == "the norm is over all":
                norm = math.hypot(*g)
            if isinstance(method, methods.LossEquatedSAM):
                length = math.hypot(*g) ** 2 if mistake == "the budget is divided by the norm's square" else norm
                radius = min(method.sigma / (length + 1e-12), radius)
            e = [radius * t * t * d / (norm + 1e-12) for t, d in zip(stretch, direction, strict=True)]
            if isinstance(method, methods.SparseSAM):
                e = [b if bit else 0.0 for b, bit in zip(e, MASK, strict=True)]
            at = [a + b for a, b in zip(w, e, strict=True)]
            descent = gradient(at, part)
            if isinstance(method, methods.BilateralSAM):
                behind = gradient([a - method.rho_min / rho * b for a, b in zip(w, e, strict=True)], part)
                factor = math.hypot(*descent) / (math.hypot(*behind) + 1e-12)
                descent = [plus + a - factor * minus for plus, a, minus in zip(descent, g, behind, strict=True)]
            if isinstance(method, methods.StableSAM):
                factor = math.hypot(*g) / (math.hypot(*descent) + 1e-12)
                descent = [factor * d for d in descent]
            if isinstance(method, methods.GapSAM):
                along = sum(a * b for a, b in zip(g, descent, strict=True)) / sum(d * d for d in descent)
                descent = [d - method.alpha * (a - along * d) for a, d in zip(g, descent, strict=True)]
            share = len(part) / len(batch)
            if isinstance(method, methods.WSAM):
                a = method.gamma / (1 - method.gamma)
                if mistake == "gamma itself weighs":
                    a = method.gamma
                if method.decoupled:
                    gap = [m + share * a * (d - b) for m, d, b in zip(gap, descent, g, strict=True)]
                    descent = g
                else:
                    descent = [a * d + (1 - a) * b for d, b in zip(descent, g, strict=True)]
            if mistake == "micro-batches weigh the same":
                share = 1 / len(parts)
            if mistake == "gradients are summed":
                share = 1.0
            mean = [m + share * d for m, d in zip(mean, descent, strict=True)]
            if looks:
                along = dot(g, descent) / (dot(g, g) + 1e-12)
                look = [v + share * (d - along * a) for v, d, a in zip(look, descent, g, strict=True)]
        if not looks:
            factor = method.alpha * math.hypot(*mean) / (math.hypot(*look) + 1e-12)
            mean = [m + factor * v for m, v in zip(mean, look, strict=True)]
        velocity = mean if velocity is None else [MOMENTUM * v + m for v, m in zip(velocity, mean, strict=True)]
        w = [a - LR * v - LR * b for a, v, b in zip(w, velocity, gap, strict=True)]
        trajectory.append(tuple(w))
    return trajectory


# ---- tests -----------------------------------------------------------------------------------------------------------

each_row = pytest.mark.parametrize(
    ("name", "micro_batches"), GOLDEN, ids=lambda v: v if isinstance(v, str) else f"{v} micro-batches"
)


@each_row
def test_the_computation_by_hand_meets_the_golden_table(name, micro_batches):
    sizes = [2 // micro_batches] * micro_batches
    actual = torch.tensor(by_hand(name, BATCHES, sizes), dtype=torch.float64)
    torch.testing.assert_close(actual, torch.tensor(GOLDEN[name, micro_batches], dtype=torch.float64), **TOLERANCE)


@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "left in place"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "micro_batches", "layout"),
    [(*row, layout) for row in GOLDEN for layout in layouts_of(row[0])],
    ids=lambda v: v if isinstance(v, str) else f"{v} micro-batches",
)
def test_the_optimizer_follows_the_golden_trajectory(name, micro_batches, way, flatten, layout, backend):
    problem = Problem(layout, name, num_micro_batches=micro_batches, flatten=flatten, backend=backend)
    for batch, golden in zip(BATCHES, GOLDEN[name, micro_batches], strict=True):
        WAYS[way](problem, torch.tensor(batch, dtype=torch.float64), micro_batches)
        torch.testing.assert_close(problem.weights, torch.tensor(golden, dtype=torch.float64), **TOLERANCE)


@pytest.mark.parametrize("maximize", [(True, True), (False, True)], ids=["everything", "one group"])
@pytest.mark.parametrize("way", WAYS)
@each_row
def test_to_maximize_the_negative_is_to_minimize(name, micro_batches, way, maximize, backend):
    problem = Problem("two scalars of two groups", name, maximize, num_micro_batches=micro_batches, backend=backend)
    for batch, golden in zip(BATCHES, GOLDEN[name, micro_batches], strict=True):
        WAYS[way](problem, torch.tensor(batch, dtype=torch.float64), micro_batches)
        torch.testing.assert_close(problem.weights, torch.tensor(golden, dtype=torch.float64), **TOLERANCE)


@pytest.mark.parametrize("two_calls", [True, False], ids=["first_step and second_step", "step with a closure"])
@pytest.mark.parametrize(("name", "adaptive"), [("SAM", False), ("ASAM eta=0", True)])
def test_the_drop_in_follows_the_golden_trajectory(name, adaptive, two_calls):
    problem = Problem("two scalars of one group")
    opt = problem.opt = msam_kernels.SAM(
        problem.params, torch.optim.SGD, rho=RHO, adaptive=adaptive, lr=LR, momentum=MOMENTUM
    )
    for batch, golden in zip(BATCHES, GOLDEN[name, 1], strict=True):
        closure = _closure(problem, torch.tensor(batch, dtype=torch.float64))
        closure()
        if two_calls:
            opt.first_step(zero_grad=True)
            closure()
            opt.second_step(zero_grad=True)
        else:
            opt.step(closure)
            opt.zero_grad()
        torch.testing.assert_close(problem.weights, torch.tensor(golden, dtype=torch.float64), **TOLERANCE)


UNEVEN = [
    [(0.0, 0.0), (1.0, 0.0), (2.5, -1.0)],
    [(0.0, 1.0), (1.0, 1.0), (-1.5, 0.5)],
    [(0.5, 0.0), (0.0, -1.0), (3.0, 2.0)],
]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"num_micro_batches": 2}, [2, 1]),
        ({"micro_batch_size": 2}, [2, 1]),
        ({"num_micro_batches": 3}, [1, 1, 1]),
        ({"micro_batch_size": 5}, [3]),
        ({}, [3]),
    ],
    ids=lambda v: " ".join(f"{k}={n}" for k, n in v.items()) or "default" if isinstance(v, dict) else f"sizes {v}",
)
@pytest.mark.parametrize("way", ["passes", "train_step"])
@pytest.mark.parametrize("name", METHODS)
def test_an_uneven_batch_is_averaged_by_size(name, way, options, sizes, backend):
    problem = Problem(layouts_of(name)[0], name, backend=backend, **options)
    for batch, expected in zip(UNEVEN, by_hand(name, UNEVEN, sizes), strict=True):
        WAYS[way](problem, torch.tensor(batch, dtype=torch.float64), len(sizes))
        torch.testing.assert_close(problem.weights, torch.tensor(expected, dtype=torch.float64), **TOLERANCE)


# (method, sizes of the micro-batches, mistake, the first step that shows it)
MISTAKES = [
    ("F-SAM sigma=1 lmbda=0.6", [1, 1, 1], "the residual feeds the ema"),
    ("F-SAM sigma=0.5 lmbda=0.9", [1, 1, 1], "the residual feeds the ema"),
    ("F-SAM sigma=0.5 lmbda=0.9", [3], "the ema is updated before it is subtracted"),
    ("ASAM eta=0.01", [3], "the stretch is applied once"),
    ("SAM", [2, 1], "the tail of an uneven batch is dropped"),
    ("SAM", [2, 1], "micro-batches weigh the same"),
    ("SAM", [1, 1, 1], "gradients are summed"),
    ("SAM", [2, 1], "rho is divided by the micro-batches"),
    ("LE-SAM sigma=0.2", [1, 1, 1], "the budget is divided by the norm's square"),
    ("VaSSO theta=0.4", [1, 1, 1], "the mean of before is followed"),
    ("WSAM gamma=0.8", [3], "gamma itself weighs"),
    ("WSAM coupled gamma=0.8", [2, 1], "gamma itself weighs"),
    ("Momentum-SAM", [2, 1], "the momentum is followed backwards"),
    ("first weight only", [3], "the norm is over all"),
]


@pytest.mark.parametrize(
    ("name", "sizes", "mistake"), MISTAKES, ids=lambda v: v if isinstance(v, str) else f"sizes {v}"
)
def test_the_optimizer_does_not_make_this_mistake(name, sizes, mistake, backend):
    problem = Problem(layouts_of(name)[0], name, num_micro_batches=len(sizes), backend=backend)
    for batch in UNEVEN:
        step_with_passes(problem, torch.tensor(batch, dtype=torch.float64), len(sizes))
    right, wrong = (torch.tensor(by_hand(name, UNEVEN, sizes, m)[-1], dtype=torch.float64) for m in (None, mistake))
    assert (right - wrong).abs().max() > 1e-4, "the problem would not show the mistake"
    torch.testing.assert_close(problem.weights, right, **TOLERANCE)


def test_both_gradients_of_a_micro_batch_are_of_the_same_samples(backend):
    # The trajectories cannot tell: with one curvature for all samples, a second gradient on the whole batch gives the
    # same mean.
    problem = Problem("a vector", rho=RHO, num_micro_batches=2, backend=backend)
    seen = []
    for part in problem.opt.passes(torch.arange(10.0, dtype=torch.float64).reshape(5, 2)):
        seen.append(part[:, 0].tolist())
        problem.loss(part).backward()
    assert seen == [[0, 2, 4], [0, 2, 4], [6, 8], [6, 8]]


def test_the_ema_of_friendly_sam_starts_as_the_first_gradient_and_then_averages_raw_gradients(backend):
    method = methods.FriendlySAM(sigma=0.5, lmbda=0.9)
    problem = Problem("a vector", rho=RHO, method=method, num_micro_batches=3, backend=backend)
    w, curvature = problem.weights.clone(), torch.tensor(CURVATURE, dtype=torch.float64)
    batch = torch.tensor(UNEVEN[0], dtype=torch.float64)
    raw = [curvature * (w - x) for x in batch]  # every micro-batch's first gradient is at the step's weights
    step_with_passes(problem, batch, 3)
    expected = 0.9 * (0.9 * raw[0] + 0.1 * raw[1]) + 0.1 * raw[2]
    torch.testing.assert_close(remembered(problem.opt, "ema")[0], expected, **TOLERANCE)


@given(
    name=st.sampled_from(sorted(METHODS)),
    samples=st.integers(1, 9),
    count=st.integers(1, 9),
    by_size=st.booleans(),
    way=st.sampled_from(["passes", "train_step"]),
    seed=st.integers(0, 2**16),
)
def test_any_batch_in_any_split_matches_the_computation_by_hand(name, samples, count, by_size, way, seed, backend):
    if by_size:
        options, sizes = {"micro_batch_size": count}, [min(count, samples - i) for i in range(0, samples, count)]
    else:
        count = min(count, samples)
        options, sizes = {"num_micro_batches": count}, [len(p) for p in torch.arange(samples).tensor_split(count)]
    problem = Problem("two scalars of two groups", name, backend=backend, **options)
    x = torch.randn(2, samples, 2, dtype=torch.float64, generator=random_numbers(seed))
    for batch, expected in zip(x, by_hand(name, x.tolist(), sizes), strict=True):
        WAYS[way](problem, batch, len(sizes))
        # Where the direction nearly vanishes, rounding decides it; half of the digits is what is left then.
        torch.testing.assert_close(problem.weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
