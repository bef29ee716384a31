"""Losses on hidden states times an output head, chunk by chunk."""
