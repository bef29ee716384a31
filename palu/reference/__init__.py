"""The frozen original model: live, with its adapter off, or a cache on disk."""
