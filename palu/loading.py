"""Models and tokenizers from local folders. No remote code, no pickles, and messages a user can act
on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | None) -> torch.device:
    """`None` or "auto": an accelerator when there is one, else the CPU.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
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
    if resolved.type not in ("cpu", "meta"):
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
    """`None` or "auto": the dtype the weights were saved in. Raises ValueError for unknown
    names."""
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]


def model_folder(path: str | Path) -> Path:
    """Checks that `path` is a model folder and returns it.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no `config.json`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {str(folder)!r} does not exist")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is not a Hugging Face model folder: it has no config.json"
        )
    return folder


def load_model(
    path: str | Path, dtype: str | torch.dtype | None = None, device: str | None = None
) -> PreTrainedModel:
    """A causal language model from a local folder (safetensors only), in eval mode, on `device`.

    Raises:
        FileNotFoundError: no such model folder.
        ValueError: unknown dtype or device, or the folder's weights cannot be read.
    """
    folder, where, kind = model_folder(path), resolve_device(device), resolve_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"could not load a model from {str(folder)!r}: {error}") from error
    return model.to(where).eval()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a local model folder.

    Raises:
        FileNotFoundError: no such model folder.
        ValueError: it holds no tokenizer that can be read.
    """
    folder = model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"could not load a tokenizer from {str(folder)!r}: {error}") from error
