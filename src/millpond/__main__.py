"""`python -m millpond`: the same as the `millpond` command."""

from millpond.cli import main

main()
