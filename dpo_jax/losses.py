"""The losses. Each maps log-probabilities of completions to one number an example, and says what it
means by its name.

Dimensions: N examples. `policy` and `reference` map a completion's name to `logps.Logps` (total [N]
in nats, length [N] in tokens). Totals are sums over the completion's tokens, EOS included, prompt
excluded, float32. Every loss returns losses [N] and metrics {name: [N]}; a metric is nan where it
does not apply to an example. The train step takes the mean over the examples of the global batch,
whatever the microbatches; slots without an example have weight 0.

In the formulas w is the chosen completion and l the rejected one, p a total under the policy, n a
length, m = p / n, r a log-ratio of policy to reference, s = score(r) (r itself unless a divergence
is chosen), D = s_w - s_l, b beta, sig the logistic function. Unless a loss says otherwise it sums
over tokens, has no batch statistics, and its gradient goes through the policy alone.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Interval

from dpo_jax import contract
from dpo_jax.logps import Logps, Tokens

Completions = Mapping[str, Logps]
Batch = Mapping[str, jax.Array]
Losses = tuple[jax.Array, dict[str, jax.Array]]
# a log-ratio [N] -> its score [N], 0 at 0
Score = Callable[[jax.Array], jax.Array]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Share = Annotated[float, Interval(gt=0, le=1)]
Smoothing = Annotated[float, Interval(ge=0, lt=0.5)]

# a score's exponent is held at this, beyond which its gradient is 0
LARGEST_EXPONENT = 40.0
# examples of KTO's smallest batch in its paper
FEWEST_OF_KTO = 8


# What losses are made of


def log_ratio(policy: Completions, reference: Completions, name: str) -> jax.Array:
    """log pi(y|x) - log pi_ref(y|x) of the named completion, summed over its tokens: [N] nats."""
    return policy[name].total - reference[name].total


def log_ratios(policy: Completions, reference: Completions) -> tuple[jax.Array, jax.Array]:
    """The log-ratios of a pair, r_w and r_l: [N] nats each."""
    return log_ratio(policy, reference, "chosen"), log_ratio(policy, reference, "rejected")


def length(completions: Completions, name: str) -> jax.Array:
    """Tokens of the named completion, 1 in empty slots: [N]."""
    return jnp.maximum(completions[name].length, 1)


def mean_logp(completions: Completions, name: str) -> jax.Array:
    """Mean log-probability of the named completion's tokens: [N] nats a token."""
    return completions[name].total / length(completions, name)


def logistic(margin: jax.Array, label_smoothing: Any = 0.0) -> jax.Array:
    """-(1-e) log sig(margin) - e log sig(-margin): [N]."""
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def pair_metrics(chosen: jax.Array, rejected: jax.Array) -> dict[str, jax.Array]:
    """The field's metrics of a pair from its two rewards [N]; a tie counts as half right."""
    margins = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": 0.5 * (1.0 + jnp.sign(margins)),
    }


def unpaired_metrics(rewards: jax.Array, desirable: jax.Array) -> dict[str, jax.Array]:
    """The rewards [N] of desirable examples (bool [N]) as chosen ones, of the rest as rejected."""
    return {
        "rewards/chosen": jnp.where(desirable, rewards, jnp.nan),
        "rewards/rejected": jnp.where(desirable, jnp.nan, rewards),
    }


def batch_mean(values: jax.Array, batch: Batch) -> jax.Array:
    """Mean over the examples of the batch [N] -> scalar; empty slots are left out."""
    weight = batch["weight"]
    return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def ranked(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The batch's values [N] in rising order, empty slots last as inf, and each slot's rank."""
    filled = jnp.where(batch["weight"] > 0, values, jnp.inf)
    return jnp.sort(filled), jnp.argsort(jnp.argsort(filled))


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x <= 0, value and gradient finite everywhere (x is at most -1e-6)."""
    x = jnp.minimum(x, -1e-6)
    near = x > -0.6931472
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -0.6931472))),
        jnp.log1p(-jnp.exp(jnp.where(near, -0.6931472, x))),
    )


def scaled_logsumexp(values: jax.Array, scale: Any) -> jax.Array:
    """log sum_k exp(scale * values) of [K, N]: [N]. Scaled after the maximum is taken off, so that
    no product is rounded before it is compared.
    """
    top = jax.lax.stop_gradient(jnp.max(values, axis=0))
    return scale * top + jnp.log(jnp.sum(jnp.exp(scale * (values - top[None])), axis=0))


def combine(*parts: tuple[Any, Losses]) -> Losses:
    """The weighted sum of losses: pairs of a weight and what a loss returned; the first one's
    metrics.
    """
    total = jnp.sum(jnp.stack([weight * losses for weight, (losses, _) in parts]), axis=0)
    return total, parts[0][1][1]


# Scores: the f-divergences of https://arxiv.org/abs/2309.16240, f'(u) at u = exp(r) less f'(1)


def reverse_kl(ratio: jax.Array) -> jax.Array:
    """r."""
    return ratio


def forward_kl(ratio: jax.Array) -> jax.Array:
    """1 - exp(-r)."""
    return alpha_divergence(ratio, alpha=0.0)


def jensen_shannon(ratio: jax.Array) -> jax.Array:
    """log sig(r) + log 2."""
    return jax.nn.log_sigmoid(ratio) + jnp.log(2.0)


def alpha_divergence(ratio: jax.Array, *, alpha: Any) -> jax.Array:
    """(exp((a-1) r) - 1) / (a-1), which is r where a is 1."""
    order = alpha - 1.0
    is_kl = jnp.abs(order) < 1e-6
    divisor = jnp.where(is_kl, 1.0, order)
    return jnp.where(is_kl, ratio, capped_expm1(order * ratio) / divisor)


def capped_expm1(exponent: jax.Array) -> jax.Array:
    """exp(x) - 1, x held at LARGEST_EXPONENT."""
    return jnp.expm1(jnp.minimum(exponent, LARGEST_EXPONENT))


# Losses of pairs with a reference


def dpo(
    policy,
    reference,
    batch,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    score: Score = reverse_kl,
) -> Losses:
    """-(1-e) log sig(b D) - e log sig(-b D). Eq. 7 of https://arxiv.org/abs/2305.18290.

    ln 2 where policy equals reference. e > 0 is conservative DPO (cDPO). Defaults: the paper's.
    Agrees with the original code, HALOs and TRL (sigmoid), which takes no e.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    label_smoothing: e, the share of the labels that is taken to be flipped
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    # beta after the difference: a fused multiply-add would round one of the two products alone
    margin = beta * (score(chosen) - score(rejected))
    return logistic(margin, label_smoothing), pair_metrics(beta * chosen, beta * rejected)


def alpha_dpo(
    policy,
    reference,
    batch,
    *,
    beta: Positive = 0.1,
    alpha: float = 0.5,
    label_smoothing: Smoothing = 0.0,
) -> Losses:
    """`dpo` under the alpha-divergence: D of s = (exp((a-1) r) - 1) / (a-1).
    https://arxiv.org/abs/2309.16240.

    a = 1 is DPO, a = 0 the forward KL: TRL's alpha, which is 1 less the paper's. Exponents are held
    at 40, and beyond it a completion has no gradient. Defaults: TRL's.
    Agrees with TRL (sigmoid, f_divergence_type alpha_divergence), which holds exponents at 80.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    alpha: order of the divergence
    label_smoothing: e, the share of the labels that is taken to be flipped
    """

    def score(ratio: jax.Array) -> jax.Array:
        return alpha_divergence(ratio, alpha=alpha)

    return dpo(policy, reference, batch, beta=beta, label_smoothing=label_smoothing, score=score)


def robust(
    policy,
    reference,
    batch,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.1,
    score: Score = reverse_kl,
) -> Losses:
    """(-(1-e) log sig(b D) + e log sig(-b D)) / (1 - 2e). https://arxiv.org/abs/2403.00409.

    Its mean under labels of which a share e is flipped is DPO's under clean ones; unlike DPO it can
    be negative. Defaults: e as TRL's documentation advises (its own default is 0).
    Agrees with TRL (robust).

    beta: how strongly the policy is tied to the reference, in 1 / nats
    label_smoothing: e, the share of the labels that is taken to be flipped
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    margin = beta * (score(chosen) - score(rejected))
    right, wrong = logistic(margin), logistic(-margin)
    losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return losses, pair_metrics(beta * chosen, beta * rejected)


def ipo(policy, reference, batch, *, beta: Positive = 0.1, score: Score = reverse_kl) -> Losses:
    """(s_w / n_w - s_l / n_l - 1 / (2b))^2. Eq. 17 of https://arxiv.org/abs/2310.12036, b its tau.

    Token MEAN of each completion, as its authors confirmed to TRL; `ipo_sum` is the other reading.
    Rewards are b times the mean log-ratio. Default: TRL's.
    Agrees with TRL (DPOTrainer's ipo) and HALOs.

    beta: the paper's tau; the margin is drawn to 1 / (2 beta) nats a token
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    n_chosen, n_rejected = length(policy, "chosen"), length(policy, "rejected")
    margin = score(chosen) / n_chosen - score(rejected) / n_rejected
    rewards = pair_metrics(beta * chosen / n_chosen, beta * rejected / n_rejected)
    return jnp.square(margin - 1 / (2 * beta)), rewards


def ipo_sum(policy, reference, batch, *, beta: Positive = 0.1, score: Score = reverse_kl) -> Losses:
    """(D - 1 / (2b))^2. Eq. 17 of https://arxiv.org/abs/2310.12036, b its tau.

    Token SUM; `ipo` is the other reading. Default: TRL's.
    Agrees with the original DPO repository, EasyLM, OpenRLHF and TRL's OnlineDPOTrainer.

    beta: the paper's tau; the margin is drawn to 1 / (2 beta) nats
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    margin = score(chosen) - score(rejected)
    return jnp.square(margin - 1 / (2 * beta)), pair_metrics(beta * chosen, beta * rejected)


def hinge(policy, reference, batch, *, beta: Positive = 0.1, score: Score = reverse_kl) -> Losses:
    """max(0, 1 - b D). https://arxiv.org/abs/2309.06657, after SLiC,
    https://arxiv.org/abs/2305.10425.

    Default: TRL's. Agrees with TRL (hinge).

    beta: 1 over the margin that is asked for, in 1 / nats
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    margin = beta * (score(chosen) - score(rejected))
    return jax.nn.relu(1.0 - margin), pair_metrics(beta * chosen, beta * rejected)


def exo_pair(
    policy,
    reference,
    batch,
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, Interval(gt=0, lt=0.5)] = 1e-3,
    score: Score = reverse_kl,
) -> Losses:
    """sig(b D) (log sig(b D) - log(1-e)) + sig(-b D) (log sig(-b D) - log e). Eq. 16 of
    https://arxiv.org/abs/2402.00856.

    The KL from the policy's preference to the smoothed label's. Default e: as TRL advises.
    Agrees with TRL (exo_pair).

    beta: how strongly the policy is tied to the reference, in 1 / nats
    label_smoothing: e, the share of the labels that is taken to be flipped
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    margin = beta * (score(chosen) - score(rejected))
    right = jax.nn.log_sigmoid(margin) - jnp.log1p(-label_smoothing)
    wrong = jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing)
    losses = jax.nn.sigmoid(margin) * right + jax.nn.sigmoid(-margin) * wrong
    return losses, pair_metrics(beta * chosen, beta * rejected)


def nca_pair(
    policy, reference, batch, *, beta: Positive = 0.1, score: Score = reverse_kl
) -> Losses:
    """-log sig(b s_w) - log sig(-b s_w) / 2 - log sig(-b s_l) / 2.
    https://arxiv.org/abs/2402.05369.

    s_w stands alone, so scores are centred: s = 0 where policy equals reference. Default: TRL's.
    Agrees with TRL (nca_pair), which refuses other scores than the reverse KL's.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    s_w, s_l = beta * score(chosen), beta * score(rejected)
    losses = logistic(s_w) + 0.5 * logistic(-s_w) + 0.5 * logistic(-s_l)
    return losses, pair_metrics(beta * chosen, beta * rejected)


def bco_pair(
    policy, reference, batch, *, beta: Positive = 0.1, delta: float = 0.0, score: Score = reverse_kl
) -> Losses:
    """-log sig(b s_w - d) - log sig(-(b s_l - d)). https://arxiv.org/abs/2404.04656.

    d is a constant here; `bco` has the paper's running baseline. Defaults: TRL's.
    Agrees with TRL (bco_pair), which has d = 0.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    delta: d, the reward that divides good from bad
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    losses = logistic(beta * score(chosen) - delta) + logistic(delta - beta * score(rejected))
    return losses, pair_metrics(beta * chosen, beta * rejected)


def sppo_hard(
    policy, reference, batch, *, beta: Positive = 0.1, score: Score = reverse_kl
) -> Losses:
    """(s_w - 1 / (2b))^2 + (s_l + 1 / (2b))^2. https://arxiv.org/abs/2405.00675, with hard labels.

    Default: TRL's. Agrees with TRL (sppo_hard).

    beta: 1 over the paper's eta; each log-ratio is drawn to half of 1 / beta nats
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    target = 1 / (2 * beta)
    losses = jnp.square(score(chosen) - target) + jnp.square(score(rejected) + target)
    return losses, pair_metrics(beta * chosen, beta * rejected)


@contract.declare(batch_statistics=True)
def aot(
    policy, reference, batch, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> Losses:
    """Smoothed logistic of b (sorted p_w - p_l minus sorted reference p_w - p_l).
    https://arxiv.org/abs/2406.05882.

    Sorts the whole batch that it is given: `Experiment.statistics` says whether that is the global
    batch or a microbatch, as in TRL. An example's loss meets its own p_w - p_l with the reference's
    of the same rank. Defaults: TRL's. Agrees with TRL (aot).

    beta: how strongly the policy is tied to the reference, in 1 / nats
    label_smoothing: e, the share of the labels that is taken to be flipped
    """
    chosen, rejected = log_ratios(policy, reference)
    own = policy["chosen"].total - policy["rejected"].total
    _, rank = ranked(own, batch)
    anchors, _ = ranked(reference["chosen"].total - reference["rejected"].total, batch)
    margin = jnp.where(batch["weight"] > 0, beta * (own - anchors[rank]), 0.0)
    return logistic(margin, label_smoothing), pair_metrics(beta * chosen, beta * rejected)


@contract.declare(batch_statistics=True)
def aot_unpaired(
    policy, reference, batch, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> Losses:
    """Smoothed logistic of b (sorted r_w minus sorted r_l). https://arxiv.org/abs/2406.05882.

    Sorts the whole batch that it is given, as `aot` does. An example's loss meets its own r_w with
    the r_l of the same rank. Defaults: TRL's. Agrees with TRL (aot_unpaired).

    beta: how strongly the policy is tied to the reference, in 1 / nats
    label_smoothing: e, the share of the labels that is taken to be flipped
    """
    chosen, rejected = log_ratios(policy, reference)
    _, rank = ranked(chosen, batch)
    others, _ = ranked(rejected, batch)
    margin = jnp.where(batch["weight"] > 0, beta * (chosen - others[rank]), 0.0)
    return logistic(margin, label_smoothing), pair_metrics(beta * chosen, beta * rejected)


def apo_zero(policy, reference, batch, *, beta: Positive = 0.1) -> Losses:
    """1 - sig(b r_w) + sig(b r_l). https://arxiv.org/abs/2408.06266.

    Makes the chosen likelier and the rejected less likely: for chosen completions better than the
    policy's own. Default: TRL's. Agrees with TRL (apo_zero).

    beta: how strongly the policy is tied to the reference, in 1 / nats
    """
    chosen, rejected = log_ratios(policy, reference)
    losses = jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)
    return losses, pair_metrics(beta * chosen, beta * rejected)


def apo_down(policy, reference, batch, *, beta: Positive = 0.1) -> Losses:
    """sig(b r_w) + 1 - sig(b (r_w - r_l)). https://arxiv.org/abs/2408.06266.

    Makes both less likely, the rejected more so: for chosen completions worse than the policy's
    own. Default: TRL's. Agrees with TRL (apo_down).

    beta: how strongly the policy is tied to the reference, in 1 / nats
    """
    chosen, rejected = log_ratios(policy, reference)
    losses = jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))
    return losses, pair_metrics(beta * chosen, beta * rejected)


def discopop(policy, reference, batch, *, beta: Positive = 0.1, tau: Share = 0.05) -> Losses:
    """(1-k) (-log sig(z)) + k exp(-z), z = b D, k = sig(z / tau). https://arxiv.org/abs/2406.08414.

    The log-ratio modulated loss. k exp(-z) is taken as one exponential, finite at any z. Defaults:
    tau the paper's, beta TRL's. Agrees with TRL (discopop) where that is finite, z > -88.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    tau: temperature of the switch k
    """
    chosen, rejected = log_ratios(policy, reference)
    z = beta * (chosen - rejected)
    exponential = jnp.exp(jax.nn.log_sigmoid(z / tau) - z)
    losses = jax.nn.sigmoid(-z / tau) * logistic(z) + exponential
    return losses, pair_metrics(beta * chosen, beta * rejected)


def dpo_norm(
    policy, reference, batch, *, beta: Positive = 5.0, score: Score = reverse_kl
) -> Losses:
    """-log sig(b (s_w / n_w - s_l / n_l)). Tulu 3, https://arxiv.org/abs/2411.15124.

    DPO on the token MEAN; rewards are b times the mean log-ratio. Default: Tulu 3's (TRL's is 0.1).
    Agrees with TRL (sigmoid_norm).

    beta: how strongly the policy is tied to the reference, in tokens / nat
    score: the f-divergence, as a function of the log-ratio
    """
    chosen, rejected = log_ratios(policy, reference)
    n_chosen, n_rejected = length(policy, "chosen"), length(policy, "rejected")
    margin = beta * (score(chosen) / n_chosen - score(rejected) / n_rejected)
    return logistic(margin), pair_metrics(beta * chosen / n_chosen, beta * rejected / n_rejected)


def dpop(policy, reference, batch, *, beta: Positive = 0.1, lam: NonNegative = 50.0) -> Losses:
    """-log sig(b (r_w - r_l - lambda max(0, -r_w))). DPO-Positive,
    https://arxiv.org/abs/2402.13228.

    The last term keeps the chosen from getting less likely than under the reference. Default
    lambda: the paper's. TRL has none.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    lam: weight of a fall of the chosen completion's log-probability
    """
    chosen, rejected = log_ratios(policy, reference)
    margin = beta * (chosen - rejected - lam * jax.nn.relu(-chosen))
    return logistic(margin), pair_metrics(beta * chosen, beta * rejected)


def r_dpo(policy, reference, batch, *, beta: Positive = 0.1, alpha: NonNegative) -> Losses:
    """-log sig(b (r_w - r_l) + a (n_w - n_l)). https://arxiv.org/abs/2403.19159.

    The optimum of a reward less a times the length: where the chosen is the longer one, less of a
    margin is asked for. TRL has none.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    alpha: a, the reward that a token costs
    """
    chosen, rejected = log_ratios(policy, reference)
    longer = policy["chosen"].length - policy["rejected"].length
    losses = logistic(beta * (chosen - rejected) + alpha * longer)
    return losses, pair_metrics(beta * chosen, beta * rejected)


def head(tokens: Tokens) -> jax.Array:
    """Statistic: log p of tokens up to the length of the example's shortest completion."""
    return jnp.where(tokens.index < tokens.shortest, tokens.logp, 0.0)


def desensitised(completions: Completions, name: str, alpha: Any) -> jax.Array:
    """Summed log-probability [N] in which the tokens beyond the shorter completion count alpha."""
    scored = completions[name]
    return alpha * scored.total + (1 - alpha) * scored.statistics["head"]


@contract.declare(policy={"head": head}, reference={"head": head})
def ld_dpo(policy, reference, batch, *, beta: Positive = 0.1, alpha: Fraction = 0.5) -> Losses:
    """`dpo` on sums in which tokens beyond the shorter completion's length have weight a.
    https://arxiv.org/abs/2409.06411.

    In policy AND reference, as in TRL; `ld_dpo_policy` is the other reading. Rewards are of those
    sums. Default a: LLaMA-Factory's and TRL's examples'. Agrees with TRL (ld_alpha).

    beta: how strongly the policy is tied to the reference, in 1 / nats
    alpha: a, weight of the tokens beyond the shorter completion's length; 1 is DPO
    """
    chosen, rejected = (
        desensitised(policy, name, alpha) - desensitised(reference, name, alpha)
        for name in ("chosen", "rejected")
    )
    return logistic(beta * (chosen - rejected)), pair_metrics(beta * chosen, beta * rejected)


@contract.declare(policy={"head": head})
def ld_dpo_policy(
    policy, reference, batch, *, beta: Positive = 0.1, alpha: Fraction = 0.5
) -> Losses:
    """`ld_dpo` with the reference's sums as they are. https://arxiv.org/abs/2409.06411.

    Not ln 2 where policy equals reference. Agrees with LLaMA-Factory.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    alpha: a, weight of the policy's tokens beyond the shorter completion's length
    """
    chosen, rejected = (
        desensitised(policy, name, alpha) - reference[name].total for name in ("chosen", "rejected")
    )
    return logistic(beta * (chosen - rejected)), pair_metrics(beta * chosen, beta * rejected)


def excess(tokens: Tokens) -> jax.Array:
    """Statistic: log p of the token less log sum_v p(v)^2, what a sampled one has on average."""
    log_squares = jax.nn.logsumexp(2 * tokens.logits, axis=-1)
    return tokens.logp - (log_squares - 2 * jax.nn.logsumexp(tokens.logits, axis=-1))


def on_policy_weight(policy: Completions) -> jax.Array:
    """WPO's weight of a pair: min(w_w w_l, 1), w = exp(mean of `excess`), without gradient: [N]."""
    log_weight = sum(
        policy[name].statistics["excess"] / length(policy, name) for name in ("chosen", "rejected")
    )
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_weight, 0.0)))


@contract.declare(policy={"excess": excess})
def wpo(
    policy, reference, batch, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> Losses:
    """min(w_w w_l, 1) times `dpo`, w = exp(mean over tokens of log p(y_t) - log sum_v p(v)^2).
    https://arxiv.org/abs/2406.11827.

    Pairs that the policy would hardly write count less. No gradient through the weight; other
    losses are weighted likewise with `on_policy_weight`. Defaults: TRL's.
    Agrees with the authors' code; TRL 1.16 (use_weighting) does not hold the weight at 1.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    label_smoothing: e, the share of the labels that is taken to be flipped
    """
    weight = on_policy_weight(policy)
    losses, metrics = dpo(policy, reference, batch, beta=beta, label_smoothing=label_smoothing)
    return weight * losses, metrics | {"weight": weight}


# Losses of single, labelled completions with a reference


def advise_kto(facts: contract.Facts) -> list[str]:
    """Warns of weights that do not suit the data, section 4 of https://arxiv.org/abs/2402.01306,
    and of a KL that is the mean of too few examples.
    """
    good = facts.hyperparameters["lambda_desirable"] * facts.columns["desirable"].sum()
    bad = facts.hyperparameters["lambda_undesirable"] * (1 - facts.columns["desirable"]).sum()
    lines = []
    # the later version's bound; 5 %: noise and dropped rows make pairs' halves a little unequal
    if not 0.95 * bad <= good <= 1.05 * 3 / 2 * bad:
        lines.append(
            "lambda_desirable times the desirable examples over lambda_undesirable times the "
            f"undesirable ones is {good:g} / {bad:g}; it should be 1 to 4/3 (in the paper's later "
            "version 3/2)"
        )
    if facts.examples < FEWEST_OF_KTO:
        lines.append(
            f"its KL is the mean over {facts.examples} examples, and the paper's smallest batch is "
            f"{FEWEST_OF_KTO}: raise --batch-size (or lower --microbatches, or set --statistics "
            "global)"
        )
    return lines


@contract.declare(batch_statistics=True, advice=advise_kto)
def kto(
    policy,
    reference,
    batch,
    *,
    beta: Positive = 0.1,
    lambda_desirable: Positive = 1.0,
    lambda_undesirable: Positive = 1.0,
) -> Losses:
    """w_D (1 - sig(b (r - z))) where desirable, w_U (1 - sig(b (z - r))) where not.
    https://arxiv.org/abs/2402.01306.

    z = max(0, mean of the mismatched completions' log-ratios) estimates KL(policy, reference); it
    has no gradient. Its mean is over what `Experiment.statistics` says: the global batch (the
    default) or each microbatch, as in TRL. Held out, it is over each batch of the evaluation.
    w_D n_D / (w_U n_U) should lie in [1, 4/3], in the paper's later version [1, 3/2]. Defaults: the
    paper's. Agrees with TRL and HALOs.

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
    metrics = unpaired_metrics(beta * ratio, desirable)
    return losses, metrics | {"kl": jnp.full_like(ratio, z)}


def apo_zero_unpaired(
    policy,
    reference,
    batch,
    *,
    beta: Positive = 0.1,
    lambda_desirable: Positive = 1.0,
    lambda_undesirable: Positive = 1.0,
) -> Losses:
    """w_D (1 - sig(b r)) where desirable, w_U sig(b r) where not. https://arxiv.org/abs/2408.06266.

    `kto` without its z. Defaults: TRL's. Agrees with TRL (KTOTrainer's apo_zero_unpaired).

    beta: how strongly the policy is tied to the reference, in 1 / nats
    lambda_desirable: w_D, weight of the desirable examples
    lambda_undesirable: w_U, weight of the undesirable examples
    """
    rewards = beta * log_ratio(policy, reference, "completion")
    desirable = batch["desirable"] > 0
    losses = jnp.where(
        desirable,
        lambda_desirable * jax.nn.sigmoid(-rewards),
        lambda_undesirable * jax.nn.sigmoid(rewards),
    )
    return losses, unpaired_metrics(rewards, desirable)


class RunningMean(NamedTuple):
    """The mean of all values so far and their number, float32 scalars."""

    mean: jax.Array
    count: jax.Array


def no_values() -> RunningMean:
    """A running mean before its first value: 0."""
    return RunningMean(jnp.zeros(()), jnp.zeros(()))


def no_values_of_either() -> tuple[RunningMean, RunningMean]:
    """Two running means before their first values."""
    return no_values(), no_values()


def update(running: RunningMean, values: jax.Array, weight: jax.Array) -> RunningMean:
    """The running mean with the values [N] of positive weight [N]; no gradient passes."""
    count = running.count + jnp.sum(weight)
    away = jnp.where(weight > 0, jax.lax.stop_gradient(values) - running.mean, 0.0)
    return RunningMean(running.mean + jnp.sum(away * weight) / jnp.maximum(count, 1.0), count)


def classified(rewards: jax.Array, delta: jax.Array, desirable: jax.Array) -> jax.Array:
    """-log sig(reward - d) where desirable, -log sig(-(reward - d)) where not: [N]."""
    return logistic(jnp.where(desirable, rewards - delta, delta - rewards))


@contract.declare(batch_statistics=True, state=no_values_of_either)
def bco(
    policy, reference, batch, state: tuple[RunningMean, RunningMean], *, beta: Positive = 0.1
) -> tuple[jax.Array, dict[str, jax.Array], tuple[RunningMean, RunningMean]]:
    """-log sig(b r - d) where desirable, -log sig(-(b r - d)) where not.
    https://arxiv.org/abs/2404.04656.

    d is half the sum of the running means of b r over the desirable and over the undesirable
    examples so far, this batch included, as in the paper; it has no gradient. It is kept in the
    train state and the checkpoint; an evaluation adds its batch and forgets it. Default: TRL's.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    """
    rewards = beta * log_ratio(policy, reference, "completion")
    desirable, weight = batch["desirable"] > 0, batch["weight"]
    good = update(state[0], rewards, jnp.where(desirable, weight, 0.0))
    bad = update(state[1], rewards, jnp.where(desirable, 0.0, weight))
    delta = 0.5 * (good.mean + bad.mean)
    metrics = unpaired_metrics(rewards, desirable) | {"delta": jnp.full_like(rewards, delta)}
    return classified(rewards, delta, desirable), metrics, (good, bad)


@contract.declare(batch_statistics=True, state=no_values)
def bco_joint(
    policy, reference, batch, state: RunningMean, *, beta: Positive = 0.1
) -> tuple[jax.Array, dict[str, jax.Array], RunningMean]:
    """`bco` with d the one running mean over all examples. https://arxiv.org/abs/2404.04656.

    With as many desirable examples as undesirable ones d is that of `bco`. Default: TRL's.
    Agrees with TRL's former BCOTrainer (before 1.16), which held out leaves d as it is.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    """
    rewards = beta * log_ratio(policy, reference, "completion")
    desirable = batch["desirable"] > 0
    running = update(state, rewards, batch["weight"])
    metrics = unpaired_metrics(rewards, desirable) | {"delta": jnp.full_like(rewards, running.mean)}
    return classified(rewards, running.mean, desirable), metrics, running


@contract.declare(batch_statistics=True, state=no_values)
def bco_weighted(
    policy,
    reference,
    batch,
    state: RunningMean,
    *,
    beta: Positive = 0.1,
    smallest: Positive = 0.5,
    largest: Positive = 10.0,
) -> tuple[jax.Array, dict[str, jax.Array], RunningMean]:
    """`bco_joint` with undesirable examples weighted by the density ratio of their prompts.
    https://arxiv.org/abs/2404.04656.

    The ratio p(desirable | x) / p(undesirable | x) comes with the data, as the field density_ratio.
    Defaults: TRL's. Agrees with TRL's former BCOTrainer (before 1.16) with prompt embeddings.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    smallest: the ratio is held at or above this
    largest: the ratio is held at or below this
    """
    losses, metrics, running = bco_joint(policy, reference, batch, state, beta=beta)
    weight = jnp.clip(batch["density_ratio"], smallest, largest)
    return jnp.where(batch["desirable"] > 0, losses, weight * losses), metrics, running


# Losses of pairs without a reference


def odds_ratio(policy: Completions, lam: Any) -> Losses:
    """ORPO's -lambda log sig(log odds(m_w) - log odds(m_l)), odds(m) = p / (1 - p) with p = exp(m),
    and its metrics.
    """
    chosen, rejected = mean_logp(policy, "chosen"), mean_logp(policy, "rejected")
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    metrics = pair_metrics(lam * chosen, lam * rejected)
    return lam * logistic(log_odds_ratio), metrics | {"log_odds_ratio": log_odds_ratio}


def orpo(policy, reference, batch, *, lam: NonNegative = 0.1) -> Losses:
    """-m_w - lambda log sig(log odds(m_w) - log odds(m_l)), odds(m) = exp(m) / (1 - exp(m)).
    https://arxiv.org/abs/2403.07691.

    Token MEAN. The NLL is over the chosen completion's tokens alone, the example's own mean, then
    the mean over examples; `orpo_prompt` takes the prompt in. Rewards are lambda m. Default: the
    paper's. Agrees with LLaMA-Factory.

    lam: weight of the odds ratio beside the NLL
    """
    losses, metrics = odds_ratio(policy, lam)
    nll = -mean_logp(policy, "chosen")
    return nll + losses, metrics | {"nll": nll}


@contract.declare(prompt=True)
def orpo_prompt(policy, reference, batch, *, lam: NonNegative = 0.1) -> Losses:
    """`orpo` with the NLL over prompt and chosen completion. https://arxiv.org/abs/2403.07691.

    The prompt's first token, which nothing predicts, is left out. Token MEAN of each example, then
    the mean over examples. Default: the paper's.
    Agrees with the authors, TRL and tunix but for the NLL's normaliser (token mean over the batch).

    lam: weight of the odds ratio beside the NLL
    """
    losses, metrics = odds_ratio(policy, lam)
    total = policy["prompt"].total + policy["chosen"].total
    nll = -total / jnp.maximum(policy["prompt"].length + policy["chosen"].length, 1)
    return nll + losses, metrics | {"nll": nll}


def simpo(policy, reference, batch, *, beta: Positive = 2.0, gamma: NonNegative = 1.6) -> Losses:
    """-log sig(b (m_w - m_l) - gamma). Eq. 6 of https://arxiv.org/abs/2405.14734.

    Token MEAN; rewards are b m. Defaults: the paper's for Mistral-7B-Base (gamma / b = 0.8).
    Agrees with the authors and TRL (CPOTrainer's simpo with cpo_alpha 0, else an NLL is added).

    beta: scale of the reward, in tokens / nat
    gamma: the margin that is asked for, in units of the reward
    """
    chosen, rejected = mean_logp(policy, "chosen"), mean_logp(policy, "rejected")
    losses = logistic(beta * (chosen - rejected) - gamma)
    return losses, pair_metrics(beta * chosen, beta * rejected)


def alphapo(
    policy,
    reference,
    batch,
    *,
    beta: Positive = 2.5,
    gamma: NonNegative = 0.25,
    alpha: float = 0.25,
) -> Losses:
    """-log sig(b (R(m_w) - R(m_l)) - gamma), R(m) = (1 - exp(-a m)) / a.
    https://arxiv.org/abs/2501.03884.

    `simpo` at a = 0, where R(m) is m. Token MEAN; exponents are held at 40; rewards are b R.
    Defaults: a the paper's, b and gamma those of SimPO for Mistral-7B-Instruct.
    Agrees with TRL (CPOTrainer's alphapo), whose a is 0 unless given.

    beta: scale of the reward, in tokens / nat
    gamma: the margin that is asked for, in units of the reward
    alpha: a, the reward's curvature
    """
    chosen, rejected = (
        alpha_divergence(mean_logp(policy, name), alpha=1.0 - alpha)
        for name in ("chosen", "rejected")
    )
    losses = logistic(beta * (chosen - rejected) - gamma)
    return losses, pair_metrics(beta * chosen, beta * rejected)


def cpo(
    policy,
    reference,
    batch,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    alpha: NonNegative = 1.0,
) -> Losses:
    """-(1-e) log sig(b (p_w - p_l)) - e log sig(-b (p_w - p_l)) - a m_w.
    https://arxiv.org/abs/2401.08417.

    Token sum in the first part, the chosen's own token mean in the NLL. Defaults: the paper's.
    Agrees with TRL (CPOTrainer's sigmoid) but for the NLL's normaliser (token mean over the batch).

    beta: scale of the difference, in 1 / nats
    label_smoothing: e, the share of the labels that is taken to be flipped
    alpha: a, weight of the NLL
    """
    chosen, rejected = policy["chosen"].total, policy["rejected"].total
    nll = -mean_logp(policy, "chosen")
    losses = logistic(beta * (chosen - rejected), label_smoothing) + alpha * nll
    return losses, pair_metrics(beta * chosen, beta * rejected) | {"nll": nll}


def tpo(policy, reference, batch, *, beta: Positive = 0.01, alpha: NonNegative = 1.0) -> Losses:
    """-log sig(b (p_w - p_l)) - a m_g, g a gold completion. https://arxiv.org/abs/2405.16681.

    Needs examples of kind triples. Token sum in the first part, the gold completion's own token
    mean in the NLL. Defaults: TRL's.
    Agrees with TRL (TPOTrainer's sigmoid) but for the NLL's normaliser (token mean over the batch).

    beta: scale of the difference, in 1 / nats
    alpha: a, weight of the NLL
    """
    chosen, rejected = policy["chosen"].total, policy["rejected"].total
    nll = -mean_logp(policy, "gold")
    losses = logistic(beta * (chosen - rejected)) + alpha * nll
    return losses, pair_metrics(beta * chosen, beta * rejected) | {"nll": nll}


def unlikelihood(policy, reference, batch, *, alpha: Fraction) -> Losses:
    """-p_w + a p_l. The unlikelihood baseline of https://arxiv.org/abs/2305.18290, section 6.

    Unbounded below, as the paper says. Rewards are totals.

    alpha: a, weight of the rejected completion
    """
    chosen, rejected = policy["chosen"].total, policy["rejected"].total
    return alpha * rejected - chosen, pair_metrics(chosen, rejected)


def preferred_ft(policy, reference, batch) -> Losses:
    """-m_w. The Preferred-FT baseline of https://arxiv.org/abs/2305.18290, section 6.

    Token MEAN of each example, then the mean over examples; rewards are totals.
    Agrees with TRL (DPOTrainer's sft) but for the normaliser (token mean over the batch).
    """
    metrics = pair_metrics(policy["chosen"].total, policy["rejected"].total)
    return -mean_logp(policy, "chosen"), metrics


# Losses of other data


def sft(policy, reference, batch) -> Losses:
    """-m. Supervised fine-tuning, section 3 of https://arxiv.org/abs/2305.18290.

    Token MEAN of each example, then the mean over examples. TRL and Hugging Face take the mean over
    the tokens of the batch instead, which weights long completions more.
    """
    return -mean_logp(policy, "completion"), {}


def plackett_luce(policy, reference, batch, *, beta: Positive = 0.1) -> Losses:
    """-sum_i log(exp(b r_i) / sum_{j >= i} exp(b r_j)) over completions ranked best first. Eq. 20
    of https://arxiv.org/abs/2305.18290.

    Needs examples of kind ranked: completion_0 (best), completion_1, ... With two it is DPO. Its
    pair metrics are of the best and the worst. Default: the paper's. No trainer known has it.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    """
    count = max(sum(name.startswith("completion_") for name in policy), 2)
    ratios = [log_ratio(policy, reference, f"completion_{place}") for place in range(count)]
    losses = jnp.zeros_like(ratios[0])
    for place, own in enumerate(ratios[:-1]):
        behind = jnp.stack([other - own for other in ratios[place + 1 :]])
        losses += jax.nn.softplus(scaled_logsumexp(behind, beta))
    return losses, pair_metrics(beta * ratios[0], beta * ratios[-1])


# Sums of losses


def mpo(
    policy,
    reference,
    batch,
    *,
    beta: Positive = 0.1,
    preference: NonNegative = 0.8,
    quality: NonNegative = 0.2,
    generation: NonNegative = 1.0,
) -> Losses:
    """The sum of `dpo`, `bco_pair` and `preferred_ft`, weighted. https://arxiv.org/abs/2411.10442.

    Token sum in the first two, the chosen's own token mean in the last. Defaults: the paper's.
    Agrees with TRL (loss_type sigmoid, bco_pair, sft with these weights) but for the NLL's
    normaliser (token mean over the batch).

    beta: how strongly the policy is tied to the reference, in 1 / nats
    preference: weight of `dpo`
    quality: weight of `bco_pair`
    generation: weight of `preferred_ft`
    """
    return combine(
        (preference, dpo(policy, reference, batch, beta=beta)),
        (quality, bco_pair(policy, reference, batch, beta=beta)),
        (generation, preferred_ft(policy, None, batch)),
    )


def rpo(policy, reference, batch, *, beta: Positive = 0.1, alpha: NonNegative = 0.005) -> Losses:
    """`dpo` + a times `preferred_ft`. https://arxiv.org/abs/2405.16436.

    The NLL is the example's own token mean, as in one of the authors' two codes; in the other it is
    the sum. Default a: the paper's, which is for the sum.
    Agrees with TRL (loss_type sigmoid, sft) but for the NLL's normaliser.

    beta: how strongly the policy is tied to the reference, in 1 / nats
    alpha: a, weight of the NLL
    """
    return combine(
        (1.0, dpo(policy, reference, batch, beta=beta)),
        (alpha, preferred_ft(policy, None, batch)),
    )
