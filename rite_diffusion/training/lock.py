"""A lock that the operating system holds for a process and lets go of when that process ends.

`flock` on POSIX, `msvcrt.locking` on Windows. The file stays behind when a process is killed, and
means nothing then: what it says is for readers only. A file system without locks (some network
mounts) is used without one; the caller is told.
"""

import errno
import os
import sys
import time
from pathlib import Path

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
PATIENCE = 20  # tries: whoever asks whether a lock is held holds it for a moment
PAUSE = 0.05  # seconds between two

if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int, shared: bool) -> None:
        """BlockingIOError where another process holds it."""
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a byte that nobody reads: locks bar readers
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from None
else:
    import fcntl

    def _try_lock(descriptor: int, shared: bool) -> None:
        """BlockingIOError where another process, or another descriptor of this one, holds it."""
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


class Lock:
    """A lock file that this process holds from `acquire` to `release`."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False where the file system has none. BlockingIOError where it is held."""
        for left in reversed(range(PATIENCE)):
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
        raise BlockingIOError(errno.EAGAIN, "the lock file comes and goes")

    def owner(self) -> str:
        """The number of the process that took the lock last, empty where it is not known."""
        try:
            return self.path.read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            return ""

    def release(self) -> None:
        """Let go of the lock and take its file away."""
        if self._descriptor is None:
            return
        if sys.platform != "win32":  # there an open file cannot be taken away, and may stay
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
    """Whether the open file is still the one at `path`: its last owner takes it away."""
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
    except PermissionError:  # somebody else's, who may be at work
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
    """Whether some process works in a run folder."""
    return is_locked(run / "lock")
