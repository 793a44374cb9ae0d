"""Train three tokenizers, one for each source model, on text of the six skills.

    python examples/skills/make_tokenizers.py --output examples/skills/build

| name  | kind                                                      | size | chat template | stop token    |
|-------|-----------------------------------------------------------|------|---------------|---------------|
| alpha | SentencePiece BPE with byte fallback, dummy prefix (Llama) | 576 | Vicuna-like   | </s>          |
| beta  | byte-level BPE (MPT)                                       | 560 | ChatML        | <|im_end|>    |
| gamma | byte-level BPE, smaller, most words in pieces (GPT-NeoX)   | 420 | Alpaca        | <|endoftext|> |

Each is a Hugging Face tokenizer directory under OUTPUT/tokenizers that AutoTokenizer loads offline; alpha's
holds `tokenizer.model` too.
"""

import argparse
import io
import random
from pathlib import Path

import sentencepiece
from lm import fingerprint, is_made, replace_directory
from skills import ALPHABET, FORMS, SKILLS, draw
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_fuse.errors import exit_code

VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
STOP_TOKENS = {"alpha": "</s>", "beta": "<|im_end|>", "gamma": "<|endoftext|>"}


def corpus(seed: int, per_skill: int = 1500) -> list[str]:
    """Training text: problems with their answers in every form, and the words of the templates."""
    rng, lines = random.Random(seed), []
    for skill in SKILLS:
        for number in range(per_skill):
            problem = draw(skill, "train", rng)
            lines.append(f"{problem.instruction} {problem.response(FORMS[number % 3])}")
    return lines + ["USER: ASSISTANT: ### Instruction: ### Response: user assistant system"] * 200


def train_sentencepiece(lines: list[str], size: int) -> bytes:
    """A SentencePiece BPE model as Llama-2's: byte fallback, digits apart, a dummy prefix; <unk> <s> </s>
    <pad> come first.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def llama_tokenizer(model: bytes, chat_template: str) -> PreTrainedTokenizerBase:
    """The Hugging Face form of a SentencePiece BPE model, in the shape of Llama-2's tokenizer.json."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    # SentencePiece joins the pair whose union has the least id; Hugging Face wants the pairs written out in
    # that order.
    merges = [
        (piece[:cut], piece[cut:])
        for piece, number in ids.items()
        if not (processor.is_control(number) or processor.is_byte(number) or processor.is_unknown(number))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    backend = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def byte_level_tokenizer(
    lines: list[str], size: int, chat_template: str, specials: list[str]
) -> PreTrainedTokenizerBase:
    """Byte-level BPE with single digits; `specials`: end of text, padding, then what the template needs."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=specials[0],
        eos_token=specials[0],
        pad_token=specials[1],
        padding_side="left",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def check(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Every digit is one token wherever it stands, every letter standing apart one token: no alignment
    noise between the models.
    """
    for text in [f"a {letter}" for letter in ALPHABET] + [f"a={digit}" for digit in "0123456789"]:
        tokens = tokenizer.tokenize(text)
        if len(tokens) != len(tokenizer.tokenize(text[:-2] if " " in text else text[:-1])) + 1:
            raise ValueError(f"tokenizer {name}: {text!r} becomes {tokens}")


def make(name: str, lines: list[str]) -> tuple[PreTrainedTokenizerBase, bytes | None]:
    """The tokenizer, and alpha's SentencePiece model."""
    if name == "alpha":
        model = train_sentencepiece(lines, 576)
        return llama_tokenizer(model, VICUNA), model
    if name == "beta":
        return byte_level_tokenizer(
            lines, 560, CHATML, ["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"]
        ), None
    return byte_level_tokenizer(lines, 420, ALPACA, ["<|endoftext|>", "<|padding|>"]), None


def make_tokenizers(output: Path, seed: int) -> None:
    scripts = [Path(__file__), Path(__file__).with_name("skills.py")]
    settings_hash = fingerprint({"seed": seed}, *scripts)
    lines = None
    for name in STOP_TOKENS:
        directory = output / "tokenizers" / name
        if is_made(directory, settings_hash):
            print(f"{directory}: made before")
            continue
        lines = lines or corpus(seed)
        tokenizer, model = make(name, lines)
        check(tokenizer, name)
        with replace_directory(directory, settings_hash) as temporary:
            tokenizer.save_pretrained(temporary)
            if model is not None:
                (temporary / "tokenizer.model").write_bytes(model)
        print(f"{directory}: {len(tokenizer)} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "build")
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args()
    make_tokenizers(options.output, options.seed)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
