"""Chat templates of strangers end, stay small and print the same at every run; those of honest models
print what they always did.
"""

import json
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from small_tokenizers import small_tokenizer

from megatron_fuse.chat import load_chat_format
from megatron_fuse.chat.meter import TemplateLimit
from megatron_fuse.chat.templates import TEMPLATES, render
from megatron_fuse.errors import UserError

USER = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "Be kind. "},
    {"role": "user", "content": " Hi <b> & 'you' "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello é 😀"},
    {"role": "user", "content": "Who?\nWhere?"},
]

_STATE = "{% set ns = namespace(s='ab', l=['ab']) %}{% set other = namespace(l=['ab']) %}"
_REPEAT = "{% for i in range(200) %}"
_END = "{% endfor %}"
_DOUBLE = "{% macro f(n) %}{% if n %}x{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": _DOUBLE + "{{ f(60) }}",
    "a recursive loop": "{% for x in range(9999) recursive %}{% if loop.depth < 9 %}{{ loop(range(9999)) "
    "}}{% endif %}{% endfor %}",
    "comparing nested lists": _STATE
    + _REPEAT
    + "{% set ns.l = [ns.l, ns.l] %}{% set other.l = [other.l, other.l] %}"
    "{% if ns.l == other.l %}{% endif %}" + _END,
    "a power": "{% set x = 9 ** (10 ** 9) %}",
    "squares": "{% set ns = namespace(n=7) %}" + _REPEAT + "{% set ns.n = ns.n * ns.n %}" + _END,
    "rounding": "{{ 15|round(-1000000000) }}",
}
LARGE = {
    "times": "{{ 'a' * 10000000000 }}",
    "times, 150 seconds in a tokenizer": "{{ 'a' * 30000000 }}",
    "times, in a constant": "{% set x = [0] * 10000000000 %}",
    "indented JSON": "{{ messages|tojson(indent=1000000000) }}",
    "JSON indented by a text": "{{ messages|tojson(indent='x' * 1000000) }}",
    "centered": "{{ 'a'|center(10000000000) }}",
    "a method": "{{ messages[0].content.ljust(10000000000) }}",
    "a method taken by its name": "{{ (messages[0].content|attr('zfill'))(10000000000) }}",
    "bytes of a number": "{{ (5).to_bytes(10000000000, 'big') }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent, its width an argument": "{{ '%*d' % (10000000000, 1) }}",
    "percent, many places": "{{ ('%(a)s' * 100000) % {'a': 'b' * 100000} }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format, its width an argument": "{{ '{:{w}}'.format(1, w='10000000000') }}",
    "format, many places": "{{ ('{0}' * 100000).format('b' * 100000) }}",
    "format, mapped": "{{ ['%10000000000d']|map('format', 1)|list }}",
    "replaced": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "replaced by the filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "joined": "{{ ('a' * 100000).join(range(99999)|map('string')) }}",
    "joined by the filter": "{{ range(99999)|map('string')|join('a' * 100000) }}",
    "indented": "{{ 'a\nb'|indent(10000000000) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "translated": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "wrapped": "{{ ('a b ' * 100000)|wordwrap(1, wrapstring='x' * 100000) }}",
    "batches": "{{ [1]|batch(10000000000, 'x')|list }}",
    "slices": "{{ [1]|slice(10000000000)|list }}",
    "doubled by +": _STATE + _REPEAT + "{% set ns.s = ns.s + ns.s %}" + _END,
    "doubled by ~": _STATE + _REPEAT + "{% set ns.s = ns.s ~ ns.s %}" + _END,
    "doubled by a block": _STATE + _REPEAT + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}" + _END,
    "doubled lists": _STATE + _REPEAT + "{% set ns.l = ns.l + ns.l %}" + _END,
    "nested lists": _STATE + _REPEAT + "{% set ns.l = [ns.l, ns.l] %}" + _END + "{{ ns.l }}",
    "nested dicts": _STATE + _REPEAT + "{% set ns.l = dict(a=ns.l, b=ns.l) %}" + _END + "{{ ns.l|tojson }}",
    "nested namespaces": _STATE
    + _REPEAT
    + "{% set ns.l = namespace(a=ns.l, b=ns.l) %}"
    + _END
    + "{{ ns.l }}",
    "many copies": _STATE
    + "{% for i in range(99999) %}{% set ns.l = ns.l + [('ab' * 100000)[1:]] %}{% endfor %}",
    "its own text": "{% for a in range(99) %}{% for b in range(999) %}" + "x" * 50000 + _END + _END,
    "a macro's own text": _DOUBLE.replace("x", "x" * 1000) + "{{ f(25) }}",
    "the template itself": "x" * 300_000,
    "the date": "{{ strftime_now('%Y' * 1000000) }}",
}
OTHER_AT_EVERY_RUN = {
    "random": "{{ [1, 2, 3]|random }}",
    "random, mapped": "{{ ['ab']|map('random')|list }}",
    "lipsum": "{{ lipsum() }}",
    "the address of a generator": "{{ messages|map('upper') }}",
    "the address of a method": "{{ 'x' ~ messages.index }}",
}
HOSTILE = ENDLESS | LARGE | OTHER_AT_EVERY_RUN

# Each in a process of its own limits: without those of the code, the machine would suffer.
LIMITED = """
import json, resource, sys, time
from megatron_fuse.chat.templates import render
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
messages = [{"role": "user", "content": "Hi"}]
for name, template in json.load(sys.stdin).items():
    try:
        outcome = "printed " + render(template, messages, add_generation_prompt=True, eos_token="</s>")[:50]
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    print(json.dumps([name, outcome]), flush=True)
# Not ru_maxrss: it counts what the process was before its exec, a copy of the one that started it.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(["peak", int(peak)]))
"""


def test_hostile_templates_are_refused_within_little_time_and_memory() -> None:
    child = subprocess.run(
        [sys.executable, "-c", LIMITED],
        input=json.dumps(HOSTILE),
        capture_output=True,
        text=True,
        timeout=600,
    )
    outcomes = dict(map(json.loads, child.stdout.splitlines()))
    assert list(outcomes) == [*HOSTILE, "peak"], f"stopped behind {list(outcomes)[-1:]}: {child.stderr}"
    assert outcomes.pop("peak") < 1_000_000  # kB
    assert {
        name: said
        for name, said in outcomes.items()
        if not said.startswith(("TemplateLimit", "RecursionError"))
    } == {}


@pytest.mark.parametrize("name", ["nested ranges", "times", "random"])
def test_a_template_is_refused_when_it_is_chosen_and_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "stranger.jinja"
    path.write_text(HOSTILE[name] + TEMPLATES["alpaca"])
    with pytest.raises(
        UserError, match=r"sources\.x\.chat_template: .*/stranger\.jinja cannot be used: "
    ) as refused:
        load_chat_format(small_tokenizer("llama_json"), str(path), where="sources.x")
    assert len(str(refused.value)) <= 600


@pytest.mark.parametrize("name", ["nested ranges", "times", "doubled by +", "random"])
def test_a_template_that_behaves_until_a_row_provokes_it_is_refused_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / "sleeper.jinja"
    path.write_text(
        "{% if 'now' in messages[0].content %}" + HOSTILE[name] + "{% endif %}" + TEMPLATES["alpaca"]
    )
    form = load_chat_format(small_tokenizer("llama_json"), str(path))
    form.encode_conversation(USER, "fine")
    with pytest.raises(UserError, match=r"sleeper\.jinja cannot be used: "):
        form.encode_conversation([{"role": "user", "content": "now"}], "fine")


def test_what_a_template_raises_does_not_flood_the_error() -> None:
    form = load_chat_format(small_tokenizer("llama_json"), "alpaca")
    object.__setattr__(form, "template", "{{ raise_exception('\x1b[2J' + 'x' * 100000) }}")
    with pytest.raises(UserError) as refused:
        form.render_prompt(USER)
    assert (
        len(str(refused.value)) <= 600
        and "\x1b" not in str(refused.value)
        and r"\x1b[2J" in str(refused.value)
    )


# What published templates are made of. Each must print what it prints without limits.
LLAMA_3_1 = """{{- bos_token }}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
"""
IDIOMS = {
    "loop variables": "{% for m in messages %}{{ loop.index0 }}{{ loop.index }}{{ loop.revindex "
    "}}{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.cycle('a', 'b') }}{{ "
    "loop.previtem.role }}{{ loop.nextitem.role }}{{ loop.changed(m.role) }}{% endfor %}",
    "length before the first turn": "{% for m in messages %}{% if loop.length > 3 %}{{ m.role }}{% endif "
    "%}{% endfor %}",
    "a filtered loop": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.content }}{% else "
    "%}none{% endfor %}",
    "break, continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ "
    "m.role }}{% break %}{% endfor %}",
    "pairs": "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}{% for k in "
    "messages[0] %}{{ k }}{% endfor %}",
    "an empty loop": "{% for t in nothing %}{% else %}no tools{% endfor %}{% for t in tools or [] %}{{ t "
    "}}{% endfor %}",
    "reversed": "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}{{ messages[-1]['content'] }}{{ "
    "messages[1:][0].content[2:-1] }}",
    "namespace": "{% set ns = namespace(last=-1, text='') %}{% for m in messages %}{% if m.role == "
    "'user' %}{% set ns.last = loop.index0 %}{% set ns.text = ns.text + m.content ~ '\n' ~ loop.index "
    "%}{% endif %}{% endfor %}{{ ns.last }}{{ ns.text }}",
    "thinking": "{% for m in messages %}{% if '</think>' in m.content %}{{ "
    "m.content.split('</think>')[-1].lstrip('\n') }}"
    "{{ m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1] }}{% endif %}{% endfor %}",
    "filters": "{% for m in messages %}{{ m.content|trim|upper|replace('H', 'h')|e }}{{ "
    "m.content|length }}{{ m.role|capitalize }}{{ m.content|indent(2, first=True) }}{{ "
    "m|tojson(indent=2) }}{{ m|tojson }}{{ m.missing|default('-') }}{% endfor %}",
    "lists": "{{ messages|map(attribute='role')|join(', ') }}{{ messages|selectattr('role', "
    "'equalto', 'user')|list|length }}{{ messages|rejectattr('role', 'equalto', "
    "'user')|map(attribute='content')|list }}{{ (messages|first).role }}{{ messages|last }}{{ "
    "['b', 'a']|sort|unique|list }}{{ {'b': 1, 'a': 2}|dictsort }}{{ [1, 2, 3]|sum }}{{ [3, "
    "1]|max }}{{ [1,2,3]|batch(2, 'x')|list }}",
    "methods": "{{ messages[1].content.strip().startswith('Hi') }}{{ '{} and {:>6}|{0!r}'.format('a', 2) if "
    "false else '{:>6}|{}'.format(2, 'b') }}"
    "{{ '%s-%5.1f-%%' % ('a', 2.5) }}{{ ', '.join(['a', 'b']) }}{{ 'a'.center(9, '*') }}{{ "
    "'abc'.replace('b', 'xx').title() }}",
    "numbers": "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 3 * 4 + 1 - 2 }}{{ 1.5|round(1) }}{{ '12'|int + 1 "
    "}}{{ 'ab' * 3 }}{{ [0] * 3 }}{{ -1 }}",
    "tests": "{{ messages is iterable }}{{ x is defined }}{{ none is none }}{{ 'a' is string }}{{ "
    "messages[0] is mapping }}{{ 'a' in ('a', 'b') }}",
    "macros": "{% macro turn(m, mark='#') %}{{ mark }}{{ m.role }}: {{ m.content }}{{ caller() if caller "
    "}}{% endmacro %}{% for m in messages %}"
    "{{ turn(m) }}{% call turn(m, mark='@') %}!{% endcall %}{% endfor %}",
    "blocks": "{% set text %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ text|length "
    "}}{% filter upper %}{{ text }}{% endfilter %}",
    "joiner, cycler": "{% set j = joiner(', ') %}{% set c = cycler('a', 'b') %}{% for m in messages %}{{ "
    "j() }}{{ c.next() }}{% endfor %}",
    "values that are printed": "{{ messages }}{{ {'a': [1, none, true, 1.5]} }}{{ none }}{{ x }}{{ (1, 'a') "
    "}}{{ [messages[0].items()|list] }}",
    "a recursive loop": "{% for n in [[1, [2, 3]], [4]] recursive %}{% if n is iterable %}({{ loop(n) }}){% "
    "else %}{{ n }}{% endif %}{% endfor %}",
    "unpacking": "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set pair = (a, b) %}{{ pair[1] }}{% for a, (b, c) "
    "in [(1, (2, 3))] %}{{ a + b + c }}{% endfor %}",
    "a date": "{{ strftime_now('%Y-%m-%d %B') }}{{ date_string }}",
    "Llama 3.1": LLAMA_3_1,
}


def _unlimited(template: str, messages: list[dict[str, str]], **names: object) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"date_string": "26 Jul 2024", "strftime_now": _july}
    return environment.from_string(template).render(messages=messages, tools=None, documents=None, **names)


def _july(form: str) -> str:
    from datetime import datetime

    return datetime(2024, 7, 26).strftime(form)


@pytest.mark.parametrize("name", [*IDIOMS, *TEMPLATES])
def test_honest_templates_print_what_they_print_without_limits(name: str) -> None:
    template = (IDIOMS | TEMPLATES)[name]
    for messages in (TALK, TALK[1:], USER):
        for prompt in (True, False):
            names = {"add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>"}
            try:
                wanted = _unlimited(template, messages, **names)
            except jinja2.TemplateError as error:
                with pytest.raises(type(error)):
                    render(template, messages, **names)
            else:
                assert render(template, messages, **names) == wanted


def test_the_limits_grow_with_the_conversation() -> None:
    """A template that collects its text turn by turn, and one that looks at every turn for every turn."""
    collects = (
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% "
        "endfor %}{{ ns.t }}"
    )
    compares = (
        "{% set ns = namespace(n=0) %}{% for a in messages %}{% for b in messages %}{% if a.role == "
        "b.role %}{% endif %}{% endfor %}{% endfor %}"
    )
    many = [{"role": "user", "content": "x" * 1000}] * 600
    assert len(render(collects, many, add_generation_prompt=True)) == 600_000
    render(compares, many, add_generation_prompt=True)
    long = [{"role": "user", "content": "word " * 600_000}]
    text = "{{ messages[0].content.strip() + eos_token }}{{ messages[0].content.split()|length }}"
    assert render(text, long, add_generation_prompt=True, eos_token="</s>").endswith("</s>600000")


def test_a_message_may_speak_of_addresses() -> None:
    told = [{"role": "user", "content": "a crash at 0x7f00"}]
    assert "at 0x7f00" in render(TEMPLATES["alpaca"], told, add_generation_prompt=True, eos_token="")
    with pytest.raises(TemplateLimit, match="address"):
        render("{{ messages|map('upper') }}", USER, add_generation_prompt=True)


def test_two_runs_print_the_same_on_any_day_in_any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import json, sys\nfrom megatron_fuse.chat.templates import render\n"
        "for t in json.load(sys.stdin): print(render(t, [{'role': 'user', 'content': 'x'}], "
        "add_generation_prompt=True, bos_token=''))"
    )
    texts = []
    for seed, zone in (("1", "Pacific/Kiritimati"), ("2", "America/Adak")):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        monkeypatch.setenv("TZ", zone)
        child = [sys.executable, "-c", script]
        asked = json.dumps([LLAMA_3_1, IDIOMS["a date"], IDIOMS["lists"]])
        texts.append(subprocess.run(child, input=asked, capture_output=True, text=True, check=True).stdout)
    assert texts[0] == texts[1] and "Today Date: 26 Jul 2024" in texts[0]
