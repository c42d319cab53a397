"""What `surefoot ckpt` prints."""
