"""Any Hugging Face model as a classifier, and what is said when it is not there."""

import json
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mask.tasks import TextClassifier, linear_warmup_decay


def batch(seed: int = 0, size: int = 6, classes: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (size, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(classes, (size,), generator=generator)}


def test_minilm_is_loaded_quietly_with_its_weights(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TextClassifier(num_classes=3, class_names=["negative", "neutral", "positive"])
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    names = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in names.values()) == 22_714_371
    assert "net.bert.encoder.layer.5.output.dense.weight" in names
    assert names["net.classifier.weight"].shape == (3, 384)
    assert model.net.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert all(module.training for module in model.net.modules())
    from safetensors.torch import load_file

    from lightning_mask.data.pretrained import checkpoint

    stored = load_file(Path(checkpoint("minilm"), "model.safetensors"))
    name = "encoder.layer.3.attention.self.query.weight"
    assert torch.equal(names[f"net.bert.{name}"], stored[name])


def test_a_folder_with_another_head_gets_a_new_one(tiny_bert: Path) -> None:
    torch.manual_seed(1)
    model = TextClassifier(str(tiny_bert), num_classes=3)
    assert model.net.classifier.weight.shape == (3, 8)
    kept = TextClassifier(str(tiny_bert), num_classes=5)
    from safetensors.torch import load_file

    stored = load_file(tiny_bert / "model.safetensors")
    assert torch.equal(kept.net.classifier.weight, stored["classifier.weight"])
    for name, tensor in stored.items():
        if not name.startswith("classifier"):
            assert torch.equal(model.net.state_dict()[name], tensor)


def test_the_longest_text_of_each_family(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    families = {
        "bert": ({**sizes, "max_position_embeddings": 20}, 20),
        "roberta": ({**sizes, "max_position_embeddings": 22, "pad_token_id": 1}, 20),
        "gpt2": ({"vocab_size": 50, "n_positions": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "eos_token_id": 1}, 20),
        "llama": ({**sizes, "max_position_embeddings": 20, "num_key_value_heads": 2, "pad_token_id": 1}, None),
    }
    for family, (config, longest) in families.items():
        (tmp_path / family).mkdir()
        (tmp_path / family / "config.json").write_text(json.dumps({"model_type": family, **config}))
        model = TextClassifier(str(tmp_path / family), num_classes=2, pretrained=False)
        assert model.max_length == longest, family
        whole = {name: torch.full((1, longest or 20), 3) for name in ("input_ids", "attention_mask")}
        assert model(whole).shape == (1, 2)
        if longest is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model({name: torch.cat([ids, ids[:, :1]], 1) for name, ids in whole.items()})


def test_settings_reach_the_network(tiny_bert: Path) -> None:
    model = TextClassifier(
        str(tiny_bert),
        num_classes=3,
        dropout=0.0,
        attn_implementation="eager",
        pretrained=False,
        gradient_checkpointing=True,
    )
    assert {module.p for module in model.net.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert model.net.config._attn_implementation == "eager"
    assert model.net.is_gradient_checkpointing
    plain = TextClassifier(str(tiny_bert), num_classes=3, dropout=0.0, attn_implementation="eager", pretrained=False)
    plain.load_state_dict(model.state_dict())
    losses = [m.mask_loss(batch()) for m in (model, plain)]
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad)


def test_a_checkpoint_loads_without_unpickling_and_alone(tiny_bert: Path, tmp_path: Path) -> None:
    make = partial(torch.optim.AdamW, lr=1e-3)
    schedule = partial(linear_warmup_decay, warmup=0.5)
    model = TextClassifier(str(tiny_bert), num_classes=3, optimizer=make, scheduler=schedule, class_names=list("abc"))
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    batches = [batch(seed) for seed in range(4)]
    trainer.fit(model, DataLoader(batches, batch_size=None))
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0.0)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"net.{name}" for name in model.net.state_dict()}
    loaded = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.class_names == ["a", "b", "c"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def message(**options: object) -> str:
    with pytest.raises((FileNotFoundError, ModuleNotFoundError, ValueError)) as caught:
        TextClassifier(**{"num_classes": 3, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_incomplete_folders(tiny_bert: Path, tmp_path: Path) -> None:
    assert "There is no model folder './nowhere'" in message(model="./nowhere")

    def copy(name: str) -> Path:
        shutil.copytree(tiny_bert, tmp_path / name)
        return tmp_path / name

    folder = copy("no config")
    (folder / "config.json").unlink()
    assert "has no config.json. Was its download interrupted?" in message(model=str(folder))

    folder = copy("no weights")
    (folder / "model.safetensors").unlink()
    assert "has no weights" in message(model=str(folder))
    assert TextClassifier(str(folder), num_classes=3, pretrained=False).num_classes == 3

    folder = copy("cut short")
    content = (folder / "model.safetensors").read_bytes()
    for size in (len(content) - 10, 20, 3):
        (folder / "model.safetensors").write_bytes(content[:size])
        assert f"model.safetensors are cut short ({size} bytes)" in message(model=str(folder))

    folder = copy("a part is missing")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks the weights model-00002-of-00002.safetensors" in message(model=str(folder))

    folder = copy("another body")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    assert "do not fit its config.json" in message(model=str(folder))

    folder = copy("damaged config")
    (folder / "config.json").write_text('{"model_type": "be')
    assert "cannot be loaded" in message(model=str(folder))


def test_an_unknown_name_without_a_network() -> None:
    code = (
        "from lightning_mask.tasks import TextClassifier\n"
        "try:\n    TextClassifier('nobody/no-such-model', num_classes=2)\n"
        "except FileNotFoundError as error:\n    print(error)\n"
    )
    env = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": "/nonexistent", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == 1, done.stderr[-2000:]
    assert lines[0].startswith(
        "No configuration 'nobody/no-such-model': it is neither a folder nor could it be fetched"
    )
    assert "minilm" in lines[0]


def test_bad_numbers() -> None:
    assert "num_classes must be 2 or more, got 1" in message(num_classes=1)
    assert "There are 3 classes but 2 class_names" in message(class_names=["a", "b"])
    assert "dropout must lie in [0, 1)" in message(dropout=1.0)
