"""ftaccum: fine-tuning where gradient accumulation is exactly a large batch.

from ftaccum import test_fine_tuning

result = test_fine_tuning(model, train_data=rows, batch_size=4, gradient_accumulation_steps=64)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        CheckpointError,
        DataError,
        DivergedError,
        InexactLossError,
        InexactLossWarning,
        LostProcessError,
        MetricsError,
        OutputWarning,
        PaddingWarning,
        Preempted,
        SettingsError,
    )
    from .fine_tuning import test_fine_tuning
    from .history import Result
    from .metrics import F1, Accuracy, ClassificationMetrics, MeanSquaredError
    from .planning import Plan, plan
    from .tuning import search
    from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "F1",
    "Accuracy",
    "CheckpointError",
    "ClassificationMetrics",
    "DataError",
    "DivergedError",
    "InexactLossError",
    "InexactLossWarning",
    "LostProcessError",
    "MeanSquaredError",
    "MetricsError",
    "OutputWarning",
    "PaddingWarning",
    "Plan",
    "Preempted",
    "Result",
    "SettingsError",
    "Verification",
    "plan",
    "search",
    "test_fine_tuning",
    "verify",
]

# Loaded when first asked for, so that the parts that need no torch start at once.
_HOMES = {
    "errors": (
        *(
            "CheckpointError",
            "DataError",
            "DivergedError",
            "InexactLossError",
            "InexactLossWarning",
            "LostProcessError",
        ),
        *("MetricsError", "OutputWarning", "PaddingWarning", "Preempted", "SettingsError"),
    ),
    "fine_tuning": ("test_fine_tuning",),
    "history": ("Result",),
    "metrics": ("F1", "Accuracy", "ClassificationMetrics", "MeanSquaredError"),
    "planning": ("Plan", "plan"),
    "tuning": ("search",),
    "verification": ("Verification", "verify"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
