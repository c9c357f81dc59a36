"""Parts of HTML reports: page, figure, picture; nothing is loaded from elsewhere."""

import base64
import html
import io
import logging
from collections.abc import Sequence
from pathlib import Path

from milora_vl.data.images import load_image
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.items import Item

logger = logging.getLogger(__name__)

_PICTURE_PX = 180
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;text-align:right}
th:first-child,td:first-child{text-align:left}th{border-bottom:2px solid #999}
tr.sub td{color:#666;font-size:.9rem;padding-top:0;padding-bottom:0}td small{color:#666}
img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:.8rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:1rem}
.card{border:1px solid #ddd;border-radius:.4rem;padding:.7rem;font-size:.85rem}
.card p{margin:.3rem 0;white-space:pre-line}.right::before{content:"✓ "}.wrong::before{content:"✗ "}
.right{color:#005a8c}.wrong{color:#a03c00}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole HTML page; ``title`` is text, ``parts`` are HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def figure(encoded: str, text: str) -> str:
    """Return a figure from base64 PNG; ``text`` describes it."""
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{encoded}"></p>'


def read_items(name: str, data_dir: Path | None) -> dict[str, Item]:
    """Return a bench's items by id, nothing if its files are not to be had; then a warning."""
    try:
        return {item.id: item for item in BENCHES[name].load(data_dir)}
    except (OSError, ValueError) as error:
        logger.warning("the report has no pictures of %s: %s", name, error)
        return {}


def thumbnail(item: Item) -> str:
    """Return an item's picture, small, or the reason why it cannot be shown."""
    if item.image is None:
        return ""
    try:
        picture = load_image(io.BytesIO(item.image.read()))
    except (OSError, ValueError) as error:
        return f"<p>{html.escape(str(error))}</p>"
    picture.thumbnail((_PICTURE_PX, _PICTURE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
