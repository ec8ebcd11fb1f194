"""Other people's models and files: transformers models in memory, PEFT adapters, the authors'
checkpoints of arXiv 2412.13998."""
