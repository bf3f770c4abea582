"""A long row takes memory in proportion to its tokens, and not to their square."""

import subprocess
import sys

import pytest

TOKENS = 8192
# In a process of its own, whose largest memory nothing else has reached before.
SCRIPT = """
import resource, sys
import torch, transformers
from fedlora.clients import LocalTraining
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, LoRA, fresh_adapter, targets
from fedlora.models.attention import attend_our_way
from fedlora.models.packing import packing_of
from fedlora.tasks import Instruction
from fedlora.training.client import TrainRequest
from fedlora.training.evaluation import evaluate

tokens = int(sys.argv[1])
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, max_position_embeddings=tokens,
)).eval().requires_grad_(False)
assert attend_our_way(model)
base = Base(model, None, Instruction(), (), "llama", None, packing_of(model, None))
assert base.packing is not None
shapes = targets(base, "all-linear")
task = Task(fresh_adapter(base, shapes, LoRA().peer(0, 4, shapes), ()))
client = LocalTraining(lr=1e-2)

def train(length):
    ids = torch.randint(3, 300, (length,)).tolist()
    rows = [Example(ids, [-100, *ids[1:]])]
    [result] = client.train(base, [TrainRequest(0, 1, 0, task, rows)])
    evaluate(base, [task], [rows])
    return result

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

train(64)
before = peak()
result = train(tokens)
assert result.adapter.digest() != task.adapter.digest()
print(peak() - before)
"""


@pytest.mark.slow
def test_a_row_of_many_tokens_trains_in_less_memory_than_one_mask_of_its_pairs_would_take() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(TOKENS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * TOKENS**2
