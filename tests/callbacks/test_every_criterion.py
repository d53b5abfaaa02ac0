"""Every criterion chooses a mask in a real run, from the run's own batches, and leaves the run as it was."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from mask_nets import Net, trainer
from mask_nets import loader as batches
from torch import Tensor, nn

from lightning_mask import FreezeMask, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.core.criteria import CRITERIA
from lightning_mask.core.criteria.weights import spectral

SCORES = sorted({*CRITERIA} - {"head_activation"})  # the network has no heads
LINEAR = ["type:Linear", "!*.bias"]
SIZES = {"stem.weight": 96, "blocks.0.lin.weight": 144, "blocks.1.lin.weight": 144, "head.weight": 24}


class Sampling(Net):
    def mask_sampled_loss(self, batch: Any) -> Tensor:
        logits = self(batch[0])
        return nn.functional.cross_entropy(logits, logits.detach().softmax(1).multinomial(1).squeeze(1))


@pytest.mark.parametrize("score", SCORES)
def test_it_chooses_the_entries_that_train_and_holds_the_others(score: str) -> None:
    net = Sampling("batch", dropout=0.2)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    mask = FreezeMask(score=score, density=100, scope=LINEAR, batches=3)
    run = trainer(mask, max_steps=3)
    run.fit(net, batches())
    assert mask.masks.count() == 100
    assert sum(int(m.sum()) for n, m in mask.masks.items() if n in SIZES) == 100
    moved = {n: p.detach() != before[n] for n, p in net.named_parameters()}
    assert not any((moved[n] & ~m).any() for n, m in mask.masks.items())
    assert sum(int(m.sum()) for m in moved.values()) > 80
    assert not any(len(module._forward_hooks) for module in net.modules())


@pytest.mark.parametrize("score", SCORES)
def test_it_prunes(score: str) -> None:
    net = Sampling()
    mask = PruneMask(
        0.5, score=score, schedule="constant", batches=2, scope=[*LINEAR, "!head"], allow_whole_layers=True
    )
    trainer(mask, max_steps=2).fit(net, batches())
    assert sum(int((net.get_parameter(n) == 0).sum()) for n in SIZES if n != "head.weight") == 192


def test_calibration_for_a_criterion_leaves_training_as_it_was() -> None:
    """All entries active: whatever the criterion looked at, the run is the one without a callback."""
    plain = Sampling("batch", dropout=0.2)
    torch.manual_seed(3)
    trainer(max_steps=4).fit(plain, batches())
    for score in ("wanda", "fisher_sampled", "grasp", "grad_variance"):
        net = Sampling("batch", dropout=0.2)
        torch.manual_seed(3)
        everything = FreezeMask("!stem.weight", score=score, density=1.0, scope="stem.weight", batches=2)
        trainer(everything, max_steps=4).fit(net, batches())
        for (name, value), expected in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
            assert torch.equal(value, expected), (score, name)


def test_gradients_that_float16_would_lose_are_scored() -> None:
    """A scaler keeps them in training; scores have none, and so are computed in float32."""

    class Small(Net):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * 1e-7

    masks = {}
    for precision in ("32-true", "16-mixed"):
        mask = FreezeMask(score="gradient", density=30, scope=LINEAR, batches=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        mixed = {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]} if "mixed" in precision else {}
        trainer(mask, max_steps=1, **mixed).fit(Small(), batches())
        masks[precision] = mask.masks
    assert masks["32-true"].hash() == masks["16-mixed"].hash()


def test_the_change_since_the_start_becomes_the_mask_of_a_later_phase() -> None:
    start = Sampling()
    net = Sampling()
    dense = Phase("4 steps", train="*")
    chosen = Phase(score="change", density=30, scope=LINEAR)
    phases = PhaseUnfreeze([dense, chosen])
    trainer(phases, max_steps=6).fit(net, batches())
    alone = Sampling()
    trainer(max_steps=4).fit(alone, batches())
    far = torch.cat([(alone.get_parameter(n) - start.get_parameter(n)).detach().abs().flatten() for n in SIZES])
    mask = torch.cat([phases.masks[n].flatten() for n in SIZES])
    assert mask.sum() == 30
    assert torch.equal(mask.nonzero().flatten(), far.topk(30).indices.sort().values)


def test_a_module_without_a_loss_of_its_own_predictions_says_what_to_define() -> None:
    with pytest.raises(ValueError, match=r"define mask_sampled_loss\(self, batch\) in the module"):
        trainer(FreezeMask(score="fisher_sampled", density=5), max_steps=1).fit(Net(), batches())


def test_what_wanda_cannot_score_is_named_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"stem.bias is none; name such tensors in scope"):
        trainer(FreezeMask(score="wanda", density=5), max_steps=1).fit(Net(), batches())


def test_arguments_of_a_criterion_come_by_partial() -> None:
    masks = []
    for rank in (1, 8):
        mask = FreezeMask(score=partial(spectral, rank=rank), density=40, scope="blocks.0.lin.weight")
        trainer(mask, max_steps=1).fit(Sampling(), batches())
        masks.append(mask.masks["blocks.0.lin.weight"])
        assert mask.selection.recipe()["score"] == f"spectral(rank={rank})"
    assert not torch.equal(*masks)
