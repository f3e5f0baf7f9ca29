"""One parallel technique per file; shapes before -> after open each."""
