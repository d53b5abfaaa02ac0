"""FSDP2: two processes that each hold half of a model train, prune, save and resume as one that holds all of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import clean_environment
from fsdp_nets import PLANS, SAME_AS_DDP

SCRIPT = Path(__file__).with_name("fsdp_cases.py")
CLOSE = 2e-6
"""DDP divides each rank's gradient before it adds them and FSDP2 after (see test_ddp.py); a mask that is wrong by one entry
is off by 1e-2."""
HALF = (0.4, 0.6)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw, in one pair of processes."""
    folder = tmp_path_factory.mktemp("fsdp")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=clean_environment(), capture_output=True, text=True
    )
    files = [folder / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    seen = [json.loads(file.read_text()) for file in files]
    one = folder / "one.json"
    assert one.exists(), done.stderr[-3000:]
    return [rank | {"back to one": json.loads(one.read_text())} for rank in seen]


def case(ranks: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    for rank in ranks:
        assert "error" not in rank[name], rank[name]["error"]
    return [rank[name] for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("plan", [*PLANS, "accumulating"])
def test_compact_and_dense_shards_end_equal_and_hold_every_held_bit(ranks: list[dict[str, Any]], plan: str) -> None:
    for seen in case(ranks, plan):
        assert seen["equal"] == []
        assert seen["same masks"]
        assert seen["checked"] > 0
        assert seen["changed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_each_rank_holds_its_part_of_a_mask_and_no_more(ranks: list[dict[str, Any]], plan: str) -> None:
    assert all(seen["laid out"] for seen in case(ranks, plan))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [*SAME_AS_DDP, "set", "rig", "ramp", "rewind", "behind", "accumulating"])
def test_shards_choose_the_masks_of_ddp_and_learn_the_same(ranks: list[dict[str, Any]], plan: str) -> None:
    for seen in case(ranks, plan):
        assert seen["masks as ddp"]
        assert seen["as ddp"] < CLOSE


@pytest.mark.slow
def test_a_dense_gradient_is_freed_as_soon_as_backward_has_made_it(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "freed"):
        assert seen["partly"] == [[False] * 12] * 2
        assert seen["whole"] == [[True] * 12] * 2


@pytest.mark.slow
def test_scores_that_all_ranks_have_are_ranked_beside_those_that_are_dealt_out(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "ranked"):
        assert seen["wrong"] == []


@pytest.mark.slow
def test_a_criterion_leaves_the_gradients_of_the_step_alone(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "criterion leaves gradients"):
        assert seen == {"batches": 2, "kept": [], "others": []}


@pytest.mark.slow
def test_counts_are_of_the_whole_model(ranks: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert case(ranks, "one entry")[rank]["counts"] == [1]
        assert case(ranks, "ramp")[rank]["counts"][0] == 288 - 173
        assert sum(case(ranks, "ramp")[rank]["zeros"]) == 173
        assert case(ranks, "2:4")[rank]["zeros"] == [72, 72]
        assert sum(case(ranks, "set")[rank]["zeros"]) == 173
        assert sum(case(ranks, "rig")[rank]["zeros"]) == 173


@pytest.mark.slow
def test_optimizer_state_is_that_of_a_ranks_own_active_entries(ranks: list[dict[str, Any]]) -> None:
    """Three weights of 240 entries are held by their active ones; the optimizer's vectors hold up to 15 more."""
    both = case(ranks, "random, drawn anew")
    compact, dense = (sum(seen["states"][i] for seen in both) for i in (0, 1))
    assert compact < 0.45 * dense
    for seen in both:
        assert HALF[0] < seen["states"][1] / dense < HALF[1]


@pytest.mark.slow
@pytest.mark.parametrize("into", ["file", "folder"])
@pytest.mark.parametrize(
    "plan", ["phases", "all together", "random, drawn anew", "rewind", "lottery", "gradient mask", "behind"]
)
def test_a_checkpoint_of_any_step_resumes_to_the_equal_result(
    ranks: list[dict[str, Any]], plan: str, into: str
) -> None:
    for seen in case(ranks, f"{plan}, {into}"):
        assert len(seen) == 3
        assert all(odd == [] for odd in seen.values()), seen


@pytest.mark.slow
@pytest.mark.parametrize("into", ["file", "folder"])
@pytest.mark.parametrize("kind", ["full vectors", "two optimizers", "numbers", "a schedule"])
def test_models_of_other_kinds_resume_to_the_equal_result(ranks: list[dict[str, Any]], kind: str, into: str) -> None:
    for seen in case(ranks, f"resume_others, {into}"):
        assert seen[kind] == []
        assert seen[f"{kind} trained"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("into", ["file", "folder"])
def test_a_checkpoint_after_the_end_or_an_error_brings_everything_back(ranks: list[dict[str, Any]], into: str) -> None:
    for seen in case(ranks, f"after, {into}"):
        assert seen == {"ended": [], "ended at": 6, "failed": [], "failed at": 5}


@pytest.mark.slow
def test_validation_before_and_in_training_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "validated"):
        assert seen["equal"] == []
        assert seen["trained"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("into", ["file", "folder"])
def test_a_checkpoint_is_tested_with_and_without_masks(ranks: list[dict[str, Any]], into: str) -> None:
    for seen in case(ranks, f"tested, {into}"):
        assert seen["same"]
        assert seen["runs"] == 3


@pytest.mark.slow
def test_a_rank_that_does_not_write_a_file_keeps_nothing_whole_for_it(ranks: list[dict[str, Any]]) -> None:
    first, second = case(ranks, "written")
    assert first["numbers"] > 4 * 508
    assert second["numbers"] == 0


@pytest.mark.slow
def test_masks_of_shards_equal_the_same_masks_whole_and_go_into_phases(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "sharded masks"):
        assert seen == {"equal": [True, True, False, False], "saved": True}


@pytest.mark.slow
def test_a_fault_of_a_tensor_that_one_rank_has_no_row_of_is_raised_on_all(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "owned by nobody"):
        assert "scale is to train, and no optimizer holds it" in seen["said"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["magnitude", "phases"])
def test_a_checkpoint_moves_between_replicas_shards_and_engines(ranks: list[dict[str, Any]], plan: str) -> None:
    for seen in case(ranks, f"across, {plan}"):
        assert seen["masks"]
        for way in ("ddp to shards", "shards to ddp", "compact to dense"):
            assert seen[way] < CLOSE


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_ranks_dealt_out_or_not(ranks: list[dict[str, Any]]) -> None:
    seen = case(ranks, "from one")
    assert [set(rank) for rank in seen] == [{"file, shards", "file, whole"}] * 2
    back = ranks[0]["back to one"]
    assert set(back) == {"file, shards", "file, whole", "folder, shards"}
    for distance in (d for found in (*seen, back) for d in found.values()):
        assert distance < CLOSE, (seen, back)


@pytest.mark.slow
def test_clipping_counts_the_active_entries_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "clipped"):
        assert seen["norm"] < CLOSE
        assert seen["value"] < CLOSE


@pytest.mark.slow
def test_the_mask_file_is_whole_and_can_be_used_again(ranks: list[dict[str, Any]]) -> None:
    assert all(seen["same"] == [True, True] for seen in case(ranks, "saved file"))


@pytest.mark.slow
def test_a_plateau_ends_a_phase_and_goes_back_to_the_best_shards(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "plateau"):
        assert seen == {"far": seen["far"], "same history": True, "phases": 2}
        assert seen["far"] < CLOSE


@pytest.mark.slow
def test_units_of_weights_that_lie_the_other_way_round_are_those_of_whole_weights(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "turned"):
        assert seen["wrong"] == []
        assert all(0.1 < density < 0.6 for density in seen["densities"])


@pytest.mark.slow
def test_a_layer_dealt_out_by_columns_is_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "refused"):
        assert seen["columns"].startswith("0.weight has placements")


@pytest.mark.slow
def test_a_plain_loop_holds_compact_and_dense_to_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for seen in case(ranks, "plain loop"):
        assert seen["odd"] == []
        assert seen["runs"] == 10
