"""`ServedModel`: a model on a server, asked in the ways that this server understands."""

from __future__ import annotations

import asyncio
import math
import re
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.api.completions import MalformedError, read_completion, read_echo
from pytest_sway.backends.api.connection import RefusedError
from pytest_sway.errors import ScoringError, ServerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_sway.backends.api.completions import Completion, Echo
    from pytest_sway.backends.api.connection import Connection

__tracebackhide__ = True

_LIMITS: Final = (20, 10, 5, 1)
"""The most log-probabilities that servers give (vLLM, mlx_lm, OpenAI), tried in turn when a server refuses more."""

_ALLOWED: Final = re.compile(r"max allowed: (\d+)")
"""vLLM's refusals name its limit, which ``--max-logprobs`` sets."""

_WHOLE_TEXT: Final = {"repeat_last_n": -1, "repetition_context_size": 2**20}
"""Servers penalise the last 64 (llama.cpp) or 20 tokens (mlx_lm) by default; transformers and vLLM all of them."""

_HOT: Final = {"temperature": 2.0}  # the highest that all servers take
_TRIALS: Final[dict[str, dict[str, Any]]] = {
    "top_k": {"top_k": 1, **_HOT},
    "min_p": {"min_p": 1.0, **_HOT},
    "repetition_penalty": {"repetition_penalty": 2.0},
}
"""Requests that show whether a server heeds a setting: the first two leave one token, the last changes a count."""

EXTRAS: Final = tuple(_TRIALS)
"""Settings of generation that OpenAI's server does not have."""

_TRIAL_TOKENS: Final = 16
_PROBE: Final = "1, 2, 3, 4, 5,"
_PROBE_TOKENS: Final = 4
_TOLERANCE: Final = 1.0
"""Nats by which the probe's tokens may differ between echo and generation. A wrong echo differs by more."""


class ServedModel:
    """A model on a server.

    Args:
        connection: The connection to its server.
        endpoint: The server's address.
        name: The model's name on the server.
        card: Its entry in the server's list of models.

    Attributes:
        vocabulary: The size of its vocabulary in tokens; 0 if the server does not tell.
        tells_ids: Whether the server gives tokens their ids on request, as vLLM does.
        shows_bos: Whether the server puts BOS before a text and shows it in an echo; known after `require_echo`.
    """

    def __init__(self, connection: Connection, endpoint: str, name: str, card: Mapping[str, Any]) -> None:
        self._connection = connection
        self._endpoint = endpoint
        self._name = name
        meta = card.get("meta")
        size = meta.get("n_vocab") if isinstance(meta, dict) else None  # llama.cpp's own server gives it
        self.vocabulary = size if isinstance(size, int) and size > 0 else 0
        self.tells_ids = card.get("owned_by") == "vllm"
        self.shows_bos = False
        self._most = math.inf  # the most log-probabilities that the server gives
        self._strict = False  # whether it refuses fields that OpenAI's server does not know
        self._boolean = False  # whether 'logprobs' is a boolean there, as in mlx_lm
        self._setting_faults: dict[str, str] = {}  # why a setting can't be used; empty if it can
        self._settings_lock = asyncio.Lock()
        self._echo_lock = asyncio.Lock()
        self._echo_fault: str | None = None  # why its echo can't be used; empty if it can

    def __str__(self) -> str:
        return f"{self._name!r} on {self._endpoint}"

    async def complete_scored(self, top: int, **request: Any) -> Completion:
        """Ask for a completion with the ``top`` log-probabilities of each token, or as many as the server gives.

        Raises:
            ScoringError: The server gives no log-probabilities.
            ServerError: It does not answer, refuses the request, or answers something else.
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
                        f"{self} gives no log-probabilities: the request asked for {asking:g} of each token, and the"
                        " answer has none. Start the server so that it gives them, or use another one; generate works."
                    )
                return completion

    def _asking_for(self, top: int) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": top} if self._boolean else {"logprobs": top}

    def _asks_otherwise(self, refusal: str, asked: float) -> bool:
        """Switch to another way to ask for log-probabilities after a refusal; return whether there is one."""
        if "logprobs" not in refusal:
            return False
        if "type bool" in refusal and not self._boolean:
            self._boolean = True
            return True
        named = _ALLOWED.search(refusal)
        limits = (*((int(named[1]),) if named else ()), *_LIMITS)
        fewer = next((limit for limit in limits if 0 < limit < asked), None)
        if fewer is not None:
            self._most = min(self._most, fewer)
        return fewer is not None

    async def complete(self, **request: Any) -> Completion:
        """Ask for a completion, by default at temperature 0.

        Args:
            request: Fields of the request.

        Raises:
            ServerError: The server does not answer, refuses the request, or answers something else.
        """
        added = {} if self._strict else _neutral(request)
        body = {"model": self._name, "temperature": 0.0, **added, **request}
        try:
            answer = await self._connection.post(f"{self._endpoint}/v1/completions", body)
        except RefusedError as refused:
            if not any(name in str(refused) for name in added):
                raise
            self._strict = True
            return await self.complete(**request)
        try:
            return read_completion(answer)
        except MalformedError as error:
            del answer  # it may quote the key, which --showlocals would show
            raise ServerError(
                f"{self} answered with something that is not a completion: {self._connection.quoted(str(error))}."
            ) from None

    async def require_settings(self, names: Iterable[str]) -> None:
        """Check once that the server heeds settings that OpenAI's server does not have.

        Raises:
            ScoringError: It refuses or ignores one.
        """
        async with self._settings_lock:
            for name in names:
                if name not in self._setting_faults:
                    self._setting_faults[name] = await self._find_setting_fault(name)
                if self._setting_faults[name]:
                    raise ScoringError(self._setting_faults[name])

    async def _find_setting_fault(self, name: str) -> str:
        """Return why a setting can't be used. Many servers ignore a field that they do not know, without an error."""
        trial = _TRIALS[name]
        greedy = await self.complete(prompt=_PROBE, max_tokens=_TRIAL_TOKENS)
        try:
            tried = await self.complete(prompt=_PROBE, max_tokens=_TRIAL_TOKENS, **trial)
        except RefusedError as refused:
            if name not in str(refused):
                raise
            return f"{self} refuses {name}: {str(refused).rstrip('.')}. Leave it out, or use a server that has it."
        if (tried.text == greedy.text) == ("temperature" in trial):
            return ""
        asked = ", ".join(f"{field}={value}" for field, value in trial.items())
        return (
            f"{self} ignores {name}: with {asked} it continues {_PROBE!r} as it does without {name}. Leave it out, or"
            " use a server that has it."
        )

    # --- echoes -------------------------------------------------------------------------------------------------------

    async def echo(self, text: str, *, ids: bool = False) -> Echo:
        """Ask for the tokens of ``text`` and their log-probabilities.

        One more token is requested and dropped: some servers take 0 as "as many as there is room for".

        Args:
            text: The text to echo.
            ids: Whether to ask for the tokens' ids instead of their spelling.

        Raises:
            ScoringError: The tokens do not make up the text.
        """
        extra = {"return_tokens_as_token_ids": True} if ids else {}
        completion = await self.complete_scored(1, prompt=text, max_tokens=1, echo=True, **extra)
        echo = read_echo(text, completion)
        if echo is None:
            spelled = "".join(token.text for token in completion.tokens or ())
            raise ScoringError(
                f"{self} echoed {text[:80]!r} with tokens that do not make up the text: {spelled[:80]!r}. Some servers"
                " omit special tokens that are written out in a text."
            )
        return echo

    async def require_echo(self) -> None:
        """Check once that the server echoes a text with the right log-probabilities of its tokens.

        Raises:
            ScoringError: It does not.
        """
        async with self._echo_lock:
            if self._echo_fault is None:
                self._echo_fault = await self._find_echo_fault()
        if self._echo_fault:
            raise ScoringError(self._echo_fault)

    async def _find_echo_fault(self) -> str:
        """Compare the log-probabilities of a text when it is generated and when it is echoed.

        llama.cpp's own server ignores ``echo``. llama-cpp-python (up to 0.3.36 at least) is off by one token for models
        that put no BOS before a text. Both answer without an error.
        """
        generation = await self.complete_scored(1, prompt=_PROBE, max_tokens=_PROBE_TOKENS)
        text = _PROBE + generation.text
        echo = read_echo(text, await self.complete_scored(1, prompt=text, max_tokens=1, echo=True))
        if echo is None:
            return (
                f"{self} does not echo a text with its log-probabilities, which logprob_of and rolling_logprob need."
                " vLLM and llama-cpp-python do; llama.cpp's own server and mlx_lm do not. next_token_dist and generate"
                " work."
            )
        self.shows_bos = echo.bos
        new = [token for token in generation.tokens or () if token.text]
        for generated, echoed in zip(reversed(new), reversed(echo.tokens), strict=False):
            if generated.token_id != echoed.token_id or generated.logprob is None or echoed.logprob is None:
                break  # the text is tokenised in another way than it was generated
            if not abs(generated.logprob - echoed.logprob) <= _TOLERANCE:
                return (
                    f"{self} echoes wrong log-probabilities: {echoed.logprob:.2f} for {echoed.text!r} at the end of"
                    f" {text!r}, which it generates with {generated.logprob:.2f}. llama-cpp-python is off by one token"
                    " for models that put no BOS before a text; serve such a model with"
                    " kv_overrides=['tokenizer.ggml.add_bos_token=bool:true']. next_token_dist and generate work."
                )
        return ""


def _neutral(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields that turn off servers' own defaults, which change answers; llama-cpp-python penalises repetition.

    llama.cpp has its own name for the penalty.
    """
    penalty = request.get("repetition_penalty", 1.0)
    fields = {"repeat_penalty": penalty, "repetition_penalty": 1.0, "min_p": 0.0}
    return fields if penalty == 1.0 else fields | _WHOLE_TEXT
