"""Freed memory: given back to the system, or kept for what comes next.

Work in threads: the next item beside the one in use, or several at once on a core each.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import TrainingArguments

Work = TypeVar("Work")


def one_ahead(work: Callable[[str], Work], names: Sequence[str]) -> Iterator[Work]:
    """Yield ``work(name)`` in order, each computed by a second thread while the last is used."""
    with threads_of_one_core(1) as pool:
        coming = None
        for name in names:
            following = pool.submit(work, name)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


@contextmanager
def threads_of_one_core(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads that use one core each; what is not begun when the block ends is dropped."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' setting is also the default of new threads


@contextmanager
def autocast_as(arguments: "TrainingArguments", model: nn.Module) -> Iterator[None]:
    """Run the block in the mixed precision that training uses."""
    device = next(model.parameters()).device.type
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16
    with torch.autocast(device, dtype, enabled=bool(arguments.bf16 or arguments.fp16)):
        yield


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
