"""What a training document can be: plain text, a conversation, or a prompt with its completion."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Documents", "Kind", "collect", "document_text", "parse_record"]

Kind = Literal["text", "messages", "prompt_completion"]

_EXPECTED = "`messages`, or `prompt` and `completion`"


@dataclass(frozen=True)
class Documents:
    """Documents of one kind.

    Args:
        kind: what each of them is.
        items: ``str`` for text, ``[{"role": ..., "content": ...}, ...]`` for messages, ``(prompt, completion)`` else.
    """

    kind: Kind
    items: Sequence[Any]

    def __len__(self) -> int:
        return len(self.items)


def parse_record(value: object, where: str, text_column: str = "text") -> tuple[Kind, Any]:
    """Find out what a record is, and check it.

    Args:
        value: a record as read from a file.
        where: its place, for errors.
        text_column: name of the field that holds plain text.

    Returns:
        Kind and item, as in ``Documents``.

    Raises:
        ValueError: if the record is of no kind, of two kinds, or malformed.

    Example::

        >>> parse_record({"prompt": "1 + 1 =", "completion": " 2"}, "sums.jsonl, line 1")
        ('prompt_completion', ('1 + 1 =', ' 2'))
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with named fields, found {type(value).__name__}.")
    kinds: list[Kind] = []
    if text_column in value:
        kinds.append("text")
    if "messages" in value:
        kinds.append("messages")
    if "prompt" in value and "completion" in value:
        kinds.append("prompt_completion")
    if not kinds:
        fields = ", ".join(f"`{name}`" for name in value) or "none"
        raise ValueError(
            f"{where}: expected the field `{text_column}` (another name: set `text_column`), {_EXPECTED};"
            f" the record's fields are: {fields}."
        )
    if len(kinds) > 1:
        raise ValueError(
            f"{where}: the record mixes {' and '.join(kinds)}, so it is unclear what to learn; leave one of them."
        )
    kind = kinds[0]
    if kind == "messages":
        return kind, _parse_messages(value["messages"], where)
    names = [text_column] if kind == "text" else ["prompt", "completion"]
    for name in names:
        if not isinstance(value[name], str):
            raise ValueError(f"{where}: `{name}` should be text, but is {type(value[name]).__name__}.")
    return kind, value[text_column] if kind == "text" else (value["prompt"], value["completion"])


def _parse_messages(messages: object, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: `messages` should be a list of at least one message.")
    for number, message in enumerate(messages, 1):
        fine = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fine:
            raise ValueError(f"{where}: message {number} should have the texts `role` and `content`.")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: there is nothing to learn, because no message has the role `assistant`.")
    return messages


def collect(records: Iterable[tuple[Kind, Any, str]]) -> Documents:
    """Gather records into documents; empty texts are left out.

    Args:
        records: kind, item and place of each.

    Raises:
        ValueError: if two records are of different kinds.
    """
    items: list[Any] = []
    first: tuple[Kind, str] | None = None
    for kind, item, where in records:
        if kind == "text" and not item.strip():
            continue
        first = first or (kind, where)
        if kind != first[0]:
            raise ValueError(
                f"{where} is a record of {kind}, but {first[1]} is one of {first[0]}; train on one kind at a time."
            )
        items.append(item)
    return Documents(first[0] if first else "text", items)


def document_text(kind: Kind, item: Any) -> str:
    """All words of a document, to measure its size or to train a tokenizer on."""
    if kind == "text":
        return item
    return "\n".join(_parts(kind, item))


def _parts(kind: Kind, item: Any) -> Iterator[str]:
    yield from (message["content"] for message in item) if kind == "messages" else item
