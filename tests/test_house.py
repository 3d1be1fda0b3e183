"""The house: its fixed top level, one table of who may import whom, and the rooms of optional packages."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "requirements.txt", "accelerate_config.yaml"),
    *("pyproject.toml", ".gitignore", ".ci", "data_pipeline", "train", "launch", "docker", "tests"),
}
MOST_LINES = 400
# A file may import what is in its own room and in the rows above its own, nothing else. data_pipeline never imports
# train; launch and the tests may import everything.
ROWS = (
    ("data_pipeline.config", "data_pipeline.config_file", "data_pipeline.cores", "data_pipeline.seeds"),
    ("data_pipeline.storage", "data_pipeline.batch", "train.config", "train.timing"),
    ("data_pipeline.tokenizer",),
    ("data_pipeline.samples", "data_pipeline.order", "train.cli", "train.distributed"),
    ("data_pipeline.stages", "data_pipeline.statistics", "data_pipeline.overlap", "train.loss", "train.run"),
    ("data_pipeline.embeddings", "train.arrival"),
    ("data_pipeline.loader", "data_pipeline.commands", "train.terms"),
    ("data_pipeline.demo", "train.model"),
    ("train.engine", "train.checkpoint", "train.feed"),
    ("train.saving",),
    ("train.memory", "train.step", "train.account", "train.speed", "train.evaluation", "train.init", "train.parent"),
    ("train.report", "train.begin"),
    ("train.evaluate", "train.checks", "train.export"),
    ("train.loop", "train.use"),
    ("train.embed", "train.search", "train.curate"),
    ("data_pipeline", "train"),
    ("train.examples", "data_pipeline.__main__", "train.__main__"),
)
# Packages that only these rooms may import.
OWNERS = {
    "webdataset": ("data_pipeline",),
    "wandb": ("train.run",),
    "accelerate": ("train.engine", "train.examples", "launch"),
    "deepspeed": ("train.engine", "launch"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> dict[str, Path]:
    return {module_name(path): path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules that a file imports at run time, wherever in the file; those under TYPE_CHECKING are left out."""
    found = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(), str(path))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            inner = {f"{base}.{alias.name}" for alias in node.names} & known
            found |= inner or {base}
        pending.extend(ast.iter_child_nodes(node))
    return found


def room_of(module: str) -> str:
    """A package directly below data_pipeline or train, or a file there."""
    return ".".join(module.split(".")[:2])


def row_of(room: str) -> int:
    rows = [number for number, rooms in enumerate(ROWS) if room in rooms]
    assert len(rows) == 1, f"{room} is in {len(rows)} rows of the table in tests/test_house.py: give it one"
    return rows[0]


def test_imports_follow_the_table():
    modules = sources("data_pipeline", "train")
    wrong = []
    for module, path in modules.items():
        if "." not in module:  # the public names of a package, imported when they are used
            continue
        room = room_of(module)
        for imported in imports(path, set(modules)) & set(modules):
            other = room_of(imported)
            allowed = other == room or (row_of(other) < row_of(room) and not is_upside_down(room, other))
            if not allowed:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(sorted(wrong))


def is_upside_down(room: str, other: str) -> bool:
    return room.startswith("data_pipeline.") and other.startswith("train.")


def test_no_import_cycles():
    modules = sources("data_pipeline", "train", "launch")
    graph = {name: imports(path, set(modules)) & set(modules) for name, path in modules.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_room_of_the_table_exists():
    missing = [
        room
        for row in ROWS
        for room in row
        if room not in {room_of(name) for name in sources("data_pipeline", "train")}
    ]
    assert not missing, f"listed in tests/test_house.py, but not there: {missing}"


@pytest.mark.parametrize("package", OWNERS)
def test_packages_stay_in_their_rooms(package):
    modules = sources("data_pipeline", "train", "launch")
    for module, path in modules.items():
        if any(imported.split(".")[0] == package for imported in imports(path, set(modules))):
            allowed = any(module == room or module.startswith(room + ".") for room in OWNERS[package])
            assert allowed, f"{module} imports {package}; only {', '.join(OWNERS[package])} may"


def tracked() -> list[str]:
    """Files of the repository, committed or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.split("\0") if name and (ROOT / name).exists()]


def test_no_file_is_longer_than_one_sitting():
    suffixes = {".py", ".sh", ".yaml", ".toml", ".sbatch", ""}
    for name in tracked():
        path = ROOT / name
        if path.suffix in suffixes and name != "LICENSE" and path.is_file():
            lines = len(path.read_text().splitlines())
            assert lines <= MOST_LINES, (
                f"{name} has {lines} lines, {MOST_LINES} is the limit: split it where a concept ends"
            )


def test_top_level_is_fixed():
    top = {name.split("/")[0] for name in tracked()}
    assert top == TOP_LEVEL, f"extra: {sorted(top - TOP_LEVEL)}, missing: {sorted(TOP_LEVEL - top)}"
