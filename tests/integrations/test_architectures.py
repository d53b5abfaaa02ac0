"""Models of every kind, built from a configuration, saved, loaded by the tasks, trained behind masks, saved again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mask import FreezeMask, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.core.patterns import aliases, repeated_blocks
from lightning_mask.tasks import HFImageClassifier, TextClassifier, TimmClassifier
from lightning_mask.tasks.pretrained_image import fitted

TEXT = {"vocab_size": 60, "num_labels": 3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
ENDS = {"decoder_start_token_id": 0, "forced_eos_token_id": 1}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}

# Configuration; the head's name; the class of its normalisations; how many blocks it has.
KINDS: dict[str, tuple[Any, str, str, int]] = {
    "bert": (hf.BertConfig(**TEXT, **SIZES), "net.classifier", "LayerNorm", 3),
    "gpt2": (
        hf.GPT2Config(**TEXT, n_embd=16, n_layer=3, n_head=2, n_inner=24),
        "net.score",
        "LayerNorm",
        3,
    ),
    "llama": (hf.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=2), "net.score", "LlamaRMSNorm", 3),
    "t5": (
        hf.T5Config(**TEXT, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0),
        "net.classification_head",
        "T5LayerNorm",
        4,
    ),
    "bart": (hf.BartConfig(**TEXT, **BART, **HEADS, **ENDS), "net.classification_head", "LayerNorm", 2),
    "vit": (
        hf.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3),
        "net.classifier",
        "LayerNorm",
        3,
    ),
}


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (4, 7), generator=generator) for _ in range(2)]
    for each in ids:
        each[:, -1] = 1
    labels = torch.tensor([0, 1, 2, 1])
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": labels} for each in ids]


def images() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 2, 1])
    return [{"pixel_values": torch.randn(4, 1, 20, 20, generator=generator), "labels": labels} for _ in range(2)]


def fit(model: L.LightningModule, data: list[Any], *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, DataLoader(data, batch_size=None))


def masks_of(head: str, norm: str, embeds: str) -> dict[str, Callable[[], L.Callback]]:
    """A callback for each structure and kind of pattern; what a head names trains too."""
    made: dict[str, Callable[[], L.Callback]] = {
        "blocks": lambda: FreezeMask(["layers:-2:", head]),
        "norms": lambda: FreezeMask([f"type:{norm}", head]),
        "per output": lambda: FreezeMask(head, score="gradient", density=0.2, allocation="row", scope="weights:"),
        "embeddings": lambda: FreezeMask(head, score="magnitude", density=0.1, scope=embeds),
        "blocks of entries": lambda: FreezeMask(
            head, score="fisher", density=0.3, scope="layers:0:1", structure="block:1x2"
        ),
        "pruned": lambda: PruneMask(0.5, schedule="constant", allocation="uniform"),
        "heads pruned": lambda: PruneMask(0.4, schedule="constant", structure="head", allocation="uniform"),
        "phases": lambda: PhaseUnfreeze([Phase("1 steps", train=head), Phase(score="snip", density=0.1)]),
    }
    for structure in ("entry", "row", "column", "head", "tensor", "layer"):
        made[structure] = partial(FreezeMask, head, score="fisher", density=0.25, structure=structure, batches=2)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_holds_on_every_kind_of_model(kind: str, tmp_path: Path) -> None:
    config, head, norm, blocks = KINDS[kind]
    auto = hf.AutoModelForImageClassification if kind == "vit" else hf.AutoModelForSequenceClassification
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(tmp_path / "model")
    task = HFImageClassifier if kind == "vit" else TextClassifier
    data = images() if kind == "vit" else texts()
    optimizer = partial(torch.optim.AdamW, lr=0.03, weight_decay=0.3)
    for number, (what, make) in enumerate(
        masks_of(head, norm, "*embed*" if kind == "vit" else "type:Embedding").items()
    ):
        model = task(str(tmp_path / "model"), num_classes=3, optimizer=optimizer)
        if number == 0:
            assert len(repeated_blocks(model)) == blocks
            tied = [names for names in aliases(model).values() if len(names) > 1]
            assert bool(tied) == (kind in ("t5", "bart"))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        keys = list(model.state_dict())
        callback = make()
        fit(model, data, callback)
        masks = callback.masks
        assert 0 < masks.count() < sum(p.numel() for p in model.parameters()), what
        for name, mask in masks.items():
            after = model.get_parameter(name)
            if isinstance(callback, PruneMask):
                assert not after[~mask].any(), f"{what}: {name}"
            elif not isinstance(callback, PhaseUnfreeze):
                assert torch.equal(after[~mask], before[name][~mask]), f"{what}: {name}"
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters()), what
        assert list(model.state_dict()) == keys
        if what in ("entry", "pruned", "phases"):
            model.net.save_pretrained(tmp_path / "tuned")
            back = auto.from_pretrained(tmp_path / "tuned")
            trained = model.net.state_dict()
            assert back.state_dict().keys() == trained.keys()
            assert [name for name, tensor in back.state_dict().items() if not torch.equal(tensor, trained[name])] == []


def test_what_a_model_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    def refused(config: Any, match: str, *arguments: Any, **more: Any) -> None:
        torch.manual_seed(0)
        hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / config.model_type)
        model = TextClassifier(
            str(tmp_path / config.model_type), num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.1)
        )
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            fit(model, texts(), FreezeMask(*arguments, **more))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    refused(KINDS["llama"][0], r"'type:LayerNorm' matches no parameter.*LlamaRMSNorm", "type:LayerNorm")
    fused = hf.GPTNeoXConfig(**TEXT, **SIZES)  # query, key and value of a head lie side by side in one weight
    refused(fused, "has no attention heads", score="magnitude", density=0.5, structure="head")
    shared = hf.AlbertConfig(**TEXT, **SIZES, embedding_size=8)
    refused(shared, "The model has 0 repeated blocks", "layers:-1:")


def test_images_are_brought_to_what_the_model_takes() -> None:
    grey = torch.rand(2, 1, 20, 20)
    assert torch.equal(fitted(grey, 3, None)[:, 2], grey[:, 0])
    assert fitted(grey, 3, 16).shape == (2, 3, 16, 16)
    assert fitted(grey, 1, [8, 12]).shape == (2, 1, 8, 12)


def test_timm_without_torchvision_says_what_to_install() -> None:
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=r"'(timm|torchvision)'.*lightning-mask\[timm\]"):
            TimmClassifier("vit_tiny_patch16_224", num_classes=3, pretrained=False)
        return
    pytest.importorskip("timm")
    small: dict[str, Any] = {"depth": 2, "embed_dim": 12, "num_heads": 3, "img_size": 32}
    model = TimmClassifier(
        "vit_tiny_patch16_224",
        num_classes=3,
        optimizer=partial(torch.optim.AdamW, lr=0.03),
        size=32,
        pretrained=False,
        arguments=small,
    )
    before: dict[str, nn.Parameter | Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = FreezeMask("net.head", score="fisher", density=0.25, structure="head", batches=2)
    fit(model, images(), callback)
    for name, mask in callback.masks.items():
        assert torch.equal(model.get_parameter(name)[~mask], before[name][~mask])
    with pytest.raises(ValueError, match="timm has no model 'vit_minute'"):
        TimmClassifier("vit_minute", num_classes=3, pretrained=False)
