"""Several deltas as one: a union where they are apart, arithmetic of differences where they meet; and what differs."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from odd_states import bits, odd, same, tuned, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mask.core import MaskSet
from lightning_mask.delta import apply, diff, inspect, merge, revert, save_delta


def some(base: dict[str, Tensor], masks: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.where(masks[n], t + torch.randn(t.shape, generator=generator).to(t.dtype), t) for n, t in base.items()
    }


def base_and_masks(overlapping: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    base = {"a": torch.randn(30, 20), "b": torch.randn(17).half(), "c": torch.randn(6, 5), "n": torch.tensor(3)}
    owner = {name: torch.randint(0, 5, tensor.shape) for name, tensor in base.items()}
    owner["c"] = torch.arange(6)[:, None].expand(6, 5)  # rows
    owner["n"] = torch.tensor(4)
    sets = [(0, 3), (1, 3), (2, 3)] if overlapping else [(0,), (1,), (2,)]
    return base, [{n: torch.isin(o, torch.tensor(mine)) for n, o in owner.items()} for mine in sets]


def write_all(folder: Path, overlapping: bool, originals: bool = False) -> tuple[dict[str, Tensor], list, list[Path]]:
    base, masks = base_and_masks(overlapping)
    save_file(base, folder / "base.safetensors")
    results, paths = [], []
    for seed, mine in enumerate(masks):
        results.append(some(base, mine, seed))
        paths.append(folder / f"{seed}.safetensors")
        save_delta(paths[-1], folder / "base.safetensors", results[-1], MaskSet(mine), originals=originals)
    return base, list(zip(masks, results, strict=True)), paths


@pytest.mark.parametrize("how", ["error", "sum", "mean", "ties"])
def test_deltas_that_are_apart_are_united_exactly(how: str, tmp_path: Path):
    base, made, paths = write_all(tmp_path, overlapping=False, originals=True)
    for number, order in enumerate(itertools.permutations(paths)):
        merge(order, tmp_path / "m.safetensors", how=how)
        apply(tmp_path / "base.safetensors", tmp_path / "m.safetensors", tmp_path / "out.safetensors")
        wanted = {name: tensor.clone() for name, tensor in base.items()}
        for masks, result in made:
            for name in base:
                wanted[name][masks[name]] = result[name][masks[name]]
        assert same(load_file(tmp_path / "out.safetensors"), wanted), number
    forms = {row["name"]: row["form"] for row in inspect(tmp_path / "m.safetensors")["tensors"]}
    assert forms == {"a": "entries", "b": "entries", "c": "rows", "n": "none"}
    assert inspect(tmp_path / "m.safetensors")["recipe"]["how"] == "union"
    revert(tmp_path / "out.safetensors", tmp_path / "m.safetensors", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), base)


@pytest.mark.parametrize("originals", [True, False])
@pytest.mark.parametrize("how", ["sum", "mean", "ties"])
def test_entries_in_common_are_combined_as_asked(how: str, originals: bool, tmp_path: Path):
    base, made, paths = write_all(tmp_path, overlapping=True, originals=originals)
    with pytest.raises(ValueError, match=r"a: \d+ entries are active in .*0.safetensors and .*1.safetensors"):
        merge(paths, tmp_path / "m.safetensors")
    if not originals:
        with pytest.raises(ValueError, match="takes the base's values"):
            merge(paths, tmp_path / "m.safetensors", how=how)
    assert not (tmp_path / "m.safetensors").exists()
    merge(
        paths,
        tmp_path / "m.safetensors",
        how=how,
        base=None if originals else tmp_path / "base.safetensors",
        density=0.4,
    )
    apply(tmp_path / "base.safetensors", tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), by_hand(base, made, how))


def by_hand(base: dict[str, Tensor], made: list, how: str) -> dict[str, Tensor]:
    """The same on dense vectors, as the papers have it."""
    names = ["a", "b", "c"]
    flat = torch.cat([base[n].double().view(-1) for n in names])
    masks = torch.stack([torch.cat([m[n].reshape(-1) for n in names]) for m, _ in made])
    apart = torch.stack([torch.cat([r[n].double().view(-1) for n in names]) - flat for _, r in made])
    if how == "ties":
        for task, mask in zip(apart, masks, strict=True):
            keep = math.floor(0.4 * int(mask.sum()) + 0.5)
            smallest = task.abs().argsort(descending=True, stable=True)[keep:]
            task[smallest] = 0
        agree = (apart * apart.sum(0).sign()) > 0
        result = flat + torch.where(agree, apart, 0).sum(0) / agree.sum(0).clamp(min=1)
    else:
        result = flat + apart.sum(0) / (masks.sum(0).clamp(min=1) if how == "mean" else 1)
    sizes = [base[n].numel() for n in names]
    return base | {
        n: part.view(base[n].shape).to(base[n].dtype) for n, part in zip(names, result.split(sizes), strict=True)
    }


def test_ties_leaves_a_head_whole_that_the_base_lacks(tmp_path: Path):
    base = {"w": torch.zeros(4)}
    heads = [torch.tensor([1e-3, 2.0]), torch.tensor([3.0, 1e-3, 4.0])]
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, (changed, head) in enumerate(zip(([8.0, 1, 0, 0], [6.0, 0, -1, 0]), heads, strict=True)):
        save_delta(paths[i], base, {"w": torch.tensor(changed), f"head{i}": head}, originals=True)
    merge(paths, tmp_path / "m.safetensors", how="ties", density=0.5)
    save_file(base, tmp_path / "base.safetensors")
    apply(tmp_path / "base.safetensors", tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    wanted = {"w": torch.tensor([7.0, 0, 0, 0]), "head0": heads[0], "head1": heads[1]}
    assert same(load_file(tmp_path / "out.safetensors"), wanted)


def test_heads_of_one_name_are_merged_only_where_they_are_equal(tmp_path: Path):
    base, changes = {"w": torch.zeros(3)}, torch.eye(3)
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]

    def cannot(heads: list[Tensor], words: str) -> None:
        for path, change, head in zip(paths, changes, heads, strict=True):
            save_delta(path, base, {"w": change, "head": head}, originals=True)
        for how in ("error", "sum", "ties"):
            with pytest.raises(ValueError, match=f"^head, which their base lacks, {words}: give it another name"):
                merge(paths, tmp_path / "m.safetensors", how=how)

    cannot(
        [torch.ones(2), torch.ones(2), torch.ones(2, 4)], r"is F32 \(2,\) in .*0.* and F32 \(2, 4\) in .*2.safetensors"
    )
    cannot(
        [torch.ones(2), torch.ones(2), torch.zeros(2)], r"has other values in .*0.safetensors than in .*2.safetensors"
    )
    save_delta(paths[0], base, {"w": changes[0], "other": torch.ones(2)}, originals=True)
    with pytest.raises(ValueError, match=r"head, which their base lacks, has other values in .*1.* than in .*2"):
        merge(paths, tmp_path / "m.safetensors")
    merge(paths[:2], tmp_path / "m.safetensors")
    save_delta(paths[2], base, {"w": changes[2], "head": torch.ones(2)})
    merge(paths[1:], tmp_path / "m.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    apply(tmp_path / "base.safetensors", tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), {"w": torch.tensor([0.0, 1, 1]), "head": torch.ones(2)})
    save_delta(paths[2], {"w": torch.zeros(3, 1)}, {"w": torch.ones(3, 1)})
    with pytest.raises(ValueError, match=r"not of one base: w is F32 \(3,\) in .* and F32 \(3, 1\) in"):
        merge(paths, tmp_path / "m.safetensors")


def test_deltas_of_other_bases_and_counters_that_differ_are_not_merged(tmp_path: Path):
    base = {"w": torch.zeros(4), "steps": torch.tensor(0)}
    first = {"w": torch.tensor([1.0, 0, 0, 0]), "steps": torch.tensor(5)}
    second = {"w": torch.tensor([0, 0, 0, 1.0]), "steps": torch.tensor(9)}
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    save_delta(paths[0], base, first, originals=True)
    save_delta(paths[1], base, second, originals=True)
    save_delta(paths[2], base, second | {"steps": torch.tensor(5)}, originals=True)
    save_delta(paths[3], base | {"w": torch.ones(4)}, second, originals=True)
    with pytest.raises(ValueError, match=r"steps is torch.int64 and differs"):
        merge(paths[:2], tmp_path / "m.safetensors", how="mean")
    with pytest.raises(ValueError, match=r"not of one base: w differs in those of .*0.safetensors and .*3.safetensors"):
        merge([paths[0], paths[3]], tmp_path / "m.safetensors", how="sum")
    with pytest.raises(ValueError, match="how='mode' is no way"):
        merge(paths[:2], tmp_path / "m.safetensors", how="mode")
    merge([paths[0], paths[2]], tmp_path / "m.safetensors", how="sum")
    save_file(base, tmp_path / "base.safetensors")
    apply(tmp_path / "base.safetensors", tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("form", ["safetensors", "pt", "ckpt", "folder", "shards"])
def test_diff_says_of_each_tensor_how_it_differs(form: str, tmp_path: Path):
    base, after = odd(), tuned(odd())
    del after["body.flags"]
    after["body.more"] = torch.zeros(5)
    after["body.half"] = after["body.half"].float()
    after["body.scalar"] = torch.zeros(2)
    rows = {row.name: row for row in diff(write(base, "ckpt", tmp_path / "a"), write(after, form, tmp_path / "b"))}
    assert {n: r.status for n, r in rows.items() if r.status not in ("changed", "equal")} == {
        "body.flags": "only in a",
        "body.half": "dtype",
        "body.scalar": "shape",
        "body.more": "only in b",
    }
    for name, row in rows.items():
        if row.status in ("changed", "equal"):
            width = base[name].element_size()
            ours, theirs = bits(base[name]), bits(after[name])
            apart = sum(ours[i : i + width] != theirs[i : i + width] for i in range(0, len(ours), width))
            assert row.changed == apart, name
            assert (row.status == "equal") == (apart == 0)
    weight = (after["body.weight"] - base["body.weight"]).double()
    assert rows["body.weight"].norm == pytest.approx(float(weight.norm()))
    assert rows["body.weight"].largest == pytest.approx(float(weight.abs().max()))
    assert rows["body.weight"].entries == 1200
    assert rows["body.brain"].dtype == "bfloat16"
    assert math.isnan(rows["body.odd"].largest)
