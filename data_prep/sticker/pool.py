"""A few processes that apply one function to many rows, results in order."""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

N_PROCESSES = 2
_MIN_ROWS = 64
_work: dict[str, Callable[[Any], Any]] = {}


@contextmanager
def worker_pool(
    function: Callable[[Any], Any],
) -> Iterator[Callable[[Sequence[Any]], Iterable[Any]]]:
    """Give a ``map`` over ``N_PROCESSES`` processes that exist while the block runs.

    Few rows are done in this process. On Linux the processes are forked, so that ``function`` and
    the data it holds are shared instead of copied; elsewhere both must be picklable.

    Args:
        function: Of one row.
    """
    method = "fork" if sys.platform == "linux" else "spawn"
    pools = []

    def results(rows: Sequence[Any]) -> Iterable[Any]:
        if len(rows) < _MIN_ROWS:
            return map(function, rows)
        context = multiprocessing.get_context(method)
        pools.append(context.Pool(N_PROCESSES, _start, (function,)))
        return pools[-1].imap(_apply, rows, chunksize=16)

    try:
        yield results
    finally:
        for pool in pools:
            pool.terminate()
            pool.join()


def _start(function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _work["function"] = function


def _apply(row: Any) -> Any:
    return _work["function"](row)
