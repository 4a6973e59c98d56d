"""The soft N:M mask as one operation: logits -> masked weight, and back."""

from compress_kernels.gumbel.reference import Draw, gumbel_noise, masked_weight, masked_weight_backward, probabilities, stream_key

__all__ = ["Draw", "gumbel_noise", "masked_weight", "masked_weight_backward", "probabilities", "stream_key"]
