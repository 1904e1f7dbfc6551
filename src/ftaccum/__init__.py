"""ftaccum: fine-tuning where gradient accumulation is exactly a large batch.

from ftaccum import test_fine_tuning

result = test_fine_tuning(model, train_data=rows, batch_size=4, gradient_accumulation_steps=64)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import callbacks, losses
    from .apps.plan import plan
    from .apps.script import ScriptOptions, run_script
    from .apps.search.api import search
    from .apps.verify.api import verify
    from .apps.verify.report import Verification
    from .bridges.loop.exact_accumulation import ExactAccumulation
    from .bridges.trainer.exact_trainer import exact
    from .data.encode_columns import tokenize_columns
    from .errors import (
        CallbackError,
        CheckpointError,
        DataError,
        DivergedError,
        InexactLossError,
        InexactLossWarning,
        LossScaleWarning,
        LostProcessError,
        MetricsError,
        OutputWarning,
        PaddingWarning,
        Preempted,
        SettingsError,
        TextWarning,
        UntrainedLossWarning,
    )
    from .fine_tuning import test_fine_tuning
    from .metrics import F1, Accuracy, ClassificationMetrics, MeanSquaredError
    from .planning.plan import Plan
    from .runtime.model_wrapper import ModelWrapper
    from .tasks.load import load_task
    from .tasks.model_and_data_options import ModelAndDataOptions
    from .tracking.result import Result

__version__ = "0.1.0"

__all__ = [
    "F1",
    "Accuracy",
    "CallbackError",
    "CheckpointError",
    "ClassificationMetrics",
    "DataError",
    "DivergedError",
    "ExactAccumulation",
    "InexactLossError",
    "InexactLossWarning",
    "LossScaleWarning",
    "LostProcessError",
    "MeanSquaredError",
    "MetricsError",
    "ModelAndDataOptions",
    "ModelWrapper",
    "OutputWarning",
    "PaddingWarning",
    "Plan",
    "Preempted",
    "Result",
    "ScriptOptions",
    "SettingsError",
    "TextWarning",
    "UntrainedLossWarning",
    "Verification",
    "callbacks",
    "exact",
    "load_task",
    "losses",
    "plan",
    "run_script",
    "search",
    "test_fine_tuning",
    "tokenize_columns",
    "verify",
]

# Modules are imported on first use, so that commands that do not need torch start at once.
_MODULES = {
    **dict.fromkeys([name for name in __all__ if name.endswith(("Error", "Warning")) or name == "Preempted"], "errors"),
    **dict.fromkeys(["Accuracy", "ClassificationMetrics", "F1", "MeanSquaredError"], "metrics"),
    "ExactAccumulation": "bridges.loop.exact_accumulation",
    "ModelAndDataOptions": "tasks.model_and_data_options",
    "ModelWrapper": "runtime.model_wrapper",
    "Plan": "planning.plan",
    "Result": "tracking.result",
    "ScriptOptions": "apps.script",
    "Verification": "apps.verify.report",
    "exact": "bridges.trainer.exact_trainer",
    "load_task": "tasks.load",
    "plan": "apps.plan",
    "run_script": "apps.script",
    "search": "apps.search.api",
    "test_fine_tuning": "fine_tuning",
    "tokenize_columns": "data.encode_columns",
    "verify": "apps.verify.api",
}


def __getattr__(name: str) -> Any:
    if name in ("callbacks", "losses"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
