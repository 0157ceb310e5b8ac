"""Files changed in one step: whoever reads one sees the old content or the new, never a part."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def put(
    path: Path, data: bytes, *, mode: int | None = None, check: Callable[[], None] = lambda: None
) -> None:
    """Give a file other content, or make the file; a link stays a link.

    Args:
        path: the file, in a folder that is there.
        data: its whole new content.
        mode: permissions; None: as they were, and a new file is its owner's alone.
        check: called at the last moment; what it raises leaves the old content.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    target = Path(os.path.realpath(path))
    if mode is None:
        mode = target.stat().st_mode & 0o7777 if target.exists() else 0o600
    descriptor, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            os.fchmod(descriptor, mode)
        check()
        os.replace(draft, target)
    except BaseException:
        os.unlink(draft)
        raise
