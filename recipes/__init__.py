"""Recipes that come with the package; each is run by its name."""
