"""What a source in Megatron costs, in processor time: against the model in process, and divided over ranks.

    python benchmarks/megatron_capture.py --source-tokenizer TOKENIZER.model --instructions FILE.jsonl \
        [--examples 96]

The model is the random Llama of capture_speed.py, of about 50 million parameters. Each case runs in
processes of its own, of one thread, and all cases take turns. Times are processor seconds, added up over the
ranks: on a machine with fewer cores than ranks, elapsed time would say little.

    TP=1    Megatron in one process. Baseline: the backend hf
    TP=2    Baseline: TP=1. Both ranks make the same batches, norms and residuals
    bytes   what the ranks of TP=4 send to merge the largest logits of a row. The hidden states that the ranks
            exchange are not counted: every forward pass of this layout has them
"""

import argparse
import os
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from capture_speed import SIZES, capture_recipe, read_conversations
from capture_speed import add_arguments as add_inputs
from table import Measurement, run

from megatron_fuse.capture.reading import SourceReader
from megatron_fuse.chat import load_chat_format
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.processes import end_with_pool
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.tokenization import load_tokenizer

_TOP_K = 10


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The project wants TP=1 at most 1.05 times the backend hf, TP=2 at most 1.15 times TP=1, and at most
    4 (12 k + 40) bytes a row at TP=4.
    """
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        _save_model(options, Path(directory))
        cases = [stack.enter_context(_Case(options, directory, ranks)) for ranks in (0, 1, 2)]
        turns = [[case.seconds() for case in cases] for _ in range(options.repeats + 1)]
        in_process, alone, divided = (median(each) for each in zip(*turns[1:], strict=True))
        with _Case(options, directory, 4) as four:
            four.seconds()
            rows, sent = four.rows, four.sent
    wanted = 4 * (12 * _TOP_K + 40)
    return [
        Measurement("capture at TP=1", alone, "CPU s", "backend hf", in_process, "ratio <= 1.05"),
        Measurement("capture at TP=2, both ranks", divided, "CPU s", "TP=1", alone, "ratio <= 1.15"),
        Measurement("merging at TP=4, k = 10", sent / rows, "bytes/row", wanted=f"<= {wanted}"),
    ]


def _save_model(options: argparse.Namespace, directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = load_tokenizer(options.source_tokenizer).vocab_size
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": options.seq_length, **SIZES}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(directory)


@dataclass(frozen=True)
class _Done:
    """What one rank did: processor seconds, supervised rows, and bytes sent to merge them."""

    seconds: float
    rows: int
    sent: int


class _Case:
    """The processes of one case. ranks: the tensor-parallel size; 0: the backend hf."""

    def __init__(self, options: argparse.Namespace, directory: str, ranks: int) -> None:
        context, port = get_context("spawn"), _free_port()
        self._pipes, self._processes = [], []
        for rank in range(max(ranks, 1)):
            ours, theirs = context.Pipe()
            arguments = (theirs, options, directory, ranks, rank, port)
            self._processes.append(context.Process(target=_serve, args=arguments))
            self._pipes.append(ours)
        self.rows = self.sent = 0

    def __enter__(self) -> "_Case":
        for process in self._processes:
            process.start()
        self._receive()  # all have loaded the model
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(False)
        for process in self._processes:
            process.join()

    def seconds(self) -> float:
        """Processor seconds of all ranks for the capture of the conversations."""
        for pipe in self._pipes:
            pipe.send(True)
        done = self._receive()
        self.rows, self.sent = max(each.rows for each in done), sum(each.sent for each in done)
        return sum(each.seconds for each in done)

    def _receive(self) -> list[Any]:
        return [pipe.recv() for pipe in self._pipes]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(
    pipe: Connection, options: argparse.Namespace, directory: str, ranks: int, rank: int, port: int
) -> None:
    """One process of a case: captures the conversations each time it is asked."""
    end_with_pool()
    torch.set_num_threads(1)
    chat = load_chat_format(load_tokenizer(options.source_tokenizer), "vicuna_v1.1")
    conversations = read_conversations(chat, options)
    recipe = _recipe_of(options, directory, ranks)
    if ranks == 0:
        model = load_causal_lm(recipe.sources["source"])
        capture, sent = SourceReader(recipe, "source", model).capture_shard, [0]
    else:
        capture, sent = _rank_of_megatron(recipe, ranks, rank, port)
    pipe.send(None)
    while pipe.recv():
        before, sent[0] = time.process_time(), 0
        shard = capture(conversations)
        seconds = time.process_time() - before
        pipe.send(_Done(seconds, 0 if shard is None else len(shard.counts), sent[0]))


def _recipe_of(options: argparse.Namespace, directory: str, ranks: int) -> Recipe:
    content = capture_recipe(options).model_dump(mode="json", by_alias=True)
    source = {"model": directory, "dtype": "fp32"}
    if ranks:
        source |= {"backend": "megatron", "parallel": {"tensor_model_parallel_size": ranks}}
    content |= {"sources": {"source": source}}
    content["capture"]["top_k"] = _TOP_K
    return make_recipe(content)


def _rank_of_megatron(recipe: Recipe, ranks: int, rank: int, port: int) -> tuple[Any, list[int]]:
    """(capture of conversations, [bytes that this rank has sent to merge rows])."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from megatron_fuse.runtime import start_runtime

    runtime = start_runtime(tensor_model_parallel_size=ranks)
    from megatron_fuse.capture.megatron_ranks import SourceRanks
    from megatron_fuse.capture.megatron_reading import MegatronReader

    group, sent = SourceRanks.of(runtime), [0]
    reader, gather = MegatronReader.load(recipe, "source", group), torch.distributed.gather

    def counted(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        # The rank that receives does not send its own part.
        sent[0] += 0 if group.is_leader else tensor.nbytes
        return gather(tensor, *arguments, **named)

    torch.distributed.gather = counted
    return (reader.capture_shard if group.is_leader else reader.take_part), sent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    parser.set_defaults(examples=96)


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
