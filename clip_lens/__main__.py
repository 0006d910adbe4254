"""`python -m clip_lens`: the command line."""

from clip_lens.cli.app import entry

if __name__ == "__main__":
    entry()
