"""fxcompress: a compiler that makes generative and vision models small and fast."""
