"""Puts an adapter on its base, and verifies that it is applied.

PEFT changes a tree of the base, so the base stays as it is. The result is kept as a skeleton, without the adapter's
weights. The next adapter of the same configuration gets a copy of the skeleton with its own weights. That gives the
same model, bit for bit, in a fraction of the time.
"""

from __future__ import annotations

import copy
import inspect
import traceback
import warnings
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, NAME, read_adapter, warn_of_names
from pytest_sway.backends.hf.adapters.expert_layouts import fitted, warn_of_experts
from pytest_sway.backends.hf.adapters.packed_weights import read_packed
from pytest_sway.backends.hf.adapters.peft_errors import (
    AdapterFaultError,
    not_by_adapter,
    not_on_quantized,
    refused,
)
from pytest_sway.backends.hf.adapters.relocation import relocated
from pytest_sway.backends.hf.adapters.resized_embeddings import fit_vocabulary
from pytest_sway.backends.hf.adapters.verify.weights import verify_keys, verify_trained, verify_values
from pytest_sway.backends.hf.hygiene.memory import trim_heap
from pytest_sway.backends.hf.loading.libraries import quiet_process, seeded
from pytest_sway.backends.hf.loading.model import is_quantized, without_weights
from pytest_sway.backends.hf.loading.model_kwargs import lacking_kernels
from pytest_sway.backends.hf.loading.pickles import read_pickle, with_entries
from pytest_sway.backends.hf.loading.tasks import numbers
from pytest_sway.backends.hf.model.bound_model import Adapter
from pytest_sway.backends.hf.model.known_skeletons import adopted
from pytest_sway.backends.hf.model.pristine import Pristine
from pytest_sway.backends.hf.model.skeletons import (
    OnSkeleton,
    adapter_parameters,
    inner_model,
    largest_scaling,
    name_in_file,
)
from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.backends.libraries.process import no_warnings
from pytest_sway.errors import SpecError, SwayError, SwayWarning
from pytest_sway.spec.tasks import CAUSAL, TASKS
from pytest_sway.system.wording import shown, some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.hf.model.skeletons import Skeleton

__tracebackhide__ = True

_NOT_SAVED: Final = "runtime_config"
"""A field of PEFT's configs that holds for one process only; PEFT ignores it in a file."""


def attach(base: LoadedBase, files: AdapterFiles, tokenizer: Any) -> Adapter:
    """Put an adapter on a model of its own, which shares the base's memory, and verify it.

    Args:
        base: The base.
        files: The adapter's files.
        tokenizer: The adapter's tokenizer.

    Raises:
        AdapterMismatchError: The adapter does not fit the base, was not applied in full, is not finite, or has no
            effect.
        WeightsError: Its weights cannot be read.
        SpecError: PEFT rejects a field of its config.
    """
    warn_of_names(files)
    files = relocated(base.pristine.model, files)
    explaining = explained(base, files, tokenizer)
    with explaining, quiet_process(), seeded(base.device):  # random initial weights are the same each time
        adapter = _from_skeleton(base, files)
        if adapter is None:
            adapter = _by_peft(base, files, tokenizer)
            trim_heap()
    warn_of_experts(files, base.pristine.model)
    verify_values(base.spec, adapter)
    _warn_of_fields(files)
    return adapter


@contextmanager
def explained(base: LoadedBase, files: AdapterFiles, tokenizer: Any) -> Iterator[None]:
    """Turn PEFT's errors into errors that name the adapter's file and the field at fault, or the base."""
    again: Callable[[Any], None] | None = None

    def attempt(folder: Path) -> None:
        import torch

        again_read = with_entries(read_adapter(folder, allow_pickle=True))
        model = _loaded_again(base, relocated(base.pristine.model, again_read), tokenizer)
        with no_warnings(), torch.inference_mode():
            numbers(inner_model(model), (0, 0), model)  # some fields matter only in a pass
            if again is not None:
                again(model)

    try:
        yield
    except (SwayError, Warning):  # a warning is raised where pytest makes it an error
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        again = error.again if isinstance(error, AdapterFaultError) else None
        quantized = again is None and not isinstance(error, ImportError) and is_quantized(base.spec)
        fits = quantized and _fits_unquantized(base, files, tokenizer)
        alone = _failure_alone(base) if again is None else None
        if alone is not None and (fits or _is_same(alone, error)):
            raise lacking_kernels(base.spec, alone) or not_by_adapter(base.spec, files, alone) from error
        if fits:
            raise not_on_quantized(base.spec, files, error) from error
        raise refused(base.spec, files, error, attempt) from error


def _failure_alone(base: LoadedBase) -> Exception | None:
    """Return the error of a base's pass without an adapter; ``None`` if it runs, or lacks memory."""
    import torch

    try:
        with quiet_process(), torch.inference_mode():
            numbers(base.pristine.tree(to_run=True), (0, 0))
    except Exception as error:  # a model may raise anything
        return None if out_of_memory(error) else error
    return None


def _is_same(one: Exception, other: Exception) -> bool:
    """Return whether two passes failed in the same way; the text of an error may name the sizes of one pass."""
    return type(one) is type(other) and (str(one) == str(other) or _raised_at(one) == _raised_at(other))


def _raised_at(error: Exception) -> tuple[str, int]:
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename, line


# --- by PEFT ----------------------------------------------------------------------------------------------------------


def _by_peft(base: LoadedBase, files: AdapterFiles, tokenizer: Any) -> Adapter:
    known: dict[int, Any] = {}
    peft_model = _loaded(base, files, tokenizer, known)
    base.record_classes(peft_model)
    ways = base.pristine.memory.settle(peft_model, known)
    named = [*peft_model.named_parameters(), *peft_model.named_buffers()]
    own = {name: tensor for name, tensor in named if id(tensor) not in ways}
    again = partial(_loaded_again, base, files, tokenizer)
    pristine = Pristine(peft_model, again, ways=ways, own=own.values(), trial=base.may_hide_something)
    skeleton = base.skeletons.made_of(files, _config(files), pristine, own)
    if skeleton is None:
        return Adapter(files, pristine, own, largest_scaling(peft_model), tuple(own.values()))
    weights = {name_in_file(name): tensor for name, tensor in own.items()}
    return _on_skeleton(files, skeleton, peft_model.peft_config[NAME], weights)


def _loaded(base: LoadedBase, files: AdapterFiles, tokenizer: Any, known: dict[int, Any]) -> Any:
    """Do what ``PeftModel.from_pretrained`` does on a tree, and verify the keys that it ignores.

    Args:
        base: The base.
        files: The adapter's files.
        tokenizer: The adapter's tokenizer.
        known: Filled with the tree's objects, by the ``id`` of the base's objects that they replace.
    """
    tree = base.pristine.tree(known, isolated=not files.plain)
    of_earlier = tokenizer is base.tokenizer and not base.has_tokenizer_of_files
    fit_vocabulary(tree, files, tokenizer, of_earlier=of_earlier)
    peft_model, starts = _read_on(tree, base, files)
    peft_model.eval()
    peft_model.requires_grad_(False)
    verify_trained(base.spec, files, adapter_parameters(peft_model), starts)
    return peft_model


def _read_on(model: Any, base: LoadedBase, files: AdapterFiles) -> tuple[Any, dict[str, Any]]:
    """Return a ``PeftModel`` of a model with an adapter's weights, and the parameters before they were read."""
    import peft

    config = _config(files)
    if hasattr(config, "progressbar"):
        config.progressbar = False  # FRoD draws one on any terminal
    task = TASKS[base.spec.task or CAUSAL].peft
    kind: Any = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] if config.task_type == task else peft.PeftModel
    with fitted(base.spec, files, model, config):
        peft_model: Any = kind(model, config)
        starts = {} if files.plain or config.is_prompt_learning else _copies(adapter_parameters(peft_model))
        key_mapping = None if config.is_prompt_learning else getattr(model, "_checkpoint_conversion_mapping", {})
        with _folder_for_peft(files) as folder:
            result = peft_model.load_adapter(str(folder), NAME, torch_device=str(base.device), key_mapping=key_mapping)
        verify_keys(base.spec, files, _unloaded(peft_model, result.missing_keys), result.unexpected_keys)
    return peft_model, starts


def _fits_unquantized(base: LoadedBase, files: AdapterFiles, tokenizer: Any) -> bool:
    """Return whether PEFT puts an adapter on a quantized base's model without quantization, and that runs."""
    import torch

    try:
        with quiet_process(), torch.inference_mode(), torch.device("meta"):
            model = without_weights(base.spec)
            runs = _runs(model)  # some models need the values of weights
            fit_vocabulary(model, files, tokenizer)
            peft_model, _ = _read_on(model, base, files)
            return not runs or _runs(inner_model(peft_model), peft_model.eval())
    except Exception:  # a model or adapter may raise anything
        return False


def _runs(model: Any, called: Any = None) -> bool:
    with suppress(Exception):  # a model may raise anything
        numbers(model, (0, 0), called)
        return True
    return False


def _loaded_again(base: LoadedBase, files: AdapterFiles, tokenizer: Any) -> Any:
    with quiet_process(), seeded(base.device):
        return _loaded(base, files, tokenizer, {})


def _config(files: AdapterFiles) -> Any:
    kind = _config_class(files)
    fields = {name: copy.deepcopy(value) for name, value in files.config.items() if name != _NOT_SAVED}
    config = kind.from_peft_type(**kind.check_kwargs(**fields))  # PEFT's from_pretrained fails on a byte order mark
    config.inference_mode = True
    return config


def _config_class(files: AdapterFiles) -> Any:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    configs: dict[Any, Any] = {**PEFT_TYPE_TO_CONFIG_MAPPING}
    if files.peft_type not in configs:
        raise SpecError(
            f"the adapter {str(files.folder)!r} is of the type {shown(files.peft_type)} (peft_type in its {CONFIG}),"
            f" which the installed PEFT {peft.__version__} does not know. Upgrade PEFT."
        )
    return configs[files.peft_type]


def _warn_of_fields(files: AdapterFiles) -> None:
    """Warn if the installed PEFT does not know fields of an adapter's config that are set, and so ignores them."""
    import peft

    known = inspect.signature(_config_class(files).__init__).parameters
    unset: tuple[Any, ...] = (None, False, [], {})
    unknown = [
        name for name, value in files.config.items() if name not in known and name != _NOT_SAVED and value not in unset
    ]
    if unknown:
        saved = files.config.get("peft_version")
        by = "" if saved is None else f"; it was saved by PEFT {shown(saved)}"
        warnings.warn(
            f"the {CONFIG} of the adapter {str(files.folder)!r} has fields that the installed PEFT {peft.__version__}"
            f" does not know: {some(map(repr, unknown))}{by}. PEFT computes without them, so the numbers may be others"
            " than in the training. Upgrade PEFT.",
            SwayWarning,
            stacklevel=3,
        )


@contextmanager
def _folder_for_peft(files: AdapterFiles) -> Iterator[Path]:
    """Yield the adapter's folder, or a temporary copy of its weights with its names in the base."""
    if not (files.taken_out or files.renamed):
        yield files.folder
        return
    from safetensors.torch import save_file

    with TemporaryDirectory(prefix="pytest-sway-") as made:
        folder = Path(made)
        (folder / CONFIG).symlink_to((files.folder / CONFIG).absolute())
        tensors = {name: tensor.contiguous().clone() for name, tensor in _read_tensors(files, "cpu").items()}
        save_file(tensors, str(folder / files.weights.name))  # those of a pickle may share memory
        yield folder


def _copies(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _unloaded(peft_model: Any, missing: Iterable[str]) -> list[str]:
    """Return the missing names whose parameter was not loaded under another name either."""
    places = dict(peft_model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in places.items() if name not in set(missing)}
    return [name for name in missing if id(places.get(name)) not in loaded]


# --- by a skeleton ----------------------------------------------------------------------------------------------------


def _from_skeleton(base: LoadedBase, files: AdapterFiles) -> Adapter | None:
    """Put an adapter on an existing skeleton of its configuration; ``None`` if there is none.

    Raises:
        RuntimeError: A tensor does not have the shape of its place.
    """
    config = _config(files)
    skeleton = base.skeletons.find(files, config)
    if skeleton is None:
        return None
    config = adopted(config, skeleton)
    device = skeleton.device
    in_one = device is not None and files.weights.is_file()
    packed = read_packed(files.weights, files.entries or {}, skeleton.places, device) if in_one else None
    if packed is not None:
        weights, whole = packed
        return _on_skeleton(files, skeleton, config, weights, (whole,))
    return _on_skeleton(files, skeleton, config, skeleton.placed(_read_tensors(files, str(device or "cpu"))))


def _on_skeleton(
    files: AdapterFiles, skeleton: Skeleton, config: Any, weights: dict[str, Any], memory: tuple[Any, ...] = ()
) -> Adapter:
    own = {skeleton.names[name]: parameter for name, parameter in weights.items()}
    memory = memory or tuple(own.values())
    return Adapter(files, OnSkeleton(skeleton, config, weights, memory), own, skeleton.scaling, memory)


def _read_tensors(files: AdapterFiles, device: str) -> dict[str, Any]:
    """Read the tensors of an adapter's file by name. Callers copy them before use."""
    from safetensors.torch import load_file

    is_pickle = not files.weights.is_file()
    return files.named(read_pickle(files, device) if is_pickle else load_file(str(files.weights), device=device))
