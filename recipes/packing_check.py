"""Can the documents of a packed sequence see one another?"""

import torch

from litropy.recipes.causal_lm import CausalLM

__all__ = ["isolates_documents"]


@torch.no_grad()
def isolates_documents(model: CausalLM, length: int = 4) -> bool:
    """Whether ``position_ids`` that start again at 0 keep a model from looking at the document before.

    Two documents are packed into one sequence; if other tokens in the first change the hidden states of the second, it
    looks.

    Args:
        model: not sharded.
        length: tokens of each document.
    """
    if "position_ids" not in model.inputs:
        return False
    weight = model.head.weight
    tokens = torch.arange(2 * length, device=weight.device)[None] % weight.shape[0]
    other = tokens.clone()
    other[:, :length] = tokens[:, :length].flip(1)
    positions = torch.arange(length, device=weight.device).repeat(2)[None]
    modes = [(module, module.training) for module in model.modules()]
    devices = [weight.device] if weight.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            seen = [
                model.backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, length:]
                for ids in (tokens, other)
            ]
    finally:
        for module, mode in modes:
            module.training = mode
    # experts see both documents in one matrix product, so its rounding may change
    half = weight.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(weight.device.type)
    tolerance = 1e-2 if half else 1e-5
    return bool((seen[0] - seen[1]).float().norm() <= tolerance * seen[0].float().norm())
