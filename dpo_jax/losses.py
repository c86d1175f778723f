"""The losses. Each maps log-probabilities of completions to one number an example, and says what it
means by its name.

Dimensions: N examples. `policy` and `reference` map a completion's name to `logps.Logps` (total [N]
in nats, length [N] in tokens). Totals are sums over the completion's tokens, EOS included, prompt
excluded, float32. Every loss returns losses [N] and metrics {name: [N]}; a metric is nan where it
does not apply to an example. The train step takes the mean over the examples of the global batch,
whatever the microbatches; slots without an example have weight 0.
"""

from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Interval

from dpo_jax import contract
from dpo_jax.logps import Logps

Completions = Mapping[str, Logps]
Losses = tuple[jax.Array, dict[str, jax.Array]]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]


def log_ratio(policy: Completions, reference: Completions, name: str) -> jax.Array:
    """log pi(y|x) - log pi_ref(y|x) of the named completion, summed over its tokens: [N] nats."""
    return policy[name].total - reference[name].total


def mean_logp(completions: Completions, name: str) -> jax.Array:
    """Mean log-probability of the named completion's tokens: [N] nats a token."""
    return completions[name].total / jnp.maximum(completions[name].length, 1)


def pair_metrics(chosen: jax.Array, rejected: jax.Array) -> dict[str, jax.Array]:
    """The field's metrics of a pair from its two rewards [N]; a tie counts as half right."""
    margins = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": 0.5 * (1.0 + jnp.sign(margins)),
    }


def batch_mean(values: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Mean over the examples of the batch [N] -> scalar; empty slots are left out."""
    weight = batch["weight"]
    return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x <= 0, value and gradient finite everywhere (x is at most -1e-6)."""
    x = jnp.minimum(x, -1e-6)
    near = x > -0.6931472
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -0.6931472))),
        jnp.log1p(-jnp.exp(jnp.where(near, -0.6931472, x))),
    )


def dpo(
    policy: Completions,
    reference: Completions,
    batch: Mapping[str, jax.Array],
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0,
) -> Losses:
    """-(1-e) log sig(b D) - e log sig(-b D), D the difference of the log-ratios. Eq. 7 of
    https://arxiv.org/abs/2305.18290.

    Token sum; no batch statistics; gradient through the policy only. e > 0 is conservative DPO
    (cDPO). Defaults are the paper's. Agrees with the original code, TRL (sigmoid) and HALOs. ln 2
    where policy equals reference.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    label_smoothing: e, the share of the labels that is taken to be flipped
    """
    chosen = log_ratio(policy, reference, "chosen")
    rejected = log_ratio(policy, reference, "rejected")
    # beta after the difference: a fused multiply-add would round one of the two products alone
    margin = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(
        margin
    ) - label_smoothing * jax.nn.log_sigmoid(-margin)
    return losses, pair_metrics(beta * chosen, beta * rejected)


def ipo(
    policy: Completions,
    reference: Completions,
    batch: Mapping[str, jax.Array],
    *,
    beta: Positive = 0.1,
) -> Losses:
    """(D - 1/(2 b))^2, D the difference of the log-ratios per token. Eq. 17 of
    https://arxiv.org/abs/2310.12036, b its tau.

    Token MEAN of each completion, as its authors confirmed to TRL; agrees with TRL and HALOs.
    `ipo_sum` is the other reading. No batch statistics; gradient through the policy only. Rewards
    are b times the mean log-ratio.

    beta: the paper's tau; the margin is drawn to 1 / (2 beta) nats a token
    """
    chosen = mean_logp(policy, "chosen") - mean_logp(reference, "chosen")
    rejected = mean_logp(policy, "rejected") - mean_logp(reference, "rejected")
    losses = jnp.square(chosen - rejected - 1 / (2 * beta))
    return losses, pair_metrics(beta * chosen, beta * rejected)


def ipo_sum(
    policy: Completions,
    reference: Completions,
    batch: Mapping[str, jax.Array],
    *,
    beta: Positive = 0.1,
) -> Losses:
    """(D - 1/(2 b))^2, D the difference of the summed log-ratios. Eq. 17 of
    https://arxiv.org/abs/2310.12036, b its tau.

    Token SUM; agrees with the original DPO repository, EasyLM and OpenRLHF. No batch statistics;
    gradient through the policy only.

    beta: the paper's tau; the margin is drawn to 1 / (2 beta) nats
    """
    chosen = log_ratio(policy, reference, "chosen")
    rejected = log_ratio(policy, reference, "rejected")
    losses = jnp.square(chosen - rejected - 1 / (2 * beta))
    return losses, pair_metrics(beta * chosen, beta * rejected)


@contract.declare(batch_statistics=True)
def kto(
    policy: Completions,
    reference: Completions,
    batch: Mapping[str, jax.Array],
    *,
    beta: Positive = 0.1,
    lambda_desirable: Positive = 1.0,
    lambda_undesirable: Positive = 1.0,
) -> Losses:
    """w_D (1 - sig(b (r - z))) where desirable, w_U (1 - sig(b (z - r))) where not.
    https://arxiv.org/abs/2402.01306.

    r is the completion's summed log-ratio. z = max(0, mean of the mismatched completions'
    log-ratios) estimates KL(policy, reference); it has no gradient. Its mean is over what
    `Experiment.statistics` says: the global batch (the default) or each microbatch, as TRL does.
    Held out, it is over each batch of the evaluation. w_D n_D / (w_U n_U) should lie in [1, 4/3].
    Agrees with TRL and HALOs.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    lambda_desirable: w_D, weight of the desirable examples
    lambda_undesirable: w_U, weight of the undesirable examples
    """
    ratio = log_ratio(policy, reference, "completion")
    z = jax.lax.stop_gradient(
        jnp.maximum(batch_mean(log_ratio(policy, reference, "mismatched"), batch), 0.0)
    )
    desirable = batch["desirable"] > 0
    losses = jnp.where(
        desirable,
        lambda_desirable * jax.nn.sigmoid(-beta * (ratio - z)),
        lambda_undesirable * jax.nn.sigmoid(-beta * (z - ratio)),
    )
    rewards = beta * ratio
    return losses, {
        "kl": jnp.full_like(rewards, z),
        "rewards/chosen": jnp.where(desirable, rewards, jnp.nan),
        "rewards/rejected": jnp.where(desirable, jnp.nan, rewards),
    }


def orpo(
    policy: Completions, reference: None, batch: Mapping[str, jax.Array], *, lam: NonNegative = 0.1
) -> Losses:
    """-m_w - lambda log sig(log odds(m_w) - log odds(m_l)), m the mean log-probability.
    https://arxiv.org/abs/2403.07691.

    odds(m) = p / (1 - p) with p = exp(m). No reference. The NLL is over the completion's tokens
    alone, as LLaMA-Factory has it (the authors, TRL and tunix take prompt and completion), a mean
    over tokens and then over examples. No batch statistics. Default lambda is the paper's. Rewards
    are lambda m.

    lam: weight of the odds ratio beside the NLL
    """
    chosen, rejected = mean_logp(policy, "chosen"), mean_logp(policy, "rejected")
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    losses = -chosen - lam * jax.nn.log_sigmoid(log_odds_ratio)
    return losses, pair_metrics(lam * chosen, lam * rejected) | {
        "nll": -chosen,
        "log_odds_ratio": log_odds_ratio,
    }


def sft(policy: Completions, reference: None, batch: Mapping[str, jax.Array]) -> Losses:
    """-m: negative mean log-probability of the completion's tokens, then the mean over examples. No
    reference.

    TRL and Hugging Face take the mean over the tokens of the batch instead, which weights long
    completions more.
    """
    return -mean_logp(policy, "completion"), {}
