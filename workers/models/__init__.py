"""The torch half of every family, beside its card in runtime/models."""
