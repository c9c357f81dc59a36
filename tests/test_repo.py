"""Laws of the repository itself: direction of imports, file tree, links, what the README says."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A layer may import itself and those before it; files of the package's top level count as layers.
ORDER = [
    {"constants", "errors", "files", "runtime"},
    {"config"},
    {"data", "model"},
    {"adapter"},
    {"devices", "export", "plan"},
    {"training"},
    {"eval"},
    {"environment", "inference", "serve"},
    {"forecast", "run_folder", "stages"},
    {"pipeline"},
    {"cli"},
]
PACKAGE = sorted((ROOT / "milora_vl").rglob("*.py"))


def layer_of(module: str) -> int | None:
    for index, names in enumerate(ORDER):
        if module in names:
            return index
    return None


def imported_modules(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *[f"{node.module}.{alias.name}" for alias in node.names]]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("milora_vl.")}
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = layer_of(path.relative_to(ROOT / "milora_vl").parts[0].removesuffix(".py"))
    if own is None:  # __init__ and __main__ of the package
        return
    for module in imported_modules(path.read_text(encoding="utf-8")):
        used = layer_of(module)
        assert used is not None, f"{path.name} imports {module}, which is in no layer"
        assert used <= own, f"{path.name} imports {module}, a later layer"


def test_conventions_are_written_once() -> None:
    for path in PACKAGE:
        if path.name == "constants.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            is_ignore = (
                isinstance(node, ast.UnaryOp)
                and isinstance(node.op, ast.USub)
                and isinstance(node.operand, ast.Constant)
                and node.operand.value == 100
            )
            assert not is_ignore, f"{path}: write IGNORE_INDEX"
            if isinstance(node, ast.Constant) and node.value == "<image>":
                raise AssertionError(f"{path}:{node.lineno}: write IMAGE_TOKEN")


def test_minor_svd_and_encode_see_no_config() -> None:
    for name in ("adapter/minor_svd.py", "data/encode.py"):
        names = {
            alias.name
            for node in ast.walk(ast.parse((ROOT / "milora_vl" / name).read_text("utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module == "milora_vl.config"
            for alias in node.names
        }
        assert not {n for n in names if "Config" in n or "Section" in n}


def tracked_files() -> set[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listing.stdout.splitlines() if (ROOT / name).exists()}


def file_tree() -> dict[str, str]:
    """Return {path: its line} of the file tree in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\n```text\n(.*?)```", text, re.DOTALL)
    assert block, "docs/architecture.md has no file tree between <!-- tree --> and its code fence"
    stack: list[str] = []
    found = {}
    for line in block.group(1).splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, description = line.strip().partition("  ")
        stack = [*stack[:depth], name.rstrip("/")]
        found["/".join(stack) + ("/" if name.endswith("/") else "")] = description.strip()
    return found


def test_the_file_tree_is_the_real_tree() -> None:
    tree = file_tree()
    files = tracked_files()
    for name, description in tree.items():
        assert (ROOT / name).exists(), f"the tree names {name}, which is not there"
        assert description, f"the tree says nothing of {name}"
    shown = {name for name in tree if not name.endswith("/")}
    package = {
        name
        for name in files
        if name.startswith(("milora_vl/", "data_prep/", "configs/", "scripts/"))
        and not name.endswith("__init__.py")
        and not name.startswith(
            "milora_vl/eval/benches/"
        )  # a bench is one file, and no other names it
    }
    assert package <= shown, f"not in the tree of docs/architecture.md: {sorted(package - shown)}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_links_between_documents_hold() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def walks() -> dict[str, list[tuple[str, str]]]:
    """Return {name: (file, function) of every hop} of the walks in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    found = {}
    for name, body in re.findall(r"<!-- walk: (\w+) -->\n(.*?)<!-- /walk -->", text, re.DOTALL):
        found[name] = re.findall(r"^\d+\. `([\w/.]+)` `(\w+)`", body, re.MULTILINE)
    return found


@pytest.mark.parametrize("name", ["sample", "weight", "question"])
def test_walks_are_short_and_real(name: str) -> None:
    hops = walks()[name]
    assert 5 <= len(hops) <= 7
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file, _ in hops}
    for file, function in hops:
        assert re.search(rf"^(def|class) {function}\b", sources[file], re.MULTILINE), function
        uses = sum(len(re.findall(rf"\b{function}\b", source)) for source in sources.values())
        assert uses > 1 or (file, function) == hops[0], f"no hop of the walk uses {function}"


def test_commands_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"(?:bash|python) ((?:scripts|data_prep)/[\w./-]+)", text):
        assert (ROOT / name).exists(), f"README runs {name}, which is not there"
    for name in re.findall(r"\b(configs/[\w-]+\.yaml)\b", text):
        assert (ROOT / name).exists(), f"README names {name}, which is not there"


def test_no_placeholder_is_left() -> None:
    for name in tracked_files():
        if name.endswith((".py", ".md", ".yaml", ".toml", ".sh")) and name != "tests/test_repo.py":
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"<n>|\bTODO\b|\bFIXME\b|\bXXX\b", text), name
