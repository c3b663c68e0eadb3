# SPDX-License-Identifier: Apache-2.0
"""The operators in Triton: for NVIDIA GPUs without nvcc, and for ROCm and XPU. Imported when first asked for.

One program works on one row of the table at a time, and every operator is one launch. The formulas are those of
csrc/update_math.h, in the same order of operations and without contraction into FMA, so that element-wise results have the
bits of the C++ kernels.

Memory reaches the kernels as int64 addresses, and what is absent as address 0, where nothing is read or written. One compiled
kernel then serves flat and listed weights, rows with and without a gradient, and calls with and without saved weights, sums
and norm. A row whose addresses and length are multiples of 16 is walked in 128-bit accesses, any other one element by element.

With ``TRITON_INTERPRET=1``, set before this module is imported, the same kernels run on CPU tensors, slowly.
"""

import inspect
import itertools
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check, check_masters, check_noise, check_stack, check_values, split_ahead

PROGRAMS = 1024  # of one launch, at most: about what is resident at once on a large GPU
THREADS = tl.constexpr(256)  # of a program
BLOCK = 2048  # elements that a program has in flight: 8 per thread, one or two 128-bit accesses to each buffer
# Of a thread, at most, on NVIDIA GPUs: a multiprocessor has them for four programs at 64, three at 80, two at 128. Left alone,
# ptxas takes more than are good for the number of programs, or spills a few bytes to fit one more. Some options take more.
REGISTERS = {
    **{"norm_kernel": 64, "perturb_kernel": 64, "ascend_kernel": 64},
    **{"gram_kernel": 128, "descend_kernel": 80, "update_kernel": 80},
}
MORE_REGISTERS = {"FRIENDLY": 80, "SQUARED": 128, "MASKED": 128, "STACKS": 128, "STACKED": 128}
STORAGE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# As in csrc/update_math.h: values of status, values of rule, the columns of radii and of a coefficient; and what there is at
# most.
UNTOUCHED, SAVED, PERTURBED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SGD, ADAM = tl.constexpr(0), tl.constexpr(1)
RADIUS_COLUMNS, COEFFICIENT_COLUMNS = tl.constexpr(2), tl.constexpr(7)
DRAWS, NOISE_COLUMNS, ACHIEVED = tl.constexpr(8), tl.constexpr(2), tl.constexpr(3)
TERMS, VECTORS, SUM_TENSORS, SUM_ROWS = 4, 3, 3, 8
# The columns of settings, and the states, of which the last may be missing.
RULES = {0: (6, ("momentum_buffer",)), 1: (8, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))}


def _kernel(f: Callable[..., Any]) -> Any:
    """Compiled once per choice of constants: nothing is specialised on the value of an address or a number."""
    parameters = inspect.signature(f).parameters.items()
    return triton.jit(do_not_specialize=[n for n, p in parameters if p.annotation is not tl.constexpr])(f)


# ---- formulas: csrc/update_math.h, one to one -------------------------------------------------------------------------


@triton.jit
def truth(condition):
    """A comparison of floats as a mask: the interpreter cannot combine its own outcome with one."""
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
def ascent_scale(norm_sq, rho, budget):
    norm = tl.sqrt(norm_sq) + 1e-12
    length = tl.minimum(tl.abs(rho), budget / norm)
    return tl.where(rho < 0, -length, length) / norm


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
    return tl.where(ema != ema, tl.where(sigma < 0, g - sigma * g, g), g - sigma * ema)


@triton.jit
def ema_next(ema, g, lmbda, one_minus_lmbda):
    return tl.where(ema != ema, g, lmbda * ema + one_minus_lmbda * g)


@triton.jit
def stretch(w, eta):
    return tl.where(w < 0, w * -1.0, w) + eta


@triton.jit
def perturbation(w, d, scale, eta, ADAPTIVE: tl.constexpr):
    if ADAPTIVE:
        t = stretch(w, eta)
        d = t * t * d
    return d * scale


@triton.jit
def master(kept, rounded, w):
    same = rounded.to(tl.int16, bitcast=True) == w.to(tl.int16, bitcast=True)
    return tl.where(same, kept, w.to(tl.float32))


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32 of 7 rounds; all are uint32."""
    for _ in tl.static_range(7):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ key0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ key1, a.to(tl.uint32)
        key0, key1 = key0 + tl.full([], 0x9E3779B9, tl.uint32), key1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def at_random(x, random, S: tl.constexpr):
    """fp32 as one of its neighbours in the storage type, by 16 random bits in uint32."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if S.fp_mantissa_width == 7:  # bf16
        out = (magnitude + tl.where(magnitude >= 0x7F7F0000, 0x8000, random)) >> 16
        out = tl.where(magnitude > 0x7F800000, 0x7FC0, out)
    else:
        normal = (magnitude - 0x38000000 + tl.where(magnitude >= 0x477FE000, 0x1000, random >> 3)) >> 13
        normal = tl.where(magnitude >= 0x47800000, 0x7C00, normal)
        is_small = magnitude < 0x38800000
        scaled = tl.where(is_small, tl.abs(x), 0.0) * 1099511627776.0  # 2^40
        small = (scaled.to(tl.int32).to(tl.uint32) + random) >> 16
        out = tl.where(magnitude > 0x7F800000, 0x7E00, tl.where(is_small, small, normal))
    return (out | (bits >> 16 & 0x8000)).to(tl.uint16).to(S, bitcast=True)


@triton.jit
def coefficient(row, sums):
    """A term's coefficient. ``row`` points to its seven numbers; ``sums`` holds eight."""
    a, b, eps = tl.load(row + 1), tl.load(row + 2), tl.load(row + 6)
    above, below = entry(sums, tl.load(row + 3)), entry(sums, tl.load(row + 4))
    root = truth(tl.load(row + 5) != 0)
    above, below = tl.where(root, tl.sqrt(above), above), tl.where(root, tl.sqrt(below), below) + eps
    ratio = tl.where(truth(below == 0) | (is_finite(below) == 0), 0.0, above / below)
    return tl.where(b == 0, a, a + b * ratio)


@triton.jit
def rescale_factor(c, sums, gram, rescale):
    """The factor that gives Σ cₖ xₖ its length. The sums begin with the Gram matrix of the first ``gram`` terms."""
    square = tl.full([], 0.0, tl.float64)
    for v in range(0, gram):
        for u in range(0, v + 1):
            square += entry(c, u) * entry(c, v) * entry(sums, v * (v + 1) // 2 + u) * tl.where(u == v, 1.0, 2.0)
    return tl.sqrt(entry(sums, rescale)) / (tl.sqrt(tl.where(square < 0, 0.0, square)) + 1e-12)


@triton.jit
def weighted(x, c):
    return c * x


@triton.jit
def sgd_settings(row, step, T: tl.constexpr):
    lr, momentum, dampening, weight_decay = column(row, 0), column(row, 1), column(row, 2), column(row, 3)
    nesterov, maximize = truth(column(row, 4) != 0), truth(column(row, 5) != 0)
    return lr.to(T), momentum.to(T), (1 - dampening).to(T), weight_decay.to(T), nesterov, maximize, step == 1


@triton.jit
def sgd(w, g, states, settings, STATES: tl.constexpr):
    """(w, states)."""
    lr, momentum, one_minus_dampening, weight_decay, nesterov, maximize, fresh = settings
    g = tl.where(maximize, g * -1.0, g)
    g = tl.where(weight_decay != 0, g + weight_decay * w, g)
    if STATES > 0:
        buffer = tl.where(fresh, g, momentum * states[0] + one_minus_dampening * g)
        g = tl.where(momentum != 0, tl.where(nesterov, g + momentum * buffer, buffer), g)
        states = [buffer]
    return w - lr * g, states


@triton.jit
def adam_settings(row, step, T: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay = column(row, 0), column(row, 1), column(row, 2), column(row, 3), column(row, 4)
    amsgrad, maximize, decoupled = truth(column(row, 5) != 0), truth(column(row, 6) != 0), truth(column(row, 7) != 0)
    decay = tl.where(decoupled, 1 - lr * weight_decay, 1.0).to(T)
    step_size = (lr / (1 - integer_power(beta1, step))).to(T)
    correction = tl.sqrt(1 - integer_power(beta2, step)).to(T)
    coupled, small = (decoupled == 0) & truth(weight_decay != 0), truth(1 - beta1 < 0.5)
    factors = beta1.to(T), (1 - beta1).to(T), beta2.to(T), (1 - beta2).to(T), eps.to(T), weight_decay.to(T), decay
    return factors, step_size, correction, amsgrad, maximize, coupled, small


@triton.jit
def adam(w, g, states, settings, STATES: tl.constexpr):
    """(w, states)."""
    factors, step_size, correction, amsgrad, maximize, coupled, small = settings
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay = factors
    g = tl.where(maximize, g * -1.0, g)
    g = tl.where(coupled, g + weight_decay * w, g)
    change = g - states[0]
    first = tl.where(small, states[0] + one_minus_beta1 * change, g - change * beta1)  # the two branches of torch.lerp
    second = beta2 * states[1] + one_minus_beta2 * g * g  # in this order: g * g may overflow
    v = second
    if STATES > 2:
        # A NaN in v, which stays there, wins as in torch.maximum.
        v = tl.where(amsgrad & (v <= states[2]), states[2], v)
    states = [first, second, v][:STATES]
    return w * decay - step_size * quotient(first, quotient(square_root(v), correction) + eps), states


# ---- memory -----------------------------------------------------------------------------------------------------------


@triton.jit
def number(bits, T: tl.constexpr):
    """A float argument. It comes as the bits of an fp64, because Triton would round a float to fp32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(T)


@triton.jit
def pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    p = address.to(tl.int64).to(tl.pointer_type(TYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def load(address, at, here, S: tl.constexpr, ALIGNED: tl.constexpr):
    """Values in storage type; zeros where there is no memory, or the row has ended."""
    return tl.load(pointer(address, S, ALIGNED) + at, mask=here & (address != 0), other=0.0)


@triton.jit
def store(address, at, here, x, S: tl.constexpr, ALIGNED: tl.constexpr):
    tl.store(pointer(address, S, ALIGNED) + at, x.to(S), mask=here & (address != 0))


@triton.jit
def column(row, i: tl.constexpr):
    return tl.load(pointer(row, tl.float64) + i)


@triton.jit
def load_row(table, k):
    """(segment, begin, offset, numel, group), as in csrc/segments.h."""
    row = pointer(table, tl.int64) + k * 5
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def in_flat(base, offset, S: tl.constexpr):
    """The address of a row in a flat buffer; 0 where there is no buffer."""
    return tl.where(base != 0, base + offset * (S.primitive_bitwidth // 8), 0).to(tl.int64)


@triton.jit
def in_list(pointers, segment, begin, S: tl.constexpr):
    """The address of a row in a list of tensors; 0 where there is no list, or no tensor in it."""
    return in_flat(tl.load(pointer(pointers, tl.int64) + segment, mask=pointers != 0, other=0), begin, S)


@triton.jit
def in_lists(pointers, segments, segment, begin, S: tl.constexpr, COUNT: tl.constexpr):
    """The same in several lists that stand one after the other."""
    return [in_list(pointers + k * segments * 8, segment, begin, S) for k in (0, 1, 2, 3, 4, 5, 6)[:COUNT]]


@triton.jit
def bytes_of(sizes, segment, S: tl.constexpr):
    """From one micro-batch of a stack to the next; 0 where there are no stacks."""
    return tl.load(pointer(sizes, tl.int64) + segment, mask=sizes != 0, other=0) * (S.primitive_bitwidth // 8)


@triton.jit
def of_micro_batch(address, bytes, i):
    return tl.where(address != 0, address + i * bytes, 0)


@triton.jit
def union(addresses, COUNT: tl.constexpr):
    """Every bit of any of them: a multiple of 16 if all are, 0 if all are."""
    bits = tl.full([], 0, tl.int64)
    for k in tl.static_range(COUNT):
        bits = bits | addresses[k]
    return bits


@triton.jit
def is_aligned(bits):
    """Whether all addresses are multiples of 16, as 1 or 0."""
    return tl.where(bits % 16 == 0, 1, 0)


@triton.jit
def length(numel, ALIGNED: tl.constexpr):
    if ALIGNED:
        numel = numel // 16 * 16  # the same, and the compiler knows: whole vectors are in or out
    return numel


@triton.jit
def load_status(status, k):
    return tl.load(pointer(status, tl.uint8) + k, mask=status != 0, other=0)


@triton.jit
def store_status(status, k, value, where):
    tl.debug_barrier()  # every thread has read it
    tl.store(pointer(status, tl.uint8) + k, value, mask=where & (status != 0))


# ---- sums: a value, and beside it what roundings lost where T is fp64, see csrc/update_math.h ----------------------------


@triton.jit
def careful_sum(x, lost_of_x, y, lost_of_y):
    value = x + y
    arrived = value - x
    return value, lost_of_x + lost_of_y + ((x - (value - arrived)) + (y - arrived))


@triton.jit
def plus(value, lost, x, T: tl.constexpr):
    """(value, lost) with x."""
    if T.primitive_bitwidth == 64:
        value, lost = careful_sum(value, lost, x, 0.0)
    else:
        value = value + x
    return value, lost


@triton.jit
def correction(lost):
    return tl.where(is_finite(lost), lost, 0.0)


@triton.jit
def lanes_of_sum(BLOCK: tl.constexpr, T: tl.constexpr):
    """Zeros to add blocks to."""
    return tl.zeros([BLOCK if T.primitive_bitwidth == 64 else THREADS], tl.float64)


@triton.jit
def plus_block(value, lost, x, T: tl.constexpr):
    if (
        T.primitive_bitwidth != 64
    ):  # the elements of each thread first: one sum for each of them would not fit the registers
        x = tl.sum(tl.reshape(x, [THREADS, x.shape[0] // THREADS]), 1)
    return plus(value, lost, x, T)


@triton.jit
def added_up(value, lost, T: tl.constexpr):
    """(value, lost) of all lanes together."""
    if T.primitive_bitwidth == 64:
        value, lost = tl.reduce((value, lost), 0, careful_sum)
    else:
        value, lost = tl.sum(value, 0), 0.0
    return value, lost


@triton.jit
def total(terms, n, T: tl.constexpr):
    """The sum of a list of fp64, in one order for all programs."""
    LANES: tl.constexpr = 1024
    lanes = tl.arange(0, LANES)
    value = tl.zeros([LANES], tl.float64)
    lost = value
    for i in range(0, n, LANES):
        x = tl.load(pointer(terms, tl.float64) + i + lanes, mask=lanes < n - i, other=0.0)
        value, lost = plus(value, lost, x, T)
    value, lost = added_up(value, lost, T)
    return value + correction(lost)


@triton.jit
def entry(sums, i):
    """Entry i of eight numbers."""
    return tl.sum(tl.where(tl.arange(0, 8) == i, sums, 0.0), 0)


# ---- norm, perturb, and both in one launch. S: storage type, T: arithmetic type ---------------------------------------


@triton.jit
def norm_of_row(
    w, g, ema, numel, sigma, eta, S: tl.constexpr, T: tl.constexpr,
    FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    numel = length(numel, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    value = lanes_of_sum(BLOCK, T)
    lost = value
    for i in range(0, numel, BLOCK):
        at, here = i + lanes, lanes < numel - i
        d = load(g, at, here, S, ALIGNED).to(T)
        if FRIENDLY:
            d = residual(d, load(ema, at, here, S, ALIGNED).to(T), sigma)
        if ADAPTIVE:
            d = stretch(load(w, at, here, S, ALIGNED).to(T), eta) * d
        wide = d.to(tl.float64)
        value, lost = plus_block(value, lost, wide * wide, T)
    return added_up(value, lost, T)


@triton.jit
def norm_of_micro_batch(
    out, program, programs, i, table, rows, flat_weights, weights, grads, sizes, ema, sigma, eta,
    S: tl.constexpr, T: tl.constexpr, FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    value = tl.full([], 0.0, tl.float64)
    lost = value
    for k in range(program, rows, programs):
        segment, begin, offset, numel, _ = load_row(table, k)
        w, g = in_flat(flat_weights, offset, S) + in_list(weights, segment, begin, S), in_list(grads, segment, begin, S)
        g, e = of_micro_batch(g, bytes_of(sizes, segment, S), i), in_flat(ema, offset, S)
        numel = tl.where(g != 0, numel, 0)
        for ALIGNED in tl.static_range(2):
            if is_aligned(w | g | e | numel) == ALIGNED:
                of_row, lost_of_row = norm_of_row(
                    w, g, e, numel, number(sigma, T), number(eta, T), S, T, FRIENDLY, ADAPTIVE,
                    BLOCK if ALIGNED else BLOCK // 4, ALIGNED,
                )  # fmt: skip
                value, lost = plus(value, lost + lost_of_row, of_row, T)
    place = pointer(out, tl.float64) + program
    tl.store(place, value)
    if T.primitive_bitwidth == 64:
        tl.store(place + programs, correction(lost))


@triton.jit
def norm_of_program(
    out, program, programs, first, last, table, rows, flat_weights, weights, grads, sizes, ema, sigma, eta,
    S: tl.constexpr, T: tl.constexpr, FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, STACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of every micro-batch of a stack from ``first`` to ``last``, whose terms are in a row of their own."""
    if STACKED:
        bytes = programs * (16 if T.primitive_bitwidth == 64 else 8)
        for i in range(first, last):
            norm_of_micro_batch(
                out + (i - first) * bytes, program, programs, i, table, rows, flat_weights, weights, grads, sizes, ema, sigma,
                eta, S, T, FRIENDLY, ADAPTIVE, BLOCK,
            )  # fmt: skip
    else:
        norm_of_micro_batch(
            out, program, programs, 0, table, rows, flat_weights, weights, grads, sizes, ema, sigma, eta, S, T, FRIENDLY,
            ADAPTIVE, BLOCK,
        )  # fmt: skip


@_kernel
def norm_kernel(
    out: tl.int64, first: tl.int64, last: tl.int64, table: tl.int64, rows: tl.int64, flat_weights: tl.int64,
    weights: tl.int64, grads: tl.int64, sizes: tl.int64, ema: tl.int64, sigma: tl.int64, eta: tl.int64,
    S: tl.constexpr, T: tl.constexpr, FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, STACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    norm_of_program(
        out, tl.program_id(0), tl.num_programs(0), first, last, table, rows, flat_weights, weights, grads, sizes, ema, sigma,
        eta, S, T, FRIENDLY, ADAPTIVE, STACKED, BLOCK,
    )  # fmt: skip


@triton.jit
def picked_by(mask, offset, i, lanes, here):
    """Bit k of byte j is that of element 8·j + k; i is a multiple of 8."""
    bit = (offset % 8).to(tl.int32) + lanes
    bytes = tl.load(pointer(mask, tl.uint8) + (offset + i) // 8 + bit // 8, mask=here, other=0)
    return ((bytes.to(tl.int32) >> bit % 8) & 1) != 0


@triton.jit
def load_noise(noise, segment, begin, draw):
    """The seed in two parts, the parameter's number, the step and the draw; and the row's first element."""
    row = pointer(noise, tl.int64)
    seed, step, own = tl.load(row), tl.load(row + 1), row + NOISE_COLUMNS * (1 + segment)
    number, first = tl.load(own), tl.load(own + 1)
    words = (
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32), number.to(tl.uint32), step.to(tl.uint32), draw.to(tl.uint32),
    )  # fmt: skip
    return words, first + begin


@triton.jit
def of_noise(noise, segment, begin, draw, STOCHASTIC: tl.constexpr):
    """``load_noise``, or what stands for it without any."""
    if STOCHASTIC:
        words, place = load_noise(noise, segment, begin, draw)
    else:
        nothing = tl.full([], 0, tl.uint32)
        words, place = (nothing, nothing, nothing, nothing, nothing), tl.full([], 0, tl.int64)
    return words, place


@triton.jit
def halves(word):
    """The lower, then the upper, in a new last dimension."""
    return tl.join(word & 0xFFFF, word >> 16)


@triton.jit
def draws(words, at, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """16 random bits for each of BLOCK elements from ``at`` on, in uint32; ``ALIGNED``: from a multiple of 8."""
    key0, key1, number, step, draw = words
    if ALIGNED:
        calls = at // DRAWS + tl.arange(0, BLOCK // DRAWS)
        zeros = tl.zeros([BLOCK // DRAWS], tl.uint32)
        c0, c1, c2, c3 = philox(calls.to(tl.uint32), zeros + number, zeros + step, zeros + draw, key0, key1)
        joined = tl.join(tl.join(halves(c0), halves(c1)), tl.join(halves(c2), halves(c3)))  # [calls, half, word, pair]
        random = tl.reshape(tl.permute(joined, (0, 3, 2, 1)), [BLOCK])
    else:
        k = at + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], tl.uint32)
        c0, c1, c2, c3 = philox((k // DRAWS).to(tl.uint32), zeros + number, zeros + step, zeros + draw, key0, key1)
        k = k % DRAWS
        word = tl.where(k < 4, tl.where(k < 2, c0, c1), tl.where(k < 6, c2, c3))
        random = tl.where(k % 2 == 0, word & 0xFFFF, word >> 16)
    return random


@triton.jit
def rounded_to(
    x, words, at, S: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    return at_random(x, draws(words, at, BLOCK, ALIGNED), S) if STOCHASTIC else x.to(S)


@triton.jit
def load_start(w, saved, at, here, status, S: tl.constexpr, M: tl.constexpr, ALIGNED: tl.constexpr):
    """What weights start from, and in storage type. Of masters one that is another than what is kept is kept from now on."""
    if M == S:
        start = load(tl.where(status == PERTURBED, saved, w), at, here, S, ALIGNED)
        rounded = start
    else:
        kept, now = load(saved, at, here, M, ALIGNED), load(w, at, here, S, ALIGNED)
        rounded, perturbed = kept.to(S), status == PERTURBED
        start = tl.where(perturbed, kept, master(kept, rounded, now))
        rounded = tl.where(perturbed, rounded, now)
        changes = start.to(tl.int32, bitcast=True) != kept.to(tl.int32, bitcast=True)
        store(saved, at, here & changes, start, M, ALIGNED)
    return start, rounded


@triton.jit
def perturb_row(
    w, g, saved, ema, mask, offset, numel, status, finite, renew, numbers, words, first, achieved, rows,
    S: tl.constexpr, M: tl.constexpr, T: tl.constexpr, FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Leaves the row's part of the achieved norm, squared; of 16 bits beside it those of two other sums."""
    scale, sigma, eta, lmbda, one_minus_lmbda = numbers
    numel = length(numel, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    SUMS: tl.constexpr = ACHIEVED if S.primitive_bitwidth == 16 else 1
    sums = [lanes_of_sum(BLOCK, tl.float32) for _ in (0, 1, 2)[:SUMS]]  # of which no coefficient is made
    for i in range(0, numel, BLOCK):
        at, here = i + lanes, lanes < numel - i
        start, stored = load_start(w, saved, at, here, status, S, M, ALIGNED)
        d = load(g, at, here, S, ALIGNED).to(T)
        if M == S:
            store(saved, at, here & (status == UNTOUCHED), stored, S, ALIGNED)
        if FRIENDLY:
            average = load(ema, at, here, S, ALIGNED).to(T)
            store(ema, at, here & finite & renew, ema_next(average, d, lmbda, one_minus_lmbda), S, ALIGNED)
            d = residual(d, average, sigma)
        picked = here & finite
        if MASKED:
            picked = picked & picked_by(mask, offset, i, lanes, here)
        before = stored.to(T)
        e = perturbation(before, d, scale, eta, ADAPTIVE)
        rounded = rounded_to(start.to(T) + e, words, first + i, S, STOCHASTIC, BLOCK, ALIGNED)
        result = tl.where(picked, rounded, stored)
        # Whole vectors, where a mask picks too.
        store(w, at, here & (finite | (status == PERTURBED)), result, S, ALIGNED)
        after = result.to(T)
        moved = here & finite & truth(after != before)  # inf - inf is NaN
        change = tl.where(moved, after - before, 0.0).to(tl.float64)
        following = [plus_block(sums[0], sums[0], change * change, tl.float32)[0]]
        if SUMS > 1:
            asked = tl.where(picked, e, 0.0).to(tl.float64)
            following += [plus_block(sums[1], sums[1], change * asked, tl.float32)[0]]
            following += [plus_block(sums[2], sums[2], asked * asked, tl.float32)[0]]
        sums = following
    for r in tl.static_range(SUMS):
        tl.store(pointer(achieved, tl.float64) + r * rows, tl.sum(sums[r], 0))


@triton.jit
def perturb_copies(
    k, segment, begin, offset, numel, group, first, last, rows, norm_sq, norm_terms, radii, copies, stride, grads, sizes, saved,
    achieved_sq, ema, mask, noise, draw, renew, sigma, eta, lmbda, one_minus_lmbda, S: tl.constexpr, T: tl.constexpr,
    FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of a stack: w, which is ``saved``, stays in cache while one micro-batch after the other becomes w + e beside it."""
    s, e = in_flat(saved, offset, S), in_flat(ema, offset, S)
    bytes, of_all = bytes_of(sizes, segment, S), in_list(grads, segment, begin, S)
    radius = pointer(radii, tl.float64) + group * RADIUS_COLUMNS
    rho, budget = tl.load(radius), tl.load(radius + 1)
    for i in range(first, last):
        norm = total(norm_sq + (i - first) * norm_terms * 8, norm_terms, T)
        w, g = in_flat(copies, i * stride + offset, S), of_micro_batch(of_all, bytes, i)
        numbers = (
            ascent_scale(norm, rho, budget).to(T), number(sigma, T), number(eta, T), number(lmbda, T),
            number(one_minus_lmbda, T),
        )  # fmt: skip
        words, place = of_noise(noise, segment, begin, draw + i, STOCHASTIC)
        sums: tl.constexpr = ACHIEVED if S.primitive_bitwidth == 16 else 1
        achieved = achieved_sq + ((i - first) * sums * rows + k) * 8
        for ALIGNED in tl.static_range(2):
            if is_aligned(w | g | s | e | numel | place % DRAWS) == ALIGNED:
                perturb_row(
                    w, g, s, e, mask, offset, numel, PERTURBED, is_finite(norm) & (g != 0), renew != 0, numbers, words, place,
                    achieved, rows, S, S, T, FRIENDLY, ADAPTIVE, MASKED, STOCHASTIC, BLOCK if ALIGNED else BLOCK // 4, ALIGNED,
                )  # fmt: skip
        tl.debug_barrier()  # the mean has been written


@triton.jit
def perturb_by_program(
    program, programs, first, last, table, rows, norm_sq, norm_terms, radii, flat_weights, weights, stride, grads, sizes, saved,
    status, achieved_sq, ema, mask, noise, draw, renew, sigma, eta, lmbda, one_minus_lmbda, S: tl.constexpr, M: tl.constexpr,
    T: tl.constexpr, FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr, STOCHASTIC: tl.constexpr,
    STACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if STACKED:
        for before in range(program, rows, programs):
            k = rows - 1 - before
            segment, begin, offset, numel, group = load_row(table, k)
            perturb_copies(
                k, segment, begin, offset, numel, group, first, last, rows, norm_sq, norm_terms, radii, flat_weights, stride,
                grads, sizes, saved, achieved_sq, ema, mask, noise, draw, renew, sigma, eta, lmbda, one_minus_lmbda, S, T,
                FRIENDLY, ADAPTIVE, MASKED, STOCHASTIC, BLOCK,
            )  # fmt: skip
    else:
        perturb_in_place(
            program, programs, table, rows, norm_sq, norm_terms, radii, flat_weights, weights, grads, saved, status,
            achieved_sq, ema, mask, noise, draw, renew, sigma, eta, lmbda, one_minus_lmbda, S, M, T, FRIENDLY, ADAPTIVE,
            MASKED, STOCHASTIC, BLOCK,
        )  # fmt: skip


@triton.jit
def perturb_in_place(
    program, programs, table, rows, norm_sq, norm_terms, radii, flat_weights, weights, grads, saved, status, achieved_sq,
    ema, mask, noise, draw, renew, sigma, eta, lmbda, one_minus_lmbda, S: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norm = total(norm_sq, norm_terms, T)
    for before in range(program, rows, programs):
        k = rows - 1 - before  # backwards: what the norm read last may still be in the L2 cache
        segment, begin, offset, numel, group = load_row(table, k)
        w, g = in_flat(flat_weights, offset, S) + in_list(weights, segment, begin, S), in_list(grads, segment, begin, S)
        s, e = in_flat(saved, offset, M), in_flat(ema, offset, S)
        there, was = (w != 0) & (g != 0), load_status(status, k)
        numel = tl.where(there, numel, 0)
        radius = pointer(radii, tl.float64) + group * RADIUS_COLUMNS
        scale = ascent_scale(norm, tl.load(radius), tl.load(radius + 1)).to(T)
        numbers = scale, number(sigma, T), number(eta, T), number(lmbda, T), number(one_minus_lmbda, T)
        words, place = of_noise(noise, segment, begin, draw, STOCHASTIC)
        for ALIGNED in tl.static_range(2):
            if is_aligned(w | g | s | e | numel | place % DRAWS) == ALIGNED:
                perturb_row(
                    w, g, s, e, mask, offset, numel, was, is_finite(norm), renew != 0, numbers, words, place,
                    achieved_sq + k * 8, rows, S, M, T, FRIENDLY, ADAPTIVE, MASKED, STOCHASTIC,
                    BLOCK if ALIGNED else BLOCK // 4, ALIGNED,
                )  # fmt: skip
        store_status(status, k, PERTURBED, there)


@_kernel
def perturb_kernel(
    first: tl.int64, last: tl.int64, table: tl.int64, rows: tl.int64, norm_sq: tl.int64, norm_terms: tl.int64, radii: tl.int64,
    flat_weights: tl.int64, weights: tl.int64, stride: tl.int64, grads: tl.int64, sizes: tl.int64, saved: tl.int64,
    status: tl.int64, achieved_sq: tl.int64, ema: tl.int64, mask: tl.int64, noise: tl.int64, draw: tl.int64, renew: tl.int64,
    sigma: tl.int64, eta: tl.int64, lmbda: tl.int64, one_minus_lmbda: tl.int64,
    S: tl.constexpr, M: tl.constexpr, T: tl.constexpr, FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr,
    STOCHASTIC: tl.constexpr, STACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    perturb_by_program(
        tl.program_id(0), tl.num_programs(0), first, last, table, rows, norm_sq, norm_terms, radii, flat_weights, weights,
        stride, grads, sizes, saved, status, achieved_sq, ema, mask, noise, draw, renew, sigma, eta, lmbda, one_minus_lmbda, S,
        M, T, FRIENDLY, ADAPTIVE, MASKED, STOCHASTIC, STACKED, BLOCK,
    )  # fmt: skip


@_kernel
def ascend_kernel(
    arrived: tl.int64, first: tl.int64, last: tl.int64, table: tl.int64, rows: tl.int64, norm_sq: tl.int64,
    norm_terms: tl.int64, radii: tl.int64, flat_weights: tl.int64, weights: tl.int64, stride: tl.int64, grads: tl.int64,
    sizes: tl.int64, saved: tl.int64, status: tl.int64, achieved_sq: tl.int64, ema: tl.int64, mask: tl.int64,
    noise: tl.int64, draw: tl.int64, renew: tl.int64, sigma: tl.int64, eta: tl.int64, lmbda: tl.int64,
    one_minus_lmbda: tl.int64,
    S: tl.constexpr, M: tl.constexpr, T: tl.constexpr, FRIENDLY: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr,
    STOCHASTIC: tl.constexpr, STACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The programs of the norm, and behind them as many of the perturbation, which wait for them: see csrc/cuda/kernels.cuh.

    Here a program's number is the order in which it began, which nobody has to promise. ``arrived`` counts those that have
    begun from bit 16 on, and below it those that are done.
    """
    half, count = tl.num_programs(0) // 2, pointer(arrived, tl.int32)
    program = tl.atomic_add(count, 65536, sem="relaxed") // 65536
    if program < half:
        norm_of_program(
            norm_sq, program, half, first, last, table, rows, saved if STACKED else flat_weights, weights, grads, sizes, ema,
            sigma, eta, S, T, FRIENDLY, ADAPTIVE, STACKED, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(count, 1, sem="release")
    else:
        while tl.atomic_add(count, 0, sem="acquire") % 65536 < half:
            pass
        tl.debug_barrier()
        perturb_by_program(
            program - half, half, first, last, table, rows, norm_sq, norm_terms, radii, flat_weights, weights, stride, grads,
            sizes, saved, status, achieved_sq, ema, mask, noise, draw, renew, sigma, eta, lmbda, one_minus_lmbda, S, M, T,
            FRIENDLY, ADAPTIVE, MASKED, STOCHASTIC, STACKED, BLOCK,
        )  # fmt: skip
        if tl.atomic_add(count, 1, sem="relaxed") % 65536 == 2 * half - 1:
            tl.store(count, 0)


# ---- gram -----------------------------------------------------------------------------------------------------------------


@triton.jit
def gram_of_row(
    xs, numel, S: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The row's part of x·x, x·y, y·y, x·z, y·z and z·z, the first of eight numbers; and what was lost of each."""
    numel = length(numel, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    sums = [lanes_of_sum(BLOCK, T) for _ in (0, 1, 2, 3, 4, 5)[: COUNT * (COUNT + 1) // 2]]
    lost = sums
    for i in range(0, numel, BLOCK):
        at, here = i + lanes, lanes < numel - i
        values = [load(x, at, here, S, ALIGNED).to(tl.float64) for x in xs]
        following, lost_then = [], []
        for v in tl.static_range(COUNT):
            for u in tl.static_range(v + 1):
                x, of_x = plus_block(sums[v * (v + 1) // 2 + u], lost[v * (v + 1) // 2 + u], values[u] * values[v], T)
                following += [x]
                lost_then += [of_x]
        sums, lost = following, lost_then
    out, lost_out = tl.zeros([8], tl.float64), tl.zeros([8], tl.float64)
    for v in tl.static_range(COUNT):
        for u in tl.static_range(v + 1):
            there = (xs[u] != 0) & (xs[v] != 0)  # what one holds may be infinite, and 0 times that is NaN
            this = there & (tl.arange(0, 8) == v * (v + 1) // 2 + u)
            x, of_x = added_up(sums[v * (v + 1) // 2 + u], lost[v * (v + 1) // 2 + u], T)
            out, lost_out = tl.where(this, x, out), tl.where(this, of_x, lost_out)
    return out, lost_out


@triton.jit
def gram_of_micro_batch(
    out, i, table, rows, terms, segments, sizes, S: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    sums, lost, lanes = tl.zeros([8], tl.float64), tl.zeros([8], tl.float64), tl.arange(0, 8)
    for k in range(tl.program_id(0), rows, tl.num_programs(0)):
        segment, begin, _offset, numel, _group = load_row(table, k)
        bytes = bytes_of(sizes, segment, S)
        xs = [of_micro_batch(first, bytes, i) for first in in_lists(terms, segments, segment, begin, S, COUNT)]
        for ALIGNED in tl.static_range(2):
            if is_aligned(union(xs, COUNT) | numel) == ALIGNED:
                x, of_x = gram_of_row(xs, numel, S, T, COUNT, BLOCK if ALIGNED else BLOCK // 4, ALIGNED)
                sums, lost = plus(sums, lost + of_x, x, T)
    parts: tl.constexpr = 2 if T.primitive_bitwidth == 64 else 1
    place = pointer(out, tl.float64) + lanes * parts * tl.num_programs(0) + tl.program_id(0)
    here = lanes < COUNT * (COUNT + 1) // 2
    tl.store(place, sums, mask=here)
    if T.primitive_bitwidth == 64:
        tl.store(place + tl.num_programs(0), correction(lost), mask=here)


@_kernel
def gram_kernel(
    out: tl.int64, last: tl.int64, table: tl.int64, rows: tl.int64, terms: tl.int64, segments: tl.int64, sizes: tl.int64,
    S: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr, STACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if STACKED:
        bytes = tl.num_programs(0) * (16 if T.primitive_bitwidth == 64 else 8) * (COUNT * (COUNT + 1) // 2)
        for i in range(0, last):
            gram_of_micro_batch(out + i * bytes, i, table, rows, terms, segments, sizes, S, T, COUNT, BLOCK)
    else:
        gram_of_micro_batch(out, 0, table, rows, terms, segments, sizes, S, T, COUNT, BLOCK)


# ---- descend and update ---------------------------------------------------------------------------------------------------


@triton.jit
def coefficients_of_sums(combination, i, T: tl.constexpr, COUNT: tl.constexpr):
    """The coefficients, the first of eight numbers. ``combination`` is what ``_combination`` writes on the host.

    i: the micro-batch, where each has sums of its own.
    """
    row, words = pointer(combination, tl.float64), pointer(combination, tl.int64) + COUNT * COEFFICIENT_COLUMNS
    gram, rescale, rows = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    lanes = tl.arange(0, 8)
    sums, c = tl.zeros([8], tl.float64), tl.zeros([8], tl.float64)
    for r in range(0, rows):
        of_r = words + 3 + 3 * r
        sums = tl.where(lanes == r, total(tl.load(of_r) + i * tl.load(of_r + 2), tl.load(of_r + 1), T), sums)
    for k in range(0, COUNT):
        c = tl.where(lanes == k, coefficient(row + k * COEFFICIENT_COLUMNS, sums), c)
    if rescale >= 0:
        c = tl.where(lanes < gram, c * rescale_factor(c, sums, gram, rescale), c)
    poison = tl.sum(tl.where(lanes < gram * (gram + 1) // 2, sums - sums, 0.0), 0)  # NaN where the matrix is not finite
    return (c + poison) * tl.load(row + lanes * COEFFICIENT_COLUMNS, mask=lanes < COUNT, other=0.0)


@triton.jit
def coefficients(
    c0, c1, c2, c3, combination, norm_sq, norm_terms, i, T: tl.constexpr, COUNT: tl.constexpr, SUMS: tl.constexpr
):  # fmt: skip
    """The coefficients: the arguments, or worked out from the sums where there are some. NaN if the norm is not finite."""
    norm = total(norm_sq + i * norm_terms * 8, norm_terms, T)
    if SUMS:
        evaluated = coefficients_of_sums(combination, i, T, COUNT)
        c = [entry(evaluated, k) for k in (0, 1, 2, 3)[:COUNT]]
    else:
        c = [number(bits, tl.float64) for bits in (c0, c1, c2, c3)[:COUNT]]
    return [(x + (norm - norm)).to(T) for x in c]


@_kernel
def weigh_kernel(
    shares: tl.int64, count: tl.int64, c0: tl.int64, c1: tl.int64, c2: tl.int64, c3: tl.int64, sums: tl.int64,
    norm_sq: tl.int64, norm_terms: tl.int64, out: tl.int64, COUNT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The coefficients of a micro-batch's terms, one program for each."""
    i = tl.program_id(0)
    share = tl.load(pointer(shares, tl.float64) + i)
    c = coefficients(c0, c1, c2, c3, sums, norm_sq, norm_terms, i, tl.float64, COUNT, SUMS)
    for k in tl.static_range(COUNT):
        tl.store(pointer(out, tl.float64) + k * count + i, c[k] * share)


@triton.jit
def combination(
    xs, c, shares, micro_batches, bytes, at, here, S: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr, STACKS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Σ cₖ xₖ; 0 where no term is there. The first ``STACKS`` are stacks, added up micro-batch by micro-batch."""
    sum, begun = tl.zeros(at.shape, T), tl.full([], False, tl.int1)
    if STACKS > 0:
        for i in range(0, micro_batches):
            for k in tl.static_range(STACKS):
                share = tl.load(pointer(shares, tl.float64) + k * micro_batches + i).to(T)
                counts = (xs[k] != 0) & truth(share != 0)
                term = weighted(load(xs[k] + i * bytes, at, here & counts, S, ALIGNED).to(T), share)
                sum = tl.where(counts, tl.where(begun, sum + term, term), sum)
                begun = begun | counts
    for k in tl.static_range(COUNT):
        counts = (xs[STACKS + k] != 0) & truth(c[k] != 0)
        term = weighted(load(xs[STACKS + k], at, here & counts, S, ALIGNED).to(T), c[k])
        sum = tl.where(counts, tl.where(begun, sum + term, term), sum)  # 0 + -0 would not be -0
        begun = begun | counts
    return sum


@triton.jit
def is_only(out, xs, c, COUNT: tl.constexpr):
    """Whether the combination is ``out`` as it stands: ``out`` is the only term, with coefficient 1."""
    others, itself = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for k in tl.static_range(COUNT):
        counts, same = (xs[k] != 0) & truth(c[k] != 0), (xs[k] == out) & truth(c[k] == 1)
        itself += tl.where(counts & same, 1, 0)
        others += tl.where(counts & (same == 0), 1, 0)
    return (itself == 1) & (others == 0)


@triton.jit
def descend_row(
    w, saved, out, xs, c, shares, micro_batches, bytes, numel, reads, writes, S: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    COUNT: tl.constexpr, STACKS: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The row's part of the squared norm of what ``out`` becomes."""
    numel = length(numel, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    value = lanes_of_sum(BLOCK, T)
    lost = value
    for i in range(0, numel, BLOCK):
        at, here = i + lanes, lanes < numel - i
        before = load(saved, at, here, M, ALIGNED)
        x = combination(xs, c, shares, micro_batches, bytes, at, here & reads, S, T, COUNT, STACKS, ALIGNED).to(S)
        store(w, at, here, before, S, ALIGNED)
        store(out, at, here & writes, x, S, ALIGNED)
        if SQUARED:
            wide = tl.where(here & reads, x.to(tl.float64), 0.0)
            value, lost = plus_block(value, lost, wide * wide, T)
    if SQUARED:
        value, lost = added_up(value, lost, T)
        square = value + correction(lost)
    else:
        square = 0.0
    return square


@_kernel
def descend_kernel(
    table: tl.int64, rows: tl.int64, flat_weights: tl.int64, weights: tl.int64, saved: tl.int64, status: tl.int64,
    terms: tl.int64, segments: tl.int64, c0: tl.int64, c1: tl.int64, c2: tl.int64, c3: tl.int64, sums: tl.int64,
    norm_sq: tl.int64, norm_terms: tl.int64, shares: tl.int64, micro_batches: tl.int64, sizes: tl.int64, outs: tl.int64,
    last: tl.int64, out_sq: tl.int64, S: tl.constexpr, M: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr,
    STACKS: tl.constexpr, SUMS: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = STACKS + COUNT
    c = coefficients(c0, c1, c2, c3, sums, norm_sq, norm_terms, 0, T, COUNT, SUMS)
    for k in range(tl.program_id(0), rows, tl.num_programs(0)):
        segment, begin, offset, numel, _ = load_row(table, k)
        w, s = in_flat(flat_weights, offset, S) + in_list(weights, segment, begin, S), in_flat(saved, offset, M)
        was, listed = load_status(status, k), w != 0
        restored = listed & (was == PERTURBED)
        w, s = tl.where(restored, w, 0), tl.where(restored, s, 0)
        o, xs = in_list(outs, segment, begin, S), in_lists(terms, segments, segment, begin, S, ALL)
        bytes, writes = bytes_of(sizes, segment, S), o != 0
        if STACKS == 0:
            writes = writes & (is_only(o, xs, c, COUNT) == 0)
        reads = (o != 0) if SQUARED else writes
        numel = tl.where(restored | reads, numel, 0)
        for ALIGNED in tl.static_range(2):
            if is_aligned(w | s | o | union(xs, ALL) | bytes | numel) == ALIGNED:
                square = descend_row(
                    w, s, o, xs, c, shares, micro_batches, bytes, numel, reads, writes, S, M, T, COUNT, STACKS, SQUARED,
                    BLOCK if ALIGNED else BLOCK // 4, ALIGNED,
                )  # fmt: skip
                if SQUARED:
                    tl.store(pointer(out_sq, tl.float64) + k, square)
        following = tl.where((last == 0) & (was != UNTOUCHED), SAVED, UNTOUCHED)
        store_status(status, k, following, listed)


@triton.jit
def update_row(
    w, saved, status, xs, states, ahead, rate, c, shares, micro_batches, bytes, settings, numel, there, S: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, COUNT: tl.constexpr, STACKS: tl.constexpr, STATES: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    numel = length(numel, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    for i in range(0, numel, BLOCK):
        at, here = i + lanes, lanes < numel - i
        before, _rounded = load_start(w, saved, at, here, status, S, M, ALIGNED)
        g = combination(xs, c, shares, micro_batches, bytes, at, here, S, T, COUNT, STACKS, ALIGNED)
        values = [load(state, at, here, M, ALIGNED).to(T) for state in states]
        if RULE == SGD:
            x, values = sgd(before.to(T), g, values, settings, STATES)
        else:
            x, values = adam(before.to(T), g, values, settings, STATES)
        for k in tl.static_range(STATES):
            store(states[k], at, here, values[k], M, ALIGNED)
        if SHIFTED:
            moves = ahead != 0
            gap = (load(ahead, at, here & moves, S, ALIGNED).to(T) - g).to(S).to(T)
            stored = x.to(S).to(T)
            x = tl.where(moves, stored + weighted(gap, rate), stored)
        after = tl.where(there, x.to(M), before)
        if M != S:
            store(saved, at, here & there, after, M, ALIGNED)
        store(w, at, here, after, S, ALIGNED)


@triton.jit
def count_steps(step, table, rows, terms, segments, COUNT: tl.constexpr):
    """The last program to arrive adds 1 for each parameter that has a term: every other one has read its step by then."""
    tl.debug_barrier()
    steps, ticket = pointer(step, tl.float32), pointer(step + segments * 4, tl.int32)
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        LANES: tl.constexpr = 1024
        lanes = tl.arange(0, LANES)
        for i in range(0, rows, LANES):
            row, here = pointer(table, tl.int64) + (i + lanes) * 5, lanes < rows - i
            here = here & (tl.load(row + 1, mask=here, other=1) == 0)  # it begins its parameter
            segment = tl.load(row, mask=here, other=0)
            bits = tl.zeros([LANES], tl.int64)
            for k in tl.static_range(COUNT):
                bits = bits | tl.load(pointer(terms, tl.int64) + k * segments + segment, mask=here, other=0)
            here = here & (bits != 0)
            tl.store(steps + segment, tl.load(steps + segment, mask=here, other=0.0) + 1, mask=here)
        tl.store(ticket, 0)


@_kernel
def update_kernel(
    table: tl.int64, rows: tl.int64, flat_weights: tl.int64, weights: tl.int64, saved: tl.int64, status: tl.int64,
    terms: tl.int64, segments: tl.int64, c0: tl.int64, c1: tl.int64, c2: tl.int64, c3: tl.int64, sums: tl.int64,
    norm_sq: tl.int64, norm_terms: tl.int64, shares: tl.int64, micro_batches: tl.int64, sizes: tl.int64, settings: tl.int64,
    columns: tl.int64, step: tl.int64, found_inf: tl.int64, aheads: tl.int64, rates: tl.int64, factor: tl.int64,
    state0: tl.int64, state1: tl.int64, state2: tl.int64, S: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    RULE: tl.constexpr, COUNT: tl.constexpr, STACKS: tl.constexpr, SUMS: tl.constexpr, STATES: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = STACKS + COUNT
    c = coefficients(c0, c1, c2, c3, sums, norm_sq, norm_terms, 0, T, COUNT, SUMS)
    updates = truth(tl.load(pointer(found_inf, tl.float32), mask=found_inf != 0, other=0.0) == 0)
    for k in range(tl.program_id(0), rows, tl.num_programs(0)):
        segment, begin, offset, numel, group = load_row(table, k)
        w, s = in_flat(flat_weights, offset, S) + in_list(weights, segment, begin, S), in_flat(saved, offset, M)
        was = load_status(status, k)
        restored = was == PERTURBED
        start = s if M != S else tl.where(restored, s, w)
        xs, bytes = in_lists(terms, segments, segment, begin, S, ALL), bytes_of(sizes, segment, S)
        there = updates & (union(xs, ALL) != 0)
        numel = tl.where((w != 0) & (there | restored), numel, 0)
        number_of_step = tl.load(pointer(step, tl.float32) + segment, mask=step != 0, other=0.0).to(tl.int64) + 1
        row = settings + group * columns * 8
        if RULE == SGD:
            numbers = sgd_settings(row, number_of_step, T)
            kept = tl.where(truth(numbers[1] != 0), state0, 0), state1, state2  # a momentum of 0 has no buffer
        else:
            numbers = adam_settings(row, number_of_step, T)
            kept = state0, state1, tl.where(numbers[3], state2, 0)  # nor has a group without amsgrad the third
        states = [in_flat(tl.where(there, state, 0), offset, M) for state in kept[:STATES]]
        ahead, rate = w * 0, 0.0
        if SHIFTED:
            ahead = in_list(aheads, segment, begin, S)
            rate = (number(factor, tl.float64) * tl.load(pointer(rates, tl.float64) + group)).to(T)
        for ALIGNED in tl.static_range(2):
            if is_aligned(w | start | ahead | union(xs, ALL) | bytes | union(states, STATES) | numel) == ALIGNED:
                update_row(
                    w, s, was, xs, states, ahead, rate, c, shares, micro_batches, bytes, numbers, numel, there, S, M, T, RULE,
                    COUNT, STACKS, STATES, SHIFTED,
                    BLOCK if ALIGNED else BLOCK // 4, ALIGNED,
                )  # fmt: skip
        store_status(status, k, UNTOUCHED, w != 0)
    if updates & (step != 0):
        count_steps(step, table, rows, terms, segments, ALL)


@_kernel
def write_words_kernel(
    table: tl.int64,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64, w6: tl.int64, w7: tl.int64,
    w8: tl.int64, w9: tl.int64, w10: tl.int64, w11: tl.int64, w12: tl.int64, w13: tl.int64, w14: tl.int64, w15: tl.int64,
):  # fmt: skip
    """Write sixteen words, which are arguments of the launch, into a table: a captured graph then holds them itself."""
    words = w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15
    for i in tl.static_range(16):
        tl.store(pointer(table, tl.int64) + i, words[i])


# ---- host -------------------------------------------------------------------------------------------------------------

PLATFORM = "hip" if torch.version.hip else "cuda" if torch.version.cuda else "other"
INTERPRETED = not isinstance(norm_kernel, triton.JITFunction)


def _bits(*numbers: float) -> tuple[int, ...]:
    return struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *numbers))


def compiler_options(kernel: Any, constants: Mapping[str, Any], platform: str = PLATFORM) -> dict[str, Any]:
    """Options of Triton's compiler: threads, no contraction, and the limit of registers."""
    found: dict[str, Any] = {"num_warps": THREADS.value // (64 if platform == "hip" else 32), "enable_fp_fusion": False}
    if platform == "cuda" and kernel.__name__ in REGISTERS:
        limits = [REGISTERS[kernel.__name__], *(n for option, n in MORE_REGISTERS.items() if constants.get(option))]
        limits += [128] if constants.get("STATES") == 3 or constants.get("COUNT") == TERMS else []
        if kernel.__name__ in ("perturb_kernel", "ascend_kernel") and constants["S"].primitive_bitwidth == 16:
            limits.append(128 if constants["FRIENDLY"] and (constants["STOCHASTIC"] or constants["ADAPTIVE"]) else 80)
        limits += [128] if constants.get("M", constants["S"]) != constants["S"] else []
        limits += [255] if constants["T"] == tl.float64 else []  # beyond 128 there is one program in any case
        found["maxnreg"] = max(limits)
    return found


def _launch(kernel: Any, programs: int, *args: int, **constants: Any) -> None:
    kernel[(programs,)](*args, **constants, **compiler_options(kernel, constants))


# Words, and where they are needed -> the device tensor that holds them.
_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
TABLES = 64
#: (lists, dtype, device) -> the addresses of all tensors, as bytes; None where one is not as it must be. Of the extension,
#: which the package has loaded where it is there; no backend knows another.
_dense_addresses: Callable[[list[list[Tensor]], torch.dtype, torch.device], bytes | None] | None = getattr(
    sys.modules.get("msam_kernels._C"), "addresses", None
)
_ready: set[torch.device] = set()  # devices on which the kernel that a capture needs is loaded


def _rows(stack: int | None) -> tuple[int, ...]:
    """The first dimension of what is there for each micro-batch of a stack."""
    return () if stack is None else (stack,)


class _Call:
    """What every operator shares: the table, checks, pointers, the device.

    The rows of ``table`` are on the device, where the host does not look: what they name must be there.
    """

    @classmethod
    def without_table(cls, shares: Tensor) -> "_Call":
        """Of numbers alone: ``shares`` says where."""
        call = cls.__new__(cls)
        call.tensor, call.device, call.dtype = shares, shares.device, torch.float64
        call.kind = None if call.device.type == "cpu" else torch.get_device_module(call.device)
        return call

    def __init__(self, table: Tensor, **lists: list[Tensor]):
        if not (table.dim() == 2 and table.shape[1] == 5 and table.dtype == torch.int64 and table.is_contiguous()):
            raise RuntimeError(
                f"table must be a contiguous int64 tensor of shape [rows, 5], got {table.dtype} of shape {list(table.shape)}"
            )
        tensors = next(filter(None, lists.values()), None)
        if tensors is None:
            raise RuntimeError(f"{' and '.join(lists)} missing: the lists are empty")
        check_values("table", table, table)
        self.tensor = table
        self.dtype, self.device, self.rows = tensors[0].dtype, table.device, len(table)
        self.kept = self.dtype  # of masters and states
        if self.dtype not in STORAGE:
            raise RuntimeError(f"dtype must be float32, float64, bfloat16 or float16, got {self.dtype}")
        self.table, self.programs = (table.data_ptr(), self.rows), min(self.rows, PROGRAMS)
        self.terms = self.programs * (2 if self.dtype == torch.float64 else 1)  # of a sum: values, and what was lost
        self.kind = None if self.device.type == "cpu" else torch.get_device_module(self.device)

    def launch(self, kernel: Any, *args: int, times: int = 1, **constants: Any) -> None:
        """``times``: the programs, of those that one pass over the rows takes."""
        double = self.dtype == torch.float64
        types = {"S": STORAGE[self.dtype], "T": tl.float64 if double else tl.float32, "BLOCK": BLOCK >> double}
        if self.rows:
            with self.on_device():
                _launch(kernel, times * self.programs, *args, **types, **constants)

    def sums(self, *several: int) -> Tensor:
        """The terms of a sum, or of several, still to be filled; zero for an empty table, which launches nothing."""
        if not self.rows:
            return torch.zeros(*several, 1, dtype=torch.float64, device=self.device)
        return torch.empty(*several, self.terms, dtype=torch.float64, device=self.device)

    def on_device(self) -> AbstractContextManager[Any]:
        """A context in which ``device`` is the current one, where Triton launches."""
        if self.kind is None or self.kind.current_device() == self.device.index:
            return nullcontext()
        device: AbstractContextManager[Any] = self.kind.device(self.device)
        return device

    def dense(self, name: str, t: Tensor | None, label: str = "", kept: bool = False) -> int:
        """The address of a tensor of weights, gradients and what is like them, or of what is ``kept``; 0 for None."""
        if t is None:
            return 0
        check_values(label or name, t, self.tensor)
        expected = self.kept if kept else self.dtype
        if t.dtype != expected:
            raise RuntimeError(f"{name} must be {expected} like the others, got {t.dtype}")
        if not (t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)):
            raise RuntimeError(f"{name} must be dense in memory, got strides {t.stride()}")
        return t.data_ptr()

    def saved(self, t: Tensor | None) -> int:
        """The address of saved weights, or of masters, as their dtype tells."""
        if t is not None and self.dtype.itemsize == 2 and t.dtype == torch.float32:
            self.kept = t.dtype
        return self.dense("saved", t, kept=True)

    def plain(self, name: str, t: Tensor | None, dtype: torch.dtype = torch.float64, dim: int = 1) -> int:
        """The address of a tensor of plain numbers; 0 for None."""
        if t is None:
            return 0
        check_values(name, t, self.tensor)
        if not (t.dim() == dim and t.dtype == dtype and t.is_contiguous()):
            raise RuntimeError(
                f"{name} must be a contiguous {dim}-d {dtype} tensor, got {t.dtype} of shape {list(t.shape)}"
            )
        return t.data_ptr()

    def per_row(self, name: str, t: Tensor | None, dtype: torch.dtype = torch.float64, stack: int | None = None) -> int:
        address = self.plain(name, t, dtype, 1 if stack is None else 2)
        if t is not None and t.shape[-1] != self.rows:
            raise RuntimeError(f"{name} must have one element per row of the table, {self.rows}, got {t.shape[-1]}")
        if t is not None and stack is not None:
            check_stack(name, t, stack)
        return address

    def achieved(self, t: Tensor, stack: int | None) -> int:
        """The address of the sums of a perturbation, by row; of 16-bit weights they are several."""
        if self.dtype.itemsize != 2:
            return self.per_row("achieved_sq", t, stack=stack)
        address = self.plain("achieved_sq", t, dim=2 if stack is None else 3)
        if t.shape[-2:] != (ACHIEVED.value, self.rows):
            raise RuntimeError(
                f"achieved_sq of 16-bit weights must have {ACHIEVED.value} sums for every row of the table, {self.rows}, got "
                f"shape {list(t.shape)}"
            )
        if stack is not None:
            check_stack("achieved_sq", t, stack)
        return address

    def noise(self, t: Tensor | None) -> int:
        if t is not None and self.dtype.itemsize != 2:
            raise RuntimeError(
                f"noise is for weights of 16 bits, got {str(self.dtype)[6:]}, where w + e is not rounded"
            )
        address = self.plain("noise", t, torch.int64, dim=2)
        if t is not None and (t.shape[1] != NOISE_COLUMNS.value or len(t) < self.segments + 1):
            raise RuntimeError(
                f"noise must have a row of {NOISE_COLUMNS.value} numbers, and one for each parameter, {self.segments + 1} in "
                f"all, got shape {list(t.shape)}"
            )
        return address

    def sizes(self, name: str, tensors: list[Tensor], stack: int | None, lists: int = 1) -> tuple[int, ...]:
        """The elements of a micro-batch, by segment, of lists of stacks one after the other; () where they are none."""
        if stack is None:
            return ()
        found = [0] * (len(tensors) // lists)
        for i, t in enumerate(tensors):
            if not t.numel():
                continue
            check_stack(f"{name}[{i}]", t, stack)
            size = t.numel() // stack
            before = found[i % len(found)]
            if before not in (0, size):
                raise RuntimeError(f"{name}[{i}] has {size} elements of a micro-batch, in another list it has {before}")
            found[i % len(found)] = size
        return tuple(found)

    def sum(self, name: str, t: Tensor | None, stack: int | None = None) -> tuple[int, int]:
        """(address, number of terms) of a sum that is one row, or one for each of a stack; zeros for None."""
        if t is not None and stack is not None:
            check_stack(name, t, stack)
        return self.plain(name, t, dim=1 if stack is None else 2), 0 if t is None else t.shape[-1]

    def pointers(
        self, weights: list[Tensor], count: int = 1, words: tuple[int, ...] = (), **lists: list[Tensor]
    ) -> list[int]:
        """Where the kernels find addresses: flat weights, pointers of listed weights, of each of ``lists``, and ``words``.

        What is absent is 0. ``words`` are integers that go along. The list that is called terms holds ``count`` lists.
        """
        flat, listed = (self.dense("weights", weights[0]), []) if len(weights) == 1 else (0, weights)
        lists = {"weights": listed, **lists}
        sizes = {name: len(tensors) / (count if name == "terms" else 1) for name, tensors in lists.items() if tensors}
        self.segments = int(next(iter(sizes.values()), 0))
        if any(size != self.segments for size in sizes.values()):
            raise RuntimeError(f"lists must have one tensor per parameter, got {sizes}")
        if not (sizes or words):
            return [flat, *(0 for _ in lists), 0]
        content, checked = self._addresses(lists)
        self.held = self._table(content + _bytes(words), None if checked else lists)  # lives as long as the call
        at, found = self.held.data_ptr(), [flat]
        for length in (*map(len, lists.values()), len(words)):
            found.append(at if length else 0)
            at += 8 * length
        return found

    def _addresses(self, lists: Mapping[str, list[Tensor]]) -> tuple[bytes, bool]:
        """Of every tensor, and whether all have been looked at: an address alone does not say that the values are there."""
        if _dense_addresses is not None:  # in C++
            content = _dense_addresses(list(lists.values()), self.dtype, self.device)
            if content is not None:
                return content, True
            self._check(lists)  # which passes where it is one that is empty, and so absent
        tensors = list(itertools.chain(*lists.values()))
        if not set(map(type, tensors)) <= {Tensor, torch.nn.Parameter} or any(map(self._looks_odd, tensors)):
            self._check(lists)
        try:
            addresses = list(map(Tensor.data_ptr, tensors))
        except RuntimeError:
            self._check(lists)
            raise
        if 0 in addresses and any(t.numel() for t, address in zip(tensors, addresses, strict=True) if not address):
            self._check(lists)
        return _bytes(addresses), False

    def _looks_odd(self, t: Tensor) -> bool:
        return t.layout != torch.strided or t.is_neg() or t.dtype != self.dtype or not t.is_contiguous()

    def _check(self, lists: Mapping[str, list[Tensor]]) -> None:
        for name, tensors in lists.items():
            for i, t in enumerate(tensors):
                if t.numel():  # an empty tensor stands for a parameter that is absent
                    self.dense(name, t, f"{name}[{i}]")

    def _table(self, content: bytes, unchecked: Mapping[str, list[Tensor]] | None) -> Tensor:
        """A tensor with these words on the device."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        stream = self.kind and self.kind.current_stream(self.device)
        # A table is there for the stream that it was copied on; one made in a capture is filled when that is replayed.
        key = (self.device, stream, self.dtype, content)
        if not capturing and key in _tables:
            _tables.move_to_end(key)
            return _tables[key]
        if unchecked is not None:
            self._check(unchecked)
        if capturing:
            return self._captured(content)
        if self.device.type == "cuda" and self.device not in _ready:
            self._captured(bytes(8))  # compiled now: a capture is no place to load a kernel
            _ready.add(self.device)
        if len(_tables) >= TABLES:
            _tables.popitem(last=False)
        _tables[key] = self._copied(content)
        return _tables[key]

    def words(self, words: tuple[int, ...]) -> Tensor:
        """A tensor with integers alone."""
        return self._table(_bytes(words), None)

    def _copied(self, content: bytes) -> Tensor:
        table = torch.frombuffer(bytearray(content), dtype=torch.int64)
        return table if self.kind is None else table.pin_memory().to(self.device, non_blocking=True)

    def _captured(self, content: bytes) -> Tensor:
        words = struct.unpack(f"{len(content) // 8}q", content)
        words += (0,) * (-len(words) % 16)
        table = torch.empty(len(words), dtype=torch.int64, device=self.device)
        with self.on_device():
            for i in range(0, len(words), 16):
                _launch(write_words_kernel, 1, table.data_ptr() + 8 * i, *words[i : i + 16])
        return table


def _bytes(words: Sequence[int]) -> bytes:
    return struct.pack(f"{len(words)}q", *words)


# ---- the operators: see reference.py ------------------------------------------------------------------------------------


class _Direction(NamedTuple):
    """What d is made of."""

    weights: tuple[int, int]  # one flat buffer, or the pointers of a list
    grads: tuple[int, int]  # the pointers of the list, and of the sizes of stacks
    ema: int
    constants: dict[str, bool]


def _direction(
    call: _Call, weights: list[Tensor], grads: list[Tensor], ema: Tensor | None, eta: float | None, stack: int | None
) -> _Direction:
    if not grads:
        raise RuntimeError("grads are missing: the list is empty")
    if eta is not None and not weights:
        raise RuntimeError("eta needs the weights, and the list of weights is empty")
    flat, listed, pointers, sizes = call.pointers(weights, words=call.sizes("grads", grads, stack), grads=grads)
    constants = {"FRIENDLY": ema is not None, "ADAPTIVE": eta is not None, "STACKED": stack is not None}
    return _Direction((flat, listed), (pointers, sizes), call.dense("ema", ema), constants)


def _norm(
    call: _Call, d: _Direction, weights: tuple[int, int], terms: Tensor, sigma: float, eta: float | None, some: range
) -> None:
    """``some``: the micro-batches."""
    call.launch(
        norm_kernel, terms.data_ptr(), some.start, some.stop, *call.table, *weights, *d.grads, d.ema,
        *_bits(sigma, eta or 0.0), **d.constants,
    )  # fmt: skip


def _perturb(
    call: _Call, d: _Direction, norm_sq: Tensor, sigma: float, eta: float | None, some: range, *, radii: Tensor, saved: Tensor,
    achieved_sq: Tensor, status: Tensor | None = None, mask: Tensor | None = None, noise: Tensor | None = None, draw: int = 0,
    lmbda: float | None = None, stride: int = 0, arrived: int = 0,
) -> None:  # fmt: skip
    """Perturb ``some`` of the micro-batches.

    ``stride``: of a stack of copies. ``arrived``: the address where programs are counted, for a launch that fills ``norm_sq``.
    """
    stack = len(some) if d.constants["STACKED"] else None
    if (status is None) != (stack is not None):
        raise RuntimeError(
            "status says how it stands with weights that are perturbed in place, and stack that they are copies: give one of "
            "them"
        )
    check_noise(None, (), draw)
    kernel, first = (ascend_kernel, (arrived,)) if arrived else (perturb_kernel, ())
    saved_at = call.saved(saved) if stack is None else call.dense("saved", saved)
    radii_at = call.plain("radii", radii, dim=2)
    if radii.shape[1] != RADIUS_COLUMNS.value:
        raise RuntimeError(f"radii must have {RADIUS_COLUMNS.value} columns, got {radii.shape[1]}")
    call.launch(
        kernel, *first, some.start, some.stop, *call.table, *call.sum("norm_sq", norm_sq, stack), radii_at,
        *d.weights, stride, *d.grads, saved_at, call.per_row("status", status, torch.uint8),
        call.achieved(achieved_sq, stack), d.ema, call.plain("mask", mask, torch.uint8), call.noise(noise), draw,
        int(lmbda is not None), *_bits(sigma, eta or 0.0, lmbda or 0.0, 1 - (lmbda or 0.0)), times=1 + len(first),
        M=STORAGE[call.kept], MASKED=mask is not None, STOCHASTIC=noise is not None, **d.constants,
    )  # fmt: skip


def _stride(weights: list[Tensor], stack: int | None) -> int:
    """From one copy of the weights to the next."""
    if stack is None:
        return 0
    if len(weights) != 1:
        raise RuntimeError(f"weights must be one stack of flat buffers, got {len(weights)} tensors")
    check_stack("weights", weights[0], stack, contiguous=True)
    return weights[0].numel() // stack


def norm(
    weights: list[Tensor], grads: list[Tensor], table: Tensor, *, ema: Tensor | None = None, sigma: float = 0.0,
    eta: float | None = None, stack: int | None = None,
) -> Tensor:  # fmt: skip
    call = _Call(table, grads=grads)
    check(table, weights=weights)  # also those that are not read
    norm_sq = call.sums(*_rows(stack))
    direction = _direction(call, weights if eta is not None else [], grads, ema, eta, stack)
    _norm(call, direction, direction.weights, norm_sq, sigma, eta, range(stack or 1))
    return norm_sq


def perturb(
    weights: list[Tensor], grads: list[Tensor], table: Tensor, *, norm_sq: Tensor, ema: Tensor | None = None,
    sigma: float = 0.0, eta: float | None = None, stack: int | None = None, **options: Any,
) -> None:  # fmt: skip
    call = _Call(table, weights=weights)
    direction = _direction(call, weights, grads, ema, eta, stack)
    _perturb(call, direction, norm_sq, sigma, eta, range(stack or 1), stride=_stride(weights, stack), **options)


def ascend(
    weights: list[Tensor], grads: list[Tensor], table: Tensor, *, saved: Tensor, achieved_sq: Tensor,
    arrived: Tensor | None = None, ema: Tensor | None = None, sigma: float = 0.0, eta: float | None = None,
    lmbda: float | None = None, stack: int | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    call = _Call(table, weights=weights)
    direction = _direction(call, weights, grads, ema, eta, stack)
    norm_sq, counter = call.sums(*_rows(stack)), call.plain("arrived", arrived, torch.int32)
    if arrived is not None and len(arrived) != 1:
        raise RuntimeError(f"arrived must have one element, got shape {list(arrived.shape)}")
    options |= {"saved": saved, "lmbda": lmbda, "stride": _stride(weights, stack)}
    whole = range(stack or 1)
    # Whether a gradient enters the mean, of which the next direction is made, depends on its norm.
    turns = [whole] if lmbda is None or ema is None or len(whole) == 1 else [whole[i : i + 1] for i in whole]
    call.achieved(achieved_sq, stack)
    for some in turns:
        terms, achieved = (t if stack is None else t[some.start : some.stop] for t in (norm_sq, achieved_sq))
        if not counter:
            own = direction.weights if stack is None else (call.dense("saved", saved), 0)
            _norm(call, direction, own, terms, sigma, eta, some)
        _perturb(call, direction, terms, sigma, eta, some, arrived=counter, achieved_sq=achieved, **options)
    return norm_sq


def gram(terms: list[Tensor], table: Tensor, *, count: int, stack: int | None = None) -> Tensor:
    if not 1 <= count <= VECTORS:
        raise RuntimeError(f"count must be 1 to {VECTORS}, got {count}")
    call = _Call(table, terms=terms)
    *_, pointers, sizes = call.pointers([], count, call.sizes("terms", terms, stack, count), terms=terms)
    sums = call.sums(*_rows(stack), count * (count + 1) // 2)
    call.launch(
        gram_kernel, sums.data_ptr(), stack or 1, *call.table, pointers, call.segments, sizes, COUNT=count,
        STACKED=stack is not None,
    )  # fmt: skip
    return sums


def weigh(
    shares: Tensor, *, coefs: list[float], sums: list[Tensor], rescale: int = -1, norm_sq: Tensor | None = None
) -> Tensor:
    call, m = _Call.without_table(shares), len(shares)
    c, words = _combination(call, coefs, sums, rescale, m)
    count = len(coefs) // COEFFICIENT_COLUMNS.value
    shares_at, norm = call.plain("shares", shares), call.sum("norm_sq", norm_sq, m)
    out = torch.empty(count, m, dtype=torch.float64, device=shares.device)
    held = call.words(words) if words else None  # lives as long as the call
    with call.on_device():
        _launch(
            weigh_kernel, m, shares_at, m, *_bits(*c, *(0.0,) * (TERMS - len(c))), 0 if held is None else held.data_ptr(),
            *norm, out.data_ptr(), COUNT=count, SUMS=bool(sums),
        )  # fmt: skip
    return out


def _combination(
    call: _Call, coefs: list[float], sums: list[Tensor], rescale: int, stack: int | None = None
) -> tuple[list[float], tuple[int, ...]]:
    """(coefficients that depend on no sum, or the words from which the kernels work them out)."""
    width: int = COEFFICIENT_COLUMNS.value
    if len(coefs) % width or len(coefs) > TERMS * width:
        raise RuntimeError(f"coefs must be {width} numbers for each of at most {TERMS} terms, got {len(coefs)}")
    # Of each row of the sums, with its number of terms, and how far it is to that of the next micro-batch.
    addresses: list[tuple[int, int, int]] = []
    more = 0 if stack is None else 1
    for k, t in enumerate(sums):
        start = call.plain(f"sums[{k}]", t, dim=more + (2 if t.dim() == 2 + more else 1))
        if not t.numel():
            raise RuntimeError(f"sums[{k}] is empty, of shape {list(t.shape)}")
        if stack is not None:
            check_stack(f"sums[{k}]", t, stack)
        n = t.shape[-1]
        own = t.numel() // n // (stack or 1)
        addresses += [(start + 8 * n * row, n, 8 * n * own) for row in range(own)]
    rows = len(addresses)
    if len(sums) > SUM_TENSORS or rows > SUM_ROWS:
        raise RuntimeError(
            f"sums must be at most {SUM_TENSORS} tensors of {SUM_ROWS} rows in all, got {len(sums)} tensors of {rows} rows"
        )
    for b, p, q in zip(coefs[2::width], coefs[3::width], coefs[4::width], strict=True):
        if b and not (0 <= p < rows and 0 <= q < rows):
            raise RuntimeError(f"coefs name the sums {p:g} and {q:g}, of which there are {rows}")
    if not -1 <= rescale < rows:
        raise RuntimeError(f"rescale must be -1 or one of the {rows} sums, got {rescale}")
    if not sums:
        return [scale * a for scale, a in zip(coefs[::width], coefs[1::width], strict=True)], ()
    head = sums[0].shape[-2] if sums[0].dim() == 2 + more else 1
    size = {1: 1, 3: 2, 6: 3}.get(head)
    if size is None or size * width > len(coefs):
        raise RuntimeError(
            "sums[0] must be the Gram matrix of the first terms, 1, 3 or 6 rows for 1, 2 or 3 of "
            f"{len(coefs) // width}, got {head} rows"
        )
    return [], (*_bits(*coefs), size, rescale, rows, *itertools.chain(*addresses))


def _descent(
    call: _Call, weights: list[Tensor], out: list[Tensor], terms: list[Tensor], coefs: list[float], sums: list[Tensor],
    rescale: int, norm_sq: Tensor | None, saved: Tensor | None, status: Tensor | None, shares: Tensor | None,
) -> tuple[tuple[int, ...], int, dict[str, Any]]:  # fmt: skip
    """The arguments that ``descend`` and ``update`` have in common; where ``out`` is; and the constants."""
    if (saved is None) != (status is None):
        raise RuntimeError("saved and status go together: give both or neither")
    check_masters(weights, saved, shares=shares)
    c, words = _combination(call, coefs, sums, rescale)
    count = len(coefs) // COEFFICIENT_COLUMNS.value
    shares_at, stacks, m = call.plain("shares", shares, dim=2), 0, None
    if shares is not None:
        (stacks, m) = shares.shape
        if not (1 <= stacks <= VECTORS and m):
            raise RuntimeError(
                f"shares must be of 1 to {VECTORS} stacks of micro-batches, got shape {list(shares.shape)}"
            )
    both = stacks + count
    if not both == 0 == len(terms) and not (both and terms and len(terms) % both == 0):
        raise RuntimeError(
            "terms must be as many lists of tensors, one after the other, as there are coefficients, "
            f"{both}; got {len(terms)} tensors"
        )
    sizes = call.sizes("terms", terms[: stacks * (len(terms) // both)], m, stacks) if stacks else ()
    flat, listed, out_at, terms_at, words_at = call.pointers(weights, both, (*words, *sizes), out=out, terms=terms)
    arguments = (
        *call.table, flat, listed, call.saved(saved), call.per_row("status", status, torch.uint8), terms_at,
        call.segments, *_bits(*c, *(0.0,) * (TERMS - len(c))), words_at, *call.sum("norm_sq", norm_sq),
        shares_at, m or 0, words_at + 8 * len(words) if sizes else 0,
    )  # fmt: skip
    return arguments, out_at, {"M": STORAGE[call.kept], "COUNT": count, "STACKS": stacks, "SUMS": bool(sums)}


def descend(
    weights: list[Tensor], out: list[Tensor], terms: list[Tensor], table: Tensor, *, coefs: list[float], sums: list[Tensor],
    rescale: int = -1, norm_sq: Tensor | None = None, saved: Tensor | None = None, status: Tensor | None = None,
    last: bool = True, out_sq: Tensor | None = None, shares: Tensor | None = None,
) -> None:  # fmt: skip
    if weights and saved is None:
        raise RuntimeError("weights are brought back from saved, which is missing")
    call = _Call(table, weights=weights, out=out)
    arguments, out_at, constants = _descent(
        call, weights, out, terms, coefs, sums, rescale, norm_sq, saved, status, shares
    )
    squares = call.per_row("out_sq", out_sq)
    call.launch(descend_kernel, *arguments, out_at, int(last), squares, **constants, SQUARED=out_sq is not None)


def update(
    weights: list[Tensor], states: list[Tensor], terms: list[Tensor], table: Tensor, *, rule: int, settings: Tensor,
    step: Tensor | None = None, coefs: list[float], sums: list[Tensor], rescale: int = -1, norm_sq: Tensor | None = None,
    saved: Tensor | None = None, status: Tensor | None = None, found_inf: Tensor | None = None,
    shares: Tensor | None = None, rates: Tensor | None = None, factor: float = 0.0,
) -> None:  # fmt: skip
    if rule not in RULES:
        raise RuntimeError(f"rule must be 0 (SGD) or 1 (Adam), got {rule}")
    columns, names = RULES[rule]
    if not len(names) - 1 <= len(states) <= len(names):
        raise RuntimeError(f"states must be {names} or those without the last, got {len(states)}")
    if states and step is None:
        raise RuntimeError("states need step, which is missing")
    terms, ahead = split_ahead(terms, rates, len(coefs) // COEFFICIENT_COLUMNS.value, shares, len(settings))
    check_masters(weights, saved, rates=rates)
    call = _Call(table, weights=weights)
    arguments, ahead_at, constants = _descent(
        call, weights, ahead, terms, coefs, sums, rescale, norm_sq, saved, status, shares
    )
    settings_at, steps = call.plain("settings", settings, dim=2), call.plain("step", step, torch.float32)
    if settings.shape[1] < columns:
        raise RuntimeError(f"settings must have {columns} columns for this rule, got {settings.shape[1]}")
    expected = call.segments + 1
    if step is not None and terms and len(step) != expected:
        raise RuntimeError(f"step must have one element per parameter and one more, {expected}, got {len(step)}")
    found_inf_at = call.plain("found_inf", found_inf, torch.float32, dim=0 if found_inf is None else found_inf.dim())
    if found_inf is not None and found_inf.numel() != 1:
        raise RuntimeError(f"found_inf must have one element, got shape {list(found_inf.shape)}")
    kept = [call.dense(name, t, kept=True) for name, t in zip(names, states, strict=False)]
    call.launch(
        update_kernel, *arguments, settings_at, settings.shape[1], steps, found_inf_at, ahead_at,
        call.plain("rates", rates), *_bits(factor), *kept, *(0,) * (3 - len(kept)),
        RULE=rule, **constants, STATES=len(kept), SHIFTED=rates is not None,
    )  # fmt: skip
