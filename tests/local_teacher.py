"""Small servers of our own, with a real small model behind them: log-probabilities of prompts, and rewards,
as vLLM and SGLang give them.

The shapes are those of vLLM 0.32 and of SGLang 0.5. The vLLM ones were compared
with a real server (tests/vllm_server.py); the SGLang ones are from its documentation.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from local_server import Act, Asked
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_fuse.tokenization import load_tokenizer

Lie = Callable[[dict[str, Any]], object]


class LocalTeacher:
    """A script for `scripted`. lie: changes the content of an answer in place; returns an Act to replace it.

    most_logprobs, most_tokens: limits of the server. lies_from: the first request that is lied about; the
    probe is request 0.
    """

    def __init__(
        self,
        model: Path,
        *,
        lie: Lie | None = None,
        lies_from: int = 0,
        most_logprobs: int = 20,
        most_tokens: int = 4096,
        name: str = "small",
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        ).eval()
        self.tokenizer = load_tokenizer(model)
        self.lie, self.lies_from, self.name = lie, lies_from, name
        self.most_logprobs, self.most_tokens = most_logprobs, most_tokens
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> Act:
        with self._lock:
            number = len(self.requests)
            self.requests.append(asked.body)
            act = self._answer(asked)
        if self.lie is None or number < self.lies_from or act.status != 200:
            return act
        replaced = self.lie(act.content)
        return replaced if isinstance(replaced, Act) else act

    def _answer(self, asked: Asked) -> Act:
        if asked.path == "/v1/completions" and "prompt_logprobs" in asked.body:
            return self._vllm(asked.body)
        return self._sglang(asked.body) if asked.path == "/generate" else Act({"detail": "Not Found"}, 404)

    def _vllm(self, body: dict[str, Any]) -> Act:
        ids, k = body["prompt"], body["prompt_logprobs"]
        if k > self.most_logprobs:
            said = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most_logprobs}"
            )
            return _refused(said)
        if len(ids) + body["max_tokens"] > self.most_tokens:
            return _refused(f"This model's maximum context length is {self.most_tokens} tokens.")
        logprobs = self._logprobs(ids)
        positions: list[dict[str, Any] | None] = [None]
        for place, token in enumerate(ids[1:]):
            row = logprobs[place]
            own = self._alternative(token, row[token].item(), int((row >= row[token]).sum()))
            top = row.topk(k)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            likeliest = {
                str(t): self._alternative(t, value, rank) for rank, (t, value) in enumerate(pairs, 1)
            }
            positions.append({str(token): own} | likeliest)
        choice = {"index": 0, "text": "?", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        choice |= {"prompt_logprobs": positions, "prompt_token_ids": list(ids), "token_ids": [5]}
        usage = {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1}
        content = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": self.name}
        return Act({**content, "choices": [choice], "usage": usage})

    def _sglang(self, body: dict[str, Any]) -> Act:
        ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        logprobs = self._logprobs(ids)
        spelled = body["return_text_in_logprobs"]

        def item(token: int, value: float | None) -> list[Any]:
            return [value, token, self._text(token) if spelled else None]

        own, tops = [item(ids[start], None)], [None]
        for place in range(start, len(ids) - 1):
            row = logprobs[place]
            own.append(item(ids[place + 1], row[ids[place + 1]].item()))
            top = row.topk(k)
            tops.append([item(*pair) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)])
        info = {"id": "1", "prompt_tokens": len(ids), "completion_tokens": 1, "cached_tokens": 0}
        info |= {"input_token_logprobs": own, "input_top_logprobs": tops}
        return Act({"text": "?", "output_ids": [5], "meta_info": info})

    @torch.no_grad()
    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        """float32 [n, v]"""
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def _alternative(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": max(logprob, -9999.0),
            "rank": rank,
            "decoded_token": self._text(token),
        }

    def _text(self, token: int) -> str:
        if token >= self.tokenizer.vocab_size:
            return ""
        text = self.tokenizer.token_bytes[token].decode("utf-8", "replace")
        return text or self.tokenizer.token_text(token) or ""


class LocalRewards:
    """A script for `scripted`: the rewards of a sequence classifier.

    per_token: /pooling gives one for every token. ignores_activation: it always applies its sigmoid.
    """

    def __init__(self, model: Path, *, name: str = "small") -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        ).eval()
        self.name = name
        self.lie: Lie | None = None
        self.per_token = self.ignores_activation = False
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> Act:
        with self._lock:
            self.requests.append(asked.body)
            act = self._answer(asked.path, asked.body)
        replaced = self.lie(act.content) if self.lie and act.status == 200 else None
        return replaced if isinstance(replaced, Act) else act

    def _answer(self, path: str, body: dict[str, Any]) -> Act:
        ids = body.get("input") or body.get("input_ids") or []
        if path not in ("/classify", "/pooling"):
            return Act({"detail": "Not Found"}, 404)
        rewards = self._rewards(ids)  # [n]
        if "input_ids" in body:  # SGLang
            info = {"id": "1", "prompt_tokens": len(ids)}
            return Act({"embedding": rewards[-1:].tolist(), "meta_info": info})
        if body["use_activation"] or self.ignores_activation:
            rewards = rewards.sigmoid()
        last = rewards[-1:].tolist()
        if path == "/pooling":
            item = {
                "index": 0,
                "object": "pooling",
                "data": rewards[:, None].tolist() if self.per_token else last,
            }
        else:
            item = {"index": 0, "label": "LABEL_0", "probs": last, "num_classes": 1}
        usage = {"prompt_tokens": len(ids), "total_tokens": len(ids), "completion_tokens": 0}
        content = {"id": "classify-1", "object": "list", "created": 1, "model": self.name}
        return Act({**content, "data": [item], "usage": usage})

    @torch.no_grad()
    def _rewards(self, ids: list[int]) -> torch.Tensor:
        hidden = self.model.base_model(torch.tensor([ids])).last_hidden_state[0]
        return self.model.score(hidden)[:, 0]


def _refused(message: str) -> Act:
    return Act(
        {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}, status=400
    )
