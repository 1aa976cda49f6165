"""A server with toy models: every answer can be computed by hand, and any can be made to fail.

Its answers have the formats of real servers, taken from their sources.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

Style = Literal["openai", "vllm", "llama-server", "mlx", "silent", "shifted"]
Canned: TypeAlias = Response | Callable[[Request], Response]

_TEXT = "the sun rises in east west and is red un happy unhappy day now one two three"
_WORDS = tuple(_TEXT.split())
VOCABULARY = (*_WORDS, *(f" {word}" for word in _WORDS), *"0123456789,.", " ", "\n", "</s>")
BOS = "<s>"
UNKNOWN = -15.0
"""Log-probability of a token that is not in the vocabulary, in nats."""


def tokenize(text: str) -> list[str]:
    """Split a text into known words, each with the space before it, or characters; non-ASCII ones are two tokens."""
    pieces: list[str] = []
    for piece in re.findall(r" ?[a-z]+|.", text, re.DOTALL):
        if piece in VOCABULARY:
            pieces.append(piece)
        else:
            pieces += [part for character in piece for part in ([character] if character.isascii() else ["\ufffd"] * 2)]
    return pieces


def distribution(model: str, before: Sequence[str]) -> dict[str, float]:
    """Return the log-probability of each token of the vocabulary after other tokens."""
    context = "\0".join((model, *before))
    scores = {
        token: int.from_bytes(blake2b(f"{context}\0{token}".encode(), digest_size=4).digest(), "big") / 2**29
        for token in VOCABULARY
    }
    scores["</s>"] -= 20.0
    normaliser = math.log(sum(map(math.exp, scores.values())))
    return {token: score - normaliser for token, score in scores.items()}


def nats(model: str, before: Sequence[str], token: str) -> float:
    return distribution(model, before).get(token, UNKNOWN)


def text_nats(model: str, tokens: Sequence[str], scored: int, *, bos: bool = False) -> float:
    """Return the log-probability of the last ``scored`` tokens given those before them."""
    front = [BOS] if bos else []
    start = len(tokens) - scored
    return math.fsum(nats(model, front + list(tokens[:i]), tokens[i]) for i in range(start, len(tokens)))


def number(token: str) -> int:
    """Return the id of a token."""
    return VOCABULARY.index(token) if token in VOCABULARY else 1000 + ord(token[0])


class Toy:
    """A server of toy models.

    Attributes:
        url: Its address.
        style: The server whose format it uses.
        heeds: The fields of a request that it does not ignore, of those that some servers do.
        limit: The most log-probabilities that it gives.
        requests: The bodies of the requests for completions.
        headers: The headers of all requests.
        canned: The answers to the next requests for completions.
        faults: The answers to requests by their number of tokens.
        models_answer: The answer to the request for its models; by default, their list.
    """

    def __init__(self, server: HTTPServer, style: Style = "openai", names: Iterable[str] = ("base", "tuned")) -> None:
        self.url = server.url_for("").rstrip("/")
        self.style = style
        self.names = tuple(names)
        self.heeds = {"stop", "top_k", "min_p", "repetition_penalty"}
        self.limit = {"vllm": 20, "openai": 5, "mlx": 11}.get(style, 1000)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.canned: deque[Canned] = deque()
        self.faults: dict[int, Canned] = {}
        self.models_answer: Canned | None = None
        self._lock = threading.Lock()
        server.expect_request("/v1/models").respond_with_handler(self._models)
        server.expect_request("/v1/completions").respond_with_handler(self._completions)

    def _models(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        answer = self.models_answer
        if answer is not None:
            return answer if isinstance(answer, Response) else answer(request)
        card: dict[str, Any] = {"object": "model"}
        if self.style == "vllm":
            card["owned_by"] = "vllm"
        if self.style == "llama-server":
            card["meta"] = {"n_vocab": len(VOCABULARY)}
        return reply({"object": "list", "data": [{"id": name, **card} for name in self.names]})

    def _completions(self, request: Request) -> Response:
        body = request.get_json()
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(request.headers))
            canned = self.canned.popleft() if self.canned else self.faults.get(body["max_tokens"])
        if canned is not None:
            return canned if isinstance(canned, Response) else canned(request)
        refusal = self._refusal(body)
        return reply({"error": {"message": refusal}}, 400) if refusal else reply(self.answer(body))

    def _refusal(self, body: dict[str, Any]) -> str:
        asked = body.get("top_logprobs" if self.style == "mlx" else "logprobs", 0)
        if self.style == "mlx" and not isinstance(body.get("logprobs", False), bool):
            return "logprobs must be of type bool"
        if asked > self.limit:
            if self.style == "vllm":
                return f"Requested sample logprobs of {asked}, which is greater than max allowed: {self.limit}"
            return f"logprobs must be at most {self.limit}; found {asked}"
        return ""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the server's regular answer."""
        model, own = body["model"], tokenize(body["prompt"])
        front = [BOS] if self.style == "vllm" else []
        new: list[str] = []
        stops = body.get("stop", []) if "stop" in self.heeds else []
        while len(new) < body["max_tokens"] and not any(text in "".join(new) for text in stops):
            new.append(self._next(body, distribution(model, [*front, *own, *new]), [*own, *new]))
        echo = body.get("echo") and self.style not in ("llama-server", "mlx")
        shown = [*front, *own, *new] if echo else new
        whole = [*front, *own, *new]
        skipped = len(whole) - len(shown)
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for i in range(skipped, len(whole)):
            seen = whole[: i + 1] if self.style == "shifted" and echo else whole[:i]
            after = distribution(model, seen)
            most = sorted(after, key=lambda token: -after[token])[: self._asked(body)]
            logprobs.append(after.get(whole[i], UNKNOWN) if i else None)
            tops.append({token: after[token] for token in most} if i else None)
        return {
            "choices": [
                {
                    "text": (body["prompt"] if echo else "") + "".join(new),
                    "logprobs": self._logprobs(body, shown, logprobs, tops),
                }
            ],
            "usage": {"prompt_tokens": len(front + own), "completion_tokens": len(new)},
        }

    def _next(self, body: dict[str, Any], after: dict[str, float], said: Sequence[str]) -> str:
        """Return the most probable token; from temperature 1 on, one that the seed picks among those that are left."""
        asked = {name: value for name, value in body.items() if name in self.heeds}
        penalty: float = asked.get("repetition_penalty", 1.0)
        after = {token: nats * penalty if token in said else nats for token, nats in after.items()}
        order = sorted(after, key=lambda token: -after[token])
        if body["temperature"] < 1.0:
            return order[0]
        least = after[order[0]] + math.log(asked.get("min_p") or 1e-9)
        left = [token for token in order if after[token] >= least][: asked.get("top_k", 0) or None]
        return str(left[(body.get("seed", 0) + len(said)) % len(left)])

    def _asked(self, body: dict[str, Any]) -> int:
        return int(body.get("top_logprobs", 0) if self.style == "mlx" else body.get("logprobs", 0))

    def _logprobs(
        self,
        body: dict[str, Any],
        tokens: list[str],
        logprobs: list[float | None],
        tops: list[dict[str, float] | None],
    ) -> dict[str, Any] | None:
        if not body.get("logprobs") or self.style == "silent":
            return None
        if self.style in ("llama-server", "mlx"):
            return {
                "content": [
                    {"id": number(token), "token": token, "logprob": logprob, "top_logprobs": _entries(top or {})}
                    for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
                ]
            }
        spell = (lambda token: f"token_id:{number(token)}") if body.get("return_tokens_as_token_ids") else str
        offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        return {
            "tokens": [spell(token) for token in tokens],
            "token_logprobs": logprobs,
            "top_logprobs": [None if top is None else {spell(t): v for t, v in top.items()} for top in tops],
            "text_offset": offsets,
        }


def _entries(top: dict[str, float]) -> list[dict[str, Any]]:
    return [{"id": number(token), "token": token, "logprob": logprob} for token, logprob in top.items()]


def reply(body: Any, status: int = 200, **headers: str) -> Response:
    """Return an answer with a JSON body."""
    return Response(json.dumps(body), status, {"Content-Type": "application/json", **headers})
