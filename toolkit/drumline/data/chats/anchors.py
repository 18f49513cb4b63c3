"""Finds what the assistant says in a rendered chat, for templates that do not mark it.

The whole chat is rendered once. Each message is then rendered twice more with other contents: the letters
that change are its own. Between the message before and these stands the header, which is the text that the
template writes to ask for an answer; what follows it is the assistant's, up to the end of its turn, which is
the first token after the last message.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

from drumline.errors import DataError

Message = dict[str, Any]
Render = Callable[..., str]
Span = tuple[int, int]
"""First letter and end of what one message of the assistant says, its end of turn included."""

_FILLS = ("Q\ue000", "Z\ue001")
_TOKEN = re.compile(r"<[^<>\s]{1,60}>|[<\[]\|?[^\s<>\[\]]{1,40}\|?[>\]]|.", re.DOTALL)
"""A special token as templates write them, or a letter."""


def assistant_spans(
    render: Render, messages: list[Message], asked: list[int]
) -> tuple[str, list[Span]]:
    """The text of the chat, and the spans of the assistant's messages, with (0, 0) for those not asked.

    `render(messages, is_asked)`: the template's text, with the request for an answer. DataError where a
    message does not reach the text as it is, or where its beginning or end cannot be told.
    """
    whole = render(messages)
    cores = [_core(render, messages, number, whole) for number in range(len(messages))]
    last = cores[-1]
    end_of_turn = _first_word(whole[last[1] :]) if last else ""
    spans: list[Span] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number not in asked:
            spans.append((0, 0))
            continue
        span = _span(render, messages, number, whole, cores, end_of_turn)
        _check_words(message, number, whole[slice(*span)])
        spans.append(span)
    return whole, spans


def _span(
    render: Render,
    messages: list[Message],
    number: int,
    whole: str,
    cores: list[Span | None],
    end_of_turn: str,
) -> Span:
    core = cores[number]
    if core is None:
        raise DataError(_of(number, "is not in the template's text", ""))
    before = max((one[1] for one in cores[:number] if one), default=0)
    following = [one[0] for one in cores[number + 1 :] if one]
    if before > core[0] or any(start < core[1] for start in following):
        raise DataError(_of(number, "changes the text of another message", ""))
    start = _start(render, messages[:number], whole, (before, core[0]), number)
    after = whole[core[1] : min(following, default=len(whole))]
    place = after.find(end_of_turn) if end_of_turn else -1
    if place < 0:
        raise DataError(_of(number, "has no end of its turn in the template's text", ""))
    return start, core[1] + place + len(end_of_turn)


def _core(render: Render, messages: list[Message], number: int, whole: str) -> Span | None:
    """The letters of the text that depend on a message's contents; None if there are none."""
    one, other = (
        render([*messages[:number], _filled(messages[number], fill), *messages[number + 1 :]])
        for fill in _FILLS
    )
    if one == other:
        return None
    start = min(_common(one, other), _common(one, whole), _common(other, whole))
    backwards = [text[::-1] for text in (one, other, whole)]
    end = len(whole) - min(
        _common(backwards[0], backwards[1]),
        _common(backwards[0], backwards[2]),
        _common(backwards[1], backwards[2]),
    )
    return start, max(start, end)


def _filled(message: Message, fill: str) -> Message:
    """The message with other words in all of its fields."""
    changed = copy.deepcopy(message)
    if isinstance(changed.get("content"), list):
        for part in changed["content"]:
            if part["type"] == "text" and part["text"].strip():
                part["text"] = fill
    elif changed.get("content", "").strip():
        changed["content"] = fill
    for name in ("reasoning_content", "thinking", "reasoning"):
        if changed.get(name):
            changed[name] = fill
    for call in changed.get("tool_calls") or []:
        call["function"] = {"name": fill, "arguments": {fill: fill}}
    return changed


def _start(
    render: Render, before: list[Message], whole: str, gap: tuple[int, int], number: int
) -> int:
    """Where a message begins: after the text that asks for it, which stands in the gap before its letters.

    A template that asks in no words has all that is before the message at the beginning of the text.
    """
    text = render(before)
    plain, asking = _tokens(text), _tokens(render(before, True))
    if plain == asking and whole.startswith(text) and gap[0] <= len(text) <= gap[1]:
        return len(text)
    prompt = asking[_common(plain, asking) :]
    found, best = _tokens(whole[slice(*gap)]), (0, 0)
    for place in range(
        len(found)
    ):  # the last place at which the longest beginning of the prompt stands
        length = _common(found[place:], prompt)
        if length and length >= best[1]:
            best = place, length
    if not best[1] or len("".join(prompt[: best[1]]).strip()) == 0:
        raise DataError(_of(number, "has no header in the template's text", ""))
    return gap[0] + len("".join(found[: sum(best)]))


def _check_words(message: Message, number: int, said: str) -> None:
    """DataError where the template leaves out or rewrites what the assistant says, such as its thoughts."""
    for name in ("content", "reasoning_content", "thinking", "reasoning"):
        words = message.get(name)
        if isinstance(words, list):  # an assistant's has one part
            words = "".join(part["text"] for part in words)
        if isinstance(words, str) and words.strip() and words.strip() not in said:
            what = f"reaches the template's text with another {name} than it has"
            raise DataError(_of(number, what, ", or data.train_on=last_assistant"))
    for call in message.get("tool_calls") or []:
        if call["function"]["name"] not in said:
            raise DataError(_of(number, "loses its tool calls in the template's text", ""))


def _of(number: int, what: str, more: str) -> str:
    return (
        f"message {number + 1} (assistant) {what}, so what is trained cannot be told. Nearest: "
        f"data.chat_template=FILE, a template that marks it with {{% generation %}}{more}"
    )


def _first_word(text: str) -> str:
    """The first token that is not blank, or the letters up to a space where that is a letter; "" for none."""
    found = _tokens(text.lstrip())
    if not found or len(found[0]) > 1:
        return found[0] if found else ""
    return text.split()[0]


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _common(one: Any, other: Any) -> int:
    """Length of the common beginning."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
