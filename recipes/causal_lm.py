"""Fine-tune a chat model on conversations (SFT, loss on the answers only), with exact gradient accumulation.

    python recipes/causal_lm.py --config recipes/causal_lm.yaml      # packaged model, some packaged conversations
    python recipes/causal_lm.py --use_amp --output_dir outputs/chat  # all of them for three epochs; too slow on a CPU
    python recipes/causal_lm.py --model HuggingFaceTB/SmolLM2-360M-Instruct --train_data trl-lib/Capybara \\
        --max_length 2048 --batch_size 2 --effective_batch_size 64
    python recipes/causal_lm.py --train_data train.jsonl --val_data val.jsonl
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/causal_lm.py

The recipe takes any model that `AutoModelForCausalLM` loads and that has a chat template and a fast tokenizer. The data
are files or Hub data sets with a column of conversations, each a list of {"role": ..., "content": ...}. The saved model
in OUTPUT_DIR/model loads with `pipeline("text-generation", model=...)`. The recipe prepares the packaged model and
conversations on first use.

With the settings in causal_lm.yaml (SmolLM2-135M-Instruct, 160 conversations of up to 384 tokens, 20 updates of 8 rows,
bf16 autocast), the held-out perplexity of the answers falls from 48.3 to 30.1, with at most 6 GB of memory. This takes
about 7 minutes on one CPU core with bf16 units. On two cores it takes about 4 minutes: 8 s per update instead of 14 s.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState

import packaged
from ftaccum import DataError, SettingsError, test_fine_tuning
from ftaccum.apps.help import HelpPage
from ftaccum.apps.parser import parse
from ftaccum.arguments import find_faults, parse_settings, read_settings
from ftaccum.errors import refuse
from ftaccum.fields import PositiveInt, Text, setting
from ftaccum.settings.recipe import Recipe
from ftaccum.settings.runtime import Runtime
from ftaccum.tasks.arguments import TrainArguments
from ftaccum.tasks.load import load

_PAGE = HelpPage("python recipes/causal_lm.py [options]", __doc__ or "")


@dataclass
class Sources(TrainArguments):
    """Model and data: the arguments of `ftaccum train`, with the packaged model and conversations as defaults."""

    task: Text = setting("chat", "kind of task: chat, or causal-lm for plain text")
    model: Text = setting(str(packaged.SMOLLM), "folder or hub name of a model with a chat template")
    train_data: Text = setting(
        str(packaged.CHATS_TRAIN), "JSON-lines or Parquet file, saved folder or hub name[:config] of conversations"
    )
    max_val_rows: PositiveInt | None = setting(None, "use only the first N rows of `val_data`; none: all")

    def __post_init__(self) -> None:
        if self.train_data == str(packaged.CHATS_TRAIN) and self.val_data is None:
            self.val_data = str(packaged.CHATS_VAL)


def main(arguments: list[str]) -> None:
    sources, recipe, runtime = parse([Sources, Recipe, Runtime], arguments, page=_PAGE)
    settings = vars(recipe) | vars(runtime)
    sources = read_settings(Sources, vars(sources))
    refuse(find_faults(sources))
    parse_settings(settings)  # before anything is loaded
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.main_process_first():  # the other processes reuse its files
        packaged.prepare(sources.model, sources.train_data, sources.val_data)
        loaded = load(sources, settings)
    if loaded.val is not None and sources.max_val_rows is not None:
        loaded = replace(loaded, val=loaded.val.select(range(min(sources.max_val_rows, len(loaded.val)))))

    result = test_fine_tuning(**loaded.arguments(), **settings)

    if state.is_main_process:
        if result.val_loss_history:
            # The saved model is that of the best or the last epoch.
            after = min(result.val_loss_history) if recipe.restore_best_weights else result.final_loss
            print(f"Held-out perplexity: {perplexity(result.initial_loss):.2f} before, {perplexity(after):.2f} after")
        if runtime.output_dir:
            print(f"Model, ledger and result: {Path(runtime.output_dir).resolve()}")
    state.destroy_process_group()


def perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)  # `exp` raises for larger values


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (SettingsError, DataError) as error:
        print(f"causal_lm: {error}", file=sys.stderr)
        sys.exit(2)
