"""Buffers that forward passes change: synced over processes before each window, and restored if it is undone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..runtime.fingerprint import bytes_of, fingerprint, in_memory, is_expanded
from ..runtime.log import logger
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Buffers, buffers_of, unset_buffers_of

Place = tuple[nn.Module, str]

# Buffers of at most this many numbers are copied before each window, since that costs almost nothing.
_SMALL = 4096
# Total bytes of unchanged large buffers to keep copies of, in case they first change in a window that is undone.
_KEPT = 2**28


@dataclass(frozen=True)
class _UnchangedBuffer:
    """A large buffer that has not changed so far.

    Attributes:
        buffer: the buffer.
        fingerprint: the fingerprint of its bytes.
        value: a copy; None if that would be too large.
    """

    buffer: Tensor
    fingerprint: Tensor
    value: Tensor | None


class MovingBuffers:
    """The buffers of the model and the loss that forward passes may change.

    All small buffers count as moving, and each large one does after its first change. Moving buffers are copied before
    each window. The others are only read to detect changes, which takes a fraction of the time of one pass.
    """

    def __init__(self, model: nn.Module, process_group: ProcessGroup, modules: Sequence[nn.Module] = ()) -> None:
        """Args:
        modules: further modules that compute the loss.
        """
        self._modules, self._process_group = (model, *modules), process_group
        self._specs: dict[str, Any] | None = None
        self._shared: list[Place] = []  # on several processes: buffers with the same name, shape and dtype on all
        self._unchanged: dict[Place, _UnchangedBuffer] = {}
        self._seen: set[Place] = set()  # large ones that are, or were, in `_unchanged`

    def sync(self) -> None:
        """Copy the main process's buffers to all processes, in one collective, as bytes (gloo has no int16 or float8).

        DDP would copy them in the first forward pass, but a process that fails may leave that pass before the others
        enter it. Buffers whose shapes differ between processes, such as tables that grow with the longest row, are not
        copied.
        """
        if self._process_group.is_single:
            return
        self._agree()
        places = [place for place in self._shared if place not in self._unchanged]
        if not places:
            return
        parts = [bytes_of(in_memory(_at(place))) for place in places]
        values = torch.cat(parts)
        distributed.broadcast(values, src=0)
        received = values.split([len(part) for part in parts])
        with torch.no_grad():
            for place, own in zip(places, received, strict=True):
                value = own.clone().view(_at(place).dtype).view(in_memory(_at(place)).shape)  # clones are aligned
                _write(place, value.expand(_at(place).shape))

    def snapshot(self) -> Buffers:
        """Return a copy of the buffers to restore them from. Those that have never changed share their first copy."""
        places = buffers_of(*self._modules)
        # `_unchanged` must have the same order on all processes, but modules may register buffers in different orders.
        self._watch(places if self._process_group.is_single else self._shared)
        copied = Buffers.now([place for place in places if place not in self._unchanged])
        unchanged = {p: (s.buffer, s.value) for p, s in self._unchanged.items() if s.value is not None}
        return Buffers(copied.kept | unchanged, unset_buffers_of(*self._modules))

    def moved(self) -> Tensor:
        """Return which large buffers that had not changed before have changed, without waiting for the device."""
        flags = [_has_moved(place, entry) for place, entry in self._unchanged.items()]
        return torch.stack([flag.to(flags[0].device) for flag in flags]) if flags else torch.zeros(0)

    def observe(self, moved: Sequence[bool], *, undone: bool) -> None:
        """Treat large buffers that have changed as moving from now on. All processes must make the same call.

        Args:
            moved: for each element that `moved` returned, whether it was true on any process.
            undone: whether the window in which they changed was undone.
        """
        for (place, entry), has_moved in zip(list(self._unchanged.items()), moved, strict=True):
            if has_moved:
                del self._unchanged[place]
                if undone and entry.value is None:
                    _warn_of_lost(place, entry)

    def restore(self, start: Buffers) -> None:
        """Restore the buffers at the start of a window that is undone, and warn of those that have no copy."""
        for place, entry in self._unchanged.items():
            if entry.value is None and _has_moved(place, entry):
                _warn_of_lost(place, entry)
        start.restore()

    def _watch(self, places: Sequence[Place]) -> None:
        """Add new large buffers to those that have not changed."""
        room = _KEPT - sum(entry.value.nbytes for entry in self._unchanged.values() if entry.value is not None)
        for place in places:
            buffer = _at(place)
            if buffer.numel() <= _SMALL or place in self._seen:
                continue
            self._seen.add(place)
            is_kept = buffer.nbytes <= room
            room -= buffer.nbytes if is_kept else 0
            self._unchanged[place] = _UnchangedBuffer(buffer, fingerprint(buffer), buffer.clone() if is_kept else None)

    def _agree(self) -> None:
        """Find the buffers with the same name, shape and dtype on all processes; again when these change on any."""
        seen: set[nn.Module] = set()
        places = {
            f"{prefix}.{name}": (module, name)
            for n, root in enumerate(self._modules)
            for prefix, module in root.named_modules(seen, str(n))
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.layout is torch.strided
        }
        specs = {
            name: (tuple(_at(place).shape), tuple(in_memory(_at(place)).shape), str(_at(place).dtype))
            for name, place in places.items()
        }
        if not self._process_group.any(specs != self._specs):
            return
        self._specs = specs
        everyone: list[Mapping[str, Any]] = self._process_group.gather(specs)
        equal = [name for name, spec in everyone[0].items() if all(other.get(name) == spec for other in everyone)]
        self._shared = [places[name] for name in equal]
        self._unchanged = {place: entry for place, entry in self._unchanged.items() if place in self._shared}


class SyncedBuffers:
    """Buffers that are synced over processes but not copied, for passes that the caller undoes."""

    def __init__(self, buffers: MovingBuffers) -> None:
        self.sync = buffers.sync

    def snapshot(self) -> Buffers:
        return Buffers({})

    def moved(self) -> Tensor:
        return torch.zeros(0)

    def observe(self, moved: Sequence[bool], *, undone: bool) -> None:
        pass

    def restore(self, start: Buffers) -> None:
        pass


def _warn_of_lost(place: Place, entry: _UnchangedBuffer) -> None:
    logger.warning(
        f"The buffer {place[1]!r} of {type(place[0]).__name__} first changed in an update that was skipped or "
        f"retried, and it cannot be restored: it had not changed before, so no copy of its "
        f"{entry.buffer.nbytes:,} bytes was kept. From now on, it is copied before each update."
    )


def _at(place: Place) -> Tensor:
    buffer = place[0]._buffers[place[1]]
    assert buffer is not None, "only buffers that are set are listed"
    return buffer


def _write(place: Place, value: Tensor) -> None:
    """Set the values of a buffer: in place or, for an expanded one, by replacing it if they differ."""
    buffer = _at(place)
    if not is_expanded(buffer):
        buffer.copy_(value)
    elif not torch.equal(buffer, value):
        place[0]._buffers[place[1]] = value


def _has_moved(place: Place, entry: _UnchangedBuffer) -> Tensor:
    buffer = place[0]._buffers[place[1]]
    if buffer is not entry.buffer:
        return torch.ones((), dtype=torch.bool, device=entry.buffer.device)
    return fingerprint(buffer) != entry.fingerprint
