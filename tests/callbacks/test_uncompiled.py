from contextlib import ExitStack

import pytest
import torch
from torch import nn

from litropy.callbacks.probe_clock import ProbeClock
from litropy.callbacks.uncompiled import is_compiled, uncompiled


def compiled_linear():
    """A compiled layer, and the list that a hook set afterwards appends to."""
    layer, calls = nn.Linear(2, 2), []
    layer.compile(backend="eager")
    layer(torch.ones(1, 2))
    layer.register_forward_hook(lambda *_: calls.append(1))
    return layer, calls


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_hooks_are_called_until_the_last_monitor_closes_whatever_the_order(order):
    layer, calls = compiled_linear()
    monitors = [ExitStack(), ExitStack()]
    for monitor in monitors:
        monitor.enter_context(uncompiled())
    layer(torch.ones(1, 2))
    monitors[order[0]].close()
    layer(torch.ones(1, 2))
    assert len(calls) == 2
    monitors[order[1]].close()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_compiled_modules_are_known():
    layer, _ = compiled_linear()
    assert is_compiled([nn.ReLU(), layer])
    assert is_compiled([torch.compile(nn.ReLU(), backend="eager")])
    assert not is_compiled([nn.ReLU(), nn.Linear(2, 2)])


def test_a_clock_adds_up_pieces_and_starts_again(device):
    clock = ProbeClock(device)
    for _ in range(2):
        with clock.running():
            torch.ones(1000, device=device).sum()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert 0 < clock.take() < 1e4
    assert clock.take() is None
