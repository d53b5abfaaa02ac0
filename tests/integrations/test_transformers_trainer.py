"""Masks in transformers' own Trainer: against the same training with the mask done by hand."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lightning_mask import MaskSet
from lightning_mask.core import Context, Selection
from lightning_mask.core.selection import select
from lightning_mask.integrations.pruning import Pruning
from lightning_mask.integrations.transformers import MaskCallback

Make = Callable[[], nn.Module]
_GENERATOR = torch.Generator().manual_seed(1)
DATA = [
    {
        "input_ids": torch.randint(3, 60, (7,), generator=_GENERATOR),
        "attention_mask": torch.ones(7, dtype=torch.int64),
        "labels": i % 3,
    }
    for i in range(40)
]


def trained(
    model: nn.Module,
    folder: Path,
    *callbacks: TrainerCallback,
    trainer: type[Trainer] = Trainer,
    resume: Path | None = None,
    collator: Any = None,
    **arguments: Any,
) -> Trainer:
    """15 steps of two batches each, clipped, with momentum and weight decay; the last window of an epoch is as long."""
    given = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.3,
        "logging_steps": 1,
        "save_strategy": "no",
        **arguments,
    }
    args = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, use_cpu=True, seed=3, **given)
    done = trainer(model, args, train_dataset=DATA, callbacks=list(callbacks), data_collator=collator)
    done.train(resume_from_checkpoint=None if resume is None else str(resume))
    return done


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def norms(trainer: Trainer) -> list[float]:
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


def some_masks(model: nn.Module) -> MaskSet:
    """Scattered entries of most tensors, two of them whole, the embeddings held."""
    drawn = select(
        Selection(train=["classifier", "*.1.output.dense.bias"], score="random", density=0.2), model, Context(model)
    )
    return MaskSet({n: torch.zeros_like(m) if "embeddings" in n else m for n, m in drawn.items()})


class ByHand(Trainer):
    """What everybody writes: zero gradients where the mask is False, put the values back after the step."""

    masks: Mapping[str, Tensor]

    def training_step(self, model: nn.Module, *inputs: Any, **more: Any) -> Tensor:
        loss = super().training_step(model, *inputs, **more)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.grad = torch.where(self.masks[name], parameter.grad, 0.0)
        return loss


class PutBack(TrainerCallback):
    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.model, self.masks = model, masks
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(torch.where(self.masks[name], parameter, self.values[name]))


@pytest.mark.parametrize("arguments", [{}, {"bf16": True, "max_steps": 4}, {"optim": "adafactor", "max_steps": 4}])
def test_trains_as_if_the_mask_were_done_by_hand(tiny: Make, tmp_path: Path, arguments: dict[str, Any]) -> None:
    masks = some_masks(tiny())
    whole = tiny()
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(bool(masks[name].any()))  # else the norm of 0 tensors would round otherwise
    ByHand.masks = masks
    expected = trained(whole, tmp_path, PutBack(whole, masks), trainer=ByHand, **arguments)
    before = tiny().state_dict()
    for engine in ("auto", "dense"):
        callback = MaskCallback(Selection(mask=masks), engine=engine)
        found = trained(tiny(), tmp_path, callback, **arguments)
        if (
            arguments.get("optim") != "adafactor"
        ):  # its second moments are of rows and columns, with the held ones' zeros
            assert_equal(weights(found), weights(expected))
            assert norms(found) == norms(expected)
        for name, mask in masks.items():
            after = found.model.get_parameter(name)
            assert torch.equal(after[~mask], before[name][~mask])
            assert not torch.equal(after[mask], before[name][mask]) or not mask.any()
        assert callback.masks == masks


def test_everything_active_is_training_without_a_callback(tiny: Make, tmp_path: Path) -> None:
    plain = trained(tiny(), tmp_path)
    ours = trained(tiny(), tmp_path, MaskCallback(Selection(score="fisher", density=1.0, batches=3)))
    assert_equal(weights(ours), weights(plain))
    assert norms(ours) == norms(plain)


def test_a_criterion_sees_the_first_batches_of_training(tiny: Make, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = transformers.default_data_collator(examples)
        seen.append(batch["input_ids"])
        return batch

    selection = Selection(train="classifier", score="fisher", density=0.1, batches=3)
    callback = MaskCallback(selection)
    trained(tiny(), tmp_path, callback, collator=collate, max_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:6], strict=True))
    by_ids = {tuple(row["input_ids"].tolist()): row for row in DATA}
    batches = [transformers.default_data_collator([by_ids[tuple(ids.tolist())] for ids in part]) for part in seen[:3]]
    model = tiny()
    expected = select(selection, model, Context(model, lambda batch: model(**batch).loss, lambda: batches))
    assert callback.masks == expected


def test_the_loss_may_be_the_trainers(tiny: Make, tmp_path: Path) -> None:
    asked: list[Any] = []

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        asked.append(batch)
        return -model(**batch).loss

    own = MaskCallback(Selection(score="movement", density=0.1, batches=2), loss=loss_of)
    other = MaskCallback(Selection(score="movement", density=0.1, batches=2))
    for callback in (own, other):
        trained(tiny(), tmp_path, callback, max_steps=1)
    assert len(asked) == 2
    assert own.masks != other.masks, "movement has a sign"


def everything(engine: str = "auto") -> MaskCallback:
    return MaskCallback(
        Selection(train="classifier", score="fisher", density=0.05, batches=2),
        then=[("5 steps", Selection(train=["classifier", "layers:-1:"])), ("50%", None)],
        pruning=Pruning(0.5, start="60%", end="90%", every="2 steps", allocation="uniform"),
        engine=engine,
    )


@pytest.mark.slow
def test_phases_and_pruning_and_a_resume_at_any_checkpoint(tiny: Make, tmp_path: Path) -> None:
    callback = everything()
    whole = trained(tiny(), tmp_path / "whole", callback, save_strategy="steps", save_steps=3)
    assert whole.state.global_step == 15
    assert callback.phase == 2
    zeros = [int((p == 0).sum()) for n, p in whole.model.named_parameters() if n in Pruning(0.5).names(whole.model)]
    sizes = [p.numel() for n, p in whole.model.named_parameters() if n in Pruning(0.5).names(whole.model)]
    assert zeros == [size // 2 for size in sizes]
    start = tiny().state_dict()
    early, late = (
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / f"whole/checkpoint-{n}").state_dict()
        for n in (3, 6)
    )
    mid = "bert.encoder.layer.1.output.dense.weight"
    changed = (early[mid] != start[mid]).sum()
    assert 0 < changed < early[mid].numel() / 2
    assert (late[mid] != early[mid]).sum() > early[mid].numel() / 2, "the second phase trains the last layer whole"
    first = "bert.encoder.layer.0.output.dense.weight"
    moved = early[first] != start[first]
    assert torch.equal(late[first][~moved], start[first][~moved])
    for step in (6, 9):
        again = trained(tiny(), tmp_path / "again", everything(), resume=tmp_path / f"whole/checkpoint-{step}")
        assert_equal(weights(again), weights(whole))
    assert_equal(weights(trained(tiny(), tmp_path / "dense", everything("dense"))), weights(whole))


def test_what_is_saved_loads_without_us_and_the_model_is_left_alone(tiny: Make, tmp_path: Path) -> None:
    model = tiny()
    done = trained(model, tmp_path, MaskCallback(Selection(train="classifier", score="magnitude", density=0.1)))
    done.save_model(str(tmp_path / "model"))
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert_equal(back.state_dict(), weights(done))
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())
    held = {id(p) for group in done.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not done.optimizer.optimizer._optimizer_step_post_hooks
    assert not done.optimizer.optimizer._optimizer_state_dict_post_hooks


def test_a_second_training_begins_afresh_also_after_one_that_failed(tiny: Make, tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    callback = MaskCallback(Selection(train="classifier"))
    model = tiny()
    with pytest.raises(KeyboardInterrupt):
        trained(model, tmp_path, callback, Fails())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, tmp_path, callback, max_steps=2)
    assert all(torch.equal(p, before[n]) == (not n.startswith("classifier")) for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_bad_input_is_refused(tiny: Make, tmp_path: Path) -> None:
    def refused(match: str, **more: Any) -> None:
        arguments = {key: more.pop(key) for key in list(more) if key in ("resume", "max_steps")}
        with pytest.raises(ValueError, match=match):
            trained(tiny(), tmp_path / "refused", MaskCallback(**more), **arguments)

    refused("'clasifier' matches no parameter.*classifier", selection=Selection(train="clasifier"))
    refused("names nothing trains nothing", selection=Selection())
    refused(r"then\[0\]='soon' must be a moment", then=[("soon", None)])
    refused(r"begin at steps \[9, 3\]", then=[("9 steps", None), ("3 steps", None)])
    refused("ends at step 40, and the run has 15", pruning=Pruning(0.5, end="40 steps"))
    held = "cannot be reached without pruning held entries"
    refused(held, selection=Selection(train="classifier"), pruning=Pruning(0.5, schedule="constant"))
    refused("engine='fast' is unknown", engine="fast")
    with pytest.raises(ValueError, match="leave structure out"):
        Pruning("2:4", structure="row")
    trained(
        tiny(),
        tmp_path / "one",
        MaskCallback(Selection(train="classifier")),
        save_strategy="steps",
        max_steps=2,
        save_steps=2,
    )
    other = Selection(train=["classifier", "layers:-1:"])
    refused("is of a run with other masks", selection=other, resume=tmp_path / "one/checkpoint-2")


@pytest.mark.slow
def test_a_real_model_holds_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mask.data.pretrained import checkpoint

    def minilm() -> nn.Module:
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint("minilm"), num_labels=3)

    def callback() -> MaskCallback:
        return MaskCallback(Selection(train="classifier", score="fisher", density=0.005, batches=2))

    few = {"gradient_accumulation_steps": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = callback()
    whole = trained(minilm(), tmp_path / "whole", first, **few)
    masks = first.masks
    scored = sum(mask.numel() for name, mask in masks.items() if not name.startswith("classifier"))
    assert masks.count() == 384 * 3 + 3 + int(0.005 * scored + 0.5)
    before = dict(minilm().named_parameters())
    assert all(torch.equal(p[~masks[n]], before[n][~masks[n]]) for n, p in whole.model.named_parameters())
    state = torch.load(tmp_path / "whole/checkpoint-2/optimizer.pt", weights_only=True)
    moments = sum(s["exp_avg"].numel() for s in state["state"].values())
    assert moments < 1.02 * masks.count() + 16 * len(masks)
    again = trained(minilm(), tmp_path / "again", callback(), resume=tmp_path / "whole/checkpoint-2", **few)
    assert_equal(weights(again), weights(whole))
    assert json.loads((tmp_path / "whole/checkpoint-2/config.json").read_text())["model_type"] == "bert"
