"""Load models and tokenizers from local folders and the hub: no remote code, no pickles, and
messages a user can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from palu.data.collator import Collator
from palu.models.folders import (
    check_architecture,
    check_loaded,
    check_pattern,
    check_weights_files,
    reading,
    warn_of_left_out,
    warn_of_not_finite,
)
from palu.models.hub import located
from palu.models.lora import ADAPTER_CONFIG, attach_adapter, base_folder, is_adapter
from palu.models.wrappers import unwrap
from palu.storage.json_files import read_object

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | None) -> torch.device:
    """Return the device of a name; None or "auto" is an accelerator when there is one, else the
    CPU. Raises ValueError for an unknown name, or where this machine has no such device."""
    if device is None or device == "auto":
        if torch.accelerator.is_available():
            return torch.device(torch.accelerator.current_accelerator().type)
        return torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device must be auto, cpu or a name such as cuda or cuda:1, not {device!r}"
        ) from None
    if resolved.type != "cpu":
        available = torch.accelerator.is_available()
        if not available or torch.accelerator.current_accelerator().type != resolved.type:
            raise ValueError(f"device {device!r} was asked for, but this machine has none")
        if resolved.index is not None and resolved.index >= torch.accelerator.device_count():
            raise ValueError(
                f"device {device!r} was asked for, but this machine has "
                f"{torch.accelerator.device_count()}"
            )
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """Return the dtype of a name; "auto" (also for None) is the one the weights were saved in.
    Raise ValueError for unknown names."""
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]


def model_folder(path: str | Path) -> Path:
    """Return `path` if it is a folder of a model or of a PEFT adapter, or the folder of a model on
    the hub (see `palu.models.hub.located`). Raises FileNotFoundError and NotADirectoryError."""
    folder = located(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"model {str(folder)!r} is a file; name the folder it lies in")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model folder {str(folder)!r} does not exist (nor is it the id of a model on the hub: "
            "org/name)"
        )
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise FileNotFoundError(
            f"{str(folder)!r} is not a Hugging Face model folder: it has no config.json (nor the "
            f"{ADAPTER_CONFIG} of an adapter)"
        )
    return folder


def folder_with(name: str, path: str | Path, base: str | Path | None = None) -> Path:
    """Return the folder that has a file: `path`, or where that is an adapter without it, its base
    model. Raises ValueError where the adapter names no base model that is here."""
    folder = located(path)
    if (folder / name).is_file() or not is_adapter(folder):
        return folder
    return base_folder(folder) if base is None else located(base)


def load_model(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    *,
    base: str | Path | None = None,
    allow_missing: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model from a folder or the hub (safetensors only), in eval mode, on
    `device`.

    Args:
        path: a model (its folder, or its id on the hub: `org/name`), or a PEFT adapter, which comes
            on its base model.
        dtype: of the model's weights; those of an adapter are float32 at least.
        base: the base model of an adapter; None: the one that the adapter names.
        allow_missing: a regular expression of weights that need not be what the config says, see
            `palu.models.folders.check_loaded`.

    Raises:
        FileNotFoundError: no such model folder.
        ValueError: unknown dtype or device, the folder's weights cannot be read or are not those of
            its config, or the adapter cannot be used.
    """
    folder, where, kind = model_folder(path), resolve_device(device), resolve_dtype(dtype)
    check_pattern(allow_missing)
    whole = folder
    if is_adapter(folder):
        whole = base_folder(folder) if base is None else model_folder(base)
    check_weights_files(whole)
    with reading(f"could not load a model from {str(whole)!r}", whole):
        model, loaded = _auto_class(whole).from_pretrained(
            whole,
            dtype=kind,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loaded` reports them
        )
    check_architecture(model)
    _check_special_ids(model, whole)
    check_loaded(model, loaded, whole, allow_missing)
    warn_of_left_out(model, whole)
    warn_of_not_finite(model, whole)
    if whole is not folder:
        model = attach_adapter(model, folder)
    return model.to(where).eval()


def _auto_class(folder: Path) -> type:
    """Return the class that has all of the folder's towers: of a checkpoint with images the one
    of its `architectures`, where AutoModelForCausalLM would take the language part alone."""
    # Not at the top: a command that reads a tokenizer or a config waits for no model.
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    config = read_object(folder / "config.json")
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.get("model_type"))
    named = config.get("architectures") or ()
    return AutoModelForImageTextToText if whole in named else AutoModelForCausalLM


def freeze_other_towers(model: PreTrainedModel | PeftModel) -> None:
    """Freeze what text does not reach: all outside the language model and its output embedding,
    where the config has a text part of its own."""
    inner = unwrap(model)
    if inner.config.get_text_config(decoder=True) is inner.config:
        return
    parts = [inner.get_decoder(), inner.get_output_embeddings(), inner.get_input_embeddings()]
    trained = {p for part in parts if part is not None for p in part.parameters()}
    for parameter in inner.parameters():
        if parameter not in trained:
            parameter.requires_grad_(False)


def load_tokenizer(path: str | Path, *, base: str | Path | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder, or of a model on the hub; of its base model (see
    `load_model`) where it is an adapter without one.

    Raises:
        FileNotFoundError: no such model folder.
        ValueError: it holds no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    folder = folder_with("tokenizer_config.json", model_folder(path), base)
    with reading(f"could not load a tokenizer from {str(folder)!r}", folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_token_ids(
    model: nn.Module, tokenizer: Tokenizer, rows: Iterable[Mapping[str, Any]]
) -> None:
    """Raise ValueError where the embedding has no row for a token of the data, or for the padding.

    Args:
        rows: with `input_ids`, lists of int, and perhaps `alternate_input_ids`, by `tokenizer`.
    """
    columns = ("input_ids", "alternate_input_ids")
    used = {i for row in rows for name in columns for i in row.get(name) or ()}
    count, pad = model.get_input_embeddings().num_embeddings, Collator(tokenizer).pad_id
    if (largest := max(used | {pad})) >= count:
        padding = "" if largest in used else ", which pads batches"
        raise ValueError(
            f"the tokenizer gives token {tokenizer.convert_ids_to_tokens(largest)!r} the id "
            f"{largest}{padding}, and the embedding of the model has {count} rows: resize it "
            "(model.resize_token_embeddings(len(tokenizer))) and train it first, or take the "
            "tokenizer that the model was trained with"
        )


def _check_special_ids(model: PreTrainedModel, folder: Path) -> None:
    """Raise ValueError for special tokens that are no ids: transformers reads them without a
    look."""
    for name in ("config", "generation_config"):
        for kind in ("bos", "eos", "pad"):
            value = getattr(getattr(model, name, None), f"{kind}_token_id", None)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and -(2**31) <= i < 2**31 for i in ids):
                raise ValueError(
                    f"{folder / name}.json has {kind}_token_id {value!r}; it must be an id"
                )


def check_precision(dtype: str | None, bf16: bool) -> None:
    """Raise ValueError for weights that a run cannot train well: see `load_to_train`."""
    if dtype == "float16":
        raise ValueError(
            "--dtype float16 cannot train: small gradients vanish in it. Leave --dtype out: a "
            "float16 model is trained in float32 and saved in float16"
        )
    if bf16 and dtype == "bfloat16":
        raise ValueError(
            "--bf16 computes in bfloat16 over float32 weights, and --dtype bfloat16 makes the "
            "weights bfloat16; leave one of them out"
        )


def load_to_train(
    path: str | Path, dtype: str | None, device: str, *, bf16: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """Load a model in the dtype that it is trained in; also return the dtype to save each
    parameter in.

    float16 weights become float32, and so do all with `bf16` (autocast over float32 weights).

    Args:
        bf16: whether the run has bfloat16 autocast.
        **options: of `load_model`.

    Raises:
        FileNotFoundError, ValueError: as `load_model` and `check_precision`.
    """
    check_precision(dtype, bf16)
    model = load_model(path, dtype, device, **options)
    saved = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if bf16 or model.dtype == torch.float16:
        model.float()
    return model, saved
