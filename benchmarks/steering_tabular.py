"""Two digits that sum to a target, with a table of logits for a policy: entropy collapses within a second.

The table has a row for each prompt's first digit, and for its second one behind each first; what steers its updates
are the package's own methods, in the order in which ``RLVR`` asks them.

Shape key: R responses, T = 2 tokens, V = 10 digits, S states.
"""

from dataclasses import replace

import torch
from steering_methods import Method, build
from steering_record import LARGEST, TERMS, Curves, Found, passes, solutions
from torch import Tensor, nn

from litropy.losses import HeadStats, linear_head_stats
from litropy.recipes import RLVR
from litropy.recipes.rlvr_policy import Wanted
from litropy.recipes.rlvr_rollouts import mini_batches
from litropy.recipes.steering.batch import RolloutBatch, UpdateBatch, stat
from litropy.recipes.steering.objective import objective
from litropy.recipes.steering.sampler import Sampler

OPTIONS = {"config": {"model_type": "llama"}, "group_size": 8, "epochs": 4}
BATCHES, EVERY = 200, 10
_DIGITS = LARGEST + 1
_TARGETS = TERMS * LARGEST + 1
_SPREAD = 0.5  # standard deviation of the first logits
_LEARNING_RATE = 2.0 * _TARGETS  # of gradient descent; 2 for each prompt, of which the loss takes the mean


class Table(nn.Module):
    """The policy."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        rows = _TARGETS * (1 + _DIGITS)
        self.logits = nn.Parameter(_SPREAD * torch.randn(rows, _DIGITS, generator=generator))

    @staticmethod
    def states(target: Tensor, first: Tensor) -> Tensor:
        """Rows of the table for both digits [R, 2], from targets and first digits [R]."""
        return torch.stack([target, _TARGETS + target * _DIGITS + first], 1)

    def stats(self, target: Tensor, responses: Tensor, temperature: Tensor | float, wanted: Wanted) -> HeadStats:
        """Statistics of both digits [R, 2], from the linear head that every policy has; its weight is 1."""
        return linear_head_stats(
            self.logits[self.states(target, responses[:, 0])],
            torch.eye(_DIGITS),
            responses,
            temperature=temperature,
            stats=wanted.names,
            top_p=wanted.top_p,
            nucleus=wanted.nucleus,
        )

    @torch.no_grad()
    def measure(self) -> Found:
        """Accuracy and diversity."""
        digits, target = solutions()
        logprob = stat(self.stats(target, digits, 1.0, Wanted(("logprob",))), "logprob")
        return passes(logprob.sum(-1), target)

    @torch.no_grad()
    def respond(self, group_size: int, sampler: Sampler, first_row: int, generator: torch.Generator) -> RolloutBatch:
        """Responses to every prompt, judged; without statistics."""
        target = torch.arange(_TARGETS).repeat_interleave(group_size)
        rows = torch.arange(len(target))
        tokens, behaviour, temperature = [], [], []
        sampler.begin(len(target), target.device)
        for place in range(TERMS):
            state = self.states(target, tokens[0] if tokens else torch.zeros_like(target))[:, place]
            heat = sampler.temperatures(self.logits[state])
            policy = (self.logits[state] / heat[:, None]).log_softmax(-1)
            drawn_from = sampler.truncate(policy).log_softmax(-1)
            token = torch.multinomial(drawn_from.exp(), 1, generator=generator)[:, 0]
            sampler.observe(policy[rows, token])
            tokens.append(token)
            behaviour.append(drawn_from[rows, token])
            temperature.append(heat)
        responses = torch.stack(tokens, 1)
        correct = responses.sum(-1) == target
        return RolloutBatch(
            prompts=target[:, None],
            prompt_mask=torch.ones(len(target), 1, dtype=torch.bool),
            responses=responses,
            mask=torch.ones_like(responses, dtype=torch.bool),
            behaviour=torch.stack(behaviour, 1),
            temperature=torch.stack(temperature, 1),
            row=first_row + rows,
            group=(first_row + rows) // group_size,
            reward=correct.float(),
            correct=correct,
            truncated=torch.zeros_like(correct),
            stats=HeadStats(),
        )


def _stats(table: Table, batch: RolloutBatch, wanted: Wanted) -> HeadStats:
    return table.stats(batch.prompts[:, 0], batch.responses, batch.temperature, wanted)


def _learn(table: Table, model: RLVR, optimizer: torch.optim.Optimizer, batch: RolloutBatch) -> None:
    """All updates on a batch of responses."""
    advantage = model.methods.advantages(batch)
    for _ in range(model.epochs):
        for rows in mini_batches(batch, model.mini_batch_size):
            part = batch[rows]
            seen = UpdateBatch(part, advantage[rows], _stats(table, part, model.wanted))
            optimizer.zero_grad()
            objective(model.methods, seen).loss.backward()
            optimizer.step()
            for component in (model.sampler, *(method for _, method in model.methods.named())):
                component.after_step(seen.detached())


def run(method: Method, seed: int, batches: int) -> dict[str, list[float]]:
    """Train a table; points of its curves.

    Args:
        method: what steers it.
        seed: of the table and of the responses.
        batches: of responses, eight to each prompt.
    """
    model = build(method, "tabular", OPTIONS)  # for its methods and its sampler; its network is never built
    generator = torch.Generator().manual_seed(seed)
    table = Table(generator)
    first = Table(generator).requires_grad_(False)
    first.load_state_dict(table.state_dict())
    optimizer = torch.optim.SGD(table.parameters(), _LEARNING_RATE)
    curves = Curves(table.measure, EVERY)
    for number in range(batches):
        rows = number * _TARGETS * model.group_size
        batch = table.respond(model.group_size, model.sampler, rows, generator)
        with torch.no_grad():
            batch = replace(batch, stats=_stats(table, batch, model.wanted))
            if model.reference_kind != "none":
                batch = replace(batch, reference=stat(_stats(first, batch, Wanted(("logprob",))), "logprob"))
        entropy = float(stat(batch.stats, "entropy").mean())
        for shaping in model.methods.shaping:
            batch = replace(batch, reward=shaping.shape(batch))
        chosen = batch if model.methods.data is None else model.methods.data.select(batch)
        if chosen is not None:
            _learn(table, model, optimizer, chosen)
        curves.add(entropy)
    return curves.points
