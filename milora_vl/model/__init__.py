"""Models: loading, composing, the embedded default."""
