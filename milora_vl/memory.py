"""Freed memory: given back to the system, or kept for what comes next."""

import ctypes
import sys
from collections.abc import Callable

M_TRIM_THRESHOLD = -1  # numbers of malloc.h
M_MMAP_THRESHOLD = -3


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    It keeps what lies between blocks still in use. While a model is filled layer by layer, with
    large matrices that come and go, that grows to half a GiB at 7B.
    """
    if trim := _from_libc("malloc_trim"):
        trim(0)


def keep_freed_memory() -> None:
    """Let this process use freed memory again instead of returning it, where it can (glibc).

    Large blocks go back to the system by default, so that every large activation costs page faults
    anew. For processes that compute without gradients: what they keep is what one batch needs.
    """
    if set_option := _from_libc("mallopt"):
        set_option(M_MMAP_THRESHOLD, 1 << 30)
        set_option(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _from_libc(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)  # other C libraries have none
