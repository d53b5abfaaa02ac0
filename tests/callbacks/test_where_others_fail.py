"""Failures of Lightning's own callbacks that touch what these do: the peer fails here, and ours does not."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelPruning
from mask_nets import Net, Watch, changed, fit, names, weights
from torch import nn, optim

from lightning_mask import FreezeMask, Phase, PhaseUnfreeze, PruneMask


class Backboned(Net):
    """The same network with the parts that BackboneFinetuning asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(self.stem, *self.blocks)
        del self.stem, self.blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.1)


def resumed(callback: Any, tmp_path: Any) -> tuple[Net, dict[str, Any], set[str]]:
    """Two epochs, a checkpoint, two more in a new module and Trainer; return what moved after the resume."""
    first = callback()
    run = fit(Backboned(), first, max_epochs=2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    net, watch = Backboned(), Watch()
    fit(net, callback(), watch, max_epochs=4, ckpt=str(tmp_path / "two.ckpt"))
    return net, watch.weights[0], changed(watch.weights[0], watch.weights[-1])


def test_a_resume_after_the_switch_trains_on(tmp_path: Any) -> None:
    _, _, peer = resumed(lambda: BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=0.1), tmp_path)
    net, _, ours = resumed(lambda: PhaseUnfreeze([Phase("1 epochs", train="head"), Phase()]), tmp_path)
    assert peer == names(net, "head")  # frozen for ever, and nothing says so
    assert ours == names(net, "")


def test_tensors_of_equal_value_all_train() -> None:
    """Every LayerNorm weight is ones and every bias zeros: the peer takes them for one."""

    class LayerByLayer(BaseFinetuning):
        def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
            self.freeze(pl_module.blocks)

        def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: optim.Optimizer) -> None:
            for block in pl_module.blocks if epoch == 1 else []:
                self.unfreeze_and_add_param_group(block, optimizer, lr=0.1)

    def make(module: Any) -> Any:
        return optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)

    net, before = Net(make=make), weights(Net())
    fit(net, LayerByLayer(), max_epochs=3)
    assert names(net, "") - changed(before, weights(net)) == names(net, "blocks.1.norm")
    net, watch = Net(make=make), Watch()
    fit(net, PhaseUnfreeze([Phase("1 epochs", train=["head", "stem"]), Phase()]), watch, max_epochs=3)
    assert watch.moved_at(23) == names(net, "")

    equal = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    optimizer = optim.SGD(equal[0].parameters(), lr=0.1)
    assert BaseFinetuning.filter_on_optimizer(optimizer, list(equal[1].parameters())) == []  # what makes it so


def test_what_is_pruned_stays_pruned_after_a_resume(tmp_path: Any) -> None:
    def peer(where: Any) -> list[Any]:
        targets = [(block.lin, "weight") for block in where.blocks]
        return [
            ModelPruning(
                "l1_unstructured", targets, amount=0.5, use_lottery_ticket_hypothesis=False, apply_pruning=once
            )
        ]

    def once(epoch: int) -> bool:
        return epoch == 0

    def ours(_: Any) -> list[Any]:
        return [PruneMask(0.5, scope="blocks.*.lin.weight", start="2 steps", schedule="constant")]

    regrown = []
    for make in (peer, ours):
        net = Net()
        run = fit(net, *make(net), max_epochs=2)
        run.save_checkpoint(tmp_path / "pruned.ckpt")
        zero = {n: p == 0 for n, p in net.named_parameters() if n.endswith("lin.weight")}
        if not zero:  # the peer has renamed them
            state = torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"]
            zero = {n: v == 0 for n, v in state.items() if n.endswith("lin.weight")}
        assert sum(int(z.sum()) for z in zero.values()) == 144
        again = Net()
        fit(again, *make(again), max_epochs=4, ckpt=str(tmp_path / "pruned.ckpt"))
        regrown.append(sum(int((again.get_parameter(n)[z] != 0).sum()) for n, z in zero.items()))
    assert regrown == [144, 0]


def adamw(module: Any, decay: float) -> Any:
    return optim.AdamW(module.parameters(), lr=0.02, weight_decay=decay)


def test_a_gradient_mask_by_hand_does_not_hold_and_spreads_infinity() -> None:
    masks = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) < 0.5 for n, p in Net().named_parameters()
    }

    class ByHand(Watch):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            for name, p in pl_module.named_parameters():
                p.grad *= masks[name]

    class Late(Watch):
        """The mask comes after two steps, so there is momentum from before."""

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step >= 2:
                ByHand.on_after_backward(self, trainer, pl_module)  # type: ignore[arg-type]

    from lightning_mask import MaskSet

    given = MaskSet(masks)
    for peer, ours, start in (
        (ByHand(), FreezeMask(mask=given), 0),
        (Late(), PhaseUnfreeze([Phase("2 steps"), Phase(mask=given)]), 2),
    ):
        drift = []
        for callback in (peer, ours):
            watch = Watch()
            net = Net(make=partial(adamw, decay=0.1 if start == 0 else 0.0))
            fit(net, callback, watch)
            then, now = watch.weights[start], watch.weights[-1]
            drift.append(max(float((now[n] - then[n])[~m].abs().max()) for n, m in masks.items() if bool((~m).any())))
        assert drift[0] > 1e-3
        assert drift[1] == 0.0

    class Infinite(Net):
        def on_after_backward(self) -> None:
            if self.global_step == 3:
                self.head.weight.grad[~masks["head.weight"]] = float("inf")

    class AfterModule(Watch):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            ByHand.on_after_backward(self, trainer, pl_module)  # type: ignore[arg-type]

    broken = Infinite()
    fit(broken, AfterModule(), gradient_clip_val=1.0)
    assert all(bool(torch.isnan(p).any()) for p in broken.parameters())

    class InLoss(Net):
        """An infinite gradient from the loss itself, in a held entry only."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            handle = self.head.weight.register_hook(lambda g: g.masked_fill(~masks["head.weight"], float("inf")))
            self.trainer.callbacks[-1].handles.append(handle)
            return loss

    class Clean(Watch):
        handles: list[Any]

        def on_train_batch_end(self, *_: Any) -> None:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()

    clean = Clean()
    clean.handles = []
    sound, plain = InLoss(), Net()
    fit(sound, FreezeMask(mask=given), clean, gradient_clip_val=1.0)
    fit(plain, FreezeMask(mask=given), gradient_clip_val=1.0)
    assert not changed(weights(sound), weights(plain))
