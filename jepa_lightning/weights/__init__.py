"""The one door for checkpoints: in and out of this application, and of others."""
