"""The named sizes of a Transformer."""

from vatt.config import SizeName, SizeParams

# Paper, section 4.1; heads are 64 wide. `tiny` is ours, for CPUs.
SIZES: dict[SizeName, SizeParams] = {
    "tiny": SizeParams(depth=4, dim=192, mlp_dim=768, heads=3, head_dim=64),
    "small": SizeParams(depth=6, dim=512, mlp_dim=2048, heads=8, head_dim=64),
    "base": SizeParams(depth=12, dim=768, mlp_dim=3072, heads=12, head_dim=64),
    "medium": SizeParams(depth=12, dim=1024, mlp_dim=4096, heads=16, head_dim=64),
    "large": SizeParams(depth=24, dim=1024, mlp_dim=4096, heads=16, head_dim=64),
}


def resolve(size: SizeName | SizeParams) -> SizeParams:
    """The dimensions behind a name; dimensions given as such stay as they are."""
    return size if isinstance(size, SizeParams) else SIZES[size]
