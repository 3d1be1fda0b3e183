"""The house: its fixed top level, floors that import downwards only, rooms of optional packages, short files."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {
    *("README.md", "LICENSE", "requirements.txt", "accelerate_config.yaml", "pyproject.toml", ".gitignore", ".ci"),
    *("data_pipeline", "train", "launch", "docker", "tests"),
}
MAX_LINES = 300
FLOORS = {
    6: ["train.__main__", "data_pipeline.__main__"],
    5: ["train.loop"],
    4: [
        *("train.step", "train.engine", "train.evaluate", "train.checkpoint", "train.tracking", "train.report"),
        *("train.rundir", "train.ema", "train.feed"),
    ],
    3: [
        *("train.model", "train.loss", "train.objective", "train.optim", "train.balance", "train.retrieval"),
        *("train.history", "data_pipeline.loader"),
    ],
    2: [
        "train." + name for name in ("towers", "multiscale", "self_supervision", "norm", "cli", "ranges", "diagnostics")
    ],
    1: ["train.distributed", "train.config", "train.preemption"],
    0: ["data_pipeline.config"],
}
# What a module was split into stands on its floor: it imports its parts, and they may import each other.
PARTS = {
    "train.loss": ["train.loss_tiled"],
    "train.towers": ["train.pretrained"],
    "train.distributed": ["train.precision"],
    "train.evaluate": ["train.features", "train.zeroshot", "train.probe"],
    "train.report": ["train.plots", "train.gallery"],
}
WHOLE = {part: whole for whole, parts in PARTS.items() for part in parts}
# Within floor 2: side heads stand on towers, the hub is asked in one place, ranges are those of fields by name.
# Within 3: parameter groups are those of the model, the objective is a sum of losses.
# Within 4: the engine is what a step and a checkpoint are made with; evaluation by hand loads a checkpoint.
STAIRS = {
    ("train.optim", "train.model"),
    ("train.ranges", "train.cli"),
    ("train.objective", "train.loss"),
    ("train.multiscale", "train.towers"),
    ("train.self_supervision", "train.towers"),
    ("train.self_supervision", "data_pipeline.masking"),
    ("train.pretrained", "data_pipeline.tokenizer"),
    ("train.step", "train.engine"),
    ("train.checkpoint", "train.engine"),
    ("train.ema", "train.engine"),
    ("train.checkpoint", "train.ema"),
    ("train.evaluate", "train.checkpoint"),
}
# Packages that only these modules may import.
ENGINE_ROOMS = ["train." + name for name in ("distributed", "engine", "step", "checkpoint", "loop", "tracking")]
ROOMS = {
    "webdataset": ["data_pipeline"],
    "wandb": ["train.tracking"],
    "accelerate": [*ENGINE_ROOMS, "launch"],
    "deepspeed": [*ENGINE_ROOMS, "launch"],
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


def floor_of(module: str) -> int:
    for floor, modules in FLOORS.items():
        if module in modules:
            return floor
    if module in WHOLE:
        return floor_of(WHOLE[module])
    if module.startswith("data_pipeline"):
        return 0 if module == "data_pipeline" else 2
    if module == "train":
        return 0
    raise AssertionError(f"{module} stands on no floor: give it one in tests/test_floors.py")


def test_imports_go_down():
    modules = sources("data_pipeline", "train")
    upward = []
    for module, path in modules.items():
        for imported in imports(path, set(modules)) & set(modules):
            if floor_of(imported) >= floor_of(module) and not neighbours(module, imported):
                upward.append(f"{module} ({floor_of(module)}) imports {imported} ({floor_of(imported)})")
    assert not upward, "\n".join(upward)


def neighbours(module: str, imported: str) -> bool:
    """On one floor, a module may import its parts, a part its fellows, and a data_pipeline part another."""
    if floor_of(module) != floor_of(imported):
        return False
    if (module, imported) in STAIRS:
        return True
    if module.startswith("data_pipeline.") and imported.startswith("data_pipeline."):
        return floor_of(module) == 2
    return WHOLE.get(imported) in (module, WHOLE.get(module, "none"))


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


def test_data_pipeline_never_imports_train():
    modules = sources("data_pipeline")
    known = set(modules) | set(sources("train"))
    for module, path in modules.items():
        for imported in imports(path, known):
            assert imported.split(".")[0] not in ("train", "launch"), f"{module} imports {imported}"


@pytest.mark.parametrize("package", ROOMS)
def test_packages_stay_in_their_rooms(package):
    modules = sources("data_pipeline", "train", "launch")
    for module, path in modules.items():
        if any(imported.split(".")[0] == package for imported in imports(path, set(modules))):
            allowed = any(module == room or module.startswith(room + ".") for room in ROOMS[package])
            assert allowed, f"{module} imports {package}; only {', '.join(ROOMS[package])} may"


def test_every_listed_module_exists():
    listed = {name for names in FLOORS.values() for name in names} | set(WHOLE)
    missing = listed - set(sources("data_pipeline", "train"))
    assert not missing, f"listed in tests/test_floors.py, but not there: {sorted(missing)}"


def tracked() -> list[str]:
    """Files of the repository, committed or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.split("\0") if name and (ROOT / name).exists()]


def test_no_file_is_longer_than_one_sitting():
    suffixes = {".py", ".sh", ".yaml", ".toml", ".sbatch", ""}
    exempt = {"LICENSE"}
    for name in tracked():
        path = ROOT / name
        if path.suffix in suffixes and name not in exempt and path.is_file():
            lines = len(path.read_text().splitlines())
            assert lines < MAX_LINES, f"{name} has {lines} lines, {MAX_LINES} is the limit"


def test_top_level_is_fixed():
    top = {name.split("/")[0] for name in tracked()}
    assert top == TOP_LEVEL, f"extra: {sorted(top - TOP_LEVEL)}, missing: {sorted(TOP_LEVEL - top)}"
