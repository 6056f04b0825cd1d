"""Generation with the model that is trained, in this process: decoding loop, cache, CUDA graph, batch size."""
