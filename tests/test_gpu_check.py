"""`scripts/gpu_check`: its parts on the CPU, and the whole command on two CPU processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from gpu_checks import report
from gpu_checks.__main__ import Part, main, run_parts
from gpu_checks.estimates import estimates_of
from gpu_checks.exactness import accumulated, largest_error, no_float32, one_batch, relative_error, windows_of
from gpu_checks.habit_effects import gpu_columns, memory_effects, time_effects
from gpu_checks.habit_loop import HABITS, LOOPS
from gpu_checks.head_losses import WAYS, measure_head_losses
from gpu_checks.job import EACH, LAST, ONE_COPY, WHOLE, Job, rows_of
from gpu_checks.memory_habits import measure_habits
from gpu_checks.resume import differing_bits
from sharding import needs_sharding

ROOT = Path(__file__).parents[1]


def failing(_: float) -> dict[str, Any]:
    raise ZeroDivisionError("no such number")


def test_a_part_that_fails_is_reported_and_the_others_go_on() -> None:
    shown: list[str] = []
    parts = [
        Part("first", 0.5, failing, str),
        Part("second", 0.5, lambda seconds: {"budget": seconds}, lambda found: f"second took {found['budget']:.0f}"),
    ]
    found = run_parts(parts, 100, shown.append)
    assert found["first"]["failed"] == "ZeroDivisionError: no such number"
    assert "FAILED: ZeroDivisionError: no such number" in shown
    assert 99 < found["second"]["budget"] <= 100, "it gets the time that the first part has left"
    assert "second took 100" in shown


def test_parts_without_time_are_skipped_with_the_remedy() -> None:
    found = run_parts([Part("only", 1.0, failing, str)], 5, lambda _: None)
    assert found["only"]["failed"] == "skipped, because only 5 s are left for it. Raise `--minutes`"


def test_differing_bits_are_counted_over_all_processes(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("other", -1.0)):
        (tmp_path / name).mkdir()
        torch.save({"w": torch.tensor([value, 2.0])}, tmp_path / name / "0.pt")
        torch.save({"w": torch.tensor([[3.0]])}, tmp_path / name / "1.pt")
    assert differing_bits(tmp_path / "one", tmp_path / "other", 2) == 1  # the sign
    assert differing_bits(tmp_path / "one", tmp_path / "one", 2) == 0


def test_errors_are_relative_and_a_missing_gradient_counts_as_zero() -> None:
    wanted = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert relative_error({"a": torch.tensor([3.0])}, wanted) == pytest.approx(0.8)
    assert largest_error([wanted], [wanted, {"a": torch.tensor([1.0])}]) == 0  # one update was skipped
    with pytest.raises(ArithmeticError, match="all updates were skipped"):
        largest_error([], [wanted])


@needs_sharding  # as the script does
def test_the_gradient_of_one_copy_is_that_of_one_batch() -> None:
    rows = rows_of(512, 5, 24, shortest=4)
    windows = windows_of(rows, 1)
    assert [len(window) for window in windows] == [3, 2]
    with no_float32(torch.float64):
        wanted = [one_batch("tiny", window, torch.float64) for window in windows]
        found = accumulated("tiny", rows, torch.float64, {})
    assert largest_error(found, wanted) < 1e-14
    assert largest_error(found, wanted[::-1]) > 0.1
    assert "2.0e-03" in report.exactness({"errors": {"bf16": {ONE_COPY: 0.002}}})


def test_shards_are_estimated_to_take_less_memory_than_whole_copies() -> None:
    found = estimates_of(Job("memory and speed", "", 8, model="mid-size"), autocast=True)
    assert found[EACH] < found[LAST]
    assert found[EACH] < found[WHOLE]


def test_an_effect_is_a_change_beyond_the_spread_of_the_runs() -> None:
    loops = dict.fromkeys(LOOPS, 100.0)
    assert memory_effects(loops | {"del": 99.0, "set_to_none=False": 125.0}) == {
        "del outputs, loss": "no effect",
        "empty_cache()": "no effect",
        "zero_grad(set_to_none=True)": "-20%",
        "pin_memory=True": "no effect",
        "num_workers=2": "no effect",
    }
    times = {loop: [1.0, 2.0, 3.0] for loop in LOOPS}
    found = time_effects(times | {"workers": [4.0, 4.0, 5.0], "del": [2.9, 5.0, 9.0]})
    assert [found[habit] for habit in ("num_workers=2", "del outputs, loss")] == ["+100%", "no effect"]


def test_columns_of_a_gpu_are_filled_by_a_run_on_a_gpu_only(tmp_path: Path) -> None:
    file, seconds = tmp_path / "gpu_check.json", {loop: [1.0] for loop in LOOPS}
    peaks = dict.fromkeys(LOOPS, 100) | {"empty_cache": 50}
    empty = {"peak, GPU": "not measured", "reserved, GPU": "not measured", "time, GPU": "not measured"}
    for part in (None, {"failed": "out of time"}, {"peak": dict.fromkeys(LOOPS), "seconds": seconds}):
        if part is not None:
            file.write_text(json.dumps({"parts": {"memory habits": part}}))
        assert {name: column["empty_cache()"] for name, column in gpu_columns(file).items()} == empty
    on_a_gpu = {"peak": dict.fromkeys(LOOPS, 100), "reserved": peaks, "seconds": seconds}
    file.write_text(json.dumps({"parts": {"memory habits": on_a_gpu}}))
    found = {name: column["empty_cache()"] for name, column in gpu_columns(file).items()}
    assert found == {"peak, GPU": "no effect", "reserved, GPU": "-50%", "time, GPU": "no effect"}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_habits_are_measured_on_a_cpu_without_peaks() -> None:
    found = measure_habits(Job("memory habits", "", 1, seconds=0.0), 0)
    assert {loop: len(seconds) for loop, seconds in found["seconds"].items()} == dict.fromkeys(LOOPS, 1)
    assert report.habits(found).count("not measured") == 2 * len(HABITS)


def test_losses_of_many_labels_are_measured_on_a_cpu_without_peaks_and_without_liger() -> None:
    found = measure_head_losses(Job("head losses", "", 1, seconds=0.0), 0)
    assert list(found["ways"]) == [way for way in WAYS if way != "Liger"]
    for each in found["ways"].values():
        assert all(1e-8 < error < 2e-2 for error in each["errors"].values())
        assert each["peak"] is None
        assert each["seconds"] > 0
    assert "Liger's kernels do not run here" in report.head_losses(found)


def test_a_wrong_limit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--minutes", "0"])
    assert "--minutes must be a positive number, but is 0 instead." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(700)
def test_the_command_runs_on_two_cpu_processes(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run(
        [str(ROOT / "scripts" / "gpu_check"), "--json", str(file), "--minutes", "10"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "No GPU was found." in ended.stdout
    parts = json.loads(file.read_text())["parts"]
    errors = parts["exactness (tiny model)"]["errors"]
    assert max(errors["float64"].values()) < 1e-14
    assert min(parts["memory and speed"]["tokens per second"].values()) > 0
    assert len(parts["memory habits"]["seconds"]) == len(LOOPS)
    for way in (WHOLE, EACH):
        assert parts[f"resume, {way}"]["resumed at update"] > 1
        assert parts[f"resume, {way}"]["differing bits"] == parts[f"resume, {way}"]["differing losses"] == 0
