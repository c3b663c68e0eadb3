# SPDX-License-Identifier: Apache-2.0
"""Accelerate, transformers' Trainer, Lightning and Fabric train to the bits of a plain loop over the same micro-batches.

Each framework has a function that trains with it, and all are held to ``plain_loop``. What is not installed is skipped;
``make frameworks`` installs all of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Dataset

import msam_kernels
from msam_kernels import MicroBatchSAM, methods
from plain import same_bits

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


class Data(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.x = torch.randn(SAMPLES, 6, generator=generator)
        self.y = torch.randint(3, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Data(), batch_size=BATCH)


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

    @property
    def sam(self) -> dict[str, Any]:
        return dict(rho=0.3, num_micro_batches=self.split, method=self.method)

    def optimizer(self, model: nn.Module) -> MicroBatchSAM:
        params = model.parameters()
        base = AdamW(params, lr=0.02, weight_decay=0.0) if self.base == "AdamW" else SGD(params, lr=0.1, momentum=0.9)
        return MicroBatchSAM(base, **self.sam)

    def scheduler(self, opt: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        steps = EPOCHS * STEPS_OF_EPOCH // self.accumulate
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: max(0.0, (steps - step) / steps))


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
RESUMED = ["as it comes", "F-SAM, SGD", "LookSAM", "late", "F-SAM, accumulation", "bf16, accumulation, clipping"]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_case_and_split = pytest.mark.parametrize("case", [*CASES.values(), *SPLIT.values()], ids=[*CASES, *SPLIT])


def plain_loop(case: Case, model: nn.Module, opt: MicroBatchSAM) -> list[float]:
    """The loss at w of every step."""
    scheduler, losses = case.scheduler(opt), []
    for _ in range(EPOCHS):
        for i, batch in enumerate(loader()):
            losses += [0.0] if i % case.accumulate == 0 else []
            for part in opt.passes(batch):
                with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
                    loss = model(**part)["loss"]
                (loss / case.accumulate).backward()
                if not opt.pass_index:
                    losses[-1] += loss.item() / case.accumulate / case.split
            if (i + 1) % case.accumulate == 0:
                if case.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), case.clip)
                opt.step()
                scheduler.step()
                opt.zero_grad()
    return losses


def check(case: Case, model: nn.Module, opt: MicroBatchSAM, losses: list[float] | None = None) -> None:
    """What a framework trained is what the plain loop trains."""
    expected = Net()
    theirs = case.optimizer(expected)
    at_w = plain_loop(case, expected, theirs)
    assert same_bits(model.parameters(), expected.parameters())
    assert opt.steps == theirs.steps == EPOCHS * STEPS_OF_EPOCH // case.accumulate
    if losses is not None:
        assert losses == pytest.approx(at_w, rel=2e-3 if case.bf16 else 1e-6)
    plain = Net()
    plain_loop(
        Case(case.accumulate, case.split, case.bf16, case.clip, methods.SAM(), case.base),
        plain,
        without_sam(case, plain),
    )
    assert not same_bits(plain.parameters(), expected.parameters())


def without_sam(case: Case, model: nn.Module) -> MicroBatchSAM:
    opt = case.optimizer(model)
    opt.enabled = False
    return opt


# ---- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator_state() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    if find_spec("accelerate") is None:
        return
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


STOP = 4  # batches of the first epoch after which a training that is interrupted ends


def with_accelerate(
    case: Case, model: nn.Module, opt: MicroBatchSAM, *, save: Path | None = None, load: Path | None = None
) -> None:
    """``save``: leave in mid-epoch, with a checkpoint there. ``load``: go on from one."""
    from accelerate import Accelerator, skip_first_batches

    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if case.bf16 else "no", gradient_accumulation_steps=case.accumulate
    )
    net, optimizer, batches, scheduler = accelerator.prepare(model, opt, loader(), case.scheduler(opt))
    if load is not None:
        accelerator.load_state(load)
    for epoch in range(EPOCHS):
        done = STOP if load is not None and epoch == 0 else 0
        for i, batch in enumerate(skip_first_batches(batches, done), done):
            with accelerator.accumulate(net):
                for part in msam_kernels.passes(optimizer, batch):
                    accelerator.backward(net(**part)["loss"])
                if case.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), case.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if save is not None and (epoch, i + 1) == (0, STOP):
                accelerator.save_state(save)
                return


@needs("accelerate")
@each_case_and_split
def test_accelerate_trains_as_the_plain_loop(case, accelerator_state):
    model = Net()
    opt = case.optimizer(model)
    with_accelerate(case, model, opt)
    check(case, model, opt)


each_to_resume = pytest.mark.parametrize("case", [CASES[name] for name in RESUMED], ids=RESUMED)


@needs("accelerate")
@each_to_resume
def test_accelerate_resumes_in_mid_epoch(case, accelerator_state, tmp_path):
    first = Net()
    with_accelerate(case, first, case.optimizer(first), save=tmp_path)
    model = Net()
    opt = case.optimizer(model)
    with_accelerate(case, model, opt, load=tmp_path)
    check(case, model, opt)


@needs("accelerate")
def test_accelerate_as_it_was_written_for_another_optimizer_is_told_what_to_change(accelerator_state):
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), Net()
    net, optimizer = accelerator.prepare(model, CASES["as it comes"].optimizer(model))
    accelerator.backward(net(**next(iter(loader())))["loss"])
    with pytest.warns(UserWarning, match=r"with Accelerate, `for xb, yb in msam_kernels\.passes\(optimizer, x, y\)"):
        optimizer.step()


# ---- transformers ----------------------------------------------------------------------------------------------------


def trainer(case: Case, model: nn.Module, folder: Path, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from msam_kernels.integrations.transformers import SAMTrainerMixin

    class MyTrainer(SAMTrainerMixin, Trainer): ...

    own = {name: arguments.pop(name) for name in ("callbacks", "eval_dataset", "sam") if name in arguments}
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
    return MyTrainer(model, TrainingArguments(str(folder), **{**options, **arguments}), train_dataset=Data(), **own)


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
    with pytest.raises(ValueError, match="is for an optimizer that is no MicroBatchSAM yet"):
        other.create_optimizer()


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


class Sums(Net):
    """As language models are: the loss is a sum, over the number of items that the Trainer counts in the whole step."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.head(self.norm(F.gelu(self.body(x))))
        if labels is None:
            return {"logits": logits}
        items = kwargs.get("num_items_in_batch", labels.numel())
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / items, "logits": logits}


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


# ---- Lightning -------------------------------------------------------------------------------------------------------


def fit(case: Case, model: nn.Module, *, manual: bool = False, load: Path | None = None, **arguments: Any) -> Any:
    """(the LightningModule, the Trainer), trained. ``callbacks`` come after ours, which automatic optimization needs."""
    import lightning
    from lightning.pytorch import seed_everything

    from msam_kernels.integrations.lightning import SAMCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization, self.losses, self.befores = model, not manual, [], 0

        def configure_optimizers(self) -> Any:
            opt = case.optimizer(self.net)
            return [opt], [{"scheduler": case.scheduler(opt), "interval": "step"}]

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            if manual:
                return self.manually(batch, batch_idx)
            loss = self.net(batch.pop("x"), batch.pop("labels"))["loss"]
            self.log("loss", loss, on_step=True, on_epoch=True, batch_size=BATCH)
            return loss

        def manually(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            opt = self.optimizers()
            for part in opt.passes(batch):
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
        precision="bf16-mixed" if case.bf16 else 32,
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
    trainer.fit(module, Stateful(Data(), batch_size=BATCH), loader(), ckpt_path=load)  # evaluated in between
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
        trainer.fit(Module(), loader())


@needs("lightning")
def test_lightning_refuses_what_the_callback_cannot_split():
    with pytest.raises(ValueError, match="the micro-batches are those of accumulate_grad_batches, got"):
        fit(SPLIT["split"], Net())


# ---- Fabric, and wrappers in general ---------------------------------------------------------------------------------


@needs("lightning")
@each_case_and_split
def test_fabric_trains_as_the_plain_loop_and_its_wrapper_has_no_state_of_its_own(case):
    from lightning.fabric import Fabric

    fabric, model = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if case.bf16 else 32), Net()
    opt = case.optimizer(model)
    scheduler = case.scheduler(opt)
    net, optimizer = fabric.setup(model, opt)
    for _ in range(EPOCHS):
        for i, batch in enumerate(loader()):
            for part in optimizer.passes(batch):
                fabric.backward(net(**part)["loss"] / case.accumulate)
            if (i + 1) % case.accumulate == 0:
                if case.clip:
                    fabric.clip_gradients(net, optimizer, max_norm=case.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    check(case, model, opt)
    assert optimizer.steps == opt.steps == opt.state_dict()["param_groups"][0]["msam_steps"]


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
    batch = next(iter(loader()))
    loss = optimizer.train_step(lambda part: net(**part)["loss"], batch)
    assert opt.steps == 8
    assert loss.isfinite()


@needs("lightning")
def test_the_drop_in_counts_its_steps_on_the_optimizer_whoever_wraps_it():
    from lightning.fabric import Fabric

    model = Net()
    opt = msam_kernels.SAM(model.parameters(), SGD, lr=0.1)
    net, optimizer = Fabric(accelerator="cpu", devices=1).setup(model, opt)
    for batch in loader():
        for step in (optimizer.first_step, optimizer.second_step):
            net(**batch)["loss"].backward()
            step(zero_grad=True)
    assert optimizer.steps == opt.state_dict()["param_groups"][0]["msam_steps"] == STEPS_OF_EPOCH


# ---- the page --------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parent.parent / "docs" / "frameworks.md"
RECIPES = {
    "Accelerate": "accelerate",
    "transformers": "transformers",
    "Lightning": "lightning",
    "Fabric": "lightning",
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
    assert sum(len(recipe(heading)) for heading in RECIPES) == PAGE.read_text(encoding="utf-8").count("```python") == 5


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
        model=model,
        loader=DataLoader(pairs, batch_size=BATCH),
        dataset=Data(),
        folder=str(tmp_path),
        options=dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False),
    )
    before = [p.detach().clone() for p in model.parameters()]
    for code in recipe(heading):
        exec(compile(code, str(PAGE), "exec"), names)
        assert not same_bits(model.parameters(), before)
        before = [p.detach().clone() for p in model.parameters()]
