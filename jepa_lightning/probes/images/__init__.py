"""Evaluation of encoders of images that are frozen, or fine-tuned."""
