"""What QEMU's monitor says, read with suspicion. Pure.

One line is one JSON object: an event (`event`, `data`) or an answer (`return` or `error`, and the
`id` of the command if it had one). A guest that has broken into its QEMU can say anything here, so
everything the connection looks at is judged before it is looked at.

Source: QEMU's docs/interop/qmp-spec.rst.
"""

import json
from typing import Any


def parse_message(line: bytes) -> dict[str, Any]:
    """Return the event or answer that `line` spells. Raises ValueError when it is neither."""
    message = parse_object(line)
    if "event" in message:
        if not isinstance(message["event"], str) or not isinstance(message.get("data", {}), dict):
            raise ValueError("an event without a name, or with data that is no object")
        return message
    if not isinstance(message.get("id"), int | str | None):
        raise ValueError("an id that is neither a number nor a word")  # noqa: TRY004 - as below
    if "return" not in message and not isinstance(message.get("error"), dict):
        raise ValueError("neither an event nor an answer")
    return message


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object that `line` spells. Raises ValueError."""
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("JSON that is no object")  # noqa: TRY004 - the line is bad, not a type
    return message
