"""One file per version, none of which changes once it was released."""
