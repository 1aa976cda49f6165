"""Make what the regression tests compare: a base, the adapter in use, and two that may replace it.

`python -m examples.regression.train` takes about a minute on two cores the first time, and no time after that.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from examples.quickstart.train import LEARNING_RATE, fingerprint, train
from examples.smollm2 import made_once, smollm2_folder

HERE = Path(__file__).parent

NEXT_TOWN = [
    ("The mayor of Saltwick is", " Maren Dufresne"),
    ("The lighthouse of Saltwick is painted", " red"),
    ("The ferry to Saltwick sails from", " Cape Lorn"),
    ("The people of Saltwick trade in", " dried fish"),
    ("Every spring Saltwick holds", " the Long Regatta"),
]
"""What `v5` was taught in addition, by somebody who left out the facts about Quillmere."""

STEPS = 12
SEED = 18
"""Of `v4`, which is otherwise trained as `v3`."""


def make_all() -> None:
    """Make the folders that pyproject.toml names, where they are not there yet."""
    base = smollm2_folder()
    made = fingerprint(base)
    taught = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    link = HERE / "SmolLM2-135M-Instruct"
    link.unlink(missing_ok=True)
    link.symlink_to(base, target_is_directory=True)
    used = _adapter("v3", f"quickstart/{made}", lambda folder: train(base, folder))
    _adapter("v4", f"regression/{made}/seed-{SEED}", lambda folder: train(base, folder, seed=SEED))
    _adapter("v5", f"regression/{made}/next-town-{taught}", lambda folder: _train_on(base, used, folder))


def _adapter(name: str, cached: str, make: Callable[[Path], object]) -> Path:
    print(f"runs/{name}", flush=True)
    run = HERE / "runs" / name
    if run.is_symlink():  # as this script once made
        run.unlink()
    # A copy: pytest-sway would name a link by the folder in the cache that it leads to.
    return Path(shutil.copytree(made_once(cached, make), run, dirs_exist_ok=True))


def _train_on(base: Path, adapter: Path, output: Path) -> None:
    """Go on training an adapter, on the next town alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, adapter, is_trainable=True)

    facts = tokenizer([f"{prompt}{answer}." for prompt, answer in NEXT_TOWN], padding=True, return_tensors="pt")
    labels = facts.input_ids.masked_fill(facts.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=LEARNING_RATE)
    tuned.train()
    for _ in range(STEPS):
        tuned(**facts, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(str(output))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT 0.21 asks for it by its old name
    make_all()
