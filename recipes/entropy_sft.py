"""Supervised fine-tuning that spares the entropy: it learns where the model is sure of something else."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from litropy.losses import HeadStats
from litropy.recipes.language_model import LanguageModel
from litropy.recipes.rlvr_ranks import gather, rank_and_ranks
from litropy.recipes.steering.selection import largest_share
from litropy.recipes.token_normalisation import sum_over_ranks

__all__ = ["EntropySFT", "surprising_tokens"]


def surprising_tokens(logprob: Tensor, entropy: Tensor, mask: Tensor, share: float, alpha: float) -> Tensor:
    r"""The share of the tokens in ``mask`` with the largest :math:`-\ln p_t - \alpha H_t`, of all ranks together.

    Args:
        logprob: of each target [B, T, nats].
        entropy: of the model at each position [B, T, nats].
        mask: where there are targets, bool [B, T].
        share: of the tokens to take, in (0, 1]; rounded up, with all that equal the last of them.
        alpha: how much uncertainty excuses surprise.

    Example::

        >>> logprob, entropy = torch.tensor([-0.1, -3.0, -3.0, -1.0]), torch.tensor([0.2, 0.1, 3.0, 0.1])
        >>> surprising_tokens(logprob, entropy, torch.ones(4, dtype=torch.bool), 0.5, 1.0)
        tensor([False,  True, False,  True])
    """
    # flat, because a rank's batch may come as rows of targets and another's whole
    everyone = gather(torch.where(mask, -logprob - alpha * entropy, -torch.inf).flatten())
    whole = torch.cat(everyone)
    chosen = largest_share(whole, whole > -torch.inf, share)
    return chosen.split([len(found) for found in everyone])[rank_and_ranks()[0]].view_as(mask)


class EntropySFT(LanguageModel):
    r"""Fine-tune on the tokens that surprise the model where it is sure, so that its entropy stays for RL to use.

    A cross-entropy lowers the entropy at every token, also where several continuations are right. This takes the mean
    over the ``share`` of a step's targets with the largest :math:`-\ln p_t - \alpha H_t` only: confident mistakes
    first, and none at which the model is as uncertain as it should be. The tokens are chosen among all of an optimiser
    step, whatever the number of ranks.

    Logs what ``LanguageModel`` does, with ``train/loss`` over the chosen tokens, ``train/loss_all_tokens``, and entropy
    and accuracy over all; validation is over all.

    Args:
        share: of a step's targets to learn from, in (0, 1]; 1 takes all.
        alpha: how much uncertainty excuses surprise; 0 goes by the loss alone.
        **options: of ``LanguageModel``.

    Raises:
        ValueError: if an option is out of its range; when training starts, if gradients are accumulated over batches,
            as tokens cannot be chosen among batches that are not there yet.

    Reference: Light-IF (arXiv 2508.03178), Entropy-SFT, with the numbers of its published run; the release chooses in
    each micro-batch.
    """

    def __init__(self, share: float = 0.8, alpha: float = 0.8, **options: Any) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}; it must be in (0, 1].")
        if alpha < 0:
            raise ValueError(f"`alpha` is {alpha}; it must be at least 0.")
        super().__init__(**options)
        self.share, self.alpha = share, alpha
        self._of_all: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Refuse what the base class refuses, and accumulation."""
        super().setup(stage)
        batches = self.trainer.accumulate_grad_batches
        if stage == "fit" and batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {batches}; EntropySFT chooses tokens among all of a step, so it"
                " must be 1. Take a larger data.batch_size with gradient_checkpointing, or more devices."
            )

    def _choose(self, stats: HeadStats, targets: Tensor) -> Tensor:
        assert stats.logprob is not None
        assert stats.entropy is not None
        assert stats.argmax is not None
        mask = targets != -100
        sums = (-stats.logprob.sum(), stats.entropy.sum(), ((stats.argmax == targets) & mask).sum(), mask.sum())
        self._of_all = torch.stack([each.float() for each in sums])
        return surprising_tokens(stats.logprob, stats.entropy, mask, self.share, self.alpha)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the chosen tokens of all ranks."""
        output = self._built(batch, num_items=1, choose=self._choose, **self.loss_options)
        loss = output.loss / self._normaliser.divisor(output.num_targets, first=True)
        self._sum_names, self._sums = [], torch.stack([output.loss.detach(), output.num_targets])
        assert self._of_all is not None
        total, entropy, right, count = sum_over_ranks(self._of_all).unbind()
        count = count.clamp(min=1)
        self.log("train/loss_all_tokens", total / count)
        if self.stats:
            self.log("entropy/output", entropy / count)
            self.log("train/token_accuracy", right / count)
        return loss
