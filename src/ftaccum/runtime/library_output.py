"""Silence what other libraries print about things that ftaccum does on purpose, or reports itself."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as transformers_logging

from .progress_bar import can_draw_bars

_FUTURE_BUFFERS = "`broadcast_buffers` is deprecated"
_ALL_USED = "find_unused_parameters=True was specified"
_LOAD_REPORT = " LOAD REPORT"


@contextmanager
def library_bars(*, shown: bool) -> Iterator[None]:
    """Hide the bars of `datasets`, Transformers and the hub until exit, unless `shown` and they can be drawn."""
    if shown and can_draw_bars():
        yield
        return
    states = (
        (not datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
        # Transformers switches the hub's bars as well, so they are restored after its own.
        (not are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars),
        (
            transformers_logging.is_progress_bar_enabled(),
            transformers_logging.disable_progress_bar,
            transformers_logging.enable_progress_bar,
        ),
    )
    with ExitStack() as stack:
        for enabled, disable, enable in states:
            disable()
            stack.callback(enable if enabled else disable)
        yield


@contextmanager
def load_report_withheld() -> Iterator[None]:
    """Withhold Transformers' table of new and unused weights. If loading fails, log it: the error refers to it."""
    logger, withheld = logging.getLogger("transformers.modeling_utils"), []

    def passes(record: logging.LogRecord) -> bool:
        if _LOAD_REPORT not in str(record.msg):
            return True
        withheld.append(record)
        return False

    logger.addFilter(passes)
    try:
        yield
    except BaseException:
        logger.removeFilter(passes)
        for record in withheld:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(passes)


@contextmanager
def ddp_warnings_silenced(accelerator: Accelerator) -> Iterator[None]:
    """Silence what torch says about the arguments that ftaccum gives to DDP on purpose, while it wraps a model.

    Other warnings of torch, and those about the user's own use of DDP, are not affected.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_FUTURE_BUFFERS, category=FutureWarning)
        if accelerator.num_processes > 1:
            _use_up_warning(accelerator.device)
        yield


class _Call(torch.autograd.Function):
    """A function whose warnings torch hands to Python, even if they come from C++ code that would print them."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None]) -> None:  # noqa: ARG004
        call()


def _use_up_warning(device: torch.device) -> None:
    """Make DDP notice where Python can silence it that all weights of a model are used. It warns once per process.

    DDP would print it from C++ in the first pass, past Python's filters. All processes must call this.
    """
    model = DistributedDataParallel(nn.LayerNorm(1).to(device), find_unused_parameters=True)  # draws no random numbers
    with model.no_sync():  # so that the forward pass does not warn itself
        output = model(torch.zeros(1, 1, device=device))
    warnings.filterwarnings("ignore", message=_ALL_USED)
    _Call.apply(lambda: model.reducer.prepare_for_backward([output]))
