"""Does the fused loss agree with the model's own?"""

from collections.abc import Mapping

import torch
from torch import Tensor

from litropy.recipes.causal_lm import CausalLM, next_token_targets
from litropy.recipes.target_rows import check_target_rows

__all__ = ["check_parity"]


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def check_parity(model: CausalLM, batch: Mapping[str, Tensor], max_tokens: int = 128) -> dict[str, float]:
    """Compare loss and gradients with those of the model's own forward pass with ``labels=``.

    At most ``max_tokens`` tokens of one sequence are used, in eval mode, in the precision of the weights. Training
    mode, gradients and random state stay as they are.

    Args:
        model: not sharded.
        batch: as for training.
        max_tokens: length of the piece of the first sequence.

    Returns:
        Relative errors of the loss, and of its gradients with respect to the head's weight and the first trainable
        parameter.

    Raises:
        ValueError: if the two disagree by more than the rounding of the weights' precision explains, or the batch's
            ``target_rows`` are not those of its labels.
    """
    if "target_rows" in batch:
        check_target_rows(batch["target_rows"], next_token_targets(batch["labels"]))
    ids = batch["input_ids"]
    # every token is a target here: a prompt without targets would compare nothing
    piece = {"input_ids": ids[:1, :max_tokens], "labels": ids[:1, :max_tokens]}
    for name in ("position_ids", "attention_mask"):
        if name in batch and name in model.inputs:
            piece[name] = batch[name][:1, :max_tokens]
    named = dict(model.named_parameters())
    trainable = [name for name, parameter in named.items() if parameter.requires_grad]
    head = [name for name in trainable if named[name] is model.head.weight]
    watched = list(dict.fromkeys(head + trainable[:1]))
    parameters = [named[name] for name in watched]
    modes = [(module, module.training) for module in model.modules()]
    devices = [ids.device] if ids.device.type == "cuda" else []
    # flash attention runs in half precision only, so there autocast stays on
    flash = "flash" in str(getattr(model.causal_lm.config, "_attn_implementation", ""))
    autocast = torch.is_autocast_enabled(ids.device.type) and flash
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices),
            torch.autocast(ids.device.type, enabled=autocast),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
        ):
            ours = model(piece).loss
            our_gradients = torch.autograd.grad(ours, parameters) if parameters else ()
            theirs = model.causal_lm(**piece, use_cache=False).loss
            their_gradients = torch.autograd.grad(theirs, parameters) if parameters else ()
    finally:
        for module, mode in modes:
            module.training = mode
    errors = {"loss": _relative_error(ours, theirs)}
    for name, our_gradient, their_gradient in zip(watched, our_gradients, their_gradients, strict=True):
        errors[name] = _relative_error(our_gradient, their_gradient)
    half = autocast or model.head.weight.dtype in (torch.bfloat16, torch.float16)
    loss_tolerance, gradient_tolerance = (2e-2, 1e-1) if half else (1e-4, 1e-3)
    for name, error in errors.items():
        if not error <= (loss_tolerance if name == "loss" else gradient_tolerance):
            raise ValueError(
                f"The fused loss of {type(model.causal_lm).__name__} disagrees with the model's own:"
                f" loss {float(ours.detach()):.6g} against {float(theirs.detach()):.6g}, relative errors "
                + ", ".join(f"{key} {value:.2g}" for key, value in errors.items())
                + ". The model does something that is not understood; `check_parity: false` trains nevertheless."
            )
    return errors
