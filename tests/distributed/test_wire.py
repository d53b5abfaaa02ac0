"""Active gradients equal those of plain DDP, and nothing else goes on the wire: two real processes over gloo."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import clean_environment, note, run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    bf16_compress_wrapper,
    fp16_compress_hook,
    fp16_compress_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import batched_powerSGD_hook, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_mask.core.wire import Hook, Wire, compatible, reduce_active

STEPS = 6
Gradients = dict[str, Tensor | None]


@dataclass
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    inner: Hook | None = None
    density: float = 0.3
    width: int = 12


SMALL = {"bucket_cap_mb": 0.001}
CASES = {
    "ddp": Case(SMALL),
    "one bucket": Case(),
    "bucket view": Case({**SMALL, "gradient_as_bucket_view": True}),
    "static graph": Case({**SMALL, "static_graph": True}),
    "static graph, bucket view": Case({**SMALL, "static_graph": True, "gradient_as_bucket_view": True}),
    "unused allowed": Case({**SMALL, "find_unused_parameters": True}),
    "unused allowed, bucket view": Case({"find_unused_parameters": True, "gradient_as_bucket_view": True}),
    "accumulating": Case(SMALL, accumulate=3),
    "accumulating, bucket view": Case({**SMALL, "gradient_as_bucket_view": True}, accumulate=3),
    "1 %": Case({"bucket_cap_mb": 0.1}, density=0.01, width=200),
    "allreduce": Case(SMALL, inner=allreduce_hook),
    "fp16": Case(SMALL, inner=fp16_compress_hook),
    "fp16, bucket view": Case({**SMALL, "gradient_as_bucket_view": True}, inner=fp16_compress_hook),
    "fp16 around allreduce": Case(SMALL, inner=fp16_compress_wrapper(allreduce_hook)),
    "bf16": Case(SMALL, inner=bf16_compress_hook),
    "bf16 around fp16": Case(SMALL, inner=bf16_compress_wrapper(fp16_compress_hook)),
}


class Net(nn.Module):
    """Every kind of tensor that a bucket can hold; ``spare`` is used now and then."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.first = nn.Linear(width, width)
        self.low = nn.Linear(width, width, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(width)
        self.turned = nn.Parameter(0.1 * torch.randn(5, width).t())
        self.strided = nn.Parameter(torch.randn(5, 10)[:, ::2])
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.spare = nn.Linear(5, 5)

    def forward(self, x: Tensor, images: Tensor, spare: bool) -> Tensor:
        x = self.norm(self.low(self.first(x).tanh().bfloat16()).float()) * self.scalar
        x = x @ self.turned @ self.strided
        if spare:
            x = self.spare(x)
        return x.square().mean() + self.conv(images).square().mean() + self.nothing.sum()


def masks_of(net: Net, step: int, density: float) -> dict[str, Tensor]:
    """Boolean masks, others after two steps and others again after four; what is absent is active whole."""
    generator = torch.Generator().manual_seed(step // 2)
    masks = {n: torch.rand(p.shape, generator=generator) < density for n, p in net.named_parameters()}
    masks["low.bias"] = torch.zeros_like(masks["low.bias"])
    masks["first.bias"] = torch.ones_like(masks["first.bias"])
    if step // 2 == 1:
        masks["first.weight"] = torch.zeros_like(masks["first.weight"])
    if density == 0.01:
        return masks
    return {n: m for n, m in masks.items() if n not in ("norm.weight", "norm.bias", "low.weight")[: step // 2 + 1]}


def indices(net: nn.Module, masks: dict[str, Tensor]) -> dict[Tensor, Tensor]:
    flat = {net.get_parameter(n): m.flatten().nonzero().view(-1) for n, m in masks.items()}
    return {p: index.int() if i % 2 else index for i, (p, index) in enumerate(flat.items())}


def run(case: Case, wire: Wire | None) -> tuple[list[Gradients], list[int], list[list[int]], dict[str, Tensor]]:
    """Train; return of each step the gradients after backward, the bytes, the sizes of the buckets; and the end weights."""
    torch.manual_seed(0)
    net = Net(case.width)
    rank = dist.get_rank()
    torch.manual_seed(1 + rank)
    ddp = DistributedDataParallel(net, **case.options)
    buckets: list[list[int]] = []

    def reduce(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buckets[-1].append(bucket.buffer().numel())
        return hook(state, bucket)

    hook: Any = reduce_active if wire is not None else case.inner
    if hook is not None:
        ddp.register_comm_hook(wire, reduce)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    seen, sent = [], []
    for step in range(STEPS):
        masks = masks_of(net, step, case.density)
        if wire is not None and step % 2 == 0:
            wire.set(indices(net, masks))
        before = wire.bytes if wire is not None else 0
        buckets.append([])
        optimizer.zero_grad()
        for i in range(case.accumulate):
            last = i == case.accumulate - 1
            spare = step % 3 != 1 and not (step % 3 == 2 and rank == 1)
            with nullcontext() if last else ddp.no_sync():
                ddp(
                    torch.randn(8, case.width),
                    torch.randn(2, 3, 6, 6),
                    spare or not case.options.get("find_unused_parameters", False),
                ).backward()
        seen.append({n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()})
        sent.append(wire.bytes - before if wire is not None else 0)
        for name, mask in masks.items():
            gradient = net.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0)
        optimizer.step()
    return seen, sent, buckets, {n: p.detach().clone() for n, p in net.named_parameters()}


def compare(case: Case) -> dict[str, Any]:
    plain, _, _, plain_end = run(case, None)
    wire = Wire(inner=(case.inner, None) if case.inner else None)
    ours, sent, buckets, end = run(case, wire)
    torch.manual_seed(0)
    net = Net(case.width)
    wrong, active_bytes = [], []
    size = {n: p.element_size() if case.inner in (None, allreduce_hook) else 2 for n, p in net.named_parameters()}
    for step, (theirs, mine) in enumerate(zip(plain, ours, strict=True)):
        masks = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in net.named_parameters()}
        masks |= masks_of(net, step, case.density)
        active_bytes.append(sum(int(m.sum()) * size[n] for n, m in masks.items()))
        for name, mask in masks.items():
            a, b = theirs[name], mine[name]
            if a is None or b is None:
                wrong += [f"{step} {name}: None"] * (a is not b)
                continue
            wrong += [f"{step} {name}"] * (a.stride() != b.stride() or not torch.equal(a[mask], b[mask]))
            wrong += [f"{step} {name}: not finite"] * (not bool(b.isfinite().all()))
    wrong += [f"weights {n}" for n in end if not torch.equal(end[n], plain_end[n])]
    dense = sum(p.numel() * p.element_size() for p in net.parameters())
    return {
        "wrong": wrong,
        "sent": sent,
        "active": active_bytes,
        "dense": dense,
        "buckets": buckets,
    }


def held_are_local() -> dict[str, Any]:
    """What stands at held entries: this rank's own gradient; and one bucket with nothing to send at all."""
    rank = dist.get_rank()
    data = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    alone = nn.Linear(3, 2)
    ddp = DistributedDataParallel(nn.Linear(3, 2))
    alone.load_state_dict(ddp.module.state_dict())
    alone(data).square().sum().backward()
    wire = Wire()
    ddp.register_comm_hook(wire, reduce_active)
    net: nn.Module = ddp.module
    everything_held = {p: torch.empty(0, dtype=torch.int64) for p in net.parameters()}
    equal = []
    for active in (everything_held, {net.weight: torch.tensor([1, 4]), net.bias: torch.tensor([], dtype=torch.int32)}):
        wire.set(active)
        ddp.zero_grad()
        ddp(data).square().sum().backward()
        mask = torch.ones(2, 3, dtype=torch.bool)
        mask.view(-1)[active[net.weight].long()] = False
        equal.append(torch.equal(net.weight.grad[mask], alone.weight.grad[mask]))
        equal.append(torch.equal(net.bias.grad, alone.bias.grad))
    bytes_before = wire.bytes
    wire.bytes = 0
    return {"equal": equal, "bytes": bytes_before}


def sparse() -> dict[str, Any]:
    """An embedding with sparse gradients goes its own way, beside a partly active tensor."""
    gradients = []
    for wire in (None, Wire()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3))
        ddp = DistributedDataParallel(net)
        if wire is not None:
            ddp.register_comm_hook(wire, reduce_active)
            wire.set({net[1].weight: torch.tensor([0, 7])})
        for _ in range(3):
            net.zero_grad()
            ddp(torch.tensor([1, 2 + dist.get_rank()])).square().sum().backward()
        gradients.append((net[0].weight.grad.to_dense(), net[1].weight.grad.flatten()[[0, 7]], net[1].bias.grad))
    return {"equal": [torch.equal(a, b) for a, b in zip(*gradients, strict=True)]}


def late() -> dict[str, Any]:
    """One Wire moves on to a new wrapper that reduces other tensors, as at a switch of phase."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    wire, equal = Wire(), []
    active = {p: torch.arange(0, p.numel(), 2) for p in net.parameters()}
    wire.set(active)
    for trained in (net[2], net, net[1]):
        net.requires_grad_(False)
        trained.requires_grad_(True)
        data = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
        both = []
        for hook in (None, reduce_active):
            ddp = DistributedDataParallel(net, bucket_cap_mb=0.0001)
            if hook is not None:
                ddp.register_comm_hook(wire, hook)
            for _ in range(3):
                ddp.zero_grad()
                ddp(data).square().sum().backward()
            both.append([p.grad.flatten()[::2].clone() for p in net.parameters() if p.grad is not None])
            net.zero_grad()
            del ddp
        equal += [torch.equal(a, b) for a, b in zip(*both, strict=True)]
    return {"equal": equal}


def one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {name: compare(case) for name, case in CASES.items()}
    results |= {"held": held_are_local(), "sparse": sparse(), "late": late()}
    note(folder / f"rank{dist.get_rank()}.json", results)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw."""
    folder = tmp_path_factory.mktemp("wire")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_active_gradients_equal_those_of_plain_ddp_with_the_same_hook(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["wrong"] == []


@pytest.mark.parametrize("name", CASES)
def test_only_active_entries_are_sent(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["sent"] == rank[name]["active"]


def test_one_percent_costs_one_percent(ranks: list[dict[str, Any]]) -> None:
    seen = ranks[0]["1 %"]
    whole_bias = 200 * 4
    assert max(seen["sent"]) - whole_bias <= 1.02 * 0.01 * seen["dense"]


def test_buckets_were_made_anew_and_are_many(ranks: list[dict[str, Any]]) -> None:
    buckets = ranks[0]["ddp"]["buckets"]
    assert buckets[0] != buckets[1]
    assert buckets[1] == buckets[-1]
    assert len(buckets[1]) > 2
    assert len(ranks[0]["one bucket"]["buckets"][1]) == 2, "one for each dtype"


def test_held_entries_keep_the_gradient_of_their_own_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["held"] == {"equal": [True] * 4, "bytes": 2 * 4}


def test_sparse_gradients_are_reduced_whole(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["sparse"]["equal"] == [True] * 3


def test_a_wire_serves_one_wrapper_after_another(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["late"]["equal"] == [True] * (2 + 6 + 2)


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (allreduce_hook, True),
        (fp16_compress_hook, True),
        (bf16_compress_hook, True),
        (fp16_compress_wrapper(allreduce_hook), True),
        (bf16_compress_wrapper(fp16_compress_wrapper(allreduce_hook)), True),
        (powerSGD_hook, False),
        (batched_powerSGD_hook, False),
        (fp16_compress_wrapper(powerSGD_hook), False),
        (post_localSGD_hook, False),
        (noop_hook, False),
        (lambda state, bucket: allreduce_hook(state, bucket), False),
    ],
)
def test_which_hooks_can_be_given_active_entries_alone(hook: Hook, expected: bool) -> None:
    assert compatible(hook) is expected


def test_other_hooks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'powerSGD_hook' cannot be given the active entries alone"):
        Wire(inner=(powerSGD_hook, None))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.ones(2, 3, dtype=torch.bool), "came as torch.bool"),
        (torch.tensor([[0, 1]]), r"of shape \(1, 2\)"),
        (torch.tensor([0, 6]), "0 to 6 do not fit"),
        (torch.tensor([-1, 2]), "-1 to 2 do not fit"),
    ],
)
def test_bad_indices_are_refused(index: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wire().set({nn.Parameter(torch.zeros(2, 3)): index})


if __name__ == "__main__":
    sys.exit(int(any(run_ranks(2, one_rank, Path(sys.argv[1])))))
