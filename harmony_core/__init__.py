"""harmony-core: post-train, evaluate and serve language models with one recipe file.

Importing this package loads neither torch nor transformers.
"""

__version__ = "0.1.0"
