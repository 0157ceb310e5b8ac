import sys

from infilld.lsp.cli import main

if __name__ == "__main__":
    sys.exit(main())
