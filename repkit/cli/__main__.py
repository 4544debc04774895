"""`python -m repkit.cli`."""

from repkit.cli import main

if __name__ == "__main__":
    main()
