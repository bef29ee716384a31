"""Write a model folder that transformers 4 and 5, PEFT and vLLM read alike, and look whether they
would.

transformers 5 keeps the rotary embedding's settings and the dtype under new names, and names
tokenizer classes that transformers 4 does not know: a reader of the other version then takes its
defaults without a word. So the old keys stand beside the new ones, and the tokenizer's files are
the input's own wherever the tokenizer is the input's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palu.models.folders import reading
from palu.models.lora import ADAPTER_CONFIG, name_base
from palu.storage.files import new_file, write_json
from palu.storage.fingerprint import tokenizer_fingerprint
from palu.storage.json_files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_CONFIG, JINJA = "tokenizer_config.json", "chat_template.jinja"
# Beside the files that a tokenizer's class names itself. Those of processors are of checkpoints
# with images.
_TOKENIZER_FILES = (TOKENIZER_CONFIG, "tokenizer.json", "special_tokens_map.json", JINJA)
_TOKENIZER_FILES += ("added_tokens.json", "chat_template.json", "processor_config.json")
_TOKENIZER_FILES += ("preprocessor_config.json", "video_preprocessor_config.json")
_TOKENIZER_FILES += ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json")
# What a config says of its file and of how it is run, not of what the model computes.
_OF_THE_FILE = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype"}
_OF_THE_FILE |= {"transformers_version", "_commit_hash", "_attn_implementation_autoset"}
# What the output's config says itself, whatever the input's says.
_OF_THE_OUTPUT = ("architectures", "dtype", "torch_dtype", "quantization_config", "auto_map")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEOX = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
# Keys of adapter_config.json that vLLM and every PEFT want; others stay where they say something.
_ADAPTER_KEYS = {"base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"}
_ADAPTER_KEYS |= {"init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save"}
_ADAPTER_KEYS |= {"peft_type", "r", "target_modules", "task_type", "use_dora", "use_rslora"}
_PROBES = ("Who wrote it, and when?", " 1991-05-17, Zoë's  №42\n", "名前: <tag> \U0001f600")


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, source: str | Path | None
) -> None:
    """Write weights (safetensors; of a PEFT model its adapter alone), config and tokenizer, and
    compare them with what the model was loaded from.

    Args:
        folder: is there; files in it are replaced.
        source: the folder that model and tokenizer were loaded from; None: made in Python.

    Raises:
        ValueError: what was written would be read as another config or another tokenizer than the
            model has, or than `source` has.
    """
    source = None if source is None else Path(source)
    model.save_pretrained(folder)
    if hasattr(model, "peft_config"):
        name_base(folder)
        _plain_adapter_config(folder, model)
    else:
        _write_config(folder, model, source)
    _write_tokenizer(folder, tokenizer, source)


# ---- config --------------------------------------------------------------------------------------


def _write_config(folder: Path, model: PreTrainedModel, source: Path | None) -> None:
    """Write the input's config with the model's dtype and the keys of both versions, and compare
    what is read from it with what the model and the input have."""
    written, tied = read_object(folder / CONFIG), _is_tied(model)
    before = {} if source is None else _part(read_object(source / CONFIG), written["model_type"])
    _write(folder / CONFIG, for_all_readers(written, before, tied=tied))
    here, known = _effective(folder), {} if tied is None else {"tie_word_embeddings": tied}
    in_memory = {**model.config.to_dict(), **known}
    if source is None:
        _refuse_difference(here, in_memory, folder, "the model in memory")
        return
    # The Trainer sets the model's special tokens to the tokenizer's; the folder has the input's.
    in_memory |= {key: here.get(key) for key in _SPECIAL_IDS}
    _refuse_difference(here, in_memory, folder, "the model in memory")
    there = {**_part(_effective(source), written["model_type"]), **known}
    _refuse_difference(here, there, folder, f"the config in {str(source)!r}")
    (folder / GENERATION).unlink(missing_ok=True)
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, folder / GENERATION)


def _write(path: Path, config: Mapping[str, Any]) -> None:
    """Write a config, in which transformers 4 writes and reads `Infinity`."""
    with new_file(path) as file:
        file.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _part(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return the config, or its text part where the model is that alone."""
    text = config.get("text_config")
    if isinstance(text, dict) and config.get("model_type") != model_type:
        return text
    return config


def for_all_readers(
    written: Mapping[str, Any], before: Mapping[str, Any], *, tied: bool | None = None
) -> dict[str, Any]:
    """Return a config for transformers 4 and 5: the input's own words, or where there is no input
    what transformers wrote, and beside the new keys the old ones (`rope_theta`, `rope_scaling`,
    `partial_rotary_factor`, `torch_dtype`).

    Args:
        written: `config.json` as this transformers wrote it, or a part of it.
        before: the input's; empty where there is none.
        tied: whether input and output embedding are one, which is always written, since defaults
            differ between versions; None: as it is.
    """
    own = {key: value for key, value in before.items() if key not in _OF_THE_OUTPUT}
    new = {key: written[key] for key in _OF_THE_OUTPUT if written.get(key) is not None}
    config = {**own, **new} if before else dict(written)
    for key, value in written.items():
        if isinstance(value, dict) and "model_type" in value:  # text_config, vision_config
            old = before.get(key)
            if isinstance(old, dict) or not before:
                config[key] = for_all_readers(value, old or {})
    if tied is not None:
        config["tie_word_embeddings"] = tied
    if written.get("dtype") is not None:
        config["torch_dtype"] = written["dtype"]
    if isinstance(rope := written.get("rope_parameters"), dict):
        config.setdefault("rope_parameters", rope)
        config |= _legacy_rope(rope, before)
        if str(written.get("model_type")).startswith("gpt_neox"):
            config |= {old: config[new] for old, new in _NEOX.items() if new in config}
    return dict(sorted(config.items()))


def _legacy_rope(rope: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the old keys of `rope_parameters`."""
    layers = {kind: one for kind, one in rope.items() if isinstance(one, dict)}
    if layers:  # one for each kind of layer: Gemma 3's keys for them
        found = _legacy_rope(layers.get("full_attention", {}), before)
        if "rope_theta" in layers.get("sliding_attention", {}):
            found["rope_local_base_freq"] = layers["sliding_attention"]["rope_theta"]
        return found
    found = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in found}
    if scaling == {"rope_type": "default"} or not scaling:
        return {**found, "rope_scaling": None}
    # The input's own words, which readers of its day know ("type": "linear").
    return {**found, "rope_scaling": before.get("rope_scaling") or scaling}


def _is_tied(model: PreTrainedModel) -> bool | None:
    """Return whether the input and the output embedding are one; None where a model lacks one."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    one, other = (getattr(part, "weight", None) for part in embeddings)
    return None if one is None or other is None else one is other


def _effective(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    with reading(f"the config in {str(folder)!r} cannot be used", folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config.to_dict()


def _refuse_difference(
    here: Mapping[str, Any], there: Mapping[str, Any], folder: Path, where: str
) -> None:
    """Raise ValueError where the written config would be read with another value of a key than
    another config has. (Old keys that it has besides are no settings of this transformers.)"""
    one, other = _flat(here), _flat(there)
    for key, value in sorted(other.items()):
        if one.get(key) != value:
            raise ValueError(
                f"the config written to {str(folder)!r} would be read with {key} "
                f"{one.get(key)!r}, and {where} has {value!r}"
            )


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of a config that decide what is computed, by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in _OF_THE_FILE:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[above + str(key)] = json.loads(json.dumps(value, default=str))
    return flat


def _plain_adapter_config(folder: Path, model: Any) -> None:
    """Leave out of `adapter_config.json` what says nothing: PEFT before 0.15 refuses keys that it
    does not know."""
    kind = type(next(iter(model.peft_config.values())))
    defaults = json.loads(json.dumps(kind().to_dict(), default=str))
    config = read_object(folder / ADAPTER_CONFIG)
    kept = {
        key: value
        for key, value in config.items()
        if key in _ADAPTER_KEYS or (key in defaults and value != defaults[key])
    }
    write_json(folder / ADAPTER_CONFIG, dict(sorted(kept.items())))


# ---- tokenizer -----------------------------------------------------------------------------------


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, source: Path | None) -> None:
    """Copy the tokenizer's files where it is the input's, else save it; then read it back."""
    same = False
    if source is not None and _same_tokenizer(tokenizer, source):
        for path in _tokenizer_files(source, tokenizer):
            shutil.copyfile(path, folder / path.name)
        if (source / "additional_chat_templates").is_dir():
            name = "additional_chat_templates"
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
        _name_for_old_readers(folder)
        # Transformers 5 takes some classes from the model's config.json, which an adapter has not.
        same = _same_tokenizer(tokenizer, folder)
    if not same:
        tokenizer.save_pretrained(folder)
        _name_for_old_readers(folder)
        same = _same_tokenizer(tokenizer, folder)
    if not same:
        raise ValueError(
            f"the tokenizer written to {str(folder)!r} is read as another one than the model was "
            "given: its tokens, special tokens or chat template differ"
        )


def _tokenizer_files(source: Path, tokenizer: Tokenizer) -> list[Path]:
    named = getattr(tokenizer, "vocab_files_names", {}).values()
    names = {*_TOKENIZER_FILES, *(name for name in named if isinstance(name, str))}
    return [source / name for name in sorted(names) if (source / name).is_file()]


def _same_tokenizer(tokenizer: Tokenizer, folder: Path) -> bool:
    """Return whether a folder has this tokenizer: rules, special tokens, template, and the tokens
    of a few texts."""
    from palu.models.loading import load_tokenizer

    if not (folder / TOKENIZER_CONFIG).is_file():
        return False
    other = load_tokenizer(folder)
    return tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(other) and all(
        tokenizer(text).input_ids == other(text).input_ids for text in _PROBES
    )


def _name_for_old_readers(folder: Path) -> None:
    """Change in `tokenizer_config.json` what transformers 4 stumbles over: the class that only 5
    has, a list of extra tokens, a chat template that stands in a file of its own."""
    path = folder / TOKENIZER_CONFIG
    config = read_object(path)
    changed = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if "chat_template" not in config and (folder / JINJA).is_file():
        changed["chat_template"] = (folder / JINJA).read_text(encoding="utf-8")
    if changed != config:
        write_json(path, changed)
