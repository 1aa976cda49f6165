"""Figures of one device, each compared with transformers and PEFT in the same process.

``python -m tests.gpu.benchmarks make FOLDER`` makes the models. Then ``python -m tests.gpu.benchmarks NAME FOLDER``
measures; `ALL` lists the names. ``python -m tests.gpu`` does all of it.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Final
from unittest.mock import patch

from tests.benchmarks.figures import Figure, medians
from tests.gpu import device
from tests.gpu.models import make_large, make_large_adapter, texts
from tests.tiny import edit_weights, quiet

ALL: Final = ("memory", "throughput", "overhead", "generation", "first", "lazy")

ROUNDS: Final = 3
GENERATIONS: Final = 2
"""Rounds of generation, which takes seconds."""
ADAPTERS: Final = 6
SCALE: Final = 1 if device.ON_CUDA else 10
"""The factor by which a CPU gets fewer texts."""
BATCH_SIZES: Final = (16, 64) if device.ON_CUDA else (8,)
COMPLETIONS: Final = (" yes", " no not east", " the sun rises", " west and north of paris")


@dataclass(frozen=True)
class Measured:
    """A measurement without a promised bound."""

    name: str
    measured: float
    detail: str

    def row(self) -> str:
        return f"{self.name:<62} {'':>9} {self.measured:>9.4g}  {'':<7} {self.detail}"


def make(folder: Path) -> None:
    base = make_large(folder / "base")
    first = make_large_adapter(folder / "adapter1", base)
    for n in range(2, ADAPTERS + 1):
        other = shutil.copytree(first, folder / f"adapter{n}")
        edit_weights(other, partial(_scaled, 1 + n / 10))


def _scaled(factor: float, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor * factor for name, tensor in tensors.items()}


class Ours:
    """The large base with adapters, in bf16."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        from pytest_sway.backends.registry import Builder
        from pytest_sway.cache.backend_cache import BackendCache

        self.base = {"base": folder / "base"}
        self.specs = [self.base | {"adapter": folder / f"adapter{n}"} for n in range(1, ADAPTERS + 1)]
        self.cache = BackendCache(ADAPTERS + 1, build=Builder(device=device.DEVICE, dtype="bf16"))
        stack.callback(self.cache.shutdown)
        self._stack = stack

    def backend(self, n: int = 0) -> Any:
        return self._stack.enter_context(self.cache.lease(self.specs[n]))

    def tuned(self) -> Any:
        return self._stack.enter_context(self.backend().as_finetuned())


class Plain:
    """The same model with plain transformers and PEFT."""

    def __init__(self, folder: Path) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
            model: Any = PeftModel.from_pretrained(loaded.to(device.DEVICE), str(folder / "adapter1"))
            self.model = model.eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "base")

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def logprob_of(self, prompt: str, completion: str) -> float:
        return self.logprobs_of([(prompt, completion)], 1)[0]

    def logprobs_of(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[float]:
        """Score pairs in padded batches sorted by length, as most people write it."""
        import torch

        found = [0.0] * len(pairs)
        whole = [self.ids(prompt + completion) for prompt, completion in pairs]
        start = [len(self.ids(prompt)) for prompt, _ in pairs]
        order = sorted(range(len(pairs)), key=lambda i: -len(whole[i]))
        with torch.inference_mode():
            for first in range(0, len(order), batch_size):
                some = order[first : first + batch_size]
                longest = len(whole[some[0]])
                rows = torch.tensor([whole[i] + [0] * (longest - len(whole[i])) for i in some], device=device.DEVICE)
                table = self.model(input_ids=rows, attention_mask=(rows != 0).long()).logits.float().log_softmax(-1)
                chosen = table[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].cpu()
                for row, i in enumerate(some):
                    found[i] = float(chosen[row, start[i] - 1 : len(whole[i]) - 1].sum())
        return found

    def generate_many(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        import torch

        encoded = [self.ids(prompt) for prompt in prompts]
        longest = max(map(len, encoded))
        rows = torch.tensor([[0] * (longest - len(ids)) + ids for ids in encoded], device=device.DEVICE)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded], device=device.DEVICE)
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=rows, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
            )
        return [str(text) for text in self.tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)]


def pairs_of(count: int, words: int, seed: int) -> list[tuple[str, str]]:
    prompts = texts([words + n % 20 for n in range(count)], seed=seed)
    return [(prompt, completion) for prompt in prompts for completion in COMPLETIONS]


# --- the first answer -------------------------------------------------------------------------------------------------


def first(folder: Path) -> Iterator[Any]:
    """Measure the first question with all kernels loaded, and both sides in processes of their own."""
    plain = Plain(folder)
    for prompt in texts([100] * 3, seed=5):
        plain.logprob_of(prompt, COMPLETIONS[0])
    del plain
    seconds = _questions(_ask_ours, folder)
    yield Figure(
        "the first question / the second, tuned, 100 words",
        1.3,
        seconds["first"] / seconds["second"],
        f"{seconds['first'] * 1e3:.1f} ms, {seconds['second'] * 1e3:.1f} ms, third {seconds['third'] * 1e3:.1f} ms",
    )
    alone = {side: _in_a_process(side, folder) for side in ("plain", "ours")}
    for step in ("import", "load", "first", "second"):
        ours, theirs = alone["ours"][step], alone["plain"][step]
        yield Measured(
            f"a new process, {step}: seconds / transformers and PEFT", ours / theirs, f"{ours:.3f}, {theirs:.3f} s"
        )


def _in_a_process(side: str, folder: Path) -> dict[str, float]:
    arguments = ["-W", "ignore", "-m", "tests.gpu.benchmarks", f"first-{side}", str(folder)]
    output = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return seconds


def _questions(ask: Callable[[ExitStack, Path], Callable[[str, str], float]], folder: Path) -> dict[str, float]:
    seconds = {}
    started = time.perf_counter()
    with ExitStack() as stack:
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        seconds["import"] = time.perf_counter() - started
        started = time.perf_counter()
        logprob_of = ask(stack, folder)
        device.synchronise()
        seconds["load"] = time.perf_counter() - started
        for name, prompt in zip(("first", "second", "third"), texts([100] * 3, seed=6), strict=True):
            started = time.perf_counter()
            logprob_of(prompt, COMPLETIONS[1])
            seconds[name] = time.perf_counter() - started
    return seconds


def _ask_ours(stack: ExitStack, folder: Path) -> Callable[[str, str], float]:
    found: Callable[[str, str], float] = Ours(stack, folder).tuned().logprob_of
    return found


def _ask_plain(_: ExitStack, folder: Path) -> Callable[[str, str], float]:
    return Plain(folder).logprob_of


# --- many questions ---------------------------------------------------------------------------------------------------


def throughput(folder: Path) -> Iterator[Any]:
    with ExitStack() as stack:
        view, plain = Ours(stack, folder).tuned(), Plain(folder)
        pairs = pairs_of(100 // SCALE, 90, seed=1)
        rolled = texts([20 + 380 * n // 256 for n in range(0, 256, SCALE)], seed=2)
        random.Random(0).shuffle(rolled)
        sides: dict[str, Any] = {"ours": (lambda: view.logprobs_of(pairs), lambda: view.rolling_logprobs(rolled))}
        for size in BATCH_SIZES:
            sides |= {f"HFLM, {size}": work for work in _harness(plain, size, pairs, rolled)}
            sides[f"transformers, {size}"] = (lambda size=size: plain.logprobs_of(pairs, size), None)
        for n, what in ((0, "logprobs_of, multiple choice"), (1, "rolling_logprobs, 20 to 400 words")):
            works = {name: both[n] for name, both in sides.items() if both[n] is not None}
            for work in works.values():
                work()
            seconds = medians(ROUNDS, **works)
            ours = seconds.pop("ours")
            tokens = (
                sum(len(a.split()) + len(b.split()) for a, b in pairs)
                if n == 0
                else sum(len(t.split()) for t in rolled)
            )
            if not seconds:
                yield Measured(what, ours, f"seconds; lm_eval cannot be imported here; {tokens / ours:.0f} tokens/s")
                continue
            best = min(seconds, key=lambda name: seconds[name])
            told = ", ".join(f"{name} {taken:.2f} s" for name, taken in seconds.items())
            detail = f"{best}; ours {ours:.2f} s = {tokens / ours:.0f} tokens/s; {told}"
            yield Figure(
                f"{what}, times the best peer", 1.5 if n == 0 else 1.1, seconds[best] / ours, detail, at_least=True
            )
        apart = [
            abs(a - b) for a, b in zip(view.logprobs_of(pairs[:40]), plain.logprobs_of(pairs[:40], 8), strict=True)
        ]
        yield Measured(
            "scores in bf16: distance from transformers', in nats", median(apart), f"at most {max(apart):.3f}"
        )


def _harness(plain: Plain, size: int, pairs: Any, rolled: Any) -> Iterator[tuple[Any, Any]]:
    try:
        models: Any = import_module("lm_eval.models.huggingface")
    except ImportError as error:
        print(f"# lm_eval: {error}", flush=True)
        return
    from tests.neighbours import harness

    lm = models.HFLM(pretrained=plain.model, tokenizer=plain.tokenizer, batch_size=size, device=device.DEVICE)
    yield lambda: harness.of_pairs(lm, pairs), lambda: harness.rolling(lm, rolled)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(folder: Path) -> Iterator[Any]:
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    device.warm_up()
    question = (texts([100], seed=3)[0], COMPLETIONS[0])
    with ExitStack() as stack:
        ours = Ours(stack, folder)
        before, taken = device.allocated(), []
        with ours.cache.lease(ours.base) as base, base.as_base() as view:
            view.logprob_of(*question)
            with_base, weights = device.allocated(), sum(base.sizes().values())
            yield Figure(
                "a base's memory / its weights", 1.01, (with_base - before) / weights, f"{weights / 1e9:.2f} GB"
            )
            own = []
            for spec in ours.specs:
                started = time.perf_counter()
                with ours.cache.lease(spec) as backend, backend.as_finetuned() as tuned:
                    device.synchronise()
                    taken.append(time.perf_counter() - started)
                    tuned.logprob_of(*question)
                    own.append(sum(backend.sizes().values()) - weights)
            six = device.allocated() - before
            detail = f"{sum(own) / 1e6:.0f} MB of adapters, {six / 1e9:.3f} GB in all"
            yield Figure("a base and six adapters / their weights", 1.01, six / (weights + sum(own)), detail)
            yield Measured("an adapter on a loaded base, seconds", median(taken[1:]), f"the first one {taken[0]:.2f} s")
            ours.cache.evict_all()
            yield Figure("a base after its adapters' eviction / before", 1.01, device.allocated() / with_base)
        left = device.allocated() - before
        yield Figure("memory left after the base's eviction / the base", 0.01, left / weights, f"{left} bytes")


# --- new text ---------------------------------------------------------------------------------------------------------


def generation(folder: Path) -> Iterator[Any]:
    beginning = texts([100 // SCALE], seed=7)[0]
    kinds = {
        "16 uneven prompts x 64": (texts([5 + 8 * n for n in range(16)], seed=8), 64 // SCALE),
        "64 uneven prompts x 16": (texts([5 + 2 * n for n in range(64)], seed=9), 16 // SCALE + 1),
        "16 prompts of one beginning x 64": (
            [f"{beginning} {end}" for end in texts([10 + n for n in range(16)])],
            64 // SCALE,
        ),
        "1 prompt x 64": (texts([40], seed=10), 64 // SCALE),
    }
    with ExitStack() as stack:
        view, plain = Ours(stack, folder).tuned(), Plain(folder)
        for name, (prompts, count) in kinds.items():
            ours, theirs = view.generate_many(prompts, max_new_tokens=count), plain.generate_many(prompts, count)
            equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
            seconds = medians(
                GENERATIONS,
                ours=partial(view.generate_many, prompts, max_new_tokens=count),
                theirs=partial(plain.generate_many, prompts, count),
            )
            yield Figure(
                f"generate_many, {name}, times transformers",
                0.97 if len(prompts) == 1 else 1.2,
                seconds["theirs"] / seconds["ours"],
                f"{seconds['ours']:.2f} s, {seconds['theirs']:.2f} s; {equal} of {len(prompts)} texts equal in bf16",
                at_least=True,
            )


# --- the cost of a call beyond its forward pass -----------------------------------------------------------------------


def overhead(folder: Path) -> Iterator[Any]:
    import torch

    with ExitStack() as stack:
        ours = Ours(stack, folder)
        backend = ours.backend()
        for side in ("as_finetuned", "as_base"):
            view = stack.enter_context(getattr(backend, side)())
            prompts = texts([100] * (40 // SCALE), seed=11 if side == "as_base" else 12)
            rows = [torch.tensor([view.tokenizer(prompt)["input_ids"]], device=device.DEVICE) for prompt in prompts]
            asked, bare, model = iter(prompts), iter(rows), view.model
            view.next_token_dist("warm up", top_k=32)

            def bare_pass(model: Any = model, bare: Any = bare) -> None:
                with torch.inference_mode():
                    model(input_ids=next(bare), logits_to_keep=1).logits.float().log_softmax(-1).topk(32).values.cpu()

            bare_pass(model, iter(rows))
            call = lambda view=view, asked=asked: view.next_token_dist(next(asked), top_k=32)  # noqa: E731
            seconds = medians(len(prompts), ours=call, bare=bare_pass)
            detail = f"{seconds['ours'] * 1e3:.2f} ms, {seconds['bare'] * 1e3:.2f} ms, 100 words"
            yield Figure(f"next_token_dist / the bare pass, {side}", 1.1, seconds["ours"] / seconds["bare"], detail)
        changes = medians(20, changes=backend.changes)["changes"]
        yield Measured("the check of a backend at a test's end, ms", changes * 1e3, "for changed weights")

        def warm() -> None:
            with ours.cache.lease(ours.specs[0]) as again, again.as_base(), again.as_finetuned():
                pass

        warm()
        yield Measured(
            "a warm request and two views, ms", medians(50, warm=warm)["warm"] * 1e3, "without work on the device"
        )


# --- lazy clones ------------------------------------------------------------------------------------------------------


def lazy(folder: Path) -> Iterator[Any]:
    """Measure whether torch's lazy clones work for this device's memory."""
    import torch

    from pytest_sway.backends.hf.sharing import tensor_memory
    from pytest_sway.backends.hf.sharing.shared_memory import SharedMemory

    plain = Plain(folder)
    model: Any = copy.deepcopy(plain.model.get_base_model())  # in torch's own memory
    rows = torch.tensor([plain.ids(texts([100], seed=13)[0])], device=device.DEVICE)
    weights = [parameter for parameter in model.parameters() if parameter.numel() > 2**16]
    nbytes = sum(weight.nbytes for weight in weights)
    clonable = sum(tensor_memory.lazy_clone(weight) is not None for weight in weights)
    yield Measured("weights that torch can clone lazily / all", clonable / len(weights), f"{len(weights)} weights")
    if clonable < len(weights):
        return
    with patch.object(tensor_memory, "_is_exposed", lambda tensor: not tensor_memory.is_plain(tensor)):
        memory = SharedMemory(model)
        device.synchronise()
        before = device.allocated()
        tree = memory.tree()
        of_the_tree = device.allocated() - before
        with torch.inference_mode():
            expected, found = model(input_ids=rows).logits, tree(input_ids=rows).logits
        same = bool(torch.equal(expected, found))
        del expected, found
        copied = device.allocated() - before
    yield Measured("a tree of lazy clones: bytes / the model's", of_the_tree / nbytes, f"{of_the_tree} bytes")
    yield Measured(
        "bytes copied by a pass over it / the model's", copied / nbytes, f"{copied} bytes; logits equal: {same}"
    )
    was = weights[0].flatten()[:4].tolist()
    with torch.no_grad():
        next(parameter for parameter in tree.parameters() if parameter.numel() > 2**16).add_(1)
    kept = weights[0].flatten()[:4].tolist() == was
    detail = f"{device.allocated() - before - copied} bytes copied; the model's weight is unchanged: {kept}"
    yield Measured("a write to a lazy clone: 1 if the model is unchanged", float(kept), detail)


def main(name: str, folder: Path) -> None:
    device.require()
    if name == "make":
        make(folder)
    elif name.startswith("first-"):
        print(json.dumps(_questions(_ask_ours if name == "first-ours" else _ask_plain, folder)))
    else:
        measure: Callable[[Path], Iterator[Any]] = globals()[name]
        for figure in measure(folder):
            print(figure.row(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
