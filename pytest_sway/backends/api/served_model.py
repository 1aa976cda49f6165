"""One model on a server, and the ways to ask it that this server understands."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.api.completions import MalformedError, read_completion
from pytest_sway.backends.api.connection import RefusedError
from pytest_sway.backends.api.echo import read_echo
from pytest_sway.errors import ScoringError, ServerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_sway.backends.api.completions import Completion
    from pytest_sway.backends.api.connection import Connection
    from pytest_sway.backends.api.echo import Echo

__tracebackhide__ = True

_LIMITS: Final = (20, 10, 5, 1)
"""How many log-probabilities servers give at most: vLLM, mlx_lm, OpenAI; tried in turn when one refuses."""

_NEUTRAL: Final = {"repeat_penalty": 1.0, "repetition_penalty": 1.0, "min_p": 0.0}
"""What keeps servers from changing a model's answers by defaults of their own: llama-cpp-python punishes repetition."""

_PROBE: Final = "1, 2, 3, 4, 5,"
_PROBE_TOKENS: Final = 4
_TOLERANCE: Final = 1.0
"""Nats by which the probe's tokens may differ between an echo and their generation; a wrong echo is further off."""


class ServedModel:
    """A model on a server.

    Args:
        connection: How its server is reached.
        endpoint: The server's address.
        name: The model's name there.
        card: What the server's list of models says of it.

    Attributes:
        vocabulary: How many tokens it knows; 0 where the server does not tell.
        tells_ids: Whether the server gives tokens their ids on request, as vLLM does.
        shows_bos: Whether it puts BOS in front of a text and shows it in an echo; known after `require_echo`.
    """

    def __init__(self, connection: Connection, endpoint: str, name: str, card: Mapping[str, Any]) -> None:
        self._connection = connection
        self._endpoint = endpoint
        self._name = name
        meta = card.get("meta")
        size = meta.get("n_vocab") if isinstance(meta, dict) else None  # as llama.cpp's own server says
        self.vocabulary = size if isinstance(size, int) and size > 0 else 0
        self.tells_ids = card.get("owned_by") == "vllm"
        self.shows_bos = False
        self._most = math.inf  # log-probabilities that the server gives
        self._strict = False  # whether it refuses what OpenAI's own server does not know
        self._boolean = False  # whether 'logprobs' is a switch there, as in mlx_lm, and no number
        self._echo_lock = asyncio.Lock()
        self._echo_fault: str | None = None  # why the server's echo cannot be used; empty once it is known to be right

    def __str__(self) -> str:
        return f"{self._name!r} on {self._endpoint}"

    async def complete_scored(self, top: int, **request: Any) -> Completion:
        """Ask for a completion with the ``top`` log-probabilities of each token, or as many as the server gives.

        Raises:
            ScoringError: It gives none.
            ServerError: It does not answer, refuses, or answers something else.
        """
        while True:
            asking = min(top, self._most)
            try:
                completion = await self.complete(**request, **self._asking_for(int(asking)))
            except RefusedError as refused:
                if not self._asks_otherwise(str(refused), asking):
                    raise
            else:
                if completion.tokens is None:
                    raise ScoringError(
                        f"{self} gives no log-probabilities: it was asked for {asking:g} of each token and answered"
                        " without. Start it so that it gives them, or use another server; generate works."
                    )
                return completion

    def _asking_for(self, top: int) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": top} if self._boolean else {"logprobs": top}

    def _asks_otherwise(self, refusal: str, asked: float) -> bool:
        """Whether there is another way to ask for log-probabilities, after a refusal."""
        if "logprobs" not in refusal:
            return False
        if "type bool" in refusal and not self._boolean:
            self._boolean = True
            return True
        fewer = next((limit for limit in _LIMITS if limit < asked), None)
        if fewer is not None:
            self._most = min(self._most, fewer)
        return fewer is not None

    async def complete(self, **request: Any) -> Completion:
        """Ask for a completion; temperature 0 unless told otherwise.

        Args:
            request: Fields of the request.

        Raises:
            ServerError: The server does not answer, refuses, or answers something else.
        """
        body = {"model": self._name, "temperature": 0.0, **({} if self._strict else _NEUTRAL), **request}
        try:
            answer = await self._connection.post(f"{self._endpoint}/v1/completions", body)
        except RefusedError as refused:
            if self._strict or not any(name in str(refused) for name in _NEUTRAL):
                raise
            self._strict = True
            return await self.complete(**request)
        try:
            return read_completion(answer)
        except MalformedError as error:
            del answer  # it may repeat the key, and --showlocals shows variables
            raise ServerError(
                f"{self} answered with something that is no completion: {self._connection.quoted(str(error))}."
            ) from None

    # --- echoes -------------------------------------------------------------------------------------------------------

    async def echo(self, text: str, *, ids: bool = False) -> Echo:
        """Ask for the tokens of ``text`` and their log-probabilities.

        One token more is asked for and left out: some servers take 0 for "as many as there is room for".

        Args:
            text: What to echo.
            ids: Ask for the ids of the tokens in place of their spelling.

        Raises:
            ScoringError: What came back does not make up the text.
        """
        extra = {"return_tokens_as_token_ids": True} if ids else {}
        completion = await self.complete_scored(1, prompt=text, max_tokens=1, echo=True, **extra)
        echo = read_echo(text, completion)
        if echo is None:
            spelled = "".join(token.text for token in completion.tokens or ())
            raise ScoringError(
                f"{self} echoed {text[:80]!r} with tokens that do not make up the text: {spelled[:80]!r}. Special"
                " tokens that are written out in a text are left out by some servers."
            )
        return echo

    async def require_echo(self) -> None:
        """Make sure, once, that the server echoes a text with the log-probabilities that its tokens have.

        Raises:
            ScoringError: It does not.
        """
        async with self._echo_lock:
            if self._echo_fault is None:
                self._echo_fault = await self._find_echo_fault()
        if self._echo_fault:
            raise ScoringError(self._echo_fault)

    async def _find_echo_fault(self) -> str:
        """Compare what the model says of a text when it generates it, and when the text is echoed.

        llama.cpp's own server ignores ``echo``, and llama-cpp-python (up to 0.3.36 at least) is off by one token for
        models that put no BOS in front of a text; both answer without an error.
        """
        generation = await self.complete_scored(1, prompt=_PROBE, max_tokens=_PROBE_TOKENS)
        text = _PROBE + generation.text
        echo = read_echo(text, await self.complete_scored(1, prompt=text, max_tokens=1, echo=True))
        if echo is None:
            return (
                f"{self} does not echo a text with its log-probabilities, which logprob_of and rolling_logprob need."
                " vLLM does, and llama-cpp-python; llama.cpp's own server and mlx_lm do not. next_token_dist and"
                " generate work."
            )
        self.shows_bos = echo.bos
        new = [token for token in generation.tokens or () if token.text]
        for generated, echoed in zip(reversed(new), reversed(echo.tokens), strict=False):
            if generated.token_id != echoed.token_id or generated.logprob is None or echoed.logprob is None:
                break  # the text was not tokenised as it was generated
            if not abs(generated.logprob - echoed.logprob) <= _TOLERANCE:
                return (
                    f"{self} echoes wrong log-probabilities: {echoed.logprob:.2f} for {echoed.text!r} at the end of"
                    f" {text!r}, which it generates with {generated.logprob:.2f}. llama-cpp-python is off by one token"
                    " for models that put no BOS in front of a text; serve such a model with"
                    " kv_overrides=['tokenizer.ggml.add_bos_token=bool:true']. next_token_dist and generate work."
                )
        return ""
