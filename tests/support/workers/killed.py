"""`palu unlearn` that kills itself: `killed.py step-5 unlearn ...` dies before step 5 is done,
`killed.py files-6 unlearn ...` when the weights of the checkpoint of step 6 are written and nothing
else of it."""

from __future__ import annotations

import os
import signal
import sys

from transformers import Trainer

from palu.cli import app as cli

where, number = (sys.argv.pop(1) + "-0").split("-")[:2]
save_model, training_step = Trainer.save_model, Trainer.training_step


def die_at(place, step):
    if where == place and step == int(number):
        os.kill(os.getpid(), signal.SIGKILL)


def saved(self, *args, **kwargs):
    save_model(self, *args, **kwargs)
    die_at("files", self.state.global_step)


def trained(self, *args, **kwargs):
    loss = training_step(self, *args, **kwargs)
    die_at("step", self.state.global_step + 1)
    return loss


Trainer.save_model, Trainer.training_step = saved, trained
cli.main()
