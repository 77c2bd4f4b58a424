"""`python -m nova` is the command `nova`."""

from .cli import main

if __name__ == "__main__":
    main()
