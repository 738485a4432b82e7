"""`python -m afd_fast` is `afd-fast`."""

from afd_fast.cli.main import main

main()
