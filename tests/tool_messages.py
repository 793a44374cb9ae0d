"""Messages of a conversation with tools, in the form that transformers takes."""

from typing import Any


def tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind, "description": "é"} for key, kind in properties.items()},
    }
    function = {"name": name, "description": f"It does {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


def call(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def asks(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def calls(*made: dict[str, Any], **more: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(made), **more}


def output(of: dict[str, Any], text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": of["function"]["name"], "tool_call_id": of["id"]}


TOOLS = [tool("weather", city="string", days="integer"), tool("add", numbers="array")]
