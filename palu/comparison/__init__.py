"""Which method forgets more for the same harm: methods x settings x seeds on one model."""
