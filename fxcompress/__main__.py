"""`python -m fxcompress`: the command line."""

from fxcompress.cli import app

if __name__ == "__main__":
    app(prog_name="python -m fxcompress")
