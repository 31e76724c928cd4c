"""All changes in DeepSpeed that make it accept our groups."""

import sys

from moe_groups._deepspeed.checkpoints import (
    wrap_load,
    wrap_load_module,
    wrap_save,
    wrap_save_16bit,
)
from moe_groups._deepspeed.collectives import wrap_gather_tokens
from moe_groups._deepspeed.patching import Change, change_functions, check_functions
from moe_groups._deepspeed.stages import wrap_configure
from moe_groups._deepspeed.start import (
    wrap_basic,
    wrap_broadcast,
    wrap_moe_settings,
    wrap_report,
    wrap_sanity_check,
    wrap_setup,
)
from moe_groups._deepspeed.step.norms import (
    wrap_bf16_step,
    wrap_grads_for_norm,
    wrap_grads_for_reduction,
    wrap_is_model_parallel,
    wrap_norm,
    wrap_zero_norm,
)


def support_our_groups(moe: bool) -> None:
    """Make DeepSpeed accept our group names; see the package's docstring.

    Does nothing when called again, if DeepSpeed is not installed (grouping a model to look at
    the result needs no DeepSpeed), or if it is not imported and no group is ``moe``.

    Raises:
        UnsupportedDeepSpeedError: this DeepSpeed lacks a function that is needed.
            Nothing has been changed then.
    """
    if not moe and "deepspeed" not in sys.modules:
        return
    try:
        import deepspeed  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "deepspeed":
            return
        raise
    change_functions(CHANGES, _NEEDED_BY)


def check_contract() -> None:
    """Check that DeepSpeed has the functions that unique group names need; changes nothing.

    Raises:
        UnsupportedDeepSpeedError: a function is missing or takes other arguments.
    """
    check_functions(CHANGES, _NEEDED_BY)


_NEEDED_BY = "unique group names need"
_BF16 = "deepspeed.runtime.bf16_optimizer"
_ZERO = "deepspeed.runtime.zero.stage_1_and_2"
CHANGES: tuple[Change, ...] = (
    ("deepspeed.runtime.engine:DeepSpeedEngine", "_configure_distributed_model", wrap_configure),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "_broadcast_model", wrap_broadcast),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "_do_optimizer_sanity_check", wrap_sanity_check),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "_configure_basic_optimizer", wrap_basic),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "save_checkpoint", wrap_save),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "load_checkpoint", wrap_load),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "load_module_state_dict", wrap_load_module),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "save_16bit_model", wrap_save_16bit),
    (f"{_ZERO}:DeepSpeedZeroOptimizer", "_configure_moe_settings", wrap_moe_settings),
    (f"{_BF16}:BF16_Optimizer", "_configure_moe_settings", wrap_moe_settings),
    (f"{_BF16}:BF16_Optimizer", "_setup_for_real_optimizer", wrap_setup),
    (_BF16, "see_memory_usage", wrap_report),
    (_ZERO, "is_model_parallel_parameter", wrap_is_model_parallel),
    (f"{_ZERO}:DeepSpeedZeroOptimizer", "scaled_global_norm", wrap_zero_norm),
    (f"{_BF16}:BF16_Optimizer", "step", wrap_bf16_step),
    (f"{_BF16}:BF16_Optimizer", "get_grads_for_norm", wrap_grads_for_norm),
    (f"{_BF16}:BF16_Optimizer", "get_grads_for_reduction", wrap_grads_for_reduction),
    ("deepspeed.moe.mappings", "_gather_tokens", wrap_gather_tokens),
    ("deepspeed.runtime.fp16.fused_optimizer", "get_norm_with_moe_layers", wrap_norm),
)
