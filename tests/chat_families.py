"""Chat templates of the families in use, written down in the shortest form that prints the same text, with
the special tokens that they print and what is known of each: the token that ends an answer, and where
generation begins."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import tokenizers
from small_tokenizers import CORPUS
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_fuse.chat import ChatFormat, load_chat_format
from megatron_fuse.chat.templates import TEMPLATES
from megatron_fuse.model.config_file import end_token_ids
from megatron_fuse.tokenization import load_tokenizer


@dataclass(frozen=True)
class Family:
    """template: Jinja. tokens: its special tokens, the first is EOS. stop: what ends an answer. generation:
    what the generation prompt has beyond the text before a given answer. opening: what a given answer has
    before it beyond the generation prompt.
    listed: ends in generation_config.json. bos: the first token of the template's text, where it prints one.
    calls: how many calls of tools it takes in one turn; 0 if it knows no tools."""

    template: str
    tokens: tuple[str, ...]
    stop: str
    generation: str = ""
    opening: str = ""
    separator: str = ""
    closing: str = ""
    listed: tuple[str, ...] = ()
    bos: str | None = None
    calls: int = 0


MANY = 100


def each(
    user: str,
    assistant: str,
    prompt: str,
    system: str = "",
    first: str = "",
    *,
    call: str = "",
    output: str = "",
) -> str:
    """A template that prints one text for each message: m is the message, first comes before all. call,
    output: of a turn with tool_calls and of a tool's."""
    refusal = "{{ raise_exception('no system') }}"
    if call:
        assistant = "{% if m['tool_calls'] %}" + call + "{% else %}" + assistant + "{% endif %}"
        user = user + "{% elif m['role'] == 'tool' %}" + output
    return (
        first
        + "{% for m in messages %}{% if m['role'] == 'system' %}"
        + (system or refusal)
        + "{% elif m['role'] == 'user' %}"
        + user
        + "{% else %}"
        + assistant
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + prompt
        + "{% endif %}"
    )


C = "{{ m['content'] }}"
TRIMMED = "{{ m['content'] | trim }}"
BOS = "{{ bos_token }}"
EOS = "{{ eos_token }}"
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LAST_QUERY = "{% set q = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set q.last = loop.index0 %}{% endif %}{% endfor %}"
# What Qwen3's kind makes of a message: the thought is taken from its own key, or from the text up to
# </think>.
THOUGHT = (
    "{% set thought = m['reasoning_content'] or '' %}{% set text = m['content'] %}{% if not thought and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)


# Offered tools, calls and outputs, as the families print them.
NAME, ARGUMENTS = "{{ c['function']['name'] }}", "{{ c['function']['arguments'] | tojson }}"
FIRST_OUTPUT = "{% if messages[loop.index0 - 1]['role'] != 'tool' %}"
LAST_OUTPUT = "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}"


def calls(text: str) -> str:
    return "{% for c in m['tool_calls'] %}" + text + "{% endfor %}"


def offered(before: str, each_tool: str, after: str) -> str:
    return (
        "{% if tools %}"
        + before
        + "{% for t in tools %}"
        + each_tool
        + "{% endfor %}"
        + after
        + "{% endif %}"
    )


HERMES_CALLS = calls('\n<tool_call>\n{"name": "' + NAME + '", "arguments": ' + ARGUMENTS + "}\n</tool_call>")
HERMES_OUTPUT = (
    FIRST_OUTPUT + "<|im_start|>user{% endif %}\n<tool_response>\n{{ m['content'] }}\n</tool_response>"
    + LAST_OUTPUT + "<|im_end|>\n{% endif %}"
)  # fmt: skip
HERMES_CALL = (
    "<|im_start|>assistant{% if m['content'] %}\n{{ m['content'] }}{% endif %}"
    + HERMES_CALLS
    + "<|im_end|>\n"
)
HERMES_TOOLS = offered("# Tools\n<tools>", "\n{{ t | tojson }}", "\n</tools>")


def hermes_system(default: str = "") -> tuple[str, str]:
    """(text for a system message, text before all messages): tools lie behind the system message, in the
    same turn.
    """
    given = (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
        + default
        + "{% endif %}"
    )
    whole = "{% if tools %}" + f"<|im_start|>system\n{given}\n\n{HERMES_TOOLS}<|im_end|>\n"
    if default:
        whole += "{% elif messages[0]['role'] != 'system' %}" + f"<|im_start|>system\n{default}<|im_end|>\n"
    return (
        "{% if not tools %}<|im_start|>system\n{{ m['content'] }}<|im_end|>\n{% endif %}",
        whole + "{% endif %}",
    )


def im(role: str, content: str = C) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def marked(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{TRIMMED}<|eot_id|>"


def deepseek_call(arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{NAME}<｜tool▁sep｜>{arguments}"


def channel(content: str, end: str) -> str:
    return f"<|start|>assistant<|channel|>final<|message|>{content}{end}"


END = "<｜end▁of▁sentence｜>"
DEEPSEEK = (END, "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_CALLS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)
DEEPSEEK_TOOLS = offered(
    "## Tools\n", "### {{ t['function']['name'] }}\n{{ t['function']['parameters'] | tojson }}\n", ""
)
COHERE = (
    "<|END_OF_TURN_TOKEN|>",
    "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
)
GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GEMMA = ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
LLAMA3 = ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
HARMONY = ("<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
GRANITE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")

FAMILIES = {
    "vicuna": Family(TEMPLATES["vicuna_v1.1"], ("</s>", "<s>"), "</s>", separator=" "),
    "llama2": Family(TEMPLATES["llama2"], ("</s>", "<s>"), "</s>", separator=" ", closing=" ", bos="<s>"),
    "llama3": Family(
        each(marked("user"), marked("assistant"), "<|start_header_id|>assistant<|end_header_id|>\n\n", marked("system"), BOS),
        LLAMA3,
        "<|eot_id|>",
        listed=("<|end_of_text|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "llama3.1": Family(  # the tools come in the first question; outputs are JSON
        each(
            "<|start_header_id|>user<|end_header_id|>\n\n"
            "{% if loop.index0 == (1 if messages[0]['role'] == 'system' else 0) %}"
            + offered("Functions:\n\n", "{{ t | tojson(indent=4) }}\n\n", "")
            + "{% endif %}" + f"{TRIMMED}<|eot_id|>",
            marked("assistant"),
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            marked("system"),
            BOS,
            call="{% if m['tool_calls'] | length != 1 %}{{ raise_exception('single tool-calls at once!') }}{% endif %}"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            + calls('{"name": "' + NAME + '", "parameters": ' + ARGUMENTS + "}") + "<|eot_id|>",
            output="<|start_header_id|>ipython<|end_header_id|>\n\n{{ m['content'] | tojson }}<|eot_id|>",
        ),
        LLAMA3,
        "<|eot_id|>",
        listed=("<|end_of_text|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        calls=1,
    ),
    "llama4": Family(
        each(
            f"<|header_start|>user<|header_end|>\n\n{TRIMMED}<|eot|>",
            f"<|header_start|>assistant<|header_end|>\n\n{TRIMMED}<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n",
            f"<|header_start|>system<|header_end|>\n\n{TRIMMED}<|eot|>",
            BOS,
        ),
        ("<|eot|>", "<|begin_of_text|>", "<|header_start|>", "<|header_end|>"),
        "<|eot|>",
        bos="<|begin_of_text|>",
    ),
    "chatml and mpt": Family(TEMPLATES["chatml"], IM, "<|im_end|>"),
    "qwen2.5 and smollm2": Family(
        each(
            im("user"),
            im("assistant"),
            "<|im_start|>assistant\n",
            *hermes_system("You are a helpful assistant."),
            call=HERMES_CALL,
            output=HERMES_OUTPUT,
        ),
        IM,
        "<|im_end|>",
        listed=("<|im_end|>", "<|endoftext|>"),
        calls=MANY,
    ),
    "qwen3": Family(
        each(
            im("user"),
            THOUGHT + "{% if loop.index0 > q.last and (loop.last or thought) %}"
            + im("assistant", "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ text }}")
            + "{% else %}" + im("assistant", "{{ text }}") + "{% endif %}",
            "<|im_start|>assistant\n",
            hermes_system()[0],
            LAST_QUERY + hermes_system()[1],
            call=THOUGHT + "<|im_start|>assistant\n{% if loop.index0 > q.last and thought %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
            "{{ text }}" + HERMES_CALLS + "<|im_end|>\n",
            output=HERMES_OUTPUT,
        ),
        IM,
        "<|im_end|>",
        opening="<think>\n\n</think>\n\n",
        calls=MANY,
    ),
    "qwen3 thinking": Family(  # both begin with <think>, which a finished conversation closes at once
        each(
            im("user"),
            im("assistant", "<think>\n{{ m['reasoning_content'] or '' }}\n</think>\n\n" + C),
            "<|im_start|>assistant\n<think>\n",
            im("system"),
        ),
        IM,
        "<|im_end|>",
        generation="<think>\n",
        opening="<think>\n\n</think>\n\n",
    ),
    # Without thinking: its generation prompt has the empty thought, as the finished conversation.
    "smollm3": Family(
        each(
            im("user"),
            im("assistant", "<think>\n\n</think>\n" + C),
            "<|im_start|>assistant\n<think>\n\n</think>\n",
            *hermes_system(),
            call=HERMES_CALL,
            output=HERMES_OUTPUT,
        ),
        IM,
        "<|im_end|>",
        calls=MANY,
    ),
    "gemma 1 and 2": Family(
        each(
            f"<start_of_turn>user\n{TRIMMED}<end_of_turn>\n",
            f"<start_of_turn>model\n{TRIMMED}<end_of_turn>\n",
            "<start_of_turn>model\n",
            first=BOS,
        ),
        GEMMA,
        "<end_of_turn>",
        listed=("<eos>", "<end_of_turn>"),
        bos="<bos>",
    ),
    "gemma 3": Family(  # puts the system message before the first question itself
        BOS + "{% set s = namespace(text='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set s.text = m['content'] + '\n\n' %}{% else %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
        "{% if m['role'] == 'user' %}{{ s.text }}{% set s.text = '' %}{% endif %}{{ m['content'] | trim }}<end_of_turn>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        GEMMA,
        "<end_of_turn>",
        bos="<bos>",
    ),
    "mistral 1": Family(each(f"[INST] {C} [/INST]", " " + C + EOS, "", first=BOS), ("</s>", "<s>"), "</s>", separator=" ", bos="<s>"),
    "mistral 3": Family(
        each(f"[INST]{C}[/INST]", C + EOS, "", f"[SYSTEM_PROMPT]{C}[/SYSTEM_PROMPT]", BOS),
        ("</s>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "</s>",
        bos="<s>",
    ),
    # The tools come before the last question; ids of calls have nine characters.
    "mistral 3 with tools": Family(
        each(
            "{% if loop.index0 == q.last and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
            f"[INST]{C}[/INST]",
            C + EOS,
            "",
            f"[SYSTEM_PROMPT]{C}[/SYSTEM_PROMPT]",
            BOS + LAST_QUERY,
            call="[TOOL_CALLS]["
            + calls(
                "{% if c['id'] | length != 9 %}{{ raise_exception('Tool call IDs should have nine characters!') }}{% endif %}"
                '{"name": "' + NAME + '", "arguments": ' + ARGUMENTS + ', "id": "{{ c[\'id\'] }}"}{% if not loop.last %}, {% endif %}'
            )
            + "]" + EOS,
            output='[TOOL_RESULTS]{"content": {{ m[\'content\'] | tojson }}, "call_id": "{{ m[\'tool_call_id\'] }}"}[/TOOL_RESULTS]',
        ),
        (
            *("</s>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        "</s>",
        bos="<s>",
        calls=MANY,
    ),
    "phi 3": Family(
        each(f"<|user|>\n{C}<|end|>\n", f"<|assistant|>\n{C}<|end|>\n", "<|assistant|>\n", f"<|system|>\n{C}<|end|>\n")
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|end|>",
        listed=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "phi 4": Family(
        each(
            f"<|im_start|>user<|im_sep|>{C}<|im_end|>",
            f"<|im_start|>assistant<|im_sep|>{C}<|im_end|>",
            "<|im_start|>assistant<|im_sep|>",
            f"<|im_start|>system<|im_sep|>{C}<|im_end|>",
        ),
        (*IM, "<|im_sep|>"),
        "<|im_end|>",
    ),
    "deepseek v3": Family(each(f"<｜User｜>{C}", f"<｜Assistant｜>{C}{END}", "<｜Assistant｜>", C, BOS), DEEPSEEK, END, bos=DEEPSEEK[1]),
    # Without thinking: both begin behind the end of a thought, but none behind an output.
    "deepseek v3.1": Family(
        each(
            f"<｜User｜>{C}",
            "{% if messages[loop.index0 - 1]['role'] != 'tool' %}<｜Assistant｜></think>{% endif %}" + C + END,
            "{% if messages[-1]['role'] != 'tool' %}<｜Assistant｜></think>{% endif %}",
            C,
            BOS + DEEPSEEK_TOOLS,
            call="<｜Assistant｜></think>" + C + "<｜tool▁calls▁begin｜>" + calls(deepseek_call(ARGUMENTS)) + END,
            output="<｜tool▁output▁begin｜>" + C + "<｜tool▁output▁end｜>",
        ),
        DEEPSEEK + DEEPSEEK_CALLS,
        END,
        bos=DEEPSEEK[1],
        calls=MANY,
    ),
    # Arguments are glued to text; calls are printed where the content is null.
    "deepseek v3, calls as text": Family(
        each(
            f"<｜User｜>{C}",
            f"<｜Assistant｜>{C}{END}",
            "<｜Assistant｜>",
            C,
            BOS + DEEPSEEK_TOOLS,
            call="<｜Assistant｜>{% if m['content'] is none %}<｜tool▁calls▁begin｜>"
            + calls(deepseek_call("{{ '' + c['function']['arguments'] }}")) + "{% else %}{{ m['content'] }}{% endif %}" + END,
            output="<｜tool▁output▁begin｜>" + C + "<｜tool▁output▁end｜>",
        ),
        DEEPSEEK + DEEPSEEK_CALLS,
        END,
        bos=DEEPSEEK[1],
        calls=MANY,
    ),
    "deepseek v3.1, thinking": Family(
        each(f"<｜User｜>{C}", f"<｜Assistant｜></think>{C}{END}", "<｜Assistant｜><think>\n", C, BOS),
        DEEPSEEK,
        END,
        generation="<think>\n",
        opening="</think>",
        bos=DEEPSEEK[1],
    ),
    "deepseek r1 distillation": Family(
        each(f"<｜User｜>{C}", "<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}" + END, "<｜Assistant｜><think>\n", C, BOS),
        DEEPSEEK,
        END,
        generation="<think>\n",
        bos=DEEPSEEK[1],
    ),
    "nemotron 3": Family(
        each(
            im("user"),
            THOUGHT + im("assistant", "{% if thought %}<think>\n{{ thought }}\n</think>\n{% else %}<think></think>{% endif %}{{ text }}"),
            "<|im_start|>assistant\n<think>\n",
            im("system"),
        ),
        IM,
        "<|im_end|>",
        generation="<think>\n",
        opening="<think></think>",
    ),
    "nemotron nano v2": Family(  # a newline stands before the token that ends the answer
        each(
            f"<SPECIAL_11>User\n{C}\n",
            f"<SPECIAL_11>Assistant\n<think></think>{C}\n<SPECIAL_12>\n",
            "<SPECIAL_11>Assistant\n<think>\n",
            f"<SPECIAL_10>System\n{C}\n",
        ),
        ("<SPECIAL_12>", "<SPECIAL_10>", "<SPECIAL_11>"),
        "<SPECIAL_12>",
        generation="<think>\n",
        opening="<think></think>",
        closing="\n",
    ),
    "tags that are special tokens": Family(
        each(f"[INST]{C}[/INST]", f"[THINK][/THINK]{C} \n {EOS}", "[THINK]", C, BOS),
        ("</s>", "<s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]"),
        "</s>",
        generation="[THINK]",
        opening="[THINK][/THINK]",
        closing=" \n ",
        bos="<s>",
    ),
    "glm 4": Family(  # nothing ends an answer but what begins the next turn
        each(f"<|user|>\n{C}", f"<|assistant|>\n{C}", "<|assistant|>", f"<|system|>\n{C}", "[gMASK]<sop>"),
        GLM,
        "<|user|>",
        separator="\n",
        listed=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "glm 4.5": Family(
        each(
            f"<|user|>\n{C}",
            THOUGHT + "<|assistant|>\n<think>{{ thought }}</think>\n{{ text }}",
            "<|assistant|>",
            f"<|system|>\n{C}",
            "[gMASK]<sop>" + offered("<|system|>\n# Tools\n<tools>", "\n{{ t | tojson(ensure_ascii=False) }}", "\n</tools>"),
            call=THOUGHT + "<|assistant|>\n<think>{{ thought }}</think>{% if text %}\n{{ text }}{% endif %}"
            + calls(
                "\n<tool_call>" + NAME + "\n{% for k, v in c['function']['arguments'].items() %}<arg_key>{{ k }}</arg_key>\n"
                "<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>\n{% endfor %}</tool_call>"
            ),
            output=FIRST_OUTPUT + "<|observation|>{% endif %}\n<tool_response>\n{{ m['content'] }}\n</tool_response>",
        ),
        GLM,
        "<|user|>",
        opening="\n<think></think>\n",
        listed=("<|endoftext|>", "<|user|>", "<|observation|>"),
        calls=MANY,
    ),
    "gpt-oss": Family(
        each(
            f"<|start|>user<|message|>{C}<|end|>",
            "{% if loop.last %}" + channel(C, "<|return|>") + "{% else %}" + channel(C, "<|end|>") + "{% endif %}",
            "<|start|>assistant",
            f"<|start|>developer<|message|># Instructions\n\n{C}\n\n<|end|>",
            "<|start|>system<|message|>You are ChatGPT.<|end|>"
            + offered(
                "<|start|>developer<|message|># Tools\n\nnamespace functions {\n",
                "type {{ t['function']['name'] }} = (_: {{ t['function']['parameters'] | tojson }}) => any;\n",
                "}<|end|>",
            ),
            call="{% set c = m['tool_calls'][0] %}<|start|>assistant to=functions." + NAME
            + f"<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
            output="<|start|>functions.{{ m['name'] }} to=assistant<|channel|>commentary<|message|>{{ m['content'] | tojson }}<|end|>",
        ),
        HARMONY,
        "<|return|>",
        opening="<|channel|>final<|message|>",
        listed=("<|return|>", "<|call|>"),
        calls=1,
    ),
    "cohere": Family(
        each(
            f"<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{TRIMMED}<|END_OF_TURN_TOKEN|>",
            f"<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{TRIMMED}<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            f"<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{TRIMMED}<|END_OF_TURN_TOKEN|>",
            BOS + offered("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Tools:", " {{ t['function'] | tojson }}", "<|END_OF_TURN_TOKEN|>"),
            call="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>["
            + calls('{"tool_call_id": "{{ loop.index0 }}", "tool_name": "' + NAME + '", "parameters": ' + ARGUMENTS + "}")
            + "]<|END_OF_TURN_TOKEN|>",
            output="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ {'content': m['content']} | tojson }}<|END_OF_TURN_TOKEN|>",
        ),
        COHERE,
        "<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        calls=MANY,
    ),
    "olmo 2": Family(
        each(
            f"<|user|>\n{C}\n",
            f"<|assistant|>\n{C}{EOS}" + "{% if not loop.last %}\n{% endif %}",
            "<|assistant|>\n",
            f"<|system|>\n{C}\n",
            BOS,
        ),
        ("<|endoftext|>", "<|pad|>"),
        "<|endoftext|>",
        bos="<|endoftext|>",
    ),
    "granite": Family(
        each(
            f"<|start_of_role|>user<|end_of_role|>{C}<|end_of_text|>\n",
            f"<|start_of_role|>assistant<|end_of_role|>{C}<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
            f"<|start_of_role|>system<|end_of_role|>{C}<|end_of_text|>\n",
            "{% if tools %}<|start_of_role|>available_tools<|end_of_role|>{{ tools | tojson(indent=4) }}<|end_of_text|>\n{% endif %}",
            call="<|start_of_role|>assistant<|end_of_role|><tool_call>{{ m['tool_calls'] | tojson }}<|end_of_text|>\n",
            output=f"<|start_of_role|>tool<|end_of_role|>{C}<|end_of_text|>\n",
        ),
        GRANITE,
        "<|end_of_text|>",
        calls=MANY,
    ),
    "zephyr": Family(
        each(f"<|user|>\n{C}{EOS}\n", f"<|assistant|>\n{C}{EOS}\n", "<|assistant|>\n", f"<|system|>\n{C}{EOS}\n"), ("</s>", "<s>"), "</s>"
    ),
    "stablelm": Family(  # no end is printed and none is listed
        each(f"<|USER|>{C}", f"<|ASSISTANT|>{C}", "<|ASSISTANT|>", f"<|SYSTEM|>{C}"),
        ("<|endoftext|>", "<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>"),
        "<|USER|>",
    ),
}  # fmt: skip


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with the family's special tokens and template."""
    family = FAMILIES[name]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(family.tokens),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    names = {"eos_token": family.tokens[0]} | ({"bos_token": family.bos} if family.bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=family.template, **names)


def save_tokenizer(name: str, directory: Path) -> Path:
    """Writes tokenizer and, where the family lists ends of answers, generation_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(name)
    tokenizer.save_pretrained(directory)
    if listed := FAMILIES[name].listed:
        ids = tokenizer.convert_tokens_to_ids(list(listed))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return directory


@cache
def format_of(name: str, *, learns: bool = False) -> ChatFormat:
    directory = save_tokenizer(name, Path(mkdtemp()))
    return load_chat_format(load_tokenizer(directory), end_ids=end_token_ids(directory), learns=learns)
