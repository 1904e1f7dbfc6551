"""The progress of a run: a bar, or a line every 30 seconds where no bar is drawn."""

import time
from types import TracebackType

from ..runtime.progress_bar import can_draw_bars, print_above_bars, tqdm
from .ledger import WindowEntry

_EVERY = 30.0  # seconds between two lines


class Progress:
    """Shows how many updates are done, and the loss and the norm of the last one whose loss has been read."""

    def __init__(
        self, n_updates: int, *, bar: bool, lines: bool, title: str = "updates", position: int | None = None
    ) -> None:
        """Create the display.

        Args:
            n_updates: number of updates in the whole run.
            bar: whether to draw a bar where bars can be drawn.
            lines: whether to print lines to standard output if there is no bar.
            title: title of the bar.
            position: line of the bar on the screen, if there are several.
        """
        draws = bar and can_draw_bars()
        self._n_updates, self._n_done = n_updates, 0
        self._bar = tqdm(total=n_updates, desc=title, disable=not draws, leave=False, position=position)
        self._prints, self._printed_at = lines and not draws, time.monotonic()
        self._shown = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, n_updates: int = 1) -> None:
        """Count updates that are done."""
        self._n_done += n_updates
        self._bar.update(n_updates)
        if self._prints and time.monotonic() - self._printed_at >= _EVERY:
            self._printed_at = time.monotonic()
            print_above_bars(f"update {self._n_done}/{self._n_updates}{self._shown}")

    def show(self, entry: WindowEntry) -> None:
        """Show the loss and the norm of an update."""
        self._bar.set_postfix(loss=f"{entry.loss:.4f}", norm=f"{entry.grad_norm:.3f}", refresh=False)
        numbers = f"loss {entry.loss:.4f}, norm {entry.grad_norm:.3f}, learning rate {entry.learning_rate:.3g}"
        self._shown = f"; update {entry.window + 1} had {numbers}"
