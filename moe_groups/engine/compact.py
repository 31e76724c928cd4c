"""Hold no more gradients than this rank steps."""

from moe_groups._deepspeed.engines import Engine, is_engine
from moe_groups._deepspeed.exact_partitions import keep_exact_partitions
from moe_groups.errors import InvalidArgumentError


def compact_gradients(engine: Engine) -> None:
    """Keep exactly the gradients that this rank steps, and release them group by group.

    For ZeRO-1 and ZeRO-2 that accumulate gradients in the dtype of the model, as they do by
    default. There DeepSpeed holds the *whole* gradient of each parameter that touches this
    rank's partition, until the last group has stepped; with this call it holds the elements
    of the partitions and no others (2 bytes each in bf16), and a group's are gone before the
    group steps. Losses, norms, weights and optimizer states stay the same, bit for bit, and
    checkpoints can be loaded with and without.

    Call it once after ``deepspeed.initialize``, on all ranks, before the first ``backward``
    or after any ``engine.step()`` that ended an accumulation; before or after
    ``load_checkpoint``. It changes this one engine; calling it again does nothing. Where
    gradients accumulate in fp32 DeepSpeed does the same already, and nothing is changed.

    One thing is different, as it is with fp32 accumulation: gradients of a ``backward``
    whose ``step`` is left out are added to those of the next, where they would be dropped.
    To skip a batch, skip it before ``backward``.

    Source: ``DeepSpeedZeroOptimizer._use_compact_grad_partition_buffer`` and its readers, in
    DeepSpeed's ``runtime/zero/stage_1_and_2.py``.

    Args:
        engine: what ``deepspeed.initialize`` returned first.

    Raises:
        InvalidArgumentError: not an engine, or one that it cannot be done for (no ZeRO,
            ZeRO-3, BF16_Optimizer, optimizer offload, ZenFlow, DeepCompile, Muon), or in the
            middle of an accumulation. The engine is left as it was.
        UnsupportedDeepSpeedError: this DeepSpeed cannot do it. The engine is left as it was.

    Example:
        >>> engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        >>> compact_gradients(engine)                                     # doctest: +SKIP
    """
    if not is_engine(engine):
        raise InvalidArgumentError(
            "compact_gradients takes an engine that deepspeed.initialize made, not "
            f"{type(engine).__name__}."
        )
    keep_exact_partitions(engine)
