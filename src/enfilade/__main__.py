"""`python -m enfilade` is the command line; `torchrun -m enfilade train ...` starts it on many processes."""

import sys

from enfilade.cli import main

if __name__ == "__main__":
    sys.exit(main())
