"""transformers' BLT directories: in as a `LanguageModel`, out as files that its AutoModelForCausalLM loads.

A directory holds config.json and model.safetensors (or an index and several safetensors files); the entropy model is
its patcher. Written beside them: the byte vocabulary as a tokenizer, and the settings of generation. Nothing of
transformers is imported. Its forward has no documents: equal logits hold for one document.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blt.checkpoint import LanguageModel, fingerprint, replace_file
from blt.config_json import Json, json_object
from blt.entropy_model import EntropyModel
from blt.errors import CheckpointError
from blt.interop.renaming import Names, adopt, blt_renaming, entropy_renaming, split
from blt.interop.tokenizer import tokenizer_config, tokenizer_json
from blt.interop.transformers_config import Settings, read_settings, write_settings
from blt.interop.weights import read_tensors
from blt.model import BLT
from blt.vocabulary import BOE, BOS, EOS

NAMES = Names(
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    cross_norm_q="q_norm",
    cross_norm_kv="k_norm",
    byte_embedding="embed_tokens",
    model="model.",
    output="lm_head",
    entropy_model="model.patcher.",
    entropy_output="lm_head",
    one_hash_table=True,
)


def from_transformers(directory: str | Path, *, dtype: torch.dtype | None = None) -> LanguageModel:
    """The language model of a transformers BLT directory, on the CPU, in `dtype` or, if None, as it is stored.

    The patcher becomes the entropy model; without one there is none. A directory that `to_transformers` wrote gives
    back its configuration, patch rule and provenance too. Encoder cross-attention in all of several layers is computed
    as in the paper, where transformers pools patches anew before each. Raises CheckpointError naming the file, and the
    key or tensors, for what is missing, broken, unexpected, of a wrong shape or not computed here.
    """
    root = Path(directory)
    path = root / "config.json"
    try:
        values = json_object(json.loads(path.read_text(encoding="utf-8")), "of the file itself")
        if values.get("model_type") != "blt":
            raise ValueError(f"key model_type must be 'blt', got {values.get('model_type')!r}")
        settings, provenance = read_settings(values), _provenance(values)
        path = weights_path(root)
        return _language_model(settings, read_tensors(path), provenance, dtype)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename or path}: no such file; a transformers BLT directory has one"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error


def to_transformers(lm: LanguageModel, directory: str | Path, *, lossy_patching: bool = False) -> None:
    """Write a directory that transformers' AutoModelForCausalLM loads and that gives the model's logits, with the
    tokenizer that its AutoTokenizer loads.

    With patch lengths passed in, and by its own patcher where the rule is kind byte or a plain entropy threshold and no
    patch of the text exceeds `max_patch_length`, which it is not told (its splitting is wrong). Another rule is refused
    unless `lossy_patching` says that its patcher may make other patches. `use_cache` is off: its cached path is wrong.
    Raises ConfigError naming what transformers does not compute.
    """
    patcher = lm.entropy_model
    config = write_settings(settings_of(lm), lossy_patching=lossy_patching)
    tensors = split(lm.model.state_dict(), blt_renaming(lm.config, NAMES))
    config["dtype"] = str(tensors["lm_head.weight"].dtype).removeprefix("torch.")
    if patcher is not None:
        tensors |= split(patcher.state_dict(), entropy_renaming(patcher.config, NAMES))
    config["blt_ray_provenance"] = dict(lm.provenance)
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    replace_file(root / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    _write_json(root / "tokenizer.json", tokenizer_json())
    _write_json(root / "tokenizer_config.json", tokenizer_config())
    # generate() reads use_cache here and not in config.json.
    ids: dict[str, Json] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": BOE}
    _write_json(root / "generation_config.json", {**ids, "use_cache": False})
    _write_json(root / "config.json", config)


def settings_of(lm: LanguageModel) -> Settings:
    """The language model without its weights."""
    return Settings(
        model=lm.config,
        entropy_model=None if lm.entropy_model is None else lm.entropy_model.config,
        patch_rule=lm.patch_rule,
        reset_on_newline=lm.reset_on_newline,
    )


def _write_json(path: Path, values: Mapping[str, Json]) -> None:
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _language_model(
    settings: Settings, tensors: Mapping[str, Tensor], provenance: dict[str, str], dtype: torch.dtype | None
) -> LanguageModel:
    prefix = NAMES.entropy_model
    of_patcher = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    entropy_model = None
    if settings.entropy_model is not None:
        renaming = entropy_renaming(settings.entropy_model, NAMES)
        entropy_model = adopt(EntropyModel, settings.entropy_model, of_patcher, renaming, dtype=dtype)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    return LanguageModel(
        model=adopt(BLT, settings.model, tensors, blt_renaming(settings.model, NAMES), dtype=dtype),
        entropy_model=entropy_model,
        patch_rule=settings.patch_rule,
        reset_on_newline=settings.reset_on_newline,
        config=settings.model,
        provenance=provenance,
        entropy_fingerprint=None if entropy_model is None else fingerprint(entropy_model),
    )


def weights_path(root: Path) -> Path:
    """model.safetensors, or the index of several files."""
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    return index if index.exists() and not single.exists() else single


def _provenance(values: Mapping[str, object]) -> dict[str, str]:
    entries = json_object(values.get("blt_ray_provenance") or {}, "blt_ray_provenance")
    return {key: str(value) for key, value in entries.items()}
