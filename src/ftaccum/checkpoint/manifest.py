"""The files of a checkpoint, and its manifest, written last: the size and checksum of each."""

import hashlib
import json
from pathlib import Path

from .shard_index import shard_files

STATE, LEDGER, OPTIMIZER, PROCESSES = "state.json", "ledger.jsonl", "optimizer.pt", "processes.pt"
WEIGHTS, BUFFERS = "model/model.safetensors", "buffers.safetensors"
BEST, BESIDE = "best.safetensors", "beside.safetensors"  # not in every checkpoint
_REQUIRED = {STATE, LEDGER, OPTIMIZER, PROCESSES}
_WHOLE = {WEIGHTS, BUFFERS}  # of a checkpoint that is not in shards
_NAME = "manifest.json"
_PIECE = 2**20


def seal(folder: Path, n_shards: int = 0) -> None:
    """Write a manifest of all files in the folder.

    Args:
        n_shards: number of processes whose parts of the tensors are in shards; 0 if the tensors are in whole files.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / _NAME]
    listed = {path.relative_to(folder).as_posix(): _listed(path) for path in files}
    shards = {"shards": n_shards} if n_shards else {}
    (folder / _NAME).write_text(json.dumps({**shards, "files": listed}, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """Return a clause on what is wrong with a checkpoint, or None if it is sound.

    Raises:
        OSError: if a file exists but cannot be read at the moment.
    """
    try:
        manifest = json.loads((folder / _NAME).read_text())
        wanted, n_shards = manifest["files"], manifest.get("shards", 0)
        if not isinstance(wanted, dict) or not isinstance(n_shards, int):
            raise TypeError(wanted)
    except FileNotFoundError:
        return f"it has no {_NAME}"
    except (ValueError, KeyError, TypeError):
        return f"its {_NAME} cannot be read"
    of_tensors = {name for process in range(n_shards) for name in shard_files(process)} or _WHOLE
    if missing := sorted((_REQUIRED | of_tensors) - wanted.keys()):
        return f"its {_NAME} does not list {missing[0]}"
    for name, listed in wanted.items():
        try:
            found = _listed(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return f"its {name} is missing"
        if found != listed:
            short = found["bytes"] != listed.get("bytes") if isinstance(listed, dict) else True
            return f"its {name} " + ("has another size" if short else "has other contents") + f" than in its {_NAME}"
    return None


def _listed(path: Path) -> dict[str, int | str]:
    checksum, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            checksum.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": checksum.hexdigest()}
