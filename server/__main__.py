"""`python -m infilld.server` is `infilld`."""

import sys

from infilld.server.cli import main

sys.exit(main())
