"""Top-any routing: decide for every token how many of its top-k experts run, and run no others."""
