"""`python -m resdense_ext` is the `resdense` command."""

import sys

from resdense_ext.cli import main

sys.exit(main())
