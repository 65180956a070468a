"""What training on several processes needs beside `attach`: sharded parameters, sequence parallelism, pipeline stages.

    mhc_compile.attach(model, input_ids)
    mhc_compile.distributed.shard_parameters(model)   # before the usual fully_shard(block), fully_shard(model)

The engines are torch's own (DDP, FSDP2, DTensor, `torch.distributed.pipelining`); nothing here replaces them.
"""

from .sharding import shard_parameters

__all__ = ["shard_parameters"]
