"""`python -m altprop` is `altprop`."""

from altprop.lm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
