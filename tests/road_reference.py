"""A second reading of the definitions from conversation to fusion document, for tests: one conversation at a time, in plain Python
and fp64. It shares with the library nothing but the models and the files of the tokenizers: templates are written out, bytes come
from the pieces, every probability from a full softmax.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import sentencepiece
import tokenizers
import torch
from sentencepiece import sentencepiece_model_pb2

TEMPERATURE, TOP_K, TOP_P = 2.0, 12, 0.95
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


# --- two families: how each cuts a conversation into ids, and which bytes an id stands for --------------------------------


class SentencePieceSide:
    """A SentencePiece model with byte fallback, a dummy prefix and Vicuna's template."""

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
        """Of a text that goes on; the library takes a literal U+2581 for a space, so its bytes are written out."""
        between = [self.whole.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        parts = [self.plain.encode(part) for part in text.split("▁")]
        return [token for n, part in enumerate(parts) for token in (between if n else []) + part]

    def prompt(self, question: str) -> list[int]:
        return [self.whole.bos_id(), *self.whole.encode(f"{SYSTEM} USER: {question} ASSISTANT:")]

    def joint(self, question: str, response: str) -> list[int]:
        return [self.whole.bos_id(), *self.whole.encode(f"{SYSTEM} USER: {question} ASSISTANT: {response}")]


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

    def prompt(self, question: str) -> list[int]:
        return self.joint(question, "")

    def joint(self, question: str, response: str) -> list[int]:
        def cut(text: str) -> list[int]:
            return self.whole.encode(text, add_special_tokens=False).ids

        turn = [self.start, *cut(f"user\n{question}"), self.stop, *cut("\n"), self.start]
        return [*turn, *cut(f"assistant\n{response}")]


Side = SentencePieceSide | ByteLevelSide


@dataclass
class Conversation:
    """prompt and answer ids; begins[i]: bytes of the response read before token i, the stop token, if any, included."""

    prompt: list[int]
    answer: list[int]
    begins: list[int]
    response: bytes
    stop: bool
    leading: bool

    def ends(self, row: int) -> int:
        return self.begins[row + 1] if row + 1 < len(self.begins) else len(self.response)

    @property
    def text_rows(self) -> int:
        return len(self.answer) - self.stop


def converse(side: Side, question: str, response: str, stop: bool) -> Conversation:
    prompt, joint = side.prompt(question), side.joint(question, response)
    wanted = side.separator + response.encode()

    def spelled(ids: list[int]) -> bytes:
        return b"".join(side.pieces[i] or b"" for i in ids)

    answer = joint[len(prompt) :]
    if joint[: len(prompt)] != prompt or spelled(answer) != wanted:
        answer = side.cut(wanted.decode())
    assert spelled(answer) == wanted
    begins, read = [], -len(side.separator)
    for token in answer:
        begins.append(max(read, 0))
        read += len(side.pieces[token] or b"")
    if stop:
        answer, begins = [*answer, side.stop], [*begins, read]
    return Conversation(prompt, answer, begins, response.encode(), stop, bool(side.separator))


# --- capture: full softmax over every logit --------------------------------------------------------------------------------


@dataclass
class Row:
    """logp_1, logp_t [v]: fp64 log-probabilities at T = 1 and at the KL temperature; stored: ids that capture keeps."""

    logp_1: np.ndarray
    logp_t: np.ndarray
    stored: list[int]


def read(model: torch.nn.Module, conversation: Conversation) -> list[Row]:
    ids = [*conversation.prompt, *conversation.answer]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double()
    rows = []
    for place in range(len(conversation.prompt), len(ids)):  # the logits before a token predict it
        z = logits[place - 1]
        logp_1, logp_t = (torch.log_softmax(z / t, 0).numpy() for t in (1.0, TEMPERATURE))
        stored: list[int] = []
        for token in np.argsort(-logp_1)[:TOP_K].tolist():
            if stored and sum(math.exp(logp_1[i]) for i in stored) >= TOP_P:
                break
            stored.append(token)
        rows.append(Row(logp_1, logp_t, stored))
    return rows


def cross_entropy(conversation: Conversation, rows: list[Row]) -> float:
    """Over the bytes of the response: without the stop token."""
    return -sum(rows[i].logp_1[conversation.answer[i]] for i in range(conversation.text_rows))


# --- alignment and projection -----------------------------------------------------------------------------------------------


def aligned(theirs: Conversation, ours: Conversation, row: int) -> int | None:
    """The source's row that has read the same bytes; of several that have, counted from the last backwards."""
    same = [i for i, begin in enumerate(theirs.begins) if begin == ours.begins[row]]
    later = sum(begin == ours.begins[row] for begin in ours.begins[row + 1 :])
    return same[max(len(same) - 1 - later, 0)] if same else None


def target_token(source: Side, target: Side, token: int, source_leads: bool, target_leads: bool) -> int | None:
    if token == source.stop:
        return target.stop
    piece = source.pieces[token] if token < len(source.pieces) else None
    if piece is None:
        return None
    if not (source_leads and target_leads and source.separator == target.separator):
        if source_leads:
            if source.separator.startswith(piece):
                return None  # only white space is known, not what the response begins with
            piece = piece.removeprefix(source.separator)
        if target_leads:
            piece = target.separator + piece
    return first_piece(target, piece)


def first_piece(target: Side, text: bytes) -> int | None:
    """The target token of these bytes, else the first that the target cuts off them, else the longest they begin with."""
    try:
        own = target.cut(text.decode())
    except UnicodeDecodeError:
        own = []
    equal = [i for i, piece in enumerate(target.pieces) if piece == text]
    if equal:
        return own[0] if own[:1] and own[0] in equal else equal[0]
    if own:
        return own[0]
    longest = max((piece for piece in target.pieces if piece and text.startswith(piece)), key=len, default=None)
    return None if longest is None else first_piece(target, longest)


def label_share(source: Side, theirs: Conversation, rows: list[Row], first: int, end: int) -> float:
    """f: how likely the source goes on after its token `first` as the label does, which ends at byte `end`."""
    f, row = 1.0, first + 1
    while row < theirs.text_rows and theirs.ends(row) <= end:
        f *= math.exp(rows[row].logp_1[theirs.answer[row]])
        row += 1
    if row < theirs.text_rows and theirs.begins[row] < end:
        left = theirs.response[theirs.begins[row] : end]
        known = {i for i in [*rows[row].stored, theirs.answer[row]] if i < len(source.pieces)}
        f *= sum(math.exp(rows[row].logp_1[i]) for i in known if (source.pieces[i] or b"").startswith(left))
    return f


def project(
    source: Side, target: Side, theirs: Conversation, ours: Conversation, rows: list[Row], row: int
) -> dict[int, float]:
    """Target token -> mass that a document holds at this supervised token."""
    place = aligned(theirs, ours, row)
    if place is None:
        return {}
    mass: dict[int, float] = defaultdict(float)
    first, share = None, 0.0
    if row < ours.text_rows and place < theirs.text_rows:
        begin, middle, end = ours.begins[row], theirs.ends(place), ours.ends(row)
        if begin < middle < end:
            first = theirs.answer[place]
            share = label_share(source, theirs, rows, place, end)
            mass[ours.answer[row]] += math.exp(rows[place].logp_t[first]) * share
    for token in rows[place].stored:
        leads = place == 0 and theirs.leading, row == 0 and ours.leading
        to = target_token(source, target, token, *leads)
        if to is not None:
            mass[to] += math.exp(rows[place].logp_t[token]) * (1 - share if token == first else 1)
    return mass


# --- the choice between sources ---------------------------------------------------------------------------------------------


def vote(texts: list[str], scores: np.ndarray, strongest: int) -> int | None:
    """scores [sources, reward models]"""
    able = [i for i, text in enumerate(texts) if text.strip()]
    best = {t: np.max([scores[i] for i in able if texts[i] == t], 0) for t in dict.fromkeys(texts[i] for i in able)}
    votes = dict.fromkeys(best, 0)
    for model in range(scores.shape[1]):
        votes[max(best, key=lambda text: best[text][model])] += 1  # max takes the first of equals
    tied = [text for text in best if votes[text] == max(votes.values())]
    return texts.index(max(tied, key=lambda text: best[text][strongest])) if tied else None
