"""Entry point of `linfusion` and `python -m linfusion_cli`."""

import signal


def main() -> None:
    """Run the program. Until it installs its signal handlers, Ctrl-C ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from linfusion_cli.hardware import allocator

    allocator.configure()  # before the first import of torch
    from linfusion_cli.cli import app

    app.main()


if __name__ == "__main__":
    main()
