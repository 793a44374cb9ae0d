"""The small world of test_road_reference.py: what its conversations say, and three models that read them,
of three families.
"""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import tokenizers
import torch
from road_reference import AlpacaSide, ByteLevelSide, LossySide, SentencePieceSide, Side, Turn, converse
from small_models import save_model
from small_tokenizers import CHATML, make_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXTS = [
    "Sure: the internationalization of 123 stations is 45.",
    "日本 and été are words.\n\n  Indented\ttext, 12 + 30 = 42. 🙂",
    "12 is the answer",
    " begins with a space, and ends with one ",
    "\n\nbegins with lines,\0 a NUL",
    "internationalization nation station, hello world",
    "ends as text: </s> and <|im_end|>, ▁ literal",
    "cafe\u0301 is decomposed, ½ of it",
    "user assistant hello world. " * 12,  # too long for one of the two
]


def level_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens go from the middle of a word into the next, so that they begin and end inside the others'
    often.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    pairs = [pair for text in TEXTS for pair in pairwise(text.split())]
    backend.train_from_iterator([f"{a[len(a) // 2 :]} {b[: (len(b) + 1) // 2]}" for a, b in pairs], trainer)
    backend.add_tokens([tokenizers.AddedToken(" " * n) for n in (3, 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=CHATML)


def make_sides(root: Path) -> dict[str, Side]:
    return {
        "piece": SentencePieceSide((root / "piece/tokenizer.model").read_bytes()),
        "level": ByteLevelSide(level_tokenizer().backend_tokenizer),
        "alpaca": AlpacaSide((root / "piece/tokenizer.model").read_bytes()),
        "lossy": LossySide((root / "lossy/tokenizer.model").read_bytes()),
    }


def save_models(root: Path) -> None:
    make_tokenizer("sentencepiece", root / "piece")
    make_tokenizer("t5", root / "lossy")
    level_tokenizer().save_pretrained(root / "level")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sides = make_sides(root)
    torch.manual_seed(7)
    # More columns of logits than ids, as real models have.
    models = {
        "piece": LlamaForCausalLM(LlamaConfig(vocab_size=len(sides["piece"].pieces) + 3, **sizes)),
        "level": MistralForCausalLM(MistralConfig(vocab_size=len(sides["level"].pieces) + 5, **sizes)),
        "lossy": LlamaForCausalLM(LlamaConfig(vocab_size=len(sides["lossy"].pieces) + 8, **sizes)),
    }
    for name, steps in (("piece", 50), ("level", 25), ("lossy", 35)):
        model = models[name]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.25)
            liken_by_beginning(model.get_output_embeddings().weight, sides[name].pieces)
        teach(model, sides[name], steps)
        model.save_pretrained(root / name)
    for name in ("weak", "strong"):
        save_model(root / name, "llama", reward=True)


def liken_by_beginning(weight: torch.Tensor, pieces: list[bytes | None]) -> None:
    """weight [v, h]. Tokens that begin with the same bytes become likely together, as they are to a model
    that can spell. Special tokens and columns that are no token's are like a space, so that they turn up."""
    size = weight.shape[1]
    vector_of: dict[bytes, torch.Tensor] = defaultdict(lambda: torch.randn(size))
    for token in range(len(weight)):
        piece = (pieces[token] if token < len(pieces) else None) or b" "
        parts = [vector_of[piece[:n]] for n in range(1, len(piece) + 1)]
        own = 0.1 * torch.randn(size)  # some bytes have two tokens
        weight[token] = own + torch.stack(parts).sum(0) / len(parts) ** 0.5


def teach(model: PreTrainedModel, side: Side, steps: int) -> None:
    """Some of the texts, so that a row is likely to hold what comes; in the others its mass lies anywhere."""
    model.get_output_embeddings().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        for number, text in enumerate(TEXTS[:6]):
            ids = torch.tensor([converse(side, [Turn(f"Question {number}?", text)]).ids])
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
