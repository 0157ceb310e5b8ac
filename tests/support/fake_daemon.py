"""The real daemon in a process of its own, over a fake worker: `fake_daemon.py --state-dir X …`.

Takes the flags of `infilld serve` and says on stdout when it listens.
"""

import sys

from fake_worker import FakeWorker

from infilld.server import cli
from infilld.server.process import daemon
from infilld.server.verbs import operate


def main() -> int:
    operate.make_worker = lambda wanted: FakeWorker()
    publish = daemon._publish

    def announce(*told: object) -> None:
        publish(*told)  # type: ignore[arg-type]
        sys.stdout.write("listening\n")
        sys.stdout.flush()

    daemon._publish = announce  # type: ignore[assignment]
    return cli.main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
