"""The `afd-fast` command."""
