"""Direct alignment from preferences in JAX."""
