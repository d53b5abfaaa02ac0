"""What the FSDP2 scripts share: a little model that ``fully_shard`` deals out, plans to train it by, what is read off it."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from little import Data, Little, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_mask import FreezeMask, GradientMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.tasks.task import Task

STEPS = 12
PLANS: dict[str, Callable[[], list[Any]]] = {
    "phases": lambda: [
        PhaseUnfreeze(
            [Phase("3 steps", train="head"), Phase("6 steps", train=["head", "blocks.1"]), Phase(lr_scale=0.5)]
        )
    ],
    "magnitude": lambda: [FreezeMask("head", score="magnitude", density=0.3)],
    "random, drawn anew": lambda: [FreezeMask("head", score="random", density=0.1, refresh="4 steps")],
    "fisher": lambda: [FreezeMask("head", score="fisher", density=0.3, batches=2)],
    "one entry": lambda: [FreezeMask(score="magnitude", density=1)],
    "uniform rows": lambda: [FreezeMask(score="magnitude", density=0.3, structure="row", allocation="uniform")],
    "rows": lambda: [FreezeMask(score="magnitude", density=0.3, structure="row")],
    "columns": lambda: [FreezeMask(score="magnitude", density=0.3, structure="column", scope="blocks.*.lin.weight")],
    "tensors": lambda: [FreezeMask(score="magnitude", density=0.3, structure="tensor")],
    "ramp": lambda: [
        PruneMask(0.6, scope="blocks.*.lin.weight", start="1 steps", end="9 steps", every="2 steps"),
        PhaseUnfreeze([Phase("10 steps", train=["head", "blocks"]), Phase(train="head")]),
    ],
    "2:4": lambda: [PruneMask("2:4", scope="blocks.*.lin.weight", schedule="constant", start="2 steps")],
    "set": lambda: [PruneMask(0.6, scope="blocks.*.lin.weight", regrow="random", every="2 steps", end="12 steps")],
    "rig": lambda: [PruneMask(0.6, scope="blocks.*.lin.weight", regrow="gradient", every="2 steps", end="12 steps")],
    "rewind": lambda: [
        PruneMask(0.7, scope="blocks.1.lin.weight", rewind="2 steps", start="2 steps", end="8 steps", every="3 steps")
    ],
    "behind": lambda: [
        PruneMask(0.5, scope="blocks.0.lin.weight", regrow="ste", start="1 steps", end="9 steps", every="2 steps"),
        PruneMask(0.6, score="movement", scope="blocks.1.lin.weight", start="2 steps", end="11 steps", every="3 steps"),
    ],
    "lottery": lambda: [
        PhaseUnfreeze([Phase("5 steps"), Phase(train="head", score="change", density=60, restart=True, lr_scale=0.5)])
    ],
    "gradient mask": lambda: [FreezeMask("head", score="magnitude", density=0.3), GradientMask(0.5)],
    "all together": lambda: [
        FreezeMask(["head", "blocks.1"], score="gradient", density=0.3, scope=["stem", "blocks.0"], batches=2),
        PruneMask(0.5, scope="blocks.1.lin.weight", start="2 steps", end="8 steps", every="2 steps"),
        PhaseUnfreeze(
            [Phase("5 steps"), Phase("9 steps", train="blocks.1", score="magnitude", density=60), Phase(train="blocks")]
        ),
    ],
}
SAME_AS_DDP = [
    "phases",
    "lottery",
    "magnitude",
    "random, drawn anew",
    "one entry",
    "uniform rows",
    "rows",
    "columns",
    "tensors",
    "2:4",
]


class Dealt(Little):
    """The little network with rows that two ranks cannot share equally, and a vector of one entry.

    Args:
        shards: Whether it is dealt out; the same network otherwise.
    """

    def __init__(self, shards: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.shards = shards
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head = nn.Linear(12, 3)
            self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale

    def configure_model(self) -> None:
        if self.shards and not isinstance(self.scale, DTensor):
            mesh = self.device_mesh["data_parallel"]
            for layer in (*self.blocks, self.head):
                fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)


class Wide(Dealt):
    """With a vector of 24 entries: a rank's 12 fill one vector of the optimizer's kernels, also where one of them trains."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.stem = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 12))

    masks = MaskSet(
        {
            "stem.0.bias": torch.arange(24) == 3,
            "stem.0.weight": torch.arange(24 * 8).view(24, 8) % 7 == 0,
            "head.weight": torch.ones(3, 12, dtype=torch.bool),
        }
    )


class Numbers(torch.optim.Optimizer):
    """One that counts its steps in an int, and is held dense."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                kept = self.state[parameter]
                kept["step"] = kept.get("step", 0) + 1
                kept["mean"] = 0.9 * kept.get("mean", torch.zeros_like(parameter)) + parameter.grad
                parameter.sub_(kept["mean"], alpha=0.1 / kept["step"] ** 0.5)
        return loss


class AsTask(Dealt):
    """Dealt out as the application's tasks are; its validation runs a forward, after which the root stays gathered."""

    configure_model = Task.configure_model

    @property
    def net(self) -> nn.Module:
        return self

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("out", self(batch["x"]).sum())


class ByHand(Dealt):
    """Two optimizers, stepped by the module itself."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        adam = torch.optim.AdamW(parameters[::2], lr=0.02, weight_decay=0.1)
        return [adam, torch.optim.SGD(parameters[1::2], lr=0.1, momentum=0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch["x"]), batch["y"]))
        for optimizer in optimizers:
            optimizer.step()


class WithoutScale(Dealt):
    """Its optimizer does not hold the vector of one entry, of which the second rank has none."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p is not self.scale], lr=0.1)


class Tested(Dealt):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("out", self(batch["x"]).sum())


class TestData(Data):
    __test__ = False

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


def sgd(params: Any) -> torch.optim.Optimizer:
    """Linear in the gradient, so that a rounding difference stays one."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def two_groups(params: Any) -> torch.optim.Optimizer:
    """Matrices decay and vectors do not, so the optimizer's order is not the model's."""
    params = list(params)
    groups = [
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        {"params": [p for p in params if p.dim() > 1]},
    ]
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)


def train(
    callbacks: list[Any], net: Dealt, ckpt: Any = None, folder: bool = False, ranks: int = 2, **arguments: Any
) -> Any:
    strategy: Any = "ddp" if ranks > 1 else "auto"
    if net.shards:
        strategy = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=folder)
    run = trainer(*callbacks, ranks=ranks, strategy=strategy, **{"max_steps": STEPS, **arguments})
    run.fit(net, datamodule=Data(), ckpt_path=ckpt, weights_only=True)
    return run


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in module.named_parameters()
    }


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def quiet() -> None:
    """No logs, and one thread."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
