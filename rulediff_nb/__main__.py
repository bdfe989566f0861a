"The command `rulediff`, also as `python -m rulediff_nb`: what must be set before torch is imported is set here."
import os
import sys


def main():
    "Run a command line in a process of its own; threads that wait leave their core to others."
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rulediff_nb.cli import main
    return main()


if __name__ == "__main__": sys.exit(main())
