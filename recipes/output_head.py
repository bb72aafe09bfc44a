"""What a Hugging Face causal language model does between its hidden states and its logits.

Modelling code differs from architecture to architecture, so the head is not looked up in a list of names: a probe runs
the model's own
``forward`` around stand-ins for backbone and head, and watches. It finds which module is the backbone, that the head
gets the backbone's output unchanged, which function turns the head's output into logits, and that the loss is plain
next-token cross-entropy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.modeling_outputs import BaseModelOutputWithPast

from litropy.callbacks.logit_transforms import logit_transforms
from litropy.recipes.lora_head import active_head

__all__ = ["OutputHead", "find_output_head", "inner_causal_lm"]


@dataclass(frozen=True)
class OutputHead:
    """Where a model's backbone and head are, and what happens to its logits: ``softcap tanh(z / softcap) * scale``.

    Attributes:
        backbone: name of the submodule that gives the hidden states.
        head: name of the linear layer that gives the logits, or of what PEFT has put around it.
        softcap: bound of the logits, or None.
        scale: factor of the logits after the softcap.
        num_logits: how many of the head's rows are logits; the rest is padding that the model cuts off.
    """

    backbone: str
    head: str
    softcap: float | None
    scale: float
    num_logits: int


def inner_causal_lm(model: Any) -> Any:
    """The causal language model inside a ``PeftModel``; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _without_peft(model: Any) -> Any:
    """The model inside, if its backbone may be called in place of the ``PeftModel``'s own forward."""
    inner = inner_causal_lm(model)
    if inner is not model:
        for config in model.peft_config.values():
            if config.peft_type.value != "LORA" or getattr(config, "alora_invocation_tokens", None):
                raise ValueError(
                    f"{type(inner).__name__} is not supported inside {type(model).__name__} ({type(config).__name__}):"
                    " more may happen there than a pass through the backbone. `litropy.huggingface.patch_causal_lm`"
                    " takes such models, because it leaves their forward pass to them."
                )
    return inner


class _Probed(BaseModelOutputWithPast):
    """Output of the stand-in for a backbone: every field that it does not have is None."""

    def __getattr__(self, name: str) -> None:
        return None


@dataclass
class _Trace:
    """What the probe saw."""

    backbone_calls: int = 0
    head_inputs: list[Any] = field(default_factory=list)


def _refuse(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} is not supported: {why}. Its loss would be wrong without its logits."
        " Choose another architecture, or train it with its own loss."
    )


@contextmanager
def _stand_ins(backbone: nn.Module, head: Any, hidden: Tensor, raw: Tensor) -> Iterator[_Trace]:
    """Let the backbone return ``hidden`` and the head ``raw``, whatever they get."""
    trace = _Trace()

    def forward(*args: Any, **kwargs: Any) -> _Probed:
        trace.backbone_calls += 1
        return _Probed(last_hidden_state=hidden)

    def replace(_module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
        trace.head_inputs.append(args[0])
        return raw.clone()

    own = vars(backbone).get("forward")
    backbone.forward = forward
    handle = head.register_forward_hook(replace)
    try:
        yield trace
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own
        handle.remove()


def _probe(
    model: Any, backbone: nn.Module, head: Any, hidden: Tensor, raw: Tensor, tokens: Tensor
) -> tuple[Any, _Trace]:
    """Call the model in eval mode around the stand-ins; every module's own mode is restored."""
    options: dict[str, Any] = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _stand_ins(backbone, head, hidden, raw) as trace, torch.no_grad():
            return model(input_ids=tokens, labels=tokens, use_cache=False, **options), trace
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        if not trace.backbone_calls:
            return None, trace
        raise _refuse(model, f"its forward pass does something unknown ({error})") from error
    finally:
        for module, mode in modes:
            module.training = mode


def find_output_head(model: Any) -> OutputHead:
    """Probe a Hugging Face causal language model for its backbone, its head and what it does to its logits.

    Costs one application of the head to three tokens; random state, gradients and training mode stay as they are.

    Args:
        model: a ``...ForCausalLM`` of transformers, not sharded, with its weights in memory, or a ``PeftModel`` of LoRA
            adapters around one.

    Returns:
        The description that the fused loss needs.

    Raises:
        ValueError: naming the architecture and what is unknown about it.
    """
    names = {id(module): name for name, module in model.named_modules()}
    model = _without_peft(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = active_head(head, type(model).__name__).linear.weight
    if not weight.is_floating_point() or weight.is_meta:
        raise _refuse(model, f"its output head is {weight.dtype} on {weight.device}, not a matrix of numbers in memory")
    if is_traceable_wrapper_subclass(weight):
        raise _refuse(model, f"its output head's weight is a {type(weight).__name__}, quantised or sharded")
    backbones = [getattr(model, "base_model", None)]
    if "get_decoder" in dir(model):
        backbones.append(model.get_decoder())
    config = model.config.get_text_config()
    candidates = logit_transforms(config, weight.shape[1])
    bound = 2 * max([30.0, *(cap for cap, _ in candidates if cap)])
    tokens = torch.arange(3, device=weight.device)[None] % weight.shape[0]
    # distinct, exactly representable numbers that also reach far into the flat part of a softcap
    hidden = torch.arange(3 * weight.shape[1], device=weight.device).view(1, 3, -1).remainder(64).to(weight.dtype) / 64
    raw = torch.linspace(-bound, bound, 3 * weight.shape[0], device=weight.device).view(1, 3, -1).to(weight.dtype)
    for backbone in {id(module): module for module in backbones if module is not None and module is not model}.values():
        output, trace = _probe(model, backbone, head, hidden, raw, tokens)
        if trace.backbone_calls == 1:
            break
    else:
        raise _refuse(model, "its forward pass does not call its backbone exactly once")
    if len(trace.head_inputs) != 1:
        raise _refuse(model, f"its forward pass calls its output head {len(trace.head_inputs)} times")
    if trace.head_inputs[0].shape != hidden.shape or not torch.equal(trace.head_inputs[0], hidden):
        raise _refuse(model, "it changes the hidden states before its output head")
    if output.logits is None:
        raise _refuse(model, "its forward pass gives no logits; unpatch_causal_lm(model) if it is patched")
    softcap, scale, num_logits = _fit(model, raw, output.logits, candidates)
    expected = F.cross_entropy(output.logits[0, :-1].float(), tokens[0, 1:])
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    if not torch.isclose(output.loss.float(), expected, rtol=tolerance, atol=tolerance):
        raise _refuse(
            model, f"its loss is {float(output.loss):.6g} where next-token cross-entropy is {float(expected):.6g}"
        )
    return OutputHead(names[id(backbone)], names[id(head)], softcap, scale, num_logits)


def _fit(
    model: nn.Module, raw: Tensor, logits: Tensor, candidates: list[tuple[float | None, float]]
) -> tuple[float | None, float, int]:
    """The first candidate that explains the logits that the model made of the head's output ``raw``."""
    num_logits = logits.shape[-1]
    if num_logits > raw.shape[-1] or logits.shape[:-1] != raw.shape[:-1]:
        raise _refuse(model, f"its logits are {tuple(logits.shape)} where its head gives {tuple(raw.shape)}")
    exact = raw.dtype in (torch.float32, torch.float64)
    start = raw[..., :num_logits].float()
    for softcap, scale in candidates:
        expected = (start if softcap is None else softcap * torch.tanh(start / softcap)) * scale
        error = (logits.float() - expected).abs().max()
        if error <= (1e-4 if exact else 2e-2) * expected.abs().max():
            return softcap, scale, num_logits
    named = ", ".join(f"softcap {cap} and scale {scale:g}" for cap, scale in candidates)
    raise _refuse(model, f"it changes its logits in an unknown way (tried: {named})")
