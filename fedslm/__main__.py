"""Entry point of ``python -m fedslm``."""

from fedslm.cli import app

if __name__ == "__main__":
    app()
