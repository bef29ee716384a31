"""`palu merge`: a LoRA adapter folded into its base model."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from types import SimpleNamespace

import typer

from palu.cli.data import find_models, plain_warnings, quiet
from palu.cli.options import OutputOptions, WeightOptions, with_options
from palu.errors import user_errors
from palu.terminal import bars, out, warn
from palu.training.options import option

# Rounding is measured on these tokens and said aloud from this share of the adapter's effect on.
PROBE, LOUD = "Question: Who wrote it, and when?\nAnswer: It was written in 1991 by", 0.05


@dataclass(kw_only=True)
class MergeOptions:
    """What is folded into what."""

    adapter: Path = option(MISSING, "Folder of a PEFT adapter.")
    output: Path = option(MISSING, "Folder for the merged model.")
    model: Path | None = option(
        None,
        "Folder of its base model.",
        shown="the one that its adapter_config.json names",
    )


@with_options(MergeOptions, OutputOptions, WeightOptions)
def merge(context: typer.Context, options: SimpleNamespace) -> None:
    """Fold an adapter into its base model: a model folder that needs no PEFT.

    In bfloat16 and float16 the sums are rounded, and small changes are lost in part; it says how
    much.
    """
    find_models(options, "model", "adapter")
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.models.folders import named_from, reading
        from palu.models.loading import folder_with, load_model, load_tokenizer
        from palu.models.lora import ADAPTER_CONFIG, base_folder, fold_in_measured, is_adapter
        from palu.models.writing import write_model
        from palu.run_record import RECORD, read_record
        from palu.storage.files import write_json
        from palu.storage.fingerprint import model_digests
        from palu.storage.output import claim_output, output_folder, versions

        quiet()
        adapter, output = options.adapter, options.output
        if not is_adapter(adapter):
            raise ValueError(
                f"--adapter {str(adapter)!r} is no folder of a PEFT adapter (one with "
                f"{ADAPTER_CONFIG} and no model in it)"
            )
        base = base_folder(adapter) if options.model is None else options.model
        claim = context.with_resource(
            claim_output(output, overwrite=options.overwrite, inputs=(adapter, base))
        )
        known = read_record(folder_with(RECORD, adapter, base)) or {}
        record = {"template": known["template"]} if "template" in known else {}
        record["made_by"] = "palu merge"
        record["adapter_record"] = read_record(adapter)
    with user_errors(), plain_warnings(), bars.status("Adding the adapter to the weights"):
        tokenizer = load_tokenizer(adapter, base=base)
        loaded = load_model(
            adapter,
            options.dtype,
            options.device,
            base=base,
            allow_missing=options.allow_missing,
        )
        with reading(f"the tokenizer of {str(adapter)!r} cannot be used"):
            ids = tokenizer(PROBE, return_tensors="pt").input_ids.to(loaded.device)
        # Tokens that the embedding has no row for are no matter here.
        ids = ids.clamp(max=loaded.get_input_embeddings().num_embeddings - 1)
        merged, rounding = fold_in_measured(loaded, ids)
    kind = str(merged.dtype).removeprefix("torch.")
    if rounding > LOUD:
        warn(
            f"rounding the merged weights to {kind} moves logits by {rounding:.0%} of what the "
            "adapter does; --dtype float32 keeps it, and so does the adapter beside its base model"
        )
    with output_folder(claim) as folder, bars.status("Writing the model"):
        write_model(folder, merged, tokenizer, base)
        record |= {"base_model": named_from(folder, base), "adapter": named_from(folder, adapter)}
        parts = {"model": base, "adapter": adapter, "output": folder}
        digests = {name: model_digests(place) for name, place in parts.items()}
        record["digests"] = {"algorithm": "sha256", **digests}
        record |= {"dtype": kind, "rounding": rounding, "versions": versions()}
        write_json(folder / RECORD, record)
    out.print(f"Written to {output}: {base} with {adapter}", soft_wrap=True)
