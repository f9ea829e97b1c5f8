"""`python -m linfusion_cli` is `linfusion`."""

from linfusion_cli.cli.app import main

if __name__ == "__main__":
    main()
