"""A language model that is asked: any endpoint that speaks the chat-completions protocol, or a local causal LM.

An endpoint is asked with temperature 0, again after 429, 5xx, a broken connection, a timeout or an answer that is not the protocol's:
after 1, 2, 4, ... seconds, or what Retry-After says. What it refuses for good (another 4xx) is about this question alone (400, 413, 422:
`RefusedError`) or about all of them, which ends the run. The key comes from an environment variable and is in no message, file or log.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Protocol

from eval.causal import CausalLM, load_tokenizer
from noise.secrets import HIDDEN, redacted, refuse_secrets
from noise.storage import DatasetError

LONGEST_WAIT = 600.0
"""Seconds that a Retry-After is obeyed for."""
_ABOUT_THE_QUESTION = (400, 413, 422)
sleep = time.sleep


class RefusedError(Exception):
    """The model will not answer this question."""


class _PassingError(Exception):
    """A failure that may pass; `wait` is what Retry-After says, in seconds."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    """of question and answer, as the endpoint counts them; 0 where it does not"""


class Chat(Protocol):
    identity: dict[str, Any]
    """what decides an answer besides the question"""

    def ask(self, question: str) -> Answer: ...


class Endpoint:
    """POST {endpoint}/chat/completions. Safe for threads."""

    def __init__(self, endpoint: str, model: str, key_variable: str, max_tokens: int, timeout: float, attempts: int):
        """Raises DatasetError or ValueError for an address with credentials, or none, and a variable's name that is none (it may be a key)."""
        refuse_secrets("endpoint", endpoint)
        if not re.match(r"https?://[^/]", endpoint):
            raise ValueError(f"endpoint is {endpoint}; give an address such as https://host/v1, under which chat/completions is found")
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key_variable):
            raise ValueError("key_variable is not the name of an environment variable in capitals; put the key into one, and give its name")
        self.identity = {"endpoint": endpoint, "model": model, "temperature": 0, "max_tokens": max_tokens}
        self._address, self._key = endpoint.rstrip("/") + "/chat/completions", os.environ.get(key_variable, "")
        self._timeout, self._attempts = timeout, attempts

    def ask(self, question: str) -> Answer:
        """Raises RefusedError; DatasetError where the endpoint refuses all questions, or fails as often as is borne."""
        for attempt in range(self._attempts):
            try:
                return self._ask(question)
            except _PassingError as failure:
                reason = str(failure)
                if attempt < self._attempts - 1:
                    sleep(min(2.0**attempt, 60.0) if failure.wait is None else min(failure.wait, LONGEST_WAIT))
        raise DatasetError(
            f"{self._address} failed {self._attempts} times, at last with {reason}; answers so far are kept: run the same command later"
        )

    def _ask(self, question: str) -> Answer:
        body = {name: value for name, value in self.identity.items() if name != "endpoint"} | {"messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return _answer(response.read())
        except urllib.error.HTTPError as error:
            said = self._clean(error.read(2000).decode("utf-8", "replace").strip())
            raise _failure(self._address, error, said) from None
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(self._clean(f"{type(error).__name__}: {error}")) from None

    def _clean(self, text: str) -> str:
        return redacted(text.replace(self._key, HIDDEN) if self._key else text)[:200]


def _failure(address: str, error: urllib.error.HTTPError, said: str) -> Exception:
    reason = f"status {error.code}: {said}"
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        return _PassingError(reason, _wait(error.headers.get("Retry-After")))
    if error.code in _ABOUT_THE_QUESTION:
        return RefusedError(reason)
    return DatasetError(f"{address} refuses: {reason}; look at --endpoint, --model and the key's environment variable (--key_variable)")


def _wait(said: str | None) -> float | None:
    """Seconds of a Retry-After, which is a number or a date."""
    if not said:
        return None
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _answer(content: bytes) -> Answer:
    try:
        found = json.loads(content)
        text = found["choices"][0]["message"].get("content") or ""
        if not isinstance(text, str):
            raise TypeError("content is no string")
        usage = found.get("usage") or {}
        return Answer(text, int(usage.get("total_tokens") or 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _PassingError(f"an answer that is not a chat completion ({type(error).__name__}: {error})") from None


class Local:
    """A causal LM on this machine, greedy; a model with a chat template is asked through it."""

    def __init__(self, name: str, max_tokens: int, device: str):
        self._lm, self._tokenizer, self._tokens = CausalLM(name, device), load_tokenizer(name), max_tokens
        self.identity = {"local": self._lm.identity, "max_tokens": max_tokens}

    def ask(self, question: str) -> Answer:
        """Raises RefusedError where the question does not fit the model's context."""
        if self._tokenizer.chat_template:
            question = self._tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        given = self._tokenizer(question, return_tensors="pt", add_special_tokens=not self._tokenizer.chat_template)["input_ids"].to(self._lm.device)
        if self._lm.max_length is not None and given.shape[1] + self._tokens > self._lm.max_length:
            raise RefusedError(
                f"the question has {given.shape[1]} tokens and the answer may have {self._tokens}; the model reads {self._lm.max_length}"
            )
        stop = self._tokenizer.eos_token_id
        written = self._lm.model.generate(
            given,
            attention_mask=given.new_ones(given.shape),
            do_sample=False,
            max_new_tokens=self._tokens,
            pad_token_id=stop if stop is not None else 0,
        )
        return Answer(self._tokenizer.decode(written[0, given.shape[1] :], skip_special_tokens=True), written.shape[1])
