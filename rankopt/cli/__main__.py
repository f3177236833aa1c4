"""`python -m rankopt.cli`."""

from rankopt.cli.main import main

main()
