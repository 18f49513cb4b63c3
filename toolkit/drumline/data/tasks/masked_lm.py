"""Masked language modelling (Devlin et al. 2019): guess tokens that are masked while rows are read."""

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import (
    IGNORED,
    Arrays,
    Encoded,
    Row,
    StoredRows,
    Task,
    text_field,
)
from drumline.data.tokenizers import Request, Tokenizer, Tokens
from drumline.errors import DataError
from drumline.recipe.data_section import Data

_MASKED, _REPLACED = 0.8, 0.9
"""Of the chosen tokens, 80 % become the mask token, 10 % a random one, and 10 % stay."""


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return MaskedLm(data)


class MaskedLm(Task):
    """Rows of `sequence_length` tokens cut from one stream of documents, or a text in each.

    Of every row the same number of tokens is chosen each time, `mask_probability` of those that are no
    special token, at least one; so what a row weighs is known before it is read. Which ones they are follows
    from the sample's seed.
    """

    needs_end = False
    draws = True
    columns = ("tokens", "starts", "lengths", "counts")

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.is_stream = self.counts_each_row = data.packing != "none"

    def use(self, tokenizer: Tokenizer) -> None:
        """Take the mask token; DataError where the tokenizer has none."""
        self.masking = tokenizer.masking
        if self.masking.mask is None:
            raise DataError(
                f"data.tokenizer: {self.data.tokenizer} has no mask token. Nearest: that of a model such as "
                "bert-base-uncased, or task causal_lm"
            )

    def around(self, tokenizer: Tokenizer) -> tuple[int | None, int | None]:
        """[CLS] and [SEP], or what stands for them."""
        return tokenizer.masking.before, tokenizer.masking.after

    def requests(self, row: Row) -> list[Request]:
        """The text."""
        text = text_field(row, self.data.text_field, "text_field")
        if self.is_stream:
            return [("encode", text)]
        return [("encode_row", text, self.data.sequence_length, None)]

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """The tokens of a document or a block of it; or the row of a text."""
        assert tokenizer
        text = text_field(row, self.data.text_field, "text_field")
        if self.is_stream:
            tokens = tokenizer.encode(text)
            return Encoded(count=len(tokens), tokens=tokens)
        found = tokenizer.encode_row(text, self.data.sequence_length)
        sample = self.cut(found.tokens)
        return Encoded(count=sample.count, tokens=found.tokens, was_truncated=found.was_cut)

    def cut(self, tokens: Tokens) -> Encoded:
        """A row, and how many of its tokens will be masked."""
        assert self.masking
        free = int((~np.isin(tokens, self.masking.specials)).sum())
        return Encoded(count=_chosen(free, self.data.mask_probability), tokens=tokens)

    def collate_drawn(
        self, rows: StoredRows, indices: NDArray[np.int64], seeds: NDArray[np.uint64]
    ) -> Arrays:
        """input_ids, attention_mask and targets, int64 [n, L]; targets are the tokens that were chosen."""
        facts, vocabulary = rows.manifest.masking, rows.manifest.vocabulary
        assert facts and facts.mask is not None and vocabulary
        ids, inside = rows.tokens(indices)
        free = inside & ~np.isin(ids, facts.specials)
        inputs, targets = ids * inside, np.full_like(ids, IGNORED)
        for number, seed in enumerate(seeds.tolist()):
            rng = np.random.Generator(np.random.Philox(key=seed))
            places = np.flatnonzero(free[number])
            count = _chosen(len(places), self.data.mask_probability)
            chosen = np.sort(rng.choice(places, count, replace=False))
            fate = rng.random(count)
            other = rng.integers(0, vocabulary, count)
            targets[number, chosen] = ids[number, chosen]
            kept = np.where(fate < _REPLACED, other, ids[number, chosen])
            inputs[number, chosen] = np.where(fate < _MASKED, facts.mask, kept)
        return {
            "input_ids": inputs,
            "attention_mask": inside.astype(np.int64),
            "targets": targets,
        }

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """All-zero arrays of `collate_drawn`; the last token of a padded row is masked out."""
        assert manifest.row_tokens
        ids = np.zeros((count, manifest.row_tokens), dtype=np.int64)
        inside = np.ones_like(ids)
        inside[:, -1] = self.is_stream
        return {"input_ids": ids, "attention_mask": inside, "targets": ids.copy()}


def _chosen(free: int, share: float) -> int:
    """How many of so many tokens are chosen: the number nearest to their share, at least one."""
    return min(free, max(1, round(share * free)))
