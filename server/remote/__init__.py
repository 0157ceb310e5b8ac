"""The engine of another machine: an OpenAI-compatible server that is asked instead of a model here.

`make_worker` makes what the rest of the daemon takes for its worker.
"""

from infilld.server.remote.worker import make_worker

__all__ = ["make_worker"]
