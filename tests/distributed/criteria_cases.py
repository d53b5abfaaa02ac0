"""Script: every criterion that looks at data, on one process with all batches and on two ranks with half of them each.

``python criteria_cases.py FOLDER`` writes ``one.pt`` and ``rank<r>.pt``: criterion -> name -> scores.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_mask.core import Context
from lightning_mask.core.criteria import CRITERIA, compute


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 2, 5, generator=generator) * (i + 1), torch.randint(3, (4,), generator=generator))
        for i in range(6)
    ]


def scores(mine: list[tuple[Tensor, Tensor]]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for score in sorted(CRITERIA):
        model = network()
        scope = {n: p for n, p in model.named_parameters() if score != "wanda" or n.endswith("weight")}

        def loss(batch: tuple[Tensor, Tensor], model: nn.Module = model) -> Tensor:
            return cross_entropy(model(batch[0]), batch[1])

        def sampled(batch: tuple[Tensor, Tensor], model: nn.Module = model) -> Tensor:
            logits = model(batch[0])
            return cross_entropy(logits, logits.detach().softmax(1).multinomial(1)[:, 0])

        context = Context(model, loss, lambda: mine, reference=dict(model.named_parameters()), sampled_loss=sampled)
        try:
            values = compute(score, scope, context)
        except ValueError as error:
            if "no repeated blocks" not in str(error):
                raise
            continue
        if context.used_data:
            found[score] = values
    return found


def one(folder: Path) -> None:
    torch.save(scores(batches()), folder / "one.pt")


def two(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(scores(batches()[rank::2]), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(sys.argv[1])
    codes = [*run_ranks(1, one, folder), *run_ranks(2, two, folder)]
    sys.exit(any(codes))
