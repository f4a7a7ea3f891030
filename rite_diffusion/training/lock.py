"""A lock file that the operating system unlocks when its process ends.

`flock` on POSIX, `msvcrt.locking` on Windows. A killed process leaves the file behind, unlocked;
its content, the process number, is for messages only. On file systems without locks (some network
mounts) `acquire` returns False.
"""

import errno
import os
import sys
import time
from pathlib import Path

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
TRIES = 20  # to lock: `is_locked` of another process holds a lock for a moment
PAUSE = 0.05  # seconds between tries

if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int, shared: bool) -> None:
        """Lock a file; BlockingIOError where another process holds the lock."""
        os.lseek(
            descriptor, 1 << 30, os.SEEK_SET
        )  # a byte past the content, as locked bytes cannot be read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from None
else:
    import fcntl

    def _try_lock(descriptor: int, shared: bool) -> None:
        """Lock a file; BlockingIOError where another descriptor holds the lock."""
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


class Lock:
    """A lock file that this process holds from `acquire` to `release`."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; returns False where the file system has no locks.

        BlockingIOError where another process holds it.
        """
        for left in reversed(range(TRIES)):
            descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                locked = _locked(descriptor)
                if _is_at(descriptor, self.path):
                    os.ftruncate(descriptor, 0)
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    os.write(descriptor, str(os.getpid()).encode())
                    self._descriptor = descriptor
                    return locked
            except BlockingIOError:
                if not left:
                    raise
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
            time.sleep(PAUSE)
        raise BlockingIOError(errno.EAGAIN, "the lock file is replaced again and again")

    def owner(self) -> str:
        """The number of the process that took the lock last, empty where unknown."""
        try:
            return self.path.read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            return ""

    def release(self) -> None:
        """Release the lock and delete its file."""
        if self._descriptor is None:
            return
        if sys.platform != "win32":  # there an open file cannot be deleted, and may stay
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None


def _locked(descriptor: int) -> bool:
    try:
        _try_lock(descriptor, shared=False)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`; a release may have deleted it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock file at `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except PermissionError:  # of another user, who may hold it
        return True
    try:
        _try_lock(descriptor, shared=True)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    finally:
        os.close(descriptor)
    return False


def is_in_use(run: Path) -> bool:
    """Whether a process holds the lock of a run folder."""
    return is_locked(run / "lock")
