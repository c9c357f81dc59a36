"""Names that are a folder here or an id on the model hub, and the folder that they stand for.

``snapshot_download`` fails at once without a connection. The loaders of transformers and PEFT ask
for each file again and again, half a minute in all, so the hub is asked here first.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from milora_vl.model.load_errors import LoadError, explain

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_id(name: Path | str) -> bool:
    """Tell whether a name can be an id on the hub, and is not plainly a folder that is missing.

    ``runs/demo`` is a folder, not an id, where there is a folder ``runs``.
    """
    text = str(name)
    if Path(text).exists() or not HUB_ID.fullmatch(text) or text.startswith("."):
        return False
    parent = Path(text).parent
    return parent == Path() or not parent.is_dir()


def fetch_folder(
    name: Path | str, patterns: Sequence[str], *, revision: str | None = None, what: str = "model"
) -> Path:
    """Return a folder as given, or that of a hub id with the files that match.

    Args:
        name: Folder or hub id.
        patterns: File names to fetch, ``*`` stands for anything.
        revision: Of the hub id.
        what: What to say is missing.

    Raises:
        LoadError: If it is neither a folder here nor an id that is cached or can be fetched.
    """
    if Path(name).exists():
        return Path(name)
    if not is_hub_id(name):
        raise LoadError(f"{name}: no such folder, and no hub id; give the folder of the {what}")
    import huggingface_hub

    try:
        fetched = huggingface_hub.snapshot_download(
            str(name), revision=revision, allow_patterns=list(patterns)
        )
    except (OSError, ValueError) as error:
        raise explain(str(name), error, revision) from error
    return Path(fetched)
