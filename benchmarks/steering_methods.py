"""The methods of the steering benchmark: every fragment of ``configs/steering/``, and some with larger numbers.

A fragment is put over a task's base config as the command line does it, so that what runs is what a user gets.
"""

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from litropy.config_files import find_config, packaged_configs
from litropy.recipes import RLVR

BASELINE = "grpo"
_FOLDER = "steering/"
_CONTROLLER = "regularisers.controller"

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A fragment and what is changed in it.

    Attributes:
        fragment: its name in ``configs/steering/``, without the ending.
        options: arguments of the model that are changed.
        of_task: those that are changed for one task only.
        target: H* [nats a token] that the method is to hold, if nothing else is set; "start" for the first batch's.
    """

    fragment: str
    options: Options = field(default_factory=dict)
    of_task: Mapping[str, Options] = field(default_factory=dict)
    target: float | str | None = None

    def changes(self, task: str) -> dict[str, Any]:
        """Arguments of the model that are not the fragment's for this task."""
        return {**self.options, **self.of_task.get(task, {})}


# the most tokens of a response, and the prompts of a batch, are less than what the fragments take for granted
_LENGTH = {"tabular": {"aggregation.length": 2}, "transformer": {"aggregation.length": 4}}
_GROUPS = {"tabular": {"data.groups": 19}}

# fragments that say a target, or whose numbers cannot act at this size; all others run as they are
_CHANGED: dict[str, Method] = {
    "ares_reward": Method("ares_reward", {"shaping.width": 1}),
    "bucket_kl": Method("bucket_kl", {"penalties.width": 1}),
    "dr_grpo": Method("dr_grpo", of_task=_LENGTH),
    "dynamic_sampling": Method("dynamic_sampling", of_task=_GROUPS),
    "entropy_anchor": Method("entropy_anchor", target="start"),
    "entropy_target": Method("entropy_target", target=0.5),
    "kl_cov": Method("kl_cov", {"epochs": 4}),
    "recent_sample_recovery": Method("recent_sample_recovery", of_task=_GROUPS),
    "siren": Method("siren", of_task=_LENGTH),
    "skywork": Method("skywork", target=0.2),
    "ter": Method("ter", target=0.55),
}

_GAINS = {
    f"{_CONTROLLER}.{name}": value
    for name, value in {"proportional_gain": 1.0, "integral_gain": 0.02, "low": 0.0, "high": 1.0}.items()
}

# again, with shares and coefficients that are large enough to do something here
_LARGER: dict[str, Method] = {
    "clip_cov": Method("clip_cov", {"masks.share": 0.3, "masks.low": 0.1}, {"transformer": {"masks.share": 0.05}}),
    "entropy_anchor": Method("entropy_anchor", {f"{_CONTROLLER}.integral_gain": 0.01}, target="start"),
    "entropy_bonus": Method(
        "entropy_bonus", {"regularisers.coefficient": 0.1}, {"transformer": {"regularisers.coefficient": 0.02}}
    ),
    "entropy_target": Method("entropy_target", _GAINS, {"transformer": {f"{_CONTROLLER}.target": 0.3}}, target=0.5),
    "kl_cov": Method("kl_cov", {"epochs": 4, "penalties.share": 0.2}),
    "siren": Method("siren", {"regularisers.coefficient": 0.5}, _LENGTH),
    "skywork": Method("skywork", {f"{_CONTROLLER}.step": 0.01, f"{_CONTROLLER}.high": 1.0}, target=0.2),
    "steer": Method("steer", {"weights.least": 0.02}),
    "tea": Method("tea", {"regularisers.scale": 0.2}),
    "ter": Method("ter", {"regularisers.coefficient": 0.2}, {"transformer": {"regularisers.target": 0.3}}, target=0.55),
}


def all_methods() -> dict[str, Method]:
    """Every method by its name, plain GRPO first; ``-here`` has the numbers for tasks of this size."""
    configs = [name for name in packaged_configs() if name.startswith(_FOLDER)]
    fragments = [name.removeprefix(_FOLDER).removesuffix(".yaml") for name in configs]
    order = [BASELINE, *sorted(name for name in fragments if name != BASELINE)]
    methods: dict[str, Method] = {}
    for name in order:
        methods[name] = _CHANGED.get(name, Method(name))
        if name in _LARGER:
            methods[f"{name}-here"] = _LARGER[name]
    return methods


@functools.cache
def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    return parser


def build(method: Method, task: str, options: Options) -> RLVR:
    """The model of a method: the task's options, the fragment over them, and what is changed in it."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.yaml"
        base.write_text(json.dumps({"model": {"class_path": "RLVR", "init_args": dict(options)}}))
        words = ["--config", str(base), "--config", str(find_config(f"{_FOLDER}{method.fragment}.yaml"))]
        for name, value in method.changes(task).items():
            words += [f"--model.{name}", json.dumps(value)]
        model = _parser().instantiate_classes(_parser().parse_args(words)).model
    assert isinstance(model, RLVR)
    return model


def described(methods: Mapping[str, Method], task: str) -> dict[str, dict[str, Any]]:
    """What tables need to know of the methods at a task."""
    found = {}
    for name, method in methods.items():
        changes = method.changes(task)
        target = next((value for key, value in changes.items() if key.endswith(".target")), method.target)
        found[name] = {"fragment": method.fragment, "changes": changes, "target": target}
    return found
