"""Results of runs that have not reached their end, and results as data frames."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ftaccum import DataError, Result, SettingsError
from interrupted import CutOff, checkpoints_of, fine_tuned, model


@pytest.fixture(scope="module")
def whole() -> Result:
    return fine_tuned(evaluate_every=4).result


def test_the_result_of_a_killed_run_is_read_from_its_ledger(tmp_path: Path, whole: Result) -> None:
    with pytest.raises(CutOff):
        fine_tuned(cut_off_at=10, evaluate_every=4, output_dir=str(tmp_path), checkpoint_every=2)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"window": 10, "ep')  # a line that was being written
    result = Result.load(tmp_path)
    assert result.interrupted
    n = len(result.loss_history)
    assert 8 <= n <= 10
    for name in ("loss_history", "grad_norm_history", "lr_history"):
        assert result[name] == whole[name][:n]
    assert (result.evaluation_updates, result.val_loss_history) == ([4, 8], whole.val_loss_history[:2])
    assert (result.initial_loss, result.final_loss) == (whole.initial_loss, whole.val_loss_history[1])
    assert (result.effective_batch_size, result.batch_size, result.num_processes) == (8, 2, 1)
    assert f"interrupted           after update {n}" in str(result)
    result.save(tmp_path / "saved.json")
    assert Result.load(tmp_path / "saved.json").loss_history == result.loss_history


@pytest.mark.slow
def test_the_older_result_in_a_folder_is_not_taken_for_that_of_a_killed_run(tmp_path: Path, whole: Result) -> None:
    fine_tuned(output_dir=str(tmp_path), n_epochs=1)
    assert not Result.load(tmp_path).interrupted
    with pytest.raises(CutOff):
        fine_tuned(cut_off_at=9, output_dir=str(tmp_path), checkpoint_every=1)
    assert Result.load(tmp_path).interrupted
    assert len(Result.load(tmp_path).loss_history) > 7
    fine_tuned(output_dir=str(tmp_path), resume="auto")
    assert Result.load(tmp_path).loss_history == whole.loss_history


class CtrlC(TrainerCallback):
    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_a_notebook_ends_the_cell_after_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Result
) -> None:
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    trained, other = model(), model()
    run = fine_tuned(trained, callbacks=[CtrlC()], output_dir=str(tmp_path), restore_best_weights=True)
    result = run.result
    assert result.interrupted
    assert result.loss_history == whole.loss_history[:3]
    assert result.model is trained
    assert checkpoints_of(tmp_path) == ["update-00000003"]
    assert not (tmp_path / "result.json").exists()
    monkeypatch.delattr("sys.ps1")
    with pytest.raises(KeyboardInterrupt):
        fine_tuned(other, callbacks=[CtrlC()])
    assert all(torch.equal(one, two) for one, two in zip(trained.parameters(), other.parameters(), strict=True))
    assert fine_tuned(trained, n_epochs=1).result.optimizer_steps == 7  # the next call works
    resumed = fine_tuned(output_dir=str(tmp_path), resume="auto", restore_best_weights=True).result
    assert (resumed.interrupted, resumed.loss_history) == (False, whole.loss_history)


def test_histories_are_given_as_data_frames(whole: Result) -> None:
    updates, evaluations = whole.to_frame(), whole.to_frame("evaluations")
    assert list(updates.columns) == ["loss", "grad_norm", "learning_rate"]
    assert (list(updates.index), updates.index.name) == (list(range(1, 15)), "update")
    assert list(updates["loss"]) == whole.loss_history
    assert (list(evaluations.index), list(evaluations["val_loss"])) == ([4, 8, 12, 14], whole.val_loss_history)
    with pytest.raises(SettingsError, match="`kind` must be 'updates' or 'evaluations', but is 'epochs' instead"):
        whole.to_frame("epochs")


def test_a_result_is_a_table_in_a_notebook(whole: Result) -> None:
    from dataclasses import replace

    table = replace(whole, output_dir="<here>")._repr_html_()
    assert table.startswith("<table><tr>")
    assert "&lt;here&gt;" in table
    assert "<here>" not in table
    assert all(line.split("  ")[0] in table for line in str(whole).splitlines())


def test_the_result_of_a_run_before_its_first_update_is_not_that_of_an_older_one(tmp_path: Path) -> None:
    fine_tuned(output_dir=str(tmp_path), n_epochs=1)
    with pytest.raises(CutOff):
        fine_tuned(cut_off_at=0, output_dir=str(tmp_path), learning_rate=5e-3)
    with pytest.raises(DataError, match="has not completed an update yet"):
        Result.load(tmp_path)
