"""`python -m unimodal.cli` is the `unimodal` command."""

from unimodal.cli.app import main

main()
