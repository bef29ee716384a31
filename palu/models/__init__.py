"""A Hugging Face model: loading it, calling it, its output head, what wraps it."""
