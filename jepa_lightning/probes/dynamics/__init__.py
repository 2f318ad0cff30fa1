"""Evaluation of frozen world models in time: what their embeddings know, show and are good for."""
