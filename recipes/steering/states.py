"""What methods remember, in and out of a checkpoint."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from litropy.recipes.steering.slots import Component

__all__ = ["load_states", "named_components", "states"]


def named_components(*named: tuple[str, Component]) -> dict[str, Component]:
    """Methods by their place and class, so that a state never reaches another method."""
    return {f"{name}:{type(component).__name__}": component for name, component in named}


def states(components: dict[str, Component]) -> dict[str, Any]:
    """The states of those that have one."""
    return {name: state for name, component in components.items() if (state := component.state_dict())}


def load_states(components: dict[str, Component], found: dict[str, Any]) -> None:
    """Give states back; methods without one start anew, and states without a method are named in a warning."""
    for name, state in found.items():
        if name in components:
            components[name].load_state_dict(state)
        else:
            rank_zero_warn(f"The checkpoint has the state of {name}, which is not among the methods now.")
