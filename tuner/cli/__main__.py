"""`python -m tuner.cli`, where the `tuner` command is not on the path."""

from tuner.cli import main

if __name__ == "__main__":
    main()
