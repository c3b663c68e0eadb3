# SPDX-License-Identifier: Apache-2.0
"""The specification of the operators in plain torch: the same signatures as the kernels, any device, no compiler.

With w the weights, g the gradient at w, ĝ the one at w + e, and all norms global (one L2 norm over every parameter of
every group):

    inner_products   ‖d‖²,   d = g − sigma·ema (F-SAM), d = T_w·d with T_w = |w| + eta (ASAM)
    perturb          w ← w + e,   e = rho·d / (‖d‖ + 1e-12), or rho·T_w²·d / (‖T_w·d‖ + 1e-12)
                     with ``mask`` e is 0 where the bit is 0; with ``origin`` w ← origin + e
                     ema ← lmbda·ema + (1 − lmbda)·g, after its old value was used
                     with ``acc`` ‖acc‖², then acc ← acc + g
    dots             x·x, x·y, y·y, and with z: x·z, y·z, z·z
    restore          w ← saved;   acc ← c_acc·acc + c·x̂,   x̂ = ĝ, or coefs[0]·ĝ + coefs[1]·g + … with ``coefs``
    sgd, adam        torch.optim.SGD / Adam / AdamW on c_acc·acc + c·x̂, starting from ``saved`` where that is given

    ascend           inner_products and perturb

An element of the ema that is NaN has not begun: its first gradient is its d and its next value. A non-finite ‖d‖ means
e = 0, an unchanged ema and a NaN descent gradient. Where c_acc or one of ``coefs`` is 0 its term is left out, whatever it
holds, as in BLAS. Arithmetic is fp32 (fp64 for fp64 storage): values are rounded to the storage type only when stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-12  # added to a norm that divides
# Columns of `hyper`, as in csrc/update_math.h.
SGD_COLUMNS = ("rho", "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
ADAM_COLUMNS = ("rho", "lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled")


class _Segment(NamedTuple):
    index: int
    offset: int
    numel: int
    group: int
    rows: slice  # of the table
    lengths: list[int]

    def of(self, tensors: list[Tensor], flat: bool = False) -> Tensor:
        """This parameter's memory as a 1-d view, in a list of tensors or in one flat buffer."""
        tensor = tensors[0 if flat else self.index]
        memory = tensor.as_strided((tensor.numel(),), (1,))
        return self.within(memory) if flat else memory

    def within(self, buffer: Tensor | None) -> Tensor | None:
        return None if buffer is None else buffer[self.offset : self.offset + self.numel]

    def sums(self, x: Tensor) -> Tensor:
        """By chunk."""
        return torch.stack([part.sum() for part in x.split(self.lengths)])

    def bits(self, mask: Tensor) -> Tensor:
        """Bit k of byte j is that of element 8·j + k of a flat buffer."""
        k = torch.arange(self.offset, self.offset + self.numel, device=mask.device)
        return (mask[k // 8] >> (k % 8)) & 1 != 0


def _segments(chunks: Tensor) -> Iterator[_Segment]:
    """The whole parameters that the table names."""
    first = 0
    for index, rows in groupby(chunks.tolist(), key=itemgetter(0)):
        rows = list(rows)
        _, _, offset, _, group = rows[0]
        lengths = [row[3] for row in rows]
        yield _Segment(index, offset, sum(lengths), group, slice(first, first + len(rows)), lengths)
        first += len(rows)


def _wide(x: Tensor) -> Tensor:
    """In the arithmetic type."""
    return x if x.dtype == torch.float64 else x.float()


def _direction(g: Tensor, ema: Tensor | None, sigma: float) -> Tensor:
    return g if ema is None else torch.where(ema.isnan(), g, g - _wide(ema) * sigma)


def _ema_next(ema: Tensor, g: Tensor, lmbda: float) -> Tensor:
    return torch.where(ema.isnan(), g, _wide(ema) * lmbda + g * (1 - lmbda))


def _stretch(w: Tensor, eta: float) -> Tensor:
    return w.abs() + eta


def inner_products(weights, grads, chunks, *, ema=None, sigma=0.0, eta=None):
    """``‖d‖²`` as float64 ``[1]``."""
    total = torch.zeros(1, dtype=torch.float64, device=chunks.device)
    for s in _segments(chunks):
        d = _direction(_wide(s.of(grads)), s.within(ema), sigma)
        if eta is not None:
            d = _stretch(_wide(s.of(weights, len(weights) == 1)), eta) * d
        total += d.double().square().sum()
    return total


def perturb(
    weights,
    acc,
    grads,
    chunks,
    *,
    norm_sq,
    hyper,
    achieved_sq,
    acc_sq=None,
    saved=None,
    origin=None,
    ema=None,
    mask=None,
    sigma=0.0,
    lmbda=None,
    eta=None,
):
    """Weights to w + e, the old ones to ``saved``, ema to its next value, ‖e‖² as stored to ``achieved_sq``, by chunk.

    Whatever the norm: ``acc ← acc + grads``, and ‖acc‖² as it was to ``acc_sq``, by chunk.
    """
    norm_sq = norm_sq.sum(0, keepdim=True)
    finite = norm_sq.isfinite()
    if saved is not None:
        for s in _segments(chunks):
            s.within(saved).copy_(s.of(weights, len(weights) == 1))
    achieved_sq.zero_()  # from here on the weights can be restored, also after an interruption
    for s in _segments(chunks):
        weight, g, average = s.of(weights, len(weights) == 1), _wide(s.of(grads)), s.within(ema)
        w = _wide(weight if origin is None else s.within(origin)).clone()
        d = _direction(g, average, sigma)
        if average is not None and lmbda is not None:
            average.copy_(torch.where(finite, _ema_next(average, g, lmbda), _wide(average)))
        if eta is not None:
            d = _stretch(w, eta).square() * d
        scale = (hyper[s.group, 0] / (norm_sq.sqrt() + EPS)).to(w.dtype)
        perturbed = finite if mask is None else finite & s.bits(mask)
        weight.copy_(torch.where(perturbed, w + d * scale, w))
        next, old = weight.double(), w.double()
        change_sq = torch.where(finite & (next != old), (next - old).square(), 0.0)  # inf - inf is NaN
        achieved_sq[s.rows] = s.sums(change_sq)
        if acc:
            total = s.of(acc)
            acc_sq[s.rows] = s.sums(total.double().square())
            total.copy_(_wide(total) + g)


def ascend(
    weights, grads, chunks, *, hyper, achieved_sq, saved=None, ema=None, mask=None, sigma=0.0, lmbda=None, eta=None
):
    """``inner_products``, then ``perturb`` by the norm that it returned; returns it too."""
    norm_sq = inner_products(weights, grads, chunks, ema=ema, sigma=sigma, eta=eta)
    perturb(
        weights,
        [],
        grads,
        chunks,
        norm_sq=norm_sq,
        hyper=hyper,
        achieved_sq=achieved_sq,
        saved=saved,
        ema=ema,
        mask=mask,
        sigma=sigma,
        lmbda=lmbda,
        eta=eta,
    )
    return norm_sq


def _coefficient(c: float, norm_sq: Tensor | None) -> float | Tensor:
    """c, or NaN after a non-finite ascent gradient."""
    return c if norm_sq is None else torch.where(norm_sq.sum().isfinite(), norm_sq.new_tensor(c), math.nan)


def dots(x, y, z, chunks):
    """x·x, x·y and y·y as float64 ``[3, 1]``, and with z, unless it is empty, x·z, y·z and z·z: ``[6, 1]``."""
    lists = [x, y, z] if z else [x, y]
    total = torch.zeros(len(lists) * (len(lists) + 1) // 2, 1, dtype=torch.float64, device=chunks.device)
    for s in _segments(chunks):
        vectors = [s.of(tensors).double() for tensors in lists]
        total += torch.stack([(a * b).sum() for i, b in enumerate(vectors) for a in vectors[: i + 1]])[:, None]
    return total


def restore(weights, acc, grads, chunks, *, saved=None, norm_sq=None, coefs=None, c_acc=1.0, c=1.0):
    """``w ← saved`` and ``acc ← c_acc·acc + c·grads``; either part is left out where its lists are empty."""
    for s in _segments(chunks):
        if weights:
            s.of(weights, len(weights) == 1).copy_(s.within(saved))
        if acc:
            total = s.of(acc)
            if grads:
                total.copy_(_descent(s, acc, grads, norm_sq, coefs, c_acc, c))
            elif norm_sq is not None:
                total.copy_(torch.where(norm_sq.sum().isfinite(), total, math.nan))


def _combination(s, grads, coefs):
    if coefs is None:
        return _wide(s.of(grads))
    count = len(grads) // len(coefs)
    terms = [_wide(s.of(grads[k * count : (k + 1) * count])) for k in range(len(coefs))]
    total = torch.zeros_like(terms[0])
    for t, c in zip(terms, coefs.to(total.dtype), strict=True):
        total = torch.where(c == 0, total, total + t * c)
    return total


def _descent(s, acc, grads, norm_sq, coefs, c_acc, c):
    g = _combination(s, grads, coefs)
    c = _coefficient(c, norm_sq)
    g = g * (c.to(g.dtype) if isinstance(c, Tensor) else c)
    return _wide(s.of(acc)) * c_acc + g if acc and g.new_tensor(c_acc) != 0 else g


def _weights_and_gradient(s, weights, acc, grads, saved, norm_sq, coefs, c_acc, c):
    weight = s.of(weights, len(weights) == 1)
    start = weight if saved is None else s.within(saved)
    return weight, _wide(start).clone(), _descent(s, acc, grads, norm_sq, coefs, c_acc, c)


def sgd(
    weights,
    acc,
    grads,
    chunks,
    *,
    hyper,
    saved=None,
    momentum_buffer=None,
    fresh=None,
    norm_sq=None,
    coefs=None,
    c_acc=1.0,
    c=1.0,
):
    """One step of ``torch.optim.SGD``, columns ``SGD_COLUMNS``; a fresh momentum buffer begins as the gradient."""
    rows = hyper.tolist()
    for s in _segments(chunks):
        weight, w, g = _weights_and_gradient(s, weights, acc, grads, saved, norm_sq, coefs, c_acc, c)
        _, lr, momentum, dampening, weight_decay, nesterov, maximize = rows[s.group][: len(SGD_COLUMNS)]
        g = -g if maximize else g
        if weight_decay:
            g = g + w * weight_decay
        if momentum:
            buffer = s.within(momentum_buffer)
            following = g if (fresh is not None and fresh[s.index]) else _wide(buffer) * momentum + g * (1 - dampening)
            buffer.copy_(following)
            g = g + following * momentum if nesterov else following
        weight.copy_(w - g * lr)


def _integer_power(x: float, n: int) -> float:
    """x^n by repeated squaring, in the order of the kernels: not every pow rounds alike."""
    result = 1.0
    while n > 0:
        if n & 1:
            result *= x
        n >>= 1
        x *= x
    return result


def adam(
    weights,
    acc,
    grads,
    chunks,
    *,
    hyper,
    exp_avg,
    exp_avg_sq,
    step,
    max_exp_avg_sq=None,
    saved=None,
    norm_sq=None,
    coefs=None,
    c_acc=1.0,
    c=1.0,
):
    """One step of ``torch.optim.Adam`` or, where decoupled, ``AdamW``, columns ``ADAM_COLUMNS``; counts ``step``."""
    rows = hyper.tolist()
    for s in _segments(chunks):
        weight, w, g = _weights_and_gradient(s, weights, acc, grads, saved, norm_sq, coefs, c_acc, c)
        _, lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled = rows[s.group][: len(ADAM_COLUMNS)]
        step[s.index] += 1
        t = int(step[s.index])
        g = -g if maximize else g
        if weight_decay and decoupled:
            w = w * (1 - lr * weight_decay)
        elif weight_decay:
            g = g + w * weight_decay
        m, v = s.within(exp_avg), s.within(exp_avg_sq)
        first = _wide(m)
        first = first + (g - first) * (1 - beta1) if 1 - beta1 < 0.5 else g - (g - first) * beta1
        second = _wide(v) * beta2 + g * g * (1 - beta2)
        m.copy_(first)
        v.copy_(second)
        if amsgrad:
            largest = s.within(max_exp_avg_sq)
            second = torch.maximum(_wide(largest), second)
            largest.copy_(second)
        step_size, correction = lr / (1 - _integer_power(beta1, t)), math.sqrt(1 - _integer_power(beta2, t))
        weight.copy_(w - first / (second.sqrt() / correction + eps) * step_size)
