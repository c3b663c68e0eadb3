# SPDX-License-Identifier: Apache-2.0
"""Masks of Sparse SAM: one bit per element of a flat buffer, chosen over all parameters at once.

To choose a mask, slices of the flat buffers are read several times and only counts are kept: besides the masks no memory
grows with the model, and scores never leave their device.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .flat import Flat, pack, unpack
from .methods import SparseSAM

SLICE = 1 << 20  # elements looked at together
RUN = 1 << 16  # random numbers drawn together
_DIGIT = 16  # bits of a key that are looked at together


#: By flat and parameter: a tensor in the memory order of the parameter. Its absolute values count; an empty one counts as
#: zeros.
Scores = Sequence[Sequence[Tensor]]
Place = tuple[Flat, int]  # a slice of a flat buffer of all: where it begins


def add_up(scores: list[Tensor] | None, grads: Sequence[Tensor], *, copies: bool = False) -> list[Tensor]:
    """The root of the sum of the squares so far: it orders as the sum does, and neither over- nor underflows in 16 bits.

    ``scores`` are changed in place; an empty one has no gradient yet. A first gradient becomes the score, with ``copies`` a
    copy of it.
    """

    def one(s: Tensor | None, g: Tensor) -> Tensor:
        if s is None or s.numel() == 0:
            return g.clone() if copies else g
        return s if g.numel() == 0 else torch.hypot(s, g, out=s)

    return list(map(one, [None] * len(grads) if scores is None else scores, grads))


@torch.inference_mode(False)
@torch.no_grad()
def choose(flats: Sequence[Flat], scores: Scores, sparse: SparseSAM, step: int) -> None:
    """Choose a new ``mask`` for every flat by the rule of ``methods.SparseSAM``. If any has none yet, all get a first one.

    Args:
        flats: those of all parameters.
        scores: what the mask is chosen by.
        sparse: the method: ``sparsity``, ``mask``, ``share_dropped``, ``seed``.
        step: seeds the random numbers, together with ``sparse.seed``.
    """
    # Flats of the same device and dtype one after the other: groups that were added later then get the mask that an
    # optimizer made with all of them would choose.
    kinds = list(dict.fromkeys((flat.device, flat.dtype) for flat in flats))
    scores_of = {id(flat): tensors for flat, tensors in zip(flats, scores, strict=True)}
    flats = sorted(flats, key=lambda flat: kinds.index((flat.device, flat.dtype)))
    places = [(flat, begin) for flat in flats for begin in range(0, flat.size, SLICE)]
    whole = sum(p.numel() for flat in flats for p in flat.params)
    count = round((1 - sparse.sparsity) * whole)
    wide = any(flat.dtype == torch.float64 for flat in flats)

    def by_score(place: Place) -> Tensor:
        return _keys(place, scores_of[id(place[0])], wide)

    # A parameter's random numbers depend on its place among those of its device and dtype, in however many flats they are.
    firsts = {
        id(flat): sum(len(f.params) for f in flats[:k] if (f.device, f.dtype) == (flat.device, flat.dtype))
        for k, flat in enumerate(flats)
    }

    def at_random(place: Place) -> Tensor:
        return _random_keys(place, firsts[id(place[0])], f"{sparse.seed} {step}")

    new = {id(flat): torch.empty(flat.size // 8, dtype=torch.uint8, device=flat.device) for flat in flats}

    def write(place: Place, bits: Tensor) -> None:
        _bytes(new[id(place[0])], place).copy_(pack(bits))

    old = {id(flat): mask for flat in flats if (mask := flat.mask_of_all) is not None}

    def inside(place: Place) -> Tensor:
        return unpack(_bytes(old[id(place[0])], place))

    if len(old) < len(flats) or sparse.mask == "fisher":
        keys = by_score if sparse.mask == "fisher" else at_random
        chosen = _largest(lambda: map(keys, places), count, wide)
        for place in places:
            write(place, chosen(keys(place)))
    else:
        dropped = min(round(sparse.share_dropped(step) * count), whole - count)
        stays = _largest(lambda: (by_score(place) * inside(place) for place in places), count - dropped, wide)
        comes = _largest(lambda: (at_random(place) * ~inside(place) for place in places), dropped, wide)
        for place in places:
            bits = inside(place)
            write(place, stays(by_score(place) * bits) | comes(at_random(place) * ~bits))
    chosen_masks = [flat.mask_as_now(new[id(flat)]) for flat in flats]
    for flat, mask in zip(flats, chosen_masks, strict=True):  # all at once: what fails before leaves the old masks
        flat.hold_mask(mask)


def _bytes(mask: Tensor, place: Place) -> Tensor:
    _, begin = place
    return mask[begin // 8 : (begin + SLICE) // 8]


def _parts(place: Place) -> tuple[Tensor, Iterator[tuple[int, slice, Tensor]]]:
    """The keys of a slice, all 0, and for every parameter in it: its index, which part of its memory, a view of its keys."""
    flat, begin = place
    end = min(begin + SLICE, flat.size)
    keys = torch.zeros(end - begin, dtype=torch.int64, device=flat.device)

    def parts() -> Iterator[tuple[int, slice, Tensor]]:
        offsets = flat.offsets_of_all
        for i in range(max(bisect_right(offsets, begin) - 1, 0), bisect_left(offsets, end)):
            offset = offsets[i]
            low, high = max(begin, offset), min(end, offset + flat.params[i].numel())
            if low < high:
                yield i, slice(low - offset, high - offset), keys[low - begin : high - begin]

    return keys, parts()


def _keys(place: Place, scores: Sequence[Tensor], wide: bool) -> Tensor:
    """The int64 keys of a slice, ordered as the scores are: 0 for padding, at least 1 for an element of a parameter."""
    keys, parts = _parts(place)
    for i, part, here in parts:
        if scores[i].numel() == 0:
            here.fill_(1)
            continue
        memory = scores[i].as_strided((scores[i].numel(),), (1,))[part]
        values = (memory.double() if wide else memory.float()).abs().nan_to_num_(nan=0.0, posinf=math.inf)
        # Floats that are not negative are ordered as their bits.
        here.copy_(values.view(torch.int64 if wide else torch.int32)).add_(1)
    return keys


def _random_keys(place: Place, first: int, seed: str) -> Tensor:
    """Random keys of a slice. ``first`` is the number of the flat's first parameter."""
    flat, _ = place
    keys, parts = _parts(place)
    generator = torch.Generator(flat.device)
    for i, part, here in parts:
        for at in range(part.start // RUN * RUN, part.stop, RUN):
            generator.manual_seed(random.Random(f"{seed} {flat.dtype} {first + i} {at}").getrandbits(63))
            size = min(RUN, flat.params[i].numel() - at)
            numbers = torch.randint(1, 2**31 - 1, (size,), generator=generator, device=flat.device)
            low, high = max(part.start, at), min(part.stop, at + RUN)
            here[low - part.start : high - part.start] = numbers[low - at : high - at]
    return keys


def _largest(slices: Callable[[], Iterator[Tensor]], count: int, wide: bool) -> Callable[[Tensor], Tensor]:
    """A function that takes the slices again, in the same order, and returns which keys are among the ``count`` largest.

    Of equal keys the first are taken; a key of 0 never is. The smallest key that is taken is found digit by digit.
    """
    if count <= 0:
        return lambda keys: torch.zeros_like(keys, dtype=torch.bool)
    last, left = 0, count
    for shift in range(64 - _DIGIT if wide else 32 - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device="cpu")
        for keys in slices():
            digits = keys >> shift
            digits = digits[digits >> _DIGIT == last] & (1 << _DIGIT) - 1
            counts += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        from_top = counts.flip(0).cumsum(0)
        index = int((from_top < left).sum())
        if index == 1 << _DIGIT:  # there are not so many
            last, left = 0, 0
            break
        left -= int(from_top[index - 1]) if index else 0
        last = last << _DIGIT | (1 << _DIGIT) - 1 - index
    if last == 0:
        return lambda keys: keys > 0
    before = torch.zeros((), dtype=torch.int64, device="cpu")

    def chosen(keys: Tensor) -> Tensor:
        nonlocal before
        equal = keys == last
        rank = equal.cumsum(0) + before.to(keys.device)
        before = rank[-1]
        return (keys > last) | (equal & (rank <= left))

    return chosen
