"""The reference model of a policy: none, a frozen copy, or the policy without its adapters."""

import copy
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.rlvr_policy import Wanted
from litropy.recipes.rlvr_update import batch_stats
from litropy.recipes.steering.batch import RolloutBatch, stat

__all__ = ["Reference", "ReferenceKind", "add_lora"]

ReferenceKind = Literal["none", "frozen", "adapter_off"]


def add_lora(causal_lm: nn.Module, keys: dict[str, Any]) -> nn.Module:
    """Put LoRA adapters around a model.

    Args:
        causal_lm: of transformers.
        keys: of PEFT's ``LoraConfig``, such as ``{"r": 16, "target_modules": "all-linear"}``.

    Raises:
        ValueError: if PEFT is not installed, or does not take the keys.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("`lora` needs PEFT: pip install peft.") from error
    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", **keys})
        return get_peft_model(causal_lm, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`lora` is {keys}, which PEFT does not take: {error}") from error


class Reference(nn.Module):
    """Gives the log-probabilities that KL penalties are taken against.

    Args:
        kind: none, a frozen copy of the policy, or the policy with its adapters switched off.
        policy: the policy as it is now.

    Raises:
        ValueError: if the policy has no adapters that could be switched off.
    """

    def __init__(self, kind: ReferenceKind, policy: CausalLM) -> None:
        super().__init__()
        self.kind = kind
        self.copy: CausalLM | None = None
        if kind == "frozen":
            self.copy = copy.deepcopy(policy).requires_grad_(False).eval()
        elif kind == "adapter_off" and not hasattr(policy.causal_lm, "disable_adapter"):
            raise ValueError("`reference: adapter_off` needs adapters; give `lora`, or choose `frozen`.")

    def renew(self, policy: CausalLM) -> None:
        """Let a frozen copy become what the policy is now."""
        if self.copy is not None:
            self.copy.load_state_dict(policy.state_dict())

    def logprobs(self, policy: CausalLM, batch: RolloutBatch, micro_batch_size: int) -> Tensor | None:
        """Log-probabilities of the responses' tokens [R, T, nats]; None without a reference."""
        if self.kind == "none":
            return None
        model, context = (self.copy, nullcontext()) if self.copy is not None else (policy, self._without(policy))
        assert model is not None
        with torch.no_grad(), context:
            return stat(batch_stats(model, batch, Wanted(("logprob",)), micro_batch_size), "logprob")

    @staticmethod
    def _without(policy: CausalLM) -> Any:
        peft: Any = policy.causal_lm
        return peft.disable_adapter()
