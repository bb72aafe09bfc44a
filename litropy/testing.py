"""Public test helpers: the error budget that every kernel is held to, and tiny models made from a config."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["TINY_CAUSAL_LMS", "assert_within_budget", "tiny_causal_lm", "tiny_config"]

_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 101}
_HEADS = _WIDTH | {"num_attention_heads": 4}
_GROUPED = _HEADS | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}

# every architecture whose loss and gradients a test compares with the model's own
TINY_CAUSAL_LMS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": _GROUPED | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "olmo2": _GROUPED,
    "olmo3": _GROUPED,
    "phi": _HEADS | {"intermediate_size": 48},
    "phi3": _GROUPED,
    "smollm3": _GROUPED,
    "starcoder2": _GROUPED,
    "stablelm": _GROUPED,
    "granite": _GROUPED | {"logits_scaling": 8.0},
    "cohere": _GROUPED | {"logit_scale": 0.25},
    "cohere2": _GROUPED | {"logit_scale": 0.25},
    "gpt2": _HEADS | {"max_position_embeddings": 64},
    "gptj": _HEADS | {"max_position_embeddings": 64, "rotary_dim": 4},
    "gpt_neox": _HEADS | {"intermediate_size": 48},
    "falcon": _HEADS,
    "bloom": _HEADS,
    "opt": _HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "mamba": _WIDTH | {"state_size": 8},
    "falcon_h1": _GROUPED | {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "mixtral": _GROUPED | _EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": _GROUPED | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16},
    "olmoe": _GROUPED | _EXPERTS | {"num_experts": 4},
    "gpt_oss": _GROUPED | _EXPERTS | {"num_local_experts": 4, "head_dim": 8},
    "granitemoe": _GROUPED | _EXPERTS | {"num_local_experts": 4, "logits_scaling": 4.0},
}


def assert_within_budget(name: str, got: Tensor, twin: Tensor, truth: Tensor, slack: float = 1e-6) -> None:
    """Check that a result is as exact as its dtype allows.

    The budget is ``2 * max|twin - truth| + eps(got.dtype) * max|truth| + slack``: at most twice the error of the
    same-dtype eager computation, plus one rounding of the largest magnitude.

    Args:
        name: what is compared, for the failure's message.
        got: the result under test.
        twin: the same computation done by eager PyTorch in the dtype under test.
        truth: the same computation done in float64.
        slack: absolute term for results whose true value is zero.

    Raises:
        AssertionError: if the result is outside the budget, is not finite where the truth is, or has another shape.

    Example::

        >>> x = torch.tensor([1.0, 2.0])
        >>> assert_within_budget("x", x, x, x.double())
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    error = (got.double() - truth.double()).abs()
    budget = 2 * (twin.double() - truth.double()).abs().max()
    budget = budget + torch.finfo(got.dtype).eps * truth.double().abs().max() + slack
    worst = int(error.argmax())
    assert error.max() <= budget, (
        f"{name}: error {error.max():.3e} is over the budget {budget:.3e} at flat index {worst}:"
        f" got {got.flatten()[worst]:.9g}, eager {twin.flatten()[worst]:.9g}, float64 {truth.flatten()[worst]:.9g}"
    )


def tiny_config(architecture: str, **overrides: Any) -> dict[str, Any]:
    """Keys of a tiny model, as ``LanguageModel(config=...)`` takes them.

    Args:
        architecture: a name in ``TINY_CAUSAL_LMS``, the model type of transformers.
        **overrides: keys to change or add.

    Raises:
        ValueError: if there is no tiny model of this architecture.
    """
    if architecture not in TINY_CAUSAL_LMS:
        raise ValueError(f"There is no tiny {architecture!r}; there are {', '.join(TINY_CAUSAL_LMS)}.")
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"model_type": architecture, **special, **TINY_CAUSAL_LMS[architecture], **overrides}


def tiny_causal_lm(architecture: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """Build a tiny Hugging Face causal language model whose weights are large enough for every part to matter.

    Args:
        architecture: a name in ``TINY_CAUSAL_LMS``.
        seed: of the weights; the global random state stays as it is.
        **overrides: config keys to change or add.

    Example::

        >>> tiny_causal_lm("gpt2").num_parameters()
        30752
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = tiny_config(architecture, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
