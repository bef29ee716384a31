"""Accuracy of every operator against its float64 definition, on this machine."""
