"""`python -m bondlm` is the command `bondlm`."""

import sys

from bondlm.cli import main

sys.exit(main())
