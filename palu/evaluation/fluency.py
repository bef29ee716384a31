"""Fluency of generated text: how sure a classifier is that it is no gibberish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from palu.evaluation.batches import ALONE, Processes, in_batches
from palu.models.folders import check_loaded, check_weights_files, reading
from palu.models.loading import load_tokenizer, model_folder


class FluencyClassifier:
    """A sequence classifier from a local folder (safetensors only).

    open-unlearning takes madhurjindal/autonlp-Gibberish-Detector-492513457, whose class 0 is clean
    text, on the first 32 tokens: `softmax(logits)[class_id]`.

    Args:
        folder: a Hugging Face folder with a classification head.
        device: where to run it.
        class_id: the class of fluent text.
        max_length: tokens looked at.

    Raises:
        FileNotFoundError: no such model folder.
        ValueError: it holds no classifier, not all of its weights, or no class `class_id`.
    """

    def __init__(
        self,
        folder: str | Path,
        device: torch.device,
        *,
        class_id: int = 0,
        max_length: int = 32,
    ) -> None:
        from transformers import AutoModelForSequenceClassification

        model_folder(folder)
        self.tokenizer: Any = load_tokenizer(folder)
        check_weights_files(Path(folder))
        failed = f"could not load a classifier from {str(folder)!r}"
        with reading(failed, Path(folder)):
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"{str(folder)!r} is no trained classifier: its weights lack {missing[0]!r}"
            )
        check_loaded(self.model, loading, Path(folder))
        if not 0 <= class_id < self.model.config.num_labels:
            raise ValueError(
                f"class_id must be 0 to {self.model.config.num_labels - 1}, the classes of "
                f"{str(folder)!r}, not {class_id}"
            )
        self.model.to(device).eval()
        self.class_id, self.max_length = class_id, max_length

    @torch.no_grad()
    def scores(
        self,
        texts: Sequence[str],
        *,
        batch_size: int,
        processes: Processes = ALONE,
        report: Callable[[int, int], None] | None = None,
    ) -> list[float]:
        """The probability of the fluent class for each text, in order; see `in_batches`."""

        def work(chosen: list[int]) -> list[float]:
            inputs = self.tokenizer(
                [texts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.max_length,
            ).to(self.model.device)
            return self.model(**inputs).logits.float().softmax(-1)[:, self.class_id].tolist()

        lengths = [len(text) for text in texts]
        return in_batches(lengths, batch_size, work, processes=processes, report=report)
