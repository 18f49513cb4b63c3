"""Renders a chat by a Jinja template, and says which letters of the text the assistant says.

A template with {% generation %} marks them itself. For others they are found by rendering (`anchors.py`).
"""

import datetime
import re
from pathlib import Path
from typing import Any

from drumline.data.chats.anchors import Span, assistant_spans
from drumline.data.chats.messages import Chat, Message
from drumline.errors import DataError

BUILTIN = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
"""Templates by name, for tokenizers that have none."""

TODAY = datetime.datetime(2024, 7, 26)
"""The date that templates print, so that the same data are the same rows on any day."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A chat template; `variables`: what it sees beside the messages, such as the tokens' names."""

    def __init__(self, text: str, variables: dict[str, Any], origin: str) -> None:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._origin = origin
        self._is_marked = _MARKED.search(text) is not None
        try:
            self._compiled: Any = _compile_jinja_template(text)
        except TemplateError as error:
            raise DataError(f"data.chat_template: {origin}: {error}") from None
        self._variables = {
            "date_string": TODAY.strftime("%d %b %Y"),
            **variables,
            "strftime_now": TODAY.strftime,
        }

    def text_of(self, chat: Chat) -> tuple[str, list[Span]]:
        """The text, and for each of the assistant's messages the letters that it says, its end included.

        DataError where these cannot be told.
        """
        turns = [n for n, one in enumerate(chat.messages) if one["role"] == "assistant"]
        if self._is_marked:
            text, spans = self._marked(chat)
            if len(spans) != len(turns):
                raise DataError(
                    f"the chat template marks {len(spans)} of the assistant's {len(turns)} messages"
                )
            return text, spans

        def render(messages: list[Message], is_asked: bool = False) -> str:
            return self._render(messages, chat.tools, is_asked)

        return assistant_spans(render, chat.messages, [n for n in turns if chat.trained[n]])

    def _marked(self, chat: Chat) -> tuple[str, list[Span]]:
        pieces: list[str] = []
        spans: list[Span] = []
        with self._compiled.environment.activate_tracker(pieces, spans):
            text = self._render(chat.messages, chat.tools, pieces=pieces)
        return text, [(start, end) for start, end in spans if text[start:end].strip()]

    def _render(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        is_asked: bool = False,
        pieces: list[str] | None = None,
    ) -> str:
        from jinja2 import TemplateError

        given = {"messages": messages, "tools": tools, "add_generation_prompt": is_asked}
        collected = [] if pieces is None else pieces
        try:
            for piece in self._compiled.generate(**self._variables, **given):
                collected.append(piece)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"the chat template refuses it: {first[:200]}") from None
        return "".join(collected)


def find_template(
    stated: str | None, of_tokenizer: str | None, variables: dict[str, Any]
) -> ChatTemplate:
    """The template that the recipe states, by name or file, or else the tokenizer's own.

    DataError where there is none.
    """
    if stated in BUILTIN:
        return ChatTemplate(BUILTIN[stated], variables, stated)
    if stated is not None:
        try:
            text = Path(stated).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template: {stated}: {error}") from None
        return ChatTemplate(text, variables, stated)
    if of_tokenizer is None:
        raise DataError(
            "data.chat_template: the tokenizer has no chat template. Nearest: data.chat_template=chatml, or "
            "a file with the one that the model is to learn"
        )
    return ChatTemplate(of_tokenizer, variables, "the tokenizer's")


def save_template(stated: str, target: Path) -> None:
    """Write the template of a recipe, a name or a file, where transformers finds an exported model's."""
    text = BUILTIN.get(stated) or Path(stated).read_text(encoding="utf-8")
    (target / "chat_template.json").unlink(missing_ok=True)
    (target / "chat_template.jinja").write_text(text, encoding="utf-8")
