"""Rollout engines: what writes responses to prompts; Hugging Face's generation inside the training process."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.output_head import inner_causal_lm
from litropy.recipes.steering.sampler import Sampler

__all__ = ["Generation", "HuggingFaceEngine", "RolloutEngine", "RolloutRequest", "draw"]

_FEW = 1024  # columns that are not worth being put into blocks


class RolloutRequest(NamedTuple):
    """What an engine is asked for.

    Attributes:
        prompts: tokens, padded on the left, int64 [B, P].
        prompt_mask: where they are tokens, int64 [B, P].
        group_size: responses to each prompt.
        max_new_tokens: the most tokens of a response.
        end_tokens: any of these ends a response.
        pad_token: what stands behind the end.
        seed: equal seeds give equal responses.
    """

    prompts: Tensor
    prompt_mask: Tensor
    group_size: int
    max_new_tokens: int
    end_tokens: list[int]
    pad_token: int
    seed: int


class Generation(NamedTuple):
    """Responses, those to one prompt side by side: B times G rows.

    Attributes:
        responses: tokens, int64 [B G, T].
        mask: where they are tokens, the end token included, bool [B G, T].
        behaviour: log-probability of each token under the distribution it was drawn from [B G, T, nats]; 0 elsewhere.
        temperature: at which the trainer takes the policy's probabilities [B G, T].
        truncated: whether a response ended without an end token, bool [B G].
    """

    responses: Tensor
    mask: Tensor
    behaviour: Tensor
    temperature: Tensor
    truncated: Tensor


class RolloutEngine(ABC):
    """Writes responses with the policy as it is now."""

    @abstractmethod
    def generate(self, policy: CausalLM, request: RolloutRequest, sampler: Sampler) -> Generation:
        """Draw ``group_size`` responses to each prompt."""


def draw(weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a column of each row in proportion to weights that are not below 0.

    Args:
        weights: [B, k].
        generator: on the device of the weights.

    Returns:
        Columns and their shares of the rows' weights, [B, 1] each.

    Raises:
        ValueError: if a row's weights are NaN, or all 0.

    Example::

        >>> column, share = draw(torch.tensor([[0.0, 2.0, 0.0]]), torch.Generator())
        >>> column.tolist(), share.tolist()
        ([[1]], [[1.0]])
    """
    # the inverse of the cumulative sum takes a random number or two a row, where ``multinomial`` takes one an entry:
    # first a block of columns is drawn, then a column of the block
    k = weights.shape[1]
    width = math.isqrt(k) if k > _FEW else 1
    even = k - k % width
    sums = weights
    if width > 1:
        rest = weights[:, even:].sum(-1, keepdim=True)
        sums = torch.cat([weights[:, :even].unflatten(1, (-1, width)).sum(-1), rest], 1)
    column, total = _invert(sums, generator)
    if not (total > 0).all():
        raise ValueError(
            "The next tokens' probabilities are not numbers: the model's logits are NaN or infinite. Lower the learning"
            " rate, or clip gradients."
        )
    if width > 1:
        columns = column * width + torch.arange(width, device=weights.device)
        inside = weights.gather(1, columns.clamp(max=k - 1)).masked_fill(columns >= k, 0)
        column = columns.gather(1, _invert(inside, generator)[0])
    return column, weights.gather(1, column) / total


def _invert(weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Columns drawn in proportion to few weights, and the sums of these, [B, 1] each."""
    # in float64, or entries that weigh little against the sum before them would be lost
    exact = torch.float32 if weights.device.type == "mps" else torch.float64
    reach = weights.cumsum(1, dtype=exact)
    total = reach[:, -1:]
    point = total * torch.rand(total.shape, dtype=exact, device=weights.device, generator=generator)
    return torch.searchsorted(reach, point, right=True), total


class _Drawing(LogitsProcessor):
    """Draws the next tokens itself and leaves no other choice, so that what is recorded is what happened."""

    def __init__(self, sampler: Sampler, generator: torch.Generator) -> None:
        self.sampler, self.generator = sampler, generator
        self.behaviour: list[Tensor] = []
        self.temperature: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        temperature = self.sampler.temperatures(scores)
        policy = (scores.float() / temperature[:, None]).log_softmax(-1)
        weights, tokens = self.sampler.chances(policy)
        column, share = draw(weights, self.generator)
        token = column if tokens is None else tokens.gather(1, column)
        self.sampler.observe(policy.gather(1, token)[:, 0])
        self.behaviour.append(share.log().to(policy)[:, 0])
        self.temperature.append(temperature)
        return scores.fill_(torch.finfo(scores.dtype).min).scatter_(1, token, 0.0)  # these are a copy


@contextmanager
def _nothing_but(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Keep a checkpoint's own generation settings (top-k, penalties) out: they would change what is drawn from."""
    previous, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = previous


class HuggingFaceEngine(RolloutEngine):
    """``generate`` of Hugging Face on the very weights that are trained: no copy, nothing to synchronise.

    A prompt is read once for its whole group. Tokens are drawn, and their log-probabilities recorded, from the
    distribution that the sampler makes of the logits.

    Args:
        max_rows: most responses that are written side by side; fewer need less memory.

    Raises:
        ValueError: if ``max_rows`` is not positive.
    """

    def __init__(self, max_rows: int = 256) -> None:
        if max_rows < 1:
            raise ValueError(f"`max_rows` is {max_rows}; it must be at least 1.")
        self.max_rows = max_rows

    @torch.no_grad()
    def generate(self, policy: CausalLM, request: RolloutRequest, sampler: Sampler) -> Generation:
        """Draw the responses, some prompts at a time."""
        device = request.prompts.device
        generator = torch.Generator(device).manual_seed(request.seed)
        prompts_at_once = max(1, self.max_rows // request.group_size)
        parts = []
        for start in range(0, len(request.prompts), prompts_at_once):
            rows = slice(start, start + prompts_at_once)
            part = request._replace(prompts=request.prompts[rows], prompt_mask=request.prompt_mask[rows])
            parts.append(self._generate(policy, part, sampler, generator))
        return _joined(parts, request.pad_token)

    def _generate(
        self, policy: CausalLM, request: RolloutRequest, sampler: Sampler, generator: torch.Generator
    ) -> Generation:
        model = inner_causal_lm(policy.causal_lm)
        config = GenerationConfig(
            do_sample=False,  # the choice has been made
            max_new_tokens=request.max_new_tokens,
            eos_token_id=request.end_tokens,
            pad_token_id=request.pad_token,
        )
        ids, mask = request.prompts, request.prompt_mask
        drawing = _Drawing(sampler, generator)
        sampler.begin(len(ids) * request.group_size, ids.device)
        with _nothing_but(model, GenerationConfig()):
            tokens = model.generate(
                input_ids=ids.repeat_interleave(request.group_size, 0),
                attention_mask=mask.repeat_interleave(request.group_size, 0),
                past_key_values=_read_prompts(policy, ids, mask, request.group_size),
                generation_config=config,
                logits_processor=LogitsProcessorList([drawing]),
            )
        return _cut(tokens[:, ids.shape[1] :], drawing, request.end_tokens)


def _read_prompts(policy: CausalLM, ids: Tensor, mask: Tensor, group_size: int) -> DynamicCache | None:
    """The cache of all but the prompts' last tokens, read once and repeated for each group; None if there are none."""
    if ids.shape[1] < 2:
        return None
    cache = DynamicCache(config=inner_causal_lm(policy.causal_lm).config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    policy.backbone(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_repeat_interleave(group_size)
    return cache


def _cut(responses: Tensor, drawing: _Drawing, end_tokens: list[int]) -> Generation:
    """Find where the responses end; what was drawn behind the end is forgotten."""
    width = responses.shape[1]
    is_end = torch.isin(responses, torch.tensor(end_tokens, device=responses.device))
    mask = is_end.cumsum(-1) - is_end.long() == 0
    behaviour = torch.stack(drawing.behaviour[:width], 1)
    temperature = torch.stack(drawing.temperature[:width], 1)
    return Generation(responses, mask, torch.where(mask, behaviour, 0), temperature, ~is_end.any(-1))


def _joined(parts: list[Generation], pad_token: int) -> Generation:
    """Parts one below the other, as wide as the widest."""
    width = max(part.responses.shape[1] for part in parts)
    fill = (pad_token, False, 0.0, 1.0)

    def widen(value: Tensor, empty: float) -> Tensor:
        return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=empty)

    wide = [[widen(value, empty) for value, empty in zip(part[:4], fill, strict=True)] for part in parts]
    columns = [torch.cat(values) for values in zip(*wide, strict=True)]
    responses, mask, behaviour, temperature = columns
    truncated = torch.cat([part.truncated for part in parts])
    return Generation(responses, mask, behaviour, temperature, truncated)
