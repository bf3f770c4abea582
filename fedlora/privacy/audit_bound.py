"""A lower bound on epsilon from a membership-inference attack on one training run.

Steinke, Nasr, Jagielski. "Privacy Auditing with One (1) Training Run". NeurIPS 2023.
https://arxiv.org/abs/2305.08846
"""

import math

import numpy as np

from fedlora.errors import ConfigError

CONFIDENCE = 0.95


def p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of at least so many right guesses if training is (ε, δ)-private.

    Steinke et al. (2023), corollary 5.4 and appendix D of arXiv version 1. It holds for every guessing
    strategy: P[right ≥ v] ≤ f(v) + 2 m δ max_i (f(v - i) - f(v)) / i, where f(v) = P[Binomial(r, 1/(1+e^-ε))
        ≥ v].

    Args:
        right: v, the number of right guesses.
        guesses: r, the number of guesses; it must not depend on which of them are right.
        canaries: m, the number of records that were included by independent fair coins, guessed or not.
        epsilon: ε, the hypothesis to be refuted.
        delta: δ.

    Raises:
        ConfigError: the numbers contradict each other, such as more right guesses than guesses.
    """
    if not (0 <= right <= guesses <= canaries and 0 <= epsilon < math.inf and 0 <= delta <= 1):
        raise ConfigError(
            "audit: expected 0 <= right <= guesses <= canaries, epsilon of at least 0 and delta from 0 "
            f"to 1; got {right=}, {guesses=}, {canaries=}, {epsilon=}, {delta=}"
        )
    k = np.arange(guesses + 1)
    factorials = np.array([math.lgamma(i + 1) for i in k])
    hit = -math.log1p(math.exp(-epsilon))  # log-probabilities of a right and of a wrong guess
    miss = hit - epsilon
    chances = np.exp(factorials[-1] - factorials - factorials[::-1] + k * hit + (guesses - k) * miss)
    below = np.cumsum(chances[:right][::-1])  # f(v - i) - f(v) for i from 1 to v; f is 1 beyond
    steepest = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, float(chances[right:].sum()) + 2 * canaries * delta * steepest)


def lower_bound(
    right: int, guesses: int, canaries: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon that the guesses refute, rounded down by at most 1e-6; 0 if they refute none.

    With probability `confidence` the true epsilon is at least this (lemma 4.7 of the paper).

    Args:
        right: the number of right guesses.
        guesses: the number of guesses.
        canaries: the number of canaries, guessed or not.
        delta: the δ of the guarantee.
        confidence: one minus the p-value below which an epsilon is refuted.

    Raises:
        ConfigError: as for `p_value`.
    """

    def refuted(epsilon: float) -> bool:
        return p_value(right, guesses, canaries, epsilon, delta) < 1 - confidence

    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low  # a refuted value, so the search errs to the low side
