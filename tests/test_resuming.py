"""Interrupted runs that resume end as if they had never stopped, bit for bit."""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from datasets import IterableDataset as StreamingDataset
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback

from ftaccum import CheckpointError, DataError, DivergedError, SettingsError
from ftaccum.arguments import parse_settings
from ftaccum.checkpoint.compatibility import check, config_identity, function_options
from ftaccum.checkpoint.manifest import seal
from ftaccum.planning.shuffle import hold_out, order_of
from heads import relative_error
from interrupted import (
    CLASSIFIER,
    CutOff,
    checkpoints_of,
    elastic,
    fine_tuned,
    ledger_of,
    model,
    uninterrupted,
    without_audits,
)
from training_passes import is_training_pass


@pytest.mark.slow
def test_a_run_resumes_from_any_update(tmp_path: Path) -> None:
    whole = fine_tuned(output_dir=str(tmp_path / "whole"), checkpoint_every=1, keep_checkpoints=100, planner_costs=None)
    names = checkpoints_of(tmp_path / "whole")
    assert len(names) == 16  # one per update, and one per epoch
    for name in names:
        there = str(tmp_path / "whole" / "checkpoints" / name)
        again = fine_tuned(output_dir=str(tmp_path / "again"), resume=there, planner_costs=None)
        assert whole.differences(again) == [], name
        assert ledger_of(tmp_path / "again") == ledger_of(tmp_path / "whole"), name


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers": {"num_workers": 2},
    "in the order of arrival": {"planner": False},
    "fp16, scaled": {"mixed_precision": "fp16"},
    "early stopping, best weights": {"early_stopping_patience": 1, "restore_best_weights": True, "n_epochs": 4},
    "carried": {"remainder": "carry", "effective_batch_size": 7},
    "growing": {"gradient_accumulation_steps": "0:2,4:4,9:6", "effective_batch_size": None},
    "growing with the rate": {
        "gradient_accumulation_steps": "0:2,4:4", "effective_batch_size": None, "learning_rate_scaling": "sqrt",
    },
    "capped": {"max_updates": 11, "n_epochs": 9},
    "by tokens": {"max_tokens": 24},
    "by the longest row": {"max_tokens": "auto"},
    "another optimizer": {"optimizer": lambda groups: torch.optim.SGD(groups, momentum=0.9)},
    "without validation": {"validation_split": 0.0},
    "balanced draws": {"sampler": "balanced", "label_smoothing": 0.1},
    "balanced weights": {"class_weights": "balanced", "remainder": "carry"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_cut_off_in_the_middle_of_an_update_resumes(name: str, tmp_path: Path) -> None:
    arguments = {"checkpoint_every": 2} | SETTINGS[name]
    whole = fine_tuned(output_dir=str(tmp_path / "whole"), **arguments)
    for window in (1, 8):  # before the first checkpoint, in the second epoch
        with pytest.raises(CutOff):
            fine_tuned(cut_off_at=window, output_dir=str(tmp_path / "cut"), **arguments, resume="auto")
    again = fine_tuned(output_dir=str(tmp_path / "cut"), **arguments, resume="auto")
    assert whole.differences(again) == []
    assert ledger_of(tmp_path / "cut") == ledger_of(tmp_path / "whole")


@pytest.mark.slow
def test_moments_of_another_type_than_16_bit_weights_are_restored(tmp_path: Path) -> None:
    """`load_state_dict` would cast the moments to the weights' type."""

    class InFloat32(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["sum"] = state.get("sum", torch.zeros(p.shape)) + p.grad.float() / 3
                    p.data -= (group["lr"] * state["sum"]).to(p.dtype)

    def run(where: str, **more: Any) -> Any:
        trained = model().to(torch.bfloat16)
        return fine_tuned(
            trained, optimizer=InFloat32, accumulate_in_fp32=True, output_dir=str(tmp_path / where), **more
        )

    whole = run("whole", checkpoint_every=3, keep_checkpoints=9)
    for name in checkpoints_of(tmp_path / "whole")[:3]:
        again = run("again", resume=str(tmp_path / "whole" / "checkpoints" / name))
        assert whole.differences(again) == []


@pytest.mark.slow
def test_adapters_are_saved_without_the_base_weights(tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["query"], lora_dropout=0.1))

    whole = fine_tuned(
        adapted(), output_dir=str(tmp_path), checkpoint_every=5, keep_checkpoints=9, restore_best_weights=True
    )
    there = tmp_path / "checkpoints" / "update-00000010"
    again = fine_tuned(adapted(), resume=str(there), restore_best_weights=True)
    assert whole.differences(again) == []
    for file in ("model/model.safetensors", "best.safetensors"):
        assert (there / file).stat().st_size < 0.2 * sum(p.numel() * 4 for p in adapted().parameters())
    other = adapted()
    with torch.no_grad():
        other.base_model.model.bert.embeddings.word_embeddings.weight[0] += 1
    with pytest.raises(CheckpointError, match="`model` was"):
        fine_tuned(other, resume=str(there), restore_best_weights=True)


@pytest.mark.slow
def test_best_weights_of_a_model_with_noncontiguous_weights_are_saved(tmp_path: Path) -> None:
    """A weight that is the view of a transpose cannot be written as it is."""

    def transposed() -> nn.Module:
        made: Any = model()
        made.classifier.weight = nn.Parameter(made.classifier.weight.detach().t().contiguous().t())
        assert not made.classifier.weight.is_contiguous()
        return made

    arguments: dict[str, Any] = {"restore_best_weights": True, "learning_rate": 0.05, "n_epochs": 3}
    whole = fine_tuned(transposed(), output_dir=str(tmp_path), checkpoint_every=4, keep_checkpoints=9, **arguments)
    names = checkpoints_of(tmp_path)
    assert len(names) == 5 + 3
    again = fine_tuned(transposed(), resume=str(tmp_path / "checkpoints" / names[-3]), **arguments)
    assert whole.differences(again) == []
    best = whole.result.val_loss_history.index(min(whole.result.val_loss_history))
    assert best == 0  # not the last epoch
    at_its_end = load_file(tmp_path / "checkpoints" / "update-00000007-epoch-0001" / "model" / "model.safetensors")
    assert torch.equal(whole.weights["classifier.weight"], at_its_end["classifier.weight"])


class Centres(nn.Module):
    """A loss with a trained weight and a running mean that affects it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, outputs: Any, batch: Any) -> torch.Tensor:
        logits = outputs.logits * self.scale
        if is_training_pass():
            self.mean += 0.1 * logits.detach().mean(0)
        return nn.functional.cross_entropy(logits + self.mean, batch["labels"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ftaccum.InexactLossWarning")
def test_weights_and_buffers_outside_the_model_are_restored(tmp_path: Path) -> None:
    def run(**more: Any) -> tuple[Any, list[torch.Tensor]]:
        trained, loss_fn, lone = model(), Centres(), nn.Parameter(torch.ones(2))
        lone.register_post_accumulate_grad_hook(lambda _: None)
        trained.register_forward_pre_hook(lambda *_: setattr(lone, "grad", torch.ones(2)))
        optimizer = torch.optim.AdamW([*trained.parameters(), *loss_fn.parameters(), lone], lr=1e-3)
        ended = fine_tuned(trained, loss_fn=loss_fn, optimizer=optimizer, on_inexact="ignore", **more)
        return ended, [loss_fn.scale, loss_fn.mean, lone]

    whole, beside = run(output_dir=str(tmp_path), checkpoint_every=4, keep_checkpoints=9)
    assert all(len(t.unique()) > 1 or t.unique().item() not in (0.0, 1.0) for t in beside)  # they did change
    for name in ("update-00000004", "update-00000012"):
        again, same = run(resume=str(tmp_path / "checkpoints" / name))
        assert whole.differences(again) == []
        assert all(map(torch.equal, beside, same))


class Fading(nn.Module):
    """A layer whose output depends on a number that is not a buffer."""

    def __init__(self, other: Any = None) -> None:
        super().__init__()
        self.n, self.other = 0, other

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        self.n += is_training_pass()
        return logits * (1 + 1 / (1 + self.n))

    def get_extra_state(self) -> Any:
        return torch.tensor(self.n) if self.other is None else {"n": self.n, "other": self.other}

    def set_extra_state(self, state: Any) -> None:
        self.n = int(state)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ftaccum.errors.OutputWarning")  # `save_pretrained` cannot save a path either
def test_extra_state_of_a_module_is_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(other: Any = None, **more: Any) -> Any:
        trained: Any = model()
        trained.classifier = nn.Sequential(trained.classifier, Fading(other))
        return fine_tuned(trained, on_inexact="ignore", **more)

    whole = run(output_dir=str(tmp_path), checkpoint_every=4, keep_checkpoints=9)
    again = run(resume=str(tmp_path / "checkpoints" / "update-00000012"))
    assert whole.result.loss_history == again.result.loss_history
    run(other=tmp_path, output_dir=str(tmp_path / "other"), checkpoint_every=4)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("extra state of `model.classifier.1` is not saved in checkpoints: it contains a PosixPath") == 1


@pytest.mark.slow
def test_a_stream_is_read_again_up_to_its_last_position(tmp_path: Path) -> None:
    rows = CLASSIFIER.rows(54)

    def run(where: str, cut_off_at: int | None = None) -> Any:
        stream = StreamingDataset.from_generator(lambda: iter(rows)).shuffle(seed=3, buffer_size=20)
        return fine_tuned(
            train_data=stream, validation_split=0.0, max_updates=14, checkpoint_every=3, cut_off_at=cut_off_at,
            output_dir=str(tmp_path / where), resume="auto",
        )  # fmt: skip

    whole = run("whole")
    for window in (5, 9):
        with pytest.raises(CutOff):
            run("cut", window)
    assert whole.differences(run("cut")) == []


@pytest.mark.slow
@pytest.mark.parametrize("remainder", ["flush", "carry"])
@pytest.mark.parametrize("streams", [False, True])
def test_more_updates_continue_within_the_epoch_that_was_cut(streams: bool, remainder: str, tmp_path: Path) -> None:
    rows = CLASSIFIER.rows(54)
    train_data: Any = StreamingDataset.from_generator(lambda: iter(rows)) if streams else rows

    def run(max_updates: int, **more: Any) -> Any:
        return fine_tuned(
            train_data=train_data, val_data=CLASSIFIER.rows(6), max_updates=max_updates, lr_scheduler="constant",
            warmup_steps=0, remainder=remainder, **more,
        )  # fmt: skip

    whole = run(13, output_dir=str(tmp_path / "whole"))
    for n in (4, 7, 10, 13):  # the first two in the first epoch, which "flush" ends with the seventh
        again = run(n, output_dir=str(tmp_path / "cut"), resume="auto", allow_changed=["max_updates"])
    assert whole.differences(again) == []  # runs of fewer than 16 updates plan the same audit
    assert without_audits(ledger_of(tmp_path / "cut")) == without_audits(ledger_of(tmp_path / "whole"))


@pytest.mark.slow
def test_a_finished_run_trains_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = fine_tuned(output_dir=str(tmp_path))
    trained = model()
    trained.register_forward_pre_hook(_refuse_to_train)
    assert whole.differences(fine_tuned(trained, output_dir=str(tmp_path), resume="auto")) == []
    assert "This run already ended with update 14" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stream_in_updates_of_another_size_is_refused(tmp_path: Path) -> None:
    stream = StreamingDataset.from_generator(lambda: iter(CLASSIFIER.rows(54)))
    common: dict[str, Any] = {"train_data": stream, "validation_split": 0.0, "max_updates": 5}
    fine_tuned(**common, output_dir=str(tmp_path))
    with pytest.raises(CheckpointError, match="On a stream, the size of an update cannot change"):
        fine_tuned(**common, resume=str(tmp_path), effective_batch_size=4, allow_changed=["effective_batch_size"])


@pytest.mark.slow
def test_the_report_of_rows_and_versions_is_correct(
    cut_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(cut_off, tmp_path / "other"))
    state = (other / "state.json").read_text()
    (other / "state.json").write_text(state.replace(f'"torch": "{torch.__version__}"', '"torch": "2.6.0"'))
    seal(other)
    capsys.readouterr()
    fine_tuned(resume=str(other))
    told = capsys.readouterr().err
    assert "24 rows are done, and no row is skipped or repeated." in told
    assert f"Changed versions: torch {torch.__version__} (was 2.6.0). Numbers may differ" in told
    fine_tuned(resume=str(cut_off), random_seed=1, allow_changed=["random_seed", "train_data", "val_data"])
    told = capsys.readouterr().err
    assert "24 rows are done. Changes allowed by `allow_changed`: random_seed" in told
    assert "skipped or repeated" not in told
    assert "Changed versions" not in told


def _refuse_to_train(module: nn.Module, *_: Any) -> None:
    assert not (is_training_pass() and module.training)


@pytest.mark.slow
def test_auto_starts_a_new_run_if_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert uninterrupted().differences(fine_tuned(output_dir=str(tmp_path), resume="auto")) == []


@pytest.mark.slow
def test_a_new_run_moves_the_checkpoints_of_another_run_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, Any] = {"output_dir": str(tmp_path), "keep_checkpoints": 9}
    fine_tuned(n_epochs=3, **arguments)
    before = checkpoints_of(tmp_path)
    whole = fine_tuned(**arguments)
    aside = tmp_path / "checkpoints.previous"
    assert f"Moved checkpoints of an earlier run to {aside}." in capsys.readouterr().err
    assert sorted(path.name for path in aside.iterdir()) == before
    assert whole.differences(fine_tuned(resume="auto", **arguments)) == []
    named = tmp_path / "checkpoints" / "update-00000007-epoch-0001"
    fine_tuned(resume=str(named), max_updates=10, allow_changed=["max_updates"], **arguments)
    assert checkpoints_of(tmp_path)[-1].startswith("update-00000010-epoch")  # not that of an abandoned run


# The argument that differs, and how the message shows it.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "learning_rate": ({"learning_rate": 2e-3}, "`learning_rate` was 0.001, but is 0.002"),
    "n_epochs": ({"n_epochs": 3}, "`n_epochs` was 2, but is 3"),
    "random_seed": ({"random_seed": 1}, "`random_seed` was 42, but is 1"),
    "effective_batch_size": ({"effective_batch_size": 6}, "`effective_batch_size` was 8, but is 6"),
    "gradient_clip_norm": ({"gradient_clip_norm": None}, "`gradient_clip_norm` was 1.0, but is None"),
    "optimizer": (
        {"optimizer": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.99))}, r"`optimizer` was 'AdamW\(.*0\.999",
    ),
    "loss_fn": ({"loss_fn": lambda outputs, _: outputs.logits.square().mean()}, "`loss_fn` was None, but is '.*lambda"),
}  # fmt: skip


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint after three updates."""
    folder = tmp_path_factory.mktemp("cut_off")
    fine_tuned(output_dir=str(folder), checkpoint_every=3, keep_checkpoints=9)
    return folder / "checkpoints" / "update-00000003"


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_unless_the_change_is_allowed(name: str, cut_off: Path) -> None:
    arguments, shown = OTHERS[name]
    with pytest.raises(CheckpointError, match=shown) as refused:
        fine_tuned(resume=str(cut_off), **arguments)
    assert f"allow_changed=['{name}']" in str(refused.value)
    assert ("set `effective_batch_size=8`" in str(refused.value)) == (name == "effective_batch_size")
    follows = ["train_data", "val_data"] if name == "random_seed" else []  # other rows are held out
    ended = fine_tuned(resume=str(cut_off), allow_changed=[name, *follows], **arguments)
    assert len(ended.result.loss_history) == {"n_epochs": 21, "effective_batch_size": 3 + 5 + 9}.get(name, 14)


@pytest.mark.slow
def test_other_data_are_refused_however_similar(cut_off: Path) -> None:
    rows = CLASSIFIER.rows(60)
    others = {
        "fewer rows": rows[:50],
        "other labels": [row | {"labels": (row["labels"] + 1) % 3} for row in rows],
        "another seed": CLASSIFIER.rows(60, seed=8),
    }
    for what, data in others.items():
        with pytest.raises(CheckpointError, match=r"`train_data` was '54 rows \(\w+\)', but is '\d+ rows"):
            fine_tuned(train_data=data, resume=str(cut_off))
        assert fine_tuned(train_data=data, resume=str(cut_off), allow_changed=["train_data", "val_data"]), what
    assert fine_tuned(train_data=Dataset.from_list([_plain(row) for row in rows]), n_epochs=2)


def _plain(row: Any) -> Any:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in row.items()}


@pytest.mark.slow
def test_another_model_is_refused_or_if_allowed_gets_the_weights_that_fit(cut_off: Path) -> None:
    trained = model()
    trained.classifier = nn.Linear(trained.classifier.in_features, trained.config.num_labels, bias=False)
    with pytest.raises(CheckpointError, match="`model` was 'BertForSequenceClassification with"):
        fine_tuned(trained, resume=str(cut_off))
    assert fine_tuned(trained, resume=str(cut_off), allow_changed="model,optimizer").result.optimizer_steps == 14


@pytest.mark.slow
def test_an_allowed_new_rate_applies_from_the_current_point_of_the_schedule(cut_off: Path) -> None:
    before = fine_tuned()
    ended = fine_tuned(resume=str(cut_off), learning_rate=2e-3, allow_changed=["learning_rate"])
    assert ended.result.lr_history[:3] == before.result.lr_history[:3]
    assert ended.result.lr_history[3:] == pytest.approx([2 * rate for rate in before.result.lr_history[3:]])


def test_a_checkpoint_of_another_device_can_be_resumed(
    cut_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(cut_off, tmp_path / cut_off.name))
    metadata = json.loads((folder / "state.json").read_text())
    assert metadata["run_with"]["device"] == torch.empty(0).device.type
    metadata["run_with"]["device"] = "tpu"
    (folder / "state.json").write_text(json.dumps(metadata))
    processes = torch.load(folder / "processes.pt", weights_only=True)
    processes[0]["generators"]["device"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(processes, folder / "processes.pt")
    seal(folder)
    assert fine_tuned(resume=str(folder)).result.optimizer_steps == 14
    told = " ".join(capsys.readouterr().err.split())
    assert "Changed settings: device cpu (was tpu). Sums may round differently, and dropout draws differ." in told


def test_a_checkpoint_of_a_version_with_fewer_settings_can_be_resumed(cut_off: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cut_off, tmp_path / cut_off.name))
    metadata = json.loads((folder / "state.json").read_text())
    del metadata["run_with"]["gradient_checkpointing"]
    (folder / "state.json").write_text(json.dumps(metadata))
    seal(folder)
    assert fine_tuned(resume=str(folder)).result.optimizer_steps == 14


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_restoring_best_weights_can_be_switched_on_when_resuming(
    kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, Any] = {"learning_rate": 0.05, "n_epochs": 3, "checkpoint_every": 4}
    whole = fine_tuned(restore_best_weights=True, **arguments)
    fine_tuned(output_dir=str(tmp_path), keep_checkpoints=9, **arguments)
    assert min(losses := whole.result.val_loss_history) == losses[0]
    first = tmp_path / "checkpoints" / "update-00000007-epoch-0001"
    there = tmp_path / "checkpoints" / "update-00000012"
    if not kept:
        shutil.rmtree(first)
    capsys.readouterr()
    again = fine_tuned(restore_best_weights=True, resume=str(there), allow_changed="restore_best_weights", **arguments)
    told = " ".join(capsys.readouterr().err.split())
    assert (f"so those of update 7 are loaded from {first}." in told) == kept
    assert ("for this model. `restore_best_weights` will use the best of the remaining evaluations." in told) == (
        not kept
    )
    if kept:
        assert whole.differences(again) == []
    else:
        assert f", with validation loss {min(losses[1:]):.4f}." in told


@pytest.mark.slow
def test_restoring_best_weights_can_be_switched_off_when_resuming(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"learning_rate": 0.05, "n_epochs": 3, "checkpoint_every": 4}
    fine_tuned(output_dir=str(tmp_path), keep_checkpoints=9, restore_best_weights=True, **arguments)
    there = tmp_path / "checkpoints" / "update-00000012"
    again = fine_tuned(resume=str(there), allow_changed="restore_best_weights", **arguments)
    assert fine_tuned(**arguments).differences(again) == []


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 5}, {"max_tokens": 30}, {"max_tokens": "auto"}, {"planner": False}]
)
def test_another_physical_batch_continues_after_the_rows_already_done(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, weights = elastic(output_dir=str(tmp_path), checkpoint_every=3, keep_checkpoints=9)
    capsys.readouterr()
    again, same = elastic(resume=str(tmp_path / "checkpoints" / "update-00000006"), **arguments)
    assert relative_error(same, weights) < 1e-9
    assert again.loss_history == pytest.approx(whole.loss_history, rel=1e-9)
    assert "Resuming after update 6" in (told := capsys.readouterr().err)
    assert "44 rows are done, and no row is skipped or repeated." in told
    name, value = next(iter(arguments.items()))
    assert f"{name} {value} (was" in told


@pytest.mark.parametrize("remainder", ["flush", "carry"])
@pytest.mark.slow
def test_another_effective_batch_sees_every_row_once_an_epoch(remainder: str, tmp_path: Path) -> None:
    rows = [{**row, "number": n} for n, row in enumerate(CLASSIFIER.rows(54))]
    seen: list[int] = []

    def collate(some: list[Any]) -> dict[str, torch.Tensor]:
        if recording:
            seen.extend(row["number"] for row in some)
        return _padded(some)

    recording = False
    common: dict[str, Any] = {"train_data": rows, "data_collator": collate, "validation_split": 0.0, "audit": False}
    fine_tuned(**common, remainder=remainder, output_dir=str(tmp_path), checkpoint_every=3, keep_checkpoints=9)
    first = order_of(0, 54, 42)[:24]
    recording = True
    ended = fine_tuned(
        **common, remainder=remainder, effective_batch_size=12, allow_changed="effective_batch_size",
        resume=str(tmp_path / "checkpoints" / "update-00000003"),
    )  # fmt: skip
    assert len(ended.result.loss_history) == 3 + {"flush": 3 + 5, "carry": 7}[remainder]
    trained = seen[-(30 + 54) :]  # the other rows were examined before training
    assert set(Counter([*first, *trained]).values()) == {2}
    if remainder == "flush":
        assert sorted([*first, *trained[:30]]) == list(range(54))


def _padded(rows: list[Any]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
        mask[n, : len(row["input_ids"])] = 1
    labels = torch.tensor([int(row["labels"]) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.slow
def test_an_error_loses_no_update(tmp_path: Path) -> None:
    """After a fault that can be fixed, the run resumes from the last update before it."""
    rows = CLASSIFIER.rows(60)

    class Rows(torch.utils.data.Dataset):
        bad = -1

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, n: int) -> Any:
            if n == self.bad:
                raise OSError("the file is gone")
            return rows[n]

    kept, _ = hold_out(60, 0.1, 42)
    in_fifth_window = kept[order_of(0, 54, 42)[35]]
    trained, data = model(), Rows()
    trained.register_forward_hook(lambda *_: setattr(data, "bad", in_fifth_window if is_training_pass() else -1))
    with pytest.raises(DataError, match=f"Row {in_fifth_window} of `train_data`"):
        fine_tuned(trained, train_data=data, output_dir=str(tmp_path))
    assert checkpoints_of(tmp_path) == ["update-00000004"]
    again = fine_tuned(train_data=Rows(), output_dir=str(tmp_path), resume="auto")
    assert fine_tuned(train_data=Rows()).differences(again) == []


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["forward", "read"])
def test_an_error_in_the_middle_of_a_window_loses_no_completed_update(fails: str, tmp_path: Path) -> None:
    whole, trained = fine_tuned(), model()

    def fail(module: Any, *_: Any) -> None:
        if is_training_pass() and module.training and module.n_seen == 4 * 4 + 2:
            raise {"forward": RuntimeError, "read": ValueError}[fails]("something is wrong")

    trained.register_forward_hook(fail)
    with pytest.raises((RuntimeError, ValueError), match="something is wrong"):
        fine_tuned(trained, output_dir=str(tmp_path))
    assert len(checkpoints_of(tmp_path)) == 1
    assert whole.differences(fine_tuned(output_dir=str(tmp_path), resume="auto")) == []


def test_a_checkpoints_model_loads_as_any_other(tmp_path: Path) -> None:
    ended = fine_tuned(output_dir=str(tmp_path))
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "checkpoints" / "update-00000014-epoch-0002" / "model"
    )
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, ended.weights[name])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"resume": "auto"}, "`resume` is 'auto', but `output_dir` is None"),
        ({"resume": "/no/such/folder"}, "`resume` is '/no/such/folder', which .*there is no such folder"),
        ({"resume": "auto", "allow_changed": ["learning_rates"]}, r"`allow_changed` contains \['learning_rates'\]"),
        ({"checkpoint_every": 0}, "`checkpoint_every` must be a positive number of updates, or a time such as"),
        ({"checkpoint_every": "15 fortnights"}, "`checkpoint_every` must be a positive number of updates"),
        ({"checkpoint_every": "0min"}, "`checkpoint_every` must be a positive number of updates"),
        ({"keep_checkpoints": -1}, "`keep_checkpoints` must be a non-negative integer"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        fine_tuned(**arguments)


def test_spellings_of_off_and_auto_are_recognized() -> None:
    for off in (False, "off", None):
        assert parse_settings({"resume": off})[1].resume is None
    for on in (True, "Auto", "true"):
        assert parse_settings({"resume": on, "output_dir": "o"})[1].resume == "auto"


@pytest.mark.slow
@pytest.mark.processes
def test_runs_resume_on_two_processes_and_from_one_to_two_and_back(
    two_processes: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, weights = elastic(output_dir=str(tmp_path / "one"), checkpoint_every=3, keep_checkpoints=9)
    printed = two_processes("resuming_of_two.py", str(tmp_path))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert found.pop("heard") == [[75, "Stopped after update 4"]] * 2  # although only one of them got the signal
    assert len(found) == 7
    assert not any(found.values()), found
    assert "Changed settings: processes 2 (was 1). Sums may round differently, and dropout draws differ." in printed
    assert relative_error(torch.load(tmp_path / "gone_on.pt"), weights) < 1e-9
    capsys.readouterr()
    result, same = elastic(resume=str(tmp_path / "two" / "checkpoints" / "update-00000006"))
    assert "Changed settings: processes 1 (was 2)" in capsys.readouterr().err
    assert relative_error(same, weights) < 1e-9
    assert result.loss_history == pytest.approx(whole.loss_history, rel=1e-9)
    assert result.padding_fraction is not None
    assert whole.padding_fraction == pytest.approx(result.padding_fraction, abs=0.2)


@pytest.mark.slow
def test_a_step_that_is_half_done_is_not_saved(tmp_path: Path) -> None:
    whole, steps = fine_tuned(), []

    class RunsOut(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            steps.append(True)
            if len(steps) == 6:
                self.param_groups[1]["params"][0].data += 1  # writing has begun
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().step(closure)

    def run() -> Any:
        return fine_tuned(
            optimizer=lambda groups: RunsOut(groups, fused=True),
            output_dir=str(tmp_path), checkpoint_every=3, resume="auto",
        )  # fmt: skip

    with pytest.raises(torch.OutOfMemoryError):
        run()
    assert checkpoints_of(tmp_path) == ["update-00000003"]
    assert whole.differences(run()) == []


@pytest.mark.slow
def test_restarting_a_diverged_run_does_not_take_it_past_the_failure(tmp_path: Path) -> None:
    rows = CLASSIFIER.rows(60)

    def spoilt(trained: Any) -> nn.Module:
        trained.register_forward_hook(
            lambda module, _, outputs: (
                setattr(outputs, "loss", outputs.loss * torch.nan)
                if is_training_pass() and module.training and 17 <= module.n_seen < 40
                else None
            )
        )
        return trained

    common: dict[str, Any] = {"train_data": rows, "output_dir": str(tmp_path), "checkpoint_every": 1}
    with pytest.raises(DivergedError, match="The number of such updates in a row has reached 3"):
        fine_tuned(spoilt(model()), nonfinite_patience=3, **common)
    assert checkpoints_of(tmp_path) == [
        "update-00000003",
        "update-00000004",
    ]  # no checkpoint has weights that may have caused the failure
    with pytest.raises(DivergedError):
        fine_tuned(spoilt(model()), nonfinite_patience=3, **common, resume="auto")
    with pytest.raises(DivergedError, match="`on_nonfinite` is 'error'"):
        fine_tuned(spoilt(model()), on_nonfinite="error", **common, resume="auto")
    with pytest.raises(CheckpointError, match="ended at update 5, whose loss or gradient was not finite"):
        fine_tuned(spoilt(model()), on_nonfinite="error", **common, resume="auto")
    ended = fine_tuned(on_nonfinite="error", **common, resume="auto", learning_rate=5e-4, allow_changed="learning_rate")
    assert ended.result.skipped_steps == 1


@dataclass
class Masking:
    """A collator with options."""

    share: float = 0.15
    rows: Any = None


def test_options_of_functions_and_decimals_of_the_config_are_compared() -> None:
    def parts(gamma: float, share: float, dropout: float) -> dict[str, Any]:
        trained: Any = model()
        trained.config.hidden_dropout_prob = dropout
        loss_fn = functools.partial(nn.functional.cross_entropy, label_smoothing=gamma)
        found = {"loss_fn": function_options(loss_fn), "data_collator": function_options(Masking(share, object()))}
        found["model_config"] = config_identity(trained)
        return {f"{whole}.{name}": value for whole, each in found.items() for name, value in each.items()}

    was, allowed = parts(0.1, 0.15, 0.1), ["loss_fn", "data_collator", "model_config"]
    assert check(was, parts(0.1, 0.15, 0.1), [], Path()) == set()
    assert check(was, parts(0.2, 0.3, 0.0), allowed, Path()) == {*allowed}
    with pytest.raises(CheckpointError) as refused:
        check(was, parts(0.2, 0.3, 0.0), [], Path())
    for shown in (
        "allow_changed=['data_collator', 'loss_fn', 'model_config']",
        "`loss_fn.label_smoothing` was 0.1, but is 0.2 now",
        "`data_collator.share` was 0.15, but is 0.3 now",
        "`model_config.hidden_dropout_prob` was 0.1, but is 0.0 now",
    ):
        assert shown in str(refused.value)


class Unfreezes(TrainerCallback):
    """Unfreezes all weights in the second epoch."""

    def on_epoch_begin(self, _: Any, state: Any, __: Any, model: Any, **___: Any) -> None:
        model.requires_grad_(state.epoch >= 1)
        model.classifier.requires_grad_(True)


@pytest.mark.slow
def test_weights_that_a_callback_has_unfrozen_are_trained_after_a_resumption(tmp_path: Path) -> None:
    def run(**more: Any) -> Any:
        trained = model()
        trained.bert.requires_grad_(False)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
        return fine_tuned(trained, optimizer=optimizer, callbacks=[Unfreezes()], **more)

    whole = run(output_dir=str(tmp_path), checkpoint_every=5, keep_checkpoints=9)
    assert whole.differences(run(resume=str(tmp_path / "checkpoints" / "update-00000010"))) == []
