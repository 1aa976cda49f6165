"""Models for embeddings: a vector for each text, pooled as sentence-transformers pools.

How a model pools is read from its sentence-transformers configuration.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import numpy as np

from pytest_sway.backends.checkpoints.hub.refusals import file_not_fetched
from pytest_sway.backends.checkpoints.hub_files import base_file, is_known_to_lack, is_offline
from pytest_sway.backends.hf.heads import batches
from pytest_sway.backends.hf.heads.view import HeadView
from pytest_sway.backends.hf.scoring.answer_cache import recalling
from pytest_sway.backends.hf.scoring.engine import no_number
from pytest_sway.backends.text import tokens as tokenisation
from pytest_sway.backends.text.requests import warn_at_call, warn_of_cuts
from pytest_sway.errors import ScoringError, SpecError
from pytest_sway.spec.paths import is_path
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_sway.backends.hf.heads.batches import Text
    from pytest_sway.backends.hf.scoring.engine import Engine
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


POOLINGS: Final = ("mean", "cls", "last", "max")
_MODES: Final = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
    "lasttoken": "last",
}
"""sentence-transformers' names; a configuration sets the first ones to true, or names one as ``pooling_mode``."""


class Pooling(NamedTuple):
    """How a model makes an embedding of a text.

    Attributes:
        mode: What makes one vector of hidden states; ``None`` if that is unknown.
        normalize: Whether the vector is divided by its length.
        max_length: The most tokens of a text; ``None`` for what the model reads.
        limited_by_tokenizer: Whether the tokenizer's own limit is heeded, too.
        prompt: What comes before each text.
        lower: Whether the text is written in small letters first.
        why: Why the mode is unknown, as the beginning of a sentence.
        complete: Whether all files that may say something of it could be looked for.
    """

    mode: str | None
    normalize: bool = False
    max_length: int | None = None
    limited_by_tokenizer: bool = False
    prompt: str = ""
    lower: bool = False
    why: str = ""
    complete: bool = True


class Poolings:
    """How both sides of a backend pool. A side that says nothing pools as the other does.

    It is looked up when the backend is made. What a hub did not give then is asked for again when it is needed.

    Args:
        models: The specs of the base and, if there is one, of the fine-tuned model.
        adapter: The adapter's folder; ``None`` if there is none.
    """

    def __init__(self, models: Sequence[ModelSpec], adapter: Path | None) -> None:
        self._models = models
        self._adapter = adapter
        self._found = self._look()

    def of(self, view_id: str, *, again: bool) -> Pooling | None:
        """Return how a side pools; ``None`` if no file says it.

        Args:
            view_id: The id of the side's view.
            again: Whether to ask a hub again for what it did not give.
        """
        tuned = view_id != "base"
        found = self._found[tuned]
        if again and found is not None and not found.complete:
            self._found = self._look()
        return self._found[tuned]

    def _look(self) -> tuple[Pooling | None, Pooling | None]:
        models = [_of_base(spec) for spec in self._models]
        brought = None if self._adapter is None else _of_folder(self._adapter)
        tuned = brought or models[-1] or models[0]
        return models[0] or tuned, tuned


class _NotFetchedError(Exception):
    """A hub did not give a file, which may be there or not; its text says why."""


def _of_base(spec: ModelSpec) -> Pooling | None:
    """Return what the files of a spec's base say; ``None`` if they have no such configuration."""
    try:
        return _read(partial(_file_of_base, spec), spec.base)
    except _NotFetchedError as error:
        found = _read(partial(base_file, spec), spec.base) or Pooling(None)
        return found._replace(mode=None, why=str(error).removesuffix("."), complete=False)


def _of_folder(folder: Path) -> Pooling | None:
    """Return what an adapter's folder says; ``None`` if it has no such configuration."""
    return _read(lambda name: path if (path := folder / name).is_file() else None, str(folder))


def _read(find: Callable[[str], Path | None], source: str) -> Pooling | None:
    modules = _json(find("modules.json"))
    if not isinstance(modules, list):
        return None
    kinds = [(_kind(str(each.get("type", ""))), each.get("path", "")) for each in map(_fields, modules)]
    others = sorted({kind for kind, _ in kinds} - {"Transformer", "Pooling", "Normalize"})
    paths = [path for kind, path in kinds if kind == "Pooling"]
    pooling = _fields(_json(find(f"{paths[0]}/config.json"))) if len(paths) == 1 else {}
    said, text = (
        _fields(_json(find(name))) for name in ("config_sentence_transformers.json", "sentence_bert_config.json")
    )
    prompt = _fields(said.get("prompts")).get(str(said.get("default_prompt_name")))
    longest, modes, why = text.get("max_seq_length"), _modes(pooling), ""
    longest = longest if isinstance(longest, int) and longest > 0 else None
    if others:
        why = f"{source!r} has the module {', '.join(others)} in its modules.json, which pytest-sway does not compute"
    elif len(modes) != 1 or modes[0] not in POOLINGS:
        why = f"{source!r} pools by {' and '.join(modes) or 'nothing'} in its sentence-transformers configuration"
    elif "message" in _fields(text.get("modality_config")):
        why = f"{source!r} puts texts into its chat template (sentence_bert_config.json), which pytest-sway does not"
    elif prompt and pooling.get("include_prompt") is False:
        why = f"{source!r} leaves its prompt out of the pooling, which pytest-sway does not"
    return Pooling(
        None if why else modes[0],
        any(kind == "Normalize" for kind, _ in kinds),
        longest,
        longest is None,  # sentence-transformers 5.4 and later save it with the tokenizer only
        str(prompt or ""),
        bool(text.get("do_lower_case")),
        why,
    )


def _kind(module: str) -> str:
    """Return the name of sentence-transformers' class; a class of the model's own code keeps its full name."""
    return module.rpartition(".")[2] if module.startswith("sentence_transformers.") else module


def _modes(config: Mapping[str, Any]) -> list[str]:
    said = config.get("pooling_mode")
    if said is None:
        said = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    return [_MODES.get(str(name), str(name)) for name in (said if isinstance(said, list) else [said])]


def _fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return json.loads(read_bounded(path, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{str(path)!r} cannot be read as JSON: {error}. Save the model again.") from error


def _file_of_base(spec: ModelSpec, name: str) -> Path | None:
    """Return the path of a base's file, ``None`` if it has none.

    One on a hub is fetched, since transformers does not need it. Offline, what is not in the cache is not there.

    Raises:
        _NotFetchedError: The hub refused it, or could not be asked for it.
    """
    found = base_file(spec, name)
    if found is not None or is_path(spec.base) or is_offline() or is_known_to_lack(spec, name):
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(spec.base, name, revision=spec.revision))
    except Exception as error:  # a hub can fail in any way
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _NotFetchedError(str(file_not_fetched(spec, name, error))) from error


_NO_CONFIGURATION: Final = "the model has no configuration of sentence-transformers (modules.json) beside its weights"
_CHOICES: Final = f"embed(texts, pooling={POOLINGS[0]!r}), or {', '.join(map(repr, POOLINGS[1:]))}"


class EmbeddingView(HeadView):
    """A view of a model for embeddings.

    Args:
        view_id: The view's id.
        backend: Its backend.
        poolings: What the models' sentence-transformers configurations say.
    """

    task: ClassVar[str] = "embeddings"

    def __init__(self, view_id: str, backend: Any, poolings: Poolings) -> None:
        super().__init__(view_id, backend)
        self._poolings = poolings

    def _embedded(self, texts: list[str], pooling: str | None) -> NDArray[np.float32]:
        how = self._how(pooling)
        encoded, cut, max_length = self._run(_encoded, texts, how)
        warn_of_cuts(cut, max_length, "end, as sentence-transformers does")
        found = batches.answered(self._run, _pooled, _vectors, encoded, how)
        return np.stack(found) if found else np.zeros((0, self._run(_size)), dtype=np.float32)

    def _how(self, asked: str | None) -> Pooling:
        own = self._poolings.of(self.id, again=asked is None)
        if asked is None and own is not None and own.mode is not None:
            return own
        if asked is None:
            why = _NO_CONFIGURATION if own is None else own.why
            raise ScoringError(f"{why}. Say how to pool its hidden states: {_CHOICES}.")
        if asked not in POOLINGS:
            raise ScoringError(f"there is no pooling {asked!r}. Say {_CHOICES}.")
        if own is not None and not own.complete:
            warn_at_call(
                f"{own.why}. The hidden states are pooled as you say; what else that file may say, such as to normalize"
                " the vectors, is left out."
            )
        return (own or Pooling(None))._replace(mode=asked, why="")

    def _not_finite(self, label: str) -> str:
        own = self._poolings.of(self.id, again=False)
        known = own is not None and own.mode is not None
        vectors = self.embed(["hello"], pooling=None if known else POOLINGS[0])
        return "" if np.isfinite(vectors).all() else f"the {label} view gave an embedding that is not finite"


def _encoded(engine: Engine, texts: Sequence[str], how: Pooling) -> tuple[list[Text], int, int]:
    """Return the encoded texts, how many of them were cut at their end, and the most tokens of a text."""
    stated = tokenisation.limit_of(engine.tokenizer) if how.limited_by_tokenizer else how.max_length
    most = min(engine.max_length, stated or engine.max_length)
    encoded, cut = [], 0
    for text in texts:
        asked = how.prompt + text
        asked = asked.lower() if how.lower else asked
        encoded.append(batches.encoded(engine.tokenizer, asked))
        if len(encoded[-1].ids) > most:
            encoded[-1] = batches.cut(engine.tokenizer, asked, most)
            cut += 1
        engine.require_known(encoded[-1].ids)
        if not encoded[-1].ids:
            raise ScoringError("a text has no tokens in the model's tokenizer, so there is nothing to embed.")
    return encoded, cut, most


@recalling
def _vectors(engine: Engine, texts: Sequence[Text], how: Pooling) -> list[NDArray[np.float32]]:
    vectors = _pooled(engine, texts, how).float().cpu().numpy()
    if np.isnan(vectors).any():
        raise no_number(engine)
    return list(vectors)


def _pooled(engine: Engine, texts: Sequence[Text], how: Pooling) -> Any:
    """Return a vector for each text, shape ``(texts, size)``, as sentence-transformers' ``Pooling`` computes it."""
    import torch

    pad = max(0, int(getattr(engine.forward.config, "pad_token_id", None) or 0))  # some configs say -1
    inputs = batches.padded_inputs(engine, texts, pad)
    mask = inputs["attention_mask"].unsqueeze(-1)
    states = engine.forward.runner(**inputs).last_hidden_state[:, -mask.shape[1] :]  # after virtual tokens
    if how.mode == "cls":
        pooled = states[:, 0]
    elif how.mode == "last":
        pooled = states[torch.arange(len(texts), device=states.device), mask.sum(1).squeeze(-1) - 1]
    elif how.mode == "max":
        pooled = states.masked_fill(mask == 0, -torch.inf).amax(1)
    else:
        pooled = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1) if how.normalize else pooled


def _size(engine: Engine) -> int:
    """Return the size of an embedding by the model's config, of which the part may tell it that reads the text."""
    config = engine.forward.config
    text = getattr(config, "encoder", None) or config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)  # as OPT may project its states
