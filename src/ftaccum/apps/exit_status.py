"""The exit statuses of the `ftaccum` command."""

OK = 0
FAILED = 1  # training diverged, an output could not be written, a search found nothing, or accumulating is not exact
BAD_INPUT = 2
INTERRUPTED = 130
