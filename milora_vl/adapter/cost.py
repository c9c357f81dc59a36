"""What starting and training an adapter will take: formulas, and one short measurement."""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from milora_vl.adapter.gram import multiply, pack
from milora_vl.adapter.minor_svd import KRYLOV_MAX_RANK_RATIO, KRYLOV_MIN_SIDE

GIB = 1024**3
PROBE_SIDE = 1024
PROBE_SECONDS = 0.3
NF4_BYTES = 0.516  # a weight in NF4 with its doubly quantised scales
LIBRARIES_GIB = 0.7  # resident memory of Python with torch and transformers imported
# Shares of the measured matrix-product rate, and seconds beside it: `scripts/bench/plan.py` prints
# them as measured, docs/decisions.md says what was found.
KRYLOV_EFFICIENCY = 0.65
KRYLOV_SECONDS = 0.017  # a layer, whatever its size: many steps that are too small for the products
EXACT_EFFICIENCY = 0.35
CPU_TRAINING_EFFICIENCY = 0.35
ACCELERATOR_TRAINING_EFFICIENCY = 0.4  # assumed: no GPU was at hand
VALUE_SECONDS = 10e-9  # a weight: digests, certificate, copies
NF4_SECONDS = 22e-9  # a weight: read, W_p, quantised


Method = Literal["auto", "exact", "krylov", "none"]


@dataclass(frozen=True)
class Shape:
    """One kind of linear layer: d_out, d_in and how many of it the model has."""

    d_out: int
    d_in: int
    count: int


def measure_flops(
    dtype: torch.dtype, device: torch.device | str = "cpu", *, packed: bool = False
) -> float:
    """Return floating-point operations per second of a square matrix product, here and now.

    ``packed``: of the product that decompositions use, see ``milora_vl.adapter.gram``.

    A product of side ``PROBE_SIDE`` is repeated for ``PROBE_SECONDS``; the best time counts, so
    that other work on the machine disturbs little.
    """
    left = torch.randn(PROBE_SIDE, PROBE_SIDE, device=device).to(dtype)
    right = pack(left) if packed else left
    best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        product = multiply(right, left) if packed else left @ right
        float(product[0, 0])  # waits for an accelerator
        best = min(best, time.perf_counter() - started)
    return 2 * PROBE_SIDE**3 / best


def uses_krylov(shape: Shape, r: int, method: Method) -> bool:
    """Return whether ``minor_svd`` takes the Krylov method for a layer."""
    side = min(shape.d_out, shape.d_in)
    worthwhile = side >= KRYLOV_MIN_SIDE and r <= side * KRYLOV_MAX_RANK_RATIO
    return method == "krylov" or (method == "auto" and worthwhile)


def decomposition_flops(shape: Shape, r: int, krylov: bool) -> float:
    """Return operations to start one layer, with M >= N its sides.

    Exact: 4 M N^2 + 22 N^3 for the full decomposition (Golub and Van Loan's count with both sets of
    vectors). Krylov, width w = r + max(16, r / 4), a space of d = 4 w: Gram 1.25 M N^2 (panels of
    the upper triangle), two Cholesky factors 2 N^3 / 3, six solves 24 N^2 w, and products and
    orthogonalisation 4 M N d + 4 M d^2. Both: 6 M N r for products that the certificate checks.
    """
    m, n = max(shape.d_out, shape.d_in), min(shape.d_out, shape.d_in)
    checks = 6 * m * n * r
    if not krylov:
        return 4 * m * n**2 + 22 * n**3 + checks
    width = r + max(16, r // 4)
    space = 4 * width
    gram = 1.25 * m * n**2 + 2 * n**3 / 3
    return gram + 24 * n**2 * width + 4 * m * n * space + 4 * m * space**2 + checks


def init_seconds(
    shapes: list[Shape], r: int, method: Method, flops: float, *, quantised: bool = False
) -> float:
    """Estimate the seconds to start all layers.

    Args:
        shapes: Of the layers.
        r: Adapter rank.
        method: Of decomposition; "none": nothing is decomposed.
        flops: Operations per second of a packed float32 matrix product.
        quantised: Whether the residual is quantised afterwards.
    """
    seconds = 0.0
    for shape in shapes:
        krylov = uses_krylov(shape, r, method)
        work = decomposition_flops(shape, r, krylov) if method != "none" else 0.0
        efficiency = KRYLOV_EFFICIENCY if krylov else EXACT_EFFICIENCY
        rest = shape.d_out * shape.d_in * (VALUE_SECONDS + NF4_SECONDS * quantised)
        if krylov and work:
            rest += KRYLOV_SECONDS
        seconds += shape.count * (work / (efficiency * flops) + rest)
    return seconds


def init_workspace_gib(shapes: list[Shape], r: int) -> float:
    """Estimate the largest workspace beside the model: one layer at a time, float32.

    Three copies of the weight (itself, the slice, W_p), its three short-side squares (Gram, factor,
    shifted factor) or singular vectors, and a Krylov space on both sides.
    """
    largest = 0
    for shape in shapes:
        m, n = max(shape.d_out, shape.d_in), min(shape.d_out, shape.d_in)
        largest = max(largest, 4 * (3 * m * n + 3 * n * n + 8 * r * (m + n)))
    return largest / GIB


@dataclass(frozen=True)
class TrainingLoad:
    """What one micro-batch holds.

    Attributes:
        samples: Samples in it.
        tokens: Tokens a sample, image tokens included.
        images: Pictures a sample, 0 to 1 or more.
        patches: Patches the tower computes for one picture.
    """

    samples: int
    tokens: float
    images: float
    patches: int


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters and sides that the estimates need.

    Attributes:
        language_model: Parameters of the decoder's layers (no embeddings, no head).
        tower: Parameters of the vision tower.
        total: All parameters.
        adapter: Trainable parameters of the adapter.
        frozen: Those of an anchor that takes part.
        projector: Trainable parameters of the projector.
        layers: Decoder layers.
        hidden: Hidden size D.
        intermediate: MLP size I.
        heads: Attention heads.
    """

    language_model: int
    tower: int
    total: int
    adapter: int
    frozen: int
    projector: int
    layers: int
    hidden: int
    intermediate: int
    heads: int = 0


def bytes_per_weight(size: ModelSize, float_bytes: int, in_4_bits: bool) -> float:
    """Return bytes of a base weight, on average; 4 bits are for the decoder's layers alone."""
    decoder = NF4_BYTES if in_4_bits else float_bytes
    rest = size.total - size.language_model
    return (size.language_model * decoder + rest * float_bytes) / size.total


def step_flops(size: ModelSize, load: TrainingLoad) -> float:
    """Return operations of one micro-batch, forward and backward.

    A token costs 2 operations a parameter forward and 2 backward through frozen weights (the
    gradient of the input), 6 through trained ones; attention adds 6 T D a layer (causal, both
    ways); the tower runs forward only. The output layer sees answer tokens alone and is left out.
    """
    per_token = 4 * (size.language_model + size.frozen) + 6 * size.adapter
    per_token += 6 * load.tokens * size.hidden * size.layers
    per_picture = 2 * size.tower * load.patches + 6 * size.projector * load.patches
    return load.samples * (load.tokens * per_token + load.images * per_picture)


def training_gib(
    size: ModelSize,
    load: TrainingLoad,
    weight_bytes: float,
    *,
    low: bool,
    checkpointing: bool,
    eager: bool = False,
) -> float:
    """Estimate the memory of training.

    Weights; float32 adapters, their gradients and two Adam moments (16 bytes a trained number, 4
    for the anchor); and activations: 14 D + 5 I numbers a token and layer (norms, projections,
    attention, gate and up), in the dtype of the products; with gradient checkpointing 1 D a layer
    and one layer in full. Eager attention keeps its T^2 probabilities a head and layer, in float32
    and in the dtype of the products. Autocast keeps copies of the decoder's float32 weights.

    Args:
        size: Of the model.
        load: Of one micro-batch.
        weight_bytes: Bytes of one base weight.
        low: Whether products run in 16 bits.
        checkpointing: Whether activations are computed again in the backward pass.
        eager: Whether attention is the eager one.
    """
    fixed = size.total * weight_bytes + 16 * (size.adapter + size.projector)
    fixed += 4 * size.frozen
    width = 14 * size.hidden + 5 * size.intermediate
    layers = size.layers * (size.hidden if checkpointing else width) + width * checkpointing
    narrow = 2 if low else 4
    activations = load.samples * load.tokens * layers * narrow
    if eager:
        kept = 1 if checkpointing else size.layers
        activations += load.samples * size.heads * load.tokens**2 * kept * (4 + narrow)
    if low and weight_bytes == 4:
        fixed += size.language_model * narrow
    return (fixed + activations) / GIB + LIBRARIES_GIB
