"""The runs of the collapse benchmark, by name, in the order of their importance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning.pytorch import Callback

from litropy.callbacks import (
    AttentionEntropyRegularizer,
    LearningRateBackoff,
    QKClip,
    ResetMoments,
    SigmaReparam,
    recovery_actions,
)
from litropy.callbacks.recovery import QUERY_KEY_PARAMETERS

HEALTHY_RATE, COLLAPSING_RATE, ENORMOUS_RATE = 3e-3, 3e-2, 1e-1
Callbacks = Callable[[], list[Callback]]


@dataclass(frozen=True)
class Scenario:
    """One kind of run.

    Attributes:
        title: how tables call it.
        kind: "healthy": no alarm is right; "works": looks collapsed and learns, so that no critical alarm is right;
            "collapse": an alarm is right; "remedy": prevents a collapse; "recovery": acts on the alarm.
        learning_rate: of Adam, constant.
        steps: optimiser steps.
        seeds: how many.
        task: "markov" or "copy".
        layers: of the decoder.
        post_ln: normalise after blocks.
        sharp: factor of the initial queries and keys.
        callbacks: makes remedies that are active from the start.
        actions: makes remedies that the detector's alarms set off.
    """

    title: str
    kind: str
    learning_rate: float
    steps: int = 300
    seeds: int = 3
    task: str = "markov"
    layers: int = 4
    post_ln: bool = False
    sharp: float = 1.0
    callbacks: Callbacks = list
    actions: Callbacks = list


def _backoff_and_reset() -> list[Callback]:
    return [LearningRateBackoff(), ResetMoments([QUERY_KEY_PARAMETERS])]


SCENARIOS: dict[str, Scenario] = {
    "collapse": Scenario("entropy collapse", "collapse", COLLAPSING_RATE),
    "rank_collapse": Scenario("rank collapse, post-LN", "collapse", COLLAPSING_RATE, steps=80, post_ln=True),
    "recovery": Scenario("recovery_actions()", "recovery", COLLAPSING_RATE, actions=recovery_actions),
    "sigma_reparam": Scenario("SigmaReparam()", "remedy", COLLAPSING_RATE, callbacks=lambda: [SigmaReparam()]),
    "copy": Scenario("copying", "works", 1e-2, steps=200, task="copy", layers=2),
    "sharp": Scenario("sharp initialisation", "works", 1e-2, steps=200, sharp=6.0),
    "full_collapse": Scenario("full collapse", "collapse", ENORMOUS_RATE, steps=120),
    "recovery_2_layers": Scenario(
        "recovery_actions(), two layers", "recovery", COLLAPSING_RATE, layers=2, actions=recovery_actions
    ),
    "healthy": Scenario("healthy", "healthy", HEALTHY_RATE, steps=1000, seeds=10),
    "qk_clip": Scenario("QKClip(tau=20)", "remedy", COLLAPSING_RATE, callbacks=lambda: [QKClip(20.0)]),
    "regularizer": Scenario(
        "AttentionEntropyRegularizer()", "remedy", COLLAPSING_RATE, callbacks=lambda: [AttentionEntropyRegularizer()]
    ),
    "backoff": Scenario("LearningRateBackoff()", "recovery", COLLAPSING_RATE, actions=lambda: [LearningRateBackoff()]),
    "backoff_and_reset": Scenario(
        "LearningRateBackoff(), ResetMoments()", "recovery", COLLAPSING_RATE, actions=_backoff_and_reset
    ),
}


def described(steps: Mapping[str, int], seeds: int | None) -> dict[str, dict[str, Any]]:
    """What tables need to know of each scenario, with its steps and, if they are given, its seeds."""
    texts = [field.name for field in fields(Scenario) if field.name not in ("callbacks", "actions")]
    return {
        name: {key: getattr(scenario, key) for key in texts} | {"steps": steps[name], "seeds": seeds or scenario.seeds}
        for name, scenario in SCENARIOS.items()
    }
