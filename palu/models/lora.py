"""LoRA adapters of `palu unlearn`, folders of PEFT adapters, and adapters that cannot be used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from palu.models.folders import named_from, reading, tensor_names, warn_of_not_finite
from palu.models.hub import located
from palu.storage.files import write_json
from palu.storage.json_files import read_object

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRASettings:
    """Settings of the adapter that `palu unlearn --lora-rank` puts on a model.

    Attributes:
        rank: of the two factors of each layer's change.
        alpha: the change is multiplied with `alpha / rank`.
        dropout: share of a layer's inputs that the change does not see in training.
        target: `all-linear` (every linear layer but the output head) or names of modules.
    """

    rank: int
    alpha: int
    dropout: float
    target: str | list[str]

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"--lora-{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--lora-dropout must be at least 0 and below 1, not {self.dropout}")


def lora_settings(
    rank: int | None, alpha: int | None, dropout: float, target: str
) -> LoRASettings | None:
    """Return the options of the command line as settings; None without a rank.

    Raises:
        ValueError: an option out of its range, or one of them without `--lora-rank`.
    """
    if rank is None:
        if alpha is not None or dropout != 0 or target != ALL_LINEAR:
            raise ValueError(
                "--lora-alpha, --lora-dropout and --lora-target need --lora-rank, which makes it a "
                "LoRA run"
            )
        return None
    names = [name.strip() for name in target.split(",")]
    if not all(names):
        raise ValueError(
            f"--lora-target must be {ALL_LINEAR} or names of modules with commas between them, not "
            f"{target!r}"
        )
    return LoRASettings(
        rank,
        2 * rank if alpha is None else alpha,
        dropout,
        ALL_LINEAR if names == [ALL_LINEAR] else names,
    )


def reference_kind(asked: str | None, lora: LoRASettings | None, cache: Path | None) -> str:
    """Return which reference `palu unlearn` uses: `asked`, or `adapter_off` with LoRA, else `live`.

    Raises:
        ValueError: `adapter_off` without an adapter, or with a cache folder.
    """
    kind = asked or ("live" if lora is None else "adapter_off")
    if kind == "adapter_off" and lora is None:
        raise ValueError(
            "--reference adapter_off needs a PEFT model: add --lora-rank to train an adapter, or "
            "use live or cached"
        )
    if kind == "adapter_off" and cache is not None:
        raise ValueError(f"--reference-cache {str(cache)!r} needs --reference cached, not {kind!r}")
    return kind


def add_lora(model: PreTrainedModel, settings: LoRASettings, seed: int) -> PeftModel:
    """Add a fresh LoRA adapter, which changes nothing yet; nothing but it trains. The model is
    changed in place and part of what is returned.

    Raises:
        ValueError: a target is no module of the model, or one that PEFT has no LoRA layer for.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    if settings.target != ALL_LINEAR:
        _check_targets(model, settings.target)
    if Path(model.name_or_path).is_dir():
        model.name_or_path = str(Path(model.name_or_path).resolve())
    set_seed(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers' own affair
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # PEFT's own
        adapted = get_peft_model(model, config)
    if settings.target == ALL_LINEAR:
        _warn_of_experts(adapted)
    return adapted


def _warn_of_experts(model: nn.Module) -> None:
    """Warn of weights `[experts, ..., ...]` without an adapter: PEFT has one for some models' alone
    (of those it wraps, the name has `base_layer` in it)."""
    left = [
        f"{name}.{own}"
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and name.endswith("experts")
    ]
    if left:
        warnings.warn(
            f"--lora-target {ALL_LINEAR}: {len(left)} weights of experts get no adapter, such as "
            f"{left[0].removeprefix('base_model.model.')}: they are no linear layers, and they "
            "stay as they are",
            stacklevel=3,
        )


def _check_targets(model: nn.Module, targets: Iterable[str]) -> None:
    """Raise ValueError for names that no module has: PEFT says nothing as long as another one
    fits."""
    modules = [name for name, _ in model.named_modules()]
    missing = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in modules)]
    if missing:
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear}
        raise ValueError(
            f"--lora-target: the model has no module named {', '.join(missing)}; its linear layers "
            f"are named {', '.join(sorted(linear))}"
        )


def refuse_prompt_learning(model: nn.Module) -> None:
    """Refuse adapters that shift positions or cannot be switched off.

    Raises:
        ValueError: names the kind of adapter and the reason.
    """
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, dict) else ():
            _check_kind(config)


def _check_kind(config: Any) -> None:
    if config.is_prompt_learning:
        raise ValueError(
            f"{_kind(config)} adapters cannot be used here: they put virtual tokens before the "
            "text, so rows of logits would be matched with the labels of other tokens, and every "
            "position would shift when the adapter is off; use LoRA or another adapter of layers"
        )
    if config.is_adaption_prompt:
        raise ValueError(
            f"{_kind(config)} adapters cannot be used here: switching them off takes modules out "
            "of the model, which the hooks of training hold on to; use LoRA or another adapter of "
            "layers"
        )


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


# ---- folders -------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter alone. (Some toolkits put a `config.json` beside
    it.)"""
    return (folder / ADAPTER_CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def refuse_adapter(folder: Path) -> None:
    """Raise ValueError for an adapter folder where a whole model is needed."""
    if is_adapter(folder):
        raise ValueError(
            f"--model {str(folder)!r} is an adapter; unlearning starts from a whole model: merge "
            f"it first (palu merge --adapter {folder} --output MERGED)"
        )


def base_folder(folder: Path) -> Path:
    """Return the base model that an adapter names in its `adapter_config.json`: a path from the
    adapter's folder, or as it is, or an id on the hub.

    Raises:
        ValueError: the file names no folder that is here, and no model that the hub gives.
    """
    path = folder / ADAPTER_CONFIG
    name = read_object(path).get("base_model_name_or_path")
    base = None
    if isinstance(name, str) and name:
        beside = Path(os.path.normpath(folder.resolve() / name))
        here = beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside
        base = next((one for one in (here, Path(name)) if one.is_dir()), None)
        with suppress(FileNotFoundError):  # an id on the hub
            base = located(name) if base is None else base
    if base is None or not base.is_dir():
        raise ValueError(
            f"the base model {name!r} that {path} names (base_model_name_or_path) is not a folder "
            "here, nor a model that the hub gives: put the model there, write its place into that "
            f"file, or merge (palu merge --adapter {folder} --model BASE --output MERGED)"
        )
    if is_adapter(base):
        raise ValueError(
            f"the base model {name!r} that {path} names is an adapter itself; merge that one first"
        )
    return base


def name_base(folder: Path) -> None:
    """Rewrite the base model that a new adapter names as a path from its folder (see
    `named_from`): whole paths tell who made them and are lost when both are moved."""
    config = read_object(folder / ADAPTER_CONFIG)
    base = config["base_model_name_or_path"]
    if not base or not Path(base).is_dir():
        return
    named = named_from(folder, base)
    write_json(folder / ADAPTER_CONFIG, {**config, "base_model_name_or_path": named})
    card = folder / "README.md"
    if card.is_file():
        lines = card.read_text(encoding="utf-8").split("\n")
        lines = [one.replace(base, named) if "base_model" in one else one for one in lines]
        card.write_text("\n".join(lines), encoding="utf-8")


def attach_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter of a folder (safetensors only) on a model, to run and not to train.

    Raises:
        ValueError: the folder has no weights that can be read, they do not fit the model, or the
            adapter is of a kind that cannot be used.
    """
    from peft import PeftConfig, PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"adapter folder {str(folder)!r} has no {ADAPTER_WEIGHTS}")
    tensor_names(folder / ADAPTER_WEIGHTS)  # raises for a truncated file or a Git LFS pointer
    with reading(f"{folder / ADAPTER_CONFIG} cannot be used"):
        config = PeftConfig.from_pretrained(str(folder))
    _check_kind(config)
    misfit = f"the adapter in {str(folder)!r} does not fit the model in {model.name_or_path!r}"
    with warnings.catch_warnings(), reading(misfit):
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers' own affair
        # Layers that the file lacks would silently keep their fresh weights.
        warnings.filterwarnings("error", message=".*missing adapter keys")
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
        # Load again: only `load_adapter` reports the tensors that it did not use.
        again = adapted.load_adapter(str(folder), adapted.active_adapter, torch_device="cpu")
        if extra := again.unexpected_keys:
            raise ValueError(
                f"{len(extra)} of its tensors have no place there: {', '.join(extra[:3])}"
            )
    warn_of_not_finite(adapted, folder)
    return adapted


def check_adapter_names(model: nn.Module, checkpoint: Path) -> None:
    """Raise ValueError where the adapter's file in a checkpoint lacks tensors of the model's
    active adapter, or has others: `load_adapter`, which Trainer calls, says nothing of them."""
    if not hasattr(model, "peft_config") or not (checkpoint / ADAPTER_WEIGHTS).is_file():
        return
    from peft import get_peft_model_state_dict

    here = set(get_peft_model_state_dict(model, adapter_name=model.active_adapters[0]))
    there = set(tensor_names(checkpoint / ADAPTER_WEIGHTS))
    for said, names in (("lacks", here - there), ("has besides", there - here)):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise ValueError(f"{ADAPTER_WEIGHTS} {said} {shown} ({len(names)} tensors in all)")


def fold_in(model: PeftModel) -> PreTrainedModel:
    """Add the adapter to the weights, in place; no adapter is left.

    Where the adapter is on an output head or an embedding that share one weight, they share it no
    more: the adapter belongs to one of them.

    Raises:
        ValueError: PEFT cannot merge adapters of this kind, or the sum is not finite.
    """
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    layers = [getattr(module, "base_layer", module) for module in (head, embedding)]
    adapted = head is not layers[0] or embedding is not layers[1]
    if adapted and layers[0].weight is layers[1].weight:
        layers[0].weight = nn.Parameter(layers[0].weight.detach().clone(), requires_grad=False)
    merge = getattr(model, "merge_and_unload", None)
    try:
        if merge is None:
            raise NotImplementedError("it has no such method")
        with warnings.catch_warnings():
            for known in ("Model with `tie_word_embeddings=True`", "Input and output embeddings"):
                warnings.filterwarnings("ignore", message=known)  # untied above
            return merge(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        kind = _kind(next(iter(model.peft_config.values())))
        raise ValueError(f"PEFT cannot merge this {kind} adapter: {error}") from error


@torch.no_grad()
def fold_in_measured(model: PeftModel, input_ids: Tensor) -> tuple[PreTrainedModel, float]:
    """Return `fold_in(model)` and the share of the adapter's effect that rounding takes.

    The share is the distance between the logits with the adapter folded in and with it beside the
    weights, over the distance between those and the base model's: small changes of weights in
    bfloat16 are lost in part. 0 where the adapter has no effect. `input_ids`, int64 `[B, T]`, are
    the tokens it is measured on.
    """
    with model.disable_adapter():
        base = model(input_ids=input_ids).logits.double()
    beside = model(input_ids=input_ids).logits.double()
    merged = fold_in(model)
    error = (merged(input_ids=input_ids).logits.double() - beside).norm()
    effect = (beside - base).norm()
    return merged, (error / effect).item() if effect > 0 else 0.0
