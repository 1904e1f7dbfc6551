"""Find the data that a name stands for: files, a saved folder, a folder of images, or a data set on the hub."""

import difflib
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError, listed
from .data_file import ALLOWED, KINDS, DataFile

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_SAVED = ("dataset_info.json", "dataset_dict.json")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PARTS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "valid": "validation",
    "validation": "validation", "val": "validation", "dev": "validation", "eval": "validation",
}  # fmt: skip
_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """The data that a name stands for.

    Attributes:
        kind: "files", "saved", "images" or "hub".
        name: the name, without its configuration and split.
        split: the split to read.
        config: the configuration of a data set on the hub; None for its default.
        files: the files, if they are files.
        has_split: whether the name of a folder of images chooses the split.
        argument: the argument that named it, for messages.
    """

    kind: str
    name: str
    split: str
    argument: str
    config: str | None = None
    files: tuple[DataFile, ...] = ()
    has_split: bool = False


def find_source(named: str, split: str, argument: str) -> Source:
    """Return the data that a name stands for.

    Names that look like paths are not looked up on the hub: those with a suffix of a data file, those that begin with
    ".", "/" or "~", and those with more than one "/".

    Args:
        named: a path, a pattern of paths, or `name[:config][@split]`.
        split: the split to read if the name has none.

    Raises:
        DataError: if there is no such file or folder, or nothing in it can be read.
    """
    path, given = _split_off(named, split)
    if path.is_dir():
        return _in_folder(path, given, argument, named)
    if path.exists():
        file = _checked(DataFile(path, argument))
        if str(path) != str(Path(named).expanduser()) and not file.kind.startswith("JSON"):
            raise file.error(f"a {file.kind} file has no splits, so it has none named {given!r}", "Give only the file.")
        return Source("files", named, given, argument, files=(file,))
    if "://" in named:
        raise DataError(f"`{argument}` {named!r} is an address. Download the file, and give its path.")
    if glob.has_magic(str(path)):
        found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True)) if Path(each).is_file()]
        if not found:
            raise DataError(f"`{argument}` {named!r} matches no file. Check the pattern and the folder it starts from.")
        return Source("files", named, given, argument, files=_of_one_kind(found, argument, named))
    name, _, config = str(named).rpartition("@")[0 if "@" in named else 2].partition(":")
    if _looks_like_path(named, path) or not HUB_NAME.fullmatch(name):
        raise _missing(path, argument)
    return Source("hub", name, given, argument, config or None)


def did_you_mean(path: Path, *, folders_only: bool = False) -> str:
    """Return a question with the names in the same folder that are most like a path's; empty if there are none."""
    folder = path.parent
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    near = [folder / name for name in difflib.get_close_matches(path.name, names, n=3, cutoff=0.7)]
    named = [repr(str(each)) for each in near if each.is_dir() or not folders_only]
    return f"Did you mean {' or '.join(named)}?" if named else ""


def _split_off(named: str, split: str) -> tuple[Path, str]:
    """Return the path in a name, and its split. A file whose own name contains @ is a path as it is."""
    whole = Path(named).expanduser()
    if whole.exists() or "@" not in named:
        return whole, split
    name, _, given = named.rpartition("@")
    return Path(name).expanduser(), given or split


def _looks_like_path(named: str, path: Path) -> bool:
    has_suffix = bool(DataFile(path, "").kind)
    return has_suffix or named.startswith((".", "/", "~")) or named.count("/") > 1 or "\\" in named


def _missing(path: Path, argument: str) -> DataError:
    parent = path.parent
    if not parent.is_dir():
        return DataError(f"`{argument}` {str(path)!r}: there is no folder {str(parent)!r}. Check the path.")
    hint = did_you_mean(path) or "Check the path."
    return DataError(f"`{argument}` {str(path)!r}: there is no such file. {hint}")


def _checked(file: DataFile) -> DataFile:
    if not file.kind:
        has = f"has the suffix {file.suffix}" if file.suffix else "has no suffix"
        raise file.error(f"it {has}, which tells no kind of data", f"Rename it. Allowed are {ALLOWED}.")
    return file


def _in_folder(folder: Path, split: str, argument: str, named: str) -> Source:
    if any((folder / name).exists() for name in _SAVED):
        return Source("saved", str(folder), split, argument)
    found = list(_visible(folder))
    if any(path.suffix.lower() in IMAGES for path in found):
        has_split = folder != Path(named).expanduser()
        return Source("images", str(folder), split, argument, has_split=has_split)
    data = [path for path in found if DataFile(path, argument).kind]
    if not data:
        inside = listed(sorted(path.name for path in found), _SHOWN) or "nothing"
        raise DataError(
            f"`{argument}` {named!r} is a folder without data files; it contains {inside}. Give a folder with files of "
            f"one kind ({', '.join(KINDS)}), one with images in a folder for each class, or one that `save_to_disk` "
            "wrote."
        )
    return Source(
        "files",
        named,
        split,
        argument,
        files=_of_one_kind(_part(folder, data, split, named, argument), argument, named),
    )


def _visible(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its sub-folders, in order, without hidden ones."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts):
            yield path


def _part(folder: Path, files: Sequence[Path], split: str, named: str, argument: str) -> list[Path]:
    """Return the files of a split, if their names or their folders' have words such as train and test; else all."""
    parts = {path: _part_of(path.relative_to(folder)) for path in files}
    found = {part for part in parts.values() if part}
    if len(found) < 2:
        return list(files)
    wanted = _PARTS.get(split, split)
    chosen = [path for path, part in parts.items() if part == wanted]
    if not chosen:
        raise DataError(
            f"`{argument}` {named!r} has files for {', '.join(sorted(found))}, but not for {split!r}. Give a file, or "
            f"the part as {named}@{min(found)}."
        )
    return chosen


def _part_of(path: Path) -> str | None:
    words = [word for part in reversed(path.parts) for word in re.split(r"[\W_]+", part.lower())]
    return next((_PARTS[word] for word in words if word in _PARTS), None)


def _of_one_kind(paths: Sequence[Path], argument: str, named: str) -> tuple[DataFile, ...]:
    files = [_checked(DataFile(path, argument)) for path in paths]
    kinds = {file.kind: file for file in reversed(files)}
    if len(kinds) > 1:
        examples = ", ".join(f"{file.path.name} ({kind})" for kind, file in sorted(kinds.items()))
        raise DataError(
            f"`{argument}` {named!r} has files of several kinds: {examples}. Choose one kind with a pattern, such as "
            f"'{Path(named) / ('*' + min(kinds.items())[1].suffix)}'."
        )
    return tuple(files)
