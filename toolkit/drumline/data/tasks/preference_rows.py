"""Rows of preferences, in the styles that public data sets keep them, as prompts and completions.

pairs     chosen and rejected: texts, or chats; the prompt stands in a column, or both begin with it
labelled  one completion, and whether it is desirable: prompt, completion and label, or messages and label
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drumline.data.chats.messages import Message, find_chat, messages_in
from drumline.data.tasks.base import Row, field_of, text_field
from drumline.errors import DataError
from drumline.recipe.data_section import Data

PROMPT, COMPLETION = "prompt", "completion"
"""Fields of the rows that are returned."""

_PASSED_ON = ("system", "tools")
"""Columns that a chat template sees."""


@dataclass(frozen=True)
class PreferenceForm:
    """How all rows of a source are written. `chats`: whether completions are lists of messages.

    `prompt`: where the prompt stands: in a column (its name), or "" where it is what the completions begin
    with. `is_repeated`: the prompt stands in a column, and the completions begin with it. `chat`: of labelled
    rows, the column with the whole chat, or "".
    """

    is_paired: bool
    chats: bool
    prompt: str
    chat: str = ""
    is_repeated: bool = False

    @property
    def words(self) -> str:
        """What the rows were recognised as, for people."""
        kind = "chats" if self.chats else "texts"
        if self.chat:
            return f"labelled chats ({self.chat})"
        if not self.is_paired:
            return f"labelled {kind} ({self.prompt} and completion)"
        where = f"prompt in {self.prompt}" if self.prompt else "prompt within both"
        return f"pairs of {kind} ({where})"


def recognise_preference(first: Row, data: Data) -> PreferenceForm:
    """How the rows are written, by the first one; DataError where it holds no preference."""
    has, chosen = field_of(first, data.chosen_field)
    has_other, rejected = field_of(first, data.rejected_field)
    if has and has_other:
        return _paired(first, chosen, rejected, data)
    has_label, _ = field_of(first, data.label_field)
    has_completion, completion = field_of(first, data.completion_field)
    if has_label and has_completion:
        return PreferenceForm(False, isinstance(completion, list | dict), data.prompt_field)
    column = find_chat(first, data)
    if has_label and column:
        return PreferenceForm(False, True, "", column)
    raise DataError(
        f"data: a row of preferences has {data.chosen_field} and {data.rejected_field}, or "
        f"{data.prompt_field}, {data.completion_field} and {data.label_field}; this row has: "
        f"{', '.join(map(str, first)) or 'no columns'}"
    )


def _paired(first: Row, chosen: Any, rejected: Any, data: Data) -> PreferenceForm:
    is_chat = isinstance(chosen, list | dict)
    has_prompt, prompt = field_of(first, data.prompt_field)
    if not is_chat:
        texts = (chosen, rejected, prompt)
        is_within = all(isinstance(one, str) for one in texts) and _begin_with(prompt, texts[:2])
        where = data.prompt_field if has_prompt and not is_within else ""
        return PreferenceForm(True, False, where, is_repeated=is_within)
    whole = messages_in([chosen] if isinstance(chosen, dict) else chosen, data.chosen_field)
    if whole[0]["role"] != "assistant":
        _refuse_other_prompt(whole, prompt, data)
        return PreferenceForm(True, True, "")
    column = data.prompt_field if has_prompt and prompt else find_chat(first, data)
    if not column:
        raise DataError(
            f"data: {data.chosen_field} holds only the assistant's messages, and there is no column "
            f"{data.prompt_field!r}. This row has: {', '.join(map(str, first))}"
        )
    return PreferenceForm(True, True, column)


def _refuse_other_prompt(whole: list[Message], prompt: Any, data: Data) -> None:
    """DataError where a whole chat has a prompt beside it that is not the one in it."""
    if isinstance(prompt, str):
        is_in_it = not prompt or any(one["content"].strip() == prompt.strip() for one in whole)
    else:
        messages = messages_in(prompt, data.prompt_field) if prompt else []
        is_in_it = whole[: len(messages)] == messages
    if not is_in_it:
        raise DataError(
            f"data: {data.chosen_field} is a whole chat, in which the {data.prompt_field} beside it does not "
            f"occur. Nearest: rows without {data.prompt_field}, or with completions alone"
        )


def completions_of(row: Row, form: PreferenceForm, data: Data) -> list[Row]:
    """Rows of a prompt and a completion: the chosen one and the rejected one, or the only one.

    Both are texts, or both lists of messages. DataError where the row is not written as the first one is.
    """
    rest = {name: row[name] for name in _PASSED_ON if name in row}
    if not form.chats and rest.get("system"):
        raise DataError(
            "data: system: the rows are texts, which no chat template puts a system message before. Nearest: "
            f"put it at the beginning of {data.prompt_field}, or write the rows as chats"
        )
    split = _SPLITTERS[form.is_paired, form.chats]
    return [
        {PROMPT: prompt, COMPLETION: completion, **rest}
        for prompt, completion in split(row, form, data)
    ]


def is_desirable(row: Row, data: Data) -> bool:
    """Whether the label says that the completion is desirable; DataError where it says neither."""
    value = field_of(row, data.label_field)[1]
    plain = value.strip().lower() if isinstance(value, str) else value
    for answer, words in ((True, (True, 1, "true", "1")), (False, (False, 0, "false", "0"))):
        if plain in words:
            return answer
    raise DataError(
        f"data.label_field: {data.label_field}: {value!r:.40} is neither true nor false"
    )


def _texts_of_pair(row: Row, form: PreferenceForm, data: Data) -> list[tuple[Any, Any]]:
    both = [
        text_field(row, data.chosen_field, "chosen_field"),
        text_field(row, data.rejected_field, "rejected_field"),
    ]
    if form.prompt:
        prompt = text_field(row, form.prompt, "prompt_field")
        if len(prompt.split()) > 1 and _begin_with(prompt, both):  # one word may be a coincidence
            raise DataError(
                f"data.prompt_field: {data.prompt_field}: both texts begin with it, and those of the "
                "first row do not. Nearest: write all rows one way"
            )
        return [(prompt, text) for text in both]
    given = field_of(row, data.prompt_field)[1]
    if form.is_repeated and not given:
        raise DataError(
            f"data.prompt_field: {data.prompt_field} is empty, and the first row has one. Nearest: write all "
            "rows one way"
        )
    if isinstance(given, str) and given and not _begin_with(given, both):
        raise DataError(
            f"data.prompt_field: {data.prompt_field}: the first row's texts begin with their prompt, and "
            "these do not"
        )
    begin = given or _common_words(*both)
    return [(begin, text[len(begin) :]) for text in both]


def _begin_with(prompt: str, texts: Any) -> bool:
    return bool(prompt) and all(text.startswith(prompt) for text in texts)


def _common_words(one: str, other: str) -> str:
    """What two texts begin with, up to the end of a word: its first letters alone are no prompt.

    Spaces at the end belong to the completions, with which they are tokenised.
    """
    pairs = zip(one, other, strict=False)
    common = one[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]
    is_at_a_word = common[-1:].isspace() and len(common) < min(len(one), len(other))
    end = len(common) if is_at_a_word else 1 + max(common.rfind(space) for space in " \n\t")
    return common[:end].rstrip(" ")


def _chats_of_pair(row: Row, form: PreferenceForm, data: Data) -> list[tuple[Any, Any]]:
    both = [_chat(row, name) for name in (data.chosen_field, data.rejected_field)]
    if form.prompt:
        prompt = _prompt(row, form.prompt)
        return [(prompt, answers) for answers in both]
    same = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*both, strict=False))
    )
    same = min(same, *(len(chat) - 1 for chat in both))
    if same < 1:
        raise DataError(
            f"{data.chosen_field} and {data.rejected_field} do not begin with the same message"
        )
    return [(chat[:same], chat[same:]) for chat in both]


def _labelled_texts(row: Row, form: PreferenceForm, data: Data) -> list[tuple[Any, Any]]:
    return [
        (
            text_field(row, data.prompt_field, "prompt_field"),
            text_field(row, data.completion_field, "completion_field"),
        )
    ]


def _labelled_chats(row: Row, form: PreferenceForm, data: Data) -> list[tuple[Any, Any]]:
    if not form.chat:
        return [(_prompt(row, form.prompt), _chat(row, data.completion_field))]
    chat = _chat(row, form.chat)
    if len(chat) < 2:
        raise DataError(f"{form.chat}: a prompt and a completion are two messages at least")
    return [(chat[:-1], chat[-1:])]


_SPLITTERS: dict[
    tuple[bool, bool], Callable[[Row, PreferenceForm, Data], list[tuple[Any, Any]]]
] = {
    (True, False): _texts_of_pair,
    (True, True): _chats_of_pair,
    (False, False): _labelled_texts,
    (False, True): _labelled_chats,
}


def _chat(row: Row, column: str) -> list[Message]:
    """A column's messages: a list of them, or only one."""
    value = field_of(row, column)[1]
    return messages_in([value] if isinstance(value, dict) else value, column)


def _prompt(row: Row, column: str) -> list[Message]:
    """The messages before the completion; a text is what the user says."""
    value = field_of(row, column)[1]
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return _chat(row, column)
