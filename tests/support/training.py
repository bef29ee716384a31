"""A trainer of the small model and rows, and what is looked at afterwards."""

from __future__ import annotations

import torch
from transformers import PrinterCallback

from palu.data.collator import Collator
from palu.methods.micro_batch import RETAIN
from palu.training.batching import BatchBuilder
from palu.training.config import PALUConfig
from palu.training.trainer import PALUTrainer
from tests.support import small


def config(folder, **options):
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }
    if options.get("method", "palu") == "palu":
        settings |= {"objective": "entropy", "top_k": 7}
    return PALUConfig(**settings | options)


def trainer(tok, args, *, forget=None, retain=True, model=None, **kwargs):
    rows = small.rows(tok)
    made = PALUTrainer(
        small.model(tok) if model is None else model,
        args,
        train_dataset=rows[:3] if forget is None else forget,
        retain_dataset=rows[3:] if retain is True else retain,
        processing_class=tok,
        **kwargs,
    )
    made.remove_callback(PrinterCallback)
    made.texts_compared = True  # many tests keep what they forget
    return made


def micro_batches(made, batch):
    """A collated forget batch, and the retain batch in it if any, as a trainer has them."""
    builder = BatchBuilder(None, None, "step", made.method)
    forget = builder.forget({n: v for n, v in batch.items() if n != RETAIN})
    retain = batch.get(RETAIN)
    return [forget] if retain is None else [forget, builder.retained(retain)]


def sure_model(tok, **config):
    """A model that knows some of the answers: probabilities far from 0 and from one another."""
    model = small.model(tok, **config)
    rows = small.rows(tok)
    batch = Collator(tok)(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits[:, :-1]
        answer = batch["labels"][:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(logits[answer], batch["input_ids"][:, 1:][answer])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logged(made, name="forget"):
    return [entry for entry in made.state.log_history if name in entry]
