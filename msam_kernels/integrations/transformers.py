# SPDX-License-Identifier: Apache-2.0
"""``SAMTrainerMixin``: transformers' ``Trainer`` with every pass of the method."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from .. import checkpoint
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

    The optimizer gets the model that the Trainer trains as its ``model``: on several ranks, the DistributedDataParallel module.
    Each rank adds to a checkpoint what the method remembers of the rank's own passes, e.g. F-SAM's mean gradient.

    Args:
        sam: arguments of ``MicroBatchSAM`` for the optimizer that the Trainer makes, or was given without them. One that is a
            ``MicroBatchSAM`` already is taken as it is.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        at = cls.__mro__.index(SAMTrainerMixin)
        before, behind = (
            any(issubclass(c, transformers.Trainer) and not issubclass(c, SAMTrainerMixin) for c in classes)
            for classes in (cls.__mro__[:at], cls.__mro__[at:])
        )
        if before and not behind:
            bases = sorted(cls.__bases__, key=lambda base: not issubclass(base, SAMTrainerMixin))
            raise TypeError(
                f"{cls.__name__} has a Trainer before SAMTrainerMixin, which so changes nothing of it: write class "
                f"{cls.__name__}({', '.join(base.__name__ for base in bases)})"
            )

    def __init__(self, *args: Any, sam: dict[str, Any] | None = None, **kwargs: Any):
        if not (sam is None or isinstance(sam, dict)):
            raise TypeError(f"sam must be a dict of MicroBatchSAM's arguments, e.g. dict(rho=0.05), got {sam!r}")
        self._sam = {} if sam is None else dict(sam)
        self._made: MicroBatchSAM | None = None
        self._begins_at: Any = None  # the checkpoint, or True for the latest
        self._begun: Any = None  # the state of the training that has gone on from there
        super().__init__(*args, **kwargs)
        self.add_callback(_Checkpoints())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        base = super().create_optimizer(*args, **kwargs)
        there = None
        with suppress(TypeError):
            there = find(base)
        if there is None:
            # Another ascent needs the model that the Trainer is yet to wrap: see ``_follow``.
            self._made = self.optimizer = MicroBatchSAM(base, **{**self._sam, "ascent": "global"})
        elif there is not self._made and self._sam:
            raise ValueError(
                f"sam={self._sam} is for an optimizer that is no MicroBatchSAM yet, got one: give it its arguments, or give "
                "the Trainer its base optimizer"
            )
        return self.optimizer

    def _follow(self, opt: MicroBatchSAM, model: Any) -> None:
        """Tell the optimizer what is trained, and then whose gradients its perturbation is made of."""
        if opt.model is not model:
            opt.model = model
        if opt is self._made:
            ascent = self._sam.get("ascent", "global")
            if opt.ascent != ascent:
                opt.ascent = ascent

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Every pass of one batch; the loss at w."""
        opt = find(self.optimizer)
        self._follow(opt, model)
        self._go_on(opt)
        shares = iter(split((inputs,), opt.split)[1])
        share, losses = 1.0, []
        with opt.passes(inputs, scaler=self.accelerator.scaler) as parts:
            for part in parts:
                share = share if opt.pass_index else next(shares)
                # Who divides the sum of a micro-batch by this number would divide by that of all, and have its share twice.
                items = num_items_in_batch if num_items_in_batch is None or share == 1 else num_items_in_batch * share
                loss = super().training_step(model, part, items, *args, **kwargs)
                if not opt.pass_index:
                    losses.append(loss * share)
        total: Tensor = sum(losses[1:], losses[0])
        return total

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._begins_at = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _go_on(self, opt: MicroBatchSAM) -> None:
        """Where training was resumed, with what this rank remembered; a new rank, with what the one has that saved."""
        if self._begun is self.state:
            return
        self._begun, folder = self.state, self._begins_at
        if folder is True:
            folder = _checkpoint_of(self.args, self.state)
        if folder and _keeps_own(self.args, opt):
            file = _own_file(self.args, folder)
            own = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}
            if (own.get("world_size"), own.get("steps")) == (self.args.world_size, opt.steps):
                checkpoint.load_own(opt.engine, own)
            else:
                there = "is of another run" if own else "is not there"
                warnings.warn(
                    f"{file} {there}: this rank goes on with what the rank that saved the checkpoint remembered",
                    stacklevel=2,
                )


class _Checkpoints(transformers.TrainerCallback):
    """The Trainer saves the optimizer of one rank, by methods that users replace; its callbacks are called in any case."""

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # It cleared the model's gradients, and a step that a scaler skipped is to leave no trace.
        find(optimizer).zero_grad()

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        opt = find(optimizer)
        # The checkpoints of a search lie in folders that no callback is told of.
        if not args.save_only_model and not state.is_hyper_param_search and _keeps_own(args, opt):
            folder = _checkpoint_of(args, state)
            folder.mkdir(parents=True, exist_ok=True)
            own = {"world_size": args.world_size, **checkpoint.remembered(opt.engine)}
            torch.save(own, _own_file(args, folder))


def _keeps_own(args: Any, opt: MicroBatchSAM) -> bool:
    """Whether this rank's own passes move what the method remembers, and the Trainer's file has that of another rank."""
    plan = opt.method.full
    keeps = plan.lmbda is not None or plan.sparse is not None
    return keeps and opt.engine.ranks.is_replicated and not args.should_save


def _checkpoint_of(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def _own_file(args: Any, folder: str | Path) -> Path:
    return Path(folder, f"msam_{args.process_index}.pt")
