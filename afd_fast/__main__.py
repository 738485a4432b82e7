"""`python -m afd_fast` is `afd-fast`."""

from afd_fast.cli import main

main()
