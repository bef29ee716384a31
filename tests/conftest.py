"""Where there is no GPU, Triton's interpreter runs the kernels; it must know before the import."""

import os

# Threads that spin while they wait make a busy machine many times slower; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
