"""One decoder for every family of models."""
