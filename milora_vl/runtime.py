"""The process and its machine: rank, memory, threads, device, and precision of products."""

import ctypes
import json
import logging
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

Work = TypeVar("Work")

PATIENCE = timedelta(days=7)


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
    """Yield a pool of threads that use one core each; jobs not started at its end are canceled."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' setting is also the default of new threads


def process_rank() -> int:
    """Return the number of this process among all of the job, 0 for the main one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes the job has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join_processes() -> None:
    """Connect to the other processes, if a launcher started several; repeated calls do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def is_main_process() -> bool:
    """Return whether this process writes the files of the whole job."""
    return process_rank() == 0


def is_local_main_process() -> bool:
    """Return whether this process writes the files of its computer, such as the cache folder."""
    return process_count() == 1 or int(os.environ.get("LOCAL_RANK", process_rank())) == 0


@cache
def _patient_group() -> Any:
    # NCCL and gloo time out after 10 to 30 minutes; one process may evaluate for longer
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def wait_for_all() -> None:
    """Return when every process of the job has called this, however long that takes."""
    if process_count() > 1:
        dist.barrier(group=_patient_group())


@contextmanager
def main_process_first(*, local: bool = False) -> Iterator[bool]:
    """Run the block in the main process, then in the others, which find what it made.

    If it fails in the main process, the launcher ends the others.

    Args:
        local: Count by computer: the first process of each runs it first.

    Yields:
        Whether this process is one of the first.
    """
    is_first = is_local_main_process() if local else is_main_process()
    if not is_first:
        wait_for_all()
    yield is_first
    if is_first:
        wait_for_all()


def gather_json(value: Any) -> list[Any]:
    """Return the JSON values of all processes, in the order of their ranks, in every process."""
    if process_count() == 1:
        return [value]
    group = _patient_group()
    own = torch.tensor(list(json.dumps(value).encode("utf-8")), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(process_count())]
    dist.all_gather(lengths, torch.tensor([own.numel()]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: own.numel()] = own
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded, group=group)
    pairs = zip(texts, lengths, strict=True)
    return [json.loads(bytes(text[: int(length)].tolist())) for text, length in pairs]


def from_main_process(value: Any) -> Any:
    """Return the main process's JSON value in every process."""
    return gather_json(value if is_main_process() else None)[0]


def ask_all(flag: bool) -> Callable[[], bool]:
    """Start to exchange a flag between processes, which go on working meanwhile.

    Returns:
        A function that waits for the exchange and returns whether any flag is true. Called a step
        later, it need not wait.
    """
    if process_count() == 1:
        return lambda: flag
    said = torch.tensor([int(flag)])
    work = dist.all_reduce(said, op=dist.ReduceOp.MAX, group=_patient_group(), async_op=True)

    def answer() -> bool:
        work.wait()
        return bool(said)

    return answer


def use_one_device(command: str) -> None:
    """Restrict a process without a launcher to one GPU, and warn how to use the others.

    Transformers would otherwise split every batch over all of them (``DataParallel``), which
    averages the losses of unequal parts. Call this before CUDA is initialized.

    Args:
        command: What starts the same work on all GPUs.
    """
    visible = torch.cuda.device_count()
    if visible < 2 or "WORLD_SIZE" in os.environ:
        return
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = first
    logger.warning(
        "%d GPUs are visible, and this is one process: it uses GPU %s alone. For all of them: %s",
        *(visible, first, command),
    )


def to_float64(values: torch.Tensor) -> torch.Tensor:
    """Return values in float64; on the CPU if their device (Apple's mps) lacks float64."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def memory_gib() -> float:
    """Return the memory that is available on this computer, in GiB."""
    return psutil.virtual_memory().available / 2**30


def peak_memory_gib() -> float:
    """Return the largest resident memory of this process so far, in GiB."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


M_TRIM_THRESHOLD = -1  # numbers of malloc.h
M_MMAP_THRESHOLD = -3


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    glibc keeps freed memory between blocks that are still in use. While a 7B model is filled layer
    by layer, with large temporary matrices, that grows to half a GiB.
    """
    if trim := _from_libc("malloc_trim"):
        trim(0)


def keep_freed_memory() -> None:
    """Let this process reuse freed memory instead of returning it, where it can (glibc).

    By default large blocks go back to the system, and every large activation causes page faults
    again. Meant for processes without gradients, which keep what one batch needs.
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
    """Multiply float32 matrices in float32 for a ``with`` block, whatever the process allows.

    Trainers switch on TF32, which keeps 10 bits, or autocast, which keeps 7: too few for factors
    whose product must equal a slice of the weight. Blocks may be nested and may run in several
    threads at once; the earlier settings return when the last of them ends.
    """
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:  # autocast belongs to the thread
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_float32_products)
        yield


class _Float32Products:
    """Turns reduced precision of float32 products off while at least one block is open.

    The settings belong to the process, not to a thread: a block that restored them by itself could
    give TF32 to another thread that is still decomposing.
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
    CUDA; ``backends.mkldnn`` is not listed, because setting it sets the topmost switch instead.
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

    Reading a switch gives the setting in force, inherited or not. So the switch above is changed
    for a moment: only a switch without its own setting follows.
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


Bf16 = bool | Literal["auto"]
"""What a config may ask for: bfloat16 products, float32 products, or the faster of the two."""

BF16_CHOICES = "true, false or auto"
PROBE_ROWS = 512  # rows of a probed product, about the tokens of a small batch
PROBE_SIDE = 2048  # larger layers are probed at this size: the rate rises no further
PROBE_SHAPES = 3  # the most expensive layers; the others hardly change the sum
PROBE_SECONDS = 0.4  # for all probes together; a quick product runs at least twice
WORTHWHILE = 1.05  # bfloat16 rounds to 8 bits, so it has to be clearly faster


@dataclass(frozen=True)
class LayerShape:
    """One kind of linear layer: ``d_out``, ``d_in`` and how many of it the model has."""

    d_out: int
    d_in: int
    count: int


@dataclass(frozen=True)
class Precision:
    """How the products of float32 weights run: in float32, or in bfloat16 under autocast.

    Attributes:
        bf16: Whether autocast to bfloat16 is on.
        reason: Why, for the log.
        gflops: Rate of both dtypes in GFLOP/s; empty if nothing was measured.
    """

    bf16: bool
    reason: str
    gflops: Mapping[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype for ``autocast``; None for no autocast."""
        return torch.bfloat16 if self.bf16 else None


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn "auto" into CUDA when there is one, else the CPU; "cuda" into this process's device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and place.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return place


def autocast(device: torch.device | str, dtype: torch.dtype | None) -> torch.autocast:
    """Return a context of mixed precision on a device; without a dtype it changes nothing."""
    return torch.autocast(
        torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None
    )


def autocast_as(arguments: "TrainingArguments", model: nn.Module) -> torch.autocast:
    """Return the context of the mixed precision that training uses."""
    low = torch.bfloat16 if arguments.bf16 else torch.float16
    device = next(model.parameters()).device
    return autocast(device, low if arguments.bf16 or arguments.fp16 else None)


def count_layer_shapes(model: nn.Module) -> tuple[LayerShape, ...]:
    """Count the linear layers of a model by shape; a model on the meta device will do."""
    counted: Counter[tuple[int, int]] = Counter()
    for name, module in model.named_modules():
        d_out, d_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
        is_linear = isinstance(d_out, int) and isinstance(d_in, int)
        if is_linear and not name.endswith("lm_head"):  # it sees answer tokens alone
            counted[d_out, d_in] += 1
    return tuple(LayerShape(*shape, count) for shape, count in sorted(counted.items()))


@cache
def measure_precisions(shapes: tuple[LayerShape, ...], *, backward: bool) -> dict[str, float]:
    """Time both precisions on the CPU, on layers as large as the model's.

    The products are those of a frozen float32 layer: under autocast its weight is rounded at every
    call, which is part of the cost. Repeated calls return the first result.

    Args:
        shapes: Of the model's layers, from ``count_layer_shapes``.
        backward: Also compute the gradient of the input.

    Returns:
        GFLOP/s of "float32" and "bfloat16".
    """
    costly = sorted(shapes, key=lambda s: s.count * s.d_out * s.d_in, reverse=True)[:PROBE_SHAPES]
    seconds = {torch.float32: 0.0, torch.bfloat16: 0.0}
    operations = 0.0
    generator = torch.Generator().manual_seed(0)  # training's own random numbers stay the same
    for dtype in seconds:  # warm-up: the first gradient of a process starts threads
        _time_product(torch.ones(8, 64, requires_grad=backward), torch.ones(64, 64), dtype, 0.0)
    for shape in costly or [LayerShape(PROBE_SIDE // 2, PROBE_SIDE // 2, 1)]:
        d_out, d_in = min(shape.d_out, PROBE_SIDE), min(shape.d_in, PROBE_SIDE)
        inputs = torch.randn(PROBE_ROWS, d_in, generator=generator).requires_grad_(backward)
        weight = torch.randn(d_out, d_in, generator=generator)
        budget = PROBE_SECONDS / max(len(costly), 1) / len(seconds)
        for dtype in seconds:
            best = _time_product(inputs, weight, dtype, budget)
            seconds[dtype] += shape.count * best
        operations += shape.count * 2 * PROBE_ROWS * d_out * d_in * (1 + backward)
    rates = {dtype: operations / total / 1e9 for dtype, total in seconds.items()}
    return {
        str(dtype).removeprefix("torch."): float(f"{rate:.3g}") for dtype, rate in rates.items()
    }


def _time_product(inputs: Tensor, weight: Tensor, dtype: torch.dtype, budget_s: float) -> float:
    """Return the best time of a product (and of its gradient, if ``inputs`` takes one)."""
    best, calls, end = math.inf, 0, time.perf_counter() + budget_s
    # the first call may include set-up, so call twice unless it is slow anyway
    while calls == 0 or (calls < 2 and best < 0.5) or time.perf_counter() < end:
        started = time.perf_counter()
        with (
            torch.set_grad_enabled(inputs.requires_grad),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            product = nn.functional.linear(inputs, weight)
        if inputs.requires_grad:
            torch.autograd.grad(product, inputs, torch.ones_like(product))
        best = min(best, time.perf_counter() - started)
        calls += 1
    return best


def choose_precision(
    asked: Bf16,
    shapes: Callable[[], tuple[LayerShape, ...]],
    device: torch.device | str,
    *,
    weights: torch.dtype = torch.float32,
    backward: bool = True,
    name: str = "bf16",
) -> Precision:
    """Decide between float32 and bfloat16 products for one model on one device.

    On a CPU both are timed, because bfloat16 is several times faster on some processors and several
    times slower on those without instructions for it. On a GPU "auto" takes bfloat16 where the
    device computes in it.

    Args:
        asked: True, False or "auto".
        shapes: Returns the model's layers; called only if something is measured.
        device: Where the model runs.
        weights: Dtype of the weights; bfloat16 weights always multiply in bfloat16.
        backward: Whether gradients will be computed.
        name: The setting, for the log.

    Raises:
        ValueError: If ``asked`` is something else.
    """
    if not isinstance(asked, bool) and asked != "auto":
        raise ValueError(f"{name} is {asked!r}; choose {BF16_CHOICES}")
    device = torch.device(device)
    if asked is False:
        return Precision(False, f"{name} is off")
    if device.type != "cpu":
        supported = device.type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return Precision(
            asked is True or supported, f"{device.type} {'has' if supported else 'lacks'} bfloat16"
        )
    gflops = dict(measure_precisions(shapes(), backward=backward))
    factor = gflops["bfloat16"] / gflops["float32"]
    rates = f"{gflops['float32']:g} GFLOP/s in float32, {gflops['bfloat16']:g} in bfloat16"
    if weights == torch.bfloat16:
        bf16, setting, remedy = True, "bfloat16 weights", "load them in float32 (dtype float32)"
    else:
        bf16 = asked is True or factor > WORTHWHILE
        setting, remedy = f"{name}: true", f"write {name}: auto"
    if bf16 and factor < 1:
        logger.warning(
            "%s: %.1f times slower than float32 on this CPU (%s); %s",
            *(setting, 1 / factor, rates, remedy),
        )
    return Precision(bf16, rates, gflops)


MUCH_SLOWER = 1.5


def prefer_faster_weights_(model: nn.Module) -> None:
    """Turn bfloat16 weights on a CPU into float32 ones in place, if that is clearly faster here.

    This rounds nothing. Weights that would not fit into memory stay as they are, with a warning.
    """
    first = next(model.parameters())
    kinds = {value.dtype for value in model.parameters()}
    if first.device.type != "cpu" or torch.bfloat16 not in kinds:
        return
    rates = measure_precisions(count_layer_shapes(model), backward=False)
    factor = rates["float32"] / rates["bfloat16"]
    if factor < MUCH_SLOWER:
        return
    needed = 4 * sum(value.numel() for value in model.parameters()) / 2**30
    is_quantized = any(not value.is_floating_point() for value in model.parameters())
    if is_quantized or needed > memory_gib():
        logger.warning("bfloat16 weights: %.1f times slower than float32 on this CPU", factor)
        return
    logger.info("the bfloat16 weights run in float32, %.1f times faster on this CPU", factor)
    model.float()
