"""Adapters in the forms that other programs take: full models, GGUF files, servers' directories."""
