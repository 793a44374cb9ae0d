"""Tokenizer directories of every kind, with what transformers keeps beside them, and chat templates."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from campaign import FuzzTarget
from file_damage import Mutation, mutate, mutate_file
from small_tokenizers import CHATML, make_tokenizer, small_tokenizer

from megatron_fuse.chat import load_chat_format
from megatron_fuse.chat.templates import TEMPLATES, render
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.recipe import ModelOptions
from megatron_fuse.tokenization import load_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello  world <s>"},
    {"role": "assistant", "content": " été 日本"},
    {"role": "user", "content": "Who?\n"},
]
RESPONSE = "the station 12\n 😀"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 600}


def read_tokenizer(directory: Path) -> None:
    """Loads it, and puts a conversation into ids and back."""
    tokenizer = load_tokenizer(directory)
    form = load_chat_format(
        tokenizer, None if tokenizer.chat_template else "vicuna_v1.1", where=str(directory)
    )
    encoded = form.encode_conversation(TALK, RESPONSE, every_turn=True)
    assert encoded.ids.min() >= 0 and encoded.ids.max() < tokenizer.vocab_size
    form.decode_response(encoded.ids[encoded.prompt_length :].tolist())


def read_model_format(directory: Path) -> None:
    """The road of every stage."""
    form = load_format(ModelOptions(model=str(directory), chat_template="chatml"), "sources.x")
    form.encode_conversation(TALK, RESPONSE)


def of_kind(kind: str) -> Callable[[Path], None]:
    """Writes a tokenizer with the files that its publisher would put beside it."""

    def make(directory: Path) -> None:
        make_tokenizer(kind, directory)
        _beside(directory, kind)

    return make


def _beside(directory: Path, kind: str) -> None:
    _write(directory / "config.json", CONFIG)
    _write(directory / "generation_config.json", {"eos_token_id": [2], "temperature": 0.6, "do_sample": True})
    if (directory / "tokenizer.json").exists():
        _write(
            directory / "special_tokens_map.json",
            {"eos_token": "</s>" if kind == "llama_json" else "<|endoftext|>"},
        )
        return
    special = {"sentencepiece": "<s>", "llama3": "<|begin_of_text|>"}.get(kind, "<|endoftext|>")
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(700 + n): entry | {"content": f"<|extra_{n}|>"} for n in range(2)}
    end = {"__type": "AddedToken", "content": "</s>"} if kind == "sentencepiece" else special
    settings = {"added_tokens_decoder": decoder, "eos_token": end, "pad_token": None, "legacy": False}
    settings |= {
        "add_bos_token": kind == "sentencepiece",
        "model_max_length": 4096,
        "tokenizer_class": "LlamaTokenizer",
    }
    settings |= {"chat_template": CHATML, "bos_token": special}
    _write(directory / "tokenizer_config.json", settings)
    _write(directory / "added_tokens.json", {"<|more|>": 702})
    _write(directory / "special_tokens_map.json", {"bos_token": special, "eos_token": end})


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False))


TEMPLATE_PIECES = (
    *(
        "{{ messages }}",
        "{% for a in range(99999) %}",
        "{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{% set x = [0] * 10 ** 9 %}",
    ),
    *(
        "|tojson(indent=10 ** 9)",
        "|random",
        "{{ lipsum() }}",
        "|center(10 ** 9)",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ),
    *(
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ messages[0].content.replace('', 'b' * 10 ** 5) }}",
    ),
    *(
        "{{ (messages|map('upper'))|list }}",
        "{{ cycler }}",
        "{% set ns = namespace(a=[1]) %}",
        "{{ '%1000000000d' % 1 }}",
    ),
    *(
        "{% include 'x' %}",
        "{{ ''.__class__ }}",
        "{%- generation %}",
        "\0",
        "\ud800",
        "{{ 10 ** 10 ** 10 }}",
        "{{ loop }}",
    ),
    *(
        "{% for m in messages %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
        "{{ bos_token * 100000 }}",
    ),
)


def mutate_template(path: Path, random: Random) -> Mutation:
    """Hostile pieces at the places between its tags, or damage of any text."""
    if random.random() < 0.3:
        return mutate_file(path, random) if random.random() < 0.2 else mutate(path, random)
    text = path.read_text()
    for _ in range(random.choice((1, 1, 2, 5))):
        places = [place for place in range(len(text)) if text[place : place + 1] in "{}%|' "]
        place = random.choice(places)
        text = text[:place] + random.choice(TEMPLATE_PIECES) + text[place:]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return Mutation(path.name, "text: pieces of Jinja")


def write_templates(directory: Path) -> None:
    for name, template in (TEMPLATES | {"own": CHATML}).items():
        (directory / f"{name}.jinja").write_text(template)


def read_templates(directory: Path) -> None:
    tokenizer = small_tokenizer("llama_json")
    for path in sorted(directory.glob("*.jinja")):
        form = load_chat_format(tokenizer, str(path), where="sources.x")
        try:
            text = form.render_prompt(TALK[1:])
        except UserError:
            continue  # honest templates refuse some conversations too
        assert text == form.render_prompt(TALK[1:])
    assert render(TEMPLATES["alpaca"], TALK, add_generation_prompt=True, eos_token="")


TARGETS = [
    *(
        FuzzTarget(f"tokenizer-{kind}", of_kind(kind), read_tokenizer, share=share, names=("vicuna_v1.1",))
        for kind, share in {
            "byte_level": 0.6,
            "llama_json": 0.6,
            "sentencepiece": 0.8,
            "tiktoken": 0.6,
            "llama3": 0.3,
            "t5_json": 0.2,
        }.items()
    ),
    FuzzTarget("tokenizer-of-a-model", of_kind("byte_level"), read_model_format, share=0.3),
    FuzzTarget(
        "chat-templates",
        write_templates,
        read_templates,
        files=("*.jinja",),
        share=0.4,
        change=mutate_template,
        names=("sources.x.chat_template",),
    ),
]
