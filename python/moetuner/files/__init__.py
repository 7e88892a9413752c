"""Files: written whole or not at all, named in their errors."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetuner._checks import MissingArgumentError
from moetuner._texts import line, printable

# Bytes of a file that is held whole in memory: the largest placement has a tenth.
LONGEST_TEXT = 1 << 29
# Temporary files are hidden and have what they become, a random part and this in their names.
TEMPORARY = ".moetuner"
LONGEST_STEM = 50


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it on success, vanishes on failure.

    A link stays, and its target is replaced. An existing file keeps its mode. A path that is no
    regular file (a pipe, a device, an open descriptor such as ``/dev/stdout``) gets the bytes in
    the end. Temporary files that killed processes left behind are deleted.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        if is_stream(path):
            with tempfile.TemporaryDirectory(prefix="moetuner-") as folder:
                temporary = Path(folder) / "stream"
                yield temporary
                _write_through(temporary, path)
            return
        target = Path(os.path.realpath(path))
        before = None
        with suppress(FileNotFoundError):
            before = target.stat()
        if before is not None and stat.S_ISDIR(before.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        delete_left_behind(target.parent, glob.escape(target.name[:LONGEST_STEM]))
        temporary, lock = _make_beside(target, 0o666 if before is None else 0o600)
        try:
            yield temporary
            if before is not None:
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    with suppress(PermissionError):
                        os.chown(temporary, before.st_uid, before.st_gid)
                temporary.chmod(stat.S_IMODE(before.st_mode))
            _sync(temporary)
            temporary.replace(target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(lock)
    except OSError as error:
        # An error of another file names that file.
        named = None if error.filename is None else str(error.filename)
        if named not in (None, str(temporary), str(path)) and not named.endswith(TEMPORARY):
            raise
        text = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, text, str(path)) from error


def same_file(a: str | Path, b: str | Path) -> bool:
    """Return whether two paths name one regular file, or would if it existed."""
    try:
        status, other_status = Path(a).stat(), Path(b).stat()
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)
    return stat.S_ISREG(status.st_mode) and os.path.samestat(status, other_status)


def descriptor_of(path: str | Path) -> int | None:
    """Return the open descriptor of this process that a path names, as ``/dev/stdout`` does."""
    descriptors = f"/proc/{os.getpid()}/fd"
    target = Path.cwd() / path
    for _ in range(40):  # as many links as Linux follows
        folder = Path(os.path.realpath(target.parent))
        if str(folder) == descriptors and target.name.isdigit():
            return int(target.name)
        target = folder / target.name
        if not target.is_symlink():
            return None
        target = folder / target.readlink()
    return None


def is_stream(path: Path) -> bool:
    """Return whether a path is a pipe, a device or an open descriptor, which need no suffix."""
    if descriptor_of(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _write_through(source: Path, path: Path) -> None:
    number = descriptor_of(path)
    # Opened anew, a file behind a descriptor would be written from its beginning.
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    target = os.open(path, os.O_WRONLY | os.O_NOCTTY) if number is None else os.dup(number)
    with source.open("rb") as from_file, os.fdopen(target, "wb") as to_file:
        shutil.copyfileobj(from_file, to_file)


def _make_beside(target: Path, mode: int) -> tuple[Path, int]:
    """Make a temporary file and lock it: the lock shows that its process lives.

    Before it is locked, another process may take it for one that was left behind, and delete it.
    """
    while True:
        name = f".{target.name[:LONGEST_STEM]}.{secrets.token_hex(4)}{TEMPORARY}"
        temporary = target.parent / name
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except FileExistsError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # that process has it, and deletes it now
            os.close(handle)
            continue
        except OSError:  # not every file system has locks, and without one nothing is deleted
            return temporary, handle
        if temporary.exists():
            return temporary, handle
        os.close(handle)  # it was deleted before it was locked


def delete_left_behind(folder: Path, names: str) -> None:
    """Delete temporary files of dead processes, whose locks are free.

    ``names`` is a pattern for the names of the files that they were to replace.
    """
    with suppress(OSError):
        for path in [*folder.glob(f".{names}.{8 * '[0-9a-f]'}{TEMPORARY}")]:
            with suppress(OSError):
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(handle)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk, as far as its file system can say so."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the path in front of an error in the file's content, in one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, EOFError) as error:
        text = str(error).removeprefix(f"{path}: ") or type(error).__name__
        # Some of it may be the content of the file, of any length and with any control character.
        if isinstance(error, MissingArgumentError):  # other errors name fields of the file
            names = error.arguments
            raise MissingArgumentError(printable(text), *names, place=line(str(path))) from None
        raise ValueError(f"{line(str(path))}: {printable(text)}") from None


def size_of(path: Path) -> int:
    """Return the size of a regular file; others would block, or could not be read twice."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path}: must be a file, got a directory")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: must be a regular file")
    return status.st_size


def read_whole(path: str | Path, longest: int = LONGEST_TEXT) -> bytes:
    """Read a small file into memory."""
    path = Path(path)
    size = size_of(path)
    if size > longest:
        raise ValueError(f"{path}: must have at most {longest} bytes, got {size}")
    with path.open("rb") as file:
        return file.read(size)
