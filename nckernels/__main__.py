"""``python -m nckernels info | train | report | demo | lab | convergence``."""

from __future__ import annotations

import sys

USAGE = """usage: python -m nckernels COMMAND [options]

commands:
  info    versions, devices, backends, which one would run for which tensors and why not the others
  train   train a small network with one of the losses (--help for the options)
  report  training runs as one HTML page (--help)
  demo    train cross-entropy, NormFace, NTCE, NONL and SupCon on digits; a table and a picture (--help)
  lab     the papers' claims, each measured beside its closed form, with a picture (--help)
  convergence
          when the metrics of training runs reach neural collapse, from their histories (--help)
"""


def main(argv: list[str]) -> int:
    """Dispatch to a command; return the exit status."""
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command == "info":
        from .info import main as run
    elif command == "train":
        from .train.cli import main as run
    elif command == "report":
        from .train.report import main as run
    elif command == "demo":
        from .train.demo import main as run
    elif command == "lab":
        from .lab.cli import main as run
    elif command == "convergence":
        from .metrics.cli import main as run
    else:
        wanted = command in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    return run(rest) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
