"""Two processes of a sharded run, of which the second kills itself in its second step.

    PYTHONPATH=. python tests/support/workers/lost.py FOLDER RANK

They meet by a file and not by torchrun, which would end the first one itself.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed

from palu.training.trainer import PALUTrainer
from tests.support import small
from tests.support.workers import distributed, sharded


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    place = f"file://{folder / 'meeting'}"
    wait = timedelta(minutes=3)
    torch.distributed.init_process_group("gloo", place, wait, 2, rank)
    step = PALUTrainer.training_step

    def dies(self, *args, **kwargs):
        if rank == 1 and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    PALUTrainer.training_step = dies
    case = {**distributed.CASES["live"], **sharded.SHARDED}
    distributed.build(small.tokenizer(), folder, 2, "lost", case).train()
    print("trained to the end")


if __name__ == "__main__":
    main()
