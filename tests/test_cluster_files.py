"""The files for Slurm and Kubernetes can be read by what reads them, as far as that is seen without these."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

FILES = Path(__file__).parents[1] / "docs" / "cluster"
FAKES = {  # what Slurm has, so that the script runs to its last command
    "scontrol": "echo node1; echo node2",
    "srun": 'printf "%s\\n" "$@"',
}


def script(tmp_path: Path, *arguments: str, folder: Path) -> list[str]:
    """The words that the script gives to srun, with two nodes of Slurm's."""
    (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    for name, line in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    told = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "FEDLORA_VENV": str(tmp_path / "venv"),
        "FEDLORA_OUT": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
    }
    done = subprocess.run(
        ["bash", FILES / "slurm.sh", *arguments], env=told, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_bash_takes_the_slurm_script() -> None:
    subprocess.run(["bash", "-n", FILES / "slurm.sh"], check=True)


def test_the_slurm_script_starts_ray_everywhere_and_the_run_once(tmp_path: Path) -> None:
    words = script(tmp_path, "data=trec", "data.text=a b", folder=tmp_path / "out")
    split = words.index("--")
    assert words[:split] == [
        *("--ntasks=2", "--ntasks-per-node=1", "ray", "symmetric-run", "--address", "node1:6379"),
        *("--min-nodes", "2", "--num-cpus=16"),
    ]
    run = ["fedlora", "run", "engine=ray", "engine.address=auto", f"out={tmp_path / 'out'}"]
    assert words[split + 1 :] == [*run, "data=trec", "data.text=a b"]


def test_a_slurm_job_that_is_requeued_resumes_its_run(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").touch()
    words = script(tmp_path, "data=trec", folder=tmp_path / "out")
    assert words[words.index("--") + 1 :] == ["fedlora", "run", f"resume={tmp_path / 'out'}"]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((FILES / "kuberay.yaml").read_text("utf-8"))  # type: ignore[no-any-return]


def test_the_kuberay_job_has_what_a_ray_job_needs(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (head, workers):
        spec = group["template"]["spec"]
        mounts = {mount["name"] for c in spec["containers"] for mount in c["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}
        assert spec["containers"][0]["image"].startswith("registry.example/fedlora")
    assert "/runs" not in str(workers)  # the head alone has files


def test_the_kuberay_job_runs_a_command_that_there_is(job: dict[str, Any], tmp_path: Path) -> None:
    shell, option, text = shlex.split(job["spec"]["entrypoint"])
    assert (shell, option) == ("sh", "-c")
    text = text.replace("/runs", str(tmp_path)).replace("fedlora run", "echo")
    said = subprocess.run([shell, option, text], capture_output=True, text=True, check=True).stdout
    assert said.split()[:2] == ["engine=ray", "engine.actors=16"]
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").touch()
    said = subprocess.run([shell, option, text], capture_output=True, text=True, check=True).stdout
    assert said.split() == [f"resume={tmp_path}/first"]
