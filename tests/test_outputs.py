"""Runs with a full disk or a removed folder: they finish and write all that they can."""

import copy
import json
import pickle
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ftaccum import DataError, OutputWarning, Result, SettingsError, test_fine_tuning
from ftaccum.tracking.ledger import EpochEntry, Ledger, WindowEntry
from heads import HEADS
from interrupted import fine_tuned
from training_passes import is_training_pass

CLASSIFIER = HEADS["sequence classification, BERT"]


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """Cap the size of the files of this process. Writes beyond it are cut off, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def entries() -> list[WindowEntry | EpochEntry]:
    """Return ledger entries of two epochs with three windows each."""
    found: list[WindowEntry | EpochEntry] = []
    for epoch in range(2):
        numbers = range(3 * epoch, 3 * epoch + 3)
        found += [WindowEntry(n, epoch, 4, 1.5, {}, float("inf"), 1e-3, n == 4, passes=2) for n in numbers]
        found.append(EpochEntry(epoch, 1.25))
    return found


def recorded(path: Path, n: int = 8) -> Ledger:
    ledger = Ledger(path)
    for entry in entries()[:n]:
        ledger.record(entry)
    return ledger


def run(folder: Path | None, model: nn.Module | None = None, **arguments: Any) -> Result:
    return test_fine_tuning(
        model if model is not None else CLASSIFIER.model().float(), train_data=CLASSIFIER.rows(24),
        validation_split=0.0, n_epochs=2, batch_size=2, gradient_accumulation_steps=2, progress=False,
        output_dir=None if folder is None else str(folder), **arguments,
    )  # fmt: skip


def test_lines_cut_off_by_a_full_disk_are_written_once_it_has_room(tmp_path: Path) -> None:
    recorded(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    ledger = recorded(tmp_path / "cut", n=2)
    room = len(b"".join(whole.splitlines(keepends=True)[:3])) + 20
    with files_of_at_most(room):
        ledger.record(entries()[2])
        with pytest.warns(OutputWarning) as told:
            ledger.record(entries()[3])
        for entry in entries()[4:7]:
            ledger.record(entry)  # not reported again: a warning would be an error here
    assert str(told[0].message) == (
        f"The ledger '{tmp_path}/cut' cannot be written: [Errno 27] File too large. The run continues. It keeps the "
        "missing lines and writes them as soon as the file can be written again."
    )
    assert (tmp_path / "cut").read_bytes() == whole[: room - 20]  # nothing of the fourth line
    ledger.record(entries()[7])
    assert (tmp_path / "cut").read_bytes() == whole
    assert [*ledger.windows, *ledger.epochs] == sorted(entries(), key=lambda e: isinstance(e, EpochEntry))


def test_a_partial_line_that_could_not_be_removed_is_removed_next_time(tmp_path: Path) -> None:
    recorded(tmp_path / "whole")
    ledger = recorded(tmp_path / "cut", n=7)
    with (tmp_path / "cut").open("a") as file:
        file.write('{"window": 1')
    ledger.record(entries()[7])
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_ledger_whose_folder_was_removed_is_rewritten(tmp_path: Path) -> None:
    recorded(tmp_path / "whole")
    (tmp_path / "runs").mkdir()
    ledger = recorded(tmp_path / "runs" / "x", n=7)
    shutil.rmtree(tmp_path / "runs")
    ledger.record(entries()[7])
    assert (tmp_path / "runs" / "x").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_ledger_that_is_resumed_writes_earlier_entries_first(tmp_path: Path) -> None:
    recorded(tmp_path / "whole")
    again = Ledger(tmp_path / "again")
    again.resume_from(entries()[:6])
    for entry in entries()[6:]:
        again.record(entry)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_ledger_that_cannot_be_created_is_reported_before_training(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(SettingsError, match=r"The ledger cannot be written: .*Is a directory.* Give an `output_dir`"):
        run(tmp_path)


_CHECKPOINTS = ("checkpoints", "checkpoints.previous")


@pytest.mark.usefixtures("capsys")  # otherwise, output would go to a file and be cut off too
@pytest.mark.slow
def test_a_full_disk_loses_neither_the_result_nor_earlier_files(tmp_path: Path) -> None:
    def files(name: str) -> dict[str, bytes]:
        return {str(f): f.read_bytes() for f in sorted(tmp_path.glob(name)) if f.is_file()}

    alone, model = run(None, learning_rate=1e-3), CLASSIFIER.model().float()
    run(tmp_path)
    before = files("model/*") | files("result.json")
    with files_of_at_most(700), pytest.warns(OutputWarning) as told:
        result = run(tmp_path, model, learning_rate=1e-3)
    assert result.loss_history == alone.loss_history
    record, ledger, *outputs = [str(w.message) for w in told]
    assert record.startswith(f"'{tmp_path}/run.json' cannot be written: [Errno 27] File too large. The run continues.")
    assert ledger.startswith(f"The ledger '{tmp_path}/ledger.jsonl' cannot be written: ")
    assert outputs == result.unwritten
    for sentence, (name, remedy) in zip(
        result.unwritten,
        {
            "ledger.jsonl": "The result also has its losses, norms and audits",
            "model": r"The weights take 28.4 kB. The trained model is still in memory: save it",
            "result.json": "The call still returns the result",
        }.items(),
        strict=True,
    ):
        shape = f"{name}' cannot be written: OSError: .* are free there. An earlier version is still there. {remedy}"
        assert re.search(shape, sentence), sentence
    assert files("model/*") | files("result.json") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [*_CHECKPOINTS, "ledger.jsonl", "model", "result.json"]
    assert f"{tmp_path}, except for 3 that could not be written" in str(result)


@pytest.mark.slow
def test_a_model_that_cannot_be_saved_is_still_trained(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("of a model")
        raise RuntimeError("not made to be saved")

    model = CLASSIFIER.model().float()
    model.save_pretrained = fails
    with pytest.warns(OutputWarning, match=r"model' cannot be written: RuntimeError: not made to be saved\."):
        result = run(tmp_path, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "ledger.jsonl", "result.json", "run.json"]
    assert Result.load(tmp_path) == result
    assert len(result.unwritten) == 1


def test_removing_the_working_folder_during_training_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(nn.Linear):
        """Its forward pass removes the folder, once there is a checkpoint in it."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and is_training_pass():
                shutil.rmtree(tmp_path / "cwd", ignore_errors=True)
            return super().forward(x)

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    rows = [(torch.ones(4), n % 3) for n in range(8)]
    result = test_fine_tuning(
        Gone(4, 3), train_data=rows, loss_fn=nn.CrossEntropyLoss(), validation_split=0.0, n_epochs=1,
        output_dir="out", progress=False,
    )  # fmt: skip
    assert result.unwritten == []
    written = {path.name for path in (tmp_path / "cwd" / "out").iterdir()}
    assert {"ledger.jsonl", "result.json", "model"} <= written


def test_an_output_folder_removed_during_training_is_recreated(tmp_path: Path) -> None:
    model, folder = CLASSIFIER.model().float(), tmp_path / "out"
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: shutil.rmtree(folder, ignore_errors=True))
    result = run(folder, model, optimizer=optimizer)
    assert (folder / "model" / "model.safetensors").exists()
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    assert len([line for line in lines if not line.startswith('{"audit"')]) == 14
    assert Result.load(folder) == result
    assert result.unwritten == []


def test_a_newer_result_is_read_and_an_incomplete_one_is_an_error(tmp_path: Path) -> None:
    file, result = tmp_path / "result.json", run(None)
    result.save(file)
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"new": 1}))
    assert Result.load(tmp_path) == result
    for other in (whole[:99], "[1]", "{}", json.dumps(json.loads(whole) | {"metrics": 3})):
        file.write_text(other)
        with pytest.raises(DataError, match=r"result.json' is not a complete result of `test_fine_tuning`"):
            Result.load(tmp_path)


@pytest.fixture(scope="module")
def kept() -> Result:
    return run(None, CLASSIFIER.model().float())


def test_the_model_of_a_result_is_the_trained_one_and_not_one_of_its_numbers(tmp_path: Path, kept: Result) -> None:
    model = CLASSIFIER.model().float()
    result = run(None, model)
    assert result.model is model
    assert "model" not in result
    assert "Bert" not in repr(result)
    assert result.without_model() == result
    result.save(tmp_path / "result.json")
    for other in (Result.load(tmp_path / "result.json"), pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert other == result
        assert other.model is None
    assert kept.model is not model


def test_a_result_saves_its_model_as_a_run_does(tmp_path: Path, kept: Result) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    kept.save_model(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded = type(kept.model).from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in kept.model.state_dict().items())

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "vocab.txt").touch()

    kept.with_model(kept.model, Tokenizer()).save_model(str(tmp_path / "with tokenizer"))
    assert (tmp_path / "with tokenizer" / "vocab.txt").exists()


def test_a_result_without_its_model_names_the_saved_one(tmp_path: Path, kept: Result) -> None:
    with pytest.raises(
        SettingsError, match=r"`save_model` needs the trained model, but `model` is None: .* unpickled\.$"
    ):
        kept.without_model().save_model(tmp_path / "model")
    with pytest.raises(SettingsError, match=r"The run saved its model in 'there/model'\."):
        replace(kept, output_dir="there").save_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_the_model_of_a_result_has_the_best_weights_if_they_were_restored(tmp_path: Path) -> None:
    result = fine_tuned(
        restore_best_weights=True, learning_rate=0.05, output_dir=str(tmp_path), keep_checkpoints=9
    ).result
    assert result.val_loss_history[0] < result.val_loss_history[1]
    first, last = (
        load_file(tmp_path / "checkpoints" / name / "model" / "model.safetensors")["classifier.weight"]
        for name in ("update-00000007-epoch-0001", "update-00000014-epoch-0002")
    )
    assert torch.equal(result.model.classifier.weight, first)
    assert not torch.equal(first, last)


def test_the_banner_says_where_a_run_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    shown = capsys.readouterr().out
    assert (
        f"\nOutputs: {tmp_path}\nTo resume the run if it is interrupted: make the same call with `resume='auto'` "
        "(`--resume auto`)\n" in shown
    )
    run(None)
    shown = capsys.readouterr().out
    assert "\nNothing will be saved: `output_dir` is None.\n" in shown
    assert "Outputs:" not in shown
