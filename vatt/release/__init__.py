"""The released TensorFlow checkpoints -> ours."""
