"""One script a paper: what it claims, measured here."""
