"""Generation by a vLLM server that receives the trainer's weights. Imported only when a run asks for it."""
