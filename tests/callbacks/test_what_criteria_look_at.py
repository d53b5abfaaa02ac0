"""What a criterion may be, and what it leaves as it is of the data that it looks at."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from mask_nets import Net, changed, data, fit, trainer, weights
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_mask import FreezeMask, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks import RunReport


def twice(params: Any, context: Any, power: int) -> Any:
    return {name: p.detach().abs() ** power for name, p in params.items()}


class Twice:
    def __call__(self, params: Any, context: Any) -> Any:
        return twice(params, context, 2)


@pytest.mark.parametrize("score", [partial(twice, power=2), Twice()], ids=["partial", "object"])
def test_a_criterion_may_be_a_partial_or_an_object_and_every_callback_can_be_sent_to_another_process(
    score: Any, tmp_path: Path
) -> None:
    """As strategy="ddp_spawn" sends them."""

    def callbacks() -> list[Any]:
        chosen = {"score": score, "density": 0.5, "scope": ["stem.weight", "blocks.1.lin.weight"]}
        return [
            FreezeMask(["head", "blocks.0"], **chosen),
            PruneMask(0.25, score=score, scope="blocks.*.lin.weight", start="1 steps", end="4 steps", rewind="1 steps"),
            PruneMask("2:4", scope="head.weight", start="1 steps"),
            PhaseUnfreeze([Phase("4 steps"), Phase({"monitor": "train/loss"}, **chosen), Phase(train="blocks")]),
            RunReport(),
        ]

    ends = []
    for given in (callbacks(), pickle.loads(pickle.dumps(callbacks()))):
        net = Net()
        fit(net, *given, max_epochs=1, logger=CSVLogger(str(tmp_path)))
        assert sum(int((block.lin.weight == 0).sum()) for block in net.blocks) == 72
        ends.append(weights(net))
    assert not changed(*ends)


@pytest.mark.parametrize("ours", ["freeze", "prune"])
@pytest.mark.parametrize("given", ["loader", "sampler", "batch sampler"])
def test_a_criterion_leaves_the_order_of_a_loader_with_its_own_generator_as_it_is(ours: str, given: str) -> None:
    def order(*callbacks: Any) -> list[float]:
        seen: list[float] = []

        class Looks(Net):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if self.training:  # a criterion looks in eval mode
                    seen.append(float(batch[0].sum()))
                return super().training_step(batch, batch_idx)

        own, examples = torch.Generator().manual_seed(5), data()
        sampler = RandomSampler(examples, replacement=True, generator=own)  # draws as it goes
        how: dict[str, Any] = {
            "loader": {"batch_size": 8, "shuffle": True, "generator": own},
            "sampler": {"batch_size": 8, "sampler": sampler},
            "batch sampler": {"batch_sampler": BatchSampler(sampler, 8, False)},
        }[given]
        trainer(*callbacks).fit(Looks(), DataLoader(examples, **how))
        return seen

    callback = FreezeMask("head", score="fisher", density=0.5) if ours == "freeze" else PruneMask(0.2, score="fisher")
    assert order(callback) == order()


def test_a_criterion_passes_over_batches_without_a_loss() -> None:
    class Skips(Net):
        def __init__(self, some: bool) -> None:
            super().__init__()
            self.some = some

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.training and not (self.some and float(batch[0].sum()) > 0):
                return None
            return super().training_step(batch, batch_idx)

    class Shown(Net):
        """The same batches, and those alone."""

        def mask_loss(self, batch: Any) -> Any:
            return self.loss(batch) if float(batch[0].sum()) > 0 else None

    ends = []
    for net in (Skips(some=True), Shown()):
        freeze = FreezeMask(score="fisher", density=0.3)
        fit(net, freeze)
        ends.append(freeze.masks)
    assert ends[0] == ends[1]
    with pytest.raises(ValueError, match=r"needs training batches with a loss, and the training data gave none"):
        fit(Skips(some=False), FreezeMask(score="fisher", density=0.3))

    def own(params: Any, context: Any) -> Any:
        for batch in context.batches:
            context.loss(batch)
        return {name: p.detach().abs() for name, p in params.items()}

    with pytest.raises(ValueError, match=r"no loss came back for this batch; let the criterion pass over it"):
        fit(Shown(), FreezeMask(score=own, density=0.3))


class InTraining(Net):
    """A network whose forward gives something else in eval mode, as detectors do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.training else {}["losses"]


def test_a_training_step_that_cannot_be_called_in_eval_mode_is_named_with_the_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"InTraining.training_step failed .* eval mode .*KeyError.*mask_loss\(self, batch\)"
    ):
        fit(InTraining(), FreezeMask(score="fisher", density=0.3))

    class WithLoss(InTraining):
        def mask_loss(self, batch: Any) -> Any:
            return self.loss(batch)

    fit(WithLoss(), FreezeMask(score="fisher", density=0.3))

    class TooLarge(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
        fit(TooLarge(), FreezeMask(score="fisher", density=0.3))
