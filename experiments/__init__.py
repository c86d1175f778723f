"""One file a run: experiment(), optionally sweep(), optionally a new loss."""
