"""Make large language models smaller, then run them smaller.

This import stays light: torch and transformers are loaded by the modules that need them.
"""

__version__ = "0.1.0"
