"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, in a folder made for it, and put it there once it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".half-{path.name}")
    try:
        write(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
