"""What the collapse detector says: alarms, and which of its findings are news."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

__all__ = ["CRITICAL", "WARN", "Alarm", "AlarmBook", "Finding"]

WARN: Literal[1] = 1
CRITICAL: Literal[2] = 2


@dataclass(frozen=True)
class Alarm:
    """One alarm.

    Attributes:
        step: optimiser step whose numbers raised it, counted from 0 as in the logs.
        level: 1, a warning: it looks like the beginning of a collapse; 2, critical: it is one, and learning suffers.
        rule: name of the rule.
        layer: index or name of the layer, or None if the rule is not about one.
        head: index of the (query) head that shows it most, or None.
        message: one sentence that says why.
    """

    step: int
    level: int
    rule: str
    layer: int | str | None
    head: int | None
    message: str


class Finding(NamedTuple):
    """What a rule finds to be so at the moment; it becomes an alarm when it is new or worse than before."""

    rule: str
    level: int
    layer: int | str | None
    head: int | None
    message: str


class AlarmBook:
    """Keeps the alarms, and raises one for each finding that is new or has become worse.

    Example::

        >>> book = AlarmBook()
        >>> finding = Finding("loss_spike", WARN, None, None, "the loss is 9, up from 2")
        >>> [alarm.step for step in (10, 11) for alarm in book.update(step, "loss_spike", [finding])]
        [10]
        >>> book.level
        1
        >>> book.update(12, "loss_spike", []), book.level
        ([], 0)
    """

    def __init__(self) -> None:
        self.alarms: list[Alarm] = []
        self._levels: dict[tuple[str, int | str | None], int] = {}

    @property
    def level(self) -> int:
        """The highest level of all present findings: 0 if there are none."""
        return max(self._levels.values(), default=0)

    def update(self, step: int, rule: str, findings: Iterable[Finding]) -> list[Alarm]:
        """Take all present findings of one rule; return the alarms that they raise.

        Args:
            step: optimiser step of the findings.
            rule: name of the rule; what it found before and does not find now is over.
            findings: at most one for a layer.
        """
        before = {key: level for key, level in self._levels.items() if key[0] == rule}
        self._levels = {key: level for key, level in self._levels.items() if key not in before}
        raised = []
        for finding in findings:
            key = (rule, finding.layer)
            self._levels[key] = finding.level
            if finding.level > before.get(key, 0):
                raised.append(Alarm(step, finding.level, rule, finding.layer, finding.head, finding.message))
        self.alarms += raised
        return raised

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain lists and numbers."""
        return {
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "levels": [[*key, level] for key, level in self._levels.items()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.alarms = [Alarm(**alarm) for alarm in state_dict["alarms"]]
        self._levels = {(rule, layer): level for rule, layer, level in state_dict["levels"]}
