"""A second reading of the definitions from conversation to fusion document, for tests: one conversation at a
time, in plain Python and fp64. It shares with the library nothing but the models and the files of the
tokenizers: templates are written out, bytes come from the pieces, every probability from a full softmax. What
becomes of a row in the target's tokens is in road_reference_rows.py.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sentencepiece
import tokenizers
import torch
from sentencepiece import sentencepiece_model_pb2

TEMPERATURE, TOP_K, TOP_P = 1.5, 12, 0.98
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


# --- the families: how each cuts a conversation into ids, and which bytes an id stands for
# --------------------------------


class SentencePieceSide:
    """A SentencePiece model with byte fallback, a dummy prefix after every special token, and Vicuna's
    template.
    """

    separator = b" "

    def __init__(self, data: bytes) -> None:
        plain = sentencepiece_model_pb2.ModelProto.FromString(data)
        plain.normalizer_spec.add_dummy_prefix = False
        self.whole = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.plain = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())
        self.stop = self.whole.eos_id()
        self.pieces: list[bytes | None] = []
        for token in range(self.whole.vocab_size()):
            piece = self.whole.id_to_piece(token)
            if self.whole.is_control(token) or self.whole.is_unknown(token):
                self.pieces.append(None)
            else:
                byte = self.whole.is_byte(token)
                self.pieces.append(bytes([int(piece[3:5], 16)]) if byte else piece.replace("▁", " ").encode())

    def cut(self, text: str) -> list[int]:
        """Of a text that goes on; the library takes a literal U+2581 for a space, so its bytes are written
        out.
        """
        between = [self.whole.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        parts = [self.plain.encode(part) for part in text.split("▁")]
        return [token for n, part in enumerate(parts) for token in (between if n else []) + part]

    def after_special(self, text: str) -> list[int]:
        return self.whole.encode(text)

    def ask(self, question: str, system: str | None, first: bool) -> tuple[list[int], str]:
        if not first:
            return [], f"USER: {question} ASSISTANT:"
        return [self.whole.bos_id()], f"{SYSTEM if system is None else system} USER: {question} ASSISTANT:"


class AlpacaSide(SentencePieceSide):
    """The same model with Alpaca's template, whose answers have a line of their own."""

    separator = b""

    def ask(self, question: str, system: str | None, first: bool) -> tuple[list[int], str]:
        text = f"### Instruction:\n{question}\n\n### Response:\n"
        if not first:
            return [], f"\n\n{text}"
        default = (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request."
        )
        return [self.whole.bos_id()], f"{default if system is None else system}\n\n{text}"


class LossySide(SentencePieceSide):
    """T5's manner: NFKC, runs of white space become one space, an unknown token instead of bytes, no BOS;
    Vicuna's template.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        plain = sentencepiece_model_pb2.ModelProto.FromString(data)
        identity = {"name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
        plain.normalizer_spec.CopyFrom(sentencepiece_model_pb2.NormalizerSpec(**identity))
        self.plain = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())

    def cut(self, text: str) -> list[int]:
        return self.plain.encode(text)

    def cut_normalized(self, text: str) -> list[tuple[int, int, bool]]:
        """Of a text that begins with a space: (id, the byte at which it ends, whether it is not the bytes up
        to there).

        What is normalised together (white space, a letter with its marks) has no places inside. Tokens that
        meet at such a place are all lossy, and all but the last of them empty; white space at the end, which
        is dropped, is the last token's.
        """
        data = text.encode()
        place_of: dict[int, int] = {}  # character of the normal form -> byte of the text
        read = written = 0
        for chunk in re.findall(r"[\s▁]+|[^\s▁][\u0300-\u036f]*", text):
            normal = " " if re.match(r"[\s▁]", chunk) else unicodedata.normalize("NFKC", chunk)
            place_of[written] = read
            read, written = read + len(chunk.encode()), written + len(normal)
        ids = self.whole.encode(text)  # its dummy prefix is the text's own first space
        ends = np.cumsum([len(piece) for piece in self.whole.encode(text, out_type=str)], dtype=int).tolist()
        places = [*(place_of.get(end) for end in ends[:-1]), len(data)] if ids else []
        tokens, begin, group = [], 0, []
        for token, end in zip(ids, places, strict=True):
            group.append(token)
            if end is None:
                continue
            lossy = len(group) > 1 or self.pieces[token] != data[begin:end]
            tokens += [(empty, begin, True) for empty in group[:-1]] + [(token, end, lossy)]
            begin, group = end, []
        return tokens

    def ask(self, question: str, system: str | None, first: bool) -> tuple[list[int], str]:
        return [], super().ask(question, system, first)[1]


class ByteLevelSide:
    """A byte-level BPE with Unicode normalisation and ChatML."""

    separator = b""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.whole = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self.plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self.plain.normalizer = tokenizers.normalizers.Sequence([])
        self.whole.encode_special_tokens = self.plain.encode_special_tokens = True
        self.start, self.stop = (tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
        shifted = (n for n in range(256, 512))
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        table = {chr(byte if byte in visible else next(shifted)): byte for byte in range(256)}
        self.pieces = []
        for token in range(tokenizer.get_vocab_size()):
            piece = tokenizer.id_to_token(token)
            added = tokenizer.get_added_tokens_decoder().get(token)
            bytes_of = bytes(table[c] for c in piece) if added is None else piece.encode()
            self.pieces.append(None if added is not None and added.special else bytes_of)

    def cut(self, text: str) -> list[int]:
        return self.plain.encode(text, add_special_tokens=False).ids

    def after_special(self, text: str) -> list[int]:
        return self.whole.encode(text, add_special_tokens=False).ids

    def ask(self, question: str, system: str | None, first: bool) -> tuple[list[int], str]:
        turns = (
            [f"user\n{question}"]
            if system is None or not first
            else [f"system\n{system}", f"user\n{question}"]
        )
        newline = self.after_special("\n")
        ids = [] if first else newline
        for turn in turns:
            ids = [*ids, self.start, *self.after_special(turn), self.stop, *newline]
        return [*ids, self.start], "assistant\n"


Side = SentencePieceSide | ByteLevelSide
"""What both have: pieces[i], the bytes of id i, None for a special token; stop, the id that ends an answer;
separator, the white space of the template before an answer that belongs to its first token; cut(text), ids of
text that follows other text; after_special(text), ids of text between special tokens; ask(question, system,
first): ids up to the last special token before an answer, and the text between that and the answer."""


@dataclass
class Token:
    """A supervised token. It stands for bytes [begin, end) of `Conversation.text`, of which the stop token
    has the zero byte.
    leads: it is the first after the template's white space; lossy: it does not spell these bytes."""

    id: int
    place: int
    begin: int
    end: int
    leads: bool = False
    stop: bool = False
    lossy: bool = False


@dataclass
class Conversation:
    """ids: of the whole conversation; tokens: the supervised ones; text: the supervised answers,
    concatenated, with a zero byte after each; answers: their number."""

    ids: list[int]
    tokens: list[Token]
    text: bytes
    answers: int

    def all_read(self) -> bool:
        """Whether the tokens spell the whole of the answers."""
        spelled = sum(token.end - token.begin for token in self.tokens if not token.stop and not token.lossy)
        return spelled == len(self.text) - self.answers


@dataclass
class Turn:
    question: str
    answer: str
    supervised: bool = True
    stop: bool = True


def converse(side: Side, turns: Sequence[Turn], system: str | None = None) -> Conversation:
    """An answer that is not supervised is context, cut like the rest of the prompt."""
    ids: list[int] = []
    tokens: list[Token] = []
    text = b""
    for number, turn in enumerate(turns):
        opening, before = side.ask(turn.question, system, first=number == 0)
        if turn.supervised:
            ids += [*opening, *side.after_special(before)]
            offset = read = len(text) - len(side.separator)
            for n, (token, end, lossy) in enumerate(
                cut_answer(side, before, side.separator.decode() + turn.answer)
            ):
                begin, read = read, offset + end
                leads = n == 0 and bool(side.separator)
                tokens.append(
                    Token(token, len(ids), max(begin, len(text)), max(read, len(text)), leads, lossy=lossy)
                )
                ids.append(token)
            text += turn.answer.encode() + b"\0"
            if turn.stop:
                tokens.append(Token(side.stop, len(ids), len(text) - 1, len(text), stop=True))
        else:
            ids += [*opening, *side.after_special(before + side.separator.decode() + turn.answer)]
        ids += [side.stop] * turn.stop
    return Conversation(ids, tokens, text, sum(turn.supervised for turn in turns))


def cut_answer(side: Side, before: str, answer: str) -> list[tuple[int, int, bool]]:
    """(id, the byte at which it ends, whether it is lossy) of an answer behind this part of its prompt.

    It is cut as it follows the prompt; where that changes the prompt's tokens, or other bytes than the
    answer's come of it, by itself; and where its bytes cannot be had, in its normal form.
    """
    prompt, joint = side.after_special(before), side.after_special(before + answer)
    together = joint[: len(prompt)] == prompt
    for ids in (joint[len(prompt) :] if together else None, side.cut(answer)):
        if ids is not None and b"".join(side.pieces[i] or b"" for i in ids) == answer.encode():
            ends = np.cumsum([len(side.pieces[i]) for i in ids]).tolist()
            return [(token, end, False) for token, end in zip(ids, ends, strict=True)]
    return side.cut_normalized(answer)


# --- capture: full softmax over every logit
# --------------------------------------------------------------------------------


@dataclass
class Row:
    """logp_1, logp_t [v]: fp64 log-probabilities at T = 1 and at the KL temperature; stored: ids that
    capture keeps.
    """

    logp_1: np.ndarray
    logp_t: np.ndarray
    stored: list[int]


def read(model: torch.nn.Module, conversation: Conversation) -> list[Row]:
    """One row per supervised token."""
    with torch.inference_mode():
        logits = model(torch.tensor([conversation.ids])).logits[0].double()
    rows = []
    for token in conversation.tokens:  # the logits before a token predict it
        z = logits[token.place - 1]
        logp_1, logp_t = (torch.log_softmax(z / t, 0).numpy() for t in (1.0, TEMPERATURE))
        stored: list[int] = []
        for entry in np.argsort(-logp_1, kind="stable")[:TOP_K].tolist():
            if stored and sum(math.exp(logp_1[i]) for i in stored) >= TOP_P:
                break
            stored.append(entry)
        rows.append(Row(logp_1, logp_t, stored))
    return rows


def cross_entropy(conversation: Conversation, rows: list[Row]) -> float:
    """Over the bytes of the answers: without the stop tokens."""
    return -sum(
        row.logp_1[token.id] for token, row in zip(conversation.tokens, rows, strict=True) if not token.stop
    )


# --- the choice between sources
# ---------------------------------------------------------------------------------------------


def least(ce: list[float], all_read: list[bool]) -> int:
    """The source with the least cross-entropy; one that has not read all of the text only where none has."""
    return min(range(len(ce)), key=lambda i: (not all_read[i], ce[i]))


def vote(texts: list[str], scores: np.ndarray, strongest: int) -> int | None:
    """scores [sources, reward models]"""
    able = [i for i, text in enumerate(texts) if text.strip()]
    best = {
        t: np.max([scores[i] for i in able if texts[i] == t], 0)
        for t in dict.fromkeys(texts[i] for i in able)
    }
    votes = dict.fromkeys(best, 0)
    for model in range(scores.shape[1]):
        votes[max(best, key=lambda text: best[text][model])] += 1  # max takes the first of equals
    tied = [text for text in best if votes[text] == max(votes.values())]
    return texts.index(max(tied, key=lambda text: best[text][strongest])) if tied else None
