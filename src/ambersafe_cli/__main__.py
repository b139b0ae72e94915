"""`python -m ambersafe_cli`, the same as the command `ambersafe`."""

from ambersafe_cli.cli import main

main()
