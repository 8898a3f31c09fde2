"""Customizing a model: conversations and labels, on the one training loop in `train`."""
