"""The families' cards: sizes, limits, defaults, tokens, flops. One torch-free file per family."""
