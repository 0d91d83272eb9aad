"""What went wrong, told to the user in one line; other errors are bugs and keep their traceback."""

import errno

from core.console import one_line

USER_ERRNO = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EROFS,
    errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG,
)  # fmt: skip
FILE_ERRNO = (
    errno.EIO, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.EINVAL, errno.ENOTEMPTY, errno.ESTALE,
    errno.ENXIO, errno.ENODEV, errno.ETXTBSY,
)  # fmt: skip
"""The same where the error names a file."""
NO_SPACE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
}
"""Errors of a full disk, and what to do about each."""


class UsageError(ValueError):
    """The command line cannot be read."""


def is_users(error: Exception) -> bool:
    """Return whether the user can mend an error: one of our own types, or a file that cannot be opened or written."""
    if isinstance(error, OSError):
        return error.errno in USER_ERRNO or (error.filename is not None and error.errno in FILE_ERRNO)
    if isinstance(error, MemoryError | RuntimeError):
        from core.engine.memory import is_memory

        return is_memory(error)
    return type(error).__module__.startswith("core.")


def message(error: Exception) -> str:
    """Return what to tell the user, in one line."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        hint = f"; {NO_SPACE[error.errno]}, what was saved before is intact" if error.errno in NO_SPACE else ""
        return one_line(f"{where}{error.strerror}{hint}")
    if isinstance(error, MemoryError | RuntimeError):
        from core.engine.memory import memory_message

        return memory_message(error)
    return one_line(error)
