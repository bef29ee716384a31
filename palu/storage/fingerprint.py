"""Names for things by their content: an example, a data set, a model, a tokenizer.

All of them are BLAKE2b over bytes that do not depend on device, padding, order or process, so that
two runs can tell whether they speak of the same thing. What `palu.json` tells an auditor of files
is SHA-256, which `sha256sum` prints too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Bytes copied to the host at a time, to bound the memory that hashing a tensor takes.
CHUNK_BYTES = 16 * 2**20

# Settings of a model that do not change its logits: where it came from, how it is run and saved,
# and the special tokens, which `transformers.Trainer` sets to the tokenizer's when it starts.
_NOT_IN_LOGITS = {
    "_name_or_path",
    "architectures",
    "base_model_name_or_path",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "inference_mode",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "peft_version",
    "return_dict",
    "revision",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def example_id(example: Mapping[str, Any]) -> int:
    """Return a stable name of one example: 63 bits that depend on its tokens and labels alone.

    Args:
        example: has `input_ids` and `labels`, integers `[T]`; positions where it has an
            `attention_mask` of 0 do not count.
    """
    digest = hashlib.blake2b(example_bytes(example), digest_size=8, person=b"palu.example")
    return int.from_bytes(digest.digest(), "little") & (2**63 - 1)


def example_bytes(example: Mapping[str, Any]) -> bytes:
    """Return the tokens and labels of an example without padding, of which its id is made."""
    values = np.array([np.asarray(example[key], "<i8") for key in ("input_ids", "labels")])
    mask = example.get("attention_mask")
    return (values if mask is None else values[:, np.asarray(mask) != 0]).tobytes()


def example_ids(batch: Mapping[str, Any]) -> Tensor:
    """Return `example_id` of every row of a padded batch: int64 `[B]` on the CPU.

    Args:
        batch: `input_ids`, `labels` and `attention_mask`, `[B, T]` each, padded on any side.
    """
    keys = [key for key in ("input_ids", "labels", "attention_mask") if key in batch]
    if "attention_mask" in batch and batch["attention_mask"].dim() != 2:
        keys.remove("attention_mask")  # it does not say what is padding
    columns = [batch[key].cpu() for key in keys]
    rows = zip(*columns, strict=True)
    names = [example_id(dict(zip(keys, row, strict=True))) for row in rows]
    return torch.tensor(names, dtype=torch.int64)


def data_fingerprint(ids: Iterable[int]) -> str:
    """Hash a set of examples; order and repetition do not matter."""
    unique = np.array(sorted(set(ids)), dtype="<i8")
    return hashlib.blake2b(unique.tobytes(), digest_size=32, person=b"palu.data").hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Hash what a model computes: every parameter and buffer (name, dtype, shape, bytes), its class
    and the settings that change logits.

    Wrappers of DDP and `torch.compile` do not count; adapters of PEFT do, with their settings.
    Tensors are streamed: no copy of the model is made. Sharded parameters (FSDP) give a
    fingerprint of this process's part.

    Raises:
        ValueError: a tensor has no bytes here (device "meta").
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    tensors |= dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    digest = hashlib.blake2b(digest_size=32, person=b"palu.model")
    digest.update(_text(_settings(model)))
    seen: dict[tuple, str] = {}  # tied tensors are read once
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.device.type == "meta":
            raise ValueError(
                f"the model's {name!r} is on the meta device: it has no values to read"
            )
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if key not in seen:
            seen[key] = tensor_fingerprint(tensor)
        digest.update(_text([name.replace("_orig_mod.", ""), seen[key]]))
    return digest.hexdigest()


def tensor_fingerprint(*tensors: Tensor | None) -> str:
    """Hash dtype, shape and bytes; None stands for a tensor that is not there."""
    digest = hashlib.blake2b(digest_size=32, person=b"palu.tensor")
    for tensor in tensors:
        digest.update(_text(None if tensor is None else [str(tensor.dtype), list(tensor.shape)]))
        for chunk in byte_chunks(tensor) if tensor is not None else ():
            digest.update(chunk)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return BLAKE2b of a file's bytes, hex, 256 bits."""
    return _digest(path, hashlib.blake2b(digest_size=32))


def sha256_of(path: Path) -> str:
    """Return SHA-256 of a file's bytes, hex."""
    return _digest(path, hashlib.sha256())


def _digest(path: Path, digest: Any) -> str:
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def data_digests(path: str | Path) -> dict[str, str]:
    """Return SHA-256 of a file, or of the files below a folder, by name; empty for what is no
    place here."""
    path = Path(path)
    if path.is_file():
        return {path.name: sha256_of(path)}
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else ()
    return {one.relative_to(path).as_posix(): sha256_of(one) for one in files}


def model_digests(folder: str | Path) -> dict[str, str]:
    """Return SHA-256 of the files that make a model what it is, by name: weights, config, and
    tokens; of an adapter's folder those of the adapter."""
    names = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer.model")
    return {
        path.name: sha256_of(path)
        for path in sorted(Path(folder).iterdir())
        if path.is_file() and (path.suffix == ".safetensors" or path.name in names)
    }


def folder_digest(folder: Path) -> str:
    """Hash the files directly in a folder, names and bytes, hex, 256 bits."""
    digest = hashlib.blake2b(digest_size=32, person=b"palu.folder")
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash how a tokenizer turns text into tokens, its special tokens and its chat template. The
    padding and truncation that a call leaves behind in a fast tokenizer do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = tokenizer.get_vocab()
    else:
        rules = json.loads(backend.to_str())
        rules = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    content = _text([rules, special, template])
    return hashlib.blake2b(content, digest_size=32, person=b"palu.tokenizer").hexdigest()


def byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in row-major order, at most `CHUNK_BYTES` at a time on the host."""
    flat = tensor.detach().reshape(-1)
    step = max(CHUNK_BYTES // flat.element_size(), 1)
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step].cpu().contiguous()
        yield chunk.view(torch.uint8).numpy().data


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return what DDP or `torch.compile` wraps, else None (PEFT's wrapper is part of the model:
    prompt tuning keeps weights there)."""
    if hasattr(model, "get_base_model"):
        return None
    for name in ("_orig_mod", "module"):
        if isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    return None


def _settings(model: nn.Module) -> list[Any]:
    config = getattr(model, "config", None)
    settings = [
        type(model).__name__,
        config.to_diff_dict() if hasattr(config, "to_diff_dict") else {},
    ]
    if hasattr(model, "peft_config"):
        settings += [{name: c.to_dict() for name, c in model.peft_config.items()}]
        settings += [list(model.active_adapters)]
        # Inside `disable_adapter()` the adapters do not count.
        settings += [any(getattr(m, "disable_adapters", False) is True for m in model.modules())]
    return [_plain(part) for part in settings]


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """Return every setting of the model's PEFT adapters as JSON values: `adapter default.r`, ..."""
    configs = getattr(model, "peft_config", {})
    settings = {f"adapter {name}": _plain(config.to_dict()) for name, config in configs.items()}
    return {f"{name}.{key}": v for name, values in settings.items() for key, v in values.items()}


def _plain(value: Any) -> Any:
    """Convert to JSON values in one order, without the settings that do not change logits."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _NOT_IN_LOGITS}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
