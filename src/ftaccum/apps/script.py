"""The command line of a training script: its options, its errors and its exit status."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from ..arguments import find_faults, read_settings
from ..errors import refuse, shown
from ..fields import select_fields
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tasks.adapter_options import AdapterOptions
from ..tasks.arguments import LOADING_SETTINGS, TEXT_SETTINGS, TrainArguments, ValDataArguments
from .exit_status import FAILED, OK, run_and_report
from .extra_options import declared_options, make_extra_options, plain_fields, read_extra_options
from .help import HelpPage
from .options import FIRST_OPTIONS
from .parser import Parsed, parse
from .search.settings import SearchSettings, SpaceArguments, TrialRecipe

# A script has one task.
_TaskOptions = select_fields("TaskOptions", TrainArguments, {f.name for f in fields(TrainArguments)} - {"task"})
# Options that stay as they are when a script is parsed: `test_fine_tuning` parses and checks their values.
_OF_RUN = (Recipe, TrialRecipe, Runtime, AdapterOptions)


@dataclass(frozen=True)
class ScriptOptions:
    """The options of a training script, from its defaults, a YAML file and the command line.

    Attributes:
        data: arguments of `load_task`; empty for a script without a task.
        settings: arguments of `test_fine_tuning`, or of `search`, besides those that `load_task` returns.
        extra: the script's extra options, an instance of the dataclass that it declares; None if it declares none.
    """

    data: dict[str, Any]
    settings: dict[str, Any]
    extra: Any = None


def run_script(
    main: Callable[[ScriptOptions], Any],
    description: str | None = None,
    *,
    task: str | None = None,
    extra: type | None = None,
    for_search: bool = False,
    arguments: Sequence[str] | None = None,
    **defaults: Any,
) -> None:
    """Run the main function of a training script with options from the command line, and exit.

    The options are those of `ftaccum train`: `--config FILE.yaml`, `--help`, the arguments of `test_fine_tuning`, and,
    for a script with a task, those of `load_task` and of adapters. Bad input ends the script with one message, before
    anything is loaded. After `main`, this function leaves the process group. It exits with a status of `ftaccum train`.

        def main(options):
            loaded = ftaccum.load_task(**options.data)
            return ftaccum.test_fine_tuning(**loaded.arguments(), **options.settings)

        ftaccum.run_script(main, task="text-classification", model="bert-base-uncased", train_data="train.csv")

    Args:
        main: trains with the options. If it returns a `Result`, the exit status tells whether all outputs were written;
            if it returns the study of a search, whether a trial has finished. An integer from 0 to 255 is the exit
            status, and None means success. For any other value, the status is 1.
        description: text for `--help`, usually the script's `__doc__`.
        task: the task of `load_task`; None for a script that loads its model and data in `main`.
        extra: a dataclass of further options. Each field has a default, `metadata={"help": …}`, and the type bool, int,
            float, str, Path, Literal or a list of one of them, or such a type or None. `__post_init__` may check the
            values and raise ValueError, whose message is shown.
        for_search: whether the options are those of `ftaccum search`, for a script that calls `search`.
        arguments: the words of the command line; None: those of this process.
        **defaults: defaults of options. If `train_data` is given, a default `val_data` and its `max_val_rows` have no
            effect. If a flag gives it, a `max_val_rows` in the file has no effect either.

    Raises:
        SystemExit: always.
    """
    words = sys.argv[1:] if arguments is None else arguments
    script = sys.argv[0]

    def run() -> int:
        page = HelpPage(f"python {script} [options]", description or "")
        result = _call_at_verbosity(main, _Script(task, extra, for_search, defaults).read(words, page))
        _leave_process_group()
        return _exit_status(result)

    sys.exit(run_and_report(Path(script).stem, run))


@dataclass(frozen=True)
class _Script:
    """What a script declares: the arguments of `run_script` of these names."""

    task: str | None
    extra: type | None
    for_search: bool
    defaults: Mapping[str, Any]

    def read(self, words: Sequence[str], page: HelpPage) -> ScriptOptions:
        """Return the options that the words of a command line give.

        Raises:
            SettingsError: for faults that can be found before a model and rows are loaded.
        """
        task_kinds = [_TaskOptions, AdapterOptions] if self.task else []
        search_kinds = [SpaceArguments, SearchSettings] if self.for_search else []
        run_kinds = [TrialRecipe if self.for_search else Recipe, Runtime]
        others = [*task_kinds, *search_kinds, *run_kinds]
        extra_kinds = [] if self.extra is None else [declared_options(self.extra, others)]
        page = replace(page, first=self._first(extra_kinds, others))
        kinds = [*extra_kinds, *others]
        read = _parse(kinds, words, page, self.defaults)
        parsed = dict(zip(kinds, read.options, strict=True))
        settings = {name: value for kind in run_kinds for name, value in vars(parsed[kind]).items()}
        _check_values(parsed, settings, looks_at_files=self.task is None)  # with a task, `_for_task` looks at them
        for kind in search_kinds:
            settings |= vars(parsed[kind])
        if self.for_search:
            from .search.space import read_dimensions

            settings["space"] = read_dimensions(settings["space"])
        extra = None
        if self.extra is not None:
            extra = make_extra_options(self.extra, _without_other_val_data(parsed[kinds[0]], read))
        if self.task is None:
            if isinstance(extra, ValDataArguments) and not self.for_search:
                from .task_checks import check_validation

                check_validation(extra, settings)
            return ScriptOptions({}, settings, extra)
        settings["lora"] = parsed[AdapterOptions].lora_argument()
        values = vars(_without_other_val_data(parsed[_TaskOptions], read))
        return self._for_task(TrainArguments(**values, task=self.task), settings, extra)

    def _first(self, extra_kinds: Sequence[type], others: Sequence[type]) -> list[str]:
        """Return the names of the options that `--help` shows."""
        names = [f.name for kind in (*extra_kinds, *others) for f in fields(kind)]
        usual = [name for name in FIRST_OPTIONS["search" if self.for_search else "train"] if name in names]
        declared = [f.name for kind in extra_kinds for f in plain_fields(kind)]
        return list(dict.fromkeys([*declared, *usual]))

    def _for_task(self, named: TrainArguments, settings: dict[str, Any], extra: Any) -> ScriptOptions:
        """Check the options of a script with a task, and share them among `load_task` and `test_fine_tuning`."""
        from .task_checks import check_search, check_training

        check = check_search if self.for_search else check_training
        check(named, settings)
        shared = {name: settings[name] for name in LOADING_SETTINGS if name in settings}
        rest = {name: value for name, value in settings.items() if name not in TEXT_SETTINGS}
        return ScriptOptions(vars(named) | shared, rest, extra)


def _parse(kinds: Sequence[type], words: Sequence[str], page: HelpPage, defaults: Mapping[str, Any]) -> Parsed:
    """Return an instance of each dataclass, with these defaults and with its values parsed by their rules.

    Raises:
        SettingsError: for unknown options and defaults, and if the model or the training data are missing.
    """
    unknown = sorted(set(defaults) - {f.name for kind in kinds for f in fields(kind)})
    refuse([f"`run_script` has the default {name!r}, but the script has no such option." for name in unknown])
    values = {name: _as_text(value) for name, value in defaults.items()}
    read = parse([_with_defaults(kind, values) for kind in kinds], words, page=page, defaults=values)
    missing = [name for each in read.options for name in ("model", "train_data") if getattr(each, name, None) == ""]
    refuse([f"`--{name}` is required. `--help` describes it." for name in missing])
    options = [
        each if kind in _OF_RUN else read_settings(type(each), vars(each))
        for kind, each in zip(kinds, read.options, strict=True)
    ]
    return Parsed(options, read.flags, read.file)


def _with_defaults(kind: type, defaults: Mapping[str, Any]) -> type:
    """Return a dataclass like `kind` with other defaults."""
    hints = get_type_hints(kind, include_extras=True)
    changed = [
        (f.name, hints[f.name], _default_field(defaults[f.name], _not_required(f.metadata)))
        for f in fields(kind)
        if f.name in defaults
    ]
    is_frozen = kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return make_dataclass(kind.__name__, changed, bases=(kind,), frozen=is_frozen) if changed else kind


def _default_field(default: Any, metadata: Mapping[str, Any]) -> Any:
    if type(default).__hash__ is None:  # a dataclass takes a default that can change, such as a list, from a factory
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _not_required(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {**metadata, "help": metadata.get("help", "").removesuffix(" (required)")}


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _check_values(parsed: Mapping[type, Any], settings: Mapping[str, Any], *, looks_at_files: bool) -> None:
    """Check the values that a script was given, each by its rule and type.

    Raises:
        SettingsError: with all faults.
    """
    from ..runtime.accelerator import is_first_process
    from ..training.preflight import faults_before_loading

    faults = [
        fault
        for kind, each in parsed.items()
        if kind not in _OF_RUN
        for fault in find_faults(each) + read_extra_options(each)
    ]
    refuse(faults + faults_before_loading(settings, looks_at_files=looks_at_files and is_first_process()))


def _call_at_verbosity(main: Callable[[ScriptOptions], Any], options: ScriptOptions) -> Any:
    """Call `main`. Show messages and progress bars of ftaccum and other libraries as the settings say."""
    from ..tasks.load import loading

    with loading(verbosity=options.settings["verbosity"], progress=options.settings["progress"]):
        return main(options)


def _exit_status(result: Any) -> int:
    """Return the exit status for what `main` returned.

    It is 1 if a `Result` could not write an output, and if a study has no finished trial. It is 1, with a message, for
    a value that is neither of them, nor None, nor an exit status.
    """
    if result is None:
        return OK
    if hasattr(result, "unwritten"):
        return FAILED if result.unwritten else OK
    if type(result) is int and 0 <= result < 256:  # the system keeps only the last 8 bits of an exit status
        return result

    from optuna import Study

    from .search.tables import best_trial

    if isinstance(result, Study):
        return FAILED if best_trial(result) is None else OK
    print(
        f"{Path(sys.argv[0]).stem}: `main` returned {shown(result)}, which tells neither success nor failure. Return a "
        "Result, the study of a search, an exit status from 0 to 255, or None for success.",
        file=sys.stderr,
    )
    return FAILED


def _without_other_val_data(named: Any, read: Parsed) -> Any:
    """Return options of data without a default `val_data` and its limit, if other training data are given.

    If a flag gives `train_data`, a limit in the file has no effect either.
    """
    given = read.flags | read.file
    if not hasattr(named, "val_data") or "train_data" not in given or "val_data" in given:
        return named
    changed: dict[str, Any] = {"val_data": None}
    if hasattr(named, "max_val_rows") and "max_val_rows" not in (read.flags if "train_data" in read.flags else given):
        changed["max_val_rows"] = None
    return replace(named, **changed)


def _leave_process_group() -> None:
    from accelerate import PartialState

    PartialState().destroy_process_group()
