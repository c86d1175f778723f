"""Every loss in float64 NumPy, written from its paper, and its gradient by complex steps.

Dimensions: N examples. An oracle takes `Given` and all hyperparameters, and returns losses [N]; of
an empty slot the number means nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

LARGEST_EXPONENT = 40.0


class Scored(NamedTuple):
    """Of one completion of each example, float64 [N]: summed log-probability, tokens, other
    sums.
    """

    total: np.ndarray
    length: np.ndarray
    statistics: Mapping[str, np.ndarray] = {}


Completions = Mapping[str, Scored]


class Given(NamedTuple):
    """What a loss is computed from.

    `held` is the policy once more: what has no gradient is computed from it, so that a step in
    `policy` does not see it. `earlier` are the batches before this one.
    """

    policy: Completions
    reference: Completions
    batch: Mapping[str, np.ndarray]
    held: Completions
    earlier: tuple["Given", ...] = ()


def log_sigmoid(x):
    below = np.real(x) < 0
    return np.where(below, x, 0.0) - np.log1p(np.exp(np.where(below, x, -x)))


def logsumexp(x):
    """Over the first axis."""
    largest = np.real(x).max(axis=0)
    return largest + np.log(np.exp(x - largest).sum(axis=0))


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def smoothed(margin, label_smoothing):
    """Negative log-likelihood of a preference whose label is flipped with this probability."""
    right, flipped = -log_sigmoid(margin), -log_sigmoid(-margin)
    return (1 - label_smoothing) * right + label_smoothing * flipped


def log_ratio(given: Given, name: str):
    return given.policy[name].total - given.reference[name].total


def held_log_ratio(given: Given, name: str):
    return given.held[name].total - given.reference[name].total


def mean(given: Given, name: str):
    return given.policy[name].total / given.policy[name].length


def lengths(given: Given) -> tuple[np.ndarray, np.ndarray]:
    return given.policy["chosen"].length, given.policy["rejected"].length


def filled(given: Given) -> np.ndarray:
    return given.batch["weight"] > 0


# scores: what takes the place of the log-ratio under another f-divergence, 0 at the reference


def reverse_kl(ratio):
    return ratio


def forward_kl(ratio):
    return 1 - np.exp(np.minimum(-ratio, LARGEST_EXPONENT))


def jensen_shannon(ratio):
    return log_sigmoid(ratio) + np.log(2)


def alpha_divergence(ratio, alpha):
    if alpha == 1:
        return ratio
    return np.expm1(np.minimum((alpha - 1) * ratio, LARGEST_EXPONENT)) / (alpha - 1)


def scores(given: Given, score: Callable) -> tuple[np.ndarray, np.ndarray]:
    return score(log_ratio(given, "chosen")), score(log_ratio(given, "rejected"))


# pairs with a reference


def dpo(given, *, beta, label_smoothing, score):
    """Eq. 7 of 2305.18290, labels smoothed as in its cDPO note, score as in 2309.16240."""
    chosen, rejected = scores(given, score)
    return smoothed(beta * (chosen - rejected), label_smoothing)


def alpha_dpo(given, *, beta, alpha, label_smoothing):
    """2309.16240: DPO under an alpha-divergence."""
    chosen, rejected = (
        alpha_divergence(log_ratio(given, name), alpha) for name in ("chosen", "rejected")
    )
    return smoothed(beta * (chosen - rejected), label_smoothing)


def robust(given, *, beta, label_smoothing, score):
    """2403.00409: unbiased under labels flipped with this probability."""
    chosen, rejected = scores(given, score)
    right, flipped = (
        -log_sigmoid(beta * (chosen - rejected)),
        -log_sigmoid(beta * (rejected - chosen)),
    )
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(given, *, beta, score):
    """Eq. 17 of 2310.12036 on means over tokens."""
    (chosen, rejected), (chosen_length, rejected_length) = scores(given, score), lengths(given)
    return (chosen / chosen_length - rejected / rejected_length - 1 / (2 * beta)) ** 2


def ipo_sum(given, *, beta, score):
    """Eq. 17 of 2310.12036 on sums over tokens."""
    chosen, rejected = scores(given, score)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(given, *, beta, score):
    """2305.10425 and 2309.06657."""
    chosen, rejected = scores(given, score)
    return np.maximum(0, 1 - beta * (chosen - rejected))


def exo_pair(given, *, beta, label_smoothing, score):
    """2402.00856: KL of the model's preference from the smoothed label, in that order."""
    chosen, rejected = scores(given, score)
    total = 0.0
    for margin, label in (
        (beta * (chosen - rejected), 1 - label_smoothing),
        (beta * (rejected - chosen), label_smoothing),
    ):
        total = total + sigmoid(margin) * (log_sigmoid(margin) - np.log(label))
    return total


def nca_pair(given, *, beta, score):
    """2402.05369, one positive and one negative."""
    chosen, rejected = scores(given, score)
    return (
        -log_sigmoid(beta * chosen)
        - (log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected)) / 2
    )


def bco_pair(given, *, beta, delta, score):
    """2404.04656 on a pair, its shift given."""
    chosen, rejected = scores(given, score)
    return -log_sigmoid(beta * chosen - delta) - log_sigmoid(delta - beta * rejected)


def sppo_hard(given, *, beta, score):
    """2405.00675 with winning probabilities 1 and 0."""
    chosen, rejected = scores(given, score)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_zero(given, *, beta):
    """2408.06266: chosen up, rejected down."""
    chosen, rejected = log_ratio(given, "chosen"), log_ratio(given, "rejected")
    return 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)


def apo_down(given, *, beta):
    """2408.06266: chosen down, rejected more so."""
    chosen, rejected = log_ratio(given, "chosen"), log_ratio(given, "rejected")
    return sigmoid(beta * chosen) + 1 - sigmoid(beta * (chosen - rejected))


def discopop(given, *, beta, tau):
    """2406.08414: log-ratio modulated mixture of the logistic and the exponential loss."""
    z = beta * (log_ratio(given, "chosen") - log_ratio(given, "rejected"))
    exponential = np.exp(log_sigmoid(z / tau) - z)
    return sigmoid(-z / tau) * -log_sigmoid(z) + exponential


def dpo_norm(given, *, beta, score):
    """Tulu 3 (2411.15124): DPO on means over tokens."""
    (chosen, rejected), (chosen_length, rejected_length) = scores(given, score), lengths(given)
    return -log_sigmoid(beta * (chosen / chosen_length - rejected / rejected_length))


def dpop(given, *, beta, lam):
    """2402.13228: a penalty where the chosen completion has become less likely."""
    chosen, rejected = log_ratio(given, "chosen"), log_ratio(given, "rejected")
    return -log_sigmoid(beta * (chosen - rejected - lam * np.maximum(0, -chosen)))


def r_dpo(given, *, beta, alpha):
    """2403.19159: the reward is that of which the policy maximises reward - alpha length."""
    chosen_length, rejected_length = lengths(given)
    reward_w = beta * log_ratio(given, "chosen") + alpha * chosen_length
    reward_l = beta * log_ratio(given, "rejected") + alpha * rejected_length
    return -log_sigmoid(reward_w - reward_l)


def ld_dpo(given, *, beta, alpha):
    """2409.06411: tokens beyond the shorter completion count alpha, in both models."""
    chosen, rejected = (
        desensitised(given.policy[name], alpha) - desensitised(given.reference[name], alpha)
        for name in ("chosen", "rejected")
    )
    return -log_sigmoid(beta * (chosen - rejected))


def ld_dpo_policy(given, *, beta, alpha):
    """The same, in the policy only."""
    chosen, rejected = (
        desensitised(given.policy[name], alpha) - given.reference[name].total
        for name in ("chosen", "rejected")
    )
    return -log_sigmoid(beta * (chosen - rejected))


def desensitised(scored: Scored, alpha):
    head = scored.statistics["head"]
    return head + alpha * (scored.total - head)


def wpo(given, *, beta, label_smoothing):
    """2406.11827: DPO weighted by how likely the policy makes the pair, aligned, no gradient."""
    chosen, rejected = (given.held[name] for name in ("chosen", "rejected"))
    log_weight = (
        chosen.statistics["excess"] / chosen.length
        + rejected.statistics["excess"] / rejected.length
    )
    margin = beta * (log_ratio(given, "chosen") - log_ratio(given, "rejected"))
    return np.exp(np.minimum(log_weight, 0)) * smoothed(margin, label_smoothing)


def aot(given, *, beta, label_smoothing):
    """2406.05882, paired: the policy's margins should dominate the reference's."""
    policy, reference = (
        side["chosen"].total - side["rejected"].total for side in (given.policy, given.reference)
    )
    return transported(given, policy, reference, beta, label_smoothing)


def aot_unpaired(given, *, beta, label_smoothing):
    """2406.05882, unpaired: the chosen log-ratios should dominate the rejected ones."""
    chosen, rejected = log_ratio(given, "chosen"), log_ratio(given, "rejected")
    return transported(given, chosen, rejected, beta, label_smoothing)


def transported(given, larger, smaller, beta, label_smoothing):
    """Quantile against quantile over the examples that are there."""
    there = filled(given)
    quantiles = np.sort(larger[there]) - np.sort(smaller[there])
    losses = np.zeros(len(there), quantiles.dtype)
    losses[there] = smoothed(beta * quantiles, label_smoothing)
    return losses


def mpo(given, *, beta, preference, quality, generation):
    """2411.10442: preference, quality and generation."""
    on_each = bco_pair(given, beta=beta, delta=0.0, score=reverse_kl)
    on_pair = dpo(given, beta=beta, label_smoothing=0.0, score=reverse_kl)
    return preference * on_pair + quality * on_each + generation * preferred_ft(given)


def rpo(given, *, beta, alpha):
    """2405.16436: DPO and the chosen completion's NLL."""
    preference = dpo(given, beta=beta, label_smoothing=0.0, score=reverse_kl)
    return preference + alpha * preferred_ft(given)


# one completion, labelled


def desirable(given: Given) -> np.ndarray:
    return given.batch["desirable"] > 0


def kto(given, *, beta, lambda_desirable, lambda_undesirable):
    """Eq. 8 of 2402.01306; z, the estimate of KL, is no part of the gradient."""
    ratio = log_ratio(given, "completion")
    there = filled(given)
    z = max(0.0, held_log_ratio(given, "mismatched")[there].mean()) if there.any() else 0.0
    gain = lambda_desirable * (1 - sigmoid(beta * (ratio - z)))
    loss = lambda_undesirable * (1 - sigmoid(beta * (z - ratio)))
    return np.where(desirable(given), gain, loss)


def apo_zero_unpaired(given, *, beta, lambda_desirable, lambda_undesirable):
    """2408.06266 on one completion."""
    ratio = log_ratio(given, "completion")
    gain, loss = 1 - sigmoid(beta * ratio), sigmoid(beta * ratio)
    return np.where(desirable(given), lambda_desirable * gain, lambda_undesirable * loss)


def bco(given, *, beta):
    """2404.04656: shifted by half the sum of the classes' mean rewards so far."""
    rewards, labels = rewards_so_far(given, beta)
    shift = (rewards[labels].mean() + rewards[~labels].mean()) / 2
    return classified(given, beta, shift)


def bco_joint(given, *, beta):
    """2404.04656 with one mean reward so far over both classes."""
    return classified(given, beta, rewards_so_far(given, beta)[0].mean())


def bco_weighted(given, *, beta, smallest, largest):
    """2404.04656: the undesirable ones weighted by the clipped density ratio."""
    weight = np.clip(given.batch["density_ratio"], smallest, largest)
    return np.where(desirable(given), 1.0, weight) * bco_joint(given, beta=beta)


def rewards_so_far(given: Given, beta) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and labels of all examples of this batch and those before it."""
    batches = [*given.earlier, given]
    rewards = [beta * held_log_ratio(one, "completion")[filled(one)] for one in batches]
    return np.concatenate(rewards), np.concatenate([desirable(b)[filled(b)] for b in batches])


def classified(given: Given, beta, shift):
    logit = beta * log_ratio(given, "completion") - shift
    return -log_sigmoid(np.where(desirable(given), logit, -logit))


# without a reference


def orpo(given, *, lam):
    """Eq. 6 and 7 of 2403.07691, the NLL over the completion."""
    return -mean(given, "chosen") - lam * log_sigmoid(log_odds_ratio(given))


def orpo_prompt(given, *, lam):
    """The same, the NLL over prompt and completion."""
    prompt, chosen = given.policy["prompt"], given.policy["chosen"]
    nll = -(prompt.total + chosen.total) / (prompt.length + chosen.length)
    return nll - lam * log_sigmoid(log_odds_ratio(given))


def log_odds_ratio(given: Given):
    """Of odds p / (1 - p), p the geometric mean of the tokens' probabilities."""
    odds = [mean(given, n) - np.log(-np.expm1(mean(given, n))) for n in ("chosen", "rejected")]
    return odds[0] - odds[1]


def simpo(given, *, beta, gamma):
    """Eq. 6 of 2405.14734."""
    return -log_sigmoid(beta * mean(given, "chosen") - beta * mean(given, "rejected") - gamma)


def alphapo(given, *, beta, gamma, alpha):
    """2501.03884: SimPO whose reward is (1 - p^-alpha) / alpha, log p at alpha 0."""
    rewards = {}
    for name in ("chosen", "rejected"):
        exponent = np.minimum(-alpha * mean(given, name), LARGEST_EXPONENT)
        rewards[name] = -np.expm1(exponent) / alpha if alpha else mean(given, name)
    return -log_sigmoid(beta * (rewards["chosen"] - rewards["rejected"]) - gamma)


def cpo(given, *, beta, label_smoothing, alpha):
    """2401.08417: DPO with a uniform reference, and NLL."""
    margin = beta * (given.policy["chosen"].total - given.policy["rejected"].total)
    return smoothed(margin, label_smoothing) - alpha * mean(given, "chosen")


def tpo(given, *, beta, alpha):
    """2405.16681: a preference without reference, and NLL of a gold completion."""
    margin = beta * (given.policy["chosen"].total - given.policy["rejected"].total)
    return -log_sigmoid(margin) - alpha * mean(given, "gold")


def sft(given):
    """Negative log-likelihood per token."""
    return -mean(given, "completion")


def preferred_ft(given):
    """2305.18290, baseline: negative log-likelihood per token of the chosen completion."""
    return -mean(given, "chosen")


def unlikelihood(given, *, alpha):
    """2305.18290, baseline: likelier chosen, less likely rejected."""
    return -given.policy["chosen"].total + alpha * given.policy["rejected"].total


# rankings


def plackett_luce(given, *, beta):
    """Eq. 18-20 of 2305.18290: each completion is the best of those that are left."""
    names = sorted(given.policy, key=lambda name: int(name.removeprefix("completion_")))
    rewards = np.stack([beta * log_ratio(given, name) for name in names])  # [k, N]
    choices = [logsumexp(rewards[place:] - rewards[place]) for place in range(len(names) - 1)]
    return np.sum(choices, axis=0)


# sums over a completion's tokens: logits [T, V], target [T]


def log_softmax(logits):
    return logits - logsumexp(logits.T)[:, None]


def head(logits, target, shortest):
    """Log-probability of the first tokens, as many as the shortest completion has."""
    return log_softmax(logits)[np.arange(len(target)), target][:shortest].sum()


def excess(logits, target):
    """log p of each target above log of the mean probability that p itself expects."""
    table = log_softmax(logits)
    chosen = table[np.arange(len(target)), target]
    return (chosen - np.log((np.exp(table) ** 2).sum(axis=-1))).sum()


# gradients

# so small that its square is nothing beside 1
STEP = 1e-30


def gradient(oracle: Callable, given: Given, **numbers: Any) -> dict[tuple[str, str], np.ndarray]:
    """Gradient of the summed losses of the examples that are there, in every total and statistic
    of the policy: {(completion, "total" or statistic): [N]}.

    Each number takes a complex step alone, so that losses may read the whole batch.
    """
    there = filled(given)
    slopes = {}
    for name, scored in given.policy.items():
        for leaf in ("total", *scored.statistics):
            slope = np.zeros(len(there))
            for place in np.flatnonzero(there):
                losses = oracle(stepped(given, name, leaf, int(place)), **numbers)
                slope[place] = np.imag(losses)[there].sum() / STEP
            slopes[name, leaf] = slope
    return slopes


def stepped(given: Given, name: str, leaf: str, place: int) -> Given:
    """The same with an imaginary step in one number of the policy."""
    scored = given.policy[name]
    step = np.zeros(len(scored.total), complex)
    step[place] = STEP * 1j
    if leaf == "total":
        scored = scored._replace(total=scored.total + step)
    else:
        statistics = {**scored.statistics, leaf: scored.statistics[leaf] + step}
        scored = scored._replace(statistics=statistics)
    return given._replace(policy={**given.policy, name: scored})
