"""pytest-sway and its peers, each in a process of its own.

In one process, pytest-sway's settings of the heap would speed up its peers, too.
"""

from __future__ import annotations

import io
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pytest_sway.backends.hf.hygiene.memory import reuse_freed_memory
from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from tests.benchmarks import by_hand
from tests.neighbours import harness


class Ours:
    """The tuned side of pytest-sway."""

    def __init__(self, stack: ExitStack, base: Path, adapter: Path) -> None:
        cache = BackendCache(max_size=1, build=Builder())
        stack.callback(cache.shutdown)
        backend = stack.enter_context(cache.lease({"base": base, "adapter": adapter}))
        self._view = stack.enter_context(backend.as_finetuned())

    def rolling(self, texts: Sequence[str]) -> None:
        self._view.rolling_logprobs(texts)

    def distributions(self, prompts: Sequence[str]) -> None:
        self._view.next_token_dists(prompts, top_k=32)

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._view.logprobs_of(pairs)

    def generated(self, prompts: Sequence[str], count: int) -> list[str]:
        return list(self._view.generate_many(prompts, max_new_tokens=count))


class DlmSway:
    """The tuned side of dlm-sway, without its cache."""

    def __init__(self, stack: ExitStack, base: Path, adapter: Path) -> None:
        self._view = stack.enter_context(dlm_sway(stack, base, adapter).as_finetuned())

    def rolling(self, texts: Sequence[str]) -> None:
        for text in texts:
            self._view._inst.cache.clear()
            self._view.rolling_logprob(text)

    def distributions(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self._view._inst.cache.clear()
            self._view.next_token_dist(prompt, top_k=32)


class Plain:
    """transformers and PEFT alone, and lm-evaluation-harness's HFLM around them."""

    def __init__(self, stack: ExitStack, base: Path, adapter: Path) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model: Any = PeftModel.from_pretrained(loaded, str(adapter)).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self._hflms: dict[int, Any] = {}
        stack.enter_context(torch.inference_mode())

    def bare(self, texts: Sequence[str]) -> None:
        import torch

        for text in texts:
            self._model(input_ids=torch.tensor([self._tokenizer(text)["input_ids"]]))

    def rolling(self, texts: Sequence[str], batch_size: int) -> None:
        harness.rolling(self._hflm(batch_size), texts)

    def pairs(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> None:
        harness.of_pairs(self._hflm(batch_size), pairs)

    def generated(self, prompts: Sequence[str], count: int) -> list[str]:
        """Continue prompts greedily, in one batch that is padded on the left."""
        import torch

        encoded = [self._tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(map(len, encoded))
        pad = self._tokenizer.pad_token_id
        made = self._model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded]),
            attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded]),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=pad,
        )
        return [str(text) for text in self._tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)]

    def _hflm(self, batch_size: int) -> Any:
        if batch_size not in self._hflms:
            self._hflms[batch_size] = harness.hflm(self._model, self._tokenizer, batch_size)
        return self._hflms[batch_size]


class ByHand:
    """The base in the forward pass of `by_hand`, without an adapter."""

    def __init__(self, stack: ExitStack, base: Path, adapter: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(base)
        stack.enter_context(torch.inference_mode())
        reuse_freed_memory()
        trial = [[1, 2, 3, 4], [5, 6]]
        expected = torch.cat([self._model(input_ids=torch.tensor([ids])).logits[:, -1] for ids in trial])
        torch.testing.assert_close(by_hand.last_logits(self._model, trial), expected, atol=1e-3, rtol=1e-3)

    def distributions(self, prompts: Sequence[str], tokens: int = 1536) -> None:
        """Do the same as `Ours.distributions`, with at most ``tokens`` in one batch."""
        ids = sorted(self._tokenizer(prompts)["input_ids"], key=len, reverse=True)
        while ids:
            fitting = max(1, sum(total <= tokens for total in accumulate(map(len, ids))))
            batch, ids = ids[:fitting], ids[fitting:]
            by_hand.last_logits(self._model, batch).log_softmax(-1).topk(32)


class Apart:
    """Calls the methods of an object in another process, and waits for them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, method: str) -> Any:
        return partial(self._call, method)

    def _call(self, method: str, *args: Any) -> Any:
        self._connection.send((method, args))
        error, answer = self._connection.recv()
        if error is not None:
            raise RuntimeError(error)
        return answer


@contextmanager
def apart(kind: type, base: Path, adapter: Path) -> Iterator[Any]:
    """Create ``kind(stack, base, adapter)`` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, kind, base, adapter), daemon=True)
    process.start()
    try:
        yield Apart(here)
    finally:
        if process.is_alive():
            here.send(None)
        process.join()


def _serve(connection: Connection, kind: Any, base: Path, adapter: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(redirect_stderr(io.StringIO()))  # progress bars
        side = kind(stack, base, adapter)
        while (message := connection.recv()) is not None:
            method, args = message
            try:
                answer = getattr(side, method)(*args)
            except Exception as error:
                connection.send((repr(error), None))
            else:
                connection.send((None, answer))


def dlm_sway(stack: ExitStack, base: Path, adapter: Path) -> Any:
    """Return dlm-sway's backend; ``stack`` closes it."""
    from dlm_sway.backends import build
    from dlm_sway.core.model import ModelSpec

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses deprecated names of transformers
        backend: Any = build(ModelSpec(base=str(base), adapter=adapter, dtype="fp32", device="cpu"))
    stack.callback(backend.close)
    return backend
