"""A run's folder belongs to one process at a time: a lock that its death gives back."""

from __future__ import annotations

import errno
import os
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from altprop import CheckpointError


class Lock:
    """A lock on a file, until `close` or the end of the process. `held` is false where the file
    system has no locks.

    **Arguments:** `wait`, whether to wait for another process that holds it.

    **Raises:** `CheckpointError` if another process holds it, `OSError` if there can be no file.
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        if path.is_symlink():
            path.unlink()  # of a folder of links: the lock must be of this one
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        self.held = True
        try:
            flock(self._file, LOCK_EX if wait else LOCK_EX | LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.close()
                raise CheckpointError(
                    f"{path.parent} is in use by another process: wait until it ends, or stop it "
                    "(it saves first)"
                ) from None
            self.held = False

    def close(self) -> None:
        """Give the lock back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
