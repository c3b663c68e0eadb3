# SPDX-License-Identifier: Apache-2.0
"""What would train something else than the method without a word, and the sentence for it, in the terms of the framework."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator

#: By the modules that call: what to write there instead. The first one that is under way counts.
REMEDIES = {
    ("transformers.trainer",): (
        "with transformers, `class MyTrainer(SAMTrainerMixin, Trainer)` runs every pass, if a training_step of its own calls "
        "super's; it is in msam_kernels.integrations.transformers"
    ),
    ("lightning.pytorch", "pytorch_lightning"): (
        "with Lightning, `Trainer(callbacks=[SAMCallback()])` of msam_kernels.integrations.lightning runs every pass; in "
        "manual optimization, `for xb, yb in self.optimizers().passes(x, y): self.manual_backward(loss_fn(self(xb), yb))`"
    ),
    ("lightning.fabric", "lightning_fabric"): (
        "with Fabric, `for xb, yb in optimizer.passes(x, y): fabric.backward(loss_fn(model(xb), yb))`"
    ),
    ("accelerate",): (
        "with Accelerate, `for xb, yb in msam_kernels.passes(optimizer, x, y): accelerator.backward(loss_fn(model(xb), yb))`"
    ),
}
REMEDY = "`for xb, yb in opt.passes(x, y): loss_fn(model(xb), yb).backward()`, or give step() a closure"
OURS = ("msam_kernels", "torch")


def _is_of(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def callers() -> Iterator[str]:
    """The modules that are under way, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_globals.get("__name__") or ""
        frame = frame.f_back


def remedy() -> str:
    """What to write instead, in the words of the framework that calls. A look at the stack: only for who has to be told."""
    modules = set(callers())
    return next((text for names, text in REMEDIES.items() if any(_is_of(m, names) for m in modules)), REMEDY)


def warn(text: str) -> None:
    """A warning about the line outside of this package and torch that has led here."""
    modules = list(callers())
    outside = next((i for i, module in enumerate(modules) if not _is_of(module, OURS)), 1)  # 0 is `callers` itself
    warnings.warn(text, stacklevel=outside)


class Mistakes:
    """Says each of them once; with ``strict`` it is an error every time."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self._said: set[str] = set()

    def say(self, kind: str, sentence: str, *, remedy_of_caller: bool = False) -> None:
        """Before anything was changed.

        Raises:
            RuntimeError: ``strict``.
        """
        if not self.strict and kind in self._said:
            return
        text = f"{sentence}{remedy()}" if remedy_of_caller else sentence
        if self.strict:
            raise RuntimeError(text)
        self._said.add(kind)
        warn(text)
