"""G5: two processes over gloo stay equal through every phase, reduce only what trains, and agree on every mask."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import clean_environment

SCRIPT = Path(__file__).with_name("ddp_cases.py")
TOTAL, HEAD, BLOCK, STEM = 494, 26, 180, 108
TRAINS = {
    "grow": [HEAD] * 3 + [HEAD + BLOCK] * 3 + [TOTAL] * 6,
    "freeze again": [TOTAL] * 3 + [HEAD] * 2 + [STEM] * 3 + [BLOCK] * 4,
    "head for good": [HEAD] * 12,
    "entries": None,
    "pruned": [HEAD + 2 * BLOCK] * 10 + [HEAD] * 2,
    "rows": [TOTAL] * 12,
    "lottery": None,
    "lisa": [HEAD + BLOCK] * 12,
    "gradient mask": None,
    "thin": None,
    "set": None,
}
EVERY = ("ddp", "bucket view", "static graph", "unused allowed", "accumulating")
CASES = [
    (plan, how)
    for plan in TRAINS
    for how in (EVERY if plan in ("grow", "freeze again", "entries") else ("ddp", "accumulating"))
]
CLOSE = 2e-6
"""Two ranks add the gradients of 8 + 8 examples in another order than one rank those of 16: an error of about 1e-7 in a
gradient of size 1, which SGD with rate 0.1 carries on linearly for 12 steps. 2e-7 was seen; a tensor that misses one
reduction is off by 1e-2."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw, in one pair of processes that Lightning launches."""
    folder = tmp_path_factory.mktemp("ddp")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    files = [folder / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


def case(ranks: list[dict[str, Any]], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (rank[name] for rank in ranks)
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "how"), CASES)
def test_replicas_are_equal_before_at_and_after_every_switch(ranks: list[dict[str, Any]], plan: str, how: str) -> None:
    first, second = case(ranks, f"{plan}, {how}")
    assert first["gap"] == second["gap"] == 0.0
    assert first["moved"] == second["moved"]
    assert first["history"] == second["history"]


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "how"), CASES)
def test_only_what_trains_is_reduced_and_the_users_comm_hook_stays(
    ranks: list[dict[str, Any]], plan: str, how: str
) -> None:
    for seen in case(ranks, f"{plan}, {how}"):
        assert seen["reduced"] == seen["trained"]
        assert len(seen["reduced"]) == 12
        assert TRAINS[plan] is None or seen["trained"] == TRAINS[plan]
        assert min(seen["trained"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "how"), CASES)
def test_two_ranks_of_eight_learn_what_one_of_sixteen_learns(ranks: list[dict[str, Any]], plan: str, how: str) -> None:
    for seen in case(ranks, f"{plan}, {how}"):
        assert seen["from one process"] < CLOSE
        if plan in ("pruned", "rows"):
            assert sum(seen["zeros"]) == (173 if plan == "pruned" else 72)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["entries", "pruned", "rows", "thin", "set"])
@pytest.mark.parametrize("strategy", ["ddp", "bucket view", "static graph", "unused allowed"])
def test_active_entries_alone_go_over_the_wire_and_train_as_dense_ones_do(
    ranks: list[dict[str, Any]], plan: str, strategy: str
) -> None:
    for rank in case(ranks, f"wired, {strategy}"):
        seen = rank[plan]
        assert seen["equal"]
        assert seen["gap"] == 0.0
        if plan == "set":  # what grows back between backward and step must have been reduced: all is
            assert set(seen["bytes"]) == {-1}
            continue
        sent = [(b, 4 * n) for b, n in zip(seen["bytes"], seen["active"], strict=True) if b >= 0]
        assert all(b == expected for b, expected in sent)
        assert sum(b >= 0 for b in seen["bytes"]) >= 6
        assert min(seen["active"]) < TOTAL


@pytest.mark.slow
def test_lightnings_own_finetuning_drifts_in_the_same_harness(ranks: list[dict[str, Any]]) -> None:
    """So the tests above can fail."""
    first, second = case(ranks, "peer")
    assert first["gap at the switch"] == 0.0
    assert first["gap"] == second["gap"] > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("score", ["fisher", "gradient"])
def test_criteria_that_look_at_data_give_all_ranks_one_mask(ranks: list[dict[str, Any]], score: str) -> None:
    first, second = (seen[score] for seen in case(ranks, "data criteria"))
    assert first["seen"] != second["seen"]  # the ranks did look at other data
    assert first["hashes"] == second["hashes"]
    assert len(set(first["hashes"])) == 3
    assert first["count"] == int(0.3 * first["of"] + 0.5)
    assert first["zeros"] == int(0.2 * 144 + 0.5)
    assert first["gap"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["freeze", "phase", "prune", "given"])
def test_masks_that_differ_stop_every_rank_naming_rank_and_tensor(ranks: list[dict[str, Any]], where: str) -> None:
    for seen in case(ranks, "local randomness"):
        assert seen[where].startswith("RuntimeError: ")
        assert "rank 1 holds another mask than rank 0 in stem.weight" in seen[where]
        assert "draw random numbers from context.seed" in seen[where]


@pytest.mark.slow
def test_random_masks_agree_although_the_generators_of_the_ranks_do_not(ranks: list[dict[str, Any]]) -> None:
    first, second = case(ranks, "random masks")
    assert first["generator"] != second["generator"]
    assert first["hashes"] == second["hashes"]
    assert first["zeros"] == second["zeros"] == [72, 72]
    assert first["gap"] == 0.0


@pytest.mark.slow
def test_a_plateau_of_a_metric_that_each_rank_logs_for_itself_ends_the_phase_on_all_at_once(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = case(ranks, "local metric")
    assert first["history"] == second["history"]
    assert [entry["step"] for entry in first["history"]] == [0, 12]  # rank 0 alone: 8; rank 1 alone: never
    assert first["gap"] == 0.0


@pytest.mark.slow
def test_held_and_pruned_entries_are_exact_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "held"):
        assert seen["moved"] == 0
        assert seen["held"] > 200
        assert (seen["not zero"], seen["pruned"]) == (0, 72)
        assert seen["statistics moved"] == []
        assert seen["gap"] == 0.0
