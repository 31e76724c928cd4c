"""Parameter sizes of one rank of known models, full size or scaled down."""

from typing import NamedTuple

from tests.support.step_runs import Shape


class Architecture(NamedTuple):
    """The sizes from which those of a rank's parameters follow.

    Attributes:
        hidden: width of the model; all matrices scale with its square.
        vocabulary: rows of the embedding and of the head.
        attention: elements of the attention's matrices of one layer.
        inner: inner width of an expert.
        experts: number of experts of one MoE layer, over all ranks.
        moe_layers: number of layers with experts.
        most_ep: EP size, if the world has that many ranks.
        shared_inner: inner width of the shared expert of each MoE layer.
        dense_layers: number of layers without experts, which come first.
        dense_inner: inner width of their feed-forward part.
    """

    hidden: int
    vocabulary: int
    attention: tuple[int, ...]
    inner: int
    experts: int
    moe_layers: int
    most_ep: int
    shared_inner: int = 0
    dense_layers: int = 0
    dense_inner: int = 0

    def shape(self, world: int, scale: int = 1) -> Shape:
        """One rank's parameters; ``scale`` divides all widths, the vocabulary too."""
        ep_size = min(world, self.most_ep)
        square = scale * scale
        matrices = tuple(size // square for size in self.attention)
        norms = (self.hidden // scale,) * 2
        dense = (3 * (self.hidden * self.dense_inner // square,)) * self.dense_layers
        shared = (3 * (self.hidden * self.shared_inner // square,)) * bool(self.shared_inner)
        ends = (self.vocabulary * self.hidden // square,)
        layers = (matrices + norms) * (self.dense_layers + self.moe_layers)
        return Shape(
            dense=ends + layers + dense + shared * self.moe_layers + norms[:1] + ends,
            expert=3 * (self.hidden * self.inner // square,),
            layers=self.moe_layers,
            local=self.experts // ep_size,
            ep_size=ep_size,
            hidden=self.hidden // scale,
        )


MODELS = {
    "Mixtral-8x7B": Architecture(
        hidden=4096,
        vocabulary=32000,
        attention=(4096 * 4096, 4096 * 1024, 4096 * 1024, 4096 * 4096),
        inner=14336,
        experts=8,
        moe_layers=32,
        most_ep=8,
    ),
    "Qwen3-235B-A22B": Architecture(
        hidden=4096,
        vocabulary=151936,
        attention=(4096 * 8192, 4096 * 512, 4096 * 512, 8192 * 4096),
        inner=1536,
        experts=128,
        moe_layers=94,
        most_ep=32,
    ),
    "DeepSeek-V3": Architecture(
        hidden=7168,
        vocabulary=129280,
        attention=(7168 * 1536, 1536 * 24576, 7168 * 576, 512 * 32768, 16384 * 7168),
        inner=2048,
        experts=256,
        moe_layers=58,
        most_ep=64,
        shared_inner=2048,
        dense_layers=3,
        dense_inner=18432,
    ),
}
