"""Rows of the styles that chat data are kept in, as lists of messages that templates take.

openai    a list of {role, content}, with tool_calls and tools where there are some
sharegpt  a list of {from, value}, whose roles are human, gpt, system, tool
alpaca    instruction, input and output; history: earlier pairs of both
pair      prompt and completion, each a list of messages
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from drumline.data.tasks.base import Row, field_of
from drumline.errors import DataError
from drumline.recipe.data_section import Data

Message = dict[str, Any]
Style = Literal["openai", "sharegpt", "alpaca", "pair"]

_LISTS = ("messages", "conversations", "conversation")
"""Columns that hold a chat where the recipe does not name one."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "chatgpt": "assistant", "system": "system", "tool": "tool", "observation": "tool",
          "function_response": "tool"}  # fmt: skip
"""ShareGPT's names of roles."""
PLACE = "\ue0ff"
"""The letter that stands for an image in a message's text."""
OWN_IMAGES = f"images {PLACE}"
"""Of a message, until the chat has them: the bytes of its own images, None for one of the row's column."""
_KNOWN = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Chat:
    """One conversation. `trained`: of each message, whether it may be trained, were it the assistant's.

    `images`: the bytes of the files that stand in the messages' texts as `PLACE`, in order.
    """

    messages: list[Message]
    tools: list[Any] | None
    trained: list[bool]
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class ChatFormat:
    """The style of all rows of a source, and the column that holds the list of messages, if there is one."""

    style: Style
    column: str = ""

    @property
    def words(self) -> str:
        """The style and its columns, for the output."""
        columns = {"alpaca": "instruction, input, output", "pair": "prompt and completion"}
        return f"{self.style} ({columns.get(self.style, self.column)})"


def recognise(first: Row, data: Data) -> ChatFormat | None:
    """The style of the first row; None for a plain prompt and completion.

    DataError where the recipe names a column that holds no chat.
    """
    if data.messages_field is not None:
        style = _style_of(field_of(first, data.messages_field)[1])
        if style is None:
            raise DataError(
                f"data.messages_field: column {data.messages_field!r} holds no list of messages "
                f"({{role, content}} or {{from, value}}); this row has: {', '.join(map(str, first))}"
            )
        return ChatFormat(style, data.messages_field)
    pair = [field_of(first, name)[1] for name in (data.prompt_field, data.completion_field)]
    if all(_style_of(value) == "openai" for value in pair):
        return ChatFormat("pair")
    if all(value is not None for value in pair):
        return None
    for column in _LISTS:
        style = _style_of(first.get(column))
        if style:
            return ChatFormat(style, column)
    if "instruction" in first and "output" in first:
        return ChatFormat("alpaca")
    return None


def chat_of(row: Row, form: ChatFormat, data: Data) -> Chat:
    """The messages of a row; DataError says which of them is wrong, and how."""
    messages = _READERS[form.style](row, form, data)
    system = row.get("system")
    has_none = not messages or messages[0]["role"] != "system"
    if isinstance(system, str) and system.strip() and has_none:
        messages.insert(0, {"role": "system", "content": system})
    if messages and messages[0]["role"] == "system" and not str(messages[0]["content"]).strip():
        messages = messages[1:]
    trained = [_is_trained(message, place) for place, message in enumerate(messages, start=1)]
    _check_order(messages)
    if form.style == "pair":
        first = len(field_of(row, data.prompt_field)[1])
        begins = len(messages) - len(field_of(row, data.completion_field)[1])
        assert begins <= first + 1
        trained = [allowed and place >= begins for place, allowed in enumerate(trained)]
    chat = Chat(messages, _tools(row), trained)
    if not data.is_chat_with_images:
        _refuse_images(messages)
    return chat


def _refuse_images(messages: list[Message]) -> None:
    """DataError where a message has an image, and the model reads texts only."""
    number = next((n for n, one in enumerate(messages, 1) if OWN_IMAGES in one), None)
    if number:
        raise DataError(
            f"message {number} ({messages[number - 1]['role']}): an image is no text. Nearest: "
            "data.image={processor: ...}, of a model that reads both, in task sft"
        )


def find_chat(row: Row, data: Data) -> str:
    """The column that holds a list of messages, of the recipe or of those of public data; "" if none does."""
    named = (data.messages_field,) if data.messages_field else _LISTS
    return next((name for name in named if _style_of(field_of(row, name)[1])), "")


def messages_in(value: Any, column: str) -> list[Message]:
    """The messages of a list of either style, as {role, content}; DataError for anything else."""
    style = _style_of(value)
    if style is None:
        raise DataError(f"{column}: {type(value).__name__} {value!r:.60} is no list of messages")
    read = _message if style == "openai" else _from_sharegpt
    found = [read(one, number) for number, one in enumerate(value, start=1)]
    _refuse_images(found)
    return found


def _style_of(value: Any) -> Style | None:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    if "role" in value[0]:
        return "openai"
    return "sharegpt" if "from" in value[0] else None


def _listed(row: Row, column: str, form: ChatFormat) -> list[Message]:
    _, value = field_of(row, column)
    if isinstance(value, list) and not value:
        raise DataError(f"{column}: no messages")
    style = _style_of(value)
    wanted = "openai" if form.style == "pair" else form.style
    if style != wanted:
        found = f"{style} style" if style else f"{type(value).__name__} {value!r:.60}"
        raise DataError(f"{column}: {found}, and the first row has {form.style} style")
    return list(value)


def _openai(row: Row, form: ChatFormat, data: Data) -> list[Message]:
    return [_message(one, n) for n, one in enumerate(_listed(row, form.column, form), start=1)]


def _pair(row: Row, form: ChatFormat, data: Data) -> list[Message]:
    both = _listed(row, data.prompt_field, form) + _listed(row, data.completion_field, form)
    return [_message(one, n) for n, one in enumerate(both, start=1)]


def _sharegpt(row: Row, form: ChatFormat, data: Data) -> list[Message]:
    listed = _listed(row, form.column, form)
    return [_from_sharegpt(one, number) for number, one in enumerate(listed, start=1)]


def _from_sharegpt(one: Any, number: int) -> Message:
    role = _ROLES.get(str(one.get("from")).lower()) if isinstance(one, dict) else None
    if role is None:
        said = one.get("from") if isinstance(one, dict) else one
        raise DataError(f"message {number}: from {said!r:.60} is none of {', '.join(_ROLES)}")
    rest = {k: v for k, v in one.items() if k not in ("from", "value") and v is not None}
    return _message({**rest, "role": role, "content": one.get("value")}, number)


def _alpaca(row: Row, form: ChatFormat, data: Data) -> list[Message]:
    texts: dict[str, str] = {}
    for name in ("instruction", "input", "output"):
        value = row.get(name)
        if value is None and name == "input":
            value = ""
        if not isinstance(value, str):
            raise DataError(f"{name}: no text; it holds {type(value).__name__} {value!r:.60}")
        texts[name] = value
    asked = texts["instruction"]
    if texts["input"].strip():
        asked = f"{asked}\n{texts['input']}" if asked.strip() else texts["input"]
    found: list[Message] = []
    for pair in row.get("history") or []:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(p, str) for p in pair)
        ):
            raise DataError(f"history: {pair!r:.60} is no pair of a question and an answer")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    found += [{"role": "user", "content": asked}, {"role": "assistant", "content": texts["output"]}]
    for number, message in enumerate(found, start=1):
        _message(message, number)
    return found


_READERS: dict[Style, Callable[[Row, ChatFormat, Data], list[Message]]] = {
    "openai": _openai,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "pair": _pair,
}


def _message(one: Any, number: int) -> Message:
    """A message with text content, in which images are `PLACE`; DataError for an unknown role, or without."""
    if not isinstance(one, dict):
        raise DataError(f"message {number}: {one!r:.60} is no message")
    role = one.get("role")
    if role not in _KNOWN:
        raise DataError(f"message {number}: role {role!r:.60} is none of {', '.join(_KNOWN)}")
    found = {key: value for key, value in one.items() if value is not None}
    content = found.get("content")
    if isinstance(content, list):
        others = [
            part
            for part in content
            if not isinstance(part, dict) or part.get("type") not in ("text", "image")
        ]
        if others:
            raise DataError(f"message {number} ({role}): {others[0]!r:.60} is no text")
        images = [
            part.get("image", part.get("index")) for part in content if part["type"] == "image"
        ]
        if images:
            found[OWN_IMAGES] = images
        content = found["content"] = "".join(
            PLACE if part["type"] == "image" else _text_in(part, number) for part in content
        )
    calls = found.get("tool_calls")
    if content is None and calls:
        content = found["content"] = ""
    if not isinstance(content, str):
        raise DataError(f"message {number} ({role}): no content")
    if not content.strip() and not calls and role not in ("system", "tool"):
        raise DataError(f"message {number} ({role}): its content is empty")
    if calls:
        found["tool_calls"] = [_call(call, number) for call in calls]
    return found


def _text_in(part: Message, number: int) -> str:
    text = part.get("text")
    if not isinstance(text, str):
        raise DataError(f"message {number}: a part of type text holds {text!r:.40}")
    return text


def _call(call: Any, number: int) -> Any:
    """A call of a tool; its arguments as a mapping, which templates write as JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise DataError(
            f"message {number} (assistant): tool call {call!r:.60} has no function's name"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise DataError(
                f"message {number} (assistant): arguments {arguments!r:.60} are not JSON"
            ) from None
    return {**call, "type": "function", "function": {**function, "arguments": arguments or {}}}


def _is_trained(message: Message, place: int) -> bool:
    """What the message itself says of its weight in the loss: 0 or 1, as in OpenAI's data."""
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"message {place}: weight {weight!r:.20} is neither 0 nor 1")
    return bool(weight)


def _check_order(messages: list[Message]) -> None:
    """DataError unless user and assistant take turns, beginning with the user and ending with the assistant.

    A system message may come first; a tool answers between two messages of the assistant.
    """
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        allowed = {
            "": ("system", "developer", "user"),
            "system": ("user",),
            "developer": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant"),
        }[before]
        if role not in allowed:
            after = f"after the {before}'s" if before else "at the beginning"
            raise DataError(
                f"message {number}: a message of the {role} {after}; expected {' or '.join(allowed)}"
            )
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("the assistant never speaks")
    if before != "assistant":
        raise DataError(f"the last message is the {before}'s, and nothing answers it")


def _tools(row: Row) -> list[Any] | None:
    """The tools that a row offers, from a column `tools`: a list, or its JSON."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DataError(f"tools: {tools!r:.60} is not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise DataError(f"tools: {tools!r:.60} is no list of functions")
    return tools
