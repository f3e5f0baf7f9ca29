"""What a request is, and who runs next. Imports no torch."""
