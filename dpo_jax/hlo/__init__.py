"""What a compiled program does, read from its optimized HLO text."""
