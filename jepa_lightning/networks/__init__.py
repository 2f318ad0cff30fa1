"""Networks: architecture only, nothing of training."""
