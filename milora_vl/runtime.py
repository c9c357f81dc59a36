"""The process and its device: memory, threads that work ahead, and products in full float32."""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

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


AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 for a ``with`` block, whatever the process has allowed.

    Trainers switch on TF32, which keeps 10 bits, or autocast, which keeps 7: too few for factors
    that must multiply back to a slice of the weight. Blocks may be nested and may run in several
    threads at once; what was allowed before is allowed again when the last of them ends.
    """
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:  # autocast belongs to the thread
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_float32_products)
        yield


class _Float32Products:
    """Turns reduced precision of float32 products off while at least one block is open.

    The settings are the process's own, not a thread's: a block that restored them alone could give
    TF32 back to another thread that is still decomposing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open_blocks = 0
        self._before: list[str] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._open_blocks == 0:
                self._before = _forbid_reduced_products()
            self._open_blocks += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._open_blocks -= 1
            if self._open_blocks == 0:
                _restore_products(self._before)


_float32_products = _Float32Products()


def _product_switches() -> list[tuple[Any, ...]]:
    """Return the switch for products of every backend, followed by those it inherits from.

    Empty before torch 2.9, which had one switch for all. ``backends.cudnn`` is the switch of all
    CUDA; ``backends.mkldnn`` is left out, because setting it sets the topmost switch instead.
    """
    backends = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return []
    return [
        (backends.cuda.matmul, backends.cudnn, backends),
        (backends.mkldnn.matmul, backends),
    ]


def _forbid_reduced_products() -> list[str]:
    """Switch to float32 products; return what ``_restore_products`` needs."""
    switches = _product_switches()
    if not switches:
        before = [torch.get_float32_matmul_precision()]
        torch.set_float32_matmul_precision("highest")
        return before
    # Never torch.get_float32_matmul_precision() here: it raises once a newer switch was used.
    before = [_own_setting(switch, *above) for switch, *above in switches]
    for switch, *_ in switches:
        switch.fp32_precision = "ieee"
    return before


def _restore_products(before: list[str]) -> None:
    switches = _product_switches()
    if not switches:
        torch.set_float32_matmul_precision(before[0])
    for (switch, *_), setting in zip(switches, before, strict=False):
        switch.fp32_precision = setting


def _own_setting(switch: Any, *above: Any) -> str:
    """Return what a switch itself is set to; "none" if it follows the switches above it.

    Reading one gives the setting in force, inherited or not. So the next switch above is turned for
    a moment: only a switch without a setting of its own follows.
    """
    in_force = switch.fp32_precision
    if not above:
        return in_force
    parent, *rest = above
    parent_setting = _own_setting(parent, *rest)
    parent.fp32_precision = "tf32" if in_force == "ieee" else "ieee"
    follows = switch.fp32_precision != in_force
    parent.fp32_precision = parent_setting
    return "none" if follows else in_force
