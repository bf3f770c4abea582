"""The same run over SuperLink and SuperNodes, with TLS and node keys, and while parts of it die."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trial import JOB, Trial, free_ports, summary

from fedlora.deploy.tls import node_key

pytestmark = pytest.mark.slow
ALONE = """
import sys
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

config = AutoConfig.from_pretrained(sys.argv[1] + "/base")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[2], config=config)
model = PeftModel.from_pretrained(base, sys.argv[1]).eval()
logits = model(**tokenizer(["w1 w2"], return_tensors="pt")).logits
assert logits.shape == (1, len(config.id2label)), logits.shape
print(*(config.id2label[i] for i in range(len(config.id2label))))
"""  # what README says, without fedlora
DEPLOY = ("engine=deploy", "engine.superlink=fedlora", *JOB)


def lines(path: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def test_sites_reach_the_adapter_of_one_process_though_a_worker_is_killed(
    trial: Trial, alone: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", []
    with trial.running("run", *DEPLOY, "rounds=2", f"out={out}") as process:
        for line in process.stdout or []:
            said.append(line)
            if line.startswith("round 1/2"):
                (worker,) = trial.workers("north")
                os.kill(worker, signal.SIGKILL)
    assert process.returncode == 0, said
    assert summary(out)["adapter_sha256"] == alone("rounds=2")["adapter_sha256"]
    assert [line["dropped"] for line in lines(out, "metrics.jsonl")] == [0, 0]
    # the same files as in one process, and what was shown on the way
    found = {path.name for path in out.iterdir()}
    assert found >= {
        "config.yaml",
        "metrics.jsonl",
        "clients.jsonl",
        "summary.json",
        "adapter",
        "report.html",
    }
    assert [line.split()[1] for line in said if line.startswith("round")] == ["1/2", "2/2"]
    card = json.loads((out / "task.json").read_text())
    loaded = subprocess.run(
        [sys.executable, "-c", ALONE, str(out / "adapter"), card["base"]], capture_output=True, text=True
    )
    assert loaded.stdout.split() == card["labels"], loaded.stderr


def test_a_server_killed_in_a_run_goes_on_from_its_last_round(
    trial: Trial, alone: Any, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    with trial.running("run", *DEPLOY, "rounds=2", "seed=1", f"out={out}") as process:
        for line in process.stdout or []:
            if line.startswith("round 1/2"):
                trial.kill("superexec")  # and with it the run's server
                trial.start("superexec")
        assert f"resume={out}" in (process.stderr.read() if process.stderr else "")
    assert process.returncode == 2
    assert "rounds 2 to 2" in trial.fedlora("run", f"resume={out}")
    assert summary(out)["adapter_sha256"] == alone("rounds=2", "seed=1")["adapter_sha256"]
    assert [line["round"] for line in lines(out, "metrics.jsonl")] == [1, 2]


def test_a_check_sees_every_site_and_says_what_is_wrong(trial: Trial) -> None:
    said = trial.fedlora("deploy", "check", *DEPLOY[1:])
    assert "nothing found" in said
    done = subprocess.run(
        trial.command("deploy", "check", DEPLOY[1], "engine.wait=1", *JOB, "clients=3", "ranks=2"),
        capture_output=True,
        text=True,
        env=trial.environment,
    )
    assert done.returncode == 2
    assert "client 1 is of rank 4, this run can serve 1 to 2" in done.stdout
    assert "1 of 3 sites" in done.stdout


def test_a_site_whose_key_is_not_registered_stays_outside(trial: Trial, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    shutil.copytree(trial.folder / "sites" / "north", stranger, ignore=lambda *_: ["state", "flower"])
    (stranger / "node.key").unlink()
    (stranger / "node.key").write_bytes(node_key("stranger")[0])
    (stranger / "node.key").chmod(0o600)
    (stranger / "supernode.sh").write_text(
        re.sub(r"(?m)^PORT=\d+", f"PORT={free_ports(1)[0]}", (stranger / "supernode.sh").read_text())
    )
    with (tmp_path / "log").open("w+") as log:
        done = subprocess.run(
            [stranger / "supernode.sh"], stdout=log, stderr=log, env=trial.environment, timeout=60
        )
    assert done.returncode != 0
    again = subprocess.run(
        [trial.folder / "server" / "register.sh"], capture_output=True, text=True, env=trial.environment
    )
    assert again.stdout == "north: was registered before\nsouth: was registered before\n"
