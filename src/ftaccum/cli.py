"""The command `ftaccum`: a thin front to the Python functions, with options named as their arguments."""

import sys
from collections.abc import Sequence

from .errors import DataError, SettingsError
from .flags import TrainArguments, parse
from .planning import PlanArguments, plan
from .settings import Recipe, Runtime, checked

_USAGE = """usage: ftaccum COMMAND [options]

Fine-tuning where gradient accumulation is exactly a large batch.

commands:
  train   fine-tune a model on files or hub data
  plan    the arithmetic of a run: k, updates, remainder

`ftaccum COMMAND --help` lists a command's options. On several processes: `accelerate launch -m ftaccum train …`.
"""

_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, or 2 for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": _train, "plan": _plan}
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if words else _BAD_INPUT
    if words[0] not in commands:
        print(f"ftaccum: there is no command {words[0]!r}.\n\n{_USAGE}", end="", file=sys.stderr)
        return _BAD_INPUT
    try:
        commands[words[0]](words[1:])
    except (SettingsError, DataError) as error:
        print(f"ftaccum {words[0]}: {error}", file=sys.stderr)
        return _BAD_INPUT
    return 0


def _plan(words: Sequence[str]) -> None:
    (given,) = parse([PlanArguments], words, prog="ftaccum plan", description="The arithmetic of a run. Loads nothing.")
    print(plan(**vars(given)))


def _train(words: Sequence[str]) -> None:
    description = "Fine-tunes a model. Bad input is told before anything is loaded, with exit status 2."
    named, recipe, runtime = parse(
        [TrainArguments, Recipe, Runtime], words, prog="ftaccum train", description=description
    )
    needed = [name for name in ("model", "train_data") if not getattr(named, name)]
    if needed:
        raise SettingsError([f"`--{name}` is needed. `ftaccum train --help` says what it may be." for name in needed])

    # Only now what takes seconds to import.
    from accelerate import PartialState

    from .fine_tuning import test_fine_tuning
    from .metrics import ClassificationMetrics
    from .sources import load

    settings = vars(recipe) | vars(runtime)
    checked(settings)
    loaded = load(named, recipe.random_seed)
    measures = named.task == "text-classification" and (loaded.val is not None or recipe.validation_split > 0)
    test_fine_tuning(
        loaded.model,
        train_data=loaded.train,
        val_data=loaded.val,
        tokenizer=loaded.tokenizer,
        compute_metrics=ClassificationMetrics() if measures else None,
        **settings,
    )
    PartialState().destroy_process_group()
