"""The output folder that `ftaccum train` chooses, and the record of a run in it."""

import json
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftaccum import OutputWarning, SettingsError
from ftaccum.apps.output_folder import default_name, output_folder
from ftaccum.apps.typed_command import resume_command
from ftaccum.arguments import parse_settings
from ftaccum.checkpoint.compatibility import recipe_identity
from ftaccum.planning.batch_size import batch_sizes_of
from ftaccum.runtime.run_dir import RunDir
from ftaccum.settings.runtime import Runtime
from ftaccum.tasks.arguments import TrainArguments
from ftaccum.tracking.run_record import RunRecord
from interrupted import CutOff, fine_tuned
from run_records import new_record

NAMED = TrainArguments(model="org/tiny-bert", train_data="data/rows.csv")
TODAY = date.today().isoformat()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def chosen(named: TrainArguments = NAMED, *, fills: bool = True, **settings: Any) -> tuple[str, str]:
    """Return the folder that a run with these settings gets, and the note on it. If it `fills` it, it writes a file."""
    recipe, runtime = parse_settings({"output_dir": "outputs"} | settings)
    runtime = runtime if "output_dir" in settings else replace(runtime, output_dir=None)
    with output_folder(named, None, recipe, runtime, ["--x"]) as (folder, command):
        if fills:
            Path(folder, "ledger.jsonl").touch()
    return folder, command.note


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("bert-base-uncased", "train.csv", "bert-base-uncased-train"),
        ("meta-llama/Llama-3.2-1B", "nyu-mll/glue:sst2", "Llama-3.2-1B-glue-sst2"),
        ("my models/ä b/", "../rows v2.jsonl", "b-rows-v2"),
        ("m" * 99, "..///", "m" * 60 + "-unnamed"),
    ],
)
def test_the_name_of_a_folder_is_safe_for_any_file_system(
    model: str, data: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")  # where ".." has no name
    assert default_name(model, data) == f"{name}-{TODAY}"


def test_each_new_run_gets_a_folder_of_its_own() -> None:
    name = f"outputs/tiny-bert-rows-{TODAY}"
    assert [chosen()[0] for _ in range(3)] == [name, f"{name}-2", f"{name}-3"]
    assert chosen(output_dir="mine", fills=False) == ("mine", "")


def test_a_run_that_writes_nothing_leaves_no_folder() -> None:
    folder, _ = chosen(fills=False)
    assert not Path(folder).exists()
    Path("mine").mkdir()
    chosen(fills=False, output_dir="mine")
    assert Path("mine").exists()  # the user made it


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    Path("outputs").touch()
    with pytest.raises(
        SettingsError, match=r"'outputs/tiny-bert-.*' cannot be created: .* Give another `--output_dir`"
    ):
        chosen()


def recorded(name: str, day: int, named: TrainArguments = NAMED, *, finished: bool = False, **settings: Any) -> str:
    """Write the record of a run of some day on a single process. Return its folder."""
    recipe, runtime = parse_settings(settings)
    assert isinstance(runtime.batch_size, int)
    record = new_record(
        batch_sizes_of(recipe, runtime.batch_size, 1, 10.0),
        recipe=recipe_identity(recipe),
        tokens_per_update=recipe.tokens_per_update,
        sources=vars(named),
        started_at=f"2026-11-{day:02d}T12:00:00.5+00:00",
        finished=finished,
    )
    assert record.write(Path("outputs", name, "run.json"))
    return f"outputs/{name}"


def test_auto_resumes_the_newest_unfinished_run_with_the_same_settings() -> None:
    recorded("a", 1, text_columns=["x", "y"])
    newest = recorded("b", 3, text_columns=["x", "y"])
    recorded("c", 2, text_columns=["x", "y"])
    recorded("finished", 4, text_columns=["x", "y"], finished=True)
    recorded("other recipe", 5, text_columns=["x", "y"], learning_rate=1.0)
    recorded("other model", 6, replace(NAMED, model="other"), text_columns=["x", "y"])
    recorded("other size", 7, text_columns=["x", "y"], batch_size=8)
    Path(recorded("broken", 8), "run.json").write_text("{}")
    assert chosen(resume="auto", text_columns=("x", "y")) == (
        newest,
        "Resuming the newest unfinished run with these settings: outputs/b, of 2026-11-03 12:00:00 UTC.",
    )
    folder, note = chosen(text_columns=("x", "y"))  # without `--resume auto`
    assert folder.startswith("outputs/tiny-bert-rows-")
    assert note == ""


def test_auto_starts_a_new_run_and_says_so_if_there_is_none_to_resume() -> None:
    recorded("finished", 4, finished=True)
    folder, note = chosen(resume="auto")
    assert folder == f"outputs/tiny-bert-rows-{TODAY}"
    assert note == (
        "There is no unfinished run with these settings in 'outputs'. Starting a new one in "
        f"'outputs/tiny-bert-rows-{TODAY}'."
    )


def test_auto_leaves_a_run_alone_that_another_process_is_running() -> None:
    older, running = recorded("older", 1), recorded("running", 2)
    with RunDir(Path(running).absolute()).lock():
        assert chosen(resume="auto")[0] == older
    assert chosen(resume="auto")[0] == running


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        ({"batch_size": 2, "effective_batch_size": 8}, {"batch_size": "auto", "effective_batch_size": 8}, True),
        ({"batch_size": 2, "effective_batch_size": 8}, {"batch_size": 4, "gradient_accumulation_steps": 2}, True),
        ({"batch_size": 2, "effective_batch_size": 8}, {"batch_size": 2, "effective_batch_size": 9}, False),
        ({"tokens_per_update": 500}, {"batch_size": 2, "tokens_per_update": 500}, True),
        ({"tokens_per_update": 500}, {"tokens_per_update": 400}, False),
        ({"tokens_per_update": 40}, {"batch_size": 4}, False),
        ({"gradient_accumulation_steps": "0:2,9:4"}, {"gradient_accumulation_steps": [[0, 2], [9, 4]]}, True),
        ({"gradient_accumulation_steps": "0:2,9:4"}, {"gradient_accumulation_steps": "0:2,9:8"}, False),
        ({"gradient_accumulation_steps": "0:2,9:4"}, {"gradient_accumulation_steps": 2}, False),
        ({"n_epochs": 2}, {"n_epochs": 3, "allow_changed": ["n_epochs"]}, True),
        ({"n_epochs": 2}, {"n_epochs": 3, "batch_size": 3, "allow_changed": ["n_epochs"]}, False),
        ({}, {"batch_size": 3, "allow_changed": ["effective_batch_size"]}, True),
        ({}, {"num_workers": 2, "use_amp": True, "keep_checkpoints": 0}, True),
    ],
)
def test_runs_are_the_same_if_their_recipe_and_the_size_of_their_updates_are(
    was: dict[str, Any], now: dict[str, Any], same: bool
) -> None:
    unfinished = recorded("unfinished", 1, **was)
    assert (chosen(resume="auto", **now)[0] == unfinished) == same


@pytest.mark.parametrize(
    ("argv", "parent", "shown"),
    [
        (["/bin/ftaccum"], ["bash", "job.sh", "--config", "my run.yaml", "--seed", "1"], "ftaccum"),
        (["/lib/ftaccum/__main__.py"], ["bash"], "python -m ftaccum"),
        (["/lib/ftaccum/__main__.py"], ["/bin/python3", "/bin/accelerate", "launch", "-m", "ftaccum", "ALL"],
         "accelerate launch -m ftaccum"),
        (["/bin/ftaccum"], ["/bin/uv", "run", "ftaccum", "ALL"], "uv run ftaccum"),
        (["/lib/ftaccum/__main__.py"], ["/bin/python3", "-m", "torch.distributed.run", "-m", "ftaccum", "ALL"],
         "python -m torch.distributed.run -m ftaccum"),
        (["/bin/ftaccum"], ["/usr/bin/timeout", "14", "ftaccum", "ALL"], "ftaccum"),
        (["/bin/ftaccum"], ["/bin/python3", "wrapper.py", "ftaccum", "ALL"], "ftaccum"),
        (["pytest"], None, "ftaccum"),
    ],
)  # fmt: skip
def test_the_command_that_resumes_is_the_one_typed(
    argv: list[str], parent: list[str] | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parent:
        def cmdline(self) -> list[str]:
            assert parent is not None
            return [*parent[:-1], "train", *words] if parent[-1] == "ALL" else parent

    words = ["--model", "my model", "--lr=1"]
    monkeypatch.setattr(psutil.Process, "parent", lambda _: Parent())
    monkeypatch.setattr(sys, "argv", [*argv, *([] if parent is None else ["train", *words])])
    typed = f"{shown} train --model 'my model' --lr=1"
    assert resume_command(words, Runtime(), "outputs/a") == f"{typed} --resume auto --output_dir outputs/a"
    assert resume_command(words, Runtime(output_dir="b", resume="auto"), "b") == typed


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_a_run_records_what_it_is_and_whether_it_has_finished(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path), "checkpoint_every": 1, "mixed_precision": "bf16", "max_updates": 3, "audit": False,
    }  # fmt: skip
    with pytest.raises(CutOff):
        fine_tuned(cut_off_at=2, **arguments)
    cut = record_of(tmp_path)
    assert not cut["finished"]
    assert cut["recipe"]["learning_rate"] == 1e-3
    sizes = {"batch_size": 2, "gradient_accumulation_steps": 4, "effective_batch_size": 8, "num_processes": 1}
    assert {name: cut[name] for name in sizes} == sizes
    assert (cut["amp_enabled"], cut["accumulation_schedule"], cut["sources"]) == (True, None, {})
    fine_tuned(resume="auto", **arguments)
    ended = record_of(tmp_path)
    assert ended["started_at"] > cut["started_at"]
    assert ended == cut | {"finished": True, "started_at": ended["started_at"]}


def test_a_run_whose_model_cannot_be_written_has_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path), "checkpoint_every": 1, "max_updates": 2, "audit": False,
    }  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr("ftaccum.tracking.export.save_model", full)
        with pytest.warns(OutputWarning, match="model' cannot be written"):
            fine_tuned(**arguments)
    assert not record_of(tmp_path)["finished"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # nothing is removed before the model is saved
    fine_tuned(resume="auto", **arguments)
    assert record_of(tmp_path)["finished"]
    assert (tmp_path / "model").exists()


def test_a_record_that_cannot_be_written_does_not_leave_that_of_an_older_run(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(recorded("a", 1, finished=True), "run.json")
    record = RunRecord.read(path)
    assert record is not None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.warns(OutputWarning, match=r"run.json' cannot be written: .*No space left on device"):
            assert not replace(record, finished=False).write(path)
    assert not path.exists()
