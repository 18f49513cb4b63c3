"""Text to token ids: UTF-8 bytes, or any transformers tokenizer."""

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import MaskFacts
from drumline.errors import DataError

Tokens = NDArray[np.uint32]


Bos = Literal["auto"] | bool
"""Whether texts begin with the tokenizer's begin token: as it does by itself, always, or never."""


Offsets = NDArray[np.int64]


@dataclass(frozen=True)
class ChatFacts:
    """The tokenizer's own chat template, if it has one, and the names of its special tokens.

    `variables`: as templates see them, such as eos_token. `specials`: all of them.
    """

    template: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    specials: tuple[str, ...] = ()


Request = tuple[Any, ...]
"""The name of a tokenizer's method, and its arguments."""


class EncodedRow(NamedTuple):
    """The tokens of a row with labels: whether they were cut, and the first one of the second text.

    `second` is None where there is no second text, or the model is not told which text a token is of.
    """

    tokens: Tokens
    was_cut: bool
    second: int | None = None


class EncodedWords(NamedTuple):
    """The tokens of words, with special tokens around them; `firsts`: where each word begins, int32 [w].

    A word that was cut off, or that has no token, has none.
    """

    tokens: Tokens
    was_cut: bool
    firsts: NDArray[np.int32]


class Tokenizer(Protocol):
    """What `prepare` needs of a tokenizer; a text makes no special token unless the recipe says so.

    `vocabulary`: the largest id + 1. `end`: the id that ends a document, `begin` the one that texts begin
    with; None without one.
    """

    vocabulary: int
    fingerprint: str

    @property
    def masking(self) -> MaskFacts:
        """What a model that guesses masked tokens needs to know."""

    def encode_words(self, words: tuple[str, ...], most: int | None) -> EncodedWords:
        """Token ids of a row's words with the special tokens that the model expects, at most `most`."""
        ...

    @property
    def end(self) -> int | None:
        """The id of the end token."""

    @property
    def begin(self) -> int | None:
        """The id of the begin token."""

    def encode(self, text: str) -> Tokens:
        """Token ids of the text, without special tokens: uint32 [n]."""
        ...

    def encode_row(self, text: str, most: int | None, other: str | None = None) -> EncodedRow:
        """Token ids of a text, or of two, with the special tokens that the model expects, at most `most`."""
        ...

    def encode_pair(self, prompt: str, completion: str) -> tuple[Tokens, int]:
        """Token ids of both as one text, without special tokens, and how many of them are the prompt's."""
        ...

    def encode_offsets(self, text: str, bounds: tuple[int, ...]) -> tuple[Tokens, Offsets]:
        """Token ids of a text in which names of special tokens are these tokens, and where each stands.

        Offsets: first letter and end, int64 [n, 2]. No token crosses `bounds` where the tokenizer does not
        say where its tokens stand.
        """
        ...

    def decode(self, tokens: Tokens) -> str:
        """The text of these tokens, special ones by name."""
        ...

    @property
    def chat(self) -> ChatFacts:
        """What a chat template needs to know of the tokenizer."""


class ByteTokenizer:
    """One token per UTF-8 byte; token 256 ends a document."""

    vocabulary = 257
    end = 256
    begin = None
    fingerprint = "bytes"
    masking = MaskFacts(mask=257, specials=[256], before=None, after=256)

    def encode_words(self, words: tuple[str, ...], most: int | None) -> EncodedWords:
        """The bytes of the words with a space between them, as far as they fit."""
        parts = [self.encode(word if n == 0 else f" {word}") for n, word in enumerate(words)]
        whole = np.concatenate([np.zeros(0, np.uint32), *parts])
        sizes = np.array([len(part) for part in parts], dtype=np.int32)
        firsts = np.cumsum(sizes) - sizes + (np.arange(len(words)) > 0)
        tokens = whole[: most or len(whole)]
        firsts = np.where(firsts < len(tokens), firsts, -1)
        return EncodedWords(tokens, len(tokens) < len(whole), firsts.astype(np.int32))

    def encode(self, text: str) -> Tokens:
        """The text's UTF-8 bytes."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(
            np.uint32
        )

    def encode_row(self, text: str, most: int | None, other: str | None = None) -> EncodedRow:
        """The text's first bytes; before another text the end token."""
        whole = self.encode(text)
        if other is not None:
            whole = np.concatenate([whole, np.array([self.end], np.uint32), self.encode(other)])
        tokens = whole[: most or len(whole)]
        return EncodedRow(tokens, len(tokens) < len(whole))

    def encode_pair(self, prompt: str, completion: str) -> tuple[Tokens, int]:
        """The bytes of both."""
        first = self.encode(prompt)
        return np.concatenate([first, self.encode(completion)]), len(first)

    def encode_offsets(self, text: str, bounds: tuple[int, ...]) -> tuple[Tokens, Offsets]:
        """The text's bytes, and the letter that each is of."""
        widths = [len(letter.encode("utf-8", errors="replace")) for letter in text]
        first = np.repeat(np.arange(len(text), dtype=np.int64), widths)
        return self.encode(text), np.stack([first, first + 1], axis=1)

    def decode(self, tokens: Tokens) -> str:
        """The bytes as UTF-8; the end token by its name in an export."""
        parts = np.split(tokens, np.flatnonzero(tokens == self.end))
        texts = [part[part != self.end].astype(np.uint8).tobytes() for part in parts]
        return _END.join(text.decode("utf-8", errors="replace") for text in texts)

    @property
    def chat(self) -> ChatFacts:
        """No template and no special token."""
        return ChatFacts()


class HubTokenizer:
    """A transformers tokenizer, by hub name or folder; remote code is never trusted.

    `is_marked`: the names of special tokens in a text are these tokens; else they are text like any other.
    """

    def __init__(
        self, name: str, bos: Bos = "auto", needs_end: bool = True, is_marked: bool = False
    ) -> None:
        try:
            from transformers import AutoTokenizer

            self._inner: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise DataError(f"data.tokenizer: {name} cannot be loaded: {first}") from None
        self.made_of = (name, bos, needs_end, is_marked)
        self._splits = not is_marked
        self._spaced: Any = None
        inner = self._inner
        if needs_end and inner.eos_token_id is None:
            raise DataError(
                f"data.tokenizer: {name} has no end-of-text token, which packed rows and completions end with"
            )
        self.vocabulary = max(len(inner), 1 + max(inner.get_vocab().values(), default=0))
        self.end = None if inner.eos_token_id is None else int(inner.eos_token_id)
        self.begin = self._begin(name, bos)
        backend = getattr(inner, "backend_tokenizer", None)
        text = backend.to_str() if backend else repr(sorted(inner.get_vocab().items()))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def _begin(self, name: str, bos: Bos) -> int | None:
        begin = self._inner.bos_token_id
        if bos is True and begin is None:
            raise DataError(f"data.bos: {name} has no begin-of-text token. Nearest: data.bos=auto")
        if bos == "auto" and begin is not None:
            bos = self._inner("").input_ids[:1] == [begin]
        return int(begin) if bos is True else None

    @property
    def is_fast(self) -> bool:
        """Whether it tokenises many texts on all cores by itself, and says where tokens stand."""
        return bool(self._inner.is_fast)

    def answers(self, requests: list[Request]) -> list[Any]:
        """What its methods return, for many requests at a time; DataError for a text that is none."""
        for request in requests:
            refuse_surrogates(request)
        if not self.is_fast:
            return [getattr(self, method)(*arguments) for method, *arguments in requests]
        found: dict[int, Any] = {}
        kinds: dict[Request, list[int]] = {}
        for place, (method, *arguments) in enumerate(requests):
            kind: Request = (method,)
            if method == "encode_row":
                kind = (method, arguments[1], arguments[2] is not None)
            if method == "encode_words":
                kind = (method, arguments[1])
            kinds.setdefault(kind, []).append(place)
        for kind, places in kinds.items():
            asked = [requests[place] for place in places]
            found.update(zip(places, self._answers_of_a_kind(kind, asked), strict=True))
        return [found[place] for place in range(len(requests))]

    def _answers_of_a_kind(self, kind: Request, requests: list[Request]) -> list[Any]:
        """The same through the tokenizer's own batches, which do without lists of Python's numbers."""
        owner = self._of_words() if kind[0] == "encode_words" else self._inner
        inner = owner.backend_tokenizer
        inner.encode_special_tokens = self._splits
        inner.no_padding()
        inner.no_truncation()
        if kind == ("encode",):
            texts = [text for _, text in requests]
            return [_array(one) for one in inner.encode_batch_fast(texts, add_special_tokens=False)]
        if kind == ("encode_pair",):
            texts = [prompt + completion for _, prompt, completion in requests]
            whole = inner.encode_batch(texts, add_special_tokens=False)
            return [
                (_array(one), _tokens_until(len(prompt), one.offsets))
                for one, (_, prompt, _) in zip(whole, requests, strict=True)
            ]
        if kind == ("encode_offsets",):
            inner.encode_special_tokens = False
            texts = [text for _, text, _ in requests]
            found = inner.encode_batch(texts, add_special_tokens=False)
            return [(_array(one), np.array(one.offsets, np.int64).reshape(-1, 2)) for one in found]
        if kind[0] == "encode_words":
            if kind[1]:
                inner.enable_truncation(kind[1], direction=self._inner.truncation_side)
            lists = [list(words) for _, words, _ in requests]
            found = inner.encode_batch(lists, is_pretokenized=True, add_special_tokens=True)
            inner.no_truncation()
            return [_words_of(one, len(own)) for one, own in zip(found, lists, strict=True)]
        _, most, is_pair = kind
        rows = [(text, other) if is_pair else text for _, text, _, other in requests]
        if most:
            side = self._inner.truncation_side
            inner.enable_truncation(most, direction=side, strategy="longest_first")
        cut = inner.encode_batch(rows, add_special_tokens=True)
        inner.no_truncation()
        return [
            EncodedRow(_array(one), bool(one.overflowing), self._second(one.type_ids, is_pair))
            for one in cut
        ]

    def _second(self, types: list[int], is_pair: bool) -> int | None:
        """The first token of the second text, where the model is told which text a token is of."""
        if not is_pair or "token_type_ids" not in self._inner.model_input_names:
            return None
        first = types.index(1) if 1 in types else len(types)
        if types != [0] * first + [1] * (len(types) - first):
            raise DataError(
                "data.tokenizer: its tokens of two texts do not stand one after the other"
            )
        return first

    def _ids(self, text: str, **options: Any) -> Any:
        return self._inner(
            text,
            split_special_tokens=self._splits,
            return_attention_mask=False,
            verbose=False,
            **options,
        )

    def encode(self, text: str) -> Tokens:
        """Token ids without special tokens."""
        found = self._ids(text, add_special_tokens=False).input_ids
        return np.asarray(found, dtype=np.uint32)

    def encode_row(self, text: str, most: int | None, other: str | None = None) -> EncodedRow:
        """Token ids with special tokens, such as [CLS] and [SEP], which stay where the longer text is cut."""
        if other is not None and self.is_fast:  # which differs in empty texts from what is below
            answer: EncodedRow = self.answers([("encode_row", text, most, other)])[0]
            return answer
        pair = {} if other is None else {"text_pair": other}
        cut = {"truncation": "longest_first", "max_length": most} if most else {}
        found = self._ids(text, **pair, **cut)
        ids, types = found.input_ids, found.get("token_type_ids") or [0] * len(found.input_ids)
        is_full = most is not None and len(ids) == most
        was_cut = is_full and len(self._ids(text, **pair).input_ids) > len(ids)
        second = self._second(types, other is not None)
        return EncodedRow(np.asarray(ids, dtype=np.uint32), was_cut, second)

    def encode_pair(self, prompt: str, completion: str) -> tuple[Tokens, int]:
        """Token ids of both as one text; a token with letters of both is the completion's.

        A tokenizer that does not say where its tokens stand encodes them apart.
        """
        if not self._inner.is_fast:
            first = self.encode(prompt)
            return np.concatenate([first, self.encode(completion)]), len(first)
        found = self._ids(
            prompt + completion, add_special_tokens=False, return_offsets_mapping=True
        )
        of_prompt = _tokens_until(len(prompt), found.offset_mapping)
        return np.asarray(found.input_ids, dtype=np.uint32), of_prompt

    def encode_offsets(self, text: str, bounds: tuple[int, ...]) -> tuple[Tokens, Offsets]:
        """Token ids of a text with special tokens in it, and where each stands."""
        if self.is_fast:
            answer: tuple[Tokens, Offsets] = self.answers([("encode_offsets", text, bounds)])[0]
            return answer
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        edges = sorted({0, *bounds, len(text)})
        for start, end in itertools.pairwise(edges):
            piece = self._inner(
                text[start:end], add_special_tokens=False, return_attention_mask=False
            )
            ids += piece.input_ids
            places += [(start, end)] * len(piece.input_ids)
        return np.asarray(ids, np.uint32), np.array(places, np.int64).reshape(-1, 2)

    @property
    def masking(self) -> MaskFacts:
        """Its mask token, and [CLS] and [SEP] or what stands for them."""
        inner = self._inner

        def first(*names: str) -> int | None:
            found = (getattr(inner, f"{name}_token_id", None) for name in names)
            return next((int(one) for one in found if one is not None), None)

        specials = sorted(set(map(int, inner.all_special_ids)))
        return MaskFacts(first("mask"), specials, first("cls", "bos"), first("sep", "eos"))

    def encode_words(self, words: tuple[str, ...], most: int | None) -> EncodedWords:
        """Token ids of words that are given one by one; DataError for a tokenizer that has no places."""
        if not self.is_fast:
            raise DataError(
                "data.tokenizer: it does not say which word a token is of. Nearest: a fast one, with a "
                "tokenizer.json"
            )
        answer: EncodedWords = self.answers([("encode_words", words, most)])[0]
        return answer

    def _of_words(self) -> Any:
        """The tokenizer in which every word begins as after a space, as GPT-2's kind needs to be told."""
        if getattr(self._inner, "add_prefix_space", True):
            return self._inner
        if self._spaced is None:
            from transformers import AutoTokenizer

            name = self.made_of[0]
            self._spaced = AutoTokenizer.from_pretrained(
                name, trust_remote_code=False, add_prefix_space=True
            )
        return self._spaced

    def decode(self, tokens: Tokens) -> str:
        """The text of these tokens, special ones by name."""
        return str(self._inner.decode(tokens.tolist()))

    @property
    def chat(self) -> ChatFacts:
        """The template in the tokenizer's folder, and its special tokens."""
        inner = self._inner
        template = inner.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        tokens = inner.special_tokens_map.items()
        named = {name: str(token) for name, token in tokens if isinstance(token, str)}
        return ChatFacts(template, named, tuple(map(str, inner.all_special_tokens)))


def refuse_surrogates(request: Request) -> None:
    """DataError where a text has half of a surrogate pair, which is no character and has no UTF-8."""
    texts = [part for part in request if isinstance(part, str)]
    for words in (part for part in request if isinstance(part, tuple)):
        texts += [word for word in words if isinstance(word, str)]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half, place = text[error.start], error.start + 1
            raise DataError(f"half of a surrogate pair, {half!a}, at letter {place:,}") from None


def _array(encoding: Any) -> Tokens:
    return np.asarray(encoding.ids, dtype=np.uint32)


def _words_of(encoding: Any, count: int) -> EncodedWords:
    """The tokens of so many words, and where each word begins."""
    firsts = np.full(count, -1, dtype=np.int32)
    for place, word in reversed(list(enumerate(encoding.word_ids))):
        if word is not None:
            firsts[word] = place
    return EncodedWords(_array(encoding), bool(encoding.overflowing), firsts)


def _tokens_until(letter: int, offsets: list[tuple[int, int]]) -> int:
    """How many of the first tokens end at this letter of the text or before."""
    return next((place for place, (_, end) in enumerate(offsets) if end > letter), len(offsets))


def find_tokenizer(
    name: str, bos: Bos = "auto", needs_end: bool = True, is_marked: bool = False
) -> Tokenizer:
    """The tokenizer `bytes`, or one from a folder (an absolute path) or from the hub."""
    if name == "bytes":
        if bos is True:
            raise DataError("data.bos: bytes has no begin-of-text token. Nearest: data.bos=auto")
        return ByteTokenizer()
    if name.startswith("/") and not Path(name).is_dir():
        raise DataError(f"data.tokenizer: {name} is not a folder")
    return HubTokenizer(name, bos, needs_end, is_marked)


def save_tokenizer(name: str, target: Path) -> None:
    """Write the tokenizer of this name as a folder that transformers loads, with the same ids."""
    if name == "bytes":
        inner: Any = _bytes_for_transformers()
    else:
        from transformers import AutoTokenizer

        inner = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    inner.save_pretrained(target)


_END = "<|end|>"
"""How the end token of bytes is written."""


def _bytes_for_transformers() -> Any:
    """A byte-level tokenizer without merges whose ids are those of ByteTokenizer."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in _printed_bytes()]
    inner = Inner(
        models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=_END)


def _printed_bytes() -> list[int]:
    """The code of the letter that stands for each byte: the byte's own if it is printed, else above 255."""
    printed = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [byte if byte in printed else next(others) for byte in range(256)]
