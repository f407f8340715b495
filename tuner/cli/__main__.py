"""`python -m tuner.cli`, for a `tuner` that is not in PATH."""

from tuner.cli import main

if __name__ == "__main__":
    main()
