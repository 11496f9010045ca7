"""A real language model, SmolLM2-135M-Instruct, as the decoder of a PPLLaVA checkpoint."""
