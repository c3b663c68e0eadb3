# SPDX-License-Identifier: Apache-2.0
"""The specification of the operators in plain torch: the same signatures as the kernels, any device, no compiler.

With w the weights, g the gradient at w, ĝ the one at w + e, and all norms global (one L2 norm over every parameter of
every group):

    norm        ‖d‖²,   d = g − sigma·ema (F-SAM), d = T_w·d with T_w = |w| + eta (ASAM)
    perturb     w ← w + e,   e = radius·d / (‖d‖ + 1e-12), or radius·T_w²·d / (‖T_w·d‖ + 1e-12)
                with ``mask`` e is 0 where the bit is 0; with ``noise`` rounded at random, see `at_random`
                ema ← lmbda·ema + (1 − lmbda)·g, after its old value was used
    ascend      norm, then perturb
    gram        the inner products of several vectors: x·x, x·y, y·y, x·z, y·z, z·z
    descend     w ← saved where w is perturbed;   out ← Σ cₖ xₖ
    update      torch.optim.SGD / Adam / AdamW on Σ cₖ xₖ, starting from ``saved`` where w is perturbed
    weigh       the coefficients of several micro-batches, for descend and update

A parameter whose tensor in a list is empty is absent from it: a gradient that is absent perturbs nothing and is no term.

With ``stack``, a number of micro-batches, each tensor of a list holds that of every one: ``[stack, *shape]``. norm, perturb,
ascend and gram do for each in turn what they do for one. The weights of a perturbation are then ``[stack, size]``, copies
beside w, which is ``saved`` and only read: every one becomes w + e of its micro-batch, and w where its gradient is absent.

``status``, one byte per row of the table, says how it stands with a row's weights: UNTOUCHED (nothing is saved), SAVED (they
are what ``saved`` holds) or PERTURBED (``saved`` holds what they were). ``perturb`` saves what it finds UNTOUCHED, and starts
from ``saved`` what it finds PERTURBED; ``descend`` and ``update`` bring back what is PERTURBED and nothing else.

Where ``saved`` is of fp32 beside weights of 16 bits it holds their masters, which no perturbation changes: w + e is master + e,
w comes back as the master rounded to nearest, and ``update`` is of the masters, with states in fp32. Unless its row is
PERTURBED, a weight that its master does not round to, bit for bit, is one that somebody else wrote, or has no master yet: then
it is the master.

An element of the ema that is NaN has not begun: its first gradient is its d and its next value; where sigma is negative (VaSSO:
d is the ema's next value times 1 − sigma) its d is 1 − sigma times that. A non-finite ‖d‖ means
e = 0, an unchanged ema and NaN in place of Σ cₖ xₖ. A term whose coefficient is 0 is left out, whatever it holds, as in
BLAS. Arithmetic is fp32 (fp64 for fp64 storage): values are rounded to the storage type only when stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check, check_masters, check_noise, check_stack, check_stacks, split_ahead

EPS = 1e-12  # added to a norm that divides
UNTOUCHED, SAVED, PERTURBED = 0, 1, 2  # values of ``status``
# Columns of one coefficient: scale · (a + b · ratio), see `coefficients`.
COEFFICIENT = ("scale", "a", "b", "p", "q", "root", "eps")
ACHIEVED = 3  # sums of a perturbation of 16-bit weights
DRAWS = 8  # elements that share a call of the generator
RADIUS = ("rho", "budget")  # columns of `radii`, as in csrc/update_math.h
SGD, ADAM = 0, 1  # values of ``rule``
# Columns of `settings`, by rule, as in csrc/update_math.h.
SGD_COLUMNS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
ADAM_COLUMNS = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled")


class _Row(NamedTuple):
    """A row of the table: a run of one parameter's elements."""

    k: int
    segment: int
    begin: int
    offset: int
    numel: int
    group: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Its part of a list of tensors, as a 1-d view; None where the parameter is absent."""
        tensor = tensors[self.segment] if tensors else None
        if tensor is None or tensor.numel() == 0:
            return None
        return tensor.as_strided((tensor.numel(),), (1,))[self.begin : self.begin + self.numel]

    def within(self, buffer: Tensor) -> Tensor:
        """Its part of a flat buffer."""
        return buffer[self.offset : self.offset + self.numel]

    def weights(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Its part of one flat buffer, or of a list; the only tensor of a list is either."""
        if len(weights) != 1:
            return self.of(weights)
        return self.within(weights[0].as_strided((weights[0].numel(),), (1,)))

    def bits(self, mask: Tensor) -> Tensor:
        """Bit k of byte j is that of element 8·j + k of a flat buffer."""
        k = torch.arange(self.offset, self.offset + self.numel, device=mask.device)
        return (mask[k // 8] >> (k % 8)) & 1 != 0


def _rows(table: Tensor) -> Iterator[_Row]:
    for k, row in enumerate(table.tolist()):
        yield _Row(k, *row)


def _wide(x: Tensor) -> Tensor:
    """In the arithmetic type."""
    return x if x.dtype == torch.float64 else x.float()


class _Sum:
    """A sum of products in fp64. Of fp64 storage it is rounded once, practically: no order of summation shows.

    Products of narrower values are exact, and what is made of their sum is rounded to fp32, where an order does not show.
    """

    def __init__(self, table: Tensor):
        self.rounded = torch.zeros(1, dtype=torch.float64, device=table.device)
        self.exact: list[float] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        products = x.double() * y.double()
        if x.dtype != torch.float64:
            self.rounded += products.sum()
            return
        while products.numel() > 64:  # by halves, and beside them what each addition loses (Knuth's TwoSum)
            half = products.numel() // 2
            self.exact += products[2 * half :].tolist()
            x, y = products[:half], products[half : 2 * half]
            products = x + y
            arrived = products - x
            self.exact.append(float(((x - (products - arrived)) + (y - arrived)).nan_to_num(nan=0.0).sum()))
        self.exact += products.tolist()

    def total(self) -> Tensor:
        """float64 ``[1]``."""
        if not self.exact:
            return self.rounded
        try:
            total = math.fsum(self.exact)
        except (OverflowError, ValueError):  # as IEEE has it: infinite, or inf - inf
            total = sum(self.exact)
        return torch.full_like(self.rounded, total)


def _direction(g: Tensor, ema: Tensor | None, sigma: float) -> Tensor:
    if ema is None:
        return g
    first = g if sigma < 0 else torch.zeros_like(g)
    return g - torch.where(ema.isnan(), first, _wide(ema)) * sigma


def _ema_next(ema: Tensor, g: Tensor, lmbda: float) -> Tensor:
    return torch.where(ema.isnan(), g, _wide(ema) * lmbda + g * (1 - lmbda))


def _masters(row: _Row, saved: Tensor, weight: Tensor, status: Tensor) -> Tensor:
    """Of a row, which also stand in ``saved`` afterwards."""
    kept = row.within(saved)
    stays = (status == PERTURBED) | (kept.to(weight.dtype).view(torch.int16) == weight.view(torch.int16))
    return kept.copy_(torch.where(stays, kept, weight)).clone()


def _stretch(w: Tensor, eta: float) -> Tensor:
    return w.abs() + eta


_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor | int], key: tuple[int, int], rounds: int = 7) -> list[Tensor]:
    """Philox4x32: four random words of 32 bits for four of a counter, in int64.

    7 rounds are the fewest that pass all of TestU01's BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011).
    """
    c = [torch.as_tensor(x) & _LOW for x in counter]
    for i in range(rounds):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # 64 bits, as two's complement
        keys = [(k + i * step) & _LOW for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        c = [(b >> 32 & _LOW) ^ c[1] ^ keys[0], b & _LOW, (a >> 32 & _LOW) ^ c[3] ^ keys[1], a & _LOW]
    return c


def draws(noise: Tensor, row: _Row, draw: int) -> Tensor:
    """16 random bits for each of a row's elements, int64.

    The k-th of 8 elements has the lower half of word k / 2 of their call where k is even, the upper half where it is odd. The
    counter of a call: the elements' index in their parameter / 8, the parameter's number, the step, the draw; its key is the
    seed. So nothing depends on how parameters are laid out, or cut.
    """
    (seed, step), (number, first) = noise[0].tolist(), noise[1 + row.segment].tolist()
    k = torch.arange(first + row.begin, first + row.begin + row.numel, device=noise.device)
    words = torch.stack(philox((k // DRAWS, number, step, draw), (seed & _LOW, seed >> 32 & _LOW)), -1)
    word = words.gather(-1, (k % DRAWS // 2)[:, None])[:, 0]
    return word >> k % 2 * 16 & 0xFFFF


def at_random(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """fp32 rounded to one of the two neighbours in 16 bits: away from zero with a probability proportional to the distance.

    What is representable stays, NaN and infinity too. Beyond the largest finite number, where there is no such neighbour, it
    rounds to nearest. fp16's subnormals are 2^-24 apart, of which the distance counts in parts of 2^-16.

    Args:
        random: 16 random bits for each element, int64; it rounds away from zero where the part of the distance that is left
            out, as 16 bits, and these carry.
    """
    bits = x.view(torch.int32).long() & _LOW
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        out = (magnitude + torch.where(magnitude >= 0x7F7F0000, 0x8000, random)) >> 16
        out = torch.where(magnitude > 0x7F800000, 0x7FC0, out)
    else:
        normal = (magnitude - 0x38000000 + torch.where(magnitude >= 0x477FE000, 0x1000, random >> 3)) >> 13
        normal = torch.where(magnitude >= 0x47800000, 0x7C00, normal)
        is_small = magnitude < 0x38800000
        small = ((torch.where(is_small, x.abs(), 0.0) * 2.0**40).long() + random) >> 16
        out = torch.where(magnitude > 0x7F800000, 0x7E00, torch.where(is_small, small, normal))
    out = out | (bits >> 16 & 0x8000)
    return out.to(torch.int16).view(dtype)


def _of(tensors: list[Tensor], i: int) -> list[Tensor]:
    """Micro-batch i of a list of stacks."""
    return [t[i] if t.numel() else t for t in tensors]


def norm(
    weights: list[Tensor],
    grads: list[Tensor],
    table: Tensor,
    *,
    ema: Tensor | None = None,
    sigma: float = 0.0,
    eta: float | None = None,
    stack: int | None = None,
) -> Tensor:
    """``‖d‖²`` as float64 ``[1]``; of a stack ``[stack, 1]``, all with the same ema."""
    check(table, weights=weights, grads=grads, ema=ema)
    if stack is not None:
        check_stacks(stack, grads=grads)
        rows = [norm(weights, _of(grads, i), table, ema=ema, sigma=sigma, eta=eta) for i in range(stack)]
        return torch.stack(rows)
    total = _Sum(table)
    for row in _rows(table):
        g = row.of(grads)
        if g is None:
            continue
        d = _direction(_wide(g), None if ema is None else row.within(ema), sigma)
        if eta is not None:
            w = row.weights(weights)
            assert w is not None
            d = _stretch(_wide(w), eta) * d
        total.add(d, d)
    return total.total()


def perturb(
    weights: list[Tensor],
    grads: list[Tensor],
    table: Tensor,
    *,
    norm_sq: Tensor,
    radii: Tensor,
    saved: Tensor,
    achieved_sq: Tensor,
    status: Tensor | None = None,
    ema: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    draw: int = 0,
    sigma: float = 0.0,
    lmbda: float | None = None,
    eta: float | None = None,
    stack: int | None = None,
) -> None:
    """Weights to w + e, ema to its next value, ‖e‖² as stored to ``achieved_sq``, by row; of 16 bits what it says beside it.

    e is as long as rho, but no longer than budget / (‖d‖ + 1e-12), and opposite to d where rho is negative.

    With masters w is what they round to, in T_w and where ‖e‖² begins; what does not move stays there.

    Changes ``saved`` and ``status`` as the module says; nothing of a row whose gradient is absent but its achieved_sq,
    which becomes 0. Of a stack ``norm_sq`` and ``achieved_sq`` have a row for each, and there is no ``status``: the ema of
    one is what the one before has left.
    """
    numbers = {"norm_sq": norm_sq, "radii": radii, "status": status, "achieved_sq": achieved_sq, "mask": mask}
    check(table, weights=weights, grads=grads, saved=saved, ema=ema, noise=noise, **numbers)
    check_noise(noise, weights, draw)
    if stack is not None:
        check_stacks(stack, grads=grads)
        check_stack("weights", weights[0], stack, contiguous=True)
        own = {"radii": radii, "saved": saved, "ema": ema, "mask": mask, "sigma": sigma, "lmbda": lmbda, "eta": eta}
        own["noise"] = noise
        for i in range(stack):
            copy = weights[0][i]
            for row in _rows(table):
                row.within(copy).copy_(row.within(saved))
            from_saved = torch.full((len(table),), PERTURBED, dtype=torch.uint8, device=table.device)
            each = {
                "norm_sq": norm_sq[i],
                "status": from_saved,
                "achieved_sq": achieved_sq[i],
                "draw": (draw + i) % 2**32,
            }
            perturb([copy], _of(grads, i), table, **each, **own)  # type: ignore[arg-type]
        return
    assert status is not None
    norm_sq = norm_sq.sum()
    finite, norm = norm_sq.isfinite(), norm_sq.sqrt() + EPS
    for row in _rows(table):
        weight, g = row.weights(weights), row.of(grads)
        achieved_sq[..., row.k] = 0
        if weight is None or g is None:
            continue
        g, kept, before = _wide(g), row.within(saved), status[row.k].clone()
        if saved.dtype == weight.dtype:
            kept.copy_(torch.where(before == UNTOUCHED, weight, kept))
            w = shown = _wide(kept).clone()
        else:
            w = _masters(row, saved, weight, before)
            shown = _wide(w.to(weight.dtype))
        average = None if ema is None else row.within(ema)
        d = _direction(g, average, sigma)
        if average is not None and lmbda is not None:
            average.copy_(torch.where(finite, _ema_next(average, g, lmbda), _wide(average)))
        if eta is not None:
            d = _stretch(shown, eta).square() * d
        rho, budget = radii[row.group]
        scale = (torch.minimum(rho.abs(), budget / norm).copysign(rho) / norm).to(w.dtype)
        moves = finite if mask is None else finite & row.bits(mask)
        status[row.k] = PERTURBED  # from here on the weights can be brought back, also after an interruption
        e = d * scale
        x = w + e if noise is None else _wide(at_random(w + e, weight.dtype, draws(noise, row, draw)))
        weight.copy_(torch.where(moves, x, shown))
        after = _wide(weight)
        change = torch.where(finite & (after != shown), after - shown, 0.0).double()  # inf - inf is NaN
        if weight.itemsize == 2:
            asked = torch.where(moves, e, 0.0).double()
            achieved_sq[:, row.k] = torch.stack(
                [(change * change).sum(), (change * asked).sum(), (asked * asked).sum()]
            )
        else:
            achieved_sq[row.k] = change.square().sum()


def ascend(
    weights: list[Tensor],
    grads: list[Tensor],
    table: Tensor,
    *,
    radii: Tensor,
    saved: Tensor,
    achieved_sq: Tensor,
    status: Tensor | None = None,
    arrived: Tensor | None = None,
    ema: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    draw: int = 0,
    sigma: float = 0.0,
    lmbda: float | None = None,
    eta: float | None = None,
    stack: int | None = None,
) -> Tensor:
    """``norm``, then ``perturb`` by what it returned; returns it too. Of a stack both for one micro-batch after the other."""
    check(table, weights=weights, grads=grads, saved=saved, achieved_sq=achieved_sq, arrived=arrived, noise=noise)
    if stack is not None:
        check_stacks(stack, grads=grads)
        check_stack("weights", weights[0], stack, contiguous=True)
        norms = []
        for i in range(stack):
            one, rest = [t[i : i + 1] if t.numel() else t for t in grads], {"ema": ema, "sigma": sigma, "eta": eta}
            norms.append(norm([saved], one, table, stack=1, **rest))  # type: ignore[arg-type]
            perturb(
                [weights[0][i : i + 1]], one, table, norm_sq=norms[i], radii=radii, saved=saved,
                achieved_sq=achieved_sq[i : i + 1], mask=mask, noise=noise, draw=(draw + i) % 2**32, lmbda=lmbda, stack=1,
                **rest,  # type: ignore[arg-type]
            )  # fmt: skip
        return torch.cat(norms)
    norm_sq = norm(weights, grads, table, ema=ema, sigma=sigma, eta=eta)
    perturb(
        weights,
        grads,
        table,
        norm_sq=norm_sq,
        radii=radii,
        saved=saved,
        status=status,
        achieved_sq=achieved_sq,
        ema=ema,
        mask=mask,
        noise=noise,
        draw=draw,
        sigma=sigma,
        lmbda=lmbda,
        eta=eta,
    )
    return norm_sq


def _lists(tensors: list[Tensor], count: int) -> list[list[Tensor]]:
    """``count`` lists that stand one after the other in one."""
    size = len(tensors) // count if count else 0
    return [tensors[k * size : (k + 1) * size] for k in range(count)]


def gram(terms: list[Tensor], table: Tensor, *, count: int, stack: int | None = None) -> Tensor:
    """The inner products of ``count`` vectors, float64 ``[count·(count + 1)/2, 1]``; row v·(v + 1)/2 + u is x_u·x_v, u ≤ v.

    Of a stack ``[stack, count·(count + 1)/2, 1]``, those of each micro-batch.
    """
    check(table, terms=terms)
    if stack is not None:
        check_stacks(stack, terms=terms)
        return torch.stack([gram(_of(terms, i), table, count=count) for i in range(stack)])
    lists = _lists(terms, count)
    totals = [_Sum(table) for _ in range(count * (count + 1) // 2)]
    for row in _rows(table):
        vectors = [row.of(tensors) for tensors in lists]
        for v, y in enumerate(vectors):
            for u, x in enumerate(vectors[: v + 1]):
                if x is not None and y is not None:
                    totals[v * (v + 1) // 2 + u].add(x, y)
    return torch.stack([total.total() for total in totals])


def coefficients(coefs: list[float], sums: list[Tensor], rescale: int, norm_sq: Tensor | None) -> list[float] | Tensor:
    """The coefficients cₖ of Σ cₖ xₖ: numbers, or float64 ``[terms]`` where they depend on sums.

    A row (scale, a, b, p, q, root, eps) of ``coefs`` is one term's: c = scale·(a + b·ratio), ratio = S_p / (S_q + eps), and
    with ``root`` √S_p / (√S_q + eps). S are the rows of all ``sums``, one tensor after the other, each row summed up. A
    ratio whose denominator is 0 or not finite counts 0.

    ``sums[0]`` is the Gram matrix of the first n terms. Where ``rescale`` ≥ 0 they are made as long as √S_rescale: each a + b·
    ratio of them times √S_rescale / (‖Σ (a + b·ratio) x‖ + 1e-12).

    All are NaN where the Gram matrix or ``norm_sq`` is not finite.
    """
    width = len(COEFFICIENT)
    rows = [coefs[k : k + width] for k in range(0, len(coefs), width)]
    if sums:
        s = torch.cat([t.sum(-1).reshape(-1) for t in sums])
    elif norm_sq is not None:
        s = norm_sq[:0]
    else:
        return [scale * a for scale, a, *_ in rows]
    c: list[Tensor] = []
    for _, a, b, p, q, root, eps in rows:
        value = s.new_tensor(a)
        if b:
            above, below = (s[int(p)].sqrt(), s[int(q)].sqrt()) if root else (s[int(p)], s[int(q)])
            below = below + eps
            value = a + b * torch.where((below == 0) | ~below.isfinite(), 0.0, above / below)
        c.append(value)
    if sums:
        head = sums[0].shape[0] if sums[0].dim() == 2 else 1  # rows of the Gram matrix
        n = (math.isqrt(8 * head + 1) - 1) // 2
        if rescale >= 0:
            products = [
                c[u] * c[v] * s[v * (v + 1) // 2 + u] * (1 if u == v else 2) for v in range(n) for u in range(v + 1)
            ]
            square = sum(products, s.new_zeros(()))
            factor = s[rescale].sqrt() / (square.clamp(min=0).sqrt() + EPS)
            c[:n] = [x * factor for x in c[:n]]
        poison = s[:head].sum()
        c = [x + (poison - poison) for x in c]
    if norm_sq is not None:
        poison = norm_sq.sum()
        c = [x + (poison - poison) for x in c]
    return torch.stack([x * scale for x, (scale, *_) in zip(c, rows, strict=True)])


def weigh(
    shares: Tensor, *, coefs: list[float], sums: list[Tensor], rescale: int = -1, norm_sq: Tensor | None = None
) -> Tensor:
    """For ``descend`` and ``update``: shareᵢ times the ``coefficients`` of micro-batch i, float64 ``[terms, m]``.

    Args:
        shares: float64 ``[m]``.
        sums, norm_sq: with a first dimension of m, for those of each micro-batch.
    """
    check(shares, sums=sums, norm_sq=norm_sq)
    columns = [
        torch.as_tensor(
            coefficients(coefs, [t[i] for t in sums], rescale, None if norm_sq is None else norm_sq[i]),
            dtype=torch.float64, device=shares.device,
        )
        for i in range(len(shares))
    ]  # fmt: skip
    return torch.stack(columns, 1) * shares


def _terms(
    terms: list[Tensor], shares: Tensor | None, coefs: list[float], sums: list[Tensor], rescale: int,
    norm_sq: Tensor | None,
) -> tuple[list[list[Tensor]], list[float] | Tensor]:  # fmt: skip
    """The lists that are combined, one after the other, and their coefficients."""
    stacks = 0 if shares is None else len(shares)
    lists = _lists(terms, stacks + len(coefs) // len(COEFFICIENT))
    c = coefficients(coefs, sums, rescale, norm_sq)
    if shares is None:
        return lists, c
    check_stacks(shares.shape[1], terms=list(itertools.chain(*lists[:stacks])))
    each = [_of(tensors, i) for i in range(shares.shape[1]) for tensors in lists[:stacks]]
    c = torch.cat([shares.t().reshape(-1), torch.as_tensor(c, dtype=torch.float64, device=shares.device)])
    return each + lists[stacks:], c


def _combination(row: _Row, lists: list[list[Tensor]], c: list[float] | Tensor) -> Tensor | None:
    """Σ cₖ xₖ in the arithmetic type, in the order of the terms; None where every term is absent."""
    total = None
    for tensors, value in zip(lists, c, strict=True):
        x = row.of(tensors)
        if x is None:
            continue
        x = _wide(x)
        value = torch.as_tensor(value, dtype=torch.float64, device=x.device).to(x.dtype)
        # The first term that counts is no addition to zero, which would lose the sign of a negative zero.
        if total is None:
            total, begun = torch.where(value == 0, torch.zeros_like(x), x * value), value != 0
        else:
            total = torch.where(value == 0, total, torch.where(begun, total + x * value, x * value))
            begun = begun | (value != 0)
    return total


def descend(
    weights: list[Tensor],
    out: list[Tensor],
    terms: list[Tensor],
    table: Tensor,
    *,
    coefs: list[float],
    sums: list[Tensor],
    rescale: int = -1,
    norm_sq: Tensor | None = None,
    saved: Tensor | None = None,
    status: Tensor | None = None,
    last: bool = True,
    out_sq: Tensor | None = None,
    shares: Tensor | None = None,
) -> None:
    """``w ← saved`` where it is perturbed, and ``out ← Σ cₖ xₖ``; either part is left out where its list is empty.

    ``shares``: of the first lists of ``terms``, which are stacks, the coefficients of each micro-batch, float64
    ``[stacks, m]``; ``coefs`` are those of the other lists. They are added up in the order Σᵢ Σₖ sharesₖᵢ xₖᵢ + Σ cₖ xₖ.
    Where every term is absent, ``out`` becomes 0. ``out`` may be one of the terms. ``out_sq``: ‖out‖² by row. What was saved
    is good for the next micro-batch of the same step, unless this was the ``last``: then ``status`` becomes UNTOUCHED.
    """
    numbers = {"sums": sums, "norm_sq": norm_sq, "status": status, "out_sq": out_sq, "shares": shares}
    check(table, weights=weights, out=out, terms=terms, saved=saved, **numbers)
    check_masters(weights, saved, shares=shares)
    lists, c = _terms(terms, shares, coefs, sums, rescale, norm_sq)
    for row in _rows(table):
        weight = row.weights(weights) if weights else None
        if weight is not None and saved is not None and status is not None:
            weight.copy_(torch.where(status[row.k] == PERTURBED, row.within(saved), weight))
            status[row.k] = UNTOUCHED if last else status[row.k].clamp(max=SAVED)
        total = row.of(out)
        if total is not None:
            x = _combination(row, lists, c)
            total.copy_(torch.zeros_like(total) if x is None else x)
        if out_sq is not None:
            square = _Sum(table)
            if total is not None:
                square.add(total, total)
            out_sq[row.k] = square.total()[0]


def update(
    weights: list[Tensor],
    states: list[Tensor],
    terms: list[Tensor],
    table: Tensor,
    *,
    rule: int,
    settings: Tensor,
    step: Tensor | None = None,
    coefs: list[float],
    sums: list[Tensor],
    rescale: int = -1,
    norm_sq: Tensor | None = None,
    saved: Tensor | None = None,
    status: Tensor | None = None,
    found_inf: Tensor | None = None,
    shares: Tensor | None = None,
    rates: Tensor | None = None,
    factor: float = 0.0,
) -> None:
    """One step of ``rule`` on Σ cₖ xₖ, for every row that has a term; ``status`` becomes UNTOUCHED in any case.

    SGD is ``torch.optim.SGD``, columns ``SGD_COLUMNS``, states [momentum_buffer] or none; ADAM is ``torch.optim.Adam`` or,
    where decoupled, ``AdamW``, columns ``ADAM_COLUMNS``, states [exp_avg, exp_avg_sq] and with amsgrad max_exp_avg_sq.
    ``step`` counts every parameter's updates; a momentum buffer begins with the gradient where it is still 0.

    Where ``found_inf`` is not 0 no row has a term: what is perturbed comes back, and nothing else changes. ``shares``: see
    ``descend``.

    With ``rates``, float64 by group, ``terms`` are x and one list more, y: after the rule's step, of every parameter that is in
    both, w ← w + factor·rates[group]·(y − c·x), of whose two parts each is first rounded as it would be stored. There are none
    with masters.
    """
    numbers = {"settings": settings, "step": step, "sums": sums, "norm_sq": norm_sq, "status": status, "shares": shares}
    check(table, weights=weights, states=states, terms=terms, saved=saved, found_inf=found_inf, rates=rates, **numbers)
    terms, ahead = split_ahead(terms, rates, len(coefs) // len(COEFFICIENT), shares, len(settings))
    check_masters(weights, saved, rates=rates, shares=shares)
    lists, c = _terms(terms, shares, coefs, sums, rescale, norm_sq)
    if found_inf is not None and bool(found_inf != 0):
        lists, c = [], []
    one = {SGD: _sgd, ADAM: _adam}[rule]
    rows = settings.tolist()
    updated = set()
    for row in _rows(table):
        weight, g = row.weights(weights), _combination(row, lists, c)
        if weight is None:
            continue
        start = kept = weight  # where the weights of before are, and where those of after go
        if saved is not None and status is not None:
            if saved.dtype == weight.dtype:
                start = torch.where(status[row.k] == PERTURBED, row.within(saved), weight)
            elif g is not None or status[row.k] == PERTURBED:
                kept, start = row.within(saved), _masters(row, saved, weight, status[row.k])
        if g is None:
            weight.copy_(start)
        else:
            count = None if step is None else step[row.segment]
            kept.copy_(one(_wide(start).clone(), g, [row.within(s) for s in states], rows[row.group], count))
            weight.copy_(kept)
            x = row.of(ahead)
            if x is not None:
                assert rates is not None
                gap = _wide((_wide(x) - g).to(weight.dtype))
                weight.copy_(_wide(weight) + gap * (factor * rates[row.group]).to(gap.dtype))
            updated.add(row.segment)
        if status is not None:
            status[row.k] = UNTOUCHED
    if step is not None:
        for segment in updated:
            step[segment] += 1


def _sgd(w: Tensor, g: Tensor, states: list[Tensor], row: list[float], count: Tensor | None) -> Tensor:
    lr, momentum, dampening, weight_decay, nesterov, maximize = row[: len(SGD_COLUMNS)]
    g = -g if maximize else g
    if w.new_tensor(weight_decay):  # which may be 0 in the arithmetic type
        g = g + w * weight_decay
    if momentum:
        assert count is not None, "momentum needs step"
        buffer = states[0]
        following = torch.where(count == 0, g, _wide(buffer) * momentum + g * (1 - dampening))
        buffer.copy_(following)
        g = g + following * momentum if nesterov else following
    return w - g * lr


def _integer_power(x: float, n: int) -> float:
    """x^n by repeated squaring, in the order of the kernels: not every pow rounds alike."""
    result = 1.0
    while n > 0:
        if n & 1:
            result *= x
        n >>= 1
        x *= x
    return result


def _adam(w: Tensor, g: Tensor, states: list[Tensor], row: list[float], count: Tensor | None) -> Tensor:
    lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled = row[: len(ADAM_COLUMNS)]
    assert count is not None, "Adam needs step"
    t = int(count) + 1
    g = -g if maximize else g
    if weight_decay and decoupled:
        w = w * (1 - lr * weight_decay)
    elif weight_decay:
        g = g + w * weight_decay
    m, v = states[0], states[1]
    first = _wide(m)
    first = first + (g - first) * (1 - beta1) if 1 - beta1 < 0.5 else g - (g - first) * beta1
    second = _wide(v) * beta2 + g * (1 - beta2) * g  # in this order, as torch: g * g may overflow
    m.copy_(first)
    v.copy_(second)
    if amsgrad:
        largest = states[2]
        second = torch.maximum(_wide(largest), second)
        largest.copy_(second)
    step_size, correction = lr / (1 - _integer_power(beta1, t)), math.sqrt(1 - _integer_power(beta2, t))
    return w - first / (second.sqrt() / correction + eps) * step_size
