"The command `rulediff`, also as `python -m rulediff_nb`: what must be set before torch is imported is set here."
import os
import signal
import sys


def fill_streams():
    "Let closed standard streams lead nowhere: the next file, here or in a worker, would else take their place."
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3: os.set_inheritable(fd, True)
    os.close(fd)


def main():
    "Run a command line in a process of its own; threads that wait leave their core to others."
    fill_streams()
    if "torch" not in sys.modules: os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # later it has no effect
    try:
        from rulediff_nb.cli import main
        status = main()
    except KeyboardInterrupt: status = 128 + signal.SIGINT   # before the command began, or after it had ended
    if status > 128: signal.signal(signal.SIGINT, signal.SIG_IGN)   # another Ctrl-C finds nothing left to stop
    return status


if __name__ == "__main__": sys.exit(main())
