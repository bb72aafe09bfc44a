"""A Hugging Face causal language model whose training loss never stores logits."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litropy.losses import HeadStats
from litropy.recipes.head_loss import LossOptions, head_loss
from litropy.recipes.output_head import find_output_head, inner_causal_lm
from litropy.recipes.target_rows import check_target_rows

__all__ = ["CausalLM", "CausalLMOutput", "next_token_targets"]


class CausalLMOutput(NamedTuple):
    """What ``CausalLM`` returns; a tuple, because sharding looks for the loss inside it.

    Attributes:
        loss: the loss to optimise, a scalar [nats].
        targets: what each position that the head saw had to predict, int64, -100 where nothing: [B, T], or [n] if the
            batch has ``target_rows``.
        num_targets: how many targets that were, an int64 scalar.
        stats: row statistics that were asked for, each shaped like ``targets``; 0 where there is no target.
    """

    loss: Tensor
    targets: Tensor
    num_targets: Tensor
    stats: HeadStats | None

    def sums(self) -> dict[str, Tensor]:
        """Sums over targets of the statistics that were asked for; right guesses in place of the argmax."""
        if self.stats is None:
            return {}
        values = {name: value for name, value in vars(self.stats).items() if value is not None}
        if "argmax" in values:
            values["token_accuracy"] = values.pop("argmax") == self.targets
        return {name: value.sum() for name, value in values.items()}


def next_token_targets(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Move labels [B, T] one place left, so that each position holds the token after it; the last is ignored.

    Example::

        >>> next_token_targets(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


class CausalLM(nn.Module):
    """Wraps a causal language model: hidden states from its backbone, the loss from its head's weight.

    ``fully_shard`` applied to this module (after the decoder layers) puts embedding, head and final norm into one unit
    that is gathered once a step: inside ``forward`` the head's weight is a plain tensor, and its gradient is reduced as
    that of any other parameter.

    Args:
        causal_lm: a ``...ForCausalLM`` of transformers with its weights in memory, or a ``PeftModel`` of LoRA adapters
            around one.

    Raises:
        ValueError: if the model does something between its hidden states and its loss that is not understood.
    """

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.head_info = find_output_head(causal_lm)
        self.causal_lm = causal_lm
        inner = inner_causal_lm(causal_lm)
        self.router_loss = _router_loss(inner) if getattr(inner.config, "output_router_logits", False) else None
        parameters = inspect.signature(self.backbone.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.inputs = [
            name for name in ("input_ids", "attention_mask", "position_ids") if takes_any or name in parameters
        ]

    @property
    def backbone(self) -> nn.Module:
        """The submodule that gives the hidden states."""
        return self.causal_lm.get_submodule(self.head_info.backbone)

    @property
    def head(self) -> Any:
        """The linear output head, with adapters if it has any."""
        return self.causal_lm.get_submodule(self.head_info.head)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        """Move or cast parameters; buffers (rotary frequencies) keep their dtype, as in ``from_pretrained``."""
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if name in exact and buffer.dtype != exact[name].dtype:
                owner, _, attribute = name.rpartition(".")
                setattr(self.get_submodule(owner), attribute, exact[name].to(buffer.device))
        return self

    def forward(
        self,
        batch: Mapping[str, Tensor],
        *,
        router_loss: bool = True,
        return_stats: Sequence[str] = (),
        choose: Callable[[HeadStats, Tensor], Tensor] | None = None,
        **options: Unpack[LossOptions],
    ) -> CausalLMOutput:
        """Compute the loss of a batch.

        Args:
            batch: ``input_ids`` and ``labels`` [B, T], both int64 and aligned (the shift by one happens here), and what
                else the backbone takes: ``attention_mask``, ``position_ids``. With ``target_rows`` [n] the head sees
                these places of the flat batch alone, which must be all that have a target.
            router_loss: whether to add a mixture of experts' load-balancing loss if the model's config asks for it.
            return_stats: names of the ``HeadStats`` fields to return from the same pass, detached.
            choose: says which targets count, bool shaped like them, from log-probability, entropy and argmax of each
                position and the targets; None takes all. The head is passed once more for it, the backbone is not.
            **options: of ``linear_cross_entropy``; ``num_items`` is what to divide the sum over targets by, by default
                their number.
        """
        inputs = {name: batch[name] for name in self.inputs if name in batch}
        with_router = router_loss and self.router_loss is not None
        if with_router:
            inputs["output_router_logits"] = True  # type: ignore[assignment]
        outputs = self.backbone(**inputs, use_cache=False, return_dict=True)
        targets = next_token_targets(batch["labels"])
        hidden = outputs.last_hidden_state
        if "target_rows" in batch:
            rows = batch["target_rows"]
            if rows.device.type == "cpu":
                check_target_rows(rows, targets)
            hidden, targets = hidden.flatten(0, 1).index_select(0, rows), targets.flatten()[rows]
        if choose is not None:
            with torch.no_grad():
                names = ("logprob", "entropy", "argmax")
                _, seen = head_loss(self.head, self.head_info, hidden, targets, names)
                assert seen is not None
                targets = torch.where(choose(seen, targets), targets, -100)
        num_targets = (targets != -100).sum()
        loss, stats = head_loss(self.head, self.head_info, hidden, targets, return_stats, **options)
        if with_router and self.router_loss is not None:
            # the share of these targets, so that micro-batches and ranks add up to the token-weighted mean
            num_items = options.get("num_items")
            share = 1.0 if num_items is None else num_targets / num_items
            loss = loss + share * self.router_loss(outputs.router_logits, batch.get("attention_mask"))
        return CausalLMOutput(loss, targets, num_targets, stats)

    def generate(self, **inputs: Any) -> Tensor:
        """Generate tokens as the Hugging Face model does; under sharding this gathers the root unit first."""
        return self.causal_lm.generate(**inputs)  # type: ignore[operator]


def _router_loss(model: nn.Module) -> Callable[[Any, Tensor | None], Tensor]:
    """The load-balancing loss of a mixture of experts, weighted as the model weights it."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    coefficient = getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", None))
    experts, chosen = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    expected = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    if (
        function is None
        or coefficient is None
        or experts is None
        or list(inspect.signature(function).parameters) != expected
    ):
        raise ValueError(
            f"The config of {type(model).__name__} asks for a router loss that is not understood; set"
            f" `output_router_logits` to false."
        )

    def router_loss(router_logits: Any, attention_mask: Tensor | None) -> Tensor:
        return coefficient * function(router_logits, experts, chosen, attention_mask)

    return router_loss
