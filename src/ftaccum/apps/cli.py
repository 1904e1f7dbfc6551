"""The `ftaccum` command: a thin layer over the Python functions. Its options have the names of their arguments."""

import contextlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..arguments import find_faults, parse_settings
from ..errors import DataError, DivergedError, SettingsError, refuse
from ..settings import Recipe, Runtime
from .parser import NamedArguments, TrainArguments, parse
from .plan import PlanArguments, PlanRecipe, plan
from .search.settings import SearchSettings, SpaceArguments, TrialRecipe
from .verify.settings import VerifyOutput, VerifyRecipe, VerifyRuntime, VerifySettings

_USAGE = """usage: ftaccum COMMAND [options]

Fine-tuning where gradient accumulation is exactly a large batch.

commands:
  train   fine-tune a model on files or hub data
  search  find accumulation steps and learning rate at a fixed physical batch
  verify  check on your model and rows that accumulation equals one large batch
  plan    compute the batch sizes and updates of a run without running it

`ftaccum COMMAND --help` lists a command's options, and `ftaccum --version` shows the version. For several processes:
`accelerate launch -m ftaccum train …`.
"""

# The options of a command are the fields of these dataclasses.
OPTIONS: dict[str, list[type]] = {
    "train": [TrainArguments, Recipe, Runtime],
    "search": [TrainArguments, SpaceArguments, SearchSettings, TrialRecipe, Runtime],
    "verify": [NamedArguments, VerifyOutput, VerifySettings, VerifyRecipe, VerifyRuntime],
    "plan": [PlanArguments, PlanRecipe],
}

# The option of a search that stands for another option of a single run.
_RENAMED = {"gradient_accumulation_steps": "accumulation_steps"}

_NOTHING_FOUND = _NOT_EXACT = _NOT_WRITTEN = _DIVERGED = 1
_BAD_INPUT, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Returns:
        0 on success; 1 if training diverged, an output could not be written, a search finished no trial, or
        accumulating is not exact; 2 for bad input; 130 after Ctrl-C.

    Raises:
        Preempted: if a scheduler stopped training. The process exits with status 75.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": _train, "search": _search, "verify": _verify, "plan": _plan}
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if words else _BAD_INPUT
    if words[0] == "--version":
        print(f"ftaccum {__version__}")
        return 0
    if words[0] not in commands:
        print(f"ftaccum: there is no command {words[0]!r}.\n\n{_USAGE}", end="", file=sys.stderr)
        return _BAD_INPUT
    try:
        return commands[words[0]](words[1:])
    except (SettingsError, DataError) as error:
        print(f"ftaccum {words[0]}: {error}", file=sys.stderr)
        return _BAD_INPUT
    except DivergedError as error:
        print(f"ftaccum {words[0]}: {error}", file=sys.stderr)
        return _DIVERGED
    except KeyboardInterrupt:
        resumes = ". The same command resumes the search." if words[0] == "search" else "."
        print(f"ftaccum {words[0]}: interrupted{resumes}", file=sys.stderr)
        return _INTERRUPTED


def _parse(command: str, words: Sequence[str], description: str) -> Any:
    """Parse the options of a command into one instance of each of its dataclasses."""
    options = {each: {f.name for kind in kinds for f in fields(kind)} for each, kinds in OPTIONS.items()}
    elsewhere = {
        option: ", ".join(f"`ftaccum {each}`" for each in options if option in options[each])
        for option in set().union(*options.values()) - options[command]
    }
    return parse(
        OPTIONS[command],
        words,
        prog=f"ftaccum {command}",
        description=description,
        elsewhere=elsewhere,
        renamed=_RENAMED if command == "search" else None,
    )


def _plan(words: Sequence[str]) -> int:
    arguments, recipe = _parse("plan", words, "Computes the batch sizes and updates of a run. Loads no model or data.")
    print(plan(**vars(arguments), **vars(recipe)))
    return 0


def _train(words: Sequence[str]) -> int:
    description = (
        "Fine-tunes a model. Exit status: 0 on success; 1 if the ledger, the result or the model could not be\n"
        "written, or if training ended because its updates were not finite; 2 for bad input, before any training;\n"
        "75 after SIGTERM or SIGUSR1; 130 after Ctrl-C. `--resume auto` resumes an interrupted run.\n\n"
        "Without `--output_dir`, the folder is outputs/MODEL-DATA-DATE, and `--resume auto` resumes the newest\n"
        "unfinished run in outputs/ that has the same settings."
    )
    named, recipe, runtime = _parse("train", words, description)
    _check_named(named, "train")

    # These imports take seconds, so check the input first.
    from accelerate import PartialState

    from ..metrics import ClassificationMetrics
    from ..runtime.accelerator import is_first_process
    from ..tracking.selection import Criterion
    from ..training.config import RunConfig, faults_of_evaluation
    from ..training.preflight import faults_before_loading
    from ..training.run import run_training
    from .load import load, loading
    from .output_folder import OUTPUTS, output_folder

    settings = vars(recipe) | vars(runtime)
    given = settings if runtime.output_dir is not None else settings | {"output_dir": OUTPUTS}
    measures = _measures(named, recipe.validation_split)
    faults = faults_before_loading(given, looks_at_files=is_first_process())
    has_val_data = named.val_data is not None
    refuse(faults or faults_of_evaluation(recipe, has_metrics=measures, has_val_data=has_val_data))
    if measures:
        Criterion.of_settings(recipe.metric_for_best, recipe.greater_is_better).check(ClassificationMetrics.NAMES)
    recipe, parsed = parse_settings(given)
    with loading(verbosity=runtime.verbosity, progress=runtime.progress):
        loaded = load(named, recipe.random_seed, recipe.text_columns)
    arguments = {
        "model": loaded.model,
        "train_data": loaded.train,
        "val_data": loaded.val,
        "tokenizer": loaded.tokenizer,
        "compute_metrics": ClassificationMetrics() if measures else None,
        **settings,
    }
    with output_folder(named, recipe, replace(parsed, output_dir=runtime.output_dir), words) as (folder, command):
        config = RunConfig.from_arguments(_default_arguments() | arguments | {"output_dir": folder})
        result = run_training(replace(config, command=command))
    PartialState().destroy_process_group()
    return _NOT_WRITTEN if result.unwritten else 0


def _default_arguments() -> dict[str, Any]:
    from ..fine_tuning import test_fine_tuning

    return {name: parameter.default for name, parameter in inspect.signature(test_fine_tuning).parameters.items()}


def _search(words: Sequence[str]) -> int:
    description = (
        "Searches for the best number of accumulation steps and learning rate at a fixed physical batch size.\n"
        "Run the same command again to resume the search. With `--storage`, any number of machines can share it."
    )
    named, varied, settings, recipe, runtime = _parse("search", words, description)
    _check_named(named, "search")
    shared = vars(recipe) | vars(runtime) | {"output_dir": runtime.output_dir or "outputs/search"}

    from accelerate import PartialState

    from ..metrics import ClassificationMetrics
    from .load import load_factory, loading
    from .search.api import search
    from .search.space import read_dimensions
    from .search.tables import best_trial
    from .search.validation import check_before_loading

    arguments = (
        vars(settings)
        | shared
        | {
            "accumulation_steps": varied.accumulation_steps,
            "learning_rate": varied.learning_rate,
            "space": read_dimensions(varied.space),
            "compute_metrics": ClassificationMetrics() if _measures(named, recipe.validation_split) else None,
        }
    )
    check_before_loading({**arguments, "val_data": named.val_data})
    with loading(verbosity=runtime.verbosity, progress=runtime.progress):
        model_factory, loaded = load_factory(named, recipe.text_columns)
    study = search(model_factory, None, loaded.train, loaded.val, tokenizer=loaded.tokenizer, **arguments)
    found, state = best_trial(study) is not None, PartialState()
    if found and not settings.refit and state.is_main_process and runtime.verbosity != "quiet":
        print("No model was saved. To train the best one and save it, run the same command with `--refit`.")
    state.destroy_process_group()
    return 0 if found else _NOTHING_FOUND


def _verify(words: Sequence[str]) -> int:
    description = (
        "Accumulates the gradient of one update in many ways, and compares each with the gradient of the same rows\n"
        "in one batch. The rows are split as in training, one by one, and in random orders and sizes. Shorter windows\n"
        "test an epoch's last update. The table also shows the errors of `loss / k` and of Transformers' Trainer.\n"
        "The model runs in train mode without dropout, in float64 if possible, and is not trained. If the rows of an\n"
        "update do not fit in memory together, fewer of them are compared.\n\n"
        "Exit status: 0 if accumulating is exact up to rounding, 1 if it is not, 2 for bad input."
    )
    named, output, settings, recipe, runtime = _parse("verify", words, description)
    _check_named(named, "verify")
    if output.json not in (None, "-") and not Path(output.json).parent.is_dir():
        raise SettingsError([f"`--json` {output.json!r} is in a folder that does not exist. Create the folder first."])

    parse_settings(vars(recipe) | vars(runtime))
    refuse(find_faults(settings))
    with contextlib.redirect_stdout(sys.stderr):  # keep standard output for the table
        from accelerate import PartialState

        from .load import load, loading
        from .verify.api import verify

        with loading(verbosity=runtime.verbosity, progress=runtime.progress):
            loaded = load(TrainArguments(**vars(named)), recipe.random_seed, recipe.text_columns)
        arguments = vars(settings) | vars(recipe) | vars(runtime)
        found = verify(loaded.model, loaded.train, tokenizer=loaded.tokenizer, **arguments)
        state = PartialState()
    if state.is_main_process:
        if output.json not in (None, "-"):
            found.save(output.json)
        print(found.to_json() if output.json == "-" else found)
    state.destroy_process_group()
    return 0 if found.exact else _NOT_EXACT


def _check_named(named: NamedArguments, command: str) -> None:
    needed = [name for name in ("model", "train_data") if not getattr(named, name)]
    if needed:
        raise SettingsError([f"`--{name}` is required. `ftaccum {command} --help` describes it." for name in needed])
    refuse(find_faults(named))


def _measures(named: TrainArguments, validation_split: float) -> bool:
    """Return whether there are labelled validation rows to measure accuracy on."""
    return named.task == "text-classification" and (named.val_data is not None or validation_split > 0)
