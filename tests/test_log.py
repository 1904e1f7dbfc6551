"""Results go to standard output, and messages to the `ftaccum` logger."""

import logging
import subprocess
import sys
from typing import Any

import pytest

from ftaccum.runtime.log import logger, run_logging

RUN = """
import logging, sys
import torch
from torch import nn
from ftaccum import test_fine_tuning

if sys.argv[1] == "configured":
    logging.basicConfig(filename=sys.argv[2], level=logging.INFO, format="%(name)s %(levelname)s %(message)s")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)


rows = [(torch.tensor([1.0, 2.0]), torch.tensor([float("nan") if n == 6 else 1.0])) for n in range(16)]
test_fine_tuning(
    Net(), train_data=rows, loss_fn=nn.functional.mse_loss, n_epochs=1, progress=False, validation_split=0.0,
)
"""


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_results_go_to_standard_output_and_messages_to_standard_error() -> None:
    done = run("plain")
    assert "FINE-TUNING TEST" in done.stdout
    assert "final loss" in done.stdout
    assert "is skipped" not in done.stdout
    assert "is skipped: its loss is nan" in done.stderr


@pytest.mark.slow
def test_messages_go_to_the_handlers_of_the_application(tmp_path: Any) -> None:
    done = run("configured", tmp_path / "log")
    assert "is skipped" not in done.stdout + done.stderr
    assert "ftaccum WARNING Update" in (tmp_path / "log").read_text()


def test_the_logger_is_as_before_after_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    before = logger.level, logger.disabled, list(logger.handlers), logger.isEnabledFor(logging.INFO)
    with run_logging(enabled=True):
        logger.info("seen")
    with run_logging(enabled=False):
        logger.warning("dropped")
    assert (logger.level, logger.disabled, list(logger.handlers), logger.isEnabledFor(logging.INFO)) == before
    assert capsys.readouterr().err == "seen\n"


def test_the_log_level_of_the_application_is_respected() -> None:
    handler = logging.NullHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    try:
        with run_logging(enabled=True):
            assert logger.level == logging.ERROR
            assert logger.handlers == [handler]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
