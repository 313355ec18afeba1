"""The process of the command `engram`: `python -m launch`, and so `torchrun -m launch`."""

from launch.cli import main as command


def main() -> None:
    """Runs the command line."""
    command(prog_name="engram")


if __name__ == "__main__":
    main()
