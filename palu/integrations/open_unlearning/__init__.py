"""PALU inside a checkout of github.com/locuslab/open-unlearning, without a change to it.

`python -m palu.integrations.open_unlearning --checkout DIR [Hydra overrides]` runs that project's
own `train.py` with three things added: the trainer `PALU`, the dataset `PALUAnnotatedQA`, and the
configs `trainer=PALU` and `data/datasets=PALU_forget`.

Works with the transformers that the checkout needs (4.45 and later) as well as with the one palu
asks for: nothing here imports the parts of palu that need a newer one.
"""

from palu.integrations.open_unlearning.launch import main, register

__all__ = ["main", "register"]
