"""Captures that another program made. Their rows are checked as checked_rows.py says; nothing is guessed."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_fuse.capture.checked_rows import MismatchError, checked_rows
from megatron_fuse.capture.distributions import SparseRows
from megatron_fuse.capture.forms import BadRowError, given_rows
from megatron_fuse.capture.reading import reading_status
from megatron_fuse.capture.row_files import open_rows
from megatron_fuse.capture.shards import CAPTURED, MISMATCH, MISSING, CaptureShard, Conversation
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe
from megatron_fuse.storage.records import quoted
from megatron_fuse.tokenization import Tokenizer

logger = logging.getLogger(__name__)


class CaptureFile:
    """A file of captures. It takes the place of a model that reads conversations."""

    def __init__(self, recipe: Recipe, path: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Indexes the file. vocab_size: the number of ids that the source's model knows.

        Raises UserError if the file cannot be indexed.
        """
        self.recipe, self.path, self.tokenizer, self.vocab_size = recipe, path, tokenizer, vocab_size
        self.rows = open_rows(path)

    def capture_shard(self, conversations: Sequence[Conversation]) -> CaptureShard:
        """The capture of these conversations from the file's rows.

        Raises UserError if a row cannot be used, or if most of the rows are about other tokens than ours.
        """
        limit = self.recipe.training.seq_length
        status = np.array([reading_status(conversation, limit) for conversation in conversations], np.uint8)
        places = {
            conversations[index].example: index for index in np.flatnonzero(status == CAPTURED).tolist()
        }
        status[[index for name, index in places.items() if name not in self.rows]] = MISSING
        parts: dict[int, SparseRows] = {}
        mismatches = []
        for row in self.rows.read(places):
            index = places[row.id]
            try:
                parts[index] = checked_rows(
                    given_rows(row.content),
                    conversations[index].readable,
                    self.recipe,
                    self.tokenizer,
                    self.vocab_size,
                )
            except BadRowError as error:
                raise UserError(f"{row.place} (id {quoted(row.id)}): {error}") from error
            except MismatchError as error:
                status[index] = MISMATCH
                mismatches.append(f"{row.place} (id {quoted(row.id)}): {error}")
        if len(mismatches) > len(parts):
            raise UserError(
                f"{mismatches[0]}; in {len(mismatches)} of {len(mismatches) + len(parts)} rows the tokens "
                "differ from those of the source's tokenizer and chat template. Capture the same texts with "
                "the same template and truncation."
            )
        if mismatches:
            left_out = f"{len(mismatches)} of {len(conversations)} examples"
            logger.warning(f"{self.path}: left out: {left_out}; the first: {mismatches[0]}")
        nothing = SparseRows.none(len(self.recipe.capture_temperatures))
        joined = SparseRows.join([nothing, *(parts[index] for index in sorted(parts))])
        return CaptureShard.of(conversations, status, joined)
