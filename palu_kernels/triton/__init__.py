"""The kernels, one file a family, each with its launcher; they know nothing of autograd."""
