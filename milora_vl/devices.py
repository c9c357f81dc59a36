"""Machines by name: memory and rates of GPUs, and the batch that fits on them.

``parse_machine`` reads what ``milora-vl plan --device`` takes. Nothing here touches a device.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

USABLE_RATIO = 0.92  # of the memory on the label: CUDA's context, ECC, fragments. Assumed


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    The figures are peaks of NVIDIA's data sheets and, for GeForce, of its architecture papers, as
    resellers and HPC centers reprint them; the halves of what those state with sparsity. H100, H200
    and V100 are the SXM boards. No kernel reaches a peak.

    Attributes:
        gib: Memory on the label.
        tflops: Dense 16-bit products with float32 sums, 10^12 operations a second; None: unknown.
        float32_tflops: Float32 products without TF32, which decompositions take; None: unknown.
        bf16: Whether it computes in bfloat16.
    """

    gib: float
    tflops: float | None = None
    float32_tflops: float | None = None
    bf16: bool = True


GPUS = {
    "H200": Gpu(141, 989, 67),
    "H100": Gpu(80, 989, 67),
    "H100-PCIe": Gpu(80, 756, 51),
    "A100-80GB": Gpu(80, 312, 19.5),
    "A100-40GB": Gpu(40, 312, 19.5),
    "L40S": Gpu(48, 362, 91.6),
    "L40": Gpu(48, 181, 90.5),
    "A6000": Gpu(48, 155, 38.7),
    "A40": Gpu(48, 150, 37.4),
    "L4": Gpu(24, 121, 30.3),
    "A10": Gpu(24, 125, 31.2),
    "RTX4090": Gpu(24, 165, 82.6),
    "RTX3090": Gpu(24, 71, 35.6),
    "V100-32GB": Gpu(32, 125, 15.7, bf16=False),
    "V100-16GB": Gpu(16, 125, 15.7, bf16=False),
    "T4": Gpu(16, 65, 8.1, bf16=False),
}


@dataclass(frozen=True)
class Machine:
    """Equal GPUs that train together, one process each.

    Attributes:
        count: How many.
        name: Of their kind, or its memory.
        gpu: Their kind.
    """

    count: int
    name: str
    gpu: Gpu

    @property
    def usable_gib(self) -> float:
        """Memory that a process can fill on one of them."""
        return USABLE_RATIO * self.gpu.gib


def parse_machine(text: str) -> Machine:
    """Read "8x80GB", "1x24GB", a name of ``GPUS``, or a number of them ("4xL40S").

    Case, spaces, dashes and "NVIDIA" do not matter; of several matches the smallest is taken.

    Raises:
        ValueError: If it is none of these; the message lists the names.
    """
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.+)", text.strip(), re.IGNORECASE)
    if found and int(found[1] or 1) > 0:
        count, rest = int(found[1] or 1), found[2]
        if memory := re.fullmatch(r"(\d+(?:\.\d+)?)\s*gi?b", rest.strip(), re.IGNORECASE):
            if float(memory[1]) > 0:
                return Machine(count, f"{memory[1]} GB", Gpu(float(memory[1])))
        elif fitting := [name for name in GPUS if _fits(rest, name)]:
            name = min(fitting, key=lambda one: GPUS[one].gib)
            return Machine(count, name, GPUS[name])
    raise ValueError(
        f"device {text!r}: write a number and a memory (1x24GB, 8x80GB) or a GPU's name "
        f"(8xH100), one of {', '.join(GPUS)}"
    )


def _fits(text: str, name: str) -> bool:
    """Return whether all of one plain name's beginning is the other: "A100" fits "A100-80GB"."""

    def plain(one: str) -> str:
        return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", one.lower())

    return bool(plain(text)) and (
        plain(name) == plain(text) or name.lower().startswith(f"{text.strip().lower()}-")
    )


@dataclass(frozen=True)
class Fit:
    """What of a run fits on a machine.

    Attributes:
        fits: Whether the present settings fit.
        devices: Number of devices.
        batch: Batch per device to use: the configured one if it fits; 0 if none fits.
        largest: The largest batch per device that fits, a power of two.
        accumulation: Micro-batches of ``batch`` in the global batch.
        changes: Overrides that make it fit; empty if none are needed.
    """

    fits: bool
    devices: int
    batch: int
    largest: int
    accumulation: int
    changes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Say whether it fits, the batch that gives the global one, and what to change."""
        found = ["it fits" if self.fits else "it does NOT fit"]
        if self.batch:
            total = self.devices * self.batch * self.accumulation
            found.append(
                f"global batch {total} = {self.devices} devices x {self.batch} x "
                f"{self.accumulation} accumulated; the largest batch per device is {self.largest}"
            )
        else:
            found.append(
                "not even one sample fits with all of the changes below; take a larger GPU, or "
                "lower data.max_length or adapter.r as well"
            )
        return found + ([f"change: {' '.join(self.changes)}"] if self.changes else [])


# Overrides, the cheapest first: the first two hardly change what is learned.
REMEDIES = (
    "training.gradient_checkpointing=true",
    "training.optim=adamw_8bit",
    "model.quantization=nf4",
)


def fit_batch(
    machine: Machine,
    configured: int,
    global_batch: int,
    gib: Callable[[int, tuple[str, ...]], float],
) -> Fit:
    """Find the batch per device for a global batch, and what to change if none fits.

    Args:
        machine: Where the run goes.
        configured: Batch per device of the config.
        global_batch: Samples of one optimizer step.
        gib: (batch, overrides) -> memory of one device.
    """
    usable, devices = machine.usable_gib, machine.count
    sizes = [2**power for power in range(20) if 2**power * devices <= max(global_batch, devices)]
    fits = gib(configured, ()) <= usable
    for length in range(len(REMEDIES) + 1):  # the fewest changes that make one sample fit
        changes = REMEDIES[:length]
        largest = max((size for size in sizes if gib(size, changes) <= usable), default=0)
        if largest:
            break
    else:
        return Fit(False, devices, 0, 0, 0, REMEDIES)
    batch = configured if fits else largest
    if not fits:
        changes = (*changes, f"training.per_device_train_batch_size={largest}")
    accumulation = max(1, round(global_batch / (batch * devices)))
    return Fit(fits, devices, batch, max(largest, batch), accumulation, changes)
