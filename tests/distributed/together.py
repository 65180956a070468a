"""Everything that needs two processes, in one launch: to start them and to import costs more than most cases do."""

from __future__ import annotations

from . import parallel, pipelined, replicated, sharded, snippets, trained
from .launch import run

if __name__ == "__main__":
    run(
        parallel=parallel.CASES,
        pipelined=pipelined.CASES,
        replicated=replicated.CASES,
        sharded=sharded.CASES,
        snippets=snippets.CASES,
        trained=trained.CASES,
        last=pipelined.unwrapped,
    )
