"""Every method once, in the slots that its paper uses: what the contract tests run over. A new method is a new line."""

from dataclasses import replace

import torch

from litropy.losses import HeadStats
from litropy.recipes import steering as s
from litropy.recipes.rlvr_policy import wanted_by
from litropy.recipes.rlvr_update import accumulate_gradients
from litropy.recipes.steering.objective import Methods

CASES = {
    "grpo": lambda: {},
    "dr_grpo": lambda: {"advantage": s.DrGRPO(), "aggregation": s.ConstantLength(7)},
    "rloo": lambda: {"advantage": s.RLOO(), "aggregation": s.SequenceSum()},
    "clip_higher": lambda: {"clip": s.PPOClip(0.2, 0.28), "aggregation": s.TokenMean()},
    "dual_clip": lambda: {"clip": s.PPOClip(0.2, 0.2, dual=1.5)},
    "unclipped": lambda: {"clip": s.Unclipped()},
    "gspo": lambda: {"clip": s.GSPO(0.05, 0.05)},
    "cispo": lambda: {"clip": s.CISPO(), "aggregation": s.TokenMean()},
    "k1": lambda: {"penalties": [s.ReferenceKL(0.1, "k1")]},
    "k2": lambda: {"penalties": [s.ReferenceKL(0.1, "k2")]},
    "k3": lambda: {"penalties": [s.ReferenceKL(0.1, "k3")]},
    "kl_cov": lambda: {"penalties": [s.KLCov(0.2)], "clip": s.Unclipped(), "aggregation": s.TokenMean()},
    "bonus": lambda: {"regularisers": [s.EntropyBonus(0.01)]},
    "skywork": lambda: {"regularisers": [s.EntropyBonus(controller=s.SkyworkController(3.0, step=1e-3))]},
    "pi_target": lambda: {"regularisers": [s.EntropyBonus(controller=s.PIController(1.0))]},
    "anchor": lambda: {"regularisers": [s.EntropyBonus(controller=s.PIController(None, 0.1, 0.0))]},
    "tis": lambda: {"mismatch": s.TruncatedImportance(1.1)},
    "tis_sequence": lambda: {"mismatch": s.TruncatedImportance(1.5, "sequence")},
    "mis": lambda: {"mismatch": s.MaskedImportance(0.8, 1.3)},
    "forking_tokens": lambda: {"masks": [s.ForkingTokens(0.2)], "aggregation": s.TokenMean()},
    "clip_cov": lambda: {"masks": [s.ClipCov(0.1, 0.05, 5.0)], "aggregation": s.TokenMean()},
    "pear": lambda: {"shaping": [s.PEAR([5])]},
    "ares_reward": lambda: {"shaping": [s.ARESReward(2, 0.5, 0.5)]},
    "ares_reward_released": lambda: {"shaping": [s.ARESReward(2, 0.5, released=True, triggers=[3, 5, 8, 9])]},
    "bucket_kl": lambda: {"penalties": [s.BucketKL(0.2, 0.1, 0.05, rate=5.0, width=2, quantile=0.5)]},
    "bucket_kl_released": lambda: {"penalties": [s.BucketKL(0.2, 0.1, 0.05, rate=5.0, released=True)]},
    "siren": lambda: {"regularisers": [s.SIREN(0.1, 0.6, 0.5)]},
    "siren_released": lambda: {"regularisers": [s.SIREN(0.1, 0.8, 0.5, released=True)]},
    "ter": lambda: {"regularisers": [s.TER()]},
    "tea": lambda: {"regularisers": [s.TEA(1.0, 0.5)], "aggregation": s.TokenMean()},
    "steer": lambda: {"weights": [s.STEER()], "aggregation": s.TokenMean()},
    "steer_exact": lambda: {"weights": [s.STEER(exact=True)], "aggregation": s.TokenMean()},
    "steer_released": lambda: {"weights": [s.STEER(0.8, released=True)], "aggregation": s.TokenMean()},
    "advantage_redistribution": lambda: {"weights": [s.AdvantageRedistribution()], "aggregation": s.TokenMean()},
    "mastered_tokens": lambda: {"masks": [s.MasteredTokens(0.1, 2.3)], "aggregation": s.TokenMean()},
    "ce_gppo": lambda: {"clip": s.CEGPPO(dual=1.6), "aggregation": s.TokenMean()},
    "adaptive_clip": lambda: {"clip": s.AdaptiveClip(), "aggregation": s.TokenMean()},
    "token_group_average": lambda: {"advantage": s.TokenGroupAverage(), "aggregation": s.TokenMean()},
    "pshw": lambda: {"advantage": s.PSHW(), "aggregation": s.SequenceSum()},
    "entropy_advantage": lambda: {"advantage_shaping": [s.EntropyAdvantage()]},
}

# those whose loss has no part that is held constant on purpose, so that its slope is its gradient
SMOOTH = [
    *("grpo", "dr_grpo", "rloo", "clip_higher", "dual_clip", "unclipped", "k1", "k2", "k3", "bonus", "tis", "mis"),
    *("ter", "pshw", "token_group_average"),
]


def methods(name):
    return Methods.of(**CASES[name]())


def wanted(made):
    return wanted_by(component for _, component in made.named())


def gradients(policy, made, rollouts, micro_batch_size, unchanged=False):
    """This rank's gradient of one update as a vector, the objective, and the mini-batch that the methods saw."""
    policy.zero_grad()
    rollouts = made.shaped(rollouts)
    found, seen = accumulate_gradients(
        policy, made, rollouts, made.advantages(rollouts),
        wanted=wanted(made), micro_batch_size=micro_batch_size, unchanged=unchanged,
    )  # fmt: skip
    empty = [p.grad if p.grad is not None else torch.zeros_like(p) for p in policy.parameters()]
    return torch.cat([gradient.flatten() for gradient in empty]), found, seen


def near_policy(policy, rollouts, made):
    """Give responses old log-probabilities near the policy's, so that some ratios are clipped and others are not."""
    from litropy.recipes.rlvr_update import batch_stats

    stats = batch_stats(policy, rollouts, wanted(made), 64)
    noise = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(3)) * rollouts.mask
    known = {name: value for name, value in vars(stats).items() if value is not None}
    shifted = HeadStats(**known | {"logprob": known["logprob"] - 0.2 * noise})
    behaviour = known["logprob"] + 0.2 * noise.roll(1, 0) * rollouts.mask
    return replace(rollouts, stats=shifted, behaviour=behaviour, reference=known["logprob"] + 0.3 * noise)
