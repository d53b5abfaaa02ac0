"""G9: bad input is refused before the first optimizer step, naming the culprit and the way out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_nets import Net, changed, data, fit, loader, trainer, weights
from torch import nn

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.core import criteria


def head_only(module: Any) -> Any:
    return torch.optim.SGD(module.head.parameters(), lr=0.1)


def two(*phases: Any) -> PhaseUnfreeze:
    return PhaseUnfreeze([*phases, Phase()])


AT_ONCE: dict[str, tuple[Callable[[], Any], str]] = {
    "density zero": (
        lambda: FreezeMask(score="random", density=0.0),
        r"FreezeMask: density=0\.0 must be a share in \(0, 1\]",
    ),
    "density over one": (lambda: FreezeMask(score="random", density=1.5), r"density=1\.5 must be a share in \(0, 1\]"),
    "no density": (lambda: FreezeMask(score="random"), r"density=None must be a share"),
    "density without score": (
        lambda: FreezeMask("head", density=0.5),
        r"density and scope need a criterion: give score=",
    ),
    "score and mask": (lambda: FreezeMask(score="random", density=0.5, mask="x"), r"score and mask exclude each other"),
    "nothing": (lambda: FreezeMask(), r"FreezeMask trains nothing: give it train="),
    "unknown score": (
        lambda: FreezeMask(score="fishr", density=0.5),
        r"score='fishr' is unknown; did you mean 'fisher'\?",
    ),
    "unknown structure": (
        lambda: FreezeMask(score="random", density=0.5, structure="rows"),
        r"structure='rows' is unknown; there are .*row",
    ),
    "unknown allocation": (
        lambda: FreezeMask(score="random", density=0.5, allocation="glob"),
        r"allocation='glob' is unknown; there are .*global",
    ),
    "unknown engine": (
        lambda: FreezeMask("head", engine="fast"),
        r"engine='fast' is unknown; there are auto, compact, dense",
    ),
    "empty pattern": (lambda: FreezeMask(""), r"A pattern must be a non-empty string"),
    "refresh of a pattern": (lambda: FreezeMask("head", refresh="3 steps"), r"refresh needs a criterion"),
    "refresh is no moment": (
        lambda: FreezeMask(score="random", density=0.5, refresh="often"),
        r"FreezeMask: refresh='often' must be a moment such as '500 steps'",
    ),
    "batches": (lambda: FreezeMask(score="fisher", density=0.5, batches=0), r"batches=0 must be a whole number from 1"),
    "train is no pattern": (lambda: FreezeMask(5), r"FreezeMask: train=5 must be a pattern or a list of patterns"),
    "scope is no pattern": (
        lambda: FreezeMask(score="random", density=0.5, scope=5),
        r"FreezeMask: scope=5 must be a pattern or a list of patterns",
    ),
    "prune scope is no pattern": (
        lambda: PruneMask(0.5, scope=5),
        r"PruneMask: scope=5 must be a pattern or a list of patterns",
    ),
    "prune batches": (lambda: PruneMask(0.5, batches=0), r"PruneMask: batches=0 must be a whole number from 1"),
    "prune batches in words": (lambda: PruneMask(0.5, batches="x"), r"PruneMask: batches='x' must be a whole number"),
    "regrow fraction": (
        lambda: PruneMask(0.5, regrow="random", regrow_fraction="a"),
        r"regrow_fraction='a' must be a share in \(0, 1\]",
    ),
    "phases of nothing": (
        lambda: PhaseUnfreeze(None),
        r"PhaseUnfreeze: phases=None must be a list of phases, the path of a YAML file of one, or 'gradual'",
    ),
    "phases not in a list": (lambda: PhaseUnfreeze(Phase()), r"phases=<.*Phase.*> must be a list of phases"),
    "one dict for phases": (lambda: PhaseUnfreeze({"train": "head"}), r"phases=\{.*\} must be a list of phases"),
    "decay in words": (
        lambda: PhaseUnfreeze("gradual", every="1 epochs", lr_decay="2"),
        r"lr_decay='2' must be a positive number",
    ),
    "sparsity of one": (lambda: PruneMask(1.0), r"PruneMask: sparsity=1\.0 must be a share in \[0, 1\)"),
    "sparsity negative": (lambda: PruneMask(-0.1), r"sparsity=-0\.1 must be a share"),
    "sparsity in words": (
        lambda: PruneMask("4:2"),
        r"sparsity='4:2' must be a share in \[0, 1\), e\.g\. 0\.9, or a pattern",
    ),
    "unknown schedule": (
        lambda: PruneMask(0.5, schedule="square"),
        r"schedule='square' is unknown; there are constant",
    ),
    "unknown regrow": (lambda: PruneMask(0.5, regrow="magnitude"), r"regrow='magnitude' must be 'random' \(SET\)"),
    "no phases": (lambda: PhaseUnfreeze([]), r"the list of phases is empty; give it at least one"),
    "two that never end": (
        lambda: PhaseUnfreeze([Phase(train="head"), Phase()]),
        r"phase 0 never ends and another follows it; give it until=",
    ),
    "the last ends": (
        lambda: PhaseUnfreeze([Phase("3 steps", train="head")]),
        r"the last phase ends \(3 steps\) and nothing follows; leave its until out",
    ),
    "unknown argument": (
        lambda: PhaseUnfreeze([{"untill": "3 steps"}, {}]),
        r"phase 0 has the unknown argument 'untill'; did you mean 'until'\?",
    ),
    "not a phase": (lambda: PhaseUnfreeze(["head"]), r"phase 0 must be a Phase or a dict of its arguments, got 'head'"),
    "half a step": (lambda: Phase("2.5 steps"), r"until='2\.5 steps' must be a whole number of steps"),
    "beyond the end": (lambda: Phase("120%"), r"until='120%' lies beyond the end of the run"),
    "a bare number": (lambda: Phase(500), r"until=500 must be a moment such as '500 steps'"),
    "unknown plateau key": (
        lambda: Phase({"monitor": "a", "patiense": 3}),
        r"has the unknown key 'patiense'; a plateau has min_delta, mode, monitor, patience",
    ),
    "plateau without a metric": (lambda: Phase({"patience": 3}), r"lacks the key 'monitor'"),
    "plateau mode": (lambda: Phase({"monitor": "a", "mode": "low"}), r"mode='low' must be 'min' or 'max'"),
    "plateau patience": (lambda: Phase({"monitor": "a", "patience": 0}), r"patience must be a whole number from 1"),
    "rate": (lambda: Phase(lr_scale=0.0), r"lr_scale=0\.0 must be a positive number or a dict"),
    "rates": (lambda: Phase(lr_scale={"head": -1.0}), r"lr_scale=\{'head': -1\.0\} must be a positive number"),
    "best of what": (lambda: Phase("3 steps", restore_best=True), r"restore_best needs a metric to know what is best"),
    "gradual without every": (lambda: PhaseUnfreeze("gradual"), r"'gradual' needs it, e\.g\. every='1 epochs'"),
    "every without gradual": (lambda: PhaseUnfreeze([Phase()], every="1 epochs"), r"every= goes with phases='gradual'"),
    "decay without gradual": (
        lambda: PhaseUnfreeze([Phase()], lr_decay=2.6),
        r"lr_decay=2\.6 must be a positive number and goes with",
    ),
    "no such file": (
        lambda: PhaseUnfreeze("phases.yml"),
        r"'phases\.yml' is neither 'gradual' nor the path of a YAML file",
    ),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_an_argument_out_of_range_is_refused_when_the_callback_is_made(case: str) -> None:
    make, message = AT_ONCE[case]
    with pytest.raises(ValueError, match=message):
        make()


def foreign() -> MaskSet:
    return MaskSet({"encoder.weight": torch.ones(3, 3, dtype=torch.bool)})


def other_shape() -> MaskSet:
    return MaskSet({"head.weight": torch.tensor([[True, False]])})


BEFORE_TRAINING: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "a pattern that matches nothing": (
        lambda: [FreezeMask("heat.*")],
        r"FreezeMask: train.*'heat\.\*' matches no.*head",
    ),
    "a regex that matches nothing": (lambda: [FreezeMask("re:^x")], r"'re:\^x' matches no"),
    "a class that is not there": (lambda: [FreezeMask("type:BatchNorm3d")], r"'type:BatchNorm3d' matches no"),
    "blocks that are not there": (lambda: [FreezeMask("layers:7")], r"layers:7"),
    "a scope that matches nothing": (
        lambda: [FreezeMask(score="random", density=0.5, scope="heads")],
        r"scope.*'heads' matches no.*head",
    ),
    "a phase's pattern": (
        lambda: [two(Phase("3 steps", train="hed", name="first"))],
        r"PhaseUnfreeze: first: .*'hed' matches no",
    ),
    "a later phase's pattern": (
        lambda: [PhaseUnfreeze([Phase("3 steps", train="head"), Phase(train="tail")])],
        r"PhaseUnfreeze: phase 1: .*'tail' matches no",
    ),
    "a rate's pattern": (
        lambda: [PhaseUnfreeze([Phase(train="head", lr_scale={"tail": 0.1})])],
        r"PhaseUnfreeze: lr_scale.*'tail' matches no",
    ),
    "a prune scope's pattern": (
        lambda: [PruneMask(0.5, scope="block.*")],
        r"PruneMask: scope.*'block\.\*' matches no.*blocks",
    ),
    "a prune scope that takes away all that it names": (
        lambda: [PruneMask(0.5, scope=["type:Linear", "!*"])],
        r"PruneMask: scope=\['type:Linear', '!\*'\] leaves nothing to prune, .* for example 'weights:'",
    ),
    "a mask file that is not there": (
        lambda: [FreezeMask(mask="gone.safetensors")],
        r"FreezeMask: There is no mask file 'gone",
    ),
    "a damaged mask file": (lambda: [FreezeMask(mask=damaged())], r"FreezeMask: The mask file .*damaged"),
    "a foreign mask": (
        lambda: [FreezeMask(mask=foreign())],
        r"FreezeMask: mask belongs to another model: this one has no parameter 'encoder\.weight'",
    ),
    "a mask of another shape": (
        lambda: [two(Phase("3 steps", mask=other_shape()))],
        r"phase 0: mask belongs to another model: head\.weight has shape \(1, 2\) there and \(2, 12\) here",
    ),
    "a mask of zeros": (
        lambda: [FreezeMask(mask=MaskSet({"head.weight": torch.zeros(2, 12, dtype=torch.bool)}))],
        r"FreezeMask trains nothing; let it name at least one tensor",
    ),
    "a phase that trains nothing": (
        lambda: [two(Phase("3 steps", train=["head", "!head"], name="empty"))],
        r"empty trains nothing; let it name at least one tensor",
    ),
    "masks that share nothing": (
        lambda: [FreezeMask("head"), FreezeMask("stem")],
        r"all FreezeMask callbacks together train nothing; let them share some entries",
    ),
    "nothing left to rank": (
        lambda: [FreezeMask("*", score="random", density=0.5)],
        r"nothing is left to rank, `train` names every tensor already",
    ),
    "a density of no entry": (
        lambda: [FreezeMask("head", score="random", density=1e-6)],
        r"FreezeMask: density=1e-06 of the 468 entries in scope is not one entry; raise it, or leave score and density out",
    ),
    "a phase's density of no entry": (
        lambda: [two(Phase("3 steps", train="head", score="fisher", density=1e-3, scope="stem", allocation="uniform"))],
        r"phase 0: density=0\.001 of the 108 entries in scope is not one entry",
    ),
    "phases in the wrong order": (
        lambda: [PhaseUnfreeze([Phase("9 steps", train="head"), Phase("5 steps", train="stem"), Phase()])],
        r"phase 1: until='5 steps' is step 5, not after the phase before \(step 9\)",
    ),
    "phases of the same moment": (
        lambda: [PhaseUnfreeze([Phase("8 steps", train="head"), Phase("1 epochs", train="stem"), Phase()])],
        r"phase 1: until='1 epochs' is step 8, not after the phase before \(step 8\)",
    ),
    "a ramp that ends before it starts": (
        lambda: [PruneMask(0.5, start="9 steps", end="5 steps")],
        r"PruneMask: end='5 steps' lies before start='9 steps'",
    ),
    "a ramp beyond the end": (
        lambda: [PruneMask(0.5, end="99 steps")],
        r"end='99 steps' is step 99, and the run has 16",
    ),
    "a rewind to the future": (
        lambda: [PruneMask(0.5, start="2 steps", rewind="5 steps")],
        r"rewind='5 steps' lies after start='2 steps'",
    ),
    "n:m on an odd width": (
        lambda: [PruneMask("3:7", scope="head.weight")],
        r"PruneMask: head\.weight of shape \(2, 12\) has an input width of 12, which is not divisible by 7",
    ),
    "n:m on a vector": (
        lambda: [PruneMask("2:4", scope="head.bias")],
        r"head\.bias of shape \(2,\) has an input width of 0",
    ),
    "more zeros than may move": (
        lambda: [FreezeMask("blocks.1"), PruneMask(0.8, scope="blocks.*.lin.weight")],
        r"PruneMask: sparsity=0\.8 of the 288 entries in scope cannot be reached: FreezeMask holds all but 144",
    ),
    "a ramp through a phase that holds its scope": (
        lambda: [
            PruneMask(0.8, scope="blocks.*.lin.weight", start="2 steps", end="12 steps", every="2 steps"),
            PhaseUnfreeze([Phase("5 steps"), Phase("9 steps", train="head", name="top"), Phase()]),
        ],
        r"PruneMask: 216 of the 288 entries in scope are to be zero by the end of top of PhaseUnfreeze, which lets only 0",
    ),
    "a ramp in a last phase that trains few": (
        lambda: [
            PruneMask(0.5, scope="blocks.*.lin.weight", start="6 steps", schedule="constant"),
            PhaseUnfreeze([Phase("5 steps"), Phase(score="random", density=0.1)]),
        ],
        r"144 of the 288 entries in scope are to be zero by the end of phase 1 of PhaseUnfreeze, which lets only 49",
    ),
    "a later phase's criterion for other tensors": (
        lambda: [PhaseUnfreeze([Phase("5 steps"), Phase(score="wanda", density=0.5)])],
        r"phase 1: wanda scores the weight of linear and convolution layers, and stem\.bias is none",
    ),
    "a later phase's criterion without heads": (
        lambda: [PhaseUnfreeze([Phase("5 steps"), Phase(score="head_activation", density=0.5, scope="stem")])],
        r"phase 1: head_activation scores attention heads .* stem\.weight is of none",
    ),
    "a later phase's criterion without labels to draw": (
        lambda: [PhaseUnfreeze([Phase("5 steps"), Phase(score="fisher_sampled", density=0.5)])],
        r"phase 1: This criterion needs a loss against labels .* define mask_sampled_loss\(self, batch\)",
    ),
    "a later ramp's criterion for other tensors": (
        lambda: [
            PruneMask(0.5, score=partial(criteria.get("activation")), scope="blocks.*.norm.weight", start="9 steps")
        ],
        r"PruneMask: activation scores the weight or bias of linear and convolution layers, and blocks\.0\.norm\.weight is",
    ),
    "a later ramp's criterion without labels to draw": (
        lambda: [PruneMask(0.5, score="fisher_sampled", start="9 steps")],
        r"PruneMask: This criterion needs a loss against labels",
    ),
    "refresh of no step": (
        lambda: [FreezeMask(score="random", density=0.5, refresh="1%")],
        r"refresh='1%' is less than a step in this run",
    ),
}


def damaged() -> str:
    path = Path("damaged.safetensors")
    MaskSet({"head.weight": torch.rand(2, 12) < 0.5}).save(path)
    path.write_bytes(path.read_bytes()[:-2])
    return str(path)


@pytest.mark.parametrize("case", BEFORE_TRAINING)
def test_bad_input_is_refused_before_the_first_step(case: str) -> None:
    make, message = BEFORE_TRAINING[case]
    net = Net()
    before, required = weights(net), [p.requires_grad for p in net.parameters()]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        fit(net, *make())
    assert "\n" not in str(caught.value)
    assert not changed(before, weights(net))
    assert [p.requires_grad for p in net.parameters()] == required
    assert not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("late", [lambda s: PhaseUnfreeze([Phase("5 steps"), s(Phase)]), lambda s: s(PruneMask)])
def test_a_criterion_with_a_loss_wants_one_of_a_module_that_optimizes_by_hand_before_training(late: Any) -> None:
    class ByHand(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            pytest.fail("it trained")

    def scored(make: Any) -> Any:
        return make(0.5, score="snip", start="9 steps") if make is PruneMask else make(score="fisher", density=0.5)

    with pytest.raises(ValueError, match=r"ByHand optimizes manually, .* define mask_loss\(self, batch\)"):
        fit(ByHand(), late(scored))


@pytest.mark.parametrize(
    "callback",
    [
        lambda: FreezeMask("stem"),
        lambda: FreezeMask(score="magnitude", density=0.5, scope="stem"),
        lambda: PhaseUnfreeze([Phase("3 steps", train="head"), Phase(train="stem")]),
    ],
)
def test_a_tensor_that_no_optimizer_holds(callback: Any) -> None:
    net = Net(make=head_only)
    with pytest.raises(
        ValueError, match=r"stem\.weight is to train, and no optimizer holds it; hand it to the optimizer in"
    ):
        fit(net, callback())


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (
            {"sparsity": 0.5},  # stem and blocks
            r"sparsity=0\.5 of the 384 entries in scope cannot be reached: all but 96 of them do not train "
            r"\(requires_grad=False, or in no optimizer\), and a held entry is not pruned; let them train",
        ),
        (
            {"sparsity": 0.5, "allocation": "uniform"},
            r"sparsity=0\.5 of the 144 entries of blocks\.0\.lin\.weight cannot",
        ),
        (
            {"sparsity": "2:4"},
            r"sparsity=0\.5 of the 144 entries of blocks\.0\.lin\.weight cannot be reached: all but 0",
        ),
        ({"sparsity": 0.5, "scope": "head.weight"}, r"of the 24 entries in scope cannot be reached: all but 0"),
    ],
)
@pytest.mark.parametrize("phased", [False, True])
def test_a_scope_of_which_the_user_lets_too_little_train(prune: dict[str, Any], message: str, phased: bool) -> None:
    """The blocks are frozen by hand, and no optimizer holds the head; nothing of ours holds anything."""
    net = Net(make=lambda module: torch.optim.SGD([*module.stem.parameters(), *module.blocks.parameters()], lr=0.1))
    net.blocks.requires_grad_(False)
    net.head.requires_grad_("head" not in prune.get("scope", ""))
    before = weights(net)
    phases = [PhaseUnfreeze([Phase("4 steps"), Phase()])] if phased else []
    if phased:
        message = r"PruneMask: \d+ of the \d+ entries in scope are to be zero by the end of phase \d of PhaseUnfreeze"
    with pytest.raises(ValueError, match=message):
        fit(net, PruneMask(**prune), *phases)
    assert not changed(before, weights(net))


def test_a_scope_frozen_by_hand_that_is_zero_already_is_no_fault() -> None:
    net = Net()
    net.blocks[0].requires_grad_(False)
    net.blocks[0].lin.weight.data[:8] = 0
    fit(net, PruneMask(0.5, scope="blocks.*.lin.weight"))
    assert sum(int((block.lin.weight == 0).sum()) for block in net.blocks) == 144


def test_two_phase_unfreeze() -> None:
    """Lightning refuses two in its list; one that is added later is refused by us."""
    first, second = two(Phase("2 steps", train="head")), two(Phase("3 steps", train="stem"))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `PhaseUnfreeze`"):
        fit(Net(), first, second)
    run = trainer(first)
    run.callbacks.append(second)
    with pytest.raises(ValueError, match="takes one PhaseUnfreeze; put the phases of all of them into one list"):
        run.fit(Net(), loader())


def test_a_run_without_an_end_has_no_percent() -> None:
    for callback in (
        PruneMask(0.5),
        PhaseUnfreeze([Phase("50%", train="head"), Phase()]),
        FreezeMask(score="random", density=0.5, refresh="5%"),
    ):
        with pytest.raises(
            ValueError, match=r"needs a run with an end: set max_steps or max_epochs, or give a number of steps"
        ):
            fit(Net(), callback, max_epochs=-1)


def test_a_criterion_that_needs_data_from_a_stream_that_can_be_read_once() -> None:
    once = iter([tuple(t[i : i + 8] for t in data().tensors) for i in range(0, 64, 8)])
    run = trainer(FreezeMask(score="fisher", density=0.5), max_steps=4)
    with pytest.raises(ValueError, match=r"can be iterated over only once, so a criterion cannot look at it"):
        run.fit(Net(), once)


def test_a_criterion_that_gives_nonsense() -> None:
    def short(params: Any, context: Any) -> Any:
        return {n: p.flatten()[:1] for n, p in params.items()}

    def nan(params: Any, context: Any) -> Any:
        return {n: p * float("nan") for n, p in params.items()}

    def none(params: Any, context: Any) -> Any:
        return {}

    for score, message in (
        (short, r"'short' returned shape \(1,\) for stem\.weight of \(12, 8\)"),
        (nan, r"'nan' gave nan for stem\.weight"),
        (none, r"'none' returned no score for stem\.weight"),
    ):
        net = Net()
        before = weights(net)
        with pytest.raises(ValueError, match=message):
            fit(net, FreezeMask(score=score, density=0.5))
        assert not changed(before, weights(net))


def test_a_criterion_that_gives_infinity_for_what_would_have_to_go() -> None:
    def first_rows(params: Any, context: Any) -> Any:
        return {n: p.detach().abs().index_fill(0, torch.arange(keep), float("inf")) for n, p in params.items()}

    def prune(sparsity: float) -> PruneMask:
        return PruneMask(sparsity, score=first_rows, scope="blocks.0.lin.weight", start="0 steps", schedule="constant")

    net, keep = Net(), 4
    fit(net, prune(0.5))  # what the criterion never wants to lose is kept
    assert not bool((net.blocks[0].lin.weight[:4] == 0).any())
    keep = 12
    message = (
        r"sparsity 0\.0500 .* entries of blocks\.0\.lin\.weight that the criterion scores as infinite; give .*finite"
    )
    with pytest.raises(ValueError, match=message):
        fit(Net(), prune(0.05))


def test_lbfgs_and_a_rate_for_each_tensor_in_a_later_phase() -> None:
    net = Net(make=lambda module: torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=2))
    before = weights(net)
    phases = PhaseUnfreeze([Phase("3 steps", train="head"), Phase(train="*", lr_scale={"head": 0.1}, name="all")])
    with pytest.raises(ValueError, match=r"PhaseUnfreeze: all: LBFGS takes one learning rate for all tensors; give"):
        fit(net, phases)
    assert not changed(before, weights(net))
    fit(net, two(Phase("3 steps", train="head", lr_scale=0.5)))


def test_gradual_needs_blocks() -> None:
    class Flat(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.blocks
            self.blocks = nn.ModuleList()

    with pytest.raises(
        ValueError, match=r"'gradual' needs a model with repeated blocks, and found none; list the phases"
    ):
        fit(Flat(), PhaseUnfreeze("gradual", every="2 steps"))


@pytest.mark.parametrize("val", [True, False])
def test_a_metric_that_was_never_logged_is_an_error_at_the_first_chance_with_those_that_were(val: bool) -> None:
    net, phases = Net(), two(Phase({"monitor": "val/los", "patience": 1}, train="head"))
    with pytest.raises(RuntimeError, match=r"phase 0 monitors 'val/los', which was not logged; .*train/loss") as caught:
        fit(net, phases, val=val, max_epochs=5)
    assert ("val/loss" in str(caught.value)) == val
    assert phases.history[-1]["phase"] == 0
    with pytest.raises(RuntimeError, match=r"monitors 'val/los'"):
        fit(Net(), two(Phase({"monitor": "val/los"}, train="head")), val=val, max_epochs=1)


def test_a_metric_of_a_phase_that_was_not_reached_is_not_missed() -> None:
    phases = PhaseUnfreeze([Phase("2 epochs", train="head"), Phase({"monitor": "val/los"}), Phase(train="stem")])
    fit(Net(), phases, val=True, max_epochs=2)


def test_phases_in_a_yaml_file_that_is_none(tmp_path: Path) -> None:
    for text, message in (
        ("a: [", r"is not valid YAML"),
        ("a: 1", r"must hold a list of phases"),
        ("- 3", r"phase 0 must be"),
    ):
        Path("p.yaml").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            PhaseUnfreeze("p.yaml")
        assert "\n" not in str(caught.value)
