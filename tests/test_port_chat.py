"""TRL's script of the docs, and the command that replaces it."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from chats import save_chat_model
from ftaccum.apps.options import OPTIONS
from ftaccum.apps.parser import parse
from ftaccum.runtime.accelerator import fresh_accelerate_state
from ftaccum.tasks.load import load
from test_readme import ROOT, blocks, ftaccum_commands
from test_task_chat import chat_rows

pytest.importorskip("trl", reason="TRL is not installed")

EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "port_a_trainer_script.md"
LIMIT = 80  # the tiny model has 128 positions; this cuts one conversation


def test_the_page_shows_the_script() -> None:
    assert (EXAMPLES / "trl_chat.py").read_text(encoding="utf-8") in blocks(PAGE, "python")


@pytest.mark.filterwarnings("ignore")  # TRL's
def test_the_script_and_the_command_label_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chatml.jinja").write_text((EXAMPLES / "chatml.jinja").read_text())
    model, rows = save_chat_model(tmp_path / "model"), chat_rows(tmp_path / "rows.jsonl")
    Path("trl_chat.py").write_text((EXAMPLES / "trl_chat.py").read_text().replace("1024", str(LIMIT)))
    words = ["--model", model, "--train_data", rows, "--output_dir", "trl", "--use_cpu"]
    monkeypatch.setattr("sys.argv", ["trl_chat.py", *words])
    with fresh_accelerate_state():
        trainer = runpy.run_path("trl_chat.py")["trainer"]
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]

    command = next(words for words in ftaccum_commands(PAGE) if "chat" in words)
    named, _, recipe, runtime = parse(OPTIONS["train"], command[1:]).options
    loaded = load(replace(named, model=model, train_data=rows), {**vars(recipe), "max_length": LIMIT})
    assert [row["input_ids"] for row in loaded.train] == [batch["input_ids"][0].tolist() for batch in batches]
    assert [row["labels"] for row in loaded.train] == [batch["labels"][0].tolist() for batch in batches]

    args = trainer.args
    assert (recipe.learning_rate, recipe.lr_scheduler) == (args.learning_rate, args.lr_scheduler_type)
    assert (recipe.warmup_ratio, recipe.weight_decay) == (args.warmup_steps, args.weight_decay)
    assert (recipe.n_epochs, recipe.max_length) == (args.num_train_epochs, 1024)
    sizes = (runtime.batch_size, recipe.gradient_accumulation_steps)
    assert sizes == (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert (runtime.mixed_precision == "bf16") is args.bf16
