"""What right guesses of one training run say of its epsilon.

Steinke, Nasr, Jagielski. "Privacy Auditing with One (1) Training Run". NeurIPS 2023.
https://arxiv.org/abs/2305.08846
"""

import math

import numpy as np

from fedlora.errors import ConfigError

CONFIDENCE = 0.95


def p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The most that the probability of so many right guesses, or more, is under (epsilon, delta)-privacy.

    Steinke et al. (2023), corollary 5.4 and appendix D of arXiv version 1, for whatever way to guess:
    P[right ≥ v] ≤ f(v) + 2 m δ max_i (f(v - i) - f(v)) / i, where f(v) = P[Binomial(r, 1/(1+e^-ε)) ≥ v].

    Args:
        right: v, the guesses that are right.
        guesses: r, those that were made; how many must not depend on which are right.
        canaries: m, the records that were in or out by a fair coin each, guessed or not.
        epsilon: ε, to be refuted.
        delta: δ.

    Raises:
        ConfigError: numbers that cannot be, such as more right guesses than guesses.
    """
    if not (0 <= right <= guesses <= canaries and 0 <= epsilon < math.inf and 0 <= delta <= 1):
        raise ConfigError(
            "audit: expected 0 <= right <= guesses <= canaries, epsilon of at least 0 and delta from 0 "
            f"to 1; got {right=}, {guesses=}, {canaries=}, {epsilon=}, {delta=}"
        )
    k = np.arange(guesses + 1)
    factorials = np.array([math.lgamma(i + 1) for i in k])
    hit = -math.log1p(math.exp(-epsilon))  # the logarithms of a guess's chances, to be right and wrong
    miss = hit - epsilon
    chances = np.exp(factorials[-1] - factorials - factorials[::-1] + k * hit + (guesses - k) * miss)
    below = np.cumsum(chances[:right][::-1])  # f(v - i) - f(v) for i from 1 to v; f is 1 beyond
    steepest = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, float(chances[right:].sum()) + 2 * canaries * delta * steepest)


def lower_bound(
    right: int, guesses: int, canaries: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon that so many right guesses refute, to 1e-6 below; 0 if they refute none.

    The true epsilon is at least this with probability `confidence` (lemma 4.7 there).

    Args:
        right: guesses that are right.
        guesses: those that were made.
        canaries: guessed or not.
        delta: at which epsilon is meant.
        confidence: one minus the p-value at which an epsilon counts as refuted.

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
    return low  # it is refuted itself, so that the search does not raise the bound
