"""What can be found out without running anything for long: compiled kernels, bytes, calls."""
