"""`exact` with versions of Transformers whose Trainer would divide its loss."""

import pytest
import transformers
from transformers import Trainer

from ftaccum import SettingsError, exact


def test_older_versions_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga", raising=False)
    monkeypatch.setitem(vars(transformers), "__version__", "5.18.0")
    with pytest.raises(SettingsError, match=r"needs transformers 5\.19 or newer, but 5\.18\.0 is installed"):
        exact(Trainer)
