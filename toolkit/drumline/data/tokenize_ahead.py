"""Tokenises the texts of many rows at a time, on all cores, ahead of the tasks that ask for them one by one.

Fast tokenizers have threads of their own, others get processes. The order of the rows and all tokens are as
in a single thread.
"""

import contextlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from drumline.data.source_row import SourceRow
from drumline.data.tasks import Task
from drumline.data.tokenizers import (
    ChatFacts,
    EncodedRow,
    EncodedWords,
    HubTokenizer,
    Offsets,
    Request,
    Tokens,
    refuse_surrogates,
)
from drumline.errors import DataError

_FIRST_ROWS, _MOST_ROWS, _MOST_LETTERS = 16, 1024, 1 << 20
"""Of a chunk: rows of the first, which doubles with each, rows of the largest, and letters. At most three
chunks are in memory: one read, one tokenised, one written."""


@dataclass
class _Chunk:
    """`failure`: what ended the reading, for the caller once it has taken the rows that were read before."""

    rows: list[SourceRow] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    failure: Exception | None = None


class TokenizeAhead:
    """A tokenizer that has the answers for a chunk of rows before the task asks."""

    def __init__(self, inner: HubTokenizer) -> None:
        self._inner = inner
        self.vocabulary, self.fingerprint = inner.vocabulary, inner.fingerprint
        self.begin, self.end, self.masking = inner.begin, inner.end, inner.masking
        self._answers: dict[Request, Any] = {}
        self._lock = threading.Lock()
        self._processes: ProcessPoolExecutor | None = None

    def encode(self, text: str) -> Tokens:
        """As the tokenizer's own."""
        return self._answer(("encode", text))  # type: ignore[no-any-return]

    def encode_row(self, text: str, most: int | None, other: str | None = None) -> EncodedRow:
        """As the tokenizer's own."""
        return self._answer(("encode_row", text, most, other))  # type: ignore[no-any-return]

    def encode_pair(self, prompt: str, completion: str) -> tuple[Tokens, int]:
        """As the tokenizer's own."""
        return self._answer(("encode_pair", prompt, completion))  # type: ignore[no-any-return]

    def encode_offsets(self, text: str, bounds: tuple[int, ...]) -> tuple[Tokens, Offsets]:
        """As the tokenizer's own."""
        return self._answer(("encode_offsets", text, bounds))  # type: ignore[no-any-return]

    def encode_words(self, words: tuple[str, ...], most: int | None) -> EncodedWords:
        """As the tokenizer's own."""
        return self._answer(("encode_words", words, most))  # type: ignore[no-any-return]

    def decode(self, tokens: Tokens) -> str:
        """As the tokenizer's own."""
        return self._inner.decode(tokens)

    @property
    def chat(self) -> ChatFacts:
        """As the tokenizer's own."""
        return self._inner.chat

    def rows(self, task: Task, rows: Iterable[SourceRow]) -> Generator[SourceRow, None, None]:
        """The same rows; while one is with the caller, the texts of the next chunk are being tokenised."""
        waiting: tuple[_Chunk, Future[list[Any]]] | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)  # last, when no thread can start processes any more
            thread = stack.enter_context(ThreadPoolExecutor(1))
            for chunk in _chunks(task, rows):
                future = thread.submit(self._answer_all, chunk.requests)
                if waiting:
                    yield from self._serve(*waiting)
                waiting = chunk, future
            if waiting:
                yield from self._serve(*waiting)

    def _serve(self, chunk: _Chunk, future: "Future[list[Any]]") -> Iterator[SourceRow]:
        self._answers = dict(zip(chunk.requests, future.result(), strict=True))
        yield from chunk.rows
        if chunk.failure:
            raise chunk.failure

    def _answer(self, request: Request) -> Any:
        if request not in self._answers:  # a task of the project's own
            with self._lock:
                return self._inner.answers([request])[0]
        return self._answers[request]

    def _answer_all(self, requests: list[Request]) -> list[Any]:
        cores = len(os.sched_getaffinity(0))
        with self._lock:
            if self._inner.is_fast or cores == 1 or len(requests) < _MOST_ROWS:
                return self._inner.answers(requests)
        if self._processes is None:
            self._processes = ProcessPoolExecutor(
                cores,
                multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=self._inner.made_of,
            )
        size = -(-len(requests) // (4 * cores))
        parts = [requests[start : start + size] for start in range(0, len(requests), size)]
        return [answer for part in self._processes.map(_answers, parts) for answer in part]

    def _end(self) -> None:
        if self._processes:
            self._processes.shutdown(cancel_futures=True)
            self._processes = None


def _chunks(task: Task, rows: Iterable[SourceRow]) -> Iterator[_Chunk]:
    """The rows in chunks that grow, so that a run of few rows reads few; the last one may be empty."""
    source, most, is_read = iter(rows), min(_FIRST_ROWS, _MOST_ROWS), False
    while not is_read:
        chunk, letters = _Chunk(), 0
        try:
            for row in itertools.islice(source, most):
                chunk.rows.append(row)
                letters += _ask(task, row, chunk.requests) + row.media_bytes
                if letters >= _MOST_LETTERS:
                    break
            is_read = len(chunk.rows) < most and letters < _MOST_LETTERS
        except Exception as error:  # the task may be done before it comes to this row
            chunk.failure, is_read = error, True
        yield chunk
        most = min(2 * most, _MOST_ROWS)


def _ask(task: Task, row: SourceRow, requests: list[Request]) -> int:
    """Add what the task will ask for this row; returns the letters of its texts."""
    asked: list[Request] = []
    with contextlib.suppress(DataError):  # which the task raises again, where it is told
        asked = [] if row.problem else task.requests(row.fields)
        for one in asked:
            refuse_surrogates(one)
        requests.extend(asked)
    return sum(len(part) for one in asked for part in one if isinstance(part, str))


_own: list[HubTokenizer] = []
"""The tokenizer of a process of the pool."""


def _begin(*made_of: Any) -> None:
    _own.append(HubTokenizer(*made_of))


def _answers(requests: list[Request]) -> list[Any]:
    return _own[0].answers(requests)
