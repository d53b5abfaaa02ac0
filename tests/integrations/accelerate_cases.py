"""Two processes over gloo: accelerate's loop, and transformers' Trainer, each behind a mask; run by torchrun."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from lightning_mask.core import Context, MaskEngine, MaskSet, Selection
from lightning_mask.core.distributed import gather
from lightning_mask.core.selection import select
from lightning_mask.integrations.pruning import Pruning
from lightning_mask.integrations.transformers import MaskCallback


def tiny() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(
        vocab_size=60, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    return transformers.BertForSequenceClassification(config)


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (64, 7), generator=generator)
    return [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(ids)]


def loop(
    accelerator: Accelerator,
    masks: Mapping[str, Tensor],
    hold: Callable[[nn.Module, torch.optim.Optimizer], MaskEngine | None],
) -> dict[str, Tensor]:
    """Accumulate two batches of each rank, clip, step; eight times. Without an engine, mask by hand."""
    model = tiny().to(accelerator.device)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(masks[name].any()))
    engine = hold(model, optimizer)
    loader = torch.utils.data.DataLoader(rows(), batch_size=4)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch).loss)
                if accelerator.sync_gradients:
                    if engine is None:
                        for name, parameter in model.named_parameters():
                            if parameter.grad is not None:
                                parameter.grad = torch.where(masks[name], parameter.grad, 0.0)
                    else:
                        engine.after_backward()
                    accelerator.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.3)
                optimizer.step()
                optimizer.zero_grad()
                if engine is None and accelerator.sync_gradients:
                    with torch.no_grad():
                        for name, parameter in model.named_parameters():
                            parameter.copy_(torch.where(masks[name], parameter, values[name]))
    if engine is not None:
        engine.release()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def accelerate_loop() -> None:
    unused = DistributedDataParallelKwargs(find_unused_parameters=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[unused])
    assert accelerator.num_processes == 2
    model = tiny()
    mine = rows()[accelerator.process_index :: 2]
    batches = [{k: torch.stack([row[k] for row in mine[:4]]) for k in mine[0]}]
    scope = ["layers:-1:"]
    selection = Selection(train="classifier", score="fisher", density=0.2, scope=scope)
    masks = select(selection, model, Context(model, lambda batch: model(**batch).loss, lambda: batches))
    assert len(set(gather(masks.hash()))) == 1, "ranks see other batches and choose the same entries"
    expected = loop(accelerator, masks, lambda model, optimizer: None)
    start = dict(tiny().named_parameters())
    assert not equal(expected, start)
    found = loop(accelerator, masks, lambda model, optimizer: MaskEngine(model, optimizer, masks, engine="dense"))
    assert equal(found, expected)
    compact = loop(accelerator, masks, lambda model, optimizer: MaskEngine(model, optimizer, masks, engine="compact"))
    for name, mask in masks.items():
        assert torch.equal(compact[name][~mask], start[name][~mask])
        torch.testing.assert_close(
            compact[name], expected[name], rtol=1e-4, atol=1e-6
        )  # the norm's sum has another order
    after = MaskSet({name: compact[name] != start[name] for name in compact})
    assert len(set(gather(after.hash()))) == 1


def trainer(folder: Path) -> None:
    callback = MaskCallback(
        Selection(train="classifier", score="fisher", density=0.1, batches=2),
        then=[("50%", None)],
        pruning=Pruning(0.5, start="75%", schedule="constant", allocation="uniform"),
    )
    model = tiny()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept: list[tuple[int, MaskSet, dict[str, Tensor]]] = []

    class Keeps(transformers.TrainerCallback):
        def on_step_end(self, args: object, state: transformers.TrainerState, control: object, **_: object) -> None:
            now = {name: p.detach().clone() for name, p in model.named_parameters()}
            kept.append((state.global_step, callback.masks, now))

    args = transformers.TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=0.3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    assert args.world_size == 2
    transformers.Trainer(model, args, train_dataset=rows(), callbacks=[callback, Keeps()]).train()
    assert [step for step, _, _ in kept] == list(range(1, 9))
    for _, masks, now in kept[:4]:
        assert all(torch.equal(now[name][~mask], start[name][~mask]) for name, mask in masks.items())
        assert masks.count() < 0.5 * masks.numel()
    assert kept[5][1].count() == kept[5][1].numel()
    names = Pruning(0.5).names(model)
    assert all(int((model.get_parameter(name) == 0).sum()) == model.get_parameter(name).numel() // 2 for name in names)
    for _, masks, now in (kept[3], kept[7]):
        sums = [[float(p.double().sum()), float(p.double().abs().sum())] for p in now.values()]
        everywhere = gather(sums)
        assert everywhere[0] == everywhere[1], "the ranks' weights are equal"
        assert len(set(gather(masks.hash()))) == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "accelerate":
        accelerate_loop()
    else:
        trainer(Path(sys.argv[2]))
    print(f"done {sys.argv[1]}\n", end="", flush=True)  # in one write: the other process says it, too
