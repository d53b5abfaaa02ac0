"""Masks over a model that PEFT wrapped: LoRA matrices are tensors like others, and what PEFT froze stays frozen."""

from collections.abc import Callable, Mapping

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lightning_mask.core import Context, MaskEngine, MaskSet, Selection
from lightning_mask.core.selection import select
from lightning_mask.integrations.transformers import MaskCallback

Make = Callable[[], nn.Module]


def lora(model: nn.Module, **more: object) -> peft.PeftModel:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", lora_dropout=0.0, **more)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # they start from zero, where the gradients of the others vanish
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 60, (4, 7), generator=generator) for _ in range(3)]
    return [{"input_ids": each, "labels": torch.tensor([0, 1, 2, 1])} for each in ids]


def by_hand(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    trains = [p for p in model.parameters() if p.requires_grad]
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trains, lr=0.05, weight_decay=0.3)
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.grad = torch.where(masks[name], parameter.grad, 0.0)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.where(masks[name], parameter, values[name]))


def with_engine(model: nn.Module, masks: MaskSet, engine: str) -> None:
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=0.05, weight_decay=0.3)
    held = MaskEngine(model, optimizer, masks, engine=engine)
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        held.after_backward()
        optimizer.step()
    held.release()


@pytest.mark.parametrize(
    "selection",
    [
        Selection(train="*.lora_B.*"),
        Selection(train="*.modules_to_save.*", score="magnitude", density=0.3, scope="*.lora_A.*"),
        Selection(score="fisher", density=0.2),
        Selection(score="fisher", density=0.5, structure="row", scope=["*.lora_A.*", "*.lora_B.*"]),
    ],
)
def test_masks_inside_lora_matrices_hold(tiny: Make, selection: Selection) -> None:
    start = lora(tiny())
    trains = {name for name, p in start.named_parameters() if p.requires_grad}
    masks = select(selection, start, Context(start, lambda batch: start(**batch).loss, batches))
    assert {name for name, mask in masks.items() if mask.any()} <= trains, "what PEFT froze is not let go"
    expected = lora(tiny())
    by_hand(expected, masks)
    for engine in ("dense", "compact"):
        found = lora(tiny())
        with_engine(found, masks, engine)
        for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b), f"{engine}: {name}"
        assert {name for name, p in found.named_parameters() if p.requires_grad} == trains
        assert any(not torch.equal(p, start.get_parameter(name)) for name, p in found.named_parameters())
    batch = batches()[0]
    found.eval()
    before = found(**batch).logits
    merged = found.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, before, rtol=1e-4, atol=1e-5)
    own = merged.state_dict()
    assert own.keys() == tiny().state_dict().keys()
    for name, tensor in tiny().state_dict().items():
        touched = name.startswith("classifier") or ".query.weight" in name or ".value.weight" in name
        assert touched or torch.equal(own[name], tensor), name


def test_the_base_is_trained_only_where_it_is_named_and_in_the_optimizer(tiny: Make) -> None:
    model = lora(tiny())
    name = "base_model.model.bert.encoder.layer.0.output.dense.bias"
    masks = select(Selection(train=[name, "*.lora_A.*"]), model, Context(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=rf"{name} is to train, and no optimizer holds it"):
        MaskEngine(model, optimizer, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = MaskEngine(model, optimizer, masks)
    assert set(engine.trainable) == {n for n, mask in masks.items() if mask.any()}
    before = model.get_parameter(name).detach().clone()
    model(**batches()[0]).loss.backward()
    engine.after_backward()
    optimizer.step()
    assert not torch.equal(model.get_parameter(name), before)
    engine.release()
    assert not model.get_parameter(name).requires_grad


def test_lora_in_the_trainer_of_transformers(tiny: Make, tmp_path: object) -> None:
    data = [
        {"input_ids": row, "labels": label}
        for b in batches()
        for row, label in zip(b["input_ids"], b["labels"], strict=True)
    ]
    model = lora(tiny())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = MaskCallback(
        Selection(train="*.lora_B.*", score="fisher", density=0.25, scope="*.lora_A.*", allocation="uniform", batches=2)
    )
    args = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.05, weight_decay=0.3, report_to=[], disable_tqdm=True, use_cpu=True
    )
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    for name, mask in callback.masks.items():
        after = model.get_parameter(name)
        assert torch.equal(after[~mask], before[name][~mask]), name
        assert ("lora" in name) == bool(mask.any())
        assert not mask.any() or not torch.equal(after[mask], before[name][mask]), name
    model.save_pretrained(str(tmp_path))
    back = peft.PeftModel.from_pretrained(tiny(), str(tmp_path))
    own = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(tensor, own[name]) for name, tensor in peft.get_peft_model_state_dict(back).items())
