"""The house, drawn from its imports: its rooms, circles and climbs, and what the style card forbids.

    python scripts/house.py [--list]

--list names every file and line that is counted, not only how many there are.
An import counts wherever it stands, in a function too, and so does `importlib.import_module("...")`; a table of strings,
as the lazy `ple_jax/__init__.py` and `core/backends.py` have it, is none. tests/test_house.py asserts what must hold.
"""

import argparse
import ast
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ("configs", "ple_jax", "torch_ascend")
BESIDE = ("scripts", "tests")
# from the bottom up: a room imports from itself and from those above it in this list. The longest path that fits holds
ROOMS = {
    "configs": ("configs/",),
    "losses": ("ple_jax/losses.py",),
    "core": ("ple_jax/core/",),
    "formulas": ("ple_jax/formulas/",),
    "data": ("ple_jax/data/",),
    "prompts": ("ple_jax/prompts/",),
    "models": ("ple_jax/models/",),
    "rewards": ("ple_jax/rewards/",),
    "algorithms": ("ple_jax/algorithms/",),
    "backend": ("ple_jax/backend/",),
    "torch_ascend": ("torch_ascend/",),
    "serving": ("ple_jax/serving/",),
    "training": ("ple_jax/training/",),
    "evaluation": ("ple_jax/evaluation/",),
    "reports": ("ple_jax/reports/",),
    "export": ("ple_jax/export/",),
    "planning": ("ple_jax/planning/", "torch_ascend/topology.py"),
    "baselines": ("torch_ascend/baselines.py",),
    "chat": ("ple_jax/chat.py",),
    "modes": ("ple_jax/modes.py",),
    "main": ("ple_jax/main.py",),
    "experiments": ("ple_jax/experiments/",),  # whole runs: above the entry that starts them
    "the functional API": ("ple_jax/__init__.py",),
}
# where jax and torch may be imported; everything else is neutral
FRAMEWORKS = {
    "jax": {"jax", "jaxlib", "flax", "optax", "orbax", "qwix"},
    "torch": {"torch", "torch_npu", "trl", "peft"},
}
ALLOWED = {
    "jax": ("ple_jax/backend/", "ple_jax/planning/targets.py", "ple_jax/planning/topology.py"),
    "torch": ("torch_ascend/",),
}
LONG = 40
REASON = "# one piece:"  # begins the comment above a function that is longer


class Finding(NamedTuple):
    """Something in a line of a file. What it is called stays where lines move."""

    path: str
    line: int
    what: str
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.path}: {self.what}"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}{self.note}"


class File(NamedTuple):
    path: str
    source: str
    tree: ast.Module
    nodes: Sequence[ast.AST]

    @property
    def lines(self) -> int:
        return self.source.count("\n")


class House(NamedTuple):
    """The Python files under HOUSE and BESIDE by path.

    `modules` are the paths of dotted names, `rooms` the room of every file of HOUSE, `edges` all (file, file that it
    imports, line) within the rooms.
    """

    files: Mapping[str, File]
    modules: Mapping[str, str]
    rooms: Mapping[str, str]
    edges: Sequence[tuple[str, str, int]] = ()

    @property
    def inside(self) -> list[File]:
        return [file for path, file in self.files.items() if path in self.rooms]


# ---------------------------------------------------------------- reading it


def read(root: Path) -> House:
    """The house as it stands under `root`. The room of a file that fits none of the table is its folder."""
    files = {}
    for top in (*HOUSE, *BESIDE):
        for path in sorted((root / top).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            # a link to configs/, and what stands for another package
            if not name.startswith(("ple_jax/configs/", "tests/npu/path/")):
                source = path.read_text(encoding="utf-8")
                tree = ast.parse(source)
                files[name] = File(name, source, tree, list(ast.walk(tree)))
    inside = [name for name in files if name.split("/")[0] in HOUSE]
    house = House(files, dict(_modules(files)), {name: room_of(name) or name.rpartition("/")[0] for name in inside})
    return house._replace(edges=edges(house))


def room_of(path: str) -> str | None:
    """The room of a file by the table; None where it is in none."""
    fits = [(len(start), room) for room, starts in ROOMS.items() for start in starts if path.startswith(start)]
    return max(fits)[1] if fits else None


def _modules(files: Mapping[str, File]) -> Iterator[tuple[str, str]]:
    """Names by which files are imported: tests and scripts also by their bare names, as pytest's paths allow."""
    for path in files:
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield name, path
        if name.startswith("configs"):
            yield f"ple_jax.{name}", path
        if name.split(".")[0] in BESIDE:
            yield name.rpartition(".")[2], path


def imports(house: House, file: File) -> Iterator[tuple[int, str]]:
    """Lines and dotted names of all that a file imports; of `from a import b` it is a.b."""
    for node in file.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.path.split("/")[: -node.level] if node.level else []
            start = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("importlib.import_module", "import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def target(house: House, name: str) -> str | None:
    """The file of ours that holds a dotted name, a module or something in one."""
    while name:
        if name in house.modules:
            return house.modules[name]
        name = name.rpartition(".")[0]
    return None


def edges(house: House) -> list[tuple[str, str, int]]:
    """(file, file that it imports, line), within the rooms."""
    found = {
        (file.path, to, line)
        for file in house.inside
        for line, name in imports(house, file)
        if (to := target(house, name)) and to in house.rooms and to != file.path
    }
    return sorted(found)


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` as text; None of an expression that is more than names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (start := dotted(node.value)):
        return f"{start}.{node.attr}"
    return None


# ---------------------------------------------------------------- circles and climbs


def circles(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Strongly connected components with more than one node."""
    follow: dict[str, set[str]] = {}
    for start, end in pairs:
        follow.setdefault(start, set()).add(end)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for node in follow.get(todo.pop(), set()) - seen:
                seen.add(node)
                todo.append(node)
        return seen

    reach = {node: reached(node) for node in follow}
    groups = {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in follow}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def file_circles(house: House) -> list[list[str]]:
    return circles([(start, end) for start, end, _ in house.edges])


def room_circles(house: House) -> list[list[str]]:
    found = [(house.rooms[start], house.rooms[end]) for start, end, _ in house.edges]
    return circles([(start, end) for start, end in found if start != end])


def climbs(house: House) -> list[Finding]:
    """Imports that run up."""
    height = {room: i for i, room in enumerate(ROOMS)}
    return [
        Finding(start, line, f"imports {end}", f", from {house.rooms[start]} up to {house.rooms[end]}")
        for start, end, line in house.edges
        if height[house.rooms[start]] < height[house.rooms[end]]
    ]


# ---------------------------------------------------------------- the style card


def frameworks(house: House) -> list[Finding]:
    """Imports of jax or torch where they may not be."""
    return [
        Finding(file.path, line, f"imports {name}")
        for file in house.inside
        for line, name in imports(house, file)
        for framework, packages in FRAMEWORKS.items()
        if name.split(".")[0] in packages and not file.path.startswith(ALLOWED[framework])
    ]


def long_functions(house: House) -> list[Finding]:
    """Functions of more than LONG lines without a reason above them."""
    return [
        Finding(file.path, node.lineno, node.name, f", {length} lines")
        for file in house.files.values()
        if not file.path.startswith("tests/")
        for node in file.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONG
        and not _has_reason(file, node)
    ]


def _has_reason(file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    above = [line.strip() for line in reversed(file.source.splitlines()[: first - 1])]
    return any(line.startswith(REASON) for line in itertools.takewhile(lambda line: line.startswith("#"), above))


def asked_for(house: House) -> list[Finding]:
    """`hasattr` and `getattr` on an algorithm, which is resolved once and then has everything."""
    return [
        Finding(file.path, node.lineno, ast.unparse(node))
        for file in house.inside
        for node in file.nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr")
        if (dotted(node.args[0]) or "").split(".")[-1] == "algorithm"
        or (node.func.id == "hasattr" and file.path.startswith("ple_jax/algorithms/"))
    ]


def fragments(house: House) -> list[Finding]:
    """Docstrings of functions, properties apart, that do not begin with a verb ("Returns", "Reads"): not a sentence."""
    return [
        Finding(file.path, node.lineno, node.name, f": {text.splitlines()[0]}")
        for file in house.inside
        for node in file.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node))
        and not any((dotted(way) or "").endswith("property") for way in node.decorator_list)
        and not re.match(r"(?!This|Its|Whether)[A-Z][a-z-]+s\b(?! of(?! each))", text)
    ]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_reads(house: House) -> list[Finding]:
    """Names with an underscore that are used in another file than their own, tests and scripts included."""
    return [Finding(file.path, *found) for file in house.files.values() for found in sorted(_private_reads(house, file))]


def _private_reads(house: House, file: File) -> set[tuple[int, str]]:
    found = set()
    names = bindings(house, file)
    for line, name in imports(house, file):
        if is_private(name.rpartition(".")[2]) and (to := target(house, name)):
            # a module with such a name belongs to its folder; anything else, to its file
            theirs = name in house.modules and to.rpartition("/")[0] == file.path.rpartition("/")[0]
            if to != file.path and not theirs:
                found.add((line, name))
    for node in file.nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            start, _, _ = (dotted(node.value) or "").partition(".")
            if start in names and node.attr not in ("_replace", "_asdict", "_fields", "_make"):
                found.add((node.lineno, f"{dotted(node)}"))
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            named = node.args[1].value  # monkeypatch.setattr(module, "_name", ...)
            if isinstance(named, str) and is_private(named) and dotted(node.args[0]) in names:
                found.add((node.lineno, f"{dotted(node.args[0])}.{named}"))
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"({'|'.join(HOUSE)})(\.\w+)*\._[a-zA-Z]\w*", str(node.value)):
            if target(house, str(node.value)) != file.path:
                found.add((node.lineno, str(node.value)))
    return found


def bindings(house: House, file: File) -> dict[str, str]:
    """What names that a file imports from ours stand for, as dotted names."""
    found: dict[str, str] = {}
    for node in file.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                start = alias.name.split(".")[0]
                if target(house, alias.name):
                    found |= {alias.asname: alias.name} if alias.asname else {start: start}
        elif isinstance(node, ast.ImportFrom):
            whole = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name: of for name, of in whole.items() if target(house, of)}
    return found


# ---------------------------------------------------------------- the table

MEASURES: dict[str, Callable[[House], Sequence[object]]] = {
    "circles between files": file_circles,
    "circles between rooms": room_circles,
    "climbs": climbs,
    "jax or torch in neutral rooms": frameworks,
    f"functions over {LONG} lines without a reason": long_functions,
    "private names of another file": private_reads,
    "docstrings of functions without a verb": fragments,
    "hasattr on algorithms": asked_for,
}


def sheet(house: House) -> list[str]:
    """Rooms from the top down, with files and lines."""
    rows = [f"{'room':<20} {'files':>5} {'lines':>6}"]
    for room in reversed(ROOMS):
        lines = [file.lines for file in house.inside if house.rooms[file.path] == room]
        rows.append(f"{room:<20} {len(lines):>5} {sum(lines):>6}")
    return [*rows, f"{'all':<20} {len(house.inside):>5} {sum(file.lines for file in house.inside):>6}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="every place that is counted")
    listed = parser.parse_args().list
    house = read(ROOT)
    found = {name: measure(house) for name, measure in MEASURES.items()}
    print("\n".join([*sheet(house), "", *(f"{name:<44}{len(places)}" for name, places in found.items())]))
    for name, places in found.items() if listed else ():
        print("\n".join([f"\n{name}:", *(f"  {place}" for place in places)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
