"""`python -m fedexperts` is the `fedexperts` command."""

from fedexperts.cli import main

main()
