"""The trainer, its configuration, batches, checkpoints and logs."""
