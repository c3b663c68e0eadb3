# SPDX-License-Identifier: Apache-2.0
"""``SAMCallback``: Lightning's automatic optimization with every pass of the method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from ..batches import rebuilt
from ..optimizer import MicroBatchSAM, find

__all__ = ["SAMCallback"]


class SAMCallback(Callback):
    """Runs every pass in automatic optimization, where ``configure_optimizers`` returns a ``MicroBatchSAM``.

    ::

        Trainer(callbacks=[SAMCallback()], accumulate_grad_batches=4, gradient_clip_val=1.0).fit(model, loader)

    ``training_step`` runs once for each pass, hooks around ``backward`` and the optimizer's step once for each batch. Each
    batch of ``accumulate_grad_batches`` is a micro-batch, with an e of its own. Clipping is that of the descent gradient. What
    ``training_step`` logs, and the loss, is that at w; its later passes log nothing.

    In manual optimization it does nothing: ``for part in self.optimizers().passes(batch)`` is all that is needed there.

    Raises:
        TypeError: the optimizer is no ``MicroBatchSAM``.
        ValueError: ``num_micro_batches`` or ``micro_batch_size`` of it would split Lightning's batches.
    """

    def __init__(self) -> None:
        self._opt: MicroBatchSAM | None = None
        self._turns: Generator[Any, None, None] | None = None
        self._batch: tuple[Any, ...] = ()
        self._undo = ExitStack()  # what Lightning finds instead of its own

    # -- around training ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._leave()  # a training whose end another callback kept from here
        if not pl_module.automatic_optimization:
            return
        opt = find(trainer.optimizers[0])
        if not opt.split.leaves_whole:
            raise ValueError(
                f"Lightning runs a batch as one: the micro-batches are those of accumulate_grad_batches, got {opt.split}; "
                "or use manual optimization with a passes() loop, which splits a batch"
            )
        step = partial(self._step, trainer, pl_module.optimizer_step)
        forward = partial(self._forward, trainer.strategy.training_step)
        self._opt = opt
        self._undo.enter_context(_replaced(pl_module, optimizer_step=step))
        self._undo.enter_context(_replaced(trainer.strategy, training_step=forward))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        turns, self._turns, self._opt, self._batch = self._turns, None, None, ()
        with self._undo.pop_all():
            if turns is not None:
                turns.close()

    # -- a batch ------------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
        self._batch = (rebuilt(batch), batch_idx) if takes_index else (rebuilt(batch),)

    def _forward(self, own: Callable[..., Any], *args: Any) -> Any:
        """Lightning's own forward is that of the pass at w, and comes before the loop: what holds DDP back holds here too."""
        assert self._opt is not None
        if self._turns is not None:
            return own(*args)
        ranks = self._opt.engine.ranks
        ranks.hold_back()
        try:
            return own(*args)
        finally:
            ranks.release()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """The pass at w is Lightning's own, but for the gradients of batches before."""
        if self._opt is not None and self._turns is None:
            self._turns = iter(self._opt.passes(scaler=_scaler(trainer)))
            next(self._turns)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._turns is None:
            return
        precision, scaler = trainer.precision_plugin, _scaler(trainer)
        try:
            for _ in self._turns:
                with _replaced(pl_module, log=_no_log, log_dict=_no_log):
                    output = trainer.strategy.training_step(*rebuilt(self._batch))
                loss = output["loss"] if isinstance(output, Mapping) else output
                if loss is None:
                    raise RuntimeError("training_step returned a loss at w, and None in a later pass of the same batch")
                loss = loss / trainer.accumulate_grad_batches
                precision.backward(loss if scaler is None else scaler.scale(loss), pl_module, self._opt)
        finally:
            self._turns.close()
            self._turns = None

    def _step(
        self,
        trainer: Any,
        own: Callable[..., None],
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """The module's ``optimizer_step``, after every pass has run: Lightning clips and steps on what they left."""
        result = None if optimizer_closure is None else optimizer_closure()
        opt = self._opt
        if result is not None or (opt is not None and opt.engine.has_mean):
            own(epoch, batch_idx, optimizer, lambda: result)
        if opt is not None and opt.engine.has_mean and _scaler(trainer) is not None:  # which skipped the step
            opt.zero_grad()  # as Lightning does before the next batch: a checkpoint in between has what was before


def _scaler(trainer: Any) -> torch.amp.GradScaler | None:
    """Of fp16."""
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler


def _no_log(*args: Any, **kwargs: Any) -> None:
    """Of passes after that at w."""


@contextmanager
def _replaced(holder: Any, **attributes: Any) -> Iterator[None]:
    """Attributes in an object itself; those that it had come back."""
    own = {name: value for name, value in vars(holder).items() if name in attributes}
    try:
        vars(holder).update(attributes)
        yield
    finally:
        for name in attributes:
            vars(holder).pop(name, None)
        vars(holder).update(own)
