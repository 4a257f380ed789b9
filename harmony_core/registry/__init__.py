"""Models and their versions on this machine."""
