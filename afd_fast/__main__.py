"""`afd-fast` and `python -m afd_fast`. Where only the core is installed, it names the extra that the command needs."""

import sys

from afd_fast.cli import missing
from afd_fast.errors import MissingExtra, extra


def main() -> None:
    """Run the command."""
    try:
        with extra("train"):
            from afd_fast.cli.main import main as run
    except MissingExtra as error:  # the package that prints errors may be the missing one
        print(f"error: {missing(sys.argv[1:], error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    run()


if __name__ == "__main__":
    main()
