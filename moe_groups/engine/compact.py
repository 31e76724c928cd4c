"""Hold only the gradients that this rank steps."""

from moe_groups._common.arguments import checked
from moe_groups._deepspeed.engines import InitializedEngine
from moe_groups._deepspeed.exact_partitions import keep_exact_partitions


@checked
def compact_gradients(engine: InitializedEngine) -> None:
    """Keep exactly the gradients that this rank steps, and release them group by group.

    For ZeRO-1 and ZeRO-2 that accumulate gradients in the dtype of the model, which is the
    default. DeepSpeed then holds the *whole* gradient of each parameter that reaches into this
    rank's partition, until the last group has stepped. With this call it holds only the
    elements of the partitions (2 bytes each in bf16), and releases those of a group before the
    group steps. Losses, norms, weights and optimizer states stay the same, bit for bit, and
    checkpoints do not depend on the call.

    Call it once after ``deepspeed.initialize``, on all ranks, before the first ``backward``
    or after any ``engine.step()`` that ended an accumulation; before or after
    ``load_checkpoint``. It changes this one engine; calling it again does nothing. If
    gradients accumulate in fp32, DeepSpeed already does the same, and the call changes nothing.

    One thing differs, as it does with fp32 accumulation: gradients of a ``backward`` without
    a ``step`` are added to those of the next ``backward`` instead of being dropped. To skip a
    batch, skip it before ``backward``.

    Source: ``DeepSpeedZeroOptimizer._use_compact_grad_partition_buffer`` and its readers, in
    DeepSpeed's ``runtime/zero/stage_1_and_2.py``.

    Args:
        engine: what ``deepspeed.initialize`` returned first.

    Raises:
        InvalidArgumentError: not an engine, or one that is not supported (no ZeRO, ZeRO-3,
            BF16_Optimizer, optimizer offload, ZenFlow, DeepCompile, Muon), or in the middle of
            an accumulation. The engine is not changed.
        UnsupportedDeepSpeedError: this DeepSpeed does not support it. The engine is not changed.

    Example:
        >>> engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        >>> compact_gradients(engine)                                     # doctest: +SKIP
    """
    keep_exact_partitions(engine, "compact_gradients")
