"""Talk to a Hugging Face model directory, the fused one for instance.

    python tools/chat.py examples/quickstart/build/run/export
    python tools/chat.py MODEL --prompt "What is 12 + 30?" --temperature 0

Every line is one user turn of a conversation; an empty line starts a new one, end of input leaves.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from megatron_fuse.errors import UserError, exit_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").exists():
        raise UserError(f"{arguments.model} holds no config.json: give a Hugging Face model directory")
    if arguments.max_new_tokens < 1 or not arguments.temperature >= 0:
        raise UserError("--max-new-tokens must be at least 1, and --temperature at least 0")
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, local_files_only=True, dtype="auto")
    except Exception as error:  # transformers raises many kinds for missing or damaged files
        raise UserError(f"{arguments.model} cannot be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"{arguments.model} has no chat template: put a chat_template.jinja beside its tokenizer")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 else {"do_sample": False}
    )

    def answer(messages: list[dict[str, str]]) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs.pop("token_type_ids", None)  # which Llama's tokenizer gives and no decoder takes
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=arguments.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    beginning = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.prompt is not None:
        answer([*beginning, {"role": "user", "content": arguments.prompt}])
        return
    messages = list(beginning)
    for line in user_lines():
        if not line:
            messages = list(beginning)
            continue
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(messages)})


def user_lines() -> Iterator[str]:
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print()
            return
        yield line.strip()


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
