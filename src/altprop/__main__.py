"""`python -m altprop` is `altprop`."""

from altprop.lab.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
