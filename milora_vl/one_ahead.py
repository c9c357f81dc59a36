"""Work in threads: the next item beside the one in use, or several at once on a core each."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

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
