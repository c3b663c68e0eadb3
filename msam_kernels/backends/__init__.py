# SPDX-License-Identifier: Apache-2.0
"""The operators, declared once, and the choice of a backend.

Every backend is a namespace with the functions below, called alike:

    norm(weights, grads, table, *, ema, sigma, eta) -> norm_sq
    perturb(weights!, grads, table, *, norm_sq, radii, saved!, status!, achieved_sq!, ema!, mask, sigma, lmbda, eta)
    ascend(weights!, grads, table, *, radii, saved!, status!, achieved_sq!, ema!, mask, sigma, lmbda, eta) -> norm_sq
    gram(terms, table, *, count) -> sums
    descend(weights!, out!, terms, table, *, coefs, sums, rescale, norm_sq, saved, status!, last, out_sq!)
    update(weights!, states!, terms, table, *, rule, settings, step!, coefs, sums, rescale, norm_sq, saved, status!)

``!`` marks what is mutated. Shapes, with P parameters (segments) and K rows of the table:

* ``weights``: one flat buffer, or P tensors; empty where no weights take part. ``grads``, ``out``: P tensors, dense in memory,
  in the order of the weights' memory. ``terms``: several such lists, one after the other. An empty tensor in a list stands
  for a parameter that is absent from it.
* ``table``: int64 ``[K, 5]``, rows (segment, begin, offset, numel, group): what the call works on. See ``flat.py``.
* ``saved``, ``ema``, ``states``: flat buffers of the weights' dtype. An element of ``ema`` that is NaN has not begun; without
  ``lmbda`` it is only read.
* ``status``: uint8 ``[K]``, how it stands with a row's weights: 0 untouched, 1 saved, 2 perturbed.
* ``mask``: uint8 ``[⌈size / 8⌉]`` for flat buffers of ``size`` elements; element 8·j + k is perturbed where bit k of byte j
  is set.
* ``radii``: float64 ``[groups]``. ``settings``: float64 ``[groups, columns]``, columns as in ``reference.py``.
* ``norm_sq``: float64 ``[n]``, of which the sum is the squared norm; n is the backend's choice. ``achieved_sq``: float64
  ``[K]``, the terms of ‖e‖² as it was stored. ``out_sq``: float64 ``[K]``, the terms of ‖out‖².
* ``coefs``: 7 numbers for each of the 1 to 4 terms, ``sums``: up to 3 float64 tensors ``[rows, n]`` or ``[n]``, 8 rows in all;
  ``rescale``: one of those rows, or -1. See ``reference.coefficients``. ``gram`` returns such a tensor, of 1, 3 or 6 rows.
* ``step``: float32 ``[P + 1]``; the last element, zero between calls, is where GPU kernels count the blocks that are done.

What each computes stands in ``reference.py``, the specification.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from itertools import repeat

import torch

from . import reference

try:
    _C = importlib.import_module(".._C", __package__)
except ImportError as error:  # installed without a compiler
    _C = None
    _missing_extension: ImportError | None = error
else:
    _missing_extension = None

_DIRECTION = "Tensor? mask=None, float sigma=0., float? lmbda=None, float? eta=None"
_COMBINATION = "float[] coefs, Tensor[] sums, int rescale=-1, Tensor? norm_sq=None, Tensor? saved=None"
_SCHEMAS = (
    "norm(Tensor[] weights, Tensor[] grads, Tensor table, *, Tensor? ema=None, float sigma=0., float? eta=None) -> Tensor",
    "perturb(Tensor(a!)[] weights, Tensor[] grads, Tensor table, *, Tensor norm_sq, Tensor radii, Tensor(b!) saved, "
    f"Tensor(c!) status, Tensor(d!) achieved_sq, Tensor(e!)? ema=None, {_DIRECTION}) -> ()",
    "ascend(Tensor(a!)[] weights, Tensor[] grads, Tensor table, *, Tensor radii, Tensor(b!) saved, "
    f"Tensor(c!) status, Tensor(d!) achieved_sq, Tensor(e!)? ema=None, {_DIRECTION}) -> Tensor",
    "gram(Tensor[] terms, Tensor table, *, int count) -> Tensor",
    f"descend(Tensor(a!)[] weights, Tensor(b!)[] out, Tensor[] terms, Tensor table, *, {_COMBINATION}, "
    "Tensor(c!)? status=None, bool last=True, Tensor(d!)? out_sq=None) -> ()",
    "update(Tensor(a!)[] weights, Tensor(b!)[] states, Tensor[] terms, Tensor table, *, int rule, Tensor settings, "
    f"Tensor(c!)? step=None, {_COMBINATION}, Tensor(d!)? status=None) -> ()",
)
OPERATORS = tuple(schema.split("(", 1)[0] for schema in _SCHEMAS)

_library = torch.library.Library("msam_kernels", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


def _terms(table):
    return 1 if table.device.type == "cpu" else torch.library.get_ctx().new_dynamic_size()


def _fake_norm(weights, grads, table, **_):
    return table.new_empty((_terms(table),), dtype=torch.float64)


def _fake_gram(terms, table, *, count):
    return table.new_empty((count * (count + 1) // 2, _terms(table)), dtype=torch.float64)


def _fake_nothing(*_, **__):
    return None


_FAKES = {"norm": _fake_norm, "ascend": _fake_norm, "gram": _fake_gram}
for _name in OPERATORS:
    torch.library.register_fake(f"msam_kernels::{_name}", _FAKES.get(_name, _fake_nothing), lib=_library)


# (params, placeholder, clear) -> (grads, regular, absent); None without the extension. See Flat.collect_grads.
collect_grads = getattr(_C, "collect_grads", None)


def _current_grads(params):
    grads = [p.grad for p in params]
    return grads if any(g is not None for g in grads) else []


# (params) -> every p.grad or None; an empty list where all are None.
current_grads = getattr(_C, "current_grads", _current_grads)


def _set_grads(params, grads):
    for p, g in zip(params, grads or repeat(None), strict=False):
        p.grad = g


# (params, grads): p.grad by parameter, None for all where grads is empty.
set_grads = getattr(_C, "set_grads", _set_grads)


def own_memory(grads: list[torch.Tensor | None], *, whole: bool = True) -> list[torch.Tensor | None]:
    """``grads``, so that each can be written to by itself.

    Of those that are the same memory, as ``autograd.grad`` returns them for the operands of a sum, all but the first are
    copied; with ``whole`` also those whose memory another tensor holds, e.g. a bucket that DDP is going to overwrite.
    """
    if owns_memory(grads, whole):
        return grads
    seen: set[int] = set()
    out = []
    for g in grads:
        if g is not None and g.numel():
            place = g.data_ptr()
            g = g.clone() if place in seen or not owns_memory([g], whole) else g
            seen.add(place)
        out.append(g)
    return out


def _owns_memory(grads, whole):
    there = [g for g in grads if g is not None and g.numel()]
    holders = getattr(torch._C, "_storage_Use_Count", None)
    # What untyped_storage() returns holds it as well. In doubt a copy is right.
    if whole and there and (holders is None or any(holders(g.untyped_storage()._cdata) > 2 for g in there)):
        return False
    return len({g.data_ptr() for g in there}) == len(there)


# (list of gradients or None, whole) -> whether each has memory of its own. See own_memory.
owns_memory = getattr(_C, "owns_memory", _owns_memory)


def _memory_layout(groups):
    return [[(id(p), p.data_ptr(), p.size(), p.stride()) for p in params] for params in groups]


# (list of lists of parameters) -> a value that changes when any of them, its memory or its layout does.
memory_layout = getattr(_C, "memory_layout", _memory_layout)

BACKENDS = ("cuda", "triton", "cpu", "reference")


def _missing_cuda() -> str | None:
    rebuild = "rebuild with `FORCE_CUDA=1 pip install --no-build-isolation -e .`"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA: install a build that does (https://pytorch.org), then {rebuild}"
    if _C is None:
        return f"the compiled extension is missing ({_missing_extension}): install a C++17 compiler and nvcc, and {rebuild}"
    if _C.CUDA is None:
        return (
            f"the extension was built without it: install the CUDA toolkit {torch.version.cuda} (nvcc), and {rebuild}"
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU: `nvidia-smi` tells whether there is one and its driver runs"
    return None


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton` (it comes with torch's builds for GPUs on Linux)"
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if not interpreted and not torch.cuda.is_available() and not torch.xpu.is_available():
        return "torch sees no GPU; on the CPU it runs in Triton's interpreter, slowly: set TRITON_INTERPRET=1 before the start"
    return None


def available_backends() -> dict[str, str | None]:
    """Backends by name, fastest first: None where usable, else a sentence that says what is missing and how to get it."""
    cpu = None
    if _C is None:
        cpu = (
            f"the compiled extension is missing ({_missing_extension}): install a C++17 compiler (g++ or clang++) and "
            "rebuild with `pip install --no-build-isolation -e .`"
        )
    else:
        try:
            _C.build_info()
        except RuntimeError as error:  # an instruction set was asked for that this processor has not
            cpu = str(error)
    return {"cuda": _missing_cuda(), "triton": _missing_triton(), "cpu": cpu, "reference": None}


def get_backend(name: str, device: torch.device):
    """The namespace of functions for tensors on ``device``.

    Args:
        name: "auto" (the fastest that is there for the device) or one of ``BACKENDS``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is not there, or that does not serve ``device``; the message says how to get it.
    """
    missing = available_backends()
    if name == "auto":
        if device.type == "cpu":
            name = "cpu" if _C is not None else "reference"
        elif device.type == "cuda" and missing["cuda"] is None:
            name = "cuda"
        else:
            name = "triton" if device.type in ("cuda", "xpu") and missing["triton"] is None else "reference"
    if name not in missing:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")
    if missing[name] is not None:
        raise RuntimeError(f"backend {name!r} is not available: {missing[name]}")
    if name == "reference":
        return reference
    if name == "triton":
        kernels = importlib.import_module(".triton_kernels", __package__)
        served = ("cpu",) if kernels.INTERPRETED else ("cuda", "xpu")
        if device.type not in served:
            raise RuntimeError(
                f"backend 'triton' needs parameters on a GPU (cuda, xpu), or on the CPU with TRITON_INTERPRET=1 set before "
                f"the start; got {device} and TRITON_INTERPRET={int(kernels.INTERPRETED)}: use backend='auto'"
            )
        return kernels
    if device.type != name:
        where = "the CPU" if name == "cpu" else "a CUDA device"
        raise RuntimeError(f"backend {name!r} needs parameters on {where}, got {device}: use backend='auto'")
    return _C  # has the operators by name, without torch.ops's parsing of lists, which would take longer than they do
