"""Chat with a model in a Hugging Face directory, for example with the fused one.

    megatron-fuse chat examples/quickstart/build/run/export
    megatron-fuse chat MODEL --prompt "What is 12 + 30?" --temperature 0

Every line is one user turn of a conversation. An empty line starts a new conversation. The end of the input
ends the command. Control characters that the model writes are shown as escapes.
"""

import argparse
import sys
from collections.abc import Iterator

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import path_argument
from megatron_fuse.start import importing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path_argument)
    parser.add_argument("--prompt", help="answer this one prompt and exit")
    parser.add_argument("--system", help="system message")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0: always the likeliest token"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )


def run(arguments: argparse.Namespace) -> None:
    if not (arguments.model / "config.json").exists():
        raise UserError(f"{arguments.model} has no config.json. Name a Hugging Face model directory.")
    if arguments.max_new_tokens < 1 or not arguments.temperature >= 0:
        raise UserError("--max-new-tokens must be at least 1, and --temperature at least 0")
    with importing():
        from megatron_fuse.huggingface.talk import answer, load, readable
    chat, model = load(arguments.model, arguments.system, arguments.trust_remote_code)
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature}
        if arguments.temperature > 0
        else {"do_sample": False}
    )
    generation = sampling | {"max_new_tokens": arguments.max_new_tokens}
    if arguments.prompt is not None:
        answer(chat, model, [{"role": "user", "content": readable(arguments.prompt)}], generation)
        return
    messages: list[dict[str, str]] = []
    for line in _user_lines():
        if not line:
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(chat, model, messages, generation)})


def _user_lines() -> Iterator[str]:
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            print()
            return
        yield line.decode("utf-8", "replace").strip()
