"""The method step by step: two tiny models with two tokenizers, one process, no recipe. Read it from top to
bottom.

    python examples/walkthrough.py

It makes two models, the sources alpha and beta, and teaches each of them one answer. The target begins as a
copy of alpha. One training step then fuses both into it: capture, align and project, choose, loss. The
pipeline calls the same functions of megatron_fuse and fuse_kernels.
"""

import copy
from dataclasses import dataclass

import numpy as np
import tokenizers
import torch
from fuse_kernels import TokenLosses, sparse_kl_cross_entropy
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import megatron_fuse.start  # noqa: F401
from megatron_fuse.alignment import (
    MATCHES,
    Rows,
    SourceRows,
    build_vocabulary_map,
    find_source_rows,
    project_responses,
)
from megatron_fuse.capture.distributions import sparse_rows
from megatron_fuse.capture.reading import logits_at
from megatron_fuse.capture.shards import CAPTURED, CaptureShard, Conversation
from megatron_fuse.chat import ChatFormat, EncodedConversation, load_chat_format
from megatron_fuse.dataset.collation import make_targets, padded_inputs
from megatron_fuse.errors import exit_code
from megatron_fuse.fusion_data.documents import Document, round_down_to_half
from megatron_fuse.reporting.layout import text_table
from megatron_fuse.selection.rules import min_ce
from megatron_fuse.text_safety import say
from megatron_fuse.tokenization.hugging_face import wrap_hugging_face

# A user's question and its ground truth. Alpha is taught the first answer, beta the second.
EXAMPLES = [
    ("Name a capital.", "The capital of France is Paris."),
    ("Sort: pear, fig.", "Sorted: fig, pear."),
]
TOP_K, TOP_P = 10, 0.95  # most entries of a row; entries are dropped once those before them hold this mass
TEMPERATURE = 2.0  # of the sources' distributions
LAMBDA = 0.5  # weight of the KL beside the cross-entropy


Family = tuple[type, type]  # of transformers: the config and the model


@dataclass(frozen=True)
class Model:
    name: str
    chat: ChatFormat  # its tokenizer and chat template
    network: torch.nn.Module

    def encode(self, example: tuple[str, str]) -> EncodedConversation:
        """Prompt, response and stop token, as this model reads them.

        `supervised` marks the response and the stop token.
        """
        question, answer = example
        return self.chat.encode_conversation([{"role": "user", "content": question}], answer)

    def token(self, token: int) -> str:
        """A token as text. Special tokens have no bytes, so that they have a name instead."""
        tokenizer = self.chat.tokenizer
        return tokenizer.token_text(token) or repr(tokenizer.decode([token]))


def make_model(
    name: str, family: Family, template: str, specials: list[str], words: str, vocab_size: int
) -> Model:
    """A random model with its own byte-level BPE tokenizer, trained on these words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # all 256 bytes, so that it can spell every text
    options = {"special_tokens": specials, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator([words], trainers.BpeTrainer(vocab_size=vocab_size, **options))
    tokenizer = wrap_hugging_face(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=specials[-1]), name
    )
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config, architecture = family
    network = architecture(config(vocab_size=tokenizer.vocab_size, **sizes))
    return Model(name, load_chat_format(tokenizer, template, where=f"sources.{name}"), network.eval())


def teach(source: Model, example: tuple[str, str], steps: int = 50) -> None:
    """Ordinary fine-tuning on one answer, so that each source knows something that the other one does not."""
    encoded = source.encode(example)
    ids = torch.from_numpy(encoded.ids.astype(np.int64))[None]
    labels = ids.masked_fill(~torch.from_numpy(encoded.supervised), -100)
    optimizer = torch.optim.AdamW(source.network.parameters(), lr=3e-3)
    for _ in range(steps):
        source.network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def capture(source: Model, example: tuple[str, str]) -> CaptureShard:
    """The source's distributions at every supervised token of the ground truth, in its own tokens."""
    # The logits at position t predict token t + 1. So the FIRST response token is predicted at the last
    # prompt position. The last row predicts the stop token, which is supervised too: without it the target
    # would never learn to end an answer.
    encoded = source.encode(example)
    positions = torch.from_numpy(np.flatnonzero(encoded.supervised) - 1)
    # The stop token is predicted, never read.
    read = torch.from_numpy(encoded.ids[:-1].astype(np.int64))[None]
    with torch.inference_mode():
        logits = logits_at(source.network, read, torch.ones_like(read), positions)  # [rows, vocabulary]
    # A row keeps its likeliest entries and the log-sum-exp over the WHOLE vocabulary: at T = 1 for
    # cross-entropies, and at TEMPERATURE for the KL, because the mass outside the entries at T = 2 does not
    # follow from probabilities at T = 1.
    labels = torch.from_numpy(encoded.ids[encoded.supervised].astype(np.int64))
    options = {"top_k": TOP_K, "top_p": TOP_P, "filter": "full_vocabulary", "temperatures": [TEMPERATURE]}
    rows = sparse_rows(logits, labels, **options)
    return CaptureShard.of([Conversation(example[0], encoded)], np.array([CAPTURED]), rows)


def project(source: Model, captured: CaptureShard, target: Model, example: tuple[str, str]) -> Document:
    """The example in the target's tokens, with the source's distributions in the target's vocabulary."""
    # Two tokenizers share nothing but the bytes of the response. A target position takes the source's row
    # that has read exactly the same bytes. The bytes come from the vocabularies. Special tokens have none
    # there: a stop token covers one byte behind the response, which stands for its end. A position inside a
    # source token has no such row, and only cross-entropy teaches it.
    encoded = target.encode(example)
    logprobs = captured.logprobs(1, TEMPERATURE)  # by column 1 of the log-sum-exps; column 0 is that of T = 1
    rows = SourceRows(
        tokenizer=source.chat.tokenizer,
        spans=captured.spans(0),
        rows=Rows(captured.counts, captured.entry_ids, logprobs),
        temperature=TEMPERATURE,
        token_logprobs=captured.token_logprobs,
        logsumexp=captured.lse[:, 0],
        logsumexp_temperature=captured.lse[:, 1],
    )
    # A source token becomes the target token with the same bytes, else the first piece of the target's
    # tokenization of these bytes. Entries that meet on one token add up. What has no place in the target's
    # vocabulary joins the tail, 1 - the sum of the row.
    vocabulary_map = build_vocabulary_map(
        source.chat.tokenizer,
        target.chat.tokenizer,
        source_stop=source.chat.stop_id,
        target_stop=target.chat.stop_id,
        source_separator=source.chat.separator,  # the white space that a template puts before a response
        target_separator=target.chat.separator,
    )
    projected, match, _ = project_responses(rows, encoded.spans, vocabulary_map, unmatched="skip")
    # As on disk; rounded down, so that a row never has more mass than 1.
    half = round_down_to_half(projected.logprobs)
    return Document(encoded.ids, encoded.supervised, projected.counts, projected.ids, half, match)


def choose(captures: list[CaptureShard]) -> int:
    """The place of the source that understands the ground truth of one example best: that with the least
    cross-entropy.
    """
    # In nats over the whole response, stop token left out. Nats per token would favour the source that cuts
    # it into more tokens.
    names = ("ce_sum", "lossy", "response_tokens")
    ce, lossy, tokens = (np.array([[getattr(captured, name)[0] for captured in captures]]) for name in names)
    return int(
        min_ce(ce, lossy.astype(bool), response_bytes=captures[0].response_bytes, response_tokens=tokens)[0]
    )


def fusion_loss(target: Model, documents: list[Document]) -> tuple[torch.Tensor, TokenLosses]:
    """Sum over all supervised tokens of (CE + LAMBDA * KL) / N, and its parts.

    N: supervised tokens of the whole batch.
    """
    # make_targets shifts as capture does: label and teacher's row of a token are put at the position BEFORE
    # it. Prompts and padding have no label and weight 0.
    count = supervised_tokens(documents)
    inputs = padded_inputs(documents, len(documents), max(len(document.tokens) for document in documents) - 1)
    arrays = make_targets(documents, [(1 / count, LAMBDA / count)] * len(documents), inputs, TOP_K + 1)
    targets = {name: torch.from_numpy(array).flatten(0, 1) for name, array in vars(arrays).items()}
    logits = target.network(torch.from_numpy(inputs.tokens)).logits.flatten(0, 1)  # [positions, vocabulary]
    # The gradient is written over the logits: nobody may read them after this call.
    losses = sparse_kl_cross_entropy(logits, **targets)
    return losses.loss.sum(), losses


def supervised_tokens(documents: list[Document]) -> int:
    return sum(int(document.supervised.sum()) for document in documents)


def show(title: str, heading: list[str], rows: list[list[str]]) -> None:
    say("\n".join(["", title, *text_table((heading, rows))]))


def show_capture(source: Model, captured: CaptureShard) -> None:
    """A line per row: the token that came, its bytes of the response and its probability; the mass of the
    entries, and the tail.
    """
    # 0: the log-sum-exps at T = 1.
    mass = Rows(captured.counts, captured.entry_ids, captured.logprobs(0, 1.0)).kept()
    rows = []
    for row, token in enumerate(captured.tokens):
        numbers = [np.exp(captured.token_logprobs[row]), mass[row], 1 - mass[row]]
        place = f"{captured.starts[row]}-{captured.ends[row]}"
        rows.append(
            [source.token(token), place, str(captured.counts[row]), *(f"{number:.3f}" for number in numbers)]
        )
    show(
        f"1. Capture: {source.name}, T = 1",
        ["token", "bytes", "entries", "probability", "mass", "tail"],
        rows,
    )


def show_projection(source: Model, captured: CaptureShard, target: Model, document: Document) -> None:
    """A line per supervised token of the target: the source's row that it takes, and what this row says in
    its vocabulary.
    """
    spans = target.encode(EXAMPLES[1]).spans
    aligned, inside = find_source_rows(captured.spans(0), spans)
    mass = Rows(document.counts, document.teacher_ids, document.teacher_logprobs).kept()
    first = np.cumsum(document.counts) - document.counts  # the likeliest entry of each row
    rows = []
    for row, token in enumerate(spans.tokens):
        of_source = ("inside " if inside[row] else "") + source.token(captured.tokens[aligned[row]])
        likeliest = target.token(document.teacher_ids[first[row]]) if document.counts[row] else "-"
        place, match = f"{spans.starts[row]}-{spans.ends[row]}", MATCHES[document.match[row]]
        entries = str(document.counts[row])
        rows.append([target.token(token), place, of_source, match, entries, likeliest, f"{mass[row]:.3f}"])
    heading = ["token", "bytes", f"row of {source.name}", "match", "entries", "likeliest", "mass"]
    show(f"2. Align and project: {source.name} -> target, T = {TEMPERATURE:g}", heading, rows)


def main() -> None:
    # Alpha's tokenizer knows few pieces, beta's whole words. Their templates and stop tokens differ too.
    torch.manual_seed(1)
    words = " ".join(text for example in EXAMPLES for text in example)
    llama, neox = (LlamaConfig, LlamaForCausalLM), (GPTNeoXConfig, GPTNeoXForCausalLM)
    few = "the capital is: the pear is sorted"
    alpha = make_model("alpha", llama, "chatml", ["<|im_start|>", "<|im_end|>"], few, 280)
    beta = make_model("beta", neox, "vicuna_v1.1", ["</s>"], words, 330)
    sources = [alpha, beta]
    for source, example in zip(sources, EXAMPLES, strict=True):
        teach(source, example)
    target = Model("target", alpha.chat, copy.deepcopy(alpha.network))

    # Every source reads every example once. No source is needed after this.
    captures = [[capture(source, example) for source in sources] for example in EXAMPLES]
    for source, captured in zip(sources, captures[1], strict=True):
        show_capture(source, captured)

    # The rows of all sources are projected, also where they lose, so that another rule of choice needs no new
    # capture.
    projected = [
        [
            project(source, captured, target, example)
            for source, captured in zip(sources, of_example, strict=True)
        ]
        for example, of_example in zip(EXAMPLES, captures, strict=True)
    ]
    for source, captured, document in zip(sources, captures[1], projected[1], strict=True):
        show_projection(source, captured, target, document)

    # One winner per example teaches the target. (Of answers of the sources' own, which are not part of this
    # walk, reward models choose the best.)
    winners = [choose(of_example) for of_example in captures]
    rows = [
        [answer, *(f"{captured.ce_sum[0]:.2f}" for captured in of_example), sources[winner].name]
        for (_, answer), of_example, winner in zip(EXAMPLES, captures, winners, strict=True)
    ]
    show(
        "3. Choose: cross-entropy in nats", ["response", *(source.name for source in sources), "winner"], rows
    )
    documents = [of_example[winner] for of_example, winner in zip(projected, winners, strict=True)]

    # One optimizer step, and the loss of the same batch again.
    optimizer = torch.optim.AdamW(target.network.parameters(), lr=1e-3)
    rows = []
    for when in ("before", "after"):
        loss, parts = fusion_loss(target, documents)
        means = (part.sum().item() / supervised_tokens(documents) for part in (parts.ce, parts.kl))
        rows.append([when, *(f"{value:.4f}" for value in (loss.item(), *means))])
        if when == "before":
            loss.backward()
            optimizer.step()
    show(f"4. One training step: loss = CE + {LAMBDA} KL per token", ["step", "loss", "CE", "KL"], rows)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
