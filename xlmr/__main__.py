"""Where the command `xlmr` and `python -m xlmr` begin: nothing heavy is imported yet, so Ctrl-C is quiet from here."""

import sys

INTERRUPTED = 130  # what a shell reports after SIGINT


def main() -> int:
    """Runs the command line; returns the exit status."""
    try:
        from . import cli

        return cli.main()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
