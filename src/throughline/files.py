"""Files that are there whole or not at all."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what the block wrote there is synced and takes the place of `path` at once.

    OSError names `path` when there is no room, or no right to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")  # several hosts may have processes of one number
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _error_number(error)
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def checksum_of(path: Path) -> str | None:
    """SHA-256 of a file's bytes in hex; None if it is not there."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _error_number(error: Exception) -> int | None:
    """Of an error of the system that a library passes on as text, as safetensors does."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None
