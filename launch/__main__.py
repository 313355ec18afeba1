"""The process of the command `engram` (`python -m launch`): listens to signals before it imports anything else."""

from launch.local.signals import told_in_one_line


def main() -> None:
    """Runs the command line."""
    with told_in_one_line():
        from launch.cli import main as command

        command(prog_name="engram")


if __name__ == "__main__":
    main()
