# SPDX-License-Identifier: Apache-2.0
"""Small files of others, read whole: only regular ones, and none without end."""

import errno
import os
import stat
from pathlib import Path

MOST = 2**28  # bytes: the largest tokenizers and indices are a tenth of it


def read_bytes(path: Path, most: int = MOST) -> bytes:
    """What a file holds. A pipe would be waited for, and a device read for ever, so they are refused.

    Raises:
        OSError: it cannot be opened or read, is no regular file, or holds more than `most` bytes.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123 - a descriptor
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "expected a regular file", str(path))
        content = file.read(min(found.st_size, most) + 1)  # as much is set aside before the first byte is read
    if len(content) > most:
        raise OSError(errno.EFBIG, f"expected at most {most:,} bytes", str(path))
    return content
