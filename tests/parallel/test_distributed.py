"""What two gloo processes measured (``worker.py``, one launch for all), asserted check by check."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.family_check import FAMILY_ROWS, packs
from tests.parallel.launched import get, launch
from tools.proofs.parallel import misses_of

STAGES = (0, 1, 2, 3)

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parallel")
    return launch("worker", 2, folder / "out.json", str(folder))


def test_layout(results: dict[str, Any]) -> None:
    found = get(results, "layout")
    assert found["group"], "DeepSpeed reduces over another group than the layout's, with torch's own time-out"
    assert found["timeout_s"] == 77 * 1.25 + 15, "the heartbeat speaks first"
    assert found["any"] == [True, False]
    assert found["broadcast"] == {"rank": 0}
    assert found["gather"] == [0, 1]
    told = ["of 0", "ConfigError field: wrong", "StorageError file: damaged"]
    assert found["decided"] == [[told, [0, 0, 0]], [told, []]]
    assert found["sum"] == 3.0
    assert "parallel.sequence" in found["messages"]["sequence"] and "world size 2" in found["messages"]["sequence"]
    assert "parallel.engine" in found["messages"]["engine"]


def test_no_kernel_is_compiled_at_start(results: dict[str, Any]) -> None:
    assert not get(results, "layout")["compiled"]


@pytest.mark.parametrize("zero", STAGES)
def test_views_are_what_deepspeed_gathers(results: dict[str, Any], zero: int) -> None:
    found = get(results, f"views-{zero}")
    assert found["wrong"] == []
    assert found["covered"], "some element is written by no process, or by two"
    assert found["stable"], "the masters moved: EMA and checkpoints would go on with dead tensors"


@pytest.mark.parametrize("zero", STAGES)
def test_learning_rate_reaches_the_update(results: dict[str, Any], zero: int) -> None:
    found = get(results, f"lr-{zero}")
    assert found["zero"] == 0.0
    assert found["quarter"] < 1e-6


@pytest.mark.parametrize("zero", STAGES)
def test_unused_parameter_has_gradient_zero(results: dict[str, Any], zero: int) -> None:
    found = get(results, f"unused-{zero}")
    assert found["moved"] == 0.0 and found["norm"] < 1e-5


@pytest.mark.parametrize("zero", STAGES)
def test_step_before_all_backwards_is_refused(results: dict[str, Any], zero: int) -> None:
    assert "needs 2 backward calls before it, got 1" in get(results, f"count-{zero}")["message"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", STAGES)
def test_non_finite_gradient_stops_all_before_the_update(results: dict[str, Any], zero: int, precision: str) -> None:
    found = get(results, f"non_finite-{zero}-{precision}")
    assert found["raised"] == [2, 2], "nan, then inf, from process 1 alone must raise on both"
    assert found["unchanged"]
    assert found["applied"] == 3
    # AdamW, so the weights of bf16 runs differ by rounding of gradients near zero
    assert found["after"] < (1e-6 if precision == "fp32" else 1e-3)
    assert found["norms"] < (1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", STAGES)
def test_gradient_above_the_limit_leaves_no_trace(results: dict[str, Any], zero: int, precision: str) -> None:
    found = get(results, f"limit-{zero}-{precision}")
    assert found["unchanged"]
    assert found["norm"] == pytest.approx(1.0, rel=1e-5 if precision == "fp32" else 2e-2)
    assert found["applied"] == 2
    assert found["after"] < (1e-6 if precision == "fp32" else 1e-3)
    assert found["norms"] < (1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize(("zero", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_offloaded_engine_keeps_the_contract(results: dict[str, Any], zero: int, offload: str) -> None:
    name = f"offload-{zero}-{offload}"
    views = get(results, f"{name}-views")
    assert views["wrong"] == [] and views["covered"] and views["stable"]
    unused = get(results, f"{name}-unused")
    assert unused["moved"] == 0.0 and unused["norm"] < 1e-5
    for precision, tolerance in (("fp32", 1e-6), ("bf16", 1e-3)):
        limit, non_finite = (get(results, f"{name}-{check}-{precision}") for check in ("limit", "non_finite"))
        assert limit["unchanged"] and limit["applied"] == 2 and limit["after"] < tolerance
        assert non_finite["unchanged"] and non_finite["raised"] == [2, 2] and non_finite["after"] < tolerance


@pytest.mark.parametrize("zero", STAGES)
def test_ema_is_the_single_process_one(results: dict[str, Any], zero: int) -> None:
    found = get(results, f"ema-{zero}")
    assert found["difference"] < 1e-6
    assert found["inside"] < 1e-5 and found["moved"] > 1e-3
    assert found["restored"]


@pytest.mark.parametrize("zero", STAGES)
def test_bf16_keeps_fp32_masters(results: dict[str, Any], zero: int) -> None:
    found = get(results, f"bf16-{zero}")
    assert found["start"] == 0.0, "masters start from the fp32 weights, not from their rounding"
    assert found["gradient"] < 1e-2
    assert found["rounded"]
    assert found["dtypes"] == ["torch.bfloat16"] and found["buffer"] == "torch.float32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", STAGES)
def test_resume_is_bit_identical(results: dict[str, Any], zero: int, precision: str) -> None:
    found = get(results, f"resume-{zero}-{precision}")
    assert found["norms"]
    assert found["weights"] == found["moments"] == found["ema"] == found["forward"] == 0.0
    assert found["buffer"] == [0.0, 1.0, 2.0]
    assert found["manifest"]["step"] == 4 and found["manifest"]["data"] == {"position": 16}


@pytest.mark.parametrize("route", ["2-3", "3-0", "0-1", "1-2"])
def test_checkpoint_moves_between_stages_and_worlds(results: dict[str, Any], route: str) -> None:
    found = get(results, f"elastic-{route}")
    assert max(found["weights"], found["alone"], found["ema"]) < 1e-6


def test_failed_save_leaves_the_previous_one_whole(results: dict[str, Any]) -> None:
    found = get(results, "disk_full")
    for message in found["messages"]:
        assert "step-00000002" in message and "process 1" in message and "123 bytes" in message
    assert found["latest"] == "step-00000001"
    assert found["left"] == ["step-00000001"]
    assert found["kept"] == ["step-00000004", "step-00000005"]


def test_checkpoint_of_another_model_is_refused(results: dict[str, Any]) -> None:
    message = get(results, "wrong_model")["message"]
    for part in ("missing in the checkpoint: extra", "not in the model: unused", "out.weight (3, 7) instead of (4, 7)"):
        assert part in message


def test_sequence_parallel_equals_whole(results: dict[str, Any]) -> None:
    found = get(results, "sequence")
    assert len(found["differences"]) == 6 * 4 * 3
    assert {name: error for name, error in found["differences"].items() if not error < 1e-5} == {}
    assert found["bf16"] < 0.1
    for counts in found["collectives"]:
        assert (counts["all_to_all"], counts["gather"]) == (2, 1)
    # 8 tokens, 2 heads of 6 on 2 processes: 4 tokens of 1 head leave 4 times (q, k, v, output), nothing padded
    assert found["collectives"][1]["sent"] == 4 * 4 * 6
    assert found["exchanged"]
    assert "parallel.sequence" in found["refused"] and "blocks.0 (TokenBlock)" in found["refused"]


@pytest.mark.parametrize(("zero", "heads"), [(0, 2), (3, 3)])
def test_condition_of_every_token_with_text(results: dict[str, Any], zero: int, heads: int) -> None:
    found = get(results, f"conditioned-{zero}-{heads}")
    assert found["blocks"] == 2
    assert found["gradient"] < 1e-5 and found["output"] < 1e-5


def test_members_of_a_group_encode_their_own_samples_and_train_on_all(results: dict[str, Any]) -> None:
    found = get(results, "encoded")
    own = [[[100 * rank + 10 * micro + row for row in range(3)] for micro in range(2)] for rank in range(2)]
    assert found["frames"] == own
    assert found["captions"] == [[[f"sample {draw}" for draw in batch] for batch in batches] for batches in own]
    both = [own[0][0], own[1][0], own[0][1], own[1][1]]
    assert found["trained"] == [both, both] and found["passes"] == [4, 4]
    assert found["losses"][0] == found["losses"][1]


@pytest.mark.parametrize("case", ["2-0-fp32", "1-2-bf16", "2-3-fp32", "2-3-bf16"])
def test_recomputation_changes_no_bit_of_the_weights(results: dict[str, Any], case: str) -> None:
    found = get(results, f"modes-{case}")
    assert found["moved"] > 1e-3
    assert found["full 1"] == found["selective 1"] == found["selective 2"] == 0.0


@pytest.mark.parametrize("zero", [0, 2])
def test_compiled_blocks_of_a_split_sequence(results: dict[str, Any], zero: int) -> None:
    found = get(results, f"compiled-{zero}")
    assert found["graphs"] == [0, 1]
    assert found["gradient"] < 1e-5


@pytest.mark.parametrize(("degree", "zero"), [(1, 2), (2, 0), (2, 3)])
def test_packed_samples_equal_one_by_one_in_a_plain_process(results: dict[str, Any], degree: int, zero: int) -> None:
    found = get(results, f"packed-{degree}-{zero}")
    figures = {name: figure for name, figure in found.items() if name != "seconds"}
    assert len(figures) == 8
    assert max(figures.values()) < 1e-5, figures


@pytest.mark.parametrize(("zero", "name"), FAMILY_ROWS)
def test_members_of_the_family_equal_the_plain_process(results: dict[str, Any], zero: int, name: str) -> None:
    found = get(results, f"family-{zero}-{name}")
    figures = {key: figure for key, figure in found.items() if key != "seconds"}
    assert len(figures) == (4 if packs(name) else 2)
    assert max(figures.values()) < 1e-5, figures


@pytest.mark.parametrize("row", range(6))
def test_proof_row_equals_the_plain_process(results: dict[str, Any], row: int) -> None:
    assert misses_of(get(results, f"proof-{row}")) == []


def test_same_layout_twice_gives_the_same_bits(results: dict[str, Any]) -> None:
    assert get(results, "proof-4")["identical"] is True


def test_halved_gradients_do_not_pass_the_proof(results: dict[str, Any]) -> None:
    found = get(results, "proof-6")
    assert found["factor"] == 0.5
    assert any(miss.startswith("gradient") for miss in misses_of(found))
    assert found["gradient"] == pytest.approx(0.5, abs=1e-3)


def test_wrong_factor_in_a_seam_does_not_pass_the_proof(results: dict[str, Any]) -> None:
    found = get(results, "proof-7")
    assert found["wrong_seam"]
    assert any(miss.startswith("gradient") for miss in misses_of(found))
    assert found["worst"] == pytest.approx(1.0, abs=1e-3), "the gradient of one attention is doubled"
