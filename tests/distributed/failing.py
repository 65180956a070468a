"""A pipeline whose first stage was not given to `mhc_compile.distributed.stage`: it has to end, on every rank."""

from __future__ import annotations

import datetime

import torch.distributed as dist
from torch.distributed.pipelining.schedules import Schedule1F1B

from .pipelined import piped

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    piped(Schedule1F1B, "by block", wrapped=False)
