"""Servers with OpenAI's interface on localhost: the real one of transformers in a process of its own, and
a scripted one for faults.
"""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

from ports import free_port


class RealServer:
    """`transformers serve` for one model, in fp32 on the CPU.

    Stopped and started again it has the same address.
    """

    def __init__(self, model: Path, log: Path) -> None:
        self.model, self.log, self.port = model, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "transformers.cli.transformers",
            "serve",
            str(self.model),
            "--device",
            "cpu",
        ]
        command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + 120
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"transformers serve does not answer:\n{self.log.read_text()}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """As `kill -9`: what is under way is lost."""
        self.process.kill()
        self.process.wait()

    def answered(self) -> int:
        """Completions since the last start, by the server's own log."""
        return sum("POST /v1/" in line and " 200" in line for line in self.log.read_text().splitlines())


@dataclass
class Act:
    """What a scripted server does with a request: status, headers and JSON, or text; or it drops the
    connection.

    write: writes everything, status line included, and the connection ends.
    """

    content: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    write: Callable[[BinaryIO], object] | None = None


def completion(text: str | None, finish: str | None = "stop", **message: Any) -> Act:
    """A chat completion as servers write it."""
    return Act({"choices": [{"index": 0, "finish_reason": finish, "message": {"content": text, **message}}]})


@dataclass
class Asked:
    """One request that came in."""

    path: str
    body: dict[str, Any]
    authorization: str
    time: float

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"] if "messages" in self.body else self.body["prompt"]


class ScriptedServer:
    """Does with every completion request what `script` says, and remembers what was asked and how much of
    it at once.
    """

    def __init__(self, script: Callable[[Asked], Act], models: Act | None = None) -> None:
        self.script, self.models = script, models or Act({"data": [{"id": "small"}]})
        self.asked: list[Asked] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections stay open

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._act(outer.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                asked = Asked(self.path, body, self.headers.get("authorization", ""), time.monotonic())
                with outer._lock:
                    outer.asked.append(asked)
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                act = outer.script(asked)
                with outer._lock:
                    outer._at_once -= 1
                self._act(act)

            def _act(self, act: Act) -> None:
                if act.drop or act.write:
                    self.close_connection = True
                    if act.write:
                        act.write(self.wfile)
                    return
                is_text = isinstance(act.content, str)
                data = (act.content if is_text else json.dumps(act.content)).encode()
                self.send_response(act.status)
                self.send_header("content-type", "text/html" if is_text else "application/json")
                self.send_header("content-length", str(len(data)))
                for name, value in act.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # clients that gave up
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def questions(self) -> list[str]:
        return [asked.question for asked in self.asked]


@contextmanager
def scripted(script: Callable[[Asked], Act], models: Act | None = None) -> Iterator[ScriptedServer]:
    server = ScriptedServer(script, models)
    thread = threading.Thread(
        target=server._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server._server.shutdown()
        server._server.server_close()
