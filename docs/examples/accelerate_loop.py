"""A plain loop with accelerate behind a mask, on one process or several.

python docs/examples/accelerate_loop.py
accelerate launch --cpu --num_processes 2 docs/examples/accelerate_loop.py
"""

import argparse
from itertools import islice

import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification

from lightning_mask.core import Context, MaskEngine, Selection
from lightning_mask.core.selection import select
from lightning_mask.data import tweets
from lightning_mask.data.pretrained import checkpoint, load_tokenizer


def main() -> None:
    """Choose a mask, train behind it, and save what ``from_pretrained`` loads."""
    parser = argparse.ArgumentParser(description="Fine-tune a small share of a model on tweets.")
    parser.add_argument("--model", default="minilm", help="minilm, or a folder with a model of BERT's vocabulary")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, of two batches each")
    parser.add_argument("--out", default="accelerate_model", help="folder for from_pretrained")
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    tokenizer, train = load_tokenizer("minilm"), tweets().train

    def collate(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*rows, strict=True)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {**tokens, "labels": torch.tensor(labels)}

    rows = list(zip(train.texts, train.labels, strict=True))
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate))
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint(options.model), num_labels=3)
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

    # Each rank scores its own batches; scores are averaged over ranks before they are ranked.
    batches = list(islice(loader, 4))
    context = Context(model, loss=lambda batch: model(**batch).loss, batches=lambda: batches)
    masks = select(Selection(train="classifier", score="fisher", density=0.005), model, context)

    # Before prepare, so that DDP reduces nothing of what is held whole.
    engine = MaskEngine(model, optimizer, masks)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    wrapped.train()
    step = 0
    while step < options.steps:
        for batch in loader:
            with accelerator.accumulate(wrapped):
                loss = wrapped(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    engine.after_backward()
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            step += accelerator.sync_gradients
            if step == options.steps:
                break

    engine.release()
    held = sum(int((p != before[name])[~masks[name].to(p.device)].sum()) for name, p in model.named_parameters())
    accelerator.print(f"{masks.count():,} of {masks.numel():,} entries train; held entries changed: {held}")
    if accelerator.is_main_process:
        model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
