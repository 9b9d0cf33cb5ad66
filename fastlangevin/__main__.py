"""`python -m fastlangevin` is the `fastlangevin` command."""

from fastlangevin.cli import main

if __name__ == "__main__":
    main()
