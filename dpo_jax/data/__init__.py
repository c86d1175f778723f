"""Rows of any source to packed batches. Imports no jax."""
