"""Measurements: one script a question. Run one as `python -m benchmarks.NAME` from the root."""
