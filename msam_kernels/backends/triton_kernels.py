# SPDX-License-Identifier: Apache-2.0
"""The operators in Triton: for NVIDIA GPUs without nvcc, and for ROCm and XPU. Imported when first asked for.

One program works on a chunk at a time. ``ascend`` is two launches, every other operator one. The formulas are those of
csrc/update_math.h, in the same order of operations and without contraction into FMA, so that element-wise results have the
bits of the C++ kernels.

Memory reaches the kernels as int64 addresses, and what is absent as address 0: one compiled kernel then serves flat and
listed weights, with and without saved weights, mean, fresh flags and norm. A chunk whose addresses and length are multiples
of 16 is walked in 128-bit accesses, any other one element by element.

With ``TRITON_INTERPRET=1``, set before this module is imported, the same kernels run on CPU tensors, slowly.
"""

import inspect
import struct
from collections import OrderedDict
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch.autograd.graph import increment_version

PROGRAMS = 1024  # of one launch, at most: about what is resident at once on a large GPU
WARPS = 4 if torch.version.hip else 8  # 256 threads
BLOCK = 2048  # elements that a program has in flight: 8 per thread, one or two 128-bit accesses to each buffer
# Per thread at most, on NVIDIA GPUs: left alone, ptxas spills a few bytes to fit one program more.
REGISTERS = {"inner_products": 64, "perturb": 112, "dots": 96, "restore": 64, "sgd": 80, "adam": 80}
LISTS = 3  # of gradients that a descent combines, at most
STORAGE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _kernel(f):
    """Compiled once per choice of constants: nothing is specialised on the value of an address or a number."""
    parameters = inspect.signature(f).parameters.items()
    return triton.jit(do_not_specialize=[n for n, p in parameters if p.annotation is not tl.constexpr])(f)


# ---- formulas: csrc/update_math.h, one to one -------------------------------------------------------------------------


@triton.jit
def truth(condition):
    """The same; the interpreter cannot combine the outcome of a comparison of floats with a mask."""
    return tl.where(condition, 1, 0) != 0


@triton.jit
def is_finite(x):
    return truth(x - x == 0)


@triton.jit
def square_root(x):
    """Correctly rounded."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def quotient(x, y):
    """Correctly rounded."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def ascent_scale(norm_sq, rho):
    return rho / (tl.sqrt(norm_sq) + 1e-12)


@triton.jit
def integer_power(x, n):
    result = tl.full([], 1.0, tl.float64)
    while n > 0:
        result = tl.where(n % 2 == 1, result * x, result)
        n = n // 2
        x = x * x
    return result


@triton.jit
def residual(g, ema, sigma):
    return tl.where(ema != ema, g, g - sigma * ema)


@triton.jit
def ema_next(ema, g, lmbda, one_minus_lmbda):
    return tl.where(ema != ema, g, lmbda * ema + one_minus_lmbda * g)


@triton.jit
def stretch(w, eta):
    return tl.where(w < 0, w * -1.0, w) + eta


@triton.jit
def perturbed(w, d, scale, eta, ADAPTIVE: tl.constexpr):
    if ADAPTIVE:
        t = stretch(w, eta)
        d = t * t * d
    return w + d * scale


@triton.jit
def weighted(g, c):
    return c * g


@triton.jit
def accumulated(acc, g, c_acc, c):
    return c_acc * acc + weighted(g, c)


@triton.jit
def sgd_step(w, g, buffer, lr, momentum, one_minus_dampening, weight_decay, nesterov, maximize, fresh):
    """(w, momentum buffer)."""
    g = tl.where(maximize, g * -1.0, g)
    g = tl.where(weight_decay != 0, g + weight_decay * w, g)
    buffer = tl.where(fresh, g, momentum * buffer + one_minus_dampening * g)
    g = tl.where(momentum != 0, tl.where(nesterov, g + momentum * buffer, buffer), g)
    return w - lr * g, buffer


@triton.jit
def adam_gradient(w, g, weight_decay, coupled, maximize):
    g = tl.where(maximize, g * -1.0, g)
    return tl.where(coupled, g + weight_decay * w, g)


@triton.jit
def adam_first(exp_avg, g, beta1, one_minus_beta1, small):
    """The two branches of torch.lerp."""
    change = g - exp_avg
    return tl.where(small, exp_avg + one_minus_beta1 * change, g - change * beta1)


@triton.jit
def adam_second(exp_avg_sq, g, beta2, one_minus_beta2):
    return beta2 * exp_avg_sq + one_minus_beta2 * (g * g)


@triton.jit
def adam_weight(w, decay, exp_avg, v, step_size, bias_correction2_sqrt, eps):
    return w * decay - step_size * quotient(exp_avg, quotient(square_root(v), bias_correction2_sqrt) + eps)


# ---- memory -----------------------------------------------------------------------------------------------------------


@triton.jit
def number(bits, T: tl.constexpr):
    """A float argument, which Triton would round to fp32: it comes as the bits of an fp64."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(T)


@triton.jit
def column(row, i: tl.constexpr):
    return tl.load(row.to(tl.pointer_type(tl.float64)) + i)


@triton.jit
def flag(row, i: tl.constexpr):
    return truth(column(row, i) != 0)


@triton.jit
def load_chunk(chunks, k):
    """(segment, begin, offset, numel, group), as in csrc/segments.h."""
    row = chunks.to(tl.int64).to(tl.pointer_type(tl.int64)) + k * 5
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def in_flat(base, offset, S: tl.constexpr):
    """The address of a chunk in a flat buffer; 0 where there is no buffer."""
    return tl.where(base != 0, base + offset * (S.primitive_bitwidth // 8), base).to(tl.int64)


@triton.jit
def in_list(table, segment, begin, S: tl.constexpr):
    """The address of a chunk in a list of tensors, of which the table holds the addresses; 0 where there is no list."""
    there = table != 0
    base = tl.load(table.to(tl.int64).to(tl.pointer_type(tl.int64)) + segment, mask=there, other=0)
    return tl.where(there, base + begin * (S.primitive_bitwidth // 8), 0)


@triton.jit
def in_further_list(
    table, i: tl.constexpr, lists, segments, segment, begin, S: tl.constexpr, COMBINED: tl.constexpr
):  # fmt: skip
    """The same in the i-th of several lists, one after the other; 0 where there are not so many."""
    if COMBINED:
        return in_list(tl.where(i < lists, table + i * segments * 8, 0), segment, begin, S)
    else:
        return tl.full([], 0, tl.int64)


@triton.jit
def pointer(address, S: tl.constexpr, ALIGNED: tl.constexpr):
    p = address.to(tl.pointer_type(S))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def length(numel, ALIGNED: tl.constexpr):
    if ALIGNED:
        numel = numel // 16 * 16  # the same, and the compiler knows: whole vectors are in or out
    return numel


@triton.jit
def total(terms, n):
    """The sum of a list of fp64, in one order for all programs."""
    LANES: tl.constexpr = 1024
    lanes = tl.arange(0, LANES)
    p = terms.to(tl.int64).to(tl.pointer_type(tl.float64))
    sums = tl.zeros([LANES], tl.float64)
    for i in range(0, n, LANES):
        sums += tl.load(p + i + lanes, mask=lanes < n - i, other=0.0)
    return tl.sum(sums, 0)


# ---- kernels. S: storage type, T: arithmetic type -----------------------------------------------------------------------


@triton.jit
def inner_products_chunk(
    w, g, ema, numel, sigma, eta, S: tl.constexpr, T: tl.constexpr,
    FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    numel = length(numel, ALIGNED)
    wp, gp, ep = pointer(w, S, ALIGNED), pointer(g, S, ALIGNED), pointer(ema, S, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for i in range(0, numel, BLOCK):
        here = lanes < numel - i
        d = tl.load(gp + i + lanes, mask=here, other=0.0).to(T)
        if FRIENDLY:
            d = residual(d, tl.load(ep + i + lanes, mask=here, other=0.0).to(T), sigma)
        if ADAPTIVE:
            d = stretch(tl.load(wp + i + lanes, mask=here, other=0.0).to(T), eta) * d
        wide = d.to(tl.float64)
        sums += wide * wide
    return tl.sum(sums, 0)


@_kernel
def inner_products_kernel(
    terms: tl.int64, chunks: tl.int64, rows: tl.int64, flat_weights: tl.int64, weights: tl.int64, grads: tl.int64,
    ema: tl.int64, sigma: tl.int64, eta: tl.int64, S: tl.constexpr, T: tl.constexpr,
    FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sums = tl.full([], 0.0, tl.float64)
    for k in range(tl.program_id(0), rows, tl.num_programs(0)):
        segment, begin, offset, numel, _ = load_chunk(chunks, k)
        g = in_list(grads, segment, begin, S)
        w = in_flat(flat_weights, offset, S) + in_list(weights, segment, begin, S)
        e = in_flat(ema, offset, S)
        if (g | w | e | numel) % 16 == 0:
            part = inner_products_chunk(
                w, g, e, numel, number(sigma, T), number(eta, T), S, T, FRIENDLY, ADAPTIVE, BLOCK, True
            )
        else:
            part = inner_products_chunk(
                w, g, e, numel, number(sigma, T), number(eta, T), S, T, FRIENDLY, ADAPTIVE, BLOCK // 4, False
            )
        sums += part
    tl.store(terms.to(tl.int64).to(tl.pointer_type(tl.float64)) + tl.program_id(0), sums)


@triton.jit
def no_sum(BLOCK: tl.constexpr):
    return tl.zeros([BLOCK // 8], tl.float64)


@triton.jit
def folded(x, BLOCK: tl.constexpr):
    """Sums of eight neighbours, which one thread has: so many sums at once would not fit its registers otherwise."""
    return tl.sum(tl.reshape(x, [BLOCK // 8, 8]), 1)


@triton.jit
def dots_chunk(x, y, z, numel, S: tl.constexpr, THREE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The chunk's parts of x·x, x·y, y·y, x·z, y·z and z·z."""
    numel = length(numel, ALIGNED)
    xp, yp, zp = pointer(x, S, ALIGNED), pointer(y, S, ALIGNED), pointer(z, S, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    xx, xy, yy = no_sum(BLOCK), no_sum(BLOCK), no_sum(BLOCK)
    xz, yz, zz = no_sum(BLOCK), no_sum(BLOCK), no_sum(BLOCK)
    for i in range(0, numel, BLOCK):
        here = lanes < numel - i
        a = tl.load(xp + i + lanes, mask=here, other=0.0).to(tl.float64)
        b = tl.load(yp + i + lanes, mask=here, other=0.0).to(tl.float64)
        xx += folded(a * a, BLOCK)
        xy += folded(a * b, BLOCK)
        yy += folded(b * b, BLOCK)
        if THREE:
            c = tl.load(zp + i + lanes, mask=here, other=0.0).to(tl.float64)
            xz += folded(a * c, BLOCK)
            yz += folded(b * c, BLOCK)
            zz += folded(c * c, BLOCK)
    return tl.sum(xx, 0), tl.sum(xy, 0), tl.sum(yy, 0), tl.sum(xz, 0), tl.sum(yz, 0), tl.sum(zz, 0)


@_kernel
def dots_kernel(
    terms: tl.int64, chunks: tl.int64, rows: tl.int64, xs: tl.int64, ys: tl.int64, zs: tl.int64,
    S: tl.constexpr, T: tl.constexpr, THREE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    xx, xy, yy = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    xz, yz, zz = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    for k in range(tl.program_id(0), rows, tl.num_programs(0)):
        segment, begin, _, numel, _ = load_chunk(chunks, k)
        x, y = in_list(xs, segment, begin, S), in_list(ys, segment, begin, S)
        z = in_list(zs, segment, begin, S)
        if (x | y | z | numel) % 16 == 0:
            xx_part, xy_part, yy_part, xz_part, yz_part, zz_part = dots_chunk(x, y, z, numel, S, THREE, BLOCK, True)
        else:
            xx_part, xy_part, yy_part, xz_part, yz_part, zz_part = dots_chunk(
                x, y, z, numel, S, THREE, BLOCK // 4, False
            )
        xx += xx_part
        xy += xy_part
        yy += yy_part
        xz += xz_part
        yz += yz_part
        zz += zz_part
    p = terms.to(tl.int64).to(tl.pointer_type(tl.float64)) + tl.program_id(0)
    tl.store(p, xx)
    tl.store(p + tl.num_programs(0), xy)
    tl.store(p + 2 * tl.num_programs(0), yy)
    if THREE:
        tl.store(p + 3 * tl.num_programs(0), xz)
        tl.store(p + 4 * tl.num_programs(0), yz)
        tl.store(p + 5 * tl.num_programs(0), zz)


@triton.jit
def perturb_chunk(
    w, origin, g, saved, ema, mask, first_bit, numel, finite, scale, sigma, lmbda, one_minus_lmbda, renew, eta,
    S: tl.constexpr, T: tl.constexpr, FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The chunk's part of the achieved norm, squared."""
    numel = length(numel, ALIGNED)
    wp, op, gp = pointer(w, S, ALIGNED), pointer(origin, S, ALIGNED), pointer(g, S, ALIGNED)
    sp, ep = pointer(saved, S, ALIGNED), pointer(ema, S, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for i in range(0, numel, BLOCK):
        here = lanes < numel - i
        stored = tl.load(op + i + lanes, mask=here, other=0.0)
        d = tl.load(gp + i + lanes, mask=here, other=0.0).to(T)
        # Read again only after a whole backward pass: past the caches.
        tl.store(sp + i + lanes, stored, mask=here & (saved != 0), cache_modifier=".cs")
        if FRIENDLY:
            average = tl.load(ep + i + lanes, mask=here, other=0.0).to(T)
            following = ema_next(average, d, lmbda, one_minus_lmbda)
            tl.store(ep + i + lanes, following.to(S), mask=here & finite & renew)
            d = residual(d, average, sigma)
        result = perturbed(stored.to(T), d, scale, eta, ADAPTIVE).to(S)
        picked = here & finite
        if MASKED:
            bit = (first_bit % 8).to(tl.int32) + lanes
            bytes = tl.load(mask.to(tl.pointer_type(tl.uint8)) + (first_bit + i) // 8 + bit // 8, mask=here, other=0)
            picked = picked & (((bytes.to(tl.int32) >> bit % 8) & 1) != 0)  # i is a multiple of 8
        # Weights that come from elsewhere are stored in any case.
        result = tl.where(picked, result, stored)
        tl.store(wp + i + lanes, result, mask=here & (picked | (origin != w)))
        next, old = result.to(tl.float64), stored.to(tl.float64)
        change = tl.where(here & finite & truth(next != old), next - old, 0.0)  # inf - inf is NaN
        sums += change * change
    return tl.sum(sums, 0)


@triton.jit
def add_chunk(acc, g, numel, S: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """acc <- acc + g, and the squared norm that acc had."""
    numel = length(numel, ALIGNED)
    ap, gp = pointer(acc, S, ALIGNED), pointer(g, S, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for i in range(0, numel, BLOCK):
        here = lanes < numel - i
        x = tl.load(ap + i + lanes, mask=here, other=0.0).to(T)
        following = accumulated(x, tl.load(gp + i + lanes, mask=here, other=0.0).to(T), 1.0, 1.0)
        tl.store(ap + i + lanes, following.to(S), mask=here)
        wide = x.to(tl.float64)
        sums += wide * wide
    return tl.sum(sums, 0)


@_kernel
def perturb_kernel(
    norm_sq: tl.int64, norm_terms: tl.int64, achieved_sq: tl.int64, acc_sq: tl.int64, chunks: tl.int64, rows: tl.int64,
    hyper: tl.int64, columns: tl.int64, flat_weights: tl.int64, weights: tl.int64, grads: tl.int64, acc: tl.int64,
    saved: tl.int64, origin: tl.int64, ema: tl.int64, mask: tl.int64, sigma: tl.int64, lmbda: tl.int64,
    one_minus_lmbda: tl.int64, renew: tl.int64, eta: tl.int64,
    S: tl.constexpr, T: tl.constexpr, FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    norm = total(norm_sq, norm_terms)
    finite = is_finite(norm)
    for before in range(tl.program_id(0), rows, tl.num_programs(0)):
        k = rows - 1 - before  # backwards: what inner_products read last may still be in the L2 cache
        segment, begin, offset, numel, group = load_chunk(chunks, k)
        g = in_list(grads, segment, begin, S)
        w = in_flat(flat_weights, offset, S) + in_list(weights, segment, begin, S)
        s, e = in_flat(saved, offset, S), in_flat(ema, offset, S)
        o = tl.where(origin != 0, in_flat(origin, offset, S), w)
        a, added = in_list(acc, segment, begin, S), tl.where(acc != 0, numel, 0)
        scale = ascent_scale(norm, column(hyper + group * columns * 8, 0)).to(T)
        if (g | w | o | s | e | a | numel) % 16 == 0:
            before_sq = add_chunk(a, g, added, S, T, BLOCK, True)
            achieved = perturb_chunk(
                w, o, g, s, e, mask, offset, numel, finite, scale, number(sigma, T), number(lmbda, T),
                number(one_minus_lmbda, T), renew != 0, number(eta, T), S, T, FRIENDLY, ADAPTIVE, MASKED, BLOCK, True,
            )  # fmt: skip
        else:
            before_sq = add_chunk(a, g, added, S, T, BLOCK // 4, False)
            achieved = perturb_chunk(
                w, o, g, s, e, mask, offset, numel, finite, scale, number(sigma, T), number(lmbda, T),
                number(one_minus_lmbda, T), renew != 0, number(eta, T), S, T, FRIENDLY, ADAPTIVE, MASKED, BLOCK // 4, False,
            )  # fmt: skip
        tl.store(achieved_sq.to(tl.int64).to(tl.pointer_type(tl.float64)) + k, achieved)
        tl.store(acc_sq.to(tl.int64).to(tl.pointer_type(tl.float64)) + k, before_sq, mask=acc_sq != 0)


@triton.jit
def combination(gp, yp, zp, lanes, here, coefs, second, third, T: tl.constexpr, COMBINED: tl.constexpr):
    """The gradients, or what stands in their place: the first coefficient times g, and so on where y and z are there."""
    g = tl.load(gp + lanes, mask=here, other=0.0).to(T)
    if COMBINED:
        # Loaded for every block: registers are short, the cache is not.
        c = coefs.to(tl.int64).to(tl.pointer_type(tl.float64))
        c0, c1 = tl.load(c).to(T), tl.load(c + 1, mask=second, other=0.0).to(T)
        c2 = tl.load(c + 2, mask=third, other=0.0).to(T)
        y = tl.load(yp + lanes, mask=here & truth(c1 != 0), other=0.0).to(T)
        z = tl.load(zp + lanes, mask=here & truth(c2 != 0), other=0.0).to(T)
        g = tl.where(c0 != 0, 0.0 + weighted(g, c0), 0.0)
        g = tl.where(c1 != 0, g + weighted(y, c1), g)
        g = tl.where(c2 != 0, g + weighted(z, c2), g)
    return g


@triton.jit
def restore_chunk(
    w, saved, acc, g, y, z, numel, finite, c_acc, c, coefs, S: tl.constexpr, T: tl.constexpr,
    COMBINED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    numel = length(numel, ALIGNED)
    wp, sp = pointer(w, S, ALIGNED), pointer(saved, S, ALIGNED)
    ap, gp = pointer(acc, S, ALIGNED), pointer(g, S, ALIGNED)
    yp, zp = pointer(y, S, ALIGNED), pointer(z, S, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    summed = (acc != 0) & (g != 0)
    read = summed & truth(c_acc != 0)
    for i in range(0, numel, BLOCK):
        here = lanes < numel - i
        before = tl.load(sp + i + lanes, mask=here & (w != 0), other=0.0)
        mean = tl.load(ap + i + lanes, mask=here & read, other=0.0).to(T)
        gradient = combination(
            gp + i, yp + i, zp + i, lanes, here & summed, coefs, y != 0, z != 0, T, COMBINED
        )  # fmt: skip
        tl.store(wp + i + lanes, before, mask=here & (w != 0))
        # Without gradients it is stored only where c, and with it every element, is NaN.
        mean = tl.where(read, accumulated(mean, gradient, c_acc, c), weighted(gradient, c))
        tl.store(ap + i + lanes, mean.to(S), mask=here & (summed | ((acc != 0) & (finite == 0))))


@_kernel
def restore_kernel(
    norm_sq: tl.int64, norm_terms: tl.int64, chunks: tl.int64, rows: tl.int64, flat_weights: tl.int64,
    weights: tl.int64, saved: tl.int64, acc: tl.int64, grads: tl.int64, c_acc: tl.int64, c: tl.int64,
    coefs: tl.int64, lists: tl.int64, segments: tl.int64,
    S: tl.constexpr, T: tl.constexpr, COMBINED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norm = total(norm_sq, norm_terms)
    finite = is_finite(norm)
    for k in range(tl.program_id(0), rows, tl.num_programs(0)):
        segment, begin, offset, numel, _ = load_chunk(chunks, k)
        w = in_flat(flat_weights, offset, S) + in_list(weights, segment, begin, S)
        s, a, g = in_flat(saved, offset, S), in_list(acc, segment, begin, S), in_list(grads, segment, begin, S)
        y = in_further_list(grads, 1, lists, segments, segment, begin, S, COMBINED)
        z = in_further_list(grads, 2, lists, segments, segment, begin, S, COMBINED)
        scale = (number(c, tl.float64) - (norm - norm)).to(T)  # NaN where the norm is not finite
        if (w | s | a | g | y | z | numel) % 16 == 0:
            restore_chunk(
                w, s, a, g, y, z, numel, finite, number(c_acc, T), scale, coefs, S, T, COMBINED, BLOCK, True
            )  # fmt: skip
        else:
            restore_chunk(
                w, s, a, g, y, z, numel, finite, number(c_acc, T), scale, coefs, S, T, COMBINED, BLOCK // 4, False
            )  # fmt: skip


@triton.jit
def descent(ap, g, lanes, here, has_acc, c_acc, c, T: tl.constexpr):
    """The step's gradient: c g, or c_acc acc + c g."""
    has_acc = has_acc & truth(c_acc != 0)
    acc = tl.load(ap + lanes, mask=here & has_acc, other=0.0).to(T)
    return tl.where(has_acc, accumulated(acc, g, c_acc, c), weighted(g, c))


@triton.jit
def sgd_chunk(
    w, before, acc, g, y, z, buffer, numel, c_acc, c, coefs, lr, momentum, one_minus_dampening, weight_decay, nesterov,
    maximize, fresh, S: tl.constexpr, T: tl.constexpr, MOMENTUM: tl.constexpr, COMBINED: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    numel = length(numel, ALIGNED)
    wp, bp = pointer(w, S, ALIGNED), pointer(before, S, ALIGNED)
    ap, gp, mp = pointer(acc, S, ALIGNED), pointer(g, S, ALIGNED), pointer(buffer, S, ALIGNED)
    yp, zp = pointer(y, S, ALIGNED), pointer(z, S, ALIGNED)
    has_momentum = truth(momentum != 0)
    lanes = tl.arange(0, BLOCK)
    for i in range(0, numel, BLOCK):
        here = lanes < numel - i
        x = tl.load(bp + i + lanes, mask=here, other=0.0).to(T)
        d = combination(gp + i, yp + i, zp + i, lanes, here, coefs, y != 0, z != 0, T, COMBINED)
        d = descent(ap + i, d, lanes, here, acc != 0, c_acc, c, T)
        average = tl.zeros([BLOCK], T)
        if MOMENTUM:
            average = tl.load(mp + i + lanes, mask=here & has_momentum, other=0.0).to(T)
        x, average = sgd_step(x, d, average, lr, momentum, one_minus_dampening, weight_decay, nesterov, maximize, fresh)
        tl.store(wp + i + lanes, x.to(S), mask=here)
        if MOMENTUM:
            tl.store(mp + i + lanes, average.to(S), mask=here & has_momentum)


@_kernel
def sgd_kernel(
    norm_sq: tl.int64, norm_terms: tl.int64, chunks: tl.int64, rows: tl.int64, hyper: tl.int64, columns: tl.int64,
    flat_weights: tl.int64, weights: tl.int64, saved: tl.int64, acc: tl.int64, grads: tl.int64, buffers: tl.int64,
    fresh: tl.int64, c_acc: tl.int64, c: tl.int64, coefs: tl.int64, lists: tl.int64, segments: tl.int64,
    S: tl.constexpr, T: tl.constexpr, MOMENTUM: tl.constexpr, COMBINED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norm = total(norm_sq, norm_terms)
    for k in range(tl.program_id(0), rows, tl.num_programs(0)):
        segment, begin, offset, numel, group = load_chunk(chunks, k)
        w = in_flat(flat_weights, offset, S) + in_list(weights, segment, begin, S)
        before = tl.where(saved != 0, in_flat(saved, offset, S), w)
        a, g = in_list(acc, segment, begin, S), in_list(grads, segment, begin, S)
        y = in_further_list(grads, 1, lists, segments, segment, begin, S, COMBINED)
        z = in_further_list(grads, 2, lists, segments, segment, begin, S, COMBINED)
        b = in_flat(buffers, offset, S)
        scale = (number(c, tl.float64) - (norm - norm)).to(T)  # NaN where the norm is not finite
        row = hyper + group * columns * 8
        lr, momentum, one_minus_dampening = column(row, 1).to(T), column(row, 2).to(T), (1 - column(row, 3)).to(T)
        weight_decay, nesterov, maximize = column(row, 4).to(T), flag(row, 5), flag(row, 6)
        flags = fresh.to(tl.int64).to(tl.pointer_type(tl.uint8))
        begins = tl.load(flags + segment, mask=fresh != 0, other=0) != 0
        if (w | before | a | g | y | z | b | numel) % 16 == 0:
            sgd_chunk(
                w, before, a, g, y, z, b, numel, number(c_acc, T), scale, coefs, lr, momentum, one_minus_dampening,
                weight_decay, nesterov, maximize, begins, S, T, MOMENTUM, COMBINED, BLOCK, True,
            )  # fmt: skip
        else:
            sgd_chunk(
                w, before, a, g, y, z, b, numel, number(c_acc, T), scale, coefs, lr, momentum, one_minus_dampening,
                weight_decay, nesterov, maximize, begins, S, T, MOMENTUM, COMBINED, BLOCK // 4, False,
            )  # fmt: skip


@triton.jit
def adam_chunk(
    w, before, acc, g, y, z, exp_avg, exp_avg_sq, max_exp_avg_sq, numel, c_acc, c, coefs,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size, bias_correction2_sqrt,
    maximize, coupled, small, amsgrad,
    S: tl.constexpr, T: tl.constexpr, AMSGRAD: tl.constexpr, COMBINED: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    numel = length(numel, ALIGNED)
    wp, bp = pointer(w, S, ALIGNED), pointer(before, S, ALIGNED)
    ap, gp = pointer(acc, S, ALIGNED), pointer(g, S, ALIGNED)
    yp, zp = pointer(y, S, ALIGNED), pointer(z, S, ALIGNED)
    mp, vp, xp = pointer(exp_avg, S, ALIGNED), pointer(exp_avg_sq, S, ALIGNED), pointer(max_exp_avg_sq, S, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    for i in range(0, numel, BLOCK):
        here = lanes < numel - i
        x = tl.load(bp + i + lanes, mask=here, other=0.0).to(T)
        d = combination(gp + i, yp + i, zp + i, lanes, here, coefs, y != 0, z != 0, T, COMBINED)
        d = descent(ap + i, d, lanes, here, acc != 0, c_acc, c, T)
        m = tl.load(mp + i + lanes, mask=here, other=0.0).to(T)
        v = tl.load(vp + i + lanes, mask=here, other=0.0).to(T)
        d = adam_gradient(x, d, weight_decay, coupled, maximize)
        m = adam_first(m, d, beta1, one_minus_beta1, small)
        v = adam_second(v, d, beta2, one_minus_beta2)
        tl.store(mp + i + lanes, m.to(S), mask=here)
        tl.store(vp + i + lanes, v.to(S), mask=here)
        if AMSGRAD:
            largest = tl.load(xp + i + lanes, mask=here & amsgrad, other=0.0).to(T)
            # A NaN in v, which stays there, wins as in torch.maximum.
            v = tl.where(amsgrad & (v <= largest), largest, v)
            tl.store(xp + i + lanes, v.to(S), mask=here & amsgrad)
        x = adam_weight(x, decay, m, v, step_size, bias_correction2_sqrt, eps)
        tl.store(wp + i + lanes, x.to(S), mask=here)


@_kernel
def adam_kernel(
    norm_sq: tl.int64, norm_terms: tl.int64, chunks: tl.int64, rows: tl.int64, hyper: tl.int64, columns: tl.int64,
    flat_weights: tl.int64, weights: tl.int64, saved: tl.int64, acc: tl.int64, grads: tl.int64,
    exp_avgs: tl.int64, exp_avg_sqs: tl.int64, max_exp_avg_sqs: tl.int64, step: tl.int64, segments: tl.int64,
    c_acc: tl.int64, c: tl.int64, coefs: tl.int64, lists: tl.int64,
    S: tl.constexpr, T: tl.constexpr, AMSGRAD: tl.constexpr, COMBINED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norm = total(norm_sq, norm_terms)
    steps = step.to(tl.int64).to(tl.pointer_type(tl.float32))
    for k in range(tl.program_id(0), rows, tl.num_programs(0)):
        segment, begin, offset, numel, group = load_chunk(chunks, k)
        w = in_flat(flat_weights, offset, S) + in_list(weights, segment, begin, S)
        before = tl.where(saved != 0, in_flat(saved, offset, S), w)
        a, g = in_list(acc, segment, begin, S), in_list(grads, segment, begin, S)
        y = in_further_list(grads, 1, lists, segments, segment, begin, S, COMBINED)
        z = in_further_list(grads, 2, lists, segments, segment, begin, S, COMBINED)
        m, v = in_flat(exp_avgs, offset, S), in_flat(exp_avg_sqs, offset, S)
        x = in_flat(max_exp_avg_sqs, offset, S)
        scale = (number(c, tl.float64) - (norm - norm)).to(T)  # NaN where the norm is not finite
        row = hyper + group * columns * 8
        lr, beta1, beta2, eps = column(row, 1), column(row, 2), column(row, 3), column(row, 4)
        weight_decay, amsgrad, maximize, decoupled = column(row, 5), flag(row, 6), flag(row, 7), flag(row, 8)
        decay = tl.where(decoupled, 1 - lr * weight_decay, 1.0).to(T)
        count = tl.load(steps + segment).to(tl.int64) + 1
        step_size = (lr / (1 - integer_power(beta1, count))).to(T)
        bias_correction2_sqrt = tl.sqrt(1 - integer_power(beta2, count)).to(T)
        coupled, small = (decoupled == 0) & truth(weight_decay != 0), truth(1 - beta1 < 0.5)
        if (w | before | a | g | y | z | m | v | x | numel) % 16 == 0:
            adam_chunk(
                w, before, a, g, y, z, m, v, x, numel, number(c_acc, T), scale, coefs,
                beta1.to(T), (1 - beta1).to(T), beta2.to(T), (1 - beta2).to(T), eps.to(T), weight_decay.to(T), decay,
                step_size, bias_correction2_sqrt, maximize, coupled, small, amsgrad, S, T, AMSGRAD, COMBINED, BLOCK, True,
            )  # fmt: skip
        else:
            adam_chunk(
                w, before, a, g, y, z, m, v, x, numel, number(c_acc, T), scale, coefs,
                beta1.to(T), (1 - beta1).to(T), beta2.to(T), (1 - beta2).to(T), eps.to(T), weight_decay.to(T), decay,
                step_size, bias_correction2_sqrt, maximize, coupled, small, amsgrad, S, T, AMSGRAD, COMBINED, BLOCK // 4, False,
            )  # fmt: skip
    # The last program to come here counts the steps: by then every other one has read them.
    tl.debug_barrier()
    ticket = (step + segments * 4).to(tl.int64).to(tl.pointer_type(tl.int32))
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        LANES: tl.constexpr = 1024
        lanes = tl.arange(0, LANES)
        table = chunks.to(tl.int64).to(tl.pointer_type(tl.int64))
        for k in range(0, rows, LANES):
            here = lanes < rows - k
            segment = tl.load(table + (k + lanes) * 5, mask=here, other=0)
            here = here & (tl.load(table + (k + lanes) * 5 + 1, mask=here, other=1) == 0)
            tl.store(steps + segment, tl.load(steps + segment, mask=here, other=0.0) + 1, mask=here)
        tl.store(ticket, 0)


@_kernel
def write_pointers_kernel(
    table: tl.int64,
    p0: tl.int64, p1: tl.int64, p2: tl.int64, p3: tl.int64, p4: tl.int64, p5: tl.int64, p6: tl.int64, p7:
    tl.int64, p8: tl.int64, p9: tl.int64, p10: tl.int64, p11: tl.int64, p12: tl.int64, p13: tl.int64, p14:
    tl.int64, p15: tl.int64,
):  # fmt: skip
    """Addresses into a table, out of the arguments of the launch: a captured graph then holds them itself."""
    p = table.to(tl.int64).to(tl.pointer_type(tl.int64))
    tl.store(p + 0, p0)
    tl.store(p + 1, p1)
    tl.store(p + 2, p2)
    tl.store(p + 3, p3)
    tl.store(p + 4, p4)
    tl.store(p + 5, p5)
    tl.store(p + 6, p6)
    tl.store(p + 7, p7)
    tl.store(p + 8, p8)
    tl.store(p + 9, p9)
    tl.store(p + 10, p10)
    tl.store(p + 11, p11)
    tl.store(p + 12, p12)
    tl.store(p + 13, p13)
    tl.store(p + 14, p14)
    tl.store(p + 15, p15)


# ---- host -------------------------------------------------------------------------------------------------------------

INTERPRETED = not isinstance(inner_products_kernel, triton.JITFunction)


def _bits(x):
    return struct.unpack("<q", struct.pack("<d", x))[0]


def registers(kernel):
    """Options for the compiler, on NVIDIA GPUs."""
    name = kernel.__name__.removesuffix("_kernel")
    return {"maxnreg": REGISTERS[name]} if name in REGISTERS else {}


def _launch(kernel, programs, *args, **constants):
    limit = registers(kernel) if torch.version.cuda else {}
    kernel[(programs,)](*args, **constants, num_warps=WARPS, enable_fp_fusion=False, **limit)


_tables: OrderedDict = OrderedDict()  # addresses -> the device tensor that holds them
TABLES = 64
_ready: set = set()  # devices on which the kernel that a capture needs is loaded


class _Call:
    """What every operator shares: the table and its checks, the pointers, the device. Used as a context around launches.

    The rows of ``chunks`` are on the device, where the host does not look: what they name must be there.
    """

    def __init__(self, chunks, dtype):
        self.chunks, self.dtype, self.device, self.rows = chunks, dtype, chunks.device, chunks.shape[0]
        if not (
            chunks.dim() == 2 and chunks.shape[1] == 5 and (chunks.dtype == torch.int64) and chunks.is_contiguous()
        ):
            raise RuntimeError(
                f"chunks must be a contiguous int64 tensor of shape [n, 5], got {chunks.dtype} of shape {list(chunks.shape)}"
            )
        if dtype not in STORAGE:
            raise RuntimeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
        self.programs = min(self.rows, PROGRAMS)
        self.kind = None if self.device.type == "cpu" else torch.get_device_module(self.device)
        self.types = {
            "S": STORAGE[dtype],
            "T": tl.float64 if dtype == torch.float64 else tl.float32,
            "BLOCK": BLOCK // 2 if dtype == torch.float64 else BLOCK,
        }

    def on_device(self):
        """Triton launches on the current device."""
        if self.kind is None or self.kind.current_device() == self.device.index:
            return nullcontext()
        return self.kind.device(self.device)

    def lists(self, **lists):
        """The addresses of tables with the pointers of each list; 0 for an empty list."""
        lists = {name: tensors for name, tensors in lists.items() if tensors}
        addresses = tuple(t.data_ptr() for tensors in lists.values() for t in tensors)
        stream = self.kind and self.kind.current_stream(self.device)
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        # A table is there for the stream that it was copied on; one made in a capture is filled when that is replayed.
        key = (self.device, stream, self.dtype, addresses, *map(len, lists.values()))
        table = None if capturing else _tables.get(key)
        if table is not None:
            _tables.move_to_end(key)
        else:
            self._check_lists(lists)
            table = self._captured(addresses) if capturing else self._copied(addresses)
            if not capturing:
                if self.device.type == "cuda" and self.device not in _ready:
                    self._captured((0,))  # compiled now: a capture is no place to load a kernel
                    _ready.add(self.device)
                if len(_tables) >= TABLES:
                    _tables.popitem(last=False)
                _tables[key] = table
        self.table = table  # lives as long as the call
        at, found = table.data_ptr(), {}
        for name, tensors in lists.items():
            found[name], at = at, at + 8 * len(tensors)
        return found

    def _check_lists(self, lists):
        for name, tensors in lists.items():
            for t in tensors:
                # An empty tensor stands for a parameter that the table does not name.
                if t.numel():
                    self._check_dense(t, name)

    def _check_dense(self, t, name):
        if t.dtype != self.dtype:
            raise RuntimeError(f"{name} must be {self.dtype} like the weights, got {t.dtype}")
        if t.device != self.device:
            raise RuntimeError(f"{name} must be on {self.device} like the table, got {t.device}")
        if not (t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)):
            raise RuntimeError(f"{name} must be dense in memory, got strides {t.stride()}")

    def _copied(self, addresses):
        table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        return table if self.kind is None else table.pin_memory().to(self.device, non_blocking=True)

    def _captured(self, addresses):
        table = torch.empty(-(-len(addresses) // 16) * 16, dtype=torch.int64, device=self.device)
        addresses += (0,) * (len(table) - len(addresses))
        with self.on_device():
            for i in range(0, len(table), 16):
                _launch(write_pointers_kernel, 1, table.data_ptr() + 8 * i, *addresses[i : i + 16])
        return table

    def weights(self, weights):
        """(address of the flat buffer or 0, list of tensors or nothing)."""
        if len(weights) != 1:
            return 0, weights
        self._check_dense(weights[0], "weights")
        return weights[0].data_ptr(), []

    def flat(self, name, t):
        if t is None:
            return 0
        self._check_dense(t, name)
        return t.data_ptr()

    def tensor(self, name, t, dtype, dim=1):
        """A small tensor that is no storage: its address and its length."""
        if t is None:
            return 0, 0
        if not (t.dim() == dim and t.dtype == dtype and t.is_contiguous() and (t.device == self.device)):
            raise RuntimeError(
                f"{name} must be a contiguous {dim}-d {dtype} tensor on {self.device}, got {t.dtype} of shape "
                f"{list(t.shape)} on {t.device}"
            )
        return t.data_ptr(), t.shape[0]

    def hyper(self, hyper, columns):
        address, _ = self.tensor("hyper", hyper, torch.float64, dim=2)
        if hyper.shape[1] < columns:
            raise RuntimeError(f"hyper must have at least {columns} columns, got {hyper.shape[1]}")
        return address, hyper.shape[1]

    def coefs(self, coefs, grads):
        """(address or 0, the number of lists that grads holds, the number of tensors in each)."""
        if coefs is None:
            return 0, 1, len(grads)
        address, lists = self.tensor("coefs", coefs, torch.float64)
        if not 1 <= lists <= LISTS:
            raise RuntimeError(f"coefs must be a contiguous float64 tensor of 1 to {LISTS} values, got {lists}")
        if not grads or len(grads) % lists:
            raise RuntimeError(f"grads must hold a list of tensors for each of {lists} coefs, got {len(grads)} tensors")
        return address, lists, len(grads) // lists

    def launch(self, kernel, *args, **constants):
        if self.rows:
            with self.on_device():
                _launch(kernel, self.programs, *args, **self.types, **constants)


def _dtype_of(*lists):
    for tensors in lists:
        if tensors:
            return tensors[0].dtype
    raise RuntimeError("weights and grads are empty")


def _direction(call, weights, grads, ema, eta, acc=()):
    """What the direction d is made of; and the address of ``acc``, which is in the same table of pointers."""
    if not grads:
        raise RuntimeError("grads are missing")
    if eta is not None and not weights:
        raise RuntimeError("eta needs the weights")
    flat_weights, listed = call.weights(weights)
    tables = call.lists(weights=listed, grads=grads, acc=acc)
    constants = {"FRIENDLY": ema is not None, "ADAPTIVE": eta is not None}
    pointers = flat_weights, tables.get("weights", 0), tables["grads"]
    return pointers, tables.get("acc", 0), call.flat("ema", ema), constants


def _inner_products(call, direction, sigma, eta):
    pointers, _, ema, constants = direction
    terms = torch.empty(call.programs, dtype=torch.float64, device=call.device)
    call.launch(
        inner_products_kernel, terms.data_ptr(), call.chunks.data_ptr(), call.rows, *pointers, ema,
        _bits(sigma), _bits(eta or 0.0), **constants,
    )  # fmt: skip
    return terms if call.rows else terms.new_zeros(1)


def _perturb(call, direction, norm_sq, hyper, achieved_sq, acc_sq, saved, origin, mask, sigma, lmbda, eta):
    pointers, acc, ema, constants = direction
    if saved is not None and origin is not None:
        raise RuntimeError("weights that are perturbed from origin are not saved: give saved or origin")
    achieved, terms = call.tensor("achieved_sq", achieved_sq, torch.float64)
    if terms != call.rows:
        raise RuntimeError(f"achieved_sq must have one element per chunk, {call.rows}, got {terms}")
    before_sq, terms = call.tensor("acc_sq", acc_sq, torch.float64)
    if (acc_sq is not None) != (acc != 0):
        raise RuntimeError("acc and acc_sq go together: give both or neither")
    if acc_sq is not None and terms != call.rows:
        raise RuntimeError(f"acc_sq must have one element per chunk, {call.rows}, got {terms}")
    arguments = (
        *call.tensor("norm_sq", norm_sq, torch.float64), achieved, before_sq, call.chunks.data_ptr(), call.rows,
        *call.hyper(hyper, 1), *pointers, acc, call.flat("saved", saved), call.flat("origin", origin), ema,
        call.tensor("mask", mask, torch.uint8)[0],
        _bits(sigma), _bits(lmbda or 0.0), _bits(1 - (lmbda or 0.0)), int(lmbda is not None), _bits(eta or 0.0),
    )  # fmt: skip
    call.launch(perturb_kernel, *arguments, MASKED=mask is not None, **constants)
    increment_version(achieved_sq)  # the weights are saved; before, the compiler may have been interrupted


def inner_products(weights, grads, chunks, *, ema=None, sigma=0.0, eta=None):
    call = _Call(chunks, _dtype_of(grads))
    return _inner_products(call, _direction(call, weights if eta is not None else [], grads, ema, eta), sigma, eta)


def perturb(
    weights, acc, grads, chunks, *, norm_sq, hyper, achieved_sq, acc_sq=None, saved=None, origin=None, ema=None,
    mask=None, sigma=0.0, lmbda=None, eta=None,
):  # fmt: skip
    if not weights:
        raise RuntimeError("perturb needs weights")
    call = _Call(chunks, _dtype_of(weights))
    direction = _direction(call, weights, grads, ema, eta, acc)
    _perturb(call, direction, norm_sq, hyper, achieved_sq, acc_sq, saved, origin, mask, sigma, lmbda, eta)


def ascend(
    weights, grads, chunks, *, hyper, achieved_sq, saved=None, ema=None, mask=None, sigma=0.0, lmbda=None, eta=None
):
    if not weights:
        raise RuntimeError("ascend needs weights")
    call = _Call(chunks, _dtype_of(weights))
    direction = _direction(call, weights, grads, ema, eta)
    norm_sq = _inner_products(call, direction, sigma, eta)
    _perturb(call, direction, norm_sq, hyper, achieved_sq, None, saved, None, mask, sigma, lmbda, eta)
    return norm_sq


def dots(x, y, z, chunks):
    for name, tensors in (("x", x), ("y", y)):
        if not tensors:
            raise RuntimeError(f"{name} is empty")
    call = _Call(chunks, x[0].dtype)
    tables = call.lists(x=x, y=y, z=z)
    terms = torch.empty(6 if z else 3, call.programs, dtype=torch.float64, device=call.device)
    addresses = tables["x"], tables["y"], tables.get("z", 0)
    call.launch(dots_kernel, terms.data_ptr(), chunks.data_ptr(), call.rows, *addresses, THREE=bool(z))
    return terms if call.rows else terms.new_zeros(len(terms), 1)


def _gathered(call, weights, acc, grads, saved):
    flat_weights, listed = call.weights(weights)
    tables = call.lists(weights=listed, acc=acc, grads=grads)
    saved = call.flat("saved", saved)
    return flat_weights, tables.get("weights", 0), saved, tables.get("acc", 0), tables.get("grads", 0)


def restore(weights, acc, grads, chunks, *, saved=None, norm_sq=None, coefs=None, c_acc=1.0, c=1.0):
    if weights and saved is None:
        raise RuntimeError("weights are restored from saved, which is missing")
    if grads and not acc:
        raise RuntimeError("grads are added to acc, which is missing")
    call = _Call(chunks, _dtype_of(weights, acc))
    call.launch(
        restore_kernel, *call.tensor("norm_sq", norm_sq, torch.float64), chunks.data_ptr(), call.rows,
        *_gathered(call, weights, acc, grads, saved if weights else None), _bits(c_acc), _bits(c),
        *call.coefs(coefs, grads), COMBINED=coefs is not None,
    )  # fmt: skip


def sgd(
    weights, acc, grads, chunks, *, hyper, saved=None, momentum_buffer=None, fresh=None, norm_sq=None, coefs=None,
    c_acc=1.0, c=1.0,
):  # fmt: skip
    if not (weights and grads):
        raise RuntimeError("sgd needs weights and grads")
    call = _Call(chunks, _dtype_of(weights))
    call.launch(
        sgd_kernel, *call.tensor("norm_sq", norm_sq, torch.float64), chunks.data_ptr(), call.rows,
        *call.hyper(hyper, 7), *_gathered(call, weights, acc, grads, saved),
        call.flat("momentum_buffer", momentum_buffer), call.tensor("fresh", fresh, torch.uint8)[0],
        _bits(c_acc), _bits(c), *call.coefs(coefs, grads),
        MOMENTUM=momentum_buffer is not None, COMBINED=coefs is not None,
    )  # fmt: skip


def adam(
    weights, acc, grads, chunks, *, hyper, exp_avg, exp_avg_sq, step, max_exp_avg_sq=None, saved=None, norm_sq=None,
    coefs=None, c_acc=1.0, c=1.0,
):  # fmt: skip
    if not (weights and grads):
        raise RuntimeError("adam needs weights and grads")
    call = _Call(chunks, _dtype_of(weights))
    steps, count = call.tensor("step", step, torch.float32)
    coefs, lists, segments = call.coefs(coefs, grads)
    if count != segments + 1:
        raise RuntimeError(f"step must have an element per parameter and one more, {segments + 1}, got {count}")
    call.launch(
        adam_kernel, *call.tensor("norm_sq", norm_sq, torch.float64), chunks.data_ptr(), call.rows,
        *call.hyper(hyper, 9), *_gathered(call, weights, acc, grads, saved),
        call.flat("exp_avg", exp_avg), call.flat("exp_avg_sq", exp_avg_sq), call.flat("max_exp_avg_sq", max_exp_avg_sq),
        steps, segments, _bits(c_acc), _bits(c), coefs, lists,
        AMSGRAD=max_exp_avg_sq is not None, COMBINED=coefs != 0,
    )  # fmt: skip
