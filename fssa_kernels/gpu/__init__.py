"""What the Triton backends share; nothing here imports triton until a kernel is wanted."""
