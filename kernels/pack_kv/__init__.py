"""Keys and values of new tokens in 8 or 4 bits, as `kernels.packed_kv` makes them, by one launch."""

from kernels.pack_kv.op import KERNEL, pack_kv

__all__ = ["KERNEL", "pack_kv"]
