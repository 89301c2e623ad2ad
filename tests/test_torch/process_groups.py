"""How a worker process joins the others of its run."""

import datetime

from torch import distributed as dist


def join(run, directory, rank, world_size, seconds):
    """Join the processes that meet at the file `directory / run`.

    An operation that takes longer than `seconds` fails.
    """
    dist.init_process_group(
        "gloo",
        init_method=(directory / run).as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=seconds),
    )
