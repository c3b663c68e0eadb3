# SPDX-License-Identifier: Apache-2.0
"""The operators, declared once, and the choice of a backend.

Every backend is a namespace with the functions below, called alike:

    norm(weights, grads, table, *, ema, sigma, eta, stack) -> norm_sq
    perturb(weights!, grads, table, *, norm_sq, radii, saved!, achieved_sq!, status!, ema!, mask, noise, draw, sigma, lmbda,
        eta, stack)
    ascend(weights!, grads, table, *, radii, saved!, achieved_sq!, status!, arrived!, ema!, mask, noise, draw, sigma, lmbda,
        eta, stack) -> norm_sq
    gram(terms, table, *, count, stack) -> sums
    weigh(shares, *, coefs, sums, rescale, norm_sq) -> shares
    descend(weights!, out!, terms, table, *, coefs, sums, rescale, norm_sq, saved, status!, last, out_sq!, shares)
    update(weights!, states!, terms, table, *, rule, settings, step!, coefs, sums, rescale, norm_sq, saved!, status!,
        found_inf, shares, rates, factor)

``!`` marks what is mutated. Shapes, with P parameters (segments) and K rows of the table:

* ``weights``: one flat buffer, or P tensors; empty where no weights take part. ``grads``, ``out``: P tensors, dense in memory,
  in the order of the weights' memory. ``terms``: several such lists, one after the other. An empty tensor in a list stands
  for a parameter that is absent from it.
* ``table``: int64 ``[K, 5]``, rows (segment, begin, offset, numel, group): what the call works on. See ``flat.py``.
* ``stack``: the micro-batches m of a call; without it there is one. With it ``grads`` and ``terms`` are ``[m, *shape]``, dense
  in memory, micro-batch after micro-batch; ``weights`` of a perturbation are ``[m, size]``, beside w, which is ``saved``;
  ``status`` is not given; ``norm_sq``, ``achieved_sq`` and the result of ``gram`` have a first dimension of m.
* ``shares``: of ``weigh`` float64 ``[m]``; of the others, as ``weigh`` returns it, float64 ``[stacks, m]``, of at most 3:
  so many of the lists in ``terms``, the first ones, are stacks.
* ``saved``, ``ema``, ``states``: flat buffers of the weights' dtype. An element of ``ema`` that is NaN has not begun; without
  ``lmbda`` it is only read. Of weights of 16 bits ``saved`` may be of fp32: masters, see ``reference.py``. ``states`` are then
  of fp32 too, and there are neither ``stack``, ``shares`` nor ``rates``.
* ``status``: uint8 ``[K]``, how it stands with a row's weights: 0 untouched, 1 saved, 2 perturbed.
* ``arrived``: int32 ``[1]``, zero between calls, where GPU kernels count the blocks that are done; without it ``ascend`` is two
  launches there.
* ``mask``: uint8 ``[⌈size / 8⌉]`` for flat buffers of ``size`` elements; element 8·j + k is perturbed where bit k of byte j
  is set.
* ``radii``: float64 ``[groups, 2]``, ``settings``: float64 ``[groups, columns]``, columns as in ``reference.py``.
* ``norm_sq``: float64 ``[n]``, of which the sum is the squared norm; n is the backend's choice, and of fp64 storage some terms
  are what the rounding of others lost. ``out_sq``: float64 ``[K]``, the terms of ‖out‖².
* ``achieved_sq``: float64 ``[K]``, the terms of ‖e‖² as it was stored. Of 16-bit weights ``[3, K]``: beside them those of the
  inner product with the e that was asked for, and of that one's ‖e‖².
* ``noise``: int64 ``[1 + P, 2]``, for weights of 16 bits: (seed, step), then for every parameter its number and the index of
  its first element. With it w + e is rounded at random, without it to nearest. ``draw``, of 32 bits, is the number of the
  perturbation in its step; those of a stack have the following ones.
* ``coefs``: 7 numbers for each of the 1 to 4 terms, ``sums``: up to 3 float64 tensors ``[rows, n]`` or ``[n]``, 8 rows in all;
  ``rescale``: one of those rows, or -1. See ``reference.coefficients``. ``gram`` returns such a tensor, of 1, 3 or 6 rows.
* ``step``: float32 ``[P + 1]``; the last element, zero between calls, is where GPU kernels count the blocks that are done.
* ``found_inf``: float32, one element, as ``torch.amp.GradScaler`` has it: where it is not 0, an update only brings back what is
  perturbed.
* ``rates``: float64 by group, and ``factor``: what an update takes off the weights after the rule's, see ``reference.update``.

What each computes stands in ``reference.py``, the specification.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import reference
from .checks import bound, check_device, labelled

#: The compiled module: ``_C``, made for this torch and Python, or else ``stable``, made for many; None where the package was
#: installed without a compiler, or neither loads.
extension: ModuleType | None
#: Why it is not ``_C``.
missing_extension: ImportError | None = None
try:
    extension = importlib.import_module("msam_kernels._C")
except ImportError as error:
    missing_extension = error
    try:
        extension = importlib.import_module("msam_kernels.backends.stable")
    except ImportError:
        extension = None

_DIRECTION = (
    "Tensor? mask=None, Tensor? noise=None, int draw=0, float sigma=0., float? lmbda=None, float? eta=None, "
    "int? stack=None"
)
_COMBINATION = "float[] coefs, Tensor[] sums, int rescale=-1, Tensor? norm_sq=None"
_SCHEMAS = (
    "norm(Tensor[] weights, Tensor[] grads, Tensor table, *, Tensor? ema=None, float sigma=0., float? eta=None, "
    "int? stack=None) -> Tensor",
    "perturb(Tensor(a!)[] weights, Tensor[] grads, Tensor table, *, Tensor norm_sq, Tensor radii, Tensor(b!) saved, "
    f"Tensor(d!) achieved_sq, Tensor(c!)? status=None, Tensor(e!)? ema=None, {_DIRECTION}) -> ()",
    "ascend(Tensor(a!)[] weights, Tensor[] grads, Tensor table, *, Tensor radii, Tensor(b!) saved, "
    "Tensor(d!) achieved_sq, Tensor(c!)? status=None, Tensor(e!)? arrived=None, Tensor(f!)? ema=None, "
    f"{_DIRECTION}) -> Tensor",
    "gram(Tensor[] terms, Tensor table, *, int count, int? stack=None) -> Tensor",
    "weigh(Tensor shares, *, float[] coefs, Tensor[] sums, int rescale=-1, Tensor? norm_sq=None) -> Tensor",
    f"descend(Tensor(a!)[] weights, Tensor(b!)[] out, Tensor[] terms, Tensor table, *, {_COMBINATION}, "
    "Tensor? saved=None, Tensor(c!)? status=None, bool last=True, Tensor(d!)? out_sq=None, Tensor? shares=None) -> ()",
    "update(Tensor(a!)[] weights, Tensor(b!)[] states, Tensor[] terms, Tensor table, *, int rule, Tensor settings, "
    f"Tensor(c!)? step=None, {_COMBINATION}, Tensor(e!)? saved=None, Tensor(d!)? status=None, Tensor? found_inf=None, "
    "Tensor? shares=None, Tensor? rates=None, float factor=0.) -> ()",
)
OPERATORS = tuple(schema.split("(", 1)[0] for schema in _SCHEMAS)


def declare(library: torch.library.Library) -> None:
    """The operators, in the namespace of the library."""
    for schema in _SCHEMAS:
        library.define(schema)
    for name in OPERATORS:
        # Torch by itself would resolve copies of what is mutated, and knows no lists: kernels refuse such tensors by name, or
        # those of the stable ABI have it done.
        refuse = getattr(extension, "refuse_lazy", None)
        for key in ("Negative", "Conjugate", "ZeroTensor"):
            library.impl(name, refuse(name) if refuse else torch.library.fallthrough_kernel, key)


_library = torch.library.Library("msam_kernels", "DEF")
try:
    declare(_library)
    if extension is not None and hasattr(extension, "check_schemas"):
        extension.check_schemas(_SCHEMAS)
except RuntimeError as error:
    _file = getattr(getattr(extension, "compiled", extension), "__file__", "")
    raise ImportError(
        f"the compiled extension {_file} is of other sources than this package: build it again, with `make build` or `pip "
        f"install --no-build-isolation -e .` ({str(error).splitlines()[0]})"
    ) from error


def _terms(table: Tensor) -> int | torch.SymInt:
    return 1 if table.device.type == "cpu" else torch.library.get_ctx().new_dynamic_size()


def _sums(table: Tensor, stack: int | None, *rows: int) -> Tensor:
    stacks = () if stack is None else (stack,)
    return table.new_empty((*stacks, *rows, _terms(table)), dtype=torch.float64)


def _fake_norm(
    weights: list[Tensor], grads: list[Tensor], table: Tensor, *, stack: int | None = None, **_: Any
) -> Tensor:
    return _sums(table, stack)


def _fake_gram(terms: list[Tensor], table: Tensor, *, count: int, stack: int | None = None) -> Tensor:
    return _sums(table, stack, count * (count + 1) // 2)


def _fake_weigh(shares: Tensor, *, coefs: list[float], **_: Any) -> Tensor:
    return shares.new_empty((len(coefs) // len(reference.COEFFICIENT), shares.shape[0]))


def _fake_nothing(*_: Any, **__: Any) -> None:
    return None


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake, but that it refuses tensors with values: one without any would make it of the whole call."""
    signature = inspect.signature(getattr(reference, name))

    def checked(*args: Any, **kwargs: Any) -> Any:
        table, tensors = bound(signature, args, kwargs)
        for label, t in labelled(**tensors):
            check_device(label, t, table)
        return fake(*args, **kwargs)

    return checked


_FAKES: dict[str, Callable[..., Any]] = {
    **{"norm": _fake_norm, "ascend": _fake_norm, "gram": _fake_gram, "weigh": _fake_weigh}
}
for _name in OPERATORS:
    _fake = _on_one_device(_name, _FAKES.get(_name, _fake_nothing))
    torch.library.register_fake(f"msam_kernels::{_name}", _fake, lib=_library)


class Backend(Protocol):
    """A namespace of the operators."""

    norm: Callable[..., Tensor]
    perturb: Callable[..., None]
    ascend: Callable[..., Tensor]
    gram: Callable[..., Tensor]
    weigh: Callable[..., Tensor]
    descend: Callable[..., None]
    update: Callable[..., None]


BACKENDS = ("cuda", "triton", "cpu", "reference")


def _without_extension(compilers: str, rebuild: str) -> str:
    """Why there is no extension, and what to do: built for something else, or not at all."""
    if isinstance(missing_extension, ModuleNotFoundError):
        return f"the compiled extension is missing ({missing_extension}): install {compilers}, and {rebuild}"
    return (
        f"the compiled extension {getattr(missing_extension, 'path', '')} does not load, it was built for another torch or "
        f"Python ({missing_extension}): {rebuild}"
    )


REBUILD = "rebuild with `pip install --no-build-isolation -e .`"


def _missing_cuda() -> str | None:
    rebuild = "rebuild with `FORCE_CUDA=1 pip install --no-build-isolation -e .`"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA: install a build that does (https://pytorch.org), then {rebuild}"
    if extension is None or not isinstance(missing_extension, (type(None), ModuleNotFoundError)):
        return _without_extension("a C++17 compiler and nvcc", rebuild)
    if extension.CUDA is None:
        return (
            f"the extension was built without it: install the CUDA toolkit {torch.version.cuda} (nvcc), and {rebuild}"
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU: `nvidia-smi` tells whether there is one and its driver runs"
    return None


#: As pyproject.toml asks for it.
TRITON_AT_LEAST = (3, 6)


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton` (it comes with torch's builds for GPUs on Linux)"
    there = importlib.metadata.version("triton")
    if tuple(map(int, re.findall(r"\d+", there)[:2])) < TRITON_AT_LEAST:
        return f"triton {there} is older than {'.'.join(map(str, TRITON_AT_LEAST))}: take a torch that comes with a newer one"
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if not interpreted and not torch.cuda.is_available() and not torch.xpu.is_available():
        return "torch sees no GPU; on the CPU it runs in Triton's interpreter, slowly: set TRITON_INTERPRET=1 before the start"
    return None


def available_backends() -> dict[str, str | None]:
    """Backends by name, fastest first: None where usable, else a sentence that says what is missing and how to get it."""
    cpu = None
    if extension is None:
        cpu = _without_extension("a C++17 compiler (g++ or clang++)", REBUILD)
    else:
        try:
            extension.build_info()
        except RuntimeError as error:  # an instruction set was asked for that this processor has not
            cpu = str(error)
    return {"cuda": _missing_cuda(), "triton": _missing_triton(), "cpu": cpu, "reference": None}


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def name_of(backend: Backend, device: torch.device) -> str:
    """What ``get_backend`` calls it."""
    if backend is reference:
        return "reference"
    return device.type if backend is extension else "triton"


def get_backend(name: str, device: torch.device) -> Backend:
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
            name = "cpu" if extension is not None else "reference"
            if extension is None:
                _warn_once(f"backend 'reference', plain torch and several times slower, is used, as {missing['cpu']}")
        elif device.type == "cuda" and missing["cuda"] is None:
            name = "cuda"
        else:
            is_gpu = device.type in ("cuda", "xpu")
            name = "triton" if is_gpu and missing["triton"] is None else "reference"
            if is_gpu and name == "reference":
                _warn_once(
                    f"backend 'reference', plain torch and slower, is used on {device.type}, as {missing['triton']}"
                )
    if name not in missing:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")
    if missing[name] is not None:
        raise RuntimeError(f"backend {name!r} is not available: {missing[name]}")
    if name == "reference":
        return reference
    if name == "triton":
        from . import triton_kernels

        served = ("cpu",) if triton_kernels.INTERPRETED else ("cuda", "xpu")
        if device.type not in served:
            raise RuntimeError(
                f"backend 'triton' needs parameters on a GPU (cuda, xpu), or on the CPU with TRITON_INTERPRET=1 set before "
                f"the start; got {device} and TRITON_INTERPRET={int(triton_kernels.INTERPRETED)}: use backend='auto'"
            )
        return triton_kernels
    if device.type != name:
        where = "the CPU" if name == "cpu" else "a CUDA device"
        raise RuntimeError(f"backend {name!r} needs parameters on {where}, got {device}: use backend='auto'")
    if missing_extension is not None and not isinstance(missing_extension, ModuleNotFoundError):
        _warn_once(
            "kernels are called through torch's stable ABI, which is slower on small models, as "
            + _without_extension("", REBUILD)
        )
    # It has the operators by name; _C without torch.ops's parsing of lists, which would take longer than they do.
    return cast(Backend, extension)
