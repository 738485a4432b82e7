"""A lock of the kernel's on an open file, which ends with its process, however that ends."""

import fcntl
import logging

log = logging.getLogger("afd_fast")


def take(file: int, kind: int) -> bool:
    """Whether the lock (fcntl.LOCK_EX or LOCK_SH) of an open file was free. A file system without locks is said and let be."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("this file system has no locks (%s): start no second process in the same folder", error.strerror)
    return True
