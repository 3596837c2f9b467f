"""The rooms and the style card, asserted on the sources: scripts/house.py draws them, here is what must hold.

KNOWN is what the tree does not keep yet. It only shrinks: something new fails, and so does an entry that is mended.
"""

from pathlib import Path

import pytest

from scripts import house

ROOT = Path(__file__).parents[1]
KNOWN: dict[str, list[str]] = {}


@pytest.fixture(scope="module")
def ours() -> house.House:
    return house.read(ROOT)


def test_every_file_is_in_a_room_and_every_room_has_files(ours):
    assert {path: room for path, room in ours.rooms.items() if house.room_of(path) != room} == {}
    assert set(ours.rooms.values()) == set(house.ROOMS)
    starts = [start for room in house.ROOMS.values() for start in room]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("measure", [name for name in house.MEASURES if not name.startswith("circles")])
def test_the_style_card_is_kept(ours, measure):
    found = {finding.name: str(finding) for finding in house.MEASURES[measure](ours)}
    known = KNOWN.get(measure, [])
    assert [text for name, text in found.items() if name not in known] == []
    assert [name for name in known if name not in found] == [], "mended: take it out of KNOWN"


def test_imports_run_in_no_circle(ours):
    assert house.file_circles(ours) == []
    assert house.room_circles(ours) == []


# ---------------------------------------------------------------- what is counted


def drawn(root: Path, files: dict[str, str]) -> house.House:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return house.read(root)


def test_imports_are_found_wherever_they_stand(tmp_path):
    found = drawn(
        tmp_path,
        {
            "ple_jax/core/files.py": "import json\nfrom ple_jax.models import hub\n",
            "ple_jax/models/hub.py": "def f():\n    import importlib\n    importlib.import_module('ple_jax.core.files')\n",
            "ple_jax/main.py": "from . import losses\nfrom ple_jax.configs.tiny import get_config\nNAME = 'ple_jax.modes'\n",
            "ple_jax/losses.py": "import numpy\n",
            "ple_jax/modes.py": "def f():\n    import torch\n",
            "configs/tiny.py": "",
        },
    )
    assert found.edges == [
        ("ple_jax/core/files.py", "ple_jax/models/hub.py", 2),
        ("ple_jax/main.py", "configs/tiny.py", 2),
        ("ple_jax/main.py", "ple_jax/losses.py", 1),
        ("ple_jax/models/hub.py", "ple_jax/core/files.py", 3),
    ]
    assert house.file_circles(found) == [["ple_jax/core/files.py", "ple_jax/models/hub.py"]]
    assert house.room_circles(found) == [["core", "models"]]
    assert [finding.name for finding in house.climbs(found)] == ["ple_jax/core/files.py: imports ple_jax/models/hub.py"]
    assert list(map(str, house.frameworks(found))) == ["ple_jax/modes.py:2: imports torch"]


def test_long_functions_have_a_reason(tmp_path):
    body = "".join(f"    x = {i}\n" for i in range(40))
    text = (
        f"def short():\n{body[: body.rindex('    x')]}\n"
        f"def long():\n{body}\n"
        f"# one piece: a table\n# of steps\n@decorated\ndef kept():\n{body}\n"
        f"# one piece: of something else\n\nclass A:\n    def method(self):\n{body.replace('  x', '      x')}"
    )
    found = house.long_functions(drawn(tmp_path, {"ple_jax/core/files.py": text, "tests/test_a.py": text}))
    assert [(finding.what, finding.note) for finding in found] == [("long", ", 41 lines"), ("method", ", 41 lines")]


def test_private_names_are_found_in_every_guise(tmp_path):
    lines = [
        "from ple_jax.core import files, _own",
        "from ple_jax.core.files import File, _a as a",
        "import helper",
        "files._a",
        "File._b",
        "File._replace",
        "files.__name__",
        "helper._d",
        "other._e",
        "monkeypatch.setattr(files, '_a', 2)",
        "monkeypatch.setattr('ple_jax.core.files._a', 2)",
    ]
    files = {
        "ple_jax/core/files.py": "_a = 1\nclass File:\n    _b = 2\n",
        "ple_jax/core/_own.py": "",
        "ple_jax/core/noise.py": "from ple_jax.core import _own\n_own.x\nclass Noise:\n    _c = 1\nNoise._c\n",
        "tests/helper.py": "_d = 1\n",
        "tests/test_files.py": "\n".join(lines),
    }
    found = house.private_reads(drawn(tmp_path, files))
    assert {finding.path for finding in found} == {"tests/test_files.py"}
    assert [(finding.line, finding.what.rpartition(".")[2]) for finding in found] == [
        (1, "_own"), (2, "_a"), (4, "_a"), (5, "_b"), (8, "_d"), (10, "_a"), (11, "_a"),
    ]  # fmt: skip


def test_questions_to_algorithms_are_found(tmp_path):
    files = {
        "ple_jax/training/loop.py": "hasattr(run.algorithm, 'a')\ngetattr(algorithm, 'b', None)\nhasattr(path, 'c')\n",
        "ple_jax/algorithms/__init__.py": "hasattr(module, 'd')\ngetattr(module, 'e')\n",
    }
    assert [finding.what for finding in house.asked_for(drawn(tmp_path, files))] == [
        "hasattr(module, 'd')",
        "hasattr(run.algorithm, 'a')",
        "getattr(algorithm, 'b', None)",
    ]


def test_docstrings_that_are_no_sentences_are_found(tmp_path):
    lines = ["Of every response.", "Bytes of a type.", "This one.", "Returns it.", "Says of each test whether it passes."]
    code = "".join(f'def f{i}():\n    """{line}"""\n' for i, line in enumerate(lines))
    code += "class A:\n    @property\n    def g(self):\n        \"\"\"What it has.\"\"\"\n"
    found = house.fragments(drawn(tmp_path, {"ple_jax/core/files.py": code}))
    assert [finding.what for finding in found] == ["f0", "f1", "f2"]
