"""The memory that `ftaccum plan --model` estimates for the runs that are measured."""

from ftaccum.apps.memory.estimate import MemorySetup, estimate_memory
from ftaccum.apps.memory.meta_model import model_of_config

from .job import Job, config_of


def estimates_of(job: Job, autocast: bool) -> dict[str, int]:
    """Return the estimated bytes of the fullest process, by way."""
    model = model_of_config(config_of(job.model), "causal-lm", "float32")
    found = {}
    for way, arguments in job.ways.items():
        setup = MemorySetup(
            num_processes=job.num_processes,
            tokens=job.batch_size * job.length,
            autocast=autocast,
            sync=arguments.get("sync", "each"),
        )
        found[way] = estimate_memory(model, setup, sharded=arguments.get("sharding") == "fsdp2").total
    return found
