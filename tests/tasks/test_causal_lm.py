"""A language model: the packaged one is the real one, its figures are what their definitions say, and masks hold it."""

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mask import FreezeMask
from lightning_mask.core.patterns import repeated_blocks
from lightning_mask.data import LanguageData, Texts, TextSplits
from lightning_mask.data.pretrained import load_tokenizer
from lightning_mask.tasks import CausalLM

SENTENCES = [
    "the capital of France is Paris.",
    "a film that is not worth the ticket",
    "it was good",
    "never again, please",
]


def source() -> TextSplits:
    part = Texts(SENTENCES, [0, 1, 0, 1])
    return TextSplits(part, part, part, ["fresh", "rotten"])


@pytest.fixture(scope="session")
def smollm2() -> CausalLM:
    """The real one, loaded once: it takes some seconds. Tests leave it as it is."""
    return CausalLM(optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers and random weights, its output layer tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        max_position_embeddings=40,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    """Rows of unequal length, padded on the right, with a prompt that is not learnt in the first."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 30, (3, 7), generator=generator)
        mask = torch.ones_like(ids)
        ids[1, 4:], mask[1, 4:] = 0, 0
        labels = torch.where(mask.bool(), ids, -100)
        labels[0, :3] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def trainer(folder: Path, **options: object) -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **{**dict.fromkeys(quiet, False), **options})  # type: ignore[arg-type]


def log_probabilities(model: CausalLM, batch: dict[str, Tensor]) -> Iterator[tuple[float, bool]]:
    """For each label, one after the other: its log-probability given what came before, and whether it is the likeliest token."""
    for row in range(len(batch["labels"])):
        for place in range(1, batch["labels"].shape[1]):
            label = int(batch["labels"][row, place])
            if label == -100:
                continue
            before = batch["input_ids"][row : row + 1, :place]
            with torch.no_grad():
                logits = model.net(input_ids=before, attention_mask=torch.ones_like(before)).logits[0, -1].double()
            yield float(logits.log_softmax(0)[label]), int(logits.argmax()) == label


def test_perplexity_is_what_its_definition_says(tiny: Path, tmp_path: Path) -> None:
    model = CausalLM(str(tiny)).eval()
    told = [each for batch in batches() for each in log_probabilities(model, batch)]
    # 3 rows, of 7 tokens with 3 of a prompt, of 4, of 7: 4 + 3 + 6 labels have a token before them.
    assert len(told) == 4 * 13
    mean = -sum(value for value, _ in told) / len(told)
    (logged,) = trainer(tmp_path).test(model, DataLoader(batches(), batch_size=None), verbose=False)
    assert logged["test/loss"] == pytest.approx(mean, rel=1e-5)
    assert logged["test/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert logged["test/accuracy"] == pytest.approx(sum(right for _, right in told) / len(told), rel=1e-5)
    assert logged["test/exact"] == 0.0
    one = batches(1)[0]
    few = [value for value, _ in log_probabilities(model, one)]
    assert float(model.mask_loss(one).detach()) == pytest.approx(-sum(few) / len(few), rel=1e-5)


def test_an_answer_is_exact_when_all_of_its_tokens_are_the_likeliest(tiny: Path, tmp_path: Path) -> None:
    model = CausalLM(str(tiny)).eval()
    (batch,) = batches(1)
    with torch.no_grad():
        said = model(batch).argmax(dim=2)
    labels = torch.full_like(batch["labels"], -100)
    labels[0, 3:6] = said[0, 2:5]  # right
    labels[1, 2:4] = said[1, 1:3]
    labels[1, 3] = (labels[1, 3] + 1) % 30  # the second token is wrong
    rows = DataLoader([{**batch, "labels": labels}], batch_size=None)  # and the third row has no label at all
    (logged,) = trainer(tmp_path).test(model, rows, verbose=False)
    assert logged["test/exact"] == 0.5
    assert logged["test/accuracy"] == pytest.approx(4 / 5)


def test_padding_changes_nothing(tiny: Path) -> None:
    model = CausalLM(str(tiny))
    (batch,) = batches(1)
    longer = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    longer["labels"][:, 7:] = -100
    assert torch.allclose(model.mask_loss(longer), model.mask_loss(batch))
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert float(model.mask_loss(nothing).detach()) == 0.0


def test_drawn_labels_come_from_the_models_own_predictions(tiny: Path) -> None:
    model = CausalLM(str(tiny)).eval()
    (batch,) = batches(1)
    torch.manual_seed(0)
    drawn = torch.stack([model.mask_sampled_loss(batch).detach() for _ in range(300)])
    with torch.no_grad():
        logits = model(batch)[:, :-1]
    entropy = torch.distributions.Categorical(logits=logits).entropy()[batch["labels"][:, 1:] != -100].mean()
    assert float(drawn.mean()) == pytest.approx(float(entropy), rel=0.01)  # E[-log p] under p


def test_a_masked_run_holds_what_it_holds_and_keeps_the_tie(tiny: Path, tmp_path: Path) -> None:
    model = CausalLM(str(tiny), optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1))
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    assert repeated_blocks(model) == ["net.model.layers.0", "net.model.layers.1"]
    mask = FreezeMask("net.model.norm", score="fisher_sampled", density=0.05, batches=2)
    trainer(tmp_path, max_steps=6, callbacks=[mask]).fit(model, DataLoader(batches(), batch_size=None))
    after = dict(model.named_parameters())
    assert model.net.lm_head.weight is model.net.model.embed_tokens.weight
    moved = 0
    for name, active in mask.masks.items():
        assert torch.equal(after[name].detach()[~active], before[name][~active]), name
        moved += int((after[name].detach()[active] != before[name][active]).sum())
    assert moved > 0.9 * mask.masks.count()


def test_a_checkpoint_loads_without_unpickling_and_alone(tiny: Path, tmp_path: Path) -> None:
    model = CausalLM(str(tiny), optimizer=partial(torch.optim.SGD, lr=0.1))
    fitted = trainer(tmp_path, max_steps=2)
    fitted.fit(model, DataLoader(batches(), batch_size=None))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, pretrained=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert loaded.max_length == 40


def test_the_packaged_model_knows_the_capital_of_france(smollm2: CausalLM) -> None:
    assert sum(parameter.numel() for parameter in smollm2.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in smollm2.parameters()} == {torch.float32}
    assert smollm2.net.training
    assert len(repeated_blocks(smollm2)) == 30
    tokenizer = load_tokenizer("smollm2")
    question = "The capital of France is"
    ids = torch.tensor([tokenizer(question)["input_ids"]])
    with torch.no_grad():
        logits = smollm2({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


@pytest.mark.slow
def test_a_few_masked_steps_of_the_packaged_model(smollm2: CausalLM, tmp_path: Path) -> None:
    before = {name: tensor.detach().clone() for name, tensor in smollm2.named_parameters()}
    mask = FreezeMask(["net.model.norm", "layers:-1:"], score="magnitude", density=1000, scope="*.v_proj.weight")
    data = LanguageData(source, batch_size=2, max_length=16, prompt="{text} It is ")
    fitted = trainer(tmp_path, max_steps=3, callbacks=[mask])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (first,) = fitted.test(smollm2, data, verbose=False)
        fitted.fit(smollm2, data)
        (last,) = fitted.test(smollm2, data, verbose=False)
    for name, parameter in smollm2.named_parameters():
        held = ~mask.masks[name]
        assert torch.equal(parameter.detach()[held], before[name][held]), name
    assert last["test/perplexity"] < first["test/perplexity"]
    with torch.no_grad():
        for name, parameter in smollm2.named_parameters():
            parameter.copy_(before[name])
