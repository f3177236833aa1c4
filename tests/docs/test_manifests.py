"""The manifests of the how-tos on clusters: Kubernetes' own check of a RayJob, and the command lines in them."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from rankopt.cli.main import app
from tests.docs.pages import blocks
from tests.helpers import ROOT

yaml = pytest.importorskip("yaml")  # Ray's

MANIFEST = ROOT / "examples" / "kuberay.yaml"

CRD = os.environ.get("RANKOPT_RAYJOB_CRD", "")
"""helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of github.com/ray-project/kuberay: 1.4 MB, and not ours."""


def check_search(words):
    assert words[:2] == ["rankopt", "search"]
    get_command(app).commands["search"].make_context("search", words[2:])
    assert words[words.index("--ray-address") + 1] == "auto"


@pytest.mark.skipif(not CRD, reason="RANKOPT_RAYJOB_CRD names no file")
def test_the_rayjob_is_what_the_operator_takes():
    """Strictly: an unknown key is an error, which the API server only warns of."""
    jsonschema = pytest.importorskip("jsonschema")
    versions = yaml.safe_load(Path(CRD).read_text())["spec"]["versions"]
    schema = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema["properties"].pop("metadata")  # Kubernetes' own
    content = {k: v for k, v in yaml.safe_load(MANIFEST.read_text()).items() if k != "metadata"}
    check = jsonschema.Draft202012Validator(strict(schema))
    assert [error.message for error in check.iter_errors(content)] == []
    content["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["img"] = "x"
    assert len(list(check.iter_errors(content))) == 1


def strict(schema):
    """A schema of Kubernetes as JSON Schema that refuses unknown keys."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: strict(value) for key, value in schema.items()}
    if "properties" in found and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def test_the_rayjob_runs_a_search():
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]
    check_search(shlex.split(spec["entrypoint"]))
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert len({c["image"] for c in containers}) == 1, "head and workers need the same packages"
    for group, container in zip(groups, containers, strict=True):
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_job_of_slurm_runs_a_search_between_starts_of_ray():
    commands = pytest.importorskip("ray.scripts.scripts").cli.commands
    (script,) = (b.code for b in blocks("docs/how-to/slurm.md", "bash") if "search.sbatch" in b.info)
    (line,) = re.findall(r"^srun (.*?)\n\n?(?=\Z)", script.replace("\\\n", ""), re.M | re.S)
    words = shlex.split(line)
    assert words[:2] == ["ray", "symmetric-run"]
    end = words.index("--")
    known = {name for c in ("symmetric-run", "start") for p in commands[c].params for name in p.opts}
    assert {word for word in words[2:end] if word.startswith("--")} <= known | {"--address", "--min-nodes"}
    check_search(words[end + 1 :])
    for option in re.findall(r"--[\w-]+", re.findall(r"^#SBATCH (.*)$", script, re.M)[0]):
        assert option in {"--nodes", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-task", "--time"}
