"""`python -m int8run`."""

from int8run.cli import main

if __name__ == "__main__":
    main()
