"""A recipe, what it is given, and how it is run."""
