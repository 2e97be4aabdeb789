"""`python -m nsa_triton` is the same as `nsa-triton`."""

import sys

from nsa_triton.cli import main

sys.exit(main())
