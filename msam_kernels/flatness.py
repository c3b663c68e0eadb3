# SPDX-License-Identifier: Apache-2.0
"""How flat the loss is where the weights are: its rise along the ascent step, by rho too, its curvature, and a slice of it.

    loss_fn = lambda x, y: F.cross_entropy(model(x), y)
    flatness.sharpness(model, loss_fn, (x, y), rho=0.05)
    flatness.hessian_eigenvalues(model, loss_fn, (x, y), k=3)
    flatness.loss_slice(model, loss_fn, (x, y), torch.linspace(-0.1, 0.1, 21))
    print(flatness.rho_sweep(model, loss_fn, [(x, y)], num_micro_batches=4))

What all share:

* ``data``: a batch as in ``MicroBatchSAM.train_step``: tensors, or dicts, tuples and lists of them, that share dim 0. A
  tuple or list at the top holds the arguments of ``loss_fn``, anything else is the only one. ``loss_fn(*micro_batch)``
  returns the mean loss of its micro-batch, computed with ``model``. Beside vectors of the size of the parameters, memory
  is that of one micro-batch.
* The mode of ``model`` is the caller's choice: in training BatchNorm normalises by the micro-batch, and dropout drops.
* All evaluations of a micro-batch start from the same buffers and the same random numbers, so they draw the same dropout
  masks, and differences between them are not noise.
* Nothing is mutated. When the call returns, or raises, wherever that is, weights, ``p.grad``, buffers (BatchNorm's
  statistics among them), training modes and torch's random state, of the CPU and of the devices in use, are bit for bit
  what they were.
* Frozen, tied and unused parameters are fine. The "parameters" below are ``model.parameters()`` with ``requires_grad``.
  Gradients are taken by ``torch.autograd.grad``, which DistributedDataParallel does not see: give ``model.module``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD

from . import methods as _methods
from ._checks import check_integer, check_number
from ._torch import buffers_of, forget_casts, parameters_of
from .batches import Split, leaves_of, mean, rebuilt, renewal, split
from .buffers import Buffers
from .flat import check_parameters
from .gradients import Optionals
from .optimizer import MicroBatchSAM

__all__ = ["RhoSweep", "hessian_eigenvalues", "loss_slice", "rho_sweep", "sharpness"]

#: What ``rho_sweep`` tries.
RHOS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
#: The rise, as a share of the loss, from which and up to which a rho is worth trying.
LEAST, MOST = 0.01, 1.0


def sharpness(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Any,
    rho: float,
    num_micro_batches: int | None = None,
    method: _methods.SAM | None = None,
    *,
    micro_batch_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The largest rise of the loss that the method's own ascent step finds within rho; with micro-batches, m-sharpness.

    .. math::
        \sum_{i=1}^{m} \frac{n_i}{n} \left[ L_i(w + e_i) - L_i(w) \right], \qquad
        e_i = \rho\, d_i / (\lVert d_i \rVert_2 + 10^{-12})

    Sharpness is the maximum of L(w + e) − L(w) over ‖e‖ <= rho, and m-sharpness the mean of that over the m micro-batches (in
    the papers m is their size), each with an e of its own. This is both at the e of one ascent step, made by
    ``MicroBatchSAM`` with its kernels and its rounding to the stored dtype: what training with these settings sees, and a
    lower bound of the maximum. It can be negative where rho is beyond the range of the gradient.

    F-SAM's mean gradient begins with the first micro-batch, whose d is its gradient. Sparse SAM's mask is chosen by the
    first micro-batch. A method's late start is left out.

    Args:
        model, loss_fn, data: see the module.
        rho: radius of the perturbation, in units of the weights; >= 0.
        num_micro_batches: parts into which the batch is split. Default 1.
        method: how the perturbation is made, see ``msam_kernels.methods``. Default ``methods.SAM()``.
        micro_batch_size: instead of ``num_micro_batches``, the samples per part; the last may be smaller.
        backend: as in ``MicroBatchSAM``.

    Returns:
        0-d float64, in units of the loss, on the loss's device. NaN where a gradient is not finite.

    Raises:
        ValueError, TypeError, RuntimeError: arguments, parameters or a loss that cannot be served; the message names them.

    Sources: sharpness and its ascent step 2010.01412; m-sharpness 2010.01412 and 2212.04343.
    """
    split = Split(num_micro_batches, micro_batch_size)
    with _evaluations(model, loss_fn, [data], split, rho=rho, method=method, backend=backend) as evaluations:
        opt, rises = evaluations.opt, []
        for i in range(len(evaluations.parts)):
            with opt.passes() as passes:  # given up half-way: the weights are back, nothing is learned
                next(passes)
                at_w, grads = evaluations.gradients(i)
                _perturb(passes, evaluations.params, grads, opt)
                rises.append(evaluations.rise(i, at_w))
        total: Tensor = mean(rises, evaluations.shares)
        return total


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Any,
    k: int = 1,
    *,
    num_micro_batches: int | None = None,
    micro_batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float = 1e-4,
    max_iterations: int | None = None,
    eigenvectors: bool = False,
    seed: int = 0,
) -> Any:
    r"""The k largest eigenvalues of the Hessian of the mean loss, by Lanczos on Hessian-vector products.

    .. math:: H = \sum_i \frac{n_i}{n} \nabla^2 L_i(w)

    "Largest" is by sign: curvature upwards. Lanczos with full reorthogonalisation starts from a block of k random vectors,
    so that an eigenvalue is found as often as it occurs. Each product is a backward pass through a gradient; with one
    micro-batch the graph is made once and kept, with several it is made anew for each product, so that no more than one
    micro-batch's is in memory. Beside it there is one vector of the size of the parameters for each product so far.
    Attention runs on torch's "math" path here: the fused ones have no second derivative.

    Args:
        model, loss_fn, data: see the module.
        k: how many, 1 to the number of (scalar) parameters.
        num_micro_batches: parts into which the batch is split. Default 1.
        micro_batch_size: instead of ``num_micro_batches``, the samples per part; the last may be smaller.
        dtype: ``torch.float64`` or ``torch.float32``: compute on a copy in that dtype, which the modules of ``model`` hold in
            place of their parameters and buffers while this runs; floating tensors of ``data`` are converted. What else
            ``loss_fn`` brings, e.g. class weights, must fit. Default: the model's own; for 16-bit weights choose one.
        tolerance: stop when ‖H·v − λ·v‖ of all k, with unit vectors v, is at most that share of the largest absolute
            eigenvalue. That bounds the error of λ, which is commonly about the square of it.
        max_iterations: products at most, >= k; a warning tells when they did not suffice. Default 50 + 50·k.
        eigenvectors: also return the eigenvectors.
        seed: of the start vectors, which are drawn on the CPU and so the same on every device.

    Returns:
        float64 ``[k]`` on the CPU, largest first, in units of the loss per squared unit of the weights; all NaN where the
        gradient or a product is not finite. With ``eigenvectors`` a pair of it and k unit vectors, each a list of tensors
        like the parameters, such as ``loss_slice`` takes as direction.

    Raises:
        ValueError, TypeError, RuntimeError: arguments, parameters or a loss that cannot be served; the message names them.

    Source: Lanczos, J. Res. Natl. Bur. Stand. 45 (1950); H·v by two backward passes: Pearlmutter, Neural Comput. 6 (1994).
    """
    check_integer("k", k, 1)
    if max_iterations is None:
        max_iterations = 50 + 50 * k
    check_integer("max_iterations", max_iterations, k)
    check_integer("seed", seed, 0)
    check_number("tolerance", tolerance, 0, above=True)
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float64, torch.float32 or None for the model's own, got {dtype!r}")
    split = Split(num_micro_batches, micro_batch_size)
    with _evaluations(model, loss_fn, [data], split, dtype=dtype) as evaluations:
        params = evaluations.params
        n = sum(p.numel() for p in params)
        if k > n:
            raise ValueError(f"k must be at most the {n} parameters that require gradients, got {k}")
        precision = torch.float32
        for p in params:
            precision = torch.promote_types(precision, p.dtype)

        def random_vector() -> Tensor:
            return torch.randn(n, generator=generator, dtype=precision, device="cpu").to(params[0].device)

        generator = torch.Generator("cpu").manual_seed(seed)
        with sdpa_kernel(SDPBackend.MATH):
            values, vectors, residual = _lanczos(
                evaluations.hessian_times, random_vector, n, k, tolerance, max_iterations, want_vectors=eigenvectors
            )
        if residual > tolerance:
            warnings.warn(
                f"after {max_iterations} Hessian-vector products ‖H·v − λ·v‖ is {residual:.1e} of the largest eigenvalue: "
                f"give a larger max_iterations, or be content with a tolerance above {tolerance:g}",
                stacklevel=2,
            )
        return (values, [evaluations.like_parameters(v) for v in vectors]) if eigenvectors else values


def loss_slice(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Any,
    points: Sequence[float] | Tensor,
    direction: str | Sequence[Tensor] = "ascent",
    *,
    num_micro_batches: int | None = None,
    micro_batch_size: int | None = None,
    method: _methods.SAM | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The mean loss along a line through the weights, L(w + t·u) at given t.

    Args:
        model, loss_fn, data: see the module.
        points: the values of t, for example ``torch.linspace(-0.1, 0.1, 21)``.
        direction: "ascent": u is the method's e at rho = 1, made from the gradient of the whole batch, so that t is in units
            of rho and w + t·u is where the method looks with rho = t, unless e has a bound of its own, as LE-SAM's. "random": a
            Gaussian vector of unit norm. Or one tensor for each parameter, in the order and the shapes of the parameters, taken
            as they are.
        num_micro_batches: parts into which the batch is split, to save memory. Default 1.
        micro_batch_size: instead of ``num_micro_batches``, the samples per part; the last may be smaller.
        method: whose ascent, see ``msam_kernels.methods``. Default ``methods.SAM()``.
        seed: of the random direction, which is drawn on the CPU and so the same on every device.
        backend: as in ``MicroBatchSAM``.

    Returns:
        (t, losses): float64 ``[len(points)]`` each, on the CPU. Weights are w + t·u in float64, rounded to the stored dtype.

    Raises:
        ValueError, TypeError, RuntimeError: arguments, parameters or a loss that cannot be served; the message names them.

    Source: the direction is 2010.01412's; random slices as in 1712.09913, without its normalisation by filter.
    """
    t = torch.as_tensor(points, dtype=torch.float64, device="cpu").detach().clone()
    if t.dim() != 1 or t.numel() == 0 or not t.isfinite().all():
        raise ValueError(f"points must be a list or 1-d tensor of finite numbers, at least one, got {points!r}")
    if isinstance(direction, str) and direction not in ("ascent", "random"):
        raise ValueError(f"direction must be 'ascent', 'random' or one tensor per parameter, got {direction!r}")
    check_integer("seed", seed, 0)
    split = Split(num_micro_batches, micro_batch_size)
    with _evaluations(model, loss_fn, [data], split, method=method, backend=backend) as evaluations:
        params = evaluations.params
        if not isinstance(direction, str):
            u = _checked_direction(direction, params)
        elif direction == "ascent":
            u = _ascent(evaluations, backend)
        else:
            generator = torch.Generator("cpu").manual_seed(seed)
            v = torch.randn(sum(p.numel() for p in params), generator=generator, dtype=torch.float64, device="cpu")
            u = evaluations.like_parameters(v / v.norm(), torch.float64)
        with torch.no_grad():
            saved = [p.clone() for p in params]
            try:
                losses = []
                for step in t.tolist():
                    for p, w, v in zip(params, saved, u, strict=True):
                        p.copy_(w + step * v)
                    losses.append(evaluations.mean_loss())
            finally:
                for p, w in zip(params, saved, strict=True):
                    p.copy_(w)
        return t, torch.stack(losses).cpu()


def rho_sweep(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    rhos: Sequence[float] | Tensor = RHOS,
    num_micro_batches: int | None = None,
    method: _methods.SAM | None = None,
    *,
    micro_batch_size: int | None = None,
    backend: str = "auto",
) -> RhoSweep:
    r"""How far each rho raises the loss, and how much of the perturbation arrives in the weights; print it, or draw it.

    .. math::
        L_i(w + a_i) - L_i(w), \qquad
        \frac{\lVert a_i \rVert}{\lVert e_i \rVert}, \qquad
        \frac{\langle a_i, e_i \rangle}{\lVert e_i \rVert^2}, \qquad
        \frac{\#\{a_i \ne 0\}}{\#\{e_i \ne 0\}}

    for every micro-batch i. e is the method's perturbation of that radius, computed in float64, and a what of it is in the
    weights of ``model`` after rounding to their dtype: in 16 bits a change that is less than half the distance to a weight's
    neighbour is lost. The perturbation is made by ``MicroBatchSAM`` with its kernels, as in training.

    F-SAM's mean gradient begins with the first micro-batch and goes on through all batches, as in training at weights that
    stand still. Sparse SAM's mask is chosen by the first micro-batch. A method's late start is left out. Each micro-batch
    takes one forward and one backward pass, and one more forward for each rho. Beside a micro-batch, memory is that of its
    gradient, the saved weights, three vectors of float64, and what the method remembers, twice.

    Args:
        model, loss_fn: see the module.
        batches: a few batches of the training, each as ``data`` of the module, e.g. ``itertools.islice(loader, 4)`` or
            ``[(x, y)]``. They count alike.
        rhos: the radii to try, each > 0. Default ``flatness.RHOS``, from 0.001 to 2.
        num_micro_batches: parts into which each batch is split, as in training. Default 1.
        method: how the perturbation is made, see ``msam_kernels.methods``. Default ``methods.SAM()``.
        micro_batch_size: instead of ``num_micro_batches``, the samples per part; the last may be smaller.
        backend: as in ``MicroBatchSAM``.

    Returns:
        ``RhoSweep``, by increasing rho.

    Raises:
        ValueError, TypeError, RuntimeError: arguments, parameters or a loss that cannot be served; the message names them.

    Sources: the rise is 2010.01412's sharpness at one ascent step, with micro-batches m-sharpness.
    """
    values = torch.as_tensor(rhos, dtype=torch.float64, device="cpu").detach().sort().values
    if values.dim() != 1 or values.numel() == 0 or not (values.isfinite() & (values > 0)).all():
        raise ValueError(f"rhos must be a list or 1-d tensor of finite numbers > 0, at least one, got {rhos!r}")
    several = _checked_batches(batches)
    split = Split(num_micro_batches, micro_batch_size)
    with _evaluations(model, loss_fn, several, split, method=method, backend=backend) as evaluations:
        params = evaluations.params
        exact: list[Tensor] = [nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in params]
        opts = [
            evaluations.opt,  # never stepped, and restored by the context
            evaluations.opt_of(exact, backend=backend),
        ]
        columns = []
        for i in range(len(evaluations.parts)):
            at_w, grads = evaluations.gradients(i)
            w = [p.detach().clone() for p in params]
            column = []
            for r, rho in enumerate(values.tolist()):
                last = r + 1 == len(values)  # a micro-batch moves what the method remembers once
                recalls = [] if last else [opt.engine.store.recall() for opt in opts]
                for opt in opts:
                    opt.param_groups[0]["rho"] = rho
                with opts[0].passes() as passes, opts[1].passes() as exact_passes:
                    next(passes), next(exact_passes)
                    _perturb(passes, params, grads, opts[0])
                    _perturb(exact_passes, exact, [None if g is None else g.double() for g in grads], opts[1])
                    arrival = _arrival(params, exact, w)
                    column.append(torch.cat([evaluations.rise(i, at_w).cpu()[None], arrival]))
                for recall in recalls:
                    recall()
            columns.append((at_w.double().cpu(), torch.stack(column, 1)))
    losses, measured = zip(*columns, strict=True)
    shares = torch.tensor(evaluations.shares, dtype=torch.float64, device="cpu")
    return RhoSweep(values, torch.stack(losses), shares, *torch.stack(measured, 2))


@torch.no_grad()
def _arrival(params: Sequence[Tensor], exact: Sequence[Tensor], w: Sequence[Tensor]) -> Tensor:
    """‖a‖/‖e‖, ⟨a, e⟩/‖e‖² and the share of the entries that moved: a is params − w, e is exact − w."""
    sums = torch.zeros(5, dtype=torch.float64, device="cpu")
    for p, q, before in zip(params, exact, w, strict=True):
        before = before.double()
        a, e = p.double() - before, q - before
        moved = (a != 0).logical_and_(e != 0).sum()
        sums += torch.stack([a.square().sum(), e.square().sum(), (a * e).sum(), moved, (e != 0).sum()]).cpu()
    a_sq, e_sq, dot, moved, total = sums
    return torch.stack([(a_sq / e_sq).sqrt(), dot / e_sq, moved / total])


def _checked_batches(batches: Any) -> list[Any]:
    """Several batches, and not one that stands for them.

    Raises:
        TypeError, ValueError: that is not so, or there is none.
    """
    if isinstance(batches, Iterable) and not isinstance(batches, (Tensor, tuple, Mapping, str)):
        several = list(batches)
        if not several:
            raise ValueError("batches is empty: give at least one, e.g. [(x, y)] or itertools.islice(loader, 4)")
        if not (isinstance(batches, list) and len(batches) > 1 and all(isinstance(t, Tensor) for t in batches)):
            return several
        got = "a list of tensors, as a loader gives for one batch: several of a tensor each are [(x1,), (x2,)]"
    else:
        got = f"a {type(batches).__name__}"
    raise TypeError(f"batches must be several batches, e.g. [(x, y)] or itertools.islice(loader, 4), got {got}")


@dataclass(frozen=True, eq=False)
class RhoSweep:
    """What ``rho_sweep`` measured. Tensors are float64 on the CPU; ``print`` shows a table, ``draw`` a picture.

    Attributes:
        rhos: ``[R]``, increasing.
        losses: ``[M]``, at w, by micro-batch.
        shares: ``[M]``, what each micro-batch counts; they add up to 1.
        rises: ``[R, M]``, of the loss from w to w + e; NaN where a gradient is not finite.
        arrived: ``[R, M]``, the length of what is in the weights, as a share of that of e; for SAM ‖e‖ is rho.
        along: ``[R, M]``, its projection on e, as such a share: what is left is 1 − along; roundings that add length in
            other directions do not count. In float32 it is 1 but where rho is tiny beside the weights.
        moved: ``[R, M]``, the share of the entries of e, other than 0, that changed a weight.
    """

    rhos: Tensor
    losses: Tensor
    shares: Tensor
    rises: Tensor
    arrived: Tensor
    along: Tensor
    moved: Tensor

    @property
    def loss(self) -> float:
        """The mean loss at w."""
        return float(self.losses @ self.shares)

    @property
    def rise(self) -> Tensor:
        """``[R]``, the mean rise: m-sharpness, see ``sharpness``."""
        return self.rises @ self.shares

    @property
    def spread(self) -> Tensor:
        """``[R]``, the standard deviation of the rise over the micro-batches."""
        return ((self.rises - self.rise[:, None]).square() @ self.shares).sqrt()

    def worth_trying(self, least: float = LEAST, most: float = MOST, along: float = 0.5) -> tuple[float, float] | None:
        """The smallest and the largest rho whose mean rise is between ``least`` and ``most`` of the loss at w.

        And of whose perturbation at least the share ``along`` arrives. None where there is none, and for a loss that is not
        positive. That is a rule of thumb and says where to search, not what is best: docs/choosing.md shows what it was tried
        on.
        """
        chosen = self.rhos[self._is_worth_trying(least, most, along)]
        return (chosen.min().item(), chosen.max().item()) if chosen.numel() else None

    def _is_worth_trying(self, least: float = LEAST, most: float = MOST, along: float = 0.5) -> Tensor:
        share = self.rise / self.loss
        return (share >= least) & (share <= most) & (self.along @ self.shares >= along)

    def __str__(self) -> str:
        head = ("rho", "rise", "±", "rise / loss", "arrived", "along", "moved", "")
        arrival = [x @ self.shares for x in (self.arrived, self.along, self.moved)]
        rows = [
            (f"{rho:g}", f"{rise:.3g}", f"{spread:.2g}", f"{rise / self.loss:.2%}", *(f"{x:.3f}" for x in shares), mark)
            for rho, rise, spread, *shares, mark in zip(
                *(t.tolist() for t in (self.rhos, self.rise, self.spread, *arrival)),
                ["worth trying" if worth else "" for worth in self._is_worth_trying().tolist()],
                strict=True,
            )
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        ]
        return "\n".join(
            [f"loss {self.loss:.4g}, {len(self.losses)} micro-batches", lines[0], "─" * sum(widths), *lines[1:]]
        )

    def draw(self, rises: Any, arrival: Any) -> None:
        """Draw the rise and the arrival by rho on two axes of matplotlib; what is worth trying is shaded.

        For example ``fig, axes = plt.subplots(1, 2); sweep.draw(*axes)``.
        """
        rhos, rise, spread = (t.tolist() for t in (self.rhos, self.rise / self.loss, self.spread / self.loss))
        rises.errorbar(rhos, rise, yerr=spread, fmt="o-", markersize=4, capsize=3)
        rises.set_yscale("symlog", linthresh=LEAST)
        rises.set_ylabel("rise / loss")
        for name in ("arrived", "along", "moved"):
            arrival.plot(rhos, (getattr(self, name) @ self.shares).tolist(), "o-", markersize=4, label=name)
        arrival.set_ylim(bottom=0)
        arrival.set_ylabel("of the perturbation, in the weights")
        arrival.legend(frameon=False)
        found = self.worth_trying()
        for panel in (rises, arrival):
            panel.set_xscale("log")
            panel.set_xlabel("rho")
            panel.grid(linewidth=0.5, alpha=0.5)
            if found:
                panel.axvspan(*found, alpha=0.15, linewidth=0)


# -- evaluating --------------------------------------------------------------------------------------------------------


class _Evaluations:
    """``loss_fn`` on each micro-batch, as often as needed, every time from the same buffers and random numbers."""

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        batches: list[tuple[Any, ...]],
        params: list[Tensor],
        opt: MicroBatchSAM,
        rewind: Callable[[], None],
        devices: set[torch.device],
    ):
        self.loss_fn, self.params, self.opt = loss_fn, params, opt
        self.parts: list[Any] = []
        self.shares: list[float] = []  # batches count alike
        self._unpack: list[bool] = []
        for data in batches:
            parts, shares = split(data, opt.split)
            self.parts += parts
            self.shares += [share / len(batches) for share in shares]
            self._unpack += [len(data) > 1] * len(parts)
        self._renewed = [renewal(part) for part in self.parts]
        self._rewind, self._devices = rewind, devices
        self._random: dict[int, _RandomStates] = {}  # by micro-batch: what its first evaluation began with
        self._graph: Optionals | None = None  # of the only micro-batch: gradients that can be differentiated again

    def opt_of(self, copies: list[Tensor], *rho: float, backend: str) -> MicroBatchSAM:
        """An optimizer like ``opt``, of copies of its parameters; not of how it splits a batch."""
        method = self.opt.method
        only = method.full.only
        if only is not None:
            method = replace(method, only=[c for p, c in zip(self.params, copies, strict=True) if p in only])
        return MicroBatchSAM(SGD(copies, lr=0.0), *rho, method=method, flatten=False, backend=backend)

    @torch.enable_grad()  # always: modules may take another path, and round otherwise, without
    def loss(self, i: int) -> Tensor:
        self._rewind()
        if i in self._random:
            _set_random_states(self._random[i])
        else:
            self._random[i] = _random_states(self._devices)
        forget_casts()  # an autocast around the call would go on with casts of the weights at w
        part = self.parts[i]
        if (renewed := self._renewed[i]) is not None:
            part = renewed(part)
        loss = self.loss_fn(*part) if self._unpack[i] else self.loss_fn(part)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
            raise ValueError(
                f"loss_fn must return the mean loss of its micro-batch as a tensor with one number, got {got}: take "
                "the mean"
            )
        return loss.reshape(())

    def gradients(self, i: int, *, create_graph: bool = False) -> tuple[Tensor, Optionals]:
        """The detached loss, and the gradient by parameter, None where a parameter takes no part."""
        loss = self.loss(i)
        grads: Optionals = []
        if loss.requires_grad:
            grads = list(torch.autograd.grad(loss, self.params, create_graph=create_graph, allow_unused=True))
        if all(g is None for g in grads):
            raise ValueError(
                f"loss_fn returned {loss.detach().item():g}, which depends on no parameter of model that requires a "
                "gradient: compute it with this model, without detach(), no_grad() or item()"
            )
        for p, g in zip(self.params, grads, strict=True):
            if g is not None and g.layout != torch.strided:
                raise TypeError(
                    f"a parameter of shape {tuple(p.shape)} has a gradient of layout {g.layout}: flatness needs dense "
                    "gradients, e.g. nn.Embedding(..., sparse=False)"
                )
        return loss.detach(), grads

    def rise(self, i: int, at_w: Tensor) -> Tensor:
        """Of the loss of micro-batch i, from w to the perturbed weights; NaN where its gradient was not finite."""
        rise = self.loss(i).detach().double() - at_w.double()
        return rise.masked_fill(self.opt.stats.nonfinite[0].to(rise.device), math.nan)

    def mean_loss(self) -> Tensor:
        loss: Tensor = mean([self.loss(i).detach().double() for i in range(len(self.parts))], self.shares)
        return loss

    def hessian_times(self, v: Tensor) -> Tensor:
        """H·v, flat, in the dtype and on the device of ``v``."""
        out, one = torch.zeros_like(v), len(self.parts) == 1
        parts = self.like_parameters(v)
        for i, share in enumerate(self.shares):
            grads = self._graph or self.gradients(i, create_graph=True)[1]
            if one:
                self._graph = grads
            pairs = [(g, part) for g, part in zip(grads, parts, strict=True) if g is not None and g.requires_grad]
            if not pairs:  # linear in all parameters
                continue
            outputs, vectors = zip(*pairs, strict=True)
            products = torch.autograd.grad(outputs, self.params, vectors, retain_graph=one, materialize_grads=True)
            out.add_(torch.cat([h.reshape(-1).to(v) for h in products]), alpha=share)
        return out

    def like_parameters(self, v: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """A flat vector cut into tensors with the shapes and devices of the parameters, and their dtype unless given."""
        parts = v.split([p.numel() for p in self.params])
        return [part.view(p.shape).to(p.device, dtype or p.dtype) for part, p in zip(parts, self.params, strict=True)]


@contextmanager
def _evaluations(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Sequence[Any],
    split: Split,
    *,
    rho: float = 1.0,
    method: _methods.SAM | None = None,
    backend: str = "reference",
    dtype: torch.dtype | None = None,
) -> Iterator[_Evaluations]:
    """Look at all arguments, then let evaluate; whatever that does to the model is undone at the end."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of a micro-batch that returns its mean loss, got {loss_fn!r}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("gradients are needed, and torch.inference_mode() is on: leave it first")
    lazy = [name for name, t in chain(model.named_parameters(), model.named_buffers()) if nn.parameter.is_lazy(t)]
    if lazy:
        raise ValueError(f"{lazy[0]} has no shape yet: run the model once on an example")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient: model.requires_grad_(True)"
        )
    check_parameters(named)
    if callable(rho):
        raise TypeError(f"rho is measured at one radius, got the function {rho!r}: give a number")
    arguments = [tuple(data) if isinstance(data, (tuple, list)) else (data,) for data in batches]
    if not all(arguments):
        raise ValueError("data is empty: give the arguments of loss_fn, e.g. (x, y)")
    if isinstance(method, _methods.SAM):
        method = replace(method, start=0)  # what it does once it has begun
        if method.full.momentum:
            raise ValueError(
                f"{method} perturbs along a training's momentum, of which nothing is known here: give another"
            )
        if callable(method.full.budget):
            raise TypeError(f"sigma is measured at one value, got the function {method.full.budget!r}: give a number")
        sparse = method.full.sparse
        if sparse is not None and sparse.update_every is None:
            raise ValueError(f"{sparse} chooses no mask by itself, and no other is known here: give it update_every")
    tensors = [t for t in chain(model.parameters(), model.buffers(), leaves_of(arguments)) if isinstance(t, Tensor)]
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    with _converted(model, dtype), _undisturbed(model, devices) as rewind:
        if dtype is not None:
            arguments = rebuilt(
                arguments, lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
            )
        params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        # Never stepped: it splits the batch, looks at the arguments as always, and makes the perturbation.
        opt = MicroBatchSAM(
            SGD(params, lr=0.0),
            rho,
            num_micro_batches=split.parts,
            micro_batch_size=split.size,
            method=method,
            flatten=False,
            backend=backend,
        )
        try:
            yield _Evaluations(loss_fn, arguments, params, opt, rewind, devices)
        finally:
            opt.restore()  # nothing to do, unless the restore of a passes() loop was itself interrupted


@contextmanager
def _undisturbed(model: nn.Module, devices: set[torch.device]) -> Iterator[Callable[[], None]]:
    """Afterwards the model and the random numbers are bit for bit what they were. Yields what resets the buffers."""
    params, modules = list(model.parameters()), list(model.modules())
    grads = [p.grad for p in params]
    training = [module.training for module in modules]
    buffers = Buffers(model)
    buffers.freeze()
    # Kernels want memory without gaps; only where there are some, e.g. in a column of a matrix, a copy is used.
    spread = [
        (p, p.data)
        for p in params
        if p.requires_grad and torch.empty_like(p.data, device="meta").stride() != p.stride()
    ]
    random = _random_states(devices)
    try:
        for p in params:
            p.grad = None
        for p, memory in spread:
            p.data = memory.clone()
        yield buffers.rewind
    finally:
        for p, memory in spread:
            p.data = memory
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        _set_random_states(random)
        buffers.thaw()


@contextmanager
def _converted(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the modules hold copies of their parameters and buffers in ``dtype``; tied ones stay tied.

    Buffers that a forward makes meanwhile stay, as after any forward, in the dtype of the model's parameters.
    """
    if dtype is None:
        yield
        return
    copies: dict[int, Tensor] = {}

    def converted(t: Tensor) -> Tensor:
        if id(t) not in copies:
            copy = t.detach().to(dtype, copy=True)
            copies[id(t)] = nn.Parameter(copy, t.requires_grad) if isinstance(t, nn.Parameter) else copy
        return copies[id(t)]

    places = [
        (module, name, t)
        for module in model.modules()
        for table in (parameters_of(module), buffers_of(module))
        for name, t in table.items()
        if t is not None and t.is_floating_point()
    ]
    known = {id(module): set(buffers_of(module)) for module in model.modules()}
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    try:
        for module, name, t in places:
            setattr(module, name, converted(t))  # not the table: recurrent layers keep a list as well
        yield
    finally:
        for module, name, t in places:
            setattr(module, name, t)
        for module in model.modules():
            buffers = buffers_of(module)
            for name in buffers.keys() - known.get(id(module), set()):
                if (new := buffers[name]) is not None and new.dtype == dtype:
                    buffers[name] = new.to(own)


_RandomStates = list[tuple[torch.device | None, Tensor]]  # None is the CPU


def _random_states(devices: set[torch.device]) -> _RandomStates:
    """Of the CPU and of ``devices``."""
    others = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
    return [(None, torch.get_rng_state()), *others]


def _set_random_states(states: _RandomStates) -> None:
    for device, state in states:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


# -- directions --------------------------------------------------------------------------------------------------------


def _perturb(passes: Iterator[Any], params: list[Tensor], grads: Optionals, opt: MicroBatchSAM) -> None:
    """From the first to the second turn of a ``passes`` loop, where the weights are w + e."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    done = object()
    if next(passes, done) is done:
        raise ValueError(
            f"method {opt.method} perturbs nothing in its first step: give one that does, e.g. methods.SAM()"
        )
    opt.engine.keep_mask()  # the loop is going to be given up, and the other micro-batches take the same mask


def _ascent(evaluations: _Evaluations, backend: str) -> list[Tensor]:
    """The method's e at rho = 1, from the gradient of the whole batch. In float64, where w + e − w loses nothing of it."""
    gradient: list[Tensor | None] = [None] * len(evaluations.params)
    for i, share in enumerate(evaluations.shares):
        for j, g in enumerate(evaluations.gradients(i)[1]):
            if g is not None:
                so_far = gradient[j]
                gradient[j] = share * g.double() if so_far is None else so_far.add_(g, alpha=share)
    before = [p.detach().double() for p in evaluations.params]
    copies: list[Tensor] = [nn.Parameter(w.clone()) for w in before]
    opt = evaluations.opt_of(copies, 1.0, backend=backend)
    with opt.passes() as passes:
        next(passes)
        _perturb(passes, copies, gradient, opt)
        return [p.detach() - w for p, w in zip(copies, before, strict=True)]


def _checked_direction(direction: Sequence[Tensor], params: list[Tensor]) -> list[Tensor]:
    u = list(direction)
    if not all(isinstance(v, Tensor) for v in u) or [v.shape for v in u] != [p.shape for p in params]:
        got = [tuple(v.shape) if isinstance(v, Tensor) else v for v in u]
        raise ValueError(
            "direction must be 'ascent', 'random' or one tensor for each parameter that requires a gradient, of shapes "
            f"{[tuple(p.shape) for p in params]}, got {got}"
        )
    return [v.detach().to(p.device, torch.float64) for v, p in zip(u, params, strict=True)]


# -- Lanczos -----------------------------------------------------------------------------------------------------------


def _lanczos(
    times: Callable[[Tensor], Tensor],
    random_vector: Callable[[], Tensor],
    n: int,
    k: int,
    tolerance: float,
    max_iterations: int,
    *,
    want_vectors: bool,
) -> tuple[Tensor, list[Tensor], float]:
    """(k largest eigenvalues, their vectors where wanted, largest residual relative to the largest absolute eigenvalue).

    The basis Q begins with k random vectors and grows by what H makes of each in turn, without what is in Q already:
    H·Q[:j] = Q·T. The leading square of T, banded and for k = 1 tridiagonal, has the eigenvalues; the rows below it tell
    how far their vectors are from being eigenvectors of H. What H maps into Q lets Q grow no further.
    """
    basis: list[Tensor] = []
    for _ in range(k):
        v = random_vector()
        _, length = _orthogonalised(v, basis)
        basis.append(v.div_(length))
    limit, longest = min(max_iterations, n), 0.0
    table = torch.zeros(limit + k, limit, dtype=torch.float64, device="cpu")
    for j in range(limit):
        v = times(basis[j])
        inside, length = _orthogonalised(v, basis)
        if not (inside.isfinite().all() and math.isfinite(length)):
            nan = torch.full((k,), math.nan, dtype=torch.float64, device="cpu")
            return nan, [torch.full_like(v, math.nan) for _ in range(k)] if want_vectors else [], math.nan
        table[: len(basis), j] = inside
        longest = max(longest, math.hypot(inside.norm().item(), length))
        if length > 10 * torch.finfo(v.dtype).eps * longest:  # else it is rounding
            table[len(basis), j] = length
            basis.append(v.div_(length))
        size = j + 1
        if size < k:
            continue
        square = table[:size, :size]
        values, vectors = torch.linalg.eigh((square + square.T) / 2)
        below = table[size : len(basis), :size] @ vectors[:, -k:]
        largest = values.abs().max().item()
        residual = below.norm(dim=0).max().item() / largest if largest > 0 else 0.0
        if residual <= tolerance or size == len(basis):
            break
    ritz = vectors[:, -k:].flip(1).T.to(basis[0]) if want_vectors else []
    return values[-k:].flip(0), [sum(c * q for c, q in zip(row, basis, strict=False)) for row in ritz], residual


def _orthogonalised(v: Tensor, basis: list[Tensor]) -> tuple[Tensor, float]:
    """Take out of ``v``, in place, what lies in ``basis``. Returns that, as float64 on the CPU, and the length left."""
    inside = torch.zeros(len(basis), dtype=torch.float64, device="cpu")
    for _ in range(2):  # once is not enough in floating point
        parts = []
        for q in basis:
            parts.append(q @ v)
            v.addcmul_(q, parts[-1], value=-1)
        if parts:
            inside += torch.stack(parts).cpu()
    return inside, v.norm().item()
