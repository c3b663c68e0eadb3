# SPDX-License-Identifier: Apache-2.0
"""Accelerate, transformers' Trainer, Lightning and Fabric train to the bits of a plain loop over the same micro-batches.

Each framework has a function that trains with it, and all are held to ``plain_loop``; on two ranks, to plain loops in one
process. What is not installed is skipped; ``make frameworks`` installs all of it.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import BatchSampler, DataLoader, Dataset

import msam_kernels
from msam_kernels import MicroBatchSAM, methods
from plain import METHODS, PlainRanks, of_both_and_own, off, on_ranks, same_bits, weights

pytestmark = pytest.mark.host


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed: make frameworks")


SAMPLES, BATCH, EPOCHS = 24, 4, 2
STEPS_OF_EPOCH = SAMPLES // BATCH


class Net(nn.Module):
    """As transformers want a model: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.body, self.norm, self.head = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.norm(F.gelu(self.body(x))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Sums(Net):
    """As language models are: the loss is a sum, over the number of items that the Trainer counts in the whole step."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.head(self.norm(F.gelu(self.body(x))))
        if labels is None:
            return {"logits": logits}
        items = kwargs.get("num_items_in_batch", labels.numel())
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / items, "logits": logits}


class Data(Dataset[dict[str, Tensor]]):
    def __init__(self, samples: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(4)
        self.x = torch.randn(samples, 6, generator=generator)
        self.y = torch.randint(3, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


class Stateful(DataLoader[dict[str, Tensor]]):
    """Of which Lightning keeps where it was: it asks the loader, and skips nothing by itself."""

    done = skip = 0

    def __iter__(self) -> Iterator[Any]:
        begin, self.skip = self.skip, 0
        for self.done, batch in enumerate(super().__iter__(), 1):
            if self.done > begin:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % STEPS_OF_EPOCH}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["done"]


@dataclass
class Case:
    """What a training consists of, whoever runs it."""

    accumulate: int = 1
    split: int = 1
    bf16: bool = False
    clip: float = 0.0
    method: methods.SAM = field(default_factory=methods.SAM)
    base: str = "AdamW"
    scale: float = 0.0  # of fp16, at first

    @property
    def sam(self) -> dict[str, Any]:
        return dict(rho=0.3, num_micro_batches=self.split, method=self.method)

    def base_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        params = model.parameters()
        return AdamW(params, lr=0.02, weight_decay=0.0) if self.base == "AdamW" else SGD(params, lr=0.1, momentum=0.9)

    def optimizer(self, model: nn.Module, wrapped: nn.Module | None = None) -> MicroBatchSAM:
        """``wrapped``: the model as a framework has it."""
        return MicroBatchSAM(self.base_optimizer(model), **self.sam)

    def wrap(self, opt: MicroBatchSAM, wrapped: nn.Module) -> None:
        """What is to be known of the model as a framework has it, where that comes after the optimizer."""

    def model(self) -> nn.Module:
        return Net()

    def data(self) -> Data:
        return Data()

    def loader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.data(), batch_size=BATCH)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=3, enabled=self.scale > 0)

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.scale else torch.bfloat16
        return torch.autocast("cpu", dtype, enabled=self.bf16 or self.scale > 0)

    def scheduler(self, opt: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        steps = EPOCHS * STEPS_OF_EPOCH // self.accumulate
        # Frameworks do not agree on what it counts where a scaler skips steps.
        return torch.optim.lr_scheduler.LambdaLR(
            opt, lambda step: 1.0 if self.scale else max(0.0, (steps - step) / steps)
        )


CASES = {
    "as it comes": Case(),
    "F-SAM, SGD": Case(method=methods.FriendlySAM(), base="SGD"),
    "LookSAM": Case(method=methods.LookSAM(k=2), base="SGD"),
    "late": Case(method=methods.SAM(start=2)),
    "accumulation": Case(accumulate=2),
    "F-SAM, accumulation": Case(accumulate=2, method=methods.FriendlySAM()),
    "Bilateral, accumulation": Case(accumulate=2, method=methods.BilateralSAM()),
    "bf16": Case(bf16=True),
    "clipping": Case(clip=0.2),
    "bf16, accumulation, clipping": Case(accumulate=2, bf16=True, clip=0.2),
}
SPLIT = {"split": Case(split=2), "split, accumulation, clipping": Case(split=2, accumulate=2, clip=0.2)}
#: The first steps overflow.
FP16 = {
    "fp16": Case(scale=2.0**19),
    "fp16, F-SAM, SGD": Case(scale=2.0**19, method=methods.FriendlySAM(), base="SGD"),
    "fp16, F-SAM, accumulation, clipping": Case(accumulate=2, clip=0.2, scale=2.0**20, method=methods.FriendlySAM()),
    "fp16, WSAM, SGD": Case(scale=2.0**19, method=methods.WSAM(), base="SGD"),
}
RESUMED = ["as it comes", "F-SAM, SGD", "LookSAM", "late", "F-SAM, accumulation", "bf16, accumulation, clipping"]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def each_fp16(test: Any) -> Any:
    # torch's own, where a scaler skips the first step
    unwarned = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")(test)
    return pytest.mark.parametrize("case", FP16.values(), ids=FP16)(unwarned)


each_case_and_split = pytest.mark.parametrize("case", [*CASES.values(), *SPLIT.values()], ids=[*CASES, *SPLIT])


def plain_loop(case: Case, model: nn.Module, opt: MicroBatchSAM) -> list[float]:
    """The loss at w of every step."""
    scheduler, scaler, losses = case.scheduler(opt), case.scaler(), []
    for _ in range(EPOCHS):
        for i, batch in enumerate(case.loader()):
            losses += [0.0] if i % case.accumulate == 0 else []
            for part in opt.passes(batch, scaler=scaler):
                with case.autocast():
                    loss = model(**part)["loss"]
                scaler.scale(loss / case.accumulate).backward()
                if not opt.pass_index:
                    losses[-1] += loss.item() / case.accumulate / case.split
            if (i + 1) % case.accumulate == 0:
                if case.clip:
                    scaler.unscale_(opt)
                    nn.utils.clip_grad_norm_(model.parameters(), case.clip)
                scaler.step(opt)
                scaler.update()
                scheduler.step()
                opt.zero_grad()
    return losses


def check(case: Case, model: nn.Module, opt: MicroBatchSAM, losses: list[float] | None = None) -> None:
    """What a framework trained is what the plain loop trains."""
    expected = Net()
    theirs = case.optimizer(expected)
    at_w = plain_loop(case, expected, theirs)
    assert same_bits(model.parameters(), expected.parameters())
    whole = EPOCHS * STEPS_OF_EPOCH // case.accumulate
    assert opt.steps == theirs.steps
    assert 2 <= opt.steps < whole if case.scale else opt.steps == whole, "with fp16 some are skipped"
    if losses is not None:
        assert losses == pytest.approx(at_w, rel=2e-3 if case.bf16 or case.scale else 1e-6)
    plain = Net()
    plain_loop(replace(case, method=methods.SAM()), plain, without_sam(case, plain))
    assert not same_bits(plain.parameters(), expected.parameters())


#: The scale doubles after every third step, until it is too large.
SKIPS_LATER = replace(FP16["fp16, F-SAM, SGD"], scale=2.0**15)


def check_skipped(states: list[dict[str, Any]]) -> None:
    """Of state dicts after each step: one that was skipped has changed nothing, though its first pass was finite."""
    skipped = 0
    for before, after in pairwise(states):
        if before["param_groups"][0]["msam_steps"] == after["param_groups"][0]["msam_steps"]:
            skipped += 1
            for i, entry in before["state"].items():
                assert {"momentum_buffer", "msam_ema"} <= entry.keys()
                assert same_bits(entry.values(), after["state"][i].values())
    assert skipped


def without_sam(case: Case, model: nn.Module) -> MicroBatchSAM:
    opt = case.optimizer(model)
    opt.enabled = False
    return opt


# ---- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator_state() -> Iterator[None]:
    yield
    if find_spec("accelerate") is not None:
        forget_accelerator()


def forget_accelerator() -> None:
    """Accelerate keeps its settings for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


STOP = 4  # batches of the first epoch after which a checkpoint is saved, to go on from


def with_accelerate(
    case: Case, model: nn.Module, *, save: Path | None = None, load: Path | None = None
) -> MicroBatchSAM:
    """``save``: a checkpoint in mid-epoch. ``load``: go on from one."""
    from accelerate import Accelerator, skip_first_batches

    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if case.bf16 else "no", gradient_accumulation_steps=case.accumulate
    )
    if case.scale:
        scale(accelerator, model, case)
    net = accelerator.prepare(model)
    opt = case.optimizer(model, net)
    optimizer, batches, scheduler = accelerator.prepare(opt, case.loader(), case.scheduler(opt))
    own = Path(f"{load or save}-{accelerator.process_index}.pt")  # on several ranks
    if load is not None:
        accelerator.load_state(load)
        if accelerator.num_processes > 1:
            opt.load_state_dict(torch.load(own, weights_only=True))
    for epoch in range(EPOCHS):
        done = STOP if load is not None and epoch == 0 else 0
        for i, batch in enumerate(skip_first_batches(batches, done), done):
            with accelerator.accumulate(net):
                for part in msam_kernels.passes(optimizer, batch, scaler=accelerator.scaler):
                    accelerator.backward(net(**part)["loss"])
                if case.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), case.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if save is not None and (epoch, i + 1) == (0, STOP):
                accelerator.save_state(save)
                if accelerator.num_processes > 1:
                    torch.save(opt.state_dict(), own)
    return opt


def scale(accelerator: Any, model: nn.Module, case: Case) -> None:
    """fp16, which frameworks allow on GPUs alone: with its scaler, and a forward under autocast."""
    accelerator.scaler, accelerator.native_amp = case.scaler(), True
    accelerator.state._mixed_precision = "fp16"
    forward = model.forward

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with case.autocast():
            return forward(*args, **kwargs)

    model.forward = autocast


@needs("accelerate")
@each_case_and_split
def test_accelerate_trains_as_the_plain_loop(case, accelerator_state):
    model = Net()
    check(case, model, with_accelerate(case, model))


@needs("accelerate")
@each_fp16
def test_accelerate_trains_as_the_plain_loop_in_fp16(case, accelerator_state):
    model = Net()
    check(case, model, with_accelerate(case, model))


each_to_resume = pytest.mark.parametrize("case", [CASES[name] for name in RESUMED], ids=RESUMED)


@needs("accelerate")
@each_to_resume
def test_accelerate_resumes_in_mid_epoch(case, accelerator_state, tmp_path):
    with_accelerate(case, Net(), save=tmp_path)
    model = Net()
    check(case, model, with_accelerate(case, model, load=tmp_path))


@needs("accelerate")
def test_accelerate_as_it_was_written_for_another_optimizer_is_told_what_to_change(accelerator_state):
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), Net()
    net, optimizer = accelerator.prepare(model, Case().optimizer(model))
    accelerator.backward(net(**next(iter(Case().loader())))["loss"])
    with pytest.warns(UserWarning, match=r"with Accelerate, `for xb, yb in msam_kernels\.passes\(optimizer, x, y\)"):
        optimizer.step()


# ---- transformers ----------------------------------------------------------------------------------------------------


@needs("accelerate")
def test_what_accelerate_has_wrapped_is_no_base(accelerator_state):
    from accelerate import Accelerator

    model = Net()
    _, base = Accelerator(cpu=True).prepare(model, Case().base_optimizer(model))
    with pytest.raises(
        TypeError, match=r"is AcceleratedOptimizer, whose .*accelerator\.prepare\(MicroBatchSAM\(base\)\)"
    ):
        MicroBatchSAM(base)


def trainer(case: Case, model: nn.Module, folder: Path, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from msam_kernels.integrations.transformers import SAMTrainerMixin

    class MyTrainer(SAMTrainerMixin, Trainer):
        def save_model(self, output_dir: str | None = None, *_: Any, **__: Any) -> None:
            """As users write it, with what they know of: checkpoints are whole all the same."""
            super().save_model(output_dir)

    names = ("callbacks", "eval_dataset", "optimizers", "sam")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    options = dict(
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=case.accumulate,
        num_train_epochs=EPOCHS,
        max_grad_norm=case.clip,
        bf16=case.bf16,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    if "sam" not in own:  # with an optimizer of the user's
        opt = case.optimizer(model)
        own["optimizers"] = opt, case.scheduler(opt)
    arguments = TrainingArguments(str(folder), **{**options, **arguments})
    trained = MyTrainer(model, arguments, train_dataset=case.data(), **own)
    if case.scale:
        scale(trained.accelerator, model, case)
    return trained


def losses_of(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@needs("transformers")
@each_case_and_split
def test_transformers_train_as_the_plain_loop(case, accelerator_state, tmp_path):
    model = Net()
    trained = trainer(case, model, tmp_path)
    trained.train()
    # Reported with four digits after the point, or five.
    losses = losses_of(trained)
    check(case, model, trained.optimizer.optimizer, losses)


@needs("transformers")
@each_fp16
def test_transformers_train_as_the_plain_loop_in_fp16(case, accelerator_state, tmp_path):
    model = Net()
    trained = trainer(case, model, tmp_path)
    trained.train()
    check(case, model, trained.optimizer.optimizer)


@needs("transformers")
def test_transformers_save_no_trace_of_a_step_that_the_scaler_skips(accelerator_state, tmp_path):
    trained = trainer(SKIPS_LATER, Net(), tmp_path, save_strategy="steps", save_steps=1)
    trained.train()
    files = [tmp_path / f"checkpoint-{k}" / "optimizer.pt" for k in range(1, EPOCHS * STEPS_OF_EPOCH + 1)]
    check_skipped([torch.load(file, weights_only=True) for file in files])


@needs("transformers")
def test_transformers_train_again_with_the_optimizer_that_is_there(accelerator_state, tmp_path):
    model = Net()
    trained = trainer(Case(), model, tmp_path, sam=Case().sam, optim="sgd", learning_rate=0.1)
    trained.train()
    opt = trained.optimizer.optimizer
    trained.train()
    assert trained.optimizer.optimizer is opt
    assert isinstance(opt.base_optimizer, SGD)
    assert opt.steps == 2 * EPOCHS * STEPS_OF_EPOCH


@needs("transformers")
def test_transformers_give_the_optimizer_the_model(accelerator_state, tmp_path):
    model = Net()
    model.norm = nn.BatchNorm1d(16)
    trained = trainer(Case(), model, tmp_path, max_steps=3)
    trained.train()
    assert trained.optimizer.optimizer.model is model
    assert model.norm.num_batches_tracked == 3, "each batch counts once, in however many passes"
    alone = trainer(Case(), Net(), tmp_path, sam=dict(ascent="local"), optim="sgd")
    with pytest.raises(RuntimeError, match=r"'local' averages over ranks, and torch.distributed is not initialised"):
        alone.train()


@needs("transformers")
@each_to_resume
def test_transformers_resume_in_mid_epoch(case, accelerator_state, tmp_path):
    step = STOP // case.accumulate
    first = trainer(
        case, Net(), tmp_path, save_strategy="steps", save_steps=step, max_steps=EPOCHS * 6 // case.accumulate
    )
    first.train()
    model = Net()
    with torch.no_grad():  # what is loaded replaces these
        for p in model.parameters():
            p.zero_()
    second = trainer(case, model, tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    check(case, model, second.optimizer.optimizer)


@needs("transformers")
def test_transformers_wrap_the_optimizer_that_the_trainer_makes(accelerator_state, tmp_path):
    """As the README of transformers has it: the arguments name the optimizer, its groups and the scheduler."""
    model, expected = Net(), Net()
    options = dict(sam=dict(rho=0.3), optim="sgd", learning_rate=0.1, lr_scheduler_type="linear")
    trained = trainer(Case(), model, tmp_path, **options)
    trained.train()
    other = trainer(Case(), expected, tmp_path, **options)
    opt = other.create_optimizer()
    assert isinstance(opt.base_optimizer, SGD)
    plain_loop(Case(), expected, opt)
    assert same_bits(model.parameters(), expected.parameters())
    assert other.create_optimizer() is opt
    given = trainer(Case(), Net(), tmp_path, sam=dict(rho=0.3), optimizers=(opt, None))
    with pytest.raises(ValueError, match="is for an optimizer that is no MicroBatchSAM yet"):
        given.create_optimizer()


@needs("transformers")
def test_transformers_evaluate_stop_early_and_load_the_best_model(accelerator_state, tmp_path):
    from transformers import EarlyStoppingCallback

    model = Net()
    trained = trainer(
        Case(base="SGD"),
        model,
        tmp_path,
        callbacks=[EarlyStoppingCallback(1, 1e9)],  # nothing is better by so much than the first
        eval_dataset=Data(),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trained.train()
    opt = trained.optimizer.optimizer
    assert trained.state.global_step == opt.steps == 4
    evaluated = [entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert trained.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)
    data = Data()
    assert model(data.x, data.y)["loss"].item() == pytest.approx(min(evaluated), rel=1e-4), "the weights are w"


@needs("transformers")
def test_transformers_count_the_items_of_a_step_and_not_of_a_part(accelerator_state, tmp_path):
    case, model = Case(accumulate=2, split=2), Sums()
    trained = trainer(case, model, tmp_path)
    trained.train()
    expected = Net()
    opt = case.optimizer(expected)
    losses = plain_loop(case, expected, opt)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)  # AdamW's quotients magnify rounding
    assert losses_of(trained) == pytest.approx(losses, rel=1e-4)


@needs("transformers")
def test_a_trainer_without_the_mixin_is_told_of_it(accelerator_state, tmp_path):
    from transformers import Trainer

    trained = trainer(Case(), Net(), tmp_path, max_steps=1)
    trained.training_step = Trainer.training_step.__get__(trained)
    with pytest.warns(UserWarning, match=r"with transformers, `class MyTrainer\(SAMTrainerMixin, Trainer\)`"):
        trained.train()


@needs("transformers")
@pytest.mark.parametrize("search", [False, True], ids=["a training", "a search"])
def test_a_search_gets_no_folder_from_its_other_ranks(search, monkeypatch, tmp_path):
    """Its trials' checkpoints lie elsewhere, and a folder with one rank's file would be taken for one."""
    from msam_kernels.integrations import transformers

    monkeypatch.setattr(transformers, "_keeps_own", lambda *_: True)
    opt = MicroBatchSAM(SGD(Net().parameters(), lr=0.1))
    args = SimpleNamespace(save_only_model=False, output_dir=tmp_path, world_size=2, process_index=1)
    state = SimpleNamespace(is_hyper_param_search=search, global_step=3)
    transformers._Checkpoints().on_save(args, state, None, optimizer=opt)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.pt")] == (
        [] if search else ["checkpoint-3/msam_1.pt"]
    )


@needs("transformers")
def test_the_mixin_refuses_a_place_behind_the_trainer_and_what_is_no_dict(tmp_path):
    from transformers import Trainer

    from msam_kernels.integrations.transformers import SAMTrainerMixin

    class Other(Trainer): ...

    with pytest.raises(TypeError, match=r"Wrong has a Trainer before .*: write class Wrong\(SAMTrainerMixin, Other\)$"):

        class Wrong(Other, SAMTrainerMixin): ...

    class Wraps:  # no Trainer, whatever it has
        def train(self, *args: Any) -> Any:
            return super().train(*args)

    class Mine(Wraps, SAMTrainerMixin): ...

    assert issubclass(type("Right", (Mine, Trainer), {}), Wraps)

    class Logs:
        def training_step(self, *args: Any) -> Any:
            return super().training_step(*args)

    class Says:
        def train(self, *args: Any, **kwargs: Any) -> Any:
            return super().train(*args, **kwargs)

    class Right(Logs, Says, SAMTrainerMixin, Other): ...

    class Unfinished(Logs, SAMTrainerMixin): ...

    with pytest.raises(TypeError, match=r"sam must be a dict .* e\.g\. dict\(rho=0\.05\), got 0\.05"):
        trainer(Case(), Net(), tmp_path, sam=0.05)


# ---- Lightning -------------------------------------------------------------------------------------------------------


def fit(
    case: Case,
    model: nn.Module,
    *,
    manual: bool = False,
    load: Path | None = None,
    train_loader: DataLoader[dict[str, Tensor]] | None = None,
    **arguments: Any,
) -> Any:
    """(the LightningModule, the Trainer), trained, and evaluated in between.

    ``callbacks`` come after ours, which automatic optimization needs.
    """
    import lightning
    from lightning.pytorch import seed_everything
    from lightning.pytorch.plugins.precision import MixedPrecision

    from msam_kernels.integrations.lightning import SAMCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization, self.losses, self.befores = model, not manual, [], 0

        def configure_optimizers(self) -> Any:
            opt = case.optimizer(self.net, self.trainer.strategy.model)
            return [opt], [{"scheduler": case.scheduler(opt), "interval": "step"}]

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            if manual:
                return self.manually(batch, batch_idx)
            loss = self.net(batch.pop("x"), batch.pop("labels"))["loss"]
            self.log("loss", loss, on_step=True, on_epoch=True, batch_size=BATCH)
            return loss

        def manually(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            opt = self.optimizers()
            for part in opt.passes(batch, scaler=getattr(self.trainer.precision_plugin, "scaler", None)):
                loss = self.net(**part)["loss"]
                self.manual_backward(loss / case.accumulate)
                if not opt.pass_index:
                    self.losses.append(loss.item())
            if (batch_idx + 1) % case.accumulate == 0:
                if case.clip:
                    self.clip_gradients(opt, gradient_clip_val=case.clip)
                opt.step()
                self.lr_schedulers().step()
                opt.zero_grad()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.befores += 1
            assert all(p.grad is not None for p in self.net.parameters()), "what will be clipped and stepped on"

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not manual:
                self.losses.append(self.trainer.callback_metrics["loss_step"].item())

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.net(**batch)["loss"])

    seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    options = dict(
        accelerator="cpu",
        max_epochs=EPOCHS,
        precision=None if case.scale else "bf16-mixed" if case.bf16 else 32,
        plugins=[MixedPrecision("16-mixed", "cpu", case.scaler())] if case.scale else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if not manual:
        options.update(
            accumulate_grad_batches=case.accumulate,
            gradient_clip_val=case.clip or None,
            callbacks=[SAMCallback(), *arguments.pop("callbacks", [])],
        )
    trainer = lightning.Trainer(**{**options, **arguments})
    trainer.fit(module, train_loader or Stateful(Data(), batch_size=BATCH), case.loader(), ckpt_path=load)
    return module, trainer


def of_steps(case: Case, losses: list[float]) -> list[float]:
    """The mean of those of the batches that were accumulated."""
    n = case.accumulate
    return [sum(losses[i : i + n]) / n for i in range(0, len(losses), n)]


@needs("lightning")
@each_case
def test_lightning_trains_as_the_plain_loop(case):
    model = Net()
    module, trainer = fit(case, model)
    opt = trainer.optimizers[0]
    check(case, model, opt, of_steps(case, module.losses))
    assert trainer.global_step == module.befores == opt.steps
    assert "optimizer_step" not in vars(module)
    assert "training_step" not in vars(trainer.strategy)
    assert "log" not in vars(module)


@needs("lightning")
@each_case_and_split
def test_lightning_trains_by_hand_as_the_plain_loop(case):
    model = Net()
    module, trainer = fit(case, model, manual=True)
    opt = trainer.optimizers[0]
    check(case, model, opt, of_steps(Case(case.accumulate * case.split), module.losses))
    assert trainer.global_step == opt.steps


@needs("lightning")
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@each_fp16
def test_lightning_trains_as_the_plain_loop_in_fp16(case, manual):
    if manual:  # there Lightning clips what is yet to be unscaled
        case = replace(case, clip=0.0)
    model = Net()
    module, trainer = fit(case, model, manual=manual)
    check(case, model, trainer.optimizers[0], of_steps(case, module.losses))


@needs("lightning")
def test_lightning_leaves_no_trace_of_a_step_that_the_scaler_skips():
    from lightning.pytorch import Callback

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            states.append(copy.deepcopy(trainer.optimizers[0].state_dict()))

    states: list[dict[str, Any]] = []
    fit(SKIPS_LATER, Net(), callbacks=[Seen()])
    check_skipped(states)


@needs("lightning")
@each_to_resume
def test_lightning_resumes_in_mid_epoch(case, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    save = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=STOP // case.accumulate, filename="{step}")
    fit(case, Net(), enable_checkpointing=True, callbacks=[save])
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    _, trainer = fit(case, model, load=tmp_path / f"step={STOP // case.accumulate}.ckpt")
    check(case, model, trainer.optimizers[0])


@needs("lightning")
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning_without_the_loop_or_the_callback_is_told_of_them(manual):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = Net(), not manual

        def configure_optimizers(self) -> Any:
            return Case().optimizer(self.net)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            loss = self.net(**batch)["loss"]
            if not manual:
                return loss
            self.manual_backward(loss)
            grads = [p.grad.clone() for p in self.net.parameters()]
            try:
                self.optimizers().step()
            finally:
                assert same_bits([p.grad for p in self.net.parameters()], grads)
            return None

    options = dict(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer = lightning.Trainer(
        **options,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({} if manual else {"accumulate_grad_batches": 2}),
    )
    told = pytest.raises(RuntimeError, match=r"the closure left no gradient.*self\.manual_backward")
    if not manual:
        told = pytest.warns(UserWarning, match=r"step\(closure\) drops them.*SAMCallback")
    with told:
        trainer.fit(Module(), Case().loader())


@needs("lightning")
@pytest.mark.parametrize(
    "way", ["in a later pass", "at w", "at w, and the loop's end fails", "at w, and a callback before ours fails"]
)
def test_lightning_is_left_as_it_was_by_a_training_that_fails(way, monkeypatch):
    """At w, with its own functions, and the callback serves again."""
    import lightning
    from lightning.pytorch import Callback

    from msam_kernels.integrations.lightning import SAMCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.fails, self.at_w = Net(), True, []
            self.optimizer_step = partial(lightning.LightningModule.optimizer_step, self)  # as users replace it

        def configure_optimizers(self) -> Any:
            return Case().optimizer(self.net)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.is_last = self.fails and batch_idx == 2
            if self.optimizers().pass_index and self.is_last:
                assert not same_bits(self.parameters(), self.at_w)
                raise ArithmeticError("the user's")
            self.at_w = self.at_w if self.optimizers().pass_index else weights(self)
            return self.net(**batch)["loss"]

        def backward(self, loss: Tensor) -> None:
            if self.is_last and way != "in a later pass":
                raise ArithmeticError("the user's")
            loss.backward()

    class Before(Callback):
        def on_exception(self, *_: Any) -> None:
            if "callback" in way:
                raise ArithmeticError("the callback's")

    def loop(passes: Any) -> Iterator[Any]:
        try:
            yield from own_loop(passes)
        except GeneratorExit:
            raise ArithmeticError("the loop's") from None

    own_loop = msam_kernels.optimizer.Passes.__iter__
    options = dict(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    options |= dict(enable_progress_bar=False, enable_model_summary=False)
    module, callback = Module(), SAMCallback()
    replaced = module.optimizer_step
    trainer = lightning.Trainer(**options, callbacks=[Before(), callback])
    with monkeypatch.context() as patched, pytest.raises(ArithmeticError) as error:
        if "loop" in way:
            patched.setattr(msam_kernels.optimizer.Passes, "__iter__", loop)
        trainer.fit(module, Case().loader())
    assert str(error.value) == (
        "the loop's" if "loop" in way else "the callback's" if "callback" in way else "the user's"
    )
    assert same_bits(module.parameters(), module.at_w)

    def check() -> None:
        assert "training_step" not in vars(trainer.strategy)
        assert vars(module)["optimizer_step"] is replaced
        assert not {"log", "log_dict"} & vars(module).keys()

    if "callback" not in way:
        check()
    module.fails = False
    lightning.Trainer(**options, callbacks=[callback]).fit(module, Case().loader())
    check()
    assert module.optimizers().steps == STEPS_OF_EPOCH


@needs("lightning")
def test_lightning_refuses_what_the_callback_cannot_split():
    with pytest.raises(ValueError, match="the micro-batches are those of accumulate_grad_batches, got"):
        fit(SPLIT["split"], Net())


# ---- Fabric, and wrappers in general ---------------------------------------------------------------------------------


def with_fabric(case: Case, model: nn.Module, batches: Any = None, **options: Any) -> tuple[Any, MicroBatchSAM]:
    """(Fabric's optimizer, ours), after the training."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.precision import MixedPrecision

    scaler = case.scaler()
    if case.scale:
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    else:
        options["precision"] = "bf16-mixed" if case.bf16 else 32
    fabric = Fabric(**{"accelerator": "cpu", "devices": 1, **options})
    fabric.launch()
    opt = case.optimizer(model)
    scheduler = case.scheduler(opt)
    net, optimizer = fabric.setup(model, opt)
    case.wrap(opt, net)
    for _ in range(EPOCHS):
        for i, batch in enumerate(batches or case.loader()):
            last = (i + 1) % case.accumulate == 0
            with fabric.no_backward_sync(net, enabled=not last):
                for part in optimizer.passes(batch, scaler=scaler):
                    fabric.backward(net(**part)["loss"] / case.accumulate)
            if last:
                if case.clip:
                    fabric.clip_gradients(net, optimizer, max_norm=case.clip, error_if_nonfinite=False)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return optimizer, opt


# Fabric's notice, where one process has nothing to synchronise
@pytest.mark.filterwarnings("ignore:The `Fabric.no_backward_sync:UserWarning")
@needs("lightning")
@each_case_and_split
def test_fabric_trains_as_the_plain_loop_and_its_wrapper_has_no_state_of_its_own(case):
    model = Net()
    optimizer, opt = with_fabric(case, model)
    check(case, model, opt)
    assert optimizer.steps == opt.steps == opt.state_dict()["param_groups"][0]["msam_steps"]


@needs("lightning")
@each_fp16
def test_fabric_trains_as_the_plain_loop_in_fp16(case):
    model = Net()
    _, opt = with_fabric(case, model)
    check(case, model, opt)


@needs("lightning")
def test_what_is_set_on_a_wrapper_is_set_on_the_optimizer():
    from lightning.fabric import Fabric

    model = Net()
    opt = MicroBatchSAM(SGD(model.parameters(), lr=0.1), method=methods.SparseSAM(0.5, update_every=None))
    net, optimizer = Fabric(accelerator="cpu", devices=1).setup(model, opt)
    optimizer.num_micro_batches, optimizer.enabled, optimizer.steps, optimizer.strict = 2, False, 7, True
    optimizer.mask = [torch.ones_like(p, dtype=torch.bool) for p in model.parameters()]
    assert (opt.num_micro_batches, opt.enabled, opt.steps, opt.strict) == (2, False, 7, True)
    assert all(bits.all() for bits in opt.mask)
    batch = next(iter(Case().loader()))
    loss = optimizer.train_step(lambda part: net(**part)["loss"], batch)
    assert opt.steps == 8
    assert loss.isfinite()


@needs("lightning")
def test_the_drop_in_counts_its_steps_on_the_optimizer_whoever_wraps_it():
    from lightning.fabric import Fabric

    model = Net()
    opt = msam_kernels.SAM(model.parameters(), SGD, lr=0.1)
    net, optimizer = Fabric(accelerator="cpu", devices=1).setup(model, opt)
    for batch in Case().loader():
        for step in (optimizer.first_step, optimizer.second_step):
            net(**batch)["loss"].backward()
            step(zero_grad=True)
    assert optimizer.steps == opt.state_dict()["param_groups"][0]["msam_steps"] == STEPS_OF_EPOCH


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=96, max_position_embeddings=16)
    heads = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double()


def with_adapters() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(language_model(), config, autocast_adapter_dtype=False)


class Text(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.tokens = torch.randint(32, (SAMPLES, 8), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: Any) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def bytes_of_tensors() -> int:
    """Of all that live."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


each_for_adapters = pytest.mark.parametrize("name", ["SAM", "F-SAM"])


def adapted(model: nn.Module, name: str, **options: Any) -> MicroBatchSAM:
    return MicroBatchSAM(AdamW(model.parameters(), lr=0.01), 0.3, method=METHODS[name], model=model, **options)


@needs("peft")
@each_for_adapters
def test_adapters_train_as_the_plain_loops(name):
    model, expected = with_adapters(), with_adapters()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    before = weights(frozen)
    opt = adapted(model, name, num_micro_batches=2)
    theirs = PlainRanks(AdamW(adapters(expected), lr=0.01), 0.3, METHODS[name], world=1)
    for batch in DataLoader(Text(), batch_size=BATCH):
        for part in opt.passes(batch):
            model(**part)["loss"].backward()
        opt.step()
        opt.zero_grad()
        parts = [{k: t[half] for k, t in batch.items()} for half in (slice(0, 2), slice(2, 4))]
        theirs.step([lambda part=part: expected(**part)["loss"].backward() for part in parts])
        assert off(weights(adapters(model)), weights(adapters(expected))) <= 1e-10
    assert same_bits(frozen, before)


@needs("peft")
@each_for_adapters
def test_nothing_but_the_adapters_costs_memory(name):
    model = with_adapters()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    places, before = [p.data_ptr() for p in frozen], bytes_of_tensors()
    opt = adapted(model, name)
    for part in opt.passes(Text()[[0, 1, 2]]):
        model(**part)["loss"].backward()
    opt.step()
    opt.zero_grad()
    del part
    trained = sum(p.nbytes for p in adapters(model))
    assert trained < sum(p.nbytes for p in frozen) / 50
    # AdamW's two, w while the weights are at w + e, gradients, F-SAM's mean; and a table of where they are.
    assert bytes_of_tensors() - before < (5 + (name == "F-SAM")) * trained
    assert [p.data_ptr() for p in frozen] == places


@needs("peft")
def test_adapters_are_saved_at_w_and_load_into_another_model(tmp_path):
    from peft import PeftModel

    model = with_adapters()
    opt = adapted(model, "SAM")
    for batch in DataLoader(Text(), batch_size=BATCH):
        for part in opt.passes(batch):
            model(**part)["loss"].backward()
            if opt.pass_index:
                with pytest.raises(RuntimeError, match="perturbed"):
                    model.save_pretrained(tmp_path / "never")
        opt.step()
        opt.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(language_model(), tmp_path, autocast_adapter_dtype=False)
    tokens = Text().tokens
    with torch.no_grad():
        assert same_bits([loaded.eval()(tokens).logits], [model.eval()(tokens).logits])
        assert not same_bits([loaded(tokens).logits], [with_adapters().eval()(tokens).logits])


@needs("peft")
@needs("transformers")
@each_for_adapters
def test_transformers_train_adapters_and_resume(name, accelerator_state, tmp_path):
    class Adapters(Case):
        def data(self) -> Any:
            return Text()

    case = Adapters(accumulate=2)

    def train(model: nn.Module, **arguments: Any) -> nn.Module:
        options = dict(optimizers=(AdamW(model.parameters(), lr=0.01), None), lr_scheduler_type="constant")
        options |= dict(sam=dict(rho=0.3, method=METHODS[name]))
        begin = arguments.pop("begin", None)
        trainer(case, model, tmp_path, **options, **arguments).train(resume_from_checkpoint=begin)
        return model

    model = train(with_adapters(), save_strategy="steps", save_steps=2)
    saved = tmp_path / "checkpoint-2"
    assert (saved / "adapter_model.safetensors").exists()
    assert not (saved / "model.safetensors").exists()
    resumed = train(with_adapters(), begin=str(saved))
    assert same_bits(resumed.parameters(), model.parameters())
    expected = with_adapters()
    opt = adapted(expected, name)
    for _ in range(EPOCHS):
        for i, batch in enumerate(case.loader()):
            for part in opt.passes(batch):
                (expected(**part)["loss"] / 2).backward()
            if i % 2:
                opt.step()
                opt.zero_grad()
    assert off(weights(model), weights(expected)) <= 1e-10


# ---- two ranks -------------------------------------------------------------------------------------------------------

RANKS = 2


@dataclass
class Ranked(Case):
    """Rank 0 has the batches 0, 2, 4, …, rank 1 the others; so many of each as are accumulated make a step. All in fp64."""

    accumulate: int = 4
    base: str = "SGD"
    framework: str = "Accelerate"
    ascent: str = "local"
    items: bool = False  # some labels do not count, and losses are sums over those that do

    @property
    def sam(self) -> dict[str, Any]:
        return {**super().sam, "ascent": self.ascent}

    def optimizer(self, model: nn.Module, wrapped: nn.Module | None = None) -> MicroBatchSAM:
        known = {} if wrapped is None else dict(model=wrapped, ascent=self.ascent)
        return MicroBatchSAM(self.base_optimizer(model), **super().sam, **known)

    def wrap(self, opt: MicroBatchSAM, wrapped: nn.Module) -> None:
        opt.model = wrapped
        opt.ascent = self.ascent

    def scheduler(self, opt: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)  # Accelerate's moves once for each rank

    def model(self) -> nn.Module:
        return (Sums() if self.items else Net()).double()

    def data(self) -> Data:
        data = Data(3 * RANKS * self.accumulate * BATCH)  # three steps of an epoch
        data.x = data.x.double()
        if self.items:
            data.y[::3] = -100
        return data

    def train(self, rank: int, folder: Path, *, save: bool = False, load: Path | None = None) -> list[Tensor]:
        """The weights in the end. ``save``: with a checkpoint in mid-epoch."""
        forget_accelerator()
        model = self.model()
        # As torchrun says it; Lightning takes some of it away when it ends.
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost"}
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
        if self.framework == "Accelerate":
            with_accelerate(self, model, save=folder if save else None, load=load)
        elif self.framework == "Trainer":
            base = self.base_optimizer(model)
            options = dict(optimizers=(base, self.scheduler(base)), sam=self.sam)
            options |= dict(save_strategy="steps", save_steps=2) if save else {}
            trainer(self, model, folder, **options).train(resume_from_checkpoint=load and f"{load}/checkpoint-2")
        else:
            batches = list(BatchSampler(range(len(self.data())), BATCH, False))[rank::RANKS]
            batches = DataLoader(self.data(), batch_sampler=batches)
            if self.framework == "Fabric":
                with_fabric(self, model, batches, strategy="ddp", devices=RANKS)
            else:
                options = dict(strategy="ddp", devices=RANKS, use_distributed_sampler=False, limit_val_batches=0)
                fit(self, model, manual=self.framework == "by hand", train_loader=batches, **options)
        return weights(model)

    def train_plainly(self) -> list[Tensor]:
        """By plain loops in one process, over the micro-batches of all ranks."""
        model = self.model()
        base = self.base_optimizer(model)

        def clip(*_: Any) -> None:
            if self.clip:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)

        base.register_step_pre_hook(clip)
        theirs = PlainRanks(base, self.sam["rho"], self.method, world=RANKS)
        m, whole = self.split, list(self.loader()) * EPOCHS
        for begin in range(0, len(whole), RANKS * self.accumulate):
            step = whole[begin : begin + RANKS * self.accumulate]
            items = sum(int((batch["labels"] >= 0).sum()) for batch in step)
            each = [[part for batch in step[r::RANKS] for part in self.parts(batch)] for r in range(RANKS)]
            backward = [[partial(self.backward, model, part, items) for part in parts] for parts in each]
            if self.ascent == "global":
                for i in range(-m, 0):
                    both = {k: torch.cat([parts[i][k] for parts in each]) for k in each[0][i]}
                    for closures in backward:
                        closures[i] = of_both_and_own(partial(self.backward, model, both, items), closures[i])
            theirs.step([*backward[0], *backward[1]], [1 / RANKS / m] * len(each[0]) * RANKS)
        return weights(model)

    def parts(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        columns = [t.chunk(self.split) for t in batch.values()]
        return [dict(zip(batch, part, strict=True)) for part in zip(*columns, strict=True)]

    def backward(self, model: nn.Module, part: dict[str, Tensor], items: int) -> None:
        """``items``: of all ranks in the step, by which the Trainer has the sums of labels that count divided."""
        if self.items:
            loss = model(**part, num_items_in_batch=items / self.split)["loss"] * RANKS
        else:
            loss = model(**part)["loss"] / self.accumulate
        loss.backward()


RANKED = {
    f"{framework}, {base}, {name}, {ascent}": Ranked(
        framework=framework, base=base, method=METHODS[name], ascent=ascent
    )
    for framework in ("Accelerate", "Trainer", "Lightning")
    for base, name in (("SGD", "SAM"), ("AdamW", "SAM"), ("AdamW", "F-SAM"))
    for ascent in ("local", "global")
}
RANKED |= {f"Accelerate, {name}": Ranked(method=method) for name, method in METHODS.items()}
RANKED |= {
    f"{framework}, split, clipping, {ascent}": Ranked(framework=framework, split=2, clip=0.2, ascent=ascent)
    for framework in ("Accelerate", "Trainer")
    for ascent in ("local", "global")
}
RANKED |= {
    "Lightning by hand, local": Ranked(framework="by hand"),
    "Lightning by hand, global": Ranked(framework="by hand", accumulate=1, ascent="global"),
    "Fabric, local": Ranked(framework="Fabric", base="AdamW", method=METHODS["F-SAM"]),
    "Fabric, global": Ranked(framework="Fabric", ascent="global"),
    "Trainer, items": Ranked(framework="Trainer", items=True),
    "Trainer, items, split, F-SAM": Ranked(framework="Trainer", items=True, split=2, method=METHODS["F-SAM"]),
    "Trainer, no accumulation": Ranked(framework="Trainer", accumulate=1, method=METHODS["F-SAM"]),
}
#: Which loops count as what differs from one process: see docs/distributed.md.
UNLIKE_ONE_PROCESS = {"Accelerate, LookSAM k=2", "Accelerate, Sparse SAM", "Accelerate, F-SAM + Sparse + Stable"}
RESUMED_ON_RANKS = [name for name in RANKED if name.startswith(("Trainer, AdamW", "Accelerate, AdamW"))]
COMBINES = Ranked(framework="Trainer", method=METHODS["GSAM"], ascent="global")


def on_this_rank(rank: int, folder: str) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]], str]:
    """What each case trains, and does after it was resumed; and what is said where ranks would part."""
    trained, resumed, refusal = {}, {}, ""
    for i, (name, case) in enumerate(RANKED.items()):
        here, from_there = Path(folder, f"{i}"), Path(folder, f"{i} resumed")
        saves = name in RESUMED_ON_RANKS
        trained[name] = case.train(rank, here, save=saves)
        if saves:
            resumed[name] = case.train(rank, from_there, load=here)
        if i == 0:
            gc.freeze()  # the Trainer collects garbage whenever it begins
    try:
        COMBINES.train(rank, Path(folder, "refused"))
    except RuntimeError as error:
        refusal = str(error)
    return trained, resumed, refusal


@needs("accelerate")
@needs("transformers")
@needs("lightning")
def test_two_ranks_train_as_one_process_and_resume(tmp_path):
    (trained, resumed, refusal), (others, others_resumed, other_refusal) = on_ranks(
        RANKS, tmp_path, on_this_rank, str(tmp_path)
    )
    wrong = {name: "ranks part" for name in RANKED if not same_bits(trained[name], others[name])}
    for name in RANKED.keys() - UNLIKE_ONE_PROCESS:
        error = off(trained[name], RANKED[name].train_plainly())
        if not error <= 1e-10:
            wrong[name] = f"off by {error}"
    for name in RESUMED_ON_RANKS:
        if not (same_bits(resumed[name], trained[name]) and same_bits(others_resumed[name], trained[name])):
            wrong[name] = "resumed to something else"
    assert wrong == {}
    assert refusal == other_refusal
    assert 'use ascent="local"' in refusal


# ---- the page --------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parent.parent / "docs" / "frameworks.md"
RECIPES = {
    "Accelerate": "accelerate",
    "transformers": "transformers",
    "Lightning": "lightning",
    "Fabric": "lightning",
    "PEFT": "peft",
}


def recipe(heading: str) -> list[str]:
    """The blocks under headings that begin so."""
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    return [
        code
        for section in sections
        if section.startswith(heading)
        for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    ]


def test_every_block_of_the_page_is_of_a_recipe():
    assert sum(len(recipe(heading)) for heading in RECIPES) == PAGE.read_text(encoding="utf-8").count("```python") == 6


# The recipe leaves the Trainer's setting for GPUs as it is.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning")
@pytest.mark.parametrize("heading", [pytest.param(h, marks=needs(library)) for h, library in RECIPES.items()])
def test_the_recipe_of_the_page_runs_as_it_is_written(heading, tmp_path, accelerator_state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [(sample["x"], sample["labels"]) for sample in map(Data().__getitem__, range(SAMPLES))]
    model = Net() if heading == "transformers" else nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    names = dict(
        torch=torch,
        F=F,
        model=language_model() if heading == "PEFT" else model,
        loader=DataLoader(Text() if heading == "PEFT" else pairs, batch_size=BATCH),
        dataset=Data(),
        folder=str(tmp_path),
        options=dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False),
    )
    for code in recipe(heading):
        before = weights(names["model"])
        exec(compile(code, str(PAGE), "exec"), names)
        if heading == "PEFT":  # these begin with 0
            assert all(p.any() for name, p in names["model"].named_parameters() if "lora_B" in name)
        else:
            assert not same_bits(model.parameters(), before)
