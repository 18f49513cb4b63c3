"""Text to token ids: UTF-8 bytes, or any transformers tokenizer."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from drumline.errors import DataError

Tokens = NDArray[np.uint32]


class Tokenizer(Protocol):
    """What `prepare` needs: a vocabulary size, an end-of-document id, an encoder, an identity."""

    vocabulary: int
    end: int
    fingerprint: str

    def encode(self, text: str) -> Tokens:
        """Token ids of the text, without special tokens: uint32 [n]."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte; token 256 ends a document."""

    vocabulary = 257
    end = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> Tokens:
        """The text's UTF-8 bytes."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(
            np.uint32
        )


class HubTokenizer:
    """A transformers tokenizer, by hub name or folder; remote code is never trusted."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer

            self._inner: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise DataError(f"data.tokenizer: {name} cannot be loaded: {first}") from None
        if self._inner.eos_token_id is None:
            raise DataError(f"data.tokenizer: {name} has no end-of-text token, which packing needs")
        self.vocabulary = len(self._inner)
        self.end = int(self._inner.eos_token_id)
        backend = getattr(self._inner, "backend_tokenizer", None)
        text = backend.to_str() if backend else repr(sorted(self._inner.get_vocab().items()))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> Tokens:
        """Token ids without special tokens."""
        return np.asarray(self._inner.encode(text, add_special_tokens=False), dtype=np.uint32)


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `bytes`, or one from a folder (an absolute path) or from the hub."""
    if name == "bytes":
        return ByteTokenizer()
    if name.startswith("/") and not Path(name).is_dir():
        raise DataError(f"data.tokenizer: {name} is not a folder")
    return HubTokenizer(name)
