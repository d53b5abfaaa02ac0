"""Script: every criterion, on one process with all batches, and on two ranks with half of them each, sharded or not.

``python criteria_cases.py FOLDER`` writes ``one.pt`` and ``rank<r>.pt``; ``joined.pt``, of one process whose batches are
those of two ranks put together, and ``sharded<r>.pt``: criterion -> name -> scores, or what it was refused with.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from lightning_mask.core import Context
from lightning_mask.core.criteria import CRITERIA, compute
from lightning_mask.core.sharding import is_sharded, whole


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 4, 3, padding=1, groups=2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(20, 20)) for _ in range(2))
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).tanh().flatten(1)
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


Batch = tuple[Tensor, Tensor]


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 2, 5, generator=generator) * (i + 1), torch.randint(3, (4,), generator=generator))
        for i in range(6)
    ]


def scores(mine: list[Batch], sharded: bool = False) -> dict[str, dict[str, Tensor] | str]:
    found: dict[str, dict[str, Tensor] | str] = {}
    for score in sorted(CRITERIA):
        model = Network()
        if sharded:
            fully_shard(model)
        scope = {n: p for n, p in model.named_parameters() if score != "wanda" or n.endswith("weight")}

        def loss(batch: Batch, model: nn.Module = model) -> Tensor:
            return cross_entropy(model(batch[0]), batch[1])

        def sampled(batch: Batch, model: nn.Module = model) -> Tensor:
            logits = model(batch[0])
            return cross_entropy(logits, logits.detach().softmax(1).multinomial(1)[:, 0])

        reference = {n: (p.detach() * 2) for n, p in model.named_parameters()}
        context = Context(model, loss, lambda: mine, reference=reference, sampled_loss=sampled)
        try:
            values = compute(score, scope, context)
        except ValueError as error:
            found[score] = str(error)
        else:
            assert all(is_sharded(value) == sharded for value in values.values()), score
            assert all(is_sharded(p) == sharded and p.grad is None for p in model.parameters()), score
            found[score] = {name: whole(value) for name, value in values.items()}
    return found


def one(folder: Path) -> None:
    every = batches()
    torch.save(scores(every), folder / "one.pt")
    pairs = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(every[::2], every[1::2], strict=True)]
    torch.save(scores(pairs), folder / "joined.pt")  # type: ignore[arg-type]


def two(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = batches()[rank::2]
    torch.save(scores(mine), folder / f"rank{rank}.pt")
    torch.save(scores(mine, sharded=True), folder / f"sharded{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(sys.argv[1])
    codes = [*run_ranks(1, one, folder), *run_ranks(2, two, folder)]
    sys.exit(any(codes))
