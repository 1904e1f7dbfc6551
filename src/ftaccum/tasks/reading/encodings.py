"""The encoding of a text file, found from its bytes."""

import codecs
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from ...runtime.log import logger
from .data_file import DataFile

_CHUNK = 1 << 20
_UTF8, _REPLACEMENT = "utf-8-sig", "\ufffd"  # utf-8-sig reads files with and without a byte-order mark
_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_GIVE = "Give the right one with `--encoding`, such as `--encoding cp1252`"


@dataclass(frozen=True)
class Scan:
    """The findings of one pass over the bytes of a file.

    Attributes:
        digest: a hash of the bytes.
        mark: the encoding that a byte-order mark declares; empty if there is none, or that of UTF-8.
        n_good: characters outside ASCII that are valid UTF-8.
        n_bad: places that are not valid UTF-8.
        nul_line: the line of the first zero byte; None if there is none.
    """

    digest: str
    mark: str
    n_good: int
    n_bad: int
    nul_line: int | None


def scan(file: DataFile, limit: int | None) -> Scan:
    """Read a file once and describe its bytes.

    Args:
        limit: the number of MiB to read from its beginning; None for all.

    Raises:
        DataError: if the file is empty or cannot be read.
    """
    file.check_signature()
    digest, decoder = hashlib.blake2b(digest_size=16), codecs.getincrementaldecoder("utf-8")("replace")
    n_good = n_bad = n_lines = n_chunks = 0
    mark, nul_line = None, None
    with file.open() as stream:
        while (limit is None or n_chunks < limit) and (chunk := stream.read(_CHUNK)):
            n_chunks += 1
            digest.update(chunk)
            if mark is None:
                mark = next((name for start, name in _MARKS.items() if chunk.startswith(start)), "")
            if nul_line is None and (place := chunk.find(b"\0")) >= 0:
                nul_line = n_lines + chunk.count(b"\n", 0, place) + 1
            n_lines += chunk.count(b"\n")
            if not chunk.isascii() or decoder.getstate()[0]:
                text = decoder.decode(chunk)
                bad = text.count(_REPLACEMENT) - chunk.count(_REPLACEMENT.encode())
                n_bad, n_good = n_bad + bad, n_good + len(text) - len(text.encode("ascii", "ignore")) - bad
        if limit is None:
            n_bad += len(decoder.decode(b"", final=True))
    if mark is None:
        raise file.empty()
    return Scan(digest.hexdigest(), mark, n_good, n_bad, nul_line)


def choose_encoding(file: DataFile, found: Scan, asked: str | None) -> str:
    """Return the encoding of a file: the one asked for, or the one that its bytes show.

    Raises:
        DataError: if the file has zero bytes, or is UTF-8 with damaged characters.
    """
    if asked is not None and codecs.lookup(asked).name == "utf-8":
        asked = _UTF8
    encoding = asked or found.mark or (_UTF8 if not found.n_bad else "cp1252")
    if found.nul_line is not None and "a".encode(encoding.removesuffix("-sig")) == b"a":
        raise file.error(
            "it has a zero byte, which text does not have",
            "If it is UTF-16, give `--encoding utf-16-le`; otherwise remove the zero bytes.",
            f"line {found.nul_line}",
        )
    if asked or found.mark or not found.n_bad:
        return encoding
    if found.n_good > found.n_bad:
        raise undecodable(file, _UTF8)
    if first_fault(file, encoding) is not None:
        encoding = "latin-1"
    fault = first_fault(file, _UTF8)
    where = f" (byte 0x{fault[0]:02x} in line {fault[1]})" if fault else ""
    logger.info(
        f"`{file.argument}` {str(file.path)!r} is not UTF-8{where}, so it is read as {encoding}. {_GIVE}, if letters "
        "look wrong."
    )
    return encoding


@contextmanager
def open_text(file: DataFile, encoding: str, newline: str | None = "") -> Iterator[TextIO]:
    """Open a file for reading its text.

    Raises:
        DataError: if the file cannot be read or decoded. It names the byte and the line.
    """
    with file.open() as stream:
        text = io.TextIOWrapper(stream, encoding=encoding, newline=newline)
        try:
            yield text
        except UnicodeError as error:
            raise undecodable(file, encoding) from error
        finally:
            text.detach()


def undecodable(file: DataFile, encoding: str) -> Exception:
    """Return the error for the first byte of a file that is not in an encoding."""
    name = encoding.removesuffix("-sig")
    fault = first_fault(file, encoding)
    if fault is None:
        return file.error(f"it does not begin as {name} text does", f"{_GIVE}.")
    byte, line, reason = fault
    return file.error(f"byte 0x{byte:02x} is not {name} text ({reason})", f"{_GIVE}, or fix the line.", f"line {line}")


def first_fault(file: DataFile, encoding: str) -> tuple[int, int, str] | None:
    """Return the first byte that cannot be decoded, its line and the decoder's reason; None if there is none."""
    decoder, n_lines = codecs.getincrementaldecoder(encoding)(), 0
    with file.open() as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                n_lines += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(error.encoding, "ignore")
                return error.object[error.start], n_lines + before.count("\n") + 1, error.reason
            if not chunk:
                return None
