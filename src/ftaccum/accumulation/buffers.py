"""Buffers that forward passes change: the same on all processes before a window, restored where it is undone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from ..runtime.log import logger
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import Buffers, buffers_of, bytes_of, fingerprint, in_memory, is_expanded, unset_buffers_of

Place = tuple[nn.Module, str]

# Buffers of up to so many numbers count as moving from the start: to copy them costs nothing.
_SMALL = 4096
# Bytes of large buffers that a copy is kept of, in case they begin to move in a window that is undone.
_KEPT = 2**28


@dataclass(frozen=True)
class _Still:
    """A large buffer that has not moved so far.

    Attributes:
        fingerprint: of its bytes.
        value: a copy; None where that would be too large.
    """

    buffer: Tensor
    fingerprint: Tensor
    value: Tensor | None


class MovingBuffers:
    """The buffers of model and loss that forward passes change: the small ones, and each large one once it has moved.

    Large buffers are read once a window, which takes a fraction of the time of one pass, and not copied.
    """

    def __init__(self, model: nn.Module, process_group: ProcessGroup, modules: Sequence[nn.Module] = ()) -> None:
        """Args:
        modules: those that compute the loss besides the model.
        """
        self._modules, self._process_group = (model, *modules), process_group
        self._specs: dict[str, Any] | None = None
        self._shared: list[Place] = []  # on several processes: buffers of one name, shape and dtype on all
        self._still: dict[Place, _Still] = {}
        self._seen: set[Place] = set()  # large ones that are, or were, in `_still`

    def sync(self) -> None:
        """Copy the main process's buffers to all processes, in one collective: as bytes, since gloo takes no int16 and
        no float8.

        DDP would do so in the first forward pass, which a process may leave before the others enter it. Buffers of
        another shape on another process (tables that grow with the longest row seen) stay each process's own.
        """
        if self._process_group.is_single:
            return
        self._agree()
        places = [place for place in self._shared if place not in self._still]
        if not places:
            return
        parts = [bytes_of(in_memory(_at(place))) for place in places]
        received = broadcast(torch.cat(parts)).split([len(part) for part in parts])
        with torch.no_grad():
            for place, values in zip(places, received, strict=True):
                value = values.clone().view(_at(place).dtype).view(in_memory(_at(place)).shape)  # clones are aligned
                _write(place, value.expand(_at(place).shape))

    def snapshot(self) -> Buffers:
        """Return a copy of the buffers, to restore them from. Of those that have not moved so far, it is the first."""
        places = buffers_of(*self._modules)
        # The order of the still ones is the same on all processes, which a lazily registered one's place may not be.
        self._watch(places if self._process_group.is_single else self._shared)
        copied = Buffers.now([place for place in places if place not in self._still])
        still = {p: (s.buffer, s.value) for p, s in self._still.items() if s.value is not None}
        return Buffers(copied.kept | still, unset_buffers_of(*self._modules))

    def moved(self) -> Tensor:
        """Return for each large buffer that had not moved before whether it has now, without waiting for the device."""
        flags = [_has_moved(place, still) for place, still in self._still.items()]
        return torch.stack([flag.to(flags[0].device) for flag in flags]) if flags else torch.zeros(0)

    def observe(self, moved: Sequence[bool], *, undone: bool) -> None:
        """Count large buffers as moving from now on.

        Args:
            moved: what `moved` said, on any process. All processes call this alike.
            undone: whether the window in which they moved was undone.
        """
        for (place, still), has_moved in zip(list(self._still.items()), moved, strict=True):
            if has_moved:
                del self._still[place]
                if undone:
                    _warn_if_lost(place, still)

    def restore(self, start: Buffers) -> None:
        """Restore the buffers of a window that is run again, and warn of those that cannot be."""
        for place, still in self._still.items():
            if still.value is None and _has_moved(place, still):
                _warn_if_lost(place, still)
        start.restore()

    def _watch(self, places: Sequence[Place]) -> None:
        """Take large buffers for still that were not there before."""
        room = _KEPT - sum(still.value.nbytes for still in self._still.values() if still.value is not None)
        for place in places:
            buffer = _at(place)
            if buffer.numel() <= _SMALL or place in self._seen:
                continue
            self._seen.add(place)
            is_kept = buffer.nbytes <= room
            room -= buffer.nbytes if is_kept else 0
            self._still[place] = _Still(buffer, fingerprint(buffer), buffer.clone() if is_kept else None)

    def _agree(self) -> None:
        """Find out which buffers are alike on all processes, whenever they have changed on one."""
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
        alike = [name for name, spec in everyone[0].items() if all(other.get(name) == spec for other in everyone)]
        self._shared = [places[name] for name in alike]
        self._still = {place: still for place, still in self._still.items() if place in self._shared}


class SyncedBuffers:
    """The buffers of passes that are undone by whoever asks for them: the same on all processes, and not copied."""

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


def _warn_if_lost(place: Place, still: _Still) -> None:
    if still.value is None:
        logger.warning(
            f"The buffer {place[1]!r} of {type(place[0]).__name__} first changed in an update that was undone, and "
            f"stays as that update left it: it is too large ({still.buffer.nbytes:,} bytes) for a copy to have been "
            "kept. From now on it is copied before each update."
        )


def _at(place: Place) -> Tensor:
    buffer = place[0]._buffers[place[1]]
    assert buffer is not None, "looked at when the places were listed"
    return buffer


def _write(place: Place, value: Tensor) -> None:
    """Change a buffer in place, or where one number of it stands for several, put another in its place."""
    buffer = _at(place)
    if not is_expanded(buffer):
        buffer.copy_(value)
    elif not torch.equal(buffer, value):
        place[0]._buffers[place[1]] = value


def _has_moved(place: Place, still: _Still) -> Tensor:
    buffer = place[0]._buffers[place[1]]
    if buffer is not still.buffer:
        return torch.ones((), dtype=torch.bool, device=still.buffer.device)
    return fingerprint(buffer) != still.fingerprint
