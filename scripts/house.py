"""The house, drawn from its imports: its rooms, circles and climbs, and what the style card forbids.

    python scripts/house.py [--before REVISION] [--way] [--list]

--before shows another revision beside it. --list names every file and line that is counted, not only how many there are.
An import counts wherever it stands, in a function too, and so does `importlib.import_module("...")`; a table of strings,
as the lazy `ple_jax/__init__.py` and `core/backends.py` have it, is none. tests/test_house.py asserts what must hold.
"""

import argparse
import ast
import contextlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import CodeType, FrameType
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

    `modules` are the paths of dotted names, `rooms` the room of every file of HOUSE, `order` the rooms from the bottom up,
    `edges` all (file, file that it imports, line) within the rooms.
    """

    files: Mapping[str, File]
    modules: Mapping[str, str]
    rooms: Mapping[str, str]
    order: Sequence[str] = tuple(ROOMS)
    edges: Sequence[tuple[str, str, int]] = ()

    @property
    def inside(self) -> list[File]:
        return [file for path, file in self.files.items() if path in self.rooms]


# ---------------------------------------------------------------- reading it


def read(root: Path) -> House:
    """The house as it stands under `root`. Where files fit no room of the table, its folders are the rooms."""
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
    rooms = {name: room for name in inside if (room := room_of(name))}
    known = len(rooms) == len(inside)
    if not known:
        rooms = {name: name.rpartition("/")[0] for name in inside}
    house = House(files, dict(_modules(files)), rooms)
    house = house._replace(edges=edges(house))
    return house if known else house._replace(order=least_climbs(house))


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
    height = {room: i for i, room in enumerate(house.order)}
    return [
        Finding(start, line, f"imports {end}", f", from {house.rooms[start]} up to {house.rooms[end]}")
        for start, end, line in house.edges
        if height[house.rooms[start]] < height[house.rooms[end]]
    ]


def least_climbs(house: House) -> list[str]:
    """The order of rooms, from the bottom, with the fewest imports that run up: where no table says what up is."""
    rooms = sorted(set(house.rooms.values()))
    count: dict[tuple[str, str], int] = {}
    for start, end, _ in house.edges:
        pair = house.rooms[start], house.rooms[end]
        count[pair] = count.get(pair, 0) + 1
    best: dict[frozenset[str], tuple[int, list[str]]] = {frozenset(): (0, [])}
    for size in range(1, len(rooms) + 1):
        for some in map(frozenset, itertools.combinations(rooms, size)):
            best[some] = min(
                (best[below][0] + sum(count.get((room, top), 0) for room in below), [*best[below][1], top])
                for top in some
                for below in [some - {top}]
            )
    return best[frozenset(rooms)][1]


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


# ---------------------------------------------------------------- the way through the loop


class Way(NamedTuple):
    """How a reader gets through `train`: stretches within one file, the files, and how often one is entered again."""

    stays: int
    files: int
    loop: int  # stays in loop.py itself

    @property
    def returns(self) -> int:
        return self.stays - self.files

    def __str__(self) -> str:
        return f"{self.stays} stays, {self.files} files, {self.returns} returns"


def way(root: Path) -> Way:
    """The way of whoever reads along while configs/tiny.py trains for one iteration, from loop.py's `train` on.

    A function of ours is read where it is first called, whoever calls it and by whatever name, and from it one goes back to
    where it was called. What is known is not read again. Files that import jax or torch are behind the backend's door and
    are not entered.
    """
    with tempfile.TemporaryDirectory() as workdir:
        environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        line = [sys.executable, __file__, "--walk", workdir]
        found = subprocess.run(line, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    stays = json.loads(found.splitlines()[-1])
    return Way(len(stays), len(set(stays)), sum(path.endswith("/loop.py") for path in stays))


def walk(root: Path, workdir: str) -> list[str]:
    """Runs `train` under `root`, in this process; the files in the order in which they are entered."""
    house = read(root)
    walker = _Walker({str(root / file.path): file.path for file in house.inside if not _is_behind_the_door(house, file)})
    sys.argv = ["ple_jax.main", "--config=configs/tiny.py", f"--workdir={workdir}", "--config.iterations=1"]
    entry = importlib.import_module("ple_jax.main")
    sys.setprofile(walker.profile)
    try:
        entry.cli()
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.setprofile(None)
    return [path for path, _ in itertools.groupby(walker.passed)]


class _Walker:
    """Follows a run from `train` on; `paths` are ours by the names that frames have for them."""

    def __init__(self, paths: Mapping[str, str]):
        self._paths = paths
        self._seen: set[CodeType] = set()
        self._open: list[FrameType] = []  # functions that are being read
        self.passed: list[str] = []

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        path = self._paths.get(frame.f_code.co_filename)
        if path is None:
            return
        begins = not self._open and not self._seen and path.endswith("/loop.py") and frame.f_code.co_name == "train"
        if event == "call" and (self._open or begins) and frame.f_code not in self._seen:
            self._seen.add(frame.f_code)
            self._open.append(frame)
            self.passed += [path] if begins else [self._caller(frame), path]
        elif event == "return" and self._open and frame is self._open[-1]:
            self._open.pop()
            self.passed += [self._caller(frame)] if self._open else []

    def _caller(self, frame: FrameType) -> str:
        """The nearest file of ours below a frame; there is one, `train`'s."""
        below = frame.f_back
        while below is not None and below.f_code.co_filename not in self._paths:
            below = below.f_back
        return self._paths[below.f_code.co_filename] if below is not None else ""


def _is_behind_the_door(house: House, file: File) -> bool:
    packages = set().union(*FRAMEWORKS.values())
    return any(name.split(".")[0] in packages for _, name in imports(house, file))


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
    for room in reversed(house.order):
        lines = [file.lines for file in house.inside if house.rooms[file.path] == room]
        rows.append(f"{room:<20} {len(lines):>5} {sum(lines):>6}")
    return [*rows, f"{'all':<20} {len(house.inside):>5} {sum(file.lines for file in house.inside):>6}"]


def numbers(house: House) -> dict[str, str]:
    counted = {name: str(len(measure(house))) for name, measure in MEASURES.items()}
    if house.order != tuple(ROOMS):  # no table says what is neutral
        counted["jax or torch in neutral rooms"] = "-"
    return counted


@contextlib.contextmanager
def at(revision: str) -> Iterator[Path]:
    """The tree of another revision, in a folder that does not stay."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
        yield Path(folder).resolve()


def show(roots: Mapping[str, Path], *, ways: bool, listed: bool) -> None:
    houses = {name: read(root) for name, root in roots.items()}
    print("".join(f"{name:<38}" for name in houses).rstrip())
    for row in itertools.zip_longest(*map(sheet, houses.values()), fillvalue=""):
        print("".join(f"{part:<38}" for part in row).rstrip())
    print()
    found = [numbers(house) for house in houses.values()]
    if ways:
        for values, root in zip(found, roots.values(), strict=True):
            seen = way(root)
            values |= {"the way through the loop": str(seen), "of it, stays in loop.py": str(seen.loop)}
    for name in found[0]:
        print(f"{name:<44}" + "".join(f"{values[name]:<38}" for values in found).rstrip())
    for name, measure in MEASURES.items() if listed else ():
        print("\n".join([f"\n{name}:", *(f"  {place}" for place in measure(houses["now"]))]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REVISION", help="of git, shown beside the tree as it is")
    parser.add_argument("--way", action="store_true", help="also the way of a run through the loop, which takes a run")
    parser.add_argument("--list", action="store_true", help="every place that is counted")
    parser.add_argument("--walk", metavar="WORKDIR", help=argparse.SUPPRESS)  # in a process of its own, for `way`
    options = parser.parse_args()
    if options.walk:
        print(json.dumps(walk(Path.cwd(), options.walk)))
        return 0
    with at(options.before) if options.before else contextlib.nullcontext() as before:
        roots = {options.before: before} if before else {}
        show({**roots, "now": ROOT}, ways=options.way, listed=options.list)
    return 0


if __name__ == "__main__":
    sys.exit(main())
