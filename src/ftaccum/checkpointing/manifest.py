"""What the files of a checkpoint must be: a list of their sizes and checksums, written last."""

import hashlib
import json
from pathlib import Path

_NAME = "manifest.json"
_PIECE = 2**20


def seal(folder: Path) -> None:
    """Lists every file in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / _NAME]
    listed = {path.relative_to(folder).as_posix(): _listed(path) for path in files}
    (folder / _NAME).write_text(json.dumps({"files": listed}, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in half a sentence, or None for a sound one."""
    try:
        wanted = json.loads((folder / _NAME).read_text())["files"]
        assert isinstance(wanted, dict)
    except FileNotFoundError:
        return f"it has no {_NAME}"
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return f"its {_NAME} cannot be read"
    for name, listed in wanted.items():
        try:
            found = _listed(folder / name)
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror})"
        if found != listed:
            short = found["bytes"] != listed.get("bytes") if isinstance(listed, dict) else True
            return f"its {name} " + ("has another size" if short else "has other contents") + f" than its {_NAME} says"
    return None


def _listed(path: Path) -> dict[str, int | str]:
    checksum, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            checksum.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": checksum.hexdigest()}
