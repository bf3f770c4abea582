"""Does private training keep its word? An audit of the very code that users run, by one training run.

Steinke, Nasr, Jagielski. "Privacy Auditing with One (1) Training Run". NeurIPS 2023.
https://arxiv.org/abs/2305.08846
Canaries are put into a client's data or left out, each by its own coin; the client trains as it always does;
then whoever sees its adapters guesses the coins. More right guesses than epsilon allows refute the ledger.

The canaries are as telling as the mechanism permits: each has a gradient far over the clip, in one coordinate
of factor A that no other canary touches (their Dirac canaries). One that is out leaves a blank record of no
gradient in its place: the ledger's epsilon is for a known number of records, so that must not say anything.

Guesses refute gross errors only, since even the best of them are right less often than epsilon allows. So two
quantities that the settings fix are measured too: the noise, in the coordinates of canaries that are out, and
how far canaries that are in have moved theirs. These show a factor of two, at the defaults; guesses do not.
"""

import math
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base
from fedlora.privacy import DPSGD, Ledger
from fedlora.privacy.audit_bound import CONFIDENCE, lower_bound
from fedlora.seeds import generator
from fedlora.tasks import Classification
from fedlora.training.client import TrainRequest

# One canary in so many is guessed, half of these as in. Fixed beforehand, so that no choice has to be paid
# for; of 4000, guessing fewer makes the bound vary more from run to run, guessing more makes it lower.
ONE_IN = 10
FEWEST = 500  # canaries; fewer show next to nothing
LIMIT = 5.0  # standard errors; right code goes beyond in one audit of some 500 000
CLIP, RATE = 0.5, 1e-3  # not 1, so that a factor left out or put in twice shows
LOUD = 10.0  # a canary's gradient over the clip; RATE is too small to change it on the way
MODULE = "probe"


@dataclass(frozen=True)
class Reading:
    """One quantity that was measured, against what the settings make it.

    Args:
        ratio: measured over expected.
        deviation: of the ratio from 1, in standard errors.
    """

    ratio: float
    deviation: float

    @property
    def fits(self) -> bool:
        """Whether the deviation may be chance."""
        return abs(self.deviation) <= LIMIT  # not for one that is no number

    def __str__(self) -> str:
        return f"{self.ratio:.3f} of what it should be ({self.deviation:+.1f} standard errors off)"


@dataclass(frozen=True)
class Audit:
    """What a client claimed, and what was found.

    Args:
        claimed: epsilon by the client's own ledger, after the last round.
        delta: at which epsilon is meant, both times.
        valid: whether the ledger says that its noise was random.
        counted: steps in the ledger of the noise and the batches that were planned.
        steps: those that were trained.
        lower: what epsilon is at least, with a confidence of 95 %.
        right: guesses that were right.
        guesses: those that were made.
        canaries: in and out.
        noise: standard deviation of the rounds' noise, or of its sum over them, whichever is farther off.
        signal: mean movement by the canaries that were in.
    """

    claimed: float
    delta: float
    valid: bool
    counted: int
    steps: int
    lower: float
    right: int
    guesses: int
    canaries: int
    noise: Reading
    signal: Reading

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the claim; that does not prove it."""
        return all(good for good, _ in self.findings())

    def findings(self) -> list[tuple[bool, str]]:
        """For the ledger, the guesses, the noise and the signal: whether it fits the claim, and in words."""
        return [
            (
                self.valid and self.counted == self.steps,
                f"ledger   epsilon {self.claimed:.3f} at delta {self.delta:g}, for {self.counted} of "
                f"{self.steps} steps{'' if self.valid else '; NOT VALID, its noise is not random'}",
            ),
            (
                self.lower <= self.claimed,
                f"guesses  epsilon at least {self.lower:.3f} at {CONFIDENCE:.0%} confidence: {self.right} of "
                f"{self.guesses} right, of {self.canaries} canaries",
            ),
            (self.noise.fits, f"noise    {self.noise}"),
            (self.signal.fits, f"signal   {self.signal}"),
        ]


def audit(
    epsilon: float = 1.0,
    rounds: int = 5,
    steps: int = 10,
    batch_size: int = 800,
    canaries: int = 4000,
    seed: int = 0,
) -> Audit:
    """Train one client privately on canaries, its ledger carried from round to round, and attack it.

    Args:
        epsilon: what all rounds together may spend.
        rounds: of training.
        steps: of a round.
        batch_size: records of a step on the average; over `canaries`, the probability q of each.
        canaries: in or out.
        seed: of the coins alone; batches and noise are random, and differ from audit to audit.

    Raises:
        ConfigError: too few canaries, or settings that private training refuses.
    """
    if not (isinstance(canaries, int) and canaries >= FEWEST):
        raise ConfigError(
            f"audit: canaries: expected a whole number of at least {FEWEST}, since fewer show next to "
            f"nothing; got {canaries!r}"
        )
    privacy = DPSGD(epsilon=epsilon, clip=CLIP, participations=rounds)
    local = LocalTraining(lr=RATE, batch_size=batch_size, steps=steps, optimizer=torch.optim.SGD)
    client, plan = local.privately(privacy), privacy.plan(canaries, batch_size, steps)
    present = torch.from_numpy(generator(seed, "audit").integers(0, 2, canaries) == 1)
    rows = [Example([i if is_in else canaries], 0) for i, is_in in enumerate(present.tolist())]
    base = Base(_Probe(canaries).eval(), _Tokens(canaries), Classification(), (), "the audit's probe")
    B = LOUD * CLIP * torch.tensor([[1.0], [-1.0]])  # with which label 0 pulls every coordinate of A upwards
    adapter, ledger = Adapter({MODULE: Pair(torch.zeros(1, canaries), B)}), None
    seen = [adapter.pairs[MODULE].A[0].double()]
    for round in range(1, rounds + 1):
        task = Task(adapter, train=frozenset("A"), share=frozenset("A"))
        [outcome] = client.train(base, [TrainRequest(0, round, seed, task, rows, ledger=ledger)])
        adapter, ledger = outcome.adapter, outcome.ledger
        seen.append(adapter.pairs[MODULE].A[0].double())
    moved = torch.stack(seen).diff(dim=0) / (RATE * CLIP / batch_size)  # in steps of one clipped record
    spent, q, guesses = ledger or Ledger(plan.delta), batch_size / canaries, 2 * (canaries // (2 * ONE_IN))
    right = _guess(moved.sum(0), present, guesses)
    return Audit(
        claimed=spent.epsilon,
        delta=spent.delta,
        valid=spent.valid,
        counted=sum(e.steps for e in spent.entries if (e.sigma, e.q) == (plan.sigma, q)),
        steps=rounds * steps,
        lower=lower_bound(right, guesses, canaries, spent.delta),
        right=right,
        guesses=guesses,
        canaries=canaries,
        noise=_noise(moved[:, ~present], plan.sigma * math.sqrt(steps)),
        signal=_signal(moved.sum(0)[present], plan.sigma, q, rounds * steps),
    )


def report(audit: Audit) -> list[str]:
    """The audit in five lines: the verdict, then the ledger, the guesses, the noise and the signal."""
    verdict = "nothing contradicts the ledger" if audit.passed else "FAILED, training is not as it claims"
    return [
        f"privacy audit: {verdict}",
        *(f"{'ok' if good else 'FAIL':6}{text}" for good, text in audit.findings()),
    ]


@dataclass(frozen=True)
class _Config:
    """What training asks of a model's configuration."""

    pad_token_id: int

    def get_text_config(self) -> Self:
        """Itself: this model reads nothing but text."""
        return self

    def to_dict(self) -> dict[str, int]:
        """Every number of it by name."""
        return asdict(self)


class _Probe(nn.Module):
    """Two logits, linear in how often a row holds each canary; the token after the last canary is blank."""

    def __init__(self, canaries: int) -> None:
        super().__init__()
        self.probe = nn.Linear(canaries, 2, bias=False, device="meta")  # draws no numbers
        self.probe.weight = nn.Parameter(torch.zeros(2, canaries), requires_grad=False)
        self.config = _Config(canaries)

    def get_input_embeddings(self) -> nn.Embedding:
        """A table without values that tells how many tokens there are."""
        return nn.Embedding(self.config.pad_token_id + 1, 1, device="meta")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        counts = torch.zeros(len(input_ids), self.probe.in_features + 1)
        counts.scatter_add_(1, input_ids, attention_mask.to(counts))
        return SimpleNamespace(logits=self.probe(counts[:, :-1]))


class _Tokens:
    """What private training asks of a tokenizer: how many tokens there are, and which are not text."""

    def __init__(self, canaries: int) -> None:
        self.all_special_ids = [canaries]
        self.eos_token_id: int | None = None

    def __len__(self) -> int:
        return self.all_special_ids[0] + 1


def _guess(scores: Tensor, present: Tensor, guesses: int) -> int:
    """How many are right, half of them saying that the largest scores are in, half that the least are out."""
    ordered, half = present[scores.argsort(stable=True)], guesses // 2  # ties by number, not by coin
    return int(ordered[-half:].sum() + (~ordered[:half]).sum())


def _noise(moved: Tensor, sigma: float) -> Reading:
    """Of (rounds, coordinates), all alike normal with `sigma`: the rounds' spread, and that of their sum."""
    found = []
    for noise in (moved, moved.sum(0) / math.sqrt(len(moved))):  # the sum shows what rounds have in common
        ratio = float(noise.square().mean().sqrt()) / sigma
        found.append(Reading(ratio, (ratio - 1) * math.sqrt(2 * noise.numel())))
    return max(found, key=lambda reading: abs(reading.deviation))


def _signal(moved: Tensor, sigma: float, q: float, steps: int) -> Reading:
    """The mean over (coordinates,), each moved by one record that is in a share q of all steps."""
    ratio = float(moved.mean()) / (q * steps)
    error = math.sqrt((sigma**2 + q * (1 - q)) / (steps * len(moved))) / q
    return Reading(ratio, (ratio - 1) / error)
