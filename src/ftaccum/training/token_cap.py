"""The cap on the tokens of a micro-batch: the rows that it can be kept for, and its value if `max_tokens` is "auto"."""

from ..data.collator import RowCollator
from ..data.dataset import Rows
from ..data.validation import check_lengths, check_size_in_tokens
from ..errors import SettingsError
from ..objective.report import ExactnessReport
from ..settings.runtime import Runtime
from .config import RunConfig


def check_token_cap(config: RunConfig, rows: Rows, row_collator: RowCollator, *, is_stream: bool) -> None:
    """Check that micro-batches of these rows can be kept below `max_tokens`, if it is set.

    Raises:
        DataError: if they cannot.
        SettingsError: if `max_tokens` is "auto" and the training data are a stream.
    """
    runtime = config.runtime
    if runtime.limits_tokens_automatically:
        if is_stream:
            raise SettingsError(
                [
                    "`max_tokens` is 'auto', which needs the longest training row, but `train_data` is a stream, whose "
                    "later rows are not known before training. Set `max_tokens` to a number, such as `batch_size` × "
                    "`max_length`, or omit it."
                ]
            )
        decodes = bool(getattr(config.components.configuration, "is_encoder_decoder", False))
        check_size_in_tokens(rows, row_collator, decodes=decodes)
        check_lengths(rows, None, row_collator)
    elif runtime.token_limit is not None:
        check_lengths(rows, runtime.token_limit, row_collator)


def longest_width(runtime: Runtime, rows: Rows, row_collator: RowCollator) -> int | None:
    """Return the width of a batch of the longest training row, if `max_tokens` is "auto", else None."""
    if not runtime.limits_tokens_automatically:
        return None
    lengths = rows.lengths()
    assert lengths is not None, "checked with the rows"
    return row_collator.width(max(lengths))


def token_cap(runtime: Runtime, batch_size: int, longest: int | None, report: ExactnessReport) -> int | None:
    """Return the most tokens of a micro-batch, padding included; None if only rows are limited.

    Args:
        batch_size: the resolved rows per micro-batch on one process.
        longest: the width of a batch of the longest training row.

    Raises:
        SettingsError: if `max_tokens` is "auto" and the loss of a row depends on the rows of its micro-batch.
    """
    if not runtime.limits_tokens_automatically:
        return runtime.token_limit
    if report.mixes_rows:
        mixing = report.in_training.mixing
        named = f" ({', '.join(mixing)})" if mixing else ""
        raise SettingsError(
            [
                f"`max_tokens` is 'auto', but the loss of a row depends on the other rows of its micro-batch{named}, "
                "so more rows per micro-batch would change the result. Omit `max_tokens`: `batch_size` then limits "
                "the rows."
            ]
        )
    assert longest is not None, "measured with the data"
    return batch_size * longest
