"""Memory that was freed, given back to the system."""

import ctypes
import sys


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    It keeps what lies between blocks still in use. While a model is filled layer by layer, with
    large matrices that come and go, that grows to half a GiB at 7B.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
