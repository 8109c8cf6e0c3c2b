"""Ask the C library to keep freed memory: large fresh tensors cost as much in page faults as in computing."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # <malloc.h>


def keep_memory() -> bool:
    """Tell glibc's allocator to reuse large blocks instead of returning them to the system after every use.

    Same effect as starting Python with ``MALLOC_MMAP_MAX_=0`` and a huge ``MALLOC_TRIM_THRESHOLD_``; call it once, before
    training on a CPU. Memory once used stays with the process.

    Returns:
        True when it took effect, False where the C library is not glibc (musl, macOS, Windows).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018 - only glibc has it
    except (OSError, AttributeError):
        return False
    return bool(
        libc.mallopt(_M_MMAP_MAX, 0)
        and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        and libc.mallopt(_M_TOP_PAD, 64 * 1024 * 1024)
    )
