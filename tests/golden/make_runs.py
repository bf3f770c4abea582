"""Twelve tiny runs of the command, kept as numbers: a change of the layout must show that it changed none.

    python tests/golden/make_runs.py                 # run all, compare with runs.json, exit 1 on a difference
    python tests/golden/make_runs.py --write         # run all and write runs.json
    python tests/golden/make_runs.py fedit slora     # these alone

Each run is kept with its overrides, the SHA-256 over the names and bytes of the tensors of its adapter, their
norms, the bytes of each round and the keys of each file. The SHA-256 is compared on a processor of the kind
that wrote runs.json, since others sum matrix products in another order. Norms are compared everywhere,
within one part in a thousand.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

KEPT = Path(__file__).parent / "runs.json"
TINY = ["model=tiny", "data=tiny", "rounds=2", "client.head_lr=3e-3", "+data.source.rows=48"]
TINY += ["+data.source.test_rows=16"]
DP_SGD = ["privacy=dp_sgd", "privacy.accountant=rdp", "privacy.epsilon=6", "privacy.insecure_test_seed=1"]
CENTRAL = [
    "privacy=client_level",
    "privacy.accountant=rdp",
    "privacy.epsilon=6",
    "privacy.insecure_test_seed=1",
]

INSTRUCTION = ["model=hub", "model.path={decoder}", "lora.targets=[q_proj,v_proj]", "data=files"]
INSTRUCTION += [
    "data.train={instructions}",
    "data.prompt=prompt",
    "data.response=response",
    "evaluate.answers=3",
]
INSTRUCTION += ["client.steps=3", "client.batch_size=4"]

RUNS: dict[str, list[str]] = {
    "fedit": [*TINY, "clients=3", "ranks=4", "strategy=fedit"],
    "flexlora": [*TINY, "clients=3", "ranks=[2,4]", "strategy=flexlora"],
    "fedfold": [*TINY, "clients=3", "ranks=[2,4]", "strategy=fedfold"],
    "record_level": [*TINY, "clients=3", "ranks=4", "strategy=ffalora", "client.batch_size=4", *DP_SGD],
    "client_level": [*TINY, "clients=6", "ranks=4", "strategy=ffalora", *CENTRAL],
    "secure_sum": [*TINY, "clients=3", "ranks=4", "strategy=ffalora", "secure_sum=true"],
    "slora": [*TINY, "clients=3", "ranks=4", "strategy=slora"],
    "hetlora": [*TINY, "clients=3", "ranks=[2,4]", "strategy=hetlora"],
    "fedms": [*TINY, "clients=3", "ranks=4", "strategy=fedms"],
    "pfedlora": [*TINY, "clients=3", "ranks=4", "strategy=pfedlora"],
    "robust": [*TINY, "clients=5", "ranks=4", "strategy=fedit", "robust=krum"],
    "instruction": [*INSTRUCTION, "rounds=2", "clients=2", "ranks=[2,4]", "strategy=flexlora"],
}


def processor() -> str:
    """What decides in which order a matrix product is summed: the processor, and torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.split('+')[0]}"


def make_decoder(folder: Path) -> None:
    """A random Llama of two layers with the byte tokenizer of model=tiny."""
    from tokenizers import decoders
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedlora.models.packaged import tiny

    tokenizer = AutoTokenizer.from_pretrained(tiny())
    tokenizer.eos_token = "[UNK]"
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.3)).save_pretrained(folder)


def write_instructions(path: Path) -> None:
    """Forty-eight prompts that ask which of two kinds a word is, and the answers."""
    kinds = {"animal": ["cat", "dog", "horse", "goose"], "tool": ["hammer", "saw", "drill", "file"]}
    rows = [
        {"prompt": f"what is the {word} number {n}?", "response": kind}
        for kind, words in kinds.items()
        for word in words
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def keys(path: Path) -> list[str]:
    """The sorted keys of a JSON file, or of all lines of a JSONL file, nested ones joined by dots."""

    def walk(value: Any, above: str) -> set[str]:
        if not isinstance(value, dict):
            return {above}
        return {above} | {
            k for name, inner in value.items() for k in walk(inner, f"{above}.{name}".lstrip("."))
        }

    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    found = {key for line in lines for key in walk(json.loads(line), "")}
    return sorted(found - {""})


def seen(out: Path) -> dict[str, Any]:
    """What is kept of a run's folder."""
    file = out / "adapter" / "adapter_model.safetensors"
    if not file.exists():  # a personal strategy has no global adapter: its server's last state is kept
        file = max((out / "checkpoint").glob("round-*.safetensors"))
    tensors = dict(sorted(load_file(file).items()))
    bits = b"".join(name.encode() + tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tables = ["summary.json", "metrics.jsonl", "clients.jsonl", "data.json", "answers.jsonl"]
    return {
        "sha256": hashlib.sha256(bits).hexdigest(),
        "norms": {name: float(tensor.double().norm()) for name, tensor in tensors.items()},
        "bytes_down": [line["bytes_down"] for line in lines],
        "bytes_up": [line["bytes_up"] for line in lines],
        "files": sorted(p.name for p in out.iterdir() if p.name != "report.html"),
        "keys": {name: keys(out / name) for name in tables if (out / name).exists()},
    }


def run(name: str, scratch: Path) -> dict[str, Any]:
    """Run one of RUNS with the command in a process of its own; what is kept of it."""
    words = [w.format(decoder=scratch / "decoder", instructions=scratch / "rows.jsonl") for w in RUNS[name]]
    if name == "instruction":
        make_decoder(scratch / "decoder")
        write_instructions(scratch / "rows.jsonl")
    command = [str(Path(sys.executable).parent / "fedlora"), "run", *words, f"out={scratch / name}"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=scratch, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{name}: fedlora run exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return {"overrides": RUNS[name], **seen(scratch / name)}


def differences(kept: dict[str, Any], made: dict[str, Any], *, bits: bool) -> list[str]:
    """What differs between a kept run and one made now, a line each; `bits` compares the SHA-256 too."""
    found = []
    for key in kept:
        if key == "norms":
            near = kept[key].keys() == made[key].keys() and all(
                abs(made[key][name] - norm) <= 1e-3 * norm for name, norm in kept[key].items()
            )
            if not near:
                found.append("norms: the adapter's tensors differ by more than one part in a thousand")
        elif (bits or key != "sha256") and kept[key] != made[key]:
            found.append(f"{key}: kept {kept[key]}, made {made[key]}")
    return found


def main() -> int:
    """Compare the runs that are named, or all, with runs.json; with --write, write it."""
    names = [word for word in sys.argv[1:] if word != "--write"] or list(RUNS)
    with tempfile.TemporaryDirectory() as folder:
        made = {name: run(name, Path(folder)) for name in names}
    if "--write" in sys.argv:
        old = json.loads(KEPT.read_text())["runs"] if KEPT.exists() else {}
        KEPT.write_text(json.dumps({"processor": processor(), "runs": old | made}, indent=1) + "\n")
        return 0
    kept = json.loads(KEPT.read_text())
    bits = kept["processor"] == processor()
    bad = 0
    for name in names:
        found = differences(kept["runs"][name], made[name], bits=bits)
        print(f"{name}: {'differs' if found else 'same'}{'' if bits else ' (SHA-256 not compared)'}")
        for line in found:
            print(f"  {line}")
        bad += bool(found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
