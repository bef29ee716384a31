"""Memory of an unlearning step, predicted from a model's config (palu plan)."""
