"""The optimizer step: exact gradient partitions, and the lean step, which includes them."""

from moe_groups._common.arguments import TILE, Bytes, checked
from moe_groups._common.text import parse_bytes
from moe_groups._deepspeed.engines import InitializedEngine
from moe_groups._deepspeed.step.exact_partitions import keep_exact_partitions
from moe_groups._deepspeed.step.lean_step import step_lean


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


@checked
def lean_step(engine: InitializedEngine, tile: Bytes = TILE) -> None:
    """Make the optimizer step need as little memory, and as few collectives, for any groups.

    For ZeRO-1 and ZeRO-2, where it includes :func:`compact_gradients`, and ``BF16_Optimizer``.
    Weights, optimizer state and checkpoints are those of the plain step bit for bit; where
    gradients are clipped, up to the last bit of the norm.

    - The step of a group goes through slices of its flat partition, *tiles*: the fp32 copy of the
      gradients, the optimizer's temporaries and the norm's take at most ``tile``, however large the
      largest group is. Several small groups are stepped at once.
    - The norms of all groups are summed in one all-reduce for each process group, and the factor
      that clips and unscales is computed once.
    - Weights are gathered in buckets of several groups: the number of collectives follows from the
      size of the weights, not from the number of groups. A bucket takes at most ``tile``, or under
      ZeRO four of them, where as many gradients have been released.

    The norm can differ in its last bit: squares are added for each tile instead of each parameter,
    and with three and more ranks an all-reduce of several numbers may add in another order.
    Gradients are clipped by that norm.

    Call it once after ``deepspeed.initialize``, on all ranks, before the first ``backward``
    or after any ``engine.step()`` that ended an accumulation; before or after
    ``load_checkpoint``. It changes this one engine; calling it again changes the tile.

    Hooks of the torch optimizer's step see each group once a step. A hook may read gradients, so
    under ZeRO its groups are stepped whole and one after another, with a warning, unless the hook
    is a method of an object with ``needs_gradients = False``. Hooks of torch and of this library
    are known; ``GroupMetrics`` needs gradients in steps with a report.

    Args:
        engine: what ``deepspeed.initialize`` returned first.
        tile: bytes of a tile's temporaries: a number, or "64MiB". AdamW takes 12 for an element,
            some others 24. The first step also takes the state of a tile.

    Raises:
        InvalidArgumentError: not an engine, or one that is not supported (no ZeRO, ZeRO-3,
            optimizer offload, ZenFlow, DeepCompile, ``torch_autocast`` with fp16,
            ``BF16_Optimizer`` with bf16 accumulation, one whose ``step`` was replaced); an
            optimizer that is not elementwise (Muon, LAMB, Adafactor, 8-bit ones) or not known;
            a tile that is no size or too small; under ZeRO the middle of an accumulation. The
            engine is not changed.
        UnsupportedDeepSpeedError: this DeepSpeed does not support it. The engine is not changed.

    Example:
        >>> engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        >>> lean_step(engine)                                             # doctest: +SKIP
    """
    step_lean(engine, parse_bytes(tile, "tile"))
