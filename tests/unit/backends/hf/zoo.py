"""A specimen of each kind of PEFT adapter, and how pytest-sway serves it.

`python -m tests.unit.backends.hf.zoo` writes it as a table to `docs/pages/reference/adapters.md`, and a test compares.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.tiny import TEXT, WORDS, make_tokenizer, quiet

PAGE = Path(__file__).parents[4] / "docs" / "pages" / "reference" / "adapters.md"
PEFT_VERSION = tuple(int(part) for part in re.findall(r"\d+", version("peft"))[:2])
TRANSFORMERS_VERSION = tuple(int(part) for part in re.findall(r"\d+", version("transformers"))[:2])
_TABLE = re.compile(r"(<!-- the zoo -->\n).*?(<!-- end -->)", re.DOTALL)


class Shares(StrEnum):
    """How much of its base's memory an adapter shares, in the table's words."""

    ALL = "all"
    REST = "what it does not rewrite"


@dataclass(frozen=True)
class Settings:
    """A nested PEFT configuration, by the name of its class, created once PEFT is imported."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Specimen:
    """One kind of adapter, and how to make one.

    Attributes:
        name: Its name in the table.
        kind: Its PEFT type.
        shares: How much of its base's memory it shares.
        config: Its configuration class in PEFT.
        fields: Fields of its configuration.
        base: Fields of the tiny base's configuration.
        words: New words that it brings.
        since: The first version of PEFT that has it.
        noticed: Whether an untrained one is detected, since it changes nothing.
        reproducible: Whether each PEFT load of the same files gives the same weights.
        needs: A library that PEFT needs for it.
    """

    name: str
    kind: str
    shares: Shares
    config: str
    fields: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    since: tuple[int, int] = (0, 19)
    noticed: bool = True
    reproducible: bool = True
    needs: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".strip()


@dataclass(frozen=True)
class Refusal:
    """One kind of adapter that is refused.

    Attributes:
        name: Its name in the table.
        kind: Its PEFT type.
        config: Further fields of its ``adapter_config.json``.
        error: The name of the error.
        text: The error's message.
        why: The reason in the table.
        unless: A library with which it is not refused.
    """

    name: str
    kind: str
    config: dict[str, Any]
    error: str
    text: str
    why: str
    unless: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".strip()


def _ids(*words: str) -> list[int]:
    return [4 + WORDS.index(word) for word in words]


_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8}
_Q: dict[str, Any] = {"target_modules": ["q_proj"]}
_TIED = {"tie_word_embeddings": True}
_BIASED = {"attention_bias": True}
_TOKENS = _ids("sun", "sets")
_WORDS = ("quark", "lepton")
_NEW = [len(WORDS) + 4 + i for i in range(len(_WORDS))]


def _lora(name: str, shares: Shares = Shares.ALL, *, base: dict[str, Any] | None = None, **fields: Any) -> Specimen:
    own = {key: fields.pop(key) for key in ("words", "since", "noticed", "reproducible") if key in fields}
    return Specimen(name, "LORA", shares, "LoraConfig", _LORA | _Q | fields, base or {}, **own)


def _other(kind: str, config: str, *, name: str = "", **fields: Any) -> Specimen:
    own = {key: fields.pop(key) for key in ("base", "since", "noticed", "needs") if key in fields}
    return Specimen(name, kind, Shares.ALL, config, _Q | fields, **own)


def _prompt(kind: str, config: str, *, name: str = "", **fields: Any) -> Specimen:
    return Specimen(name, kind, Shares.ALL, config, fields, noticed=False)


def _specimens() -> list[Specimen]:
    blocks = Settings("BdLoraConfig", {"target_modules_bd_a": ["q_proj"], "nblocks": 2})
    return [
        _lora("`r`, `lora_alpha`", r=2, lora_alpha=3),
        _lora("`use_rslora`", use_rslora=True),
        _lora("`use_dora`", use_dora=True),
        _lora(
            "`rank_pattern`, `alpha_pattern`",
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 2},
            alpha_pattern={"up_proj": 3},
        ),
        _lora('`target_modules="all-linear"`', target_modules="all-linear"),
        _lora("`target_modules` as a pattern", target_modules=r".*layers\.1\..*(q|v)_proj"),
        _lora("`layers_to_transform`", layers_to_transform=[1]),
        _lora("`exclude_modules`", target_modules="all-linear", exclude_modules=["down_proj"]),
        _lora("`lora_bias`", base=_BIASED, lora_bias=True),
        _lora("`lora_dropout`", lora_dropout=0.5),
        _lora("`init_lora_weights=False`", init_lora_weights=False, noticed=False),
        _lora('`init_lora_weights="gaussian"`', init_lora_weights="gaussian"),
        _lora('`init_lora_weights="eva"`', init_lora_weights="eva"),
        _lora('`init_lora_weights="orthogonal"`', init_lora_weights="orthogonal"),
        _lora("`modules_to_save`: output layer, norms", modules_to_save=["lm_head", "norm"]),
        _lora("`modules_to_save` with `use_dora`", modules_to_save=["lm_head"], use_dora=True),
        _lora("`trainable_token_indices`", trainable_token_indices=_TOKENS),
        _lora("`trainable_token_indices`, tied embeddings", base=_TIED, trainable_token_indices=_TOKENS),
        _lora("`modules_to_save`: embeddings", modules_to_save=["embed_tokens"]),
        _lora("`modules_to_save`: tied embeddings", base=_TIED, modules_to_save=["embed_tokens"]),
        _lora(
            "`modules_to_save`: both of tied embeddings",
            base=_TIED,
            modules_to_save=["embed_tokens", "lm_head"],
        ),
        _lora(
            "`modules_to_save`, `ensure_weight_tying`",
            base=_TIED,
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
        _lora("embeddings as targets", target_modules=["embed_tokens", "q_proj"]),
        _lora("tied embeddings as targets", base=_TIED, target_modules=["embed_tokens"]),
        _lora(
            "tied embeddings as targets, `ensure_weight_tying`",
            base=_TIED,
            target_modules=["embed_tokens"],
            ensure_weight_tying=True,
        ),
        _lora("output layer as target", target_modules=["lm_head"]),
        _lora(
            "a resized vocabulary",
            Shares.REST,
            words=_WORDS,
            modules_to_save=["embed_tokens", "lm_head"],
        ),
        _lora("a resized vocabulary, tied embeddings", Shares.REST, base=_TIED, words=_WORDS),
        _lora(
            "`trainable_token_indices`: new words",
            Shares.REST,
            words=_WORDS,
            trainable_token_indices=_NEW,
            noticed=False,
        ),
        _lora(
            "`trainable_token_indices`: new words, tied embeddings",
            Shares.REST,
            base=_TIED,
            words=_WORDS,
            trainable_token_indices=_NEW,
            noticed=False,
        ),
        _lora(
            "embeddings and output layer as targets, new words",
            Shares.REST,
            words=_WORDS,
            target_modules=["q_proj", "embed_tokens", "lm_head"],
        ),
        _lora('`bias="lora_only"`', Shares.REST, base=_BIASED, bias="lora_only"),
        _lora('`bias="all"`', Shares.REST, base=_BIASED, bias="all"),
        _lora("PiSSA", Shares.REST, init_lora_weights="pissa"),
        _lora(
            "PiSSA, `pissa_niter_*`", Shares.REST, init_lora_weights="pissa_niter_4", noticed=False, reproducible=False
        ),
        _lora("OLoRA", Shares.REST, init_lora_weights="olora"),
        _lora("MiCA", init_lora_weights="mica", since=(0, 20)),
        _lora("KaSA", Shares.REST, kasa_config=Settings("KasaConfig"), since=(0, 21), noticed=False),
        _lora("MonteCLoRA", monteclora_config=Settings("MontecloraConfig"), since=(0, 20)),
        _lora("VeLoRA", velora_config=Settings("VeloraConfig"), since=(0, 20)),
        _lora("aLoRA", alora_invocation_tokens=_ids("in", "the")),
        _lora("BD-LoRA", use_bdlora=blocks),
        _lora("`target_parameters`", target_parameters=["v_proj.weight"]),
        _lora("`layer_replication`", layer_replication=[[0, 2], [1, 2]], noticed=False),
        _other("ADALORA", "AdaLoraConfig", init_r=4, target_r=2, total_step=6, tinit=1, tfinal=1),
        _other("ADAMSS", "AdamssConfig", r=4, needs="sklearn"),
        _other("ADAPTION_PROMPT", "AdaptionPromptConfig", target_modules=None, adapter_len=3, adapter_layers=1),
        _other("BEFT", "BeftConfig", target_modules=["v_proj"], since=(0, 20)),
        _other("BOFT", "BOFTConfig", boft_block_size=4),
        _other("C3A", "C3AConfig", block_size=8, noticed=False),
        _prompt("CARTRIDGE", "CartridgeConfig", num_virtual_tokens=3),
        _prompt("CPT", "CPTConfig", cpt_token_ids=_ids("in", "the", "sea")),
        _other("DEFT", "DeftConfig", r=4, since=(0, 20)),
        _other("DELORA", "DeloraConfig", r=4),
        _other("FOURIERFT", "FourierFTConfig", n_frequency=10, noticed=False),
        _other("FROD", "FrodConfig", since=(0, 20)),
        _other("GLORA", "GloraConfig", r=4, since=(0, 20)),
        _other("GRALORA", "GraloraConfig", r=4, alpha=8, gralora_k=2),
        _other("HIRA", "HiraConfig", r=4, since=(0, 20)),
        _other("HRA", "HRAConfig", r=4),
        _other("IA3", "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        _other("LILY", "LilyConfig", r=4, stride_A=1, num_B=2),
        _other("LN_TUNING", "LNTuningConfig", target_modules=["input_layernorm"]),
        _other("LOHA", "LoHaConfig", r=2),
        _other("LOKR", "LoKrConfig", r=2),
        _other("MISS", "MissConfig", r=4),
        _other("MISS", "MissConfig", name='`init_weights="bat"`', r=4, init_weights="bat"),
        _other("OFT", "OFTConfig", oft_block_size=8, r=0),
        _other("OSF", "OSFConfig"),
        _other("PEANUT", "PeanutConfig", r=4, depth=1),
        _prompt("PREFIX_TUNING", "PrefixTuningConfig", num_virtual_tokens=3),
        _prompt("PROMPT_TUNING", "PromptTuningConfig", num_virtual_tokens=3),
        _other("PSOFT", "PsoftConfig", r=4),
        _other("PVERA", "PveraConfig", r=4),
        _prompt("P_TUNING", "PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=16),
        _other("RANDLORA", "RandLoraConfig", r=4),
        _other("ROAD", "RoadConfig", group_size=8),
        _other(
            "SHADOW",
            "ShadowConfig",
            target_modules=None,
            r=4,
            shadow_hidden_size=16,
            shadow_num_attention_heads=4,
            shadow_intermediate_size=16,
            since=(0, 21),
        ),
        _other("SHIRA", "ShiraConfig", r=2),
        _other("SUPERTUNING", "SupertuningConfig", sparsity=0.9, since=(0, 21)),
        _other("TINYLORA", "TinyLoraConfig", r=2, u=4),
        _other("TRAINABLE_TOKENS", "TrainableTokensConfig", token_indices=_TOKENS, target_modules=["embed_tokens"]),
        _other("UNILORA", "UniLoraConfig", r=2, theta_d_length=32, since=(0, 20), noticed=False),
        _other("VBLORA", "VBLoRAConfig", r=2, num_vectors=8, vector_length=16, topk=2, noticed=False),
        _other("VERA", "VeraConfig", r=4),
        _other("VERA", "VeraConfig", name="`save_projection=False`", r=4, save_projection=False),
        _other("WAVEFT", "WaveFTConfig", n_frequency=20),
    ]


_TASKS = "was trained for several tasks, and a prompt cannot say which one is meant"
_ELSEWHERE = "mixes adapters from other folders, which its spec does not name"
_UNKNOWN_BASE = (
    "its training began by rewriting weights of the base with what it learned from data, which its folder does not"
    " have; convert it where it was trained"
)

REFUSALS = [
    Refusal("CorDA, unless converted", "LORA", {"init_lora_weights": "corda"}, "SpecError", "'corda'", _UNKNOWN_BASE),
    Refusal(
        "LoRA-GA, unless converted", "LORA", {"init_lora_weights": "lora_ga"}, "SpecError", "'lora_ga'", _UNKNOWN_BASE
    ),
    Refusal(
        "LoftQ",
        "LORA",
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        "BackendNotAvailableError",
        "needs what this environment lacks",
        "without bitsandbytes, scipy and a GPU, which PEFT needs for it",
        unless="bitsandbytes",
    ),
    Refusal("Arrow", "LORA", {"arrow_config": {"top_k": 1}}, "SpecError", "mixes adapters from other", _ELSEWHERE),
    Refusal(
        "without scikit-learn",
        "ADAMSS",
        {"r": 4},
        "BackendNotAvailableError",
        "scikit-learn is required",
        "PEFT needs scikit-learn for it",
        unless="sklearn",
    ),
    Refusal("", "MULTITASK_PROMPT_TUNING", {}, "SpecError", "trained for several tasks", _TASKS),
    Refusal("", "POLY", {}, "SpecError", "trained for several tasks", _TASKS),
    Refusal("", "XLORA", {}, "SpecError", "mixes adapters from other folders", _ELSEWHERE),
]

ALL = _specimens()
SPECIMENS = [each for each in ALL if each.since <= PEFT_VERSION and (not each.needs or find_spec(each.needs))]
"""The specimens that the installed PEFT has, with what it needs for them; only these are tested."""


def train(specimen: Specimen, model: Any, tokenizer: Any, folder: Path, *, steps: int = 3) -> Path:
    """Train a specimen on ``model``, which changes, and save it; ``steps=0`` saves it untrained."""
    import peft
    import torch

    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if specimen.words:
            model.resize_token_embeddings(make_tokenizer(folder, extra=specimen.words), mean_resizing=False)
        fields = {
            name: getattr(peft, value.config)(**value.fields) if isinstance(value, Settings) else copy.deepcopy(value)
            for name, value in specimen.fields.items()
        }
        config = getattr(peft, specimen.config)(task_type="CAUSAL_LM", **fields)
        model = peft.get_peft_model(model, config).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for step in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if hasattr(model.base_model, "update_and_allocate"):
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.save_pretrained(str(folder))
    return folder


def loaded(specimen: Specimen, model: Any, folder: Path) -> Any:
    """Let PEFT load the specimen onto ``model``, which changes."""
    import torch
    from peft import PeftModel

    with quiet(), torch.random.fork_rng(devices=[]):
        if specimen.words:
            model.resize_token_embeddings(len(WORDS) + 4 + len(specimen.words), mean_resizing=False)
        torch.manual_seed(0)
        return PeftModel.from_pretrained(model, str(folder)).eval()


def table() -> str:
    """Return the table of `docs/pages/reference/adapters.md`."""
    rows = [(s.kind, s.name, s.shares.value, "refused" if s.noticed else "not detected") for s in ALL]
    rows += [(r.kind, r.name, f"refused: {r.why}", "") for r in REFUSALS]
    rows.sort(key=lambda row: (row[0] != "LORA", row[0]))
    lines = ["| PEFT type | form | shares | untrained |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def page() -> str:
    """Return `docs/pages/reference/adapters.md` with the current table."""
    return _TABLE.sub(lambda match: match[1] + table() + "\n" + match[2], PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
