"""Generation by a vLLM server that is given the trainer's weights. Imported only when a run asks for it."""
