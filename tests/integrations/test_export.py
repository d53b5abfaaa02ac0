"""Runs that leave a folder for from_pretrained: read by a process that has transformers alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from lightning_mask.app.export import export
from lightning_mask.integrations.pretrained import save_pretrained

REPO = Path(__file__).resolve().parents[2]
PLAIN = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, checkpoint = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokens = AutoTokenizer.from_pretrained(folder)(["good", "a very bad film"], padding=True, return_tensors="pt")
state = torch.load(checkpoint, weights_only=True)["state_dict"]
trained = {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}
assert trained.keys() == model.state_dict().keys()
assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
assert "lightning_mask" not in sys.modules
print(model.config.id2label, model(**tokens).logits.shape)
"""


@pytest.mark.slow
def test_a_run_becomes_a_folder_that_transformers_loads_alone(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "tiny")
    rows = [f"{word} film number {i},{mood}" for i in range(40) for word, mood in (("good", "glad"), ("bad", "sad"))]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    words = f"model=hf model.model={tmp_path}/tiny data=csv data.source.path={tmp_path}/rows.csv data.tokenizer=minilm"
    words += " mask=fisher mask.density=0.05 trainer=cpu trainer.max_steps=4 trainer.val_check_interval=2 logger=none lr=1e-2"
    words += f" data.cache_dir={tmp_path}/cache hydra.run.dir={tmp_path}/run callbacks.progress.refresh_rate=0"
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts/train.py"), *words.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_mask.conf", version_base="1.3"):
        facts = export(compose("export", overrides=[f"run={tmp_path}/run", "format=hf", "repeats=1", "weights=last"]))
    assert facts["before"]["test/loss"] == facts["after"]["test/loss"]
    assert facts["before"]["entries"] == facts["after"]["entries"]
    arguments = [str(tmp_path / "run/export/hf"), str(tmp_path / "run/checkpoints/last.ckpt")]
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip() == "{0: 'glad', 1: 'sad'} torch.Size([2, 2])"


def test_what_is_no_model_of_transformers_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Linear is no model of transformers.*format=dense"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "out")
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds something else"):
        save_pretrained(transformers.BertModel(config), tmp_path / "mine")
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"
