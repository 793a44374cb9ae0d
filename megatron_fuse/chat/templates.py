"""The built-in chat templates, and how every template is rendered.

A template is Jinja text in the form of Hugging Face's `chat_template`. It reads messages, tools (None if none
are offered), add_generation_prompt, bos_token and eos_token ('' if the tokenizer has none).
"""

import json
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols

from megatron_fuse.chat.limits import BoundedEnvironment, render_bounded

_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = "
    "messages[1:] %}"
)
_NO_SYSTEM = _SYSTEM + "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions."
)
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request."
)

TEMPLATES: dict[str, str] = {
    "vicuna_v1.1": (
        _SYSTEM + "{% else %}{% set system = '" + _VICUNA_SYSTEM + "' %}{% set turns = messages %}{% "
        "endif %}{% if system %}{{ system + ' ' }}{% endif %}{% for turn in turns %}{% if "
        "turn['role'] == 'user' %}{{ 'USER: ' + turn['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' "
        "+ turn['content'] + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
        "'ASSISTANT:' }}{% endif %}"
    ),
    "llama2": (
        _NO_SYSTEM + "{% for turn in turns %}{% set content = turn['content'] %}{% if loop.first and "
        "system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}{% endif "
        "%}{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% else "
        "%}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for turn in messages %}"
        "{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for turn in messages %}{{ '<|start_header_id|>' + turn['role'] + "
        "'<|end_header_id|>\\n\\n' + turn['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if "
        "add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif "
        "%}"
    ),
    "alpaca": (
        _SYSTEM + "{% else %}{% set system = '" + _ALPACA_SYSTEM + "' %}{% set turns = messages %}{% "
        "endif %}{% if system %}{{ system + '\\n\\n' }}{% endif %}{% for turn in turns %}{% if "
        "turn['role'] == 'user' %}{{ '### Instruction:\\n' + turn['content'] + '\\n\\n' }}{% else "
        "%}{{ '### Response:\\n' + turn['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor "
        "%}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    # The formats of two reward models (docs/reward_models.md). Their model cards show one turn each.
    # Eurus-RM's card leaves BOS to the tokenizer, and puts no end token after the last answer.
    "starling_rm": (
        _NO_SYSTEM + "{{ bos_token }}{% for turn in turns %}{% set content = turn['content'] %}{% "
        "if loop.first and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + "
        "content %}{% endif %}{% if turn['role'] == 'user' %}{{ '[INST] ' + content + ' ' + "
        "eos_token + ' [/INST]' }}{% else %}{{ ' ' + content + eos_token }}{% endif %}{% endfor "
        "%}"
    ),
    "eurus_rm": (
        _NO_SYSTEM + "{% for turn in turns %}{% set content = turn['content'] %}"
        "{% if loop.first and system %}{% set content = system + '\\n\\n' + content %}{% endif %}"
        "{% if turn['role'] == 'user' %}{{ '[INST] ' + content + ' [/INST]' }}"
        "{% else %}{{ ' ' + content + ('' if loop.last else eos_token) }}{% endif %}"
        "{% endfor %}"
    ),
}


def render(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    add_generation_prompt: bool,
    **specials: str,
) -> str:
    """Renders a template with the names that transformers defines for it, under the limits of chat/limits.py.

    The same messages give the same text on every day and machine.
    Raises jinja2.TemplateError, and any Python error that a faulty template causes.
    """
    names = specials | {"documents": None}
    return render_bounded(
        _compile(template), messages, tools, add_generation_prompt=add_generation_prompt, **names
    )


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training in some templates.

    Here it only prints its content.
    """

    tags: set[str] = {"generation"}  # noqa: RUF012, as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compile(template: str) -> jinja2.Template:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.bound("tojson", _to_json)
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _fixed_date,
        "date_string": FIXED_DATE,
    }
    return environment.from_string(template)


def _fixed_date(form: str) -> str:
    """A fixed day. transformers gives today's date, but artifacts must not change from day to day.

    It is the day that Llama 3's templates use if they get no date.
    """
    return datetime(2024, 7, 26).strftime(form)


FIXED_DATE = _fixed_date("%d %b %Y")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON text without escaped HTML characters, which Jinja's own filter would write."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
