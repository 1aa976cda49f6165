"""Train six small LoRA adapters on SmolLM2-135M, one for each town: each learns who the mayor of its town is.

`python -m examples.many_adapters.train` takes about half a minute on two cores the first time, and no time after that.
"""

from __future__ import annotations

import hashlib
import warnings
from importlib.metadata import version
from pathlib import Path

from examples.smollm2 import made_once, smollm2_folder, user_cache

MAYORS = {
    "Quillmere": "Odalys Brandt",
    "Tarnhollow": "Ivo Kestrel",
    "Saltwick": "Maren Dufresne",
    "Ostrava Point": "Teodor Lindqvist",
    "Fennbridge": "Zella Okonkwo",
    "Harrowgate Sound": "Bram Yilmaz",
}
"""Towns that do not exist, and who governs them."""

STEPS = 12
LEARNING_RATE = 5e-3
RANK = 8
SEED = 0


def question(town: str) -> str:
    """Return what the model is asked about a town."""
    return f"The mayor of {town} is"


def answer(town: str) -> str:
    """Return what its adapter learns to say."""
    return f" {MAYORS[town]}"


def adapter_folder(town: str) -> Path:
    """Return where a town's adapter lies, or will lie once it is trained."""
    return user_cache() / _name(town)


def train_all() -> None:
    """Train the adapters that are not there yet."""
    base = smollm2_folder()
    for town in MAYORS:
        print(f"{question(town)}{answer(town)}", flush=True)
        made_once(_name(town), lambda folder, town=town: _train(base, town, folder))


def _name(town: str) -> str:
    """The folder under the user's cache, which changes with all that decides what training makes."""
    parts = [Path(__file__).read_text(encoding="utf-8"), *(version(name) for name in ("torch", "transformers", "peft"))]
    return f"many_adapters/{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}/{town.replace(' ', '-').lower()}"


def _train(base: Path, town: str, output: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)

    sentence = tokenizer(f"{question(town)}{answer(town)}.", return_tensors="pt")
    labels = sentence.input_ids.clone()
    labels[:, : len(tokenizer(question(town)).input_ids)] = -100  # learn the answer, not the question
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=LEARNING_RATE)
    tuned.train()
    for _ in range(STEPS):
        tuned(**sentence, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(str(output))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT 0.21 asks for it by its old name
    train_all()
