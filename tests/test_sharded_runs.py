"""Whole runs with sharded weights: the same weights, losses, norms, metrics and audits as with whole ones."""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import sharded_cases
from sharded_cases import CASES
from test_sharding import printed

pytestmark = pytest.mark.processes

STRUCTURES = [*sharded_cases.STRUCTURED]


def differences(two_processes: Callable[..., str], names: Sequence[str]) -> dict[str, Any]:
    """Run the cases. Check what holds for all of them, and return what the script has found."""
    found: dict[str, Any] = printed(two_processes("sharded_runs_of_two.py", *names), "FOUND")
    assert found.keys() == set(names)
    for name, each in found.items():
        assert each["difference"] < each["tolerance"], (name, each)
        assert each["moved"] is None or each["moved"] > 20 * each["tolerance"], (name, each)
        assert each["skipped"] == [each["skipped"][1]] * 4, (name, each)
        if CASES[name].arguments.get("audit", True):
            assert each["n_audits"] >= 1
            assert each["references"] == ["one batch"]
            assert each["audits"] < (CASES[name].of_audits or each["tolerance"]), (name, each)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [STRUCTURES[start : start + 5] for start in range(0, len(STRUCTURES), 5)], ids=lambda names: names[0]
)
def test_runs_with_sharded_weights_are_those_with_whole_ones(
    two_processes: Callable[..., str], names: Sequence[str]
) -> None:
    differences(two_processes, names)


@pytest.mark.slow
def test_sizes_and_evaluations_follow_the_settings(two_processes: Callable[..., str]) -> None:
    found = differences(two_processes, [*sharded_cases.PLANNED])
    assert found["batch_size='auto'"]["batch_size"] == 2
    assert found["max_tokens"]["batch_size"] == 4
    assert found["evaluate_every"]["evaluations"] == [1, 2, 3, 4]
    best = found["restore_best_weights"]
    assert best["restored_update"] == best["best_update"] == 2
    assert best["evaluations"] == [2, 4]


@pytest.mark.slow
def test_evaluations_generate_the_same_texts(two_processes: Callable[..., str]) -> None:
    for name, each in differences(two_processes, [*sharded_cases.GENERATING]).items():
        sums = [metrics["sum"] for metrics in each["metrics"]]
        assert len(sums) == 2, name
        assert all(sums), name


@pytest.mark.slow
def test_optimizers_step_the_same_on_shards(two_processes: Callable[..., str]) -> None:
    differences(two_processes, [*sharded_cases.OPTIMIZERS])


@pytest.mark.slow
def test_narrow_precisions_differ_by_rounding_alone(two_processes: Callable[..., str]) -> None:
    differences(two_processes, [*sharded_cases.PRECISIONS])


@pytest.mark.slow
def test_compiled_models_train_the_same(two_processes: Callable[..., str]) -> None:
    differences(two_processes, [*sharded_cases.COMPILED])


@pytest.mark.slow
def test_bfloat16_gradients_are_summed_in_float32(two_processes: Callable[..., str]) -> None:
    """The error is that of `accumulate_in_fp32` on whole weights: of the passes, and of the last rounding."""
    errors = printed(two_processes("sharded_precision_of_two.py"), "ERRORS")
    for name, error in errors.items():
        for sync in ("each", "last"):
            assert error[f"sharded, {sync}"] < 1.1 * error["whole, in float32"], (name, error)
    llama = errors["causal LM, Llama"]  # the error of T5 is that of its passes
    assert max(llama["sharded, each"], llama["sharded, last"]) < 0.9 * llama["whole, in bfloat16"], llama


@pytest.mark.slow
def test_running_out_of_memory_on_one_process_changes_no_update(two_processes: Callable[..., str]) -> None:
    found = printed(two_processes("sharded_memory_of_two.py"), "FOUND")
    assert found.pop("refused") == [0, 2], "memory ran out in both evaluations"
    for said in found.pop("a single row"):
        assert said.startswith("Memory ran out in a micro-batch of a single row. Truncate the rows")
    assert len(found) == 12
    assert max(each["difference"] for each in found.values()) < 1e-12, found
    quiet = ("auto", "in an evaluation")  # no update is run again
    assert all((each["times"] > 0) is (name not in quiet) for name, each in found.items()), found
    assert found["auto"]["batch_size"] == 2
    assert set(found["audited"]["references"]) == {"another cut"}
    assert found["audited"]["audits"] < 1e-12


@pytest.mark.slow
def test_running_out_of_memory_in_a_backward_pass_ends_all_processes_soon(two_processes: Callable[..., str]) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match="Memory ran out in a pass in which gradients are synced or weights are"):
        two_processes("sharded_memory_of_two.py", "synced")
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_faults_of_one_process_stop_or_skip_on_both(two_processes: Callable[..., str]) -> None:
    found = printed(two_processes("sharded_faults_of_two.py"), "FOUND")

    turned = found["turned"]  # two updates of two passes, and then blocks in reverse order
    assert turned["updates"] == 2
    assert turned["off"] == turned["gradients"] == 0
    assert turned["moved"] > 1e-3
    assert turned["errors"][0] == turned["errors"][1]
    wanted = "`sharding` gathers the weights of `blocks.2` once per pass, but a pass has run it twice, or after a block"
    assert turned["errors"][0].startswith(wanted)
    assert turned["errors"][0].endswith("(Process 1 raised this, so all processes stop.)")

    poisoned = found["poisoned"]
    assert poisoned["skipped"] == [2] * 4, "once in each epoch"
    assert max(poisoned["difference"], poisoned["norms"]) < 1e-12
    assert poisoned["errors"][0] == poisoned["errors"][1]
    assert re.search(r"its loss is inf\. Rows .* not finite: row 3 of `train_data` \(inf\)", poisoned["errors"][0])

    assert found["overflow"]["skipped"] == [1] * 4
    assert found["overflow"]["difference"] < 1e-5

    refused, remedy = found["refused"], "Use an optimizer that updates weights element by element, such as 'adamw'"
    assert all(one == other for one, other in refused.values()), "on both processes"
    starts = {
        "Adafactor": "Adafactor cannot step on sharded weights: ",
        "LBFGS": "LBFGS steps with a closure, and such optimizers compute with all weights together. Use an optimizer ",
        "Trusting": "Trusting computes another update on sharded weights than on whole ones. ",
        "OfShards": "OfShards computes another update on sharded weights than on whole ones. ",
        "Chain": "Chain contains other optimizers, so its step cannot be tried. ",
    }
    assert refused.pop("SGD")[0] == "nothing"
    assert refused.keys() == starts.keys()
    for name, start in starts.items():
        assert refused[name][0].startswith(f"The model is sharded, but {start}"), refused[name]
        assert remedy in refused[name][0] or name == "LBFGS"
