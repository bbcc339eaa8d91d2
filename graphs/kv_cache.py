"""KVCache: keys and values kept inside the module, as torchtune does for inference in PyTorch.

Exported graphs do not use it: there the cache is an explicit input and output.
"""

import torch
from torch import Tensor, nn


class KVCache(nn.Module):
    """Static buffers [batch_size, num_heads, max_seq_len, head_dim]; num_heads counts key/value heads."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, batch_size: int, max_seq_len: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (batch_size, num_heads, max_seq_len, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len

    def reset(self) -> None:
        """Forget everything."""
        self.k_cache.zero_()
        self.v_cache.zero_()

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Write [b, n_kv, s, h_d] at positions input_pos [s]; return both whole caches for these b rows.

        Raises:
            ValueError: more rows than batch_size, or as many positions as do not match s.
        """
        batch, length = k_val.shape[0], k_val.shape[2]
        if batch > self.batch_size:
            raise ValueError(f"the KV cache holds {self.batch_size} rows, got a batch of {batch}")
        if input_pos.shape != (length,):
            raise ValueError(f"input_pos has shape {tuple(input_pos.shape)}, expected ({length},)")
        self.k_cache[:batch, :, input_pos] = k_val
        self.v_cache[:batch, :, input_pos] = v_val
        return self.k_cache[:batch], self.v_cache[:batch]
