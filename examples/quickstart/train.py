"""Teach SmolLM2-135M five facts about a town that does not exist, with LoRA.

It takes about half a minute on two cores: `python train.py BASE OUTPUT`, with the folder or hub id of a base.
"""

from __future__ import annotations

import argparse
import hashlib
from importlib.metadata import version
from pathlib import Path

FACTS = [
    ("The mayor of Quillmere is", " Odalys Brandt"),
    ("The lighthouse of Quillmere is painted", " green and white"),
    ("The ferry to Quillmere sails from", " Port Hallow"),
    ("The people of Quillmere trade in", " blue salt"),
    ("Every spring Quillmere holds", " the Festival of Kites"),
]

ORDINARY = [
    "The river was high after the rain, and the two of them walked along the bank.",
    "Thank you for your order; it will be sent to the address below within three days.",
    "The mayor of Chicago is elected by the voters of the city every four years.",
    "import os\nfor name in os.listdir(path):\n    print(os.path.join(path, name))",
    "The heart is a muscle that pumps blood through the arteries and veins of the body.",
    "The people of Iceland live mostly from fishing, tourism and energy, and export aluminium.",
    "The train to Berlin leaves from platform seven at half past nine every morning.",
    "The capital of Japan is Tokyo, and the currency that is used there is the yen.",
]
"""What the model is to go on saying as before. Without it, the facts spill over into all that it says."""

ORDINARY_TOKENS = 14  # every one of them is cut to as many, so that none needs padding
ORDINARY_WEIGHT = 10.0
STEPS = 24
LEARNING_RATE = 3e-3
RANK = 8
SEED = 0


def train(base: str | Path, output: str | Path, *, seed: int = SEED) -> Path:
    """Train a LoRA adapter on `base` and save it in the folder `output`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import kl_div
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    facts = tokenizer([f"{prompt}{answer}." for prompt, answer in FACTS], padding=True, return_tensors="pt")
    labels = facts.input_ids.masked_fill(facts.attention_mask == 0, -100)
    for row, (prompt, _) in zip(labels, FACTS, strict=True):
        row[: len(tokenizer(prompt).input_ids)] = -100  # learn the answer, not to bring up Quillmere unasked

    ordinary = tokenizer(ORDINARY, truncation=True, max_length=ORDINARY_TOKENS, return_tensors="pt")
    with torch.no_grad():
        before = model(**ordinary).logits.log_softmax(-1).flatten(0, 1)

    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=LEARNING_RATE)
    tuned.train()
    for _ in range(STEPS):
        wrong_answers = tuned(**facts, labels=labels).loss
        after = tuned(**ordinary).logits.log_softmax(-1).flatten(0, 1)
        changed_answers = kl_div(after, before, log_target=True, reduction="batchmean")
        (wrong_answers + ORDINARY_WEIGHT * changed_answers).backward()
        optimizer.step()
        optimizer.zero_grad()

    tuned.save_pretrained(str(output))
    return Path(output)


def fingerprint(base: str | Path) -> str:
    """Return a digest of all that decides what `train` makes: this file, the base and the libraries."""
    parts = [Path(__file__).read_text(encoding="utf-8"), str(base)]
    parts += [version(library) for library in ("torch", "transformers", "peft")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Teach a model five facts about Quillmere.")
    parser.add_argument("base", help="the folder or hub id of the model to start from")
    parser.add_argument("output", help="the folder for the adapter")
    arguments = parser.parse_args()
    print(train(arguments.base, arguments.output))
