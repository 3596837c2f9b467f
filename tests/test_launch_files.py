"""scripts/launch and scripts/images: what other people's programs check of them, and what they hand to ours."""

import copy
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from ple_jax.core import launch
from ple_jax.main import parse

ROOT = Path(__file__).parent.parent
LAUNCH, IMAGES = ROOT / "scripts" / "launch", sorted((ROOT / "scripts" / "images").glob("*.Dockerfile"))
BIN = Path(sys.executable).parent


def said(*command: str | Path, **variables: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command, with these variables beside the path."""
    environment = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture
def stub(tmp_path):
    """Puts a program on the path that says what it is called with; the path."""

    def make(name: str, *also: str, code: int = 0) -> str:
        lines = ["#!/usr/bin/env bash", f'printf "%s\\n" {name} "$@"', *also, f"exit {code}"]
        (tmp_path / name).write_text("\n".join(lines))
        (tmp_path / name).chmod(0o755)
        return f"{tmp_path}:{os.environ['PATH']}"

    return make


def mesh_of(arguments: list[str]) -> int:
    """Devices of the mesh of a command, which our parser understands."""
    run = parse(["ple_jax", *arguments])
    assert run.config.algorithm == "ple" and str(run.workdir).startswith("/")
    mesh = run.config.mesh
    assert mesh.fsdp == 1  # over hosts it is gathered for every token that is sampled (docs/devices.md)
    return mesh.data * mesh.fsdp * mesh.tensor


# ---------------------------------------------------------------- other people's checks


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    assert said(BIN / "shellcheck", script) == (0, [])


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(image):
    assert said(BIN / "hadolint", image) == (0, [])


def test_they_find_what_is_wrong(tmp_path):
    (tmp_path / "x.sh").write_text("#!/bin/bash\ncd $1\n")
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install jax\n")
    assert said(BIN / "shellcheck", tmp_path / "x.sh")[0] == 1
    assert said(BIN / "hadolint", tmp_path / "Dockerfile")[0] == 1


def lost(document: object, read: object, where: str = "") -> list[str]:
    """What of a document the schema's classes did not take."""
    if isinstance(document, dict):
        known = read if isinstance(read, dict) else {}
        return [x for key, value in document.items() for x in lost(value, known.get(key), f"{where}.{key}")]
    if isinstance(document, list):
        others = read if isinstance(read, list) and len(read) == len(document) else [None] * len(document)
        return [x for i, value in enumerate(document) for x in lost(value, others[i], f"{where}[{i}]")]
    return [] if document == read else [where]


def jobset(kind: str) -> dict:
    return yaml.safe_load((LAUNCH / f"jobset_{kind}.yaml").read_text())


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_jobsets_are_of_the_published_schema(kind):
    """Of JobSet and of Kubernetes, as the Kubeflow project generates classes from it."""
    document = jobset(kind)
    assert lost(document, JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document)).to_dict()) == []


def test_an_unknown_key_is_found():
    document = jobset("gpu")
    container(document)["limits"] = {"cpu": 1}
    document["spec"]["network"]["enableDNSNames"] = True
    read = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document)).to_dict()
    assert [place.rpartition(".")[2] for place in lost(document, read)] == ["enableDNSNames", "cpu"]


# ---------------------------------------------------------------- what they hand to ours


def container(document: dict) -> dict:
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(("kind", "resource"), [("gpu", "nvidia.com/gpu"), ("tpu", "google.com/tpu")])
def test_a_jobset_has_as_many_devices_as_its_mesh(kind, resource):
    document = jobset(kind)
    job, own = document["spec"]["replicatedJobs"][0]["template"]["spec"], container(document)
    assert job["parallelism"] == job["completions"]
    assert mesh_of(own["args"]) == job["parallelism"] * own["resources"]["limits"][resource]
    [volume] = [v for v in own["volumeMounts"] if v["name"] == "runs"]
    assert f"--workdir={volume['mountPath']}/hh" in own["args"]


def test_pods_with_gpus_are_told_of_one_another(monkeypatch):
    document = jobset("gpu")
    told = {entry["name"]: entry.get("value") for entry in container(document)["env"]}
    assert set(launch.VARIABLES) < set(told)
    [job] = document["spec"]["replicatedJobs"]
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", told["JAX_COORDINATOR_ADDRESS"].replace("$(JOBSET_NAME)", "ple"))
    monkeypatch.setenv("JAX_NUM_PROCESSES", told["JAX_NUM_PROCESSES"])
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    given = launch.given(None, None, None)
    assert given == launch.Given(f"ple-{job['name']}-0-0.ple:1234", job["template"]["spec"]["completions"], 1)
    assert document["spec"]["network"]["enableDNSHostnames"]


def test_a_slice_is_what_its_selector_says():
    spec = jobset("tpu")["spec"]["replicatedJobs"][0]["template"]["spec"]
    topology = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    x, y = map(int, topology.split("x"))
    assert x * y == spec["parallelism"] * container(jobset("tpu"))["resources"]["limits"]["google.com/tpu"]


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 9, True), (75, 10, False), (137, 0, True), (143, 99, True)],
)
def test_slurm_starts_a_process_a_gpu_and_again_what_was_stopped(stub, code, restarts, again):
    stub("scontrol")
    path = stub("srun", code=code)
    line = ("--config", "hh", "--workdir", "/x y", "--config.mesh.data=2", "--config.mesh.tensor=8")
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", "SLURM_RESTART_COUNT": str(restarts)}
    done, says = said(LAUNCH / "slurm.sh", *line, PATH=path, **job)
    requeued = ["scontrol", "requeue", "7"] if again else []
    options = ["--gpu-bind=none", "--cpus-per-task=8", "--kill-on-bad-exit=1"]
    assert (done, says) == (code, ["srun", *options, "ple_jax", *line, *requeued])
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE))
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == mesh_of(list(line))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and asked["signal"] == "TERM@300"


def test_slurm_takes_another_way_to_start(stub):
    code, says = said(LAUNCH / "slurm.sh", "--help", PATH=stub("srun"), PLE_JAX="apptainer exec --nv x.sif ple_jax")
    assert code == 0 and says[-6:] == ["apptainer", "exec", "--nv", "x.sif", "ple_jax", "--help"]


def test_skypilot_tells_every_node_where_the_first_is(stub):
    document = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    names = " ".join(f"${name}" for name in launch.VARIABLES)
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    path = stub("ple_jax", f"echo {names}")
    code, says = said("bash", "-c", document["run"], PATH=path, **node, **document["envs"])
    assert code == 0 and says[0] == "ple_jax" and says[-1] == "10.0.0.1:1234 2 1"
    assert mesh_of(says[1:-1]) == document["num_nodes"] * int(document["resources"]["accelerators"].partition(":")[2])
    assert set(document["volumes"]) == {"/runs"} and "/runs/hh" in says


def test_xpk_gets_the_command_as_it_was(stub):
    path = stub("xpk")
    line = ["--config", "hh", "--workdir", "/runs/h h", "--config.mesh.data=8", "--config.mesh.tensor=8"]
    named = {"CLUSTER": "mine", "IMAGE": "i:1", "XPK": "--spot --dry-run"}
    code, says = said(LAUNCH / "xpk.sh", "ple-hh", "v5litepod-64", *line, PATH=path, **named)
    assert code == 0 and says[:3] == ["xpk", "workload", "create"] and says[-2:] == ["--spot", "--dry-run"]
    flags = dict(word.split("=", 1) for word in says[3:-2])
    assert shlex.split(flags.pop("--command")) == ["ple_jax", *line]
    assert flags == {
        "--cluster": "mine", "--workload": "ple-hh", "--tpu-type": "v5litepod-64", "--num-slices": "1",
        "--docker-image": "i:1", "--max-restarts": "10", "--restart-on-exit-codes": "75",
        "--termination-grace-period-seconds": "300",
    }  # fmt: skip
    code, says = said(LAUNCH / "xpk.sh", "a", "b", PATH=path, **named, STORAGE="runs")
    assert code == 0 and "--storage=runs" in says
    assert said(LAUNCH / "xpk.sh", "a", "b", PATH=path, IMAGE="i")[1][0].startswith("error: CLUSTER is not set")
    assert said(LAUNCH / "xpk.sh", "a", "b", PATH=path, CLUSTER="c")[1][0].startswith("error: IMAGE is not set")
    assert said(LAUNCH / "xpk.sh", "a", PATH=path, **named)[0] == 2


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images_install_what_there_is_on_a_base_of_one_version(image):
    text, kind = image.read_text(), image.stem
    [base] = re.findall(r"^FROM \S+:(\S+)$", text, re.MULTILINE)
    assert re.match(r"\d+\.\d+\.\d+-", base)
    [extras] = re.findall(r"/opt/ple_jax\[([\w,]+)\]", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {"data", "eval"} if kind == "ascend" else {kind, "data", "eval"}
    assert set(extras.split(",")) == wanted and wanted <= set(project["optional-dependencies"])
    [entry] = re.findall(r'^ENTRYPOINT \["(\S+)"\]$', text, re.MULTILINE)
    assert entry in project["scripts"] or (ROOT / entry.removeprefix("/opt/ple_jax/")).is_file()


def test_the_image_for_ascend_has_versions_that_belong_together():
    """torch and torch-npu of one number, which the page's table has beside the image's CANN."""
    text = (ROOT / "scripts" / "images" / "ascend.Dockerfile").read_text()
    [cann], [torch], [npu] = (re.findall(rf"{name}([\d.]+\d)", text) for name in ("/cann:", " torch==", " torch-npu=="))
    said = " ".join((ROOT / "docs" / "ascend.md").read_text().split())
    [with_it] = re.findall(rf"([\w., ]+) with CANN {cann}\b", said)
    assert torch == npu and torch in re.split(", | and ", with_it.strip())


def test_an_image_is_sent_what_the_package_is_made_of():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"pyproject.toml", "README.md", "LICENSE", "ple_jax", "torch_ascend", "configs", "scripts"} == sent
    assert all((ROOT / name).exists() for name in sent)
