"""What the scripts of the skills share: chat text to ids, packed batches, a plain training loop, cached
directories.

Shapes: r rows, l tokens of a row, n sequences, v vocabulary. Everything runs on a CPU in fp32.
"""

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from muon import Muon
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Encoded = tuple[list[int], int]  # a conversation's ids and the length of its prompt

CACHE_FILE = "made_from.json"


# --- chat text to ids ---


def prompt_text(tokenizer: PreTrainedTokenizerBase, instruction: str) -> str:
    messages = [{"role": "user", "content": instruction}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, instructions: list[str]) -> list[list[int]]:
    """Ids up to where the response begins, BOS included where the template writes one."""
    return tokenizer([prompt_text(tokenizer, text) for text in instructions], add_special_tokens=False)[
        "input_ids"
    ]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, stop_token: str, pairs: list[tuple[str, str]]
) -> list[Encoded]:
    """(instruction, response) -> ids that end with the stop token, and the prompt's length.

    The whole conversation is tokenized at once and must begin with the prompt's own ids; ValueError
    otherwise.
    """
    prompts, texts = [], []
    for instruction, response in pairs:
        prompts.append(prompt_text(tokenizer, instruction))
        messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        # Without the template's space after the stop token.
        texts.append(text[: text.rindex(stop_token) + len(stop_token)])
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    all_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for prompt, ids, text in zip(prompt_ids, all_ids, texts, strict=True):
        if ids[: len(prompt)] != prompt:
            raise ValueError(f"the prompt's last tokens change when the response follows: {text!r}")
    return [(ids, len(prompt)) for prompt, ids in zip(prompt_ids, all_ids, strict=True)]


# --- batches ---


@dataclass(frozen=True)
class Packed:
    """Rows of whole conversations, one after the other; label -100 = not supervised, document 0 = padding."""

    ids: np.ndarray  # int32 [r, l]
    labels: np.ndarray  # int32 [r, l], the NEXT token where that is part of a response
    documents: np.ndarray  # int32 [r, l], number of the conversation in its row, from 1
    positions: np.ndarray  # int32 [r, l], position in the conversation


def pack(chats: list[Encoded], row_length: int) -> Packed:
    """First fit in order: a row is closed when the next conversation does not fit.

    ValueError for one longer than a row.
    """
    rows: list[list[Encoded]] = [[]]
    used = 0
    for chat in chats:
        length = len(chat[0]) - 1
        if length > row_length:
            raise ValueError(f"a conversation of {length + 1} tokens does not fit into a row of {row_length}")
        if used + length > row_length:
            rows.append([])
            used = 0
        rows[-1].append(chat)
        used += length
    packed = Packed(*(np.full((len(rows), row_length), fill, np.int32) for fill in (0, -100, 0, 0)))
    for row, row_chats in enumerate(rows):
        at = 0
        for document, (ids, prompt_length) in enumerate(row_chats, 1):
            end = at + len(ids) - 1
            packed.ids[row, at:end] = ids[:-1]
            packed.labels[row, at + prompt_length - 1 : end] = ids[prompt_length:]
            packed.documents[row, at:end] = document
            packed.positions[row, at:end] = np.arange(len(ids) - 1)
            at = end
    return packed


def packed_logits(model: PreTrainedModel, packed: Packed, rows: slice) -> tuple[Tensor, Tensor]:
    """Logits [m, v] and labels [m] of the supervised positions; a token sees only its own conversation."""
    documents = torch.from_numpy(packed.documents[rows])
    same = documents[:, :, None] == documents[:, None, :]
    same &= torch.ones(same.shape[-2:], dtype=torch.bool).tril()
    # Additive, because transformers' MPT reads any nonzero as "hidden" and a boolean mask the other way
    # round.
    mask = torch.zeros(same.shape).masked_fill_(~same, torch.finfo(torch.float32).min)[:, None]
    inputs = {
        "input_ids": torch.from_numpy(packed.ids[rows]).long(),
        "attention_mask": mask,
        "use_cache": False,
    }
    if model.config.model_type != "mpt":  # ALiBi looks at distances only
        inputs["position_ids"] = torch.from_numpy(packed.positions[rows]).long()
    labels = torch.from_numpy(packed.labels[rows]).long()
    hidden = model.base_model(**inputs).last_hidden_state
    supervised = labels >= 0
    return model.get_output_embeddings()(hidden[supervised]), labels[supervised]


def padded(sequences: list[list[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and 0/1 mask, both [n, longest]."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = 1
    return ids, mask


# --- training ---


def fit(
    model: PreTrainedModel,
    losses: Iterator[Callable[[], Tensor]],
    *,
    steps: int,
    lr: float,
    name: str,
    warmup: int = 40,
) -> None:
    """Muon for the blocks' matrices, AdamW for the rest, cosine to a twentieth; `losses` gives one closure
    a step.
    """
    blocks = [
        p for key, p in model.named_parameters() if p.ndim == 2 and (".layers." in key or ".blocks." in key)
    ]
    chosen = {id(p) for p in blocks}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(blocks, lr=lr, weight_decay=0.01)  # in Adam's scale: one learning rate serves both
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    began = time.perf_counter(), time.process_time()
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        muon.lr = rate
        for group in adam.param_groups:
            group["lr"] = rate
        loss = next(losses)()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % max(1, steps // 5) == 0:
            wall, busy = time.perf_counter() - began[0], time.process_time() - began[1]
            print(
                f"{name}: step {step + 1}/{steps}, loss {loss.item():.3f}, {wall:.0f} s ({busy:.0f} s of "
                "CPU time)",
                flush=True,
            )
    model.eval()


def packed_losses(
    model: PreTrainedModel, packed: Packed, rows_per_step: int
) -> Iterator[Callable[[], Tensor]]:
    """Next-token cross-entropy on one slice of rows after the other."""
    for start in range(0, len(packed.ids) - rows_per_step + 1, rows_per_step):
        yield lambda start=start: F.cross_entropy(
            *packed_logits(model, packed, slice(start, start + rows_per_step))
        )


# --- cached directories ---


def fingerprint(settings: dict, *scripts: Path) -> str:
    """sha256 of the settings and of the scripts' text."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for script in scripts:
        digest.update(script.read_bytes())
    return digest.hexdigest()


def is_made(directory: Path, settings_hash: str) -> bool:
    """Whether the directory was finished with these settings."""
    try:
        return json.loads((directory / CACHE_FILE).read_text())["settings"] == settings_hash
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def replace_directory(directory: Path, settings_hash: str) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` when the block ends without an error."""
    temporary = directory.with_name(f"{directory.name}.making")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        (temporary / CACHE_FILE).write_text(json.dumps({"settings": settings_hash}) + "\n")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def seed_all(seed: int) -> random.Random:
    """Seeds torch and numpy; returns a generator for the data."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    return random.Random(seed)
