# SPDX-License-Identifier: Apache-2.0
"""``SAMTrainerMixin``: transformers' ``Trainer`` with every pass of the method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..batches import split
from ..optimizer import MicroBatchSAM, find

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # what stands behind the mixin is the user's choice

__all__ = ["SAMTrainerMixin"]


class SAMTrainerMixin(Trainer):
    """A ``Trainer`` that trains by the method; everything else of it stays what it is.

    ::

        class MyTrainer(SAMTrainerMixin, Trainer): ...

        MyTrainer(model, args, train_dataset=data, sam=dict(rho=0.05, method=methods.FriendlySAM())).train()

    Each batch of ``gradient_accumulation_steps`` is a micro-batch, with an e of its own; ``num_micro_batches`` splits each of
    them further. Clipping is that of the descent gradient. The loss that is reported is that at w.

    Args:
        sam: arguments of ``MicroBatchSAM`` for the optimizer that the Trainer makes, or was given without them. One that is a
            ``MicroBatchSAM`` already is taken as it is.
    """

    def __init__(self, *args: Any, sam: dict[str, Any] | None = None, **kwargs: Any):
        self._sam = {} if sam is None else dict(sam)
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        base = super().create_optimizer(*args, **kwargs)
        if not isinstance(base, MicroBatchSAM):
            self.optimizer = MicroBatchSAM(base, **self._sam)
        elif self._sam:
            raise ValueError(
                f"sam={self._sam} is for an optimizer that is no MicroBatchSAM yet, got one: give it its arguments"
            )
        return self.optimizer

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Every pass of one batch; the loss at w."""
        opt = find(self.optimizer)
        shares = iter(split((inputs,), opt.split)[1])
        share, losses = 1.0, []
        with opt.passes(inputs) as parts:
            for part in parts:
                share = share if opt.pass_index else next(shares)
                # Who divides the sum of a micro-batch by this number would divide by that of all, and have its share twice.
                items = num_items_in_batch if num_items_in_batch is None or share == 1 else num_items_in_batch * share
                loss = super().training_step(model, part, items, *args, **kwargs)
                if not opt.pass_index:
                    losses.append(loss * share)
        total: Tensor = sum(losses[1:], losses[0])
        return total
