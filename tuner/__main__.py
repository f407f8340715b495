"""`python -m tuner`, for a `tuner` that is not in PATH."""

from tuner.cli import main

if __name__ == "__main__":
    main()
