"""The size of gradients against the optimiser's epsilon, which swallows those that are smaller."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["gradient_over_epsilon"]


@torch.no_grad()
def gradient_over_epsilon(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    r"""RMS of each weight matrix's gradient over epsilon, :math:`\sqrt{\mathrm{mean}\,g^2} / \epsilon`.

    Adam's update is about :math:`g / (\sqrt{v} + \epsilon)`: under 1 it vanishes with the gradient.

    Args:
        optimizer: parameter groups without an ``eps`` are left out; gradients may be sharded.
        names: of parameters, by ``id``; those that are not in it are left out.

    Returns:
        A float32 scalar on the device for each matrix (two dimensions) that has a gradient; without any, nothing.

    Example::

        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> weight.grad = torch.full((2, 2), 3e-8)
        >>> gradient_over_epsilon(torch.optim.Adam([weight], eps=1e-8), {id(weight): "weight"})
        {'weight': tensor(3.)}

    Reference: Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, arXiv
    2309.14322.
    """
    found = [
        (names[id(parameter)], parameter.grad, group["eps"])
        for group in optimizer.param_groups
        if isinstance(group.get("eps"), float) and group["eps"] > 0
        for parameter in group["params"]
        if parameter.grad is not None and parameter.ndim == 2 and id(parameter) in names
    ]
    if not found:
        return {}
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for _, gradient, _ in found]
    # in float64: squares of vanishing gradients underflow in float32
    squares = torch.stack(torch._foreach_norm(local, 2, torch.float32)).double().square()
    sizes = torch.tensor([gradient.numel() for gradient in local], dtype=torch.float64)
    if any(isinstance(gradient, DTensor) for _, gradient, _ in found):
        both = torch.stack([squares, sizes.to(squares.device)])
        # what several ranks hold counts as often in the size as in the sum
        dist.all_reduce(both)
        squares, sizes = both.unbind()
    eps = torch.tensor([eps for _, _, eps in found], dtype=torch.float64)
    ratios = (squares / sizes.to(squares.device)).sqrt() / eps.to(squares.device)
    return dict(zip((name for name, _, _ in found), ratios.float().unbind(), strict=True))
