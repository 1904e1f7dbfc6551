"""The argument `lora`: checked, turned into a configuration of PEFT, and added to the model."""

import copy
import difflib
import importlib.util
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from torch import nn

from ..errors import SettingsError, refuse, shown
from ..runtime.adapters import ModuleTree, has_adapters, is_peft_model, new_modules
from ..runtime.model_traits import can_generate, is_encoder_decoder, output_embeddings
from ..runtime.model_wrapper import model_to_save, with_model_to_save
from ..runtime.state_guards import preserve_rng, seed_all

DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
_LOWEST = (0, 18)  # as in pyproject.toml
_SEED = 71  # besides the run's own, so that adapters draw other numbers than a head that was made from that seed
_SYNONYMS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
_HEADS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def faults_of_lora(lora: Any) -> list[str]:
    """Return a sentence for each fault of `lora` that can be found without the model."""
    if lora is None or lora is False:
        return []
    if fault := fault_of_peft():
        return [fault]
    from peft import LoraConfig, PeftConfig

    if isinstance(lora, PeftConfig) or lora is True:
        return []
    if not isinstance(lora, Mapping):
        return [
            "`lora` must be None, True, a dict of arguments of `peft.LoraConfig`, or a PEFT configuration, but is "
            f"{shown(lora)} instead. True adds adapters of rank 16 to all linear layers."
        ]
    known = [f.name for f in fields(LoraConfig)]
    return [
        f"`lora` has the key {shown(key)}, which `peft.LoraConfig` does not have.{_guess(key, known)}"
        for key in lora
        if key not in known
    ]


def fault_of_peft(needed_by: str = "`lora`") -> str | None:
    """Return a sentence if PEFT is missing or too old; None if it can be used.

    Args:
        needed_by: what needs it, for the sentence.
    """
    if importlib.util.find_spec("peft") is None:
        return f"{needed_by} needs the package `peft`, which is not installed. Install it with `pip install peft`."
    lowest = ".".join(map(str, _LOWEST))
    found = version("peft")
    if tuple(int(n) for n in re.findall(r"\d+", found)[:2]) < _LOWEST:
        return f"{needed_by} needs peft {lowest} or newer, but {found} is installed. Run `pip install -U peft`."
    return None


def faults_of_adapters(model: Any, lora: Any, save: str) -> list[str]:
    """Return a sentence for each fault of `lora` and `save` for this model."""
    faults = faults_of_lora(lora)
    adds, inner = lora is not None and lora is not False, model_to_save(model)
    if adds and has_adapters(inner):
        faults.append(
            "`lora` is given, but `model` has adapters already. Leave `lora` out to train those of a PEFT model, or "
            "load the base model again."
        )
    if fault := fault_of_save(save, has_adapters=adds or is_peft_model(inner)):
        faults.append(fault)
    bits = quantised_bits(model)
    if bits and save != "adapter":
        faults.append(
            f"`save` is {save!r}, but the model has weights of {bits} bits, and merging would round the adapters to "
            "them. Leave `save` out; `ftaccum merge` merges the saved adapter into the base model as it was saved."
        )
    if bits and not (adds or has_adapters(inner)):
        faults.append(
            f"`model` has weights of {bits} bits, which cannot be trained. Train adapters with `lora=True`, or load "
            "the model without `load_in_4bit` and `load_in_8bit`."
        )
    return faults


def fault_of_save(save: str, *, has_adapters: bool) -> str | None:
    """Return a sentence if `save` asks to merge adapters that there are not."""
    if save == "adapter" or has_adapters:
        return None
    return (
        f"`save` is {save!r}, but there are no adapters to merge: `lora` is None, and `model` is not a PEFT model. "
        "Leave `save` out; the whole model is saved."
    )


def quantised_bits(model: Any) -> int | None:
    """Return the bits of the weights of a model that bitsandbytes has quantized; None for other models."""
    widths, model = {"is_loaded_in_4bit": 4, "is_loaded_in_8bit": 8}, model_to_save(model)
    return next((bits for name, bits in widths.items() if getattr(model, name, False)), None)


@contextmanager
def added_adapters(model: Any, lora: Any, seed: int, keeps: Callable[[], bool]) -> Iterator[Any]:
    """Add adapters to a model, if `lora` asks for them. On exit, take them out again unless they are to be kept.

    A `ModelWrapper` gets them in the model inside.

    Args:
        lora: the argument of `test_fine_tuning`.
        seed: decides the first weights of the adapters.
        keeps: returns whether the adapters stay in the model.

    Yields:
        the PEFT model; the model itself if it is a `ModelWrapper`, or without `lora`.

    Raises:
        SettingsError: if PEFT cannot add them.
    """
    if lora is None or lora is False:
        yield model
        return
    before, inner = ModuleTree(model), model_to_save(model)
    try:
        yield with_model_to_save(model, _with_adapters(inner, _configuration(lora, inner), seed))
    finally:
        if not keeps():
            before.restore()


def head_modules(model: Any) -> list[str]:
    """Return the names of the modules that make up the head of a classifier, such as "classifier".

    These are the modules outside the base model. A language model has no such head: its output embeddings come with the
    checkpoint.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix) or output_embeddings(model) is not None:
        return []
    return [
        name for name, child in model.named_children() if name != prefix and next(child.parameters(), None) is not None
    ]


def task_type(model: Any) -> str | None:
    """Return PEFT's name of the task of a model's head; None if it has none."""
    name = type(model).__name__
    for ending, task in _HEADS.items():
        if name.endswith(ending):
            return task
    if not can_generate(model):
        return None
    return "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"


def _configuration(lora: Any, model: nn.Module) -> Any:
    """Return the configuration of the adapters, with the model's task, its head and its new weights filled in."""
    from peft import LoraConfig, PeftConfig

    if isinstance(lora, PeftConfig):
        configuration: Any = copy.deepcopy(lora)  # PEFT writes to it
    else:
        given = {} if lora is True else dict(lora)
        defaults = {
            name: value
            for name, value in DEFAULTS.items()
            if name != "target_modules" or not given.get("target_parameters")
        }
        try:
            configuration = LoraConfig(**{**defaults, **given})
        except Exception as error:
            raise SettingsError(
                [f"`lora` is {shown(lora)}, which `peft.LoraConfig` does not accept: {error}"]
            ) from error
        refuse(_faults_of_names(configuration, model))
    if configuration.task_type is None:
        configuration.task_type = task_type(model)
    if hasattr(configuration, "modules_to_save"):
        named = list(configuration.modules_to_save or ())
        for name in (*head_modules(model), *new_modules(model)):
            if not any(f".{name}.".startswith(f".{one}.") or f".{name}".endswith(f".{one}") for one in named):
                named.append(name)
        configuration.modules_to_save = named or None
        if _trains_tied_embeddings(model, named) and "ensure_weight_tying" not in (
            lora if isinstance(lora, Mapping) else {}
        ):
            configuration.ensure_weight_tying = True
    return configuration


def _with_adapters(model: Any, configuration: Any, seed: int) -> Any:
    from peft import get_peft_model

    vars(model).pop("peft_config", None)  # older versions of PEFT leave it when adapters are taken out
    try:
        with preserve_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT sets it right
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            seed_all(seed, _SEED)
            return get_peft_model(model, configuration)
    except Exception as error:  # PEFT checks values in many places, with many types of errors
        raise SettingsError(
            [f"`lora` cannot be added to {type(model).__name__}: {error} {_linear_layers(model)}"]
        ) from error


def _faults_of_names(configuration: Any, model: nn.Module) -> list[str]:
    """Return a sentence for each name of a module, or pattern of names, that the model does not have."""
    names = [name for name, _ in model.named_modules()]
    faults, kind, remedy = [], type(model).__name__, _linear_layers(model)
    for argument in ("target_modules", "modules_to_save"):
        given = getattr(configuration, argument) or ()
        if isinstance(given, str):
            if given != DEFAULTS["target_modules"] and not any(re.fullmatch(given, name) for name in names):
                faults.append(f"`lora` has `{argument}` {given!r}, which matches no module of {kind}. {remedy}")
            continue
        faults += [
            f"`lora` names {one!r} in `{argument}`, but {kind} has no module of this name. {remedy}"
            for one in sorted(given)
            if not any(f".{name}".endswith(f".{one}") for name in names)
        ]
    return faults


def _linear_layers(model: nn.Module) -> str:
    """Return a sentence that names the linear layers of a model."""
    found = dict.fromkeys(
        name.rpartition(".")[2]
        for name, m in model.named_modules()
        if "Linear" in type(m).__name__ or type(m).__name__ == "Conv1D"
    )
    return (
        f"Its linear layers are called {', '.join(found)}; `target_modules='all-linear'` takes all of them."
        if found
        else "It has no linear layers."
    )


def _trains_tied_embeddings(model: Any, named: Collection[str]) -> bool:
    """Return whether these modules include the input embeddings, and the output embeddings share their weights."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False) or output_embeddings(model) is None:
        return False
    embeddings = model.get_input_embeddings()
    return any(
        m is embeddings and any(f".{name}".endswith(f".{one}") for one in named) for name, m in model.named_modules()
    )


def _guess(key: Any, known: Collection[str]) -> str:
    if key in _SYNONYMS:
        return f" Did you mean `{_SYNONYMS[key]}`?"
    close = difflib.get_close_matches(str(key), known, 1)
    return (
        f" Did you mean `{close[0]}`?" if close else f" The usual keys are {', '.join(DEFAULTS)} and modules_to_save."
    )
