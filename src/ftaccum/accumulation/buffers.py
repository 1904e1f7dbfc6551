"""Buffers that forward passes change: the same on all processes before a window, restored where it is undone."""

import torch
from accelerate.utils import broadcast
from torch import nn

from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Buffers, buffers_of

# Buffers of up to so many numbers count as changing, whatever the first window did: a batch norm in a branch that it
# did not take, or an average that begins later, may change afterwards.
_SMALL = 4096


class MovingBuffers:
    """The buffers of a model that forward passes change: all of them, until the first window shows which."""

    def __init__(self, model: nn.Module, process_group: ProcessGroup) -> None:
        self._process_group = process_group
        self._places = buffers_of(model)
        self._is_first_window = True

    def sync(self) -> None:
        """Copy the main process's buffers to all processes, in one collective for each dtype.

        DDP would do so in the first forward pass, which a process may leave before the others enter it.
        """
        if self._process_group.is_single:
            return
        buffers = [module._buffers[name] for module, name in self._places]
        copied = [buffer for buffer in buffers if buffer is not None and buffer.is_contiguous()]
        for dtype in dict.fromkeys(buffer.dtype for buffer in copied):
            group = [buffer for buffer in copied if buffer.dtype == dtype]
            received = broadcast(torch.cat([buffer.flatten() for buffer in group]))
            for buffer, values in zip(group, received.split([b.numel() for b in group]), strict=True):
                buffer.copy_(values.view_as(buffer))

    def snapshot(self) -> Buffers:
        """Return a copy of the buffers, to restore them from."""
        return Buffers.now(self._places)

    def observe(self, before: Buffers, *, has_rows: bool) -> None:
        """Drop the large buffers that the first window with rows left as they were.

        Args:
            before: the snapshot from before the window.
            has_rows: whether this process worked on any row. All processes call this alike.
        """
        if not self._is_first_window or not self._process_group.any(has_rows):
            return
        sizes = [(place, buffer.numel()) for place, (buffer, _) in before.kept.items()]
        self._places = [
            place for place, n in sizes if n <= _SMALL or self._process_group.any(before.moved(*place))
        ]  # fmt: skip
        self._is_first_window = False
