"""The arguments of `test_fine_tuning`: signature, docstring, docs and options follow the declarations of settings."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

import ftaccum
from ftaccum.apps.options import OPTIONS
from ftaccum.apps.parser import build_parser
from ftaccum.apps.plan import PlanArguments, PlanRecipe
from ftaccum.apps.search.settings import SearchSettings, TrialRecipe, reserved
from ftaccum.apps.verify.settings import VerifyRecipe, VerifyRuntime, VerifySettings
from ftaccum.checkpoint.compatibility import _MATTER_TO_ROUNDING
from ftaccum.fields import traits_of
from ftaccum.settings.recipe import CHANGEABLE, SIZES, Recipe
from ftaccum.settings.runtime import Runtime
from ftaccum.training.config import Components

DOCS = Path(__file__).parent.parent / "docs" / "arguments.md"
PARAMETERS = inspect.signature(ftaccum.test_fine_tuning).parameters
SETTINGS: dict[str, tuple[type, Field]] = {f.name: (kind, f) for kind in (Recipe, Runtime) for f in fields(kind)}

# Frozen, so that a new argument is a decision: declare it, document it, and then add it here.
NAMES = (
    "accumulate_in_fp32", "adam_beta1", "adam_beta2", "add_eos_token", "allow_changed", "audit", "batch_size",
    "callbacks", "checkpoint_every", "class_weights", "compile", "compute_metrics", "config", "count_items",
    "data_collator", "deterministic", "early_stopping_min_delta", "early_stopping_patience", "effective_batch_size",
    "eval_batch_size", "evaluate_every", "generation_kwargs", "gradient_accumulation_steps",
    "gradient_checkpointing", "gradient_clip_norm", "greater_is_better", "head_learning_rate", "keep_checkpoints",
    "label_smoothing", "layerwise_lr_decay", "learning_rate", "learning_rate_scaling", "log_every", "log_with",
    "lora", "loss_fn", "loss_head", "loss_inputs", "loss_over", "lr_scheduler", "lr_scheduler_kwargs", "max_length",
    "max_tokens", "max_updates", "metric_for_best", "mixed_precision", "model", "n_epochs", "noise_scale",
    "nonfinite_patience", "num_workers", "on_inexact", "on_nonfinite", "optimizer", "optimizer_groups", "output_dir",
    "padding_free", "planner", "planner_costs", "preprocess_logits_for_metrics", "preprocessing_num_workers",
    "progress", "push_to_hub", "random_seed", "reduction", "remainder", "restore_best_weights", "resume",
    "router_balance", "sampler", "save", "self_check_cache", "sharding", "sync", "text_columns", "tokenizer",
    "tokens_per_update", "train_data", "use_amp", "use_wandb", "val_data", "validation_split", "verbosity",
    "warmup_ratio", "warmup_steps", "weight_decay",
)  # fmt: skip


def read_argument_table(path: Path) -> dict[str, Any]:
    """Return the defaults in a Markdown file's tables of arguments, by name.

    The first column of such a table is headed "argument". A row may name several arguments and list their defaults in
    the same order, separated by commas; the last default holds for the names that are left. A default that is no
    Python literal stays a string.
    """
    table = {}
    for _, (names, defaults, *_) in _argument_rows(path):
        named = re.findall(r"`(\w+)`", names)
        listed = re.split(r",\s*(?![^(\[]*[)\]])", defaults)
        assert len(listed) <= len(named), f"{path.name} has more defaults than names: {names} | {defaults}"
        table |= {name: _literal(default) for name, default in zip_longest(named, listed, fillvalue=listed[-1])}
    return table


def _argument_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of each row of the tables of arguments, with the heading above it."""
    heading, is_inside = "", False
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith("#"):
            heading = line.lstrip("# ")
        is_inside = bool(cells) and (is_inside or cells[0] == "argument")
        if is_inside and "`" in cells[0]:
            yield heading, cells


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return inspect.Parameter.empty if text == "–" else text


def test_the_signature_follows_the_declarations() -> None:
    components = {f.name: f.default for f in fields(Components)}
    assert components.keys() & SETTINGS.keys() == {"optimizer"}  # a name is a setting, an object is a component
    assert PARAMETERS.keys() == components.keys() | SETTINGS.keys()
    defaults = {name: PARAMETERS[name].default for name in SETTINGS}
    assert defaults == {name: f.default for name, (_, f) in SETTINGS.items()}
    declared = {name: default for name, default in components.items() if default is not MISSING}
    assert {name: PARAMETERS[name].default for name in declared} == declared


def test_no_argument_is_added_unnoticed() -> None:
    assert tuple(sorted(PARAMETERS)) == NAMES
    positional = [name for name, p in PARAMETERS.items() if p.kind is not p.KEYWORD_ONLY]
    assert positional == ["model", "config", "train_data", "val_data"]


def test_every_argument_is_in_the_docstring() -> None:
    described = re.findall(r"^    (\w+): ", inspect.getdoc(ftaccum.test_fine_tuning) or "", re.MULTILINE)
    assert not set(PARAMETERS) - set(described)


def test_the_docs_list_the_arguments_and_their_defaults() -> None:
    assert read_argument_table(DOCS) == {name: parameter.default for name, parameter in PARAMETERS.items()}


def test_the_docs_match_the_declarations() -> None:
    found = {
        cells[0].strip("`"): (heading.lower(), cells[2], cells[3])
        for heading, cells in _argument_rows(DOCS)
        if cells[3] != "Component"
    }
    assert found == {
        name: (traits_of(f).group, f.metadata["help"], kind.__name__) for name, (kind, f) in SETTINGS.items()
    }


def test_every_setting_is_an_option_of_train() -> None:
    groups = build_parser(OPTIONS["train"])._action_groups
    options = {flag: (group.title, action) for group in groups for action in group._group_actions
               for flag in action.option_strings}  # fmt: skip
    for name, (_, declared) in SETTINGS.items():
        title, action = options[f"--{name}"]
        shown = (title, action.default, action.help.replace("%%", "%"))
        assert shown == (traits_of(declared).group, declared.default, declared.metadata["help"])


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (ftaccum.plan, [PlanArguments, PlanRecipe]),
        (ftaccum.verify, [VerifySettings, VerifyRecipe, VerifyRuntime]),
        (ftaccum.search, [SearchSettings]),
    ],
)
def test_other_functions_follow_the_declarations(function: Callable[..., Any], kinds: list[type]) -> None:
    parameters = inspect.signature(function).parameters
    declared = {
        f.name: f.default for kind in kinds for f in fields(kind) if f.name != "n_rows"
    }  # only a flag needs one
    assert {name: parameters[name].default for name in declared} == declared


def test_plan_takes_no_other_arguments() -> None:
    declared = {f.name for kind in (PlanArguments, PlanRecipe) for f in fields(kind)}
    assert declared == inspect.signature(ftaccum.plan).parameters.keys()


def test_the_metadata_of_settings_answers_queries() -> None:
    """A sample of each query; the declarations are the list."""
    assert SIZES == ("gradient_accumulation_steps", "effective_batch_size", "tokens_per_update")
    assert {"n_epochs", "effective_batch_size", "train_data"} < set(CHANGEABLE)
    assert not {"gradient_accumulation_steps", "tokens_per_update", "batch_size"} & set(CHANGEABLE)
    assert "planner" in _MATTER_TO_ROUNDING
    assert "num_workers" not in _MATTER_TO_ROUNDING
    trial = {f.name for f in fields(TrialRecipe)}
    assert {"weight_decay", "n_epochs"} < trial
    assert all(reserved(f.name) for f in fields(Recipe) if f.name not in trial)
    assert reserved("weight_decay") is None
    assert reserved("model") == reserved("progress") == "it is an argument of the search itself"
