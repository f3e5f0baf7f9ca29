"""One file per resource; a route validates, calls one thing, and answers."""
