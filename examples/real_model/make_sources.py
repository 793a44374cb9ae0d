"""Two more sources out of SmolLM2: `tuned`, fine-tuned on other instructions, and `retokenized`, which has a
tokenizer of its own.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from conversations import SEED, encode, in_batches, read_rows, response_logits
from smollm2 import SPECIAL, byte_level, with_chat
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megatron_fuse.storage.recorded_directory import directory_then_rename, sole_writer

STEPS, BATCH = 14, 8
VOCABULARY = 12288


def make_tuned(directory: Path, base: Path, rows: Path) -> None:
    if not directory.exists():
        model, tokenizer = _load(base)
        _train(model, tokenizer, rows, lr=5e-5, name=directory.name)
        _save(model, tokenizer, directory)


def make_retokenized(directory: Path, base: Path, texts: list[Path], rows: Path) -> None:
    """texts: files of the rows on which the byte-level BPE is trained. rows: those that the model learns."""
    if directory.exists():
        return
    model, old = _load(base)
    new = _train_tokenizer(texts, old.chat_template)
    # The input and the output embeddings are one matrix (tied).
    weights = model.get_input_embeddings().weight.detach()
    means = [weights[_ids_in(old, piece)].mean(0) for piece in new.convert_ids_to_tokens(range(len(new)))]
    model.resize_token_embeddings(len(new))
    model.get_input_embeddings().weight.data.copy_(torch.stack(means))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(new, name))
        setattr(model.generation_config, name, getattr(new, name))
    _train(model, new, rows, lr=2e-4, name=directory.name)
    _save(model, new, directory)


def _ids_in(old: PreTrainedTokenizerBase, piece: str) -> list[int]:
    """The old tokens that spell a piece: both tokenizers write bytes in the same alphabet.

    The unknown token for the few rare bytes that the old vocabulary lacks.
    """
    if piece in SPECIAL:
        return [old.convert_tokens_to_ids(piece)]
    spelled = [token.id for token in old.backend_tokenizer.model.tokenize(piece)]
    return spelled or [old.unk_token_id]


def _train_tokenizer(texts: list[Path], template: str) -> PreTrainedTokenizerBase:
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [row for path in texts for row in read_rows(path)]
    tokenizer.train_from_iterator((row[key] for row in rows for key in ("instruction", "output")), trainer)
    return with_chat(tokenizer, template)


def _load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Path, *, lr: float, name: str
) -> None:
    """STEPS steps of AdamW on the responses, with a learning rate that falls linearly to 0."""
    torch.manual_seed(SEED)
    chosen = [encode(tokenizer, row) for row in read_rows(rows)[: STEPS * BATCH]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    batches = in_batches(chosen, BATCH)
    model.train()
    began = time.perf_counter()
    for step, number in enumerate(torch.randperm(len(batches)).tolist()):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(batches))
        loss = F.cross_entropy(*response_logits(model, batches[number], tokenizer.pad_token_id))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{name}: step {step + 1}/{len(batches)}, loss {loss.item():.3f}", flush=True)
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    with sole_writer(directory, "config.json"), directory_then_rename(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
