"""Order of samples in an epoch: batches of one modality and of similar true lengths."""

import random
from collections.abc import Sequence


def group_by_length(
    lengths: Sequence[int],
    has_image: Sequence[bool],
    batch_size: int,
    seed: int,
    epoch: int = 0,
    window: int = 50,
) -> list[int]:
    """Order samples so that consecutive batches pad little and hold one modality.

    Samples are shuffled, cut into windows of ``window`` batches, sorted by length inside a window
    and cut into batches; then the batches are shuffled. The batch with the longest sample comes
    first, so that a lack of memory shows at the first step; left-over samples, the only batch that
    may mix modalities, come last.

    Args:
        lengths: True lengths in tokens, image tokens included.
        has_image: For each sample, whether it holds an image.
        batch_size: Samples a step takes over all devices.
        seed: Same seed and epoch, same order, on every machine.
        epoch: Changes the order from epoch to epoch.
        window: Batches sorted together; more pads less and shuffles less.

    Returns:
        A permutation of ``range(len(lengths))``.

    Raises:
        ValueError: If the two lists differ in length or ``batch_size`` or ``window`` is below 1.
    """
    if len(lengths) != len(has_image):
        raise ValueError(f"{len(lengths)} lengths but {len(has_image)} modality flags")
    if batch_size < 1 or window < 1:
        raise ValueError(f"batch_size and window must be at least 1: {batch_size}, {window}")
    generator = random.Random(f"{seed}/{epoch}")
    batches: list[list[int]] = []
    rest: list[int] = []
    for modality in (True, False):
        members = [index for index, flag in enumerate(has_image) if bool(flag) == modality]
        generator.shuffle(members)
        whole = len(members) - len(members) % batch_size
        rest += members[whole:]
        for start in range(0, whole, window * batch_size):
            group = members[start : min(start + window * batch_size, whole)]
            group.sort(key=lambda index: lengths[index], reverse=True)
            batches += [group[at : at + batch_size] for at in range(0, len(group), batch_size)]
    generator.shuffle(batches)
    if batches:
        longest = max(range(len(batches)), key=lambda at: max(lengths[i] for i in batches[at]))
        batches[0], batches[longest] = batches[longest], batches[0]
    rest.sort(key=lambda index: lengths[index], reverse=True)
    return [index for batch in batches for index in batch] + rest
