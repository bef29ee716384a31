"""Check a model folder before libraries read it, and after that all of it was read; turn what
they raise into one line."""

from __future__ import annotations

import functools
import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from palu.errors import one_line, out_of_memory
from palu.models.hub import hub_name
from palu.models.wrappers import is_sharded, unwrap
from palu.storage.json_files import NotJSON, check_kind, look, parse, read_object, read_text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 3  # names of tensors in a message


def named_from(folder: Path, path: str | Path) -> str:
    """Return a path as a file in `folder` is to name it: relative to it, so that it is found
    from any directory and after both are moved together, and tells nothing of what lies above
    both. A model of the hub is named by its id."""
    if (name := hub_name(path)) is not None:
        return name
    path = Path(path)
    # Links above it are followed, as the system does with "..", and not the last one.
    real = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    try:
        return Path(os.path.relpath(real, folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(path)


@contextmanager
def reading(failed: str, *folders: Path) -> Iterator[None]:
    """Turn whatever a library raises that reads the user's folders into a ValueError of one line.

    Args:
        failed: what could not be done.
        folders: where a file may lie that is the cause.
    """
    try:
        yield
    except BaseException as error:
        # A Rust panic in tokenizers or safetensors is not an Exception.
        panic = type(error).__name__ == "PanicException"
        if out_of_memory(error) or not (panic or isinstance(error, Exception)):
            raise
        faults = (_bad_file(path) for folder in folders for path in sorted(folder.glob("*.json*")))
        cause = next((fault for fault in faults if fault), None) or one_line(error)
        raise ValueError(f"{failed}: {cause}") from error


def _bad_file(path: Path) -> str | None:
    """Return what is wrong with a JSON or a weights file for every reader, else None."""
    try:
        look(path)
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            return f"{path} is empty"
        check_kind(path, head)
        if path.suffix == ".json":
            parse(read_text(path), unique_keys=False)
    except NotJSON as error:
        return f"{path} is not readable JSON: {error}"
    except (ValueError, OSError) as error:
        return one_line(error)
    return None


def check_weights_files(folder: Path) -> None:
    """Check the weights that transformers will read: safetensors in this folder alone.

    A name in an index must be plain. (A file of that name may be a link, as in the cache of the
    hub.)

    Raises:
        ValueError: a file is missing, is no safetensors file or not all of one, or is named that
            lies elsewhere or is a pickle; two files hold one tensor.
    """
    config = read_object(folder / "config.json")
    if "transformers_weights" in config:
        raise ValueError(
            f"{folder / 'config.json'} names other weights (transformers_weights "
            f"{config['transformers_weights']!r}); weights must be in {WEIGHTS} or in the files of "
            f"{INDEX}"
        )
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{str(folder)!r} holds the weights of a model and an adapter_config.json: move one of "
            "them away, so that it is plain which is meant"
        )
    names = [WEIGHTS] if (folder / WEIGHTS).is_file() else _shards(folder)
    seen: dict[str, str] = {}
    for name in names:
        for key in tensor_names(folder / name):
            if seen.setdefault(key, name) != name:
                raise ValueError(f"{str(folder)!r} has {key!r} twice: in {seen[key]} and in {name}")
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, dict) else {}):
        layers = settings.get("num_hidden_layers")
        # transformers makes the layers one by one, before it looks at the weights
        if isinstance(layers, int) and layers > max(len(seen), 1000):
            raise ValueError(
                f"{folder / 'config.json'} has num_hidden_layers {layers}, and the weights are "
                f"{len(seen)} tensors"
            )


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt"))
        shown = f" ({pickles[0]} is a pickle, which is not read)" if pickles else ""
        raise ValueError(f"{str(folder)!r} has no {WEIGHTS} and no {INDEX}{shown}")
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map from names of tensors to names of files")
    names = []
    for name in dict.fromkeys(map(str, files.values())):
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise ValueError(
                f"{index} names {name!r}; it must be the plain name of a .safetensors file in that "
                "folder"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not in {str(folder)!r}")
        names.append(name)
    return sorted(names)


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file. Raises ValueError where it is none, or
    not all of one."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        cause = _bad_file(path) or f"{path} is no whole safetensors file: {one_line(error)}"
        raise ValueError(cause) from error


def check_pattern(allow_missing: str | None) -> None:
    """Raise ValueError for what is no regular expression."""
    try:
        re.compile(allow_missing or "")
    except re.error as error:
        raise ValueError(
            f"--allow-missing {allow_missing!r} is no regular expression: {error}"
        ) from None


def check_loaded(
    model: nn.Module, loaded: Mapping[str, Any], folder: Path, allow_missing: str | None = None
) -> None:
    """Check that the weights of a folder are those of the model: what is not in the file is
    random.

    Args:
        model: as it was loaded.
        loaded: transformers' loading info (`output_loading_info=True`, with
            `ignore_mismatched_sizes=True`).
        allow_missing: a regular expression; tensors whose name it matches anywhere may be missing,
            unexpected or of another shape. They are warned of.

    Raises:
        ValueError: others are; names the first of them and the likely cause.
    """
    shapes = {key: f"{key} ({list(a)} instead of {list(b)})" for key, a, b in _triples(loaded)}
    buffers = {
        name for name, _ in model.named_buffers()
    }  # older files may hold buffers that the model makes itself
    kinds = {
        "missing": {key: key for key in loaded["missing_keys"] if key not in shapes},
        "of another shape": shapes,
        "not the model's": {key: key for key in loaded["unexpected_keys"] if key not in buffers},
    }
    tied = _tied_apart(model)
    wrong, allowed = [], []
    for said, shown_as in kinds.items():
        for names, into in zip(_split(shown_as, allow_missing), (wrong, allowed), strict=True):
            if names:
                shown = ", ".join(shown_as[name] for name in names[:_SHOWN])
                into.append(f"{said}: {shown}{_more(names)}")
    for messages in (loaded.get("error_msgs") or (), tied):
        wrong += [one_line(message) for message in messages]
    if wrong:
        cause = _likely_cause(kinds["missing"], kinds["not the model's"], shapes)
        raise ValueError(
            f"the weights in {str(folder)!r} are not those of its config: {'; '.join(wrong)}."
            f"{cause} (--allow-missing REGEX takes the tensors it matches as they are)"
        )
    if allowed:
        warnings.warn(
            f"--allow-missing: in {str(folder)!r} {'; '.join(allowed)}. Missing tensors and those "
            "of another shape hold random numbers",
            stacklevel=2,
        )


def load_renamed(model: nn.Module, folder: Path) -> bool:
    """Load the weights of a folder into a model if they have other names there: transformers saves
    the experts of a mixture apart, as its hub has them. Return whether they have.

    Raises:
        ValueError: they are not those of the model.
    """
    if is_sharded(model):
        return False  # it has files of its own
    inner = unwrap(model)
    files = [folder / name for name in _shards(folder)] if (folder / INDEX).is_file() else []
    files += [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    held, own = {name for path in files for name in tensor_names(path)}, set(inner.state_dict())
    if not (held - own and own - held and hasattr(inner, "from_pretrained")):
        return False
    dtypes = [parameter.dtype for parameter in inner.parameters()]
    loaded, info = type(inner).from_pretrained(
        folder,
        dtype=functools.reduce(torch.promote_types, dtypes),  # which holds each of them
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(loaded, info, folder)
    inner.load_state_dict(loaded.state_dict())
    return True


def check_architecture(model: nn.Module) -> None:
    """Raise ValueError where the config names the class of another causal language model than
    its model_type has: models of equal names compute different things."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = getattr(model.config, "architectures", None) or []
    known = [name for name in named if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    if known and type(model).__name__ not in named:
        raise ValueError(
            f"the config in {model.name_or_path!r} contradicts itself: model_type "
            f"{model.config.model_type!r} is a {type(model).__name__}, architectures says "
            f"{', '.join(map(repr, known))}"
        )


# What a file may hold that every model makes for itself.
_MADE_ANEW = re.compile(r"inv_freq|masked_bias|attn\.bias|causal_mask|position_ids|_index$")


def warn_of_left_out(model: nn.Module, folder: Path) -> None:
    """Warn of tensors that transformers passes over in silence (heads that predict further
    tokens, towers of a class that has none): what is saved from the model is without them."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if not patterns:
        return
    names = [WEIGHTS] if (folder / WEIGHTS).is_file() else _shards(folder)
    has = set(model.state_dict())
    lost = sorted(
        key
        for name in names
        for key in tensor_names(folder / name)
        if key not in has and not _MADE_ANEW.search(key)
        if any(re.search(pattern, key) for pattern in patterns)
    )
    if lost:
        warnings.warn(
            f"{len(lost)} tensors of {str(folder)!r} are no part of {type(model).__name__} and "
            f"will not be in what is saved from it: {', '.join(lost[:_SHOWN])}{_more(lost)}",
            stacklevel=2,
        )


def warn_of_not_finite(model: nn.Module, folder: Path) -> None:
    """Warn of parameters that hold NaN or an infinity: they may lie in rows that nothing reads."""
    names = []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.itemsize > 1:
            largest = torch.linalg.vector_norm(parameter.detach(), math.inf).item()
            names += [] if math.isfinite(largest) else [name]
    if names:
        warnings.warn(
            f"the weights in {str(folder)!r} are not finite: "
            f"{', '.join(names[:_SHOWN])}{_more(names)} "
            f"{'hold' if len(names) > 1 else 'holds'} NaN or infinity",
            stacklevel=2,
        )


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def _triples(loaded: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(entry[0], entry[1], entry[2]) for entry in loaded.get("mismatched_keys") or ()]


def _split(names: Collection[str], allow: str | None) -> tuple[list[str], list[str]]:
    rest = sorted(name for name in names if allow is None or not re.search(allow, name))
    return rest, sorted(set(names) - set(rest))


def _tied_apart(model: nn.Module) -> list[str]:
    """Return what is wrong with a tied output head: transformers leaves one apart whose weights
    the file has, whatever the config."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return []
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    one, other = getattr(head, "weight", None), getattr(embedding, "weight", None)
    if one is None or other is None or one is other or one.shape != other.shape:
        return []
    if torch.equal(one, other):  # older versions leave equal ones apart too
        model.tie_weights()
        return []
    return [
        "tie_word_embeddings is true in the config, and the file has an output head that differs "
        "from the embedding: set it to false in config.json"
    ]


def _likely_cause(missing: Collection[str], extra: Collection[str], shapes: Collection[str]) -> str:
    for prefix in ("_orig_mod.", "module.", "base_model.model.", "model."):
        cut = {key.removeprefix(prefix) for key in extra if key.startswith(prefix)}
        if len(cut.intersection(missing)) * 2 > len(missing):
            return f" The names in the file begin with {prefix!r}: save the model without it."
    layers = re.compile(r"\.\d+\.")
    if shapes:
        return " A size in config.json is another one than that of the weights (vocab_size, ...)."
    if missing and not extra:
        if all(layers.search(key) for key in missing):
            return " num_hidden_layers in config.json is too large, or a file is missing."
        if set(missing) == {"lm_head.weight"}:
            return " If its output head is its embedding, tie_word_embeddings must be true."
        return " A file is missing, or the config is of another model."
    if extra and not missing and all(layers.search(key) for key in extra):
        return " num_hidden_layers in config.json is too small."
    return " model_type in config.json may be another model's." if missing else ""
