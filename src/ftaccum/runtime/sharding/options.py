"""How a run shards its model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardingOptions:
    """The options of FSDP2, from the settings and the config file of `accelerate launch`.

    Attributes:
        reshard_after_forward: whether to free the gathered weights of a block between its forward and backward pass.
        cpu_offload: whether weights, gradients and optimizer state stay in host memory.
        block_classes: the names of the classes whose modules are gathered as one unit; none to choose units by
            structure.
        syncs_each_pass: whether each pass of a window syncs its gradients, and not only the last one.
        checkpoints_activations: whether to recompute activations in the backward pass, like `gradient_checkpointing`.
    """

    reshard_after_forward: bool = True
    cpu_offload: bool = False
    block_classes: tuple[str, ...] = ()
    syncs_each_pass: bool = True
    checkpoints_activations: bool = False
