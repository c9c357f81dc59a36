"""The ATTRIBUTION file that goes beside a built set."""

from data_prep.sticker_sources import Catalogue


def attribution_text(catalogue: Catalogue) -> str:
    """Return Markdown that names author, package, version and licence of every source used.

    Args:
        catalogue: What the set was made from.
    """
    lines = [
        "# Attribution of this StickerVQA set",
        "",
        "The pictures are composed from the drawings, photos, digits and tables below: cut out,",
        "scaled, mirrored and put on plain backgrounds. Share pictures under the licences named",
        "(CC-BY and CC-BY-SA ask for this notice; CC-BY-SA and GPL-2 also bind what is made from",
        "them). Scores on the set are StickerVQA scores, not MMBench, POPE or VQA scores.",
        "",
    ]
    if not catalogue.used:
        lines.append("All pictures were drawn in code; there is nothing to attribute.")
    else:
        lines += ["| part | package | version | author | licence |", "|---|---|---|---|---|"]
        lines += [
            f"| {each.name} | {each.package} ({each.registry}) | {each.version} | {each.author} "
            f"| {each.licence} |"
            for each in catalogue.used
        ]
    return "\n".join(lines) + "\n"
